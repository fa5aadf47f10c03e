//! Datasets of the Hub, from a server on loopback that speaks its routes, down to a training run.
#![allow(clippy::unwrap_used)]

use std::fs;
use std::path::Path;
use std::sync::{Arc, Mutex};

use ring::digest;
use serde_json::json;

use litgpt::data::DATASETS;
use litgpt::train::settings::DATA_MODULES;

use crate::util::{Ran, litgpt, litgpt_in, page, root, serve, status, tiny};

const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";

/// Repository, name and bytes of a file.
type Hosted = (&'static str, &'static str, Vec<u8>);

/// A Hub with these files, and the paths that it was asked for; what is in `GAIR/lima` needs the token `hf_key`.
struct Hub {
    address: String,
    asked: Arc<Mutex<Vec<String>>>,
}

impl Hub {
    fn new(files: Vec<Hosted>) -> Self {
        let asked = Arc::new(Mutex::new(Vec::new()));
        let log = Arc::clone(&asked);
        let address = serve(move |head| {
            let path = head.split(' ').nth(1).unwrap().split('?').next().unwrap();
            log.lock().unwrap().push(path.to_owned());
            answer(&files, path, head)
        });
        Self { address, asked }
    }

    fn asked(&self) -> usize {
        std::mem::take(&mut *self.asked.lock().unwrap()).len()
    }
}

fn answer(files: &[Hosted], path: &str, head: &str) -> Vec<u8> {
    if let Some(repo) = path.strip_prefix("/api/datasets/").and_then(|rest| rest.strip_suffix("/revision/main")) {
        let sibling = |(_, name, bytes): &Hosted| {
            let hash = digest::digest(&digest::SHA256, bytes);
            let hash: String = hash.as_ref().iter().map(|byte| format!("{byte:02x}")).collect();
            json!({"rfilename": name, "size": bytes.len(), "lfs": {"sha256": hash, "size": bytes.len()}})
        };
        let siblings: Vec<_> = files.iter().filter(|file| file.0 == repo).map(sibling).collect();
        return match siblings.is_empty() {
            true => status("404 Not Found", "X-Error-Code: RepoNotFound\r\n"),
            false => page(json!({"sha": COMMIT, "siblings": siblings}).to_string()),
        };
    }
    let of = |file: &&Hosted| {
        [COMMIT, "main"].iter().any(|revision| path == format!("/datasets/{}/resolve/{revision}/{}", file.0, file.1))
    };
    match files.iter().find(of) {
        Some(("GAIR/lima", ..)) if !head.contains("Bearer hf_key") => {
            status("401 Unauthorized", "X-Error-Code: GatedRepo\r\n")
        }
        Some((_, _, bytes)) => page(bytes),
        None => status("404 Not Found", "X-Error-Code: EntryNotFound\r\n"),
    }
}

fn parquet(name: &str) -> Vec<u8> {
    fs::read(root().join("tests/data").join(name)).unwrap()
}

/// One step on the quickstart's model with the data that `more` says.
fn step(cwd: &Path, env: &[(&str, &str)], more: &str) -> Ran {
    let tiny = tiny();
    let args =
        "--train.max_steps 1 --train.global_batch_size 2 --eval.max_new_tokens 2 --eval.max_iters 1 --out_dir out";
    let fixed = ["finetune", "lora", "--checkpoint_dir", tiny.to_str().unwrap()];
    litgpt_in(cwd, env, fixed.into_iter().chain(args.split(' ')).chain(more.split(' ')))
}

#[test]
fn a_dataset_of_the_hub_is_trained_on() {
    let turns = || parquet("turns.parquet");
    let hub = Hub::new(vec![
        ("org/talk", "README.md", b"# Talk".to_vec()),
        ("org/talk", "data/test-00000-of-00001.parquet", b"never read".to_vec()),
        ("org/talk", "data/train-00000-of-00002.parquet", turns()),
        ("org/talk", "data/train-00001-of-00002.parquet", turns()),
    ]);
    let dir = tempfile::tempdir().unwrap();
    let online = [("HF_ENDPOINT", hub.address.as_str())];
    let offline = [("HF_HUB_OFFLINE", "1")];
    let data = "--data org/talk --data.val_split_fraction 0.25 --data.prompt_style chatml";
    let first = step(dir.path(), &online, data).ok();
    assert!(first.stderr.contains("train: 3 samples") && first.stderr.contains("val: 1 samples"), "{first:#?}");
    assert!(first.stderr.contains("downloading the dataset org/talk into data/org/talk"), "{first:#?}");
    assert_eq!(hub.asked(), 3, "the list and two files");
    let folder = dir.path().join("data/org/talk");
    assert!(fs::read(folder.join("data/train-00001-of-00002.parquet")).unwrap() == turns());
    assert!(!folder.join("data/test-00000-of-00001.parquet").exists());

    // The run's own recipe names the dataset; what is there needs no network.
    fs::copy(dir.path().join("out/final/hyperparameters.yaml"), dir.path().join("again.yaml")).unwrap();
    let again = step(dir.path(), &offline, "--config again.yaml").ok();
    let losses = |ran: &Ran| ran.stderr.lines().find(|line| line.starts_with("epoch 1")).unwrap()[..40].to_owned();
    assert_eq!(losses(&again), losses(&first));

    fs::remove_file(folder.join("data/train-00000-of-00002.parquet")).unwrap();
    step(dir.path(), &offline, data).refused(1, &["org/talk", "put its files for training", "data/org/talk"]);
    step(dir.path(), &online, data).ok();
    assert_eq!(hub.asked(), 2, "the list and the file that was missing");
}

