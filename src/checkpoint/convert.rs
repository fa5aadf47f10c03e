//! Writing a checkpoint in the other layout, with or without adapters merged into it: Hugging Face's folder from
//! LitGPT's, and the other way. One tensor of the result is in memory at a time; what no adapter changes and no dtype
//! converts is copied bit for bit.

use super::litgpt::{self, Qkv};
use super::merge::check_finite;
use super::write::{SHARD, Staging, TensorInfo, sharded};
use super::{Checkpoint, Dtype, EMBEDDING, HEAD, Layout, pickle};
use crate::error::{Error, Result};
use crate::model::families::{HfConfig, Piece, Slot, is_projection, slots};
use crate::model::{Gpt, Source};
use crate::ops::weight::Data;
use serde_json::{Value, json};
use std::borrow::Cow;
use std::ops::Range;
use std::path::Path;

/// What is written.
#[derive(Debug, Clone, Copy)]
pub struct Export<'a> {
    /// The weights.
    pub checkpoint: &'a Checkpoint,
    /// The model whose adapters are merged into them.
    pub adapters: Option<&'a Gpt>,
    /// The dtype; `None` for that of each tensor.
    pub dtype: Option<Dtype>,
}

/// A tensor of the result.
pub(super) struct Target {
    pub(super) info: TensorInfo,
    width: usize,
    parts: Vec<Part>,
}

impl Target {
    /// Whether it is the matrix of a block's projections.
    pub(super) fn is_projection(&self) -> bool {
        self.names().all(is_projection)
    }

    /// Our tensors that it is made of.
    pub(super) fn names(&self) -> impl Iterator<Item = &str> {
        self.parts.iter().map(|part| part.name.as_str())
    }

    /// Our tensors of which it holds all rows, taken out of its `values`.
    pub(super) fn split(&self, values: &[f32]) -> impl Iterator<Item = (&str, Vec<f32>)> {
        let rows = |rows: &Range<usize>| &values[rows.start * self.width..rows.end * self.width];
        self.parts.iter().map(move |part| (part.name.as_str(), part.to.iter().flat_map(rows).copied().collect()))
    }
}

/// A tensor of ours, or some rows of it, within a [`Target`].
struct Part {
    name: String,
    /// Rows of ours.
    from: Range<usize>,
    /// Rows of the target that they become.
    to: Vec<Range<usize>>,
}

