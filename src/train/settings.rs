//! The settings of a finetuning run, resolved: plain data, their defaults, and the rules that they must keep.
//!
//! The names are LitGPT's, with dotted keys (`train.max_steps`) on the command line and in YAML alike. Here live the
//! types and `FinetuneSettings::validate`; reading files and flags is `cli::recipe`. Where a default differs from
//! LitGPT's, the field says so.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

use serde::de::{Deserializer, Error as _};
use serde::{Deserialize, Serialize, Serializer};
use serde_json::Value;

use crate::data::wrong_fraction;
use crate::error::{Error, Result, closest};

/// Number format of weights and activations; adapters and optimizer state are f32 in all of them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Precision {
    /// `32-true`: weights and activations in f32.
    F32True,
    /// `bf16-true`: weights and activations in bf16.
    Bf16True,
    /// `bf16-mixed`: weights in f32, activations in bf16.
    Bf16Mixed,
    /// `16-true`: weights and activations in f16.
    F16True,
    /// `16-mixed`: weights in f32, activations in f16.
    F16Mixed,
}

impl Precision {
    /// Every precision, in the order in which messages list them.
    pub const ALL: [Self; 5] = [Self::F32True, Self::Bf16True, Self::Bf16Mixed, Self::F16True, Self::F16Mixed];

    /// LitGPT's name of it, as flags and YAML spell it.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::F32True => "32-true",
            Self::Bf16True => "bf16-true",
            Self::Bf16Mixed => "bf16-mixed",
            Self::F16True => "16-true",
            Self::F16Mixed => "16-mixed",
        }
    }
}

impl fmt::Display for Precision {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for Precision {
    type Err = String;

    fn from_str(text: &str) -> std::result::Result<Self, String> {
        // Lightning reads the bare numbers as these, too.
        let name = match text {
            "32" => "32-true",
            "16" => "16-mixed",
            "bf16" => "bf16-mixed",
            other => other,
        };
        Self::ALL.into_iter().find(|precision| precision.name() == name).ok_or_else(|| {
            let names = Self::ALL.map(Self::name).join(", ");
            format!("unknown precision `{text}`, expected one of {names}")
        })
    }
}

impl Serialize for Precision {
    fn serialize<S: Serializer>(&self, serializer: S) -> std::result::Result<S::Ok, S::Error> {
        serializer.serialize_str(self.name())
    }
}

impl<'de> Deserialize<'de> for Precision {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(D::Error::custom)
    }
}

/// The ways to quantize frozen weights, without LitGPT's `bnb.` in front.
pub const QUANTIZERS: [&str; 6] = ["nf4", "nf4-dq", "fp4", "fp4-dq", "int8", "int8-training"];

/// The name of a quantizer without `bnb.` in front.
///
/// # Errors
/// A name that is not in [`QUANTIZERS`].
pub fn quantizer(text: &str) -> std::result::Result<String, String> {
    let name = text.strip_prefix("bnb.").unwrap_or(text);
    match QUANTIZERS.contains(&name) {
        true => Ok(name.to_owned()),
        false => Err(format!("unknown quantizer `{text}`, expected one of {}", QUANTIZERS.join(", "))),
    }
}

/// Yes, no, or what the program thinks best; `auto`, `true`, `false` in YAML.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Switch {
    /// Decided by the program.
    #[default]
    Auto,
    /// Always.
    On,
    /// Never.
    Off,
}

impl Serialize for Switch {
    fn serialize<S: Serializer>(&self, serializer: S) -> std::result::Result<S::Ok, S::Error> {
        match self {
            Self::Auto => serializer.serialize_str("auto"),
            Self::On => serializer.serialize_bool(true),
            Self::Off => serializer.serialize_bool(false),
        }
    }
}

impl<'de> Deserialize<'de> for Switch {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Self, D::Error> {
        let value = Value::deserialize(deserializer)?;
        match word(&value).to_ascii_lowercase().as_str() {
            "auto" => Ok(Self::Auto),
            "on" | "true" | "yes" => Ok(Self::On),
            "off" | "false" | "no" => Ok(Self::Off),
            other => Err(D::Error::custom(format!("expected `auto`, `on` or `off`, got `{other}`"))),
        }
    }
}

