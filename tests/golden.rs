//! Reference values of transformers and PEFT: logits, loss, greedy generation, LoRA training, merging.
//!
//! The root is `LITGPT_GOLDEN` (default `../shared/golden`); every case found there is run, by what its files are. A
//! case of a family that is not supported is printed and counted. Without the folder the tests say so and pass.

use litgpt::checkpoint::write::Staging;
use litgpt::checkpoint::{Checkpoint, adapter, merge};
use litgpt::error::Error;
use litgpt::model::families::HfConfig;
use litgpt::model::lora::LoraConfig;
use litgpt::model::quantizer::Quantizer;
use litgpt::model::{Gpt, Tokens, Training};
use litgpt::ops::Matrix;
use litgpt::ops::device::Device;
use litgpt::ops::optimizer::{AdamW, Moments};
use litgpt::ops::weight::Store;
use safetensors::SafeTensors;
use serde_json::Value;
use std::collections::HashMap;
use std::path::{Path, PathBuf};

pub fn root() -> Option<PathBuf> {
    let root = std::env::var_os("LITGPT_GOLDEN").map_or_else(|| PathBuf::from("../shared/golden"), PathBuf::from);
    if root.is_dir() {
        return Some(root);
    }
    println!("skipped: no golden fixtures at {} (set LITGPT_GOLDEN)", root.display());
    None
}

/// Folders below `root/kind` that hold `file`, sorted.
pub fn cases(root: &Path, kind: &str, file: &str) -> Vec<PathBuf> {
    let Ok(entries) = std::fs::read_dir(root.join(kind)) else { return Vec::new() };
    let mut dirs: Vec<PathBuf> = entries.map(|e| e.unwrap().path()).filter(|p| p.join(file).is_file()).collect();
    dirs.sort();
    dirs
}

pub struct Fixture(pub HashMap<String, (Vec<usize>, Vec<f32>)>);

impl Fixture {
    pub fn read(path: &Path) -> Self {
        let bytes = std::fs::read(path).unwrap();
        let tensors = SafeTensors::deserialize(&bytes).unwrap();
        let values = |view: &safetensors::tensor::TensorView<'_>| match view.dtype() {
            safetensors::Dtype::I64 => {
                view.data().chunks_exact(8).map(|b| i64::from_le_bytes(b.try_into().unwrap()) as f32).collect()
            }
            safetensors::Dtype::F32 => {
                view.data().chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect()
            }
            other => panic!("{}: dtype {other:?}", path.display()),
        };
        Self(tensors.tensors().iter().map(|(n, v)| (n.clone(), (v.shape().to_vec(), values(v)))).collect())
    }

    pub fn get(&self, name: &str) -> &(Vec<usize>, Vec<f32>) {
        &self.0[name]
    }

    /// Rows of an integer tensor, the last dimension a row.
    pub fn rows(&self, name: &str) -> Vec<Vec<i32>> {
        let (shape, values) = self.get(name);
        values.chunks_exact(*shape.last().unwrap()).map(|r| r.iter().map(|v| *v as i32).collect()).collect()
    }
}

pub fn json(path: &Path) -> Value {
    serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap()
}

fn ids(row: &[i32]) -> Vec<u32> {
    row.iter().map(|v| *v as u32).collect()
}

/// The model of a folder, or `None` for a family that is not supported.
pub fn load(dir: &Path) -> Option<(Checkpoint, Gpt)> {
    load_on(None, dir, Store::F32, None)
}

/// The same on a device, in another type or in few bits.
pub fn load_on(
    device: Option<&Device>,
    dir: &Path,
    store: Store,
    quantizer: Option<Quantizer>,
) -> Option<(Checkpoint, Gpt)> {
    let checkpoint = match Checkpoint::open(dir) {
        Ok(checkpoint) => checkpoint,
        Err(error @ Error::Unsupported { .. }) => {
            println!("not supported yet: {}: {error}", dir.display());
            return None;
        }
        Err(error) => panic!("{}: {error}", dir.display()),
    };
    let mut gpt = Gpt::load_on(device, &checkpoint.config, &checkpoint, store, quantizer, &mut |_| ()).unwrap();
    gpt.prepare(64);
    Some((checkpoint, gpt))
}

