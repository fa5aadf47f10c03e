//! One attention layer: the q, k, v and output projections, the norm of queries and keys, rope, and the kept keys and
//! values of decoding. The scores are in `ops::attention`.

use super::linear::{Gradients, Linear, Saved as LinearSaved};
use crate::ops::attention::{self, Spans};
use crate::ops::clip;
use crate::ops::device::Constant;
use crate::ops::matrix::Parked;
use crate::ops::norm::Norm;
use crate::ops::rope::Tables;
use crate::ops::{Matrix, View, rows};
use std::ops::Range;

/// What all layers of one pass share.
#[derive(Debug, Clone, Copy)]
pub struct Pass<'a> {
    /// Parameters of all adapters.
    pub parameters: &'a Matrix,
    /// The same as they are kept, in f32 also on a device, for what is computed so in all precisions.
    pub exact: &'a Matrix,
    /// Each row's row of the rotary tables: its position within its sample.
    pub positions: &'a Constant<u32>,
    /// Samples of the micro batch.
    pub spans: &'a Spans,
    /// Seed of the dropout masks; `None` outside training.
    pub seed: Option<u64>,
    /// Rotary tables, and those of windowed layers where they differ.
    pub rope: &'a [Tables; 2],
    /// Keys and values of this layer that all samples begin with: (L, 2 · `kv_cols`).
    pub past: Option<&'a Matrix>,
    /// Gradients of this pass's own keys and values, in f32, from passes that went on from them: (T, 2 · `kv_cols`).
    pub later: Option<&'a Matrix>,
}

/// Keys and values of one layer over the tokens so far.
#[derive(Debug, Clone, Default)]
pub struct LayerCache {
    /// Keys and values, of which the first `len` rows are there.
    kept: Option<[Matrix; 2]>,
    len: usize,
}

impl LayerCache {
    /// Forgets all rows but the first `len`.
    pub fn truncate(&mut self, len: usize) {
        self.len = self.len.min(len);
    }

    /// Room for another `rows` rows at least; it doubles, so that a token seldom copies the others.
    fn reserve(&mut self, rows: usize, like: View<'_>, new_like: impl Fn(usize, usize) -> Matrix) {
        let needed = self.len + rows;
        if self.kept.as_ref().is_some_and(|[k, _]| k.rows() >= needed) {
            return;
        }
        // A prompt leaves room for an answer.
        let wanted = if self.len == 0 { needed + needed / 8 + 256 } else { needed.max(2 * self.len) };
        let capacity = wanted.next_multiple_of(64);
        let grown = |old: Option<&Matrix>| {
            let mut new = new_like(capacity, like.cols);
            if let Some(old) = old {
                let kept = 0..self.len * like.cols;
                rows::copy(old.part(kept.clone(), like.cols), &mut new.part_mut(kept, like.cols));
            }
            new
        };
        let kept = self.kept.as_ref();
        self.kept = Some([grown(kept.map(|kept| &kept[0])), grown(kept.map(|kept| &kept[1]))]);
    }

