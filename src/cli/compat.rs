//! LitGPT's historic command lines, rewritten into today's before clap sees them.
//!
//! Commands: `finetune lora`, `finetune/lora.py` and `finetune` become `finetune_lora`, and so on; commands that are
//! not offered end here with what to use instead. Flags: dashes inside names become underscores, `.init_args.` goes,
//! `--flag true` becomes `--flag=true` (so that a bare boolean flag does not swallow the argument behind it), and
//! `null` for an optional is left out. Further names of single flags stand in `args::FLAGS`.

use std::ffi::OsString;
use std::path::Path;

use crate::error::{Error, Result};

/// First and second words that LitGPT 0.3 wrote apart, and what they mean.
const TWO_WORDS: &[(&str, &str, &str)] = &[
    ("finetune", "lora", "finetune_lora"),
    ("finetune", "full", "finetune_full"),
    ("finetune", "adapter", "finetune_adapter"),
    ("finetune", "adapter_v2", "finetune_adapter_v2"),
    ("generate", "base", "generate"),
    ("generate", "lora", "generate"),
    ("generate", "full", "generate_full"),
    ("generate", "adapter", "generate_adapter"),
    ("generate", "adapter_v2", "generate_adapter_v2"),
    ("generate", "sequentially", "generate_sequentially"),
    ("generate", "speculatively", "generate_speculatively"),
    ("generate", "tp", "generate_tp"),
    ("chat", "base", "chat"),
    ("convert", "to_litgpt", "convert_to_litgpt"),
    ("convert", "from_litgpt", "convert_from_litgpt"),
    ("convert", "pretrained_checkpoint", "convert_pretrained_checkpoint"),
];

/// Names that scripts had before there was a `litgpt` command, and short forms.
const ONE_WORD: &[(&str, &str)] = &[
    ("finetune", "finetune_lora"),
    ("generate_base", "generate"),
    ("chat_base", "chat"),
    ("merge", "merge_lora"),
    ("convert_hf_checkpoint", "convert_to_litgpt"),
    ("convert_lit_checkpoint", "convert_from_litgpt"),
];

/// Commands of LitGPT that are not offered, and what does the work instead.
const NOT_OFFERED: &[(&str, &str)] = &[
    ("finetune_full", "`litgpt finetune_lora` with a large --lora_r and all --lora_* targets comes close"),
    ("finetune_adapter", "use `litgpt finetune_lora`, whose adapters other programs load, too"),
    ("finetune_adapter_v2", "use `litgpt finetune_lora`, whose adapters other programs load, too"),
    ("pretrain", "use Python's LitGPT to train from scratch; `litgpt finetune_lora` reads its checkpoints"),
    (
        "serve",
        "`litgpt chat` talks in the terminal; `litgpt merge_lora` writes what `vllm serve` or llama.cpp's server take",
    ),
    ("evaluate", "run `litgpt merge_lora`, then `lm_eval --model hf --model_args pretrained=MERGED_DIR`"),
    ("generate_full", "use `litgpt generate CHECKPOINT_DIR`, it reads finetuned checkpoints, too"),
    ("generate_adapter", "use `litgpt finetune_lora` and `litgpt generate`"),
    ("generate_adapter_v2", "use `litgpt finetune_lora` and `litgpt generate`"),
    (
        "generate_sequentially",
        "one device is used: `litgpt generate CHECKPOINT_DIR --quantize nf4` needs a quarter of the memory",
    ),
    (
        "generate_tp",
        "one device is used: `litgpt generate CHECKPOINT_DIR --quantize nf4` needs a quarter of the memory",
    ),
    ("generate_speculatively", "use `litgpt generate CHECKPOINT_DIR`"),
    ("convert_pretrained_checkpoint", "not needed: every command reads such checkpoints as they are"),
];

/// Optional flags of the commands besides finetuning, for which `null` means the same as leaving them out.
const NULLABLE: &[&str] = &[
    "--quantize",
    "--precision",
    "--sys_prompt",
    "--access_token",
    "--model_name",
    "--dtype",
    "--prompt_style",
    "--pretrained_checkpoint_dir",
    "--out_dir",
    "--revision",
    "--model_filename",
];

