//! PEFT adapter folders: `adapter_config.json` and `adapter_model.safetensors`, to and from a model's adapters.
//!
//! Where a family's files fuse modules (GPT-NeoX's `query_key_value`), PEFT knows only the fused one. Adapters on parts
//! of it are written as the equal fused adapter: the A's below one another, the B's block-diagonal over rows and ranks,
//! the rank summed and alpha scaled with it. A fused adapter loads as the same A for every part and its rows of B.
//!
//! Since transformers 5 the experts of a layer are two tensors, `gate_up_proj` and `down_proj`, to which PEFT gives one
//! adapter each (`target_parameters`): A has the experts' ranks below one another, B side by side, rank by rank. Here each
//! expert gets its own part of them; adapters are saved expert by expert, which PEFT reads too.

use super::safe::Shards;
use super::write::{Staging, TensorInfo, safetensors};
use super::{Checkpoint, Dtype, litgpt};
use crate::error::{Error, Result};
use crate::model::Gpt;
use crate::model::config::Mlp;
use crate::model::families::multimodal::text_name;
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
/// The same as older versions of PEFT wrote them.
const OLD_TENSORS: &str = "adapter_model.bin";
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

/// Where the file has a part's adapter.
struct Place<'a> {
    module: String,
    names: &'a [Option<String>; 2],
    /// Its rows of B; `None` for all.
    rows: Option<Vec<Range<usize>>>,
    /// Which expert it is of, of how many that share the matrices.
    expert: Option<[usize; 2]>,
    /// What patterns of the settings know it by.
    known_as: String,
}

/// What to do with an adapter that asks for more than is done here.
const BY_PEFT: &str = "merge that adapter with PEFT and use the merged model";

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

/// Where the file has the adapter of a part with so many inputs, if it has one.
fn find<'a>(
    family: &Family,
    gpt: &Gpt,
    shards: &Shards,
    found: &'a HashMap<String, [Option<String>; 2]>,
    (part, inputs): (&Part, usize),
) -> Option<Place<'a>> {
    let (module, rows) = place(family, gpt, &part.name);
    if let Some(names) = found.get(&module) {
        return Some(Place { known_as: module.clone(), module, names, rows, expert: None });
    }
    let Mlp::Experts { n_expert, .. } = gpt.config.mlp else { return None };
    // transformers 5 calls routers so, whatever the family's files do.
    if let Some(names) = found.get(&part.name).filter(|_| part.name.ends_with(".mlp.gate")) {
        return Some(Place { known_as: part.name.clone(), module: part.name.clone(), names, rows, expert: None });
    }
    let (layer, expert) = part.name.split_once(".experts.")?;
    let (expert, kind) = expert.split_once('.')?;
    let n = part.rows.len();
    let half = |rows: Range<usize>| Some(std::iter::once(rows).collect());
    let (tensor, rows, outputs) = match kind {
        "gate_proj" => ("gate_up_proj", half(0..n), 2 * n),
        "up_proj" => ("gate_up_proj", half(n..2 * n), 2 * n),
        _ => ("down_proj", None, n),
    };
    // Which of the two adapters is inside of the other depends on which there are.
    let shape = |name: &Option<String>| Some(shards.get(name.as_deref()?).ok()?.shape.clone());
    let is_its = |[a, b]: &[Option<String>; 2]| {
        shape(a).is_some_and(|a| a.get(1) == Some(&inputs)) && shape(b).is_some_and(|b| b.first() == Some(&outputs))
    };
    let modules = ["experts.base_layer", "experts"].map(|name| format!("{layer}.{name}"));
    let (module, names) =
        modules.into_iter().find_map(|module| Some((module.clone(), found.get(&module).filter(|n| is_its(n))?)))?;
    let expert = Some([expert.parse().ok()?, n_expert]);
    Some(Place { module, names, rows, expert, known_as: format!("{layer}.experts.{tensor}") })
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

/// An adapter_config.json, as far as it matters for the numbers.
struct PeftConfig {
    alpha: f64,
    dropout: f64,
    /// Rank of all modules; `None` where some have their own.
    rank: Option<u64>,
    rslora: bool,
    alphas: Vec<(regex::Regex, f64)>,
}

