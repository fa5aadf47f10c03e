//! Prompt styles: the text that a model is shown for an instruction, and which style belongs to which model.
//!
//! `STYLES` is LitGPT's list; a style is data, filled in by [`PromptStyle::apply`]. The longer default system prompts
//! are in `system_prompts.rs`. The style `chat` is the checkpoint's own template, see `chat.rs`.

mod styles;

use super::chat::{ChatTemplate, Dialogue, Message};
use crate::error::{Error, Result, closest};
use crate::tokenizer::Tokenizer;
use regex::Regex;
use std::sync::{Arc, LazyLock};
use styles::{MODELS, STYLES, Style, find, normal};

/// Name of the style that is the checkpoint's chat template.
pub const CHAT: &str = "chat";

static MODEL_STYLES: LazyLock<Vec<(Regex, &'static Style)>> = LazyLock::new(|| {
    let row = |&(pattern, name): &(&str, &str)| Some((Regex::new(pattern).ok()?, find(name)?));
    MODELS.iter().filter_map(row).collect()
});

/// Styles that LitGPT knows by their class only.
const WITHOUT_KEY: [&str; 4] = ["default", "falcon3", "r1", "chatml"];

/// Keys of all styles.
pub fn names() -> impl Iterator<Item = &'static str> {
    STYLES.iter().map(|style| style.name)
}

/// How instructions and conversations become the text that the model is shown.
#[derive(Debug, Clone)]
pub struct PromptStyle(Kind);

#[derive(Debug, Clone)]
enum Kind {
    Fixed(&'static Style),
    Chat(Arc<ChatTemplate>),
}

impl PromptStyle {
    /// The style called `name`: LitGPT's key (`alpaca`), class (`Alpaca`) or class path (`litgpt.prompts.Alpaca`); or
    /// `chat`, the chat template of `tokenizer`.
    ///
    /// # Errors
    /// `Error::Usage` if there is no such style, or if the tokenizer has no template.
    pub fn resolve(name: &str, tokenizer: &Tokenizer) -> Result<Self> {
        if normal(last_part(name)) == CHAT {
            return Ok(Self(Kind::Chat(Arc::new(ChatTemplate::of(tokenizer)?))));
        }
        Self::by_name(name)
    }

    /// The fixed style called `name`, as in [`PromptStyle::resolve`].
    ///
    /// # Errors
    /// `Error::Usage` if there is no such style.
    pub fn by_name(name: &str) -> Result<Self> {
        let last = last_part(name);
        find(last).map(|style| Self(Kind::Fixed(style))).ok_or_else(|| {
            let candidates = STYLES.iter().flat_map(|style| [style.name, style.class]).chain([CHAT]);
            let hint = closest(last, candidates).map_or_else(
                || format!("choose chat or one of {}", names().collect::<Vec<_>>().join(", ")),
                |near| format!("did you mean `{near}`?"),
            );
            Error::usage(format!("no prompt style is called `{name}`"), hint)
        })
    }

    /// The style of a compiled chat template.
    #[must_use]
    pub fn chat(template: ChatTemplate) -> Self {
        Self(Kind::Chat(Arc::new(template)))
    }

    /// The style that the model called `name` was trained with, by LitGPT's table; `default` if it is not in there.
    #[must_use]
    pub fn for_model(name: &str) -> Self {
        let style = MODEL_STYLES.iter().find(|(pattern, _)| pattern.is_match(name)).map_or(&STYLES[0], |row| row.1);
        Self(Kind::Fixed(style))
    }

    /// LitGPT's key, such as `alpaca`, or `chat`.
    #[must_use]
    pub fn name(&self) -> &str {
        match &self.0 {
            Kind::Fixed(style) => style.name,
            Kind::Chat(_) => CHAT,
        }
    }

    /// LitGPT's class, such as `Alpaca`, or `Chat`.
    #[must_use]
    pub fn class_name(&self) -> &str {
        match &self.0 {
            Kind::Fixed(style) => style.class,
            Kind::Chat(_) => "Chat",
        }
    }

