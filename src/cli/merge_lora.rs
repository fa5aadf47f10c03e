//! `litgpt merge_lora`: adapter and base become one folder, Hugging Face's or LitGPT's, or one GGUF file.

use super::args::{GgufType, MergeArgs, MergeFormat};
use super::convert::refuse_existing;
use super::load::{
    Compute, MANIFEST, Manifest, PROMPT_STYLE, base_dir, changed_base, prompt_style, quantizer, tokenizer, weights,
};
use super::recipe::HYPERPARAMETERS;
use super::ui::{Ui, available_memory};
use crate::checkpoint::convert::{Export, litgpt_name};
use crate::checkpoint::gguf::{Gguf, Kind, Words};
use crate::checkpoint::litgpt::{self, Qkv};
use crate::checkpoint::merge::{merge, require_adapter};
use crate::checkpoint::write::Staging;
use crate::checkpoint::{Checkpoint, Dtype, Layout, adapter};
use crate::error::{Error, Result};
use crate::model::Gpt;
use crate::ops::matrix::Matrix;
use crate::train::settings::Precision;
use serde_json::json;
use std::path::Path;

/// File of a merged folder that says of what adapter it is.
const MERGED_FROM: &str = "merged_from.json";

/// Files of an adapter folder on which the merged one hangs.
const OF_ADAPTER: [&str; 8] = [
    adapter::TENSORS,
    "adapter_model.bin",
    adapter::CONFIG,
    litgpt::ADAPTER,
    MANIFEST,
    PROMPT_STYLE,
    HYPERPARAMETERS,
    "tokenizer.json",
];

/// What is read before and after merging, to see that the answers stay the same.
const PROBE: &str = "The quick brown fox jumps over the lazy dog, 12 times 12 is 144, and water boils at 100 degrees.";

/// 32 bit where there is room, so that what differs afterwards comes from the merging alone.
fn compute(checkpoint: &Checkpoint) -> Compute {
    let bytes = checkpoint.config.parameters() * 5;
    let fits = available_memory().is_none_or(|free| bytes < free);
    Compute { device: None, precision: if fits { Precision::F32True } else { Precision::Bf16True } }
}

fn logits(gpt: &mut Gpt, ids: &[u32]) -> Matrix {
    gpt.prepare(ids.len());
    gpt.all_logits(ids, &mut gpt.cache())
}

/// How far the logits of the merged model are from those of the unmerged one. LitGPT's may have more columns, of tokens
/// that do not exist.
fn difference(unmerged: &Matrix, merged: &Matrix) -> String {
    let (mut apart, mut largest, mut same) = (0f32, 0f32, 0);
    let rows = unmerged.chunks_exact(unmerged.cols()).zip(merged.chunks_exact(merged.cols()));
    for (before, after) in rows {
        let likeliest = |row: &[f32]| row.iter().enumerate().max_by(|a, b| a.1.total_cmp(b.1)).map(|(id, _)| id);
        let pairs = before.iter().zip(after);
        apart = pairs.map(|(a, b)| (a - b).abs()).fold(apart, f32::max);
        largest = before.iter().fold(largest, |largest, v| largest.max(v.abs()));
        same += usize::from(likeliest(before) == likeliest(after));
    }
    format!(
        "logits of a fixed text, merged and not: at most {apart:.1e} apart, of up to {largest:.1}; the same token is \
         the likeliest at {same} of {} places",
        unmerged.rows()
    )
}

