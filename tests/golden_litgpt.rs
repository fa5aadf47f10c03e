//! LitGPT's files: what LitGPT wrote loads to its numbers, conversion there and back keeps every bit, broken files are
//! one-line errors.

use super::golden::{Fixture, cases, deviation, each, largest_difference, load, logits, root, within};
use litgpt::checkpoint::convert::{Export, litgpt_name};
use litgpt::checkpoint::litgpt as files;
use litgpt::checkpoint::write::{Staging, TensorInfo};
use litgpt::checkpoint::{Checkpoint, Dtype, Layout, adapter, pickle};
use litgpt::error::Error;
use litgpt::model::Gpt;
use litgpt::ops::weight::Store;
use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

/// Tensors of a state dict: shape and bytes by name.
fn state_dict(path: &Path) -> BTreeMap<String, (Vec<usize>, Vec<u8>)> {
    let bytes = fs::read(path).unwrap();
    let tensors = pickle::tensors(path, &bytes).unwrap();
    tensors.into_iter().map(|(name, t)| (name, (t.shape, bytes[t.bytes].to_vec()))).collect()
}

fn safetensors(path: &Path) -> BTreeMap<String, (Vec<usize>, Vec<u8>)> {
    let bytes = fs::read(path).unwrap();
    let tensors = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    tensors.tensors().into_iter().map(|(name, t)| (name, (t.shape().to_vec(), t.data().to_vec()))).collect()
}

/// Some files of `from` in a folder of their own.
fn copy(from: &Path, to: &Path, names: &[&str]) -> PathBuf {
    fs::create_dir_all(to).unwrap();
    names.iter().for_each(|name| {
        let content = fs::read(from.join(name)).unwrap();
        fs::write(to.join(name), content).unwrap();
    });
    to.to_owned()
}

fn to_litgpt(checkpoint: &Checkpoint, adapters: Option<&Gpt>, out: &Path) {
    let staging = Staging::new(out).unwrap();
    let export = Export { checkpoint, adapters, dtype: None };
    export.litgpt(&staging, &litgpt_name(checkpoint, &checkpoint.dir), &mut |_| ()).unwrap();
    staging.commit().unwrap();
}

fn to_hugging_face(checkpoint: &Checkpoint, out: &Path) {
    let staging = Staging::new(out).unwrap();
    Export { checkpoint, adapters: None, dtype: None }.hugging_face(&staging, &mut |_| ()).unwrap();
    staging.commit().unwrap();
}

fn close(what: &str, got: &[f32], want: &[f32]) {
    within(what, largest_difference(got, want) / deviation(want), 1e-4);
}

#[test]
fn litgpt_files_give_litgpts_numbers() {
    let Some(root) = root() else { return };
    let cases = cases(&root, "litgpt", "golden.safetensors");
    let failed = each(&cases, |dir| {
        let golden = Fixture::read(&dir.join("golden.safetensors"));
        let (rows, finetuned) = (golden.rows("input_ids"), dir.join("finetuned/final"));
        let (base, mut gpt) = load(&dir.join("base")).unwrap();
        assert!(matches!(base.layout, Layout::Litgpt(_)));
        close("base_logits", &logits(&gpt, &rows), &golden.get("base_logits").1);
        let (_, merged) = load(&finetuned).unwrap();
        close("merged_logits", &logits(&merged, &rows), &golden.get("merged_logits").1);

        assert_eq!(state_dict(&finetuned.join(files::ADAPTER)), safetensors(&dir.join("lora.safetensors")));
        adapter::load(&finetuned, base.family, &mut gpt).unwrap();
        close("lora_logits", &logits(&gpt, &rows), &golden.get("lora_logits").1);

        // Merged by us, written as LitGPT has it.
        let out = tempfile::tempdir().unwrap();
        let merged = out.path().join("merged");
        to_litgpt(&base, Some(&gpt), &merged);
        let (ours, theirs) = (state_dict(&merged.join(files::WEIGHTS)), state_dict(&finetuned.join(files::WEIGHTS)));
        assert_eq!(ours.keys().collect::<Vec<_>>(), theirs.keys().collect::<Vec<_>>());
        let floats =
            |bytes: &[u8]| bytes.chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect::<Vec<_>>();
        for (name, (shape, bytes)) in &ours {
            assert_eq!(shape, &theirs[name].0);
            assert!(largest_difference(&floats(bytes), &floats(&theirs[name].1)) < 1e-6, "{name}");
        }
        close("merged by us", &logits(&load(&merged).unwrap().1, &rows), &golden.get("merged_logits").1);
        check_without_config(dir, &rows, &golden);
        check_old_order(dir, &base, &rows, &golden);
    });
    assert!(failed.is_empty() && !cases.is_empty(), "cases that failed: {failed:?}");
}

