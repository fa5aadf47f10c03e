//! What commands share: a model from a folder (base, adapter or merged), with its tokenizer and prompt style.

use super::ui::Ui;
use crate::checkpoint::{Checkpoint, adapter, hub, litgpt};
use crate::data::prompt::PromptStyle;
use crate::error::{Error, Result};
use crate::model::quantizer::Quantizer;
use crate::model::{Gpt, device_error};
use crate::ops::device::Device;
use crate::ops::weight::Store;
use crate::tokenizer::{AddBos, Tokenizer};
use crate::train::settings::{Accelerator, Precision, Switch};
use serde::{Deserialize, Serialize};
use std::path::{Path, PathBuf};

/// File of an adapter folder that says how it came about.
pub const MANIFEST: &str = "litgpt.json";
/// LitGPT's file that names the prompt style.
pub const PROMPT_STYLE: &str = "prompt_style.yaml";

/// How an adapter came about, beyond what PEFT records.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Manifest {
    /// Version of this program.
    pub litgpt_version: String,
    /// Folder of the base model.
    pub base_model: PathBuf,
    /// Hash of the base model's weights and config.json (BLAKE3).
    pub base_hash: String,
    /// Name of the prompt style.
    pub prompt_style: String,
    /// Whether prompts began with the BOS token.
    pub add_bos: bool,
    /// Precision of the training, a name of `--precision`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub precision: Option<String>,
    /// How the base's weights were quantized, a name of `--quantize`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub quantize: Option<String>,
    /// Optimizer steps.
    pub step: usize,
}

impl Manifest {
    /// The manifest of a folder, if it has one.
    ///
    /// # Errors
    /// When it is broken.
    pub fn read(dir: &Path) -> Result<Option<Self>> {
        let path = dir.join(MANIFEST);
        if !path.is_file() {
            return Ok(None);
        }
        let text = std::fs::read_to_string(&path).map_err(Error::io("read", &path))?;
        let parsed = serde_json::from_str(&text);
        parsed.map(Some).map_err(|e| Error::invalid(&path, e.to_string(), "finetune again, or delete the file"))
    }
}

/// Where a model is computed, and how.
#[derive(Debug)]
pub struct Compute {
    /// The GPU; `None` for the processor.
    pub device: Option<Device>,
    /// Number format.
    pub precision: Precision,
}

impl Compute {
    /// For commands whose result is not computed by the model.
    pub const PROCESSOR: Self = Self { device: None, precision: Precision::Bf16True };

    /// The device that is asked for and there, and the precision, which is bf16-true on a GPU and 32-true on the
    /// processor where none is given.
    ///
    /// # Errors
    /// When a GPU is asked for and there is none, or one cannot be used.
    pub fn find(accelerator: Accelerator, precision: Option<Precision>) -> Result<Self> {
        let device = match accelerator {
            Accelerator::Cpu => None,
            Accelerator::Auto | Accelerator::Cuda => Device::cuda(0).map_err(device_error)?,
        };
        if accelerator == Accelerator::Cuda && device.is_none() {
            let (why, hint) = if cfg!(feature = "cuda") {
                ("no NVIDIA GPU or driver was found", "look at `nvidia-smi`, or use --accelerator cpu")
            } else {
                ("this program was built without CUDA", "build it with `--features cuda`, or use --accelerator cpu")
            };
            return Err(Error::refused(format!("--accelerator cuda: {why}"), hint));
        }
        let default = if device.is_some() { Precision::Bf16True } else { Precision::F32True };
        Ok(Self { device, precision: precision.unwrap_or(default) })
    }

    /// Name of where it is computed.
    pub fn place(&self) -> &str {
        self.device.as_ref().map_or("the CPU", Device::name)
    }

    /// Bytes that may still be taken there, where the system tells.
    pub fn free_memory(&self) -> Option<usize> {
        match &self.device {
            Some(device) => device.memory().ok().map(|(free, _)| free),
            None => super::ui::available_memory(),
        }
    }

    /// Bytes that are taken there now: of a GPU all, on the processor this program's; where the system tells.
    pub fn held_memory(&self) -> Option<u64> {
        match &self.device {
            Some(device) => device.memory().ok().map(|(free, all)| (all - free) as u64),
            None => super::ui::memory(),
        }
    }

    /// The most memory that was taken, in words, where the system tells; of a GPU, whose pool keeps what is freed, what is
    /// taken now, by all programs.
    pub fn peak_memory(&self) -> Option<String> {
        let gb = |bytes: u64| format!("{:.2} GB", bytes as f64 / 1e9);
        let host = super::ui::peak_memory().map(gb);
        let Some(device) = &self.device else { return host.map(|host| format!("peak memory {host}")) };
        let host = host.map(|host| format!("; peak memory of the host {host}")).unwrap_or_default();
        self.held_memory().map(|bytes| format!("memory taken on {}: {}{host}", device.name(), gb(bytes)))
    }

