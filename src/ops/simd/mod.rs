//! Products with a frozen weight by AVX-512 or AVX2, straight from the one copy of it that is kept, in any of a checkpoint's
//! dtypes.
//!
//! That copy is laid out in panels ([`pack`]): for each 32 columns, those of all rows, row after row. `dy W` takes vectors of
//! 32 neighbouring columns, one row after the other; `x Wᵀ` takes single elements of some rows, each time 32 of them side
//! by side. Either way memory is read in its order.
//!
//! Where there is AMX, bf16 weights are multiplied by its tiles (`amx`), which are made of the panels for each product.
//! Others are sums of broadcast elements times vectors, 12 of the one by 32 of the other at a time (`tile`), 6 by 16 with AVX2;
//! what differs between the two, and between f32 and pairs of bf16, is in `wide`. A few rows of activations (`few`) and
//! gradients that are mostly zero (`sparse`) take rows of W as they lie. f32 goes through FMA, as do narrower weights, widened
//! some at a time or, where the processor has ports free beside its products, bf16 as the tiles read it. bf16 goes through
//! `vdpbf16ps` (pairs of products, f32 sums) where the processor is faster with it, in attention's small products, too (`pairs`).
//! A gated MLP's units are made of the sums of its first product (`units`).
//!
//! Chosen at run time; elsewhere `weight` uses the `gemm` crate.
#![allow(unsafe_code)] // SIMD intrinsics, and disjoint parts of one matrix written by several threads

mod amx;
mod backward;
mod codes;
mod few;
mod forward;
mod pairs;
mod small;
mod sparse;
mod tile;
mod units;
mod wide;

pub use amx::rounded;
pub use backward::backward;
pub use codes::decode_4_bits;
pub use few::{are_panels, few_by_rows, few_rows};
pub use forward::forward;
pub use pairs::{PairsLeft, PairsRight, product_of_pairs};
pub use small::{Panelled, is_small, small};
pub use sparse::{NonZeros, WIDE, sparse_backward};
pub use units::{forward_units, makes_units};

use super::matmul::ViewMut;
use super::matrix::{Matrix, View};
use half::{bf16, f16};
use rayon::prelude::*;
use std::arch::x86_64::*;
use std::cell::RefCell;
use std::ops::Range;
use std::sync::OnceLock;
use wide::{LANES, Unit, Wide, for_each_width};

/// Columns of a panel: twice 16.
pub const PANEL: usize = 32;

/// Elements of a weight in panels.
#[derive(Debug, Clone, Copy)]
pub enum Panels<'a> {
    /// 32 bit.
    F32(&'a [f32]),
    /// bfloat16.
    Bf16(&'a [bf16]),
    /// IEEE half.
    F16(&'a [f16]),
}

impl Panels<'_> {
    fn len(&self) -> usize {
        match self {
            Self::F32(w) => w.len(),
            Self::Bf16(w) => w.len(),
            Self::F16(w) => w.len(),
        }
    }

    /// 16 values from element `at` on, widened.
    ///
    /// # Safety
    /// They are there, and the processor has the instructions.
    #[inline(always)]
    unsafe fn load<W: Wide>(&self, at: usize) -> W {
        // SAFETY: passed on.
        unsafe {
            match self {
                Self::F32(w) => W::load(w.as_ptr().add(at)),
                Self::Bf16(w) => W::load_bf16(w.as_ptr().add(at)),
                Self::F16(w) => W::load_f16(w.as_ptr().add(at)),
            }
        }
    }

    /// Address of element `at`, which need not exist.
    fn address(&self, at: usize) -> *const i8 {
        match self {
            Self::F32(w) => w.as_ptr().wrapping_add(at).cast(),
            Self::Bf16(w) => w.as_ptr().wrapping_add(at).cast(),
            Self::F16(w) => w.as_ptr().wrapping_add(at).cast(),
        }
    }
}

/// Which instructions these products take.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Level {
    /// AVX2, with FMA and F16C.
    Avx2,
    /// AVX-512 F, BW, VL, DQ.
    Avx512,
    /// And `vdpbf16ps`.
    Avx512Bf16,
    /// AVX-512 F, BW, VL, DQ, and AMX for bf16.
    Amx,
    /// The same, where products with bf16 elements have to be close to f32's.
    AmxSplit,
}

impl Level {
    /// The same, but for products that round what is multiplied by bf16 elements.
    #[must_use]
    pub fn exact(self) -> Self {
        match self {
            Self::Avx512Bf16 => Self::Avx512,
            Self::Amx => Self::AmxSplit,
            other => other,
        }
    }

    /// The same for other elements than bf16.
    fn without_bf16(self) -> Self {
        match self {
            Self::Avx512Bf16 | Self::Amx | Self::AmxSplit => Self::Avx512,
            other => other,
        }
    }

