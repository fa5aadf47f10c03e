//! RMS norm (Zhang and Sennrich 2019, arXiv:1910.07467) and layer norm (Ba et al. 2016, arXiv:1607.06450).
//!
//! `y = (x - m) r w + b` with `r = 1 / sqrt(mean((x - m)²) + eps)`, and `m = mean(x)` for the layer norm, 0 for RMS.
//! With `g = dy w` and `x̂ = (x - m) r`: `dx = r (g - x̂ mean(g x̂))`, for the layer norm less `r mean(g)`.
//! The weights are frozen, so they get no gradient. Nothing is saved: a row's statistics cost less to compute again
//! than to keep. A unit offset (Gemma's `1 + w`) is added when the weight is loaded.
//!
//! The norm of queries and keys is the same over groups of columns: one head, or all heads together.

use super::device::{Constant, Device, Dtype, flag, int, long};
use super::math::{dot, sum, vectorize};
use super::matrix::{Matrix, View, rows_per_task};
use super::rows;
use rayon::prelude::*;

/// Which statistics a norm takes out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// The root of the mean square.
    Rms,
    /// Mean and standard deviation.
    Layer,
}

/// A frozen norm over groups of `group` columns; `weight` and `bias` repeat along a row that is longer than they are.
#[derive(Debug, Clone)]
pub struct Norm {
    /// Which statistics.
    pub kind: Kind,
    /// Added to the variance or mean square.
    pub eps: f32,
    /// Columns that are normalized together.
    pub group: usize,
    /// Scale, a whole number of groups; empty means one.
    pub weight: Constant<f32>,
    /// Offset, as long as `weight`.
    pub bias: Option<Constant<f32>>,
}

impl Norm {
    fn weight_of(&self, group: usize) -> &[f32] {
        &self.weight[group * self.group % self.weight.len()..][..self.group]
    }

    /// `y` = the norm of each group of `x`; both hold whole rows of groups.
    #[inline(always)]
    fn forward_groups(&self, x: &[f32], y: &mut [f32]) {
        for (i, (x, y)) in x.chunks_exact(self.group).zip(y.chunks_exact_mut(self.group)).enumerate() {
            let (mean, scale) = self.statistics(x);
            match &self.bias {
                None => {
                    for ((y, x), w) in y.iter_mut().zip(x).zip(self.weight_of(i)) {
                        *y = (x - mean) * scale * w;
                    }
                }
                Some(bias) => {
                    let b = &bias[i * self.group % bias.len()..][..self.group];
                    for (((y, x), w), b) in y.iter_mut().zip(x).zip(self.weight_of(i)).zip(b) {
                        *y = (x - mean) * scale * w + b;
                    }
                }
            }
        }
    }

    #[inline(always)]
    fn statistics(&self, x: &[f32]) -> (f32, f32) {
        let n = x.len() as f32;
        match self.kind {
            Kind::Rms => (0.0, 1.0 / (dot(x, x) / n + self.eps).sqrt()),
            Kind::Layer => {
                let mean = sum(x) / n;
                let variance = x.iter().map(|v| (v - mean) * (v - mean)).sum::<f32>() / n;
                (mean, 1.0 / (variance + self.eps).sqrt())
            }
        }
    }

    #[inline(always)]
    fn backward_groups(&self, dy: &[f32], x: &[f32], dx: &mut [f32], accumulate: bool) {
        let groups = x.chunks_exact(self.group).zip(dy.chunks_exact(self.group)).zip(dx.chunks_exact_mut(self.group));
        for (i, ((x, dy), dx)) in groups.enumerate() {
            let (mean, r) = self.statistics(x);
            let (w, n) = (self.weight_of(i), x.len() as f32);
            let (g_sum, gx_sum) = gradient_sums(x, dy, w, mean);
            let along = gx_sum * r * r * r / n;
            let across = if self.kind == Kind::Layer { g_sum * r / n } else { 0.0 };
            for (((dx, x), dy), w) in dx.iter_mut().zip(x).zip(dy).zip(w) {
                let d = dy * w * r - (x - mean) * along - across;
                *dx = if accumulate { *dx + d } else { d };
            }
        }
    }

    /// The norm of every row of `x`.
    ///
    /// # Shapes
    /// `x`: (T, C), C a multiple of `group`; returns (T, C).
    #[must_use]
    pub fn forward(&self, x: &Matrix) -> Matrix {
        let mut y = x.new_like(x.rows(), x.cols());
        if let Some(place) = x.place() {
            self.forward_on(place, x.view(), (y.pointer(), y.cols()), 0);
            return y;
        }
        let chunk = (rows_per_task(x.rows()) * x.cols()).max(1);
        y.par_chunks_mut(chunk).zip(x.par_chunks(chunk)).for_each(|(y, x)| forward_rows(self, x, y));
        y
    }

