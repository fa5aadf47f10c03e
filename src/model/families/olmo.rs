//! OLMo (layer norm without weights), OLMo 2 (norms after the branches and over all queries and keys), OLMo 3 (the same
//! with sliding windows, whose layers rotate by unscaled frequencies).

use super::{Family, HfConfig, same_names};
use crate::error::{Error, Result};
use crate::model::Config;
use crate::model::config::{Placement, QkNorm};
use crate::ops::norm::Kind;

/// `OlmoForCausalLM`.
pub const OLMO: Family = Family { model_types: &["olmo"], config: olmo, locate: same_names };

/// `Olmo2ForCausalLM`.
pub const OLMO2: Family = Family { model_types: &["olmo2"], config: olmo2, locate: same_names };

/// `Olmo3ForCausalLM`.
pub const OLMO3: Family = Family { model_types: &["olmo3"], config: olmo3, locate: same_names };

const DEFAULT_THETA: f64 = 500_000.0;

fn base(hf: &HfConfig) -> Result<Config> {
    let mut config = hf.sizes()?;
    config.activation = hf.activation("hidden_act", "silu")?;
    config.biases.qkv = hf.flag("attention_bias", false)?;
    config.biases.projection = config.biases.qkv;
    config.tie_embeddings = hf.flag("tie_word_embeddings", false)?;
    Ok(config)
}

fn olmo(hf: &HfConfig) -> Result<Config> {
    let mut config = base(hf)?;
    hf.rope(&mut config)?;
    config.clip_qkv = hf.number_if_any("clip_qkv")?.map(|v| v as f32);
    config.norm = Kind::Layer;
    config.norm_eps = 1e-5;
    config.norm_weight = false;
    config.finish(hf.path())
}

fn olmo2(hf: &HfConfig) -> Result<Config> {
    let mut config = later(hf)?;
    hf.rope(&mut config)?;
    config.finish(hf.path())
}

fn olmo3(hf: &HfConfig) -> Result<Config> {
    let mut config = later(hf)?;
    hf.rope_by_layer_type(&mut config, DEFAULT_THETA, |full| windowed_theta(hf, full))?;
    let window = hf.count_unless_null("sliding_window", 4096)?;
    hf.windows(&mut config, window, |layer| !(layer + 1).is_multiple_of(4))?;
    config.finish(hf.path())
}

/// transformers 5 gives windowed layers its default base where one `rope_theta` stands for all layers; that is no matter
/// as long as both are the same.
fn windowed_theta(hf: &HfConfig, full: f64) -> Result<f64> {
    if full == DEFAULT_THETA {
        return Ok(full);
    }
    let what = format!("`rope_theta`: {full} without one for sliding_attention (`{}`)", hf.path().display());
    Err(Error::unsupported(what, "name the base of both kinds of layers in `rope_parameters`"))
}

/// What OLMo 2 and 3 share.
fn later(hf: &HfConfig) -> Result<Config> {
    let mut config = base(hf)?;
    config.norm_eps = hf.number("rms_norm_eps", 1e-5)? as f32;
    config.placement = Placement::Post;
    config.qk_norm = QkNorm::Full;
    Ok(config)
}
