//! [`Wide`] for processors that have AVX2 and no AVX-512.

use super::{Compiled, LANES, Wide};
use crate::ops::simd::Level;
use half::{bf16, f16};
use std::arch::x86_64::*;

/// Sixteen f32 in two registers of AVX2: the first eight and the last.
#[derive(Clone, Copy)]
pub struct Halves(__m256, __m256);

/// Eight lanes, of which those are kept that are among the first `len`.
#[inline]
#[target_feature(enable = "avx2")]
fn mask_of_8(len: usize) -> __m256i {
    let lanes = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    _mm256_cmpgt_epi32(_mm256_set1_epi32(len.min(8) as i32), lanes)
}

/// Writes the first `len` of eight: a masked store takes longer than some small ones.
///
/// # Safety
/// They can be written.
#[inline]
#[target_feature(enable = "avx2")]
unsafe fn store_first_of_8(values: __m256, mut to: *mut f32, len: usize) {
    // SAFETY: passed on; only `len` elements are written.
    unsafe {
        if len >= 8 {
            return _mm256_storeu_ps(to, values);
        }
        let mut left = _mm256_castps256_ps128(values);
        if len & 4 != 0 {
            _mm_storeu_ps(to, left);
            (to, left) = (to.wrapping_add(4), _mm256_extractf128_ps::<1>(values));
        }
        if len & 2 != 0 {
            _mm_storel_pd(to.cast(), _mm_castps_pd(left));
            (to, left) = (to.wrapping_add(2), _mm_movehl_ps(left, left));
        }
        if len & 1 != 0 {
            _mm_store_ss(to, left);
        }
    }
}

/// The upper 16 bits of eight lanes.
#[inline]
#[target_feature(enable = "avx2")]
fn upper() -> __m256i {
    _mm256_set1_epi32(0xffff_0000_u32.cast_signed())
}

/// Of eight pairs of bf16 the lower and the upper, widened.
#[inline]
#[target_feature(enable = "avx2")]
fn split_8(pairs: __m256i) -> [__m256; 2] {
    [_mm256_castsi256_ps(_mm256_slli_epi32::<16>(pairs)), _mm256_castsi256_ps(_mm256_and_si256(pairs, upper()))]
}

/// Eight bf16 in the lower 16 bits of each lane.
///
/// # Safety
/// They can be read.
#[inline]
#[target_feature(enable = "avx2")]
unsafe fn load_8(from: *const bf16) -> __m256i {
    // SAFETY: passed on.
    _mm256_cvtepu16_epi32(unsafe { _mm_loadu_si128(from.cast()) })
}

/// Eight bf16, widened.
///
/// # Safety
/// They can be read.
#[inline]
#[target_feature(enable = "avx2")]
unsafe fn widen_8(from: *const bf16) -> __m256 {
    // SAFETY: passed on.
    _mm256_castsi256_ps(_mm256_slli_epi32::<16>(unsafe { load_8(from) }))
}

/// Transposes 8 x 8 units.
#[inline]
#[target_feature(enable = "avx2")]
fn transpose_8(block: [__m256; 8]) -> [__m256; 8] {
    let mut a = block;
    for i in 0..4 {
        a[2 * i] = _mm256_unpacklo_ps(block[2 * i], block[2 * i + 1]);
        a[2 * i + 1] = _mm256_unpackhi_ps(block[2 * i], block[2 * i + 1]);
    }
    let mut b = a;
    for i in 0..2 {
        for j in 0..2 {
            let (low, high) = (_mm256_castps_pd(a[4 * i + j]), _mm256_castps_pd(a[4 * i + j + 2]));
            b[4 * i + 2 * j] = _mm256_castpd_ps(_mm256_unpacklo_pd(low, high));
            b[4 * i + 2 * j + 1] = _mm256_castpd_ps(_mm256_unpackhi_pd(low, high));
        }
    }
    // b[4i + c] holds, for rows 4i..4i+4, column c of both groups of four columns.
    let mut out = b;
    for c in 0..4 {
        out[c] = _mm256_permute2f128_ps::<0x20>(b[c], b[4 + c]);
        out[4 + c] = _mm256_permute2f128_ps::<0x31>(b[c], b[4 + c]);
    }
    out
}

impl Compiled for Halves {
    const LEVEL: Level = Level::Avx2;
}

impl Wide for Halves {
    /// 12 of 16 registers are sums.
    const ROWS: usize = 6;
    const BESIDE: usize = 1;

    #[inline]
    #[target_feature(enable = "avx2")]
    unsafe fn zero() -> Self {
        Self(_mm256_setzero_ps(), _mm256_setzero_ps())
    }

    #[inline]
    #[target_feature(enable = "avx2")]
    unsafe fn set(v: f32) -> Self {
        Self(_mm256_set1_ps(v), _mm256_set1_ps(v))
    }

    #[inline]
    #[target_feature(enable = "avx2")]
    unsafe fn load(from: *const f32) -> Self {
        // SAFETY: passed on.
        unsafe { Self(_mm256_loadu_ps(from), _mm256_loadu_ps(from.wrapping_add(8))) }
    }

