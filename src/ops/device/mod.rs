//! Memory of an accelerator and work on it: buffers, kernel launches, dense products. The ops decide what to launch.
//!
//! A [`Backend`] is the little that a device must do: `cuda` with the feature of that name, and in the tests an emulation
//! that runs the same kernel sources on the processor. There is one queue of work: what is launched later sees the
//! results of what was launched before, and only a download waits.
//!
//! The first failure (no memory left, the device gone) is kept, and everything after it does nothing, as in CUDA itself.
//! So ops return no `Result`; who reads a result asks [`Device::check`] first.

mod buffer;
#[cfg(feature = "cuda")]
mod cuda;

pub use buffer::{Buffer, Constant};

use std::collections::HashMap;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

/// Why work on a device failed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Failure {
    /// Something did not fit.
    #[error("out of memory on {device}: no room for {what}; {free} of {total} bytes are free")]
    OutOfMemory {
        /// Name of the device.
        device: String,
        /// What was tried.
        what: String,
        /// Free bytes at that time.
        free: usize,
        /// Bytes of the device.
        total: usize,
    },
    /// Anything else.
    #[error("{device}: {what} failed: {reason}")]
    Other {
        /// Name of the device.
        device: String,
        /// What was tried.
        what: String,
        /// What the driver said.
        reason: String,
    },
}

/// Type of a matrix's elements on a device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Dtype {
    /// 32 bit.
    F32,
    /// bfloat16.
    Bf16,
    /// IEEE half.
    F16,
}

impl Dtype {
    /// Bytes of an element.
    #[must_use]
    pub fn size(self) -> usize {
        if self == Self::F32 { 4 } else { 2 }
    }

    /// The end of a kernel's name.
    #[must_use]
    pub fn suffix(self) -> &'static str {
        match self {
            Self::F32 => "f32",
            Self::Bf16 => "bf16",
            Self::F16 => "f16",
        }
    }
}

/// A value that a kernel takes: a pointer or 64-bit number, or a 32-bit number by its bits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Arg {
    /// 8 bytes.
    Wide(u64),
    /// 4 bytes.
    Narrow(u32),
}

impl From<u64> for Arg {
    fn from(value: u64) -> Self {
        Self::Wide(value)
    }
}

impl From<u32> for Arg {
    fn from(value: u32) -> Self {
        Self::Narrow(value)
    }
}

impl From<f32> for Arg {
    fn from(value: f32) -> Self {
        Self::Narrow(value.to_bits())
    }
}

impl From<&Buffer> for Arg {
    fn from(buffer: &Buffer) -> Self {
        Self::Wide(buffer.pointer)
    }
}

/// A C `int`.
///
/// # Panics
/// Beyond 2³¹ - 1.
#[must_use]
pub fn int(value: usize) -> Arg {
    Arg::Narrow(i32::try_from(value).expect("sizes of a pass fit a C int") as u32)
}

/// A C `long long`.
#[must_use]
pub fn long(value: usize) -> Arg {
    Arg::Wide(value as u64)
}

/// A C `int` that is 0 or 1.
#[must_use]
pub fn flag(value: bool) -> Arg {
    Arg::Narrow(u32::from(value))
}

/// Up to how many tokens the products of `op` are its own and not cuBLAS's: `estimate`, unless `LITGPT_FUSED_<op>` says otherwise.
#[must_use]
pub fn fused_tokens(op: &str, estimate: usize) -> usize {
    let said = std::env::var(format!("LITGPT_FUSED_{op}")).ok().and_then(|value| value.parse().ok());
    said.unwrap_or(estimate)
}

/// How many [`Device::counters`] there are.
pub const COUNTERS: usize = 1024;

/// One launch of a kernel of `kernels/*.cu`.
#[derive(Debug)]
pub struct Launch<'a> {
    /// Its name.
    pub kernel: &'a str,
    /// Blocks.
    pub grid: [u32; 3],
    /// Threads of a block.
    pub block: [u32; 2],
    /// Dynamic shared memory of a block, bytes.
    pub shared: usize,
    /// Its arguments, in order.
    pub args: &'a [Arg],
}

