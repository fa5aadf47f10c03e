//! CUDA through cudarc, whose libraries are looked for when they are first needed: the same binary runs where there is no
//! driver. (candle's own CUDA feature links them, and compiles kernels for eight minutes that nothing here calls.)
//!
//! One stream and no events. Memory comes from the driver's pool, which keeps what is freed, so that a step after the
//! first of its length asks the system for nothing.
#![allow(unsafe_code)] // the driver and cuBLAS take raw pointers

use super::{Arg, Backend, Dtype, Failure, Launch, Operand, Product, Refusal};
use cudarc::cublas::{CudaBlas, result as cublas, sys as blas_sys};
use cudarc::driver::{CudaContext, CudaStream, DriverError, result, sys};
use libloading::Library;
use std::collections::HashMap;
use std::ffi::{CString, OsStr, c_int, c_void};
use std::mem::ManuallyDrop;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, OnceLock, PoisonError, RwLock};

/// Bytes at an address that the driver may read words from, which those of `include_bytes` alone need not be.
#[repr(C, align(16))]
struct Aligned<B: ?Sized>(B);

/// A kernel file compiled by `kernels/build.rs`.
macro_rules! module {
    ($name:literal) => {{
        const IMAGE: &Aligned<[u8]> = &Aligned(*include_bytes!(concat!(env!("OUT_DIR"), "/", $name, ".fatbin")));
        &IMAGE.0
    }};
}

const MODULES: [&[u8]; 14] = [
    module!("attention"),
    module!("attention_mma"),
    module!("clip"),
    module!("glu"),
    module!("head"),
    module!("lora"),
    module!("lora_mma"),
    module!("nf4"),
    module!("nf4_product"),
    module!("norm"),
    module!("optimizer"),
    module!("quantized"),
    module!("rope"),
    module!("rows"),
];

/// Dynamic shared memory that a kernel may have without asking: of 48 KB, which its static one counts into.
const SHARED_WITHOUT_ASKING: usize = 32 << 10;
/// Up to this size bytes are copied and kept while the device reads them, rather than waited for.
const KEPT_ALIVE: usize = 64 << 10;
/// Scratch of cuBLAS: what NVIDIA advises for Hopper. One of our own keeps its results the same from run to run.
const WORKSPACE: usize = 32 << 20;

/// A kernel, and the shared memory that it was told it may have.
#[derive(Clone, Copy)]
struct Function {
    handle: sys::CUfunction,
    shared: usize,
}

/// One CUDA device.
pub struct Cuda {
    name: String,
    context: Arc<CudaContext>,
    stream: Arc<CudaStream>,
    /// Whether the device reads the host's pageable memory itself (HMM, Grace), so that a copy may still be doing it later.
    reads_host: bool,
    processors: usize,
    modules: Vec<sys::CUmodule>,
    functions: RwLock<HashMap<String, Function>>,
    /// Behind a lock, as a handle is not to be used by two threads at once. Never dropped: cudarc would panic where the device
    /// has failed.
    blas: Mutex<ManuallyDrop<CudaBlas>>,
    /// Bytes that the device may still be reading.
    in_flight: Mutex<Vec<Box<[u8]>>>,
}

// SAFETY: the raw handles are the driver's, whose calls may come from any thread once the context is bound to it, which
// every method does first; the cuBLAS handle is used under a lock.
unsafe impl Send for Cuda {}
// SAFETY: as above; `functions` is behind a lock.
unsafe impl Sync for Cuda {}

fn text(error: DriverError) -> String {
    let name = error.error_name().map_or_else(|_| format!("{error:?}"), |name| name.to_string_lossy().into_owned());
    error.error_string().map_or(name.clone(), |what| format!("{} ({name})", what.to_string_lossy()))
}

/// The same as a refusal.
fn refusal(error: DriverError) -> Refusal {
    if error.0 == sys::CUresult::CUDA_ERROR_OUT_OF_MEMORY { Refusal::Memory } else { Refusal::Other(text(error)) }
}

fn blas_refusal(error: cublas::CublasError) -> Refusal {
    match error.0 {
        blas_sys::cublasStatus_t::CUBLAS_STATUS_ALLOC_FAILED => Refusal::Memory,
        status => Refusal::Other(format!("cuBLAS: {status:?}")),
    }
}

