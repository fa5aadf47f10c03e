//! `dx = dy W`: elements of some rows of dy times vectors over W's columns.

use super::amx::{self, Contraction};
use super::tile::{Ahead, Factors, LINE, Rows, Target, heights, tile_of};
use super::wide::{LANES, PairedVectors, Reading, Unit, Wide, WideOf, WidenedVectors, for_each_width};
use super::{
    Level, PANEL, Panels, SCRATCH, Shared, Weight, at_level, checked, chunks, in_shares, pack_rows, packed_at,
    widens_in_registers,
};
use crate::ops::matmul::ViewMut;
use crate::ops::matrix::View;
use std::ops::Range;

/// Depth of a chunk of the contraction: 64 KB of a panel, which all tokens are multiplied by before the next.
const DEPTH: usize = 512;
/// Units of dy of which only so many go together that they stay in the second-level cache, as every share reads them: those of
/// a loss over a large vocabulary.
const MANY: usize = 1 << 20;
const NEAR: usize = 128 << 10;

/// `dx = dy W`, added to `dx` where `accumulate`; `w` is (rows, cols).
///
/// # Panics
/// When the shapes do not fit together.
pub fn backward(level: Level, dy: View<'_>, w: Panels<'_>, shape: (usize, usize), dx: ViewMut<'_>, accumulate: bool) {
    let (weight, level) = Weight::new(level, w, shape);
    assert!(dy.cols == weight.rows && dx.cols == weight.cols && dx.rows == dy.rows, "product: shapes do not fit");
    if dy.rows > 0 && weight.cols > 0 {
        match (level.parts(), w) {
            (Some(parts), Panels::Bf16(w)) => amx::product(Contraction::Rows, parts, dy, (w, weight), dx, accumulate),
            (_, Panels::Bf16(_)) if level == Level::Avx512 && widens_in_registers() => {
                product::<WidenedVectors>(dy, weight, dx, accumulate);
            }
            (_, Panels::Bf16(_)) if level == Level::Avx512Bf16 && weight.rows.is_multiple_of(2) => {
                product::<PairedVectors>(dy, weight, dx, accumulate);
            }
            _ => at_level!(level, product(dy, weight, dx, accumulate)),
        }
    }
}

fn product<P: Reading>(dy: View<'_>, weight: Weight<'_>, dx: ViewMut<'_>, accumulate: bool) {
    let dx_at = checked(&dx);
    let dx_to = Shared(dx.data.as_mut_ptr());
    let units = weight.rows.div_ceil(P::Unit::ELEMENTS);
    let together = if dy.rows * units > MANY { (NEAR / dy.rows / DEPTH).max(1) * DEPTH } else { units };
    for first in (0..units).step_by(together.max(1)) {
        let columns = first * P::Unit::ELEMENTS..((first + together) * P::Unit::ELEMENTS).min(dy.cols);
        // Rows far apart would miss the caches and page tables.
        let packed = pack_rows::<P::Unit>(dy.slice_cols(columns), DEPTH);
        let job = Backward {
            weight,
            tokens: dy.rows,
            first,
            units: together.min(units - first),
            ldy: dx.stride,
            accumulate: accumulate || first > 0,
        };
        let a = Shared(packed.as_ptr().cast_mut());
        in_shares(weight.cols.div_ceil(PANEL), |panels| {
            // SAFETY: the level found the instructions; the asserts of `backward` bound what is read of dy and w and written
            // of dx; each panel's columns are in one share.
            unsafe { run::<P>(&job, a.at(0), dx_to.at(dx_at), panels) };
        });
    }
}

struct Backward<'a> {
    weight: Weight<'a>,
    tokens: usize,
    /// The first unit of the weight's rows, and how many of them.
    first: usize,
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
    unsafe fn run<P: Reading>(job: &Backward<'_>, a: *const f32, dx: *mut f32, panels: Range<usize>) {
        SCRATCH.with_borrow_mut(|scratch| {
            scratch.resize(DEPTH * PANEL, 0.0);
            for units in chunks(job.units, DEPTH) {
                for panel in panels.clone() {
                    // SAFETY: units and panel lie inside the weight, which the scratch has room for.
                    unsafe {
                        let b = vectors::<P>(job, panel, units.clone(), scratch);
                        tiles::<P>(job, a, b, (units.clone(), panel), dx);
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
    unsafe fn vectors<P: Reading>(
        job: &Backward<'_>,
        panel: usize,
        units: Range<usize>,
        scratch: &mut [f32],
    ) -> *const i8 {
        let Weight { w, rows, .. } = job.weight;
        if P::SPLIT || matches!(w, Panels::F32(_)) {
            return w.address(job.element::<P>(panel, units.start));
        }
        for (unit, out) in units.zip(scratch.as_chunks_mut::<PANEL>().0) {
            let (at, last) = (job.element::<P>(panel, unit), P::Unit::ELEMENTS * (job.first + unit) + 1 == rows);
            for lane in [0, LANES] {
                // SAFETY: a row of a panel has 32 elements.
                unsafe { P::Unit::of_rows(w, at + lane, last).store(out.as_mut_ptr().add(lane)) };
            }
        }
        scratch.as_ptr().cast()
    }
}

for_each_width! {
    /// All rows of dy by some units of a panel.
    ///
    /// # Safety
    /// `a` is packed dy, `b` has the units of the panel, and dx as many rows as dy.
    unsafe fn tiles<P: Reading>(
        job: &Backward<'_>,
        a: *const f32,
        b: *const i8,
        part: (Range<usize>, usize),
        dx: *mut f32,
    ) {
        let (units, panel) = part;
        let accumulate = job.accumulate || units.start > 0;
        let (depth, width) = (units.len(), job.weight.cols - panel * PANEL);
        let mut ahead = job.ahead::<P>(panel + 1, &units, job.tokens.div_ceil(<WideOf<P>>::ROWS));
        let mut token = 0;
        for height in heights::<WideOf<P>>(job.tokens) {
            let at = a.wrapping_add(job.tokens * units.start + token * depth.next_multiple_of(PANEL)).cast();
            let factors = Factors { a: Rows { at, next: height * P::Unit::RUN * P::BYTES }, b, depth, ahead };
            // SAFETY: the tile's tokens are some of dx's.
            unsafe {
                let target = Target { y: dx.add(token * job.ldy + panel * PANEL), ldy: job.ldy, accumulate };
                tile_of::<P>(height)(factors, target, width);
            }
            ahead.at = ahead.at.wrapping_add(ahead.next * depth.div_ceil(P::Unit::RUN));
            token += height;
        }
    }
}

impl Backward<'_> {
    /// Index of the first element of a unit in a panel.
    fn element<P: Reading>(&self, panel: usize, unit: usize) -> usize {
        packed_at(self.weight.rows, (self.first + unit) * P::Unit::ELEMENTS, panel * PANEL)
    }

    /// The same units of the next panel, some for each of the `tiles` tiles that go before it.
    fn ahead<P: Reading>(&self, panel: usize, units: &Range<usize>, tiles: usize) -> Ahead {
        let w = self.weight.w;
        let (from, to) = (self.element::<P>(panel, units.start), self.element::<P>(panel, units.end));
        let bytes = w.address(to) as usize - w.address(from) as usize;
        let lines = bytes.div_ceil(LINE * tiles * units.len().div_ceil(P::Unit::RUN));
        Ahead { at: w.address(from), next: lines * LINE, lines }
    }
}
