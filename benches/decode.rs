//! Times decoding of a real checkpoint against the bound that the machine's memory sets: every token reads all weights
//! once, so that it cannot take less than their bytes over the read bandwidth.
//!
//! `LITGPT_CHECKPOINT=DIR cargo bench --bench decode` prints a JSON line a precision. Bandwidth and tokens are measured in
//! turn, as both vary from minute to minute on shared machines, and the share is the median of the rounds.
#![allow(clippy::print_stdout, clippy::unwrap_used, missing_docs)]

use litgpt::checkpoint::Checkpoint;
use litgpt::model::Gpt;
use litgpt::ops::in_pool;
use litgpt::ops::weight::Store;
use rayon::prelude::*;
use std::time::Instant;

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

const ROUNDS: usize = 15;
const TOKENS: usize = 20;
/// Elements that a measurement of the bandwidth reads: 512 MB, far more than the caches hold.
const READ: usize = 1 << 26;

fn main() {
    let dir = std::env::var("LITGPT_CHECKPOINT").unwrap_or_else(|_| "data/tiny".to_owned());
    let checkpoint = Checkpoint::open(dir.as_ref()).unwrap();
    let memory: Vec<u64> = (0..READ as u64).collect();
    for store in [Store::F32, Store::Bf16] {
        let mut gpt = Gpt::load(&checkpoint.config, &checkpoint, store, None, &mut |_| {}).unwrap();
        run(&mut gpt, store, &memory);
    }
}

fn run(gpt: &mut Gpt, store: Store, memory: &[u64]) {
    gpt.prepare((ROUNDS + 1) * TOKENS);
    let bytes: usize = gpt.linears().map(|linear| linear.weight().bytes()).sum();
    let mut cache = gpt.cache();
    let mut rounds: Vec<[f64; 3]> = (0..=ROUNDS)
        .map(|_| {
            let bandwidth = bandwidth(memory);
            let begun = Instant::now();
            for token in 0..TOKENS as u32 {
                assert!(in_pool(|| gpt.next_logits(&[token], &mut cache))[0].is_finite());
            }
            let rate = TOKENS as f64 / begun.elapsed().as_secs_f64();
            [rate, bandwidth, rate * bytes as f64 / bandwidth]
        })
        .collect();
    // The first round makes the buffers.
    rounds.remove(0);
    let [rate, bandwidth, share] = [0, 1, 2].map(|figure| median(rounds.iter().map(|round| round[figure]).collect()));
    let used = rate * bytes as f64 / 1e9;
    println!(
        "{{\"case\": \"decode {store:?}\", \"tokens_per_s\": {rate:.1}, \"weights_mb\": {}, \"gb_per_s\": {used:.1}, \
         \"read_ceiling_gb_per_s\": {:.1}, \"share\": {share:.2}}}",
        bytes / 1_000_000,
        bandwidth / 1e9
    );
}

/// Bytes a second that all threads read: the best of three.
fn bandwidth(memory: &[u64]) -> f64 {
    let once = || {
        let begun = Instant::now();
        let part = memory.len() / rayon::current_num_threads();
        let sum = in_pool(|| memory.par_chunks(part).map(streams).reduce(|| 0, |a, b| a ^ b));
        assert_eq!(std::hint::black_box(sum), 0, "the numbers from 0 to a power of two cancel out");
        size_of_val(memory) as f64 / begun.elapsed().as_secs_f64()
    };
    [(); 3].map(|()| once()).into_iter().fold(0.0, f64::max)
}

/// Reads four quarters side by side, which memory serves faster than one after the other.
fn streams(part: &[u64]) -> u64 {
    let quarter = part.len() / 4;
    let [a, b, c, d] = [0, 1, 2, 3].map(|i| &part[i * quarter..(i + 1) * quarter]);
    let four = a.iter().zip(b).zip(c.iter().zip(d));
    four.fold(0_u64, |sum, ((a, b), (c, d))| sum ^ a ^ b ^ c ^ d)
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}
