//! The inner loop of the products: a tile of sums, its ways into the result, and the rounding of activations to bf16.

use super::{PANEL, load_f32, mask16};
use std::arch::x86_64::*;

/// Rows of a tile: with 24 of 32 registers as sums, the loads of a step hide behind its products.
pub const MR: usize = 12;
/// Floats in a register, and width of a block of vectors.
pub const LANES: usize = 16;

/// `R` rows of sums, each of `V` registers.
pub type Sums<const R: usize, const V: usize> = [[__m512; V]; R];

/// Broadcast rows of a tile, in panels: the rows' units of one after another, then those of the next.
#[derive(Clone, Copy)]
pub struct Rows {
    /// Units of the first row.
    pub at: *const f32,
    /// Units of a row that lie side by side: 32 where they are elements.
    pub run: usize,
    /// Units from one panel to the next.
    pub next: usize,
}

impl Rows {
    /// The same from another row and unit on, which begins a panel.
    pub fn from(self, row: usize, unit: usize) -> Self {
        Self { at: self.at.wrapping_add(row * self.run + unit / self.run * self.next), ..self }
    }
}

/// Calls a function with the height of a tile as its const argument.
macro_rules! of_height {
    ($height:expr, $($path:ident).+ ($($arg:expr),*)) => {
        match $height {
            1 => $($path).+::<1>($($arg),*),
            2 => $($path).+::<2>($($arg),*),
            3 => $($path).+::<3>($($arg),*),
            4 => $($path).+::<4>($($arg),*),
            5 => $($path).+::<5>($($arg),*),
            6 => $($path).+::<6>($($arg),*),
            7 => $($path).+::<7>($($arg),*),
            8 => $($path).+::<8>($($arg),*),
            9 => $($path).+::<9>($($arg),*),
            10 => $($path).+::<10>($($arg),*),
            11 => $($path).+::<11>($($arg),*),
            _ => $($path).+::<12>($($arg),*),
        }
    };
}
pub(super) use of_height;

/// Memory that a tile asks for while it computes, as the processor's own prefetcher does not follow panels.
#[derive(Clone, Copy)]
pub struct Ahead {
    /// What is asked for with the first run.
    pub at: *const i8,
    /// Bytes from there to what is asked for with the next.
    pub next: usize,
    /// Lines of 64 bytes with each.
    pub lines: usize,
}

impl Ahead {
    #[inline]
    #[target_feature(enable = "avx512f")]
    fn ask(&self, run: usize) {
        let at = self.at.wrapping_add(run * self.next);
        for line in 0..self.lines {
            _mm_prefetch::<_MM_HINT_T1>(at.wrapping_add(line * LINE));
        }
    }
}

/// Bytes that memory gives at a time.
pub const LINE: usize = 64;

/// Where a tile's factors are.
#[derive(Clone, Copy)]
pub struct Factors {
    /// The broadcast rows.
    pub a: Rows,
    /// Vectors: 32 units for each step of the contraction.
    pub b: *const f32,
    /// Steps of the contraction.
    pub depth: usize,
    /// Units are pairs of bf16.
    pub pairs: bool,
    /// What will be needed next.
    pub ahead: Ahead,
}

impl Factors {
    /// `sums[r][v] = Σ_k a[r][k] b[k][v]`.
    ///
    /// # Safety
    /// `R` rows and the vectors of `depth` units can be read; the processor has AVX-512, and avx512bf16 for pairs.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,fma")]
    pub unsafe fn sums<const R: usize, const V: usize>(&self) -> Sums<R, V> {
        // SAFETY: passed on.
        unsafe { if self.pairs { self.pairs() } else { self.f32() } }
    }

    /// # Safety
    /// As for `sums`.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,fma")]
    unsafe fn f32<const R: usize, const V: usize>(&self) -> Sums<R, V> {
        let mut sums = [[_mm512_setzero_ps(); V]; R];
        let (mut b, mut left) = (self.b, self.depth);
        for run in 0..self.depth.div_ceil(PANEL) {
            self.ahead.ask(run);
            let a = self.a.at.wrapping_add(run * self.a.next);
            let len = left.min(PANEL);
            for k in 0..len {
                // SAFETY: k is inside the depth of the rows and vectors.
                unsafe {
                    let vectors: [_; V] = std::array::from_fn(|v| _mm512_loadu_ps(b.add(v * LANES)));
                    for (row, sums) in sums.iter_mut().enumerate() {
                        let a = _mm512_set1_ps(*a.add(row * PANEL + k));
                        for v in 0..V {
                            sums[v] = _mm512_fmadd_ps(a, vectors[v], sums[v]);
                        }
                    }
                }
                b = b.wrapping_add(PANEL);
            }
            left -= len;
        }
        sums
    }

