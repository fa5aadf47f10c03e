//! Products of small matrices with any strides, as attention and adapters have them. f32 is read where it lies, but for a
//! right side that is transposed, which is laid out in panels first. `pairs` makes units of both sides for the same loops.

use super::forward::token_panels;
use super::tile::{MOST_ROWS, Sums, heights, of_height, prefetch};
use super::wide::{LANES, Unit, Wide, for_each_width};
use super::{Level, PANEL, at_width, in_shares};
use crate::ops::matmul::{Side, Threads, ViewMut};
use crate::ops::matrix::{Matrix, View};
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

/// A product `y = alpha a b`: where its sides are, in units.
pub(super) struct Small {
    pub(super) n: usize,
    pub(super) k: usize,
    pub(super) a: *const f32,
    pub(super) a_row: usize,
    pub(super) a_col: usize,
    pub(super) b: *const f32,
    /// From one step of the contraction to the next.
    pub(super) b_row: usize,
    /// From one 32 columns to the next.
    pub(super) b_panel: usize,
    pub(super) y: *mut f32,
    pub(super) y_row: usize,
    pub(super) alpha: f32,
    pub(super) accumulate: bool,
}

// SAFETY: threads read a and b, and write disjoint elements of y.
unsafe impl Sync for Small {}

/// `dst = alpha · lhs · rhs`, added to `dst` where `accumulate`.
///
/// # Safety
/// The shapes fit, every element of the three views is inside its data, and `level` found the instructions.
pub unsafe fn small(
    level: Level,
    threads: Threads,
    dst: ViewMut<'_>,
    accumulate: bool,
    alpha: f32,
    lhs: Side<'_>,
    rhs: Side<'_>,
) {
    let (m, n) = (dst.rows, dst.cols);
    let (a, k, a_row, a_col) = match lhs {
        Side::N(v) => (v, v.cols, v.stride, 1),
        Side::T(v) => (v, v.rows, 1, v.stride),
    };
    let panels;
    let (b, b_row, b_panel) = match rhs {
        Side::N(v) => (v.data.as_ptr().wrapping_add(v.offset), v.stride, PANEL),
        Side::T(v) => {
            panels = at_width!(level, token_panels(threads, v));
            (panels.as_ptr(), PANEL, k * PANEL)
        }
    };
    let (a, y) = (a.data.as_ptr().wrapping_add(a.offset), dst.data.as_mut_ptr().wrapping_add(dst.offset));
    let job = Small { n, k, a, a_row, a_col, b, b_row, b_panel, y, y_row: dst.stride, alpha, accumulate };
    let columns = n.div_ceil(PANEL);
    // SAFETY: passed on; shares have rows or columns of their own.
    unsafe {
        match threads {
            Threads::One => at_width!(level, run(&job, 0..m, 0..columns)),
            Threads::All if m >= columns * MOST_ROWS => {
                let tiles = m.div_ceil(MOST_ROWS);
                let rows = |share: &Range<usize>| share.start * m / tiles..share.end * m / tiles;
                in_shares(tiles, |share| at_width!(level, run(&job, rows(&share), 0..columns)));
            }
            Threads::All => in_shares(columns, |share| at_width!(level, run(&job, 0..m, share.clone()))),
        }
    }
}

/// A right side that is transposed, laid out for several products on one thread.
#[derive(Debug)]
pub struct Panelled {
    level: Level,
    panels: Matrix,
    cols: usize,
}

impl Panelled {
    /// The transposed view.
    #[must_use]
    pub fn of(level: Level, view: View<'_>) -> Self {
        Self { level, panels: at_width!(level, token_panels(Threads::One, view)), cols: view.rows }
    }

    /// `dst = alpha · lhs · this`, added to `dst` where `accumulate`, with the first columns that this takes.
    ///
    /// # Panics
    /// When the shapes do not fit together.
    ///
    /// # Safety
    /// Every element of the views is inside its data.
    pub unsafe fn product(&self, dst: ViewMut<'_>, accumulate: bool, alpha: f32, lhs: Side<'_>) {
        let (m, n, k) = (dst.rows, dst.cols, self.panels.cols() / PANEL);
        let (a, rows, depth, a_row, a_col) = match lhs {
            Side::N(v) => (v, v.rows, v.cols, v.stride, 1),
            Side::T(v) => (v, v.cols, v.rows, 1, v.stride),
        };
        assert!(m == rows && depth == k && n <= self.cols, "product: shapes do not fit");
        let (a, y) = (a.data.as_ptr().wrapping_add(a.offset), dst.data.as_mut_ptr().wrapping_add(dst.offset));
        let (b, b_row, b_panel, y_row) = (self.panels.as_ptr(), PANEL, k * PANEL, dst.stride);
        let job = Small { n, k, a, a_row, a_col, b, b_row, b_panel, y, y_row, alpha, accumulate };
        // SAFETY: passed on; the assert bounds what is read of the panels.
        unsafe { at_width!(self.level, run(&job, 0..m, 0..n.div_ceil(PANEL))) };
    }
}

