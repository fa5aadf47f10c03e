//! The MLP of a block: gated, plain, or a router over gated experts. The activations are in `ops::glu`.

use super::attention::Pass;
use super::linear::{Gradients, Linear, Saved as LinearSaved};
use crate::ops::Matrix;
use crate::ops::glu::{self, Activation};

/// `down(act(gate) · up)` or `down(act(up))`.
#[derive(Debug, Clone)]
pub struct Mlp {
    /// gate and up below one another, or up alone.
    pub up: Linear,
    /// Back to the residual stream.
    pub down: Linear,
    /// Activation.
    pub activation: Activation,
}

/// What the backward needs besides the MLP's input.
#[derive(Debug)]
pub struct Saved {
    up: Matrix,
    h_up: LinearSaved,
}

impl Mlp {
    fn gated(&self) -> bool {
        self.up.outputs() == 2 * self.down.inputs()
    }

    fn activate(&self, up: &Matrix) -> Matrix {
        if self.gated() { glu::gated(self.activation, up) } else { glu::plain(self.activation, up) }
    }

    /// The MLP up to its down projection: what to save, and that projection's input.
    ///
    /// # Shapes
    /// `x`: (T, n_embd); returns (T, intermediate_size).
    #[must_use]
    pub fn forward(&self, pass: &Pass<'_>, x: &Matrix) -> (Matrix, Saved) {
        let mut up = Matrix::new(x.rows(), self.up.outputs());
        let h_up = self.up.forward(pass.parameters, x, pass.seed, &mut up, false);
        (self.activate(&up), Saved { up, h_up })
    }

    /// Through the down projection and the units: adds the adapters' gradients; writes or adds that of the input where
    /// `dx` is asked for.
    ///
    /// # Shapes
    /// `dy`, `dx`: (T, n_embd).
    #[allow(clippy::too_many_arguments)] // a backward takes what its forward saved
    pub fn backward(
        &self,
        pass: &Pass<'_>,
        to: &mut Gradients<'_>,
        dy: &Matrix,
        x: impl FnOnce() -> Matrix,
        mut saved: Saved,
        h_down: &LinearSaved,
        dx: Option<(&mut Matrix, bool)>,
    ) {
        let mut d = Matrix::new(dy.rows(), self.down.inputs());
        self.down.backward(to, dy, || self.activate(&saved.up), h_down, pass.seed, Some((&mut d, false)));
        if self.gated() {
            glu::gated_backward(self.activation, &d, &mut saved.up);
        } else {
            glu::plain_backward(self.activation, &d, &mut saved.up);
        }
        self.up.backward(to, &saved.up, x, &saved.h_up, pass.seed, dx);
    }
}
