//! `y = x Wᵀ`: elements of some rows of W times vectors over the tokens.

use super::amx::{self, Contraction};
use super::tile::{Ahead, Factors, LINE, MOST_ROWS, Rows, Target, heights, prefetch, prefetch_to_write, tile_of};
use super::wide::{LANES, Reading, Unit, Wide, WideOf, WidenedRows, for_each_width};
use super::{
    Level, PANEL, Panels, SCRATCH, Shared, Weight, at_level, checked, chunks, in_shares, packed_at, widens_in_registers,
};
use crate::ops::matmul::{Threads, ViewMut};
use crate::ops::matrix::{Matrix, View};
use rayon::prelude::*;
use std::arch::x86_64::*;
use std::ops::Range;

/// Depth of a chunk of the contraction.
const DEPTH: usize = 1024;
/// Units of the panels of tokens that some rows of W are multiplied by before the next: 768 KB of the second-level cache.
const TOGETHER: usize = 6 * DEPTH;
/// Rows of W whose sums go into y together: whole tiles, and whole lines of y's rows.
pub const GROUP: usize = 4 * MOST_ROWS;

/// `y = x Wᵀ`, added to `y` where `accumulate`; `w` is (rows, cols).
///
/// # Panics
/// When the shapes do not fit together.
pub fn forward(level: Level, x: View<'_>, w: Panels<'_>, shape: (usize, usize), y: ViewMut<'_>, accumulate: bool) {
    let (weight, level) = Weight::new(level, w, shape);
    assert!(x.cols == weight.cols && y.cols == weight.rows && y.rows == x.rows, "product: shapes do not fit");
    if x.rows > 0 && weight.rows > 0 {
        match (level.parts(), w) {
            (Some(parts), Panels::Bf16(w)) => amx::product(Contraction::Columns, parts, x, (w, weight), y, accumulate),
            (_, Panels::Bf16(_)) if level == Level::Avx512 && widens_in_registers() => {
                product::<WidenedRows>(x, weight, y, accumulate);
            }
            _ => at_level!(level, product(x, weight, y, accumulate)),
        }
    }
}

