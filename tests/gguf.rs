//! `merge_lora --format gguf`, read back by candle, whose GGUF reader and llama know nothing of ours.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use candle_core::quantized::gguf_file::{Content, Value};
use candle_core::{Device, Tensor};
use candle_transformers::models::quantized_llama::ModelWeights;
use litgpt::checkpoint::convert::Export;
use litgpt::checkpoint::write::Staging;
use litgpt::checkpoint::{Checkpoint, Dtype};
use litgpt::model::Gpt;
use litgpt::ops::weight::Store;
use litgpt::tokenizer::Tokenizer;

use crate::util::{copy_tiny, finetune, floats, greedy, litgpt, tensors, tiny};

/// Heads of queries and of keys of the quickstart's model, and channels of a head.
const HEADS: [usize; 2] = [6, 2];
const HEAD_SIZE: usize = 32;

/// An adapter in `out/final`, and base and adapter merged in 32-true in `merged`.
fn merged() -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    finetune(dir.path(), &tiny(), "--lora_r 4 --lora_alpha 12").ok();
    litgpt(dir.path(), ["merge_lora", "out/final", "--out_dir", "merged", "--precision", "32-true"]).ok();
    dir
}

fn gguf(cwd: &Path, elements: &str) -> Content {
    litgpt(cwd, ["merge_lora", "out/final", "--out_dir", elements, "--format", "gguf", "--gguf_type", elements]).ok();
    open(cwd, elements).0
}

fn open(cwd: &Path, elements: &str) -> (Content, fs::File) {
    let mut file = fs::File::open(cwd.join(format!("{elements}/model-{elements}.gguf"))).unwrap();
    (Content::read(&mut file).unwrap(), file)
}

/// What candle reads of the file, by Hugging Face's names.
fn read_back(cwd: &Path, elements: &str) -> BTreeMap<String, Vec<f32>> {
    let (content, mut file) = open(cwd, elements);
    let names = [
        ("blk.", "model.layers."),
        ("token_embd", "model.embed_tokens"),
        ("output_norm", "model.norm"),
        ("attn_q.", "self_attn.q_proj."),
        ("attn_k.", "self_attn.k_proj."),
        ("attn_v.", "self_attn.v_proj."),
        ("attn_output.", "self_attn.o_proj."),
        ("attn_norm", "input_layernorm"),
        ("ffn_norm", "post_attention_layernorm"),
        ("ffn_", "mlp."),
    ];
    let mut found = BTreeMap::new();
    for name in content.tensor_infos.keys() {
        let tensor = content.tensor(&mut file, name, &Device::Cpu).unwrap().dequantize(&Device::Cpu).unwrap();
        let mut ours = names.iter().fold(name.clone(), |name, (theirs, ours)| name.replace(theirs, ours));
        for part in ["gate", "up", "down"] {
            ours = ours.replace(&format!("mlp.{part}."), &format!("mlp.{part}_proj."));
        }
        found.insert(ours, tensor.flatten_all().unwrap().to_vec1().unwrap());
    }
    found
}

/// Where row `row` of queries or keys stands in the file: rows `i` and `i + 16` of a head are neighbours.
fn place(row: usize) -> usize {
    let (head, channel) = (row / HEAD_SIZE, row % HEAD_SIZE);
    head * HEAD_SIZE + if channel < HEAD_SIZE / 2 { 2 * channel } else { 2 * (channel - HEAD_SIZE / 2) + 1 }
}

#[test]
fn every_tensor_is_the_merged_one_up_to_its_type() {
    let dir = merged();
    let want = tensors(&dir.path().join("merged/model.safetensors"));
    for (elements, steps) in [("f16", 0.0), ("q8_0", 127.0), ("q4_0", 8.0)] {
        gguf(dir.path(), elements);
        let found = read_back(dir.path(), elements);
        assert!(found.keys().eq(want.keys()), "{:?}", found.keys());
        for (name, stored) in &want {
            let (want, got, columns) = (floats(stored), &found[name], *stored.1.last().unwrap());
            let vector = stored.1.len() == 1;
            let permuted = name.contains("q_proj") || name.contains("k_proj");
            let steps = if elements == "q4_0" && name.contains("embed_tokens") { 127.0 } else { steps };
            for (row, want) in want.chunks(columns).enumerate() {
                let at = if permuted { place(row) } else { row } * columns;
                for (want, got) in want.chunks(32).zip(got[at..at + columns].chunks(32)) {
                    let largest = want.iter().fold(0.0f32, |m, v| m.max(v.abs()));
                    // Half a step of the block's scale; f16 rounds element by element, and 4 bits are cut off at +7.
                    let allowed = |w: f32| match steps {
                        _ if vector => 0.0,
                        0.0 => w.abs() / 2048.0 + 1e-7,
                        8.0 => largest / 8.0 * 1.01,
                        steps => largest / steps * 0.5 + largest / 1000.0,
                    };
                    let off = want.iter().zip(got).find(|(w, g)| (**w - **g).abs() > allowed(**w));
                    assert!(off.is_none(), "{elements} {name} row {row}: {off:?} of a block up to {largest}");
                }
            }
        }
    }
}

