//! `litgpt validate`: says what a good folder is for, and lists everything that is wrong with a bad one.
#![allow(clippy::unwrap_used)]

use std::fs;

use litgpt::ops::weight::Weight;
use serde_json::{Value, json};

use crate::util::{content, copy_tiny, finetune, litgpt, tiny};

#[test]
fn good_folders_are_described() {
    let dir = tempfile::tempdir().unwrap();
    finetune(dir.path(), &tiny(), "--train.max_steps 1").ok();
    let before = content(dir.path());
    let model = litgpt(dir.path(), ["validate", tiny().to_str().unwrap()]).ok().stdout;
    for part in ["type llama, 1.8 M parameters, 4 layers", "usable for: litgpt generate, litgpt finetune_lora", "1408"]
    {
        assert!(model.contains(part), "no {part:?} in {model}");
    }
    // 1.8 M parameters: 7 MB in f32, or 4 as the bf16 that they are, beside 117 MB of program, tokenizer and data, and the cache.
    let generate = if Weight::widens() { "0.12 GB" } else { "0.13 GB" };
    assert!(model.contains(&format!("--precision 32-true: generate {generate}")), "{model}");
    let adapter = litgpt(dir.path(), ["validate", "out/final", "--dtype", "bfloat16"]).ok().stdout;
    for part in ["adapter: `out/final`, 28 modules", "litgpt merge_lora", "--resume out/final"] {
        assert!(adapter.contains(part), "no {part:?} in {adapter}");
    }
    assert!(!adapter.contains("32-true") && adapter.contains("bf16-true"), "{adapter}");
    litgpt(dir.path(), ["convert_to_litgpt", "--checkpoint_dir", "m"]).refused(1, &["m"]);
    assert_eq!(content(dir.path()), before, "validate wrote something");
}

#[test]
fn all_problems_are_listed() {
    let dir = tempfile::tempdir().unwrap();
    let model = dir.path().join("model");
    copy_tiny(&model);
    finetune(dir.path(), &model, "--train.max_steps 1").ok();
    litgpt(dir.path(), ["validate", "model"]).ok();
    let config = fs::read(model.join("config.json")).unwrap();
    let edit = |key: &str, value: Value| {
        let mut json: Value = serde_json::from_slice(&config).unwrap();
        json[key] = value;
        fs::write(model.join("config.json"), json.to_string()).unwrap();
    };
    // The tokenizer's problem and the template's at once.
    fs::write(model.join("chat_template.jinja"), "{% for %}").unwrap();
    fs::write(model.join("prompt_style.yaml"), "class_path: nope\n").unwrap();
    litgpt(dir.path(), ["validate", "model"]).refused(1, &["chat_template.jinja", "nope"]);
    fs::remove_file(model.join("chat_template.jinja")).unwrap();
    fs::remove_file(model.join("prompt_style.yaml")).unwrap();
    edit("num_key_value_heads", json!(3));
    litgpt(dir.path(), ["validate", "model"]).refused(1, &["k_proj", "v_proj", "config.json"]);
    // The base of an adapter has changed, and the adapter does not fit it any more.
    edit("initializer_range", json!(0.5));
    let changed = litgpt(dir.path(), ["validate", "out/final"]).refused(1, &["litgpt.json", "other weights"]);
    assert!(!changed.stderr.contains("does not fit"), "{changed:#?}");
    fs::write(model.join("config.json"), &config).unwrap();
    let adapter = dir.path().join("out/final/adapter_config.json");
    let text = fs::read_to_string(&adapter).unwrap();
    fs::write(&adapter, text.replace("\"use_dora\": false", "\"use_dora\": true")).unwrap();
    litgpt(dir.path(), ["validate", "out/final"]).refused(1, &["use_dora"]);
    fs::remove_file(model.join("tokenizer.json")).unwrap();
    litgpt(dir.path(), ["validate", "model"]).refused(1, &["tokenizer"]);
    litgpt(dir.path(), ["validate", "nowhere"]).refused(1, &["nowhere"]);
    litgpt(dir.path(), ["validate", "model", "--dtype", "float9"]).refused(2, &["float9"]);
    litgpt(dir.path(), ["validate", "model", "--model_filename", "x.pth"]).refused(1, &["x.pth"]);
}
