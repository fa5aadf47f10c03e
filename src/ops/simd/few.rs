//! `y = x Wᵀ` for a few rows of x, as in decoding: the weight, or the kept keys, are read once, in their own order, as fast as
//! memory gives them.

use super::tile::{LINE, prefetch};
use super::wide::{LANES, Wide, for_each_width};
use super::{Level, PANEL, Panels, Shared, at_width, checked, packed_len};
use crate::ops::matmul::ViewMut;
use crate::ops::matrix::{Matrix, View};
use half::{bf16, f16};
use rayon::prelude::*;
use std::arch::x86_64::*;
use std::ops::Range;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};

/// Rows that a thread takes at most, whose sums, 64 bytes each for a row of x, stay in the caches, and at least.
const MOST: usize = 512;
const LEAST: usize = 32;

/// Rows of some panels side by side that stay in the first-level cache.
const NEAR: usize = 32;

/// Strip that are read side by side: memory serves some streams faster than one.
const TOGETHER: usize = 8;

/// What a weight is made of, as a row of a panel is read.
pub trait Element: Copy + Sync {
    /// Whether the two halves of a row of a panel are the even and the odd elements, not the first and the last.
    const SPLIT: bool;

    /// The two halves of a row of a panel.
    ///
    /// # Safety
    /// They can be read, and the processor has the instructions.
    unsafe fn halves<W: Wide>(from: *const Self) -> [W; 2];
}

impl Element for f32 {
    const SPLIT: bool = false;

    #[inline(always)]
    unsafe fn halves<W: Wide>(from: *const Self) -> [W; 2] {
        // SAFETY: passed on.
        unsafe { [W::load(from), W::load(from.add(LANES))] }
    }
}

impl Element for bf16 {
    const SPLIT: bool = true;

    #[inline(always)]
    unsafe fn halves<W: Wide>(from: *const Self) -> [W; 2] {
        // SAFETY: passed on.
        unsafe { W::load_split(from) }
    }
}

impl Element for f16 {
    const SPLIT: bool = false;

    #[inline(always)]
    unsafe fn halves<W: Wide>(from: *const Self) -> [W; 2] {
        // SAFETY: passed on.
        unsafe { [W::load_f16(from), W::load_f16(from.add(LANES))] }
    }
}

/// `y = x Wᵀ` for a few rows of x, as in decoding.
///
/// # Panics
/// When the shapes do not fit together.
pub fn few_rows(level: Level, x: View<'_>, w: Panels<'_>, shape: (usize, usize), y: ViewMut<'_>, accumulate: bool) {
    match w {
        Panels::F32(w) => few_rows_of(level, x, w, shape, y, accumulate),
        Panels::Bf16(w) => few_rows_of(level, x, w, shape, y, accumulate),
        Panels::F16(w) => few_rows_of(level, x, w, shape, y, accumulate),
    }
}

fn few_rows_of<E: Element>(
    level: Level,
    x: View<'_>,
    w: &[E],
    (rows, cols): (usize, usize),
    y: ViewMut<'_>,
    accumulate: bool,
) {
    let fit = w.len() == packed_len(rows, cols) && x.cols == cols && y.cols == rows && y.rows == x.rows;
    assert!(fit, "product: shapes do not fit");
    if x.rows == 0 || w.is_empty() {
        return;
    }
    let (y_at, stride) = (checked(&y), y.stride);
    let (x, out) = (in_panels::<E>(x, 1.0), Shared(y.data.as_mut_ptr()));
    let queue = Queue { taken: AtomicUsize::new(0), rows, threads: rayon::current_num_threads() };
    (0..queue.threads).into_par_iter().with_max_len(1).for_each(|_| {
        let w = Source { at: w.as_ptr(), panel: rows * PANEL, row: PANEL };
        let to = Rows { at: out.at(y_at), stride, accumulate };
        // SAFETY: `level` found the instructions before this is called; `fit` are the shapes, and each row is taken once.
        unsafe { at_width!(level, rows_of<E>(w, &queue, &x, to)) };
    });
}

/// Columns of rows that [`few_by_rows`] can multiply by.
#[must_use]
pub fn are_panels(cols: usize) -> bool {
    cols.is_multiple_of(PANEL)
}