    /// Whether LitGPT knows the style by [`PromptStyle::name`]; some it knows by [`PromptStyle::class_name`] only.
    #[must_use]
    pub fn has_key(&self) -> bool {
        matches!(&self.0, Kind::Fixed(style) if !WITHOUT_KEY.contains(&style.name))
    }

    /// The chat template, if the style is one.
    #[must_use]
    pub fn template(&self) -> Option<&ChatTemplate> {
        match &self.0 {
            Kind::Fixed(_) => None,
            Kind::Chat(template) => Some(template),
        }
    }

    /// The prompt for an instruction. An empty `input` or `sys` counts as none; without `sys` the style's own system
    /// prompt is used; a style without a place for one of them leaves it out. A chat template is given the instruction
    /// and, behind a blank line, the input as one turn.
    ///
    /// # Errors
    /// When a chat template fails.
    pub fn apply(&self, prompt: &str, input: Option<&str>, sys: Option<&str>) -> Result<String> {
        match &self.0 {
            Kind::Fixed(style) => Ok(style.apply(prompt, input, sys)),
            Kind::Chat(template) => {
                let system = sys.filter(|text| !text.is_empty()).map(|text| Message::new("system", text));
                let messages: Vec<_> = system.into_iter().chain([instruction(prompt, input)]).collect();
                template.render(&messages, true)
            }
        }
    }

    /// The turns of a conversation in a fixed style: what the model is shown before each answer, and the answer; `None`
    /// at the end where a prompt waits for one. The system prompt comes before the first turn.
    ///
    /// # Errors
    /// `Unsupported` for a role that fixed styles do not know, or an order that they cannot write.
    pub fn turns<'a>(&self, dialogue: impl Into<Dialogue<'a>>) -> Result<Vec<(String, Option<&'a str>)>> {
        let dialogue = dialogue.into();
        let refused = |what: &str| {
            let what = format!("{what} with prompt style {}", self.name());
            Error::unsupported(what, "use --data.prompt_style chat")
        };
        if let Some(key) = dialogue.tool_keys().next() {
            return Err(refused(&format!("`{key}`")));
        }
        let (mut turns, mut sys, mut user) = (Vec::new(), Vec::new(), Vec::new());
        let prompt = |turns: &[_], sys: &mut Vec<&str>, user: &mut Vec<&str>| {
            let sys = std::mem::take(sys).join("\n\n");
            let user = std::mem::take(user).join("\n\n");
            match &self.0 {
                Kind::Fixed(style) if !turns.is_empty() => [style.user.0, &user, style.user.1].concat(),
                Kind::Fixed(style) => style.apply(&user, None, Some(&sys)),
                Kind::Chat(_) => user,
            }
        };
        for message in dialogue.messages {
            match message.role.as_str() {
                "system" if turns.is_empty() => sys.push(message.content.as_str()),
                // A later system prompt is said to the model as the user's words: the styles have no place for it.
                "system" | "user" => user.push(message.content.as_str()),
                "assistant"
                    if message.reasoning_content.as_deref().is_some_and(|thought| !thought.trim().is_empty()) =>
                {
                    return Err(refused("`reasoning_content`"));
                }
                "assistant" => {
                    let text = prompt(&turns, &mut sys, &mut user);
                    turns.push((text, Some(message.content.as_str())));
                }
                other => return Err(refused(&format!("role `{other}`"))),
            }
        }
        if !user.is_empty() {
            let text = prompt(&turns, &mut sys, &mut user);
            turns.push((text, None));
        }
        Ok(turns)
    }

