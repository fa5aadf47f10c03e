//! What each command takes: `FinetuneArgs`, whose flags are the table [`FLAGS`], and the small derived structs of the
//! other commands.
//!
//! Finetuning has some sixty flags that are at the same time the keys of a YAML recipe, so they are rows of one table:
//! key, further spellings, kind of value, help. Defaults come from `train::settings`. Here flags are only parsed;
//! `recipe` merges them with files, `compat` rewrites historic command lines before clap sees them.

use std::ffi::OsString;
use std::path::{Path, PathBuf};

use clap::builder::TypedValueParser;
use clap::error::ErrorKind;
use clap::{Arg, ArgAction, ArgMatches, Args, Command, FromArgMatches, ValueEnum, value_parser};
use serde_json::Value;

use super::usage;
use crate::checkpoint::pointer;
use crate::error::{Error, Result};
use crate::generate::PROMPT_LOOKUP;
use crate::train::settings::{Accelerator, FinetuneSettings, Precision, quantizer};

/// What a value of a flag looks like.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// A whole number.
    Whole,
    /// Any number.
    Number,
    /// `true` or `false`; on the command line the flag alone means `true`.
    Boolean,
    /// Text.
    Text,
    /// A file or folder.
    Path,
    /// A file with a whole group of keys, or such a group as JSON.
    Group,
}

impl Kind {
    /// Reads `text` as this kind of value. `null` is a value of every kind; whether the key may be null is known later.
    ///
    /// # Errors
    /// What was expected, in words.
    pub fn parse(self, text: &str) -> std::result::Result<Value, String> {
        if matches!(text, "null" | "Null" | "NULL" | "None" | "~" | "") {
            return Ok(Value::Null);
        }
        match self {
            Self::Whole => text
                .parse::<u64>()
                .map(Value::from)
                .or_else(|_| text.parse::<i64>().map(Value::from))
                .map_err(|_| "expected a whole number".into()),
            Self::Number => match text.parse::<f64>() {
                Ok(number) if number.is_finite() => Ok(Value::from(number)),
                _ => Err("expected a number".into()),
            },
            Self::Boolean => boolean(text).map(Value::Bool),
            Self::Text | Self::Path | Self::Group => Ok(Value::from(text)),
        }
    }

    fn value_name(self) -> &'static str {
        match self {
            Self::Whole => "N",
            Self::Number => "X",
            Self::Boolean => "BOOL",
            Self::Text => "NAME",
            Self::Path => "PATH",
            Self::Group => "FILE",
        }
    }
}

/// `true` or `false` in the spellings of YAML and Python.
///
/// # Errors
/// Any other text.
pub fn boolean(text: &str) -> std::result::Result<bool, String> {
    match text.to_ascii_lowercase().as_str() {
        "true" | "yes" | "on" | "1" => Ok(true),
        "false" | "no" | "off" | "0" => Ok(false),
        _ => Err("expected `true` or `false`".into()),
    }
}

/// One setting of a finetuning run, as flag and as YAML key.
#[derive(Debug)]
pub struct Flag {
    /// Dotted path in the serde tree of `FinetuneSettings`.
    pub key: &'static str,
    /// Spellings besides `key`, for flags and YAML alike. The first is the one that help and messages show.
    pub names: &'static [&'static str],
    /// Kind of value.
    pub kind: Kind,
    /// Heading in the help.
    pub heading: &'static str,
    /// Help without the default.
    pub help: &'static str,
}

impl Flag {
    /// The spelling that help and messages show, without dashes.
    #[must_use]
    pub fn name(&self) -> &'static str {
        self.names.first().copied().unwrap_or(self.key)
    }

    /// The flag with this key or name.
    #[must_use]
    pub fn find(name: &str) -> Option<&'static Self> {
        FLAGS.iter().find(|flag| flag.key == name || flag.names.contains(&name))
    }

    const fn also(self, names: &'static [&'static str]) -> Self {
        Self { names, ..self }
    }

    /// The clap argument, with the default from `defaults` at the end of its help.
    fn arg(&self, defaults: &Value) -> Arg {
        let kind = self.kind;
        let default = defaults.pointer(&format!("/{}", self.key.replace('.', "/")));
        let help = match default {
            Some(Value::String(text)) if !text.is_empty() => format!("{} [default: {text}]", self.help),
            Some(value @ (Value::Number(_) | Value::Bool(_))) => format!("{} [default: {value}]", self.help),
            _ => self.help.to_owned(),
        };
        let aliases = self.names.iter().copied().chain([self.key]).filter(|name| *name != self.name());
        let arg = Arg::new(self.key)
            .long(self.name())
            .aliases(aliases)
            .value_name(kind.value_name())
            .help(help)
            .help_heading(self.heading)
            .allow_negative_numbers(true)
            .overrides_with(self.key)
            .value_parser(move |text: &str| kind.parse(text));
        match kind {
            Kind::Boolean => arg.num_args(0..=1).require_equals(true).default_missing_value("true"),
            _ => arg,
        }
    }
}

const fn row(key: &'static str, kind: Kind, heading: &'static str, help: &'static str) -> Flag {
    Flag { key, names: &[], kind, heading, help }
}

const MODEL: &str = "Model and output";
const LORA: &str = "LoRA";
const DATA: &str = "Data";
const TRAINING: &str = "Training";
const EVALUATION: &str = "Evaluation";
const OPTIMIZER: &str = "Optimizer";

use Kind::{Boolean, Group, Number, Path as File, Text, Whole};

