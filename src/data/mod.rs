//! Datasets: which ones there are, how their files are read and checked, and how they are split.
//!
//! A record is an instruction, a conversation or plain text. The known datasets are in `registry.rs`, which files they
//! are in `source.rs`. Files are parsed in `read.rs` and `parquet.rs`; the former recognizes the form of the user's own
//! rows. What becomes of a record is next door too: `prompt.rs` and `chat.rs` make its text, `sft.rs` its ids and
//! labels. Downloading is left to the caller, behind [`Fetch`].

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};
use crate::tokenizer::Tokenizer;
use chat::Message;

pub mod chat;
pub mod prefix;
pub mod prompt;
pub mod sft;
mod system_prompts;
pub mod torch_rng;

mod jinja;
mod parquet;
mod read;
mod registry;
mod source;

use prompt::PromptStyle;
use read::Form;
pub use registry::{
    DATASETS, DatasetKind, FLAN_ENDING, FLAN_SUBSETS, Files, Keys, RemoteFile, Rows, Validation, by_name,
};
use source::Parts;

/// Validation share that LitGPT takes from a single file if none is given.
const DEFAULT_VAL_SPLIT_FRACTION: f64 = 0.05;

/// Which dataset, and how it becomes samples; LitGPT's names and defaults. Fields that a dataset does not have are `None` or
/// default.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct DataConfig {
    /// Dataset, as in [`DATASETS`] (`Alpaca`, `litgpt.data.Alpaca`).
    pub name: String,
    /// `JSON` only: a `.json`, `.jsonl`, `.csv` or `.parquet` file, or a folder with a train and a val file.
    pub json_path: Option<PathBuf>,
    /// Renamed keys of the user's own rows: `instruction=question,output=answer`.
    pub columns: Option<String>,
    /// Train on the answers only; `None`: only in conversations (LitGPT knows none and says false).
    pub mask_prompt: Option<bool>,
    /// Put short samples side by side, up to `train.max_seq_length` tokens.
    pub pack: bool,
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
    /// Deita and LIMA: all answers of a conversation, each as a sample; else the first.
    pub include_multiturn_conversations: bool,
    /// Another repository of the Hub.
    pub repo_id: Option<String>,
    /// FLAN, Hub: names of subsets with commas between.
    pub subsets: Option<String>,
    /// Another address of the dataset's file.
    pub file_url: Option<String>,
    /// Another name for the dataset's file.
    pub file_name: Option<String>,
    /// FLAN: another address of the folder.
    pub url: Option<String>,
}

impl Default for DataConfig {
    fn default() -> Self {
        Self {
            name: "Alpaca".to_owned(),
            json_path: None,
            columns: None,
            mask_prompt: None,
            pack: false,
            val_split_fraction: None,
            prompt_style: None,
            ignore_index: -100,
            seed: 42,
            num_workers: 4,
            download_dir: None,
            include_multiturn_conversations: false,
            repo_id: None,
            subsets: None,
            file_url: None,
            file_name: None,
            url: None,
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
        /// A system prompt of its own, in place of the style's.
        sys_prompt: Option<String>,
        /// The answer to learn.
        output: String,
    },
    /// A conversation.
    Conversation {
        /// Turns, at least one of them the assistant's, which is the last.
        messages: Vec<Message>,
        /// Tools that may be called in it, by their JSON schemas.
        tools: Vec<serde_json::Value>,
    },
    /// Text without roles, all of it to learn.
    Text(String),
}

impl Record {
    /// The record as messages; none for plain text.
    #[must_use]
    pub fn messages(&self) -> Vec<Message> {
        match &self.content {
            Content::Instruction { instruction, input, sys_prompt, output } => {
                let system = sys_prompt.iter().filter(|text| !text.is_empty()).map(|text| Message::new("system", text));
                let turns = [prompt::instruction(instruction, input.as_deref()), Message::new("assistant", output)];
                system.chain(turns).collect()
            }
            Content::Conversation { messages, .. } => messages.clone(),
            Content::Text(_) => Vec::new(),
        }
    }

