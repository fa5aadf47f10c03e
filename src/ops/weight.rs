//! The frozen matrix of a linear layer, in the dtype that it is kept in, and its two products:
//! `y = x Wᵀ` and `dx = dy W`. It never gets a gradient.
//!
//! The rows stay in the checkpoint's order, (out, in), and are the only copy: what a product wants in another order it
//! rearranges a panel at a time. That order is also the one that decoding a single token reads fastest.

use super::matmul::{Side, Threads, ViewMut, matmul};
use super::matrix::{Matrix, View};
#[cfg(target_arch = "x86_64")]
use super::simd;
use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};
use rayon::prelude::*;
use std::ops::Range;

/// Elements that are decoded to f32 at a time: 1 MB, which stays in the second-level cache.
const PANEL: usize = 1 << 18;

/// Rows of a batch up to which a weight is better read in its own order.
#[cfg(target_arch = "x86_64")]
const FEW: usize = 3;

/// Elements of a frozen matrix.
#[derive(Debug, Clone)]
pub enum Data {
    /// 32 bit.
    F32(Vec<f32>),
    /// bfloat16.
    Bf16(Vec<bf16>),
    /// IEEE half.
    F16(Vec<f16>),
}

/// How frozen weights are kept in memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Store {
    /// 32 bit.
    F32,
    /// bfloat16.
    Bf16,
    /// IEEE half.
    F16,
}

/// A frozen (rows, cols) = (out, in) matrix.
#[derive(Debug, Clone)]
pub struct Weight {
    rows: usize,
    cols: usize,
    data: Data,
}

impl Weight {
    /// A matrix of `rows * cols` elements.
    ///
    /// # Panics
    /// When `data` has another number of elements.
    #[must_use]
    pub fn new(rows: usize, cols: usize, data: Data) -> Self {
        let len = match &data {
            Data::F32(v) => v.len(),
            Data::Bf16(v) => v.len(),
            Data::F16(v) => v.len(),
        };
        assert_eq!(len, rows * cols, "weight: {len} elements for ({rows}, {cols})");
        Self { rows, cols, data }
    }

    /// Output channels.
    #[must_use]
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Input channels.
    #[must_use]
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// Bytes in memory.
    #[must_use]
    pub fn bytes(&self) -> usize {
        match &self.data {
            Data::F32(v) => size_of_val(v.as_slice()),
            Data::Bf16(v) => size_of_val(v.as_slice()),
            Data::F16(v) => size_of_val(v.as_slice()),
        }
    }

    /// Some rows in f32.
    pub fn decode_rows(&self, rows: Range<usize>, out: &mut [f32]) {
        let elements = rows.start * self.cols..rows.end * self.cols;
        match &self.data {
            Data::F32(v) => out.copy_from_slice(&v[elements]),
            Data::Bf16(v) => v[elements].convert_to_f32_slice(out),
            Data::F16(v) => v[elements].convert_to_f32_slice(out),
        }
    }

    fn panels(&self) -> impl Iterator<Item = Range<usize>> + use<> {
        let rows = (PANEL / self.cols.max(1)).max(16);
        let all = self.rows;
        (0..all.div_ceil(rows)).map(move |i| i * rows..((i + 1) * rows).min(all))
    }

    /// Decodes a panel into `scratch` with all threads.
    fn decode_panel(&self, rows: &Range<usize>, scratch: &mut Vec<f32>) {
        scratch.resize(rows.len() * self.cols, 0.0);
        let share = rows.len().div_ceil(rayon::current_num_threads()).max(1);
        scratch.par_chunks_mut(share * self.cols).enumerate().for_each(|(i, out)| {
            let from = rows.start + i * share;
            self.decode_rows(from..from + out.len() / self.cols, out);
        });
    }

