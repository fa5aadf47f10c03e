//! Products of small f32 matrices with any strides, as attention and adapters have them: everything is read where it lies,
//! but for a right side that is transposed, which is laid out in panels first.

use super::forward::token_panels;
use super::tile::{LANES, MR, Sums, heights, of_height};
use super::{PANEL, in_shares, mask16};
use crate::ops::matmul::{Side, Threads, ViewMut};
use std::arch::x86_64::*;
use std::ops::Range;

/// Elements of a right side up to which it stays in the second-level cache, where every row of the left side reads all of it.
const RIGHT: usize = 128 << 10;

/// Rows of a tile up to which the right side may wait for memory, as in decoding, and so many of its rows that are asked for.
const NARROW: usize = 3;
const AHEAD: usize = 8;

/// Whether a product by (k, n) is one for [`small`].
#[must_use]
pub fn is_small(k: usize, n: usize) -> bool {
    k * n <= RIGHT
}

/// A product `y = alpha a b`: where its sides are, in elements.
struct Small {
    n: usize,
    k: usize,
    a: *const f32,
    a_row: usize,
    a_col: usize,
    b: *const f32,
    /// From one step of the contraction to the next.
    b_row: usize,
    /// From one 32 columns to the next.
    b_panel: usize,
    y: *mut f32,
    y_row: usize,
    alpha: f32,
    accumulate: bool,
}

// SAFETY: threads read a and b, and write disjoint elements of y.
unsafe impl Sync for Small {}

/// `dst = alpha · lhs · rhs`, added to `dst` where `accumulate`.
///
/// # Safety
/// The shapes fit, every element of the three views is inside its data, and `level` found the instructions.
pub unsafe fn small(threads: Threads, dst: ViewMut<'_>, accumulate: bool, alpha: f32, lhs: Side<'_>, rhs: Side<'_>) {
    let (m, n) = (dst.rows, dst.cols);
    let (a, k, a_row, a_col) = match lhs {
        Side::N(v) => (v, v.cols, v.stride, 1),
        Side::T(v) => (v, v.rows, 1, v.stride),
    };
    let panels;
    let (b, b_row, b_panel) = match rhs {
        Side::N(v) => (v.data.as_ptr().wrapping_add(v.offset), v.stride, PANEL),
        Side::T(v) => {
            panels = token_panels(threads, v, false, k);
            (panels.as_ptr(), PANEL, k * PANEL)
        }
    };
    let (a, y) = (a.data.as_ptr().wrapping_add(a.offset), dst.data.as_mut_ptr().wrapping_add(dst.offset));
    let job = Small { n, k, a, a_row, a_col, b, b_row, b_panel, y, y_row: dst.stride, alpha, accumulate };
    let columns = n.div_ceil(PANEL);
    // SAFETY: passed on; shares have rows or columns of their own.
    unsafe {
        match threads {
            Threads::One => job.run(0..m, 0..columns),
            Threads::All if m >= columns * MR => {
                let tiles = m.div_ceil(MR);
                in_shares(tiles, |share| job.run(share.start * m / tiles..share.end * m / tiles, 0..columns));
            }
            Threads::All => in_shares(columns, |share| job.run(0..m, share)),
        }
    }
}

impl Small {
    /// Some rows of y, in some panels of columns.
    ///
    /// # Safety
    /// See `small`.
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,fma")]
    unsafe fn run(&self, rows: Range<usize>, panels: Range<usize>) {
        for panel in panels {
            let mut row = rows.start;
            for height in heights(rows.len()) {
                // SAFETY: the rows and columns are inside y.
                unsafe { of_height!(height, self.tile(row, panel)) };
                row += height;
            }
        }
    }

    /// `R` rows of a panel of columns.
    ///
    /// # Safety
    /// As for `run`.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,fma")]
    unsafe fn tile<const R: usize>(&self, row: usize, panel: usize) {
        let columns = self.n - panel * PANEL;
        // SAFETY: passed on; rows side by side have addresses that are known beforehand.
        unsafe {
            match (columns > LANES, self.a_row == 1) {
                (true, true) => self.store(row, panel, &self.sums::<R, 2, true>(row, panel)),
                (true, false) => self.store(row, panel, &self.sums::<R, 2, false>(row, panel)),
                (false, true) => self.store(row, panel, &self.sums::<R, 1, true>(row, panel)),
                (false, false) => self.store(row, panel, &self.sums::<R, 1, false>(row, panel)),
            }
        }
    }

    /// Lanes of a panel that y has columns for.
    fn masks<const V: usize>(&self, panel: usize) -> [u16; V] {
        std::array::from_fn(|v| mask16((self.n - panel * PANEL).saturating_sub(v * LANES)))
    }

    /// # Safety
    /// As for `run`; `BESIDE`: the rows of a are elements side by side.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,fma")]
    unsafe fn sums<const R: usize, const V: usize, const BESIDE: bool>(&self, row: usize, panel: usize) -> Sums<R, V> {
        let (a_row, a_col) = if BESIDE { (1, self.a_col) } else { (self.a_row, 1) };
        let (mut a, mut b) = (self.a.wrapping_add(row * a_row), self.b.wrapping_add(panel * self.b_panel));
        let masks = self.masks::<V>(panel);
        let mut sums = [[_mm512_setzero_ps(); V]; R];
        for _ in 0..self.k {
            if R <= NARROW {
                for v in 0..V {
                    let ahead = b.wrapping_add(AHEAD * self.b_row + v * LANES);
                    _mm_prefetch::<_MM_HINT_T0>(ahead.cast());
                }
            }
            // SAFETY: both are inside their views; masked loads read only what is there.
            unsafe {
                let vectors: [_; V] =
                    std::array::from_fn(|v| _mm512_maskz_loadu_ps(masks[v], b.wrapping_add(v * LANES)));
                for (row, sums) in sums.iter_mut().enumerate() {
                    let a = _mm512_set1_ps(*a.wrapping_add(row * a_row));
                    for v in 0..V {
                        sums[v] = _mm512_fmadd_ps(a, vectors[v], sums[v]);
                    }
                }
            }
            (a, b) = (a.wrapping_add(a_col), b.wrapping_add(self.b_row));
        }
        sums
    }

    /// # Safety
    /// As for `run`.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,fma")]
    unsafe fn store<const R: usize, const V: usize>(&self, row: usize, panel: usize, sums: &Sums<R, V>) {
        let (masks, alpha) = (self.masks::<V>(panel), _mm512_set1_ps(self.alpha));
        let y = self.y.wrapping_add(row * self.y_row + panel * PANEL);
        for (row, sums) in sums.iter().enumerate() {
            for v in 0..V {
                let y = y.wrapping_add(row * self.y_row + v * LANES);
                // SAFETY: masked loads and stores touch only what is there.
                unsafe {
                    let old = _mm512_maskz_loadu_ps(if self.accumulate { masks[v] } else { 0 }, y);
                    _mm512_mask_storeu_ps(y, masks[v], _mm512_fmadd_ps(sums[v], alpha, old));
                }
            }
        }
    }
}
