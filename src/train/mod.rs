//! The training loop: micro batches, accumulation, steps, evaluation, checkpoints. It prints nothing and writes no
//! file itself: it tells a [`Report`] what happens and calls back to save.
//!
//! The loss of an optimizer step is the sum over the target tokens of its accumulation window divided by their number,
//! so it does not depend on how the window is cut into micro batches. The last, partial window is stepped too.

pub mod estimate;
pub mod page;
mod progress;
pub mod report;
mod scale;
pub mod schedule;
pub mod settings;
pub mod tensorboard;

use crate::data::sft::{Batches, Sample, pack};
use crate::error::{Error, Result};
use crate::model::{Gpt, Tokens, Training};
use crate::ops::device::Dtype;
use crate::ops::head::Loss;
use crate::ops::matrix::{Reuse, reusing};
use crate::ops::optimizer::{AdamW, Moments, norm};
use crate::ops::{Matrix, in_pool};
pub use progress::Progress;
use report::{Event, Figures, Report, Summary, row_numbers};
pub use scale::LossScale;
use schedule::Schedule;
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
    tokens_of(samples, &longest(samples, packs, micro_batch_size))
}

fn tokens_of(samples: &[Sample], rows: &[usize]) -> usize {
    rows.iter().map(|row| samples[*row].input_ids.len()).sum()
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
    /// Tokens of the longest micro batch that can come.
    longest: usize,
    /// Where it stands; its seconds are those before this process.
    at: Progress,
    started: Instant,
    /// Duration of validation and saving in this process.
    evaluating: f64,
    val_loss: Option<f64>,
    resumed: bool,
}

/// What an accumulation window came to.
#[derive(Default)]
struct Window {
    /// Sum over its targets.
    loss: f64,
    targets: usize,
    tokens: u64,
    /// Its samples.
    rows: Vec<usize>,
    /// Those whose own loss is no finite number; where only that of a pass is none, its samples.
    broken: Vec<usize>,
}

/// Trains the adapters of `job`, from where `resume` stands if given (its parameters are in the model), and returns what the run came to.
///
/// # Errors
/// When the run would do nothing, too many steps in a row are skipped, the validation loss is no number, or saving fails.
pub fn fit(
    job: &mut Job<'_>,
    outside: &mut dyn Outside,
    resume: Option<(Progress, Moments)>,
) -> anyhow::Result<Summary> {
    let settings = job.settings;
    let plan = Plan::new(settings, job.packs.len())?;
    let schedule = Schedule::new(settings, plan.steps);
    let positions = job.train.iter().chain(job.val).map(|s| s.input_ids.len()).max().unwrap_or(1);
    // Examples are decoded between steps: their answers need positions too.
    let answer = settings.eval.max_new_tokens.unwrap_or(0);
    job.gpt.prepare((positions + answer).min(job.gpt.config.block_size));
    let optimizer = AdamW {
        beta1: settings.optimizer.beta1,
        beta2: settings.optimizer.beta2,
        eps: settings.optimizer.eps,
        weight_decay: settings.optimizer.weight_decay,
    };
    let resumed = resume.is_some();
    let (mut progress, moments) = resume.unwrap_or_else(|| (Progress::default(), Moments::new(&job.gpt.parameters)));
    if job.gpt.place().is_some_and(|(_, dtype)| dtype == Dtype::F16) {
        progress.loss_scale.get_or_insert_default();
    }
    let grads = job.gpt.parameters.zeros_like(1, job.gpt.parameters.cols());
    let mut batches = Batches::new(job.packs.len(), settings.train.micro_batch_size, settings.data.seed, true);
    batches.seek(progress.iter);
    let longest = longest_tokens(job.train, job.packs, settings.train.micro_batch_size);
    let mut run = Run {
        job,
        outside,
        plan,
        schedule,
        optimizer,
        moments,
        grads,
        batches,
        longest,
        at: progress,
        started: Instant::now(),
        evaluating: 0.0,
        val_loss: None,
        resumed,
    };
    run.outside.event(&Event::Start { plan, schedule })?;
    run.rehearse()?;
    run.all()
}

/// Whether a run that stands at `at` has nothing left to do, but for budgets of time and tokens.
#[must_use]
pub fn is_over(settings: &FinetuneSettings, plan: &Plan, at: &Progress) -> bool {
    let patience = settings.eval.early_stopping_patience;
    at.iter >= plan.iters || patience.is_some_and(|n| at.without_improvement >= n)
}

