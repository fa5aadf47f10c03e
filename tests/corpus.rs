//! Broken and hostile files, made by code from the quickstart's model, cut down to one layer: each ends in exit code 1
//! (2 where the command line or a recipe is wrong), in one line that names the file and the field, within 5 s and 1 GB
//! of address space, and leaves nothing behind outside `--out_dir`.
#![allow(clippy::unwrap_used)]

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;
use std::process::Command;
use std::sync::LazyLock;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use safetensors::Dtype;
use serde_json::{Map, Value, json};

use crate::util::{Stored, litgpt, tensors, tiny};
use crate::zip::zip;

/// Most address space of a run, in the KiB that `ulimit` counts.
const MEMORY_KIB: usize = 1 << 20;
/// Longest duration of a run.
const PATIENCE: Duration = Duration::from_secs(5);
/// Longest error line that is still a line.
const LINE: usize = 1500;

const GENERATE: &str = "generate --checkpoint_dir model --max_new_tokens 2 --prompt x";
const FINETUNE: &str = "finetune lora --checkpoint_dir model --data JSON --data.json_path data.json --out_dir out \
                        --train.max_steps 1 --train.global_batch_size 1 --train.micro_batch_size 1 --lora_r 2 \
                        --eval.max_new_tokens 0 --data.val_split_fraction 0.5";
const ADAPTER: &str = "generate --checkpoint_dir adapter --max_new_tokens 2 --prompt x";
const ROWS: &str = r#"[{"instruction": "a", "output": "b"}, {"instruction": "c", "output": "d"}, {"instruction": "e", "output": "f"}]"#;

type Files = BTreeMap<String, Vec<u8>>;

/// A folder with something broken in it, and the command that has to find that out.
struct Case {
    name: String,
    /// Files by their path; a path ending in `/` is a folder.
    files: Files,
    /// Links, by their path.
    links: Vec<(String, String)>,
    line: String,
    /// Each of them stands in the error.
    says: Vec<String>,
}

impl Case {
    fn new(name: impl Into<String>, line: &str, says: &[&str]) -> Self {
        let files = MODEL.iter().map(|(name, content)| (format!("model/{name}"), content.clone()));
        let data = ("data.json".to_owned(), ROWS.as_bytes().to_vec());
        Self {
            name: name.into(),
            files: files.chain([data]).collect(),
            links: Vec::new(),
            line: line.to_owned(),
            says: says.iter().map(|s| (*s).to_owned()).collect(),
        }
    }

    /// The same with other content of a file.
    fn with(mut self, path: &str, content: impl Into<Vec<u8>>) -> Self {
        self.files.insert(path.to_owned(), content.into());
        self
    }

    fn without(mut self, path: &str) -> Self {
        self.files.remove(path);
        self
    }

    fn link(mut self, path: &str, to: &str) -> Self {
        self.files.remove(path);
        self.links.push((path.to_owned(), to.to_owned()));
        self
    }

    /// The same with the adapter folder beside the model.
    fn adapted(mut self) -> Self {
        self.files.extend(TRAINED.iter().map(|(name, content)| (format!("adapter/{name}"), content.clone())));
        self
    }

    /// What is wrong with how the case ends.
    fn problem(&self) -> Option<String> {
        let dir = tempfile::tempdir().unwrap();
        for (path, content) in &self.files {
            let path = dir.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            if path.to_string_lossy().ends_with('/') {
                fs::create_dir_all(&path).unwrap();
            } else {
                fs::write(&path, content).unwrap();
            }
        }
        for (path, to) in &self.links {
            symlink(to, dir.path().join(path)).unwrap();
        }
        let before = listing(dir.path());
        let begun = Instant::now();
        let ran = run(dir.path(), &self.line);
        let duration = begun.elapsed();
        let changed = listing(dir.path()) != before;
        let (code, stderr) = ran;
        let lines = |start: &str| stderr.lines().filter(|line| line.starts_with(start)).collect::<Vec<_>>();
        let (errors, hints) = (lines("error: "), lines("hint: "));
        let last = stderr.lines().last().unwrap_or_default();
        let says = |part: &String| errors.iter().chain(&hints).any(|line| line.contains(part.as_str()));
        let problem = if !matches!(code, 1 | 2) {
            format!("exit code {code}")
        } else if errors.len() != 1 || hints.len() > 1 || !(last.starts_with("error: ") || last.starts_with("hint: ")) {
            "not one error line and a hint".to_owned()
        } else if stderr.contains("panicked") || stderr.contains("RUST_BACKTRACE") {
            "it panicked".to_owned()
        } else if errors[0].len() > LINE || stderr.chars().any(|c| c.is_control() && c != '\n') {
            "the line is too long or has control characters".to_owned()
        } else if duration > PATIENCE {
            format!("{duration:?}")
        } else if changed {
            "it wrote outside --out_dir".to_owned()
        } else if let Some(missing) = self.says.iter().find(|part| !says(part)) {
            format!("the error does not say {missing:?}")
        } else {
            return None;
        };
        let told: String = stderr.chars().rev().take(700).collect::<Vec<_>>().into_iter().rev().collect();
        Some(format!("{}: {problem}\n    {}", self.name, told.trim().replace('\n', "\n    ")))
    }
}

/// Runs the binary with little memory; exit code (-1 after a signal) and stderr.
fn run(cwd: &Path, line: &str) -> (i32, String) {
    let limited = format!("ulimit -v {MEMORY_KIB}; exec \"$0\" \"$@\"");
    let mut command = assert_cmd::Command::from_std(Command::new("sh"));
    command.env("RAYON_NUM_THREADS", "2").env_remove("HF_TOKEN").env_remove("LIGHTNING_ARTIFACTS_DIR");
    let command = command.args(["-c", &limited, env!("CARGO_BIN_EXE_litgpt")]).args(line.split_whitespace());
    let output = command.current_dir(cwd).timeout(Duration::from_secs(30)).output().unwrap();
    (output.status.code().unwrap_or(-1), String::from_utf8_lossy(&output.stderr).into_owned())
}

/// Every file below `dir`, with its content, but for `out`.
fn listing(dir: &Path) -> Vec<(String, Vec<u8>)> {
    let mut found = Vec::new();
    for entry in fs::read_dir(dir).unwrap() {
        let entry = entry.unwrap();
        let kind = entry.file_type().unwrap();
        let name = entry.file_name().to_string_lossy().into_owned();
        if kind.is_dir() && name != "out" {
            found.extend(listing(&entry.path()).into_iter().map(|(path, c)| (format!("{name}/{path}"), c)));
        } else if !kind.is_dir() {
            let content = if kind.is_file() { fs::read(entry.path()).unwrap() } else { Vec::new() };
            found.push((name, content));
        }
    }
    found.sort();
    found
}

/// Runs all cases on two threads and fails with every one that does not end as it should.
fn check(cases: Vec<Case>, at_least: usize) {
    assert!(cases.len() >= at_least, "only {} cases", cases.len());
    let next = AtomicUsize::new(0);
    let work = || {
        let mut problems = Vec::new();
        while let Some(case) = cases.get(next.fetch_add(1, Ordering::Relaxed)) {
            problems.extend(case.problem());
        }
        problems
    };
    let problems: Vec<String> = std::thread::scope(|scope| {
        let threads = [scope.spawn(work), scope.spawn(work)];
        threads.into_iter().flat_map(|thread| thread.join().unwrap()).collect()
    });
    assert!(problems.is_empty(), "{} of {} cases:\n{}", problems.len(), cases.len(), problems.join("\n"));
}

/// The quickstart's model with one layer and 16 channels: two heads of 8, one of key and value, an MLP of 24.
static MODEL: LazyLock<Files> = LazyLock::new(|| {
    let mut files = Files::new();
    for name in ["generation_config.json", "tokenizer.json", "tokenizer_config.json"] {
        files.insert(name.to_owned(), fs::read(tiny().join(name)).unwrap());
    }
    let mut config = config();
    let sizes = json!({"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2,
        "num_key_value_heads": 1, "head_dim": 8});
    config.extend(sizes.as_object().unwrap().clone());
    files.insert("config.json".to_owned(), serde_json::to_vec(&config).unwrap());
    let (header, data) = parts();
    files.insert("model.safetensors".to_owned(), safetensors(&Value::Object(header).to_string(), &data));
    files
});

/// An adapter that was trained on the model for a step.
static TRAINED: LazyLock<Files> = LazyLock::new(|| {
    let dir = tempfile::tempdir().unwrap();
    for (path, content) in Case::new("", "", &[]).files {
        fs::create_dir_all(dir.path().join(&path).parent().unwrap()).unwrap();
        fs::write(dir.path().join(path), content).unwrap();
    }
    litgpt(dir.path(), FINETUNE.split_whitespace()).ok();
    let files = fs::read_dir(dir.path().join("out/final")).unwrap();
    let mut files: Files = files
        .map(|entry| entry.unwrap())
        .map(|entry| (entry.file_name().into_string().unwrap(), fs::read(entry.path()).unwrap()))
        .collect();
    // Hashes would find every change before the reader of the file does; the base has moved.
    files.remove("manifest.json");
    let mut manifest: Value = serde_json::from_slice(&files["litgpt.json"]).unwrap();
    manifest["base_model"] = "model".into();
    files.insert("litgpt.json".to_owned(), manifest.to_string().into());
    files
});

