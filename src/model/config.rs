//! `Config`: everything that tells one decoder-only transformer from another, as flat numbers and choices. No family is
//! named here; `families` reads a config.json into this.

use crate::error::{Error, Result};
use crate::ops::glu::Activation;
use crate::ops::norm::Kind;
use crate::ops::rope::Scaling;

/// Where a block's norms stand.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Placement {
    /// Before attention and MLP.
    Pre,
    /// After them, before the residual is added.
    Post,
    /// Before and after.
    Both,
}

/// Norm of queries and keys.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum QkNorm {
    /// None.
    None,
    /// RMS norm of each head, one weight for all heads.
    Head,
    /// Layer norm of each head, a weight for each head.
    HeadLayer,
    /// RMS norm over all heads together.
    Full,
}

/// What an MLP is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mlp {
    /// `down(act(gate) · up)`.
    Gated,
    /// `down(act(up))`.
    Plain,
    /// A router and gated experts.
    Experts {
        /// Number of experts.
        n_expert: usize,
        /// Experts that a token visits.
        n_expert_per_token: usize,
        /// Whether the visited experts' shares are scaled to sum to 1.
        norm_topk: bool,
    },
}

/// Which linear layers have a bias.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Biases {
    /// q, k and v.
    pub qkv: bool,
    /// The attention's output projection.
    pub projection: bool,
    /// Both or all three of the MLP.
    pub mlp: bool,
    /// The LM head.
    pub head: bool,
    /// The norms.
    pub norm: bool,
}

/// Architecture of a model.
#[derive(Debug, Clone, PartialEq)]
pub struct Config {
    /// Tokens of the embedding and the head.
    pub vocab_size: usize,
    /// Blocks.
    pub n_layer: usize,
    /// Channels of the residual stream.
    pub n_embd: usize,
    /// Query heads.
    pub n_head: usize,
    /// Key and value heads.
    pub n_query_groups: usize,
    /// Channels of a head.
    pub head_size: usize,
    /// Channels inside the MLP, or inside each expert.
    pub intermediate_size: usize,
    /// Longest context, tokens.
    pub block_size: usize,
    /// Norm class.
    pub norm: Kind,
    /// Epsilon of the norms.
    pub norm_eps: f32,
    /// Whether norms scale by `1 + w`.
    pub norm_unit_offset: bool,
    /// Whether norms have a weight at all.
    pub norm_weight: bool,
    /// Where the norms stand.
    pub placement: Placement,
    /// Largest magnitude of queries, keys and values before norm and rope.
    pub clip_qkv: Option<f32>,
    /// Norm of queries and keys.
    pub qk_norm: QkNorm,
    /// Attention and MLP both read the block's input.
    pub parallel_residual: bool,
    /// They read it through one norm.
    pub shared_norm: bool,
    /// Which linear layers have a bias.
    pub biases: Biases,
    /// Rotated channels of a head.
    pub rotary_dim: usize,
    /// Base of the rotary frequencies.
    pub rope_theta: f64,
    /// Stretching of the rotary frequencies.
    pub rope_scaling: Scaling,
    /// Base of the unscaled rotary frequencies of windowed layers, where they have their own.
    pub rope_local_theta: Option<f64>,
    /// Layers without rotary embedding.
    pub no_rope: Vec<bool>,
    /// Sliding window of each layer, tokens.
    pub windows: Vec<Option<usize>>,
    /// Factor on the attention scores.
    pub attention_scale: f32,
    /// Soft cap of the attention scores.
    pub attention_softcap: Option<f32>,
    /// Soft cap of the logits.
    pub final_softcap: Option<f32>,
    /// Factor on the logits.
    pub logit_scale: f32,
    /// Factor on the embeddings.
    pub embedding_scale: f32,
    /// Factor on what attention and MLP add to the residual stream.
    pub residual_scale: f32,
    /// Activation of the MLP.
    pub activation: Activation,
    /// Kind of the MLP.
    pub mlp: Mlp,
    /// The head is the embedding.
    pub tie_embeddings: bool,
}

impl Config {
    /// A llama-like architecture of these sizes, which families change where they differ.
    #[must_use]
    pub fn llama(vocab_size: usize, n_layer: usize, n_embd: usize, n_head: usize, intermediate_size: usize) -> Self {
        let head_size = n_embd / n_head.max(1);
        Self {
            vocab_size,
            n_layer,
            n_embd,
            n_head,
            n_query_groups: n_head,
            head_size,
            intermediate_size,
            block_size: 2048,
            norm: Kind::Rms,
            norm_eps: 1e-6,
            norm_unit_offset: false,
            norm_weight: true,
            placement: Placement::Pre,
            clip_qkv: None,
            qk_norm: QkNorm::None,
            parallel_residual: false,
            shared_norm: false,
            biases: Biases::default(),
            rotary_dim: head_size,
            rope_theta: 10_000.0,
            rope_scaling: Scaling::None,
            rope_local_theta: None,
            no_rope: vec![false; n_layer],
            windows: vec![None; n_layer],
            attention_scale: 0.0,
            attention_softcap: None,
            final_softcap: None,
            logit_scale: 1.0,
            embedding_scale: 1.0,
            residual_scale: 1.0,
            activation: Activation::Silu,
            mlp: Mlp::Gated,
            tie_embeddings: false,
        }
    }

