//! The MLP of a block: gated, plain, or experts. The activations are in `ops::glu`, the experts in `experts`.

use super::attention::Pass;
use super::experts::{self, Experts};
use super::linear::{Gradients, Linear, Saved as LinearSaved};
use crate::ops::Matrix;
use crate::ops::glu::{Activation, Units};
use crate::ops::matrix::Parked;

/// The MLP of a block.
#[derive(Debug, Clone)]
pub enum Mlp {
    /// One MLP for every token.
    Dense(Dense),
    /// Those of a router's choice.
    Experts(Experts),
}

/// What the backward needs besides the MLP's input.
#[derive(Debug)]
pub enum Saved {
    /// Of one MLP.
    Dense(DenseSaved),
    /// Of the visited experts.
    Experts(experts::Saved),
}

impl Mlp {
    /// Its projections, a router first.
    pub fn linears(&self) -> impl Iterator<Item = &Linear> {
        let (router, parts) = match self {
            Self::Dense(dense) => (None, std::slice::from_ref(dense)),
            Self::Experts(experts) => (Some(&experts.router), &experts.experts[..]),
        };
        router.into_iter().chain(parts.iter().flat_map(|dense| [&dense.up, &dense.down]))
    }

    /// Its projections, a router first.
    pub fn linears_mut(&mut self) -> impl Iterator<Item = &mut Linear> {
        let (router, parts) = match self {
            Self::Dense(dense) => (None, std::slice::from_mut(dense)),
            Self::Experts(experts) => (Some(&mut experts.router), &mut experts.experts[..]),
        };
        router.into_iter().chain(parts.iter_mut().flat_map(|dense| [&mut dense.up, &mut dense.down]))
    }

    /// `y = mlp(x)`, added to `y` where `accumulate`.
    ///
    /// # Shapes
    /// `x`, `y`: (T, n_embd).
    pub fn forward(&self, pass: &Pass<'_>, x: &Matrix, y: &mut Matrix, accumulate: bool) -> Saved {
        match self {
            Self::Dense(dense) => Saved::Dense(dense.forward(pass, x, y, accumulate)),
            Self::Experts(experts) => Saved::Experts(experts.forward(pass, x, y, accumulate)),
        }
    }

    /// Adds the adapters' gradients; writes or adds that of the input where `dx` is asked for.
    ///
    /// # Shapes
    /// `dy`, `dx`: (T, n_embd); `x` gives the input (T, n_embd).
    ///
    /// # Panics
    /// When `saved` is not what this MLP's forward saved.
    pub fn backward(
        &self,
        pass: &Pass<'_>,
        to: &mut Gradients<'_>,
        dy: &Matrix,
        x: impl FnOnce() -> Matrix,
        saved: Saved,
        dx: Option<(&mut Matrix, bool)>,
    ) {
        match (self, saved) {
            (Self::Dense(dense), Saved::Dense(saved)) => dense.backward(pass, to, dy, x, saved, dx),
            (Self::Experts(experts), Saved::Experts(saved)) => experts.backward(pass, to, dy, x, saved, dx),
            _ => unreachable!("a backward takes what its own forward saved"),
        }
    }
}

/// `down(act(gate) · up)` or `down(act(up))`.
#[derive(Debug, Clone)]
pub struct Dense {
    /// gate and up below one another, or up alone.
    pub up: Linear,
    /// Back to the residual stream.
    pub down: Linear,
    /// Activation.
    pub activation: Activation,
}

/// What the backward of a [`Dense`] needs besides its input.
#[derive(Debug)]
pub struct DenseSaved {
    /// Before the activation; in a bf16 model in that type, as it is the largest thing that a block keeps.
    up: Parked,
    h_up: LinearSaved,
    h_down: LinearSaved,
}

impl Dense {
    fn kind(&self) -> Units {
        Units { activation: self.activation, gated: self.up.outputs() == 2 * self.down.inputs() }
    }

    /// What stands before the activation.
    fn raise(&self, pass: &Pass<'_>, x: &Matrix) -> (Matrix, LinearSaved) {
        let mut up = x.new_like(x.rows(), self.up.outputs());
        let h = self.up.forward(pass.parameters, x, pass.seed, &mut up, false);
        (up, h)
    }

    /// What `down` is multiplied with.
    pub(super) fn units(&self, pass: &Pass<'_>, x: &Matrix) -> Matrix {
        self.kind().forward(&self.raise(pass, x).0)
    }

    /// `y = down(units(x))`, added to `y` where `accumulate`.
    ///
    /// # Shapes
    /// `x`, `y`: (T, n_embd).
    pub fn forward(&self, pass: &Pass<'_>, x: &Matrix, y: &mut Matrix, accumulate: bool) -> DenseSaved {
        let (kind, bf16) = (self.kind(), pass.seed.is_some() && self.up.weight().is_bf16());
        let after_one_another = || {
            let (up, h_up) = self.raise(pass, x);
            let (units, up) = Parked::beside(up, bf16, |up| kind.forward(up));
            (units, up, h_up)
        };
        let at_once = self.up.forward_units(x, kind, bf16).map(|(units, up)| (units, up, None));
        let (units, up, h_up) = at_once.unwrap_or_else(after_one_another);
        let h_down = self.down.forward(pass.parameters, &units, pass.seed, y, accumulate);
        DenseSaved { up, h_up, h_down }
    }

    /// Adds the adapters' gradients; writes or adds that of the input where `dx` is asked for.
    ///
    /// # Shapes
    /// `dy`, `dx`: (T, n_embd).
    pub fn backward(
        &self,
        pass: &Pass<'_>,
        to: &mut Gradients<'_>,
        dy: &Matrix,
        x: impl FnOnce() -> Matrix,
        saved: DenseSaved,
        dx: Option<(&mut Matrix, bool)>,
    ) {
        let mut d = dy.new_like(dy.rows(), self.down.inputs());
        let DenseSaved { up, h_up, h_down } = saved;
        let kind = self.kind();
        let units = || kind.forward(&up.get());
        self.down.backward(to, dy, units, &h_down, pass.seed, Some((&mut d, false)));
        let d_up = kind.backward(&d, up);
        self.up.backward(to, &d_up, x, &h_up, pass.seed, dx);
    }
}