    /// How the weights are kept. A GPU multiplies in 16 bit in the mixed precisions too, so it keeps them so; adapters
    /// and optimizer are f32 in all of them.
    pub fn store(&self) -> Store {
        match (self.precision, self.device.is_some()) {
            (Precision::Bf16True, _) | (Precision::Bf16Mixed, true) => Store::Bf16,
            (Precision::F16True, _) | (Precision::F16Mixed, true) => Store::F16,
            (Precision::F32True | Precision::Bf16Mixed | Precision::F16Mixed, _) => Store::F32,
        }
    }
}

/// The quantizer of that name, or the one that the checkpoint's files are in.
///
/// # Errors
/// A name that a newer version wrote, or another than that of the files.
pub fn quantizer(name: Option<&str>, checkpoint: &Checkpoint) -> Result<Option<Quantizer>> {
    let unknown = |name: &str| Error::unsupported(format!("quantizer `{name}`"), "use a newer version");
    let asked = name.map(|name| Quantizer::named(name).ok_or_else(|| unknown(name))).transpose()?;
    let stored = checkpoint.quantizer();
    if let (Some(asked), Some(stored)) = (asked, stored)
        && asked != stored
    {
        let message = format!("--quantize {}: the weights of `{}` are", asked.name(), checkpoint.dir.display());
        let message = format!("{message} in {} already", stored.name());
        return Err(Error::refused(message, "leave the flag out, or take the checkpoint that is not quantized"));
    }
    Ok(asked.or(stored))
}

/// A policy for BOS as settings spell it.
pub fn add_bos(switch: Switch) -> AddBos {
    match switch {
        Switch::Auto => AddBos::Auto,
        Switch::On => AddBos::Always,
        Switch::Off => AddBos::Never,
    }
}

/// The prompt style that a folder records, else the one that the model's name in `model_config.yaml` is known for, else
/// the one that the folder's is.
///
/// # Errors
/// When the recorded style is unknown, or is the chat template of a tokenizer that has none.
pub fn prompt_style(dir: &Path, given: Option<&str>, tokenizer: &Tokenizer) -> Result<PromptStyle> {
    if let Some(name) = given {
        return PromptStyle::resolve(name, tokenizer);
    }
    let path = dir.join(PROMPT_STYLE);
    if path.is_file() {
        return recorded_style(&path, tokenizer);
    }
    let config = dir.join(litgpt::CONFIG);
    // A file that is not needed for more than a name does not stop what works without it.
    let recorded = litgpt::config::read_yaml(&config).ok().and_then(|mut yaml| yaml.remove("name"));
    if let Some(name) = recorded.as_ref().and_then(|name| name.as_str()) {
        return Ok(PromptStyle::for_model(name));
    }
    let absolute = dir.canonicalize().unwrap_or_else(|_| dir.to_owned());
    Ok(PromptStyle::for_model(&absolute.file_name().unwrap_or_default().to_string_lossy()))
}

/// The style that LitGPT's file names.
fn recorded_style(path: &Path, tokenizer: &Tokenizer) -> Result<PromptStyle> {
    let yaml = litgpt::config::read_yaml(path)?;
    let class = litgpt::config::field(&yaml, "class_path").as_str();
    let hint = "write `class_path: litgpt.prompts.STYLE` into it";
    let class = class.ok_or_else(|| Error::invalid(path, "no `class_path:`", hint))?;
    PromptStyle::resolve(class, tokenizer)
        .map_err(|error| Error::invalid(path, error.to_string(), error.hint().unwrap_or_else(|| hint.to_owned())))
}

/// What the user of a command with --prompt_style can do about a recorded style that is wrong.
fn or_given(error: Error) -> Error {
    match error {
        Error::Invalid { path, problem, hint } if path.ends_with(PROMPT_STYLE) => {
            let hint = format!("{hint}; --prompt_style names one in place of the file's");
            Error::Invalid { path, problem, hint }
        }
        other => other,
    }
}

/// The folder `given`; a repository of the Hub that is no folder here is downloaded.
///
/// # Errors
/// When the download fails.
pub fn fetched(given: &Path, token: Option<String>, ui: &mut Ui) -> Result<PathBuf> {
    let dir = super::args::checkpoint_dir(given);
    let name = given.to_string_lossy();
    if dir.exists() || name.ends_with(".gguf") || !hub::is_repo_id(&name) {
        return Ok(dir);
    }
    ui.note(&format!("no folder `{name}`: downloading it from the Hub"));
    super::download::repository(&name, None, token, false, Path::new("checkpoints"), ui)
}