    /// Appends new rows and returns all of them.
    fn append(&mut self, qkv: &Matrix, [k, v]: [View<'_>; 2]) -> [View<'_>; 2] {
        self.reserve(k.rows, k, |rows, cols| qkv.new_like(rows, cols));
        let (from, to) = (self.len * k.cols, (self.len + k.rows) * k.cols);
        self.len += k.rows;
        let Some([kept_k, kept_v]) = &mut self.kept else { unreachable!("room was just made") };
        rows::copy(k, &mut kept_k.part_mut(from..to, k.cols));
        rows::copy(v, &mut kept_v.part_mut(from..to, v.cols));
        [kept_k.part(0..to, k.cols), kept_v.part(0..to, v.cols)]
    }
}

/// What the backward needs besides the layer's input.
#[derive(Debug)]
pub struct Saved {
    qkv: Parked,
    clipped: Option<clip::Saved>,
    before_norm: Option<[Matrix; 2]>,
    h: LinearSaved,
    core: attention::Saved,
}

/// q, k and v, and what their backward needs.
struct Projected {
    qkv: Matrix,
    clipped: Option<clip::Saved>,
    before_norm: Option<[Matrix; 2]>,
    h: LinearSaved,
}

/// Attention up to its output projection, and that projection.
#[derive(Debug, Clone)]
pub struct Attention {
    /// q, k and v below one another.
    pub qkv: Linear,
    /// The output projection.
    pub projection: Linear,
    /// Norms of queries and keys.
    pub qk_norm: Option<[Norm; 2]>,
    /// Largest magnitude of what q, k and v give.
    pub clip: Option<f32>,
    /// Shape and rule of the scores.
    pub core: attention::Attention,
    /// Index of the rotary tables; `None` for no rotation.
    pub rope: Option<usize>,
}

impl Attention {
    fn columns(&self) -> [Range<usize>; 3] {
        let q = self.core.n_head * self.core.head_size;
        let kv = self.core.n_query_groups * self.core.head_size;
        [0..q, q..q + kv, q + kv..q + 2 * kv]
    }

    /// q, k, v: projected, clipped, normalized, rotated.
    fn project(&self, pass: &Pass<'_>, x: &Matrix) -> Projected {
        let mut qkv = x.new_like(x.rows(), self.qkv.outputs());
        let h = self.qkv.forward(pass.parameters, x, pass.seed, &mut qkv, false);
        let clipped = self.clip.map(|limit| clip::forward(&mut qkv, limit));
        let [q, k, _] = self.columns();
        let before_norm = self.qk_norm.as_ref().map(|[q_norm, k_norm]| {
            [q_norm.forward_columns(&mut qkv, q.clone()), k_norm.forward_columns(&mut qkv, k.clone())]
        });
        if let Some(tables) = self.rope {
            pass.rope[tables].forward(&mut qkv, q.start..k.end, self.core.head_size, pass.positions);
        }
        Projected { qkv, clipped, before_norm, h }
    }

    /// Columns of keys and values.
    fn kv_columns(&self) -> Range<usize> {
        let [_, k, v] = self.columns();
        k.start..v.end
    }

    /// Keys and values of the past and, below them, those of a pass.
    fn after(&self, past: &Matrix, qkv: &Matrix) -> Matrix {
        let own = qkv.columns(self.kv_columns());
        let mut kv = qkv.new_like(past.rows() + own.rows, own.cols);
        let (past_end, end) = (past.rows() * own.cols, (past.rows() + own.rows) * own.cols);
        rows::copy(past.view(), &mut kv.part_mut(0..past_end, own.cols));
        rows::copy(own, &mut kv.part_mut(past_end..end, own.cols));
        kv
    }

    /// q, k and v as the scores take them; `kv` is from `after`, where there is a past.
    fn views<'a>(&self, qkv: &'a Matrix, kv: Option<&'a Matrix>) -> [View<'a>; 3] {
        let [q, k, v] = self.columns().map(|c| qkv.columns(c));
        kv.map_or([q, k, v], |kv| [q, kv.columns(0..k.cols), kv.columns(k.cols..k.cols + v.cols)])
    }

    /// Keys and values of a forward.
    ///
    /// # Shapes
    /// Returns (T, 2 · `kv_cols`).
    #[must_use]
    pub fn keys_and_values(&self, saved: &Saved) -> Matrix {
        let qkv = saved.qkv.get();
        let own = qkv.columns(self.kv_columns());
        let mut kv = qkv.new_like(own.rows, own.cols);
        rows::copy(own, &mut kv.view_mut());
        kv
    }

    /// Whether what waits for the backward is rounded to bf16, as the model's weights are.
    #[must_use]
    pub fn parks_bf16(&self, pass: &Pass<'_>) -> bool {
        pass.seed.is_some() && self.qkv.weight().is_bf16()
    }

