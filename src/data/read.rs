//! Dataset files: `.json` lists, `.jsonl` lines, `.csv` and `.parquet` tables to records, with errors that say which row
//! is wrong.
//!
//! The form of the user's own rows is told by the keys of the first; then every row must have it.

use std::path::Path;

use serde_json::{Map, Number, Value};

use super::chat::{Message, TOOL_CALLS};
use super::registry::{ALPACA_KEYS, Keys};
use super::{Content, Origin, Record, parquet};
use crate::error::{Error, Result};

/// Layout of a dataset file.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Layout {
    List,
    Lines,
    Table,
    Columns,
}

impl Layout {
    fn of(path: &Path) -> Option<Self> {
        match path.extension()?.to_str()?.to_ascii_lowercase().as_str() {
            "json" => Some(Self::List),
            "jsonl" | "ndjson" => Some(Self::Lines),
            "csv" => Some(Self::Table),
            "parquet" => Some(Self::Columns),
            _ => None,
        }
    }
}

/// What the rows of a file are.
pub(super) enum Form {
    /// Instructions with these keys.
    Keys(Keys),
    /// Conversations, of which single answers are learned, each with the turn before it.
    Turns {
        /// Key of the list of turns.
        key: &'static str,
        /// All answers of a conversation, not only the first.
        all: bool,
    },
    /// Whatever the first row shows, its keys renamed: (what it is called here, what it is called in the file).
    Any {
        /// From [`columns`].
        renamed: Vec<(String, String)>,
    },
}

/// The form of one row.
enum Shape {
    Instruction(Keys),
    /// Under this key.
    Conversation(&'static str),
    Text,
}

const fn pair(instruction: &'static str, output: &'static str) -> Keys {
    Keys { instruction, input: None, output }
}

/// Names of an instruction and its answer, in the order in which they are looked for.
const PAIRS: &[Keys] = &[
    ALPACA_KEYS,
    Keys { instruction: "instruction", input: Some("context"), output: "response" },
    pair("prompt", "completion"),
    pair("prompt", "response"),
    pair("question", "answer"),
    pair("inputs", "targets"),
];

/// Key of an instruction's own system prompt, which LitGPT hands to the prompt style, too.
const SYS_PROMPT: &str = "sys_prompt";

/// Keys under which a list of turns may stand.
const TURNS: &[&str] = &["messages", "conversations", "conversation"];

impl Shape {
    /// `None` if the keys are those of no form.
    fn of(object: &Map<String, Value>) -> Option<Self> {
        let is_list =
            |value: &Value| value.is_array() || value.as_str().is_some_and(|t| t.trim_start().starts_with('['));
        if let Some(key) = TURNS.iter().find(|key| object.get(**key).is_some_and(is_list)) {
            return Some(Self::Conversation(key));
        }
        let has = |keys: &&Keys| object.contains_key(keys.instruction) && object.contains_key(keys.output);
        if let Some(keys) = PAIRS.iter().find(has) {
            return Some(Self::Instruction(*keys));
        }
        object.get("text").is_some_and(Value::is_string).then_some(Self::Text)
    }
}

/// Reads `instruction=question,output=answer`.
///
/// # Errors
/// `Usage` if it is not of that form.
pub(super) fn columns(text: &str) -> Result<Vec<(String, String)>> {
    let one = |part: &str| {
        let (ours, theirs) = part.split_once('=')?;
        let (ours, theirs) = (ours.trim(), theirs.trim());
        (!ours.is_empty() && !theirs.is_empty()).then(|| (ours.to_owned(), theirs.to_owned()))
    };
    text.split(',').map(one).collect::<Option<_>>().ok_or_else(|| {
        let hint = "write what the rows are to be called and what the file calls it: \
                    --data.columns instruction=question,output=answer";
        Error::usage(format!("data.columns: cannot read `{text}`"), hint)
    })
}

/// What a number in [`Origin::row`] counts in this file.
pub(super) fn unit(path: &Path) -> &'static str {
    if matches!(Layout::of(path), Some(Layout::Lines | Layout::Table)) { "line" } else { "row" }
}

