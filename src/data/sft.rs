//! Supervised finetuning samples: a record's ids and labels, what a whole dataset of them amounts to, and in which
//! order they come in batches.
//!
//! Prompt and answer are tokenized apart and joined, the answer ends with EOS, and the whole is cut to the longest
//! length allowed (the EOS may be cut off). Samples, order and padding are LitGPT's, but for a BOS or EOS written out at
//! the edge of a prompt: LitGPT may drop it, we keep it. Batches go to the model unpadded.
//!
//! A conversation is one sample: in a fixed style its turns are tokenized apart and joined in the same way, with a chat
//! template the whole text at once, as transformers does. What the assistant says, its end mark included, is the answer.

use std::collections::BTreeSet;
use std::sync::atomic::{AtomicUsize, Ordering};

use rayon::prelude::*;

use super::chat::{ChatTemplate, Dialogue};
use super::prompt::PromptStyle;
use super::torch_rng::EpochOrders;
use super::{Content, Origin, Record};
use crate::error::{Error, Result};
use crate::tokenizer::Tokenizer;

/// One record as the model is trained on it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Sample {
    /// Prompt and answer.
    pub input_ids: Vec<u32>,
    /// `input_ids`, with the ignored index where a token does not count in the loss. Not shifted: the label at t is
    /// predicted at t - 1.
    pub labels: Vec<i32>,
    /// How many tokens of `input_ids` come before the first answer.
    pub prompt_len: usize,
    /// Length before cutting.
    pub raw_len: usize,
    /// Where the record was read.
    pub row: Origin,
}

impl Sample {
    /// Number of tokens whose prediction counts in the loss. The first token is predicted by nothing.
    #[must_use]
    pub fn target_tokens(&self) -> usize {
        let counts = |(&id, &label): (&u32, &i32)| i64::from(label) == i64::from(id);
        self.input_ids.iter().zip(&self.labels).skip(1).filter(|&pair| counts(pair)).count()
    }
}

/// Makes samples of records.
#[derive(Debug, Clone, Copy)]
pub struct Encoder<'a> {
    /// Tokenizer of the checkpoint, with its BOS policy.
    pub tokenizer: &'a Tokenizer,
    /// How a record becomes a prompt.
    pub style: &'a PromptStyle,
    /// Whether only the answers count in the loss; `None`: in conversations only.
    pub mask_prompt: Option<bool>,
    /// Label of tokens that do not count.
    pub ignore_index: i32,
    /// Longest sample; `None` or 0: any length.
    pub max_seq_length: Option<usize>,
}

