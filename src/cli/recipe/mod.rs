//! From files and flags to the settings of a run, and back to a file.
//!
//! A recipe is YAML or JSON with LitGPT's keys. Files and the command line are layers of dotted keys, laid over the
//! defaults in this order: `--config` files as they stand, then the command line, wherever it names them. Within the
//! command line, group values (`--train FILE`, `--data '{...}'`) come before single flags. A key is known if
//! `args::FLAGS` has it; the value is checked by putting it into the serde tree of `FinetuneSettings`.

mod write;

pub use write::{HYPERPARAMETERS, print_config, to_yaml, write_hyperparameters};

use std::path::{Path, PathBuf};

use serde::Deserialize;
use serde_json::{Value, json};

use super::args::{self, FinetuneArgs, Flag, Kind, LOG_FLAGS};
use super::{download, usage};
use crate::checkpoint::hub::is_repo_id;
use crate::checkpoint::litgpt::config::parse_yaml;
use crate::data::prompt::PromptStyle;
use crate::error::{Error, Result, closest};
use crate::train::settings::{DATA_MODULES, DataModule, FinetuneSettings};

/// Data modules of LitGPT that are made for pretraining.
const PRETRAINING_DATA: &[&str] =
    &["LitData", "TextFiles", "TinyStories", "OpenWebText", "TinyLlama", "MicroLlama", "LitDataModule"];

/// Keys of PyTorch's AdamW that only say how it is computed.
const COMPUTED_HOW: &[&str] =
    &["optimizer.foreach", "optimizer.fused", "optimizer.capturable", "optimizer.differentiable"];

/// The settings that a command line asks for, checked.
///
/// # Errors
/// Unreadable files, unknown keys, bad values, settings that cannot run, no model.
pub fn resolve(args: &FinetuneArgs) -> Result<FinetuneSettings> {
    let mut merge = Merge::default();
    for path in &args.configs {
        merge.add(Layer::read(path)?)?;
    }
    merge.add(Layer::command_line(args))?;
    let settings = merge.finish(std::env::var_os("LIGHTNING_ARTIFACTS_DIR").map(PathBuf::from).as_deref())?;
    settings.validate()?;
    if settings.checkpoint_dir.as_os_str().is_empty() && args.print_config.is_none() {
        return Err(Error::usage("no model is given", "litgpt finetune_lora CHECKPOINT_DIR"));
    }
    Ok(settings)
}

/// The settings of a whole finetuning command line, program and command first (`litgpt finetune lora ...`).
///
/// # Errors
/// Everything that clap or [`resolve`] refuses.
pub fn parse_finetune(argv: &[String]) -> Result<FinetuneSettings> {
    resolve(&args::parse::<FinetuneArgs>(argv)?)
}

/// The settings in a recipe file, over the defaults. Made for `hyperparameters.yaml`.
///
/// # Errors
/// As [`resolve`], except that no model need be given and rules between settings are not checked.
pub fn from_file(path: &Path) -> Result<FinetuneSettings> {
    let mut merge = Merge::default();
    merge.add(Layer::read(path)?)?;
    merge.settings()
}

/// One value that was asked for, under the name by which it was asked.
#[derive(Clone, Debug)]
struct Entry {
    name: String,
    value: Value,
}

/// What one file or the command line asks for.
#[derive(Debug)]
struct Layer {
    /// The file; `None`: the command line.
    file: Option<PathBuf>,
    entries: Vec<Entry>,
}

impl Layer {
    fn read(path: &Path) -> Result<Self> {
        let tree = read_tree(path)?;
        let mut entries = Vec::new();
        flatten("", tree, &mut entries);
        Ok(Self { file: Some(path.to_owned()), entries })
    }

    fn command_line(args: &FinetuneArgs) -> Self {
        let entry = |(key, value): &(&'static str, Value)| {
            let name = Flag::find(key).map_or(*key, Flag::name);
            Entry { name: name.to_owned(), value: value.clone() }
        };
        Self { file: None, entries: args.given.iter().map(entry).collect() }
    }

