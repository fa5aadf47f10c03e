//! Reading the GGUF container, versions 2 and 3: settings by key, and where the bytes of each tensor stand.
//!
//! Every length, count and offset is checked against the file before it is used: nothing is allocated by a number that
//! only the file claims. A message names the key or tensor at which the file is broken.

use super::blocks;
use crate::checkpoint::Elements;
use crate::error::{Error, Result};
use std::collections::{HashMap, HashSet};
use std::ops::Range;
use std::path::{Path, PathBuf};

const HINT: &str = "download the file again; it may be cut off";
/// Most elements of a list: ten times the largest vocabulary.
const MOST_ELEMENTS: u64 = 1 << 22;
/// Most dimensions of a tensor.
const MOST_DIMS: u32 = 4;
/// Where tensors begin unless `general.alignment` says otherwise.
const ALIGNMENT: usize = 32;

/// A value of the file, integers and floats of all widths as one.
#[derive(Debug, Clone, PartialEq)]
enum Setting {
    Int(i128),
    Float(f64),
    Flag(bool),
    Text(String),
    Texts(Vec<String>),
    Ints(Vec<i128>),
    Floats(Vec<f32>),
}

/// The settings of a file.
#[derive(Debug)]
pub struct Metadata {
    path: PathBuf,
    values: HashMap<String, Setting>,
}

/// A tensor of a file.
#[derive(Debug)]
pub struct Found {
    /// Name.
    pub name: String,
    /// How its elements are kept.
    pub elements: Elements,
    /// Shape, the slowest dimension first.
    pub shape: Vec<usize>,
    /// Its bytes in the file.
    pub bytes: Range<usize>,
}

/// Settings and tensors of the file `path`, whose bytes are `file`.
///
/// # Errors
/// When the file is broken, cut off or of an unknown version, or keeps elements in an unknown way.
pub fn header(path: &Path, file: &[u8]) -> Result<(Metadata, Vec<Found>)> {
    let mut cursor = Cursor { path, bytes: file, at: 0, place: "the header".to_owned() };
    if cursor.take(4).ok() != Some(b"GGUF") {
        let hint = "a checkpoint is a Hugging Face folder, a LitGPT folder or a GGUF file";
        return Err(Error::invalid(path, "not a GGUF file", hint));
    }
    let version = cursor.u32()?;
    if !matches!(version, 2 | 3) {
        let what = format!("version {version:#x} of GGUF (`{}`)", path.display());
        return Err(Error::unsupported(what, "versions 2 and 3, little-endian, are read: convert the model again"));
    }
    let (tensors, settings) = (cursor.u64()?, cursor.u64()?);
    let mut metadata = Metadata { path: path.to_owned(), values: HashMap::new() };
    for index in 0..settings {
        cursor.place = format!("setting {index} of {settings}");
        let key = cursor.text()?;
        cursor.place = format!("`{key}`");
        let kind = cursor.u32()?;
        let value = cursor.setting(kind)?;
        if metadata.values.insert(key, value).is_some() {
            return Err(cursor.broken("is there twice"));
        }
    }
    let mut entries = Vec::new();
    for index in 0..tensors {
        cursor.place = format!("tensor {index} of {tensors}");
        entries.push(cursor.entry()?);
    }
    let alignment = metadata.count("general.alignment")?.unwrap_or(ALIGNMENT);
    // Blocks hold numbers of up to 4 bytes, which are read where they stand.
    if !alignment.is_multiple_of(8) || !(8..=1 << 20).contains(&alignment) {
        return Err(metadata.invalid(format!("`general.alignment` is {alignment}, not a multiple of 8")));
    }
    let start = cursor.at.next_multiple_of(alignment);
    let mut names = HashSet::new();
    let mut found = Vec::new();
    for entry in entries {
        if !names.insert(entry.name.clone()) {
            return Err(metadata.invalid(format!("tensor `{}` is there twice", entry.name)));
        }
        found.push(entry.place(&metadata, file.len(), start, alignment)?);
    }
    Ok((metadata, found))
}

/// A tensor as the header has it.
struct Entry {
    name: String,
    /// The fastest dimension first.
    dims: Vec<u64>,
    kind: u32,
    offset: u64,
}

