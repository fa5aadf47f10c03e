//! A device for the tests: the CUDA kernels compiled for the processor and launched by name, products by plain loops. On
//! it the whole model runs through the launches of a GPU, and each launch's arguments are checked.
#![allow(unsafe_code)] // calls into the library that it compiles

use litgpt::ops::device::{Arg, Backend, Device, Dtype, Launch, Operand, Product, Refusal};
use std::alloc::Layout;
use std::collections::HashMap;
use std::ffi::{CString, c_char, c_int, c_void};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{LazyLock, Mutex};

type LaunchFn =
    unsafe extern "C" fn(*const c_char, *const u32, *const u32, usize, *mut *mut c_void, *const u8, usize) -> c_int;

/// The device, or `None` (said on stdout) where there is no C++ compiler. `LITGPT_TEST_DEVICE=cuda` takes a real one.
pub fn device() -> Option<Device> {
    if is_real() {
        return Some(Device::cuda(0).unwrap().expect("a CUDA device, and a build with it"));
    }
    static LIBRARY: LazyLock<Option<libloading::Library>> = LazyLock::new(|| {
        let (_folder, path) = library("device.cpp", "kernels.so")?;
        // SAFETY: the library has no initializers but its own tables.
        Some(unsafe { libloading::Library::new(path) }.unwrap())
    });
    let library = LIBRARY.as_ref()?;
    // SAFETY: the symbol is of that type, as kernels/emulate/device.cpp defines it.
    let launch = unsafe { *library.get::<LaunchFn>(b"emulate_launch").unwrap() };
    Some(Device::new(Box::new(Emulated { launch, sizes: Mutex::default() })))
}

/// Whether the tests run on a GPU.
pub fn is_real() -> bool {
    std::env::var_os("LITGPT_TEST_DEVICE").is_some_and(|name| name == "cuda")
}

/// A file of `kernels/emulate` as a library, in a folder of its own; `None` (said on stdout) where there is no C++ compiler.
pub fn library(source: &str, name: &str) -> Option<(tempfile::TempDir, PathBuf)> {
    let Some(compiler) = crate::kernels::cpp_compiler().filter(|_| cfg!(unix)) else {
        println!("skipped: no C++ compiler for the emulated device (install g++ or set CXX)");
        return None;
    };
    let folder = tempfile::tempdir().unwrap();
    let library = folder.path().join(name);
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("kernels/emulate").join(source);
    let flags = ["-std=c++17", "-O2", "-fPIC", "-shared", "-ffp-contract=off", "-U_FORTIFY_SOURCE", "-DEMULATE", "-o"];
    let compiled = Command::new(&compiler).args(flags).arg(&library).arg(&source).output().unwrap();
    assert!(compiled.status.success(), "{compiler}: {}", String::from_utf8_lossy(&compiled.stderr));
    Some((folder, library))
}

/// Only one kernel runs at a time: the emulation keeps its block in globals.
static RUNNING: Mutex<()> = Mutex::new(());

struct Emulated {
    launch: LaunchFn,
    sizes: Mutex<HashMap<u64, usize>>,
}

fn layout(bytes: usize) -> Layout {
    Layout::from_size_align(bytes, 256).unwrap()
}

fn element(operand: &Operand, row: usize, col: usize) -> f32 {
    let (row, col) = if operand.transposed { (col, row) } else { (row, col) };
    let at = operand.pointer + ((row * operand.stride + col) * operand.dtype.size()) as u64;
    // SAFETY: the operand's rectangle lies in an allocation of its type.
    unsafe {
        match operand.dtype {
            Dtype::F32 => *(at as *const f32),
            Dtype::Bf16 => (*(at as *const half::bf16)).to_f32(),
            Dtype::F16 => (*(at as *const half::f16)).to_f32(),
        }
    }
}

impl Backend for Emulated {
    fn name(&self) -> &str {
        "emulated device"
    }

