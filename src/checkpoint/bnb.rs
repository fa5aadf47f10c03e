//! Weights in few bits as bitsandbytes keeps them and transformers saves them: of `NAME.weight` the codes under its own
//! name, and beside it `.absmax`, `.quant_map` and `.quant_state.bitsandbytes__nf4` (a JSON object), with double
//! quantization `.nested_absmax` and `.nested_quant_map`; of 8 bits `NAME.SCB`. Which of a model's matrices are kept so
//! is told by the files; config.json has a `quantization_config` for transformers' sake.
//! (bitsandbytes/functional.py `QuantState.as_dict`, nn/modules.py `Linear8bitLt._save_to_state_dict`.) Of `nf4-mixed`,
//! which transformers does not read, the matrices are in both of these forms, and the `quantization_config` says `litgpt`.

use super::convert::{Export, Target};
use super::safe::{Place, Shards};
use super::write::{Entry, SHARD, Staging, sharded};
use super::{AGAIN, Dtype, Layout};
use crate::error::{Error, Result};
use crate::model::Source;
use crate::model::block::Site;
use crate::model::calibrate::{Calibration, Seen};
use crate::model::config::{Config, Mlp};
use crate::model::quantizer::Quantizer;
use crate::ops::gptq;
use crate::ops::nf4::{Absmax, Kind4, NESTED_BLOCK, QUANT_BLOCK, Quantized, nested_code};
use crate::ops::quantized::{Codes, Format};
use crate::ops::weight::Data;
use serde::Deserialize;
use serde_json::{Value, json};
use std::collections::{HashMap, HashSet};
use std::path::Path;

/// Between a weight's name and the name of its 4-bit format.
const STATE: &str = ".quant_state.bitsandbytes__";
/// What stands beside a weight of 4 bits, besides its state.
const BESIDE: [&str; 4] = [".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map"];
/// Bytes that a state is filled up to with blanks: its length is written before its numbers are known.
const STATE_BYTES: usize = 256;
/// What a state's numbers may differ by from ours: code books are written in f32.
const BOOK_TOLERANCE: f32 = 1e-6;
/// The method of a `quantization_config` that transformers does not know: it says so, and that the shapes are not its own.
const OURS: &str = "litgpt";
const HINT: &str = "choose the checkpoint that is not quantized, and quantize it with --quantize";

/// The JSON of a 4-bit weight.
#[derive(Debug, Deserialize)]
struct State {
    blocksize: usize,
    dtype: String,
    shape: Vec<usize>,
    nested_blocksize: Option<usize>,
    nested_offset: Option<f32>,
}

/// A weight in few bits: where its parts stand in the files.
#[derive(Debug)]
pub(super) struct Bits {
    rows: usize,
    cols: usize,
    codes: Place,
    absmax: Place,
    scheme: Scheme,
}

#[derive(Debug)]
enum Scheme {
    Four { kind: Kind4, nested: Option<(Place, f32)> },
    Eight,
}

impl Bits {
    /// How it is quantized.
    pub(super) fn format(&self) -> Format {
        match &self.scheme {
            Scheme::Four { kind, nested } => Format::Four { kind: *kind, double: nested.is_some() },
            Scheme::Eight => Format::Int8,
        }
    }

    /// Its shape, and where its codes are.
    pub(super) fn shape_and_codes(&self) -> (Vec<usize>, Place) {
        (vec![self.rows, self.cols], self.codes.clone())
    }

