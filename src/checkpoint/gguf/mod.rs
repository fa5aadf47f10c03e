//! GGUF files, in which llama.cpp has a whole model: names and places of tensors, and the architecture that is written,
//! here; element types in `blocks`. A checkpoint, with or without adapters merged into it, is written by `tokenizer` (the
//! vocabulary) and `write` (the container), and read by `read` (the container), `config` (config.json) and `vocabulary`
//! (tokenizer.json).
//!
//! llama.cpp's `llama` rotates neighbouring channels of a head where Hugging Face's rotates those half a head apart; the
//! rows of its queries and keys stand in the order for that.

mod blocks;
mod config;
mod read;
mod tokenizer;
mod vocabulary;
mod write;

pub use blocks::{Kind, decode};
pub use config::{FREQUENCIES, describe};
pub use read::{Metadata, header};
pub use tokenizer::Words;
pub use vocabulary::files;

use super::Dtype;
use super::convert::Export;
use super::merge::check_finite;
use super::write::Staging;
use crate::error::{Error, Result};
use crate::model::Config;
use crate::model::config::{Mlp, QkNorm};
use crate::model::families::{Piece, Slot};
use crate::ops::glu::Activation;
use crate::ops::rope::{Scaling, inverse_frequencies};
use blocks::BLOCK;
use write::{Info, Settings, Value};

const HINT: &str = "merge as hf and use that folder";

/// A model to be written.
#[derive(Debug)]
pub struct Gguf<'a> {
    export: &'a Export<'a>,
    words: Words<'a>,
    kind: Kind,
    architecture: &'static str,
    tensors: Vec<Tensor>,
}

/// A tensor of the file, and what it is made of.
#[derive(Debug)]
struct Tensor {
    info: Info,
    content: Content,
}

#[derive(Debug)]
enum Content {
    /// These numbers.
    Numbers(Vec<f32>),
    /// A tensor of ours, with its rows in the order for this many heads if it is queries or keys.
    Ours { slot: Slot, heads: Option<usize> },
}

impl<'a> Gguf<'a> {
    /// Prepares writing the model of `export` with its matrices as `kind`.
    ///
    /// # Errors
    /// When llama.cpp's architectures cannot express the model.
    pub fn new(export: &'a Export<'a>, words: Words<'a>, kind: Kind) -> Result<Self> {
        let checkpoint = export.checkpoint;
        let architecture = match checkpoint.family.model_types[0] {
            "llama" | "mistral" => "llama",
            "qwen2" => "qwen2",
            "qwen3" => "qwen3",
            other => {
                let what = format!("a model of type `{other}` as GGUF (`{}`)", checkpoint.dir.display());
                return Err(Error::unsupported(what, format!("llama, mistral, qwen2 and qwen3 are written; {HINT}")));
            }
        };
        if let Some(problem) = inexpressible(&checkpoint.config, architecture) {
            let what = format!("{problem} as GGUF (`{}`)", checkpoint.dir.display());
            return Err(Error::unsupported(what, HINT));
        }
        let tensors = tensors(export, architecture, kind);
        Ok(Self { export, words, kind, architecture, tensors })
    }

    /// Number of tensors that `progress` will be told of.
    #[must_use]
    pub fn tensors(&self) -> usize {
        self.tensors.len()
    }

    /// Writes the model, called `title`, into `staging` as `file`, one tensor at a time.
    ///
    /// # Errors
    /// When a file cannot be read or written, or the tokenizer is of a kind that llama.cpp does not know.
    pub fn write(&self, staging: &Staging, file: &str, title: &str, progress: &mut dyn FnMut(&str)) -> Result<()> {
        let infos: Vec<Info> = self.tensors.iter().map(|t| t.info.clone()).collect();
        write::write(&staging.dir().join(file), &self.settings(title)?, &infos, |index| {
            progress(&infos[index].name);
            self.content(&self.tensors[index])
        })
    }

    fn settings(&self, title: &str) -> Result<Settings> {
        let config = &self.export.checkpoint.config;
        let text = |text: &str| Value::Text(text.to_owned());
        let mut settings: Settings = vec![
            ("general.architecture".to_owned(), text(self.architecture)),
            ("general.type".to_owned(), text("model")),
            ("general.name".to_owned(), text(title)),
            ("general.file_type".to_owned(), Value::U32(self.kind.file_type())),
            ("general.quantization_version".to_owned(), Value::U32(2)),
        ];
        // llama.cpp knows no window here; within the window there is no difference.
        let context =
            config.windows.iter().flatten().copied().min().map_or(config.block_size, |w| w.min(config.block_size));
        let counts = [
            ("block_count", config.n_layer),
            ("context_length", context),
            ("embedding_length", config.n_embd),
            ("feed_forward_length", config.intermediate_size),
            ("attention.head_count", config.n_head),
            ("attention.head_count_kv", config.n_query_groups),
            ("attention.key_length", config.head_size),
            ("attention.value_length", config.head_size),
            ("rope.dimension_count", config.rotary_dim),
            ("vocab_size", config.vocab_size),
        ];
        let mut own = |key: &str, value: Value| settings.push((format!("{}.{key}", self.architecture), value));
        counts.into_iter().for_each(|(key, n)| own(key, Value::U32(n as u32)));
        own("attention.layer_norm_rms_epsilon", Value::F32(config.norm_eps));
        own("rope.freq_base", Value::F32(config.rope_theta as f32));
        match config.rope_scaling {
            Scaling::Linear { factor } => {
                own("rope.scaling.type", text("linear"));
                own("rope.scaling.factor", Value::F32(factor as f32));
            }
            Scaling::Yarn { factor, original_context, .. } => {
                own("rope.scaling.type", text("yarn"));
                own("rope.scaling.factor", Value::F32(factor as f32));
                own("rope.scaling.original_context_length", Value::U32(original_context as u32));
            }
            Scaling::None | Scaling::Llama3 { .. } | Scaling::Long { .. } => {}
        }
        let pad = self.export.checkpoint.hf.count_or("pad_token_id", None)?;
        settings.extend(self.words.settings(config.vocab_size, pad)?);
        Ok(settings)
    }

