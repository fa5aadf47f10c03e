//! Routing of a mixture of experts (Shazeer et al. 2017, arXiv:1701.06538): which experts a row visits, and their shares.
//!
//! With `p = softmax(logits)` a row visits the experts of its `k` largest `p`; their shares `s` are those `p`, or
//! `p / Σ p` over the visited ones. The choice itself has no gradient; that of the shares is, for the second kind,
//! `dp = (ds - Σ ds s) / Σ p`, and through the softmax `dlogits = p (dp - Σ dp p)`. Not here: the experts.

use super::device::{Constant, Device, Dtype};
use super::matrix::Matrix;
use super::rows::{dot_rows, gather, scale_rows, scatter_add};

/// Which experts each row visits, and what the backward needs.
#[derive(Debug)]
pub struct Routing {
    /// Softmax of the router's logits: (T, E).
    p: Matrix,
    /// The visited experts of every row, k each, the largest share first.
    experts: Vec<usize>,
    /// Their shares.
    shares: Vec<f32>,
    k: usize,
    norm_topk: bool,
    /// Where the rows are.
    place: Option<(Device, Dtype)>,
}

/// The rows at one expert.
#[derive(Debug, Clone)]
pub struct Visits {
    /// Which rows, ascending.
    pub rows: Constant<u32>,
    /// Their shares.
    pub shares: Constant<f32>,
    /// The places of these among all shares.
    places: Constant<u32>,
}

impl Routing {
    /// Routes rows to their `k` best experts, the lower index first where two are equal.
    ///
    /// # Shapes
    /// `logits`: (T, E), of which k at most are visited.
    #[must_use]
    pub fn new(logits: &Matrix, k: usize, norm_topk: bool) -> Self {
        let place = logits.place().map(|(device, dtype)| (device.clone(), dtype));
        // The host decides: which products are launched depends on it.
        let mut logits = logits.to_host();
        let (rows, n_expert) = (logits.rows(), logits.cols());
        let mut experts = Vec::with_capacity(rows * k);
        let mut shares = Vec::with_capacity(rows * k);
        let mut order: Vec<usize> = Vec::with_capacity(n_expert);
        for p in logits.chunks_exact_mut(n_expert) {
            softmax(p);
            order.clear();
            order.extend(0..n_expert);
            order.sort_by(|a, b| p[*b].total_cmp(&p[*a]));
            let total: f32 = if norm_topk { order[..k].iter().map(|e| p[*e]).sum() } else { 1.0 };
            experts.extend_from_slice(&order[..k]);
            shares.extend(order[..k].iter().map(|e| p[*e] / total));
        }
        Self { p: logits, experts, shares, k, norm_topk, place }
    }

    /// The rows that visit each expert.
    #[must_use]
    pub fn visits(&self) -> Vec<Visits> {
        let mut places = vec![Vec::new(); self.p.cols()];
        for (at, expert) in self.experts.iter().enumerate() {
            places[*expert].push(at as u32);
        }
        let visits = |places: Vec<u32>| Visits {
            rows: places.iter().map(|at| at / self.k as u32).collect(),
            shares: places.iter().map(|at| self.shares[*at as usize]).collect(),
            places: places.into(),
        };
        places.into_iter().map(visits).collect()
    }

    /// `y[row] += share · part`.
    ///
    /// # Shapes
    /// `part`: (visits, C); `y`: (T, C).
    pub fn add_to(&self, part: &Matrix, visits: &Visits, y: &mut Matrix) {
        scatter_add(part, &visits.rows, Some(&visits.shares), y);
    }

    /// Gradient of an expert's output, `share · dy[row]`; that of the shares, `part · dy[row]`, is written to `d_shares`.
    ///
    /// # Shapes
    /// `dy`: (T, C); `part`: (visits, C); `d_shares`: (1, T k); returns (visits, C).
    #[must_use]
    pub fn add_to_backward(&self, dy: &Matrix, part: &Matrix, visits: &Visits, d_shares: &mut Matrix) -> Matrix {
        let mut d = gather(dy, &visits.rows);
        dot_rows(&d, part, &visits.places, d_shares);
        scale_rows(&mut d, &visits.shares);
        d
    }

