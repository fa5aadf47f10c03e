//! The main job through the binary: finetune the quickstart's model, use the adapter, merge it.
//!
//! Runs are a few steps on `data/tiny`; what is asserted holds for any seed. Bad input is in `cli.rs`.
#![allow(clippy::unwrap_used)]

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use litgpt::checkpoint::write::TensorInfo;
use litgpt::checkpoint::{Checkpoint, Dtype as Kept, pickle};
use litgpt::model::Gpt;
use litgpt::ops::weight::{Store, Weight};
use safetensors::Dtype;
use serde_json::{Value, json};

use crate::util::{
    Stored, column, content, copy_tiny, dataset, finetune, floats, greedy, litgpt, metrics, names, root, tensors, tiny,
    write_tensors,
};

/// What README.md says an adapter folder holds.
const ADAPTER_FILES: [&str; 12] = [
    "adapter_config.json",
    "adapter_model.safetensors",
    "config.json",
    "generation_config.json",
    "hyperparameters.yaml",
    "litgpt.json",
    "manifest.json",
    "prompt_style.yaml",
    "tokenizer.json",
    "tokenizer_config.json",
    "training_state.json",
    "training_state.safetensors",
];
const COLUMNS: [&str; 14] = [
    "epoch",
    "grad_norm",
    "iter",
    "iter_time",
    "learning_rate",
    "loss",
    "memory",
    "skipped",
    "step",
    "tokens",
    "tokens_per_s",
    "total_tokens",
    "val_loss",
    "val_ppl",
];
const PROMPTS: [&str; 3] = ["Describe a fox.", "What does a driver do?", "Where does a monkey live?"];

fn adapter_bytes(cwd: &Path, out: &str) -> Vec<u8> {
    fs::read(cwd.join(out).join("final/adapter_model.safetensors")).unwrap()
}

fn adapter(cwd: &Path, out: &str) -> BTreeMap<String, Stored> {
    tensors(&cwd.join(out).join("final/adapter_model.safetensors"))
}

/// ‖a - b‖ / ‖a‖ over all B matrices, which begin at 0 and so hold nothing but what was learned.
fn learned_difference(a: &BTreeMap<String, Stored>, b: &BTreeMap<String, Stored>) -> f64 {
    assert!(a.keys().eq(b.keys()));
    let (mut difference, mut norm) = (0.0, 0.0);
    for (name, stored) in a.iter().filter(|(name, _)| name.contains("lora_B")) {
        for (a, b) in floats(stored).into_iter().zip(floats(&b[name])) {
            difference += f64::from(a - b).powi(2);
            norm += f64::from(a).powi(2);
        }
    }
    assert!(norm > 0.0, "nothing was learned");
    (difference / norm).sqrt()
}

/// `n` rows of the quickstart's dataset, from `skip` on.
fn rows(skip: usize, n: usize) -> Vec<Value> {
    let all: Vec<Value> = serde_json::from_str(&fs::read_to_string(dataset()).unwrap()).unwrap();
    all.into_iter().skip(skip).take(n).collect()
}

fn write_json(path: &Path, rows: &[Value]) {
    fs::write(path, Value::from(rows.to_vec()).to_string()).unwrap();
}

fn write_lines(path: &Path, rows: &[Value]) {
    fs::write(path, rows.iter().map(|row| format!("{row}\n")).collect::<String>()).unwrap();
}

/// "at most 1.2e-3 apart, of up to 9.8; the same token is the likeliest at 25 of 25 places"
#[test]
fn merging_says_how_far_the_answers_moved() {
    let dir = tempfile::tempdir().unwrap();
    finetune(dir.path(), &tiny(), "--lr 1e-2").ok();
    let apart = |more: &str| {
        let args = format!("merge_lora out/final --out_dir merged{} {more}", more.replace([' ', '-'], ""));
        let ran = litgpt(dir.path(), args.split_whitespace()).ok();
        let line = ran.stderr.lines().find(|line| line.contains("logits of a fixed text")).unwrap().to_owned();
        let number = |before: &str| -> f32 {
            let rest = line.split_once(before).unwrap().1.trim_start();
            rest.split([' ', ';']).next().unwrap().parse().unwrap()
        };
        number("at most") / number("of up to")
    };
    let exact = apart("--precision 32-true");
    let [half, four] = ["--precision bf16-true", "--format gguf --gguf_type q4_0"].map(apart);
    assert!(exact < 1e-4 && exact < half && half < 0.05 && half < four, "{exact} {half} {four}");
}

