//! Sides of small products, rounded to bf16 and laid out in pairs once for several of them.

use super::forward::token_panels;
use super::small::{Small, run};
use super::wide::{LANES, Pairs, Unit, Wide};
use super::{Level, PANEL, level};
use crate::ops::matmul::{Side, Threads, ViewMut};
use crate::ops::matrix::{Matrix, View};

/// A left side.
#[derive(Debug)]
pub struct PairsLeft {
    units: Matrix,
    /// Whether a row's units follow one another, else those of a step of the contraction.
    by_row: bool,
}

/// A right side.
#[derive(Debug)]
pub struct PairsRight {
    units: Matrix,
    cols: usize,
    /// Whether it is in panels of 32 columns, else its rows are those of the steps of the contraction.
    in_panels: bool,
}

impl PairsLeft {
    /// Of a side, where the processor has `vdpbf16ps` and is faster with it.
    #[must_use]
    pub fn of(side: Side<'_>) -> Option<Self> {
        if level() != Some(Level::Avx512Bf16) {
            return None;
        }
        // SAFETY: the level says that there are the instructions.
        let (units, by_row) = unsafe {
            match side {
                Side::N(v) => (pairs_of_rows(v), true),
                Side::T(v) => (paired_rows(v), false),
            }
        };
        Some(Self { units, by_row })
    }

    fn rows(&self) -> usize {
        if self.by_row { self.units.rows() } else { self.units.cols() }
    }

    fn steps(&self) -> usize {
        if self.by_row { self.units.cols() } else { self.units.rows() }
    }
}

impl PairsRight {
    /// Of a side, where the processor has `vdpbf16ps` and is faster with it.
    #[must_use]
    pub fn of(side: Side<'_>) -> Option<Self> {
        if level() != Some(Level::Avx512Bf16) {
            return None;
        }
        Some(match side {
            // SAFETY: the level says that there are the instructions.
            Side::N(v) => Self { units: unsafe { paired_rows(v) }, cols: v.cols, in_panels: false },
            Side::T(v) => Self { units: token_panels::<Pairs>(Threads::One, v), cols: v.rows, in_panels: true },
        })
    }

    fn steps(&self) -> usize {
        if self.in_panels { self.units.cols() / PANEL } else { self.units.rows() }
    }
}

/// `dst = alpha · lhs · rhs`, added to `dst` where `accumulate`, with the first rows and columns of `rhs` that this takes.
///
/// # Panics
/// When the shapes do not fit together or `dst` leaves its data.
pub fn product_of_pairs(dst: ViewMut<'_>, accumulate: bool, alpha: f32, lhs: &PairsLeft, rhs: &PairsRight) {
    let (m, n, k) = (dst.rows, dst.cols, lhs.steps());
    assert!(m == lhs.rows() && n <= rhs.cols && k <= rhs.steps(), "product: shapes do not fit");
    if m == 0 || n == 0 {
        return;
    }
    let y = dst.data.as_mut_ptr().wrapping_add(super::checked(&dst));
    let (a_row, a_col) = if lhs.by_row { (k, 1) } else { (1, m) };
    let (b_row, b_panel) = if rhs.in_panels { (PANEL, rhs.units.cols()) } else { (rhs.cols, PANEL) };
    let (a, b) = (lhs.units.as_ptr(), rhs.units.as_ptr());
    let job = Small { n, k, a, a_row, a_col, b, b_row, b_panel, y, y_row: dst.stride, alpha, accumulate };
    // SAFETY: only where there are the instructions is a side in pairs; the assert bounds what is read of both, `checked` what
    // is written.
    unsafe { run::<Pairs>(&job, 0..m, 0..n.div_ceil(PANEL)) };
}

/// Pairs of neighbours in each row.
///
/// # Safety
/// The processor has the instructions.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")]
unsafe fn pairs_of_rows(x: View<'_>) -> Matrix {
    let mut out = Matrix::new(x.rows, x.cols.div_ceil(2));
    let units = out.cols().max(1);
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
/// The processor has the instructions.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")]
unsafe fn paired_rows(x: View<'_>) -> Matrix {
    let mut out = Matrix::new(x.rows.div_ceil(2), x.cols);
    for (i, out) in out.chunks_exact_mut(x.cols.max(1)).enumerate() {
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