pub fn logits(gpt: &Gpt, rows: &[Vec<i32>]) -> Vec<f32> {
    rows.iter().flat_map(|row| gpt.all_logits(&ids(row), &mut gpt.cache()).to_vec()).collect()
}

pub fn deviation(values: &[f32]) -> f32 {
    let mean = values.iter().sum::<f32>() / values.len() as f32;
    (values.iter().map(|v| (v - mean).powi(2)).sum::<f32>() / values.len() as f32).sqrt()
}

pub fn largest_difference(got: &[f32], want: &[f32]) -> f32 {
    assert_eq!(got.len(), want.len());
    got.iter().zip(want).map(|(g, w)| (g - w).abs()).fold(0.0, |m, d| if d.is_nan() { f32::NAN } else { m.max(d) })
}

#[track_caller]
pub fn within(what: &str, value: f32, limit: f32) {
    println!("  {what}: {value:.1e} (limit {limit:.0e})");
    assert!(value <= limit, "{what}: {value:e} is over {limit:e}");
}

pub fn batch(rows: &[Vec<i32>], labels: &[Vec<i32>]) -> Tokens {
    let mut tokens = Tokens::default();
    rows.iter().zip(labels).for_each(|(row, labels)| tokens.push(&ids(row), labels, -100));
    tokens
}

#[test]
fn golden_models() {
    let Some(root) = root() else { return };
    let (mut run, mut unsupported) = (0, 0);
    let all = each(&cases(&root, "models", "golden.safetensors"), |dir| {
        let Some((checkpoint, mut gpt)) = load(dir) else {
            unsupported += 1;
            return;
        };
        let (fixture, golden) = (Fixture::read(&dir.join("golden.safetensors")), json(&dir.join("golden.json")));
        let rows = fixture.rows("input_ids");
        let want = &fixture.get("logits").1;
        within("logits / std", largest_difference(&logits(&gpt, &rows), want) / deviation(want), 1e-4);
        let tokens = batch(&rows, &rows);
        let loss = gpt.loss(&tokens, None) / tokens.n_targets() as f64;
        within("loss, relative", (loss / golden["loss"].as_f64().unwrap() - 1.0).abs() as f32, 1e-5);
        if let Some(generation) = golden.get("generation") {
            check_generation(&gpt, generation);
        }
        // The same settings as transformers 5 writes them mean the same architecture.
        let v5 = dir.join("config_v5.json");
        if v5.is_file() {
            let config = (checkpoint.family.config)(&HfConfig::read(&v5).unwrap()).unwrap();
            assert_eq!(config, checkpoint.config, "{}", v5.display());
        }
        check_prefix(&mut gpt, 1e-5, &[false, true]);
        run += 1;
    });
    println!("golden models: {run} passed, {unsupported} of families that are not supported yet");
    assert!(run > 0, "no case in {}", root.display());
    assert!(all.is_empty(), "cases that failed: {all:?}");
}

/// Runs every case, whatever becomes of the others, and returns those that failed.
pub fn each(cases: &[PathBuf], mut run: impl FnMut(&Path)) -> Vec<String> {
    let mut failed = Vec::new();
    for dir in cases {
        println!("{}", dir.display());
        if std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| run(dir))).is_err() {
            failed.push(dir.display().to_string());
        }
    }
    failed
}

