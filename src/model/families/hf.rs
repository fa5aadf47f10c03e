//! `HfConfig`: reads config.json as transformers does, with errors that name the file and the key.

use crate::error::{Error, Result};
use crate::model::config::Config;
use crate::ops::glu::Activation;
use crate::ops::rope::Scaling;
use serde_json::{Map, Value};
use std::path::{Path, PathBuf};

/// The context of the pretraining, in a config or in its `rope_scaling`, of which the first counts.
const ORIGINAL_CONTEXT: &str = "original_max_position_embeddings";

/// Largest count.
const LARGEST: usize = 1 << 31;

/// A config.json.
#[derive(Debug, Clone)]
pub struct HfConfig {
    path: PathBuf,
    keys: Map<String, Value>,
}

impl HfConfig {
    /// A config.json of this text.
    #[cfg(test)]
    pub(super) fn from_text(text: &str) -> Self {
        let keys = serde_json::from_str(text).expect("a JSON object");
        Self { path: PathBuf::from("config.json"), keys }
    }

    /// Reads the file at `path`.
    ///
    /// # Errors
    /// When it is missing or is not a JSON object.
    pub fn read(path: &Path) -> Result<Self> {
        let text = std::fs::read_to_string(path).map_err(|e| {
            if e.kind() == std::io::ErrorKind::NotFound {
                let hint = "a checkpoint is a Hugging Face model folder; `litgpt download REPO` fetches one".to_owned();
                return Error::Missing { what: "config.json".to_owned(), path: path.to_owned(), hint };
            }
            Error::io("read", path)(e)
        })?;
        let hint = "download the checkpoint again";
        match serde_json::from_str(&text) {
            Ok(Value::Object(keys)) => Ok(Self { path: path.to_owned(), keys }),
            Ok(_) => Err(Error::invalid(path, "not a JSON object", hint)),
            Err(e) => Err(Error::invalid(path, format!("not JSON: {e}"), hint)),
        }
    }

    /// The config.json of these keys, for which `path` stands in messages.
    #[must_use]
    pub fn of(path: &Path, keys: Map<String, Value>) -> Self {
        Self { path: path.to_owned(), keys }
    }

    /// All keys.
    #[must_use]
    pub fn keys(&self) -> &Map<String, Value> {
        &self.keys
    }

    /// The file.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// `model_type`.
    ///
    /// # Errors
    /// When there is none.
    pub fn model_type(&self) -> Result<&str> {
        let none =
            || Error::invalid(&self.path, "no `model_type`", "a checkpoint's config.json names its architecture");
        self.keys.get("model_type").and_then(Value::as_str).ok_or_else(none)
    }

    /// The value of `key` unless it is absent or null.
    #[must_use]
    pub fn get(&self, key: &str) -> Option<&Value> {
        self.keys.get(key).filter(|v| !v.is_null())
    }

    /// The object at `outer.inner`, or an empty one.
    pub(super) fn nested(&self, outer: &str, inner: &str) -> Self {
        let object = self.get(outer).and_then(|v| v.get(inner)).and_then(Value::as_object);
        Self { path: self.path.clone(), keys: object.cloned().unwrap_or_default() }
    }

    /// The same with `defaults` for the keys that are left out.
    #[must_use]
    pub(super) fn or(&self, defaults: &Value) -> Self {
        let mut keys = defaults.as_object().cloned().unwrap_or_default();
        keys.extend(self.keys.clone());
        Self { path: self.path.clone(), keys }
    }

    /// Whether `key` is there, null or not.
    #[must_use]
    pub fn has(&self, key: &str) -> bool {
        self.keys.contains_key(key)
    }

    pub(super) fn wrong(&self, key: &str, value: &Value, wanted: &str) -> Error {
        let value: String = value.to_string().chars().take(60).collect();
        Error::invalid(&self.path, format!("`{key}` is {value}, not {wanted}"), "download the checkpoint again")
    }

    /// A count that has to be there.
    ///
    /// # Errors
    /// When it is absent or no count.
    pub fn count(&self, key: &str) -> Result<usize> {
        self.count_or(key, None)?.ok_or_else(|| {
            Error::invalid(&self.path, format!("no `{key}`"), "a checkpoint's config.json describes its architecture")
        })
    }