    #[cfg(target_arch = "x86_64")]
    fn simd_rows(&self) -> simd::Rows<'_> {
        match &self.data {
            Data::F32(v) => simd::Rows::F32(v),
            Data::Bf16(v) => simd::Rows::Bf16(v),
            Data::F16(v) => simd::Rows::F16(v),
        }
    }

    /// `y = x Wᵀ`, added to `y` where `accumulate`.
    ///
    /// # Shapes
    /// `x`: (T, in); `y`: (T, out).
    pub fn forward(&self, x: View<'_>, y: &mut Matrix, accumulate: bool) {
        #[cfg(target_arch = "x86_64")]
        if let Some(level) = simd::level() {
            let shape = (self.rows, self.cols);
            return if x.rows <= FEW {
                simd::few_rows(x, self.simd_rows(), shape, y, accumulate)
            } else {
                simd::product(level, simd::Product::Forward, x, self.simd_rows(), shape, y, accumulate)
            };
        }
        self.forward_portable(x, y, accumulate);
    }

    fn forward_portable(&self, x: View<'_>, y: &mut Matrix, accumulate: bool) {
        let (total, cols) = (y.cols(), self.cols);
        if let Data::F32(w) = &self.data {
            let w = View::of(w, self.rows, cols);
            return matmul(Threads::All, ViewMut::columns(y, total, 0..total), accumulate, 1.0, Side::N(x), Side::T(w));
        }
        let mut scratch = Vec::new();
        for rows in self.panels() {
            self.decode_panel(&rows, &mut scratch);
            let w = View::of(&scratch, rows.len(), cols);
            matmul(Threads::All, ViewMut::columns(y, total, rows), accumulate, 1.0, Side::N(x), Side::T(w));
        }
    }

    /// `dx = dy W`, added to `dx` where `accumulate`.
    ///
    /// # Shapes
    /// `dy`: (T, out); `dx`: (T, in).
    pub fn backward(&self, dy: View<'_>, dx: &mut Matrix, accumulate: bool) {
        #[cfg(target_arch = "x86_64")]
        if let Some(level) = simd::level() {
            let shape = (self.rows, self.cols);
            return simd::product(level, simd::Product::Backward, dy, self.simd_rows(), shape, dx, accumulate);
        }
        self.backward_portable(dy, dx, accumulate);
    }

    fn backward_portable(&self, dy: View<'_>, dx: &mut Matrix, accumulate: bool) {
        let total = dx.cols();
        if let Data::F32(w) = &self.data {
            let w = View::of(w, self.rows, self.cols);
            return matmul(
                Threads::All,
                ViewMut::columns(dx, total, 0..total),
                accumulate,
                1.0,
                Side::N(dy),
                Side::N(w),
            );
        }
        let mut scratch = Vec::new();
        for rows in self.panels() {
            self.decode_panel(&rows, &mut scratch);
            let (w, add) = (View::of(&scratch, rows.len(), self.cols), accumulate || rows.start > 0);
            let dy = dy.slice_cols(rows);
            matmul(Threads::All, ViewMut::columns(dx, total, 0..total), add, 1.0, Side::N(dy), Side::N(w));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::testing::{Oracle, assert_close, random};

    /// `tolerance`: products of bf16 weights may round the input to bf16.
    fn check(weight: &Weight, t: usize, tolerance: f32, portable: bool) {
        let (out, inn) = (weight.rows, weight.cols);
        let mut decoded = vec![0.0; out * inn];
        weight.decode_rows(0..out, &mut decoded);
        let (x, dy) = (random(t * inn, 2), random(t * out, 3));
        let oracle = Oracle::run(&[(&x, t, inn), (&decoded, out, inn)], |i| i[0].matmul(&i[1].t()?), &dy);
        let mut y = Matrix::from_slice(t, out, &vec![1.0; t * out]);
        let mut dx = Matrix::new(t, inn);
        if portable {
            weight.forward_portable(View::of(&x, t, inn), &mut y, true);
            weight.backward_portable(View::of(&dy, t, out), &mut dx, false);
        } else {
            weight.forward(View::of(&x, t, inn), &mut y, true);
            weight.backward(View::of(&dy, t, out), &mut dx, false);
        }
        let want: Vec<f32> = oracle.y.iter().map(|v| v + 1.0).collect();
        assert_close(&y, &want, tolerance);
        assert_close(&dx, &oracle.grads[0], tolerance);
    }

    #[test]
    fn both_products_equal_the_reference_in_every_store() {
        // Odd sizes, few rows, several panels, and more depth than one panel has.
        for (t, out, inn) in [(5, 123, 77), (1, 64, 32), (37, 9, 130), (3, 700, 900), (29, 66, 1301), (13, 1203, 35)] {
            let w = random(out * inn, 1);
            let bf: Vec<bf16> = w.iter().map(|v| bf16::from_f32(*v)).collect();
            let hf: Vec<f16> = w.iter().map(|v| f16::from_f32(*v)).collect();
            for (data, tolerance) in [(Data::F32(w.clone()), 1e-5), (Data::F16(hf), 1e-5), (Data::Bf16(bf), 8e-3)] {
                let weight = Weight::new(out, inn, data);
                check(&weight, t, 1e-5, true);
                check(&weight, t, tolerance, false);
            }
        }
    }
}
