//! The command line as a user meets it: help, what goes to stdout, and what is said about bad input.
//!
//! Every refusal is one `error:` line and at most one `hint:` line, exit code 2 for a wrong command line and 1 for all
//! else, before anything is written.
#![allow(clippy::unwrap_used, clippy::print_stderr)]

use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};

use serde_json::{Value, json};

use crate::util::{copy_tiny, finetune, litgpt, names, root, tensors, tiny, write_tensors};

const COMMANDS: [&str; 7] = ["chat", "download", "finetune_lora", "generate", "merge_lora", "quantize", "validate"];

fn help(command: &str) -> String {
    let ran = litgpt(root(), command.split_whitespace().chain(["--help"])).ok();
    assert_eq!(ran.stderr, "", "{command}");
    // Lines are wrapped to the terminal.
    ran.stdout.split_whitespace().collect::<Vec<_>>().join(" ")
}

#[test]
fn help_shows_defaults_and_examples() {
    let all = help("");
    for command in COMMANDS {
        assert!(all.contains(command), "{command} is not in the overview");
        let help = help(command);
        assert!(help.contains("[default: ") && help.contains("Example"), "{command}: {help}");
        assert!(help.contains(&format!("litgpt {command} ")), "{command}: the example is of another command");
    }
    let finetune = help("finetune_lora");
    assert_eq!(finetune, help("finetune lora"));
    for (flag, default) in [
        ("--lora_r <N>", "8"),
        ("--lora_alpha <X>", "16"),
        ("--lora_dropout <X>", "0.05"),
        ("--train.global_batch_size <N>", "16"),
        ("--train.learning_rate <X>", "0.0002"),
        ("--out_dir <PATH>", "out/finetune/lora"),
    ] {
        let (_, rest) = finetune.split_once(flag).unwrap_or_else(|| panic!("no {flag}"));
        let (_, rest) = rest.split_once("[default: ").unwrap();
        assert!(rest.starts_with(default), "{flag}: {}", &rest[..20]);
    }
}

#[test]
fn version_is_the_packages() {
    assert_eq!(litgpt(root(), ["--version"]).ok().stdout, format!("litgpt {}\n", env!("CARGO_PKG_VERSION")));
}

#[test]
fn no_arguments_show_the_commands() {
    let ran = litgpt::<&str>(root(), []);
    assert_eq!((ran.code, ran.stdout.as_str()), (2, ""));
    assert!(COMMANDS.iter().all(|command| ran.stderr.contains(command)), "{}", ran.stderr);
}

#[test]
fn typing_mistakes_are_corrected() {
    let dir = tempfile::tempdir().unwrap();
    for (line, typed, intended) in [
        ("finetune_lora x --lora_rr 4", "--lora_rr", "`--lora_r`"),
        ("finetune lora x --epochs=3", "--epochs", "`--train.epochs`"),
        ("finetune_lora x --train.max_step 3", "--train.max_step", "`--train.max_steps`"),
        ("finetune_lora x --precision bf16-tru", "bf16-tru", "`bf16-true`"),
        ("finetune_lora x --accelerator cdua", "cdua", "`cuda`"),
        ("finetune_lora x --train.lr_schedule cosin", "cosin", "`cosine`"),
        ("finetune_lora x --eval.evaluate_example frist", "frist", "`first`"),
        ("finetune_lora x --lora_key=flase", "flase", "`false`"),
        ("finetune_lora x --logger_name tensorbord", "tensorbord", "`tensorboard`"),
        ("finetune_lora x --data Alpacca", "Alpacca", "`Alpaca`"),
        ("generate x --temprature 0", "--temprature", "`--temperature`"),
        ("generate x --quantize bnb.nf44", "bnb.nf44", "nf4"),
        ("merge_lora x --outdir y", "--outdir", "`--out_dir`"),
        ("merge_lora x --format ggfu", "ggfu", "`gguf`"),
        ("generat x", "generat", "`generate`"),
        ("finetun x", "finetun", "`finetune_lora`"),
        ("man generat", "generat", "`generate`"),
        ("completions bsh", "bsh", "`bash`"),
    ] {
        let ran = litgpt(dir.path(), line.split(' ')).refused(2, &[typed, "did you mean", intended]);
        assert!(ran.stderr.lines().count() <= 2, "{ran:#?}");
    }
    fs::write(dir.path().join("r.yaml"), "train:\n  epoch: 1\nprecision: bf16-tru\n").unwrap();
    let says = ["did you mean `train.epochs`?", "did you mean `bf16-true`?"];
    litgpt(dir.path(), ["finetune_lora", "x", "--config", "r.yaml"]).refused(2, &says);
    for (flag, file, says) in
        [("config", "no.yaml", "recipe not found"), ("train", ".", "a folder"), ("optimizer", "no.yaml", "not found")]
    {
        litgpt(dir.path(), ["finetune_lora", "x", &format!("--{flag}"), file]).refused(2, &[file, says]);
    }
    assert_eq!(names(dir.path()), ["r.yaml"]);
}

