//! adapter_config.json beside the tensors of an adapter, and these tensors. The first byte says which of the two the
//! input is.
#![no_main]

use std::cell::{LazyCell, RefCell};

use libfuzzer_sys::fuzz_target;
use litgpt::checkpoint::{Checkpoint, adapter};
use litgpt::model::Gpt;
use litgpt_fuzz::{Folder, adapter_config, adapter_weights, checked, run_model};

thread_local!(static BASE: LazyCell<RefCell<(Folder, Checkpoint, Gpt)>> = LazyCell::new(|| {
    let folder = Folder::with_model();
    let (checkpoint, gpt) = run_model(&folder.path("")).expect("the small model works");
    RefCell::new((folder, checkpoint, gpt))
}));

fuzz_target!(|data: &[u8]| {
    let Some((choice, content)) = data.split_first() else { return };
    BASE.with(|base| {
        let (folder, checkpoint, gpt) = &mut *base.borrow_mut();
        let dir = folder.path("adapter");
        if choice % 2 == 0 {
            folder.put("adapter/adapter_config.json", content);
            folder.put("adapter/adapter_model.safetensors", adapter_weights());
        } else {
            folder.put("adapter/adapter_config.json", adapter_config().to_string());
            folder.put("adapter/adapter_model.safetensors", content);
        }
        checked(adapter::base_of(&dir));
        if checked(adapter::load(&dir, checkpoint.family, gpt)).is_some() {
            let _ = gpt.next_logits(&[1, 2, 3], &mut gpt.cache());
        }
    });
});
