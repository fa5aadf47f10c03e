//! Conversations and chat templates: the messages of a dialogue, and the Jinja template of a checkpoint that makes text
//! of them; what transformers adds to Jinja is in `jinja.rs`.
//!
//! What the text of a template becomes in training is in `sft.rs`; the fixed styles are in `prompt.rs`.

use std::ops::Range;
use std::path::{Path, PathBuf};

use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Serde, Value};
use minijinja::{Environment, ErrorKind, context};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value as Json};

use super::jinja;
use crate::error::{Error, Result, quietly};
use crate::tokenizer::Tokenizer;

/// One turn of a conversation.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Message {
    /// `system`, `user`, `assistant`, or another role that the template knows.
    pub role: String,
    /// What is said.
    pub content: String,
    /// What was thought before, apart from it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reasoning_content: Option<String>,
    /// What else its row says of it, which only chat templates read: `tool_calls`, `tool_call_id`, `name` and others.
    #[serde(flatten)]
    pub rest: Map<String, Json>,
}

impl Message {
    /// A message of `role`.
    #[must_use]
    pub fn new(role: &str, content: &str) -> Self {
        Self { role: role.to_owned(), content: content.to_owned(), reasoning_content: None, rest: Map::new() }
    }

    /// Whether the model says it.
    #[must_use]
    pub fn is_answer(&self) -> bool {
        self.role == "assistant"
    }

    /// What is said, or where tools are called the name of the first, if it has one.
    fn words_mut(&mut self) -> Option<&mut String> {
        if self.tool_calls().is_empty() {
            return Some(&mut self.content);
        }
        let call = self.rest.get_mut(TOOL_CALLS)?.get_mut(0)?;
        let function = if call.get("function").is_some() { call.get_mut("function")? } else { call };
        match function.get_mut("name")? {
            Json::String(name) => Some(name),
            _ => None,
        }
    }

    /// The tools that it calls, as objects.
    #[must_use]
    pub fn tool_calls(&self) -> &[Json] {
        self.rest.get(TOOL_CALLS).and_then(Json::as_array).map_or(&[], Vec::as_slice)
    }
}

/// Key of the calls in a message.
pub(super) const TOOL_CALLS: &str = "tool_calls";

/// A conversation or its beginning, and the tools that may be called in it, by their JSON schemas.
#[derive(Debug, Clone, Copy)]
pub struct Dialogue<'a> {
    /// The turns.
    pub messages: &'a [Message],
    /// The tools.
    pub tools: &'a [Json],
}

impl<'a, M: AsRef<[Message]> + ?Sized> From<&'a M> for Dialogue<'a> {
    fn from(messages: &'a M) -> Self {
        Self { messages: messages.as_ref(), tools: &[] }
    }
}

impl<'a> Dialogue<'a> {
    /// The first `n` turns.
    #[must_use]
    pub fn first(self, n: usize) -> Self {
        Self { messages: &self.messages[..n], ..self }
    }

    /// Whether one of these characters is in it anywhere.
    fn says(self, characters: [char; 2]) -> bool {
        let json = |value: String| value.contains(characters);
        let message = |m: &Message| {
            let texts = [Some(m.content.as_str()), m.reasoning_content.as_deref()];
            texts.into_iter().flatten().any(|text| text.contains(characters))
                || (!m.rest.is_empty() && json(Json::Object(m.rest.clone()).to_string()))
        };
        self.messages.iter().any(message) || self.tools.iter().any(|tool| json(tool.to_string()))
    }

    /// The names under which a template finds tools or calls of them, of those that the dialogue has.
    pub(super) fn tool_keys(self) -> impl Iterator<Item = &'static str> {
        let calls = self.messages.iter().any(|message| !message.tool_calls().is_empty());
        [("tools", !self.tools.is_empty()), (TOOL_CALLS, calls)].into_iter().filter(|(_, has)| *has).map(|(key, _)| key)
    }
}