/// One side of a [`Product`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Operand {
    /// Address of the first element.
    pub pointer: u64,
    /// Elements from a row to the next, as stored.
    pub stride: usize,
    /// Type of the elements.
    pub dtype: Dtype,
    /// Whether the product reads it transposed.
    pub transposed: bool,
}

/// `out = alpha · lhs · rhs`, added to `out` where `accumulate`; row-major, with f32 sums.
#[derive(Debug, Clone, Copy)]
pub struct Product {
    /// Rows of `out`.
    pub m: usize,
    /// Columns of `out`.
    pub n: usize,
    /// Columns of `lhs` and rows of `rhs`, as the product sees them.
    pub k: usize,
    /// Factor.
    pub alpha: f32,
    /// Whether `out` keeps what it has.
    pub accumulate: bool,
    /// Result; never transposed.
    pub out: Operand,
    /// Left side.
    pub lhs: Operand,
    /// Right side, of the same type as `lhs`.
    pub rhs: Operand,
}

/// Why a device did not do what it was asked for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Refusal {
    /// It has no memory left.
    Memory,
    /// Anything else, in the driver's words.
    Other(String),
}

impl From<String> for Refusal {
    fn from(reason: String) -> Self {
        Self::Other(reason)
    }
}

/// What a device must do. Addresses are what `allocate` returned, or inside of it; work is done in order.
pub trait Backend: Send + Sync {
    /// Name for messages.
    fn name(&self) -> &str;
    /// `bytes` of memory, aligned to 256.
    ///
    /// # Errors
    /// A lack of it, or what the driver says.
    fn allocate(&self, bytes: usize) -> Result<u64, Refusal>;
    /// Gives memory back, once all work so far is done.
    fn free(&self, pointer: u64);
    /// Copies to the device.
    ///
    /// # Errors
    /// What the driver says.
    fn upload(&self, from: &[u8], to: u64) -> Result<(), Refusal>;
    /// Copies from the device, once all work so far is done.
    ///
    /// # Errors
    /// What the driver says, of this or of earlier work.
    fn download(&self, from: u64, to: &mut [u8]) -> Result<(), Refusal>;
    /// Copies within the device.
    ///
    /// # Errors
    /// What the driver says.
    fn copy(&self, from: u64, to: u64, bytes: usize) -> Result<(), Refusal>;
    /// Writes zeros.
    ///
    /// # Errors
    /// What the driver says.
    fn zero(&self, at: u64, bytes: usize) -> Result<(), Refusal>;
    /// Queues a kernel.
    ///
    /// # Errors
    /// An unknown kernel, a lack of memory for it, or what the driver says.
    fn launch(&self, launch: &Launch<'_>) -> Result<(), Refusal>;
    /// Queues a product.
    ///
    /// # Errors
    /// A lack of memory, or what the driver says.
    fn product(&self, product: &Product) -> Result<(), Refusal>;
    /// (free, all) bytes.
    ///
    /// # Errors
    /// What the driver says.
    fn memory(&self) -> Result<(usize, usize), String>;
    /// How many blocks of a kernel can run at a time, if one takes all that one processor has.
    fn processors(&self) -> usize;
}

struct Inner {
    backend: Box<dyn Backend>,
    failure: Mutex<Option<Failure>>,
    /// f32 numbers that kernels read from memory, by their bits.
    numbers: Mutex<HashMap<u32, u64>>,
    counters: OnceLock<u64>,
}

/// A device; clones are the same one.
#[derive(Clone)]
pub struct Device(Arc<Inner>);

impl std::fmt::Debug for Device {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.0.backend.name())
    }
}

impl PartialEq for Device {
    fn eq(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }
}

impl Device {
    /// A device of this backend.
    #[must_use]
    pub fn new(backend: Box<dyn Backend>) -> Self {
        Self(Arc::new(Inner {
            backend,
            failure: Mutex::default(),
            numbers: Mutex::default(),
            counters: OnceLock::new(),
        }))
    }

    /// The CUDA device of this number, or `None` where there is none or this build has no CUDA.
    ///
    /// # Errors
    /// When there is one and it cannot be used.
    #[cfg_attr(not(feature = "cuda"), allow(clippy::unnecessary_wraps))]
    pub fn cuda(ordinal: usize) -> Result<Option<Self>, Failure> {
        #[cfg(feature = "cuda")]
        return Ok(cuda::Cuda::open(ordinal)?.map(|backend| Self::new(Box::new(backend))));
        #[cfg(not(feature = "cuda"))]
        {
            let _ = ordinal;
            Ok(None)
        }
    }

