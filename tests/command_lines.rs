//! LitGPT's documented command lines and recipes, 0.2 to 0.5, each resolved to the settings that it asks for.
//!
//! A case names the keys that differ from the defaults; everything else must be at its default. Recipes have the keys
//! and values of LitGPT's config hub.

#![allow(clippy::unwrap_used)]

use std::path::Path;

use litgpt::cli::args::{
    self, ChatArgs, ConvertFromArgs, ConvertToArgs, DownloadArgs, GenerateArgs, MergeArgs, MergeFormat, ValidateArgs,
};
use litgpt::cli::{compat, recipe};
use litgpt::train::settings::{FinetuneSettings, Precision};
use serde_json::{Value, json};

/// Splits a line as a shell would: blanks, quotes, and a backslash at the end of a line.
fn words(line: &str) -> Vec<String> {
    let mut words = Vec::new();
    let (mut word, mut quote, mut open) = (String::new(), None, false);
    for c in line.replace("\\\n", " ").chars() {
        match (c, quote) {
            ('"' | '\'', None) => (quote, open) = (Some(c), true),
            (c, Some(q)) if c == q => quote = None,
            (c, None) if c.is_whitespace() => {
                if open {
                    words.push(std::mem::take(&mut word));
                }
                open = false;
            }
            (c, _) => {
                word.push(c);
                open = true;
            }
        }
    }
    if open {
        words.push(word);
    }
    words
}

fn parse<A: clap::Args>(line: &str) -> A {
    args::parse(&words(line)).unwrap_or_else(|error| panic!("{line}\n{error}"))
}

/// The default settings' tree with `changes` made to it.
fn expected(changes: &Value) -> Value {
    let mut tree = serde_json::to_value(FinetuneSettings::default()).unwrap();
    for (key, value) in changes.as_object().unwrap() {
        let pointer = format!("/{}", key.replace('.', "/"));
        *tree.pointer_mut(&pointer).unwrap_or_else(|| panic!("no key {key}")) = value.clone();
    }
    tree
}

fn assert_resolves(line: &str, changes: &Value) {
    let settings = recipe::parse_finetune(&words(line)).unwrap_or_else(|error| panic!("{line}\n{error}"));
    assert_eq!(serde_json::to_value(&settings).unwrap(), expected(changes), "{line}");
}

const FALCON: &str = "checkpoints/tiiuae/falcon-7b";

