//! Cross-entropy of a chunk of logits, with its gradient in place of the logits.
//!
//! `loss = log(sum e^z) - z[target]` for `z = cap(f · logits)`, `dlogits = f (softmax(z) - onehot) · cap'`. The model's
//! head calls this a few rows at a time, so that the logits of a batch never exist at once, and only for rows that
//! have a target.

use super::device::{Constant, Dtype, flag, int, long};
use super::math::{exp_sum, max, soft_cap, vectorize};
use super::matrix::Matrix;
use rayon::prelude::*;

/// What stands between the head's product and the softmax.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Transform {
    /// Factor on the logits.
    pub scale: f32,
    /// Logits become `cap · tanh(logit / cap)`.
    pub softcap: Option<f32>,
}

impl Transform {
    /// Applies it to logits in place.
    pub fn apply(&self, logits: &mut Matrix) {
        let Some((device, dtype)) = logits.place() else { return self.apply_row(logits) };
        let n = logits.rows() * logits.cols();
        let args = [logits.pointer().into(), long(n), self.scale.into(), self.softcap.unwrap_or(0.0).into()];
        device.launch_over("transform_logits", Some(dtype), n, &args);
    }

    fn apply_row(&self, logits: &mut [f32]) {
        if self.scale != 1.0 {
            logits.iter_mut().for_each(|z| *z *= self.scale);
        }
        if let Some(cap) = self.softcap {
            soft_cap(logits, cap);
        }
    }
}

/// Sum of losses, in nats, where they were computed.
#[derive(Debug)]
pub enum Loss {
    /// On the host.
    Host(f64),
    /// On a device, one element.
    Device(Matrix),
}

impl Loss {
    /// Zero, where `x` is.
    #[must_use]
    pub fn zero(x: &Matrix) -> Self {
        let Some((device, _)) = x.place() else { return Self::Host(0.0) };
        let mut sum = Matrix::new_on(device, Dtype::F32, 1, 1);
        sum.zero();
        Self::Device(sum)
    }

    /// The number; waits for the device.
    #[must_use]
    pub fn value(&self) -> f64 {
        match self {
            Self::Host(sum) => *sum,
            Self::Device(sum) => f64::from(sum.to_host()[0]),
        }
    }
}

/// What the logits become.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Gradient {
    /// Factor on the gradient of the sum of the losses.
    pub weight: f32,
    /// On the host, the smallest elements of a row become zero that together have at most this share of the row's sum of
    /// magnitudes: of a large vocabulary those are nearly all (Cut Cross-Entropy, arXiv:2411.09009, drops what is below
    /// 2⁻¹²).
    pub negligible: f32,
}

/// Adds the rows' losses to `loss`; the logits become the gradient of that sum.
///
/// # Shapes
/// `logits`: (T, V); `targets`: (T), each below V.
pub fn cross_entropy(
    logits: &mut Matrix,
    targets: &Constant<u32>,
    transform: Transform,
    gradient: Gradient,
    loss: &mut Loss,
) {
    let sum = match loss {
        Loss::Host(sum) => sum,
        Loss::Device(sum) => return cross_entropy_on(logits, targets, transform, gradient.weight, sum),
    };
    let vocab = logits.cols();
    let losses: Vec<f32> = logits
        .par_chunks_exact_mut(vocab)
        .with_max_len(4)
        .zip(targets.par_iter())
        .map(|(row, target)| {
            let loss = cross_entropy_row(row, *target as usize, transform, gradient.weight);
            if gradient.negligible > 0.0 {
                drop_negligible(row, gradient.negligible);
            }
            loss
        })
        .collect();
    *sum += losses.iter().map(|l| f64::from(*l)).sum::<f64>();
}

fn cross_entropy_on(logits: &mut Matrix, targets: &Constant<u32>, transform: Transform, weight: f32, sum: &mut Matrix) {
    let (device, dtype) = logits.place().expect("the logits are where their loss is");
    let rows = logits.rows();
    let losses = Matrix::new_on(device, Dtype::F32, 1, rows);
    let args = [
        logits.pointer().into(),
        targets.on(device).into(),
        losses.pointer().into(),
        device.number(weight).into(),
        int(logits.cols()),
        long(logits.cols()),
        transform.scale.into(),
        transform.softcap.unwrap_or(0.0).into(),
        // No target is ignored: rows without one are not here.
        u32::MAX.into(),
        flag(weight != 0.0),
    ];
    device.launch("cross_entropy", Some(dtype), [rows, 1, 1], [512, 1], 0, &args);
    let args = [losses.pointer().into(), sum.pointer().into(), int(rows), 1f32.into(), flag(true)];
    device.launch("sum_partials_f32", None, [1, 1, 1], [256, 1], 0, &args);
}

vectorize! {
    /// Softmax of a row times `scale`; returns the log-sum-exp.
    fn softmax_scaled(row: &mut [f32], scale: f32) -> f32 {
        let largest = max(row);
        let total = exp_sum(row, largest);
        let factor = scale / total;
        row.iter_mut().for_each(|z| *z *= factor);
        largest + total.ln()
    }
}

