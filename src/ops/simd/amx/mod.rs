//! Products by AMX: tiles of 16 lines of 64 bytes, of which two give 16 x 16 sums of 32 products of bf16 each, at about
//! fifteen times the rate of FMA.
//!
//! A tile of the left side holds 16 rows, 32 elements each; one of the right side pairs of elements that follow each other in
//! the contraction, of 16 columns of the result. The right side is laid out so for 32 columns at a time, which all rows of the
//! left side are multiplied by.
//!
//! With a weight the left side is rounded to bf16, or, where the result has to be close to f32's, cut into two bf16: what
//! rounding leaves and what it took. Their sum is within 2⁻¹⁷ of the element, PyTorch's "high" precision of f32 products, which
//! LitGPT asks for; products of a part and a bf16 weight are exact, and summed up in f32. AMX takes numbers below 2⁻¹²⁶ for zero,
//! and what rounds to no bf16 is infinite.

mod fill;
mod registers;

use super::tile::LINE;
use super::wide::LANES;
use super::{PANEL, Shared, Weight, checked, in_shares};
use crate::ops::matmul::{Side, ViewMut, fits};
use crate::ops::matrix::{Matrix, View};
use half::bf16;
use registers::{Ahead, Factors, Sums, Tiles};
use std::cell::RefCell;
use std::ops::Range;

/// Units of 32 bits of two tiles: of 32 rows, or of 32 columns.
const TILES: usize = 512;

/// Blocks of 32 elements of the contraction that are multiplied at a time, so that the right side stays in the first-level
/// cache.
const DEPTH: usize = 18;

/// How products read the weight.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Contraction {
    /// `x Wᵀ`.
    Columns,
    /// `dy W`.
    Rows,
}

/// Whether this processor has the instructions, and the system lets the process use them.
#[cfg(target_os = "linux")]
pub fn is_available() -> bool {
    /// `ARCH_REQ_XCOMP_PERM`, and the state that is asked for.
    const REQUEST: libc::c_long = 0x1023;
    const TILE_DATA: libc::c_long = 18;
    use std::arch::x86_64::{__cpuid, __cpuid_count};
    let leaf = (__cpuid(0).eax >= 7).then(|| __cpuid_count(7, 0));
    let tiles = leaf.is_some_and(|leaf| leaf.edx >> 22 & 1 == 1 && leaf.edx >> 24 & 1 == 1);
    // SAFETY: asks the system to keep the tiles of this process; older ones answer that they do not know the request.
    let kept = || unsafe { libc::syscall(libc::SYS_arch_prctl, REQUEST, TILE_DATA) } == 0;
    tiles && is_x86_feature_detected!("avx512bf16") && kept()
}

/// Only Linux is asked.
#[cfg(not(target_os = "linux"))]
pub fn is_available() -> bool {
    false
}

