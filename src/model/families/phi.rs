//! Phi 1, 1.5, 2 (parallel, biased) and Phi 3, 3.5, 4 (llama-like with fused projections).

use super::{Family, HfConfig, Piece, renamed, split_qkv};
use crate::error::Result;
use crate::model::Config;
use crate::model::config::{Biases, Mlp};
use crate::ops::norm::Kind;
use serde_json::{Value, json};

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
    hf.partial_rope(&mut config, "rope_theta", "partial_rotary_factor", 0.5)?;
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
    let hf = &longrope_by_any_name(hf);
    let mut config = hf.sizes()?;
    config.norm_eps = hf.number("rms_norm_eps", 1e-5)? as f32;
    config.activation = hf.activation("hidden_act", "silu")?;
    config.tie_embeddings = hf.flag("tie_word_embeddings", false)?;
    hf.partial_rope(&mut config, "rope_theta", "partial_rotary_factor", 1.0)?;
    // One for all layers, whatever `layer_types` says.
    config.windows = vec![hf.count_or("sliding_window", None)?; config.n_layer];
    config.finish(hf.path())
}

/// Its longrope was called su and yarn once, and its contexts have defaults.
fn longrope_by_any_name(hf: &HfConfig) -> HfConfig {
    let hf = hf.or(&json!({"max_position_embeddings": 4096, "original_max_position_embeddings": 4096}));
    let mut keys = hf.keys().clone();
    for key in ["rope_scaling", "rope_parameters"] {
        let Some(rope) = keys.get_mut(key).and_then(Value::as_object_mut) else { continue };
        let kind = rope.get("rope_type").or_else(|| rope.get("type"));
        if matches!(kind.and_then(Value::as_str), Some("su" | "yarn")) {
            rope.insert("rope_type".to_owned(), json!("longrope"));
        }
    }
    HfConfig::of(hf.path(), keys)
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