/// Where a model is computed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Accelerator {
    /// On the first GPU if this program was built for one and there is one.
    #[default]
    Auto,
    /// On the processor.
    Cpu,
    /// On the first NVIDIA GPU.
    #[serde(alias = "gpu")]
    Cuda,
}

impl FromStr for Accelerator {
    type Err = String;

    fn from_str(text: &str) -> std::result::Result<Self, String> {
        match text {
            "auto" => Ok(Self::Auto),
            "cpu" => Ok(Self::Cpu),
            "cuda" | "gpu" => Ok(Self::Cuda),
            other => Err(format!("expected `auto`, `cpu` or `cuda`, got `{other}`")),
        }
    }
}

/// How the learning rate goes over a run, after the warm-up.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LrSchedule {
    /// Along a cosine to `min_lr`.
    #[default]
    Cosine,
    /// Along a straight line to `min_lr`.
    Linear,
    /// Not at all.
    Constant,
    /// As LitGPT does: the warm-up begins at 0, and the cosine ends there.
    Litgpt,
}

/// Which validation sample the model answers during an evaluation.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum EvaluateExample {
    /// The first one.
    #[default]
    First,
    /// Another one each time.
    Random,
    /// The one with this index, counted from 0.
    Index(usize),
}

impl Serialize for EvaluateExample {
    fn serialize<S: Serializer>(&self, serializer: S) -> std::result::Result<S::Ok, S::Error> {
        match self {
            Self::First => serializer.serialize_str("first"),
            Self::Random => serializer.serialize_str("random"),
            Self::Index(index) => serializer.serialize_u64(*index as u64),
        }
    }
}

impl<'de> Deserialize<'de> for EvaluateExample {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Self, D::Error> {
        let value = Value::deserialize(deserializer)?;
        match word(&value).as_str() {
            "first" => Ok(Self::First),
            "random" => Ok(Self::Random),
            index => index
                .parse()
                .map(Self::Index)
                .map_err(|_| D::Error::custom(format!("expected `first`, `random` or an index, got `{index}`"))),
        }
    }
}

/// Size and targets of the adapters: `y = x Wᵀ + (alpha / r) · dropout(x) Aᵀ Bᵀ`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct LoraSettings {
    /// Rank of the update.
    pub lora_r: usize,
    /// Numerator of the scale alpha / r.
    pub lora_alpha: f64,
    /// Share of the adapter's input that is dropped in training.
    pub lora_dropout: f64,
    /// Adapters on the query projection.
    pub lora_query: bool,
    /// Adapters on the key projection.
    pub lora_key: bool,
    /// Adapters on the value projection.
    pub lora_value: bool,
    /// Adapters on the output projection of attention.
    pub lora_projection: bool,
    /// Adapters on the matrices of the MLP.
    pub lora_mlp: bool,
    /// An adapter on the LM head.
    pub lora_head: bool,
}

impl Default for LoraSettings {
    fn default() -> Self {
        Self {
            lora_r: 8,
            lora_alpha: 16.0,
            lora_dropout: 0.05,
            lora_query: true,
            lora_key: false,
            lora_value: true,
            lora_projection: false,
            lora_mlp: false,
            lora_head: false,
        }
    }
}

/// Highest rank: no published model has a wider matrix.
const MOST_RANKS: usize = 65_536;

impl LoraSettings {
    fn problems(&self) -> Vec<String> {
        let targets =
            [self.lora_query, self.lora_key, self.lora_value, self.lora_projection, self.lora_mlp, self.lora_head];
        let mut found = Vec::new();
        check(&mut found, self.lora_r > 0, || "`lora_r` must be at least 1, got 0".into());
        check(&mut found, self.lora_r <= MOST_RANKS, || {
            format!("`lora_r` must be at most {MOST_RANKS}, got {}", self.lora_r)
        });
        positive(&mut found, "lora_alpha", self.lora_alpha);
        below_one(&mut found, "lora_dropout", self.lora_dropout);
        check(&mut found, targets.contains(&true), || {
            "nothing would be trained: set one of `lora_query`, `lora_key`, `lora_value`, `lora_projection`, \
             `lora_mlp`, `lora_head`"
                .into()
        });
        found
    }
}