impl Export<'_> {
    /// Whether the head is tied to the embedding and the adapters leave it so.
    fn tied(&self) -> bool {
        self.checkpoint.config.tie_embeddings && self.adapted("lm_head").is_none()
    }

    /// Makes the checkpoint's matrix of module `name` the model's, if that is adapted or quantized.
    fn adapted(&self, name: &str) -> Option<impl FnOnce(&mut [f32])> {
        let gpt = self.adapters?;
        gpt.linears().find_map(|linear| {
            let part = linear.parts.iter().find(|part| part.name == name && linear.changes(part))?;
            Some(move |weight: &mut [f32]| linear.merge(part, &gpt.parameters, weight))
        })
    }

    /// The file's tensor that our tensor is read from; an untied head begins as the embedding.
    fn source<'a>(&self, name: &'a str) -> &'a str {
        if name == HEAD && self.checkpoint.config.tie_embeddings { EMBEDDING } else { name }
    }

    fn dtype_of(&self, name: &str) -> Result<Dtype> {
        let piece = self.checkpoint.locate(self.source(name)).swap_remove(0);
        Ok(self.dtype.unwrap_or(self.checkpoint.dtype(&piece.tensor)?))
    }

    /// Our tensors of the result: the model's, and the head if adapters untie it.
    pub(super) fn slots(&self) -> Vec<Slot> {
        let mut all = slots(&self.checkpoint.config);
        if self.checkpoint.config.tie_embeddings && !self.tied() {
            let embedding = all.iter().find(|s| s.name == EMBEDDING).cloned();
            all.extend(embedding.map(|slot| Slot { name: HEAD.to_owned(), ..slot }));
        }
        all
    }

    /// The tensors of a folder of `layout`.
    pub(super) fn targets(&self, layout: Layout) -> Result<Vec<Target>> {
        let mut targets: Vec<Target> = Vec::new();
        for slot in self.slots() {
            let (rows, width) = if slot.vector { (slot.cols, 1) } else { (slot.rows, slot.cols) };
            let pieces = self.checkpoint.locate_in(layout, &slot.name);
            let share = rows / pieces.len().max(1);
            let mut at = 0;
            for Piece { tensor, rows } in pieces {
                let len = rows.as_ref().map_or(share, |rows| rows.iter().map(Range::len).sum());
                let from = at..at + len;
                at += len;
                let part = Part {
                    name: slot.name.clone(),
                    from,
                    to: rows.unwrap_or_else(|| std::iter::once(0..share).collect()),
                };
                if let Some(target) = targets.iter_mut().rev().find(|t| t.info.name == tensor) {
                    target.info.shape[0] += len;
                    target.parts.push(part);
                } else {
                    let shape = if slot.vector { vec![len] } else { vec![len, width] };
                    let info = TensorInfo { name: tensor, dtype: self.dtype_of(&slot.name)?, shape };
                    targets.push(Target { info, width, parts: vec![part] });
                }
            }
        }
        Ok(targets)
    }

    pub(super) fn content(&self, target: &Target) -> Result<Vec<u8>> {
        let row = target.width * target.info.dtype.size();
        let mut out = vec![0; target.info.bytes()];
        for part in &target.parts {
            let bytes = self.tensor(&part.name, target.info.dtype, target.width)?;
            let mut from = part.from.start;
            for rows in &part.to {
                let bytes = bytes.get(from * row..(from + rows.len()) * row);
                let place = out.get_mut(rows.start * row..rows.end * row);
                let (Some(bytes), Some(place)) = (bytes, place) else {
                    let problem = format!("tensor `{}` does not fit its place in the new layout", part.name);
                    return Err(Error::invalid(&self.checkpoint.dir, problem, super::AGAIN));
                };
                place.copy_from_slice(bytes);
                from += rows.len();
            }
        }
        Ok(out)
    }

    /// The bytes of our tensor `name`, with its adapter merged.
    pub(super) fn tensor(&self, name: &str, dtype: Dtype, width: usize) -> Result<Cow<'_, [u8]>> {
        let source = self.source(name);
        let merge = name.strip_suffix(".weight").and_then(|module| self.adapted(module));
        let pieces = self.checkpoint.locate(source);
        if merge.is_none() && self.checkpoint.dtype(&pieces[0].tensor)? == dtype {
            return self.bytes(&pieces);
        }
        let mut data = Data::F32(Vec::new());
        self.checkpoint.append(source, 1, width.max(1), &mut data)?;
        let Data::F32(mut values) = data else { unreachable!("`append` keeps the store") };
        if let Some(merge) = merge {
            merge(&mut values);
        }
        check_finite(&values, dtype, name)?;
        Ok(dtype.encode(&values).into())
    }

    /// The bytes of `pieces`, below one another.
    fn bytes(&self, pieces: &[Piece]) -> Result<Cow<'_, [u8]>> {
        if let [Piece { tensor, rows: None }] = pieces {
            return Ok(self.checkpoint.raw(tensor)?.bytes);
        }
        let mut out = Vec::new();
        for piece in pieces {
            let raw = self.checkpoint.raw(&piece.tensor)?;
            match &piece.rows {
                None => out.extend_from_slice(&raw.bytes),
                Some(rows) => out.extend_from_slice(&raw.rows(rows)),
            }
        }
        Ok(out.into())
    }

    /// Number of tensors that `progress` will be told of.
    ///
    /// # Errors
    /// When a tensor is missing.
    pub fn len(&self, layout: Layout) -> Result<usize> {
        Ok(self.targets(layout)?.len())
    }

    /// Fills `staging` as a Hugging Face folder with safetensors.
    ///
    /// # Errors
    /// When a file cannot be read or written.
    pub fn hugging_face(&self, staging: &Staging, progress: &mut dyn FnMut(&str)) -> Result<()> {
        let targets = self.targets(Layout::HuggingFace)?;
        let entries: Vec<_> = targets.iter().map(|target| target.info.entry()).collect();
        sharded(staging, SHARD, &entries, |index| {
            progress(&entries[index].name);
            self.content(&targets[index])
        })?;
        self.companions(staging)
    }

    /// Writes LitGPT's weights to `path`.
    ///
    /// # Errors
    /// When a file cannot be read or written.
    pub fn litgpt_weights(&self, path: &Path, progress: &mut dyn FnMut(&str)) -> Result<()> {
        let targets = self.targets(Layout::Litgpt(Qkv::Below))?;
        let infos: Vec<TensorInfo> = targets.iter().map(|t| t.info.clone()).collect();
        let embedding = infos.iter().position(|i| i.name == "transformer.wte.weight");
        // LitGPT's models have a head in any case; a tied one shares the embedding's bytes.
        let shared: Vec<(&str, usize)> = embedding.filter(|_| self.tied()).map(|i| (HEAD, i)).into_iter().collect();
        pickle::save(path, &infos, &shared, |index| {
            progress(&infos[index].name);
            self.content(&targets[index])
        })
    }

    /// `model_config.yaml` of the model that LitGPT is to call `name`.
    ///
    /// # Errors
    /// When LitGPT has no words for the architecture.
    pub fn litgpt_config(&self, name: &str) -> Result<String> {
        let map = litgpt::config::describe(&self.checkpoint.config, name).map_err(|problems| {
            let what = format!("`{}` as a LitGPT model: {}", self.checkpoint.dir.display(), problems.join("; "));
            Error::unsupported(what, "use the Hugging Face folder")
        })?;
        Ok(litgpt::config::to_yaml(&map))
    }

    /// Fills `staging` as a LitGPT folder of the model `name`.
    ///
    /// # Errors
    /// When LitGPT has no words for the architecture, or a file cannot be read or written.
    pub fn litgpt(&self, staging: &Staging, name: &str, progress: &mut dyn FnMut(&str)) -> Result<()> {
        staging.write(litgpt::CONFIG, self.litgpt_config(name)?.as_bytes())?;
        self.litgpt_weights(&staging.dir().join(litgpt::WEIGHTS), progress)?;
        self.companions(staging)
    }

    /// Copies tokenizer and generation files, and config.json with what became different.
    fn companions(&self, staging: &Staging) -> Result<()> {
        self.companions_with(staging, &[])
    }

    /// The same with `more` keys in config.json.
    pub(super) fn companions_with(&self, staging: &Staging, more: &[(&str, Value)]) -> Result<()> {
        self.checkpoint.companions(staging)?;
        let (checkpoint, hf) = (self.checkpoint, &self.checkpoint.hf);
        let mut keys = hf.keys().clone();
        // Weights in few bits are written in whole, unless `more` says otherwise.
        keys.remove("quantization_config");
        keys.extend(more.iter().map(|(key, value)| ((*key).to_owned(), value.clone())));
        let stated = (checkpoint.family.config)(&HfConfig::of(hf.path(), keys.clone()))?;
        if stated.tie_embeddings != self.tied() {
            keys.insert("tie_word_embeddings".to_owned(), Value::Bool(self.tied()));
        }
        if stated.vocab_size != checkpoint.config.vocab_size {
            keys.insert("vocab_size".to_owned(), json!(checkpoint.config.vocab_size));
        }
        if let Some(dtype) = self.dtype {
            let key = if keys.contains_key("dtype") { "dtype" } else { "torch_dtype" };
            keys.insert(key.to_owned(), json!(dtype.long_name()));
        }
        if !checkpoint.dir.join("config.json").is_file() || keys != *hf.keys() {
            staging.write("config.json", format!("{:#}", Value::Object(keys)).as_bytes())?;
        }
        Ok(())
    }
}