impl Encoder<'_> {
    /// Ids and labels of one record.
    ///
    /// A BOS that begins the answer's own text is dropped, an EOS that ends it is not doubled. A sample without a
    /// target (the prompt fills it) is returned all the same; [`Sample::target_tokens`] is 0.
    ///
    /// # Errors
    /// `Unsupported` if the tokenizer has no EOS token, or the style cannot write the record; else as
    /// `Tokenizer::encode_prompt`.
    pub fn encode(&self, record: &Record) -> Result<Sample> {
        let mask = self.mask_prompt.unwrap_or(matches!(record.content, Content::Conversation { .. }));
        let (mut input_ids, mut answers) = self.ids_and_answers(record, mask)?;
        let raw_len = input_ids.len();
        if let Some(longest) = self.max_seq_length.filter(|&longest| longest > 0) {
            input_ids.truncate(longest);
            answers.truncate(longest);
        }
        let prompt_len = answers.iter().take_while(|answer| !**answer).count();
        let label = |(&id, &answer): (&u32, &bool)| if mask && !answer { self.ignore_index } else { id as i32 };
        let labels = input_ids.iter().zip(&answers).map(label).collect();
        Ok(Sample { input_ids, labels, prompt_len, raw_len, row: record.row })
    }

    /// Ids of a record, and which of them the assistant says.
    fn ids_and_answers(&self, record: &Record, mask: bool) -> Result<(Vec<u32>, Vec<bool>)> {
        let (style, tokenizer) = (self.style, self.tokenizer);
        let pairs = match (&record.content, style.template()) {
            (Content::Text(text), _) => {
                let mut ids = tokenizer.encode_prompt(text)?;
                let eos = tokenizer.require_eos()?;
                if ids.last() != Some(&eos) {
                    ids.push(eos);
                }
                let answers = vec![true; ids.len()];
                return Ok((ids, answers));
            }
            (_, Some(template)) => {
                let dialogue = Dialogue { messages: &record.messages(), tools: record.tools() };
                return self.by_template(template, dialogue, mask);
            }
            (Content::Instruction { instruction, input, sys_prompt, output }, None) => {
                let prompt = style.apply(instruction, input.as_deref(), sys_prompt.as_deref())?;
                vec![(prompt, Some(output.as_str()))]
            }
            (Content::Conversation { messages, tools }, None) => style.turns(Dialogue { messages, tools })?,
        };
        let (mut ids, mut answers) = (Vec::new(), Vec::new());
        for (i, (prompt, answer)) in pairs.iter().enumerate() {
            ids.extend(if i == 0 { tokenizer.encode_prompt(prompt)? } else { tokenizer.encode(prompt)? });
            answers.resize(ids.len(), false);
            if let Some(answer) = answer {
                ids.extend(tokenizer.encode_answer(answer)?);
                answers.resize(ids.len(), true);
            }
        }
        Ok((ids, answers))
    }

    /// The text of a chat template, tokenized whole: a token is the assistant's if it begins in what it says. Where the
    /// template writes no token behind the last answer that ends a text, EOS is added, or the model would not learn to
    /// stop.
    fn by_template(
        &self,
        template: &ChatTemplate,
        dialogue: Dialogue<'_>,
        mask: bool,
    ) -> Result<(Vec<u32>, Vec<bool>)> {
        let (text, ranges) =
            if mask { template.answers(dialogue)? } else { (template.render(dialogue, false)?, Vec::new()) };
        let tokens = self.tokenizer.encode_with_starts(&text)?;
        let (mut ids, mut answers) = (Vec::with_capacity(tokens.len() + 1), Vec::with_capacity(tokens.len() + 1));
        for (id, start) in tokens {
            ids.push(id);
            answers.push(!mask || ranges.iter().any(|range| range.contains(&start)));
        }
        // Behind the last answer there is at most an end mark and a line end.
        let ends = |id: &u32| self.tokenizer.eos_ids().contains(id);
        if !ids.iter().rev().take(2).any(ends) {
            ids.push(self.tokenizer.require_eos()?);
            answers.push(true);
        }
        Ok((ids, answers))
    }

    /// Ids that the model is shown to give the last answer of a record itself; of plain text, its first words.
    ///
    /// # Errors
    /// As [`Encoder::encode`].
    pub fn prompt_ids(&self, record: &Record) -> Result<Vec<u32>> {
        const WORDS: usize = 8;
        match &record.content {
            Content::Text(text) => {
                let end = text.match_indices(char::is_whitespace).nth(WORDS).map_or(text.len(), |(at, _)| at);
                self.tokenizer.encode_prompt(&text[..end])
            }
            Content::Instruction { instruction, input, sys_prompt, .. } if self.style.template().is_none() => {
                let prompt = self.style.apply(instruction, input.as_deref(), sys_prompt.as_deref())?;
                self.tokenizer.encode_prompt(&prompt)
            }
            _ => {
                let messages = record.messages();
                let whole = Dialogue { messages: &messages, tools: record.tools() };
                self.style.prompt_ids(self.tokenizer, whole.first(messages.len().saturating_sub(1)))
            }
        }
    }

    /// Ids and labels of all records, in their order, made on all cores. `progress` is told how many are done.
    ///
    /// # Errors
    /// As [`Encoder::encode`], with the place of the first record that fails.
    pub fn encode_all(
        &self,
        records: &[Record],
        progress: &(dyn Fn(usize) + Sync),
    ) -> std::result::Result<Vec<Sample>, (Origin, Error)> {
        let done = AtomicUsize::new(0);
        let one = |record: &Record| {
            let sample = self.encode(record).map_err(|error| (record.row, error));
            progress(done.fetch_add(1, Ordering::Relaxed) + 1);
            sample
        };
        let samples: Vec<_> = records.par_iter().map(one).collect();
        samples.into_iter().collect()
    }
}

