//! The model on a device against the same reference values as on the host: every golden case, through the launches of a
//! GPU (`emulated`).

use crate::emulated;
use crate::golden::{
    Fixture, batch, cases, check_generation, check_prefix, check_training, deviation, each, json, largest_difference,
    load_on, logits, root, within,
};
use litgpt::checkpoint::adapter;
use litgpt::model::quantizer::Quantizer;
use litgpt::ops::Matrix;
use litgpt::ops::attention::{Attention, Spans};
use litgpt::ops::device::{Device, Dtype};
use litgpt::ops::lora::{Dropout, Pair, Pairs, Update};
use litgpt::ops::quantized::{Codes, Format, Rows};
use litgpt::ops::resident::{Part, Resident};
use litgpt::ops::weight::{Data, Store, Weight};
use std::path::Path;

fn check_model(device: &Device, dir: &Path) {
    let Some((_, mut gpt)) = load_on(Some(device), dir, Store::F32, None) else { return };
    let (fixture, golden) = (Fixture::read(&dir.join("golden.safetensors")), json(&dir.join("golden.json")));
    let rows = fixture.rows("input_ids");
    let want = &fixture.get("logits").1;
    let got = logits(&gpt, &rows);
    device.check().unwrap(); // before it is compared: what a failed device computes are zeros
    within("logits / std", largest_difference(&got, want) / deviation(want), 1e-4);
    let tokens = batch(&rows, &rows);
    let loss = gpt.loss(&tokens, None) / tokens.n_targets() as f64;
    device.check().unwrap();
    within("loss, relative", (loss / golden["loss"].as_f64().unwrap() - 1.0).abs() as f32, 1e-5);
    if let Some(generation) = golden.get("generation") {
        check_generation(&gpt, generation);
    }
    check_prefix(&mut gpt, 1e-5, &[false]);
    device.check().unwrap();
}

#[test]
fn golden_models_on_a_device() {
    let Some(root) = root() else { return };
    let all = each(&cases(&root, "models", "golden.safetensors"), |dir| {
        let Some(device) = emulated::device() else { return };
        check_model(&device, dir);
    });
    assert!(all.is_empty(), "cases that failed: {all:?}");
}

#[test]
fn golden_lora_on_a_device() {
    let Some(root) = root() else { return };
    let all = each(&cases(&root, "lora", "golden.json"), |dir| {
        let Some(device) = emulated::device() else { return };
        let golden = json(&dir.join("golden.json"));
        let base = root.join(golden["base_model"].as_str().unwrap());
        let Some((checkpoint, mut gpt)) = load_on(Some(&device), &base, Store::F32, None) else { return };
        if checkpoint.locate("model.layers.0.self_attn.q_proj.weight")[0].rows.is_some() {
            return;
        }
        let fixture = Fixture::read(&dir.join("train.safetensors"));
        check_training(dir, &checkpoint, &mut gpt, &fixture, &golden);
        device.check().unwrap();
    });
    assert!(all.is_empty(), "cases that failed: {all:?}");
}

/// A model without adapters in 16 bits: there are no parameters to round.
#[test]
fn a_base_in_16_bits_on_a_device() {
    let (Some(root), Some(device)) = (root(), emulated::device()) else { return };
    let dir = &cases(&root, "models", "golden.safetensors")[0];
    let rows = Fixture::read(&dir.join("golden.safetensors")).rows("input_ids");
    let (_, host) = load_on(None, dir, Store::F32, None).unwrap();
    let want = logits(&host, &rows[..1]);
    for (store, limit) in [(Store::Bf16, 0.25), (Store::F16, 0.03)] {
        let (_, gpt) = load_on(Some(&device), dir, store, None).unwrap();
        let error = largest_difference(&logits(&gpt, &rows[..1]), &want) / deviation(&want);
        device.check().unwrap();
        within(&format!("{store:?}"), error, limit);
    }
}