    /// A count, or `default` where it is absent.
    ///
    /// # Errors
    /// When it is no count, or one so large that products of two would not be numbers any more.
    pub fn count_or(&self, key: &str, default: impl Into<Option<usize>>) -> Result<Option<usize>> {
        let Some(value) = self.get(key) else { return Ok(default.into()) };
        let whole =
            value.as_u64().or_else(|| value.as_f64().filter(|f| f.fract() == 0.0 && *f >= 0.0).map(|f| f as u64));
        let count = whole.and_then(|v| usize::try_from(v).ok()).ok_or_else(|| self.wrong(key, value, "a count"))?;
        if count > LARGEST { Err(self.wrong(key, value, "a count that a model has")) } else { Ok(Some(count)) }
    }

    /// A count, or `default` where the key is left out; null is none.
    ///
    /// # Errors
    /// As [`Self::count_or`].
    pub fn count_unless_null(&self, key: &str, default: usize) -> Result<Option<usize>> {
        if self.has(key) { self.count_or(key, None) } else { Ok(Some(default)) }
    }

    /// A number, or `default` where it is absent.
    ///
    /// # Errors
    /// When it is no finite number.
    pub fn number(&self, key: &str, default: f64) -> Result<f64> {
        let Some(value) = self.get(key) else { return Ok(default) };
        value.as_f64().filter(|f| f.is_finite()).ok_or_else(|| self.wrong(key, value, "a number"))
    }

    /// A number, or `None` where it is absent.
    ///
    /// # Errors
    /// When it is no finite number.
    pub fn number_if_any(&self, key: &str) -> Result<Option<f64>> {
        if self.get(key).is_none() { Ok(None) } else { self.number(key, 0.0).map(Some) }
    }

    /// A switch, or `default` where it is absent.
    ///
    /// # Errors
    /// When it is neither true nor false.
    pub fn flag(&self, key: &str, default: bool) -> Result<bool> {
        let Some(value) = self.get(key) else { return Ok(default) };
        value.as_bool().ok_or_else(|| self.wrong(key, value, "true or false"))
    }

    /// Refuses a key whose value would change the computation in a way that is not implemented.
    ///
    /// # Errors
    /// When `key` is there, not null and not `allowed`.
    pub fn refuse_unless(&self, key: &str, allowed: &Value) -> Result<()> {
        match self.get(key) {
            Some(value) if value != allowed => Err(Error::unsupported(
                format!("`{key}`: {value} (`{}`)", self.path.display()),
                "this model computes something that is not implemented; choose another checkpoint",
            )),
            _ => Ok(()),
        }
    }

    /// The activation named by `key`.
    ///
    /// # Errors
    /// When it is unknown.
    pub fn activation(&self, key: &str, default: &str) -> Result<Activation> {
        let name = self.get(key).map_or(Ok(default), |v| v.as_str().ok_or_else(|| self.wrong(key, v, "a name")))?;
        match name {
            "silu" | "swish" => Ok(Activation::Silu),
            "gelu" => Ok(Activation::Gelu),
            "gelu_new" | "gelu_pytorch_tanh" | "gelu_fast" => Ok(Activation::GeluTanh),
            "relu" => Ok(Activation::Relu),
            _ => Err(Error::unsupported(
                format!("`{key}`: \"{name}\" (`{}`)", self.path.display()),
                "the activations silu, gelu, gelu_new, gelu_pytorch_tanh and relu are implemented",
            )),
        }
    }

    /// Sizes that nearly all families spell alike, on top of a llama-like architecture.
    ///
    /// # Errors
    /// When a size is absent or no count.
    pub fn sizes(&self) -> Result<Config> {
        let n_head = self.count("num_attention_heads")?;
        let mut config = Config::llama(
            self.count("vocab_size")?,
            self.layers()?,
            self.count("hidden_size")?,
            n_head,
            self.count_or("intermediate_size", 0)?.unwrap_or(0),
        );
        config.n_query_groups = self.count_or("num_key_value_heads", n_head)?.unwrap_or(n_head);
        config.head_size = self.count_or("head_dim", config.head_size)?.unwrap_or(config.head_size);
        config.rotary_dim = config.head_size;
        config.block_size = self.count_or("max_position_embeddings", 2048)?.unwrap_or(2048);
        Ok(config)
    }

    /// The number of layers, checked before lists of that length are made.
    fn layers(&self) -> Result<usize> {
        let layers = self.count("num_hidden_layers")?;
        if layers == 0 || layers > 4096 {
            let problem = format!("`num_hidden_layers` is {layers}, which no model has");
            return Err(Error::invalid(&self.path, problem, "download the checkpoint again"));
        }
        Ok(layers)
    }

