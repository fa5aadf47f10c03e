//! `model_config.yaml`: a [`Config`] written as LitGPT's, and LitGPT's read as the config.json of a family that computes
//! the same. What is read is written again and compared, so that no setting is passed over in silence.

use super::CONFIG;
use crate::error::{Error, Result};
use crate::model::Config;
use crate::model::config::{Mlp, Placement, QkNorm};
use crate::model::families::{HfConfig, by_config};
use crate::ops::glu::Activation;
use crate::ops::norm::Kind;
use crate::ops::rope::Scaling;
use serde_json::{Map, Value, json};
use std::fmt::Write;
use std::path::Path;

/// Reads a YAML file of `key: value` lines.
///
/// # Errors
/// When it is missing or broken.
pub fn read_yaml(path: &Path) -> Result<Map<String, Value>> {
    let hint = "copy the file from where the checkpoint was made";
    let text = std::fs::read_to_string(path).map_err(|error| match error.kind() {
        std::io::ErrorKind::InvalidData => Error::invalid(path, "not a text file", hint),
        _ => Error::io("read", path)(error),
    })?;
    match parse_yaml(&text) {
        Ok(Value::Object(map)) => Ok(map),
        Ok(_) => Err(Error::invalid(path, "no `key: value` lines", hint)),
        Err(problem) => Err(Error::invalid(path, format!("not YAML: {problem}"), hint)),
    }
}

/// The value of a YAML text, or what is wrong with it in the user's words: what the library tells its callers is no use
/// to users.
///
/// # Errors
/// What is wrong, without the file's name.
pub fn parse_yaml(text: &str) -> std::result::Result<Value, String> {
    let in_words = |error: serde_saphyr::Error| {
        let text = error.to_string();
        if text.contains("from_str_multiple") {
            return "more than one document, with `---` between them".to_owned();
        }
        if text.contains("budget breached") {
            return "more keys, lists or aliases than such a file has".to_owned();
        }
        text.replace(", set DuplicateKeyPolicy in Options if acceptable", "")
            .replace(" rejected by the configured policy", " is not allowed")
            .replace('\n', " ")
    };
    let options = serde_saphyr::options! { with_snippet: false };
    serde_saphyr::from_str_with_options(text, options).map_err(in_words)
}

/// The value of `key`, null where it is absent.
#[must_use]
pub fn field<'a>(yaml: &'a Map<String, Value>, key: &str) -> &'a Value {
    yaml.get(key).unwrap_or(&Value::Null)
}

/// What LitGPT assumes for keys that a file leaves out or that only switch something off.
fn defaults() -> Value {
    json!({
        "norm_qk": false, "norm_qk_type": "default", "post_attention_norm": false, "post_mlp_norm": false,
        "parallel_residual": true, "shared_attention_norm": false, "attn_bias": false, "bias": true,
        "rope_base": 10000, "rotary_percentage": 0.25, "rope_condense_ratio": 1, "rope_interleave": false,
        "gelu_approximate": "none", "n_expert": 0, "n_expert_per_token": 0, "routed_scaling_factor": 1.0,
        "scale_embeddings": false, "lm_head_bias": false, "norm_1": true, "norm_2": true, "norm_eps": 1e-5,
        "norm_class_name": "LayerNorm", "mlp_class_name": "GptNeoxMLP",
    })
}

/// Keys that a reader of the numbers does not need.
const SILENT: &[&str] = &[
    "name",
    "hf_config",
    "vocab_size",
    "padded_vocab_size",
    "padding_multiple",
    "norm_topk_prob",
    "moe_intermediate_size",
    "block_size",
];

