//! One test for each thing that users of LitGPT and its peers suffered from, named for it and numbered as in the list of
//! complaints; those without a number are from its end.
#![allow(clippy::unwrap_used)]

use std::fs;
use std::path::Path;

use candle_core::quantized::gguf_file::Content;
use litgpt::data::chat::{ChatTemplate, Message};
use litgpt::data::prompt::PromptStyle;
use litgpt::tokenizer::{AddBos, Tokenizer};
use serde_json::Value;

use crate::util::{
    Ran, column, content, copy_tiny, dataset, finetune, floats, greedy, litgpt, names, result, tensors, tiny,
};

const PROMPT: &str = "Describe a fox.";

/// `litgpt LINE`, with TINY for the quickstart's model and DATA for its dataset.
fn run(cwd: &Path, line: &str) -> Ran {
    let (tiny, data) = (tiny().display().to_string(), dataset().display().to_string());
    let words = line.split_whitespace().map(|word| word.replace("TINY", &tiny).replace("DATA", &data));
    litgpt(cwd, words)
}

/// The quickstart's model as `name` in `cwd`, with its tokenizer_config.json changed.
fn model_with(cwd: &Path, name: &str, change: impl Fn(&mut Value)) {
    copy_tiny(&cwd.join(name));
    let path = cwd.join(name).join("tokenizer_config.json");
    let mut config: Value = serde_json::from_str(&fs::read_to_string(&path).unwrap()).unwrap();
    change(&mut config);
    fs::write(path, config.to_string()).unwrap();
}

fn adapter(out: &Path) -> Vec<u8> {
    fs::read(out.join("final/adapter_model.safetensors")).unwrap()
}

/// Whether the adapter moved away from where adapters begin.
fn learned(out: &Path) -> bool {
    let tensors = tensors(&out.join("final/adapter_model.safetensors"));
    tensors.iter().any(|(name, b)| name.contains("lora_B") && floats(b).iter().any(|v| *v != 0.0))
}

/// `n` rows of a dataset whose answers grow from one to `n` words.
fn uneven(n: usize) -> String {
    let row =
        |i: usize| format!("{{\"instruction\": \"Count to {i}.\", \"output\": \"{}\"}}\n", "one ".repeat(i).trim());
    (1..=n).map(row).collect()
}

#[test]
fn pain_01_learning_rate_from_the_command_line() {
    let dir = tempfile::tempdir().unwrap();
    let recipe = "optimizer:\n  class_path: torch.optim.AdamW\n  init_args:\n    lr: 0.0002\n";
    fs::write(dir.path().join("r.yaml"), recipe).unwrap();
    for flags in [
        "--lr 0.01",
        "--train.learning_rate 0.01",
        "--optimizer.lr 0.01",
        "--optimizer.init_args.lr 0.01",
        "--optimizer AdamW --optimizer.lr 0.01",
        "--optimizer {\"class_path\":\"torch.optim.AdamW\",\"init_args\":{\"lr\":0.01}}",
    ] {
        for line in [format!("{flags} --config r.yaml"), format!("--config r.yaml {flags}"), flags.to_owned()] {
            let printed = run(dir.path(), &format!("finetune_lora TINY {line} --print_config")).ok().stdout;
            assert_eq!(printed.lines().filter(|l| l.trim() == "lr: 0.01").count(), 1, "{line}: {printed}");
        }
    }
    // What is asked for is said, used and recorded.
    let ran = finetune(dir.path(), &tiny(), "--optimizer.lr 0.01 --config r.yaml --train.lr_warmup_steps 0").ok();
    assert!(ran.stderr.contains("lr 1e-2"), "{}", ran.stderr);
    assert_eq!(column(&dir.path().join("out"), "learning_rate")[0], 0.01);
    // A key that nobody reads is an error.
    run(dir.path(), "finetune_lora TINY --optimizer.lrr 0.01").refused(2, &["--optimizer.lrr", "did you mean"]);
    fs::write(dir.path().join("r.yaml"), "optimizer:\n  lrr: 1\n").unwrap();
    run(dir.path(), "finetune_lora TINY --config r.yaml").refused(2, &["optimizer.lrr", "did you mean"]);
}

