//! Sixteen f32 side by side, by AVX-512 or by AVX2, what products multiply, and functions that are compiled for each.
//!
//! Everything is `unsafe` for one reason: the processor has to have the instructions, which `super::level` finds out. What is
//! behind a pointer has to be there as well.

mod halves;
mod reading;

pub use halves::Halves;
pub use reading::{PairedVectors, Reading, WideOf, WidenedRows, WidenedVectors};

use super::{Level, PANEL, Panels};
use half::{bf16, f16};
use std::arch::x86_64::*;

/// How many there are.
pub const LANES: usize = 16;

/// A type whose functions are compiled with the instructions of a level.
pub trait Compiled {
    /// That level.
    const LEVEL: Level;
}

/// What a product multiplies, 32 bits each: f32 elements, or pairs of bf16.
pub trait Unit: Compiled {
    /// Their sums, and 16 of themselves.
    type Wide: Wide;
    /// Elements of a unit.
    const ELEMENTS: usize;
    /// Units of a row of a panel.
    const RUN: usize = PANEL / Self::ELEMENTS;

    /// The first elements of `x` as 16 units; what is missing is zero.
    unsafe fn of(x: &[f32]) -> Self::Wide;
    /// From element `at` of a weight on, 16 elements of a row, or with those of the row after it, which may be missing.
    unsafe fn of_rows(w: Panels<'_>, at: usize, last: bool) -> Self::Wide;
    /// `sum`, and the products of each two units added.
    unsafe fn multiply_add(a: Self::Wide, b: Self::Wide, sum: Self::Wide) -> Self::Wide;
}

/// The upper half of each pair.
#[inline]
#[target_feature(enable = "avx512f")]
fn odd_mask() -> __m512i {
    _mm512_set1_epi32(0xffff_0000_u32.cast_signed())
}

/// Of 16 pairs of bf16 the elements at odd places, widened.
#[inline]
#[target_feature(enable = "avx512f")]
fn odd_elements(pairs: __m512i) -> __m512 {
    _mm512_castsi512_ps(_mm512_and_si512(pairs, odd_mask()))
}

/// Of 16 pairs of bf16 those at even places, widened.
#[inline]
#[target_feature(enable = "avx512f")]
fn even_elements(pairs: __m512i) -> __m512 {
    _mm512_castsi512_ps(_mm512_slli_epi32::<16>(pairs))
}

/// Sixteen even and sixteen odd columns in their order.
#[inline]
#[target_feature(enable = "avx512f")]
fn interleaved([even, odd]: [__m512; 2]) -> [__m512; 2] {
    let low = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
    let high = _mm512_add_epi32(low, _mm512_set1_epi32(8));
    [_mm512_permutex2var_ps(even, low, odd), _mm512_permutex2var_ps(even, high, odd)]
}

/// f32 elements.
macro_rules! unit_of_f32 {
    ($wide:ty) => {
        impl Unit for $wide {
            type Wide = Self;
            const ELEMENTS: usize = 1;

            #[inline(always)]
            unsafe fn of(x: &[f32]) -> Self {
                // SAFETY: what is not there is not read.
                unsafe { Self::load_first(x.as_ptr(), x.len()) }
            }

            #[inline(always)]
            unsafe fn of_rows(w: Panels<'_>, at: usize, _last: bool) -> Self {
                // SAFETY: passed on.
                unsafe { w.load(at) }
            }

            #[inline(always)]
            unsafe fn multiply_add(a: Self, b: Self, sum: Self) -> Self {
                // SAFETY: passed on.
                unsafe { Wide::multiply_add(a, b, sum) }
            }
        }
    };
}

unit_of_f32!(__m512);
unit_of_f32!(Halves);

/// Pairs of bf16, whose two products are added to an f32.
pub struct Pairs;

impl Compiled for Pairs {
    const LEVEL: Level = Level::Avx512Bf16;
}

impl Pairs {
    /// Sixteen of which the first elements are those of `first`, rounded to nearest even, the second those of `second`.
    ///
    /// # Safety
    /// The processor has the instructions.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
    pub unsafe fn of_two(first: __m512, second: __m512) -> __m512 {
        static TURNS: [u16; 32] = {
            let mut turns = [0; 32];
            let mut i = 0;
            while i < 32 {
                turns[i] = (i / 2 + i % 2 * 16) as u16;
                i += 1;
            }
            turns
        };
        // SAFETY: both have 64 bytes.
        unsafe {
            let both: __m512i = std::mem::transmute(_mm512_cvtne2ps_pbh(second, first));
            _mm512_castsi512_ps(_mm512_permutexvar_epi16(_mm512_loadu_si512(TURNS.as_ptr().cast()), both))
        }
    }
}

impl Unit for Pairs {
    type Wide = __m512;
    const ELEMENTS: usize = 2;

