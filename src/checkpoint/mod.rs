//! Checkpoints, read in place: Hugging Face's folders (config.json, tokenizer files, safetensors or pytorch_model.bin,
//! with or without an index, in few bits as bitsandbytes keeps them: `bnb`), LitGPT's (lit_model.pth; names and settings
//! in `litgpt`) and GGUF files (in `gguf`). Adapters are in `adapter`, merging in `merge`, turning one kind of checkpoint
//! into the other in `convert`, writing in `write`, names that stand for a folder in `pointer`, the Hub in `hub`.

pub mod adapter;
mod archive;
pub mod bnb;
pub mod convert;
pub mod gguf;
pub mod hub;
pub mod litgpt;
pub mod merge;
pub mod pickle;
pub mod pointer;
mod safe;
pub mod state;
pub mod write;

pub use safe::{Dtype, Elements, Raw};

use crate::error::{Error, Result};
use crate::model::families::multimodal::{text_name, text_part};
use crate::model::families::{Family, HfConfig, Piece, Slot, by_config, is_projection, slots};
use crate::model::quantizer::Quantizer;
use crate::model::{Config, Source, load};
use crate::ops::quantized::Codes;
use crate::ops::rope::Scaling;
use crate::ops::weight::{Data, Store};
use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};
use litgpt::Qkv;
use rayon::prelude::*;
use safe::Shards;
use std::borrow::Cow;
use std::collections::{BTreeMap, HashSet};
use std::path::{Path, PathBuf};
use write::{COMPANIONS, Staging};

/// Our names of the embedding and of the head.
const EMBEDDING: &str = "model.embed_tokens.weight";
const HEAD: &str = "lm_head.weight";

const AGAIN: &str = "download the checkpoint again; what is complete is kept";

/// What the tensors of a folder are called, and how they are put together.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Layout {
    /// As Hugging Face has the family.
    HuggingFace,
    /// As LitGPT has all families.
    Litgpt(Qkv),
    /// As llama.cpp has all families.
    Gguf {
        /// Whether rows of queries and keys stand in pairs, as its `llama` has them.
        interleaved: bool,
    },
}

/// An open checkpoint.
#[derive(Debug)]
pub struct Checkpoint {
    /// The folder, or the GGUF file.
    pub dir: PathBuf,
    /// Its architecture.
    pub config: Config,
    /// Its family.
    pub family: &'static Family,
    /// Its tensors' names.
    pub layout: Layout,
    /// Its config.json, or what it would be.
    pub hf: HfConfig,
    shards: Shards,
    /// Contents of files that are not in the folder as they have to be, by name: those that a GGUF file stands for, the
    /// config.json of a model's text part.
    embedded: Embedded,
}

/// Contents of files that are not in a folder as they have to be.
type Embedded = BTreeMap<&'static str, String>;

/// The config of what is read of a model, with the file that says so where the folder's describes more.
fn text_config(whole: HfConfig) -> Result<(HfConfig, Embedded)> {
    let Some(text) = text_part(&whole)? else { return Ok((whole, Embedded::new())) };
    let content = format!("{:#}", serde_json::Value::Object(text.keys().clone()));
    Ok((text, Embedded::from([("config.json", content)])))
}

/// Tensors of a file that say nothing about the weights.
fn ignorable(name: &str) -> bool {
    let suffixes =
        ["rotary_emb.inv_freq", "attention.bias", "attention.masked_bias", "attn.masked_bias", "position_ids"];
    suffixes.iter().any(|s| name.ends_with(s))
}