    /// Gradient of the logits.
    ///
    /// # Shapes
    /// `d_shares`: (1, T k), of all experts; returns (T, E).
    #[must_use]
    pub fn backward(&self, d_shares: &Matrix) -> Matrix {
        // The one wait for the device: `p` and the choice are the host's.
        let d_shares = d_shares.to_host();
        let n_expert = self.p.cols();
        let mut d = Matrix::zeros(self.p.rows(), n_expert);
        let rows = d.chunks_exact_mut(n_expert).zip(self.p.chunks_exact(n_expert)).zip(d_shares.chunks_exact(self.k));
        for (row, ((d, p), ds)) in rows.enumerate() {
            let visited = row * self.k..(row + 1) * self.k;
            let (experts, shares) = (&self.experts[visited.clone()], &self.shares[visited]);
            let (mut mean, mut total) = (0.0, 1.0);
            if self.norm_topk {
                mean = ds.iter().zip(shares).map(|(d, s)| d * s).sum();
                total = experts.iter().map(|e| p[*e]).sum();
            }
            experts.iter().zip(ds).for_each(|(e, ds)| d[*e] = (ds - mean) / total);
            let dot: f32 = d.iter().zip(p).map(|(d, p)| d * p).sum();
            d.iter_mut().zip(p).for_each(|(d, p)| *d = p * (*d - dot));
        }
        match &self.place {
            Some((device, dtype)) => d.to(Some((device, *dtype))),
            None => d,
        }
    }

    /// Room for the gradient of the shares, f32, where the rows are.
    ///
    /// # Shapes
    /// Returns (1, T k).
    #[must_use]
    pub fn d_shares(&self) -> Matrix {
        match &self.place {
            Some((device, _)) => Matrix::new_on(device, Dtype::F32, 1, self.shares.len()),
            None => Matrix::new(1, self.shares.len()),
        }
    }
}

fn softmax(row: &mut [f32]) {
    let max = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    row.iter_mut().for_each(|v| *v = (*v - max).exp());
    let sum: f32 = row.iter().sum();
    row.iter_mut().for_each(|v| *v /= sum);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::testing::{Oracle, assert_close, random};
    use candle_core::{D, Device, Tensor};

    /// `y[t] = Σ_j share[t, j] · part[t, expert of j]`, the experts' outputs being given.
    fn reference(
        inputs: &[Tensor],
        k: usize,
        norm_topk: bool,
        n_expert: usize,
        c: usize,
    ) -> candle_core::Result<Tensor> {
        let p = candle_nn::ops::softmax(&inputs[0], D::Minus1)?;
        let best = p.arg_sort_last_dim(false)?.narrow(1, 0, k)?.contiguous()?;
        let mut mask = vec![0.0f32; p.elem_count()];
        for (row, best) in best.to_vec2::<u32>()?.iter().enumerate() {
            best.iter().for_each(|e| mask[row * n_expert + *e as usize] = 1.0);
        }
        let mut shares = (&p * Tensor::from_vec(mask, p.shape(), &Device::Cpu)?)?;
        if norm_topk {
            shares = shares.broadcast_div(&shares.sum_keepdim(1)?)?;
        }
        let t = p.dim(0)?;
        shares.unsqueeze(1)?.matmul(&inputs[1].reshape((t, n_expert, c))?)?.squeeze(1)
    }

    #[test]
    fn shares_and_their_gradient_equal_the_reference() {
        let (t, n_expert, c) = (5, 7, 11);
        for (k, norm_topk) in [(1, true), (2, true), (3, false), (7, true)] {
            let (logits, parts, dy) = (random(t * n_expert, 1), random(t * n_expert * c, 2), random(t * c, 3));
            let inputs: [(&[f32], usize, usize); 2] = [(&logits, t, n_expert), (&parts, t, n_expert * c)];
            let oracle = Oracle::run(&inputs, |i| reference(i, k, norm_topk, n_expert, c), &dy);
            let routing = Routing::new(&Matrix::from_slice(t, n_expert, &logits), k, norm_topk);
            let (mut y, dy) = (Matrix::zeros(t, c), Matrix::from_slice(t, c, &dy));
            let mut d_shares = routing.d_shares();
            d_shares.fill(f32::NAN);
            let mut d_parts = vec![0.0; parts.len()];
            for (expert, visits) in routing.visits().iter().enumerate() {
                let all = Matrix::from_slice(t, n_expert * c, &parts);
                let mut part = Matrix::new(visits.rows.len(), c);
                for (part, row) in part.chunks_exact_mut(c).zip(&*visits.rows) {
                    part.copy_from_slice(&all.row(*row as usize)[expert * c..][..c]);
                }
                routing.add_to(&part, visits, &mut y);
                let d = routing.add_to_backward(&dy, &part, visits, &mut d_shares);
                for (d, row) in d.chunks_exact(c).zip(&*visits.rows) {
                    d_parts[(*row as usize * n_expert + expert) * c..][..c].copy_from_slice(d);
                }
            }
            assert_close(&y, &oracle.y, 1e-6);
            assert_close(&routing.backward(&d_shares), &oracle.grads[0], 1e-6);
            assert_close(&d_parts, &oracle.grads[1], 1e-6);
        }
    }
}