/// In few bits and in 16 bits the device computes what the host does, within the type's rounding.
#[test]
fn other_types_on_a_device() {
    let (Some(root), Some(device)) = (root(), emulated::device()) else { return };
    for dir in cases(&root, "lora", "golden.json") {
        let golden = json(&dir.join("golden.json"));
        let base = root.join(golden["base_model"].as_str().unwrap());
        let rows = Fixture::read(&base.join("golden.safetensors")).rows("input_ids");
        let kinds = [None, Some("nf4"), Some("nf4-dq"), Some("nf4-mixed"), Some("fp4"), Some("int8")];
        for (store, limit) in [(Store::F32, 1e-4), (Store::Bf16, 0.25), (Store::F16, 0.03)] {
            for quantizer in kinds.map(|kind| kind.map(|kind| Quantizer::named(kind).unwrap())) {
                let host = load_on(None, &base, Store::F32, quantizer);
                let (Some((checkpoint, mut host)), Some((_, mut gpt))) =
                    (host, load_on(Some(&device), &base, store, quantizer))
                else {
                    continue;
                };
                adapter::load(&dir.join("final"), checkpoint.family, &mut host).unwrap();
                adapter::load(&dir.join("final"), checkpoint.family, &mut gpt).unwrap();
                let want = logits(&host, &rows[..1]);
                let got = logits(&gpt, &rows[..1]);
                device.check().unwrap();
                let error = largest_difference(&got, &want) / deviation(&want);
                within(&format!("{store:?} {quantizer:?}"), error, limit);
                // So few rows that 4-bit weights are not decoded first.
                let few = [rows[0][..5].to_vec()];
                let want = logits(&host, &few);
                let error = largest_difference(&logits(&gpt, &few), &want) / deviation(&want);
                within(&format!("{store:?} {quantizer:?}, few rows"), error, limit);
                if quantizer.is_none() {
                    check_prefix(&mut gpt, limit / 50.0, &[false]);
                }
            }
        }
    }
    device.check().unwrap();
}

/// Products with weights in 4 bits, which are decoded as they are multiplied, next to the same with what the device decodes:
/// matrices of one weight that end within a tile, one sample and more tokens than a tile, onto what is there; and rows that
/// share a scale, for which the weight is decoded first.
#[test]
fn products_in_4_bits() {
    let Some(device) = emulated::device() else { return };
    let mut cases =
        vec![("nf4", vec![136, 64], 192, 40), ("nf4-dq", vec![72], 448, 150), ("fp4-dq", vec![32, 8], 96, 12)];
    if emulated::is_real() {
        for tokens in [16, 96, 160, 500] {
            cases.extend([("nf4", vec![4096; 3], 4096, tokens), ("nf4-dq", vec![4096], 11_008, tokens)]);
        }
    }
    for (name, rows, cols, tokens) in cases {
        for (dtype, rounding) in [(Dtype::Bf16, 1.0 / 256.0), (Dtype::F16, 1.0 / 2048.0)] {
            check_product_in_4_bits(&device, name, &rows, cols, tokens, (dtype, rounding));
        }
    }
}

fn check_product_in_4_bits(
    device: &Device,
    format: &str,
    rows: &[usize],
    cols: usize,
    tokens: usize,
    (dtype, rounding): (Dtype, f32),
) {
    let format = Format::named(format).unwrap();
    let parts = rows.iter().map(|&rows| Part::quantize(device, format, &noise(rows * cols, rows), rows, cols));
    let weight = Resident::quantized(device, dtype, cols, parts.collect());
    let all: usize = rows.iter().sum();
    // Exact sums of what is multiplied, so on the host.
    let decoded = Weight::new(all, cols, Data::F32(weight.rows(0..all).to_host().to_vec()));
    for backward in [false, true] {
        let (ins, outs) = if backward { (all, cols) } else { (cols, all) };
        let on_device = |values: &[f32], cols| Matrix::from_slice(tokens, cols, values).to(Some((device, dtype)));
        let (x, mut y) = (on_device(&noise(tokens * ins, 1), ins), on_device(&noise(tokens * outs, 2), outs));
        let (host, mut want) = (x.to_host(), y.to_host());
        if backward {
            weight.backward(x.view(), &mut y, true);
            decoded.backward(host.view(), &mut want, true);
        } else {
            weight.forward(x.view(), &mut y, true);
            decoded.forward(host.view(), &mut want, true);
        }
        let got = y.to_host();
        device.check().unwrap();
        // Each element is rounded once, and its sum is in f32.
        let slack = 1e-4 * deviation(&want);
        let off = got.iter().zip(want.iter()).map(|(got, want)| (got - want).abs() / (rounding * want.abs() + slack));
        let what = format!("{format:?} {rows:?} x {cols}, {tokens} tokens, {dtype:?}, backward {backward}");
        within(&what, off.fold(0.0, f32::max), 1.0);
    }
}