/// What a set of samples amounts to.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Report {
    /// Number of samples.
    pub samples: usize,
    /// All tokens, after cutting.
    pub tokens: usize,
    /// Tokens that count in the loss.
    pub target_tokens: usize,
    /// Length of the longest sample, after cutting.
    pub longest: usize,
    /// Length of the longest sample, before cutting.
    pub longest_raw: usize,
    /// Mean length, after cutting; 0 without samples.
    pub mean: f64,
    /// Length that half of the samples do not exceed, after cutting.
    pub median: usize,
    /// Length that 95 of 100 samples do not exceed, after cutting.
    pub p95: usize,
    /// Samples that were cut.
    pub truncated: usize,
}

impl Report {
    /// Report on `samples`.
    #[must_use]
    pub fn of(samples: &[Sample]) -> Self {
        let mut report = Self { samples: samples.len(), ..Self::default() };
        for sample in samples {
            let length = sample.input_ids.len();
            report.tokens += length;
            report.target_tokens += sample.target_tokens();
            report.longest = report.longest.max(length);
            report.longest_raw = report.longest_raw.max(sample.raw_len);
            report.truncated += usize::from(length < sample.raw_len);
        }
        report.mean = report.tokens as f64 / report.samples.max(1) as f64;
        let mut lengths: Vec<usize> = samples.iter().map(|sample| sample.input_ids.len()).collect();
        lengths.sort_unstable();
        let at_most = |percent: usize| match (lengths.len() * percent).div_ceil(100) {
            0 => 0,
            n => lengths[n - 1],
        };
        (report.median, report.p95) = (at_most(50), at_most(95));
        report
    }
}

/// `text` without the control characters that a terminal would obey; lines and tabs stay.
#[must_use]
pub fn without_controls(text: &str) -> String {
    text.replace(|c: char| c.is_control() && c != '\n' && c != '\t', "")
}

/// Text of a sample, special tokens included, with what is learned between `open` and `close`, [`without_controls`].
///
/// # Errors
/// As `Tokenizer::decode`.
pub fn with_mask(sample: &Sample, tokenizer: &Tokenizer, open: &str, close: &str) -> Result<String> {
    let learned = |at: usize| i64::from(sample.labels[at]) == i64::from(sample.input_ids[at]);
    let (mut text, mut from) = (String::new(), 0);
    for at in 1..=sample.input_ids.len() {
        if at == sample.input_ids.len() || learned(at) != learned(from) {
            let part = tokenizer.decode_all(&sample.input_ids[from..at])?;
            let part = without_controls(&part);
            if learned(from) {
                text.extend([open, &part, close]);
            } else {
                text.push_str(&part);
            }
            from = at;
        }
    }
    Ok(text)
}

/// Samples that go through the model together, each in its own length.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Batch {
    /// Ids of each sample.
    pub input_ids: Vec<Vec<u32>>,
    /// Labels of each sample.
    pub labels: Vec<Vec<i32>>,
    /// Index of each sample in the dataset.
    pub rows: Vec<usize>,
}

impl Batch {
    /// The batch of the samples at `rows`.
    ///
    /// # Panics
    /// If a row lies outside `samples`.
    #[must_use]
    pub fn gather(samples: &[Sample], rows: Vec<usize>) -> Self {
        let input_ids = rows.iter().map(|&row| samples[row].input_ids.clone()).collect();
        let labels = rows.iter().map(|&row| samples[row].labels.clone()).collect();
        Self { input_ids, labels, rows }
    }
}

/// LitGPT's padded form of a batch: ids and labels, filled up on the right to the longest sample.
#[must_use]
pub fn collate_padded(samples: &[&Sample], pad_id: u32, ignore_index: i32) -> (Vec<Vec<u32>>, Vec<Vec<i32>>) {
    let longest = samples.iter().map(|sample| sample.input_ids.len()).max().unwrap_or(0);
    let ids = samples.iter().map(|sample| filled(&sample.input_ids, longest, pad_id)).collect();
    let labels = samples.iter().map(|sample| filled(&sample.labels, longest, ignore_index)).collect();
    (ids, labels)
}

