//! What a repository holds, and which of its files are needed.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

use serde::Deserialize;

use super::answer::is_hex;
use super::part::Digest;
use crate::checkpoint::write::COMPANIONS;
use crate::error::{Error, Result};

/// What the Hub says about a repository at a revision.
#[derive(Deserialize)]
pub(super) struct Listing {
    sha: Option<String>,
    pub(super) siblings: Vec<Sibling>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Sibling {
    pub(super) rfilename: String,
    size: Option<u64>,
    blob_id: Option<String>,
    lfs: Option<Lfs>,
}

#[derive(Deserialize)]
struct Lfs {
    sha256: Option<String>,
    size: Option<u64>,
}

impl Sibling {
    /// That of the content, wherever it is stored.
    pub(super) fn size(&self) -> Option<u64> {
        self.lfs.as_ref().and_then(|lfs| lfs.size).or(self.size)
    }

    pub(super) fn digest(&self) -> Option<Digest> {
        match &self.lfs {
            Some(lfs) => lfs.sha256.as_deref().and_then(Digest::sha256),
            None => self.blob_id.as_deref().and_then(Digest::git_blob),
        }
    }
}

pub(super) enum Weights {
    Files(Vec<String>),
    /// The index that names them.
    Index(String),
}

impl Listing {
    /// Refuses names that lead out of the folder. Files in folders are never fetched, so only `..`, a root and what
    /// would be a folder on some system are of concern.
    pub(super) fn checked(self, endpoint: &str) -> Result<Self> {
        let escapes = |name: &str| {
            name.split(['/', '\\']).any(|part| part == "..")
                || name.starts_with(['/', '\\'])
                || name.get(1..2) == Some(":")
                || (!name.contains('/') && is_wanted(name) && !is_plain_name(name))
        };
        match self.siblings.iter().find(|sibling| escapes(&sibling.rfilename)) {
            None => Ok(self),
            Some(Sibling { rfilename, .. }) => Err(outside(endpoint, rfilename)),
        }
    }

    pub(super) fn commit(&self) -> Option<&str> {
        self.sha.as_deref().filter(|sha| is_hex(sha, 40))
    }

    fn at_top(&self) -> impl Iterator<Item = &str> {
        self.siblings.iter().map(|s| s.rfilename.as_str()).filter(|name| is_plain_name(name))
    }

    pub(super) fn small_files(&self) -> Vec<String> {
        self.at_top().filter(|name| is_small_file(name)).map(str::to_owned).collect()
    }

    /// The weights in the order in which `transformers` looks for them.
    pub(super) fn weights(&self) -> Option<Weights> {
        let has = |wanted: &str| self.at_top().any(|name| name == wanted);
        for (whole, index, is_part) in [
            ("model.safetensors", "model.safetensors.index.json", is_safetensors as fn(&str) -> bool),
            ("pytorch_model.bin", "pytorch_model.bin.index.json", is_pickle),
        ] {
            if has(whole) {
                return Some(Weights::Files(vec![whole.to_owned()]));
            }
            if has(index) {
                return Some(Weights::Index(index.to_owned()));
            }
            let names: Vec<_> = self.at_top().filter(|name| is_part(name)).map(str::to_owned).collect();
            if !names.is_empty() {
                return Some(Weights::Files(names));
            }
        }
        None
    }

