//! The registry of model families: which config.json means which [`Config`], and what its tensors are called.
//!
//! Adding a family is one file and one line in [`FAMILIES`]. A family names its tensors by saying where each tensor of
//! our model, which has the names of Hugging Face's Llama, stands in its files.

mod falcon;
mod gemma;
mod granite;
mod hf;
mod llama;
pub mod multimodal;
mod olmo;
mod phi;
mod pythia;
mod qwen;
mod stablelm;
mod starcoder2;

pub use hf::HfConfig;

use super::config::{Config, Mlp, Placement, QkNorm};
use crate::error::{Error, Result};
use std::ops::Range;

/// A model family.
pub struct Family {
    /// Values of `model_type` in config.json.
    pub model_types: &'static [&'static str],
    /// Reads config.json.
    pub config: fn(&HfConfig) -> Result<Config>,
    /// Where a tensor of ours stands in the family's files.
    pub locate: fn(&Config, &str) -> Vec<Piece>,
}

impl std::fmt::Debug for Family {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Family({})", self.model_types[0])
    }
}

/// All families.
pub const FAMILIES: &[Family] = &[
    llama::LLAMA,
    llama::MISTRAL,
    llama::MIXTRAL,
    llama::SMOLLM3,
    qwen::QWEN2,
    qwen::QWEN3,
    qwen::QWEN3_MOE,
    pythia::GPT_NEOX,
    stablelm::STABLELM,
    falcon::FALCON,
    phi::PHI,
    phi::PHI3,
    gemma::GEMMA,
    gemma::GEMMA2,
    gemma::GEMMA3,
    olmo::OLMO,
    olmo::OLMO2,
    olmo::OLMO3,
    granite::GRANITE,
    starcoder2::STARCODER2,
];

/// Rows of a tensor in a file that are, in this order, a tensor of ours or a part of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Piece {
    /// The tensor's name in the file.
    pub tensor: String,
    /// Its rows; `None` for all.
    pub rows: Option<Vec<Range<usize>>>,
}

impl Piece {
    /// All rows of `tensor`.
    #[must_use]
    pub fn whole(tensor: impl Into<String>) -> Vec<Self> {
        vec![Self { tensor: tensor.into(), rows: None }]
    }

    /// Some rows of `tensor`.
    #[must_use]
    pub fn rows(tensor: impl Into<String>, rows: Vec<Range<usize>>) -> Vec<Self> {
        vec![Self { tensor: tensor.into(), rows: Some(rows) }]
    }
}

/// A tensor of our model.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Slot {
    /// Its name, as Hugging Face's Llama has it.
    pub name: String,
    /// Rows; 1 for a vector.
    pub rows: usize,
    /// Columns; the length of a vector.
    pub cols: usize,
    /// Whether it is a vector in files.
    pub vector: bool,
}

/// Whether a tensor of ours is the matrix of a block's projection.
#[must_use]
pub fn is_projection(name: &str) -> bool {
    name.ends_with("_proj.weight")
}

/// The family of a config.json.
///
/// # Errors
/// When its `model_type` is missing or unknown.
pub fn by_config(config: &HfConfig) -> Result<&'static Family> {
    let model_type = config.model_type()?;
    FAMILIES.iter().find(|f| f.model_types.contains(&model_type)).ok_or_else(|| {
        let known = FAMILIES.iter().flat_map(|f| f.model_types).copied();
        let known: Vec<&str> = known.chain(multimodal::model_types()).collect();
        Error::Unsupported {
            what: format!("model_type `{model_type}` (`{}`)", config.path().display()),
            hint: format!("use a model of one of these types: {}", known.join(", ")),
        }
    })
}

