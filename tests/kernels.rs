//! The 4-bit format against bitsandbytes' own files, and the CUDA kernels run on the processor.

// Why a test was skipped, and how much was compared, is all that it can say.
#![allow(clippy::print_stdout, clippy::print_stderr, clippy::unwrap_used)]

use litgpt::ops::nf4::{Absmax, Kind4, Quantized, nested_code};
use safetensors::{Dtype, SafeTensors};
use std::path::{Path, PathBuf};
use std::process::Command;

/// The golden files: `LITGPT_GOLDEN`, or `../shared/golden` beside the repository.
fn golden(folder: &str) -> Option<PathBuf> {
    let root = std::env::var_os("LITGPT_GOLDEN")
        .map_or_else(|| Path::new(env!("CARGO_MANIFEST_DIR")).join("../shared/golden"), PathBuf::from);
    let path = root.join(folder);
    if path.is_dir() {
        return Some(path);
    }
    eprintln!("skipped: no golden files at `{}` (set LITGPT_GOLDEN)", path.display());
    None
}

fn floats(file: &SafeTensors<'_>, name: &str) -> Vec<f32> {
    let tensor = file.tensor(name).unwrap();
    let halves = || tensor.data().as_chunks::<2>().0.iter().map(|b| u16::from_le_bytes(*b));
    match tensor.dtype() {
        Dtype::F32 => tensor.data().as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b)).collect(),
        Dtype::BF16 => halves().map(|b| half::bf16::from_bits(b).to_f32()).collect(),
        Dtype::F16 => halves().map(|b| half::f16::from_bits(b).to_f32()).collect(),
        other => panic!("{name} is {other:?}"),
    }
}

fn bytes(file: &SafeTensors<'_>, name: &str) -> Vec<u8> {
    file.tensor(name).unwrap().data().to_vec()
}

/// Rounded to the type of the file's input, as the caller of `dequantize_into` does.
fn rounded(values: &[f32], dtype: Dtype) -> Vec<f32> {
    let round = |v: &f32| match dtype {
        Dtype::BF16 => half::bf16::from_f32(*v).to_f32(),
        Dtype::F16 => half::f16::from_f32(*v).to_f32(),
        _ => *v,
    };
    values.iter().map(round).collect()
}

/// Fails with the first element whose bits differ. The two zeros are equal: FP4 has a code for each.
fn assert_same(case: &str, what: &str, got: &[f32], want: &[f32], tiny: &dyn Fn(usize) -> bool) {
    assert_eq!(got.len(), want.len(), "{case} {what}");
    for (i, (g, w)) in got.iter().zip(want).enumerate() {
        let same = g.to_bits() == w.to_bits() || (*g == 0.0 && *w == 0.0) || (tiny(i) && (g - w).abs() <= 1e-38);
        assert!(same, "{case} {what}[{i}]: got {g:e}, expected {w:e}");
    }
}

