//! The inner loop of the products: a tile of sums, and its ways into the result.

use super::wide::{LANES, Reading, Unit, Wide, WideOf, for_each_width};
use std::arch::{asm, x86_64::*};

/// Rows of the highest tile.
pub const MOST_ROWS: usize = 12;

/// `R` rows of sums, each of `V` times 16.
pub type Sums<W, const R: usize, const V: usize> = [[W; V]; R];

/// Broadcast rows of a tile, in panels: the rows' units of one after another, then those of the next.
#[derive(Clone, Copy)]
pub struct Rows {
    /// Units of the first row.
    pub at: *const i8,
    /// Bytes from one panel to the next.
    pub next: usize,
}

/// A function over a [`Wide`] or [`Unit`] with the height of a tile as its const argument: one of a table, so that registers
/// are given to the inner loop of each height alone. A `match` would have all inlined into one function, with sums in memory.
macro_rules! of_height {
    ($w:ident, $height:expr, $name:ident as $type:ty) => {{
        let low: &[$type; 6] =
            &const { [$name::<$w, 1>, $name::<$w, 2>, $name::<$w, 3>, $name::<$w, 4>, $name::<$w, 5>, $name::<$w, 6>] };
        let high: &[$type; 6] = &const {
            [$name::<$w, 7>, $name::<$w, 8>, $name::<$w, 9>, $name::<$w, 10>, $name::<$w, 11>, $name::<$w, 12>]
        };
        // Only AVX-512's tiles are higher than 6.
        let wide = <$w as $crate::ops::simd::wide::Compiled>::LEVEL != $crate::ops::simd::Level::Avx2;
        if wide && $height > low.len() { high[$height - 7] } else { low[$height - 1] }
    }};
}
pub(super) use of_height;

/// Memory that a tile asks for while it computes, as the processor's own prefetcher does not follow panels.
#[derive(Clone, Copy)]
pub struct Ahead {
    /// What is asked for with the first run.
    pub at: *const i8,
    /// Bytes from there to what is asked for with the next.
    pub next: usize,
    /// Lines of 64 bytes with each.
    pub lines: usize,
}

impl Ahead {
    #[inline(always)]
    fn ask(&self, run: usize) {
        let at = self.at.wrapping_add(run * self.next);
        for line in 0..self.lines {
            prefetch::<_MM_HINT_T1>(at.wrapping_add(line * LINE));
        }
    }
}

/// Bytes that memory gives at a time.
pub const LINE: usize = 64;

/// Asks memory for the line of an address, which need not exist.
#[inline(always)]
pub fn prefetch<const HINT: i32>(at: *const i8) {
    // SAFETY: every processor that these products run on has the instruction, and it reads nothing.
    unsafe { _mm_prefetch::<HINT>(at) };
}

/// Asks memory for the line of an address, which need not exist, to write to it: another core may have written to it last.
#[inline(always)]
pub fn prefetch_to_write(at: *const i8) {
    // SAFETY: processors without the instruction do nothing instead, and it changes no memory.
    unsafe { asm!("prefetchw [{}]", in(reg) at, options(nostack, preserves_flags, readonly)) };
}

/// Where a tile's factors are.
#[derive(Clone, Copy)]
pub struct Factors {
    /// The broadcast rows.
    pub a: Rows,
    /// Vectors: 32 columns for each step of the contraction.
    pub b: *const i8,
    /// Steps of the contraction.
    pub depth: usize,
    /// What will be needed next.
    pub ahead: Ahead,
}

/// `sums[r][v] = Σ_k a[r][k] b[k][v]`.
///
/// # Safety
/// `R` rows and the vectors of `depth` units can be read; the processor has the instructions.
#[inline(always)]
unsafe fn sums<P: Reading, const R: usize, const V: usize>(factors: &Factors) -> Sums<WideOf<P>, R, V> {
    // SAFETY: passed on; k is inside the depth of the rows and vectors.
    unsafe {
        let mut sums = [[<WideOf<P>>::zero(); V]; R];
        let (mut b, mut left) = (factors.b, factors.depth);
        let constant = P::constant();
        for run in 0..factors.depth.div_ceil(P::Unit::RUN) {
            factors.ahead.ask(run);
            let a = factors.a.at.wrapping_add(run * factors.a.next);
            let len = left.min(P::Unit::RUN);
            for k in 0..len {
                let vectors: [WideOf<P>; V] = P::vectors(b);
                for (row, sums) in sums.iter_mut().enumerate() {
                    let unit = P::broadcast(a.wrapping_add((row * P::Unit::RUN + k) * P::BYTES), constant);
                    for v in 0..V {
                        sums[v] = P::Unit::multiply_add(unit, vectors[v], sums[v]);
                    }
                }
                b = b.wrapping_add(P::STEP);
            }
            left -= len;
        }
        sums
    }
}

