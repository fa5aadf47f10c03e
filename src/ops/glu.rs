//! Gated and plain units of an MLP: `act(gate) · up` (Shazeer 2020, arXiv:2002.05202) and `act(x)`.
//!
//! Gate and up stand side by side, (T, 2 I), as one product leaves them, and so do their gradients:
//! `dup = dh act(gate)`, `dgate = dh up act'(gate)`.

use super::device::{int, long};
use super::math::{erf, exp, sigmoid, tanh, vectorize};
use super::matrix::{Matrix, Parked, rows_per_task};
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

/// What stands between the two projections of an MLP: `act(gate) · up` or `act(x)`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Units {
    /// The activation.
    pub activation: Activation,
    /// Whether gate and up stand side by side.
    pub gated: bool,
}

impl Units {
    /// The units of what stands before them.
    ///
    /// # Shapes
    /// `x`: (T, 2 I) where gated, else (T, I); returns (T, I).
    #[must_use]
    pub fn forward(self, x: &Matrix) -> Matrix {
        let mut h = x.new_like(x.rows(), if self.gated { x.cols() / 2 } else { x.cols() });
        if !self.forward_on_device(x, &mut h) {
            let (task, width) = (rows_per_task(x.rows()), h.cols());
            let parts = h.par_chunks_mut((task * width).max(1)).zip(x.par_chunks((task * x.cols()).max(1)));
            parts.for_each(|(h, x)| self.of_rows(width, x, h));
        }
        h
    }

    /// Rows of `width` units.
    pub(super) fn of_rows(self, width: usize, x: &[f32], h: &mut [f32]) {
        if self.gated { gated_rows(self.activation, width, x, h) } else { plain_row(self.activation, x, h) }
    }

    /// Whether it was on a device.
    fn forward_on_device(self, x: &Matrix, h: &mut Matrix) -> bool {
        let Some((device, dtype)) = x.place() else { return false };
        let (from, to, activation) = (x.pointer().into(), h.pointer().into(), self.activation.code());
        if self.gated {
            let grid = [h.rows(), h.cols().div_ceil(2048), 1];
            device.launch("glu_fwd", Some(dtype), grid, [256, 1], 0, &[from, to, int(h.cols()), activation]);
        } else {
            let n = x.rows() * x.cols();
            device.launch_over("activation_fwd", Some(dtype), n, &[from, to, long(n), activation]);
        }
        true
    }

    /// The gradient of what stands before the units. That is widened row by row where it waited rounded, which is faster than in
    /// a loop of its own.
    ///
    /// # Shapes
    /// `dh`: (T, I); `x`: as in the forward, whose shape is returned.
    #[must_use]
    pub fn backward(self, dh: &Matrix, x: Parked) -> Matrix {
        if dh.place().is_some() {
            let mut d = x.restore();
            self.backward_on_device(dh, &mut d);
            return d;
        }
        x.restored_with(|row, x| {
            if self.gated {
                gated_rows_backward(self.activation, dh.cols(), dh.row(row), x);
            } else {
                plain_row_backward(self.activation, dh.row(row), x);
            }
        })
    }

    fn backward_on_device(self, dh: &Matrix, x: &mut Matrix) {
        let Some((device, dtype)) = dh.place() else { return };
        let (at, dh_at, activation) = (x.pointer(), dh.pointer().into(), self.activation.code());
        if self.gated {
            let (grid, width) = ([dh.rows(), dh.cols().div_ceil(2048), 1], int(dh.cols()));
            device.launch("glu_bwd", Some(dtype), grid, [256, 1], 0, &[at.into(), dh_at, width, activation]);
        } else {
            let n = dh.rows() * dh.cols();
            let args = [at.into(), dh_at, at.into(), long(n), activation];
            device.launch_over("activation_bwd", Some(dtype), n, &args);
        }
    }
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

    /// Of rounded values, the backward is that of what they became.
    fn check(units: Units, x: &Matrix, dh: &[f32], oracle: &Oracle) {
        let h = units.forward(x);
        assert_close(&h, &oracle.y, 1e-6);
        let dh = Matrix::from_slice(h.rows(), h.cols(), dh);
        let [plain, rounded] = [false, true].map(|bf16| Parked::beside(x.clone(), bf16, |_| ()).1);
        let restored = Parked::beside(rounded.get().into_owned(), false, |_| ()).1;
        assert!(units.backward(&dh, rounded)[..] == units.backward(&dh, restored)[..]);
        assert_close(&units.backward(&dh, plain), &oracle.grads[0], 2e-6);
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
            check(Units { activation, gated: true }, &Matrix::from_slice(t, 2 * width, &x), &dh, &oracle);

            let oracle = Oracle::run(&[(&x[..t * width], t, width)], |i| reference(activation, &i[0]), &dh);
            check(Units { activation, gated: false }, &Matrix::from_slice(t, width, &x[..t * width]), &dh, &oracle);
        }
    }
}
