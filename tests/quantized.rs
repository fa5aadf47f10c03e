//! `litgpt quantize`: the copy computes what the model does that is quantized while loading, and is trained, merged and
//! converted as others are. Files of bitsandbytes' own making are in `tests/data/bnb`.

use std::fs;
use std::path::Path;

use litgpt::checkpoint::convert::Export;
use litgpt::checkpoint::write::Staging;
use litgpt::checkpoint::{Checkpoint, bnb};
use litgpt::error::Error;
use litgpt::model::Gpt;
use litgpt::model::calibrate::Calibration;
use litgpt::model::quantizer::Quantizer;
use litgpt::ops::device::Device;
use litgpt::ops::weight::Store;
use safetensors::Dtype;
use serde_json::Value;

use crate::{emulated, golden};

use crate::util::{
    column, copy_tiny, finetune, floats, greedy, litgpt, names, result, root, tensors, tiny, write_tensors,
};

const NAMES: [&str; 6] = ["nf4", "nf4-dq", "nf4-mixed", "fp4", "fp4-dq", "int8"];
const IDS: [u32; 9] = [5, 17, 3, 99, 41, 8, 250, 7, 1];

fn logits(dir: &Path, quantize: Option<&str>) -> Vec<f32> {
    let checkpoint = Checkpoint::open(dir).unwrap();
    let quantizer = quantize.map(|name| Quantizer::named(name).unwrap());
    let mut gpt = Gpt::load(&checkpoint.config, &checkpoint, Store::F32, quantizer, &mut |_| {}).unwrap();
    gpt.prepare(IDS.len());
    gpt.all_logits(&IDS, &mut gpt.cache()).to_vec()
}

fn quantized(cwd: &Path, name: &str) -> std::path::PathBuf {
    let out = cwd.join(name);
    litgpt(cwd, ["quantize", tiny().to_str().unwrap(), "--quantize", name, "--out_dir", name]).ok();
    out
}

/// transformers casts nothing of a folder in few bits, so that all that stays whole has to have one dtype.
#[test]
fn what_stays_whole_has_the_dtype_of_the_projections() {
    let dir = tempfile::tempdir().unwrap();
    copy_tiny(&dir.path().join("mixed"));
    let path = dir.path().join("mixed/model.safetensors");
    let mut mixed = tensors(&path);
    for (_, tensor) in mixed.iter_mut().filter(|(name, _)| name.contains("norm")) {
        let wide = floats(tensor).into_iter().flat_map(f32::to_le_bytes).collect();
        *tensor = (Dtype::F32, tensor.1.clone(), wide);
    }
    write_tensors(&path, &mixed);
    litgpt(dir.path(), ["quantize", "mixed", "--quantize", "nf4", "--out_dir", "copy"]).ok();
    let copy = tensors(&dir.path().join("copy/model.safetensors"));
    for name in ["model.norm.weight", "model.layers.0.input_layernorm.weight", "model.embed_tokens.weight"] {
        assert_eq!(copy[name].0, Dtype::BF16, "{name}");
    }
    let said = litgpt(dir.path(), ["validate", "copy"]).ok().stdout;
    assert!(said.contains("blocks in nf4 already") && !said.contains("--quantize"), "{said}");
}

#[test]
fn the_copy_is_what_quantizing_while_loading_gives() {
    let dir = tempfile::tempdir().unwrap();
    let bytes = |dir: &Path| fs::metadata(dir.join("model.safetensors")).unwrap().len();
    for name in NAMES {
        let copy = quantized(dir.path(), name);
        assert_eq!(Checkpoint::open(&copy).unwrap().quantizer(), Quantizer::named(name), "{name}");
        assert_eq!(logits(&copy, None), logits(&tiny(), Some(name)), "{name}");
        assert!(bytes(&copy) < bytes(&tiny()), "{name}");
    }
}

