//! Products with a frozen weight by AVX-512: tiles of 12 x 32 over panels that are rearranged on the fly.
//!
//! A panel is 32 output columns of the product, K-major: 32 rows of the weight for `x Wᵀ`, which are transposed, or 32
//! columns for `dy W`, which are copied. It fits the second-level cache and serves all rows of the batch, so that
//! rearranging costs a few percent of the product, whatever dtype the weight is kept in, and needs no second copy of it.
//! f32 panels go through FMA; bf16 weights through `vdpbf16ps` (pairs of products, f32 sums) where the processor has it.
//!
//! Chosen at run time; elsewhere `weight` uses the `gemm` crate.
#![allow(unsafe_code)] // SIMD intrinsics, and disjoint columns of one matrix written by several threads

use super::matmul::ViewMut;
use super::matrix::{Matrix, View};
use half::{bf16, f16};
use rayon::prelude::*;
use std::arch::x86_64::*;
use std::cell::RefCell;
use std::ops::Range;

/// Columns of a panel: two registers of 16 floats.
const NR: usize = 32;
/// Rows of a tile: with 24 of 32 registers as sums, the loads of a step hide behind its products.
const MR: usize = 12;
/// Depth of a panel in f32: 72 KB.
const KC: usize = 576;

/// Elements of a weight in the checkpoint's order.
#[derive(Debug, Clone, Copy)]
pub enum Rows<'a> {
    /// 32 bit.
    F32(&'a [f32]),
    /// bfloat16.
    Bf16(&'a [bf16]),
    /// IEEE half.
    F16(&'a [f16]),
}

/// Which instructions this processor has for these products.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Level {
    /// AVX-512 F, BW, VL, DQ.
    Avx512,
    /// And `vdpbf16ps`.
    Avx512Bf16,
}

/// The level of this processor, `None` without AVX-512.
#[must_use]
pub fn level() -> Option<Level> {
    let base = is_x86_feature_detected!("avx512f")
        && is_x86_feature_detected!("avx512bw")
        && is_x86_feature_detected!("avx512vl")
        && is_x86_feature_detected!("avx512dq")
        && is_x86_feature_detected!("f16c");
    match (base, is_x86_feature_detected!("avx512bf16")) {
        (true, true) => Some(Level::Avx512Bf16),
        (true, false) => Some(Level::Avx512),
        (false, _) => None,
    }
}

thread_local! {
    static PANEL: RefCell<Vec<f32>> = const { RefCell::new(Vec::new()) };
}

#[derive(Clone, Copy)]
struct Shared(*mut f32);
// SAFETY: threads write disjoint columns, see `product`.
unsafe impl Send for Shared {}
// SAFETY: as above.
unsafe impl Sync for Shared {}

impl Shared {
    fn at(self, offset: usize) -> *mut f32 {
        self.0.wrapping_add(offset)
    }
}

/// Which of the two products.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Product {
    /// `x Wᵀ`: contracts over the weight's columns.
    Forward,
    /// `dy W`: contracts over the weight's rows.
    Backward,
}

/// `y = x Wᵀ` or `y = x W`, added to `y` where `accumulate`; `w` is (rows, cols).
///
/// # Panics
/// When the shapes do not fit together.
pub fn product(
    level: Level,
    which: Product,
    x: View<'_>,
    w: Rows<'_>,
    shape: (usize, usize),
    y: ViewMut<'_>,
    accumulate: bool,
) {
    let (rows, cols) = shape;
    let (k, n) = if which == Product::Forward { (cols, rows) } else { (rows, cols) };
    let len = match w {
        Rows::F32(w) => w.len(),
        Rows::Bf16(w) => w.len(),
        Rows::F16(w) => w.len(),
    };
    assert!(len == rows * cols && x.cols == k && y.cols == n && y.rows == x.rows, "product: shapes do not fit");
    assert!(x.rows == 0 || x.offset + (x.rows - 1) * x.stride + x.cols <= x.data.len(), "product: x leaves its data");
    if x.rows == 0 || n == 0 {
        return;
    }
    let y_at = checked(&y);
    let pairs = level == Level::Avx512Bf16 && matches!(w, Rows::Bf16(_));
    // In 32-bit units: a unit is one element, or a pair of bf16.
    let units = k.div_ceil(if pairs { 2 } else { 1 });
    let depth = units.div_ceil(units.div_ceil(KC));
    // x is rounded to bf16, or laid out chunk by chunk, once: rows far apart would miss the caches and page tables.
    let packed = (pairs || depth < units).then(|| pack_rows(x, pairs, units, depth));
    let (x_data, ldx) = match &packed {
        Some(packed) => (packed.as_ptr(), depth),
        None => (x.data[x.offset..].as_ptr(), x.stride),
    };
    let job = Job { which, w, cols, k, n, t: x.rows, ldx, ldy: y.stride, units, depth, pairs, accumulate };
    let (x_data, y) = (Shared(x_data.cast_mut()), Shared(y.data.as_mut_ptr()));
    let panels = n.div_ceil(NR);
    let share = panels.div_ceil(8 * rayon::current_num_threads()).max(1);
    (0..panels.div_ceil(share)).into_par_iter().with_max_len(1).for_each(|i| {
        let mine = i * share..((i + 1) * share).min(panels);
        // SAFETY: `level` found the instructions; the asserts above bound every read of x and w and every write of y;
        // each panel's columns are written by the one task that has it.
        unsafe { job.run(x_data.at(0), y.at(y_at), mine) };
    });
}

