//! Merging an adapter into its base: a Hugging Face folder, written one tensor at a time in the base's dtypes with the
//! sum taken in f32.
//!
//! Where the adapter was trained on quantized weights, they become what it was trained on: quantized and decoded again,
//! adapted or not. The folder then computes what the unmerged adapter does, but for the rounding to the base's dtype.

use super::convert::Export;
use super::write::{Staging, TensorInfo, safetensors};
use super::{Checkpoint, Dtype, EMBEDDING, HEAD, adapter};
use crate::error::{Error, Result};
use crate::model::Gpt;
use serde_json::Value;
use std::path::Path;

/// Writes the base of `checkpoint` with the adapters of `gpt` merged into `staging`, in `dtype` or the base's own;
/// `progress` is told of each tensor. Files and tensors are the base's, one for one, where those are safetensors;
/// others become safetensors.
///
/// # Errors
/// When a file cannot be read or written.
pub fn merge(
    checkpoint: &Checkpoint,
    gpt: &Gpt,
    staging: &Staging,
    dtype: Option<Dtype>,
    progress: &mut dyn FnMut(&str),
) -> Result<()> {
    let safetensors_only = checkpoint.files().keys().all(|p| p.extension().is_some_and(|e| e == "safetensors"));
    if !checkpoint.is_whole() || !safetensors_only || checkpoint.quantizer().is_some() {
        return Export { checkpoint, adapters: Some(gpt), dtype }.hugging_face(staging, progress);
    }
    let changes = adapter::changes(checkpoint, gpt);
    // A tied head has no tensor of its own; an adapter on it unties it.
    let [embedding, head] = [EMBEDDING, HEAD].map(|name| checkpoint.file_tensor(name));
    let untied = checkpoint.config.tie_embeddings && changes.contains_key(&head);
    for (path, mut names) in checkpoint.files() {
        if checkpoint.config.tie_embeddings {
            names.retain(|n| *n != head);
        }
        let mut sources: Vec<(String, String)> = names.iter().map(|n| (n.clone(), n.clone())).collect();
        if untied && names.contains(&embedding) {
            sources.push((head.clone(), embedding.clone()));
        }
        let mut infos = Vec::new();
        for (name, source) in &sources {
            let raw = checkpoint.raw(source)?;
            infos.push(TensorInfo { name: name.clone(), dtype: dtype.unwrap_or(raw.dtype), shape: raw.shape });
        }
        let file = path.file_name().unwrap_or(path.as_os_str());
        safetensors(&staging.dir().join(file), &infos, |index| {
            let (name, source) = &sources[index];
            progress(name);
            let raw = checkpoint.raw(source)?;
            let (to, changes) = (infos[index].dtype, changes.get(name));
            if changes.is_none() && to == raw.dtype {
                return Ok(raw.bytes.into_owned());
            }
            let mut weight = raw.to_f32();
            changes.into_iter().flatten().for_each(|c| c.apply(&gpt.parameters, &mut weight));
            check_finite(&weight, to, name)?;
            Ok(to.encode(&weight))
        })?;
    }
    checkpoint.companions(staging)?;
    staging.copy(&checkpoint.dir, &["model.safetensors.index.json"])?;
    if let Some(dtype) = dtype {
        record_dtype(staging, dtype)?;
    }
    if untied || checkpoint.untied_by_files() { untie(staging, &head, &embedding) } else { Ok(()) }
}

/// Refuses a sum that its dtype cannot hold.
///
/// # Errors
/// When an element is too large.
pub(super) fn check_finite(weight: &[f32], dtype: Dtype, name: &str) -> Result<()> {
    let limit = if dtype == Dtype::F16 { 65504.0 } else { f32::MAX };
    if weight.iter().all(|w| w.abs() <= limit) {
        return Ok(());
    }
    let message = format!("merging makes `{name}` too large for {}", dtype.name());
    Err(Error::refused(message, "the adapter diverged in training; train again with a smaller learning rate"))
}

/// Changes a JSON file of the folder, if it is there.
fn edit(staging: &Staging, name: &str, change: impl FnOnce(&mut Value)) -> Result<()> {
    let path = staging.dir().join(name);
    if !path.is_file() {
        return Ok(());
    }
    let text = std::fs::read_to_string(&path).map_err(Error::io("read", &path))?;
    let mut json: Value = serde_json::from_str(&text).map_err(|e| Error::invalid(&path, e.to_string(), ""))?;
    change(&mut json);
    staging.write(name, format!("{json:#}").as_bytes())
}

/// config.json of a model in another dtype than its base; transformers 5 calls the key `dtype`.
fn record_dtype(staging: &Staging, dtype: Dtype) -> Result<()> {
    edit(staging, "config.json", |json| {
        let key = if json.get("dtype").is_some() { "dtype" } else { "torch_dtype" };
        json[key] = Value::from(dtype.long_name());
    })
}

/// config.json and the index of a model whose head is now its own.
fn untie(staging: &Staging, head: &str, embedding: &str) -> Result<()> {
    edit(staging, "config.json", |json| json["tie_word_embeddings"] = Value::Bool(false))?;
    edit(staging, "model.safetensors.index.json", |json| {
        if json["weight_map"][head].is_null() {
            json["weight_map"][head] = json["weight_map"][embedding].clone();
        }
    })
}

/// Refuses a folder that is already a whole model where an adapter is wanted.
///
/// # Errors
/// When `dir` is no adapter folder.
pub fn require_adapter(dir: &Path) -> Result<()> {
    if adapter::has_adapter(dir) {
        return Ok(());
    }
    if dir.join("config.json").is_file() {
        let message = format!(
            "`{}` is a whole model, with nothing to merge: it is a base model or was merged before",
            dir.display()
        );
        return Err(Error::refused(message, "use it with `litgpt generate --checkpoint_dir` as it is"));
    }
    let hint = "give the folder that finetuning wrote, as out/lora/final".to_owned();
    Err(Error::Missing { what: "adapter".to_owned(), path: dir.join(adapter::CONFIG), hint })
}