/// `model_config.yaml` alone says what the architecture is.
fn check_without_config(dir: &Path, rows: &[Vec<i32>], golden: &Fixture) {
    let out = tempfile::tempdir().unwrap();
    let alone = copy(&dir.join("base"), &out.path().join("alone"), &[files::WEIGHTS, files::CONFIG]);
    let (checkpoint, gpt) = load(&alone).unwrap();
    close("without config.json", &logits(&gpt, rows), &golden.get("base_logits").1);
    let hf = out.path().join("hf");
    to_hugging_face(&checkpoint, &hf);
    close("as Hugging Face's", &logits(&load(&hf).unwrap().1, rows), &golden.get("base_logits").1);
    let yaml = fs::read_to_string(alone.join(files::CONFIG)).unwrap();
    for change in ["rope_interleave: true", "scale_embeddings: true", "parallel_residual: true", "norm_1: false"] {
        let (key, _) = change.split_once(": ").unwrap();
        let lines = yaml.lines().map(|l| if l.starts_with(&format!("{key}:")) { change } else { l });
        fs::write(alone.join(files::CONFIG), lines.collect::<Vec<_>>().join("\n")).unwrap();
        let error = Checkpoint::open(&alone).unwrap_err();
        assert!(error.to_string().contains(key) && error.hint().is_some(), "{change}: {error}");
    }
}

/// Files from before 0.5.5 hold q, k, v group by group.
fn check_old_order(dir: &Path, base: &Checkpoint, rows: &[Vec<i32>], golden: &Fixture) {
    let out = tempfile::tempdir().unwrap();
    let old = copy(&dir.join("base"), &out.path().join("old"), &["config.json"]);
    let config = &base.config;
    let (mut infos, mut contents) = (Vec::new(), Vec::new());
    for (name, (shape, mut bytes)) in state_dict(&dir.join("base").join(files::WEIGHTS)) {
        if name.contains(".attn.qkv.") {
            let (heads, groups, size) = (config.n_head / config.n_query_groups, config.n_query_groups, bytes.len());
            let head = size / (config.n_head + 2 * groups);
            let at = |i: usize| bytes[i * head..(i + 1) * head].to_vec();
            bytes = (0..groups)
                .flat_map(|g| {
                    let q = (g * heads..(g + 1) * heads).flat_map(at).collect::<Vec<_>>();
                    [q, at(config.n_head + g), at(config.n_head + groups + g)].concat()
                })
                .collect();
        }
        infos.push(TensorInfo { name: name.replace(".attn.qkv.", ".attn.attn."), dtype: Dtype::F32, shape });
        contents.push(bytes);
    }
    pickle::save(&old.join(files::WEIGHTS), &infos, &[], |i| Ok(contents[i].clone())).unwrap();
    let (checkpoint, gpt) = load(&old).unwrap();
    assert_eq!(checkpoint.layout, Layout::Litgpt(files::Qkv::Interleaved));
    close("old order of q, k, v", &logits(&gpt, rows), &golden.get("base_logits").1);
}

/// Every model that LitGPT can express goes there and back without a bit changed, with the same architecture, also when
/// only `model_config.yaml` tells it.
#[test]
fn conversion_there_and_back_keeps_every_bit() {
    let Some(root) = root() else { return };
    let (mut run, mut inexpressible) = (0, 0);
    let failed = each(&cases(&root, "models", "model.safetensors"), |dir| {
        let Some((checkpoint, _)) = load(dir) else { return };
        let out = tempfile::tempdir().unwrap();
        let (there, back) = (out.path().join("there"), out.path().join("back"));
        let export = Export { checkpoint: &checkpoint, adapters: None, dtype: None };
        if let Err(error) = export.litgpt_config(&litgpt_name(&checkpoint, dir)) {
            println!("  {error}");
            inexpressible += 1;
            return;
        }
        to_litgpt(&checkpoint, None, &there);
        let litgpt = Checkpoint::open(&there).unwrap();
        assert_eq!(litgpt.config, checkpoint.config);
        to_hugging_face(&litgpt, &back);
        let (got, want) = (safetensors(&back.join("model.safetensors")), safetensors(&dir.join("model.safetensors")));
        assert!(got == want, "{:?} {:?}", got.keys().collect::<Vec<_>>(), want.keys().collect::<Vec<_>>());
        fs::remove_file(there.join("config.json")).unwrap();
        match Checkpoint::open(&there) {
            Ok(alone) => assert_eq!(alone.config, checkpoint.config, "by model_config.yaml alone"),
            Err(error @ Error::Unsupported { .. }) => println!("  not by model_config.yaml alone: {error}"),
            Err(error) => panic!("by model_config.yaml alone: {error}"),
        }
        run += 1;
    });
    println!("conversion: {run} there and back, {inexpressible} that LitGPT has no words for");
    assert!(failed.is_empty() && run > 0, "cases that failed: {failed:?}");
}