/// The settings that make a difference, each in one spelling.
fn effective(yaml: &Map<String, Value>) -> Map<String, Value> {
    let mut all = defaults().as_object().cloned().unwrap_or_default();
    all.extend(yaml.iter().filter(|(_, v)| !v.is_null()).map(|(k, v)| (k.clone(), v.clone())));
    all.retain(|key, _| !SILENT.contains(&key.as_str()));
    let on = |all: &Map<String, Value>, key: &str| field(all, key) == true;
    let attention = on(&all, "bias") || on(&all, "attn_bias");
    all.insert("attn_bias".to_owned(), json!(attention));
    let count = |key: &str| field(yaml, key).as_u64();
    if count("n_query_groups").is_none() {
        all.insert("n_query_groups".to_owned(), field(yaml, "n_head").clone());
    }
    if let (Some(n_embd), Some(n_head), None) =
        (count("n_embd"), count("n_head").filter(|n| *n > 0), count("head_size"))
    {
        all.insert("head_size".to_owned(), json!(n_embd / n_head));
    }
    if field(&all, "attention_scores_scalar") == field(&all, "head_size") {
        all.remove("attention_scores_scalar");
    }
    let layers = count("n_layer").unwrap_or(0).min(4096) as usize;
    for (size, indices) in [("sliding_window_size", "sliding_window_indices"), ("rope_local_base_freq", "rope_indices")]
    {
        let mut list = field(yaml, indices).as_array().cloned().unwrap_or_else(|| vec![json!(1); layers]);
        list.truncate(layers);
        all.insert(indices.to_owned(), Value::Array(list));
        if !all.contains_key(size) {
            all.remove(indices);
        }
    }
    let ratio = field(&all, "rope_condense_ratio").as_f64().unwrap_or(1.0);
    if ratio != 1.0 {
        all.insert("rope_adjustments".to_owned(), json!({"factor": ratio}));
    }
    all.remove("rope_condense_ratio");
    if ["LLaMAMLP", "LLaMAMoE"].iter().any(|c| field(&all, "mlp_class_name") == *c) {
        all.remove("gelu_approximate");
    }
    if field(&all, "n_expert") == 0 {
        all.remove("n_expert_per_token");
    } else {
        all.insert("intermediate_size".to_owned(), expert_width(yaml));
    }
    // Only the whole channels of this share turn.
    if let (Some(share), Some(head_size)) =
        (field(&all, "rotary_percentage").as_f64(), field(&all, "head_size").as_u64())
    {
        all.insert("rotary_percentage".to_owned(), json!((share * head_size as f64) as u64));
    }
    all
}

/// Channels inside each expert.
fn expert_width(yaml: &Map<String, Value>) -> Value {
    let own = field(yaml, "moe_intermediate_size");
    if own.is_null() { field(yaml, "intermediate_size").clone() } else { own.clone() }
}

/// Whether two values mean the same number, or are equal.
fn same(a: &Value, b: &Value) -> bool {
    match (a, b) {
        (Value::Object(a), Value::Object(b)) => a.len() == b.len() && a.iter().all(|(k, v)| same(v, field(b, k))),
        (Value::Array(a), Value::Array(b)) => a.len() == b.len() && a.iter().zip(b).all(|(a, b)| same(a, b)),
        _ => match (a.as_f64(), b.as_f64()) {
            (Some(a), Some(b)) => (a - b).abs() <= 1e-6 * a.abs().max(b.abs()),
            _ => a == b,
        },
    }
}

/// The config.json of a LitGPT folder that has none, made from its `model_config.yaml`.
///
/// # Errors
/// When the file is missing or broken, or describes what no family here computes.
pub fn hf_config(dir: &Path) -> Result<HfConfig> {
    let path = dir.join(CONFIG);
    if !path.is_file() {
        let hint = "a LitGPT checkpoint is lit_model.pth with model_config.yaml or config.json beside it".to_owned();
        return Err(Error::Missing { what: "architecture".to_owned(), path, hint });
    }
    let yaml = read_yaml(&path)?;
    let hf = HfConfig::of(&path, translate(&path, &yaml)?);
    let config = (by_config(&hf)?.config)(&hf)?;
    let name = field(&yaml, "name").as_str().unwrap_or_default();
    let (want, got) =
        (effective(&yaml), effective(&describe(&config, name).map_err(|problems| unlike(&path, &problems))?));
    let keys = want.keys().chain(got.keys().filter(|k| !want.contains_key(*k)));
    let differing: Vec<String> = keys
        .filter(|key| !same(field(&want, key), field(&got, key)))
        .map(|key| format!("`{key}`: {}", field(&want, key)))
        .collect();
    if differing.is_empty() { Ok(hf) } else { Err(unlike(&path, &differing)) }
}