impl Checkpoint {
    /// Opens the folder or GGUF file at `dir` and checks every tensor's presence and shape.
    ///
    /// # Errors
    /// When a file is missing or broken, the architecture is unknown, or tensors are missing, unknown or of another
    /// shape; all of them are listed.
    pub fn open(dir: &Path) -> Result<Self> {
        if let Some(file) = gguf_file(dir)? {
            return Self::open_gguf(&file);
        }
        if !dir.is_dir() {
            let hint = "`litgpt download REPO` fetches a model; `--checkpoint_dir` takes its folder".to_owned();
            return Err(Error::Missing { what: "checkpoint folder".to_owned(), path: dir.to_owned(), hint });
        }
        if litgpt_only(dir) { Self::open_litgpt(dir) } else { Self::open_hf(dir) }
    }

    fn open_gguf(path: &Path) -> Result<Self> {
        let (shards, metadata) = Shards::gguf(path)?;
        let keys = gguf::describe(&metadata, &shards)?;
        let text = format!("{:#}", serde_json::Value::Object(keys.clone()));
        let hf = HfConfig::of(path, keys);
        let family = by_config(&hf)?;
        let config = (family.config)(&hf)?;
        let mut embedded = gguf::files(&metadata, config.vocab_size, config.block_size)?;
        embedded.insert("config.json", text);
        let layout = Layout::Gguf { interleaved: hf.model_type()? == "llama" };
        let checkpoint = Self { dir: path.to_owned(), config, family, layout, hf, shards, embedded };
        checkpoint.check()?;
        Ok(checkpoint)
    }

    fn open_hf(dir: &Path) -> Result<Self> {
        let (hf, embedded) = text_config(HfConfig::read(&dir.join("config.json"))?)?;
        let family = by_config(&hf)?;
        let config = (family.config)(&hf)?;
        check_numbers(&config, &hf)?;
        bnb::check_method(hf.get("quantization_config"), hf.path())?;
        let mut shards = Shards::open(dir)?;
        if !embedded.is_empty() {
            shards.rename(text_name)?;
        }
        let layout = Layout::HuggingFace;
        let mut checkpoint = Self { dir: dir.to_owned(), config, family, layout, hf, shards, embedded };
        // A head that differs from the embedding is one of its own, whatever config.json says, as transformers 5 has it:
        // someone merged an adapter of the head.
        let [embedding, head] = [EMBEDDING, HEAD].map(|name| checkpoint.file_tensor(name));
        for head in std::iter::once(head.as_str()).chain((head != HEAD).then_some(HEAD)) {
            if checkpoint.config.tie_embeddings && checkpoint.shards.info(head).is_ok() {
                checkpoint.config.tie_embeddings = checkpoint.shards.equal(&embedding, head);
                [&embedding, head].iter().for_each(|name| checkpoint.shards.release(name));
            }
        }
        checkpoint.check()?;
        Ok(checkpoint)
    }

    /// The file's tensor that holds our tensor `name`, or rows of it.
    fn file_tensor(&self, name: &str) -> String {
        self.locate(name).swap_remove(0).tensor
    }

    /// Whether config.json ties the head to the embedding, and the files do not.
    #[must_use]
    pub fn untied_by_files(&self) -> bool {
        (self.family.config)(&self.hf).is_ok_and(|stated| stated.tie_embeddings) && !self.config.tie_embeddings
    }

    /// Opens LitGPT's files in the folder `dir`, whatever else is there.
    ///
    /// # Errors
    /// Those of [`Checkpoint::open`].
    pub fn open_litgpt(dir: &Path) -> Result<Self> {
        let path = dir.join("config.json");
        let hf = if path.is_file() { HfConfig::read(&path)? } else { litgpt::config::hf_config(dir)? };
        let (hf, embedded) = text_config(hf)?;
        let family = by_config(&hf)?;
        let mut config = (family.config)(&hf)?;
        check_numbers(&config, &hf)?;
        let shards = Shards::of(vec![dir.join(litgpt::WEIGHTS)])?;
        // LitGPT pads the vocabulary and writes the head beside the embedding it is tied to: the file says what is.
        let (embedding, head) = ("transformer.wte.weight", "lm_head.weight");
        if let Some(rows) = shards.get(embedding).ok().and_then(|raw| raw.shape.first().copied()) {
            config.vocab_size = rows;
        }
        config.tie_embeddings = shards.get(head).is_err() || shards.equal(embedding, head);
        let old = shards.names().any(|n| n.contains(".attn.attn."));
        let layout = Layout::Litgpt(if old { Qkv::Interleaved } else { Qkv::Below });
        let checkpoint = Self { dir: dir.to_owned(), config, family, layout, hf, shards, embedded };
        checkpoint.check()?;
        Ok(checkpoint)
    }

