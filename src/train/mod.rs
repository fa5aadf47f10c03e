//! The training loop: micro batches, accumulation, steps, evaluation, checkpoints. It prints nothing and writes no
//! file itself: it tells a [`Report`] what happens and calls back to save.
//!
//! The loss of an optimizer step is the sum over the target tokens of its accumulation window divided by their number,
//! so it does not depend on how the window is cut into micro batches. The last, partial window is stepped too.

pub mod estimate;
pub mod page;
mod plan;
mod progress;
pub mod report;
mod scale;
pub mod schedule;
pub mod settings;
pub mod tensorboard;
mod validate;
mod window;

use crate::data::sft::{Batches, Sample};
use crate::error::Error;
use crate::model::Gpt;
use crate::ops::Matrix;
use crate::ops::device::Dtype;
use crate::ops::optimizer::{AdamW, Moments, norm};
pub use plan::{Plan, longest_tokens, side_by_side};
pub use progress::Progress;
use report::{Event, Figures, Report, Summary, row_numbers};
pub use scale::LossScale;
use schedule::Schedule;
use settings::FinetuneSettings;
use std::ops::Range;
use std::time::Instant;
use window::Window;

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
