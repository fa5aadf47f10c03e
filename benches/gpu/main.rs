//! Iterations of LoRA finetuning on one device, timed as the peers' scripts time theirs: the same checkpoint folders, the
//! same samples in file order, and the same JSON line. `benches/gpu/README.md` says how to run both.
#![allow(clippy::print_stdout, clippy::unwrap_used)] // prints its result; a bench stops at the first surprise

#[path = "../idle/mod.rs"]
mod idle;
mod ops;

use clap::Parser;
use litgpt::checkpoint::Checkpoint;
use litgpt::model::lora::{LoraConfig, Targets};
use litgpt::model::quantizer::Quantizer;
use litgpt::model::{Gpt, Tokens, Training};
use litgpt::ops::device::Device;
use litgpt::ops::in_pool;
use litgpt::ops::optimizer::{AdamW, Moments};
use litgpt::ops::weight::Store;
use litgpt::train::schedule::Schedule;
use litgpt::train::settings::LrSchedule;
use serde_json::{Value, json};
use std::fmt::Write as _;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::time::Instant;

const WITH_INPUT: &str = "Below is an instruction that describes a task, paired with an input that provides further \
                          context. Write a response that appropriately completes the request.\n\n### \
                          Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n";
const NO_INPUT: &str = "Below is an instruction that describes a task. Write a response that appropriately completes \
                        the request.\n\n### Instruction:\n{instruction}\n\n### Response:\n";

/// The arguments of the peers' scripts.
#[derive(Parser)]
#[command(rename_all = "kebab-case")]
struct Args {
    /// Folder of the model
    #[arg(long)]
    checkpoint: PathBuf,
    /// Alpaca-format JSON, used in file order
    #[arg(long)]
    data: PathBuf,
    /// 32-true, bf16-true, 16-true, or bnb.nf4, bnb.nf4-dq and so on with bf16-true
    #[arg(long)]
    setting: String,
    #[arg(long, default_value_t = 1)]
    micro_batch: usize,
    /// Iterations of an optimizer step
    #[arg(long, default_value_t = 16)]
    accumulate: usize,
    /// Iterations before the timed ones
    #[arg(long, default_value_t = 16)]
    warmup: usize,
    /// Timed iterations
    #[arg(long, default_value_t = 320)]
    iterations: usize,
    /// Every sequence exactly this long, cut from the samples laid end to end (0: the samples)
    #[arg(long, default_value_t = 0)]
    seq_len: usize,
    /// Adapt q and v (qv), or every linear layer but the head (all)
    #[arg(long, default_value = "qv")]
    lora: String,
    #[arg(long, default_value_t = 0.05)]
    dropout: f64,
    /// Append the result to this file
    #[arg(long)]
    json: Option<PathBuf>,
    /// Keep only the blocks' inputs
    #[arg(long)]
    checkpointing: bool,
    /// Compute on the processor
    #[arg(long)]
    cpu: bool,
    /// Cargo gives it to every bench
    #[arg(long, hide = true)]
    bench: bool,
}

/// The training sequences: BOS where the tokenizer's files ask for it, prompt and response encoded apart, EOS.
fn sequences(args: &Args) -> Vec<Vec<u32>> {
    let tokenizer = tokenizers::Tokenizer::from_file(args.checkpoint.join("tokenizer.json")).unwrap();
    let config: Value = read_json(&args.checkpoint.join("tokenizer_config.json"));
    let id = |key: &str| tokenizer.token_to_id(config[key].as_str().unwrap()).unwrap();
    let (bos, eos) = (id("bos_token"), id("eos_token"));
    let samples = read_json(&args.data);
    let encode = |sample: &Value| {
        let field = |key: &str| sample[key].as_str().unwrap_or_default();
        let template = if field("input").is_empty() { NO_INPUT } else { WITH_INPUT };
        let prompt = template.replace("{instruction}", field("instruction")).replace("{input}", field("input"));
        let ids = |text: &str| tokenizer.encode(text, true).unwrap().get_ids().to_vec();
        let mut out = if config["add_bos_token"] == true { vec![bos] } else { Vec::new() };
        out.extend(ids(&prompt));
        out.extend(ids(field("output")));
        out.push(eos);
        out
    };
    let sequences: Vec<Vec<u32>> = samples.as_array().unwrap().iter().map(encode).collect();
    if args.seq_len == 0 {
        return sequences;
    }
    sequences.concat().chunks_exact(args.seq_len).map(<[u32]>::to_vec).collect()
}

fn read_json(path: &Path) -> Value {
    serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap()
}