/// Every setting of a finetuning run. Groups stand before their members, which beat them.
#[rustfmt::skip]
pub const FLAGS: &[Flag] = &[
    row("checkpoint_dir", File, MODEL, "Folder of the base model; the same as the first argument")
        .also(&["checkpoint_dir", "io.checkpoint_dir"]),
    row("out_dir", File, MODEL,
        "Folder for adapters and logs; a relative one lies in $LIGHTNING_ARTIFACTS_DIR if that is set")
        .also(&["out_dir", "io.out_dir"]),
    row("precision", Text, MODEL,
        "32-true, bf16-true, bf16-mixed, 16-true or 16-mixed [default: 32-true, on a GPU bf16-true]"),
    row("quantize", Text, MODEL,
        "Frozen weights of the blocks in few bits: nf4, nf4-dq, fp4, fp4-dq or int8, with or without bnb. in front"),
    row("accelerator", Text, MODEL, "Where to train: auto (a GPU if there is one), cpu, cuda [default: auto]"),
    row("devices", Text, MODEL, "GPUs; only 1"),
    row("num_nodes", Whole, MODEL, "Machines; only 1"),
    row("seed", Whole, MODEL, "Seed of the adapters' start values, dropout and sample text"),
    row("logger_name", Text, MODEL, "Where metrics go: csv (OUT_DIR/metrics.csv, report.html), tensorboard (event files in OUT_DIR/logs/tensorboard as well), or none"),
    row("access_token", Text, MODEL, "Hugging Face token, if the model has to be downloaded")
        .also(&["access_token", "data.access_token"]),
    row("add_bos", Text, MODEL, "Start samples with the BOS token: auto (as the tokenizer's files say), on, off"),

    row("resume", Text, MODEL,
        "Go on with a stopped run, exactly: auto (the newest state in --out_dir, else anew), true (the newest), or a step \
         folder"),
    row("resume_force", Boolean, MODEL, "Resume although settings or data changed; the result is not exact then"),

    row("dry_run", Boolean, MODEL, "Check settings, data and memory, say what the run needs, and stop"),

    row("lora_r", Whole, LORA, "Rank of the adapters"),
    row("lora_alpha", Number, LORA, "The adapters' output is scaled by alpha / r"),
    row("lora_dropout", Number, LORA, "Share of the adapters' input that is dropped in training"),
    row("lora_query", Boolean, LORA, "Adapt the query projections"),
    row("lora_key", Boolean, LORA, "Adapt the key projections"),
    row("lora_value", Boolean, LORA, "Adapt the value projections"),
    row("lora_projection", Boolean, LORA, "Adapt the output projections of attention"),
    row("lora_mlp", Boolean, LORA, "Adapt the MLPs"),
    row("lora_head", Boolean, LORA, "Adapt the LM head"),

    row("data.name", Text, DATA,
        "Data module: Alpaca, Alpaca2k, AlpacaGPT4, Deita, Dolly, FLAN, JSON, LIMA, LongForm; or a .json, .jsonl, .csv or \
         .parquet file; or a dataset of the Hub, ORGANISATION/NAME")
        .also(&["data", "data.class_path"]),
    row("data.json_path", File, DATA, "JSON: a .json, .jsonl, .csv or .parquet file, or a folder with a train and a val file"),
    row("data.columns", Text, DATA, "JSON, Hub: what the file calls the keys of a row, e.g. instruction=question,output=answer"),
    row("data.mask_prompt", Boolean, DATA, "Train on the answers only [default: true for conversations, else false]")
        .also(&["data.mask_prompt", "data.mask_inputs"]),
    row("data.pack", Boolean, DATA,
        "Put short samples side by side up to train.max_seq_length; attention and positions stay inside each"),
    row("data.val_split_fraction", Number, DATA,
        "Share of the samples held out for validation, 0 for none [default: the module's own]")
        .also(&["data.val_split_fraction", "data.test_split_fraction"]),
    row("data.prompt_style", Text, DATA, "Prompt style, e.g. alpaca, llama3, or chat, the model's chat template [default: the module's own]")
        .also(&["data.prompt_style", "data.prompt_style.class_path"]),
    row("data.ignore_index", Whole, DATA, "Label of tokens that do not count in the loss"),
    row("data.seed", Whole, DATA, "Seed of the split and of the order of samples"),
    row("data.num_workers", Whole, DATA, "Accepted for LitGPT's sake, without effect"),
    row("data.download_dir", File, DATA, "Where downloaded data is kept [default: the module's own]"),
    row("data.include_multiturn_conversations", Boolean, DATA, "Deita, LIMA: also the later answers, each as a sample"),
    row("data.repo_id", Text, DATA, "Another dataset repository on the Hub"),
    row("data.subsets", Text, DATA, "FLAN, Hub: names of subsets with commas between"),
    row("data.file_url", Text, DATA, "Another address of the data file"),
    row("data.file_name", Text, DATA, "Name under which the downloaded file is kept"),
    row("data.url", Text, DATA, "FLAN: another address of the folder"),

    row("train", Group, TRAINING, "A YAML file with the keys of this group, or the group as JSON"),
    row("train.epochs", Whole, TRAINING, "Times that the data is seen"),
    row("train.max_steps", Whole, TRAINING, "Stop after this many steps (updates of the adapters)"),
    row("train.max_time", Number, TRAINING, "Stop after this many seconds"),
    row("train.max_tokens", Whole, TRAINING, "Stop after this many tokens"),
    row("train.global_batch_size", Whole, TRAINING, "Samples in one step"),
    row("train.micro_batch_size", Whole, TRAINING, "Samples that go through the model at once"),
    row("train.max_seq_length", Whole, TRAINING, "Cut samples to this many tokens [default: the model's context]")
        .also(&["train.max_seq_length", "data.max_seq_length"]),
    row("train.activation_checkpointing", Text, TRAINING,
        "Save memory by computing activations twice: auto, on, off")
        .also(&["train.activation_checkpointing", "train.gradient_checkpointing"]),
    row("train.prefix_sharing", Text, TRAINING,
        "Compute the tokens that samples of a step begin with, as a system prompt, once for all: auto, on, off"),
    row("train.lr_warmup_steps", Whole, TRAINING, "Steps over which the learning rate rises, at most the whole run"),
    row("train.lr_warmup_fraction", Number, TRAINING,
        "The same as a share of the run; replaces --train.lr_warmup_steps"),
    row("train.lr_schedule", Text, TRAINING, "cosine, linear, constant, or litgpt (LitGPT's own: begins and ends at 0)"),
    row("train.min_lr", Number, TRAINING, "Where the cosine ends, at most the learning rate (LitGPT: ends at 0)"),
    row("train.max_norm", Number, TRAINING, "Clip the gradient to this norm [default: no clipping]"),
    row("train.save_interval", Whole, TRAINING, "Steps between two saved adapters; null: only at the end"),
    row("train.save_total_limit", Whole, TRAINING,
        "Step folders that are kept, the best and the latest among them [default: all]"),
    row("train.max_skipped_steps", Whole, TRAINING,
        "Steps without a finite loss and gradient are skipped; give up after this many in a row"),
    row("train.log_interval", Whole, TRAINING, "Micro batches between two log lines, of which a step has one at most"),
    row("train.tie_embeddings", Boolean, TRAINING, "Only null: the checkpoint decides it"),

    row("eval", Group, EVALUATION, "A YAML file with the keys of this group, or the group as JSON"),
    row("eval.interval", Whole, EVALUATION, "Steps between two evaluations"),
    row("eval.max_new_tokens", Whole, EVALUATION, "Length of the sample text; null: no sample text"),
    row("eval.max_iters", Whole, EVALUATION, "Micro batches in one evaluation, at most; the initial and the final validation have all"),
    row("eval.initial_validation", Boolean, EVALUATION, "Evaluate before the first step"),
    row("eval.final_validation", Boolean, EVALUATION, "Evaluate after the last step"),
    row("eval.evaluate_example", Text, EVALUATION,
        "Which validation sample the model answers: first, random or an index"),
    row("eval.early_stopping_patience", Whole, EVALUATION,
        "Stop after this many evaluations without a lower validation loss [default: never]"),

    row("optimizer.name", Text, OPTIMIZER,
        "Only AdamW; as JSON with its settings: {\"class_path\": \"torch.optim.AdamW\", \"init_args\": {\"lr\": \
         2e-4}}")
        .also(&["optimizer", "optimizer.class_path"]),
    row("optimizer.learning_rate", Number, OPTIMIZER,
        "Highest learning rate (LitGPT: 1e-3); also --lr, --optimizer.lr")
        .also(&["train.learning_rate", "lr", "learning_rate", "optimizer.lr", "train.lr"]),
    row("optimizer.weight_decay", Number, OPTIMIZER, "Weight decay; also --train.weight_decay")
        .also(&["optimizer.weight_decay", "train.weight_decay", "weight_decay"]),
    row("optimizer.betas", Text, OPTIMIZER, "Both decay rates at once: [0.9, 0.95]")
        .also(&["optimizer.betas", "train.betas"]),
    row("optimizer.beta1", Number, OPTIMIZER, "Decay of the first moment; also --train.beta1")
        .also(&["optimizer.beta1", "train.beta1", "beta1"]),
    row("optimizer.beta2", Number, OPTIMIZER, "Decay of the second moment; also --train.beta2")
        .also(&["optimizer.beta2", "train.beta2", "beta2"]),
    row("optimizer.eps", Number, OPTIMIZER, "Added to the denominator"),
];

