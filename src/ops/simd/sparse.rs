//! `dx = dy W` where most elements of dy are zero, as those of a loss over a large vocabulary are: rows of W are added, each
//! for the elements of dy that it has, and the others are not read.

use super::few::Element;
use super::tile::{LINE, prefetch};
use super::wide::{LANES, Wide, for_each_width};
use super::{Level, PANEL, Panels, Shared, at_width, checked, in_shares, packed_len};
use crate::ops::matmul::ViewMut;
use crate::ops::matrix::{Matrix, View};
use rayon::prelude::*;
use std::arch::x86_64::*;

/// Columns of dy from which on looking for zeros costs next to nothing beside the product.
pub const WIDE: usize = 4096;

/// One of so many elements may be no zero: each of those takes about five times as long as in the product of all.
const SPARSE: usize = 8;

/// Elements of the list from what is read to what memory is asked for.
const AHEAD: usize = 8;

/// The elements of a matrix that are not zero, row by row.
pub struct NonZeros {
    /// Column, by its bits, and value of one after another.
    list: Matrix,
    /// Where each row ends in the list.
    ends: Vec<usize>,
}

impl NonZeros {
    /// Those of `x`, if it is wide and they are few.
    pub fn of(x: View<'_>) -> Option<Self> {
        let few = |non_zero: usize, all: usize| non_zero * SPARSE <= all;
        let sample = || (0..x.rows).flat_map(|row| x.row(row).iter().step_by(WIDE / 8));
        let wide = x.cols >= WIDE && x.rows > 0 && u32::try_from(x.cols).is_ok();
        if !wide || !few(sample().filter(|v| **v != 0.0).count(), sample().count()) {
            return None;
        }
        let count = |row: usize| x.row(row).iter().map(|v| usize::from(*v != 0.0)).sum::<usize>();
        let mut ends: Vec<usize> = (0..x.rows).into_par_iter().with_max_len(1).map(count).collect();
        let mut sum = 0;
        ends.iter_mut().for_each(|end| {
            sum += *end;
            *end = sum;
        });
        if !few(sum, x.rows * x.cols) {
            return None;
        }
        let mut list = Matrix::new(1, 2 * sum);
        let mut rest = &mut list[..];
        let mut parts = Vec::with_capacity(x.rows);
        for row in 0..x.rows {
            let start = if row == 0 { 0 } else { ends[row - 1] };
            let part;
            (part, rest) = rest.split_at_mut(2 * (ends[row] - start));
            parts.push(part);
        }
        parts.into_par_iter().with_max_len(1).enumerate().for_each(|(row, part)| write_non_zeros(x.row(row), part));
        Some(Self { list, ends })
    }

    fn rows(&self) -> impl Iterator<Item = &[[f32; 2]]> {
        let starts = std::iter::once(0).chain(self.ends.iter().copied());
        starts.zip(&self.ends).map(|(start, end)| self.list[2 * start..2 * end].as_chunks::<2>().0)
    }
}

fn write_non_zeros(row: &[f32], out: &mut [f32]) {
    let mut out = out.as_chunks_mut::<2>().0.iter_mut();
    for (chunk, values) in row.chunks(16).enumerate() {
        if values.iter().fold(0, |any, v| any | v.to_bits() << 1) == 0 {
            continue;
        }
        for (col, value) in (16 * chunk as u32..).zip(values).filter(|(_, v)| **v != 0.0) {
            let Some(out) = out.next() else { return };
            *out = [f32::from_bits(col), *value];
        }
    }
}

/// `dx = dy W`, added to `dx` where `accumulate`; `w` is (rows, cols).
///
/// # Panics
/// When the shapes do not fit together.
pub fn sparse_backward(
    level: Level,
    dy: &NonZeros,
    w: Panels<'_>,
    shape: (usize, usize),
    dx: ViewMut<'_>,
    accumulate: bool,
) {
    match w {
        Panels::F32(w) => sparse_backward_of(level, dy, w, shape, dx, accumulate),
        Panels::Bf16(w) => sparse_backward_of(level, dy, w, shape, dx, accumulate),
        Panels::F16(w) => sparse_backward_of(level, dy, w, shape, dx, accumulate),
    }
}

fn sparse_backward_of<E: Element>(
    level: Level,
    dy: &NonZeros,
    w: &[E],
    (rows, cols): (usize, usize),
    dx: ViewMut<'_>,
    accumulate: bool,
) {
    let inside = dy.rows().flatten().all(|[row, _]| (row.to_bits() as usize) < rows);
    let fit = w.len() == packed_len(rows, cols) && dx.cols == cols && dx.rows == dy.ends.len();
    assert!(fit && inside && cols > 0, "product: shapes do not fit");
    let (dx_at, stride) = (checked(&dx), dx.stride);
    let dx = Shared(dx.data.as_mut_ptr());
    in_shares(cols.div_ceil(PANEL), |panels| {
        for panel in panels {
            let w = w[panel * rows * PANEL..][..rows * PANEL].as_ptr();
            let width = PANEL.min(cols - panel * PANEL);
            for (token, list) in dy.rows().enumerate() {
                // SAFETY: `level` found the instructions before this is called; the asserts bound the rows of w and the
                // elements of dx; each panel's columns are in one share.
                unsafe {
                    let sums = at_width!(level, sums<E>(w, list));
                    let to = dx.at(dx_at + token * stride + panel * PANEL);
                    for (i, sum) in sums.iter().enumerate().take(width) {
                        let to = to.add(i);
                        *to = if accumulate { *to + sum } else { *sum };
                    }
                }
            }
        }
    });
}

for_each_width! {
    /// `Σ d w[row]` over a list of rows and factors.
    ///
    /// # Safety
    /// `w` is a panel that has these rows; the processor has the instructions.
    unsafe fn sums<W: Wide, E: Element>(w: *const E, list: &[[f32; 2]]) -> [f32; PANEL] {
        /// Sums beside one another, so that products need not wait for those before.
        const CHAINS: usize = 4;
        // SAFETY: passed on; the values are 32.
        unsafe {
            let mut sums = [[W::zero(); 2]; CHAINS];
            for (at, group) in list.chunks(CHAINS).enumerate() {
                for [row, _] in list.iter().skip(CHAINS * at + AHEAD).take(CHAINS) {
                    let from = w.wrapping_add(row.to_bits() as usize * PANEL).cast::<i8>();
                    for line in (0..PANEL * size_of::<E>()).step_by(LINE) {
                        prefetch::<_MM_HINT_T0>(from.wrapping_add(line));
                    }
                }
                for (sum, [row, factor]) in sums.iter_mut().zip(group) {
                    let [w0, w1]: [W; 2] = E::halves(w.add(row.to_bits() as usize * PANEL));
                    let factor = W::set(*factor);
                    *sum = [factor.multiply_add(w0, sum[0]), factor.multiply_add(w1, sum[1])];
                }
            }
            let mut halves = [0.0; PANEL];
            for half in 0..2 {
                let all = sums.iter().fold(W::zero(), |all, sum| all.add(sum[half]));
                all.store(halves.as_mut_ptr().add(half * LANES));
            }
            if !E::SPLIT {
                return halves;
            }
            std::array::from_fn(|i| halves[i / 2 + i % 2 * LANES])
        }
    }
}
