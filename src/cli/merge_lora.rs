//! `litgpt merge_lora`: adapter and base become one folder, Hugging Face's or LitGPT's.

use super::args::{MergeArgs, MergeFormat};
use super::convert::refuse_existing;
use super::load::{MANIFEST, Manifest, PROMPT_STYLE, base_dir, quantizer, weights};
use super::recipe::HYPERPARAMETERS;
use super::ui::Ui;
use crate::checkpoint::convert::{Export, litgpt_name};
use crate::checkpoint::litgpt::{self, Qkv};
use crate::checkpoint::merge::{merge, require_adapter};
use crate::checkpoint::write::Staging;
use crate::checkpoint::{Checkpoint, Dtype, Layout, adapter};
use crate::error::{Error, Result};
use crate::model::Gpt;
use crate::ops::weight::Store;
use crate::train::settings::Precision;
use std::path::Path;

/// Runs the command.
pub fn run(args: &MergeArgs, ui: &mut Ui) -> anyhow::Result<()> {
    if args.format == MergeFormat::Gguf {
        let what = "merge_lora --format gguf";
        return Err(Error::unsupported(what, "merge as hf; other programs convert that folder").into());
    }
    let dir = args.model.path()?;
    require_adapter(&dir)?;
    let out_dir = args.out_dir.clone().unwrap_or_else(|| dir.join("merged"));
    refuse_existing(&out_dir, &["config.json", litgpt::WEIGHTS])?;
    let base = base_dir(&dir, args.pretrained_checkpoint_dir.as_deref())?;
    let checkpoint = Checkpoint::open(&base)?;
    check_base(&dir, &checkpoint)?;
    let manifest = Manifest::read(&dir)?;
    let quantizer = quantizer(manifest.as_ref().and_then(|m| m.quantize.as_deref()))?;
    // The adapter's shapes are read through a model; bf16 keeps that model small. Of its weights only those that were
    // quantized are written, which decode to f32.
    let mut gpt = weights(&checkpoint, Store::Bf16, quantizer, ui)?;
    adapter::load(&dir, checkpoint.family, &mut gpt)?;
    let staging = Staging::new(&out_dir)?;
    let export = Export { checkpoint: &checkpoint, adapters: Some(&gpt), dtype: dtype(args.precision)? };
    write(args.format, &export, &gpt, &staging, ui)?;
    staging.copy(&dir, &[PROMPT_STYLE, HYPERPARAMETERS, "tokenizer.json", "tokenizer_config.json"])?;
    if let Some(manifest) = manifest {
        staging.write(MANIFEST, serde_json::to_string_pretty(&manifest)?.as_bytes())?;
    }
    staging.commit()?;
    ui.note(&format!("merged into {}", out_dir.display()));
    ui.note(&format!("next: litgpt generate --checkpoint_dir {} --prompt \"...\"", out_dir.display()));
    Ok(())
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

/// The dtype that a precision writes; `None` for the base's own.
fn dtype(precision: Option<Precision>) -> Result<Option<Dtype>> {
    match precision {
        None => Ok(None),
        Some(Precision::F32True) => Ok(Some(Dtype::F32)),
        Some(Precision::Bf16True) => Ok(Some(Dtype::Bf16)),
        Some(Precision::F16True) => Ok(Some(Dtype::F16)),
        Some(mixed) => {
            let message = format!("--precision {mixed}: a merged model has one precision");
            Err(Error::usage(message, "give 32-true, bf16-true or 16-true, or leave it out for the base model's"))
        }
    }
}

/// Refuses a base that is not the one the adapter was trained on.
fn check_base(dir: &Path, checkpoint: &Checkpoint) -> Result<()> {
    let Some(manifest) = Manifest::read(dir)? else { return Ok(()) };
    if manifest.base_hash == checkpoint.content_hash()? {
        return Ok(());
    }
    let message = format!(
        "the base model `{}` is not what the adapter was trained on: its weights or config.json changed",
        checkpoint.dir.display()
    );
    Err(Error::refused(message, "restore it, or name the right one with --pretrained_checkpoint_dir"))
}