/// Length, batches and bookkeeping of the training loop. A step is one update of the weights.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct TrainSettings {
    /// Steps between two saved checkpoints; `None`: only at the end.
    pub save_interval: Option<usize>,
    /// Most step folders that are kept; `None`: all. Not in LitGPT.
    pub save_total_limit: Option<usize>,
    /// Steps in a row without a finite loss and gradient after which the run gives up; not in LitGPT.
    pub max_skipped_steps: usize,
    /// Micro batches between two log lines.
    pub log_interval: usize,
    /// Samples in one step.
    pub global_batch_size: usize,
    /// Samples that go through the model at once.
    pub micro_batch_size: usize,
    /// Steps over which the learning rate rises.
    pub lr_warmup_steps: Option<usize>,
    /// The same, as a share of the run; LitGPT refuses it in finetuning.
    pub lr_warmup_fraction: Option<f64>,
    /// Times that the data is seen.
    pub epochs: Option<usize>,
    /// Stop after this many tokens; LitGPT refuses it in finetuning.
    pub max_tokens: Option<u64>,
    /// Stop after this many steps.
    pub max_steps: Option<usize>,
    /// Stop after this many seconds.
    pub max_time: Option<f64>,
    /// Cut samples to this many tokens.
    pub max_seq_length: Option<usize>,
    /// Only `None` is accepted: the checkpoint says whether embeddings are tied.
    pub tie_embeddings: Option<bool>,
    /// Clip the gradient to this norm; LitGPT refuses it in finetuning.
    pub max_norm: Option<f64>,
    /// Where the cosine ends, at most the learning rate itself; LitGPT ignores it.
    pub min_lr: f64,
    /// How the learning rate goes after the warm-up.
    pub lr_schedule: LrSchedule,
    /// Keep only each block's input and compute the rest again in the backward pass; not in LitGPT.
    pub activation_checkpointing: Switch,
    /// Compute the tokens that samples of a step begin with only once; not in LitGPT.
    pub prefix_sharing: Switch,
}

impl Default for TrainSettings {
    fn default() -> Self {
        Self {
            save_interval: Some(1000),
            save_total_limit: None,
            max_skipped_steps: 5,
            log_interval: 1,
            global_batch_size: 16,
            micro_batch_size: 1,
            lr_warmup_steps: Some(100),
            lr_warmup_fraction: None,
            epochs: Some(5),
            max_tokens: None,
            max_steps: None,
            max_time: None,
            max_seq_length: None,
            tie_embeddings: None,
            max_norm: None,
            min_lr: 6e-5,
            lr_schedule: LrSchedule::default(),
            activation_checkpointing: Switch::Auto,
            prefix_sharing: Switch::Auto,
        }
    }
}