fn cross_entropy_row(row: &mut [f32], target: usize, transform: Transform, weight: f32) -> f32 {
    transform.apply_row(row);
    let at_target = row[target];
    let slopes: Option<Vec<f32>> =
        transform.softcap.map(|cap| row.iter().map(|z| 1.0 - (z / cap) * (z / cap)).collect());
    let loss = softmax_scaled(row, weight * transform.scale) - at_target;
    row[target] -= weight * transform.scale;
    if let Some(slopes) = slopes {
        row.iter_mut().zip(slopes).for_each(|(z, slope)| *z *= slope);
    }
    loss
}

vectorize! {
    /// Sum of those magnitudes of a row that are below a limit.
    fn sum_below(row: &[f32], limit: f32) -> f32 {
        let mut sums = [0.0; 64];
        let below = |v: f32| if v.abs() < limit { v.abs() } else { 0.0 };
        let (chunks, rest) = row.as_chunks::<64>();
        for values in chunks {
            sums.iter_mut().zip(values).for_each(|(sum, v)| *sum += below(*v));
        }
        sums.iter().sum::<f32>() + rest.iter().map(|v| below(*v)).sum::<f32>()
    }
}

vectorize! {
    fn drop_below(row: &mut [f32], limit: f32) -> () {
        row.iter_mut().for_each(|v| *v = if v.abs() < limit { 0.0 } else { *v });
    }
}

/// Zeroes the smallest elements of a row, at most `share` of its sum of magnitudes.
fn drop_negligible(row: &mut [f32], share: f32) {
    /// Limits that are tried, each half of the one before, from a 16th of the share on.
    const LIMITS: i32 = 10;
    let negligible = share * sum_below(row, f32::INFINITY);
    let limits = (4..4 + LIMITS).map(|i| negligible * 0.5f32.powi(i));
    if let Some(limit) = limits.into_iter().find(|limit| sum_below(row, *limit) <= negligible) {
        drop_below(row, limit);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::testing::{Oracle, assert_close, random};
    use candle_core::{D, Device, Tensor};

    #[test]
    fn the_smallest_elements_of_a_gradient_are_dropped_up_to_a_share() {
        // Magnitudes over many powers of two, and a length that is no multiple of the lanes.
        let row: Vec<f32> = random(5003, 2).iter().enumerate().map(|(i, v)| v * 0.5f32.powi(i as i32 % 30)).collect();
        let share = 1.0 / 512.0;
        let mut kept = row.clone();
        drop_negligible(&mut kept, share);
        let sum = |row: &[f32]| row.iter().map(|v| f64::from(v.abs())).sum::<f64>();
        let dropped = sum(&row) - sum(&kept);
        assert!(dropped > 0.0 && dropped <= f64::from(share) * 1.001 * sum(&row), "{dropped} of {}", sum(&row));
        assert!(kept.iter().zip(&row).all(|(k, r)| k == r || *k == 0.0));
        let least = kept.iter().filter(|v| **v != 0.0).fold(f32::INFINITY, |least, v| least.min(v.abs()));
        assert!(row.iter().zip(&kept).all(|(r, k)| *k != 0.0 || r.abs() <= least), "the smallest ones");
        assert!(kept.iter().filter(|v| **v == 0.0).count() > row.len() / 2);
    }

    #[test]
    fn loss_and_gradient_equal_the_reference() {
        let (t, vocab) = (5, 123);
        let logits: Vec<f32> = random(t * vocab, 1).iter().map(|v| v * 6.0).collect();
        let targets = [0u32, 122, 7, 7, 60];
        for transform in [Transform { scale: 1.0, softcap: None }, Transform { scale: 0.5, softcap: Some(2.0) }] {
            let reference = |i: &[Tensor]| {
                let mut z = (&i[0] * f64::from(transform.scale))?;
                if let Some(cap) = transform.softcap {
                    z = ((z / f64::from(cap))?.tanh()? * f64::from(cap))?;
                }
                let lse = z.exp()?.sum(D::Minus1)?.log()?;
                let index = Tensor::new(&targets, &Device::Cpu)?.unsqueeze(1)?;
                (lse - z.gather(&index, 1)?.squeeze(1)?)?.sum_all()?.reshape((1, 1))
            };
            let oracle = Oracle::run(&[(&logits, t, vocab)], reference, &[0.25]);
            let mut matrix = Matrix::from_slice(t, vocab, &logits);
            let mut loss = Loss::Host(0.0);
            let gradient = Gradient { weight: 0.25, negligible: 0.0 };
            cross_entropy(&mut matrix, &targets.to_vec().into(), transform, gradient, &mut loss);
            let loss = loss.value();
            assert!((loss as f32 - oracle.y[0]).abs() < 1e-4 * oracle.y[0]);
            assert_close(&matrix, &oracle.grads[0], 1e-6);
        }
    }
}
