//! tokenizer.json in the words of GGUF: tokens with their types, merges, special tokens, and by which rule of llama.cpp's
//! a text is cut into words. The rule follows from the file's structure; one that llama.cpp has no name for is refused,
//! since under another rule the model would read other tokens than it learned.

use super::write::{Settings, Value};
use crate::error::{Error, Result};
use serde_json::Value as Json;
use std::collections::HashMap;
use std::path::Path;

const HINT: &str = "merge as hf and use that folder";

/// What a model's tokenizer is, besides its architecture.
#[derive(Debug, Clone, Copy)]
pub struct Words<'a> {
    /// tokenizer.json.
    pub json: &'a str,
    /// Where that stands, for messages.
    pub path: &'a Path,
    /// The token that begins a text.
    pub bos: Option<u32>,
    /// The token that ends an answer.
    pub eos: Option<u32>,
    /// Whether a prompt begins with `bos`.
    pub add_bos: bool,
    /// The chat template.
    pub chat_template: Option<&'a str>,
}

/// Patterns by which a text is cut, as tokenizer.json has them, and llama.cpp's names for them.
pub const PATTERNS: &[(&str, &str)] = &[
    (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
        "llama-bpe",
    ),
    (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
        "qwen2",
    ),
    (
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
        "tekken",
    ),
];

/// Type of a token that merges give.
pub const NORMAL: i32 = 1;
/// Type of the token for what has none.
pub const UNKNOWN: i32 = 2;
/// Type of special tokens.
pub const CONTROL: i32 = 3;
/// Type of added tokens that are text.
pub const USER_DEFINED: i32 = 4;
/// Type of what fills the vocabulary up to the model's rows.
pub const UNUSED: i32 = 5;
/// Type of a token for one byte.
pub const BYTE: i32 = 6;

