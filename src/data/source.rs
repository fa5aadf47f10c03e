//! Which files hold the rows that were asked for: the user's own, those of a known dataset, or those that a repository
//! of the Hub has for a split. What is not there is fetched.
//!
//! A file that is there is taken as it is, so a dataset can be put in place by hand, and a second run needs no network.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::sync::LazyLock;

use regex::Regex;

use super::registry::{DatasetKind, FLAN_ENDING, FLAN_SUBSETS, Files, RemoteFile, Validation};
use super::{DEFAULT_VAL_SPLIT_FRACTION, DataConfig, Fetch};
use crate::error::{Error, Result, closest};

/// The files of a dataset.
pub(super) enum Parts {
    /// Of all rows together, this share is for validation.
    Split(Vec<PathBuf>, f64),
    /// Files to train on, files to validate with.
    Apart(Vec<PathBuf>, Vec<PathBuf>),
}

/// Name of the note of what a download chose, so that a part of it is not taken for the whole.
const NOTE: &str = "files.txt";

/// Endings of data files, in the order in which they are looked for in a repository.
const ENDINGS: [&str; 5] = ["parquet", "jsonl", "ndjson", "json", "csv"];

/// JSON files of a repository that hold no rows.
const NO_DATA: [&str; 5] =
    ["config.json", "dataset_dict.json", "dataset_info.json", "dataset_infos.json", "state.json"];

/// Names of splits that are not for training.
const HELD_OUT: [&str; 8] = ["test", "testing", "eval", "evaluation", "validation", "valid", "val", "dev"];

/// Finds or fetches the files that `config` asks for.
///
/// # Errors
/// `Usage` for settings that do not fit the dataset, `Missing` for a file that is not there and could not be fetched.
pub(super) fn find(kind: &DatasetKind, config: &DataConfig, fetch: &dyn Fetch) -> Result<Parts> {
    let fraction = config.val_split_fraction;
    let folder = || config.download_dir.clone().unwrap_or_else(|| PathBuf::from(kind.dir));
    match &kind.files {
        Files::Own => own(config),
        Files::One(file, default) => {
            let path = one(kind, config, file, &folder(), fetch)?;
            Ok(Parts::Split(vec![path], fraction.unwrap_or(*default)))
        }
        Files::Two(train, val) => {
            no_fraction(kind, config)?;
            let get = |file: &RemoteFile| provide(kind, file.name, file.url, &folder(), fetch);
            Ok(Parts::Apart(vec![get(train)?], vec![get(val)?]))
        }
        Files::Flan(address) => {
            no_fraction(kind, config)?;
            flan(kind, config, config.url.as_deref().unwrap_or(address), &folder(), fetch)
        }
        Files::Hub { repo_id, train, val } => {
            let repository = Repository::of(kind, config, repo_id)?;
            let mut found = match val {
                Validation::Share(_) => repository.files(&[train], fetch)?,
                Validation::Split(val) => {
                    no_fraction(kind, config)?;
                    repository.files(&[train, val], fetch)?
                }
            };
            let last = found.pop().unwrap_or_default();
            Ok(match val {
                Validation::Share(default) => Parts::Split(last, fraction.unwrap_or(*default)),
                Validation::Split(_) => Parts::Apart(found.concat(), last),
            })
        }
    }
}

fn no_fraction(kind: &DatasetKind, config: &DataConfig) -> Result<()> {
    match config.val_split_fraction {
        None => Ok(()),
        Some(_) => {
            let message = format!("val_split_fraction has no use: {} has validation rows of its own", kind.name);
            Err(Error::usage(message, "leave --data.val_split_fraction out"))
        }
    }
}

