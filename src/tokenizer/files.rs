//! What a checkpoint's files say of its tokens.

use super::Text;
use crate::error::{Error, Result, quietly};
use regex::Regex;
use serde_json::{Map, Value};
use std::path::{Path, PathBuf};

/// What to do about a broken file beside `tokenizer.json`.
pub(super) const MEND: &str = "repair it, or delete it and download the checkpoint again";

/// Whether the files of a checkpoint say that a text begins with BOS, decided as transformers does:
///
/// 1. `add_bos_token` in `tokenizer_config.json`, if it is there;
/// 2. yes, if the post-processor in `tokenizer.json` puts BOS first;
/// 3. yes, if `tokenizer_class` is one of the SentencePiece Llama kind, which add BOS by default;
/// 4. else no; and never without a BOS token.
pub(super) fn files_want_bos(config: &Map<String, Value>, inner: &tokenizers::Tokenizer, bos_id: Option<u32>) -> bool {
    const ADD_BY_DEFAULT: [&str; 3] = ["LlamaTokenizer", "CodeLlamaTokenizer", "GemmaTokenizer"];
    let Some(bos) = bos_id else { return false };
    if let Some(add) = config.get("add_bos_token").and_then(Value::as_bool) {
        return add;
    }
    let first = inner.encode("", true).ok().and_then(|encoding| encoding.get_ids().first().copied());
    let class = config.get("tokenizer_class").and_then(Value::as_str).unwrap_or_default();
    first == Some(bos) || ADD_BY_DEFAULT.contains(&class.trim_end_matches("Fast"))
}

/// The files beside `tokenizer.json` that name special tokens; a file that is not there is empty.
pub(super) struct SpecialFiles {
    pub(super) tokenizer: Map<String, Value>,
    pub(super) map: Map<String, Value>,
    pub(super) generation: Map<String, Value>,
    pub(super) model: Map<String, Value>,
}

impl SpecialFiles {
    pub(super) fn read(dir: &Path, text: &Text<'_>) -> Result<Self> {
        let object = |name: &str| read_object(dir, text, name);
        let files = Self {
            tokenizer: object("tokenizer_config.json")?,
            map: object("special_tokens_map.json")?,
            generation: object("generation_config.json")?,
            model: object("config.json")?,
        };
        files.check(dir)?;
        Ok(files)
    }

    /// Refuses values of another kind than transformers writes: passed over, they would change the result in silence.
    fn check(&self, dir: &Path) -> Result<()> {
        let text = |v: &Value| v.is_null() || v.is_string() || v.get("content").is_some_and(Value::is_string);
        let id = |v: &Value| v.as_u64().is_some_and(|id| u32::try_from(id).is_ok());
        let ids = |v: &Value| v.is_null() || id(v) || v.as_array().is_some_and(|list| list.iter().all(id));
        let is_switch = |v: &Value| v.is_null() || v.is_boolean();
        let require =
            |file: &str, object: &Map<String, Value>, key: &str, holds: &dyn Fn(&Value) -> bool, wanted: &str| {
                let Some(value) = object.get(key).filter(|v| !holds(v)) else { return Ok(()) };
                let value: String = value.to_string().chars().take(60).collect();
                Err(Error::invalid(&dir.join(file), format!("`{key}` is {value}, not {wanted}"), MEND))
            };
        require("tokenizer_config.json", &self.tokenizer, "add_bos_token", &is_switch, "true or false")?;
        for key in ["bos_token", "eos_token"] {
            require("tokenizer_config.json", &self.tokenizer, key, &text, "a text")?;
            require("special_tokens_map.json", &self.map, key, &text, "a text")?;
            require("generation_config.json", &self.generation, &format!("{key}_id"), &ids, "an id or a list of ids")?;
        }
        Ok(())
    }

    /// Id of the token that `key` (`bos_token`, `eos_token`) names: by its text, else by its id in the other files.
    pub(super) fn id_of(&self, inner: &tokenizers::Tokenizer, key: &str) -> Option<u32> {
        let by_text = |file: &Map<String, Value>| {
            let value = file.get(key)?;
            let text = value.as_str().or_else(|| value.get("content")?.as_str())?;
            inner.token_to_id(text)
        };
        let id_key = format!("{key}_id");
        let by_id = |file: &Map<String, Value>| ids(file.get(&id_key)).first().copied();
        by_text(&self.tokenizer)
            .or_else(|| by_text(&self.map))
            .or_else(|| by_id(&self.generation))
            .or_else(|| by_id(&self.model))
    }
}

/// An id or a list of ids.
pub(super) fn ids(value: Option<&Value>) -> Vec<u32> {
    let id = |value: &Value| value.as_u64().and_then(|id| u32::try_from(id).ok());
    match value {
        Some(Value::Array(list)) => list.iter().filter_map(id).collect(),
        Some(value) => id(value).into_iter().collect(),
        None => Vec::new(),
    }
}