/// The same weights as `pytorch_model.bin`, whole and in shards, give the same model.
#[test]
fn pytorch_files_give_the_same_model() {
    let Some(root) = root() else { return };
    let dir = root.join("models/llama3");
    let out = tempfile::tempdir().unwrap();
    let tensors: Vec<(String, (Vec<usize>, Vec<u8>))> =
        safetensors(&dir.join("model.safetensors")).into_iter().collect();
    let save = |path: &Path, tensors: &[(String, (Vec<usize>, Vec<u8>))]| {
        let info = |(name, (shape, _)): &(String, (Vec<usize>, Vec<u8>))| TensorInfo {
            name: name.clone(),
            dtype: Dtype::F32,
            shape: shape.clone(),
        };
        let infos: Vec<TensorInfo> = tensors.iter().map(info).collect();
        pickle::save(path, &infos, &[], |i| Ok(tensors[i].1.1.clone())).unwrap();
    };
    let whole = copy(&dir, &out.path().join("whole"), &["config.json"]);
    save(&whole.join("pytorch_model.bin"), &tensors);
    let shards = copy(&dir, &out.path().join("shards"), &["config.json"]);
    let mut map = serde_json::Map::new();
    for (i, part) in tensors.chunks(7).enumerate() {
        let file = format!("pytorch_model-{i}.bin");
        save(&shards.join(&file), part);
        map.extend(part.iter().map(|(name, _)| (name.clone(), file.clone().into())));
    }
    let index = serde_json::json!({ "weight_map": map }).to_string();
    fs::write(shards.join("pytorch_model.bin.index.json"), index).unwrap();
    let rows = Fixture::read(&dir.join("golden.safetensors")).rows("input_ids");
    let want = logits(&load(&dir).unwrap().1, &rows);
    for dir in [whole, shards] {
        assert_eq!(logits(&load(&dir).unwrap().1, &rows), want);
    }
}

/// A file that is cut or changed anywhere is read or refused in one line, and never brings the program down.
#[test]
fn broken_files_are_one_line_errors() {
    let Some(root) = root() else { return };
    for dir in cases(&root, "litgpt", "golden.safetensors") {
        let path = dir.join("finetuned/final").join(files::ADAPTER);
        let bytes = fs::read(&path).unwrap();
        let one_line = |bytes: &[u8]| pickle::tensors(&path, bytes).map_err(|e| assert!(!e.to_string().contains('\n')));
        for len in (0..bytes.len()).step_by(61).chain(bytes.len() - 700..bytes.len()) {
            assert!(one_line(&bytes[..len]).is_err(), "cut at {len}");
        }
        let program = bytes.windows(4).position(|w| w == b"\x80\x02}q").unwrap();
        for at in (0..program + 700).chain(bytes.len() - 1200..bytes.len()) {
            for value in [0, 0x28, 0x52, 0x7f, 0x80, 0xff] {
                let mut changed = bytes.clone();
                changed[at] = value;
                if let Ok(tensors) = one_line(&changed) {
                    assert!(tensors.values().all(|t| t.bytes.end <= bytes.len()));
                }
            }
        }
    }
}

/// Weights that PyTorch's own files name but that are no adapters' or models' are refused with what to do.
#[test]
fn unusable_folders_say_what_to_do() {
    let Some(root) = root() else { return };
    let out = tempfile::tempdir().unwrap();
    let case = root.join("litgpt/llama_litgpt");
    let unmerged = copy(&case.join("finetuned/final"), &out.path().join("unmerged"), &[files::ADAPTER]);
    assert!(adapter::is_adapter(&unmerged));
    let (base, mut gpt) = load(&case.join("base")).unwrap();
    let error = adapter::load(&unmerged, base.family, &mut gpt).unwrap_err();
    assert!(error.to_string().contains("hyperparameters.yaml"), "{error}");
    let settings = fs::read_to_string(case.join("finetuned/final/hyperparameters.yaml")).unwrap();
    fs::write(unmerged.join("hyperparameters.yaml"), settings.replace("lora_key: false", "lora_key: true")).unwrap();
    let error = adapter::load(&unmerged, base.family, &mut gpt).unwrap_err();
    assert!(error.to_string().contains("does not fit"), "{error}");

    let mut gpt = Gpt::load(&base.config, &base, Store::Bf16, None, &mut |_| ()).unwrap();
    fs::write(unmerged.join("hyperparameters.yaml"), settings).unwrap();
    adapter::load(&unmerged, base.family, &mut gpt).unwrap();
    assert_eq!(adapter::base_of(&unmerged).unwrap(), "base");
}
