//! The folders that a run saves: `latest` and `best`, which of them stay, and early stopping.
#![allow(clippy::unwrap_used)]

use std::fs;
use std::path::Path;

use crate::util::{column, copy_tiny, finetune, greedy, litgpt, losses, names, result, tensors, tiny, write_tensors};

/// Nothing is learned, so no validation is better than the first.
const STILL: &str = "--lr 1e-30 --eval.interval 1 --eval.max_iters 2 --train.max_steps 10";

fn target(out: &Path, pointer: &str) -> String {
    fs::read_link(out.join(pointer)).unwrap().display().to_string()
}

fn steps(out: &Path) -> Vec<String> {
    names(out).into_iter().filter(|name| name.starts_with("step-")).collect()
}

#[test]
fn best_follows_the_validation_loss() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("out");
    let ran = finetune(dir.path(), &tiny(), "--train.max_steps 12 --eval.interval 3 --train.save_interval 6").ok();
    let val = column(&out, "val_loss");
    assert!(val.len() == 4 && val.is_sorted_by(|a, b| a > b), "{val:?}");
    assert!(ran.stderr.contains("saved out/step-000003, the best so far"), "{}", ran.stderr);
    // Steps 3 and 9 were saved for being the best, which they are no more.
    assert_eq!(steps(&out), ["step-000006", "step-000012"]);
    assert_eq!((target(&out, "latest"), target(&out, "best")), ("final".into(), "final".into()));
    // A run into the same folder has its own best, whatever the old one left.
    let ran = finetune(dir.path(), &tiny(), &format!("{STILL} --train.max_steps 3")).ok();
    assert!(ran.stderr.contains("best: step 1 with val loss"), "{}", ran.stderr);
    assert_eq!((target(&out, "latest"), target(&out, "best")), ("final".into(), "step-000001".into()));
    assert_eq!(steps(&out), ["step-000001", "step-000006", "step-000012"]);
}

#[test]
fn pointers_are_read_as_folders() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("out");
    finetune(dir.path(), &tiny(), &format!("{STILL} --train.max_steps 4 --train.save_interval 2")).ok();
    assert_eq!(target(&out, "best"), "step-000001");
    let expected = greedy(dir.path(), "out/step-000001", "Describe a fox.");
    for plain in [false, true] {
        if plain {
            fs::remove_file(out.join("best")).unwrap();
            fs::write(out.join("best"), "step-000001\n").unwrap();
        }
        assert_eq!(greedy(dir.path(), "out/best", "Describe a fox."), expected);
        litgpt(dir.path(), ["merge_lora", "--checkpoint_dir", "out/best", "--out_dir", &format!("merged-{plain}")])
            .ok();
        let more = format!("{STILL} --train.max_steps 4 --train.save_interval 2 --resume out/best");
        let ran = finetune(dir.path(), &tiny(), &more).ok();
        assert!(ran.stderr.contains("at step 1\n"), "{}", ran.stderr);
        assert_eq!(target(&out, "latest"), "final");
        assert!(out.join("best").is_symlink() != plain, "a pointer that is right is left alone");
    }
    litgpt(dir.path(), ["generate", "merged-true", "--max_new_tokens", "2"]).ok();
    fs::write(out.join("best"), "step-000099\n").unwrap();
    litgpt(dir.path(), ["generate", "out/best"]).refused(1, &["out/best"]);
}

#[test]
fn what_is_no_pointer_is_not_replaced() {
    let dir = tempfile::tempdir().unwrap();
    fs::create_dir_all(dir.path().join("out/best")).unwrap();
    fs::write(dir.path().join("out/best/mine"), "mine").unwrap();
    finetune(dir.path(), &tiny(), "").refused(1, &["out/best", "--out_dir"]);
    assert_eq!(names(&dir.path().join("out")), ["best"]);
}

#[test]
fn old_steps_go_but_not_the_best() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("out");
    let run = |more: &str| finetune(dir.path(), &tiny(), &format!("{STILL} --train.save_interval 2 {more}")).ok();
    run("--train.save_total_limit 3");
    assert_eq!(steps(&out), ["step-000001", "step-000008", "step-000010"]);
    run("--train.save_total_limit 1 --out_dir one");
    assert_eq!(steps(&dir.path().join("one")), ["step-000001"]);
    assert_eq!(target(&dir.path().join("one"), "latest"), "final");
    let expected = result(&out);
    fs::remove_dir_all(out.join("final")).unwrap();
    let ran = run("--train.save_total_limit 3 --resume auto");
    assert!(ran.stderr.contains("resuming from out/step-000010"), "{}", ran.stderr);
    assert!(result(&out) == expected);

    // What somebody put into a folder is not the run's to remove.
    run("--out_dir two");
    let two = dir.path().join("two");
    fs::create_dir(two.join("step-000002/merged")).unwrap();
    run("--out_dir two --resume two/step-000006 --train.save_total_limit 1");
    assert_eq!(steps(&two), ["step-000001", "step-000002"]);
    assert!(two.join("step-000002/merged").is_dir());
}