/// All records of a file.
///
/// # Errors
/// `Io` if it cannot be read, `Invalid` if it is no such file, has no rows or any row is broken.
pub(super) fn records(path: &Path, file: usize, form: &Form) -> Result<Vec<Record>> {
    let Some(layout) = Layout::of(path) else {
        let hint = "rename it, or save it in one of these forms";
        return Err(Error::invalid(path, "not a .json, .jsonl, .csv or .parquet file", hint));
    };
    let text = || text_of(path, std::fs::read(path).map_err(Error::io("read", path))?);
    let mut values = match layout {
        Layout::List => parse_list(path, &text()?)?,
        Layout::Lines => parse_lines(path, &text()?)?,
        Layout::Table => parse_table(path, &text()?)?,
        Layout::Columns => parquet::rows(path)?,
    };
    if values.is_empty() {
        return Err(Error::invalid(path, "the dataset has no rows", ""));
    }
    let shape = match form {
        Form::Keys(keys) => Shape::Instruction(*keys),
        Form::Turns { key, .. } => Shape::Conversation(key),
        Form::Any { renamed } => {
            values.iter_mut().filter_map(|(_, value)| value.as_object_mut()).for_each(|row| rename(row, renamed));
            let first = values.iter().find_map(|(_, value)| value.as_object());
            first.and_then(Shape::of).unwrap_or(Shape::Instruction(ALPACA_KEYS))
        }
    };
    let mut records = Vec::with_capacity(values.len());
    let mut problems = Vec::new();
    for (row, value) in values {
        match content(value, &shape) {
            Ok(content) => records.push(Record { content, row: Origin { file, row } }),
            Err(problem) => problems.push(format!("{} {row}: {problem}", unit(path))),
        }
    }
    let Some(first) = problems.first() else {
        return Ok(match form {
            Form::Turns { all, .. } => records.into_iter().flat_map(|record| exchanges(record, *all)).collect(),
            _ => records,
        });
    };
    let more = match problems.len() {
        1 => String::new(),
        n => format!("; {} more rows are broken too", n - 1),
    };
    let own = matches!(form, Form::Any { .. });
    Err(Error::invalid(path, format!("{first}{more}"), hint(&shape, own)))
}

fn hint(shape: &Shape, own: bool) -> String {
    let row = match shape {
        Shape::Instruction(keys) => {
            let input = keys.input.map_or_else(String::new, |key| format!(", optional `{key}`"));
            format!("a row is an object with the texts `{}` and `{}`{input}", keys.instruction, keys.output)
        }
        Shape::Conversation(key) => {
            format!("a row has `{key}`, a list of {{\"role\", \"content\"}} or {{\"from\", \"value\"}}")
        }
        Shape::Text => "a row is an object with a `text`".to_owned(),
    };
    let other = "other forms: messages, conversations, prompt and completion, question and answer, text; rename keys \
                 with --data.columns instruction=KEY,output=KEY";
    if own { format!("{row}; {other}") } else { row }
}

/// Gives the values of a row the names that are read here.
fn rename(row: &mut Map<String, Value>, renamed: &[(String, String)]) {
    let values: Vec<_> = renamed.iter().filter_map(|(ours, theirs)| Some((ours, row.remove(theirs)?))).collect();
    for (ours, value) in values {
        row.insert(ours.clone(), value);
    }
}

/// The content as text, if it is UTF-8 without a byte order mark.
fn text_of(path: &Path, bytes: Vec<u8>) -> Result<String> {
    let hint = "save it as UTF-8 without a byte order mark";
    if bytes.is_empty() {
        return Err(Error::invalid(path, "the file is empty", ""));
    }
    if bytes.starts_with(&[0xef, 0xbb, 0xbf]) {
        return Err(Error::invalid(path, "starts with a UTF-8 byte order mark", hint));
    }
    if bytes.starts_with(&[0xff, 0xfe]) || bytes.starts_with(&[0xfe, 0xff]) || bytes.iter().take(4).any(|&b| b == 0) {
        return Err(Error::invalid(path, "looks like UTF-16 or UTF-32, not UTF-8", hint));
    }
    String::from_utf8(bytes).map_err(|e| {
        let good = e.utf8_error().valid_up_to();
        let line = 1 + e.as_bytes()[..good].iter().filter(|&&b| b == b'\n').count();
        Error::invalid(path, format!("line {line}: not UTF-8 text"), hint)
    })
}

