//! Attention on the host: blocks of queries for the threads.

mod backward;

use super::{Attention, Block, FEW, KEYS, KEYS_OF_FEW, NOTHING, ROUNDED, ROWS, Saved, Span, Spans};
use crate::ops::math::{exp_sum, max, soft_cap, vectorize};
use crate::ops::matmul::{Left, Right, Side, matmul_by};
use crate::ops::matrix::{Matrix, View, rows_per_task};
use rayon::prelude::*;
use std::ops::Range;

/// Scores of a row are worked on so many at a time, with none left over.
const LANES: usize = 16;

/// A block of some query heads that have their keys in common.
struct Work<'a> {
    span: &'a Span,
    block: Block,
    heads: Range<usize>,
}

/// Attention over some keys.
struct Part {
    /// Each head's rows after those of the one before.
    o: Matrix,
    lse: Vec<f32>,
}

impl Part {
    /// Makes it the attention over the keys of both.
    fn add(&mut self, other: &Self) {
        let cols = self.o.cols();
        let rows = self.o.chunks_exact_mut(cols).zip(&mut self.lse);
        rows.zip(other.o.chunks_exact(cols).zip(&other.lse)).for_each(|(row, other)| combine(row, other));
    }
}

/// Makes a row of attention and its log-sum-exp those over the keys of both.
fn combine((o, lse): (&mut [f32], &mut f32), (other, other_lse): (&[f32], &f32)) {
    if *lse == NOTHING {
        o.copy_from_slice(other);
        *lse = *other_lse;
        return;
    }
    let larger = lse.max(*other_lse);
    let total = larger + ((*lse - larger).exp() + (*other_lse - larger).exp()).ln();
    let [share, other_share] = [*lse, *other_lse].map(|lse| (lse - total).exp());
    o.iter_mut().zip(other).for_each(|(o, other)| *o = *o * share + other * other_share);
    *lse = total;
}

/// `scale · a b`, `rows` by `keys`, in rows of whole lanes. Entries outside `seen` mean nothing.
fn scores(scale: f32, a: &Left<'_>, rows: usize, b: &Right<'_>, keys: usize) -> Matrix {
    let mut s = Matrix::new(rows, keys.next_multiple_of(LANES));
    matmul_by(s.columns_mut(0..keys), false, scale, a, b);
    s
}

impl Attention {
    /// Whether products of a block are rounded, in the forward as in the backward.
    fn rounded(&self, block: &Block) -> bool {
        self.bf16 && block.rows.len() >= ROUNDED
    }

    /// Some rows of some heads, each head's after those of the one before.
    fn stacked(&self, x: View<'_>, heads: Range<usize>, rows: &Range<usize>) -> Matrix {
        let mut out = Matrix::new(heads.len() * rows.len(), self.head_size);
        let from = heads.flat_map(|head| rows.clone().map(move |row| (head, row)));
        for (to, (head, row)) in out.chunks_exact_mut(self.head_size).zip(from) {
            to.copy_from_slice(self.head(x, head).row(row));
        }
        out
    }

