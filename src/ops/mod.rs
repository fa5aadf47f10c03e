//! The operations of a training step, each a forward and a hand-written backward; one file an op.
//!
//! The contract that every op file follows:
//! - it knows matrices and numbers only: no `Config`, no paths, no model;
//! - rows are tokens, so a micro batch is its samples end to end, without padding; what must not mix (attention,
//!   positions) is told the [`Segment`]s;
//! - activations are row-major, f32 on the host and of the weights' type on a device; sums, norms, softmax and loss are f32
//!   whatever the weights are stored in;
//! - what it is given says where it works: operands on a device launch the kernel of the same name in `kernels/`;
//! - a backward takes exactly what its forward saved, and nothing computes a gradient of a frozen weight;
//! - the test beside it compares forward and backward with plain candle ops and their autograd, on odd sizes; on a device
//!   the whole model is compared with the reference values (`tests/device.rs`).
//!
//! | op | file | forward | gradient for |
//! |---|---|---|---|
//! | frozen product | [`weight`] | `y = x Wᵀ` | `x` |
//! | frozen product in few bits | [`quantized`], [`nf4`] | decoded for [`weight`] | |
//! | 4-bit codes for known inputs | [`gptq`] | least change of the product | |
//! | frozen product on a device | [`resident`], [`nf4_product`], [`int8_product`] | `y = x Wᵀ` | `x` |
//! | rows moved, added, scaled | [`rows`] | gather, scatter | |
//! | adapter | [`lora`] | `y += s drop(x) Aᵀ Bᵀ` | `A`, `B`, `x` |
//! | RMS and layer norm | [`norm`] | one scale a row | `x` |
//! | rotary embedding | [`rope`] | in place | in place, the angle negated |
//! | attention | [`attention`] | causal, grouped, windowed | `q`, `k`, `v` |
//! | gated and plain units | [`glu`] | `act(gate) up` | `gate`, `up` |
//! | routing to experts | [`moe`] | softmax, best k | logits, experts' outputs |
//! | clipping | [`clip`] | in place | in place |
//! | cross-entropy | [`head`] | per chunk of rows, in place | logits |
//! | AdamW | [`optimizer`] | in place, one flat buffer | |
//!
//! Why activations are not `candle_core::Tensor`s: candle 0.11 keeps writing into a tensor's storage to itself but for
//! one-output in-place ops, and returns each buffer to the allocator. [`Matrix`] recycles them, so that a step after
//! the first of its length neither allocates nor faults pages, and every op may write where it likes. candle is what
//! checkpoints are read with, and the oracle of the tests. Devices are ours too, behind [`device::Backend`]: candle's CUDA
//! feature links the driver, so that a binary would not start without one, and compiles kernels that nothing here calls.

pub mod attention;
pub mod clip;
pub mod device;
pub mod glu;
pub mod gptq;
pub mod head;
pub mod int8_product;
pub mod lora;
pub mod math;
pub mod matmul;
pub mod matrix;
pub mod moe;
pub mod nf4;
pub mod nf4_product;
pub mod norm;
pub mod optimizer;
pub mod quantized;
pub mod resident;
pub mod rope;
pub mod rows;
#[cfg(target_arch = "x86_64")]
pub mod simd;
pub mod weight;

pub use matrix::{Matrix, Segment, View};

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

/// Runs `f` on a worker of the thread pool, so that the parallel loops inside start without waking one (417 against 492
/// tokens/s, measured on the prototype); the other workers stay awake until it returns.
pub fn in_pool<R: Send>(f: impl FnOnce() -> R + Send) -> R {
    let done = &AtomicBool::new(false);
    rayon::scope(|scope| {
        let mine = rayon::current_thread_index();
        scope.spawn_broadcast(move |_, worker| {
            if Some(worker.index()) != mine {
                attend(done);
            }
        });
        let _done = Finally(done);
        f()
    })
}

/// Sets its flag when it goes, also when that is for a panic.
struct Finally<'a>(&'a AtomicBool);

impl Drop for Finally<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Release);
    }
}

/// Takes part in the work of others until `done`. A pause between two parallel loops is shorter than falling asleep and
/// being woken. One that is longer gives the core to who else wants it, and in a very long one, as when a device computes,
/// there is nothing to wait for.
fn attend(done: &AtomicBool) {
    const PATIENCE: Duration = Duration::from_micros(100);
    const LONG: Duration = Duration::from_millis(5);
    let mut idle: Option<Instant> = None;
    while !done.load(Ordering::Acquire) {
        if rayon::yield_now() == Some(rayon::Yield::Executed) {
            idle = None;
            continue;
        }
        let waited = idle.get_or_insert_with(Instant::now).elapsed();
        if waited > LONG {
            return;
        }
        if waited > PATIENCE {
            std::thread::yield_now();
        } else {
            std::hint::spin_loop();
        }
    }
}

#[cfg(test)]
pub(crate) mod testing;