    /// An error about this layer.
    fn error(&self, problems: &[String]) -> Error {
        let place = match &self.file {
            Some(path) => format!("`{}`: ", path.display()),
            None if problems.len() == 1 => String::new(),
            None => "the command line has problems: ".to_owned(),
        };
        Error::usage(place + &problems.join("; "), "`litgpt finetune_lora --help` lists every setting")
    }

    /// A name as the user would write it here.
    fn shown(&self, name: &str) -> String {
        match self.file {
            Some(_) => format!("`{name}`"),
            None => format!("`--{name}`"),
        }
    }
}

/// Reads a YAML or JSON file whose top is a mapping, from a path or a web address.
fn read_tree(path: &Path) -> Result<Value> {
    let name = path.to_string_lossy();
    let is_address = name.starts_with("https://") || name.starts_with("http://");
    let text = if is_address { download::text(&name)? } else { read_file(path)? };
    parse_tree(&text).map_err(|problem| {
        let (problem, hint) = match text.trim_start().starts_with('<') {
            true => ("a web page, not a recipe", "give the address or path of the YAML file itself"),
            false => (problem.as_str(), "a recipe is YAML with one `key: value` a line"),
        };
        Error::usage(format!("`{name}`: {problem}"), hint)
    })
}

fn read_file(path: &Path) -> Result<String> {
    std::fs::read_to_string(path).map_err(|error| {
        let name = path.display();
        let message = match error.kind() {
            std::io::ErrorKind::NotFound => format!("recipe not found: `{name}`"),
            std::io::ErrorKind::IsADirectory => format!("`{name}`: a folder, not a recipe"),
            std::io::ErrorKind::InvalidData => format!("`{name}`: not a text file"),
            _ => format!("cannot read `{name}`: {error}"),
        };
        Error::usage(message, "give the path or web address of a YAML file that you may read")
    })
}

fn parse_tree(text: &str) -> std::result::Result<Value, String> {
    match parse_yaml(text)? {
        Value::Null => Ok(json!({})),
        tree @ Value::Object(_) => Ok(tree),
        _ => Err("expected `key: value` lines".into()),
    }
}

/// Flattens a tree into dotted names. `init_args` adds nothing to a name and `class_path` names its parent, so that
/// `data: {class_path: A, init_args: {seed: 1}}` becomes `data` and `data.seed`. An empty group says nothing.
fn flatten(name: &str, value: Value, entries: &mut Vec<Entry>) {
    let is_group = ["train", "eval", "data", "optimizer", "log", "io", ""].contains(&name);
    match value {
        Value::Object(map) => {
            for (key, value) in map {
                match key.as_str() {
                    "init_args" | "class_path" | "dict_kwargs" => flatten(name, value, entries),
                    key if name.is_empty() => flatten(key, value, entries),
                    key => flatten(&format!("{name}.{key}"), value, entries),
                }
            }
        }
        Value::Null if is_group => {}
        value => entries.push(Entry { name: name.to_owned(), value }),
    }
}

/// Replaces entries that stand for several by those: group files and inline groups, `betas`, a data file as `data`.
fn expand(entries: Vec<Entry>) -> Result<Vec<Entry>> {
    let (mut singles, mut expanded) = (Vec::with_capacity(entries.len()), Vec::with_capacity(entries.len()));
    for entry in entries {
        match key_of(&entry) {
            "data.name" => expand_group("data", entry, &mut singles)?,
            "optimizer.name" => expand_group("optimizer", entry, &mut singles)?,
            key @ ("train" | "eval") => expand_group(key, entry, &mut singles)?,
            _ => singles.push(entry),
        }
    }
    // A group may hold them, too.
    for entry in singles {
        match key_of(&entry) {
            "optimizer.betas" => expand_betas(entry, &mut expanded)?,
            _ => expanded.push(entry),
        }
    }
    Ok(expanded)
}

/// The setting that an entry means; empty if there is none.
fn key_of(entry: &Entry) -> &'static str {
    Flag::find(&entry.name).map_or("", |flag| flag.key)
}