impl Run<'_, '_> {
    fn all(&mut self) -> anyhow::Result<Summary> {
        let settings = self.job.settings;
        if settings.eval.initial_validation && !self.resumed && self.validate(false)? {
            self.save(&step_name(0))?;
        }
        self.started = Instant::now();
        while !is_over(settings, &self.plan, &self.at) && !self.out_of_budget() {
            if !self.step()? {
                self.save(&step_name(self.at.step))?;
                return Ok(self.summary(true));
            }
            let begun = Instant::now();
            let mut improved = false;
            if self.at.step.is_multiple_of(settings.eval.interval) && self.at.iter < self.plan.iters {
                improved = self.validate(false)?;
                self.example()?;
            }
            self.evaluating += begun.elapsed().as_secs_f64();
            if improved || settings.train.save_interval.is_some_and(|n| self.at.step.is_multiple_of(n)) {
                self.save(&step_name(self.at.step))?;
            }
        }
        self.end()
    }

    /// What comes behind the last step.
    fn end(&mut self) -> anyhow::Result<Summary> {
        let (eval, at) = (&self.job.settings.eval, self.at);
        if at.iter < self.plan.iters && is_over(self.job.settings, &self.plan, &at) {
            self.outside.event(&Event::EarlyStop { at })?;
        }
        let begun = Instant::now();
        if eval.final_validation {
            self.validate(true)?;
            self.example()?;
        }
        self.evaluating += begun.elapsed().as_secs_f64();
        self.save(FINAL)?;
        let summary = self.summary(false);
        self.outside.event(&Event::Finished(summary))?;
        Ok(summary)
    }

    fn progress(&self) -> Progress {
        let seconds = self.at.seconds + self.started.elapsed().as_secs_f64() - self.evaluating;
        Progress { seconds, ..self.at }
    }

    fn save(&mut self, name: &str) -> anyhow::Result<()> {
        let begun = Instant::now();
        let snapshot = Snapshot { progress: self.progress(), moments: &self.moments };
        self.outside.save(self.job.gpt, name, &snapshot)?;
        self.evaluating += begun.elapsed().as_secs_f64();
        Ok(())
    }

    fn summary(&self, stopped: bool) -> Summary {
        Summary { at: self.progress(), val_loss: self.val_loss, stopped }
    }

    /// Runs the longest micro batch that can come once, and forgets it: what a run needs of memory shows at once, and the
    /// buffers that it leaves serve every later micro batch.
    fn rehearse(&mut self) -> Result<()> {
        let rows = longest(self.job.train, self.job.packs, self.job.settings.train.micro_batch_size);
        let tokens = collect(self.job.train, &rows, self.job.settings.data.ignore_index);
        let training = Training { grads: &mut self.grads, weight: 1.0, seed: 0, checkpointing: self.job.checkpointing };
        let gpt = &*self.job.gpt;
        let _ = reusing(Reuse::Near, || in_pool(|| gpt.loss(&tokens, Some(training))));
        gpt.check()
    }

    fn out_of_budget(&self) -> bool {
        let train = &self.job.settings.train;
        train.max_time.is_some_and(|s| self.at.seconds + self.started.elapsed().as_secs_f64() >= s)
            || train.max_tokens.is_some_and(|n| self.at.tokens >= n)
    }

