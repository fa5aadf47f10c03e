//! Products of small matrices with any strides, as attention and adapters have them. f32 is read where it lies, but for a
//! right side that is transposed, which is laid out in panels first; pairs of bf16 are made of both sides.

use super::forward::token_panels;
use super::tile::{MOST_ROWS, Sums, heights, of_height, prefetch};
use super::wide::{LANES, Pairs, Unit, Wide, for_each_width};
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

/// The same with both sides rounded to bf16, on this thread.
///
/// # Safety
/// The shapes fit, none is empty, every element of the three views is inside its data, and the processor has `vdpbf16ps`.
pub unsafe fn small_pairs(dst: ViewMut<'_>, accumulate: bool, alpha: f32, lhs: Side<'_>, rhs: Side<'_>) {
    let (m, n) = (dst.rows, dst.cols);
    // SAFETY: passed on; what is packed has all that is read.
    unsafe {
        let (a, a_row, a_col) = match lhs {
            Side::N(v) => {
                let a = pairs_of_rows(v);
                let units = a.cols();
                (a, units, 1)
            }
            Side::T(v) => {
                let a = paired_rows(v);
                let columns = a.cols();
                (a, 1, columns)
            }
        };
        let k = if a_col == 1 { a_row } else { a.rows() };
        let (b, b_row, b_panel) = match rhs {
            Side::N(v) => {
                let b = paired_rows(v);
                let columns = b.cols();
                (b, columns, PANEL)
            }
            Side::T(v) => (token_panels::<Pairs>(Threads::One, v), PANEL, k * PANEL),
        };
        let y = dst.data.as_mut_ptr().wrapping_add(dst.offset);
        let (a, b) = (a.as_ptr(), b.as_ptr());
        let job = Small { n, k, a, a_row, a_col, b, b_row, b_panel, y, y_row: dst.stride, alpha, accumulate };
        run::<Pairs>(&job, 0..m, 0..n.div_ceil(PANEL));
    }
}

/// Pairs of neighbours in each row.
///
/// # Safety
/// The processor has `vdpbf16ps`.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")]
unsafe fn pairs_of_rows(x: View<'_>) -> Matrix {
    let mut out = Matrix::new(x.rows, x.cols.div_ceil(2));
    let units = out.cols();
    for (row, out) in out.chunks_exact_mut(units).enumerate() {
        for (out, values) in out.chunks_mut(LANES).zip(x.row(row).chunks(2 * LANES)) {
            // SAFETY: passed on; only what is there is written.
            unsafe { Pairs::of(values).store_first(out.as_mut_ptr(), out.len()) };
        }
    }
    out
}

/// Pairs of two rows' elements of one column, two rows after the other.
///
/// # Safety
/// The processor has `vdpbf16ps`.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")]
unsafe fn paired_rows(x: View<'_>) -> Matrix {
    let mut out = Matrix::new(x.rows.div_ceil(2), x.cols);
    for (i, out) in out.chunks_exact_mut(x.cols).enumerate() {
        let first = x.row(2 * i);
        let second = if 2 * i + 1 < x.rows { x.row(2 * i + 1) } else { &[] };
        for (at, out) in out.chunks_mut(LANES).enumerate() {
            let part = |row: &[f32]| {
                let rest = row.get(at * LANES..).unwrap_or_default();
                // SAFETY: passed on; only what is there is read.
                unsafe { Wide::load_first(rest.as_ptr(), rest.len().min(LANES)) }
            };
            // SAFETY: passed on; only what is there is written.
            unsafe { Pairs::of_two(part(first), part(second)).store_first(out.as_mut_ptr(), out.len()) };
        }
    }
    out
}

for_each_width! {
    /// Some rows of y, in some panels of columns.
    ///
    /// # Safety
    /// See `small`.
    unsafe fn run<U: Unit>(job: &Small, rows: Range<usize>, panels: Range<usize>) {
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
