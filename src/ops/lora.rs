//! The low-rank update of a frozen product (Hu et al. 2021, arXiv:2106.09685): `y += s · drop(x) Aᵀ Bᵀ`.
//!
//! With `h = drop(x) Aᵀ`, which is kept: `dB += s dyᵀ h`, `dh = s dy B`, `dA += dhᵀ drop(x)`, `dx += drop(dh A)`.
//! Dropout is inverted (kept values are divided by `1 - p`) and its mask is a hash of seed and element, so that the
//! backward, or a forward run again, makes the same mask without keeping it.

use super::device::{flag, long};
use super::math::vectorize;
use super::matmul::{Side, Threads, ViewMut, matmul};
use super::matrix::{Matrix, View, rows_per_task};
use rayon::prelude::*;
use std::ops::Range;

/// Dropout of an adapter's input.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Dropout {
    /// Share of the values that become 0, in [0, 1).
    pub p: f32,
    /// Which mask.
    pub seed: u64,
}

/// 32 random bits of element `index` (the finalizer of MurmurHash3 over both, twice).
#[inline(always)]
fn hash(seed: u64, index: u32) -> u32 {
    let mut h = index ^ seed as u32;
    for _ in 0..2 {
        h ^= h >> 16;
        h = h.wrapping_mul(0x85eb_ca6b);
        h ^= h >> 13;
        h = h.wrapping_mul(0xc2b2_ae35);
        h ^= h >> 16;
        h = h.wrapping_add((seed >> 32) as u32);
    }
    h
}

impl Dropout {
    /// Values below this of 2³² are dropped.
    #[inline(always)]
    fn limit(&self) -> u32 {
        // Values in f32 would round 2³² - 1 up; 64 bits keep the limit exact.
        (f64::from(self.p) * 4_294_967_296.0) as u32
    }

    /// `out = drop(x)`, added to `out` where `accumulate`, on a device; whether they are on one.
    fn on_device(&self, x: &Matrix, out: &mut Matrix, accumulate: bool) -> bool {
        let Some((device, dtype)) = x.place() else { return false };
        let n = x.rows() * x.cols();
        let (x, out, keep) = (x.pointer(), out.pointer(), 1.0 / (1.0 - self.p));
        let args =
            [x.into(), out.into(), long(n), self.seed.into(), self.limit().into(), keep.into(), flag(accumulate)];
        device.launch_over("dropout", Some(dtype), n, &args);
        true
    }

    /// `out = drop(x)`, added to `out` where `accumulate`, on the host.
    fn on_host(&self, x: &Matrix, out: &mut Matrix, accumulate: bool) {
        let chunk = (rows_per_task(x.rows()) * x.cols()).max(1);
        out.par_chunks_mut(chunk).zip(x.par_chunks(chunk)).enumerate().for_each(|(i, (out, x))| {
            drop_some(*self, (i * chunk) as u32, x, out, accumulate);
        });
    }

    /// `drop(x)`.
    #[must_use]
    pub fn forward(&self, x: &Matrix) -> Matrix {
        let mut out = x.new_like(x.rows(), x.cols());
        if !self.on_device(x, &mut out, false) {
            self.on_host(x, &mut out, false);
        }
        out
    }

    /// `dx += drop(d)`, by the mask of the forward.
    pub fn backward(&self, d: &Matrix, dx: &mut Matrix) {
        if !self.on_device(d, dx, true) {
            self.on_host(d, dx, true);
        }
    }
}

vectorize! {
    /// Dropout of the elements from `first` on.
    fn drop_some(dropout: Dropout, first: u32, x: &[f32], out: &mut [f32], accumulate: bool) {
        let (limit, keep) = (dropout.limit(), 1.0 / (1.0 - dropout.p));
        for (i, (out, x)) in out.iter_mut().zip(x).enumerate() {
            let factor = if hash(dropout.seed, first.wrapping_add(i as u32)) < limit { 0.0 } else { keep };
            *out = if accumulate { *out + x * factor } else { x * factor };
        }
    }
}

/// One low-rank pair within the columns that it updates.
#[derive(Debug, Clone)]
pub struct Pair<'a> {
    /// Columns of `h`, as many as the rank.
    pub rank: Range<usize>,
    /// Columns of `y`.
    pub columns: Range<usize>,
    /// `B`: (columns, rank).
    pub b: View<'a>,
    /// `s`.
    pub scale: f32,
}

impl Pair<'_> {
    /// `y[:, columns] += s h[:, rank] Bᵀ`.
    ///
    /// # Shapes
    /// `h`: (T, R); `y`: (T, out).
    pub fn forward(&self, h: &Matrix, y: &mut Matrix) {
        let y = y.columns_mut(self.columns.clone());
        matmul(Threads::All, y, true, self.scale, Side::N(h.columns(self.rank.clone())), Side::T(self.b));
    }

    /// `dB += s dyᵀ h` and `dh[:, rank] = s dy B`.
    ///
    /// # Shapes
    /// `dy`: (T, out); `h`, `dh`: (T, R); `db`: (columns, rank).
    pub fn backward(&self, dy: &Matrix, h: &Matrix, db: ViewMut<'_>, dh: &mut Matrix) {
        let dy = dy.columns(self.columns.clone());
        matmul(Threads::All, db, true, self.scale, Side::T(dy), Side::N(h.columns(self.rank.clone())));
        let dh = dh.columns_mut(self.rank.clone());
        matmul(Threads::All, dh, false, self.scale, Side::N(dy), Side::N(self.b));
    }
}