#[test]
fn settings_are_those_of_the_model() {
    let dir = merged();
    let content = gguf(dir.path(), "f16");
    let get = |key: &str| content.metadata.get(key).unwrap_or_else(|| panic!("no {key}"));
    assert_eq!(get("general.architecture").to_string().unwrap(), "llama");
    for (key, want) in [
        ("llama.attention.head_count", HEADS[0]),
        ("llama.attention.head_count_kv", HEADS[1]),
        ("llama.attention.key_length", HEAD_SIZE),
        ("llama.context_length", 512),
        ("tokenizer.ggml.bos_token_id", 0),
        ("tokenizer.ggml.eos_token_id", 1),
        ("general.file_type", 1),
    ] {
        assert_eq!(get(key).to_u32().unwrap() as usize, want, "{key}");
    }
    assert_eq!(get("llama.attention.layer_norm_rms_epsilon").to_f32().unwrap(), 1e-5);
    assert_eq!(get("tokenizer.ggml.pre").to_string().unwrap(), "gpt-2");
    assert!(get("tokenizer.ggml.add_bos_token").to_bool().unwrap());
    let tokenizer = Tokenizer::load(&tiny()).unwrap();
    let tokens = get("tokenizer.ggml.tokens").to_vec().unwrap();
    assert_eq!(tokens.len(), 1408);
    for (id, token) in tokens.iter().enumerate().take(tokenizer.vocab_size()) {
        assert_eq!(tokenizer.id_to_token(id as u32).as_ref(), Some(token.to_string().unwrap()));
    }
    let types = get("tokenizer.ggml.token_type").to_vec().unwrap();
    assert!(matches!((&types[0], &types[1], &types[2]), (Value::I32(3), Value::I32(3), Value::I32(1))));
    assert_eq!(get("tokenizer.ggml.merges").to_vec().unwrap()[1].to_string().unwrap(), "Ġ t");
}

/// candle's llama, with its rotation of neighbouring channels, against our model of the merged folder.
#[test]
fn another_program_computes_the_same_logits() {
    let dir = merged();
    let checkpoint = Checkpoint::open(&dir.path().join("merged")).unwrap();
    let mut gpt = Gpt::load(&checkpoint.config, &checkpoint, Store::F32, None, &mut |_| ()).unwrap();
    let tokenizer = Tokenizer::load(&tiny()).unwrap();
    let ids = tokenizer.encode_prompt("Describe a fox that lives in the forest.").unwrap();
    gpt.prepare(ids.len());
    let want = gpt.next_logits(&ids, &mut gpt.cache()).to_vec();
    let scale = want.iter().fold(0.0f32, |m, v| m.max(v.abs()));
    gguf(dir.path(), "f16");
    let (content, mut file) = open(dir.path(), "f16");
    let mut theirs = ModelWeights::from_gguf(content, &mut file, &Device::Cpu).unwrap();
    let input = Tensor::new(ids.as_slice(), &Device::Cpu).unwrap().unsqueeze(0).unwrap();
    let got: Vec<f32> = theirs.forward(&input, 0).unwrap().flatten_all().unwrap().to_vec1().unwrap();
    let off = want.iter().zip(&got).fold(0.0f32, |m, (w, g)| m.max((w - g).abs()));
    assert!(off <= 0.002 * scale, "logits up to {scale} differ by {off}");
}

/// Logits behind a prompt, of the checkpoint at `path`.
fn logits(path: &Path) -> Vec<f32> {
    let checkpoint = Checkpoint::open(path).unwrap();
    let mut gpt = Gpt::load(&checkpoint.config, &checkpoint, Store::F32, None, &mut |_| ()).unwrap();
    let ids = Tokenizer::of(path, &|name| checkpoint.companion(name)).unwrap();
    let ids = ids.encode_prompt("Describe a fox that lives in the forest.").unwrap();
    gpt.prepare(ids.len());
    gpt.next_logits(&ids, &mut gpt.cache()).to_vec()
}

#[test]
fn logits_of_a_file_are_those_of_the_folder() {
    let dir = merged();
    litgpt(dir.path(), ["merge_lora", "out/final", "--out_dir", "half", "--precision", "16-true"]).ok();
    gguf(dir.path(), "f16");
    assert!(logits(&dir.path().join("f16")) == logits(&dir.path().join("half")), "f16 is exact");
    gguf(dir.path(), "q8_0");
    let (want, got) = (logits(&dir.path().join("merged")), logits(&dir.path().join("q8_0/model-q8_0.gguf")));
    let scale = want.iter().fold(0.0f32, |m, v| m.max(v.abs()));
    let off = want.iter().zip(&got).fold(0.0f32, |m, (w, g)| m.max((w - g).abs()));
    assert!(off > 0.0 && off <= 0.01 * scale, "logits up to {scale} differ by {off}");
}