/// A model ready to use.
pub struct Loaded {
    /// The model, with its adapters if the folder is one.
    pub gpt: Gpt,
    /// Its tokenizer, with the BOS policy of its training.
    pub tokenizer: Tokenizer,
    /// Its prompt style.
    pub style: PromptStyle,
}

/// Folder of an adapter's base: the given one, or the recorded one.
///
/// # Errors
/// When it is not there.
pub fn base_dir(dir: &Path, given: Option<&Path>) -> Result<PathBuf> {
    if let Some(given) = given {
        return Ok(super::args::checkpoint_dir(given));
    }
    let (named, recorded) = match Manifest::read(dir)? {
        Some(manifest) => (manifest.base_model, "litgpt.json as `base_model`"),
        None if dir.join(adapter::CONFIG).is_file() => {
            (adapter::base_of(dir)?.into(), "adapter_config.json as `base_model_name_or_path`")
        }
        None => (adapter::base_of(dir)?.into(), "hyperparameters.yaml as `checkpoint_dir`"),
    };
    // LitGPT records the path as it was typed: relative to where it ran, which is often above the output.
    let absolute = dir.canonicalize().unwrap_or_else(|_| dir.to_owned());
    let above = absolute.ancestors().flat_map(|dir| [dir.join(&named), dir.join("checkpoints").join(&named)]);
    // A run's own quantized base moves with it.
    let beside = named.file_name().and_then(|name| Some(absolute.parent()?.join(name)));
    let candidates = [named.clone(), PathBuf::from("checkpoints").join(&named)].into_iter().chain(above).chain(beside);
    let usable = |c: &PathBuf| c.exists() && c.canonicalize().is_ok_and(|c| c != absolute);
    candidates.into_iter().find(usable).ok_or_else(|| Error::Missing {
        what: format!("base model of the adapter `{}`", dir.display()),
        path: named,
        hint: format!("put it back there, or write its folder into the adapter's {recorded}"),
    })
}

/// Loads a checkpoint's weights, showing progress.
///
/// # Errors
/// When a tensor cannot be read.
pub fn weights(checkpoint: &Checkpoint, compute: &Compute, quantizer: Option<Quantizer>, ui: &mut Ui) -> Result<Gpt> {
    ui.begin("load", checkpoint.config.n_layer as u64, false);
    let (device, store) = (compute.device.as_ref(), compute.store());
    let gpt = Gpt::load_on(device, &checkpoint.config, checkpoint, store, quantizer, &mut |_| ui.advance(1));
    ui.end();
    gpt
}

/// The model in `dir`: a base or merged model, or an adapter on its base, which is quantized as it was in training where
/// `quantize` says nothing else.
///
/// # Errors
/// When anything is missing or does not fit.
pub fn model(
    dir: &Path,
    compute: &Compute,
    quantize: Option<&str>,
    style: Option<&str>,
    ui: &mut Ui,
) -> Result<Loaded> {
    let manifest = Manifest::read(dir)?;
    let is_adapter = adapter::is_adapter(dir);
    let base = if is_adapter { base_dir(dir, None)? } else { dir.to_owned() };
    let checkpoint = Checkpoint::open(&base)?;
    let tokenizer = tokenizer(dir, &checkpoint)?;
    let styled = if dir.join(PROMPT_STYLE).is_file() { dir } else { &base };
    let style = prompt_style(styled, style, &tokenizer).map_err(or_given)?;
    let manifest = manifest.filter(|_| is_adapter);
    let trained = manifest.as_ref().and_then(|m| m.quantize.as_deref());
    let quantizer = quantizer(quantize.or(trained), &checkpoint)?;
    // Hashing reads the files that are being loaded, while they are in memory.
    let (gpt, hash) = std::thread::scope(|scope| {
        let hash = manifest.as_ref().map(|_| scope.spawn(|| checkpoint.content_hash()));
        let gpt = weights(&checkpoint, compute, quantizer, ui);
        (gpt, hash.and_then(|hash| hash.join().ok()).transpose())
    });
    let (mut gpt, hash) = (gpt?, hash?);
    if manifest.is_some_and(|manifest| hash.is_some_and(|hash| hash != manifest.base_hash)) {
        ui.note(&format!("warning: {}", changed_base(&checkpoint)));
    }
    if is_adapter {
        adapter::load(dir, checkpoint.family, &mut gpt)?;
    }
    Ok(Loaded { gpt, tokenizer, style })
}