/// Flags of LitGPT's wandb and litlogger; they mean nothing to the csv logger, there and here.
pub const LOG_FLAGS: &[&str] = &[
    "log",
    "log.project",
    "log.run",
    "log.group",
    "log.teamspace",
    "log.metadata",
    "log.log_model",
    "log.save_logs",
    "log.checkpoint_name",
];

const FINETUNE_EXAMPLES: &str = "\
Examples:
  litgpt finetune_lora microsoft/phi-2 --data JSON --data.json_path my_data.json --out_dir out/phi-2
  litgpt finetune_lora meta-llama/Llama-3.2-1B --precision bf16-true --lr 1e-4 --train.max_steps 200
  litgpt finetune_lora --config lora.yaml --lora_r 4     (flags beat files, wherever they stand)

Differences from LitGPT, on purpose: the loss of a step is the mean over its target tokens, the last partial window is \
stepped, warm-up starts above 0, gradient clipping works, the learning rate is 2e-4 where LitGPT takes 1e-3.";

/// Arguments of `litgpt finetune_lora`. What was not given is not in here; `recipe::resolve` adds files and defaults.
#[derive(Clone, Debug, Default)]
pub struct FinetuneArgs {
    /// Recipe files, in order.
    pub configs: Vec<PathBuf>,
    /// `--print_config`: print the resolved settings and stop. The text names what to leave out.
    pub print_config: Option<String>,
    /// Key and value of every setting on the command line, in the order of [`FLAGS`].
    pub given: Vec<(&'static str, Value)>,
}

impl Args for FinetuneArgs {
    fn augment_args(command: Command) -> Command {
        let defaults = serde_json::to_value(FinetuneSettings::default()).expect("plain data becomes JSON");
        let model = Arg::new("model")
            .value_name("CHECKPOINT_DIR")
            .help("Folder of the base model, or what stands behind `checkpoints/` in it")
            .value_parser(|text: &str| Kind::Path.parse(text));
        let config = Arg::new("config")
            .short('c')
            .long("config")
            .value_name("FILE")
            .help("YAML or JSON file with settings, or its web address; of several, later ones win")
            .action(ArgAction::Append)
            .value_parser(value_parser!(PathBuf));
        let print_config = Arg::new("print_config")
            .long("print_config")
            .value_name("WHAT")
            .help("Print the resolved settings as YAML and stop; WHAT: skip_null, skip_default")
            .num_args(0..=1)
            .require_equals(true)
            .default_missing_value("");
        let log = LOG_FLAGS.iter().map(|name| Arg::new(*name).long(*name).hide(true).overrides_with(*name));
        command
            .arg(model)
            .args([config, print_config])
            .args(FLAGS.iter().map(|flag| flag.arg(&defaults)))
            .args(log)
            .after_help(FINETUNE_EXAMPLES)
    }