    /// One accumulation window and its optimizer step, which is left out where loss or gradient are no finite numbers. In
    /// f16, an infinite gradient is first tried again with a smaller factor on the loss.
    /// `false`: a stop was asked for.
    fn step(&mut self) -> anyhow::Result<bool> {
        let begun = Instant::now();
        let (window, scale, grad_norm) = loop {
            let before = self.at;
            let Some(window) = self.window()? else { return Ok(false) };
            let scale = 1.0 / (window.targets.max(1) as f64 * f64::from(self.at.loss_factor()));
            let grad_norm = norm(&self.grads) * scale;
            let too_large = window.loss.is_finite() && !grad_norm.is_finite();
            if !too_large || !self.at.loss_scale.as_mut().is_some_and(LossScale::lower) {
                break (window, scale, grad_norm);
            }
            self.at = Progress { loss_scale: self.at.loss_scale, ..before };
            self.batches.seek(self.at.iter);
        };
        let loss = window.loss / window.targets.max(1) as f64;
        let learning_rate = self.schedule.at(self.at.step);
        let finite = loss.is_finite() && grad_norm.is_finite();
        if finite {
            self.update(scale, grad_norm, learning_rate);
        }
        self.at.count_step(finite);
        let figures = Figures {
            epoch: self.batches.epoch() + 1,
            iter: self.at.iter,
            step: self.at.step,
            loss,
            grad_norm,
            learning_rate,
            tokens: window.tokens,
            total_tokens: self.at.tokens,
            seconds: begun.elapsed().as_secs_f64(),
            skipped: self.at.skipped,
        };
        let log_interval = self.job.settings.train.log_interval.max(1);
        if !finite {
            self.skipped(figures, &window)?;
        } else if self.at.step.is_multiple_of(log_interval) || self.at.iter == self.plan.iters {
            self.outside.event(&Event::Step(figures))?;
        }
        Ok(true)
    }

    /// Sums loss and gradient over an accumulation window. `None`: a stop was asked for; the window's micro batches so
    /// far are forgotten, and taken again by the run that resumes.
    ///
    /// # Errors
    /// When the device fails.
    fn window(&mut self) -> Result<Option<Window>> {
        let mut window = Window::default();
        let mut losses = Vec::new();
        self.grads.zero();
        let end = self.plan.iters.min(self.at.iter + self.plan.accumulate);
        let passes = self.passes(end);
        for (first, rows) in &passes {
            if self.outside.stop_asked() {
                self.batches.seek(self.at.iter);
                return Ok(None);
            }
            let tokens = collect(self.job.train, rows, self.job.settings.data.ignore_index);
            let training = Training {
                grads: &mut self.grads,
                weight: self.at.loss_factor(),
                seed: dropout_seed(self.job.settings.seed, *first),
                checkpointing: self.job.checkpointing,
            };
            let gpt = &*self.job.gpt;
            losses.push(in_pool(|| gpt.pass(&tokens, None, Some(training))));
            window.targets += tokens.n_targets();
            window.tokens += tokens.ids.len() as u64;
        }
        // A device is waited for once a window, here.
        for (loss, (_, rows)) in losses.iter().map(Loss::value).zip(passes) {
            if !loss.is_finite() {
                let broken: Vec<usize> = rows.iter().copied().filter(|row| !self.is_finite(*row)).collect();
                window.broken.extend(if broken.is_empty() { &rows } else { &broken });
            }
            window.loss += loss;
            window.rows.extend(rows);
        }
        self.job.gpt.check()?;
        self.at.iter = end;
        self.at.tokens += window.tokens;
        Ok(Some(window))
    }

    /// Samples of each pass over the micro batches up to `end`, with its first micro batch's number. Micro batches go side
    /// by side where they are together no longer than the longest that can come, which the run has room for: as the loss is a sum
    /// over targets, it is the same but for dropout's masks, and the weights are read less often.
    fn passes(&mut self, end: usize) -> Vec<(usize, Vec<usize>)> {
        let (train, packs) = (self.job.train, self.job.packs);
        let batches: Vec<Vec<usize>> = (self.at.iter..end)
            .map(|_| self.batches.next_batch().into_iter().flat_map(|pack| packs[pack].iter().copied()).collect())
            .collect();
        let lengths: Vec<usize> = batches.iter().map(|rows| tokens_of(train, rows)).collect();
        let pass = |mut group: Vec<usize>| {
            group.sort_unstable();
            (self.at.iter + group[0], group.iter().flat_map(|batch| &batches[*batch]).copied().collect())
        };
        pack(&lengths, self.longest).into_iter().map(pass).collect()
    }

    fn is_finite(&self, row: usize) -> bool {
        let tokens = collect(self.job.train, &[row], self.job.settings.data.ignore_index);
        in_pool(|| self.job.gpt.loss(&tokens, None)).is_finite()
    }

    /// The optimizer's step with the gradient times `scale`, clipped.
    fn update(&mut self, mut scale: f64, grad_norm: f64, learning_rate: f64) {
        if let Some(limit) = self.job.settings.train.max_norm.filter(|limit| grad_norm > *limit) {
            // torch's clip_grad_norm_ divides by norm + 1e-6.
            scale *= limit / (grad_norm + 1e-6);
        }
        self.optimizer.step(&mut self.job.gpt.parameters, &self.grads, scale as f32, &mut self.moments, learning_rate);
    }

