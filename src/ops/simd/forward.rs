//! `y = x Wᵀ`: elements of some rows of W times vectors over the tokens.

use super::tile::{Ahead, Factors, LINE, MOST_ROWS, Rows, Target, heights, of_height, prefetch, sums};
use super::wide::{LANES, Unit, Wide, for_each_width};
use super::{Level, PANEL, Panels, SCRATCH, Shared, Weight, at_level, checked, chunks, in_shares, packed_at};
use crate::ops::matmul::{Threads, ViewMut};
use crate::ops::matrix::{Matrix, View};
use rayon::prelude::*;
use std::arch::x86_64::*;
use std::ops::Range;

/// Depth of a chunk of the contraction.
const DEPTH: usize = 1024;
/// Units of the panels of tokens that some rows of W are multiplied by before the next: 768 KB of the second-level cache.
const TOGETHER: usize = 6 * DEPTH;

/// `y = x Wᵀ`, added to `y` where `accumulate`; `w` is (rows, cols).
///
/// # Panics
/// When the shapes do not fit together.
pub fn forward(level: Level, x: View<'_>, w: Panels<'_>, shape: (usize, usize), y: ViewMut<'_>, accumulate: bool) {
    let (weight, level) = Weight::new(level, w, shape);
    assert!(x.cols == weight.cols && y.cols == weight.rows && y.rows == x.rows, "product: shapes do not fit");
    if x.rows > 0 && weight.rows > 0 {
        at_level!(level, product(x, weight, y, accumulate));
    }
}

fn product<U: Unit>(x: View<'_>, weight: Weight<'_>, y: ViewMut<'_>, accumulate: bool) {
    let (y_at, rows) = (checked(&y), weight.rows);
    let panels = token_panels::<U>(Threads::All, x);
    let job = Forward { weight, tokens: x.rows, panels: &panels, ldy: y.stride, accumulate };
    let y = Shared(y.data.as_mut_ptr());
    in_shares(rows.div_ceil(MOST_ROWS), |groups| {
        let rows = groups.start * MOST_ROWS..(groups.end * MOST_ROWS).min(rows);
        // SAFETY: the level found the instructions; the asserts of `forward` bound what is read of x and w and written of y;
        // each row of w, which is a column of y, is in one share.
        unsafe { run::<U>(&job, y.at(y_at), rows) };
    });
}

/// Rows of the weight, and which of their units and of the panels of tokens.
type Part = (Rows, Range<usize>, Range<usize>);

type Tiles = unsafe fn(&Forward<'_>, Part, Ahead, *mut f32);

struct Forward<'a> {
    weight: Weight<'a>,
    tokens: usize,
    /// From `token_panels`.
    panels: &'a Matrix,
    /// Elements from one row of y to the next.
    ldy: usize,
    accumulate: bool,
}

for_each_width! {
    /// Some columns of y.
    ///
    /// # Safety
    /// See `forward`.
    unsafe fn run<U: Unit>(job: &Forward<'_>, y: *mut f32, rows: Range<usize>) {
        SCRATCH.with_borrow_mut(|scratch| {
            scratch.resize(MOST_ROWS * DEPTH, 0.0);
            for units in chunks(job.units(), DEPTH) {
                let together = TOGETHER / units.len();
                for first in (0..job.panels.rows()).step_by(together) {
                    let panels = first..(first + together).min(job.panels.rows());
                    let mut row = rows.start;
                    for height in heights::<U::Wide>(rows.len()) {
                        // SAFETY: the rows and units lie inside the weight; the scratch has room for them; y has all
                        // tokens and rows.
                        unsafe {
                            let a = rows_of::<U>(job.weight, row..row + height, units.clone(), scratch);
                            let ahead = job.ahead::<U>(row + height, &units, &panels);
                            let part = (a, units.clone(), panels.clone());
                            of_height!(U, height, tiles as Tiles)(job, part, ahead, y.add(row));
                        }
                        row += height;
                    }
                }
            }
        });
    }
}

for_each_width! {
    /// Some units of some rows of a weight: where they lie, if those are f32 or pairs, else widened in `scratch`.
    ///
    /// # Safety
    /// They are inside the weight; `scratch` has room.
    unsafe fn rows_of<U: Unit>(weight: Weight<'_>, rows: Range<usize>, units: Range<usize>, scratch: &mut [f32]) -> Rows {
        let Weight { w, rows: all, .. } = weight;
        let at = |unit: usize| packed_at(all, rows.start, unit * U::ELEMENTS);
        if U::ELEMENTS > 1 || matches!(w, Panels::F32(_)) {
            return Rows { at: w.address(at(units.start)).cast(), next: all * U::RUN };
        }
        let next = rows.len() * PANEL;
        for (unit, out) in units.step_by(PANEL).zip(scratch.chunks_exact_mut(next)) {
            for i in (0..next).step_by(LANES) {
                // SAFETY: a panel has PANEL elements of each of the rows, side by side.
                unsafe { w.load::<U::Wide>(at(unit) + i).store(out.as_mut_ptr().add(i)) };
            }
        }
        Rows { at: scratch.as_ptr(), next }
    }
}

