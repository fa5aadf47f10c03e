//! The backward of attention on the host: blocks of queries of one key head's query heads for the threads.

use super::super::{Attention, Block, ROWS, Saved, Span, Spans};
use super::{LANES, scores};
use crate::ops::math::{dot, exp, soft_cap, vectorize};
use crate::ops::matmul::{Left, Right, Side, matmul_by};
use crate::ops::matrix::{Matrix, View, rows_per_task};
use rayon::prelude::*;
use std::ops::Range;

/// Scores of a block that are worked on together in the backward, so that they stay in the second-level cache.
const SCORES: usize = 64 << 10;

/// Keys and values of a sample, of one head, as the backward's products take them.
struct Keys<'a> {
    /// Whether they are rounded to bf16.
    rounded: bool,
    /// kᵀ.
    kt: Right<'a>,
    /// vᵀ.
    vt: Right<'a>,
    /// k.
    k: Right<'a>,
    /// All of both.
    kv: [View<'a>; 2],
}

impl<'a> Keys<'a> {
    fn of([k, v]: [View<'a>; 2], rounded: bool) -> Self {
        let [kt, vt] = [k, v].map(|view| Right::of(Side::T(view), rounded));
        Self { rounded, kt, vt, k: Right::of(Side::N(k), rounded), kv: [k, v] }
    }
}

/// Some blocks of a sample, of the query heads of one key head.
struct Task<'a> {
    span: usize,
    group: usize,
    /// Their places among the blocks of the sample.
    blocks: Vec<(usize, &'a Block)>,
}

/// What comes of a task.
struct Gradients {
    /// For each of its blocks, its place and each head's rows after those of the one before.
    dq: Vec<(usize, Matrix)>,
    /// Of all keys of the sample, from these blocks.
    dk: Matrix,
    dv: Matrix,
}

/// Keys or values of one head, of a whole sample.
fn gathered(x: View<'_>, span: &Span) -> Matrix {
    let mut out = Matrix::new(span.keys(), x.cols);
    for (to, row) in out.chunks_exact_mut(x.cols).zip(span.rows(0..span.keys()).flatten()) {
        to.copy_from_slice(x.row(row));
    }
    out
}

impl Attention {
    pub(in crate::ops::attention) fn backward_on_host(
        &self,
        [q, k, v]: [View<'_>; 3],
        o: &Matrix,
        d_o: &Matrix,
        saved: &Saved,
        spans: &Spans,
    ) -> Matrix {
        let blocks: Vec<Vec<Block>> = spans.iter().map(|span| self.blocks(span).collect()).collect();
        let groups = 0..self.n_query_groups;
        let of_groups: Vec<(usize, usize)> =
            (0..spans.len()).flat_map(|span| groups.clone().map(move |group| (span, group))).collect();
        // Keys and values of one head lie together but for those of a prefix.
        let gathered: Vec<Option<[Matrix; 2]>> = of_groups
            .iter()
            .map(|(span, group)| {
                let span = &spans[*span];
                (span.prefix > 0).then(|| [k, v].map(|view| gathered(self.head(view, *group), span)))
            })
            .collect();
        let keys: Vec<Keys<'_>> = of_groups
            .par_iter()
            .zip(&gathered)
            .map(|((span, group), gathered)| {
                let kv = match gathered {
                    Some(both) => both.each_ref().map(Matrix::view),
                    None => [k, v].map(|view| self.head(view, *group).slice_rows(spans[*span].k.clone())),
                };
                Keys::of(kv, blocks[*span].first().is_some_and(|block| self.rounded(block)))
            })
            .collect();
        let mut tasks: Vec<Task<'_>> =
            of_groups.iter().flat_map(|(span, group)| self.tasks((*span, *group), &blocks[*span])).collect();
        tasks.sort_by_key(|task| {
            std::cmp::Reverse(task.blocks.iter().map(|(_, b)| b.rows.len() * b.keys.len()).sum::<usize>())
        });
        let at = |task: &Task<'_>| task.span * self.n_query_groups + task.group;
        let grads: Vec<Gradients> = tasks
            .par_iter()
            .with_max_len(1)
            .map(|task| self.gradients([q, o.view(), d_o.view()], &keys[at(task)], saved, task))
            .collect();
        let mut of_group: Vec<Vec<&Gradients>> = of_groups.iter().map(|_| Vec::new()).collect();
        tasks.iter().zip(&grads).for_each(|(task, grads)| of_group[at(task)].push(grads));
        self.assembled((q.rows, k.rows), spans, &blocks, &of_group)
    }

    /// The blocks of a sample and group in so many tasks as the group has heads, of about one length: the tasks' gradients of
    /// keys and values take no more memory than one of each query head would, and their number does not hang on that of the
    /// threads.
    fn tasks<'a>(&self, (span, group): (usize, usize), blocks: &'a [Block]) -> Vec<Task<'a>> {
        let count = (self.n_head / self.n_query_groups).min(blocks.len());
        let mut tasks: Vec<Task<'_>> = (0..count).map(|_| Task { span, group, blocks: Vec::new() }).collect();
        // The longest, which is the last, goes to the first task, and with every round the order turns.
        for (i, block) in blocks.iter().enumerate().rev() {
            let nth = blocks.len() - 1 - i;
            let place = nth % (2 * count);
            tasks[place.min(2 * count - 1 - place)].blocks.push((i, block));
        }
        tasks
    }

