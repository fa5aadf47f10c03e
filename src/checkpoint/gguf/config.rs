//! The architecture of a GGUF file as the config.json of the model it was made from. What would change the computation
//! in an unknown way is refused with the name of its key.

use super::read::Metadata;
use crate::checkpoint::safe::Shards;
use crate::error::{Error, Result};
use crate::ops::rope::{Scaling, inverse_frequencies};
use serde_json::{Map, Value, json};

/// Architectures that are read, with Hugging Face's class for each.
const ARCHITECTURES: &[(&str, &str)] =
    &[("llama", "LlamaForCausalLM"), ("qwen2", "Qwen2ForCausalLM"), ("qwen3", "Qwen3ForCausalLM")];
/// Settings of other variants of these architectures, which are 0 or absent in what is read.
const OTHERS: &[&str] = &[
    "expert_count",
    "attention.scale",
    "attention.clamp_kqv",
    "attn_logit_softcapping",
    "final_logit_softcapping",
    "logit_scale",
    "embedding_scale",
    "residual_scale",
];
/// Divisors by which Llama 3 stretches its frequencies.
pub const FREQUENCIES: &str = "rope_freqs.weight";
const HINT: &str = "use the Hugging Face folder of this model";

/// The keys of config.json for the file of `metadata` and `shards`.
///
/// # Errors
/// When the architecture is unknown or computes what is not implemented, or a setting is missing or wrong.
pub fn describe(metadata: &Metadata, shards: &Shards) -> Result<Map<String, Value>> {
    let (architecture, class) = architecture(metadata)?;
    let model = Model { metadata, shards, architecture };
    model.refuse_others()?;
    let (rows, width) = model.matrix("token_embd.weight")?;
    let heads = model.positive("attention.head_count", None)?;
    let head_size = model.positive("attention.key_length", Some(width / heads))?;
    model.same_as("embedding_length", width)?;
    model.same_as("attention.value_length", head_size)?;
    model.same_as("rope.dimension_count", head_size)?;
    let has = |name: &str| shards.info(name).is_ok();
    let mut keys = json!({
        "architectures": [class],
        "model_type": architecture,
        "vocab_size": rows,
        "hidden_size": width,
        "intermediate_size": model.positive("feed_forward_length", None)?,
        "num_hidden_layers": model.layers()?,
        "num_attention_heads": heads,
        "num_key_value_heads": model.positive("attention.head_count_kv", Some(heads))?,
        "head_dim": head_size,
        "hidden_act": "silu",
        "max_position_embeddings": model.context()?,
        "rms_norm_eps": model.number("attention.layer_norm_rms_epsilon", None)?,
        "rope_theta": model.number("rope.freq_base", Some(10_000.0))?,
        "rope_scaling": model.scaling(head_size)?,
        "attention_bias": has("blk.0.attn_q.bias"),
        "mlp_bias": has("blk.0.ffn_gate.bias"),
        "tie_word_embeddings": !has("output.weight"),
        "torch_dtype": shards.info("token_embd.weight")?.0.long_name(),
    });
    for (key, id) in [("bos", "bos"), ("eos", "eos"), ("pad", "padding")] {
        if let Some(id) = metadata.count(&format!("tokenizer.ggml.{id}_token_id"))? {
            keys[format!("{key}_token_id")] = json!(id);
        }
    }
    let Value::Object(keys) = keys else { unreachable!("an object is written above") };
    Ok(keys)
}

fn architecture(metadata: &Metadata) -> Result<(&'static str, &'static str)> {
    if let Some(kind) = metadata.text("general.type")?.filter(|kind| *kind != "model") {
        return Err(metadata.unsupported(&format!("`general.type` {kind}"), "a checkpoint is a model"));
    }
    if metadata.count("split.count")?.is_some_and(|files| files > 1) {
        return Err(
            metadata.unsupported("`split.count`: one of several files", "llama-gguf-split --merge makes it one")
        );
    }
    let name = metadata.need("general.architecture", metadata.text("general.architecture")?)?;
    ARCHITECTURES.iter().find(|known| known.0 == name).copied().ok_or_else(|| {
        let known: Vec<&str> = ARCHITECTURES.iter().map(|known| known.0).collect();
        let hint = format!("GGUF files of {} are read (Mistral is llama); {HINT}", known.join(", "));
        metadata.unsupported(&format!("`general.architecture` {name}"), &hint)
    })
}

/// A file, with the architecture that stands before the names of its settings.
struct Model<'a> {
    metadata: &'a Metadata,
    shards: &'a Shards,
    architecture: &'a str,
}