#[test]
fn finetune_as_in_0_5() {
    let falcon = "tiiuae/falcon-7b";
    let libre =
        "https://raw.githubusercontent.com/mobarski/alpaca-libre/main/data/output/alpaca_libre_ok_tasks_v4.json";
    let libre_name = "alpaca_libre_data_cleaned_archive.json";
    let flan = "aeslc_10templates,ag_news_subset_10templates,anli_r1_10templates";
    for (line, changes) in [
        (
            "litgpt finetune microsoft/phi-2 --data JSON --data.json_path my_custom_dataset.json \\\n --data.val_split_fraction 0.1 --out_dir out/custom-model",
            json!({"checkpoint_dir": "microsoft/phi-2", "data.name": "JSON", "data.json_path": "my_custom_dataset.json", "data.val_split_fraction": 0.1, "out_dir": "out/custom-model"}),
        ),
        (
            "litgpt finetune_lora microsoft/phi-2 --out_dir lora_model",
            json!({"checkpoint_dir": "microsoft/phi-2", "out_dir": "lora_model"}),
        ),
        (
            "litgpt finetune_lora TinyLlama/TinyLlama-1.1B-Chat-v1.0 --out_dir out/lit-finetuned-model --train.epochs 1 --data Alpaca",
            json!({"checkpoint_dir": "TinyLlama/TinyLlama-1.1B-Chat-v1.0", "out_dir": "out/lit-finetuned-model", "train.epochs": 1}),
        ),
        (
            "litgpt finetune meta-llama/Meta-Llama-3-70B --train.max_steps 10",
            json!({"checkpoint_dir": "meta-llama/Meta-Llama-3-70B", "train.max_steps": 10}),
        ),
        (
            "litgpt finetune_lora stabilityai/stablelm-base-alpha-3b --data Alpaca",
            json!({"checkpoint_dir": "stabilityai/stablelm-base-alpha-3b"}),
        ),
        (
            "litgpt finetune_lora stabilityai/stablelm-base-alpha-3b --data Alpaca --out_dir out/lora/my-model-finetuned --precision 32-true",
            json!({"checkpoint_dir": "stabilityai/stablelm-base-alpha-3b", "out_dir": "out/lora/my-model-finetuned", "precision": "32-true"}),
        ),
        (
            "litgpt finetune_lora stabilityai/stablelm-base-alpha-3b --quantize \"bnb.nf4\"",
            json!({"checkpoint_dir": "stabilityai/stablelm-base-alpha-3b", "quantize": "nf4"}),
        ),
        (
            "litgpt finetune_lora stabilityai/stablelm-base-alpha-3b --quantize \"bnb.nf4-dq\"",
            json!({"checkpoint_dir": "stabilityai/stablelm-base-alpha-3b", "quantize": "nf4-dq"}),
        ),
        (
            "litgpt finetune_lora checkpoints/stabilityai/stablelm-base-alpha-3b --data JSON --data.json_path data/mydata.json --out_dir out_dir/mydata-finetuned",
            json!({"checkpoint_dir": "checkpoints/stabilityai/stablelm-base-alpha-3b", "data.name": "JSON", "data.json_path": "data/mydata.json", "out_dir": "out_dir/mydata-finetuned"}),
        ),
        (
            "litgpt finetune_lora tiiuae/falcon-7b --data Alpaca --train.max_seq_length 256",
            json!({"checkpoint_dir": falcon, "train.max_seq_length": 256}),
        ),
        (
            "litgpt finetune_lora \"tiiuae/falcon-7b\" --data Alpaca2k",
            json!({"checkpoint_dir": falcon, "data.name": "Alpaca2k"}),
        ),
        (
            "litgpt finetune lora \"tiiuae/falcon-7b\" --data AlpacaGPT4",
            json!({"checkpoint_dir": falcon, "data.name": "AlpacaGPT4"}),
        ),
        (
            "litgpt finetune_lora tiiuae/falcon-7b --data Alpaca --data.file_url \"https://raw.githubusercontent.com/mobarski/alpaca-libre/main/data/output/alpaca_libre_ok_tasks_v4.json\" --data.file_name \"alpaca_libre_data_cleaned_archive.json\"",
            json!({"checkpoint_dir": falcon, "data.file_url": libre, "data.file_name": libre_name}),
        ),
        (
            "litgpt finetune_lora tiiuae/falcon-7b --data Alpaca --data.file_url \"https://raw.githubusercontent.com/mobarski/alpaca-libre/main/data/output/alpaca_libre_ok_tasks_v4.json\" --data.file_name \"alpaca_libre_data_cleaned_archive.json\" --train.max_seq_length 256",
            json!({"checkpoint_dir": falcon, "data.file_url": libre, "data.file_name": libre_name, "train.max_seq_length": 256}),
        ),
        ("litgpt finetune_lora tiiuae/falcon-7b --data Deita", json!({"checkpoint_dir": falcon, "data.name": "Deita"})),
        (
            "litgpt finetune_lora tiiuae/falcon-7b --data Deita --data.include_multiturn_conversations True",
            json!({"checkpoint_dir": falcon, "data.name": "Deita", "data.include_multiturn_conversations": true}),
        ),
        (
            "litgpt finetune_lora tiiuae/falcon-7b --data Deita --train.max_seq_length 512",
            json!({"checkpoint_dir": falcon, "data.name": "Deita", "train.max_seq_length": 512}),
        ),
        ("litgpt finetune_lora tiiuae/falcon-7b --data Dolly", json!({"checkpoint_dir": falcon, "data.name": "Dolly"})),
        (
            "litgpt finetune_lora tiiuae/falcon-7b --data LongForm --train.max_seq_length 1500",
            json!({"checkpoint_dir": falcon, "data.name": "LongForm", "train.max_seq_length": 1500}),
        ),
        (
            "litgpt finetune lora --data LIMA --checkpoint_dir \"tiiuae/falcon-7b\"",
            json!({"checkpoint_dir": falcon, "data.name": "LIMA"}),
        ),
        (
            "litgpt finetune_lora tiiuae/falcon-7b --data LIMA --train.max_seq_length 512",
            json!({"checkpoint_dir": falcon, "data.name": "LIMA", "train.max_seq_length": 512}),
        ),
        ("litgpt finetune_lora tiiuae/falcon-7b --data FLAN", json!({"checkpoint_dir": falcon, "data.name": "FLAN"})),
        (
            "litgpt finetune lora tiiuae/falcon-7b --data FLAN --data.subsets \"aeslc_10templates,ag_news_subset_10templates,anli_r1_10templates\"",
            json!({"checkpoint_dir": falcon, "data.name": "FLAN", "data.subsets": flan}),
        ),
        (
            "litgpt finetune_lora tiiuae/falcon-7b --data JSON --data.json_path path/to/your/data.json --data.val_split_fraction 0.1 --data.seed 42 --data.mask_inputs False --data.ignore_index -100",
            json!({"checkpoint_dir": falcon, "data.name": "JSON", "data.json_path": "path/to/your/data.json", "data.val_split_fraction": 0.1, "data.mask_prompt": false}),
        ),
        (
            "litgpt finetune tiiuae/falcon-7b --data JSON --data.json_path data/mydata.json --out_dir data/mydata-finetuned",
            json!({"checkpoint_dir": falcon, "data.name": "JSON", "data.json_path": "data/mydata.json", "out_dir": "data/mydata-finetuned"}),
        ),
    ] {
        assert_resolves(line, &changes);
    }
}

