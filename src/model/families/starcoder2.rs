//! StarCoder 2: Llama's shape with biases, layer norms and a plain MLP.

use super::{Family, HfConfig, Piece, renamed};
use crate::error::Result;
use crate::model::Config;
use crate::model::config::{Biases, Mlp};
use crate::ops::norm::Kind;

/// `Starcoder2ForCausalLM`.
pub const STARCODER2: Family = Family { model_types: &["starcoder2"], config, locate };

fn config(hf: &HfConfig) -> Result<Config> {
    let mut config = hf.sizes()?;
    config.n_query_groups = hf.count_or("num_key_value_heads", 2)?.unwrap_or(2);
    config.norm = Kind::Layer;
    config.norm_eps = hf.number("norm_epsilon", 1e-5)? as f32;
    let bias = hf.flag("use_bias", true)?;
    config.biases = Biases { qkv: bias, projection: bias, mlp: bias, head: false, norm: true };
    config.mlp = Mlp::Plain;
    config.activation = hf.activation("hidden_act", "gelu_pytorch_tanh")?;
    config.tie_embeddings = hf.flag("tie_word_embeddings", true)?;
    hf.rope(&mut config)?;
    config.windows = vec![hf.count_or("sliding_window", None)?; config.n_layer];
    config.finish(hf.path())
}

fn locate(_: &Config, name: &str) -> Vec<Piece> {
    Piece::whole(renamed(name, &[("mlp.up_proj", "mlp.c_fc"), ("mlp.down_proj", "mlp.c_proj")]))
}
