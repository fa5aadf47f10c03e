//! `y = x Wᵀ`: elements of some rows of W times vectors over the tokens.

use super::tile::{Ahead, Factors, LANES, LINE, MR, Rows, Target, heights, of_height, round_pairs, transpose};
use super::{Level, PANEL, Panels, SCRATCH, Shared, Weight, checked, chunks, in_shares, load_f32, packed_at};
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
    let (rows, cols) = shape;
    let weight = Weight::new(level, w, shape);
    assert!(x.cols == cols && y.cols == rows && y.rows == x.rows, "product: shapes do not fit");
    if x.rows == 0 || rows == 0 {
        return;
    }
    let y_at = checked(&y);
    let panels = token_panels(Threads::All, x, weight.pairs, cols.div_ceil(weight.per_unit()));
    let job = Forward { weight, tokens: x.rows, panels: &panels, ldy: y.stride, accumulate };
    let y = Shared(y.data.as_mut_ptr());
    in_shares(rows.div_ceil(MR), |groups| {
        // SAFETY: `level` found the instructions; the asserts bound what is read of x and w and written of y; each
        // row of w, which is a column of y, is in one share.
        unsafe { job.run(y.at(y_at), groups.start * MR..(groups.end * MR).min(rows)) };
    });
}

struct Forward<'a> {
    weight: Weight<'a>,
    tokens: usize,
    /// From `token_panels`.
    panels: &'a Matrix,
    /// Elements from one row of y to the next.
    ldy: usize,
    accumulate: bool,
}

impl Forward<'_> {
    fn units(&self) -> usize {
        self.panels.cols() / PANEL
    }

    /// # Safety
    /// See `forward`.
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,f16c,fma")]
    unsafe fn run(&self, y: *mut f32, rows: Range<usize>) {
        SCRATCH.with_borrow_mut(|scratch| {
            scratch.resize(MR * DEPTH, 0.0);
            for units in chunks(self.units(), DEPTH) {
                let together = TOGETHER / units.len();
                for first in (0..self.panels.rows()).step_by(together) {
                    let panels = first..(first + together).min(self.panels.rows());
                    let mut row = rows.start;
                    for height in heights(rows.len()) {
                        // SAFETY: the rows and units lie inside the weight; the scratch has room for them; y has all
                        // tokens and rows.
                        unsafe {
                            let a = self.rows(row..row + height, units.clone(), scratch);
                            let job = (a, units.clone(), panels.clone());
                            of_height!(height, self.tiles(job, self.ahead(row + height, &units, &panels), y.add(row)));
                        }
                        row += height;
                    }
                }
            }
        });
    }

    /// Some units of some rows of the weight: where they lie, if those are f32 or pairs, else widened in `scratch`.
    ///
    /// # Safety
    /// They are inside the weight; `scratch` has room.
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,f16c,fma")]
    unsafe fn rows(&self, rows: Range<usize>, units: Range<usize>, scratch: &mut [f32]) -> Rows {
        let Weight { w, rows: all, pairs, .. } = self.weight;
        let at = |unit: usize| packed_at(all, rows.start, unit * self.weight.per_unit());
        match w {
            Panels::F32(w) => return Rows { at: w[at(units.start)..].as_ptr(), run: PANEL, next: all * PANEL },
            Panels::Bf16(w) if pairs => {
                let at = w[at(units.start)..].as_ptr().cast();
                return Rows { at, run: PANEL / 2, next: all * PANEL / 2 };
            }
            Panels::Bf16(_) | Panels::F16(_) => {}
        }
        let next = rows.len() * PANEL;
        for (unit, out) in units.step_by(PANEL).zip(scratch.chunks_exact_mut(next)) {
            for i in (0..next).step_by(LANES) {
                // SAFETY: a panel has PANEL elements of each of the rows, side by side.
                unsafe { _mm512_storeu_ps(out.as_mut_ptr().add(i), self.weight.load(at(unit) + i)) };
            }
        }
        Rows { at: scratch.as_ptr(), run: PANEL, next }
    }

    /// Those units of the rows from `row` on, for the tiles before them: some for each panel of tokens.
    fn ahead(&self, row: usize, units: &Range<usize>, panels: &Range<usize>) -> Ahead {
        let Weight { w, rows, .. } = self.weight;
        let at = w.address(packed_at(rows, row, units.start * self.weight.per_unit()));
        let of_row = w.address(PANEL) as usize - w.address(0) as usize;
        Ahead { at, next: rows * of_row, lines: (MR * of_row).div_ceil(LINE * panels.len()) }
    }

    /// `R` columns of y, of some panels of tokens.
    ///
    /// # Safety
    /// `a` has `R` rows of `units`, and y as many columns.
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,f16c,fma")]
    unsafe fn tiles<const R: usize>(
        &self,
        (a, units, panels): (Rows, Range<usize>, Range<usize>),
        mut ahead: Ahead,
        y: *mut f32,
    ) {
        let (depth, pairs) = (units.len(), self.weight.pairs);
        let accumulate = self.accumulate || units.start > 0;
        for panel in panels {
            let b = self.panels.row(panel)[units.start * PANEL..].as_ptr();
            let factors = Factors { a, b, depth, pairs, ahead };
            let token = panel * PANEL;
            let left = self.tokens - token;
            let target = Target { y: y.wrapping_add(token * self.ldy), ldy: self.ldy, accumulate };
            // SAFETY: y has all tokens.
            unsafe {
                if left > LANES {
                    target.store_transposed(&factors.sums::<R, 2>(), left);
                } else {
                    target.store_transposed(&factors.sums::<R, 1>(), left);
                }
            }
            ahead.at = ahead.at.wrapping_add(ahead.lines * LINE);
        }
    }
}

