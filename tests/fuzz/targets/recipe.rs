//! Recipes in YAML.
#![no_main]

use std::cell::LazyCell;

use libfuzzer_sys::fuzz_target;
use litgpt::cli::recipe;
use litgpt_fuzz::{Folder, checked};

thread_local!(static FOLDER: LazyCell<Folder> = LazyCell::new(Folder::new));

fuzz_target!(|data: &[u8]| {
    FOLDER.with(|folder| {
        folder.put("recipe.yaml", data);
        let Some(settings) = checked(recipe::from_file(&folder.path("recipe.yaml"))) else { return };
        checked(settings.validate());
        let Some(yaml) = checked(recipe::to_yaml(&settings)) else { return };
        folder.put("again.yaml", &yaml);
        let again = recipe::from_file(&folder.path("again.yaml")).expect("what was written is read");
        assert_eq!(recipe::to_yaml(&again).ok().as_ref(), Some(&yaml));
    });
});