    /// Its codes and scales, copied from the files.
    ///
    /// # Errors
    /// When a scale is not finite.
    pub(super) fn codes(&self, shards: &Shards, name: &str) -> Result<Codes> {
        let floats = |place: &Place| {
            let bytes = shards.bytes(place);
            let mut values = vec![0.0; bytes.len() / 4];
            Dtype::F32.decode(bytes, &mut values);
            if values.iter().all(|v| v.is_finite()) {
                return Ok(values);
            }
            let problem = format!("tensor `{name}` has scales that are not finite numbers");
            Err(Error::invalid(shards.path(place), problem, AGAIN))
        };
        let bytes = shards.bytes(&self.codes);
        Ok(match &self.scheme {
            Scheme::Eight => Codes::Int8 {
                codes: bytes.iter().map(|b| b.cast_signed()).collect(),
                absmax: floats(&self.absmax)?,
                cols: self.cols,
            },
            Scheme::Four { kind, nested } => {
                let absmax = match nested {
                    None => Absmax::Plain(floats(&self.absmax)?),
                    Some((nested, offset)) => Absmax::Double {
                        codes: shards.bytes(&self.absmax).to_vec(),
                        nested_absmax: floats(nested)?,
                        offset: *offset,
                    },
                };
                let four = Quantized::from_parts(*kind, bytes.to_vec(), absmax, self.rows, self.cols);
                let problem = |e: candle_core::Error| format!("tensor `{name}` does not fit together: {e}");
                Codes::Four(four.map_err(|e| Error::invalid(shards.path(&self.codes), problem(e), AGAIN))?)
            }
        })
    }

    /// All its elements, as `dtype` has them.
    ///
    /// # Errors
    /// When a scale is not finite.
    pub(super) fn decode(&self, shards: &Shards, name: &str, dtype: Dtype) -> Result<Vec<u8>> {
        let mut values = vec![0.0; self.rows * self.cols];
        self.codes(shards, name)?.decode_rows(0..self.rows, &mut values);
        Ok(dtype.encode(&values))
    }
}

/// Finds the weights in few bits among the tensors of `shards`, each of which becomes one tensor of its own shape.
///
/// # Errors
/// When parts of one are missing or do not fit together, or it is in a form that is not read.
pub(super) fn assemble(shards: &mut Shards) -> Result<()> {
    let names: Vec<String> = shards.whole_numbers.keys().cloned().collect();
    // What bitsandbytes computes in with 8 bits, unless they stand beside 4.
    let mut dtype = Dtype::F16;
    for name in &names {
        if let Some((weight, kind)) = name.split_once(STATE) {
            dtype = four(shards, weight, kind, name)?;
        }
    }
    for name in &names {
        if let Some(module) = name.strip_suffix(".weight") {
            let scales = format!("{module}.SCB");
            if shards.entries.contains_key(&scales) && shards.whole_numbers.contains_key(name) {
                eight(shards, name, &scales, dtype)?;
                shards.whole_numbers.remove(&format!("{module}.weight_format"));
            }
        }
    }
    let Some((name, numbers)) = shards.whole_numbers.iter().min_by(|a, b| a.0.cmp(b.0)) else { return Ok(()) };
    let what = format!("dtype {} of tensor `{name}` (`{}`)", numbers.dtype, shards.path(&numbers.place).display());
    Err(Error::unsupported(what, "F32, BF16 and F16 weights are read; choose another checkpoint"))
}

/// The elements of a matrix, of which a file may say anything.
fn elements(shape: &[usize]) -> Option<(usize, usize, usize)> {
    let &[rows, cols] = shape else { return None };
    Some((rows, cols, rows.checked_mul(cols).filter(|n| *n > 0)?))
}

