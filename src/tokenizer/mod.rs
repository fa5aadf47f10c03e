//! Text to ids and back, and the special tokens of a checkpoint.
//!
//! What is special is read from the checkpoint's own files (`tokenizer.json`, `tokenizer_config.json`,
//! `special_tokens_map.json`, `generation_config.json`, `config.json`), never from its name. Prompt texts are made in
//! `data/prompt`; chat templates are handed out as text only.

mod files;
mod stream;

pub use stream::DecodeStream;

use files::{SpecialFiles, chat_template, files_want_bos, ids, load_vocabulary, one_line, read_text};
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::Arc;

use serde::{Deserialize, Deserializer, Serialize};

use crate::error::{Error, Result, quietly};

/// Whether a prompt begins with the BOS token.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum AddBos {
    /// As the checkpoint's files say.
    #[default]
    Auto,
    /// Yes, whatever the files say.
    Always,
    /// No, whatever the files say.
    Never,
}

impl FromStr for AddBos {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        match text {
            "auto" => Ok(Self::Auto),
            "true" | "always" => Ok(Self::Always),
            "false" | "never" => Ok(Self::Never),
            _ => Err(Error::usage(format!("no such BOS policy: `{text}`"), "use auto, always or never")),
        }
    }
}

impl<'de> Deserialize<'de> for AddBos {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Self, D::Error> {
        #[derive(Deserialize)]
        #[serde(untagged)]
        enum Form {
            Bool(bool),
            Text(String),
        }
        match Form::deserialize(deserializer)? {
            Form::Bool(true) => Ok(Self::Always),
            Form::Bool(false) => Ok(Self::Never),
            Form::Text(text) => text.parse().map_err(serde::de::Error::custom),
        }
    }
}

/// Content of a checkpoint's file by name.
pub type Text<'a> = dyn Fn(&str) -> Result<Option<String>> + 'a;

/// Tokens that a model may have no embedding for.
const STRAY: usize = 256;

/// A checkpoint's tokenizer. Cloning it is cheap.
#[derive(Clone)]
pub struct Tokenizer {
    inner: Arc<tokenizers::Tokenizer>,
    dir: PathBuf,
    policy: AddBos,
    /// What `AddBos::Auto` means here.
    auto_bos: bool,
    bos_id: Option<u32>,
    eos_id: Option<u32>,
    eos_ids: Vec<u32>,
    /// Its source, and the file that it stands in.
    chat_template: Option<(PathBuf, String)>,
    /// Embeddings of the model that reads the ids.
    rows: usize,
}

impl std::fmt::Debug for Tokenizer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Tokenizer").field("dir", &self.dir).field("policy", &self.policy).finish_non_exhaustive()
    }
}

impl Tokenizer {
    /// Reads the tokenizer of the checkpoint in `dir`.
    ///
    /// # Errors
    /// `Missing` without a `tokenizer.json`, `Unsupported` if there is a tokenizer of another form only, `Invalid` if
    /// one of the files is broken.
    pub fn load(dir: &Path) -> Result<Self> {
        Self::of(dir, &|name| read_text(&dir.join(name)))
    }

    /// Reads the tokenizer of the checkpoint `dir`, whose files `text` gives by name; `None` for those that it has not.
    ///
    /// # Errors
    /// Those of [`Tokenizer::load`] and of `text`.
    pub fn of(dir: &Path, text: &Text<'_>) -> Result<Self> {
        let inner = load_vocabulary(dir, text)?;
        let files = SpecialFiles::read(dir, text)?;
        let bos_id = files.id_of(&inner, "bos_token");
        let eos_id = files.id_of(&inner, "eos_token");
        let mut eos_ids = ids(files.generation.get("eos_token_id"));
        if eos_ids.is_empty() {
            eos_ids = ids(files.model.get("eos_token_id"));
        }
        eos_ids.extend(eos_id);
        let mut seen = Vec::new();
        eos_ids.retain(|id| !seen.contains(id) && (seen.push(*id), true).1);
        let auto_bos = files_want_bos(&files.tokenizer, &inner, bos_id);
        let chat_template = chat_template(dir, text, &files.tokenizer)?;
        let (inner, dir) = (Arc::new(inner), dir.to_owned());
        Ok(Self {
            inner,
            dir,
            policy: AddBos::Auto,
            auto_bos,
            bos_id,
            eos_id,
            eos_ids,
            chat_template,
            rows: usize::MAX,
        })
    }