/// The text of a file; `None` if there is no such file.
pub(super) fn read_text(path: &Path) -> Result<Option<String>> {
    match std::fs::read_to_string(path) {
        Ok(text) => Ok(Some(text)),
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(e) => Err(Error::io("read", path)(e)),
    }
}

pub(super) fn load_vocabulary(dir: &Path, text: &Text<'_>) -> Result<tokenizers::Tokenizer> {
    let path = dir.join("tokenizer.json");
    let Some(json) = text("tokenizer.json")? else { return Err(no_vocabulary(dir, path)) };
    let hint = "delete the file and download the checkpoint again; it may be cut off or an LFS pointer";
    let invalid = |problem: String| Error::invalid(&path, format!("not a tokenizer: {problem}"), hint);
    let read = quietly(|| tokenizers::Tokenizer::from_bytes(&json));
    let read = read.ok_or_else(|| invalid("the library that reads it gives up on a part of it".to_owned()))?;
    let mut inner = read.map_err(|e| invalid(one_line(&e)))?;
    // Some files carry the cutting and padding of the run that wrote them; ours is done in `data/sft.rs`.
    inner.with_padding(None);
    let off = inner.with_truncation(None);
    off.map_err(|e| Error::invalid(&path, one_line(&e), ""))?;
    Ok(inner)
}

pub(super) fn no_vocabulary(dir: &Path, path: PathBuf) -> Error {
    if !dir.is_dir() {
        let hint = "check the path, or fetch it: litgpt download REPO".to_owned();
        return Error::Missing { what: "checkpoint folder".to_owned(), path: dir.to_owned(), hint };
    }
    for other in ["tokenizer.model", "vocab.json", "tekken.json"] {
        if dir.join(other).is_file() {
            let what = format!("tokenizer file `{}` without a tokenizer.json", dir.join(other).display());
            let hint = "use a repo of this model that ships tokenizer.json, or copy its tokenizer.json here";
            return Error::unsupported(what, hint);
        }
    }
    let hint = "download the checkpoint with its tokenizer: litgpt download REPO --tokenizer_only true".to_owned();
    Error::Missing { what: "tokenizer".to_owned(), path, hint }
}

/// The object in a JSON file; empty if there is no such file.
pub(super) fn read_object(dir: &Path, text: &Text<'_>, name: &str) -> Result<Map<String, Value>> {
    let Some(text) = text(name)? else { return Ok(Map::new()) };
    serde_json::from_str(&text)
        .or_else(|e| mend_commas(&text).and_then(|mended| serde_json::from_str(&mended).ok()).ok_or(e))
        .map_err(|e| Error::invalid(&dir.join(name), format!("not a JSON object: {}", one_line(&e)), MEND))
}

/// Adds commas between lines and drops those before a closing bracket: published files (Llama 3.2) have such slips.
pub(super) fn mend_commas(text: &str) -> Option<String> {
    let lacking = Regex::new(r#"(["\]}\dle])[ \t]*\n(\s*")"#).ok()?;
    let trailing = Regex::new(r",(\s*[}\]])").ok()?;
    Some(trailing.replace_all(&lacking.replace_all(text, "$1,\n$2"), "$1").into_owned())
}

/// `chat_template.jinja`, else `chat_template` of `chat_template.json` or of the config: a text, or a list of which
/// `default` counts.
pub(super) fn chat_template(
    dir: &Path,
    text: &Text<'_>,
    config: &Map<String, Value>,
) -> Result<Option<(PathBuf, String)>> {
    if let Some(template) = text("chat_template.jinja")? {
        return Ok(Some((dir.join("chat_template.jinja"), template)));
    }
    let own = read_object(dir, text, "chat_template.json")?.remove("chat_template");
    let (path, value) = match own {
        Some(value) => (dir.join("chat_template.json"), Some(value)),
        None => (dir.join("tokenizer_config.json"), config.get("chat_template").cloned()),
    };
    let template = match &value {
        Some(Value::Array(list)) => list
            .iter()
            .find(|entry| entry["name"] == "default")
            .or(list.first())
            .map(|entry| entry.get("template").unwrap_or(entry)),
        other => other.as_ref(),
    };
    match template {
        None | Some(Value::Null) => Ok(None),
        Some(Value::String(text)) => Ok(Some((path, text.clone()))),
        Some(_) => {
            let problem = "`chat_template` is neither a text nor a list of objects with a text `template`";
            Err(Error::invalid(&path, problem, MEND))
        }
    }
}

pub(super) fn one_line(e: &(impl std::fmt::Display + ?Sized)) -> String {
    e.to_string().split_whitespace().collect::<Vec<_>>().join(" ")
}