/// Puts a weight of 4 bits together; returns its dtype.
fn four(shards: &mut Shards, name: &str, kind: &str, state_name: &str) -> Result<Dtype> {
    let state = shards.take_numbers(state_name)?;
    let path = shards.path(&state).to_owned();
    let broken = |problem: String| Error::invalid(&path, format!("tensor `{name}`: {problem}"), AGAIN);
    let parsed: State =
        serde_json::from_slice(shards.bytes(&state)).map_err(|e| broken(format!("`{state_name}` is no state: {e}")))?;
    let unread = |what: String| Error::unsupported(format!("{what} of tensor `{name}` (`{}`)", path.display()), HINT);
    let kind = match kind {
        "nf4" => Kind4::Nf4,
        "fp4" => Kind4::Fp4,
        other => return Err(unread(format!("4-bit format `{other}`"))),
    };
    if parsed.blocksize != QUANT_BLOCK || parsed.nested_blocksize.is_some_and(|size| size != NESTED_BLOCK) {
        return Err(unread(format!("blocks of {} and {:?} values", parsed.blocksize, parsed.nested_blocksize)));
    }
    let dtype = match parsed.dtype.as_str() {
        "float32" => Dtype::F32,
        "bfloat16" => Dtype::Bf16,
        "float16" => Dtype::F16,
        other => return Err(unread(format!("dtype {other}"))),
    };
    let sizes = elements(&parsed.shape).ok_or_else(|| broken(format!("shape {:?}", parsed.shape)))?;
    let (rows, cols, n) = sizes;
    let blocks = n.div_ceil(QUANT_BLOCK);
    let [absmax_name, map, nested_name, nested_map] = BESIDE.map(|ending| format!("{name}{ending}"));
    for (map, book) in [(map, kind.levels().as_slice()), (nested_map, nested_code().as_slice())] {
        check_book(shards, &map, book)?;
    }
    // As bytes, or as elements of the dtype that they were stored as (`bnb_4bit_quant_storage`).
    let codes = shards.take(name)?;
    let nested = parsed.nested_blocksize.map(|_| shards.take_floats(&nested_name)).transpose()?;
    let absmax =
        if nested.is_some() { shards.take_numbers(&absmax_name)? } else { shards.take_floats(&absmax_name)? };
    let scale = if nested.is_some() { 1 } else { 4 };
    let nested_fits = nested.as_ref().is_none_or(|p| p.1.len() == blocks.div_ceil(NESTED_BLOCK) * 4);
    if codes.1.len() != n.div_ceil(2) || absmax.1.len() != blocks * scale || !nested_fits {
        return Err(broken(format!("codes or scales are not those of the shape ({rows}, {cols})")));
    }
    let offset = parsed.nested_offset.filter(|offset| offset.is_finite());
    let nested = match (nested, offset) {
        (None, _) => None,
        (Some(place), Some(offset)) => Some((place, offset)),
        (Some(_), None) => return Err(broken("no `nested_offset` in its state".to_owned())),
    };
    let bits = Bits { rows, cols, codes, absmax, scheme: Scheme::Four { kind, nested } };
    shards.insert_bits(name, dtype, bits);
    Ok(dtype)
}

/// Takes the code book `name` out, if it is there, and refuses one that is not `book`.
fn check_book(shards: &mut Shards, name: &str, book: &[f32]) -> Result<()> {
    if !shards.entries.contains_key(name) {
        return Ok(());
    }
    let place = shards.take_floats(name)?;
    let mut values = vec![0.0; shards.bytes(&place).len() / 4];
    Dtype::F32.decode(shards.bytes(&place), &mut values);
    let same = values.len() == book.len() && values.iter().zip(book).all(|(a, b)| (a - b).abs() <= BOOK_TOLERANCE);
    let what = || format!("the code book `{name}` (`{}`)", shards.path(&place).display());
    if same { Ok(()) } else { Err(Error::unsupported(what(), HINT)) }
}

fn eight(shards: &mut Shards, name: &str, scales: &str, dtype: Dtype) -> Result<()> {
    let shape = shards.whole_numbers[name].shape.clone();
    let (codes, absmax) = (shards.take_numbers(name)?, shards.take_floats(scales)?);
    let fits = elements(&shape).filter(|(rows, _, n)| codes.1.len() == *n && absmax.1.len() == rows * 4);
    let Some((rows, cols, _)) = fits else {
        let problem = format!("`{scales}` is not of the shape of `{name}`");
        return Err(Error::invalid(shards.path(&codes), problem, AGAIN));
    };
    shards.insert_bits(name, dtype, Bits { rows, cols, codes, absmax, scheme: Scheme::Eight });
    Ok(())
}

/// What a written tensor is made of.
enum Content {
    /// The target of that number, as it is.
    Whole(usize),
    /// The codes of the target of that number; what follows belongs to them.
    Codes(usize),
    Absmax,
    Nested,
    Bytes(Vec<u8>),
    State {
        dtype: Dtype,
        shape: Vec<usize>,
    },
}

