//! What the training loop calls outside: files, the terminal, answers to look at.

use crate::checkpoint::write::Staging;
use crate::checkpoint::{Checkpoint, adapter, state};
use crate::cli::folders::Folders;
use crate::cli::load::{Compute, MANIFEST, Manifest, PROMPT_STYLE};
use crate::cli::recipe;
use crate::cli::resume::{self, MadeOf};
use crate::cli::signals::Signals;
use crate::cli::ui::Ui;
use crate::data::Dataset;
use crate::data::prompt::PromptStyle;
use crate::data::sft::Encoder;
use crate::generate::{Draw, PROMPT_LOOKUP, Request, Session, text};
use crate::model::Gpt;
use crate::tokenizer::Tokenizer;
use crate::train::page::Page;
use crate::train::report::{Event, Metrics, Report};
use crate::train::settings::{FinetuneSettings, Precision};
use crate::train::tensorboard::TensorBoard;
use crate::train::{Outside, Snapshot};
use std::path::PathBuf;

/// What the loop calls outside.
pub(super) struct Run<'a> {
    pub(super) ui: &'a mut Ui,
    pub(super) compute: &'a Compute,
    pub(super) metrics: Option<Metrics>,
    pub(super) folders: Folders,
    pub(super) tensorboard: Option<TensorBoard>,
    pub(super) page: Page,
    pub(super) settings: &'a FinetuneSettings,
    pub(super) checkpoint: &'a Checkpoint,
    /// The checkpoint's folder and those of its files that every saved folder gets: a save must not depend on what
    /// becomes of the folder while the run goes on.
    pub(super) base: PathBuf,
    pub(super) companions: Vec<(&'static str, Vec<u8>)>,
    pub(super) tokenizer: &'a Tokenizer,
    pub(super) dataset: &'a Dataset,
    pub(super) encoder: Encoder<'a>,
    pub(super) base_hash: String,
    pub(super) made_of: MadeOf,
    pub(super) signals: Signals,
}

impl Report for Run<'_> {
    fn event(&mut self, event: &Event) -> anyhow::Result<()> {
        if let Some(metrics) = &mut self.metrics {
            metrics.memory = self.compute.held_memory();
            metrics.event(event)?;
        }
        if let Some(board) = &mut self.tensorboard {
            board.event(event)?;
        }
        self.page.event(event)?;
        self.ui.event(event)
    }
}

impl Outside for Run<'_> {
    fn save(&mut self, gpt: &Gpt, name: &str, snapshot: &Snapshot<'_>) -> anyhow::Result<()> {
        let dir = self.settings.out_dir.join(name);
        let manifest = Manifest {
            litgpt_version: env!("CARGO_PKG_VERSION").to_owned(),
            base_model: self.base.clone(),
            base_hash: self.base_hash.clone(),
            prompt_style: self.dataset.style.name().to_owned(),
            add_bos: self.tokenizer.adds_bos(),
            precision: Some(self.settings.precision.unwrap_or(Precision::F32True).to_string()),
            quantize: self.settings.quantize.clone(),
            step: snapshot.progress.step,
        };
        let staging = Staging::new(&dir)?;
        adapter::save(&staging, self.checkpoint.family, gpt, &self.base.to_string_lossy())?;
        staging.write(MANIFEST, serde_json::to_string_pretty(&manifest)?.as_bytes())?;
        staging.write(PROMPT_STYLE, prompt_style_yaml(&self.dataset.style).as_bytes())?;
        staging.write(recipe::HYPERPARAMETERS, recipe::to_yaml(self.settings)?.as_bytes())?;
        staging.write_all(&self.companions)?;
        resume::save(&staging, gpt, snapshot, self.metrics.as_ref().map_or(Ok(0), Metrics::bytes)?, &self.made_of)?;
        // What is read from a device that has failed is zero.
        gpt.check()?;
        state::seal(&staging)?;
        self.folders.before(name, &snapshot.progress, self.ui)?;
        staging.commit()?;
        let best = self.folders.saved(name, &snapshot.progress, self.ui)?;
        self.event(&Event::Saved { path: dir, best })
    }

    fn stop_asked(&self) -> bool {
        self.signals.asked().is_some()
    }

    fn answer(&mut self, gpt: &Gpt, index: usize) -> anyhow::Result<String> {
        let Some(record) = self.dataset.val.get(index) else { return Ok(String::new()) };
        let ids = self.encoder.prompt_ids(record)?;
        let room = gpt.prepared().saturating_sub(ids.len());
        let max_new_tokens = self.settings.eval.max_new_tokens.unwrap_or(0).min(room);
        let stop_ids = self.dataset.style.stop_ids(self.tokenizer);
        let request = Request {
            prompt: &ids,
            max_new_tokens,
            draw: Draw::GREEDY,
            stop_ids: &stop_ids,
            stop_texts: self.dataset.style.stop_texts(),
            prompt_lookup: PROMPT_LOOKUP,
        };
        let mut answer = String::new();
        if max_new_tokens > 0 {
            text(gpt, self.tokenizer, &mut Session::alone(gpt), &request, |piece| {
                answer.push_str(piece);
                Ok(())
            })?;
        }
        Ok(answer)
    }
}

/// LitGPT's file that names the style.
fn prompt_style_yaml(style: &PromptStyle) -> String {
    format!("class_path: litgpt.prompts.{}\n", style.class_name())
}