for_each_width! {
    /// Some rows of y, in some panels of columns.
    ///
    /// # Safety
    /// See `small`.
    pub(super) unsafe fn run<U: Unit>(job: &Small, rows: Range<usize>, panels: Range<usize>) {
        for panel in panels {
            let mut row = rows.start;
            for height in heights::<U::Wide>(rows.len()) {
                // SAFETY: the rows and columns are inside y.
                unsafe { of_height!(U, height, tile as unsafe fn(&Small, usize, usize))(job, row, panel) };
                row += height;
            }
        }
    }
}

for_each_width! {
    /// `R` rows of a panel of columns.
    ///
    /// # Safety
    /// As for `run`.
    unsafe fn tile<U: Unit; const R: usize>(job: &Small, row: usize, panel: usize) {
        let end = job.n.min((panel + 1) * PANEL);
        for column in (panel * PANEL..end).step_by(<U::Wide>::BESIDE * LANES) {
            let b = job.b.wrapping_add(panel * job.b_panel + column % PANEL);
            let at = Place { row, column, columns: end - column, b };
            // SAFETY: passed on; rows side by side have addresses that are known beforehand.
            unsafe {
                match (<U::Wide>::BESIDE > 1 && at.columns > LANES, job.a_row == 1) {
                    (true, true) => job.store(&at, &job.sums::<U, R, 2, true>(&at)),
                    (true, false) => job.store(&at, &job.sums::<U, R, 2, false>(&at)),
                    (false, true) => job.store(&at, &job.sums::<U, R, 1, true>(&at)),
                    (false, false) => job.store(&at, &job.sums::<U, R, 1, false>(&at)),
                }
            }
        }
    }
}

/// A tile's place in y, and how many columns y has there.
struct Place {
    row: usize,
    column: usize,
    columns: usize,
    /// Those columns of b.
    b: *const f32,
}

impl Small {
    /// # Safety
    /// As for `run`; `BESIDE`: the rows of a are elements side by side.
    #[inline(always)]
    unsafe fn sums<U: Unit, const R: usize, const V: usize, const BESIDE: bool>(
        &self,
        at: &Place,
    ) -> Sums<U::Wide, R, V> {
        let (a_row, a_col) = if BESIDE { (1, self.a_col) } else { (self.a_row, 1) };
        let (mut a, mut b) = (self.a.wrapping_add(at.row * a_row), at.b);
        // SAFETY: both are inside their views; of a row only what is there is read.
        unsafe {
            let mut sums = [[<U::Wide>::zero(); V]; R];
            for _ in 0..self.k {
                if R <= NARROW {
                    for v in 0..V {
                        let ahead = b.wrapping_add(AHEAD * self.b_row + v * LANES);
                        prefetch::<_MM_HINT_T0>(ahead.cast());
                    }
                }
                let vectors: [U::Wide; V] = std::array::from_fn(|v| {
                    Wide::load_first(b.wrapping_add(v * LANES), at.columns.saturating_sub(v * LANES))
                });
                for (row, sums) in sums.iter_mut().enumerate() {
                    let a = Wide::set(*a.wrapping_add(row * a_row));
                    for v in 0..V {
                        sums[v] = U::multiply_add(a, vectors[v], sums[v]);
                    }
                }
                (a, b) = (a.wrapping_add(a_col), b.wrapping_add(self.b_row));
            }
            sums
        }
    }

    /// # Safety
    /// As for `run`.
    #[inline(always)]
    unsafe fn store<W: Wide, const R: usize, const V: usize>(&self, at: &Place, sums: &Sums<W, R, V>) {
        let y = self.y.wrapping_add(at.row * self.y_row + at.column);
        for (row, sums) in sums.iter().enumerate() {
            for (v, sum) in sums.iter().enumerate() {
                let (y, len) = (y.wrapping_add(row * self.y_row + v * LANES), at.columns.saturating_sub(v * LANES));
                // SAFETY: only what is there is read and written.
                unsafe {
                    let old = if self.accumulate { W::load_first(y, len) } else { W::zero() };
                    sum.multiply_add(W::set(self.alpha), old).store_first(y, len);
                }
            }
        }
    }
}