/// A checkpoint's chat template, compiled.
#[derive(Debug)]
pub struct ChatTemplate {
    environment: Environment<'static>,
    /// The file that it was read from.
    path: PathBuf,
    /// Whether its source is at most [`SHORT`].
    short: bool,
    /// Whether it says itself what the assistant says.
    marked: bool,
    /// Which of the names of [`Dialogue::tool_keys`] its source has.
    tool_keys: Vec<&'static str>,
    bos_token: String,
    eos_token: String,
}

/// Name of the only template of an environment.
const NAME: &str = "chat_template";
/// Longest source: the longest published ones have some 30 KB.
const LONGEST: usize = 128 << 10;
/// Stack on which a source is compiled: the compiler calls itself for each operator of a chain, in less than this for
/// each byte of the longest source. A value that is one list in another for each statement of a source is printed by as
/// many calls.
const STACK: usize = 256 << 20;
/// Longest source that cannot nest deeper than any thread's stack holds.
const SHORT: usize = 4 << 10;
/// Instructions that one text may take, of which a turn of a dialogue takes about a hundred; each 64 bytes that one makes
/// count as another.
const FUEL: u64 = 2_000_000;
/// Longest text.
const LONGEST_TEXT: usize = 64 << 20;

impl ChatTemplate {
    /// Compiles `source`, which stands in the file `path`; `bos_token` and `eos_token` are the texts that it may name.
    ///
    /// # Errors
    /// `Unsupported` if it is no Jinja that can be read here.
    pub fn new(path: &Path, source: &str, bos_token: &str, eos_token: &str) -> Result<Self> {
        if source.len() > LONGEST {
            let problem = format!("the chat template has {} bytes, which no template has", source.len());
            return Err(Error::invalid(path, problem, "name another --data.prompt_style"));
        }
        let mut environment = Environment::new();
        environment.set_fuel(Some(FUEL));
        let syntax = SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build();
        environment.set_syntax(syntax.map_err(|e| broken(path, &e))?);
        jinja::extend(&mut environment);
        let text = jinja::prepared(source);
        let marked = text.contains(jinja::MARKS[0]);
        let compile = || environment.add_template_owned(NAME, text).map(|()| environment);
        let environment = deep(compile).and_then(|compiled| compiled).map_err(|e| broken(path, &e))?;
        let (path, bos_token, eos_token) = (path.to_owned(), bos_token.to_owned(), eos_token.to_owned());
        let tool_keys = ["tools", TOOL_CALLS].into_iter().filter(|key| source.contains(key)).collect();
        Ok(Self { environment, path, short: source.len() <= SHORT, marked, tool_keys, bos_token, eos_token })
    }

    /// The template of a checkpoint's tokenizer.
    ///
    /// # Errors
    /// `Usage` if the checkpoint has none; else as [`ChatTemplate::new`].
    pub fn of(tokenizer: &Tokenizer) -> Result<Self> {
        let source = tokenizer.chat_template().ok_or_else(|| {
            let message = format!("prompt style chat: `{}` has no chat template", tokenizer.dir().display());
            Error::usage(message, "name another style, for example chatml, or use the model's Instruct version")
        })?;
        let text = |id: Option<u32>| id.and_then(|id| tokenizer.id_to_token(id)).unwrap_or_default();
        Self::new(tokenizer.chat_template_file(), source, &text(tokenizer.bos_id()), &text(tokenizer.eos_id()))
    }

