//! Builds a `Gpt` from a [`Source`] of tensors, one tensor at a time.

use super::attention::Attention;
use super::block::{Block, Norms};
use super::config::{Config, Mlp as MlpKind, Placement, QkNorm};
use super::experts::Experts;
use super::linear::Linear;
use super::mlp::{Dense, Mlp};
use super::quantizer::{Formats, Quantizer};
use super::{Gpt, attention, device_error};
use crate::error::{Error, Result};
use crate::ops::attention::Attention as Core;
use crate::ops::device::{Device, Dtype};
use crate::ops::norm::{Kind, Norm};
use crate::ops::quantized::{Codes, Format, Rows};
use crate::ops::resident::{Part, Resident};
use crate::ops::weight::{Data, Store, Weight};
use std::sync::Arc;

/// Channels of a head that the attention kernels have room for.
const LARGEST_HEAD: usize = 256;

/// Tensors by their Hugging Face Llama names, whatever the file calls them.
pub trait Source {
    /// Appends the tensor `name` of shape (rows, cols) to `data`, converted to its store.
    ///
    /// # Errors
    /// When it is missing, broken or of another shape.
    fn append(&self, name: &str, rows: usize, cols: usize, data: &mut Data) -> Result<()>;

    /// The matrix `name` in few bits, where it is kept so and can be taken as it is.
    ///
    /// # Errors
    /// When it is broken.
    fn codes(&self, _name: &str) -> Result<Option<Codes>> {
        Ok(None)
    }

    /// Whether the matrix `name` stays whole where the model's projections are in few bits, as the source itself has it.
    fn stays_whole(&self, _name: &str) -> bool {
        false
    }

    /// Whether the matrix `name` is all bf16.
    ///
    /// # Errors
    /// When it is missing or broken.
    fn is_bf16(&self, _name: &str) -> Result<bool> {
        Ok(false)
    }

    /// The tensor `name` of `len` elements in f32.
    ///
    /// # Errors
    /// When it is missing, broken or of another shape.
    fn vector(&self, name: &str, len: usize) -> Result<Vec<f32>> {
        let mut data = Data::F32(Vec::with_capacity(len));
        self.append(name, 1, len, &mut data)?;
        match data {
            Data::F32(values) => Ok(values),
            Data::Bf16(_) | Data::F16(_) => unreachable!("`append` keeps the store"),
        }
    }
}

/// Whether f32 weights of these names are kept as the bf16 that they are in the source.
///
/// # Errors
/// Those of the source.
pub fn narrow(
    source: &dyn Source,
    store: Store,
    on_device: bool,
    mut names: impl Iterator<Item = String>,
) -> Result<bool> {
    let can = store == Store::F32 && !on_device && Weight::widens();
    Ok(can && names.try_fold(true, |all, name| Ok::<_, Error>(all && source.is_bf16(&name)?))?)
}

impl Gpt {
    /// A model of this architecture with the source's weights, kept as `store`, or the projections of the blocks in few
    /// bits; `progress` is told of each block.
    ///
    /// Each is quantized from the source's own values as soon as it is read, so that one of them at a time is there in
    /// whole. Head, embedding and routers are not.
    ///
    /// # Errors
    /// Those of the source.
    pub fn load(
        config: &Config,
        source: &dyn Source,
        store: Store,
        quantizer: Option<Quantizer>,
        progress: &mut dyn FnMut(usize),
    ) -> Result<Self> {
        Self::load_on(None, config, source, store, quantizer, progress)
    }

