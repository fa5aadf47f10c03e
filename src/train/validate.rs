//! Validation: the loss of samples that are held out, and an answer to look at.

use super::Run;
use super::report::{Event, row_numbers};
use super::settings::EvaluateExample;
use super::window::{beginning, collect, dropout_seed};
use crate::data::prefix::Group;
use crate::error::{Error, Result};
use crate::ops::in_pool;
use std::time::Instant;

/// What a micro batch of validation samples came to.
struct Scored {
    rows: Vec<usize>,
    /// Sum over its targets.
    loss: f64,
    targets: usize,
}

impl Run<'_, '_> {
    /// Mean validation loss in nats a target token, over all samples or at most `eval.max_iters` micro batches. Whether
    /// it is the lowest so far: for that, the same samples count every time.
    pub(super) fn validate(&mut self, all: bool) -> anyhow::Result<bool> {
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
    pub(super) fn example(&mut self) -> anyhow::Result<()> {
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
