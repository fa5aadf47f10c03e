//! The registry of model families: which config.json means which [`Config`], and what its tensors are called.
//!
//! Adding a family is one file and one line in [`FAMILIES`]. A family names its tensors by saying where each tensor of
//! our model, which has the names of Hugging Face's Llama, stands in its files.

mod falcon;
mod gemma;
mod granite;
mod hf;
mod llama;
mod olmo;
mod phi;
mod pythia;
mod qwen;
mod stablelm;

pub use hf::HfConfig;

use super::config::{Config, Mlp, Placement, QkNorm};
use crate::error::{Error, Result};
use std::ops::Range;

/// A model family.
pub struct Family {
    /// Values of `model_type` in config.json.
    pub model_types: &'static [&'static str],
    /// Reads config.json.
    pub config: fn(&HfConfig) -> Result<Config>,
    /// Where a tensor of ours stands in the family's files.
    pub locate: fn(&Config, &str) -> Vec<Piece>,
}

impl std::fmt::Debug for Family {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Family({})", self.model_types[0])
    }
}

/// All families.
pub const FAMILIES: &[Family] = &[
    llama::LLAMA,
    llama::MISTRAL,
    llama::SMOLLM3,
    qwen::QWEN2,
    qwen::QWEN3,
    pythia::GPT_NEOX,
    stablelm::STABLELM,
    falcon::FALCON,
    phi::PHI,
    phi::PHI3,
    gemma::GEMMA,
    gemma::GEMMA2,
    gemma::GEMMA3,
    olmo::OLMO,
    olmo::OLMO2,
    granite::GRANITE,
];

/// Rows of a tensor in a file that are, in this order, a tensor of ours or a part of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Piece {
    /// The tensor's name in the file.
    pub tensor: String,
    /// Its rows; `None` for all.
    pub rows: Option<Vec<Range<usize>>>,
}

impl Piece {
    /// All rows of `tensor`.
    #[must_use]
    pub fn whole(tensor: impl Into<String>) -> Vec<Self> {
        vec![Self { tensor: tensor.into(), rows: None }]
    }

    /// Some rows of `tensor`.
    #[must_use]
    pub fn rows(tensor: impl Into<String>, rows: Vec<Range<usize>>) -> Vec<Self> {
        vec![Self { tensor: tensor.into(), rows: Some(rows) }]
    }
}

/// A tensor of our model.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Slot {
    /// Its name, as Hugging Face's Llama has it.
    pub name: String,
    /// Rows; 1 for a vector.
    pub rows: usize,
    /// Columns; the length of a vector.
    pub cols: usize,
    /// Whether it is a vector in files.
    pub vector: bool,
}

/// The family of a config.json.
///
/// # Errors
/// When its `model_type` is missing or unknown.
pub fn by_config(config: &HfConfig) -> Result<&'static Family> {
    let model_type = config.model_type()?;
    FAMILIES.iter().find(|f| f.model_types.contains(&model_type)).ok_or_else(|| {
        let known: Vec<&str> = FAMILIES.iter().flat_map(|f| f.model_types).copied().collect();
        Error::Unsupported {
            what: format!("model_type `{model_type}` (`{}`)", config.path().display()),
            hint: format!("use a model of one of these types: {}", known.join(", ")),
        }
    })
}

