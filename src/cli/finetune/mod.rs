//! `litgpt finetune lora`: builds the parts of a run from its settings, trains, saves.

mod outside;
mod preflight;
mod samples;

use super::args::FinetuneArgs;
use super::folders::{self, BEST, Folders};
use super::load::{Compute, add_bos, fetched, fitted, own_tokenizer, quantizer, weights};
use super::resume::{self, MadeOf};
use super::signals::Signals;
use super::ui::Ui;
use super::{download, quantize, recipe};
use crate::checkpoint::Checkpoint;
use crate::data::Dataset;
use crate::error::{Error, Result};
use crate::model::Gpt;
use crate::model::lora::{LoraConfig, Targets};
use crate::model::quantizer::Quantizer;
use crate::train::estimate::Computed;
use crate::train::page::Page;
use crate::train::report::{Metrics, Summary};
use crate::train::settings::{FinetuneSettings, Precision};
use crate::train::tensorboard::TensorBoard;
use crate::train::{FINAL, Job, Plan, fit, is_over, side_by_side};
use outside::Run;
use preflight::computed;
pub(super) use samples::encoder;
use samples::samples;
use std::path::Path;

/// Runs the command.
pub fn run(args: &FinetuneArgs, ui: &mut Ui) -> anyhow::Result<()> {
    let mut settings = recipe::resolve(args)?;
    if let Some(what) = &args.print_config {
        return ui.result(&recipe::print_config(&settings, what)?);
    }
    settings.checkpoint_dir = fetched(&settings.checkpoint_dir, settings.access_token.clone(), ui)?;
    check_out_dir(&settings.out_dir)?;
    let checkpoint = Checkpoint::open(&settings.checkpoint_dir)?;
    let quantizer = quantizer(settings.quantize.as_deref(), &checkpoint)?;
    quantize::check_base(&settings, &checkpoint)?;
    let tokenizer = fitted(own_tokenizer(&checkpoint)?, &checkpoint)?.with_bos(add_bos(settings.add_bos));
    let fetcher = download::Fetcher::new(settings.access_token.clone(), ui)?;
    let mut dataset = crate::data::load(&settings.data, &tokenizer, &fetcher)?;
    let style = dataset.style.clone();
    let encoder = encoder(&settings, &checkpoint, &tokenizer, &style);
    let (train, val) = samples(&settings, &encoder, &mut dataset, ui)?;
    let packs = side_by_side(&settings, &train);
    let plan = Plan::new(&settings, packs.len())?;
    let compute = Compute::find(settings.accelerator, settings.precision)?;
    settings.precision = Some(compute.precision);
    describe(&settings, &compute, &dataset, &plan, ui);
    if settings.data.pack {
        ui.note(&format!("packed: {} samples side by side in {}", train.len(), packs.len()));
    }
    let Computed { checkpointing, prefix, .. } =
        computed(&mut settings, &checkpoint, &compute, quantizer, [&train, &val], &packs, ui)?;
    quantize::check_need(&settings, &checkpoint, &compute, &train, ui)?;
    if settings.dry_run {
        ui.note("nothing was trained: --dry_run");
        return Ok(());
    }
    let _lock = resume::lock(&settings.out_dir)?;
    let from = resume::From::find(&settings, ui)?;
    let made = from.as_ref().map(|from| from.dir.as_path());
    let recorded = from.as_ref().map_or("", |from| &from.state.made_of.base_hash);
    let mut made_of = MadeOf::of(&settings, [&train, &val], recorded)?;
    if let Some(from) = from.as_ref().filter(|_| !settings.resume_force) {
        from.check(&made_of, false, ui)?; // before a base is made, which takes its time
    }
    let companions = checkpoint.companion_files()?;
    let base = quantize::base_of_run(&settings, (&checkpoint, quantizer), &compute, (&train, made), ui)?;
    let checkpoint = base.unwrap_or(checkpoint);
    let base_hash = checkpoint.content_hash()?;
    let mut gpt = trainable(&settings, &checkpoint, &compute, quantizer, ui)?;
    let mut job =
        Job { gpt: &mut gpt, train: &train, packs: &packs, val: &val, settings: &settings, checkpointing, prefix };
    made_of.base_hash.clone_from(&base_hash);
    if let Some(from) = &from {
        from.check(&made_of, settings.resume_force, ui)?;
    }
    let folders = Folders::open(&settings.out_dir, &settings.train, from.as_ref())?;
    if from.as_ref().is_some_and(|from| !goes_on(from, &settings, &plan, ui)) {
        return Ok(());
    }
    let start = from.as_ref().map(|from| Ok((from.state.progress, from.restore(job.gpt)?))).transpose();
    let start = start.map_err(|e: Error| e)?;
    let signals = Signals::listen()?;
    let (metrics, tensorboard) = loggers(&settings, from.as_ref())?;
    let mut outside = Run {
        ui,
        compute: &compute,
        metrics,
        folders,
        tensorboard,
        page: Page::default(),
        settings: &settings,
        checkpoint: &checkpoint,
        base: checkpoint.dir.canonicalize().map_err(Error::io("read", &checkpoint.dir))?,
        companions,
        tokenizer: &tokenizer,
        dataset: &dataset,
        encoder,
        base_hash,
        made_of,
        signals,
    };
    let summary = fit(&mut job, &mut outside, start)?;
    finish(&mut outside, &summary)
}