fn expand_group(group: &str, entry: Entry, expanded: &mut Vec<Entry>) -> Result<()> {
    let text = entry.value.as_str().unwrap_or_default();
    let ends_with = |endings: &[&str]| endings.iter().any(|ending| text.to_ascii_lowercase().ends_with(ending));
    if text.trim_start().starts_with('{') {
        let tree = parse_tree(text)
            .map_err(|problem| Error::usage(format!("`--{group}`: {problem}"), "check quotes and braces"))?;
        flatten(group, tree, expanded);
    } else if group == "data" && ends_with(&[".json", ".jsonl", ".ndjson", ".csv", ".parquet"]) {
        expanded.push(Entry { name: "data".into(), value: "JSON".into() });
        expanded.push(Entry { name: "data.json_path".into(), value: text.into() });
    } else if group == "data" && is_repo_id(text) && !Path::new(text).exists() {
        expanded.push(Entry { name: "data".into(), value: "Hub".into() });
        expanded.push(Entry { name: "data.repo_id".into(), value: text.into() });
    } else if ends_with(&[".yaml", ".yml"]) || (matches!(group, "train" | "eval") && entry.value.is_string()) {
        flatten(group, read_tree(Path::new(text))?, expanded);
    } else if !entry.value.is_null() {
        expanded.push(entry);
    }
    Ok(())
}

/// `[0.9, 0.95]`, as YAML, or as text on the command line, where Python's round brackets are fine, too.
fn expand_betas(entry: Entry, expanded: &mut Vec<Entry>) -> Result<()> {
    let numbers: Vec<f64> = match &entry.value {
        Value::Array(values) => values.iter().filter_map(Value::as_f64).collect(),
        Value::String(text) => text
            .trim_matches(|c: char| "[]() ".contains(c))
            .split(',')
            .filter_map(|number| number.trim().parse().ok())
            .collect(),
        _ => Vec::new(),
    };
    let [beta1, beta2] = numbers[..] else {
        return Err(Error::usage(
            format!("`{}`: expected two numbers, got `{}`", entry.name, shown(&entry.value)),
            "--optimizer.betas '[0.9, 0.95]'",
        ));
    };
    expanded.push(Entry { name: "optimizer.beta1".into(), value: beta1.into() });
    expanded.push(Entry { name: "optimizer.beta2".into(), value: beta2.into() });
    Ok(())
}

/// Layers laid over the defaults so far.
#[derive(Debug)]
struct Merge {
    tree: Value,
    /// Whether a layer chose the data module.
    data_named: bool,
}

impl Default for Merge {
    fn default() -> Self {
        let tree = serde_json::to_value(FinetuneSettings::default()).expect("plain data becomes JSON");
        Self { tree, data_named: false }
    }
}

impl Merge {
    /// Lays `layer` over what is there. Either all of it or an error with all of its problems.
    fn add(&mut self, mut layer: Layer) -> Result<()> {
        layer.entries = expand(std::mem::take(&mut layer.entries))?;
        let mut problems = Vec::new();
        let mut found = Vec::new();
        for entry in &layer.entries {
            match self.recognise(entry, &layer) {
                Ok(Some((flag, value))) => found.push((flag, value, &entry.name)),
                Ok(None) => {}
                Err(problem) => problems.push(problem),
            }
        }
        self.prepare(&found.iter().map(|(flag, value, _)| (flag.key, value)).collect::<Vec<_>>());
        for (flag, value, name) in found {
            if let Err(problem) = self.set(flag.key, value.clone()) {
                let value = format!("`{}`", shown(&value));
                let got = if problem.contains(&value) { String::new() } else { format!(", got {value}") };
                let tip = usage::value(&problem, value.trim_matches('`'));
                let tip = tip.map(|near| format!(", did you mean `{near}`?")).unwrap_or_default();
                problems.push(format!("{}: {problem}{got}{tip}", layer.shown(name)));
            }
        }
        if problems.is_empty() { Ok(()) } else { Err(layer.error(&problems)) }
    }

