//! The datasets that are known by name: where their files are, what their rows look like, in which style they are told.

use crate::error::{Error, Result, closest};

/// One dataset of the registry.
#[derive(Debug)]
pub struct DatasetKind {
    /// LitGPT's class, such as `Alpaca`.
    pub name: &'static str,
    /// One line for a list of datasets.
    pub about: &'static str,
    /// Default folder of its files; empty where the user's choice decides it.
    pub dir: &'static str,
    /// Its files.
    pub files: Files,
    /// What its rows are.
    pub rows: Rows,
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
    /// A file for training and one for validation for each of [`FLAN_SUBSETS`], below this address.
    Flan(&'static str),
    /// Files of a repository of the Hub.
    Hub {
        /// Its id; empty: `repo_id` names it.
        repo_id: &'static str,
        /// The split to train on.
        train: &'static str,
        /// The rows to validate with.
        val: Validation,
    },
}

/// Rows to validate with.
#[derive(Debug, Clone, Copy)]
pub enum Validation {
    /// A share of the rows, if `val_split_fraction` says no other.
    Share(f64),
    /// A split of its own.
    Split(&'static str),
}

/// A file and where it comes from.
#[derive(Debug)]
pub struct RemoteFile {
    /// Its name in the download folder; `.json` or `.jsonl`.
    pub name: &'static str,
    /// Its address.
    pub url: &'static str,
}

/// What the rows of a dataset are.
#[derive(Debug, Clone, Copy)]
pub enum Rows {
    /// Instructions with these keys.
    Keys(Keys),
    /// Conversations under this key, of which single answers are learned.
    Turns(&'static str),
    /// What the first row shows.
    Any,
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

/// Keys of Alpaca's rows.
pub const ALPACA_KEYS: Keys = Keys { instruction: "instruction", input: Some("input"), output: "output" };

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
            },
            0.03865,
        ),
        rows: Rows::Keys(ALPACA_KEYS),
        style: "alpaca",
    },
    DatasetKind {
        name: "Alpaca2k",
        about: "2,000 instructions of Alpaca (mhenrichsen/alpaca_2k_test)",
        dir: "data/alpaca2k",
        files: Files::Hub {
            repo_id: "mhenrichsen/alpaca_2k_test",
            train: "train",
            val: Validation::Share(0.05), // 100 rows
        },
        rows: Rows::Keys(ALPACA_KEYS),
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
            },
            0.03847,
        ),
        rows: Rows::Keys(ALPACA_KEYS),
        style: "alpaca",
    },
    DatasetKind {
        name: "Deita",
        about: "10,000 conversations chosen for quality (HuggingFaceH4/deita-10k-v0-sft)",
        dir: "data/deita",
        files: Files::Hub {
            repo_id: "HuggingFaceH4/deita-10k-v0-sft",
            train: "train_sft",
            val: Validation::Split("test_sft"),
        },
        rows: Rows::Turns("messages"),
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
            },
            0.1,
        ),
        rows: Rows::Keys(Keys { instruction: "instruction", input: Some("context"), output: "response" }),
        style: "alpaca",
    },
    DatasetKind {
        name: "FLAN",
        about: "66 collections of tasks (Muennighoff/flan); choose some with `subsets`",
        dir: "data/flan",
        files: Files::Flan("https://huggingface.co/datasets/Muennighoff/flan/resolve/main"),
        rows: Rows::Keys(Keys { instruction: "inputs", input: None, output: "targets" }),
        style: "flan",
    },
    DatasetKind {
        name: "Hub",
        about: "any dataset of the Hugging Face Hub, given by `repo_id`",
        dir: "",
        files: Files::Hub { repo_id: "", train: "train", val: Validation::Share(super::DEFAULT_VAL_SPLIT_FRACTION) },
        rows: Rows::Any,
        style: "alpaca",
    },
    DatasetKind {
        name: "JSON",
        about: "your own file or folder, given by `json_path`",
        dir: "",
        files: Files::Own,
        rows: Rows::Any,
        style: "alpaca",
    },
    DatasetKind {
        name: "LIMA",
        about: "1,000 conversations written with care (GAIR/lima, gated)",
        dir: "data/lima",
        files: Files::Hub { repo_id: "GAIR/lima", train: "train", val: Validation::Share(0.1) },
        rows: Rows::Turns("conversations"),
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
            },
            RemoteFile {
                name: "val.json",
                url: "https://raw.githubusercontent.com/akoksal/LongForm/main/dataset/val.json",
            },
        ),
        rows: Rows::Keys(Keys { instruction: "input", input: None, output: "output" }),
        style: "longform",
    },
];

