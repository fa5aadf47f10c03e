//! Element types of GGUF tensors: f32 rows to and from them. `Q8_0` and `Q4_0`, which are written, keep blocks of 32
//! elements with one f16 scale; candle decodes those and all others that are read.

use crate::checkpoint::{Dtype, Elements};
use candle_core::Device;
use candle_core::quantized::{GgmlDType, ggml_file::qtensor_from_ggml};
use half::f16;
use rayon::prelude::*;

/// Elements of a block.
pub const BLOCK: usize = 32;

/// How the elements of a tensor are kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// 32 bit.
    F32,
    /// IEEE half.
    F16,
    /// 4 bit and a scale for each block.
    Q4_0,
    /// 8 bit and a scale for each block.
    Q8_0,
}

impl Kind {
    /// The number by which ggml knows it.
    #[must_use]
    pub fn id(self) -> u32 {
        match self {
            Self::F32 => 0,
            Self::F16 => 1,
            Self::Q4_0 => 2,
            Self::Q8_0 => 8,
        }
    }

    /// The number of a file whose matrices are mostly of this kind (`general.file_type`).
    #[must_use]
    pub fn file_type(self) -> u32 {
        if self == Self::Q8_0 { 7 } else { self.id() }
    }

    /// Bytes of `elements`.
    #[must_use]
    pub fn bytes(self, elements: usize) -> usize {
        match self {
            Self::F32 => elements * 4,
            Self::F16 => elements * 2,
            Self::Q4_0 => elements / BLOCK * 18,
            Self::Q8_0 => elements / BLOCK * 34,
        }
    }

    /// `values`, whole blocks where the kind has blocks, as little-endian elements.
    #[must_use]
    pub fn encode(self, values: &[f32]) -> Vec<u8> {
        const CHUNK: usize = 1 << 15;
        let mut out = vec![0; self.bytes(values.len())];
        let chunks = out.par_chunks_mut(self.bytes(CHUNK)).zip(values.par_chunks(CHUNK));
        chunks.for_each(|(out, values)| match self {
            Self::F32 => pairs(out, values, 4, 1, |o, v| o.copy_from_slice(&v[0].to_le_bytes())),
            Self::F16 => pairs(out, values, 2, 1, |o, v| o.copy_from_slice(&f16::from_f32(v[0]).to_le_bytes())),
            Self::Q4_0 => pairs(out, values, 18, BLOCK, q4_0),
            Self::Q8_0 => pairs(out, values, 34, BLOCK, q8_0),
        });
        out
    }
}

/// How the elements of a tensor are kept whose type ggml knows as `id`.
///
/// # Errors
/// The name of a type that is not read.
pub fn elements(id: u32) -> Result<Elements, String> {
    const OTHERS: &[(u32, &str)] = &[
        (16, "IQ2_XXS"),
        (17, "IQ2_XS"),
        (18, "IQ3_XXS"),
        (19, "IQ1_S"),
        (20, "IQ4_NL"),
        (21, "IQ3_S"),
        (22, "IQ2_S"),
        (23, "IQ4_XS"),
        (28, "F64"),
        (29, "IQ1_M"),
        (34, "TQ1_0"),
        (35, "TQ2_0"),
        (39, "MXFP4"),
    ];
    Ok(match id {
        0 => Elements::Plain(Dtype::F32),
        1 => Elements::Plain(Dtype::F16),
        30 => Elements::Plain(Dtype::Bf16),
        2 => Elements::Blocks(GgmlDType::Q4_0),
        3 => Elements::Blocks(GgmlDType::Q4_1),
        6 => Elements::Blocks(GgmlDType::Q5_0),
        7 => Elements::Blocks(GgmlDType::Q5_1),
        8 => Elements::Blocks(GgmlDType::Q8_0),
        10 => Elements::Blocks(GgmlDType::Q2K),
        11 => Elements::Blocks(GgmlDType::Q3K),
        12 => Elements::Blocks(GgmlDType::Q4K),
        13 => Elements::Blocks(GgmlDType::Q5K),
        14 => Elements::Blocks(GgmlDType::Q6K),
        _ => {
            let name = OTHERS.iter().find(|other| other.0 == id).map(|other| other.1.to_owned());
            return Err(name.unwrap_or_else(|| id.to_string()));
        }
    })
}

/// Elements of a block, and its bytes.
#[must_use]
pub fn block(elements: Elements) -> (usize, usize) {
    match elements {
        Elements::Plain(dtype) | Elements::Bits(dtype) => (1, dtype.size()),
        Elements::Blocks(kind) => (kind.block_size(), kind.type_size()),
    }
}

/// Whole blocks as little-endian f32.
///
/// # Errors
/// candle's.
pub fn decode(kind: GgmlDType, bytes: &[u8]) -> candle_core::Result<Vec<u8>> {
    const BLOCKS: usize = 1 << 10;
    let (elements, size) = (kind.block_size(), kind.type_size());
    let mut out = vec![0; bytes.len() / size * elements * 4];
    let chunks = out.par_chunks_mut(BLOCKS * elements * 4).zip(bytes.par_chunks(BLOCKS * size));
    chunks.try_for_each(|(out, bytes)| -> candle_core::Result<()> {
        let len = bytes.len() / size * elements;
        let decoded = qtensor_from_ggml(kind, bytes, vec![len], &Device::Cpu)?.dequantize(&Device::Cpu)?;
        let values = decoded.to_vec1::<f32>()?;
        out.chunks_exact_mut(4).zip(values).for_each(|(o, v)| o.copy_from_slice(&v.to_le_bytes()));
        Ok(())
    })?;
    Ok(out)
}

