//! The samples of a run: read, encoded, those that teach nothing left out.

use crate::checkpoint::Checkpoint;
use crate::cli::ui::Ui;
use crate::data::prompt::PromptStyle;
use crate::data::sft::{Encoder, Report as DataReport, Sample, with_mask};
use crate::data::{Content, Dataset, Origin, Record};
use crate::error::{Error, Result};
use crate::tokenizer::Tokenizer;
use crate::train::settings::FinetuneSettings;

/// Training and validation samples; says so where there are none to validate with.
pub(super) fn samples(
    settings: &FinetuneSettings,
    encoder: &Encoder<'_>,
    dataset: &mut Dataset,
    ui: &mut Ui,
) -> Result<(Vec<Sample>, Vec<Sample>)> {
    // As they were read: those that teach nothing leave the dataset.
    let (held_out, rows) = (dataset.val.len(), dataset.train.len() + dataset.val.len());
    let (train, val) = encode(encoder, dataset, ui)?;
    if val.is_empty() {
        without_validation(settings, rows, held_out, ui)?;
    }
    Ok((train, val))
}

/// How a run makes its samples.
pub(in crate::cli) fn encoder<'a>(
    settings: &FinetuneSettings,
    checkpoint: &Checkpoint,
    tokenizer: &'a Tokenizer,
    style: &'a PromptStyle,
) -> Encoder<'a> {
    let context = checkpoint.config.block_size;
    Encoder {
        tokenizer,
        style,
        mask_prompt: settings.data.mask_prompt,
        ignore_index: settings.data.ignore_index,
        max_seq_length: Some(settings.train.max_seq_length.filter(|n| *n > 0).unwrap_or(context).min(context)),
    }
}

/// Training and validation samples, checked and reported on. Records of samples that teach nothing leave the dataset.
fn encode(encoder: &Encoder<'_>, dataset: &mut Dataset, ui: &mut Ui) -> Result<(Vec<Sample>, Vec<Sample>)> {
    // What no row is to blame for.
    encoder.tokenizer.require_eos()?;
    let plain = |record: &Record| matches!(record.content, Content::Text(_));
    if encoder.style.template().is_none() || dataset.train.iter().chain(&dataset.val).any(plain) {
        encoder.tokenizer.require_bos()?;
    }
    ui.begin("tokenize", (dataset.train.len() + dataset.val.len()) as u64, false);
    let placed = |(row, error): (Origin, Error)| error.at(&dataset.locate(row));
    let n_train = dataset.train.len();
    let mut train = encoder.encode_all(&dataset.train, &|done| ui.position(done as u64)).map_err(placed)?;
    let mut val = encoder.encode_all(&dataset.val, &|done| ui.position((n_train + done) as u64)).map_err(placed)?;
    ui.end();
    leave_out_masked(dataset, &mut train, &mut val, ui)?;
    for (what, samples) in [("train", &train), ("val", &val)].into_iter().filter(|(_, samples)| !samples.is_empty()) {
        let report = DataReport::of(samples);
        ui.note(&format!(
            "{what}: {} samples, {} tokens ({} learned), length median {}, 95 % up to {}, longest {}, {} cut at {}",
            report.samples,
            report.tokens,
            report.target_tokens,
            report.median,
            report.p95,
            report.longest,
            report.truncated,
            encoder.max_seq_length.unwrap_or(report.longest)
        ));
    }
    if let Some(first) = train.first() {
        let (open, close) = ui.highlight();
        let text = with_mask(first, encoder.tokenizer, open, close)?;
        ui.note(&format!("{}, learned between {open}marks{close}:\n{text}", dataset.locate(first.row)));
    }
    Ok((train, val))
}

/// What to do about samples of which no token is learned.
const UNMASK: &str = "raise --train.max_seq_length, or set --data.mask_prompt false";

/// Leaves out samples of which no token is learned: alone in a micro batch they would have no loss. One line says how many
/// they are, and which is the first.
///
/// # Errors
/// When none is left to train on.
fn leave_out_masked(dataset: &mut Dataset, train: &mut Vec<Sample>, val: &mut Vec<Sample>, ui: &Ui) -> Result<()> {
    let learned = |sample: &Sample| sample.target_tokens() > 0;
    let masked = train.iter().chain(&*val).filter(|sample| !learned(sample)).map(|sample| sample.row);
    let masked = masked.collect::<Vec<_>>();
    let Some(first) = masked.iter().min_by_key(|row| (row.file, row.row)) else { return Ok(()) };
    let (first, n) = (dataset.locate(*first), masked.len());
    if !train.iter().any(learned) {
        let message = format!("no sample is left to train on: all labels of {n} are masked, the first is {first}");
        return Err(Error::refused(message, UNMASK));
    }
    let all = train.len() + val.len();
    ui.note(&format!(
        "warning: {n} of {all} samples left out, as all their labels are masked and they teach nothing; the first is {first}; {UNMASK}"
    ));
    for (records, samples) in [(&mut dataset.train, train), (&mut dataset.val, val)] {
        let mut kept = samples.iter().map(learned);
        records.retain(|_| kept.next().unwrap_or(true));
        samples.retain(learned);
    }
    Ok(())
}

/// Says that nothing is validated, and why: of `rows` rows none is held out, or all labels of the `held_out` are masked.
///
/// # Errors
/// When the run is to end by its validation loss.
fn without_validation(settings: &FinetuneSettings, rows: usize, held_out: usize, ui: &Ui) -> Result<()> {
    if settings.eval.early_stopping_patience.is_some() {
        // Datasets with validation rows of their own, which take no share, have some: then these are masked.
        let (why, way) = match held_out {
            0 => ("there are no validation rows to go by".to_owned(), "hold out more with --data.val_split_fraction"),
            _ => (format!("all labels of the {held_out} validation samples are masked"), UNMASK),
        };
        return Err(Error::refused(
            format!("--eval.early_stopping_patience: {why}"),
            format!("leave it out, or {way}"),
        ));
    }
    ui.note(&match settings.data.val_split_fraction {
        _ if held_out > 0 => {
            format!("warning: all labels of the {held_out} validation samples are masked, so nothing is validated")
        }
        Some(0.0) => "no row is held out, so nothing is validated".to_owned(),
        _ if rows == 1 => "warning: the only row is trained on, and nothing is validated".to_owned(),
        _ => {
            let least = (10_000.0 / rows as f64).ceil() / 10_000.0;
            format!(
                "warning: {rows} rows are too few to hold one out: all are trained on, and nothing is validated; \
                 --data.val_split_fraction {least} would hold out one"
            )
        }
    });
    Ok(())
}
