//! `litgpt quantize`: a copy of a model whose weights are kept in few bits, so that it is small on disk and loads at
//! once, here and, but for `nf4-mixed`, in transformers. With `--data`, its 4-bit codes are chosen by what samples of it make of them.

use super::args::{CALIBRATION_LENGTH, FinetuneArgs, QuantizeArgs};
use super::convert::refuse_existing;
use super::finetune::encoder;
use super::load::{Compute, PROMPT_STYLE, fitted, own_tokenizer, quantizer};
use super::resume::hash_ids;
use super::ui::Ui;
use super::{download, recipe};
use crate::checkpoint::bnb;
use crate::checkpoint::convert::Export;
use crate::checkpoint::write::Staging;
use crate::checkpoint::{Checkpoint, Layout, adapter};
use crate::data::Origin;
use crate::data::sft::{Sample, pack};
use crate::error::{Error, Result};
use crate::model::Tokens;
use crate::model::calibrate::Calibration;
use crate::model::quantizer::Quantizer;
use crate::ops::matrix::release_buffers;
use crate::ops::quantized::Format;
use crate::train::settings::FinetuneSettings;
use serde_json::json;
use std::path::{Path, PathBuf};

/// Samples that go through a block at once have at most this many tokens together, but for one that is longer.
const PASS: usize = 2048;

/// Runs the command.
pub fn run(args: &QuantizeArgs, ui: &mut Ui) -> anyhow::Result<()> {
    let dir = args.model.path()?;
    if adapter::is_adapter(&dir) {
        let message = format!("`{}` is an adapter, not a whole model", dir.display());
        return Err(Error::refused(message, "merge it first: litgpt merge_lora").into());
    }
    let out = args.out_dir.clone().map_or_else(|| beside(&dir, &args.quantize), Ok)?;
    refuse_existing(&out)?;
    let checkpoint = Checkpoint::open(&dir)?;
    check_whole(&checkpoint, "use it as it is")?;
    let quantizer = quantizer(Some(&args.quantize), &checkpoint)?.expect("a name was given");
    match args.data.as_deref() {
        Some(_) if quantizer == Quantizer::All(Format::Int8) => {
            let message = "codes of 8 bits are not chosen by samples: rounding changes next to nothing";
            return Err(Error::usage(message, "leave the samples out, or quantize to nf4").into());
        }
        Some(data) => {
            Calibration::serves(&checkpoint.config)?;
            let compute = Compute::find(args.accelerator, None)?;
            let samples = samples(args, data, &checkpoint, ui)?;
            check_memory(need(&checkpoint, &compute, &samples), &compute, ui)?;
            let calibration = calibration(&checkpoint, quantizer, &compute, &samples, ui)?;
            write(&checkpoint, quantizer, Some(calibration), &out, ui)?;
        }
        None => write(&checkpoint, quantizer, None, &out, ui)?,
    }
    ui.note(&format!("wrote {}", out.display()));
    ui.note(&format!("next: litgpt finetune lora --checkpoint_dir {} --data Alpaca", out.display()));
    Ok(())
}

/// Writes the quantized copy of a checkpoint as the folder `out`.
fn write(
    checkpoint: &Checkpoint,
    quantizer: Quantizer,
    calibration: Option<Calibration<'_>>,
    out: &Path,
    ui: &mut Ui,
) -> Result<()> {
    let export = Export { checkpoint, adapters: None, dtype: None };
    let staging = Staging::new(out)?;
    ui.begin("quantize", export.len(Layout::HuggingFace)? as u64, false);
    bnb::write(&export, quantizer, calibration, &staging, &mut |_| ui.advance(1))?;
    ui.end();
    // A GGUF file is a checkpoint itself.
    let beside = if checkpoint.dir.is_file() { checkpoint.dir.parent() } else { Some(checkpoint.dir.as_path()) };
    staging.copy(beside.unwrap_or(Path::new("")), &[PROMPT_STYLE])?;
    staging.commit()
}

