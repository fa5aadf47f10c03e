//! The settings of a finetuning run, resolved: plain data, their defaults, and the rules that they must keep.
//!
//! The names are LitGPT's, with dotted keys (`train.max_steps`) on the command line and in YAML alike. Here live the
//! types and `FinetuneSettings::validate`; reading files and flags is `cli::recipe`. Where a default differs from
//! LitGPT's, the field says so.

mod data;
mod groups;
mod rules;
mod values;

pub use data::{DATA_MODULES, DataModule};
pub use groups::{EvalSettings, LoraSettings, OptimizerSettings, TrainSettings};
pub use values::{Accelerator, EvaluateExample, LrSchedule, Precision, QUANTIZERS, Switch, quantizer};

use crate::data::DataConfig;
use crate::error::{Error, Result, closest};
use rules::{check, nonzero};
use serde::{Deserialize, Serialize};
use std::path::PathBuf;
use values::{devices_field, quantize_field, resume_field};

/// Everything about one finetuning run. As serde data it is the tree of dotted keys (`optimizer.learning_rate`,
/// `data.json_path`) that `cli::recipe` merges; LitGPT's own YAML shape is made there.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct FinetuneSettings {
    /// Folder of the base model.
    pub checkpoint_dir: PathBuf,
    /// Folder for adapters and logs.
    pub out_dir: PathBuf,
    /// Number format; `None`: `32-true` on the CPU, `bf16-true` on CUDA (LitGPT: `bf16-mixed`).
    pub precision: Option<Precision>,
    /// How the frozen weights are quantized, one of [`QUANTIZERS`].
    #[serde(deserialize_with = "quantize_field")]
    pub quantize: Option<String>,
    /// Training samples that the codes of 4 bits are chosen by; `None`: the nearest codes. Not in LitGPT.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub calibration_samples: Option<usize>,
    /// Where to train. Belongs to the machine: not written.
    #[serde(skip_serializing)]
    pub accelerator: Accelerator,
    /// GPUs; only 1 is accepted.
    #[serde(deserialize_with = "devices_field")]
    pub devices: usize,
    /// Machines; only 1 is accepted.
    pub num_nodes: usize,
    /// The adapters.
    #[serde(flatten)]
    pub lora: LoraSettings,
    /// The data.
    pub data: DataConfig,
    /// The loop.
    pub train: TrainSettings,
    /// Evaluation.
    pub eval: EvalSettings,
    /// The optimizer.
    pub optimizer: OptimizerSettings,
    /// Where metrics go besides `metrics.csv`: `csv`, nowhere, or `tensorboard`.
    pub logger_name: String,
    /// Seed of the adapters' start values, dropout and sample text.
    pub seed: u64,
    /// Whether prompts start with the BOS token; `Auto`: as the tokenizer's files say. Not in LitGPT.
    pub add_bos: Switch,
    /// What to go on from: `auto` (the newest in `out_dir`, if any), `true` (the newest) or a folder. Not written.
    #[serde(skip_serializing, deserialize_with = "resume_field")]
    pub resume: Option<String>,
    /// Whether to resume although settings or data changed. Not written.
    #[serde(skip_serializing)]
    pub resume_force: bool,
    /// Whether to say what the run needs and stop. Not written.
    #[serde(skip_serializing)]
    pub dry_run: bool,
    /// Hugging Face token. Never written to a file.
    #[serde(skip_serializing)]
    pub access_token: Option<String>,
}

impl Default for FinetuneSettings {
    fn default() -> Self {
        Self {
            checkpoint_dir: PathBuf::new(),
            out_dir: PathBuf::from("out/finetune/lora"),
            precision: None,
            quantize: None,
            calibration_samples: None,
            accelerator: Accelerator::Auto,
            devices: 1,
            num_nodes: 1,
            lora: LoraSettings::default(),
            data: DataConfig::default(),
            train: TrainSettings::default(),
            eval: EvalSettings::default(),
            optimizer: OptimizerSettings::default(),
            logger_name: "csv".into(),
            seed: 1337,
            add_bos: Switch::Auto,
            resume: None,
            resume_force: false,
            dry_run: false,
            access_token: None,
        }
    }
}

/// Values of `logger_name`.
const LOGGERS: [&str; 3] = ["csv", "tensorboard", "none"];

