//! OLMo (layer norm without weights) and OLMo 2 (norms after the branches and over all queries and keys).

use super::{Family, HfConfig, same_names};
use crate::error::Result;
use crate::model::Config;
use crate::model::config::{Placement, QkNorm};
use crate::ops::norm::Kind;
use serde_json::Value;

/// `OlmoForCausalLM`.
pub const OLMO: Family = Family { model_types: &["olmo"], config: olmo, locate: same_names };

/// `Olmo2ForCausalLM`.
pub const OLMO2: Family = Family { model_types: &["olmo2"], config: olmo2, locate: same_names };

fn base(hf: &HfConfig) -> Result<Config> {
    let mut config = hf.sizes()?;
    config.activation = hf.activation("hidden_act", "silu")?;
    config.biases.qkv = hf.flag("attention_bias", false)?;
    config.biases.projection = config.biases.qkv;
    config.tie_embeddings = hf.flag("tie_word_embeddings", false)?;
    hf.rope(&mut config, "rope_theta", "partial_rotary_factor", 1.0)?;
    Ok(config)
}

fn olmo(hf: &HfConfig) -> Result<Config> {
    hf.refuse_unless("clip_qkv", &Value::Null)?;
    let mut config = base(hf)?;
    config.norm = Kind::Layer;
    config.norm_eps = 1e-5;
    config.norm_weight = false;
    config.finish(hf.path())
}

fn olmo2(hf: &HfConfig) -> Result<Config> {
    let mut config = base(hf)?;
    config.norm_eps = hf.number("rms_norm_eps", 1e-5)? as f32;
    config.placement = Placement::Post;
    config.qk_norm = QkNorm::Full;
    config.finish(hf.path())
}
