//! Checkpoint folders that differ from the plain one: scaled rotations, a head beside the embedding it is said to be,
//! models with parts that are not read, adapters as PEFT keeps them.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use litgpt::checkpoint::{Checkpoint, adapter};
use litgpt::generate::{Draw, Request, Session, tokens};
use litgpt::model::Gpt;
use litgpt::model::families::{HfConfig, by_config, slots};
use litgpt::ops::weight::Store;
use safetensors::Dtype;
use serde_json::{Value, json};

use crate::util::{Stored, copy_tiny, finetune, floats, litgpt, tensors, tiny, write_tensors};

fn edit(path: &Path, change: impl FnOnce(&mut Value)) {
    let mut json: Value = serde_json::from_str(&fs::read_to_string(path).unwrap()).unwrap();
    change(&mut json);
    fs::write(path, json.to_string()).unwrap();
}

fn open(dir: &Path) -> (Checkpoint, Gpt) {
    let checkpoint = Checkpoint::open(dir).unwrap();
    let mut gpt = Gpt::load(&checkpoint.config, &checkpoint, Store::F32, None, &mut |_| {}).unwrap();
    gpt.prepare(64);
    (checkpoint, gpt)
}

fn logits(dir: &Path, ids: &[u32]) -> Vec<f32> {
    let (_, gpt) = open(dir);
    gpt.all_logits(ids, &mut gpt.cache()).to_vec()
}

fn most_likely(logits: &[f32]) -> u32 {
    logits.iter().enumerate().max_by(|a, b| a.1.total_cmp(b.1)).unwrap().0 as u32
}

fn tiny_tensors() -> BTreeMap<String, Stored> {
    tensors(&tiny().join("model.safetensors"))
}

fn stored(shape: &[usize], value: impl Fn(usize) -> f32) -> Stored {
    let n = shape.iter().product();
    (Dtype::F32, shape.to_vec(), (0..n).flat_map(|i| value(i).to_le_bytes()).collect())
}

/// The tiny model with a longrope that turns texts of more than `original` tokens otherwise.
fn long_texts(to: &Path, original: usize) {
    copy_tiny(to);
    let divisors = |last: f64| (0..16).map(|i| 1.0 + last * f64::from(i)).collect::<Vec<_>>();
    edit(&to.join("config.json"), |config| {
        config["rope_scaling"] = json!({"rope_type": "longrope", "factor": 4.0, "original_max_position_embeddings": original,
            "short_factor": divisors(0.02), "long_factor": divisors(3.0)});
    });
}

#[test]
fn a_text_that_becomes_long_turns_anew() {
    let dir = tempfile::tempdir().unwrap();
    let prompt = [5, 17, 3, 99, 41, 8, 250, 7, 1, 40, 12];
    let repeating = std::array::from_fn(|i| prompt[i % 3]);
    for (original, prompt) in (12..34).map(|original| (original, repeating)).chain([(20, prompt)]) {
        long_texts(dir.path(), original);
        let (_, gpt) = open(dir.path());
        for prompt_lookup in [0, 8] {
            // What the session keeps of a long text is of no use for a short one, and the other way round.
            let mut session = Session::alone(&gpt);
            let texts = [(); 2].map(|()| {
                let request = Request {
                    prompt: &prompt,
                    max_new_tokens: 40,
                    draw: Draw::GREEDY,
                    stop_ids: &[],
                    stop_texts: &[],
                    prompt_lookup,
                };
                let mut text = prompt.to_vec();
                tokens(&gpt, &mut session, &request, |token| {
                    text.push(token);
                    Ok(true)
                })
                .unwrap();
                text
            });
            for text in texts {
                assert_eq!(text.len(), 51);
                for end in prompt.len()..text.len() {
                    let whole = gpt.next_logits(&text[..end], &mut gpt.cache());
                    assert_eq!(text[end], most_likely(&whole), "token {end}, long from {original}, {prompt_lookup}");
                }
            }
        }
    }
    let (_, gpt) = open(dir.path());
    let [short, long] = [20, 21].map(|end| gpt.all_logits(&vec![7; end], &mut gpt.cache()).row(10).to_vec());
    assert_ne!(short, long, "the divisors make a difference");
}