fn filled<T: Copy>(values: &[T], length: usize, with: T) -> Vec<T> {
    let mut values = values.to_vec();
    values.resize(length, with);
    values
}

/// Puts samples side by side: groups of indices whose lengths come to at most `capacity` together, except for a sample
/// that is longer alone. Best fit, the longest first: few groups, and always the same ones.
#[must_use]
pub fn pack(lengths: &[usize], capacity: usize) -> Vec<Vec<usize>> {
    let mut by_length: Vec<usize> = (0..lengths.len()).collect();
    by_length.sort_by_key(|row| std::cmp::Reverse(lengths[*row]));
    let mut packs: Vec<Vec<usize>> = Vec::new();
    let mut open = BTreeSet::new();
    for row in by_length {
        let found = open.range((lengths[row], 0)..).next().copied();
        let (space, pack) = found.unwrap_or_else(|| {
            packs.push(Vec::new());
            (capacity.max(lengths[row]), packs.len() - 1)
        });
        open.remove(&(space, pack));
        open.insert((space - lengths[row], pack));
        packs[pack].push(row);
    }
    packs
}

/// Indices of the samples of each batch, epoch after epoch without end, in the order of LitGPT's data loader.
///
/// The last batch of an epoch may be smaller. The same four numbers always give the same order, so [`Batches::seek`]
/// resumes exactly.
#[derive(Clone)]
pub struct Batches {
    n_samples: usize,
    micro_batch_size: usize,
    seed: u64,
    shuffle: bool,
    orders: EpochOrders,
    /// Order of the epoch under way.
    order: Vec<usize>,
    position: usize,
}

impl Batches {
    /// Batches of `n_samples` samples; a `micro_batch_size` of 0 counts as 1.
    #[must_use]
    pub fn new(n_samples: usize, micro_batch_size: usize, seed: u64, shuffle: bool) -> Self {
        let (orders, micro_batch_size) = (EpochOrders::new(n_samples, seed), micro_batch_size.max(1));
        Self { n_samples, micro_batch_size, seed, shuffle, orders, order: Vec::new(), position: 0 }
    }

    /// Number of batches in an epoch.
    #[must_use]
    pub fn per_epoch(&self) -> usize {
        self.n_samples.div_ceil(self.micro_batch_size)
    }

    /// Number of batches given out so far.
    #[must_use]
    pub fn position(&self) -> usize {
        self.position
    }

    /// Epoch, from 0, of the batch given out last.
    #[must_use]
    pub fn epoch(&self) -> usize {
        self.position.saturating_sub(1) / self.per_epoch().max(1)
    }

    /// The next batch; empty if there are no samples.
    pub fn next_batch(&mut self) -> Vec<usize> {
        if self.n_samples == 0 {
            return Vec::new();
        }
        let in_epoch = self.position % self.per_epoch();
        if in_epoch == 0 {
            self.order = self.next_order();
        }
        self.position += 1;
        let start = in_epoch * self.micro_batch_size;
        self.order[start..self.n_samples.min(start + self.micro_batch_size)].to_vec()
    }

    /// Goes to the place where `batches_done` batches have been given out.
    pub fn seek(&mut self, batches_done: usize) {
        *self = Self::new(self.n_samples, self.micro_batch_size, self.seed, self.shuffle);
        if self.n_samples == 0 {
            return;
        }
        for _ in 0..batches_done.div_ceil(self.per_epoch()) {
            self.order = self.next_order();
        }
        self.position = batches_done;
    }

    fn next_order(&mut self) -> Vec<usize> {
        if self.shuffle { self.orders.next_order() } else { (0..self.n_samples).collect() }
    }
}

impl Iterator for Batches {
    type Item = Vec<usize>;

