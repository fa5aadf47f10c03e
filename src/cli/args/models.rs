//! Arguments of the commands that run a model, `generate` and `chat`, and what others share with them: which model it is, how it is
//! held, how tokens are drawn.

use super::flags::{Kind, boolean};
use crate::checkpoint::pointer;
use crate::error::{Error, Result};
use crate::generate::PROMPT_LOOKUP;
use crate::train::settings::{Accelerator, Precision, quantizer};
use clap::builder::TypedValueParser;
use clap::{ArgAction, Args};
use serde_json::Value;
use std::path::{Path, PathBuf};

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

pub(super) fn checkpoint_dir_in(root: &Path, path: &Path) -> PathBuf {
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
    /// Weights of the blocks in few bits: nf4, nf4-dq, nf4-mixed, fp4, fp4-dq or int8 [default: as an adapter was trained]
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
pub(super) fn boolean_arg() -> impl TypedValueParser<Value = bool> {
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