/// All tensors of the model that `config` describes.
#[must_use]
pub fn slots(config: &Config) -> Vec<Slot> {
    let mut slots = Slots(Vec::new());
    slots.matrix("model.embed_tokens", config.vocab_size, config.n_embd, false);
    let norm_bias = config.biases.norm;
    for layer in 0..config.n_layer {
        let layer = format!("model.layers.{layer}");
        for norm in norm_names(config) {
            slots.norm(config, &format!("{layer}.{norm}"), config.n_embd, norm_bias);
        }
        let (q, kv) = (config.q_cols(), config.kv_cols());
        for (name, rows) in [("q_proj", q), ("k_proj", kv), ("v_proj", kv)] {
            slots.matrix(&format!("{layer}.self_attn.{name}"), rows, config.n_embd, config.biases.qkv);
        }
        slots.matrix(&format!("{layer}.self_attn.o_proj"), config.n_embd, q, config.biases.projection);
        let qk = match config.qk_norm {
            QkNorm::None => None,
            QkNorm::Head => Some((config.head_size, config.head_size)),
            QkNorm::HeadLayer | QkNorm::Full => Some((q, kv)),
        };
        if let Some((q, k)) = qk {
            slots.norm(config, &format!("{layer}.self_attn.q_norm"), q, false);
            slots.norm(config, &format!("{layer}.self_attn.k_norm"), k, false);
        }
        let (width, bias) = (config.intermediate_size, config.biases.mlp);
        if config.mlp != Mlp::Plain {
            slots.matrix(&format!("{layer}.mlp.gate_proj"), width, config.n_embd, bias);
        }
        slots.matrix(&format!("{layer}.mlp.up_proj"), width, config.n_embd, bias);
        slots.matrix(&format!("{layer}.mlp.down_proj"), config.n_embd, width, bias);
    }
    slots.norm(config, "model.norm", config.n_embd, norm_bias);
    if !config.tie_embeddings {
        slots.matrix("lm_head", config.vocab_size, config.n_embd, config.biases.head);
    }
    slots.0
}

/// Names of the block's norms, by where they stand.
fn norm_names(config: &Config) -> &'static [&'static str] {
    match config.placement {
        Placement::Pre if config.shared_norm => &["input_layernorm"],
        Placement::Pre => &["input_layernorm", "post_attention_layernorm"],
        Placement::Post => &["post_attention_layernorm", "post_feedforward_layernorm"],
        Placement::Both => {
            &["input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm"]
        }
    }
}

struct Slots(Vec<Slot>);

impl Slots {
    fn matrix(&mut self, name: &str, rows: usize, cols: usize, bias: bool) {
        self.0.push(Slot { name: format!("{name}.weight"), rows, cols, vector: false });
        if bias {
            self.0.push(Slot { name: format!("{name}.bias"), rows: 1, cols: rows, vector: true });
        }
    }

    fn norm(&mut self, config: &Config, name: &str, len: usize, bias: bool) {
        if config.norm_weight {
            self.0.push(Slot { name: format!("{name}.weight"), rows: 1, cols: len, vector: true });
        }
        if bias {
            self.0.push(Slot { name: format!("{name}.bias"), rows: 1, cols: len, vector: true });
        }
    }
}

/// The names of Hugging Face's Llama, which are ours.
fn same_names(_: &Config, name: &str) -> Vec<Piece> {
    Piece::whole(name)
}

/// `name` with the first of `renames` (part of ours, theirs) that it holds replaced, or as it is.
fn renamed(name: &str, renames: &[(&str, &str)]) -> String {
    renames
        .iter()
        .find(|(ours, _)| name.contains(ours))
        .map_or_else(|| name.to_owned(), |(ours, theirs)| name.replacen(ours, theirs, 1))
}

/// Which of q, k, v a tensor belongs to, and the name around it: `("model.layers.0.self_attn.", 1, "weight")`.
fn split_qkv(name: &str) -> Option<(&str, usize, &str)> {
    ["q_proj.", "k_proj.", "v_proj."].iter().enumerate().find_map(|(i, part)| {
        let at = name.find(part)?;
        Some((&name[..at], i, &name[at + part.len()..]))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_model_type_is_listed_once() {
        let mut types: Vec<&str> = FAMILIES.iter().flat_map(|f| f.model_types).copied().collect();
        let all = types.len();
        types.sort_unstable();
        types.dedup();
        assert_eq!(types.len(), all);
    }

    #[test]
    fn qkv_names_split() {
        assert_eq!(split_qkv("model.layers.3.self_attn.k_proj.bias"), Some(("model.layers.3.self_attn.", 1, "bias")));
        assert_eq!(split_qkv("model.layers.3.self_attn.o_proj.bias"), None);
    }
}