/// The shell's own parser takes the script, and it completes commands and flags.
#[test]
fn completions_are_for_every_shell() {
    for shell in ["bash", "zsh", "fish", "powershell", "elvish"] {
        let script = litgpt(root(), ["completions", shell]).ok().stdout;
        for word in ["finetune_lora", "merge_lora", "train.max_steps", "gguf"] {
            assert!(script.contains(word), "{shell}: no {word}");
        }
    }
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("litgpt.bash"), litgpt(root(), ["completions", "bash"]).ok().stdout).unwrap();
    let complete = |words: &str, at: usize| {
        let script = format!(
            "source litgpt.bash; COMP_WORDS=({words}); COMP_CWORD={at}; _litgpt litgpt \"${{COMP_WORDS[{at}]}}\" \"${{COMP_WORDS[{at} - 1]}}\"; \
             echo \"${{COMPREPLY[@]}}\""
        );
        let output = Command::new("bash").args(["-c", &script]).current_dir(dir.path()).output().ok()?;
        Some(String::from_utf8(output.stdout).unwrap().trim().to_owned())
    };
    let Some(found) = complete("litgpt merge", 1) else {
        eprintln!("skipped: no bash");
        return;
    };
    assert_eq!(found, "merge_lora");
    assert_eq!(complete("litgpt finetune_lora --train.max_st", 2).unwrap(), "--train.max_steps");
    assert_eq!(complete("litgpt merge_lora --format ''", 3).unwrap(), "hf gguf litgpt");
}

#[test]
fn manual_pages_have_what_the_help_has() {
    let all = litgpt(root(), ["man"]).ok().stdout;
    assert!(all.starts_with(".ie") && all.contains(".TH litgpt 1"), "{}", &all[..200]);
    for command in COMMANDS {
        assert!(all.replace('\\', "").contains(command), "{command}");
        let page = litgpt(root(), ["man", command]).ok().stdout.replace('\\', "");
        let help = help(command);
        for flag in help.split([' ', '=', '[']).filter(|word| word.starts_with("--") && word.len() > 3) {
            assert!(page.contains(flag.trim_end_matches([',', '.', ';', ')', '`'])), "{command}: no {flag}");
        }
        assert!(page.contains("Example"), "{command}");
    }
}

#[test]
fn wrong_command_lines_are_usage_errors() {
    let dir = tempfile::tempdir().unwrap();
    for (line, says) in [
        ("generate", "CHECKPOINT_DIR"),
        ("merge_lora", "CHECKPOINT_DIR"),
        ("generate x --temperature warm", "warm"),
        ("generate x --top_p 2", "2"),
        ("generate x --num_samples 0", "num_samples"),
        ("generate x --max_new_tokens 0", "max_new_tokens"),
        ("pretrain x", "pretrain"),
    ] {
        litgpt(dir.path(), line.split_whitespace()).refused(2, &[says]);
    }
    for (more, says) in [
        ("--train.max_steps 0", "train.max_steps"),
        ("--train.epochs 0", "train.epochs"),
        ("--train.micro_batch_size 3", "train.micro_batch_size"),
        ("--lora_r 0", "lora_r"),
        ("--lora_r many", "many"),
        ("--lora_dropout 1", "lora_dropout"),
        (
            "--lora_query false --lora_key false --lora_value false --lora_projection false --lora_mlp false",
            "lora_query",
        ),
        ("--lr -1", "learning_rate"),
        ("--precision 8-true", "8-true"),
        ("--quantize nf5", "nf5"),
        ("--data Alpacca", "Alpacca"),
        ("--data.val_split_fraction 2", "val_split_fraction"),
        ("--data.prompt_style nope", "nope"),
        ("--optimizer SGD", "SGD"),
        ("--devices 2", "devices"),
    ] {
        finetune(dir.path(), &tiny(), more).refused(2, &[says]);
        assert!(names(dir.path()).is_empty(), "{more}: something was written");
    }
}