#[test]
fn pain_02_qlora_by_its_documented_command() {
    let dir = tempfile::tempdir().unwrap();
    for (out, name) in [("a", "bnb.nf4"), ("b", "nf4")] {
        finetune(dir.path(), &tiny(), &format!("--quantize {name} --out_dir {out}")).ok();
    }
    assert!(learned(&dir.path().join("a")) && adapter(&dir.path().join("a")) == adapter(&dir.path().join("b")));
    let wrong = ["nf5", "nf4", "did you mean"];
    run(dir.path(), "finetune_lora TINY --quantize nf5").refused(2, &wrong);
    run(dir.path(), "generate TINY --quantize nf5").refused(2, &wrong);
}

#[test]
fn pain_05_a_stopped_run_goes_on() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("out");
    let more = "--train.max_steps 4 --train.save_interval 2 --lora_dropout 0.1 --resume auto";
    finetune(dir.path(), &tiny(), more).ok();
    let whole = result(&out);
    for gone in ["final", "step-000004"] {
        fs::remove_dir_all(out.join(gone)).unwrap();
    }
    let ran = finetune(dir.path(), &tiny(), more).ok();
    assert!(ran.stderr.contains("resuming from out/step-000002"), "{}", ran.stderr);
    assert!(result(&out) == whole, "resumed, the run ends elsewhere");
}

#[test]
fn pain_06_adapters_are_not_locked_in() {
    let dir = tempfile::tempdir().unwrap();
    finetune(dir.path(), &tiny(), "").ok();
    let last = dir.path().join("out/final");
    let config: Value = serde_json::from_str(&fs::read_to_string(last.join("adapter_config.json")).unwrap()).unwrap();
    assert_eq!((config["peft_type"].as_str(), config["r"].as_u64()), (Some("LORA"), Some(8)));
    assert!(tensors(&last.join("adapter_model.safetensors")).keys().all(|name| name.starts_with("base_model.model.")));
    // Merged, it is a folder that needs nothing else: neither the base nor the adapter.
    run(dir.path(), "merge_lora out/final --out_dir merged").ok();
    for file in ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"] {
        assert!(names(&dir.path().join("merged")).contains(&file.to_owned()), "no {file}");
    }
    let answer = greedy(dir.path(), "out/final", PROMPT);
    fs::remove_dir_all(dir.path().join("out")).unwrap();
    assert_eq!(greedy(dir.path(), "merged", PROMPT), answer);
    run(dir.path(), "validate merged").ok();
}

/// What runs a GGUF file asks in the words of the training, not of the base.
#[test]
fn pain_07_a_gguf_file_has_the_template_of_the_training() {
    let dir = tempfile::tempdir().unwrap();
    model_with(dir.path(), "base", |config| {
        config["chat_template"] = "{% for m in messages %}[{{ m.role }}] {{ m.content }}{% endfor %}[assistant] ".into()
    });
    for style in ["alpaca", "chat"] {
        let more = format!("--out_dir {style} --data.prompt_style {style} --train.max_steps 1");
        finetune(dir.path(), Path::new("base"), &more).ok();
        run(dir.path(), &format!("merge_lora {style}/final --format gguf --out_dir {style}.gguf")).ok();
        let mut file = fs::File::open(dir.path().join(format!("{style}.gguf/model-f16.gguf"))).unwrap();
        let read = Content::read(&mut file).unwrap();
        let template = read.metadata["tokenizer.chat_template"].to_string().unwrap();
        let template = ChatTemplate::new(Path::new("gguf"), template, "<s>", "</s>").unwrap();
        let trained = PromptStyle::resolve(style, &Tokenizer::load(&dir.path().join("base")).unwrap()).unwrap();
        let text = template.render(&[Message::new("user", PROMPT)], true).unwrap();
        assert_eq!(text, trained.apply(PROMPT, None, None).unwrap(), "{style}");
        assert_eq!(read.metadata["tokenizer.ggml.eos_token_id"].to_u32().unwrap(), 1);
    }
}

