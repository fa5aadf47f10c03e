//! Datasets: which ones there are, how their files are read and checked, and how they are split.
//!
//! A record is an instruction, a conversation or plain text. Files are parsed in `read.rs`, which recognizes the form of
//! the user's own rows; what becomes of a record is next door too: `prompt.rs` and `chat.rs` make its text, `sft.rs` its
//! ids and labels. Downloading is left to the caller, behind [`Fetch`].

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};
use crate::tokenizer::Tokenizer;
use chat::Message;

pub mod chat;
pub mod prompt;
pub mod sft;
mod system_prompts;
pub mod torch_rng;

mod read;

use prompt::PromptStyle;
use read::Form;

/// Validation share that LitGPT takes from a single file if none is given.
const DEFAULT_VAL_SPLIT_FRACTION: f64 = 0.05;

/// One dataset of the registry.
#[derive(Debug)]
pub struct DatasetKind {
    /// LitGPT's class, such as `Alpaca`.
    pub name: &'static str,
    /// One line for a list of datasets.
    pub about: &'static str,
    /// Default folder of its files; empty for `JSON`.
    pub dir: &'static str,
    /// Its files.
    pub files: Files,
    /// What its rows call the three parts.
    pub keys: Keys,
    /// Default prompt style.
    pub style: &'static str,
}

/// Files of a dataset.
#[derive(Debug)]
pub enum Files {
    /// The user's own, at `json_path`.
    Own,
    /// One file, split by `val_split_fraction`, whose default this is.
    One(RemoteFile, f64),
    /// One file for training, one for validation.
    Two(RemoteFile, RemoteFile),
}

/// A file and where it comes from.
#[derive(Debug)]
pub struct RemoteFile {
    /// Its name in the download folder; `.json` or `.jsonl`.
    pub name: &'static str,
    /// Its address; for an address that is no JSON file, `made` says how to make the file.
    pub url: &'static str,
    /// `None`: the address gives the file itself. Else what to do by hand.
    pub made: Option<&'static str>,
}

/// Keys of a row.
#[derive(Debug, Clone, Copy)]
pub struct Keys {
    /// Key of the instruction.
    pub instruction: &'static str,
    /// Key of the input, which a row may lack.
    pub input: Option<&'static str>,
    /// Key of the answer.
    pub output: &'static str,
}

const ALPACA_KEYS: Keys = Keys { instruction: "instruction", input: Some("input"), output: "output" };

/// All datasets that can be read.
pub const DATASETS: &[DatasetKind] = &[
    DatasetKind {
        name: "Alpaca",
        about: "52,000 instructions, cleaned (tloen/alpaca-lora)",
        dir: "data/alpaca",
        files: Files::One(
            RemoteFile {
                name: "alpaca_data_cleaned_archive.json",
                url: "https://raw.githubusercontent.com/tloen/alpaca-lora/main/alpaca_data_cleaned_archive.json",
                made: None,
            },
            0.03865,
        ),
        keys: ALPACA_KEYS,
        style: "alpaca",
    },
    DatasetKind {
        name: "Alpaca2k",
        about: "2,000 instructions of Alpaca (mhenrichsen/alpaca_2k_test)",
        dir: "data/alpaca2k",
        files: Files::One(
            RemoteFile {
                name: "alpaca2k_data_cleaned_archive.json",
                url: "https://huggingface.co/datasets/mhenrichsen/alpaca_2k_test",
                made: Some(
                    "save its rows as a JSON list, with Python's load_dataset(..., split='train').to_json(FILE, lines=False)",
                ),
            },
            0.05,
        ),
        keys: ALPACA_KEYS,
        style: "alpaca",
    },
    DatasetKind {
        name: "AlpacaGPT4",
        about: "52,000 instructions answered by GPT-4",
        dir: "data/alpacagpt4",
        files: Files::One(
            RemoteFile {
                name: "alpacagpt4_data_cleaned_archive.json",
                url: "https://raw.githubusercontent.com/Instruction-Tuning-with-GPT-4/GPT-4-LLM/main/data/alpaca_gpt4_data.json",
                made: None,
            },
            0.03847,
        ),
        keys: ALPACA_KEYS,
        style: "alpaca",
    },
    DatasetKind {
        name: "Dolly",
        about: "15,000 instructions written by people (databricks-dolly-15k)",
        dir: "data/dolly",
        files: Files::One(
            RemoteFile {
                name: "databricks-dolly-15k.jsonl",
                url: "https://huggingface.co/datasets/databricks/databricks-dolly-15k/resolve/main/databricks-dolly-15k.jsonl",
                made: None,
            },
            0.1,
        ),
        keys: Keys { instruction: "instruction", input: Some("context"), output: "response" },
        style: "alpaca",
    },
    DatasetKind {
        name: "JSON",
        about: "your own file or folder, given by `json_path`",
        dir: "",
        files: Files::Own,
        keys: ALPACA_KEYS,
        style: "alpaca",
    },
    DatasetKind {
        name: "LongForm",
        about: "instructions with long answers (akoksal/LongForm)",
        dir: "data/longform",
        files: Files::Two(
            RemoteFile {
                name: "train.json",
                url: "https://raw.githubusercontent.com/akoksal/LongForm/main/dataset/train.json",
                made: None,
            },
            RemoteFile {
                name: "val.json",
                url: "https://raw.githubusercontent.com/akoksal/LongForm/main/dataset/val.json",
                made: None,
            },
        ),
        keys: Keys { instruction: "input", input: None, output: "output" },
        style: "longform",
    },
];