    fn augment_args_for_update(command: Command) -> Command {
        Self::augment_args(command)
    }
}

impl FromArgMatches for FinetuneArgs {
    fn from_arg_matches(matches: &ArgMatches) -> std::result::Result<Self, clap::Error> {
        let mut given: Vec<(&'static str, Value)> =
            FLAGS.iter().filter_map(|flag| Some((flag.key, matches.get_one::<Value>(flag.key)?.clone()))).collect();
        if let Some(model) = matches.get_one::<Value>("model") {
            match given.iter().find(|(key, _)| *key == "checkpoint_dir") {
                Some((_, flag)) if flag != model => {
                    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
                    let (model, flag) = (text(model), text(flag));
                    let message = format!("two models are given: `{model}` and `--checkpoint_dir {flag}`\n");
                    return Err(clap::Error::raw(ErrorKind::ArgumentConflict, message));
                }
                Some(_) => {}
                None => given.insert(0, ("checkpoint_dir", model.clone())),
            }
        }
        let configs = matches.get_many::<PathBuf>("config").into_iter().flatten().cloned().collect();
        Ok(Self { configs, print_config: matches.get_one::<String>("print_config").cloned(), given })
    }

    fn update_from_arg_matches(&mut self, matches: &ArgMatches) -> std::result::Result<(), clap::Error> {
        *self = Self::from_arg_matches(matches)?;
        Ok(())
    }
}

/// The model that a command works on: the first argument, or `--checkpoint_dir`.
#[derive(Args, Clone, Debug, Default)]
#[group(skip)]
pub struct ModelArg {
    /// Folder of the model or adapter, or what stands behind `checkpoints/` in it
    #[arg(value_name = "CHECKPOINT_DIR")]
    pub model: Option<PathBuf>,
    /// The same as a flag
    #[arg(long = "checkpoint_dir", value_name = "CHECKPOINT_DIR", hide = true)]
    pub model_flag: Option<PathBuf>,
}

impl ModelArg {
    /// The folder, with the shorthand of [`checkpoint_dir`].
    ///
    /// # Errors
    /// None is given, or two that differ.
    pub fn path(&self) -> Result<PathBuf> {
        let path = one_of(&self.model, &self.model_flag, "CHECKPOINT_DIR", "checkpoint_dir")?;
        Ok(checkpoint_dir(path))
    }
}

/// LitGPT's shorthand: where there is no `path` but `checkpoints/path`, the latter is meant. A pointer (`best`) is the
/// folder that it names.
#[must_use]
pub fn checkpoint_dir(path: &Path) -> PathBuf {
    checkpoint_dir_in(Path::new(""), &pointer::resolve(path))
}

fn checkpoint_dir_in(root: &Path, path: &Path) -> PathBuf {
    let under = Path::new("checkpoints").join(path);
    match path.is_relative() && !root.join(path).exists() && root.join(&under).exists() {
        true => under,
        false => path.to_owned(),
    }
}

fn one_of<'a>(word: &'a Option<PathBuf>, flag: &'a Option<PathBuf>, what: &str, name: &str) -> Result<&'a Path> {
    match (word, flag) {
        (Some(word), Some(flag)) if word != flag => Err(Error::usage(
            format!("two values are given: `{}` and `--{name} {}`", word.display(), flag.display()),
            "give one of them",
        )),
        (Some(path), _) | (None, Some(path)) => Ok(path),
        (None, None) => Err(Error::usage(format!("no {what} is given"), format!("put {what} behind the command"))),
    }
}

fn top_k(text: &str) -> std::result::Result<usize, String> {
    match Kind::Whole.parse(text)? {
        Value::Null => Ok(0),
        number => number.as_u64().and_then(|k| usize::try_from(k).ok()).ok_or_else(|| "expected 0 or more".into()),
    }
}

fn lookup(text: &str) -> std::result::Result<usize, String> {
    let inside = |n: &usize| *n <= PROMPT_LOOKUP;
    text.parse().ok().filter(inside).ok_or_else(|| format!("expected a number from 0 to {PROMPT_LOOKUP}"))
}

fn temperature(text: &str) -> std::result::Result<f64, String> {
    text.parse().ok().filter(|t: &f64| t.is_finite() && *t >= 0.0).ok_or_else(|| "expected 0 or more".into())
}

fn top_p(text: &str) -> std::result::Result<f64, String> {
    let inside = |p: &f64| (0.0..=1.0).contains(p);
    text.parse().ok().filter(inside).ok_or_else(|| "expected a number from 0 to 1".into())
}

/// How the next token is drawn.
#[derive(Args, Clone, Debug)]
#[command(rename_all = "snake_case", next_help_heading = "Sampling")]
#[group(skip)]
pub struct SamplingArgs {
    /// Most tokens in an answer
    #[arg(long, value_name = "N", default_value_t = 50, overrides_with = "max_new_tokens")]
    pub max_new_tokens: usize,
    /// Draw among the N likeliest tokens; 0 or null: among all
    #[arg(long, value_name = "N", default_value = "50", value_parser = top_k, overrides_with = "top_k")]
    pub top_k: usize,
    /// Draw among the likeliest tokens that together have this probability
    #[arg(long, value_name = "P", default_value = "1.0", value_parser = top_p, overrides_with = "top_p")]
    pub top_p: f64,
    /// Flatten (above 1) or sharpen (below 1) the probabilities; 0: always the likeliest token
    #[arg(long, value_name = "T", default_value = "0.8", allow_negative_numbers = true, value_parser = temperature, overrides_with = "temperature")]
    pub temperature: f64,
    /// Seed of the draws
    #[arg(long, value_name = "N", default_value_t = 1234, overrides_with = "seed")]
    pub seed: u64,
    /// Most tokens guessed at a time from what the text said before, 0 to 7; the answer is the same, but for rounding
    #[arg(long, value_name = "N", default_value_t = PROMPT_LOOKUP, value_parser = lookup, overrides_with = "prompt_lookup_num_tokens")]
    pub prompt_lookup_num_tokens: usize,
}

/// How the model is held in memory.
#[derive(Args, Clone, Debug)]
#[command(rename_all = "snake_case", next_help_heading = "Model")]
#[group(skip)]
pub struct LoadArgs {
    /// Weights of the blocks in few bits: nf4, nf4-dq, fp4, fp4-dq or int8 [default: as an adapter was trained]
    #[arg(long, value_name = "NAME", value_parser = quantizer, overrides_with = "quantize")]
    pub quantize: Option<String>,
    /// 32-true, bf16-true or 16-true [default: 32-true, on a GPU bf16-true]
    #[arg(long, value_name = "NAME", overrides_with = "precision")]
    pub precision: Option<Precision>,
    /// Where to compute: auto (a GPU if there is one), cpu, cuda
    #[arg(long, value_name = "NAME", default_value = "auto", overrides_with = "accelerator")]
    pub accelerator: Accelerator,
    /// Accepted for LitGPT's sake and not needed: there is nothing to compile
    #[arg(long, hide = true, value_parser = boolean_arg(), action = ArgAction::Set)]
    #[arg(num_args = 0..=1, require_equals = true, default_missing_value = "true", default_value = "false")]
    pub compile: bool,
    /// Prompt style instead of the checkpoint's, e.g. alpaca, llama3
    #[arg(long, value_name = "NAME", overrides_with = "prompt_style")]
    pub prompt_style: Option<String>,
}

impl LoadArgs {
    /// A line for each flag that is accepted but does nothing.
    #[must_use]
    pub fn notes(&self) -> Vec<&'static str> {
        self.compile.then_some("--compile is ignored: there is nothing to compile").into_iter().collect()
    }
}

/// Clap's parser for a boolean with or without a value.
fn boolean_arg() -> impl TypedValueParser<Value = bool> {
    |text: &str| boolean(text)
}

/// Arguments of `litgpt generate`.
#[derive(Args, Clone, Debug)]
#[command(
    rename_all = "snake_case",
    after_help = "Example:\n  litgpt generate microsoft/phi-2 --prompt \"What do llamas eat?\" --max_new_tokens 100"
)]
pub struct GenerateArgs {
    /// The model or adapter.
    #[command(flatten)]
    pub model: ModelArg,
    /// What the model is asked
    #[arg(
        long,
        value_name = "TEXT",
        default_value = "What food do llamas eat?",
        allow_hyphen_values = true,
        overrides_with = "prompt"
    )]
    pub prompt: String,
    /// System prompt, for prompt styles that have one
    #[arg(long, value_name = "TEXT", allow_hyphen_values = true, overrides_with = "sys_prompt")]
    pub sys_prompt: Option<String>,
    /// Answers to draw
    #[arg(long, value_name = "N", default_value_t = 1, overrides_with = "num_samples")]
    pub num_samples: usize,
    /// Print tokens as they come
    #[arg(long, value_name = "BOOL", value_parser = boolean_arg(), action = ArgAction::Set)]
    #[arg(num_args = 0..=1, require_equals = true, default_missing_value = "true", default_value = "true")]
    pub stream: bool,
    /// How tokens are drawn.
    #[command(flatten)]
    pub sampling: SamplingArgs,
    /// How the model is held.
    #[command(flatten)]
    pub load: LoadArgs,
}

