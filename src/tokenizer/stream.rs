//! The text of ids that come one by one.

use super::Tokenizer;
use crate::error::Result;

/// Text of generated ids, given out as soon as it is certain.
///
/// A token may hold a part of a character, and a decoder may write a token differently after another one. So each step
/// decodes the tokens since the last but one output together, and gives what that adds, once it ends in a whole
/// character. All outputs together are the text of all ids decoded at once.
pub struct DecodeStream<'a> {
    pub(super) tokenizer: &'a Tokenizer,
    /// Tokens of the last output, as context, then those without output yet.
    pub(super) ids: Vec<u32>,
    /// How many of `ids` are context.
    pub(super) given: usize,
    /// Text of the context alone.
    pub(super) context: String,
}

impl DecodeStream<'_> {
    /// A character has at most this many bytes, and a token at least one.
    const CHARACTER_BYTES: usize = 4;

    /// Takes the next id; gives the text that became certain, if any did.
    ///
    /// # Errors
    /// As [`Tokenizer::decode`].
    pub fn push(&mut self, id: u32) -> Result<Option<String>> {
        self.ids.push(id);
        let text = self.tokenizer.decode(&self.ids)?;
        if !text.ends_with(char::REPLACEMENT_CHARACTER) {
            return if text.len() > self.context.len() { self.give(text, self.ids.len()) } else { Ok(None) };
        }
        if self.ids.len() - self.given <= 2 * Self::CHARACTER_BYTES {
            return Ok(None);
        }
        // Bytes that are no text: let go of those that the next token cannot complete any more.
        let certain = self.ids.len() - (Self::CHARACTER_BYTES - 1);
        let text = self.tokenizer.decode(&self.ids[..certain])?;
        self.give(text, certain)
    }

    /// What is left at the end; bytes of a character that was never completed are left out.
    ///
    /// # Errors
    /// As [`Tokenizer::decode`].
    pub fn finish(&mut self) -> Result<Option<String>> {
        let text = self.tokenizer.decode(&self.ids)?;
        let text = text.trim_end_matches(char::REPLACEMENT_CHARACTER).to_owned();
        let rest = text.strip_prefix(&self.context).unwrap_or_default().to_owned();
        (self.ids, self.given, self.context) = (Vec::new(), 0, String::new());
        Ok((!rest.is_empty()).then_some(rest))
    }

    /// Gives the part of `text`, the text of the first `upto` ids, that is new.
    fn give(&mut self, text: String, upto: usize) -> Result<Option<String>> {
        let rest = match text.strip_prefix(&self.context) {
            Some(rest) => rest.to_owned(),
            None => self.tokenizer.decode(&self.ids[self.given..upto])?, // broken bytes rewrote what was given out
        };
        self.ids.drain(..self.given);
        self.given = upto - self.given;
        self.context = self.tokenizer.decode(&self.ids[..self.given])?;
        Ok((!rest.is_empty()).then_some(rest))
    }
}