impl TrainSettings {
    fn problems(&self) -> Vec<String> {
        let (global, micro) = (self.global_batch_size, self.micro_batch_size);
        let mut found = Vec::new();
        nonzero(&mut found, "train.save_interval", self.save_interval);
        nonzero(&mut found, "train.save_total_limit", self.save_total_limit);
        nonzero(&mut found, "train.max_skipped_steps", Some(self.max_skipped_steps));
        nonzero(&mut found, "train.log_interval", Some(self.log_interval));
        nonzero(&mut found, "train.global_batch_size", Some(global));
        nonzero(&mut found, "train.micro_batch_size", Some(micro));
        check(&mut found, micro == 0 || global.is_multiple_of(micro), || {
            format!("`train.global_batch_size` ({global}) must be a multiple of `train.micro_batch_size` ({micro})")
        });
        nonzero(&mut found, "train.epochs", self.epochs);
        nonzero(&mut found, "train.max_steps", self.max_steps);
        nonzero(&mut found, "train.max_seq_length", self.max_seq_length);
        check(&mut found, self.max_tokens != Some(0), || "`train.max_tokens` must be at least 1, got 0".into());
        for (key, value) in [("train.max_time", self.max_time), ("train.max_norm", self.max_norm)] {
            if let Some(value) = value {
                positive(&mut found, key, value);
            }
        }
        let ends =
            self.epochs.is_some() || self.max_steps.is_some() || self.max_tokens.is_some() || self.max_time.is_some();
        check(&mut found, ends, || {
            "nothing ends the run: set `train.epochs`, `train.max_steps`, `train.max_tokens` or `train.max_time`".into()
        });
        check(&mut found, self.lr_warmup_steps.is_none() || self.lr_warmup_fraction.is_none(), || {
            "`train.lr_warmup_steps` and `train.lr_warmup_fraction` exclude each other, choose one".into()
        });
        if let Some(fraction) = self.lr_warmup_fraction {
            check(&mut found, (0.0..=1.0).contains(&fraction), || {
                format!("`train.lr_warmup_fraction` must lie between 0 and 1, got {fraction}")
            });
        }
        not_negative(&mut found, "train.min_lr", self.min_lr);
        check(&mut found, self.tie_embeddings.is_none(), || {
            "`train.tie_embeddings` cannot be set, the checkpoint decides it: leave it out or null".into()
        });
        found
    }
}

/// When and on how much the model is evaluated.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct EvalSettings {
    /// Steps between two evaluations.
    pub interval: usize,
    /// Length of the sample text; `None`: no sample text.
    pub max_new_tokens: Option<usize>,
    /// Micro batches in one evaluation, at most; the one before the first step and the final one have all.
    pub max_iters: usize,
    /// Evaluate before the first step, on all samples.
    pub initial_validation: bool,
    /// Evaluate after the last step, on all samples.
    pub final_validation: bool,
    /// Which sample the model answers.
    pub evaluate_example: EvaluateExample,
    /// Stop after so many evaluations without a lower loss; `None`: do not. Not in LitGPT.
    pub early_stopping_patience: Option<usize>,
}

impl Default for EvalSettings {
    fn default() -> Self {
        Self {
            interval: 100,
            max_new_tokens: Some(100),
            max_iters: 100,
            initial_validation: false,
            final_validation: true,
            evaluate_example: EvaluateExample::First,
            early_stopping_patience: None,
        }
    }
}

impl EvalSettings {
    fn problems(&self) -> Vec<String> {
        let mut found = Vec::new();
        nonzero(&mut found, "eval.interval", Some(self.interval));
        nonzero(&mut found, "eval.max_iters", Some(self.max_iters));
        nonzero(&mut found, "eval.early_stopping_patience", self.early_stopping_patience);
        found
    }
}

/// AdamW (Loshchilov and Hutter 2017, arXiv:1711.05101). Defaults are PyTorch's but for the learning rate.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct OptimizerSettings {
    /// Highest learning rate of the schedule; LitGPT: 1e-3.
    pub learning_rate: f64,
    /// Decoupled weight decay.
    pub weight_decay: f64,
    /// Decay of the first moment.
    pub beta1: f64,
    /// Decay of the second moment.
    pub beta2: f64,
    /// Added to the denominator.
    pub eps: f64,
}

impl Default for OptimizerSettings {
    fn default() -> Self {
        Self { learning_rate: 2e-4, weight_decay: 0.01, beta1: 0.9, beta2: 0.999, eps: 1e-8 }
    }
}

impl OptimizerSettings {
    fn problems(&self) -> Vec<String> {
        let mut found = Vec::new();
        positive(&mut found, "train.learning_rate", self.learning_rate);
        not_negative(&mut found, "optimizer.weight_decay", self.weight_decay);
        below_one(&mut found, "optimizer.beta1", self.beta1);
        below_one(&mut found, "optimizer.beta2", self.beta2);
        not_negative(&mut found, "optimizer.eps", self.eps);
        found
    }
}