/// The product of `x` and a bf16 weight, added to `y` where `accumulate`; `parts`: into how many bf16 an element of `x` is
/// cut, 1 or 2. The shapes fit together.
pub fn product(
    contraction: Contraction,
    parts: usize,
    x: View<'_>,
    (w, weight): (&[bf16], Weight<'_>),
    y: ViewMut<'_>,
    accumulate: bool,
) {
    assert!(fits(x.data.len(), x.offset, x.rows, x.cols, x.stride), "product: x leaves its data");
    let y_at = checked(&y);
    let (strips, blocks) = (x.rows.div_ceil(PANEL), x.cols.div_ceil(PANEL));
    let mut units = Matrix::new(1, strips * blocks * parts * TILES + LANES);
    let first = line(&units);
    let to = Shared(units.as_mut_ptr());
    in_shares(strips * blocks, |share| {
        for at in share {
            // SAFETY: the level found the instructions; every block has its tiles.
            unsafe {
                fill::cut(x, (at / blocks * PANEL, at % blocks * PANEL), parts, to.at(first + at * parts * TILES))
            };
        }
    });
    let of_panel = weight.rows * LINE;
    let [strip, block] = match contraction {
        Contraction::Columns => [PANEL * LINE, of_panel],
        Contraction::Rows => [of_panel, PANEL * LINE],
    };
    let source = Source { at: w.as_ptr().cast(), strip, block };
    let left = &units[first..];
    let job = Job { left, blocks, parts, source, rows: x.rows, columns: y.cols, ldy: y.stride, accumulate };
    let y = Shared(y.data.as_mut_ptr());
    in_shares(job.columns.div_ceil(PANEL), |strips| {
        // SAFETY: the level found the instructions; the shapes fit; strips have columns of y of their own.
        unsafe {
            job.run(y.at(y_at), strips, |strip, block, to| match contraction {
                Contraction::Columns => fill::transposed_panel(w, weight.rows, [block, strip], to),
                Contraction::Rows => fill::interleaved_panel(w, weight.rows, [strip, block], to),
            });
        }
    });
}

thread_local! {
    static LEFT: RefCell<Vec<f32>> = const { RefCell::new(Vec::new()) };
    static RIGHT: RefCell<Vec<f32>> = const { RefCell::new(Vec::new()) };
}

/// `dst = alpha · lhs · rhs`, added to `dst` where `accumulate`, both sides rounded to bf16, on this thread.
///
/// # Safety
/// The shapes fit, none is empty, every element of the three views is inside its data, and the processor has the instructions.
pub unsafe fn rounded(dst: ViewMut<'_>, accumulate: bool, alpha: f32, lhs: Side<'_>, rhs: Side<'_>) {
    let depth = match lhs {
        Side::N(v) => v.cols,
        Side::T(v) => v.rows,
    };
    let (strips, blocks) = (dst.rows.div_ceil(PANEL), depth.div_ceil(PANEL));
    LEFT.with_borrow_mut(|left| {
        let left = room(left, strips * blocks * TILES);
        for (at, to) in left.chunks_exact_mut(TILES).enumerate() {
            let place = [at / blocks * PANEL, at % blocks * PANEL];
            // SAFETY: passed on.
            unsafe { fill::left(lhs, place, alpha, to) };
        }
        let source = Source { at: left.as_ptr().cast(), strip: 0, block: 0 };
        let (rows, columns, ldy) = (dst.rows, dst.cols, dst.stride);
        let job = Job { left, blocks, parts: 1, source, rows, columns, ldy, accumulate };
        let y = dst.data.as_mut_ptr().wrapping_add(dst.offset);
        // SAFETY: passed on.
        unsafe {
            job.run(y, 0..dst.cols.div_ceil(PANEL), |strip, block, to| {
                fill::right(rhs, [block * PANEL, strip * PANEL], to);
            });
        }
    });
}

/// Index from which on units lie at the beginning of a cache line.
fn line(of: &[f32]) -> usize {
    of.as_ptr().align_offset(64).min(LANES)
}

/// So many units in whole lines.
fn room(of: &mut Vec<f32>, units: usize) -> &mut [f32] {
    if of.len() < units + LANES {
        of.resize(units + LANES, 0.0);
    }
    let first = line(of);
    &mut of[first..first + units]
}

/// A product whose left side is in tiles.
struct Job<'a> {
    /// Of 32 rows, block by block of 32 elements, two tiles of each part.
    left: &'a [f32],
    blocks: usize,
    parts: usize,
    source: Source,
    rows: usize,
    columns: usize,
    ldy: usize,
    accumulate: bool,
}

/// Where in memory the right side comes from, in bytes from 32 columns to the next and from block to block.
#[derive(Clone, Copy)]
struct Source {
    at: *const i8,
    strip: usize,
    block: usize,
}

// SAFETY: memory is only asked for.
unsafe impl Sync for Source {}

impl Source {
    /// What memory is asked for while some of `rows` rows, from `row` on, are multiplied: their share of a strip's blocks.
    fn ahead(&self, strip: usize, block: usize, row: usize, rows: usize) -> Ahead {
        let lines = PANEL.div_ceil(rows.div_ceil(PANEL));
        let at = self.at.wrapping_add(strip * self.strip + block * self.block + row / PANEL * lines * LINE);
        Ahead { at, next: self.block, lines }
    }
}

impl Job<'_> {
    /// Some times 32 columns of y; `make` makes the two tiles of 32 columns and a block of the contraction.
    ///
    /// # Safety
    /// y has all rows and columns; `make` fills the tiles; the processor has the instructions.
    unsafe fn run(&self, y: *mut f32, strips: Range<usize>, make: impl Fn(usize, usize, &mut [f32])) {
        RIGHT.with_borrow_mut(|scratch| {
            let (right, edge) = room(scratch, (DEPTH + 3) * TILES).split_at_mut(DEPTH * TILES);
            let mut tiles = Tiles::new();
            for strip in strips {
                let columns = PANEL.min(self.columns - strip * PANEL);
                for blocks in depths(self.blocks) {
                    let right = &mut right[..blocks.len() * TILES];
                    blocks.clone().zip(right.chunks_exact_mut(TILES)).for_each(|(block, to)| make(strip, block, to));
                    for row in (0..self.rows).step_by(PANEL) {
                        let left = &self.left[(row / PANEL * self.blocks + blocks.start) * self.parts * TILES..];
                        let ahead = self.source.ahead(strip + 1, blocks.start, row, self.rows);
                        let factors = Factors { left, right, parts: self.parts, ahead };
                        let sums = Sums {
                            y: y.wrapping_add(row * self.ldy + strip * PANEL),
                            ldy: self.ldy,
                            rows: PANEL.min(self.rows - row),
                            columns,
                            accumulate: self.accumulate || blocks.start > 0,
                        };
                        // SAFETY: passed on.
                        unsafe { tiles.multiply(factors, sums, edge) };
                    }
                }
            }
        });
    }
}

/// Blocks in equal chunks.
fn depths(blocks: usize) -> impl Iterator<Item = Range<usize>> {
    let chunks = blocks.div_ceil(DEPTH);
    (0..chunks).map(move |i| i * blocks / chunks..(i + 1) * blocks / chunks)
}
