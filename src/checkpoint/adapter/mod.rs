//! PEFT adapter folders: `adapter_config.json` and `adapter_model.safetensors`, to and from a model's adapters.
//!
//! Where a family's files fuse modules (GPT-NeoX's `query_key_value`), PEFT knows only the fused one. Adapters on parts
//! of it are written as the equal fused adapter: the A's below one another, the B's block-diagonal over rows and ranks,
//! the rank summed and alpha scaled with it. A fused adapter loads as the same A for every part and its rows of B.
//!
//! Since transformers 5 the experts of a layer are two tensors, `gate_up_proj` and `down_proj`, to which PEFT gives one
//! adapter each (`target_parameters`): A has the experts' ranks below one another, B side by side, rank by rank. Here each
//! expert gets its own part of them; adapters are saved expert by expert, which PEFT reads too.

mod load;
mod settings;

pub use load::load;

use super::write::{Staging, TensorInfo, safetensors};
use super::{Checkpoint, Dtype, litgpt};
use crate::error::{Error, Result};
use crate::model::Gpt;
use crate::model::families::{Family, Piece};
use crate::model::linear::{Linear, Part};
use crate::model::lora::LoraConfig;
use serde_json::{Map, Value, json};
use std::collections::{BTreeMap, HashMap};
use std::ops::Range;
use std::path::Path;

/// Settings file of an adapter folder.
pub const CONFIG: &str = "adapter_config.json";
/// Tensors of an adapter folder.
pub const TENSORS: &str = "adapter_model.safetensors";
/// What stands before a module's name in a PEFT file.
const PREFIX: &str = "base_model.model.";

/// One module of the file with its adapter.
struct Module {
    a: Vec<f32>,
    b: Vec<f32>,
    r: usize,
    inputs: usize,
    alpha: f64,
}

/// A part of a fused module.
struct Member<'a> {
    part: &'a Part,
    inputs: usize,
    /// Its rows of the file's tensor; `None` for all.
    rows: Option<Vec<Range<usize>>>,
}

/// PEFT's module of the head, whatever its tensor is called in the family's files.
const HEAD: &str = "lm_head";
/// The same of a GPT-NeoX before transformers 5.
const OLD_HEAD: &str = "embed_out";

/// Rows of the file's tensor that a part is, and the file's module.
fn place(family: &Family, gpt: &Gpt, part: &str) -> (String, Option<Vec<Range<usize>>>) {
    if part == HEAD {
        return (HEAD.to_owned(), None);
    }
    let Piece { tensor, rows } = (family.locate)(&gpt.config, &format!("{part}.weight")).swap_remove(0);
    (tensor.trim_end_matches(".weight").to_owned(), rows)
}

/// The modules of the file that have adapters.
fn modules(family: &Family, gpt: &Gpt) -> BTreeMap<String, Module> {
    let mut groups: BTreeMap<String, Vec<Member<'_>>> = BTreeMap::new();
    let mut file_rows: HashMap<String, usize> = HashMap::new();
    for linear in gpt.linears() {
        for part in &linear.parts {
            let (module, rows) = place(family, gpt, &part.name);
            *file_rows.entry(module.clone()).or_default() += part.rows.len();
            if part.lora.is_some() {
                let member = Member { part, inputs: linear.inputs(), rows };
                groups.entry(module).or_default().push(member);
            }
        }
    }
    let parameters = gpt.parameters.to_host();
    groups.into_iter().map(|(module, parts)| (module.clone(), fuse(&parameters, &parts, file_rows[&module]))).collect()
}