/// PEFT wrote adapters with `torch.save` before it had safetensors.
#[test]
fn an_adapter_of_torch_save_is_read() {
    let dir = tempfile::tempdir().unwrap();
    finetune(dir.path(), &tiny(), "").ok();
    let prompt = "Describe a fox.";
    let want = greedy(dir.path(), "out/final", prompt);
    let file = dir.path().join("out/final/adapter_model.safetensors");
    let stored: Vec<_> = tensors(&file).into_iter().collect();
    let info = |(name, (_, shape, _)): &(String, Stored)| TensorInfo {
        name: name.clone(),
        dtype: Kept::F32,
        shape: shape.clone(),
    };
    let infos: Vec<TensorInfo> = stored.iter().map(info).collect();
    let old = dir.path().join("old");
    fs::create_dir(&old).unwrap();
    for name in ["adapter_config.json", "litgpt.json", "prompt_style.yaml"] {
        fs::copy(dir.path().join("out/final").join(name), old.join(name)).unwrap();
    }
    pickle::save(&old.join("adapter_model.bin"), &infos, &[], |index| Ok(stored[index].1.2.clone())).unwrap();
    assert_ne!(want, greedy(dir.path(), tiny().to_str().unwrap(), prompt), "the adapter does something");
    assert_eq!(greedy(dir.path(), "old", prompt), want);
}

#[test]
fn final_has_the_documented_files_and_the_loss_falls() {
    let dir = tempfile::tempdir().unwrap();
    let base = content(&tiny());
    let ran = finetune(dir.path(), &tiny(), "--train.max_steps 12 --eval.interval 6").ok();
    assert_eq!(ran.stdout, "", "progress is no result");
    assert_eq!(content(&tiny()), base, "the base model changed");
    let out = dir.path().join("out");
    assert_eq!(names(&out), [".lock", "best", "final", "latest", "metrics.csv", "report.html"]);
    assert_eq!(names(&out.join("final")), ADAPTER_FILES);

    assert!(metrics(&out).iter().all(|row| row.keys().eq(&COLUMNS)));
    assert_eq!(column(&out, "total_tokens").last(), Some(&column(&out, "tokens").iter().sum::<f64>()));
    assert!(column(&out, "learning_rate").iter().all(|rate| *rate > 0.0), "a step at learning rate 0");
    let steps: Vec<f64> =
        metrics(&out).iter().filter(|r| !r["loss"].is_empty()).map(|r| r["step"].parse().unwrap()).collect();
    assert_eq!(steps, (1..=12).map(f64::from).collect::<Vec<_>>());
    let losses = column(&out, "loss");
    let mean = |part: &[f64]| part.iter().sum::<f64>() / part.len() as f64;
    assert!(mean(&losses[9..]) < 0.8 * mean(&losses[..3]), "{losses:?}");
    let val = column(&out, "val_loss");
    assert!(val.len() == 2 && val[1] < val[0], "{val:?}");
}

#[test]
fn the_adapter_is_pefts() {
    let dir = tempfile::tempdir().unwrap();
    finetune(dir.path(), &tiny(), "--lora_r 4 --lora_alpha 24 --lora_mlp false --train.max_steps 1").ok();
    let text = fs::read_to_string(dir.path().join("out/final/adapter_config.json")).unwrap();
    let config: Value = serde_json::from_str(&text).unwrap();
    assert_eq!(config["peft_type"], "LORA");
    assert_eq!(config["task_type"], "CAUSAL_LM");
    assert_eq!((&config["r"], config["lora_alpha"].as_f64()), (&json!(4), Some(24.0)));
    assert_eq!(config["target_modules"], json!(["k_proj", "o_proj", "q_proj", "v_proj"]));
    let tensors = adapter(dir.path(), "out");
    assert_eq!(tensors.len(), 4 * 4 * 2, "layers x modules x (A, B)");
    let shape = |module: &str| {
        let (dtype, shape, _) = &tensors[&format!("base_model.model.model.layers.3.self_attn.{module}.weight")];
        assert_eq!(*dtype, Dtype::F32);
        shape.clone()
    };
    assert_eq!((shape("k_proj.lora_A"), shape("k_proj.lora_B")), (vec![4, 192], vec![64, 4]));
    assert_eq!((shape("q_proj.lora_A"), shape("q_proj.lora_B")), (vec![4, 192], vec![192, 4]));
}

#[test]
fn the_seed_decides_every_byte() {
    let dir = tempfile::tempdir().unwrap();
    for (out, seed) in [("a", 1), ("b", 1), ("c", 2)] {
        finetune(dir.path(), &tiny(), &format!("--seed {seed} --lora_dropout 0.1 --out_dir {out}")).ok();
    }
    assert_eq!(adapter_bytes(dir.path(), "a"), adapter_bytes(dir.path(), "b"));
    assert_ne!(adapter_bytes(dir.path(), "a"), adapter_bytes(dir.path(), "c"));
}