/// Datasets of LitGPT that are not JSON files with one instruction a row.
const NOT_READ: &[&str] =
    &["Deita", "FLAN", "LIMA", "LitData", "MicroLlama", "OpenWebText", "TextFiles", "TinyLlama", "TinyStories"];

/// Which dataset, and how it is used; LitGPT's names and defaults.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct DataConfig {
    /// Dataset, as in [`DATASETS`] (`Alpaca`, `litgpt.data.Alpaca`).
    pub name: String,
    /// `JSON` only: a `.json`, `.jsonl` or `.csv` file, or a folder with a train and a val file.
    pub json_path: Option<PathBuf>,
    /// Renamed keys of the user's own rows: `instruction=question,output=answer`.
    pub columns: Option<String>,
    /// Share of the rows kept for validation; `None`: the dataset's own.
    pub val_split_fraction: Option<f64>,
    /// Prompt style; `None`: the dataset's own.
    pub prompt_style: Option<String>,
    /// Label of tokens that do not count.
    pub ignore_index: i32,
    /// Seed of split and order.
    pub seed: u64,
    /// Kept for LitGPT's files; has no effect on the result.
    pub num_workers: usize,
    /// Where the dataset's files are, or go; `None`: the dataset's own folder.
    pub download_dir: Option<PathBuf>,
}

impl Default for DataConfig {
    fn default() -> Self {
        Self {
            name: "Alpaca".to_owned(),
            json_path: None,
            columns: None,
            val_split_fraction: None,
            prompt_style: None,
            ignore_index: -100,
            seed: 42,
            num_workers: 4,
            download_dir: None,
        }
    }
}

/// Where a record was read, for messages.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Origin {
    /// Index into [`Dataset::sources`].
    pub file: usize,
    /// Line of a `.jsonl` file, number of the row in a `.json` list; from 1.
    pub row: usize,
}

/// One row of a dataset.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Record {
    /// What it says.
    pub content: Content,
    /// Where it was read.
    pub row: Origin,
}

/// What a row says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Content {
    /// One instruction with its answer.
    Instruction {
        /// What the model is asked.
        instruction: String,
        /// What the instruction is about, if it has that.
        input: Option<String>,
        /// The answer to learn.
        output: String,
    },
    /// Turns, at least one of them the assistant's, which is the last.
    Conversation(Vec<Message>),
    /// Text without roles, all of it to learn.
    Text(String),
}

