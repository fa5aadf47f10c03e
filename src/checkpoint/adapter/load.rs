//! Reading an adapter folder: which tensors are which part's, and whether they fit.

use super::settings::PeftConfig;
use super::{CONFIG, HEAD, OLD_HEAD, PREFIX, TENSORS, misfit, place};
use crate::checkpoint::safe::Shards;
use crate::checkpoint::{litgpt, state};
use crate::error::{Error, Result};
use crate::model::Gpt;
use crate::model::config::Mlp;
use crate::model::families::Family;
use crate::model::families::multimodal::text_name;
use crate::model::linear::Part;
use crate::model::lora::{Lora, LoraConfig};
use std::collections::{BTreeMap, HashMap, HashSet};
use std::ops::Range;
use std::path::Path;

/// The same as older versions of PEFT wrote them.
const OLD_TENSORS: &str = "adapter_model.bin";

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

impl<'a> Place<'a> {
    fn whole(module: String, names: &'a [Option<String>; 2], rows: Option<Vec<Range<usize>>>) -> Self {
        Self { known_as: module.clone(), module, names, rows, expert: None }
    }

    /// Gives a part of so many outputs its elements of the module's A and B.
    fn copy(&self, [a, b]: [&[f32]; 2], lora: &Lora, outputs: usize, parameters: &mut [f32]) {
        let [expert, experts] = self.expert.unwrap_or([0, 1]);
        let n = lora.a.len();
        parameters[lora.a.clone()].copy_from_slice(&a[expert * n..][..n]);
        let all = 0..outputs;
        let rows = self.rows.as_deref().unwrap_or(std::slice::from_ref(&all));
        let ranks = lora.config.r * experts;
        let of_row = |row: usize| b[row * ranks..][..ranks].iter().skip(expert).step_by(experts);
        let values = rows.iter().cloned().flatten().flat_map(of_row);
        parameters[lora.b.clone()].iter_mut().zip(values).for_each(|(p, v)| *p = *v);
    }
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
        return Some(Place::whole(module, names, rows));
    }
    let Mlp::Experts { n_expert, .. } = gpt.config.mlp else { return None };
    // transformers 5 calls routers so, whatever the family's files do.
    if let Some(names) = found.get(&part.name).filter(|_| part.name.ends_with(".mlp.gate")) {
        return Some(Place::whole(part.name.clone(), names, rows));
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
    state::verify(dir, &[TENSORS, OLD_TENSORS])?;
    let mut problems = Vec::new();
    let mut found: HashMap<String, [Option<String>; 2]> = HashMap::new();
    for name in shards.names() {
        match module_of(name) {
            Some((module, side)) => found.entry(module).or_default()[side] = Some(name.to_owned()),
            None if is_base_of_head(name) => problems.extend(other_head(gpt, &shards, name)?),
            None => problems.push(format!("`{name}` is no LoRA matrix of a linear module")),
        }
    }
    let mut parts: HashMap<String, (Place<'_>, LoraConfig)> = HashMap::new();
    for linear in gpt.linears() {
        for part in &linear.parts {
            let Some(place) = find(family, gpt, &shards, &found, (part, linear.inputs())) else { continue };
            match fits(&shards, &place, linear.inputs(), part.rows.len()) {
                Ok(r) if config.rank.is_some_and(|rank| rank != r as u64) => {
                    let rank = config.rank.unwrap_or_default();
                    problems.push(format!("`{}` has rank {r}, and {CONFIG} has `r` {rank}", place.module));
                }
                Ok(r) => {
                    let config = config.of(&place.known_as, r);
                    parts.insert(part.name.clone(), (place, config));
                }
                Err(problem) => problems.push(problem),
            }
        }
    }
    let placed: HashSet<&String> = parts.values().map(|p| &p.0.module).collect();
    for module in found.keys().filter(|m| !placed.contains(*m)) {
        if problems.iter().all(|p| !p.contains(module.as_str())) {
            problems.push(format!("`{module}` is no module of this model"));
        }
    }
    if !problems.is_empty() || parts.is_empty() {
        return Err(misfit(dir, problems));
    }
    gpt.attach(|name| parts.get(name).map(|p| p.1));
    copy_parameters(gpt, &shards, &parts)
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

fn copy_parameters(gpt: &mut Gpt, shards: &Shards, parts: &HashMap<String, (Place<'_>, LoraConfig)>) -> Result<()> {
    let mut parameters = gpt.parameters.to_host();
    // By the module whose matrices they share, so that each is read once.
    let mut sharing: BTreeMap<&str, Vec<(&Part, &Lora, &Place<'_>)>> = BTreeMap::new();
    for part in gpt.linears().flat_map(|linear| &linear.parts) {
        if let (Some(lora), Some((place, _))) = (&part.lora, parts.get(&part.name)) {
            sharing.entry(&place.module).or_default().push((part, lora, place));
        }
    }
    let values = |name: &str| {
        let raw = shards.get(name)?;
        shards.require_finite(name, raw.dtype, &raw.bytes)?;
        Ok::<_, Error>(raw.to_f32())
    };
    for members in sharing.values() {
        let [Some(a), Some(b)] = members[0].2.names else { continue };
        let (a, b) = (values(a)?, values(b)?);
        for (part, lora, place) in members {
            place.copy([&a, &b], lora, part.rows.len(), &mut parameters);
        }
    }
    gpt.set_parameters(&parameters);
    Ok(())
}
