//! Llama and what computes the same: Llama 1 to 3.3, TinyLlama, SmolLM2, CodeLlama, Vicuna, ...; Mistral with its
//! sliding window; SmolLM3 with layers without rope.

use super::{Family, HfConfig, same_names};
use crate::error::Result;
use crate::model::Config;
use serde_json::Value;

/// `LlamaForCausalLM`.
pub const LLAMA: Family = Family { model_types: &["llama"], config: llama, locate: same_names };

/// `MistralForCausalLM`.
pub const MISTRAL: Family = Family { model_types: &["mistral"], config: mistral, locate: same_names };

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
    hf.rope(&mut config, "rope_theta", "partial_rotary_factor", 1.0)?;
    config.finish(hf.path())
}

fn mistral(hf: &HfConfig) -> Result<Config> {
    let mut config = llama(hf)?;
    config.n_query_groups = hf.count_or("num_key_value_heads", 8)?.unwrap_or(8);
    // A key that is left out means transformers' default; null means no window.
    let window = if hf.has("sliding_window") { hf.count_or("sliding_window", None)? } else { Some(4096) };
    hf.windows(&mut config, window, |_| true)?;
    config.finish(hf.path())
}

fn smollm3(hf: &HfConfig) -> Result<Config> {
    let mut config = llama(hf)?;
    config.n_query_groups = hf.count_or("num_key_value_heads", 4)?.unwrap_or(4);
    if hf.get("rope_theta").is_none() && hf.get("rope_parameters").is_none() {
        config.rope_theta = 2_000_000.0;
    }
    if hf.get("tie_word_embeddings").is_none() {
        config.tie_embeddings = true;
    }
    let interval = hf.count_or("no_rope_layer_interval", 4)?.unwrap_or(4).max(1);
    config.no_rope = match hf.get("no_rope_layers").and_then(Value::as_array) {
        Some(list) if list.len() == config.n_layer => list.iter().map(|v| v.as_u64() == Some(0)).collect(),
        _ => (0..config.n_layer).map(|i| (i + 1).is_multiple_of(interval)).collect(),
    };
    let used = hf.flag("use_sliding_window", false)?;
    let window = hf.count_or("sliding_window", None)?.filter(|_| used);
    let no_rope = config.no_rope.clone();
    hf.windows(&mut config, window, |layer| !no_rope[layer])?;
    config.finish(hf.path())
}