    /// Into how many bf16 AMX has to cut what it multiplies by bf16 elements; `None` without AMX.
    fn parts(self) -> Option<usize> {
        match self {
            Self::Amx => Some(1),
            Self::AmxSplit => Some(2),
            _ => None,
        }
    }
}

/// Calls a function over a [`Reading`] with the one of a level.
macro_rules! at_level {
    ($level:expr, $name:ident($($arg:expr),*)) => {
        match $level {
            $crate::ops::simd::Level::Avx2 => $name::<$crate::ops::simd::wide::Halves>($($arg),*),
            $crate::ops::simd::Level::Avx512
            | $crate::ops::simd::Level::Amx
            | $crate::ops::simd::Level::AmxSplit => $name::<std::arch::x86_64::__m512>($($arg),*),
            $crate::ops::simd::Level::Avx512Bf16 => $name::<$crate::ops::simd::wide::Pairs>($($arg),*),
        }
    };
}
use at_level;

/// Calls a function over a [`Wide`] with the one of a level.
macro_rules! at_width {
    ($level:expr, $name:ident $(<$t:ident>)? ($($arg:expr),*)) => {
        match $level {
            $crate::ops::simd::Level::Avx2 => $name::<$crate::ops::simd::wide::Halves $(, $t)?>($($arg),*),
            _ => {
                $name::<std::arch::x86_64::__m512 $(, $t)?>($($arg),*)
            }
        }
    };
}
use at_width;

/// The level of this processor, `None` without AVX2.
#[must_use]
pub fn level() -> Option<Level> {
    static LEVEL: OnceLock<Option<Level>> = OnceLock::new();
    *LEVEL.get_or_init(detect)
}

fn detect() -> Option<Level> {
    let base = is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") && is_x86_feature_detected!("f16c");
    let wide = is_x86_feature_detected!("avx512f")
        && is_x86_feature_detected!("avx512bw")
        && is_x86_feature_detected!("avx512vl")
        && is_x86_feature_detected!("avx512dq");
    if base && wide && amx::is_available() {
        return Some(Level::Amx);
    }
    match (base, wide, is_x86_feature_detected!("avx512bf16") && !intel()) {
        (true, true, true) => Some(Level::Avx512Bf16),
        (true, true, false) => Some(Level::Avx512),
        (true, false, _) => Some(Level::Avx2),
        (false, ..) => None,
    }
}

/// Whether the processor is Intel's. Those with `vdpbf16ps` start one every second cycle and two FMAs a cycle, which makes
/// it half as fast; AMD's start one of either.
fn intel() -> bool {
    let leaf = __cpuid(0);
    [leaf.ebx, leaf.edx, leaf.ecx] == [*b"Genu", *b"ineI", *b"ntel"].map(u32::from_le_bytes)
}

/// Whether bf16 elements are best widened as tiles read them. Intel's processors widen on the same ports as they multiply.
fn widens_in_registers() -> bool {
    static WIDENS: OnceLock<bool> = OnceLock::new();
    *WIDENS.get_or_init(|| !intel())
}

/// Whether this processor is faster with products by [`rounded`].
#[must_use]
pub fn rounds() -> bool {
    level() == Some(Level::Amx)
}

thread_local! {
    static SCRATCH: RefCell<Vec<f32>> = const { RefCell::new(Vec::new()) };
}

struct Shared<T>(*mut T);

impl<T> Clone for Shared<T> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<T> Copy for Shared<T> {}

// SAFETY: threads write disjoint elements.
unsafe impl<T> Send for Shared<T> {}
// SAFETY: as above.
unsafe impl<T> Sync for Shared<T> {}

impl<T> Shared<T> {
    fn at(self, offset: usize) -> *mut T {
        self.0.wrapping_add(offset)
    }
}

/// Elements of a (rows, cols) matrix in panels.
#[must_use]
pub fn packed_len(rows: usize, cols: usize) -> usize {
    rows * cols.next_multiple_of(PANEL)
}

/// Index in panels of an element of a matrix of `rows` rows.
fn packed_at(rows: usize, row: usize, col: usize) -> usize {
    (col / PANEL * rows + row) * PANEL + col % PANEL
}