#[test]
fn finetune_as_before_0_4() {
    for (line, changes) in [
        (
            "litgpt finetune --checkpoint_dir checkpoints/microsoft/phi-2 --data JSON --data.json_path my_custom_dataset.json --data.val_split_fraction 0.1 --out_dir out/custom-model",
            json!({"checkpoint_dir": "checkpoints/microsoft/phi-2", "data.name": "JSON", "data.json_path": "my_custom_dataset.json", "data.val_split_fraction": 0.1, "out_dir": "out/custom-model"}),
        ),
        (
            "litgpt finetune lora --checkpoint_dir checkpoints/microsoft/phi-2 --out_dir lora_model",
            json!({"checkpoint_dir": "checkpoints/microsoft/phi-2", "out_dir": "lora_model"}),
        ),
        (
            "litgpt finetune lora --checkpoint_dir checkpoints/tiiuae/falcon-7b --out_dir out/f --train.epochs 1 --data Alpaca",
            json!({"checkpoint_dir": FALCON, "out_dir": "out/f", "train.epochs": 1}),
        ),
        (
            "litgpt finetune lora --data Alpaca --checkpoint_dir \"checkpoints/tiiuae/falcon-7b\"",
            json!({"checkpoint_dir": FALCON}),
        ),
        (
            "litgpt finetune lora --data Alpaca2k --checkpoint_dir \"checkpoints/tiiuae/falcon-7b\"",
            json!({"checkpoint_dir": FALCON, "data.name": "Alpaca2k"}),
        ),
        (
            "litgpt finetune lora --data AlpacaGPT4 --checkpoint_dir \"checkpoints/tiiuae/falcon-7b\"",
            json!({"checkpoint_dir": FALCON, "data.name": "AlpacaGPT4"}),
        ),
        (
            "litgpt finetune lora --data Deita --checkpoint_dir \"checkpoints/tiiuae/falcon-7b\" --train.max_seq_length 512",
            json!({"checkpoint_dir": FALCON, "data.name": "Deita", "train.max_seq_length": 512}),
        ),
        (
            "litgpt finetune lora --data Dolly --checkpoint_dir \"checkpoints/tiiuae/falcon-7b\" --train.max_seq_length 256",
            json!({"checkpoint_dir": FALCON, "data.name": "Dolly", "train.max_seq_length": 256}),
        ),
        (
            "litgpt finetune lora --data LongForm --checkpoint_dir \"checkpoints/tiiuae/falcon-7b\" --train.max_seq_length 1500",
            json!({"checkpoint_dir": FALCON, "data.name": "LongForm", "train.max_seq_length": 1500}),
        ),
        (
            "litgpt finetune lora --checkpoint_dir checkpoints/tiiuae/falcon-7b --quantize \"bnb.nf4\"",
            json!({"checkpoint_dir": FALCON, "quantize": "nf4"}),
        ),
        (
            "litgpt finetune lora --checkpoint_dir checkpoints/tiiuae/falcon-7b --train.learning_rate 3e-4 --train.weight_decay 0.02 --train.beta1 0.9 --train.beta2 0.95",
            json!({"checkpoint_dir": FALCON, "optimizer.learning_rate": 3e-4, "optimizer.weight_decay": 0.02, "optimizer.beta2": 0.95}),
        ),
        (
            "litgpt finetune lora --io.checkpoint_dir checkpoints/tiiuae/falcon-7b --io.out_dir out/lora",
            json!({"checkpoint_dir": FALCON, "out_dir": "out/lora"}),
        ),
        (
            "litgpt finetune lora --checkpoint_dir checkpoints/tiiuae/falcon-7b --data.max_seq_length=256 --train.micro_batch_size 4",
            json!({"checkpoint_dir": FALCON, "train.max_seq_length": 256, "train.micro_batch_size": 4}),
        ),
        (
            "litgpt finetune/lora.py --checkpoint_dir checkpoints/tiiuae/falcon-7b --precision bf16-true",
            json!({"checkpoint_dir": FALCON, "precision": "bf16-true"}),
        ),
    ] {
        assert_resolves(line, &changes);
    }
}

#[test]
fn many_ways_to_one_learning_rate() {
    for flags in [
        "--lr 0.01",
        "--learning_rate=0.01",
        "--train.learning_rate 1e-2",
        "--train.lr 0.01",
        "--optimizer AdamW --optimizer.lr 0.01",
        "--optimizer torch.optim.AdamW --optimizer.learning_rate 0.01",
        "--optimizer.init_args.lr 0.01",
        "--optimizer.class_path torch.optim.AdamW --optimizer.init_args.lr 0.01",
        "--optimizer '{\"class_path\": \"torch.optim.AdamW\", \"init_args\": {\"lr\": 0.01}}'",
        "--optimizer '{class_path: AdamW, init_args: {lr: 1e-2, fused: true, amsgrad: false}}'",
        "--optimizer '{\"class_path\": \"AdamW\", \"init_args\": {\"lr\": 5}}' --lr 0.01",
        "--lr 5 --optimizer.lr 0.01",
    ] {
        assert_resolves(
            &format!("litgpt finetune_lora m {flags}"),
            &json!({"checkpoint_dir": "m", "optimizer.learning_rate": 0.01}),
        );
    }
}