    /// The norm of every row of `x`, and `x` again, for which it is read once.
    ///
    /// # Shapes
    /// `x`: (T, C), C a multiple of `group`; returns two of (T, C).
    #[must_use]
    pub fn forward_and_copy(&self, x: &Matrix) -> (Matrix, Matrix) {
        let [mut y, mut copy] = [(); 2].map(|()| x.new_like(x.rows(), x.cols()));
        if let Some(place) = x.place() {
            self.forward_on(place, x.view(), (y.pointer(), y.cols()), copy.pointer());
            return (y, copy);
        }
        let chunk = (rows_per_task(x.rows()) * x.cols()).max(1);
        let to = y.par_chunks_mut(chunk).zip(copy.par_chunks_mut(chunk));
        to.zip(x.par_chunks(chunk)).for_each(|((y, copy), x)| {
            forward_rows(self, x, y);
            copy.copy_from_slice(x);
        });
        (y, copy)
    }

    /// Gradient of the input, written to `dx` or added to it.
    ///
    /// # Shapes
    /// `dy`, `x`, `dx`: (T, C).
    pub fn backward(&self, dy: &Matrix, x: &Matrix, dx: &mut Matrix, accumulate: bool) {
        if let Some(place) = x.place() {
            return self.backward_on(place, dy.view(), x, (dx.pointer(), dx.cols()), accumulate);
        }
        let chunk = (rows_per_task(x.rows()) * x.cols()).max(1);
        let parts = dx.par_chunks_mut(chunk).zip(dy.par_chunks(chunk)).zip(x.par_chunks(chunk));
        parts.for_each(|((dx, dy), x)| backward_rows(self, dy, x, dx, accumulate));
    }

    /// Normalizes some columns of `x` in place, and returns what stood there for the backward.
    ///
    /// # Shapes
    /// `x`: (T, C); `columns`: a range of whole groups.
    #[must_use]
    pub fn forward_columns(&self, x: &mut Matrix, columns: std::ops::Range<usize>) -> Matrix {
        let mut before = x.new_like(x.rows(), columns.len());
        if let Some(place) = x.place() {
            rows::copy(x.columns(columns.clone()), &mut before.view_mut());
            self.forward_on(place, before.view(), (x.columns(columns).pointer(), x.cols()), 0);
            return before;
        }
        let cols = x.cols();
        before.par_chunks_mut(columns.len()).zip(x.par_chunks_mut(cols)).for_each(|(before, x)| {
            before.copy_from_slice(&x[columns.clone()]);
            forward_rows(self, before, &mut x[columns.clone()]);
        });
        before
    }

    /// Turns the gradient of normalized columns into that of what stood there before.
    ///
    /// # Shapes
    /// `d`: (T, C), changed within `columns`; `before`: (T, columns), from `forward_columns`.
    pub fn backward_columns(&self, d: &mut Matrix, before: &Matrix, columns: std::ops::Range<usize>) {
        if let Some(place) = d.place() {
            let dy = d.columns(columns);
            return self.backward_on(place, dy, before, (dy.pointer(), d.cols()), false);
        }
        let cols = d.cols();
        d.par_chunks_mut(cols).zip(before.par_chunks(columns.len())).for_each(|(d, before)| {
            let dy = d[columns.clone()].to_vec();
            backward_rows(self, &dy, before, &mut d[columns.clone()], false);
        });
    }
}

// On a device; `rows` of the kernels are groups.
impl Norm {
    /// (groups, grid, block): a warp for each short group, a block for each long one.
    fn shape(&self, x: &View<'_>) -> (usize, [usize; 3], [usize; 2]) {
        let groups = x.rows * (x.cols / self.group);
        if self.group <= 512 {
            return (groups, [groups.div_ceil(4), 1, 1], [32, 4]);
        }
        (groups, [groups, 1, 1], [(self.group / 8).div_ceil(32).clamp(2, 16) * 32, 1])
    }

    fn kernel(&self, direction: &str) -> String {
        format!("{}_{direction}", if self.kind == Kind::Rms { "rms_norm" } else { "layer_norm" })
    }

    /// Also copies `x` to an address that is not 0.
    fn forward_on(&self, (device, dtype): (&Device, Dtype), x: View<'_>, (y, y_stride): (u64, usize), copy: u64) {
        let (groups, grid, block) = self.shape(&x);
        let args = [
            x.pointer().into(),
            self.weight.on(device).into(),
            self.bias.as_ref().map_or(0, |bias| bias.on(device)).into(),
            y.into(),
            copy.into(),
            int(groups),
            int(self.group),
            int(x.cols / self.group),
            int(self.weight.len() / self.group),
            long(x.stride),
            long(y_stride),
            self.eps.into(),
        ];
        device.launch(&self.kernel("fwd"), Some(dtype), grid, block, 0, &args);
    }

    fn backward_on(
        &self,
        (device, dtype): (&Device, Dtype),
        dy: View<'_>,
        x: &Matrix,
        (dx, dx_stride): (u64, usize),
        accumulate: bool,
    ) {
        let (groups, grid, block) = self.shape(&x.view());
        let args = [
            dy.pointer().into(),
            x.pointer().into(),
            self.weight.on(device).into(),
            dx.into(),
            int(groups),
            int(self.group),
            int(x.cols() / self.group),
            int(self.weight.len() / self.group),
            long(dy.stride),
            long(x.cols()),
            long(dx_stride),
            self.eps.into(),
            flag(accumulate),
        ];
        device.launch(&self.kernel("bwd"), Some(dtype), grid, block, 0, &args);
    }
}

