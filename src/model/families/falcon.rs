//! Falcon 7B, 40B and 180B styles. Files fuse q, k and v by group of query heads.

use super::pythia::interleaved_rows;
use super::{Family, HfConfig, Piece, renamed, split_qkv};
use crate::error::Result;
use crate::model::Config;
use crate::model::config::{Biases, Mlp};
use crate::ops::norm::Kind;
use serde_json::json;

/// `FalconForCausalLM`.
pub const FALCON: Family = Family { model_types: &["falcon"], config, locate };

fn config(hf: &HfConfig) -> Result<Config> {
    hf.refuse_unless("alibi", &json!(false))?;
    hf.refuse_unless("apply_residual_connection_post_layernorm", &json!(false))?;
    let mut config = hf.sizes()?;
    let new = hf.flag("new_decoder_architecture", false)?;
    let multi_query = hf.flag("multi_query", true)?;
    config.n_query_groups = match (new, multi_query) {
        (true, _) => hf.count_or("num_kv_heads", config.n_head)?.unwrap_or(config.n_head),
        (false, true) => 1,
        (false, false) => config.n_head,
    };
    config.intermediate_size = hf.count_or("ffn_hidden_size", 4 * config.n_embd)?.unwrap_or(4 * config.n_embd);
    config.norm = Kind::Layer;
    config.norm_eps = hf.number("layer_norm_epsilon", 1e-5)? as f32;
    config.parallel_residual = new || hf.flag("parallel_attn", true)?;
    let norms = hf.count_or("num_ln_in_parallel_attn", if new { 2 } else { 1 })?;
    config.shared_norm = config.parallel_residual && norms == Some(1);
    let bias = hf.flag("bias", false)?;
    config.biases = Biases { qkv: bias, projection: bias, mlp: bias, head: false, norm: true };
    config.mlp = Mlp::Plain;
    config.activation = hf.activation("activation", "gelu")?;
    config.tie_embeddings = hf.flag("tie_word_embeddings", true)?;
    hf.rope(&mut config)?;
    config.finish(hf.path())
}

fn locate(config: &Config, name: &str) -> Vec<Piece> {
    if let Some((prefix, part, suffix)) = split_qkv(name) {
        let prefix = prefix.replace("model.layers", "transformer.h").replace("self_attn", "self_attention");
        return Piece::rows(format!("{prefix}query_key_value.{suffix}"), qkv_rows(config, part));
    }
    let two_norms = config.parallel_residual && !config.shared_norm;
    let renames: &[(&str, &str)] =
        if two_norms { &[("input_layernorm", "ln_attn"), ("post_attention_layernorm", "ln_mlp")] } else { &[] };
    let name = renamed(name, renames);
    let inner = [
        ("self_attn.o_proj", "self_attention.dense"),
        ("mlp.up_proj", "mlp.dense_h_to_4h"),
        ("mlp.down_proj", "mlp.dense_4h_to_h"),
    ];
    let outer = [
        ("model.embed_tokens", "transformer.word_embeddings"),
        ("model.norm", "transformer.ln_f"),
        ("model.layers", "transformer.h"),
    ];
    Piece::whole(renamed(&renamed(&name, &inner), &outer))
}

/// Each group holds its query heads, then its key head, then its value head.
fn qkv_rows(config: &Config, part: usize) -> Vec<std::ops::Range<usize>> {
    let (groups, hs) = (config.n_query_groups, config.head_size);
    let queries = config.n_head / groups;
    if queries == 1 {
        return interleaved_rows(config.n_head, hs, part);
    }
    let (from, to) = [(0, queries), (queries, queries + 1), (queries + 1, queries + 2)][part];
    (0..groups).map(|g| (g * (queries + 2) + from) * hs..(g * (queries + 2) + to) * hs).collect()
}