#[test]
fn the_copy_has_transformers_names() {
    let dir = tempfile::tempdir().unwrap();
    let copy = quantized(dir.path(), "nf4-dq");
    let stored = tensors(&copy.join("model.safetensors"));
    let whole = tensors(&tiny().join("model.safetensors"));
    let name = "model.layers.0.mlp.down_proj.weight";
    let shape = &whole[name].1;
    let n: usize = shape.iter().product();
    assert_eq!(stored[name].1, [n.div_ceil(2), 1]);
    assert_eq!((stored[name].0, stored[&format!("{name}.absmax")].0), (Dtype::U8, Dtype::U8));
    assert_eq!(stored[&format!("{name}.nested_quant_map")].1, [256]);
    let state = &stored[&format!("{name}.quant_state.bitsandbytes__nf4")].2;
    let state: Value = serde_json::from_slice(state).unwrap();
    assert_eq!(state["shape"], serde_json::json!(shape));
    assert_eq!((&state["blocksize"], &state["nested_blocksize"]), (&64.into(), &256.into()));
    for name in ["model.embed_tokens.weight", "model.norm.weight", "model.layers.0.input_layernorm.weight"] {
        assert_eq!(stored[name], whole[name], "{name}");
    }
    let config: Value = serde_json::from_slice(&fs::read(copy.join("config.json")).unwrap()).unwrap();
    let config = &config["quantization_config"];
    assert_eq!((&config["quant_method"], &config["load_in_4bit"]), (&"bitsandbytes".into(), &true.into()));
    assert_eq!(config["bnb_4bit_use_double_quant"], true);
}

/// Values of all blocks are in 8 bits; config.json does not call it bitsandbytes'.
#[test]
fn a_mixed_copy_keeps_what_loses_most_in_8_bits() {
    let dir = tempfile::tempdir().unwrap();
    let copy = quantized(dir.path(), "nf4-mixed");
    let stored = tensors(&copy.join("model.safetensors"));
    let dtype = |module: &str| stored[&format!("model.layers.1.{module}.weight")].0;
    assert_eq!((dtype("self_attn.v_proj"), dtype("self_attn.q_proj")), (Dtype::I8, Dtype::U8));
    assert!(stored.contains_key("model.layers.0.self_attn.v_proj.SCB"));
    let projections = stored.iter().filter(|(name, _)| name.contains("_proj."));
    let bytes: usize = projections.filter(|(name, _)| !name.contains("quant_")).map(|(_, tensor)| tensor.2.len()).sum();
    let config = Checkpoint::open(&copy).unwrap().config;
    assert!(bytes as f64 <= 0.30 * 2.0 * config.projected() as f64, "{bytes} bytes");
    let config: Value = serde_json::from_slice(&fs::read(copy.join("config.json")).unwrap()).unwrap();
    assert_eq!(config["quantization_config"]["quant_method"], "litgpt");
    litgpt(dir.path(), ["generate", "nf4-mixed", "--quantize", "nf4-dq"]).refused(1, &["in nf4-mixed already"]);
    finetune(dir.path(), &copy, "--lora_r 4 --quantize nf4-mixed").ok();
    litgpt(dir.path(), ["merge_lora", "out/final", "--out_dir", "merged"]).ok();
    let (merged, base) = (dir.path().join("merged"), tiny());
    let [merged, base] = [merged, base].map(|dir| tensors(&dir.join("model.safetensors")));
    for (name, tensor) in &merged {
        assert_eq!((tensor.0, &tensor.1), (base[name].0, &base[name].1), "{name}");
    }
}

