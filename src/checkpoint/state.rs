//! What a run needs beside its adapter to go on exactly: the parameters as the optimizer has them and its two moments, in
//! f32 and so bit for bit (`training_state.safetensors`); and the manifest that tells whether a folder is still what was
//! written (`manifest.json`: size and BLAKE3 hash of each file).

use super::Dtype;
use super::safe::Shards;
use super::write::{Staging, TensorInfo, safetensors};
use crate::error::{Error, Result};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

/// File of parameters and moments.
pub const TENSORS: &str = "training_state.safetensors";
/// File of sizes and hashes.
pub const MANIFEST: &str = "manifest.json";
/// What to do about a changed folder.
const HINT: &str = "copy the folder again from where it was saved; delete manifest.json if you changed it on purpose";
const NAMES: [&str; 3] = ["parameters", "exp_avg", "exp_avg_sq"];

/// Writes parameters, first and second moments, all of one length.
///
/// # Errors
/// When the disk is full.
pub fn save(staging: &Staging, values: [&[f32]; 3]) -> Result<()> {
    let info = |(name, values): (&str, &[f32])| TensorInfo {
        name: name.to_owned(),
        dtype: Dtype::F32,
        shape: vec![values.len()],
    };
    let infos: Vec<TensorInfo> = NAMES.into_iter().zip(values).map(info).collect();
    safetensors(&staging.dir().join(TENSORS), &infos, |i| Ok(Dtype::F32.encode(values[i])))
}

/// Parameters, first and second moments, each of `len` elements.
///
/// # Errors
/// When the file is missing, broken or of another size.
pub fn load(dir: &Path, len: usize) -> Result<[Vec<f32>; 3]> {
    let path = dir.join(TENSORS);
    let shards = Shards::of(vec![path.clone()])?;
    let mut values = [const { Vec::new() }; 3];
    for (name, values) in NAMES.into_iter().zip(&mut values) {
        let raw = shards.get(name)?;
        if raw.dtype != Dtype::F32 || raw.shape != [len] {
            let problem = format!("`{name}` is {} {:?}, expected F32 [{len}]", raw.dtype.name(), raw.shape);
            return Err(Error::invalid(&path, problem, "resume from another folder, with the settings of its run"));
        }
        *values = raw.to_f32();
    }
    Ok(values)
}

#[derive(Serialize, Deserialize)]
struct Entry {
    size: u64,
    blake3: String,
}

fn entry(path: &Path) -> Result<Entry> {
    let mut hasher = blake3::Hasher::new();
    hasher.update_mmap(path).map_err(Error::io("read", path))?;
    Ok(Entry { size: hasher.count(), blake3: hasher.finalize().to_hex().to_string() })
}

/// Writes the manifest over all that `staging` holds so far.
///
/// # Errors
/// When a file cannot be read back or the disk is full.
pub fn seal(staging: &Staging) -> Result<()> {
    let mut files = BTreeMap::new();
    for file in fs::read_dir(staging.dir()).map_err(Error::io("read", staging.dir()))? {
        let file = file.map_err(Error::io("read", staging.dir()))?;
        files.insert(file.file_name().to_string_lossy().into_owned(), entry(&file.path())?);
    }
    let text = serde_json::to_string_pretty(&serde_json::json!({ "files": files }));
    staging.write(MANIFEST, text.expect("plain data becomes JSON").as_bytes())
}

/// What [`MANIFEST`] holds.
#[derive(Deserialize)]
struct Manifest {
    files: BTreeMap<String, Entry>,
}

impl Manifest {
    /// `None`: the folder has none.
    fn read(dir: &Path) -> Result<Option<Self>> {
        let path = dir.join(MANIFEST);
        if !path.is_file() {
            return Ok(None);
        }
        let text = fs::read_to_string(&path).map_err(Error::io("read", &path))?;
        serde_json::from_str(&text).map(Some).map_err(|e| Error::invalid(&path, e.to_string(), HINT))
    }
}

/// Whether `dir` is a sealed folder into which nobody put anything else since.
#[must_use]
pub fn holds_only_what_was_sealed(dir: &Path) -> bool {
    let (Ok(Some(manifest)), Ok(mut entries)) = (Manifest::read(dir), fs::read_dir(dir)) else { return false };
    entries.all(|entry| {
        let name = entry.map(|entry| entry.file_name().to_string_lossy().into_owned());
        name.is_ok_and(|name| name == MANIFEST || manifest.files.contains_key(&name))
    })
}

/// Checks those of `names` that the manifest in `dir` lists; a folder without one passes.
///
/// # Errors
/// When one is missing or is not what was written.
pub fn verify(dir: &Path, names: &[&str]) -> Result<()> {
    let Some(manifest) = Manifest::read(dir)? else { return Ok(()) };
    for (name, written) in manifest.files.iter().filter(|(name, _)| names.contains(&name.as_str())) {
        let file = dir.join(name);
        let found = entry(&file)?;
        if found.size != written.size {
            let problem = format!("has {} bytes, was written with {}", found.size, written.size);
            return Err(Error::invalid(&file, problem, HINT));
        }
        if found.blake3 != written.blake3 {
            return Err(Error::invalid(&file, "its content is not what was written (BLAKE3 hash)", HINT));
        }
    }
    Ok(())
}