#[test]
fn early_stopping_ends_the_run_and_resumes_exactly() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("out");
    let run = |more: &str| {
        let ran = finetune(dir.path(), &tiny(), &format!("{STILL} --train.save_interval 1 {more}")).ok();
        (ran.stderr, column(&out, "val_loss").len())
    };
    let (said, validations) = run("--eval.early_stopping_patience 3");
    assert!(said.contains("early stopping at step 4: 3 evaluations without"), "{said}");
    // The last validation is over all samples, of which the first ones decide.
    assert_eq!(said.matches(", for `best` ").count(), 1, "{said}");
    assert_eq!(validations, 5, "steps 1 to 4, and all samples at the end");
    assert_eq!(steps(&out).len(), 4);
    let (expected, rows) = (result(&out), losses(&out));
    for step in 1..=4 {
        let (said, _) = run(&format!("--eval.early_stopping_patience 3 --resume out/step-00000{step}"));
        assert!(said.contains("early stopping at step 4"), "from {step}: {said}");
        assert!(result(&out) == expected && losses(&out) == rows, "from {step}");
        assert_eq!((target(&out, "latest"), target(&out, "best")), ("final".into(), "step-000001".into()));
    }
    let (said, _) = run("--eval.early_stopping_patience 3 --resume auto");
    assert!(said.contains("nothing to do"), "{said}");
    // With more patience it goes on.
    let (said, _) = run("--resume auto");
    assert!(said.contains("resuming from out/final at step 4") && said.contains("done: 10 steps"), "{said}");
}

/// `final` was the best, and the run that goes on from it becomes worse.
#[test]
fn a_final_that_is_the_best_outlives_the_next_one() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("out");
    let run = |more: &str| finetune(dir.path(), &tiny(), &format!("--train.lr_schedule constant {more}")).ok();
    run("--train.max_steps 4");
    assert_eq!(target(&out, "best"), "final");
    let best = fs::read(out.join("final/adapter_model.safetensors")).unwrap();
    run("--train.max_steps 6 --lr 2 --resume auto --resume_force true");
    assert_eq!((target(&out, "latest"), target(&out, "best")), ("final".into(), "step-000004".into()));
    assert!(fs::read(out.join("best/adapter_model.safetensors")).unwrap() == best);
    assert!(fs::read(out.join("final/adapter_model.safetensors")).unwrap() != best);
}

/// What was merged into `final` is not the next run's to replace.
#[test]
fn a_final_that_holds_a_merged_model_is_kept() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("out");
    let run = |more: &str| finetune(dir.path(), &tiny(), &format!("--train.max_steps 1 {more}")).ok();
    run("");
    run("--seed 2");
    assert!(!out.join("kept-final-1").exists(), "a folder with nothing else in it is replaced");
    litgpt(dir.path(), ["merge_lora", "out/final"]).ok();
    let adapter = |folder: &str| fs::read(out.join(folder).join("adapter_model.safetensors")).unwrap();
    let before = adapter("final");
    let said = run("--seed 3").stderr;
    assert!(said.contains("is now `out/kept-final-1`"), "{said}");
    assert!(adapter("kept-final-1") == before && adapter("final") != before);
    assert!(out.join("kept-final-1/merged/config.json").is_file() && !out.join("final/merged").exists());
    litgpt(dir.path(), ["merge_lora", "out/final"]).ok();
    run("--seed 4");
    assert_eq!(names(&out).iter().filter(|name| name.starts_with("kept-")).count(), 2);
    litgpt(dir.path(), ["generate", "out/kept-final-1/merged", "--max_new_tokens", "2"]).ok();
}

#[test]
fn a_base_that_changed_is_told_when_generating() {
    let dir = tempfile::tempdir().unwrap();
    let base = dir.path().join("base");
    copy_tiny(&base);
    finetune(dir.path(), &base, "--train.max_steps 1").ok();
    let generate = || litgpt(dir.path(), ["generate", "out/final", "--max_new_tokens", "2"]).ok().stderr;
    assert!(!generate().contains("warning"));
    let mut changed = tensors(&base.join("model.safetensors"));
    changed.get_mut("model.norm.weight").unwrap().2.swap(0, 2);
    write_tensors(&base.join("model.safetensors"), &changed);
    let said = generate();
    assert!(
        said.contains("warning: the base model") && said.contains("is not what the adapter was trained on"),
        "{said}"
    );
}
