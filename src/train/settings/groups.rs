//! Settings by what they are about: adapters, training, validation, optimizer, with their rules.

use super::rules::{below_one, check, nonzero, not_negative, positive};
use super::values::{EvaluateExample, LrSchedule, Switch};
use serde::{Deserialize, Serialize};

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
    pub(super) fn problems(&self) -> Vec<String> {
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
    pub(super) fn problems(&self) -> Vec<String> {
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
    pub(super) fn problems(&self) -> Vec<String> {
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
    pub(super) fn problems(&self) -> Vec<String> {
        let mut found = Vec::new();
        positive(&mut found, "train.learning_rate", self.learning_rate);
        not_negative(&mut found, "optimizer.weight_decay", self.weight_decay);
        below_one(&mut found, "optimizer.beta1", self.beta1);
        below_one(&mut found, "optimizer.beta2", self.beta2);
        not_negative(&mut found, "optimizer.eps", self.eps);
        found
    }
}
