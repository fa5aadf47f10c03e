//! `dx = dy W`: elements of some rows of dy times vectors over W's columns.

use super::tile::{Ahead, Factors, LANES, LINE, MR, Rows, Target, heights, of_height};
use super::{Level, PANEL, Panels, SCRATCH, Shared, Weight, checked, chunks, in_shares, pack_rows, packed_at};
use crate::ops::matmul::ViewMut;
use crate::ops::matrix::View;
use std::arch::x86_64::*;
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
    let packed = pack_rows(dy, weight.pairs, units);
    let job = Backward { weight, tokens: dy.rows, units, ldy: dx.stride, accumulate };
    let (a, dx) = (Shared(packed.as_ptr().cast_mut()), Shared(dx.data.as_mut_ptr()));
    in_shares(cols.div_ceil(PANEL), |panels| {
        // SAFETY: `level` found the instructions; the asserts bound what is read of dy and w and written of dx; each
        // panel's columns are in one share.
        unsafe { job.run(a.at(0), dx.at(dx_at), panels) };
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

impl Backward<'_> {
    /// # Safety
    /// See `backward`.
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,f16c,fma")]
    unsafe fn run(&self, a: *const f32, dx: *mut f32, panels: Range<usize>) {
        SCRATCH.with_borrow_mut(|scratch| {
            scratch.resize(DEPTH * PANEL, 0.0);
            for units in chunks(self.units, DEPTH) {
                for panel in panels.clone() {
                    // SAFETY: units and panel lie inside the weight, which the scratch has room for.
                    unsafe {
                        let b = self.vectors(panel, units.clone(), scratch);
                        self.tiles(a, b, units.clone(), panel, dx);
                    }
                }
            }
        });
    }

    /// Index of the first element of a unit in a panel.
    fn element(&self, panel: usize, unit: usize) -> usize {
        packed_at(self.weight.rows, unit * self.weight.per_unit(), panel * PANEL)
    }

    /// The columns of a panel, for each of some units: where they lie, if those are f32, else made in `scratch`.
    ///
    /// # Safety
    /// They are inside the weight; `scratch` has room.
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,f16c,fma")]
    unsafe fn vectors(&self, panel: usize, units: Range<usize>, scratch: &mut [f32]) -> *const f32 {
        let Weight { w, rows, pairs, .. } = self.weight;
        if let Panels::F32(w) = w {
            return w[self.element(panel, units.start)..].as_ptr();
        }
        for (unit, out) in units.zip(scratch.as_chunks_mut::<PANEL>().0) {
            let at = self.element(panel, unit);
            for half in 0..2 {
                // SAFETY: a row of a panel has 32 elements, and of an odd number of rows the last has none to pair with;
                // bf16 is a u16.
                unsafe {
                    let values = match w {
                        Panels::Bf16(w) if pairs => {
                            let at = w.as_ptr().add(at + half * LANES).cast();
                            let low = _mm512_cvtepu16_epi32(_mm256_loadu_si256(at));
                            let paired = if 2 * unit + 1 < rows { u16::MAX } else { 0 };
                            let high = _mm256_maskz_loadu_epi16(paired, at.cast::<i16>().wrapping_add(PANEL));
                            let high = _mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(high));
                            _mm512_castsi512_ps(_mm512_or_si512(low, high))
                        }
                        _ => self.weight.load(at + half * LANES),
                    };
                    _mm512_storeu_ps(out.as_mut_ptr().add(half * LANES), values);
                }
            }
        }
        scratch.as_ptr()
    }

    /// All rows of dy by some units of a panel.
    ///
    /// # Safety
    /// `a` is packed dy, `b` has the units of the panel, and dx as many rows as dy.
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,f16c,fma")]
    unsafe fn tiles(&self, a: *const f32, b: *const f32, units: Range<usize>, panel: usize, dx: *mut f32) {
        let accumulate = self.accumulate || units.start > 0;
        let (depth, pairs, width) = (units.len(), self.weight.pairs, self.weight.cols - panel * PANEL);
        let mut ahead = self.ahead(panel + 1, &units);
        let mut token = 0;
        for height in heights(self.tokens) {
            let at = a.wrapping_add(token * self.units.next_multiple_of(PANEL));
            let rows = Rows { at, run: PANEL, next: height * PANEL }.from(0, units.start);
            let factors = Factors { a: rows, b, depth, pairs, ahead };
            // SAFETY: the tile's tokens are some of dx's.
            unsafe {
                let target = Target { y: dx.add(token * self.ldy + panel * PANEL), ldy: self.ldy, accumulate };
                of_height!(height, tile(factors, target, width));
            }
            ahead.at = ahead.at.wrapping_add(ahead.next * depth.div_ceil(PANEL));
            token += height;
        }
    }

    /// The same units of the next panel, some for each tile that goes before it.
    fn ahead(&self, panel: usize, units: &Range<usize>) -> Ahead {
        let w = self.weight.w;
        let (from, to) = (self.element(panel, units.start), self.element(panel, units.end));
        let bytes = w.address(to) as usize - w.address(from) as usize;
        let lines = bytes.div_ceil(LINE * self.tokens.div_ceil(MR) * units.len().div_ceil(PANEL));
        Ahead { at: w.address(from), next: lines * LINE, lines }
    }
}

/// `R` rows of dx.
///
/// # Safety
/// As for `Factors::sums` and `Target::store`.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,f16c,fma")]
unsafe fn tile<const R: usize>(factors: Factors, target: Target, columns: usize) {
    // SAFETY: passed on.
    unsafe {
        target.ask(R);
        target.store(&factors.sums::<R, 2>(), columns);
    }
}