fn parse_list(path: &Path, text: &str) -> Result<Vec<(usize, Value)>> {
    let value: Value = serde_json::from_str(text).map_err(|e| {
        let first_line = text.lines().next().unwrap_or_default();
        let is_lines = serde_json::from_str::<Map<String, Value>>(first_line).is_ok();
        let hint = if is_lines { "one object per line is the .jsonl form: rename the file to .jsonl" } else { "" };
        Error::invalid(path, not_json(&e, 0), hint)
    })?;
    match value {
        Value::Array(rows) => Ok((1..).zip(rows).collect()),
        Value::Object(object) => {
            let problem = format!("expected a list of rows, found one object ({})", found(&object));
            Err(Error::invalid(path, problem, "the file must be of the form [{...}, {...}]"))
        }
        other => {
            let problem = format!("expected a list of rows, found {}", kind(&other));
            Err(Error::invalid(path, problem, "the file must be of the form [{...}, {...}]"))
        }
    }
}

/// Blank lines are skipped, but counted.
fn parse_lines(path: &Path, text: &str) -> Result<Vec<(usize, Value)>> {
    let lines = (1..).zip(text.lines()).filter(|(_, line)| !line.trim().is_empty());
    lines
        .map(|(number, line)| {
            let value = serde_json::from_str(line).map_err(|e| {
                let is_list = text.trim_start().starts_with('[');
                let hint = if is_list { "a list is the .json form: rename the file to .json" } else { "" };
                Error::invalid(path, not_json(&e, number - 1), hint)
            })?;
            Ok((number, value))
        })
        .collect()
}

/// serde_json's message, with its place in front. `lines_before` are the lines before the text that it parsed.
fn not_json(e: &serde_json::Error, lines_before: usize) -> String {
    let text = e.to_string();
    let place = format!(" at line {} column {}", e.line(), e.column());
    let what = text.strip_suffix(&place).unwrap_or(&text).to_lowercase();
    format!("line {} column {}: not JSON: {what}", lines_before + e.line(), e.column())
}

/// Rows of a table with a header, by the line at which each begins.
fn parse_table(path: &Path, text: &str) -> Result<Vec<(usize, Value)>> {
    let broken = |e: &csv::Error| {
        let line = e.position().map_or(1, csv::Position::line);
        let problem = match e.kind() {
            csv::ErrorKind::UnequalLengths { expected_len, len, .. } => {
                format!("line {line}: {len} fields where the header has {expected_len}")
            }
            _ => format!("line {line}: not CSV"),
        };
        Error::invalid(path, problem, "the first line names the columns; quote fields that hold commas or line ends")
    };
    let mut reader = csv::Reader::from_reader(text.as_bytes());
    let header = reader.headers().map_err(|e| broken(&e))?.clone();
    if let Some(twice) = header.iter().enumerate().find_map(|(i, name)| header.iter().take(i).find(|n| *n == name)) {
        return Err(Error::invalid(path, format!("line 1: two columns are called `{twice}`"), "rename one of them"));
    }
    let row = |fields: csv::StringRecord| {
        let line = fields.position().map_or(0, csv::Position::line) as usize;
        let object = header.iter().zip(&fields).map(|(key, field)| (key.to_owned(), Value::from(field)));
        (line, Value::Object(object.collect()))
    };
    reader.records().map(|fields| fields.map(row).map_err(|e| broken(&e))).collect()
}

fn content(value: Value, shape: &Shape) -> std::result::Result<Content, String> {
    let Value::Object(mut object) = value else {
        return Err(format!("expected an object, found {}", kind(&value)));
    };
    match shape {
        Shape::Instruction(keys) => instruction(object, keys),
        Shape::Text => match object.remove("text") {
            Some(Value::String(text)) => Ok(Content::Text(text)),
            Some(other) => Err(format!("`text` must be a text, found {}", kind(&other))),
            None => Err(format!("no key `text` ({})", found(&object))),
        },
        Shape::Conversation(key) => {
            let turns = object.remove(*key).ok_or_else(|| format!("no key `{key}` ({})", found(&object)))?;
            let messages = conversation(key, list(key, turns)?)?;
            let tools = object.remove("tools").filter(is_given).map_or(Ok(Vec::new()), |tools| list("tools", tools))?;
            Ok(Content::Conversation { messages, tools })
        }
    }
}

/// A list, or the text of one.
fn list(key: &str, value: Value) -> std::result::Result<Vec<Value>, String> {
    match value {
        Value::Array(items) => Ok(items),
        Value::String(text) => serde_json::from_str(&text).map_err(|_| format!("`{key}` is not a list in JSON")),
        other => Err(format!("`{key}` must be a list, found {}", kind(&other))),
    }
}