    /// # Safety
    /// As for `sums`.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,fma")]
    unsafe fn pairs<const R: usize, const V: usize>(&self) -> Sums<R, V> {
        let mut sums = [[_mm512_setzero_ps(); V]; R];
        let (mut b, mut left) = (self.b, self.depth);
        for run in 0..self.depth.div_ceil(self.a.run) {
            self.ahead.ask(run);
            let a = self.a.at.wrapping_add(run * self.a.next);
            let len = left.min(self.a.run);
            for k in 0..len {
                // SAFETY: k is inside the depth of the rows and vectors.
                unsafe {
                    let vectors: [__m512bh; V] =
                        std::array::from_fn(|v| std::mem::transmute(_mm512_loadu_ps(b.add(v * LANES))));
                    for (row, sums) in sums.iter_mut().enumerate() {
                        let pair = a.add(row * self.a.run + k).cast::<i32>().read_unaligned();
                        let a: __m512bh = std::mem::transmute(_mm512_set1_epi32(pair));
                        for v in 0..V {
                            sums[v] = _mm512_dpbf16_ps(sums[v], a, vectors[v]);
                        }
                    }
                }
                b = b.wrapping_add(PANEL);
            }
            left -= len;
        }
        sums
    }
}

/// Heights of the tiles that `rows` rows are cut into: as few as there can be, and of about one height.
pub fn heights(rows: usize) -> impl Iterator<Item = usize> {
    let tiles = rows.div_ceil(MR);
    (0..tiles).map(move |i| (i + 1) * rows / tiles - i * rows / tiles)
}

/// Where sums go.
#[derive(Clone, Copy)]
pub struct Target {
    /// The first element.
    pub y: *mut f32,
    /// Elements from one row to the next.
    pub ldy: usize,
    /// Whether they are added to what is there.
    pub accumulate: bool,
}

impl Target {
    /// Asks memory for `rows` rows of a panel, to which will be added.
    #[inline]
    #[target_feature(enable = "avx512f")]
    pub fn ask(&self, rows: usize) {
        for row in 0..rows {
            for v in 0..2 {
                _mm_prefetch::<_MM_HINT_T0>(self.y.wrapping_add(row * self.ldy + v * LANES).cast());
            }
        }
    }

    /// Writes the rows of `sums` to rows, `columns` of each.
    ///
    /// # Safety
    /// They can be written; the processor has AVX-512.
    #[inline]
    #[target_feature(enable = "avx512f,avx512vl")]
    pub unsafe fn store<const R: usize, const V: usize>(&self, sums: &Sums<R, V>, columns: usize) {
        for (row, sums) in sums.iter().enumerate() {
            for (v, sum) in sums.iter().enumerate() {
                let mask = mask16(columns.saturating_sub(v * LANES));
                // SAFETY: passed on.
                unsafe { self.put(row * self.ldy + v * LANES, mask, *sum) };
            }
        }
    }

    /// Writes the rows of `sums` to `R` columns, of the first `rows` rows.
    ///
    /// # Safety
    /// They can be written; the processor has AVX-512.
    #[inline]
    #[target_feature(enable = "avx512f,avx512vl")]
    pub unsafe fn store_transposed<const R: usize, const V: usize>(&self, sums: &Sums<R, V>, rows: usize) {
        for v in 0..V {
            let mut block = [_mm512_setzero_ps(); LANES];
            for (to, sums) in block.iter_mut().zip(sums) {
                *to = sums[v];
            }
            transpose(&mut block);
            for (row, values) in block.iter().enumerate().take(rows.saturating_sub(v * LANES)) {
                // SAFETY: passed on.
                unsafe { self.put((v * LANES + row) * self.ldy, mask16(R), *values) };
            }
        }
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512vl")]
    unsafe fn put(&self, at: usize, mask: u16, mut values: __m512) {
        // SAFETY: only the elements of the mask are read and written.
        unsafe {
            let at = self.y.add(at);
            if self.accumulate {
                values = _mm512_add_ps(values, _mm512_maskz_loadu_ps(mask, at));
            }
            _mm512_mask_storeu_ps(at, mask, values);
        }
    }
}

/// Transposes 16 x 16 units.
#[inline]
#[target_feature(enable = "avx512f")]
pub fn transpose(block: &mut [__m512; 16]) {
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

/// Up to 32 values as 16 pairs of bf16, an odd end filled with zero.
///
/// # Safety
/// The processor has avx512bf16.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
pub unsafe fn round_pairs(x: &[f32]) -> __m512 {
    let (low, high) = x.split_at(x.len().min(LANES));
    // SAFETY: 32 bf16 are 16 units.
    unsafe { std::mem::transmute(_mm512_cvtne2ps_pbh(load_f32(high), load_f32(low))) }
}
