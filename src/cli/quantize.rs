//! `litgpt quantize`: a copy of a model whose weights are kept in few bits, so that it is small on disk and loads at
//! once, here and in transformers.

use super::args::QuantizeArgs;
use super::convert::refuse_existing;
use super::load::{PROMPT_STYLE, quantizer};
use super::ui::Ui;
use crate::checkpoint::bnb;
use crate::checkpoint::convert::Export;
use crate::checkpoint::write::Staging;
use crate::checkpoint::{Checkpoint, Layout, adapter};
use crate::error::{Error, Result};
use std::path::{Path, PathBuf};

/// Runs the command.
pub fn run(args: &QuantizeArgs, ui: &mut Ui) -> anyhow::Result<()> {
    let dir = args.model.path()?;
    if adapter::is_adapter(&dir) {
        let message = format!("`{}` is an adapter, not a whole model", dir.display());
        return Err(Error::refused(message, "merge it first: litgpt merge_lora").into());
    }
    let out = args.out_dir.clone().map_or_else(|| beside(&dir, &args.quantize), Ok)?;
    refuse_existing(&out)?;
    let checkpoint = Checkpoint::open(&dir)?;
    if checkpoint.quantizer().is_some() {
        let message = format!("`{}` is quantized already", dir.display());
        return Err(Error::refused(message, "use it as it is").into());
    }
    let quantizer = quantizer(Some(&args.quantize), &checkpoint)?.expect("a name was given");
    let export = Export { checkpoint: &checkpoint, adapters: None, dtype: None };
    let staging = Staging::new(&out)?;
    ui.begin("quantize", export.len(Layout::HuggingFace)? as u64, false);
    bnb::write(&export, quantizer, &staging, &mut |_| ui.advance(1))?;
    ui.end();
    staging.copy(&dir, &[PROMPT_STYLE])?;
    staging.commit()?;
    ui.note(&format!("wrote {}", out.display()));
    ui.note(&format!("next: litgpt finetune lora --checkpoint_dir {} --data Alpaca", out.display()));
    Ok(())
}

/// The folder beside `dir` that is named after it and the quantizer.
fn beside(dir: &Path, quantizer: &str) -> Result<PathBuf> {
    let whole = dir.canonicalize().map_err(Error::io("read", dir))?;
    let name = whole.file_name().unwrap_or_default().to_string_lossy();
    Ok(dir.join("..").join(format!("{name}-{quantizer}")))
}
