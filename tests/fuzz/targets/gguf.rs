//! GGUF files: settings, vocabulary and weights.
#![no_main]

use std::cell::LazyCell;

use libfuzzer_sys::fuzz_target;
use litgpt::tokenizer::{Text, Tokenizer};
use litgpt_fuzz::{Folder, checked, run_model};

thread_local!(static FOLDER: LazyCell<Folder> = LazyCell::new(Folder::new));

fuzz_target!(|data: &[u8]| {
    FOLDER.with(|folder| {
        folder.put("x.gguf", data);
        let Some((checkpoint, _)) = run_model(&folder.path("x.gguf")) else { return };
        let text = |name: &str| checkpoint.companion(name);
        if let Some(tokenizer) = checked(Tokenizer::of(&checkpoint.dir, &text as &Text<'_>)) {
            checked(tokenizer.encode("Hello, world"));
        }
    });
});
