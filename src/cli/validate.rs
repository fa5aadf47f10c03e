//! `litgpt validate`: whether a folder's parts are there and belong together, what it can be used for, and about how much
//! memory that takes. Nothing is written; all problems are gathered before it fails.

use super::args::ValidateArgs;
use super::load::{Compute, MANIFEST, Manifest, PROMPT_STYLE, base_dir, prompt_style, tokenizer, weights};
use super::ui::Ui;
use crate::checkpoint::{Checkpoint, Layout, adapter, litgpt, state};
use crate::data::chat::ChatTemplate;
use crate::error::{Error, Result};
use crate::model::quantizer::Quantizer;
use crate::ops::weight::Store;
use crate::train::estimate::{Computed, Estimate};
use crate::train::settings::FinetuneSettings;
use std::path::Path;

/// Length of the samples and answers that memory is counted for.
const TOKENS: usize = 512;

/// Precisions that memory is counted for: flags, LitGPT's dtype, how weights are kept, and those of the blocks quantized.
type Row = (&'static str, &'static str, Store, Option<&'static str>);
const PRECISIONS: &[Row] = &[
    ("--precision 32-true", "float32", Store::F32, None),
    ("--precision bf16-true", "bfloat16", Store::Bf16, None),
    ("--precision 16-true", "float16", Store::F16, None),
    ("--precision bf16-true --quantize int8", "int8", Store::Bf16, Some("int8")),
    ("--precision bf16-true --quantize nf4", "nf4", Store::Bf16, Some("nf4")),
];

/// What was found out about a folder.
#[derive(Debug, Default)]
struct Findings {
    lines: Vec<String>,
    uses: Vec<String>,
    problems: Vec<String>,
}

impl Findings {
    /// What `result` holds; its error is a problem.
    fn note<T>(&mut self, result: Result<T>) -> Option<T> {
        result.map_err(|error| self.problems.push(error.to_string())).ok()
    }
}

/// Runs the command.
pub fn run(args: &ValidateArgs, ui: &mut Ui) -> anyhow::Result<()> {
    let dir = args.model.path()?;
    let rows = precisions(args.dtype.as_deref())?;
    if !dir.is_dir() {
        let hint = "`litgpt download REPO` fetches a model".to_owned();
        return Err(Error::Missing { what: "folder".to_owned(), path: dir, hint }.into());
    }
    let mut found = Findings::default();
    let is_adapter = adapter::is_adapter(&dir);
    let base = if is_adapter { found.note(base_dir(&dir, None)) } else { Some(dir.clone()) };
    let checkpoint = base.and_then(|base| found.note(open(&base, args.model_filename.as_deref())));
    if let Some(checkpoint) = &checkpoint {
        describe(checkpoint, &mut found);
        check_words(&dir, checkpoint, &mut found);
    }
    if is_adapter {
        check_adapter(&dir, checkpoint.as_ref(), &mut found, ui);
    } else {
        found.uses.extend(["litgpt generate", "litgpt finetune_lora"].map(str::to_owned));
        let other = if checkpoint.as_ref().is_some_and(|c| c.layout == Layout::HuggingFace) { "to" } else { "from" };
        found.uses.push(format!("litgpt convert_{other}_litgpt"));
    }
    if !found.problems.is_empty() {
        return Err(refusal(&dir, found.problems, ui).into());
    }
    let mut text = found.lines.join("\n");
    text.push_str(&format!("\nusable for: {}\n", found.uses.join(", ")));
    if let Some(checkpoint) = &checkpoint {
        text.push_str(&memory(checkpoint, &rows)?);
    }
    ui.result(&text)
}

fn refusal(dir: &Path, problems: Vec<String>, ui: &Ui) -> Error {
    if problems.len() > 1 {
        problems.iter().for_each(|problem| ui.note(&format!("problem: {problem}")));
    }
    let what = format!("`{}` cannot be used as it is", dir.display());
    Error::Mismatch { what, problems, hint: "`litgpt download REPO` fetches what is missing or broken".to_owned() }
}

/// The rows of [`PRECISIONS`] that were asked for.
fn precisions(dtype: Option<&str>) -> Result<Vec<Row>> {
    let asked = |name: &str| dtype.is_none_or(|dtype| dtype.trim_start_matches("torch.") == name);
    let rows: Vec<Row> = PRECISIONS.iter().filter(|row| asked(row.1)).copied().collect();
    if rows.is_empty() {
        let names: Vec<&str> = PRECISIONS.iter().map(|row| row.1).collect();
        let message = format!("--dtype: no such number format: `{}`", dtype.unwrap_or_default());
        return Err(Error::usage(message, format!("give one of {}, or leave it out", names.join(", "))));
    }
    Ok(rows)
}

/// Opens a model by the weight file that was asked for, or whichever is there.
fn open(dir: &Path, file: Option<&str>) -> Result<Checkpoint> {
    if let Some(file) = file.filter(|file| !dir.join(file).is_file()) {
        let hint = "leave --model_filename out to check whichever is there".to_owned();
        return Err(Error::Missing { what: "weight file".to_owned(), path: dir.join(file), hint });
    }
    if file == Some(litgpt::WEIGHTS) { Checkpoint::open_litgpt(dir) } else { Checkpoint::open(dir) }
}

fn describe(checkpoint: &Checkpoint, found: &mut Findings) {
    let config = &checkpoint.config;
    let kind = if checkpoint.layout == Layout::HuggingFace { "Hugging Face" } else { "LitGPT" };
    found.lines.push(format!(
        "model: `{}`, {kind} folder of type {}, {:.1} M parameters, {} layers, context of {} tokens",
        checkpoint.dir.display(),
        checkpoint.hf.model_type().unwrap_or("unknown"),
        config.parameters() as f64 / 1e6,
        config.n_layer,
        config.block_size
    ));
    let files = checkpoint.files();
    let tensors: usize = files.values().map(Vec::len).sum();
    let names: Vec<String> = files.keys().filter_map(|p| Some(p.file_name()?.to_string_lossy().into_owned())).collect();
    found
        .lines
        .push(format!("weights: {tensors} tensors of the shapes that config.json gives, in {}", names.join(", ")));
}

/// Tokenizer, prompt style and chat template.
fn check_words(dir: &Path, checkpoint: &Checkpoint, found: &mut Findings) {
    let Some(tokenizer) = found.note(tokenizer(dir, checkpoint)) else { return };
    found.note(tokenizer.require_eos());
    let styled = if dir.join(PROMPT_STYLE).is_file() { dir } else { &checkpoint.dir };
    let style = found.note(prompt_style(styled, None, &tokenizer));
    found.lines.push(format!(
        "tokenizer: {} tokens for {} embeddings, BOS {}, prompt style {}",
        tokenizer.vocab_size(),
        checkpoint.config.vocab_size,
        if tokenizer.adds_bos() { "added" } else { "not added" },
        style.as_ref().map_or("unknown", |style| style.name())
    ));
    if tokenizer.chat_template().is_some() && found.note(ChatTemplate::of(&tokenizer)).is_some() {
        found.uses.push("--data.prompt_style chat".to_owned());
    }
}

/// The adapter's tensors against the model it belongs to, and what was recorded of that.
fn check_adapter(dir: &Path, checkpoint: Option<&Checkpoint>, found: &mut Findings, ui: &mut Ui) {
    let manifest = found.note(Manifest::read(dir)).flatten();
    let Some(checkpoint) = checkpoint else { return };
    if let (Some(manifest), Some(hash)) = (&manifest, found.note(checkpoint.content_hash()))
        && manifest.base_hash != hash
    {
        let base = checkpoint.dir.display();
        found
            .problems
            .push(format!("{MANIFEST} was written for other weights or another config.json than `{base}` has"));
    }
    // The adapter's shapes are read through a model; bf16 keeps that model small.
    let Some(mut gpt) = found.note(weights(checkpoint, &Compute::PROCESSOR, None, ui)) else { return };
    if found.note(adapter::load(dir, checkpoint.family, &mut gpt)).is_some() {
        let modules = gpt.linears().flat_map(|l| &l.parts).filter(|part| part.lora.is_some()).count();
        let parameters = gpt.parameters.cols();
        found.lines.push(format!("adapter: `{}`, {modules} modules, {parameters} parameters", dir.display()));
        found.uses.extend(["litgpt generate", "litgpt merge_lora"].map(str::to_owned));
    }
    if dir.join(state::TENSORS).is_file() {
        found.uses.push(format!("litgpt finetune_lora --resume {}", dir.display()));
    }
}

/// A table of about how much memory generating and finetuning take.
fn memory(checkpoint: &Checkpoint, rows: &[Row]) -> Result<String> {
    let config = &checkpoint.config;
    let settings = FinetuneSettings::default();
    let rank = settings.lora.lora_r;
    let tokens = TOKENS.min(config.block_size);
    let mut text = format!(
        "memory on the processor, about, for {tokens} tokens at once (finetuning: rank {rank} on query and value):\n"
    );
    // What is in few bits stays as it is.
    let own = checkpoint.quantizer();
    let rows = rows.iter().filter(|row| own.is_none() || row.3.is_none() || rows.len() == 1);
    let kept = own.map_or_else(String::new, |own| format!(" (blocks in {} already)", own.name()));
    for (flags, _, store, quantize) in rows {
        let quantizer = own.or(quantize.and_then(Quantizer::named));
        let narrow = checkpoint.narrow(*store, false)?;
        let whole = if own.is_some() { checkpoint.left_whole() } else { 0 };
        let computed = Computed {
            store: *store,
            narrow,
            quantizer,
            whole,
            on_device: false,
            tokens,
            checkpointing: false,
            prefix: 0,
        };
        let estimate = Estimate::of(config, &settings, computed);
        let cache = 4 * (2 * config.n_layer * config.kv_cols() * tokens + config.vocab_size);
        let (generate, finetune) = (estimate.weights + estimate.workspace + cache, estimate.total());
        text.push_str(&format!(
            "  {flags}{kept}: generate {:.2} GB, finetune {:.2} GB\n",
            generate as f64 / 1e9,
            finetune as f64 / 1e9
        ));
    }
    Ok(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_unknown_dtype_is_a_usage_error() {
        assert_eq!(precisions(Some("torch.bfloat16")).unwrap().len(), 1);
        assert_eq!(precisions(None).unwrap().len(), PRECISIONS.len());
        assert!(matches!(precisions(Some("float8")), Err(Error::Usage { .. })));
    }
}
