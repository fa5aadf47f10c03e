//! `dx = dy W` where most elements of dy are zero, as those of a loss over a large vocabulary are: rows of W are added, each
//! for the elements of dy that it has, and the others are not read.

use super::few::Element;
use super::tile::{LINE, prefetch};
use super::wide::{LANES, Wide, for_each_width};
use super::{Level, PANEL, Panels, Shared, at_width, checked, in_few_shares, packed_len};
use crate::ops::math::vectorize;
use crate::ops::matmul::ViewMut;
use crate::ops::matrix::{Matrix, View};
use rayon::prelude::*;
use std::arch::x86_64::*;
use std::ops::Range;

/// Columns of dy from which on looking for zeros costs next to nothing beside the product.
pub const WIDE: usize = 4096;

/// One of so many elements may be no zero: each of those takes about five times as long as in the product of all.
const SPARSE: usize = 8;

/// Columns of dy that are listed together. More, and one after another would often be of the same row of dy, whose sums
/// would wait for each other.
const BLOCK: usize = LANES;

/// Elements of the list from what is read to what memory is asked for: of several rows of dy, they are some rows of W.
const AHEAD: usize = 64;

/// Panels of W that an element of dy is multiplied by at a time.
const TOGETHER: usize = 4;

/// Shares of the work for each thread.
const SHARES: usize = 3;

/// The elements of a matrix that are not zero: of some columns those of all rows, then of the next. So the rows of W are read
/// in their order, and each once for all tokens.
pub struct NonZeros {
    /// Column and row, by their bits, and value of one after another.
    list: Matrix,
    rows: usize,
}

impl NonZeros {
    /// Those of `x`, if it is wide and they are few.
    pub fn of(level: Level, x: View<'_>) -> Option<Self> {
        let few = |non_zero: usize, all: usize| non_zero * SPARSE <= all;
        let sample = || (0..x.rows).flat_map(|row| x.row(row).iter().step_by(WIDE / 8));
        let wide = x.cols >= WIDE && x.rows > 0 && [x.cols, x.rows].iter().all(|n| u32::try_from(*n).is_ok());
        if !wide || !few(sample().filter(|v| **v != 0.0).count(), sample().count()) {
            return None;
        }
        let blocks = x.cols.div_ceil(BLOCK);
        // The first tokens of a vocabulary are the likeliest: a tenth of the columns can have half of the elements.
        let shares = (16 * rayon::current_num_threads()).min(blocks);
        let columns = |i: usize| i * blocks / shares * BLOCK..((i + 1) * blocks / shares * BLOCK).min(x.cols);
        let count = |i: usize| (0..x.rows).map(|row| count_non_zeros(&x.row(row)[columns(i)])).sum();
        let counts: Vec<usize> = (0..shares).into_par_iter().with_max_len(1).map(count).collect();
        let sum = counts.iter().sum();
        if !few(sum, x.rows * x.cols) {
            return None;
        }
        let mut list = Matrix::new(1, 3 * sum);
        let mut rest = list.as_chunks_mut::<3>().0;
        let mut parts = Vec::with_capacity(shares);
        for (i, count) in counts.into_iter().enumerate() {
            let part;
            (part, rest) = rest.split_at_mut(count);
            parts.push((columns(i), part));
        }
        parts.into_par_iter().with_max_len(1).for_each(|(columns, part)| {
            // SAFETY: the level found the instructions.
            unsafe { at_width!(level, write_non_zeros(x, columns.clone(), part)) };
        });
        Some(Self { list, rows: x.rows })
    }

    fn list(&self) -> &[[f32; 3]] {
        self.list.as_chunks().0
    }
}

vectorize! {
    fn count_non_zeros(values: &[f32]) -> usize {
        values.iter().map(|v| usize::from(*v != 0.0)).sum()
    }
}

