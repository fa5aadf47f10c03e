//! What the fuzz targets share: a model small enough to be loaded thousands of times a second, a folder in memory to
//! put broken files into, and what has to hold for every answer.

#[path = "../../zip.rs"]
mod zip;

pub use zip::zip;

use std::fs;
use std::path::{Path, PathBuf};

use litgpt::checkpoint::Checkpoint;
use litgpt::error::Result;
use litgpt::model::Gpt;
use litgpt::ops::weight::Store;
use serde_json::{Value, json};
use tempfile::TempDir;

/// Words of the small model.
const VOCABULARY: usize = 32;
/// Width of the small model.
const WIDTH: usize = 8;

/// The tokenizer of the quickstart's model.
pub const TOKENIZER: &[u8] = include_bytes!("../../../data/tiny/tokenizer.json");
/// Settings of the quickstart's tokenizer.
pub const TOKENIZER_CONFIG: &[u8] = include_bytes!("../../../data/tiny/tokenizer_config.json");

/// A folder whose files each input replaces.
pub struct Folder(TempDir);

impl Folder {
    /// An empty folder, in memory where the system has such a place.
    pub fn new() -> Self {
        let memory = Path::new("/dev/shm");
        let place = if memory.is_dir() { memory.to_owned() } else { std::env::temp_dir() };
        Self(tempfile::tempdir_in(place).expect("a folder for the files"))
    }

    /// A folder with the small model.
    pub fn with_model() -> Self {
        let folder = Self::new();
        folder.put("config.json", config().to_string());
        folder.put("model.safetensors", weights());
        folder
    }

    /// The path of a file in it.
    pub fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    /// Writes a file.
    pub fn put(&self, name: &str, content: impl AsRef<[u8]>) {
        let path = self.path(name);
        fs::create_dir_all(path.parent().expect("a file in the folder")).expect("a folder for the file");
        fs::write(path, content).expect("the file is written");
    }
}

impl Default for Folder {
    fn default() -> Self {
        Self::new()
    }
}

/// The result of reading. That an error reaches the terminal as one line is `cli::ui`'s doing, and tested there.
pub fn checked<T>(result: Result<T>) -> Option<T> {
    result
        .inspect_err(|error| assert!(!error.to_string().is_empty() && error.hint().is_none_or(|h| !h.is_empty())))
        .ok()
}

/// The checkpoint at `path`, loaded and asked for a token, as `generate` does.
pub fn run_model(path: &Path) -> Option<(Checkpoint, Gpt)> {
    let checkpoint = checked(Checkpoint::open(path))?;
    let quantizer = checkpoint.quantizer();
    let mut gpt = checked(Gpt::load(&checkpoint.config, &checkpoint, Store::F32, quantizer, &mut |_| ()))?;
    gpt.prepare(4);
    let ids: Vec<u32> = (0..3).map(|id| id % checkpoint.config.vocab_size as u32).collect();
    let logits = gpt.next_logits(&ids, &mut gpt.cache());
    assert_eq!(logits.cols(), checkpoint.config.vocab_size);
    Some((checkpoint, gpt))
}

/// config.json of the small model.
pub fn config() -> Value {
    json!({
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": VOCABULARY, "hidden_size": WIDTH,
        "intermediate_size": 2 * WIDTH, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1,
        "head_dim": 4, "hidden_act": "silu", "max_position_embeddings": 64, "rope_theta": 10000.0,
        "rms_norm_eps": 1e-5, "tie_word_embeddings": true, "bos_token_id": 0, "eos_token_id": 1, "torch_dtype": "float32"
    })
}

/// Names, shapes and values of the small model's tensors.
pub fn tensors() -> Vec<(String, Vec<usize>, Vec<u8>)> {
    let layer = |name: &str| format!("model.layers.0.{name}.weight");
    let shapes = [
        ("model.embed_tokens.weight".to_owned(), vec![VOCABULARY, WIDTH]),
        (layer("input_layernorm"), vec![WIDTH]),
        (layer("self_attn.q_proj"), vec![8, WIDTH]),
        (layer("self_attn.k_proj"), vec![4, WIDTH]),
        (layer("self_attn.v_proj"), vec![4, WIDTH]),
        (layer("self_attn.o_proj"), vec![WIDTH, 8]),
        (layer("post_attention_layernorm"), vec![WIDTH]),
        (layer("mlp.gate_proj"), vec![2 * WIDTH, WIDTH]),
        (layer("mlp.up_proj"), vec![2 * WIDTH, WIDTH]),
        (layer("mlp.down_proj"), vec![WIDTH, 2 * WIDTH]),
        ("model.norm.weight".to_owned(), vec![WIDTH]),
    ];
    shapes.into_iter().map(|(name, shape)| (name, shape.clone(), values(shape.iter().product()))).collect()
}

