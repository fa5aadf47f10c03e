//! Times optimizer steps of a real checkpoint: tokens a second and peak memory by precision, sequence length, LoRA
//! targets, samples of a micro batch (padded as other tools do, end to end, packed) and activation checkpointing.
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

/// Tokens of the first 24 samples of Alpaca in SmolLM2's vocabulary.
const ALPACA: [usize; 24] =
    [433, 50, 358, 79, 128, 165, 74, 400, 78, 296, 61, 296, 526, 125, 368, 225, 86, 87, 371, 162, 415, 144, 90, 160];
/// Tokens of a pack.
const PACK: usize = 2048;

/// The samples of a step.
#[derive(Clone, Copy)]
enum Samples {
    /// One micro batch of this many samples of that many tokens.
    Equal(usize, usize),
    /// Those of `ALPACA` in micro batches of 8, each as long as its longest, which other tools compute.
    Padded,
    /// The same end to end, as micro batches are here.
    Unpadded,
    /// The same in packs.
    Packed,
}

impl Samples {
    fn name(self) -> String {
        match self {
            Self::Equal(samples, tokens) => format!("{samples}x{tokens}"),
            Self::Padded => "8 of Alpaca padded".to_owned(),
            Self::Unpadded => "8 of Alpaca".to_owned(),
            Self::Packed => "Alpaca packed".to_owned(),
        }
    }

    /// The micro batches, by the tokens of each sample and how many more it is padded by.
    fn micro_batches(self) -> Vec<Vec<(usize, usize)>> {
        let longest = |lengths: &[usize]| lengths.iter().max().copied().unwrap_or(0);
        match self {
            Self::Equal(samples, tokens) => vec![vec![(tokens, 0); samples]],
            Self::Padded => {
                let padded = |l: &[usize]| l.iter().map(|n| (*n, longest(l) - n)).collect();
                ALPACA.chunks(8).map(padded).collect()
            }
            Self::Unpadded => ALPACA.chunks(8).map(|l| l.iter().map(|n| (*n, 0)).collect()).collect(),
            Self::Packed => {
                let mut packs: Vec<Vec<(usize, usize)>> = Vec::new();
                for n in ALPACA {
                    let fits = |pack: &Vec<(usize, usize)>| pack.iter().map(|(n, _)| n).sum::<usize>() + n <= PACK;
                    match packs.iter_mut().find(|pack| fits(pack)) {
                        Some(pack) => pack.push((n, 0)),
                        None => packs.push(vec![(n, 0)]),
                    }
                }
                packs
            }
        }
    }
}

/// Precision, samples, all projections or q and v, checkpointing.
const CASES: &[(Store, Samples, bool, bool)] = &[
    (Store::F32, Samples::Equal(1, 160), false, false),
    (Store::Bf16, Samples::Equal(1, 160), false, false),
    (Store::F32, Samples::Equal(1, 256), false, false),
    (Store::Bf16, Samples::Equal(1, 256), false, false),
    (Store::F32, Samples::Equal(1, 160), true, false),
    (Store::Bf16, Samples::Equal(1, 160), true, false),
    (Store::F32, Samples::Equal(1, 256), false, true),
    (Store::Bf16, Samples::Equal(1, 256), false, true),
    (Store::Bf16, Samples::Equal(1, 64), false, false),
    (Store::Bf16, Samples::Equal(8, 64), false, false),
    (Store::F32, Samples::Padded, false, false),
    (Store::F32, Samples::Unpadded, false, false),
    (Store::F32, Samples::Packed, false, false),
    (Store::Bf16, Samples::Padded, false, false),
    (Store::Bf16, Samples::Unpadded, false, false),
    (Store::Bf16, Samples::Packed, false, false),
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
    let (store, samples, all, checkpointing) = CASES[case];
    let (targets, kept) = (if all { "all" } else { "qv" }, if checkpointing { " checkpointing" } else { "" });
    format!("{store:?} {} {targets}{kept}", samples.name())
}

fn run(case: usize) {
    let (store, samples, all, checkpointing) = CASES[case];
    let dir = std::env::var("LITGPT_CHECKPOINT").unwrap_or_else(|_| "data/tiny".to_owned());
    let checkpoint = Checkpoint::open(dir.as_ref()).unwrap();
    let mut gpt = Gpt::load(&checkpoint.config, &checkpoint, store, None, &mut |_| {}).unwrap();
    let config = LoraConfig { r: 8, alpha: 16.0, rslora: false, dropout: 0.05 };
    let wanted =
        |name: &str| if all { !name.contains("head") } else { name.contains("q_proj") || name.contains("v_proj") };
    gpt.attach(|name| wanted(name).then_some(config));
    gpt.initialize_adapters(1);
    let micro_batches = samples.micro_batches();
    let samples = || micro_batches.iter().flatten();
    gpt.prepare(samples().map(|(tokens, padding)| tokens + padding).max().unwrap());
    let n_tokens: usize = samples().map(|(tokens, _)| tokens).sum();
    let batches: Vec<Tokens> = micro_batches.iter().map(|batch| end_to_end(batch, gpt.config.vocab_size)).collect();
    let n_targets: usize = batches.iter().map(Tokens::n_targets).sum();
    let mut grads = gpt.parameters.zeros_like(1, gpt.parameters.cols());
    let (mut moments, adamw) =
        (Moments::new(&gpt.parameters), AdamW { beta1: 0.9, beta2: 0.999, eps: 1e-8, weight_decay: 0.0 });
    let mut seconds = Vec::new();
    for seed in 0..=REPETITIONS as u64 {
        let begun = Instant::now();
        grads.zero();
        for tokens in &batches {
            let training = Training { grads: &mut grads, weight: 1.0, seed, checkpointing };
            let loss = in_pool(|| gpt.loss(tokens, Some(training)));
            assert!(loss.is_finite());
        }
        adamw.step(&mut gpt.parameters, &grads, 1.0 / n_targets as f32, &mut moments, 1e-4);
        seconds.push(begun.elapsed().as_secs_f64());
    }
    // The first step makes the buffers.
    seconds.remove(0);
    seconds.sort_by(f64::total_cmp);
    // What pads a batch is no token of anybody's.
    let rate = n_tokens as f64 / seconds[REPETITIONS / 2];
    println!("{{\"case\": \"{}\", \"tokens_per_s\": {rate:.1}, \"peak_mb\": {}}}", name(case), peak_mb());
}

fn end_to_end(samples: &[(usize, usize)], vocab: usize) -> Tokens {
    let mut tokens = Tokens::default();
    for (sample, (length, padding)) in samples.iter().enumerate() {
        let ids: Vec<u32> = (0..length + padding).map(|t| ((sample * 7919 + t * 104_729) % vocab) as u32).collect();
        let label = |(t, id): (usize, &u32)| if t < *length { *id as i32 } else { -100 };
        let labels: Vec<i32> = ids.iter().enumerate().map(label).collect();
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