#[test]
fn a_copy_is_finetuned_and_merged() {
    let dir = tempfile::tempdir().unwrap();
    let copy = quantized(dir.path(), "nf4");
    finetune(dir.path(), &copy, "--lora_r 4").ok();
    let unmerged = greedy(dir.path(), "out/final", "Name a colour.");
    finetune(dir.path(), &tiny(), "--lora_r 4 --quantize nf4 --out_dir other").ok();
    assert_eq!(
        fs::read(dir.path().join("out/final/adapter_model.safetensors")).unwrap(),
        fs::read(dir.path().join("other/final/adapter_model.safetensors")).unwrap(),
        "the same as quantizing while loading"
    );
    litgpt(dir.path(), ["merge_lora", "out/final", "--precision", "32-true", "--out_dir", "merged"]).ok();
    let config = fs::read_to_string(dir.path().join("merged/config.json")).unwrap();
    assert!(!config.contains("quantization_config"), "{config}");
    assert_eq!(greedy(dir.path(), "merged", "Name a colour."), unmerged);
}

#[test]
fn what_bitsandbytes_wrote_is_read() {
    for (folder, quantizer) in [("nf4-dq", "nf4-dq"), ("fp4", "fp4"), ("int8", "int8"), ("nf4-skip", "nf4")] {
        let dir = root().join("tests/data/bnb").join(folder);
        assert_eq!(Checkpoint::open(&dir).unwrap().quantizer(), Quantizer::named(quantizer), "{folder}");
        let got = logits(&dir, None);
        let want = floats(&tensors(&dir.join("logits.safetensors"))["logits"]);
        let largest = want.iter().fold(0f32, |m, v| m.max(v.abs()));
        let off = got.iter().zip(&want).fold(0f32, |m, (a, b)| m.max((a - b).abs()));
        assert!(off <= 1e-4 * largest, "{folder}: off by {off} of {largest}");
    }
}

/// Folders of which some matrices are left whole, as those that Unsloth calls dynamic: these compute with what the file has,
/// beside others of the same input in few bits, and are merged as they are.
#[test]
fn what_a_folder_in_few_bits_keeps_whole_stays_whole() {
    let dir = tempfile::tempdir().unwrap();
    let whole = tensors(&tiny().join("model.safetensors"));
    for name in ["nf4-dq", "int8"] {
        let copy = quantized(dir.path(), name);
        let all = Checkpoint::open(&copy).unwrap();
        let file = copy.join("model.safetensors");
        let left = ["0.self_attn.v_proj", "0.mlp.gate_proj", "1.mlp.down_proj", "1.self_attn.o_proj"];
        let left = left.map(|module| format!("model.layers.{module}"));
        let mut mixed = tensors(&file);
        for module in &left {
            let weight = format!("{module}.weight");
            mixed.retain(|name, _| !name.starts_with(&weight) && *name != format!("{module}.SCB"));
            mixed.insert(weight.clone(), whole[&weight].clone());
        }
        let in_few_bits = Gpt::load(&all.config, &all, Store::F32, None, &mut |_| {}).unwrap();
        write_tensors(&file, &mixed);
        let checkpoint = Checkpoint::open(&copy).unwrap();
        let elements: usize = left.iter().map(|m| whole[&format!("{m}.weight")].1.iter().product::<usize>()).sum();
        assert_eq!(checkpoint.left_whole(), elements);
        let quantizer = checkpoint.quantizer();
        let load = |device: Option<&Device>| {
            Gpt::load_on(device, &checkpoint.config, &checkpoint, Store::F32, quantizer, &mut |_| {}).unwrap()
        };
        let elements = |gpt: &Gpt| -> Vec<(String, Vec<f32>)> {
            let parts = gpt.linears().flat_map(|linear| linear.parts.iter().map(move |part| (linear, part)));
            let decoded = parts.map(|(linear, part)| {
                let mut values = vec![0.0; part.rows.len() * linear.inputs()];
                linear.weight().decode_rows(part.rows.clone(), &mut values);
                (part.name.clone(), values)
            });
            decoded.collect()
        };
        let got = elements(&load(None));
        for ((name, got), (_, coded)) in got.iter().zip(elements(&in_few_bits)) {
            let want = if left.contains(name) { floats(&whole[&format!("{name}.weight")]) } else { coded };
            assert!(*got == want, "{name} has other elements");
        }
        if let Some(device) = emulated::device() {
            let logits = |mut gpt: Gpt| {
                gpt.prepare(IDS.len());
                gpt.all_logits(&IDS, &mut gpt.cache()).to_host().to_vec()
            };
            let there = load(Some(&device));
            assert!(elements(&there) == got, "{name} on a device");
            let (want, got) = (logits(load(None)), logits(there));
            let largest = want.iter().fold(0f32, |m, v| m.max(v.abs()));
            let off = got.iter().zip(&want).fold(0f32, |m, (a, b)| m.max((a - b).abs()));
            assert!(off <= 1e-4 * largest, "{name} on a device: off by {off} of {largest}");
        }
        finetune(dir.path(), &copy, "--lora_r 4 --lora_mlp false").ok();
        let unmerged = greedy(dir.path(), "out/final", "Name a colour.");
        litgpt(dir.path(), ["merge_lora", "out/final", "--precision", "32-true", "--out_dir", "merged"]).ok();
        assert_eq!(greedy(dir.path(), "merged", "Name a colour."), unmerged);
        let merged = tensors(&dir.path().join("merged/model.safetensors"));
        for module in left.iter().filter(|module| module.contains(".mlp.")) {
            let weight = format!("{module}.weight");
            assert!(floats(&merged[&weight]) == floats(&whole[&weight]), "{weight} was changed");
        }
        ["merged", "out"].iter().for_each(|folder| fs::remove_dir_all(dir.path().join(folder)).unwrap());
    }
}