#[test]
fn flags_in_every_form() {
    for (flags, changes) in [
        ("--lora_key", json!({"lora_key": true})),
        ("--lora_key true --lora_query false", json!({"lora_key": true, "lora_query": false})),
        ("--lora_key=True --lora_mlp=no", json!({"lora_key": true})),
        ("--lora-r 4 --train.max-steps=30", json!({"lora_r": 4, "train.max_steps": 30})),
        ("--lora_r 4 --lora_r 2", json!({"lora_r": 2})),
        (
            "--train.save_interval null --eval.max_new_tokens None",
            json!({"train.save_interval": null, "eval.max_new_tokens": null}),
        ),
        ("--precision null --quantize null --devices 1 --num_nodes 1", json!({})),
        ("--devices auto", json!({})),
        ("--quantize int8-training --precision 16-true", json!({"quantize": "int8-training", "precision": "16-true"})),
        ("--data litgpt.data.JSON --data.json_path=x.json", json!({"data.name": "JSON", "data.json_path": "x.json"})),
        ("--data x.jsonl", json!({"data.name": "JSON", "data.json_path": "x.jsonl"})),
        ("--data.json_path x.json", json!({"data.name": "JSON", "data.json_path": "x.json"})),
        (
            "--data '{\"class_path\": \"litgpt.data.LIMA\", \"init_args\": {\"repo_id\": \"me/lima\"}}'",
            json!({"data.name": "LIMA", "data.repo_id": "me/lima"}),
        ),
        (
            "--data.class_path litgpt.data.LIMA --data.init_args.repo_id me/lima",
            json!({"data.name": "LIMA", "data.repo_id": "me/lima"}),
        ),
        (
            "--data alpaca_2k --data.prompt_style llama3",
            json!({"data.name": "Alpaca2k", "data.prompt_style": "llama3"}),
        ),
        (
            "--train '{\"max_steps\": 5, \"epochs\": 1}' --train.epochs 2",
            json!({"train.max_steps": 5, "train.epochs": 2}),
        ),
        ("--optimizer.betas '[0.8, 0.95]'", json!({"optimizer.beta1": 0.8, "optimizer.beta2": 0.95})),
        ("--optimizer.init_args.betas (0.8,0.95)", json!({"optimizer.beta1": 0.8, "optimizer.beta2": 0.95})),
        ("--eval.evaluate_example random", json!({"eval.evaluate_example": "random"})),
        (
            "--eval.evaluate_example 7 --eval.initial_validation",
            json!({"eval.evaluate_example": 7, "eval.initial_validation": true}),
        ),
        ("--log.project p --log.log_model false --logger_name csv", json!({})),
        (
            "--train.max_time 3600 --train.max_norm 1.0 --train.max_tokens 100000",
            json!({"train.max_time": 3600.0, "train.max_norm": 1.0, "train.max_tokens": 100_000}),
        ),
        ("--access_token hf_x --seed 7 --data.seed 8", json!({"seed": 7, "data.seed": 8})),
        ("--train.gradient_checkpointing true", json!({"train.activation_checkpointing": true})),
    ] {
        let mut changes = changes;
        changes["checkpoint_dir"] = "m".into();
        assert_resolves(&format!("litgpt finetune_lora {flags} m"), &changes);
    }
}

/// One row of LitGPT's config hub.
struct Row {
    model: &'static str,
    r: [usize; 2],
    all_targets: bool,
    dropout: f64,
    global_batch_size: usize,
    micro_batch_size: [usize; 2],
    warmup: usize,
    epochs: usize,
    save: usize,
    eval: usize,
}

/// `batch`: global and micro (LoRA, QLoRA); `length`: warm-up steps and epochs; `every`: steps to a save and an evaluation.
const fn hub(
    model: &'static str,
    r: [usize; 2],
    all_targets: bool,
    dropout: f64,
    batch: (usize, [usize; 2]),
    length: (usize, usize),
    every: (usize, usize),
) -> Row {
    let (global_batch_size, micro_batch_size) = batch;
    let ((warmup, epochs), (save, eval)) = (length, every);
    Row { model, r, all_targets, dropout, global_batch_size, micro_batch_size, warmup, epochs, save, eval }
}

