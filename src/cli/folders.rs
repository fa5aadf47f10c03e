//! The folders that a run saves: which of them `latest` and `best` point to, and which go when newer ones came.
//!
//! Both pointers follow from what is saved, so that a killed run leaves nothing that the next save does not mend. Which
//! folder is the best is decided by the validation loss recorded in it: one of an earlier run with the same name has
//! another. Only folders that hold nothing but what a run wrote are removed or replaced.

use super::resume::{From, State};
use super::ui::Ui;
use crate::checkpoint::{pointer, state, write};
use crate::error::{Error, Result};
use crate::train::settings::TrainSettings;
use crate::train::{FINAL, Progress, step_name};
use std::fs;
use std::path::{Path, PathBuf};

/// Pointer to the folder that was saved last.
const LATEST: &str = "latest";
/// Pointer to the folder with the lowest validation loss.
pub const BEST: &str = "best";

/// Refuses an output folder in which something else has the name of a pointer.
///
/// # Errors
/// With its path.
pub fn check(out_dir: &Path) -> Result<()> {
    let taken = |path: &PathBuf| fs::symlink_metadata(path).is_ok() && pointer::target(path).is_none();
    let Some(path) = [LATEST, BEST].map(|name| out_dir.join(name)).into_iter().find(taken) else { return Ok(()) };
    let message = format!("`{}` is in the way of the run's pointer of that name", path.display());
    Err(Error::refused(message, "move it away, or choose another --out_dir"))
}

/// The folders of a run.
pub struct Folders {
    out_dir: PathBuf,
    save_interval: Option<usize>,
    limit: Option<usize>,
    /// Where the run stood when it saved last.
    last: Progress,
}

impl Folders {
    /// The folders in `out_dir` of a run that goes on from `from`, whose pointers are mended.
    ///
    /// # Errors
    /// When a pointer cannot be written.
    pub fn open(out_dir: &Path, settings: &TrainSettings, from: Option<&From>) -> Result<Self> {
        let folders = Self {
            out_dir: out_dir.to_owned(),
            save_interval: settings.save_interval,
            limit: settings.save_total_limit,
            last: from.map_or_else(Progress::default, |from| from.state.progress),
        };
        if let Some(name) = from.and_then(|from| from.name_in(out_dir)) {
            folders.point(&name, &folders.last)?;
        }
        Ok(folders)
    }

    /// Makes room for the folder `name`. Where that is [`FINAL`] and the best so far, it becomes the step that it is of;
    /// where it is of an earlier run and holds more than that wrote, such as a merged model, it is kept aside.
    ///
    /// # Errors
    /// When it cannot be renamed.
    pub fn before(&self, name: &str, at: &Progress, ui: &Ui) -> Result<()> {
        if name != FINAL || at.best_step == at.step || self.best_of(at).as_deref() != Some(FINAL) {
            return self.keep(name, ui);
        }
        let step = step_name(at.best_step);
        let (from, to) = (self.out_dir.join(FINAL), self.out_dir.join(&step));
        self.keep(&step, ui)?;
        if to.is_dir() {
            write::remove(&to)?;
        }
        fs::rename(&from, &to).map_err(Error::io("rename", &from))?;
        let pointers = [LATEST, BEST].map(|name| self.out_dir.join(name));
        let dangling = pointers.iter().filter(|path| pointer::target(path).as_deref() == Some(FINAL));
        dangling.into_iter().try_for_each(|path| pointer::point(path, &step))
    }

    fn keep(&self, name: &str, ui: &Ui) -> Result<()> {
        let dir = self.out_dir.join(name);
        if !dir.is_dir() || state::holds_only_what_was_sealed(&dir) {
            return Ok(());
        }
        let aside = (1..).map(|n| self.out_dir.join(format!("kept-{name}-{n}"))).find(|path| !path.exists());
        let aside = aside.unwrap_or_default();
        fs::rename(&dir, &aside).map_err(Error::io("rename", &dir))?;
        ui.note(&format!("`{}` held more than a run saves, and is now `{}`", dir.display(), aside.display()));
        Ok(())
    }

    /// Moves the pointers after `name` was saved, and removes what is not to be kept. Whether `name` is the best.
    ///
    /// # Errors
    /// When a pointer cannot be written.
    pub fn saved(&mut self, name: &str, at: &Progress, ui: &Ui) -> Result<bool> {
        self.point(name, at)?;
        let best = pointer::target(&self.out_dir.join(BEST));
        let kept = |folder: &str| folder == name || best.as_deref() == Some(folder);
        let before = std::mem::replace(&mut self.last, *at);
        let superseded = step_name(before.best_step);
        let by_interval = self.save_interval.is_some_and(|n| before.best_step.is_multiple_of(n));
        if !by_interval && !kept(&superseded) && self.is_best(&superseded, &before) {
            self.remove(&superseded, ui);
        }
        // While steps are skipped, the parameters of the older folders may be the better ones.
        if let Some(limit) = self.limit.filter(|_| at.skipped_in_a_row == 0) {
            let steps = self.steps_until(at.step);
            let mut excess = steps.len().saturating_sub(limit);
            for folder in steps.iter().filter(|folder| !kept(folder)) {
                excess -= usize::from(excess > 0 && self.remove(folder, ui));
            }
        }
        Ok(best.as_deref() == Some(name))
    }

    fn point(&self, name: &str, at: &Progress) -> Result<()> {
        pointer::point(&self.out_dir.join(LATEST), name)?;
        let best = self.out_dir.join(BEST);
        self.best_of(at).map_or_else(|| pointer::remove(&best), |name| pointer::point(&best, &name))
    }

    /// Name of the folder with the best validation loss of a run that stands at `at`.
    fn best_of(&self, at: &Progress) -> Option<String> {
        [step_name(at.best_step), FINAL.to_owned()].into_iter().find(|name| self.is_best(name, at))
    }

    fn is_best(&self, name: &str, at: &Progress) -> bool {
        let saved = State::read(&self.out_dir.join(name)).map(|state| state.progress);
        at.best.is_some() && saved.is_ok_and(|saved| saved.step == at.best_step && saved.best == at.best)
    }

    /// Names of the step folders up to `step`, in their order. Later ones are of another run, or will come again.
    fn steps_until(&self, step: usize) -> Vec<String> {
        let entries = fs::read_dir(&self.out_dir).into_iter().flatten().flatten();
        let number = |name: String| name.strip_prefix("step-")?.parse::<usize>().ok();
        let mut steps: Vec<usize> = entries.filter_map(|entry| number(entry.file_name().into_string().ok()?)).collect();
        steps.retain(|found| *found <= step);
        steps.sort_unstable();
        steps.into_iter().map(step_name).collect()
    }

    /// Removes a folder if it holds nothing but what was saved. That it stays is no reason to end the run.
    fn remove(&self, name: &str, ui: &Ui) -> bool {
        let dir = self.out_dir.join(name);
        let removed = state::holds_only_what_was_sealed(&dir).then(|| write::remove(&dir));
        if let Some(Err(error)) = &removed {
            ui.note(&format!("warning: {error}"));
        }
        matches!(removed, Some(Ok(())))
    }
}
