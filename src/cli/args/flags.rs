//! The settings of finetuning as flags: some sixty that are at the same time the keys of a YAML recipe, so they are rows of one
//! table ([`FLAGS`]): key, further spellings, kind of value, help. Defaults come from `train::settings`.

use clap::Arg;
use serde_json::Value;

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
    pub(super) fn arg(&self, defaults: &Value) -> Arg {
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
        "Frozen weights of the blocks in few bits: nf4, nf4-dq, nf4-mixed, fp4, fp4-dq or int8, with or without bnb. in front"),
    row("calibration_samples", Whole, MODEL,
        "Choose the 4-bit codes by N training samples (GPTQ), which loses a fraction of what the nearest codes lose: the run \
         trains on a quantized copy in OUT_DIR, which it makes first"),
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
