//! Times the ops that a training step is made of, at the shapes of SmolLM2-135M and 160 tokens, and sets the products
//! against the machine's own ceiling, measured in the same run.
//!
//! `cargo bench --bench ops [FILTER]` prints a JSON line a row: the median of the repetitions, GFLOP/s or GB/s, and the
//! share of the ceiling.
#![allow(clippy::print_stdout, clippy::unwrap_used, missing_docs)]

use half::bf16;
use litgpt::ops::attention::{Attention, Spans};
use litgpt::ops::glu::{Activation, Units};
use litgpt::ops::matmul::{Side, Threads, ViewMut, matmul};
use litgpt::ops::matrix::Parked;
use litgpt::ops::norm::{Kind, Norm};
use litgpt::ops::weight::{Data, Weight};
use litgpt::ops::{Matrix, View, in_pool};
use std::time::Instant;

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// Tokens.
const T: usize = 160;
/// Repetitions of an op, of which the median counts.
const REPS: usize = 45;
/// Bytes of the copies of a weight that a product takes in turn: in a model each comes from memory, not from a cache.
const IN_MEMORY: usize = 256 << 20;

/// Median duration of `f`, seconds.
fn time(mut f: impl FnMut() + Send) -> f64 {
    in_pool(|| {
        f();
        let mut times: Vec<f64> = (0..REPS)
            .map(|_| {
                let begun = Instant::now();
                f();
                begun.elapsed().as_secs_f64()
            })
            .collect();
        times.sort_by(f64::total_cmp);
        times[times.len() / 2]
    })
}

fn values(n: usize) -> Vec<f32> {
    (0..n).map(|i| ((i * 2_654_435_761) % 2001) as f32 / 1000.0 - 1.0).collect()
}

/// f32 GFLOP/s of the `gemm` crate on a square product: the ceiling that ratios refer to.
fn ceiling() -> f64 {
    let n = 1024;
    let (a, b) = (values(n * n), values(n * n));
    let mut c = vec![0.0; n * n];
    let seconds = time(|| {
        let (a, b) = (Side::N(View::of(&a, n, n)), Side::N(View::of(&b, n, n)));
        matmul(Threads::All, ViewMut::of(&mut c, n, n), false, 1.0, a, b);
    });
    2.0 * (n as f64).powi(3) / seconds / 1e9
}

/// Times the ops whose name contains the filter, and prints a row for each.
struct Bench {
    filter: String,
    ceiling: f64,
}

impl Bench {
    fn row(&self, op: &str, flops: f64, bytes: f64, f: impl FnMut() + Send) {
        if !op.contains(&self.filter) {
            return;
        }
        let seconds = time(f);
        let (gflops, gbs) = (flops / seconds / 1e9, bytes / seconds / 1e9);
        let share = gflops / self.ceiling;
        println!(
            "{{\"op\": \"{op}\", \"us\": {:.0}, \"gflops\": {gflops:.1}, \"gbs\": {gbs:.2}, \"share\": {share:.2}}}",
            seconds * 1e6
        );
    }