impl PeftConfig {
    fn read(path: &Path) -> Result<Self> {
        let text = std::fs::read_to_string(path).map_err(Error::io("read", path))?;
        let again = "save the adapter again, or choose another one";
        let json: Value =
            serde_json::from_str(&text).map_err(|e| Error::invalid(path, format!("not JSON: {e}"), again))?;
        if json.get("peft_type").and_then(Value::as_str) != Some("LORA") {
            let found = json.get("peft_type").unwrap_or(&Value::Null);
            return Err(Error::unsupported(
                format!("`peft_type` {found} (`{}`)", path.display()),
                "only LORA adapters are read",
            ));
        }
        Self::refuse(path, &json)?;
        Self::refuse_other_base(path, &json)?;
        let number = |key: &str, default: Option<f64>| {
            let given = json.get(key).filter(|v| !v.is_null());
            let value = given.map_or(default, Value::as_f64).filter(|v| v.is_finite());
            value.ok_or_else(|| Error::invalid(path, format!("`{key}` is not a number"), again))
        };
        let wrong = |key: &str, wanted: &str| Err(Error::invalid(path, format!("`{key}` is not {wanted}"), again));
        let is = |key: &str, holds: fn(&Value) -> bool| json.get(key).is_none_or(|v| v.is_null() || holds(v));
        let no_keys = |v: &Value| v.as_object().is_some_and(Map::is_empty);
        if !is("r", |r| r.as_u64().is_some_and(|r| r > 0)) {
            return wrong("r", "a rank");
        }
        if !is("use_rslora", Value::is_boolean) {
            return wrong("use_rslora", "true or false");
        }
        for key in ["alpha_pattern", "rank_pattern"] {
            if !is(key, Value::is_object) {
                return wrong(key, "an object");
            }
        }
        let mut alphas = Vec::new();
        for (pattern, alpha) in json.get("alpha_pattern").and_then(Value::as_object).into_iter().flatten() {
            // PEFT's rule: the key is a pattern for the end of the module's name.
            let regex = regex::Regex::new(&format!(r"^(.*\.)?({})$", pattern.trim_start_matches('^')));
            match (regex, alpha.as_f64()) {
                (Ok(regex), Some(alpha)) => alphas.push((regex, alpha)),
                _ => return Err(Error::invalid(path, format!("`alpha_pattern` has a bad entry `{pattern}`"), again)),
            }
        }
        Ok(Self {
            alpha: number("lora_alpha", None)?,
            dropout: number("lora_dropout", Some(0.0))?,
            rank: json.get("r").and_then(Value::as_u64).filter(|_| is("rank_pattern", no_keys)),
            rslora: json.get("use_rslora").and_then(Value::as_bool).unwrap_or(false),
            alphas,
        })
    }

    /// What an adapter may ask for that would change its numbers here.
    fn refuse(path: &Path, json: &Value) -> Result<()> {
        let of_expert = |name: &Value| {
            let name = name.as_str().unwrap_or_default();
            let last = name.strip_suffix(".weight").unwrap_or(name).rsplit('.').next().unwrap_or_default();
            ["gate_up_proj", "down_proj", "gate"].contains(&last)
        };
        let of_experts = |value: &Value| value.as_array().is_some_and(|names| names.iter().all(of_expert));
        let neutral = |key: &str, value: &Value| match value {
            Value::Null | Value::Bool(false) => true,
            Value::Array(list) => list.is_empty(),
            Value::Object(map) => map.is_empty(),
            Value::String(text) => key == "bias" && text == "none",
            _ => false,
        } || key == "target_parameters" && of_experts(value);
        let keys = [
            "use_dora",
            "modules_to_save",
            "bias",
            "fan_in_fan_out",
            "layer_replication",
            "lora_bias",
            "use_qalora",
            "trainable_token_indices",
            "target_parameters",
            "alora_invocation_tokens",
            "use_bdlora",
            "kasa_config",
            "arrow_config",
            "monteclora_config",
            "velora_config",
        ];
        for key in keys {
            if let Some(value) = json.get(key).filter(|v| !neutral(key, v)) {
                let what = format!("`{key}`: {value} (`{}`)", path.display());
                return Err(Error::unsupported(what, BY_PEFT));
            }
        }
        Ok(())
    }

    /// Starting values that PEFT takes out of the base's weights when it loads the adapter.
    fn refuse_other_base(path: &Path, json: &Value) -> Result<()> {
        let how = json.get("init_lora_weights").and_then(Value::as_str).unwrap_or_default().to_ascii_lowercase();
        if !["pissa", "olora", "corda", "loftq"].iter().any(|kind| how.starts_with(kind)) {
            return Ok(());
        }
        let what = format!("`init_lora_weights`: \"{how}\" (`{}`)", path.display());
        Err(Error::unsupported(what, BY_PEFT))
    }

