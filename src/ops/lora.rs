//! The low-rank update of a frozen product (Hu et al. 2021, arXiv:2106.09685): `y += s · drop(x) Aᵀ Bᵀ`.
//!
//! With `h = drop(x) Aᵀ`, which is kept: `dB += s dyᵀ h`, `dh = s dy B`, `dA += dhᵀ drop(x)`, `dx += drop(dh A)`.
//! Dropout is inverted (kept values are divided by `1 - p`) and its mask is a hash of seed and element, so that the
//! backward, or a forward run again, makes the same mask without keeping it.
//!
//! On a device up to `FUSED_TOKENS` tokens go through `kernels/lora_mma.cu`, two launches forward and two backward for all
//! pairs of a projection and their dropout; else through cuBLAS, product by product.

use super::device::{Arg, COUNTERS, Constant, Device, Dtype, flag, fused_tokens, int, long};
use super::math::vectorize;
use super::matmul::{Left, Right, Side, Threads, ViewMut, matmul, matmul_by};
use super::matrix::{Matrix, View, rows_per_task};
use rayon::prelude::*;
use std::ops::Range;
use std::sync::LazyLock;

/// Dropout of an adapter's input.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Dropout {
    /// Share of the values that become 0, in [0, 1).
    pub p: f32,
    /// Which mask.
    pub seed: u64,
}

/// 32 random bits of element `index` (the finalizer of MurmurHash3 over both, twice).
#[inline(always)]
fn hash(seed: u64, index: u32) -> u32 {
    let mut h = index ^ seed as u32;
    for _ in 0..2 {
        h ^= h >> 16;
        h = h.wrapping_mul(0x85eb_ca6b);
        h ^= h >> 13;
        h = h.wrapping_mul(0xc2b2_ae35);
        h ^= h >> 16;
        h = h.wrapping_add((seed >> 32) as u32);
    }
    h
}

impl Dropout {
    /// Values below this of 2³² are dropped.
    #[inline(always)]
    fn limit(&self) -> u32 {
        // Values in f32 would round 2³² - 1 up; 64 bits keep the limit exact.
        (f64::from(self.p) * 4_294_967_296.0) as u32
    }

    /// `out = drop(x)`, added to `out` where `accumulate`, on a device; whether they are on one.
    fn on_device(&self, x: &Matrix, out: &mut Matrix, accumulate: bool) -> bool {
        let Some((device, dtype)) = x.place() else { return false };
        let n = x.rows() * x.cols();
        let (x, out, keep) = (x.pointer(), out.pointer(), 1.0 / (1.0 - self.p));
        let args =
            [x.into(), out.into(), long(n), self.seed.into(), self.limit().into(), keep.into(), flag(accumulate)];
        device.launch_over("dropout", Some(dtype), n, &args);
        true
    }

    /// `out = drop(x)`, added to `out` where `accumulate`, on the host.
    fn on_host(&self, x: &Matrix, out: &mut Matrix, accumulate: bool) {
        let chunk = (rows_per_task(x.rows()) * x.cols()).max(1);
        out.par_chunks_mut(chunk).zip(x.par_chunks(chunk)).enumerate().for_each(|(i, (out, x))| {
            drop_some(*self, (i * chunk) as u32, x, out, accumulate);
        });
    }

    /// `drop(x)` of some rows, of which the first element is number `first`.
    fn of_some(&self, first: usize, rows: usize, x: &[f32]) -> Matrix {
        let mut out = Matrix::new(rows, x.len() / rows);
        drop_some(*self, first as u32, x, &mut out, false);
        out
    }

    /// `drop(x)`.
    #[must_use]
    pub fn forward(&self, x: &Matrix) -> Matrix {
        let mut out = x.new_like(x.rows(), x.cols());
        if !self.on_device(x, &mut out, false) {
            self.on_host(x, &mut out, false);
        }
        out
    }

    /// `dx += drop(d)`, by the mask of the forward.
    pub fn backward(&self, d: &Matrix, dx: &mut Matrix) {
        if !self.on_device(d, dx, true) {
            self.on_host(d, dx, true);
        }
    }
}