/// # Errors
/// When the checkpoint's weights are in few bits.
fn check_whole(checkpoint: &Checkpoint, hint: &str) -> Result<()> {
    if checkpoint.quantizer().is_none() {
        return Ok(());
    }
    Err(Error::refused(format!("`{}` is quantized already", checkpoint.dir.display()), hint))
}

/// Whether a run can choose the codes of its base by samples, if it is to: found out before the work of reading them.
///
/// # Errors
/// When it cannot.
pub(super) fn check_base(settings: &FinetuneSettings, checkpoint: &Checkpoint) -> Result<()> {
    if settings.calibration_samples.is_none() {
        return Ok(());
    }
    check_whole(checkpoint, "leave --calibration_samples out, or take the model in whole")?;
    Calibration::serves(&checkpoint.config)
}

/// The quantized copy that a finetuning with `calibration_samples` trains on, in its output folder: made, unless it is there
/// or beside `resumed` from a run of the same base and samples. Nothing else may write into the output folder.
///
/// # Errors
/// When it cannot be made or read.
pub(super) fn base_of_run(
    settings: &FinetuneSettings,
    (checkpoint, quantizer): (&Checkpoint, Option<Quantizer>),
    compute: &Compute,
    (train, resumed): (&[Sample], Option<&Path>),
    ui: &mut Ui,
) -> Result<Option<Checkpoint>> {
    let (Some(count), Some(quantizer)) = (settings.calibration_samples, quantizer) else { return Ok(None) };
    let samples = calibrated_by(train, count);
    let mut hasher = blake3::Hasher::new();
    hasher.update(checkpoint.content_hash()?.as_bytes());
    samples.iter().for_each(|sample| hash_ids(&mut hasher, sample));
    // What the samples are computed in decides over codes, too.
    hasher.update(format!("{:?}", compute.store()).as_bytes());
    let folder = format!("base-{}-{}", quantizer.name(), &hasher.finalize().to_hex()[..8]);
    let resumed = resumed.and_then(|dir| dir.canonicalize().ok());
    let places = [Some(settings.out_dir.as_path()), resumed.as_deref().and_then(Path::parent)];
    let found = places.into_iter().flatten().map(|dir| dir.join(&folder)).find(|dir| dir.is_dir());
    let out = match found {
        Some(found) => found,
        None => {
            let out = settings.out_dir.join(&folder);
            let calibration = calibration(checkpoint, quantizer, compute, &samples, ui)?;
            write(checkpoint, quantizer, Some(calibration), &out, ui)?;
            // Training has other lengths.
            release_buffers();
            out
        }
    };
    ui.note(&format!("base model: {}", out.display()));
    Checkpoint::open(&out).map(Some)
}

fn calibration<'a>(
    checkpoint: &'a Checkpoint,
    quantizer: Quantizer,
    compute: &'a Compute,
    samples: &[Sample],
    ui: &Ui,
) -> Result<Calibration<'a>> {
    let passes = passes(samples);
    let all: usize = passes.iter().map(|pass| pass.ids.len()).sum();
    let (name, place) = (quantizer.name(), compute.place());
    ui.note(&format!("{name}: codes chosen by {} samples, {all} tokens, on {place}", samples.len()));
    Calibration::new(&checkpoint.config, checkpoint, compute.device.as_ref(), compute.store(), &passes)
}

/// The samples as they go through a block at once.
fn passes(samples: &[Sample]) -> Vec<Tokens> {
    let lengths: Vec<usize> = samples.iter().map(|sample| sample.input_ids.len()).collect();
    let tokens = |rows: Vec<usize>| {
        let mut tokens = Tokens::default();
        rows.iter().for_each(|row| tokens.push(&samples[*row].input_ids, &[], 0));
        tokens
    };
    pack(&lengths, PASS).into_iter().map(tokens).collect()
}

/// Bytes that choosing codes by `samples` takes, of the device and of the host.
fn need(checkpoint: &Checkpoint, compute: &Compute, samples: &[Sample]) -> [usize; 2] {
    let lengths: Vec<usize> = passes(samples).iter().map(|pass| pass.ids.len()).collect();
    let (all, longest) = (lengths.iter().sum(), lengths.iter().copied().max().unwrap_or(0));
    Calibration::bytes(&checkpoint.config, compute.store(), compute.device.is_some(), all, longest)
}