pub fn check_generation(gpt: &Gpt, generation: &Value) {
    let list = |key: &str| -> Vec<u32> {
        let value = &generation[key];
        let value = if value[0].is_array() { &value[0] } else { value };
        value.as_array().unwrap().iter().map(|v| v.as_u64().unwrap() as u32).collect()
    };
    let want = list("generated_ids");
    for prompt_lookup in [0, litgpt::generate::PROMPT_LOOKUP] {
        let request = litgpt::generate::Request {
            prompt: &list("prompt_ids"),
            max_new_tokens: want.len(),
            draw: litgpt::generate::Draw::GREEDY,
            stop_ids: &[],
            stop_texts: &[],
            prompt_lookup,
        };
        let mut got = Vec::new();
        litgpt::generate::tokens(gpt, &mut litgpt::generate::Session::alone(gpt), &request, |token| {
            got.push(token);
            Ok(true)
        })
        .unwrap();
        assert_eq!(got, want, "greedy generation, guessing {prompt_lookup} tokens");
    }
}

#[test]
fn golden_lora() {
    let Some(root) = root() else { return };
    let mut run = 0;
    let all = each(&cases(&root, "lora", "golden.json"), |dir| {
        let golden = json(&dir.join("golden.json"));
        let base = root.join(golden["base_model"].as_str().unwrap());
        let Some((checkpoint, mut gpt)) = load(&base) else { return };
        let fixture = Fixture::read(&dir.join("train.safetensors"));
        let rows = Fixture::read(&base.join("golden.safetensors")).rows("input_ids");
        for (folder, tensor) in [("init", "init_logits"), ("final", "final_logits")] {
            adapter::load(&dir.join(folder), checkpoint.family, &mut gpt).unwrap();
            let want = &fixture.get(tensor).1;
            within(tensor, largest_difference(&logits(&gpt, &rows), want) / deviation(want), 1e-4);
        }
        check_merge(dir, &checkpoint, &gpt, &rows);
        let fused = checkpoint.locate("model.layers.0.self_attn.q_proj.weight")[0].rows.is_some();
        if !fused {
            check_training(dir, &checkpoint, &mut gpt, &fixture, &golden);
        }
        check_saved(dir, &checkpoint, &mut gpt);
        run += 1;
    });
    assert!(run > 0, "no case in {}", root.display());
    assert!(all.is_empty(), "cases that failed: {all:?}");
}

/// The merged folder has PEFT's merged weights, and its logits are the adapted model's.
fn check_merge(dir: &Path, checkpoint: &Checkpoint, gpt: &Gpt, rows: &[Vec<i32>]) {
    let out = tempfile::tempdir().unwrap();
    let merged = out.path().join("merged");
    let staging = Staging::new(&merged).unwrap();
    merge::merge(checkpoint, gpt, &staging, None, &mut |_| ()).unwrap();
    staging.commit().unwrap();
    let (got, want) =
        (Fixture::read(&merged.join("model.safetensors")), Fixture::read(&dir.join("merged.safetensors")));
    for (name, (shape, values)) in &want.0 {
        let Some((got_shape, got)) = got.0.get(name) else {
            assert!(checkpoint.config.tie_embeddings && name.ends_with("lm_head.weight"), "merged lacks {name}");
            continue;
        };
        assert_eq!(got_shape, shape);
        assert!(largest_difference(got, values) <= 1e-6, "merged {name}: {:e}", largest_difference(got, values));
    }
    let (_, merged) = load(&merged).unwrap();
    let want = logits(gpt, rows);
    within("merged against adapted logits", largest_difference(&logits(&merged, rows), &want) / deviation(&want), 1e-4);
}

