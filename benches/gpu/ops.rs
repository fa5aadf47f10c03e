//! Each op of a step on the device, at the shapes of the models that `run.sh` trains: `gpu --ops [FILTER]` prints a JSON line an
//! op, its time and what that makes in GB/s and TFLOP/s. Where there is no device, on one that does nothing.

use crate::idle::Idle;
use litgpt::ops::Matrix;
use litgpt::ops::attention::{Attention, Spans};
use litgpt::ops::device::{Constant, Device, Dtype};
use litgpt::ops::glu::{Activation, Units};
use litgpt::ops::head::{Gradient, Loss, Transform, cross_entropy};
use litgpt::ops::lora::{Dropout, Pair, Pairs, Update};
use litgpt::ops::matrix::Parked;
use litgpt::ops::norm::{Kind, Norm};
use litgpt::ops::optimizer::{AdamW, Moments};
use litgpt::ops::quantized::Format;
use litgpt::ops::resident::{Part, Resident};
use litgpt::ops::rope::{Scaling, Tables};
use litgpt::ops::rows::scale;
use litgpt::ops::weight::Data;
use std::cell::Cell;
use std::time::Instant;

const DTYPE: Dtype = Dtype::Bf16;
/// Repetitions between two waits, and how often; the least counts.
const REPETITIONS: [usize; 2] = [20, 5];
const RANK: usize = 8;
/// Rows of x of the products.
const TOKENS: [usize; 8] = [1, 8, 32, 96, 160, 256, 512, 1024];
/// Bytes that no card's cache holds.
const CACHED: usize = 150 << 20;

/// Sizes of a model.
struct Model {
    name: &'static str,
    n_embd: usize,
    intermediate: usize,
    head_size: usize,
    vocab: usize,
}

const MODELS: [Model; 2] = [
    Model { name: "StableLM 3B", n_embd: 2560, intermediate: 6912, head_size: 80, vocab: 50_688 },
    Model { name: "Llama 2 7B", n_embd: 4096, intermediate: 11_008, head_size: 128, vocab: 32_000 },
];

struct Bench {
    device: Device,
    filter: String,
}

/// Times every op whose row contains the filter.
pub fn run(filter: &str) {
    let device =
        Device::cuda(0).unwrap().unwrap_or_else(|| Device::new(Box::new(Idle::new(std::sync::Arc::default()))));
    println!("{{\"device\": \"{}\"}}", device.name());
    let bench = Bench { device, filter: filter.to_owned() };
    bench.asking();
    for model in &MODELS {
        let shapes = [
            ("qkv", vec![model.n_embd; 3], model.n_embd),
            ("o", vec![model.n_embd], model.n_embd),
            ("gate_up", vec![model.intermediate; 2], model.n_embd),
            ("down", vec![model.n_embd], model.intermediate),
        ];
        for (op, parts, inn) in shapes {
            bench.products(model.name, op, &parts, inn);
        }
        for tokens in [1, 160, 512, 1024] {
            bench.adapters(model, tokens);
            bench.attention(model, tokens);
            bench.elementwise(model, tokens);
        }
    }
    bench.device.check().unwrap();
}

impl Bench {
    fn matrix(&self, rows: usize, cols: usize) -> Matrix {
        let values = (0..rows * cols).map(|i| ((i * 2_654_435_761) % 2001) as f32 / 1000.0 - 1.0);
        Matrix::from_slice(rows, cols, &values.collect::<Vec<_>>()).to(Some((&self.device, DTYPE)))
    }

    fn wait(&self) {
        self.device.allocate(4).read(&mut [0; 4]);
    }

    fn row(&self, op: &str, flops: f64, bytes: f64, mut f: impl FnMut()) {
        if !op.contains(&self.filter) {
            return;
        }
        let [repetitions, times] = REPETITIONS;
        f();
        self.wait();
        let once = |_| {
            let begun = Instant::now();
            (0..repetitions).for_each(|_| f());
            self.wait();
            begun.elapsed().as_secs_f64() / repetitions as f64
        };
        let seconds = (0..times).map(once).fold(f64::INFINITY, f64::min);
        let (us, gbs, tflops) = (seconds * 1e6, bytes / seconds / 1e9, flops / seconds / 1e12);
        println!("{{\"op\": \"{op}\", \"us\": {us:.1}, \"gbs\": {gbs:.0}, \"tflops\": {tflops:.1}}}");
    }

