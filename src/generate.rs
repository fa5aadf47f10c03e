//! Decoding: sampling the next token, and the loop that yields text until something stops it.

use crate::error::{Error, Result};
use crate::model::{Cache, Gpt};
use crate::ops::matrix::{Reuse, reusing};
use crate::ops::{Matrix, in_pool};
use crate::tokenizer::Tokenizer;
use candle_core::{Device, Tensor};
use candle_transformers::generation::{LogitsProcessor, Sampling};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

/// How tokens are drawn.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Draw {
    /// Divisor of the logits; 0 takes the likeliest token.
    pub temperature: f64,
    /// Draw among so many of the likeliest tokens; `None` for all.
    pub top_k: Option<usize>,
    /// Draw among the likeliest tokens that together have this probability.
    pub top_p: f64,
    /// Seed of the draws.
    pub seed: u64,
}

impl Draw {
    /// Always the likeliest token.
    pub const GREEDY: Self = Self { temperature: 0.0, top_k: None, top_p: 1.0, seed: 0 };

    fn sampler(&self) -> Sampler {
        let (temperature, p) = (self.temperature, self.top_p);
        let both = self.top_k.filter(|k| *k > 1 && p < 1.0);
        let sampling = match self.top_k {
            _ if temperature <= 0.0 || p <= 0.0 => Sampling::ArgMax,
            Some(1) => Sampling::ArgMax,
            Some(k) if both.is_none() => Sampling::TopK { k, temperature },
            _ if p < 1.0 => Sampling::TopP { p, temperature },
            _ => Sampling::All { temperature },
        };
        Sampler { top_k: both, processor: LogitsProcessor::from_sampling(self.seed, sampling) }
    }
}

/// Draws tokens.
struct Sampler {
    /// Tokens that are left to top-p, whose share is one of their probability, as in LitGPT, not of that of all.
    top_k: Option<usize>,
    processor: LogitsProcessor,
}

impl Sampler {
    fn sample(&mut self, logits: &[f32]) -> anyhow::Result<u32> {
        let cut = self.top_k.filter(|k| *k < logits.len()).map(|k| likeliest(logits, k));
        let logits = cut.as_deref().unwrap_or(logits);
        Ok(self.processor.sample(&Tensor::from_slice(logits, logits.len(), &Device::Cpu)?)?)
    }
}

/// `logits` with all but the `k` highest at minus infinity.
fn likeliest(logits: &[f32], k: usize) -> Vec<f32> {
    let mut order: Vec<usize> = (0..logits.len()).collect();
    order.select_nth_unstable_by(k, |a, b| logits[*b].total_cmp(&logits[*a]));
    let mut kept = vec![f32::NEG_INFINITY; logits.len()];
    order[..k].iter().for_each(|at| kept[*at] = logits[*at]);
    kept
}

/// Most tokens that are guessed at a time: with the one before them, as many rows as products of few rows have.
pub const PROMPT_LOOKUP: usize = 7;

/// What to continue, and when to stop.
#[derive(Debug, Clone, Copy)]
pub struct Request<'a> {
    /// Token ids of the prompt.
    pub prompt: &'a [u32],
    /// Most tokens to add.
    pub max_new_tokens: usize,
    /// How they are drawn.
    pub draw: Draw,
    /// Ids that end the text.
    pub stop_ids: &'a [u32],
    /// Texts that end the text.
    pub stop_texts: &'a [&'a str],
    /// Most tokens that are guessed at a time from what the text said before, up to `PROMPT_LOOKUP`; the text is the same with
    /// and without, but for rounding.
    pub prompt_lookup: usize,
}

/// What a generation took.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Figures {
    /// Tokens added.
    pub tokens: usize,
    /// Those of them that had been guessed.
    pub guessed: usize,
    /// Time to the first of them.
    pub prefill: Duration,
    /// Time for the others.
    pub decode: Duration,
}

/// Checks that prompt and answer fit the model's context, and returns how many tokens may be added.
///
/// # Errors
/// When the prompt alone fills the context.
pub fn room(prompt: usize, max_new_tokens: usize, context: usize) -> Result<usize> {
    if prompt == 0 {
        return Err(Error::refused("the prompt is empty and the tokenizer adds nothing to it", "give a --prompt"));
    }
    if prompt >= context {
        let message = format!("the prompt has {prompt} tokens, and the model's context is {context}");
        return Err(Error::refused(message, "shorten the prompt"));
    }
    Ok(max_new_tokens.min(context - prompt))
}

