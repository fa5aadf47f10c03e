//! How tiles read what they multiply: as it lies, or made of a bf16 weight in registers.

use super::{Compiled, Halves, LANES, Pairs, Unit, Wide, even_elements, interleaved, odd_elements, odd_mask};
use crate::ops::simd::{Level, PANEL};
use half::bf16;
use std::arch::{asm, x86_64::*};

/// How the tiles of a product read its two sides; where nothing else is said, as units that lie there.
pub trait Reading: Compiled {
    /// What is multiplied.
    type Unit: Unit + Reading<Unit = Self::Unit>;
    /// Bytes of a broadcast unit.
    const BYTES: usize = size_of::<f32>();
    /// Bytes from the vectors of a step to those of the next.
    const STEP: usize = PANEL * size_of::<f32>();
    /// Whether the two vectors of a step are its even and its odd columns.
    const SPLIT: bool = false;

    /// What `broadcast` takes besides, made once for a tile.
    #[inline(always)]
    unsafe fn constant() -> WideOf<Self> {
        // SAFETY: passed on.
        unsafe { Wide::zero() }
    }

    /// All units: the one at an address.
    #[inline(always)]
    unsafe fn broadcast(at: *const i8, _constant: WideOf<Self>) -> WideOf<Self> {
        // SAFETY: passed on.
        unsafe { Wide::set(*at.cast()) }
    }

    /// The first `V` vectors of a step.
    #[inline(always)]
    unsafe fn vectors<const V: usize>(at: *const i8) -> [WideOf<Self>; V] {
        // SAFETY: passed on.
        std::array::from_fn(|v| unsafe { Wide::load(at.cast::<f32>().wrapping_add(v * LANES)) })
    }

    /// Sums of even and of odd columns in the columns' order, where these are [`SPLIT`](Self::SPLIT).
    #[inline(always)]
    unsafe fn in_order(sums: [WideOf<Self>; 2]) -> [WideOf<Self>; 2] {
        sums
    }
}

/// The vectors of a reading.
pub type WideOf<R> = <<R as Reading>::Unit as Unit>::Wide;

impl Reading for __m512 {
    type Unit = Self;
}

impl Reading for Halves {
    type Unit = Self;
}

impl Reading for Pairs {
    type Unit = Self;
}

/// f32 units of which the broadcast ones are bf16.
pub struct WidenedRows;

impl Compiled for WidenedRows {
    const LEVEL: Level = Level::Avx512;
}

impl Reading for WidenedRows {
    type Unit = __m512;
    const BYTES: usize = size_of::<bf16>();

    /// The upper half of 32 bits, which the compiler must not know: it would mask each element before it is broadcast, where
    /// one instruction can do both.
    #[inline]
    #[target_feature(enable = "avx512f")]
    unsafe fn constant() -> __m512 {
        let mut upper = odd_mask();
        // SAFETY: nothing is done.
        unsafe { asm!("/* {} */", inout(zmm_reg) upper, options(pure, nomem, nostack, preserves_flags)) };
        _mm512_castsi512_ps(upper)
    }

    /// The two bytes before the element are read, too.
    #[inline]
    #[target_feature(enable = "avx512f")]
    unsafe fn broadcast(at: *const i8, constant: __m512) -> __m512 {
        // SAFETY: passed on.
        let pair = unsafe { at.wrapping_sub(size_of::<bf16>()).cast::<i32>().read_unaligned() };
        _mm512_castsi512_ps(_mm512_and_si512(_mm512_set1_epi32(pair), _mm512_castps_si512(constant)))
    }
}

/// f32 units of which the vectors are rows of 32 bf16.
pub struct WidenedVectors;

impl Compiled for WidenedVectors {
    const LEVEL: Level = Level::Avx512;
}

impl Reading for WidenedVectors {
    type Unit = __m512;
    const STEP: usize = PANEL * size_of::<bf16>();
    const SPLIT: bool = true;

    #[inline]
    #[target_feature(enable = "avx512f")]
    unsafe fn vectors<const V: usize>(at: *const i8) -> [__m512; V] {
        // SAFETY: passed on.
        let row = unsafe { _mm512_loadu_si512(at.cast()) };
        first([even_elements(row), odd_elements(row)])
    }

    #[inline]
    #[target_feature(enable = "avx512f")]
    unsafe fn in_order(sums: [__m512; 2]) -> [__m512; 2] {
        interleaved(sums)
    }
}

/// Pairs of which the vectors are made of two rows of 32 bf16.
pub struct PairedVectors;

impl Compiled for PairedVectors {
    const LEVEL: Level = Level::Avx512Bf16;
}

impl Reading for PairedVectors {
    type Unit = Pairs;
    const STEP: usize = 2 * WidenedVectors::STEP;
    const SPLIT: bool = true;

    #[inline]
    #[target_feature(enable = "avx512f")]
    unsafe fn vectors<const V: usize>(at: *const i8) -> [__m512; V] {
        let rows = [at, at.wrapping_add(WidenedVectors::STEP)];
        // SAFETY: passed on.
        let [first_row, second] = rows.map(|row| unsafe { _mm512_loadu_si512(row.cast()) });
        let upper = odd_mask();
        // Bits of the second argument where the first has ones, else of the third.
        let even = _mm512_ternarylogic_epi32::<0xca>(upper, _mm512_slli_epi32::<16>(second), first_row);
        let odd = _mm512_ternarylogic_epi32::<0xca>(upper, second, _mm512_srli_epi32::<16>(first_row));
        first([_mm512_castsi512_ps(even), _mm512_castsi512_ps(odd)])
    }

    #[inline]
    #[target_feature(enable = "avx512f")]
    unsafe fn in_order(sums: [__m512; 2]) -> [__m512; 2] {
        interleaved(sums)
    }
}

/// The first of two vectors, or both.
#[inline(always)]
fn first<const V: usize>(both: [__m512; 2]) -> [__m512; V] {
    let mut out = [both[0]; V];
    out.iter_mut().zip(both).for_each(|(out, vector)| *out = vector);
    out
}