    #[inline]
    #[target_feature(enable = "avx2")]
    unsafe fn load_first(from: *const f32, len: usize) -> Self {
        let last = from.wrapping_add(8);
        // SAFETY: passed on.
        unsafe {
            if len >= LANES {
                return Self(_mm256_loadu_ps(from), _mm256_loadu_ps(last));
            }
            Self(_mm256_maskload_ps(from, mask_of_8(len)), _mm256_maskload_ps(last, mask_of_8(len.saturating_sub(8))))
        }
    }

    #[inline]
    #[target_feature(enable = "avx2")]
    unsafe fn load_bf16(from: *const bf16) -> Self {
        // SAFETY: passed on.
        unsafe { Self(widen_8(from), widen_8(from.wrapping_add(8))) }
    }

    #[inline]
    #[target_feature(enable = "avx2,f16c")]
    unsafe fn load_f16(from: *const f16) -> Self {
        // SAFETY: passed on.
        unsafe {
            Self(
                _mm256_cvtph_ps(_mm_loadu_si128(from.cast())),
                _mm256_cvtph_ps(_mm_loadu_si128(from.wrapping_add(8).cast())),
            )
        }
    }

    #[inline]
    #[target_feature(enable = "avx2")]
    unsafe fn load_split(from: *const bf16) -> [Self; 2] {
        // SAFETY: passed on.
        let first = split_8(unsafe { _mm256_loadu_si256(from.cast()) });
        let last = split_8(unsafe { _mm256_loadu_si256(from.wrapping_add(16).cast()) });
        [Self(first[0], last[0]), Self(first[1], last[1])]
    }

    #[inline]
    #[target_feature(enable = "avx2")]
    unsafe fn of_codes(levels: &[f32; 16], codes: &[u8; 16]) -> [Self; 2] {
        // SAFETY: both are of these lengths.
        let (low, high) = unsafe { (_mm256_loadu_ps(levels.as_ptr()), _mm256_loadu_ps(levels[LANES / 2..].as_ptr())) };
        let look_up = |codes: __m256i| {
            // Three bits count; the fourth chooses the table.
            let fourth = _mm256_castsi256_ps(_mm256_slli_epi32::<28>(codes));
            let [low, high] = [low, high].map(|levels| _mm256_permutevar8x32_ps(levels, codes));
            _mm256_blendv_ps(low, high, fourth)
        };
        let of_8 = |codes: *const u8| {
            // SAFETY: eight of 16.
            let codes = _mm256_cvtepu8_epi32(unsafe { _mm_loadl_epi64(codes.cast()) });
            let (first, second) = (look_up(_mm256_srli_epi32::<4>(codes)), look_up(codes));
            let (low, high) = (_mm256_unpacklo_ps(first, second), _mm256_unpackhi_ps(first, second));
            Self(_mm256_permute2f128_ps::<0x20>(low, high), _mm256_permute2f128_ps::<0x31>(low, high))
        };
        [of_8(codes.as_ptr()), of_8(codes[LANES / 2..].as_ptr())]
    }

    #[inline]
    #[target_feature(enable = "avx2")]
    unsafe fn store(self, to: *mut f32) {
        // SAFETY: passed on.
        unsafe {
            _mm256_storeu_ps(to, self.0);
            _mm256_storeu_ps(to.wrapping_add(8), self.1);
        }
    }

    #[inline]
    #[target_feature(enable = "avx2")]
    unsafe fn store_first(self, to: *mut f32, len: usize) {
        // SAFETY: passed on.
        unsafe {
            store_first_of_8(self.0, to, len);
            store_first_of_8(self.1, to.wrapping_add(8), len.saturating_sub(8));
        }
    }

    #[inline]
    #[target_feature(enable = "avx2")]
    unsafe fn add(self, other: Self) -> Self {
        Self(_mm256_add_ps(self.0, other.0), _mm256_add_ps(self.1, other.1))
    }

    #[inline]
    #[target_feature(enable = "avx2")]
    unsafe fn multiply(self, other: Self) -> Self {
        Self(_mm256_mul_ps(self.0, other.0), _mm256_mul_ps(self.1, other.1))
    }

    #[inline]
    #[target_feature(enable = "avx2,fma")]
    unsafe fn multiply_add(self, factor: Self, sum: Self) -> Self {
        Self(_mm256_fmadd_ps(self.0, factor.0, sum.0), _mm256_fmadd_ps(self.1, factor.1, sum.1))
    }

    #[inline]
    #[target_feature(enable = "avx2")]
    unsafe fn non_zeros(self) -> u16 {
        let bits = |eight| _mm256_movemask_ps(_mm256_cmp_ps::<_CMP_NEQ_UQ>(eight, _mm256_setzero_ps())) as u16;
        bits(self.0) | bits(self.1) << 8
    }

    #[inline]
    #[target_feature(enable = "avx2")]
    unsafe fn transpose(block: &mut [Self; LANES]) {
        let mut parts = [[_mm256_setzero_ps(); 8]; 4];
        for i in 0..8 {
            (parts[0][i], parts[1][i]) = (block[i].0, block[i].1);
            (parts[2][i], parts[3][i]) = (block[8 + i].0, block[8 + i].1);
        }
        let [a, b] = [transpose_8(parts[0]), transpose_8(parts[1])];
        let [c, d] = [transpose_8(parts[2]), transpose_8(parts[3])];
        for i in 0..8 {
            (block[i], block[8 + i]) = (Self(a[i], c[i]), Self(b[i], d[i]));
        }
    }
}
