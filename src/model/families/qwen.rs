//! Qwen 2, 2.5, QwQ (biases on q, k, v), Qwen 3 (norms on queries and keys), dense and with experts.

use super::{Family, HfConfig, same_names};
use crate::error::{Error, Result};
use crate::model::Config;
use crate::model::config::{Mlp, QkNorm};

/// `Qwen2ForCausalLM`.
pub const QWEN2: Family = Family { model_types: &["qwen2"], config: qwen2, locate: same_names };

/// `Qwen3ForCausalLM`.
pub const QWEN3: Family = Family { model_types: &["qwen3"], config: qwen3, locate: same_names };

/// `Qwen3MoeForCausalLM`.
pub const QWEN3_MOE: Family = Family { model_types: &["qwen3_moe"], config: qwen3_moe, locate: same_names };

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

fn qwen3_moe(hf: &HfConfig) -> Result<Config> {
    let step = hf.count_or("decoder_sparse_step", 1)?.unwrap_or(1);
    let dense = hf.get("mlp_only_layers").is_some_and(|v| v.as_array().is_none_or(|list| !list.is_empty()));
    if step != 1 || dense {
        let key = if dense { "mlp_only_layers" } else { "decoder_sparse_step" };
        let what = format!("`{key}`: layers without experts among others with them (`{}`)", hf.path().display());
        return Err(Error::unsupported(what, "choose a checkpoint with experts in every layer"));
    }
    let mut config = hf.sizes()?;
    config.n_query_groups = hf.count_or("num_key_value_heads", 4)?.unwrap_or(4);
    config.block_size = hf.count_or("max_position_embeddings", 32_768)?.unwrap_or(32_768);
    config.intermediate_size = hf.count_or("moe_intermediate_size", 768)?.unwrap_or(768);
    config.mlp = Mlp::Experts {
        // transformers 5 writes `num_local_experts`.
        n_expert: hf.count_or("num_experts", hf.count_or("num_local_experts", 128)?)?.unwrap_or(128),
        n_expert_per_token: hf.count_or("num_experts_per_tok", 8)?.unwrap_or(8),
        norm_topk: hf.flag("norm_topk_prob", false)?,
    };
    config.norm_eps = hf.number("rms_norm_eps", 1e-6)? as f32;
    config.activation = hf.activation("hidden_act", "silu")?;
    config.tie_embeddings = hf.flag("tie_word_embeddings", false)?;
    config.qk_norm = QkNorm::Head;
    config.biases.qkv = hf.flag("attention_bias", false)?;
    config.biases.projection = config.biases.qkv;
    hf.rope(&mut config)?;
    // Its window, unlike Qwen 3's, is one for all layers.
    let used = hf.flag("use_sliding_window", false)?;
    config.windows = vec![hf.count_unless_null("sliding_window", 4096)?.filter(|_| used); config.n_layer];
    config.finish(hf.path())
}

fn base(hf: &HfConfig) -> Result<Config> {
    let mut config = hf.sizes()?;
    config.n_query_groups = hf.count_unless_null("num_key_value_heads", 32)?.unwrap_or(config.n_head);
    config.norm_eps = hf.number("rms_norm_eps", 1e-6)? as f32;
    config.activation = hf.activation("hidden_act", "silu")?;
    config.tie_embeddings = hf.flag("tie_word_embeddings", false)?;
    hf.rope(&mut config)?;
    let used = hf.flag("use_sliding_window", false)?;
    let window = hf.count_unless_null("sliding_window", 4096)?.filter(|_| used);
    let first = hf.count_or("max_window_layers", 28)?.unwrap_or(28);
    hf.windows(&mut config, window, |layer| layer >= first)?;
    Ok(config)
}
