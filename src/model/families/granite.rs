//! Granite 3: llama with factors on embeddings, scores, residuals and logits.

use super::{Family, HfConfig, llama::llama, same_names};
use crate::error::Result;
use crate::model::Config;

/// `GraniteForCausalLM`.
pub const GRANITE: Family = Family { model_types: &["granite"], config, locate: same_names };

fn config(hf: &HfConfig) -> Result<Config> {
    let mut config = llama(hf)?;
    config.embedding_scale = hf.number("embedding_multiplier", 1.0)? as f32;
    config.attention_scale = hf.number("attention_multiplier", 1.0)? as f32;
    config.residual_scale = hf.number("residual_multiplier", 1.0)? as f32;
    config.logit_scale = 1.0 / hf.number("logits_scaling", 1.0)? as f32;
    config.finish(hf.path())
}
