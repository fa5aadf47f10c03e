//! GPT-NeoX: Pythia, StableLM base alpha, RedPajama-INCITE, Dolly v2. Files fuse q, k and v head by head.

use super::{Family, HfConfig, Piece, renamed, split_qkv};
use crate::error::Result;
use crate::model::Config;
use crate::model::config::{Biases, Mlp};
use crate::ops::norm::Kind;

/// `GPTNeoXForCausalLM`.
pub const GPT_NEOX: Family = Family { model_types: &["gpt_neox"], config, locate };

fn config(hf: &HfConfig) -> Result<Config> {
    let mut config = hf.sizes()?;
    config.norm = Kind::Layer;
    config.norm_eps = hf.number("layer_norm_eps", 1e-5)? as f32;
    config.parallel_residual = hf.flag("use_parallel_residual", true)?;
    let attention = hf.flag("attention_bias", true)?;
    config.biases = Biases { qkv: attention, projection: attention, mlp: true, head: false, norm: true };
    config.mlp = Mlp::Plain;
    config.activation = hf.activation("hidden_act", "gelu")?;
    config.tie_embeddings = hf.flag("tie_word_embeddings", false)?;
    hf.partial_rope(&mut config, "rotary_emb_base", "rotary_pct", 0.25)?;
    let width = config.rotary_dim;
    if !width.is_multiple_of(2) {
        // An odd width w has (w + 1) / 2 frequencies θ^(-2i / w), which are those of w + 1 by a larger base.
        config.rotary_dim = width + 1;
        config.rope_theta = config.rope_theta.powf((width + 1) as f64 / width as f64);
    }
    config.finish(hf.path())
}

fn locate(config: &Config, name: &str) -> Vec<Piece> {
    if let Some((prefix, part, suffix)) = split_qkv(name) {
        let file = format!(
            "{}query_key_value.{suffix}",
            prefix.replace("model.layers", "gpt_neox.layers").replace("self_attn", "attention")
        );
        return Piece::rows(file, interleaved_rows(config.n_head, config.head_size, part));
    }
    let name = renamed(
        name,
        &[
            ("self_attn.o_proj", "attention.dense"),
            ("mlp.up_proj", "mlp.dense_h_to_4h"),
            ("mlp.down_proj", "mlp.dense_4h_to_h"),
        ],
    );
    let heads = [
        ("lm_head", "embed_out"),
        ("model.embed_tokens", "gpt_neox.embed_in"),
        ("model.norm", "gpt_neox.final_layer_norm"),
        ("model.layers", "gpt_neox.layers"),
    ];
    Piece::whole(renamed(&name, &heads))
}

/// Rows of q (0), k (1) or v (2) where each head's three stand together.
pub(super) fn interleaved_rows(n_head: usize, head_size: usize, part: usize) -> Vec<std::ops::Range<usize>> {
    (0..n_head).map(|head| (3 * head + part) * head_size..(3 * head + part + 1) * head_size).collect()
}