/// The turns up to the last answer: what comes behind it teaches nothing.
fn conversation(key: &str, turns: Vec<Value>) -> std::result::Result<Vec<Message>, String> {
    let read = |(i, turn): (usize, Value)| {
        let at = |problem: String| format!("`{key}` turn {}: {problem}", i + 1);
        match turn {
            // A bare text: user and assistant take turns.
            Value::String(text) => Ok(Message::new(if i % 2 == 0 { "user" } else { "assistant" }, &text)),
            Value::Object(turn) => message(turn).map_err(at),
            other => Err(at(format!("expected an object, found {}", kind(&other)))),
        }
    };
    let mut messages: Vec<Message> = turns.into_iter().enumerate().map(read).collect::<std::result::Result<_, _>>()?;
    let last = messages.iter().rposition(Message::is_answer);
    messages.truncate(last.ok_or_else(|| format!("`{key}` has no turn of the assistant"))? + 1);
    Ok(messages)
}

/// The answers of a conversation, or the first, each as a record of its own with the turn before it as instruction.
fn exchanges(record: Record, all: bool) -> Vec<Record> {
    let messages = record.messages();
    let pairs = messages.windows(2).filter(|pair| pair[1].is_answer() && !pair[0].is_answer());
    let exchange = |pair: &[Message]| Record {
        content: Content::Instruction {
            instruction: pair[0].content.clone(),
            input: None,
            sys_prompt: None,
            output: pair[1].content.clone(),
        },
        row: record.row,
    };
    pairs.take(if all { usize::MAX } else { 1 }).map(exchange).collect()
}

/// Whether a value says anything.
fn is_given(value: &Value) -> bool {
    let empty = value.as_array().is_some_and(Vec::is_empty) || value.as_str().is_some_and(|s| matches!(s, "" | "[]"));
    !value.is_null() && !empty
}

/// Keys of a message's thoughts; the first that says something counts, as in transformers.
const THOUGHTS: [&str; 3] = ["reasoning_content", "thinking", "reasoning"];

fn message(mut turn: Map<String, Value>) -> std::result::Result<Message, String> {
    let calls = turn.remove(TOOL_CALLS).filter(is_given).map(|calls| list(TOOL_CALLS, calls)).transpose()?;
    let mut thoughts = THOUGHTS.iter().filter_map(|key| Some((key, turn.get(*key).filter(|value| !value.is_null())?)));
    let thought = match thoughts.next() {
        None => None,
        Some((_, Value::String(text))) => Some(text.clone()),
        Some((key, other)) => return Err(format!("`{key}` must be a text, found {}", kind(other))),
    };
    turn.remove(THOUGHTS[0]);
    let (role, content) = if turn.contains_key("from") { ("from", "value") } else { ("role", "content") };
    // Who calls a tool need not say anything. Templates write null or nothing there in different ways, or refuse it.
    if calls.is_some() && turn.get(content).is_none_or(Value::is_null) {
        turn.insert(content.to_owned(), Value::from(""));
    }
    let lacking: Vec<_> = [role, content].into_iter().filter(|key| !turn.contains_key(*key)).collect();
    if !lacking.is_empty() {
        return Err(format!("no `{}` ({})", lacking.join("`, `"), found(&turn)));
    }
    let role = match turn.remove(role) {
        Some(Value::String(role)) => role,
        other => return Err(format!("`{role}` must be a text, found {}", kind(&other.unwrap_or_default()))),
    };
    let role = match role.as_str() {
        "human" | "prompter" => "user",
        "gpt" | "chatgpt" | "bot" | "bard" | "model" => "assistant",
        other => other,
    };
    let text = match turn.remove(content) {
        Some(Value::String(text)) => text,
        Some(Value::Array(parts)) => {
            let text = |part: &Value| part.get("text").and_then(Value::as_str).map(str::to_owned);
            let texts: Option<Vec<String>> = parts.iter().map(text).collect();
            let texts = texts.ok_or_else(|| format!("`{content}` has a part that is no text"))?;
            texts.concat()
        }
        other => return Err(format!("`{content}` must be a text, found {}", kind(&other.unwrap_or_default()))),
    };
    turn.retain(|key, _| !matches!(key.as_str(), "role" | "content"));
    turn.extend(calls.map(|calls| (TOOL_CALLS.to_owned(), Value::Array(calls))));
    Ok(Message { reasoning_content: thought, rest: turn, ..Message::new(role, &text) })
}