    /// The tools that may be called in it.
    #[must_use]
    pub fn tools(&self) -> &[serde_json::Value] {
        match &self.content {
            Content::Conversation { tools, .. } => tools,
            _ => &[],
        }
    }
}

/// A dataset, read and split.
#[derive(Debug, Clone)]
pub struct Dataset {
    /// Rows to train on, in the order of LitGPT's split.
    pub train: Vec<Record>,
    /// Rows to validate with; none where the split leaves none.
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

/// Takes from all names of a repository those that are needed.
pub type Choose<'a> = &'a mut dyn FnMut(&[String]) -> Result<Vec<String>>;

/// Brings files from the web; the one way in which this room reaches the network.
pub trait Fetch {
    /// Saves what `url` gives as the file `to`, in a folder that exists.
    ///
    /// # Errors
    /// When that fails; then there is no file `to`.
    fn fetch(&self, url: &str, to: &Path) -> Result<()>;

    /// Brings the files that `choose` takes of a dataset's repository on the Hub into `dir`, below which they keep their
    /// names.
    ///
    /// # Errors
    /// When that fails, or `choose` does.
    fn fetch_dataset(&self, repo_id: &str, dir: &Path, choose: Choose<'_>) -> Result<()>;
}

/// Reads, checks and splits the dataset that `config` asks for, fetching its files if they are not there.
///
/// `tokenizer` is asked for its chat template, should the style be that. The split is that of LitGPT, row for row (for Alpaca2k, which LitGPT splits by other means, only in size).
///
/// # Errors
/// `Usage` for settings that do not fit together, `Missing` for a file that is not there and could not be fetched,
/// `Invalid` for one that is broken, and for a split that leaves nothing to train on.
pub fn load(config: &DataConfig, tokenizer: &Tokenizer, fetch: &dyn Fetch) -> Result<Dataset> {
    let kind = by_name(&config.name)?;
    let style = PromptStyle::resolve(config.prompt_style.as_deref().unwrap_or(kind.style), tokenizer)?;
    check_fraction(config)?;
    if config.columns.is_some() && !matches!(kind.rows, Rows::Any) {
        let message = format!("columns goes with your own rows, not with --data {}", kind.name);
        return Err(Error::usage(message, "leave --data.columns out, or give --data FILE"));
    }
    if config.json_path.is_some() && !matches!(kind.files, Files::Own) {
        let message = format!("json_path goes with --data JSON, not with --data {}", kind.name);
        return Err(Error::usage(message, "use --data JSON --data.json_path FILE"));
    }
    let form = form(kind, config)?;
    match source::find(kind, config, fetch)? {
        Parts::Split(files, fraction) => split(files, fraction, config.seed, &form, style),
        Parts::Apart(train, val) => {
            let train_rows = read_all(&train, 0, &form)?;
            let val_rows = read_all(&val, train.len(), &form)?;
            Ok(Dataset { train: train_rows, val: val_rows, style, sources: [train, val].concat() })
        }
    }
}

fn form(kind: &DatasetKind, config: &DataConfig) -> Result<Form> {
    Ok(match kind.rows {
        Rows::Keys(keys) => Form::Keys(keys),
        Rows::Turns(key) => Form::Turns { key, all: config.include_multiturn_conversations },
        Rows::Any => {
            Form::Any { renamed: config.columns.as_deref().map(read::columns).transpose()?.unwrap_or_default() }
        }
    })
}

fn check_fraction(config: &DataConfig) -> Result<()> {
    match config.val_split_fraction.and_then(wrong_fraction) {
        Some(problem) => Err(Error::usage(problem, "for example --data.val_split_fraction 0.05")),
        None => Ok(()),
    }
}

/// What is wrong with a share of rows to hold out, if anything is.
pub(crate) fn wrong_fraction(fraction: f64) -> Option<String> {
    let wrong = !(0.0..1.0).contains(&fraction);
    wrong.then(|| format!("`data.val_split_fraction` must be at least 0 and below 1, got {fraction}"))
}

/// The records of `files`, the first of which is number `first` of the dataset's.
fn read_all(files: &[PathBuf], first: usize, form: &Form) -> Result<Vec<Record>> {
    let mut rows = Vec::new();
    for (i, path) in files.iter().enumerate() {
        rows.extend(read::records(path, first + i, form)?);
    }
    Ok(rows)
}

fn split(files: Vec<PathBuf>, fraction: f64, seed: u64, form: &Form, style: PromptStyle) -> Result<Dataset> {
    let rows = read_all(&files, 0, form)?;
    let n = rows.len();
    let (n_train, _) = torch_rng::split_lengths(n, fraction);
    if n_train == 0 {
        let problem = format!("val_split_fraction {fraction} of {n} rows leaves none for training");
        let hint = "use a smaller --data.val_split_fraction, or a folder with train.json and val.json";
        return Err(Error::invalid(files.first().map_or(Path::new(""), PathBuf::as_path), problem, hint));
    }
    let (train, val) = torch_rng::random_split(n, fraction, seed);
    let mut rows: Vec<Option<Record>> = rows.into_iter().map(Some).collect();
    let mut take = |order: Vec<usize>| order.into_iter().filter_map(|i| rows[i].take()).collect();
    Ok(Dataset { train: take(train), val: take(val), style, sources: files })
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

        fn fetch_dataset(&self, repo_id: &str, _: &Path, _: Choose<'_>) -> Result<()> {
            assert!(self.0.is_none());
            Err(Error::unsupported(format!("network for {repo_id}"), ""))
        }
    }

