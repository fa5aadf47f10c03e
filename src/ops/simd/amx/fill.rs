//! How elements come into tiles: lines of rows, of 32 elements; or lines of pairs from two rows, of 16 columns; and the
//! transposes of either, in units of a pair.

use super::{PANEL, TILES};
use crate::ops::matmul::Side;
use crate::ops::matrix::View;
use crate::ops::simd::wide::{LANES, Wide};
use half::bf16;
use std::arch::x86_64::*;

/// Lines of a tile.
type Lines = [__m512; LANES];

/// 32 elements of 32 rows to two tiles for each part; what is missing is zero.
///
/// # Safety
/// `x` is inside its data, `to` has the tiles of all parts; the processor has the instructions.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")]
pub unsafe fn cut(x: View<'_>, (row, col): (usize, usize), parts: usize, to: *mut f32) {
    let block = Block::of(x, row, col);
    for i in 0..PANEL {
        // SAFETY: passed on.
        let mut left = unsafe { block.row(i) };
        for part in 0..parts {
            let now = rounded(left);
            // SAFETY: a part has 32 lines.
            unsafe { _mm512_store_ps(to.add(part * TILES + i * LANES), now) };
            left = rest(left, now);
        }
    }
}

/// Up to 32 rows of up to 32 elements of a view.
#[derive(Clone, Copy)]
struct Block {
    at: *const f32,
    stride: usize,
    rows: usize,
    /// Which of the first and the last 16 elements there are.
    masks: [u16; 2],
}

impl Block {
    fn of(x: View<'_>, row: usize, col: usize) -> Self {
        let cols = (x.cols - col).min(PANEL);
        let mask = |cols: usize| ((1_u32 << cols.min(LANES)) - 1) as u16;
        Self {
            at: x.data[x.offset + row * x.stride + col..].as_ptr(),
            stride: x.stride,
            rows: (x.rows - row).min(PANEL),
            masks: [mask(cols), mask(cols.saturating_sub(LANES))],
        }
    }

    /// The elements of a row, zero where there is none.
    ///
    /// # Safety
    /// The view's elements are inside its data.
    #[inline]
    #[target_feature(enable = "avx512f")]
    unsafe fn row(&self, row: usize) -> [__m512; 2] {
        let at = self.at.wrapping_add(row * self.stride);
        let [low, high] = if row < self.rows { self.masks } else { [0; 2] };
        // SAFETY: what is not there is not read.
        unsafe { [_mm512_maskz_loadu_ps(low, at), _mm512_maskz_loadu_ps(high, at.wrapping_add(LANES))] }
    }
}

/// 32 elements as bf16, to nearest even.
#[inline]
#[target_feature(enable = "avx512f,avx512bf16")]
fn rounded([low, high]: [__m512; 2]) -> __m512 {
    // SAFETY: 32 bf16 are as long as 16 f32.
    unsafe { std::mem::transmute(_mm512_cvtne2ps_pbh(high, low)) }
}

/// What rounding took from 32 elements; nothing where what is rounded is no number.
#[inline]
#[target_feature(enable = "avx512f,avx512dq")]
fn rest(of: [__m512; 2], rounded: __m512) -> [__m512; 2] {
    let rounded = _mm512_castps_si512(rounded);
    let [low, high] = [_mm512_castsi512_si256(rounded), _mm512_extracti64x4_epi64::<1>(rounded)];
    let less = |x: __m512, y: __m256i| {
        let y = _mm512_castsi512_ps(_mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(y)));
        // NaN and infinity.
        _mm512_maskz_sub_ps(!_mm512_fpclass_ps_mask::<0b1001_1001>(y), x, y)
    };
    [less(of[0], low), less(of[1], high)]
}

/// Writes a tile, or its transpose.
///
/// # Safety
/// `to` has a tile; the processor has the instructions.
#[inline]
#[target_feature(enable = "avx512f")]
unsafe fn store(mut lines: Lines, transpose: bool, to: *mut f32) {
    // SAFETY: passed on.
    unsafe {
        if transpose {
            __m512::transpose(&mut lines);
        }
        for (i, line) in lines.iter().enumerate() {
            _mm512_store_ps(to.add(i * LANES), *line);
        }
    }
}

/// 32 elements of each of 32 rows.
///
/// # Safety
/// `x` is inside its data, `to` has two tiles; the processor has the instructions.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")]
unsafe fn rows(x: View<'_>, [row, col]: [usize; 2], scale: f32, transpose: bool, to: &mut [f32]) {
    let (scale, block) = (_mm512_set1_ps(scale), Block::of(x, row, col));
    for half in [0, LANES] {
        let mut lines = [_mm512_setzero_ps(); LANES];
        for (i, line) in lines.iter_mut().enumerate() {
            // SAFETY: passed on.
            let [low, high] = unsafe { block.row(half + i) };
            *line = rounded([_mm512_mul_ps(low, scale), _mm512_mul_ps(high, scale)]);
        }
        // SAFETY: passed on.
        unsafe { store(lines, transpose, to[half * LANES..].as_mut_ptr()) };
    }
}