    /// Where our tensor `name` stands.
    #[must_use]
    pub fn locate(&self, name: &str) -> Vec<Piece> {
        self.locate_in(self.layout, name)
    }

    /// Where our tensor `name` stands in a folder of this architecture and of `layout`.
    #[must_use]
    pub fn locate_in(&self, layout: Layout, name: &str) -> Vec<Piece> {
        match layout {
            Layout::HuggingFace => (self.family.locate)(&self.config, name),
            Layout::Litgpt(qkv) => litgpt::locate(&self.config, qkv, name),
            Layout::Gguf { interleaved } => gguf::locate(&self.config, interleaved, name),
        }
    }

    fn check(&self) -> Result<()> {
        let mut problems = Vec::new();
        let mut used = HashSet::new();
        for slot in slots(&self.config) {
            let pieces = self.locate(&slot.name);
            let (mut elements, before) = (0, problems.len());
            for piece in &pieces {
                used.insert(piece.tensor.clone());
                match self.shards.info(&piece.tensor) {
                    Ok((_, shape)) => match self.piece_elements(piece, shape, &slot) {
                        Ok(n) => elements += n,
                        Err(problem) => problems.push(problem),
                    },
                    Err(_) => problems.push(format!("tensor `{}` is missing", piece.tensor)),
                }
            }
            if elements != slot.rows * slot.cols && problems.len() == before {
                let shape =
                    if slot.vector { format!("({})", slot.cols) } else { format!("({}, {})", slot.rows, slot.cols) };
                let names: Vec<&str> = pieces.iter().map(|p| p.tensor.as_str()).collect();
                let (names, by) = (names.join("`, `"), self.described());
                problems.push(format!("tensor `{names}` does not give {shape}, as {by} wants"));
            }
        }
        let frequencies = |name: &str| matches!(self.layout, Layout::Gguf { .. }) && name == gguf::FREQUENCIES;
        let head = self.file_tensor(HEAD);
        let tied_head = |name: &str| self.config.tie_embeddings && (name == head || name == HEAD);
        let unknown = |name: &&str| !used.contains(*name) && !ignorable(name) && !tied_head(name) && !frequencies(name);
        for name in self.shards.names().filter(unknown) {
            problems.push(format!("tensor `{name}` has no place in the architecture of {}", self.described()));
        }
        self.report(problems)
    }

    fn report(&self, mut problems: Vec<String>) -> Result<()> {
        if problems.is_empty() {
            return Ok(());
        }
        problems.dedup();
        let more = problems.len().saturating_sub(6);
        problems.truncate(6);
        if more > 0 {
            problems.push(format!("and {more} more"));
        }
        let what = format!("`{}` does not hold what its {} describes", self.dir.display(), self.described());
        Err(Error::Mismatch { what, problems, hint: AGAIN.to_owned() })
    }

