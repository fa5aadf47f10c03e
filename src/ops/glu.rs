//! Gated and plain units of an MLP: `act(gate) · up` (Shazeer 2020, arXiv:2002.05202) and `act(x)`.
//!
//! Gate and up stand side by side, (T, 2 I), as one product leaves them. The backward overwrites them with their own
//! gradients: `dup = dh act(gate)`, `dgate = dh up act'(gate)`.

use super::device::{int, long};
use super::math::{erf, exp, sigmoid, tanh, vectorize};
use super::matrix::{Matrix, rows_per_task};
use rayon::prelude::*;

/// Activation function.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Activation {
    /// `x sigmoid(x)`.
    Silu,
    /// `x Φ(x)`, exact.
    Gelu,
    /// `x Φ(x)`, by the tanh form.
    GeluTanh,
    /// `max(x, 0)`.
    Relu,
}

/// `sqrt(2 / π)`.
const TANH_SCALE: f32 = 0.797_884_6;

impl Activation {
    /// As `kernels/glu.cu` numbers them.
    fn code(self) -> super::device::Arg {
        int(match self {
            Self::Silu => 0,
            Self::GeluTanh => 1,
            Self::Gelu => 2,
            Self::Relu => 3,
        })
    }

    /// (value, derivative) at `x`.
    #[inline(always)]
    fn at(self, x: f32) -> (f32, f32) {
        match self {
            Self::Silu => {
                let s = sigmoid(x);
                (x * s, s + x * s * (1.0 - s))
            }
            Self::Gelu => {
                let phi = 0.5 * (1.0 + erf(x * std::f32::consts::FRAC_1_SQRT_2));
                (x * phi, phi + x * 0.398_942_3 * exp(-0.5 * x * x))
            }
            Self::GeluTanh => {
                let t = tanh(TANH_SCALE * (x + 0.044_715 * x * x * x));
                let slope = TANH_SCALE * (1.0 + 3.0 * 0.044_715 * x * x);
                (0.5 * x * (1.0 + t), 0.5 * (1.0 + t) + 0.5 * x * (1.0 - t * t) * slope)
            }
            Self::Relu => (x.max(0.0), if x > 0.0 { 1.0 } else { 0.0 }),
        }
    }
}

/// Defines `$name(activation, args..)`, in which `$at` is the activation's value and slope, as one loop for each activation:
/// a choice inside a loop would keep it from being vectorized.
macro_rules! for_activations {
    (fn $name:ident($at:ident, $($arg:ident: $type:ty),*) $body:block) => {
        vectorize! {
            fn $name(activation: Activation, $($arg: $type),*) {
                #[inline(always)]
                fn of($($arg: $type,)* $at: impl Fn(f32) -> (f32, f32)) $body

                match activation {
                    Activation::Silu => of($($arg,)* |x| Activation::Silu.at(x)),
                    Activation::Gelu => of($($arg,)* |x| Activation::Gelu.at(x)),
                    Activation::GeluTanh => of($($arg,)* |x| Activation::GeluTanh.at(x)),
                    Activation::Relu => of($($arg,)* |x| Activation::Relu.at(x)),
                }
            }
        }
    };
}

for_activations! {
    fn gated_rows(at, width: usize, gate_up: &[f32], h: &mut [f32]) {
        for (h, gate_up) in h.chunks_exact_mut(width).zip(gate_up.chunks_exact(2 * width)) {
            let (gate, up) = gate_up.split_at(width);
            for ((h, g), u) in h.iter_mut().zip(gate).zip(up) {
                *h = at(*g).0 * u;
            }
        }
    }
}

for_activations! {
    fn gated_rows_backward(at, width: usize, dh: &[f32], gate_up: &mut [f32]) {
        for (dh, gate_up) in dh.chunks_exact(width).zip(gate_up.chunks_exact_mut(2 * width)) {
            let (gate, up) = gate_up.split_at_mut(width);
            for i in 0..width {
                let (value, slope) = at(gate[i]);
                gate[i] = dh[i] * up[i] * slope;
                up[i] = dh[i] * value;
            }
        }
    }
}

for_activations! {
    fn plain_row(at, x: &[f32], h: &mut [f32]) {
        for (h, x) in h.iter_mut().zip(x) {
            *h = at(*x).0;
        }
    }
}

for_activations! {
    fn plain_row_backward(at, dh: &[f32], x: &mut [f32]) {
        for (d, x) in dh.iter().zip(x) {
            *x = d * at(*x).1;
        }
    }
}

