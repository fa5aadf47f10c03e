//! A file on its way to the disk, and whether one that is there is right.

use std::fs::{self, File, OpenOptions, TryLockError};
use std::io::{self, ErrorKind, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use ring::digest;

use super::Progress;
use super::answer::{Answer, is_hex};
use crate::error::{Error, Result};

/// A file to bring.
pub(super) struct Item {
    pub(super) name: String,
    pub(super) url: String,
    pub(super) to: PathBuf,
    pub(super) size: Option<u64>,
    pub(super) digest: Option<Digest>,
}

impl Item {
    fn beside(&self, suffix: &str) -> PathBuf {
        let mut path = self.to.clone().into_os_string();
        path.push(suffix);
        path.into()
    }

    pub(super) fn wrong_size(&self, got: u64, want: u64) -> Error {
        Error::invalid(
            &self.to,
            format!("wrong size: the server sends {got} bytes where {want} are listed; nothing of it was kept"),
            "try again later; if HF_ENDPOINT names a mirror, try without",
        )
    }
}

/// Whether the file is there as it should be. Says so when it is there and is not.
pub(super) fn is_right(item: &Item, progress: &mut dyn Progress) -> Result<bool> {
    let Some(size) = plain_file(&item.to)? else { return Ok(false) };
    let right = match &item.digest {
        _ if item.size.is_some_and(|expected| expected != size) => false,
        Some(digest) => {
            let mut file = File::open(&item.to).map_err(Error::io("read", &item.to))?;
            match Hasher::new(digest, Some(size)) {
                Some(mut hasher) => {
                    hasher.read(&mut file, size).map_err(Error::io("read", &item.to))? && hasher.matches()
                }
                None => false,
            }
        }
        None => item.size.is_some(),
    };
    if right {
        for leftover in [item.beside(".part"), item.beside(".part.etag")] {
            remove(&leftover)?;
        }
    } else {
        progress.note(&format!("`{}` is here, but is not what the repository has; fetching it anew", item.name));
    }
    Ok(right)
}

/// The size of the file at `path`, if there is one.
///
/// # Errors
/// Something that is not a file is there. Writing through a symbolic link could change a file far away.
pub(super) fn plain_file(path: &Path) -> Result<Option<u64>> {
    match fs::symlink_metadata(path) {
        Ok(meta) if meta.is_file() => Ok(Some(meta.len())),
        Ok(meta) => Err(Error::refused(
            format!("`{}` is {}", path.display(), if meta.is_symlink() { "a symbolic link" } else { "not a file" }),
            "move it out of the way, or download into another folder with --checkpoint_dir",
        )),
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
        Err(error) => Err(Error::io("read", path)(error)),
    }
}

fn remove(path: &Path) -> Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != ErrorKind::NotFound => Err(Error::io("remove", path)(error)),
        _ => Ok(()),
    }
}

/// Lets one process at a time write into `dir`. Where folders cannot be locked (Windows, some network disks) there is
/// no lock, and two downloads at once end in a wrong hash.
pub(super) fn wait_for_turn(dir: &Path, progress: &mut dyn Progress) -> Result<Option<File>> {
    let Ok(folder) = File::open(dir) else { return Ok(None) };
    match folder.try_lock() {
        Ok(()) => Ok(Some(folder)),
        Err(TryLockError::WouldBlock) => {
            progress.note(&format!("waiting for another download into `{}`", dir.display()));
            folder.lock().map_err(Error::io("lock", dir))?;
            Ok(Some(folder))
        }
        Err(TryLockError::Error(_)) => Ok(None),
    }
}

/// A file on its way: `NAME.part`, and in `NAME.part.etag` what the bytes in it belong to.
///
/// The note is written before the first byte and removed after the last one, and a part is removed before its note
/// changes, so that no kill leaves bytes with a wrong note.
pub(super) struct Part<'a> {
    pub(super) item: &'a Item,
    file: File,
    pub(super) have: u64,
    /// Known from the listing or from the first answer.
    pub(super) size: Option<u64>,
    hasher: Option<Hasher>,
    /// The server's validator, where no hash is known beforehand.
    pub(super) etag: Option<String>,
    /// Whether the bytes come from more than one request.
    pub(super) resumed: bool,
}

impl<'a> Part<'a> {
    fn path(item: &Item) -> PathBuf {
        item.beside(".part")
    }