    /// Columns of all query heads.
    #[must_use]
    pub fn q_cols(&self) -> usize {
        self.n_head * self.head_size
    }

    /// Columns of all key heads.
    #[must_use]
    pub fn kv_cols(&self) -> usize {
        self.n_query_groups * self.head_size
    }

    /// Outputs of a block's router, 0 without one.
    #[must_use]
    pub fn routed(&self) -> usize {
        if let Mlp::Experts { n_expert, .. } = self.mlp { n_expert } else { 0 }
    }

    /// A block's projections: (in, out) of q, k, v, o and the MLP's gate, up and down, and how often the block has each.
    #[must_use]
    pub fn projections(&self) -> [(usize, usize, usize); 7] {
        let (c, q, kv, width) = (self.n_embd, self.q_cols(), self.kv_cols(), self.intermediate_size);
        let experts = self.routed().max(1);
        let gates = if self.mlp == Mlp::Plain { 0 } else { experts };
        [(c, q, 1), (c, kv, 1), (c, kv, 1), (q, c, 1), (c, width, gates), (c, width, experts), (width, c, experts)]
    }

    /// Elements of all blocks' projections.
    #[must_use]
    pub fn projected(&self) -> usize {
        self.n_layer * self.projections().iter().map(|(inputs, outputs, count)| inputs * outputs * count).sum::<usize>()
    }

    /// Parameters of the base model, from its shapes.
    #[must_use]
    pub fn parameters(&self) -> usize {
        let embeddings = self.vocab_size * self.n_embd * if self.tie_embeddings { 1 } else { 2 };
        self.projected() + self.n_layer * (self.routed() + 2) * self.n_embd + embeddings + self.n_embd
    }

    /// Fills in the default attention scale and checks that the sizes fit together.
    ///
    /// # Errors
    /// Names the sizes that do not fit.
    pub fn finish(mut self, path: &std::path::Path) -> Result<Self> {
        if self.attention_scale == 0.0 {
            self.attention_scale = 1.0 / (self.head_size as f32).sqrt();
        }
        let mut problems = Vec::new();
        let positive = [
            ("vocabulary", self.vocab_size, 1 << 24),
            ("number of layers", self.n_layer, 4096),
            ("hidden size", self.n_embd, 1 << 20),
            ("number of heads", self.n_head, 1 << 14),
            ("number of key/value heads", self.n_query_groups, 1 << 14),
            ("head size", self.head_size, 1 << 14),
            ("intermediate size", self.intermediate_size, 1 << 24),
            ("context length", self.block_size, 1 << 30),
            ("width of all heads", self.n_head.saturating_mul(self.head_size), 1 << 20),
        ];
        // Lists of rows and of names get as long as these numbers, before a tensor is looked at.
        for (what, size, most) in positive {
            if size == 0 {
                problems.push(format!("the {what} is 0"));
            } else if size > most {
                problems.push(format!("the {what} is {size}, which no model has"));
            }
        }
        if self.n_query_groups > 0 && !self.n_head.is_multiple_of(self.n_query_groups) {
            problems.push(format!("{} heads do not divide into {} key/value heads", self.n_head, self.n_query_groups));
        }
        if self.rotary_dim > self.head_size || !self.rotary_dim.is_multiple_of(2) {
            problems.push(format!("{} rotated channels do not fit a head of {}", self.rotary_dim, self.head_size));
        }
        if let Scaling::Long { short, long, .. } = &self.rope_scaling {
            for (name, factors) in [("short_factor", short), ("long_factor", long)] {
                if 2 * factors.len() != self.rotary_dim {
                    let (n, channels) = (factors.len(), self.rotary_dim);
                    problems.push(format!("`{name}` has {n} numbers for {channels} rotated channels"));
                }
            }
        }
        if let Mlp::Experts { n_expert, n_expert_per_token, .. } = self.mlp {
            if !(1..=n_expert).contains(&n_expert_per_token) {
                problems.push(format!("a token cannot visit {n_expert_per_token} of {n_expert} experts"));
            }
            if n_expert.saturating_mul(self.n_layer) > 1 << 17 {
                problems.push(format!("{n_expert} experts in each of {} layers, which no model has", self.n_layer));
            }
        }
        if problems.is_empty() {
            return Ok(self);
        }
        Err(Error::invalid(
            path,
            problems.join("; "),
            "download the checkpoint again, or compare the file with the model's page",
        ))
    }
}
