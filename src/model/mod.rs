//! `Gpt`: one decoder-only transformer for every family, described by [`Config`]; forward, backward, decoding.
//!
//! The model does no I/O: it asks a [`Source`] for tensors by their Hugging Face Llama names. `linears_mut` is the one
//! walk over its projections, by which adapters are attached, counted, saved and merged.
//!
//! There is no autograd: only adapters need gradients and the architecture is known, so each block has a backward that
//! calls its ops' backwards in reverse. Below the lowest adapter no gradient flows at all.

pub mod attention;
pub mod block;
pub mod calibrate;
pub mod config;
mod decode;
pub mod experts;
pub mod families;
pub mod linear;
pub mod load;
pub mod lora;
pub mod mlp;
pub mod prefix;
pub mod quantizer;
mod tokens;

pub use config::Config;
pub use decode::Cache;
pub use load::Source;
pub use prefix::Prefix;
pub use tokens::Tokens;

use crate::error::{Error, Result};
use crate::ops::Matrix;
use crate::ops::attention::Spans;
use crate::ops::device::{Constant, Device, Dtype, Failure};
use crate::ops::head::{Gradient, Loss, Transform, cross_entropy};
use crate::ops::norm::Norm;
use crate::ops::rope::{Scaling, Tables};
use crate::ops::rows::{self, gather, scatter_add};
use crate::ops::weight::Weight;
use attention::Pass;
use block::Block;
use linear::{Gradients, Linear};
use lora::{LoraConfig, initialize};
use std::borrow::Cow;
use std::sync::Arc;

/// Elements of a chunk of logits: 6 MB. More are not faster.
const HEAD_CHUNK: usize = 3 << 19;
/// The same on a device, which needs more rows to be busy: 128 MB of bf16.
const HEAD_CHUNK_ON_DEVICE: usize = 64 << 20;

/// A decoder-only transformer with frozen weights and, where attached, adapters.
#[derive(Debug)]
pub struct Gpt {
    /// Architecture.
    pub config: Config,
    embedding: Arc<Weight>,
    blocks: Vec<Block>,
    final_norm: Norm,
    head: Linear,
    rope: [Tables; 2],
    /// Parameters of all adapters, in one flat buffer.
    pub parameters: Matrix,
}

/// What a training pass does besides the loss.
#[derive(Debug)]
pub struct Training<'a> {
    /// Gradients of all adapters, added to.
    pub grads: &'a mut Matrix,
    /// Factor on the gradient of the sum of the losses.
    pub weight: f32,
    /// Seed of the dropout masks.
    pub seed: u64,
    /// Keep only each block's input, and run it forward again in the backward.
    pub checkpointing: bool,
}

/// Rows whose logits exist at a time.
#[must_use]
pub fn head_rows(config: &Config, on_device: bool) -> usize {
    let (elements, most) = if on_device { (HEAD_CHUNK_ON_DEVICE, 4096) } else { (HEAD_CHUNK, 512) };
    (elements / config.vocab_size.max(1)).clamp(16, most)
}

/// A device's failure as a user reads it.
#[must_use]
pub fn device_error(failure: Failure) -> Error {
    let hint = match failure {
        Failure::OutOfMemory { .. } => {
            "use --quantize nf4 or nf4-dq; in training also --train.activation_checkpointing on, a smaller \
             --train.micro_batch_size or --train.max_seq_length; or --accelerator cpu"
        }
        Failure::Other { .. } => "look at `nvidia-smi`; --accelerator cpu works without a GPU",
    };
    Error::refused(failure.to_string(), hint)
}

/// Rotary tables of a model's blocks, and those of its windowed ones where they differ.
fn rope_tables(config: &Config, positions: usize) -> [Tables; 2] {
    let local = config.rope_local_theta.unwrap_or(config.rope_theta);
    [
        Tables::new(config.rope_theta, config.rotary_dim, &config.rope_scaling, positions),
        Tables::new(local, config.rotary_dim, &Scaling::None, positions),
    ]
}

/// What the first block is given.
fn embed(embedding: &Weight, config: &Config, ids: &[u32]) -> Matrix {
    let mut x = embedding.gather(&ids.to_vec().into());
    rows::scale(&mut x, config.embedding_scale);
    x
}