/// A data module of LitGPT and the fields that it has besides those that all have.
#[derive(Debug)]
pub struct DataModule {
    /// LitGPT's class name.
    pub name: &'static str,
    /// Its own fields.
    pub fields: &'static [&'static str],
}

/// The data modules for finetuning. `mask_prompt`, `prompt_style`, `ignore_index`, `seed` and `num_workers` belong to
/// all of them and are not repeated.
pub const DATA_MODULES: &[DataModule] = &[
    DataModule { name: "Alpaca", fields: &["val_split_fraction", "download_dir", "file_url", "file_name"] },
    DataModule {
        name: "Alpaca2k",
        fields: &["val_split_fraction", "download_dir", "repo_id", "file_url", "file_name"],
    },
    DataModule { name: "AlpacaGPT4", fields: &["val_split_fraction", "download_dir", "file_url", "file_name"] },
    DataModule { name: "Deita", fields: &["include_multiturn_conversations", "download_dir", "repo_id"] },
    DataModule { name: "Dolly", fields: &["val_split_fraction", "download_dir", "file_url", "file_name"] },
    DataModule { name: "FLAN", fields: &["download_dir", "url", "subsets"] },
    DataModule { name: "Hub", fields: &["repo_id", "subsets", "columns", "val_split_fraction", "download_dir"] },
    DataModule { name: "JSON", fields: &["json_path", "columns", "val_split_fraction"] },
    DataModule {
        name: "LIMA",
        fields: &["val_split_fraction", "include_multiturn_conversations", "repo_id", "download_dir"],
    },
    DataModule { name: "LongForm", fields: &["download_dir"] },
];

impl DataModule {
    /// The module that `name` means: bare or with its dotted path (`litgpt.data.JSON`), in any case, `alpaca_2k` too.
    #[must_use]
    pub fn find(name: &str) -> Option<&'static Self> {
        let last = name.rsplit('.').next().unwrap_or(name).replace('_', "");
        DATA_MODULES.iter().find(|module| module.name.eq_ignore_ascii_case(&last))
    }
}

/// Which data is trained on, and how it becomes prompts. Fields of other modules than `name` are `None` or default.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct DataSettings {
    /// Name of the data module, one of [`DATA_MODULES`].
    pub name: String,
    /// JSON: a file, or a folder with a train and a val file.
    pub json_path: Option<PathBuf>,
    /// JSON, Hub: other names of the rows' keys, `instruction=question,output=answer`.
    pub columns: Option<String>,
    /// Train on the answers only; `None`: only in conversations (LitGPT knows none and says false).
    pub mask_prompt: Option<bool>,
    /// Put short samples side by side, up to `train.max_seq_length` tokens.
    pub pack: bool,
    /// Share of the samples held out for validation, 0 for none; `None`: the module's own.
    pub val_split_fraction: Option<f64>,
    /// Prompt style by key or class name; `None`: the module's own.
    pub prompt_style: Option<String>,
    /// Label of tokens that do not count in the loss.
    pub ignore_index: i32,
    /// Seed of the split and of the order of samples.
    pub seed: u64,
    /// Accepted for LitGPT's sake, without effect.
    pub num_workers: usize,
    /// Where downloaded data is kept; `None`: the module's own.
    pub download_dir: Option<PathBuf>,
    /// Deita and LIMA: also the later turns, each as a sample.
    pub include_multiturn_conversations: bool,
    /// Another dataset repository on the Hub.
    pub repo_id: Option<String>,
    /// FLAN, Hub: names of subsets with commas between.
    pub subsets: Option<String>,
    /// Another address of the file.
    pub file_url: Option<String>,
    /// Name under which the downloaded file is kept.
    pub file_name: Option<String>,
    /// FLAN: another address of the folder.
    pub url: Option<String>,
}

