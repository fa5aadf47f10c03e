//! Which samples begin alike: a template's or a system prompt's tokens, which need to be computed only once for them all
//! (`model::prefix`).

use super::sft::Sample;
use rayon::prelude::*;
use std::cmp::Ordering;
use std::ops::Range;

/// Samples that are sorted and searched for prefixes together; the time grows with its square.
const TOGETHER: usize = 1024;

/// Samples with the same first tokens.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Group {
    /// How many: the targets of these positions are the same, too, and no sample ends with them. 0: none that would pay.
    pub prefix: usize,
    /// The samples.
    pub rows: Vec<usize>,
}

/// Each position with its target, of which the last has none and is left out.
fn positions(sample: &Sample) -> impl Iterator<Item = (u32, i32)> + '_ {
    sample.input_ids.iter().copied().zip(sample.labels.iter().skip(1).copied())
}

fn in_order(a: &Sample, b: &Sample) -> Ordering {
    positions(a).cmp(positions(b))
}

fn in_common(a: &Sample, b: &Sample) -> usize {
    positions(a).zip(positions(b)).take_while(|(a, b)| a == b).count()
}

/// The most positions that two of the samples have in common.
#[must_use]
pub fn longest(samples: &[Sample]) -> usize {
    let mut sorted: Vec<&Sample> = samples.iter().collect();
    sorted.par_sort_unstable_by(|a, b| in_order(a, b));
    sorted.windows(2).map(|pair| in_common(pair[0], pair[1])).max().unwrap_or(0)
}

/// The samples `rows` in groups, such that as many positions as possible need not be computed. A group's prefix costs a
/// pass through the model, which is worth `pass` positions. The samples of no prefix come last, as they were.
#[must_use]
pub fn groups(samples: &[Sample], rows: &[usize], pass: usize) -> Vec<Group> {
    // By place: where an epoch ends, a row may come twice.
    let sample = |at: usize| &samples[rows[at]];
    let mut sorted: Vec<usize> = (0..rows.len()).collect();
    sorted.sort_by(|a, b| in_order(sample(*a), sample(*b)));
    let cuts = sorted.chunks(TOGETHER).flat_map(|places| {
        let samples: Vec<&Sample> = places.iter().map(|at| sample(*at)).collect();
        best_cuts(&samples, pass).into_iter().map(move |(prefix, range)| (prefix, &places[range]))
    });
    let (mut groups, mut alone) = (Vec::new(), vec![true; rows.len()]);
    for (prefix, places) in cuts {
        places.iter().for_each(|at| alone[*at] = false);
        groups.push(Group { prefix, rows: places.iter().map(|at| rows[*at]).collect() });
    }
    let alone: Vec<usize> = (0..rows.len()).filter(|at| alone[*at]).map(|at| rows[at]).collect();
    if !alone.is_empty() {
        groups.push(Group { prefix: 0, rows: alone });
    }
    groups
}

/// Where to cut sorted samples so that most is saved, by dynamic programming over their number: prefixes and the samples
/// that begin with them.
fn best_cuts(samples: &[&Sample], pass: usize) -> Vec<(usize, Range<usize>)> {
    let common: Vec<usize> = samples.windows(2).map(|pair| in_common(pair[0], pair[1])).collect();
    // Of the first `n` samples: what is saved, and the length and prefix of the last group.
    let mut best = vec![(0, 1, 0)];
    for n in 1..=samples.len() {
        let mut found = (best[n - 1].0, 1, 0);
        let mut prefix = usize::MAX;
        for length in 2..=n {
            prefix = prefix.min(common[n - length]);
            let saved = best[n - length].0 + (prefix * (length - 1)).saturating_sub(pass);
            if saved > found.0 {
                found = (saved, length, prefix);
            }
        }
        best.push(found);
    }
    let (mut cuts, mut end) = (Vec::new(), samples.len());
    while end > 0 {
        let (_, length, prefix) = best[end];
        if prefix > 0 {
            cuts.push((prefix, end - length..end));
        }
        end -= length;
    }
    cuts
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::Origin;

    fn samples(texts: &[&str]) -> Vec<Sample> {
        let sample = |text: &&str| {
            let input_ids: Vec<u32> = text.bytes().map(|b| u32::from(b.to_ascii_lowercase())).collect();
            // Capitals are not learned.
            let labels = text.bytes().map(|b| if b.is_ascii_uppercase() { -100 } else { i32::from(b) }).collect();
            Sample { prompt_len: 0, raw_len: input_ids.len(), input_ids, labels, row: Origin { file: 0, row: 1 } }
        };
        texts.iter().map(sample).collect()
    }

    fn group(prefix: usize, rows: &[usize]) -> Group {
        Group { prefix, rows: rows.to_vec() }
    }

    #[test]
    fn a_prefix_ends_where_tokens_or_targets_differ() {
        let samples = samples(&["abcde", "abcdf", "aBcde", "abc", "", "x"]);
        let common = |a: usize, b: usize| in_common(&samples[a], &samples[b]);
        // d's target differs; a's target is learned in one only; a sample keeps its last position.
        assert_eq!([common(0, 1), common(0, 2), common(0, 3), common(3, 3)], [3, 0, 2, 2]);
        assert_eq!([common(0, 4), common(4, 4), common(0, 5), common(5, 5)], [0; 4]);
        // What is masked may differ behind the prefix.
        let masked = self::samples(&["ABCDxy", "ABCEuv"]);
        assert_eq!(in_common(&masked[0], &masked[1]), 3);
        assert_eq!(longest(&samples), 3);
        assert_eq!(longest(&samples[4..]), 0);
    }

    #[test]
    fn groups_save_the_most() {
        let samples = samples(&["longprompt one", "short", "longprompt two", "ab1", "longprint", "ab2", "shirt"]);
        let rows: Vec<usize> = (0..samples.len()).collect();
        // Three share 4 positions, two of them 10; the second is worth more.
        assert_eq!(
            groups(&samples, &rows, 0),
            [group(1, &[6, 1]), group(10, &[0, 2]), group(1, &[3, 5]), group(0, &[4])]
        );
        assert_eq!(groups(&samples, &rows, 1), [group(10, &[0, 2]), group(0, &[1, 3, 4, 5, 6])]);
        assert_eq!(groups(&samples, &[1, 4], 1), [group(0, &[1, 4])]);
        assert_eq!(groups(&samples, &rows, 10), [group(0, &rows)]);
        assert_eq!(groups(&samples, &[0, 1, 0], 1), [group(13, &[0, 0]), group(0, &[1])]);
        assert_eq!(groups(&samples, &[], 1), []);
    }

    #[test]
    fn every_row_is_in_one_group() {
        let texts: Vec<String> = (0..3 * TOGETHER).map(|i| format!("prefix {} of {i}", i % 7)).collect();
        let samples = samples(&texts.iter().map(String::as_str).collect::<Vec<_>>());
        let rows: Vec<usize> = (0..samples.len()).rev().collect();
        let mut seen: Vec<usize> = groups(&samples, &rows, 3).into_iter().flat_map(|g| g.rows).collect();
        seen.sort_unstable();
        assert_eq!(seen, (0..samples.len()).collect::<Vec<_>>());
    }
}
