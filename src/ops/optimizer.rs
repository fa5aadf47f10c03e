//! AdamW (Loshchilov and Hutter 2019, arXiv:1711.05101) as torch computes it, over one flat f32 buffer of all adapters.

use super::device::{Dtype, int, long};
use super::math::vectorize;
use super::matrix::Matrix;
use rayon::prelude::*;

/// Elements of a parallel task; fixed, so that sums do not depend on the number of threads.
const CHUNK: usize = 1 << 14;

/// Settings of AdamW.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct AdamW {
    /// Decay of the first moment.
    pub beta1: f64,
    /// Decay of the second moment.
    pub beta2: f64,
    /// Added to the root of the second moment.
    pub eps: f64,
    /// Decoupled weight decay.
    pub weight_decay: f64,
}

/// First and second moments, as long as the parameters.
#[derive(Debug, Clone)]
pub struct Moments {
    /// Running mean of the gradient.
    pub m: Matrix,
    /// Running mean of its square.
    pub v: Matrix,
    /// Steps taken.
    pub step: u64,
}

impl Moments {
    /// Zero moments for these parameters, where they are.
    #[must_use]
    pub fn new(parameters: &Matrix) -> Self {
        let zeros = || parameters.zeros_like(1, parameters.cols());
        Self { m: zeros(), v: zeros(), step: 0 }
    }
}

impl AdamW {
    /// One step: `p ← p (1 - lr wd) - lr m̂ / (sqrt(v̂) + eps)`, gradients taken times `grad_scale`.
    ///
    /// # Panics
    /// When the lengths differ: a trainable parameter would go without its gradient.
    pub fn step(
        &self,
        parameters: &mut Matrix,
        grads: &Matrix,
        grad_scale: f32,
        moments: &mut Moments,
        learning_rate: f64,
    ) {
        assert_eq!(parameters.cols(), grads.cols(), "optimizer: every parameter has a gradient");
        assert_eq!(parameters.cols(), moments.m.cols(), "optimizer: every parameter has moments");
        moments.step += 1;
        let t = moments.step as f64;
        let step_size = (learning_rate / (1.0 - self.beta1.powf(t))) as f32;
        let root_correction = (1.0 - self.beta2.powf(t)).sqrt() as f32;
        // In the order in which the kernel has them.
        let hyper = [
            self.beta1 as f32,
            (1.0 - self.beta1) as f32,
            self.beta2 as f32,
            (1.0 - self.beta2) as f32,
            self.eps as f32,
            (1.0 - learning_rate * self.weight_decay) as f32,
            step_size,
            root_correction,
            grad_scale,
            0.0,
        ];
        if let Some((device, _)) = parameters.place() {
            let hyper = device.upload(&hyper.map(f32::to_le_bytes).concat());
            let n = parameters.cols();
            let [p, g, m, v] = [parameters, grads, &moments.m, &moments.v].map(|x| x.pointer().into());
            let args = [p, g, m, v, long(n), (&hyper).into(), 0u64.into()];
            return device.launch_over("adamw_f32", None, n, &args);
        }
        let parts = parameters
            .par_chunks_mut(CHUNK)
            .zip(grads.par_chunks(CHUNK))
            .zip(moments.m.par_chunks_mut(CHUNK))
            .zip(moments.v.par_chunks_mut(CHUNK));
        parts.for_each(|(((p, g), m), v)| {
            update(&hyper, p, g, m, v);
        });
    }
}

vectorize! {
    /// A step of some parameters.
    fn update(hyper: &[f32; 10], p: &mut [f32], g: &[f32], m: &mut [f32], v: &mut [f32]) {
        let [beta1, one_minus_beta1, beta2, one_minus_beta2, eps, keep, step_size, root_correction, scale, _] = *hyper;
        for (((p, g), m), v) in p.iter_mut().zip(g).zip(m).zip(v) {
            let g = g * scale;
            *m = beta1 * *m + one_minus_beta1 * g;
            *v = beta2 * *v + one_minus_beta2 * g * g;
            *p = *p * keep - step_size * *m / (v.sqrt() / root_correction + eps);
        }
    }
}

/// Euclidean norm of all gradients.
#[must_use]
pub fn norm(grads: &Matrix) -> f64 {
    if let Some((device, _)) = grads.place() {
        let (n, blocks) = (grads.cols(), grads.cols().div_ceil(CHUNK).clamp(1, 512));
        let (partial, sum) = (Matrix::new_on(device, Dtype::F32, 1, blocks), Matrix::new_on(device, Dtype::F32, 1, 1));
        let args = [grads.pointer().into(), partial.pointer().into(), long(n)];
        device.launch("sum_squares_f32", None, [blocks, 1, 1], [256, 1], 0, &args);
        let args = [partial.pointer().into(), sum.pointer().into(), int(blocks), 1f32.into(), int(0)];
        device.launch("sum_partials_f32", None, [1, 1, 1], [256, 1], 0, &args);
        return f64::from(sum.to_host()[0]).sqrt();
    }
    let sums: Vec<f64> =
        grads.par_chunks(CHUNK).map(|g| g.iter().map(|x| f64::from(*x) * f64::from(*x)).sum()).collect();
    sums.iter().sum::<f64>().sqrt()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::testing::{assert_close, random};

    /// The textbook form in f64.
    #[test]
    fn three_steps_equal_the_definition() {
        let adamw = AdamW { beta1: 0.9, beta2: 0.95, eps: 1e-8, weight_decay: 0.1 };
        let n = 5 * CHUNK / 2 + 123;
        let mut p = Matrix::from_slice(1, n, &random(n, 1));
        let mut moments = Moments::new(&p);
        let mut want: Vec<[f64; 3]> = p.iter().map(|p| [f64::from(*p), 0.0, 0.0]).collect();
        for t in 1..=3 {
            let g = Matrix::from_slice(1, n, &random(n, 10 + t as u64));
            adamw.step(&mut p, &g, 0.5, &mut moments, 1e-2);
            for ([p, m, v], g) in want.iter_mut().zip(g.iter()) {
                let g = 0.5 * f64::from(*g);
                *m = 0.9 * *m + 0.1 * g;
                *v = 0.95 * *v + 0.05 * g * g;
                let (mh, vh) = (*m / (1.0 - 0.9f64.powi(t)), *v / (1.0 - 0.95f64.powi(t)));
                *p = *p * (1.0 - 1e-3) - 1e-2 * mh / (vh.sqrt() + 1e-8);
            }
        }
        let want: Vec<f32> = want.iter().map(|w| w[0] as f32).collect();
        assert_close(&p, &want, 1e-6);
    }

    #[test]
    fn the_norm_is_the_root_of_the_sum_of_squares() {
        let g = Matrix::from_slice(1, 40_001, &random(40_001, 3));
        let want = g.iter().map(|x| f64::from(*x).powi(2)).sum::<f64>().sqrt();
        assert!((norm(&g) - want).abs() < 1e-9 * want);
    }
}