fn own(config: &DataConfig) -> Result<Parts> {
    let Some(path) = config.json_path.clone() else {
        let message = "dataset JSON needs a json_path";
        return Err(Error::usage(message, "add --data.json_path FILE, a .json, .jsonl, .csv or .parquet file"));
    };
    if path.is_file() {
        return Ok(Parts::Split(vec![path], config.val_split_fraction.unwrap_or(DEFAULT_VAL_SPLIT_FRACTION)));
    }
    if !path.is_dir() {
        let hint = "--data.json_path takes a .json, .jsonl, .csv or .parquet file, or a folder with train.json and \
                    val.json";
        return Err(Error::Missing { what: "dataset".to_owned(), path, hint: hint.to_owned() });
    }
    if config.val_split_fraction.is_some() {
        let message = format!("val_split_fraction has no use: json_path `{}` is a folder", path.display());
        return Err(Error::usage(message, "leave --data.val_split_fraction out, or give one file"));
    }
    let part = |name: &str| {
        let candidates = ["json", "jsonl", "csv", "parquet"].map(|ending| path.join(format!("{name}.{ending}")));
        candidates.iter().find(|file| file.is_file()).cloned().ok_or_else(|| Error::Missing {
            what: format!("{name} file of the dataset"),
            path: candidates[0].clone(),
            hint: format!("put a {name}.json or {name}.jsonl there, or give --data.json_path one file"),
        })
    };
    Ok(Parts::Apart(vec![part("train")?], vec![part("val")?]))
}

/// The file of a dataset that has one, or the one that `file_url` and `file_name` put in its place.
fn one(kind: &DatasetKind, config: &DataConfig, file: &RemoteFile, dir: &Path, fetch: &dyn Fetch) -> Result<PathBuf> {
    let url = config.file_url.as_deref().unwrap_or(file.url);
    let of_url = || url.split(['?', '#']).next().and_then(|url| url.rsplit('/').next()).filter(|name| is_data(name));
    // Else another file would be taken for the one that is there under the usual name.
    let own_name = if url == file.url { None } else { of_url() };
    let name = config.file_name.as_deref().or(own_name).unwrap_or(file.name);
    provide(kind, name, url, dir, fetch)
}

/// The path of a dataset's file, which is there when this returns.
fn provide(kind: &DatasetKind, name: &str, url: &str, dir: &Path, fetch: &dyn Fetch) -> Result<PathBuf> {
    let path = dir.join(name);
    let filled = || path.metadata().is_ok_and(|data| data.len() > 0);
    if filled() {
        return Ok(path);
    }
    std::fs::create_dir_all(dir).map_err(Error::io("create", dir))?;
    let problem = match fetch.fetch(url, &path) {
        Ok(()) if filled() => return Ok(path),
        Ok(()) => "it gave an empty file".to_owned(),
        Err(e) => e.to_string(),
    };
    let hint = format!("download {url} under that name (fetching it failed: {problem})");
    Err(Error::Missing { what: format!("dataset {}", kind.name), path, hint })
}

fn flan(kind: &DatasetKind, config: &DataConfig, url: &str, dir: &Path, fetch: &dyn Fetch) -> Result<Parts> {
    let subsets = match config.subsets.as_deref() {
        Some(names) => names.split(',').map(|name| flan_subset(name.trim())).collect::<Result<Vec<_>>>()?,
        None => FLAN_SUBSETS.to_vec(),
    };
    let files = |split: &str| {
        let file = |subset: &&str| {
            let name = format!("{subset}{FLAN_ENDING}_{split}.jsonl");
            provide(kind, &name, &format!("{}/{split}/{name}", url.trim_end_matches('/')), dir, fetch)
        };
        subsets.iter().map(file).collect::<Result<Vec<_>>>()
    };
    Ok(Parts::Apart(files("train")?, files("test")?))
}

fn flan_subset(name: &str) -> Result<&'static str> {
    let stem = name.strip_suffix(FLAN_ENDING).unwrap_or(name);
    FLAN_SUBSETS.iter().find(|subset| **subset == stem).copied().ok_or_else(|| {
        let hint = closest(stem, FLAN_SUBSETS.iter().copied()).map_or_else(
            || format!("choose among {}", FLAN_SUBSETS.join(", ")),
            |near| format!("did you mean `{near}`?"),
        );
        Error::usage(format!("FLAN has no subset `{name}`"), hint)
    })
}

/// A dataset's repository on the Hub, and the folder for its files.
struct Repository<'a> {
    id: &'a str,
    dir: PathBuf,
    subsets: Option<&'a str>,
}