    fn gradients(&self, [q, o, d_o]: [View<'_>; 3], keys: &Keys<'_>, saved: &Saved, task: &Task<'_>) -> Gradients {
        let (hs, group) = (self.head_size, self.n_head / self.n_query_groups);
        let [mut dk, mut dv] = keys.kv.map(|x| Matrix::zeros(x.rows, hs));
        let mut dq = Vec::with_capacity(task.blocks.len());
        for (place, block) in &task.blocks {
            let (rows, width, rounded) = (block.rows.len(), block.keys.len(), self.rounded(block));
            let own;
            let keys = if block.keys.start == 0 && rounded == keys.rounded {
                keys
            } else {
                own = Keys::of(keys.kv.map(|x| x.slice_rows(block.keys.clone())), rounded);
                &own
            };
            let mut of_block = Matrix::new(group * rows, hs);
            let together = (ROWS / rows).min(SCORES / (rows * width)).clamp(1, group);
            for first in (0..group).step_by(together) {
                let within = first..(first + together).min(group);
                let heads = task.group * group + within.start..task.group * group + within.end;
                let [q, d_o] = [q, d_o].map(|x| self.stacked(x, heads.clone(), &block.rows));
                let [q_left, d_left] = [&q, &d_o].map(|x| Left::of(Side::N(x.view()), rounded));
                let mut p = scores(self.scale, &q_left, q.rows(), &keys.kt, width);
                if let Some(cap) = self.softcap {
                    soft_cap(&mut p, cap);
                }
                let mut ds = scores(1.0, &d_left, q.rows(), &keys.vt, width);
                let cols = p.cols();
                for (i, (p, ds)) in p.chunks_exact_mut(cols).zip(ds.chunks_exact_mut(cols)).enumerate() {
                    let (head, row) = (heads.start + i / rows, block.rows.start + i % rows);
                    let lse = saved.lse[head * saved.lse.cols() + row];
                    let seen = self.seen(block, i % rows);
                    score_gradient(self.softcap, p, ds, seen, lse, [self.head(o, head).row(row), d_o.row(i)]);
                }
                let (p, ds) = (p.columns(0..width), ds.columns(0..width));
                let [q, d_o] = [&q, &d_o].map(|x| Right::of(Side::N(x.view()), rounded));
                let at = block.keys.start * hs..block.keys.end * hs;
                matmul_by(dv.part_mut(at.clone(), hs), true, 1.0, &Left::of(Side::T(p), rounded), &d_o);
                matmul_by(dk.part_mut(at, hs), true, self.scale, &Left::of(Side::T(ds), rounded), &q);
                let to = of_block.part_mut(within.start * rows * hs..within.end * rows * hs, hs);
                matmul_by(to, false, self.scale, &Left::of(Side::N(ds), rounded), &keys.k);
            }
            dq.push((*place, of_block));
        }
        Gradients { dq, dk, dv }
    }

    /// The gradients of all tasks, those of each sample and group together in `of_group`, side by side.
    fn assembled(
        &self,
        (queries, keys): (usize, usize),
        spans: &Spans,
        blocks: &[Vec<Block>],
        of_group: &[Vec<&Gradients>],
    ) -> Matrix {
        let (groups, past) = (self.n_query_groups, keys - queries);
        let mut d = Matrix::new(keys, (self.n_head + 2 * groups) * self.head_size);
        let cols = d.cols();
        let (shared, own) = d.split_at_mut(past * cols);
        // The places of each query row: its sample, its block, and which of its rows.
        let of_block = |(span, (place, block)): (usize, (usize, &Block))| {
            block.rows.clone().enumerate().map(move |(i, row)| (row, (span, place, i))).collect::<Vec<_>>()
        };
        let all = blocks.iter().enumerate().flat_map(|(s, blocks)| blocks.iter().enumerate().map(move |b| (s, b)));
        let mut places = vec![(0, 0, 0); queries];
        all.flat_map(of_block).for_each(|(row, at)| places[row] = at);
        let rows = own.par_chunks_exact_mut(cols).zip(&places).with_min_len(rows_per_task(queries)).enumerate();
        rows.for_each(|(t, (row, (span, place, i)))| {
            let of_groups = &of_group[span * groups..][..groups];
            let (dq, dkv) = row.split_at_mut(self.q_cols());
            let group_cols = dq.len() / groups;
            for (dq, grads) in dq.chunks_exact_mut(group_cols).zip(of_groups) {
                let mut found = grads.iter().flat_map(|grads| &grads.dq).filter(|(at, _)| at == place);
                let (_, of_block) = found.next().expect("every block is in a task");
                let rows = blocks[*span][*place].rows.len();
                for (head, dq) in dq.chunks_exact_mut(self.head_size).enumerate() {
                    dq.copy_from_slice(of_block.row(head * rows + i));
                }
            }
            dkv.fill(0.0);
            self.add_keys(of_groups, spans[*span].past() + t - spans[*span].q.start, dkv);
        });
        shared.par_chunks_exact_mut(cols).enumerate().for_each(|(key, row)| {
            row.fill(0.0);
            let spans = of_group.chunks_exact(groups);
            spans.for_each(|of_groups| self.add_keys(of_groups, key, &mut row[self.q_cols()..]));
        });
        d
    }

    /// Adds the gradients of one key and value, of all groups, to a row of all key and value heads.
    fn add_keys(&self, of_groups: &[Vec<&Gradients>], key: usize, row: &mut [f32]) {
        let (dk, dv) = row.split_at_mut(row.len() / 2);
        let rows = dk.chunks_exact_mut(self.head_size).zip(dv.chunks_exact_mut(self.head_size));
        for ((dk, dv), grads) in rows.zip(of_groups) {
            for grads in grads {
                dk.iter_mut().zip(grads.dk.row(key)).for_each(|(sum, d)| *sum += d);
                dv.iter_mut().zip(grads.dv.row(key)).for_each(|(sum, d)| *sum += d);
            }
        }
    }
}

vectorize! {
    /// Turns a row of scores, of whole lanes, into probabilities and their gradient into that of the scores; what is not seen
    /// becomes 0. `o`: the attention's output and its gradient.
    fn score_gradient(
        softcap: Option<f32>,
        p: &mut [f32],
        dp: &mut [f32],
        seen: Range<usize>,
        lse: f32,
        o: [&[f32]; 2],
    ) {
        let correction = dot(o[0], o[1]);
        let inverse = softcap.map_or(0.0, f32::recip);
        for (p, dp) in p.as_chunks_mut::<LANES>().0.iter_mut().zip(dp.as_chunks_mut::<LANES>().0) {
            for j in 0..LANES {
                let ratio = p[j] * inverse;
                p[j] = exp(p[j] - lse);
                dp[j] = p[j] * (dp[j] - correction) * (1.0 - ratio * ratio);
            }
        }
        for outside in [0..seen.start, seen.end..p.len()] {
            p[outside.clone()].fill(0.0);
            dp[outside].fill(0.0);
        }
    }
}