/// Fills `staging` with the model of `export`, the matrices of its blocks quantized: a folder that transformers loads
/// with bitsandbytes, unless they are mixed. One matrix at a time is in memory; with samples to choose the codes by, one block.
///
/// # Errors
/// When the architecture has experts, or a file cannot be read or written.
pub fn write(
    export: &Export<'_>,
    quantizer: Quantizer,
    calibration: Option<Calibration<'_>>,
    staging: &Staging,
    progress: &mut dyn FnMut(&str),
) -> Result<()> {
    let checkpoint = export.checkpoint;
    // transformers casts nothing of a folder in few bits: all that stays whole has one dtype, that of the projections.
    let projection = export.targets(Layout::HuggingFace)?.into_iter().find(Target::is_projection);
    let export = &Export { dtype: export.dtype.or(projection.map(|target| target.info.dtype)), ..*export };
    if matches!(checkpoint.config.mlp, Mlp::Experts { .. }) {
        let what = "a quantized copy of a model with experts, which bitsandbytes has no layers for";
        return Err(Error::unsupported(what, "quantize it while loading, with --quantize"));
    }
    let targets = export.targets(Layout::HuggingFace)?;
    let formats = formats_of(quantizer, &checkpoint.config, &targets);
    let (mut entries, mut contents) = (Vec::new(), Vec::new());
    let mut put = |name: String, dtype: &'static str, shape: Vec<usize>, size: usize, content: Content| {
        entries.push(Entry { name, dtype, bytes: shape.iter().product::<usize>() * size, size, shape });
        contents.push(content);
    };
    for (number, target) in targets.iter().enumerate() {
        let info = &target.info;
        let Some(format) = formats[number] else {
            put(info.name.clone(), info.dtype.name(), info.shape.clone(), info.dtype.size(), Content::Whole(number));
            continue;
        };
        let (name, shape, n) = (&info.name, info.shape.clone(), info.shape.iter().product::<usize>());
        let Format::Four { kind, double } = format else {
            put(name.clone(), "I8", shape.clone(), 1, Content::Codes(number));
            let module = name.trim_end_matches(".weight");
            put(format!("{module}.SCB"), "F32", vec![shape[0]], 4, Content::Absmax);
            // 0: row by row.
            put(format!("{module}.weight_format"), "U8", vec![], 1, Content::Bytes(vec![0]));
            continue;
        };
        let blocks = n.div_ceil(QUANT_BLOCK);
        let [absmax, map, nested, nested_map] = BESIDE.map(|ending| format!("{name}{ending}"));
        put(name.clone(), "U8", vec![n.div_ceil(2), 1], 1, Content::Codes(number));
        let (dtype, size) = if double { ("U8", 1) } else { ("F32", 4) };
        put(absmax, dtype, vec![blocks], size, Content::Absmax);
        put(map, "F32", vec![16], 4, Content::Bytes(Dtype::F32.encode(kind.levels())));
        if double {
            put(nested, "F32", vec![blocks.div_ceil(NESTED_BLOCK)], 4, Content::Nested);
            put(nested_map, "F32", vec![256], 4, Content::Bytes(Dtype::F32.encode(nested_code())));
        }
        let state = format!("{name}{STATE}{}", kind.name());
        put(state, "U8", vec![STATE_BYTES], 1, Content::State { dtype: info.dtype, shape });
    }
    let mut codes: Option<Codes> = None;
    let (targets, formats) = (targets.as_slice(), formats.as_slice());
    let calibrated = |calibration| Calibrated { export, targets, formats, calibration, codes: HashMap::new() };
    let mut calibrated = calibration.map(calibrated);
    sharded(staging, SHARD, &entries, |index| {
        Ok(match &contents[index] {
            Content::Whole(number) => {
                progress(&targets[*number].info.name);
                export.content(&targets[*number])?
            }
            Content::Codes(number) => {
                let target = &targets[*number];
                progress(&target.info.name);
                let quantized = match &mut calibrated {
                    Some(calibrated) => calibrated.take(*number)?,
                    None => nearest(formats[*number].expect("a projection's"), &values(export, target)?, target),
                };
                code_bytes(codes.insert(quantized))
            }
            Content::Absmax => codes.as_ref().map(absmax_bytes).unwrap_or_default(),
            Content::Nested => codes.as_ref().map(nested_bytes).unwrap_or_default(),
            Content::Bytes(bytes) => bytes.clone(),
            Content::State { dtype, shape } => codes.as_ref().map(|c| state(c, *dtype, shape)).unwrap_or_default(),
        })
    })?;
    let head = checkpoint.locate_in(Layout::HuggingFace, "lm_head.weight").swap_remove(0).tensor;
    let head = head.trim_end_matches(".weight").rsplit('.').next().unwrap_or_default().to_owned();
    let dtype = targets.iter().find(|t| t.is_projection()).map_or(Dtype::F32, |t| t.info.dtype);
    export.companions_with(staging, &[("quantization_config", description(quantizer, dtype, &head))])
}

