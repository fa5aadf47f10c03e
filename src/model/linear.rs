//! `Linear`: one or more frozen projections of the same input, stored as one matrix, each with its own adapter or none.
//!
//! q, k and v (gate and up) are separate modules with separate adapters and names; their frozen rows stand below one
//! another only so that one product computes them. The model never mentions adapters; here they are part of a linear.

use super::lora::{Lora, LoraConfig};
use crate::ops::device::Constant;
use crate::ops::glu::Units;
use crate::ops::lora::{Dropout, Pair, Pairs, Update};
use crate::ops::matmul::{Side, Threads, ViewMut, matmul};
use crate::ops::matrix::Parked;
use crate::ops::rows::add_bias;
use crate::ops::weight::Weight;
use crate::ops::{Matrix, View};
use std::ops::Range;
use std::sync::Arc;

/// One projection within a [`Linear`].
#[derive(Debug, Clone)]
pub struct Part {
    /// Its module, as `model.layers.0.self_attn.q_proj`.
    pub name: String,
    /// Its rows of the weight, which are its columns of the output.
    pub rows: Range<usize>,
    /// Its adapter.
    pub lora: Option<Lora>,
}

/// Frozen projections of one input: `y = x Wᵀ + b`, and on each part its low-rank update.
#[derive(Debug, Clone)]
pub struct Linear {
    weight: Arc<Weight>,
    bias: Option<Constant<f32>>,
    /// The projections, in the order of their rows.
    pub parts: Vec<Part>,
    /// Their adapters; none where no part has one.
    pairs: Option<Pairs>,
}

/// What a backward needs besides the input: `drop(x) Aᵀ` of all parts side by side.
pub type Saved = Option<Matrix>;

/// Where a linear's backward finds and leaves the adapters.
#[derive(Debug)]
pub struct Gradients<'a> {
    /// Parameters of all adapters.
    pub parameters: &'a Matrix,
    /// Their gradients, added to.
    pub grads: &'a mut Matrix,
    /// Gradients of the keys and values of `Pass::past`, added to.
    pub past: Option<&'a mut Matrix>,
}

impl Linear {
    /// Projections named `parts` (name, rows) over one weight.
    ///
    /// # Panics
    /// When the rows do not add up.
    #[must_use]
    pub fn new(weight: Arc<Weight>, bias: Option<Vec<f32>>, parts: &[(String, usize)]) -> Self {
        let mut at = 0;
        let parts = parts.iter().map(|(name, rows)| {
            at += rows;
            Part { name: name.clone(), rows: at - rows..at, lora: None }
        });
        let parts: Vec<Part> = parts.collect();
        assert_eq!(at, weight.rows(), "linear: the parts are all rows");
        Self { weight, bias: bias.map(Constant::from), parts, pairs: None }
    }

    /// Input channels.
    #[must_use]
    pub fn inputs(&self) -> usize {
        self.weight.cols()
    }

    /// Output channels of all parts.
    #[must_use]
    pub fn outputs(&self) -> usize {
        self.weight.rows()
    }

    /// The frozen bias: (outputs).
    #[must_use]
    pub fn bias(&self) -> Option<&[f32]> {
        self.bias.as_deref()
    }

    /// The frozen matrix.
    #[must_use]
    pub fn weight(&self) -> &Weight {
        &self.weight
    }

    /// Puts another matrix of the same shape in place of the frozen one.
    ///
    /// # Panics
    /// When it has another shape.
    pub fn set_weight(&mut self, weight: Weight) {
        let shape = |weight: &Weight| (weight.rows(), weight.cols());
        assert_eq!(shape(&weight), shape(&self.weight), "linear: a weight of the same shape");
        self.weight = Arc::new(weight);
    }

    /// Whether a part has an adapter.
    #[must_use]
    pub fn adapted(&self) -> bool {
        self.parts.iter().any(|p| p.lora.is_some())
    }

    /// Gives adapters to the parts that `config_of` has settings for, from element `at` of the flat buffer on; returns
    /// the element after them. All `A`s come first, so that one product serves them.
    pub fn attach(&mut self, mut at: usize, config_of: &mut dyn FnMut(&str) -> Option<LoraConfig>) -> usize {
        let inputs = self.inputs();
        for part in &mut self.parts {
            part.lora = config_of(&part.name).map(|config| {
                let a = at..at + config.r * inputs;
                at = a.end;
                Lora { config, a, b: 0..0 }
            });
        }
        for part in &mut self.parts {
            if let Some(lora) = &mut part.lora {
                lora.b = at..at + lora.config.r * part.rows.len();
                at = lora.b.end;
            }
        }
        self.pairs = self.all_a().map(|a| Pairs::new(self.list_pairs(), a));
        at
    }

    fn loras(&self) -> impl Iterator<Item = (&Part, &Lora)> {
        self.parts.iter().filter_map(|part| Some((part, part.lora.as_ref()?)))
    }

    /// All `A`s, below one another.
    fn all_a(&self) -> Option<Range<usize>> {
        let first = self.loras().next()?.1.a.start;
        Some(first..self.loras().last()?.1.a.end)
    }