    /// A repository with these files, and how often it was asked.
    struct Repo(Vec<(&'static str, Vec<u8>)>, std::cell::Cell<usize>);

    impl Repo {
        fn new(files: &[(&'static str, &str)]) -> Self {
            Self(files.iter().map(|(name, text)| (*name, text.as_bytes().to_vec())).collect(), 0.into())
        }
    }

    impl Fetch for Repo {
        fn fetch(&self, url: &str, to: &Path) -> Result<()> {
            self.1.set(self.1.get() + 1);
            let found = self.0.iter().find(|(name, _)| url == *name);
            let (_, bytes) = found.ok_or_else(|| Error::unsupported(url, ""))?;
            std::fs::write(to, bytes).map_err(Error::io("write", to))
        }

        fn fetch_dataset(&self, _: &str, dir: &Path, choose: Choose<'_>) -> Result<()> {
            self.1.set(self.1.get() + 1);
            let names: Vec<String> = self.0.iter().map(|(name, _)| (*name).to_owned()).collect();
            for name in choose(&names)? {
                let (_, bytes) = self.0.iter().find(|(other, _)| *other == name).unwrap();
                let to = dir.join(name);
                std::fs::create_dir_all(to.parent().unwrap()).unwrap();
                std::fs::write(to, bytes).unwrap();
            }
            Ok(())
        }
    }

    fn module(name: &str, dir: &Path) -> DataConfig {
        DataConfig { name: name.into(), download_dir: Some(dir.to_owned()), ..DataConfig::default() }
    }

    /// Instructions and answers.
    fn pairs(records: &[Record]) -> Vec<(String, String)> {
        records.iter().map(said).map(|(instruction, _, output)| (instruction, output)).collect()
    }

    fn text_pairs(pairs: &[(&str, &str)]) -> Vec<(String, String)> {
        pairs.iter().map(|(a, b)| ((*a).to_owned(), (*b).to_owned())).collect()
    }

    /// The quickstart model's, which has no chat template.
    fn tokenizer() -> Tokenizer {
        Tokenizer::load(&Path::new(env!("CARGO_MANIFEST_DIR")).join("data/tiny")).unwrap()
    }

    fn said(record: &Record) -> (String, Option<String>, String) {
        match &record.content {
            Content::Instruction { instruction, input, output, .. } => {
                (instruction.clone(), input.clone(), output.clone())
            }
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
    fn a_split_may_leave_nothing_to_validate_but_something_to_train_on() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("data.json");
        std::fs::write(&path, rows(10)).unwrap();
        let parts = |config: &DataConfig| {
            let data = load(config, &tokenizer(), &Web(None)).unwrap();
            (data.train.len(), data.val.len())
        };
        assert_eq!(parts(&json(&path)), (10, 0), "5 % of ten rows");
        assert_eq!(parts(&DataConfig { val_split_fraction: Some(0.0), ..json(&path) }), (10, 0));
        assert_eq!(parts(&DataConfig { val_split_fraction: Some(0.1), ..json(&path) }), (9, 1));
        let (text, _) = fails(&DataConfig { val_split_fraction: Some(1.0), ..json(&path) });
        assert!(text.ends_with("at least 0 and below 1, got 1"), "{text}");
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
        assert!(fails(&config).0.contains("at least 0 and below 1"));
        let config = DataConfig { name: "LongForm".into(), val_split_fraction: Some(0.1), ..DataConfig::default() };
        assert!(fails(&config).0.contains("validation rows of its own"));
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
    }

    #[test]
    fn lima_gives_first_answers_or_all() {
        let rows = concat!(
            "{\"conversations\": [\"a\", \"b\", \"c\", \"d\"], \"source\": \"x\"}\n",
            "{\"conversations\": [\"e\", \"f\"], \"source\": \"y\"}\n"
        );
        let dir = tempfile::tempdir().unwrap();
        let repo = Repo::new(&[("README.md", ""), ("train.jsonl", rows), ("test.jsonl", "{}")]);
        let config = DataConfig { val_split_fraction: Some(0.5), ..module("LIMA", &dir.path().join("lima")) };
        let data = load(&config, &tokenizer(), &repo).unwrap();
        let mut all = pairs(&[data.train, data.val].concat());
        all.sort();
        assert_eq!(all, text_pairs(&[("a", "b"), ("e", "f")]));
        assert_eq!(data.style.name(), "alpaca");
        let config = DataConfig { include_multiturn_conversations: true, ..config };
        let data = load(&config, &tokenizer(), &Web(None)).unwrap(); // from the folder
        let mut all = pairs(&[data.train, data.val].concat());
        all.sort();
        assert_eq!(all, text_pairs(&[("a", "b"), ("c", "d"), ("e", "f")]));
        assert!(!dir.path().join("lima/test.jsonl").exists());
        let e = load(&module("LIMA", &dir.path().join("none")), &tokenizer(), &Web(None)).unwrap_err();
        assert!(e.to_string().contains("network for GAIR/lima"), "{e}");
    }

    #[test]
    fn deita_has_splits_and_turns() {
        let turns = std::fs::read(Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/turns.parquet")).unwrap();
        let (train, test) = ("data/train_sft-00000-of-00001.parquet", "data/test_sft-00000-of-00001.parquet");
        let other = ("data/train_gen-00000-of-00001.parquet", vec![]);
        let dir = tempfile::tempdir().unwrap();
        let repo = Repo(vec![(train, turns.clone()), (test, turns), other], 0.into());
        let data = load(&module("Deita", dir.path()), &tokenizer(), &repo).unwrap();
        let first = text_pairs(&[("Hello?", "Hi!"), ("Why?", "Because.")]);
        assert_eq!((pairs(&data.train), pairs(&data.val)), (first.clone(), first));
        assert_eq!(data.sources, [dir.path().join(train), dir.path().join(test)]);
        assert!(data.locate(data.val[1].row).ends_with("test_sft-00000-of-00001.parquet` row 2"));
        let config = DataConfig { include_multiturn_conversations: true, ..module("Deita", dir.path()) };
        let data = load(&config, &tokenizer(), &repo).unwrap();
        assert_eq!(
            pairs(&data.train),
            text_pairs(&[("Hello?", "Hi!"), ("Who are you?", "A fox."), ("Why?", "Because.")])
        );
        assert_eq!(repo.1.get(), 1, "the second time it is there");
        let config = DataConfig { val_split_fraction: Some(0.1), ..module("Deita", dir.path()) };
        assert!(fails(&config).0.contains("validation rows of its own"));
    }

    #[test]
    fn flan_reads_the_subsets_that_are_asked_for() {
        let row = |name: &str| format!("{{\"inputs\": \"{name}\", \"targets\": \"t\", \"task\": \"x\"}}\n");
        let at = "https://huggingface.co/datasets/Muennighoff/flan/resolve/main";
        let files = [("train", "aeslc"), ("test", "aeslc"), ("train", "cb"), ("test", "cb")].map(|(split, subset)| {
            let url: &'static str = format!("{at}/{split}/{subset}_10templates_{split}.jsonl").leak();
            (url, (row(&format!("{subset} {split} 1")) + &row(&format!("{subset} {split} 2"))).into_bytes())
        });
        let dir = tempfile::tempdir().unwrap();
        let config = DataConfig { subsets: Some("aeslc_10templates,cb".into()), ..module("FLAN", dir.path()) };
        let data = load(&config, &tokenizer(), &Repo(files.to_vec(), 0.into())).unwrap();
        let asked = |part: &[Record]| part.iter().map(|record| said(record).0).collect::<Vec<_>>();
        assert_eq!(asked(&data.train), ["aeslc train 1", "aeslc train 2", "cb train 1", "cb train 2"]);
        assert_eq!(asked(&data.val), ["aeslc test 1", "aeslc test 2", "cb test 1", "cb test 2"]);
        assert_eq!(data.style.name(), "flan");
        assert!(dir.path().join("cb_10templates_test.jsonl").is_file());
        assert!(data.locate(data.val[3].row).ends_with("cb_10templates_test.jsonl` line 2"));
        let one = DataConfig { subsets: Some("wsc".into()), ..module("FLAN", dir.path()) };
        let (text, hint) = fails(&one);
        assert!(text.ends_with("wsc_10templates_train.jsonl`"), "{text}");
        assert!(
            hint.starts_with(&format!("download {at}/train/wsc_10templates_train.jsonl under that name")),
            "{hint}"
        );
        let wrong = DataConfig { subsets: Some("wsd".into()), ..module("FLAN", dir.path()) };
        assert_eq!(fails(&wrong).1, "did you mean `wsc`?");
    }

    #[test]
    fn alpaca2k_comes_from_its_repository_or_from_the_folder() {
        let rows = rows(40);
        let dir = tempfile::tempdir().unwrap();
        let config = module("Alpaca2k", dir.path());
        assert!(fails(&config).0.contains("mhenrichsen/alpaca_2k_test"));
        let data = load(&config, &tokenizer(), &Repo::new(&[("alpaca_2000.json", &rows)])).unwrap();
        assert_eq!((data.train.len(), data.val.len(), data.style.name()), (38, 2, "alpaca"));
        assert!(load(&config, &tokenizer(), &Web(None)).is_ok());
        // Put there by hand, under any name.
        let by_hand = tempfile::tempdir().unwrap();
        std::fs::write(by_hand.path().join("my rows.json"), &rows).unwrap();
        assert_eq!(load(&module("Alpaca2k", by_hand.path()), &tokenizer(), &Web(None)).unwrap().train, {
            let mut train = data.train;
            train.iter_mut().for_each(|record| record.row.file = 0);
            train
        });
    }

    /// A download that ended early must not pass for the dataset.
    #[test]
    fn a_part_of_a_dataset_is_completed() {
        let row = |i: usize| format!("{{\"question\": \"q{i}\", \"answer\": \"a{i}\"}}\n");
        let names = ["data/train-00000-of-00002.jsonl", "data/train-00001-of-00002.jsonl"];
        let (first, second) = (row(1) + &row(2), row(3) + &row(4));
        let repo = Repo::new(&[(names[0], &first), (names[1], &second)]);
        let dir = tempfile::tempdir().unwrap();
        let config = DataConfig {
            repo_id: Some("o/n".into()),
            val_split_fraction: Some(0.25),
            columns: Some("instruction=answer,output=question".into()),
            ..module("Hub", dir.path())
        };
        let data = load(&config, &tokenizer(), &repo).unwrap();
        assert_eq!((data.train.len(), data.val.len()), (3, 1));
        assert!(said(&data.train[0]).0.starts_with('a'), "the columns are renamed");
        std::fs::remove_file(dir.path().join(names[1])).unwrap();
        assert!(fails(&config).0.contains("network for o/n"));
        assert_eq!(load(&config, &tokenizer(), &repo).unwrap().sources.len(), 2);
        assert_eq!(repo.1.get(), 2);
        assert!(fails(&DataConfig { repo_id: None, ..config }).0.contains("needs a repo_id"));
    }

    #[test]
    fn another_address_is_another_file() {
        let (url, content) = ("https://example.org/libre.json?x=1", rows(40));
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("alpaca_data_cleaned_archive.json"), rows(80)).unwrap();
        let config = DataConfig { file_url: Some(url.into()), ..module("Alpaca", dir.path()) };
        let web = Repo::new(&[(url, &content)]);
        let data = load(&config, &tokenizer(), &web).unwrap();
        assert_eq!((data.train.len() + data.val.len(), &data.sources), (40, &vec![dir.path().join("libre.json")]));
        let named = DataConfig { file_name: Some("other.json".into()), ..config };
        assert_eq!(load(&named, &tokenizer(), &web).unwrap().sources, [dir.path().join("other.json")]);
        assert_eq!(load(&module("Alpaca", dir.path()), &tokenizer(), &Web(None)).unwrap().train.len(), 77);
    }
}