#[test]
fn known_datasets_come_from_their_repositories() {
    let lima = "{\"conversations\": [\"Hello?\", \"Hi!\", \"Why?\", \"So.\"]}\n{\"conversations\": [\"a\", \"b\"]}\n";
    let flan = "{\"inputs\": \"Sum up: a b\", \"targets\": \"ab\"}\n{\"inputs\": \"c\", \"targets\": \"d\"}\n";
    let deita = "HuggingFaceH4/deita-10k-v0-sft";
    let hub = Hub::new(vec![
        ("GAIR/lima", "train.jsonl", lima.into()),
        ("GAIR/lima", "test.jsonl", b"{}".to_vec()),
        (deita, "data/train_sft-00000-of-00001.parquet", parquet("turns.parquet")),
        (deita, "data/test_sft-00000-of-00001.parquet", parquet("turns.parquet")),
        ("mhenrichsen/alpaca_2k_test", "alpaca_2000.parquet", parquet("rows.parquet")),
        ("Muennighoff/flan", "train/cb_10templates_train.jsonl", flan.into()),
        ("Muennighoff/flan", "test/cb_10templates_test.jsonl", flan.into()),
    ]);
    let dir = tempfile::tempdir().unwrap();
    let online = [("HF_ENDPOINT", hub.address.as_str())];
    for (data, train, val, style) in [
        ("Deita", 2, 2, "alpaca"),
        ("Deita --data.include_multiturn_conversations true", 3, 3, "alpaca"),
        ("Alpaca2k --data.val_split_fraction 0.5", 1, 1, "alpaca"),
        ("FLAN --data.subsets cb_10templates", 2, 2, "flan"),
        ("LIMA --data.val_split_fraction 0.5 --access_token hf_key", 1, 1, "alpaca"),
        ("LIMA --data.val_split_fraction 0.5 --data.include_multiturn_conversations true", 2, 1, "alpaca"),
    ] {
        let ran = step(dir.path(), &online, &format!("--data {data}")).ok();
        for part in [format!("train: {train} samples"), format!("val: {val} samples"), format!("prompt style {style}")]
        {
            assert!(ran.stderr.contains(&part), "{data}: no {part:?} in {ran:#?}");
        }
    }
    for folder in ["deita/data", "alpaca2k", "flan", "lima"] {
        assert!(dir.path().join("data").join(folder).is_dir(), "{folder}");
    }
}

#[test]
fn names_never_lead_out_of_the_folder() {
    let hub = Hub::new(vec![
        ("org/up", "x/../../train.jsonl", b"{}".to_vec()),
        ("org/drive", "C:x/train.jsonl", b"{}".to_vec()),
        ("org/stream", "data/a:b/train.jsonl", b"{}".to_vec()),
    ]);
    let dir = tempfile::tempdir().unwrap();
    let online = [("HF_ENDPOINT", hub.address.as_str())];
    for data in ["org/up", "org/drive", "org/stream"] {
        step(dir.path(), &online, &format!("--data {data}")).refused(1, &["outside its folder", "check HF_ENDPOINT"]);
    }
    assert!(hub.asked.lock().unwrap().iter().all(|path| path.starts_with("/api/")));
}

/// The registry, the settings and the help know the same datasets.
#[test]
fn datasets_are_the_same_everywhere() {
    let known: Vec<_> = DATASETS.iter().map(|kind| kind.name).collect();
    let mut settings: Vec<_> = DATA_MODULES.iter().map(|module| module.name).collect();
    settings.sort_unstable();
    assert_eq!(known, settings);
    let dir = tempfile::tempdir().unwrap();
    let help = litgpt(dir.path(), ["finetune", "lora", "--help"]).ok().stdout;
    let help = help.split_whitespace().collect::<Vec<_>>().join(" ");
    let list = known.iter().filter(|name| **name != "Hub").copied().collect::<Vec<_>>().join(", ");
    assert!(help.contains(&format!("Data module: {list};")), "{list}");
}

#[test]
fn what_keeps_a_dataset_away_is_said() {
    let hub = Hub::new(vec![
        ("GAIR/lima", "train.jsonl", b"{}".to_vec()),
        ("org/two", "easy/train.jsonl", b"{}".to_vec()),
        ("org/two", "hard/train.jsonl", b"{}".to_vec()),
        ("org/pictures", "images.zip", b"PK".to_vec()),
    ]);
    let dir = tempfile::tempdir().unwrap();
    let online = [("HF_ENDPOINT", hub.address.as_str())];
    for (data, parts) in [
        ("LIMA", ["no access to `GAIR/lima`", "/datasets/GAIR/lima and give --access_token"]),
        ("org/none", ["org/none", "/datasets"]),
        ("org/two", ["easy/train, hard/train", "--data.subsets"]),
        ("org/pictures", ["no .parquet", "images.zip"]),
    ] {
        step(dir.path(), &online, &format!("--data {data}")).refused(1, &parts);
    }
    step(dir.path(), &online, "--data org/two --data.subsets other").refused(2, &["none of the subsets", "easy/train"]);
    let offline = [("HF_HUB_OFFLINE", "1")];
    for (data, parts) in [
        (
            "LIMA",
            ["GAIR/lima", "put its files for training (.parquet, .jsonl, .json or .csv) by hand into `data/lima`"],
        ),
        ("FLAN", ["data/flan/aeslc_10templates_train.jsonl", "under that name"]),
        ("Alpaca", ["data/alpaca/alpaca_data_cleaned_archive.json", "under that name"]),
    ] {
        step(dir.path(), &offline, &format!("--data {data}")).refused(1, &parts);
    }
}
