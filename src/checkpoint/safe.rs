//! The files that hold tensors, memory-mapped: names, dtypes, shapes, bytes. Safetensors are read here, files of
//! `torch.save` in `pickle`, GGUF files in `gguf`.

use super::bnb::{self, Bits};
use super::gguf::{self, Metadata};
use super::{AGAIN, pickle};
use crate::error::{Error, Result};
use crate::ops::quantized::{Codes, Format};
use candle_core::quantized::GgmlDType;
use memmap2::Mmap;
use rayon::prelude::*;
use safetensors::SafeTensors;
use serde::de::{Deserialize, Deserializer, IgnoredAny, MapAccess, Visitor};
use std::borrow::Cow;
use std::collections::{BTreeMap, HashMap};
use std::fs::File;
use std::ops::Range;
use std::path::{Path, PathBuf};

/// Dtypes that weights come in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Dtype {
    /// 32 bit.
    F32,
    /// bfloat16.
    Bf16,
    /// IEEE half.
    F16,
}

impl Dtype {
    /// Bytes of an element.
    #[must_use]
    pub fn size(self) -> usize {
        if self == Self::F32 { 4 } else { 2 }
    }

    /// The name in a safetensors header.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::F32 => "F32",
            Self::Bf16 => "BF16",
            Self::F16 => "F16",
        }
    }

    /// The name in a config.json.
    #[must_use]
    pub fn long_name(self) -> &'static str {
        match self {
            Self::F32 => "float32",
            Self::Bf16 => "bfloat16",
            Self::F16 => "float16",
        }
    }

    /// Little-endian elements to f32.
    pub fn decode(self, bytes: &[u8], out: &mut [f32]) {
        match self {
            Self::F32 => {
                let values = bytes.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]]));
                out.iter_mut().zip(values).for_each(|(o, v)| *o = v);
            }
            Self::Bf16 => {
                let values = bytes.chunks_exact(2).map(|b| half::bf16::from_le_bytes([b[0], b[1]]).to_f32());
                out.iter_mut().zip(values).for_each(|(o, v)| *o = v);
            }
            Self::F16 => {
                let values = bytes.chunks_exact(2).map(|b| half::f16::from_le_bytes([b[0], b[1]]).to_f32());
                out.iter_mut().zip(values).for_each(|(o, v)| *o = v);
            }
        }
    }

    /// Whether all little-endian elements are finite numbers: those whose exponent is not all ones.
    fn all_finite(self, bytes: &[u8]) -> bool {
        const CHUNK: usize = 1 << 18;
        let exponent = if self == Self::F16 { 0x7c00 } else { 0x7f80 };
        // Of an f32 too, the upper half tells.
        let finite = |b: [u8; 2]| u16::from_le_bytes(b) & exponent != exponent;
        bytes.par_chunks(CHUNK).all(|chunk| match self {
            Self::F32 => chunk.chunks_exact(4).fold(true, |all, b| all & finite([b[2], b[3]])),
            Self::Bf16 | Self::F16 => chunk.chunks_exact(2).fold(true, |all, b| all & finite([b[0], b[1]])),
        })
    }

    /// f32 to little-endian elements, rounded to nearest even.
    #[must_use]
    pub fn encode(self, values: &[f32]) -> Vec<u8> {
        match self {
            Self::F32 => values.iter().flat_map(|v| v.to_le_bytes()).collect(),
            Self::Bf16 => values.iter().flat_map(|v| half::bf16::from_f32(*v).to_le_bytes()).collect(),
            Self::F16 => values.iter().flat_map(|v| half::f16::from_f32(*v).to_le_bytes()).collect(),
        }
    }
}

/// How a file keeps the elements of a tensor.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Elements {
    /// One by one.
    Plain(Dtype),
    /// In ggml's blocks of few bits.
    Blocks(GgmlDType),
    /// In few bits with the scales in tensors of their own, as bitsandbytes keeps them; given out so.
    Bits(Dtype),
}

impl Elements {
    /// The dtype in which they are given out.
    #[must_use]
    pub fn dtype(self) -> Dtype {
        match self {
            Self::Plain(dtype) | Self::Bits(dtype) => dtype,
            Self::Blocks(_) => Dtype::F32,
        }
    }
}