impl Entry {
    /// The tensor's place in a file of `len` bytes whose tensors begin at `start`.
    fn place(self, metadata: &Metadata, len: usize, start: usize, alignment: usize) -> Result<Found> {
        let broken = |problem: &str| metadata.invalid(format!("tensor `{}` {problem}", self.name));
        let elements = blocks::elements(self.kind).map_err(|kind| {
            let what = format!("elements of type {kind}, of tensor `{}` (`{}`)", self.name, metadata.path.display());
            Error::unsupported(what, "F32, F16, BF16, Q4_0 to Q8_0 and Q2_K to Q6_K are read: take a file of those")
        })?;
        let (block, size) = blocks::block(elements);
        if self.dims.first().is_none_or(|columns| *columns == 0 || !columns.is_multiple_of(block as u64)) {
            return Err(broken("has rows that are no whole blocks"));
        }
        let shape: Option<Vec<usize>> = self.dims.iter().rev().map(|d| usize::try_from(*d).ok()).collect();
        let shape = shape.ok_or_else(|| broken("has an impossible shape"))?;
        let count = shape.iter().try_fold(1usize, |n, d| n.checked_mul(*d));
        let bytes = count.and_then(|n| (n / block).checked_mul(size));
        let from = usize::try_from(self.offset).ok().and_then(|offset| offset.checked_add(start));
        let (Some(bytes), Some(from)) = (bytes, from) else { return Err(broken("has an impossible shape or place")) };
        if !from.is_multiple_of(alignment) {
            return Err(broken("does not begin where `general.alignment` has it begin"));
        }
        match from.checked_add(bytes).filter(|to| *to <= len) {
            Some(to) => Ok(Found { name: self.name, elements, shape, bytes: from..to }),
            None => Err(broken("reaches beyond the end of the file")),
        }
    }
}

/// Reads a header; `place` is what is being read, for messages.
struct Cursor<'a> {
    path: &'a Path,
    bytes: &'a [u8],
    at: usize,
    place: String,
}

impl<'a> Cursor<'a> {
    fn broken(&self, problem: &str) -> Error {
        Error::invalid(self.path, format!("{} {problem}", self.place), HINT)
    }

    fn take(&mut self, len: u64) -> Result<&'a [u8]> {
        let left = &self.bytes[self.at..];
        match usize::try_from(len).ok().filter(|len| *len <= left.len()) {
            Some(len) => {
                self.at += len;
                Ok(&left[..len])
            }
            None => Err(self.broken("reaches beyond the end of the file")),
        }
    }

    /// A little-endian number of `len` bytes, at most 8.
    fn unsigned(&mut self, len: u64) -> Result<u64> {
        Ok(self.take(len)?.iter().rev().fold(0, |n, byte| n << 8 | u64::from(*byte)))
    }

    fn u32(&mut self) -> Result<u32> {
        Ok(self.unsigned(4)? as u32)
    }

    fn u64(&mut self) -> Result<u64> {
        self.unsigned(8)
    }

    fn text(&mut self) -> Result<String> {
        let len = self.u64()?;
        let bytes = self.take(len)?;
        std::str::from_utf8(bytes).map(str::to_owned).map_err(|_| self.broken("is no UTF-8 text"))
    }

    /// Bytes of a number or flag.
    fn width(&self, kind: u32) -> Result<u64> {
        match kind {
            0 | 1 | 7 => Ok(1),
            2 | 3 => Ok(2),
            4..=6 => Ok(4),
            10..=12 => Ok(8),
            _ => Err(self.broken(&format!("has the unknown type {kind}"))),
        }
    }

    fn int(&mut self, kind: u32) -> Result<i128> {
        let width = self.width(kind)?;
        let number = self.unsigned(width)?;
        let unused = 64 - 8 * width;
        let signed = matches!(kind, 1 | 3 | 5 | 11);
        Ok(if signed { i128::from((number << unused) as i64 >> unused) } else { i128::from(number) })
    }

    fn float(&mut self, kind: u32) -> Result<f64> {
        if kind == 12 {
            return Ok(f64::from_bits(self.u64()?));
        }
        // 1e-5 in 32 bits is to be 1e-5 in config.json, too.
        let narrow = f32::from_bits(self.u32()?);
        Ok(narrow.to_string().parse().unwrap_or_else(|_| f64::from(narrow)))
    }

    fn setting(&mut self, kind: u32) -> Result<Setting> {
        match kind {
            6 | 12 => self.float(kind).map(Setting::Float),
            7 => Ok(Setting::Flag(self.unsigned(1)? != 0)),
            8 => self.text().map(Setting::Text),
            9 => self.list(),
            _ => self.int(kind).map(Setting::Int),
        }
    }

    fn list(&mut self) -> Result<Setting> {
        let (kind, len) = (self.u32()?, self.u64()?);
        if kind == 9 {
            return Err(self.broken("is a list of lists, which no model has"));
        }
        let least = if kind == 8 { 8 } else { self.width(kind)? };
        if len > MOST_ELEMENTS || len * least > (self.bytes.len() - self.at) as u64 {
            return Err(self.broken(&format!("announces {len} elements, more than there are")));
        }
        match kind {
            8 => (0..len).map(|_| self.text()).collect::<Result<_>>().map(Setting::Texts),
            6 => (0..len).map(|_| Ok(f32::from_bits(self.u32()?))).collect::<Result<_>>().map(Setting::Floats),
            12 => (0..len).map(|_| Ok(self.float(12)? as f32)).collect::<Result<_>>().map(Setting::Floats),
            _ => (0..len).map(|_| self.int(kind)).collect::<Result<_>>().map(Setting::Ints),
        }
    }

    fn entry(&mut self) -> Result<Entry> {
        let name = self.text()?;
        self.place = format!("tensor `{name}`");
        let dims = self.u32()?;
        if dims == 0 || dims > MOST_DIMS {
            return Err(self.broken(&format!("has {dims} dimensions")));
        }
        let dims = (0..dims).map(|_| self.u64()).collect::<Result<_>>()?;
        Ok(Entry { name, dims, kind: self.u32()?, offset: self.u64()? })
    }
}