/// What one generation leaves to the next of the same model: keys and values of the tokens so far.
#[derive(Debug)]
pub struct Session {
    cache: Cache,
    /// The tokens that the cache holds; behind them it may hold wrong guesses.
    ids: Vec<u32>,
    /// Set from outside to end the text.
    stop: Arc<AtomicBool>,
}

impl Session {
    /// An empty session; a generation ends when `stop` is set.
    #[must_use]
    pub fn new(gpt: &Gpt, stop: Arc<AtomicBool>) -> Self {
        Self { cache: gpt.cache(), ids: Vec::new(), stop }
    }

    /// A session of one generation.
    #[must_use]
    pub fn alone(gpt: &Gpt) -> Self {
        Self::new(gpt, Arc::default())
    }

    /// Prepares the model for `positions` positions. What the cache holds stays right, however many there are.
    pub fn prepare(&self, gpt: &mut Gpt, positions: usize) {
        gpt.prepare(positions);
    }

    /// Whether a generation was asked to end.
    #[must_use]
    pub fn stopped(&self) -> bool {
        self.stop.load(Ordering::Relaxed)
    }

    /// Keeps what `prompt` begins with, but its last token, and returns the rest, which is still to be computed.
    fn begin<'a>(&mut self, prompt: &'a [u32]) -> &'a [u32] {
        let same = self.ids.iter().zip(prompt).take_while(|(kept, new)| kept == new).count();
        let same = same.min(prompt.len().saturating_sub(1));
        self.cache.truncate(same);
        self.ids.truncate(same);
        &prompt[same..]
    }

    /// Logits of the last of some new tokens, and of each of a guess what may follow them. The new tokens join the session,
    /// the guess does as far as it is added to `ids`.
    fn logits(&mut self, gpt: &Gpt, new: &[u32], guess: &[u32]) -> Result<Matrix> {
        self.cache.truncate(self.ids.len());
        self.ids.extend_from_slice(new);
        let again = !gpt.goes_on(&self.cache, self.ids.len());
        if again {
            self.cache.truncate(0);
        }
        let new = if again { &self.ids } else { new };
        let pass = || gpt.last_logits(&[new, guess].concat(), 1 + guess.len(), &mut self.cache);
        let logits = if new.len() > 1 { reusing(Reuse::Steps, || in_pool(pass)) } else { in_pool(pass) };
        gpt.check()?;
        Ok(logits)
    }
}

/// Guesses that a text goes on as it did where it last said the same (prompt lookup decoding). A pass over some tokens
/// takes hardly longer than over one, as it reads the same weights, and what it computes behind a wrong guess is
/// forgotten: the text is that of one token at a time, on a CPU with AVX-512 to the bit, elsewhere but for near ties that a
/// product of several rows may round the other way.
struct Lookup {
    /// Most tokens of a guess.
    most: usize,
    /// Tokens of the next one, more where guesses were right.
    reach: usize,
    /// By how many tokens before it were the same, up to `LONGEST`: guesses that began right, and guesses.
    tries: [[u32; 2]; Self::LONGEST + 1],
}

/// What a text may go on with.
#[derive(Default)]
struct Guess {
    ids: Vec<u32>,
    /// Tokens before it that were the same before, up to `LONGEST`.
    same: usize,
}

impl Lookup {
    /// Longest end of the text that is looked for.
    const LONGEST: usize = 8;

    fn new(most: usize) -> Self {
        Self { most: most.min(PROMPT_LOOKUP), reach: 1, tries: [[1, 3]; Self::LONGEST + 1] }
    }

    /// At most `room` tokens that may follow.
    fn guess(&self, text: &[u32], room: usize) -> Guess {
        let same = |end: usize| {
            let pairs = text[..end].iter().rev().zip(text.iter().rev());
            pairs.take(Self::LONGEST).take_while(|(before, last)| before == last).count()
        };
        // Of ends that are equally long, the last.
        let (same, end) = (1..text.len()).map(|end| (same(end), end)).max().unwrap_or_default();
        // A wrong guess costs up to a tenth of a pass.
        let [right, tried] = self.tries[same];
        let worth = same > 1 && 6 * right > tried;
        let len = if worth { self.reach.min(self.most).min(room).min(text.len() - end) } else { 0 };
        Guess { ids: text[end..end + len].to_vec(), same }
    }

