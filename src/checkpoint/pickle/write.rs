//! The other way: a state dict as `torch.save` writes it.

use crate::checkpoint::Dtype;
use crate::checkpoint::archive::Writer;
use crate::checkpoint::write::TensorInfo;
use crate::error::{Error, Result};
use std::fs::File;
use std::io::BufWriter;
use std::path::Path;

/// Writes a state dict that PyTorch reads with `weights_only=True` and `mmap=True`. `content` gives the tensors' bytes
/// one after the other; `shared` are further names of the tensor at an index.
///
/// # Errors
/// When `content` fails or the disk is full.
pub fn save(
    path: &Path,
    tensors: &[TensorInfo],
    shared: &[(&str, usize)],
    mut content: impl FnMut(usize) -> Result<Vec<u8>>,
) -> Result<()> {
    let file = File::create(path).map_err(Error::io("create", path))?;
    let mut writer = Writer::new(BufWriter::with_capacity(1 << 20, file));
    let mut add =
        |name: &str, bytes: &[u8]| writer.add(&format!("archive/{name}"), bytes).map_err(Error::io("write", path));
    add("data.pkl", &program(tensors, shared))?;
    add("byteorder", b"little")?;
    for index in 0..tensors.len() {
        add(&format!("data/{index}"), &content(index)?)?;
    }
    add("version", b"3\n")?;
    writer.finish().map_err(Error::io("write", path))
}

/// The pickle of a dict of tensors, tensor `i` in storage `i`.
pub(super) fn program(tensors: &[TensorInfo], shared: &[(&str, usize)]) -> Vec<u8> {
    let mut out = b"\x80\x02}(".to_vec();
    let names = tensors.iter().enumerate().map(|(i, t)| (t.name.as_str(), i)).chain(shared.iter().copied());
    for (name, index) in names {
        let TensorInfo { dtype, shape, .. } = &tensors[index];
        let elements: usize = shape.iter().product();
        text(&mut out, name);
        out.extend(b"ctorch._utils\n_rebuild_tensor_v2\n((");
        text(&mut out, "storage");
        let class = match dtype {
            Dtype::F32 => "FloatStorage",
            Dtype::Bf16 => "BFloat16Storage",
            Dtype::F16 => "HalfStorage",
        };
        out.extend(format!("ctorch\n{class}\n").bytes());
        text(&mut out, &index.to_string());
        text(&mut out, "cpu");
        integer(&mut out, elements);
        out.extend(b"tQ");
        integer(&mut out, 0);
        let strides = (0..shape.len()).map(|i| shape[i + 1..].iter().product());
        for list in [shape.clone(), strides.collect()] {
            out.push(b'(');
            list.iter().for_each(|n| integer(&mut out, *n));
            out.push(b't');
        }
        out.extend(b"\x89ccollections\nOrderedDict\n)RtR");
    }
    out.extend(b"u.");
    out
}

fn text(out: &mut Vec<u8>, text: &str) {
    out.push(b'X');
    out.extend((text.len() as u32).to_le_bytes());
    out.extend(text.bytes());
}

fn integer(out: &mut Vec<u8>, value: usize) {
    match i32::try_from(value) {
        Ok(value) => out.extend(std::iter::once(b'J').chain(value.to_le_bytes())),
        Err(_) => out.extend([0x8a, 8].into_iter().chain((value as u64).to_le_bytes())),
    }
}
