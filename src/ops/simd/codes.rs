//! Elements of 4-bit codes: the levels are looked up in registers, 16 at a time.

use super::wide::{LANES, Wide, for_each_width};
use super::{Level, at_width};

/// Levels of 32 codes.
const TOGETHER: usize = 2 * LANES;

/// `levels[code] · scale` of as many bytes of two codes each, the one in the high half first, as there are whole times 32
/// elements in `out`; how many elements that are.
///
/// # Panics
/// When the codes are fewer.
pub fn decode_4_bits(level: Level, levels: &[f32; 16], codes: &[u8], scale: f32, out: &mut [f32]) -> usize {
    let whole = out.len() / TOGETHER * TOGETHER;
    let (codes, out) = (&codes[..whole / 2], &mut out[..whole]);
    // SAFETY: the level found the instructions.
    unsafe { at_width!(level, decode(levels, codes, scale, out)) };
    whole
}

for_each_width! {
    /// # Safety
    /// The processor has the instructions.
    unsafe fn decode<W: Wide>(levels: &[f32; 16], codes: &[u8], scale: f32, out: &mut [f32]) {
        for (out, codes) in out.as_chunks_mut::<TOGETHER>().0.iter_mut().zip(codes.as_chunks::<LANES>().0) {
            // SAFETY: passed on; there are 16 bytes and 32 elements.
            unsafe {
                let scale = W::set(scale);
                for (i, values) in W::of_codes(levels, codes).into_iter().enumerate() {
                    values.multiply(scale).store(out[i * LANES..].as_mut_ptr());
                }
            }
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn every_code_has_its_level_at_every_width() {
        let Some(best) = crate::ops::simd::level() else { return };
        let levels: [f32; 16] = std::array::from_fn(|i| i as f32 - 7.5);
        let codes: Vec<u8> = (0..=255).collect();
        let want: Vec<f32> = codes
            .iter()
            .flat_map(|byte| [byte >> 4, byte & 15])
            .collect::<Vec<_>>()
            .iter()
            .map(|c| levels[*c as usize] * 0.3)
            .collect();
        for level in [Level::Avx2, best] {
            // What is left over is another's.
            let mut out = vec![7.0; 2 * 256 - 5];
            assert_eq!(decode_4_bits(level, &levels, &codes, 0.3, &mut out), 480);
            assert_eq!(out[..480], want[..480]);
            assert!(out[480..].iter().all(|v| *v == 7.0));
        }
    }
}
