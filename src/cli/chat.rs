//! `litgpt chat`: a conversation with a model, turn by turn.
//!
//! A turn is rendered with the whole conversation, as the model saw it in training; what the cache already holds of it is
//! not computed again. When it outgrows the context, the oldest turns are left out.

use super::args::{ChatArgs, SamplingArgs};
use super::load::{Compute, Loaded, fetched, model};
use super::ui::Ui;
use crate::data::chat::Message;
use crate::error::{Error, Result};
use crate::generate::{Draw, Request, Session, text};
use crate::model::Gpt;
use rustyline::DefaultEditor;
use rustyline::error::ReadlineError;
use std::io::{BufRead, IsTerminal};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

const HELP: &str = "\
/help           this text
/reset          forget the conversation; the system prompt stays
/system TEXT    set the system prompt and forget the conversation; without TEXT there is none
/exit           leave, as do !exit, !quit, an empty line, and Ctrl-D and Ctrl-C at the prompt; Ctrl-C stops an answer
With --multiline a text goes on up to a line !submit. Otherwise, a line that ends in \\ goes on in the next one; \"\"\" begins and ends a text of several lines.";

/// Runs the command.
pub fn run(args: &ChatArgs, ui: &mut Ui) -> anyhow::Result<()> {
    args.load.notes().iter().for_each(|line| ui.note(line));
    if args.sampling.max_new_tokens == 0 {
        return Err(Error::usage("--max_new_tokens is 0, so there would be no answers", "give 1 or more").into());
    }
    let dir = fetched(&args.model.path()?, args.access_token.clone(), ui)?;
    let compute = Compute::find(args.load.accelerator, args.load.precision)?;
    let style = args.load.prompt_style.as_deref();
    let loaded = model(&dir, &compute, args.load.quantize.as_deref(), style, ui)?;
    let mut lines = Lines::open(args.multiline)?;
    let stop = Arc::new(AtomicBool::new(false));
    if lines.terminal() {
        // Elsewhere Ctrl-C ends the program, as it does for any filter.
        signal_hook::flag::register(signal_hook::consts::SIGINT, Arc::clone(&stop))?;
        ui.note(&format!("chatting with {} on {}; /help says what there is", dir.display(), compute.place()));
    }
    let session = Session::new(&loaded.gpt, Arc::clone(&stop));
    let conversation = Conversation::new(args.sys_prompt.as_deref());
    let mut chat = Chat { loaded, session, conversation, sampling: &args.sampling, turns: 0 };
    while let Some(input) = lines.read()? {
        match Input::parse(&input) {
            Input::Exit => break,
            Input::Help => ui.note(HELP),
            Input::Reset => chat.conversation.turns.clear(),
            Input::System(text) => chat.conversation = Conversation::new(Some(text)),
            Input::Unknown(command) => ui.note(&format!("there is no {command}; /help says what there is")),
            Input::Say(text) => {
                stop.store(false, Ordering::Relaxed);
                chat.turn(text, ui)?;
            }
        }
    }
    Ok(())
}