impl Cuda {
    /// The device of this number, or `None` where the machine has no driver or no such device.
    ///
    /// # Errors
    /// When it is there and cannot be used.
    pub fn open(ordinal: usize) -> Result<Option<Self>, Failure> {
        let failure = |what: &str, reason: String| Failure::Other {
            device: format!("CUDA device {ordinal}"),
            what: what.to_owned(),
            reason,
        };
        let open = |what: &'static str| move |e: DriverError| failure(what, text(e));
        if !has_device(ordinal).map_err(open("starting the driver"))? {
            return Ok(None);
        }
        if !finds_blas() {
            return Err(failure("loading cuBLAS", NO_BLAS.to_owned()));
        }
        let context = CudaContext::new(ordinal).map_err(open("opening it"))?;
        // Before cuBLAS, which tells less of a driver that is too old.
        let modules = load_kernels(&context).map_err(|reason| failure("loading the kernels", reason))?;
        let stream = context.new_stream().map_err(open("making a stream"))?;
        let blas = CudaBlas::new(stream.clone()).map_err(|e| failure("starting cuBLAS", format!("{e:?}")))?;
        let name = context.name().map_err(|e| failure("asking for its name", text(e)))?;
        let asked = |attribute| context.attribute(attribute).map_err(open("asking what it can do"));
        let reads_host = asked(sys::CUdevice_attribute_enum::CU_DEVICE_ATTRIBUTE_PAGEABLE_MEMORY_ACCESS)? != 0;
        let processors = asked(sys::CUdevice_attribute_enum::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)?;
        let processors = usize::try_from(processors).unwrap_or(1);
        let (functions, blas) = (RwLock::default(), Mutex::new(ManuallyDrop::new(blas)));
        let cuda = Self {
            name,
            context,
            stream,
            reads_host,
            processors,
            modules,
            functions,
            blas,
            in_flight: Mutex::default(),
        };
        cuda.prepare().map_err(|reason| failure("preparing it", reason))?;
        Ok(Some(cuda))
    }

    fn bind(&self) -> Result<(), String> {
        self.context.bind_to_thread().map_err(text)
    }

    /// Waits for all work so far.
    fn wait(&self) -> Result<(), String> {
        let read = std::mem::take(&mut *self.in_flight.lock().unwrap_or_else(PoisonError::into_inner));
        // SAFETY: the stream lives as long as `self`.
        let waited = unsafe { result::stream::synchronize(self.stream.cu_stream()) };
        drop(read);
        waited.map_err(text)
    }

    /// Does `work`, and where there is no memory for it, as for a kernel that is loaded when it is first used, does it again
    /// without what the pool keeps.
    fn with_room<T>(&self, mut work: impl FnMut() -> Result<T, Refusal>) -> Result<T, Refusal> {
        match work() {
            Err(Refusal::Memory) => {}
            done => return done,
        }
        self.wait()?;
        // SAFETY: the context is bound; what is in use stays.
        unsafe {
            let pool = result::device::get_default_mem_pool(self.context.cu_device()).map_err(text)?;
            result::mem_pool::trim_to(pool, 0).map_err(text)?;
        }
        work()
    }

    /// Keeps freed memory in the pool, gives cuBLAS its scratch and has it sum in f32 alone.
    fn prepare(&self) -> Result<(), String> {
        self.bind()?;
        let mut all = u64::MAX;
        // SAFETY: the context is bound; the attribute's value is a u64, which the call reads before it returns.
        unsafe {
            let pool = result::device::get_default_mem_pool(self.context.cu_device()).map_err(text)?;
            let attribute = sys::CUmemPool_attribute_enum::CU_MEMPOOL_ATTR_RELEASE_THRESHOLD;
            result::mem_pool::set_attribute(pool, attribute, (&raw mut all).cast()).map_err(text)?;
            let workspace = result::malloc_async(self.stream.cu_stream(), WORKSPACE).map_err(text)?;
            let handle = *self.blas.lock().unwrap_or_else(PoisonError::into_inner).handle();
            let status = blas_sys::cublasSetWorkspace_v2(handle, workspace as *mut c_void, WORKSPACE);
            status.result().map_err(|e| format!("{e:?}"))?;
            let mode = blas_sys::cublasMath_t::CUBLAS_MATH_DISALLOW_REDUCED_PRECISION_REDUCTION;
            blas_sys::cublasSetMathMode(handle, mode).result().map_err(|e| format!("{e:?}"))
        }
    }