/// The parts of FLAN that LitGPT offers; their files are called so with [`FLAN_ENDING`] behind.
#[rustfmt::skip]
pub const FLAN_SUBSETS: &[&str] = &[
    "aeslc", "ag_news_subset", "anli_r1", "anli_r2", "anli_r3", "arc_challenge", "arc_easy", "bool_q", "cb",
    "cnn_dailymail", "cola", "common_gen", "copa", "coqa", "cosmos_qa", "dart", "definite_pronoun_resolution", "drop",
    "e2e_nlg", "fix_punct", "gigaword", "glue_mrpc", "glue_qqp", "hellaswag", "imdb_reviews", "math_dataset",
    "mnli_matched", "mnli_mismatched", "multi_news", "multirc", "natural_questions", "openbookqa",
    "opinion_abstracts_idebate", "opinion_abstracts_rotten_tomatoes", "para_crawl_enes", "paws_wiki", "piqa", "qnli",
    "quac", "record", "rte", "samsum", "sentiment140", "snli", "squad_v1", "squad_v2", "sst2", "story_cloze", "stsb",
    "trec", "trivia_qa", "true_case", "web_nlg_en", "wic", "wiki_lingua_english_en", "wmt14_enfr",
    "wmt16_translate_csen", "wmt16_translate_deen", "wmt16_translate_fien", "wmt16_translate_roen",
    "wmt16_translate_ruen", "wmt16_translate_tren", "wnli", "word_segment", "wsc", "yelp_polarity_reviews",
];

/// End of the name of each part of FLAN, which may be left out.
pub const FLAN_ENDING: &str = "_10templates";

/// Datasets of LitGPT that are made for pretraining.
const NOT_READ: &[&str] = &["LitData", "MicroLlama", "OpenWebText", "TextFiles", "TinyLlama", "TinyStories"];

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
        let hint = "it is made for pretraining; for your own rows use --data FILE";
        return Err(Error::unsupported(format!("dataset `{known}`"), hint));
    }
    let all = || DATASETS.iter().map(|kind| kind.name);
    let hint = closest(last, all()).map_or_else(
        || format!("choose one of {}", all().collect::<Vec<_>>().join(", ")),
        |near| format!("did you mean `{near}`?"),
    );
    Err(Error::usage(format!("no dataset is called `{name}`"), hint))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::data::prompt::PromptStyle;

    #[test]
    fn registry_is_sound() {
        for kind in DATASETS {
            assert_eq!(by_name(kind.name).unwrap().name, kind.name);
            assert_eq!(by_name(&format!("litgpt.data.{}", kind.name)).unwrap().name, kind.name);
            assert_eq!(PromptStyle::by_name(kind.style).unwrap().name(), kind.style);
            let files = match &kind.files {
                Files::Own | Files::Hub { .. } | Files::Flan(_) => vec![],
                Files::One(file, _) => vec![file],
                Files::Two(a, b) => vec![a, b],
            };
            assert!(files.iter().all(|file| file.url.starts_with("https://") && file.name.contains(".json")));
        }
        assert!(DATASETS.is_sorted_by_key(|kind| kind.name));
        assert_eq!(by_name("alpaca_2k").unwrap().name, "Alpaca2k");
        assert_eq!(by_name("json").unwrap().name, "JSON");
        assert_eq!(FLAN_SUBSETS.len(), 66);
        assert!(FLAN_SUBSETS.is_sorted() && FLAN_SUBSETS.iter().all(|name| !name.ends_with(FLAN_ENDING)));
    }

    #[test]
    fn unknown_datasets_are_explained() {
        let e = by_name("Alpacca").unwrap_err();
        assert_eq!(e.hint().unwrap(), "did you mean `Alpaca`?");
        assert!(by_name("wikipedia").unwrap_err().hint().unwrap().contains("Alpaca, Alpaca2k"));
        assert!(matches!(by_name("litgpt.data.TinyStories").unwrap_err(), Error::Unsupported { .. }));
    }
}
