//! What a step asks of a device, and what asking costs the processor: on a GPU an iteration of few tokens takes no less time
//! than its launches.
//!
//! `cargo bench --bench launches` runs Llama 2 7B and StableLM 3B, whose weights are zeros that nobody keeps, on a device that does
//! nothing, and prints a JSON line a case.
#![allow(clippy::print_stdout, clippy::unwrap_used, missing_docs)]

mod idle;

use idle::{Asked, Idle};
use litgpt::model::families::{HfConfig, by_config};
use litgpt::model::lora::LoraConfig;
use litgpt::model::quantizer::Quantizer;
use litgpt::model::{Gpt, Source, Tokens, Training};
use litgpt::ops::device::Device;
use litgpt::ops::weight::{Data, Store};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Instant;

const TOKENS: usize = 160;
const REPETITIONS: usize = 21;

/// Weights of zeros.
struct Zeros;

impl Source for Zeros {
    fn append(&self, _: &str, rows: usize, cols: usize, data: &mut Data) -> litgpt::error::Result<()> {
        match data {
            Data::F32(v) => v.resize(v.len() + rows * cols, 0.0),
            Data::Bf16(v) => v.resize(v.len() + rows * cols, half::bf16::ZERO),
            Data::F16(v) => v.resize(v.len() + rows * cols, half::f16::ZERO),
        }
        Ok(())
    }
}

const MODELS: [(&str, &str); 2] = [
    (
        "StableLM 3B",
        r#"{"model_type": "stablelm", "hidden_size": 2560, "intermediate_size": 6912, "num_hidden_layers": 32,
            "num_attention_heads": 32, "num_key_value_heads": 32, "vocab_size": 50304, "max_position_embeddings": 4096,
            "partial_rotary_factor": 0.25, "layer_norm_eps": 1e-5, "tie_word_embeddings": false}"#,
    ),
    (
        "Llama 2 7B",
        r#"{"model_type": "llama", "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
            "num_attention_heads": 32, "num_key_value_heads": 32, "vocab_size": 32000, "max_position_embeddings": 4096,
            "rms_norm_eps": 1e-5, "tie_word_embeddings": false}"#,
    ),
];

fn main() {
    for (name, config) in MODELS {
        for quantizer in [None, Some("nf4"), Some("nf4-dq")] {
            run(name, config, quantizer);
        }
    }
}

fn run(name: &str, config: &str, quantizer: Option<&str>) {
    let asked = Arc::new(Asked::default());
    let device = Device::new(Box::new(Idle::new(Arc::clone(&asked))));
    let hf = HfConfig::of(Path::new(name), serde_json::from_str(config).unwrap());
    let config = (by_config(&hf).unwrap().config)(&hf).unwrap();
    let quantization = quantizer.map(|name| Quantizer::named(name).unwrap());
    let mut gpt = Gpt::load_on(Some(&device), &config, &Zeros, Store::Bf16, quantization, &mut |_| {}).unwrap();
    let lora = LoraConfig { r: 8, alpha: 16.0, rslora: false, dropout: 0.05 };
    gpt.attach(|name| (name.contains("q_proj") || name.contains("v_proj")).then_some(lora));
    gpt.prepare(TOKENS);
    let ids: Vec<u32> = (0..TOKENS as u32).collect();
    let labels: Vec<i32> = ids.iter().map(|id| if *id < 60 { -100 } else { *id as i32 }).collect();
    let mut tokens = Tokens::default();
    tokens.push(&ids, &labels, -100);
    let mut grads = gpt.parameters.zeros_like(1, gpt.parameters.cols());
    let mut iteration = |seed| {
        let training = Training { grads: &mut grads, weight: 1.0, seed, checkpointing: false };
        drop(gpt.pass(&tokens, None, Some(training)));
    };
    iteration(0);
    asked.counting.store(true, Ordering::Relaxed);
    iteration(1);
    asked.counting.store(false, Ordering::Relaxed);
    let mut seconds = Vec::new();
    for seed in 0..REPETITIONS as u64 {
        let begun = Instant::now();
        iteration(seed);
        seconds.push(begun.elapsed().as_secs_f64());
    }
    seconds.sort_by(f64::total_cmp);
    let ms = 1e3 * seconds[REPETITIONS / 2];
    let counts = asked.by_name.lock().unwrap();
    let memory: usize = counts.iter().filter(|(name, _)| *name == "(allocation)").map(|(_, n)| n).sum();
    let launches = counts.values().sum::<usize>() - memory;
    println!(
        "{}",
        serde_json::json!({"model": name, "quantize": quantizer.unwrap_or("none"), "tokens": TOKENS, "launches": launches,
            "allocations": memory, "host_ms": (ms * 1e3).round() / 1e3, "of": *counts})
    );
}
