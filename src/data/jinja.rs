//! What transformers gives its templates beyond what minijinja has, and where Jinja's own filters and tests are Python's.

use std::sync::LazyLock;

use minijinja::value::{Kwargs, Rest, Value, ValueKind};
use minijinja::{Environment, Error, ErrorKind};
use regex::Regex;

type Result<T> = std::result::Result<T, Error>;

/// Lists in lists that an attribute of a namespace may hold: a namespace outlives the turns of a loop, so that without
/// a limit a value could get as deep as the loop is long, and hold itself.
const DEEPEST: usize = 16;
/// Items that it may hold.
const MOST_ITEMS: usize = 100_000;
/// Widest indentation of `tojson`.
const WIDEST: usize = 64;

/// Gives an environment the functions, filters and tests.
pub(super) fn extend(environment: &mut Environment<'_>) {
    environment.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
    environment.add_function("raise_exception", |text: String| -> Result<Value> {
        Err(Error::new(ErrorKind::InvalidOperation, text))
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
}

/// The source without what minijinja does not know, with line ends as Jinja takes them.
pub(super) fn prepared(source: &str) -> String {
    plain_assignments(&with_marks(&source.replace("\r\n", "\n").replace('\r', "\n")))
}

/// What a text has before and behind what `{% generation %}` holds: noncharacters, which no text has otherwise.
pub(super) const MARKS: [char; 2] = ['\u{10FFFE}', '\u{10FFFF}'];

/// transformers' `{% generation %}` says what of the text is the assistant's: here a block that is always entered, between
/// marks. Of its two tags the outer takes away blanks before it, and the inner, a scope as there, those behind.
fn with_marks(source: &str) -> String {
    static BEGIN: LazyLock<Option<Regex>> = LazyLock::new(|| Regex::new(r"\{%([-+]?)\s*generation\s*([-+]?)%\}").ok());
    static END: LazyLock<Option<Regex>> = LazyLock::new(|| Regex::new(r"\{%([-+]?)\s*endgeneration\s*([-+]?)%\}").ok());
    let Some((begin, end)) = BEGIN.as_ref().zip(END.as_ref()) else { return source.to_owned() };
    let [open, close] = MARKS;
    let source = begin.replace_all(source, format!("{{%$1 if true %}}{{{{ '{open}' }}}}{{% with $2%}}"));
    end.replace_all(&source, format!("{{%$1 endwith %}}{{{{ '{close}' }}}}{{% endif $2%}}")).into_owned()
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
fn plain(value: &Value, depth: usize, room: &mut usize) -> Result<Value> {
    let kind = value.kind();
    if !matches!(kind, ValueKind::Seq | ValueKind::Iterable | ValueKind::Map) {
        return Ok(value.clone());
    }
    let refused = |what: String| Error::new(ErrorKind::InvalidOperation, format!("a namespace with {what}"));
    let Some(inner) = depth.checked_sub(1) else {
        return Err(refused(format!("over {DEEPEST} lists in each other")));
    };
    let mut item = |value: &Value| {
        *room = room.checked_sub(1).ok_or_else(|| refused(format!("over {MOST_ITEMS} items")))?;
        plain(value, inner, room)
    };
    if kind == ValueKind::Map {
        let pairs = value.try_iter()?.map(|key| Ok((key.clone(), item(&value.get_item(&key)?)?)));
        let pairs = pairs.collect::<Result<Vec<(Value, Value)>>>()?;
        return Ok(Value::from_pairs(pairs));
    }
    value.try_iter()?.map(|value| item(&value)).collect::<Result<Vec<Value>>>().map(Value::from)
}

/// Jinja's `default`: for what is not defined, or with `boolean` for all that is false.
fn or_default(value: &Value, given: Rest<Value>, options: Kwargs) -> Result<Value> {
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
fn to_json(value: &Value, options: Kwargs) -> Result<Value> {
    let refused = |what: String| Error::new(ErrorKind::InvalidOperation, what);
    let indent: Option<usize> = options.get("indent")?;
    if indent.is_some_and(|width| width > WIDEST) {
        return Err(refused(format!("an indent of more than {WIDEST}")));
    }
    let separators = match options.get::<Option<Vec<String>>>("separators")? {
        Some(given) => given.try_into().map_err(|_| refused("separators are two texts".to_owned()))?,
        None => [if indent.is_some() { "," } else { ", " }, ": "].map(str::to_owned),
    };
    let flag = |name: &str| Ok::<bool, Error>(options.get::<Option<bool>>(name)?.unwrap_or(false));
    let json = Json { indent, separators, sorted: flag("sort_keys")?, ascii: flag("ensure_ascii")? };
    options.assert_all_used()?;
    let tree = serde_json::to_value(value).map_err(|e| Error::new(ErrorKind::BadSerialization, e.to_string()))?;
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
fn strftime(format: &str, at: chrono::NaiveDateTime) -> Result<String> {
    use chrono::format::{Fixed, Item, StrftimeItems};
    use std::fmt::Write;
    // Python's fractions are microseconds.
    let format = format.split("%%").map(|part| part.replace("%f", "%6f")).collect::<Vec<_>>().join("%%");
    let zone = |item: &Item<'_>| matches!(item, Item::Fixed(Fixed::TimezoneName | Fixed::TimezoneOffset));
    let items: Vec<Item<'_>> = StrftimeItems::new(&format).filter(|item| !zone(item)).collect();
    let refused = || Error::new(ErrorKind::InvalidOperation, format!("strftime_now with the format {format:?}"));
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
