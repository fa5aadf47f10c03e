//! Compiles the CUDA kernels beside this file when the feature `cuda` is on; without it does nothing.
//!
//! Every `x.cu` becomes `$OUT_DIR/x.fatbin`, to be embedded and loaded as one module: machine code for the cards of
//! `CUDA_COMPUTE_CAP` (`90`, or a list `80,89`; default 80, 89 and 90) and PTX of the newest of them, which the driver
//! translates on later cards. nvcc is taken from `$CUDA_HOME`, `$CUDA_PATH`, the `PATH` or `/usr/local/cuda`, in this order.

// A build script talks to cargo on stdout.
#![allow(clippy::print_stdout)]

use std::env;
use std::path::{Path, PathBuf};
use std::process::Command;

const DEFAULT_CAPABILITIES: &str = "80,89,90";

fn main() {
    println!("cargo::rerun-if-changed=kernels/build.rs");
    if env::var_os("CARGO_FEATURE_CUDA").is_none() {
        return;
    }
    for variable in ["CUDA_HOME", "CUDA_PATH", "CUDA_COMPUTE_CAP"] {
        println!("cargo::rerun-if-env-changed={variable}");
    }
    // `cargo::error` fails the build with this text alone, where a panic would bury it under a backtrace.
    if let Err(problem) = compile_all() {
        for line in problem.lines() {
            println!("cargo::error={line}");
        }
    }
}

fn compile_all() -> Result<(), String> {
    let folder = PathBuf::from(variable("CARGO_MANIFEST_DIR")?).join("kernels");
    let out = PathBuf::from(variable("OUT_DIR")?);
    let sources = sources(&folder)?;
    let nvcc = find_nvcc().ok_or(
        "the feature `cuda` needs nvcc, which is not in $CUDA_HOME/bin, $CUDA_PATH/bin, the PATH or /usr/local/cuda/bin\n\
         hint: install the CUDA toolkit (12.2 or later) or set CUDA_HOME to it; to run on the processor, leave out `--features cuda`",
    )?;
    let code = code_flags(&env::var("CUDA_COMPUTE_CAP").unwrap_or_else(|_| DEFAULT_CAPABILITIES.to_owned()))?;
    // One nvcc uses one core, so as many run as cargo grants us.
    let jobs = env::var("NUM_JOBS").ok().and_then(|n| n.parse().ok()).unwrap_or(1);
    let next = std::sync::atomic::AtomicUsize::new(0);
    let problems = std::sync::Mutex::new(Vec::new());
    std::thread::scope(|scope| {
        for _ in 0..jobs.min(sources.len()) {
            scope.spawn(|| {
                while let Some(source) = sources.get(next.fetch_add(1, std::sync::atomic::Ordering::Relaxed)) {
                    if let Err(problem) = compile(&nvcc, &code, source, &out) {
                        problems.lock().unwrap_or_else(std::sync::PoisonError::into_inner).push(problem);
                    }
                }
            });
        }
    });
    let problems = problems.into_inner().unwrap_or_else(std::sync::PoisonError::into_inner);
    if problems.is_empty() { Ok(()) } else { Err(problems.join("\n")) }
}

fn variable(name: &str) -> Result<String, String> {
    env::var(name).map_err(|e| format!("{name}: {e}; build with cargo"))
}

/// The `.cu` files, in the order of their names; also asks cargo to watch them and what they include.
fn sources(folder: &Path) -> Result<Vec<PathBuf>, String> {
    let entries = std::fs::read_dir(folder).map_err(|e| format!("cannot read `{}`: {e}", folder.display()))?;
    let mut sources = Vec::new();
    for entry in entries {
        let path = entry.map_err(|e| format!("cannot read `{}`: {e}", folder.display()))?.path();
        let is = |extension: &str| path.extension().is_some_and(|e| e == extension);
        if is("cu") || is("cuh") {
            println!("cargo::rerun-if-changed={}", path.display());
        }
        if is("cu") {
            sources.push(path);
        }
    }
    sources.sort();
    Ok(sources)
}

fn find_nvcc() -> Option<PathBuf> {
    let name = if cfg!(windows) { "nvcc.exe" } else { "nvcc" };
    let homes = ["CUDA_HOME", "CUDA_PATH"].into_iter().filter_map(env::var_os).map(|home| Path::new(&home).join("bin"));
    let path = env::var_os("PATH").unwrap_or_default();
    homes
        .chain(env::split_paths(&path))
        .chain([PathBuf::from("/usr/local/cuda/bin")])
        .map(|folder| folder.join(name))
        .find(|nvcc| nvcc.is_file())
}

/// `80,89,90` as nvcc's flags; also `8.0` and `sm_80`.
fn code_flags(capabilities: &str) -> Result<Vec<String>, String> {
    let mut numbers = Vec::new();
    for capability in capabilities.split([',', ';', ' ']).filter(|c| !c.is_empty()) {
        let digits = capability.trim_start_matches("sm_").replace('.', "");
        let number: u32 = digits.trim_end_matches('a').parse().map_err(|_| {
            format!("CUDA_COMPUTE_CAP: `{capability}` is not a compute capability\nhint: CUDA_COMPUTE_CAP=90 for an H100, 89 for an RTX 4090, 80 for an A100")
        })?;
        if number < 80 {
            return Err(format!(
                "CUDA_COMPUTE_CAP: {number} is not supported, bf16 needs 80 (Ampere) or later\nhint: leave out `--features cuda`"
            ));
        }
        numbers.push(number);
    }
    numbers.sort_unstable();
    numbers.dedup();
    let newest =
        *numbers.last().ok_or("CUDA_COMPUTE_CAP is empty\nhint: unset it, or set it to your card's, such as 90")?;
    let mut flags: Vec<_> = numbers.iter().map(|n| format!("-gencode=arch=compute_{n},code=sm_{n}")).collect();
    flags.push(format!("-gencode=arch=compute_{newest},code=compute_{newest}"));
    Ok(flags)
}

fn compile(nvcc: &Path, code: &[String], source: &Path, out: &Path) -> Result<(), String> {
    let target = out.join(source.with_extension("fatbin").file_name().unwrap_or_default());
    let output = Command::new(nvcc)
        .args(["-fatbin", "-O3", "-std=c++17", "-Xfatbin=-compress-all"])
        .args(code)
        .arg("-o")
        .arg(&target)
        .arg(source)
        .output()
        .map_err(|e| format!("cannot run `{}`: {e}", nvcc.display()))?;
    if output.status.success() {
        return Ok(());
    }
    Err(format!("nvcc failed on `{}`:\n{}", source.display(), String::from_utf8_lossy(&output.stderr).trim()))
}
