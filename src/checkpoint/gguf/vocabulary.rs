//! The tokenizer of a GGUF file as the files it was made from: tokenizer.json, tokenizer_config.json and
//! generation_config.json.
//!
//! `gpt2` is byte-level BPE, whose rule for cutting a text into words has a name; an unknown name is refused, since under
//! another rule the model would read other tokens than it learned. `llama` is SentencePiece's BPE, which has scores
//! instead of merges: a pair is merged before another if the score of the token that it gives is higher.

use super::read::Metadata;
use super::tokenizer::{BYTE, CONTROL, NORMAL, PATTERNS, UNKNOWN, USER_DEFINED};
use crate::error::Result;
use serde_json::{Map, Value, json};
use std::collections::{BTreeMap, HashMap};

const HINT: &str = "use the Hugging Face folder of this model";
/// Longest token, bytes: every cut of it in two is tried.
const LONGEST: usize = 4096;

/// The files of the tokenizer, for a model of `rows` embeddings and a context of `context` tokens.
///
/// # Errors
/// When the file has no tokenizer, or a broken one, or one of a kind that is not read.
pub fn files(metadata: &Metadata, rows: usize, context: usize) -> Result<BTreeMap<&'static str, String>> {
    let vocabulary = Vocabulary::read(metadata, rows)?;
    let files = [
        ("tokenizer.json", vocabulary.tokenizer()?),
        ("tokenizer_config.json", vocabulary.config(context)?),
        ("generation_config.json", vocabulary.generation()?),
    ];
    Ok(files.into_iter().map(|(name, json)| (name, format!("{json:#}"))).collect())
}

struct Vocabulary<'a> {
    metadata: &'a Metadata,
    tokens: &'a [String],
    types: Vec<i32>,
    /// Byte-level BPE's name of its rule; SentencePiece has none.
    pre: Option<&'a str>,
}

impl<'a> Vocabulary<'a> {
    fn read(metadata: &'a Metadata, rows: usize) -> Result<Self> {
        let needed = |key: &str| metadata.need(key, metadata.text(key)?);
        let pre = match needed("tokenizer.ggml.model")? {
            "gpt2" => Some(needed("tokenizer.ggml.pre")?),
            "llama" => None,
            other => {
                let hint = format!("tokenizers of the types gpt2 and llama are read; {HINT}");
                return Err(metadata.unsupported(&format!("`tokenizer.ggml.model` {other}"), &hint));
            }
        };
        let key = "tokenizer.ggml.tokens";
        let tokens = metadata.need(key, metadata.texts(key)?)?;
        if tokens.len() != rows {
            let problem = format!("`{key}` has {} tokens and `token_embd.weight` {rows} rows", tokens.len());
            return Err(metadata.invalid(problem));
        }
        if let Some(id) = tokens.iter().position(|token| token.len() > LONGEST) {
            return Err(metadata.invalid(format!("`{key}`: token {id} is longer than any tokenizer has")));
        }
        let types = metadata.ints("tokenizer.ggml.token_type")?;
        let types = types.map_or(vec![NORMAL; rows], |types| types.iter().map(|kind| *kind as i32).collect());
        if types.len() != rows {
            let problem = format!("`tokenizer.ggml.token_type` has {} elements and `{key}` {rows}", types.len());
            return Err(metadata.invalid(problem));
        }
        Ok(Self { metadata, tokens, types, pre })
    }

    /// Id and text of the tokens that are of one of `kinds`.
    fn of(&self, kinds: &'a [i32]) -> impl Iterator<Item = (usize, &'a str)> {
        let all = self.tokens.iter().zip(&self.types).enumerate();
        all.filter(|(_, (_, kind))| kinds.contains(kind)).map(|(id, (token, _))| (id, token.as_str()))
    }