/// A few rows times weights in 8 bits, whose codes are multiplied as they are, and one row too many for that: next to what the
/// codes stand for, in f32.
#[test]
fn products_in_8_bits() {
    let Some(device) = emulated::device() else { return };
    let int8 = Format::named("int8").unwrap();
    let mut cases = vec![(vec![136, 64], 192), (vec![24, 5], 100)];
    if emulated::is_real() {
        cases.push((vec![4096, 1024, 1024], 4096));
    }
    for ((rows, cols), tokens) in cases.iter().flat_map(|case| [1, 3, 8, 9].map(|tokens| (case, tokens))) {
        let codes = rows.iter().map(|&rows| Codes::new(int8, &noise(rows * cols, rows), rows, *cols));
        let codes: Vec<_> = codes.collect();
        let all: usize = rows.iter().sum();
        let exact = Weight::quantized(*cols, codes.iter().cloned().map(Rows::Codes).collect(), Store::F32);
        for (dtype, rounding) in [(Dtype::F32, 1e-6), (Dtype::Bf16, 1.0 / 256.0), (Dtype::F16, 1.0 / 2048.0)] {
            let parts = codes.iter().map(|codes| Part::upload(&device, codes));
            let weight = Resident::quantized(&device, dtype, *cols, parts.collect());
            let on_device = |values: &[f32], cols| Matrix::from_slice(tokens, cols, values).to(Some((&device, dtype)));
            let (x, mut y) = (on_device(&noise(tokens * cols, 1), *cols), on_device(&noise(tokens * all, 2), all));
            let (host, mut want) = (x.to_host(), y.to_host());
            weight.forward(x.view(), &mut y, true);
            exact.forward(host.view(), &mut want, true);
            let got = y.to_host();
            device.check().unwrap();
            // For nine rows the weights are rounded, too: by up to half of `rounding` each, of 100 and more in a sum.
            let slack = if tokens > 8 { f32::max(2.0 * rounding, 1e-4) } else { 1e-4 } * deviation(&want);
            let off =
                got.iter().zip(want.iter()).map(|(got, want)| (got - want).abs() / (rounding * want.abs() + slack));
            within(&format!("{rows:?} x {cols}, {tokens} tokens, {dtype:?}"), off.fold(0.0, f32::max), 1.0);
        }
    }
}

/// Two adapters of one projection, forward and backward, with dropout and without: by the kernels that do all of it at once, and,
/// where a rank is odd, product by product.
#[test]
fn adapters_on_a_device() {
    let Some(device) = emulated::device() else { return };
    let mut cases = vec![(40, 96, [8, 4]), (70, 72, [16, 16]), (9, 40, [3, 8]), (20, 1032, [8, 2]), (17, 40, [70, 66])];
    if emulated::is_real() {
        cases.extend([(1, 4096, [8, 8]), (160, 4096, [8, 8]), (500, 11_008, [32, 32])]);
    }
    for (tokens, cols, ranks) in cases {
        for dropout in [None, Some(Dropout { p: 0.25, seed: 7 })] {
            // h and dh are rounded to the type between two products. A library's f32 sums of 11,008 are off by 1e-5 and more.
            let of_f32 = if cols > 2000 { 1e-4 } else { 1e-5 };
            for (dtype, limit) in [(Dtype::F32, of_f32), (Dtype::Bf16, 1.0 / 32.0), (Dtype::F16, 1.0 / 256.0)] {
                let what = format!("{tokens} tokens, {cols} columns, ranks {ranks:?}, {dropout:?}, {dtype:?}");
                check_adapters(&what, (&device, dtype, limit), (tokens, cols), ranks, dropout);
            }
        }
    }
}

fn check_adapters(
    what: &str,
    (device, dtype, limit): (&Device, Dtype, f32),
    (tokens, cols): (usize, usize),
    ranks: [usize; 2],
    dropout: Option<Dropout>,
) {
    // The second is of columns behind some that have no adapter.
    let (outs, columns) = (cols + 16 + 64, [0..cols, cols + 16..cols + 16 + 64]);
    let a = (ranks[0] + ranks[1]) * cols;
    let b = [a..a + cols * ranks[0], a + cols * ranks[0]..a + cols * ranks[0] + 64 * ranks[1]];
    let pair = |i: usize| Pair {
        rank: [0..ranks[0], ranks[0]..ranks[0] + ranks[1]][i].clone(),
        columns: columns[i].clone(),
        b: b[i].clone(),
        scale: 0.5 + i as f32,
    };
    let pairs = Pairs::new(vec![pair(0), pair(1)], 0..a);
    let matrix = |rows: usize, cols: usize, seed| {
        Matrix::from_slice(rows, cols, &noise(rows * cols, seed)).to(Some((device, dtype)))
    };
    let (parameters, x, dy) = (matrix(1, b[1].end, 1), matrix(tokens, cols, 2), matrix(tokens, outs, 3));
    let run = |parameters: &Matrix, x: &Matrix, dy: &Matrix, grads: &mut Matrix| {
        let (mut y, mut dx) = (dy.new_like(tokens, outs), x.new_like(tokens, cols));
        y.zero();
        dx.zero();
        let update = Update { pairs: &pairs, parameters, dropout };
        let h = update.forward(x, &mut y);
        update.backward(dy, &h, x, grads, Some(&mut dx));
        [h.to_host(), y.to_host(), dx.to_host(), grads.to_host()]
    };
    let grads = Matrix::zeros(1, b[1].end);
    let got = run(&parameters, &x, &dy, &mut grads.to(Some((device, Dtype::F32))));
    device.check().unwrap();
    let want = run(&parameters.to_host(), &x.to_host(), &dy.to_host(), &mut grads.clone());
    for (name, (got, want)) in ["h", "y", "dx", "gradients"].iter().zip(got.iter().zip(&want)) {
        within(&format!("{what}: {name}"), largest_difference(got, want) / deviation(want), limit);
    }
}