#[test]
fn broken_copies_are_refused_by_name() {
    let dir = tempfile::tempdir().unwrap();
    let copy = quantized(dir.path(), "nf4-dq");
    let file = copy.join("model.safetensors");
    let whole = tensors(&file);
    let name = "model.layers.0.mlp.down_proj.weight";
    let state = format!("{name}.quant_state.bitsandbytes__nf4");
    let with = |key: &str, value: Value| {
        let mut state: Value = serde_json::from_slice(&whole[&state].2).unwrap();
        state[key] = value;
        state.to_string().into_bytes()
    };
    let states = [
        (b"no state".to_vec(), "is no state"),
        (with("shape", vec![1u64 << 40, 1 << 40].into()), "shape"),
        (with("shape", vec![3, 5].into()), "codes or scales"),
        (with("blocksize", 128.into()), "blocks of 128"),
        (with("dtype", "complex64".into()), "complex64"),
        (with("nested_offset", Value::Null), "nested_offset"),
    ];
    for (bytes, part) in states {
        let mut broken = whole.clone();
        broken.insert(state.clone(), (Dtype::U8, vec![bytes.len()], bytes));
        write_tensors(&file, &broken);
        litgpt(dir.path(), ["generate", "nf4-dq"]).refused(1, &[name, part]);
    }
    let nan = f32::NAN.to_le_bytes().repeat(whole[&format!("{name}.nested_absmax")].1[0]);
    let parts: [(&str, Option<Vec<u8>>); 3] =
        [(".absmax", None), (".nested_absmax", Some(nan)), (".nested_quant_map", Some(vec![0; 1024]))];
    for (ending, bytes) in parts {
        let mut broken = whole.clone();
        let part = format!("{name}{ending}");
        let old = broken.remove(&part).unwrap();
        broken.extend(bytes.map(|bytes| (part, (old.0, old.1, bytes))));
        write_tensors(&file, &broken);
        litgpt(dir.path(), ["generate", "nf4-dq"]).refused(1, &[name]);
    }
}

