//! The ready-made recipes in `data/recipes`, and recipes from the web, read from a server on loopback.
#![allow(clippy::unwrap_used)]

use std::collections::BTreeSet;
use std::fs;
use std::net::TcpListener;
use std::path::Path;

use litgpt::cli::recipe;
use litgpt::data::{by_name, prompt::PromptStyle};
use litgpt::train::settings::{FinetuneSettings, Precision};
use serde_json::Value;

use crate::util::{litgpt, page, root, serve, status};

/// The models of LitGPT's finetuning recipes; those whose weights alone fill 16 GB in bf16 have `qlora` only.
const MODELS: [(&str, &[&str]); 16] = [
    ("falcon-7b", &["lora", "qlora"]),
    ("gemma-2b", &["lora", "qlora"]),
    ("gemma-7b", &["qlora"]),
    ("gemma2-2b", &["lora", "qlora"]),
    ("gemma2-9b", &["qlora"]),
    ("llama-2-7b", &["lora", "qlora"]),
    ("llama-3-8b", &["lora", "qlora"]),
    ("llama-3.1-8b", &["lora", "qlora"]),
    ("llama-3.2-1b", &["lora", "qlora"]),
    ("llama-3.2-3b", &["lora", "qlora"]),
    ("mistral-7b", &["lora", "qlora"]),
    ("mistral-7b-v0.2", &["lora", "qlora"]),
    ("phi-2", &["lora", "qlora"]),
    ("phi-3", &["lora", "qlora"]),
    ("stablelm-base-alpha-3b", &["lora", "qlora"]),
    ("tiny-llama", &["lora", "qlora"]),
];

fn resolved(config: &str) -> litgpt::error::Result<FinetuneSettings> {
    recipe::parse_finetune(&["litgpt", "finetune", "lora", "--config", config].map(str::to_owned))
}

/// Name without ending, and path, of every recipe.
fn recipes() -> Vec<(String, String)> {
    let entries = fs::read_dir(root().join("data/recipes")).unwrap().map(|entry| entry.unwrap().path());
    entries.map(|path| (path.file_stem().unwrap().to_str().unwrap().to_owned(), path.display().to_string())).collect()
}

#[test]
fn there_is_a_recipe_for_every_model() {
    let found: BTreeSet<String> = recipes().into_iter().map(|(name, _)| name).collect();
    let listed = MODELS.iter().flat_map(|(model, kinds)| kinds.iter().map(move |kind| format!("{model}-{kind}")));
    assert_eq!(found, listed.collect());
}

#[test]
fn recipes_are_what_their_names_say() {
    let mut models = BTreeSet::new();
    for (name, path) in recipes() {
        let settings = resolved(&path).unwrap_or_else(|error| panic!("{name}: {error}"));
        let (model, kind) = name.rsplit_once('-').unwrap();
        assert_eq!(settings.quantize.as_deref(), (kind == "qlora").then_some("nf4"), "{name}");
        assert_eq!(settings.precision, Some(Precision::Bf16True), "{name}");
        assert_eq!(settings.out_dir, Path::new("out").join(&name));
        assert!(litgpt::checkpoint::hub::is_repo_id(settings.checkpoint_dir.to_str().unwrap()), "{name}");
        models.insert((model.to_owned(), settings.checkpoint_dir.clone()));
        by_name(&settings.data.name).unwrap();
        let style = settings.data.prompt_style.as_deref().unwrap();
        assert!(style == "chat" || PromptStyle::by_name(style).is_ok(), "{name}: {style}");
        let text = fs::read_to_string(&path).unwrap();
        assert!(text.contains(&format!("--config data/recipes/{name}.yaml")), "{name} does not say how to run it");
    }
    // Both recipes of a model name the same repository, and no two models do.
    assert_eq!(models.len(), MODELS.len());
    assert_eq!(models.iter().map(|(_, repo)| repo).collect::<BTreeSet<_>>().len(), MODELS.len());
}