    /// Text of a dialogue, as transformers' `apply_chat_template` gives it; with `add_generation_prompt` it ends where
    /// the answer begins.
    ///
    /// # Errors
    /// What the template refuses, such as two user turns in a row, and tools that it has no place for.
    pub fn render<'a>(&self, dialogue: impl Into<Dialogue<'a>>, add_generation_prompt: bool) -> Result<String> {
        let text = self.render_marked(dialogue.into(), add_generation_prompt)?;
        Ok(if self.marked { unmarked(&text).0 } else { text })
    }

    /// The same with [`jinja::MARKS`].
    fn render_marked(&self, dialogue: Dialogue<'_>, add_generation_prompt: bool) -> Result<String> {
        if let Some(unread) = dialogue.tool_keys().find(|key| !self.tool_keys.contains(key)) {
            let what =
                format!("`{unread}` with the chat template of `{}`, which does not read them", self.path.display());
            return Err(Error::unsupported(
                what,
                "leave the rows with tools out, or use a model that was trained with tools",
            ));
        }
        if self.marked && dialogue.says(jinja::MARKS) {
            let what = format!("a message with the characters {:?}, which mark answers here", jinja::MARKS);
            return Err(Error::unsupported(what, "take them out: they are no text"));
        }
        let template = self.environment.get_template(NAME).map_err(|e| broken(&self.path, &e))?;
        let (bos_token, eos_token) = (&self.bos_token, &self.eos_token);
        let value = |m: &Message| {
            // gpt-oss and others read it under another name.
            let thought =
                m.reasoning_content.as_deref().map(|thought| [("thinking", thought), ("reasoning_content", thought)]);
            let said = [("role", m.role.as_str()), ("content", m.content.as_str())];
            let said = said.into_iter().chain(thought.into_iter().flatten());
            let rest = m.rest.iter().map(|(key, value)| (key.as_str(), Value::from(Serde(value))));
            Value::from_pairs(said.map(|(key, text)| (key, Value::from(text))).chain(rest))
        };
        let messages: Vec<Value> = dialogue.messages.iter().map(value).collect();
        let none = Value::from(());
        let tools = if dialogue.tools.is_empty() { none.clone() } else { Value::from(Serde(dialogue.tools)) };
        let mut text = Limited(Vec::new());
        let known = context! {
            messages, add_generation_prompt, bos_token, eos_token, tools, documents => none
        };
        let render = || template.render_captured_to(known, &mut text).map(drop);
        let rendered = if self.short { render() } else { deep(render).and_then(|rendered| rendered) };
        rendered.map_err(|e| broken(&self.path, &e))?;
        Ok(String::from_utf8_lossy(&text.0).into_owned())
    }

    /// Text of a whole conversation, and the byte ranges of it that the assistant says: those that the template marks with
    /// `{% generation %}`, or else what answers make of the text, their end-of-turn marks included.
    ///
    /// # Errors
    /// As [`ChatTemplate::render`]; `Unsupported` if the template writes earlier turns so differently that an answer
    /// cannot be found in the whole text.
    pub fn answers<'a>(&self, dialogue: impl Into<Dialogue<'a>>) -> Result<(String, Vec<Range<usize>>)> {
        let dialogue = dialogue.into();
        let mut text = self.render_marked(dialogue, false)?;
        let mut ranges = Vec::new();
        if self.marked {
            (text, ranges) = unmarked(&text);
            if !ranges.is_empty() {
                return Ok((text, ranges));
            }
        }
        for (i, _) in dialogue.messages.iter().enumerate().filter(|(_, message)| message.is_answer()) {
            let from = ranges.last().map_or(0, |range: &Range<usize>| range.end);
            let range = self.answer(dialogue, i, &text, from)?.ok_or_else(|| {
                let what = format!("masking turn {} with this chat template, which rewrites earlier turns", i + 1);
                Error::unsupported(what, "train on all turns: --data.mask_prompt false")
            })?;
            ranges.push(range);
        }
        Ok((text, ranges))
    }

    /// Where turn `i`, an answer, stands in the `text` of the dialogue, not before `from`: from the end of the prompt to the
    /// end of the text up to it. A template may write it, or turns before it, differently once others follow (reasoning is
    /// left out, tools come before the last question); then its place is looked for.
    fn answer(&self, dialogue: Dialogue<'_>, i: usize, text: &str, from: usize) -> Result<Option<Range<usize>>> {
        let before = self.render(dialogue.first(i), true)?;
        let upto = self.render(dialogue.first(i + 1), false)?;
        if before.len() >= from && text.starts_with(&upto) && upto.starts_with(&before) {
            return Ok(Some(before.len()..upto.len()));
        }
        let Some(place) = self.place(dialogue, i, text)?.filter(|place| place.start >= from) else { return Ok(None) };
        let Some(alone) = self.place(dialogue.first(i + 1), i, &upto)? else { return Ok(None) };
        // What stands before it cannot be in it.
        let previous = i.checked_sub(1).map(|previous| self.place(dialogue, previous, text)).transpose()?.flatten();
        let from =
            previous.filter(|previous| previous.end <= place.start).map_or(from, |previous| previous.end.max(from));
        let asked = self.render(dialogue.first(i), false)?;
        let prompt = &before[common_prefix(&asked, &before)..];
        let calls = !dialogue.messages[i].tool_calls().is_empty();
        let whole = upto.strip_prefix(before.as_str()).and_then(|answer| {
            let start = place.start.checked_sub(alone.start.checked_sub(before.len())?)?;
            (start >= from && text.get(start..)?.starts_with(answer)).then_some(start)
        });
        let begun = || begin_of(&text[from..place.start], prompt).map(|at| from + at);
        let start = whole.or_else(begun).or_else(|| (!calls).then_some(place.start));
        let behind = &upto[alone.end..];
        let open = behind.strip_suffix(&self.eos_token).unwrap_or(behind);
        let goes_on = [behind, open].into_iter().find(|behind| text[place.end..].starts_with(behind));
        let end = goes_on.map(str::len).or((!calls).then_some(0)).map(|len| place.end + len);
        Ok(start.zip(end).map(|(start, end)| start..end))
    }

    /// Where the words of turn `i` stand in the `text` of the dialogue, behind their thoughts, or the name of the first tool
    /// that it calls: what is another with others in their place.
    fn place(&self, dialogue: Dialogue<'_>, i: usize, text: &str) -> Result<Option<Range<usize>>> {
        let mut messages = dialogue.messages.to_vec();
        let Some(words) = messages[i].words_mut() else { return Ok(None) };
        *words = other_than(words);
        let Ok(other) = self.render(Dialogue { messages: &messages, ..dialogue }, false) else { return Ok(None) };
        if other == text {
            return Ok(None);
        }
        let start = common_prefix(text, &other);
        let (rest, other) = (&text[start..], &other[start..]);
        let same = rest.bytes().rev().zip(other.bytes().rev()).take_while(|(a, b)| a == b).count();
        let end = (rest.len() - same..=rest.len()).find(|at| rest.is_char_boundary(*at)).unwrap_or(rest.len());
        Ok(Some(start..start + end))
    }
}