    /// Name for messages.
    #[must_use]
    pub fn name(&self) -> &str {
        self.0.backend.name()
    }

    /// (free, all) bytes.
    ///
    /// # Errors
    /// When the driver does not say.
    pub fn memory(&self) -> Result<(usize, usize), Failure> {
        let what = "asking for free memory";
        self.0.backend.memory().map_err(|reason| self.failure(what, Refusal::Other(reason)))
    }

    /// How many blocks of a kernel can run at a time, if one takes all that one processor has.
    #[must_use]
    pub fn processors(&self) -> usize {
        self.0.backend.processors()
    }

    /// The first failure so far.
    ///
    /// # Errors
    /// That failure; it stays.
    pub fn check(&self) -> Result<(), Failure> {
        self.0.failure.lock().unwrap_or_else(PoisonError::into_inner).clone().map_or(Ok(()), Err)
    }

    fn failure(&self, what: &str, refusal: Refusal) -> Failure {
        let (device, what) = (self.name().to_owned(), what.to_owned());
        match refusal {
            Refusal::Other(reason) => Failure::Other { device, what, reason },
            Refusal::Memory => {
                let (free, total) = self.0.backend.memory().unwrap_or_default();
                Failure::OutOfMemory { device, what, free, total }
            }
        }
    }

    fn fail(&self, failure: Failure) {
        self.0.failure.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(failure);
    }

    /// Does `work` unless something failed before.
    fn work(&self, what: &str, work: impl FnOnce(&dyn Backend) -> Result<(), Refusal>) {
        if self.check().is_err() {
            return;
        }
        if let Err(refusal) = work(self.0.backend.as_ref()) {
            self.fail(self.failure(what, refusal));
        }
    }

    /// Memory with unknown contents.
    #[must_use]
    pub fn allocate(&self, bytes: usize) -> Buffer {
        let mut pointer = 0;
        if bytes > 0 && self.check().is_ok() {
            match self.0.backend.allocate(bytes) {
                Ok(at) => pointer = at,
                Err(refusal) => self.fail(self.failure(&format!("an allocation of {bytes} bytes"), refusal)),
            }
        }
        Buffer { device: self.clone(), pointer, bytes }
    }

    /// Memory with these contents.
    #[must_use]
    pub fn upload(&self, bytes: &[u8]) -> Buffer {
        let buffer = self.allocate(bytes.len());
        if !bytes.is_empty() {
            self.work("a copy to the device", |backend| backend.upload(bytes, buffer.pointer));
        }
        buffer
    }

    /// Launches `kernel` (without the type's name where `dtype` is given).
    pub fn launch(
        &self,
        kernel: &str,
        dtype: Option<Dtype>,
        grid: [usize; 3],
        block: [usize; 2],
        shared: usize,
        args: &[Arg],
    ) {
        if grid.contains(&0) {
            return;
        }
        let name = dtype.map_or_else(|| kernel.to_owned(), |dtype| format!("{kernel}_{}", dtype.suffix()));
        let narrow = |n: usize| u32::try_from(n).expect("a grid's size fits 32 bits");
        let launch = Launch { kernel: &name, grid: grid.map(narrow), block: block.map(narrow), shared, args };
        self.work(&name, |backend| backend.launch(&launch));
    }

    /// Launches a kernel that takes any grid over `n` elements.
    pub fn launch_over(&self, kernel: &str, dtype: Option<Dtype>, n: usize, args: &[Arg]) {
        // Four elements a thread at least; beyond some thousand blocks a grid loop serves as well.
        let threads = 256.min(n.div_ceil(32).max(1) * 32);
        self.launch(kernel, dtype, [n.div_ceil(4 * threads).min(4096), 1, 1], [threads, 1], 0, args);
    }

    /// Computes a product.
    pub fn product(&self, product: &Product) {
        // A sum over nothing adds nothing; cuBLAS may refuse its empty operands.
        let adds = product.k > 0 || !product.accumulate;
        if product.m > 0 && product.n > 0 && adds {
            self.work("a matrix product", |backend| backend.product(product));
        }
    }

