//! Pointers: names such as `best` that stand for a folder beside them. A pointer is a relative symbolic link, so that
//! every program follows it and the whole output can be moved; where the file system has no links, it is a file with the
//! folder's name, which [`resolve`] follows.

use super::write::PARTIAL;
use crate::error::{Error, Result};
use std::fs;
use std::path::{Component, Path, PathBuf};

/// Longest file that can be a pointer.
const LONGEST: u64 = 255;

/// Makes `pointer` stand for the folder `target` beside it, in one move.
///
/// # Errors
/// When the folder cannot be written to, or `pointer` is a folder itself.
pub fn point(pointer: &Path, target: &str) -> Result<()> {
    if self::target(pointer).as_deref() == Some(target) {
        return Ok(());
    }
    let name = pointer.file_name().unwrap_or_default().to_string_lossy();
    let temporary = pointer.with_file_name(format!("{PARTIAL}{name}"));
    // What a killed process may have left.
    let _ = fs::remove_file(&temporary);
    link(target, &temporary).or_else(|_| write(target, &temporary)).map_err(Error::io("write", &temporary))?;
    fs::rename(&temporary, pointer).map_err(Error::io("replace", pointer))
}

/// Removes `pointer`, if it is one.
///
/// # Errors
/// When the folder cannot be written to.
pub fn remove(pointer: &Path) -> Result<()> {
    if target(pointer).is_some() { fs::remove_file(pointer).map_err(Error::io("remove", pointer)) } else { Ok(()) }
}

/// Name of the folder that `pointer` stands for, whether that exists or not; `None` where it is no pointer.
#[must_use]
pub fn target(pointer: &Path) -> Option<String> {
    let data = fs::symlink_metadata(pointer).ok()?;
    if data.is_symlink() {
        return Some(fs::read_link(pointer).ok()?.to_string_lossy().into_owned());
    }
    let text = (data.is_file() && data.len() <= LONGEST).then(|| fs::read_to_string(pointer).ok())??;
    let name = text.trim_end().to_owned();
    let mut parts = Path::new(&name).components();
    matches!((parts.next(), parts.next()), (Some(Component::Normal(_)), None)).then_some(name)
}

/// The folder that `path` stands for, if it is a file that points to one; else `path`. The system follows links.
#[must_use]
pub fn resolve(path: &Path) -> PathBuf {
    let folder = || Some(path.with_file_name(target(path)?)).filter(|folder| folder.is_dir());
    if path.is_file() { folder().unwrap_or_else(|| path.to_owned()) } else { path.to_owned() }
}

fn write(target: &str, path: &Path) -> std::io::Result<()> {
    fs::write(path, format!("{target}\n"))
}

#[cfg(unix)]
fn link(target: &str, path: &Path) -> std::io::Result<()> {
    std::os::unix::fs::symlink(target, path)
}

/// Windows lets few users make links.
#[cfg(not(unix))]
fn link(_: &str, _: &Path) -> std::io::Result<()> {
    Err(std::io::ErrorKind::Unsupported.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pointer_follows_and_moves() {
        let dir = tempfile::tempdir().unwrap();
        let (dir, best) = (dir.path(), dir.path().join("best"));
        for step in ["step-1", "step-2"] {
            fs::create_dir(dir.join(step)).unwrap();
            fs::write(dir.join(step).join("a"), step).unwrap();
            fs::write(dir.join(".partial-best"), "left").unwrap();
            point(&best, step).unwrap();
            assert_eq!(fs::read_to_string(resolve(&best).join("a")).unwrap(), step);
            assert_eq!(target(&best).as_deref(), Some(step));
        }
        assert_eq!(fs::read_dir(dir).unwrap().count(), 3);
        remove(&best).unwrap();
        assert!(fs::symlink_metadata(&best).is_err() && dir.join("step-2/a").is_file());
        remove(&best).unwrap();
    }

    #[test]
    fn a_file_is_a_pointer_too() {
        let dir = tempfile::tempdir().unwrap();
        let best = dir.path().join("best");
        fs::create_dir(dir.path().join("step-1")).unwrap();
        write("step-1", &best).unwrap();
        assert_eq!(resolve(&best), dir.path().join("step-1"));
        point(&best, "step-2").unwrap();
        assert_eq!(target(&best).as_deref(), Some("step-2"));
        write("step-9", &dir.path().join("dangling")).unwrap();
        assert_eq!(resolve(&dir.path().join("dangling")), dir.path().join("dangling"));
    }

    #[test]
    fn what_is_no_pointer_stays() {
        let dir = tempfile::tempdir().unwrap();
        let (folder, text) = (dir.path().join("best"), dir.path().join("latest"));
        fs::create_dir(&folder).unwrap();
        fs::write(&text, "../elsewhere").unwrap();
        assert_eq!((target(&folder), target(&text)), (None, None));
        assert!(point(&folder, "step-1").is_err());
        remove(&folder).unwrap();
        remove(&text).unwrap();
        assert!(folder.is_dir() && text.is_file() && resolve(&text) == text);
    }
}