fn config() -> Map<String, Value> {
    serde_json::from_slice(&fs::read(tiny().join("config.json")).unwrap()).unwrap()
}

/// Header and data of the small model's file.
fn parts() -> (Map<String, Value>, Vec<u8>) {
    let (mut header, mut data) = (Map::new(), Vec::new());
    for (name, (dtype, shape, bytes)) in tensors(&tiny().join("model.safetensors")) {
        if name.contains("layers.") && !name.contains("layers.0.") {
            continue;
        }
        let (shape, bytes) = cut(&name, &(dtype, shape, bytes));
        let (begin, end) = (data.len(), data.len() + bytes.len());
        data.extend(bytes);
        header.insert(name, json!({"dtype": dtype.to_string(), "shape": shape, "data_offsets": [begin, end]}));
    }
    (header, data)
}

/// The first rows and columns of a tensor.
fn cut(name: &str, (dtype, shape, bytes): &Stored) -> (Vec<usize>, Vec<u8>) {
    let size = dtype.bitsize() / 8;
    let rows = |rows: usize| rows.min(shape[0]);
    let new = match name {
        n if n.contains("embed") => vec![shape[0], 16],
        n if n.contains("norm") => vec![16],
        n if n.contains("k_proj") || n.contains("v_proj") => vec![8, 16],
        n if n.contains("gate_proj") || n.contains("up_proj") => vec![24, 16],
        n if n.contains("down_proj") => vec![16, 24],
        _ => vec![16, 16],
    };
    let cols = |shape: &[usize]| shape.get(1).copied().unwrap_or(1);
    let row = |r: usize| &bytes[r * cols(shape) * size..][..cols(&new) * size];
    let bytes = (0..rows(new[0])).flat_map(row).copied().collect();
    (new, bytes)
}

fn safetensors(header: &str, data: &[u8]) -> Vec<u8> {
    let mut file = (header.len() as u64).to_le_bytes().to_vec();
    file.extend(header.bytes());
    file.extend(data);
    file
}

fn text(files: &Files, name: &str) -> String {
    String::from_utf8(files[name].clone()).unwrap()
}

/// A JSON object with one key set.
fn set(object: &str, key: &str, value: Value) -> String {
    let mut object: Map<String, Value> = serde_json::from_str(object).unwrap();
    object.insert(key.to_owned(), value);
    Value::Object(object).to_string()
}

