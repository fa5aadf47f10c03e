//! Decoding: new tokens behind a cache of keys and values, and their logits.

use super::attention::LayerCache;
use super::{Begun, Gpt};
use crate::ops::Matrix;
use crate::ops::attention::Spans;
use crate::ops::rows::gather;

/// Keys and values of all layers over the tokens so far.
#[derive(Debug, Clone)]
pub struct Cache {
    layers: Vec<LayerCache>,
    len: usize,
    /// Row of the rotary tables by which the first token's key was turned.
    first_row: usize,
}

impl Cache {
    /// Tokens so far.
    #[must_use]
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there are none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Forgets all tokens but the first `len`.
    pub fn truncate(&mut self, len: usize) {
        self.len = self.len.min(len);
        self.layers.iter_mut().for_each(|layer| layer.truncate(len));
    }
}

impl Gpt {
    /// An empty cache.
    #[must_use]
    pub fn cache(&self) -> Cache {
        Cache { layers: vec![LayerCache::default(); self.blocks.len()], len: 0, first_row: 0 }
    }

    /// Whether a text can become as long as `tokens` with the keys that it has from when it was as long as `before`. Where
    /// long texts turn otherwise, it cannot at one length.
    #[must_use]
    pub fn turns_alike(&self, before: usize, tokens: usize) -> bool {
        self.rope[0].first_row(before) == self.rope[0].first_row(tokens)
    }

    /// Whether `cache` can go on to `tokens` tokens; else they all have to be computed again, in an empty one.
    #[must_use]
    pub fn goes_on(&self, cache: &Cache, tokens: usize) -> bool {
        cache.is_empty() || cache.first_row == self.rope[0].first_row(tokens)
    }

    /// Hidden states of new tokens, which join the cache; before the final norm.
    fn decode_hidden(&self, parameters: &Matrix, ids: &[u32], cache: &mut Cache) -> Matrix {
        let tokens = cache.len + ids.len();
        self.require_prepared(tokens);
        assert!(self.goes_on(cache, tokens), "a text of {tokens} tokens turns otherwise than the cache");
        cache.first_row = self.rope[0].first_row(tokens);
        let positions = (cache.len..tokens).map(|position| (cache.first_row + position) as u32).collect();
        let begun = Begun { positions, spans: Spans::default(), seed: None, kept: Vec::new(), dx: None };
        let pass = begun.pass(self, parameters);
        let mut x = self.embed(ids);
        for (block, layer) in self.blocks.iter().zip(&mut cache.layers) {
            x = block.decode(&pass, x, layer);
        }
        cache.len += ids.len();
        x
    }

    fn logits_of(&self, parameters: &Matrix, x: &Matrix) -> Matrix {
        let normed = self.final_norm.forward(x);
        let mut logits = x.new_like(x.rows(), self.config.vocab_size);
        self.head.forward(parameters, &normed, None, &mut logits, false);
        self.transform().apply(&mut logits);
        logits.to_host()
    }

    /// Logits of the last of the new tokens, which join the cache.
    ///
    /// # Shapes
    /// `ids`: (T), at least one; returns (1, vocab_size), on the host.
    ///
    /// # Panics
    /// When `prepare` was not called for that many tokens with those of the cache, an id is outside the vocabulary, or the
    /// cache does not go on ([`Self::goes_on`]).
    #[must_use]
    pub fn next_logits(&self, ids: &[u32], cache: &mut Cache) -> Matrix {
        self.last_logits(ids, 1, cache)
    }

    /// Logits of the last `rows` of the new tokens, which all join the cache.
    ///
    /// # Shapes
    /// `ids`: (T), at least `rows`; returns (rows, vocab_size), on the host.
    ///
    /// # Panics
    /// As [`Self::next_logits`].
    #[must_use]
    pub fn last_logits(&self, ids: &[u32], rows: usize, cache: &mut Cache) -> Matrix {
        let parameters = self.parameters_of_products();
        let x = self.decode_hidden(&parameters, ids, cache);
        let last = (x.rows() - rows..x.rows()).map(|row| row as u32);
        let x = if rows == x.rows() { x } else { gather(&x, &last.collect()) };
        self.logits_of(&parameters, &x)
    }

    /// Logits of all new tokens, which join the cache.
    ///
    /// # Shapes
    /// `ids`: (T); returns (T, vocab_size), on the host.
    ///
    /// # Panics
    /// As [`Self::next_logits`].
    #[must_use]
    pub fn all_logits(&self, ids: &[u32], cache: &mut Cache) -> Matrix {
        self.last_logits(ids, ids.len(), cache)
    }
}