for_each_width! {
    /// `R` columns of y, of some panels of tokens.
    ///
    /// # Safety
    /// `a` has `R` rows of `units`, and y as many columns.
    unsafe fn tiles<U: Unit; const R: usize>(
        job: &Forward<'_>,
        part: Part,
        ahead: Ahead,
        y: *mut f32,
    ) {
        let ((a, units, panels), mut ahead) = (part, ahead);
        let (depth, beside) = (units.len(), U::Wide::BESIDE);
        let accumulate = job.accumulate || units.start > 0;
        for panel in panels {
            let b = job.panels.row(panel)[units.start * PANEL..].as_ptr();
            for lane in (0..PANEL).step_by(beside * LANES) {
                let factors = Factors { a, b: b.wrapping_add(lane), depth, ahead };
                let token = panel * PANEL + lane;
                let left = job.tokens.saturating_sub(token);
                let target = Target { y: y.wrapping_add(token * job.ldy), ldy: job.ldy, accumulate };
                // SAFETY: y has all tokens.
                unsafe {
                    if beside > 1 && left > LANES {
                        target.store_transposed(&sums::<U, R, 2>(&factors), left);
                    } else if left > 0 {
                        target.store_transposed(&sums::<U, R, 1>(&factors), left);
                    }
                }
                ahead.at = ahead.at.wrapping_add(ahead.lines * LINE);
            }
        }
    }
}

impl Forward<'_> {
    fn units(&self) -> usize {
        self.panels.cols() / PANEL
    }

    /// Those units of a tile's rows from `row` on, for the tiles before them: some for each panel of tokens.
    fn ahead<U: Unit>(&self, row: usize, units: &Range<usize>, panels: &Range<usize>) -> Ahead {
        let Weight { w, rows, .. } = self.weight;
        let at = w.address(packed_at(rows, row, units.start * U::ELEMENTS));
        let of_row = w.address(PANEL) as usize - w.address(0) as usize;
        Ahead { at, next: rows * of_row, lines: (U::Wide::ROWS * of_row).div_ceil(LINE * panels.len()) }
    }
}

/// `x` in panels of 32 tokens, a panel a row: for each unit its 32 tokens side by side, those that are missing zero.
pub fn token_panels<U: Unit>(threads: Threads, x: View<'_>) -> Matrix {
    let units = x.cols.div_ceil(U::ELEMENTS);
    let mut out = Matrix::new(x.rows.div_ceil(PANEL), units * PANEL);
    // Parts of a panel, so that there is something for every thread.
    let count = if threads == Threads::All { rayon::current_num_threads() } else { 1 };
    let part = units.div_ceil(count).next_multiple_of(LANES).max(LANES);
    let parts = units.div_ceil(part);
    let (rows, to) = (out.rows(), Shared(out.as_mut_ptr()));
    let fill = |i: usize| {
        let (panel, from) = (i / parts, i % parts * part);
        for half in 0..2 {
            let first = (panel * PANEL + half * LANES).min(x.rows);
            let tokens = first..(first + LANES).min(x.rows);
            for unit in (from..(from + part).min(units)).step_by(LANES) {
                let columns = unit * U::ELEMENTS..((unit + LANES) * U::ELEMENTS).min(x.cols);
                let to = to.at((panel * units + unit) * PANEL + half * LANES);
                let to = (to, LANES.min(units - unit));
                // SAFETY: the level found the instructions; the units are inside the panel.
                unsafe { fill_block::<U>(x, tokens.clone(), columns, to) };
            }
        }
    };
    match threads {
        Threads::One => (0..rows * parts).for_each(fill),
        Threads::All => (0..rows * parts).into_par_iter().for_each(fill),
    }
    out
}

for_each_width! {
    /// Up to 16 units of up to 16 tokens, unit by unit.
    ///
    /// # Safety
    /// So many units, a panel apart, can be written; the processor has the instructions.
    unsafe fn fill_block<U: Unit>(x: View<'_>, tokens: Range<usize>, columns: Range<usize>, to: (*mut f32, usize)) {
        // SAFETY: passed on.
        unsafe {
            let mut block = [U::Wide::zero(); LANES];
            for (to, token) in block.iter_mut().zip(tokens) {
                let values = &x.row(token)[columns.clone()];
                // The processor's own prefetcher does not follow columns.
                prefetch::<_MM_HINT_T0>(values.as_ptr().wrapping_add(LANES * x.stride).cast());
                *to = U::of(values);
            }
            U::Wide::transpose(&mut block);
            for (unit, values) in block.iter().enumerate().take(to.1) {
                values.store(to.0.add(unit * PANEL));
            }
        }
    }
}
