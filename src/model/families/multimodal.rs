//! Models that see and read, of which only the reading part is computed: Gemma 3 from 4B on. Its settings stand in
//! `text_config`, its tensors behind a prefix.

use super::HfConfig;
use crate::error::{Error, Result};
use serde_json::{Map, Value, json};

/// `model_type` of the whole, and that of its text part with transformers' class for it.
const KINDS: [(&str, &str, &str); 1] = [("gemma3", "gemma3_text", "Gemma3ForCausalLM")];

/// Keys of the whole's config that its text part may leave out.
const SHARED: [&str; 7] = [
    "torch_dtype",
    "dtype",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
    "tie_word_embeddings",
    "quantization_config",
];

/// Values of `model_type` of models of which the text part is read.
pub(super) fn model_types() -> impl Iterator<Item = &'static str> {
    KINDS.iter().map(|(whole, ..)| *whole)
}

/// The config of the text part, if `config` is that of a model which has other parts as well.
///
/// # Errors
/// When there is no `text_config` in it.
pub fn text_part(config: &HfConfig) -> Result<Option<HfConfig>> {
    let model_type = config.model_type()?;
    let Some((_, text_type, class)) = KINDS.iter().find(|(whole, ..)| *whole == model_type) else { return Ok(None) };
    let Some(text) = config.get("text_config").and_then(Value::as_object) else {
        let problem = format!("no `text_config` object in a {model_type} model");
        return Err(Error::invalid(config.path(), problem, "download the checkpoint again"));
    };
    let mut keys: Map<String, Value> = text.clone();
    keys.insert("model_type".to_owned(), json!(text_type));
    keys.insert("architectures".to_owned(), json!([class]));
    for key in SHARED {
        if let (Some(value), false) = (config.get(key), keys.contains_key(key)) {
            keys.insert(key.to_owned(), value.clone());
        }
    }
    Ok(Some(HfConfig::of(config.path(), keys)))
}

/// What a tensor of the whole is called in its text part; `None` for one of another part.
#[must_use]
pub fn text_name(name: &str) -> Option<String> {
    let others = ["vision_tower.", "multi_modal_projector."];
    if others.iter().any(|part| name.strip_prefix("model.").unwrap_or(name).starts_with(part)) {
        return None;
    }
    let inner = name.strip_prefix("model.language_model.").map(|rest| format!("model.{rest}"));
    Some(inner.unwrap_or_else(|| name.strip_prefix("language_model.").unwrap_or(name).to_owned()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_text_part_has_its_own_settings_and_names() {
        let whole = HfConfig::from_text(
            r#"{"model_type": "gemma3", "eos_token_id": [1, 106], "text_config": {"hidden_size": 64}, "hidden_size": 1}"#,
        );
        let text = text_part(&whole).unwrap().unwrap();
        assert_eq!((text.model_type().unwrap(), text.count("hidden_size").unwrap()), ("gemma3_text", 64));
        assert_eq!(text.get("eos_token_id"), Some(&json!([1, 106])));
        assert!(text_part(&text).unwrap().is_none());
        assert!(text_part(&HfConfig::from_text(r#"{"model_type": "gemma3"}"#)).is_err());
        let norm = "layers.0.input_layernorm.weight";
        for prefix in ["language_model.model.", "model.language_model.", "model."] {
            assert_eq!(text_name(&format!("{prefix}{norm}")), Some(format!("model.{norm}")));
        }
        assert_eq!(text_name("language_model.lm_head.weight").as_deref(), Some("lm_head.weight"));
        assert_eq!(text_name("model.vision_tower.post_layernorm.weight"), None);
        assert_eq!(text_name("multi_modal_projector.mm_soft_emb_norm.weight"), None);
    }
}