/// Numbers from -1 to 1 in no order, whose sums do not cancel.
fn noise(n: usize, seed: usize) -> Vec<f32> {
    let one = |i: usize| {
        let h = (i as u32 ^ (seed as u32).wrapping_mul(0x9e37_79b9)).wrapping_mul(0x85eb_ca6b);
        let h = (h ^ h >> 13).wrapping_mul(0xc2b2_ae35);
        (h >> 8) as f32 / 8_388_608.0 - 1.0
    };
    (0..n).map(one).collect()
}

/// Samples and what they may see.
struct Case {
    spans: Spans,
    queries: usize,
    keys: usize,
    softcap: Option<f32>,
    window: Option<usize>,
}

/// `t` tokens: of one sample, of two, after a prefix, in a window with capped scores, and few after many.
fn attention_cases(t: usize) -> Vec<Case> {
    let case = |spans, queries, keys| Case { spans, queries, keys, softcap: None, window: None };
    let halves = [0..t / 3, t / 3..t];
    vec![
        case(Spans::tail(t, t), t, t),
        case(Spans::whole(&halves), t, t),
        case(Spans::after(t / 4, &halves), t, t + t / 4),
        Case { softcap: Some(5.0), window: Some(t / 3), ..case(Spans::whole(&halves), t, t) },
        case(Spans::tail(3, t), 3, t),
        // Keys in shares.
        case(Spans::tail(2, 4 * t), 2, 4 * t),
    ]
}

/// Attention of a device and its gradients are those of the host, for all sizes of heads that there are kernels for.
#[test]
fn attention_on_a_device() {
    let Some(device) = emulated::device() else { return };
    // Several blocks of 64 rows; the emulation takes its time.
    let t = if emulated::is_real() { 300 } else { 70 };
    for head_size in [64, 80, 128, 256] {
        for (i, case) in attention_cases(t).iter().enumerate() {
            for (dtype, limit) in [(Dtype::F32, 1e-5), (Dtype::Bf16, 2e-2), (Dtype::F16, 3e-3)] {
                let attention = Attention {
                    n_head: 2,
                    n_query_groups: 1,
                    head_size,
                    scale: (head_size as f32).sqrt().recip(),
                    softcap: case.softcap,
                    window: case.window,
                    bf16: false,
                };
                let [q, kv, d_o] = [(case.queries, 1), (case.keys, 2), (case.queries, 3)].map(|(rows, seed)| {
                    let x = noise(rows * 2 * head_size, seed);
                    Matrix::from_slice(rows, 2 * head_size, &x).to(Some((&device, dtype)))
                });
                let past = case.keys - case.queries;
                let run = |[q, kv, d_o]: [&Matrix; 3]| {
                    let qkv = [q.view(), kv.columns(0..head_size), kv.columns(head_size..2 * head_size)];
                    let (o, saved) = attention.forward(qkv[0], qkv[1], qkv[2], &case.spans);
                    let d = attention.backward(qkv, &o, d_o, &saved, &case.spans);
                    let d = d.to_host();
                    // Queries of rows that are not there have no gradients.
                    let dq = (past..case.keys).flat_map(|row| d.row(row)[..2 * head_size].to_vec()).collect();
                    let dkv = (0..case.keys).flat_map(|row| d.row(row)[2 * head_size..].to_vec()).collect();
                    [o.to_host().to_vec(), dq, dkv]
                };
                let got = run([&q, &kv, &d_o]);
                device.check().unwrap();
                let want = run([&q.to_host(), &kv.to_host(), &d_o.to_host()]);
                for (what, (got, want)) in ["o", "dq", "dk and dv"].into_iter().zip(got.iter().zip(&want)) {
                    let scale = want.iter().fold(0.0f32, |m, v| m.max(v.abs()));
                    let what = format!("head size {head_size}, case {i}, {dtype:?}, {what}");
                    within(&what, largest_difference(got, want) / scale, limit);
                }
            }
        }
    }
}