/// Runs the command.
pub fn run(args: &MergeArgs, ui: &mut Ui) -> anyhow::Result<()> {
    check_flags(args)?;
    let dir = args.model.path()?;
    require_adapter(&dir)?;
    let out_dir = args.out_dir.clone().unwrap_or_else(|| dir.join("merged"));
    let gguf = (args.format == MergeFormat::Gguf).then(|| args.gguf_type.unwrap_or_default());
    let base = base_dir(&dir, args.pretrained_checkpoint_dir.as_deref())?;
    let checkpoint = Checkpoint::open(&base)?;
    let manifest = Manifest::read(&dir)?;
    let base_hash = checkpoint.content_hash()?;
    check_base(manifest.as_ref(), &checkpoint, &base_hash)?;
    let asked = asked(args, &dir, &base_hash)?;
    if is_done(&out_dir, &asked) {
        ui.note(&format!("nothing to do: `{}` is this adapter, merged already", out_dir.display()));
        return Ok(());
    }
    // A GGUF file stands beside others; any other model is a folder of its own.
    refuse_existing(&gguf.map_or_else(|| out_dir.clone(), |kind| out_dir.join(file_name(kind))))?;
    let quantizer = quantizer(manifest.as_ref().and_then(|m| m.quantize.as_deref()), &checkpoint)?;
    // The adapter's shapes are read through a model, of whose weights only those that were quantized are written.
    let compute = compute(&checkpoint);
    let mut gpt = weights(&checkpoint, &compute, quantizer, ui)?;
    adapter::load(&dir, checkpoint.family, &mut gpt)?;
    let ids = tokenizer(&dir, &checkpoint)?.encode_prompt(PROBE)?;
    let unmerged = logits(&mut gpt, &ids);
    let staging = Staging::new(&out_dir)?;
    let dtype = match args.precision {
        Some(precision) => Some(dtype(precision)?),
        None => trained_dtype(args.format, manifest.as_ref()).filter(|_| checkpoint.quantizer().is_none()),
    };
    let export = Export { checkpoint: &checkpoint, adapters: Some(&gpt), dtype };
    if let Some(kind) = gguf {
        write_gguf(&dir, &export, kind, &staging, ui)?;
    } else {
        write(args.format, &export, &gpt, &staging, ui)?;
        staging.copy(&dir, &[PROMPT_STYLE, HYPERPARAMETERS, "tokenizer.json", "tokenizer_config.json"])?;
        if let Some(manifest) = manifest {
            staging.write(MANIFEST, serde_json::to_string_pretty(&manifest)?.as_bytes())?;
        }
        staging.write(MERGED_FROM, asked.as_bytes())?;
    }
    // One model at a time.
    drop(gpt);
    let mut merged = weights(&Checkpoint::open(staging.dir())?, &compute, None, ui)?;
    ui.note(&difference(&unmerged, &logits(&mut merged, &ids)));
    if let Some(kind) = gguf {
        staging.commit_beside()?;
        ui.note(&format!("merged into {}", out_dir.join(file_name(kind)).display()));
        return Ok(());
    }
    staging.commit()?;
    ui.note(&format!("merged into {}", out_dir.display()));
    ui.note(&format!("next: litgpt generate --checkpoint_dir {} --prompt \"...\"", out_dir.display()));
    Ok(())
}

/// What is asked for, as [`MERGED_FROM`] has it: of which adapter and base, by their content, and in which form.
fn asked(args: &MergeArgs, dir: &Path, base_hash: &str) -> Result<String> {
    let mut hasher = blake3::Hasher::new();
    for path in OF_ADAPTER.map(|name| dir.join(name)).into_iter().filter(|path| path.is_file()) {
        hasher.update_mmap(&path).map_err(Error::io("read", &path))?;
    }
    let asked = json!({
        "adapter": hasher.finalize().to_hex().as_str(),
        "base": base_hash,
        "format": format!("{:?}", args.format).to_lowercase(),
        "precision": args.precision.map(Precision::name),
    });
    Ok(format!("{asked:#}"))
}

/// Whether `out_dir` holds what was `asked` for, so that a script may run twice.
fn is_done(out_dir: &Path, asked: &str) -> bool {
    std::fs::read_to_string(out_dir.join(MERGED_FROM)).is_ok_and(|done| done == asked)
        && Checkpoint::open(out_dir).is_ok()
}

/// Fills `staging` with the merged model.
fn write(format: MergeFormat, export: &Export<'_>, gpt: &Gpt, staging: &Staging, ui: &mut Ui) -> Result<()> {
    let checkpoint = export.checkpoint;
    if format == MergeFormat::Litgpt {
        ui.begin("merge", export.len(Layout::Litgpt(Qkv::Below))? as u64, false);
        export.litgpt(staging, &litgpt_name(checkpoint, &checkpoint.dir), &mut |_| ui.advance(1))?;
    } else {
        ui.begin("merge", checkpoint.files().values().map(Vec::len).sum::<usize>() as u64, false);
        merge(checkpoint, gpt, staging, export.dtype, &mut |_| ui.advance(1))?;
    }
    ui.end();
    Ok(())
}