/// All tensors of the model that `config` describes.
#[must_use]
pub fn slots(config: &Config) -> Vec<Slot> {
    let mut slots = Slots(Vec::new());
    slots.matrix("model.embed_tokens", config.vocab_size, config.n_embd, false);
    let norm_bias = config.biases.norm;
    for layer in 0..config.n_layer {
        let layer = format!("model.layers.{layer}");
        for norm in norm_names(config) {
            slots.norm(config, &format!("{layer}.{norm}"), config.n_embd, norm_bias);
        }
        let (q, kv) = (config.q_cols(), config.kv_cols());
        for (name, rows) in [("q_proj", q), ("k_proj", kv), ("v_proj", kv)] {
            slots.matrix(&format!("{layer}.self_attn.{name}"), rows, config.n_embd, config.biases.qkv);
        }
        slots.matrix(&format!("{layer}.self_attn.o_proj"), config.n_embd, q, config.biases.projection);
        let qk = match config.qk_norm {
            QkNorm::None => None,
            QkNorm::Head => Some((config.head_size, config.head_size)),
            QkNorm::HeadLayer | QkNorm::Full => Some((q, kv)),
        };
        if let Some((q, k)) = qk {
            slots.norm(config, &format!("{layer}.self_attn.q_norm"), q, false);
            slots.norm(config, &format!("{layer}.self_attn.k_norm"), k, false);
        }
        slots.mlp(config, &format!("{layer}.mlp"));
    }
    slots.norm(config, "model.norm", config.n_embd, norm_bias);
    if !config.tie_embeddings {
        slots.matrix("lm_head", config.vocab_size, config.n_embd, config.biases.head);
    } else if config.biases.head {
        slots.vector("lm_head.bias", config.vocab_size);
    }
    slots.0
}

/// Names of the block's norms, by where they stand.
fn norm_names(config: &Config) -> &'static [&'static str] {
    match config.placement {
        Placement::Pre if config.shared_norm => &["input_layernorm"],
        Placement::Pre => &["input_layernorm", "post_attention_layernorm"],
        Placement::Post => &["post_attention_layernorm", "post_feedforward_layernorm"],
        Placement::Both => {
            &["input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm"]
        }
    }
}

struct Slots(Vec<Slot>);

impl Slots {
    fn matrix(&mut self, name: &str, rows: usize, cols: usize, bias: bool) {
        self.0.push(Slot { name: format!("{name}.weight"), rows, cols, vector: false });
        if bias {
            self.vector(&format!("{name}.bias"), rows);
        }
    }

    fn vector(&mut self, name: &str, len: usize) {
        self.0.push(Slot { name: name.to_owned(), rows: 1, cols: len, vector: true });
    }

    fn mlp(&mut self, config: &Config, prefix: &str) {
        let Mlp::Experts { n_expert, .. } = config.mlp else { return self.dense(config, prefix) };
        self.matrix(&format!("{prefix}.gate"), n_expert, config.n_embd, false);
        (0..n_expert).for_each(|n| self.dense(config, &format!("{prefix}.experts.{n}")));
    }

    fn dense(&mut self, config: &Config, prefix: &str) {
        let (width, bias) = (config.intermediate_size, config.biases.mlp);
        if config.mlp != Mlp::Plain {
            self.matrix(&format!("{prefix}.gate_proj"), width, config.n_embd, bias);
        }
        self.matrix(&format!("{prefix}.up_proj"), width, config.n_embd, bias);
        self.matrix(&format!("{prefix}.down_proj"), config.n_embd, width, bias);
    }

    fn norm(&mut self, config: &Config, name: &str, len: usize, bias: bool) {
        if config.norm_weight {
            self.vector(&format!("{name}.weight"), len);
        }
        if bias {
            self.vector(&format!("{name}.bias"), len);
        }
    }
}

/// The names of Hugging Face's Llama, which are ours.
fn same_names(_: &Config, name: &str) -> Vec<Piece> {
    Piece::whole(name)
}

/// `name` with the first of `renames` (part of ours, theirs) that it holds replaced, or as it is.
fn renamed(name: &str, renames: &[(&str, &str)]) -> String {
    renames
        .iter()
        .find(|(ours, _)| name.contains(ours))
        .map_or_else(|| name.to_owned(), |(ours, theirs)| name.replacen(ours, theirs, 1))
}