    /// The note of a part that can be gone on with.
    fn note(item: &Item) -> Result<Option<String>> {
        let path = item.beside(".part.etag");
        if plain_file(&Self::path(item))?.is_none() || plain_file(&path)?.is_none() {
            return Ok(None);
        }
        let note = fs::read_to_string(&path).unwrap_or_default();
        Ok(Some(note).filter(|note| match &item.digest {
            Some(digest) => note == digest.hex(),
            None => note.starts_with('"'),
        }))
    }

    pub(super) fn kept_bytes(item: &Item) -> Result<u64> {
        let have = plain_file(&Self::path(item))?.unwrap_or(0);
        Ok(if Self::note(item)?.is_some() && item.size.is_none_or(|size| have <= size) { have } else { 0 })
    }

    pub(super) fn open(item: &'a Item) -> Result<Self> {
        let path = Self::path(item);
        let have = Self::kept_bytes(item)?;
        let etag = Self::note(item)?.filter(|_| item.digest.is_none() && have > 0);
        if have == 0 {
            remove(&path)?;
            remove(&item.beside(".part.etag"))?;
        }
        let file = OpenOptions::new().read(true).write(true).create(true).truncate(false).open(&path);
        let file = file.map_err(|error| write_failed(error, &path))?;
        let mut part = Self { item, file, have, size: item.size, hasher: None, etag, resumed: have > 0 };
        match &item.digest {
            Some(digest) => part.hash_with(digest)?,
            None => part.seek()?,
        }
        if have == 0
            && let Some(digest) = &item.digest
        {
            part.write_note(digest.hex())?;
        }
        Ok(part)
    }

    fn seek(&mut self) -> Result<()> {
        let have = SeekFrom::Start(self.have);
        self.file.seek(have).map(drop).map_err(Error::io("read", &Self::path(self.item)))
    }

    /// Begins to hash, with what is there already.
    fn hash_with(&mut self, digest: &Digest) -> Result<()> {
        if let Some(mut hasher) = Hasher::new(digest, self.size) {
            let read = self.file.rewind().and_then(|()| hasher.read(&mut self.file, self.have));
            read.map_err(Error::io("read", &Self::path(self.item)))?;
            self.hasher = Some(hasher);
        }
        self.seek()
    }

    fn write_note(&self, note: &str) -> Result<()> {
        let path = self.item.beside(".part.etag");
        fs::write(&path, note).map_err(|error| write_failed(error, &path))
    }

    /// Forgets the bytes.
    pub(super) fn restart(&mut self) -> Result<()> {
        let path = Self::path(self.item);
        self.file.set_len(0).map_err(|error| write_failed(error, &path))?;
        (self.have, self.resumed) = (0, false);
        match &self.item.digest {
            Some(digest) => self.hash_with(digest),
            None => {
                (self.size, self.hasher, self.etag) = (self.item.size, None, None);
                remove(&self.item.beside(".part.etag"))?;
                self.seek()
            }
        }
    }

    /// Compares what the server is about to send with what is wanted, and learns from it what the listing does not say.
    pub(super) fn expect(&mut self, answer: &Answer) -> Result<()> {
        for offered in [answer.total(), answer.linked.size].into_iter().flatten() {
            let size = *self.size.get_or_insert(offered);
            if size != offered {
                self.discard()?;
                return Err(self.item.wrong_size(offered, size));
            }
        }
        if self.hasher.is_none() {
            let linked = answer.linked.digest.as_deref();
            let linked = linked.and_then(|hex| Digest::sha256(hex).or_else(|| Digest::git_blob(hex)));
            if let Some(digest) = self.item.digest.as_ref().or(linked.as_ref()) {
                self.hash_with(digest)?;
            }
        }
        if self.item.digest.is_none() {
            // A weak validator does not promise the same bytes.
            self.etag = answer.header("etag").filter(|etag| etag.starts_with('"')).map(str::to_owned);
            if let (0, Some(etag)) = (self.have, &self.etag) {
                self.write_note(etag)?;
            }
        }
        Ok(())
    }

    pub(super) fn write(&mut self, bytes: &[u8]) -> Result<()> {
        self.file.write_all(bytes).map_err(|error| write_failed(error, &Self::path(self.item)))?;
        self.have += bytes.len() as u64;
        if let Some(hasher) = &mut self.hasher {
            hasher.context.update(bytes);
        }
        Ok(())
    }

    pub(super) fn is_right(&self) -> bool {
        self.hasher.as_ref().is_none_or(Hasher::matches)
    }

    pub(super) fn discard(&self) -> Result<()> {
        remove(&Self::path(self.item))?;
        remove(&self.item.beside(".part.etag"))
    }