/// However many mistakes there are, and wherever they stand.
#[test]
fn mistakes_in_flags_and_recipes_have_one_exit_code() {
    let dir = tempfile::tempdir().unwrap();
    for flags in ["--lora_r=-3", "--lora_r=-3 --precision fp8", "--lora_r 0", "--lora_r 0 --train.epochs 0"] {
        litgpt(dir.path(), format!("finetune_lora x {flags}").split(' ')).refused(2, &["lora_r"]);
    }
    let many = ["banana: 1\nlora_r: 2.5\n", "lora_r: 0\ntrain:\n  epochs: 0\n", "lora_r: [\n"];
    for recipe in ["lora_r: abc\n", "lora_r: 0\n"].iter().chain(&many) {
        fs::write(dir.path().join("r.yaml"), recipe).unwrap();
        litgpt(dir.path(), ["finetune_lora", "x", "--config", "r.yaml"]).refused(2, &[]);
    }
}

#[test]
fn stdout_is_the_text_alone() {
    let (dir, tiny) = (tempfile::tempdir().unwrap(), tiny());
    let generate = |more: &str| {
        let fixed = ["generate", tiny.to_str().unwrap(), "--prompt", "A fox", "--max_new_tokens", "8"];
        litgpt(dir.path(), fixed.into_iter().chain(more.split_whitespace())).ok()
    };
    let ran = generate("--temperature 0");
    let text = ran.stdout.strip_suffix('\n').unwrap();
    assert!(!text.trim().is_empty() && !text.contains('\n'), "{ran:#?}");
    assert!(ran.stderr.contains("tokens/s") && !ran.stdout.contains("tokens/s"), "{ran:#?}");
    assert_eq!(generate("--temperature 0 --stream false").stdout, ran.stdout);
    // The seed decides what is drawn.
    assert_eq!(generate("--seed 3").stdout, generate("--seed 3").stdout);
    // Guesses, which a small vocabulary draws out, change nothing but the speed.
    let long =
        |lookup| generate(&format!("--seed 3 --top_k 2 --max_new_tokens 80 --prompt_lookup_num_tokens {lookup}"));
    assert_eq!(long(7).stdout, long(0).stdout);
    assert!(long(7).stderr.contains("guessed right") && !long(0).stderr.contains("guessed"), "{:#?}", long(7));
    assert_eq!(generate("--temperature 0 --num_samples 2").stdout, ran.stdout.repeat(2));
}

#[test]
fn a_closed_pipe_is_no_failure() {
    let tiny = tiny();
    let mut child = Command::new(env!("CARGO_BIN_EXE_litgpt"))
        .args(["generate", tiny.to_str().unwrap(), "--prompt", "A fox", "--max_new_tokens", "100"])
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    drop(child.stdout.take());
    assert_eq!(child.wait().unwrap().code(), Some(0));
}

#[test]
fn print_config_prints_yaml_and_stops() {
    let dir = tempfile::tempdir().unwrap();
    let ran = finetune(dir.path(), &tiny(), "--print_config").ok();
    assert!(ran.stdout.contains("lora_r: 8\n") && ran.stdout.contains("  max_steps: 3\n"), "{}", ran.stdout);
    assert!(names(dir.path()).is_empty());
}

fn edit_config(dir: &Path, key: &str, value: Value) {
    let path = dir.join("config.json");
    let mut config: Value = serde_json::from_str(&fs::read_to_string(&path).unwrap()).unwrap();
    config[key] = value;
    fs::write(path, config.to_string()).unwrap();
}

fn cut(path: &Path, len: usize) {
    let bytes = fs::read(path).unwrap();
    fs::write(path, &bytes[..len.min(bytes.len() - 1)]).unwrap();
}

/// Removes a tensor, or gives it half of its rows.
fn spoil(dir: &Path, name: &str, remove: bool) {
    let path = dir.join("model.safetensors");
    let mut all = tensors(&path);
    let (dtype, mut shape, mut bytes) = all.remove(name).unwrap();
    if !remove {
        shape[0] /= 2;
        bytes.truncate(bytes.len() / 2);
        all.insert(name.to_owned(), (dtype, shape, bytes));
    }
    write_tensors(&path, &all);
}