impl Default for DataSettings {
    fn default() -> Self {
        Self {
            name: "Alpaca".into(),
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

impl DataSettings {
    /// Names of the fields that are set although not every module has them.
    fn own_fields(&self) -> Vec<&'static str> {
        [
            ("json_path", self.json_path.is_some()),
            ("columns", self.columns.is_some()),
            ("val_split_fraction", self.val_split_fraction.is_some()),
            ("download_dir", self.download_dir.is_some()),
            ("include_multiturn_conversations", self.include_multiturn_conversations),
            ("repo_id", self.repo_id.is_some()),
            ("subsets", self.subsets.is_some()),
            ("file_url", self.file_url.is_some()),
            ("file_name", self.file_name.is_some()),
            ("url", self.url.is_some()),
        ]
        .into_iter()
        .filter_map(|(name, set)| set.then_some(name))
        .collect()
    }

    fn problems(&self) -> Vec<String> {
        let Some(module) = DataModule::find(&self.name) else {
            let names: Vec<_> = DATA_MODULES.iter().map(|module| module.name).collect();
            return vec![format!("unknown data module `{}`, expected one of {}", self.name, names.join(", "))];
        };
        let mut found = Vec::new();
        for field in self.own_fields().into_iter().filter(|field| !module.fields.contains(field)) {
            let owners: Vec<_> =
                DATA_MODULES.iter().filter(|other| other.fields.contains(&field)).map(|other| other.name).collect();
            found.push(format!("`data.{field}` is not a field of {} but of {}", module.name, owners.join(", ")));
        }
        check(&mut found, module.name != "JSON" || self.json_path.is_some(), || {
            "the data module JSON needs a file: `--data.json_path FILE`".into()
        });
        check(&mut found, module.name != "Hub" || self.repo_id.is_some(), || {
            "the data module Hub needs a repository: `--data ORGANISATION/NAME`".into()
        });
        found.extend(self.val_split_fraction.and_then(wrong_fraction));
        check(&mut found, self.ignore_index < 0, || {
            format!("`data.ignore_index` must be negative, as others are token ids, got {}", self.ignore_index)
        });
        found
    }
}

/// Everything about one finetuning run. As serde data it is the tree of dotted keys (`optimizer.learning_rate`,
/// `data.json_path`) that `cli::recipe` merges; LitGPT's own YAML shape is made there.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct FinetuneSettings {
    /// Folder of the base model.
    pub checkpoint_dir: PathBuf,
    /// Folder for adapters and logs.
    pub out_dir: PathBuf,
    /// Number format; `None`: `32-true` on the CPU, `bf16-true` on CUDA (LitGPT: `bf16-mixed`).
    pub precision: Option<Precision>,
    /// How the frozen weights are quantized, one of [`QUANTIZERS`].
    #[serde(deserialize_with = "quantize_field")]
    pub quantize: Option<String>,
    /// Where to train. Belongs to the machine: not written.
    #[serde(skip_serializing)]
    pub accelerator: Accelerator,
    /// GPUs; only 1 is accepted.
    #[serde(deserialize_with = "devices_field")]
    pub devices: usize,
    /// Machines; only 1 is accepted.
    pub num_nodes: usize,
    /// The adapters.
    #[serde(flatten)]
    pub lora: LoraSettings,
    /// The data.
    pub data: DataSettings,
    /// The loop.
    pub train: TrainSettings,
    /// Evaluation.
    pub eval: EvalSettings,
    /// The optimizer.
    pub optimizer: OptimizerSettings,
    /// Where metrics go besides `metrics.csv`: `csv`, nowhere, or `tensorboard`.
    pub logger_name: String,
    /// Seed of the adapters' start values, dropout and sample text.
    pub seed: u64,
    /// Whether prompts start with the BOS token; `Auto`: as the tokenizer's files say. Not in LitGPT.
    pub add_bos: Switch,
    /// What to go on from: `auto` (the newest in `out_dir`, if any), `true` (the newest) or a folder. Not written.
    #[serde(skip_serializing, deserialize_with = "resume_field")]
    pub resume: Option<String>,
    /// Whether to resume although settings or data changed. Not written.
    #[serde(skip_serializing)]
    pub resume_force: bool,
    /// Whether to say what the run needs and stop. Not written.
    #[serde(skip_serializing)]
    pub dry_run: bool,
    /// Hugging Face token. Never written to a file.
    #[serde(skip_serializing)]
    pub access_token: Option<String>,
}

impl Default for FinetuneSettings {
    fn default() -> Self {
        Self {
            checkpoint_dir: PathBuf::new(),
            out_dir: PathBuf::from("out/finetune/lora"),
            precision: None,
            quantize: None,
            accelerator: Accelerator::Auto,
            devices: 1,
            num_nodes: 1,
            lora: LoraSettings::default(),
            data: DataSettings::default(),
            train: TrainSettings::default(),
            eval: EvalSettings::default(),
            optimizer: OptimizerSettings::default(),
            logger_name: "csv".into(),
            seed: 1337,
            add_bos: Switch::Auto,
            resume: None,
            resume_force: false,
            dry_run: false,
            access_token: None,
        }
    }
}

/// Values of `logger_name`.
const LOGGERS: [&str; 3] = ["csv", "tensorboard", "none"];

impl FinetuneSettings {
    /// Checks every rule between and within the settings.
    ///
    /// # Errors
    /// One `Usage` with all broken rules.
    pub fn validate(&self) -> Result<()> {
        let mut problems = self.lora.problems();
        problems.extend(self.data.problems());
        problems.extend(self.train.problems());
        problems.extend(self.eval.problems());
        problems.extend(self.optimizer.problems());
        check(&mut problems, self.devices == 1, || {
            format!("`devices` must be 1, this program trains on one device, got {}", self.devices)
        });
        check(&mut problems, self.num_nodes == 1, || {
            format!("`num_nodes` must be 1, this program trains on one machine, got {}", self.num_nodes)
        });
        check(&mut problems, LOGGERS.contains(&self.logger_name.as_str()), || {
            let tip = closest(&self.logger_name, LOGGERS.into_iter()).map(|near| format!(", did you mean `{near}`?"));
            let names = LOGGERS.join(", ");
            let wandb = "; `wandb sync OUT_DIR/logs/tensorboard` takes over what tensorboard gets";
            let tip = if self.logger_name == "wandb" { wandb.to_owned() } else { tip.unwrap_or_default() };
            format!("`logger_name` must be one of {names}, got `{}`{tip}", self.logger_name)
        });
        let hint = "`litgpt finetune_lora --help` explains every setting";
        match problems.len() {
            0 => Ok(()),
            1 => Err(Error::usage(problems.remove(0), hint)),
            _ => Err(Error::usage(format!("these settings cannot run: {}", problems.join("; ")), hint)),
        }
    }
}

fn quantize_field<'de, D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Option<String>, D::Error> {
    let name = Option::<String>::deserialize(deserializer)?;
    name.map(|name| quantizer(&name)).transpose().map_err(D::Error::custom)
}

