//! Gemma 1 and CodeGemma, Gemma 2 (norms on both sides, soft caps, alternating windows), Gemma 3 text (norms on queries
//! and keys, two rope bases).

use super::{Family, HfConfig, same_names};
use crate::error::Result;
use crate::model::Config;
use crate::model::config::{Placement, QkNorm};
use crate::ops::glu::Activation;
use serde_json::{Value, json};

/// `GemmaForCausalLM`.
pub const GEMMA: Family = Family { model_types: &["gemma"], config: gemma, locate: same_names };

/// `Gemma2ForCausalLM`.
pub const GEMMA2: Family = Family { model_types: &["gemma2"], config: gemma2, locate: same_names };

/// `Gemma3ForCausalLM`.
pub const GEMMA3: Family = Family { model_types: &["gemma3_text"], config: gemma3, locate: same_names };

fn base(hf: &HfConfig) -> Result<Config> {
    let mut config = hf.sizes()?;
    config.head_size = hf.count_or("head_dim", 256)?.unwrap_or(256);
    config.norm_eps = hf.number("rms_norm_eps", 1e-6)? as f32;
    config.norm_unit_offset = true;
    config.embedding_scale = (config.n_embd as f32).sqrt();
    config.activation = Activation::GeluTanh;
    let attention = hf.flag("attention_bias", false)?;
    config.biases.qkv = attention;
    config.biases.projection = attention;
    config.tie_embeddings = hf.flag("tie_word_embeddings", true)?;
    Ok(config)
}

fn gemma(hf: &HfConfig) -> Result<Config> {
    let mut config = base(hf)?;
    // Its first configs said "gelu" and meant the tanh form; `hidden_activation` beside it is not read.
    config.activation = match hf.activation("hidden_act", "gelu_pytorch_tanh")? {
        Activation::Gelu => Activation::GeluTanh,
        other => other,
    };
    config.n_query_groups = hf.count_or("num_key_value_heads", 16)?.unwrap_or(16);
    hf.rope(&mut config)?;
    config.finish(hf.path())
}

/// What Gemma 2 and 3 share.
fn later(hf: &HfConfig) -> Result<Config> {
    let mut config = base(hf)?;
    config.n_query_groups = hf.count_or("num_key_value_heads", 4)?.unwrap_or(4);
    config.activation = hf.activation("hidden_activation", "gelu_pytorch_tanh")?;
    config.placement = Placement::Both;
    config.attention_scale = (hf.number("query_pre_attn_scalar", 256.0)? as f32).powf(-0.5);
    Ok(config)
}

fn gemma2(hf: &HfConfig) -> Result<Config> {
    let mut config = later(hf)?;
    let cap = |key: &str, default: f64| -> Result<Option<f32>> {
        Ok(if hf.has(key) { hf.number_if_any(key)? } else { Some(default) }.map(|v| v as f32))
    };
    config.attention_softcap = cap("attn_logit_softcapping", 50.0)?;
    config.final_softcap = cap("final_logit_softcapping", 30.0)?;
    hf.rope(&mut config)?;
    let window = hf.count_or("sliding_window", 4096)?;
    hf.windows(&mut config, window, |layer| layer % 2 == 0)?;
    config.finish(hf.path())
}

fn gemma3(hf: &HfConfig) -> Result<Config> {
    let hf = &hf.or(&json!({
        "vocab_size": 262_208, "hidden_size": 2304, "intermediate_size": 9216, "num_hidden_layers": 26,
        "num_attention_heads": 8, "max_position_embeddings": 131_072,
    }));
    hf.refuse_unless("use_bidirectional_attention", &json!(false))?;
    // transformers has this key in the config and does not apply it.
    hf.refuse_unless("attn_logit_softcapping", &Value::Null)?;
    let mut config = later(hf)?;
    config.qk_norm = QkNorm::Head;
    config.final_softcap = hf.number_if_any("final_logit_softcapping")?.map(|v| v as f32);
    hf.rope_by_layer_type(&mut config, 1_000_000.0, |_| hf.number("rope_local_base_freq", 10_000.0))?;
    let pattern = hf.count_or("sliding_window_pattern", 6)?.unwrap_or(6).max(1);
    let window = hf.count_or("sliding_window", 4096)?;
    hf.windows(&mut config, window, |layer| !(layer + 1).is_multiple_of(pattern))?;
    config.finish(hf.path())
}
