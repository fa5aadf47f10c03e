//! TensorBoard's event files: loss, learning rate, speed and validation loss, by step.
//!
//! A file is a row of records: length (u64), its check sum, content, its check sum (TensorFlow's `record_writer.h`; a
//! check sum is a masked CRC-32C). A content is an `Event` of `event.proto`, encoded here field by field: wall time (1,
//! double), step (2, int64), file version (3, text), summary (5) with values (1) of tag (1, text) and number (2, float),
//! session log (7) with status (1).

use super::report::{Event, Report};
use crate::error::Error;
use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

/// Folder of the files, below that of the run, as LitGPT has it.
pub const FOLDER: &str = "logs/tensorboard";
/// Begin of a file's name, by which TensorBoard knows it.
pub const PREFIX: &str = "events.out.tfevents";
/// CRC-32C's polynomial, bits in reverse.
const POLYNOMIAL: u32 = 0x82f6_3b78;

/// An event file that is being written.
#[derive(Debug)]
pub struct TensorBoard {
    path: PathBuf,
    file: File,
}

impl TensorBoard {
    /// Starts a file for the run in `out_dir`. Of earlier files, steps from `from_step` on are not shown any more.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn create(out_dir: &Path, from_step: usize) -> Result<Self, Error> {
        let dir = out_dir.join(FOLDER);
        std::fs::create_dir_all(&dir).map_err(Error::io("create", &dir))?;
        let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let path = dir.join(format!("{PREFIX}.{:010}.{:09}.litgpt", since.as_secs(), since.subsec_nanos()));
        let file = File::create(&path).map_err(Error::io("create", &path))?;
        let mut board = Self { path, file };
        board.write(0, &bytes(3, b"brain.Event:2"))?;
        // Status 1 is START.
        board.write(from_step, &bytes(7, &[0x08, 1]))?;
        Ok(board)
    }

    /// Writes an event with the encoded field `what`.
    fn write(&mut self, step: usize, what: &[u8]) -> Result<(), Error> {
        let seconds = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs_f64();
        let mut event = vec![0x09];
        event.extend(seconds.to_le_bytes());
        event.push(0x10);
        varint(step as u64, &mut event);
        event.extend(what);
        self.file.write_all(&record(&event)).map_err(Error::io("write", &self.path))
    }

    fn scalars(&mut self, step: usize, scalars: &[(&str, f64)]) -> Result<(), Error> {
        let value = |(tag, number): &(&str, f64)| {
            let mut value = bytes(1, tag.as_bytes());
            value.push(0x15);
            value.extend((*number as f32).to_le_bytes());
            bytes(1, &value)
        };
        let summary: Vec<u8> = scalars.iter().flat_map(value).collect();
        self.write(step, &bytes(5, &summary))
    }
}

impl Report for TensorBoard {
    fn event(&mut self, event: &Event) -> anyhow::Result<()> {
        match event {
            Event::Step(figures) => {
                let scalars = [
                    ("loss", figures.loss),
                    ("learning_rate", figures.learning_rate),
                    ("grad_norm", figures.grad_norm),
                    ("tokens_per_s", figures.tokens as f64 / figures.seconds),
                ];
                self.scalars(figures.step, &scalars)?;
            }
            Event::Validation { step, loss, .. } => {
                self.scalars(*step, &[("val_loss", *loss), ("val_ppl", loss.exp())])?;
            }
            _ => {}
        }
        Ok(())
    }
}

/// A field of bytes, text or a message.
fn bytes(field: u8, content: &[u8]) -> Vec<u8> {
    let mut out = vec![field << 3 | 2];
    varint(content.len() as u64, &mut out);
    out.extend(content);
    out
}

/// Seven bits a byte, the lowest first.
fn varint(mut number: u64, out: &mut Vec<u8>) {
    while number >= 0x80 {
        out.push(number as u8 | 0x80);
        number >>= 7;
    }
    out.push(number as u8);
}

fn record(content: &[u8]) -> Vec<u8> {
    let length = (content.len() as u64).to_le_bytes();
    let sums = [masked_crc(&length), masked_crc(content)].map(u32::to_le_bytes);
    [&length, &sums[0][..], content, &sums[1]].concat()
}

/// TensorFlow's rotated CRC-32C (Castagnoli); a few hundred bytes a step need no table.
fn masked_crc(bytes: &[u8]) -> u32 {
    let mut crc = u32::MAX;
    for byte in bytes {
        crc ^= u32::from(*byte);
        for _ in 0..8 {
            crc = crc >> 1 ^ if crc & 1 == 1 { POLYNOMIAL } else { 0 };
        }
    }
    (!crc).rotate_right(15).wrapping_add(0xa282_ead8)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn check_sums_are_castagnolis() {
        let unmasked = |bytes: &[u8]| masked_crc(bytes).wrapping_sub(0xa282_ead8).rotate_left(15);
        // RFC 3720, appendix B.4, and the usual check value.
        assert_eq!(unmasked(&[0; 32]), 0x8a91_36aa);
        assert_eq!(unmasked(&[0xff; 32]), 0x62a8_ab43);
        assert_eq!(unmasked(b"123456789"), 0xe306_9283);
    }

    #[test]
    fn numbers_are_protobufs() {
        let encoded = |n: u64| {
            let mut out = Vec::new();
            varint(n, &mut out);
            out
        };
        assert_eq!(encoded(1), [1]);
        assert_eq!(encoded(150), [0x96, 1]);
        assert_eq!(encoded(u64::MAX).len(), 10);
        assert_eq!(bytes(2, b"testing"), b"\x12\x07testing");
    }
}
