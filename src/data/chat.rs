//! Conversations and chat templates: the messages of a dialogue, and the Jinja template of a checkpoint that makes text
//! of them, with the extensions that transformers gives its templates.
//!
//! What the text of a template becomes in training is in `sft.rs`; the fixed styles are in `prompt.rs`.

use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::LazyLock;

use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Kwargs, Rest, Value, ValueKind};
use minijinja::{Environment, ErrorKind, context};
use regex::Regex;
use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};
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
}

impl Message {
    /// A message of `role`.
    #[must_use]
    pub fn new(role: &str, content: &str) -> Self {
        Self { role: role.to_owned(), content: content.to_owned(), reasoning_content: None }
    }

    /// Whether the model says it.
    #[must_use]
    pub fn is_answer(&self) -> bool {
        self.role == "assistant"
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
/// Lists in lists that an attribute of a namespace may hold: a namespace outlives the turns of a loop, so that without
/// a limit a value could get as deep as the loop is long, and hold itself.
const DEEPEST: usize = 16;
/// Items that it may hold.
const MOST_ITEMS: usize = 100_000;
/// Instructions that one text may take, of which a turn of a dialogue takes about a hundred; each 64 bytes that one makes
/// count as another.
const FUEL: u64 = 2_000_000;
/// Longest text.
const LONGEST_TEXT: usize = 64 << 20;
/// Widest indentation of `tojson`.
const WIDEST: usize = 64;

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
        environment.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
        environment.add_function("raise_exception", |text: String| -> std::result::Result<Value, minijinja::Error> {
            Err(minijinja::Error::new(ErrorKind::InvalidOperation, text))
        });
        environment.add_function("strftime_now", |format: &str| strftime(format, chrono::Local::now().naive_local()));
        environment.add_filter("tojson", to_json);
        environment.add_filter("default", or_default);
        environment.add_filter("d", or_default);
        // As Python has them: none is neither, texts and maps are both.
        let iterable = |kind| matches!(kind, ValueKind::Iterable | ValueKind::Undefined);
        let sequence = |kind| matches!(kind, ValueKind::Seq | ValueKind::Map | ValueKind::String);
        environment.add_test("sequence", move |value: &Value| sequence(value.kind()));
        environment.add_test("iterable", move |value: &Value| iterable(value.kind()) || sequence(value.kind()));
        environment.add_function(PLAIN, |value: Value| plain(&value, DEEPEST, &mut { MOST_ITEMS }));
        let text = plain_assignments(&without_generation_tags(source));
        let compile = || environment.add_template_owned(NAME, text).map(|()| environment);
        let environment = deep(compile).and_then(|compiled| compiled).map_err(|e| broken(path, &e))?;
        let (path, bos_token, eos_token) = (path.to_owned(), bos_token.to_owned(), eos_token.to_owned());
        Ok(Self { environment, path, short: source.len() <= SHORT, bos_token, eos_token })
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

    /// Text of `messages`, as transformers' `apply_chat_template` gives it; with `add_generation_prompt` it ends where
    /// the answer begins.
    ///
    /// # Errors
    /// What the template refuses, such as two user turns in a row.
    pub fn render(&self, messages: &[Message], add_generation_prompt: bool) -> Result<String> {
        let template = self.environment.get_template(NAME).map_err(|e| broken(&self.path, &e))?;
        let (bos_token, eos_token) = (&self.bos_token, &self.eos_token);
        let value = |m: &Message| {
            let thought = m.reasoning_content.as_deref().map(|thought| ("reasoning_content", thought));
            Value::from_pairs([("role", m.role.as_str()), ("content", m.content.as_str())].into_iter().chain(thought))
        };
        let (none, messages) = (Value::from(()), messages.iter().map(value).collect::<Vec<Value>>());
        let mut text = Limited(Vec::new());
        let known = context! {
            messages, add_generation_prompt, bos_token, eos_token, tools => none.clone(), documents => none
        };
        let render = || template.render_captured_to(known, &mut text).map(drop);
        let rendered = if self.short { render() } else { deep(render).and_then(|rendered| rendered) };
        rendered.map_err(|e| broken(&self.path, &e))?;
        Ok(String::from_utf8_lossy(&text.0).into_owned())
    }

    /// Text of a whole conversation, and the byte ranges of it that the assistant says, its end-of-turn marks included.
    ///
    /// # Errors
    /// As [`ChatTemplate::render`]; `Unsupported` if the template writes earlier turns so differently that an answer
    /// cannot be found in the whole text.
    pub fn answers(&self, messages: &[Message]) -> Result<(String, Vec<Range<usize>>)> {
        let text = self.render(messages, false)?;
        let mut ranges = Vec::new();
        for (i, message) in messages.iter().enumerate().filter(|(_, message)| message.is_answer()) {
            let before = self.render(&messages[..i], true)?;
            let upto = self.render(&messages[..=i], false)?;
            let from = ranges.last().map_or(0, |range: &Range<usize>| range.end);
            let upto = Rendered { text: &upto, closing: &self.eos_token };
            let range = answer_in(&text, from, &before, upto, &message.content).ok_or_else(|| {
                let what = format!("masking turn {} with this chat template, which rewrites earlier turns", i + 1);
                Error::unsupported(what, "train on all turns: --data.mask_prompt false")
            })?;
            ranges.push(range);
        }
        Ok((text, ranges))
    }
}

/// A dialogue up to an answer, behind which a template may write `closing` that is not there once others follow.
#[derive(Clone, Copy)]
struct Rendered<'a> {
    text: &'a str,
    closing: &'a str,
}