impl Record {
    /// The record as messages; none for plain text.
    #[must_use]
    pub fn messages(&self) -> Vec<Message> {
        match &self.content {
            Content::Instruction { instruction, input, output } => {
                vec![prompt::instruction(instruction, input.as_deref()), Message::new("assistant", output)]
            }
            Content::Conversation(messages) => messages.clone(),
            Content::Text(_) => Vec::new(),
        }
    }
}

/// A dataset, read and split.
#[derive(Debug, Clone)]
pub struct Dataset {
    /// Rows to train on, in the order of LitGPT's split.
    pub train: Vec<Record>,
    /// Rows to validate with; never empty.
    pub val: Vec<Record>,
    /// How a row becomes a prompt.
    pub style: PromptStyle,
    /// The files that were read.
    pub sources: Vec<PathBuf>,
}

impl Dataset {
    /// A row's place in words: "`data.jsonl` line 3".
    #[must_use]
    pub fn locate(&self, origin: Origin) -> String {
        self.sources.get(origin.file).map_or_else(
            || format!("row {}", origin.row),
            |path| format!("`{}` {} {}", path.display(), read::unit(path), origin.row),
        )
    }
}

/// Brings a file from the web; the one way in which this room reaches the network.
pub trait Fetch {
    /// Saves what `url` gives as the file `to`, in a folder that exists.
    ///
    /// # Errors
    /// When that fails; then there is no file `to`.
    fn fetch(&self, url: &str, to: &Path) -> Result<()>;
}

/// The dataset called `name` (case and a leading `litgpt.data.` do not matter).
///
/// # Errors
/// `Error::Usage` for an unknown name, `Error::Unsupported` for a dataset of LitGPT's that is not read here.
pub fn by_name(name: &str) -> Result<&'static DatasetKind> {
    let last = name.rsplit('.').next().unwrap_or(name);
    let normal = |text: &str| text.replace(['_', '-'], "").to_lowercase();
    let same = |other: &str| normal(other) == normal(last);
    if let Some(kind) = DATASETS.iter().find(|kind| same(kind.name)) {
        return Ok(kind);
    }
    if let Some(known) = NOT_READ.iter().find(|known| same(known)) {
        let hint = "save its rows as a JSON list with the keys instruction, input and output, and use \
                    --data JSON --data.json_path FILE";
        return Err(Error::unsupported(format!("dataset `{known}`"), hint));
    }
    let all = || DATASETS.iter().map(|kind| kind.name);
    let hint = closest(last, all()).map_or_else(
        || format!("choose one of {}", all().collect::<Vec<_>>().join(", ")),
        |near| format!("did you mean `{near}`?"),
    );
    Err(Error::usage(format!("no dataset is called `{name}`"), hint))
}

/// Reads, checks and splits the dataset that `config` asks for, fetching its files if they are not there.
///
/// `tokenizer` is asked for its chat template, should the style be that. The split is that of LitGPT, row for row (for Alpaca2k, which LitGPT splits by other means, only in size).
///
/// # Errors
/// `Usage` for settings that do not fit together, `Missing` for a file that is not there and could not be fetched,
/// `Invalid` for one that is broken, and for a split that leaves one part empty.
pub fn load(config: &DataConfig, tokenizer: &Tokenizer, fetch: &dyn Fetch) -> Result<Dataset> {
    let kind = by_name(&config.name)?;
    let style = PromptStyle::resolve(config.prompt_style.as_deref().unwrap_or(kind.style), tokenizer)?;
    check_fraction(config)?;
    let fraction = config.val_split_fraction;
    let dir = config.download_dir.clone().unwrap_or_else(|| PathBuf::from(kind.dir));
    if config.columns.is_some() && !matches!(kind.files, Files::Own) {
        let message = format!("columns goes with your own file, not with --data {}", kind.name);
        return Err(Error::usage(message, "leave --data.columns out, or give --data FILE"));
    }
    if config.json_path.is_some() && !matches!(kind.files, Files::Own) {
        let message = format!("json_path goes with --data JSON, not with --data {}", kind.name);
        return Err(Error::usage(message, "use --data JSON --data.json_path FILE"));
    }
    match &kind.files {
        Files::Own => load_own(config, style),
        Files::One(file, default) => {
            let path = provide(kind, file, &dir, fetch)?;
            one_file(path, fraction.unwrap_or(*default), config.seed, &Form::Keys(kind.keys), style)
        }
        Files::Two(train, val) => {
            if fraction.is_some() {
                let message = format!("val_split_fraction has no use: {} has a validation file of its own", kind.name);
                return Err(Error::usage(message, "leave --data.val_split_fraction out"));
            }
            let form = Form::Keys(kind.keys);
            two_files(provide(kind, train, &dir, fetch)?, provide(kind, val, &dir, fetch)?, &form, style)
        }
    }
}

