//! The command line: what there is, and one match arm per subcommand. Each command is a file; only `ui` prints.

pub mod args;
mod chat;
pub mod compat;
mod convert;
mod download;
mod finetune;
mod folders;
mod generate;
mod load;
mod merge_lora;
mod quantize;
pub mod recipe;
mod resume;
mod shell;
mod signals;
mod ui;
mod usage;
mod validate;

use crate::error::Error;
use clap::{CommandFactory, Parser, Subcommand};
use std::ffi::OsString;
use std::panic::AssertUnwindSafe;
use std::process::ExitCode;
use ui::Ui;

/// Finetune language models with LoRA on one GPU or CPU, and use what comes out.
#[derive(Debug, Parser)]
#[command(name = "litgpt", version, propagate_version = true, arg_required_else_help = true, max_term_width = 120)]
#[command(after_help = "Examples:
  litgpt download HuggingFaceTB/SmolLM2-135M-Instruct
  litgpt finetune lora --checkpoint_dir HuggingFaceTB/SmolLM2-135M-Instruct --data Alpaca
  litgpt generate --checkpoint_dir out/finetune/lora/final --prompt \"Recommend a movie.\"
  litgpt merge_lora --checkpoint_dir out/finetune/lora/final")]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
#[command(rename_all = "snake_case")]
enum Command {
    /// Fetch a model from the Hugging Face Hub
    Download(args::DownloadArgs),
    /// Finetune a model with LoRA (also: finetune lora)
    FinetuneLora(Box<args::FinetuneArgs>),
    /// Continue a prompt with a model or a finished adapter
    Generate(args::GenerateArgs),
    /// Talk with a model or a finished adapter
    Chat(args::ChatArgs),
    /// Merge an adapter into its base model
    MergeLora(args::MergeArgs),
    /// Write LitGPT's lit_model.pth and model_config.yaml into a Hugging Face folder
    ConvertToLitgpt(args::ConvertToArgs),
    /// Write a Hugging Face folder from LitGPT's files (safetensors, where LitGPT wrote model.pth)
    ConvertFromLitgpt(args::ConvertFromArgs),
    /// Write a copy of a model with its weights in few bits, which transformers reads too, but for nf4-mixed
    Quantize(args::QuantizeArgs),
    /// Check a model's or an adapter's folder, and say what it can be used for
    Validate(args::ValidateArgs),
    /// Print a script that lets a shell complete commands and flags
    Completions(args::CompletionsArgs),
    /// Print a manual page
    Man(args::ManArgs),
}

/// Runs the command line `argv`, program name first, and says how it went.
#[must_use]
pub fn run(argv: Vec<OsString>) -> ExitCode {
    ui::report_panics();
    signals::outlive_full_files();
    let mut ui = Ui::new();
    // What a panic leaves behind is not used again.
    let ran = std::panic::catch_unwind(AssertUnwindSafe(|| parsed_and_run(argv, &mut ui)));
    ran.unwrap_or_else(|_| {
        ui.end();
        ExitCode::FAILURE
    })
}

fn parsed_and_run(argv: Vec<OsString>, ui: &mut Ui) -> ExitCode {
    let argv = match compat::rewrite(argv) {
        Ok(argv) => argv,
        Err(error) => return ui.fail(&error.into()),
    };
    let cli = match Cli::try_parse_from(&argv) {
        Ok(cli) => cli,
        Err(error) => {
            let command =
                argv.get(1).and_then(|word| Cli::command().find_subcommand(word).map(|c| c.get_name().to_owned()));
            return match usage::error(&error, command.as_deref()) {
                Some(error) => ui.fail(&error.into()),
                None => ui.clap(&error),
            };
        }
    };
    let result = match cli.command {
        Command::Download(args) => download::run(&args, ui),
        Command::FinetuneLora(args) => finetune::run(&args, ui),
        Command::Generate(args) => generate::run(&args, ui),
        Command::Chat(args) => chat::run(&args, ui),
        Command::MergeLora(args) => merge_lora::run(&args, ui),
        Command::ConvertToLitgpt(args) => convert::to_litgpt(&args, ui),
        Command::ConvertFromLitgpt(args) => convert::from_litgpt(&args, ui),
        Command::Quantize(args) => quantize::run(&args, ui),
        Command::Validate(args) => validate::run(&args, ui),
        Command::Completions(args) => shell::completions(&args, Cli::command(), ui),
        Command::Man(args) => shell::man(&args, Cli::command(), ui),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => ui.fail(&error),
    }
}

/// 2 where the command line or a recipe is wrong, 1 for every other failure.
fn exit_code(error: &anyhow::Error) -> u8 {
    if matches!(error.downcast_ref(), Some(Error::Usage { .. })) { 2 } else { 1 }
}
