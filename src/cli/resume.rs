//! `--resume`: which folder a run goes on from, whether it may, and the output folder that one run has for itself.

use super::ui::Ui;
use crate::checkpoint::write::Staging;
use crate::checkpoint::{adapter, pointer, state};
use crate::data::sft::Sample;
use crate::error::{Error, Result};
use crate::model::Gpt;
use crate::ops::Matrix;
use crate::ops::optimizer::Moments;
use crate::train::settings::FinetuneSettings;
use crate::train::{FINAL, Progress, Snapshot};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use std::fs::{self, File, TryLockError};
use std::io::Write;
use std::path::{Path, PathBuf};

/// File beside the tensors of a training state.
pub const STATE: &str = "training_state.json";
/// Lock file of an output folder, with the process id of the run that holds it.
const LOCK: &str = ".lock";
/// Settings that may change: they say where things are and what is reported, not what is computed.
const FREE: &[&str] = &[
    "out_dir",
    "logger_name",
    "checkpoint_dir",
    "eval",
    "train.save_interval",
    "train.save_total_limit",
    "train.max_skipped_steps",
    "train.log_interval",
    "train.max_time",
    "train.max_tokens",
    "data.num_workers",
    "data.json_path",
    "data.download_dir",
    "data.file_name",
];

/// What `training_state.json` holds.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct State {
    /// Where the run stands.
    pub progress: Progress,
    /// Length of `metrics.csv` then.
    pub metrics_bytes: u64,
    /// What the run was made of.
    pub made_of: MadeOf,
}

impl State {
    /// The state that `dir` holds.
    ///
    /// # Errors
    /// When there is none, or it cannot be read.
    pub fn read(dir: &Path) -> Result<Self> {
        let path = dir.join(STATE);
        let text = fs::read_to_string(&path).map_err(Error::io("read", &path))?;
        serde_json::from_str(&text).map_err(|e| Error::invalid(&path, e.to_string(), "resume from another folder"))
    }
}

/// Everything that decides a run's numbers.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct MadeOf {
    /// The resolved settings.
    pub settings: Value,
    /// Hash of all samples.
    pub data_hash: String,
    /// Hash of the base model.
    pub base_hash: String,
}

impl MadeOf {
    /// What a run of these settings, training and validation samples and this base is made of.
    ///
    /// # Errors
    /// Never for settings that can be written.
    pub fn of(settings: &FinetuneSettings, samples: [&[Sample]; 2], base_hash: &str) -> anyhow::Result<Self> {
        let mut hasher = blake3::Hasher::new();
        for samples in samples {
            hasher.update(&(samples.len() as u64).to_le_bytes());
            for sample in samples {
                hash_ids(&mut hasher, sample);
                sample.labels.iter().for_each(|label| _ = hasher.update(&label.to_le_bytes()));
            }
        }
        // Through text, as the recorded ones went: floats then compare equal.
        let settings = serde_json::from_str(&serde_json::to_string(settings)?)?;
        Ok(Self { settings, data_hash: hasher.finalize().to_hex().to_string(), base_hash: base_hash.to_owned() })
    }

    /// What differs from `recorded` and would change the numbers.
    fn changes(&self, recorded: &Self) -> Vec<String> {
        let mut changes = Vec::new();
        differences("", &recorded.settings, &self.settings, &mut changes);
        if self.data_hash != recorded.data_hash {
            changes.push("the training or validation samples changed".to_owned());
        }
        if self.base_hash != recorded.base_hash {
            changes.push("the base model's weights or config.json changed".to_owned());
        }
        changes
    }
}

/// Hashes a sample's tokens so that samples end to end are told apart.
pub fn hash_ids(hasher: &mut blake3::Hasher, sample: &Sample) {
    hasher.update(&(sample.input_ids.len() as u64).to_le_bytes());
    sample.input_ids.iter().for_each(|id| _ = hasher.update(&id.to_le_bytes()));
}

fn differences(name: &str, old: &Value, new: &Value, found: &mut Vec<String>) {
    if FREE.contains(&name) || old == new {
        return;
    }
    if let (Value::Object(old), Value::Object(new)) = (old, new) {
        let keys = old.keys().chain(new.keys().filter(|key| !old.contains_key(*key)));
        for key in keys {
            let inner = if name.is_empty() { key.clone() } else { format!("{name}.{key}") };
            let value = |map: &serde_json::Map<String, Value>| map.get(key).cloned().unwrap_or(Value::Null);
            differences(&inner, &value(old), &value(new), found);
        }
    } else {
        found.push(format!("`{name}` was {old}, is {new}"));
    }
}

/// A folder to go on from.
#[derive(Debug)]
pub struct From {
    /// The folder.
    pub dir: PathBuf,
    /// Its state.
    pub state: State,
}

impl From {
    fn read(dir: &Path) -> Result<Self> {
        let path = dir.join(STATE);
        if !path.is_file() {
            let hint = "name a step-... folder of a run, or `auto` for the newest in --out_dir".to_owned();
            return Err(Error::Missing { what: "training state to resume from".to_owned(), path, hint });
        }
        state::verify(dir, &[STATE, state::TENSORS, adapter::TENSORS])?;
        Ok(Self { dir: dir.to_owned(), state: State::read(dir)? })
    }