fn check_fraction(config: &DataConfig) -> Result<()> {
    match config.val_split_fraction {
        Some(fraction) if !(0.0..=1.0).contains(&fraction) => {
            let message = format!("val_split_fraction must lie between 0 and 1, got {fraction}");
            Err(Error::usage(message, "for example --data.val_split_fraction 0.05"))
        }
        _ => Ok(()),
    }
}

fn load_own(config: &DataConfig, style: PromptStyle) -> Result<Dataset> {
    let form = Form::Any { renamed: config.columns.as_deref().map(read::columns).transpose()?.unwrap_or_default() };
    let Some(path) = config.json_path.clone() else {
        let message = "dataset JSON needs a json_path";
        return Err(Error::usage(message, "add --data.json_path FILE, a .json, .jsonl or .csv file"));
    };
    if path.is_file() {
        let fraction = config.val_split_fraction.unwrap_or(DEFAULT_VAL_SPLIT_FRACTION);
        return one_file(path, fraction, config.seed, &form, style);
    }
    if !path.is_dir() {
        let hint = "--data.json_path takes a .json, .jsonl or .csv file, or a folder with train.json and val.json";
        return Err(Error::Missing { what: "dataset".to_owned(), path, hint: hint.to_owned() });
    }
    if config.val_split_fraction.is_some() {
        let message = format!("val_split_fraction has no use: json_path `{}` is a folder", path.display());
        return Err(Error::usage(message, "leave --data.val_split_fraction out, or give one file"));
    }
    let part = |name: &str| {
        let candidates = ["json", "jsonl", "csv"].map(|ending| path.join(format!("{name}.{ending}")));
        candidates.iter().find(|file| file.is_file()).cloned().ok_or_else(|| Error::Missing {
            what: format!("{name} file of the dataset"),
            path: candidates[0].clone(),
            hint: format!("put a {name}.json or {name}.jsonl there, or give --data.json_path one file"),
        })
    };
    two_files(part("train")?, part("val")?, &form, style)
}

/// The path of a dataset's file, which is there when this returns.
fn provide(kind: &DatasetKind, file: &RemoteFile, dir: &Path, fetch: &dyn Fetch) -> Result<PathBuf> {
    let path = dir.join(file.name);
    let filled = || path.metadata().is_ok_and(|data| data.len() > 0);
    if filled() {
        return Ok(path);
    }
    let missing = |hint: String| Error::Missing { what: format!("dataset {}", kind.name), path: path.clone(), hint };
    if let Some(made) = file.made {
        return Err(missing(format!("{made}, under that name: {}", file.url)));
    }
    std::fs::create_dir_all(dir).map_err(Error::io("create", dir))?;
    let problem = match fetch.fetch(file.url, &path) {
        Ok(()) if filled() => return Ok(path),
        Ok(()) => "it gave an empty file".to_owned(),
        Err(e) => e.to_string(),
    };
    Err(missing(format!("download {} under that name (fetching it failed: {problem})", file.url)))
}