#[test]
fn samples_on_both_sides_of_a_longrope_share_no_prefix() {
    let dir = tempfile::tempdir().unwrap();
    // Samples have from 42 to 58 tokens, of which the first 25 are the same.
    long_texts(&dir.path().join("base"), 50);
    let run = |sharing: &str| {
        let more = format!("--train.max_steps 3 --train.global_batch_size 16 --train.prefix_sharing {sharing}");
        finetune(dir.path(), &dir.path().join("base"), &more).ok();
        crate::util::column(&dir.path().join("out"), "loss")
    };
    assert_eq!(run("on"), run("off"));
}

#[test]
fn a_head_that_differs_from_the_embedding_is_one_of_its_own() {
    let dir = tempfile::tempdir().unwrap();
    let (same, other) = (dir.path().join("same"), dir.path().join("other"));
    let ids = [5, 17, 3];
    let mut all = tiny_tensors();
    let embedding = all["model.embed_tokens.weight"].clone();
    for (folder, factor) in [(&same, 1.0), (&other, -2.0)] {
        copy_tiny(folder);
        let values = floats(&embedding);
        let bytes = values.iter().flat_map(|v| ((v * factor).to_bits() >> 16).to_le_bytes()[..2].to_vec());
        all.insert("lm_head.weight".to_owned(), (Dtype::BF16, embedding.1.clone(), bytes.collect()));
        write_tensors(&folder.join("model.safetensors"), &all);
    }
    let want = logits(&tiny(), &ids);
    assert_eq!(logits(&same, &ids), want);
    let got = logits(&other, &ids);
    assert!(got.iter().zip(&want).all(|(g, w)| (g + 2.0 * w).abs() <= 1e-4 * w.abs().max(1.0)));
    // What it is merged into says so, for readers that believe config.json.
    finetune(dir.path(), &other, "--train.max_steps 1").ok();
    litgpt(dir.path(), ["merge_lora", "--checkpoint_dir", "out/final", "--out_dir", "merged"]).ok();
    let merged = dir.path().join("merged");
    let config: Value = serde_json::from_str(&fs::read_to_string(merged.join("config.json")).unwrap()).unwrap();
    assert_eq!(config["tie_word_embeddings"], false);
    let head = &tensors(&merged.join("model.safetensors"))["lm_head.weight"];
    assert!(floats(head) == floats(&all["lm_head.weight"]));
}

#[test]
fn codes_of_four_bits_are_read_in_any_storage() {
    let dir = tempfile::tempdir().unwrap();
    let tiny = tiny();
    litgpt(dir.path(), ["quantize", tiny.to_str().unwrap(), "--quantize", "nf4", "--out_dir", "four"]).ok();
    let folder = dir.path().join("four");
    let want = logits(&folder, &[5, 17, 3]);
    let mut all = tensors(&folder.join("model.safetensors"));
    for (name, (dtype, shape, _)) in &mut all {
        if name.ends_with("proj.weight") {
            assert_eq!(*dtype, Dtype::U8);
            (*dtype, shape[0]) = (Dtype::BF16, shape[0] / 2);
        }
    }
    write_tensors(&folder.join("model.safetensors"), &all);
    assert_eq!(logits(&folder, &[5, 17, 3]), want);
}

/// Settings of a small Gemma 3 that leave out what all of them have alike.
fn gemma3() -> Value {
    json!({"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "head_dim": 8, "vocab_size": 1408,
        "num_attention_heads": 4, "num_key_value_heads": 2, "sliding_window": 4, "max_position_embeddings": 128})
}

