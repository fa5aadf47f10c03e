//! What a run leaves for people: TensorBoard's event files, read back by a decoder of its own, and `report.html`.
#![allow(clippy::unwrap_used)]

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use crate::util::{column, finetune, litgpt, names, tiny};

/// Values of an event file: tag, step, number, in their order.
type Scalars = Vec<(String, u64, f32)>;

/// CRC-32C by its definition: the remainder of the bits, taken as a polynomial, in reverse.
fn crc32c(bytes: &[u8]) -> u32 {
    let bits = bytes.iter().flat_map(|byte| (0..8).map(move |i| byte >> i & 1));
    let step = |crc: u32, bit: u8| if (crc ^ u32::from(bit)) & 1 == 1 { crc >> 1 ^ 0x82f6_3b78 } else { crc >> 1 };
    !bits.fold(u32::MAX, step)
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap())
}

/// The contents of a file's records; their check sums are right.
fn records(mut file: &[u8]) -> Vec<&[u8]> {
    let mut found = Vec::new();
    while !file.is_empty() {
        let length = u64::from_le_bytes(file[..8].try_into().unwrap()) as usize;
        let content = &file[12..12 + length];
        for (bytes, at) in [(&file[..8], 8), (content, 12 + length)] {
            let crc = crc32c(bytes);
            let masked = crc.rotate_right(15).wrapping_add(0xa282_ead8);
            assert_eq!(u32_at(file, at), masked);
        }
        found.push(content);
        file = &file[16 + length..];
    }
    found
}

/// A field's value.
enum Field<'a> {
    Number(u64),
    Eight([u8; 8]),
    Four([u8; 4]),
    Bytes(&'a [u8]),
}

/// The fields of a protobuf message.
fn fields(mut message: &[u8]) -> Vec<(u64, Field<'_>)> {
    fn varint(message: &mut &[u8]) -> u64 {
        let mut number = 0;
        for shift in (0..64).step_by(7) {
            let byte = message[0];
            *message = &message[1..];
            number |= u64::from(byte & 0x7f) << shift;
            if byte < 0x80 {
                break;
            }
        }
        number
    }
    let mut found = Vec::new();
    while !message.is_empty() {
        let key = varint(&mut message);
        let length = match key & 7 {
            0 => {
                found.push((key >> 3, Field::Number(varint(&mut message))));
                continue;
            }
            1 => 8,
            5 => 4,
            2 => varint(&mut message) as usize,
            other => panic!("wire type {other}"),
        };
        let (bytes, rest) = message.split_at(length);
        message = rest;
        let field = match key & 7 {
            1 => Field::Eight(bytes.try_into().unwrap()),
            5 => Field::Four(bytes.try_into().unwrap()),
            _ => Field::Bytes(bytes),
        };
        found.push((key >> 3, field));
    }
    found
}

/// File version, step from which earlier files are void, and values of an event file.
fn events(path: &Path) -> (String, u64, Scalars) {
    let file = fs::read(path).unwrap();
    let (mut version, mut from, mut scalars) = (String::new(), 0, Scalars::new());
    for record in records(&file) {
        let (mut step, mut wall_time) = (0, 0.0);
        for (number, field) in fields(record) {
            match (number, field) {
                (1, Field::Eight(bytes)) => wall_time = f64::from_le_bytes(bytes),
                (2, Field::Number(n)) => step = n,
                (3, Field::Bytes(text)) => version = String::from_utf8(text.to_vec()).unwrap(),
                (5, Field::Bytes(summary)) => scalars.extend(fields(summary).into_iter().map(|(n, value)| {
                    assert_eq!(n, 1);
                    let Field::Bytes(value) = value else { panic!("a value is a message") };
                    let value: BTreeMap<u64, Field<'_>> = fields(value).into_iter().collect();
                    let (Field::Bytes(tag), Field::Four(number)) = (&value[&1], &value[&2]) else {
                        panic!("tag, float")
                    };
                    (String::from_utf8(tag.to_vec()).unwrap(), step, f32::from_le_bytes(*number))
                })),
                (7, Field::Bytes(log)) => {
                    assert!(matches!(fields(log)[..], [(1, Field::Number(1))]));
                    from = step;
                }
                _ => panic!("field {number}"),
            }
        }
        assert!(wall_time > 1.7e9, "{wall_time} is no time of today");
    }
    (version, from, scalars)
}

#[test]
fn tensorboard_gets_what_the_metrics_have() {
    let dir = tempfile::tempdir().unwrap();
    let more = "--logger_name tensorboard --eval.interval 2 --train.save_interval 2";
    finetune(dir.path(), &tiny(), more).ok();
    let out = dir.path().join("out");
    let logs = out.join("logs/tensorboard");
    let first = names(&logs);
    assert!(first.len() == 1 && first[0].starts_with("events.out.tfevents."), "{first:?}");
    let (version, from, scalars) = events(&logs.join(&first[0]));
    assert_eq!((version.as_str(), from), ("brain.Event:2", 0));
    let values = |tag: &str| -> Vec<f32> { scalars.iter().filter(|s| s.0 == tag).map(|s| s.2).collect() };
    for (tag, name) in [
        ("loss", "loss"),
        ("learning_rate", "learning_rate"),
        ("tokens_per_s", "tokens_per_s"),
        ("grad_norm", "grad_norm"),
        ("val_loss", "val_loss"),
        ("val_ppl", "val_ppl"),
    ] {
        let expected: Vec<f32> = column(&out, name).into_iter().map(|n| n as f32).collect();
        assert!(expected.len() >= 2, "{name}");
        assert_eq!(values(tag), expected, "{tag}");
    }
    let steps: Vec<u64> = scalars.iter().filter(|s| s.0 == "loss").map(|s| s.1).collect();
    assert_eq!(steps, [1, 2, 3]);
    // A resumed run says from where on its own file counts.
    finetune(dir.path(), &tiny(), &format!("{more} --resume out/step-000002")).ok();
    let second = names(&logs);
    assert_eq!(second.len(), 2, "{second:?}");
    let (_, from, scalars) = events(&logs.join(&second[1]));
    assert_eq!((from, scalars[0].1), (3, 3));
}

