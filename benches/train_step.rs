//! Times optimizer steps of a real checkpoint: tokens a second and peak memory by precision, sequence length, LoRA
//! targets, packing of a micro batch and activation checkpointing.
//!
//! `LITGPT_CHECKPOINT=DIR cargo bench --bench train_step [FILTER]` prints a JSON line a case: the median of the
//! repetitions. Every case is a process of its own, as peak memory is a process's.
#![allow(clippy::print_stdout, clippy::unwrap_used, missing_docs)]

use litgpt::checkpoint::Checkpoint;
use litgpt::model::lora::LoraConfig;
use litgpt::model::{Gpt, Tokens, Training};
use litgpt::ops::in_pool;
use litgpt::ops::optimizer::{AdamW, Moments};
use litgpt::ops::weight::Store;
use std::process::Command;
use std::time::Instant;

const REPETITIONS: usize = 7;
const CASE: &str = "LITGPT_BENCH_CASE";

/// Precision, tokens a sample, samples a micro batch, all projections or q and v, checkpointing.
const CASES: &[(Store, usize, usize, bool, bool)] = &[
    (Store::F32, 160, 1, false, false),
    (Store::Bf16, 160, 1, false, false),
    (Store::F32, 256, 1, false, false),
    (Store::Bf16, 256, 1, false, false),
    (Store::F32, 160, 1, true, false),
    (Store::Bf16, 160, 1, true, false),
    (Store::F32, 256, 1, false, true),
    (Store::Bf16, 256, 1, false, true),
    (Store::Bf16, 64, 1, false, false),
    (Store::Bf16, 64, 8, false, false),
];

fn main() {
    if let Ok(case) = std::env::var(CASE) {
        return run(case.parse().unwrap());
    }
    let filter = std::env::args().skip(1).find(|a| !a.starts_with('-')).unwrap_or_default();
    for case in (0..CASES.len()).filter(|case| name(*case).contains(&filter)) {
        let status = Command::new(std::env::current_exe().unwrap()).env(CASE, case.to_string()).status().unwrap();
        assert!(status.success(), "{}", name(case));
    }
}

fn name(case: usize) -> String {
    let (store, tokens, samples, all, checkpointing) = CASES[case];
    let (targets, kept) = (if all { "all" } else { "qv" }, if checkpointing { " checkpointing" } else { "" });
    format!("{store:?} {samples}x{tokens} {targets}{kept}")
}

fn run(case: usize) {
    let (store, length, samples, all, checkpointing) = CASES[case];
    let dir = std::env::var("LITGPT_CHECKPOINT").unwrap_or_else(|_| "data/tiny".to_owned());
    let checkpoint = Checkpoint::open(dir.as_ref()).unwrap();
    let mut gpt = Gpt::load(&checkpoint.config, &checkpoint, store, None, &mut |_| {}).unwrap();
    let config = LoraConfig { r: 8, alpha: 16.0, rslora: false, dropout: 0.05 };
    let wanted =
        |name: &str| if all { !name.contains("head") } else { name.contains("q_proj") || name.contains("v_proj") };
    gpt.attach(|name| wanted(name).then_some(config));
    gpt.initialize_adapters(1);
    gpt.prepare(length);
    let tokens = batch(length, samples, gpt.config.vocab_size);
    let mut grads = gpt.parameters.zeros_like(1, gpt.parameters.cols());
    let (mut moments, adamw) =
        (Moments::new(&gpt.parameters), AdamW { beta1: 0.9, beta2: 0.999, eps: 1e-8, weight_decay: 0.0 });
    let mut seconds = Vec::new();
    for seed in 0..=REPETITIONS as u64 {
        let begun = Instant::now();
        grads.zero();
        let training = Training { grads: &mut grads, weight: 1.0, seed, checkpointing };
        let loss = in_pool(|| gpt.loss(&tokens, Some(training)));
        assert!(loss.is_finite());
        adamw.step(&mut gpt.parameters, &grads, 1.0 / tokens.n_targets() as f32, &mut moments, 1e-4);
        seconds.push(begun.elapsed().as_secs_f64());
    }
    // The first step makes the buffers.
    seconds.remove(0);
    seconds.sort_by(f64::total_cmp);
    let rate = tokens.ids.len() as f64 / seconds[REPETITIONS / 2];
    println!("{{\"case\": \"{}\", \"tokens_per_s\": {rate:.1}, \"peak_mb\": {}}}", name(case), peak_mb());
}

fn batch(length: usize, samples: usize, vocab: usize) -> Tokens {
    let mut tokens = Tokens::default();
    for sample in 0..samples {
        let ids: Vec<u32> = (0..length).map(|t| ((sample * 7919 + t * 104_729) % vocab) as u32).collect();
        let labels: Vec<i32> = ids.iter().map(|id| *id as i32).collect();
        tokens.push(&ids, &labels, -100);
    }
    tokens
}

/// Peak resident memory of this process in 10^6 bytes; 0 where the system does not tell.
fn peak_mb() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find(|l| l.starts_with("VmHWM:")).unwrap_or_default();
    line.split_whitespace().nth(1).and_then(|kb| kb.parse::<u64>().ok()).unwrap_or(0) * 1024 / 1_000_000
}