impl Words<'_> {
    /// All settings of the tokenizer of a model with `rows` embeddings, whose padding token is `pad`.
    ///
    /// # Errors
    /// When the file is broken or of a kind that llama.cpp does not know.
    pub fn settings(&self, rows: usize, pad: Option<usize>) -> Result<Settings> {
        let json: Json = serde_json::from_str(self.json).map_err(|e| self.broken(&format!("not JSON: {e}")))?;
        if json["model"]["type"].as_str().is_some_and(|kind| kind != "BPE") {
            return Err(self.unknown(&format!("the {} tokenizer", json["model"]["type"])));
        }
        let merges = self.merges(&json)?;
        let (tokens, types) = self.tokens(&json, rows)?;
        let mut settings = Settings::new();
        let mut set = |key: &str, value: Value| settings.push((format!("tokenizer.ggml.{key}"), value));
        if json["model"]["byte_fallback"] == true {
            set("model", Value::Text("llama".to_owned()));
            set("pre", Value::Text("default".to_owned()));
            set("scores", Value::F32s(scores(&tokens, &merges)));
            set("add_space_prefix", Value::Bool(prefixed(&json)));
            set("tokens", Value::Texts(tokens));
        } else {
            set("model", Value::Text("gpt2".to_owned()));
            set("pre", Value::Text(pre(&json).ok_or_else(|| self.unknown("this pre_tokenizer"))?.to_owned()));
            set("tokens", Value::Texts(tokens));
            set("merges", Value::Texts(merges.iter().map(joined).collect()));
        }
        set("token_type", Value::I32s(types));
        let pad = pad.and_then(|id| u32::try_from(id).ok()).filter(|id| (*id as usize) < rows);
        for (key, id) in [("bos", self.bos), ("eos", self.eos), ("padding", pad)] {
            id.into_iter().for_each(|id| set(&format!("{key}_token_id"), Value::U32(id)));
        }
        set("add_bos_token", Value::Bool(self.add_bos));
        set("add_eos_token", Value::Bool(false));
        if let Some(template) = self.chat_template {
            settings.push(("tokenizer.chat_template".to_owned(), Value::Text(template.to_owned())));
        }
        Ok(settings)
    }

    fn broken(&self, problem: &str) -> Error {
        Error::invalid(self.path, problem, "download the checkpoint again")
    }

    fn unknown(&self, what: &str) -> Error {
        Error::unsupported(format!("{what} as GGUF (`{}`)", self.path.display()), HINT)
    }

    /// Tokens by id with their types; ids without a token are filled up to `rows`.
    fn tokens(&self, json: &Json, rows: usize) -> Result<(Vec<String>, Vec<i32>)> {
        let mut tokens: Vec<String> = (0..rows).map(|id| format!("[PAD{id}]")).collect();
        let mut types = vec![UNUSED; rows];
        let mut place = |token: &str, id: Option<u64>, kind: i32| -> Result<()> {
            let id = id.and_then(|id| usize::try_from(id).ok()).filter(|id| *id < rows);
            let id = id.ok_or_else(|| self.broken(&format!("token `{token}` has no id that the model has")))?;
            token.clone_into(&mut tokens[id]);
            types[id] = kind;
            Ok(())
        };
        let bytes = json["model"]["byte_fallback"] == true;
        let vocab = json["model"]["vocab"].as_object().ok_or_else(|| self.broken("no `model.vocab` object"))?;
        for (token, id) in vocab {
            let byte = bytes && token.len() == 6 && token.starts_with("<0x") && token.ends_with('>');
            place(token, id.as_u64(), if byte { BYTE } else { NORMAL })?;
        }
        let unknown = json["model"]["unk_token"].as_str().filter(|_| bytes);
        for added in json["added_tokens"].as_array().into_iter().flatten() {
            let token = added["content"].as_str().ok_or_else(|| self.broken("an added token without `content`"))?;
            let kind = match added["special"].as_bool() {
                _ if Some(token) == unknown => UNKNOWN,
                Some(true) => CONTROL,
                _ => USER_DEFINED,
            };
            place(token, added["id"].as_u64(), kind)?;
        }
        Ok((tokens, types))
    }

    /// Pairs that are merged, the first ones first; files have them as `"a b"` or `["a", "b"]`.
    fn merges(&self, json: &Json) -> Result<Vec<[String; 2]>> {
        let list = json["model"]["merges"].as_array().ok_or_else(|| self.broken("no `model.merges` list"))?;
        let pair = |merge: &Json| {
            let (a, b) = match merge {
                Json::String(text) => text.split_once(' ')?,
                _ => (merge[0].as_str()?, merge[1].as_str()?),
            };
            Some([a.to_owned(), b.to_owned()])
        };
        let broken = |merge: &Json| self.broken(&format!("merge {merge} is not a pair"));
        list.iter().map(|merge| pair(merge).ok_or_else(|| broken(merge))).collect()
    }
}

/// A merge as GGUF has it: blanks within the parts are written as byte-level BPE writes them.
fn joined([a, b]: &[String; 2]) -> String {
    format!("{} {}", a.replace(' ', "Ġ"), b.replace(' ', "Ġ"))
}

/// SentencePiece merges the pair of highest score first: the rank of a token's first merge gives the same order.
fn scores(tokens: &[String], merges: &[[String; 2]]) -> Vec<f32> {
    let mut ranks = HashMap::new();
    for (rank, [a, b]) in merges.iter().enumerate() {
        ranks.entry(format!("{a}{b}")).or_insert(rank);
    }
    let last = merges.len();
    tokens.iter().map(|token| -(*ranks.get(token).unwrap_or(&last) as f32)).collect()
}

/// Whether a text begins with a blank that it does not have.
fn prefixed(json: &Json) -> bool {
    let normalizers = parts(&json["normalizer"], "normalizers");
    let cutters = parts(&json["pre_tokenizer"], "pretokenizers");
    normalizers.iter().any(|n| n["type"] == "Prepend")
        || cutters
            .iter()
            .any(|p| p["type"] == "Metaspace" && p["prepend_scheme"] != "never" && p["add_prefix_space"] != false)
}

/// The members of a sequence, or the one that stands alone.
fn parts<'a>(json: &'a Json, key: &str) -> Vec<&'a Json> {
    match json[key].as_array() {
        Some(list) => list.iter().collect(),
        None if json.is_null() => Vec::new(),
        None => vec![json],
    }
}

