//! Llama and what computes the same: Llama 1 to 3.3, TinyLlama, SmolLM2, CodeLlama, Vicuna, ...; Mistral with its
//! sliding window; Mixtral with its experts; SmolLM3 with layers without rope.

use super::{Family, HfConfig, Piece, renamed, same_names};
use crate::error::Result;
use crate::model::Config;
use crate::model::config::Mlp;

/// `LlamaForCausalLM`.
pub const LLAMA: Family = Family { model_types: &["llama"], config: llama, locate: same_names };

/// `MistralForCausalLM`.
pub const MISTRAL: Family = Family { model_types: &["mistral"], config: mistral, locate: same_names };

/// `MixtralForCausalLM`.
pub const MIXTRAL: Family = Family { model_types: &["mixtral"], config: mixtral, locate: mixtral_names };

/// `SmolLM3ForCausalLM`.
pub const SMOLLM3: Family = Family { model_types: &["smollm3"], config: smollm3, locate: same_names };

pub(super) fn llama(hf: &HfConfig) -> Result<Config> {
    let mut config = hf.sizes()?;
    config.norm_eps = hf.number("rms_norm_eps", 1e-6)? as f32;
    config.activation = hf.activation("hidden_act", "silu")?;
    config.biases.qkv = hf.flag("attention_bias", false)?;
    config.biases.projection = config.biases.qkv;
    config.biases.mlp = hf.flag("mlp_bias", false)?;
    config.tie_embeddings = hf.flag("tie_word_embeddings", false)?;
    hf.rope(&mut config)?;
    config.finish(hf.path())
}

fn mistral(hf: &HfConfig) -> Result<Config> {
    let mut config = llama(hf)?;
    config.n_query_groups = hf.count_unless_null("num_key_value_heads", 8)?.unwrap_or(config.n_head);
    let window = hf.count_unless_null("sliding_window", 4096)?;
    hf.windows(&mut config, window, |_| true)?;
    config.finish(hf.path())
}

fn mixtral(hf: &HfConfig) -> Result<Config> {
    let mut config = hf.sizes()?;
    config.n_query_groups = hf.count_or("num_key_value_heads", 8)?.unwrap_or(8);
    config.intermediate_size = hf.count_or("intermediate_size", 14336)?.unwrap_or(14336);
    config.block_size = hf.count_or("max_position_embeddings", 131_072)?.unwrap_or(131_072);
    config.norm_eps = hf.number("rms_norm_eps", 1e-5)? as f32;
    config.activation = hf.activation("hidden_act", "silu")?;
    config.tie_embeddings = hf.flag("tie_word_embeddings", false)?;
    config.mlp = Mlp::Experts {
        n_expert: hf.count_or("num_local_experts", hf.count_or("num_experts", 8)?)?.unwrap_or(8),
        n_expert_per_token: hf.count_or("num_experts_per_tok", 2)?.unwrap_or(2),
        norm_topk: true,
    };
    config.rope_theta = 1_000_000.0;
    hf.rope(&mut config)?;
    config.windows = vec![hf.count_or("sliding_window", None)?; config.n_layer];
    config.finish(hf.path())
}

fn mixtral_names(_: &Config, name: &str) -> Vec<Piece> {
    let name = renamed(name, &[("gate_proj", "w1"), ("up_proj", "w3"), ("down_proj", "w2")]);
    Piece::whole(renamed(&name, &[("mlp.", "block_sparse_moe.")]))
}

fn smollm3(hf: &HfConfig) -> Result<Config> {
    let mut config = llama(hf)?;
    config.n_query_groups = hf.count_unless_null("num_key_value_heads", 4)?.unwrap_or(config.n_head);
    config.rope_theta = 2_000_000.0;
    hf.rope(&mut config)?;
    if hf.get("tie_word_embeddings").is_none() {
        config.tie_embeddings = true;
    }
    let interval = hf.count_or("no_rope_layer_interval", 4)?.unwrap_or(4).max(1);
    config.no_rope = match hf.get("no_rope_layers") {
        Some(layers) => {
            let list = layers.as_array().filter(|list| list.len() >= config.n_layer);
            let list = list.ok_or_else(|| hf.wrong("no_rope_layers", layers, "a list with 0 or 1 for each layer"))?;
            list[..config.n_layer].iter().map(|v| v.as_u64() == Some(0)).collect()
        }
        None => (0..config.n_layer).map(|i| (i + 1).is_multiple_of(interval)).collect(),
    };
    // Layers that are listed have their window whether it is said to be used or not, in transformers as here.
    let used = hf.flag("use_sliding_window", false)? || hf.get("layer_types").is_some();
    let window = hf.count_or("sliding_window", None)?.filter(|_| used);
    let no_rope = config.no_rope.clone();
    hf.windows(&mut config, window, |layer| no_rope[layer])?;
    config.finish(hf.path())
}
