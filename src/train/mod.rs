//! The training loop: micro batches, accumulation, steps, evaluation, checkpoints. It prints nothing and writes no
//! file itself: it tells a [`Report`] what happens and calls back to save.
//!
//! The loss of an optimizer step is the sum over the target tokens of its accumulation window divided by their number,
//! so it does not depend on how the window is cut into micro batches. The last, partial window is stepped too.

pub mod estimate;
pub mod report;
pub mod schedule;
pub mod settings;

use crate::data::sft::{Batches, Sample, pack};
use crate::error::{Error, Result};
use crate::model::{Gpt, Tokens, Training};
use crate::ops::matrix::sparing;
use crate::ops::optimizer::{AdamW, Moments, norm};
use crate::ops::{Matrix, in_pool};
use report::{Event, Report, Summary};
use schedule::Schedule;
use serde::{Deserialize, Serialize};
use settings::{EvaluateExample, FinetuneSettings};
use std::time::Instant;

/// What a run works on.
#[derive(Debug)]
pub struct Job<'a> {
    /// The model, its adapters attached and initialized.
    pub gpt: &'a mut Gpt,
    /// Training samples.
    pub train: &'a [Sample],
    /// Indices of the training samples that go side by side, from [`side_by_side`].
    pub packs: &'a [Vec<usize>],
    /// Validation samples.
    pub val: &'a [Sample],
    /// The resolved run.
    pub settings: &'a FinetuneSettings,
    /// Whether blocks keep only their input.
    pub checkpointing: bool,
}

/// What a run calls outside: everything that writes files or makes text.
pub trait Outside: Report {
    /// Saves the adapters and the state as `name` (`step-000200`, `final`).
    ///
    /// # Errors
    /// When writing fails.
    fn save(&mut self, gpt: &Gpt, name: &str, snapshot: &Snapshot<'_>) -> anyhow::Result<()>;

    /// Whether the run shall be saved and left.
    fn stop_asked(&self) -> bool;

    /// The model's answer to validation sample `index`.
    ///
    /// # Errors
    /// When decoding fails.
    fn answer(&mut self, gpt: &Gpt, index: usize) -> anyhow::Result<String>;
}

/// Where a run stands between two optimizer steps. Learning rate, order of the data and dropout follow from it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
pub struct Progress {
    /// Optimizer steps taken.
    pub step: usize,
    /// Micro batches trained on.
    pub iter: usize,
    /// Tokens trained on.
    pub tokens: u64,
    /// Duration of the training so far, without validation and saving.
    pub seconds: f64,
    /// Best validation loss so far.
    pub best: Option<f64>,
}

/// What a run needs, besides its parameters, to go on exactly.
#[derive(Debug)]
pub struct Snapshot<'a> {
    /// Where it stands.
    pub progress: Progress,
    /// State of the optimizer.
    pub moments: &'a Moments,
}

/// Length of a run, known before it starts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Plan {
    /// Micro batches of an accumulation window.
    pub accumulate: usize,
    /// Micro batches in all.
    pub iters: usize,
    /// Optimizer steps in all.
    pub steps: usize,
}

impl Plan {
    /// The plan for `samples` training samples, or packs of them.
    ///
    /// # Errors
    /// When the run would take no optimizer step.
    pub fn new(settings: &FinetuneSettings, samples: usize) -> Result<Self> {
        let train = &settings.train;
        let accumulate = (train.global_batch_size / train.micro_batch_size.max(1)).max(1);
        let per_epoch = samples.div_ceil(train.micro_batch_size.max(1));
        let by_epochs = train.epochs.map_or(usize::MAX, |e| e.saturating_mul(per_epoch));
        let by_steps = train.max_steps.map_or(usize::MAX, |s| s.saturating_mul(accumulate));
        let iters = by_epochs.min(by_steps);
        if iters == 0 {
            let message = "this run would take no optimizer step";
            return Err(Error::refused(
                message,
                "give training samples, --train.epochs 1 or more, and --train.max_steps 1 or more",
            ));
        }
        Ok(Self { accumulate, iters, steps: iters.div_ceil(accumulate) })
    }
}