#[test]
fn other_loggers_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let says = ["logger_name", "csv, tensorboard, none", "got `wandb`", "wandb sync"];
    finetune(dir.path(), &tiny(), "--logger_name wandb").refused(2, &says);
    finetune(dir.path(), &tiny(), "--logger_name mlflow").refused(2, &["logger_name", "mlflow"]);
}

#[test]
fn without_a_logger_there_is_the_adapter_alone() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("out");
    let run =
        |more: &str| finetune(dir.path(), &tiny(), &format!("--train.save_interval 2 --train.max_steps 4 {more}")).ok();
    run("--logger_name none");
    assert_eq!(names(&out), [".lock", "best", "final", "latest", "step-000002", "step-000004"]);
    // A logger that comes later begins where it came.
    run("--resume out/step-000002");
    assert_eq!(column(&out, "step")[0], 3.0);
    assert!(out.join("report.html").is_file());
}

/// Names of a page's elements; each is closed in its turn, and nothing comes from elsewhere.
fn elements(page: &str) -> Vec<String> {
    let (mut found, mut open) = (Vec::new(), Vec::new());
    for tag in page.strip_prefix("<!DOCTYPE html>").unwrap().split('<').skip(1) {
        let (tag, text) = tag.split_once('>').unwrap();
        assert!(!text.contains('>') && !text.contains('"') || open.last().is_some_and(|o| o == "style"), "{text}");
        if let Some(name) = tag.strip_prefix('/') {
            assert_eq!(open.pop().as_deref(), Some(name));
            continue;
        }
        assert!(tag.matches('"').count().is_multiple_of(2), "{tag}");
        let name = tag.split([' ', '/']).next().unwrap().to_owned();
        if !tag.ends_with('/') {
            open.push(name.clone());
        }
        found.push(name);
    }
    assert!(open.is_empty(), "not closed: {open:?}");
    found
}

#[test]
fn the_page_has_curves_settings_and_answers() {
    let dir = tempfile::tempdir().unwrap();
    finetune(dir.path(), &tiny(), "--train.max_steps 4 --eval.interval 2 --train.save_interval 2 --lora_r 3").ok();
    let out = dir.path().join("out");
    let page = fs::read_to_string(out.join("report.html")).unwrap();
    let elements = elements(&page);
    for forbidden in ["script", "link", "img", "iframe"] {
        assert!(!elements.iter().any(|name| name == forbidden), "{forbidden}");
    }
    let addresses = page.matches("http").count();
    assert_eq!(addresses, page.matches("http://www.w3.org/2000/svg").count(), "only the name of SVG");
    let count = |name: &str| elements.iter().filter(|element| *element == name).count();
    assert_eq!((count("svg"), count("polyline"), count("table")), (4, 5, 1), "four charts, five curves");
    let points: Vec<usize> =
        page.split("points=\"").skip(1).map(|p| p.split('"').next().unwrap().split(' ').count()).collect();
    assert_eq!(points, [4, column(&out, "val_loss").len(), 4, 4, 4]);
    for (name, value) in [("loss", column(&out, "loss")), ("val_loss", column(&out, "val_loss"))] {
        let last = value.last().unwrap();
        assert!(page.contains(&format!("{name}, last {last:.4}")), "{name} {last}");
    }
    let row = |key: &str, value: &str| page.contains(&format!("<tr><th>{key}</th><td>{value}</td></tr>"));
    assert!(row("lora_r", "3") && row("train.max_steps", "4"));
    let figure = |key: &str, value: &str| page.contains(&format!("<dt>{key}</dt><dd>{value}</dd>"));
    assert!(figure("Optimizer steps", "4") && figure("End", "finished"));
    assert!(figure("Last validation loss", &format!("{:.4}", column(&out, "val_loss").last().unwrap())));
    assert!(page.contains("@media(prefers-color-scheme:dark)"));
    assert!(page.contains("<h3>After step 4</h3>\n<pre>") && !page.contains("access_token"));
    // A resumed run's page shows the steps before it, too.
    fs::remove_file(out.join("report.html")).unwrap();
    finetune(
        dir.path(),
        &tiny(),
        "--train.max_steps 4 --eval.interval 2 --train.save_interval 2 --lora_r 3 --resume out/step-000002",
    )
    .ok();
    let again = fs::read_to_string(out.join("report.html")).unwrap();
    assert!(again.contains(page.split("points=\"").nth(1).unwrap().split('"').next().unwrap()));
    litgpt(dir.path(), ["validate", "out/final"]).ok();
}