    /// The flag that `entry` means and its value in the right type; `None` if it may be left out.
    fn recognise(&self, entry: &Entry, layer: &Layer) -> std::result::Result<Option<(&'static Flag, Value)>, String> {
        let Entry { name, value } = entry;
        if LOG_FLAGS.contains(&name.as_str()) || COMPUTED_HOW.contains(&name.as_str()) {
            return Ok(None);
        }
        if name == "optimizer.amsgrad" || name == "optimizer.maximize" {
            let off = matches!(value, Value::Null | Value::Bool(false));
            return if off { Ok(None) } else { Err(format!("{} is not offered", layer.shown(name))) };
        }
        let Some(flag) = Flag::find(name) else {
            let tip = usage::key(name).map(|near| format!(", did you mean {}?", layer.shown(near))).unwrap_or_default();
            return Err(format!("unknown key {}{tip}", layer.shown(name)));
        };
        let text = shown(value);
        match (flag.key, value) {
            // A printed recipe says it so where no model was named.
            ("checkpoint_dir", Value::Null) => Ok(None),
            ("checkpoint_dir", Value::String(_)) if text.is_empty() => Ok(None),
            (_, Value::Array(_) | Value::Object(_)) => {
                Err(format!("{}: expected a single value, got `{text}`", layer.shown(name)))
            }
            ("optimizer.name", _) => is_adamw(&text).map(|()| None),
            // What no style is called is said where the style is made.
            ("data.prompt_style", Value::String(_)) => {
                let known = PromptStyle::by_name(&text);
                Ok(Some((flag, known.map_or(text, |style| style.name().to_owned()).into())))
            }
            ("data.name", _) => data_module(&text).map(|module| Some((flag, module.into()))),
            (_, Value::String(_)) => match flag.kind.parse(&text) {
                Ok(value) => Ok(Some((flag, value))),
                Err(problem) => Err(format!("{}: {problem}, got `{text}`", layer.shown(name))),
            },
            (_, Value::Number(_) | Value::Bool(_)) if matches!(flag.kind, Kind::Text | Kind::Path) => {
                Ok(Some((flag, text.into())))
            }
            (_, value) => Ok(Some((flag, value.clone()))),
        }
    }

    /// Takes back what earlier layers said and this one replaces without naming it: fields that the new data module
    /// does not have, and the other way to give the warm-up.
    fn prepare(&mut self, found: &[(&'static str, &Value)]) {
        let sets = |key: &str| found.iter().any(|(other, value)| *other == key && !value.is_null());
        let names = |key: &str| found.iter().any(|(other, _)| *other == key);
        if let Some((_, name)) = found.iter().find(|(key, _)| *key == "data.name") {
            self.data_named = true;
            let own = name.as_str().and_then(DataModule::find).map_or(&[][..], |module| module.fields);
            let defaults = Self::default().tree;
            for field in DATA_MODULES.iter().flat_map(|module| module.fields).filter(|field| !own.contains(field)) {
                self.tree["data"][*field] = defaults["data"][*field].clone();
            }
        }
        let (steps, fraction) = ("train.lr_warmup_steps", "train.lr_warmup_fraction");
        if sets(fraction) && !names(steps) {
            self.tree["train"]["lr_warmup_steps"] = Value::Null;
        }
        if sets(steps) && !names(fraction) {
            self.tree["train"]["lr_warmup_fraction"] = Value::Null;
        }
    }

    /// Puts `value` at the dotted `key` if the settings can take it there.
    fn set(&mut self, key: &str, value: Value) -> std::result::Result<(), String> {
        let before = std::mem::replace(place(&mut self.tree, key), value);
        FinetuneSettings::deserialize(&self.tree).map(drop).map_err(|error| {
            *place(&mut self.tree, key) = before;
            in_words(&error.to_string())
        })
    }

    fn settings(&self) -> Result<FinetuneSettings> {
        let mut settings = FinetuneSettings::deserialize(&self.tree)
            .map_err(|error| Error::usage(in_words(&error.to_string()), "check the recipe"))?;
        if !self.data_named && settings.data.json_path.is_some() {
            settings.data.name = "JSON".into();
        }
        Ok(settings)
    }

    /// The settings, with paths and the last learning rate put right.
    fn finish(self, artifacts: Option<&Path>) -> Result<FinetuneSettings> {
        let mut settings = self.settings()?;
        if !settings.checkpoint_dir.as_os_str().is_empty() {
            settings.checkpoint_dir = args::checkpoint_dir(&settings.checkpoint_dir);
        }
        settings.out_dir = in_artifacts(settings.out_dir, artifacts);
        // LitGPT's recipes all say 6e-5, also beside a smaller learning rate; the cosine must not rise.
        settings.train.min_lr = settings.train.min_lr.min(settings.optimizer.learning_rate.max(0.0));
        Ok(settings)
    }
}

/// The slot of a dotted key in the tree, made if it is not there.
fn place<'a>(tree: &'a mut Value, key: &str) -> &'a mut Value {
    key.split('.').fold(tree, |tree, part| &mut tree[part])
}