/// What a block's backward starts from.
#[derive(Debug)]
enum Kept {
    Input(Matrix),
    All(Box<block::Saved>),
}

/// A pass after its forward.
#[derive(Debug)]
struct Begun {
    positions: Constant<u32>,
    spans: Spans,
    seed: Option<u64>,
    /// From the lowest adapted block on; none outside training.
    kept: Vec<Kept>,
    /// Gradient of the last block's output.
    dx: Option<Matrix>,
}

impl Begun {
    fn pass<'a>(&'a self, gpt: &'a Gpt, parameters: &'a Matrix) -> Pass<'a> {
        let (positions, spans, exact, rope) = (&self.positions, &self.spans, &gpt.parameters, &gpt.rope);
        Pass { parameters, exact, positions, spans, seed: self.seed, rope, past: None, later: None }
    }
}

impl Gpt {
    fn assemble(config: Config, embedding: Arc<Weight>, blocks: Vec<Block>, final_norm: Norm, head: Linear) -> Self {
        let rope = [Tables::new(1.0, 0, &Scaling::None, 0), Tables::new(1.0, 0, &Scaling::None, 0)];
        Self { config, embedding, blocks, final_norm, head, rope, parameters: Matrix::new(1, 0) }
    }

    /// Makes rotary tables for `positions` positions; to be called before a pass with longer samples than ever.
    pub fn prepare(&mut self, positions: usize) {
        let config = &self.config;
        if config.rotary_dim == 0 || self.rope[0].positions() >= positions {
            return;
        }
        self.rope = rope_tables(config, positions);
    }

    /// Positions that a pass may have.
    #[must_use]
    pub fn prepared(&self) -> usize {
        if self.config.rotary_dim == 0 { self.config.block_size } else { self.rope[0].positions() }
    }

    /// Without its tables a model would not turn queries and keys at all, and answer nonsense.
    fn require_prepared(&self, positions: usize) {
        let enough = self.config.rotary_dim == 0 || positions <= self.prepared();
        assert!(enough, "{positions} positions: prepare() was called for {}", self.prepared());
    }

    /// All projections, block by block, the head last.
    pub fn linears(&self) -> impl Iterator<Item = &Linear> {
        let blocks = self.blocks.iter();
        blocks
            .flat_map(|b| [&b.attention.qkv, &b.attention.projection].into_iter().chain(b.mlp.linears()))
            .chain(std::iter::once(&self.head))
    }

    /// All projections, block by block, the head last.
    pub fn linears_mut(&mut self) -> impl Iterator<Item = &mut Linear> {
        let blocks = self.blocks.iter_mut();
        blocks
            .flat_map(|b| [&mut b.attention.qkv, &mut b.attention.projection].into_iter().chain(b.mlp.linears_mut()))
            .chain(std::iter::once(&mut self.head))
    }

    /// Attaches adapters to the modules that `config_of` has settings for, in place of any there; their parameters are
    /// zero.
    pub fn attach(&mut self, mut config_of: impl FnMut(&str) -> Option<LoraConfig>) {
        let mut at = 0;
        for linear in self.linears_mut() {
            at = linear.attach(at, &mut config_of);
        }
        self.set_parameters(&Matrix::zeros(1, at));
    }

    /// Device of the weights and type of the activations, where they are not on the host.
    #[must_use]
    pub fn place(&self) -> Option<(&Device, Dtype)> {
        self.embedding.place()
    }

    /// Whether the device did all that it was asked for; what it computed since a failure means nothing.
    ///
    /// # Errors
    /// The device's failure, with what to do about it.
    pub fn check(&self) -> Result<()> {
        self.place().map_or(Ok(()), |(device, _)| device.check().map_err(device_error))
    }

    /// Gives the adapters these parameters, which are on the host.
    pub fn set_parameters(&mut self, parameters: &Matrix) {
        self.parameters = parameters.to(self.place().map(|(device, _)| (device, Dtype::F32)));
    }

