//! Prompts, tokenizer and training samples against LitGPT's, from `shared/golden/text`.
//!
//! The folder is found by `LITGPT_GOLDEN` (default `../shared/golden`); without it these tests say so and pass.
#![allow(clippy::print_stderr, clippy::unwrap_used)]

use std::path::{Path, PathBuf};

use litgpt::data::prompt::{self, PromptStyle};
use litgpt::data::sft::{Encoder, Sample, collate_padded};
use litgpt::data::{Content, Origin, Record};
use litgpt::tokenizer::{AddBos, Tokenizer};
use serde_json::Value;

/// Styles that LitGPT has no key for, so that there is no golden for them; unit tests in `prompt.rs` cover them.
const WITHOUT_GOLDEN: [&str; 3] = ["falcon3", "r1", "chatml"];

fn text_dir() -> Option<PathBuf> {
    let golden = std::env::var_os("LITGPT_GOLDEN").map_or_else(|| PathBuf::from("../shared/golden"), PathBuf::from);
    let dir = golden.join("text");
    if dir.is_dir() {
        return Some(dir);
    }
    eprintln!("no golden texts at `{}`: skipped", dir.display());
    None
}

fn golden(name: &str) -> Option<(PathBuf, Value)> {
    let dir = text_dir()?;
    let Ok(text) = std::fs::read_to_string(dir.join(name)) else {
        eprintln!("no `{name}` in `{}`: skipped", dir.display());
        return None;
    };
    Some((dir, serde_json::from_str(&text).unwrap()))
}

/// The tokenizers beside the goldens, with the BOS policy that `tokenize.json` says LitGPT had.
fn tokenizers(dir: &Path) -> Vec<Tokenizer> {
    let use_bos = golden("tokenize.json").is_none_or(|(_, golden)| golden["use_bos"].as_bool().unwrap());
    let folders = std::fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().path());
    let folders = folders.filter(|path| path.join("tokenizer.json").is_file());
    let policy = if use_bos { AddBos::Always } else { AddBos::Never };
    folders.map(|path| Tokenizer::load(&path).unwrap().with_bos(policy)).collect()
}

fn list<T: serde::de::DeserializeOwned>(value: &Value) -> T {
    T::deserialize(value).unwrap()
}

#[test]
fn prompts_are_litgpts() {
    let Some((_, golden)) = golden("prompts.json") else { return };
    let system = golden["system"].as_str().unwrap();
    let samples = golden["samples"].as_array().unwrap();
    let styles = golden["styles"].as_object().unwrap();
    for (name, expected) in styles {
        let style = PromptStyle::by_name(name).unwrap();
        assert_eq!(style.name(), name);
        let apply = |sample: &Value, sys| {
            style.apply(sample["instruction"].as_str().unwrap(), sample["input"].as_str(), sys).unwrap()
        };
        for (sample, text) in samples.iter().zip(expected["prompts"].as_array().unwrap()) {
            assert_eq!(apply(sample, None), text.as_str().unwrap(), "{name}");
        }
        assert_eq!(apply(&samples[0], Some(system)), expected["with_system"].as_str().unwrap(), "{name}");
    }
    let untested: Vec<_> = prompt::names().filter(|name| !styles.contains_key(*name)).collect();
    assert_eq!(untested, WITHOUT_GOLDEN);
}

