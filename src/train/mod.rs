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

use crate::data::prefix::{self, Group};
use crate::data::sft::{Batches, Sample, pack};
use crate::error::{Error, Result};
use crate::model::{Gpt, Prefix, Tokens, Training};
use crate::ops::device::Dtype;
use crate::ops::head::Loss;
use crate::ops::matrix::{Reuse, limit_buffers, reusing};
use crate::ops::optimizer::{AdamW, Moments, norm};
use crate::ops::{Matrix, in_pool};
pub use progress::Progress;
use report::{Event, Figures, Report, Summary, row_numbers};
pub use scale::LossScale;
use schedule::Schedule;
use settings::{EvaluateExample, FinetuneSettings};
use std::ops::Range;
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
    /// Validation samples; without any, nothing is validated.
    pub val: &'a [Sample],
    /// The resolved run.
    pub settings: &'a FinetuneSettings,
    /// Whether blocks keep only their input.
    pub checkpointing: bool,
    /// Tokens of the longest prefix that two training samples have in common; 0 where each sample is computed alone.
    pub prefix: usize,
}

/// Positions that a pass of its own for a prefix has to save. It reads the weights once more, which takes a processor as
/// long as 16 positions, and finds few buffers of its lengths: where less is saved, no gain was measured.
const PASS_ON_HOST: usize = 128;
/// The same on a device, of which a pass of few rows uses a small part.
const PASS_ON_DEVICE: usize = 256;

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
    /// Steps that LitGPT counts for its schedule: those of whole windows in each epoch.
    pub whole_steps: usize,
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
        let whole_steps = train.epochs.map_or(usize::MAX, |e| e.saturating_mul(per_epoch / accumulate));
        let steps = iters.div_ceil(accumulate);
        Ok(Self { accumulate, iters, steps, whole_steps: whole_steps.min(train.max_steps.unwrap_or(usize::MAX)) })
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
    /// Tokens of this process, and those of them that were not computed.
    tokens: [u64; 2],
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