/// Seeded tensors of a config.json.
fn made(config: &Value) -> BTreeMap<String, Stored> {
    let hf = HfConfig::of(Path::new("config.json"), config.as_object().unwrap().clone());
    let slots = slots(&(by_config(&hf).unwrap().config)(&hf).unwrap()).into_iter().enumerate();
    slots
        .map(|(at, slot)| {
            let shape = if slot.vector { vec![slot.cols] } else { vec![slot.rows, slot.cols] };
            let value = |i: usize| ((i * 7919 + at * 104_729) % 1013) as f32 / 1013.0 - 0.5;
            (slot.name, stored(&shape, |i| value(i) * if slot.vector { 0.1 } else { 0.4 }))
        })
        .collect()
}

/// Since transformers 5 the experts of a layer are one tensor, for which PEFT's A has the experts' ranks below one another,
/// and B has for each rank the experts side by side.
#[test]
fn adapters_of_fused_experts_are_those_of_each() {
    const EXPERTS: usize = 4;
    let [c, width] = [32, 48];
    let dir = tempfile::tempdir().unwrap();
    let (base, folder) = (dir.path().join("base"), dir.path().join("adapter"));
    copy_tiny(&base);
    let config = json!({"model_type": "qwen3_moe", "hidden_size": c, "moe_intermediate_size": width, "num_hidden_layers": 1,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "vocab_size": 1408, "num_experts": EXPERTS,
        "num_experts_per_tok": 2, "max_position_embeddings": 128, "intermediate_size": 64, "tie_word_embeddings": false});
    fs::write(base.join("config.json"), config.to_string()).unwrap();
    write_tensors(&base.join("model.safetensors"), &made(&config));
    fs::create_dir(&folder).unwrap();
    let ids = [5, 17, 3, 99, 41, 8, 250];
    let adapted = |tensors: BTreeMap<String, Stored>, settings: Value| {
        let mut all = json!({"peft_type": "LORA", "r": 2, "lora_alpha": 3, "use_rslora": false});
        all.as_object_mut().unwrap().extend(settings.as_object().unwrap().clone());
        fs::write(folder.join("adapter_config.json"), all.to_string()).unwrap();
        let tensors =
            tensors.into_iter().map(|(name, t)| (format!("base_model.model.model.layers.0.mlp.{name}.weight"), t));
        write_tensors(&folder.join("adapter_model.safetensors"), &tensors.collect());
        let (checkpoint, mut gpt) = open(&base);
        adapter::load(&folder, checkpoint.family, &mut gpt).map(|()| gpt.all_logits(&ids, &mut gpt.cache()).to_vec())
    };
    let value = |seed: usize| move |i: usize| ((i * 7919 + seed * 6151) % 997) as f32 / 997.0 - 0.5;
    let (up_r, down_r) = (4, 2);
    let gate = [
        ("gate.lora_A".to_owned(), stored(&[2, c], value(5))),
        ("gate.lora_B".to_owned(), stored(&[EXPERTS, 2], value(6))),
    ];
    let mut fused = BTreeMap::from(gate.clone());
    let mut each = BTreeMap::from(gate);
    for (inner, r, inputs, outputs, seed) in
        [("experts.base_layer", up_r, c, 2 * width, 1), ("experts", down_r, width, c, 3)]
    {
        fused.insert(format!("{inner}.lora_A"), stored(&[EXPERTS * r, inputs], value(seed)));
        fused.insert(format!("{inner}.lora_B"), stored(&[outputs, EXPERTS * r], value(seed + 1)));
        for expert in 0..EXPERTS {
            let names = if r == up_r { &["gate_proj", "up_proj"][..] } else { &["down_proj"] };
            let rows = outputs / names.len();
            for (part, name) in names.iter().enumerate() {
                let a = |i: usize| value(seed)(expert * r * inputs + i);
                let b = |i: usize| value(seed + 1)((part * rows + i / r) * EXPERTS * r + i % r * EXPERTS + expert);
                each.insert(format!("experts.{expert}.{name}.lora_A"), stored(&[r, inputs], a));
                each.insert(format!("experts.{expert}.{name}.lora_B"), stored(&[rows, r], b));
            }
        }
    }
    let patterns =
        |keys: &[&str], value: usize| keys.iter().map(|key| ((*key).to_owned(), json!(value))).collect::<Value>();
    let with_gate = |mut patterns: Value, name: &str| {
        patterns[name] = json!(5);
        patterns
    };
    let of_each = ["gate_proj", "up_proj"];
    let want = adapted(
        each,
        json!({"rank_pattern": patterns(&of_each, 4), "alpha_pattern": with_gate(patterns(&of_each, 7), "gate")}),
    );
    let of_all = [r".*\.gate_up_proj"];
    let settings = json!({"rank_pattern": patterns(&of_all, 4), "alpha_pattern": with_gate(patterns(&of_all, 7), r".*\.gate\.weight"),
        "target_parameters": ["gate_up_proj", "gate.weight", "down_proj"]});
    let got = adapted(fused.clone(), settings.clone()).unwrap();
    assert_eq!(got, want.unwrap());
    assert!(got != logits(&base, &ids), "the adapter makes a difference");
    fused.insert("experts.bias.lora_A".to_owned(), stored(&[2, c], value(7)));
    let error = adapted(fused, settings).unwrap_err().to_string();
    assert!(error.contains("`model.layers.0.mlp.experts.bias` is no module of this model"), "{error}");
}