fn unlike(path: &Path, problems: &[String]) -> Error {
    let what = format!("{} (`{}`)", problems.join(", "), path.display());
    Error::unsupported(what, "put the model's config.json beside it")
}

/// The keys of a config.json that means the same.
fn translate(path: &Path, yaml: &Map<String, Value>) -> Result<Map<String, Value>> {
    let value = |key: &str| field(yaml, key).clone();
    let on = |key: &str, default: bool| field(yaml, key).as_bool().unwrap_or(default);
    let text = |key: &str, default: &'static str| field(yaml, key).as_str().unwrap_or(default).to_owned();
    let eps = field(yaml, "norm_eps").as_f64().unwrap_or(1e-5);
    let share = field(yaml, "rotary_percentage").as_f64().unwrap_or(0.25);
    let tanh = text("gelu_approximate", "none") == "tanh";
    let model_type = model_type(path, yaml)?;
    let groups = Some(value("n_query_groups")).filter(|groups| !groups.is_null()).unwrap_or_else(|| value("n_head"));
    let mut keys = json!({
        "model_type": model_type, "tie_word_embeddings": false,
        "vocab_size": value("padded_vocab_size"), "hidden_size": value("n_embd"), "num_hidden_layers": value("n_layer"),
        "num_attention_heads": value("n_head"), "num_key_value_heads": groups,
        "head_dim": value("head_size"), "intermediate_size": value("intermediate_size"),
        "max_position_embeddings": value("block_size"), "rope_theta": yaml.get("rope_base").unwrap_or(&json!(10000)),
        "partial_rotary_factor": share, "rotary_percentage": share, "rope_scaling": rope_scaling(yaml),
        "hidden_act": match text("mlp_class_name", "GptNeoxMLP").as_str() {
            "GptNeoxMLP" | "GemmaMLP" if tanh => "gelu_new",
            "GptNeoxMLP" | "GemmaMLP" => "gelu",
            _ => "silu",
        },
    });
    let own = match model_type {
        "gpt_neox" => json!({
            "layer_norm_eps": eps, "rotary_pct": share, "rotary_emb_base": yaml.get("rope_base").unwrap_or(&json!(10000)),
            "use_parallel_residual": on("parallel_residual", true), "attention_bias": true,
        }),
        "falcon" => json!({
            "layer_norm_epsilon": eps, "bias": false, "alibi": false, "parallel_attn": on("parallel_residual", true),
            "new_decoder_architecture": !on("shared_attention_norm", false), "num_kv_heads": groups,
            "multi_query": groups == 1, "ffn_hidden_size": value("intermediate_size"),
            "activation": "gelu",
        }),
        "phi" | "stablelm" => json!({
            "layer_norm_eps": eps, "use_qkv_bias": on("attn_bias", false),
            "use_parallel_residual": on("parallel_residual", true),
        }),
        "mistral" => json!({ "rms_norm_eps": eps, "sliding_window": value("sliding_window_size") }),
        "llama" => json!({ "rms_norm_eps": eps, "attention_bias": on("bias", true), "mlp_bias": on("bias", true) }),
        "gemma" | "gemma2" | "gemma3_text" => gemma_keys(yaml, eps, tanh),
        // Its experts' shares always sum to 1.
        "mixtral" | "qwen3_moe" => json!({
            "rms_norm_eps": eps, "num_experts": value("n_expert"), "num_experts_per_tok": value("n_expert_per_token"),
            "moe_intermediate_size": expert_width(yaml), "intermediate_size": expert_width(yaml), "norm_topk_prob": true,
        }),
        _ => json!({ "rms_norm_eps": eps, "use_sliding_window": false }),
    };
    if let (Some(keys), Value::Object(own)) = (keys.as_object_mut(), own) {
        keys.extend(own);
        keys.retain(|_, v| !v.is_null());
        if model_type == "mistral" {
            keys.entry("sliding_window").or_insert(Value::Null);
        }
    }
    Ok(keys.as_object().cloned().unwrap_or_default())
}