fn instruction(mut object: Map<String, Value>, keys: &Keys) -> std::result::Result<Content, String> {
    let lacking: Vec<_> =
        [keys.instruction, keys.output].into_iter().filter(|&key| !object.contains_key(key)).collect();
    if !lacking.is_empty() {
        return Err(format!("no key `{}` ({})", lacking.join("`, `"), found(&object)));
    }
    let mut text = |key: &str| match object.get_mut(key).map(Value::take) {
        Some(Value::String(text)) => Ok(Some(text)),
        Some(Value::Number(number)) => as_python(&number).map(Some).ok_or_else(|| {
            format!("`{key}` is a number of more digits than are kept ({number}): put it in quotes, as a text")
        }),
        None | Some(Value::Null) => Ok(None),
        Some(other) => Err(format!("`{key}` must be a text, found {}", kind(&other))),
    };
    let instruction = text(keys.instruction)?.ok_or_else(|| format!("`{}` is null", keys.instruction))?;
    let output = text(keys.output)?.ok_or_else(|| format!("`{}` is null", keys.output))?;
    let input = keys.input.map(&mut text).transpose()?.flatten();
    let sys_prompt = text(SYS_PROMPT)?;
    Ok(Content::Instruction { instruction, input, sys_prompt, output })
}

/// A number as Python's `str` has it, which LitGPT's prompts are made with: `1.0`, `1e-05`. `None` for a whole one that was
/// read as a float because 64 bits do not hold it: digits of it may be lost.
fn as_python(number: &Number) -> Option<String> {
    const BEYOND: f64 = (1_u64 << 63) as f64;
    let Some(value) = number.as_f64().filter(|_| number.is_f64()) else { return Some(number.to_string()) };
    if value.abs() >= BEYOND {
        return None; // There are no fractions up there.
    }
    // The shortest digits that mean the same number, in both.
    let text = format!("{value:e}");
    let (digits, exponent) = text.split_once('e').unwrap_or((&text, "0"));
    Some(match exponent.parse::<i32>() {
        Ok(exponent) if !(-4..16).contains(&exponent) => {
            format!("{digits}e{}{:02}", if exponent < 0 { '-' } else { '+' }, exponent.abs())
        }
        _ => format!("{value:?}"),
    })
}

/// The keys of an object in words.
fn found(object: &Map<String, Value>) -> String {
    const SHOWN: usize = 8;
    if object.is_empty() {
        return "the object is empty".to_owned();
    }
    let mut keys: Vec<_> = object.keys().take(SHOWN).map(|key| key.chars().take(40).collect::<String>()).collect();
    if object.len() > SHOWN {
        keys.push(format!("{} more", object.len() - SHOWN));
    }
    format!("found: {}", keys.join(", ").replace(char::is_control, " "))
}

