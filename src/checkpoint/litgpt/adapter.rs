//! LitGPT's adapters: `lit_model.pth.lora`, with its settings in `hyperparameters.yaml`. Of `attn.qkv`, A has the ranks
//! of the adapted ones of q, k, v below one another, and B their rows.

use super::config::{field, read_yaml};
use super::{ADAPTER, Qkv, locate};
use crate::checkpoint::adapter::misfit;
use crate::checkpoint::safe::{Raw, Shards};
use crate::error::{Error, Result};
use crate::model::Gpt;
use crate::model::lora::LoraConfig;
use serde_json::Value;
use std::collections::{HashMap, HashSet};
use std::ops::Range;
use std::path::Path;

/// Settings of the run that made a folder.
pub const SETTINGS: &str = "hyperparameters.yaml";

/// The base that a finetuned folder names: the `checkpoint_dir` of its settings.
///
/// # Errors
/// When the settings are missing or name none.
pub fn base_of(dir: &Path) -> Result<String> {
    let path = dir.join(SETTINGS);
    let named = read_yaml(&path)?.get("checkpoint_dir").and_then(Value::as_str).map(str::to_owned);
    named.ok_or_else(|| Error::invalid(&path, "no `checkpoint_dir`", "name the base with --pretrained_checkpoint_dir"))
}

struct Settings {
    config: LoraConfig,
    /// Whether q, k, v are adapted.
    qkv: [bool; 3],
}

impl Settings {
    fn read(path: &Path) -> Result<Self> {
        let yaml = read_yaml(path)?;
        let wrong =
            |key: &str| Error::invalid(path, format!("no usable `{key}`"), "restore the file that finetuning wrote");
        let number = |key: &str| field(&yaml, key).as_f64().filter(|v| v.is_finite()).ok_or_else(|| wrong(key));
        let flag = |key: &str| field(&yaml, key).as_bool().ok_or_else(|| wrong(key));
        let r = field(&yaml, "lora_r").as_u64().filter(|r| (1..1 << 20).contains(r)).ok_or_else(|| wrong("lora_r"))?;
        let config =
            LoraConfig { r: r as usize, alpha: number("lora_alpha")?, rslora: false, dropout: number("lora_dropout")? };
        Ok(Self { config, qkv: [flag("lora_query")?, flag("lora_key")?, flag("lora_value")?] })
    }
}

/// Where a part's adapter stands in the file: its module, its rows of A and of B.
struct Place {
    module: String,
    a: Range<usize>,
    b: Range<usize>,
    /// Shapes that the module's A and B must have.
    shapes: [[usize; 2]; 2],
}

/// Where the adapter of part `name` would stand, if the settings have one.
fn place(gpt: &Gpt, settings: &Settings, shards: &Shards, name: &str, inputs: usize, outputs: usize) -> Option<Place> {
    let r = settings.config.r;
    let module = |qkv| {
        let tensor = locate(&gpt.config, qkv, &format!("{name}.weight")).swap_remove(0).tensor;
        tensor.trim_end_matches(".weight").to_owned()
    };
    let (below, interleaved) = (module(Qkv::Below), module(Qkv::Interleaved));
    let Some(part) = ["q_proj", "k_proj", "v_proj"].iter().position(|p| name.ends_with(p)) else {
        return Some(Place { module: below, a: 0..r, b: 0..outputs, shapes: [[r, inputs], [outputs, r]] });
    };
    if !settings.qkv[part] {
        return None;
    }
    let sizes = [gpt.config.q_cols(), gpt.config.kv_cols(), gpt.config.kv_cols()];
    let rows = |parts: Range<usize>| -> usize { parts.filter(|p| settings.qkv[*p]).map(|p| sizes[p]).sum() };
    let count = |parts: Range<usize>| parts.filter(|p| settings.qkv[*p]).count();
    let (a, b) = (count(0..part) * r, rows(0..part));
    let old = shards.get(&format!("{interleaved}.lora_A")).is_ok();
    Some(Place {
        module: if old { interleaved } else { below },
        a: a..a + r,
        b: b..b + outputs,
        shapes: [[count(0..3) * r, inputs], [rows(0..3), r]],
    })
}

/// Attaches the adapters of the finetuned folder `dir` to `gpt`.
///
/// # Errors
/// When files are missing or broken, or do not fit the model: all misfits are listed.
pub fn load(dir: &Path, gpt: &mut Gpt) -> Result<()> {
    let settings = Settings::read(&dir.join(SETTINGS))?;
    let shards = Shards::of(vec![dir.join(ADAPTER)])?;
    let mut problems = Vec::new();
    let mut places = HashMap::new();
    let mut used = HashSet::new();
    for linear in gpt.linears() {
        for part in &linear.parts {
            let Some(place) = place(gpt, &settings, &shards, &part.name, linear.inputs(), part.rows.len()) else {
                continue;
            };
            let names = [format!("{}.lora_A", place.module), format!("{}.lora_B", place.module)];
            let (Ok(a), Ok(b)) = (shards.get(&names[0]), shards.get(&names[1])) else { continue };
            if a.shape != place.shapes[0] || b.shape != place.shapes[1] {
                let [want_a, want_b] = place.shapes;
                problems.push(format!(
                    "`{}` has A {:?} and B {:?}, not {want_a:?} and {want_b:?}",
                    place.module, a.shape, b.shape
                ));
            }
            used.extend(names);
            places.insert(part.name.clone(), place);
        }
    }
    problems.extend(shards.names().filter(|n| !used.contains(*n)).map(|n| format!("`{n}` has no place in the model")));
    if !problems.is_empty() || places.is_empty() {
        return Err(misfit(dir, problems));
    }
    gpt.attach(|name| places.contains_key(name).then_some(settings.config));
    let mut parameters = gpt.parameters.to_host();
    for part in gpt.linears().flat_map(|l| &l.parts) {
        if let (Some(lora), Some(place)) = (&part.lora, places.get(&part.name)) {
            let copy = |to: &mut [f32], raw: Raw<'_>, rows: &Range<usize>| {
                let cols = raw.shape[1];
                to.copy_from_slice(&raw.to_f32()[rows.start * cols..rows.end * cols]);
            };
            copy(&mut parameters[lora.a.clone()], shards.get(&format!("{}.lora_A", place.module))?, &place.a);
            copy(&mut parameters[lora.b.clone()], shards.get(&format!("{}.lora_B", place.module))?, &place.b);
        }
    }
    gpt.set_parameters(&parameters);
    Ok(())
}