/// The model of the setting with its adapters, and the device that it is on.
fn model(args: &Args) -> (Gpt, Option<Device>) {
    let device = (!args.cpu).then(|| Device::cuda(0).unwrap().expect("a CUDA device and a build with it, or --cpu"));
    let quantizer = args.setting.strip_prefix("bnb.").map(|name| Quantizer::named(name).expect("a quantizer's name"));
    let store = match args.setting.as_str() {
        "32-true" => Store::F32,
        "16-true" => Store::F16,
        _ => Store::Bf16,
    };
    let checkpoint = Checkpoint::open(&args.checkpoint).unwrap();
    let config = &checkpoint.config;
    let mut gpt = Gpt::load_on(device.as_ref(), config, &checkpoint, store, quantizer, &mut |_| ()).unwrap();
    let every = args.lora == "all";
    let targets = Targets { query: true, value: true, key: every, projection: every, mlp: every, head: false };
    let lora = LoraConfig { r: 8, alpha: 16.0, rslora: false, dropout: args.dropout };
    gpt.attach(|name| targets.contains(name).then_some(lora));
    gpt.initialize_adapters(1337);
    (gpt, device)
}

fn quantile(sorted: &[f64], q: f64) -> f64 {
    sorted[((sorted.len() - 1) as f64 * q).round() as usize]
}

/// Python's `str` of nested lists of numbers.
fn python(rows: &[&[u32]]) -> String {
    format!("{rows:?}")
}

/// What the iterations gave.
struct Measured {
    /// Of an iteration, one value a window.
    milliseconds: Vec<f64>,
    losses: Vec<f64>,
    tokens: usize,
    seconds: f64,
    sha: String,
}

/// A micro batch whose every token is learned.
fn batch(rows: &[&[u32]]) -> Tokens {
    let mut batch = Tokens::default();
    for ids in rows {
        batch.push(ids, &ids.iter().map(|id| *id as i32).collect::<Vec<_>>(), -100);
    }
    batch
}

/// The longest micro batch once, as a run does: what it needs of memory is then there.
fn rehearse(args: &Args, gpt: &mut Gpt, sequences: &[Vec<u32>]) {
    let longest = sequences.iter().max_by_key(|ids| ids.len()).unwrap();
    gpt.prepare(longest.len());
    let batch = batch(&vec![&longest[..]; args.micro_batch]);
    let mut grads = gpt.parameters.zeros_like(1, gpt.parameters.cols());
    let training = Training { grads: &mut grads, weight: 1.0, seed: 0, checkpointing: args.checkpointing };
    let _ = in_pool(|| gpt.loss(&batch, Some(training)));
}

fn run(args: &Args, gpt: &mut Gpt, sequences: &[Vec<u32>]) -> Measured {
    let total = args.warmup + args.iterations;
    let steps = total / args.accumulate;
    let warmup = (steps / 2).clamp(1, 100);
    let schedule = Schedule { warmup, steps, peak: 1e-3, floor: 0.0, kind: LrSchedule::Litgpt, shortened_from: None };
    let adamw = AdamW { beta1: 0.9, beta2: 0.999, eps: 1e-8, weight_decay: 0.01 };
    let mut moments = Moments::new(&gpt.parameters);
    let mut grads = gpt.parameters.zeros_like(1, gpt.parameters.cols());
    let mut hash = ring::digest::Context::new(&ring::digest::SHA256);
    let (mut milliseconds, mut losses, mut tokens) = (Vec::new(), Vec::new(), 0);
    let mut begun = Instant::now();
    let (mut tick, mut window_start) = (Instant::now(), 0);
    for iteration in 0..total {
        if iteration == args.warmup {
            begun = Instant::now();
        }
        let at = iteration * args.micro_batch;
        let rows: Vec<&[u32]> = (at..at + args.micro_batch).map(|row| &sequences[row % sequences.len()][..]).collect();
        let batch = batch(&rows);
        let seen = if iteration < args.warmup { python(&rows) } else { format!("[{}, {}]", rows.len(), rows[0].len()) };
        hash.update(seen.as_bytes());
        // The mean of the micro batches' means, as the peers have it.
        let weight = 1.0 / (batch.n_targets() * args.accumulate) as f32;
        let training =
            Training { grads: &mut grads, weight, seed: iteration as u64, checkpointing: args.checkpointing };
        losses.push((in_pool(|| gpt.pass(&batch, None, Some(training))), batch.n_targets()));
        if (iteration + 1) % args.accumulate == 0 {
            adamw.step(&mut gpt.parameters, &grads, 1.0, &mut moments, schedule.at(iteration / args.accumulate));
            grads.zero();
        }
        if iteration >= args.warmup {
            tokens += batch.ids.len();
        }
        // As a run does: the device is waited for once a window, and an iteration is the window's mean.
        if (iteration + 1) % args.accumulate == 0 || iteration + 1 == args.warmup {
            let _ = losses.last().map(|(loss, _)| loss.value());
            let elapsed = tick.elapsed().as_secs_f64() * 1e3;
            if iteration >= args.warmup {
                milliseconds.push(elapsed / (iteration + 1 - window_start) as f64);
            }
            (tick, window_start) = (Instant::now(), iteration + 1);
        }
    }
    let _ = gpt.parameters.to_host(); // waits for the last step
    gpt.check().unwrap();
    let sha = hash.finish().as_ref().iter().fold(String::new(), |mut text, byte| {
        write!(text, "{byte:02x}").unwrap();
        text
    });
    let seconds = begun.elapsed().as_secs_f64();
    let losses = losses.iter().map(|(loss, targets)| loss.value() / *targets as f64).collect();
    Measured { milliseconds, losses, tokens, seconds, sha: sha[..12].to_owned() }
}

