//! Phi 1, 1.5, 2 (parallel, biased) and Phi 3, 3.5, 4 (llama-like with fused projections).

use super::{Family, HfConfig, Piece, renamed, split_qkv};
use crate::error::{Error, Result};
use crate::model::Config;
use crate::model::config::{Biases, Mlp};
use crate::ops::norm::Kind;
use crate::ops::rope::Scaling;
use serde_json::json;

/// `PhiForCausalLM`.
pub const PHI: Family = Family { model_types: &["phi"], config: phi, locate: phi_names };

/// `Phi3ForCausalLM`.
pub const PHI3: Family = Family { model_types: &["phi3"], config: phi3, locate: phi3_names };

fn phi(hf: &HfConfig) -> Result<Config> {
    hf.refuse_unless("qk_layernorm", &json!(false))?;
    let mut config = hf.sizes()?;
    config.norm = Kind::Layer;
    config.norm_eps = hf.number("layer_norm_eps", 1e-5)? as f32;
    config.parallel_residual = true;
    config.shared_norm = true;
    config.biases = Biases { qkv: true, projection: true, mlp: true, head: true, norm: true };
    config.mlp = Mlp::Plain;
    config.activation = hf.activation("hidden_act", "gelu_new")?;
    config.tie_embeddings = hf.flag("tie_word_embeddings", false)?;
    hf.rope(&mut config, "rope_theta", "partial_rotary_factor", 0.5)?;
    config.finish(hf.path())
}

fn phi_names(_: &Config, name: &str) -> Vec<Piece> {
    let renames = [
        ("self_attn.o_proj", "self_attn.dense"),
        ("mlp.up_proj", "mlp.fc1"),
        ("mlp.down_proj", "mlp.fc2"),
        ("model.norm", "model.final_layernorm"),
    ];
    Piece::whole(renamed(name, &renames))
}

fn phi3(hf: &HfConfig) -> Result<Config> {
    let mut config = hf.sizes()?;
    config.norm_eps = hf.number("rms_norm_eps", 1e-5)? as f32;
    config.activation = hf.activation("hidden_act", "silu")?;
    config.tie_embeddings = hf.flag("tie_word_embeddings", false)?;
    hf.rope(&mut config, "rope_theta", "partial_rotary_factor", 1.0)?;
    // transformers reads a phi3 with yarn as one with longrope, and knows no third.
    if config.rope_scaling != Scaling::None {
        let what = format!("rope scaling of a phi3 (`{}`)", hf.path().display());
        return Err(Error::unsupported(what, "choose a checkpoint without `rope_scaling`, as the 4k variants"));
    }
    let window = hf.count_or("sliding_window", None)?;
    hf.windows(&mut config, window, |_| true)?;
    config.finish(hf.path())
}

fn phi3_names(config: &Config, name: &str) -> Vec<Piece> {
    if let Some((prefix, part, suffix)) = split_qkv(name) {
        let (q, kv) = (config.q_cols(), config.kv_cols());
        let rows = [0..q, q..q + kv, q + kv..q + 2 * kv][part].clone();
        return Piece::rows(format!("{prefix}qkv_proj.{suffix}"), vec![rows]);
    }
    let width = config.intermediate_size;
    for (ours, rows) in [("mlp.gate_proj.", 0..width), ("mlp.up_proj.", width..2 * width)] {
        if let Some((prefix, suffix)) = name.split_once(ours) {
            return Piece::rows(format!("{prefix}mlp.gate_up_proj.{suffix}"), vec![rows]);
        }
    }
    Piece::whole(name)
}