/// That the base is another than in training.
pub fn changed_base(checkpoint: &Checkpoint) -> String {
    format!(
        "the base model `{}` is not what the adapter was trained on: its weights or config.json changed",
        checkpoint.dir.display()
    )
}

/// The tokenizer of `dir`, or of its base where it has none, with the BOS policy of its training.
///
/// # Errors
/// When it is broken or has more tokens than the model.
pub fn tokenizer(dir: &Path, checkpoint: &Checkpoint) -> Result<Tokenizer> {
    let policy = match Manifest::read(dir)? {
        Some(m) if m.add_bos => AddBos::Always,
        Some(_) => AddBos::Never,
        None => AddBos::Auto,
    };
    let own = adapter::has_adapter(dir) && dir.join("tokenizer.json").is_file();
    let tokenizer = if own { Tokenizer::load(dir)? } else { own_tokenizer(checkpoint)? };
    Ok(fitted(tokenizer, checkpoint)?.with_bos(policy))
}

/// The tokenizer of a checkpoint.
///
/// # Errors
/// When it is missing or broken.
pub fn own_tokenizer(checkpoint: &Checkpoint) -> Result<Tokenizer> {
    Tokenizer::of(&checkpoint.dir, &|name| checkpoint.companion(name))
}

/// The tokenizer for the checkpoint's model.
///
/// # Errors
/// When the model has no embeddings for what it needs.
pub fn fitted(tokenizer: Tokenizer, checkpoint: &Checkpoint) -> Result<Tokenizer> {
    let rows = checkpoint.config.vocab_size;
    let problems = tokenizer.ids_beyond(rows);
    if problems.is_empty() {
        return Ok(tokenizer.for_model(rows));
    }
    let what = format!("tokenizer and weights of `{}` do not belong together", checkpoint.dir.display());
    Err(Error::Mismatch { what, problems, hint: "download the checkpoint again".to_owned() })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The quickstart model's.
    fn own() -> Tokenizer {
        Tokenizer::load(&Path::new(env!("CARGO_MANIFEST_DIR")).join("data/tiny")).unwrap()
    }

    #[test]
    fn the_models_name_in_its_config_beats_the_folders() {
        let root = tempfile::tempdir().unwrap();
        let dir = root.path().join("Llama-3-8B-Instruct");
        std::fs::create_dir(&dir).unwrap();
        let style = || prompt_style(&dir, None, &own()).unwrap();
        assert_eq!(style().name(), "llama3");
        std::fs::write(dir.join(litgpt::CONFIG), "n_layer: 2\nname: Gemma-2b-it\n").unwrap();
        assert_eq!(style().name(), "gemma");
        std::fs::write(dir.join(litgpt::CONFIG), "n_layer: 2\n").unwrap();
        assert_eq!(style().name(), "llama3");
        for broken in ["name: [\n", "name: a\nname: b\n", "name: 3\n", ""] {
            std::fs::write(dir.join(litgpt::CONFIG), broken).unwrap();
            assert_eq!(style().name(), "llama3", "{broken}");
        }
        std::fs::write(dir.join(PROMPT_STYLE), "class_path: litgpt.prompts.Alpaca\n").unwrap();
        assert_eq!(style().name(), "alpaca");
    }

    #[test]
    fn a_recorded_style_is_yaml() {
        let dir = tempfile::tempdir().unwrap();
        let style = |text: &str| {
            std::fs::write(dir.path().join(PROMPT_STYLE), text).unwrap();
            prompt_style(dir.path(), None, &own())
        };
        for text in ["# ours\nclass_path : \"litgpt.prompts.Phi2\" # a comment\n", "{class_path: litgpt.prompts.Phi2}"]
        {
            assert_eq!(style(text).unwrap().name(), "phi-2", "{text}");
        }
        let error = style("class_path: my.styles.Own\n").unwrap_err();
        assert!(error.to_string().contains("prompt_style.yaml`: no prompt style is called `my.styles.Own`"), "{error}");
        for (text, says) in [
            ("class_path: my.styles.Own\n", "no prompt style is called `my.styles.Own`"),
            ("class: x\n", "no `class_path:`"),
            ("class_path: a\n---\nclass_path: b\n", "more than one document"),
            ("class_path: a\nclass_path: b\n", "duplicate"),
        ] {
            let error = style(text).unwrap_err();
            assert!(error.to_string().contains(says) && !error.to_string().contains("Policy"), "{error}");
            // Not every command has the flag.
            assert!(!error.hint().unwrap().contains("--prompt_style"), "{error}");
            assert!(or_given(error).hint().unwrap().contains("; --prompt_style names one"));
        }
    }
}
