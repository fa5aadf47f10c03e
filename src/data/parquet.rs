//! Rows of a Parquet file, nested lists and structs included, as JSON values.
//!
//! Columns that hold no text, number, list or struct (dates, binary data) become null: no form of a row asks for them.

use std::fs::File;
use std::path::Path;

use parquet::file::reader::{FileReader, SerializedFileReader};
use parquet::record::{Field, Row};
use serde_json::{Map, Value};

use crate::error::{Error, Result, quietly};

const AGAIN: &str = "download it again, or write it again with another program";

/// All rows of a file, counted from 1.
///
/// # Errors
/// `Io` if it cannot be read, `Invalid` if it is no Parquet file or uses what is not read here.
pub(super) fn rows(path: &Path) -> Result<Vec<(usize, Value)>> {
    let file = File::open(path).map_err(Error::io("read", path))?;
    let invalid = |text: &str, hint: &str| Error::invalid(path, format!("cannot read Parquet: {text}"), hint);
    let broken = |e: parquet::errors::ParquetError| {
        let text = e.to_string().replace('\n', " ");
        let hint = match text.contains("feature") {
            true => "write it with snappy, zstd or no compression",
            false => AGAIN,
        };
        invalid(&text, hint)
    };
    let read = || {
        let reader = SerializedFileReader::new(file).map_err(broken)?;
        let rows = reader.get_row_iter(None).map_err(broken)?;
        (1..).zip(rows).map(|(number, row)| Ok((number, object(&row.map_err(broken)?)))).collect()
    };
    quietly(read).unwrap_or_else(|| Err(invalid("the library that reads it gives up on a part of it", AGAIN)))
}

fn object(row: &Row) -> Value {
    Value::Object(row.get_column_iter().map(|(name, field)| (name.clone(), value(field))).collect())
}

fn value(field: &Field) -> Value {
    match field {
        Field::Bool(value) => Value::from(*value),
        Field::Byte(value) => Value::from(*value),
        Field::Short(value) => Value::from(*value),
        Field::Int(value) => Value::from(*value),
        Field::Long(value) => Value::from(*value),
        Field::UByte(value) => Value::from(*value),
        Field::UShort(value) => Value::from(*value),
        Field::UInt(value) => Value::from(*value),
        Field::ULong(value) => Value::from(*value),
        Field::Float16(value) => Value::from(f32::from(*value)),
        Field::Float(value) => Value::from(*value),
        Field::Double(value) => Value::from(*value),
        Field::Str(text) => Value::from(text.as_str()),
        // Some programs write text without saying that it is text.
        Field::Bytes(bytes) => std::str::from_utf8(bytes.data()).map_or(Value::Null, Value::from),
        Field::Group(row) => object(row),
        Field::ListInternal(list) => list.elements().iter().map(value).collect(),
        Field::MapInternal(map) => {
            let entry = |(key, field): &(Field, Field)| match value(key) {
                Value::String(key) => Some((key, value(field))),
                _ => None,
            };
            Value::Object(map.entries().iter().filter_map(entry).collect::<Map<String, Value>>())
        }
        Field::Null
        | Field::Decimal(_)
        | Field::Date(_)
        | Field::TimeMillis(_)
        | Field::TimeMicros(_)
        | Field::TimestampMillis(_)
        | Field::TimestampMicros(_) => Value::Null,
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use serde_json::json;

    fn fixture(name: &str) -> std::path::PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data").join(name)
    }

    #[test]
    fn rows_become_objects() {
        let first = json!({"instruction": "Name a colour.", "input": null, "output": "Blue.", "tags": ["a", null],
            "score": 0.5, "when": null});
        let second = json!({"instruction": "Add the numbers.", "input": "2 and 3", "output": "5 – of course.",
            "tags": [], "score": null, "when": null});
        assert_eq!(rows(&fixture("rows.parquet")).unwrap(), [(1, first), (2, second)]);
    }

    #[test]
    fn lists_of_structs_keep_their_order() {
        let turn = |role: &str, content: &str| json!({"role": role, "content": content});
        let rows = rows(&fixture("turns.parquet")).unwrap();
        let talk = [
            turn("user", "Hello?"),
            turn("assistant", "Hi!"),
            turn("user", "Who are you?"),
            turn("assistant", "A fox."),
        ];
        assert_eq!(rows[0].1, json!({"prompt_id": null, "messages": talk}));
        let talk = [turn("system", "Be brief."), turn("user", "Why?"), turn("assistant", "Because.")];
        assert_eq!(rows[1].1, json!({"prompt_id": "x", "messages": talk}));
    }

    #[test]
    fn other_files_are_refused_in_one_line() {
        let dir = tempfile::tempdir().unwrap();
        let whole = std::fs::read(fixture("turns.parquet")).unwrap();
        let mut spoiled = whole.clone();
        spoiled[40..200].fill(0);
        for (name, bytes) in
            [("text", b"a,b\n1,2\n".to_vec()), ("cut", whole[..whole.len() - 9].to_vec()), ("spoiled", spoiled)]
        {
            let path = dir.path().join(name);
            std::fs::write(&path, bytes).unwrap();
            let e = rows(&path).unwrap_err();
            assert!(e.to_string().contains("cannot read Parquet") && !e.to_string().contains('\n'), "{e}");
        }
        let e = rows(&fixture("gzip.parquet")).unwrap_err();
        assert_eq!(e.hint().unwrap(), "write it with snappy, zstd or no compression", "{e}");
    }
}