fn kind(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "true or false",
        Value::Number(_) => "a number",
        Value::String(_) => "a text",
        Value::Array(_) => "a list",
        Value::Object(_) => "an object",
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use serde_json::json;

    fn read(name: &str, content: &[u8]) -> Result<Vec<Record>> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(name);
        std::fs::write(&path, content).unwrap();
        records(&path, 0, &Form::Any { renamed: Vec::new() })
    }

    /// The problem alone, and the hint.
    fn fails(name: &str, content: impl AsRef<[u8]>) -> (String, String) {
        match read(name, content.as_ref()).unwrap_err() {
            Error::Invalid { problem, hint, .. } => {
                assert!(!problem.contains('\n'), "{problem}");
                (problem, hint)
            }
            other => panic!("{other}"),
        }
    }

    #[test]
    fn both_forms_give_the_same_records() {
        let a = r#"{"instruction": "i", "input": "x\n", "output": "o", "extra": 1}"#;
        let b = r#"{"instruction": "j", "input": null, "output": ""}"#;
        let list = read("d.json", format!("[{a},\n {b}]").as_bytes()).unwrap();
        let lines = read("d.jsonl", format!("{a}\r\n\n{b}\n\n").as_bytes()).unwrap();
        let content = |input: Option<&str>, instruction: &str, output: &str| Content::Instruction {
            instruction: instruction.into(),
            input: input.map(str::to_owned),
            sys_prompt: None,
            output: output.into(),
        };
        assert_eq!(list[0].content, content(Some("x\n"), "i", "o"));
        assert_eq!(list[1].content, content(None, "j", ""));
        assert_eq!(list.iter().map(|r| r.row.row).collect::<Vec<_>>(), [1, 2]);
        assert_eq!(lines.iter().map(|r| r.row.row).collect::<Vec<_>>(), [1, 3]);
        assert!(list.iter().zip(&lines).all(|(a, b)| a.content == b.content));
    }

    #[test]
    fn numbers_are_texts_as_python_writes_them() {
        for (json, python) in [
            ("7", "7"),
            ("-3", "-3"),
            ("12345678901234567890", "12345678901234567890"),
            ("0", "0"),
            ("1.0", "1.0"),
            ("0.1", "0.1"),
            ("-2.50", "-2.5"),
            ("100000.0", "100000.0"),
            ("1e15", "1000000000000000.0"),
            ("1e16", "1e+16"),
            ("9.2e18", "9.2e+18"),
            ("18446744073709551615", "18446744073709551615"),
            ("0.0001", "0.0001"),
            ("0.00001", "1e-05"),
            ("1.25e-7", "1.25e-07"),
            ("-0.0", "-0.0"),
        ] {
            let row = format!("[{{\"instruction\": \"i\", \"input\": {json}, \"output\": {json}}}]");
            match &read("d.json", row.as_bytes()).unwrap()[0].content {
                Content::Instruction { input, output, .. } => {
                    assert_eq!((input.as_deref(), output.as_str()), (Some(python), python));
                }
                other => panic!("{other:?}"),
            }
        }
        let (problem, _) = fails("d.json", r#"[{"instruction": "i", "output": [3]}]"#);
        assert_eq!(problem, "row 1: `output` must be a text, found a list");
    }

    #[test]
    fn numbers_whose_digits_would_be_lost_are_refused() {
        for number in ["123456789012345678901234567890", "18446744073709551616", "-9223372036854775809", "1.5e300"] {
            let row = format!("{{\"instruction\": \"i\", \"output\": {number}}}");
            let (problem, _) = fails("d.jsonl", format!("\n{row}\n"));
            assert!(problem.starts_with("line 2: `output` is a number of more digits than are kept"), "{problem}");
            assert!(problem.ends_with("put it in quotes, as a text"), "{problem}");
            let quoted = row.replace(number, &format!("\"{number}\""));
            assert_eq!(turns("d.jsonl", &quoted)[1].1, number);
        }
    }

    #[test]
    fn a_row_may_have_a_system_prompt() {
        let row = br#"[{"instruction": "i", "output": "o", "sys_prompt": "Be brief."}]"#;
        let record = read("d.json", row).unwrap().remove(0);
        let Content::Instruction { sys_prompt, .. } = &record.content else { panic!() };
        assert_eq!(sys_prompt.as_deref(), Some("Be brief."));
        assert_eq!(record.messages()[0], Message::new("system", "Be brief."));
    }

    #[test]
    fn broken_json_names_line_and_column() {
        let (problem, _) = fails("d.json", "[{\"instruction\": \"a\",\n \"output\": }]");
        assert_eq!(problem, "line 2 column 12: not JSON: expected value");
        let (problem, _) = fails("d.jsonl", "{\"instruction\": \"a\", \"output\": \"b\"}\n\n{\"instruction\": \"a\"");
        assert_eq!(problem, "line 3 column 19: not JSON: eof while parsing an object");
    }

    #[test]
    fn the_other_form_is_recognised() {
        let row = r#"{"instruction": "a", "output": "b"}"#;
        let (problem, hint) = fails("d.json", format!("{row}\n{row}\n"));
        assert_eq!(problem, "line 2 column 1: not JSON: trailing characters");
        assert!(hint.contains("rename the file to .jsonl"), "{hint}");
        let (_, hint) = fails("d.jsonl", format!("[\n{row}\n]"));
        assert!(hint.contains("rename the file to .json"), "{hint}");
        let (problem, _) = fails("d.json", r#"{"data": []}"#);
        assert_eq!(problem, "expected a list of rows, found one object (found: data)");
        assert_eq!(fails("d.json", "7").0, "expected a list of rows, found a number");
        assert_eq!(fails("d.txt", "a,b").0, "not a .json, .jsonl, .csv or .parquet file");
    }

    #[test]
    fn rows_are_checked_and_counted() {
        let (problem, hint) =
            fails("d.json", r#"[{"instruction": "a", "output": "b"}, {"prompt": "a", "answer": "b"}]"#);
        assert_eq!(problem, "row 2: no key `instruction`, `output` (found: prompt, answer)");
        assert!(hint.starts_with("a row is an object with the texts `instruction` and `output`, optional `input`"));
        assert!(hint.contains("--data.columns"));
        let (problem, _) = fails("d.jsonl", "\n{\"instruction\": \"a\"}\n[]\n{}\n");
        assert_eq!(problem, "line 2: no key `output` (found: instruction); 2 more rows are broken too");
        assert_eq!(fails("d.json", r#"["x"]"#).0, "row 1: expected an object, found a text");
        assert_eq!(fails("d.json", "[{}]").0, "row 1: no key `instruction`, `output` (the object is empty)");
        let wrong = |value: &str| fails("d.json", format!(r#"[{{"instruction": "a", "output": {value}}}]"#)).0;
        assert_eq!(wrong("true"), "row 1: `output` must be a text, found true or false");
        assert_eq!(wrong("null"), "row 1: `output` is null");
        assert_eq!(wrong("[]"), "row 1: `output` must be a text, found a list");
        let (problem, _) = fails("d.json", r#"[{"instruction": "a", "output": "b", "input": {}}]"#);
        assert_eq!(problem, "row 1: `input` must be a text, found an object");
    }

    #[test]
    fn empty_files_and_lists() {
        assert_eq!(fails("d.json", "").0, "the file is empty");
        assert_eq!(fails("d.json", "[]").0, "the dataset has no rows");
        assert_eq!(fails("d.jsonl", "\n \n").0, "the dataset has no rows");
    }

    #[test]
    fn other_encodings() {
        assert_eq!(fails("d.json", b"\xef\xbb\xbf[]").0, "starts with a UTF-8 byte order mark");
        assert_eq!(fails("d.json", b"\xff\xfe[\0]\0").0, "looks like UTF-16 or UTF-32, not UTF-8");
        assert_eq!(fails("d.json", b"[\0]\0").0, "looks like UTF-16 or UTF-32, not UTF-8");
        assert_eq!(fails("d.json", b"[\n\"caf\xe9\"]").0, "line 2: not UTF-8 text");
    }

    #[test]
    fn a_folder_is_not_a_file() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("d.json");
        std::fs::create_dir(&path).unwrap();
        assert!(matches!(records(&path, 0, &Form::Any { renamed: Vec::new() }).unwrap_err(), Error::Io { .. }));
    }

    /// Roles and contents of the first row.
    fn turns(name: &str, content: &str) -> Vec<(String, String)> {
        let records = read(name, content.as_bytes()).unwrap();
        records[0].messages().into_iter().map(|message| (message.role, message.content)).collect()
    }

    #[test]
    fn forms_are_recognized_by_their_keys() {
        let pair = [("user", "a"), ("assistant", "b")].map(|(role, text)| (role.to_owned(), text.to_owned()));
        for row in [
            r#"{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}"#,
            r#"{"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}]},
                {"role": "assistant", "content": "b"}, {"role": "user", "content": "left over"}]}"#,
            r#"{"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}"#,
            r#"{"conversations": ["a", "b"]}"#,
            r#"{"instruction": "a", "output": "b"}"#,
            r#"{"instruction": "a", "context": "", "response": "b"}"#,
            r#"{"prompt": "a", "completion": "b"}"#,
            r#"{"prompt": "a", "response": "b"}"#,
            r#"{"question": "a", "answer": "b", "text": "not this"}"#,
            r#"{"inputs": "a", "targets": "b"}"#,
        ] {
            assert_eq!(turns("d.json", &format!("[{row}]")), pair, "{row}");
        }
        assert_eq!(turns("d.csv", "prompt,completion\na,b\n"), pair);
        let text = read("d.jsonl", br#"{"text": "plain", "id": 1}"#).unwrap();
        assert_eq!(text[0].content, Content::Text("plain".into()));
    }

    #[test]
    fn tables_keep_quoted_line_ends_and_count_lines() {
        let records = read("d.csv", b"id,instruction,output\n1,\"a,\nb\",c\n2,d,e\n").unwrap();
        assert_eq!(records[0].messages()[0].content, "a,\nb");
        assert_eq!(records.iter().map(|r| r.row.row).collect::<Vec<_>>(), [2, 4]);
        assert_eq!(fails("d.csv", "instruction,output\na,b\nc\n").0, "line 3: 1 fields where the header has 2");
        assert_eq!(fails("d.csv", "q,a\nx,y\n").0, "line 2: no key `instruction`, `output` (found: q, a)");
    }

    #[test]
    fn wrong_turns_are_named() {
        let wrong = |turns: &str| fails("d.jsonl", format!("{{\"messages\": {turns}}}")).0;
        let first = r#"{"role": "user", "content": "a"}"#;
        assert_eq!(wrong(&format!("[{first}]")), "line 1: `messages` has no turn of the assistant");
        assert_eq!(
            wrong(&format!("[{first}, {{\"role\": \"assistant\", \"text\": \"b\"}}]")),
            "line 1: `messages` turn 2: no `content` (found: role, text)"
        );
        assert_eq!(wrong(&format!("[{first}, 3]")), "line 1: `messages` turn 2: expected an object, found a number");
        assert_eq!(
            wrong(r#"[{"role": "assistant", "content": "", "tool_calls": {}}]"#),
            "line 1: `messages` turn 1: `tool_calls` must be a list, found an object"
        );
        let rows = format!("{{\"messages\": [{first}, {{\"role\": \"assistant\", \"content\": \"\"}}]}}\n{{\"x\": 1}}");
        assert_eq!(fails("d.jsonl", rows).0, "line 2: no key `messages` (found: x)");
    }

    #[test]
    fn tools_and_reasoning_are_read() {
        let row = |more: &str, turn: &str| {
            let talk = r#"{"role": "user", "content": "a"}, {"role": "assistant", "content": "b""#;
            format!(r#"{{"messages": [{talk}{turn}}}]{more}}}"#)
        };
        for more in [r#", "tools": [{"type": "function"}]"#, r#", "tools": "[{\"type\": \"function\"}]""#] {
            let record = read("d.jsonl", row(more, "").as_bytes()).unwrap().remove(0);
            assert_eq!(record.tools(), [json!({"type": "function"})], "{more}");
        }
        for more in ["", r#", "tools": null"#, r#", "tools": []"#, r#", "tools": "[]""#] {
            assert!(read("d.jsonl", row(more, "").as_bytes()).unwrap()[0].tools().is_empty(), "{more}");
        }
        for (more, problem) in [
            (r#", "tools": "search""#, "line 1: `tools` is not a list in JSON"),
            (r#", "tools": {"name": "f"}"#, "line 1: `tools` must be a list, found an object"),
        ] {
            assert_eq!(fails("d.jsonl", row(more, "")).0, problem);
        }
        let thought = |turn: &str| {
            let record = read("d.jsonl", row("", turn).as_bytes()).unwrap().remove(0);
            record.messages()[1].reasoning_content.clone()
        };
        assert_eq!(thought(r#", "reasoning_content": "because""#).as_deref(), Some("because"));
        assert_eq!(thought(r#", "reasoning_content": null"#), None);
        assert_eq!(
            thought(r#", "reasoning_content": null, "thinking": "why", "reasoning": "so""#).as_deref(),
            Some("why")
        );
        assert!(fails("d.jsonl", row("", r#", "reasoning_content": 3"#)).0.contains("found a number"));
    }

    #[test]
    fn calls_need_no_words() {
        let calls = json!([{"function": {"name": "f", "arguments": {"b": 1, "a": 2}}}]);
        for given in [
            json!({"tool_calls": calls}),
            json!({"content": null, "tool_calls": calls}),
            json!({"content": "", "tool_calls": calls.to_string()}),
        ] {
            let mut answer = given.as_object().unwrap().clone();
            answer.insert("role".into(), "assistant".into());
            let row = json!({"messages": [{"role": "user", "content": "a", "name": "n"}, answer]}).to_string();
            let messages = read("d.jsonl", row.as_bytes()).unwrap()[0].messages();
            assert_eq!(messages[0].rest["name"], "n");
            assert_eq!(messages[1].tool_calls(), calls.as_array().unwrap());
            assert_eq!(messages[1].content, "");
        }
    }

    #[test]
    fn columns_are_renamed() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("d.jsonl");
        std::fs::write(&path, r#"{"output": "a", "instruction": "b"}"#).unwrap();
        let renamed = columns("instruction=output, output=instruction").unwrap();
        let records = records(&path, 0, &Form::Any { renamed }).unwrap();
        assert_eq!(records[0].messages()[0].content, "a");
        assert_eq!(records[0].messages()[1].content, "b");
        for wrong in ["a", "a=", "=b", "a=b,"] {
            assert!(matches!(columns(wrong), Err(Error::Usage { .. })), "{wrong}");
        }
    }
}
