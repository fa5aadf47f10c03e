//! Writes what each target begins with: whole and correct files in `$SEEDS/TARGET/`, which the targets then break. A
//! target itself, as only such programs link with the counters of the instrumented code; run it with `-runs=0`.
#![no_main]

use std::fs;
use std::path::Path;

use libfuzzer_sys::fuzz_target;
use litgpt::checkpoint::Checkpoint;
use litgpt::tokenizer::Tokenizer;
use litgpt_fuzz::{
    Folder, SMALL_TOKENIZER, TOKENIZER_CONFIG, adapter_config, adapter_weights, config, run_model, tensors, weights,
    zip,
};
use serde_json::{Value, json};

fuzz_target!(init: write(), |_data: &[u8]| {});

fn write() {
    let root = std::env::var_os("SEEDS").expect("SEEDS names a folder");
    check();
    let seeds = [
        ("config", configs()),
        ("weights", vec![chosen(0, weights()), chosen(1, index())]),
        ("pickle", vec![chosen(0, zip(&[("a/data.pkl", &pickle()), ("a/data/0", &[0; 2048])])), chosen(1, pickle())]),
        ("gguf", vec![gguf()]),
        ("adapter", vec![chosen(0, adapter_config().to_string()), chosen(1, adapter_weights())]),
        ("tokenizer", tokenizers()),
        ("rows", rows()),
        ("recipe", RECIPES.iter().map(|text| text.as_bytes().to_vec()).collect()),
        ("template", TEMPLATES.iter().map(|text| text.as_bytes().to_vec()).collect()),
    ];
    for (target, inputs) in seeds {
        let dir = Path::new(&root).join(target);
        fs::create_dir_all(&dir).expect("a folder for the seeds");
        for (i, input) in inputs.iter().enumerate() {
            fs::write(dir.join(format!("seed-{i}")), input).expect("the seed is written");
        }
    }
}

/// The seeds of models are whole: a seed that is refused at its first byte would lead nowhere.
fn check() {
    let model = |folder: &Folder, name: &str| {
        let opened = Checkpoint::open(&folder.path(name)).map(|_| ());
        assert!(opened.is_ok() && run_model(&folder.path(name)).is_some(), "a seed is broken: {opened:?}");
    };
    let folder = Folder::with_model();
    model(&folder, "");
    folder.put("x.gguf", gguf());
    model(&folder, "x.gguf");
    let pickled = Folder::new();
    pickled.put("config.json", config().to_string());
    pickled.put("pytorch_model.bin", zip(&[("a/data.pkl", &pickle()), ("a/data/0", &[0; 2048])]));
    model(&pickled, "");
    folder.put("tokenizer.json", SMALL_TOKENIZER);
    let tokenizer = Tokenizer::load(&folder.path(""));
    assert!(tokenizer.is_ok(), "a seed is broken: {tokenizer:?}");
}

/// The input behind the byte that says what it is.
fn chosen(choice: u8, content: impl AsRef<[u8]>) -> Vec<u8> {
    [&[choice], content.as_ref()].concat()
}

