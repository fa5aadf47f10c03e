//! Runs that are stopped and resumed come to what an undisturbed run comes to, bit for bit; what would not is refused.
#![allow(clippy::unwrap_used)]

use std::cell::Cell;
use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::process::Stdio;
use std::time::Duration;

use litgpt::checkpoint::Checkpoint;
use litgpt::data::sft::Sample;
use litgpt::data::{Origin, prefix};
use litgpt::model::Gpt;
use litgpt::model::lora::LoraConfig;
use litgpt::ops::Matrix;
use litgpt::ops::optimizer::Moments;
use litgpt::ops::weight::Store;
use litgpt::train::report::{Event, Report, Summary};
use litgpt::train::settings::FinetuneSettings;
use litgpt::train::{Job, LossScale, Outside, Progress, Snapshot, fit, side_by_side};

use crate::util::{
    Ran, content, copy_tiny, dataset, finetune, finetune_command, kill, litgpt, losses, names, result, tiny, wait_until,
};

const RUN: &str =
    "--lora_dropout 0.1 --train.max_steps 10 --train.save_interval 3 --eval.interval 4 --eval.max_iters 2";

/// SplitMix64.
fn random(state: &mut u64) -> u64 {
    *state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let z = (*state ^ (*state >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z ^ (z >> 27)
}

/// What `latest` and `best` stand for, and how many step folders there are: a stop saves steps that no interval has.
fn pointers(out: &Path) -> (String, String, usize) {
    let [latest, best] = ["latest", "best"].map(|name| fs::read_link(out.join(name)).unwrap().display().to_string());
    (latest, best, names(out).iter().filter(|name| name.starts_with("step-")).count())
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
    let more = "--lora_dropout 0.1 --train.max_steps 60 --train.save_interval 2 --train.save_total_limit 3 \
                --train.global_batch_size 4 --train.micro_batch_size 2 --eval.interval 5 --eval.max_iters 2";
    let dir = tempfile::tempdir().unwrap();
    let start = |more: &str| finetune_command(dir.path(), &tiny(), more).spawn().unwrap();
    let begun = std::time::Instant::now();
    assert!(start(more).wait().unwrap().success());
    let whole_ms = begun.elapsed().as_millis() as u64;
    let out = dir.path().join("out");
    let (expected, rows, folders) = (result(&out), losses(&out), pointers(&out));
    let (mut asked, mut interrupted, mut finished, mut state) = (0, 0, 0, 1);
    let mut codes: BTreeMap<String, usize> = BTreeMap::new();
    fs::remove_dir_all(&out).unwrap();
    while asked < runs || finished == 0 {
        let mut child = start(&format!("{more} --resume auto"));
        if asked < runs {
            // Not the whole time: what is resumed has less to do.
            std::thread::sleep(Duration::from_millis(random(&mut state) % (whole_ms / 3).max(1)));
            let (signal, code) =
                [("-KILL", None), ("-INT", Some(130)), ("-TERM", Some(143))][random(&mut state) as usize % 3];
            kill(&child, signal);
            let status = child.wait().unwrap();
            asked += 1;
            interrupted += usize::from(!status.success());
            *codes.entry(format!("{signal} {status}")).or_default() += 1;
            // Before it listens, a signal ends the process as it does any; after its end, it is too late.
            assert!(status.success() || status.code().is_none() || status.code() == code, "{signal}: {status}");
        } else {
            assert!(child.wait().unwrap().success());
        }
        if out.join("final").is_dir() {
            // A run that was killed right behind its end has to mend its pointers.
            assert!(start(&format!("{more} --resume auto")).wait().unwrap().success());
            finished += 1;
            assert!(result(&out) == expected, "after {asked} signals");
            assert_eq!(losses(&out), rows, "after {asked} signals");
            assert_eq!(pointers(&out), folders, "after {asked} signals");
            let hidden: Vec<String> = names(&out).into_iter().filter(|name| name.starts_with(".partial")).collect();
            assert!(hidden.is_empty(), "{hidden:?}");
            fs::remove_dir_all(&out).unwrap();
        }
    }
    println!(
        "{asked} signals, {interrupted} runs interrupted, {finished} results, all equal, in {:.0} s: {codes:?}",
        begun.elapsed().as_secs_f64()
    );
}

#[test]
#[cfg(unix)]
fn signals_save_and_say_how_to_go_on() {
    let dir = tempfile::tempdir().unwrap();
    for (signal, code) in [("-INT", 130), ("-TERM", 143), ("-HUP", 129)] {
        if signal == "-HUP" && ignores_hangups() {
            println!("skipped: SIGHUP, which this process and so its children ignore (nohup)");
            continue;
        }
        let endless = "--train.max_steps 100000 --train.epochs 1000 --eval.final_validation false";
        let child = finetune_command(dir.path(), &tiny(), endless).stderr(Stdio::piped()).spawn().unwrap();
        let csv = dir.path().join("out/metrics.csv");
        wait_until("the fourth step", || fs::read_to_string(&csv).is_ok_and(|text| text.lines().count() > 4));
        kill(&child, signal);
        let ran = Ran::from(child.wait_with_output().unwrap());
        assert_eq!(ran.code, code, "{ran:#?}");
        assert!(ran.stderr.contains("--resume auto goes on") && !ran.stderr.contains("error:"), "{ran:#?}");
        assert!(names(&dir.path().join("out")).iter().any(|name| name.starts_with("step-")));
        fs::remove_dir_all(dir.path().join("out")).unwrap();
    }
}

/// Whether the tests were started with SIGHUP ignored.
#[cfg(unix)]
fn ignores_hangups() -> bool {
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    let mask = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
    mask.is_some_and(|mask| u64::from_str_radix(mask.trim(), 16).unwrap() & 1 == 1)
}

/// A run in memory: keeps what is saved, and is asked to stop before one micro batch.
struct InMemory {
    stop_before: usize,
    asked: Cell<usize>,
    losses: Vec<f64>,
    /// Progress, updates, and parameters with their moments.
    saved: Option<(Progress, u64, [Vec<f32>; 3])>,
}

impl InMemory {
    fn new(stop_before: usize) -> Self {
        Self { stop_before, asked: Cell::new(0), losses: Vec::new(), saved: None }
    }
}

impl Report for InMemory {
    fn event(&mut self, event: &Event) -> anyhow::Result<()> {
        match event {
            Event::Step(figures) => self.losses.push(figures.loss),
            Event::Validation { loss, .. } => self.losses.push(*loss),
            _ => {}
        }
        Ok(())
    }
}

impl Outside for InMemory {
    fn save(&mut self, gpt: &Gpt, _: &str, snapshot: &Snapshot<'_>) -> anyhow::Result<()> {
        let progress = Progress { seconds: 0.0, ..snapshot.progress };
        let Moments { m, v, step } = snapshot.moments;
        self.saved = Some((progress, *step, [&gpt.parameters, m, v].map(|matrix| matrix.to_host().to_vec())));
        Ok(())
    }

    fn stop_asked(&self) -> bool {
        self.asked.set(self.asked.get() + 1);
        self.asked.get() > self.stop_before
    }

    fn answer(&mut self, _: &Gpt, _: usize) -> anyhow::Result<String> {
        Ok(String::new())
    }
}

/// The quickstart's model with fresh adapters.
fn model(alpha: f64) -> Gpt {
    let checkpoint = Checkpoint::open(&tiny()).unwrap();
    let mut gpt = Gpt::load(&checkpoint.config, &checkpoint, Store::F32, None, &mut |_| {}).unwrap();
    with_adapters(&mut gpt, alpha);
    gpt
}

fn with_adapters(gpt: &mut Gpt, alpha: f64) {
    with_dropout(gpt, alpha, 0.1);
}

fn with_dropout(gpt: &mut Gpt, alpha: f64, dropout: f64) {
    let config = LoraConfig { r: 4, alpha, rslora: false, dropout };
    gpt.attach(|name| name.ends_with("q_proj").then_some(config));
    gpt.initialize_adapters(1);
}

fn samples(seed: u64, count: usize) -> Vec<Sample> {
    let mut state = seed;
    let mut sample = |row| {
        let input_ids: Vec<u32> = (0..12).map(|_| (random(&mut state) % 1000) as u32).collect();
        let labels = input_ids.iter().map(|id| *id as i32).collect();
        Sample { input_ids, labels, prompt_len: 0, raw_len: 12, row: Origin { file: 0, row } }
    };
    (1..=count).map(&mut sample).collect()
}

/// Samples of several lengths, of which some begin with one of two prefixes.
fn alike(count: usize) -> Vec<Sample> {
    let prefixes = [3, 4].map(|seed| samples(seed, 17).into_iter().flat_map(|s| s.input_ids).collect::<Vec<u32>>());
    let mut samples = samples(5, count);
    for (i, sample) in samples.iter_mut().enumerate() {
        let prefix = [&prefixes[0][..], &prefixes[1][..150], &[]][[0, 1, 0, 2, 0, 1, 0, 2][i % 8]];
        let ids = &mut sample.input_ids;
        ids.truncate(2 + i * 5 % 11);
        *ids = [prefix, ids].concat();
        // Some of each prefix is learned.
        sample.labels = ids.iter().enumerate().map(|(at, id)| if at < 40 { -100 } else { *id as i32 }).collect();
        sample.labels[ids.len() - 1] = ids[ids.len() - 1] as i32;
    }
    samples
}

/// Two epochs over seven samples, three to a step: windows of 3, 3, 3, 3 and 2 micro batches.
fn run_in_memory(gpt: &mut Gpt, outside: &mut InMemory, from: Option<(Progress, Moments)>) -> anyhow::Result<Summary> {
    run_over(&samples(1, 7), &samples(2, 2), (3, false), gpt, outside, from)
}

fn run_over(
    train: &[Sample],
    val: &[Sample],
    (batch, sharing): (usize, bool),
    gpt: &mut Gpt,
    outside: &mut InMemory,
    from: Option<(Progress, Moments)>,
) -> anyhow::Result<Summary> {
    let mut settings = FinetuneSettings::default();
    (settings.train.global_batch_size, settings.train.epochs) = (batch, Some(2));
    (settings.eval.interval, settings.train.save_interval) = (2, None);
    settings.data.ignore_index = -100;
    let packs = side_by_side(&settings, train);
    let prefix = if sharing { prefix::longest(train) } else { 0 };
    let mut job = Job { gpt, train, packs: &packs, val, settings: &settings, checkpointing: false, prefix };
    fit(&mut job, outside, from)
}

/// In passes of its own and side by side, over masked and learned targets, for training and validation.
#[test]
fn a_run_that_shares_prefixes_is_the_run_that_does_not() {
    let (train, val) = (alike(14), alike(5));
    let mut passes = Vec::new();
    let runs = [true, false].map(|sharing| {
        let (mut gpt, mut outside) = (model(12.0), InMemory::new(usize::MAX));
        with_dropout(&mut gpt, 12.0, 0.0);
        let summary = run_over(&train, &val, (8, sharing), &mut gpt, &mut outside, None).unwrap();
        let targets = train.iter().map(|s| s.input_ids.len() as u64).sum::<u64>();
        assert_eq!((summary.at.step, summary.at.tokens), (4, 2 * targets));
        passes.push(outside.asked.get());
        (outside.losses, outside.saved.unwrap().2)
    });
    let [(shared, of_shared), (alone, of_alone)] = runs;
    assert_eq!(shared.len(), alone.len());
    assert!(shared.iter().zip(&alone).all(|(a, b)| (a / b - 1.0).abs() < 1e-5), "{shared:?} {alone:?}");
    // Parameters, and the gradients and their squares as the optimizer sums them.
    for (shared, alone) in of_shared.iter().zip(&of_alone) {
        let scale = alone.iter().fold(0.0f32, |most, v| most.max(v.abs()));
        let largest = shared.iter().zip(alone).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
        assert!(scale > 0.0 && largest <= 1e-4 * scale, "{largest:e} of {scale:e}");
    }
    assert_ne!(passes[0], passes[1], "nothing was shared");
}

#[test]
fn a_stop_beside_a_prefix_forgets_the_window() {
    let (train, val) = (alike(14), alike(5));
    let run =
        |gpt: &mut Gpt, outside: &mut InMemory, from| run_over(&train, &val, (8, true), gpt, outside, from).unwrap();
    let mut whole = InMemory::new(usize::MAX);
    assert_eq!(run(&mut model(12.0), &mut whole, None).at.step, 4);
    let passes = whole.asked.get();
    assert!(passes > 8, "{passes}");
    for before in 0..passes {
        let mut first = InMemory::new(before);
        assert!(run(&mut model(12.0), &mut first, None).stopped);
        let (progress, updates, values) = first.saved.unwrap();
        let [parameters, m, v] = values.map(|values| Matrix::from_slice(1, values.len(), &values));
        let (mut gpt, mut second) = (model(12.0), InMemory::new(usize::MAX));
        gpt.set_parameters(&parameters);
        run(&mut gpt, &mut second, Some((progress, Moments { m, v, step: updates })));
        assert!(second.saved == whole.saved, "stopped before pass {before}");
        assert_eq!([first.losses, second.losses].concat(), whole.losses, "stopped before pass {before}");
    }
}

#[test]
fn a_stop_inside_an_accumulation_window_forgets_the_window() {
    let mut whole = InMemory::new(usize::MAX);
    let summary = run_in_memory(&mut model(12.0), &mut whole, None).unwrap();
    assert_eq!((summary.at.step, summary.at.iter), (5, 14));
    for before in 0..14 {
        let mut first = InMemory::new(before);
        assert!(run_in_memory(&mut model(12.0), &mut first, None).unwrap().stopped);
        let (progress, updates, values) = first.saved.unwrap();
        let [parameters, m, v] = values.map(|values| Matrix::from_slice(1, values.len(), &values));
        let begun = before / 3 * 3;
        assert_eq!((progress.step, progress.iter), (before / 3, begun), "stopped before micro batch {before}");
        let (mut gpt, mut second) = (model(12.0), InMemory::new(usize::MAX));
        gpt.set_parameters(&parameters);
        run_in_memory(&mut gpt, &mut second, Some((progress, Moments { m, v, step: updates }))).unwrap();
        assert_eq!(second.asked.get(), 14 - begun, "micro batches after a stop before the {before}th");
        assert!(second.saved == whole.saved, "stopped before micro batch {before}");
        assert_eq!([first.losses, second.losses].concat(), whole.losses, "stopped before micro batch {before}");
    }
}

/// A factor on the loss that is a power of two changes no bit, and one that is too large takes a step again.
#[test]
fn a_loss_scale_that_is_too_large_falls_and_loses_no_step() {
    let (mut plain, mut scaled) = (InMemory::new(usize::MAX), InMemory::new(usize::MAX));
    run_in_memory(&mut model(12.0), &mut plain, None).unwrap();
    let mut gpt = model(12.0);
    let moments = Moments::new(&gpt.parameters);
    let progress = Progress { loss_scale: Some(LossScale::new(2f32.powi(127))), ..Progress::default() };
    run_in_memory(&mut gpt, &mut scaled, Some((progress, moments))).unwrap();
    let (plain_saved, scaled_saved) = (plain.saved.unwrap(), scaled.saved.unwrap());
    assert!(scaled.asked.get() > 14, "no step was taken again");
    assert_eq!((scaled_saved.0.step, scaled_saved.0.tokens, scaled_saved.0.skipped), (5, plain_saved.0.tokens, 0));
    assert_eq!(scaled.losses, plain.losses);
    assert!(scaled_saved.2 == plain_saved.2, "parameters and moments");
}

/// In f16 on a device the run is that of f32, but for the rounding, and its factor is saved.
#[test]
fn half_precision_on_a_device_trains_as_f32_does() {
    let Some(device) = crate::emulated::device() else { return };
    let (mut host, mut half) = (InMemory::new(usize::MAX), InMemory::new(usize::MAX));
    run_in_memory(&mut model(12.0), &mut host, None).unwrap();
    let checkpoint = Checkpoint::open(&tiny()).unwrap();
    let (config, quantizer) = (&checkpoint.config, None);
    let mut gpt = Gpt::load_on(Some(&device), config, &checkpoint, Store::F16, quantizer, &mut |_| {}).unwrap();
    with_adapters(&mut gpt, 12.0);
    let moments = Moments::new(&gpt.parameters);
    let progress = Progress { loss_scale: Some(LossScale::new(2f32.powi(19))), ..Progress::default() };
    run_in_memory(&mut gpt, &mut half, Some((progress, moments))).unwrap();
    let progress = half.saved.unwrap().0;
    assert!(progress.loss_scale.unwrap().factor() < 2f32.powi(19), "{progress:?}");
    assert_eq!((progress.step, progress.skipped), (5, 0));
    for (half, host) in half.losses.iter().zip(&host.losses) {
        assert!((half - host).abs() < 0.02, "{half} against {host}");
    }
}

/// The loss is finite, as B = 0; the gradient of B is beyond f32.
#[test]
fn an_infinite_gradient_moves_nothing() {
    let mut gpt = model(1e7);
    gpt.parameters.iter_mut().for_each(|a| *a *= 1e35);
    let before = gpt.parameters.to_host().to_vec();
    let mut outside = InMemory::new(usize::MAX);
    let error = run_in_memory(&mut gpt, &mut outside, None).unwrap_err().to_string();
    assert!(error.contains("5 steps in a row") && error.contains("the gradient norm is inf"), "{error}");
    assert!(error.contains("(training rows "), "{error}");
    assert!(*gpt.parameters.to_host() == *before && outside.losses.len() == 2, "{:?}", outside.losses);
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