#[rustfmt::skip]
const CONFIG_HUB: &[Row] = &[
    hub("tiiuae/falcon-7b", [32, 32], false, 0.05, (8, [1, 1]), (10, 4), (200, 100)),
    hub("stabilityai/stablelm-base-alpha-3b", [32, 32], false, 0.05, (8, [1, 1]), (10, 4), (200, 100)),
    hub("meta-llama/Llama-2-7b-hf", [32, 32], false, 0.05, (8, [2, 2]), (10, 4), (200, 100)),
    hub("mistralai/Mistral-7B-v0.1", [32, 32], false, 0.05, (8, [2, 2]), (10, 4), (200, 100)),
    hub("unsloth/Mistral-7B-v0.2", [32, 32], false, 0.05, (8, [2, 2]), (10, 4), (200, 100)),
    hub("meta-llama/Meta-Llama-3-8B", [32, 32], false, 0.05, (8, [1, 2]), (10, 2), (200, 100)),
    hub("meta-llama/Meta-Llama-3.1-8B", [32, 32], false, 0.05, (8, [1, 2]), (10, 2), (200, 100)),
    hub("meta-llama/Llama-3.2-1B", [32, 32], false, 0.05, (8, [1, 2]), (10, 2), (200, 100)),
    hub("meta-llama/Llama-3.2-3B", [32, 32], false, 0.05, (8, [1, 2]), (10, 2), (200, 100)),
    hub("google/gemma-2b", [8, 16], true, 0.1, (6, [2, 2]), (200, 2), (800, 25)),
    hub("google/gemma-2-2b", [8, 16], true, 0.1, (6, [2, 2]), (200, 2), (800, 25)),
    hub("google/gemma-7b", [16, 16], true, 0.1, (6, [1, 1]), (200, 2), (800, 25)),
    hub("google/gemma-2-9b", [16, 16], true, 0.1, (6, [1, 1]), (200, 2), (800, 25)),
    hub("microsoft/phi-2", [8, 8], true, 0.05, (8, [4, 4]), (10, 1), (800, 100)),
    hub("microsoft/Phi-3-mini-4k-instruct", [8, 8], true, 0.05, (8, [4, 4]), (10, 1), (800, 100)),
    hub("TinyLlama/TinyLlama-1.1B-intermediate-step-1431k-3T", [32, 32], true, 0.05, (8, [8, 8]), (10, 3), (800, 100)),
];

impl Row {
    /// The recipe, with comments, empty values and all; `quantized`: the QLoRA one. `optimizer_in_train`: as before 0.4.
    fn yaml(&self, quantized: bool, optimizer_in_train: bool) -> String {
        let which = usize::from(quantized);
        let all = self.all_targets;
        let (in_train, after) = match optimizer_in_train {
            true => ("  learning_rate: 0.0002\n  weight_decay: 0.0\n  beta1: 0.9\n  beta2: 0.95\n", ""),
            false => (
                "",
                "# Optimizer-related arguments\noptimizer:\n  class_path: torch.optim.AdamW\n\n  init_args:\n    #   (type: float)\n    \
                 lr: 0.0002\n    weight_decay: 0.0\n    betas:\n      - 0.9\n      - 0.95\n",
            ),
        };
        format!(
            "# The path to the base model's folder\ncheckpoint_dir: checkpoints/{model}\n\nout_dir: out/finetune/hub\n\
             precision: bf16-true\nquantize: {quantize}\ndevices: 1\nnum_nodes: 1\nlora_r: {r}\nlora_alpha: 16\nlora_dropout: {dropout}\n\
             lora_query: true\nlora_key: {all}\nlora_value: true\nlora_projection: {all}\nlora_mlp: {all}\nlora_head: {all}\n\
             data:\n  class_path: litgpt.data.Alpaca2k\n  init_args:\n    mask_prompt: false\n    val_split_fraction: 0.05\n    \
             prompt_style: alpaca\n    ignore_index: -100\n    seed: 42\n    num_workers: 4\n    download_dir: data/alpaca2k\n\
             train:\n  save_interval: {save}\n  log_interval: 1\n  global_batch_size: {gbs}\n  micro_batch_size: {mbs}\n  \
             lr_warmup_steps: {warmup}\n  epochs: {epochs}\n  max_tokens:\n  max_steps:\n  max_seq_length: 512\n  tie_embeddings:\n\
             {in_train}  max_norm:\n  min_lr: 6.0e-05\n\
             eval:\n  interval: {eval}\n  max_new_tokens: 100\n  max_iters: 100\n  initial_validation: false\n  final_validation: true\n\
             logger_name: csv\nseed: 1337\n{after}",
            model = self.model,
            quantize = if quantized { "bnb.nf4" } else { "" },
            r = self.r[which],
            dropout = self.dropout,
            save = self.save,
            gbs = self.global_batch_size,
            mbs = self.micro_batch_size[which],
            warmup = self.warmup,
            epochs = self.epochs,
            eval = self.eval,
        )
    }