#[test]
fn what_cannot_be_quantized_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    quantized(dir.path(), "nf4");
    litgpt(dir.path(), ["quantize", "nf4", "--out_dir", "twice"]).refused(1, &["quantized already"]);
    litgpt(dir.path(), ["generate", "nf4", "--quantize", "int8"]).refused(1, &["in nf4 already"]);
    litgpt(dir.path(), ["quantize", tiny().to_str().unwrap(), "--out_dir", "nf4"]).refused(1, &["there already"]);
    copy_tiny(&dir.path().join("gptq"));
    let path = dir.path().join("gptq/config.json");
    let mut config: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    config["quantization_config"] = serde_json::json!({"quant_method": "gptq", "bits": 4});
    fs::write(&path, config.to_string()).unwrap();
    litgpt(dir.path(), ["generate", "gptq"]).refused(1, &["gptq", "config.json"]);
}

/// Samples choose the codes of every family: the logits change less than with the nearest codes, whatever the files call
/// the matrices and fuse of them.
#[test]
fn samples_choose_the_codes_of_every_family() {
    let Some(root) = golden::root() else { return };
    let failed = golden::each(&golden::cases(&root, "models", "golden.safetensors"), |dir| {
        let Some((checkpoint, whole)) = golden::load_on(None, dir, Store::F32, None) else { return };
        let rows = golden::Fixture::read(&dir.join("golden.safetensors")).rows("input_ids");
        let want = golden::logits(&whole, &rows);
        let change = |device: Option<&Device>, store: Store, name: &str, samples: bool| {
            let folder = tempfile::tempdir().unwrap();
            let tokens = golden::batch(&rows, &rows);
            let calibrated = || Calibration::new(&checkpoint.config, &checkpoint, device, store, &[tokens]);
            let calibration = match samples.then(calibrated).transpose() {
                Err(Error::Unsupported { .. }) => return None,
                calibration => calibration.unwrap(),
            };
            let export = Export { checkpoint: &checkpoint, adapters: None, dtype: None };
            let staging = Staging::new(&folder.path().join("out")).unwrap();
            let quantizer = Quantizer::named(name).unwrap();
            bnb::write(&export, quantizer, calibration, &staging, &mut |_| ()).unwrap();
            staging.commit().unwrap();
            let (copy, quantized) = golden::load_on(None, &folder.path().join("out"), Store::F32, None).unwrap();
            assert_eq!(copy.quantizer(), Some(quantizer));
            let got = golden::logits(&quantized, &rows);
            Some(got.iter().zip(&want).map(|(a, b)| (a - b).powi(2)).sum::<f32>().sqrt())
        };
        for name in ["nf4", "fp4-dq", "nf4-mixed"] {
            let Some(chosen) = change(None, Store::F32, name, true) else { return };
            let nearest = change(None, Store::F32, name, false).unwrap();
            println!("{name}: {nearest} to {chosen}");
            assert!(chosen < 0.8 * nearest, "{name}: {nearest} to {chosen}");
            let Some(device) = emulated::device() else { continue };
            for store in [Store::F32, Store::Bf16] {
                let there = change(Some(&device), store, name, true).unwrap();
                println!("{name} on a device in {store:?}: {there}");
                assert!(there < 0.8 * nearest, "{name} on a device in {store:?}: {nearest} to {there}");
            }
        }
    });
    assert!(failed.is_empty(), "cases that failed: {failed:?}");
}

