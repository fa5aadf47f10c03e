//! Chat templates, and what begins and ends a text, against transformers: `tests/data/chat.json`, which
//! `tests/data/make_chat.py` wrote.
#![allow(clippy::unwrap_used)]

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::path::PathBuf;

use litgpt::data::chat::{ChatTemplate, Message};
use litgpt::data::prompt::PromptStyle;
use litgpt::data::sft::Encoder;
use litgpt::data::{Content, Origin, Record};
use litgpt::tokenizer::Tokenizer;
use serde::Deserialize;

use crate::util::root;

#[derive(Deserialize)]
struct Golden {
    conversations: BTreeMap<String, Vec<Message>>,
    texts: Vec<Rendered>,
    tokenizers: BTreeMap<String, Special>,
}

#[derive(Deserialize)]
struct Rendered {
    template: String,
    conversation: String,
    add_generation_prompt: bool,
    text: Option<String>,
    error: Option<String>,
}

#[derive(Deserialize)]
struct Special {
    bos: Option<u32>,
    eos: Option<u32>,
    texts: Vec<Text>,
    conversations: Vec<Tokenized>,
}

#[derive(Deserialize)]
struct Text {
    text: String,
    ids: Vec<u32>,
}

#[derive(Deserialize)]
struct Tokenized {
    conversation: String,
    ids: Vec<u32>,
}

fn data() -> PathBuf {
    root().join("tests/data")
}

fn golden() -> Golden {
    serde_json::from_str(&fs::read_to_string(data().join("chat.json")).unwrap()).unwrap()
}

#[test]
fn templates_write_what_transformers_writes() {
    let golden = golden();
    let mut templates = BTreeMap::new();
    let mut refused = 0;
    for rendered in &golden.texts {
        let at = format!("{}, {}, {}", rendered.template, rendered.conversation, rendered.add_generation_prompt);
        let template = templates.entry(&rendered.template).or_insert_with(|| {
            let source = fs::read_to_string(data().join(format!("chat/{}.jinja", rendered.template))).unwrap();
            ChatTemplate::new(Path::new("chat_template.jinja"), &source, "<s>", "</s>").unwrap()
        });
        let got = template.render(&golden.conversations[&rendered.conversation], rendered.add_generation_prompt);
        match (&rendered.text, &rendered.error) {
            (Some(text), None) => assert_eq!(got.unwrap(), *text, "{at}"),
            (None, Some(error)) => {
                refused += 1;
                let got = got.unwrap_err().to_string();
                assert!(got.contains(error.as_str()), "{at}: {got}");
            }
            _ => panic!("{at}"),
        }
    }
    assert_eq!((templates.len(), golden.texts.len() > 100, refused > 5), (7, true, true));
}

/// Every answer is found in the whole text, in each template: where it begins, a prompt would have ended.
#[test]
fn answers_are_found_in_every_template() {
    let golden = golden();
    let templates =
        golden.tokenizers.keys().map(|name| Tokenizer::load(&data().join("tokenizers").join(name)).unwrap());
    for tokenizer in templates {
        let template = ChatTemplate::of(&tokenizer).unwrap();
        let (text, ranges) = template.answers(&golden.conversations["two turns"]).unwrap();
        let said: Vec<&str> = ranges.iter().map(|range| &text[range.clone()]).collect();
        let at = tokenizer.dir().display();
        assert!(said.len() == 2 && said[0].contains("A red mammal.") && said[1].contains("A bird."), "{at}: {said:?}");
        assert!(said.iter().all(|said| !said.contains("fox") && !said.contains("hen")), "{at}: {said:?}");
        assert!(said[1].trim_end().len() > "A bird.".len(), "{at}: no end mark in {said:?}");
    }
}

#[test]
fn texts_begin_and_end_as_with_transformers() {
    let golden = golden();
    assert!(golden.tokenizers.len() >= 6);
    let mut with_bos = 0;
    for (name, special) in &golden.tokenizers {
        let tokenizer = Tokenizer::load(&data().join("tokenizers").join(name)).unwrap();
        assert_eq!((tokenizer.bos_id(), tokenizer.eos_id()), (special.bos, special.eos), "{name}");
        for Text { text, ids } in &special.texts {
            assert_eq!(tokenizer.encode_prompt(text).unwrap(), *ids, "{name}: {text:?}");
        }
        with_bos += usize::from(tokenizer.adds_bos());
        // EOS once, whether the answer has it already or not; never BOS.
        let eos = special.eos.unwrap();
        let mark = tokenizer.id_to_token(eos).unwrap();
        let answer = tokenizer.encode_answer("a fox").unwrap();
        assert_eq!(answer, tokenizer.encode_answer(&format!("a fox{mark}")).unwrap(), "{name}");
        assert_eq!(answer.iter().filter(|id| **id == eos).count(), 1, "{name}");
        assert!(answer.last() == Some(&eos) && answer.first().copied() != special.bos, "{name}");
    }
    assert_eq!(with_bos, 4, "gemma, llama-3, mistral, zephyr");
}

#[test]
fn conversations_have_the_ids_of_transformers() {
    let golden = golden();
    for (name, special) in &golden.tokenizers {
        let tokenizer = Tokenizer::load(&data().join("tokenizers").join(name)).unwrap();
        let style = PromptStyle::resolve("chat", &tokenizer).unwrap();
        for Tokenized { conversation, ids } in &special.conversations {
            let messages = golden.conversations[conversation].clone();
            if !messages.last().unwrap().is_answer() {
                assert_eq!(tokenizer.encode(&template_text(&tokenizer, &messages)).unwrap(), *ids, "{name}");
                continue;
            }
            let record = Record {
                content: Content::Conversation { messages, tools: Vec::new() },
                row: Origin { file: 0, row: 1 },
            };
            let encoder = Encoder {
                tokenizer: &tokenizer,
                style: &style,
                mask_prompt: None,
                ignore_index: -100,
                max_seq_length: None,
            };
            let sample = encoder.encode(&record).unwrap();
            let mut expected = ids.clone();
            let ends = |id: &u32| tokenizer.eos_ids().contains(id);
            if !expected.iter().rev().take(2).any(ends) {
                expected.push(special.eos.unwrap()); // else the model would not learn to stop
            }
            assert_eq!(sample.input_ids, expected, "{name}, {conversation}");
            let bos = sample.input_ids.iter().filter(|id| Some(**id) == special.bos && special.bos != special.eos);
            assert!(bos.count() <= 1, "{name}");
            // What ends the last answer is learned, the first question is not.
            assert!(sample.prompt_len > 3 && sample.labels[..sample.prompt_len].iter().all(|label| *label == -100));
            let end = sample.input_ids.iter().rposition(ends).unwrap();
            assert_eq!(sample.labels[end], sample.input_ids[end] as i32, "{name}, {conversation}");
        }
    }
}

fn template_text(tokenizer: &Tokenizer, messages: &[Message]) -> String {
    ChatTemplate::of(tokenizer).unwrap().render(messages, false).unwrap()
}
