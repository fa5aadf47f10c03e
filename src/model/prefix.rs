//! A prefix that samples have in common, as prompts from one template or system prompt have: run forward once, gone on
//! from by passes over what each sample has behind it, run backward once.
//!
//! A later row needs of the prefix only its keys and values, and gives back only their gradients. Their sum over all
//! samples is what the prefix's own backward starts from in each block, so loss and gradients are those of the whole
//! samples, but for the order of sums and for dropout, whose mask of the prefix they share.

use super::{Begun, Gpt, Tokens, Training, block};
use crate::ops::Matrix;
use crate::ops::device::Dtype;
use crate::ops::head::Loss;

/// A prefix after its forward.
#[derive(Debug)]
pub struct Prefix {
    pub(super) begun: Begun,
    /// Keys and values of each block: (T, 2 · `kv_cols`).
    pub(super) layers: Vec<Matrix>,
    /// Gradients of those from the lowest adapted block on, in f32; none outside training.
    pub(super) grads: Vec<Matrix>,
    n_targets: usize,
}

impl Prefix {
    /// Number of tokens.
    #[must_use]
    pub fn len(&self) -> usize {
        self.begun.positions.len()
    }

    /// Whether it has none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Number of targets.
    #[must_use]
    pub fn n_targets(&self) -> usize {
        self.n_targets
    }
}

impl Gpt {
    /// Runs a prefix forward; the loss is that of its own targets, once. In training, [`Self::finish`] has to follow.
    ///
    /// # Panics
    /// As [`Self::pass`].
    #[must_use]
    pub fn begin(&self, tokens: &Tokens, mut training: Option<Training<'_>>) -> (Prefix, Loss) {
        let parameters = self.parameters_of_products();
        let mut layers = Vec::with_capacity(self.blocks.len());
        let keep = |block: &block::Block, saved: &block::Saved| layers.push(block.keys_and_values(saved));
        let (begun, loss) = self.forward(&parameters, tokens, None, &mut training, keep);
        let zeros = |kv: &Matrix| match kv.place() {
            Some((device, _)) => Matrix::zeros_on(device, Dtype::F32, kv.rows(), kv.cols()),
            None => kv.zeros_like(kv.rows(), kv.cols()),
        };
        let trained = if training.is_some() { self.lowest()..self.blocks.len() } else { 0..0 };
        let grads = layers[trained].iter().map(zeros).collect();
        (Prefix { begun, layers, grads, n_targets: tokens.n_targets() }, loss)
    }

    /// The backward of a prefix, behind those of all passes that went on from it.
    pub fn finish(&self, prefix: Prefix, grads: &mut Matrix) {
        self.backward(&self.parameters_of_products(), prefix.begun, None, &prefix.grads, grads);
    }
}