fn gemma_keys(yaml: &Map<String, Value>, eps: f64, tanh: bool) -> Value {
    let value = |key: &str| field(yaml, key).clone();
    let kinds = field(yaml, "sliding_window_indices").as_array().map(|list| {
        list.iter().map(|i| if *i == 1 { "sliding_attention" } else { "full_attention" }).collect::<Vec<_>>()
    });
    let scalar = field(yaml, "attention_scores_scalar");
    let mut keys = json!({
        "rms_norm_eps": eps, "hidden_activation": if tanh { "gelu_pytorch_tanh" } else { "gelu" },
        "attn_logit_softcapping": value("attention_logit_softcapping"),
        "final_logit_softcapping": value("final_logit_softcapping"), "sliding_window": value("sliding_window_size"),
        "layer_types": kinds, "query_pre_attn_scalar": if scalar.is_null() { value("head_size") } else { scalar.clone() },
        "rope_local_base_freq": value("rope_local_base_freq"),
    });
    if let Some(map) = keys.as_object_mut() {
        map.retain(|_, v| !v.is_null());
    }
    keys
}

/// The family that computes what a file describes.
fn model_type(path: &Path, yaml: &Map<String, Value>) -> Result<&'static str> {
    let on = |key: &str, default: bool| field(yaml, key).as_bool().unwrap_or(default);
    let text = |key: &str, default: &'static str| field(yaml, key).as_str().unwrap_or(default).to_owned();
    let (mlp, norm) = (text("mlp_class_name", "GptNeoxMLP"), text("norm_class_name", "LayerNorm"));
    let olmo = text("name", "").contains("OLMo");
    Ok(match (mlp.as_str(), norm.as_str()) {
        ("GptNeoxMLP", "LayerNorm") if on("lm_head_bias", false) => "phi",
        ("GptNeoxMLP", "LayerNorm") if on("bias", true) => "gpt_neox",
        ("GptNeoxMLP", "LayerNorm") => "falcon",
        ("LLaMAMLP", "LayerNorm") if olmo => "olmo",
        ("LLaMAMLP", "LayerNorm") => "stablelm",
        ("LLaMAMLP", "RMSNorm") if text("norm_qk_type", "default") == "olmo2" => "olmo2",
        ("LLaMAMLP", "RMSNorm") if on("norm_qk", false) => "qwen3",
        ("LLaMAMLP", "RMSNorm") if on("attn_bias", false) && !on("bias", true) => "qwen2",
        ("LLaMAMLP", "RMSNorm") if !field(yaml, "sliding_window_size").is_null() => "mistral",
        ("LLaMAMLP", "RMSNorm") => "llama",
        ("GemmaMLP", "RMSNorm") if on("norm_qk", false) => "gemma3_text",
        ("GemmaMLP", "RMSNorm") if on("post_mlp_norm", false) => "gemma2",
        ("GemmaMLP", "RMSNorm") => "gemma",
        ("LLaMAMoE", "RMSNorm") if on("norm_qk", false) => "qwen3_moe",
        ("LLaMAMoE", "RMSNorm") => "mixtral",
        _ => {
            let what = format!("`mlp_class_name`: {mlp} with `norm_class_name`: {norm} (`{}`)", path.display());
            return Err(Error::unsupported(what, "choose another checkpoint"));
        }
    })
}