fn one_file(path: PathBuf, fraction: f64, seed: u64, form: &Form, style: PromptStyle) -> Result<Dataset> {
    let rows = read::records(&path, 0, form)?;
    let n = rows.len();
    let (n_train, n_val) = torch_rng::split_lengths(n, fraction);
    if n_train == 0 || n_val == 0 {
        let part = if n_val == 0 { "validation" } else { "training" };
        let problem = format!("val_split_fraction {fraction} of {n} rows leaves none for {part}");
        return Err(Error::invalid(&path, problem, split_hint(n)));
    }
    let (train, val) = torch_rng::random_split(n, fraction, seed);
    let mut rows: Vec<Option<Record>> = rows.into_iter().map(Some).collect();
    let mut take = |order: Vec<usize>| order.into_iter().filter_map(|i| rows[i].take()).collect();
    Ok(Dataset { train: take(train), val: take(val), style, sources: vec![path] })
}

fn split_hint(n: usize) -> String {
    if n < 2 {
        return "give more rows, or a folder with train.json and val.json".to_owned();
    }
    let least = (10_000.0 / n as f64).ceil() / 10_000.0;
    format!("use --data.val_split_fraction {least} or more, below 1, or a folder with train.json and val.json")
}

fn two_files(train: PathBuf, val: PathBuf, form: &Form, style: PromptStyle) -> Result<Dataset> {
    let (train_rows, val_rows) = (read::records(&train, 0, form)?, read::records(&val, 1, form)?);
    Ok(Dataset { train: train_rows, val: val_rows, style, sources: vec![train, val] })
}

/// The candidate most like `name`, if any is like it.
fn closest<'a>(name: &str, candidates: impl Iterator<Item = &'a str>) -> Option<&'a str> {
    let name = name.to_lowercase();
    let limit = (name.chars().count() / 3).max(1);
    candidates
        .map(|candidate| (edit_distance(&name, &candidate.to_lowercase()), candidate))
        .filter(|(distance, _)| !name.is_empty() && *distance <= limit)
        .min_by_key(|(distance, _)| *distance)
        .map(|(_, candidate)| candidate)
}

