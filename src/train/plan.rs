//! How long a run is, and which samples go together.

use super::settings::FinetuneSettings;
use crate::data::sft::{Sample, pack};
use crate::error::{Error, Result};

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
pub(super) fn longest(samples: &[Sample], packs: &[Vec<usize>], micro_batch_size: usize) -> Vec<usize> {
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