/// One file: our bytes are bitsandbytes' bytes, and its bytes decode to its values.
fn check_nf4(path: &Path) {
    let case = path.file_stem().unwrap().to_string_lossy().into_owned();
    let content = std::fs::read(path).unwrap();
    let file = SafeTensors::deserialize(&content).unwrap();
    let input = file.tensor("input").unwrap();
    let (rows, cols, dtype) = (input.shape()[0], input.shape()[1], input.dtype());
    let values = floats(&file, "input");
    // What the file is says its code book: NF4's begins at -1, FP4's at 0.
    let kind = if floats(&file, "code")[0] == -1.0 { Kind4::Nf4 } else { Kind4::Fp4 };
    assert_eq!(kind.levels().as_slice(), floats(&file, "code"), "{case} code");
    let double = file.names().contains(&"absmax_q");
    // A block of denormals alone has more than one right answer, see the golden README.
    let block_of = |i: usize| &values[i / 64 * 64..(i / 64 * 64 + 64).min(values.len())];
    let tiny = |i: usize| block_of(i).iter().all(|v| v.abs() < f32::MIN_POSITIVE);

    let ours = Quantized::quantize(&values, rows, cols, kind, double).unwrap();
    let packed = bytes(&file, "packed");
    assert_eq!(ours.packed.len(), packed.len(), "{case} packed");
    for (i, (&got, &want)) in ours.packed.iter().zip(&packed).enumerate().filter(|(i, _)| !tiny(i * 2)) {
        for (got, want) in [(got >> 4, want >> 4), (got & 15, want & 15)] {
            let level = |code: u8| kind.levels()[usize::from(code)];
            assert!(
                got == want || (kind == Kind4::Fp4 && level(got) == level(want)),
                "{case} packed[{i}]: {got} is not {want}"
            );
        }
    }
    let theirs = if double {
        assert_eq!(nested_code().as_slice(), floats(&file, "nested_code"), "{case} nested code");
        let theirs = Absmax::Double {
            codes: bytes(&file, "absmax_q"),
            nested_absmax: floats(&file, "nested_absmax"),
            offset: floats(&file, "offset")[0],
        };
        assert_eq!(ours.absmax, theirs, "{case} double quantization");
        theirs
    } else {
        Absmax::Plain(floats(&file, "absmax"))
    };
    let restored: Vec<f32> = (0..theirs.len()).map(|i| theirs.get(i)).collect();
    assert_same(&case, "absmax", &restored, &floats(&file, "absmax"), &|_| false);

    let want = floats(&file, "dequant");
    let theirs = Quantized::from_parts(kind, packed, theirs, rows, cols).unwrap();
    for (whose, quantized) in [("our", &ours), ("their", &theirs)] {
        let mut out = vec![f32::NAN; rows * cols];
        quantized.dequantize_into(&mut out).unwrap();
        assert_same(&case, &format!("dequantized from {whose} bytes"), &rounded(&out, dtype), &want, &tiny);
        let (first, n) = (rows / 3, rows / 2);
        let mut part = vec![f32::NAN; n * cols];
        quantized.dequantize_rows(first, n, &mut part).unwrap();
        assert_eq!(part, out[first * cols..(first + n) * cols], "{case} rows");
    }
}

#[test]
fn nf4_equals_bitsandbytes() {
    let Some(folder) = golden("nf4") else { return };
    let mut cases: Vec<_> = std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()).collect();
    cases.retain(|path| path.extension().is_some_and(|e| e == "safetensors"));
    cases.sort();
    assert!(!cases.is_empty());
    cases.iter().for_each(|path| check_nf4(path));
}

/// `$CXX`, or the first of the usual names that runs.
pub fn cpp_compiler() -> Option<String> {
    let named = std::env::var("CXX").ok().filter(|name| !name.is_empty());
    let names = named.into_iter().chain(["c++", "g++", "clang++"].map(str::to_owned));
    names.into_iter().find(|name| Command::new(name).arg("--version").output().is_ok_and(|o| o.status.success()))
}

/// Compiles `kernels/emulate/tests.cpp`, which includes every kernel, and runs it; its lines name what failed.
#[test]
fn kernels_on_the_processor() {
    if !cfg!(unix) {
        eprintln!("skipped: the emulation needs ucontext.h");
        return;
    }
    let Some(compiler) = cpp_compiler() else {
        eprintln!("skipped: no C++ compiler (install g++ or set CXX)");
        return;
    };
    let folder = tempfile::tempdir().unwrap();
    let binary = folder.path().join("kernels");
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("kernels/emulate/tests.cpp");
    // Products and sums are rounded apart, as the kernels ask of nvcc. A fortified longjmp refuses to change fibers.
    let flags = ["-std=c++17", "-O1", "-ffp-contract=off", "-U_FORTIFY_SOURCE", "-DEMULATE", "-o"];
    let compiled = Command::new(&compiler).args(flags).arg(&binary).arg(&source).output().unwrap();
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    assert!(compiled.status.success(), "{compiler}: {}", text(&compiled.stderr));
    let run = Command::new(&binary).output().unwrap();
    assert!(run.status.success(), "{}\n{}{}", run.status, text(&run.stdout), text(&run.stderr));
    println!("{}", text(&run.stdout).trim());
}