/// A prefix that is computed once gives the loss and the gradients of whole samples. The model's adapters are replaced.
pub fn check_prefix(gpt: &mut Gpt, tolerance: f32, checkpointing: &[bool]) {
    gpt.attach(|_| Some(LoraConfig { r: 4, alpha: 8.0, rslora: false, dropout: 0.0 }));
    let parameters: Vec<f32> =
        (0..gpt.parameters.cols()).map(|i| ((i * 7919 % 1013) as f32 / 1013.0 - 0.5) * 0.2).collect();
    gpt.set_parameters(&Matrix::from_slice(1, parameters.len(), &parameters));
    // Longer than the windows of the tiny models; what follows takes two passes, one of two samples and one of one.
    let token = |i: usize| (i * 31 % (gpt.config.vocab_size - 1)) as i32 + 1;
    let prefix: Vec<i32> = (0..21).map(token).collect();
    let sample = |own: std::ops::Range<usize>| [prefix.clone(), own.map(|i| token(i + 50)).collect()].concat();
    let rows = [sample(0..9), sample(3..4), sample(5..30)];
    let labels = rows.each_ref().map(|row| [&[-100, -100], &row[2..]].concat());
    let whole = batch(&rows, &labels);
    for checkpointing in checkpointing.iter().copied() {
        let [mut want, mut got] = [(); 2].map(|()| gpt.parameters.zeros_like(1, gpt.parameters.cols()));
        let want_loss = gpt.loss(&whole, Some(Training { grads: &mut want, weight: 0.5, seed: 1, checkpointing }));
        // The last row of the prefix stays with the samples: they go on differently.
        let shared = prefix.len() - 1;
        let mut tokens = Tokens::default();
        tokens.push_part(&ids(&rows[0]), &labels[0], -100, 0..shared);
        let training = Training { grads: &mut got, weight: 0.5 * rows.len() as f32, seed: 1, checkpointing };
        let (mut begun, loss) = gpt.begin(&tokens, Some(training));
        let mut loss = loss.value() * rows.len() as f64;
        for samples in [&[0, 1][..], &[2]] {
            let mut tokens = Tokens { past: shared, ..Tokens::default() };
            for i in samples {
                tokens.push_part(&ids(&rows[*i]), &labels[*i], -100, shared..rows[*i].len());
            }
            let training = Training { grads: &mut got, weight: 0.5, seed: 2, checkpointing };
            loss += gpt.pass(&tokens, Some(&mut begun), Some(training)).value();
        }
        gpt.finish(begun, &mut got);
        within("loss after a prefix, relative", (loss / want_loss - 1.0).abs() as f32, tolerance);
        let (got, want) = (got.to_host(), want.to_host());
        let error = tensors(gpt).into_iter().map(|(_, range)| {
            let scale = want[range.clone()].iter().fold(1e-6f32, |m, v| m.max(v.abs()));
            largest_difference(&got[range.clone()], &want[range]) / scale
        });
        within("gradients after a prefix", error.fold(0.0, f32::max), 10.0 * tolerance);
    }
}