/// The model with its frozen weights and new adapters.
fn trainable(
    settings: &FinetuneSettings,
    checkpoint: &Checkpoint,
    compute: &Compute,
    quantizer: Option<Quantizer>,
    ui: &mut Ui,
) -> Result<Gpt> {
    let mut gpt = weights(checkpoint, compute, quantizer, ui)?;
    attach(&mut gpt, settings);
    ui.note(&format!(
        "{} trainable of {} parameters, frozen weights {:.2} GB{}",
        millions(gpt.parameters.cols()),
        millions(gpt.config.parameters()),
        gpt.weight_bytes() as f64 / 1e9,
        quantizer.map_or_else(String::new, |quantizer| format!(", those of the blocks in {}", quantizer.name()))
    ));
    Ok(gpt)
}

/// Whether a run that was saved has steps left, and says from where it goes on.
fn goes_on(from: &resume::From, settings: &FinetuneSettings, plan: &Plan, ui: &Ui) -> bool {
    let over = from.finished() && is_over(settings, plan, &from.state.progress);
    let dir = from.dir.display();
    ui.note(&if over {
        format!(
            "nothing to do: `{dir}` is the end of this run; a larger --train.max_steps or --train.epochs, with \
             --resume_force true, goes on"
        )
    } else {
        format!("resuming from {dir} at step {}", from.state.progress.step)
    });
    !over
}

/// What the settings have the steps written to: new files, or those of the run that goes on.
fn loggers(
    settings: &FinetuneSettings,
    from: Option<&resume::From>,
) -> anyhow::Result<(Option<Metrics>, Option<TensorBoard>)> {
    let out_dir = &settings.out_dir;
    let metrics = match from.filter(|from| from.name_in(out_dir).is_some()) {
        _ if settings.logger_name == "none" => None,
        Some(from) => Some(Metrics::resume(out_dir, from.state.metrics_bytes)?),
        None => Some(Metrics::create(out_dir)?),
    };
    let tensorboard = match settings.logger_name.as_str() {
        "tensorboard" => Some(TensorBoard::create(out_dir, from.map_or(0, |from| from.state.progress.step + 1))?),
        _ => None,
    };
    Ok((metrics, tensorboard))
}