/// Which samples a micro batch takes at once where it would take one: each alone or, with `--data.pack`, as many as
/// `--train.max_seq_length` (else the longest sample) has room for. Attention and positions stay inside a sample either
/// way.
#[must_use]
pub fn side_by_side(settings: &FinetuneSettings, samples: &[Sample]) -> Vec<Vec<usize>> {
    if !settings.data.pack {
        return (0..samples.len()).map(|row| vec![row]).collect();
    }
    let lengths: Vec<usize> = samples.iter().map(|s| s.input_ids.len()).collect();
    let longest = lengths.iter().copied().max().unwrap_or(0);
    pack(&lengths, settings.train.max_seq_length.filter(|n| *n > 0).unwrap_or(longest))
}

/// The samples of the longest micro batch that can come.
fn longest(samples: &[Sample], packs: &[Vec<usize>], micro_batch_size: usize) -> Vec<usize> {
    let mut packs: Vec<&Vec<usize>> = packs.iter().collect();
    packs.sort_by_key(|p| std::cmp::Reverse(p.iter().map(|r| samples[*r].input_ids.len()).sum::<usize>()));
    packs.truncate(micro_batch_size);
    packs.into_iter().flatten().copied().collect()
}

/// Tokens of the longest micro batch that can come.
#[must_use]
pub fn longest_tokens(samples: &[Sample], packs: &[Vec<usize>], micro_batch_size: usize) -> usize {
    longest(samples, packs, micro_batch_size).into_iter().map(|row| samples[row].input_ids.len()).sum()
}

/// State of a run between micro batches.
struct Run<'a, 'b> {
    job: &'a mut Job<'b>,
    outside: &'a mut dyn Outside,
    plan: Plan,
    schedule: Schedule,
    optimizer: AdamW,
    moments: Moments,
    grads: Matrix,
    batches: Batches,
    iter: usize,
    step: usize,
    tokens: u64,
    started: Instant,
    /// Duration of training before this process.
    seconds_before: f64,
    /// Duration of validation and saving in this process.
    evaluating: f64,
    best: Option<f64>,
    resumed: bool,
}

/// Trains the adapters of `job`, from where `resume` stands if given (its parameters are in the model), and returns what the run came to.
///
/// # Errors
/// When the run would do nothing, the loss stops being a number, or saving fails.
pub fn fit(
    job: &mut Job<'_>,
    outside: &mut dyn Outside,
    resume: Option<(Progress, Moments)>,
) -> anyhow::Result<Summary> {
    let settings = job.settings;
    let plan = Plan::new(settings, job.packs.len())?;
    let schedule = Schedule::new(settings, plan.steps);
    let longest = job.train.iter().chain(job.val).map(|s| s.input_ids.len()).max().unwrap_or(1);
    // Examples are decoded between steps: their answers need positions too.
    let answer = settings.eval.max_new_tokens.unwrap_or(0);
    job.gpt.prepare((longest + answer).min(job.gpt.config.block_size));
    let optimizer = AdamW {
        beta1: settings.optimizer.beta1,
        beta2: settings.optimizer.beta2,
        eps: settings.optimizer.eps,
        weight_decay: settings.optimizer.weight_decay,
    };
    let resumed = resume.is_some();
    let (progress, moments) = resume.unwrap_or_else(|| (Progress::default(), Moments::new(&job.gpt.parameters)));
    let grads = job.gpt.parameters.zeros_like(1, job.gpt.parameters.cols());
    let mut batches = Batches::new(job.packs.len(), settings.train.micro_batch_size, settings.data.seed, true);
    batches.seek(progress.iter);
    let mut run = Run {
        job,
        outside,
        plan,
        schedule,
        optimizer,
        moments,
        grads,
        batches,
        iter: progress.iter,
        step: progress.step,
        tokens: progress.tokens,
        started: Instant::now(),
        seconds_before: progress.seconds,
        evaluating: 0.0,
        best: progress.best,
        resumed,
    };
    run.outside.event(&Event::Start { plan, schedule })?;
    run.rehearse()?;
    run.all()
}