    fn function(&self, name: &str, shared: usize) -> Result<sys::CUfunction, Refusal> {
        let known = self.functions.read().unwrap_or_else(PoisonError::into_inner).get(name).copied();
        if let Some(function) = known.filter(|function| function.shared >= shared) {
            return Ok(function.handle);
        }
        let c_name = CString::new(name).map_err(|e| e.to_string())?;
        // SAFETY: the modules were loaded and are never unloaded.
        let find = |module: &sys::CUmodule| match unsafe { result::module::get_function(*module, c_name.clone()) } {
            Err(DriverError(sys::CUresult::CUDA_ERROR_NOT_FOUND)) => None,
            found => Some(found.map_err(refusal)),
        };
        let handle = self.modules.iter().find_map(find).ok_or_else(|| "there is no such kernel".to_owned())??;
        let shared = shared.max(SHARED_WITHOUT_ASKING);
        if shared > SHARED_WITHOUT_ASKING {
            let attribute = sys::CUfunction_attribute_enum::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
            // SAFETY: the handle was just found.
            unsafe { result::function::set_function_attribute(handle, attribute, shared as i32) }.map_err(refusal)?;
        }
        let mut functions = self.functions.write().unwrap_or_else(PoisonError::into_inner);
        functions.insert(name.to_owned(), Function { handle, shared });
        Ok(handle)
    }
}

impl Drop for Cuda {
    fn drop(&mut self) {
        // The device may still be reading what is in flight; one that has failed reads nothing.
        if self.bind().is_ok() {
            let _ = self.wait();
        }
    }
}

fn load_kernels(context: &CudaContext) -> Result<Vec<sys::CUmodule>, String> {
    context.bind_to_thread().map_err(text)?;
    // SAFETY: the image is a whole fatbin, and lives as long as the program.
    let load = |image: &&[u8]| unsafe { result::module::load_data(image.as_ptr().cast()) };
    MODULES.iter().map(load).collect::<Result<_, _>>().map_err(|error| unloadable(context, error))
}

/// Why the kernels do not load: the driver is older than the toolkit that built them, or they are not for this card.
fn unloadable(context: &CudaContext, error: DriverError) -> String {
    let mut version = 0;
    // SAFETY: writes one number, and leaves it where it fails.
    let _ = unsafe { sys::cuDriverGetVersion(&raw mut version) };
    let (major, minor) = context.compute_capability().unwrap_or_default();
    format!(
        "{}; the driver is for CUDA {}.{}, which must not be older than the toolkit of this build, and the card has compute \
         capability {major}.{minor}, which must be 8.0 or later and in the build's CUDA_COMPUTE_CAP",
        text(error),
        version / 1000,
        version % 1000 / 10
    )
}

/// Whether there is a driver and a device of this number. Without a driver cudarc panics at its first call, so the
/// library is looked for first. A driver that does not start is an error: a run on the processor would not be what was meant.
fn has_device(ordinal: usize) -> Result<bool, DriverError> {
    // SAFETY: asks the loader for the driver's library and calls nothing in it.
    if !unsafe { sys::is_culib_present() } {
        return Ok(false);
    }
    match CudaContext::device_count() {
        Ok(count) => Ok(usize::try_from(count).is_ok_and(|count| ordinal < count)),
        Err(DriverError(sys::CUresult::CUDA_ERROR_NO_DEVICE | sys::CUresult::CUDA_ERROR_STUB_LIBRARY)) => Ok(false),
        Err(error) => Err(error),
    }
}

const NO_BLAS: &str = "there is no libcublas on the library path, beside this program, in $CUDA_HOME, /usr/local/cuda or the \
                       active Python environment; the CUDA toolkit has it, and Python's package nvidia-cublas";

/// Whether the loader finds cuBLAS. What is not on its path is looked for where toolkits and Python's packages put it: a
/// library that was loaded by its path is found by its name from then on.
fn finds_blas() -> bool {
    // SAFETY: asks the loader for the library and calls nothing in it.
    let is_there = || unsafe { blas_sys::is_culib_present() };
    let named =
        |path: &PathBuf| path.file_name().and_then(OsStr::to_str).is_some_and(|name| name.starts_with("libcublas.so"));
    is_there()
        || blas_folders().iter().flat_map(|folder| entries(folder)).filter(named).any(|path| {
            // SAFETY: NVIDIA's library does nothing but set itself up when it is loaded. It stays loaded then.
            let library = unsafe { Library::new(path) };
            // One of another version than the build's is let go.
            is_there() && library.map(std::mem::forget).is_ok()
        })
}