/// LitGPT takes `auto` and `-1` for all devices that there are.
fn devices_field<'de, D: Deserializer<'de>>(deserializer: D) -> std::result::Result<usize, D::Error> {
    let value = Value::deserialize(deserializer)?;
    match word(&value).as_str() {
        "auto" | "-1" => Ok(1),
        number => number.parse().map_err(|_| D::Error::custom(format!("expected a number of devices, got `{number}`"))),
    }
}

/// LitGPT takes `true` and `false`, too.
fn resume_field<'de, D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Option<String>, D::Error> {
    let value = Value::deserialize(deserializer)?;
    let asked = word(&value);
    Ok((!value.is_null() && !asked.eq_ignore_ascii_case("false")).then_some(
        match asked.to_ascii_lowercase().as_str() {
            "true" => "true".to_owned(),
            _ => asked,
        },
    ))
}

/// A scalar as one would write it.
fn word(value: &Value) -> String {
    match value {
        Value::String(text) => text.clone(),
        other => other.to_string(),
    }
}

fn check(problems: &mut Vec<String>, holds: bool, problem: impl FnOnce() -> String) {
    if !holds {
        problems.push(problem());
    }
}

fn nonzero(problems: &mut Vec<String>, key: &str, value: Option<usize>) {
    check(problems, value != Some(0), || format!("`{key}` must be at least 1, got 0"));
}