/// A `messages` file trains as it is: every answer is learned, the rest is masked.
#[test]
fn pain_08_messages_are_recognized() {
    let dir = tempfile::tempdir().unwrap();
    let row = r#"{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"},
        {"role": "user", "content": "Bye"}, {"role": "assistant", "content": "Now"}]}"#
        .replace('\n', " ");
    fs::write(dir.path().join("chat.jsonl"), format!("{row}\n").repeat(40)).unwrap();
    let ran = finetune(dir.path(), &tiny(), "--data.json_path chat.jsonl --data.prompt_style chatml").ok();
    assert!(ran.stderr.contains("«Ho") && ran.stderr.contains("«Now"), "{}", ran.stderr);
}

/// A wrong row is named by file and line, with the keys that it has.
#[test]
fn pain_08_a_wrong_row_is_named() {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("d.jsonl"), "{\"text\": \"a\"}\n{\"body\": \"b\"}\n").unwrap();
    let says = ["d.jsonl", "line 2", "found: body"];
    finetune(dir.path(), &tiny(), "--data.json_path d.jsonl").refused(1, &says);
}

/// LitGPT decides by the folder's name whether texts begin with BOS.
#[test]
fn pain_09_the_folders_name_changes_no_token() {
    let dir = tempfile::tempdir().unwrap();
    for name in ["Llama-3.2-1B", "SmolLM2-135M", "plain"] {
        copy_tiny(&dir.path().join(name));
        finetune(dir.path(), Path::new(name), &format!("--out_dir out/{name}")).ok();
        assert!(adapter(&dir.path().join("out").join(name)) == adapter(&dir.path().join("out/Llama-3.2-1B")), "{name}");
    }
    let answer = greedy(dir.path(), "out/plain/final", PROMPT);
    fs::rename(dir.path().join("out/plain/final"), dir.path().join("Llama-3-8B-Instruct")).unwrap();
    assert_eq!(greedy(dir.path(), "Llama-3-8B-Instruct", PROMPT), answer);
    run(dir.path(), "merge_lora Llama-3-8B-Instruct --out_dir SmolLM2-135M-Instruct --precision 32-true").ok();
    assert_eq!(greedy(dir.path(), "SmolLM2-135M-Instruct", PROMPT), answer);
}

/// What the training said about style and BOS is used without being asked for, by every command.
#[test]
fn pain_09_style_and_bos_are_those_of_the_training() {
    let dir = tempfile::tempdir().unwrap();
    finetune(dir.path(), &tiny(), "--data.prompt_style phi-2 --add_bos off --train.max_steps 12").ok();
    let ask = |more: &str| {
        let line = format!("generate out/final --temperature 0 --max_new_tokens 24 --prompt fox {more}");
        run(dir.path(), &line).ok().stdout
    };
    assert_eq!(ask(""), ask("--prompt_style phi-2"));
    assert_ne!(ask(""), ask("--prompt_style alpaca"));
    let manifest = fs::read_to_string(dir.path().join("out/final/litgpt.json")).unwrap();
    assert!(manifest.contains("\"add_bos\": false") && manifest.contains("\"prompt_style\": \"phi-2\""), "{manifest}");
    let changed = manifest.replace("\"add_bos\": false", "\"add_bos\": true");
    let without = ask("");
    fs::write(dir.path().join("out/final/litgpt.json"), changed).unwrap();
    assert_ne!(ask(""), without, "the recorded BOS policy is not read");
}

/// Fewer rows than a step asks for: LitGPT takes no step, and says that it has merged the weights.
#[test]
fn pain_11_two_rows_are_a_step() {
    let dir = tempfile::tempdir().unwrap();
    fs::create_dir(dir.path().join("d")).unwrap();
    fs::write(dir.path().join("d/train.jsonl"), uneven(2)).unwrap();
    fs::write(dir.path().join("d/val.jsonl"), uneven(1)).unwrap();
    let line = "finetune lora --checkpoint_dir TINY --data JSON --data.json_path d --train.epochs 1 --out_dir out";
    run(dir.path(), line).ok();
    let out = dir.path().join("out");
    assert_eq!(column(&out, "loss").len(), 1);
    assert!(learned(&out), "a step was counted and nothing was learned");
    assert_eq!(column(&out, "learning_rate"), [2e-4], "the warm-up of 100 steps is cut to the run");
}

