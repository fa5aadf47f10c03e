//! The rules of `src/lib.rs` that no compiler checks: which room may name which, where `unsafe` may stand, who prints.
#![allow(clippy::unwrap_used)]

use std::fs;
use std::path::Path;

use crate::util::root;

/// Rooms of the crate, and the rooms that each may name. `cli`, `lib.rs` and `main.rs` may name all.
const ARROWS: &[(&str, &[&str])] = &[
    ("ops", &[]),
    ("error", &[]),
    ("model", &["ops", "error"]),
    ("tokenizer", &["error"]),
    ("checkpoint", &["model", "ops", "error"]),
    ("data", &["tokenizer", "error"]),
    ("generate", &["model", "ops", "tokenizer", "error"]),
    ("train", &["checkpoint", "model", "ops", "data", "tokenizer", "error"]),
];

/// Rooms that may name every room.
const TOP: [&str; 3] = ["cli", "lib", "main"];

/// Files, and folders of files, that may hold `unsafe`.
const UNSAFE: [&str; 6] = [
    "src/ops/device/cuda.rs",
    "src/ops/matmul.rs",
    "src/ops/math.rs",
    "src/ops/simd/",
    "src/checkpoint/safe.rs",
    "src/checkpoint/pickle/mod.rs",
];

/// The only file that may print.
const UI: &str = "src/cli/ui.rs";

/// Path from the repository's root with slashes, and code without comments line by line.
struct Source {
    path: String,
    lines: Vec<String>,
}

impl Source {
    /// `ops` of `src/ops/norm.rs`, `generate` of `src/generate.rs`.
    fn room(&self) -> &str {
        let inside = self.path.strip_prefix("src/").unwrap();
        inside.split_once('/').map_or_else(|| inside.trim_end_matches(".rs"), |(room, _)| room)
    }
}

fn sources() -> Vec<Source> {
    let mut found = Vec::new();
    collect(&root().join("src"), &mut found);
    found.sort_by(|a: &Source, b| a.path.cmp(&b.path));
    assert!(found.len() > 30, "src was not found");
    found
}

fn collect(dir: &Path, found: &mut Vec<Source>) {
    for entry in fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            collect(&path, found);
        } else if path.extension().is_some_and(|ending| ending == "rs") {
            let relative = path.strip_prefix(root()).unwrap().to_str().unwrap().replace('\\', "/");
            let text = fs::read_to_string(&path).unwrap();
            found.push(Source { path: relative, lines: text.lines().map(code).collect() });
        }
    }
}

/// A line without its comment and without what stands in quotes.
fn code(line: &str) -> String {
    let (mut code, mut quoted, mut escaped) = (String::new(), false, false);
    let mut chars = line.chars().peekable();
    while let Some(c) = chars.next() {
        match c {
            _ if escaped => escaped = false,
            '\\' if quoted => escaped = true,
            // The quote of a char literal '"' opens no text.
            '"' if quoted || !(code.ends_with('\'') && chars.peek() == Some(&'\'')) => quoted = !quoted,
            '/' if !quoted && chars.peek() == Some(&'/') => break,
            _ if quoted => {}
            _ => code.push(c),
        }
    }
    code
}

/// The words that make up code, with underscores.
fn words(code: &str) -> impl Iterator<Item = &str> {
    code.split(|c: char| !c.is_alphanumeric() && c != '_').filter(|word| !word.is_empty())
}

/// Rooms named by `crate::room` or `crate::{room, ...}`.
fn named_rooms(source: &Source) -> Vec<String> {
    let text = source.lines.join("\n");
    let mut rooms = Vec::new();
    for (at, _) in text.match_indices("crate::") {
        let rest = &text[at + "crate::".len()..];
        let Some(list) = rest.strip_prefix('{') else {
            rooms.extend(words(rest).next().map(str::to_owned));
            continue;
        };
        // The names at the list's own level, not those in lists inside it.
        let (mut depth, mut level) = (1, String::new());
        for c in list.chars() {
            match c {
                '{' => depth += 1,
                '}' => depth -= 1,
                _ if depth == 1 => level.push(c),
                _ => {}
            }
            if depth == 0 {
                break;
            }
        }
        rooms.extend(level.split(',').filter_map(|part| words(part).next().map(str::to_owned)));
    }
    rooms
}

#[test]
fn no_room_names_one_above_it() {
    let mut problems = Vec::new();
    for source in sources() {
        if TOP.contains(&source.room()) {
            continue;
        }
        let Some((_, allowed)) = ARROWS.iter().find(|(room, _)| *room == source.room()) else {
            problems.push(format!("{}: the room `{}` has no line in ARROWS", source.path, source.room()));
            continue;
        };
        for room in named_rooms(&source) {
            if room != source.room() && !allowed.contains(&room.as_str()) {
                problems.push(format!("{}: `{}` may not name `{room}`", source.path, source.room()));
            }
        }
    }
    assert!(problems.is_empty(), "{problems:#?}");
}

/// Else `super::` at the root of a room would be a way around the arrows.
#[test]
fn rooms_are_named_through_crate() {
    for source in sources() {
        let top = source.path.matches('/').count() == 1
            || source.path.matches('/').count() == 2 && source.path.ends_with("/mod.rs");
        let around = source.lines.iter().find(|line| top && line.starts_with("use super::"));
        assert!(around.is_none(), "{}: {around:?}", source.path);
    }
}

#[test]
fn unsafe_stands_where_it_is_allowed_and_says_why() {
    let mut problems = Vec::new();
    for source in sources() {
        let allowed = UNSAFE.iter().any(|place| source.path.starts_with(place));
        let text = fs::read_to_string(root().join(&source.path)).unwrap();
        let whole: Vec<&str> = text.lines().collect();
        for (i, line) in source.lines.iter().enumerate() {
            let place = format!("{}:{}", source.path, i + 1);
            if !allowed && words(line).any(|word| word == "unsafe" || word == "unsafe_code") {
                problems.push(format!("{place}: `unsafe` is not allowed here"));
            }
            let begins = i.saturating_sub(6);
            let reason = whole[begins..=i].iter().any(|line| line.contains("SAFETY:"));
            if allowed && line.contains("unsafe {") && !reason {
                problems.push(format!("{place}: no `// SAFETY:` above this block"));
            }
        }
    }
    assert!(problems.is_empty(), "{problems:#?}");
}

#[test]
fn only_the_ui_prints() {
    const PRINTS: [&str; 7] = ["println!", "print!(", "eprintln!", "eprint!(", "dbg!", "stdout()", "stderr()"];
    let mut problems = Vec::new();
    for source in sources().iter().filter(|source| source.path != UI) {
        for (i, line) in source.lines.iter().enumerate() {
            for print in PRINTS.iter().filter(|print| line.contains(**print)) {
                problems.push(format!("{}:{}: {print}", source.path, i + 1));
            }
        }
    }
    assert!(problems.is_empty(), "{problems:#?}");
}

#[test]
fn code_has_no_comments_and_no_texts() {
    assert_eq!(code(r#"let x = "crate::cli // \" unsafe"; // crate::train"#), "let x = ; ");
    assert_eq!(code("match c { '\"' => crate::ops::f(), _ => 1 }"), "match c { '\"' => crate::ops::f(), _ => 1 }");
    let source = |text: &str| Source { path: "src/model/x.rs".into(), lines: text.lines().map(code).collect() };
    let rooms = |text: &str| named_rooms(&source(text));
    assert_eq!(rooms("use crate::{ops::{a, train}, data};\nlet x: crate::error::Error;"), ["ops", "data", "error"]);
    assert_eq!(source("").room(), "model");
}
