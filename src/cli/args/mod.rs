//! What each command takes: that of finetuning is the table [`FLAGS`], that of the others are small derived structs. Here flags
//! are only parsed; `recipe` merges them with files, `compat` rewrites historic command lines before clap sees them.

mod finetune;
mod flags;
mod models;

pub use finetune::FinetuneArgs;
pub use flags::{FLAGS, Flag, Kind, LOG_FLAGS, boolean};
pub use models::{ChatArgs, GenerateArgs, LoadArgs, ModelArg, SamplingArgs, checkpoint_dir};

use super::usage;
use crate::error::{Error, Result};
use crate::train::settings::{Accelerator, Precision, quantizer};
use clap::{ArgAction, Args, Command, ValueEnum};
use models::boolean_arg;
use std::ffi::OsString;
use std::path::PathBuf;

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

/// Tokens of a sample beyond which it is not looked at for the codes of 4 bits.
pub const CALIBRATION_LENGTH: usize = 512;

/// Arguments of `litgpt quantize`.
#[derive(Args, Clone, Debug)]
#[command(
    rename_all = "snake_case",
    after_help = "Examples:
  litgpt quantize checkpoints/meta-llama/Llama-3.2-1B
  litgpt quantize checkpoints/meta-llama/Llama-3.2-1B --data my_data.json
  litgpt quantize --checkpoint_dir checkpoints/meta-llama/Llama-3.2-1B --quantize int8 --out_dir small"
)]
pub struct QuantizeArgs {
    /// The model.
    #[command(flatten)]
    pub model: ModelArg,
    /// nf4, nf4-dq, nf4-mixed, fp4, fp4-dq or int8
    #[arg(long, value_name = "NAME", default_value = "nf4", value_parser = quantizer, overrides_with = "quantize")]
    pub quantize: String,
    /// Folder to write [default: beside the model, with the quantizer's name behind its own]
    #[arg(long, value_name = "DIR", overrides_with = "out_dir")]
    pub out_dir: Option<PathBuf>,
    /// Choose the 4-bit codes by samples (GPTQ), which loses a fraction of what the nearest codes lose: a file, a dataset's
    /// name or ORGANISATION/NAME, as in finetuning [default: the nearest codes, as bitsandbytes has them]
    #[arg(long, value_name = "NAME", overrides_with = "data")]
    pub data: Option<String>,
    /// How many samples of --data are looked at
    #[arg(long, value_name = "N", default_value_t = 128, value_parser = at_least_one, overrides_with = "calibration_samples", requires = "data")]
    pub calibration_samples: usize,
    /// Longest sample, in tokens
    #[arg(long, value_name = "N", default_value_t = CALIBRATION_LENGTH, value_parser = at_least_one, overrides_with = "max_seq_length", requires = "data")]
    pub max_seq_length: usize,
    /// Where samples are looked at: auto (a GPU if there is one), cpu, cuda
    #[arg(long, value_name = "NAME", default_value = "auto", overrides_with = "accelerator")]
    pub accelerator: Accelerator,
    /// Hugging Face token, if the dataset has to be downloaded
    #[arg(long, value_name = "TOKEN", env = "HF_TOKEN", hide_env_values = true)]
    pub access_token: Option<String>,
}

fn at_least_one(text: &str) -> std::result::Result<usize, String> {
    text.parse().ok().filter(|n| *n > 0).ok_or_else(|| "expected 1 or more".into())
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
    use super::models::checkpoint_dir_in;
    use super::*;
    use crate::train::settings::FinetuneSettings;
    use serde_json::Value;
    use std::path::Path;

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
            "calibration_samples".into(),
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