    /// What a launch, a product and an allocation take that do next to nothing.
    fn asking(&self) {
        let (mut small, mut y) = (self.matrix(1, 32), self.matrix(16, 16));
        self.row("asking: launch", 0.0, 0.0, || scale(&mut small, 0.5));
        self.row("asking: allocation", 0.0, 0.0, || drop(self.device.allocate(1 << 20)));
        let x = self.matrix(16, 16);
        let weight = Resident::whole(&self.device, DTYPE, 16, 16, &Data::F32(vec![1.0; 256]));
        self.row("asking: product", 0.0, 0.0, || weight.forward(x.view(), &mut y, false));
    }

    /// Products with a weight whose rows are those of `parts`, whole and in few bits: of several copies in turn, so that each
    /// comes from memory, as in a step, and not from a cache.
    fn products(&self, model: &str, op: &str, parts: &[usize], inn: usize) {
        let out: usize = parts.iter().sum();
        let values: Vec<f32> = (0..out * inn).map(|i| ((i * 7919) % 2003) as f32 / 1000.0 - 1.0).collect();
        let quantized = |name: &str| {
            let quantizer = Format::named(name).unwrap();
            let mut at = 0;
            let part = |rows: &usize| {
                at += rows;
                Part::quantize(&self.device, quantizer, &values[(at - rows) * inn..at * inn], *rows, inn)
            };
            Resident::quantized(&self.device, DTYPE, inn, parts.iter().map(part).collect())
        };
        let whole = || Resident::whole(&self.device, DTYPE, out, inn, &Data::F32(values.clone()));
        for kind in ["bf16", "nf4", "nf4-dq", "int8"] {
            let name = |tokens: usize, direction: &str| format!("{model} {op} {kind} {tokens} tokens {direction}");
            let asked = |tokens| ["forward", "backward"].iter().any(|d| name(tokens, d).contains(&self.filter));
            if !TOKENS.into_iter().any(asked) {
                continue;
            }
            let make = || if kind == "bf16" { whole() } else { quantized(kind) };
            let first = make();
            let copies = CACHED.div_ceil(first.bytes().max(1)).max(1);
            let weights: Vec<Resident> = std::iter::once(first).chain((1..copies).map(|_| make())).collect();
            let turn = Cell::new(0);
            let next = || &weights[turn.replace((turn.get() + 1) % weights.len())];
            for tokens in TOKENS {
                let (x, dy) = (self.matrix(tokens, inn), self.matrix(tokens, out));
                let (mut y, mut dx) = (self.matrix(tokens, out), self.matrix(tokens, inn));
                let (flops, bytes) = (2.0 * (tokens * out * inn) as f64, weights[0].bytes() as f64);
                self.row(&name(tokens, "forward"), flops, bytes, || next().forward(x.view(), &mut y, false));
                self.row(&name(tokens, "backward"), flops, bytes, || next().backward(dy.view(), &mut dx, false));
            }
        }
    }

    /// The low-rank updates of q and v.
    fn adapters(&self, model: &Model, tokens: usize) {
        let c = model.n_embd;
        let (x, dy) = (self.matrix(tokens, c), self.matrix(tokens, 3 * c));
        let (mut y, mut dx) = (self.matrix(tokens, 3 * c), self.matrix(tokens, c));
        let (a, b) = (2 * RANK * c, RANK * c);
        let parameters = self.matrix(1, a + 2 * b);
        let mut grads = Matrix::new_on(&self.device, Dtype::F32, 1, a + 2 * b);
        let pair = |i: usize| Pair {
            rank: i * RANK..(i + 1) * RANK,
            columns: 2 * i * c..(2 * i + 1) * c,
            b: a + i * b..a + (i + 1) * b,
            scale: 2.0,
        };
        let pairs = Pairs::new(vec![pair(0), pair(1)], 0..a);
        let of_x = (2 * tokens * c) as f64;
        for (name, dropout) in [("", None), (", dropout", Some(Dropout { p: 0.05, seed: 1 }))] {
            let name = |direction: &str| format!("{} adapters {tokens} tokens{name} {direction}", model.name);
            let update = Update { pairs: &pairs, parameters: &parameters, dropout };
            self.row(&name("forward"), 0.0, 5.0 * of_x, || drop(update.forward(&x, &mut y)));
            let h = update.forward(&x, &mut y);
            let backward = || update.backward(&dy, &h, &x, &mut grads, Some(&mut dx));
            self.row(&name("backward"), 0.0, 7.0 * of_x, backward);
        }
    }