    fn changes(&self, quantized: bool) -> Value {
        let which = usize::from(quantized);
        let all = self.all_targets;
        json!({
            "checkpoint_dir": format!("checkpoints/{}", self.model), "out_dir": "out/finetune/hub", "precision": "bf16-true",
            "quantize": if quantized { json!("nf4") } else { Value::Null },
            "lora_r": self.r[which], "lora_dropout": self.dropout,
            "lora_key": all, "lora_projection": all, "lora_mlp": all, "lora_head": all,
            "data.name": "Alpaca2k", "data.mask_prompt": false, "data.val_split_fraction": 0.05, "data.prompt_style": "alpaca", "data.download_dir": "data/alpaca2k",
            "train.save_interval": self.save, "train.global_batch_size": self.global_batch_size,
            "train.micro_batch_size": self.micro_batch_size[which], "train.lr_warmup_steps": self.warmup,
            "train.epochs": self.epochs, "train.max_seq_length": 512, "eval.interval": self.eval,
            "optimizer.weight_decay": 0.0, "optimizer.beta2": 0.95,
        })
    }
}

#[test]
fn config_hub_recipes() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("lora.yaml");
    for row in CONFIG_HUB {
        for (quantized, historic) in [(false, false), (false, true), (true, false), (true, true)] {
            std::fs::write(&path, row.yaml(quantized, historic)).unwrap();
            assert_resolves(&format!("litgpt finetune_lora --config {}", path.display()), &row.changes(quantized));
        }
    }
}

#[test]
fn recipes_with_flags() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("lora.yaml");
    let row = CONFIG_HUB.iter().find(|row| row.model == "microsoft/phi-2").unwrap();
    std::fs::write(&path, row.yaml(false, false)).unwrap();
    let group = folder.path().join("train.yaml");
    std::fs::write(&group, "max_steps: 9\nlearning_rate: 1.0e-3\n").unwrap();
    let (path, group) = (path.display(), group.display());
    for (line, more) in [
        (format!("litgpt finetune lora --config {path} --precision 16-true"), json!({"precision": "16-true"})),
        (format!("litgpt finetune lora --config {path} --precision 16-mixed"), json!({"precision": "16-mixed"})),
        (
            format!("litgpt finetune_lora microsoft/phi-2 --config {path} --train.max_steps 5"),
            json!({"checkpoint_dir": "microsoft/phi-2", "train.max_steps": 5}),
        ),
        (format!("litgpt finetune lora --config {path} --train.max_steps 5"), json!({"train.max_steps": 5})),
        (format!("litgpt finetune --config {path} --lora_r 4"), json!({"lora_r": 4})),
        (format!("litgpt -c {path} finetune lora --lora_r 4"), json!({"lora_r": 4})),
        (
            format!("litgpt finetune_lora --optimizer.init_args.lr 1e-3 --config {path}"),
            json!({"optimizer.learning_rate": 1e-3}),
        ),
        (
            format!("litgpt finetune_lora -c {path} --train {group} --lr 0.5"),
            json!({"train.max_steps": 9, "optimizer.learning_rate": 0.5}),
        ),
        (
            format!("litgpt finetune_lora -c {path} --train {group}"),
            json!({"train.max_steps": 9, "optimizer.learning_rate": 1e-3}),
        ),
    ] {
        let mut changes = row.changes(false);
        changes.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        assert_resolves(&line, &changes);
    }
    let four =
        recipe::parse_finetune(&words(&format!("litgpt finetune lora --config {path} --devices 4"))).unwrap_err();
    assert!(four.to_string().contains("`devices` must be 1"), "{four}");
}