    /// The same tokenizer for a model of `rows` embeddings: a text with another id is refused.
    #[must_use]
    pub fn for_model(self, rows: usize) -> Self {
        Self { rows, ..self }
    }

    /// The same tokenizer under another BOS policy.
    #[must_use]
    pub fn with_bos(self, policy: AddBos) -> Self {
        Self { policy, ..self }
    }

    /// Ids of `text`; special tokens that are written out in it become their ids, none is added.
    ///
    /// # Errors
    /// When the tokenizer fails on the text, or the model has no embedding for a token of it.
    pub fn encode(&self, text: &str) -> Result<Vec<u32>> {
        let encoded = quietly(|| self.inner.encode_fast(text, false));
        let encoding = encoded.ok_or_else(|| self.gave_up())?.map_err(|e| self.failed("encode a text", &e))?;
        self.check(encoding.get_ids())?;
        Ok(encoding.get_ids().to_vec())
    }

    /// Refuses ids that the model has no embedding for.
    fn check(&self, ids: &[u32]) -> Result<()> {
        let Some(id) = ids.iter().find(|id| **id as usize >= self.rows) else { return Ok(()) };
        let token = self.id_to_token(*id).unwrap_or_default();
        let message = format!("a text has the token `{token}` (id {id}), and the model only {} embeddings", self.rows);
        Err(Error::refused(message, "leave it out of the text: it is for other models with this tokenizer"))
    }

    /// Ids of a prompt: BOS goes first if [`Tokenizer::adds_bos`] and `text` does not begin with it already.
    ///
    /// # Errors
    /// As [`Tokenizer::encode`]; `Unsupported` if BOS is forced on a tokenizer that has none.
    pub fn encode_prompt(&self, text: &str) -> Result<Vec<u32>> {
        let mut ids = self.encode(text)?;
        if let Some(bos) = self.require_bos()?.filter(|bos| ids.first() != Some(bos)) {
            ids.insert(0, bos);
        }
        Ok(ids)
    }

    /// The BOS that a prompt begins with, if it does.
    ///
    /// # Errors
    /// `Unsupported` if it is forced on a tokenizer that has none.
    pub fn require_bos(&self) -> Result<Option<u32>> {
        if self.adds_bos() && self.bos_id.is_none() {
            let what = format!("add_bos with the tokenizer of `{}`, which has no BOS token", self.dir.display());
            return Err(Error::unsupported(what, "use --add_bos auto or off"));
        }
        Ok(self.bos_id.filter(|_| self.adds_bos()))
    }

    /// Ids of an answer: without a BOS that begins its own text, and with one EOS at its end.
    ///
    /// # Errors
    /// As [`Tokenizer::encode`]; `Unsupported` if the tokenizer has no EOS token.
    pub fn encode_answer(&self, text: &str) -> Result<Vec<u32>> {
        let mut ids = self.encode(text)?;
        if self.bos_id.is_some() && ids.first().copied() == self.bos_id {
            ids.remove(0);
        }
        let eos = self.require_eos()?;
        if ids.last() != Some(&eos) {
            ids.push(eos);
        }
        Ok(ids)
    }

    /// [`Tokenizer::eos_id`] for training, which cannot do without.
    ///
    /// # Errors
    /// `Unsupported` if there is none.
    pub fn require_eos(&self) -> Result<u32> {
        self.eos_id.ok_or_else(|| {
            let hint = "name an eos_token in the checkpoint's tokenizer_config.json";
            Error::unsupported("training with a tokenizer that has no EOS token", hint)
        })
    }

    /// Ids of `text` as [`Tokenizer::encode`] gives them, each with the byte of `text` at which it begins.
    ///
    /// # Errors
    /// As [`Tokenizer::encode`].
    pub fn encode_with_starts(&self, text: &str) -> Result<Vec<(u32, usize)>> {
        let encoded = quietly(|| self.inner.encode(text, false));
        let encoding = encoded.ok_or_else(|| self.gave_up())?.map_err(|e| self.failed("encode a text", &e))?;
        self.check(encoding.get_ids())?;
        Ok(encoding.get_ids().iter().zip(encoding.get_offsets()).map(|(id, span)| (*id, span.0)).collect())
    }

