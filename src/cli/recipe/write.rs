//! The settings of a run as a YAML recipe: LitGPT's keys in its shape, which `--config` reads back.

use crate::data::DataConfig;
use crate::data::prompt::PromptStyle;
use crate::error::{Error, Result};
use crate::train::settings::{DATA_MODULES, DataModule, FinetuneSettings, LrSchedule, Switch, TrainSettings};
use serde_json::{Map, Value, json};
use std::path::{Path, PathBuf};

/// Name of the file with the resolved settings in each saved adapter's folder.
pub const HYPERPARAMETERS: &str = "hyperparameters.yaml";

/// The settings as a tree in LitGPT's shape. Keys that LitGPT does not know are left out where they are at their default.
pub(super) fn to_tree(settings: &FinetuneSettings) -> Value {
    let mut tree = serde_json::to_value(settings).expect("plain data becomes JSON");
    let module = DataModule::find(&settings.data.name).map_or(&[][..], |module| module.fields);
    let any = |field: &str| !DATA_MODULES.iter().any(|module| module.fields.contains(&field));
    let data: Map<String, Value> = tree["data"]
        .as_object()
        .into_iter()
        .flatten()
        .filter(|(key, value)| *key != "name" && !value.is_null() && (any(key) || module.contains(&key.as_str())))
        .map(|(key, value)| (key.clone(), value.clone()))
        .collect();
    let data = shaped(data, &settings.data);
    let optimizer = &settings.optimizer;
    tree["data"] = json!({"class_path": format!("litgpt.data.{}", settings.data.name), "init_args": data});
    tree["optimizer"] = json!({"class_path": "torch.optim.AdamW", "init_args": {
        "lr": optimizer.learning_rate,
        "weight_decay": optimizer.weight_decay,
        "betas": [optimizer.beta1, optimizer.beta2],
        "eps": optimizer.eps,
    }});
    if let Some(name) = &settings.quantize {
        tree["quantize"] = format!("bnb.{name}").into();
    }
    // LitGPT's alpha is a whole number.
    if settings.lora.lora_alpha.fract() == 0.0 && settings.lora.lora_alpha.abs() < 1e9 {
        tree["lora_alpha"] = (settings.lora.lora_alpha as i64).into();
    }
    if let Some(map) = tree.as_object_mut().filter(|_| settings.add_bos == Switch::Auto) {
        map.shift_remove("add_bos");
    }
    // LitGPT has no such keys, and reads the file where they are left out.
    if let Some(map) = tree["train"].as_object_mut() {
        if settings.train.activation_checkpointing == Switch::Auto {
            map.shift_remove("activation_checkpointing");
        }
        if settings.train.prefix_sharing == Switch::Auto {
            map.shift_remove("prefix_sharing");
        }
        if settings.train.lr_schedule == LrSchedule::Cosine {
            map.shift_remove("lr_schedule");
        }
        if settings.train.save_total_limit.is_none() {
            map.shift_remove("save_total_limit");
        }
        if settings.train.max_skipped_steps == TrainSettings::default().max_skipped_steps {
            map.shift_remove("max_skipped_steps");
        }
    }
    if let Some(map) = tree["eval"].as_object_mut().filter(|_| settings.eval.early_stopping_patience.is_none()) {
        map.shift_remove("early_stopping_patience");
    }
    tree
}

/// The fields of a data module without what LitGPT does not know, and with a prompt style that it has no key for as a class.
fn shaped(mut fields: Map<String, Value>, data: &DataConfig) -> Map<String, Value> {
    if !data.pack {
        fields.shift_remove("pack");
    }
    let style = data.prompt_style.as_deref().and_then(|name| PromptStyle::by_name(name).ok());
    if let Some(style) = style.filter(|style| !style.has_key()) {
        let class = format!("litgpt.prompts.{}", style.class_name());
        fields.insert("prompt_style".into(), json!({"class_path": class}));
    }
    fields
}

/// The settings as a YAML recipe in LitGPT's shape, which `--config` reads back to the same settings.
///
/// # Errors
/// A path that is not text.
pub fn to_yaml(settings: &FinetuneSettings) -> Result<String> {
    write_yaml(&to_tree(settings))
}

/// What `--print_config` prints. `what` is its value, with commas between: `skip_null` leaves out the nulls that are
/// defaults, `skip_default` everything that is; `comments`, LitGPT's third word, changes nothing.
///
/// # Errors
/// An unknown word in `what`.
pub fn print_config(settings: &FinetuneSettings, what: &str) -> Result<String> {
    let mut tree = to_tree(settings);
    let module = DataConfig { name: settings.data.name.clone(), ..Default::default() };
    let defaults = to_tree(&FinetuneSettings { data: module, ..Default::default() });
    // The module itself is a choice, too; beside it stand the defaults of its own fields.
    let is_default = |path: &str, value: &Value| {
        (path != "/data/class_path" || settings.data.name == "Alpaca")
            && defaults.pointer(path).unwrap_or(&Value::Null) == value
    };
    for word in what.split(',').map(str::trim) {
        match word {
            "" | "comments" => {}
            "skip_null" => retain(&mut tree, &|path, value| !value.is_null() || !is_default(path, value), ""),
            "skip_default" => retain(&mut tree, &|path, value| !is_default(path, value), ""),
            other => {
                return Err(Error::usage(
                    format!("`--print_config={other}`: unknown word"),
                    "--print_config, --print_config=skip_null or --print_config=skip_default",
                ));
            }
        }
    }
    write_yaml(&tree)
}

/// Keeps the leaves of a tree for which `keep(path, value)` holds, and the groups that still have some.
fn retain(tree: &mut Value, keep: &dyn Fn(&str, &Value) -> bool, path: &str) {
    let Some(map) = tree.as_object_mut() else { return };
    map.retain(|key, value| {
        let path = format!("{path}/{key}");
        match value {
            Value::Object(_) => {
                retain(value, keep, &path);
                value.as_object().is_some_and(|map| !map.is_empty())
            }
            value => keep(&path, value),
        }
    });
}

fn write_yaml(tree: &Value) -> Result<String> {
    let unwritable = |error: serde_saphyr::SerializeError| {
        Error::usage(format!("these settings cannot be written as YAML: {error}"), "check paths for odd characters")
    };
    serde_saphyr::to_string(tree).map_err(unwritable)
}

/// Writes the settings as `hyperparameters.yaml` into `folder` and returns its path. The file appears whole or not.
///
/// # Errors
/// The folder cannot be written to.
pub fn write_hyperparameters(settings: &FinetuneSettings, folder: &Path) -> Result<PathBuf> {
    let path = folder.join(HYPERPARAMETERS);
    let partial = folder.join(format!("{HYPERPARAMETERS}.partial"));
    std::fs::write(&partial, to_yaml(settings)?).map_err(Error::io("write", &partial))?;
    std::fs::rename(&partial, &path).map_err(Error::io("write", &path))?;
    Ok(path)
}
