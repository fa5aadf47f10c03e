//! Which data is trained on: LitGPT's data modules and the fields of each.

use super::rules::check;
use crate::data::{DataConfig, wrong_fraction};

/// A data module of LitGPT and the fields that it has besides those that all have.
#[derive(Debug)]
pub struct DataModule {
    /// LitGPT's class name.
    pub name: &'static str,
    /// Its own fields.
    pub fields: &'static [&'static str],
}

/// The data modules for finetuning. `mask_prompt`, `prompt_style`, `ignore_index`, `seed` and `num_workers` belong to
/// all of them and are not repeated.
pub const DATA_MODULES: &[DataModule] = &[
    DataModule { name: "Alpaca", fields: &["val_split_fraction", "download_dir", "file_url", "file_name"] },
    DataModule {
        name: "Alpaca2k",
        fields: &["val_split_fraction", "download_dir", "repo_id", "file_url", "file_name"],
    },
    DataModule { name: "AlpacaGPT4", fields: &["val_split_fraction", "download_dir", "file_url", "file_name"] },
    DataModule { name: "Deita", fields: &["include_multiturn_conversations", "download_dir", "repo_id"] },
    DataModule { name: "Dolly", fields: &["val_split_fraction", "download_dir", "file_url", "file_name"] },
    DataModule { name: "FLAN", fields: &["download_dir", "url", "subsets"] },
    DataModule { name: "Hub", fields: &["repo_id", "subsets", "columns", "val_split_fraction", "download_dir"] },
    DataModule { name: "JSON", fields: &["json_path", "columns", "val_split_fraction"] },
    DataModule {
        name: "LIMA",
        fields: &["val_split_fraction", "include_multiturn_conversations", "repo_id", "download_dir"],
    },
    DataModule { name: "LongForm", fields: &["download_dir"] },
];

impl DataModule {
    /// The module that `name` means: bare or with its dotted path (`litgpt.data.JSON`), in any case, `alpaca_2k` too.
    #[must_use]
    pub fn find(name: &str) -> Option<&'static Self> {
        let last = name.rsplit('.').next().unwrap_or(name).replace('_', "");
        DATA_MODULES.iter().find(|module| module.name.eq_ignore_ascii_case(&last))
    }
}

impl DataConfig {
    /// Names of the fields that are set although not every module has them.
    fn own_fields(&self) -> Vec<&'static str> {
        [
            ("json_path", self.json_path.is_some()),
            ("columns", self.columns.is_some()),
            ("val_split_fraction", self.val_split_fraction.is_some()),
            ("download_dir", self.download_dir.is_some()),
            ("include_multiturn_conversations", self.include_multiturn_conversations),
            ("repo_id", self.repo_id.is_some()),
            ("subsets", self.subsets.is_some()),
            ("file_url", self.file_url.is_some()),
            ("file_name", self.file_name.is_some()),
            ("url", self.url.is_some()),
        ]
        .into_iter()
        .filter_map(|(name, set)| set.then_some(name))
        .collect()
    }

    pub(super) fn problems(&self) -> Vec<String> {
        let Some(module) = DataModule::find(&self.name) else {
            let names: Vec<_> = DATA_MODULES.iter().map(|module| module.name).collect();
            return vec![format!("unknown data module `{}`, expected one of {}", self.name, names.join(", "))];
        };
        let mut found = Vec::new();
        for field in self.own_fields().into_iter().filter(|field| !module.fields.contains(field)) {
            let owners: Vec<_> =
                DATA_MODULES.iter().filter(|other| other.fields.contains(&field)).map(|other| other.name).collect();
            found.push(format!("`data.{field}` is not a field of {} but of {}", module.name, owners.join(", ")));
        }
        check(&mut found, module.name != "JSON" || self.json_path.is_some(), || {
            "the data module JSON needs a file: `--data.json_path FILE`".into()
        });
        check(&mut found, module.name != "Hub" || self.repo_id.is_some(), || {
            "the data module Hub needs a repository: `--data ORGANISATION/NAME`".into()
        });
        found.extend(self.val_split_fraction.and_then(wrong_fraction));
        check(&mut found, self.ignore_index < 0, || {
            format!("`data.ignore_index` must be negative, as others are token ids, got {}", self.ignore_index)
        });
        found
    }
}
