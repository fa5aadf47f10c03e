//! Decoding: sampling the next token, and the loop that yields text until something stops it.

use crate::error::{Error, Result};
use crate::model::Gpt;
use crate::ops::in_pool;
use crate::tokenizer::Tokenizer;
use candle_core::{Device, Tensor};
use candle_transformers::generation::{LogitsProcessor, Sampling};
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

    fn processor(&self) -> LogitsProcessor {
        let (temperature, p) = (self.temperature, self.top_p);
        let sampling = match self.top_k {
            _ if temperature <= 0.0 || p <= 0.0 => Sampling::ArgMax,
            Some(1) => Sampling::ArgMax,
            Some(k) if p < 1.0 => Sampling::TopKThenTopP { k, p, temperature },
            Some(k) => Sampling::TopK { k, temperature },
            None if p < 1.0 => Sampling::TopP { p, temperature },
            None => Sampling::All { temperature },
        };
        LogitsProcessor::from_sampling(self.seed, sampling)
    }
}

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
}

/// What a generation took.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Figures {
    /// Tokens added.
    pub tokens: usize,
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

/// Token ids that follow the prompt, each given to `yield_token`, which may end the text by returning false. The model
/// is prepared for as many positions as the text may have.
///
/// # Errors
/// When the prompt does not fit the context, drawing fails, or `yield_token` does.
pub fn tokens(
    gpt: &Gpt,
    request: &Request<'_>,
    mut yield_token: impl FnMut(u32) -> anyhow::Result<bool>,
) -> anyhow::Result<Figures> {
    let room = room(request.prompt.len(), request.max_new_tokens, gpt.prepared())?;
    let mut processor = request.draw.processor();
    let mut cache = gpt.cache();
    let mut figures = Figures::default();
    let mut begun = Instant::now();
    let mut next = request.prompt.to_vec();
    for index in 0..room {
        let logits = in_pool(|| gpt.next_logits(&next, &mut cache));
        gpt.check()?;
        let token = processor.sample(&Tensor::from_slice(&logits, logits.cols(), &Device::Cpu)?)?;
        if index == 0 {
            figures.prefill = begun.elapsed();
            begun = Instant::now();
        }
        if request.stop_ids.contains(&token) {
            break;
        }
        figures.tokens += 1;
        if !yield_token(token)? {
            break;
        }
        next.clear();
        next.push(token);
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
    request: &Request<'_>,
    mut yield_text: impl FnMut(&str) -> anyhow::Result<()>,
) -> anyhow::Result<Figures> {
    let mut stream = tokenizer.stream();
    let mut held = Held { text: String::new(), stop_texts: request.stop_texts };
    let figures = tokens(gpt, request, |token| {
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

    #[test]
    fn a_stop_text_across_pieces_never_goes_out() {
        let mut held = Held { text: String::new(), stop_texts: &["User:", "\nUser"] };
        assert_eq!(held.push("Hello Us"), ("Hello ".to_owned(), false));
        assert_eq!(held.push("ually"), ("Usually".to_owned(), false));
        assert_eq!(held.push(" é\nU"), (" é".to_owned(), false));
        assert_eq!(held.push("ser: x"), (String::new(), true));
    }

    #[test]
    fn a_prompt_longer_than_the_context_is_refused() {
        assert!(room(10, 5, 10).is_err());
        assert_eq!(room(8, 5, 10).unwrap(), 2);
    }
}