    /// The token that the setting `key` names, if it is there.
    fn special(&self, key: &str) -> Result<Option<&'a str>> {
        let key = format!("tokenizer.ggml.{key}_token_id");
        let Some(id) = self.metadata.count(&key)? else { return Ok(None) };
        let outside = || self.metadata.invalid(format!("`{key}` is {id}, and there are {} tokens", self.tokens.len()));
        self.tokens.get(id).map(|token| Some(token.as_str())).ok_or_else(outside)
    }

    /// Whether a text begins with BOS: SentencePiece's and Llama 3's do where the file says nothing.
    fn adds_bos(&self) -> Result<bool> {
        let default = matches!(self.pre, None | Some("llama-bpe" | "tekken"));
        Ok(self.metadata.flag("tokenizer.ggml.add_bos_token")?.unwrap_or(default))
    }

    fn tokenizer(&self) -> Result<Value> {
        let (normalizer, pre_tokenizer, decoder, model) = match self.pre {
            Some(pre) => self.byte_level(pre)?,
            None => self.sentence_piece()?,
        };
        let added: Vec<Value> = self
            .of(&[CONTROL, UNKNOWN, USER_DEFINED])
            .map(|(id, token)| {
                json!({"id": id, "content": token, "single_word": false, "lstrip": false, "rstrip": false,
                    "normalized": false, "special": self.types[id] != USER_DEFINED})
            })
            .collect();
        Ok(json!({
            "version": "1.0", "truncation": null, "padding": null, "added_tokens": added, "normalizer": normalizer,
            "pre_tokenizer": pre_tokenizer, "post_processor": self.post_processor()?, "decoder": decoder, "model": model
        }))
    }

    /// Puts BOS before a text; transformers goes by it.
    fn post_processor(&self) -> Result<Value> {
        let Some(bos) = self.special("bos")?.filter(|_| self.adds_bos().is_ok_and(|adds| adds)) else {
            return Ok(Value::Null);
        };
        let id = self.metadata.count("tokenizer.ggml.bos_token_id")?;
        let token = |kind: u32| json!({"SpecialToken": {"id": bos, "type_id": kind}});
        let text = |name: &str, kind: u32| json!({"Sequence": {"id": name, "type_id": kind}});
        Ok(json!({
            "type": "TemplateProcessing", "single": [token(0), text("A", 0)],
            "pair": [token(0), text("A", 0), token(1), text("B", 1)],
            "special_tokens": {bos: {"id": bos, "ids": [id], "tokens": [bos]}}
        }))
    }

    /// Normalizer, pre-tokenizer, decoder and model of byte-level BPE.
    fn byte_level(&self, pre: &str) -> Result<(Value, Value, Value, Value)> {
        let level = |regex: bool| json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": regex});
        let sequence = |first: Value, last: Value| json!({"type": "Sequence", "pretokenizers": [first, last]});
        let cutter = match pre {
            "gpt-2" => level(true),
            "smollm" => sequence(json!({"type": "Digits", "individual_digits": true}), level(true)),
            _ => {
                let hint = || {
                    let known: Vec<&str> = PATTERNS.iter().map(|pattern| pattern.1).collect();
                    format!("gpt-2, smollm, {} are read; {HINT}", known.join(", "))
                };
                let pattern = PATTERNS
                    .iter()
                    .find(|pattern| pattern.1 == pre)
                    .ok_or_else(|| self.metadata.unsupported(&format!("`tokenizer.ggml.pre` {pre}"), &hint()))?;
                let split = json!({"type": "Split", "pattern": {"Regex": pattern.0}, "behavior": "Isolated",
                    "invert": false});
                sequence(split, level(false))
            }
        };
        let normalizer = if pre == "qwen2" { json!({"type": "NFC"}) } else { Value::Null };
        let ids = self.ids(&[NORMAL, CONTROL, UNKNOWN, USER_DEFINED, BYTE])?;
        let merges = self.merges(&ids)?;
        // llama.cpp takes a word that is a token as it is under these rules, as their tokenizers do.
        let whole_words = matches!(pre, "llama-bpe" | "tekken");
        let model = bpe(&ids, &merges, None, whole_words);
        Ok((normalizer, cutter, level(true), model))
    }

    /// Ids of the tokens of `kinds`; what fills the vocabulary up to the model's rows is no token.
    fn ids(&self, kinds: &'a [i32]) -> Result<HashMap<&'a str, usize>> {
        let mut ids = HashMap::new();
        for (id, token) in self.of(kinds) {
            if let Some(first) = ids.insert(token, id) {
                let problem = format!("`tokenizer.ggml.tokens`: tokens {first} and {id} are the same");
                return Err(self.metadata.invalid(problem));
            }
        }
        Ok(ids)
    }

    /// The pairs of `tokenizer.ggml.merges`, of tokens that are there.
    fn merges(&self, ids: &HashMap<&str, usize>) -> Result<Vec<(&'a str, &'a str)>> {
        let key = "tokenizer.ggml.merges";
        let list = self.metadata.need(key, self.metadata.texts(key)?)?;
        let pair = |merge: &'a String| {
            let (a, b) = merge.split_once(' ')?;
            (ids.contains_key(a) && ids.contains_key(b) && ids.contains_key(format!("{a}{b}").as_str()))
                .then_some((a, b))
        };
        let broken =
            |index: usize| self.metadata.invalid(format!("`{key}`: merge {index} is not of two tokens to one"));
        list.iter().enumerate().map(|(index, merge)| pair(merge).ok_or_else(|| broken(index))).collect()
    }

    /// Normalizer, pre-tokenizer, decoder and model of SentencePiece's BPE.
    fn sentence_piece(&self) -> Result<(Value, Value, Value, Value)> {
        let prefix = self.metadata.flag("tokenizer.ggml.add_space_prefix")?.unwrap_or(true);
        let mut normalizers = vec![json!({"type": "Replace", "pattern": {"String": " "}, "content": "▁"})];
        let mut decoders = vec![
            json!({"type": "Replace", "pattern": {"String": "▁"}, "content": " "}),
            json!({"type": "ByteFallback"}),
            json!({"type": "Fuse"}),
        ];
        if prefix {
            normalizers.insert(0, json!({"type": "Prepend", "prepend": "▁"}));
            decoders.push(json!({"type": "Strip", "content": " ", "start": 1, "stop": 0}));
        }
        let unknown = self.special("unknown")?.or_else(|| self.of(&[UNKNOWN]).next().map(|(_, token)| token));
        let ids = self.ids(&[NORMAL, CONTROL, UNKNOWN, USER_DEFINED, BYTE])?;
        let model = bpe(&ids, &self.ranked()?, Some(unknown), false);
        let sequence = |key: &str, list: Vec<Value>| json!({"type": "Sequence", key: list});
        Ok((sequence("normalizers", normalizers), Value::Null, sequence("decoders", decoders), model))
    }

    /// The merges that follow from the scores, in the order that transformers gives them.
    fn ranked(&self) -> Result<Vec<(&'a str, &'a str)>> {
        let key = "tokenizer.ggml.scores";
        let scores = self.metadata.need(key, self.metadata.floats(key)?)?;
        if scores.len() != self.tokens.len() {
            let problem =
                format!("`{key}` has {} elements and `tokenizer.ggml.tokens` {}", scores.len(), self.tokens.len());
            return Err(self.metadata.invalid(problem));
        }
        let ids = self.ids(&[NORMAL])?;
        let mut merges = Vec::new();
        for (id, token) in self.of(&[NORMAL]) {
            let cuts = token.char_indices().map(|(at, _)| token.split_at(at)).skip(1);
            let pairs = cuts.filter(|(a, b)| ids.contains_key(a) && ids.contains_key(b));
            merges.extend(pairs.map(|(a, b)| (scores[id], a.chars().count(), b.chars().count(), (a, b))));
        }
        merges.sort_by(|x, y| y.0.total_cmp(&x.0).then((y.1, y.2).cmp(&(x.1, x.2))));
        Ok(merges.into_iter().map(|merge| merge.3).collect())
    }

    fn config(&self, context: usize) -> Result<Value> {
        let mut config = json!({
            "tokenizer_class": "PreTrainedTokenizerFast",
            "add_bos_token": self.adds_bos()?,
            "add_eos_token": self.metadata.flag("tokenizer.ggml.add_eos_token")?.unwrap_or(false),
            "clean_up_tokenization_spaces": false,
            "model_max_length": context,
        });
        for (ours, theirs) in [("bos", "bos"), ("eos", "eos"), ("pad", "padding"), ("unk", "unknown")] {
            if let Some(token) = self.special(theirs)? {
                config[format!("{ours}_token")] = json!(token);
            }
        }
        if let Some(template) = self.metadata.text("tokenizer.chat_template")? {
            config["chat_template"] = json!(template);
        }
        Ok(config)
    }

    /// The tokens that begin a text and end an answer.
    fn generation(&self) -> Result<Value> {
        let id = |key: &str| self.metadata.count(&format!("tokenizer.ggml.{key}_token_id"));
        let mut generation = Map::new();
        if let Some(bos) = id("bos")? {
            generation.insert("bos_token_id".to_owned(), json!(bos));
        }
        let mut ends: Vec<usize> = Vec::new();
        for end in ["eos", "eot", "eom"] {
            ends.extend(id(end)?.filter(|end| !ends.contains(end)));
        }
        if !ends.is_empty() {
            generation.insert("eos_token_id".to_owned(), json!(ends));
        }
        Ok(Value::Object(generation))
    }
}

/// The model of tokenizer.json; `unknown` for SentencePiece's, whose unknown characters fall back to their bytes.
fn bpe(ids: &HashMap<&str, usize>, merges: &[(&str, &str)], unknown: Option<Option<&str>>, whole_words: bool) -> Value {
    let mut tokens: Vec<(&str, usize)> = ids.iter().map(|(token, id)| (*token, *id)).collect();
    tokens.sort_unstable_by_key(|token| token.1);
    let vocab: Map<String, Value> = tokens.into_iter().map(|(token, id)| (token.to_owned(), json!(id))).collect();
    json!({
        "type": "BPE", "dropout": null, "unk_token": unknown.flatten(), "continuing_subword_prefix": null,
        "end_of_word_suffix": null, "fuse_unk": unknown.is_some(), "byte_fallback": unknown.is_some(),
        "ignore_merges": whole_words, "vocab": vocab, "merges": merges
    })
}