    /// Rounded to nearest even.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bf16")]
    unsafe fn of(x: &[f32]) -> __m512 {
        let (low, high) = x.split_at(x.len().min(LANES));
        // SAFETY: what is not there is not read; 16 units are 32 bf16.
        unsafe {
            let [low, high] = [low, high].map(|x| __m512::load_first(x.as_ptr(), x.len()));
            std::mem::transmute(_mm512_cvtne2ps_pbh(high, low))
        }
    }

    #[inline]
    #[target_feature(enable = "avx512f")]
    unsafe fn of_rows(w: Panels<'_>, at: usize, last: bool) -> __m512 {
        static NONE: [bf16; LANES] = [bf16::ZERO; LANES];
        let low = w.address(at).cast();
        let high = if last { NONE.as_ptr().cast() } else { w.address(at + PANEL).cast() };
        // SAFETY: passed on.
        let [low, high] = [low, high].map(|at| _mm512_cvtepu16_epi32(unsafe { _mm256_loadu_si256(at) }));
        _mm512_castsi512_ps(_mm512_or_si512(low, _mm512_slli_epi32::<16>(high)))
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bf16")]
    unsafe fn multiply_add(a: __m512, b: __m512, sum: __m512) -> __m512 {
        // SAFETY: 16 units are 32 bf16.
        let [a, b] = unsafe { [a, b].map(|units| std::mem::transmute::<__m512, __m512bh>(units)) };
        _mm512_dpbf16_ps(sum, a, b)
    }
}

/// Sixteen f32, or sixteen units of 32 bits.
pub trait Wide: Copy + Compiled {
    /// Rows of a tile of sums, `BESIDE` wide: so many that the sums stay in registers and the loads of a step hide behind
    /// its products.
    const ROWS: usize;
    /// Width of a tile: the two halves of a panel at once, or one.
    const BESIDE: usize;

