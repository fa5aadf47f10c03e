//! The GGUF container, version 3: settings by key, then the tensors' names, shapes and places, then their bytes.

use super::blocks::Kind;
use crate::error::{Error, Result};
use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::Path;

/// Every tensor begins at a multiple of this.
const ALIGNMENT: usize = 32;

/// A setting.
#[derive(Debug, Clone)]
pub enum Value {
    /// `UINT32`.
    U32(u32),
    /// `FLOAT32`.
    F32(f32),
    /// `BOOL`.
    Bool(bool),
    /// `STRING`.
    Text(String),
    /// `ARRAY` of `STRING`.
    Texts(Vec<String>),
    /// `ARRAY` of `INT32`.
    I32s(Vec<i32>),
    /// `ARRAY` of `FLOAT32`.
    F32s(Vec<f32>),
}

/// Settings in the order of the file.
pub type Settings = Vec<(String, Value)>;

/// Name, kind and shape of a tensor; rows first.
#[derive(Debug, Clone)]
pub struct Info {
    /// Name.
    pub name: String,
    /// Kind of its elements.
    pub kind: Kind,
    /// Shape, the slowest dimension first.
    pub shape: Vec<usize>,
}

impl Info {
    fn bytes(&self) -> usize {
        self.kind.bytes(self.shape.iter().product())
    }
}

/// Writes a file whose tensors' bytes `content` gives one after the other.
///
/// # Errors
/// When `content` fails or the disk is full.
pub fn write(
    path: &Path,
    settings: &Settings,
    tensors: &[Info],
    mut content: impl FnMut(usize) -> Result<Vec<u8>>,
) -> Result<()> {
    let file = File::create(path).map_err(Error::io("create", path))?;
    let mut out = BufWriter::with_capacity(1 << 20, file);
    let mut write = |bytes: &[u8]| out.write_all(bytes).map_err(Error::io("write", path));
    write(&header(settings, tensors))?;
    for (index, tensor) in tensors.iter().enumerate() {
        let mut bytes = content(index)?;
        debug_assert_eq!(bytes.len(), tensor.bytes());
        bytes.resize(bytes.len().next_multiple_of(ALIGNMENT), 0);
        write(&bytes)?;
    }
    out.flush().map_err(Error::io("write", path))
}

fn header(settings: &Settings, tensors: &[Info]) -> Vec<u8> {
    let mut out = b"GGUF".to_vec();
    out.extend(3u32.to_le_bytes());
    out.extend((tensors.len() as u64).to_le_bytes());
    out.extend((settings.len() as u64).to_le_bytes());
    for (key, value) in settings {
        text(&mut out, key);
        setting(&mut out, value);
    }
    let mut at = 0;
    for tensor in tensors {
        text(&mut out, &tensor.name);
        out.extend((tensor.shape.len() as u32).to_le_bytes());
        tensor.shape.iter().rev().for_each(|d| out.extend((*d as u64).to_le_bytes()));
        out.extend(tensor.kind.id().to_le_bytes());
        out.extend((at as u64).to_le_bytes());
        at += tensor.bytes().next_multiple_of(ALIGNMENT);
    }
    out.resize(out.len().next_multiple_of(ALIGNMENT), 0);
    out
}

fn text(out: &mut Vec<u8>, text: &str) {
    out.extend((text.len() as u64).to_le_bytes());
    out.extend(text.as_bytes());
}

fn setting(out: &mut Vec<u8>, value: &Value) {
    let array = |out: &mut Vec<u8>, element: u32, len: usize| {
        out.extend(9u32.to_le_bytes());
        out.extend(element.to_le_bytes());
        out.extend((len as u64).to_le_bytes());
    };
    match value {
        Value::U32(v) => [4, *v].iter().for_each(|v| out.extend(v.to_le_bytes())),
        Value::F32(v) => {
            out.extend(6u32.to_le_bytes());
            out.extend(v.to_le_bytes());
        }
        Value::Bool(v) => {
            out.extend(7u32.to_le_bytes());
            out.push(u8::from(*v));
        }
        Value::Text(v) => {
            out.extend(8u32.to_le_bytes());
            text(out, v);
        }
        Value::Texts(v) => {
            array(out, 8, v.len());
            v.iter().for_each(|v| text(out, v));
        }
        Value::I32s(v) => {
            array(out, 5, v.len());
            v.iter().for_each(|v| out.extend(v.to_le_bytes()));
        }
        Value::F32s(v) => {
            array(out, 6, v.len());
            v.iter().for_each(|v| out.extend(v.to_le_bytes()));
        }
    }
}
