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

/// Adds the rows' losses to `loss`; the logits become `weight` times the gradient of that sum.
///
/// # Shapes
/// `logits`: (T, V); `targets`: (T), each below V.
pub fn cross_entropy(logits: &mut Matrix, targets: &Constant<u32>, transform: Transform, weight: f32, loss: &mut Loss) {
    let sum = match loss {
        Loss::Host(sum) => sum,
        Loss::Device(sum) => return cross_entropy_on(logits, targets, transform, weight, sum),
    };
    let vocab = logits.cols();
    let losses: Vec<f32> = logits
        .par_chunks_exact_mut(vocab)
        .with_max_len(4)
        .zip(targets.par_iter())
        .map(|(row, target)| cross_entropy_row(row, *target as usize, transform, weight))
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::testing::{Oracle, assert_close, random};
    use candle_core::{D, Device, Tensor};

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
            cross_entropy(&mut matrix, &targets.to_vec().into(), transform, 0.25, &mut loss);
            let loss = loss.value();
            assert!((loss as f32 - oracle.y[0]).abs() < 1e-4 * oracle.y[0]);
            assert_close(&matrix, &oracle.grads[0], 1e-6);
        }
    }
}