    /// The object at `key`, or an empty one.
    fn object(&self, key: &str) -> Result<Self> {
        let keys = match self.get(key) {
            Some(Value::Object(map)) => map.clone(),
            Some(other) => return Err(self.wrong(key, other, "an object")),
            None => Map::new(),
        };
        Ok(Self { path: self.path.clone(), keys })
    }

    /// Theta and scaling of the rotary embedding of whole heads: in these families transformers does not read
    /// `partial_rotary_factor`. LitGPT reads `rotary_percentage` in all.
    ///
    /// # Errors
    /// When the scaling is unknown or incomplete.
    pub fn rope(&self, config: &mut Config) -> Result<()> {
        self.rope_of(config, "rope_theta", |_| self.number("rotary_percentage", 1.0))
    }

    /// The same of a share of each head, `default` where it is not said.
    ///
    /// # Errors
    /// As [`Self::rope`].
    pub fn partial_rope(&self, config: &mut Config, theta_key: &str, share_key: &str, default: f64) -> Result<()> {
        self.rope_of(config, theta_key, |nested| {
            nested.number("partial_rotary_factor", self.number(share_key, default)?)
        })
    }

    /// From `rope_parameters` (transformers 5) or the older keys, which replace it where both are there, as someone added them.
    fn rope_of(&self, config: &mut Config, theta_key: &str, share: impl FnOnce(&Self) -> Result<f64>) -> Result<()> {
        let old = self.object("rope_scaling")?;
        let nested = if old.keys.is_empty() { self.object("rope_parameters")? } else { old };
        config.rope_theta = nested.number("rope_theta", self.number(theta_key, config.rope_theta)?)?;
        config.rotary_dim = (config.head_size as f64 * share(&nested)?) as usize;
        config.rope_scaling = nested.scaling(self, config.block_size)?;
        Ok(())
    }

    /// Rotary embedding of a model whose windowed layers have their own, unscaled: `rope_parameters` by layer type
    /// (transformers 5) or the older keys, where the windowed layers' base, if not said, is `local` of the
    /// other's.
    ///
    /// # Errors
    /// When the scaling is unknown or incomplete, or windowed layers have one.
    pub(super) fn rope_by_layer_type(
        &self,
        config: &mut Config,
        default_theta: f64,
        local: impl FnOnce(f64) -> Result<f64>,
    ) -> Result<()> {
        config.rotary_dim = config.head_size;
        config.rope_theta = default_theta;
        let by_kind = |p: &&Value| p.get("full_attention").is_some() || p.get("sliding_attention").is_some();
        let kinds = self.get("rope_parameters").filter(by_kind);
        if kinds.is_none() {
            self.rope(config)?;
            config.rope_local_theta = Some(local(config.rope_theta)?);
            return self.refuse_longrope(config);
        }
        let (mut full, windowed) =
            (self.nested("rope_parameters", "full_attention"), self.nested("rope_parameters", "sliding_attention"));
        full.keys.extend(self.object("rope_scaling")?.keys);
        config.rope_theta = full.number("rope_theta", self.number("rope_theta", default_theta)?)?;
        // Here the kind's own goes before the model's.
        let outer = if full.get(ORIGINAL_CONTEXT).is_some() { &full } else { self };
        config.rope_scaling = full.scaling(outer, config.block_size)?;
        config.rope_local_theta = match windowed.number_if_any("rope_theta")? {
            Some(theta) => Some(theta),
            None => Some(local(config.rope_theta)?),
        };
        if windowed.scaling(self, config.block_size)? != Scaling::None {
            let what = format!("`rope_parameters`: scaling in sliding_attention (`{}`)", self.path.display());
            return Err(Error::unsupported(
                what,
                "only layers with full attention may have one; choose another checkpoint",
            ));
        }
        self.refuse_longrope(config)
    }

    /// Layers with rotary tables of their own turn a text of any length in one way.
    fn refuse_longrope(&self, config: &Config) -> Result<()> {
        if !matches!(config.rope_scaling, Scaling::Long { .. }) {
            return Ok(());
        }
        let what = format!("rope scaling `longrope` beside windowed layers' own (`{}`)", self.path.display());
        Err(Error::unsupported(what, "choose another checkpoint"))
    }