impl<'a> Repository<'a> {
    fn of(kind: &'a DatasetKind, config: &'a DataConfig, repo_id: &'a str) -> Result<Self> {
        let id = config.repo_id.as_deref().unwrap_or(repo_id);
        if id.is_empty() {
            let message = format!("dataset {} needs a repo_id", kind.name);
            return Err(Error::usage(message, "--data ORGANISATION/NAME, the dataset's name on the Hub"));
        }
        let usual = if id == repo_id { PathBuf::from(kind.dir) } else { Path::new("data").join(id) };
        let dir = config.download_dir.clone().unwrap_or(usual);
        Ok(Self { id, dir, subsets: config.subsets.as_deref() })
    }

    /// The files of each of `splits`.
    fn files(&self, splits: &[&str], fetch: &dyn Fetch) -> Result<Vec<Vec<PathBuf>>> {
        let choose =
            |names: &[String]| splits.iter().map(|split| self.choose(names, split)).collect::<Result<Vec<_>>>();
        let listed = self.listed()?;
        let known: Vec<String> =
            listed.iter().cloned().chain(self.here()?).collect::<BTreeSet<_>>().into_iter().collect();
        if !known.is_empty() {
            match choose(&known) {
                Ok(chosen) if chosen.iter().flatten().all(|name| self.dir.join(name).is_file()) => {
                    return Ok(self.paths(chosen));
                }
                // Put there by hand, so the Hub is not asked.
                Err(problem) if listed.is_empty() => return Err(problem),
                _ => {}
            }
        }
        let mut chosen = Vec::new();
        fetch.fetch_dataset(self.id, &self.dir, &mut |names| {
            chosen = choose(names)?;
            self.note(listed.iter().chain(chosen.iter().flatten()))?;
            Ok(chosen.concat())
        })?;
        Ok(self.paths(chosen))
    }

    fn paths(&self, chosen: Vec<Vec<String>>) -> Vec<Vec<PathBuf>> {
        let paths = |names: Vec<String>| names.into_iter().map(|name| self.dir.join(name)).collect();
        chosen.into_iter().map(paths).collect()
    }

    /// What downloads into the folder chose.
    fn listed(&self) -> Result<Vec<String>> {
        let path = self.dir.join(NOTE);
        match std::fs::read_to_string(&path) {
            Ok(text) => Ok(text.lines().map(str::to_owned).collect()),
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(Vec::new()),
            Err(e) => Err(Error::io("read", &path)(e)),
        }
    }

