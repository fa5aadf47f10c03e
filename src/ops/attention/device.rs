//! Attention on a device: which kernel of `kernels/attention.cu` and `kernels/attention_mma.cu`, with what.

use super::{Attention, Saved, Spans};
use crate::ops::device::{Arg, Buffer, COUNTERS, Device, Dtype, int, long};
use crate::ops::{Matrix, View};

/// Threads of a block.
const THREADS: usize = 128;

/// A kernel's variant: tensor cores where types, sizes and addresses allow, and the head size that tiles are padded to.
struct Variant {
    mma: bool,
    d: usize,
}

impl Variant {
    fn of(dtype: Dtype, head_size: usize, views: &[View<'_>]) -> Self {
        let fits = |view: &View<'_>| view.stride.is_multiple_of(8) && view.pointer().is_multiple_of(16);
        let mma = dtype != Dtype::F32 && head_size.is_multiple_of(8) && views.iter().all(fits);
        Self { mma, d: head_size.next_power_of_two().clamp(64, 256) }
    }

    fn name(&self, kernel: &str, dtype: Dtype) -> String {
        format!("attention_{}{kernel}_{}_d{}", if self.mma { "mma_" } else { "" }, dtype.suffix(), self.d)
    }

    /// Query rows, or key rows, of a block.
    fn rows(&self) -> usize {
        if self.mma { 64 } else { 16 }
    }

    /// Shared memory, bytes, as the kernels lay it out.
    fn shared(&self, head_size: usize, backward: bool) -> usize {
        let tile = if backward { self.backward_tile() } else { self.forward_tile() };
        match (self.mma, backward) {
            (true, false) => (64 + 2 * tile) * self.d * 2,
            (true, true) => (128 + 2 * tile) * self.d * 2,
            (false, false) => (16 * head_size + 32 * (head_size | 1)) * 4,
            (false, true) => (32 * head_size + 64 * (head_size | 1)) * 4,
        }
    }

    fn forward_tile(&self) -> usize {
        if self.d == 256 { 32 } else { 64 }
    }

    fn backward_tile(&self) -> usize {
        if self.d == 64 { 64 } else { 32 }
    }

    /// Into how many shares, no more than `most`, the work of each of `blocks` is cut: as many as the device runs at once, two a
    /// processor.
    fn shares(&self, device: &Device, blocks: usize, most: usize) -> usize {
        let fit = if self.mma && blocks <= COUNTERS { 2 * device.processors() / blocks.max(1) } else { 1 };
        fit.min(most).max(1)
    }

    /// Where the shares of `blocks` blocks put `values` numbers a thread together, as two arguments of the kernels on tensor cores;
    /// the buffer has to live until they are launched.
    fn together(&self, device: &Device, blocks: usize, shares: usize, values: usize) -> (Buffer, Vec<Arg>) {
        let floats = if shares > 1 { blocks * shares * values * THREADS } else { 0 };
        let partial = device.allocate(floats * 4);
        let done = if shares > 1 { device.counters() } else { 0 };
        let args = if self.mma { vec![(&partial).into(), done.into()] } else { Vec::new() };
        (partial, args)
    }
}

impl Attention {
    /// The numbers that end the arguments of every kernel.
    fn rule(&self) -> [Arg; 3] {
        [self.scale.into(), self.softcap.unwrap_or(0.0).into(), int(self.window.unwrap_or(0))]
    }

    fn heads(&self) -> [Arg; 3] {
        [int(self.n_head), int(self.n_query_groups), int(self.head_size)]
    }