vectorize! {
    /// Dropout of the elements from `first` on.
    fn drop_some(dropout: Dropout, first: u32, x: &[f32], out: &mut [f32], accumulate: bool) {
        let (limit, keep) = (dropout.limit(), 1.0 / (1.0 - dropout.p));
        for (i, (out, x)) in out.iter_mut().zip(x).enumerate() {
            let factor = if hash(dropout.seed, first.wrapping_add(i as u32)) < limit { 0.0 } else { keep };
            *out = if accumulate { *out + x * factor } else { x * factor };
        }
    }
}

/// One low-rank pair within the columns that it updates.
#[derive(Debug, Clone, PartialEq)]
pub struct Pair {
    /// Columns of `h`, as many as the rank.
    pub rank: Range<usize>,
    /// Columns of `y`.
    pub columns: Range<usize>,
    /// Elements of `B` (columns, rank) among the parameters.
    pub b: Range<usize>,
    /// `s`.
    pub scale: f32,
}

/// The pairs of one projection.
#[derive(Debug, Clone)]
pub struct Pairs {
    list: Vec<Pair>,
    a: Range<usize>,
    ranks: usize,
    /// `list` as the kernels' `Adapter`.
    table: Constant<u64>,
}

impl Pairs {
    /// The pairs of this list, whose columns of `h` follow one another, and whose `A`s are the elements `a` of the parameters,
    /// below one another; their `B`s come behind these.
    #[must_use]
    pub fn new(list: Vec<Pair>, a: Range<usize>) -> Self {
        let two = |low: usize, high: usize| low as u64 | (high as u64) << 32;
        let entry = |pair: &Pair| {
            let (columns, rank) = (&pair.columns, &pair.rank);
            let scale = u64::from(pair.scale.to_bits());
            [pair.b.start as u64, two(columns.start, columns.len()), two(rank.start, rank.len()), scale]
        };
        let (table, ranks) = (list.iter().flat_map(entry).collect(), list.last().map_or(0, |pair| pair.rank.end));
        Self { list, a, ranks, table }
    }

    /// Where the first `A` begins among the parameters.
    #[must_use]
    pub fn start(&self) -> usize {
        self.a.start
    }
}

/// The update of a projection in one pass.
#[derive(Debug, Clone, Copy)]
pub struct Update<'a> {
    /// Its pairs.
    pub pairs: &'a Pairs,
    /// Parameters of all adapters.
    pub parameters: &'a Matrix,
    /// Dropout of the input, in training.
    pub dropout: Option<Dropout>,
}

