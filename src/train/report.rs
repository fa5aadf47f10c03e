//! What a run tells the outside: events, and the metrics file made of them.

use super::Plan;
use super::schedule::Schedule;
use crate::error::Error;
use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};

/// Something that happened in a run.
#[derive(Debug, Clone, PartialEq)]
pub enum Event {
    /// The run begins.
    Start {
        /// Its length.
        plan: Plan,
        /// Its learning rates.
        schedule: Schedule,
    },
    /// An optimizer step was taken.
    Step {
        /// Epoch, from 1.
        epoch: usize,
        /// Micro batches so far.
        iter: usize,
        /// Steps so far.
        step: usize,
        /// Loss of the window, nats a target token.
        loss: f64,
        /// Norm of the gradient before clipping.
        grad_norm: f64,
        /// Learning rate of the step.
        learning_rate: f64,
        /// Tokens of the window.
        tokens: u64,
        /// Tokens so far.
        total_tokens: u64,
        /// Duration of the window.
        seconds: f64,
    },
    /// The validation samples were scored.
    Validation {
        /// Steps so far.
        step: usize,
        /// Micro batches so far.
        iter: usize,
        /// Loss, nats a target token.
        loss: f64,
        /// Mean of the micro batches' mean losses, which is LitGPT's validation loss.
        mean_of_batches: f64,
        /// Duration.
        seconds: f64,
    },
    /// The model answered a validation sample.
    Example {
        /// Steps so far.
        step: usize,
        /// Its answer.
        text: String,
    },
    /// Adapters were saved.
    Saved {
        /// The folder.
        path: PathBuf,
    },
    /// The run ended.
    Finished(Summary),
}

/// What a run came to.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Summary {
    /// Optimizer steps.
    pub steps: usize,
    /// Micro batches.
    pub iters: usize,
    /// Tokens trained on.
    pub tokens: u64,
    /// Duration of the training, without validation and saving.
    pub seconds: f64,
    /// Last validation loss.
    pub val_loss: Option<f64>,
    /// Best validation loss.
    pub best: Option<f64>,
    /// Whether it was stopped before its end.
    pub stopped: bool,
}

/// Whoever wants to know.
pub trait Report {
    /// Takes note of an event.
    ///
    /// # Errors
    /// When it cannot be written down.
    fn event(&mut self, event: &Event) -> anyhow::Result<()>;
}

/// `metrics.csv`: a line for each logged step and each validation, flushed as it is written.
#[derive(Debug)]
pub struct Metrics {
    path: PathBuf,
    file: File,
}

const COLUMNS: &str =
    "epoch,iter,step,loss,val_loss,val_ppl,learning_rate,grad_norm,tokens,total_tokens,iter_time,tokens_per_s";

impl Metrics {
    /// Starts the file in `dir`, which is made if need be.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn create(dir: &Path) -> Result<Self, Error> {
        std::fs::create_dir_all(dir).map_err(Error::io("create", dir))?;
        let path = dir.join("metrics.csv");
        let mut file = File::create(&path).map_err(Error::io("create", &path))?;
        writeln!(file, "{COLUMNS}").map_err(Error::io("write", &path))?;
        Ok(Self { path, file })
    }

    /// Goes on with the file in `dir` where it had `bytes` bytes; what came later is cut off.
    ///
    /// # Errors
    /// When it cannot be read or written.
    pub fn resume(dir: &Path, bytes: u64) -> Result<Self, Error> {
        let path = dir.join("metrics.csv");
        if !path.is_file() {
            return Self::create(dir);
        }
        let file = File::options().append(true).open(&path).map_err(Error::io("write", &path))?;
        let length = file.metadata().map_err(Error::io("read", &path))?.len();
        file.set_len(length.min(bytes)).map_err(Error::io("write", &path))?;
        Ok(Self { path, file })
    }

    /// Length of the file.
    ///
    /// # Errors
    /// When the system does not tell.
    pub fn bytes(&self) -> Result<u64, Error> {
        self.file.metadata().map(|data| data.len()).map_err(Error::io("read", &self.path))
    }
}

impl Report for Metrics {
    fn event(&mut self, event: &Event) -> anyhow::Result<()> {
        let line = match event {
            Event::Step { epoch, iter, step, loss, grad_norm, learning_rate, tokens, total_tokens, seconds } => {
                format!(
                    "{epoch},{iter},{step},{loss},,,{learning_rate},{grad_norm},{tokens},{total_tokens},{seconds},{}",
                    *tokens as f64 / seconds
                )
            }
            Event::Validation { step, iter, loss, seconds, .. } => {
                format!(",{iter},{step},,{loss},{},,,,,{seconds},", loss.exp())
            }
            _ => return Ok(()),
        };
        Ok(writeln!(self.file, "{line}").map_err(Error::io("write", &self.path))?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_line_has_every_column() {
        let dir = tempfile::tempdir().unwrap();
        let mut metrics = Metrics::create(dir.path()).unwrap();
        let step = Event::Step {
            epoch: 1,
            iter: 4,
            step: 1,
            loss: 2.5,
            grad_norm: 0.5,
            learning_rate: 1e-4,
            tokens: 100,
            total_tokens: 100,
            seconds: 0.5,
        };
        metrics.event(&step).unwrap();
        metrics.event(&Event::Validation { step: 1, iter: 4, loss: 2.0, mean_of_batches: 2.1, seconds: 0.1 }).unwrap();
        let text = std::fs::read_to_string(dir.path().join("metrics.csv")).unwrap();
        let counts: Vec<usize> = text.lines().map(|l| l.split(',').count()).collect();
        assert_eq!(counts, [12, 12, 12]);
        assert!(text.lines().nth(1).unwrap().ends_with(",200"));
    }
}