    pub(super) fn forward_on_host(&self, [q, k, v]: [View<'_>; 3], spans: &Spans) -> (Matrix, Saved) {
        let work: Vec<Work<'_>> = spans.iter().flat_map(|span| self.work(span)).collect();
        let parts: Vec<Part> = work.par_iter().with_max_len(1).map(|work| self.forward_part([q, k, v], work)).collect();
        // The parts of a row follow one another.
        let mut of_row = vec![0..0; q.rows];
        for (at, Work { block, .. }) in work.iter().enumerate() {
            for parts in &mut of_row[block.rows.clone()] {
                *parts = if parts.end == 0 { at } else { parts.start }..at + 1;
            }
        }
        let hs = self.head_size;
        let (mut o, mut of_rows) = (Matrix::new(q.rows, self.q_cols()), Matrix::new(q.rows, self.n_head));
        of_rows.fill(NOTHING);
        let rows = o.par_chunks_exact_mut(self.q_cols()).zip(of_rows.par_chunks_exact_mut(self.n_head));
        rows.with_min_len(rows_per_task(q.rows)).enumerate().for_each(|(row, (o, lse))| {
            for at in of_row[row].clone() {
                let (Work { block, heads, .. }, part) = (&work[at], &parts[at]);
                for (i, head) in heads.clone().enumerate() {
                    let from = i * block.rows.len() + row - block.rows.start;
                    combine((&mut o[head * hs..][..hs], &mut lse[head]), (part.o.row(from), &part.lse[from]));
                }
            }
        });
        let mut lse = Matrix::new(self.n_head, q.rows);
        for (head, lse) in lse.chunks_exact_mut(q.rows.max(1)).enumerate() {
            lse.iter_mut().zip(of_rows.chunks_exact(self.n_head)).for_each(|(lse, row)| *lse = row[head]);
        }
        (o, Saved { lse })
    }

    /// What there is to do for a span, in parts for the threads, the longest first.
    fn work<'a>(&self, span: &'a Span) -> Vec<Work<'a>> {
        let group = self.n_head / self.n_query_groups;
        let few = span.q.len() <= FEW;
        let blocks: Vec<Block> = self.blocks(span).collect();
        let blocks = blocks.into_iter().rev().flat_map(|mut block| {
            if few {
                // Shares begin at the same keys whichever row is the first, so that a row's sums do not depend on the others.
                block.keys.start = block.keys.start / KEYS_OF_FEW * KEYS_OF_FEW;
            }
            block.split(if few { KEYS_OF_FEW } else { usize::MAX })
        });
        let works = blocks.flat_map(|block| {
            let together = (ROWS / block.rows.len()).clamp(1, group);
            (0..self.n_head).step_by(group).flat_map(move |first| (first..first + group).step_by(together)).map(
                move |head| {
                    let end = (head + together).min(head / group * group + group);
                    Work { span, block: block.clone(), heads: head..end }
                },
            )
        });
        works.collect()
    }

    fn forward_part(&self, [q, k, v]: [View<'_>; 3], Work { span, block, heads }: &Work<'_>) -> Part {
        let [k, v] = [k, v].map(|view| self.head(view, self.key_head(heads.start)));
        let (hs, rows, few) = (self.head_size, block.rows.len(), span.q.len() <= FEW);
        let queries = self.stacked(q, heads.clone(), &block.rows);
        let rounded = self.rounded(block);
        let left = Left::of(Side::N(queries.view()), rounded);
        let blocks = block.clone().split((KEYS / hs).max(1)).flat_map(|block| block.split_at(span.prefix));
        let parts = blocks.map(|block| {
            let keys = span.rows(block.keys.clone()).next().expect("a part has keys");
            let [k, v] = [k, v].map(|view| view.slice_rows(keys.clone()));
            let keys = if few { Right::of_rows(k) } else { Right::of(Side::T(k), rounded) };
            let mut s = scores(self.scale, &left, queries.rows(), &keys, k.rows);
            if let Some(cap) = self.softcap {
                soft_cap(&mut s, cap);
            }
            let cols = s.cols();
            let lse = |(i, row)| softmax_row(row, self.seen(&block, i % rows));
            let lse = s.chunks_exact_mut(cols).enumerate().map(lse).collect();
            let mut o = Matrix::new(queries.rows(), hs);
            let (p, v) = (Left::of(Side::N(s.columns(0..v.rows)), rounded), Right::of(Side::N(v), rounded));
            matmul_by(o.view_mut(), false, 1.0, &p, &v);
            Part { o, lse }
        });
        let sum = parts.reduce(|mut sum, part| {
            sum.add(&part);
            sum
        });
        sum.expect("a row sees itself")
    }
}

vectorize! {
    /// Softmax over the seen part of a row of whole lanes, zero elsewhere; returns the log-sum-exp.
    fn softmax_row(row: &mut [f32], seen: Range<usize>) -> f32 {
        row[..seen.start].fill(f32::MIN);
        row[seen.end..].fill(f32::MIN);
        let largest = max(row);
        let total = exp_sum(row, largest);
        let inverse = 1.0 / total;
        row.iter_mut().for_each(|v| *v *= inverse);
        row[..seen.start].fill(0.0);
        row[seen.end..].fill(0.0);
        largest + total.ln()
    }
}