/// A text without [`jinja::MARKS`], and what was between them.
fn unmarked(marked: &str) -> (String, Vec<Range<usize>>) {
    let [open, close] = jinja::MARKS;
    let (mut text, mut ranges, mut from) = (String::with_capacity(marked.len()), Vec::new(), 0);
    for part in marked.split_inclusive([open, close]) {
        text.push_str(part.strip_suffix([open, close]).unwrap_or(part));
        if part.ends_with(open) {
            from = text.len();
        } else if part.ends_with(close) {
            ranges.push(from..text.len());
        }
    }
    (text, ranges)
}

/// Words that neither begin nor end as these do, with the thoughts and blanks around them kept.
fn other_than(words: &str) -> String {
    let at = words.rfind("</think>").map_or(0, |at| at + "</think>".len());
    let said = words[at..].trim();
    let at = words.len() - words[at..].trim_start().len();
    let letter = |not: Option<char>| if not == Some('q') { 'z' } else { 'q' };
    let other = [letter(said.chars().next()), letter(said.chars().last())];
    [&words[..at], &String::from_iter(other), &words[at + said.len()..]].concat()
}

/// Where behind the last beginning of a `prompt` that `text` has, the longest there is, the answer begins. A tag that only
/// begins as one of the prompt is the answer's.
fn begin_of(text: &str, prompt: &str) -> Option<usize> {
    let ends = prompt.char_indices().map(|(at, c)| at + c.len_utf8()).rev();
    let (at, len) = ends.into_iter().find_map(|len| Some((text.rfind(&prompt[..len])?, len)))?;
    let open = prompt[..len].rfind(['<', '>']).filter(|open| len < prompt.len() && prompt[*open..].starts_with('<'));
    Some(at + open.unwrap_or(len))
}