/// Refuses flags of one format with another.
fn check_flags(args: &MergeArgs) -> Result<()> {
    let gguf = args.format == MergeFormat::Gguf;
    if gguf && args.precision.is_some() {
        return Err(Error::usage("--precision does not go with --format gguf", "choose with --gguf_type"));
    }
    if !gguf && args.gguf_type.is_some() {
        return Err(Error::usage("--gguf_type goes with --format gguf only", "add --format gguf, or leave it out"));
    }
    Ok(())
}

/// The file of a merged model in GGUF.
fn file_name(elements: GgufType) -> &'static str {
    match elements {
        GgufType::F16 => "model-f16.gguf",
        GgufType::Q8 => "model-q8_0.gguf",
        GgufType::Q4 => "model-q4_0.gguf",
    }
}

/// Writes the merged model, with the tokenizer of the adapter `dir`, as one file into `staging`.
fn write_gguf(dir: &Path, export: &Export<'_>, elements: GgufType, staging: &Staging, ui: &mut Ui) -> Result<()> {
    let tokenizer = tokenizer(dir, export.checkpoint)?;
    // The adapter answers in the style of its training: what runs the file is told that one, not the base's.
    let trained = if dir.join(PROMPT_STYLE).is_file() { prompt_style(dir, None, &tokenizer)?.jinja() } else { None };
    let path = tokenizer.dir().join("tokenizer.json");
    let embedded = export.checkpoint.companion("tokenizer.json")?.filter(|_| !path.is_file());
    let json = embedded.map_or_else(|| std::fs::read_to_string(&path).map_err(Error::io("read", &path)), Ok)?;
    let words = Words {
        json: &json,
        path: &path,
        bos: tokenizer.bos_id(),
        eos: tokenizer.eos_id(),
        add_bos: tokenizer.adds_bos(),
        chat_template: trained.as_deref().or(tokenizer.chat_template()),
    };
    let kind = match elements {
        GgufType::F16 => Kind::F16,
        GgufType::Q8 => Kind::Q8_0,
        GgufType::Q4 => Kind::Q4_0,
    };
    let gguf = Gguf::new(export, words, kind)?;
    ui.begin("merge", gguf.tensors() as u64, false);
    let title = litgpt_name(export.checkpoint, &export.checkpoint.dir);
    gguf.write(staging, file_name(elements), &title, &mut |_| ui.advance(1))?;
    ui.end();
    Ok(())
}

/// The dtype of the training, as LitGPT merges: the sum of a run in 32 bit is not rounded to a base of 16, which would
/// change its answers. `None`, the base's own, for 4- and 8-bit bases, GGUF files, and adapters of others.
fn trained_dtype(format: MergeFormat, manifest: Option<&Manifest>) -> Option<Dtype> {
    let manifest = manifest.filter(|m| m.quantize.is_none() && format != MergeFormat::Gguf)?;
    match manifest.precision.as_deref()?.parse().ok()? {
        Precision::F32True | Precision::Bf16Mixed | Precision::F16Mixed => Some(Dtype::F32),
        Precision::Bf16True => Some(Dtype::Bf16),
        Precision::F16True => Some(Dtype::F16),
    }
}

/// The dtype that a precision writes.
fn dtype(precision: Precision) -> Result<Dtype> {
    match precision {
        Precision::F32True => Ok(Dtype::F32),
        Precision::Bf16True => Ok(Dtype::Bf16),
        Precision::F16True => Ok(Dtype::F16),
        mixed => {
            let message = format!("--precision {mixed}: a merged model has one precision");
            Err(Error::usage(message, "give 32-true, bf16-true or 16-true, or leave it out for the training's"))
        }
    }
}

/// Refuses a base that is not the one the adapter was trained on.
fn check_base(manifest: Option<&Manifest>, checkpoint: &Checkpoint, base_hash: &str) -> Result<()> {
    if manifest.is_none_or(|manifest| manifest.base_hash == base_hash) {
        return Ok(());
    }
    Err(Error::refused(changed_base(checkpoint), "restore it, or name the right one with --pretrained_checkpoint_dir"))
}