    fn of(&self, module: &str, r: usize) -> LoraConfig {
        // PEFT knows a module that it adapts by its parameter as `gate.weight`.
        let parameter = format!("{module}.weight");
        let own = self.alphas.iter().find(|(pattern, _)| pattern.is_match(module) || pattern.is_match(&parameter));
        let alpha = own.map_or(self.alpha, |own| own.1);
        LoraConfig { r, alpha, rslora: self.rslora, dropout: self.dropout }
    }
}

/// Attaches the adapters of the folder `dir`, PEFT's or LitGPT's, to `gpt`.
///
/// # Errors
/// When the folder is broken, asks for what is not implemented, or does not fit the model: all misfits are listed.
pub fn load(dir: &Path, family: &Family, gpt: &mut Gpt) -> Result<()> {
    if !dir.join(CONFIG).is_file() && dir.join(litgpt::ADAPTER).is_file() {
        return litgpt::adapter::load(dir, gpt);
    }
    let config = PeftConfig::read(&dir.join(CONFIG))?;
    let mut path = dir.join(TENSORS);
    if !path.is_file() && dir.join(OLD_TENSORS).is_file() {
        path = dir.join(OLD_TENSORS);
    }
    if !path.is_file() {
        let hint = "an adapter folder holds adapter_config.json and adapter_model.safetensors".to_owned();
        return Err(Error::Missing { what: "adapter tensors".to_owned(), path, hint });
    }
    let shards = Shards::of(vec![path]).map_err(|e| match e {
        Error::Invalid { path, problem, .. } => {
            Error::invalid(&path, problem, "copy the adapter again from where it was saved")
        }
        other => other,
    })?;
    super::state::verify(dir, &[TENSORS, OLD_TENSORS])?;
    let mut problems = Vec::new();
    let mut found: HashMap<String, [Option<String>; 2]> = HashMap::new();
    for name in shards.names() {
        match module_of(name) {
            Some((module, side)) => found.entry(module).or_default()[side] = Some(name.to_owned()),
            None if is_base_of_head(name) => problems.extend(other_head(gpt, &shards, name)?),
            None => problems.push(format!("`{name}` is no LoRA matrix of a linear module")),
        }
    }
    let mut parts: HashMap<String, (String, LoraConfig)> = HashMap::new();
    for linear in gpt.linears() {
        for part in &linear.parts {
            let Some(place) = find(family, gpt, &shards, &found, (part, linear.inputs())) else { continue };
            match fits(&shards, &place, linear.inputs(), part.rows.len()) {
                Ok(r) if config.rank.is_some_and(|rank| rank != r as u64) => {
                    let rank = config.rank.unwrap_or_default();
                    problems.push(format!("`{}` has rank {r}, and {CONFIG} has `r` {rank}", place.module));
                }
                Ok(r) => {
                    parts.insert(part.name.clone(), (place.module, config.of(&place.known_as, r)));
                }
                Err(problem) => problems.push(problem),
            }
        }
    }
    let placed: Vec<&String> = parts.values().map(|p| &p.0).collect();
    for module in found.keys().filter(|m| !placed.contains(m)) {
        if problems.iter().all(|p| !p.contains(module.as_str())) {
            problems.push(format!("`{module}` is no module of this model"));
        }
    }
    if !problems.is_empty() || parts.is_empty() {
        problems.sort_unstable();
        problems.truncate(8);
        let what = format!("the adapter `{}` does not fit the model", dir.display());
        return Err(Error::Mismatch {
            what,
            problems,
            hint: "use it with the base model it was trained on".to_owned(),
        });
    }
    gpt.attach(|name| parts.get(name).map(|p| p.1));
    copy_parameters(gpt, family, &shards, &found)
}

/// (module, 0 for A or 1 for B) of a tensor's name.
fn module_of(name: &str) -> Option<(String, usize)> {
    let name = name.strip_prefix(PREFIX)?.strip_suffix(".weight")?;
    let name = name.strip_suffix(".default").unwrap_or(name);
    // PEFT knows the text part of a model that also sees by its place in the whole.
    let name = &text_name(name)?;
    let module = |end: &str| name.strip_suffix(end)?.strip_suffix('.');
    let (side, module) = ["lora_A", "lora_B"].iter().enumerate().find_map(|(side, end)| Some((side, module(end)?)))?;
    Some((if module == OLD_HEAD { HEAD } else { module }.to_owned(), side))
}

/// Whether a tensor is the weight or the bias of the base's head, which PEFT saves beside an adapter of it.
fn is_base_of_head(name: &str) -> bool {
    let part = name.strip_prefix(PREFIX).and_then(|name| name.split_once(".base_layer."));
    part.is_some_and(|(module, part)| [HEAD, OLD_HEAD].contains(&module) && ["weight", "bias"].contains(&part))
}

