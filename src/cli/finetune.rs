//! `litgpt finetune lora`: builds the parts of a run from its settings, trains, saves.

use super::args::FinetuneArgs;
use super::folders::{self, BEST, Folders};
use super::load::{
    Compute, MANIFEST, Manifest, PROMPT_STYLE, add_bos, fetched, fitted, own_tokenizer, quantizer, weights,
};
use super::resume::{self, MadeOf};
use super::signals::Signals;
use super::ui::Ui;
use super::{download, recipe};
use crate::checkpoint::write::Staging;
use crate::checkpoint::{Checkpoint, adapter, state};
use crate::data::prefix;
use crate::data::prompt::PromptStyle;
use crate::data::sft::{Encoder, Report as DataReport, Sample, with_mask};
use crate::data::{Content, DataConfig, Dataset, Origin, Record};
use crate::error::{Error, Result};
use crate::generate::{Draw, PROMPT_LOOKUP, Request, Session, text};
use crate::model::lora::{LoraConfig, Targets};
use crate::model::{Config, Gpt};
use crate::ops::quantized::Quantizer;
use crate::tokenizer::Tokenizer;
use crate::train::estimate::{Computed, Estimate, ways_out};
use crate::train::page::Page;
use crate::train::report::{Event, Metrics, Report, Summary};
use crate::train::settings::{FinetuneSettings, Precision, Switch};
use crate::train::tensorboard::TensorBoard;
use crate::train::{FINAL, Job, Outside, Plan, Snapshot, fit, is_over, longest_tokens, side_by_side};
use std::path::{Path, PathBuf};

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
    let tokenizer = fitted(own_tokenizer(&checkpoint)?, &checkpoint)?.with_bos(add_bos(settings.add_bos));
    let fetcher = download::Fetcher::new(settings.access_token.clone(), ui)?;
    let mut dataset = crate::data::load(&data_config(&settings), &tokenizer, &fetcher)?;
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
    if settings.dry_run {
        ui.note("nothing was trained: --dry_run");
        return Ok(());
    }
    let base_hash = checkpoint.content_hash()?;
    let mut gpt = trainable(&settings, &checkpoint, &compute, quantizer, ui)?;
    let mut job =
        Job { gpt: &mut gpt, train: &train, packs: &packs, val: &val, settings: &settings, checkpointing, prefix };
    let made_of = MadeOf::of(&job, &base_hash)?;
    let _lock = resume::lock(&settings.out_dir)?;
    let from = resume::From::find(&settings, ui)?;
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
        companions: checkpoint.companion_files()?,
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