fn positive(problems: &mut Vec<String>, key: &str, value: f64) {
    check(problems, value.is_finite() && value > 0.0, || format!("`{key}` must be above 0, got {value}"));
}

fn not_negative(problems: &mut Vec<String>, key: &str, value: f64) {
    check(problems, value.is_finite() && value >= 0.0, || format!("`{key}` must be 0 or more, got {value}"));
}

fn below_one(problems: &mut Vec<String>, key: &str, value: f64) {
    check(problems, (0.0..1.0).contains(&value), || format!("`{key}` must be at least 0 and below 1, got {value}"));
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn defaults_are_valid() {
        FinetuneSettings::default().validate().unwrap();
    }

    #[test]
    fn every_problem_is_reported_at_once() {
        let mut settings = FinetuneSettings::default();
        settings.lora =
            LoraSettings { lora_r: 0, lora_dropout: 1.0, lora_query: false, lora_value: false, ..settings.lora };
        settings.train.global_batch_size = 6;
        settings.train.micro_batch_size = 4;
        settings.train.lr_warmup_fraction = Some(0.1);
        settings.train.tie_embeddings = Some(false);
        settings.optimizer.learning_rate = f64::NAN;
        settings.optimizer.beta2 = 1.0;
        settings.eval.interval = 0;
        settings.data.name = "JSON".into();
        settings.data.subsets = Some("x".into());
        settings.devices = 4;
        let Err(Error::Usage { message, .. }) = settings.validate() else { panic!("not refused") };
        let problems: Vec<&str> = message.strip_prefix("these settings cannot run: ").unwrap().split("; ").collect();
        let expected = [
            "lora_r",
            "lora_dropout",
            "nothing would be trained",
            "multiple of",
            "exclude each other",
            "tie_embeddings",
            "train.learning_rate",
            "optimizer.beta2",
            "eval.interval",
            "not a field of JSON but of FLAN",
            "--data.json_path",
            "`devices`",
        ];
        assert_eq!(problems.len(), expected.len(), "{problems:#?}");
        for part in expected {
            assert!(problems.iter().any(|problem| problem.contains(part)), "{part} in {problems:#?}");
        }
    }

    #[test]
    fn one_problem_is_a_usage_error() {
        let mut settings = FinetuneSettings::default();
        settings.train.micro_batch_size = 32;
        let error = settings.validate().unwrap_err();
        assert!(matches!(error, Error::Usage { .. }));
        let text = "`train.global_batch_size` (16) must be a multiple of `train.micro_batch_size` (32)";
        assert_eq!(error.to_string(), text);
    }

    #[test]
    fn a_run_needs_an_end() {
        let mut settings = FinetuneSettings::default();
        settings.train.epochs = None;
        assert!(settings.validate().unwrap_err().to_string().contains("nothing ends the run"));
        settings.train.max_time = Some(60.0);
        settings.validate().unwrap();
    }

    #[test]
    fn precisions_read_what_they_write() {
        for precision in Precision::ALL {
            assert_eq!(precision.name().parse(), Ok(precision));
        }
        assert_eq!("bf16".parse(), Ok(Precision::Bf16Mixed));
        assert!("fp8".parse::<Precision>().unwrap_err().contains("32-true, bf16-true"));
    }

    #[test]
    fn data_modules_go_by_many_names() {
        for name in ["litgpt.data.Alpaca2k", "Alpaca2k", "alpaca_2k", "litgpt.data.alpaca_2k.Alpaca2k"] {
            assert_eq!(DataModule::find(name).unwrap().name, "Alpaca2k");
        }
        assert!(DataModule::find("TextFiles").is_none());
    }

    #[test]
    fn the_token_is_never_written() {
        let settings = FinetuneSettings { access_token: Some("hf_secret".into()), ..Default::default() };
        assert!(!serde_json::to_string(&settings).unwrap().contains("hf_secret"));
    }
}
