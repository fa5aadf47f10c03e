//! Qwen 2, 2.5, QwQ (biases on q, k, v) and Qwen 3 (norms on queries and keys), dense.

use super::{Family, HfConfig, same_names};
use crate::error::Result;
use crate::model::Config;
use crate::model::config::QkNorm;

/// `Qwen2ForCausalLM`.
pub const QWEN2: Family = Family { model_types: &["qwen2"], config: qwen2, locate: same_names };

/// `Qwen3ForCausalLM`.
pub const QWEN3: Family = Family { model_types: &["qwen3"], config: qwen3, locate: same_names };

fn qwen2(hf: &HfConfig) -> Result<Config> {
    let mut config = base(hf)?;
    config.biases.qkv = true;
    config.finish(hf.path())
}

fn qwen3(hf: &HfConfig) -> Result<Config> {
    let mut config = base(hf)?;
    config.head_size = hf.count_or("head_dim", 128)?.unwrap_or(128);
    config.rotary_dim = config.head_size;
    config.qk_norm = QkNorm::Head;
    config.biases.qkv = hf.flag("attention_bias", false)?;
    config.biases.projection = config.biases.qkv;
    config.finish(hf.path())
}

fn base(hf: &HfConfig) -> Result<Config> {
    let mut config = hf.sizes()?;
    config.n_query_groups = hf.count_or("num_key_value_heads", 32)?.unwrap_or(32);
    config.norm_eps = hf.number("rms_norm_eps", 1e-6)? as f32;
    config.activation = hf.activation("hidden_act", "silu")?;
    config.tie_embeddings = hf.flag("tie_word_embeddings", false)?;
    hf.rope(&mut config, "rope_theta", "partial_rotary_factor", 1.0)?;
    let used = hf.flag("use_sliding_window", false)?;
    let window = hf.count_or("sliding_window", 4096)?.filter(|_| used);
    let first = hf.count_or("max_window_layers", 28)?.unwrap_or(28);
    hf.windows(&mut config, window, |layer| layer >= first)?;
    Ok(config)
}