#[test]
fn pain_11_every_warm_up_runs_and_reaches_the_rate() {
    let dir = tempfile::tempdir().unwrap();
    let rates = |more: &str| {
        let ran = finetune(dir.path(), &tiny(), &format!("--lr 0.002 --train.max_steps 3 {more}")).ok();
        (column(&dir.path().join("out"), "learning_rate"), ran.stderr)
    };
    for warmup in [0, 1, 3, 100] {
        let (rates, said) = rates(&format!("--train.lr_warmup_steps {warmup}"));
        assert!(rates.iter().all(|rate| *rate > 0.0) && rates.contains(&0.002), "{warmup}: {rates:?}");
        assert_eq!(said.contains("warm-up of 100 steps is long for 3 steps"), warmup == 100, "{said}");
    }
    let (held, _) = rates("--train.lr_warmup_steps 0 --train.min_lr 0.002");
    assert_eq!(held, [0.002; 3], "min_lr is not used");
    finetune(dir.path(), &tiny(), "--train.global_batch_size 2 --train.micro_batch_size 4")
        .refused(2, &["train.global_batch_size", "(2)", "train.micro_batch_size", "(4)"]);
}

/// The mean of the micro batches' means weighs short answers more; here every learned token weighs the same.
#[test]
fn pain_12_the_loss_does_not_depend_on_the_split_into_micro_batches() {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("d.jsonl"), uneven(20)).unwrap();
    let same = "--data.json_path d.jsonl --data.mask_prompt true --data.val_split_fraction 0.4 --lora_dropout 0 \
                --train.max_steps 1 --train.lr_warmup_steps 0 --train.global_batch_size 8 --optimizer.eps 0.01";
    let figures = |micro: usize| {
        let more = format!("{same} --train.micro_batch_size {micro} --out_dir {micro}");
        finetune(dir.path(), &tiny(), &more).ok();
        let out = dir.path().join(micro.to_string());
        ["loss", "grad_norm", "val_loss"].map(|name| column(&out, name)[0])
    };
    let one = figures(1);
    for micro in [2, 4, 8] {
        for (a, b) in one.iter().zip(figures(micro)) {
            assert!((a - b).abs() < 1e-4 * a, "micro batch {micro}: {a} and {b}");
        }
    }
}

#[test]
fn pain_13_merging_is_asked_for_and_finds_a_moved_base() {
    let dir = tempfile::tempdir().unwrap();
    copy_tiny(&dir.path().join("base"));
    finetune(dir.path(), Path::new("base"), "--quantize nf4").ok();
    let saved = names(&dir.path().join("out/final"));
    assert!(!saved.iter().any(|name| name.starts_with("model") || name.starts_with("lit_model") || name == "merged"));
    let answer = greedy(dir.path(), "out/final", PROMPT);
    fs::rename(dir.path().join("base"), dir.path().join("moved")).unwrap();
    run(dir.path(), "merge_lora out/final").refused(1, &["base model", "/base`"]);
    run(dir.path(), "merge_lora out/final --pretrained_checkpoint_dir moved --precision 32-true").ok();
    // Merging what was trained in 4 bits shifts no answer.
    assert_eq!(greedy(dir.path(), "out/final/merged", PROMPT), answer);
}

#[test]
fn pain_14_any_folder_is_a_model_and_none_is_converted() {
    let dir = tempfile::tempdir().unwrap();
    copy_tiny(&dir.path().join("my own/model_v2"));
    let before = content(&dir.path().join("my own"));
    let base = Path::new("my own/model_v2").display().to_string();
    let data = dataset().display().to_string();
    let words = ["finetune_lora", &base, "--data", &data, "--train.max_steps", "1", "--out_dir", "out"];
    litgpt(dir.path(), words).ok();
    assert!(!greedy(dir.path(), &base, PROMPT).is_empty() && !greedy(dir.path(), "out/final", PROMPT).is_empty());
    assert!(content(&dir.path().join("my own")) == before, "the base was rewritten");
    assert!(!content(dir.path()).keys().any(|path| path.ends_with("lit_model.pth")));
}