#[test]
fn the_recorded_settings_repeat_the_run() {
    let dir = tempfile::tempdir().unwrap();
    finetune(dir.path(), &tiny(), "--add_bos off --data.prompt_style default --train.max_norm 0.5 --out_dir a").ok();
    litgpt(dir.path(), ["finetune", "lora", "--config", "a/final/hyperparameters.yaml", "--out_dir", "b"]).ok();
    assert_eq!(adapter_bytes(dir.path(), "a"), adapter_bytes(dir.path(), "b"));
}

#[test]
fn the_loss_does_not_depend_on_the_micro_batch() {
    let dir = tempfile::tempdir().unwrap();
    // A large eps keeps Adam from blowing rounding noise of near-zero gradients up to whole steps.
    let same = "--lora_dropout 0 --optimizer.eps 0.01";
    for micro in [1, 2, 4] {
        finetune(dir.path(), &tiny(), &format!("{same} --train.micro_batch_size {micro} --out_dir {micro}")).ok();
    }
    let losses = |micro: &str| column(&dir.path().join(micro), "loss");
    for micro in ["2", "4"] {
        for (a, b) in losses("1").iter().zip(losses(micro)) {
            assert!((a - b).abs() < 1e-4, "micro batch {micro}: {a} and {b}");
        }
        let difference = learned_difference(&adapter(dir.path(), "1"), &adapter(dir.path(), micro));
        assert!(difference < 1e-3, "micro batch {micro}: adapters differ by {difference}");
    }
}

#[test]
fn packing_changes_no_loss_and_no_gradient() {
    let dir = tempfile::tempdir().unwrap();
    write_json(&dir.path().join("d.json"), &rows(0, 10));
    // 8 samples of under 64 tokens are one pack of 512: one window of 8 micro batches against one of 1.
    let same = "--data.json_path d.json --data.val_split_fraction 0.2 --train.max_steps 1 --lora_dropout 0 --optimizer.eps 0.01 --lora_mlp true \
                --train.lr_warmup_steps 0 --train.max_seq_length 512 --train.micro_batch_size 1";
    finetune(dir.path(), &tiny(), &format!("{same} --train.global_batch_size 8 --out_dir a")).ok();
    let packed =
        finetune(dir.path(), &tiny(), &format!("{same} --train.global_batch_size 1 --data.pack true --out_dir b"));
    packed.ok();
    let (a, b) = (dir.path().join("a"), dir.path().join("b"));
    for name in ["loss", "grad_norm", "tokens"] {
        let (a, b) = (column(&a, name)[0], column(&b, name)[0]);
        assert!((a - b).abs() <= 2e-6 * a, "{name}: {a} and {b}");
    }
    let difference = learned_difference(&adapter(dir.path(), "a"), &adapter(dir.path(), "b"));
    assert!(difference < 1e-3, "{difference}");
}

#[test]
fn activation_checkpointing_changes_no_number() {
    let dir = tempfile::tempdir().unwrap();
    for how in ["on", "off"] {
        finetune(dir.path(), &tiny(), &format!("--train.activation_checkpointing {how} --out_dir {how}")).ok();
    }
    let losses = |out: &str| column(&dir.path().join(out), "loss");
    assert_eq!(losses("on"), losses("off"));
    assert!(learned_difference(&adapter(dir.path(), "on"), &adapter(dir.path(), "off")) < 1e-6);
}

/// The quickstart's model with f32 weights, so that merging rounds nothing that could change an answer.
fn tiny_f32(to: &Path) {
    copy_tiny(to);
    let widen =
        |stored: Stored| (Dtype::F32, stored.1.clone(), floats(&stored).iter().flat_map(|v| v.to_le_bytes()).collect());
    let wide = tensors(&tiny().join("model.safetensors")).into_iter().map(|(name, stored)| (name, widen(stored)));
    write_tensors(&to.join("model.safetensors"), &wide.collect());
}

#[test]
fn merged_and_unmerged_give_the_same_text() {
    let dir = tempfile::tempdir().unwrap();
    // The base is in bf16, the run in 32 bit: merged into bf16 the update would be rounded.
    finetune(dir.path(), &tiny(), "--train.max_steps 12").ok();
    let ran = litgpt(dir.path(), ["merge_lora", "--checkpoint_dir", "out/final"]).ok();
    assert_eq!(ran.stdout, "");
    for prompt in PROMPTS {
        let unmerged = greedy(dir.path(), "out/final", prompt);
        assert_eq!(unmerged, greedy(dir.path(), "out/final/merged", prompt), "{prompt}");
    }
    assert_ne!(greedy(dir.path(), "out/final", PROMPTS[0]), greedy(dir.path(), tiny().to_str().unwrap(), PROMPTS[0]));
}