/// Says what memory choosing the codes of a run's base takes, before anything is loaded.
///
/// # Errors
/// When a GPU has less.
pub(super) fn check_need(
    settings: &FinetuneSettings,
    checkpoint: &Checkpoint,
    compute: &Compute,
    train: &[Sample],
    ui: &Ui,
) -> Result<()> {
    let Some(count) = settings.calibration_samples else { return Ok(()) };
    let [there, host] = need(checkpoint, compute, &calibrated_by(train, count));
    let gb = (there + host) as f64 / 1e9;
    ui.note(&format!("memory to choose codes by samples, before training: about {gb:.2} GB"));
    check_memory([there, host], compute, ui)
}

/// Says where choosing codes takes more memory than there is: on a GPU that is an error, on the processor, whose memory can be
/// swapped and freed by others, a warning.
fn check_memory([there, host]: [usize; 2], compute: &Compute, ui: &Ui) -> Result<()> {
    let gb = |bytes: usize| bytes as f64 / 1e9;
    let on_device = compute.device.is_some();
    if let Some(free) = compute.free_memory().filter(|free| on_device && there > *free) {
        let place = compute.place();
        let message =
            format!("choosing codes takes about {:.1} GB of {place}, of which {:.1} are free", gb(there), gb(free));
        return Err(Error::refused(message, "take fewer --calibration_samples, or --accelerator cpu"));
    }
    let host = if on_device { host } else { host + there };
    if let Some(free) = super::ui::available_memory().filter(|free| host > *free) {
        ui.note(&format!(
            "warning: choosing codes takes about {:.1} GB, and {:.1} GB are free; fewer --calibration_samples take less",
            gb(host),
            gb(free)
        ));
    }
    Ok(())
}

/// `count` of the samples, from all over them.
fn chosen<T: Clone>(samples: &[T], count: usize) -> Vec<T> {
    let count = count.min(samples.len());
    (0..count).map(|number| samples[number * samples.len() / count].clone()).collect()
}

/// The training samples that choose a run's codes, as far as they are looked at.
fn calibrated_by(train: &[Sample], count: usize) -> Vec<Sample> {
    let mut samples = chosen(train, count);
    samples.iter_mut().for_each(|sample| sample.input_ids.truncate(CALIBRATION_LENGTH));
    samples
}

/// Training samples of the dataset `data`.
fn samples(args: &QuantizeArgs, data: &str, checkpoint: &Checkpoint, ui: &mut Ui) -> Result<Vec<Sample>> {
    let length = ("train.max_seq_length", json!(args.max_seq_length));
    let given = vec![("checkpoint_dir", json!(checkpoint.dir)), ("data.name", json!(data)), length];
    let settings = recipe::resolve(&FinetuneArgs { given, ..FinetuneArgs::default() })?;
    let tokenizer = fitted(own_tokenizer(checkpoint)?, checkpoint)?;
    let fetcher = download::Fetcher::new(args.access_token.clone(), ui)?;
    let dataset = crate::data::load(&settings.data, &tokenizer, &fetcher)?;
    let encoder = encoder(&settings, checkpoint, &tokenizer, &dataset.style);
    let placed = |(row, error): (Origin, Error)| error.at(&dataset.locate(row));
    encoder.encode_all(&chosen(&dataset.train, args.calibration_samples), &|_| {}).map_err(placed)
}

/// The folder beside `dir` that is named after it and the quantizer.
fn beside(dir: &Path, quantizer: &str) -> Result<PathBuf> {
    let whole = dir.canonicalize().map_err(Error::io("read", dir))?;
    // `.` and `..` have no name of their own.
    let named = if dir.file_name().is_some() { dir } else { &whole };
    let name = if named.is_file() { named.file_stem() } else { named.file_name() };
    let name = format!("{}-{quantizer}", name.unwrap_or_default().to_string_lossy());
    Ok(named.parent().unwrap_or(Path::new("")).join(name))
}