/// `h = x Aᵀ`, the A's of all pairs of a projection below one another.
///
/// # Shapes
/// `x`: (T, in); `a`: (R, in); returns (T, R).
#[must_use]
pub fn down(x: &Matrix, a: View<'_>) -> Matrix {
    let mut h = x.new_like(x.rows(), a.rows);
    matmul(Threads::All, h.view_mut(), false, 1.0, Side::N(x.view()), Side::T(a));
    h
}

/// `dA += dhᵀ x`.
///
/// # Shapes
/// `dh`: (T, R); `x`: (T, in), after dropout; `da`: (R, in).
pub fn down_backward_weight(dh: &Matrix, x: &Matrix, da: ViewMut<'_>) {
    matmul(Threads::All, da, true, 1.0, Side::T(dh.view()), Side::N(x.view()));
}

/// `dx += dh A`, through the dropout's mask where there is one.
///
/// # Shapes
/// `dh`: (T, R); `a`: (R, in); `dx`: (T, in).
pub fn down_backward_input(dh: &Matrix, a: View<'_>, dropout: Option<Dropout>, dx: &mut Matrix) {
    let (lhs, rhs) = (Side::N(dh.view()), Side::N(a));
    match dropout {
        None => matmul(Threads::All, dx.view_mut(), true, 1.0, lhs, rhs),
        Some(dropout) => {
            let mut d = dx.new_like(dx.rows(), dx.cols());
            matmul(Threads::All, d.view_mut(), false, 1.0, lhs, rhs);
            dropout.backward(&d, dx);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::testing::{Oracle, assert_close, random};
    use candle_core::Tensor;

    /// alpha != r, B != 0, x != 0, two pairs over different columns of one projection.
    #[test]
    fn two_pairs_side_by_side_equal_the_reference() {
        let (t, inn, out, r, scale) = (5, 77, 40, 3, 5.0 / 3.0);
        let (x, a, b1, b2) = (random(t * inn, 1), random(2 * r * inn, 2), random(10 * r, 3), random(15 * r, 4));
        let dy = random(t * out, 5);
        for dropout in [None, Some(Dropout { p: 0.3, seed: 7 })] {
            let mask = match dropout {
                Some(d) => d.forward(&Matrix::from_slice(t, inn, &vec![1.0; t * inn])).to_vec(),
                None => vec![1.0; t * inn],
            };
            let reference = |i: &[Tensor]| {
                let mask = Tensor::from_slice(&mask, (t, inn), i[0].device())?;
                let h = i[0].mul(&mask)?.matmul(&i[1].t()?)?;
                let first = (h.narrow(1, 0, r)?.matmul(&i[2].t()?)? * f64::from(scale))?;
                let second = (h.narrow(1, r, r)?.matmul(&i[3].t()?)? * f64::from(scale))?;
                let (left, right) = (first.zeros_like()?, Tensor::zeros((t, 15), first.dtype(), first.device())?);
                Tensor::cat(&[left.narrow(1, 0, 0)?, first, right, second], 1)
            };
            let inputs = [(&x[..], t, inn), (&a[..], 2 * r, inn), (&b1[..], 10, r), (&b2[..], 15, r)];
            let oracle = Oracle::run(&inputs, reference, &dy);
            let pairs = [
                Pair { rank: 0..r, columns: 0..10, b: View::of(&b1, 10, r), scale },
                Pair { rank: r..2 * r, columns: 25..40, b: View::of(&b2, 15, r), scale },
            ];
            let xm = Matrix::from_slice(t, inn, &x);
            let dropped = dropout.map_or_else(|| xm.clone(), |d| d.forward(&xm));
            let a = View::of(&a, 2 * r, inn);
            let h = down(&dropped, a);
            let mut y = Matrix::zeros(t, out);
            pairs.iter().for_each(|p| p.forward(&h, &mut y));
            assert_close(&y, &oracle.y, 1e-5);

            let dy = Matrix::from_slice(t, out, &dy);
            let (mut db1, mut db2, mut da) = (vec![0.0; 10 * r], vec![0.0; 15 * r], vec![0.0; 2 * r * inn]);
            let (mut dh, mut dx) = (Matrix::new(t, 2 * r), Matrix::zeros(t, inn));
            pairs[0].backward(&dy, &h, ViewMut::of(&mut db1, 10, r), &mut dh);
            pairs[1].backward(&dy, &h, ViewMut::of(&mut db2, 15, r), &mut dh);
            down_backward_weight(&dh, &dropped, ViewMut::of(&mut da, 2 * r, inn));
            down_backward_input(&dh, a, dropout, &mut dx);
            for (got, want) in [&dx[..], &da, &db1, &db2].iter().zip(&oracle.grads) {
                assert_close(got, want, 1e-5);
            }
        }
    }

    #[test]
    fn dropout_keeps_the_mean_and_differs_by_seed() {
        let ones = Matrix::from_slice(100, 1000, &vec![1.0; 100_000]);
        let (a, b) = (Dropout { p: 0.25, seed: 1 }.forward(&ones), Dropout { p: 0.25, seed: 2 }.forward(&ones));
        let mean = a.iter().sum::<f32>() / 100_000.0;
        assert!((mean - 1.0).abs() < 0.01, "mean {mean}");
        let both = a.iter().zip(b.iter()).filter(|(x, y)| **x == 0.0 && **y == 0.0).count() as f64 / 100_000.0;
        assert!((both - 0.0625).abs() < 0.005, "joint drop rate {both}");
    }
}