    /// Address of [`COUNTERS`] zeros of 32 bits, in which the blocks of a kernel count, and which it leaves as zeros. They live as
    /// long as the device; as one kernel runs at a time, all share them.
    #[must_use]
    pub fn counters(&self) -> u64 {
        *self.0.counters.get_or_init(|| {
            let mut buffer = self.upload(&[0; 4 * COUNTERS]);
            std::mem::take(&mut buffer.pointer)
        })
    }

    /// Address of an f32 on the device, which lives as long as the device.
    #[must_use]
    pub fn number(&self, value: f32) -> u64 {
        let mut numbers = self.0.numbers.lock().unwrap_or_else(PoisonError::into_inner);
        *numbers.entry(value.to_bits()).or_insert_with(|| {
            let mut buffer = self.upload(&value.to_le_bytes());
            std::mem::take(&mut buffer.pointer)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicUsize, Ordering};

    /// A device on which the launches of one kernel find no memory.
    #[derive(Default)]
    struct Small {
        asked: AtomicUsize,
    }

    impl Small {
        fn done(&self) -> Result<(), Refusal> {
            self.asked.fetch_add(1, Ordering::Relaxed);
            Ok(())
        }
    }

    impl Backend for Arc<Small> {
        fn name(&self) -> &str {
            "a small device"
        }

        fn allocate(&self, bytes: usize) -> Result<u64, Refusal> {
            if bytes > 1000 { Err(Refusal::Memory) } else { self.done().map(|()| 256) }
        }

        fn free(&self, _: u64) {}

        fn upload(&self, _: &[u8], _: u64) -> Result<(), Refusal> {
            self.done()
        }

        fn download(&self, _: u64, to: &mut [u8]) -> Result<(), Refusal> {
            to.fill(1);
            self.done()
        }

        fn copy(&self, _: u64, _: u64, _: usize) -> Result<(), Refusal> {
            self.done()
        }

        fn zero(&self, _: u64, _: usize) -> Result<(), Refusal> {
            self.done()
        }

        fn launch(&self, launch: &Launch<'_>) -> Result<(), Refusal> {
            match launch.kernel {
                "large" => Err(Refusal::Memory),
                "broken" => Err("no such kernel".to_owned().into()),
                _ => self.done(),
            }
        }

        fn product(&self, _: &Product) -> Result<(), Refusal> {
            self.done()
        }

        fn memory(&self) -> Result<(usize, usize), String> {
            Ok((10, 1000))
        }

        fn processors(&self) -> usize {
            1
        }
    }

    fn launch(device: &Device, kernel: &str) {
        device.launch(kernel, None, [1, 1, 1], [32, 1], 0, &[]);
    }

    #[test]
    fn the_first_failure_is_kept_and_nothing_is_done_after_it() {
        let small = Arc::new(Small::default());
        let device = Device::new(Box::new(Arc::clone(&small)));
        let buffer = device.upload(&[0; 4]);
        launch(&device, "small");
        assert_eq!((device.check(), small.asked.load(Ordering::Relaxed)), (Ok(()), 3));
        launch(&device, "large");
        let message = "out of memory on a small device: no room for large; 10 of 1000 bytes are free";
        assert_eq!(device.check().unwrap_err().to_string(), message);
        launch(&device, "broken");
        let _ = device.allocate(8);
        let mut bytes = [7; 4];
        buffer.read(&mut bytes);
        assert_eq!((bytes, small.asked.load(Ordering::Relaxed)), ([0; 4], 3));
        assert_eq!(device.check().unwrap_err().to_string(), message);
    }

    #[test]
    fn what_did_not_fit_or_failed_is_said() {
        let say = |work: &dyn Fn(&Device)| {
            let device = Device::new(Box::new(Arc::new(Small::default())));
            work(&device);
            device.check().unwrap_err().to_string()
        };
        let message = say(&|device| drop(device.allocate(1001)));
        assert!(message.contains("no room for an allocation of 1001 bytes; 10 of 1000"), "{message}");
        let message = say(&|device| launch(device, "broken"));
        assert_eq!(message, "a small device: broken failed: no such kernel");
    }
}
