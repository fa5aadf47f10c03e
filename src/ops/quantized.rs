//! Frozen matrices in few bits: which kinds there are, quantizing, and decoding some rows. The 4-bit format is in `nf4`,
//! the product with such a matrix in `weight`.
//!
//! 8 bits: each row is stored as its largest magnitude `absmax` and whole numbers `q = round(127 x / absmax)`, so that
//! `x ≈ q · absmax / 127` (the weights of Dettmers et al. 2022, LLM.int8(), arXiv:2208.07339). Inputs are not quantized,
//! so outliers among them do no harm. Half way goes to the even number, as bitsandbytes has it.

use super::nf4::{Absmax, Kind4, NESTED_BLOCK, QUANT_BLOCK, Quantized};
use super::weight::Weight;
use std::ops::Range;

/// The largest code of 8 bits.
const LARGEST: f32 = 127.0;

/// A way to keep a matrix in few bits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Format {
    /// 4 bits a value and a scale for each 64; with `double`, the scales in 8 bits.
    Four {
        /// Which levels.
        kind: Kind4,
        /// Whether the scales are quantized as well.
        double: bool,
    },
    /// 8 bits a value and a scale for each row.
    Int8,
}

impl Format {
    /// The format of a name on the command line. With frozen weights, `int8-training` is `int8`.
    #[must_use]
    pub fn named(name: &str) -> Option<Self> {
        Some(match name {
            "nf4" => Self::Four { kind: Kind4::Nf4, double: false },
            "nf4-dq" => Self::Four { kind: Kind4::Nf4, double: true },
            "fp4" => Self::Four { kind: Kind4::Fp4, double: false },
            "fp4-dq" => Self::Four { kind: Kind4::Fp4, double: true },
            "int8" | "int8-training" => Self::Int8,
            _ => return None,
        })
    }
}

impl Format {
    /// Its name on the command line.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Four { kind: Kind4::Nf4, double: false } => "nf4",
            Self::Four { kind: Kind4::Nf4, double: true } => "nf4-dq",
            Self::Four { kind: Kind4::Fp4, double: false } => "fp4",
            Self::Four { kind: Kind4::Fp4, double: true } => "fp4-dq",
            Self::Int8 => "int8",
        }
    }

    /// Bytes of a (rows, cols) matrix, which [`Codes::bytes`] has in the end.
    #[must_use]
    pub const fn bytes(self, rows: usize, cols: usize) -> usize {
        let n = rows * cols;
        let blocks = n.div_ceil(QUANT_BLOCK);
        match self {
            Self::Four { double: false, .. } => n.div_ceil(2) + blocks * 4,
            // The scales' mean is one number more.
            Self::Four { double: true, .. } => n.div_ceil(2) + blocks + blocks.div_ceil(NESTED_BLOCK) * 4 + 4,
            Self::Int8 => n + rows * 4,
        }
    }
}

/// The elements of a (rows, cols) matrix in few bits.
#[derive(Debug, Clone)]
pub enum Codes {
    /// 4 bits a value.
    Four(Quantized),
    /// 8 bits a value.
    Int8 {
        /// Whole numbers, row after row.
        codes: Vec<i8>,
        /// The largest magnitude of each row.
        absmax: Vec<f32>,
        /// Elements of a row.
        cols: usize,
    },
}

impl Codes {
    /// Quantizes a matrix.
    ///
    /// # Shapes
    /// `values`: (rows, cols), row after row.
    ///
    /// # Panics
    /// When `values` has another number of elements.
    #[must_use]
    pub fn new(format: Format, values: &[f32], rows: usize, cols: usize) -> Self {
        assert_eq!(values.len(), rows * cols, "quantize: values for ({rows}, {cols})");
        match format {
            Format::Four { kind, double } => {
                Self::Four(Quantized::quantize(values, rows, cols, kind, double).expect("the length was checked"))
            }
            Format::Int8 => {
                let mut codes = Vec::with_capacity(values.len());
                let mut absmax = Vec::with_capacity(rows);
                for row in values.chunks(cols.max(1)) {
                    let largest = row.iter().fold(0f32, |m, v| m.max(v.abs()));
                    // Rounded twice, as PyTorch divides a number by a tensor.
                    let inverse = if largest > 0.0 { LARGEST * largest.recip() } else { 0.0 };
                    absmax.push(largest);
                    codes.extend(row.iter().map(|v| (v * inverse).round_ties_even() as i8));
                }
                Self::Int8 { codes, absmax, cols }
            }
        }
    }

    /// Number of rows.
    #[must_use]
    pub fn rows(&self) -> usize {
        match self {
            Self::Four(four) => four.rows,
            Self::Int8 { absmax, .. } => absmax.len(),
        }
    }

    /// The matrix of these rows; `None` where a scale is of rows that are chosen and of others.
    #[must_use]
    pub fn select(&self, ranges: &[Range<usize>]) -> Option<Self> {
        fn gather<T: Copy>(all: &[T], ranges: &[Range<usize>], of_row: impl Fn(usize) -> usize) -> Vec<T> {
            ranges.iter().flat_map(|r| &all[of_row(r.start)..of_row(r.end)]).copied().collect()
        }
        match self {
            Self::Int8 { codes, absmax, cols } => Some(Self::Int8 {
                codes: gather(codes, ranges, |row| row * cols),
                absmax: gather(absmax, ranges, |row| row),
                cols: *cols,
            }),
            Self::Four(four) => {
                let whole = |row: usize| row == four.rows || (row * four.cols).is_multiple_of(QUANT_BLOCK);
                // A short block may end the matrix only.
                let ends = ranges.iter().rev().skip(1).all(|r| (r.end * four.cols).is_multiple_of(QUANT_BLOCK));
                if !ends || !ranges.iter().all(|r| whole(r.start) && whole(r.end)) {
                    return None;
                }
                let block = |row: usize| (row * four.cols).div_ceil(QUANT_BLOCK);
                let scales: Vec<f32> = (0..four.absmax.len()).map(|i| four.absmax.get(i)).collect();
                Some(Self::Four(Quantized {
                    kind: four.kind,
                    packed: gather(&four.packed, ranges, |row| (row * four.cols).div_ceil(2)),
                    absmax: Absmax::Plain(gather(&scales, ranges, block)),
                    rows: ranges.iter().map(Range::len).sum(),
                    cols: four.cols,
                }))
            }
        }
    }

