//! `Block`: attention and MLP around the residual stream, forward and backward.

use super::attention::{self, Attention, LayerCache, Pass};
use super::linear::{Gradients, Linear, Saved as LinearSaved};
use super::mlp::{self, Mlp};
use crate::ops::Matrix;
use crate::ops::matrix::Parked;
use crate::ops::norm::Norm;
use crate::ops::rows::{add_scaled, scale};

/// Norms around one branch of a block.
#[derive(Debug, Clone, Default)]
pub struct Norms {
    /// Before it.
    pub before: Option<Norm>,
    /// After it, before the residual is added.
    pub after: Option<Norm>,
}

/// One transformer block.
#[derive(Debug, Clone)]
pub struct Block {
    /// Attention.
    pub attention: Attention,
    /// Its norms.
    pub attention_norms: Norms,
    /// MLP.
    pub mlp: Mlp,
    /// Its norms.
    pub mlp_norms: Norms,
    /// Both branches read the block's input.
    pub parallel_residual: bool,
    /// Both read it through the attention's norm.
    pub shared_norm: bool,
    /// Factor on what a branch adds.
    pub residual_scale: f32,
}

/// Projections of one input, in the order in which a block computes them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Site {
    /// q, k and v.
    Qkv,
    /// The output projection of the attention.
    Projection,
    /// The MLP's gate and up.
    Up,
    /// Its way back.
    Down,
}

impl Site {
    /// All of them.
    pub const ALL: [Self; 4] = [Self::Qkv, Self::Projection, Self::Up, Self::Down];
}

/// What a block's backward needs.
#[derive(Debug)]
pub struct Saved {
    x: Matrix,
    attention: attention::Saved,
    /// The heads' outputs, which are the output projection's input.
    o: Parked,
    attention_h: LinearSaved,
    attention_raw: Option<Matrix>,
    /// The residual stream between the branches; `None` where they are parallel.
    middle: Option<Matrix>,
    mlp: mlp::Saved,
    mlp_raw: Option<Matrix>,
}

fn normed(norm: Option<&Norm>, x: &Matrix) -> Option<Matrix> {
    norm.map(|norm| norm.forward(x))
}

/// The norm of `x`, if there is one, and a copy of `x`.
fn normed_and_copy(norm: Option<&Norm>, x: &Matrix) -> (Option<Matrix>, Matrix) {
    let Some(norm) = norm else { return (None, x.clone()) };
    let (normed, copy) = norm.forward_and_copy(x);
    (Some(normed), copy)
}

impl Block {
    /// Whether any of its projections has an adapter.
    #[must_use]
    pub fn adapted(&self) -> bool {
        self.attention_adapted() || self.mlp.linears().any(Linear::adapted)
    }

    fn attention_adapted(&self) -> bool {
        self.attention.qkv.adapted() || self.attention.projection.adapted()
    }

    /// `residual += scale · norm(branch)`, where `branch(y, accumulate)` writes or adds its output; returns what it saved
    /// and, where there is a norm, its output.
    fn add_branch<S>(
        &self,
        after: Option<&Norm>,
        residual: &mut Matrix,
        branch: impl FnOnce(&mut Matrix, bool) -> S,
    ) -> (S, Option<Matrix>) {
        if after.is_none() && self.residual_scale == 1.0 {
            return (branch(residual, true), None);
        }
        let mut out = residual.new_like(residual.rows(), residual.cols());
        let saved = branch(&mut out, false);
        let Some(norm) = after else {
            add_scaled(residual, &out, self.residual_scale);
            return (saved, None);
        };
        add_scaled(residual, &norm.forward(&out), self.residual_scale);
        (saved, Some(out))
    }

    /// Gradient of a branch's output from that of the residual stream.
    fn add_branch_backward(&self, after: Option<&Norm>, dy: &Matrix, raw: Option<&Matrix>) -> Option<Matrix> {
        if after.is_none() && self.residual_scale == 1.0 {
            return None;
        }
        let mut d = dy.clone();
        scale(&mut d, self.residual_scale);
        if let (Some(norm), Some(raw)) = (after, raw) {
            let scaled = d.clone();
            norm.backward(&scaled, raw, &mut d, false);
        }
        Some(d)
    }