impl Run<'_, '_> {
    fn all(&mut self) -> anyhow::Result<Summary> {
        let settings = self.job.settings;
        if settings.eval.initial_validation && !self.resumed {
            self.validate(settings.eval.max_iters)?;
        }
        self.started = Instant::now();
        while self.iter < self.plan.iters && !self.out_of_budget() {
            if !self.window()? {
                self.save(&step_name(self.step))?;
                return Ok(self.summary(None, true));
            }
            let begun = Instant::now();
            if self.step.is_multiple_of(settings.eval.interval) && self.iter < self.plan.iters {
                self.validate(settings.eval.max_iters)?;
                self.example()?;
            }
            self.evaluating += begun.elapsed().as_secs_f64();
            if settings.train.save_interval.is_some_and(|n| self.step.is_multiple_of(n)) {
                self.save(&step_name(self.step))?;
            }
        }
        let ended = Instant::now();
        let val_loss = if settings.eval.final_validation { self.validate(usize::MAX)? } else { None };
        if settings.eval.final_validation {
            self.example()?;
        }
        self.evaluating += ended.elapsed().as_secs_f64();
        self.save("final")?;
        let summary = self.summary(val_loss, false);
        self.outside.event(&Event::Finished(summary))?;
        Ok(summary)
    }

    fn progress(&self) -> Progress {
        let seconds = self.seconds_before + self.started.elapsed().as_secs_f64() - self.evaluating;
        Progress { step: self.step, iter: self.iter, tokens: self.tokens, seconds, best: self.best }
    }

    fn save(&mut self, name: &str) -> anyhow::Result<()> {
        let begun = Instant::now();
        let snapshot = Snapshot { progress: self.progress(), moments: &self.moments };
        self.outside.save(self.job.gpt, name, &snapshot)?;
        self.evaluating += begun.elapsed().as_secs_f64();
        Ok(())
    }

    fn summary(&self, val_loss: Option<f64>, stopped: bool) -> Summary {
        let Progress { step: steps, iter: iters, tokens, seconds, best } = self.progress();
        Summary { steps, iters, tokens, seconds, val_loss, best, stopped }
    }

    /// Runs the longest micro batch that can come once, and forgets it: what a run needs of memory shows at once, and the
    /// buffers that it leaves serve every later micro batch.
    fn rehearse(&mut self) -> Result<()> {
        let rows = longest(self.job.train, self.job.packs, self.job.settings.train.micro_batch_size);
        let tokens = collect(self.job.train, &rows, self.job.settings.data.ignore_index);
        let training = Training { grads: &mut self.grads, weight: 1.0, seed: 0, checkpointing: self.job.checkpointing };
        let gpt = &*self.job.gpt;
        let _ = sparing(|| in_pool(|| gpt.loss(&tokens, Some(training))));
        gpt.check()
    }

    fn out_of_budget(&self) -> bool {
        let train = &self.job.settings.train;
        train.max_time.is_some_and(|s| self.seconds_before + self.started.elapsed().as_secs_f64() >= s)
            || train.max_tokens.is_some_and(|n| self.tokens >= n)
    }

    /// One accumulation window and its optimizer step. `false`: a stop was asked for; the window's micro batches so far
    /// are forgotten, and taken again by the run that resumes.
    fn window(&mut self) -> anyhow::Result<bool> {
        let begun = Instant::now();
        self.grads.zero();
        let (mut loss, mut targets, tokens_before) = (0.0, 0, self.tokens);
        let iter_before = self.iter;
        for _ in 0..self.plan.accumulate.min(self.plan.iters - self.iter) {
            if self.outside.stop_asked() {
                (self.iter, self.tokens) = (iter_before, tokens_before);
                self.batches.seek(iter_before);
                return Ok(false);
            }
            let rows: Vec<usize> =
                self.batches.next_batch().into_iter().flat_map(|pack| self.job.packs[pack].clone()).collect();
            let tokens = collect(self.job.train, &rows, self.job.settings.data.ignore_index);
            let training = Training {
                grads: &mut self.grads,
                weight: 1.0,
                seed: dropout_seed(self.job.settings.seed, self.iter),
                checkpointing: self.job.checkpointing,
            };
            let gpt = &*self.job.gpt;
            let sum = in_pool(|| gpt.loss(&tokens, Some(training)));
            gpt.check()?;
            self.require_number(sum, &rows)?;
            loss += sum;
            targets += tokens.n_targets();
            self.tokens += tokens.ids.len() as u64;
            self.iter += 1;
        }
        let learning_rate = self.schedule.at(self.step);
        let mut scale = 1.0 / targets.max(1) as f64;
        let grad_norm = norm(&self.grads) * scale;
        if let Some(limit) = self.job.settings.train.max_norm.filter(|limit| grad_norm > *limit) {
            // torch's clip_grad_norm_ divides by norm + 1e-6.
            scale *= limit / (grad_norm + 1e-6);
        }
        self.optimizer.step(&mut self.job.gpt.parameters, &self.grads, scale as f32, &mut self.moments, learning_rate);
        self.step += 1;
        if self.step.is_multiple_of(self.job.settings.train.log_interval.max(1)) || self.iter == self.plan.iters {
            self.outside.event(&Event::Step {
                epoch: self.batches.epoch() + 1,
                iter: self.iter,
                step: self.step,
                loss: loss / targets.max(1) as f64,
                grad_norm,
                learning_rate,
                tokens: self.tokens - tokens_before,
                total_tokens: self.tokens,
                seconds: begun.elapsed().as_secs_f64(),
            })?;
        }
        Ok(true)
    }