#[test]
fn quantized_weights_learn_and_merge_to_what_was_trained() {
    for quantize in ["nf4", "bnb.fp4-dq", "int8"] {
        let dir = tempfile::tempdir().unwrap();
        let base = dir.path().join("base");
        tiny_f32(&base);
        let train = |more: &str| {
            finetune(dir.path(), &base, &format!("--train.max_steps 12 --eval.interval 6 {more}")).ok();
            column(&dir.path().join("out"), "val_loss")
        };
        let val = train(&format!("--quantize {quantize} --out_dir out"));
        assert!(val.len() == 2 && val[1] < val[0], "{quantize}: {val:?}");
        litgpt(dir.path(), ["merge_lora", "out/final"]).ok();
        for prompt in PROMPTS {
            let unmerged = greedy(dir.path(), "out/final", prompt);
            assert_eq!(unmerged, greedy(dir.path(), "out/final/merged", prompt), "{quantize}: {prompt}");
        }
        // What is quantized is all that changed.
        let (old, new) =
            (tensors(&base.join("model.safetensors")), dir.path().join("out/final/merged/model.safetensors"));
        let new = tensors(&new);
        for (name, stored) in &new {
            let kept = name.contains("embed") || name.contains("norm");
            assert_eq!(*stored == old[name], kept, "{quantize}: {name}");
        }
    }
}

#[test]
fn an_adapter_remembers_how_its_base_was_quantized() {
    let dir = tempfile::tempdir().unwrap();
    finetune(dir.path(), &tiny(), "--quantize bnb.nf4-dq --train.max_steps 1 --lora_mlp false").ok();
    let manifest: Value =
        serde_json::from_str(&fs::read_to_string(dir.path().join("out/final/litgpt.json")).unwrap()).unwrap();
    assert_eq!(manifest["quantize"], "nf4-dq");
    // Weights without an adapter are decoded as well, in the base's dtype.
    litgpt(dir.path(), ["merge_lora", "out/final"]).ok();
    let merged = tensors(&dir.path().join("out/final/merged/model.safetensors"));
    let (old, name) = (tensors(&tiny().join("model.safetensors")), "model.layers.0.mlp.down_proj.weight");
    assert_eq!(merged[name].0, Dtype::BF16);
    let (was, is) = (floats(&old[name]), floats(&merged[name]));
    let norm = |values: &mut dyn Iterator<Item = f32>| values.map(|v| f64::from(v).powi(2)).sum::<f64>().sqrt();
    let error = norm(&mut was.iter().zip(&is).map(|(a, b)| a - b)) / norm(&mut was.iter().copied());
    assert!(error > 0.02 && error < 0.15, "{error}");
}

/// `W + (alpha / r) B A`, computed here from the files, element by element.
#[test]
fn merging_adds_the_update_and_nothing_else() {
    let dir = tempfile::tempdir().unwrap();
    finetune(dir.path(), &tiny(), "--precision bf16-true --lora_r 4 --lora_alpha 12 --lora_key false").ok();
    litgpt(dir.path(), ["merge_lora", "out/final", "--out_dir", "merged"]).ok();
    let (lora, base) = (adapter(dir.path(), "out"), tensors(&tiny().join("model.safetensors")));
    let merged = tensors(&dir.path().join("merged/model.safetensors"));
    assert!(base.keys().eq(merged.keys()));
    for (name, weight) in &base {
        let module = format!("base_model.model.{}", name.trim_end_matches(".weight"));
        let Some(a) = lora.get(&format!("{module}.lora_A.weight")) else {
            assert!(merged[name] == *weight, "{name} has no adapter and changed");
            continue;
        };
        let (columns, a, b) = (weight.1[1], floats(a), floats(&lora[&format!("{module}.lora_B.weight")]));
        assert!(b.iter().any(|v| *v != 0.0), "{name}: nothing was learned");
        assert_eq!(merged[name].0, Dtype::BF16);
        for (i, (got, w)) in floats(&merged[name]).into_iter().zip(floats(weight)).enumerate() {
            let (row, column) = (i / columns, i % columns);
            let want = w + 3.0 * (0..4).map(|k| b[row * 4 + k] * a[k * columns + column]).sum::<f32>();
            assert!((got - want).abs() <= want.abs() / 256.0 + 1e-6, "{name}[{row}, {column}]: {got}, expected {want}");
        }
    }
}

#[test]
fn merging_what_is_no_adapter_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    finetune(dir.path(), &tiny(), "").ok();
    litgpt(dir.path(), ["merge_lora", "out/final"]).ok();
    let merged = content(&dir.path().join("out/final/merged"));
    litgpt(dir.path(), ["merge_lora", "out/final/merged"]).refused(1, &["nothing to merge"]);
    litgpt(dir.path(), ["merge_lora", tiny().to_str().unwrap()]).refused(1, &["nothing to merge"]);
    assert_eq!(content(&dir.path().join("out/final/merged")), merged);
}