fn values(export: &Export<'_>, target: &Target) -> Result<Vec<f32>> {
    let mut values = vec![0.0; target.info.shape.iter().product()];
    target.info.dtype.decode(&export.content(target)?, &mut values);
    Ok(values)
}

/// The codes nearest to a matrix's values.
fn nearest(format: Format, values: &[f32], target: &Target) -> Codes {
    Codes::new(format, values, target.info.shape[0], target.info.shape[1])
}

/// How each target is kept, if it is the matrix of a block's projections. Those that share one have one format.
fn formats_of(quantizer: Quantizer, config: &Config, targets: &[Target]) -> Vec<Option<Format>> {
    fn module(name: &str) -> &str {
        name.trim_end_matches(".weight")
    }
    let alone: HashSet<&str> =
        targets.iter().filter(|target| target.names().count() == 1).flat_map(Target::names).map(module).collect();
    let formats = quantizer.formats(config, |name| alone.contains(name));
    let format = |target: &Target| target.names().next().map(|name| formats.of(module(name)));
    targets.iter().map(|target| format(target).filter(|_| target.is_projection())).collect()
}

/// Codes that are chosen by samples, a block at a time: what its projections are multiplied with is what comes out of the
/// quantized blocks before it.
struct Calibrated<'a> {
    export: &'a Export<'a>,
    targets: &'a [Target],
    /// How each of these is kept.
    formats: &'a [Option<Format>],
    calibration: Calibration<'a>,
    /// Codes that were not taken yet, by the number of their target.
    codes: HashMap<usize, Codes>,
}

impl Calibrated<'_> {
    /// The codes of the target of that number; blocks are asked for in their order.
    fn take(&mut self, number: usize) -> Result<Codes> {
        while !self.codes.contains_key(&number) && self.calibration.layer() < self.export.checkpoint.config.n_layer {
            Site::ALL.into_iter().try_for_each(|site| self.quantize(site))?;
            self.calibration.advance()?;
        }
        Ok(self.codes.remove(&number).expect("every projection is at a site of its block"))
    }

    /// Quantizes some projections of the next block by what the ones before them give.
    fn quantize(&mut self, site: Site) -> Result<()> {
        let checkpoint = self.export.checkpoint;
        let Seen { modules, gram } = self.calibration.see(checkpoint, site)?;
        let inputs = gptq::Inputs::new(&gram).ok_or_else(|| not_finite(&modules))?;
        drop(gram);
        let ours = |name: &str| name.strip_suffix(".weight").is_some_and(|m| modules.iter().any(|n| n == m));
        let is_of = |target: &Target| target.is_projection() && target.names().any(ours);
        let mut matrices = HashMap::new();
        for (number, target) in self.targets.iter().enumerate().filter(|(_, target)| is_of(target)) {
            let mut values = values(self.export, target)?;
            let codes = match self.formats[number].expect("a projection's") {
                Format::Four { kind, double } => Codes::Four(inputs.quantize(&values, kind, double)),
                // Rounding to 8 bits changes next to nothing.
                eight => nearest(eight, &values, target),
            };
            codes.decode_rows(0..codes.rows(), &mut values);
            matrices.extend(target.split(&values).map(|(name, values)| (name.to_owned(), values)));
            self.codes.insert(number, codes);
        }
        self.calibration.replace(&Decoded(matrices), site)
    }
}

fn not_finite(modules: &[String]) -> Error {
    let message = format!("what {} would be multiplied with is no finite number", modules.join(", "));
    Error::refused(message, "try the model with `litgpt generate`; without samples it can be quantized all the same")
}

/// Matrices that their codes stand for, by name.
struct Decoded(HashMap<String, Vec<f32>>);

