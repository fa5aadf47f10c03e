//! An accumulation window: its micro batches forward and backward, and what samples begin with computed once for them.

use super::plan::longest;
use super::{Job, Run};
use crate::data::prefix::{self, Group};
use crate::data::sft::{Sample, pack};
use crate::error::Result;
use crate::model::{Gpt, Prefix, Tokens, Training};
use crate::ops::head::Loss;
use crate::ops::matrix::{Reuse, limit_buffers, reusing};
use crate::ops::{Matrix, in_pool};

/// Positions that a pass of its own for a prefix has to save. It reads the weights once more, which takes a processor as
/// long as 16 positions, and finds few buffers of its lengths: where less is saved, no gain was measured.
const PASS_ON_HOST: usize = 128;
/// The same on a device, of which a pass of few rows uses a small part.
const PASS_ON_DEVICE: usize = 256;

/// What an accumulation window came to.
#[derive(Default)]
pub(super) struct Window {
    /// Sum over its targets.
    pub(super) loss: f64,
    pub(super) targets: usize,
    pub(super) tokens: u64,
    /// Its samples.
    pub(super) rows: Vec<usize>,
    /// Those whose own loss is no finite number; where only that of a pass is none, its samples.
    pub(super) broken: Vec<usize>,
}

impl Run<'_, '_> {
    /// Runs the longest micro batch that can come once, and forgets it: what a run needs of memory shows at once, and the
    /// buffers that it leaves serve every later micro batch.
    pub(super) fn rehearse(&mut self) -> Result<()> {
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

    /// Sums loss and gradient over an accumulation window. `None`: a stop was asked for; the window's micro batches so
    /// far are forgotten, and taken again by the run that resumes.
    ///
    /// # Errors
    /// When the device fails.
    pub(super) fn window(&mut self) -> Result<Option<Window>> {
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
    pub(super) fn groups(&self, samples: &[Sample], rows: &[usize]) -> Vec<Group> {
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
}

/// The first `length` tokens of a sample.
pub(super) fn beginning(sample: &Sample, ignore_index: i32, length: usize) -> Tokens {
    let mut tokens = Tokens::default();
    tokens.push_part(&sample.input_ids, &sample.labels, ignore_index, 0..length);
    tokens
}

/// What samples have behind a prefix of `past` tokens, end to end as one micro batch.
pub(super) fn collect(samples: &[Sample], rows: &[usize], ignore_index: i32, past: usize) -> Tokens {
    let mut tokens = Tokens { past, ..Tokens::default() };
    for Sample { input_ids, labels, .. } in rows.iter().map(|row| &samples[*row]) {
        tokens.push_part(input_ids, labels, ignore_index, past..input_ids.len());
    }
    tokens
}

/// A seed of a seed and a number (SplitMix64): for the dropout masks, that of the run, the window's first iteration and the
/// pass.
pub(super) fn dropout_seed(seed: u64, number: usize) -> u64 {
    let mut z = seed ^ (number as u64 + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}
