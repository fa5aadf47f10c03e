//! Dataset files: `.json` lists and `.jsonl` lines to records, with errors that say which row is wrong.

use std::path::Path;

use serde_json::{Map, Value};

use super::{Keys, Origin, Record};
use crate::error::{Error, Result};

/// Form of a dataset file.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Form {
    List,
    Lines,
}

impl Form {
    fn of(path: &Path) -> Option<Self> {
        match path.extension()?.to_str()?.to_ascii_lowercase().as_str() {
            "json" => Some(Self::List),
            "jsonl" => Some(Self::Lines),
            _ => None,
        }
    }
}

/// What a number in [`Origin::row`] counts in this file.
pub(super) fn unit(path: &Path) -> &'static str {
    if Form::of(path) == Some(Form::Lines) { "line" } else { "row" }
}

/// All records of a file.
///
/// # Errors
/// `Io` if it cannot be read, `Invalid` if it is no such file, has no rows or any row is broken.
pub(super) fn records(path: &Path, file: usize, keys: &Keys) -> Result<Vec<Record>> {
    let Some(form) = Form::of(path) else {
        return Err(Error::invalid(path, "not a .json or .jsonl file", "rename it, or save it in one of these forms"));
    };
    let bytes = std::fs::read(path).map_err(Error::io("read", path))?;
    let text = text_of(path, bytes)?;
    let values = match form {
        Form::List => parse_list(path, &text)?,
        Form::Lines => parse_lines(path, &text)?,
    };
    if values.is_empty() {
        return Err(Error::invalid(path, "the dataset has no rows", ""));
    }
    let mut records = Vec::with_capacity(values.len());
    let mut problems = Vec::new();
    for (row, value) in values {
        match record(value, Origin { file, row }, keys) {
            Ok(record) => records.push(record),
            Err(problem) => problems.push(format!("{} {row}: {problem}", unit(path))),
        }
    }
    let Some(first) = problems.first() else { return Ok(records) };
    let more = match problems.len() {
        1 => String::new(),
        n => format!("; {} more rows are broken too", n - 1),
    };
    let input = keys.input.map_or_else(String::new, |key| format!(", optional `{key}`"));
    let hint = format!("a row is an object with the texts `{}` and `{}`{input}", keys.instruction, keys.output);
    Err(Error::invalid(path, format!("{first}{more}"), hint))
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

fn record(value: Value, row: Origin, keys: &Keys) -> std::result::Result<Record, String> {
    let Value::Object(mut object) = value else {
        return Err(format!("expected an object, found {}", kind(&value)));
    };
    let lacking: Vec<_> =
        [keys.instruction, keys.output].into_iter().filter(|&key| !object.contains_key(key)).collect();
    if !lacking.is_empty() {
        return Err(format!("no key `{}` ({})", lacking.join("`, `"), found(&object)));
    }
    let mut text = |key: &str| match object.get_mut(key).map(Value::take) {
        Some(Value::String(text)) => Ok(Some(text)),
        None | Some(Value::Null) => Ok(None),
        Some(other) => Err(format!("`{key}` must be a text, found {}", kind(&other))),
    };
    let instruction = text(keys.instruction)?.ok_or_else(|| format!("`{}` is null", keys.instruction))?;
    let output = text(keys.output)?.ok_or_else(|| format!("`{}` is null", keys.output))?;
    let input = keys.input.map(text).transpose()?.flatten();
    Ok(Record { instruction, input, output, row })
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

    const KEYS: Keys = Keys { instruction: "instruction", input: Some("input"), output: "output" };

    fn read(name: &str, content: &[u8]) -> Result<Vec<Record>> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(name);
        std::fs::write(&path, content).unwrap();
        records(&path, 0, &KEYS)
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
        assert_eq!(list[0].input.as_deref(), Some("x\n"));
        assert_eq!((list[1].input.as_deref(), list[1].output.as_str()), (None, ""));
        assert_eq!(list.iter().map(|r| r.row.row).collect::<Vec<_>>(), [1, 2]);
        assert_eq!(lines.iter().map(|r| r.row.row).collect::<Vec<_>>(), [1, 3]);
        let text = |rows: &[Record]| rows.iter().map(|r| (r.instruction.clone(), r.output.clone())).collect::<Vec<_>>();
        assert_eq!(text(&list), text(&lines));
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
        assert_eq!(fails("d.csv", "a,b").0, "not a .json or .jsonl file");
    }

    #[test]
    fn rows_are_checked_and_counted() {
        let (problem, hint) =
            fails("d.json", r#"[{"instruction": "a", "output": "b"}, {"prompt": "a", "answer": "b"}]"#);
        assert_eq!(problem, "row 2: no key `instruction`, `output` (found: prompt, answer)");
        assert_eq!(hint, "a row is an object with the texts `instruction` and `output`, optional `input`");
        let (problem, _) = fails("d.jsonl", "\n{\"instruction\": \"a\"}\n[]\n{}\n");
        assert_eq!(problem, "line 2: no key `output` (found: instruction); 2 more rows are broken too");
        assert_eq!(fails("d.json", r#"["x"]"#).0, "row 1: expected an object, found a text");
        assert_eq!(fails("d.json", "[{}]").0, "row 1: no key `instruction`, `output` (the object is empty)");
        let wrong = |value: &str| fails("d.json", format!(r#"[{{"instruction": "a", "output": {value}}}]"#)).0;
        assert_eq!(wrong("3"), "row 1: `output` must be a text, found a number");
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
        assert!(matches!(records(&path, 0, &KEYS).unwrap_err(), Error::Io { .. }));
    }
}