    /// Takes note how many tokens of a guess were right.
    fn learn(&mut self, guess: &Guess, right: usize) {
        if !guess.ids.is_empty() {
            self.reach = if right == guess.ids.len() { 2 * self.reach.min(self.most) } else { right.max(1) };
            self.tries[guess.same][0] += u32::from(right > 0);
            self.tries[guess.same][1] += 1;
        }
    }
}

/// Token ids that follow the prompt, each given to `yield_token`, which may end the text by returning false. The model
/// is prepared for as many positions as the text may have.
///
/// # Errors
/// When the prompt does not fit the context, drawing fails, or `yield_token` does.
pub fn tokens(
    gpt: &Gpt,
    session: &mut Session,
    request: &Request<'_>,
    mut yield_token: impl FnMut(u32) -> anyhow::Result<bool>,
) -> anyhow::Result<Figures> {
    let room = room(request.prompt.len(), request.max_new_tokens, gpt.prepared())?;
    let mut sampler = request.draw.sampler();
    let mut lookup = Lookup::new(request.prompt_lookup);
    let mut figures = Figures::default();
    let mut begun = Instant::now();
    let (mut text, mut new) = (request.prompt.to_vec(), session.begin(request.prompt).to_vec());
    'text: while figures.tokens < room && !session.stopped() {
        let guess = match figures.tokens {
            0 => Guess::default(),
            n => lookup.guess(&text, room - n - 1),
        };
        let whole = gpt.turns_alike(text.len(), text.len() + guess.ids.len());
        let guess = if whole { guess } else { Guess::default() };
        let logits = session.logits(gpt, &new, &guess.ids)?;
        new.clear();
        let mut right = 0;
        for logits in logits.chunks_exact(logits.cols()) {
            let token = sampler.sample(logits)?;
            if figures.tokens == 0 {
                figures.prefill = begun.elapsed();
                begun = Instant::now();
            }
            if request.stop_ids.contains(&token) {
                break 'text;
            }
            figures.tokens += 1;
            let guessed = guess.ids.get(right) == Some(&token);
            figures.guessed += usize::from(guessed);
            if !yield_token(token)? || session.stopped() {
                break 'text;
            }
            text.push(token);
            if !guessed {
                new.push(token);
                break;
            }
            session.ids.push(token);
            right += 1;
        }
        lookup.learn(&guess, right);
    }
    figures.decode = begun.elapsed();
    Ok(figures)
}

/// Text that follows the prompt, given to `yield_text` in pieces that are whole characters and never a part of a stop
/// text.
///
/// # Errors
/// As [`tokens`].
pub fn text(
    gpt: &Gpt,
    tokenizer: &Tokenizer,
    session: &mut Session,
    request: &Request<'_>,
    mut yield_text: impl FnMut(&str) -> anyhow::Result<()>,
) -> anyhow::Result<Figures> {
    let mut stream = tokenizer.stream();
    let mut held = Held { text: String::new(), stop_texts: request.stop_texts };
    let figures = tokens(gpt, session, request, |token| {
        if let Some(piece) = stream.push(token)? {
            let (out, stopped) = held.push(&piece);
            if !out.is_empty() {
                yield_text(&out)?;
            }
            return Ok(!stopped);
        }
        Ok(true)
    })?;
    if let Some(piece) = stream.finish()? {
        held.push_rest(&piece);
    }
    if !held.text.is_empty() {
        yield_text(&held.text)?;
    }
    Ok(figures)
}

/// Text that may be the beginning of a stop text, and waits.
struct Held<'a> {
    text: String,
    stop_texts: &'a [&'a str],
}