/// Index of the first element of `y`, which is not empty and lies inside its data.
fn checked(y: &ViewMut<'_>) -> usize {
    let end = y.offset + (y.rows - 1) * y.stride + y.cols;
    assert!(y.cols <= y.stride && end <= y.data.len(), "product: y leaves its data");
    y.offset
}

struct Job<'a> {
    which: Product,
    w: Rows<'a>,
    cols: usize,
    k: usize,
    n: usize,
    t: usize,
    /// Units from one row of x to the next within a chunk; chunks follow one another.
    ldx: usize,
    /// Elements from one row of y to the next.
    ldy: usize,
    units: usize,
    depth: usize,
    pairs: bool,
    accumulate: bool,
}

impl Job<'_> {
    /// # Safety
    /// See `product`.
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,f16c,fma")]
    unsafe fn run(&self, x: *const f32, y: *mut f32, panels: Range<usize>) {
        let per_unit = if self.pairs { 2 } else { 1 };
        let (units, depth) = (self.units, self.depth);
        PANEL.with_borrow_mut(|panel| {
            panel.resize(KC * NR, 0.0);
            for p in panels {
                let columns = p * NR..((p + 1) * NR).min(self.n);
                for chunk in 0..units.div_ceil(depth) {
                    let from = chunk * depth;
                    let to = (from + depth).min(units);
                    let k = from * per_unit..(to * per_unit).min(self.k);
                    // SAFETY: the panel has room for KC units of 32; k and columns lie inside the weight.
                    unsafe { self.fill(panel.as_mut_ptr(), k, columns.clone()) };
                    let tile = Tile {
                        depth: to - from,
                        ldx: self.ldx,
                        ldy: self.ldy,
                        mask: mask(columns.len()),
                        accumulate: self.accumulate || chunk > 0,
                    };
                    // SAFETY: a chunk of x has t rows of ldx units; y has t rows of n columns.
                    unsafe { self.tiles(&tile, x.add(chunk * self.t * depth), panel.as_ptr(), y.add(columns.start)) };
                }
            }
        });
    }

    /// All rows of one panel.
    ///
    /// # Safety
    /// `x`, `panel` and `y` have what `tile` and `t` say.
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,f16c,fma")]
    unsafe fn tiles(&self, tile: &Tile, x: *const f32, panel: *const f32, y: *mut f32) {
        let mut row = 0;
        while row < self.t {
            // SAFETY: row < t, and the tile's height does not pass t.
            unsafe {
                let (x, y) = (x.add(row * self.ldx), y.add(row * self.ldy));
                row += match (self.pairs, self.t - row) {
                    (false, MR..) => tile.f32::<MR>(x, panel, y),
                    (false, 8..) => tile.f32::<8>(x, panel, y),
                    (false, 4..) => tile.f32::<4>(x, panel, y),
                    (false, 2..) => tile.f32::<2>(x, panel, y),
                    (false, _) => tile.f32::<1>(x, panel, y),
                    (true, MR..) => tile.bf16::<MR>(x, panel, y),
                    (true, 8..) => tile.bf16::<8>(x, panel, y),
                    (true, 4..) => tile.bf16::<4>(x, panel, y),
                    (true, 2..) => tile.bf16::<2>(x, panel, y),
                    (true, _) => tile.bf16::<1>(x, panel, y),
                };
            }
        }
    }

    /// Rearranges `k` of the contraction for the output columns `columns` into the panel; missing columns are zero.
    ///
    /// # Safety
    /// The panel has room; `k` and `columns` lie inside the weight.
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,f16c,fma")]
    unsafe fn fill(&self, panel: *mut f32, k: Range<usize>, columns: Range<usize>) {
        for half in 0..2 {
            let from = (columns.start + 16 * half).min(columns.end);
            let columns = from..(from + 16).min(columns.end);
            // SAFETY: passed on.
            unsafe {
                match self.which {
                    Product::Forward => self.fill_transposed(panel.add(16 * half), k.clone(), columns),
                    Product::Backward => self.fill_copied(panel.add(16 * half), k.clone(), columns),
                }
            }
        }
    }

    /// 16 columns of a forward panel: rows `columns` of the weight, transposed 16 units at a time.
    ///
    /// # Safety
    /// As `fill`.
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,f16c,fma")]
    unsafe fn fill_transposed(&self, panel: *mut f32, k: Range<usize>, columns: Range<usize>) {
        let per_unit = if self.pairs { 2 } else { 1 };
        let step = 16 * per_unit;
        let mut at = k.start;
        while at < k.end {
            let len = (k.end - at).min(step);
            let mut block = [_mm512_setzero_ps(); 16];
            for (lane, row) in columns.clone().enumerate() {
                // SAFETY: row and at..at + len lie inside the weight.
                block[lane] = unsafe { self.load(row * self.cols + at, len) };
            }
            transpose(&mut block);
            let units = len.div_ceil(per_unit);
            let unit = (at - k.start) / per_unit;
            for (i, column) in block.iter().enumerate().take(units) {
                // SAFETY: unit + i is below the panel's depth.
                unsafe { _mm512_storeu_ps(panel.add((unit + i) * NR), *column) };
            }
            at += len;
        }
    }

    /// 16 columns of a backward panel: the same columns of rows `k`.
    ///
    /// # Safety
    /// As `fill`.
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,f16c,fma")]
    unsafe fn fill_copied(&self, panel: *mut f32, k: Range<usize>, columns: Range<usize>) {
        let len = columns.len();
        if !self.pairs {
            for (i, row) in k.enumerate() {
                // SAFETY: row and columns lie inside the weight.
                unsafe { _mm512_storeu_ps(panel.add(i * NR), self.load(row * self.cols + columns.start, len)) };
            }
            return;
        }
        let Rows::Bf16(w) = self.w else { unreachable!("pairs are bf16") };
        for (i, row) in k.clone().step_by(2).enumerate() {
            // SAFETY: row, row + 1 where it exists, and columns lie inside the weight; bf16 is a u16.
            unsafe {
                let first = load_u16(w.as_ptr().add(row * self.cols + columns.start).cast(), len);
                let second = if row + 1 < k.end {
                    load_u16(w.as_ptr().add((row + 1) * self.cols + columns.start).cast(), len)
                } else {
                    _mm256_setzero_si256()
                };
                let low = _mm512_cvtepu16_epi32(first);
                let high = _mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(second));
                _mm512_storeu_si512(panel.add(i * NR).cast(), _mm512_or_si512(low, high));
            }
        }
    }

    /// Up to 16 units of the weight from element `at`: f32 values, or pairs of bf16 as they are.
    ///
    /// # Safety
    /// Elements `at .. at + len` are inside the weight.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,f16c,fma")]
    unsafe fn load(&self, at: usize, len: usize) -> __m512 {
        // SAFETY: masked loads read only the `len` elements.
        unsafe {
            match self.w {
                Rows::F32(w) => _mm512_maskz_loadu_ps(mask16(len), w.as_ptr().add(at)),
                Rows::Bf16(w) if self.pairs => {
                    _mm512_castsi512_ps(_mm512_maskz_loadu_epi16(mask32(len), w.as_ptr().add(at).cast()))
                }
                Rows::Bf16(w) => {
                    let wide = _mm512_cvtepu16_epi32(load_u16(w.as_ptr().add(at).cast(), len));
                    _mm512_castsi512_ps(_mm512_slli_epi32::<16>(wide))
                }
                Rows::F16(w) => _mm512_cvtph_ps(load_u16(w.as_ptr().add(at).cast(), len)),
            }
        }
    }
}

