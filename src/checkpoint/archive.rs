//! Zip archives of stored (uncompressed) entries, which is what `torch.save` writes: where each entry's bytes are, and
//! writing one entry at a time with its bytes aligned. Sizes and offsets are checked against the file before use;
//! nothing is allocated by a number that only the file claims.
//!
//! The format: APPNOTE.TXT 6.3.9 of PKWARE, with its zip64 records for what 32 bits cannot hold.

use std::collections::HashMap;
use std::io::{self, Write};
use std::ops::Range;

const LOCAL: u32 = 0x0403_4b50;
const CENTRAL: u32 = 0x0201_4b50;
const END: u32 = 0x0605_4b50;
const END64: u32 = 0x0606_4b50;
const LOCATOR64: u32 = 0x0706_4b50;
/// "Look in the zip64 record."
const ELSEWHERE: u64 = u32::MAX as u64;
/// Bytes of entries start at multiples of this, as in PyTorch's files.
const ALIGNMENT: u64 = 64;

/// Whether `bytes` begin as a zip archive does.
pub fn is_zip(bytes: &[u8]) -> bool {
    number(bytes, 0, 4) == Some(u64::from(LOCAL))
}

/// Little-endian number of `len` bytes at `at`.
fn number(bytes: &[u8], at: usize, len: usize) -> Option<u64> {
    let bytes = bytes.get(at..at.checked_add(len)?)?;
    Some(bytes.iter().rev().fold(0, |n, b| n << 8 | u64::from(*b)))
}

fn offset(bytes: &[u8], at: usize, len: usize) -> Option<usize> {
    usize::try_from(number(bytes, at, len)?).ok()
}

/// Where the bytes of each entry stand in the archive.
///
/// # Errors
/// Says what is broken, or that an entry is compressed.
pub fn entries(bytes: &[u8]) -> Result<HashMap<String, Range<usize>>, String> {
    let (directory, count) = directory(bytes).ok_or("no directory at its end, as if it was cut short")?;
    let mut entries = HashMap::new();
    let mut at = directory.start;
    while at < directory.end {
        let broken = || format!("its directory is broken at byte {at}");
        let (entry, next) = Entry::read(bytes, at, directory.end).ok_or_else(broken)?;
        if entry.compressed {
            return Err(format!("entry `{}` is compressed or encrypted, which PyTorch never writes", entry.name));
        }
        let range =
            entry.content(bytes, directory.start).ok_or_else(|| format!("entry `{}` is not whole", entry.name))?;
        if entries.insert(entry.name.clone(), range).is_some() {
            return Err(format!("entry `{}` is there twice", entry.name));
        }
        at = next;
    }
    if entries.len() as u64 != count {
        return Err(format!("{count} entries are announced and {} are there", entries.len()));
    }
    Ok(entries)
}

/// The central directory and the number of its entries.
fn directory(bytes: &[u8]) -> Option<(Range<usize>, u64)> {
    const SIZE: usize = 22;
    let last = bytes.len().checked_sub(SIZE)?;
    let ends = |at: &usize| {
        number(bytes, *at, 4) == Some(u64::from(END))
            && offset(bytes, at + 20, 2).is_some_and(|n| at + SIZE + n == bytes.len())
    };
    let end = (last.saturating_sub(usize::from(u16::MAX))..=last).rev().find(ends)?;
    let (mut count, mut size, mut start) =
        (number(bytes, end + 10, 2)?, offset(bytes, end + 12, 4)?, offset(bytes, end + 16, 4)?);
    let locator = end.checked_sub(20).filter(|at| number(bytes, *at, 4) == Some(u64::from(LOCATOR64)));
    if let Some(locator) = locator {
        let end64 = offset(bytes, locator + 8, 8).filter(|at| number(bytes, *at, 4) == Some(u64::from(END64)))?;
        (count, size, start) =
            (number(bytes, end64 + 32, 8)?, offset(bytes, end64 + 40, 8)?, offset(bytes, end64 + 48, 8)?);
    }
    let stop = start.checked_add(size).filter(|stop| *stop <= end)?;
    Some((start..stop, count))
}

/// An entry of the central directory.
struct Entry {
    name: String,
    compressed: bool,
    size: u64,
    header: u64,
}