/// Rewrites a command line, program name first, into one that clap knows. Unknown words pass unchanged.
///
/// # Errors
/// `Usage` for a command of LitGPT that is not offered, with what does the work instead.
pub fn rewrite(argv: Vec<OsString>) -> Result<Vec<OsString>> {
    let mut words = argv.into_iter();
    let mut rewritten: Vec<OsString> = words.next().into_iter().collect();
    let mut words: Vec<OsString> = words.collect();
    // `litgpt -c FILE finetune lora`: what stands before the command belongs behind it.
    let before = leading_configs(&words);
    let configs: Vec<OsString> = words.drain(..before).collect();
    let Some((command, used)) = command(&words)? else {
        rewritten.extend(configs);
        rewritten.extend(words);
        return Ok(rewritten);
    };
    words.drain(..used);
    let keep_null = command == "finetune_lora";
    rewritten.push(command.into());
    rewritten.extend(configs);
    rewritten.extend(flags(words, keep_null));
    Ok(rewritten)
}

/// How many words before the command are `-c FILE`, `--config FILE` or `--config=FILE`.
fn leading_configs(words: &[OsString]) -> usize {
    let mut count = 0;
    while let Some(word) = words.get(count).and_then(|word| word.to_str()) {
        match word {
            "-c" | "--config" if count + 2 < words.len() => count += 2,
            _ if word.starts_with("--config=") => count += 1,
            _ => break,
        }
    }
    count
}

/// Today's name of the command at the start of `words`, and how many of the words it took.
fn command(words: &[OsString]) -> Result<Option<(String, usize)>> {
    let Some(first) = words.first().and_then(|word| word.to_str()).filter(|word| !word.starts_with('-')) else {
        return Ok(None);
    };
    // `scripts/download.py`, `finetune/lora.py`, `merge-lora`
    let first = first.trim_end_matches(".py").trim_start_matches("litgpt/").trim_start_matches("scripts/");
    let first = first.replace(['-', '/'], "_");
    let second = words.get(1).and_then(|word| word.to_str()).map(|word| word.replace('-', "_"));
    let pair = TWO_WORDS.iter().find(|(a, b, _)| *a == first && second.as_deref() == Some(*b));
    let (name, used) = match pair {
        Some((_, method, name)) if !names_a_model(method, &words[2..]) => ((*name).to_owned(), 2),
        _ => {
            let name = ONE_WORD.iter().find(|(old, _)| *old == first).map_or(first.as_str(), |(_, name)| name);
            (name.to_owned(), 1)
        }
    };
    if name == "convert" {
        return Err(Error::usage(
            "`litgpt convert` needs a direction",
            "litgpt convert_to_litgpt CHECKPOINT_DIR, or litgpt convert_from_litgpt CHECKPOINT_DIR OUTPUT_DIR",
        ));
    }
    match NOT_OFFERED.iter().find(|(missing, _)| *missing == name) {
        Some((_, hint)) => Err(Error::usage(format!("`litgpt {name}` is not offered"), *hint)),
        None => Ok(Some((name, used))),
    }
}

/// Since LitGPT 0.4, `finetune lora` means a model called `lora`. It is taken so only where such a model exists and the
/// words behind it (`rest`) name no other.
fn names_a_model(word: &str, rest: &[OsString]) -> bool {
    let other = rest.iter().filter_map(|word| word.to_str()).enumerate().any(|(place, word)| {
        (place == 0 && !word.starts_with('-'))
            || ["--checkpoint_dir", "--config"].iter().any(|flag| word.starts_with(flag))
            || word == "-c"
    });
    let model = |folder: &Path| ["config.json", "model_config.yaml"].iter().any(|file| folder.join(file).is_file());
    !other && (model(Path::new(word)) || model(&Path::new("checkpoints").join(word)))
}

/// Rewrites the arguments behind the command.
fn flags(words: Vec<OsString>, keep_null: bool) -> Vec<OsString> {
    let mut rewritten = Vec::with_capacity(words.len());
    let mut words = words.into_iter().peekable();
    while let Some(word) = words.next() {
        let Some(flag) = word.to_str().and_then(|word| word.strip_prefix("--")).filter(|name| !name.is_empty()) else {
            let last = word == "--";
            rewritten.push(word);
            if last {
                break;
            }
            continue;
        };
        let (name, mut value) = match flag.split_once('=') {
            Some((name, value)) => (name, Some(value.to_owned())),
            None => (flag, None),
        };
        let name = format!("--{}", name.replace('-', "_").replace(".init_args.", "."));
        let next = words.peek().and_then(|word| word.to_str());
        if name.ends_with(".help") {
            // `--data.help JSON`: all flags of all data modules stand in the one help.
            words.next_if(|word| !word.to_string_lossy().starts_with('-'));
            rewritten.push("--help".into());
            continue;
        }
        if value.is_none() && next.is_some_and(is_constant) {
            value = words.next().and_then(|word| word.into_string().ok());
        }
        match value {
            Some(value) if !keep_null && is_null(&value) && NULLABLE.contains(&name.as_str()) => {}
            // Downloads take whichever format is there.
            Some(_) if name == "--from_safetensors" => {}
            Some(value) => rewritten.push(format!("{name}={value}").into()),
            None if name == "--prompt" || name == "--sys_prompt" => {
                // The text may look like a flag itself.
                rewritten.push(name.into());
                rewritten.extend(words.next());
            }
            None => rewritten.push(name.into()),
        }
    }
    rewritten.extend(words);
    rewritten
}

