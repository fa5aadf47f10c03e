//! Which rows of queries and keys are one sample's.

use crate::ops::Segment;
use crate::ops::device::{Constant, Device};
use std::ops::Range;

/// Query rows of one sample and the key rows that they belong to; the last of both is the same position.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Span {
    /// Rows of `q`.
    pub q: Range<usize>,
    /// The first rows of `k` and `v`, with which several samples begin; 0 where its keys are all in `k`.
    pub prefix: usize,
    /// Rows of `k` and `v`, after those of the prefix.
    pub k: Range<usize>,
}

impl Span {
    /// Number of keys.
    pub(super) fn keys(&self) -> usize {
        self.prefix + self.k.len()
    }

    /// Keys before the first query.
    pub(super) fn past(&self) -> usize {
        self.keys() - self.q.len()
    }

    /// Rows of `k` and `v` of some keys, in one piece or two.
    pub(super) fn rows(&self, keys: Range<usize>) -> impl Iterator<Item = Range<usize>> + use<> {
        let own = |key: usize| self.k.start + key.max(self.prefix) - self.prefix;
        let pieces = [keys.start.min(self.prefix)..keys.end.min(self.prefix), own(keys.start)..own(keys.end)];
        pieces.into_iter().filter(|rows| !rows.is_empty())
    }
}

/// The samples of a pass.
#[derive(Debug, Clone, Default)]
pub struct Spans {
    spans: Vec<Span>,
    /// At which row of the keys the sample of each query row starts, or goes on after the prefix; none where all rows are
    /// of one.
    starts: Constant<u32>,
}

impl Spans {
    /// Samples whose queries and keys are all there, as in training.
    #[must_use]
    pub fn whole(segments: &[Segment]) -> Self {
        Self::after(0, segments)
    }

    /// Samples that all begin with the first `prefix` rows of the keys; the others are those of the samples' queries.
    #[must_use]
    pub fn after(prefix: usize, segments: &[Segment]) -> Self {
        match segments {
            [one] => Self::tail(one.len(), prefix + one.len()),
            several => {
                let span = |s: &Segment| Span { q: s.clone(), prefix, k: prefix + s.start..prefix + s.end };
                several.iter().map(span).collect::<Vec<_>>().into()
            }
        }
    }

    /// New rows after others of their sample, `kept` in all.
    #[must_use]
    pub fn tail(new: usize, kept: usize) -> Self {
        vec![Span { q: 0..new, prefix: 0, k: 0..kept }].into()
    }

    /// Rows of the keys with which all samples begin.
    pub(super) fn prefix(&self) -> usize {
        self.spans.first().map_or(0, |span| span.prefix)
    }

    /// Address of where the sample of each query row starts; 0 where all rows are of one.
    pub(super) fn starts(&self, device: &Device) -> u64 {
        if self.starts.is_empty() { 0 } else { self.starts.on(device) }
    }
}

impl From<Vec<Span>> for Spans {
    fn from(spans: Vec<Span>) -> Self {
        let starts = spans.iter().filter(|_| spans.len() > 1);
        let starts = starts.flat_map(|span| std::iter::repeat_n(span.k.start as u32, span.q.len())).collect();
        Self { spans, starts }
    }
}

impl std::ops::Deref for Spans {
    type Target = [Span];

    fn deref(&self) -> &[Span] {
        &self.spans
    }
}