/// A tensor as a file holds it; blocks are decoded.
#[derive(Debug, Clone)]
pub struct Raw<'a> {
    /// Dtype.
    pub dtype: Dtype,
    /// Shape.
    pub shape: Vec<usize>,
    /// Elements, little-endian, row-major.
    pub bytes: Cow<'a, [u8]>,
}

impl Raw<'_> {
    /// The elements of these rows.
    #[must_use]
    pub fn rows(&self, ranges: &[Range<usize>]) -> Cow<'_, [u8]> {
        let row = self.shape.get(1).copied().unwrap_or(1) * self.dtype.size();
        let bytes = |range: &Range<usize>| &self.bytes[range.start * row..range.end * row];
        match ranges {
            [range] => Cow::Borrowed(bytes(range)),
            ranges => ranges.iter().flat_map(|range| bytes(range).iter().copied()).collect(),
        }
    }

    /// The elements in f32.
    #[must_use]
    pub fn to_f32(&self) -> Vec<f32> {
        let mut out = vec![0.0; self.bytes.len() / self.dtype.size()];
        self.dtype.decode(&self.bytes, &mut out);
        out
    }
}

#[derive(Debug)]
pub(super) struct Entry {
    file: usize,
    elements: Elements,
    shape: Vec<usize>,
    bytes: Range<usize>,
}

/// File, and bytes within it.
pub(super) type Place = (usize, Range<usize>);

/// A tensor of whole numbers, which is part of a weight in few bits.
#[derive(Debug)]
pub(super) struct Numbers {
    pub(super) dtype: String,
    pub(super) shape: Vec<usize>,
    pub(super) place: Place,
}

/// Memory-mapped files and where each tensor stands in them.
#[derive(Debug, Default)]
pub struct Shards {
    files: Vec<(PathBuf, Mmap)>,
    pub(super) entries: HashMap<String, Entry>,
    /// Those that [`bnb::assemble`] has not put together yet; none afterwards.
    pub(super) whole_numbers: HashMap<String, Numbers>,
    bits: HashMap<String, Bits>,
}

#[allow(unsafe_code)]
fn map(path: &Path) -> Result<Mmap> {
    let file = File::open(path).map_err(Error::io("read", path))?;
    // SAFETY: the map is read-only and every read is within its length; a file that another program shortens meanwhile
    // ends the process with SIGBUS, as for every program that maps its weights.
    unsafe { Mmap::map(&file) }.map_err(Error::io("map", path))
}

impl Shards {
    /// Maps the weights of a Hugging Face folder: `model.safetensors`, `pytorch_model.bin`, or the files of their index.
    ///
    /// # Errors
    /// When none is there, or one is broken.
    pub fn open(dir: &Path) -> Result<Self> {
        for name in ["model.safetensors", "pytorch_model.bin"] {
            let (single, index) = (dir.join(name), dir.join(format!("{name}.index.json")));
            if single.is_file() {
                return Self::of(vec![single]);
            }
            if index.is_file() {
                return Self::of(indexed(dir, &index)?);
            }
        }
        let hint = "`litgpt download REPO` fetches a model; model.safetensors, pytorch_model.bin, LitGPT's lit_model.pth and one .gguf file are read".to_owned();
        Err(Error::Missing { what: "weights".to_owned(), path: dir.join("model.safetensors"), hint })
    }

    /// Whether `dir` has weights that [`Shards::open`] reads.
    #[must_use]
    pub fn present(dir: &Path) -> bool {
        ["model.safetensors", "pytorch_model.bin"]
            .iter()
            .any(|name| dir.join(name).is_file() || dir.join(format!("{name}.index.json")).is_file())
    }

    /// Maps these files: safetensors by the ending of their name, others as files of `torch.save`.
    ///
    /// # Errors
    /// When one is missing or broken.
    pub fn of(paths: Vec<PathBuf>) -> Result<Self> {
        let mut shards = Self::default();
        for path in paths {
            shards.add(path)?;
        }
        bnb::assemble(&mut shards)?;
        Ok(shards)
    }

    /// Maps a GGUF file, and reads its settings.
    ///
    /// # Errors
    /// When it is missing or broken.
    pub fn gguf(path: &Path) -> Result<(Self, Metadata)> {
        let mmap = map(path)?;
        let (metadata, tensors) = gguf::header(path, &mmap)?;
        let entries = tensors.into_iter().map(|t| {
            let entry = Entry { file: 0, elements: t.elements, shape: t.shape, bytes: t.bytes };
            (t.name, entry)
        });
        let files = vec![(path.to_owned(), mmap)];
        Ok((Self { entries: entries.collect(), files, ..Self::default() }, metadata))
    }