/// What is wrong if the head that an adapter was saved with is not the model's.
fn other_head(gpt: &Gpt, shards: &Shards, name: &str) -> Result<Option<String>> {
    const TOGETHER: usize = 1024;
    const SMALLEST_F16: f32 = 1.0 / (1 << 24) as f32;
    // Either may have been rounded, to bf16 or to f16.
    let alike = |ours: &[f32], theirs: &[f32]| {
        ours.iter().zip(theirs).all(|(a, b)| (a - b).abs() <= b.abs() / 128.0 + SMALLEST_F16)
    };
    let (theirs, vocab) = (shards.get(name)?, gpt.config.vocab_size);
    let equal = |first: usize| {
        let rows = first..(first + TOGETHER).min(vocab);
        let ours = gpt.head_weight(&rows.clone().map(|row| row as u32).collect::<Vec<_>>());
        let mut values = vec![0.0; ours.len()];
        theirs.dtype.decode(&theirs.rows(&[rows]), &mut values);
        alike(&ours, &values)
    };
    let same = if name.ends_with(".bias") {
        theirs.shape == [vocab] && gpt.head_bias().is_some_and(|ours| alike(ours, &theirs.to_f32()))
    } else {
        theirs.shape == [vocab, gpt.config.n_embd] && (0..vocab).step_by(TOGETHER).all(equal)
    };
    shards.release(name);
    Ok((!same).then(|| format!("`{name}` is another head than the model's")))
}

/// The rank of a module's matrices, if they fit a part.
fn fits(shards: &Shards, place: &Place<'_>, inputs: usize, outputs: usize) -> std::result::Result<usize, String> {
    let module = &place.module;
    let [Some(a), Some(b)] = place.names else { return Err(format!("`{module}` has only one of lora_A and lora_B")) };
    let (a, b) = (shards.get(a).map_err(|e| e.to_string())?, shards.get(b).map_err(|e| e.to_string())?);
    let ranks = *a.shape.first().unwrap_or(&0);
    let r = ranks / place.expert.map_or(1, |[_, experts]| experts);
    let b_fits = match &place.rows {
        None => b.shape == [outputs, ranks],
        Some(rows) => b.shape.len() == 2 && b.shape[1] == ranks && rows.iter().all(|range| range.end <= b.shape[0]),
    };
    let whole = place.expert.is_none_or(|[_, experts]| ranks == r * experts);
    if r == 0 || a.shape != [ranks, inputs] || !b_fits || !whole {
        return Err(format!(
            "`{module}` has A {:?} and B {:?} for a module of {inputs} inputs and {outputs} outputs",
            a.shape, b.shape
        ));
    }
    Ok(r)
}

fn copy_parameters(
    gpt: &mut Gpt,
    family: &Family,
    shards: &Shards,
    found: &HashMap<String, [Option<String>; 2]>,
) -> Result<()> {
    let mut parameters = gpt.parameters.to_host();
    // Experts share the matrices of two modules.
    let mut read: HashMap<String, [Vec<f32>; 2]> = HashMap::new();
    let parts = gpt.linears().flat_map(|linear| linear.parts.iter().map(move |part| (part, linear.inputs())));
    for (part, inputs) in parts {
        let Some(lora) = &part.lora else { continue };
        let Some(place) = find(family, gpt, shards, found, (part, inputs)) else { continue };
        if let [Some(a), Some(b)] = place.names {
            if !read.contains_key(&place.module) {
                if read.len() == 2 {
                    read.clear();
                }
                let values = |name: &str| {
                    let raw = shards.get(name)?;
                    shards.require_finite(name, raw.dtype, &raw.bytes)?;
                    Ok::<_, Error>(raw.to_f32())
                };
                read.insert(place.module.clone(), [values(a)?, values(b)?]);
            }
            let [a, b] = &read[&place.module];
            let [expert, experts] = place.expert.unwrap_or([0, 1]);
            let n = lora.a.len();
            parameters[lora.a.clone()].copy_from_slice(&a[expert * n..][..n]);
            let all = 0..part.rows.len();
            let rows = place.rows.as_deref().unwrap_or(std::slice::from_ref(&all));
            let ranks = lora.config.r * experts;
            let values = rows
                .iter()
                .cloned()
                .flatten()
                .flat_map(|row| b[row * ranks..][..ranks].iter().skip(expert).step_by(experts));
            parameters[lora.b.clone()].iter_mut().zip(values).for_each(|(p, v)| *p = *v);
        }
    }
    gpt.set_parameters(&parameters);
    Ok(())
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
