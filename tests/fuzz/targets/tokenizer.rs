//! The files of a tokenizer. The first byte says which of them the input is.
#![no_main]

use std::cell::LazyCell;

use libfuzzer_sys::fuzz_target;
use litgpt::tokenizer::Tokenizer;
use litgpt_fuzz::{Folder, SMALL_TOKENIZER, TOKENIZER_CONFIG, checked};

const FILES: [&str; 4] = ["tokenizer.json", "tokenizer_config.json", "generation_config.json", "config.json"];

thread_local!(static FOLDERS: LazyCell<[Folder; 4]> = LazyCell::new(|| {
    FILES.map(|_| {
        let folder = Folder::new();
        folder.put("tokenizer.json", SMALL_TOKENIZER);
        folder.put("tokenizer_config.json", TOKENIZER_CONFIG);
        folder.put("config.json", litgpt_fuzz::config().to_string());
        folder
    })
}));

fuzz_target!(|data: &[u8]| {
    let Some((choice, content)) = data.split_first() else { return };
    let choice = usize::from(*choice) % FILES.len();
    FOLDERS.with(|folders| {
        let folder = &folders[choice];
        folder.put(FILES[choice], content);
        let Some(tokenizer) = checked(Tokenizer::load(&folder.path(""))) else { return };
        let Some(ids) = checked(tokenizer.encode_prompt("Hello, world\n ##\u{e9}\u{1f600}")) else { return };
        checked(tokenizer.encode_answer("abc"));
        checked(tokenizer.decode(&ids));
        let mut stream = tokenizer.stream();
        for id in ids {
            checked(stream.push(id));
        }
        checked(stream.finish());
    });
});