    fn note<'n>(&self, names: impl Iterator<Item = &'n String>) -> Result<()> {
        let names: BTreeSet<&str> = names.map(String::as_str).collect();
        let text: String = names.into_iter().map(|name| format!("{name}\n")).collect();
        std::fs::create_dir_all(&self.dir).map_err(Error::io("create", &self.dir))?;
        let path = self.dir.join(NOTE);
        std::fs::write(&path, text).map_err(Error::io("write", &path))
    }

    /// The data files in the folder and in those in it, by their names with slashes.
    fn here(&self) -> Result<Vec<String>> {
        const DEPTH: usize = 4;
        let mut found = Vec::new();
        let mut open = vec![(self.dir.clone(), String::new(), 0)];
        while let Some((dir, prefix, depth)) = open.pop() {
            let Ok(entries) = std::fs::read_dir(&dir) else { continue };
            for entry in entries {
                let entry = entry.map_err(Error::io("read", &dir))?;
                let name = format!("{prefix}{}", entry.file_name().to_string_lossy());
                let path = entry.path();
                if path.is_dir() && depth < DEPTH {
                    open.push((path, format!("{name}/"), depth + 1));
                } else if is_data(&name) && path.is_file() {
                    found.push(name);
                }
            }
        }
        found.sort();
        Ok(found)
    }

    /// Those of `names` that hold the rows of `split`, in one form.
    fn choose(&self, names: &[String], split: &str) -> Result<Vec<String>> {
        let data: Vec<&str> = names.iter().map(String::as_str).filter(|name| is_data(name)).collect();
        if data.is_empty() {
            let message = format!("dataset `{}` has no .parquet, .jsonl, .json or .csv file", self.id);
            let there = names.iter().take(8).map(String::as_str).collect::<Vec<_>>().join(", ");
            return Err(Error::refused(message, format!("it has: {there}; save its rows in one of these forms")));
        }
        let mut of_split: Vec<&str> = data.iter().copied().filter(|name| is_of(table(name), split)).collect();
        if of_split.is_empty() && split == "train" {
            // A repository without splits is for training.
            let held_out = |name: &&str| HELD_OUT.iter().any(|other| has_word(table(name), other));
            of_split = data.iter().copied().filter(|name| !held_out(name)).collect();
        }
        if of_split.is_empty() {
            let message = format!("dataset `{}` has no file for the split {split}", self.id);
            let there = list(&data.iter().map(|name| table(name)).collect());
            return Err(Error::refused(message, format!("it has: {there}; name such a file {split}.jsonl")));
        }
        let tables = self.tables(of_split.iter().map(|name| table(name)).collect(), split)?;
        of_split.retain(|name| tables.contains(table(name)));
        let form = ENDINGS.into_iter().find(|form| of_split.iter().any(|name| ending_of(name) == Some(form)));
        let in_form = of_split.into_iter().filter(|name| ending_of(name) == form);
        Ok(in_form.map(str::to_owned).collect::<BTreeSet<_>>().into_iter().collect())
    }

    /// Those of the tables of a split that are asked for. Files that are parts of one table go together; of several
    /// tables `subsets` has to choose.
    fn tables<'n>(&self, tables: BTreeSet<&'n str>, split: &str) -> Result<BTreeSet<&'n str>> {
        let has_part = |table: &str, name: &str| table == name || table.split('/').any(|part| part == name);
        if let Some(subsets) = self.subsets {
            let named = |table: &&str| subsets.split(',').any(|name| has_part(table, name.trim()));
            let chosen: BTreeSet<&str> = tables.iter().copied().filter(named).collect();
            if chosen.is_empty() {
                let message = format!("dataset `{}` has none of the subsets `{subsets}`", self.id);
                return Err(Error::usage(message, format!("it has: {}", list(&tables))));
            }
            return Ok(chosen);
        }
        let exact: BTreeSet<&str> = tables.iter().copied().filter(|table| has_part(table, split)).collect();
        let tables = if exact.is_empty() { tables } else { exact };
        if tables.len() > 1 {
            let message = format!("dataset `{}` has several tables for the split {split}: {}", self.id, list(&tables));
            return Err(Error::refused(message, "choose with --data.subsets NAME, several with commas between"));
        }
        Ok(tables)
    }
}

/// The first of some names, with commas.
fn list(names: &BTreeSet<&str>) -> String {
    names.iter().copied().take(12).collect::<Vec<_>>().join(", ")
}

fn ending_of(name: &str) -> Option<&str> {
    let (_, ending) = name.rsplit_once('.')?;
    ENDINGS.into_iter().find(|known| ending.eq_ignore_ascii_case(known))
}

/// Whether a file of a repository may hold rows.
fn is_data(name: &str) -> bool {
    let hidden = |part: &str| part.starts_with('.') || part.starts_with("__") || part == "downloads";
    let last = name.rsplit('/').next().unwrap_or(name);
    ending_of(name).is_some() && !NO_DATA.contains(&last) && !name.split('/').any(hidden)
}

/// Name of the table that a file is a part of: without ending and without the number of the part.
fn table(name: &str) -> &str {
    static PART: LazyLock<Option<Regex>> = LazyLock::new(|| Regex::new(r"^(.+?)(-\d+-of-\d+.*|[-_./]\d+)$").ok());
    let stem = name.rsplit_once('.').map_or(name, |(stem, _)| stem);
    let parts = PART.as_ref().and_then(|part| part.captures(stem));
    parts.and_then(|parts| parts.get(1)).map_or(stem, |table| table.as_str())
}

fn is_of(table: &str, split: &str) -> bool {
    has_word(table, split) || (split == "train" && has_word(table, "training"))
}

