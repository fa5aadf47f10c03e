//! What goes wrong from outside while a run trains: numbers that are none, full disks, folders that vanish, a terminal
//! that closes. Each ends in one clear line or does no harm, and what was saved is still there.
#![allow(clippy::unwrap_used, clippy::print_stderr)]

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
#[cfg(unix)]
use std::process::{Command, Stdio};
#[cfg(unix)]
use std::time::Duration;

use litgpt::tokenizer::Tokenizer;
use safetensors::Dtype;
use serde_json::{Value, json};

#[cfg(unix)]
use crate::util::{Ran, finetune_after, finetune_command, kill, wait_until};
use crate::util::{
    column, content, copy_tiny, finetune, floats, greedy, losses, metrics, names, result, tensors, tiny, write_tensors,
};

/// A run of ten steps that saves every third.
const RUN: &str = "--lora_dropout 0.1 --train.max_steps 10 --train.save_interval 3 --eval.interval 100";
/// A run that is long enough to be disturbed.
#[cfg(unix)]
const LONG: &str = "--lora_dropout 0.1 --train.max_steps 60 --train.save_interval 3 --eval.interval 1000";

/// The quickstart's model in which the embedding of `~`, a character that no row has, is not finite in f16. The head is its own, or
/// every logit would be NaN.
fn broken_model(to: &Path) {
    copy_tiny(to);
    let ids = Tokenizer::load(to).unwrap().encode("~").unwrap();
    let mut all = tensors(&to.join("model.safetensors"));
    let embedding = all["model.embed_tokens.weight"].clone();
    all.insert("lm_head.weight".to_owned(), embedding.clone());
    let (dtype, shape, mut bytes) = embedding;
    assert_eq!((dtype, ids.len()), (Dtype::BF16, 1));
    let row = 2 * shape[1];
    for value in bytes[ids[0] as usize * row..][..row].chunks_exact_mut(2) {
        // A million, which is finite in the file and not in f16.
        value.copy_from_slice(&0x4974_u16.to_le_bytes());
    }
    all.insert("model.embed_tokens.weight".to_owned(), (dtype, shape, bytes));
    write_tensors(&to.join("model.safetensors"), &all);
    let mut config: Value = serde_json::from_str(&fs::read_to_string(to.join("config.json")).unwrap()).unwrap();
    config["tie_word_embeddings"] = json!(false);
    fs::write(to.join("config.json"), config.to_string()).unwrap();
}

/// A folder of 12 training and 2 validation rows as `dir/data`; those that `breaks` answer with a `~`. Their prompts begin
/// alike for so long that this is computed once a step.
fn broken_data(dir: &Path, breaks: impl Fn(usize) -> bool) {
    let row = |n: usize, broken: bool| {
        let output = format!("The answer to {n} is {}.", if broken { "~" } else { "known" });
        let rules = "Answer politely, in plain words, and only what you know for certain. ".repeat(6);
        json!({"instruction": format!("{rules}Tell me about the number {n}."), "input": "", "output": output})
    };
    fs::create_dir_all(dir.join("data")).unwrap();
    let train: Vec<Value> = (1..=12).map(|n| row(n, breaks(n))).collect();
    fs::write(dir.join("data/train.json"), Value::from(train).to_string()).unwrap();
    fs::write(dir.join("data/val.json"), Value::from(vec![row(20, false), row(21, false)]).to_string()).unwrap();
}

const BROKEN: &str = "--precision 16-true --data.json_path data --train.max_steps null --train.epochs 2 --train.global_batch_size 3 \
                      --train.micro_batch_size 1 --lora_dropout 0.1 --train.save_interval 1 --eval.interval 2";

fn progress(folder: &Path) -> Value {
    let text = fs::read_to_string(folder.join("training_state.json")).unwrap();
    serde_json::from_str::<Value>(&text).unwrap()["progress"].clone()
}

