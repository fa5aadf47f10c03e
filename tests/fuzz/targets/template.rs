//! Chat templates.
#![no_main]

use std::path::Path;

use libfuzzer_sys::fuzz_target;
use litgpt::data::chat::{ChatTemplate, Message};
use litgpt_fuzz::checked;

fuzz_target!(|data: &[u8]| {
    let Ok(source) = std::str::from_utf8(data) else { return };
    let Some(template) = checked(ChatTemplate::new(Path::new("chat_template.jinja"), source, "<s>", "</s>")) else {
        return;
    };
    let talk = [("system", "Be brief."), ("user", "Hello"), ("assistant", "Hi"), ("user", "?"), ("assistant", "Hi")];
    let messages = talk.map(|(role, content)| Message::new(role, content));
    checked(template.render(&messages, true));
    checked(template.answers(&messages));
});