#[test]
fn of_a_model_that_also_sees_the_text_part_is_trained_and_merged() {
    let dir = tempfile::tempdir().unwrap();
    let (text, whole) = (dir.path().join("text"), dir.path().join("whole"));
    let mut config = gemma3();
    config["model_type"] = json!("gemma3_text");
    let all = made(&config);
    for folder in [&text, &whole] {
        copy_tiny(folder);
    }
    fs::write(text.join("config.json"), config.to_string()).unwrap();
    write_tensors(&text.join("model.safetensors"), &all);
    let parts = json!({"model_type": "gemma3", "text_config": gemma3(), "vision_config": {"hidden_size": 8}});
    fs::write(whole.join("config.json"), parts.to_string()).unwrap();
    let mut seeing: BTreeMap<String, Stored> =
        all.into_iter().map(|(name, tensor)| (format!("language_model.{name}"), tensor)).collect();
    seeing.insert("vision_tower.vision_model.post_layernorm.weight".to_owned(), stored(&[8], |_| 1.0));
    write_tensors(&whole.join("model.safetensors"), &seeing);
    let ids = [5, 17, 3, 99, 41, 8, 250];
    assert_eq!(logits(&whole, &ids), logits(&text, &ids));
    let mut twice = seeing.clone();
    let norm = twice["language_model.model.norm.weight"].clone();
    twice.insert("model.norm.weight".to_owned(), norm);
    write_tensors(&whole.join("model.safetensors"), &twice);
    assert!(Checkpoint::open(&whole).unwrap_err().to_string().contains("two tensors stand for `model.norm.weight`"));
    write_tensors(&whole.join("model.safetensors"), &seeing);
    let merged = ["text", "whole"].map(|base| {
        finetune(dir.path(), &dir.path().join(base), "--train.max_steps 2 --train.max_seq_length 64").ok();
        litgpt(dir.path(), ["merge_lora", "--checkpoint_dir", "out/final", "--out_dir", "merged"]).ok();
        let merged = dir.path().join("merged");
        assert_eq!(Checkpoint::open(&merged).unwrap().hf.model_type().unwrap(), "gemma3_text");
        let logits = logits(&merged, &ids);
        fs::remove_dir_all(merged).unwrap();
        logits
    });
    assert_eq!(merged[0], merged[1]);
    // PEFT names the modules by their place in the whole.
    let file = dir.path().join("out/final/adapter_model.safetensors");
    let adapted = || {
        let (checkpoint, mut gpt) = open(&whole);
        adapter::load(&dir.path().join("out/final"), checkpoint.family, &mut gpt).unwrap();
        gpt.all_logits(&ids, &mut gpt.cache()).to_vec()
    };
    let want = adapted();
    assert!(want != logits(&whole, &ids), "the adapter makes a difference");
    let theirs = tensors(&file).into_iter().map(|(name, t)| (name.replace(".layers.", ".language_model.layers."), t));
    write_tensors(&file, &theirs.collect());
    fs::remove_file(dir.path().join("out/final/manifest.json")).unwrap();
    assert_eq!(adapted(), want);
    // LitGPT's files of it become a folder of the text part.
    litgpt(dir.path(), ["convert_to_litgpt", "whole", "--model_name", "Gemma-3-tiny"]).ok();
    litgpt(dir.path(), ["convert_from_litgpt", "whole", "back"]).ok();
    assert_eq!(Checkpoint::open(&dir.path().join("back")).unwrap().hf.model_type().unwrap(), "gemma3_text");
    assert_eq!(logits(&dir.path().join("back"), &ids), logits(&text, &ids));
}