fn fuse(parameters: &[f32], members: &[Member<'_>], file_rows: usize) -> Module {
    let r: usize = members.iter().filter_map(|m| m.part.lora.as_ref()).map(|l| l.config.r).sum();
    let mut module = Module { a: Vec::new(), b: vec![0.0; file_rows * r], r, inputs: members[0].inputs, alpha: 0.0 };
    let mut rank = 0;
    for Member { part, rows, .. } in members {
        let Some(lora) = &part.lora else { continue };
        module.a.extend_from_slice(&parameters[lora.a.clone()]);
        let all = 0..file_rows;
        let rows = rows.as_deref().unwrap_or(std::slice::from_ref(&all));
        let b = parameters[lora.b.clone()].chunks_exact(lora.config.r);
        for (row, b) in rows.iter().cloned().flatten().zip(b) {
            module.b[row * r + rank..][..lora.config.r].copy_from_slice(b);
        }
        rank += lora.config.r;
        // All parts of a fused module share alpha and r, so the fused scale is theirs: alpha' / r' = alpha / r, or of roots.
        let ratio = r as f64 / lora.config.r as f64;
        module.alpha = lora.config.alpha * if lora.config.rslora { ratio.sqrt() } else { ratio };
    }
    module
}

/// Writes the adapters of `gpt` into `staging` as PEFT has them; `base` is what PEFT loads the base model from.
///
/// # Errors
/// When the disk is full.
pub fn save(staging: &Staging, family: &Family, gpt: &Gpt, base: &str) -> Result<()> {
    let modules = modules(family, gpt);
    let first = gpt.linears().flat_map(|l| &l.parts).find_map(|p| p.lora.as_ref());
    let usual = first.map_or(LoraConfig { r: 0, alpha: 0.0, rslora: false, dropout: 0.0 }, |l| l.config);
    let suffix = |module: &str| module.rsplit('.').next().unwrap_or(module).to_owned();
    let (mut targets, mut ranks, mut alphas) = (Vec::new(), Map::new(), Map::new());
    for (name, module) in &modules {
        if !targets.contains(&suffix(name)) {
            targets.push(suffix(name));
        }
        if module.r != usual.r {
            ranks.insert(suffix(name), json!(module.r));
            alphas.insert(suffix(name), json!(module.alpha));
        }
    }
    targets.sort_unstable();
    let alpha = if usual.alpha.fract() == 0.0 { json!(usual.alpha as i64) } else { json!(usual.alpha) };
    let config = json!({
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base, "revision": null,
        "inference_mode": true, "r": usual.r, "lora_alpha": alpha, "lora_dropout": usual.dropout,
        "target_modules": targets, "rank_pattern": ranks, "alpha_pattern": alphas, "use_rslora": usual.rslora,
        "bias": "none", "fan_in_fan_out": false, "init_lora_weights": true, "modules_to_save": null,
        "layers_to_transform": null, "layers_pattern": null, "use_dora": false,
    });
    staging.write(CONFIG, serde_json::to_string_pretty(&config).expect("a JSON value is text").as_bytes())?;
    let mut infos = Vec::new();
    let mut contents: Vec<&[f32]> = Vec::new();
    for (name, module) in &modules {
        let outputs = module.b.len() / module.r;
        let shapes =
            [("lora_A", vec![module.r, module.inputs], &module.a), ("lora_B", vec![outputs, module.r], &module.b)];
        for (side, shape, values) in shapes {
            infos.push(TensorInfo { name: format!("{PREFIX}{name}.{side}.weight"), dtype: Dtype::F32, shape });
            contents.push(values);
        }
    }
    safetensors(&staging.dir().join(TENSORS), &infos, |i| Ok(Dtype::F32.encode(contents[i])))
}

/// An adapter folder that is another model's.
pub(in crate::checkpoint) fn misfit(dir: &Path, mut problems: Vec<String>) -> Error {
    problems.sort_unstable();
    problems.dedup();
    problems.truncate(8);
    let what = format!("the adapter `{}` does not fit the model", dir.display());
    Error::Mismatch { what, problems, hint: "use it with the base model it was trained on".to_owned() }
}

/// Whether `dir` is an adapter folder: PEFT's, or one that LitGPT finetuned and did not merge.
#[must_use]
pub fn is_adapter(dir: &Path) -> bool {
    dir.join(CONFIG).is_file() || dir.join(litgpt::ADAPTER).is_file() && !dir.join(litgpt::WEIGHTS).is_file()
}

/// Whether `dir` holds an adapter, merged already or not.
#[must_use]
pub fn has_adapter(dir: &Path) -> bool {
    dir.join(CONFIG).is_file() || dir.join(litgpt::ADAPTER).is_file()
}

/// The base that an adapter folder names: PEFT's `base_model_name_or_path`, LitGPT's `checkpoint_dir`.
///
/// # Errors
/// When the file is broken or names none.
pub fn base_of(dir: &Path) -> Result<String> {
    let path = dir.join(CONFIG);
    if !path.is_file() && dir.join(litgpt::ADAPTER).is_file() {
        return litgpt::adapter::base_of(dir);
    }
    let text = std::fs::read_to_string(&path).map_err(Error::io("read", &path))?;
    let json: Value = serde_json::from_str(&text)
        .map_err(|e| Error::invalid(&path, format!("not JSON: {e}"), "save the adapter again"))?;
    json.get("base_model_name_or_path").and_then(Value::as_str).map(str::to_owned).ok_or_else(|| {
        Error::invalid(&path, "no `base_model_name_or_path`", "name the base with --pretrained_checkpoint_dir")
    })
}

/// What `gpt` computes with other values than the checkpoint's, by tensor of the file.
#[must_use]
pub fn changes<'a>(checkpoint: &Checkpoint, gpt: &'a Gpt) -> HashMap<String, Vec<Change<'a>>> {
    let mut changes: HashMap<String, Vec<Change<'_>>> = HashMap::new();
    for linear in gpt.linears() {
        for part in linear.parts.iter().filter(|part| linear.changes(part)) {
            let Piece { tensor, rows } = checkpoint.locate(&format!("{}.weight", part.name)).swap_remove(0);
            changes.entry(tensor).or_default().push(Change { linear, part, rows });
        }
    }
    changes
}

