//! What integration tests share: running the binary, the quickstart's model and data, reading what a run wrote.
#![allow(clippy::unwrap_used)]

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::net::TcpListener;
use std::path::{Path, PathBuf};
#[cfg(unix)]
use std::process::Child;
use std::process::{Command, Output, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use safetensors::tensor::TensorView;
use safetensors::{Dtype, SafeTensors};

/// Settings of a short run: the quickstart's, three steps of two micro batches.
const SHORT: &str = "--lora_key true --lora_projection true --lora_mlp true --lr 2e-3 --train.max_steps 3 \
                     --train.global_batch_size 8 --train.micro_batch_size 4 --train.lr_warmup_steps 1 \
                     --eval.max_new_tokens 4 --out_dir out";

/// Root of the repository.
pub fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// The quickstart's model.
pub fn tiny() -> PathBuf {
    root().join("data/tiny")
}

/// The quickstart's dataset.
pub fn dataset() -> PathBuf {
    root().join("data/instructions_tiny.json")
}

/// What a run of the binary gave.
#[derive(Debug)]
pub struct Ran {
    /// Exit code; -1 after a signal.
    pub code: i32,
    pub stdout: String,
    pub stderr: String,
}

impl Ran {
    /// Fails unless the run succeeded.
    pub fn ok(self) -> Self {
        assert_eq!(self.code, 0, "{self:#?}");
        self
    }

    /// Fails unless the run ended with `code`, gave no result, and said so in one `error:` line with all of `parts` and
    /// at most one `hint:` line behind it.
    pub fn refused(self, code: i32, parts: &[&str]) -> Self {
        assert_eq!(self.code, code, "{self:#?}");
        assert_eq!(self.stdout, "", "{self:#?}");
        let lines = |start: &str| self.stderr.lines().filter(|line| line.starts_with(start)).collect::<Vec<_>>();
        let (errors, hints) = (lines("error: "), lines("hint: "));
        assert!(errors.len() == 1 && hints.len() <= 1, "{self:#?}");
        assert!(!self.stderr.contains("panicked") && !self.stderr.contains("RUST_BACKTRACE"), "{self:#?}");
        for part in parts {
            assert!(
                errors[0].contains(part) || hints.iter().any(|hint| hint.contains(part)),
                "no {part:?} in {self:#?}"
            );
        }
        // The system's text once, not once for each level of the error.
        assert!(errors[0].matches("(os error").count() <= 1, "{self:#?}");
        self
    }
}

impl From<Output> for Ran {
    fn from(output: Output) -> Self {
        Self {
            code: output.status.code().unwrap_or(-1),
            stdout: String::from_utf8(output.stdout).unwrap(),
            stderr: String::from_utf8(output.stderr).unwrap(),
        }
    }
}

/// Runs the binary in `cwd`.
pub fn litgpt<S: AsRef<OsStr>>(cwd: &Path, args: impl IntoIterator<Item = S>) -> Ran {
    litgpt_in(cwd, &[], args)
}

/// Runs the binary in `cwd` with these environment variables.
pub fn litgpt_in<S: AsRef<OsStr>>(cwd: &Path, env: &[(&str, &str)], args: impl IntoIterator<Item = S>) -> Ran {
    let mut command = assert_cmd::Command::new(env!("CARGO_BIN_EXE_litgpt"));
    for name in ["HF_TOKEN", "HF_ENDPOINT", "HF_HUB_OFFLINE", "LIGHTNING_ARTIFACTS_DIR"] {
        command.env_remove(name);
    }
    command.envs(env.iter().copied());
    command.args(args).current_dir(cwd).timeout(Duration::from_secs(300)).output().unwrap().into()
}

/// Arguments of a short run on the quickstart's dataset into `out`; `more`, split at blanks, beats its settings.
fn short_run(base: &Path, more: &str) -> Vec<String> {
    let (base, data) = (base.display(), dataset());
    let fixed = format!("finetune lora --checkpoint_dir {base} --data JSON --data.json_path {}", data.display());
    [&fixed, SHORT, more].into_iter().flat_map(str::split_whitespace).map(str::to_owned).collect()
}

/// Starts a web server on loopback that answers each request, given as its head, with a whole response; its address.
pub fn serve(answer: impl Fn(&str) -> Vec<u8> + Send + 'static) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = format!("http://{}", listener.local_addr().unwrap());
    thread::spawn(move || {
        for mut stream in listener.incoming().flatten() {
            let lines = BufReader::new(stream.try_clone().unwrap()).lines();
            let head: Vec<String> = lines.map_while(Result::ok).take_while(|line| !line.is_empty()).collect();
            // A client that has enough of it hangs up.
            let _ = stream.write_all(&answer(&head.join("\n")));
        }
    });
    address
}

/// A response with `content`.
pub fn page(content: impl AsRef<[u8]>) -> Vec<u8> {
    let content = content.as_ref();
    let head = format!("HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: {}\r\n\r\n", content.len());
    [head.as_bytes(), content].concat()
}

/// A response without content; `headers` end in line ends.
pub fn status(line: &str, headers: &str) -> Vec<u8> {
    format!("HTTP/1.1 {line}\r\nConnection: close\r\nContent-Length: 0\r\n{headers}\r\n").into()
}

/// A short run on the quickstart's dataset into `cwd/out`; `more`, split at blanks, beats its settings.
pub fn finetune(cwd: &Path, base: &Path, more: &str) -> Ran {
    litgpt(cwd, short_run(base, more))
}

/// The same, not yet started and without anyone who reads what it says.
pub fn finetune_command(cwd: &Path, base: &Path, more: &str) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_litgpt"));
    command.args(short_run(base, more)).current_dir(cwd).stdout(Stdio::null()).stderr(Stdio::null());
    command
}