/// The first `len` of 16 lanes.
fn mask16(len: usize) -> u16 {
    if len >= 16 { u16::MAX } else { (1 << len) - 1 }
}

/// The first `len` of 32 lanes.
fn mask32(len: usize) -> u32 {
    if len >= 32 { u32::MAX } else { (1 << len) - 1 }
}

/// The first `len` of 32 lanes, as two halves.
fn mask(len: usize) -> [u16; 2] {
    [mask16(len.min(16)), mask16(len.saturating_sub(16))]
}

/// # Safety
/// `len` elements can be read.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
unsafe fn load_u16(from: *const u16, len: usize) -> __m256i {
    // SAFETY: a masked load reads only the `len` elements.
    unsafe { _mm256_maskz_loadu_epi16(mask16(len), from.cast()) }
}

/// Transposes 16 x 16 units.
#[inline]
#[target_feature(enable = "avx512f")]
fn transpose(block: &mut [__m512; 16]) {
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

/// One tile of the product.
struct Tile {
    /// Units of the contraction.
    depth: usize,
    /// Units from one row of x to the next.
    ldx: usize,
    /// Elements from one row of y to the next.
    ldy: usize,
    /// Columns that exist.
    mask: [u16; 2],
    accumulate: bool,
}

impl Tile {
    /// `R` rows by 32 columns, by FMA; returns R.
    ///
    /// # Safety
    /// `R` rows of x and y, and a panel of `depth` units.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,fma")]
    unsafe fn f32<const R: usize>(&self, x: *const f32, panel: *const f32, y: *mut f32) -> usize {
        let mut sums = [[_mm512_setzero_ps(); 2]; R];
        for k in 0..self.depth {
            // SAFETY: k is inside the depth of the panel and of the rows of x.
            unsafe {
                let (b0, b1) = (_mm512_loadu_ps(panel.add(k * NR)), _mm512_loadu_ps(panel.add(k * NR + 16)));
                for (row, sum) in sums.iter_mut().enumerate() {
                    let a = _mm512_set1_ps(*x.add(row * self.ldx + k));
                    sum[0] = _mm512_fmadd_ps(a, b0, sum[0]);
                    sum[1] = _mm512_fmadd_ps(a, b1, sum[1]);
                }
            }
        }
        // SAFETY: passed on.
        unsafe { self.store(&sums, y) };
        R
    }

    /// `R` rows by 32 columns, by pairs of bf16; returns R.
    ///
    /// # Safety
    /// As `f32`, and the processor has avx512bf16.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,fma")]
    unsafe fn bf16<const R: usize>(&self, x: *const f32, panel: *const f32, y: *mut f32) -> usize {
        let mut sums = [[_mm512_setzero_ps(); 2]; R];
        for k in 0..self.depth {
            // SAFETY: k is inside the depth of the panel and of the rows of x; a pair of bf16 is 32 bits.
            unsafe {
                let b0: __m512bh = std::mem::transmute(_mm512_loadu_ps(panel.add(k * NR)));
                let b1: __m512bh = std::mem::transmute(_mm512_loadu_ps(panel.add(k * NR + 16)));
                for (row, sum) in sums.iter_mut().enumerate() {
                    let a: __m512bh =
                        std::mem::transmute(_mm512_set1_epi32(x.add(row * self.ldx + k).cast::<i32>().read()));
                    sum[0] = _mm512_dpbf16_ps(sum[0], a, b0);
                    sum[1] = _mm512_dpbf16_ps(sum[1], a, b1);
                }
            }
        }
        // SAFETY: passed on.
        unsafe { self.store(&sums, y) };
        R
    }

    /// # Safety
    /// `R` rows of y with the masked columns.
    #[inline]
    #[target_feature(enable = "avx512f,avx512vl")]
    unsafe fn store<const R: usize>(&self, sums: &[[__m512; 2]; R], y: *mut f32) {
        for (row, sum) in sums.iter().enumerate() {
            for (half, sum) in sum.iter().enumerate() {
                // SAFETY: only the columns of the mask are read and written.
                unsafe {
                    let at = y.add(row * self.ldy + 16 * half);
                    let mut sum = *sum;
                    if self.accumulate {
                        sum = _mm512_add_ps(sum, _mm512_maskz_loadu_ps(self.mask[half], at));
                    }
                    _mm512_mask_storeu_ps(at, self.mask[half], sum);
                }
            }
        }
    }
}

/// Rows of `x` in chunks of `depth` units: first that of all rows, then the next; rounded to bf16 where `pairs`, an odd
/// end filled with zero.
fn pack_rows(x: View<'_>, pairs: bool, units: usize, depth: usize) -> Matrix {
    let per_unit = if pairs { 2 } else { 1 };
    let mut out = Matrix::new(units.div_ceil(depth) * x.rows, depth);
    out.par_chunks_mut(depth).enumerate().with_min_len(16).for_each(|(i, out)| {
        let (chunk, row) = (i / x.rows, i % x.rows);
        let from = chunk * depth * per_unit;
        let x = &x.row(row)[from..(from + depth * per_unit).min(x.cols)];
        if pairs {
            // SAFETY: only called with pairs where the processor has avx512bf16.
            unsafe { round_row(x, &mut out[..x.len().div_ceil(2)]) };
        } else {
            out[..x.len()].copy_from_slice(x);
        }
    });
    out
}

/// # Safety
/// The processor has avx512bf16.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
unsafe fn round_row(x: &[f32], out: &mut [f32]) {
    for (x, out) in x.chunks(32).zip(out.chunks_mut(16)) {
        // SAFETY: masked loads and stores stay inside the chunks; 32 bf16 fill the 16 units.
        unsafe {
            let low = _mm512_maskz_loadu_ps(mask16(x.len()), x.as_ptr());
            let high = if x.len() > 16 {
                _mm512_maskz_loadu_ps(mask16(x.len() - 16), x.as_ptr().add(16))
            } else {
                _mm512_setzero_ps()
            };
            let pairs: __m512i = std::mem::transmute(_mm512_cvtne2ps_pbh(high, low));
            _mm512_mask_storeu_epi32(out.as_mut_ptr().cast(), mask16(out.len()), pairs);
        }
    }
}

/// Elements of a weight that one step of `dots` takes: two registers of 16 floats.
const STEP: usize = 32;

/// What a weight is made of, as [`few_rows`] reads it.
trait Element: Copy + Sync {
    /// Whether the two halves of a step are the even and the odd elements, not the first and the last.
    const SPLIT: bool;

    /// The two halves of a step of `len` elements, zero where there are none.
    ///
    /// # Safety
    /// `len` elements can be read, and the processor has the instructions of `level`.
    unsafe fn step(from: *const Self, len: usize) -> [__m512; 2];
}

impl Element for f32 {
    const SPLIT: bool = false;

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,f16c,fma")]
    unsafe fn step(from: *const Self, len: usize) -> [__m512; 2] {
        let [low, high] = mask(len);
        // SAFETY: masked loads read only the `len` elements.
        unsafe { [_mm512_maskz_loadu_ps(low, from), _mm512_maskz_loadu_ps(high, from.wrapping_add(16))] }
    }
}

impl Element for bf16 {
    const SPLIT: bool = true;

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,f16c,fma")]
    unsafe fn step(from: *const Self, len: usize) -> [__m512; 2] {
        // SAFETY: a masked load reads only the `len` elements.
        let both = unsafe { _mm512_maskz_loadu_epi16(mask32(len), from.cast()) };
        let odd = _mm512_and_si512(both, _mm512_set1_epi32(0xffff_0000_u32.cast_signed()));
        [_mm512_castsi512_ps(_mm512_slli_epi32::<16>(both)), _mm512_castsi512_ps(odd)]
    }
}

impl Element for f16 {
    const SPLIT: bool = false;

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,f16c,fma")]
    unsafe fn step(from: *const Self, len: usize) -> [__m512; 2] {
        let from: *const u16 = from.cast();
        // SAFETY: masked loads read only the `len` elements.
        unsafe {
            let (low, high) = (load_u16(from, len.min(16)), load_u16(from.wrapping_add(16), len.saturating_sub(16)));
            [_mm512_cvtph_ps(low), _mm512_cvtph_ps(high)]
        }
    }
}

/// `y = x Wᵀ` for a few rows of x, as in decoding: each row of the weight is read once, in its own order.
///
/// # Panics
/// When the shapes do not fit together.
pub fn few_rows(x: View<'_>, w: Rows<'_>, shape: (usize, usize), y: ViewMut<'_>, accumulate: bool) {
    match w {
        Rows::F32(w) => few_rows_of(x, w, shape, y, accumulate),
        Rows::Bf16(w) => few_rows_of(x, w, shape, y, accumulate),
        Rows::F16(w) => few_rows_of(x, w, shape, y, accumulate),
    }
}

fn few_rows_of<E: Element>(x: View<'_>, w: &[E], shape: (usize, usize), y: ViewMut<'_>, accumulate: bool) {
    let (rows, cols) = shape;
    let fit = w.len() == rows * cols && x.cols == cols && y.cols == rows && y.rows == x.rows;
    assert!(fit, "product: shapes do not fit");
    if x.rows == 0 || w.is_empty() {
        return;
    }
    let (y_at, stride) = (checked(&y), y.stride);
    let steps = in_steps::<E>(x);
    let share = rows.div_ceil(2 * rayon::current_num_threads()).max(16);
    let out = Shared(y.data.as_mut_ptr());
    w.par_chunks(share * cols).enumerate().with_max_len(1).for_each(|(i, w)| {
        // Two rows far apart are two streams, which memory serves half again as fast as one.
        let (half, first) = ((w.len() / cols).div_ceil(2), i * share);
        let row = |at: usize| &w[at * cols..(at + 1) * cols];
        for at in 0..half {
            // Of an odd number of rows, the last of the first half has none beside it and is taken for both.
            let other = if half + at < w.len() / cols { half + at } else { at };
            for (t, x) in steps.chunks_exact(steps.cols()).enumerate() {
                // SAFETY: `level` found the instructions before this is called.
                let sums = unsafe { dots(x, [row(at), row(other)]) };
                for (row, sum) in [at, other].into_iter().zip(sums).take(1 + usize::from(other != at)) {
                    // SAFETY: the elements of a row of the weight are written by the one task that has it, once.
                    unsafe {
                        let to = out.at(y_at + t * stride + first + row);
                        *to = if accumulate { *to + sum } else { sum };
                    }
                }
            }
        }
    });
}

/// `x` in steps of 32, the last filled with zeros, each as [`Element::step`] gives its halves.
fn in_steps<E: Element>(x: View<'_>) -> Matrix {
    let mut out = Matrix::zeros(x.rows, x.cols.next_multiple_of(STEP));
    let cols = out.cols();
    for (t, out) in out.chunks_exact_mut(cols).enumerate() {
        for (x, out) in x.row(t).chunks(STEP).zip(out.chunks_exact_mut(STEP)) {
            if E::SPLIT {
                x.iter().enumerate().for_each(|(i, v)| out[i / 2 + 16 * (i % 2)] = *v);
            } else {
                out[..x.len()].copy_from_slice(x);
            }
        }
    }
    out
}

/// Products of `x`, in steps, with two rows of one length.
///
/// # Safety
/// The processor has the instructions of `level`.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,f16c,fma")]
unsafe fn dots<E: Element>(x: &[f32], w: [&[E]; 2]) -> [f32; 2] {
    let cols = w[0].len();
    assert!(w[1].len() == cols && x.len() >= cols.next_multiple_of(STEP), "product: shapes do not fit");
    let mut sums = [[_mm512_setzero_ps(); 2]; 2];
    let mut add = |at: usize, len: usize| {
        // SAFETY: x has whole steps, and at + len is inside both rows.
        unsafe {
            let (x0, x1) = (_mm512_loadu_ps(x.as_ptr().add(at)), _mm512_loadu_ps(x.as_ptr().add(at + 16)));
            for (w, sum) in w.iter().zip(&mut sums) {
                let [w0, w1] = E::step(w.as_ptr().add(at), len);
                sum[0] = _mm512_fmadd_ps(x0, w0, sum[0]);
                sum[1] = _mm512_fmadd_ps(x1, w1, sum[1]);
            }
        }
    };
    let whole = cols / STEP * STEP;
    for at in (0..whole).step_by(STEP) {
        add(at, STEP);
    }
    if whole < cols {
        add(whole, cols - whole);
    }
    sums.map(|[a, b]| _mm512_reduce_add_ps(_mm512_add_ps(a, b)))
}
