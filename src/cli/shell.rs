//! `litgpt completions` and `litgpt man`: what a shell and `man` want to know, made from the same table as the help.

use clap::Command;

use super::args::{CompletionsArgs, ManArgs};
use super::ui::Ui;
use crate::error::{Error, closest};

/// Prints the completion script of `program` for a shell.
pub fn completions(args: &CompletionsArgs, mut program: Command, ui: &Ui) -> anyhow::Result<()> {
    let mut script = Vec::new();
    clap_complete::generate(args.shell, &mut program, "litgpt", &mut script);
    ui.result(&String::from_utf8(script)?)
}

/// Prints the manual page of `program`, or of one of its commands.
pub fn man(args: &ManArgs, mut program: Command, ui: &Ui) -> anyhow::Result<()> {
    program.build();
    let page = match &args.command {
        Some(name) => program.find_subcommand(name).cloned().ok_or_else(|| unknown(name, &program))?,
        None => program,
    };
    let mut text = Vec::new();
    clap_mangen::Man::new(page).render(&mut text)?;
    ui.result(&String::from_utf8(text)?)
}

fn unknown(name: &str, program: &Command) -> Error {
    let near = closest(name, program.get_subcommands().map(Command::get_name));
    let hint = near.map_or_else(|| "`litgpt --help` lists them".to_owned(), |near| format!("did you mean `{near}`?"));
    Error::usage(format!("no command is called `{name}`"), hint)
}
