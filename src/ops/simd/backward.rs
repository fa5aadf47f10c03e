//! `dx = dy W`: elements of some rows of dy times vectors over W's columns.

use super::tile::{Ahead, Factors, LINE, Rows, Target, heights, of_height};
use super::wide::{LANES, Wide, for_each_width};
use super::{
    Level, PANEL, Panels, SCRATCH, Shared, Weight, at_level, checked, chunks, in_shares, pack_rows, packed_at,
};
use crate::ops::matmul::ViewMut;
use crate::ops::matrix::View;
use half::bf16;
use std::ops::Range;

/// Depth of a chunk of the contraction: 64 KB of a panel, which all tokens are multiplied by before the next.
const DEPTH: usize = 512;

/// `dx = dy W`, added to `dx` where `accumulate`; `w` is (rows, cols).
///
/// # Panics
/// When the shapes do not fit together.
pub fn backward(level: Level, dy: View<'_>, w: Panels<'_>, shape: (usize, usize), dx: ViewMut<'_>, accumulate: bool) {
    let (rows, cols) = shape;
    let weight = Weight::new(level, w, shape);
    assert!(dy.cols == rows && dx.cols == cols && dx.rows == dy.rows, "product: shapes do not fit");
    if dy.rows == 0 || cols == 0 {
        return;
    }
    let dx_at = checked(&dx);
    let units = rows.div_ceil(weight.per_unit());
    // Rows far apart would miss the caches and page tables.
    let packed = pack_rows(level, dy, weight.pairs, units);
    let job = Backward { weight, tokens: dy.rows, units, ldy: dx.stride, accumulate };
    let (a, dx) = (Shared(packed.as_ptr().cast_mut()), Shared(dx.data.as_mut_ptr()));
    in_shares(cols.div_ceil(PANEL), |panels| {
        // SAFETY: `level` found the instructions; the asserts bound what is read of dy and w and written of dx; each
        // panel's columns are in one share.
        unsafe { at_level!(level, run(&job, a.at(0), dx.at(dx_at), panels)) };
    });
}

struct Backward<'a> {
    weight: Weight<'a>,
    tokens: usize,
    units: usize,
    /// Elements from one row of dx to the next.
    ldy: usize,
    accumulate: bool,
}

for_each_width! {
    /// Some panels of columns of dx.
    ///
    /// # Safety
    /// See `backward`.
    unsafe fn run<W>(job: &Backward<'_>, a: *const f32, dx: *mut f32, panels: Range<usize>) {
        SCRATCH.with_borrow_mut(|scratch| {
            scratch.resize(DEPTH * PANEL, 0.0);
            for units in chunks(job.units, DEPTH) {
                for panel in panels.clone() {
                    // SAFETY: units and panel lie inside the weight, which the scratch has room for.
                    unsafe {
                        let b = vectors::<W>(job, panel, units.clone(), scratch);
                        tiles::<W>(job, a, b, (units.clone(), panel), dx);
                    }
                }
            }
        });
    }
}

for_each_width! {
    /// The columns of a panel, for each of some units: where they lie, if those are f32, else made in `scratch`.
    ///
    /// # Safety
    /// They are inside the weight; `scratch` has room.
    unsafe fn vectors<W>(job: &Backward<'_>, panel: usize, units: Range<usize>, scratch: &mut [f32]) -> *const f32 {
        let Weight { w, rows, pairs, .. } = job.weight;
        if let Panels::F32(w) = w {
            return w[job.element(panel, units.start)..].as_ptr();
        }
        /// What is paired with the last of an odd number of rows.
        static NONE: [bf16; PANEL] = [bf16::ZERO; PANEL];
        for (unit, out) in units.zip(scratch.as_chunks_mut::<PANEL>().0) {
            let at = job.element(panel, unit);
            for lane in [0, LANES] {
                // SAFETY: a row of a panel has 32 elements.
                unsafe {
                    let values: W = match w {
                        Panels::Bf16(w) if pairs => {
                            let low = w.as_ptr().add(at);
                            let high = if 2 * unit + 1 < rows { low.add(PANEL) } else { NONE.as_ptr() };
                            W::load_pairs(low.add(lane), high.add(lane))
                        }
                        _ => job.weight.load(at + lane),
                    };
                    values.store(out.as_mut_ptr().add(lane));
                }
            }
        }
        scratch.as_ptr()
    }
}

for_each_width! {
    /// All rows of dy by some units of a panel.
    ///
    /// # Safety
    /// `a` is packed dy, `b` has the units of the panel, and dx as many rows as dy.
    unsafe fn tiles<W>(
        job: &Backward<'_>,
        a: *const f32,
        b: *const f32,
        part: (Range<usize>, usize),
        dx: *mut f32,
    ) {
        let (units, panel) = part;
        let accumulate = job.accumulate || units.start > 0;
        let (depth, pairs, width) = (units.len(), job.weight.pairs, job.weight.cols - panel * PANEL);
        let mut ahead = job.ahead(panel + 1, &units, job.tokens.div_ceil(W::ROWS));
        let mut token = 0;
        for height in heights::<W>(job.tokens) {
            let at = a.wrapping_add(token * job.units.next_multiple_of(PANEL));
            let rows = Rows { at, run: PANEL, next: height * PANEL }.from(0, units.start);
            let factors = Factors { a: rows, b, depth, pairs, ahead };
            // SAFETY: the tile's tokens are some of dx's.
            unsafe {
                let target = Target { y: dx.add(token * job.ldy + panel * PANEL), ldy: job.ldy, accumulate };
                of_height!(W, height, tile as unsafe fn(Factors, Target, usize))(factors, target, width);
            }
            ahead.at = ahead.at.wrapping_add(ahead.next * depth.div_ceil(PANEL));
            token += height;
        }
    }
}

impl Backward<'_> {
    /// Index of the first element of a unit in a panel.
    fn element(&self, panel: usize, unit: usize) -> usize {
        packed_at(self.weight.rows, unit * self.weight.per_unit(), panel * PANEL)
    }

    /// The same units of the next panel, some for each of the `tiles` tiles that go before it.
    fn ahead(&self, panel: usize, units: &Range<usize>, tiles: usize) -> Ahead {
        let w = self.weight.w;
        let (from, to) = (self.element(panel, units.start), self.element(panel, units.end));
        let bytes = w.address(to) as usize - w.address(from) as usize;
        let lines = bytes.div_ceil(LINE * tiles * units.len().div_ceil(PANEL));
        Ahead { at: w.address(from), next: lines * LINE, lines }
    }
}

for_each_width! {
    /// `R` rows of dx.
    ///
    /// # Safety
    /// As for `Factors::sums` and `Target::store`.
    unsafe fn tile<W; const R: usize>(factors: Factors, target: Target, columns: usize) {
        // SAFETY: passed on.
        unsafe {
            target.ask(R);
            if W::BESIDE > 1 {
                return target.store(&factors.sums::<W, R, 2>(), columns);
            }
            for lane in [0, LANES].into_iter().filter(|lane| *lane < columns) {
                let factors = Factors { b: factors.b.wrapping_add(lane), ..factors };
                let target = Target { y: target.y.wrapping_add(lane), ..target };
                target.store(&factors.sums::<W, R, 1>(), columns - lane);
            }
        }
    }
}