vectorize! {
    fn forward_rows(norm: &Norm, x: &[f32], y: &mut [f32]) {
        norm.forward_groups(x, y);
    }
}

vectorize! {
    fn backward_rows(norm: &Norm, dy: &[f32], x: &[f32], dx: &mut [f32], accumulate: bool) {
        norm.backward_groups(dy, x, dx, accumulate);
    }
}

/// Sums of `dy w` and of `dy w (x - mean)`, in 16 lanes.
#[inline(always)]
fn gradient_sums(x: &[f32], dy: &[f32], w: &[f32], mean: f32) -> (f32, f32) {
    let (mut g_lanes, mut gx_lanes) = ([0.0f32; 16], [0.0f32; 16]);
    let whole = x.len() / 16 * 16;
    let chunks = x.chunks_exact(16).zip(dy.chunks_exact(16)).zip(w.chunks_exact(16));
    for ((x, dy), w) in chunks {
        for j in 0..16 {
            let g = dy[j] * w[j];
            g_lanes[j] += g;
            gx_lanes[j] += g * (x[j] - mean);
        }
    }
    let (mut g_sum, mut gx_sum) = (g_lanes.iter().sum(), gx_lanes.iter().sum());
    for i in whole..x.len() {
        g_sum += dy[i] * w[i];
        gx_sum += dy[i] * w[i] * (x[i] - mean);
    }
    (g_sum, gx_sum)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::testing::{Oracle, assert_close, random};
    use candle_core::{D, Tensor};

    fn reference(norm: &Norm, x: &Tensor) -> candle_core::Result<Tensor> {
        let (t, c) = x.dims2()?;
        let x = x.reshape((t, c / norm.group, norm.group))?;
        let mean = x.mean_keepdim(D::Minus1)?;
        let centred = if norm.kind == Kind::Layer { x.broadcast_sub(&mean)? } else { x.clone() };
        let variance = centred.sqr()?.mean_keepdim(D::Minus1)?;
        let y = centred.broadcast_div(&(variance + f64::from(norm.eps))?.sqrt()?)?.reshape((t, c))?;
        let repeat = c / norm.weight.len();
        let y = y.broadcast_mul(&Tensor::new(norm.weight.repeat(repeat), x.device())?)?;
        match &norm.bias {
            Some(b) => y.broadcast_add(&Tensor::new(b.repeat(repeat), x.device())?),
            None => Ok(y),
        }
    }

    #[test]
    fn forward_and_backward_equal_the_reference() {
        for (kind, biased, cols, group) in [
            (Kind::Rms, false, 123, 123),
            (Kind::Layer, true, 123, 123),
            (Kind::Layer, false, 64, 16),
            (Kind::Rms, false, 96, 32),
        ] {
            let norm = Norm {
                kind,
                eps: 1e-3,
                group,
                weight: random(group, 1).into(),
                bias: biased.then(|| random(group, 2).into()),
            };
            let (x, dy) = (random(5 * cols, 3), random(5 * cols, 4));
            let oracle = Oracle::run(&[(&x, 5, cols)], |t| reference(&norm, &t[0]), &dy);
            let matrix = Matrix::from_slice(5, cols, &x);
            assert_close(&norm.forward(&matrix), &oracle.y, 1e-5);
            let mut dx = Matrix::from_slice(5, cols, &vec![0.5; 5 * cols]);
            norm.backward(&Matrix::from_slice(5, cols, &dy), &matrix, &mut dx, true);
            let want: Vec<f32> = oracle.grads[0].iter().map(|g| g + 0.5).collect();
            assert_close(&dx, &want, 1e-5);
        }
    }

    #[test]
    fn columns_in_place_equal_the_whole() {
        let norm = Norm { kind: Kind::Rms, eps: 1e-5, group: 8, weight: random(8, 1).into(), bias: None };
        let mut x = Matrix::from_slice(3, 40, &random(120, 2));
        let part: Vec<f32> = (0..3).flat_map(|t| x.row(t)[8..32].to_vec()).collect();
        let whole = norm.forward(&Matrix::from_slice(3, 24, &part));
        let before = norm.forward_columns(&mut x, 8..32);
        assert_close(&before, &part, 0.0);
        assert_close(&x.row(1)[8..32], whole.row(1), 0.0);
        let mut d = Matrix::from_slice(3, 40, &random(120, 5));
        let dy: Vec<f32> = (0..3).flat_map(|t| d.row(t)[8..32].to_vec()).collect();
        let mut dx = Matrix::new(3, 24);
        norm.backward(&Matrix::from_slice(3, 24, &dy), &before, &mut dx, false);
        norm.backward_columns(&mut d, &before, 8..32);
        assert_close(&d.row(2)[8..32], dx.row(2), 0.0);
    }
}