#[test]
fn samples_are_what_finetuning_would_take() {
    let dir = tempfile::tempdir().unwrap();
    let data = root().join("data/instructions_tiny.json");
    let tiny = tiny();
    let quantize = |more: &[&str]| {
        let all = [&["quantize", tiny.to_str().unwrap(), "--data", data.to_str().unwrap()], more].concat();
        litgpt(dir.path(), all)
    };
    let ran = quantize(&["--out_dir", "one", "--calibration_samples", "40"]).ok();
    assert!(ran.stderr.contains("by 40 samples"), "{}", ran.stderr);
    quantize(&["--out_dir", "two", "--calibration_samples", "40"]).ok();
    let bytes = |name: &str| fs::read(dir.path().join(name).join("model.safetensors")).unwrap();
    assert!(bytes("one") == bytes("two"), "the same samples give the same codes");
    let loss = |model: &str| {
        finetune(dir.path(), Path::new(model), "--eval.initial_validation true --train.max_steps 1").ok();
        column(&dir.path().join("out"), "val_loss")[0]
    };
    let plain = quantized(dir.path(), "nf4");
    let [whole, nearest, chosen] = [loss(tiny.to_str().unwrap()), loss(plain.to_str().unwrap()), loss("one")];
    assert!((chosen - whole).abs() < 0.5 * (nearest - whole).abs(), "{whole}, nearest {nearest}, chosen {chosen}");
    quantize(&["--out_dir", "x", "--quantize", "int8"]).refused(2, &["8 bits", "leave the samples out"]);
    let without = ["quantize", tiny.to_str().unwrap(), "--out_dir", "x", "--calibration_samples", "4"];
    litgpt(dir.path(), without).refused(2, &["--data"]);
    quantize(&["--out_dir", "x", "--calibration_samples", "0"]).refused(2, &["calibration_samples"]);
    litgpt(dir.path(), ["quantize", tiny.to_str().unwrap(), "--out_dir", "x", "--data", "no.json"])
        .refused(1, &["no.json"]);
    assert!(!dir.path().join("x").exists());
}

#[test]
fn a_run_makes_its_own_base_by_its_samples() {
    let dir = tempfile::tempdir().unwrap();
    let run = |more: &str| {
        finetune(dir.path(), &tiny(), &format!("--quantize nf4 --calibration_samples 8 --train.max_steps 2 {more}"))
    };
    run("").ok();
    let bases = || -> Vec<String> {
        let all = names(&dir.path().join("out")).into_iter();
        all.filter(|name| name.starts_with("base-nf4-")).collect()
    };
    let [base] = &bases()[..] else { panic!("{:?}", bases()) };
    let made = || fs::metadata(dir.path().join("out").join(base)).unwrap().modified().unwrap();
    let (first, adapter) = (made(), result(&dir.path().join("out")));
    run("").ok();
    assert_eq!((made(), result(&dir.path().join("out")), bases().len()), (first, adapter, 1), "the same base again");
    run("--train.max_steps 4 --resume auto --resume_force true").ok();
    assert_eq!(bases().len(), 1);
    run("--calibration_samples 9 --resume auto").refused(1, &["would not be exact", "calibration_samples"]);
    assert_eq!(bases().len(), 1, "refused before a base is made");
    // What the samples are computed in decides over codes, too.
    run("--precision bf16-true").ok();
    assert_eq!(bases().len(), 2);
    fs::remove_dir_all(dir.path().join("out")).unwrap();
    run("").ok();
    run("--calibration_samples 9 --out_dir other").ok();
    let unmerged = greedy(dir.path(), "out/final", "Name a colour.");
    // The folder moves as a whole.
    fs::rename(dir.path().join("out"), dir.path().join("moved")).unwrap();
    assert_eq!(greedy(dir.path(), "moved/final", "Name a colour."), unmerged);
    litgpt(dir.path(), ["merge_lora", "moved/final", "--precision", "32-true", "--out_dir", "merged"]).ok();
    assert_eq!(greedy(dir.path(), "merged", "Name a colour."), unmerged);
    run("--quantize int8").refused(2, &["calibration_samples", "nf4"]);
    run("--calibration_samples 9 --out_dir none --resume true").refused(1, &["none"]);
    assert!(!names(&dir.path().join("none")).iter().any(|name| name.starts_with("base-")));
    run("--calibration_samples 0").refused(2, &["calibration_samples", "at least 1"]);
    let quantized = dir.path().join("moved").join(base);
    finetune(dir.path(), &quantized, "--quantize nf4 --calibration_samples 8").refused(1, &["quantized already"]);
}
