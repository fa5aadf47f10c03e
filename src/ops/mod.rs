//! The operations of a training step, each a forward and a hand-written backward; one file an op.
//!
//! The contract that every op file follows:
//! - it knows matrices and numbers only: no `Config`, no paths, no model;
//! - rows are tokens, so a micro batch is its samples end to end, without padding; what must not mix (attention,
//!   positions) is told the [`Segment`]s;
//! - activations are f32 and row-major; sums, norms, softmax and loss are f32 whatever the weights are stored in;
//! - a backward takes exactly what its forward saved, and nothing computes a gradient of a frozen weight;
//! - the test beside it compares forward and backward with plain candle ops and their autograd, on odd sizes.
//!
//! | op | file | forward | gradient for |
//! |---|---|---|---|
//! | frozen product | [`weight`] | `y = x Wᵀ` | `x` |
//! | frozen product in few bits | [`quantized`], [`nf4`] | decoded for [`weight`] | |
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
//! checkpoints are read with, the oracle of the tests, and the ground of the CUDA side.

pub mod attention;
pub mod clip;
pub mod device;
pub mod glu;
pub mod head;
pub mod lora;
pub mod math;
pub mod matmul;
pub mod matrix;
pub mod moe;
pub mod nf4;
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

/// Runs `f` on a worker of the thread pool, so that the parallel loops inside start without waking one (417 against 492
/// tokens/s, measured on the prototype).
pub fn in_pool<R: Send>(f: impl FnOnce() -> R + Send) -> R {
    rayon::scope(|_| f())
}

#[cfg(test)]
pub(crate) mod testing;