/// Whether `word` stands in `text` with no letter beside it.
fn has_word(text: &str, word: &str) -> bool {
    let letter = |c: Option<char>| c.is_some_and(char::is_alphabetic);
    text.match_indices(word)
        .any(|(at, _)| !letter(text[..at].chars().next_back()) && !letter(text[at + word.len()..].chars().next()))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn chosen(names: &[&str], split: &str, subsets: Option<&str>) -> std::result::Result<Vec<String>, String> {
        let repository = Repository { id: "o/n", dir: PathBuf::new(), subsets };
        let names: Vec<String> = names.iter().map(|name| (*name).to_owned()).collect();
        repository.choose(&names, split).map_err(|e| {
            let text = format!("{e} / {}", e.hint().unwrap_or_default());
            assert!(!text.contains('\n'), "{text}");
            text
        })
    }

    /// The layouts that repositories of datasets have.
    #[test]
    fn the_files_of_a_split_are_found() {
        for (names, files) in [
            // As push_to_hub writes them.
            (
                &[
                    ".gitattributes",
                    "README.md",
                    "data/test-00000-of-00001.parquet",
                    "data/train-00001-of-00002-ab12.parquet",
                    "data/train-00000-of-00002-cd34.parquet",
                ][..],
                &["data/train-00000-of-00002-cd34.parquet", "data/train-00001-of-00002-ab12.parquet"][..],
            ),
            (&["train.jsonl", "test.jsonl", "lima.py"], &["train.jsonl"]),
            (
                &["default/train/0000.parquet", "default/train/0001.parquet", "default/test/0000.parquet"],
                &["default/train/0000.parquet", "default/train/0001.parquet"],
            ),
            // No splits at all: everything is for training.
            (&["alpaca_2000.parquet", "dataset_infos.json"], &["alpaca_2000.parquet"]),
            (&["alpaca_data_cleaned.json", "README.md"], &["alpaca_data_cleaned.json"]),
            (&["part_1.csv", "part_2.csv", "dev.csv"], &["part_1.csv", "part_2.csv"]),
            (&["my_training_set.csv", "my_test_set.csv"], &["my_training_set.csv"]),
            // One form only.
            (&["train.csv", "train.jsonl", "train.parquet", ".cache/train.json"], &["train.parquet"]),
            (&["train.json", "train_sft.json", "trains.json"], &["train.json"]),
        ] {
            assert_eq!(chosen(names, "train", None).unwrap(), files, "{names:?}");
        }
        let deita = [
            "data/train_sft-00000-of-00001.parquet",
            "data/train_gen-00000-of-00001.parquet",
            "data/test_sft-00000-of-00001.parquet",
        ];
        assert_eq!(chosen(&deita, "train_sft", None).unwrap(), [deita[0]]);
        assert_eq!(chosen(&deita, "test_sft", None).unwrap(), [deita[2]]);
        assert_eq!(chosen(&deita, "train", Some("train_gen")).unwrap(), [deita[1]]);
    }

    #[test]
    fn several_tables_need_a_choice() {
        let names = [
            "main/train-00000-of-00001.parquet",
            "socratic/train-00000-of-00001.parquet",
            "main/test-00000-of-00001.parquet",
        ];
        let both = chosen(&names, "train", None).unwrap_err();
        assert!(both.contains("several tables for the split train: main/train, socratic/train"), "{both}");
        assert!(both.contains("--data.subsets"), "{both}");
        assert_eq!(chosen(&names, "train", Some("main")).unwrap(), [names[0]]);
        assert_eq!(chosen(&names, "train", Some("socratic, main")).unwrap(), names[..2]);
        assert!(chosen(&names, "train", Some("other")).unwrap_err().contains("it has: main/train, socratic/train"));
    }

    #[test]
    fn what_is_not_there_is_said() {
        let none = chosen(&["README.md", "data.tar.gz"], "train", None).unwrap_err();
        assert!(none.contains("no .parquet, .jsonl") && none.contains("it has: README.md, data.tar.gz"), "{none}");
        let held_out = chosen(&["test.jsonl", "validation.jsonl"], "train", None).unwrap_err();
        assert!(held_out.contains("no file for the split train / it has: test, validation"), "{held_out}");
    }

    #[test]
    fn words_stand_alone() {
        assert!(has_word("data/train_sft", "train") && has_word("my train2", "train") && has_word("x_train", "train"));
        assert!(!has_word("trainer", "train") && !has_word("strain", "train") && has_word("strain/train", "train"));
    }

    #[test]
    fn subsets_of_flan_go_with_and_without_their_ending() {
        assert_eq!(flan_subset("aeslc").unwrap(), "aeslc");
        assert_eq!(flan_subset("aeslc_10templates").unwrap(), "aeslc");
        assert_eq!(flan_subset("aesle").unwrap_err().hint().unwrap(), "did you mean `aeslc`?");
    }
}