    /// As [`Self::load`], in the memory of a device where one is given. One projection at a time is on the host.
    ///
    /// # Errors
    /// Those of the source. What goes wrong on the device, [`Device::check`] tells.
    pub fn load_on(
        device: Option<&Device>,
        config: &Config,
        source: &dyn Source,
        store: Store,
        quantizer: Option<Quantizer>,
        progress: &mut dyn FnMut(usize),
    ) -> Result<Self> {
        let formats = quantizer.map(|quantizer| quantizer.formats(config, |_| true));
        let loader = Loader { config, source, store, formats: formats.as_ref(), device };
        loader.check()?;
        let embedding = Arc::new(loader.embedding()?);
        let mut blocks = Vec::with_capacity(config.n_layer);
        for layer in 0..config.n_layer {
            blocks.push(loader.block(layer)?);
            if let Some(device) = device {
                device.check().map_err(device_error)?;
            }
            progress(layer);
        }
        let final_norm = loader.norm("model.norm")?;
        let parts = [("lm_head".to_owned(), config.vocab_size)];
        let head = if config.tie_embeddings {
            Arc::clone(&embedding)
        } else {
            Arc::new(loader.weight(&parts, config.n_embd)?)
        };
        let bias = loader.bias(&parts, config.biases.head)?;
        Ok(Self::assemble(config.clone(), embedding, blocks, final_norm, Linear::new(head, bias, &parts)))
    }
}

/// How a projection is kept.
enum Kept {
    /// In the codes that the source has.
    Codes(Codes),
    /// Quantized as it is loaded.
    Quantized(Format),
    Whole,
}

/// What parts of a model are made from.
pub(super) struct Loader<'a> {
    pub(super) config: &'a Config,
    pub(super) source: &'a dyn Source,
    pub(super) store: Store,
    /// How projections are quantized that are not so in the source.
    pub(super) formats: Option<&'a Formats>,
    pub(super) device: Option<&'a Device>,
}