/// Arguments of `litgpt chat`.
#[derive(Args, Clone, Debug)]
#[command(rename_all = "snake_case", after_help = "Example:\n  litgpt chat out/phi-2/final --temperature 0.5")]
pub struct ChatArgs {
    /// The model or adapter.
    #[command(flatten)]
    pub model: ModelArg,
    /// System prompt, for prompt styles that have one
    #[arg(long, value_name = "TEXT", allow_hyphen_values = true, overrides_with = "sys_prompt")]
    pub sys_prompt: Option<String>,
    /// Read prompts of several lines, up to a line `!submit`
    #[arg(long, value_name = "BOOL", value_parser = boolean_arg(), action = ArgAction::Set)]
    #[arg(num_args = 0..=1, require_equals = true, default_missing_value = "true", default_value = "false")]
    pub multiline: bool,
    /// How tokens are drawn.
    #[command(flatten)]
    pub sampling: SamplingArgs,
    /// How the model is held.
    #[command(flatten)]
    pub load: LoadArgs,
    /// Hugging Face token, if the model has to be downloaded
    #[arg(long, value_name = "TOKEN", env = "HF_TOKEN", hide_env_values = true)]
    pub access_token: Option<String>,
}

/// File format of a merged model.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum MergeFormat {
    /// Hugging Face folder with safetensors
    #[default]
    Hf,
    /// One GGUF file, as llama.cpp runs it
    Gguf,
    /// LitGPT's lit_model.pth
    Litgpt,
}