    /// What says the architecture.
    fn described(&self) -> &'static str {
        if matches!(self.layout, Layout::Gguf { .. }) { "metadata" } else { "config.json" }
    }

    /// Elements that a piece gives, if its tensor has the `shape` for it.
    fn piece_elements(&self, piece: &Piece, shape: &[usize], slot: &Slot) -> std::result::Result<usize, String> {
        let wrong =
            || format!("tensor `{}` has the shape {shape:?}, which {} does not give", piece.tensor, self.described());
        let dims = if slot.vector { 1 } else { 2 };
        if shape.len() != dims || (!slot.vector && shape[1] != slot.cols) {
            return Err(wrong());
        }
        let width = if slot.vector { 1 } else { slot.cols };
        // No other tensor of ours has the other rows there.
        if matches!(self.layout, Layout::Gguf { .. }) && shape[0] * width != slot.rows * slot.cols {
            return Err(wrong());
        }
        match &piece.rows {
            None => Ok(shape[0] * width),
            Some(rows) if rows.iter().all(|r| r.end <= shape[0]) => Ok(rows.iter().map(|r| r.len() * width).sum()),
            Some(_) => Err(wrong()),
        }
    }

    /// The tensor `name` of the files.
    ///
    /// # Errors
    /// When there is none.
    pub fn raw(&self, name: &str) -> Result<Raw<'_>> {
        self.shards.get(name)
    }

    /// Dtype of the tensor `name` of the files.
    ///
    /// # Errors
    /// When there is none.
    pub fn dtype(&self, name: &str) -> Result<Dtype> {
        Ok(self.shards.info(name)?.0)
    }

    /// Whether f32 weights are kept as the bf16 that they are in the files, judged by the embedding's.
    ///
    /// # Errors
    /// When there is none.
    pub fn narrow(&self, store: Store, on_device: bool) -> Result<bool> {
        load::narrow(self, store, on_device, std::iter::once(EMBEDDING.to_owned()))
    }

    /// How its matrices are quantized, where the files have them in few bits of bitsandbytes.
    #[must_use]
    pub fn quantizer(&self) -> Option<Quantizer> {
        let format = self.shards.format()?;
        Some(bnb::stated(self.hf.get("quantization_config")).unwrap_or(Quantizer::All(format)))
    }

    /// Elements of the blocks' projections that stay whole where the others are in few bits.
    #[must_use]
    pub fn left_whole(&self) -> usize {
        let left = |slot: &Slot| is_projection(&slot.name) && self.stays_whole(&slot.name);
        slots(&self.config).iter().filter(|slot| left(slot)).map(|slot| slot.rows * slot.cols).sum()
    }

    /// Content of the file `name` that belongs to the model whatever its weights are, if it has one.
    ///
    /// # Errors
    /// When it cannot be read.
    pub fn companion(&self, name: &str) -> Result<Option<String>> {
        if self.embedded.contains_key(name) || matches!(self.layout, Layout::Gguf { .. }) {
            return Ok(self.embedded.get(name).cloned());
        }
        let path = self.dir.join(name);
        match std::fs::read_to_string(&path) {
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(None),
            text => text.map(Some).map_err(Error::io("read", &path)),
        }
    }

    /// All those files.
    ///
    /// # Errors
    /// When one cannot be read.
    pub fn companion_files(&self) -> Result<Vec<(&'static str, Vec<u8>)>> {
        let mut files = write::read(&self.dir, COMPANIONS)?;
        files.retain(|(name, _)| !self.embedded.contains_key(name));
        files.extend(self.embedded.iter().map(|(name, content)| (*name, content.as_bytes().to_vec())));
        Ok(files)
    }

    /// Whether the folder's tensors and config.json are the model's, one for one.
    #[must_use]
    pub fn is_whole(&self) -> bool {
        self.layout == Layout::HuggingFace && self.embedded.is_empty()
    }

    /// Puts all those files into `staging`.
    ///
    /// # Errors
    /// When one cannot be read or written.
    pub fn companions(&self, staging: &Staging) -> Result<()> {
        staging.copy(&self.dir, COMPANIONS)?;
        self.embedded.iter().try_for_each(|(name, content)| staging.write(name, content.as_bytes()))
    }

    /// The files that hold the tensors, with the names of each in the order of their data.
    #[must_use]
    pub fn files(&self) -> BTreeMap<PathBuf, Vec<String>> {
        self.shards.files()
    }

    /// Hash (BLAKE3) of the weights and config.json, by which an adapter knows its base.
    ///
    /// # Errors
    /// When a file cannot be read.
    pub fn content_hash(&self) -> Result<String> {
        let mut hasher = blake3::Hasher::new();
        let configs = ["config.json", litgpt::CONFIG].map(|name| self.dir.join(name));
        let config = configs.into_iter().find(|path| path.is_file());
        for path in self.files().into_keys().chain(config) {
            hasher.update_mmap_rayon(&path).map_err(Error::io("read", &path))?;
        }
        Ok(hasher.finalize().to_hex().to_string())
    }
}