#[test]
fn pain_15_old_spellings_mean_the_same() {
    let dir = tempfile::tempdir().unwrap();
    let printed = |line: &str| run(dir.path(), &format!("{line} --data Dolly --lora_r 3 --print_config")).ok().stdout;
    let want = printed("finetune_lora TINY");
    assert!(want.contains("lora_r: 3") && want.contains("litgpt.data.Dolly"), "{want}");
    for line in [
        "finetune lora --checkpoint_dir TINY",
        "finetune --checkpoint_dir TINY",
        "finetune lora TINY",
        "finetune-lora TINY",
        "finetune/lora.py --checkpoint_dir TINY",
    ] {
        assert_eq!(printed(line), want, "{line}");
    }
}

#[test]
fn pain_15_the_command_line_beats_the_file_wherever_it_stands() {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("x.yaml"), "checkpoint_dir: other\nlora_r: 4\ntrain:\n  epochs: 9\n").unwrap();
    for line in [
        "finetune_lora mine --train.epochs 2 --config x.yaml",
        "finetune lora --config x.yaml --checkpoint_dir mine --train.epochs 2",
        "-c x.yaml finetune_lora mine --train.epochs 2",
    ] {
        let printed = run(dir.path(), &format!("{line} --print_config")).ok().stdout;
        for part in ["checkpoint_dir: mine\n", "epochs: 2\n", "lora_r: 4\n"] {
            assert!(printed.contains(part), "{line}: no {part:?} in {printed}");
        }
    }
}

#[test]
fn pain_15_mistakes_are_one_line_with_what_was_meant() {
    let dir = tempfile::tempdir().unwrap();
    for (line, meant) in [
        ("finetune_lora x --data Dollly", "`Dolly`"),
        ("finetune_lora x --data JSON --data.json_pth y", "`--data.json_path`"),
        ("finetune_lora x --max_steps 3", "`--train.max_steps`"),
    ] {
        run(dir.path(), line).refused(2, &["did you mean", meant]);
    }
    run(dir.path(), "finetune_lora TINY --data Alpaca --data.json_path y")
        .refused(2, &["data.json_path", "Alpaca", "JSON"]);
    assert!(names(dir.path()).is_empty());
}

#[test]
fn pain_gradient_clipping() {
    let dir = tempfile::tempdir().unwrap();
    for (out, more) in [("free", ""), ("clipped", "--train.max_norm 1e-6")] {
        finetune(dir.path(), &tiny(), &format!("{more} --optimizer.eps 1 --out_dir {out}")).ok();
    }
    let learned = |out: &str| -> f64 {
        let tensors = tensors(&dir.path().join(out).join("final/adapter_model.safetensors"));
        let parts = tensors.iter().filter(|(name, _)| name.contains("lora_B"));
        parts.flat_map(|(_, b)| floats(b)).map(|v| f64::from(v).powi(2)).sum::<f64>().sqrt()
    };
    // With such an eps, AdamW's steps are as long as the gradient.
    assert!(learned("free") > 1e3 * learned("clipped"), "{} and {}", learned("free"), learned("clipped"));
}

#[test]
fn pain_early_stopping() {
    let dir = tempfile::tempdir().unwrap();
    let still = "--lr 1e-30 --eval.interval 1 --eval.max_iters 2 --train.max_steps 10";
    let ran = finetune(dir.path(), &tiny(), &format!("{still} --eval.early_stopping_patience 2")).ok();
    assert!(ran.stderr.contains("early stopping at step 3"), "{}", ran.stderr);
    assert_eq!(column(&dir.path().join("out"), "loss").len(), 3);
}

/// The bar of a run on a terminal says how long it will take, also where the window is narrow.
#[cfg(unix)]
#[test]
fn pain_no_word_of_when_it_ends() {
    let dir = tempfile::tempdir().unwrap();
    let mut command = std::process::Command::new(env!("CARGO_BIN_EXE_litgpt"));
    let line = "--train.max_steps 12 --train.micro_batch_size 1 --lora_r 2 --eval.max_new_tokens 1";
    command.args(["finetune_lora", &tiny().display().to_string(), "--data", &dataset().display().to_string()]);
    command.args(line.split(' ')).current_dir(dir.path()).env("TERM", "xterm");
    let mut terminal = rexpect::session::spawn_command(command, Some(60_000)).unwrap();
    terminal.exp_regex(r"train [^\r\n]*[0-9]+/192, [0-9]+[a-z]+ left").unwrap();
    terminal.exp_string("saved out/").unwrap();
}