    fn add(&mut self, path: PathBuf) -> Result<()> {
        let mmap = map(&path)?;
        let tensors = if path.extension().is_some_and(|e| e == "safetensors") {
            safetensors(&path, &mmap)?
        } else {
            pickle::tensors(&path, &mmap)?
                .into_iter()
                .map(|(name, t)| (name, t.dtype.to_owned(), t.shape, t.bytes))
                .collect()
        };
        for (name, dtype, shape, bytes) in tensors {
            let dtype = match dtype.as_str() {
                "F32" => Dtype::F32,
                "BF16" => Dtype::Bf16,
                "F16" => Dtype::F16,
                _ if ignored(&name) => continue,
                "U8" | "I8" => {
                    let numbers = Numbers { dtype, shape, place: (self.files.len(), bytes) };
                    if self.whole_numbers.insert(name.clone(), numbers).is_none() {
                        continue;
                    }
                    return Err(Self::twice(&path, &name));
                }
                other => {
                    let what = format!("dtype {other} of tensor `{name}` (`{}`)", path.display());
                    return Err(Error::unsupported(
                        what,
                        "F32, BF16 and F16 weights are read; choose another checkpoint",
                    ));
                }
            };
            let entry = Entry { file: self.files.len(), elements: Elements::Plain(dtype), shape, bytes };
            if self.entries.insert(name.clone(), entry).is_some() {
                return Err(Self::twice(&path, &name));
            }
        }
        self.files.push((path, mmap));
        Ok(())
    }

    fn twice(path: &Path, name: &str) -> Error {
        Error::invalid(path, format!("tensor `{name}` is in another file of the folder too"), AGAIN)
    }

    /// Calls the tensors by other names; those that `new_name` has none for are none any more.
    ///
    /// # Errors
    /// When two would have one name.
    pub(super) fn rename(&mut self, new_name: impl Fn(&str) -> Option<String>) -> Result<()> {
        let mut entries = HashMap::with_capacity(self.entries.len());
        for (name, entry) in self.entries.drain() {
            let Some(name) = new_name(&name) else { continue };
            let file = entry.file;
            if entries.insert(name.clone(), entry).is_some() {
                let problem = format!("two tensors stand for `{name}` of its text part");
                return Err(Error::invalid(&self.files[file].0, problem, AGAIN));
            }
        }
        self.entries = entries;
        self.bits = self.bits.drain().filter_map(|(name, bits)| Some((new_name(&name)?, bits))).collect();
        Ok(())
    }

    /// Whether both names are of the same bytes, or of equal ones.
    #[must_use]
    pub fn equal(&self, a: &str, b: &str) -> bool {
        match (self.entries.get(a), self.entries.get(b)) {
            (Some(a), Some(b)) if a.elements == b.elements && a.shape == b.shape => {
                let bytes = |e: &Entry| &self.files[e.file].1[e.bytes.clone()];
                a.file == b.file && a.bytes == b.bytes || bytes(a) == bytes(b)
            }
            _ => false,
        }
    }

    /// Where the bytes of the tensor of whole numbers `name` are, which is none of the tensors any more.
    pub(super) fn take_numbers(&mut self, name: &str) -> Result<Place> {
        self.whole_numbers.remove(name).map(|numbers| numbers.place).ok_or_else(|| self.missing(name))
    }

    /// Where the bytes of the tensor `name` of any dtype are, which is none of the tensors any more.
    pub(super) fn take(&mut self, name: &str) -> Result<Place> {
        match self.entries.remove(name) {
            Some(entry) => Ok((entry.file, entry.bytes)),
            None => self.take_numbers(name),
        }
    }

    /// Where the elements of the f32 tensor `name` are, which is none of the tensors any more.
    pub(super) fn take_floats(&mut self, name: &str) -> Result<Place> {
        let entry = self.entries.remove(name).filter(|entry| entry.elements == Elements::Plain(Dtype::F32));
        entry.map(|entry| (entry.file, entry.bytes)).ok_or_else(|| self.missing(name))
    }