/// Writes the page and says how the run went.
///
/// # Errors
/// When a signal stopped it.
fn finish(outside: &mut Run<'_>, summary: &Summary) -> anyhow::Result<()> {
    let out_dir = &outside.settings.out_dir;
    // The adapter is saved: a page that cannot be written must not make the run fail.
    if outside.metrics.is_some()
        && let Err(error) = outside.page.write(out_dir, &serde_json::to_value(outside.settings)?, summary)
    {
        outside.ui.note(&format!("no report.html: {error}"));
    }
    if let Some(stopped) = outside.signals.asked().filter(|_| summary.stopped) {
        outside.ui.end();
        outside.ui.note(&format!(
            "stopped at step {}; the same command with --resume auto goes on exactly there",
            summary.at.step
        ));
        return Err(stopped.into());
    }
    close(summary, out_dir, outside.compute, outside.ui);
    Ok(())
}

/// An output folder that cannot be one is found out before the work, and without making it.
fn check_out_dir(out_dir: &Path) -> Result<()> {
    let existing = out_dir.ancestors().find(|p| p.exists()).unwrap_or(Path::new("."));
    if !existing.is_dir() {
        let message = format!("--out_dir `{}`: `{}` is a file", out_dir.display(), existing.display());
        return Err(Error::refused(message, "choose another --out_dir"));
    }
    folders::check(out_dir)?;
    let existing = if existing.as_os_str().is_empty() { Path::new(".") } else { existing };
    tempfile::tempfile_in(existing).map(drop).map_err(Error::io("write in", existing))
}

fn describe(settings: &FinetuneSettings, compute: &Compute, dataset: &Dataset, plan: &Plan, ui: &Ui) {
    let precision = compute.precision;
    ui.note(&format!(
        "{precision} on {}, prompt style {}, {} steps of {} x {} samples, lr {:e}",
        compute.place(),
        dataset.style.name(),
        plan.steps,
        plan.accumulate,
        settings.train.micro_batch_size,
        settings.optimizer.learning_rate
    ));
    if compute.device.is_none() && matches!(precision, Precision::Bf16Mixed | Precision::F16Mixed) {
        ui.note(&format!(
            "{precision} keeps f32 weights, and the CPU computes in f32 with them: use bf16-true to halve their memory"
        ));
    }
}

fn attach(gpt: &mut Gpt, settings: &FinetuneSettings) {
    let lora = &settings.lora;
    let targets = Targets {
        query: lora.lora_query,
        key: lora.lora_key,
        value: lora.lora_value,
        projection: lora.lora_projection,
        mlp: lora.lora_mlp,
        head: lora.lora_head,
    };
    let config = LoraConfig { r: lora.lora_r, alpha: lora.lora_alpha, rslora: false, dropout: lora.lora_dropout };
    gpt.attach(|name| targets.contains(name).then_some(config));
    gpt.initialize_adapters(settings.seed);
}

fn millions(count: usize) -> String {
    if count >= 1_000_000 { format!("{:.1} M", count as f64 / 1e6) } else { format!("{:.1} k", count as f64 / 1e3) }
}

fn close(summary: &Summary, out_dir: &Path, compute: &Compute, ui: &Ui) {
    let at = &summary.at;
    let skipped = if at.skipped > 0 { format!(", {} of them skipped", at.skipped) } else { String::new() };
    let rate = at.tokens as f64 / at.seconds;
    let shared = match (100.0 * summary.shared).round() {
        0.0 => String::new(),
        percent => format!(" ({percent} % of them in beginnings that samples share, computed once)"),
    };
    ui.note(&format!(
        "done: {} steps{skipped}, {} tokens{shared} in {:.1} s, {rate:.0} tokens/s",
        at.step, at.tokens, at.seconds
    ));
    if let Some(peak) = compute.peak_memory() {
        ui.note(&peak);
    }
    if let Some(loss) = at.best.filter(|_| at.best_step != at.step) {
        let best = out_dir.join(BEST);
        ui.note(&format!("best: step {} with val loss {loss:.4}, {}", at.best_step, best.display()));
    }
    let last = out_dir.join(FINAL);
    ui.note(&format!("next: litgpt generate --checkpoint_dir {} --prompt \"...\"", last.display()));
    ui.note(&format!("      litgpt merge_lora --checkpoint_dir {}", last.display()));
}