/// Levenshtein distance in characters.
fn edit_distance(a: &str, b: &str) -> usize {
    let b: Vec<char> = b.chars().collect();
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, x) in a.chars().enumerate() {
        let mut diagonal = row[0];
        row[0] = i + 1;
        for (j, &y) in b.iter().enumerate() {
            let substituted = diagonal + usize::from(x != y);
            diagonal = row[j + 1];
            row[j + 1] = substituted.min(diagonal + 1).min(row[j] + 1);
        }
    }
    row[b.len()]
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    /// Writes `content`, or fails if there is none; notes nothing.
    struct Web(Option<&'static str>);

    impl Fetch for Web {
        fn fetch(&self, url: &str, to: &Path) -> Result<()> {
            assert!(url.starts_with("https://"));
            match self.0 {
                Some(content) => std::fs::write(to, content).map_err(Error::io("write", to)),
                None => Err(Error::unsupported("network", "")),
            }
        }
    }

    /// The quickstart model's, which has no chat template.
    fn tokenizer() -> Tokenizer {
        Tokenizer::load(&Path::new(env!("CARGO_MANIFEST_DIR")).join("data/tiny")).unwrap()
    }

    fn said(record: &Record) -> (String, Option<String>, String) {
        match &record.content {
            Content::Instruction { instruction, input, output } => (instruction.clone(), input.clone(), output.clone()),
            other => panic!("{other:?}"),
        }
    }

    fn rows(n: usize) -> String {
        let rows: Vec<_> = (0..n)
            .map(|i| serde_json::json!({"instruction": format!("i{i}"), "input": "", "output": format!("o{i}")}))
            .collect();
        serde_json::to_string(&rows).unwrap()
    }

    fn json(path: &Path) -> DataConfig {
        DataConfig { name: "JSON".into(), json_path: Some(path.to_owned()), ..DataConfig::default() }
    }

    fn fails(config: &DataConfig) -> (String, String) {
        let e = load(config, &tokenizer(), &Web(None)).unwrap_err();
        let (text, hint) = (e.to_string(), e.hint().unwrap_or_default());
        assert!(!text.contains('\n') && !hint.contains('\n'), "{text} / {hint}");
        (text, hint)
    }

    #[test]
    fn registry_is_sound() {
        for kind in DATASETS {
            assert_eq!(by_name(kind.name).unwrap().name, kind.name);
            assert_eq!(by_name(&format!("litgpt.data.{}", kind.name)).unwrap().name, kind.name);
            assert_eq!(PromptStyle::by_name(kind.style).unwrap().name(), kind.style);
            let files = match &kind.files {
                Files::Own => vec![],
                Files::One(file, _) => vec![file],
                Files::Two(a, b) => vec![a, b],
            };
            assert!(files.iter().all(|file| file.url.starts_with("https://") && file.name.contains(".json")));
        }
        assert!(DATASETS.is_sorted_by_key(|kind| kind.name));
        assert_eq!(by_name("alpaca_2k").unwrap().name, "Alpaca2k");
        assert_eq!(by_name("json").unwrap().name, "JSON");
    }

    #[test]
    fn unknown_datasets_are_explained() {
        let e = by_name("Alpacca").unwrap_err();
        assert_eq!(e.hint().unwrap(), "did you mean `Alpaca`?");
        assert!(by_name("wikipedia").unwrap_err().hint().unwrap().contains("Alpaca, Alpaca2k"));
        assert!(matches!(by_name("litgpt.data.LIMA").unwrap_err(), Error::Unsupported { .. }));
    }

    #[test]
    fn defaults_are_litgpts_and_unknown_keys_fail() {
        let config: DataConfig = serde_json::from_str("{}").unwrap();
        assert_eq!(config, DataConfig::default());
        assert_eq!(
            (config.name.as_str(), config.seed, config.ignore_index, config.num_workers),
            ("Alpaca", 42, -100, 4)
        );
        assert!(serde_json::from_str::<DataConfig>(r#"{"val_splt_fraction": 1}"#).is_err());
        let text = serde_json::to_string(&config).unwrap();
        assert_eq!(serde_json::from_str::<DataConfig>(&text).unwrap(), config);
    }

    #[test]
    fn one_file_is_split_as_by_torch() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("data.json");
        std::fs::write(&path, rows(10)).unwrap();
        let data =
            load(&DataConfig { val_split_fraction: Some(0.25), ..json(&path) }, &tokenizer(), &Web(None)).unwrap();
        let order = |part: &[Record]| part.iter().map(|r| said(r).0[1..].parse().unwrap()).collect::<Vec<usize>>();
        assert_eq!(order(&data.train), [2, 6, 1, 8, 4, 5, 0, 9]);
        assert_eq!(order(&data.val), [3, 7]);
        assert_eq!(data.train[0].row, Origin { file: 0, row: 3 });
        assert_eq!(data.locate(data.train[0].row), format!("`{}` row 3", path.display()));
        assert_eq!(data.style.name(), "alpaca");
        std::fs::write(&path, rows(40)).unwrap();
        let data =
            load(&DataConfig { prompt_style: Some("Phi3".into()), ..json(&path) }, &tokenizer(), &Web(None)).unwrap();
        assert_eq!((data.train.len(), data.val.len(), data.style.name()), (38, 2, "phi-3"));
    }

    #[test]
    fn empty_parts_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("data.json");
        std::fs::write(&path, rows(12)).unwrap();
        let (text, hint) = fails(&json(&path));
        assert!(text.ends_with("val_split_fraction 0.05 of 12 rows leaves none for validation"), "{text}");
        assert!(hint.starts_with("use --data.val_split_fraction 0.0834 or more"), "{hint}");
        assert_eq!(torch_rng::split_lengths(12, 0.0834), (11, 1));
        let (text, _) = fails(&DataConfig { val_split_fraction: Some(1.0), ..json(&path) });
        assert!(text.ends_with("leaves none for training"), "{text}");
        std::fs::write(&path, rows(1)).unwrap();
        let (_, hint) = fails(&json(&path));
        assert!(hint.starts_with("give more rows"), "{hint}");
    }

    #[test]
    fn folder_has_train_and_val() {
        let dir = tempfile::tempdir().unwrap();
        let (text, hint) = fails(&json(dir.path()));
        assert!(text.starts_with("train file of the dataset not found"), "{text}");
        assert!(hint.contains("train.jsonl"), "{hint}");
        std::fs::write(dir.path().join("train.json"), rows(3)).unwrap();
        assert!(fails(&json(dir.path())).0.starts_with("val file of the dataset not found"));
        std::fs::write(dir.path().join("val.jsonl"), "{\"instruction\": \"a\", \"output\": \"b\"}\n").unwrap();
        let data = load(&json(dir.path()), &tokenizer(), &Web(None)).unwrap();
        assert_eq!((data.train.len(), data.val.len()), (3, 1));
        assert_eq!(data.val[0].row, Origin { file: 1, row: 1 });
        assert!(data.locate(data.val[0].row).ends_with("val.jsonl` line 1"));
        let (text, _) = fails(&DataConfig { val_split_fraction: Some(0.1), ..json(dir.path()) });
        assert!(text.contains("is a folder"), "{text}");
    }

    #[test]
    fn settings_that_do_not_fit() {
        assert!(fails(&DataConfig { name: "JSON".into(), ..DataConfig::default() }).0.contains("needs a json_path"));
        let config = DataConfig { json_path: Some("x.json".into()), ..DataConfig::default() };
        assert!(fails(&config).0.contains("goes with --data JSON"));
        let config = DataConfig { val_split_fraction: Some(f64::NAN), ..DataConfig::default() };
        assert!(fails(&config).0.contains("between 0 and 1"));
        let config = DataConfig { name: "LongForm".into(), val_split_fraction: Some(0.1), ..DataConfig::default() };
        assert!(fails(&config).0.contains("validation file of its own"));
        assert!(fails(&json(Path::new("/nonexistent.json"))).0.starts_with("dataset not found: `/nonexistent.json`"));
        let config = DataConfig { prompt_style: Some("alpacca".into()), ..DataConfig::default() };
        assert_eq!(fails(&config).1, "did you mean `alpaca`?");
    }

    #[test]
    fn files_are_fetched_once_or_named() {
        let dir = tempfile::tempdir().unwrap();
        let folder = dir.path().join("deep/dolly");
        let config = DataConfig {
            name: "Dolly".into(),
            download_dir: Some(folder.clone()),
            val_split_fraction: Some(0.5),
            ..DataConfig::default()
        };
        let (text, hint) = fails(&config);
        assert!(text.ends_with("deep/dolly/databricks-dolly-15k.jsonl`"), "{text}");
        assert!(hint.contains("https://huggingface.co") && hint.contains("not supported: network"), "{hint}");
        let rows = concat!(
            "{\"instruction\":\"a\",\"context\":\"c\",\"response\":\"r\"}\n",
            "{\"instruction\":\"b\",\"context\":\"\",\"response\":\"s\"}"
        );
        let web = Web(Some(rows));
        let data = load(&config, &tokenizer(), &web).unwrap();
        assert_eq!((data.train.len(), data.val.len()), (1, 1));
        let first = data.train.iter().chain(&data.val).map(said).find(|r| r.0 == "a").unwrap();
        assert_eq!((first.1.as_deref(), first.2.as_str()), (Some("c"), "r"));
        assert!(load(&config, &tokenizer(), &Web(None)).is_ok()); // now read from the folder
        let two = DataConfig { name: "Alpaca2k".into(), download_dir: Some(folder), ..DataConfig::default() };
        assert!(fails(&two).1.contains("mhenrichsen/alpaca_2k_test"));
    }

    #[test]
    fn edit_distances() {
        assert_eq!(edit_distance("", "abc"), 3);
        assert_eq!(edit_distance("kitten", "sitting"), 3);
        assert_eq!(closest("phi4", ["phi-4", "phi-4-mini"].into_iter()), Some("phi-4"));
        assert_eq!(closest("", ["a"].into_iter()), None);
    }
}