impl Model<'_> {
    fn key(&self, key: &str) -> String {
        format!("{}.{key}", self.architecture)
    }

    fn unsupported(&self, key: &str, value: impl std::fmt::Display) -> Error {
        self.metadata.unsupported(&format!("`{}` {value}", self.key(key)), HINT)
    }

    fn refuse_others(&self) -> Result<()> {
        for key in OTHERS {
            if let Some(value) = self.metadata.number(&self.key(key))?.filter(|value| *value != 0.0) {
                return Err(self.unsupported(key, value));
            }
        }
        Ok(())
    }

    fn positive(&self, key: &str, default: Option<usize>) -> Result<usize> {
        let key = self.key(key);
        let count = self.metadata.need(&key, self.metadata.count(&key)?.or(default))?;
        if count == 0 { Err(self.metadata.invalid(format!("`{key}` is 0"))) } else { Ok(count) }
    }

    fn number(&self, key: &str, default: Option<f64>) -> Result<f64> {
        let key = self.key(key);
        self.metadata.need(&key, self.metadata.number(&key)?.or(default))
    }

    /// Refuses another value of `key`, where it is there, than `want`.
    fn same_as(&self, key: &str, want: usize) -> Result<()> {
        match self.metadata.count(&self.key(key))? {
            Some(count) if count != want => Err(self.unsupported(key, format!("{count} where {want} is usual"))),
            _ => Ok(()),
        }
    }

    /// The number of layers, checked before lists of that length are made.
    fn layers(&self) -> Result<usize> {
        let layers = self.positive("block_count", None)?;
        if layers > 4096 {
            let problem = format!("`{}` is {layers}, which no model has", self.key("block_count"));
            return Err(self.metadata.invalid(problem));
        }
        Ok(layers)
    }

    /// The context length; a window, which llama.cpp does not compute here either, makes no difference within it.
    fn context(&self) -> Result<usize> {
        let context = self.positive("context_length", None)?;
        let window = self.metadata.count(&self.key("attention.sliding_window"))?.filter(|window| *window > 0);
        Ok(window.map_or(context, |window| window.min(context)))
    }

    fn matrix(&self, name: &str) -> Result<(usize, usize)> {
        match self.shards.info(name)?.1 {
            [rows, columns] => Ok((*rows, *columns)),
            shape => {
                Err(self.metadata.invalid(format!("tensor `{name}` has the shape {shape:?}, not that of a matrix")))
            }
        }
    }

    /// `rope_scaling` of config.json.
    fn scaling(&self, head_size: usize) -> Result<Value> {
        let kind = self.metadata.text(&self.key("rope.scaling.type"))?.unwrap_or("none");
        if self.shards.info(FREQUENCIES).is_ok() {
            if kind != "none" {
                return Err(self.unsupported("rope.scaling.type", format!("{kind}, beside tensor `{FREQUENCIES}`")));
            }
            return self.llama3(head_size);
        }
        let factor = || self.number("rope.scaling.factor", None);
        match kind {
            "none" => Ok(Value::Null),
            "linear" => Ok(json!({"rope_type": "linear", "factor": factor()?})),
            "yarn" => self.yarn(factor()?),
            other => Err(self.unsupported("rope.scaling.type", other)),
        }
    }

    fn yarn(&self, factor: f64) -> Result<Value> {
        let original = self.positive("rope.scaling.original_context_length", None)?;
        let mut scaling = json!({"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": original});
        for (theirs, ours) in [("yarn_beta_fast", "beta_fast"), ("yarn_beta_slow", "beta_slow")] {
            if let Some(value) = self.metadata.number(&self.key(&format!("rope.scaling.{theirs}")))? {
                scaling[ours] = json!(value);
            }
        }
        for key in ["rope.scaling.attn_factor", "rope.scaling.yarn_attn_factor"] {
            if let Some(value) = self.metadata.number(&self.key(key))?.filter(|value| *value != 1.0) {
                return Err(self.unsupported(key, value));
            }
        }
        Ok(scaling)
    }

    /// Llama 3's scaling, which stands in the file as the divisors that follow from it. Beside the factor, which the
    /// slowest frequencies have, all of its models have the same numbers.
    fn llama3(&self, head_size: usize) -> Result<Value> {
        let theta = self.number("rope.freq_base", Some(10_000.0))?;
        let divisors = self.shards.get(FREQUENCIES)?.to_f32();
        let factor = f64::from(divisors.iter().copied().fold(0.0f32, f32::max));
        let scaling = Scaling::Llama3 { factor, low_freq_factor: 1.0, high_freq_factor: 4.0, original_context: 8192.0 };
        let frequencies = |scaling| inverse_frequencies(theta, head_size, scaling, 0);
        let want: Vec<f64> = frequencies(&Scaling::None)
            .iter()
            .zip(frequencies(&scaling))
            .map(|(plain, scaled)| plain / scaled)
            .collect();
        let same = |(want, got): (&f64, &f32)| (want - f64::from(*got)).abs() <= 1e-4 * want;
        if divisors.len() != want.len() || !want.iter().zip(&divisors).all(same) {
            let what = format!("tensor `{FREQUENCIES}`: frequencies that are not Llama 3's");
            return Err(self.metadata.unsupported(&what, HINT));
        }
        Ok(json!({"rope_type": "llama3", "factor": factor, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192}))
    }
}