impl Source for Decoded {
    fn append(&self, name: &str, rows: usize, cols: usize, data: &mut Data) -> Result<()> {
        let values = &self.0[name];
        debug_assert_eq!(values.len(), rows * cols);
        match data {
            Data::F32(data) => data.extend_from_slice(values),
            Data::Bf16(data) => data.extend(values.iter().map(|v| half::bf16::from_f32(*v))),
            Data::F16(data) => data.extend(values.iter().map(|v| half::f16::from_f32(*v))),
        }
        Ok(())
    }
}

fn code_bytes(codes: &Codes) -> Vec<u8> {
    match codes {
        Codes::Four(four) => four.packed.clone(),
        Codes::Int8 { codes, .. } => codes.iter().map(|code| code.cast_unsigned()).collect(),
    }
}

fn absmax_bytes(codes: &Codes) -> Vec<u8> {
    match codes {
        Codes::Four(Quantized { absmax: Absmax::Double { codes, .. }, .. }) => codes.clone(),
        Codes::Four(Quantized { absmax: Absmax::Plain(absmax), .. }) | Codes::Int8 { absmax, .. } => {
            Dtype::F32.encode(absmax)
        }
    }
}

fn nested_bytes(codes: &Codes) -> Vec<u8> {
    match codes {
        Codes::Four(Quantized { absmax: Absmax::Double { nested_absmax, .. }, .. }) => Dtype::F32.encode(nested_absmax),
        _ => Vec::new(),
    }
}

fn state(codes: &Codes, dtype: Dtype, shape: &[usize]) -> Vec<u8> {
    let Codes::Four(four) = codes else { return Vec::new() };
    let mut state = json!({
        "quant_type": four.kind.name(), "blocksize": QUANT_BLOCK, "dtype": dtype.long_name(), "shape": shape,
    });
    if let Absmax::Double { offset, .. } = &four.absmax {
        state["nested_blocksize"] = json!(NESTED_BLOCK);
        state["nested_dtype"] = json!("float32");
        state["nested_offset"] = json!(offset);
    }
    let mut bytes = state.to_string().into_bytes();
    bytes.resize(STATE_BYTES.max(bytes.len()), b' ');
    bytes
}

/// The `quantization_config` of config.json; `head`: the name of the module that stays whole.
fn description(quantizer: Quantizer, dtype: Dtype, head: &str) -> Value {
    let four = match quantizer {
        Quantizer::All(Format::Four { kind, double }) => Some((kind, double)),
        Quantizer::All(Format::Int8) => None,
        Quantizer::Mixed => return json!({ "quant_method": OURS, "format": quantizer.name() }),
    };
    let (kind, double) = four.unwrap_or((Kind4::Fp4, false));
    // transformers 5 may rename a head to this one while it loads it (GPT-NeoX's).
    let skipped = if head == "lm_head" { vec![head] } else { vec![head, "lm_head"] };
    json!({
        "quant_method": "bitsandbytes",
        "_load_in_4bit": four.is_some(),
        "_load_in_8bit": four.is_none(),
        "load_in_4bit": four.is_some(),
        "load_in_8bit": four.is_none(),
        "bnb_4bit_compute_dtype": dtype.long_name(),
        "bnb_4bit_quant_storage": "uint8",
        "bnb_4bit_quant_type": kind.name(),
        "bnb_4bit_use_double_quant": double,
        "llm_int8_enable_fp32_cpu_offload": false,
        "llm_int8_has_fp16_weight": false,
        "llm_int8_skip_modules": skipped,
        "llm_int8_threshold": 6.0,
    })
}

/// The quantizer that a `quantization_config` of ours names, if that is one.
pub(super) fn stated(config: Option<&Value>) -> Option<Quantizer> {
    let config = config.filter(|config| config["quant_method"] == OURS)?;
    Quantizer::named(config["format"].as_str()?)
}

/// Refuses a model quantized by what is not read.
///
/// # Errors
/// When config.json names another method than bitsandbytes, or one of ours that is not known.
pub(super) fn check_method(config: Option<&Value>, path: &Path) -> Result<()> {
    let method = config.and_then(|config| config.get("quant_method")).and_then(Value::as_str);
    let known = |method: &str| method == "bitsandbytes" || stated(config).is_some();
    let Some(other) = method.filter(|method| !known(method)) else { return Ok(()) };
    Err(Error::unsupported(format!("weights quantized by `{other}` (`{}`, quantization_config)", path.display()), HINT))
}