/// `len` numbers in f32.
fn values(len: usize) -> Vec<u8> {
    (0..len).flat_map(|i| ((i * 7 % 13) as f32 / 13.0 - 0.5).to_le_bytes()).collect()
}

/// model.safetensors of the small model.
pub fn weights() -> Vec<u8> {
    safetensors(&tensors())
}

/// A safetensors file.
pub fn safetensors(tensors: &[(String, Vec<usize>, Vec<u8>)]) -> Vec<u8> {
    let (mut header, mut data) = (serde_json::Map::new(), Vec::new());
    for (name, shape, bytes) in tensors {
        let begin = data.len();
        data.extend(bytes);
        header.insert(name.clone(), json!({"dtype": "F32", "shape": shape, "data_offsets": [begin, data.len()]}));
    }
    let header = Value::Object(header).to_string();
    [&(header.len() as u64).to_le_bytes()[..], header.as_bytes(), &data].concat()
}

/// adapter_model.safetensors of an adapter of rank 2 on queries and values.
pub fn adapter_weights() -> Vec<u8> {
    let name = |part: &str, ab: &str| format!("base_model.model.model.layers.0.self_attn.{part}.lora_{ab}.weight");
    let shapes = [("q_proj", 8), ("v_proj", 4)]
        .into_iter()
        .flat_map(|(part, rows)| [(name(part, "A"), vec![2, WIDTH]), (name(part, "B"), vec![rows, 2])]);
    let tensors: Vec<_> = shapes.map(|(name, shape)| (name, shape.clone(), values(shape.iter().product()))).collect();
    safetensors(&tensors)
}

/// adapter_config.json that goes with them.
pub fn adapter_config() -> Value {
    json!({
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": "base", "r": 2, "lora_alpha": 4,
        "lora_dropout": 0.05, "target_modules": ["q_proj", "v_proj"], "bias": "none", "fan_in_fan_out": false,
        "use_rslora": false, "rank_pattern": {}, "alpha_pattern": {}
    })
}

/// tokenizer.json of a byte-level vocabulary of a few words.
pub const SMALL_TOKENIZER: &str = r###"{
  "version": "1.0", "truncation": null, "padding": null,
  "added_tokens": [
    {"id": 0, "content": "<s>", "single_word": false, "lstrip": false, "rstrip": false, "normalized": false, "special": true},
    {"id": 1, "content": "</s>", "single_word": false, "lstrip": false, "rstrip": false, "normalized": false, "special": true}
  ],
  "normalizer": {"type": "Sequence", "normalizers": [{"type": "NFC"}, {"type": "Prepend", "prepend": "▁"}, {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}]},
  "pre_tokenizer": {"type": "Sequence", "pretokenizers": [{"type": "Digits", "individual_digits": true}, {"type": "Split", "pattern": {"Regex": "\\s+|\\w+"}, "behavior": "Isolated", "invert": false}, {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true}]},
  "post_processor": {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}], "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}], "special_tokens": {"<s>": {"id": "<s>", "ids": [0], "tokens": ["<s>"]}}},
  "decoder": {"type": "Sequence", "decoders": [{"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true}, {"type": "Strip", "content": " ", "start": 1, "stop": 0}]},
  "model": {"type": "BPE", "dropout": null, "unk_token": "<unk>", "continuing_subword_prefix": null, "end_of_word_suffix": null, "fuse_unk": true, "byte_fallback": true, "ignore_merges": false,
    "vocab": {"<s>": 0, "</s>": 1, "<unk>": 2, "H": 3, "e": 4, "l": 5, "o": 6, "w": 7, "r": 8, "d": 9, "Ġ": 10, "#": 11, ",": 12, "He": 13, "ll": 14, "a": 15, "b": 16, "c": 17, "▁": 18, "<0xC3>": 19},
    "merges": ["H e", "l l"]}
}"###;