impl Update<'_> {
    /// `y[:, columns] += s h[:, rank] Bᵀ` of each pair; returns `h = drop(x) Aᵀ`, which is kept.
    ///
    /// # Shapes
    /// `x`: (T, in); `y`: (T, out); `h`: (T, R).
    #[must_use]
    pub fn forward(&self, x: &Matrix, y: &mut Matrix) -> Matrix {
        let mut h = x.new_like(x.rows(), self.pairs.ranks);
        if x.place().is_none() {
            self.forward_on_host(x, &mut h, y);
            return h;
        }
        if let Some(fused) = self.fused(x, y) {
            fused.forward(x, &h, y);
            return h;
        }
        let dropped = self.dropout.map(|dropout| dropout.forward(x));
        let (x, a) = (dropped.as_ref().unwrap_or(x), self.parameters.part(self.pairs.a.clone(), x.cols()));
        matmul(Threads::All, h.view_mut(), false, 1.0, Side::N(x.view()), Side::T(a));
        for pair in &self.pairs.list {
            let b = self.parameters.part(pair.b.clone(), pair.rank.len());
            let y = y.columns_mut(pair.columns.clone());
            matmul(Threads::All, y, true, pair.scale, Side::N(h.columns(pair.rank.clone())), Side::T(b));
        }
        h
    }

    /// Adds to the gradients of `A` and `B`, and to `dx` where it is given.
    ///
    /// # Shapes
    /// `dy`: (T, out); `h`: (T, R), of the forward; `x`, `dx`: (T, in); `grads`: as the parameters, in f32.
    pub fn backward(&self, dy: &Matrix, h: &Matrix, x: &Matrix, grads: &mut Matrix, dx: Option<&mut Matrix>) {
        let mut dh = h.new_like(h.rows(), h.cols());
        if x.place().is_none() {
            return self.backward_on_host(dy, h, &mut dh, x, grads, dx);
        }
        if let Some(fused) = self.fused(x, dy) {
            return fused.backward(dy, h, &dh, x, grads, dx);
        }
        for pair in &self.pairs.list {
            let (rank, dy) = (pair.rank.clone(), dy.columns(pair.columns.clone()));
            let (b, db) =
                (self.parameters.part(pair.b.clone(), rank.len()), grads.part_mut(pair.b.clone(), rank.len()));
            matmul(Threads::All, db, true, pair.scale, Side::T(dy), Side::N(h.columns(rank.clone())));
            matmul(Threads::All, dh.columns_mut(rank), false, pair.scale, Side::N(dy), Side::N(b));
        }
        let dropped = self.dropout.map(|dropout| dropout.forward(x));
        let (a, inputs, x) = (self.pairs.a.clone(), x.cols(), dropped.as_ref().unwrap_or(x));
        let da = grads.part_mut(a.clone(), inputs);
        matmul(Threads::All, da, true, 1.0, Side::T(dh.view()), Side::N(x.view()));
        if let Some(dx) = dx {
            let (lhs, rhs) = (Side::N(dh.view()), Side::N(self.parameters.part(a, inputs)));
            match self.dropout {
                None => matmul(Threads::All, dx.view_mut(), true, 1.0, lhs, rhs),
                Some(dropout) => {
                    let mut d = dx.new_like(dx.rows(), dx.cols());
                    matmul(Threads::All, d.view_mut(), false, 1.0, lhs, rhs);
                    dropout.backward(&d, dx);
                }
            }
        }
    }

    /// Each thread takes some tokens through dropout and both products, while they are near.
    fn forward_on_host(&self, x: &Matrix, h: &mut Matrix, y: &mut Matrix) {
        let (inputs, outputs, ranks, task) = (x.cols(), y.cols(), self.pairs.ranks, rows_per_task(x.rows()));
        let right =
            |elements: &Range<usize>, cols| Right::of(Side::T(self.parameters.part(elements.clone(), cols)), false);
        let a = right(&self.pairs.a, inputs);
        let b: Vec<Right<'_>> = self.pairs.list.iter().map(|pair| right(&pair.b, pair.rank.len())).collect();
        let tasks = h.par_chunks_mut(task * ranks).zip(y.par_chunks_mut(task * outputs));
        tasks.zip(x.par_chunks(task * inputs)).enumerate().for_each(|(i, ((h, y), x))| {
            let rows = h.len() / ranks;
            let dropped = self.dropout.map(|dropout| dropout.of_some(i * task * inputs, rows, x));
            let x = dropped.as_ref().map_or(View::of(x, rows, inputs), Matrix::view);
            matmul_by(ViewMut::of(h, rows, ranks), false, 1.0, &Left::Plain(Side::N(x)), &a);
            let h = View::of(h, rows, ranks);
            for (pair, b) in self.pairs.list.iter().zip(&b) {
                let y = ViewMut::columns(y, outputs, pair.columns.clone());
                matmul_by(y, true, pair.scale, &Left::Plain(Side::N(h.slice_cols(pair.rank.clone()))), b);
            }
        });
    }

    fn backward_on_host(
        &self,
        dy: &Matrix,
        h: &Matrix,
        dh: &mut Matrix,
        x: &Matrix,
        grads: &mut Matrix,
        dx: Option<&mut Matrix>,
    ) {
        let (inputs, outputs, ranks, task) = (x.cols(), dy.cols(), self.pairs.ranks, rows_per_task(x.rows()));
        let mut dropped = self.dropout.map(|_| Matrix::new(x.rows(), inputs));
        let tasks = {
            let mut dropped = dropped.as_mut().map(|dropped| dropped.chunks_mut(task * inputs));
            let mut dx = dx.map(|dx| dx.chunks_mut(task * inputs));
            let mut next = || (dropped.as_mut().and_then(Iterator::next), dx.as_mut().and_then(Iterator::next));
            dh.chunks_mut(task * ranks).map(|dh| (dh, next())).collect::<Vec<_>>()
        };
        let sides = dy.par_chunks(task * outputs).zip(x.par_chunks(task * inputs));
        tasks.into_par_iter().with_max_len(1).zip(sides).enumerate().for_each(|(i, ((dh, (dropped, dx)), (dy, x)))| {
            let rows = dh.len() / ranks;
            for pair in &self.pairs.list {
                let dy = View::of(dy, rows, outputs).slice_cols(pair.columns.clone());
                let b = self.parameters.part(pair.b.clone(), pair.rank.len());
                let dh = ViewMut::columns(dh, ranks, pair.rank.clone());
                matmul(Threads::One, dh, false, pair.scale, Side::N(dy), Side::N(b));
            }
            let first = (i * task * inputs) as u32;
            if let (Some(dropout), Some(dropped)) = (self.dropout, dropped) {
                drop_some(dropout, first, x, dropped, false);
            }
            let Some(dx) = dx else { return };
            let (dh, a) = (View::of(dh, rows, ranks), self.parameters.part(self.pairs.a.clone(), inputs));
            match self.dropout {
                None => matmul(Threads::One, ViewMut::of(dx, rows, inputs), true, 1.0, Side::N(dh), Side::N(a)),
                Some(dropout) => {
                    let mut d = Matrix::new(rows, inputs);
                    matmul(Threads::One, d.view_mut(), false, 1.0, Side::N(dh), Side::N(a));
                    drop_some(dropout, first, &d, dx, true);
                }
            }
        });
        let (dh, x) = (dh.view(), dropped.as_ref().unwrap_or(x).view());
        let (of_a, of_b) = grads.split_at_mut(self.pairs.a.end);
        let da = ViewMut::of(&mut of_a[self.pairs.a.clone()], ranks, inputs);
        rayon::join(
            || matmul(Threads::All, da, true, 1.0, Side::T(dh), Side::N(x)),
            || {
                for pair in &self.pairs.list {
                    let rank = pair.rank.clone();
                    let b = pair.b.start - self.pairs.a.end..pair.b.end - self.pairs.a.end;
                    let db = ViewMut::of(&mut of_b[b], pair.columns.len(), rank.len());
                    let dy = dy.columns(pair.columns.clone());
                    matmul(Threads::All, db, true, pair.scale, Side::T(dy), Side::N(h.columns(rank)));
                }
            },
        );
    }

    /// The kernels for these matrices, where they serve.
    fn fused<'a>(&'a self, x: &'a Matrix, y: &Matrix) -> Option<Fused<'a>> {
        let (device, dtype) = x.place().filter(|(_, dtype)| *dtype != Dtype::F32)?;
        let eights = |columns: &Range<usize>| columns.start.is_multiple_of(8) && columns.len().is_multiple_of(8);
        let serves =
            |pair: &Pair| eights(&pair.columns) && pair.rank.len().is_multiple_of(2) && pair.b.start.is_multiple_of(2);
        let aligned = [x.pointer(), y.pointer(), self.a()].iter().all(|pointer| pointer.is_multiple_of(16));
        let sizes = x.rows() <= *FUSED_TOKENS
            && self.pairs.ranks <= MOST_RANKS
            && eights(&(0..x.cols()))
            && eights(&(0..y.cols()));
        (sizes && aligned && self.pairs.list.iter().all(serves)).then_some(Fused { update: self, device, dtype })
    }

    /// Address of the `A`s on a device.
    fn a(&self) -> u64 {
        self.parameters.part(self.pairs.a.clone(), 1).pointer()
    }
}