/// Peak of the process, bytes, by the kernel's account.
fn peak_memory() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
    line.and_then(|line| line.split_whitespace().next()?.parse::<u64>().ok()).unwrap_or(0) * 1024
}

fn rounded(value: f64, digits: i32) -> f64 {
    let factor = 10f64.powi(digits);
    (value * factor).round() / factor
}

fn main() {
    let given: Vec<String> = std::env::args().skip(1).filter(|arg| arg != "--bench").collect();
    if given.first().is_some_and(|arg| arg == "--ops") {
        return ops::run(given.get(1).map_or("", String::as_str));
    }
    let args = Args::parse();
    assert!((args.warmup + args.iterations).is_multiple_of(args.accumulate), "whole windows only");
    let sequences = sequences(&args);
    let loading = Instant::now();
    let (mut gpt, device) = model(&args);
    let load_seconds = loading.elapsed().as_secs_f64();
    rehearse(&args, &mut gpt, &sequences);
    let measured = run(&args, &mut gpt, &sequences);
    let mut sorted = measured.milliseconds.clone();
    sorted.sort_by(f64::total_cmp);
    let last = &measured.losses[measured.losses.len() - 16.min(measured.losses.len())..];
    let gb = |bytes: f64| rounded(bytes / 1e9, 3);
    let used = device.as_ref().map(|device| device.memory().unwrap()).map(|(free, total)| (total - free) as f64);
    let data = if args.seq_len > 0 {
        format!("{} tokens", args.seq_len)
    } else {
        args.data.file_stem().unwrap().to_string_lossy().into_owned()
    };
    let line = json!({
        "tool": "litgpt-rs", "model": args.checkpoint.file_name().unwrap().to_string_lossy(), "setting": args.setting,
        "micro_batch": args.micro_batch, "lora": args.lora, "dropout": args.dropout, "data": data,
        "accumulate": args.accumulate, "warmup": args.warmup, "iterations": args.iterations,
        "seconds": rounded(measured.seconds, 3), "ms_median": rounded(quantile(&sorted, 0.5), 3),
        "ms_p10": rounded(quantile(&sorted, 0.1), 3), "ms_p90": rounded(quantile(&sorted, 0.9), 3),
        "min_per_1k": rounded(measured.seconds / args.iterations as f64 * 1000.0 / 60.0, 3),
        "tokens": measured.tokens, "tokens_per_s": rounded(measured.tokens as f64 / measured.seconds, 1),
        "gb_device": used.map(gb), "gb_host": gb(peak_memory() as f64), "gb_weights": gb(gpt.weight_bytes() as f64),
        "load_seconds": rounded(load_seconds, 2), "checkpointing": args.checkpointing,
        "loss_first": rounded(measured.losses[0], 4),
        "losses20": measured.losses.iter().take(20).map(|l| rounded(*l, 4)).collect::<Vec<_>>(),
        "loss_last16": rounded(last.iter().sum::<f64>() / last.len() as f64, 4),
        "sequence_sha": measured.sha, "trainable": gpt.parameters.cols(),
        "device": device.as_ref().map_or_else(|| "CPU".to_owned(), |device| device.name().to_owned()),
        "versions": { "litgpt-rs": env!("CARGO_PKG_VERSION") },
    });
    println!("{line}");
    if let Some(path) = &args.json {
        let mut file = std::fs::File::options().create(true).append(true).open(path).unwrap();
        writeln!(file, "{line}").unwrap();
    }
}