/// Lays a (rows, cols) matrix out in panels: for each 32 columns, those of all rows, row after row; columns that are missing
/// are zero. `reader` makes, for each thread, a function that writes the elements of a row.
///
/// # Panics
/// When `out` has another length than `packed_len`.
pub fn pack<T, F>(rows: usize, cols: usize, reader: impl Fn() -> F + Sync, out: &mut [T])
where
    T: Copy + Default + Send + Sync,
    F: FnMut(usize, &mut [T]),
{
    assert_eq!(out.len(), packed_len(rows, cols), "pack: elements of ({rows}, {cols})");
    let panels = Shared(out.as_mut_ptr());
    in_shares(rows, |share| {
        let mut read = reader();
        let mut values = vec![T::default(); cols.next_multiple_of(PANEL)];
        for row in share {
            read(row, &mut values[..cols]);
            for (panel, values) in values.chunks_exact(PANEL).enumerate() {
                // SAFETY: the panel's part of a row is inside `out`, and the row in one share.
                unsafe {
                    std::ptr::copy_nonoverlapping(values.as_ptr(), panels.at((panel * rows + row) * PANEL), PANEL);
                }
            }
        }
    });
}

/// A frozen matrix as the tiles read it.
#[derive(Clone, Copy)]
struct Weight<'a> {
    w: Panels<'a>,
    rows: usize,
    cols: usize,
}

impl<'a> Weight<'a> {
    /// And the level of its products: only bf16 elements are multiplied in pairs.
    ///
    /// # Panics
    /// When `w` is not (rows, cols).
    fn new(level: Level, w: Panels<'a>, (rows, cols): (usize, usize)) -> (Self, Level) {
        assert!(w.len() == packed_len(rows, cols), "product: shapes do not fit");
        (Self { w, rows, cols }, if matches!(w, Panels::Bf16(_)) { level } else { level.without_bf16() })
    }
}

/// Rows of activations for tiles, chunk by chunk of `chunks(.., depth)`, in each those of each of `heights` as units in panels, as
/// a weight is; what is missing at the end is zero. A chunk lies together: parts of rows that are as far apart as a large power
/// of two would throw each other out of the caches.
fn pack_rows<U: Unit>(x: View<'_>, depth: usize) -> Matrix {
    let units = x.cols.div_ceil(U::ELEMENTS);
    let mut out = Matrix::new(x.rows, units.next_multiple_of(PANEL));
    let tiles = x.rows.div_ceil(U::Wide::ROWS);
    let to = Shared(out.as_mut_ptr());
    in_shares(tiles, |share| {
        for (tile, chunk) in share.flat_map(|tile| chunks(units, depth).map(move |chunk| (tile, chunk))) {
            let rows = tile * x.rows / tiles..(tile + 1) * x.rows / tiles;
            let width = chunk.len().next_multiple_of(PANEL);
            // SAFETY: the level found the instructions; the rows of a chunk are inside `out` and in one share.
            unsafe {
                let at = to.at(x.rows * chunk.start + rows.start * width);
                let out = std::slice::from_raw_parts_mut(at, rows.len() * width);
                pack_tile::<U>(x, rows, chunk.start, out);
            }
        }
    });
    out
}

for_each_width! {
    /// A tile of a chunk of `pack_rows`, from a unit on.
    ///
    /// # Safety
    /// The processor has the instructions.
    unsafe fn pack_tile<U: Unit>(x: View<'_>, rows: Range<usize>, unit: usize, out: &mut [f32]) {
        for (part, out) in out.chunks_exact_mut(rows.len() * U::RUN).enumerate() {
            for (row, out) in rows.clone().zip(out.chunks_exact_mut(U::RUN)) {
                let row = x.row(row);
                for (i, out) in out.as_chunks_mut::<LANES>().0.iter_mut().enumerate() {
                    let from = ((unit + part * U::RUN + i * LANES) * U::ELEMENTS).min(row.len());
                    let values = &row[from..(from + LANES * U::ELEMENTS).min(row.len())];
                    // SAFETY: out has 16 units.
                    unsafe { U::of(values).store(out.as_mut_ptr()) };
                }
            }
        }
    }
}

/// `units` in equal chunks of at most `most`, but for the last whole panels.
fn chunks(units: usize, most: usize) -> impl Iterator<Item = Range<usize>> {
    let depth = units.div_ceil(units.div_ceil(most).max(1)).next_multiple_of(PANEL).max(PANEL);
    (0..units).step_by(depth).map(move |from| from..(from + depth).min(units))
}

/// Runs `f` over consecutive ranges of `0..n` in parallel, eight of about one length for each thread: where other programs have
/// a share of a core, the other ones take over what it is behind with.
fn in_shares(n: usize, f: impl Fn(Range<usize>) + Sync) {
    in_few_shares(8, n, f);
}

/// The same with so many for each thread.
fn in_few_shares(each: usize, n: usize, f: impl Fn(Range<usize>) + Sync) {
    let shares = (each * rayon::current_num_threads()).min(n);
    (0..shares).into_par_iter().with_max_len(1).for_each(|i| f(i * n / shares..(i + 1) * n / shares));
}