#[test]
fn generate_lines() {
    let model = "tiiuae/falcon-7b";
    let food = "What food do llamas eat?";
    let movie = "Recommend a movie to watch on the weekend.";
    let stable = "stabilityai/stablelm-base-alpha-3b";
    type Case<'a> = (&'a str, &'a str, &'a str, usize, Option<&'a str>, Option<Precision>);
    let cases: [Case; 14] = [
        (
            "litgpt generate stabilityai/stablelm-base-alpha-3b --prompt \"Hello, my name is\"",
            stable,
            "Hello, my name is",
            50,
            None,
            None,
        ),
        (
            "litgpt generate \"out/lora/final\" --prompt \"Recommend a movie to watch on the weekend.\"",
            "out/lora/final",
            movie,
            50,
            None,
            None,
        ),
        (
            "litgpt generate base --checkpoint_dir \"out/lora/final\" --prompt \"Recommend a movie to watch on the weekend.\"",
            "out/lora/final",
            movie,
            50,
            None,
            None,
        ),
        (
            "litgpt generate base --prompt \"Hello, my name is\" --checkpoint_dir checkpoints/stabilityai/stablelm-base-alpha-3b",
            "checkpoints/stabilityai/stablelm-base-alpha-3b",
            "Hello, my name is",
            50,
            None,
            None,
        ),
        (
            "litgpt generate/base.py --prompt \"Hello, my name is\" --checkpoint_dir checkpoints/databricks/dolly-v2-3b",
            "checkpoints/databricks/dolly-v2-3b",
            "Hello, my name is",
            50,
            None,
            None,
        ),
        (
            "litgpt generate tiiuae/falcon-7b --precision 32-true --max_new_tokens 256",
            model,
            food,
            256,
            None,
            Some(Precision::F32True),
        ),
        (
            "litgpt generate tiiuae/falcon-7b --precision bf16-true --max_new_tokens 256",
            model,
            food,
            256,
            None,
            Some(Precision::Bf16True),
        ),
        (
            "litgpt generate tiiuae/falcon-7b --quantize bnb.nf4 --precision bf16-true --max_new_tokens 256",
            model,
            food,
            256,
            Some("nf4"),
            Some(Precision::Bf16True),
        ),
        (
            "litgpt generate tiiuae/falcon-7b --quantize bnb.nf4-dq --precision bf16-true --max_new_tokens 256",
            model,
            food,
            256,
            Some("nf4-dq"),
            Some(Precision::Bf16True),
        ),
        (
            "litgpt generate tiiuae/falcon-7b --quantize bnb.fp4 --precision bf16-true --max_new_tokens 256",
            model,
            food,
            256,
            Some("fp4"),
            Some(Precision::Bf16True),
        ),
        (
            "litgpt generate tiiuae/falcon-7b --quantize bnb.fp4-dq --precision bf16-true --max_new_tokens 256",
            model,
            food,
            256,
            Some("fp4-dq"),
            Some(Precision::Bf16True),
        ),
        (
            "litgpt generate tiiuae/falcon-7b --quantize bnb.int8 --precision 16-true --max_new_tokens 256",
            model,
            food,
            256,
            Some("int8"),
            Some(Precision::F16True),
        ),
        ("litgpt generate meta-llama/Meta-Llama-3-70B", "meta-llama/Meta-Llama-3-70B", food, 50, None, None),
        (
            "litgpt generate m --quantize null --precision=null --sys_prompt null --compile false --num_samples 1 --top_k 50 --top_p 1.0 --temperature 0.8",
            "m",
            food,
            50,
            None,
            None,
        ),
    ];
    for (line, model, prompt, max_new_tokens, quantize, precision) in cases {
        let args: GenerateArgs = parse(line);
        assert_eq!(args.model.path().unwrap(), Path::new(model), "{line}");
        assert_eq!((args.prompt.as_str(), args.sampling.max_new_tokens), (prompt, max_new_tokens), "{line}");
        assert_eq!((args.load.quantize.as_deref(), args.load.precision), (quantize, precision), "{line}");
        assert_eq!((args.sampling.top_k, args.sampling.top_p, args.sampling.temperature), (50, 1.0, 0.8), "{line}");
        assert!(args.load.notes().is_empty() && args.sys_prompt.is_none() && args.num_samples == 1, "{line}");
    }
    let greedy: GenerateArgs = parse("litgpt generate --compile m --temperature 0 --top_k null --prompt '--help me'");
    assert_eq!((greedy.sampling.temperature, greedy.sampling.top_k, greedy.prompt.as_str()), (0.0, 0, "--help me"));
    assert_eq!(greedy.load.notes().len(), 1);
}

#[test]
fn chat_lines() {
    for (line, model) in [
        ("litgpt chat microsoft/phi-2", "microsoft/phi-2"),
        ("litgpt chat out/custom-model/final", "out/custom-model/final"),
        ("litgpt chat out/finetune/lora-phi-2/final/", "out/finetune/lora-phi-2/final/"),
        ("litgpt chat --checkpoint_dir checkpoints/microsoft/phi-2", "checkpoints/microsoft/phi-2"),
        ("litgpt chat --checkpoint_dir out/custom-model/final --top_k 200", "out/custom-model/final"),
        ("litgpt chat stabilityai/stablelm-tuned-alpha-3b --multiline false", "stabilityai/stablelm-tuned-alpha-3b"),
        (
            "litgpt chat/base.py --checkpoint_dir checkpoints/codellama/CodeLlama-7b-Python-hf/",
            "checkpoints/codellama/CodeLlama-7b-Python-hf/",
        ),
    ] {
        let args: ChatArgs = parse(line);
        assert_eq!(args.model.path().unwrap(), Path::new(model), "{line}");
        assert!(!args.multiline, "{line}");
    }
    assert!(parse::<ChatArgs>("litgpt chat m --multiline").multiline);
}

#[test]
fn download_lines() {
    for (line, repo, tokenizer_only, notes) in [
        ("litgpt download microsoft/phi-2", Some("microsoft/phi-2"), false, 0),
        ("litgpt download list", None, false, 0),
        ("litgpt download", None, false, 0),
        ("litgpt download --repo_id microsoft/phi-2", Some("microsoft/phi-2"), false, 0),
        ("litgpt download EleutherAI/pythia-14m --tokenizer_only true", Some("EleutherAI/pythia-14m"), true, 0),
        (
            "litgpt download --repo_id EleutherAI/pythia-160m --tokenizer_only True",
            Some("EleutherAI/pythia-160m"),
            true,
            0,
        ),
        ("litgpt download EleutherAI/pythia-14m --convert_checkpoint false", Some("EleutherAI/pythia-14m"), false, 0),
        (
            "litgpt download NousResearch/Hermes-2-Pro-Mistral-7B --model_name Mistral-7B-v0.1",
            Some("NousResearch/Hermes-2-Pro-Mistral-7B"),
            false,
            1,
        ),
        (
            "litgpt download google/gemma-2b --access_token your_hf_token --dtype null",
            Some("google/gemma-2b"),
            false,
            0,
        ),
        ("litgpt download meta-llama/Llama-2-7b-hf --access_token=hf_x", Some("meta-llama/Llama-2-7b-hf"), false, 0),
        (
            "litgpt scripts/download.py --repo_id microsoft/phi-2 --from_safetensors True",
            Some("microsoft/phi-2"),
            false,
            0,
        ),
    ] {
        let args: DownloadArgs = parse(line);
        assert_eq!(args.repo_id().unwrap(), repo, "{line}");
        assert_eq!((args.tokenizer_only, args.notes().len()), (tokenizer_only, notes), "{line}");
        assert_eq!(args.checkpoint_dir, Path::new("checkpoints"), "{line}");
    }
}

