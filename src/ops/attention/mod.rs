//! Causal attention over the samples of a micro batch (Vaswani et al. 2017, arXiv:1706.03762), with grouped queries
//! (arXiv:2305.13245), a sliding window and soft-capped logits; the score matrix never exists as a whole
//! (FlashAttention, arXiv:2205.14135).
//!
//! `o = softmax(cap(s q kᵀ)) v`, rows in blocks. The forward keeps `o` and each row's log-sum-exp; the backward computes
//! the probabilities `p` of a block again: `dv = pᵀ do`, `ds = p (do vᵀ - sum(o do)) cap'`, `dq = s ds k`, `dk = s dsᵀ q`.

mod device;
mod host;
mod spans;

pub use spans::{Span, Spans};

use super::matrix::{Matrix, View};
use std::ops::Range;

/// Rows of queries that are worked on together.
const BLOCK: usize = 64;

/// Rows of several query heads over the same keys that are worked on together.
const ROWS: usize = 256;

/// Query rows of a sample up to which its keys are shared out among the threads, as in decoding.
const FEW: usize = 8;

/// Keys of such a share.
const KEYS_OF_FEW: usize = 128;

/// Query rows of a block from which on its products may be rounded to bf16: fewer do not fill a tile, and those of decoding
/// have to be the same whichever rows they are with.
const ROUNDED: usize = 16;

/// Elements of keys that are worked on together, so that they stay in the second-level cache.
const KEYS: usize = 128 << 10;

/// Log-sum-exp of no scores.
const NOTHING: f32 = f32::MIN;

/// Shape and rule of one attention layer.
#[derive(Debug, Clone, Copy)]
pub struct Attention {
    /// Query heads.
    pub n_head: usize,
    /// Key and value heads; each serves `n_head / n_query_groups` query heads.
    pub n_query_groups: usize,
    /// Channels of a head.
    pub head_size: usize,
    /// Factor on the scores.
    pub scale: f32,
    /// Scores become `cap · tanh(score / cap)`.
    pub softcap: Option<f32>,
    /// A position sees itself and `window - 1` before it.
    pub window: Option<usize>,
    /// Whether products on the host may round both sides to bf16, as a model of bf16 weights may.
    pub bf16: bool,
}

/// What the backward needs besides inputs and output.
#[derive(Debug)]
pub struct Saved {
    /// Log-sum-exp of each row's scores: (n_head, T).
    lse: Matrix,
}

/// One block of queries: which rows it has, and which keys any of them sees.
#[derive(Clone)]
struct Block {
    /// Rows within `q`.
    rows: Range<usize>,
    /// Key position (within the span) of the first row.
    first: usize,
    /// Key positions (within the span) that some row sees, or some of them.
    keys: Range<usize>,
}

impl Block {
    /// The same rows with at most `most` keys each.
    fn split(self, most: usize) -> impl Iterator<Item = Self> {
        let end = self.keys.end;
        self.keys
            .clone()
            .step_by(most)
            .map(move |from| Self { keys: from..end.min(from.saturating_add(most)), ..self.clone() })
    }

    /// The same rows with the keys before and from `key` on.
    fn split_at(self, key: usize) -> impl Iterator<Item = Self> {
        let at = key.clamp(self.keys.start, self.keys.end);
        let halves = [self.keys.start..at, at..self.keys.end].into_iter().filter(|keys| !keys.is_empty());
        halves.map(move |keys| Self { keys, ..self.clone() })
    }
}

impl Attention {
    /// Columns of all query heads.
    fn q_cols(&self) -> usize {
        self.n_head * self.head_size
    }

