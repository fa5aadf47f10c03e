//! Safetensors files and the index over them. The first byte says which of the two the input is.
#![no_main]

use std::cell::LazyCell;

use libfuzzer_sys::fuzz_target;
use litgpt_fuzz::{Folder, config, run_model, weights};

thread_local!(static FOLDERS: LazyCell<[Folder; 2]> = LazyCell::new(|| {
    let [alone, indexed] = [Folder::new(), Folder::new()];
    alone.put("config.json", config().to_string());
    indexed.put("config.json", config().to_string());
    indexed.put("a.safetensors", weights());
    [alone, indexed]
}));

fuzz_target!(|data: &[u8]| {
    let Some((choice, content)) = data.split_first() else { return };
    FOLDERS.with(|folders| {
        let (folder, name) = if choice % 2 == 0 {
            (&folders[0], "model.safetensors")
        } else {
            (&folders[1], "model.safetensors.index.json")
        };
        folder.put(name, content);
        run_model(&folder.path(""));
    });
});