#[test]
fn ids_and_texts_are_litgpts() {
    let Some((dir, golden)) = golden("tokenize.json") else { return };
    for t in tokenizers(&dir) {
        let (bos, eos) = (t.bos_id().unwrap(), t.eos_id().unwrap());
        assert_eq!(u64::from(bos), golden["bos_id"].as_u64().unwrap());
        assert_eq!(u64::from(eos), golden["eos_id"].as_u64().unwrap());
        assert_eq!(t.vocab_size() as u64, golden["vocab_size"].as_u64().unwrap());
        for entry in golden["entries"].as_array().unwrap() {
            let text = entry["text"].as_str().unwrap();
            let ids = t.encode(text).unwrap();
            // LitGPT takes a BOS at the start, or an EOS at the end, that is written out in the text for its own
            // addition, and drops it. We keep what is written.
            let begin = usize::from(ids.first() == Some(&bos));
            let end = ids.len() - usize::from(ids.len() > begin && ids.last() == Some(&eos));
            assert_eq!(ids[begin..end], list::<Vec<u32>>(&entry["ids"]), "{text:?}");
            let mut prompt = t.encode_prompt(text).unwrap();
            assert_eq!(prompt[..end + 1 - begin], list::<Vec<u32>>(&entry["default"]), "{text:?}");
            if prompt.last() != Some(&eos) {
                prompt.push(eos);
            }
            assert_eq!(prompt, list::<Vec<u32>>(&entry["bos_eos"]), "{text:?}");
            let decoded = entry["decoded"].as_str().unwrap();
            assert_eq!(t.decode(&ids).unwrap(), decoded);
            let mut stream = t.stream();
            let mut streamed: String = ids.iter().filter_map(|&id| stream.push(id).unwrap()).collect();
            assert!(!streamed.contains('\u{fffd}'), "{text:?}");
            streamed.extend(stream.finish().unwrap());
            assert_eq!(streamed, decoded);
        }
    }
}

/// The records that `golden` was made of: rows of the data file beside the golden folder.
fn records(dir: &Path, golden: &Value) -> Option<Vec<Record>> {
    let path = dir.join("../..").join(golden["data"].as_str().unwrap());
    let Ok(text) = std::fs::read_to_string(&path) else {
        eprintln!("no `{}`: skipped", path.display());
        return None;
    };
    let rows: Value = serde_json::from_str(&text).unwrap();
    let record = |&row: &usize| Record {
        content: Content::Instruction {
            instruction: list(&rows[row]["instruction"]),
            input: list(&rows[row]["input"]),
            sys_prompt: None,
            output: list(&rows[row]["output"]),
        },
        row: Origin { file: 0, row: row + 1 },
    };
    Some(list::<Vec<usize>>(&golden["rows"]).iter().map(record).collect())
}

#[test]
fn samples_are_litgpts() {
    let Some((dir, golden)) = golden("sft_alpaca.json") else { return };
    let Some(records) = records(&dir, &golden) else { return };
    let style = PromptStyle::by_name(golden["style"].as_str().unwrap()).unwrap();
    let ignore_index: i32 = list(&golden["ignore_index"]);
    for tokenizer in &tokenizers(&dir) {
        for (variant, expected) in golden["variants"].as_object().unwrap() {
            let (mask_prompt, max_seq_length) = settings(variant);
            let encoder =
                Encoder { tokenizer, style: &style, mask_prompt: Some(mask_prompt), ignore_index, max_seq_length };
            let samples = encoder.encode_all(&records, &|_| ()).unwrap();
            let expected = expected.as_array().unwrap();
            assert_eq!(samples.len(), expected.len());
            for (sample, expected) in samples.iter().zip(expected) {
                let at = format!("{variant}, row {}", sample.row.row);
                assert_eq!(sample.input_ids, list::<Vec<u32>>(&expected["input_ids"]), "{at}");
                assert_eq!(sample.labels, list::<Vec<i32>>(&expected["labels"]), "{at}");
            }
            if mask_prompt && max_seq_length == golden["collated"]["max_seq_length"].as_u64().map(|n| n as usize) {
                batch_is_litgpts(&samples, &golden["collated"], ignore_index);
            }
        }
    }
}

fn batch_is_litgpts(samples: &[Sample], golden: &Value, ignore_index: i32) {
    let rows: Vec<&Sample> = list::<Vec<usize>>(&golden["rows"]).iter().map(|&row| &samples[row]).collect();
    let (ids, labels) = collate_padded(&rows, list(&golden["pad_id"]), ignore_index);
    assert_eq!(ids, list::<Vec<Vec<u32>>>(&golden["input_ids"]));
    assert_eq!(labels, list::<Vec<Vec<i32>>>(&golden["labels"]));
}

/// `mask_prompt=true,max_seq_length=128` (or `unlimited`).
fn settings(variant: &str) -> (bool, Option<usize>) {
    let value = |key: &str| variant.split(',').find_map(|part| part.strip_prefix(key)?.strip_prefix('=')).unwrap();
    (value("mask_prompt") == "true", value("max_seq_length").parse().ok())
}
