//! `adapter_config.json`, as far as it matters for the numbers; what else it asks for is refused. `target_parameters` is not
//! looked at: the tensors say which parameters are adapted, and each has to fit one of the model's.

use crate::error::{Error, Result};
use crate::model::lora::LoraConfig;
use serde_json::{Map, Value};
use std::path::Path;

/// What to do with an adapter that asks for more than is done here.
const BY_PEFT: &str = "merge that adapter with PEFT and use the merged model";

/// An adapter_config.json, as far as it matters for the numbers.
pub(super) struct PeftConfig {
    alpha: f64,
    dropout: f64,
    /// Rank of all modules; `None` where some have their own.
    pub(super) rank: Option<u64>,
    rslora: bool,
    alphas: Vec<(regex::Regex, f64)>,
}

impl PeftConfig {
    pub(super) fn read(path: &Path) -> Result<Self> {
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
        let neutral = |key: &str, value: &Value| match value {
            Value::Null | Value::Bool(false) => true,
            Value::Array(list) => list.is_empty(),
            Value::Object(map) => map.is_empty(),
            Value::String(text) => key == "bias" && text == "none",
            _ => false,
        };
        let keys = [
            "use_dora",
            "modules_to_save",
            "bias",
            "fan_in_fan_out",
            "layer_replication",
            "lora_bias",
            "use_qalora",
            "trainable_token_indices",
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

    pub(super) fn of(&self, module: &str, r: usize) -> LoraConfig {
        // PEFT knows a module that it adapts by its parameter as `gate.weight`.
        let parameter = format!("{module}.weight");
        let own = self.alphas.iter().find(|(pattern, _)| pattern.is_match(module) || pattern.is_match(&parameter));
        let alpha = own.map_or(self.alpha, |own| own.1);
        LoraConfig { r, alpha, rslora: self.rslora, dropout: self.dropout }
    }
}