    /// All zero.
    unsafe fn zero() -> Self;
    /// All `v`.
    unsafe fn set(v: f32) -> Self;
    /// 16 elements.
    unsafe fn load(from: *const f32) -> Self;
    /// The first `len` of them, zero behind; the others are not read.
    unsafe fn load_first(from: *const f32, len: usize) -> Self;
    /// 16 bf16, widened.
    unsafe fn load_bf16(from: *const bf16) -> Self;
    /// 16 halves, widened.
    unsafe fn load_f16(from: *const f16) -> Self;
    /// Of 32 bf16 those at even and those at odd places, widened.
    unsafe fn load_split(from: *const bf16) -> [Self; 2];
    /// The levels of 32 codes, two a byte, the one in the high half first.
    unsafe fn of_codes(levels: &[f32; 16], codes: &[u8; 16]) -> [Self; 2];
    /// All 16 elements.
    unsafe fn store(self, to: *mut f32);
    /// The first `len`; the others are not written.
    unsafe fn store_first(self, to: *mut f32, len: usize);
    /// `self + other`.
    unsafe fn add(self, other: Self) -> Self;
    /// `self · other`.
    unsafe fn multiply(self, other: Self) -> Self;
    /// `self · factor + sum`, rounded once.
    unsafe fn multiply_add(self, factor: Self, sum: Self) -> Self;
    /// A bit for each that is not zero, the first lowest.
    unsafe fn non_zeros(self) -> u16;
    /// Transposes 16 x 16 units.
    unsafe fn transpose(block: &mut [Self; LANES]);
}

/// Defines a function over a [`Wide`] or a [`Unit`] that is compiled with the instructions of each. What it calls must be
/// inlined into it, or be such a function.
macro_rules! for_each_width {
    (
        $(#[$meta:meta])*
        $visibility:vis unsafe fn $name:ident<
            $w:ident: $wide:ident $(, $t:ident: $bound:ident)* $(; $(const $c:ident: $of:ty),+)?
        >($($arg:ident: $type:ty),* $(,)?) $(-> $out:ty)? $body:block
    ) => {
        $(#[$meta])*
        #[inline]
        $visibility unsafe fn $name<$w: $wide $(, $t: $bound)* $($(, const $c: $of)+)?>($($arg: $type),*) $(-> $out)? {
            #[inline(always)]
            unsafe fn plain<$w: $wide $(, $t: $bound)* $($(, const $c: $of)+)?>($($arg: $type),*) $(-> $out)? $body

            #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,f16c,fma")]
            unsafe fn of_pairs<$w: $wide $(, $t: $bound)* $($(, const $c: $of)+)?>($($arg: $type),*) $(-> $out)? {
                // SAFETY: passed on.
                unsafe { plain::<$w $(, $t)* $($(, $c)+)?>($($arg),*) }
            }

            #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,f16c,fma")]
            unsafe fn of_512_bits<$w: $wide $(, $t: $bound)* $($(, const $c: $of)+)?>($($arg: $type),*) $(-> $out)? {
                // SAFETY: passed on.
                unsafe { plain::<$w $(, $t)* $($(, $c)+)?>($($arg),*) }
            }

            #[target_feature(enable = "avx2,f16c,fma")]
            unsafe fn of_256_bits<$w: $wide $(, $t: $bound)* $($(, const $c: $of)+)?>($($arg: $type),*) $(-> $out)? {
                // SAFETY: passed on.
                unsafe { plain::<$w $(, $t)* $($(, $c)+)?>($($arg),*) }
            }

            // SAFETY: passed on; the type tells which instructions there are.
            unsafe {
                match <$w as $crate::ops::simd::wide::Compiled>::LEVEL {
                    $crate::ops::simd::Level::Avx512Bf16 => of_pairs::<$w $(, $t)* $($(, $c)+)?>($($arg),*),
                    $crate::ops::simd::Level::Avx2 => of_256_bits::<$w $(, $t)* $($(, $c)+)?>($($arg),*),
                    _ => of_512_bits::<$w $(, $t)* $($(, $c)+)?>($($arg),*),
                }
            }
        }
    };
}
pub(super) use for_each_width;

/// The first `len` of 16 lanes.
fn mask(len: usize) -> u16 {
    if len >= LANES { u16::MAX } else { (1 << len) - 1 }
}

impl Compiled for __m512 {
    const LEVEL: Level = Level::Avx512;
}

impl Wide for __m512 {
    /// 24 of 32 registers are sums.
    const ROWS: usize = 12;
    const BESIDE: usize = 2;

    #[inline]
    #[target_feature(enable = "avx512f")]
    unsafe fn zero() -> Self {
        _mm512_setzero_ps()
    }

    #[inline]
    #[target_feature(enable = "avx512f")]
    unsafe fn set(v: f32) -> Self {
        _mm512_set1_ps(v)
    }

    #[inline]
    #[target_feature(enable = "avx512f")]
    unsafe fn load(from: *const f32) -> Self {
        // SAFETY: passed on.
        unsafe { _mm512_loadu_ps(from) }
    }

    #[inline]
    #[target_feature(enable = "avx512f")]
    unsafe fn load_first(from: *const f32, len: usize) -> Self {
        // SAFETY: passed on.
        unsafe { _mm512_maskz_loadu_ps(mask(len), from) }
    }

    #[inline]
    #[target_feature(enable = "avx512f")]
    unsafe fn load_bf16(from: *const bf16) -> Self {
        // SAFETY: passed on.
        let wide = _mm512_cvtepu16_epi32(unsafe { _mm256_loadu_si256(from.cast()) });
        _mm512_castsi512_ps(_mm512_slli_epi32::<16>(wide))
    }

    #[inline]
    #[target_feature(enable = "avx512f")]
    unsafe fn load_f16(from: *const f16) -> Self {
        // SAFETY: passed on.
        _mm512_cvtph_ps(unsafe { _mm256_loadu_si256(from.cast()) })
    }

    #[inline]
    #[target_feature(enable = "avx512f")]
    unsafe fn load_split(from: *const bf16) -> [Self; 2] {
        // SAFETY: passed on.
        let both = unsafe { _mm512_loadu_si512(from.cast()) };
        [even_elements(both), odd_elements(both)]
    }

    #[inline]
    #[target_feature(enable = "avx512f")]
    unsafe fn of_codes(levels: &[f32; 16], codes: &[u8; 16]) -> [Self; 2] {
        // SAFETY: both are of these lengths.
        let (levels, codes) = unsafe { (_mm512_loadu_ps(levels.as_ptr()), _mm_loadu_si128(codes.as_ptr().cast())) };
        let codes = _mm512_cvtepu8_epi32(codes);
        // Of each lane only the lowest four bits count.
        let first = _mm512_permutexvar_ps(_mm512_srli_epi32::<4>(codes), levels);
        let second = _mm512_permutexvar_ps(codes, levels);
        interleaved([first, second])
    }

    #[inline]
    #[target_feature(enable = "avx512f")]
    unsafe fn store(self, to: *mut f32) {
        // SAFETY: passed on.
        unsafe { _mm512_storeu_ps(to, self) };
    }

    #[inline]
    #[target_feature(enable = "avx512f")]
    unsafe fn store_first(self, to: *mut f32, len: usize) {
        // SAFETY: passed on.
        unsafe { _mm512_mask_storeu_ps(to, mask(len), self) };
    }

    #[inline]
    #[target_feature(enable = "avx512f")]
    unsafe fn add(self, other: Self) -> Self {
        _mm512_add_ps(self, other)
    }

    #[inline]
    #[target_feature(enable = "avx512f")]
    unsafe fn multiply(self, other: Self) -> Self {
        _mm512_mul_ps(self, other)
    }

    #[inline]
    #[target_feature(enable = "avx512f")]
    unsafe fn multiply_add(self, factor: Self, sum: Self) -> Self {
        _mm512_fmadd_ps(self, factor, sum)
    }

    #[inline]
    #[target_feature(enable = "avx512f")]
    unsafe fn non_zeros(self) -> u16 {
        _mm512_cmp_ps_mask::<_CMP_NEQ_UQ>(self, _mm512_setzero_ps())
    }

    #[inline]
    #[target_feature(enable = "avx512f")]
    unsafe fn transpose(block: &mut [Self; LANES]) {
        let mut a = [_mm512_setzero_ps(); 16];
        for i in 0..8 {
            a[2 * i] = _mm512_unpacklo_ps(block[2 * i], block[2 * i + 1]);
            a[2 * i + 1] = _mm512_unpackhi_ps(block[2 * i], block[2 * i + 1]);
        }
        let mut b = a;
        for i in 0..4 {
            for j in 0..2 {
                let (low, high) = (_mm512_castps_pd(a[4 * i + j]), _mm512_castps_pd(a[4 * i + j + 2]));
                b[4 * i + 2 * j] = _mm512_castpd_ps(_mm512_unpacklo_pd(low, high));
                b[4 * i + 2 * j + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(low, high));
            }
        }
        // b[4i + c] holds, for rows 4i..4i+4, column c of each group of four columns.
        for c in 0..4 {
            let low = _mm512_shuffle_f32x4::<0b10_00_10_00>(b[c], b[4 + c]);
            let high = _mm512_shuffle_f32x4::<0b11_01_11_01>(b[c], b[4 + c]);
            let low2 = _mm512_shuffle_f32x4::<0b10_00_10_00>(b[8 + c], b[12 + c]);
            let high2 = _mm512_shuffle_f32x4::<0b11_01_11_01>(b[8 + c], b[12 + c]);
            block[c] = _mm512_shuffle_f32x4::<0b10_00_10_00>(low, low2);
            block[8 + c] = _mm512_shuffle_f32x4::<0b11_01_11_01>(low, low2);
            block[4 + c] = _mm512_shuffle_f32x4::<0b10_00_10_00>(high, high2);
            block[12 + c] = _mm512_shuffle_f32x4::<0b11_01_11_01>(high, high2);
        }
    }
}