    fn attention(&self, model: &Model, tokens: usize) {
        let (c, head_size) = (model.n_embd, model.head_size);
        let n_head = c / head_size;
        let scale = 1.0 / (head_size as f32).sqrt();
        let attention =
            Attention { n_head, n_query_groups: n_head, head_size, scale, softcap: None, window: None, bf16: true };
        let qkv = self.matrix(tokens, 3 * c);
        let [q, k, v] = [0, 1, 2].map(|i| qkv.columns(i * c..(i + 1) * c));
        let spans = Spans::whole(std::slice::from_ref(&(0..tokens)));
        let (o, saved) = attention.forward(q, k, v, &spans);
        // Of the scores half are seen.
        let flops = 2.0 * (tokens * tokens * c) as f64;
        let name = |op: &str| format!("{} attention {tokens} tokens {op}", model.name);
        self.row(&name("forward"), flops, 0.0, || drop(attention.forward(q, k, v, &spans)));
        let backward = || drop(attention.backward([q, k, v], &o, &o, &saved, &spans));
        self.row(&name("backward"), 2.5 * flops, 0.0, backward);
        let keys = self.matrix(1024, 2 * c);
        let [k, v] = [0, 1].map(|i| keys.columns(i * c..(i + 1) * c));
        let (q, spans) = (qkv.columns(0..c).slice_rows(0..1), Spans::tail(1, 1023));
        let decode = || drop(attention.forward(q, k, v, &spans));
        self.row(&format!("{} attention of a token over 1024", model.name), 0.0, (4 * 1024 * c) as f64, decode);
    }

    fn elementwise(&self, model: &Model, tokens: usize) {
        let (c, width, size) = (model.n_embd, model.intermediate, (2 * tokens) as f64);
        let name = |op: &str| format!("{} {op} {tokens} tokens", model.name);
        let norm = Norm { kind: Kind::Rms, eps: 1e-5, group: c, weight: vec![1.0; c].into(), bias: None };
        let (x, dy, mut dx) = (self.matrix(tokens, c), self.matrix(tokens, c), self.matrix(tokens, c));
        self.row(&name("norm forward"), 0.0, 2.0 * size * c as f64, || drop(norm.forward(&x)));
        self.row(&name("norm backward"), 0.0, 4.0 * size * c as f64, || norm.backward(&dy, &x, &mut dx, true));
        self.row(&name("copy"), 0.0, 2.0 * size * c as f64, || drop(x.clone()));
        let (gate_up, dh) = (self.matrix(tokens, 2 * width), self.matrix(tokens, width));
        let silu = Units { activation: Activation::Silu, gated: true };
        self.row(&name("glu forward"), 0.0, 3.0 * size * width as f64, || drop(silu.forward(&gate_up)));
        // It overwrites what it is given.
        let mut d = Some(gate_up.clone());
        let backward = || d = d.take().map(|d| silu.backward(&dh, Parked::beside(d, false, |_| ()).1));
        self.row(&name("glu backward"), 0.0, 5.0 * size * width as f64, backward);
        let tables = Tables::new(10_000.0, model.head_size, &Scaling::None, tokens);
        let (mut qk, positions) = (self.matrix(tokens, 2 * c), (0..tokens as u32).collect::<Constant<u32>>());
        let rope = || tables.forward(&mut qk, 0..2 * c, model.head_size, &positions);
        self.row(&name("rope"), 0.0, 4.0 * size * c as f64, rope);
        let mut logits = self.matrix(tokens, model.vocab);
        let (targets, mut loss) = ((0..tokens as u32).collect::<Constant<u32>>(), Loss::zero(&logits));
        let (transform, gradient) =
            (Transform { scale: 1.0, softcap: None }, Gradient { weight: 1.0, negligible: 0.0 });
        let entropy = || cross_entropy(&mut logits, &targets, transform, gradient, &mut loss);
        self.row(&name("cross-entropy"), 0.0, 2.0 * size * model.vocab as f64, entropy);
        let mut parameters = Matrix::new_on(&self.device, Dtype::F32, 1, 32 * 4 * RANK * c);
        parameters.zero();
        let (grads, mut moments) = (parameters.clone(), Moments::new(&parameters));
        let adamw = AdamW { beta1: 0.9, beta2: 0.999, eps: 1e-8, weight_decay: 0.0 };
        let bytes = (7 * 4 * parameters.cols()) as f64;
        let step = || adamw.step(&mut parameters, &grads, 1.0, &mut moments, 1e-4);
        self.row(&format!("{} AdamW", model.name), 0.0, bytes, step);
    }
}