    /// The parameters as the products read them: on a device in the type of the activations.
    fn parameters_of_products(&self) -> Cow<'_, Matrix> {
        // Without adapters there are none, on no device.
        match self.place().filter(|_| self.parameters.cols() > 0) {
            Some((_, dtype)) if dtype != Dtype::F32 => Cow::Owned(rows::cast(&self.parameters, dtype)),
            _ => Cow::Borrowed(&self.parameters),
        }
    }

    /// Gives all adapters their starting values.
    pub fn initialize_adapters(&mut self, seed: u64) {
        let mut parameters = Matrix::zeros(1, self.parameters.cols());
        for linear in self.linears() {
            for lora in linear.parts.iter().filter_map(|p| p.lora.as_ref()) {
                initialize(lora, linear.inputs(), seed, &mut parameters);
            }
        }
        self.set_parameters(&parameters);
    }

    /// Bytes of the frozen weights.
    #[must_use]
    pub fn weight_bytes(&self) -> usize {
        let tied = if self.config.tie_embeddings { 0 } else { self.embedding.bytes() };
        tied + self.linears().map(|l| l.weight().bytes()).sum::<usize>()
    }

    fn embed(&self, ids: &[u32]) -> Matrix {
        embed(&self.embedding, &self.config, ids)
    }

    /// Some rows of the head's weight, on the host.
    ///
    /// # Shapes
    /// Returns (ids, n_embd).
    #[must_use]
    pub fn head_weight(&self, ids: &[u32]) -> Matrix {
        self.head.weight().gather(&ids.to_vec().into()).to_host()
    }

    /// The head's bias, if it has one.
    #[must_use]
    pub fn head_bias(&self) -> Option<&[f32]> {
        self.head.bias()
    }

    fn transform(&self) -> Transform {
        Transform { scale: self.config.logit_scale, softcap: self.config.final_softcap }
    }

    /// The lowest block with an adapter; gradients flow from there on.
    fn lowest(&self) -> usize {
        self.blocks.iter().position(Block::adapted).unwrap_or(self.blocks.len())
    }

    /// Sum of the losses in nats over all targets; with `training`, the adapters' gradients too.
    ///
    /// # Panics
    /// As [`Self::pass`].
    #[must_use]
    pub fn loss(&self, tokens: &Tokens, training: Option<Training<'_>>) -> f64 {
        self.pass(tokens, None, training).value()
    }

    /// As [`Self::loss`], without waiting for a device: the sum is there when it is asked for. The samples go on after
    /// `prefix`, if given.
    ///
    /// # Panics
    /// When `prepare` was not called for samples of this length, an id is outside the vocabulary, or the tokens stand
    /// elsewhere than behind the prefix.
    #[must_use]
    pub fn pass(&self, tokens: &Tokens, prefix: Option<&mut Prefix>, mut training: Option<Training<'_>>) -> Loss {
        let parameters = self.parameters_of_products();
        let (begun, loss) = self.forward(&parameters, tokens, prefix.as_deref(), &mut training, |_, _| {});
        if let Some(training) = training {
            self.backward(&parameters, begun, prefix, &[], training.grads);
        }
        loss
    }

    /// The forward of a pass, its loss, and the backward of its head; `visit` sees what each block saved.
    fn forward(
        &self,
        parameters: &Matrix,
        tokens: &Tokens,
        prefix: Option<&Prefix>,
        training: &mut Option<Training<'_>>,
        mut visit: impl FnMut(&Block, &block::Saved),
    ) -> (Begun, Loss) {
        self.require_prepared(tokens.longest());
        assert_eq!(tokens.past, prefix.map_or(0, Prefix::len), "tokens stand behind their prefix");
        let (positions, spans) = (tokens.rows(&self.rope[0]), Spans::after(tokens.past, &tokens.segments));
        let seed = training.as_ref().map(|t| t.seed);
        let mut begun = Begun { positions, spans, seed, kept: Vec::new(), dx: None };
        let pass = begun.pass(self, parameters);
        let lowest = self.lowest();
        let checkpointing = training.as_ref().is_some_and(|t| t.checkpointing);
        let mut x = self.embed(&tokens.ids);
        let mut kept = Vec::new();
        for (layer, block) in self.blocks.iter().enumerate() {
            let keep = training.is_some() && layer >= lowest;
            let input = (keep && checkpointing).then(|| x.clone());
            let (y, saved) = block.forward(&Pass { past: prefix.map(|p| &p.layers[layer]), ..pass }, x);
            visit(block, &saved);
            match input {
                Some(input) => kept.push(Kept::Input(input)),
                None if keep => kept.push(Kept::All(Box::new(saved))),
                None => {}
            }
            x = y;
        }
        let mut to = training.as_mut().map(|t| (Gradients { parameters, grads: &mut *t.grads, past: None }, t.weight));
        let (loss, dx) = self.head_loss(tokens, &pass, &x, &mut to, lowest < self.blocks.len());
        (begun.kept, begun.dx) = (kept, dx);
        (begun, loss)
    }

    /// The backward of a pass through its blocks: adds the adapters' gradients to `grads` and those of the keys and values
    /// of its prefix there. `later` are those of its own from passes that went on from them, by block from the lowest
    /// adapted on.
    fn backward(
        &self,
        parameters: &Matrix,
        mut begun: Begun,
        mut prefix: Option<&mut Prefix>,
        later: &[Matrix],
        grads: &mut Matrix,
    ) {
        let (kept, dx) = (std::mem::take(&mut begun.kept), begun.dx.take());
        let Some(mut d) = dx else { return };
        let (pass, lowest) = (begun.pass(self, parameters), self.lowest());
        for ((layer, block), kept) in self.blocks.iter().enumerate().skip(lowest).zip(kept).rev() {
            let (past, past_grads) = match &mut prefix {
                Some(prefix) => (Some(&prefix.layers[layer]), Some(&mut prefix.grads[layer - lowest])),
                None => (None, None),
            };
            let pass = Pass { past, later: later.get(layer - lowest), ..pass };
            let saved = match kept {
                Kept::Input(x) => block.forward(&pass, x).1,
                Kept::All(saved) => *saved,
            };
            let mut to = Gradients { parameters, grads, past: past_grads };
            match block.backward(&pass, &mut to, d, saved, layer > lowest) {
                Some(below) => d = below,
                None => break,
            }
        }
    }

    /// Final norm, head and loss, in chunks of the rows that have a target; the gradient of the last block's output
    /// where it is asked for.
    fn head_loss(
        &self,
        tokens: &Tokens,
        pass: &Pass<'_>,
        x: &Matrix,
        to: &mut Option<(Gradients<'_>, f32)>,
        input_needed: bool,
    ) -> (Loss, Option<Matrix>) {
        let rows: Vec<(usize, u32)> = tokens.targets.iter().enumerate().filter_map(|(i, t)| Some((i, (*t)?))).collect();
        let input_needed = input_needed && to.is_some();
        let mut dx = input_needed.then(|| x.zeros_like(x.rows(), x.cols()));
        let mut loss = Loss::zero(x);
        let chunk = head_rows(&self.config, x.place().is_some());
        for (at, rows) in rows.chunks(chunk).enumerate() {
            let index: Constant<u32> = rows.iter().map(|r| r.0 as u32).collect();
            let before = gather(x, &index);
            let normed = self.final_norm.forward(&before);
            let targets: Constant<u32> = rows.iter().map(|r| r.1).collect();
            let pass = Pass { seed: pass.seed.map(|s| s.wrapping_add(at as u64)), ..*pass };
            let mut logits = x.new_like(rows.len(), self.config.vocab_size);
            let h = self.head.forward(pass.parameters, &normed, pass.seed, &mut logits, false);
            let weight = to.as_ref().map_or(0.0, |t| t.1);
            // An adapter of the head needs the gradient of every logit: its own steps do not shrink with it.
            let dropped = input_needed && !self.head.adapted();
            let negligible = if dropped { self.head.weight().negligible() } else { 0.0 };
            let how = Gradient { weight, negligible };
            cross_entropy(&mut logits, &targets, self.transform(), how, &mut loss);
            let Some((to, _)) = to else { continue };
            let mut d = input_needed.then(|| x.new_like(rows.len(), x.cols()));
            self.head.backward(to, &logits, || normed.clone(), &h, pass.seed, d.as_mut().map(|d| (d, false)));
            if let (Some(d), Some(dx)) = (d, &mut dx) {
                let mut d_before = d.new_like(d.rows(), d.cols());
                self.final_norm.backward(&d, &before, &mut d_before, false);
                scatter_add(&d_before, &index, None, dx);
            }
        }
        (loss, dx)
    }
}