for_each_width! {
    /// # Safety
    /// The processor has the instructions.
    unsafe fn write_non_zeros<W: Wide>(x: View<'_>, columns: Range<usize>, out: &mut [[f32; 3]]) {
        let mut out = out.iter_mut();
        for first in columns.clone().step_by(BLOCK) {
            for row in 0..x.rows {
                let values = &x.row(row)[first..(first + BLOCK).min(columns.end)];
                // SAFETY: what is not there is not read.
                let mut places = unsafe { W::load_first(values.as_ptr(), values.len()).non_zeros() };
                while places != 0 {
                    let place = places.trailing_zeros() as usize;
                    let Some(out) = out.next() else { return };
                    *out = [f32::from_bits((first + place) as u32), f32::from_bits(row as u32), values[place]];
                    places &= places - 1;
                }
            }
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
    let (list, tokens) = (dy.list(), dy.rows);
    let inside =
        list.iter().all(|[row, token, _]| (row.to_bits() as usize) < rows && (token.to_bits() as usize) < tokens);
    let fit = w.len() == packed_len(rows, cols) && dx.cols == cols && dx.rows == tokens;
    assert!(fit && inside && cols > 0, "product: shapes do not fit");
    let (dx_at, stride, of_panel) = (checked(&dx), dx.stride, rows * PANEL);
    let dx = Shared(dx.data.as_mut_ptr());
    in_few_shares(SHARES, cols.div_ceil(PANEL), |range| {
        let mut sums = Matrix::new(tokens, TOGETHER * PANEL);
        for first in range.clone().step_by(TOGETHER) {
            let count = TOGETHER.min(range.end - first);
            let w = w[first * of_panel..(first + count) * of_panel].as_ptr();
            sums.zero();
            // SAFETY: `level` found the instructions before this is called; the assert bounds the rows of w and the tokens.
            unsafe { at_width!(level, add_panels<E>(count, (w, of_panel), list, sums.as_mut_ptr())) };
            for token in 0..tokens {
                let sums = &sums[token * count * PANEL..][..count * PANEL];
                for i in 0..(count * PANEL).min(cols - first * PANEL) {
                    let lane = i % PANEL;
                    let sum = sums[i - lane + if E::SPLIT { lane / 2 + lane % 2 * LANES } else { lane }];
                    // SAFETY: the assert bounds the elements of dx; each panel's columns are in one share.
                    unsafe {
                        let to = dx.at(dx_at + token * stride + first * PANEL + i);
                        *to = if accumulate { *to + sum } else { sum };
                    }
                }
            }
        }
    });
}

for_each_width! {
    /// `add` for so many panels.
    ///
    /// # Safety
    /// As for `add`.
    unsafe fn add_panels<W: Wide, E: Element>(count: usize, w: (*const E, usize), list: &[[f32; 3]], sums: *mut f32) {
        // SAFETY: passed on.
        unsafe {
            match count {
                1 => add::<W, E, 1>(w, list, sums),
                2 => add::<W, E, 2>(w, list, sums),
                3 => add::<W, E, 3>(w, list, sums),
                _ => add::<W, E, TOGETHER>(w, list, sums),
            }
        }
    }
}

for_each_width! {
    /// Adds rows of `P` panels, times factors, to sums of tokens: two halves of each panel, as [`Element::halves`] gives them.
    ///
    /// # Safety
    /// `w` is the first of panels so far apart that have these rows, and `sums` has 32 for each panel of each token; the
    /// processor has the instructions.
    unsafe fn add<W: Wide, E: Element; const P: usize>(w: (*const E, usize), list: &[[f32; 3]], sums: *mut f32) {
        for (at, [row, token, factor]) in list.iter().enumerate() {
            let from = |row: f32, panel: usize| w.0.wrapping_add(row.to_bits() as usize * PANEL + panel * w.1);
            if let Some([row, ..]) = list.get(at + AHEAD) {
                for panel in 0..P {
                    for line in (0..PANEL * size_of::<E>()).step_by(LINE) {
                        prefetch::<_MM_HINT_T0>(from(*row, panel).cast::<i8>().wrapping_add(line));
                    }
                }
            }
            // SAFETY: passed on.
            unsafe {
                let factor = W::set(*factor);
                for panel in 0..P {
                    let halves: [W; 2] = E::halves(from(*row, panel));
                    let to = sums.add((token.to_bits() as usize * P + panel) * PANEL);
                    for (half, w) in halves.into_iter().enumerate() {
                        let to = to.add(half * LANES);
                        factor.multiply_add(w, W::load(to)).store(to);
                    }
                }
            }
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn what_is_no_number_is_no_zero() {
        let Some(level) = crate::ops::simd::level() else { return };
        let (t, rows, cols) = (4, WIDE + 1, 5);
        let mut dy = vec![0.0; t * rows];
        (dy[7], dy[8]) = (2.0, -0.0);
        dy[rows + rows - 1] = f32::NAN;
        dy[2 * rows + 64] = f32::INFINITY;
        let non_zeros = NonZeros::of(level, View::of(&dy, t, rows)).unwrap();
        assert_eq!(non_zeros.list().len(), 3);
        let w = vec![1.0; packed_len(rows, cols)];
        let mut dx = vec![1.0; t * cols];
        let to = ViewMut::of(&mut dx, t, cols);
        sparse_backward(level, &non_zeros, Panels::F32(&w), (rows, cols), to, true);
        let same = |row: usize, of: fn(f32) -> bool| dx[row * cols..][..cols].iter().all(|v| of(*v));
        assert!(
            same(0, |v| v == 3.0) && same(1, f32::is_nan) && same(2, |v| v == f32::INFINITY) && same(3, |v| v == 1.0)
        );
    }
}