fn rope_scaling(yaml: &Map<String, Value>) -> Value {
    let ratio = field(yaml, "rope_condense_ratio").as_f64().unwrap_or(1.0);
    let given = |key: &str| field(yaml, "rope_adjustments").get(key).cloned();
    match (given("factor"), given("low_freq_factor"), given("high_freq_factor"), given("original_max_seq_len")) {
        (Some(factor), Some(low), Some(high), Some(original)) => json!({
            "rope_type": "llama3", "factor": factor, "low_freq_factor": low, "high_freq_factor": high,
            "original_max_position_embeddings": original,
        }),
        (Some(factor), None, None, _) => json!({"rope_type": "linear", "factor": factor}),
        _ if ratio != 1.0 => json!({"rope_type": "linear", "factor": ratio}),
        _ => Value::Null,
    }
}

/// A number as YAML and JSON write it: whole ones without a point.
fn number(value: f64) -> Value {
    if value.fract() == 0.0 && value.abs() < 1e15 { json!(value as i64) } else { json!(value) }
}

/// An f32 as the decimal that it was written as.
fn short(value: f32) -> Value {
    number(value.to_string().parse().unwrap_or(f64::from(value)))
}

/// The `model_config.yaml` of an architecture, for a model that LitGPT calls `name`.
///
/// # Errors
/// All settings that LitGPT has no words for.
pub fn describe(config: &Config, name: &str) -> std::result::Result<Map<String, Value>, Vec<String>> {
    let mut problems = Vec::new();
    let mut refuse = |bad: bool, what: &str| {
        if bad {
            problems.push(format!("{what}, which LitGPT cannot express"));
        }
    };
    let biases = config.biases;
    let rms = config.norm == Kind::Rms;
    refuse(biases.projection != biases.mlp, "biases on the attention's projection or the MLP alone");
    refuse(biases.mlp && !biases.qkv, "biases everywhere but on q, k, v");
    refuse(rms == biases.norm && config.norm_weight, "norms with other biases than usual");
    refuse(config.norm_weight == (!rms && name.contains("OLMo")), "norm weights with this name (OLMo has none)");
    refuse(
        rms && config.norm_unit_offset != name.contains("Gemma"),
        "unit offset norms with this name (Gemma has them)",
    );
    refuse(config.qk_norm == QkNorm::HeadLayer, "layer norms of single heads");
    refuse(config.no_rope.iter().any(|no| *no), "layers without rotary embedding");
    refuse(config.logit_scale != 1.0, "scaled logits");
    refuse(config.residual_scale != 1.0, "scaled residuals");
    let root = (config.n_embd as f32).sqrt();
    let scaled = (config.embedding_scale - root).abs() < 1e-3 * root;
    refuse(!scaled && config.embedding_scale != 1.0, "another embedding scale than the root of the width");
    let sizes: Vec<usize> = config.windows.iter().flatten().copied().collect();
    refuse(sizes.iter().any(|s| *s != sizes[0]), "windows of several sizes");
    let mlp = match (config.mlp, config.activation) {
        (Mlp::Plain, Activation::Gelu | Activation::GeluTanh) => "GptNeoxMLP",
        (Mlp::Gated, Activation::Silu) => "LLaMAMLP",
        (Mlp::Gated, Activation::Gelu | Activation::GeluTanh) => "GemmaMLP",
        (Mlp::Experts { norm_topk: true, .. }, Activation::Silu) => "LLaMAMoE",
        _ => {
            refuse(true, "this MLP");
            ""
        }
    };
    let mut out = attention(config, &sizes, &mut refuse);
    let experts = if let Mlp::Experts { n_expert, n_expert_per_token, .. } = config.mlp {
        (n_expert, n_expert_per_token)
    } else {
        (0, 0)
    };
    let rest = json!({
        "name": name, "block_size": config.block_size, "n_layer": config.n_layer, "n_embd": config.n_embd,
        "vocab_size": config.vocab_size, "padded_vocab_size": config.vocab_size,
        "norm_class_name": if rms { "RMSNorm" } else { "LayerNorm" }, "norm_eps": short(config.norm_eps),
        "norm_1": config.placement != Placement::Post, "norm_2": config.placement != Placement::Post,
        "post_attention_norm": config.placement != Placement::Pre, "post_mlp_norm": config.placement != Placement::Pre,
        "parallel_residual": config.parallel_residual, "shared_attention_norm": config.shared_norm,
        "bias": biases.mlp, "attn_bias": biases.qkv && !biases.mlp, "lm_head_bias": biases.head,
        "mlp_class_name": mlp, "intermediate_size": config.intermediate_size,
        "gelu_approximate": if config.activation == Activation::GeluTanh { "tanh" } else { "none" },
        "n_expert": experts.0, "n_expert_per_token": experts.1, "scale_embeddings": scaled && config.embedding_scale != 1.0,
        "final_logit_softcapping": config.final_softcap.map(short),
    });
    if experts.0 > 0 {
        out.insert("moe_intermediate_size".to_owned(), json!(config.intermediate_size));
    }
    out.extend(rest.as_object().cloned().unwrap_or_default());
    if problems.is_empty() { Ok(out) } else { Err(problems) }
}

