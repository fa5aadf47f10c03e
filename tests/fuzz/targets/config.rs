//! config.json beside the weights of the small model.
#![no_main]

use std::cell::LazyCell;

use libfuzzer_sys::fuzz_target;
use litgpt_fuzz::{Folder, run_model};

thread_local!(static FOLDER: LazyCell<Folder> = LazyCell::new(Folder::with_model));

fuzz_target!(|data: &[u8]| {
    FOLDER.with(|folder| {
        folder.put("config.json", data);
        run_model(&folder.path(""));
    });
});