    pub(super) fn wrong_hash(&self) -> Error {
        let problem = "wrong hash: the bytes are not those that the repository lists; they were deleted";
        match self.discard() {
            Err(error) => error,
            Ok(()) => Error::invalid(
                &self.item.to,
                problem,
                "run the same command again; if it stays, the disk, a proxy or the mirror in HF_ENDPOINT spoils data",
            ),
        }
    }

    pub(super) fn finish(self) -> Result<()> {
        let (path, to) = (Self::path(self.item), &self.item.to);
        self.file.sync_all().map_err(|error| write_failed(error, &path))?;
        drop(self.file);
        fs::rename(&path, to).map_err(Error::io("rename", &path))?;
        if let Some(Ok(folder)) = to.parent().map(File::open) {
            let _ = folder.sync_all(); // Not every system can; the next run verifies anyhow.
        }
        remove(&self.item.beside(".part.etag"))
    }
}

/// A failure to write; a full disk gets the hint that fits a download.
fn write_failed(error: io::Error, path: &Path) -> Error {
    match error.kind() {
        ErrorKind::StorageFull | ErrorKind::QuotaExceeded => Error::refused(
            format!("no space left for `{}`", path.display()),
            "free some space and run the same command again: it goes on where it stopped; or take another disk with \
             --checkpoint_dir",
        ),
        _ => Error::io("write", path)(error),
    }
}

/// What the Hub knows a file by, in lower-case hex.
pub(super) enum Digest {
    /// Of the content; files in large-file storage.
    Sha256(String),
    /// SHA-1 of `blob SIZE\0` and the content; files in git.
    GitBlob(String),
}

impl Digest {
    pub(super) fn sha256(hex: &str) -> Option<Self> {
        is_hex(hex, 64).then(|| Self::Sha256(hex.to_lowercase()))
    }

    pub(super) fn git_blob(hex: &str) -> Option<Self> {
        is_hex(hex, 40).then(|| Self::GitBlob(hex.to_lowercase()))
    }

    fn hex(&self) -> &str {
        let (Self::Sha256(hex) | Self::GitBlob(hex)) = self;
        hex
    }
}

struct Hasher {
    context: digest::Context,
    expected: String,
}

impl Hasher {
    /// `None` where the kind of hash needs a size and there is none.
    fn new(digest: &Digest, size: Option<u64>) -> Option<Self> {
        let context = match digest {
            Digest::Sha256(_) => digest::Context::new(&digest::SHA256),
            Digest::GitBlob(_) => {
                let mut context = digest::Context::new(&digest::SHA1_FOR_LEGACY_USE_ONLY);
                context.update(format!("blob {}\0", size?).as_bytes());
                context
            }
        };
        Some(Self { context, expected: digest.hex().to_owned() })
    }

    /// Takes `n` bytes of `file`; whether there were so many.
    pub(super) fn read(&mut self, file: &mut File, n: u64) -> io::Result<bool> {
        let mut file = file.take(n);
        let mut buffer = vec![0; 1 << 20];
        let mut got = 0;
        loop {
            match file.read(&mut buffer) {
                Ok(0) => return Ok(got == n),
                Ok(len) => {
                    self.context.update(&buffer[..len]);
                    got += len as u64;
                }
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
    }

    fn matches(&self) -> bool {
        let digest = self.context.clone().finish();
        let hex = digest.as_ref().iter().flat_map(|byte| [byte >> 4, byte & 15]);
        hex.eq(self.expected.bytes().map(|c| char::from(c).to_digit(16).map_or(16, |digit| digit as u8)))
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn hashes_are_those_of_git_and_sha256sum() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("hello");
        fs::write(&path, "hello\n").unwrap();
        for digest in [
            Digest::git_blob("ce013625030ba8dba906f756967f9e9ca394464a").unwrap(),
            Digest::sha256("5891B5B522D5DF086D0FF0B110FBD9D21BB4FC7163AF34D08286A2E846F6BE03").unwrap(),
        ] {
            let mut hasher = Hasher::new(&digest, Some(6)).unwrap();
            assert!(hasher.read(&mut File::open(&path).unwrap(), 6).unwrap());
            assert!(hasher.matches());
            hasher.context.update(b"x");
            assert!(!hasher.matches());
        }
    }

    #[test]
    fn a_full_disk_is_said_with_what_to_do() {
        let error = write_failed(io::Error::from(ErrorKind::StorageFull), Path::new("x.part"));
        assert_eq!(error.to_string(), "no space left for `x.part`");
        assert!(error.hint().unwrap().contains("goes on where it stopped"));
    }
}
