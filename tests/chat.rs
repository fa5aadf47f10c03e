//! `litgpt chat`: through a pipe, and in a pseudo-terminal as a person uses it.

use crate::util::{root, tiny};
use std::io::Write;
use std::path::Path;
use std::process::{Command, Stdio};

/// The quickstart's model with room for long answers, in `dir`.
fn talkative(dir: &Path) {
    for entry in std::fs::read_dir(tiny()).unwrap() {
        let path = entry.unwrap().path();
        std::fs::copy(&path, dir.join(path.file_name().unwrap())).unwrap();
    }
    let path = dir.join("config.json");
    let config = std::fs::read_to_string(&path).unwrap();
    let wide = config.replace("\"max_position_embeddings\": 512", "\"max_position_embeddings\": 100000");
    assert_ne!(config, wide, "the tiny model's context changed");
    std::fs::write(&path, wide).unwrap();
}

fn chat(input: &str, flags: &[&str]) -> (String, String, i32) {
    let mut child = Command::new(env!("CARGO_BIN_EXE_litgpt"))
        .args(["chat", "--accelerator", "cpu", "--temperature", "0", "--max_new_tokens", "8", "--checkpoint_dir"])
        .arg(tiny())
        .args(flags)
        .current_dir(root())
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    child.stdin.take().unwrap().write_all(input.as_bytes()).unwrap();
    let output = child.wait_with_output().unwrap();
    let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
    (text(output.stdout), text(output.stderr), output.status.code().unwrap())
}

#[test]
fn a_piped_conversation_is_answered_line_by_line() {
    let (first, notes, code) = chat("What does the fox do?\n", &[]);
    assert_eq!(code, 0, "{notes}");
    assert!(notes.contains("tokens/s"), "{notes}");
    // After a reset the same question has the same answer; without one the model sees the first turn, too.
    let (answers, notes, _) =
        chat("What does the fox do?\n/reset\nWhat does the fox do?\n/nothing\n/exit\nnever\n", &[]);
    assert_eq!(answers, format!("{first}{first}"), "{notes}");
    assert!(notes.contains("there is no /nothing"), "{notes}");
}

#[test]
fn litgpts_words_and_an_empty_line_leave() {
    let (first, _, _) = chat("What does the fox do?\n", &[]);
    for leaving in ["!quit", "!Exit", ""] {
        let (answers, notes, code) = chat(&format!("What does the fox do?\n{leaving}\nWhat is a fox?\n"), &[]);
        assert_eq!((answers, code), (first.clone(), 0), "{leaving:?}: {notes}");
    }
    let lines = |input: &str| chat(input, &["--multiline"]);
    let (first, notes, _) = lines("What does\nthe fox do?\n!submit\n");
    for leaving in ["!quit", "!Exit"] {
        let (answers, notes, code) =
            lines(&format!("What does\nthe fox do?\n!SUBMIT\n{leaving}\nWhat is a fox?\n!submit\n"));
        assert_eq!((answers, code), (first.clone(), 0), "{leaving}: {notes}");
    }
    // What comes behind is answered where nothing leaves.
    assert_ne!(lines("What does\nthe fox do?\n!SUBMIT\nWhat is a fox?\n!submit\n").0, first, "{notes}");
}

#[test]
fn a_question_longer_than_the_context_is_refused_and_the_chat_goes_on() {
    let long = "fox ".repeat(600);
    let (answers, notes, code) = chat(&format!("{long}\nWhat does the fox do?\n"), &[]);
    assert_eq!(code, 0, "{notes}");
    assert!(notes.contains("error: this takes"), "{notes}");
    assert_eq!(answers, chat("What does the fox do?\n", &[]).0);
}

#[cfg(unix)]
#[test]
fn two_turns_a_reset_and_an_interrupt_in_a_terminal() {
    let dir = tempfile::tempdir().unwrap();
    talkative(dir.path());
    let mut command = Command::new(env!("CARGO_BIN_EXE_litgpt"));
    command.args(["chat", "--accelerator", "cpu", "--max_new_tokens", "50000", "--checkpoint_dir"]).arg(dir.path());
    command.env("TERM", "dumb");
    let mut terminal = rexpect::session::spawn_command(command, Some(60_000)).unwrap();
    terminal.exp_string("/help says what there is").unwrap();
    for _ in 0..2 {
        terminal.exp_string(">> ").unwrap();
        terminal.send_line("What does the fox do?").unwrap();
        // The answer may be long: stop it once it has begun.
        std::thread::sleep(std::time::Duration::from_millis(700));
        terminal.send_control('c').unwrap();
        terminal.exp_string("tokens/s").unwrap();
    }
    terminal.exp_string(">> ").unwrap();
    terminal.send_line("/reset").unwrap();
    terminal.exp_string(">> ").unwrap();
    terminal.send_line("/exit").unwrap();
    terminal.exp_eof().unwrap();
}
