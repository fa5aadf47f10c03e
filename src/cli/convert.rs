//! `litgpt convert_to_litgpt` and `litgpt convert_from_litgpt`: between Hugging Face's folders and LitGPT's.

use super::args::{ConvertFromArgs, ConvertToArgs};
use super::load::PROMPT_STYLE;
use super::recipe::HYPERPARAMETERS;
use super::ui::Ui;
use crate::checkpoint::convert::{Export, litgpt_name};
use crate::checkpoint::litgpt::{self, Qkv};
use crate::checkpoint::write::Staging;
use crate::checkpoint::{Checkpoint, Dtype, Layout, adapter, litgpt_only};
use crate::error::{Error, Result};
use std::path::Path;

/// Runs `convert_to_litgpt`: LitGPT's files appear beside the others.
pub fn to_litgpt(args: &ConvertToArgs, ui: &mut Ui) -> anyhow::Result<()> {
    let dir = args.model.path()?;
    if adapter::is_adapter(&dir) {
        let message = format!("`{}` is an adapter, not a whole model", dir.display());
        return Err(Error::refused(message, "litgpt merge_lora --format litgpt writes it merged").into());
    }
    if litgpt_only(&dir) {
        let message = format!("`{}` is a LitGPT checkpoint already", dir.display());
        return Err(Error::refused(message, "use it as it is").into());
    }
    let dtype = args.dtype.as_deref().map(dtype).transpose()?;
    let checkpoint = Checkpoint::open(&dir)?;
    if matches!(checkpoint.layout, Layout::Gguf { .. }) {
        let what = format!("convert_to_litgpt of a GGUF file (`{}`)", checkpoint.dir.display());
        return Err(Error::unsupported(what, "finetune it; merge_lora --format litgpt writes the result").into());
    }
    let export = Export { checkpoint: &checkpoint, adapters: None, dtype };
    let name = args.model_name.clone().unwrap_or_else(|| litgpt_name(&checkpoint, &dir));
    let config = export.litgpt_config(&name)?;
    ui.begin("convert", export.len(Layout::Litgpt(Qkv::Below))? as u64, false);
    let partial =
        tempfile::Builder::new().prefix(".partial-").tempfile_in(&dir).map_err(Error::io("write in", &dir))?;
    export.litgpt_weights(partial.path(), &mut |_| ui.advance(1))?;
    ui.end();
    open_to_all(partial.path())?;
    let config_path = dir.join(litgpt::CONFIG);
    std::fs::write(&config_path, config).map_err(Error::io("write", &config_path))?;
    let path = dir.join(litgpt::WEIGHTS);
    partial.persist(&path).map_err(|e| Error::io("write", &path)(e.error))?;
    ui.note(&format!("wrote {} and {} as `{name}`", path.display(), litgpt::CONFIG));
    Ok(())
}

/// Temporary files are private to their owner; results are not.
#[cfg(unix)]
fn open_to_all(path: &Path) -> Result<()> {
    use std::os::unix::fs::PermissionsExt;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o644)).map_err(Error::io("write", path))
}

#[cfg(not(unix))]
fn open_to_all(_: &Path) -> Result<()> {
    Ok(())
}

/// LitGPT's and PyTorch's names of dtypes.
fn dtype(name: &str) -> Result<Dtype> {
    match name.trim_start_matches("torch.") {
        "float32" | "float" => Ok(Dtype::F32),
        "bfloat16" => Ok(Dtype::Bf16),
        "float16" | "half" => Ok(Dtype::F16),
        _ => Err(Error::usage(format!("unknown --dtype `{name}`"), "give float32, bfloat16 or float16")),
    }
}

/// Runs `convert_from_litgpt`: a Hugging Face folder from LitGPT's files.
pub fn from_litgpt(args: &ConvertFromArgs, ui: &mut Ui) -> anyhow::Result<()> {
    let (dir, out) = args.paths()?;
    if !dir.join(litgpt::WEIGHTS).is_file() {
        if adapter::has_adapter(&dir) {
            let message = format!("`{}` is an adapter that is not merged", dir.display());
            return Err(Error::refused(message, format!("litgpt merge_lora --checkpoint_dir {}", dir.display())).into());
        }
        let hint = "CHECKPOINT_DIR is a folder of LitGPT's, with lit_model.pth".to_owned();
        return Err(
            Error::Missing { what: "LitGPT checkpoint".to_owned(), path: dir.join(litgpt::WEIGHTS), hint }.into()
        );
    }
    refuse_existing(&out)?;
    let checkpoint = Checkpoint::open_litgpt(&dir)?;
    let export = Export { checkpoint: &checkpoint, adapters: None, dtype: None };
    let staging = Staging::new(&out)?;
    ui.begin("convert", export.len(Layout::HuggingFace)? as u64, false);
    export.hugging_face(&staging, &mut |_| ui.advance(1))?;
    ui.end();
    staging.copy(&dir, &[PROMPT_STYLE, HYPERPARAMETERS])?;
    staging.commit()?;
    ui.note(&format!("wrote {}", out.display()));
    ui.note(&format!("next: litgpt generate --checkpoint_dir {} --prompt \"...\"", out.display()));
    Ok(())
}

/// Refuses an output folder that holds anything: it would be replaced as a whole.
///
/// # Errors
/// When it does, or is no folder.
pub fn refuse_existing(out: &Path) -> Result<()> {
    let empty = |out: &Path| std::fs::read_dir(out).map(|mut files| files.next().is_none());
    if !out.exists() || empty(out).unwrap_or(false) {
        return Ok(());
    }
    let message = format!("`{}` is there already", out.display());
    Err(Error::refused(message, "use it as it is, delete it, or give another folder"))
}
