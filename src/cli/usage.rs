//! What is wrong with a command line, in one line, and what was probably meant. Recipes use the latter, too.

use clap::error::{ContextKind, ContextValue, ErrorKind};

use super::args::FLAGS;
use crate::error::{Error, closest, edit_distance};

/// Clap's error as ours: its message on one line, with what was meant. `command` is the one that was called, if it is one.
/// `None` for help and version, which are no mistakes.
pub fn error(error: &clap::Error, command: Option<&str>) -> Option<Error> {
    use ErrorKind::{DisplayHelp, DisplayHelpOnMissingArgumentOrSubcommand, DisplayVersion};
    if matches!(error.kind(), DisplayHelp | DisplayHelpOnMissingArgumentOrSubcommand | DisplayVersion) {
        return None;
    }
    let text = error.to_string();
    // Behind a blank line come tips and the usage.
    let lines: Vec<_> = text.lines().map(str::trim).take_while(|line| !line.is_empty()).collect();
    let message = lines.join(" ");
    let message = message.trim_start_matches("error: ");
    let tip = meant(error, message, command).map(|word| format!(", did you mean `{word}`?")).unwrap_or_default();
    let hint = match command {
        Some(command) => format!("`litgpt {command} --help` lists its flags"),
        None => "`litgpt --help` lists the commands".to_owned(),
    };
    Some(Error::usage(format!("{message}{tip}"), hint))
}

/// What the word that clap refuses was probably meant to be.
fn meant(error: &clap::Error, message: &str, command: Option<&str>) -> Option<String> {
    let word = |kind| match error.get(kind)? {
        ContextValue::String(word) => Some(word.clone()),
        // The likeliest is the last one.
        ContextValue::Strings(words) => words.last().cloned(),
        _ => None,
    };
    let suggested = || {
        let kinds = [ContextKind::SuggestedArg, ContextKind::SuggestedValue, ContextKind::SuggestedSubcommand];
        kinds.into_iter().find_map(word)
    };
    match error.kind() {
        ErrorKind::UnknownArgument if command == Some("finetune_lora") => {
            let typed = word(ContextKind::InvalidArg)?;
            let key = key(typed.trim_start_matches('-').split('=').next()?);
            key.map(|key| format!("--{key}")).or_else(suggested)
        }
        ErrorKind::ValueValidation => value(message, &word(ContextKind::InvalidValue)?).map(str::to_owned),
        _ => suggested(),
    }
}

/// The value that `typed` was probably meant to be, of those that `message` lists as expected.
pub fn value<'a>(message: &'a str, typed: &str) -> Option<&'a str> {
    let (_, expected) = message.split_once("expected ")?;
    let list = expected.split(", got ").next().filter(|list| list.starts_with("one of ") || list.starts_with('`'))?;
    let words = list.split([' ', ',', '`']).filter(|word| !["", "one", "of", "or", "an"].contains(word));
    // LitGPT's prefix of quantizers.
    closest(typed.trim_start_matches("bnb."), words)
}

/// The setting of a run that `name` was probably meant to be, as help and messages spell it.
pub fn key(name: &str) -> Option<&'static str> {
    let last = name.rsplit('.').next().unwrap_or(name);
    let known =
        FLAGS.iter().flat_map(|flag| flag.names.iter().copied().chain([flag.key]).map(move |name| (name, flag)));
    let (_, flag) = known
        .map(|(candidate, flag)| {
            let part = candidate.rsplit('.').next().unwrap_or(candidate);
            // A key in the wrong group, or only begun, is as good as one with a letter missing.
            let begun = last.len() >= 4 && part.starts_with(last);
            let apart = if begun { 1 } else { edit_distance(name, candidate).min(edit_distance(last, part) + 1) };
            ((apart, !begun), flag)
        })
        .filter(|((apart, _), _)| *apart <= 1 + last.len() / 4)
        .min_by_key(|(apart, _)| *apart)?;
    Some(flag.name())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn listed_values_are_compared() {
        for (message, typed, meant) in [
            ("unknown precision `bf16-tru`, expected one of 32-true, bf16-true", "bf16-tru", Some("bf16-true")),
            ("expected `true` or `false`", "maybe", None),
            ("expected `true` or `false`", "tru", Some("true")),
            ("expected `first`, `random` or an index, got `frist`", "randm", Some("random")),
            ("unknown quantizer `bnb.nf44`, expected one of nf4, int8", "bnb.nf44", Some("nf4")),
            ("expected a whole number, 0 or more", "b", None),
            ("unknown variant `cosin`, expected one of `cosine`, `linear`", "cosin", Some("cosine")),
        ] {
            assert_eq!(value(message, typed), meant, "{message}: {typed}");
        }
    }
}