/// Training and validation samples; says so where there are none to validate with.
fn samples(
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

/// How the samples are computed in the memory that there is. Turns prefix sharing off in the settings where it is not done.
fn computed(
    settings: &mut FinetuneSettings,
    checkpoint: &Checkpoint,
    compute: &Compute,
    quantizer: Option<Quantizer>,
    [train, val]: [&[Sample]; 2],
    packs: &[Vec<usize>],
    ui: &mut Ui,
) -> anyhow::Result<Computed> {
    let longest = train.iter().chain(val).map(|sample| sample.input_ids.len()).max().unwrap_or(0);
    if longest > checkpoint.config.rope_scaling.alike() {
        // Of a short and a long sample not even the first keys are the same.
        if settings.train.prefix_sharing == Switch::On {
            ui.note("prefixes are not shared: samples on both sides of the model's longrope begin otherwise");
        }
        settings.train.prefix_sharing = Switch::Off;
    }
    let wanted = Computed {
        store: compute.store(),
        narrow: checkpoint.narrow(compute.store(), compute.device.is_some())?,
        quantizer,
        on_device: compute.device.is_some(),
        tokens: longest_tokens(train, packs, settings.train.micro_batch_size),
        checkpointing: settings.train.activation_checkpointing == Switch::On,
        prefix: if settings.train.prefix_sharing == Switch::Off { 0 } else { prefix::longest(train) },
    };
    let prefix = wanted.prefix;
    let computed = preflight(&checkpoint.config, settings, compute, wanted, ui)?;
    if computed.prefix < prefix {
        // Rounding and dropout hang on it: a run that resumes has to do the same.
        settings.train.prefix_sharing = Switch::Off;
    }
    Ok(computed)
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

fn data_config(settings: &FinetuneSettings) -> DataConfig {
    let data = &settings.data;
    DataConfig {
        name: data.name.clone(),
        json_path: data.json_path.clone(),
        columns: data.columns.clone(),
        val_split_fraction: data.val_split_fraction,
        prompt_style: data.prompt_style.clone(),
        ignore_index: data.ignore_index,
        seed: data.seed,
        num_workers: data.num_workers,
        download_dir: data.download_dir.clone(),
        include_multiturn_conversations: data.include_multiturn_conversations,
        repo_id: data.repo_id.clone(),
        subsets: data.subsets.clone(),
        file_url: data.file_url.clone(),
        file_name: data.file_name.clone(),
        url: data.url.clone(),
    }
}

/// How a run makes its samples.
fn encoder<'a>(
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

/// Share of the free memory that an estimate is not to fill.
const RESERVE: f64 = 0.04;

/// Says what the run needs and what there is; how it is computed: as `wanted`, or so that it needs less memory where the
/// settings leave the choice.
///
/// # Errors
/// When it does not fit into the memory of a GPU, with what would. The processor's memory can be swapped and freed by
/// others: there it is a warning.
fn preflight(
    config: &Config,
    settings: &FinetuneSettings,
    compute: &Compute,
    wanted: Computed,
    ui: &mut Ui,
) -> Result<Computed> {
    let free = compute.free_memory().unwrap_or(usize::MAX);
    // What the driver and the allocator keep for themselves is not ours to count.
    let fits = |estimate: &Estimate| estimate.total() as f64 <= (1.0 - RESERVE) * free as f64;
    let switches = [settings.train.activation_checkpointing, settings.train.prefix_sharing].map(|s| s == Switch::Auto);
    let choices = [(false, false), (false, true), (true, false), (true, true)].into_iter();
    // On the processor, whose memory others come and go in, the run itself must not depend on what is free.
    let [again_allowed, alone_allowed] = [switches[0], switches[1] && wanted.on_device];
    let choices = choices.filter(|(again, alone)| (!again || again_allowed) && (!alone || alone_allowed));
    let choices = choices.map(|(again, alone)| Computed {
        checkpointing: wanted.checkpointing || again,
        prefix: if alone { 0 } else { wanted.prefix },
        ..wanted
    });
    let mut estimates =
        choices.map(|computed| (computed, Estimate::of(config, settings, computed))).collect::<Vec<_>>();
    let last = estimates.len() - 1;
    let chosen = estimates.iter().position(|(_, estimate)| fits(estimate)).unwrap_or(last);
    let (computed, estimate) = estimates.swap_remove(chosen);
    if fits(&estimate) && computed.checkpointing && !wanted.checkpointing {
        ui.note("activations are computed twice to save memory; --train.activation_checkpointing off forbids it");
    }
    if fits(&estimate) && computed.prefix < wanted.prefix {
        ui.note("what samples begin with is computed for each to save memory; --train.prefix_sharing on forbids it");
    }
    let gb = |bytes: usize| format!("{:.2}", bytes as f64 / 1e9);
    let parts: Vec<String> =
        estimate.components().iter().map(|(name, bytes)| format!("{name} {}", gb(*bytes))).collect();
    let found = if free == usize::MAX { String::new() } else { format!(" of {} GB free", gb(free)) };
    ui.note(&format!("memory: about {} GB{found} ({})", gb(estimate.total()), parts.join(", ")));
    if fits(&estimate) {
        return Ok(computed);
    }
    let mut ways = ways_out(config, settings, computed).into_iter().filter(|(_, estimate)| fits(estimate));
    let way = ways.next().map(|(name, estimate)| format!("{name} would need {} GB", gb(estimate.total())));
    let message = format!(
        "this run needs about {} GB and a reserve of {:.0} %, and {} GB are free on {}",
        gb(estimate.total()),
        100.0 * RESERVE,
        gb(free),
        compute.place()
    );
    let hint = way.unwrap_or_else(|| "use a smaller model".to_owned());
    if computed.on_device {
        return Err(Error::refused(message, hint));
    }
    ui.note(&format!("{message}; {hint}"));
    Ok(computed)
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

/// What the loop calls outside.
struct Run<'a> {
    ui: &'a mut Ui,
    compute: &'a Compute,
    metrics: Option<Metrics>,
    folders: Folders,
    tensorboard: Option<TensorBoard>,
    page: Page,
    settings: &'a FinetuneSettings,
    checkpoint: &'a Checkpoint,
    /// The checkpoint's folder and those of its files that every saved folder gets: a save must not depend on what
    /// becomes of the folder while the run goes on.
    base: PathBuf,
    companions: Vec<(&'static str, Vec<u8>)>,
    tokenizer: &'a Tokenizer,
    dataset: &'a Dataset,
    encoder: Encoder<'a>,
    base_hash: String,
    made_of: MadeOf,
    signals: Signals,
}

impl Report for Run<'_> {
    fn event(&mut self, event: &Event) -> anyhow::Result<()> {
        if let Some(metrics) = &mut self.metrics {
            metrics.memory = self.compute.held_memory();
            metrics.event(event)?;
        }
        if let Some(board) = &mut self.tensorboard {
            board.event(event)?;
        }
        self.page.event(event)?;
        self.ui.event(event)
    }
}

impl Outside for Run<'_> {
    fn save(&mut self, gpt: &Gpt, name: &str, snapshot: &Snapshot<'_>) -> anyhow::Result<()> {
        let dir = self.settings.out_dir.join(name);
        let manifest = Manifest {
            litgpt_version: env!("CARGO_PKG_VERSION").to_owned(),
            base_model: self.base.clone(),
            base_hash: self.base_hash.clone(),
            prompt_style: self.dataset.style.name().to_owned(),
            add_bos: self.tokenizer.adds_bos(),
            precision: Some(self.settings.precision.unwrap_or(Precision::F32True).to_string()),
            quantize: self.settings.quantize.clone(),
            step: snapshot.progress.step,
        };
        let staging = Staging::new(&dir)?;
        adapter::save(&staging, self.checkpoint.family, gpt, &self.base.to_string_lossy())?;
        staging.write(MANIFEST, serde_json::to_string_pretty(&manifest)?.as_bytes())?;
        staging.write(PROMPT_STYLE, prompt_style_yaml(&self.dataset.style).as_bytes())?;
        staging.write(recipe::HYPERPARAMETERS, recipe::to_yaml(self.settings)?.as_bytes())?;
        staging.write_all(&self.companions)?;
        resume::save(&staging, gpt, snapshot, self.metrics.as_ref().map_or(Ok(0), Metrics::bytes)?, &self.made_of)?;
        // What is read from a device that has failed is zero.
        gpt.check()?;
        state::seal(&staging)?;
        self.folders.before(name, &snapshot.progress, self.ui)?;
        staging.commit()?;
        let best = self.folders.saved(name, &snapshot.progress, self.ui)?;
        self.event(&Event::Saved { path: dir, best })
    }

    fn stop_asked(&self) -> bool {
        self.signals.asked().is_some()
    }

    fn answer(&mut self, gpt: &Gpt, index: usize) -> anyhow::Result<String> {
        let Some(record) = self.dataset.val.get(index) else { return Ok(String::new()) };
        let ids = self.encoder.prompt_ids(record)?;
        let room = gpt.prepared().saturating_sub(ids.len());
        let max_new_tokens = self.settings.eval.max_new_tokens.unwrap_or(0).min(room);
        let stop_ids = self.dataset.style.stop_ids(self.tokenizer);
        let request = Request {
            prompt: &ids,
            max_new_tokens,
            draw: Draw::GREEDY,
            stop_ids: &stop_ids,
            stop_texts: self.dataset.style.stop_texts(),
            prompt_lookup: PROMPT_LOOKUP,
        };
        let mut answer = String::new();
        if max_new_tokens > 0 {
            text(gpt, self.tokenizer, &mut Session::alone(gpt), &request, |piece| {
                answer.push_str(piece);
                Ok(())
            })?;
        }
        Ok(answer)
    }
}

/// LitGPT's file that names the style.
pub fn prompt_style_yaml(style: &PromptStyle) -> String {
    format!("class_path: litgpt.prompts.{}\n", style.class_name())
}