/// Index of the first element of `y`, which is not empty and lies inside its data.
fn checked(y: &ViewMut<'_>) -> usize {
    let end = y.offset + (y.rows - 1) * y.stride + y.cols;
    assert!(y.cols <= y.stride && end <= y.data.len(), "product: y leaves its data");
    y.offset
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::testing::{assert_close, random};

    fn packed<T: Copy + Default + Send + Sync>(w: &[T], rows: usize, cols: usize) -> Vec<T> {
        let mut out = vec![T::default(); packed_len(rows, cols)];
        pack(rows, cols, || |row: usize, out: &mut [T]| out.copy_from_slice(&w[row * cols..][..cols]), &mut out);
        out
    }

    /// This processor may be faster with another level than the best that it has; products of all of them are tested.
    #[test]
    fn both_products_are_those_of_plain_loops_at_every_level() {
        let all = [Level::Avx2, Level::Avx512, Level::Avx512Bf16, Level::Amx, Level::AmxSplit];
        let has = |level: &Level| match level {
            Level::Avx2 => super::level().is_some(),
            Level::Avx512 => super::level().is_some_and(|level| level != Level::Avx2),
            Level::Avx512Bf16 => is_x86_feature_detected!("avx512bf16"),
            Level::Amx | Level::AmxSplit => super::level() == Some(Level::Amx),
        };
        let levels: Vec<Level> = all.into_iter().filter(has).collect();
        // One row to more than a tile, an odd depth, more than a chunk of it, more tokens than go together, more of dy.
        let shapes = [(1, 1, 1), (17, 25, 35), (33, 1100, 40), (47, 30, 2211), (205, 13, 64), (41, 25_801, 3)];
        for (t, rows, cols) in shapes {
            let (w, x, dy) = (random(rows * cols, 1), random(t * cols, 2), random(t * rows, 3));
            let w: Vec<bf16> = w.iter().map(|v| bf16::from_f32(*v)).collect();
            let wide: Vec<f32> = w.iter().map(|v| v.to_f32()).collect();
            let (narrow, wide_packed) = (packed(&w, rows, cols), packed(&wide, rows, cols));
            let dot =
                |a: &dyn Fn(usize) -> f32, b: &dyn Fn(usize) -> f32, n| -> f32 { (0..n).map(|i| a(i) * b(i)).sum() };
            let y: Vec<f32> = (0..t * rows)
                .map(|i| 1.0 + dot(&|k| x[i / rows * cols + k], &|k| wide[i % rows * cols + k], cols))
                .collect();
            let dx: Vec<f32> = (0..t * cols)
                .map(|i| dot(&|k| dy[i / cols * rows + k], &|k| wide[k * cols + i % cols], rows))
                .collect();
            for level in &levels {
                let mut results = Vec::new();
                for (panels, tolerance) in [
                    (Panels::F32(&wide_packed), 1e-5),
                    (Panels::Bf16(&narrow), if *level == level.exact() { 1e-5 } else { 8e-3 }),
                ] {
                    let (mut got_y, mut got_dx) = (vec![1.0; t * rows], vec![f32::NAN; t * cols]);
                    let (x, dy) = (View::of(&x, t, cols), View::of(&dy, t, rows));
                    forward(*level, x, panels, (rows, cols), ViewMut::of(&mut got_y, t, rows), true);
                    backward(*level, dy, panels, (rows, cols), ViewMut::of(&mut got_dx, t, cols), false);
                    assert_close(&got_y, &y, tolerance);
                    assert_close(&got_dx, &dx, tolerance);
                    results.push([got_y, got_dx]);
                }
                // Widened elements give the bits of f32.
                assert!(results[0] == results[1] || !matches!(level, Level::Avx2 | Level::Avx512));
            }
        }
    }

    #[test]
    fn infinities_and_what_is_no_number_come_through_both_parts() {
        if level() != Some(Level::Amx) {
            return;
        }
        let (t, rows, cols) = (20, 3, 40);
        let w = packed(&vec![bf16::ONE; rows * cols], rows, cols);
        let mut x = vec![1.0; t * cols];
        (x[7], x[cols + 9]) = (f32::NEG_INFINITY, f32::from_bits(0x7f80_0001));
        x[2 * cols] = bf16::MAX.to_f32();
        let mut y = vec![0.0; t * rows];
        let to = ViewMut::of(&mut y, t, rows);
        forward(Level::AmxSplit, View::of(&x, t, cols), Panels::Bf16(&w), (rows, cols), to, false);
        assert!(y[..rows].iter().all(|v| *v == f32::NEG_INFINITY), "{:?}", &y[..rows]);
        assert!(y[rows..2 * rows].iter().all(|v| v.is_nan()));
        assert!(y[2 * rows..3 * rows].iter().all(|v| *v == bf16::MAX.to_f32()));
        assert!(y[3 * rows..].iter().all(|v| *v == 40.0));
    }
}