/// An adapted or quantized projection as some rows of a tensor of the file.
#[derive(Debug, Clone)]
pub struct Change<'a> {
    linear: &'a Linear,
    part: &'a Part,
    rows: Option<Vec<Range<usize>>>,
}

impl Change<'_> {
    /// Makes the tensor's elements those that the model computes with.
    pub fn apply(&self, parameters: &[f32], tensor: &mut [f32]) {
        let Some(rows) = &self.rows else { return self.linear.merge(self.part, parameters, tensor) };
        let cols = self.linear.inputs();
        let place = |row: usize| row * cols..(row + 1) * cols;
        let rows = rows.iter().cloned().flatten();
        let mut own: Vec<f32> = rows.clone().flat_map(|row| tensor[place(row)].iter().copied()).collect();
        self.linear.merge(self.part, parameters, &mut own);
        for (row, own) in rows.zip(own.chunks_exact(cols)) {
            tensor[place(row)].copy_from_slice(own);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::lora::Lora;

    #[test]
    fn a_fused_module_has_the_scale_of_its_parts() {
        for rslora in [false, true] {
            let config = LoraConfig { r: 4, alpha: 12.0, rslora, dropout: 0.0 };
            let part = |at: usize| Part {
                name: String::new(),
                rows: at * 2..at * 2 + 2,
                lora: Some(Lora { config, a: at * 20..at * 20 + 12, b: at * 20 + 12..at * 20 + 20 }),
            };
            let parts = [part(0), part(1)];
            let rows = |at: usize| std::iter::once(at * 2..at * 2 + 2).collect();
            let member = |at: usize| Member { part: &parts[at], inputs: 3, rows: Some(rows(at)) };
            let module = fuse(&[1.0; 40], &[member(0), member(1)], 4);
            let fused = LoraConfig { r: module.r, alpha: module.alpha, ..config };
            assert_eq!((module.r, module.a.len(), module.b.len()), (8, 24, 32));
            assert!((fused.scale() - config.scale()).abs() < 1e-6, "rslora {rslora}");
        }
    }
}