/// Calls `f` with `bytes` of `out` for each `elements` of `values`.
fn pairs(out: &mut [u8], values: &[f32], bytes: usize, elements: usize, f: impl Fn(&mut [u8], &[f32])) {
    out.chunks_exact_mut(bytes).zip(values.chunks_exact(elements)).for_each(|(o, v)| f(o, v));
}

/// `d = max |w| / 127`, then `round(w / d)`.
fn q8_0(out: &mut [u8], values: &[f32]) {
    let largest = values.iter().fold(0.0f32, |m, v| m.max(v.abs()));
    let scale = largest / 127.0;
    let inverse = if scale > 0.0 { scale.recip() } else { 0.0 };
    out[..2].copy_from_slice(&f16::from_f32(scale).to_le_bytes());
    out[2..].iter_mut().zip(values).for_each(|(o, v)| *o = (v * inverse).round() as i8 as u8);
}

/// `d = w / -8` of the `w` of largest magnitude, which so is exact; then `round(w / d) + 8` in 4 bits, the block's second
/// half above the first.
fn q4_0(out: &mut [u8], values: &[f32]) {
    let largest = values.iter().copied().fold(0.0f32, |m, v| if v.abs() > m.abs() { v } else { m });
    let scale = largest / -8.0;
    let inverse = if scale == 0.0 { 0.0 } else { scale.recip() };
    out[..2].copy_from_slice(&f16::from_f32(scale).to_le_bytes());
    let nibble = |v: f32| ((v * inverse + 8.5) as u8).min(15);
    let (low, high) = values.split_at(BLOCK / 2);
    for (o, (l, h)) in out[2..].iter_mut().zip(low.iter().zip(high)) {
        *o = nibble(*l) | nibble(*h) << 4;
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use candle_core::Tensor;
    use candle_core::quantized::QTensor;

    fn values() -> Vec<f32> {
        (0..4 * BLOCK).map(|i| ((i * 37 % 101) as f32 - 50.0) * if i < 64 { 0.01 } else { 3.0 }).collect()
    }

    fn decoded(kind: Kind, dtype: GgmlDType) -> Vec<f32> {
        let bytes = kind.encode(&values());
        let tensor: QTensor = qtensor_from_ggml(dtype, &bytes, vec![4, BLOCK], &Device::Cpu).unwrap();
        tensor.dequantize(&Device::Cpu).unwrap().flatten_all().unwrap().to_vec1().unwrap()
    }

    #[test]
    fn blocks_are_within_half_a_step() {
        for (kind, dtype, steps) in [(Kind::Q8_0, GgmlDType::Q8_0, 127.0), (Kind::Q4_0, GgmlDType::Q4_0, 8.0)] {
            for (want, got) in values().chunks(BLOCK).zip(decoded(kind, dtype).chunks(BLOCK)) {
                let largest = want.iter().fold(0.0f32, |m, v| m.max(v.abs()));
                // 4 bits reach one step less far to the side of the largest value's opposite.
                let half = largest / steps * if kind == Kind::Q4_0 { 1.01 } else { 0.51 };
                assert!(
                    want.iter().zip(got).all(|(w, g)| (w - g).abs() <= half + largest / 1000.0),
                    "{kind:?} {want:?} {got:?}"
                );
                assert!(want.iter().zip(got).any(|(w, g)| w != g), "{kind:?} loses something");
            }
        }
    }

    #[test]
    fn a_block_of_zeros_stays_zero() {
        for (kind, dtype) in [(Kind::Q8_0, GgmlDType::Q8_0), (Kind::Q4_0, GgmlDType::Q4_0)] {
            let bytes = kind.encode(&[0.0; BLOCK]);
            let tensor = qtensor_from_ggml(dtype, &bytes, vec![1, BLOCK], &Device::Cpu).unwrap();
            let back: Vec<f32> = tensor.dequantize(&Device::Cpu).unwrap().flatten_all().unwrap().to_vec1().unwrap();
            assert!(back.iter().all(|v| *v == 0.0), "{kind:?}: {back:?}");
        }
    }

    /// Encoded by candle, many chunks of blocks, decoded in parallel: as candle decodes all of it at once.
    #[test]
    fn every_type_that_is_read_is_decoded() {
        let values: Vec<f32> = (0..(1 << 18) + 512).map(|i| ((i * 7919 % 1009) as f32 - 500.0) / 300.0).collect();
        let tensor = Tensor::new(values.as_slice(), &Device::Cpu).unwrap();
        let mut read = 0;
        for id in 0..40 {
            let Ok(Elements::Blocks(kind)) = elements(id) else { continue };
            let encoded = QTensor::quantize(&tensor, kind).unwrap();
            let want: Vec<f32> = encoded.dequantize(&Device::Cpu).unwrap().to_vec1().unwrap();
            let mut got = vec![0.0; values.len()];
            Dtype::F32.decode(&decode(kind, &encoded.data().unwrap()).unwrap(), &mut got);
            assert!(got == want, "{kind:?}");
            // 2 bits of a range of 3.4 are steps of 1.1.
            let off = got.iter().zip(&values).fold(0.0f32, |m, (g, v)| m.max((g - v).abs()));
            assert!(off > 0.0 && off < 1.2, "{kind:?}: {off}");
            read += 1;
        }
        assert_eq!(read, 10);
    }
}