#[test]
fn adapters_of_peft_that_name_the_base_are_understood() {
    let dir = tempfile::tempdir().unwrap();
    let run = "--train.max_steps 2 --lora_head true --lora_query false --lora_value false";
    finetune(dir.path(), &tiny(), run).ok();
    let folder = dir.path().join("out/final");
    let ids = [5, 17, 3];
    let adapted = || {
        let (checkpoint, mut gpt) = open(&tiny());
        adapter::load(&folder, checkpoint.family, &mut gpt).map(|()| gpt.all_logits(&ids, &mut gpt.cache()).to_vec())
    };
    let want = adapted().unwrap();
    assert!(want != logits(&tiny(), &ids), "the adapter makes a difference");
    // PEFT saves the head beside its adapter.
    let file = folder.join("adapter_model.safetensors");
    let (mut all, head) = (tensors(&file), tiny_tensors()["model.embed_tokens.weight"].clone());
    let name = "base_model.model.lm_head.base_layer.weight".to_owned();
    all.insert(name.clone(), head.clone());
    let put = |all: &BTreeMap<String, Stored>| {
        write_tensors(&file, all);
        let _ = fs::remove_file(folder.join("manifest.json"));
    };
    put(&all);
    assert_eq!(adapted().unwrap(), want);
    // Before transformers 5 the head of a GPT-NeoX had another name.
    let renamed = all.iter().map(|(name, tensor)| (name.replace("lm_head", "embed_out"), tensor.clone())).collect();
    put(&renamed);
    assert_eq!(adapted().unwrap(), want);
    let mut biased = all.clone();
    biased.insert("base_model.model.lm_head.base_layer.bias".to_owned(), stored(&[1408], |_| 0.0));
    put(&biased);
    assert!(adapted().unwrap_err().to_string().contains("base_layer.bias"), "the model has none");
    let changed = floats(&head).iter().flat_map(|v| (v * 1.5).to_le_bytes()).collect();
    all.insert(name.clone(), (Dtype::F32, head.1, changed));
    put(&all);
    assert!(adapted().unwrap_err().to_string().contains("is another head than the model's"));
    all.remove(&name);
    put(&all);
    edit(&folder.join("adapter_config.json"), |config| config["init_lora_weights"] = json!("pissa_niter_4"));
    let refused = adapted().unwrap_err();
    assert!(refused.hint().is_some_and(|hint| hint.starts_with("merge that adapter with PEFT")), "{refused:?}");
    let refused = refused.to_string();
    assert!(refused.contains("pissa_niter_4") && refused.contains("adapter_config.json"), "{refused}");
}