/// Folder to file in f16 and back to a folder.
#[test]
fn a_round_trip_gives_the_same_tensors_and_tokens() {
    let dir = merged();
    litgpt(dir.path(), ["merge_lora", "out/final", "--out_dir", "half", "--precision", "16-true"]).ok();
    gguf(dir.path(), "f16");
    let checkpoint = Checkpoint::open(&dir.path().join("f16/model-f16.gguf")).unwrap();
    let staging = Staging::new(&dir.path().join("back")).unwrap();
    let export = Export { checkpoint: &checkpoint, adapters: None, dtype: Some(Dtype::F16) };
    export.hugging_face(&staging, &mut |_| ()).unwrap();
    staging.commit().unwrap();
    let read = |name: &str| tensors(&dir.path().join(name).join("model.safetensors"));
    assert!(read("back") == read("half"), "every tensor has its name, shape and bits");
    let config = |name: &str| Checkpoint::open(&dir.path().join(name)).unwrap().config;
    assert_eq!(config("back"), config("half"));
    let tokenizers = ["back", "half"].map(|name| Tokenizer::load(&dir.path().join(name)).unwrap());
    assert_eq!(tokenizers[0].eos_ids(), tokenizers[1].eos_ids());
    for text in TEXTS {
        let [back, half] = tokenizers.each_ref().map(|t| t.encode_prompt(text).unwrap());
        assert_eq!(back, half, "{text}");
        assert_eq!(tokenizers[0].decode(&back).unwrap(), tokenizers[1].decode(&half).unwrap());
    }
}

const TEXTS: [&str; 10] = [
    "",
    "The quick brown fox, 12345 times; don't stop!",
    "  two  blanks\tand\n\nlines \r\n",
    "Größe, naïve, e\u{301}tude, ﬁnal",
    "Быстрая лиса",
    "敏捷的狐狸、すばやい狐 빠른 여우",
    "سريع الثعلب שועל हिन्दी ไทย",
    "🦊👩‍👩‍👧 ½ ² ∑",
    "</s>mid <s> text<s>",
    "fn main() { let x = 0xff; }",
];

#[test]
fn a_file_is_trained_on_merged_and_refused_when_broken() {
    let dir = merged();
    gguf(dir.path(), "q8_0");
    let file = dir.path().join("q8_0/model-q8_0.gguf");
    let again = dir.path().join("again");
    fs::create_dir(&again).unwrap();
    finetune(&again, &file, "").ok();
    litgpt(&again, ["merge_lora", "out/final", "--out_dir", "whole"]).ok();
    for name in ["config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors"] {
        assert!(again.join("whole").join(name).is_file(), "{name}");
    }
    let prompt = "Describe a fox.";
    assert_eq!(greedy(&again, "whole", prompt), greedy(&again, "out/final", prompt));
    let bytes = fs::read(&file).unwrap();
    for (len, part) in [(3, "not a GGUF file"), (100, "beyond the end"), (bytes.len() - 9, "beyond the end")] {
        fs::write(again.join("cut.gguf"), &bytes[..len]).unwrap();
        litgpt(&again, ["generate", "--checkpoint_dir", "cut.gguf", "--prompt", "x"]).refused(1, &["cut.gguf", part]);
    }
    let at = bytes.windows(5).position(|w| w == b"llama").unwrap();
    let other = [&bytes[..at], b"gemma", &bytes[at + 5..]].concat();
    fs::write(again.join("other.gguf"), other).unwrap();
    litgpt(&again, ["generate", "--checkpoint_dir", "other.gguf", "--prompt", "x"])
        .refused(1, &["`general.architecture` gemma", "qwen3"]);
}

#[test]
fn what_cannot_be_written_is_refused_before_anything_is() {
    let dir = tempfile::tempdir().unwrap();
    let base = dir.path().join("base");
    copy_tiny(&base);
    let config = fs::read_to_string(base.join("config.json")).unwrap();
    fs::write(base.join("config.json"), config.replace(r#""model_type": "llama""#, r#""model_type": "smollm3""#))
        .unwrap();
    finetune(dir.path(), &base, "").ok();
    litgpt(dir.path(), ["merge_lora", "out/final", "--format", "gguf"]).refused(1, &["smollm3", "GGUF", "merge as hf"]);
    assert!(!dir.path().join("out/final/merged").exists());
    litgpt(dir.path(), ["merge_lora", "out/final", "--gguf_type", "q8_0"])
        .refused(2, &["--gguf_type", "--format gguf"]);
    litgpt(dir.path(), ["merge_lora", "out/final", "--format", "gguf", "--precision", "32-true"])
        .refused(2, &["--precision", "--gguf_type"]);
}