    /// Makes `bits` the tensor `name`, whose elements are given out as `dtype`.
    pub(super) fn insert_bits(&mut self, name: &str, dtype: Dtype, bits: Bits) {
        let (shape, (file, bytes)) = bits.shape_and_codes();
        self.entries.insert(name.to_owned(), Entry { file, elements: Elements::Bits(dtype), shape, bytes });
        self.bits.insert(name.to_owned(), bits);
    }

    pub(super) fn bytes(&self, (file, range): &Place) -> &[u8] {
        &self.files[*file].1[range.clone()]
    }

    pub(super) fn path(&self, place: &Place) -> &Path {
        &self.files[place.0].0
    }

    /// How the tensors are quantized, where some are: one of them tells.
    #[must_use]
    pub fn format(&self) -> Option<Format> {
        self.bits.iter().min_by_key(|(name, _)| name.as_str()).map(|(_, bits)| bits.format())
    }

    /// Whether others than the tensor `name` are kept in few bits.
    #[must_use]
    pub fn leaves_whole(&self, name: &str) -> bool {
        !self.bits.is_empty() && !self.bits.contains_key(name)
    }

    /// The tensor `name` in few bits, if it is kept so.
    ///
    /// # Errors
    /// When its scales are no numbers.
    pub fn codes(&self, name: &str) -> Result<Option<Codes>> {
        self.bits.get(name).map(|bits| bits.codes(self, name)).transpose()
    }

    fn missing(&self, name: &str) -> Error {
        let path = self.files.first().map_or_else(PathBuf::new, |f| f.0.clone());
        Error::invalid(&path, format!("no tensor `{name}`"), AGAIN)
    }

    fn entry(&self, name: &str) -> Result<&Entry> {
        self.entries.get(name).ok_or_else(|| self.missing(name))
    }

    /// Dtype and shape of the tensor `name`.
    ///
    /// # Errors
    /// When there is none.
    pub fn info(&self, name: &str) -> Result<(Dtype, &[usize])> {
        self.entry(name).map(|entry| (entry.elements.dtype(), entry.shape.as_slice()))
    }

    /// The tensor `name`.
    ///
    /// # Errors
    /// When there is none.
    pub fn get(&self, name: &str) -> Result<Raw<'_>> {
        let entry = self.entry(name)?;
        let (path, file) = &self.files[entry.file];
        let bytes = &file[entry.bytes.clone()];
        let dtype = entry.elements.dtype();
        let bytes = match entry.elements {
            Elements::Plain(_) => Cow::Borrowed(bytes),
            Elements::Bits(_) => self.bits[name].decode(self, name, dtype)?.into(),
            Elements::Blocks(kind) => gguf::decode(kind, bytes)
                .map_err(|e| Error::invalid(path, format!("tensor `{name}` cannot be decoded: {e}"), AGAIN))?
                .into(),
        };
        Ok(Raw { dtype, shape: entry.shape.clone(), bytes })
    }

    /// Refuses `bytes` of the tensor `name` that hold NaN or infinity: every text through them would be nonsense.
    ///
    /// # Errors
    /// When they do.
    pub fn require_finite(&self, name: &str, dtype: Dtype, bytes: &[u8]) -> Result<()> {
        if dtype.all_finite(bytes) {
            return Ok(());
        }
        let path = self.entries.get(name).map_or_else(PathBuf::new, |entry| self.files[entry.file].0.clone());
        Err(Error::invalid(&path, format!("tensor `{name}` has values that are not finite numbers"), AGAIN))
    }

    /// Lets the system drop a tensor's pages from memory; they are read again when they are wanted again.
    #[allow(unsafe_code)]
    pub fn release(&self, name: &str) {
        if let Some(entry) = self.entries.get(name) {
            let range = &entry.bytes;
            // SAFETY: the map is read-only and backed by its file, so dropped pages come back with the same content.
            // A refusal costs memory, nothing else.
            let _ = unsafe {
                self.files[entry.file].1.unchecked_advise_range(
                    memmap2::UncheckedAdvice::DontNeed,
                    range.start,
                    range.len(),
                )
            };
        }
    }

    /// Names of all tensors, sorted.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        let mut names: Vec<&str> = self.entries.keys().map(String::as_str).collect();
        names.sort_unstable();
        names.into_iter()
    }

    /// The files, with the names of each in the order of their data.
    #[must_use]
    pub fn files(&self) -> BTreeMap<PathBuf, Vec<String>> {
        let mut files: BTreeMap<PathBuf, Vec<(usize, String)>> =
            self.files.iter().map(|f| (f.0.clone(), Vec::new())).collect();
        for (name, entry) in &self.entries {
            files.entry(self.files[entry.file].0.clone()).or_default().push((entry.bytes.start, name.clone()));
        }
        files
            .into_iter()
            .map(|(path, mut names)| {
                names.sort_unstable();
                (path, names.into_iter().map(|n| n.1).collect())
            })
            .collect()
    }
}

