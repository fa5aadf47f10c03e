//! LitGPT's prompt styles as data, and which models they belong to. A new style is a row here.

use crate::data::system_prompts as system;

/// Text before and text after something.
pub(super) type Around = (&'static str, &'static str);

/// One row of the registry. A prompt is `start`, the system part (if there is a system prompt), the user part.
#[derive(Debug)]
pub(super) struct Style {
    /// LitGPT's key; for the four classes without one, our own.
    pub(super) name: &'static str,
    /// LitGPT's class.
    pub(super) class: &'static str,
    pub(super) start: &'static str,
    /// Around the system prompt; `None`: the style has no place for one.
    pub(super) system: Option<Around>,
    pub(super) default_system: &'static str,
    /// Around the instruction.
    pub(super) user: Around,
    /// Style with an input; `None`: an input is left out.
    pub(super) input: Option<WithInput>,
    /// Texts, besides the tokenizer's stop tokens, at which an answer ends.
    pub(super) stops: &'static [&'static str],
}

#[derive(Debug)]
pub(super) struct WithInput {
    pub(super) default_system: &'static str,
    /// Between instruction and input.
    pub(super) between: &'static str,
}

const PLAIN: Style = Style {
    name: "default",
    class: "Default",
    start: "",
    system: None,
    default_system: "",
    user: ("", ""),
    input: None,
    stops: &[],
};

const ALPACA: Style = Style {
    name: "alpaca",
    class: "Alpaca",
    system: Some(("", "")),
    default_system: system::TASK,
    user: ("### Instruction:\n", "\n\n### Response:\n"),
    input: Some(WithInput { default_system: system::TASK_WITH_INPUT, between: "\n\n### Input:\n" }),
    ..PLAIN
};

const ZEPHYR: Style = Style {
    name: "stablelm-zephyr",
    class: "StableLMZephyr",
    user: ("<|user|>\n", "<|endoftext|>\n<|assistant|>\n"),
    ..PLAIN
};

const CHATML: Style = Style {
    name: "chatml",
    class: "ChatML",
    system: Some(("<|im_start|>system\n", "<|im_end|>\n")),
    user: ("<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n"),
    ..PLAIN
};

const PHI4: Style = Style {
    name: "phi-4",
    class: "Phi4",
    system: Some(("<|im_start|>system<|im_sep|>", "<|im_end|>")),
    user: ("<|im_start|>user<|im_sep|>", "<|im_end|><|im_start|>assistant<|im_sep|>"),
    ..PLAIN
};

const PHI4_MINI: Style = Style {
    name: "phi-4-mini",
    class: "Phi4Mini",
    system: Some(("<|system|>", "<|end|>")),
    user: ("<|user|>", "<|end|><|assistant|>"),
    ..PLAIN
};