fn configs() -> Vec<Vec<u8>> {
    let with = |more: Value| {
        let mut whole = config();
        let keys = more.as_object().into_iter().flatten();
        keys.for_each(|(key, value)| whole[key] = value.clone());
        whole.to_string().into_bytes()
    };
    let llama3 = json!({"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                        "original_max_position_embeddings": 16});
    let yarn = json!({"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "beta_fast": 32});
    let long = json!({"type": "longrope", "short_factor": [1.0, 1.0], "long_factor": [2.0, 3.0]});
    vec![
        with(json!({})),
        with(json!({"rope_scaling": llama3})),
        with(json!({"rope_scaling": yarn, "model_type": "qwen2", "use_sliding_window": false})),
        with(json!({"rope_scaling": long, "model_type": "phi3", "sliding_window": 8})),
        with(json!({"rope_scaling": {"type": "linear", "factor": 2.0}, "model_type": "mistral", "sliding_window": 4})),
        with(json!({"rope_scaling": {"type": "dynamic", "factor": 2.0}, "attention_bias": true, "mlp_bias": true})),
        with(json!({"model_type": "gemma2", "final_logit_softcapping": 30.0, "query_pre_attn_scalar": 4,
                    "attn_logit_softcapping": 50.0, "hidden_activation": "gelu_pytorch_tanh"})),
        with(json!({"model_type": "mixtral", "num_local_experts": 2, "num_experts_per_tok": 1})),
        with(json!({"model_type": "gpt_neox", "rotary_pct": 0.25, "use_parallel_residual": true,
                    "layer_norm_eps": 1e-5, "rotary_emb_base": 10000})),
        with(json!({"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": true,
                    "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": true}})),
    ]
}

fn index() -> Vec<u8> {
    let names = tensors().into_iter().map(|(name, ..)| (name, json!("a.safetensors"))).collect();
    json!({"metadata": {"total_size": 4096}, "weight_map": Value::Object(names)}).to_string().into_bytes()
}

/// The program of a `pytorch_model.bin` with the tensors of the small model, all of them views of one storage.
fn pickle() -> Vec<u8> {
    let text = |text: &str| [&[b'X', text.len() as u8, 0, 0, 0], text.as_bytes()].concat();
    let list = |list: &[usize]| [&b"("[..], &list.iter().flat_map(|n| int(*n)).collect::<Vec<_>>(), b"t"].concat();
    let mut out = b"\x80\x02}(".to_vec();
    for (name, shape, _) in tensors() {
        let strides: Vec<usize> = (0..shape.len()).map(|i| shape[i + 1..].iter().product()).collect();
        out.extend(text(&name));
        out.extend(b"ctorch._utils\n_rebuild_tensor_v2\n((");
        out.extend([text("storage"), b"ctorch\nFloatStorage\n".to_vec(), text("0"), text("cpu")].concat());
        out.extend([int(512), b"tQ".to_vec(), int(0), list(&shape), list(&strides)].concat());
        out.extend(b"\x89ccollections\nOrderedDict\n)RtR");
    }
    out.extend(b"u.");
    out
}

/// The instruction that pushes `n`.
fn int(n: usize) -> Vec<u8> {
    [&b"J"[..], &(n as u32).to_le_bytes()].concat()
}

/// The small model as a GGUF file with a vocabulary.
fn gguf() -> Vec<u8> {
    const NAMES: [(&str, &str); 11] = [
        ("embed_tokens", "token_embd"),
        ("input_layernorm", "blk.0.attn_norm"),
        ("q_proj", "blk.0.attn_q"),
        ("k_proj", "blk.0.attn_k"),
        ("v_proj", "blk.0.attn_v"),
        ("o_proj", "blk.0.attn_output"),
        ("post_attention_layernorm", "blk.0.ffn_norm"),
        ("gate_proj", "blk.0.ffn_gate"),
        ("up_proj", "blk.0.ffn_up"),
        ("down_proj", "blk.0.ffn_down"),
        ("model.norm", "output_norm"),
    ];
    let settings = settings();
    let tensors = tensors();
    let mut out = [&b"GGUF"[..], &3u32.to_le_bytes(), &(tensors.len() as u64).to_le_bytes()].concat();
    out.extend((settings.len() as u64).to_le_bytes());
    out.extend(settings.concat());
    let (mut data, mut directory) = (Vec::new(), Vec::new());
    for ((_, shape, bytes), (_, name)) in tensors.iter().zip(NAMES) {
        directory.extend(word(&format!("{name}.weight")));
        directory.extend((shape.len() as u32).to_le_bytes());
        shape.iter().rev().for_each(|n| directory.extend((*n as u64).to_le_bytes()));
        directory.extend(0u32.to_le_bytes());
        directory.extend((data.len() as u64).to_le_bytes());
        data.extend(bytes);
        data.resize(data.len().next_multiple_of(32), 0);
    }
    out.extend(directory);
    out.resize(out.len().next_multiple_of(32), 0);
    out.extend(data);
    out
}

/// A text of a GGUF file.
fn word(text: &str) -> Vec<u8> {
    [&(text.len() as u64).to_le_bytes()[..], text.as_bytes()].concat()
}

/// The settings of that file.
fn settings() -> Vec<Vec<u8>> {
    let value = |key: &str, kind: u32, bytes: &[u8]| [word(key), kind.to_le_bytes().to_vec(), bytes.to_vec()].concat();
    let number = |key: &str, n: u32| value(key, 4, &n.to_le_bytes());
    let list = |kind: u32, items: &[Vec<u8>]| {
        [&kind.to_le_bytes()[..], &(items.len() as u64).to_le_bytes(), &items.concat()].concat()
    };
    let words: Vec<String> = (0..32)
        .map(|i| match i {
            0 => "<s>".to_owned(),
            1 => "</s>".to_owned(),
            2 => "HI".to_owned(),
            i => char::from_u32(65 + i).expect("a letter").to_string(),
        })
        .collect();
    let words: Vec<Vec<u8>> = words.iter().map(|text| word(text)).collect();
    let kinds: Vec<Vec<u8>> = (0..32).map(|i| if i < 2 { 3i32 } else { 1 }.to_le_bytes().to_vec()).collect();
    vec![
        value("general.architecture", 8, &word("llama")),
        number("general.alignment", 32),
        number("llama.block_count", 1),
        number("llama.context_length", 64),
        number("llama.embedding_length", 8),
        number("llama.feed_forward_length", 16),
        number("llama.attention.head_count", 2),
        number("llama.attention.head_count_kv", 1),
        number("llama.attention.key_length", 4),
        number("llama.attention.value_length", 4),
        number("llama.rope.dimension_count", 4),
        number("llama.vocab_size", 32),
        value("llama.attention.layer_norm_rms_epsilon", 6, &1e-5f32.to_le_bytes()),
        value("llama.rope.freq_base", 6, &1e4f32.to_le_bytes()),
        value("tokenizer.ggml.model", 8, &word("gpt2")),
        value("tokenizer.ggml.pre", 8, &word("smollm")),
        value("tokenizer.ggml.tokens", 9, &list(8, &words)),
        value("tokenizer.ggml.token_type", 9, &list(5, &kinds)),
        value("tokenizer.ggml.merges", 9, &list(8, &[word("H I")])),
        number("tokenizer.ggml.bos_token_id", 0),
        number("tokenizer.ggml.eos_token_id", 1),
        value("tokenizer.ggml.add_bos_token", 7, &[1]),
        value("tokenizer.chat_template", 8, &word("{{ messages[0].content }}")),
    ]
}

fn tokenizers() -> Vec<Vec<u8>> {
    let unigram = json!({"version": "1.0", "added_tokens": [], "normalizer": {"type": "Precompiled", "precompiled_charsmap": ""},
        "pre_tokenizer": {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": false},
        "decoder": {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": false},
        "model": {"type": "Unigram", "unk_id": 0, "vocab": [["<unk>", 0.0], ["▁", -1.0], ["H", -2.0], ["el", -2.5]], "byte_fallback": false}});
    let generation = json!({"bos_token_id": 0, "eos_token_id": [1, 2], "max_length": 64});
    vec![
        chosen(0, SMALL_TOKENIZER),
        chosen(0, unigram.to_string()),
        chosen(1, TOKENIZER_CONFIG),
        chosen(
            1,
            r#"{"add_bos_token": true, "bos_token": {"content": "<s>"}, "eos_token": "</s>", "chat_template": [{"name": "default", "template": "x"}]}"#,
        ),
        chosen(2, generation.to_string()),
        chosen(3, config().to_string()),
    ]
}

fn rows() -> Vec<Vec<u8>> {
    let alpaca =
        json!([{"instruction": "a", "input": "", "output": "b"}, {"instruction": "c", "input": "d", "output": "e"}]);
    let talk = json!({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]});
    let share = json!({"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]});
    let line = |value: &Value| format!("{value}\n");
    vec![
        chosen(0, alpaca.to_string()),
        chosen(0, json!([talk, talk]).to_string()),
        chosen(0x40, json!([{"a": "x", "b": "y"}, {"a": "z", "b": "w"}]).to_string()),
        chosen(1, line(&talk).repeat(2)),
        chosen(1, line(&share).repeat(2)),
        chosen(1, "{\"prompt\": \"a\", \"completion\": \"b\"}\n\n{\"text\": \"c\"}\n"),
        chosen(2, "instruction,input,output\na,,b\n\"c, \"\"d\",e,f\n"),
        chosen(3, include_bytes!("../../data/rows.parquet")),
    ]
}

const RECIPES: [&str; 3] = [
    include_str!("../../../data/recipes/llama-3.2-1b-qlora.yaml"),
    "checkpoint_dir: checkpoints/a/b\nprecision: bf16-true\ndata:\n  class_path: litgpt.data.JSON\n  init_args:\n    \
     json_path: x.json\n    mask_prompt: true\ntrain:\n  lr_warmup_fraction: 0.1\n  max_norm: 1.0\neval:\n  interval: 25\n",
    "{\"optimizer\": {\"class_path\": \"torch.optim.AdamW\", \"init_args\": {\"lr\": 0.0002, \"betas\": [0.9, 0.95]}}, \
     \"data\": \"Alpaca\", \"quantize\": \"bnb.nf4-dq\", \"lora_r\": 8}",
];

const TEMPLATES: [&str; 3] = [
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'system' %}{% set system = message.content | trim \
     %}{% elif (message['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('order') }}{% else %}{{ '<|' + \
     message['role'] + '|>\\n' ~ message['content'].strip() + eos_token }}{% endif %}{% endfor %}{% if \
     add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}",
    "{%- set ns = namespace(text='', n=0) -%}{%- for m in messages[::-1] -%}{%- set ns.text = ns.text ~ m.content -%}{%- \
     set ns.n = ns.n + 1 -%}{%- endfor -%}{{ ns.text * 2 }}{% macro f(x, y=3) %}{{ x | tojson(indent=2) }}{% endmacro %}{{ \
     f(messages) }}{{ strftime_now('%d %b %Y') }}{% generation %}{{ range(3) | join(',') }}{% endgeneration %}",
    "{% for m in messages if m.role != 'x' %}{{ m.content.split('a')[-1] | upper | replace('H', 'J') | indent(2) }}{{ \
     '%s' | format(m.role) }}{% else %}{% endfor %}{{ messages | map(attribute='role') | list | length }}{{ \
     'abc'[1:2].startswith('b') and not tools is defined }}{{ {'a': [1, 2.5, none]} | dictsort }}",
];