/// A relative folder lies in the artifacts folder; one that does already stays, so that a printed recipe runs again.
fn in_artifacts(out_dir: PathBuf, artifacts: Option<&Path>) -> PathBuf {
    match artifacts {
        Some(root) if !root.as_os_str().is_empty() && out_dir.is_relative() && !out_dir.starts_with(root) => {
            root.join(out_dir)
        }
        _ => out_dir,
    }
}

fn is_adamw(name: &str) -> std::result::Result<(), String> {
    let last = name.rsplit('.').next().unwrap_or(name);
    match last.eq_ignore_ascii_case("adamw") {
        true => Ok(()),
        false => Err(format!("the optimizer `{name}` is not offered, only AdamW is")),
    }
}

fn data_module(name: &str) -> std::result::Result<&'static str, String> {
    if let Some(module) = DataModule::find(name) {
        return Ok(module.name);
    }
    let last = name.rsplit('.').next().unwrap_or(name);
    if PRETRAINING_DATA.contains(&last) {
        return Err(format!("`{name}` is data for pretraining; for your own files use JSON and `data.json_path`"));
    }
    let names: Vec<_> = DATA_MODULES.iter().map(|module| module.name).collect();
    Err(match closest(last, names.iter().copied()) {
        Some(near) => format!("unknown data module `{name}`, did you mean `{near}`?"),
        None => {
            format!(
                "unknown data module `{name}`, expected one of {}, a .json, .jsonl, .csv or .parquet file, or a dataset of \
                 the Hub as ORGANISATION/NAME",
                names.join(", ")
            )
        }
    })
}

/// A scalar as one would write it.
fn shown(value: &Value) -> String {
    match value {
        Value::String(text) => text.clone(),
        other => other.to_string(),
    }
}