/// Ways in which a file that should be a JSON object is none.
fn no_objects(whole: &str) -> Vec<(String, Vec<u8>)> {
    let deep = |open: &str, times: usize| open.repeat(times).into_bytes();
    let mut bad: Vec<(String, Vec<u8>)> = [
        ("empty", Vec::new()),
        ("a list", b"[]".to_vec()),
        ("null", b"null".to_vec()),
        ("a number", b"42".to_vec()),
        ("a text", b"\"x\"".to_vec()),
        ("deep lists", deep("[", 200_000)),
        ("deep objects", deep("{\"a\":", 200_000)),
        ("UTF-16", whole.encode_utf16().flat_map(u16::to_le_bytes).collect()),
        ("a byte order mark", [b"\xef\xbb\xbf", whole.as_bytes()].concat()),
        ("no UTF-8", vec![b'{', b'"', 0xff, 0xfe, b'"', b':', b'1', b'}']),
        ("zeros", vec![0; 4096]),
        ("a huge number", b"{\"a\": 1e999}".to_vec()),
        ("a pointer of git LFS", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n".to_vec()),
        ("trailing text", format!("{whole} x").into_bytes()),
        ("NaN", b"{\"a\": NaN}".to_vec()),
    ]
    .map(|(name, content)| (name.to_owned(), content))
    .to_vec();
    bad.extend((1..6).map(|i| (format!("cut at {i}/6"), whole.as_bytes()[..whole.len() * i / 6].to_vec())));
    bad
}

#[test]
fn config_json() {
    let whole = text(&MODEL, "config.json");
    let mut cases = Vec::new();
    let case = |name: String, content: Vec<u8>, says: &[&str]| {
        Case::new(format!("config.json, {name}"), GENERATE, says).with("model/config.json", content)
    };
    for (name, content) in no_objects(&whole) {
        cases.push(case(name, content, &["config.json"]));
    }
    cases.push(Case::new("no config.json", GENERATE, &["config.json"]).without("model/config.json"));
    cases.push(
        Case::new("config.json is a folder", GENERATE, &["config.json"])
            .without("model/config.json")
            .with("model/config.json/x", ""),
    );
    cases.push(case("a byte of another kind".to_owned(), whole.replace("16", "\u{1}6").into(), &["config.json"]));
    for key in ["vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads"] {
        let mut object: Map<String, Value> = serde_json::from_str(&whole).unwrap();
        object.remove(key);
        cases.push(case(format!("no {key}"), Value::Object(object).to_string().into(), &["config.json", key]));
    }
    let counts = [
        "vocab_size",
        "hidden_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "intermediate_size",
        "head_dim",
        "max_position_embeddings",
    ];
    for key in counts {
        for value in [json!("x"), json!(-1), json!(1.5), json!([16]), json!({}), json!(true), json!(1e30)] {
            let says = if value == json!(1e30) { &["config.json"][..] } else { &["config.json", key] };
            cases.push(case(format!("{key}: {value}"), set(&whole, key, value).into(), says));
        }
        for value in [json!(0), json!(1u64 << 40), json!(u64::MAX)] {
            cases.push(case(format!("{key}: {value}"), set(&whole, key, value).into(), &["config.json"]));
        }
        if key != "max_position_embeddings" {
            cases.push(case(format!("{key}: 2^29"), set(&whole, key, json!(1 << 29)).into(), &["config.json"]));
        }
    }
    let numbers = ["rope_theta", "rms_norm_eps"];
    for key in numbers {
        for value in [json!("x"), json!([1]), json!(-1), json!(1e300)] {
            cases.push(case(format!("{key}: {value}"), set(&whole, key, value).into(), &["config.json", key]));
        }
    }
    cases.push(case("rope_theta: 0".to_owned(), set(&whole, "rope_theta", json!(0)).into(), &["rope_theta"]));
    for (key, value, says) in [
        ("model_type", json!(null), "model_type"),
        ("model_type", json!(3), "model_type"),
        ("model_type", json!("bert"), "bert"),
        ("hidden_act", json!("tanhshrink"), "hidden_act"),
        ("hidden_act", json!(3), "hidden_act"),
        ("attention_bias", json!("x"), "attention_bias"),
        ("attention_bias", json!(true), "q_proj.bias"),
        ("mlp_bias", json!(true), "_proj.bias"),
        ("tie_word_embeddings", json!("x"), "tie_word_embeddings"),
        ("tie_word_embeddings", json!(false), "lm_head"),
        ("num_attention_heads", json!(4), "q_proj"),
        ("num_key_value_heads", json!(2), "k_proj"),
        ("head_dim", json!(7), "7"),
        ("vocab_size", json!(1000), "embed_tokens"),
        ("intermediate_size", json!(25), "gate_proj"),
        ("rope_scaling", json!("x"), "rope_scaling"),
        ("rope_scaling", json!([1]), "rope_scaling"),
        ("rope_scaling", json!({"type": "magic", "factor": 2}), "magic"),
        ("rope_scaling", json!({"type": "linear"}), "factor"),
        ("rope_scaling", json!({"type": "linear", "factor": "2"}), "factor"),
        ("rope_scaling", json!({"type": "linear", "factor": 0}), "factor"),
        ("rope_scaling", json!({"type": "linear", "factor": -2}), "factor"),
        ("rope_scaling", json!({"rope_type": "llama3", "factor": 8}), "low_freq_factor"),
        ("rope_scaling", json!({"rope_type": "yarn", "factor": 0}), "factor"),
        ("rope_scaling", json!({"rope_type": "yarn", "factor": 4, "original_max_position_embeddings": 0}), "original"),
        ("rope_scaling", json!({"rope_type": 3}), "rope_type"),
    ] {
        cases.push(case(format!("{key}: {value}"), set(&whole, key, value).into(), &["config", says]));
    }
    // The tensors are those of a Llama.
    for other in ["qwen2", "qwen3", "gpt_neox", "stablelm", "falcon", "phi", "phi3", "gemma2", "olmo2", "mixtral"] {
        let content = set(&whole, "model_type", json!(other));
        cases.push(case(format!("model_type: {other}"), content.into(), &["model"]));
    }
    check(cases, 130);
}

#[test]
fn model_safetensors() {
    let (header, data) = parts();
    let header_text = Value::Object(header.clone()).to_string();
    let whole = &MODEL["model.safetensors"];
    let file = "model.safetensors";
    let mut cases = Vec::new();
    let case = |name: String, content: Vec<u8>, says: &[&str]| {
        let says: Vec<&str> = ["model.safetensors"].iter().chain(says).copied().collect();
        Case::new(format!("{file}, {name}"), GENERATE, &says).with("model/model.safetensors", content)
    };
    // Cut at every structure: the length, the header's tokens, the data.
    let tokens = [8, 9, 10, 8 + header_text.find(':').unwrap(), 8 + header_text.find('[').unwrap()];
    let ends = [8 + header_text.len() - 1, 8 + header_text.len(), 9 + header_text.len(), whole.len() - 1];
    let eighths = (1..8).map(|i| whole.len() * i / 8);
    for at in (0..8).chain(tokens).chain(ends).chain(eighths) {
        cases.push(case(format!("cut at {at}"), whole[..at].to_vec(), &[]));
    }
    cases.push(case("a byte more".to_owned(), [whole.as_slice(), b"x"].concat(), &[]));
    for length in [0, 1, 2, header_text.len() as u64 - 1, header_text.len() as u64 + 1, 1 << 40, u64::MAX] {
        let content = [&length.to_le_bytes(), &whole[8..]].concat();
        cases.push(case(format!("a header of {length}"), content, &[]));
    }
    for (name, content) in no_objects(&header_text) {
        if name == "trailing text" {
            continue; // blanks may follow a header, and so may this
        }
        cases.push(case(format!("header is {name}"), safetensors(&String::from_utf8_lossy(&content), &data), &[]));
    }
    cases.push(case("a pointer of git LFS".to_owned(), b"version https://git-lfs.github.com/spec/v1\n".into(), &[]));
    let name = "model.layers.0.self_attn.q_proj.weight";
    let info = &header[name];
    let (begin, end) = (info["data_offsets"][0].as_u64().unwrap(), info["data_offsets"][1].as_u64().unwrap());
    let (last, size) = (data.len() as u64, end - begin);
    for (key, value) in [
        ("dtype", json!(null)),
        ("dtype", json!(3)),
        ("dtype", json!("F128")),
        ("dtype", json!("I16")),
        ("dtype", json!("F8_E4M3")),
        ("dtype", json!("F64")),
        ("dtype", json!("F32")),
        ("shape", json!(null)),
        ("shape", json!("16x16")),
        ("shape", json!([-16, -16])),
        ("shape", json!([16.5, 16])),
        ("shape", json!([256])),
        ("shape", json!([16, 4, 4])),
        ("shape", json!([32, 8])),
        ("shape", json!([16, 17])),
        ("shape", json!([0, 16])),
        ("shape", json!([])),
        ("shape", json!([1u64 << 32, 1u64 << 32])),
        ("shape", json!([u64::MAX, u64::MAX])),
        ("shape", json!(vec![1; 10_000])),
        ("data_offsets", json!(null)),
        ("data_offsets", json!([begin])),
        ("data_offsets", json!([end, begin])),
        ("data_offsets", json!([begin, end - 1])),
        ("data_offsets", json!([begin + 2, end + 2])),
        ("data_offsets", json!([0, size])),
        ("data_offsets", json!([last, last + size])),
        ("data_offsets", json!([last - 2, last - 2 + size])),
        ("data_offsets", json!([-1, size])),
        ("data_offsets", json!([u64::MAX - size, u64::MAX])),
        ("data_offsets", json!([0, u64::MAX])),
    ] {
        let mut header = header.clone();
        header[name][key] = value.clone();
        let shown: String = value.to_string().chars().take(40).collect();
        let mut case = case(format!("{key}: {shown}"), safetensors(&Value::Object(header).to_string(), &data), &[]);
        // A whole file that is not what config.json describes: the tensor is named.
        if [json!([256]), json!([16, 4, 4]), json!([32, 8])].contains(&value) {
            case.says = vec![name.to_owned(), "config.json".to_owned()];
        }
        cases.push(case);
    }
    let mut broken = |what: &str, header: Map<String, Value>, says: &str| {
        let says = if says.is_empty() { vec![] } else { vec![says] };
        let mut case = case(what.to_owned(), safetensors(&Value::Object(header).to_string(), &data), &says);
        case.says.retain(|part| part != file || says.is_empty());
        cases.push(case);
    };
    broken("no tensors", Map::new(), "");
    let mut without = header.clone();
    without.remove(name);
    broken("a tensor's name and bytes are gone", without, "");
    for other in
        ["model.layers.0.self_attn.Q_proj.weight", "\u{1b}[31mred", "new\nline", "", "../../x", &"n".repeat(9000)]
    {
        let mut renamed = Map::new();
        renamed.extend(header.iter().map(|(key, v)| (if key == name { other } else { key }.to_owned(), v.clone())));
        broken(&format!("a tensor named {:.20?}", other), renamed, name);
    }
    let mut metadata = header.clone();
    metadata.insert("__metadata__".to_owned(), json!({"format": {"a": 1}}));
    broken("metadata is no text", metadata, "");
    let twice = format!("{{{:?}: {info}, {}", name, &header_text[1..]);
    cases.push(case("a name twice".to_owned(), safetensors(&twice, &data), &[]));
    for tensor in ["model.embed_tokens.weight", "model.norm.weight", "model.layers.0.mlp.up_proj.weight"] {
        let at = header[tensor]["data_offsets"][0].as_u64().unwrap() as usize;
        for (what, bits) in [("NaN", 0x7fc0u16), ("-NaN", 0xffc1), ("infinity", 0x7f80), ("-infinity", 0xff80)] {
            let mut data = data.clone();
            data[at + 6..at + 8].copy_from_slice(&bits.to_le_bytes());
            for line in [GENERATE, FINETUNE] {
                let content = safetensors(&header_text, &data);
                let says = [file, tensor];
                let name = format!("{what} in {tensor}, {:.8}", line);
                cases.push(Case::new(name, line, &says).with("model/model.safetensors", content));
            }
        }
    }
    assert_eq!(info["dtype"], Dtype::BF16.to_string(), "the tests above write bfloat16");
    cases.push(Case::new("no weights", GENERATE, &[file]).without("model/model.safetensors"));
    for to in ["nowhere", "model.safetensors", "/dev/zero", "/proc/self/environ", ".", "/etc/passwd"] {
        cases.push(Case::new(format!("weights link to {to}"), GENERATE, &[file]).link("model/model.safetensors", to));
    }
    check(cases, 110);
}

#[test]
fn weight_index() {
    let index = "model/model.safetensors.index.json";
    let case = |name: String, content: Vec<u8>, says: &[&str]| {
        let case = Case::new(format!("index, {name}"), GENERATE, says).without("model/model.safetensors");
        case.with("model/a.safetensors", MODEL["model.safetensors"].clone()).with(index, content)
    };
    let (header, _) = parts();
    let names: Vec<&String> = header.keys().collect();
    let map = |file: &str| {
        let map: Map<String, Value> = names.iter().map(|name| ((*name).clone(), json!(file))).collect();
        json!({"metadata": {"total_size": 1}, "weight_map": map})
    };
    let mut cases = Vec::new();
    for (name, content) in no_objects(&map("a.safetensors").to_string()) {
        if name != "a huge number" || !content.is_empty() {
            cases.push(case(name, content, &["index.json"]));
        }
    }
    let outside = "/elsewhere/a.safetensors";
    let long = format!("{}.safetensors", "n".repeat(100_000));
    for file in [
        "../model/a.safetensors",
        "../a.safetensors",
        "../../../../../../etc/passwd",
        "/etc/passwd",
        outside,
        "b/../a.safetensors",
        "./a.safetensors",
        "a.safetensors/",
        "..",
        ".",
        "",
        "/",
        "..\\a.safetensors",
        "a\u{0}.safetensors",
        "\u{1b}[2Ja.safetensors",
        "line\nbreak.safetensors",
        "missing.safetensors",
        "C:\\a.safetensors",
        &long,
    ] {
        cases.push(case(format!("names {:.40?}", file), map(file).to_string().into(), &["index.json"]));
    }
    for file in ["config.json", "tokenizer.json", "model.safetensors.index.json"] {
        cases.push(case(format!("names {file}"), map(file).to_string().into(), &[file]));
    }
    for value in [json!(null), json!([]), json!("x"), json!(3), json!({}), json!({"a": 3}), json!({"a": ["b"]})] {
        let content = json!({ "weight_map": value }).to_string();
        cases.push(case(format!("weight_map: {value}"), content.into(), &["index.json"]));
    }
    let many: Map<String, Value> = (0..20_000).map(|i| (format!("t{i}"), json!(format!("{i}.safetensors")))).collect();
    cases.push(case("names 20,000 files".to_owned(), json!({"weight_map": many}).to_string().into(), &["index.json"]));
    let two: Map<String, Value> = names
        .iter()
        .enumerate()
        .map(|(i, name)| ((*name).clone(), json!(["a.safetensors", "b.safetensors"][i % 2])))
        .collect();
    let twice = case(
        "the same tensors in two files".to_owned(),
        json!({"weight_map": two}).to_string().into(),
        &[".safetensors"],
    );
    cases.push(twice.with("model/b.safetensors", MODEL["model.safetensors"].clone()));
    for to in ["nowhere", "a.safetensors", "/dev/zero", "..", "/etc/passwd", "/proc/self/mem"] {
        let case = case(format!("a file links to {to}"), map("a.safetensors").to_string().into(), &["a.safetensors"]);
        cases.push(case.link("model/a.safetensors", to));
    }
    check(cases, 50);
}

/// Instructions that push a storage's tensor of four floats with this shape, strides and offset.
fn tensor(key: &str, elements: u8, offset: u8, shape: &[u8], strides: &[u8]) -> Vec<u8> {
    let text = |text: &str| [&[b'X', text.len() as u8, 0, 0, 0], text.as_bytes()].concat();
    let list = |list: &[u8]| [vec![b'('], list.iter().flat_map(|n| [b'K', *n]).collect(), vec![b't']].concat();
    let mut out = b"ctorch._utils\n_rebuild_tensor_v2\n((".to_vec();
    out.extend(text("storage"));
    out.extend(b"ctorch\nFloatStorage\n");
    out.extend([text(key), text("cpu")].concat());
    out.extend([b'K', elements, b't', b'Q', b'K', offset]);
    out.extend([list(shape), list(strides)].concat());
    out.extend(b"\x89ccollections\nOrderedDict\n)RtR");
    out
}

/// A state dict with these instructions for the value of its one tensor.
fn state_dict(value: &[u8]) -> Vec<u8> {
    [b"\x80\x02}X\x01\x00\x00\x00w".as_slice(), value, b"s."].concat()
}

/// Programs that want to do something, and what they would call. The file that they would make is `pwned`.
fn evil() -> Vec<(&'static str, Vec<u8>, &'static str)> {
    let touch = b"X\x0b\x00\x00\x00touch pwned";
    let call = |module: &str, name: &str| [format!("\x02c{module}\n{name}\n").as_bytes(), touch, b"\x85R."].concat();
    let with = |bytes: Vec<u8>| [&[0x80u8][..], &bytes].concat();
    vec![
        ("os.system", with(call("os", "system")), "os.system"),
        ("posix.system", with(call("posix", "system")), "posix.system"),
        ("nt.system", with(call("nt", "system")), "nt.system"),
        ("eval", with(call("builtins", "eval")), "builtins.eval"),
        ("exec", with(call("__builtin__", "exec")), "__builtin__.exec"),
        ("getattr", with(call("builtins", "getattr")), "builtins.getattr"),
        ("Popen", with(call("subprocess", "Popen")), "subprocess.Popen"),
        ("import", with(call("builtins", "__import__")), "builtins.__import__"),
        ("runpy", with(call("runpy", "_run_code")), "runpy._run_code"),
        ("torch.load", with(call("torch", "load")), "torch.load"),
        ("torch.hub.load", with(call("torch.hub", "load")), "torch.hub.load"),
        ("pickle.loads", with(call("_pickle", "loads")), "_pickle.loads"),
        ("webbrowser", with(call("webbrowser", "open")), "webbrowser.open"),
        ("numpy", with(call("numpy.testing._private.utils", "runstring")), "numpy"),
        ("a dotted name", with(call("torch._utils", "_rebuild_tensor_v2.__globals__")), "__globals__"),
        (
            "os.system by STACK_GLOBAL",
            with([b"\x04\x8c\x02os\x8c\x06system\x93".as_slice(), touch, b"\x85R."].concat()),
            "os.system",
        ),
        ("os.system by NEWOBJ", with([b"\x02cos\nsystem\n".as_slice(), touch, b"\x85\x81."].concat()), "os.system"),
        (
            "os.system as a value",
            with([b"\x02}X\x01\0\0\0wcos\nsystem\n".as_slice(), touch, b"\x85Rs."].concat()),
            "os.system",
        ),
        ("os.system in a list", with([b"\x02](cos\nsystem\n".as_slice(), touch, b"\x85Re."].concat()), "os.system"),
        ("INST", with([b"\x00(".as_slice(), touch, b"ios\nsystem\n."].concat()), "0x69"),
        ("OBJ", with([b"\x02(cos\nsystem\n".as_slice(), touch, b"o."].concat()), "0x6f"),
        ("NEWOBJ_EX", with([b"\x04cos\nsystem\n".as_slice(), touch, b"\x85}\x92."].concat()), "0x92"),
        ("EXT1", with(b"\x02\x82\x01.".to_vec()), "0x82"),
        ("PERSID", with(b"\x02Ptouch pwned\n.".to_vec()), "0x50"),
        (
            "a storage of os",
            with(b"\x02(X\x07\0\0\0storagecos\nsystem\nX\x01\0\0\x000X\x03\0\0\0cpuK\x04tQ.".to_vec()),
            "os.system",
        ),
        ("a call of a call", with([b"\x02cos\nsystem\n".as_slice(), touch, b"\x85R)R."].concat()), "os.system"),
    ]
}

#[test]
fn pytorch_model_bin() {
    let bin = "pytorch_model.bin";
    let case = |name: &str, content: Vec<u8>, says: &[&str]| {
        let says: Vec<&str> = [bin].iter().chain(says).copied().collect();
        let case = Case::new(format!("{bin}, {name}"), GENERATE, &says).without("model/model.safetensors");
        case.with("model/pytorch_model.bin", content)
    };
    let program = |program: &[u8]| zip(&[("archive/data.pkl", program), ("archive/data/0", &[0; 16])]);
    let mut cases = Vec::new();
    for (name, evil, says) in evil() {
        cases.push(case(name, program(&evil), &[says]));
        if says.contains('.') {
            let mut adapter = Case::new(format!("adapter_model.bin, {name}"), ADAPTER, &["adapter_model.bin", says]);
            adapter = adapter.adapted().without("adapter/adapter_model.safetensors");
            cases.push(adapter.with("adapter/adapter_model.bin", program(&evil)));
        }
    }
    let good = state_dict(&tensor("0", 4, 0, &[2, 2], &[2, 1]));
    for at in (1..good.len()).step_by(7) {
        cases.push(case(&format!("program cut at {at}"), program(&good[..at]), &[]));
    }
    let whole = program(&good);
    for at in [0, 1, 4, 29, 30, 46, 60, whole.len() / 2, whole.len() - 23, whole.len() - 22, whole.len() - 1] {
        cases.push(case(&format!("archive cut at {at}"), whole[..at].to_vec(), &[]));
    }
    for (name, value) in [
        ("beyond its bytes", tensor("0", 4, 1, &[2, 2], &[2, 1])),
        ("larger than its storage", tensor("0", 4, 0, &[3, 2], &[2, 1])),
        ("of bytes that are not there", tensor("1", 4, 0, &[2, 2], &[2, 1])),
        ("of bytes outside", tensor("../data.pkl", 4, 0, &[2, 2], &[2, 1])),
        ("a view", tensor("0", 4, 0, &[2, 2], &[1, 2])),
        ("of stride 0", tensor("0", 4, 0, &[2, 2], &[0, 0])),
        ("of another shape", tensor("0", 4, 0, &[2, 2], &[2])),
        ("of many dimensions", tensor("0", 4, 0, &[1; 40], &[1; 40])),
        ("with claims of its storage", tensor("0", 255, 0, &[15, 17], &[17, 1])),
        ("that is a number", b"K\x05".to_vec()),
        ("that is None", b"N".to_vec()),
        ("that is itself", b"h\x00".to_vec()),
    ] {
        cases.push(case(&format!("a tensor {name}"), program(&state_dict(&value)), &[]));
    }
    for (name, bytes) in [
        ("no program", b"".to_vec()),
        ("only an end", b".".to_vec()),
        ("protocol 255", b"\x80\xff.".to_vec()),
        ("a list that holds itself", b"\x80\x02]q\x00h\x00a.".to_vec()),
        ("a dict that holds itself", b"\x80\x02}q\x00X\x01\0\0\0wh\x00s.".to_vec()),
        ("a text of 4 GB", b"\x80\x02X\xff\xff\xff\xffx.".to_vec()),
        ("a text of 16 EB", b"\x80\x04\x8d\xff\xff\xff\xff\xff\xff\xff\xffx.".to_vec()),
        ("a frame of 16 EB", b"\x80\x04\x95\xff\xff\xff\xff\xff\xff\xff\xff.".to_vec()),
        ("a number of 255 bytes", [b"\x80\x02\x8a\xff".as_slice(), &[0x7f; 255], b"."].concat()),
        ("a mark that is not there", b"\x80\x02t.".to_vec()),
        ("a memo that is not there", b"\x80\x02h\x63.".to_vec()),
        ("an unknown instruction", b"\x80\x02\xfe.".to_vec()),
        ("marks without end", [b"\x80\x02".as_slice(), &[b'('; 15_000_000], b"."].concat()),
        ("values without end", [b"\x80\x02".as_slice(), &[b'N'; 15_000_000], b"."].concat()),
        ("dicts without end", [b"\x80\x02".as_slice(), &[b'}'; 15_000_000], b"."].concat()),
        ("tuples in tuples", [b"\x80\x02N".as_slice(), &[0x85; 15_000_000], b"."].concat()),
        ("a memo without end", [b"\x80\x04N".as_slice(), &[0x94; 15_000_000], b"."].concat()),
        ("names without end", [b"\x80\x02".as_slice(), &b"ca\nb\n".repeat(3_000_000), b"."].concat()),
        ("a billion laughs", {
            let mut laughs = b"\x80\x02]q\x00".to_vec();
            (0..200u8).for_each(|i| laughs.extend([b']', b'q', i + 1, b'(', b'h', i, b'h', i, b'h', i, b'e']));
            [laughs, b".".to_vec()].concat()
        }),
        ("too long a program", [b"\x80\x02".as_slice(), &[b'N'; 17 << 20], b"."].concat()),
        ("a text as its state", b"\x80\x02X\x01\0\0\0w.".to_vec()),
        ("an empty dict", b"\x80\x02}.".to_vec()),
    ] {
        cases.push(case(name, program(&bytes), &[]));
    }
    for (name, bytes) in [
        ("no archive", b"hello".to_vec()),
        ("an empty file", Vec::new()),
        ("the format before 1.6", b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19.".to_vec()),
        ("no program in the archive", zip(&[("archive/version", b"3\n")])),
        ("two programs", zip(&[("a/data.pkl", &good), ("b/data.pkl", &good)])),
        ("big-endian", zip(&[("a/data.pkl", &good), ("a/byteorder", b"big"), ("a/data/0", &[0; 16])])),
        ("a pointer of git LFS", b"version https://git-lfs.github.com/spec/v1\n".to_vec()),
    ] {
        cases.push(case(name, bytes, &[]));
    }
    // Sizes, offsets and counts of the archive's directory, one after the other.
    for at in (whole.len() - 22..whole.len() - 2).step_by(2) {
        let mut broken = whole.clone();
        broken[at] ^= 0xff;
        broken[at + 1] ^= 0x7f;
        // A disk's number says nothing; the reader may pass over it, and then the tensor has no place in the model.
        cases.push(Case {
            says: vec!["model".into()],
            ..case(&format!("directory's end changed at {at}"), broken, &[])
        });
    }
    check(cases, 110);
}

/// A GGUF file of the quickstart's model, made once.
static GGUF: LazyLock<Vec<u8>> = LazyLock::new(|| {
    let dir = tempfile::tempdir().unwrap();
    let more = "--train.max_steps 1 --eval.max_new_tokens 1";
    crate::util::finetune(dir.path(), &crate::util::tiny(), more).ok();
    crate::util::litgpt(dir.path(), ["merge_lora", "out/final", "--out_dir", "m", "--format", "gguf"]).ok();
    fs::read(dir.path().join("m/model-f16.gguf")).unwrap()
});

#[test]
fn gguf_files() {
    let whole = &*GGUF;
    let place = |key: &[u8]| whole.windows(key.len()).position(|w| w == key).unwrap() + key.len();
    let file = |name: String, bytes: Vec<u8>, says: &[&str]| {
        let says: Vec<&str> = says.iter().copied().chain(["x.gguf"]).collect();
        Case::new(name, "generate x.gguf --max_new_tokens 2 --prompt x", &says).with("x.gguf", bytes)
    };
    let mut cases = Vec::new();
    let header = place(b"tokenizer.ggml.merges");
    let lengths = (0..24).chain((1..12).map(|i| header * i / 12)).chain([whole.len() / 2, whole.len() - 9]);
    cases.extend(lengths.map(|len| file(format!("cut at {len}"), whole[..len].to_vec(), &[])));
    let changed = |name: &str, at: usize, bytes: &[u8], says: &[&str]| {
        let mut copy = whole.clone();
        copy[at..at + bytes.len()].copy_from_slice(bytes);
        file(name.to_owned(), copy, says)
    };
    let huge = u64::MAX.to_le_bytes();
    cases.push(changed("magic", 0, b"GGML", &["not a GGUF file"]));
    cases.push(changed("version", 4, &[9], &["version"]));
    cases.push(changed("tensors without end", 8, &huge, &[]));
    cases.push(changed("settings without end", 16, &huge, &[]));
    cases.push(changed("a text without end", 24, &huge, &[]));
    // Behind a key: four bytes of type, then the value.
    for (key, value, says) in [
        ("llama.block_count", [0u8; 4], "llama.block_count"),
        ("llama.block_count", [0xff; 4], "llama.block_count"),
        ("llama.embedding_length", [0xff; 4], "embedding_length"),
        ("llama.attention.head_count", [0; 4], "head_count"),
        ("llama.attention.head_count", [7, 0, 0, 0], ""),
        ("llama.attention.head_count_kv", [5, 0, 0, 0], ""),
        ("llama.feed_forward_length", [0xff; 4], ""),
        ("llama.context_length", [0; 4], "context_length"),
        ("llama.attention.layer_norm_rms_epsilon", [0, 0, 0xc0, 0x7f], "epsilon"),
        ("tokenizer.ggml.bos_token_id", [0xff; 4], "bos_token_id"),
        ("tokenizer.ggml.eos_token_id", [0xff, 0xff, 0, 0], "eos_token_id"),
    ] {
        cases.push(changed(&format!("{key} {value:?}"), place(key.as_bytes()) + 4, &value, &[says]));
        cases.push(changed(&format!("type of {key}"), place(key.as_bytes()), &[77, 0, 0, 0], &[key]));
    }
    // Behind a list's key: its type, that of its elements, their number.
    for key in ["tokenizer.ggml.tokens", "tokenizer.ggml.merges", "tokenizer.ggml.token_type"] {
        cases.push(changed(&format!("endless {key}"), place(key.as_bytes()) + 8, &huge, &[key]));
        cases.push(changed(&format!("lists in {key}"), place(key.as_bytes()) + 4, &[9, 0, 0, 0], &[key]));
    }
    // Behind a tensor's name: its dimensions, their sizes, type and place.
    let tensor = place(b"blk.0.ffn_down.weight");
    cases.push(changed("dimensions", tensor, &[200, 0, 0, 0], &["blk.0.ffn_down.weight"]));
    cases.push(changed("no dimension", tensor, &[0; 4], &["blk.0.ffn_down.weight"]));
    cases.push(changed("huge dimension", tensor + 4, &huge, &["blk.0.ffn_down.weight"]));
    cases.push(changed("shape", tensor + 4, &[32, 0, 0, 0], &["blk.0.ffn_down.weight"]));
    cases.push(changed("type", tensor + 20, &[99, 0, 0, 0], &["type 99"]));
    cases.push(changed("place", tensor + 24, &huge, &["blk.0.ffn_down.weight"]));
    cases.push(changed("crooked place", tensor + 24, &[1], &["blk.0.ffn_down.weight"]));
    cases.push(changed("name", tensor - 5, b"other", &["blk.0.ffn_down"]));
    let weights = whole.len() - 64;
    cases.push(changed("NaN", weights, &[0, 0, 0xc0, 0x7f].repeat(8), &["not finite"]));
    check(cases, 60);
}

#[test]
fn adapters() {
    let whole = text(&TRAINED, "adapter_config.json");
    let mut cases = Vec::new();
    let case = |name: String, file: &str, content: Vec<u8>, says: &[&str]| {
        Case::new(format!("{file}, {name}"), ADAPTER, says).adapted().with(&format!("adapter/{file}"), content)
    };
    for (name, content) in no_objects(&whole) {
        cases.push(case(name, "adapter_config.json", content, &["adapter_config.json"]));
    }
    for (key, value) in [
        ("peft_type", json!(null)),
        ("peft_type", json!("PREFIX_TUNING")),
        ("peft_type", json!(3)),
        ("lora_alpha", json!(null)),
        ("lora_alpha", json!("16")),
        ("lora_alpha", json!([16])),
        ("lora_dropout", json!("x")),
        ("r", json!("x")),
        ("r", json!(-1)),
        ("r", json!(0)),
        ("r", json!(5)),
        ("r", json!(1u64 << 60)),
        ("use_rslora", json!("x")),
        ("use_dora", json!(true)),
        ("use_dora", json!("x")),
        ("bias", json!("all")),
        ("fan_in_fan_out", json!(true)),
        ("modules_to_save", json!(["lm_head"])),
        ("layer_replication", json!([[0, 1]])),
        ("alpha_pattern", json!("x")),
        ("alpha_pattern", json!(["q_proj"])),
        ("alpha_pattern", json!({"q_proj": "x"})),
        ("alpha_pattern", json!({"(((": 4})),
        ("alpha_pattern", json!({"((a{1000}){1000}){1000}": 4})),
    ] {
        let content = set(&whole, key, value.clone());
        cases.push(case(
            format!("{key}: {value}"),
            "adapter_config.json",
            content.into(),
            &["adapter_config.json", key],
        ));
    }
    let bytes = &TRAINED["adapter_model.safetensors"];
    let length = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    let tensors: Map<String, Value> = serde_json::from_slice(&bytes[8..8 + length]).unwrap();
    let data = &bytes[8 + length..];
    let file = "adapter_model.safetensors";
    for at in [0, 7, 8, 20, 8 + length / 2, 8 + length, bytes.len() / 2 + 4, bytes.len() - 1] {
        cases.push(case(format!("cut at {at}"), file, bytes[..at].to_vec(), &[file]));
    }
    let name = tensors.keys().find(|k| k.contains("q_proj.lora_A")).unwrap().clone();
    for (key, value) in [
        ("dtype", json!("I32")),
        ("dtype", json!("BF16")),
        ("shape", json!([16, 2])),
        ("shape", json!([32])),
        ("shape", json!([1, 32])),
        ("shape", json!([2, 1u64 << 62])),
        ("data_offsets", json!([0, 1])),
        ("data_offsets", json!([1u64 << 40, (1u64 << 40) + 128])),
    ] {
        let mut header = tensors.clone();
        header[&name][key] = value.clone();
        let content = safetensors(&Value::Object(header).to_string(), data);
        cases.push(case(format!("{key}: {value}"), file, content, &["adapter"]));
    }
    for other in [
        "base_model.model.model.layers.7.self_attn.q_proj.lora_A.weight",
        "base_model.model.model.layers.0.self_attn.nope.lora_A.weight",
        "base_model.model.model.layers.0.self_attn.q_proj.lora_C.weight",
        "base_model.model.model.layers.0.self_attn.q_proj.lora_magnitude_vector.weight",
        "base_model.model.model.embed_tokens.lora_embedding_A",
        "q_proj.lora_A.weight",
        "\u{1b}[31m",
        "",
    ] {
        let renamed: Map<String, Value> =
            tensors.iter().map(|(k, v)| (if *k == name { other } else { k }.to_owned(), v.clone())).collect();
        let content = safetensors(&Value::Object(renamed).to_string(), data);
        cases.push(case(format!("a tensor named {other:?}"), file, content, &["adapter"]));
    }
    for (what, value) in [("NaN", f32::NAN), ("infinity", f32::INFINITY)] {
        let mut data = data.to_vec();
        let at = tensors[&name]["data_offsets"][0].as_u64().unwrap() as usize;
        data[at..at + 4].copy_from_slice(&value.to_le_bytes());
        let content = safetensors(&Value::Object(tensors.clone()).to_string(), &data);
        for line in [ADAPTER, "merge_lora --checkpoint_dir adapter --out_dir out"] {
            let mut case = case(format!("{what}, {line:.8}"), file, content.clone(), &[file, &name]);
            case.line = line.to_owned();
            cases.push(case);
        }
    }
    cases.push(case("empty".to_owned(), file, safetensors("{}", &[]), &["adapter"]));
    cases.push(
        Case::new("no adapter tensors", ADAPTER, &["adapter_model"]).adapted().without(&format!("adapter/{file}")),
    );
    let manifest = text(&TRAINED, "litgpt.json");
    for (name, content) in no_objects(&manifest) {
        cases.push(case(name, "litgpt.json", content, &["litgpt.json"]));
    }
    for (key, value, says) in [
        ("base_model", json!(3), "litgpt.json"),
        ("base_model", json!("nowhere"), "nowhere"),
        ("base_model", json!("adapter"), "adapter"),
        ("base_model", json!("data.json"), "data.json"),
        ("base_model", json!("x\u{0}y"), "adapter"),
        ("add_bos", json!("yes"), "litgpt.json"),
        ("quantize", json!("nf3"), "nf3"),
        ("quantize", json!(4), "litgpt.json"),
        ("step", json!(-1), "litgpt.json"),
    ] {
        let content = set(&manifest, key, value.clone());
        cases.push(case(format!("{key}: {value}"), "litgpt.json", content.into(), &[says]));
    }
    for content in ["", "class_path: nope\n", "class: x\n", "class_path:\n", "\u{0}\u{1}", "class_path: \u{1b}[1m\n"] {
        cases.push(case(format!("{content:?}"), "prompt_style.yaml", content.into(), &["prompt"]));
    }
    for (file, content) in [
        ("training_state.json", "{}"),
        ("training_state.json", "[[[["),
        ("training_state.json", "{\"progress\": {\"step\": -1}}"),
        ("training_state.safetensors", "x"),
        ("manifest.json", "{\"files\": 3}"),
        ("manifest.json", "{"),
    ] {
        let line = format!("{FINETUNE} --resume adapter");
        cases.push(Case { line, ..case(content.to_owned(), file, content.into(), &[file]) });
    }
    check(cases, 90);
}

#[test]
fn tokenizers() {
    let mut cases = Vec::new();
    let case = |name: String, file: &str, content: Vec<u8>, says: &[&str]| {
        let chat = format!("{FINETUNE} --data.prompt_style chat");
        Case::new(format!("{file}, {name}"), &chat, says)
            .with("model/chat_template.jinja", "{% for m in messages %}{{ m.content }}{% endfor %}")
            .with(&format!("model/{file}"), content)
    };
    let whole = text(&MODEL, "tokenizer.json");
    for (name, content) in no_objects(&whole) {
        cases.push(case(name, "tokenizer.json", content, &["tokenizer.json"]));
    }
    cases.push(Case::new("no tokenizer", FINETUNE, &["tokenizer.json"]).without("model/tokenizer.json"));
    let tree: Value = serde_json::from_str(&whole).unwrap();
    let changed = |pointer: &str, value: Value| {
        let mut tree = tree.clone();
        *tree.pointer_mut(pointer).unwrap() = value;
        tree.to_string().into_bytes()
    };
    let token = tree["model"]["vocab"].as_object().unwrap().keys().nth(300).unwrap().clone();
    for (pointer, value) in [
        ("/model", json!(null)),
        ("/model", json!({"type": "Magic"})),
        ("/model/vocab", json!([])),
        ("/model/vocab", json!({"a": "x"})),
        ("/model/vocab", json!({"a": -1})),
        ("/model/merges", json!("x")),
        ("/model/merges", json!(["not there"])),
        ("/model/merges", json!([["not", "there"]])),
        ("/added_tokens", json!("x")),
        ("/added_tokens", json!([{"id": "x", "content": "y"}])),
        ("/pre_tokenizer", json!({"type": "Magic"})),
        (
            "/pre_tokenizer",
            json!({"type": "Split", "pattern": {"Regex": "((("}, "behavior": "Isolated", "invert": false}),
        ),
        ("/normalizer", json!({"type": "Replace", "pattern": {"Regex": "("}, "content": "x"})),
        ("/normalizer", json!({"type": "Precompiled", "precompiled_charsmap": "AAAA"})),
        ("/decoder", json!({"type": 3})),
        ("/post_processor", json!({"type": "TemplateProcessing"})),
        ("/version", json!("9.0")),
    ] {
        cases.push(case(
            format!("{pointer}: {value}"),
            "tokenizer.json",
            changed(pointer, value.clone()),
            &["tokenizer.json"],
        ));
    }
    let said = token.replace('Ġ', " ");
    for id in [1408u64, 100_000, u64::from(u32::MAX)] {
        let mut vocab = tree["model"]["vocab"].clone();
        vocab[&token] = json!(id);
        let content = changed("/model/vocab", vocab);
        let case = case(format!("an id of {id}"), "tokenizer.json", content, &["data.json", "token", &id.to_string()]);
        let row = json!({"instruction": "a", "output": format!("b{said}")});
        cases.push(case.with("data.json", json!([row, row]).to_string()));
    }
    // A pattern whose search takes exponential time.
    let slow = json!({"type": "Split", "pattern": {"Regex": "(x+x+)+y"}, "behavior": "Isolated", "invert": false});
    let rows =
        format!(r#"[{{"instruction": "{0}", "output": "b"}}, {{"instruction": "c", "output": "d"}}]"#, "x".repeat(60));
    let slow = case(
        "an exponential pattern".to_owned(),
        "tokenizer.json",
        changed("/pre_tokenizer", slow),
        &["tokenizer.json"],
    );
    cases.push(slow.with("data.json", rows));
    let whole = text(&MODEL, "tokenizer_config.json");
    for (name, content) in no_objects(&whole) {
        cases.push(case(name, "tokenizer_config.json", content, &["tokenizer_config.json"]));
    }
    for (file, key, value) in [
        ("tokenizer_config.json", "add_bos_token", json!("yes")),
        ("tokenizer_config.json", "add_bos_token", json!(3)),
        ("tokenizer_config.json", "eos_token", json!(3)),
        ("tokenizer_config.json", "eos_token", json!(["x"])),
        ("tokenizer_config.json", "bos_token", json!(true)),
        ("generation_config.json", "eos_token_id", json!("x")),
        ("generation_config.json", "eos_token_id", json!(-1)),
        ("generation_config.json", "eos_token_id", json!([[1]])),
        ("generation_config.json", "eos_token_id", json!(1u64 << 40)),
        ("generation_config.json", "bos_token_id", json!({})),
    ] {
        let content = set(&text(&MODEL, file), key, value.clone());
        cases.push(case(format!("{key}: {value}"), file, content.into(), &[file, key]));
    }
    let content = set(&text(&MODEL, "generation_config.json"), "eos_token_id", json!(5_000_000));
    cases.push(case(
        "eos beyond the model".to_owned(),
        "generation_config.json",
        content.into(),
        &["eos_token_id", "5000000"],
    ));
    for value in [json!(3), json!({}), json!([3]), json!([{"name": "default", "template": 3}])] {
        let content = set(&whole, "chat_template", value.clone());
        let case = case(
            format!("chat_template: {value}"),
            "tokenizer_config.json",
            content.into(),
            &["tokenizer_config.json", "chat_template"],
        );
        cases.push(case.without("model/chat_template.jinja"));
    }
    for name in ["generation_config.json", "special_tokens_map.json", "chat_template.json"] {
        for content in ["[]", "{", "\u{0}", "3"] {
            let case = case(format!("{content:?}"), name, content.into(), &[name]);
            cases.push(case.without("model/chat_template.jinja"));
        }
    }
    check(cases, 75);
}

#[test]
fn chat_templates() {
    let deep = |part: &str, times: usize| part.repeat(times);
    let looped = |value: &str, end: &str| {
        let turn = format!("{{% for i in range(50000) %}}{{% set ns.a = {value} %}}{{% endfor %}}");
        format!("{{% set ns = namespace(a=[1]) %}}{turn}{end}")
    };
    let cases = [
        ("an open tag", "{% for m in messages %}".to_owned()),
        ("an unknown tag", "{% magic %}".to_owned()),
        ("an open expression", "{{ messages".to_owned()),
        ("an unknown filter", "{{ messages | magic }}".to_owned()),
        ("an unknown function", "{{ magic() }}".to_owned()),
        ("an unknown method", "{{ messages.magic() }}".to_owned()),
        ("its own refusal", "{{ raise_exception('no') }}".to_owned()),
        ("a refusal with an escape", "{{ raise_exception('\u{1b}[31m\n\nred') }}".to_owned()),
        ("another file", "{% include '/etc/passwd' %}".to_owned()),
        ("an import", "{% import 'os' as os %}{{ os.system('touch pwned') }}".to_owned()),
        ("an import of itself", "{% include 'chat_template' %}".to_owned()),
        ("Python's insides", "{{ messages.__class__.__mro__ }}{{ ''.__class__() }}".to_owned()),
        ("a loop without end", "{% for a in range(99999) %}".repeat(4) + "{% endfor %}".repeat(4).as_str()),
        (
            "a loop that says nothing",
            "{% for a in range(99999) %}{% for b in range(99999) %}{% set c = b %}{% endfor %}{% endfor %}".to_owned(),
        ),
        (
            "a loop that says much",
            "{% for a in range(99999) %}{% for b in range(999) %}0123456789{% endfor %}{% endfor %}".to_owned(),
        ),
        ("a huge range", "{% for a in range(10 ** 18) %}x{% endfor %}".to_owned()),
        ("a macro of itself", "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}".to_owned()),
        (
            "two macros of one another",
            "{% macro a() %}{{ b() }}{% endmacro %}{% macro b() %}{{ a() }}{% endmacro %}{{ a() }}".to_owned(),
        ),
        (
            "a macro that doubles",
            "{% macro m(n) %}{% if n > 0 %}{{ m(n - 1) }}{{ m(n - 1) }}{% endif %}{% endmacro %}{{ m(64) }}".to_owned(),
        ),
        ("a recursive loop", "{% for m in messages recursive %}{{ loop(messages) }}{% endfor %}".to_owned()),
        ("a text times a number", "{{ 'x' * 999999999999 }}".to_owned()),
        ("a list times a number", "{{ [1] * 999999999999 }}".to_owned()),
        ("a division by zero", "{{ 1 // 0 }}".to_owned()),
        ("a huge power", "{{ 10 ** 999999999 }}".to_owned()),
        ("a wide format", "{{ '%9999999999d' % 1 }}{{ '{:9999999999}'.format(1) }}".to_owned()),
        ("a wide tojson", "{{ messages | tojson(indent=99999999999) }}".to_owned()),
        ("deep round brackets", format!("{{{{ {}1{} }}}}", deep("(", 50_000), deep(")", 50_000))),
        ("deep square brackets", format!("{{{{ {}{} }}}}", deep("[", 50_000), deep("]", 50_000))),
        ("deep curly brackets", format!("{{{{ {} }}}}", deep("{'a': ", 50_000))),
        ("deep nots", format!("{{{{ {} 1 }}}}", deep("not ", 50_000))),
        ("deep minuses", format!("{{{{ {} 1 }}}}{{{{ magic() }}}}", deep("-", 50_000))),
        ("deep ifs", deep("{% if true %}", 50_000)),
        ("deep loops", deep("{% for m in messages %}", 5_000)),
        ("a long sum", format!("{{{{ 1{} }}}}{{{{ magic() }}}}", deep(" + 1", 100_000))),
        ("a long concatenation", format!("{{{{ 1{} }}}}{{{{ magic() }}}}", deep(" ~ 1", 100_000))),
        ("a long chain", format!("{{{{ messages{} }}}}", deep(".a", 100_000))),
        ("a long chain of filters", format!("{{{{ messages{} }}}}{{{{ magic() }}}}", deep("|first", 100_000))),
        (
            "a long chain of elifs",
            format!("{{% if 1 %}}{}{{% endif %}}{{{{ magic() }}}}", deep("{% elif 1 %}", 50_000)),
        ),
        ("a text that doubles", looped("ns.a ~ ns.a", "x")),
        ("lists in each other", looped("[ns.a]", "{{ ns.a }}")),
        ("lists in each other as JSON", looped("[ns.a]", "{{ ns.a | tojson }}")),
        ("maps in each other", looped("{'a': ns.a}", "{{ ns.a }}")),
        ("namespaces in each other", looped("namespace(a=ns.a)", "{{ ns.a }}")),
        ("a list many times repeated", looped("ns.a * 1", "{{ ns.a }}{{ magic() }}")),
        ("a list many times longer", looped("ns.a + [1]", "{{ ns.a | length }}{{ magic() }}")),
        ("a namespace in itself", looped("ns", "{{ ns }}{{ ns.a | tojson }}{{ ns == ns.a }}{{ magic() }}")),
        ("a namespace in a list in itself", looped("[ns]", "{{ ns }}")),
        ("lists in each other by hand", format!("{}{{{{ x }}}}{{{{ magic() }}}}", deep("{%set x=[x]%}", 9_000))),
        ("a list many times repeated by hand", format!("{{{{ [1]{} }}}}{{{{ magic() }}}}", deep("*1", 60_000))),
        ("nothing at all", String::new()),
        ("zeros", "{{ '\u{0}' }}{{ magic() }}".to_owned()),
    ];
    let mut all = Vec::new();
    for (name, template) in cases {
        let says = if name == "nothing at all" { "data.json" } else { "chat_template.jinja" };
        let line = format!("{FINETUNE} --data.prompt_style chat");
        let case = Case::new(format!("a template with {name}"), &line, &[says]);
        all.push(case.with("model/chat_template.jinja", template));
    }
    let template = |content: &[u8]| {
        let line = format!("{FINETUNE} --data.prompt_style chat");
        Case::new("chat_template.jinja", &line, &["chat_template.jinja"]).with("model/chat_template.jinja", content)
    };
    all.push(template(b"\xff\xfe{\x00{\x00"));
    all.push(template(b"{{ 1 }").without("model/chat_template.jinja").with("model/chat_template.jinja/x", ""));
    check(all, 53);
}

#[test]
fn data_rows() {
    let mut cases = Vec::new();
    let case = |file: &str, content: Vec<u8>, says: &[&str]| {
        let line = FINETUNE.replace(" data.json", &format!(" {file}"));
        let says: Vec<&str> = [file].iter().chain(says).copied().collect();
        let shown: String = String::from_utf8_lossy(&content).chars().take(60).collect();
        Case::new(format!("{file}: {shown}"), &line, &says).with(file, content)
    };
    let utf16 = |text: &str, big: bool| -> Vec<u8> {
        let bytes = |unit: u16| if big { unit.to_be_bytes() } else { unit.to_le_bytes() };
        text.encode_utf16().flat_map(bytes).collect()
    };
    for (file, whole) in [
        ("d.json", ROWS),
        ("d.jsonl", "{\"instruction\": \"a\", \"output\": \"b\"}\n{\"instruction\": \"c\", \"output\": \"d\"}\n"),
        ("d.csv", "instruction,output\na,b\nc,d\n"),
    ] {
        for content in [
            Vec::new(),
            b" \n \n".to_vec(),
            utf16(whole, false),
            utf16(whole, true),
            [b"\xff\xfe".to_vec(), utf16(whole, false)].concat(),
            [b"\xef\xbb\xbf", whole.as_bytes()].concat(),
            whole.encode_utf16().flat_map(|u| u32::from(u).to_le_bytes()).collect(),
            [whole.as_bytes(), b"\xe9\xe8"].concat(),
            vec![0; 1000],
            vec![0xff; 1000],
            b"PK\x03\x04\x14\x00".to_vec(),
            b"\x1f\x8b\x08\x00".to_vec(),
            b"PAR1\x15\x04".to_vec(),
            b"<!DOCTYPE html><html></html>".to_vec(),
            b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n".to_vec(),
        ] {
            cases.push(case(file, content, &[]));
        }
    }
    for content in [
        "[]",
        "{}",
        "null",
        "3",
        "\"x\"",
        "true",
        "[",
        "[{",
        "[{}",
        "[{}]",
        "[{},]",
        "[null]",
        "[3]",
        "[[]]",
        "[\"x\"]",
        "{\"data\": []}",
        "[{\"instruction\": \"a\"}]",
        "[{\"output\": \"a\"}]",
        "[{\"a\": 1}] trailing",
        "[NaN]",
        "[{'instruction': 'a'}]",
        "[{\"instruction\": \"\\ud800\", \"output\": \"b\"}]",
        "[{\"instruction\": \"\u{1}\", \"output\": \"b\"}]",
    ] {
        cases.push(case("d.json", content.into(), &[]));
    }
    for value in ["[3]", "null", "true", "[]", "{}", "[\"x\"]", "1e999"] {
        for key in ["instruction", "output", "input"] {
            if (key, value) == ("input", "null") {
                continue;
            }
            let mut row = BTreeMap::from([("instruction", "\"a\""), ("output", "\"b\"")]);
            row.insert(key, value);
            let row: Vec<String> = row.iter().map(|(key, value)| format!("\"{key}\": {value}")).collect();
            let good = "{\"instruction\": \"a\", \"output\": \"b\"}";
            let place = if value == "1e999" { vec!["line 2"] } else { vec![key, "2"] };
            cases.push(case("d.json", format!("[{good},\n{{{}}}]", row.join(", ")).into(), &place));
            let place = if value == "1e999" { vec!["line 2"] } else { vec![key, "line 2"] };
            cases.push(case("d.jsonl", format!("{good}\n{{{}}}\n", row.join(", ")).into(), &place));
        }
    }
    for (content, says) in [
        (r#"{"messages": 3}"#, "messages"),
        (r#"{"messages": {}}"#, "messages"),
        (r#"{"messages": []}"#, "messages"),
        (r#"{"messages": [3]}"#, "turn 1"),
        (r#"{"messages": [null]}"#, "turn 1"),
        (r#"{"messages": [{}]}"#, "turn 1"),
        (r#"{"messages": [{"role": "user"}]}"#, "content"),
        (r#"{"messages": [{"role": 3, "content": "x"}]}"#, "role"),
        (r#"{"messages": [{"role": "user", "content": 3}]}"#, "content"),
        (r#"{"messages": [{"role": "user", "content": null}]}"#, "content"),
        (r#"{"messages": [{"role": "user", "content": [3]}]}"#, "content"),
        (r#"{"messages": [{"role": "user", "content": "x"}]}"#, "assistant"),
        (r#"{"messages": [{"role": "assistant", "content": "x", "tool_calls": [1]}]}"#, "tool_calls"),
        (r#"{"messages": [{"role": "\u001b[31m", "content": "x"}]}"#, "messages"),
        (r#"{"messages": "[[["}"#, "messages"),
        (r#"{"conversations": [{"from": "human"}]}"#, "value"),
        (r#"{"conversations": [{"from": 3, "value": "x"}]}"#, "from"),
        (r#"{"conversations": [{"from": "gpt", "value": {}}]}"#, "value"),
        (r#"{"text": 3}"#, "text"),
        (r#"{"\u001b[31mred": 3}"#, "line 1"),
        (r#"{"prompt": "x"}"#, "line 1"),
        (r#"{"question": [1], "answer": 2}"#, "question"),
    ] {
        cases.push(case("d.jsonl", format!("{content}\n{content}\n").into(), &[says]));
    }
    for (open, close) in [("[", "]"), ("{\"a\":", "}")] {
        let deep = format!("{}{}", open.repeat(100_000), close.repeat(100_000));
        cases.push(case("d.json", deep.clone().into(), &[]));
        cases.push(case("d.jsonl", format!("{{\"instruction\": {deep}, \"output\": \"b\"}}\n").into(), &["line 1"]));
        let text = serde_json::to_string(&deep).unwrap();
        cases.push(case("d.jsonl", format!("{{\"messages\": {text}}}\n").into(), &["line 1"]));
    }
    for content in [
        "instruction,output\n",
        "instruction\na\n",
        "a,b\nc,d\n",
        "instruction,output\na\n",
        "instruction,output\na,b,c\n",
        "instruction,output\n\"a,b\n",
        "instruction,instruction,output\na,b,c\n",
        "instruction;output\na;b\n",
        "\n\n\n",
        ",\n,\n",
    ] {
        cases.push(case("d.csv", content.into(), &[]));
    }
    for file in ["d.txt", "d.parquet", "d", "d.json.gz"] {
        cases.push(case(file, ROWS.into(), &[]));
    }
    cases.push(case("nowhere.json", ROWS.into(), &[]).without("nowhere.json"));
    let folder = |files: &[(&str, &str)], says: &str| {
        let line = FINETUNE.replace(" data.json", " rows").replace("--data.val_split_fraction 0.5", "");
        let mut case = Case::new("a folder", &line, &[says]).with("rows/", "");
        for (name, content) in files {
            case = case.with(&format!("rows/{name}"), *content);
        }
        case
    };
    cases.push(folder(&[], "train"));
    cases.push(folder(&[("train.json", ROWS)], "val"));
    cases.push(folder(&[("train.json", ROWS), ("val.json", "[]")], "val.json"));
    cases.push(folder(&[("train.json", "{"), ("val.json", ROWS)], "train.json"));
    for to in ["nowhere", "d.json", "/dev/zero", "/dev/null", "/etc/passwd"] {
        cases.push(case("d.json", ROWS.into(), &[]).link("d.json", to));
    }
    check(cases, 120);
}

#[test]
fn recipes() {
    let mut cases = Vec::new();
    let case = |content: Vec<u8>, says: &[&str]| {
        let shown: String = String::from_utf8_lossy(&content).chars().take(60).collect();
        let line = format!("{} --config r.yaml", FINETUNE.split(" --train.").next().unwrap());
        Case::new(format!("r.yaml: {shown}"), &line, says).with("r.yaml", content)
    };
    let laughs = |count: usize| {
        let lines = (1..count).map(|i| format!("a{i}: &a{i} [{}]\n", vec![format!("*a{}", i - 1); 10].join(", ")));
        format!("a0: &a0 [x]\n{}", lines.collect::<String>())
    };
    for content in [
        "[".repeat(100_000),
        "{a: ".repeat(100_000),
        (0..2000).map(|i| format!("{}a:\n", " ".repeat(i))).collect(),
        "- ".repeat(50_000),
        laughs(4),
        laughs(10),
        laughs(60),
        "a: &a [*a]\n".to_owned(),
        "a: &a\n  <<: *a\n".to_owned(),
        "a: *nowhere\n".to_owned(),
        "- a\n- b\n".to_owned(),
        "just text\n".to_owned(),
        "3\n".to_owned(),
        "lora_r: 4\nlora_r: 8\n".to_owned(),
        "lora_r: [4\n".to_owned(),
        "lora_r: 'x\n".to_owned(),
        "lora_r: 4\n---\nlora_r: 8\n".to_owned(),
        "lora_r: !!python/object/apply:os.system [\"touch pwned\"]\n".to_owned(),
        "!!python/object/apply:os.system [\"touch pwned\"]\n".to_owned(),
        "\u{1b}[31m: 3\n".to_owned(),
        "? [a, b]\n: c\n".to_owned(),
        "{\"lora_r\": ".to_owned(),
        "%YAML 9.9\n---\na: b\n".to_owned(),
        "x".repeat(200_000),
        format!("{}: 3\n", "k".repeat(200_000)),
    ] {
        cases.push(case(content.into(), &["r.yaml"]));
    }
    cases.push(case(vec![0xff, 0xfe, b'a', 0], &["r.yaml"]));
    cases.push(case(vec![0; 100], &["r.yaml"]));
    let whole: &[(&str, &str)] =
        &[("lora_r", "lora_r"), ("seed", "seed"), ("train.epochs", "epochs"), ("data.seed", "seed")];
    for (key, says) in whole {
        for value in ["x", "-1", "1.5", "[4]", "{a: 4}", "1e400", "99999999999999999999999", ".nan", "true"] {
            let text = match key.split_once('.') {
                Some((group, key)) => format!("{group}:\n  {key}: {value}\n"),
                None => format!("{key}: {value}\n"),
            };
            let says = if matches!(value, ".nan" | "1e400") { "line" } else { says };
            cases.push(case(text.into(), &["r.yaml", says]));
        }
    }
    for (content, says) in [
        ("lora_alpha: x", "lora_alpha"),
        ("lora_alpha: .nan", "line 1"),
        ("lora_alpha: .inf", "line 1"),
        ("lora_dropout: 1.5", "lora_dropout"),
        ("lora_query: maybe", "lora_query"),
        ("lora_r: 1000000000000", "lora_r"),
        ("lora_r: 18446744073709551615", "lora_r"),
        ("train: 3", "train"),
        ("train: [1]", "train"),
        ("train: {nope: 1}", "nope"),
        ("train: {lr_warmup_steps: -1}", "lr_warmup_steps"),
        ("train: {micro_batch_size: 0}", "micro_batch_size"),
        ("train: {save_interval: 0}", "save_interval"),
        ("train: {max_time: x}", "max_time"),
        ("train: {max_norm: -1}", "max_norm"),
        ("eval: {interval: 0}", "interval"),
        ("eval: {evaluate_example: nope}", "evaluate_example"),
        ("data: {class_path: Nope}", "Nope"),
        ("data: {class_path: 3}", "3"),
        ("data: [JSON]", "data"),
        ("data: {json_path: [x]}", "json_path"),
        ("data: {val_split_fraction: 7}", "val_split_fraction"),
        ("data: {prompt_style: nope}", "nope"),
        ("optimizer: SGD", "SGD"),
        ("optimizer: {class_path: torch.optim.AdamW, init_args: {lr: x}}", "lr"),
        ("optimizer: {init_args: {betas: [1]}}", "betas"),
        ("optimizer: {init_args: {lr: .inf}}", "line 1"),
        ("precision: 8-true", "precision"),
        ("precision: [x]", "precision"),
        ("quantize: bnb.nf5", "nf5"),
        ("devices: 8", "devices"),
        ("nope: 1", "nope"),
        ("out_dir: [a]", "out_dir"),
        ("add_bos: 7", "add_bos"),
    ] {
        cases.push(case(content.into(), &[says]));
    }
    cases.push(case(Vec::new(), &["r.yaml"]).without("r.yaml"));
    cases.push(case(Vec::new(), &["r.yaml"]).without("r.yaml").with("r.yaml/x", ""));
    check(cases, 95);
}

/// The model and the adapter that all cases are made from work: what is refused is what was changed.
#[test]
fn the_unchanged_files_work() {
    for line in [GENERATE, FINETUNE, ADAPTER] {
        let case = Case::new("unchanged", line, &[]).adapted();
        assert!(case.problem().unwrap().contains("exit code 0"), "{line}");
    }
}
