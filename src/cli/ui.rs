//! The only code that writes to the terminal. Results go to stdout, everything else to stderr.
#![allow(clippy::print_stdout, clippy::print_stderr)]

use super::exit_code;
use super::signals::Stopped;
use crate::data::sft::without_controls;
use crate::error::Error;
use crate::train::report::{Event, Figures, Report};
use indicatif::{ProgressBar, ProgressStyle};
use std::io::{IsTerminal, Write};
use std::process::ExitCode;
use std::sync::atomic::{AtomicBool, Ordering};

/// The terminal.
pub struct Ui {
    terminal: bool,
    bar: Option<ProgressBar>,
    iters: usize,
}

impl Ui {
    /// The terminal of this process.
    pub fn new() -> Self {
        Self { terminal: std::io::stderr().is_terminal(), bar: None, iters: 0 }
    }

    /// A line about what goes on.
    pub fn note(&self, line: &str) {
        match &self.bar {
            // A closed stderr must not end the run.
            Some(bar) => bar.suspend(|| _ = writeln!(std::io::stderr(), "{line}")),
            None => _ = writeln!(std::io::stderr(), "{line}"),
        }
    }

    /// What to write before and behind text that should stand out.
    pub fn highlight(&self) -> (&'static str, &'static str) {
        let colour = self.terminal && std::env::var_os("NO_COLOR").is_none_or(|value| value.is_empty());
        if colour { ("\x1b[32m", "\x1b[0m") } else { ("«", "»") }
    }

    /// A part of a result.
    ///
    /// # Errors
    /// When stdout is gone.
    pub fn result(&self, text: &str) -> anyhow::Result<()> {
        let mut out = std::io::stdout();
        out.write_all(text.as_bytes())?;
        Ok(out.flush()?)
    }

    /// Starts a bar over `total` units on a terminal.
    pub fn begin(&mut self, what: &str, total: u64, bytes: bool) {
        if !self.terminal {
            return;
        }
        let template = if bytes {
            "{prefix} {bar:30} {bytes}/{total_bytes} {bytes_per_sec}, {eta} left"
        } else {
            // What matters first: the end is cut off in a narrow window.
            "{prefix} {bar:16} {pos}/{len}, {eta} left{msg}"
        };
        let style = ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar());
        self.bar = Some(ProgressBar::new(total).with_style(style).with_prefix(what.to_owned()));
    }

    /// Sets the bar's position.
    pub fn position(&self, at: u64) {
        if let Some(bar) = &self.bar {
            bar.set_position(at);
        }
    }

    /// Moves the bar on.
    pub fn advance(&self, by: u64) {
        if let Some(bar) = &self.bar {
            bar.inc(by);
        }
    }

    /// Takes the bar away.
    pub fn end(&mut self) {
        if let Some(bar) = self.bar.take() {
            bar.finish_and_clear();
        }
    }

    /// Prints an error with its causes and hint, and gives the exit code.
    pub fn fail(&mut self, error: &anyhow::Error) -> ExitCode {
        self.end();
        if let Some(Stopped(signal)) = error.downcast_ref() {
            return ExitCode::from(128 + signal);
        }
        if let Some(io) = error.downcast_ref::<std::io::Error>()
            && io.kind() == std::io::ErrorKind::BrokenPipe
        {
            return ExitCode::SUCCESS;
        }
        self.note(&format!("error: {}", message(error)));
        if let Some(hint) = error.chain().find_map(|e| e.downcast_ref::<Error>()).and_then(Error::hint) {
            self.note(&format!("hint: {}", printable(&hint)));
        }
        ExitCode::from(exit_code(error))
    }

    /// Prints what clap has to say that is no mistake: help, version, and the commands where none is given.
    pub fn clap(&mut self, error: &clap::Error) -> ExitCode {
        let _ = error.print();
        if error.use_stderr() { ExitCode::from(2) } else { ExitCode::SUCCESS }
    }
}

/// Has a panic, which is a mistake of this program, said as an error is. Where `RUST_BACKTRACE` is set, as Rust does.
pub fn report_panics() {
    if std::env::var_os("RUST_BACKTRACE").is_some_and(|value| value != "0") {
        return;
    }
    // Threads that fail because of another say nothing new.
    static SAID: AtomicBool = AtomicBool::new(false);
    std::panic::set_hook(Box::new(|info| {
        if !SAID.swap(true, Ordering::Relaxed) {
            let place = info.location().map(ToString::to_string).unwrap_or_default();
            let what = info.payload();
            let what = what.downcast_ref::<&str>().copied().or(what.downcast_ref::<String>().map(String::as_str));
            let _ = write!(std::io::stderr(), "{}", panic_text(what.unwrap_or_default(), &place));
        }
    }));
}

fn panic_text(what: &str, place: &str) -> String {
    format!(
        "error: a mistake in litgpt itself: {} ({place})\n\
         hint: report it with the command line and this text; what was saved is whole, and RUST_BACKTRACE=1 tells more\n",
        printable(what)
    )
}