impl Held<'_> {
    /// (what may go out, whether a stop text is complete).
    fn push(&mut self, piece: &str) -> (String, bool) {
        self.text.push_str(piece);
        if let Some(at) = self.stop_texts.iter().filter_map(|s| self.text.find(s)).min() {
            let out = self.text[..at].to_owned();
            self.text.clear();
            return (out, true);
        }
        let begins = |at: &usize| self.stop_texts.iter().any(|s| s.starts_with(&self.text[*at..]));
        let at = self.text.char_indices().map(|c| c.0).find(begins).unwrap_or(self.text.len());
        (self.text.drain(..at).collect(), false)
    }

    fn push_rest(&mut self, piece: &str) {
        let (out, stopped) = self.push(piece);
        self.text = if stopped { out } else { out + &self.text };
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::{Config, Source};
    use crate::ops::weight::{Data, Store};

    #[test]
    fn a_stop_text_across_pieces_never_goes_out() {
        let mut held = Held { text: String::new(), stop_texts: &["User:", "\nUser"] };
        assert_eq!(held.push("Hello Us"), ("Hello ".to_owned(), false));
        assert_eq!(held.push("ually"), ("Usually".to_owned(), false));
        assert_eq!(held.push(" é\nU"), (" é".to_owned(), false));
        assert_eq!(held.push("ser: x"), (String::new(), true));
    }

    #[test]
    fn top_p_is_a_share_of_what_top_k_left() {
        // The flatter, the less of all tokens two of them have; of the two, the first has more than half.
        let logits: Vec<f32> = (0..40).map(|i| if i == 7 { 2.0 } else { -(i as f32) / 40.0 }).collect();
        let draws = |top_k, top_p| {
            let mut sampler = Draw { temperature: 5.0, top_k, top_p, seed: 1 }.sampler();
            (0..50).map(|_| sampler.sample(&logits).unwrap()).collect::<std::collections::BTreeSet<_>>()
        };
        assert_eq!(draws(Some(2), 0.5).into_iter().collect::<Vec<_>>(), [7]);
        assert_eq!(draws(Some(2), 0.9).into_iter().collect::<Vec<_>>(), [0, 7]);
        assert!(draws(None, 0.9).len() > 5 && draws(Some(100), 0.9).len() > 5);
    }

    #[test]
    fn a_session_computes_what_is_new() {
        let config = Config::llama(11, 0, 4, 1, 4);
        let gpt = Gpt::load(&config, &Nothing, Store::F32, None, &mut |_| ()).unwrap();
        let mut session = Session::alone(&gpt);
        session.ids = vec![1, 2, 3, 4];
        assert_eq!(session.begin(&[1, 2, 5, 6]), [5, 6]);
        assert_eq!(session.ids, [1, 2]);
        session.ids = vec![1, 2, 3, 4];
        assert_eq!(session.begin(&[1, 2, 3]), [3], "the last token's logits are asked for");
    }

    #[test]
    fn a_text_is_guessed_to_repeat_itself_as_far_as_that_comes_true() {
        let mut lookup = Lookup::new(4);
        let text = [1, 2, 3, 9, 1, 2, 4, 5, 6, 7, 8, 1, 2];
        let guess = lookup.guess(&text, 10);
        assert_eq!((&guess.ids[..], guess.same), (&[4][..], 2), "the last place, one token at first");
        lookup.learn(&guess, 1);
        let guess = lookup.guess(&text, 10);
        assert_eq!(guess.ids, [4, 5]);
        assert_eq!(lookup.guess(&text, 1).ids, [4]);
        lookup.learn(&guess, 2);
        lookup.learn(&lookup.guess(&text, 10), 4);
        assert_eq!(lookup.guess(&text, 10).ids, [4, 5, 6, 7], "never more than asked for");
        for _ in 0..30 {
            lookup.learn(&lookup.guess(&text, 10), 0);
        }
        assert!(lookup.guess(&text, 10).ids.is_empty(), "after so many wrong guesses");
        assert!(lookup.guess(&[1, 2, 3], 10).ids.is_empty(), "nothing was said twice");
        assert!(Lookup::new(0).guess(&text, 10).ids.is_empty());
    }

    /// Weights of a model without blocks.
    struct Nothing;

    impl Source for Nothing {
        fn append(&self, _: &str, rows: usize, cols: usize, data: &mut Data) -> Result<()> {
            if let Data::F32(values) = data {
                values.resize(values.len() + rows * cols, 0.0);
            }
            Ok(())
        }
    }

    #[test]
    fn a_prompt_longer_than_the_context_is_refused() {
        assert!(room(10, 5, 10).is_err());
        assert_eq!(room(8, 5, 10).unwrap(), 2);
    }
}