/// Which of q, k, v a tensor belongs to, and the name around it: `("model.layers.0.self_attn.", 1, "weight")`.
fn split_qkv(name: &str) -> Option<(&str, usize, &str)> {
    ["q_proj.", "k_proj.", "v_proj."].iter().enumerate().find_map(|(i, part)| {
        let at = name.find(part)?;
        Some((&name[..at], i, &name[at + part.len()..]))
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::glu::Activation;
    use crate::ops::rope::Scaling;

    #[test]
    fn every_model_type_is_listed_once() {
        let mut types: Vec<&str> = FAMILIES.iter().flat_map(|f| f.model_types).copied().collect();
        let all = types.len();
        types.sort_unstable();
        types.dedup();
        assert_eq!(types.len(), all);
    }

    fn read(model_type: &str, keys: &str) -> Result<Config> {
        let sizes = r#""vocab_size": 99, "hidden_size": 64, "num_hidden_layers": 8, "num_attention_heads": 8"#;
        let hf = HfConfig::from_text(&format!(r#"{{"model_type": "{model_type}", {sizes} {keys}}}"#));
        (by_config(&hf)?.config)(&hf)
    }

    /// What transformers 5.24 makes of them.
    #[test]
    fn keys_that_contradict_each_other_mean_what_they_mean_in_transformers() {
        let sizes = r#", "intermediate_size": 96, "num_key_value_heads": 8"#;
        let read = |model_type: &str, keys: &str| read(model_type, &format!("{sizes} {keys}"));
        let smollm3 = |keys: &str| read("smollm3", keys);
        let longer = smollm3(r#", "no_rope_layers": [0, 1, 1, 1, 1, 1, 1, 0, 0, 0]"#).unwrap();
        assert_eq!(longer.no_rope, [true, false, false, false, false, false, false, true]);
        assert!(smollm3(r#", "no_rope_layers": [0, 1]"#).unwrap_err().to_string().contains("no_rope_layers"));
        let kinds = ["sliding_attention", "full_attention"].repeat(4);
        let listed = format!(r#", "sliding_window": 5, "use_sliding_window": false, "layer_types": {kinds:?}"#);
        assert_eq!(smollm3(&listed).unwrap().windows[..2], [Some(5), None]);
        let phi3 = read("phi3", &format!(r#", "sliding_window": 5, "layer_types": {kinds:?}"#)).unwrap();
        assert_eq!(phi3.windows, vec![Some(5); 8]);
        let neox = read("gpt_neox", r#", "rope_theta": 200.0, "partial_rotary_factor": 1.0"#).unwrap();
        assert_eq!((neox.rope_theta, neox.rotary_dim), (10_000.0, 2));
        let yarn = |keys: &str| {
            let scaling = format!(r#"{{"rope_type": "yarn", "factor": 2.0 {keys}}}"#);
            read("llama", &format!(r#", "rms_norm_eps": 1e-5, "rope_parameters": {scaling}"#)).unwrap().rope_scaling
        };
        let truncates = |scaling| matches!(scaling, Scaling::Yarn { truncate: true, .. });
        assert_eq!(["", r#", "truncate": null"#].map(|keys| truncates(yarn(keys))), [true, false]);
        let one_kind = r#", "rope_parameters": {"sliding_attention": {"rope_type": "default", "rope_theta": 300.0}}"#;
        let gemma3 = read("gemma3_text", one_kind).unwrap();
        assert_eq!((gemma3.rope_theta, gemma3.rope_local_theta), (1_000_000.0, Some(300.0)));
        let own = r#", "original_max_position_embeddings": 64, "rope_parameters": {"full_attention":
            {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 256}}"#;
        let gemma3 = read("gemma3_text", own).unwrap();
        assert!(matches!(gemma3.rope_scaling, Scaling::Yarn { original_context: 256.0, .. }));
    }

    #[test]
    fn mixtral_defaults_are_those_of_transformers() {
        let config = read("mixtral", "").unwrap();
        assert_eq!((config.n_query_groups, config.intermediate_size, config.block_size), (8, 14336, 131_072));
        assert_eq!((config.norm_eps, config.rope_theta), (1e-5, 1_000_000.0));
        assert_eq!(config.mlp, Mlp::Experts { n_expert: 8, n_expert_per_token: 2, norm_topk: true });
        assert_eq!(config.windows, vec![None; 8]);
        assert!(read("mixtral", r#", "num_experts_per_tok": 9"#).is_err());
    }

    #[test]
    fn mixtral_experts_have_their_names() {
        let config = read("mixtral", "").unwrap();
        let names = |name: &str| (llama::MIXTRAL.locate)(&config, name).remove(0).tensor;
        let expert = "model.layers.1.mlp.experts.2";
        assert_eq!(names("model.layers.1.mlp.gate.weight"), "model.layers.1.block_sparse_moe.gate.weight");
        for (ours, theirs) in [("gate", "w1"), ("up", "w3"), ("down", "w2")] {
            let want = format!("model.layers.1.block_sparse_moe.experts.2.{theirs}.weight");
            assert_eq!(names(&format!("{expert}.{ours}_proj.weight")), want);
        }
        assert_eq!(names("model.layers.1.self_attn.q_proj.weight"), "model.layers.1.self_attn.q_proj.weight");
        let slots = slots(&config);
        let slot = slots.iter().find(|s| s.name == format!("{expert}.down_proj.weight")).unwrap();
        assert_eq!((slot.rows, slot.cols), (64, 14336));
    }

    #[test]
    fn qwen3_moe_defaults_are_those_of_transformers() {
        let config = read("qwen3_moe", "").unwrap();
        assert_eq!((config.n_query_groups, config.head_size, config.intermediate_size), (4, 8, 768));
        assert_eq!((config.norm_eps, config.rope_theta), (1e-6, 10_000.0));
        assert_eq!(config.mlp, Mlp::Experts { n_expert: 128, n_expert_per_token: 8, norm_topk: false });
        assert_eq!((config.qk_norm, config.biases.qkv), (QkNorm::Head, false));
        assert_eq!(read("qwen3_moe", r#", "num_local_experts": 128, "sliding_window": 9"#).unwrap(), config);
        assert!(read("qwen3_moe", r#", "mlp_only_layers": []"#).is_ok());
        for dense in [r#", "mlp_only_layers": [0]"#, r#", "decoder_sparse_step": 2"#] {
            assert!(matches!(read("qwen3_moe", dense), Err(Error::Unsupported { .. })));
        }
    }

    #[test]
    fn olmo3_defaults_are_those_of_transformers() {
        let config = read("olmo3", r#", "intermediate_size": 96"#).unwrap();
        assert_eq!((config.n_query_groups, config.norm_eps), (8, 1e-5));
        assert_eq!((config.rope_theta, config.rope_local_theta), (500_000.0, Some(500_000.0)));
        let (window, full) = (Some(4096), None);
        assert_eq!(config.windows, [window, window, window, full, window, window, window, full]);
        assert_eq!((config.placement, config.qk_norm), (Placement::Post, QkNorm::Full));
        assert!(matches!(read("olmo3", r#", "rope_theta": 1e4"#), Err(Error::Unsupported { .. })));
    }

    #[test]
    fn olmo_defaults_are_those_of_transformers() {
        let config = read("olmo", r#", "intermediate_size": 96"#).unwrap();
        assert_eq!((config.clip_qkv, config.norm_weight, config.norm_eps), (None, false, 1e-5));
        assert_eq!((config.tie_embeddings, config.n_query_groups, config.rope_theta), (false, 8, 10_000.0));
        assert_eq!(read("olmo", r#", "intermediate_size": 96, "clip_qkv": 8.0"#).unwrap().clip_qkv, Some(8.0));
    }

    #[test]
    fn smollm3_defaults_are_those_of_transformers() {
        let sizes = r#", "intermediate_size": 96"#;
        let config = read("smollm3", sizes).unwrap();
        assert_eq!((config.n_query_groups, config.tie_embeddings, config.rope_theta), (4, true, 2_000_000.0));
        let no_rope = [false, false, false, true, false, false, false, true];
        assert_eq!((config.no_rope, config.windows), (no_rope.to_vec(), vec![None; 8]));
        // The windowed layers are those without rope, as transformers has them.
        let windowed =
            read("smollm3", &format!(r#"{sizes}, "use_sliding_window": true, "sliding_window": 5"#)).unwrap();
        assert_eq!(windowed.windows, no_rope.map(|n| n.then_some(5)));
    }

    #[test]
    fn granite_defaults_are_those_of_transformers() {
        let config = read("granite", r#", "intermediate_size": 96"#).unwrap();
        assert_eq!((config.embedding_scale, config.attention_scale), (1.0, 1.0));
        assert_eq!((config.residual_scale, config.logit_scale, config.norm_eps), (1.0, 1.0, 1e-6));
    }

    #[test]
    fn gemma3_defaults_are_those_of_transformers() {
        let config = read("gemma3_text", r#", "intermediate_size": 96"#).unwrap();
        assert_eq!((config.head_size, config.n_query_groups, config.attention_scale), (256, 4, 0.0625));
        assert_eq!((config.rope_theta, config.rope_local_theta), (1_000_000.0, Some(10_000.0)));
        assert_eq!(config.windows.iter().position(Option::is_none), Some(5));
        assert_eq!((config.windows[0], config.tie_embeddings, config.final_softcap), (Some(4096), true, None));
        assert!(matches!(read("gemma3_text", r#", "attn_logit_softcapping": 50.0"#), Err(Error::Unsupported { .. })));
    }

    fn dense(model_type: &str, keys: &str) -> Result<Config> {
        read(model_type, &format!(r#", "intermediate_size": 96{keys}"#))
    }

    #[test]
    fn phi3_knows_longrope_by_its_older_names() {
        let numbers = [1.0, 2.0, 3.0, 4.0];
        let scaling = |kind: &str, more: &str| {
            let lists = format!(r#""short_factor": {numbers:?}, "long_factor": {numbers:?}"#);
            let keys = format!(r#", "max_position_embeddings": 16384 {more}"#);
            dense("phi3", &format!(r#"{keys}, "rope_scaling": {{"type": "{kind}", {lists}}}"#)).map(|c| c.rope_scaling)
        };
        let long = |original_context: usize, factor: f64| Scaling::Long {
            short: numbers.to_vec(),
            long: numbers.to_vec(),
            original_context,
            attention_factor: (1.0 + factor.ln() / (original_context as f64).ln()).sqrt(),
        };
        for kind in ["longrope", "su", "yarn"] {
            assert_eq!(scaling(kind, "").unwrap(), long(4096, 4.0));
        }
        assert_eq!(scaling("longrope", r#", "original_max_position_embeddings": 8192"#).unwrap(), long(8192, 2.0));
        assert!(scaling("longrope", r#", "partial_rotary_factor": 0.5"#).is_err(), "too many numbers");
        assert!(dense("phi3", r#", "rope_scaling": {"type": "longrope"}"#).is_err());
    }

    #[test]
    fn a_share_of_each_head_turns_where_transformers_reads_it() {
        let turned = |model_type: &str| {
            dense(model_type, r#", "num_key_value_heads": 8, "partial_rotary_factor": 0.5"#).map(|c| c.rotary_dim * 2)
        };
        for (model_type, half) in
            [("phi3", true), ("stablelm", true), ("llama", false), ("qwen3", false), ("gemma2", false)]
        {
            let head_size = dense(model_type, r#", "num_key_value_heads": 8"#).unwrap().head_size;
            assert_eq!(turned(model_type).unwrap(), if half { head_size } else { 2 * head_size }, "{model_type}");
        }
    }

    #[test]
    fn rope_settings_that_were_added_go_first() {
        let saved = r#", "num_key_value_heads": 8, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}"#;
        let added = r#", "rope_scaling": {"rope_type": "linear", "factor": 4.0}"#;
        let config = dense("qwen3", &format!("{saved}{added}")).unwrap();
        assert_eq!((config.rope_theta, &config.rope_scaling), (10_000.0, &Scaling::Linear { factor: 4.0 }));
        assert_eq!(dense("qwen3", &format!(r#"{saved}, "rope_scaling": {{}}"#)).unwrap().rope_theta, 1e6);
        let kinds = r#", "rope_theta": 5e4, "rope_parameters": {"full_attention": {}}"#;
        let config = dense("gemma3_text", &format!("{kinds}{added}")).unwrap();
        assert_eq!((config.rope_theta, &config.rope_scaling), (5e4, &Scaling::Linear { factor: 4.0 }));
        assert_eq!(dense("llama", r#", "rope_scaling": {"type": "dynamic"}"#).unwrap().rope_scaling, Scaling::None);
        let theta = |keys: &str| dense("smollm3", keys).unwrap().rope_theta;
        assert_eq!((theta(r#", "rope_parameters": {}"#), theta(r#", "rope_theta": 7.0"#)), (2e6, 7.0));
        let original = r#", "original_max_position_embeddings": 16, "rope_scaling": {"rope_type": "llama3", "factor": 8.0,
            "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}"#;
        let Scaling::Llama3 { original_context, .. } = dense("llama", original).unwrap().rope_scaling else { panic!() };
        assert_eq!(original_context, 16.0);
    }

    #[test]
    fn null_is_not_the_default() {
        let config = dense(
            "qwen2",
            r#", "num_key_value_heads": null, "use_sliding_window": true, "sliding_window": null, "max_window_layers": 0"#,
        );
        let config = config.unwrap();
        assert_eq!((config.n_query_groups, config.windows), (8, vec![None; 8]));
        let config = dense("mistral", r#", "num_key_value_heads": null, "sliding_window": null"#).unwrap();
        assert_eq!((config.n_query_groups, config.windows), (8, vec![None; 8]));
        let config = dense("mistral", "").unwrap();
        assert_eq!((config.n_query_groups, config.windows), (8, vec![Some(4096); 8]));
    }

    #[test]
    fn gemmas_activation_is_the_tanh_form_unless_it_is_another() {
        let activation = |keys: &str| dense("gemma", keys).unwrap().activation;
        assert_eq!(activation(r#", "num_key_value_heads": 1, "hidden_act": "gelu""#), Activation::GeluTanh);
        let silu = r#", "num_key_value_heads": 1, "hidden_act": "silu", "hidden_activation": "gelu_pytorch_tanh""#;
        assert_eq!(activation(silu), Activation::Silu);
    }

    #[test]
    fn longrope_beside_tables_of_windowed_layers_is_refused() {
        let numbers = [1.0; 128];
        let scaling = format!(
            r#""rope_scaling": {{"rope_type": "longrope", "short_factor": {numbers:?}, "long_factor": {numbers:?}}}"#
        );
        let by_layer = r#", "rope_parameters": {"full_attention": {}, "sliding_attention": {}}"#;
        for keys in [format!(", {scaling}"), format!("{by_layer}, {scaling}")] {
            let error = dense("gemma3_text", &keys).unwrap_err().to_string();
            assert!(error.contains("longrope") && error.contains("config.json"), "{error}");
        }
    }

    #[test]
    fn an_odd_number_of_rotated_channels_is_the_next_even_one() {
        let config =
            read("gpt_neox", r#", "intermediate_size": 96, "rotary_pct": 0.63, "rotary_emb_base": 1e4"#).unwrap();
        assert_eq!((config.head_size, config.rotary_dim), (8, 6));
        let got = crate::ops::rope::inverse_frequencies(config.rope_theta, 6, &Scaling::None, 0);
        for (i, got) in got.iter().enumerate() {
            assert!((got - 1e4f64.powf(-2.0 * i as f64 / 5.0)).abs() < 1e-12);
        }
    }

    #[test]
    fn a_tied_head_keeps_its_bias() {
        let config = dense("phi", r#", "tie_word_embeddings": true"#).unwrap();
        let names: Vec<String> = slots(&config).into_iter().map(|slot| slot.name).collect();
        assert!(names.contains(&"lm_head.bias".to_owned()) && !names.contains(&"lm_head.weight".to_owned()));
    }

    #[test]
    fn qkv_names_split() {
        assert_eq!(split_qkv("model.layers.3.self_attn.k_proj.bias"), Some(("model.layers.3.self_attn.", 1, "bias")));
        assert_eq!(split_qkv("model.layers.3.self_attn.o_proj.bias"), None);
    }
}