/// What a micro batch of validation samples came to.
struct Scored {
    rows: Vec<usize>,
    /// Sum over its targets.
    loss: f64,
    targets: usize,
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
    let schedule = Schedule::new(settings, &plan);
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
        tokens: [0; 2],
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
        if settings.eval.initial_validation && !self.resumed && self.validate(true)? {
            self.save(&step_name(0))?;
        }
        (self.started, self.evaluating) = (Instant::now(), 0.0);
        while !is_over(settings, &self.plan, &self.at) && !self.out_of_budget() {
            if !self.step()? {
                self.save(&step_name(self.at.step))?;
                return Ok(self.summary(true));
            }
            let begun = Instant::now();
            let mut improved = false;
            // The final validation has all that this one would behind the last step.
            let again = settings.eval.final_validation && self.at.iter == self.plan.iters;
            if self.at.step.is_multiple_of(settings.eval.interval) && !again {
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
        let [tokens, shared] = self.tokens;
        Summary { at: self.progress(), val_loss: self.val_loss, stopped, shared: shared as f64 / tokens.max(1) as f64 }
    }

    /// Runs the longest micro batch that can come once, and forgets it: what a run needs of memory shows at once, and the
    /// buffers that it leaves serve every later micro batch.
    fn rehearse(&mut self) -> Result<()> {
        let Job { train, packs, settings, checkpointing, .. } = *self.job;
        let (rows, ignore_index) = (longest(train, packs, settings.train.micro_batch_size), settings.data.ignore_index);
        let gpt = &*self.job.gpt;
        fn training(grads: &mut Matrix, checkpointing: bool) -> Option<Training<'_>> {
            Some(Training { grads, weight: 1.0, seed: 0, checkpointing })
        }
        let grads = &mut self.grads;
        let tokens = collect(train, &rows, ignore_index, 0);
        let _ = reusing(Reuse::Near, || in_pool(|| gpt.loss(&tokens, training(grads, checkpointing))));
        limit_buffers();
        // On the host it would leave buffers of lengths that hardly come again.
        let shared = if gpt.place().is_some() { self.job.prefix } else { 0 };
        let sample = train.iter().max_by_key(|sample| sample.input_ids.len()).filter(|_| shared > 0);
        if let Some(sample) = sample {
            let Sample { input_ids, labels, .. } = sample;
            // As many rows as before, and beside them the prefix's keys and values with their gradients.
            let first = beginning(sample, ignore_index, shared);
            let mut then = Tokens { past: shared, ..Tokens::default() };
            while then.ids.len() < self.longest - shared {
                let left = self.longest - shared - then.ids.len();
                then.push_part(input_ids, labels, ignore_index, shared..input_ids.len().min(shared + left));
            }
            let shared = || {
                let (mut prefix, _) = gpt.begin(&first, training(grads, checkpointing));
                let _ = gpt.pass(&then, Some(&mut prefix), training(grads, checkpointing)).value();
                gpt.finish(prefix, grads);
            };
            in_pool(shared);
        }
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
        let (begun, before) = (Instant::now(), self.at.iter);
        let (window, scale, grad_norm) = loop {
            let start = self.at;
            let Some(window) = self.window()? else { return Ok(false) };
            let scale = 1.0 / (window.targets.max(1) as f64 * f64::from(self.at.loss_factor()));
            let grad_norm = norm(&self.grads) * scale;
            self.job.gpt.check()?;
            let too_large = window.loss.is_finite() && !grad_norm.is_finite();
            if !too_large || !self.at.loss_scale.as_mut().is_some_and(LossScale::lower) {
                break (window, scale, grad_norm);
            }
            self.at = Progress { loss_scale: self.at.loss_scale, ..start };
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
        if !finite {
            self.skipped(figures, &window)?;
        } else if logs(self.job.settings.train.log_interval, before..self.at.iter) || self.at.iter == self.plan.iters {
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
        let (mut losses, mut shared) = (Vec::new(), 0);
        self.grads.zero();
        let end = self.plan.iters.min(self.at.iter + self.plan.accumulate);
        window.rows = (self.at.iter..end)
            .flat_map(|_| self.batches.next_batch())
            .flat_map(|pack| &self.job.packs[pack])
            .copied()
            .collect();
        let samples = window.rows.iter().map(|row| &self.job.train[*row]);
        window.tokens = samples.clone().map(|sample| sample.input_ids.len() as u64).sum();
        for group in self.groups(self.job.train, &window.rows) {
            // Beside a long prefix there is no room for what follows in buffers of the longest micro batch.
            let reuse = if 4 * group.prefix > self.longest { Reuse::Double } else { Reuse::Any };
            shared += group.prefix * (group.rows.len() - 1);
            let mut prefix = self.begin(&group, &mut losses);
            for rows in self.passes(&group) {
                if self.outside.stop_asked() {
                    self.batches.seek(self.at.iter);
                    return Ok(None);
                }
                let tokens = collect(self.job.train, &rows, self.job.settings.data.ignore_index, group.prefix);
                window.targets += tokens.n_targets();
                let (gpt, training) = self.training(losses.len(), 1);
                let pass = || gpt.pass(&tokens, prefix.as_mut(), Some(training));
                losses.push((reusing(reuse, || in_pool(pass)), 1, rows));
            }
            if let Some(prefix) = prefix {
                window.targets += prefix.n_targets() * group.rows.len();
                let (gpt, grads) = (&*self.job.gpt, &mut self.grads);
                reusing(reuse, || in_pool(|| gpt.finish(prefix, grads)));
            }
        }
        // A device is waited for once a window, here.
        for (loss, times, rows) in losses {
            let loss = loss.value();
            if !loss.is_finite() {
                let broken: Vec<usize> = rows.iter().copied().filter(|row| !self.is_finite(*row)).collect();
                window.broken.extend(if broken.is_empty() { &rows } else { &broken });
            }
            window.loss += loss * times as f64;
        }
        window.broken.sort_unstable();
        window.broken.dedup();
        self.job.gpt.check()?;
        self.at.iter = end;
        self.at.tokens += window.tokens;
        let [tokens, not_computed] = &mut self.tokens;
        (*tokens, *not_computed) = (*tokens + window.tokens, *not_computed + shared as u64);
        Ok(Some(window))
    }

    /// Samples whose common prefix is worth a pass of its own.
    fn groups(&self, samples: &[Sample], rows: &[usize]) -> Vec<Group> {
        if self.job.prefix == 0 {
            return vec![Group { prefix: 0, rows: rows.to_vec() }];
        }
        let pass = if self.job.gpt.place().is_some() { PASS_ON_DEVICE } else { PASS_ON_HOST };
        prefix::groups(samples, rows, pass)
    }

    /// Samples of each pass over a group. They go side by side where they are together, with their prefix, no longer than
    /// the longest micro batch that can come, which the run has room for: as the loss is a sum over targets, it is the same
    /// but for dropout's masks, and the weights are read less often.
    fn passes(&self, group: &Group) -> Vec<Vec<usize>> {
        let length = |row: &usize| self.job.train[*row].input_ids.len() - group.prefix;
        let lengths: Vec<usize> = group.rows.iter().map(length).collect();
        let rows = |mut pass: Vec<usize>| {
            pass.sort_unstable();
            pass.into_iter().map(|at| group.rows[at]).collect()
        };
        let passes: Vec<Vec<usize>> = pack(&lengths, self.longest - group.prefix).into_iter().map(rows).collect();
        // On the host attention lays out the keys of the prefix for each sample: these, too, have to stay in bounds.
        let many = match (self.job.gpt.place(), group.prefix) {
            (None, 1..) => (2 * self.longest / group.prefix).max(1),
            _ => usize::MAX,
        };
        passes.iter().flat_map(|rows| rows.chunks(many)).map(<[usize]>::to_vec).collect()
    }

    /// Runs the prefix of a group forward, if it has one. Its loss counts for each of the samples.
    fn begin(&mut self, group: &Group, losses: &mut Vec<(Loss, usize, Vec<usize>)>) -> Option<Prefix> {
        let sample = &self.job.train[*group.rows.first().filter(|_| group.prefix > 0)?];
        let tokens = beginning(sample, self.job.settings.data.ignore_index, group.prefix);
        let (gpt, training) = self.training(losses.len(), group.rows.len());
        let (prefix, loss) = reusing(Reuse::Near, || in_pool(|| gpt.begin(&tokens, Some(training))));
        losses.push((loss, group.rows.len(), group.rows.clone()));
        Some(prefix)
    }

    /// The model, and what the window's pass number `at` over rows that count `times` over does with it.
    fn training(&mut self, at: usize, times: usize) -> (&Gpt, Training<'_>) {
        let seed = dropout_seed(dropout_seed(self.job.settings.seed, self.at.iter), at);
        let (weight, checkpointing) = (self.at.loss_factor() * times as f32, self.job.checkpointing);
        (self.job.gpt, Training { grads: &mut self.grads, weight, seed, checkpointing })
    }

    fn is_finite(&self, row: usize) -> bool {
        let tokens = collect(self.job.train, &[row], self.job.settings.data.ignore_index, 0);
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
        if self.job.val.is_empty() {
            return Ok(false);
        }
        let settings = self.job.settings;
        let begun = Instant::now();
        let (mut loss, mut targets, mut means, mut broken) = (0.0, 0, Vec::new(), Vec::new());
        let mut comparable = None;
        let limit = if all { usize::MAX } else { settings.eval.max_iters };
        for Scored { rows, loss: sum, targets: n_targets } in self.score(limit)? {
            if !sum.is_finite() {
                broken.extend(rows);
            }
            means.push(sum / n_targets.max(1) as f64);
            loss += sum;
            targets += n_targets;
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

    /// The first `limit` micro batches of the validation samples.
    ///
    /// # Errors
    /// When the device fails.
    fn score(&self, limit: usize) -> Result<Vec<Scored>> {
        let (val, ignore_index) = (self.job.val, self.job.settings.data.ignore_index);
        let micro = self.job.settings.train.micro_batch_size.max(1);
        let rows: Vec<usize> = (0..val.len().min(limit.saturating_mul(micro))).collect();
        let scored = rows.chunks(micro).map(|rows| Scored { rows: rows.to_vec(), loss: 0.0, targets: 0 });
        let mut scored: Vec<Scored> = scored.collect();
        let gpt = &*self.job.gpt;
        for Group { prefix: length, mut rows } in self.groups(val, &rows) {
            let mut begun = None;
            if let Some(first) = rows.first().filter(|_| length > 0) {
                let tokens = beginning(&val[*first], ignore_index, length);
                let (prefix, loss) = in_pool(|| gpt.begin(&tokens, None));
                begun = Some((prefix, loss.value()));
            }
            rows.sort_unstable();
            for rows in rows.chunk_by(|a, b| a / micro == b / micro) {
                let tokens = collect(val, rows, ignore_index, length);
                let loss = in_pool(|| gpt.pass(&tokens, begun.as_mut().map(|(prefix, _)| prefix), None)).value();
                let (of_prefix, targets) =
                    begun.as_ref().map_or((0.0, 0), |(prefix, loss)| (*loss, prefix.n_targets()));
                let scored = &mut scored[rows[0] / micro];
                scored.loss += loss + of_prefix * rows.len() as f64;
                scored.targets += tokens.n_targets() + targets * rows.len();
                gpt.check()?;
            }
        }
        Ok(scored)
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

/// Whether a step is logged: LitGPT logs after each `interval`th micro batch, a step here after those that it holds.
fn logs(interval: usize, iters: Range<usize>) -> bool {
    let interval = interval.max(1);
    iters.start / interval < iters.end / interval
}

/// Name of the folder of a run that came to its end.
pub const FINAL: &str = "final";

/// Name of the folder of a step.
#[must_use]
pub fn step_name(step: usize) -> String {
    format!("step-{step:06}")
}

/// The first `length` tokens of a sample.
fn beginning(sample: &Sample, ignore_index: i32, length: usize) -> Tokens {
    let mut tokens = Tokens::default();
    tokens.push_part(&sample.input_ids, &sample.labels, ignore_index, 0..length);
    tokens
}

/// What samples have behind a prefix of `past` tokens, end to end as one micro batch.
fn collect(samples: &[Sample], rows: &[usize], ignore_index: i32, past: usize) -> Tokens {
    let mut tokens = Tokens { past, ..Tokens::default() };
    for Sample { input_ids, labels, .. } in rows.iter().map(|row| &samples[*row]) {
        tokens.push_part(input_ids, labels, ignore_index, past..input_ids.len());
    }
    tokens
}

/// A seed of a seed and a number (SplitMix64): for the dropout masks, that of the run, the window's first iteration and the
/// pass.
fn dropout_seed(seed: u64, number: usize) -> u64 {
    let mut z = seed ^ (number as u64 + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_log_interval_counts_micro_batches() {
        let logged = |interval: usize| (0..6).filter(|step| logs(interval, 4 * step..4 * step + 4)).collect::<Vec<_>>();
        assert_eq!(logged(1), [0, 1, 2, 3, 4, 5]);
        assert_eq!(logged(4), [0, 1, 2, 3, 4, 5]);
        assert_eq!(logged(6), [1, 2, 4, 5]);
        assert_eq!(logged(8), [1, 3, 5]);
    }
}
