//! Writing: folders that appear whole or not at all, and safetensors files one tensor at a time.

use super::Dtype;
use crate::error::{Error, Result};
use serde_json::{Map, json};
use std::fs::{self, File};
use std::io::{BufWriter, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

/// Begin of the name of what is being filled or removed.
pub(super) const PARTIAL: &str = ".partial-";
/// Begin of the name of a folder with one that is being replaced; the latter's name follows.
const REPLACED: &str = ".replaced-";

/// A folder that is filled under a temporary name beside its own, and renamed when it is complete.
#[derive(Debug)]
pub struct Staging {
    target: PathBuf,
    temporary: tempfile::TempDir,
}

impl Staging {
    /// Starts the folder that will be `target`.
    ///
    /// # Errors
    /// When its parent cannot be made or written to.
    pub fn new(target: &Path) -> Result<Self> {
        let parent = target.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
        fs::create_dir_all(parent).map_err(Error::io("create", parent))?;
        let temporary =
            tempfile::Builder::new().prefix(PARTIAL).tempdir_in(parent).map_err(Error::io("write in", parent))?;
        Ok(Self { target: target.to_owned(), temporary })
    }

    /// The temporary folder, to write into.
    #[must_use]
    pub fn dir(&self) -> &Path {
        self.temporary.path()
    }

    /// Writes a file into it.
    ///
    /// # Errors
    /// When the disk is full or the folder cannot be written to.
    pub fn write(&self, name: &str, content: &[u8]) -> Result<()> {
        let path = self.dir().join(name);
        fs::write(&path, content).map_err(Error::io("write", &path))
    }

    /// Copies those of `names` that `from` has.
    ///
    /// # Errors
    /// When one cannot be read or written.
    pub fn copy(&self, from: &Path, names: &[&'static str]) -> Result<()> {
        self.write_all(&read(from, names)?)
    }

    /// Writes files.
    ///
    /// # Errors
    /// When the disk is full.
    pub fn write_all(&self, files: &[(&'static str, Vec<u8>)]) -> Result<()> {
        files.iter().try_for_each(|(name, content)| self.write(name, content))
    }

    /// Flushes every file and puts them into the folder beside what stands there.
    ///
    /// # Errors
    /// When flushing or renaming fails.
    pub fn commit_beside(self) -> Result<()> {
        if !self.target.exists() {
            return self.commit();
        }
        self.flush()?;
        for entry in fs::read_dir(self.dir()).map_err(Error::io("read", self.dir()))? {
            let path = entry.map_err(Error::io("read", self.dir()))?.path();
            let to = self.target.join(path.file_name().unwrap_or_default());
            fs::rename(&path, &to).map_err(Error::io("write", &to))?;
        }
        File::open(&self.target).and_then(|f| f.sync_all()).map_err(Error::io("write", &self.target))
    }

    fn flush(&self) -> Result<()> {
        let dir = self.dir();
        for entry in fs::read_dir(dir).map_err(Error::io("read", dir))? {
            let path = entry.map_err(Error::io("read", dir))?.path();
            File::open(&path).and_then(|f| f.sync_all()).map_err(Error::io("write", &path))?;
        }
        File::open(dir).and_then(|f| f.sync_all()).map_err(Error::io("write", dir))?;
        open_to_all(dir)
    }

    /// Flushes every file and puts the folder in place of what stood there.
    ///
    /// # Errors
    /// When flushing or renaming fails; what stood there stays.
    pub fn commit(self) -> Result<()> {
        self.flush()?;
        let dir = self.dir().to_owned();
        let parent = self.target.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
        let mut old = None;
        if self.target.exists() {
            let name = self.target.file_name().unwrap_or_default().to_string_lossy();
            let aside = tempfile::Builder::new().prefix(&format!("{REPLACED}{name}-")).tempdir_in(parent);
            let aside = aside.map_err(Error::io("write in", parent))?;
            fs::rename(&self.target, aside.path().join("old")).map_err(Error::io("replace", &self.target))?;
            old = Some(aside);
        }
        fs::rename(&dir, &self.target).map_err(Error::io("write", &self.target))?;
        // Renamed away: there is nothing left for the guard to remove.
        let _ = self.temporary.keep();
        drop(old);
        File::open(parent).and_then(|f| f.sync_all()).map_err(Error::io("write", parent))
    }
}

/// Those of the files `names` that `dir` has, with their content.
///
/// # Errors
/// When one cannot be read.
pub fn read(dir: &Path, names: &[&'static str]) -> Result<Vec<(&'static str, Vec<u8>)>> {
    let present = names.iter().map(|name| (*name, dir.join(name))).filter(|(_, path)| path.is_file());
    present.map(|(name, path)| Ok((name, fs::read(&path).map_err(Error::io("read", &path))?))).collect()
}

/// Removes a folder. Under its name it is there whole or not at all.
///
/// # Errors
/// When it cannot be renamed or removed.
pub fn remove(dir: &Path) -> Result<()> {
    let name = dir.file_name().unwrap_or_default().to_string_lossy();
    let aside = dir.with_file_name(format!("{PARTIAL}{name}"));
    discard(&aside)?;
    fs::rename(dir, &aside).map_err(Error::io("remove", dir))?;
    discard(&aside)
}

/// Removes a folder, file or link, if there is one.
fn discard(path: &Path) -> Result<()> {
    let Ok(data) = fs::symlink_metadata(path) else { return Ok(()) };
    if data.is_dir() { fs::remove_dir_all(path) } else { fs::remove_file(path) }.map_err(Error::io("remove", path))
}

/// Clears what a killed process left in `parent`: half written folders go, and a replaced one whose successor never came
/// is put back. No other process may be writing there.
///
/// # Errors
/// When the folder cannot be read or written.
pub fn clear(parent: &Path) -> Result<()> {
    for entry in fs::read_dir(parent).map_err(Error::io("read", parent))? {
        let path = entry.map_err(Error::io("read", parent))?.path();
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let target = name.strip_prefix(REPLACED).and_then(|rest| Some(parent.join(rest.rsplit_once('-')?.0)));
        if let Some(target) = target.as_ref().filter(|target| !target.exists() && path.join("old").is_dir()) {
            fs::rename(path.join("old"), target).map_err(Error::io("write", target))?;
        }
        if target.is_some() || name.starts_with(PARTIAL) {
            discard(&path)?;
        }
    }
    Ok(())
}

/// Temporary folders are private to their owner; results are not.
#[cfg(unix)]
fn open_to_all(dir: &Path) -> Result<()> {
    use std::os::unix::fs::PermissionsExt;
    fs::set_permissions(dir, fs::Permissions::from_mode(0o755)).map_err(Error::io("write", dir))
}

#[cfg(not(unix))]
fn open_to_all(_: &Path) -> Result<()> {
    Ok(())
}

/// Name, dtype and shape of a tensor to be written.
#[derive(Debug, Clone)]
pub struct TensorInfo {
    /// Name.
    pub name: String,
    /// Dtype.
    pub dtype: Dtype,
    /// Shape.
    pub shape: Vec<usize>,
}

impl TensorInfo {
    pub(super) fn entry(&self) -> Entry {
        let (dtype, size) = (self.dtype.name(), self.dtype.size());
        Entry { name: self.name.clone(), dtype, shape: self.shape.clone(), size, bytes: self.bytes() }
    }

    pub(super) fn bytes(&self) -> usize {
        self.shape.iter().product::<usize>() * self.dtype.size()
    }
}

/// A tensor of a safetensors file, of any dtype that the format knows.
#[derive(Debug, Clone)]
pub struct Entry {
    /// Name.
    pub name: String,
    /// The format's name of the dtype.
    pub dtype: &'static str,
    /// Shape.
    pub shape: Vec<usize>,
    /// Bytes of an element.
    pub size: usize,
    /// Bytes in all.
    pub bytes: usize,
}

/// Writes a safetensors file whose tensors' bytes `content` gives one after the other.
///
/// # Errors
/// When `content` fails or the disk is full.
pub fn safetensors(path: &Path, tensors: &[TensorInfo], content: impl FnMut(usize) -> Result<Vec<u8>>) -> Result<()> {
    let entries: Vec<Entry> = tensors.iter().map(TensorInfo::entry).collect();
    file(path, &entries, content)
}

/// Where each tensor's bytes begin: the largest elements first, so that all are aligned, and otherwise as they come.
fn offsets(entries: &[Entry]) -> Vec<usize> {
    let mut order: Vec<usize> = (0..entries.len()).collect();
    order.sort_by_key(|&i| std::cmp::Reverse(entries[i].size));
    let (mut offsets, mut at) = (vec![0; entries.len()], 0);
    for i in order {
        offsets[i] = at;
        at += entries[i].bytes;
    }
    offsets
}

fn file(path: &Path, entries: &[Entry], mut content: impl FnMut(usize) -> Result<Vec<u8>>) -> Result<()> {
    let offsets = offsets(entries);
    let mut header = Map::new();
    header.insert("__metadata__".to_owned(), json!({"format": "pt"}));
    for (entry, at) in entries.iter().zip(&offsets) {
        let json = json!({"dtype": entry.dtype, "shape": entry.shape, "data_offsets": [at, at + entry.bytes]});
        header.insert(entry.name.clone(), json);
    }
    let mut header = serde_json::Value::Object(header).to_string().into_bytes();
    header.resize(header.len().next_multiple_of(8), b' ');
    let file = File::create(path).map_err(Error::io("create", path))?;
    let mut out = BufWriter::with_capacity(1 << 20, file);
    let mut write = |bytes: &[u8]| out.write_all(bytes).map_err(Error::io("write", path));
    write(&(header.len() as u64).to_le_bytes())?;
    write(&header)?;
    let (data, mut at) = (8 + header.len(), 0);
    for (index, (entry, offset)) in entries.iter().zip(offsets).enumerate() {
        let bytes = content(index)?;
        debug_assert_eq!(bytes.len(), entry.bytes);
        if at != offset {
            out.seek(SeekFrom::Start((data + offset) as u64)).map_err(Error::io("write", path))?;
        }
        out.write_all(&bytes).map_err(Error::io("write", path))?;
        at = offset + bytes.len();
    }
    out.flush().map_err(Error::io("write", path))
}

/// Bytes of tensors in a safetensors file, after which the next one begins: what transformers takes.
pub const SHARD: usize = 5_000_000_000;

/// Fills `staging` with `model.safetensors`, or above `limit` bytes with several files and their index.
///
/// # Errors
/// When `content` fails or the disk is full.
pub fn sharded(
    staging: &Staging,
    limit: usize,
    entries: &[Entry],
    mut content: impl FnMut(usize) -> Result<Vec<u8>>,
) -> Result<()> {
    let (mut starts, mut bytes) = (vec![0], 0);
    for (i, entry) in entries.iter().enumerate() {
        if bytes > 0 && bytes + entry.bytes > limit {
            starts.push(i);
            bytes = 0;
        }
        bytes += entry.bytes;
    }
    let ends = starts.iter().skip(1).copied().chain([entries.len()]);
    let mut map = Map::new();
    for (number, (start, end)) in starts.iter().zip(ends).enumerate() {
        let name = match starts.len() {
            1 => "model.safetensors".to_owned(),
            n => format!("model-{:05}-of-{n:05}.safetensors", number + 1),
        };
        map.extend(entries[*start..end].iter().map(|entry| (entry.name.clone(), json!(name))));
        file(&staging.dir().join(&name), &entries[*start..end], |index| content(start + index))?;
    }
    if starts.len() > 1 {
        let total: usize = entries.iter().map(|entry| entry.bytes).sum();
        let index = json!({"metadata": {"total_size": total}, "weight_map": map});
        staging.write("model.safetensors.index.json", format!("{index:#}").as_bytes())?;
    }
    Ok(())
}

/// Tokenizer and generation files that belong to a model whatever its weights are.
pub const COMPANIONS: &[&str] = &[
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
];

#[cfg(test)]
mod tests {
    use super::super::safe::Shards;
    use super::*;

    #[test]
    fn a_folder_appears_whole_and_replaces_the_old_one() {
        let parent = tempfile::tempdir().unwrap();
        let target = parent.path().join("final");
        for text in ["one", "two"] {
            let staging = Staging::new(&target).unwrap();
            staging.write("a", text.as_bytes()).unwrap();
            staging.commit().unwrap();
            assert_eq!(fs::read_to_string(target.join("a")).unwrap(), text);
        }
        let staging = Staging::new(&target).unwrap();
        staging.write("a", b"never").unwrap();
        drop(staging);
        assert_eq!(fs::read_to_string(target.join("a")).unwrap(), "two");
        assert_eq!(fs::read_dir(parent.path()).unwrap().count(), 1, "nothing is left beside it");
    }

    #[test]
    fn tensors_are_the_same_in_one_file_and_in_many() {
        let dir = tempfile::tempdir().unwrap();
        let shapes: [(&'static str, usize, usize); 5] =
            [("F16", 2, 3), ("BF16", 2, 40), ("F32", 4, 40), ("F32", 4, 1), ("BF16", 2, 7)];
        let entry = |(i, (dtype, size, n)): (usize, (&'static str, usize, usize))| Entry {
            name: format!("t{i}"),
            dtype,
            shape: vec![n],
            size,
            bytes: n * size,
        };
        let entries: Vec<Entry> = shapes.into_iter().enumerate().map(entry).collect();
        for (folder, limit, files) in [("one", 1 << 20, 1), ("many", 100, 3)] {
            let staging = Staging::new(&dir.path().join(folder)).unwrap();
            sharded(&staging, limit, &entries, |i| Ok(vec![i as u8 + 1; entries[i].bytes])).unwrap();
            staging.commit().unwrap();
            let shards = Shards::open(&dir.path().join(folder)).unwrap();
            assert_eq!(shards.files().len(), files, "{folder}");
            for (i, entry) in entries.iter().enumerate() {
                let raw = shards.get(&entry.name).unwrap();
                assert_eq!((raw.dtype.name(), &raw.shape), (entry.dtype, &entry.shape), "{folder}");
                assert_eq!(raw.bytes, vec![i as u8 + 1; entry.bytes], "{folder}");
            }
        }
        let index = fs::read_to_string(dir.path().join("many/model.safetensors.index.json")).unwrap();
        let index: serde_json::Value = serde_json::from_str(&index).unwrap();
        assert_eq!(index["metadata"]["total_size"], 6 + 80 + 160 + 4 + 14);
        assert_eq!(index["weight_map"]["t2"], "model-00002-of-00003.safetensors");
    }

    #[test]
    fn a_removed_folder_leaves_nothing() {
        let parent = tempfile::tempdir().unwrap();
        for folder in ["step-000003", ".partial-step-000003"] {
            fs::create_dir(parent.path().join(folder)).unwrap();
            fs::write(parent.path().join(folder).join("a"), "a").unwrap();
        }
        remove(&parent.path().join("step-000003")).unwrap();
        assert_eq!(fs::read_dir(parent.path()).unwrap().count(), 0);
        assert!(remove(&parent.path().join("step-000003")).is_err());
    }

    #[test]
    fn what_a_killed_process_left_is_cleared() {
        let parent = tempfile::tempdir().unwrap();
        for (folder, text) in [
            (".partial-x1", "half"),
            (".replaced-final-x2/old", "lost"),
            (".replaced-best-x3/old", "old"),
            ("best", "new"),
        ] {
            fs::create_dir_all(parent.path().join(folder)).unwrap();
            fs::write(parent.path().join(folder).join("a"), text).unwrap();
        }
        fs::write(parent.path().join(".partial-best"), "half a pointer").unwrap();
        clear(parent.path()).unwrap();
        assert_eq!(fs::read_dir(parent.path()).unwrap().count(), 2);
        assert_eq!(fs::read_to_string(parent.path().join("final/a")).unwrap(), "lost");
        assert_eq!(fs::read_to_string(parent.path().join("best/a")).unwrap(), "new");
    }
}
