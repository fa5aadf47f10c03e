//! Rows of a dataset in every format. The first byte says which format the input is.
#![no_main]

use std::cell::LazyCell;
use std::path::Path;

use libfuzzer_sys::fuzz_target;
use litgpt::data::sft::{Encoder, Report};
use litgpt::data::{Choose, DataConfig, Fetch, load};
use litgpt::error::{Error, Result};
use litgpt::tokenizer::Tokenizer;
use litgpt_fuzz::{Folder, SMALL_TOKENIZER, TOKENIZER_CONFIG, checked};

const FILES: [&str; 4] = ["x.json", "x.jsonl", "x.csv", "x.parquet"];

struct Offline;

impl Fetch for Offline {
    fn fetch(&self, _: &str, _: &Path) -> Result<()> {
        Err(Error::usage("no network", ""))
    }

    fn fetch_dataset(&self, _: &str, _: &Path, _: Choose<'_>) -> Result<()> {
        Err(Error::usage("no network", ""))
    }
}

thread_local!(static PLACE: LazyCell<(Folder, Tokenizer)> = LazyCell::new(|| {
    let folder = Folder::new();
    folder.put("tokenizer.json", SMALL_TOKENIZER);
    folder.put("tokenizer_config.json", TOKENIZER_CONFIG);
    let tokenizer = Tokenizer::load(&folder.path("")).expect("the small tokenizer works");
    (folder, tokenizer)
}));

fuzz_target!(|data: &[u8]| {
    let Some((choice, content)) = data.split_first() else { return };
    PLACE.with(|place| {
        let (folder, tokenizer) = &**place;
        let name = FILES[usize::from(*choice) % FILES.len()];
        folder.put(name, content);
        let columns = (choice & 0x40 != 0).then(|| "instruction=a,output=b".to_owned());
        let config = DataConfig {
            name: "JSON".to_owned(),
            json_path: Some(folder.path(name)),
            columns,
            val_split_fraction: Some(0.5),
            ..DataConfig::default()
        };
        let Some(dataset) = checked(load(&config, tokenizer, &Offline)) else { return };
        let encoder = Encoder {
            tokenizer,
            style: &dataset.style,
            mask_prompt: None,
            ignore_index: -100,
            max_seq_length: Some(64),
        };
        if let Some(samples) = checked(encoder.encode_all(&dataset.train, &|_| ()).map_err(|(_, error)| error)) {
            let _ = Report::of(&samples);
        }
    });
});