/// Masks and index buffers of old exports: no weights.
fn ignored(name: &str) -> bool {
    name.ends_with("_bias") || name.ends_with(".bias") || name.ends_with("position_ids")
}

/// A tensor of a file: name, dtype, shape, where its bytes are.
type Found = (String, String, Vec<usize>, Range<usize>);

/// How often a JSON object has each of its keys.
struct Names(HashMap<String, usize>);

impl<'de> Deserialize<'de> for Names {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Self, D::Error> {
        struct Keys;
        impl<'de> Visitor<'de> for Keys {
            type Value = Names;

            fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str("an object")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> std::result::Result<Names, A::Error> {
                let mut names = HashMap::new();
                while let Some((name, _)) = map.next_entry::<String, IgnoredAny>()? {
                    *names.entry(name).or_default() += 1;
                }
                Ok(Names(names))
            }
        }
        deserializer.deserialize_map(Keys)
    }
}

/// The tensors of a safetensors file.
fn safetensors(path: &Path, file: &[u8]) -> Result<Vec<Found>> {
    let broken = |e: String| Error::invalid(path, format!("not a whole safetensors file: {e}"), AGAIN);
    let (header, metadata) = SafeTensors::read_metadata(file).map_err(|e| broken(e.to_string()))?;
    let data = header + 8;
    let Names(names) = serde_json::from_slice(&file[8..data]).map_err(|e| broken(e.to_string()))?;
    if let Some(twice) = names.iter().find(|(_, times)| **times > 1) {
        return Err(broken(format!("tensor `{}` stands in the header twice", twice.0)));
    }
    let mut found = Vec::new();
    for (name, info) in metadata.tensors() {
        let dtype = info.dtype;
        let bytes = data + info.data_offsets.0..data + info.data_offsets.1;
        let elements = info.shape.iter().try_fold(1usize, |n, d| n.checked_mul(*d));
        let fits = elements.and_then(|n| n.checked_mul(dtype.bitsize())) == bytes.len().checked_mul(8);
        if bytes.end > file.len() || !fits {
            return Err(broken(format!("tensor `{name}` reaches beyond the file or has another size than its shape")));
        }
        found.push((name, dtype.to_string(), info.shape.clone(), bytes));
    }
    Ok(found)
}

/// The files that an index names, each a plain name within the folder.
fn indexed(dir: &Path, index: &Path) -> Result<Vec<PathBuf>> {
    let text = std::fs::read_to_string(index).map_err(Error::io("read", index))?;
    let json: serde_json::Value =
        serde_json::from_str(&text).map_err(|e| Error::invalid(index, format!("not JSON: {e}"), AGAIN))?;
    let map = json.get("weight_map").and_then(|m| m.as_object());
    let map = map.ok_or_else(|| Error::invalid(index, "no `weight_map` object", AGAIN))?;
    let mut names: Vec<&str> = Vec::new();
    for (tensor, file) in map {
        let name = file.as_str().filter(|n| Path::new(n).file_name().is_some_and(|f| f == *n) && !n.contains('\\'));
        names.push(name.ok_or_else(|| {
            Error::invalid(index, format!("`weight_map` of `{tensor}` is {file}, not a file of this folder"), AGAIN)
        })?);
    }
    names.sort_unstable();
    names.dedup();
    let missing: Vec<&str> = names.iter().copied().filter(|n| !dir.join(n).is_file()).collect();
    if !missing.is_empty() || names.is_empty() {
        let what = format!("files of `{}` are missing", index.display());
        let mut problems: Vec<String> = missing.iter().take(6).map(|n| format!("`{n}`")).collect();
        if missing.len() > problems.len() {
            problems.push(format!("and {} more", missing.len() - problems.len()));
        }
        return Err(Error::Mismatch { what, problems, hint: AGAIN.to_owned() });
    }
    Ok(names.into_iter().map(|n| dir.join(n)).collect())
}