    pub(super) fn instead_of_weights(&self) -> String {
        let has = |test: fn(&str) -> bool| self.siblings.iter().any(|sibling| test(&sibling.rfilename));
        match () {
            () if has(|name| name == "adapter_config.json") => "it holds an adapter; download the base model it names",
            () if has(|name| name.ends_with(".gguf")) => {
                "it holds GGUF files; download the repository they were made from"
            }
            () if has(|name| name.starts_with("consolidated")) => "download the variant in the transformers format",
            () => "with --tokenizer_only the other files come alone",
        }
        .to_owned()
    }
}

pub(super) fn outside(endpoint: &str, name: &str) -> Error {
    let message = format!("`{endpoint}` lists a file that would be written outside its folder: {name:?}");
    Error::refused(message, "nothing was written; check HF_ENDPOINT")
}

fn is_small_file(name: &str) -> bool {
    COMPANIONS.contains(&name) || (name.starts_with("tokenizer") && !is_safetensors(name))
}

fn is_safetensors(name: &str) -> bool {
    name.ends_with(".safetensors") && !name.starts_with("consolidated") && !name.starts_with("adapter")
}

fn is_pickle(name: &str) -> bool {
    name.starts_with("pytorch_model") && name.ends_with(".bin")
}

fn is_wanted(name: &str) -> bool {
    is_small_file(name) || is_safetensors(name) || is_pickle(name) || name.ends_with(".index.json")
}

/// Whether `name` is one component of a path on every system.
pub(super) fn is_plain_name(name: &str) -> bool {
    !matches!(name, "" | "." | "..") && !name.contains(['/', '\\', ':']) && !name.chars().any(char::is_control)
}

/// The files that an index of weights names.
pub(super) fn shards(index: &Path) -> Result<Vec<String>> {
    #[derive(Deserialize)]
    struct Index {
        weight_map: serde_json::Map<String, serde_json::Value>,
    }
    let text = fs::read(index).map_err(Error::io("read", index))?;
    let spoiled = |problem: String| Error::invalid(index, problem, "the repository is broken; try another --revision");
    let Index { weight_map } = serde_json::from_slice(&text).map_err(|error| spoiled(error.to_string()))?;
    let names: BTreeSet<_> = weight_map.values().filter_map(|name| name.as_str()).collect();
    if let Some(name) = names.iter().find(|name| !is_plain_name(name)) {
        return Err(spoiled(format!("`weight_map` names a file outside the folder: {name:?}")));
    }
    Ok(names.into_iter().map(str::to_owned).collect())
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn listing(names: &[&str]) -> Listing {
        let sibling = |name: &&str| Sibling { rfilename: (*name).to_owned(), size: Some(1), blob_id: None, lfs: None };
        Listing { sha: None, siblings: names.iter().map(sibling).collect() }
    }

    pub(super) fn weights(names: &[&str]) -> Vec<String> {
        match listing(names).weights() {
            Some(Weights::Files(names)) => names,
            Some(Weights::Index(name)) => vec![format!("index {name}")],
            None => Vec::new(),
        }
    }

    #[test]
    fn weights_in_the_order_of_transformers() {
        assert_eq!(weights(&["pytorch_model.bin", "model.safetensors"]), ["model.safetensors"]);
        let sharded = ["model-00001-of-00001.safetensors", "model.safetensors.index.json", "pytorch_model.bin"];
        assert_eq!(weights(&sharded), ["index model.safetensors.index.json"]);
        let others = ["consolidated.safetensors", "adapter_model.safetensors", "onnx/model.safetensors", "m.gguf"];
        assert!(weights(&others).is_empty());
        assert_eq!(weights(&["odd.safetensors", "training_args.bin"]), ["odd.safetensors"]);
        assert_eq!(weights(&["pytorch_model.bin.index.json"]), ["index pytorch_model.bin.index.json"]);
        assert_eq!(weights(&["pytorch_model-1.bin", "optimizer.bin"]), ["pytorch_model-1.bin"]);
    }

    #[test]
    fn only_needed_small_files() {
        let names = [
            "README.md",
            "chat_template.jinja",
            "config.json",
            "original/tokenizer.model",
            "tokenizer.model",
            "tokenizer_config.json",
            "training_args.bin",
            "USE_POLICY.md",
        ];
        let small = listing(&names).small_files();
        assert_eq!(small, ["chat_template.jinja", "config.json", "tokenizer.model", "tokenizer_config.json"]);
    }

    #[test]
    fn names_that_lead_out_are_refused() {
        for bad in
            ["../a", "a/../../b", "/etc/passwd", "tokenizer\\..\\x", "C:x", "..", "\\x", "tokenizer:x", "a\\..\\b"]
        {
            assert!(listing(&["config.json", bad]).checked("here").is_err(), "{bad}");
        }
        assert!(listing(&["onnx/model.onnx", "onnx\\model.onnx", "a..b"]).checked("here").is_ok());
    }
}