    /// The checkpoint's folder.
    #[must_use]
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// How the token `id` is written.
    #[must_use]
    pub fn id_to_token(&self, id: u32) -> Option<String> {
        self.inner.id_to_token(id)
    }

    /// Whether a prompt begins with BOS.
    #[must_use]
    pub fn adds_bos(&self) -> bool {
        match self.policy {
            AddBos::Auto => self.auto_bos,
            AddBos::Always => true,
            AddBos::Never => false,
        }
    }

    /// The token that begins a text, if there is one.
    #[must_use]
    pub fn bos_id(&self) -> Option<u32> {
        self.bos_id
    }

    /// The token that ends an answer in training data.
    #[must_use]
    pub fn eos_id(&self) -> Option<u32> {
        self.eos_id
    }

    /// All tokens that end a generated answer: those of `generation_config.json` (else `config.json`) and
    /// [`Tokenizer::eos_id`].
    #[must_use]
    pub fn eos_ids(&self) -> &[u32] {
        &self.eos_ids
    }

    /// Number of tokens, added ones included.
    #[must_use]
    pub fn vocab_size(&self) -> usize {
        self.inner.get_vocab_size(true)
    }

    /// Id of the token that is written `token`.
    #[must_use]
    pub fn token_to_id(&self, token: &str) -> Option<u32> {
        self.inner.token_to_id(token)
    }

    /// Text of `ids`, without the special tokens.
    ///
    /// # Errors
    /// When the tokenizer fails on the ids.
    pub fn decode(&self, ids: &[u32]) -> Result<String> {
        self.inner.decode(ids, true).map_err(|e| self.failed("decode ids", &e))
    }

    /// Text of `ids` with the special tokens written out.
    ///
    /// # Errors
    /// As [`Tokenizer::decode`].
    pub fn decode_all(&self, ids: &[u32]) -> Result<String> {
        self.inner.decode(ids, false).map_err(|e| self.failed("decode ids", &e))
    }