fn blas_folders() -> Vec<PathBuf> {
    let named = |name: &str| std::env::var_os(name).map(PathBuf::from);
    let program = std::env::current_exe().ok().and_then(|path| path.parent().map(Path::to_owned));
    let toolkits = ["CUDA_HOME", "CUDA_PATH"].into_iter().filter_map(named);
    let toolkits = toolkits.chain(["/usr/local/cuda", "/opt/cuda"].map(PathBuf::from)).map(|home| home.join("lib64"));
    let python = ["VIRTUAL_ENV", "CONDA_PREFIX"].into_iter().filter_map(named).map(|home| home.join("lib"));
    // lib/python3.12/site-packages/nvidia/cublas/lib
    let packages = python.clone().flat_map(|lib| entries(&lib)).map(|python| python.join("site-packages/nvidia"));
    let packages = packages.flat_map(|nvidia| entries(&nvidia)).map(|package| package.join("lib"));
    program.into_iter().chain(toolkits).chain(python).chain(packages).collect()
}

/// What is in a folder; nothing where there is none.
fn entries(folder: &Path) -> Vec<PathBuf> {
    let paths = std::fs::read_dir(folder).into_iter().flatten().flatten().map(|entry| entry.path());
    let mut paths: Vec<PathBuf> = paths.collect();
    paths.sort();
    paths
}

fn data_type(dtype: Dtype) -> blas_sys::cudaDataType {
    match dtype {
        Dtype::F32 => blas_sys::cudaDataType_t::CUDA_R_32F,
        Dtype::Bf16 => blas_sys::cudaDataType_t::CUDA_R_16BF,
        Dtype::F16 => blas_sys::cudaDataType_t::CUDA_R_16F,
    }
}

fn transposition(operand: &Operand) -> blas_sys::cublasOperation_t {
    if operand.transposed { blas_sys::cublasOperation_t::CUBLAS_OP_T } else { blas_sys::cublasOperation_t::CUBLAS_OP_N }
}

impl Backend for Cuda {
    fn name(&self) -> &str {
        &self.name
    }

    fn allocate(&self, bytes: usize) -> Result<u64, Refusal> {
        self.bind()?;
        // SAFETY: all uses of the memory are on this one stream.
        self.with_room(|| unsafe { result::malloc_async(self.stream.cu_stream(), bytes) }.map_err(refusal))
    }

    fn free(&self, pointer: u64) {
        // A device that is gone has no memory to give back.
        if self.bind().is_ok() {
            // SAFETY: the pointer came from `allocate`, and later work cannot name it.
            let _ = unsafe { result::free_async(pointer, self.stream.cu_stream()) };
        }
    }

    fn upload(&self, from: &[u8], to: u64) -> Result<(), Refusal> {
        self.bind()?;
        let stream = self.stream.cu_stream();
        if self.reads_host && from.len() <= KEPT_ALIVE {
            let kept: Box<[u8]> = from.into();
            // SAFETY: `to` has room; the copy of the bytes lives until the stream was waited for.
            unsafe { result::memcpy_htod_async(to, &kept, stream) }.map_err(refusal)?;
            self.in_flight.lock().unwrap_or_else(PoisonError::into_inner).push(kept);
            return Ok(());
        }
        // SAFETY: `to` has room. Pageable memory is staged before the call returns, or, where the device reads it itself,
        // waited for before the borrow ends.
        unsafe { result::memcpy_htod_async(to, from, stream) }.map_err(refusal)?;
        if self.reads_host { Ok(self.wait()?) } else { Ok(()) }
    }

    fn download(&self, from: u64, to: &mut [u8]) -> Result<(), Refusal> {
        self.bind()?;
        // SAFETY: `from` has that many bytes; the stream is waited for before the borrow ends.
        unsafe { result::memcpy_dtoh_async(to, from, self.stream.cu_stream()) }.map_err(refusal)?;
        Ok(self.wait()?)
    }

    fn copy(&self, from: u64, to: u64, bytes: usize) -> Result<(), Refusal> {
        self.bind()?;
        // SAFETY: both have that many bytes, as the caller checked.
        unsafe { result::memcpy_dtod_async(to, from, bytes, self.stream.cu_stream()) }.map_err(refusal)
    }