#[test]
fn pain_characters_stream_whole() {
    let tokenizer = Tokenizer::load(&tiny()).unwrap();
    let text = "你好 😀 naïve, und 👩‍👩‍👧 auch";
    let ids = tokenizer.encode(text).unwrap();
    assert!(ids.len() > text.chars().count(), "no character of several tokens is tried");
    let mut stream = tokenizer.stream();
    let mut pieces: Vec<String> = ids.iter().filter_map(|id| stream.push(*id).unwrap()).collect();
    pieces.extend(stream.finish().unwrap());
    assert_eq!(pieces.concat(), text);
    assert!(pieces.len() > 5 && pieces.iter().all(|piece| !piece.contains('\u{fffd}')), "{pieces:?}");
}

#[test]
fn pain_bos_comes_once() {
    let dir = tempfile::tempdir().unwrap();
    model_with(dir.path(), "base", |config| {
        config["chat_template"] = "{{ bos_token }}{% for m in messages %}[{{ m.role }}] {{ m.content }}\
            {% if m.role == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}\
            {% if add_generation_prompt %}[assistant] {% endif %}"
            .into();
    });
    for (style, starts) in [("chat", "<s>[user] "), ("alpaca", "<s>Below is")] {
        for bos in ["auto", "on"] {
            let more = format!("--data.prompt_style {style} --add_bos {bos} --dry_run true");
            let said = finetune(dir.path(), Path::new("base"), &more).ok().stderr;
            assert!(said.contains(starts) && !said.contains("<s><s>"), "{style}, {bos}: {said}");
        }
    }
    let tokenizer = Tokenizer::load(&dir.path().join("base")).unwrap().with_bos(AddBos::Always);
    let bos = |ids: Vec<u32>| ids.iter().filter(|id| Some(**id) == tokenizer.bos_id()).count();
    for style in ["chat", "alpaca"] {
        let style = PromptStyle::resolve(style, &tokenizer).unwrap();
        assert_eq!(bos(style.prompt_ids(&tokenizer, &[Message::new("user", PROMPT)]).unwrap()), 1);
    }
    assert_eq!(bos(tokenizer.encode_prompt("<s>A text that brings its own").unwrap()), 1);
}

#[test]
fn pain_step_folders_are_models() {
    let dir = tempfile::tempdir().unwrap();
    finetune(dir.path(), &tiny(), "--train.save_interval 1 --train.max_steps 2 --lr 0.02").ok();
    let base = greedy(dir.path(), &tiny().display().to_string(), PROMPT);
    for step in ["out/step-000001", "out/step-000002"] {
        assert_ne!(greedy(dir.path(), step, PROMPT), base, "{step} answers as the base does");
    }
    run(dir.path(), "merge_lora out/step-000002 --out_dir merged --precision 32-true").ok();
    assert_eq!(greedy(dir.path(), "merged", PROMPT), greedy(dir.path(), "out/step-000002", PROMPT));
}

#[test]
fn pain_validation_data_in_its_own_file() {
    let dir = tempfile::tempdir().unwrap();
    fs::create_dir(dir.path().join("d")).unwrap();
    fs::write(dir.path().join("d/train.jsonl"), uneven(12)).unwrap();
    let val = |text: &str| {
        fs::write(dir.path().join("d/val.jsonl"), text).unwrap();
        let ran = finetune(dir.path(), &tiny(), "--data.json_path d --train.max_steps 1").ok();
        assert!(ran.stderr.contains("train: 12 samples"), "{}", ran.stderr);
        (column(&dir.path().join("out"), "loss"), column(&dir.path().join("out"), "val_loss"))
    };
    let (short, long) = (val(&uneven(2)), val(&uneven(9)));
    assert_eq!(short.0, long.0, "the validation file changed the training");
    assert_ne!(short.1, long.1);
    finetune(dir.path(), &tiny(), "--data.json_path d --data.val_split_fraction 0.1")
        .refused(2, &["val_split_fraction"]);
}