/// Ten steps of AdamW give PEFT's losses, first gradients and final adapter.
pub fn check_training(dir: &Path, checkpoint: &Checkpoint, gpt: &mut Gpt, fixture: &Fixture, golden: &Value) {
    adapter::load(&dir.join("final"), checkpoint.family, gpt).unwrap();
    let want = gpt.parameters.to_host();
    adapter::load(&dir.join("init"), checkpoint.family, gpt).unwrap();
    let init = gpt.parameters.to_host();
    let number = |key: &str| golden["optimizer"][key].as_f64().unwrap();
    let beta = |i: usize| golden["optimizer"]["betas"][i].as_f64().unwrap();
    let adamw = AdamW { beta1: beta(0), beta2: beta(1), eps: number("eps"), weight_decay: number("weight_decay") };
    let (rows, labels) = (fixture.rows("input_ids"), fixture.rows("labels"));
    let accumulate = golden["gradient_accumulation"].as_u64().unwrap() as usize;
    let micro = golden["micro_batch"][0].as_u64().unwrap() as usize;
    let losses = &fixture.get("losses").1;
    let mut moments = Moments::new(&gpt.parameters);
    for (step, window) in losses.chunks_exact(accumulate).enumerate() {
        let mut grads = gpt.parameters.zeros_like(1, init.cols());
        let mut targets = 0;
        for (i, loss) in window.iter().enumerate() {
            let at = (step * accumulate + i) * micro;
            let tokens = batch(&rows[at..at + micro], &labels[at..at + micro]);
            targets += tokens.n_targets();
            // Checkpointing must change nothing: every second step runs with it.
            let training = Training { grads: &mut grads, weight: 1.0, seed: 0, checkpointing: step % 2 == 1 };
            let got = gpt.loss(&tokens, Some(training)) / tokens.n_targets() as f64;
            assert!((got / f64::from(*loss) - 1.0).abs() < 1e-5, "step {step}: loss {got}, want {loss}");
        }
        // The fixture's gradient is that of the mean over all targets of the step, as ours is.
        let scale = 1.0 / targets as f32;
        if step == 0 {
            let means: Vec<f32> = grads.to_host().iter().map(|g| g * scale).collect();
            check_gradients(checkpoint, gpt, &means, fixture);
        }
        adamw.step(&mut gpt.parameters, &grads, scale, &mut moments, number("lr"));
    }
    let got = gpt.parameters.to_host();
    for (name, range) in tensors(gpt) {
        let change = |i: usize| want[i] - init[i];
        let error = |i: usize| got[i] - want[i];
        let rms =
            |f: &dyn Fn(usize) -> f32| (range.clone().map(|i| f(i).powi(2)).sum::<f32>() / range.len() as f32).sqrt();
        let most = |f: &dyn Fn(usize) -> f32| range.clone().map(|i| f(i).abs()).fold(0.0, f32::max);
        assert!(rms(&error) <= 1e-4 * rms(&change), "{name}: rms {:e} of {:e}", rms(&error), rms(&change));
        assert!(most(&error) <= 3e-4 * most(&change), "{name}: largest {:e} of {:e}", most(&error), most(&change));
    }
}

/// Every adapter matrix of the model: its PEFT name and its elements.
fn tensors(gpt: &Gpt) -> Vec<(String, std::ops::Range<usize>)> {
    let parts = gpt.linears().flat_map(|l| &l.parts);
    let named = parts.filter_map(|p| Some((format!("base_model.model.{}", p.name), p.lora.clone()?)));
    named.flat_map(|(n, l)| [(format!("{n}.lora_A.weight"), l.a), (format!("{n}.lora_B.weight"), l.b)]).collect()
}

fn check_gradients(checkpoint: &Checkpoint, gpt: &Gpt, grads: &[f32], fixture: &Fixture) {
    let mut worst = 0.0f32;
    for (name, range) in tensors(gpt) {
        let module = name.trim_start_matches("base_model.model.").split(".lora_").next().unwrap().to_owned();
        let file = checkpoint.locate(&format!("{module}.weight"))[0].tensor.trim_end_matches(".weight").to_owned();
        let want = &fixture.get(&format!("grad.{}", name.replace(&module, &file))).1;
        let scale = want.iter().fold(0.0f32, |m, v| m.max(v.abs()));
        let error = largest_difference(&grads[range], want) / scale;
        worst = worst.max(error);
    }
    within("first gradients", worst, 1e-4);
}

/// What is saved loads to the same numbers.
fn check_saved(dir: &Path, checkpoint: &Checkpoint, gpt: &mut Gpt) {
    adapter::load(&dir.join("final"), checkpoint.family, gpt).unwrap();
    let rows = vec![vec![5, 4, 3, 2, 1, 0, 7, 9]];
    let want = logits(gpt, &rows);
    let out = tempfile::tempdir().unwrap();
    let saved = out.path().join("saved");
    let staging = Staging::new(&saved).unwrap();
    adapter::save(&staging, checkpoint.family, gpt, "base").unwrap();
    staging.commit().unwrap();
    adapter::load(&saved, checkpoint.family, gpt).unwrap();
    within("saved and loaded again", largest_difference(&logits(gpt, &rows), &want) / deviation(&want), 1e-5);
}