    fn allocate(&self, bytes: usize) -> Result<u64, Refusal> {
        // SAFETY: no allocation is empty. What is never written is NaN in every type.
        let pointer = unsafe {
            let pointer = std::alloc::alloc(layout(bytes));
            pointer.write_bytes(0xff, bytes);
            pointer as u64
        };
        self.sizes.lock().unwrap().insert(pointer, bytes);
        Ok(pointer)
    }

    fn free(&self, pointer: u64) {
        let bytes = self.sizes.lock().unwrap().remove(&pointer).expect("an allocation is freed once");
        // SAFETY: it came from `allocate` with this size.
        unsafe { std::alloc::dealloc(pointer as *mut u8, layout(bytes)) };
    }

    fn upload(&self, from: &[u8], to: u64) -> Result<(), Refusal> {
        // SAFETY: `to` has room for `from`.
        unsafe { std::ptr::copy_nonoverlapping(from.as_ptr(), to as *mut u8, from.len()) };
        Ok(())
    }

    fn download(&self, from: u64, to: &mut [u8]) -> Result<(), Refusal> {
        // SAFETY: `from` has that many bytes.
        unsafe { std::ptr::copy_nonoverlapping(from as *const u8, to.as_mut_ptr(), to.len()) };
        Ok(())
    }

    fn copy(&self, from: u64, to: u64, bytes: usize) -> Result<(), Refusal> {
        // SAFETY: both have that many bytes.
        unsafe { std::ptr::copy_nonoverlapping(from as *const u8, to as *mut u8, bytes) };
        Ok(())
    }

    fn zero(&self, at: u64, bytes: usize) -> Result<(), Refusal> {
        // SAFETY: `at` has that many bytes.
        unsafe { (at as *mut u8).write_bytes(0, bytes) };
        Ok(())
    }

    fn launch(&self, launch: &Launch<'_>) -> Result<(), Refusal> {
        let name = CString::new(launch.kernel).unwrap();
        let mut args = launch.args.to_vec();
        let sizes: Vec<u8> = args.iter().map(|a| if matches!(a, Arg::Wide(_)) { 8 } else { 4 }).collect();
        let mut pointers: Vec<*mut c_void> = args
            .iter_mut()
            .map(|arg| match arg {
                Arg::Wide(value) => std::ptr::from_mut(value).cast(),
                Arg::Narrow(value) => std::ptr::from_mut(value).cast(),
            })
            .collect();
        let _alone = RUNNING.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        let (grid, block) = (launch.grid.as_ptr(), launch.block.as_ptr());
        let (count, shared) = (args.len(), launch.shared);
        // SAFETY: the library checks the arguments' number and sizes; pointers among them are to live allocations.
        match unsafe { (self.launch)(name.as_ptr(), grid, block, shared, pointers.as_mut_ptr(), sizes.as_ptr(), count) }
        {
            0 => Ok(()),
            1 => panic!("there is no kernel {}", launch.kernel),
            _ => panic!("{} does not take arguments of {sizes:?} bytes", launch.kernel),
        }
    }

    fn product(&self, product: &Product) -> Result<(), Refusal> {
        let Product { m, n, k, alpha, accumulate, out, lhs, rhs } = *product;
        assert_eq!(lhs.dtype, rhs.dtype, "cuBLAS takes two sides of one type");
        for row in 0..m {
            for col in 0..n {
                let mut sum = 0f32;
                for i in 0..k {
                    sum += element(&lhs, row, i) * element(&rhs, i, col);
                }
                let before = if accumulate { element(&out, row, col) } else { 0.0 };
                let value = before + alpha * sum;
                let at = out.pointer + ((row * out.stride + col) * out.dtype.size()) as u64;
                // SAFETY: the output's rectangle lies in an allocation of its type.
                unsafe {
                    match out.dtype {
                        Dtype::F32 => *(at as *mut f32) = value,
                        Dtype::Bf16 => *(at as *mut half::bf16) = half::bf16::from_f32(value),
                        Dtype::F16 => *(at as *mut half::f16) = half::f16::from_f32(value),
                    }
                }
            }
        }
        Ok(())
    }

    fn memory(&self) -> Result<(usize, usize), String> {
        Ok((1 << 30, 1 << 30))
    }

    fn processors(&self) -> usize {
        4
    }
}