for_each_width! {
    /// `R` rows of sums, `columns` of at most a panel.
    ///
    /// # Safety
    /// `R` rows and the vectors of `depth` units can be read, and so many elements of as many rows of `target` written; the
    /// processor has the instructions.
    pub unsafe fn tile<P: Reading; const R: usize>(factors: Factors, target: Target, columns: usize) {
        // SAFETY: passed on.
        unsafe {
            target.ask(R);
            if P::SPLIT {
                let mut sums = sums::<P, R, 2>(&factors);
                for sums in &mut sums {
                    *sums = P::in_order(*sums);
                }
                return target.store(&sums, columns);
            }
            if <WideOf<P>>::BESIDE > 1 && columns > LANES {
                return target.store(&sums::<P, R, 2>(&factors), columns);
            }
            for lane in [0, LANES].into_iter().filter(|lane| *lane < columns) {
                let factors = Factors { b: factors.b.wrapping_add(lane * size_of::<f32>()), ..factors };
                let target = Target { y: target.y.wrapping_add(lane), ..target };
                target.store(&sums::<P, R, 1>(&factors), columns - lane);
            }
        }
    }
}

/// The tile of a height.
pub fn tile_of<P: Reading>(height: usize) -> unsafe fn(Factors, Target, usize) {
    of_height!(P, height, tile as unsafe fn(Factors, Target, usize))
}

/// Heights of the tiles that `rows` rows are cut into: as few as there can be, and of about one height.
pub fn heights<W: Wide>(rows: usize) -> impl Iterator<Item = usize> {
    let tiles = rows.div_ceil(W::ROWS);
    (0..tiles).map(move |i| (i + 1) * rows / tiles - i * rows / tiles)
}

/// Where sums go.
#[derive(Clone, Copy)]
pub struct Target {
    /// The first element.
    pub y: *mut f32,
    /// Elements from one row to the next.
    pub ldy: usize,
    /// Whether they are added to what is there.
    pub accumulate: bool,
}

impl Target {
    /// Asks memory for `rows` rows of a panel, to which will be added.
    #[inline(always)]
    pub fn ask(&self, rows: usize) {
        for row in 0..rows {
            for v in 0..2 {
                prefetch_to_write(self.y.wrapping_add(row * self.ldy + v * LANES).cast());
            }
        }
    }

    /// Writes the rows of `sums` to rows, `columns` of each.
    ///
    /// # Safety
    /// They can be written; the processor has the instructions.
    #[inline(always)]
    pub unsafe fn store<W: Wide, const R: usize, const V: usize>(&self, sums: &Sums<W, R, V>, columns: usize) {
        for (row, sums) in sums.iter().enumerate() {
            for (v, sum) in sums.iter().enumerate() {
                // SAFETY: passed on.
                unsafe { self.put(row * self.ldy + v * LANES, columns.saturating_sub(v * LANES), *sum) };
            }
        }
    }

    /// Writes the first `columns` of the first `rows` rows of a block, transposed by this.
    ///
    /// # Safety
    /// They can be written; the processor has the instructions.
    #[inline(always)]
    pub unsafe fn store_transposed<W: Wide>(&self, mut block: [W; LANES], rows: usize, columns: usize) {
        // SAFETY: passed on.
        unsafe {
            W::transpose(&mut block);
            // With a fixed number of rows the block stays in registers.
            if rows >= LANES && columns >= LANES {
                for (row, values) in block.iter().enumerate() {
                    self.put(row * self.ldy, LANES, *values);
                }
                return;
            }
            for (row, values) in block.iter().enumerate().take(rows) {
                self.put(row * self.ldy, columns, *values);
            }
        }
    }

    /// Writes the first `len` of `values` to element `at`.
    #[inline(always)]
    unsafe fn put<W: Wide>(&self, at: usize, len: usize, mut values: W) {
        // SAFETY: only these elements are read and written.
        unsafe {
            let at = self.y.add(at);
            if self.accumulate {
                values = values.add(W::load_first(at, len));
            }
            values.store_first(at, len);
        }
    }
}