/// Elements of a GGUF file's matrices.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
#[value(rename_all = "snake_case")]
pub enum GgufType {
    /// 16 bit
    #[default]
    F16,
    /// 8.5 bit: blocks of 32 with a scale
    #[value(name = "q8_0")]
    Q8,
    /// 4.5 bit; embedding and head in 8.5
    #[value(name = "q4_0")]
    Q4,
}

/// Arguments of `litgpt merge_lora`.
#[derive(Args, Clone, Debug)]
#[command(
    rename_all = "snake_case",
    after_help = "Examples:
  litgpt merge_lora out/phi-2/final --out_dir merged
  litgpt merge_lora out/phi-2/final --format gguf --gguf_type q8_0"
)]
pub struct MergeArgs {
    /// The adapter.
    #[command(flatten)]
    pub model: ModelArg,
    /// Where the merged model is written [default: CHECKPOINT_DIR/merged]
    #[arg(long, value_name = "DIR")]
    pub out_dir: Option<PathBuf>,
    /// Folder of the base model [default: the one that the adapter was trained on]
    #[arg(long, value_name = "DIR")]
    pub pretrained_checkpoint_dir: Option<PathBuf>,
    /// 32-true, bf16-true or 16-true [default: the training's; the base model's if that was quantized]
    #[arg(long, value_name = "NAME")]
    pub precision: Option<Precision>,
    /// What is written: hf, a Hugging Face folder; gguf, one file for llama.cpp; litgpt, LitGPT's lit_model.pth
    #[arg(long, value_enum, default_value_t, hide_possible_values = true)]
    pub format: MergeFormat,
    /// Elements of a GGUF file's matrices: f16, q8_0 (8.5 bit) or q4_0 (4.5 bit) [default: f16]
    #[arg(long = "gguf_type", value_enum, value_name = "NAME", hide_possible_values = true)]
    pub gguf_type: Option<GgufType>,
}

/// Arguments of `litgpt download`.
#[derive(Args, Clone, Debug)]
#[command(
    rename_all = "snake_case",
    after_help = "Examples:\n  litgpt download list\n  litgpt download microsoft/phi-2"
)]
pub struct DownloadArgs {
    /// Repository on the Hub, e.g. microsoft/phi-2; `list` or nothing: names to choose from
    #[arg(value_name = "REPO_ID")]
    pub repo: Option<String>,
    /// The same as a flag
    #[arg(long = "repo_id", value_name = "REPO_ID", hide = true)]
    pub repo_flag: Option<String>,
    /// Hugging Face token, for models that ask for consent
    #[arg(long, value_name = "TOKEN", env = "HF_TOKEN", hide_env_values = true)]
    pub access_token: Option<String>,
    /// Only the tokenizer's files
    #[arg(long, value_name = "BOOL", value_parser = boolean_arg(), action = ArgAction::Set)]
    #[arg(num_args = 0..=1, require_equals = true, default_missing_value = "true", default_value = "false")]
    pub tokenizer_only: bool,
    /// Folder in which the model's folder is made
    #[arg(long, value_name = "DIR", default_value = "checkpoints")]
    pub checkpoint_dir: PathBuf,
    /// Branch, tag or commit
    #[arg(long, value_name = "NAME")]
    pub revision: Option<String>,
    /// Accepted for LitGPT's sake and not needed: checkpoints are read as they are
    #[arg(long, hide = true, value_parser = boolean_arg(), action = ArgAction::Set)]
    #[arg(num_args = 0..=1, require_equals = true, default_missing_value = "true", default_value = "false")]
    pub convert_checkpoint: bool,
    /// Accepted for LitGPT's sake and not needed: checkpoints are kept as they are
    #[arg(long, hide = true)]
    pub dtype: Option<String>,
    /// Accepted for LitGPT's sake and not needed: config.json says what the model is
    #[arg(long, hide = true)]
    pub model_name: Option<String>,
}

impl DownloadArgs {
    /// The repository; `None`: list the names to choose from.
    ///
    /// # Errors
    /// Two that differ are given.
    pub fn repo_id(&self) -> Result<Option<&str>> {
        match (self.repo.as_deref(), self.repo_flag.as_deref()) {
            (Some(word), Some(flag)) if word != flag => Err(Error::usage(
                format!("two repositories are given: `{word}` and `--repo_id {flag}`"),
                "give one of them",
            )),
            (Some("list"), _) | (None, Some("list") | None) => Ok(None),
            (Some(repo), _) | (None, Some(repo)) => Ok(Some(repo)),
        }
    }

