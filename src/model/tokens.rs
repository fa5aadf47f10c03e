//! The samples of a micro batch: ids, targets, where each begins.

use crate::ops::Segment;
use crate::ops::device::Constant;
use crate::ops::rope::Tables;
use std::ops::Range;

/// Samples of a micro batch end to end.
#[derive(Debug, Clone, Default)]
pub struct Tokens {
    /// Token ids of all samples.
    pub ids: Vec<u32>,
    /// For each token the target id of its successor, or `None` where nothing is learned.
    pub targets: Vec<Option<u32>>,
    /// The samples.
    pub segments: Vec<Segment>,
    /// Position of each sample's first token, 0 unless they go on after a prefix.
    pub past: usize,
}

impl Tokens {
    /// Appends a sample; label `t` is predicted from position `t - 1`, and labels equal to `ignore_index` are not
    /// learned.
    pub fn push(&mut self, ids: &[u32], labels: &[i32], ignore_index: i32) {
        self.push_part(ids, labels, ignore_index, 0..ids.len());
    }

    /// Appends some positions of a sample, as a sample.
    pub fn push_part(&mut self, ids: &[u32], labels: &[i32], ignore_index: i32, part: Range<usize>) {
        let start = self.ids.len();
        let target = |at: usize| labels.get(at + 1).filter(|l| **l != ignore_index).map(|l| *l as u32);
        self.ids.extend_from_slice(&ids[part.clone()]);
        self.targets.extend(part.map(target));
        self.segments.push(start..self.ids.len());
    }

    /// Number of targets.
    #[must_use]
    pub fn n_targets(&self) -> usize {
        self.targets.iter().flatten().count()
    }

    /// Positions that its samples need.
    pub(super) fn longest(&self) -> usize {
        self.segments.iter().map(|s| self.past + s.len()).max().unwrap_or(0)
    }

    /// Each token's row of the rotary tables.
    pub(super) fn rows(&self, tables: &Tables) -> Constant<u32> {
        let rows = |segment: &Segment| {
            let tokens = self.past + segment.len();
            let first = tables.first_row(tokens);
            (first + self.past..first + tokens).map(|row| row as u32)
        };
        self.segments.iter().flat_map(rows).collect()
    }
}