/// Refuses numbers with which nothing can be computed.
fn check_numbers(config: &Config, hf: &HfConfig) -> Result<()> {
    let hint = "download the checkpoint again, or compare the file with the model's page";
    let mut problems = Vec::new();
    let mut check = |key: &str, value: f64, range: std::ops::RangeInclusive<f64>| {
        if !range.contains(&value) {
            problems.push(format!("`{key}` is {value}, which no model has"));
        }
    };
    let positive = 1e-6..=1e18;
    check("rope_theta", config.rope_theta, positive.clone());
    check("rope_theta", config.rope_local_theta.unwrap_or(1.0), positive.clone());
    check("rms_norm_eps", f64::from(config.norm_eps), 0.0..=1.0);
    match config.rope_scaling {
        Scaling::None => {}
        Scaling::Long { ref short, ref long, attention_factor, .. } => {
            let divisors = short.iter().chain(long);
            divisors.for_each(|divisor| check("a divisor of longrope", *divisor, positive.clone()));
            check("rope_scaling.attention_factor", attention_factor, positive);
        }
        Scaling::Linear { factor } => check("rope_scaling.factor", factor, positive),
        Scaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_context } => {
            check("rope_scaling.factor", factor, positive.clone());
            check("rope_scaling.low_freq_factor", low_freq_factor, positive.clone());
            check("rope_scaling.high_freq_factor", high_freq_factor, positive.clone());
            check("original_max_position_embeddings", original_context, positive);
        }
        Scaling::Yarn { factor, beta_fast, beta_slow, original_context, attention_factor, .. } => {
            check("rope_scaling.factor", factor, positive.clone());
            check("rope_scaling.beta_fast", beta_fast, positive.clone());
            check("rope_scaling.beta_slow", beta_slow, positive.clone());
            check("rope_scaling.attention_factor", attention_factor, positive.clone());
            check("original_max_position_embeddings", original_context, positive);
        }
    }
    for key in ["rope_scaling", "rope_parameters"] {
        let Some(object) = hf.get(key) else { continue };
        let kind = object.get("rope_type").or_else(|| object.get("type"));
        if let Some(kind) = kind.filter(|kind| !kind.is_string() && !kind.is_null()) {
            problems.push(format!("`{key}.rope_type` is {kind}, not a name"));
        }
    }
    if problems.is_empty() { Ok(()) } else { Err(Error::invalid(hf.path(), problems.join("; "), hint)) }
}

/// The GGUF file that `path` means: itself, or the one that is its only weights.
///
/// # Errors
/// When there are several.
pub fn gguf_file(path: &Path) -> Result<Option<PathBuf>> {
    if !path.is_dir() || Shards::present(path) || path.join(litgpt::WEIGHTS).is_file() {
        return Ok(path.is_file().then(|| path.to_owned()));
    }
    let mut files = Vec::new();
    for entry in std::fs::read_dir(path).map_err(Error::io("read", path))? {
        let file = entry.map_err(Error::io("read", path))?.path();
        files.extend(Some(file).filter(|file| file.extension().is_some_and(|e| e.eq_ignore_ascii_case("gguf"))));
    }
    files.sort();
    match files.as_slice() {
        [] => Ok(None),
        [file] => Ok(Some(file.clone())),
        [first, ..] => {
            let message = format!("`{}` holds {} GGUF files", path.display(), files.len());
            Err(Error::refused(message, format!("name one of them, as --checkpoint_dir {}", first.display())))
        }
    }
}