pub(super) static STYLES: &[Style] = &[
    PLAIN,
    ALPACA,
    Style { name: "flan", class: "FLAN", input: None, ..ALPACA },
    Style { name: "longform", class: "Longform", default_system: system::TASK_WITH_INPUT, input: None, ..ALPACA },
    Style {
        name: "stablelm-alpha",
        class: "StableLMAlpha",
        system: Some(("<|SYSTEM|>", "")),
        default_system: system::STABLELM_ALPHA,
        user: ("<|USER|>", "<|ASSISTANT|>"),
        stops: &["<|SYSTEM|>", "<|ASSISTANT|>", "<|USER|>"],
        ..PLAIN
    },
    ZEPHYR,
    Style { name: "falcon", class: "Falcon", user: ("", "\nAnswer:"), stops: &["User:", "\nUser"], ..PLAIN },
    Style { name: "falcon3", class: "Falcon3", stops: &["<|endoftext|>"], ..ZEPHYR },
    Style {
        name: "llama2-function-calling",
        class: "Llama2FunctionCalling",
        start: system::SEARCH_FUNCTION,
        system: Some(("[INST]<<SYS>>\n", "\n<</SYS>>\n\n")),
        default_system: system::FUNCTION_CALLING,
        user: ("", "[/INST]\n\n"),
        ..PLAIN
    },
    Style {
        name: "llama2",
        class: "Llama2",
        system: Some(("[INST] <<SYS>>\n", "\n<</SYS>>\n\n ")),
        default_system: system::LLAMA2,
        user: ("", " [/INST] "),
        ..PLAIN
    },
    Style {
        name: "llama3",
        class: "Llama3",
        start: "<|begin_of_text|>",
        system: Some(("<|start_header_id|>system<|end_header_id|>\n\n", "<|eot_id|>")),
        default_system: "You are a helpful assistant.",
        user: (
            "<|start_header_id|>user<|end_header_id|>\n\n",
            "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
        ),
        stops: &["<|eot_id|>"],
        ..PLAIN
    },
    Style {
        name: "r1",
        class: "R1Base",
        system: Some(("", "")),
        user: ("<｜User｜>", "<｜Assistant｜>"),
        stops: &["<｜end▁of▁sentence｜>"],
        ..PLAIN
    },
    Style {
        name: "freewilly2",
        class: "FreeWilly2",
        system: Some(("### System:\n", "\n\n")),
        default_system: "This is a system prompt, please behave and help the user.",
        user: ("### User:\n", "\n\n### Assistant:\n"),
        ..PLAIN
    },
    Style { name: "platypus", class: "Platypus", user: ("### Instruction:\n\n", "\n\n### Response:\n"), ..PLAIN },
    Style { name: "stablecode", class: "StableCode", user: ("###Instruction\n", "###Response\n"), ..PLAIN },
    Style {
        name: "codellama",
        class: "CodeLlama",
        start: "[INST] ",
        system: Some(("<<SYS>>\n", "\n<</SYS>>\n\n")),
        user: ("", " [/INST]"),
        ..PLAIN
    },
    Style { name: "phi-1", class: "Phi1", user: ("", "\n\nAnswer:"), stops: &["Answer:"], ..PLAIN },
    Style { name: "phi-2", class: "Phi2", user: ("Instruct: ", "\nOutput:"), ..PLAIN },
    Style {
        name: "phi-3",
        class: "Phi3",
        system: Some(("<|system|>\n", "<|end|>\n")),
        default_system: "You are a helpful assistant.",
        user: ("<|user|>\n", "<|end|>\n<|assistant|>\n"),
        ..PLAIN
    },
    PHI4,
    Style {
        name: "phi-4-reasoning",
        class: "Phi4Reasoning",
        system: Some(("<|im_start>system<|im_sep|>", "<|im_end|>")), // LitGPT's spelling of the first token
        default_system: system::PHI4_REASONING,
        ..PHI4
    },
    PHI4_MINI,
    Style {
        name: "phi-4-mini-reasoning",
        class: "Phi4MiniReasoning",
        default_system: "Your name is Phi, an AI math expert developed by Microsoft.",
        ..PHI4_MINI
    },
    Style {
        name: "tinyllama",
        class: "TinyLlama",
        system: Some(("<|system|>\n", "</s>\n")),
        default_system: "You are a friendly chatbot who always gives helpful, detailed, and polite answers.",
        user: ("<|user|>\n", "</s>\n<|assistant|>\n"),
        ..PLAIN
    },
    Style {
        name: "gemma",
        class: "Gemma",
        user: ("<start_of_turn>user\n", "<end_of_turn>\n<start_of_turn>model\n"),
        ..PLAIN
    },
    Style { name: "olmo", class: "OLMo", user: ("<|endoftext|><|user|>\n", "\n<|assistant|>\n"), ..PLAIN },
    CHATML,
    Style { name: "qwen2.5", class: "Qwen2_5", default_system: system::QWEN2_5, ..CHATML },
    Style { name: "qwen2.5-math", class: "Qwen2_5_Math", default_system: system::QWEN2_5_MATH, ..CHATML },
    Style { name: "qwq", class: "QwQ", default_system: system::QWQ, ..CHATML },
    Style { name: "qwen3", class: "Qwen3", ..CHATML },
    Style { name: "smollm2", class: "SmolLM2", default_system: system::SMOLLM2, ..CHATML },
    Style { name: "salamandra", class: "Salamandra", default_system: system::SALAMANDRA, ..CHATML },
];