#[test]
fn a_row_without_a_finite_loss_costs_its_step_and_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let (base, out) = (dir.path().join("base"), dir.path().join("out"));
    broken_model(&base);
    broken_data(dir.path(), |n| n == 5);
    let ran = finetune(dir.path(), &base, BROKEN).ok();
    let warnings: Vec<&str> = ran.stderr.lines().filter(|line| line.starts_with("warning: ")).collect();
    assert_eq!(warnings.len(), 2, "once in each epoch: {ran:#?}");
    assert!(warnings.iter().all(|line| line.ends_with("is skipped, the loss is NaN (training row 5)")), "{warnings:?}");
    assert!(ran.stderr.contains("done: 8 steps, 2 of them skipped"), "{ran:#?}");

    let rows: Vec<BTreeMap<String, String>> = metrics(&out).into_iter().filter(|row| !row["loss"].is_empty()).collect();
    let skipped: Vec<usize> =
        rows.iter().filter(|row| row["loss"] == "NaN").map(|r| r["step"].parse().unwrap()).collect();
    assert_eq!((rows.len(), skipped.len(), rows[7]["skipped"].as_str()), (8, 2, "2"));
    assert!(column(&out, "val_loss").iter().all(|loss| loss.is_finite()));
    assert_eq!(
        (&progress(&out.join("final"))["skipped"], &progress(&out.join("final"))["step"]),
        (&json!(2), &json!(8))
    );
    for step in skipped {
        let state = |step: usize| fs::read(out.join(format!("step-{step:06}/training_state.safetensors"))).unwrap();
        let same = step == 1 || state(step) == state(step - 1);
        assert!(same && state(step) != state(step % 8 + 1), "step {step} moved parameters or moments");
        assert_eq!(progress(&out.join(format!("step-{step:06}")))["skipped_in_a_row"], 1);
    }
    for (name, tensor) in tensors(&out.join("final/adapter_model.safetensors")) {
        assert!(floats(&tensor).iter().all(|value| value.is_finite()), "{name}");
    }
    let (expected, rows) = (result(&out), losses(&out));
    for step in 1..8 {
        finetune(dir.path(), &base, &format!("{BROKEN} --resume out/step-{step:06}")).ok();
        assert!(result(&out) == expected && losses(&out) == rows, "resumed at step {step}");
    }
}

#[test]
fn too_many_skipped_steps_in_a_row_end_the_run() {
    let dir = tempfile::tempdir().unwrap();
    let (base, out) = (dir.path().join("base"), dir.path().join("out"));
    broken_model(&base);
    broken_data(dir.path(), |_| false);
    finetune(dir.path(), &base, BROKEN).ok();
    let saved = content(&out.join("step-000003"));
    broken_data(dir.path(), |_| true);
    let more = format!("{BROKEN} --train.epochs 4 --resume out/step-000003 --resume_force true");
    let says =
        ["2 steps in a row", "at the last one, step 5, the loss is NaN (training rows ", "--lr", "--resume auto"];
    finetune(dir.path(), &base, &format!("{more} --train.max_skipped_steps 2")).refused(1, &says);
    assert_eq!(content(&out.join("step-000003")), saved);

    let anew = format!("{BROKEN} --out_dir new --train.save_total_limit 1");
    finetune(dir.path(), &base, &anew).refused(1, &["5 steps in a row", "step 5"]);
    let new = dir.path().join("new");
    // In a row of skipped steps nothing older is given up; the count goes on where it stood.
    assert_eq!(names(&new).iter().filter(|name| name.starts_with("step-")).count(), 4);
    assert_eq!(progress(&new.join("step-000004"))["skipped_in_a_row"], 4);
    finetune(dir.path(), &base, &format!("{anew} --resume auto")).refused(1, &["5 steps in a row", "step 5"]);
    finetune(dir.path(), &base, &format!("{anew} --train.max_skipped_steps 1"))
        .refused(1, &["step 1 cannot be taken: the loss is NaN"]);
}

#[test]
fn a_broken_validation_row_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let base = dir.path().join("base");
    broken_model(&base);
    broken_data(dir.path(), |_| false);
    let text = fs::read_to_string(dir.path().join("data/val.json")).unwrap();
    fs::write(dir.path().join("data/val.json"), text.replace("21 is known", "21 is ~")).unwrap();
    finetune(dir.path(), &base, BROKEN).refused(1, &["validation loss is NaN after step 2 (validation row 2)"]);
    assert!(dir.path().join("out/step-000001").is_dir());
}

/// A file system of `mb` MB at `at`, gone when dropped; `None` where that is not permitted.
#[cfg(unix)]
struct SmallDisk<'a>(&'a Path);

