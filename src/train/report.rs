//! What a run tells the outside: events, and the metrics file made of them.

use super::schedule::Schedule;
use super::{Plan, Progress};
use crate::data::sft::Sample;
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
    Step(Figures),
    /// An optimizer step was left out.
    Skipped {
        /// Its figures, of which loss or norm are no finite numbers.
        figures: Figures,
        /// What they are, and with which rows.
        problem: String,
    },
    /// The validation samples were scored.
    Validation {
        /// Steps so far.
        step: usize,
        /// Micro batches so far.
        iter: usize,
        /// Loss, nats a target token.
        loss: f64,
        /// Loss over the samples of every validation, where this one had more.
        comparable: f64,
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
        /// Whether no validation loss was lower than theirs.
        best: bool,
    },
    /// Validation stopped getting better, and so the run stops.
    EarlyStop {
        /// Where.
        at: Progress,
    },
    /// The run ended.
    Finished(Summary),
}

/// What an accumulation window came to.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Figures {
    /// Epoch, from 1.
    pub epoch: usize,
    /// Micro batches so far.
    pub iter: usize,
    /// Steps so far.
    pub step: usize,
    /// Loss, nats a target token.
    pub loss: f64,
    /// Norm of the gradient before clipping.
    pub grad_norm: f64,
    /// Learning rate of the step.
    pub learning_rate: f64,
    /// Tokens.
    pub tokens: u64,
    /// Tokens so far.
    pub total_tokens: u64,
    /// Duration.
    pub seconds: f64,
    /// Skipped steps so far.
    pub skipped: usize,
}

impl Figures {
    /// Which of loss and norm is no finite number, and what it is.
    #[must_use]
    pub fn problem(&self) -> String {
        if self.loss.is_finite() {
            format!("the gradient norm is {}", self.grad_norm)
        } else {
            format!("the loss is {}", self.loss)
        }
    }
}

/// The rows of a data file that the samples at `indices` were read from, as words.
#[must_use]
pub fn row_numbers(samples: &[Sample], indices: &[usize]) -> String {
    const MOST: usize = 16;
    let shown: Vec<String> = indices.iter().take(MOST).map(|i| samples[*i].row.row.to_string()).collect();
    let more = indices.len().saturating_sub(MOST);
    let more = if more > 0 { format!(" and {more} more") } else { String::new() };
    format!("row{} {}{more}", if indices.len() == 1 { "" } else { "s" }, shown.join(", "))
}

/// What a run came to.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Summary {
    /// Where it stands.
    pub at: Progress,
    /// Last validation loss.
    pub val_loss: Option<f64>,
    /// Whether it was stopped before its end.
    pub stopped: bool,
    /// Share of this process's tokens that were not computed, as a prefix of several samples is only once.
    pub shared: f64,
}

/// Whoever wants to know.
pub trait Report {
    /// Takes note of an event.
    ///
    /// # Errors
    /// When it cannot be written down.
    fn event(&mut self, event: &Event) -> anyhow::Result<()>;
}

/// `metrics.csv`: a line for each logged step, each skipped one and each validation, flushed as it is written.
#[derive(Debug)]
pub struct Metrics {
    path: PathBuf,
    file: File,
    /// Bytes that are held now, where the system tells.
    pub memory: Option<u64>,
}

const COLUMNS: &str = "epoch,iter,step,loss,val_loss,val_ppl,learning_rate,grad_norm,tokens,total_tokens,iter_time,tokens_per_s,skipped,memory";

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
        Ok(Self { path, file, memory: None })
    }

    /// Goes on with the file in `dir` where it had `bytes` bytes; what came later is cut off.
    ///
    /// # Errors
    /// When it cannot be read or written.
    pub fn resume(dir: &Path, bytes: u64) -> Result<Self, Error> {
        let path = dir.join("metrics.csv");
        // A run with no logger left it without a header.
        if !path.is_file() || bytes == 0 {
            return Self::create(dir);
        }
        let file = File::options().append(true).open(&path).map_err(Error::io("write", &path))?;
        let length = file.metadata().map_err(Error::io("read", &path))?.len();
        file.set_len(length.min(bytes)).map_err(Error::io("write", &path))?;
        Ok(Self { path, file, memory: None })
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
            Event::Step(figures) | Event::Skipped { figures, .. } => {
                let Figures { epoch, iter, step, loss, grad_norm, learning_rate, .. } = figures;
                let Figures { tokens, total_tokens, seconds, skipped, .. } = figures;
                let rate = *tokens as f64 / seconds;
                let memory = self.memory.map_or_else(String::new, |bytes| bytes.to_string());
                format!(
                    "{epoch},{iter},{step},{loss},,,{learning_rate},{grad_norm},{tokens},{total_tokens},{seconds},{rate},{skipped},{memory}"
                )
            }
            Event::Validation { step, iter, loss, seconds, .. } => {
                format!(",{iter},{step},,{loss},{},,,,,{seconds},,,", loss.exp())
            }
            _ => return Ok(()),
        };
        Ok(writeln!(self.file, "{line}").map_err(Error::io("write", &self.path))?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn figures() -> Figures {
        Figures {
            epoch: 1,
            iter: 4,
            step: 1,
            loss: 2.5,
            grad_norm: 0.5,
            learning_rate: 1e-4,
            tokens: 100,
            total_tokens: 100,
            seconds: 0.5,
            skipped: 0,
        }
    }

    #[test]
    fn every_line_has_every_column() {
        let dir = tempfile::tempdir().unwrap();
        let mut metrics = Metrics::create(dir.path()).unwrap();
        metrics.event(&Event::Step(figures())).unwrap();
        metrics
            .event(&Event::Validation {
                step: 1,
                iter: 4,
                loss: 2.0,
                comparable: 2.0,
                mean_of_batches: 2.1,
                seconds: 0.1,
            })
            .unwrap();
        metrics.memory = Some(7);
        let broken = Figures { loss: f64::NAN, grad_norm: f64::INFINITY, skipped: 1, ..figures() };
        metrics.event(&Event::Skipped { figures: broken, problem: String::new() }).unwrap();
        let text = std::fs::read_to_string(dir.path().join("metrics.csv")).unwrap();
        let counts: Vec<usize> = text.lines().map(|l| l.split(',').count()).collect();
        assert_eq!(counts, [14, 14, 14, 14]);
        assert!(text.lines().nth(1).unwrap().ends_with(",200,0,"));
        assert!(text.lines().nth(3).unwrap().contains(",NaN,,,0.0001,inf,") && text.ends_with(",1,7\n"), "{text}");
    }

    #[test]
    fn the_problem_is_the_number_that_is_none() {
        let figures = figures();
        assert_eq!(Figures { loss: f64::NAN, ..figures }.problem(), "the loss is NaN");
        assert_eq!(Figures { grad_norm: f64::INFINITY, ..figures }.problem(), "the gradient norm is inf");
    }

    #[test]
    fn rows_are_named_as_the_file_counts_them() {
        let row = |row| crate::data::Origin { file: 0, row };
        let sample = |r| Sample { input_ids: Vec::new(), labels: Vec::new(), prompt_len: 0, raw_len: 0, row: row(r) };
        let samples: Vec<Sample> = (1..=30).map(|n| sample(10 * n)).collect();
        assert_eq!(row_numbers(&samples, &[1]), "row 20");
        assert_eq!(row_numbers(&samples, &[2, 0]), "rows 30, 10");
        assert!(row_numbers(&samples, &(0..20).collect::<Vec<_>>()).ends_with(", 160 and 4 more"));
    }
}