/// `y = alpha x Wᵀ` for a few rows of x and a W that lies row after row, on the calling thread, added to `y` where `accumulate`.
///
/// # Panics
/// When the shapes do not fit together, or the columns are none that it can multiply.
///
/// # Safety
/// Every element of the views is inside its data.
pub unsafe fn few_by_rows(level: Level, x: View<'_>, w: View<'_>, y: ViewMut<'_>, accumulate: bool, alpha: f32) {
    let fit = x.cols == w.cols && y.cols == w.rows && y.rows == x.rows;
    assert!(fit && are_panels(w.cols), "product: shapes do not fit");
    if x.rows == 0 || w.rows == 0 {
        return;
    }
    let from = Source { at: w.data.as_ptr().wrapping_add(w.offset), panel: PANEL, row: w.stride };
    let to = Rows { at: y.data.as_mut_ptr().wrapping_add(y.offset), stride: y.stride, accumulate };
    let queue = Queue { taken: AtomicUsize::new(0), rows: w.rows, threads: 1 };
    // SAFETY: passed on; `fit` are the shapes.
    unsafe { at_width!(level, rows_of<f32>(from, &queue, &in_panels::<f32>(x, alpha), to)) };
}

/// A matrix whose rows are read, in panels of 32 columns.
#[derive(Clone, Copy)]
struct Source<E> {
    at: *const E,
    /// Elements from a panel to the next.
    panel: usize,
    /// And from a row to the next.
    row: usize,
}

impl<E> Source<E> {
    /// A panel of a row, which need not exist.
    #[inline(always)]
    fn address(&self, panel: usize, row: usize) -> *const E {
        self.at.wrapping_add(panel * self.panel + row * self.row)
    }

    /// The same from a panel and a row on.
    fn from(self, panel: usize, row: usize) -> Self {
        Self { at: self.address(panel, row), ..self }
    }
}

/// Rows of a weight, which threads take in blocks that become shorter towards the end, so that none waits long for another.
struct Queue {
    taken: AtomicUsize,
    rows: usize,
    threads: usize,
}

impl Queue {
    /// The end of a block from a row on.
    fn end(&self, first: usize) -> usize {
        let share = 3 * (self.rows - first) / (4 * self.threads);
        self.rows.min(first + share.clamp(LEAST, MOST))
    }

    fn take(&self) -> Option<Range<usize>> {
        let end = |first| (first < self.rows).then(|| self.end(first));
        self.taken.fetch_update(Relaxed, Relaxed, end).ok().map(|first| first..self.end(first))
    }
}

/// Where sums go, a row of `y` after the other.
struct Rows {
    at: *mut f32,
    stride: usize,
    accumulate: bool,
}

/// `alpha x` in panels, zeros where columns are missing, each as [`Element::halves`] gives it.
fn in_panels<E: Element>(x: View<'_>, alpha: f32) -> Matrix {
    let mut out = Matrix::zeros(x.rows, x.cols.next_multiple_of(PANEL));
    let cols = out.cols();
    for (t, out) in out.chunks_exact_mut(cols).enumerate() {
        for (x, out) in x.row(t).chunks(PANEL).zip(out.chunks_exact_mut(PANEL)) {
            if E::SPLIT {
                x.iter().enumerate().for_each(|(i, v)| out[i / 2 + 16 * (i % 2)] = alpha * v);
            } else {
                out.iter_mut().zip(x).for_each(|(out, v)| *out = alpha * v);
            }
        }
    }
    out
}

/// [`add_to_all`] for some number of panels.
type AddToAll<E, W> = unsafe fn(Strip<'_, E>, &mut [W]);

for_each_width! {
    /// Products of each row of `x`, in panels, with the rows of a weight that this thread can take.
    ///
    /// # Safety
    /// `w` has the queue's rows and as many columns as `x`, and `to` as many columns; the processor has the instructions.
    unsafe fn rows_of<W: Wide, E: Element>(w: Source<E>, queue: &Queue, x: &Matrix, to: Rows) {
        let panels = x.cols() / PANEL;
        let groups = panels.div_ceil(TOGETHER);
        let add: &[AddToAll<E, W>; TOGETHER] = &const {
            [
                add_to_all::<W, E, 1>,
                add_to_all::<W, E, 2>,
                add_to_all::<W, E, 3>,
                add_to_all::<W, E, 4>,
                add_to_all::<W, E, 5>,
                add_to_all::<W, E, 6>,
                add_to_all::<W, E, 7>,
                add_to_all::<W, E, TOGETHER>,
            ]
        };
        let mut sums = Vec::new();
        while let Some(block) = queue.take() {
            let len = block.len();
            let stride = len.next_multiple_of(LANES);
            // SAFETY: the rows are the weight's, which has a panel of all rows for each of x.
            unsafe {
                sums.resize(x.rows() * stride, W::zero());
                for i in 0..groups {
                    let (panel, end) = (i * panels / groups, (i + 1) * panels / groups);
                    // Behind the last panels the rows that are taken next, most often by this thread.
                    let next =
                        if end < panels { w.from(end, block.start) } else { w.from(0, queue.taken.load(Relaxed)) };
                    let strip = Strip { w: w.from(panel, block.start), next, len, x, panel };
                    add[end - panel - 1](strip, &mut sums);
                }
                for (t, sums) in sums.chunks_exact(stride).enumerate() {
                    to.store(t, block.clone(), sums);
                }
            }
        }
    }
}

impl Rows {
    /// Writes a row of `y`, some columns: each the sum of all lanes.
    ///
    /// # Safety
    /// They can be written; the processor has the instructions.
    #[inline(always)]
    unsafe fn store<W: Wide>(&self, row: usize, columns: Range<usize>, sums: &[W]) {
        let (blocks, _) = sums.as_chunks::<LANES>();
        for (first, block) in columns.clone().step_by(LANES).zip(blocks) {
            let (mut block, len) = (*block, columns.end - first);
            // SAFETY: passed on.
            unsafe {
                W::transpose(&mut block);
                let mut sum = block.into_iter().reduce(|sum, lane| sum.add(lane)).unwrap_or_else(|| W::zero());
                let at = self.at.add(row * self.stride + first);
                if self.accumulate {
                    sum = sum.add(W::load_first(at, len));
                }
                sum.store_first(at, len);
            }
        }
    }
}

/// Some panels side by side of some rows of a weight.
struct Strip<'a, E> {
    w: Source<E>,
    /// What is read after them.
    next: Source<E>,
    /// Rows.
    len: usize,
    x: &'a Matrix,
    /// The first panel of x.
    panel: usize,
}