#[test]
fn merging_into_another_base_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let base = dir.path().join("base");
    copy_tiny(&base);
    finetune(dir.path(), &base, "").ok();
    let weights = base.join("model.safetensors");
    let mut bytes = fs::read(&weights).unwrap();
    *bytes.last_mut().unwrap() ^= 1;
    fs::write(&weights, bytes).unwrap();
    litgpt(dir.path(), ["merge_lora", "out/final"]).refused(1, &["not what the adapter was trained on", "changed"]);
    assert_eq!(names(&dir.path().join("out/final")), ADAPTER_FILES);
    // The right one under another name is fine: its content counts.
    let right = tiny();
    litgpt(dir.path(), ["merge_lora", "out/final", "--pretrained_checkpoint_dir", right.to_str().unwrap()]).ok();
}

#[test]
fn a_lost_base_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let base = dir.path().join("base");
    copy_tiny(&base);
    finetune(dir.path(), &base, "--train.max_steps 1").ok();
    fs::remove_dir_all(&base).unwrap();
    for command in ["generate", "merge_lora"] {
        let ran = litgpt(dir.path(), [command, "out/final"]).refused(1, &["base model", "base"]);
        // The hint names no flag that the command lacks.
        let flag = "--pretrained_checkpoint_dir";
        let help = litgpt(dir.path(), [command, "--help"]).ok().stdout;
        assert!(!ran.stderr.contains(flag) || help.contains(flag), "{}", ran.stderr);
    }
}

#[test]
fn saved_steps_are_adapters() {
    let dir = tempfile::tempdir().unwrap();
    finetune(dir.path(), &tiny(), "--train.save_interval 2 --train.max_steps 5").ok();
    let out = dir.path().join("out");
    assert_eq!(
        names(&out),
        [".lock", "best", "final", "latest", "metrics.csv", "report.html", "step-000002", "step-000004"]
    );
    for step in ["step-000002", "step-000004"] {
        assert_eq!(names(&out.join(step)), ADAPTER_FILES);
        assert!(!greedy(dir.path(), &format!("out/{step}"), "Describe a fox.").trim().is_empty());
    }
    let bytes = |name: &str| fs::read(out.join(name).join("adapter_model.safetensors")).unwrap();
    assert!(bytes("step-000002") != bytes("step-000004") && bytes("step-000004") != bytes("final"));
}

#[test]
fn masked_prompts_do_not_count() {
    let dir = tempfile::tempdir().unwrap();
    finetune(dir.path(), &tiny(), "--train.max_steps 1 --out_dir all").ok();
    finetune(dir.path(), &tiny(), "--train.max_steps 1 --data.mask_prompt true --out_dir masked").ok();
    let of = |out: &str, name: &str| column(&dir.path().join(out), name);
    assert_eq!(of("all", "tokens"), of("masked", "tokens"));
    assert!((of("all", "loss")[0] - of("masked", "loss")[0]).abs() > 0.05);
    let text = fs::read_to_string(dir.path().join("masked/final/hyperparameters.yaml")).unwrap();
    assert!(text.contains("mask_prompt: true"), "{text}");
}

#[test]
fn json_lines_and_folders_are_read() {
    let dir = tempfile::tempdir().unwrap();
    let (path, all) = (dir.path(), rows(0, 20));
    write_json(&path.join("d.json"), &all);
    write_lines(&path.join("d.jsonl"), &all);
    fs::create_dir(path.join("d")).unwrap();
    write_json(&path.join("d/train.json"), &all[..16]);
    write_lines(&path.join("d/val.jsonl"), &all[16..]);
    let same = "--train.max_steps 2 --train.lr_warmup_steps 0";
    for (out, data) in [("list", "d.json"), ("lines", "d.jsonl")] {
        let more = format!("{same} --data.json_path {data} --data.val_split_fraction 0.2 --out_dir {out}");
        finetune(path, &tiny(), &more).ok();
    }
    assert_eq!(adapter_bytes(path, "list"), adapter_bytes(path, "lines"));
    let ran = finetune(path, &tiny(), &format!("{same} --data.json_path d --out_dir folder")).ok();
    assert!(ran.stderr.contains("16 samples") && ran.stderr.contains("4 samples"), "{}", ran.stderr);
    // The file alone says that it is JSON.
    let more = format!("{same} --data d.jsonl --data.json_path d.jsonl --data.val_split_fraction 0.2 --out_dir short");
    finetune(path, &tiny(), &more).ok();
    assert_eq!(adapter_bytes(path, "lines"), adapter_bytes(path, "short"));
}