    fn list_pairs(&self) -> Vec<Pair> {
        let mut at = 0;
        let pair = |(part, lora): (&Part, &Lora)| {
            at += lora.config.r;
            let (rank, scale) = (at - lora.config.r..at, lora.config.scale() as f32);
            Pair { rank, columns: part.rows.clone(), b: lora.b.clone(), scale }
        };
        self.loras().map(pair).collect()
    }

    /// The adapters in a pass under `seed`, which is `None` outside training: nothing is dropped there.
    fn update<'a>(&'a self, parameters: &'a Matrix, seed: Option<u64>) -> Option<Update<'a>> {
        let pairs = self.pairs.as_ref()?;
        let p = self.loras().next()?.1.config.dropout as f32;
        let dropout = seed.filter(|_| p > 0.0).map(|seed| {
            let seed = seed ^ (pairs.start() as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15);
            Dropout { p, seed }
        });
        Some(Update { pairs, parameters, dropout })
    }

    /// `y = x Wᵀ + b` and the updates, added to `y` where `accumulate`.
    ///
    /// # Shapes
    /// `x`: (T, in); `y`: (T, out).
    pub fn forward(
        &self,
        parameters: &Matrix,
        x: &Matrix,
        seed: Option<u64>,
        y: &mut Matrix,
        accumulate: bool,
    ) -> Saved {
        self.weight.forward(x.view(), y, accumulate);
        if let Some(bias) = &self.bias {
            add_bias(y, bias);
        }
        Some(self.update(parameters, seed)?.forward(x, y))
    }

    /// The units of `x Wᵀ`, and what stands before them as it waits for the backward, where they can be made at once.
    ///
    /// # Shapes
    /// `x`: (T, in); returns (T, out / 2).
    #[must_use]
    pub fn forward_units(&self, x: &Matrix, units: Units, bf16: bool) -> Option<(Matrix, Parked)> {
        let plain = self.bias.is_none() && self.pairs.is_none() && x.place().is_none();
        plain.then(|| self.weight.forward_units(x, units, bf16)).flatten()
    }

    /// Adds the adapters' gradients, and writes or adds that of the input where `dx` is asked for.
    ///
    /// # Shapes
    /// `dy`: (T, out); `x` gives the input (T, in) and is called only where an adapter needs it; `dx`: (T, in).
    pub fn backward(
        &self,
        to: &mut Gradients<'_>,
        dy: &Matrix,
        x: impl FnOnce() -> Matrix,
        saved: &Saved,
        seed: Option<u64>,
        mut dx: Option<(&mut Matrix, bool)>,
    ) {
        self.backward_frozen(dy, dx.as_mut().map(|(dx, accumulate)| (&mut **dx, *accumulate)));
        self.backward_adapters(to, dy, x, saved, seed, dx.map(|(dx, _)| dx));
    }

    /// The part of [`Self::backward`] that needs no input: what the frozen matrix gives to `dx`.
    pub fn backward_frozen(&self, dy: &Matrix, dx: Option<(&mut Matrix, bool)>) {
        if let Some((dx, accumulate)) = dx {
            self.weight.backward(dy.view(), dx, accumulate);
        }
    }

    /// What is left of [`Self::backward`], after the frozen part.
    pub fn backward_adapters(
        &self,
        to: &mut Gradients<'_>,
        dy: &Matrix,
        x: impl FnOnce() -> Matrix,
        saved: &Saved,
        seed: Option<u64>,
        dx: Option<&mut Matrix>,
    ) {
        if let (Some(h), Some(update)) = (saved, self.update(to.parameters, seed)) {
            update.backward(dy, h, &x(), to.grads, dx);
        }
    }

    /// Whether `part` computes with another matrix than the checkpoint has.
    #[must_use]
    pub fn changes(&self, part: &Part) -> bool {
        part.lora.is_some() || self.weight.is_quantized(part.rows.start)
    }

    /// Makes `weight`, the checkpoint's (out, in) matrix of `part`, the one that it computes with: `W + s B A`, where a
    /// quantized `W` is the decoded one.
    pub fn merge(&self, part: &Part, parameters: &[f32], weight: &mut [f32]) {
        if self.weight.is_quantized(part.rows.start) {
            self.weight.decode_rows(part.rows.clone(), weight);
        }
        if let Some(lora) = &part.lora {
            let delta = Self::delta_weight(lora, parameters, self.inputs());
            weight.iter_mut().zip(delta.iter()).for_each(|(w, d)| *w += d);
        }
    }

    /// `s B A` of one part, row-major (out, in).
    fn delta_weight(lora: &Lora, parameters: &[f32], inputs: usize) -> Matrix {
        let outputs = lora.b.len() / lora.config.r;
        let mut delta = Matrix::zeros(outputs, inputs);
        let b = View::of(&parameters[lora.b.clone()], outputs, lora.config.r);
        let a = View::of(&parameters[lora.a.clone()], lora.config.r, inputs);
        let scale = lora.config.scale() as f32;
        matmul(Threads::All, ViewMut::of(&mut delta, outputs, inputs), false, scale, Side::N(b), Side::N(a));
        delta
    }
}