    fn content(&self, tensor: &Tensor) -> Result<Vec<u8>> {
        let (slot, heads) = match &tensor.content {
            Content::Numbers(numbers) => return Ok(tensor.info.kind.encode(numbers)),
            Content::Ours { slot, heads } => (slot, heads),
        };
        let width = if slot.vector { 1 } else { slot.cols };
        let bytes = self.export.tensor(&slot.name, Dtype::F32, width)?;
        let mut values = vec![0.0; bytes.len() / 4];
        Dtype::F32.decode(&bytes, &mut values);
        drop(bytes);
        // The scales of blocks are f16 too.
        let limit = if tensor.info.kind == Kind::F32 { Dtype::F32 } else { Dtype::F16 };
        check_finite(&values, limit, &slot.name)?;
        let encoded = tensor.info.kind.encode(&values);
        Ok(match heads {
            Some(heads) => interleave(&encoded, *heads, tensor.info.shape[0]),
            None => encoded,
        })
    }
}

/// What llama.cpp's `architecture` cannot express of `config`.
fn inexpressible(config: &Config, architecture: &str) -> Option<String> {
    let yarn = |factor: f64, attention: f64| (attention - (0.1 * factor.ln() + 1.0)).abs() < 1e-6;
    let scaling = match config.rope_scaling {
        Scaling::None | Scaling::Linear { .. } => true,
        Scaling::Llama3 { .. } => architecture == "llama",
        Scaling::Yarn { factor, beta_fast, beta_slow, attention_factor, truncate, .. } => {
            (beta_fast, beta_slow, truncate) == (32.0, 1.0, true) && yarn(factor, attention_factor)
        }
        Scaling::Long { .. } => false,
    };
    let biases = &config.biases;
    if !scaling {
        Some(format!("this rope scaling of a {architecture} model"))
    } else if config.activation != Activation::Silu || config.mlp != Mlp::Gated {
        Some(format!("this activation of a {architecture} model"))
    } else if config.rotary_dim != config.head_size {
        Some("a partly rotated head".to_owned())
    } else if architecture != "llama" && (biases.projection || biases.mlp || biases.qkv && architecture == "qwen3") {
        Some(format!("these biases of a {architecture} model"))
    } else {
        None
    }
}

fn tensors(export: &Export<'_>, architecture: &str, kind: Kind) -> Vec<Tensor> {
    let config = &export.checkpoint.config;
    let mut tensors = Vec::new();
    if let Scaling::Llama3 { .. } = config.rope_scaling {
        let frequencies = |scaling: &Scaling| inverse_frequencies(config.rope_theta, config.rotary_dim, scaling, 0);
        let pairs = frequencies(&Scaling::None).into_iter().zip(frequencies(&config.rope_scaling));
        let factors: Vec<f32> = pairs.map(|(plain, scaled)| (plain / scaled) as f32).collect();
        let info = Info { name: "rope_freqs.weight".to_owned(), kind: Kind::F32, shape: vec![factors.len()] };
        tensors.push(Tensor { info, content: Content::Numbers(factors) });
    }
    for slot in export.slots() {
        let shape = if slot.vector { vec![slot.cols] } else { vec![slot.rows, slot.cols] };
        let name = name(&slot.name);
        let info = Info { kind: kind_of(&slot, &name, kind), name, shape };
        let heads = heads(config, &slot.name).filter(|_| architecture == "llama");
        tensors.push(Tensor { info, content: Content::Ours { slot, heads } });
    }
    debug_assert!(matches!(config.qk_norm, QkNorm::None | QkNorm::Head));
    tensors
}

/// Number of heads that our tensor `name` has rows for, if it is queries or keys.
fn heads(config: &Config, name: &str) -> Option<usize> {
    let heads = [("q_proj", config.n_head), ("k_proj", config.n_query_groups)];
    heads.into_iter().find(|(part, _)| name.contains(part)).map(|(_, heads)| heads)
}