    /// Output of the block, and what its backward needs.
    ///
    /// # Shapes
    /// `x`: (T, n_embd); returns (T, n_embd).
    #[must_use]
    pub fn forward(&self, pass: &Pass<'_>, x: Matrix) -> (Matrix, Saved) {
        let (attention_in, mut y) = normed_and_copy(self.attention_norms.before.as_ref(), &x);
        let (o, attention) = self.attention.forward(pass, attention_in.as_ref().unwrap_or(&x));
        let projection = &self.attention.projection;
        let ((attention_h, attention_raw), o) = Parked::beside(o, self.attention.parks_bf16(pass), |o| {
            self.add_branch(self.attention_norms.after.as_ref(), &mut y, |y, accumulate| {
                projection.forward(pass.parameters, o, pass.seed, y, accumulate)
            })
        });
        let before = self.mlp_norms.before.as_ref();
        let (mlp_in, middle) = if self.parallel_residual {
            (if self.shared_norm { attention_in } else { normed(before, &x) }, None)
        } else {
            let (mlp_in, copy) = normed_and_copy(before, &y);
            (mlp_in, Some(std::mem::replace(&mut y, copy)))
        };
        let mlp_in = mlp_in.as_ref().or(middle.as_ref()).unwrap_or(&x);
        let after = self.mlp_norms.after.as_ref();
        let (mlp, mlp_raw) =
            self.add_branch(after, &mut y, |y, accumulate| self.mlp.forward(pass, mlp_in, y, accumulate));
        (y, Saved { x, attention, o, attention_h, attention_raw, middle, mlp, mlp_raw })
    }

    /// What a projection is multiplied with; nothing behind it is computed.
    ///
    /// # Shapes
    /// `x`: (T, n_embd); returns (T, inputs).
    ///
    /// # Panics
    /// When the block has experts.
    #[must_use]
    pub fn input(&self, pass: &Pass<'_>, x: &Matrix, site: Site) -> Matrix {
        let (attention_in, mut y) = normed_and_copy(self.attention_norms.before.as_ref(), x);
        if site == Site::Qkv {
            return attention_in.unwrap_or(y);
        }
        let o = self.attention.forward(pass, attention_in.as_ref().unwrap_or(x)).0;
        if site == Site::Projection {
            return o;
        }
        let mlp_in = self.mlp_input(pass, x, attention_in, &o, &mut y);
        match &self.mlp {
            Mlp::Dense(dense) if site == Site::Down => dense.units(pass, &mlp_in),
            Mlp::Dense(_) => mlp_in,
            Mlp::Experts(_) => unreachable!("experts see rows of their own"),
        }
    }

    /// The projections there.
    ///
    /// # Panics
    /// When the block has experts.
    #[must_use]
    pub fn at(&mut self, site: Site) -> &mut Linear {
        match (site, &mut self.mlp) {
            (Site::Qkv, _) => &mut self.attention.qkv,
            (Site::Projection, _) => &mut self.attention.projection,
            (Site::Up, Mlp::Dense(dense)) => &mut dense.up,
            (Site::Down, Mlp::Dense(dense)) => &mut dense.down,
            (_, Mlp::Experts(_)) => unreachable!("experts see rows of their own"),
        }
    }

    /// Adds what the attention gives to `y`, which is `x`, and returns what the MLP reads.
    fn mlp_input(
        &self,
        pass: &Pass<'_>,
        x: &Matrix,
        attention_in: Option<Matrix>,
        o: &Matrix,
        y: &mut Matrix,
    ) -> Matrix {
        let projection = &self.attention.projection;
        self.add_branch(self.attention_norms.after.as_ref(), y, |y, accumulate| {
            projection.forward(pass.parameters, o, pass.seed, y, accumulate)
        });
        let between = if self.parallel_residual { x } else { &*y };
        let mlp_in = if self.shared_norm { attention_in } else { normed(self.mlp_norms.before.as_ref(), between) };
        mlp_in.unwrap_or_else(|| between.clone())
    }

    /// Keys and values of a forward, for passes that go on from them.
    ///
    /// # Shapes
    /// Returns (T, 2 · `kv_cols`).
    #[must_use]
    pub fn keys_and_values(&self, saved: &Saved) -> Matrix {
        self.attention.keys_and_values(&saved.attention)
    }