#[test]
fn max_norm_clips() {
    let dir = tempfile::tempdir().unwrap();
    for (out, more) in [("none", ""), ("loose", "--train.max_norm 1000"), ("tight", "--train.max_norm 1e-6")] {
        finetune(dir.path(), &tiny(), &format!("{more} --out_dir {out}")).ok();
    }
    let norms = column(&dir.path().join("none"), "grad_norm");
    assert!(norms.iter().all(|norm| *norm > 1e-3 && *norm < 1000.0), "{norms:?}");
    assert_eq!(adapter_bytes(dir.path(), "none"), adapter_bytes(dir.path(), "loose"));
    assert_ne!(adapter_bytes(dir.path(), "none"), adapter_bytes(dir.path(), "tight"));
    // The metric is the norm before clipping.
    let tight = column(&dir.path().join("tight"), "grad_norm");
    assert!((tight[0] - norms[0]).abs() < 1e-6 * norms[0], "{tight:?}");
}

/// A folder dataset of `n` training rows and 2 validation rows, as `data` in `dir`.
fn folder_data(dir: &Path, n: usize) {
    fs::create_dir(dir.join("data")).unwrap();
    write_json(&dir.join("data/train.json"), &rows(0, n));
    write_json(&dir.join("data/val.json"), &rows(n, 2));
}

#[test]
fn epochs_pass_over_the_data() {
    let dir = tempfile::tempdir().unwrap();
    folder_data(dir.path(), 8);
    let more = "--data.json_path data --train.max_steps null --train.epochs 2 --train.global_batch_size 4";
    finetune(dir.path(), &tiny(), more).ok();
    let out = dir.path().join("out");
    assert_eq!(column(&out, "epoch"), [1.0, 1.0, 2.0, 2.0]);
    let tokens = column(&out, "tokens");
    assert_eq!(tokens[0] + tokens[1], tokens[2] + tokens[3], "every epoch has the same samples");
}

#[test]
fn the_last_partial_window_is_stepped() {
    let dir = tempfile::tempdir().unwrap();
    folder_data(dir.path(), 7);
    let more = "--data.json_path data --train.max_steps null --train.epochs 1 --train.micro_batch_size 1";
    finetune(dir.path(), &tiny(), &format!("{more} --train.global_batch_size 4 --out_dir two")).ok();
    assert_eq!(column(&dir.path().join("two"), "iter")[..2], [4.0, 7.0]);
    // Fewer rows than a step asks for, where LitGPT takes no step at all.
    finetune(dir.path(), &tiny(), &format!("{more} --train.global_batch_size 16 --out_dir one")).ok();
    assert_eq!(column(&dir.path().join("one"), "loss").len(), 1);
    let learned = |out: &str| {
        adapter(dir.path(), out).iter().any(|(name, b)| name.contains("lora_B") && floats(b).iter().any(|v| *v != 0.0))
    };
    assert!(learned("two") && learned("one"));
}

/// A bf16 checkpoint is kept in 16 bits for a run in f32, where the processor widens them as fast: its results are those of
/// the same elements in f32.
#[test]
fn bf16_weights_train_in_f32_as_if_they_were_f32() {
    let dir = tempfile::tempdir().unwrap();
    let wide = dir.path().join("wide");
    tiny_f32(&wide);
    let bytes = |dir: &Path| {
        let checkpoint = Checkpoint::open(dir).unwrap();
        let gpt = Gpt::load(&checkpoint.config, &checkpoint, Store::F32, None, &mut |_| ()).unwrap();
        gpt.linears().map(|linear| linear.weight().bytes()).sum::<usize>()
    };
    assert_eq!(bytes(&wide), bytes(&tiny()) * if Weight::widens() { 2 } else { 1 });
    finetune(dir.path(), &tiny(), "--precision 32-true --out_dir narrow").ok();
    finetune(dir.path(), &wide, "--precision 32-true --out_dir wide-run").ok();
    let [narrow, wide] = ["narrow", "wide-run"].map(|out| column(&dir.path().join(out), "loss"));
    assert!(narrow.iter().zip(&wide).all(|(a, b)| (a - b).abs() < 1e-4), "{narrow:?} {wide:?}");
    // AMX adds in another order.
    #[cfg(target_arch = "x86_64")]
    if litgpt::ops::simd::level() == Some(litgpt::ops::simd::Level::Amx) {
        println!("skipped: the same bits, as this processor has AMX");
        return;
    }
    assert_eq!(narrow, wide);
    let [narrow, wide] = ["narrow", "wide-run"].map(|out| adapter(dir.path(), out));
    assert_eq!(narrow, wide);
}

#[test]
fn half_precision_runs() {
    let dir = tempfile::tempdir().unwrap();
    for precision in ["32-true", "bf16-true", "16-true"] {
        finetune(dir.path(), &tiny(), &format!("--lora_dropout 0 --precision {precision} --out_dir {precision}")).ok();
        let args = ["generate", &format!("{precision}/final"), "--precision", precision, "--max_new_tokens", "4"];
        litgpt(dir.path(), args).ok();
    }
    let losses = |out: &str| column(&dir.path().join(out), "loss");
    for precision in ["bf16-true", "16-true"] {
        for (half, full) in losses(precision).iter().zip(losses("32-true")) {
            assert!((half - full).abs() < 0.05, "{precision}: {half}, in f32 {full}");
        }
        assert!(adapter(dir.path(), precision).values().all(|(dtype, ..)| *dtype == Dtype::F32));
    }
}