/// Bytes of the whole characters that both begin with.
fn common_prefix(a: &str, b: &str) -> usize {
    let same = a.bytes().zip(b.bytes()).take_while(|(a, b)| a == b).count();
    boundary(a, same)
}

/// The last byte up to `at` at which a character begins.
fn boundary(text: &str, at: usize) -> usize {
    (0..=at).rev().find(|at| text.is_char_boundary(*at)).unwrap_or(0)
}

/// Text up to a length that no dialogue has.
struct Limited(Vec<u8>);

impl std::io::Write for Limited {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        if self.0.len() + bytes.len() > LONGEST_TEXT {
            return Err(std::io::ErrorKind::FileTooLarge.into());
        }
        self.0.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

/// What `work` gives on a stack that the deepest source fits.
fn deep<T: Send>(work: impl FnOnce() -> T + Send) -> std::result::Result<T, minijinja::Error> {
    let failed = || minijinja::Error::new(ErrorKind::InvalidOperation, "it does not fit into this memory");
    std::thread::scope(|scope| {
        let thread = std::thread::Builder::new()
            .stack_size(STACK)
            .spawn_scoped(scope, || quietly(work))
            .map_err(|_| failed())?;
        thread.join().ok().flatten().ok_or_else(failed)
    })
}

fn broken(path: &Path, e: &minijinja::Error) -> Error {
    let line = e.line().map_or_else(String::new, |line| format!(" line {line}"));
    let text = match e.kind() {
        ErrorKind::OutOfFuel => format!("it takes more than {FUEL} instructions for a text, as an endless loop does"),
        ErrorKind::WriteFailure => format!("it makes a text of more than {} MB", LONGEST_TEXT >> 20),
        kind => e.detail().map_or_else(|| kind.to_string(), str::to_owned),
    };
    let hint = "check the conversation's roles and their order, or name another --data.prompt_style";
    Error::unsupported(format!("chat template{line}: {} (`{}`)", text.replace('\n', " "), path.display()), hint)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    const CHATML: &str = "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] \
                          + '<|im_end|>' + '\n' }}{% endfor %}{% if add_generation_prompt %}{{ \
                          '<|im_start|>assistant\n' }}{% endif %}";

    fn talk() -> Vec<Message> {
        [("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "b")]
            .map(|(role, content)| Message::new(role, content))
            .to_vec()
    }

    #[test]
    fn answers_are_found_with_their_ends() {
        let template = ChatTemplate::new(Path::new("t.jinja"), CHATML, "", "").unwrap();
        let (text, ranges) = template.answers(&talk()).unwrap();
        let said: Vec<&str> = ranges.iter().map(|range| &text[range.clone()]).collect();
        assert_eq!(said, ["b<|im_end|>\n", "b<|im_end|>\n"]);
        assert_eq!(ranges[0].start, "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n".len());
    }

    fn said(source: &str, closing: &str, turns: &[(&str, &str)]) -> Vec<String> {
        let template = ChatTemplate::new(Path::new("t.jinja"), source, "", closing).unwrap();
        let turns: Vec<Message> = turns.iter().map(|(role, content)| Message::new(role, content)).collect();
        let (text, ranges) = template.answers(&turns).unwrap();
        ranges.into_iter().map(|range| text[range].to_owned()).collect()
    }

    /// As DeepSeek R1 does: the prompt opens a thought, and the whole text has none.
    #[test]
    fn an_answer_is_not_found_in_its_question() {
        let source = "{% for m in messages %}{{ '<U>' if m.role == 'user' else '<A>' }}{{ m.content.split('</think>')[-1] }}\
                      {{ '<end>' if m.role == 'assistant' }}{% endfor %}{{ '<A><think>\n' if add_generation_prompt }}";
        let turns = [("user", "yes or no?"), ("assistant", "yes"), ("user", "<A or yes?"), ("assistant", "<A")];
        assert_eq!(said(source, "<end>", &turns), ["yes<end>", "<A<end>"]);
        let alike = [("user", "<A?"), ("assistant", "<A"), ("user", "why <A?"), ("assistant", "<A")];
        assert_eq!(said(source, "<end>", &alike), ["<A<end>", "<A<end>"]);
        let thought = [("user", "4 + 7 = 11?"), ("assistant", "<think>\nbecause\n</think>\n\n11"), turns[2], turns[3]];
        assert_eq!(said(source, "<end>", &thought), ["\n\n11<end>", "<A<end>"]);
    }

    /// As Qwen 3 does, with one answer twice: thoughts of earlier turns are left out.
    #[test]
    fn an_answer_with_its_thought_is_not_found_in_a_later_turn() {
        let source = "{% for m in messages %}<{{ m.role }}>{{ m.content if loop.last else m.content.split('</think>')[-1].strip() }}\
                      <end>{% endfor %}{{ '<assistant>' if add_generation_prompt }}";
        let yes = ("assistant", "<think>\n\n</think>\n\nyes");
        let turns = [("user", "a"), yes, ("user", "b"), yes];
        assert_eq!(said(source, "", &turns), ["yes<end>", "<think>\n\n</think>\n\nyes<end>"]);
    }

    /// As Qwen 3 does: an answer that is not the last loses its empty thought, be it calls or words.
    #[test]
    fn calls_are_found_with_their_ends() {
        let source = "{% if tools %}{{ tools | tojson }}\n{% endif %}{% for m in messages %}<{{ m.role }}>\
                      {{ '<think></think>' if loop.last and m.role == 'assistant' }}{{ m.content }}\
                      {% for call in m.tool_calls %}<call>{{ call.function | tojson }}</call>{% endfor %}<end>{% endfor %}\
                      {{ '<assistant><prompt>' if add_generation_prompt }}";
        let template = |source: &str| ChatTemplate::new(Path::new("t.jinja"), source, "", "").unwrap();
        let function = serde_json::json!({"name": "sum", "arguments": {"b": [1, 2.5], "a": "é"}});
        let tools = [serde_json::json!({"type": "function", "function": {"name": "sum"}})];
        let mut turns = talk();
        turns[1].content = String::new();
        turns[1].rest.insert("tool_calls".into(), serde_json::json!([{"function": function}]));
        turns[2].role = "tool".into();
        let whole = Dialogue { messages: &turns, tools: &tools };
        let (text, ranges) = template(source).answers(whole).unwrap();
        let tools_text = r#"{"type": "function", "function": {"name": "sum"}}"#;
        let call = r#"<call>{"name": "sum", "arguments": {"b": [1, 2.5], "a": "é"}}</call><end>"#;
        assert_eq!(
            text,
            format!("[{tools_text}]\n<user>a<end><assistant>{call}<tool>c<end><assistant><think></think>b<end>")
        );
        // What only begins as the prompt does is the answer's.
        let said: Vec<&str> = ranges.into_iter().map(|range| &text[range]).collect();
        assert_eq!(said, [call, "<think></think>b<end>"]);
        let (text, ranges) = template(&source.replace("<prompt>", "")).answers(whole).unwrap();
        assert!(ranges.into_iter().map(|range| &text[range]).eq([call, "<think></think>b<end>"]));

        let silent = template(CHATML);
        for (dialogue, key) in [(whole, "`tools` with"), (whole.messages.into(), "`tool_calls` with")] {
            assert!(silent.render(dialogue, false).unwrap_err().to_string().contains(key));
        }
    }

    /// As Mistral does: tools come before the last question, so that texts up to an answer begin otherwise than the whole.
    #[test]
    fn answers_are_found_behind_what_moves() {
        let source = "{% set ns = namespace(last=0) %}{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index %}\
                      {% endif %}{% endfor %}{% for m in messages %}{{ '[TOOLS]' if loop.index == ns.last }}{% if m.role == 'user' %}\
                      [INST]{{ m.content }}[/INST]{% elif m.role == 'tool' %}[R]{{ m.content }}[/R]{% else %} {{ m.content }}</s>\
                      {% endif %}{% endfor %}";
        let turns =
            [("user", "yes or no?"), ("tool", "yes"), ("assistant", "yes"), ("user", "no?"), ("assistant", "no")];
        assert_eq!(said(source, "</s>", &turns), [" yes</s>", " no</s>"]);
    }

    /// A template may say itself what is the assistant's.
    #[test]
    fn marked_answers_are_taken() {
        let source = "{% for m in messages %}{{ m.role }}:\n{% if m.role == 'assistant' %}\n  {%- generation %}\n  {{ m.content }};\n\
                      {% endgeneration %}\n{% else %} {{ m.content }}.{% endif %}{% endfor %}";
        let template = ChatTemplate::new(Path::new("t.jinja"), source, "", "").unwrap();
        let (text, ranges) = template.answers(&talk()).unwrap();
        assert_eq!(text, template.render(&talk(), false).unwrap());
        assert_eq!(text, "user:\n a.assistant:\n  b;\nuser:\n c.assistant:\n  b;\n");
        assert!(ranges.iter().all(|range| &text[range.clone()] == "  b;\n"), "{ranges:?}");
        assert_eq!(ranges.len(), 2);
    }

    /// As Phi 3 does: what closes a text is not there once it goes on.
    #[test]
    fn end_marks_of_earlier_answers_are_theirs() {
        let source = "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}\
                      {{ '<|assistant|>\n' if add_generation_prompt else eos_token }}";
        let turns = [("user", "a"), ("assistant", "\nline\n\n"), ("user", "c"), ("assistant", "d")];
        assert_eq!(said(source, "</s>", &turns), ["\nline\n\n<|end|>\n", "d<|end|>\n</s>"]);
    }

    #[test]
    fn reasoning_goes_to_the_template() {
        let source =
            "{% for m in messages %}{{ m.reasoning_content if m.reasoning_content is string else '-' }}{% endfor %}";
        let template = ChatTemplate::new(Path::new("t.jinja"), source, "", "").unwrap();
        let mut turns = talk();
        turns[3].reasoning_content = Some("because".to_owned());
        assert_eq!(template.render(&turns, false).unwrap(), "---because");
    }

    #[test]
    fn tests_and_filters_are_pythons() {
        let text = |source: &str| {
            ChatTemplate::new(Path::new("t.jinja"), source, "", "").unwrap().render(&talk(), false).unwrap()
        };
        for (source, want) in [
            (
                "{{ tools is iterable }} {{ 'x' is iterable }} {{ {} is iterable }} {{ 3 is iterable }}",
                "False True True False",
            ),
            (
                "{{ 'x' is sequence }} {{ {} is sequence }} {{ [] is sequence }} {{ none is sequence }}",
                "True True True False",
            ),
            (
                "{{ ''|default('a', true) }}{{ ''|default('b', boolean=true) }}{{ ''|d('c') }}{{ x|default('d') }}",
                "abd",
            ),
            (
                "{{ x|default(none) is none }} {{ 0|default('e', 1) }} {{ x|default(default_value=none) }}",
                "True e None",
            ),
            ("{{ {'b': 'é', 'a': [1]}|tojson(sort_keys=true, separators=(',', ':')) }}", r#"{"a":[1],"b":"é"}"#),
            ("{{ ['é🙂']|tojson(ensure_ascii=true) }}", r#"["\u00e9\ud83d\ude42"]"#),
        ] {
            assert_eq!(text(source), want, "{source}");
        }
    }

    /// As Qwen 3 does: what was thought is written for the last turn only.
    #[test]
    fn answers_are_found_where_earlier_turns_change() {
        let source = "{% for m in messages %}<{{ m.role }}>{% if m.role == 'assistant' and loop.last %}<think>\n\n\
                      </think>\n{% endif %}{{ m.content.strip() }}<end>{% endfor %}{% if add_generation_prompt %}\
                      <assistant>{% endif %}";
        let template = ChatTemplate::new(Path::new("t.jinja"), source, "", "").unwrap();
        let (text, ranges) = template.answers(&talk()).unwrap();
        let said: Vec<&str> = ranges.iter().map(|range| &text[range.clone()]).collect();
        assert_eq!(said, ["b<end>", "<think>\n\n</think>\nb<end>"]);
    }

    #[test]
    fn what_a_template_refuses_is_one_line() {
        let template =
            ChatTemplate::new(Path::new("t.jinja"), "{{ raise_exception('roles must\nalternate') }}", "", "").unwrap();
        let e = template.render(&talk(), false).unwrap_err();
        assert!(e.to_string().contains("roles must alternate"), "{e}");
        assert!(
            ChatTemplate::new(Path::new("t.jinja"), "{% for %}", "", "").unwrap_err().to_string().contains("line 1")
        );
    }

    #[test]
    fn extensions_are_those_of_transformers() {
        let render = |source: &str| {
            ChatTemplate::new(Path::new("t.jinja"), source, "<s>", "</s>").unwrap().render(&talk(), false).unwrap()
        };
        assert_eq!(render("{{ bos_token }}{% generation %}x{% endgeneration %}{{ eos_token }}"), "<s>x</s>");
        assert_eq!(render("{{ messages[0] | tojson }}"), r#"{"role": "user", "content": "a"}"#);
        assert_eq!(render("{{ [1, '<é>'] | tojson(indent=2) }}"), "[\n  1,\n  \"<é>\"\n]");
        assert_eq!(
            render("{% for m in messages %}{% if loop.index > 2 %}{% break %}{% endif %}{{ m.role[0] }}{% endfor %}"),
            "ua"
        );
        assert_eq!(render("{{ messages[0].content.startswith('a') and tools is none }}"), "True");
    }

    #[test]
    fn namespaces_hold_what_is_set() {
        let render = |source: &str| {
            ChatTemplate::new(Path::new("t.jinja"), source, "<s>", "</s>").unwrap().render(&talk(), false).unwrap()
        };
        let namespace = "{% set ns = namespace(text='', list=[], last=none) %}";
        for (source, text) in [
            ("{%- set ns.text = ns.text ~ '%}' + \"-%}\" -%} {{ ns.text }}", "%}-%}"),
            (
                "{% for m in messages %}{% set ns.list = ns.list + [m.role[0]] %}{% endfor %}{{ ns.list }}",
                "['u', 'a', 'u', 'a']",
            ),
            (
                "{%- set ns.last = messages[-1] %}{{ ns.last.content }}{{ ns.last | tojson }}",
                r#"b{"role": "assistant", "content": "b"}"#,
            ),
            ("{%+ set ns.a, ns.b = 1, 2 +%}{{ ns.a + ns.b }}", "3"),
            ("{% set (ns.a, b) = (messages[1:], 2) %}{{ ns.a | length + b }}", "5"),
            ("{% set ns.a %}<{{ 1 }}>{% endset %}{{ ns.a }}{{ ns.none is defined }}", "<1>False"),
            (
                "{% set ns.a = ns.missing %}{{ ns.a is defined }}{{ 'a.b = c' }}{% set x = ns.text == '' %}{{ x }}",
                "Falsea.b = cTrue",
            ),
        ] {
            assert_eq!(render(&format!("{namespace}{source}")), text, "{source}");
        }
    }
}
