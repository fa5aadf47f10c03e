//! Arguments of `litgpt finetune_lora`, made of the table of flags.

use super::flags::{FLAGS, Kind, LOG_FLAGS};
use crate::train::settings::FinetuneSettings;
use clap::error::ErrorKind;
use clap::{Arg, ArgAction, ArgMatches, Args, Command, FromArgMatches, value_parser};
use serde_json::Value;
use std::path::PathBuf;

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