for_each_width! {
    /// Adds the products of `P` panels side by side, or begins with them, about `NEAR` rows of the weight at a time: memory gives
    /// them to the first row of x, the first-level cache to the others. Meanwhile it is asked for as many rows behind them.
    ///
    /// # Safety
    /// As for `rows_of`.
    unsafe fn add_to_all<W: Wide, E: Element; const P: usize>(strip: Strip<'_, E>, sums: &mut [W]) {
        let Strip { w, next, len, x, panel } = strip;
        let (stride, cols) = (sums.len() / x.rows(), x.cols());
        let x = |t: usize| &x[t * cols + panel * PANEL..];
        let parts = len.div_ceil(NEAR);
        for part in 0..parts {
            let near = part * len / parts..(part + 1) * len / parts;
            let ahead = if part + 1 < parts { w.from(0, near.end) } else { next };
            let place = Place { w: w.from(0, near.start), ahead, begins: panel == 0 };
            for (pair, sums) in sums.chunks_mut(2 * stride).enumerate() {
                let (one, other) = sums.split_at_mut(stride);
                let one = &mut one[near.clone()];
                // SAFETY: passed on.
                unsafe {
                    if other.is_empty() {
                        add_panels::<W, E, P, 1>(&place, [x(2 * pair)], [one]);
                    } else {
                        let sums = [one, &mut other[near.clone()]];
                        add_panels::<W, E, P, 2>(&place, [x(2 * pair), x(2 * pair + 1)], sums);
                    }
                }
            }
        }
    }
}

/// Rows of panels.
struct Place<E> {
    w: Source<E>,
    /// What memory is asked for meanwhile.
    ahead: Source<E>,
    /// Whether these are the first panels.
    begins: bool,
}

/// Adds the products of `P` panels side by side of `R` rows of x and of some rows of the weight.
///
/// # Safety
/// As for `rows_of`.
#[inline(always)]
unsafe fn add_panels<W: Wide, E: Element, const P: usize, const R: usize>(
    place: &Place<E>,
    x: [&[f32]; R],
    sums: [&mut [W]; R],
) {
    // SAFETY: passed on; a panel of x has two times 16 elements.
    unsafe {
        // Of each panel, the halves of each row of x.
        let x: [[[W; 2]; R]; P] = std::array::from_fn(|p| {
            x.map(|x| {
                let x = x[p * PANEL..][..PANEL].as_ptr();
                [W::load(x), W::load(x.add(LANES))]
            })
        });
        for row in 0..sums[0].len() {
            let mut even: [W; R] = std::array::from_fn(|r| if place.begins { W::zero() } else { sums[r][row] });
            let mut odd = [W::zero(); R];
            for (p, x) in x.iter().enumerate() {
                for line in (0..PANEL * size_of::<E>()).step_by(LINE) {
                    prefetch::<_MM_HINT_T0>(place.ahead.address(p, row).cast::<i8>().wrapping_add(line));
                }
                let [w0, w1]: [W; 2] = E::halves(place.w.address(p, row));
                for r in 0..R {
                    even[r] = x[r][0].multiply_add(w0, even[r]);
                    odd[r] = x[r][1].multiply_add(w1, odd[r]);
                }
            }
            for r in 0..R {
                sums[r][row] = even[r].add(odd[r]);
            }
        }
    }
}