    /// Some rows in f32.
    ///
    /// # Panics
    /// When the rows do not exist or `out` has another number of elements.
    pub fn decode_rows(&self, rows: Range<usize>, out: &mut [f32]) {
        match self {
            Self::Four(four) => four.dequantize_rows(rows.start, rows.len(), out).expect("rows of the matrix"),
            Self::Int8 { codes, absmax, cols } => {
                let codes = &codes[rows.start * cols..rows.end * cols];
                assert_eq!(codes.len(), out.len(), "decode: {} elements for rows {rows:?}", out.len());
                let lines = out.chunks_exact_mut((*cols).max(1)).zip(codes.chunks_exact((*cols).max(1)));
                for ((out, codes), absmax) in lines.zip(&absmax[rows]) {
                    let scale = absmax / LARGEST;
                    out.iter_mut().zip(codes).for_each(|(out, code)| *out = f32::from(*code) * scale);
                }
            }
        }
    }

    /// Bytes in memory: codes and scales.
    #[must_use]
    pub fn bytes(&self) -> usize {
        match self {
            Self::Four(four) => four.byte_count(),
            Self::Int8 { codes, absmax, .. } => codes.len() + size_of_val(absmax.as_slice()),
        }
    }
}

/// The part that a row is of, where the `rows` of each stand one after another.
pub fn part_of<T>(parts: &[T], row: usize, rows: impl Fn(&T) -> usize) -> Option<&T> {
    let mut end = 0;
    parts.iter().find(|part| {
        end += rows(part);
        row < end
    })
}

/// Some rows of a matrix of which others may be kept otherwise.
#[derive(Debug, Clone)]
pub enum Rows {
    /// In few bits.
    Codes(Codes),
    /// As they are.
    Whole(Weight),
}

impl Rows {
    /// How many.
    #[must_use]
    pub fn count(&self) -> usize {
        match self {
            Self::Codes(codes) => codes.rows(),
            Self::Whole(weight) => weight.rows(),
        }
    }

    /// Some of them in f32.
    ///
    /// # Panics
    /// When they do not exist or `out` has another number of elements.
    pub fn decode(&self, rows: Range<usize>, out: &mut [f32]) {
        match self {
            Self::Codes(codes) => codes.decode_rows(rows, out),
            Self::Whole(weight) => weight.decode_rows(rows, out),
        }
    }

    /// Bytes in memory.
    #[must_use]
    pub fn bytes(&self) -> usize {
        match self {
            Self::Codes(codes) => codes.bytes(),
            Self::Whole(weight) => weight.bytes(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::testing::random;

    #[test]
    fn half_way_goes_to_the_even_number() {
        let Codes::Int8 { codes, .. } = Codes::new(Format::Int8, &[127.0, 0.5, 1.5, 2.5, -0.5, -3.5], 1, 6) else {
            panic!("8 bits were asked for")
        };
        assert_eq!(codes, [127, 0, 2, 2, 0, -4]);
    }

    #[test]
    fn selected_rows_are_those_rows() {
        let (rows, cols) = (12, 32);
        let values = random(rows * cols, 1);
        for name in ["nf4", "nf4-dq", "fp4", "int8"] {
            let codes = Codes::new(Format::named(name).unwrap(), &values, rows, cols);
            let mut all = vec![0.0; rows * cols];
            codes.decode_rows(0..rows, &mut all);
            let ranges = [8..12, 2..6];
            let mut some = vec![0.0; 8 * cols];
            codes.select(&ranges).unwrap().decode_rows(0..8, &mut some);
            assert_eq!(some, ranges.map(|r| all[r.start * cols..r.end * cols].to_vec()).concat());
            assert_eq!(codes.select(&[1..3, 4..6]).is_some(), name == "int8", "blocks of 64 are two rows");
        }
    }

    #[test]
    fn codes_take_as_many_bytes_as_their_format_says() {
        for (rows, cols) in [(5, 123), (64, 320)] {
            for format in ["nf4", "nf4-dq", "fp4", "int8"].map(|name| Format::named(name).unwrap()) {
                assert_eq!(Codes::new(format, &random(rows * cols, 1), rows, cols).bytes(), format.bytes(rows, cols));
            }
        }
    }

    #[test]
    fn eight_bits_are_within_half_a_step_of_each_rows_scale() {
        let (rows, cols) = (5, 123);
        let mut values = random(rows * cols, 1);
        values[cols..2 * cols].iter_mut().for_each(|v| *v *= 1e-3);
        values[2 * cols..3 * cols].fill(0.0);
        let codes = Codes::new(Format::Int8, &values, rows, cols);
        let mut out = vec![f32::NAN; 4 * cols];
        codes.decode_rows(1..5, &mut out);
        for (row, got) in values.chunks(cols).skip(1).zip(out.chunks(cols)) {
            let absmax = row.iter().fold(0f32, |m, v| m.max(v.abs()));
            for (v, got) in row.iter().zip(got) {
                assert!((v - got).abs() <= 0.501 * absmax / 127.0, "{v} became {got}");
            }
        }
    }
}
