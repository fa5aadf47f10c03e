//! LitGPT's folders: what its tensors are called (here), `model_config.yaml` (`config`), adapters (`adapter`).
//!
//! LitGPT has one set of names for every architecture, so this table stands beside those of the families: it follows
//! from the [`Config`]. Since December 2024 (0.5.5) q, k and v stand below one another in `attn.qkv`; before, each
//! group of query heads was followed by its key and value head, in `attn.attn`.

pub mod adapter;
pub mod config;

use crate::model::Config;
use crate::model::config::{Mlp, Placement};
use crate::model::families::Piece;
use std::ops::Range;

/// The weights of a folder.
pub const WEIGHTS: &str = "lit_model.pth";
/// The adapters of a folder.
pub const ADAPTER: &str = "lit_model.pth.lora";
/// The architecture of a folder.
pub const CONFIG: &str = "model_config.yaml";

/// How q, k and v stand in their common matrix.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Qkv {
    /// All of q, all of k, all of v, in `attn.qkv`.
    Below,
    /// By group: its q heads, its k, its v, in `attn.attn`.
    Interleaved,
}

/// Where our tensor `name` stands in LitGPT's file.
#[must_use]
pub fn locate(config: &Config, qkv: Qkv, name: &str) -> Vec<Piece> {
    let Some((layer, rest)) = name.strip_prefix("model.layers.").and_then(|n| n.split_once('.')) else {
        let renames = [("model.embed_tokens.", "transformer.wte."), ("model.norm.", "transformer.ln_f.")];
        let renamed = renames.iter().find_map(|(ours, theirs)| Some(format!("{theirs}{}", name.strip_prefix(ours)?)));
        return Piece::whole(renamed.unwrap_or_else(|| name.to_owned()));
    };
    let layer = format!("transformer.h.{layer}");
    for (part, ours) in ["self_attn.q_proj.", "self_attn.k_proj.", "self_attn.v_proj."].iter().enumerate() {
        if let Some(suffix) = rest.strip_prefix(ours) {
            return match qkv {
                Qkv::Below => Piece::rows(format!("{layer}.attn.qkv.{suffix}"), vec![rows_below(config, part)]),
                Qkv::Interleaved => Piece::rows(format!("{layer}.attn.attn.{suffix}"), rows_interleaved(config, part)),
            };
        }
    }
    Piece::whole(format!("{layer}.{}", inner(config, rest)))
}

/// The name of a tensor within its block.
fn inner(config: &Config, rest: &str) -> String {
    let norms: &[(&str, &str)] = match config.placement {
        Placement::Pre => &[("input_layernorm.", "norm_1."), ("post_attention_layernorm.", "norm_2.")],
        Placement::Post | Placement::Both => &[
            ("input_layernorm.", "norm_1."),
            ("post_attention_layernorm.", "post_attention_norm."),
            ("pre_feedforward_layernorm.", "norm_2."),
            ("post_feedforward_layernorm.", "post_mlp_norm."),
        ],
    };
    let up = if config.mlp == Mlp::Plain { "fc." } else { "fc_2." };
    let others = [
        ("self_attn.o_proj.", "attn.proj."),
        ("self_attn.q_norm.", "attn.norm_q."),
        ("self_attn.k_norm.", "attn.norm_k."),
        ("gate_proj.", "fc_1."),
        ("up_proj.", up),
        ("down_proj.", "proj."),
    ];
    let renames = norms.iter().chain(&others);
    let found = renames.into_iter().find(|(ours, _)| rest.contains(ours));
    found.map_or_else(|| rest.to_owned(), |(ours, theirs)| rest.replacen(ours, theirs, 1))
}

fn rows_below(config: &Config, part: usize) -> Range<usize> {
    let (q, kv) = (config.q_cols(), config.kv_cols());
    [0..q, q..q + kv, q + kv..q + 2 * kv][part].clone()
}

fn rows_interleaved(config: &Config, part: usize) -> Vec<Range<usize>> {
    let queries = config.n_head / config.n_query_groups;
    let (from, to) = [(0, queries), (queries, queries + 1), (queries + 1, queries + 2)][part];
    let row = |group: usize, head: usize| (group * (queries + 2) + head) * config.head_size;
    (0..config.n_query_groups).map(|group| row(group, from)..row(group, to)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_litgpts() {
        let mut config = Config::llama(10, 2, 8, 4, 16);
        config.n_query_groups = 2;
        let name = |config: &Config, ours: &str| locate(config, Qkv::Below, ours).swap_remove(0).tensor;
        for (ours, theirs) in [
            ("model.embed_tokens.weight", "transformer.wte.weight"),
            ("model.norm.weight", "transformer.ln_f.weight"),
            ("lm_head.weight", "lm_head.weight"),
            ("model.layers.1.post_attention_layernorm.weight", "transformer.h.1.norm_2.weight"),
            ("model.layers.1.self_attn.o_proj.bias", "transformer.h.1.attn.proj.bias"),
            ("model.layers.0.mlp.gate_proj.weight", "transformer.h.0.mlp.fc_1.weight"),
            ("model.layers.0.mlp.experts.3.down_proj.weight", "transformer.h.0.mlp.experts.3.proj.weight"),
            ("model.layers.0.mlp.gate.weight", "transformer.h.0.mlp.gate.weight"),
        ] {
            assert_eq!(name(&config, ours), theirs);
        }
        config.mlp = Mlp::Plain;
        assert_eq!(name(&config, "model.layers.0.mlp.up_proj.bias"), "transformer.h.0.mlp.fc.bias");
        config.placement = Placement::Both;
        let norm = "model.layers.0.post_attention_layernorm.weight";
        assert_eq!(name(&config, norm), "transformer.h.0.post_attention_norm.weight");
    }

    #[test]
    fn interleaved_rows_are_a_permutation_by_group() {
        let mut config = Config::llama(10, 1, 8, 4, 16);
        config.n_query_groups = 2;
        // Heads of two rows: q q k v, q q k v.
        assert_eq!(rows_interleaved(&config, 0), [0..4, 8..12]);
        assert_eq!(rows_interleaved(&config, 1), [4..6, 12..14]);
        assert_eq!(rows_interleaved(&config, 2), [6..8, 14..16]);
        assert_eq!(rows_below(&config, 2), 12..16);
    }
}