    /// A line for each flag that is accepted but does nothing.
    #[must_use]
    pub fn notes(&self) -> Vec<&'static str> {
        let dtype = self.dtype.is_some();
        let name = self.model_name.is_some();
        [
            (self.convert_checkpoint, "--convert_checkpoint is ignored: checkpoints are read as they are"),
            (dtype, "--dtype is ignored: checkpoints are kept as they are, choose with --precision when loading"),
            (name, "--model_name is ignored: config.json says what the model is"),
        ]
        .into_iter()
        .filter_map(|(given, note)| given.then_some(note))
        .collect()
    }
}

/// Arguments of `litgpt convert_to_litgpt`.
#[derive(Args, Clone, Debug)]
#[command(rename_all = "snake_case", after_help = "Example:\n  litgpt convert_to_litgpt checkpoints/microsoft/phi-2")]
pub struct ConvertToArgs {
    /// The Hugging Face folder.
    #[command(flatten)]
    pub model: ModelArg,
    /// LitGPT's name of the model, for model_config.yaml [default: the folder's name]
    #[arg(long, value_name = "NAME")]
    pub model_name: Option<String>,
    /// float32, bfloat16 or float16 [default: the checkpoint's]
    #[arg(long, value_name = "NAME")]
    pub dtype: Option<String>,
    /// Accepted for LitGPT's sake and not needed
    #[arg(long, hide = true, value_parser = boolean_arg(), action = ArgAction::Set)]
    #[arg(num_args = 0..=1, require_equals = true, default_missing_value = "true", default_value = "false")]
    pub debug_mode: bool,
}

/// Arguments of `litgpt convert_from_litgpt`.
#[derive(Args, Clone, Debug)]
#[command(rename_all = "snake_case", after_help = "Example:\n  litgpt convert_from_litgpt out/phi-2/final phi-2-hf")]
pub struct ConvertFromArgs {
    /// Folder with LitGPT's files, and the folder to write
    #[arg(value_names = ["CHECKPOINT_DIR", "OUTPUT_DIR"], num_args = 0..=2)]
    pub folders: Vec<PathBuf>,
    /// The first folder as a flag
    #[arg(long, value_name = "DIR", hide = true)]
    pub checkpoint_dir: Option<PathBuf>,
    /// The second folder as a flag
    #[arg(long, value_name = "DIR", hide = true)]
    pub output_dir: Option<PathBuf>,
}

impl ConvertFromArgs {
    /// The checkpoint's folder, with the shorthand of [`checkpoint_dir`], and the folder to write.
    ///
    /// # Errors
    /// One is missing, or given twice.
    pub fn paths(&self) -> Result<(PathBuf, PathBuf)> {
        let mut words = self.folders.iter();
        let from = self.checkpoint_dir.as_ref().or_else(|| words.next());
        let to = self.output_dir.as_ref().or_else(|| words.next());
        let usage = "litgpt convert_from_litgpt CHECKPOINT_DIR OUTPUT_DIR";
        match (from, to, words.next()) {
            (Some(from), Some(to), None) => Ok((checkpoint_dir(from), to.clone())),
            (_, _, Some(extra)) => Err(Error::usage(format!("one folder too many: `{}`", extra.display()), usage)),
            (None, ..) => Err(Error::usage("no CHECKPOINT_DIR is given", usage)),
            (_, None, _) => Err(Error::usage("no OUTPUT_DIR is given", usage)),
        }
    }
}

/// Arguments of `litgpt quantize`.
#[derive(Args, Clone, Debug)]
#[command(
    rename_all = "snake_case",
    after_help = "Examples:
  litgpt quantize checkpoints/meta-llama/Llama-3.2-1B
  litgpt quantize --checkpoint_dir checkpoints/meta-llama/Llama-3.2-1B --quantize int8 --out_dir small"
)]
pub struct QuantizeArgs {
    /// The model.
    #[command(flatten)]
    pub model: ModelArg,
    /// nf4, nf4-dq, fp4, fp4-dq or int8
    #[arg(long, value_name = "NAME", default_value = "nf4", value_parser = quantizer, overrides_with = "quantize")]
    pub quantize: String,
    /// Folder to write [default: beside the model, with the quantizer's name behind its own]
    #[arg(long, value_name = "DIR", overrides_with = "out_dir")]
    pub out_dir: Option<PathBuf>,
}

/// Arguments of `litgpt validate`.
#[derive(Args, Clone, Debug)]
#[command(rename_all = "snake_case", after_help = "Example:\n  litgpt validate checkpoints/microsoft/phi-2")]
pub struct ValidateArgs {
    /// The model.
    #[command(flatten)]
    pub model: ModelArg,
    /// Name of the weight file [default: whichever is there]
    #[arg(long, value_name = "FILE")]
    pub model_filename: Option<String>,
    /// Count the memory for one number format only: float32, bfloat16, float16, int8 or nf4 [default: all of them]
    #[arg(long, value_name = "NAME")]
    pub dtype: Option<String>,
    /// Accepted for LitGPT's sake: the memory of training is counted in any case
    #[arg(long, hide = true, value_parser = boolean_arg(), action = ArgAction::Set)]
    #[arg(num_args = 0..=1, require_equals = true, default_missing_value = "true", default_value = "false")]
    pub training: bool,
}

/// Arguments of `litgpt completions`.
#[derive(Args, Clone, Debug)]
#[command(after_help = "Examples:
  litgpt completions bash > ~/.local/share/bash-completion/completions/litgpt
  litgpt completions zsh > ~/.zfunc/_litgpt
  litgpt completions fish > ~/.config/fish/completions/litgpt.fish")]