impl Entry {
    /// The entry at `at`, and where the next one begins.
    fn read(bytes: &[u8], at: usize, end: usize) -> Option<(Self, usize)> {
        if number(bytes, at, 4)? != u64::from(CENTRAL) {
            return None;
        }
        let (flags, method) = (number(bytes, at + 8, 2)?, number(bytes, at + 10, 2)?);
        let (packed, size) = (number(bytes, at + 20, 4)?, number(bytes, at + 24, 4)?);
        let name_end = at + 46 + offset(bytes, at + 28, 2)?;
        let extra_end = name_end + offset(bytes, at + 30, 2)?;
        let next = extra_end + offset(bytes, at + 32, 2)?;
        if next > end {
            return None;
        }
        let name = std::str::from_utf8(bytes.get(at + 46..name_end)?).ok()?.to_owned();
        let mut wide = Wide::find(bytes.get(name_end..extra_end)?);
        let size = wide.or(size)?;
        let packed = wide.or(packed)?;
        let header = wide.or(number(bytes, at + 42, 4)?)?;
        Some((Self { name, compressed: method != 0 || flags & 1 != 0 || packed != size, size, header }, next))
    }

    /// The entry's bytes, which end before the directory begins; the header before them repeats the name.
    fn content(&self, bytes: &[u8], directory: usize) -> Option<Range<usize>> {
        let header = usize::try_from(self.header).ok()?;
        if number(bytes, header, 4)? != u64::from(LOCAL) {
            return None;
        }
        let name_end = header.checked_add(30)?.checked_add(offset(bytes, header + 26, 2)?)?;
        let start = name_end.checked_add(offset(bytes, header + 28, 2)?)?;
        let end = start.checked_add(usize::try_from(self.size).ok()?)?;
        (bytes.get(header + 30..name_end)? == self.name.as_bytes() && end <= directory).then_some(start..end)
    }
}

/// The zip64 numbers of an entry, in their order.
struct Wide<'a>(&'a [u8]);

impl<'a> Wide<'a> {
    fn find(mut extra: &'a [u8]) -> Self {
        while let (Some(kind), Some(len)) = (number(extra, 0, 2), offset(extra, 2, 2)) {
            let Some(content) = extra.get(4..4 + len) else { break };
            if kind == 1 {
                return Self(content);
            }
            extra = &extra[4 + len..];
        }
        Self(&[])
    }

    /// `narrow`, or the next wide number where it says so.
    fn or(&mut self, narrow: u64) -> Option<u64> {
        if narrow != ELSEWHERE {
            return Some(narrow);
        }
        let value = number(self.0, 0, 8)?;
        self.0 = &self.0[8..];
        Some(value)
    }
}

/// Writes an archive, one whole entry after the other.
pub struct Writer<W> {
    out: W,
    at: u64,
    directory: Vec<u8>,
    count: u64,
}

impl<W: Write> Writer<W> {
    /// An empty archive.
    pub fn new(out: W) -> Self {
        Self { out, at: 0, directory: Vec::new(), count: 0 }
    }

    fn put(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.at += bytes.len() as u64;
        self.out.write_all(bytes)
    }

    /// Adds an entry.
    ///
    /// # Errors
    /// When the disk is full.
    pub fn add(&mut self, name: &str, content: &[u8]) -> io::Result<()> {
        let (header, size, crc) = (self.at, content.len() as u64, crc32fast::hash(content));
        let narrow = |n: u64| u32::try_from(n).unwrap_or(u32::MAX).to_le_bytes();
        let big = size >= ELSEWHERE;
        let mut extra = Vec::new();
        if big {
            extra.extend([1, 0, 16, 0].iter().copied().chain(size.to_le_bytes()).chain(size.to_le_bytes()));
        }
        // A field of padding, which PyTorch calls "FB", puts the bytes on their boundary.
        let unpadded = header + 30 + (name.len() + extra.len()) as u64 + 4;
        let padding = (unpadded.next_multiple_of(ALIGNMENT) - unpadded) as u16;
        extra.extend(b"FB".iter().copied().chain(padding.to_le_bytes()));
        extra.resize(extra.len() + usize::from(padding), b'Z');
        let version: u16 = if big || header >= ELSEWHERE { 45 } else { 20 };
        // Version, flags (UTF-8 name), method, time, date (1980-01-01).
        let mut common = version.to_le_bytes().to_vec();
        common.extend([0, 8, 0, 0, 0, 0, 0x21, 0]);
        common.extend(crc.to_le_bytes().iter().copied().chain(narrow(size)).chain(narrow(size)));
        common.extend((name.len() as u16).to_le_bytes());
        self.put(&LOCAL.to_le_bytes())?;
        self.put(&common)?;
        self.put(&(extra.len() as u16).to_le_bytes())?;
        self.put(name.as_bytes())?;
        self.put(&extra)?;
        self.put(content)?;

        let wide: Vec<u8> = [(big, size), (big, size), (header >= ELSEWHERE, header)]
            .iter()
            .filter(|w| w.0)
            .flat_map(|w| w.1.to_le_bytes())
            .collect();
        let field = if wide.is_empty() { Vec::new() } else { [&[1, 0, wide.len() as u8, 0], wide.as_slice()].concat() };
        let directory = &mut self.directory;
        directory.extend(CENTRAL.to_le_bytes().iter().chain(&version.to_le_bytes()).chain(&common));
        directory.extend((field.len() as u16).to_le_bytes());
        // Comment length, disk, attributes.
        directory.extend([0; 10]);
        directory.extend(narrow(header).iter().chain(name.as_bytes()).chain(&field));
        self.count += 1;
        Ok(())
    }