    /// Never `None`, unless there are no samples.
    fn next(&mut self) -> Option<Self::Item> {
        (self.n_samples > 0).then(|| self.next_batch())
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::data::chat::Message;
    use crate::error::Error;
    use crate::tokenizer::AddBos;

    /// One token per letter; 0 `<s>`, 1 `</s>`.
    fn tokenizer(config: &str) -> Tokenizer {
        let dir = tempfile::tempdir().unwrap();
        let mut vocab = serde_json::Map::new();
        for token in ["<s>", "</s>"].into_iter().map(str::to_owned).chain(('a'..='z').map(String::from)) {
            vocab.insert(token, vocab.len().into());
        }
        let special = |id: u32, content: &str| {
            serde_json::json!({"id": id, "content": content, "single_word": false, "lstrip": false, "rstrip": false,
                "normalized": false, "special": true})
        };
        let json = serde_json::json!({"version": "1.0", "truncation": null, "padding": null,
            "added_tokens": [special(0, "<s>"), special(1, "</s>")], "normalizer": null, "pre_tokenizer": null,
            "post_processor": null, "decoder": null,
            "model": {"type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
                "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false, "vocab": vocab, "merges": []}});
        std::fs::write(dir.path().join("tokenizer.json"), json.to_string()).unwrap();
        std::fs::write(dir.path().join("tokenizer_config.json"), config).unwrap();
        Tokenizer::load(dir.path()).unwrap()
    }

    const CONFIG: &str = r#"{"bos_token": "<s>", "eos_token": "</s>"}"#;

    fn record(instruction: &str, output: &str) -> Record {
        let row = Origin { file: 0, row: 1 };
        let content = Content::Instruction {
            instruction: instruction.into(),
            input: None,
            sys_prompt: None,
            output: output.into(),
        };
        Record { content, row }
    }

    fn encode(mask_prompt: bool, max_seq_length: Option<usize>, instruction: &str, output: &str) -> Sample {
        let tokenizer = tokenizer(CONFIG).with_bos(AddBos::Always);
        let style = PromptStyle::by_name("default").unwrap();
        let encoder = Encoder {
            tokenizer: &tokenizer,
            style: &style,
            mask_prompt: Some(mask_prompt),
            ignore_index: -7,
            max_seq_length,
        };
        encoder.encode(&record(instruction, output)).unwrap()
    }

    #[test]
    fn packs_hold_every_sample_once_and_are_nearly_full() {
        let lengths: Vec<usize> = (0..1000).map(|i| 1 + (i * 7919) % 200).collect();
        let packs = pack(&lengths, 256);
        let mut rows: Vec<usize> = packs.iter().flatten().copied().collect();
        rows.sort_unstable();
        assert_eq!(rows, (0..1000).collect::<Vec<_>>());
        assert!(packs.iter().all(|p| p.iter().map(|r| lengths[*r]).sum::<usize>() <= 256));
        let fewest = lengths.iter().sum::<usize>().div_ceil(256);
        assert!(packs.len() <= fewest + fewest / 50, "{} packs, {fewest} would be full", packs.len());
        assert_eq!(pack(&[300, 10], 256), [vec![0], vec![1]]);
        assert!(pack(&[], 256).is_empty());
    }

    #[test]
    fn prompt_answer_and_labels() {
        let sample = encode(true, None, "ab", "cd");
        assert_eq!(sample.input_ids, [0, 2, 3, 4, 5, 1]);
        assert_eq!(sample.labels, [-7, -7, -7, 4, 5, 1]);
        assert_eq!((sample.prompt_len, sample.raw_len, sample.target_tokens()), (3, 6, 3));
        let sample = encode(false, Some(0), "ab", "cd");
        assert_eq!(sample.labels, [0, 2, 3, 4, 5, 1]);
        assert_eq!(sample.target_tokens(), 5);
    }

    #[test]
    fn special_tokens_at_the_ends_of_an_answer() {
        assert_eq!(encode(false, None, "a", "<s>b</s>").input_ids, [0, 2, 3, 1]);
        assert_eq!(encode(false, None, "a", "").input_ids, [0, 2, 1]);
        assert_eq!(encode(false, None, "a</s>", "").input_ids, [0, 2, 1, 1]);
        assert_eq!(encode(false, None, "", "").input_ids, [0, 1]);
    }

    #[test]
    fn cutting_comes_last() {
        let sample = encode(true, Some(4), "ab", "cd");
        assert_eq!((sample.input_ids.as_slice(), sample.labels.as_slice()), (&[0, 2, 3, 4][..], &[-7, -7, -7, 4][..]));
        assert_eq!(sample.raw_len, 6);
        let sample = encode(true, Some(2), "ab", "cd");
        assert_eq!((sample.labels.as_slice(), sample.prompt_len), (&[-7, -7][..], 2));
        let report = Report::of(&[sample, encode(true, None, "ab", "cd")]);
        let expected = Report {
            samples: 2,
            tokens: 8,
            target_tokens: 3,
            longest: 6,
            longest_raw: 6,
            mean: 4.0,
            median: 2,
            p95: 6,
            truncated: 1,
        };
        assert_eq!(report, expected);
        assert_eq!(Report::of(&[]), Report::default());
    }

    #[test]
    fn no_eos_is_an_error() {
        let tokenizer = tokenizer("{}");
        let style = PromptStyle::by_name("default").unwrap();
        let encoder = Encoder {
            tokenizer: &tokenizer,
            style: &style,
            mask_prompt: Some(true),
            ignore_index: -100,
            max_seq_length: None,
        };
        assert!(matches!(encoder.encode(&record("a", "b")), Err(Error::Unsupported { .. })));
        assert!(encoder.encode_all(&[record("a", "b")], &|_| ()).is_err());
    }

    #[test]
    fn all_are_encoded_in_order() {
        let tokenizer = tokenizer(CONFIG);
        let style = PromptStyle::by_name("default").unwrap();
        let encoder = Encoder {
            tokenizer: &tokenizer,
            style: &style,
            mask_prompt: Some(true),
            ignore_index: -100,
            max_seq_length: None,
        };
        let records: Vec<_> = (1..50).map(|n| record(&"a".repeat(n), "b")).collect();
        let most = AtomicUsize::new(0);
        let samples = encoder.encode_all(&records, &|n| _ = most.fetch_max(n, Ordering::Relaxed)).unwrap();
        assert!(samples.iter().zip(1..).all(|(sample, n)| sample.prompt_len == n));
        assert_eq!(most.into_inner(), 49);
        let batch = Batch::gather(&samples, vec![3, 0]);
        assert_eq!(batch.input_ids, [vec![2, 2, 2, 2, 3, 1], vec![2, 3, 1]]);
        assert_eq!(batch.labels[1], [-100, 3, 1]);
        assert_eq!(batch.rows, [3, 0]);
        let (ids, labels) = collate_padded(&[&samples[1], &samples[0]], 9, -100);
        assert_eq!(ids, [[2, 2, 3, 1], [2, 3, 1, 9]]);
        assert_eq!(labels, [[-100, -100, 3, 1], [-100, 3, 1, -100]]);
        assert_eq!(collate_padded(&[], 0, -100), (vec![], vec![]));
    }

    #[test]
    fn batches_come_in_the_loaders_order() {
        let mut batches = Batches::new(7, 2, 42, true);
        assert_eq!((batches.per_epoch(), batches.epoch(), batches.position()), (4, 0, 0));
        let got: Vec<_> = batches.by_ref().take(12).collect();
        assert_eq!(got[..4], [vec![4, 5], vec![3, 6], vec![1, 0], vec![2]]);
        assert_eq!(got[4..8].concat(), [6, 2, 4, 5, 3, 1, 0]);
        assert_eq!(got[8..].concat(), [2, 1, 0, 4, 6, 5, 3]);
        assert_eq!((batches.epoch(), batches.position()), (2, 12));
        let plain: Vec<_> = Batches::new(3, 2, 42, false).take(3).collect();
        assert_eq!(plain, [vec![0, 1], vec![2], vec![0, 1]]);
        assert_eq!(Batches::new(0, 2, 42, true).next(), None);
        assert_eq!(Batches::new(2, 0, 42, false).next_batch(), [0]);
    }

    #[test]
    fn seek_resumes_anywhere() {
        for shuffle in [true, false] {
            let all: Vec<_> = Batches::new(7, 2, 1337, shuffle).take(14).collect();
            for done in 0..13 {
                let mut batches = Batches::new(7, 2, 1337, shuffle);
                batches.next_batch();
                batches.seek(done);
                let expected = done.saturating_sub(1) / 4;
                assert_eq!((batches.position(), batches.epoch()), (done, expected));
                assert_eq!(batches.take(14 - done).collect::<Vec<_>>(), all[done..], "{done}");
            }
        }
        Batches::new(0, 1, 0, true).seek(5);
    }

    /// `<s>` opens a turn and `</s>` closes it, with the roles u and a.
    const TEMPLATE: &str = "{% for m in messages %}{{ '<s>' + m.role[0] + m.content + '</s>' }}{% endfor %}\
                            {% if add_generation_prompt %}<s>a{% endif %}";

    fn conversation() -> Record {
        let turns = [("user", "xy"), ("assistant", "pq"), ("user", "z"), ("assistant", "r")];
        let messages = turns.map(|(role, content)| Message::new(role, content)).to_vec();
        Record { content: Content::Conversation { messages, tools: Vec::new() }, row: Origin { file: 0, row: 1 } }
    }

    #[test]
    fn every_answer_of_a_conversation_is_learned() {
        let tokenizer = tokenizer(CONFIG);
        let id = |c: char| c as u32 - 'a' as u32 + 2;
        let chat = PromptStyle::chat(ChatTemplate::new(Path::new("t.jinja"), TEMPLATE, "<s>", "</s>").unwrap());
        let encoder =
            Encoder { tokenizer: &tokenizer, style: &chat, mask_prompt: None, ignore_index: -7, max_seq_length: None };
        let sample = encoder.encode(&conversation()).unwrap();
        let (u, a) = (id('u'), id('a'));
        assert_eq!(
            sample.input_ids,
            [0, u, id('x'), id('y'), 1, 0, a, id('p'), id('q'), 1, 0, u, id('z'), 1, 0, a, id('r'), 1]
        );
        let learned: Vec<i32> = sample.labels.iter().copied().filter(|label| *label != -7).collect();
        assert_eq!(learned, [id('p') as i32, id('q') as i32, 1, id('r') as i32, 1]);
        assert_eq!(sample.prompt_len, 7);
        let prompt = encoder.prompt_ids(&conversation()).unwrap();
        assert_eq!(prompt, sample.input_ids[..16]);
        let open = Encoder { mask_prompt: Some(false), ..encoder };
        assert_eq!(open.encode(&conversation()).unwrap().target_tokens(), 17);
        assert_eq!(with_mask(&sample, &tokenizer, "[", "]").unwrap().matches('[').count(), 2);

        let plain = PromptStyle::by_name("default").unwrap();
        let encoder = Encoder { style: &plain, ..encoder };
        let sample = encoder.encode(&conversation()).unwrap();
        assert_eq!(sample.input_ids, [id('x'), id('y'), id('p'), id('q'), 1, id('z'), id('r'), 1]);
        assert_eq!(sample.labels, [-7, -7, id('p') as i32, id('q') as i32, 1, -7, id('r') as i32, 1]);
        assert_eq!(encoder.prompt_ids(&conversation()).unwrap(), sample.input_ids[..6]);
    }

    #[test]
    fn an_answer_that_nothing_ends_gets_an_eos() {
        let tokenizer = tokenizer(CONFIG);
        let source = TEMPLATE.replace(" + '</s>'", "");
        let chat = PromptStyle::chat(ChatTemplate::new(Path::new("t.jinja"), &source, "<s>", "</s>").unwrap());
        let encoder =
            Encoder { tokenizer: &tokenizer, style: &chat, mask_prompt: None, ignore_index: -7, max_seq_length: None };
        let sample = encoder.encode(&conversation()).unwrap();
        assert_eq!((sample.input_ids.last(), sample.labels.last()), (Some(&1), Some(&1)));
    }

    #[test]
    fn plain_text_is_learned_whole() {
        let tokenizer = tokenizer(CONFIG).with_bos(AddBos::Always);
        let style = PromptStyle::by_name("alpaca").unwrap();
        let encoder = Encoder {
            tokenizer: &tokenizer,
            style: &style,
            mask_prompt: Some(true),
            ignore_index: -7,
            max_seq_length: None,
        };
        let record = Record { content: Content::Text("ab".into()), row: Origin { file: 0, row: 1 } };
        let sample = encoder.encode(&record).unwrap();
        assert_eq!((sample.input_ids, sample.labels), (vec![0, 2, 3, 1], vec![0, 2, 3, 1]));
    }
}