/// llama.cpp's name for the rule that cuts a text into words.
fn pre(json: &Json) -> Option<&'static str> {
    let cutters = parts(&json["pre_tokenizer"], "pretokenizers");
    let (last, before) = cutters.split_last()?;
    if last["type"] != "ByteLevel" || last["add_prefix_space"] == true {
        return None;
    }
    let own = last["use_regex"] != false;
    match before {
        [] if own => Some("gpt-2"),
        [digits] if own && digits["type"] == "Digits" && digits["individual_digits"] == true => Some("smollm"),
        [split] if !own && split["type"] == "Split" && split["behavior"] == "Isolated" && split["invert"] != true => {
            let pattern = split["pattern"]["Regex"].as_str()?;
            PATTERNS.iter().find(|(known, _)| *known == pattern).map(|p| p.1)
        }
        _ => None,
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn the_rule_follows_from_the_structure() {
        let level = |regex: bool| json!({"type": "ByteLevel", "add_prefix_space": false, "use_regex": regex});
        let split = |pattern: &str| json!({"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated"});
        let sequence = |first: Json, last: Json| {
            pre(&json!({"pre_tokenizer": {"type": "Sequence", "pretokenizers": [first, last]}}))
        };
        assert_eq!(pre(&json!({"pre_tokenizer": level(true)})), Some("gpt-2"));
        assert_eq!(sequence(json!({"type": "Digits", "individual_digits": true}), level(true)), Some("smollm"));
        assert_eq!(sequence(json!({"type": "Digits", "individual_digits": false}), level(true)), None);
        for (pattern, name) in PATTERNS {
            assert_eq!(sequence(split(pattern), level(false)), Some(*name));
            assert_eq!(sequence(split(pattern), level(true)), None);
        }
        assert_eq!(sequence(split(r"\p{L}+"), level(false)), None);
        assert_eq!(pre(&json!({"pre_tokenizer": null})), None);
    }

    fn settings(json: &Json, rows: usize) -> Result<HashMap<String, Value>> {
        let (json, path) = (json.to_string(), Path::new("tokenizer.json"));
        let template = Some("{{ x }}");
        let words = Words { json: &json, path, bos: Some(0), eos: None, add_bos: true, chat_template: template };
        Ok(words.settings(rows, Some(rows))?.into_iter().collect())
    }

    #[test]
    fn sentencepiece_tokens_have_types_and_scores() {
        let json = json!({
            "added_tokens": [{"id": 0, "content": "<s>", "special": true}, {"id": 1, "content": "<unk>", "special": true},
                {"id": 6, "content": "<more>", "special": false}],
            "normalizer": {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "▁"}]},
            "pre_tokenizer": null,
            "model": {"type": "BPE", "byte_fallback": true, "unk_token": "<unk>", "merges": ["a b", ["ab", "a"]],
                "vocab": {"<s>": 0, "<unk>": 1, "<0x0A>": 2, "aba": 3, "ab": 4, "a": 5}}
        });
        let found = settings(&json, 8).unwrap();
        let Value::I32s(types) = &found["tokenizer.ggml.token_type"] else { panic!("no types") };
        assert_eq!(types, &[CONTROL, UNKNOWN, BYTE, NORMAL, NORMAL, NORMAL, USER_DEFINED, UNUSED]);
        let Value::F32s(scores) = &found["tokenizer.ggml.scores"] else { panic!("no scores") };
        assert_eq!(scores[3..6], [-1.0, 0.0, -2.0]);
        assert!(matches!(found["tokenizer.ggml.add_space_prefix"], Value::Bool(true)));
        assert!(matches!(&found["tokenizer.chat_template"], Value::Text(text) if text == "{{ x }}"));
        assert!(!found.contains_key("tokenizer.ggml.padding_token_id"), "the model has no such row");
        assert!(settings(&json, 6).unwrap_err().to_string().contains("<more>"));
    }

    #[test]
    fn a_tokenizer_without_a_name_is_refused() {
        for model in [json!({"type": "Unigram"}), json!({"type": "BPE", "merges": [], "vocab": {}})] {
            assert!(matches!(settings(&json!({"model": model}), 1), Err(Error::Unsupported { .. })));
        }
    }
}