impl Metadata {
    /// The file.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// An error of this file.
    pub fn invalid(&self, problem: impl Into<String>) -> Error {
        Error::invalid(&self.path, problem, HINT)
    }

    /// Something of this file that cannot be done right.
    pub fn unsupported(&self, what: &str, hint: &str) -> Error {
        Error::unsupported(format!("{what} (`{}`)", self.path.display()), hint)
    }

    fn get<'a, T>(&'a self, key: &str, wanted: &str, read: impl Fn(&'a Setting) -> Option<T>) -> Result<Option<T>> {
        let Some(value) = self.values.get(key) else { return Ok(None) };
        read(value).map(Some).ok_or_else(|| self.invalid(format!("`{key}` is not {wanted}")))
    }

    /// A value that has to be there.
    ///
    /// # Errors
    /// When it is not.
    pub fn need<T>(&self, key: &str, value: Option<T>) -> Result<T> {
        value.ok_or_else(|| self.invalid(format!("no `{key}`")))
    }

    /// A count.
    ///
    /// # Errors
    /// When it is none.
    pub fn count(&self, key: &str) -> Result<Option<usize>> {
        self.get(key, "a count", |value| match value {
            Setting::Int(n) => u32::try_from(*n).ok().map(|n| n as usize),
            _ => None,
        })
    }

    /// A number.
    ///
    /// # Errors
    /// When it is none, or not finite.
    pub fn number(&self, key: &str) -> Result<Option<f64>> {
        self.get(key, "a number", |value| match value {
            Setting::Float(v) => Some(*v).filter(|v| v.is_finite()),
            Setting::Int(n) => Some(*n as f64),
            _ => None,
        })
    }

    /// A switch.
    ///
    /// # Errors
    /// When it is none.
    pub fn flag(&self, key: &str) -> Result<Option<bool>> {
        self.get(key, "true or false", |value| match value {
            Setting::Flag(flag) => Some(*flag),
            _ => None,
        })
    }

    /// A text.
    ///
    /// # Errors
    /// When it is none.
    pub fn text(&self, key: &str) -> Result<Option<&str>> {
        self.get(key, "a text", |value| match value {
            Setting::Text(text) => Some(text.as_str()),
            _ => None,
        })
    }

    /// A list of texts.
    ///
    /// # Errors
    /// When it is none.
    pub fn texts(&self, key: &str) -> Result<Option<&[String]>> {
        self.get(key, "a list of texts", |value| match value {
            Setting::Texts(list) => Some(list.as_slice()),
            _ => None,
        })
    }

    /// A list of integers.
    ///
    /// # Errors
    /// When it is none.
    pub fn ints(&self, key: &str) -> Result<Option<&[i128]>> {
        self.get(key, "a list of integers", |value| match value {
            Setting::Ints(list) => Some(list.as_slice()),
            _ => None,
        })
    }