/// What a line asks for.
#[derive(Debug, PartialEq, Eq)]
enum Input<'a> {
    Exit,
    Help,
    Reset,
    System(&'a str),
    Unknown(&'a str),
    Say(&'a str),
}

impl<'a> Input<'a> {
    fn parse(text: &'a str) -> Self {
        let trimmed = text.trim();
        let (word, rest) = trimmed.split_once(char::is_whitespace).unwrap_or((trimmed, ""));
        match word {
            "" | "/exit" | "/quit" | "/bye" => Self::Exit,
            _ if leaves(trimmed) => Self::Exit,
            "/help" | "/?" => Self::Help,
            "/reset" | "/clear" => Self::Reset,
            "/system" => Self::System(rest.trim()),
            // A path may begin with a slash, too.
            _ if word.starts_with('/') && rest.is_empty() && !word[1..].contains('/') => Self::Unknown(word),
            _ => Self::Say(trimmed),
        }
    }
}

/// Whether a line is one of LitGPT's words to leave.
fn leaves(line: &str) -> bool {
    ["!quit", "!exit"].iter().any(|word| line.trim().eq_ignore_ascii_case(word))
}

/// Where lines come from.
enum Source {
    Terminal(Box<DefaultEditor>),
    Pipe(Box<dyn BufRead>),
}

/// Reads what the user says, which may be several lines.
struct Lines {
    source: Source,
    /// Whether a text goes on up to a line `!submit`.
    until_submit: bool,
}

impl Lines {
    fn open(until_submit: bool) -> Result<Self> {
        let stdin = std::io::stdin();
        let source = if stdin.is_terminal() {
            let failed = |e: ReadlineError| Error::refused(format!("cannot read from the terminal: {e}"), "");
            Source::Terminal(Box::new(DefaultEditor::new().map_err(failed)?))
        } else {
            Source::Pipe(Box::new(stdin.lock()))
        };
        Ok(Self { source, until_submit })
    }

    fn terminal(&self) -> bool {
        matches!(self.source, Source::Terminal(_))
    }

    /// One line without its end; `None` at the end of the input.
    fn line(&mut self, prompt: &str) -> Result<Option<String>> {
        let refused = |e: &dyn std::fmt::Display| Error::refused(format!("cannot read what you say: {e}"), "");
        match &mut self.source {
            Source::Terminal(editor) => match editor.readline(prompt) {
                Ok(line) => {
                    // Without memory for it a line is not remembered, nothing worse.
                    let _ = editor.add_history_entry(&line);
                    Ok(Some(line))
                }
                Err(ReadlineError::Eof | ReadlineError::Interrupted) => Ok(None),
                Err(error) => Err(refused(&error)),
            },
            Source::Pipe(reader) => {
                let mut line = Vec::new();
                let read = reader.read_until(b'\n', &mut line).map_err(|e| refused(&e))?;
                let line = String::from_utf8_lossy(&line);
                Ok((read > 0).then(|| line.trim_end_matches(['\n', '\r']).to_owned()))
            }
        }
    }

    /// What the user says next; `None` to leave.
    fn read(&mut self) -> Result<Option<String>> {
        let Some(first) = self.line(">> ")? else { return Ok(None) };
        if self.until_submit {
            return self.submitted(first);
        }
        if let Some(begun) = first.trim_start().strip_prefix("\"\"\"") {
            return match begun.strip_suffix("\"\"\"") {
                Some(whole) => Ok(Some(whole.to_owned())),
                None => self.quoted(begun.to_owned()),
            };
        }
        let mut text = first;
        while let Some(begun) = text.strip_suffix('\\') {
            let begun = begun.to_owned();
            let Some(next) = self.line(".. ")? else { return Ok(Some(begun)) };
            text = format!("{begun}\n{next}");
        }
        Ok(Some(text))
    }

    /// The lines from `first` on up to a line `!submit`; one that says to leave leaves, whatever stands before it.
    fn submitted(&mut self, first: String) -> Result<Option<String>> {
        let (mut lines, mut next) = (Vec::new(), Some(first));
        while let Some(line) = next {
            if line.trim().eq_ignore_ascii_case("!submit") {
                return Ok(Some(lines.join("\n")));
            }
            if leaves(&line) {
                return Ok(None);
            }
            lines.push(line);
            next = self.line(".. ")?;
        }
        Ok(Some(lines.join("\n")))
    }

    /// `text` and the lines up to one that ends in three quotes.
    fn quoted(&mut self, mut text: String) -> Result<Option<String>> {
        while let Some(line) = self.line(".. ")? {
            if let Some(last) = line.trim_end().strip_suffix("\"\"\"") {
                return Ok(Some(if last.is_empty() { text } else { format!("{text}\n{last}") }));
            }
            text = format!("{text}\n{line}");
        }
        Ok((!text.is_empty()).then_some(text))
    }
}

/// The system prompt, and what was said.
#[derive(Debug, Default)]
struct Conversation {
    system: Option<Message>,
    /// User and assistant in turn.
    turns: Vec<Message>,
}

impl Conversation {
    fn new(system: Option<&str>) -> Self {
        let system = system.filter(|text| !text.is_empty()).map(|text| Message::new("system", text));
        Self { system, turns: Vec::new() }
    }

    fn messages(&self) -> Vec<Message> {
        self.system.iter().chain(&self.turns).cloned().collect()
    }

    /// Leaves out the oldest question and its answer; whether there was one before the last question.
    fn forget_oldest(&mut self) -> bool {
        if self.turns.len() < 3 {
            return false;
        }
        self.turns.drain(..2);
        true
    }

    /// The conversation as `encode` makes it, less the oldest turns where it has more than `limit` tokens: then enough
    /// are left out for it to have three quarters of `limit`, so that not every turn does this anew. Also, how many
    /// turns were left out.
    fn fit(&mut self, limit: usize, encode: impl Fn(&[Message]) -> Result<Vec<u32>>) -> Result<(Vec<u32>, usize)> {
        let mut ids = encode(&self.messages())?;
        let mut forgotten = 0;
        if ids.len() > limit {
            while ids.len() > limit / 4 * 3 && self.forget_oldest() {
                forgotten += 1;
                ids = encode(&self.messages())?;
            }
        }
        if ids.len() <= limit {
            return Ok((ids, forgotten));
        }
        let message = format!("this takes {} tokens with the system prompt, and there is room for {limit}", ids.len());
        Err(Error::refused(message, "say it in fewer words, or give a smaller --max_new_tokens"))
    }
}

/// A running conversation.
struct Chat<'a> {
    loaded: Loaded,
    session: Session,
    conversation: Conversation,
    sampling: &'a SamplingArgs,
    /// Answers so far, each drawn with a seed of its own.
    turns: u64,
}

impl Chat<'_> {
    /// Says `text` to the model and shows its answer. What does not fit is reported and not said.
    fn turn(&mut self, text: &str, ui: &Ui) -> anyhow::Result<()> {
        self.conversation.turns.push(Message::new("user", text));
        let context = self.loaded.gpt.config.block_size;
        let room = self.sampling.max_new_tokens.min(context / 2).max(1);
        let (style, tokenizer) = (&self.loaded.style, &self.loaded.tokenizer);
        let fitted = self.conversation.fit(context - room, |messages| style.prompt_ids(tokenizer, messages));
        let (prompt, forgotten) = match fitted {
            Ok(fitted) => fitted,
            Err(error) => {
                self.conversation.turns.pop();
                ui.note(&format!("error: {error}"));
                return Ok(());
            }
        };
        if forgotten > 0 {
            ui.note(&format!(
                "the conversation outgrew the context of {context} tokens: {forgotten} old turns are left out"
            ));
        }
        let answer = self.answer(&prompt, room, ui)?;
        self.conversation.turns.push(Message::new("assistant", answer.trim()));
        self.turns += 1;
        Ok(())
    }

    fn answer(&mut self, prompt: &[u32], max_new_tokens: usize, ui: &Ui) -> anyhow::Result<String> {
        self.session.prepare(&mut self.loaded.gpt, prompt.len() + max_new_tokens);
        let stop_ids = self.loaded.style.stop_ids(&self.loaded.tokenizer);
        let request = Request {
            prompt,
            max_new_tokens,
            draw: Draw {
                temperature: self.sampling.temperature,
                top_k: Some(self.sampling.top_k).filter(|k| *k > 0),
                top_p: self.sampling.top_p,
                seed: self.sampling.seed.wrapping_add(self.turns),
            },
            stop_ids: &stop_ids,
            stop_texts: self.loaded.style.stop_texts(),
            prompt_lookup: self.sampling.prompt_lookup_num_tokens,
        };
        let mut answer = String::new();
        let gpt: &Gpt = &self.loaded.gpt;
        let figures = text(gpt, &self.loaded.tokenizer, &mut self.session, &request, |piece| {
            answer.push_str(piece);
            ui.result(piece)
        })?;
        ui.result("\n")?;
        let rate = figures.tokens.saturating_sub(1) as f64 / figures.decode.as_secs_f64().max(1e-9);
        let stopped = if self.session.stopped() { ", stopped" } else { "" };
        ui.note(&format!("[{} tokens, {rate:.1} tokens/s{stopped}]", figures.tokens));
        Ok(answer)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lines(text: &'static str, until_submit: bool) -> Lines {
        Lines { source: Source::Pipe(Box::new(text.as_bytes())), until_submit }
    }

    fn all(mut lines: Lines) -> Vec<String> {
        std::iter::from_fn(|| lines.read().unwrap()).collect()
    }

    #[test]
    fn commands_are_told_from_text() {
        for line in ["  ", "/exit", "!quit", " !Exit ", "!QUIT"] {
            assert_eq!(Input::parse(line), Input::Exit, "{line:?}");
        }
        assert_eq!(Input::parse("!quit now"), Input::Say("!quit now"));
        assert_eq!(Input::parse("/system  be brief "), Input::System("be brief"));
        assert_eq!(Input::parse("/rest"), Input::Unknown("/rest"));
        assert_eq!(Input::parse("/usr/bin is a folder"), Input::Say("/usr/bin is a folder"));
        assert_eq!(Input::parse(" hello "), Input::Say("hello"));
    }

    #[test]
    fn texts_of_several_lines_are_one_message() {
        assert_eq!(all(lines("a\\\nb\nc\r\n", false)), ["a\nb", "c"]);
        assert_eq!(all(lines("\"\"\"a\nb\nc\"\"\"\nd", false)), ["a\nb\nc", "d"]);
        assert_eq!(all(lines("\"\"\"one\"\"\"\n", false)), ["one"]);
        assert_eq!(all(lines("a\nb\n!submit\nc\n", true)), ["a\nb", "c"]);
        assert_eq!(all(lines("a\n\nnot !submit\n !Submit\nb\n!QUIT\nnever\n", true)), ["a\n\nnot !submit"]);
        assert_eq!(all(lines("!submit\n", true)), [""]);
    }

    #[test]
    fn old_turns_are_left_out_and_the_system_prompt_stays() {
        // A token a character.
        let encode = |messages: &[Message]| {
            Ok(messages.iter().flat_map(|m| m.content.chars().map(u32::from)).collect::<Vec<u32>>())
        };
        let mut conversation = Conversation::new(Some("sys"));
        for (question, answer) in [("aaaa", "bbbb"), ("cccc", "dddd")] {
            conversation.turns.push(Message::new("user", question));
            conversation.turns.push(Message::new("assistant", answer));
        }
        conversation.turns.push(Message::new("user", "eeee"));
        let text = |ids: Vec<u32>| ids.into_iter().filter_map(char::from_u32).collect::<String>();
        let (ids, forgotten) = conversation.fit(23, encode).unwrap();
        assert_eq!((text(ids), forgotten), ("sysaaaabbbbccccddddeeee".to_owned(), 0));
        let (ids, forgotten) = conversation.fit(22, encode).unwrap();
        assert_eq!((text(ids), forgotten), ("sysccccddddeeee".to_owned(), 1));
        assert!(conversation.fit(6, encode).is_err());
    }
}