    fn products(&self, name: &str, out: usize, inn: usize) {
        let w = values(out * inn);
        let half: Vec<bf16> = w.iter().map(|v| bf16::from_f32(*v)).collect();
        let stores: [(&str, &dyn Fn() -> Weight); 3] = [
            ("f32", &|| Weight::new(out, inn, Data::F32(w.clone()))),
            ("f32 from bf16", &|| Weight::widened(out, inn, half.clone())),
            ("bf16", &|| Weight::new(out, inn, Data::Bf16(half.clone()))),
        ];
        for (store, weight) in stores {
            let first = weight();
            let copies = (IN_MEMORY / first.bytes()).max(1);
            let weights: Vec<Weight> = std::iter::once(first).chain((1..copies).map(|_| weight())).collect();
            let (mut next, mut also) = (weights.iter().cycle(), weights.iter().cycle());
            let (x, dy) = (Matrix::from_slice(T, inn, &values(T * inn)), Matrix::from_slice(T, out, &values(T * out)));
            let (mut y, mut dx) = (Matrix::zeros(T, out), Matrix::zeros(T, inn));
            let flops = 2.0 * (T * out * inn) as f64;
            let forward = || next.next().unwrap().forward(x.view(), &mut y, false);
            self.row(&format!("{name} {store} forward"), flops, 0.0, forward);
            let backward = || also.next().unwrap().backward(dy.view(), &mut dx, false);
            self.row(&format!("{name} {store} backward"), flops, 0.0, backward);
            let one = Matrix::from_slice(1, inn, x.row(0));
            let mut y = Matrix::zeros(1, out);
            let (flops, bytes) = (2.0 * (out * inn) as f64, weights[0].bytes() as f64);
            let decode = || next.next().unwrap().forward(one.view(), &mut y, false);
            self.row(&format!("{name} {store} decode"), flops, bytes, decode);
        }
    }

    fn elementwise(&self) {
        let x = Matrix::from_slice(T, 576, &values(T * 576));
        let norm = Norm { kind: Kind::Rms, eps: 1e-5, group: 576, weight: values(576).into(), bias: None };
        let bytes = (8 * T * 576) as f64;
        self.row("norm forward", 0.0, bytes, || drop(norm.forward(&x)));
        let mut dx = Matrix::zeros(T, 576);
        self.row("norm backward", 0.0, 2.0 * bytes, || norm.backward(&x, &x, &mut dx, true));
        let gate_up = Matrix::from_slice(T, 3072, &values(T * 3072));
        let (silu, bytes) = (Units { activation: Activation::Silu, gated: true }, (T * 1536) as f64);
        self.row("glu forward", 0.0, 12.0 * bytes, || drop(silu.forward(&gate_up)));
        let dh = Matrix::from_slice(T, 1536, &values(T * 1536));
        // It overwrites what it is given.
        let mut d = Some(gate_up.clone());
        let backward = || d = d.take().map(|d| silu.backward(&dh, Parked::beside(d, false, |_| ()).1));
        self.row("glu backward", 0.0, 20.0 * bytes, backward);
        let qkv = Matrix::from_slice(T, 960, &values(T * 960));
        let [q, k, v] = [qkv.columns(0..576), qkv.columns(576..768), qkv.columns(768..960)];
        let spans = Spans::tail(T, T);
        for (name, bf16) in [("f32", false), ("bf16", true)] {
            let attention = Attention {
                n_head: 9,
                n_query_groups: 3,
                head_size: 64,
                scale: 0.125,
                softcap: None,
                window: None,
                bf16,
            };
            let (o, saved) = attention.forward(q, k, v, &spans);
            let flops = 2.0 * (T * T * 576) as f64;
            let forward = || drop(attention.forward(q, k, v, &spans));
            self.row(&format!("attention {name} forward"), flops, 0.0, forward);
            let backward = || drop(attention.backward([q, k, v], &o, &o, &saved, &spans));
            self.row(&format!("attention {name} backward"), 2.5 * flops, 0.0, backward);
        }
    }
}

fn main() {
    let filter = std::env::args().skip(1).find(|a| !a.starts_with('-')).unwrap_or_default();
    let bench = Bench { filter, ceiling: ceiling() };
    let (ceiling, threads) = (bench.ceiling, rayon::current_num_threads());
    println!("{{\"op\": \"ceiling\", \"gflops_f32\": {ceiling:.0}, \"threads\": {threads}}}");
    let shapes =
        [("qkv", 960, 576), ("o", 576, 576), ("gate_up", 3072, 576), ("down", 576, 1536), ("head", 49152, 576)];
    for (name, out, inn) in shapes {
        bench.products(name, out, inn);
    }
    bench.elementwise();
}