/// Where our tensor `name` stands in a file, in which rows of queries and keys may be `interleaved`.
#[must_use]
pub fn locate(config: &Config, interleaved: bool, ours: &str) -> Vec<Piece> {
    let Some(heads) = heads(config, ours).filter(|_| interleaved) else { return Piece::whole(name(ours)) };
    let half = config.head_size / 2;
    let row = |head: usize, channel: usize| {
        let place = if channel < half { 2 * channel } else { 2 * (channel - half) + 1 };
        head * config.head_size + place
    };
    let rows = (0..heads).flat_map(|head| (0..config.head_size).map(move |channel| row(head, channel)));
    Piece::rows(name(ours), rows.map(|row| row..row + 1).collect())
}

/// Vectors are f32. Rows that are no whole blocks are f16. Embedding and head suffer most from 4 bits and get 8.
fn kind_of(slot: &Slot, name: &str, kind: Kind) -> Kind {
    match kind {
        _ if slot.vector => Kind::F32,
        Kind::Q4_0 | Kind::Q8_0 if !slot.cols.is_multiple_of(BLOCK) => Kind::F16,
        Kind::Q4_0 if !name.starts_with("blk.") => Kind::Q8_0,
        kind => kind,
    }
}

/// What llama.cpp calls our tensor `name`.
fn name(name: &str) -> String {
    const NAMES: &[(&str, &str)] = &[
        ("model.layers.", "blk."),
        ("model.embed_tokens", "token_embd"),
        ("model.norm", "output_norm"),
        ("lm_head", "output"),
        ("self_attn.q_proj", "attn_q"),
        ("self_attn.k_proj", "attn_k"),
        ("self_attn.v_proj", "attn_v"),
        ("self_attn.o_proj", "attn_output"),
        ("self_attn.q_norm", "attn_q_norm"),
        ("self_attn.k_norm", "attn_k_norm"),
        ("mlp.gate_proj", "ffn_gate"),
        ("mlp.up_proj", "ffn_up"),
        ("mlp.down_proj", "ffn_down"),
        ("input_layernorm", "attn_norm"),
        ("post_attention_layernorm", "ffn_norm"),
    ];
    NAMES.iter().fold(name.to_owned(), |name, (ours, theirs)| name.replace(ours, theirs))
}

/// `rows` rows with those of each head's first half between those of its second.
fn interleave(bytes: &[u8], heads: usize, rows: usize) -> Vec<u8> {
    let (row, half) = (bytes.len() / rows, rows / heads / 2);
    let mut out = Vec::with_capacity(bytes.len());
    for head in bytes.chunks_exact(2 * half * row) {
        let (first, second) = head.split_at(half * row);
        for (a, b) in first.chunks_exact(row).zip(second.chunks_exact(row)) {
            out.extend_from_slice(a);
            out.extend_from_slice(b);
        }
    }
    out
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn rows_of_a_head_interleave() {
        // Two heads of four rows, two bytes each.
        let bytes: Vec<u8> = (0..16).collect();
        let interleaved = interleave(&bytes, 2, 8);
        assert_eq!(interleaved, [0, 1, 4, 5, 2, 3, 6, 7, 8, 9, 12, 13, 10, 11, 14, 15]);
        let config = Config::llama(99, 1, 8, 2, 96);
        let piece = locate(&config, true, "model.layers.0.self_attn.k_proj.weight").swap_remove(0);
        assert_eq!(piece.tensor, "blk.0.attn_k.weight");
        let back: Vec<u8> =
            piece.rows.unwrap().into_iter().flat_map(|r| interleaved[2 * r.start..2 * r.end].to_vec()).collect();
        assert_eq!(back, bytes);
        assert_eq!(locate(&config, false, "model.layers.0.self_attn.k_proj.bias"), Piece::whole("blk.0.attn_k.bias"));
    }

    #[test]
    fn names_are_those_of_llama_cpp() {
        for (ours, theirs) in [
            ("model.layers.12.self_attn.q_norm.weight", "blk.12.attn_q_norm.weight"),
            ("model.layers.0.self_attn.q_proj.bias", "blk.0.attn_q.bias"),
            ("model.layers.3.post_attention_layernorm.weight", "blk.3.ffn_norm.weight"),
            ("model.layers.3.input_layernorm.weight", "blk.3.attn_norm.weight"),
            ("model.norm.weight", "output_norm.weight"),
            ("lm_head.weight", "output.weight"),
        ] {
            assert_eq!(name(ours), theirs);
        }
    }

    #[test]
    fn what_llama_cpp_cannot_compute_is_refused() {
        let mut config = Config::llama(99, 1, 64, 2, 96);
        assert_eq!(inexpressible(&config, "llama"), None);
        config.biases.qkv = true;
        assert_eq!(inexpressible(&config, "qwen2"), None);
        assert!(inexpressible(&config, "qwen3").is_some());
        config.rope_scaling =
            Scaling::Llama3 { factor: 8.0, low_freq_factor: 1.0, high_freq_factor: 4.0, original_context: 8192.0 };
        assert_eq!(inexpressible(&config, "llama"), None);
        assert!(inexpressible(&config, "qwen2").is_some());
        config = Config { rotary_dim: 8, ..Config::llama(99, 1, 64, 2, 96) };
        assert!(inexpressible(&config, "llama").is_some());
    }
}