    fn blocks(&self, span: &Span) -> impl DoubleEndedIterator<Item = Block> + '_ {
        let (q, past) = (span.q.clone(), span.past());
        (0..q.len().div_ceil(BLOCK)).map(move |i| {
            let rows = q.start + i * BLOCK..(q.start + (i + 1) * BLOCK).min(q.end);
            let first = past + i * BLOCK;
            let from = self.window.map_or(0, |w| (first + 1).saturating_sub(w));
            Block { keys: from..first + rows.len(), first, rows }
        })
    }

    /// Keys of `block` that its row `i` sees, as indices into `block.keys`.
    fn seen(&self, block: &Block, i: usize) -> Range<usize> {
        let end = block.first + i + 1;
        let from = self.window.map_or(0, |w| end.saturating_sub(w));
        let inside = |key: usize| key.clamp(block.keys.start, block.keys.end) - block.keys.start;
        inside(from)..inside(end)
    }

    fn head<'a>(&self, view: View<'a>, head: usize) -> View<'a> {
        view.slice_cols(head * self.head_size..(head + 1) * self.head_size)
    }

    fn key_head(&self, head: usize) -> usize {
        head / (self.n_head / self.n_query_groups)
    }

    /// Attention of every query row.
    ///
    /// # Shapes
    /// `q`: (T, n_head · head_size); `k`, `v`: (K, n_query_groups · head_size); returns (T, n_head · head_size).
    #[must_use]
    pub fn forward(&self, q: View<'_>, k: View<'_>, v: View<'_>, spans: &Spans) -> (Matrix, Saved) {
        if let Some((buffer, dtype)) = q.place {
            return self.forward_on((buffer.device(), dtype), [q, k, v], spans);
        }
        self.forward_on_host([q, k, v], spans)
    }

    /// Gradients of q, k and v, side by side as one product of the three projections has them: those of a key in its row,
    /// those of a query in the row of its own key. Rows before the first query's have none of q.
    ///
    /// # Shapes
    /// `q`, `k`, `v`: as in the forward; `o`, `d_o`: (T, n_head · head_size); returns
    /// (K, (n_head + 2 n_query_groups) · head_size). Every query row belongs to a span.
    #[must_use]
    pub fn backward(&self, qkv: [View<'_>; 3], o: &Matrix, d_o: &Matrix, saved: &Saved, spans: &Spans) -> Matrix {
        if let Some((device, dtype)) = o.place() {
            return self.backward_on((device, dtype), qkv, o, d_o, saved, spans);
        }
        self.backward_on_host(qkv, o, d_o, saved, spans)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::math::dot;
    use crate::ops::testing::{Oracle, assert_close, random};
    use candle_core::{D, Device, Tensor};

    fn mask(attention: &Attention, spans: &[Span], t: usize) -> Tensor {
        let mut mask = vec![f32::NEG_INFINITY; t * t];
        for span in spans {
            for i in span.q.clone() {
                for j in span.k.clone().filter(|j| *j <= i && attention.window.is_none_or(|w| i - j < w)) {
                    mask[i * t + j] = 0.0;
                }
            }
        }
        Tensor::from_vec(mask, (1, t, t), &Device::Cpu).unwrap()
    }

    fn reference(attention: &Attention, mask: &Tensor, qkv: &Tensor) -> candle_core::Result<Tensor> {
        let t = qkv.dim(0)?;
        let (h, g, hs) = (attention.n_head, attention.n_query_groups, attention.head_size);
        let part = |from: usize, heads: usize| {
            qkv.narrow(1, from * hs, heads * hs)?.reshape((t, heads, hs))?.transpose(0, 1)?.contiguous()
        };
        let repeat = |x: Tensor| x.unsqueeze(1)?.broadcast_as((g, h / g, t, hs))?.reshape((h, t, hs));
        let (q, k, v) = (part(0, h)?, repeat(part(h, g)?)?, repeat(part(h + g, g)?)?);
        let mut s = (q.matmul(&k.transpose(1, 2)?.contiguous()?)? * f64::from(attention.scale))?;
        if let Some(cap) = attention.softcap {
            s = ((s / f64::from(cap))?.tanh()? * f64::from(cap))?;
        }
        let s = s.broadcast_add(mask)?;
        let e = s.broadcast_sub(&s.max_keepdim(D::Minus1)?.detach())?.exp()?;
        let p = e.broadcast_div(&e.sum_keepdim(D::Minus1)?)?;
        p.matmul(&v)?.transpose(0, 1)?.reshape((t, h * hs))
    }

    const BASE: Attention =
        Attention { n_head: 4, n_query_groups: 2, head_size: 10, scale: 0.4, softcap: None, window: None, bf16: false };

    #[test]
    fn forward_and_backward_equal_the_reference() {
        let variants = [
            BASE,
            Attention { window: Some(7), ..BASE },
            Attention { softcap: Some(1.5), window: Some(70), n_query_groups: 1, ..BASE },
            Attention { n_query_groups: 4, ..BASE },
            // More heads of a group than go together.
            Attention { n_head: 10, ..BASE },
        ];
        // A last block too short to be rounded; in f32, whose errors do not grow so with the length, more blocks than tasks.
        let short = [0..5, 5..128, 128..129, 129..199];
        let long = [0..270, 270..275];
        for (attention, segments) in variants.iter().flat_map(|a| [(a, &short[..]), (a, &long[..])]) {
            let (t, spans) = (segments[segments.len() - 1].end, Spans::whole(segments));
            let (q_cols, g) = (attention.q_cols(), attention.n_query_groups * 10);
            let width = q_cols + 2 * g;
            let qkv: Vec<f32> = random(t * width, 1).iter().map(|v| v * 2.0).collect();
            let d_o = random(t * q_cols, 2);
            let mask = mask(attention, &spans, t);
            let oracle = Oracle::run(&[(&qkv, t, width)], |x| reference(attention, &mask, &x[0]), &d_o);
            let qkv = Matrix::from_slice(t, width, &qkv);
            let [q, k, v] = [0..q_cols, q_cols..q_cols + g, q_cols + g..width].map(|columns| qkv.columns(columns));
            let (o, saved) = attention.forward(q, k, v, &spans);
            assert_close(&o, &oracle.y, 1e-5);
            let d_o = Matrix::from_slice(t, q_cols, &d_o);
            let d = attention.backward([q, k, v], &o, &d_o, &saved, &spans);
            assert_close(&d, &oracle.grads[0], 1e-5);
            if segments.len() > long.len() {
                let rounded = Attention { bf16: true, ..*attention };
                let (o, saved) = rounded.forward(q, k, v, &spans);
                assert_close(&o, &oracle.y, 8e-3);
                assert_close(&rounded.backward([q, k, v], &o, &d_o, &saved, &spans), &oracle.grads[0], 8e-3);
            }
        }
    }

    #[test]
    fn later_queries_over_kept_keys_equal_the_whole() {
        let attention = Attention { n_head: 2, n_query_groups: 1, head_size: 8, scale: 0.3, window: Some(40), ..BASE };
        let (q, k, v) = (random(90 * 16, 1), random(90 * 8, 2), random(90 * 8, 3));
        let (k, v) = (View::of(&k, 90, 8), View::of(&v, 90, 8));
        let (whole, _) = attention.forward(View::of(&q, 90, 16), k, v, &Spans::tail(90, 90));
        let (tail, _) = attention.forward(View::of(&q[80 * 16..], 10, 16), k, v, &Spans::tail(10, 90));
        assert_close(&tail, &whole[80 * 16..], 1e-6);
    }

    #[test]
    fn samples_after_a_common_prefix_equal_each_as_a_whole() {
        let variants =
            [BASE, Attention { window: Some(9), ..BASE }, Attention { softcap: Some(1.5), window: Some(70), ..BASE }];
        let (prefix, t, q_cols, kv_cols) = (70, 91, 40, 20);
        let one = 0..t;
        let samples = [vec![0..3, 3..90, 90..t], vec![one]];
        for (attention, segments) in variants.iter().flat_map(|a| samples.iter().map(move |s| (a, s))) {
            let [q, d_o] = [1, 2].map(|seed| Matrix::from_slice(t, q_cols, &random(t * q_cols, seed)));
            let [k, v] =
                [3, 4].map(|seed| Matrix::from_slice(prefix + t, kv_cols, &random((prefix + t) * kv_cols, seed)));
            let spans = Spans::after(prefix, segments);
            let (o, saved) = attention.forward(q.view(), k.view(), v.view(), &spans);
            let d = attention.backward([q.view(), k.view(), v.view()], &o, &d_o, &saved, &spans);
            let mut of_prefix = vec![0.0; prefix * 2 * kv_cols];
            for segment in segments {
                // Behind the prefix's rows of `x`, or behind rows of zeros as its queries are asked for nothing here.
                let whole = |x: &Matrix, before: Option<&Matrix>, rows: Range<usize>| {
                    let cols = x.cols();
                    let before = before.map_or(vec![0.0; prefix * cols], |x| x[..prefix * cols].to_vec());
                    let rows = [&before[..], &x[rows.start * cols..rows.end * cols]].concat();
                    Matrix::from_slice(rows.len() / cols, cols, &rows)
                };
                let keys = prefix + segment.start..prefix + segment.end;
                let [q, d_o] = [&q, &d_o].map(|x| whole(x, None, segment.clone()));
                let [k, v] = [&k, &v].map(|x| whole(x, Some(x), keys.clone()));
                let spans = Spans::tail(prefix + segment.len(), prefix + segment.len());
                let (want_o, saved) = attention.forward(q.view(), k.view(), v.view(), &spans);
                assert_close(&o[segment.start * q_cols..segment.end * q_cols], &want_o[prefix * q_cols..], 1e-5);
                let want = attention.backward([q.view(), k.view(), v.view()], &want_o, &d_o, &saved, &spans);
                let cols = want.cols();
                assert_close(&d[keys.start * cols..keys.end * cols], &want[prefix * cols..], 1e-5);
                let kv = want.columns(q_cols..cols);
                for (sum, row) in of_prefix.chunks_exact_mut(2 * kv_cols).zip(0..prefix) {
                    sum.iter_mut().zip(kv.row(row)).for_each(|(sum, d)| *sum += d);
                }
            }
            let got: Vec<f32> = (0..prefix).flat_map(|row| d.row(row)[q_cols..].to_vec()).collect();
            assert_close(&got, &of_prefix, 1e-5);
        }
    }

    #[test]
    fn keys_in_several_shares_equal_all_at_once() {
        // More keys than a share of few queries has and than go together, more heads than go together, and a window that
        // leaves some shares nothing to see; keys of several heads beside one another.
        let (t, hs, new) = (2 * KEYS_OF_FEW + 300, 256, 3);
        for (n_head, groups, window) in [(2, 1, None), (70, 1, Some(KEYS_OF_FEW)), (6, 3, None)] {
            let attention = Attention { n_head, n_query_groups: groups, head_size: hs, scale: 0.1, window, ..BASE };
            let (q, k, v) = (random(new * n_head * hs, 1), random(t * groups * hs, 2), random(t * groups * hs, 3));
            let (k, v) = (View::of(&k, t, groups * hs), View::of(&v, t, groups * hs));
            let (got, saved) = attention.forward(View::of(&q, new, n_head * hs), k, v, &Spans::tail(new, t));
            let mut want = vec![0.0; new * n_head * hs];
            for (row, head) in (0..new).flat_map(|row| (0..n_head).map(move |head| (row, head))) {
                let (at, of_head) = (row * n_head * hs + head * hs, head / (n_head / groups) * hs);
                let last = t - new + row;
                let seen = window.map_or(0, |w| last + 1 - w)..last + 1;
                let score = |key: usize| f64::from(0.1 * dot(&q[at..at + hs], &k.row(key)[of_head..of_head + hs]));
                let total: f64 = seen.clone().map(|key| score(key).exp()).sum();
                assert!((f64::from(saved.lse[head * new + row]) - total.ln()).abs() < 1e-5);
                for key in seen {
                    let p = (score(key).exp() / total) as f32;
                    want[at..at + hs].iter_mut().zip(&v.row(key)[of_head..of_head + hs]).for_each(|(o, v)| *o += p * v);
                }
            }
            assert_close(&got, &want, 1e-5);
        }
    }
}