    /// Ids that the model continues to answer the last of `messages`, with BOS where the style or the tokenizer wants
    /// it: the one way from a conversation to a prompt, for training, `generate`, `chat` and `serve`.
    ///
    /// # Errors
    /// When the template, the style or the tokenizer cannot take the messages.
    pub fn prompt_ids<'a>(&self, tokenizer: &Tokenizer, dialogue: impl Into<Dialogue<'a>>) -> Result<Vec<u32>> {
        let dialogue = dialogue.into();
        if let Some(template) = self.template() {
            // A template writes its BOS itself.
            return tokenizer.encode(&template.render(dialogue, true)?);
        }
        let mut ids = Vec::new();
        for (i, (prompt, answer)) in self.turns(dialogue)?.into_iter().enumerate() {
            ids.extend(if i == 0 { tokenizer.encode_prompt(&prompt)? } else { tokenizer.encode(&prompt)? });
            if let Some(answer) = answer {
                ids.extend(tokenizer.encode_answer(answer)?);
            }
        }
        Ok(ids)
    }

    /// A chat template that writes conversations as [`PromptStyle::turns`] does, for programs that know templates only;
    /// `None` if the style is one itself.
    #[must_use]
    pub fn jinja(&self) -> Option<String> {
        match &self.0 {
            Kind::Fixed(style) => Some(style.jinja()),
            Kind::Chat(_) => None,
        }
    }

    /// Texts, besides the tokenizer's stop tokens, at which an answer ends.
    #[must_use]
    pub fn stop_texts(&self) -> &[&str] {
        match &self.0 {
            Kind::Fixed(style) => style.stops,
            Kind::Chat(_) => &[],
        }
    }

    /// Tokens that end an answer: the tokenizer's, and those of [`PromptStyle::stop_texts`] that it has as one token, which
    /// the text need not show where they are special.
    #[must_use]
    pub fn stop_ids(&self, tokenizer: &Tokenizer) -> Vec<u32> {
        let mut ids = tokenizer.eos_ids().to_vec();
        ids.extend(self.stop_texts().iter().filter_map(|text| tokenizer.token_to_id(text)));
        ids
    }
}

/// An instruction and its input as a user's turn.
pub(super) fn instruction(prompt: &str, input: Option<&str>) -> Message {
    match input.filter(|text| !text.is_empty()) {
        Some(input) => Message::new("user", &format!("{prompt}\n\n{input}")),
        None => Message::new("user", prompt),
    }
}