/// The same through a shell that runs `before` first.
#[cfg(unix)]
pub fn finetune_after(cwd: &Path, base: &Path, before: &str, more: &str) -> Command {
    let mut command = Command::new("sh");
    command.args(["-c", &format!("{before}; exec \"$0\" \"$@\""), env!("CARGO_BIN_EXE_litgpt")]);
    command.args(short_run(base, more)).current_dir(cwd);
    command
}

/// Waits until `holds`.
pub fn wait_until(what: &str, mut holds: impl FnMut() -> bool) {
    let begun = Instant::now();
    while !holds() {
        assert!(begun.elapsed() < Duration::from_secs(120), "{what} never came");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// Sends a signal such as `-HUP`.
#[cfg(unix)]
pub fn kill(child: &Child, signal: &str) {
    Command::new("kill").args([signal, &child.id().to_string()]).stderr(Stdio::null()).status().unwrap();
}

/// The bytes of `out/final` that training decides.
pub fn result(out: &Path) -> [Vec<u8>; 2] {
    ["adapter_model.safetensors", "training_state.safetensors"]
        .map(|name| fs::read(out.join("final").join(name)).unwrap())
}

/// The rows of a metrics file without the columns that hold durations and memory.
pub fn losses(out: &Path) -> Vec<BTreeMap<String, String>> {
    let mut rows = metrics(out);
    for row in &mut rows {
        row.remove("iter_time");
        row.remove("tokens_per_s");
        row.remove("memory");
    }
    rows
}

/// The likeliest answer of the model in `dir`, a folder below `cwd` or an absolute path.
pub fn greedy(cwd: &Path, dir: &str, prompt: &str) -> String {
    let args =
        ["generate", "--checkpoint_dir", dir, "--temperature", "0", "--max_new_tokens", "24", "--prompt", prompt];
    litgpt(cwd, args).ok().stdout
}

/// Copies the quickstart's model to `to`.
pub fn copy_tiny(to: &Path) {
    fs::create_dir_all(to).unwrap();
    for entry in fs::read_dir(tiny()).unwrap() {
        let entry = entry.unwrap();
        fs::write(to.join(entry.file_name()), fs::read(entry.path()).unwrap()).unwrap();
    }
}

/// Dtype, shape and little-endian elements of a tensor.
pub type Stored = (Dtype, Vec<usize>, Vec<u8>);

/// The tensors of a safetensors file.
pub fn tensors(path: &Path) -> BTreeMap<String, Stored> {
    let bytes = fs::read(path).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let stored = |view: TensorView<'_>| (view.dtype(), view.shape().to_vec(), view.data().to_vec());
    file.tensors().into_iter().map(|(name, view)| (name, stored(view))).collect()
}

/// Writes a safetensors file.
pub fn write_tensors(path: &Path, tensors: &BTreeMap<String, Stored>) {
    let views = tensors
        .iter()
        .map(|(name, (dtype, shape, data))| (name.as_str(), TensorView::new(*dtype, shape.clone(), data).unwrap()));
    fs::write(path, safetensors::serialize(views, None).unwrap()).unwrap();
}

/// Elements of an F32 or BF16 tensor.
pub fn floats((dtype, _, bytes): &Stored) -> Vec<f32> {
    match dtype {
        Dtype::F32 => bytes.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect(),
        Dtype::BF16 => bytes.chunks_exact(2).map(|b| f32::from_bits(u32::from_le_bytes([0, 0, b[0], b[1]]))).collect(),
        other => panic!("{other:?} is not read here"),
    }
}

/// The rows of a metrics file, by column.
pub fn metrics(out_dir: &Path) -> Vec<BTreeMap<String, String>> {
    let text = fs::read_to_string(out_dir.join("metrics.csv")).unwrap();
    let mut lines = text.lines();
    let columns: Vec<&str> = lines.next().unwrap().split(',').collect();
    let row = |line: &str| columns.iter().map(|c| (*c).to_owned()).zip(line.split(',').map(str::to_owned)).collect();
    lines.map(row).collect()
}

/// The numbers of one column, where it has one.
pub fn column(out_dir: &Path, name: &str) -> Vec<f64> {
    metrics(out_dir).iter().filter_map(|row| row[name].parse().ok()).collect()
}

/// Every file below `dir` with its content, every link with its target.
pub fn content(dir: &Path) -> BTreeMap<PathBuf, Vec<u8>> {
    let mut files = BTreeMap::new();
    for entry in fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        if path.is_symlink() {
            let target = fs::read_link(&path).unwrap();
            files.insert(path, target.into_os_string().into_encoded_bytes());
        } else if path.is_dir() {
            files.extend(content(&path));
        } else {
            files.insert(path.clone(), fs::read(&path).unwrap());
        }
    }
    files
}

/// The names in `dir`, sorted.
pub fn names(dir: &Path) -> Vec<String> {
    let entries = fs::read_dir(dir).unwrap();
    let mut names: Vec<String> = entries.map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}