/// The keys of attention and rotary embedding.
fn attention(config: &Config, sizes: &[usize], refuse: &mut dyn FnMut(bool, &str)) -> Map<String, Value> {
    let scalar = (1.0 / f64::from(config.attention_scale).powi(2)).round();
    let exact =
        (1.0 / scalar.sqrt() - f64::from(config.attention_scale)).abs() < 1e-6 * f64::from(config.attention_scale);
    refuse(!exact, "an attention scale that is no root");
    let local = config.rope_local_theta;
    let mut ratio = json!(1);
    let adjustments = match config.rope_scaling {
        Scaling::None => Value::Null,
        Scaling::Linear { factor } if factor.fract() == 0.0 && local.is_none() => {
            ratio = number(factor);
            Value::Null
        }
        Scaling::Linear { factor } => json!({"factor": factor}),
        Scaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_context } => json!({
            "factor": factor, "low_freq_factor": low_freq_factor, "high_freq_factor": high_freq_factor,
            "original_max_seq_len": number(original_context),
        }),
        Scaling::Yarn { .. } | Scaling::Long { .. } => {
            refuse(true, "yarn or longrope scaling");
            Value::Null
        }
    };
    // LitGPT rounds the product down.
    let mut share = config.rotary_dim as f64 / config.head_size as f64;
    if (share * config.head_size as f64) < config.rotary_dim as f64 {
        share = share.next_up();
    }
    let windows: Vec<u8> = config.windows.iter().map(|w| u8::from(w.is_some())).collect();
    let attention = json!({
        "n_head": config.n_head, "head_size": config.head_size, "n_query_groups": config.n_query_groups,
        "norm_qk": config.qk_norm != QkNorm::None,
        "norm_qk_type": if config.qk_norm == QkNorm::Full { "olmo2" } else { "default" },
        "attention_scores_scalar": if scalar == config.head_size as f64 { Value::Null } else { number(scalar) },
        "attention_logit_softcapping": config.attention_softcap.map(short),
        "sliding_window_size": sizes.first(), "sliding_window_indices": sizes.first().map(|_| &windows),
        "rotary_percentage": share, "rope_base": number(config.rope_theta), "rope_condense_ratio": ratio,
        "rope_adjustments": adjustments, "rope_local_base_freq": local.map(number),
        "rope_indices": local.map(|_| &windows),
    });
    attention.as_object().cloned().unwrap_or_default()
}