    /// Output of the block for new tokens after those that `cache` keeps.
    #[must_use]
    pub fn decode(&self, pass: &Pass<'_>, x: Matrix, cache: &mut LayerCache) -> Matrix {
        let (attention_in, mut y) = normed_and_copy(self.attention_norms.before.as_ref(), &x);
        let o = self.attention.decode(pass, attention_in.as_ref().unwrap_or(&x), cache);
        let mlp_in = self.mlp_input(pass, &x, attention_in, &o, &mut y);
        let after = self.mlp_norms.after.as_ref();
        self.add_branch(after, &mut y, |y, accumulate| self.mlp.forward(pass, &mlp_in, y, accumulate));
        y
    }

    /// Adds the adapters' gradients; returns that of the block's input where `input_needed`.
    ///
    /// # Shapes
    /// `dy`: (T, n_embd); returns (T, n_embd).
    #[must_use]
    pub fn backward(
        &self,
        pass: &Pass<'_>,
        to: &mut Gradients<'_>,
        dy: Matrix,
        saved: Saved,
        input_needed: bool,
    ) -> Option<Matrix> {
        let Saved { x, attention, o, attention_h, attention_raw, middle, mlp, mlp_raw } = saved;
        let mlp_norm = if self.shared_norm { &self.attention_norms.before } else { &self.mlp_norms.before };
        let between = middle.as_ref().unwrap_or(&x);
        let mlp_in = || normed(mlp_norm.as_ref(), between).unwrap_or_else(|| between.clone());
        let attention_needed = input_needed || self.attention_adapted();
        let d_out = self.add_branch_backward(self.mlp_norms.after.as_ref(), &dy, mlp_raw.as_ref());
        let mut d_mlp_in = dy.new_like(dy.rows(), dy.cols());
        // A parallel attention reads no gradient of the MLP, but the block's input does.
        let mlp_input_needed = if self.parallel_residual { input_needed } else { attention_needed };
        let d_mlp = mlp_input_needed.then_some((&mut d_mlp_in, false));
        self.mlp.backward(pass, to, d_out.as_ref().unwrap_or(&dy), mlp_in, mlp, d_mlp);
        if !attention_needed {
            return None;
        }
        let mut d = dy;
        if !self.parallel_residual {
            add_norm_backward(mlp_norm.as_ref(), &d_mlp_in, between, &mut d);
        }
        let saved = (attention, o, &attention_h, attention_raw.as_ref());
        let d_attention_in = self.attention_backward(pass, to, &d, &x, saved, input_needed)?;
        if self.parallel_residual {
            add_norm_backward(mlp_norm.as_ref(), &d_mlp_in, &x, &mut d);
        }
        add_norm_backward(self.attention_norms.before.as_ref(), &d_attention_in, &x, &mut d);
        Some(d)
    }

    #[allow(clippy::too_many_arguments)] // a backward takes what its forward saved
    fn attention_backward(
        &self,
        pass: &Pass<'_>,
        to: &mut Gradients<'_>,
        d: &Matrix,
        x: &Matrix,
        (saved, o, h, raw): (attention::Saved, Parked, &LinearSaved, Option<&Matrix>),
        input_needed: bool,
    ) -> Option<Matrix> {
        let norms = &self.attention_norms;
        let d_out = self.add_branch_backward(norms.after.as_ref(), d, raw);
        let d_projection = d_out.as_ref().unwrap_or(d);
        let projection = &self.attention.projection;
        let mut d_o = d.new_like(d.rows(), projection.inputs());
        let ((), o) = o.restored_beside(|| projection.backward_frozen(d_projection, Some((&mut d_o, false))));
        projection.backward_adapters(to, d_projection, || o.clone(), h, pass.seed, Some(&mut d_o));
        let input = || normed(norms.before.as_ref(), x).unwrap_or_else(|| x.clone());
        let mut dx = input_needed.then(|| d.new_like(d.rows(), d.cols()));
        self.attention.backward(pass, to, [&o, &d_o], input, saved, dx.as_mut().map(|dx| (dx, false)));
        dx
    }
}

/// `d += norm'(d_normed)`, or `d += d_normed` without a norm.
fn add_norm_backward(norm: Option<&Norm>, d_normed: &Matrix, x: &Matrix, d: &mut Matrix) {
    match norm {
        Some(norm) => norm.backward(d_normed, x, d, true),
        None => add_scaled(d, d_normed, 1.0),
    }
}