fn product<P: Reading>(x: View<'_>, weight: Weight<'_>, y: ViewMut<'_>, accumulate: bool) {
    let (y_at, rows) = (checked(&y), weight.rows);
    let panels = token_panels::<P::Unit>(Threads::All, x);
    let job = Forward { weight, tokens: x.rows, panels: &panels, ldy: y.stride, accumulate };
    let y = Shared(y.data.as_mut_ptr());
    in_shares(rows.div_ceil(MOST_ROWS), |groups| {
        let rows = groups.start * MOST_ROWS..(groups.end * MOST_ROWS).min(rows);
        // SAFETY: the level found the instructions; the asserts of `forward` bound what is read of x and w and written of y;
        // each row of w, which is a column of y, is in one share.
        unsafe { run::<P>(&job, y.at(y_at), rows) };
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

for_each_width! {
    /// Some columns of y.
    ///
    /// # Safety
    /// See `forward`.
    unsafe fn run<P: Reading>(job: &Forward<'_>, y: *mut f32, rows: Range<usize>) {
        SCRATCH.with_borrow_mut(|scratch| {
            for units in chunks(job.units(), DEPTH) {
                let together = TOGETHER / units.len();
                for first in (0..job.panels.rows()).step_by(together) {
                    let panels = first..(first + together).min(job.panels.rows());
                    for row in rows.clone().step_by(GROUP) {
                        let rows = row..(row + GROUP).min(rows.end);
                        // SAFETY: passed on.
                        unsafe { group::<P>(job, (rows, units.clone(), panels.clone()), scratch, y) };
                    }
                }
            }
        });
    }
}

/// Rows of the weight, and which of their units and of the panels of tokens.
type Part = (Range<usize>, Range<usize>, Range<usize>);

for_each_width! {
    /// Columns of y of some panels of tokens: their sums, panel by panel a row for each column, then transposed.
    ///
    /// # Safety
    /// The part lies inside the weight and the panels; y has all tokens and rows.
    unsafe fn group<P: Reading>(job: &Forward<'_>, part: Part, scratch: &mut Vec<f32>, y: *mut f32) {
        let (rows, units, panels) = part.clone();
        let of_panel = rows.len() * PANEL;
        let (widened, sums) = room(scratch, of_panel * panels.len());
        let accumulate = job.accumulate || units.start > 0;
        // SAFETY: passed on; there is room for the sums.
        unsafe {
            sum_rows::<P>(job, part, widened, Room { sums, of_panel, at: 0, accumulate: false }, Some(y));
            for (panel, sums) in panels.zip(sums.chunks_exact(of_panel)) {
                let y = y.wrapping_add(panel * PANEL * job.ldy + rows.start);
                transpose::<WideOf<P>>(sums, job.tokens_of(panel).len(), Target { y, ldy: job.ldy, accumulate });
            }
        }
    }
}

/// Room for widened rows and for so many sums.
fn room(scratch: &mut Vec<f32>, sums: usize) -> (&mut [f32], &mut [f32]) {
    scratch.resize(scratch.len().max(MOST_ROWS * DEPTH + sums), 0.0);
    let (widened, rest) = scratch.split_at_mut(MOST_ROWS * DEPTH);
    (widened, &mut rest[..sums])
}

/// Where the sums of some rows go: to each panel's, of which these begin at a row.
struct Room<'a> {
    sums: &'a mut [f32],
    of_panel: usize,
    at: usize,
    /// Whether they are added to what is there.
    accumulate: bool,
}

for_each_width! {
    /// Sums of some rows of the weight with some panels of tokens, panel by panel a row of sums for each. Asks memory for their
    /// places in `y`, if they go there.
    ///
    /// # Safety
    /// The part lies inside the weight and the panels, and its sums inside the room; the processor has the instructions.
    unsafe fn sum_rows<P: Reading>(
        job: &Forward<'_>,
        part: Part,
        widened: &mut [f32],
        to: Room<'_>,
        y: Option<*mut f32>,
    ) {
        let (rows, units, panels) = part;
        let mut row = rows.start;
        for height in heights::<WideOf<P>>(rows.len()) {
            // SAFETY: passed on; the scratch has room for the rows.
            unsafe {
                // Before the first row there is nothing that could be read with it.
                let in_place = P::BYTES == size_of::<f32>() || row > 0;
                let rows_of = if in_place { rows_of::<P> } else { rows_of::<P::Unit> };
                let tile = if in_place { tile_of::<P>(height) } else { tile_of::<P::Unit>(height) };
                let a = rows_of(job.weight, row..row + height, units.clone(), widened);
                let mut ahead = job.ahead::<P>(row + height, &units, &panels);
                for (panel, sums) in panels.clone().zip(to.sums.chunks_exact_mut(to.of_panel)) {
                    let b = job.panels.row(panel)[units.start * PANEL..].as_ptr().cast();
                    let factors = Factors { a, b, depth: units.len(), ahead };
                    let sums = sums[(to.at + row - rows.start) * PANEL..].as_mut_ptr();
                    let target = Target { y: sums, ldy: PANEL, accumulate: to.accumulate };
                    let tokens = job.tokens_of(panel);
                    if let Some(y) = y {
                        let share = [row, row + height].map(|row| (row - rows.start) * tokens.len() / rows.len());
                        job.ask(y, tokens.start + share[0]..tokens.start + share[1], &rows);
                    }
                    tile(factors, target, tokens.len());
                    ahead.at = ahead.at.wrapping_add(ahead.lines * LINE);
                }
            }
            row += height;
        }
    }
}

/// What takes columns of a product, for some tokens: those from the first half of the weight's rows beside those from the other,
/// token after token.
pub type Take<'a> = &'a (dyn Fn(Range<usize>, Range<usize>, &[f32]) + Sync);

/// `x Wᵀ` for a `w` of two halves, below one another, whose columns with one number are wanted together: `take` is called with all
/// tokens and columns of a half, some at a time.
///
/// # Panics
/// When the shapes do not fit together, or by tiles of AMX.
pub fn forward_in_halves(level: Level, x: View<'_>, w: Panels<'_>, shape: (usize, usize), take: Take<'_>) {
    let (weight, level) = Weight::new(level, w, shape);
    assert!(x.cols == weight.cols && weight.rows.is_multiple_of(2), "product: shapes do not fit");
    assert!(level.parts().is_none(), "product: halves by AMX");
    match w {
        Panels::Bf16(_) if level == Level::Avx512 && widens_in_registers() => halves::<WidenedRows>(x, weight, take),
        _ => at_level!(level, halves(x, weight, take)),
    }
}

fn halves<P: Reading>(x: View<'_>, weight: Weight<'_>, take: Take<'_>) {
    let half = weight.rows / 2;
    let panels = token_panels::<P::Unit>(Threads::All, x);
    let job = Forward { weight, tokens: x.rows, panels: &panels, ldy: 0, accumulate: false };
    in_shares(half.div_ceil(GROUP), |groups| {
        for first in groups {
            let columns = first * GROUP..((first + 1) * GROUP).min(half);
            // SAFETY: the level found the instructions; the assert of `forward_in_halves` bounds what is read of x and w.
            unsafe { group_of_halves::<P>(&job, columns, take) };
        }
    });
}

for_each_width! {
    /// Columns of both halves, for all tokens.
    ///
    /// # Safety
    /// They lie inside the weight; the processor has the instructions.
    unsafe fn group_of_halves<P: Reading>(job: &Forward<'_>, columns: Range<usize>, take: Take<'_>) {
        let (half, width) = (job.weight.rows / 2, 2 * columns.len());
        let of_panel = width * PANEL;
        let together = (TOGETHER / job.units().min(DEPTH)).max(1);
        SCRATCH.with_borrow_mut(|scratch| {
            for first in (0..job.panels.rows()).step_by(together) {
                let panels = first..(first + together).min(job.panels.rows());
                let (widened, room) = room(scratch, of_panel * (panels.len() + 1));
                let (in_rows, sums) = room.split_at_mut(of_panel);
                for units in chunks(job.units(), DEPTH) {
                    let of_halves = [columns.clone(), half + columns.start..half + columns.end];
                    for (rows, at) in of_halves.into_iter().zip([0, columns.len()]) {
                        let part = (rows, units.clone(), panels.clone());
                        let to = Room { sums, of_panel, at, accumulate: units.start > 0 };
                        // SAFETY: passed on.
                        unsafe { sum_rows::<P>(job, part, widened, to, None) };
                    }
                }
                for (panel, sums) in panels.zip(sums.chunks_exact(of_panel)) {
                    let tokens = job.tokens_of(panel);
                    let target = Target { y: in_rows.as_mut_ptr(), ldy: width, accumulate: false };
                    // SAFETY: a panel's tokens have room.
                    unsafe { transpose::<WideOf<P>>(sums, tokens.len(), target) };
                    take(tokens.clone(), columns.clone(), &in_rows[..tokens.len() * width]);
                }
            }
        });
    }
}

for_each_width! {
    /// Sums of a panel of `tokens` tokens to rows of y.
    ///
    /// # Safety
    /// y has them; the processor has the instructions.
    unsafe fn transpose<W: Wide>(sums: &[f32], tokens: usize, target: Target) {
        let sums = sums.as_chunks::<PANEL>().0;
        for token in (0..tokens).step_by(LANES) {
            for (i, rows) in sums.chunks(LANES).enumerate() {
                // SAFETY: passed on; of each row 16 sums from `token` on are there.
                unsafe {
                    let y = target.y.wrapping_add(token * target.ldy + i * LANES);
                    let target = Target { y, ..target };
                    if rows.len() == LANES && tokens - token >= LANES {
                        let at = rows.as_flattened()[token..].as_ptr();
                        let block = std::array::from_fn(|row| W::load(at.wrapping_add(row * PANEL)));
                        target.store_transposed(block, LANES, LANES);
                        continue;
                    }
                    let mut block = [W::zero(); LANES];
                    for (to, row) in block.iter_mut().zip(rows) {
                        *to = Wide::load(row[token..].as_ptr());
                    }
                    target.store_transposed(block, LANES.min(tokens - token), rows.len());
                }
            }
        }
    }
}

for_each_width! {
    /// Some units of some rows of a weight: where they lie, if those are f32 or pairs, else widened in `scratch`.
    ///
    /// # Safety
    /// They are inside the weight; `scratch` has room.
    unsafe fn rows_of<P: Reading>(weight: Weight<'_>, rows: Range<usize>, units: Range<usize>, scratch: &mut [f32]) -> Rows {
        let Weight { w, rows: all, .. } = weight;
        let at = |unit: usize| packed_at(all, rows.start, unit * P::Unit::ELEMENTS);
        if P::BYTES < size_of::<f32>() || P::Unit::ELEMENTS > 1 || matches!(w, Panels::F32(_)) {
            return Rows { at: w.address(at(units.start)), next: all * P::Unit::RUN * P::BYTES };
        }
        let next = rows.len() * PANEL;
        for (unit, out) in units.step_by(PANEL).zip(scratch.chunks_exact_mut(next)) {
            for i in (0..next).step_by(LANES) {
                // SAFETY: a panel has PANEL elements of each of the rows, side by side.
                unsafe { w.load::<WideOf<P>>(at(unit) + i).store(out.as_mut_ptr().add(i)) };
            }
        }
        Rows { at: scratch.as_ptr().cast(), next: next * size_of::<f32>() }
    }
}

impl Forward<'_> {
    fn units(&self) -> usize {
        self.panels.cols() / PANEL
    }

    fn tokens_of(&self, panel: usize) -> Range<usize> {
        panel * PANEL..self.tokens.min((panel + 1) * PANEL)
    }

    /// Asks memory for some columns of some tokens' rows of y, to which sums will go.
    fn ask(&self, y: *const f32, tokens: Range<usize>, columns: &Range<usize>) {
        for token in tokens {
            for column in columns.clone().step_by(LANES) {
                prefetch_to_write(y.wrapping_add(token * self.ldy + column).cast());
            }
        }
    }

    /// Those units of a tile's rows from `row` on, for the tiles before them: some for each panel of tokens.
    fn ahead<P: Reading>(&self, row: usize, units: &Range<usize>, panels: &Range<usize>) -> Ahead {
        let Weight { w, rows, .. } = self.weight;
        let at = w.address(packed_at(rows, row, units.start * P::Unit::ELEMENTS));
        let of_row = w.address(PANEL) as usize - w.address(0) as usize;
        Ahead { at, next: rows * of_row, lines: (<WideOf<P>>::ROWS * of_row).div_ceil(LINE * panels.len()) }
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
            // With fixed numbers of them the block stays in registers.
            if tokens.len() == LANES && columns.len() == LANES * U::ELEMENTS && to.1 == LANES {
                assert!(columns.end <= x.row(tokens.end - 1).len(), "product: a block inside x");
                let from = x.data.as_ptr().wrapping_add(x.offset + tokens.start * x.stride + columns.start);
                let mut block = std::array::from_fn(|token| {
                    let from = from.wrapping_add(token * x.stride);
                    prefetch::<_MM_HINT_T0>(from.wrapping_add(LANES * x.stride).cast());
                    U::of(std::slice::from_raw_parts(from, LANES * U::ELEMENTS))
                });
                U::Wide::transpose(&mut block);
                for (unit, values) in block.iter().enumerate() {
                    values.store(to.0.add(unit * PANEL));
                }
                return;
            }
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