    /// Writes the directory.
    ///
    /// # Errors
    /// When the disk is full.
    pub fn finish(mut self) -> io::Result<()> {
        let (start, size, count) = (self.at, self.directory.len() as u64, self.count);
        let directory = std::mem::take(&mut self.directory);
        self.put(&directory)?;
        if start >= ELSEWHERE || size >= ELSEWHERE || count >= u64::from(u16::MAX) {
            let end64 = self.at;
            let mut end = END64.to_le_bytes().to_vec();
            end.extend(44u64.to_le_bytes().iter().chain(&[45, 0, 45, 0]).chain(&[0; 8]));
            for value in [count, count, size, start] {
                end.extend(value.to_le_bytes());
            }
            end.extend(
                LOCATOR64.to_le_bytes().iter().chain(&[0; 4]).chain(&end64.to_le_bytes()).chain(&1u32.to_le_bytes()),
            );
            self.put(&end)?;
        }
        let narrow = |n: u64| u32::try_from(n).unwrap_or(u32::MAX).to_le_bytes();
        let count = u16::try_from(count).unwrap_or(u16::MAX).to_le_bytes();
        let mut end = END.to_le_bytes().to_vec();
        end.extend([0; 4].iter().chain(&count).chain(&count).chain(&narrow(size)).chain(&narrow(start)).chain(&[0; 2]));
        self.put(&end)?;
        self.out.flush()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn archive(contents: &[(&str, Vec<u8>)]) -> Vec<u8> {
        let mut bytes = Vec::new();
        let mut writer = Writer::new(&mut bytes);
        contents.iter().for_each(|(name, content)| writer.add(name, content).unwrap());
        writer.finish().unwrap();
        bytes
    }

    #[test]
    fn what_is_written_is_read_and_stands_on_its_boundary() {
        let contents = [("a/data.pkl", vec![1, 2, 3]), ("a/data/0", vec![7; 1000]), ("a/empty", Vec::new())];
        let bytes = archive(&contents);
        assert!(is_zip(&bytes));
        let found = entries(&bytes).unwrap();
        for (name, content) in &contents {
            assert_eq!(&bytes[found[*name].clone()], content.as_slice());
            assert_eq!(found[*name].start % 64, 0);
        }
    }

    #[test]
    fn cut_or_changed_archives_are_refused_without_panic() {
        let bytes = archive(&[("a/data.pkl", vec![1, 2, 3]), ("a/data/0", vec![7; 100])]);
        for len in 0..bytes.len() {
            assert!(entries(&bytes[..len]).is_err(), "cut at {len}");
        }
        for at in 0..bytes.len() {
            for value in [0, 1, 0x7f, 0xff] {
                let mut changed = bytes.clone();
                changed[at] = value;
                if let Ok(found) = entries(&changed) {
                    assert!(found.values().all(|r| r.end <= bytes.len()));
                }
            }
        }
    }

    #[test]
    fn zip64_numbers_are_read_in_their_order() {
        let extra = [&[9, 9, 1, 0, 5, 1, 0, 16, 0][..], &7u64.to_le_bytes(), &8u64.to_le_bytes()].concat();
        let mut wide = Wide::find(&extra);
        assert_eq!(
            [wide.or(3), wide.or(ELSEWHERE), wide.or(ELSEWHERE), wide.or(ELSEWHERE)],
            [Some(3), Some(7), Some(8), None]
        );
    }
}