/// A key that a recipe repeats in vain, or one that means something else than it says, would be lost here.
#[test]
fn recipes_say_what_they_resolve_to() {
    fn leaves(path: &str, value: &Value, found: &mut Vec<(String, Value)>) {
        match value {
            Value::Object(map) => map.iter().for_each(|(key, value)| leaves(&format!("{path}/{key}"), value, found)),
            value => found.push((path.to_owned(), value.clone())),
        }
    }
    for (name, path) in recipes() {
        let printed = recipe::to_yaml(&resolved(&path).unwrap()).unwrap();
        let [said, got]: [Value; 2] =
            [fs::read_to_string(&path).unwrap(), printed].map(|text| serde_saphyr::from_str(&text).unwrap());
        let mut found = Vec::new();
        leaves("", &said, &mut found);
        assert!(found.len() > 30, "{name}");
        for (key, value) in found {
            let got = match (key.as_str(), got.pointer(&key).unwrap_or_else(|| panic!("{name}: no {key}"))) {
                ("/quantize", Value::String(got)) => got.trim_start_matches("bnb.").into(),
                (_, got) => got.clone(),
            };
            let same = got == value || got.as_f64().is_some_and(|got| Some(got) == value.as_f64());
            assert!(same, "{name}: {key} is {value} and became {got}");
        }
    }
}

#[test]
fn printed_recipes_run_again_to_the_same() {
    let dir = tempfile::tempdir().unwrap();
    for (name, path) in recipes() {
        let printed = litgpt(dir.path(), ["finetune", "lora", "--config", &path, "--print_config"]).ok().stdout;
        let again = dir.path().join(format!("{name}.yaml"));
        fs::write(&again, &printed).unwrap();
        assert_eq!(resolved(again.to_str().unwrap()).unwrap(), resolved(&path).unwrap(), "{name}");
        let args = ["finetune", "lora", "--config", again.to_str().unwrap(), "--print_config"];
        assert_eq!(litgpt(dir.path(), args).ok().stdout, printed, "{name}");
    }
}

#[test]
fn recipes_come_from_the_web() {
    let path = root().join("data/recipes/phi-2-qlora.yaml");
    let recipe = fs::read_to_string(&path).unwrap();
    let raw = serve(move |_| page(&recipe));
    let settings = resolved(&format!("{raw}/phi-2-qlora.yaml")).unwrap();
    assert_eq!(settings, resolved(path.to_str().unwrap()).unwrap());
    let there = format!("Location: {raw}/there.yaml\r\n");
    let moved = serve(move |_| status("302 Found", &there));
    assert_eq!(resolved(&format!("{moved}/here.yaml")).unwrap(), settings);

    // Flags beat it, as they beat a file; a group may come from the web, too.
    let group = serve(|_| page("epochs: 7\nmax_steps: 9\n"));
    let dir = tempfile::tempdir().unwrap();
    let url = format!("{raw}/x.yaml");
    let args = ["finetune", "lora", "--config", &url, "--lora_r", "3", "--train", &group, "--print_config"];
    let printed = litgpt(dir.path(), args).ok().stdout;
    assert!(printed.contains("lora_r: 3\n") && printed.contains("epochs: 7\n"), "{printed}");
    assert!(printed.contains("checkpoint_dir: microsoft/phi-2\n"), "{printed}");
}

#[test]
fn what_is_no_recipe_on_the_web_is_said() {
    let dir = tempfile::tempdir().unwrap();
    let closed = format!("http://{}", TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap());
    let long = "x".repeat(2 << 20);
    for (address, code, says) in [
        (serve(|_| page("<!DOCTYPE html>\n<p>lora_r: 4</p>")), 2, "a web page, not a recipe"),
        (serve(|_| page("lora_r: 4\nlora_q: 1\n")), 2, "`lora_q`, did you mean `lora_query`?"),
        (serve(|_| page("just words")), 2, "expected `key: value` lines"),
        (serve(move |_| page(format!("# {long}"))), 1, "more than 1 MB"),
        (serve(|_| status("404 Not Found", "")), 1, "file on the web not found"),
        (serve(|_| status("403 Forbidden", "")), 1, "no access"),
        (closed, 1, "in place of the address"),
    ] {
        let url = format!("{address}/lora.yaml");
        litgpt(dir.path(), ["finetune", "lora", "--config", &url, "--print_config"])
            .refused(code, &[says, "/lora.yaml"]);
    }
}