    fn require_number(&self, loss: f64, rows: &[usize]) -> Result<()> {
        if loss.is_finite() {
            return Ok(());
        }
        let rows: Vec<String> = rows.iter().map(|r| self.job.train[*r].row.row.to_string()).collect();
        let message = format!("the loss is {loss} at iteration {} (training rows {})", self.iter + 1, rows.join(", "));
        Err(Error::refused(
            message,
            "use a smaller --lr, or --train.max_norm 1; check these rows and the base model's weights",
        ))
    }

    /// Mean validation loss in nats a target token, over at most `max_iters` micro batches.
    fn validate(&mut self, max_iters: usize) -> anyhow::Result<Option<f64>> {
        let settings = self.job.settings;
        let begun = Instant::now();
        let (mut loss, mut targets, mut means) = (0.0, 0, Vec::new());
        let samples: Vec<usize> = (0..self.job.val.len()).collect();
        for rows in samples.chunks(settings.train.micro_batch_size.max(1)).take(max_iters) {
            let tokens = collect(self.job.val, rows, settings.data.ignore_index);
            let gpt = &*self.job.gpt;
            let sum = in_pool(|| gpt.loss(&tokens, None));
            gpt.check()?;
            means.push(sum / tokens.n_targets().max(1) as f64);
            loss += sum;
            targets += tokens.n_targets();
        }
        if targets == 0 {
            return Ok(None);
        }
        let loss = loss / targets as f64;
        if !loss.is_finite() {
            let message = format!("the validation loss is {loss} after step {}", self.step);
            return Err(Error::refused(message, "the run diverged: use a smaller --lr, or --train.max_norm 1").into());
        }
        self.best = Some(self.best.map_or(loss, |b| b.min(loss)));
        let seconds = begun.elapsed().as_secs_f64();
        let mean_of_batches = means.iter().sum::<f64>() / means.len() as f64;
        let (step, iter) = (self.step, self.iter);
        self.outside.event(&Event::Validation { step, iter, loss, mean_of_batches, seconds })?;
        Ok(Some(loss))
    }

    /// The answer to one validation sample, as text.
    fn example(&mut self) -> anyhow::Result<()> {
        let eval = &self.job.settings.eval;
        if self.job.val.is_empty() || eval.max_new_tokens.is_none_or(|n| n == 0) {
            return Ok(());
        }
        let index = match eval.evaluate_example {
            EvaluateExample::First => 0,
            EvaluateExample::Random => dropout_seed(self.job.settings.seed, self.step) as usize % self.job.val.len(),
            EvaluateExample::Index(index) => index.min(self.job.val.len() - 1),
        };
        let text = self.outside.answer(self.job.gpt, index)?;
        self.outside.event(&Event::Example { step: self.step, text })
    }
}

/// Name of the folder of a step.
fn step_name(step: usize) -> String {
    format!("step-{step:06}")
}

/// Samples end to end as one micro batch.
fn collect(samples: &[Sample], rows: &[usize], ignore_index: i32) -> Tokens {
    let mut tokens = Tokens::default();
    for row in rows {
        tokens.push(&samples[*row].input_ids, &samples[*row].labels, ignore_index);
    }
    tokens
}

/// Seed of a micro batch's dropout masks (SplitMix64 of run and iteration).
fn dropout_seed(seed: u64, iter: usize) -> u64 {
    let mut z = seed ^ (iter as u64 + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}