/// Whether a folder's only weights are LitGPT's.
#[must_use]
pub fn litgpt_only(dir: &Path) -> bool {
    !Shards::present(dir) && dir.join(litgpt::WEIGHTS).is_file()
}

impl Source for Checkpoint {
    fn codes(&self, name: &str) -> Result<Option<Codes>> {
        let pieces = self.locate(name);
        let [Piece { tensor, rows }] = pieces.as_slice() else { return Ok(None) };
        let codes = self.shards.codes(tensor)?;
        self.shards.release(tensor);
        Ok(match (codes, rows) {
            (Some(codes), Some(rows)) => codes.select(rows),
            (codes, _) => codes,
        })
    }

    fn stays_whole(&self, name: &str) -> bool {
        // Of a folder in few bits, what is not is left so on purpose: rounding it would cost the most.
        self.locate(name).iter().all(|piece| self.shards.leaves_whole(&piece.tensor))
    }

    fn is_bf16(&self, name: &str) -> Result<bool> {
        let mut pieces = self.locate(name).into_iter();
        pieces.try_fold(true, |all, piece| Ok(all && self.dtype(&piece.tensor)? == Dtype::Bf16))
    }

    fn append(&self, name: &str, rows: usize, cols: usize, data: &mut Data) -> Result<()> {
        debug_assert!(rows * cols > 0);
        for piece in self.locate(name) {
            let raw = self.raw(&piece.tensor)?;
            let bytes = match &piece.rows {
                None => Cow::Borrowed(&*raw.bytes),
                Some(ranges) => raw.rows(ranges),
            };
            self.shards.require_finite(&piece.tensor, raw.dtype, &bytes)?;
            convert(raw.dtype, &bytes, data);
            // The model has its own copy now; the file's would count twice.
            self.shards.release(&piece.tensor);
        }
        Ok(())
    }
}

/// Little-endian elements of a file appended to `data` in its own dtype.
fn convert(dtype: Dtype, bytes: &[u8], data: &mut Data) {
    match data {
        Data::F32(out) => grow(out, bytes, dtype.size(), |bytes, out| dtype.decode(bytes, out)),
        Data::Bf16(out) => grow(out, bytes, dtype.size(), |bytes, out| {
            if dtype == Dtype::Bf16 {
                out.iter_mut().zip(bytes.chunks_exact(2)).for_each(|(o, b)| *o = bf16::from_le_bytes([b[0], b[1]]));
            } else {
                let mut wide = vec![0.0; out.len()];
                dtype.decode(bytes, &mut wide);
                out.convert_from_f32_slice(&wide);
            }
        }),
        Data::F16(out) => grow(out, bytes, dtype.size(), |bytes, out| {
            if dtype == Dtype::F16 {
                out.iter_mut().zip(bytes.chunks_exact(2)).for_each(|(o, b)| *o = f16::from_le_bytes([b[0], b[1]]));
            } else {
                let mut wide = vec![0.0; out.len()];
                dtype.decode(bytes, &mut wide);
                out.convert_from_f32_slice(&wide);
            }
        }),
    }
}

/// Appends as many elements as `bytes` has, written by `f` in parallel chunks.
fn grow<T: Default + Clone + Send>(out: &mut Vec<T>, bytes: &[u8], size: usize, f: impl Fn(&[u8], &mut [T]) + Sync) {
    const CHUNK: usize = 1 << 16;
    let at = out.len();
    out.resize(at + bytes.len() / size, T::default());
    out[at..].par_chunks_mut(CHUNK).zip(bytes.par_chunks(CHUNK * size)).for_each(|(out, bytes)| f(bytes, out));
}
