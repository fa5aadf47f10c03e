//! Samples on their way through the blocks of a model, one block in memory at a time, to know what each projection is
//! multiplied with. So may 4-bit codes be chosen for it (`ops::gptq`).

use super::attention::Pass;
use super::block::{Block, Site};
use super::config::{Config, Mlp as MlpKind};
use super::load::{Loader, Source};
use super::{Tokens, device_error, embed, rope_tables};
use crate::error::{Error, Result};
use crate::ops::attention::Spans;
use crate::ops::device::{Constant, Device, Dtype};
use crate::ops::matmul::{Side, Threads, matmul};
use crate::ops::rope::Tables;
use crate::ops::weight::Store;
use crate::ops::{Matrix, in_pool};

/// Samples that have come up to some block.
#[derive(Debug)]
pub struct Calibration<'a> {
    config: &'a Config,
    device: Option<&'a Device>,
    store: Store,
    rope: [Tables; 2],
    /// Parameters of adapters: there are none.
    parameters: Matrix,
    passes: Vec<OnTheWay>,
}

/// Some samples, end to end, and the input of the next block: (T, n_embd).
#[derive(Debug)]
struct OnTheWay {
    positions: Constant<u32>,
    spans: Spans,
    x: Matrix,
}

/// What projections of one input are multiplied with.
#[derive(Debug)]
pub struct Seen {
    /// The projections' modules, as `model.layers.0.self_attn.q_proj`.
    pub modules: Vec<String>,
    /// The Gram matrix of their input over all samples: (inputs, inputs), on the host.
    pub gram: Matrix,
}

impl<'a> Calibration<'a> {
    /// The samples before the first block; each of `passes` goes through it at once. Weights and activations are kept as a
    /// model's of `store`.
    ///
    /// # Errors
    /// Those of the source, a device that has no room for the heads, and a model with experts: few samples visit each.
    pub fn new(
        config: &'a Config,
        source: &dyn Source,
        device: Option<&'a Device>,
        store: Store,
        passes: &[Tokens],
    ) -> Result<Self> {
        if matches!(config.mlp, MlpKind::Experts { .. }) {
            let what = "calibrating a model with experts";
            return Err(Error::unsupported(what, "quantize it without samples, with --quantize alone"));
        }
        let loader = Loader { config, source, store, quantizer: None, device };
        loader.check()?;
        let embedding = loader.embedding()?;
        let rope = rope_tables(config, passes.iter().map(Tokens::longest).max().unwrap_or(0));
        let on_the_way = |tokens: &Tokens| OnTheWay {
            positions: tokens.rows(&rope[0]),
            spans: Spans::whole(&tokens.segments),
            x: embed(&embedding, config, &tokens.ids),
        };
        let passes = passes.iter().map(on_the_way).collect();
        Ok(Self { config, device, store, rope, parameters: Matrix::new(1, 0), passes })
    }

    /// About how many bytes it takes where the samples are, and what choosing the codes takes on the host. `tokens`: of all
    /// passes; `pass`: of the longest.
    #[must_use]
    pub fn bytes(config: &Config, store: Store, on_device: bool, tokens: usize, pass: usize) -> [usize; 2] {
        let (n_embd, q, kv, units) = (config.n_embd, config.q_cols(), config.kv_cols(), config.intermediate_size);
        let matrices = if config.mlp == MlpKind::Plain { 2 } else { 3 };
        let (widest, largest) = (n_embd.max(q).max(units), n_embd * q.max(units));
        let block = n_embd * (2 * q + 2 * kv + matrices * units);
        let gram = 4 * widest * widest;
        let size = if on_device && store != Store::F32 { 2 } else { 4 };
        let activations = tokens * n_embd + pass * (4 * n_embd + 2 * q + 2 * kv + matrices * units);
        let there = size * (activations + block.max(config.vocab_size * n_embd)) + gram;
        // A Gram matrix and its factor; values, errors and codes of a matrix; the block as its codes stand for it.
        [there, 2 * gram + 9 * largest + 4 * block]
    }

    fn block(&self, source: &dyn Source, layer: usize) -> Result<Block> {
        let Self { config, device, store, .. } = *self;
        Loader { config, source, store, quantizer: None, device }.block(layer)
    }

    fn pass<'b>(&'b self, at: &'b OnTheWay) -> Pass<'b> {
        let (parameters, OnTheWay { positions, spans, .. }) = (&self.parameters, at);
        Pass { parameters, exact: parameters, positions, spans, seed: None, rope: &self.rope, past: None, later: None }
    }

    /// What some projections of block `layer`, before which the samples stand, are multiplied with.
    ///
    /// # Errors
    /// Those of the source and the device.
    pub fn see(&self, source: &dyn Source, layer: usize, site: Site) -> Result<Seen> {
        let block = self.block(source, layer)?;
        let linear = block.at(site);
        let mut gram = self.zeros(linear.inputs());
        for at in &self.passes {
            in_pool(|| {
                let x = block.input(&self.pass(at), &at.x, site);
                matmul(Threads::All, gram.view_mut(), true, 1.0, Side::T(x.view()), Side::N(x.view()));
            });
            self.check()?;
        }
        let modules = linear.parts.iter().map(|part| part.name.clone()).collect();
        let seen = Seen { modules, gram: gram.to_host() };
        self.check()?;
        Ok(seen)
    }

    /// Takes the samples through block `layer` of `source`.
    ///
    /// # Errors
    /// Those of the source and the device.
    pub fn advance(&mut self, source: &dyn Source, layer: usize) -> Result<()> {
        let block = self.block(source, layer)?;
        for number in 0..self.passes.len() {
            let at = &self.passes[number];
            let x = in_pool(|| block.forward(&self.pass(at), at.x.clone()).0);
            self.passes[number].x = x;
        }
        self.check()
    }

    fn zeros(&self, n: usize) -> Matrix {
        let Some(device) = self.device else { return Matrix::zeros(n, n) };
        let mut zeros = Matrix::new_on(device, Dtype::F32, n, n);
        zeros.zero();
        zeros
    }

    fn check(&self) -> Result<()> {
        self.device.map_or(Ok(()), |device| device.check().map_err(device_error))
    }
}