/// `x` in panels of 32 tokens, a panel a row: for each unit its 32 tokens side by side, those that are missing zero. A unit
/// is an element, or where `pairs` two, rounded to bf16.
pub fn token_panels(threads: Threads, x: View<'_>, pairs: bool, units: usize) -> Matrix {
    let mut out = Matrix::new(x.rows.div_ceil(PANEL), units * PANEL);
    let per_unit = if pairs { 2 } else { 1 };
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
                let columns = unit * per_unit..((unit + LANES) * per_unit).min(x.cols);
                // SAFETY: only called where the processor has AVX-512, and with pairs where it has avx512bf16; the
                // units are inside the panel.
                unsafe {
                    let to = to.at((panel * units + unit) * PANEL + half * LANES);
                    fill_block(x, tokens.clone(), columns, pairs, (to, LANES.min(units - unit)));
                }
            }
        }
    };
    match threads {
        Threads::One => (0..rows * parts).for_each(fill),
        Threads::All => (0..rows * parts).into_par_iter().for_each(fill),
    }
    out
}

/// Up to 16 units of up to 16 tokens, unit by unit.
///
/// # Safety
/// So many units, a panel apart, can be written; the processor has AVX-512, and avx512bf16 for pairs.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
unsafe fn fill_block(
    x: View<'_>,
    tokens: Range<usize>,
    columns: Range<usize>,
    pairs: bool,
    (to, units): (*mut f32, usize),
) {
    let mut block = [_mm512_setzero_ps(); LANES];
    for (to, token) in block.iter_mut().zip(tokens) {
        let values = &x.row(token)[columns.clone()];
        // The processor's own prefetcher does not follow columns; the address need not exist.
        _mm_prefetch::<_MM_HINT_T0>(values.as_ptr().wrapping_add(LANES * x.stride).cast());
        // SAFETY: passed on.
        *to = unsafe { if pairs { round_pairs(values) } else { load_f32(values) } };
    }
    transpose(&mut block);
    for (unit, values) in block.iter().enumerate().take(units) {
        // SAFETY: passed on.
        unsafe { _mm512_storeu_ps(to.add(unit * PANEL), *values) };
    }
}