/// Whether `word` can only be a value: a boolean or `null`.
fn is_constant(word: &str) -> bool {
    is_null(word) || matches!(word.to_ascii_lowercase().as_str(), "true" | "false" | "yes" | "no" | "on" | "off")
}

fn is_null(word: &str) -> bool {
    matches!(word, "null" | "Null" | "NULL" | "None" | "~")
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn rewritten(line: &str) -> String {
        let argv = line.split_whitespace().map(OsString::from).collect();
        rewrite(argv).unwrap().iter().map(|word| word.to_string_lossy()).collect::<Vec<_>>().join(" ")
    }

    #[test]
    fn historic_commands_become_todays() {
        for (old, new) in [
            ("litgpt finetune lora --checkpoint_dir x", "litgpt finetune_lora --checkpoint_dir x"),
            ("litgpt finetune x", "litgpt finetune_lora x"),
            ("litgpt finetune", "litgpt finetune_lora"),
            ("litgpt finetune --help", "litgpt finetune_lora --help"),
            ("litgpt finetune_lora x", "litgpt finetune_lora x"),
            ("litgpt finetune-lora x", "litgpt finetune_lora x"),
            ("litgpt generate base --prompt hi", "litgpt generate --prompt hi"),
            ("litgpt chat base", "litgpt chat"),
            ("litgpt convert to_litgpt --checkpoint_dir x", "litgpt convert_to_litgpt --checkpoint_dir x"),
            ("litgpt finetune/lora.py --precision 32-true", "litgpt finetune_lora --precision 32-true"),
            ("litgpt scripts/download.py --repo_id x", "litgpt download --repo_id x"),
            (
                "litgpt scripts/convert_hf_checkpoint.py --checkpoint_dir x",
                "litgpt convert_to_litgpt --checkpoint_dir x",
            ),
            ("litgpt -c a.yaml --config=b.yaml finetune lora", "litgpt finetune_lora -c a.yaml --config=b.yaml"),
            ("litgpt --version", "litgpt --version"),
            ("litgpt", "litgpt"),
        ] {
            assert_eq!(rewritten(old), new);
        }
    }

    #[test]
    fn flags_become_todays() {
        for (old, new) in [
            ("finetune x --lora_key", "--lora_key"),
            ("finetune x --lora_key true", "--lora_key=true"),
            ("finetune x --lora-key False --seed 1", "--lora_key=False --seed 1"),
            ("finetune x --train.save_interval null", "--train.save_interval=null"),
            ("finetune x --optimizer.init_args.lr=0.1", "--optimizer.lr=0.1"),
            ("finetune x --data.help Alpaca", "--help"),
            ("finetune x --data.json_path my-file.json", "--data.json_path my-file.json"),
            ("finetune x --data.json_path=my-file.json", "--data.json_path=my-file.json"),
            ("generate x --quantize null --top_k null", "--top_k=null"),
            ("generate x --prompt --not-a-flag --seed 3", "--prompt --not-a-flag --seed 3"),
            ("download x --from_safetensors true", ""),
        ] {
            let line = rewritten(&format!("litgpt {old}"));
            let rest = line.split(' ').skip(3).collect::<Vec<_>>().join(" ");
            assert_eq!(rest, new, "{old}");
        }
    }

    #[test]
    fn what_is_not_offered_says_what_is() {
        for line in [
            "finetune full x",
            "finetune_full x",
            "pretrain x",
            "generate tp",
            "convert pretrained_checkpoint a b",
            "convert",
        ] {
            let argv = ["litgpt"].into_iter().chain(line.split(' ')).map(OsString::from).collect();
            let error = rewrite(argv).unwrap_err();
            assert!(matches!(error, Error::Usage { .. }));
            assert!(error.hint().unwrap().contains("litgpt") || line.starts_with("convert"), "{error}");
        }
    }

    #[test]
    fn every_refused_command_is_reached() {
        for (_, _, name) in TWO_WORDS {
            let offered =
                ["finetune_lora", "generate", "chat", "convert_to_litgpt", "convert_from_litgpt"].contains(name);
            assert!(offered || NOT_OFFERED.iter().any(|(missing, _)| missing == name), "{name}");
        }
    }
}