/// 32 columns of each two of 32 rows.
///
/// # Safety
/// `x` is inside its data, `to` has two tiles; the processor has the instructions.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")]
unsafe fn pairs(x: View<'_>, [row, col]: [usize; 2], scale: f32, transpose: bool, to: &mut [f32]) {
    let (scale, block) = (_mm512_set1_ps(scale), Block::of(x, row, col));
    let mut lines = [[_mm512_setzero_ps(); LANES]; 2];
    for (half, lines) in lines.iter_mut().enumerate() {
        for (i, line) in lines.iter_mut().enumerate() {
            // SAFETY: passed on.
            let (even, odd) = unsafe { (block.row(2 * i), block.row(2 * i + 1)) };
            let both = rounded([_mm512_mul_ps(even[half], scale), _mm512_mul_ps(odd[half], scale)]);
            *line = _mm512_castsi512_ps(_mm512_permutexvar_epi16(alternately(), _mm512_castps_si512(both)));
        }
    }
    for (lines, to) in lines.into_iter().zip(to.chunks_exact_mut(TILES / 2)) {
        // SAFETY: passed on.
        unsafe { store(lines, transpose, to.as_mut_ptr()) };
    }
}

/// Of 32 the first, the 17th, the second, the 18th ...
#[inline]
#[target_feature(enable = "avx512f")]
fn alternately() -> __m512i {
    let low = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    _mm512_or_si512(low, _mm512_slli_epi32::<16>(_mm512_add_epi32(low, _mm512_set1_epi32(LANES as i32))))
}

/// 32 rows of a left side and 32 elements of the contraction, from `place` on, times `scale`.
///
/// # Safety
/// `to` has two tiles; the processor has the instructions.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")]
pub unsafe fn left(side: Side<'_>, place: [usize; 2], scale: f32, to: &mut [f32]) {
    // SAFETY: passed on.
    unsafe {
        match side {
            Side::N(x) => rows(x, place, scale, false, to),
            Side::T(x) => pairs(x, [place[1], place[0]], scale, true, to),
        }
    }
}

/// 32 elements of the contraction and 32 columns of a right side, from `place` on.
///
/// # Safety
/// `to` has two tiles; the processor has the instructions.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")]
pub unsafe fn right(side: Side<'_>, place: [usize; 2], to: &mut [f32]) {
    // SAFETY: passed on.
    unsafe {
        match side {
            Side::N(x) => pairs(x, place, 1.0, false, to),
            Side::T(x) => rows(x, [place[1], place[0]], 1.0, true, to),
        }
    }
}

/// Elements of 32 rows of a panel of a weight: where they lie, or with zeros for those that are missing, in `padded`.
fn panel<'a>(w: &'a [bf16], count: usize, at: usize, padded: &'a mut Vec<bf16>) -> *const bf16 {
    let elements = &w[at..at + count * PANEL];
    if count == PANEL {
        return elements.as_ptr();
    }
    padded.extend_from_slice(elements);
    padded.resize(PANEL * PANEL, bf16::ZERO);
    padded.as_ptr()
}

/// 32 columns and 32 rows of a weight of `rows` rows in panels, of which the `panel`th is meant, as the right side of `x Wᵀ`.
///
/// # Safety
/// `to` has two tiles; the processor has the instructions.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
pub unsafe fn transposed_panel(w: &[bf16], rows: usize, [panel_at, block]: [usize; 2], to: &mut [f32]) {
    let (at, mut padded) = ((panel_at * rows + block * PANEL) * PANEL, Vec::new());
    let from = panel(w, PANEL.min(rows - block * PANEL), at, &mut padded);
    for half in [0, LANES] {
        let mut lines = [_mm512_setzero_ps(); LANES];
        for (i, line) in lines.iter_mut().enumerate() {
            // SAFETY: `panel` has 32 rows; 32 bf16 are as long as 16 f32.
            *line = unsafe { _mm512_loadu_ps(from.add((half + i) * PANEL).cast()) };
        }
        // SAFETY: passed on.
        unsafe { store(lines, true, to[half * LANES..].as_mut_ptr()) };
    }
}

/// The same as the right side of `dy W`.
///
/// # Safety
/// `to` has two tiles; the processor has the instructions.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
pub unsafe fn interleaved_panel(w: &[bf16], rows: usize, [panel_at, block]: [usize; 2], to: &mut [f32]) {
    let (at, mut padded) = ((panel_at * rows + block * PANEL) * PANEL, Vec::new());
    let from = panel(w, PANEL.min(rows - block * PANEL), at, &mut padded);
    for (half, to) in to.chunks_exact_mut(TILES / 2).enumerate() {
        for (pair, to) in to.chunks_exact_mut(LANES).enumerate() {
            // SAFETY: `panel` has 32 rows; a line is 16 units.
            unsafe {
                let at = from.add(2 * pair * PANEL + half * LANES);
                let even = _mm512_cvtepu16_epi32(_mm256_loadu_si256(at.cast()));
                let odd = _mm512_cvtepu16_epi32(_mm256_loadu_si256(at.add(PANEL).cast()));
                let both = _mm512_or_si512(even, _mm512_slli_epi32::<16>(odd));
                _mm512_store_ps(to.as_mut_ptr(), _mm512_castsi512_ps(both));
            }
        }
    }
}