    fn zero(&self, at: u64, bytes: usize) -> Result<(), Refusal> {
        self.bind()?;
        // SAFETY: `at` has that many bytes.
        unsafe { result::memset_d8_async(at, 0, bytes, self.stream.cu_stream()) }.map_err(refusal)
    }

    fn launch(&self, launch: &Launch<'_>) -> Result<(), Refusal> {
        self.bind()?;
        let function = self.with_room(|| self.function(launch.kernel, launch.shared))?;
        let mut args = launch.args.to_vec();
        let pointer = |arg: &mut Arg| -> *mut c_void {
            match arg {
                Arg::Wide(value) => std::ptr::from_mut(value).cast(),
                Arg::Narrow(value) => std::ptr::from_mut(value).cast(),
            }
        };
        let mut pointers: Vec<*mut c_void> = args.iter_mut().map(pointer).collect();
        let [x, y, z] = launch.grid;
        let [width, height] = launch.block;
        let shared = launch.shared as u32;
        let stream = self.stream.cu_stream();
        self.with_room(|| {
            // SAFETY: number and sizes of the arguments are the kernel's, which the emulated device checks for every launch
            // of the tests; the driver copies them before it returns.
            let launched = unsafe {
                result::launch_kernel(function, (x, y, z), (width, height, 1), shared, stream, &mut pointers)
            };
            launched.map_err(refusal)
        })?;
        if waits() { Ok(self.wait()?) } else { Ok(()) }
    }

    fn product(&self, product: &Product) -> Result<(), Refusal> {
        self.bind()?;
        let Product { m, n, k, alpha, accumulate, out, lhs, rhs } = *product;
        let beta = if accumulate { 1f32 } else { 0f32 };
        let size = |n: usize| c_int::try_from(n).map_err(|_| format!("a size of {n} is too large"));
        let compute = if lhs.dtype == Dtype::F32 && !exact() {
            blas_sys::cublasComputeType_t::CUBLAS_COMPUTE_32F_FAST_TF32
        } else {
            blas_sys::cublasComputeType_t::CUBLAS_COMPUTE_32F
        };
        let blas = self.blas.lock().unwrap_or_else(PoisonError::into_inner);
        let sizes = [size(n)?, size(m)?, size(k)?];
        let strides = [size(rhs.stride)?, size(lhs.stride)?, size(out.stride)?];
        // cuBLAS sees row-major matrices as their transposes: outᵀ = rhsᵀ lhsᵀ.
        // SAFETY: the operands' rows and strides lie within their buffers, as their views were made; alpha and beta
        // are read before the call returns.
        let product = || unsafe {
            cublas::gemm_ex(
                *blas.handle(),
                transposition(&rhs),
                transposition(&lhs),
                sizes[0],
                sizes[1],
                sizes[2],
                (&raw const alpha).cast(),
                rhs.pointer as *const c_void,
                data_type(rhs.dtype),
                strides[0],
                lhs.pointer as *const c_void,
                data_type(lhs.dtype),
                strides[1],
                (&raw const beta).cast(),
                out.pointer as *mut c_void,
                data_type(out.dtype),
                strides[2],
                compute,
                blas_sys::cublasGemmAlgo_t::CUBLAS_GEMM_DEFAULT,
            )
        };
        self.with_room(|| product().map_err(blas_refusal))?;
        if waits() { Ok(self.wait()?) } else { Ok(()) }
    }

    fn memory(&self) -> Result<(usize, usize), String> {
        self.bind()?;
        result::mem_get_info().map_err(text)
    }

    fn processors(&self) -> usize {
        self.processors
    }
}

/// Whether f32 products are to be f32 throughout (`LITGPT_TF32=0`), not rounded to TF32 first.
fn exact() -> bool {
    static EXACT: OnceLock<bool> = OnceLock::new();
    *EXACT.get_or_init(|| std::env::var_os("LITGPT_TF32").is_some_and(|value| value == "0"))
}

/// Whether each launch is waited for (`LITGPT_CUDA_SYNC=1`), so that a fault is reported with the kernel that it is of.
fn waits() -> bool {
    static WAITS: OnceLock<bool> = OnceLock::new();
    *WAITS.get_or_init(|| std::env::var_os("LITGPT_CUDA_SYNC").is_some_and(|value| value == "1"))
}
