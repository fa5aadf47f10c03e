//! `litgpt download`, and downloads that other commands start.

use super::args::DownloadArgs;
use super::ui::Ui;
use crate::checkpoint::hub::{Hub, Progress, Request, models};
use crate::data::{Choose, Fetch};
use crate::error::Result;
use std::cell::RefCell;
use std::path::{Path, PathBuf};

/// Runs the command.
pub fn run(args: &DownloadArgs, ui: &mut Ui) -> anyhow::Result<()> {
    args.notes().iter().for_each(|line| ui.note(line));
    let Some(repo) = args.repo_id()? else {
        let list: String = models().map(|(repo, family)| format!("{repo}  ({family})\n")).collect();
        ui.note("Any repository of one of these families works; for example:");
        return ui.result(&list);
    };
    let token = args.access_token.clone();
    let dir = repository(repo, args.revision.as_deref(), token, args.tokenizer_only, &args.checkpoint_dir, ui)?;
    ui.note(&format!("next: litgpt finetune lora --checkpoint_dir {} --data Alpaca", dir.display()));
    ui.result(&format!("{}\n", dir.display()))
}

/// Downloads a repository below `into` and returns its folder.
///
/// # Errors
/// Those of the Hub.
pub fn repository(
    repo: &str,
    revision: Option<&str>,
    token: Option<String>,
    tokenizer_only: bool,
    into: &Path,
    ui: &mut Ui,
) -> Result<PathBuf> {
    let request = Request { repo_id: repo, revision, into, tokenizer_only };
    let dir = Hub::from_env(token)?.download(&request, &mut Shown(ui));
    ui.end();
    dir
}

/// The text at a web address.
///
/// # Errors
/// Those of the Hub and of the address.
pub fn text(url: &str) -> Result<String> {
    Hub::from_env(None)?.read_text(url, &mut Silent)
}

/// A download shown on the terminal.
struct Shown<'a>(&'a mut Ui);

impl Progress for Shown<'_> {
    fn total(&mut self, files: usize, bytes: u64, have: u64) {
        self.0.note(&format!("{files} files, {:.1} MB, {:.1} MB of them here", bytes as f64 / 1e6, have as f64 / 1e6));
        self.0.begin("download", bytes, true);
        self.0.position(have);
    }

    fn file(&mut self, _: &str, _: u64, _: u64) {}

    fn bytes(&mut self, n: u64) {
        self.0.advance(n);
    }

    fn done(&mut self, name: &str) {
        self.0.note(&format!("  {name}"));
    }

    fn note(&mut self, line: &str) {
        self.0.note(line);
    }
}

/// Fetches the files of datasets.
pub struct Fetcher<'a> {
    hub: Hub,
    ui: RefCell<&'a mut Ui>,
}

impl<'a> Fetcher<'a> {
    /// With the Hub's settings.
    ///
    /// # Errors
    /// When the environment's are wrong.
    pub fn new(token: Option<String>, ui: &'a mut Ui) -> Result<Self> {
        Ok(Self { hub: Hub::from_env(token)?, ui: RefCell::new(ui) })
    }
}

impl Fetch for Fetcher<'_> {
    fn fetch(&self, url: &str, to: &Path) -> Result<()> {
        let mut ui = self.ui.borrow_mut();
        ui.note(&format!("downloading {url}"));
        let done = self.hub.fetch_url(url, to, &mut One(&mut ui));
        ui.end();
        done
    }

    fn fetch_dataset(&self, repo_id: &str, dir: &Path, choose: Choose<'_>) -> Result<()> {
        let mut ui = self.ui.borrow_mut();
        ui.note(&format!("downloading the dataset {repo_id} into {}", dir.display()));
        let done = self.hub.dataset(repo_id, dir, choose, &mut Shown(&mut ui));
        ui.end();
        done
    }
}

/// The download of a single file, whose name was told before.
struct One<'a>(&'a mut Ui);

impl Progress for One<'_> {
    fn file(&mut self, _: &str, size: u64, have: u64) {
        self.0.end();
        self.0.begin("download", size, true);
        self.0.position(have);
    }

    fn bytes(&mut self, n: u64) {
        self.0.advance(n);
    }

    fn done(&mut self, _: &str) {}

    fn note(&mut self, line: &str) {
        self.0.note(line);
    }
}

struct Silent;

impl Progress for Silent {
    fn file(&mut self, _: &str, _: u64, _: u64) {}
    fn bytes(&mut self, _: u64) {}
    fn done(&mut self, _: &str) {}
    fn note(&mut self, _: &str) {}
}