/// An error and its causes on one line, each said once.
fn message(error: &anyhow::Error) -> String {
    let mut line = String::new();
    for cause in error.chain().map(ToString::to_string) {
        if !line.contains(&cause) {
            line = if line.is_empty() { cause } else { format!("{line}: {cause}") };
        }
    }
    printable(&line)
}

/// `text` on one line that ends somewhere: what a file says must neither move the cursor nor fill the screen.
fn printable(text: &str) -> String {
    const LONGEST: usize = 1200;
    let clean = |c: char| if c == '\n' || c == '\t' { ' ' } else { c };
    let mut line: String = text.chars().map(clean).filter(|c| !c.is_control()).take(LONGEST + 1).collect();
    if line.chars().count() > LONGEST {
        line = line.chars().take(LONGEST).chain("...".chars()).collect();
    }
    line
}

/// What the model answered to a sample, which a terminal must not obey.
fn example(text: &str) -> String {
    format!("example: {}", without_controls(text).trim())
}

impl Report for Ui {
    fn event(&mut self, event: &Event) -> anyhow::Result<()> {
        match event {
            Event::Start { plan, schedule } => {
                self.iters = plan.iters;
                if let Some(asked) = schedule.shortened_from {
                    let warmup = schedule.warmup;
                    self.note(&format!(
                        "warm-up of {asked} steps is long for {} steps: shortened to {warmup}",
                        schedule.steps
                    ));
                }
                self.begin("train", plan.iters as u64, false);
            }
            Event::Step(figures) => {
                let Figures { epoch, iter, step, loss, learning_rate, tokens, seconds, .. } = figures;
                self.position(*iter as u64);
                let rate = *tokens as f64 / seconds;
                if let Some(bar) = &self.bar {
                    bar.set_message(format!(" | epoch {epoch} step {step} loss {loss:.3} {rate:.0} tokens/s"));
                } else {
                    let iters = self.iters;
                    self.note(&format!(
                        "epoch {epoch} | iter {iter}/{iters} step {step} | loss {loss:.4} | lr {learning_rate:.2e} | {rate:.0} tokens/s"
                    ));
                }
            }
            Event::Validation { step, loss, comparable, mean_of_batches, seconds, .. } => {
                let of_best = if comparable == loss { String::new() } else { format!(", for `best` {comparable:.4}") };
                self.note(&format!(
                    "step {step} | val loss {loss:.4} (mean of batches {mean_of_batches:.4}{of_best}) | val ppl {:.2} | {seconds:.1} s",
                    loss.exp()
                ));
            }
            Event::Example { text, .. } => self.note(&example(text)),
            Event::Skipped { figures, problem } => {
                self.position(figures.iter as u64);
                self.note(&format!("warning: step {} is skipped, {problem}", figures.step));
            }
            Event::Saved { path, best } => {
                let best = if *best { ", the best so far" } else { "" };
                self.note(&format!("saved {}{best}", path.display()));
            }
            Event::EarlyStop { at } => self.note(&format!(
                "early stopping at step {}: {} evaluations without a lower validation loss than {:.4} at step {}",
                at.step,
                at.without_improvement,
                at.best.unwrap_or(f64::NAN),
                at.best_step
            )),
            Event::Finished(_) => self.end(),
        }
        Ok(())
    }
}

/// Memory that processes may still take, in bytes, where the system tells; within a control group, what that allows.
pub fn available_memory() -> Option<usize> {
    let read = |path: &str| std::fs::read_to_string(path).ok();
    let meminfo = read("/proc/meminfo")?;
    let line = meminfo.lines().find(|l| l.starts_with("MemAvailable:"))?;
    let available = line.split_whitespace().nth(1)?.parse::<usize>().ok()? * 1024;
    let number = |path: &str| read(path)?.trim().parse::<usize>().ok();
    let group = number("/sys/fs/cgroup/memory.max")
        .zip(number("/sys/fs/cgroup/memory.current"))
        .map(|(most, now)| most.saturating_sub(now));
    Some(group.map_or(available, |group| available.min(group)))
}

/// Most memory that this process ever held, in bytes, where the system tells.
pub fn peak_memory() -> Option<u64> {
    status("VmHWM:")
}

/// Memory that this process holds, in bytes, where the system tells.
pub fn memory() -> Option<u64> {
    status("VmRSS:")
}

/// A number of bytes that the system tells about this process.
fn status(name: &str) -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find(|l| l.starts_with(name))?;
    Some(line.split_whitespace().nth(1)?.parse::<u64>().ok()? * 1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_panic_is_two_lines() {
        let text = panic_text("left\nright", "src/x.rs:1:2");
        assert!(text.starts_with("error: a mistake in litgpt itself: left right (src/x.rs:1:2)\nhint: "), "{text}");
        assert_eq!(text.lines().count(), 2);
    }

    #[test]
    fn no_text_of_others_moves_the_cursor() {
        assert_eq!(example(" a\x1b[2Jb\r\u{9b}1mc\u{7}\n\td\0 \n"), "example: a[2Jb1mc\n\td");
        assert_eq!(printable("a\x1b[2Jb\nc\td\u{9b}"), "a[2Jb c d");
    }
}