impl Loader<'_> {
    /// # Errors
    /// When the kernels of the device have no room for a head.
    pub(super) fn check(&self) -> Result<()> {
        match self.device.filter(|_| self.config.head_size > LARGEST_HEAD) {
            Some(device) => {
                let what = format!("heads of {} channels on {}", self.config.head_size, device.name());
                Err(Error::unsupported(what, "use --accelerator cpu"))
            }
            None => Ok(()),
        }
    }

    pub(super) fn embedding(&self) -> Result<Weight> {
        self.weight(&[("model.embed_tokens".to_owned(), self.config.vocab_size)], self.config.n_embd)
    }

    fn weight(&self, parts: &[(String, usize)], cols: usize) -> Result<Weight> {
        let rows = parts.iter().map(|p| p.1).sum();
        let (data, narrow) = self.elements(parts, cols)?;
        Ok(match (self.device, data) {
            (Some(device), data) => Weight::resident(Resident::whole(device, self.dtype(), rows, cols, &data)),
            (None, Data::Bf16(elements)) if narrow => Weight::widened(rows, cols, elements),
            (None, data) => Weight::new(rows, cols, data),
        })
    }

    /// The elements of some matrices below one another, and whether they are kept narrower than the store is.
    fn elements(&self, parts: &[(String, usize)], cols: usize) -> Result<(Data, bool)> {
        let len = parts.iter().map(|p| p.1).sum::<usize>() * cols;
        let names = parts.iter().map(|(name, _)| format!("{name}.weight"));
        let narrow = narrow(self.source, self.store, self.device.is_some(), names)?;
        let mut data = match self.store {
            Store::F32 if narrow => Data::Bf16(Vec::with_capacity(len)),
            Store::F32 => Data::F32(Vec::with_capacity(len)),
            Store::Bf16 => Data::Bf16(Vec::with_capacity(len)),
            Store::F16 => Data::F16(Vec::with_capacity(len)),
        };
        for (name, rows) in parts {
            self.source.append(&format!("{name}.weight"), *rows, cols, &mut data)?;
        }
        Ok((data, narrow))
    }

    /// Type of the activations on a device.
    fn dtype(&self) -> Dtype {
        match self.store {
            Store::F32 => Dtype::F32,
            Store::Bf16 => Dtype::Bf16,
            Store::F16 => Dtype::F16,
        }
    }

    /// The weight of a block's projection.
    pub(super) fn projection(&self, parts: &[(String, usize)], cols: usize) -> Result<Weight> {
        let kept = parts.iter().map(|part| self.kept(part)).collect::<Result<Vec<Kept>>>()?;
        if kept.iter().all(|kept| matches!(kept, Kept::Whole)) {
            return self.weight(parts, cols);
        }
        let each = kept.into_iter().zip(parts);
        let Some(device) = self.device else {
            let rows = each.map(|(kept, part)| self.rows(kept, part, cols)).collect::<Result<_>>()?;
            return Ok(Weight::quantized(cols, rows, self.store));
        };
        let parts = each.map(|(kept, part)| self.part(device, kept, part, cols)).collect::<Result<_>>()?;
        Ok(Weight::resident(Resident::quantized(device, self.dtype(), cols, parts)))
    }

    /// How a projection is kept: as the source has it, else quantized by itself, since its scales' mean and nested blocks are
    /// those that bitsandbytes finds.
    fn kept(&self, (module, _): &(String, usize)) -> Result<Kept> {
        let name = format!("{module}.weight");
        if let Some(codes) = self.source.codes(&name)? {
            return Ok(Kept::Codes(codes));
        }
        let formats = self.formats.filter(|_| !self.source.stays_whole(&name));
        Ok(formats.map_or(Kept::Whole, |formats| Kept::Quantized(formats.of(module))))
    }

    /// The rows of a projection on the host.
    fn rows(&self, kept: Kept, part: &(String, usize), cols: usize) -> Result<Rows> {
        Ok(match kept {
            Kept::Codes(codes) => Rows::Codes(codes),
            Kept::Quantized(format) => Rows::Codes(Codes::new(format, &self.values(part, cols)?, part.1, cols)),
            Kept::Whole => Rows::Whole(self.weight(std::slice::from_ref(part), cols)?),
        })
    }

    /// The rows of a projection on a device.
    fn part(&self, device: &Device, kept: Kept, part: &(String, usize), cols: usize) -> Result<Part> {
        Ok(match kept {
            Kept::Codes(codes) => Part::upload(device, &codes),
            Kept::Quantized(format) => Part::quantize(device, format, &self.values(part, cols)?, part.1, cols),
            Kept::Whole => {
                let (data, _) = self.elements(std::slice::from_ref(part), cols)?;
                Part::whole(device, self.dtype(), part.1, &data)
            }
        })
    }

    /// The source's own values of a projection.
    fn values(&self, (name, rows): &(String, usize), cols: usize) -> Result<Vec<f32>> {
        self.source.vector(&format!("{name}.weight"), rows * cols)
    }

    fn bias(&self, parts: &[(String, usize)], present: bool) -> Result<Option<Vec<f32>>> {
        if !present {
            return Ok(None);
        }
        let mut bias = Vec::new();
        for (name, rows) in parts {
            bias.extend(self.source.vector(&format!("{name}.bias"), *rows)?);
        }
        Ok(Some(bias))
    }

    fn linear(&self, prefix: &str, parts: &[(&str, usize)], cols: usize, bias: bool) -> Result<Linear> {
        let parts: Vec<(String, usize)> = parts.iter().map(|(n, rows)| (format!("{prefix}.{n}"), *rows)).collect();
        Ok(Linear::new(Arc::new(self.projection(&parts, cols)?), self.bias(&parts, bias)?, &parts))
    }

    fn norm(&self, name: &str) -> Result<Norm> {
        let config = self.config;
        let bias = config.biases.norm;
        self.norm_of(name, config.norm, config.n_embd, config.n_embd, bias)
    }

    fn norm_of(&self, name: &str, kind: Kind, group: usize, len: usize, bias: bool) -> Result<Norm> {
        let mut weight = vec![1.0; len];
        if self.config.norm_weight {
            weight = self.source.vector(&format!("{name}.weight"), len)?;
        }
        if self.config.norm_unit_offset {
            weight.iter_mut().for_each(|w| *w += 1.0);
        }
        let bias = if bias { Some(self.source.vector(&format!("{name}.bias"), len)?) } else { None };
        Ok(Norm { kind, eps: self.config.norm_eps, group, weight: weight.into(), bias: bias.map(Into::into) })
    }

    pub(super) fn block(&self, layer: usize) -> Result<Block> {
        let config = self.config;
        let prefix = format!("model.layers.{layer}");
        let norm = |name: &str| self.norm(&format!("{prefix}.{name}")).map(Some);
        let (attention_norms, mlp_norms) = match config.placement {
            Placement::Pre => (
                Norms { before: norm("input_layernorm")?, after: None },
                Norms {
                    before: if config.shared_norm { None } else { norm("post_attention_layernorm")? },
                    after: None,
                },
            ),
            Placement::Post => (
                Norms { before: None, after: norm("post_attention_layernorm")? },
                Norms { before: None, after: norm("post_feedforward_layernorm")? },
            ),
            Placement::Both => (
                Norms { before: norm("input_layernorm")?, after: norm("post_attention_layernorm")? },
                Norms { before: norm("pre_feedforward_layernorm")?, after: norm("post_feedforward_layernorm")? },
            ),
        };
        Ok(Block {
            attention: self.attention(layer)?,
            attention_norms,
            mlp: self.mlp(&format!("{prefix}.mlp"))?,
            mlp_norms,
            parallel_residual: config.parallel_residual,
            shared_norm: config.shared_norm,
            residual_scale: config.residual_scale,
        })
    }

    fn attention(&self, layer: usize) -> Result<attention::Attention> {
        let config = self.config;
        let prefix = format!("model.layers.{layer}.self_attn");
        let (q, kv) = (config.q_cols(), config.kv_cols());
        let parts = [("q_proj", q), ("k_proj", kv), ("v_proj", kv)];
        let qk_norm = |name: &str, cols: usize| {
            let name = format!("{prefix}.{name}");
            match config.qk_norm {
                QkNorm::None => Ok(None),
                QkNorm::Head => self.norm_of(&name, Kind::Rms, config.head_size, config.head_size, false).map(Some),
                QkNorm::HeadLayer => self.norm_of(&name, Kind::Layer, config.head_size, cols, false).map(Some),
                QkNorm::Full => self.norm_of(&name, Kind::Rms, cols, cols, false).map(Some),
            }
        };
        let window = config.windows[layer];
        let qkv = self.linear(&prefix, &parts, config.n_embd, config.biases.qkv)?;
        let bf16 = qkv.weight().is_bf16();
        Ok(Attention {
            qkv,
            projection: self.linear(&prefix, &[("o_proj", config.n_embd)], q, config.biases.projection)?,
            qk_norm: qk_norm("q_norm", q)?.zip(qk_norm("k_norm", kv)?).map(|(q, k)| [q, k]),
            clip: config.clip_qkv,
            core: Core {
                n_head: config.n_head,
                n_query_groups: config.n_query_groups,
                head_size: config.head_size,
                scale: config.attention_scale,
                softcap: config.attention_softcap,
                window,
                bf16,
            },
            rope: (config.rotary_dim > 0 && !config.no_rope[layer])
                .then_some(usize::from(config.rope_local_theta.is_some() && window.is_some())),
        })
    }

    fn mlp(&self, prefix: &str) -> Result<Mlp> {
        let MlpKind::Experts { n_expert, n_expert_per_token, norm_topk } = self.config.mlp else {
            return Ok(Mlp::Dense(self.dense(prefix)?));
        };
        // The router decides by small differences and is small itself: it stays in 32 bit.
        let exact = Loader { store: Store::F32, ..*self };
        let parts = [(format!("{prefix}.gate"), n_expert)];
        let router = Linear::new(Arc::new(exact.weight(&parts, self.config.n_embd)?), None, &parts);
        let experts = (0..n_expert).map(|n| self.dense(&format!("{prefix}.experts.{n}"))).collect::<Result<_>>()?;
        Ok(Mlp::Experts(Experts { router, experts, n_expert_per_token, norm_topk }))
    }

    fn dense(&self, prefix: &str) -> Result<Dense> {
        let config = self.config;
        let width = config.intermediate_size;
        let gated = [("gate_proj", width), ("up_proj", width)];
        let up = if config.mlp == MlpKind::Plain { &gated[1..] } else { &gated[..] };
        Ok(Dense {
            up: self.linear(prefix, up, config.n_embd, config.biases.mlp)?,
            down: self.linear(prefix, &[("down_proj", config.n_embd)], width, config.biases.mlp)?,
            activation: config.activation,
        })
    }
}