#[cfg(unix)]
impl<'a> SmallDisk<'a> {
    fn mount(at: &'a Path, options: &str) -> Option<Self> {
        let mut command = Command::new("mount");
        command.args(["-t", "tmpfs", "-o", options, "tmpfs"]).arg(at).stderr(Stdio::null());
        command.status().is_ok_and(|status| status.success()).then_some(Self(at))
    }
}

#[cfg(unix)]
impl Drop for SmallDisk<'_> {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg(self.0).status();
    }
}

/// Nothing half written is left, and the same command goes on to `expected`.
#[cfg(unix)]
fn goes_on_to(dir: &Path, more: &str, expected: &[Vec<u8>; 2]) {
    let out = dir.join("out");
    assert!(names(&out).iter().all(|name| !name.starts_with(".partial") && !name.starts_with(".replaced")));
    assert!(!out.join("final").exists());
    let ran = finetune(dir, &tiny(), &format!("{more} --resume auto")).ok();
    assert!(ran.stderr.contains("resuming from"), "{ran:#?}");
    assert!(result(&out) == *expected);
}

#[test]
#[cfg(unix)]
fn a_full_disk_loses_nothing() {
    let dir = tempfile::tempdir().unwrap();
    finetune(dir.path(), &tiny(), &format!("{RUN} --out_dir whole")).ok();
    let (expected, out) = (result(&dir.path().join("whole")), dir.path().join("out"));
    fs::create_dir(&out).unwrap();
    let Some(_disk) = SmallDisk::mount(&out, "size=3m") else {
        eprintln!("skipped: no file system can be mounted here");
        return;
    };
    finetune(dir.path(), &tiny(), RUN).refused(1, &["cannot write", "No space left", "free some space"]);
    assert!(out.join("step-000003").is_dir() && out.join("latest/litgpt.json").is_file());
    assert!(Command::new("mount").args(["-o", "remount,size=64m"]).arg(&out).status().unwrap().success());
    goes_on_to(dir.path(), RUN, &expected);
}

/// With and without the signal being ignored: the system's own way to treat it is to kill.
#[test]
#[cfg(unix)]
fn a_file_too_large_loses_nothing() {
    for before in ["ulimit -f 1000", "trap '' XFSZ; ulimit -f 1000"] {
        let dir = tempfile::tempdir().unwrap();
        finetune(dir.path(), &tiny(), RUN).ok();
        let (expected, out) = (result(&dir.path().join("out")), dir.path().join("out"));
        for later in ["final", "step-000006", "step-000009"] {
            fs::remove_dir_all(out.join(later)).unwrap();
        }
        let saved = content(&out.join("step-000003"));
        let ran = finetune_after(dir.path(), &tiny(), before, &format!("{RUN} --resume auto")).output().unwrap();
        Ran::from(ran).refused(1, &["cannot write", "training_state.safetensors", "too large", "ulimit -f"]);
        assert_eq!(content(&out.join("step-000003")), saved);
        goes_on_to(dir.path(), RUN, &expected);
    }
}

/// Waits for the first saved step of a run in `out`.
#[cfg(unix)]
fn wait_for_save(out: &Path) {
    wait_until("the first saved step", || out.join("latest/litgpt.json").is_file());
}

#[test]
#[cfg(unix)]
fn an_out_dir_that_becomes_read_only_loses_nothing() {
    use std::os::unix::fs::{PermissionsExt, chown};
    use std::os::unix::process::CommandExt;
    const NOBODY: u32 = 65534;
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("out");
    fs::create_dir(&out).unwrap();
    let mode = |mode| fs::set_permissions(&out, fs::Permissions::from_mode(mode)).unwrap();
    let mut command = finetune_command(dir.path(), &tiny(), LONG);
    command.stderr(Stdio::piped());
    mode(0o555);
    if fs::write(out.join("probe"), "").is_ok() {
        // Root may write everywhere, and so runs it as somebody who may not.
        fs::remove_file(out.join("probe")).unwrap();
        fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o755)).unwrap();
        let readable = Command::new("test").arg("-r").arg(tiny().join("config.json")).uid(NOBODY).gid(NOBODY).status();
        if chown(&out, Some(NOBODY), Some(NOBODY)).is_err() || !readable.is_ok_and(|status| status.success()) {
            eprintln!("skipped: root may write everywhere, and nobody may not read here");
            return;
        }
        command.uid(NOBODY).gid(NOBODY);
    }
    mode(0o755);
    let child = command.spawn().unwrap();
    wait_for_save(&out);
    mode(0o555);
    let ran = Ran::from(child.wait_with_output().unwrap());
    mode(0o755);
    ran.refused(1, &["cannot write in", "out", "Permission denied", "choose a folder that you may write to"]);
    assert!(out.join("latest/training_state.json").is_file());
    greedy(dir.path(), "out/latest", "Describe a fox.");
}

