//! Runs that are stopped and resumed come to what an undisturbed run comes to, bit for bit; what would not is refused.
#![allow(clippy::unwrap_used)]

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use crate::util::{content, copy_tiny, dataset, finetune, litgpt, metrics, names, tiny};

const RUN: &str =
    "--lora_dropout 0.1 --train.max_steps 10 --train.save_interval 3 --eval.interval 4 --eval.max_iters 2";

/// Starts the run of [`finetune`] without waiting for it.
fn start(cwd: &Path, more: &str) -> Child {
    let fixed = format!(
        "finetune lora --checkpoint_dir {} --data JSON --data.json_path {} --lora_key true --lora_projection true \
         --lora_mlp true --lr 2e-3 --train.global_batch_size 8 --train.micro_batch_size 4 --train.lr_warmup_steps 1 \
         --eval.max_new_tokens 4 --out_dir out {more}",
        tiny().display(),
        dataset().display()
    );
    let mut command = Command::new(env!("CARGO_BIN_EXE_litgpt"));
    command.args(fixed.split_whitespace()).current_dir(cwd).stdout(Stdio::null()).stderr(Stdio::null());
    command.spawn().unwrap()
}

/// Losses by step and kind, without the columns that hold durations.
fn losses(out: &Path) -> Vec<BTreeMap<String, String>> {
    let mut rows = metrics(out);
    for row in &mut rows {
        row.remove("iter_time");
        row.remove("tokens_per_s");
    }
    rows
}

/// The bytes that training decides.
fn result(out: &Path) -> [Vec<u8>; 2] {
    ["adapter_model.safetensors", "training_state.safetensors"]
        .map(|name| fs::read(out.join("final").join(name)).unwrap())
}