/// What serde says about a wrong value, in the user's words.
fn in_words(message: &str) -> String {
    let Some((_, expected)) = message.rsplit_once("expected ") else {
        return message.to_owned();
    };
    if !message.starts_with("invalid ") {
        return message.to_owned();
    }
    let words = match expected {
        "usize" | "u64" => "a whole number, 0 or more",
        "i32" => "a whole number",
        "f64" => "a number",
        "a boolean" => "`true` or `false`",
        "a string" | "path string" => "a text",
        group if group.starts_with("struct ") => "`key: value` lines of its own",
        other => other,
    };
    format!("expected {words}")
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::write::to_tree;
    use super::*;

    fn resolved(line: &str) -> Result<FinetuneSettings> {
        parse_finetune(&line.split_whitespace().map(str::to_owned).collect::<Vec<_>>())
    }

    fn recipe(text: &str) -> (tempfile::TempDir, String) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("recipe.yaml");
        std::fs::write(&path, text).unwrap();
        let path = path.display().to_string();
        (folder, path)
    }

    #[test]
    fn flags_beat_files_wherever_they_stand() {
        let (_folder, path) = recipe("checkpoint_dir: other\nlora_r: 4\ntrain:\n  epochs: 1\n");
        for line in [
            format!("litgpt finetune_lora mine --config {path} --lora_r 2"),
            format!("litgpt finetune_lora --lora_r 2 mine -c {path}"),
            format!("litgpt -c {path} finetune lora --lora_r=2 --checkpoint_dir mine"),
        ] {
            let settings = resolved(&line).unwrap();
            assert_eq!((settings.lora.lora_r, settings.train.epochs), (2, Some(1)));
            assert_eq!(settings.checkpoint_dir, Path::new("mine"));
        }
    }

    #[test]
    fn later_files_beat_earlier_ones() {
        let (_one, first) = recipe("lora_r: 4\nlora_alpha: 7\n");
        let (_two, second) = recipe("lora_r: 5\n");
        let settings = resolved(&format!("litgpt finetune m --config {first} --config {second}")).unwrap();
        assert_eq!((settings.lora.lora_r, settings.lora.lora_alpha), (5, 7.0));
    }

    #[test]
    fn all_problems_of_a_file_are_told_at_once() {
        let (_folder, path) =
            recipe("lora_r: abc\nmax_steps: 3\nlora_q: true\ntrain:\n  epoch: 1\n  max_steps: 1.5\nbanana: 1\n");
        let text = resolved(&format!("litgpt finetune m --config {path}")).unwrap_err().to_string();
        for part in [
            "`lora_r`: expected a whole number, got `abc`",
            "unknown key `max_steps`, did you mean `train.max_steps`?",
            "unknown key `lora_q`, did you mean `lora_query`?",
            "unknown key `train.epoch`, did you mean `train.epochs`?",
            "`train.max_steps`: expected a whole number, 0 or more, got `1.5`",
            "unknown key `banana`;",
        ] {
            assert!(text.contains(part), "{part} in {text}");
        }
    }

    #[test]
    fn a_wrong_flag_is_named_with_its_value() {
        for (flags, part) in [
            ("--lora_r abc", "invalid value 'abc' for '--lora_r <N>': expected a whole number"),
            ("--lora_r=-3", "`--lora_r`: expected a whole number, 0 or more, got `-3`"),
            ("--lora_r null", "got `null`"),
            ("--lr fast", "invalid value 'fast' for '--train.learning_rate <X>': expected a number"),
            ("--precision fp8", "`--precision`: unknown precision `fp8`, expected one of 32-true"),
            ("--quantize int3", "unknown quantizer `int3`"),
            ("--eval.evaluate_example last", "expected `first`, `random` or an index, got `last`"),
            ("--data Alpacca", "did you mean `Alpaca`?"),
            ("--data TextFiles", "pretraining"),
            ("--optimizer SGD", "only AdamW"),
            ("--optimizer.amsgrad true", "unexpected argument"),
            ("--optimizer.betas 0.9", "expected two numbers, got `0.9`"),
            ("--train.max_step 3", "unexpected argument '--train.max_step' found"),
            ("--config missing.yaml", "recipe not found: `missing.yaml`"),
            ("--checkpoint_dir other", "two models"),
        ] {
            let error = resolved(&format!("litgpt finetune_lora m {flags}")).unwrap_err();
            assert!(error.to_string().contains(part), "{flags}: {error}");
            assert!(error.hint().is_some(), "{flags}");
        }
        let typo = resolved("litgpt finetune_lora m --train.max_step 3").unwrap_err();
        assert!(typo.to_string().ends_with(", did you mean `--train.max_steps`?"));
    }

    #[test]
    fn an_optimizer_in_one_piece_has_its_betas() {
        let text = r#"{"class_path":"torch.optim.AdamW","init_args":{"lr":1e-4,"betas":[0.9,0.95]}}"#;
        let (_folder, path) = recipe(text);
        for optimizer in [text, &path] {
            let argv = ["litgpt", "finetune_lora", "m", "--optimizer", optimizer].map(str::to_owned);
            let optimizer = parse_finetune(&argv).unwrap().optimizer;
            assert_eq!((optimizer.learning_rate, optimizer.beta1, optimizer.beta2), (1e-4, 0.9, 0.95));
        }
    }

    #[test]
    fn what_no_recipe_is_is_said_in_our_words() {
        let many = format!("a: [{}]\n", "1,".repeat(300_000));
        for (text, says) in [("lora_r: 4\n---\nlora_r: 5\n", "more than one document"), (&many, "more keys, lists")] {
            let (_folder, path) = recipe(text);
            let error = resolved(&format!("litgpt finetune m --config {path}")).unwrap_err().to_string();
            assert!(error.contains(says) && error.len() < 300, "{error}");
        }
    }

    #[test]
    fn a_recipe_that_cannot_be_read_is_a_wrong_command_line() {
        let folder = tempfile::tempdir().unwrap();
        let path = |name: &str| folder.path().join(name).display().to_string();
        std::fs::create_dir(path("dir.yaml")).unwrap();
        std::fs::write(path("bytes.yaml"), [0xff, 0xfe]).unwrap();
        std::fs::write(path("file"), "").unwrap();
        for (name, says) in [
            ("none.yaml", "recipe not found: `"),
            ("dir.yaml", "dir.yaml`: a folder, not a recipe"),
            ("bytes.yaml", "bytes.yaml`: not a text file"),
            ("file/r.yaml", "cannot read `"),
        ] {
            for flag in ["config", "train", "eval", "optimizer", "data"] {
                let error = resolved(&format!("litgpt finetune m --{flag} {}", path(name))).unwrap_err();
                assert!(matches!(error, Error::Usage { .. }), "--{flag} {name}: {error:?}");
                assert!(error.to_string().contains(says) && error.hint().is_some(), "--{flag} {name}: {error}");
            }
        }
    }

    #[test]
    fn no_model_is_an_error_unless_only_printing() {
        assert!(resolved("litgpt finetune lora --data Alpaca").unwrap_err().to_string().contains("no model"));
        resolved("litgpt finetune lora --data Alpaca --print_config").unwrap();
    }

    #[test]
    fn a_printed_recipe_runs_again_to_the_same_settings() {
        let line = "litgpt finetune m --data JSON --data.json_path no --lora_key --lr 3e-5 --quantize bnb.nf4-dq \
                    --train.save_interval null --train.epochs null --train.max_steps 7 --train.lr_warmup_fraction 0.1 \
                    --precision 16-true --eval.evaluate_example 3 --add_bos off --optimizer.beta2 0.95 --lora_alpha 1.5 \
                    --train.activation_checkpointing on --train.prefix_sharing off --train.save_total_limit 2 --train.max_skipped_steps 3 \
                    --eval.early_stopping_patience 4 --data.prompt_style litgpt.prompts.Llama3";
        let settings = resolved(line).unwrap();
        for what in ["", "skip_null", "skip_default", "skip_null,skip_default"] {
            let (_folder, path) = recipe(&print_config(&settings, what).unwrap());
            assert_eq!(resolved(&format!("litgpt finetune --config {path}")).unwrap(), settings, "{what}");
            assert_eq!(from_file(Path::new(&path)).unwrap(), settings, "{what}");
        }
        assert!(print_config(&settings, "skip_nulls").is_err());
    }

    #[test]
    fn a_recipe_printed_without_a_model_is_read() {
        let printed = print_config(&resolved("litgpt finetune --data Alpaca --print_config").unwrap(), "").unwrap();
        let (_folder, path) = recipe(&printed);
        assert_eq!(resolved(&format!("litgpt finetune m --config {path}")).unwrap().checkpoint_dir, Path::new("m"));
    }

    #[test]
    fn hyperparameters_have_litgpts_shape_and_no_token() {
        let settings = resolved("litgpt finetune m --access_token hf_secret --quantize nf4").unwrap();
        assert_eq!(settings.access_token.as_deref(), Some("hf_secret"));
        let folder = tempfile::tempdir().unwrap();
        let path = write_hyperparameters(&settings, folder.path()).unwrap();
        let text = std::fs::read_to_string(&path).unwrap();
        let tree = read_tree(&path).unwrap();
        assert!(!text.contains("hf_secret") && !text.contains("access_token"));
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1);
        assert_eq!(tree["data"]["class_path"], "litgpt.data.Alpaca");
        assert_eq!(tree["optimizer"]["init_args"]["betas"], json!([0.9, 0.999]));
        assert_eq!(tree["quantize"], "bnb.nf4");
        assert_eq!(tree["lora_alpha"], json!(16));
        for key in ["/train/save_total_limit", "/train/max_skipped_steps", "/eval/early_stopping_patience"] {
            assert!(tree.pointer(key).is_none(), "LitGPT does not read `{key}`");
        }
        assert!(tree.get("add_bos").is_none() && tree["train"].get("activation_checkpointing").is_none());
    }

    #[test]
    fn prompt_styles_are_written_as_litgpt_reads_them() {
        for (given, written) in [
            ("litgpt.prompts.Phi2", json!("phi-2")),
            ("Phi2", json!("phi-2")),
            ("alpaca", json!("alpaca")),
            ("chat", json!("chat")),
            ("chatml", json!({"class_path": "litgpt.prompts.ChatML"})),
            ("litgpt.prompts.Default", json!({"class_path": "litgpt.prompts.Default"})),
        ] {
            let settings = resolved(&format!("litgpt finetune m --data.prompt_style {given}")).unwrap();
            let data = &to_tree(&settings)["data"]["init_args"];
            assert_eq!(data["prompt_style"], written, "{given}");
            assert!(data.get("pack").is_none(), "LitGPT has no such key");
            let (_folder, path) = recipe(&to_yaml(&settings).unwrap());
            assert_eq!(from_file(Path::new(&path)).unwrap(), settings, "{given}");
        }
        let packed = resolved("litgpt finetune m --data.pack true").unwrap();
        assert_eq!(to_tree(&packed)["data"]["init_args"]["pack"], true);
    }

    #[test]
    fn a_new_data_module_drops_what_only_the_old_one_had() {
        let (_folder, path) = recipe(
            "data:\n  class_path: litgpt.data.Alpaca2k\n  init_args:\n    mask_prompt: true\n    download_dir: d\n",
        );
        let settings = resolved(&format!("litgpt finetune m --config {path} --data JSON --data.json_path x")).unwrap();
        assert_eq!(settings.data.mask_prompt, Some(true));
        assert_eq!((settings.data.name.as_str(), settings.data.download_dir), ("JSON", None));
        let error = resolved(&format!("litgpt finetune m --config {path} --data.json_path x")).unwrap_err();
        assert!(error.to_string().contains("`data.json_path` is not a field of Alpaca2k but of JSON"), "{error}");
    }

    #[test]
    fn warmup_fraction_replaces_warmup_steps() {
        let settings = resolved("litgpt finetune m --train.lr_warmup_fraction 0.1").unwrap();
        assert_eq!((settings.train.lr_warmup_steps, settings.train.lr_warmup_fraction), (None, Some(0.1)));
        let both = "litgpt finetune m --train.lr_warmup_fraction 0.1 --train.lr_warmup_steps 3";
        assert!(resolved(both).unwrap_err().to_string().contains("exclude each other"));
    }

    #[test]
    fn the_last_learning_rate_is_at_most_the_first() {
        assert_eq!(resolved("litgpt finetune m --lr 1e-5").unwrap().train.min_lr, 1e-5);
        assert_eq!(resolved("litgpt finetune m --lr 1e-3").unwrap().train.min_lr, 6e-5);
    }

    #[test]
    fn relative_output_lies_in_the_artifacts_folder() {
        let root = Some(Path::new("arts"));
        assert_eq!(in_artifacts("out/x".into(), None), Path::new("out/x"));
        assert_eq!(in_artifacts("out/x".into(), root), Path::new("arts/out/x"));
        assert_eq!(in_artifacts("arts/out/x".into(), root), Path::new("arts/out/x"));
        assert_eq!(in_artifacts("/out/x".into(), root), Path::new("/out/x"));
    }
}