#[test]
fn a_diverging_run_fails_and_leaves_no_final() {
    let dir = tempfile::tempdir().unwrap();
    // After one step only the validation loss can tell.
    for steps in [4, 1] {
        let more = format!("--lr 1e30 --train.lr_warmup_steps 0 --train.max_steps {steps}");
        finetune(dir.path(), &tiny(), &more).refused(1, &["loss is", "--lr"]);
        assert!(!dir.path().join("out/final").exists());
    }
}

/// The first command of README.md, cut to a few steps.
#[test]
fn the_quickstart_runs() {
    let readme = fs::read_to_string(root().join("README.md")).unwrap();
    let line = readme.lines().find(|line| line.contains("finetune lora")).unwrap();
    let (train, ask) = line.split_once(" && ").unwrap();
    let words = |command: &str| -> Vec<String> {
        let command = command.strip_prefix("cargo run --release -- ").unwrap();
        let (plain, quoted) = command.split_once('"').unwrap_or((command, ""));
        let quoted = quoted.trim_end_matches('"').to_owned();
        plain.split_whitespace().map(str::to_owned).chain((!quoted.is_empty()).then_some(quoted)).collect()
    };
    let dir = tempfile::tempdir().unwrap();
    copy_tiny(&dir.path().join("data/tiny"));
    fs::copy(dataset(), dir.path().join("data/instructions_tiny.json")).unwrap();
    let short = ["--train.max_steps", "4", "--train.micro_batch_size", "4"].map(str::to_owned);
    litgpt(dir.path(), words(train).into_iter().chain(short)).ok();
    assert!(!litgpt(dir.path(), words(ask)).ok().stdout.trim().is_empty());
}

#[test]
fn a_run_needs_no_validation_rows() {
    let dir = tempfile::tempdir().unwrap();
    let rows: Vec<Value> = (0..10).map(|i| json!({"instruction": format!("Say {i}."), "output": "Yes."})).collect();
    fs::write(dir.path().join("rows.json"), json!(rows).to_string()).unwrap();
    let run = |flags: &str| finetune(dir.path(), &tiny(), &format!("--data.json_path rows.json {flags}"));
    let few = run("--eval.interval 1 --eval.initial_validation true").ok().stderr;
    assert!(few.contains("warning: 10 rows are too few to hold one out"), "{few}");
    assert!(few.contains("--data.val_split_fraction 0.1 would") && !few.contains("val loss"), "{few}");
    let none = run("--data.val_split_fraction 0").ok().stderr;
    assert!(none.contains("no row is held out, so nothing is validated") && !none.contains("warning"), "{none}");
    assert!(run("--data.val_split_fraction 0.1").ok().stderr.contains("val loss"));
    run("--eval.early_stopping_patience 2").refused(1, &["no validation rows", "val_split_fraction"]);
}

/// Rows count as they were read, not as the masked ones leave them.
#[test]
fn masked_rows_are_not_said_to_be_too_few() {
    let dir = tempfile::tempdir().unwrap();
    let row = |i: usize, long: bool| json!({"instruction": format!("Say {i}.{}", " fox".repeat(60 * usize::from(long))), "output": "Yes."});
    let write = |name: &str, rows: Vec<Value>| fs::write(dir.path().join(name), json!(rows).to_string()).unwrap();
    write("rows.json", (0..10).map(|i| row(i, i < 6)).collect());
    fs::create_dir(dir.path().join("apart")).unwrap();
    write("apart/train.json", (0..4).map(|i| row(i, false)).collect());
    write("apart/val.json", (0..3).map(|i| row(i, true)).collect());
    let masked = "--data.mask_prompt true --train.max_seq_length 80 --dry_run true --data.json_path";
    let run = |more: &str| finetune(dir.path(), &tiny(), &format!("{masked} {more}"));
    let few = run("rows.json").ok().stderr;
    assert!(few.contains("6 of 10 samples left out") && few.contains("warning: 10 rows are too few"), "{few}");
    assert!(few.contains("--data.val_split_fraction 0.1 would"), "{few}");
    let apart = run("apart").ok().stderr;
    assert!(apart.contains("all labels of the 3 validation samples are masked, so nothing"), "{apart}");
    let stopping = run("apart --eval.early_stopping_patience 2");
    assert!(!stopping.stderr.contains("val_split_fraction"), "{stopping:?}");
    stopping.refused(1, &["all labels of the 3 validation samples", "--data.mask_prompt false"]);
}