pub struct CompletionsArgs {
    /// Shell that reads the script
    #[arg(value_name = "SHELL")]
    pub shell: clap_complete::Shell,
}

/// Arguments of `litgpt man`.
#[derive(Args, Clone, Debug)]
#[command(after_help = "Examples:
  litgpt man > litgpt.1
  litgpt man finetune_lora | man -l -")]
pub struct ManArgs {
    /// Command whose page is printed [default: litgpt itself]
    #[arg(value_name = "COMMAND")]
    pub command: Option<String>,
}

/// Parses the arguments of one command: rewrites historic spellings and lets clap read the rest. `argv` starts with the
/// program's name, as the shell gives it. For tests and tools; `main` parses all commands at once.
///
/// # Errors
/// A wrong command line; `--help` and `--version`, which are no arguments.
pub fn parse<A: Args>(argv: &[String]) -> Result<A> {
    let argv = super::compat::rewrite(argv.iter().map(OsString::from).collect())?;
    let command = A::augment_args(Command::new("litgpt").disable_version_flag(true));
    let read = command.try_get_matches_from(argv.iter().skip(1)).and_then(|found| A::from_arg_matches(&found));
    let name = argv.get(1).and_then(|word| word.to_str());
    read.map_err(|error| {
        usage::error(&error, name).unwrap_or_else(|| Error::usage(error.to_string(), "ask for one run, not for help"))
    })
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn command<A: Args>() -> Command {
        A::augment_args(Command::new("test"))
    }

    #[test]
    fn every_command_is_consistent() {
        command::<FinetuneArgs>().debug_assert();
        command::<GenerateArgs>().debug_assert();
        command::<ChatArgs>().debug_assert();
        command::<MergeArgs>().debug_assert();
        command::<DownloadArgs>().debug_assert();
        command::<ConvertToArgs>().debug_assert();
        command::<ConvertFromArgs>().debug_assert();
        command::<QuantizeArgs>().debug_assert();
        command::<ValidateArgs>().debug_assert();
    }

    /// Dotted paths of the leaves of a tree.
    fn leaves(prefix: &str, value: &Value, found: &mut Vec<String>) {
        match value {
            Value::Object(map) => {
                for (key, value) in map {
                    leaves(&format!("{prefix}.{key}"), value, found);
                }
            }
            _ => found.push(prefix.trim_start_matches('.').to_owned()),
        }
    }

    #[test]
    fn every_setting_has_a_flag_and_every_flag_a_setting() {
        let mut settings = vec![
            "access_token".to_owned(),
            "optimizer.name".into(),
            "optimizer.betas".into(),
            "resume".into(),
            "resume_force".into(),
            "accelerator".into(),
            "dry_run".into(),
        ];
        leaves("", &serde_json::to_value(FinetuneSettings::default()).unwrap(), &mut settings);
        let mut flags: Vec<_> =
            FLAGS.iter().filter(|flag| flag.kind != Kind::Group).map(|flag| flag.key.to_owned()).collect();
        settings.sort();
        flags.sort();
        assert_eq!(settings, flags);
    }

    #[test]
    fn no_name_means_two_flags() {
        let mut names: Vec<_> = FLAGS
            .iter()
            .flat_map(|flag| flag.names.iter().chain((!flag.names.contains(&flag.key)).then_some(&flag.key)))
            .collect();
        names.sort();
        let all = names.len();
        names.dedup();
        assert_eq!(all, names.len());
    }

    #[test]
    fn help_shows_defaults() {
        let help = command::<FinetuneArgs>().term_width(300).render_long_help().to_string();
        for part in
            ["--train.max_steps <N>", "[default: 0.0002]", "[default: out/finetune/lora]", "--lora_key[=<BOOL>]"]
        {
            assert!(help.contains(part), "{part} in {help}");
        }
    }

    #[derive(clap::Parser)]
    struct Program {
        #[command(subcommand)]
        command: Commands,
    }

    #[derive(clap::Subcommand)]
    #[command(rename_all = "snake_case")]
    enum Commands {
        /// Train adapters
        FinetuneLora(FinetuneArgs),
    }

    #[test]
    fn finetune_args_serve_as_a_subcommand() {
        use clap::Parser as _;
        let read = Program::try_parse_from(["litgpt", "finetune_lora", "m", "--lr", "1", "--lr", "2", "--lora_key"]);
        let Commands::FinetuneLora(args) = read.unwrap().command;
        let keys: Vec<_> = args.given.iter().map(|(key, value)| format!("{key}={value}")).collect();
        assert_eq!(keys, ["checkpoint_dir=\"m\"", "lora_key=true", "optimizer.learning_rate=2.0"]);
    }

    #[test]
    fn a_name_behind_checkpoints_is_found() {
        let root = tempfile::tempdir().unwrap();
        std::fs::create_dir_all(root.path().join("checkpoints/org/model")).unwrap();
        let found = |path: &str| checkpoint_dir_in(root.path(), Path::new(path));
        assert_eq!(found("org/model"), Path::new("checkpoints/org/model"));
        assert_eq!(found("checkpoints/org/model"), Path::new("checkpoints/org/model"));
        assert_eq!(found("org/other"), Path::new("org/other"));
        assert_eq!(found("/org/model"), Path::new("/org/model"));
        std::fs::create_dir_all(root.path().join("org/model")).unwrap();
        assert_eq!(found("org/model"), Path::new("org/model"));
    }
}