/// What LitGPT would call a model of the folder `dir`: as its `model_config.yaml` has it, else the folder's name, with
/// the words that LitGPT looks for.
#[must_use]
pub fn litgpt_name(checkpoint: &Checkpoint, dir: &Path) -> String {
    let recorded = litgpt::config::read_yaml(&checkpoint.dir.join(litgpt::CONFIG)).ok();
    if let Some(name) = recorded.and_then(|yaml| yaml.get("name")?.as_str().map(str::to_owned)) {
        return name;
    }
    let absolute = dir.canonicalize().unwrap_or_else(|_| dir.to_owned());
    let last = if absolute.is_file() { absolute.file_stem() } else { absolute.file_name() };
    let name = last.unwrap_or_default().to_string_lossy().into_owned();
    let config = &checkpoint.config;
    if config.norm_unit_offset {
        let name = name.replace("codegemma", "CodeGemma").replace("gemma", "Gemma");
        let version = match checkpoint.hf.model_type() {
            Ok("gemma2") => "Gemma-2",
            Ok("gemma3_text") => "Gemma-3",
            _ => "Gemma",
        };
        return if name.contains("Gemma") { name } else { format!("{version}-{name}") };
    }
    let name = name.replace("Gemma", "gemma");
    if !config.norm_weight && !name.contains("OLMo") { format!("OLMo-{name}") } else { name }
}