impl FinetuneSettings {
    /// Checks every rule between and within the settings.
    ///
    /// # Errors
    /// One `Usage` with all broken rules.
    pub fn validate(&self) -> Result<()> {
        let mut problems = self.lora.problems();
        problems.extend(self.data.problems());
        problems.extend(self.train.problems());
        problems.extend(self.eval.problems());
        problems.extend(self.optimizer.problems());
        check(&mut problems, self.devices == 1, || {
            format!("`devices` must be 1, this program trains on one device, got {}", self.devices)
        });
        check(&mut problems, self.num_nodes == 1, || {
            format!("`num_nodes` must be 1, this program trains on one machine, got {}", self.num_nodes)
        });
        nonzero(&mut problems, "calibration_samples", self.calibration_samples);
        let few = self.quantize.as_deref().is_some_and(|name| !name.starts_with("int8"));
        check(&mut problems, few || self.calibration_samples.is_none(), || {
            "`calibration_samples` choose codes of 4 bits: it goes with --quantize nf4, nf4-dq, nf4-mixed, fp4 or fp4-dq"
                .to_owned()
        });
        check(&mut problems, LOGGERS.contains(&self.logger_name.as_str()), || {
            let tip = closest(&self.logger_name, LOGGERS.into_iter()).map(|near| format!(", did you mean `{near}`?"));
            let names = LOGGERS.join(", ");
            let wandb = "; `wandb sync OUT_DIR/logs/tensorboard` takes over what tensorboard gets";
            let tip = if self.logger_name == "wandb" { wandb.to_owned() } else { tip.unwrap_or_default() };
            format!("`logger_name` must be one of {names}, got `{}`{tip}", self.logger_name)
        });
        let hint = "`litgpt finetune_lora --help` explains every setting";
        match problems.len() {
            0 => Ok(()),
            1 => Err(Error::usage(problems.remove(0), hint)),
            _ => Err(Error::usage(format!("these settings cannot run: {}", problems.join("; ")), hint)),
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn defaults_are_valid() {
        FinetuneSettings::default().validate().unwrap();
    }

    #[test]
    fn every_problem_is_reported_at_once() {
        let mut settings = FinetuneSettings::default();
        settings.lora =
            LoraSettings { lora_r: 0, lora_dropout: 1.0, lora_query: false, lora_value: false, ..settings.lora };
        settings.train.global_batch_size = 6;
        settings.train.micro_batch_size = 4;
        settings.train.lr_warmup_fraction = Some(0.1);
        settings.train.tie_embeddings = Some(false);
        settings.optimizer.learning_rate = f64::NAN;
        settings.optimizer.beta2 = 1.0;
        settings.eval.interval = 0;
        settings.data.name = "JSON".into();
        settings.data.subsets = Some("x".into());
        settings.devices = 4;
        let Err(Error::Usage { message, .. }) = settings.validate() else { panic!("not refused") };
        let problems: Vec<&str> = message.strip_prefix("these settings cannot run: ").unwrap().split("; ").collect();
        let expected = [
            "lora_r",
            "lora_dropout",
            "nothing would be trained",
            "multiple of",
            "exclude each other",
            "tie_embeddings",
            "train.learning_rate",
            "optimizer.beta2",
            "eval.interval",
            "not a field of JSON but of FLAN",
            "--data.json_path",
            "`devices`",
        ];
        assert_eq!(problems.len(), expected.len(), "{problems:#?}");
        for part in expected {
            assert!(problems.iter().any(|problem| problem.contains(part)), "{part} in {problems:#?}");
        }
    }

    #[test]
    fn one_problem_is_a_usage_error() {
        let mut settings = FinetuneSettings::default();
        settings.train.micro_batch_size = 32;
        let error = settings.validate().unwrap_err();
        assert!(matches!(error, Error::Usage { .. }));
        let text = "`train.global_batch_size` (16) must be a multiple of `train.micro_batch_size` (32)";
        assert_eq!(error.to_string(), text);
    }

    #[test]
    fn a_run_needs_an_end() {
        let mut settings = FinetuneSettings::default();
        settings.train.epochs = None;
        assert!(settings.validate().unwrap_err().to_string().contains("nothing ends the run"));
        settings.train.max_time = Some(60.0);
        settings.validate().unwrap();
    }

    #[test]
    fn precisions_read_what_they_write() {
        for precision in Precision::ALL {
            assert_eq!(precision.name().parse(), Ok(precision));
        }
        assert_eq!("bf16".parse(), Ok(Precision::Bf16Mixed));
        assert!("fp8".parse::<Precision>().unwrap_err().contains("32-true, bf16-true"));
    }

    #[test]
    fn data_modules_go_by_many_names() {
        for name in ["litgpt.data.Alpaca2k", "Alpaca2k", "alpaca_2k", "litgpt.data.alpaca_2k.Alpaca2k"] {
            assert_eq!(DataModule::find(name).unwrap().name, "Alpaca2k");
        }
        assert!(DataModule::find("TextFiles").is_none());
    }

    #[test]
    fn the_token_is_never_written() {
        let settings = FinetuneSettings { access_token: Some("hf_secret".into()), ..Default::default() };
        assert!(!serde_json::to_string(&settings).unwrap().contains("hf_secret"));
    }
}