/// Where an answer stands in `text`: from the end of the prompt `before` to the end of `upto`. A template may write a
/// turn differently once others follow it, or than its prompt has it (reasoning is left out of earlier turns): then the
/// answer's own words, or those behind its reasoning, and what stood behind them are looked for.
fn answer_in(text: &str, from: usize, before: &str, upto: Rendered<'_>, content: &str) -> Option<Range<usize>> {
    let said = [content.trim(), content.rsplit("</think>").next().unwrap_or_default().trim()];
    // The whole, where both begin at one place.
    let found = |at: usize| {
        let places = said.iter().filter_map(|said| Some((at + text.get(at..)?.find(said)?, *said)));
        places.min_by_key(|(at, _)| *at)
    };
    let shared = common_prefix(text, before);
    let start = if shared == before.len() && shared >= from {
        shared
    } else {
        // The answer may begin as what the prompt has in its place.
        let earlier = found(from.max(boundary(text, shared.saturating_sub(content.len()))));
        let across = earlier.filter(|(at, said)| *at <= shared && shared < at + said.len());
        across.or_else(|| found(from.max(shared)))?.0
    };
    if text.starts_with(upto.text) && upto.text.len() >= start {
        return Some(start..upto.text.len());
    }
    let (at, said) = found(start)?;
    let end = at + said.len();
    let behind = upto.text.rfind(said).map_or("", |at| &upto.text[at + said.len()..]);
    let open = behind.strip_suffix(upto.closing).unwrap_or(behind);
    let goes_on = [behind, open].into_iter().find(|behind| text[end..].starts_with(behind));
    Some(start..end + goes_on.map_or(0, str::len))
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
        let thread = std::thread::Builder::new().stack_size(STACK).spawn_scoped(scope, work).map_err(|_| failed())?;
        thread.join().map_err(|_| failed())
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

/// transformers' `{% generation %}` marks the answers and prints nothing; here it is a block that is always entered.
fn without_generation_tags(source: &str) -> String {
    static BEGIN: LazyLock<Option<Regex>> = LazyLock::new(|| Regex::new(r"\{%([-+]?)\s*generation\s*([-+]?)%\}").ok());
    static END: LazyLock<Option<Regex>> = LazyLock::new(|| Regex::new(r"\{%([-+]?)\s*endgeneration\s*([-+]?)%\}").ok());
    let Some((begin, end)) = BEGIN.as_ref().zip(END.as_ref()) else { return source.to_owned() };
    let source = begin.replace_all(source, "{%$1 if true $2%}");
    end.replace_all(&source, "{%$1 endif $2%}").into_owned()
}

/// Name of the function through which values go into namespaces.
const PLAIN: &str = "_plain";

/// `{% set namespace.name = value %}` with the value made [`plain`].
fn plain_assignments(source: &str) -> String {
    static SET: LazyLock<Option<Regex>> = LazyLock::new(|| Regex::new(r"\{%[-+]?\s*set\s+([\w\s.,()]*)=").ok());
    let dotted = SET.iter().flat_map(|set| set.captures_iter(source)).filter(|found| found[1].contains('.'));
    let (mut text, mut at) = (String::with_capacity(source.len()), 0);
    for begin in dotted.filter_map(|found| Some(found.get(0)?.end())) {
        // What looks like a tag inside of another is text.
        if begin < at {
            continue;
        }
        let Some(end) = end_of_tag(source, begin) else { break };
        text.extend([&source[at..begin], " ", PLAIN, "((", &source[begin..end], ")) "]);
        at = end;
    }
    text + &source[at..]
}

/// Where the tag ends in which byte `begin` stands, without the sign that trims blanks; texts in quotes are not looked
/// into.
fn end_of_tag(source: &str, begin: usize) -> Option<usize> {
    let bytes = source.as_bytes();
    let (mut quote, mut i) = (None, begin);
    while i < bytes.len() {
        match (quote, bytes[i]) {
            (Some(_), b'\\') => i += 1,
            (Some(open), byte) if byte == open => quote = None,
            (None, byte @ (b'"' | b'\'')) => quote = Some(byte),
            (None, b'%') if bytes.get(i + 1) == Some(&b'}') => {
                return Some(if matches!(bytes[i - 1], b'-' | b'+') { i - 1 } else { i });
            }
            _ => {}
        }
        i += 1;
    }
    None
}

/// A copy of `value` with `depth` lists or maps in each other at most, and `room` items in all.
fn plain(value: &Value, depth: usize, room: &mut usize) -> std::result::Result<Value, minijinja::Error> {
    let kind = value.kind();
    if !matches!(kind, ValueKind::Seq | ValueKind::Iterable | ValueKind::Map) {
        return Ok(value.clone());
    }
    let refused = |what: String| minijinja::Error::new(ErrorKind::InvalidOperation, format!("a namespace with {what}"));
    let Some(inner) = depth.checked_sub(1) else {
        return Err(refused(format!("over {DEEPEST} lists in each other")));
    };
    let mut item = |value: &Value| {
        *room = room.checked_sub(1).ok_or_else(|| refused(format!("over {MOST_ITEMS} items")))?;
        plain(value, inner, room)
    };
    if kind == ValueKind::Map {
        let pairs = value.try_iter()?.map(|key| Ok((key.clone(), item(&value.get_item(&key)?)?)));
        let pairs = pairs.collect::<std::result::Result<Vec<(Value, Value)>, minijinja::Error>>()?;
        return Ok(Value::from_pairs(pairs));
    }
    value.try_iter()?.map(|value| item(&value)).collect::<std::result::Result<Vec<Value>, _>>().map(Value::from)
}

/// Jinja's `default`: for what is not defined, or with `boolean` for all that is false.
fn or_default(value: &Value, given: Rest<Value>, options: Kwargs) -> std::result::Result<Value, minijinja::Error> {
    let argument = |at: usize, name: &str| match given.get(at) {
        None if options.has(name) => options.get::<Value>(name).map(Some),
        given => Ok(given.cloned()),
    };
    let other = argument(0, "default_value")?.unwrap_or_else(|| Value::from(""));
    let also_false = argument(1, "boolean")?.is_some_and(|flag| flag.is_true());
    options.assert_all_used()?;
    Ok(if value.is_undefined() || (also_false && !value.is_true()) { other } else { value.clone() })
}

/// How `tojson` writes.
struct Json {
    indent: Option<usize>,
    /// Between items, and between a key and its value.
    separators: [String; 2],
    sorted: bool,
    ascii: bool,
}

/// `json.dumps(value, ensure_ascii=False)` as transformers has it: not escaped for HTML, blanks behind `,` and `:`.
fn to_json(value: &Value, options: Kwargs) -> std::result::Result<Value, minijinja::Error> {
    let refused = |what: String| minijinja::Error::new(ErrorKind::InvalidOperation, what);
    let indent: Option<usize> = options.get("indent")?;
    if indent.is_some_and(|width| width > WIDEST) {
        return Err(refused(format!("an indent of more than {WIDEST}")));
    }
    let separators = match options.get::<Option<Vec<String>>>("separators")? {
        Some(given) => given.try_into().map_err(|_| refused("separators are two texts".to_owned()))?,
        None => [if indent.is_some() { "," } else { ", " }, ": "].map(str::to_owned),
    };
    let flag = |name: &str| Ok::<bool, minijinja::Error>(options.get::<Option<bool>>(name)?.unwrap_or(false));
    let json = Json { indent, separators, sorted: flag("sort_keys")?, ascii: flag("ensure_ascii")? };
    options.assert_all_used()?;
    let tree =
        serde_json::to_value(value).map_err(|e| minijinja::Error::new(ErrorKind::BadSerialization, e.to_string()))?;
    let mut text = String::new();
    json.write(&tree, 0, &mut text);
    Ok(Value::from_safe_string(text))
}

impl Json {
    fn write(&self, value: &serde_json::Value, depth: usize, out: &mut String) {
        match value {
            serde_json::Value::Array(list) => {
                self.items(['[', ']'], list.iter().map(|item| (None, item)).collect(), depth, out);
            }
            serde_json::Value::Object(object) => {
                let mut items: Vec<_> = object.iter().map(|(key, item)| (Some(key), item)).collect();
                if self.sorted {
                    items.sort_by_key(|(key, _)| *key);
                }
                self.items(['{', '}'], items, depth, out);
            }
            other => self.scalar(other, out),
        }
    }

    fn items(
        &self,
        [open, close]: [char; 2],
        items: Vec<(Option<&String>, &serde_json::Value)>,
        depth: usize,
        out: &mut String,
    ) {
        let line = |depth: usize| self.indent.map_or_else(String::new, |n| format!("\n{}", " ".repeat(n * depth)));
        out.push(open);
        for (i, (key, item)) in items.iter().enumerate() {
            out.push_str(if i > 0 { &self.separators[0] } else { "" });
            out.push_str(&line(depth + 1));
            if let Some(key) = key {
                self.scalar(&serde_json::Value::String((*key).clone()), out);
                out.push_str(&self.separators[1]);
            }
            self.write(item, depth + 1, out);
        }
        if !items.is_empty() {
            out.push_str(&line(depth));
        }
        out.push(close);
    }

    fn scalar(&self, value: &serde_json::Value, out: &mut String) {
        let text = value.to_string();
        if !self.ascii {
            return out.push_str(&text);
        }
        for c in text.chars() {
            if c.is_ascii() {
                out.push(c);
            } else {
                c.encode_utf16(&mut [0; 2]).iter().for_each(|unit| out.push_str(&format!("\\u{unit:04x}")));
            }
        }
    }
}

/// A time in Python's `strftime` format; a local time says nothing of its zone.
fn strftime(format: &str, at: chrono::NaiveDateTime) -> std::result::Result<String, minijinja::Error> {
    use chrono::format::{Fixed, Item, StrftimeItems};
    use std::fmt::Write;
    // Python's fractions are microseconds.
    let format = format.split("%%").map(|part| part.replace("%f", "%6f")).collect::<Vec<_>>().join("%%");
    let zone = |item: &Item<'_>| matches!(item, Item::Fixed(Fixed::TimezoneName | Fixed::TimezoneOffset));
    let items: Vec<Item<'_>> = StrftimeItems::new(&format).filter(|item| !zone(item)).collect();
    let refused =
        || minijinja::Error::new(ErrorKind::InvalidOperation, format!("strftime_now with the format {format:?}"));
    let mut text = String::new();
    if items.contains(&Item::Error) || write!(text, "{}", at.format_with_items(items.into_iter())).is_err() {
        return Err(refused());
    }
    Ok(text)
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
        assert_eq!(said(source, "<end>", &thought), ["11<end>", "<A<end>"]);
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

    #[test]
    fn dates_are_written_as_by_strftime() {
        let at = chrono::DateTime::from_timestamp(1_709_210_096, 0).unwrap().naive_utc();
        let text = strftime("%d %b %Y %A %H:%M:%S %% %-d %y %j %e %p %I %F", at).unwrap();
        assert_eq!(text, "29 Feb 2024 Thursday 12:34:56 % 29 24 060 29 PM 12 2024-02-29");
        assert_eq!(strftime("%H%z%Z %f %%f", at).unwrap(), "12 000000 %f");
        for format in ["%Q", "%+"] {
            assert!(strftime(format, at).unwrap_err().to_string().contains(format));
        }
    }
}
