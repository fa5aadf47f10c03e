//! `y = x Wᵀ` for a few rows of x, as in decoding: the weight is read once, in its own order, as fast as memory gives it.

use super::tile::{LINE, prefetch};
use super::wide::{LANES, Wide, for_each_width};
use super::{Level, PANEL, Panels, Shared, at_width, checked, packed_len};
use crate::ops::matmul::ViewMut;
use crate::ops::matrix::{Matrix, View};
use half::{bf16, f16};
use rayon::prelude::*;
use std::arch::x86_64::*;

/// Rows of the weight whose sums, 64 bytes each for a row of x, stay in the first-level cache, of several rows in the second.
const BLOCK: usize = 256;

/// Rows of some panels side by side that stay there, too.
const NEAR: usize = 32;

/// Panels that are read side by side: memory serves some streams faster than one.
const TOGETHER: usize = 4;

/// Bytes from what is read to what memory is asked for.
const AHEAD: usize = 1024;

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
    let x = in_panels::<E>(x);
    // Blocks of about one length, some for each thread.
    let blocks = rows.div_ceil(BLOCK).next_multiple_of(rayon::current_num_threads());
    let block = rows.div_ceil(blocks);
    let out = Shared(y.data.as_mut_ptr());
    (0..rows.div_ceil(block)).into_par_iter().with_max_len(1).for_each(|i| {
        let first = i * block;
        let len = block.min(rows - first);
        // SAFETY: `level` found the instructions before this is called; the rows are inside the weight, and each is in one
        // block.
        unsafe {
            let (w, y) = (w.as_ptr().add(first * PANEL), Rows { at: out.at(y_at + first), stride, accumulate });
            at_width!(level, block_of_rows<E>(w, rows, len, &x, y));
        }
    });
}

/// Where a block's sums go, a row of `y` after the other.
struct Rows {
    at: *mut f32,
    stride: usize,
    accumulate: bool,
}

/// `x` in panels, zeros where columns are missing, each as [`Element::halves`] gives it.
fn in_panels<E: Element>(x: View<'_>) -> Matrix {
    let mut out = Matrix::zeros(x.rows, x.cols.next_multiple_of(PANEL));
    let cols = out.cols();
    for (t, out) in out.chunks_exact_mut(cols).enumerate() {
        for (x, out) in x.row(t).chunks(PANEL).zip(out.chunks_exact_mut(PANEL)) {
            if E::SPLIT {
                x.iter().enumerate().for_each(|(i, v)| out[i / 2 + 16 * (i % 2)] = *v);
            } else {
                out[..x.len()].copy_from_slice(x);
            }
        }
    }
    out
}

for_each_width! {
    /// Products of each row of `x`, in panels, with `len` rows from `w` on of a weight of `rows` rows, panel after panel.
    ///
    /// # Safety
    /// Those rows can be read, and as many elements of each row of `y` written; the processor has the instructions.
    unsafe fn block_of_rows<W: Wide, E: Element>(w: *const E, rows: usize, len: usize, x: &Matrix, to: Rows) {
        let (panels, whole) = (x.cols() / PANEL, x.cols() / PANEL / TOGETHER * TOGETHER);
        // SAFETY: x has whole panels, and the weight a panel of all rows for each.
        unsafe {
            let mut sums = vec![W::zero(); x.rows() * len];
            for panel in (0..whole).step_by(TOGETHER) {
                add_to_all::<W, E, TOGETHER>(w.add(panel * rows * PANEL), rows, x, panel, &mut sums);
            }
            for panel in whole..panels {
                add_to_all::<W, E, 1>(w.add(panel * rows * PANEL), rows, x, panel, &mut sums);
            }
            for (t, sums) in sums.chunks_exact(len).enumerate() {
                for (row, sum) in sums.iter().enumerate() {
                    let (y, sum) = (to.at.add(t * to.stride + row), sum.sum());
                    *y = if to.accumulate { *y + sum } else { sum };
                }
            }
        }
    }
}

for_each_width! {
    /// Adds the products of `P` panels side by side from `panel` on, `NEAR` rows of the weight at a time: memory gives them to
    /// the first row of x, the first-level cache to the others.
    ///
    /// # Safety
    /// As for `block_of_rows`.
    unsafe fn add_to_all<W: Wide, E: Element; const P: usize>(
        w: *const E,
        rows: usize,
        x: &Matrix,
        panel: usize,
        sums: &mut [W],
    ) {
        let (len, cols) = (sums.len() / x.rows(), x.cols());
        let x = |t: usize| &x[t * cols + panel * PANEL..];
        for first in (0..len).step_by(NEAR) {
            let (near, w) = (first..len.min(first + NEAR), w.wrapping_add(first * PANEL));
            for (pair, sums) in sums.chunks_mut(2 * len).enumerate() {
                let (one, other) = sums.split_at_mut(len);
                let one = &mut one[near.clone()];
                // SAFETY: passed on.
                unsafe {
                    if other.is_empty() {
                        add_panels::<W, E, P, 1>(w, rows, [x(2 * pair)], [one]);
                    } else {
                        let sums = [one, &mut other[near.clone()]];
                        add_panels::<W, E, P, 2>(w, rows, [x(2 * pair), x(2 * pair + 1)], sums);
                    }
                }
            }
        }
    }
}

/// Adds the products of `P` panels side by side of `R` rows of x and of some rows of the weight.
///
/// # Safety
/// As for `block_of_rows`.
#[inline(always)]
unsafe fn add_panels<W: Wide, E: Element, const P: usize, const R: usize>(
    w: *const E,
    rows: usize,
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
            let mut even: [W; R] = std::array::from_fn(|r| sums[r][row]);
            let mut odd = [W::zero(); R];
            for (p, x) in x.iter().enumerate() {
                let at = w.wrapping_add((p * rows + row) * PANEL);
                for line in (0..PANEL * size_of::<E>()).step_by(LINE) {
                    prefetch::<_MM_HINT_T0>(at.cast::<i8>().wrapping_add(AHEAD + line));
                }
                let [w0, w1]: [W; 2] = E::halves(at);
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
