//! What settings may be besides numbers and switches: the words for each, and what LitGPT writes for them.

use serde::de::{Deserializer, Error as _};
use serde::{Deserialize, Serialize, Serializer};
use serde_json::Value;
use std::fmt;
use std::str::FromStr;

/// Number format of weights and activations; adapters and optimizer state are f32 in all of them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Precision {
    /// `32-true`: weights and activations in f32.
    F32True,
    /// `bf16-true`: weights and activations in bf16.
    Bf16True,
    /// `bf16-mixed`: weights in f32, activations in bf16.
    Bf16Mixed,
    /// `16-true`: weights and activations in f16.
    F16True,
    /// `16-mixed`: weights in f32, activations in f16.
    F16Mixed,
}

impl Precision {
    /// Every precision, in the order in which messages list them.
    pub const ALL: [Self; 5] = [Self::F32True, Self::Bf16True, Self::Bf16Mixed, Self::F16True, Self::F16Mixed];

    /// LitGPT's name of it, as flags and YAML spell it.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::F32True => "32-true",
            Self::Bf16True => "bf16-true",
            Self::Bf16Mixed => "bf16-mixed",
            Self::F16True => "16-true",
            Self::F16Mixed => "16-mixed",
        }
    }
}

impl fmt::Display for Precision {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for Precision {
    type Err = String;

    fn from_str(text: &str) -> std::result::Result<Self, String> {
        // Lightning reads the bare numbers as these, too.
        let name = match text {
            "32" => "32-true",
            "16" => "16-mixed",
            "bf16" => "bf16-mixed",
            other => other,
        };
        Self::ALL.into_iter().find(|precision| precision.name() == name).ok_or_else(|| {
            let names = Self::ALL.map(Self::name).join(", ");
            format!("unknown precision `{text}`, expected one of {names}")
        })
    }
}

impl Serialize for Precision {
    fn serialize<S: Serializer>(&self, serializer: S) -> std::result::Result<S::Ok, S::Error> {
        serializer.serialize_str(self.name())
    }
}

impl<'de> Deserialize<'de> for Precision {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(D::Error::custom)
    }
}

/// The ways to quantize frozen weights, without LitGPT's `bnb.` in front.
pub const QUANTIZERS: [&str; 7] = ["nf4", "nf4-dq", "nf4-mixed", "fp4", "fp4-dq", "int8", "int8-training"];

/// The name of a quantizer without `bnb.` in front.
///
/// # Errors
/// A name that is not in [`QUANTIZERS`].
pub fn quantizer(text: &str) -> std::result::Result<String, String> {
    let name = text.strip_prefix("bnb.").unwrap_or(text);
    match QUANTIZERS.contains(&name) {
        true => Ok(name.to_owned()),
        false => Err(format!("unknown quantizer `{text}`, expected one of {}", QUANTIZERS.join(", "))),
    }
}

/// Yes, no, or what the program thinks best; `auto`, `true`, `false` in YAML.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Switch {
    /// Decided by the program.
    #[default]
    Auto,
    /// Always.
    On,
    /// Never.
    Off,
}

impl Serialize for Switch {
    fn serialize<S: Serializer>(&self, serializer: S) -> std::result::Result<S::Ok, S::Error> {
        match self {
            Self::Auto => serializer.serialize_str("auto"),
            Self::On => serializer.serialize_bool(true),
            Self::Off => serializer.serialize_bool(false),
        }
    }
}

impl<'de> Deserialize<'de> for Switch {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Self, D::Error> {
        let value = Value::deserialize(deserializer)?;
        match word(&value).to_ascii_lowercase().as_str() {
            "auto" => Ok(Self::Auto),
            "on" | "true" | "yes" => Ok(Self::On),
            "off" | "false" | "no" => Ok(Self::Off),
            other => Err(D::Error::custom(format!("expected `auto`, `on` or `off`, got `{other}`"))),
        }
    }
}

/// Where a model is computed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Accelerator {
    /// On the first GPU if this program was built for one and there is one.
    #[default]
    Auto,
    /// On the processor.
    Cpu,
    /// On the first NVIDIA GPU.
    #[serde(alias = "gpu")]
    Cuda,
}

impl FromStr for Accelerator {
    type Err = String;

    fn from_str(text: &str) -> std::result::Result<Self, String> {
        match text {
            "auto" => Ok(Self::Auto),
            "cpu" => Ok(Self::Cpu),
            "cuda" | "gpu" => Ok(Self::Cuda),
            other => Err(format!("expected `auto`, `cpu` or `cuda`, got `{other}`")),
        }
    }
}

/// How the learning rate goes over a run, after the warm-up.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LrSchedule {
    /// Along a cosine to `min_lr`.
    #[default]
    Cosine,
    /// Along a straight line to `min_lr`.
    Linear,
    /// Not at all.
    Constant,
    /// As LitGPT does: the warm-up begins at 0, and the cosine ends there.
    Litgpt,
}

/// Which validation sample the model answers during an evaluation.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum EvaluateExample {
    /// The first one.
    #[default]
    First,
    /// Another one each time.
    Random,
    /// The one with this index, counted from 0.
    Index(usize),
}

impl Serialize for EvaluateExample {
    fn serialize<S: Serializer>(&self, serializer: S) -> std::result::Result<S::Ok, S::Error> {
        match self {
            Self::First => serializer.serialize_str("first"),
            Self::Random => serializer.serialize_str("random"),
            Self::Index(index) => serializer.serialize_u64(*index as u64),
        }
    }
}

impl<'de> Deserialize<'de> for EvaluateExample {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Self, D::Error> {
        let value = Value::deserialize(deserializer)?;
        match word(&value).as_str() {
            "first" => Ok(Self::First),
            "random" => Ok(Self::Random),
            index => index
                .parse()
                .map(Self::Index)
                .map_err(|_| D::Error::custom(format!("expected `first`, `random` or an index, got `{index}`"))),
        }
    }
}

pub(super) fn quantize_field<'de, D: Deserializer<'de>>(
    deserializer: D,
) -> std::result::Result<Option<String>, D::Error> {
    let name = Option::<String>::deserialize(deserializer)?;
    name.map(|name| quantizer(&name)).transpose().map_err(D::Error::custom)
}

/// LitGPT takes `auto` and `-1` for all devices that there are.
pub(super) fn devices_field<'de, D: Deserializer<'de>>(deserializer: D) -> std::result::Result<usize, D::Error> {
    let value = Value::deserialize(deserializer)?;
    match word(&value).as_str() {
        "auto" | "-1" => Ok(1),
        number => number.parse().map_err(|_| D::Error::custom(format!("expected a number of devices, got `{number}`"))),
    }
}

/// LitGPT takes `true` and `false`, too.
pub(super) fn resume_field<'de, D: Deserializer<'de>>(
    deserializer: D,
) -> std::result::Result<Option<String>, D::Error> {
    let value = Value::deserialize(deserializer)?;
    let asked = word(&value);
    Ok((!value.is_null() && !asked.eq_ignore_ascii_case("false")).then_some(
        match asked.to_ascii_lowercase().as_str() {
            "true" => "true".to_owned(),
            _ => asked,
        },
    ))
}

/// A scalar as one would write it.
pub(super) fn word(value: &Value) -> String {
    match value {
        Value::String(text) => text.clone(),
        other => other.to_string(),
    }
}