/// `Alpaca` of `litgpt.prompts.Alpaca`.
fn last_part(name: &str) -> &str {
    if name.starts_with("litgpt.") { name.rsplit('.').next().unwrap_or(name) } else { name }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use std::path::Path;

    /// What llama.cpp and others write by the template is what was trained on.
    #[test]
    fn every_style_is_a_template_too() {
        let say = |role: &str, content: &str| Message::new(role, content);
        let talk =
            [say("system", "Be \"brief\"."), say("user", "Hi {{ x }}"), say("assistant", "Ho"), say("user", "Bye\n")];
        for name in names() {
            let style = PromptStyle::by_name(name).unwrap();
            let template = ChatTemplate::new(Path::new("t"), &style.jinja().unwrap(), "<s>", "</s>").unwrap();
            for messages in [&talk[..], &talk[1..], &talk[1..2]] {
                let turns = style.turns(messages).unwrap();
                let end = |answer: Option<&str>| answer.map(|text| format!("{text}</s>")).unwrap_or_default();
                let want: String = turns.into_iter().map(|(prompt, answer)| prompt + &end(answer)).collect();
                assert_eq!(template.render(messages, true).unwrap(), want, "{name}");
            }
        }
    }

    #[test]
    fn every_name_finds_its_own_style() {
        for style in STYLES {
            let names = [style.name.to_owned(), style.class.to_owned(), format!("litgpt.prompts.{}", style.class)];
            for name in names {
                assert_eq!(PromptStyle::by_name(&name).unwrap().name(), style.name, "{name}");
            }
        }
        assert_eq!(PromptStyle::by_name("alpaca").unwrap().class_name(), "Alpaca");
    }

    #[test]
    fn unknown_name_suggests_a_near_one() {
        let e = PromptStyle::by_name("alpcaa").unwrap_err();
        assert_eq!(e.to_string(), "no prompt style is called `alpcaa`");
        assert_eq!(e.hint().unwrap(), "did you mean `alpaca`?");
        assert!(matches!(e, Error::Usage { .. }));
        let hint = PromptStyle::by_name("zzzzzzzzzzzzzzzz").unwrap_err().hint().unwrap();
        assert!(hint.contains("alpaca, flan"), "{hint}");
        assert!(PromptStyle::by_name("").is_err());
    }

    #[test]
    fn every_row_of_the_model_table_is_usable() {
        assert_eq!(MODEL_STYLES.len(), MODELS.len());
    }

    /// A folder is named as the Hub names the model, a `model_config.yaml` says LitGPT's name.
    #[test]
    fn litgpts_models_have_their_styles_by_either_name() {
        let rows = include_str!("../../../tests/data/model_styles.tsv").lines().filter(|line| !line.starts_with('#'));
        let rows: Vec<Vec<&str>> = rows.map(|line| line.split('\t').collect()).collect();
        assert_eq!(rows.len(), 210);
        for row in rows {
            let [hub, litgpt, class] = row[..] else { panic!("{row:?}") };
            let folder = hub.rsplit('/').next().unwrap();
            for name in [hub, folder, litgpt] {
                assert_eq!(PromptStyle::for_model(name).class_name(), class, "{name}");
            }
        }
    }

    #[test]
    fn first_match_wins_in_the_model_table() {
        let table = [
            ("stablelm-tuned-alpha-3b", "stablelm-alpha"),
            ("Falcon3-7B-Instruct", "falcon3"),
            ("falcon-7b-instruct", "falcon"),
            ("Llama-2-7b-chat-hf-function-calling-v2", "llama2-function-calling"),
            ("Llama-2-7b-chat-hf", "llama2"),
            ("meta-llama/Llama-3.2-1B-Instruct", "llama3"),
            ("Llama-3.2-1B", "default"),
            ("OLMo-2-1124-7B-DPO", "llama3"),
            ("R1-Distill-Llama-8B", "r1"),
            ("Mixtral-8x7B-Instruct-v0.1", "codellama"),
            ("Phi-4-mini-reasoning", "phi-4-mini-reasoning"),
            ("Phi-4-mini-instruct", "phi-4-mini"),
            ("Phi-4-reasoning-plus", "phi-4-reasoning"),
            ("phi-4", "phi-4"),
            ("tiny-llama-1.1b-chat", "tinyllama"),
            ("CodeGemma-7b-it", "gemma"),
            ("OLMo-1B-hf", "olmo"),
            ("Qwen2.5-Math-1.5B", "qwen2.5-math"),
            ("Qwen2.5-Coder-1.5B", "qwen2.5"),
            ("QwQ-32B", "qwq"),
            ("Qwen3-0.6B-Base", "qwen3"),
            ("SmolLM2-135M-Instruct", "smollm2"),
            ("SmolLM2-135M", "default"),
            ("pythia-14m", "default"),
        ];
        for (model, style) in table {
            assert_eq!(PromptStyle::for_model(model).name(), style, "{model}");
        }
    }

    #[test]
    fn system_prompt_and_input_are_placed_or_left_out() {
        let by = |name| PromptStyle::by_name(name).unwrap();
        assert_eq!(by("default").apply("p", Some("i"), Some("s")).unwrap(), "p");
        assert_eq!(
            by("alpaca").apply("p", Some("i"), Some("s")).unwrap(),
            "s### Instruction:\np\n\n### Input:\ni\n\n### Response:\n"
        );
        assert_eq!(by("alpaca").apply("p", Some(""), Some("")).unwrap(), by("alpaca").apply("p", None, None).unwrap());
        assert_eq!(by("codellama").apply("p", None, None).unwrap(), "[INST] p [/INST]");
        assert_eq!(by("codellama").apply("p", None, Some("s")).unwrap(), "[INST] <<SYS>>\ns\n<</SYS>>\n\np [/INST]");
        assert_eq!(
            by("gemma").apply("{p}", None, Some("s")).unwrap(),
            "<start_of_turn>user\n{p}<end_of_turn>\n<start_of_turn>model\n"
        );
    }

    /// Styles that have no golden because LitGPT has no key for them.
    #[test]
    fn styles_without_a_key() {
        let by = |name| PromptStyle::by_name(name).unwrap();
        assert_eq!(by("Falcon3").apply("p", None, None).unwrap(), "<|user|>\np<|endoftext|>\n<|assistant|>\n");
        assert_eq!(by("R1Base").apply("p", None, None).unwrap(), "<｜User｜>p<｜Assistant｜>");
        assert_eq!(by("R1Base").apply("p", None, Some("s")).unwrap(), "s<｜User｜>p<｜Assistant｜>");
        assert_eq!(
            by("ChatML").apply("p", None, None).unwrap(),
            "<|im_start|>user\np<|im_end|>\n<|im_start|>assistant\n"
        );
    }

    #[test]
    fn conversations_are_written_turn_by_turn() {
        let messages = [("system", "s"), ("user", "a"), ("assistant", "b"), ("user", "c")]
            .map(|(role, content)| Message::new(role, content));
        let style = PromptStyle::by_name("llama3").unwrap();
        let turns = style.turns(&messages).unwrap();
        assert_eq!(turns[0], (style.apply("a", None, Some("s")).unwrap(), Some("b")));
        let user = "<|start_header_id|>user<|end_header_id|>\n\nc<|eot_id|><|start_header_id|>assistant\
                    <|end_header_id|>\n\n";
        assert_eq!(turns[1..], [(user.to_owned(), None)]);
        let e = style.turns(&[Message::new("tool", "x")]).unwrap_err();
        assert!(e.to_string().contains("role `tool`"), "{e}");
        // A fixed style has no place for a thought; an empty one is none.
        let thought = |text: &str| {
            let answer = Message { reasoning_content: Some(text.to_owned()), ..Message::new("assistant", "b") };
            style
                .turns([Message::new("user", "a"), answer].as_slice())
                .map(|turns| turns.len())
                .map_err(|e| e.to_string())
        };
        assert_eq!(thought(" "), Ok(1));
        assert!(thought("because").unwrap_err().contains("`reasoning_content` with prompt style llama3"));
    }

    /// A base model's files name only its EOS, and a special token is not in the text that is searched.
    #[test]
    fn stop_texts_that_are_tokens_stop_by_their_ids() {
        let from = Path::new(env!("CARGO_MANIFEST_DIR")).join("data/tiny");
        let dir = tempfile::tempdir().unwrap();
        let text = std::fs::read_to_string(from.join("tokenizer.json")).unwrap();
        let mut json: serde_json::Value = serde_json::from_str(&text).unwrap();
        let known = Tokenizer::load(&from).unwrap();
        let eot = known.vocab_size();
        json["added_tokens"].as_array_mut().unwrap().push(serde_json::json!({
            "id": eot, "content": "<|eot_id|>", "single_word": false, "lstrip": false, "rstrip": false,
            "normalized": false, "special": true
        }));
        std::fs::write(dir.path().join("tokenizer.json"), json.to_string()).unwrap();
        std::fs::copy(from.join("tokenizer_config.json"), dir.path().join("tokenizer_config.json")).unwrap();
        let tokenizer = Tokenizer::load(dir.path()).unwrap();
        let llama3 = PromptStyle::by_name("llama3").unwrap();
        let eos = tokenizer.eos_ids().to_vec();
        assert_eq!(llama3.stop_ids(&tokenizer), [&eos[..], &[eot as u32]].concat());
        assert_eq!(llama3.stop_ids(&known), known.eos_ids());
        assert_eq!(PromptStyle::by_name("falcon").unwrap().stop_ids(&tokenizer), eos, "words, not a token");
    }

    #[test]
    fn stop_texts_are_litgpts() {
        assert_eq!(PromptStyle::by_name("llama3").unwrap().stop_texts(), ["<|eot_id|>"]);
        assert!(PromptStyle::by_name("alpaca").unwrap().stop_texts().is_empty());
    }
}
