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
    layer: usize,
    /// The next block, once something of it was seen.
    block: Option<Block>,
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
    /// Those of the source and of [`Self::serves`], and a device that has no room for the heads.
    pub fn new(
        config: &'a Config,
        source: &dyn Source,
        device: Option<&'a Device>,
        store: Store,
        passes: &[Tokens],
    ) -> Result<Self> {
        Self::serves(config)?;
        let loader = Loader { config, source, store, formats: None, device };
        loader.check()?;
        let embedding = loader.embedding()?;
        let rope = rope_tables(config, passes.iter().map(Tokens::longest).max().unwrap_or(0));
        let on_the_way = |tokens: &Tokens| OnTheWay {
            positions: tokens.rows(&rope[0]),
            spans: Spans::whole(&tokens.segments),
            x: embed(&embedding, config, &tokens.ids),
        };
        let passes = passes.iter().map(on_the_way).collect();
        let parameters = Matrix::new(1, 0);
        Ok(Self { config, device, store, rope, parameters, passes, layer: 0, block: None })
    }

    /// # Errors
    /// When the model has experts, each of which few samples visit.
    pub fn serves(config: &Config) -> Result<()> {
        match config.mlp {
            MlpKind::Experts { .. } => {
                let what = "choosing the codes of a model with experts by samples";
                Err(Error::unsupported(what, "quantize it without: leave --data or --calibration_samples out"))
            }
            MlpKind::Gated | MlpKind::Plain => Ok(()),
        }
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

    fn pass<'b>(&'b self, at: &'b OnTheWay) -> Pass<'b> {
        let (parameters, OnTheWay { positions, spans, .. }) = (&self.parameters, at);
        Pass { parameters, exact: parameters, positions, spans, seed: None, rope: &self.rope, past: None, later: None }
    }

    fn loader<'b>(&'b self, source: &'b dyn Source) -> Loader<'b> {
        let Self { config, device, store, .. } = *self;
        Loader { config, source, store, formats: None, device }
    }

    /// Number of the block before which the samples stand.
    #[must_use]
    pub fn layer(&self) -> usize {
        self.layer
    }

    /// What some projections of the next block are multiplied with, for which those before them have their places.
    ///
    /// # Errors
    /// Those of the source and the device.
    pub fn see(&mut self, source: &dyn Source, site: Site) -> Result<Seen> {
        let mut block = match self.block.take() {
            Some(block) => block,
            None => self.loader(source).block(self.layer)?,
        };
        let linear = block.at(site);
        let (modules, n) = (linear.parts.iter().map(|part| part.name.clone()).collect(), linear.inputs());
        let mut gram =
            self.device.map_or_else(|| Matrix::zeros(n, n), |device| Matrix::zeros_on(device, Dtype::F32, n, n));
        for at in &self.passes {
            in_pool(|| {
                let x = block.input(&self.pass(at), &at.x, site);
                matmul(Threads::All, gram.view_mut(), true, 1.0, Side::T(x.view()), Side::N(x.view()));
            });
            self.check()?;
        }
        self.block = Some(block);
        let seen = Seen { modules, gram: gram.to_host() };
        self.check()?;
        Ok(seen)
    }

    /// Takes the matrices of `source` for some projections that were seen.
    ///
    /// # Errors
    /// Those of the source.
    ///
    /// # Panics
    /// When nothing of the block was seen.
    pub fn replace(&mut self, source: &dyn Source, site: Site) -> Result<()> {
        let mut block = self.block.take().expect("a block that was seen");
        let linear = block.at(site);
        let parts: Vec<(String, usize)> =
            linear.parts.iter().map(|part| (part.name.clone(), part.rows.len())).collect();
        linear.set_weight(self.loader(source).projection(&parts, linear.inputs())?);
        self.block = Some(block);
        Ok(())
    }

    /// Takes the samples through the block.
    ///
    /// # Errors
    /// Those of the device.
    ///
    /// # Panics
    /// When nothing of the block was seen.
    pub fn advance(&mut self) -> Result<()> {
        let block = self.block.take().expect("a block that was seen");
        for number in 0..self.passes.len() {
            let at = &self.passes[number];
            let x = in_pool(|| block.forward(&self.pass(at), at.x.clone()).0);
            self.passes[number].x = x;
        }
        self.layer += 1;
        self.check()
    }

    fn check(&self) -> Result<()> {
        self.device.map_or(Ok(()), |device| device.check().map_err(device_error))
    }
}