/// `act(gate) · up`.
///
/// # Shapes
/// `gate_up`: (T, 2 I); returns (T, I).
#[must_use]
pub fn gated(activation: Activation, gate_up: &Matrix) -> Matrix {
    let width = gate_up.cols() / 2;
    let mut h = gate_up.new_like(gate_up.rows(), width);
    if let Some((device, dtype)) = gate_up.place() {
        let args = [gate_up.pointer().into(), h.pointer().into(), int(width), activation.code()];
        device.launch("glu_fwd", Some(dtype), [h.rows(), width.div_ceil(2048), 1], [256, 1], 0, &args);
        return h;
    }
    let chunk = (rows_per_task(gate_up.rows()) * width).max(1);
    let parts = h.par_chunks_mut(chunk).zip(gate_up.par_chunks(2 * chunk));
    parts.for_each(|(h, gate_up)| gated_rows(activation, width, gate_up, h));
    h
}

/// Overwrites gate and up with their gradients.
///
/// # Shapes
/// `dh`: (T, I); `gate_up`: (T, 2 I).
pub fn gated_backward(activation: Activation, dh: &Matrix, gate_up: &mut Matrix) {
    let width = dh.cols();
    if let Some((device, dtype)) = dh.place() {
        let args = [gate_up.pointer().into(), dh.pointer().into(), int(width), activation.code()];
        return device.launch("glu_bwd", Some(dtype), [dh.rows(), width.div_ceil(2048), 1], [256, 1], 0, &args);
    }
    let chunk = (rows_per_task(dh.rows()) * width).max(1);
    let parts = dh.par_chunks(chunk).zip(gate_up.par_chunks_mut(2 * chunk));
    parts.for_each(|(dh, gate_up)| gated_rows_backward(activation, width, dh, gate_up));
}

/// `act(x)`.
///
/// # Shapes
/// `x`: (T, I); returns (T, I).
#[must_use]
pub fn plain(activation: Activation, x: &Matrix) -> Matrix {
    let mut h = x.new_like(x.rows(), x.cols());
    if let Some((device, dtype)) = x.place() {
        let n = x.rows() * x.cols();
        let args = [x.pointer().into(), h.pointer().into(), long(n), activation.code()];
        device.launch_over("activation_fwd", Some(dtype), n, &args);
        return h;
    }
    let chunk = (rows_per_task(x.rows()) * x.cols()).max(1);
    let parts = h.par_chunks_mut(chunk).zip(x.par_chunks(chunk));
    parts.for_each(|(h, x)| plain_row(activation, x, h));
    h
}

/// Overwrites the input of [`plain`] with its gradient.
///
/// # Shapes
/// `dh`, `x`: (T, I).
pub fn plain_backward(activation: Activation, dh: &Matrix, x: &mut Matrix) {
    if let Some((device, dtype)) = dh.place() {
        let n = dh.rows() * dh.cols();
        let args = [x.pointer().into(), dh.pointer().into(), x.pointer().into(), long(n), activation.code()];
        return device.launch_over("activation_bwd", Some(dtype), n, &args);
    }
    let chunk = (rows_per_task(x.rows()) * x.cols()).max(1);
    let parts = dh.par_chunks(chunk).zip(x.par_chunks_mut(chunk));
    parts.for_each(|(dh, x)| plain_row_backward(activation, dh, x));
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::testing::{Oracle, assert_close, random};
    use candle_core::Tensor;

    fn reference(activation: Activation, x: &Tensor) -> candle_core::Result<Tensor> {
        match activation {
            Activation::Silu => x.silu(),
            Activation::Gelu => x.gelu_erf(),
            Activation::GeluTanh => x.gelu(),
            Activation::Relu => x.relu(),
        }
    }

    #[test]
    fn every_activation_equals_the_reference() {
        let (t, width) = (5, 123);
        for activation in [Activation::Silu, Activation::Gelu, Activation::GeluTanh, Activation::Relu] {
            let x: Vec<f32> = random(2 * t * width, 1).iter().map(|v| v * 4.0).collect();
            let dh = random(t * width, 2);
            let gate_up = |input: &[Tensor]| {
                reference(activation, &input[0].narrow(1, 0, width)?)?.mul(&input[0].narrow(1, width, width)?)
            };
            let oracle = Oracle::run(&[(&x, t, 2 * width)], gate_up, &dh);
            let mut matrix = Matrix::from_slice(t, 2 * width, &x);
            assert_close(&gated(activation, &matrix), &oracle.y, 1e-6);
            gated_backward(activation, &Matrix::from_slice(t, width, &dh), &mut matrix);
            assert_close(&matrix, &oracle.grads[0], 2e-6);

            let oracle = Oracle::run(&[(&x[..t * width], t, width)], |i| reference(activation, &i[0]), &dh);
            let mut matrix = Matrix::from_slice(t, width, &x[..t * width]);
            assert_close(&plain(activation, &matrix), &oracle.y, 1e-6);
            plain_backward(activation, &Matrix::from_slice(t, width, &dh), &mut matrix);
            assert_close(&matrix, &oracle.grads[0], 2e-6);
        }
    }
}
