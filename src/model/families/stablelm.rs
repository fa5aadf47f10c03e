//! StableLM 2, Zephyr and 3B 4E1T (not the base alpha models, which are GPT-NeoX).

use super::{Family, HfConfig, Piece};
use crate::error::Result;
use crate::model::Config;
use crate::model::config::QkNorm;
use crate::ops::norm::Kind;

/// `StableLmForCausalLM`.
pub const STABLELM: Family = Family { model_types: &["stablelm", "stablelm_epoch"], config, locate };

fn config(hf: &HfConfig) -> Result<Config> {
    let mut config = hf.sizes()?;
    config.norm = Kind::Layer;
    config.norm_eps = hf.number("layer_norm_eps", 1e-5)? as f32;
    config.biases.norm = true;
    config.biases.qkv = hf.flag("use_qkv_bias", false)?;
    config.parallel_residual = hf.flag("use_parallel_residual", false)?;
    config.shared_norm = config.parallel_residual;
    if hf.flag("qk_layernorm", false)? {
        config.qk_norm = QkNorm::HeadLayer;
    }
    config.activation = hf.activation("hidden_act", "silu")?;
    config.tie_embeddings = hf.flag("tie_word_embeddings", false)?;
    hf.partial_rope(&mut config, "rope_theta", "partial_rotary_factor", 0.25)?;
    config.finish(hf.path())
}

/// The norms of queries and keys are a tensor a head.
fn locate(config: &Config, name: &str) -> Vec<Piece> {
    for (ours, theirs, heads) in
        [("q_norm.", "q_layernorm.norms.", config.n_head), ("k_norm.", "k_layernorm.norms.", config.n_query_groups)]
    {
        if let Some((prefix, suffix)) = name.split_once(ours) {
            return (0..heads).flat_map(|head| Piece::whole(format!("{prefix}{theirs}{head}.{suffix}"))).collect();
        }
    }
    Piece::whole(name)
}
