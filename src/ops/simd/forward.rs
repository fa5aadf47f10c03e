//! `y = x Wᵀ`: elements of some rows of W times vectors over the tokens.

use super::tile::{Ahead, Factors, LANES, LINE, MR, Rows, Target, heights, of_height, round_pairs, transpose, zeros};
use super::{Level, PANEL, Panels, SCRATCH, Shared, Weight, checked, chunks, in_shares, load_f32, packed_at};
use crate::ops::matmul::ViewMut;
use crate::ops::matrix::{Matrix, View};
use rayon::prelude::*;
use std::arch::x86_64::*;
use std::ops::Range;

/// Depth of a chunk of the contraction: at most 32 KB of a panel of tokens, which stay in the first-level cache.
const DEPTH: usize = 256;
/// Units of the rows of W that all tokens are multiplied by before the next: 512 KB of the second-level cache.
const ROOM: usize = 128 << 10;

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
    let panels = token_panels(x, weight.pairs, cols.div_ceil(weight.per_unit()));
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
        let together = (ROOM / self.units().next_multiple_of(PANEL) / MR).max(1) * MR;
        SCRATCH.with_borrow_mut(|scratch| {
            for first in rows.clone().step_by(together) {
                let rows = first..(first + together).min(rows.end);
                // SAFETY: the rows lie inside the weight, and y has all tokens and rows.
                unsafe { self.block(rows, together, scratch, y) };
            }
        });
    }

    /// Some rows of the weight by all tokens.
    ///
    /// # Safety
    /// They lie inside the weight, and y has all tokens and rows.
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,f16c,fma")]
    unsafe fn block(&self, rows: Range<usize>, together: usize, scratch: &mut Vec<f32>, y: *mut f32) {
        scratch.resize(together * (PANEL + self.units().next_multiple_of(PANEL)), 0.0);
        let (kept, widened) = scratch.split_at_mut(together * PANEL);
        // SAFETY: passed on; there is room for all units of the rows.
        let a = unsafe { self.rows(rows.clone(), widened) };
        let tiles = heights(rows.len()).count() * self.panels.rows();
        let next = self.ahead(rows.end, together, tiles);
        for panel in 0..self.panels.rows() {
            for units in chunks(self.units(), DEPTH) {
                let mut at = 0;
                for (tile, height) in heights(rows.len()).enumerate() {
                    let b = self.panels.row(panel)[units.start * PANEL..].as_ptr();
                    let (depth, pairs) = (units.len(), self.weight.pairs);
                    let before = panel * heights(rows.len()).count() + tile;
                    let ahead = next.from(units.start / a.run, before);
                    let factors = Factors { a: a.from(at, units.start), b, depth, pairs, ahead };
                    let kept = kept[at * PANEL..].as_mut_ptr();
                    // SAFETY: the tile's rows are some of the block's, for which there is room in what is kept.
                    unsafe { of_height!(height, self.tile(factors, &units, kept, (panel, y.add(rows.start + at)))) };
                    at += height;
                }
            }
        }
    }

    /// Some rows of the weight: where they lie, if those are f32 or pairs, else widened in `scratch`.
    ///
    /// # Safety
    /// They are inside the weight; `scratch` has room.
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,f16c,fma")]
    unsafe fn rows(&self, rows: Range<usize>, scratch: &mut [f32]) -> Rows {
        let Weight { w, rows: all, pairs, .. } = self.weight;
        let at = packed_at(all, rows.start, 0);
        match w {
            Panels::F32(w) => return Rows { at: w[at..].as_ptr(), run: PANEL, next: all * PANEL },
            Panels::Bf16(w) if pairs => {
                return Rows { at: w[at..].as_ptr().cast(), run: PANEL / 2, next: all * PANEL / 2 };
            }
            Panels::Bf16(_) | Panels::F16(_) => {}
        }
        let next = rows.len() * PANEL;
        for (panel, out) in scratch.chunks_exact_mut(next).take(self.weight.cols.div_ceil(PANEL)).enumerate() {
            for i in (0..next).step_by(LANES) {
                // SAFETY: a panel has PANEL elements of each of the rows, side by side.
                unsafe { _mm512_storeu_ps(out.as_mut_ptr().add(i), self.weight.load(at + panel * all * PANEL + i)) };
            }
        }
        Rows { at: scratch.as_ptr(), run: PANEL, next }
    }

    /// `together` rows from `row` on, some for each of `tiles`.
    fn ahead(&self, row: usize, together: usize, tiles: usize) -> Ahead {
        let Weight { w, rows, .. } = self.weight;
        let of_row = w.address(PANEL) as usize - w.address(0) as usize;
        let lines = (together * of_row).div_ceil(LINE * tiles);
        Ahead { at: w.address(packed_at(rows, row, 0)), next: rows * of_row, lines }
    }

    /// `R` columns of y, of a panel of tokens, or what is kept of them until the last chunk.
    ///
    /// # Safety
    /// `kept` has `R` rows of a panel, and y so many columns and all tokens; else as for `Factors::add_to`.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,f16c,fma")]
    unsafe fn tile<const R: usize>(
        &self,
        factors: Factors,
        units: &Range<usize>,
        kept: *mut f32,
        (panel, y): (usize, *mut f32),
    ) {
        // SAFETY: passed on.
        unsafe {
            if self.tokens - panel * PANEL > LANES {
                self.vectors::<R, 2>(factors, units, kept, (panel, y));
            } else {
                self.vectors::<R, 1>(factors, units, kept, (panel, y));
            }
        }
    }

    /// A `tile` of `V` vectors of tokens.
    ///
    /// # Safety
    /// As for `tile`.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,f16c,fma")]
    unsafe fn vectors<const R: usize, const V: usize>(
        &self,
        factors: Factors,
        units: &Range<usize>,
        kept: *mut f32,
        (panel, y): (usize, *mut f32),
    ) {
        let kept = Target { y: kept, ldy: PANEL, accumulate: false };
        // SAFETY: passed on.
        unsafe {
            let mut sums = if units.start > 0 { kept.load() } else { zeros::<R, V>() };
            factors.add_to(&mut sums);
            if units.end < self.units() {
                return kept.store(&sums, PANEL);
            }
            let token = panel * PANEL;
            let target = Target { y: y.add(token * self.ldy), ldy: self.ldy, accumulate: self.accumulate };
            target.store_transposed(&sums, self.tokens - token);
        }
    }
}

/// `x` in panels of 32 tokens, a panel a row: for each unit its 32 tokens side by side, those that are missing zero. A unit
/// is an element, or where `pairs` two, rounded to bf16.
fn token_panels(x: View<'_>, pairs: bool, units: usize) -> Matrix {
    let mut out = Matrix::new(x.rows.div_ceil(PANEL), units * PANEL);
    let per_unit = if pairs { 2 } else { 1 };
    // Parts of a panel, so that there is something for every thread.
    let part = units.div_ceil(rayon::current_num_threads()).next_multiple_of(LANES);
    let parts = units.div_ceil(part);
    let (rows, to) = (out.rows(), Shared(out.as_mut_ptr()));
    (0..rows * parts).into_par_iter().for_each(|i| {
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
    });
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
        // SAFETY: passed on.
        *to = unsafe { if pairs { round_pairs(values) } else { load_f32(values) } };
    }
    transpose(&mut block);
    for (unit, values) in block.iter().enumerate().take(units) {
        // SAFETY: passed on.
        unsafe { _mm512_storeu_ps(to.add(unit * PANEL), *values) };
    }
}
