//! pytorch_model.bin: the whole archive, or the program in it. The first byte says which of the two the input is.
#![no_main]

use std::cell::LazyCell;

use libfuzzer_sys::fuzz_target;
use litgpt_fuzz::{Folder, config, run_model, zip};

thread_local!(static FOLDER: LazyCell<Folder> = LazyCell::new(|| {
    let folder = Folder::new();
    folder.put("config.json", config().to_string());
    folder
}));

fuzz_target!(|data: &[u8]| {
    let Some((choice, content)) = data.split_first() else { return };
    let file = if choice % 2 == 0 {
        content.to_vec()
    } else {
        let storage = [0u8; 2048];
        zip(&[("a/data.pkl", content), ("a/data/0", &storage), ("a/data/1", &storage[..64]), ("a/version", b"3\n")])
    };
    FOLDER.with(|folder| {
        folder.put("pytorch_model.bin", file);
        run_model(&folder.path(""));
    });
});