    /// Tells of a skipped step, and gives up after too many in a row.
    fn skipped(&mut self, figures: Figures, window: &Window) -> anyhow::Result<()> {
        let rows = if window.broken.is_empty() { &window.rows } else { &window.broken };
        let problem = format!("{} (training {})", figures.problem(), row_numbers(self.job.train, rows));
        self.outside.event(&Event::Skipped { figures, problem: problem.clone() })?;
        let in_a_row = self.at.skipped_in_a_row;
        if in_a_row < self.job.settings.train.max_skipped_steps {
            return Ok(());
        }
        let message = match in_a_row {
            1 => format!("step {} cannot be taken: {problem}", figures.step),
            n => format!("{n} steps in a row could not be taken; at the last one, step {}, {problem}", figures.step),
        };
        let hint = "use a smaller --lr, or --train.max_norm 1, and check these rows and the base model's weights; \
                    --resume auto --resume_force true goes on from what was saved";
        Err(Error::refused(message, hint).into())
    }

    /// Mean validation loss in nats a target token, over all samples or at most `eval.max_iters` micro batches. Whether
    /// it is the lowest so far: for that, the same samples count every time.
    fn validate(&mut self, all: bool) -> anyhow::Result<bool> {
        let settings = self.job.settings;
        let begun = Instant::now();
        let (mut loss, mut targets, mut means, mut broken) = (0.0, 0, Vec::new(), Vec::new());
        let mut comparable = None;
        let samples: Vec<usize> = (0..self.job.val.len()).collect();
        let limit = if all { usize::MAX } else { settings.eval.max_iters };
        for rows in samples.chunks(settings.train.micro_batch_size.max(1)).take(limit) {
            let tokens = collect(self.job.val, rows, settings.data.ignore_index);
            let gpt = &*self.job.gpt;
            let sum = in_pool(|| gpt.loss(&tokens, None));
            gpt.check()?;
            if !sum.is_finite() {
                broken.extend(rows);
            }
            means.push(sum / tokens.n_targets().max(1) as f64);
            loss += sum;
            targets += tokens.n_targets();
            if means.len() == settings.eval.max_iters {
                comparable = Some(loss / targets.max(1) as f64);
            }
        }
        if targets == 0 {
            return Ok(false);
        }
        let loss = loss / targets as f64;
        if !loss.is_finite() {
            let rows = row_numbers(self.job.val, &broken);
            let message = format!("the validation loss is {loss} after step {} (validation {rows})", self.at.step);
            let hint = "the run diverged, or these rows are broken: use a smaller --lr, or --train.max_norm 1";
            return Err(Error::refused(message, hint).into());
        }
        let comparable = comparable.unwrap_or(loss);
        let lowest = self.at.count_validation(comparable);
        self.val_loss = Some(loss);
        let seconds = begun.elapsed().as_secs_f64();
        let mean_of_batches = means.iter().sum::<f64>() / means.len() as f64;
        let (step, iter) = (self.at.step, self.at.iter);
        self.outside.event(&Event::Validation { step, iter, loss, comparable, mean_of_batches, seconds })?;
        Ok(lowest)
    }

    /// The answer to one validation sample, as text.
    fn example(&mut self) -> anyhow::Result<()> {
        let eval = &self.job.settings.eval;
        if self.job.val.is_empty() || eval.max_new_tokens.is_none_or(|n| n == 0) {
            return Ok(());
        }
        let index = match eval.evaluate_example {
            EvaluateExample::First => 0,
            EvaluateExample::Random => dropout_seed(self.job.settings.seed, self.at.step) as usize % self.job.val.len(),
            EvaluateExample::Index(index) => index.min(self.job.val.len() - 1),
        };
        let text = self.outside.answer(self.job.gpt, index)?;
        self.outside.event(&Event::Example { step: self.at.step, text })
    }
}

/// Name of the folder of a run that came to its end.
pub const FINAL: &str = "final";

/// Name of the folder of a step.
#[must_use]
pub fn step_name(step: usize) -> String {
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

/// Seed of a pass's dropout masks (SplitMix64 of run and first iteration).
fn dropout_seed(seed: u64, iter: usize) -> u64 {
    let mut z = seed ^ (iter as u64 + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}