    /// A list of floats.
    ///
    /// # Errors
    /// When it is none.
    pub fn floats(&self, key: &str) -> Result<Option<&[f32]>> {
        self.get(key, "a list of floats", |value| match value {
            Setting::Floats(list) => Some(list.as_slice()),
            _ => None,
        })
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::super::blocks::Kind;
    use super::super::write::{self, Info, Value};
    use super::*;

    /// A file with a setting of each kind and two tensors.
    fn file() -> Vec<u8> {
        let text = |text: &str| text.to_owned();
        let settings = vec![
            (text("a.count"), Value::U32(7)),
            (text("a.number"), Value::F32(1e-5)),
            (text("a.flag"), Value::Bool(true)),
            (text("a.text"), Value::Text(text("é"))),
            (text("a.texts"), Value::Texts(vec![text("x"), text("")])),
            (text("a.ints"), Value::I32s(vec![-3, 4])),
            (text("a.floats"), Value::F32s(vec![0.5])),
        ];
        let info = |name: &str, kind, shape| Info { name: text(name), kind, shape };
        let tensors = [info("one", Kind::F16, vec![3]), info("two", Kind::Q8_0, vec![2, 32])];
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x.gguf");
        let content =
            |index: usize| Ok([Kind::F16.encode(&[1.0, 2.0, 3.0]), Kind::Q8_0.encode(&[1.0; 64])][index].clone());
        write::write(&path, &settings, &tensors, content).unwrap();
        std::fs::read(path).unwrap()
    }

    fn read(bytes: &[u8]) -> Result<(Metadata, Vec<Found>)> {
        header(Path::new("x.gguf"), bytes)
    }

    #[test]
    fn what_is_written_is_read() {
        let bytes = file();
        let (metadata, tensors) = read(&bytes).unwrap();
        assert_eq!(metadata.count("a.count").unwrap(), Some(7));
        assert_eq!(metadata.number("a.number").unwrap(), Some(1e-5));
        assert_eq!(metadata.flag("a.flag").unwrap(), Some(true));
        assert_eq!(metadata.text("a.text").unwrap(), Some("é"));
        assert_eq!(metadata.texts("a.texts").unwrap().unwrap(), ["x", ""]);
        assert_eq!(metadata.ints("a.ints").unwrap().unwrap(), [-3, 4]);
        assert_eq!(metadata.floats("a.floats").unwrap().unwrap(), [0.5]);
        assert_eq!(metadata.count("a.nothing").unwrap(), None);
        assert!(metadata.count("a.text").unwrap_err().to_string().contains("`a.text` is not a count"));
        assert_eq!((tensors[0].name.as_str(), tensors[0].shape.as_slice()), ("one", &[3][..]));
        assert_eq!(&bytes[tensors[0].bytes.clone()], Kind::F16.encode(&[1.0, 2.0, 3.0]));
        assert_eq!((tensors[1].shape.as_slice(), tensors[1].bytes.len()), (&[2, 32][..], 2 * 34));
    }

    /// Every cut is an error; every changed byte is an error or leaves all tensors within the file.
    #[test]
    fn cut_and_changed_files_are_refused_without_panic() {
        let bytes = file();
        for len in 0..bytes.len() - 32 {
            let problem = read(&bytes[..len]).unwrap_err().to_string();
            assert!(problem.contains("x.gguf") && !problem.contains('\n'), "{problem}");
        }
        for at in 0..bytes.len() {
            for value in [0, 1, 9, 0x7f, 0xff] {
                let mut changed = bytes.clone();
                changed[at] = value;
                match read(&changed) {
                    Ok((_, tensors)) => assert!(tensors.iter().all(|t| t.bytes.end <= bytes.len())),
                    Err(e) => assert!(!e.to_string().contains('\n'), "{e}"),
                }
            }
        }
    }

    #[test]
    fn absurd_lengths_allocate_nothing() {
        let start = |tensors: u64, settings: u64| {
            let mut out = b"GGUF\x03\0\0\0".to_vec();
            out.extend(tensors.to_le_bytes().iter().chain(&settings.to_le_bytes()));
            out
        };
        let huge = u64::MAX / 2;
        assert!(read(&start(huge, 0)).unwrap_err().to_string().contains("tensor 0 of"));
        assert!(read(&start(0, huge)).unwrap_err().to_string().contains("setting 0 of"));
        let mut list = start(0, 1);
        list.extend(1u64.to_le_bytes().iter().chain(b"k").chain(&9u32.to_le_bytes()).chain(&8u32.to_le_bytes()));
        list.extend(huge.to_le_bytes());
        assert!(read(&list).unwrap_err().to_string().contains("`k` announces"));
        // 2^63 elements of a tensor whose bytes are counted without overflow.
        let mut tensor = start(1, 0);
        tensor.extend(1u64.to_le_bytes().iter().chain(b"t").chain(&2u32.to_le_bytes()));
        tensor.extend((1u64 << 33).to_le_bytes().iter().chain(&(1u64 << 33).to_le_bytes()).chain(&[0; 12]));
        assert!(read(&tensor).unwrap_err().to_string().contains("tensor `t` has an impossible shape"));
    }

    #[test]
    fn other_versions_and_element_types_are_named() {
        let mut bytes = file();
        bytes[4] = 1;
        assert!(read(&bytes).unwrap_err().to_string().contains("version 0x1"));
        let mut bytes = file();
        let place = bytes.windows(3).position(|w| w == b"two").unwrap() + 3 + 4 + 16;
        bytes[place] = 23;
        let e = read(&bytes).unwrap_err();
        assert!(matches!(e, Error::Unsupported { .. }) && e.to_string().contains("IQ4_XS, of tensor `two`"), "{e}");
    }
}