/// SplitMix64.
fn random(state: &mut u64) -> u64 {
    *state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let z = (*state ^ (*state >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z ^ (z >> 27)
}

#[test]
fn resuming_at_any_saved_step_is_exact() {
    for precision in ["32-true", "bf16-true"] {
        let dir = tempfile::tempdir().unwrap();
        finetune(dir.path(), &tiny(), &format!("{RUN} --precision {precision}")).ok();
        let out = dir.path().join("out");
        let (expected, rows) = (result(&out), losses(&out));
        for step in ["step-000003", "step-000006", "step-000009"] {
            let ran = finetune(dir.path(), &tiny(), &format!("{RUN} --precision {precision} --resume out/{step}")).ok();
            assert!(ran.stderr.contains("resuming from"), "{ran:#?}");
            assert!(result(&out) == expected, "{precision} from {step}");
            assert_eq!(losses(&out), rows, "{precision} from {step}");
        }
    }
}

/// `LITGPT_KILL_RUNS` sets how many runs are stopped.
#[test]
#[cfg(unix)]
fn killed_at_random_moments_the_result_is_the_same() {
    let runs: usize = std::env::var("LITGPT_KILL_RUNS").ok().and_then(|n| n.parse().ok()).unwrap_or(10);
    let more = "--lora_dropout 0.1 --train.max_steps 30 --train.save_interval 1 --eval.interval 7 --eval.max_iters 2";
    let dir = tempfile::tempdir().unwrap();
    let begun = std::time::Instant::now();
    assert!(start(dir.path(), more).wait().unwrap().success());
    let whole_ms = begun.elapsed().as_millis() as u64;
    let out = dir.path().join("out");
    let (expected, rows) = (result(&out), losses(&out));
    let (mut stopped, mut finished, mut state) = (0, 0, 1);
    let mut codes: BTreeMap<String, usize> = BTreeMap::new();
    fs::remove_dir_all(&out).unwrap();
    while stopped < runs || finished == 0 {
        let mut child = start(dir.path(), &format!("{more} --resume auto"));
        if stopped < runs {
            std::thread::sleep(Duration::from_millis(random(&mut state) % whole_ms.max(1)));
            let (signal, code) =
                [("-KILL", None), ("-INT", Some(130)), ("-TERM", Some(143))][random(&mut state) as usize % 3];
            let _ = Command::new("kill").args([signal, &child.id().to_string()]).stderr(Stdio::null()).status();
            let status = child.wait().unwrap();
            stopped += 1;
            *codes.entry(format!("{signal} {status}")).or_default() += 1;
            // Before it listens, a signal ends the process as it does any; after its end, it is too late.
            assert!(status.success() || status.code().is_none() || status.code() == code, "{signal}: {status}");
        } else {
            assert!(child.wait().unwrap().success());
        }
        if out.join("final").is_dir() {
            finished += 1;
            assert!(result(&out) == expected, "after {stopped} stopped runs");
            assert_eq!(losses(&out), rows, "after {stopped} stopped runs");
            let hidden: Vec<String> =
                names(&out).into_iter().filter(|n| n.starts_with(".partial") || n.starts_with(".replaced")).collect();
            assert!(hidden.is_empty() || stopped < runs, "{hidden:?}");
            fs::remove_dir_all(&out).unwrap();
        }
    }
    println!("{stopped} runs stopped, {finished} results, all equal: {codes:?}");
}

#[test]
#[cfg(unix)]
fn signals_save_and_say_how_to_go_on() {
    let dir = tempfile::tempdir().unwrap();
    for (signal, code) in [("-INT", 130), ("-TERM", 143), ("-HUP", 129)] {
        let mut child = start(dir.path(), "--train.max_steps 100000 --train.epochs 1000 --eval.final_validation false");
        let metrics = dir.path().join("out/metrics.csv");
        let begun = std::time::Instant::now();
        while fs::read_to_string(&metrics).map_or(0, |text| text.lines().count()) < 4 {
            assert!(begun.elapsed() < Duration::from_secs(120));
            std::thread::sleep(Duration::from_millis(20));
        }
        let busy = finetune(dir.path(), &tiny(), "");
        busy.refused(1, &["another run", &child.id().to_string()]);
        Command::new("kill").args([signal, &child.id().to_string()]).status().unwrap();
        assert_eq!(child.wait().unwrap().code(), Some(code));
        assert!(names(&dir.path().join("out")).iter().any(|name| name.starts_with("step-")));
        fs::remove_dir_all(dir.path().join("out")).unwrap();
    }
}

#[test]
fn what_would_not_be_exact_is_refused_with_a_list() {
    let dir = tempfile::tempdir().unwrap();
    let base = dir.path().join("base");
    copy_tiny(&base);
    finetune(dir.path(), &base, RUN).ok();
    fs::remove_dir_all(dir.path().join("out/final")).unwrap();
    let before = content(&dir.path().join("out"));
    finetune(dir.path(), &base, &format!("{RUN} --resume auto --lr 1e-3 --lora_dropout 0.2"))
        .refused(1, &["learning_rate` was 0.002, is 0.001", "lora_dropout` was 0.1, is 0.2", "--resume_force"]);
    let rows: Vec<serde_json::Value> = serde_json::from_str(&fs::read_to_string(dataset()).unwrap()).unwrap();
    let data = dir.path().join("fewer.json");
    fs::write(&data, serde_json::Value::from(rows[1..].to_vec()).to_string()).unwrap();
    let changed = format!("{RUN} --resume auto --data.json_path {}", data.display());
    finetune(dir.path(), &base, &changed).refused(1, &["samples changed"]);
    fs::write(base.join("config.json"), fs::read_to_string(base.join("config.json")).unwrap() + "\n").unwrap();
    finetune(dir.path(), &base, &format!("{RUN} --resume auto")).refused(1, &["base model"]);
    let without_lock = |mut files: BTreeMap<_, _>| {
        files.remove(&dir.path().join("out/.lock"));
        files
    };
    assert_eq!(without_lock(content(&dir.path().join("out"))), without_lock(before), "a refused run changed files");
    finetune(dir.path(), &base, &format!("{changed} --resume_force true")).ok();
}

#[test]
fn a_changed_file_is_noticed() {
    let dir = tempfile::tempdir().unwrap();
    finetune(dir.path(), &tiny(), RUN).ok();
    let out = dir.path().join("out");
    // The adapter is checked first.
    for name in ["training_state.safetensors", "adapter_model.safetensors"] {
        let path = out.join("step-000009").join(name);
        let mut bytes = fs::read(&path).unwrap();
        let last = bytes.len() - 1;
        bytes[last] ^= 1;
        fs::write(&path, &bytes).unwrap();
        finetune(dir.path(), &tiny(), &format!("{RUN} --resume out/step-000009"))
            .refused(1, &[name, "not what was written"]);
    }
    litgpt(dir.path(), ["generate", "--checkpoint_dir", "out/step-000009"])
        .refused(1, &["adapter_model.safetensors", "not what was written"]);
    fs::remove_dir_all(out.join("final")).unwrap();
    let ran = finetune(dir.path(), &tiny(), &format!("{RUN} --resume auto")).ok();
    assert!(ran.stderr.contains("not resuming from") && ran.stderr.contains("step-000006 at step 6"), "{ran:#?}");
    finetune(dir.path(), &tiny(), &format!("{RUN} --resume nowhere")).refused(1, &["nowhere", "training_state.json"]);
    finetune(dir.path(), &tiny(), &format!("{RUN} --resume true --out_dir other")).refused(1, &["nothing to resume"]);
}