    /// The scaling of a `rope_scaling` object; `outer` is the config it stands in.
    pub(super) fn scaling(&self, outer: &Self, context: usize) -> Result<Scaling> {
        let kind = self.get("rope_type").or_else(|| self.get("type")).and_then(Value::as_str).unwrap_or("default");
        let needed = |key: &str| {
            self.number_if_any(key)?.ok_or_else(|| {
                Error::invalid(
                    &self.path,
                    format!("`rope_scaling` of type {kind} has no `{key}`"),
                    "download the checkpoint again",
                )
            })
        };
        let original = outer.number(ORIGINAL_CONTEXT, self.number(ORIGINAL_CONTEXT, context as f64)?)?;
        match kind {
            // Dynamic scaling changes only texts beyond the context, which nothing here makes.
            "default" | "dynamic" => Ok(Scaling::None),
            "linear" => Ok(Scaling::Linear { factor: needed("factor")? }),
            "llama3" => Ok(Scaling::Llama3 {
                factor: needed("factor")?,
                low_freq_factor: needed("low_freq_factor")?,
                high_freq_factor: needed("high_freq_factor")?,
                original_context: original,
            }),
            "yarn" => {
                let factor = self.number("factor", context as f64 / original)?;
                Ok(Scaling::Yarn {
                    factor,
                    beta_fast: self.number("beta_fast", 32.0)?,
                    beta_slow: self.number("beta_slow", 1.0)?,
                    original_context: original,
                    attention_factor: self.yarn_attention_factor(factor)?,
                    // Null is false to transformers, where other keys that are null have their default.
                    truncate: self.flag("truncate", !self.has("truncate"))?,
                })
            }
            "longrope" => self.longrope(original, context),
            _ => Err(Error::unsupported(
                format!("rope scaling `{kind}` (`{}`)", self.path.display()),
                "default, dynamic, linear, llama3, longrope and yarn are implemented; choose another checkpoint",
            )),
        }
    }

    /// The scaling of a `rope_scaling` object of type longrope.
    fn longrope(&self, original: f64, context: usize) -> Result<Scaling> {
        let factor = self.number("factor", context as f64 / original)?;
        let attention = if factor <= 1.0 { 1.0 } else { (1.0 + factor.ln() / original.ln()).sqrt() };
        Ok(Scaling::Long {
            short: self.numbers("short_factor")?,
            long: self.numbers("long_factor")?,
            original_context: original as usize,
            attention_factor: self.number("attention_factor", attention)?,
        })
    }

    /// A list of numbers that has to be there.
    fn numbers(&self, key: &str) -> Result<Vec<f64>> {
        let value = self.get(key).unwrap_or(&Value::Null);
        let list = value.as_array().and_then(|list| list.iter().map(Value::as_f64).collect());
        list.ok_or_else(|| self.wrong(key, value, "a list of numbers"))
    }

    fn yarn_attention_factor(&self, factor: f64) -> Result<f64> {
        if let Some(given) = self.number_if_any("attention_factor")? {
            return Ok(given);
        }
        let magnitude = |scale: f64| if factor <= 1.0 { 1.0 } else { 0.1 * scale * factor.ln() + 1.0 };
        match (self.number_if_any("mscale")?, self.number_if_any("mscale_all_dim")?) {
            (Some(a), Some(b)) if a != 0.0 && b != 0.0 => Ok(magnitude(a) / magnitude(b)),
            _ => Ok(magnitude(1.0)),
        }
    }

    /// Windows by `layer_types`, where the config lists them, else `windowed(layer)`.
    ///
    /// # Errors
    /// When the list is of another length or names an unknown kind.
    pub fn windows(&self, config: &mut Config, window: Option<usize>, windowed: impl Fn(usize) -> bool) -> Result<()> {
        let mut in_window: Vec<bool> = (0..config.n_layer).map(windowed).collect();
        if let Some(types) = self.get("layer_types") {
            let list = types.as_array().filter(|l| l.len() == config.n_layer);
            let list = list.ok_or_else(|| self.wrong("layer_types", types, "a list with a kind for each layer"))?;
            for (layer, kind) in in_window.iter_mut().zip(list) {
                *layer = match kind.as_str() {
                    Some("full_attention") => false,
                    Some("sliding_attention") => true,
                    _ => {
                        let what = format!("layer type {kind} (`{}`)", self.path.display());
                        return Err(Error::unsupported(what, "full_attention and sliding_attention are implemented"));
                    }
                };
            }
        }
        config.windows = in_window.iter().map(|w| window.filter(|_| *w)).collect();
        Ok(())
    }
}