/// Tokens up to which all pairs of a projection are computed at once, unless `LITGPT_FUSED_LORA` says otherwise: of more, cuBLAS's
/// products take longer than their launches. An estimate until it is measured.
static FUSED_TOKENS: LazyLock<usize> = LazyLock::new(|| fused_tokens("LORA", 512));
/// How many blocks share a sum at most, and the fewest columns for each.
const SHARES: usize = 16;
const COLUMNS: usize = 512;
/// `MOST_RANKS` of the kernels: what a block has at a time; and the most ranks in all for which they read little twice.
const RANKS: usize = 64;
const MOST_RANKS: usize = 256;

/// An update by the kernels of `kernels/lora_mma.cu`.
struct Fused<'a> {
    update: &'a Update<'a>,
    device: &'a Device,
    dtype: Dtype,
}

impl Fused<'_> {
    fn launch(&self, kernel: &str, grid: [usize; 2], threads: usize, args: &[&[Arg]]) {
        self.device.launch(kernel, Some(self.dtype), [grid[0], grid[1], 1], [threads, 1], 0, &args.concat());
    }

    /// Tiles of 64 columns of all pairs.
    fn tiles(&self) -> usize {
        self.update.pairs.list.iter().map(|pair| pair.columns.len().div_ceil(64)).sum()
    }

    fn mask(&self) -> [Arg; 3] {
        let dropout = self.update.dropout.unwrap_or(Dropout { p: 0.0, seed: 0 });
        [dropout.seed.into(), dropout.limit().into(), (1.0 / (1.0 - dropout.p)).into()]
    }

    /// Launches a kernel whose blocks have 16 tokens each, for `parts` of the ranks, and sum over `cols` columns: several share a
    /// sum where there are too few for the device.
    fn launch_narrow(
        &self,
        kernel: &str,
        (tokens, parts, cols): (usize, usize, usize),
        pointers: &[Arg],
        rest: &[Arg],
    ) {
        let blocks = tokens.div_ceil(16) * parts;
        let shares = (self.device.processors() / blocks.max(1)).min(SHARES).min(cols / COLUMNS).max(1);
        let shares = if blocks > COUNTERS { 1 } else { shares };
        let partial = self.device.allocate(if shares > 1 { shares * parts * tokens * RANKS * 4 } else { 0 });
        let done = if shares > 1 { self.device.counters() } else { 0 };
        let args = [pointers, &[(&partial).into(), done.into()], rest].concat();
        let grid = [tokens.div_ceil(16), parts, shares];
        self.device.launch(kernel, Some(self.dtype), grid, [256, 1], 0, &args);
    }

    fn forward(&self, x: &Matrix, h: &Matrix, y: &Matrix) {
        let Update { pairs, parameters, .. } = self.update;
        let (tokens, ranks) = (int(x.rows()), int(pairs.ranks));
        let pointers = [x.pointer(), self.update.a(), h.pointer()].map(Arg::from);
        let rest = [&[tokens, int(x.cols()), ranks][..], &self.mask()].concat();
        self.launch_narrow("lora_down", (x.rows(), pairs.ranks.div_ceil(RANKS), x.cols()), &pointers, &rest);
        let pointers = [h.pointer(), parameters.pointer(), pairs.table.on(self.device), y.pointer()].map(Arg::from);
        let sizes = [tokens, ranks, long(y.cols())];
        self.launch("lora_up", [x.rows().div_ceil(64), self.tiles()], 128, &[&pointers, &sizes]);
    }

    fn backward(&self, dy: &Matrix, h: &Matrix, dh: &Matrix, x: &Matrix, grads: &mut Matrix, dx: Option<&mut Matrix>) {
        let Update { pairs, parameters, .. } = self.update;
        let (tokens, ranks, ld) = (int(x.rows()), int(pairs.ranks), long(dy.cols()));
        let table = pairs.table.on(self.device);
        let pointers = [dy.pointer(), parameters.pointer(), table, dh.pointer()].map(Arg::from);
        let widest = pairs.list.iter().map(|pair| pair.columns.len()).max().unwrap_or(0);
        let parts = pairs.list.iter().map(|pair| pair.rank.len().div_ceil(RANKS)).sum();
        let sizes = (x.rows(), parts, widest);
        self.launch_narrow("lora_down_grad", sizes, &pointers, &[tokens, ranks, ld]);
        let dx = dx.map_or(0, |dx| dx.pointer());
        let da = grads.part(pairs.a.clone(), 1).pointer();
        let reads = [x.pointer(), dy.pointer(), h.pointer(), dh.pointer(), self.update.a()].map(Arg::from);
        let writes = [dx, da, grads.pointer(), table].map(Arg::from);
        let sizes = [tokens, int(x.cols()), ranks, ld];
        let blocks = x.cols().div_ceil(64) + self.tiles();
        self.launch("lora_gradients", [blocks, 1], 128, &[&reads, &writes, &sizes, &self.mask()]);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::testing::{Oracle, assert_close, random};
    use candle_core::Tensor;

    /// alpha != r, B != 0, x != 0, two pairs over different columns of one projection.
    #[test]
    fn two_pairs_side_by_side_equal_the_reference() {
        let (t, inn, out, r, scale) = (5, 77, 40, 3, 5.0 / 3.0);
        let (x, a, b1, b2) = (random(t * inn, 1), random(2 * r * inn, 2), random(10 * r, 3), random(15 * r, 4));
        let dy = random(t * out, 5);
        for dropout in [None, Some(Dropout { p: 0.3, seed: 7 })] {
            let mask = match dropout {
                Some(d) => d.forward(&Matrix::from_slice(t, inn, &vec![1.0; t * inn])).to_vec(),
                None => vec![1.0; t * inn],
            };
            let reference = |i: &[Tensor]| {
                let mask = Tensor::from_slice(&mask, (t, inn), i[0].device())?;
                let h = i[0].mul(&mask)?.matmul(&i[1].t()?)?;
                let first = (h.narrow(1, 0, r)?.matmul(&i[2].t()?)? * f64::from(scale))?;
                let second = (h.narrow(1, r, r)?.matmul(&i[3].t()?)? * f64::from(scale))?;
                let (left, right) = (first.zeros_like()?, Tensor::zeros((t, 15), first.dtype(), first.device())?);
                Tensor::cat(&[left.narrow(1, 0, 0)?, first, right, second], 1)
            };
            let inputs = [(&x[..], t, inn), (&a[..], 2 * r, inn), (&b1[..], 10, r), (&b2[..], 15, r)];
            let oracle = Oracle::run(&inputs, reference, &dy);
            let all = [&a[..], &b1, &b2].concat();
            let (a, b1) = (0..a.len(), a.len()..a.len() + b1.len());
            let b2 = b1.end..all.len();
            let list = vec![
                Pair { rank: 0..r, columns: 0..10, b: b1.clone(), scale },
                Pair { rank: r..2 * r, columns: 25..40, b: b2.clone(), scale },
            ];
            let (pairs, parameters) = (Pairs::new(list, a.clone()), Matrix::from_slice(1, all.len(), &all));
            let update = Update { pairs: &pairs, parameters: &parameters, dropout };
            let (x, mut y) = (Matrix::from_slice(t, inn, &x), Matrix::zeros(t, out));
            let h = update.forward(&x, &mut y);
            assert_close(&y, &oracle.y, 1e-5);

            let (mut grads, mut dx) = (Matrix::zeros(1, all.len()), Matrix::zeros(t, inn));
            update.backward(&Matrix::from_slice(t, out, &dy), &h, &x, &mut grads, Some(&mut dx));
            for (got, want) in [&dx[..], &grads[a], &grads[b1], &grads[b2]].iter().zip(&oracle.grads) {
                assert_close(got, want, 1e-5);
            }
        }
    }

    #[test]
    fn dropout_keeps_the_mean_and_differs_by_seed() {
        let ones = Matrix::from_slice(100, 1000, &vec![1.0; 100_000]);
        let (a, b) = (Dropout { p: 0.25, seed: 1 }.forward(&ones), Dropout { p: 0.25, seed: 2 }.forward(&ones));
        let mean = a.iter().sum::<f32>() / 100_000.0;
        assert!((mean - 1.0).abs() < 0.01, "mean {mean}");
        let both = a.iter().zip(b.iter()).filter(|(x, y)| **x == 0.0 && **y == 0.0).count() as f64 / 100_000.0;
        assert!((both - 0.0625).abs() < 0.005, "joint drop rate {both}");
    }
}