/// `map` as YAML that PyYAML reads to the same values: it takes a float without a point for text.
#[must_use]
pub fn to_yaml(map: &Map<String, Value>) -> String {
    fn scalar(value: &Value) -> String {
        match value {
            Value::Number(n) if n.is_f64() => {
                let text = n.as_f64().unwrap_or_default().to_string();
                if text.contains('.') { text } else { format!("{text}.0") }
            }
            Value::Array(list) => format!("[{}]", list.iter().map(scalar).collect::<Vec<_>>().join(", ")),
            other => other.to_string(),
        }
    }
    let mut keys: Vec<(&String, &Value)> = map.iter().collect();
    keys.sort_unstable_by_key(|(key, _)| *key);
    keys.iter().fold(String::new(), |mut out, (key, value)| {
        // Writing to a `String` cannot fail.
        let _ = match value {
            Value::Object(inner) => {
                let lines = to_yaml(inner).lines().map(|l| format!("  {l}\n")).collect::<String>();
                write!(out, "{key}:\n{lines}")
            }
            value => writeln!(out, "{key}: {}", scalar(value)),
        };
        out
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn yaml_is_what_pyyaml_reads() {
        let map = json!({"b": 1e-5, "a": {"factor": 8.0}, "c": [1, 0], "d": null, "e": "x", "f": 3});
        let want = "a:\n  factor: 8.0\nb: 0.00001\nc: [1, 0]\nd: null\ne: \"x\"\nf: 3\n";
        assert_eq!(to_yaml(map.as_object().unwrap()), want);
    }

    /// Mixtures and odd shares of rotated channels are known by `model_config.yaml` alone.
    #[test]
    fn what_differs_in_words_alone_is_the_same() {
        let dir = tempfile::tempdir().unwrap();
        let read = |yaml: &str| {
            std::fs::write(dir.path().join(CONFIG), yaml).unwrap();
            let hf = hf_config(dir.path())?;
            (by_config(&hf)?.config)(&hf)
        };
        let sizes = "n_layer: 2\nn_embd: 64\nn_head: 4\nhead_size: 16\nblock_size: 64\npadded_vocab_size: 100\n";
        let llama = "bias: false\nparallel_residual: false\nnorm_class_name: RMSNorm\n";
        let moe = "mlp_class_name: LLaMAMoE\nintermediate_size: 96\nn_expert: 5\nn_expert_per_token: 3\n";
        let whole = "rotary_percentage: 1.0\n";
        let experts = Mlp::Experts { n_expert: 5, n_expert_per_token: 3, norm_topk: true };
        for (more, width) in [("", 96), ("norm_qk: true\nmoe_intermediate_size: 40\n", 40)] {
            let config = read(&format!("{sizes}{llama}{moe}{whole}{more}")).unwrap();
            assert_eq!((config.mlp, config.intermediate_size), (experts, width));
        }
        let mlp = "mlp_class_name: LLaMAMLP\nintermediate_size: 96\n";
        assert_eq!(read(&format!("{sizes}{llama}{mlp}rotary_percentage: 0.4\n")).unwrap().rotary_dim, 6);
        assert!(read(&format!("{sizes}{llama}{moe}{whole}n_shared_expert: 1\n")).is_err());
    }

    #[test]
    fn what_litgpt_cannot_express_is_listed() {
        let mut config = Config::llama(10, 1, 8, 2, 16);
        config.attention_scale = 0.5;
        assert!(describe(&config, "x").is_ok());
        (config.logit_scale, config.residual_scale) = (0.5, 0.5);
        assert_eq!(describe(&config, "x").unwrap_err().len(), 2);
        config = Config::llama(10, 1, 8, 2, 16);
        config.attention_scale = 0.5;
        config.norm_unit_offset = true;
        assert!(describe(&config, "x").is_err() && describe(&config, "Gemma-x").is_ok());
    }
}