/// Model name (a regular expression, anywhere in it) and its style; the first that matches wins. LitGPT gives some models
/// names of its own (`Gemma-2b-it`, `tiny-llama-1.1b-chat`): these and the Hub's both have a style here.
pub(super) const MODELS: &[(&str, &str)] = &[
    ("stablelm-tuned-alpha", "stablelm-alpha"),
    ("stablelm-zephyr-3b", "stablelm-zephyr"),
    ("stablecode-instruct", "stablecode"),
    ("Falcon3.*-Instruct", "falcon3"),
    ("falcon.*-instruct", "falcon"),
    ("Llama-2-7b-chat-hf-function-calling-v2", "llama2-function-calling"),
    ("Llama-2.*-chat", "llama2"),
    ("Llama-3.*-Instruct", "llama3"),
    ("OLMo-2.*-(Instruct|SFT|DPO)", "llama3"),
    ("R1", "r1"),
    ("FreeWilly2", "freewilly2"),
    ("Platypus", "platypus"),
    ("CodeLlama|Mi[sx]tral.*Instruct", "codellama"),
    ("phi-1", "phi-1"),
    ("phi-2", "phi-2"),
    ("Phi-3", "phi-3"),
    ("Phi-4-reasoning", "phi-4-reasoning"),
    ("Phi-4-mini-reasoning", "phi-4-mini-reasoning"),
    ("Phi-4-mini", "phi-4-mini"),
    ("phi-4", "phi-4"),
    (r"tiny-llama.*chat|TinyLlama-1\.1B-Chat-v1\.0", "tinyllama"),
    ("[Gg]emma.*-it", "gemma"),
    ("OLMo.*-hf", "olmo"),
    (r"Qwen2\.5-Math-", "qwen2.5-math"),
    (r"Qwen2\.5-", "qwen2.5"),
    ("QwQ-", "qwq"),
    ("Qwen3-", "qwen3"),
    ("SmolLM2.*-Instruct", "smollm2"),
    ("salamandra-.*-instruct", "salamandra"),
];

impl Style {
    pub(super) fn jinja(&self) -> String {
        // A text of JSON is one of Jinja.
        let quoted = |text: &str| serde_json::Value::from(text).to_string();
        let [start, sys] = [self.start, self.default_system].map(quoted);
        let [before, after] = <[&str; 2]>::from(self.user).map(quoted);
        let system = self.system.map_or_else(String::new, |around| {
            let [before, after] = <[&str; 2]>::from(around).map(quoted);
            format!("{{%- if ns.sys -%}}{{{{- {before} + ns.sys + {after} -}}}}{{%- endif -%}}")
        });
        let lines = [
            format!("{{%- set ns = namespace(sys={sys}, first=true) -%}}"),
            "{%- for message in messages -%}".to_owned(),
            "{%- if message['role'] == 'system' -%}{%- set ns.sys = message['content'] -%}".to_owned(),
            "{%- elif message['role'] == 'user' -%}".to_owned(),
            format!("{{%- if ns.first -%}}{{{{- {start} -}}}}{system}{{%- set ns.first = false -%}}{{%- endif -%}}"),
            format!("{{{{- {before} + message['content'] + {after} -}}}}"),
            "{%- else -%}{{- message['content'] + eos_token -}}{%- endif -%}".to_owned(),
            "{%- endfor -%}".to_owned(),
        ];
        lines.concat()
    }

    pub(super) fn apply(&self, prompt: &str, input: Option<&str>, sys: Option<&str>) -> String {
        let input = self.input.as_ref().zip(input.filter(|text| !text.is_empty()));
        let default = input.map_or(self.default_system, |(with, _)| with.default_system);
        let sys = sys.filter(|text| !text.is_empty()).unwrap_or(default);
        let mut text = String::from(self.start);
        if let Some((before, after)) = self.system.filter(|_| !sys.is_empty()) {
            text.extend([before, sys, after]);
        }
        text.extend([self.user.0, prompt]);
        if let Some((with, input)) = input {
            text.extend([with.between, input]);
        }
        text.push_str(self.user.1);
        text
    }
}

/// Letters and digits in lower case: `Qwen2_5` and `qwen2.5` are one style.
pub(super) fn normal(name: &str) -> String {
    name.chars().filter(char::is_ascii_alphanumeric).map(|c| c.to_ascii_lowercase()).collect()
}

pub(super) fn find(name: &str) -> Option<&'static Style> {
    let wanted = normal(name);
    STYLES.iter().find(|style| normal(style.name) == wanted || normal(style.class) == wanted)
}
