//! The files that hold tensors, memory-mapped: names, dtypes, shapes, bytes. Safetensors are read here, files of
//! `torch.save` in `pickle`, GGUF files in `gguf`.

use super::gguf::{self, Metadata};
use super::{AGAIN, pickle};
use crate::error::{Error, Result};
use candle_core::quantized::GgmlDType;
use memmap2::Mmap;
use safetensors::SafeTensors;
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
}

impl Elements {
    /// The dtype in which they are given out.
    #[must_use]
    pub fn dtype(self) -> Dtype {
        match self {
            Self::Plain(dtype) => dtype,
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
struct Entry {
    file: usize,
    elements: Elements,
    shape: Vec<usize>,
    bytes: Range<usize>,
}

/// Memory-mapped files and where each tensor stands in them.
#[derive(Debug)]
pub struct Shards {
    files: Vec<(PathBuf, Mmap)>,
    entries: HashMap<String, Entry>,
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
        let mut shards = Self { files: Vec::new(), entries: HashMap::new() };
        for path in paths {
            shards.add(path)?;
        }
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
        Ok((Self { entries: entries.collect(), files: vec![(path.to_owned(), mmap)] }, metadata))
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
                // Masks and index buffers of old exports: no weights.
                _ if name.ends_with("_bias") || name.ends_with(".bias") || name.ends_with("position_ids") => continue,
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
                return Err(Error::invalid(
                    &path,
                    format!("tensor `{name}` is in another file of the folder too"),
                    AGAIN,
                ));
            }
        }
        self.files.push((path, mmap));
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

    fn entry(&self, name: &str) -> Result<&Entry> {
        self.entries.get(name).ok_or_else(|| {
            let path = self.files.first().map_or_else(PathBuf::new, |f| f.0.clone());
            Error::invalid(&path, format!("no tensor `{name}`"), AGAIN)
        })
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
        let bytes = match entry.elements {
            Elements::Plain(_) => Cow::Borrowed(bytes),
            Elements::Blocks(kind) => gguf::decode(kind, bytes)
                .map_err(|e| Error::invalid(path, format!("tensor `{name}` cannot be decoded: {e}"), AGAIN))?
                .into(),
        };
        Ok(Raw { dtype: entry.elements.dtype(), shape: entry.shape.clone(), bytes })
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

/// A tensor of a file: name, dtype, shape, where its bytes are.
type Found = (String, String, Vec<usize>, Range<usize>);

/// The tensors of a safetensors file.
fn safetensors(path: &Path, file: &[u8]) -> Result<Vec<Found>> {
    let broken = |e: String| Error::invalid(path, format!("not a whole safetensors file: {e}"), AGAIN);
    let (header, metadata) = SafeTensors::read_metadata(file).map_err(|e| broken(e.to_string()))?;
    let data = header + 8;
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
        let problems = missing.iter().map(|n| format!("`{n}`")).collect();
        return Err(Error::Mismatch { what, problems, hint: AGAIN.to_owned() });
    }
    Ok(names.into_iter().map(|n| dir.join(n)).collect())
}