    /// Decodes ids one by one, as they are generated.
    #[must_use]
    pub fn stream(&self) -> DecodeStream<'_> {
        DecodeStream { tokenizer: self, ids: Vec::new(), given: 0, context: String::new() }
    }

    /// The checkpoint's chat template (Jinja), if it has one.
    #[must_use]
    pub fn chat_template(&self) -> Option<&str> {
        self.chat_template.as_ref().map(|(_, source)| source.as_str())
    }

    /// The file of [`Tokenizer::chat_template`]; the folder without one.
    #[must_use]
    pub fn chat_template_file(&self) -> &Path {
        self.chat_template.as_ref().map_or(&self.dir, |(path, _)| path)
    }

    /// What is wrong for a model of `rows` embeddings: BOS, EOS or much of the vocabulary is beyond them. A few tokens may be,
    /// as models of a family share a tokenizer, and only some of them read images.
    #[must_use]
    pub fn ids_beyond(&self, rows: usize) -> Vec<String> {
        let beyond = |id: &u32| *id as usize >= rows;
        let vocabulary = self.inner.get_vocab(true);
        let without: Vec<(&String, &u32)> = vocabulary.iter().filter(|(_, id)| beyond(id)).collect();
        let mut problems = Vec::new();
        if let Some((token, id)) = without.iter().max_by_key(|(_, id)| *id).filter(|_| without.len() > STRAY) {
            problems.push(format!(
                "tokenizer.json has {} tokens, of which `{token}` is the id {id}, and the model has {rows} embeddings",
                vocabulary.len()
            ));
        }
        for (key, id) in
            self.eos_ids.iter().map(|id| ("eos_token_id", *id)).chain(self.bos_id.map(|id| ("bos_token_id", id)))
        {
            if beyond(&id) {
                problems.push(format!("`{key}` is {id}, and the model has {rows} embeddings"));
            }
        }
        problems
    }

    fn gave_up(&self) -> Error {
        self.failed("encode a text", "one of its patterns takes too long on it, or cannot be used")
    }

    fn failed(&self, what: &str, e: &(impl std::fmt::Display + ?Sized)) -> Error {
        Error::invalid(&self.dir.join("tokenizer.json"), format!("cannot {what}: {}", one_line(e)), "")
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    use serde_json::{Value, json};

    /// A folder with a small byte-fallback tokenizer of the Llama kind, and `files`.
    fn folder(post_processor: Value, files: &[(&str, &str)]) -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        let mut vocab = serde_json::Map::new();
        for token in ["<unk>", "<s>", "</s>", "<|eot|>"] {
            vocab.insert(token.into(), vocab.len().into());
        }
        for byte in 0..=255_u8 {
            vocab.insert(format!("<0x{byte:02X}>"), vocab.len().into());
        }
        for piece in ["▁", "a", "b", "c", "▁a", "▁b"] {
            vocab.insert(piece.into(), vocab.len().into());
        }
        let special = |id: u32, content: &str| {
            json!({"id": id, "content": content, "single_word": false, "lstrip": false, "rstrip": false,
                "normalized": false, "special": true})
        };
        let tokenizer = json!({
            "version": "1.0",
            "truncation": {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0},
            "padding": null,
            "added_tokens": [special(0, "<unk>"), special(1, "<s>"), special(2, "</s>"), special(3, "<|eot|>")],
            "normalizer": {"type": "Sequence", "normalizers": [
                {"type": "Prepend", "prepend": "▁"},
                {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}]},
            "pre_tokenizer": null,
            "post_processor": post_processor,
            "decoder": {"type": "Sequence", "decoders": [
                {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
                {"type": "ByteFallback"}, {"type": "Fuse"},
                {"type": "Strip", "content": " ", "start": 1, "stop": 0}]},
            "model": {"type": "BPE", "dropout": null, "unk_token": "<unk>", "continuing_subword_prefix": null,
                "end_of_word_suffix": null, "fuse_unk": true, "byte_fallback": true, "vocab": vocab,
                "merges": [["▁", "a"], ["▁", "b"]]}
        });
        std::fs::write(dir.path().join("tokenizer.json"), tokenizer.to_string()).unwrap();
        for (name, content) in files {
            std::fs::write(dir.path().join(name), content).unwrap();
        }
        dir
    }

    fn bos_first() -> Value {
        json!({"type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}}})
    }

    fn load(post_processor: Value, config: &str) -> Tokenizer {
        Tokenizer::load(folder(post_processor, &[("tokenizer_config.json", config)]).path()).unwrap()
    }

    #[test]
    fn a_token_without_embedding_is_refused_where_it_is_used() {
        let t = load(bos_first(), "{}");
        let rows = t.vocab_size();
        let short = t.clone().for_model(rows - 1);
        assert!(short.ids_beyond(rows - 1).is_empty());
        assert_eq!(short.encode("a").unwrap(), t.encode("a").unwrap());
        let e = short.encode("a b").unwrap_err().to_string();
        assert!(e.contains("`▁b`") && e.contains(&(rows - 1).to_string()), "{e}");
        assert!(short.encode_with_starts("a b").is_err());
        assert!(t.ids_beyond(2).iter().any(|problem| problem.contains("tokenizer.json has")));
    }

    #[test]
    fn bos_policy_comes_from_the_files() {
        let adds = |post_processor, config: &str| load(post_processor, config).adds_bos();
        assert!(adds(Value::Null, r#"{"bos_token": "<s>", "add_bos_token": true}"#));
        assert!(!adds(bos_first(), r#"{"bos_token": "<s>", "add_bos_token": false}"#));
        assert!(adds(bos_first(), r#"{"bos_token": {"content": "<s>"}, "add_bos_token": null}"#));
        assert!(!adds(Value::Null, r#"{"bos_token": "<s>", "tokenizer_class": "GPT2Tokenizer"}"#));
        assert!(adds(Value::Null, r#"{"bos_token": "<s>", "tokenizer_class": "LlamaTokenizerFast"}"#));
        assert!(adds(Value::Null, r#"{"bos_token": "<s>", "tokenizer_class": "GemmaTokenizer"}"#));
        assert!(!adds(Value::Null, r#"{"tokenizer_class": "LlamaTokenizer"}"#));
        assert!(!adds(Value::Null, r#"{"bos_token": null, "add_bos_token": true}"#));
    }

    #[test]
    fn bos_is_never_doubled() {
        let t = load(bos_first(), r#"{"bos_token": "<s>", "eos_token": "</s>"}"#);
        let bare = t.encode("a b").unwrap();
        assert_eq!(bare.len(), 2); // the file's truncation to 2 is off: see below
        assert_eq!(t.encode("a b b b").unwrap().len(), 4);
        assert_eq!(t.encode_prompt("a b").unwrap(), [&[1][..], &bare].concat());
        let written = t.encode_prompt("<s>a b").unwrap();
        assert_eq!(written.iter().filter(|&&id| id == 1).count(), 1);
        assert_eq!(t.encode_prompt("").unwrap(), [1]);
        let never = t.clone().with_bos(AddBos::Never);
        assert_eq!(never.encode_prompt("a b").unwrap(), bare);
        assert!(!never.adds_bos() && never.with_bos(AddBos::Auto).adds_bos());
    }

    #[test]
    fn forced_bos_needs_a_bos_token() {
        let t = load(Value::Null, "{}").with_bos(AddBos::Always);
        let e = t.encode_prompt("a").unwrap_err();
        assert!(matches!(e, Error::Unsupported { .. }) && e.hint().is_some(), "{e}");
    }

    #[test]
    fn eos_ids_are_gathered() {
        let dir = folder(
            Value::Null,
            &[
                ("tokenizer_config.json", r#"{"eos_token": {"content": "</s>"}, "bos_token": "<s>"}"#),
                ("generation_config.json", r#"{"eos_token_id": [3, 2], "bos_token_id": 7}"#),
                ("config.json", r#"{"eos_token_id": 9}"#),
            ],
        );
        let t = Tokenizer::load(dir.path()).unwrap();
        assert_eq!((t.bos_id(), t.eos_id(), t.eos_ids()), (Some(1), Some(2), &[3, 2][..]));
        assert_eq!((t.vocab_size(), t.token_to_id("<|eot|>"), t.token_to_id("nope")), (266, Some(3), None));
        let dir = folder(Value::Null, &[("special_tokens_map.json", r#"{"eos_token": "<|eot|>"}"#)]);
        assert_eq!(Tokenizer::load(dir.path()).unwrap().eos_id(), Some(3));
        let dir = folder(Value::Null, &[("config.json", r#"{"eos_token_id": [2, 3], "bos_token_id": 1}"#)]);
        let t = Tokenizer::load(dir.path()).unwrap();
        assert_eq!((t.bos_id(), t.eos_id(), t.eos_ids()), (Some(1), Some(2), &[2, 3][..]));
        let t = Tokenizer::load(folder(Value::Null, &[]).path()).unwrap();
        assert_eq!((t.bos_id(), t.eos_id(), t.eos_ids().len(), t.adds_bos()), (None, None, 0, false));
    }

    #[test]
    fn broken_and_missing_files_are_named() {
        let empty = tempfile::tempdir().unwrap();
        let e = Tokenizer::load(empty.path()).unwrap_err();
        assert!(e.to_string().starts_with("tokenizer not found"), "{e}");
        let e = Tokenizer::load(&empty.path().join("nope")).unwrap_err();
        assert!(e.to_string().starts_with("checkpoint folder not found"), "{e}");
        std::fs::write(empty.path().join("tokenizer.model"), "x").unwrap();
        let e = Tokenizer::load(empty.path()).unwrap_err();
        assert!(matches!(e, Error::Unsupported { .. }), "{e}");
        assert!(e.hint().unwrap().contains("tokenizer.json"));
        std::fs::write(empty.path().join("tokenizer.json"), "{\n").unwrap();
        let e = Tokenizer::load(empty.path()).unwrap_err().to_string();
        assert!(e.contains("tokenizer.json`: not a tokenizer") && !e.contains('\n'), "{e}");
        for name in ["tokenizer_config.json", "generation_config.json", "config.json", "special_tokens_map.json"] {
            let e = Tokenizer::load(folder(Value::Null, &[(name, "[1]")]).path()).unwrap_err().to_string();
            assert!(e.contains(&format!("{name}`: not a JSON object")), "{e}");
        }
    }

    /// Llama 3.2 was published with such a file.
    #[test]
    fn slips_with_commas_are_mended() {
        let text =
            "{\n  \"temperature\": 0.6\n  \"eos_token_id\": [\n 2,\n 3,\n ],\n \"do_sample\": true\n \"x\": {}\n}";
        let t = Tokenizer::load(folder(Value::Null, &[("generation_config.json", text)]).path()).unwrap();
        assert_eq!(t.eos_ids(), [2, 3]);
    }

    #[test]
    fn chat_templates() {
        let template = |config: &str| load(Value::Null, config).chat_template().map(str::to_owned);
        assert_eq!(template("{}"), None);
        assert_eq!(template(r#"{"chat_template": "x"}"#).unwrap(), "x");
        let list = r#"{"chat_template": [{"name": "tool", "template": "t"}, {"name": "default", "template": "d"}]}"#;
        assert_eq!(template(list).unwrap(), "d");
        let dir = folder(Value::Null, &[("chat_template.jinja", "j"), ("tokenizer_config.json", list)]);
        assert_eq!(Tokenizer::load(dir.path()).unwrap().chat_template(), Some("j"));
    }

    fn streamed(t: &Tokenizer, ids: &[u32]) -> Vec<String> {
        let mut stream = t.stream();
        let mut parts: Vec<String> = ids.iter().filter_map(|&id| stream.push(id).unwrap()).collect();
        parts.extend(stream.finish().unwrap());
        parts
    }

    #[test]
    fn stream_gives_whole_characters_and_the_same_text() {
        let t = load(Value::Null, r#"{"bos_token": "<s>"}"#);
        for text in ["a b a", "é a", "你好 a 🙂🙃", "  a  b ", "", "a\u{fffd}b", "e\u{301}"] {
            let ids = [&[1][..], &t.encode(text).unwrap(), &[2]].concat();
            let parts = streamed(&t, &ids);
            assert_eq!(parts.concat(), t.decode(&ids).unwrap(), "{text}");
            assert!(text.contains('\u{fffd}') || parts.iter().all(|part| !part.contains('\u{fffd}')), "{parts:?}");
        }
        assert_eq!(streamed(&t, &t.encode("a🙂b").unwrap()), ["a", "🙂", "b"]);
    }

    #[test]
    fn stream_survives_broken_bytes() {
        let t = load(Value::Null, "{}");
        let byte = |byte: u8| 4 + u32::from(byte);
        let cut_off: Vec<u32> = "é🙂".bytes().take(5).map(byte).collect();
        assert_eq!(streamed(&t, &cut_off), ["é"]);
        let a = t.token_to_id("a").unwrap();
        assert_eq!(streamed(&t, &[a, byte(0xff), a]), ["a", "\u{fffd}a"]);
        assert_eq!(streamed(&t, &[byte(0xc3), byte(0xa9), byte(0xff), a]), ["é", "\u{fffd}a"]);
        let garbage = [vec![a], vec![byte(0x80); 40], vec![a]].concat();
        let text = streamed(&t, &garbage).concat();
        assert!(text.starts_with('a') && text.ends_with('a') && text.chars().count() == 42, "{text}");
    }

    #[test]
    fn policies_are_parsed() {
        let parse = |text: &str| text.parse::<AddBos>().unwrap();
        assert_eq!(["auto", "true", "always"].map(parse), [AddBos::Auto, AddBos::Always, AddBos::Always]);
        assert_eq!(["false", "never"].map(parse), [AddBos::Never, AddBos::Never]);
        assert!("yes".parse::<AddBos>().is_err());
        assert_eq!(serde_json::to_string(&AddBos::Never).unwrap(), "\"never\"");
        assert_eq!(serde_json::from_str::<[AddBos; 3]>("[true, \"auto\", \"never\"]").unwrap()[0], AddBos::Always);
    }
}