#[test]
fn merge_convert_and_validate_lines() {
    for (line, model) in [
        ("litgpt merge_lora \"out/lora/step-002000\"", "out/lora/step-002000"),
        (
            "litgpt merge_lora path/to/lora/checkpoint_dir --pretrained_checkpoint_dir null",
            "path/to/lora/checkpoint_dir",
        ),
        ("litgpt merge_lora --checkpoint_dir path/to/lora/checkpoint_dir", "path/to/lora/checkpoint_dir"),
        ("litgpt scripts/merge_lora.py --checkpoint_dir path/to/lora/checkpoint_dir", "path/to/lora/checkpoint_dir"),
    ] {
        let args: MergeArgs = parse(line);
        assert_eq!(args.model.path().unwrap(), Path::new(model), "{line}");
        assert_eq!(
            (args.out_dir, args.pretrained_checkpoint_dir, args.format),
            (None, None, MergeFormat::Hf),
            "{line}"
        );
    }
    for line in [
        "litgpt convert_to_litgpt checkpoints/EleutherAI/pythia-14m",
        "litgpt convert to_litgpt --checkpoint_dir checkpoints/EleutherAI/pythia-14m",
        "litgpt scripts/convert_hf_checkpoint.py --checkpoint_dir checkpoints/EleutherAI/pythia-14m",
    ] {
        let args: ConvertToArgs = parse(line);
        assert_eq!(args.model.path().unwrap(), Path::new("checkpoints/EleutherAI/pythia-14m"), "{line}");
    }
    for (line, from, to) in [
        ("litgpt convert_from_litgpt microsoft/phi-2 out/converted_model/", "microsoft/phi-2", "out/converted_model/"),
        (
            "litgpt convert from_litgpt --checkpoint_dir checkpoints/microsoft/phi-2 --output_dir out/converted_model/",
            "checkpoints/microsoft/phi-2",
            "out/converted_model/",
        ),
        ("litgpt convert_from_litgpt --checkpoint_dir checkpoint_dir converted_dir", "checkpoint_dir", "converted_dir"),
    ] {
        let args: ConvertFromArgs = parse(line);
        assert_eq!(args.paths().unwrap(), (from.into(), to.into()), "{line}");
    }
    let args: ValidateArgs = parse("litgpt validate checkpoints/microsoft/phi-2 --dtype bfloat16 --training true");
    assert!(args.training && args.dtype.as_deref() == Some("bfloat16") && args.model_filename.is_none());
}

#[test]
fn what_is_not_offered_is_refused_in_one_line() {
    for line in [
        "litgpt finetune_full tiiuae/falcon-7b --data Alpaca",
        "litgpt finetune full --data Alpaca --checkpoint_dir checkpoints/tiiuae/falcon-7b",
        "litgpt finetune_adapter stabilityai/stablelm-base-alpha-3b --data Alpaca",
        "litgpt finetune adapter_v2 stabilityai/stablelm-base-alpha-3b --data Alpaca",
        "litgpt pretrain pythia-160m --tokenizer_dir EleutherAI/pythia-160m --data TextFiles",
        "litgpt evaluate microsoft/phi-2 --tasks 'truthfulqa_mc2,mmlu'",
        "litgpt generate_adapter stabilityai/stablelm-base-alpha-3b --prompt x",
        "litgpt generate full --prompt x --checkpoint_dir checkpoints/tiiuae/falcon-7b",
        "litgpt generate_sequentially meta-llama/Llama-2-70b-chat-hf --max_new_tokens 256",
        "litgpt generate tp --checkpoint_dir checkpoints/meta-llama/Llama-2-70b-chat-hf",
        "litgpt convert pretrained_checkpoint --checkpoint_dir out --output_dir checkpoints/x",
    ] {
        let error = compat::rewrite(words(line).into_iter().map(Into::into).collect()).unwrap_err();
        assert!(error.to_string().ends_with("is not offered"), "{line}: {error}");
        assert!(error.hint().is_some_and(|hint| !hint.contains('\n')), "{line}");
    }
}