/// A name, what is done to the quickstart's model, and what the message has to say.
type Damage = (&'static str, fn(&Path), &'static [&'static str]);

const DAMAGES: &[Damage] = &[
    ("no folder", |d| fs::remove_dir_all(d).unwrap(), &["checkpoint folder", "model"]),
    ("no config", |d| fs::remove_file(d.join("config.json")).unwrap(), &["model/config.json"]),
    ("cut config", |d| cut(&d.join("config.json"), 60), &["model/config.json", "not JSON"]),
    ("a list as config", |d| fs::write(d.join("config.json"), "[]").unwrap(), &["model/config.json"]),
    ("no model type", |d| edit_config(d, "model_type", Value::Null), &["model_type"]),
    ("unknown model type", |d| edit_config(d, "model_type", json!("lamma")), &["lamma", "llama", "qwen2"]),
    ("unknown activation", |d| edit_config(d, "hidden_act", json!("mish")), &["hidden_act", "mish"]),
    ("a size that is a text", |d| edit_config(d, "hidden_size", json!("big")), &["hidden_size"]),
    ("no layers", |d| edit_config(d, "num_hidden_layers", json!(0)), &["num_hidden_layers"]),
    ("no weights", |d| fs::remove_file(d.join("model.safetensors")).unwrap(), &["model.safetensors"]),
    ("empty weights", |d| fs::write(d.join("model.safetensors"), "").unwrap(), &["model.safetensors"]),
    ("cut header", |d| cut(&d.join("model.safetensors"), 100), &["model.safetensors"]),
    ("cut weights", |d| cut(&d.join("model.safetensors"), 2_000_000), &["model.safetensors"]),
    ("weights cut by a byte", |d| cut(&d.join("model.safetensors"), usize::MAX), &["model.safetensors"]),
    ("no tensor", |d| spoil(d, "model.layers.2.mlp.up_proj.weight", true), &["model.layers.2.mlp.up_proj.weight"]),
    ("half a matrix", |d| spoil(d, "model.layers.1.self_attn.q_proj.weight", false), &["layers.1.self_attn.q_proj"]),
    ("half a norm", |d| spoil(d, "model.norm.weight", false), &["model.norm.weight"]),
    ("a layer too many", |d| edit_config(d, "num_hidden_layers", json!(5)), &["model.layers.4."]),
    ("a layer too few", |d| edit_config(d, "num_hidden_layers", json!(3)), &["model.layers.3."]),
    ("fewer tokens than ids", |d| edit_config(d, "vocab_size", json!(1000)), &["embed_tokens"]),
    ("no tokenizer", |d| fs::remove_file(d.join("tokenizer.json")).unwrap(), &["tokenizer.json"]),
    ("cut tokenizer", |d| cut(&d.join("tokenizer.json"), 5000), &["tokenizer.json"]),
    ("an empty tokenizer", |d| fs::write(d.join("tokenizer.json"), "{}").unwrap(), &["tokenizer.json"]),
    ("cut tokenizer config", |d| cut(&d.join("tokenizer_config.json"), 40), &["tokenizer_config.json"]),
];

#[test]
fn damaged_checkpoints_are_named() {
    for (name, damage, says) in DAMAGES {
        eprintln!("{name}");
        let dir = tempfile::tempdir().unwrap();
        copy_tiny(&dir.path().join("model"));
        damage(&dir.path().join("model"));
        let before = names(dir.path());
        finetune(dir.path(), Path::new("model"), "").refused(1, says);
        litgpt(dir.path(), ["generate", "model"]).refused(1, says);
        assert_eq!(names(dir.path()), before, "{name}: something was written");
    }
}

#[test]
fn damaged_adapters_are_named() {
    let dir = tempfile::tempdir().unwrap();
    finetune(dir.path(), &tiny(), "--train.max_steps 1").ok();
    let damages: [Damage; 4] = [
        (
            "no tensors",
            |d| fs::remove_file(d.join("adapter_model.safetensors")).unwrap(),
            &["adapter_model.safetensors"],
        ),
        ("cut tensors", |d| cut(&d.join("adapter_model.safetensors"), 1000), &["adapter_model.safetensors"]),
        ("cut config", |d| cut(&d.join("adapter_config.json"), 50), &["adapter_config.json"]),
        ("cut manifest", |d| cut(&d.join("litgpt.json"), 50), &["litgpt.json"]),
    ];
    for (name, damage, says) in damages {
        eprintln!("{name}");
        let bad = dir.path().join("bad");
        fs::create_dir(&bad).unwrap();
        for file in names(&dir.path().join("out/final")) {
            fs::copy(dir.path().join("out/final").join(&file), bad.join(&file)).unwrap();
        }
        damage(&bad);
        let before = names(&bad);
        for command in ["generate", "merge_lora"] {
            let ran = litgpt(dir.path(), [command, "bad"]).refused(1, says);
            assert!(!ran.stderr.contains("download"), "{name}: an adapter is not downloaded: {}", ran.stderr);
        }
        assert_eq!(names(&bad), before, "{name}: something was written");
        fs::remove_dir_all(&bad).unwrap();
    }
}

#[test]
fn bad_datasets_are_named_by_file_and_row() {
    let row = r#"{"instruction": "a", "output": "b"}"#;
    let other = r#"{"prompt": "a", "answer": "b"}"#;
    for (file, text, says) in [
        ("none.json", None, &["none.json"][..]),
        ("d.json", Some("hello".to_owned()), &["d.json", "line 1", "not JSON"]),
        (
            "d.json",
            Some(format!("[{row}, {other}]")),
            &["d.json", "row 2", "`instruction`, `output`", "prompt, answer"],
        ),
        ("d.jsonl", Some(format!("{row}\n{other}\n")), &["d.jsonl", "line 2", "`instruction`, `output`"]),
        ("d.json", Some(r#"[{"instruction": "a", "output": [3]}]"#.to_owned()), &["d.json", "row 1", "`output`"]),
        ("d.json", Some("[]".to_owned()), &["d.json", "no rows"]),
        ("d.json", Some(String::new()), &["d.json", "empty"]),
        ("d.csv", Some("a,b".to_owned()), &["d.csv", "no rows"]),
        ("d.csv", Some("a,b\n1,2\n".to_owned()), &["d.csv", "line 2", "a, b"]),
        ("d.toml", Some("a,b".to_owned()), &["d.toml", ".jsonl"]),
    ] {
        let dir = tempfile::tempdir().unwrap();
        if let Some(text) = text {
            fs::write(dir.path().join(file), text).unwrap();
        }
        let before = names(dir.path());
        finetune(dir.path(), &tiny(), &format!("--data.json_path {file}")).refused(1, says);
        assert_eq!(names(dir.path()), before, "{file}: something was written");
    }
}

#[test]
fn a_datasets_escape_codes_do_not_reach_the_terminal() {
    let dir = tempfile::tempdir().unwrap();
    let rows = json!([{"instruction": "a\u{1b}[31m\u{7}\tb", "output": "c\u{1b}]0;x\u{7}d"}]);
    fs::write(dir.path().join("d.json"), rows.to_string()).unwrap();
    let said = finetune(dir.path(), &tiny(), "--data.json_path d.json --dry_run").ok().stderr;
    assert!(said.contains("[31m") && !said.chars().any(|c| c.is_control() && c != '\n' && c != '\t'), "{said:?}");
}

#[test]
fn conversations_that_no_style_can_write_are_named_by_file_and_row() {
    let dir = tempfile::tempdir().unwrap();
    let model = dir.path().join("model");
    copy_tiny(&model);
    let refusing = "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'tool' %}{{ raise_exception('no tools here') }}\
                    {% endif %}{{ m['content'] }}{% endfor %}{{ eos_token }}";
    fs::write(model.join("chat_template.jinja"), refusing).unwrap();
    let turn = |role: &str| json!({"role": role, "content": "x"});
    let row = |role: &str| json!({"messages": [turn("user"), turn(role), turn("assistant")]}).to_string();
    let rows = [row("user"), row("user"), row("tool"), row("user"), row("tool")].join("\n");
    fs::write(dir.path().join("d.jsonl"), rows).unwrap();
    let flags = "--data.json_path d.jsonl --data.val_split_fraction 0 --data.seed 3";
    let place = ["`d.jsonl` line ", "tool"];
    finetune(dir.path(), &model, flags).refused(1, &place);
    let says = ["`d.jsonl` line ", "no tools here"];
    finetune(dir.path(), &model, &format!("{flags} --data.prompt_style chat")).refused(1, &says);
}

#[test]
fn samples_that_teach_nothing_are_left_out_or_refused() {
    let dir = tempfile::tempdir().unwrap();
    let says = ["instructions_tiny.json", "row", "masked", "--train.max_seq_length"];
    finetune(dir.path(), &tiny(), "--data.mask_prompt true --train.max_seq_length 12").refused(1, &says);
    assert!(names(dir.path()).is_empty());
    // Two of the rows fill the sample with their prompt.
    let row = |i: usize| json!({"instruction": format!("Say {i}.{}", " fox".repeat(60 * usize::from(i % 15 == 7))), "output": "Yes."});
    let rows: Vec<Value> = (0..30).map(row).collect();
    fs::write(dir.path().join("rows.json"), json!(rows).to_string()).unwrap();
    let flags = "--data.json_path rows.json --data.mask_prompt true --train.max_seq_length 80";
    let ran = finetune(dir.path(), &tiny(), flags).ok();
    let warnings: Vec<&str> = ran.stderr.lines().filter(|line| line.starts_with("warning: ")).collect();
    assert_eq!(warnings.len(), 1, "{}", ran.stderr);
    assert!(warnings[0].contains("2 of 30 samples") && warnings[0].contains("`rows.json` row 8;"), "{}", ran.stderr);
}

#[test]
fn a_prompt_beyond_the_context_is_refused() {
    let (dir, tiny) = (tempfile::tempdir().unwrap(), tiny());
    let prompt = "fox ".repeat(600);
    litgpt(dir.path(), ["generate", tiny.to_str().unwrap(), "--prompt", &prompt]).refused(1, &["512", "shorten"]);
}

#[test]
fn out_dir_has_to_be_a_folder() {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("taken"), "a file").unwrap();
    for out in ["taken", "taken/inside"] {
        finetune(dir.path(), &tiny(), &format!("--out_dir {out}")).refused(1, &["taken"]);
    }
    assert_eq!(fs::read_to_string(dir.path().join("taken")).unwrap(), "a file");
    assert_eq!(names(dir.path()), ["taken"]);
}

#[cfg(unix)]
#[test]
fn out_dir_has_to_be_writable() {
    use std::os::unix::fs::PermissionsExt;
    let dir = tempfile::tempdir().unwrap();
    let locked = dir.path().join("locked");
    fs::create_dir(&locked).unwrap();
    fs::set_permissions(&locked, fs::Permissions::from_mode(0o555)).unwrap();
    if fs::write(locked.join("probe"), "").is_ok() {
        eprintln!("skipped: root may write everywhere");
        return;
    }
    for out in ["locked", "locked/inside"] {
        finetune(dir.path(), &tiny(), &format!("--out_dir {out}")).refused(1, &["locked"]);
    }
    fs::set_permissions(&locked, fs::Permissions::from_mode(0o755)).unwrap();
    assert!(names(&locked).is_empty());
}

/// README.md names every model type that is read, and no flag that there is not.
#[test]
fn the_readme_is_true() {
    let readme = fs::read_to_string(root().join("README.md")).unwrap();
    let dir = tempfile::tempdir().unwrap();
    copy_tiny(&dir.path().join("model"));
    edit_config(&dir.path().join("model"), "model_type", json!("nope"));
    let ran = litgpt(dir.path(), ["generate", "model"]).refused(1, &["nope"]);
    let (_, types) = ran.stderr.split_once("one of these types: ").unwrap();
    for model_type in types.lines().next().unwrap().split(", ") {
        assert!(readme.contains(&format!("`{model_type}`")), "`{model_type}` is not in README.md");
    }

    let cargo = ["--release", "--path", "--features"];
    let helps: String = COMMANDS.iter().map(|command| help(command) + "\n").collect();
    let ends = |c: char| !c.is_ascii_alphanumeric() && !"_.-".contains(c);
    let known: Vec<&str> = helps.split(ends).filter(|word| word.starts_with("--")).collect();
    let is_flag =
        |word: &&str| word.strip_prefix("--").is_some_and(|name| name.starts_with(|c: char| c.is_alphabetic()));
    for flag in readme.split(ends).filter(is_flag) {
        let flag = flag.trim_end_matches(['.', '-']);
        let listed = known.iter().any(|other| other.trim_end_matches('.') == flag);
        assert!(cargo.contains(&flag) || listed, "README.md: no flag `{flag}`");
    }
}