    /// Attention over the samples of a micro batch, up to the output projection: the heads' outputs.
    ///
    /// # Shapes
    /// `x`: (T, n_embd); returns (T, n_head · head_size).
    #[must_use]
    pub fn forward(&self, pass: &Pass<'_>, x: &Matrix) -> (Matrix, Saved) {
        let Projected { qkv, clipped, before_norm, h } = self.project(pass, x);
        let ((o, core), qkv) = Parked::beside(qkv, self.parks_bf16(pass), |qkv| {
            let kv = pass.past.map(|past| self.after(past, qkv));
            let [q, k, v] = self.views(qkv, kv.as_ref());
            self.core.forward(q, k, v, pass.spans)
        });
        (o, Saved { qkv, clipped, before_norm, h, core })
    }

    /// Attention of new tokens over the kept keys and values, which they join; up to the output projection.
    ///
    /// # Shapes
    /// `x`: (T, n_embd); returns (T, n_head · head_size).
    #[must_use]
    pub fn decode(&self, pass: &Pass<'_>, x: &Matrix, cache: &mut LayerCache) -> Matrix {
        let qkv = self.project(pass, x).qkv;
        let [q, k, v] = self.columns().map(|c| qkv.columns(c));
        let [k, v] = cache.append(&qkv, [k, v]);
        self.core.forward(q, k, v, &Spans::tail(q.rows, k.rows)).0
    }

    /// Adds the adapters' gradients; writes or adds that of the input where `dx` is asked for.
    ///
    /// # Shapes
    /// `o`: what the forward returned; `d_o`: its gradient; `dx`: (T, n_embd).
    #[allow(clippy::too_many_arguments)] // a backward takes what its forward gave and saved
    pub fn backward(
        &self,
        pass: &Pass<'_>,
        to: &mut Gradients<'_>,
        [o, d_o]: [&Matrix; 2],
        x: impl FnOnce() -> Matrix,
        saved: Saved,
        dx: Option<(&mut Matrix, bool)>,
    ) {
        let [q_cols, k_cols, _] = self.columns();
        let qkv = saved.qkv.restore();
        let kv = pass.past.map(|past| self.after(past, &qkv));
        let mut d = self.core.backward(self.views(&qkv, kv.as_ref()), o, d_o, &saved.core, pass.spans);
        if let Some(past) = &mut to.past {
            d = self.split(&d, past);
        }
        if let Some(later) = pass.later {
            let mut own = d.new_like(later.rows(), later.cols());
            rows::copy(d.columns(self.kv_columns()), &mut own.view_mut());
            rows::add_scaled(&mut own, later, 1.0);
            rows::copy(own.view(), &mut d.columns_mut(self.kv_columns()));
        }
        if let Some(tables) = self.rope {
            pass.rope[tables].backward(&mut d, q_cols.start..k_cols.end, self.core.head_size, pass.positions);
        }
        if let (Some([q_norm, k_norm]), Some([q_before, k_before])) = (&self.qk_norm, &saved.before_norm) {
            q_norm.backward_columns(&mut d, q_before, q_cols.clone());
            k_norm.backward_columns(&mut d, k_before, k_cols.clone());
        }
        if let Some(clipped) = &saved.clipped {
            clip::backward(&mut d, clipped);
        }
        self.qkv.backward(to, &d, x, &saved.h, pass.seed, dx);
    }

    /// The gradients of a pass's own rows; those of its past's keys and values are added to `past`.
    fn split(&self, d: &Matrix, past: &mut Matrix) -> Matrix {
        let (above, cols) = (past.rows() * d.cols(), d.cols());
        let mut of_past = d.new_like(past.rows(), past.cols());
        rows::copy(d.part(0..above, cols).slice_cols(self.kv_columns()), &mut of_past.view_mut());
        rows::add_scaled(past, &of_past, 1.0);
        let own = d.part(above..d.rows() * cols, cols);
        let mut out = d.new_like(own.rows, cols);
        rows::copy(own, &mut out.view_mut());
        out
    }
}