    pub(super) fn forward_on(
        &self,
        (device, dtype): (&Device, Dtype),
        qkv: [View<'_>; 3],
        spans: &Spans,
    ) -> (Matrix, Saved) {
        let [q, k, v] = qkv;
        let o = Matrix::new_on(device, dtype, q.rows, self.q_cols());
        let lse = Matrix::new_on(device, Dtype::F32, self.n_head, q.rows);
        let variant = Variant::of(dtype, self.head_size, &[q, k, v, o.view()]);
        let mut args = qkv.map(|view| view.pointer().into()).to_vec();
        args.extend([
            o.pointer().into(),
            lse.pointer().into(),
            spans.starts(device).into(),
            int(q.rows),
            int(k.rows - q.rows),
            int(spans.prefix()),
        ]);
        args.extend(self.heads());
        args.extend([q.stride, k.stride, v.stride, o.cols()].map(long));
        args.extend(self.rule());
        let blocks = q.rows.div_ceil(variant.rows());
        // A share of one tile would wait longer for its keys than it multiplies.
        let tiles = k.rows.div_ceil(variant.forward_tile());
        let shares = variant.shares(device, blocks * self.n_head, tiles / 2);
        let (_partial, more) = variant.together(device, blocks * self.n_head, shares, variant.d / 2 + 4);
        args.extend(more);
        let shared = variant.shared(self.head_size, false);
        let grid = [blocks, self.n_head, shares];
        device.launch(&variant.name("fwd", dtype), None, grid, [THREADS, 1], shared, &args);
        (o, Saved { lse })
    }

    pub(super) fn backward_on(
        &self,
        (device, dtype): (&Device, Dtype),
        qkv: [View<'_>; 3],
        o: &Matrix,
        d_o: &Matrix,
        saved: &Saved,
        spans: &Spans,
    ) -> Matrix {
        let (rows, q_cols, kv_cols) = (o.rows(), self.q_cols(), self.n_query_groups * self.head_size);
        let delta = Matrix::new_on(device, Dtype::F32, self.n_head, rows);
        let sizes = [int(rows), int(self.n_head), int(self.head_size), long(o.cols()), long(d_o.cols())];
        let mut args = vec![o.pointer().into(), d_o.pointer().into(), delta.pointer().into()];
        args.extend(sizes);
        let grid = [(rows * self.n_head).div_ceil(4), 1, 1];
        device.launch("attention_bwd_delta", Some(dtype), grid, [THREADS, 1], 0, &args);

        let [q, k, v] = qkv;
        let past = k.rows - rows;
        let d = o.new_like(k.rows, q_cols + 2 * kv_cols);
        let dq = d.columns(0..q_cols).slice_rows(past..k.rows);
        let [dk, dv] = [q_cols..q_cols + kv_cols, q_cols + kv_cols..q_cols + 2 * kv_cols].map(|c| d.columns(c));
        let variant = Variant::of(dtype, self.head_size, &[q, k, v, d_o.view(), dq, dk, dv]);
        let launch = |kernel: &str, grid: [usize; 3], outputs: &[View<'_>], more: &[Arg]| {
            let mut args = qkv.map(|view| view.pointer().into()).to_vec();
            args.extend([d_o.pointer(), saved.lse.pointer(), delta.pointer()].map(Arg::from));
            args.extend(outputs.iter().map(|view| Arg::from(view.pointer())));
            args.extend([spans.starts(device).into(), int(rows), int(past), int(spans.prefix())]);
            args.extend(self.heads());
            args.extend([q.stride, k.stride, v.stride, d_o.cols()].map(long));
            args.extend(outputs.iter().map(|view| long(view.stride)));
            args.extend(self.rule());
            args.extend(more);
            let shared = variant.shared(self.head_size, true);
            device.launch(&variant.name(kernel, dtype), None, grid, [THREADS, 1], shared, &args);
        };
        launch("bwd_dq", [rows.div_ceil(variant.rows()), self.n_head, 1], &[dq], &[]);
        let (key_blocks, groups) = (k.rows.div_ceil(variant.rows()), self.n_query_groups);
        let halves = if variant.mma && variant.d == 256 { 2 } else { 1 };
        let blocks = key_blocks * groups * halves;
        let shares = variant.shares(device, blocks, self.n_head / groups);
        let (_partial, more) = variant.together(device, blocks, shares, variant.d / halves);
        launch("bwd_dkv", [key_blocks, groups * shares, halves], &[dk, dv], &more);
        d
    }
}