/// No row is to blame for what the tokenizer lacks.
#[test]
fn a_tokenizer_without_marks_is_refused_before_the_rows() {
    let dir = tempfile::tempdir().unwrap();
    let model = dir.path().join("model");
    for (token, flags, says) in [
        ("bos_token", "--add_bos on", &["no BOS token", "--add_bos auto or off"][..]),
        ("eos_token", "", &["no EOS token", "tokenizer_config.json"]),
        ("eos_token", "--data.prompt_style chat", &["no EOS token", "tokenizer_config.json"]),
    ] {
        copy_tiny(&model);
        fs::write(model.join("chat_template.jinja"), "{% for m in messages %}{{ m['content'] }}{% endfor %}").unwrap();
        for name in ["tokenizer_config.json", "special_tokens_map.json", "generation_config.json", "config.json"] {
            let Ok(text) = fs::read_to_string(model.join(name)) else { continue };
            let mut file: Value = serde_json::from_str(&text).unwrap();
            let keys = file.as_object_mut().unwrap();
            keys.remove(token);
            keys.remove(&format!("{token}_id"));
            fs::write(model.join(name), file.to_string()).unwrap();
        }
        let ran = finetune(dir.path(), &model, flags);
        assert!(!ran.stderr.contains("instructions_tiny.json"), "{ran:?}");
        ran.refused(1, says);
    }
}

#[test]
fn the_last_step_is_evaluated_once() {
    let dir = tempfile::tempdir().unwrap();
    let validated = |flags: &str| {
        let flags = format!("--train.max_steps 4 --eval.interval 2 {flags}");
        let said = finetune(dir.path(), &tiny(), &flags).ok().stderr;
        let lines = said.lines().filter(|line| line.contains("| val loss"));
        lines.map(|line| line.split(" |").next().unwrap().to_owned()).collect::<Vec<_>>()
    };
    assert_eq!(validated("--eval.final_validation false"), ["step 2", "step 4"]);
    assert_eq!(validated("--eval.final_validation true"), ["step 2", "step 4"]);
    assert_eq!(validated("--eval.final_validation false --eval.interval 3"), ["step 3"]);
}

#[test]
fn the_first_validation_has_all_samples_as_the_final_one() {
    let dir = tempfile::tempdir().unwrap();
    let loss = |more: &str| {
        let flags = format!("--lr 1e-12 --train.min_lr 0 --eval.initial_validation true {more}");
        let said = finetune(dir.path(), &tiny(), &flags).ok().stderr;
        let line = said.lines().find(|line| line.starts_with("step 0 | val loss ")).unwrap().to_owned();
        line.split(' ').nth(5).unwrap().to_owned()
    };
    assert_eq!(loss("--eval.max_iters 1"), loss(""));
}

/// A script may run twice.
#[test]
fn merging_again_does_nothing_and_succeeds() {
    let dir = tempfile::tempdir().unwrap();
    finetune(dir.path(), &tiny(), "").ok();
    let merge = |more: &str| litgpt(dir.path(), format!("merge_lora out/final{more}").split(' '));
    merge("").ok();
    let merged = dir.path().join("out/final/merged");
    let before = content(&merged);
    let again = merge("").ok();
    assert!(again.stderr.starts_with("nothing to do: ") && again.stderr.lines().count() == 1, "{}", again.stderr);
    assert_eq!(content(&merged), before);
    merge(" --precision bf16-true").refused(1, &["is there already"]);
    let weights = fs::read(merged.join("model.safetensors")).unwrap();
    fs::write(merged.join("model.safetensors"), &weights[..weights.len() / 2]).unwrap();
    merge("").refused(1, &["is there already"]);
    fs::write(merged.join("model.safetensors"), weights).unwrap();
    merge("").ok();
    // Another style of prompts is another model.
    fs::write(dir.path().join("out/final/prompt_style.yaml"), "class_path: litgpt.prompts.ChatML\n").unwrap();
    merge("").refused(1, &["is there already"]);
}

#[test]
fn merging_replaces_nothing_that_it_did_not_write() {
    let dir = tempfile::tempdir().unwrap();
    finetune(dir.path(), &tiny(), "").ok();
    let merge = |more: &str| litgpt(dir.path(), format!("merge_lora out/final --out_dir docs{more}").split(' '));
    let docs = dir.path().join("docs");
    fs::create_dir(&docs).unwrap();
    fs::write(docs.join("thesis.txt"), "a year's work").unwrap();
    merge("").refused(1, &["`docs` is there already"]);
    merge(" --format gguf").ok();
    merge(" --format gguf").refused(1, &["model-f16.gguf` is there already"]);
    merge(" --format gguf --gguf_type q8_0").ok();
    assert_eq!(names(&docs), ["model-f16.gguf", "model-q8_0.gguf", "thesis.txt"]);
}