#[test]
#[cfg(unix)]
fn folders_that_vanish_while_training_do_no_harm() {
    let dir = tempfile::tempdir().unwrap();
    let (base, out) = (dir.path().join("base"), dir.path().join("out"));
    copy_tiny(&base);
    finetune(dir.path(), &base, LONG).ok();
    let expected = result(&out);
    for gone in ["base", "out", "out/step-000003"] {
        fs::remove_dir_all(&out).unwrap();
        let child = finetune_command(dir.path(), &base, LONG).stderr(Stdio::piped()).spawn().unwrap();
        wait_for_save(&out);
        wait_until("a moment without a save", || {
            kill(&child, "-STOP");
            std::thread::sleep(Duration::from_millis(50));
            let quiet = !names(&out).iter().any(|name| name.starts_with(".partial"));
            if quiet {
                fs::remove_dir_all(dir.path().join(gone)).unwrap();
            }
            kill(&child, "-CONT");
            quiet
        });
        let ran = Ran::from(child.wait_with_output().unwrap()).ok();
        assert!(!ran.stderr.contains("warning"), "{gone}: {ran:#?}");
        assert!(result(&out) == expected, "{gone}");
        copy_tiny(&base);
        greedy(dir.path(), "out/best", "Describe a fox.");
    }
}

#[test]
#[cfg(unix)]
fn one_run_has_an_out_dir_for_itself() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("out");
    let child = finetune_command(dir.path(), &tiny(), LONG).stderr(Stdio::piped()).spawn().unwrap();
    wait_for_save(&out);
    kill(&child, "-STOP");
    for more in ["", "--resume auto", "--resume true"] {
        let says = ["another run", &child.id().to_string(), "`out`", "choose another --out_dir"];
        finetune(dir.path(), &tiny(), &format!("{LONG} {more}")).refused(1, &says);
    }
    kill(&child, "-CONT");
    Ran::from(child.wait_with_output().unwrap()).ok();
    // Alone, it would have come to the same.
    finetune(dir.path(), &tiny(), &format!("{LONG} --out_dir alone")).ok();
    assert!(result(&out) == result(&dir.path().join("alone")));
    // A lock file without its process is no obstacle.
    finetune(dir.path(), &tiny(), &format!("{LONG} --resume auto")).ok();
}

#[test]
#[cfg(unix)]
fn a_closed_terminal_does_not_stop_the_run() {
    let dir = tempfile::tempdir().unwrap();
    let mut command = finetune_command(dir.path(), &tiny(), "");
    let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    drop((child.stdout.take(), child.stderr.take()));
    assert_eq!(child.wait().unwrap().code(), Some(0));
    assert!(dir.path().join("out/final").is_dir());
}

/// `nohup` ignores the signal on behalf of the run.
#[test]
#[cfg(unix)]
fn nohup_is_honoured() {
    let dir = tempfile::tempdir().unwrap();
    let child = finetune_after(dir.path(), &tiny(), "trap '' HUP", LONG).stderr(Stdio::piped()).spawn().unwrap();
    wait_for_save(&dir.path().join("out"));
    kill(&child, "-HUP");
    Ran::from(child.wait_with_output().unwrap()).ok();
    assert!(dir.path().join("out/final").is_dir());
}

/// A second signal does not wait for the save.
#[test]
#[cfg(unix)]
fn a_second_signal_ends_the_run_at_once() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("out");
    let mut child = finetune_command(dir.path(), &tiny(), LONG).spawn().unwrap();
    wait_for_save(&out);
    kill(&child, "-TERM");
    kill(&child, "-TERM");
    // One signal may be as good as two, where they come before the process runs again.
    assert_eq!(child.wait().unwrap().code(), Some(143));
    finetune(dir.path(), &tiny(), &format!("{LONG} --resume auto")).ok();
}