    /// The folder that `settings` ask to resume from; `None`: begin anew.
    ///
    /// # Errors
    /// When the named folder cannot be resumed from, or none is found for `--resume true`.
    pub fn find(settings: &FinetuneSettings, ui: &Ui) -> Result<Option<Self>> {
        let Some(asked) = settings.resume.as_deref() else { return Ok(None) };
        if !matches!(asked, "auto" | "true") {
            return Self::read(&pointer::resolve(Path::new(asked))).map(Some);
        }
        let mut found: Vec<Self> = Vec::new();
        let entries = fs::read_dir(&settings.out_dir).into_iter().flatten().flatten().map(|entry| entry.path());
        for dir in entries.filter(|dir| is_saved(dir) && dir.join(STATE).is_file()) {
            match Self::read(&dir) {
                Ok(from) => found.push(from),
                Err(error) => ui.note(&format!("not resuming from `{}`: {error}", dir.display())),
            }
        }
        // `final` sorts before `step-...`: of the two at one step it wins.
        found.sort_by(|a, b| b.state.progress.step.cmp(&a.state.progress.step).then_with(|| a.dir.cmp(&b.dir)));
        if found.is_empty() && asked == "true" {
            let message = format!("nothing to resume from in `{}`", settings.out_dir.display());
            return Err(Error::refused(message, "--resume auto begins anew then; --resume PATH names a folder"));
        }
        Ok(found.into_iter().next())
    }

    /// Whether the run that saved it had come to its end.
    pub fn finished(&self) -> bool {
        self.dir.canonicalize().is_ok_and(|dir| dir.ends_with(FINAL))
    }

    /// Name of the folder, if it lies in `out_dir`.
    pub fn name_in(&self, out_dir: &Path) -> Option<String> {
        let dir = self.dir.canonicalize().ok()?;
        let inside = dir.parent()? == out_dir.canonicalize().ok()?;
        inside.then(|| dir.file_name().unwrap_or_default().to_string_lossy().into_owned())
    }

    /// Refuses a run that is not the recorded one, unless `force`.
    ///
    /// # Errors
    /// With all changes.
    pub fn check(&self, now: &MadeOf, force: bool, ui: &Ui) -> Result<()> {
        let problems = now.changes(&self.state.made_of);
        if problems.is_empty() {
            return Ok(());
        }
        if force {
            ui.note(&format!("resuming although it will not be exact: {}", problems.join("; ")));
            return Ok(());
        }
        let what = format!("resuming from `{}` would not be exact", self.dir.display());
        let hint = "give the run's own settings and data, or --resume_force true to go on all the same".to_owned();
        Err(Error::Mismatch { what, problems, hint })
    }

    /// Puts the parameters into `gpt` and gives the optimizer's moments.
    ///
    /// # Errors
    /// When the state does not fit the model.
    pub fn restore(&self, gpt: &mut Gpt) -> Result<Moments> {
        let len = gpt.parameters.cols();
        let [parameters, m, v] = state::load(&self.dir, len)?.map(|values| Matrix::from_slice(1, len, &values));
        gpt.set_parameters(&parameters);
        let [m, v] = [m, v].map(|moment| moment.to(gpt.parameters.place()));
        Ok(Moments { m, v, step: self.state.progress.updates() })
    }
}

fn is_saved(dir: &Path) -> bool {
    dir.file_name().is_some_and(|name| name == FINAL || name.to_string_lossy().starts_with("step-"))
}

/// Writes the training state of `snapshot` into `staging`.
///
/// # Errors
/// When the disk is full.
pub fn save(
    staging: &Staging,
    gpt: &Gpt,
    snapshot: &Snapshot<'_>,
    metrics_bytes: u64,
    made_of: &MadeOf,
) -> anyhow::Result<()> {
    let [parameters, m, v] = [&gpt.parameters, &snapshot.moments.m, &snapshot.moments.v].map(Matrix::to_host);
    state::save(staging, [&parameters, &m, &v])?;
    let state = State { progress: snapshot.progress, metrics_bytes, made_of: made_of.clone() };
    Ok(staging.write(STATE, serde_json::to_string_pretty(&state)?.as_bytes())?)
}

/// Takes `out_dir` for this process until the file is dropped, and clears what a killed run left there. The system lets
/// the lock go with its process, so a lock file without one is no obstacle.
///
/// # Errors
/// When another run has it, or it cannot be written to.
pub fn lock(out_dir: &Path) -> Result<File> {
    fs::create_dir_all(out_dir).map_err(Error::io("create", out_dir))?;
    let path = out_dir.join(LOCK);
    let mut options = File::options();
    let mut file =
        options.create(true).truncate(false).read(true).write(true).open(&path).map_err(Error::io("create", &path))?;
    match file.try_lock() {
        Ok(()) => {}
        Err(TryLockError::WouldBlock) => {
            let pid = fs::read_to_string(&path).unwrap_or_default();
            let message = format!("another run (process {}) writes to `{}`", pid.trim(), out_dir.display());
            return Err(Error::refused(message, "wait for it, or choose another --out_dir"));
        }
        // A file system without locks: better no lock than no run.
        Err(TryLockError::Error(error)) if error.kind() == std::io::ErrorKind::Unsupported => return Ok(file),
        Err(TryLockError::Error(error)) => return Err(Error::io("lock", &path)(error)),
    }
    file.set_len(0).and_then(|()| writeln!(file, "{}", std::process::id())).map_err(Error::io("write", &path))?;
    crate::checkpoint::write::clear(out_dir)?;
    Ok(file)
}
