//! One test for each thing that users of LitGPT and its peers suffered from, named for it.

use std::fs;

use crate::util::{finetune, tiny};

/// A `messages` file trains as it is: every answer is learned, the rest is masked.
#[test]
fn pain_08_messages_are_recognized() {
    let dir = tempfile::tempdir().unwrap();
    let row = r#"{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"},
        {"role": "user", "content": "Bye"}, {"role": "assistant", "content": "Now"}]}"#
        .replace('\n', " ");
    fs::write(dir.path().join("chat.jsonl"), format!("{row}\n").repeat(40)).unwrap();
    let ran = finetune(dir.path(), &tiny(), "--data.json_path chat.jsonl --data.prompt_style chatml").ok();
    assert!(ran.stderr.contains("«Ho") && ran.stderr.contains("«Now"), "{}", ran.stderr);
}

/// A wrong row is named by file and line, with the keys that it has.
#[test]
fn pain_08_a_wrong_row_is_named() {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("d.jsonl"), "{\"text\": \"a\"}\n{\"body\": \"b\"}\n").unwrap();
    let says = ["d.jsonl", "line 2", "found: body"];
    finetune(dir.path(), &tiny(), "--data.json_path d.jsonl").refused(1, &says);
}
