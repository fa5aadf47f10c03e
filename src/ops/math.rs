//! Elementwise functions that compile to vector instructions, and the choice of those instructions at run time.
//!
//! Branch-free polynomials (Cephes, S. Moshier): a libm call in a loop would keep the loop scalar.
#![allow(unsafe_code)] // calls of functions compiled for what this processor was found to have

/// Defines a function that is compiled for several generations of vector instructions; a call takes the widest that this
/// processor has.
///
/// What it calls must be inlined into it to profit. A closure would not do: called from several places, it is compiled once,
/// without any of those instructions.
macro_rules! vectorize {
    ($(#[$meta:meta])* $visibility:vis fn $name:ident($($arg:ident: $type:ty),* $(,)?) $(-> $out:ty)? $body:block) => {
        $(#[$meta])*
        #[allow(unsafe_code)]
        $visibility fn $name($($arg: $type),*) $(-> $out)? {
            #[inline(always)]
            fn plain($($arg: $type),*) $(-> $out)? $body

            #[cfg(target_arch = "x86_64")]
            {
                #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx2,fma")]
                fn of_512_bits($($arg: $type),*) $(-> $out)? {
                    plain($($arg),*)
                }
                #[target_feature(enable = "avx2,fma")]
                fn of_256_bits($($arg: $type),*) $(-> $out)? {
                    plain($($arg),*)
                }
                match $crate::ops::math::vector_bits() {
                    // SAFETY: these instructions were found.
                    512 => return unsafe { of_512_bits($($arg),*) },
                    256 => return unsafe { of_256_bits($($arg),*) },
                    _ => {}
                }
            }
            plain($($arg),*)
        }
    };
}
pub(crate) use vectorize;

/// Width of the vectors of this processor, as [`vectorize`] tells them apart.
#[cfg(target_arch = "x86_64")]
pub(crate) fn vector_bits() -> usize {
    let fma = is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma");
    let wide = is_x86_feature_detected!("avx512f")
        && is_x86_feature_detected!("avx512bw")
        && is_x86_feature_detected!("avx512vl")
        && is_x86_feature_detected!("avx512dq");
    match (fma, wide) {
        (true, true) => 512,
        (true, false) => 256,
        (false, _) => 128,
    }
}

/// `2^n` and `q` with `e^x = 2^n (1 + q)`; arguments beyond the range of f32 saturate.
#[inline(always)]
fn exp_parts(x: f32) -> (f32, f32) {
    const LN2_HI: f32 = 0.693_359_4;
    const LN2_LO: f32 = -2.121_944_4e-4;
    /// Adding and subtracting 1.5 · 2²³ rounds to an integer.
    const ROUND: f32 = 12_582_912.0;
    let x = x.clamp(-87.33, 88.37);
    let shifted = x * std::f32::consts::LOG2_E + ROUND;
    let n = shifted - ROUND;
    let r = x - n * LN2_HI - n * LN2_LO;
    let mut p = 1.987_569_2e-4;
    p = p * r + 1.398_2e-3;
    p = p * r + 8.333_452e-3;
    p = p * r + 4.166_579_6e-2;
    p = p * r + 1.666_666_6e-1;
    p = p * r + 0.5;
    // The low bits of `shifted` are n; moved into the exponent they are 2^n.
    (f32::from_bits((shifted.to_bits() << 23).wrapping_add(127 << 23)), p * r * r + r)
}

/// `e^x` within 2 ulp; arguments beyond the range of f32 saturate.
#[inline(always)]
#[must_use]
pub fn exp(x: f32) -> f32 {
    let (power, q) = exp_parts(x);
    (q + 1.0) * power
}

/// `1 / (1 + e^-x)`.
#[inline(always)]
#[must_use]
pub fn sigmoid(x: f32) -> f32 {
    1.0 / (1.0 + exp(-x))
}

/// Hyperbolic tangent, within 4 ulp: a soft cap of 50 on scores of about 1 takes it of small arguments, where `1 - …` would
/// leave few digits.
#[inline(always)]
#[must_use]
pub fn tanh(x: f32) -> f32 {
    let (power, q) = exp_parts(2.0 * x);
    let exp_minus_1 = power * q + (power - 1.0);
    exp_minus_1 / (exp_minus_1 + 2.0)
}

vectorize! {
    /// `x = cap · tanh(x / cap)`.
    pub(crate) fn soft_cap(x: &mut [f32], cap: f32) {
        x.iter_mut().for_each(|v| *v = cap * tanh(*v / cap));
    }
}

/// Error function, within 6e-7 (Abramowitz and Stegun 7.1.26).
#[inline(always)]
#[must_use]
pub fn erf(x: f32) -> f32 {
    let a = x.abs();
    let t = 1.0 / (1.0 + 0.327_591_1 * a);
    let p = ((((1.061_405_4 * t - 1.453_152_1) * t + 1.421_413_8) * t - 0.284_496_74) * t + 0.254_829_6) * t;
    (1.0 - p * exp(-a * a)).copysign(x)
}

/// One value of 16 lanes, half of them with the other half at a time.
#[inline(always)]
fn fold(lanes: &[f32; 16], f: impl Fn(f32, f32) -> f32) -> f32 {
    let mut lanes = *lanes;
    for half in [8, 4, 2, 1] {
        for j in 0..half {
            lanes[j] = f(lanes[j], lanes[j + half]);
        }
    }
    lanes[0]
}

/// A function of its own, as the compiler would cut the lanes of the loop before it into the pieces that are added here.
#[inline(never)]
fn total(lanes: &[f32; 16]) -> f32 {
    fold(lanes, |a, b| a + b)
}

/// As [`total`].
#[inline(never)]
fn largest(lanes: &[f32; 16]) -> f32 {
    fold(lanes, |a, b| if a > b { a } else { b })
}

/// Sum of the products of two slices, in 16 lanes.
#[inline(always)]
#[must_use]
pub fn dot(a: &[f32], b: &[f32]) -> f32 {
    let mut lanes = [0.0f32; 16];
    let (a_chunks, b_chunks) = (a.chunks_exact(16), b.chunks_exact(16));
    let tail: f32 = a_chunks.remainder().iter().zip(b_chunks.remainder()).map(|(x, y)| x * y).sum();
    for (x, y) in a_chunks.zip(b_chunks) {
        for j in 0..16 {
            lanes[j] += x[j] * y[j];
        }
    }
    total(&lanes) + tail
}

/// Sum of a slice, in 16 lanes.
#[inline(always)]
#[must_use]
pub fn sum(a: &[f32]) -> f32 {
    let mut lanes = [0.0f32; 16];
    let chunks = a.chunks_exact(16);
    let tail: f32 = chunks.remainder().iter().sum();
    for x in chunks {
        for j in 0..16 {
            lanes[j] += x[j];
        }
    }
    total(&lanes) + tail
}

/// Largest element of a slice, in 16 lanes; the least f32 for an empty one.
#[inline(always)]
#[must_use]
pub fn max(a: &[f32]) -> f32 {
    let mut lanes = [f32::MIN; 16];
    let chunks = a.chunks_exact(16);
    let tail = chunks.remainder().iter().copied().fold(f32::MIN, f32::max);
    for x in chunks {
        for j in 0..16 {
            lanes[j] = if x[j] > lanes[j] { x[j] } else { lanes[j] };
        }
    }
    largest(&lanes).max(tail)
}

/// Replaces `x` by `e^(x - shift)` and returns the sum.
#[inline(always)]
#[must_use]
pub fn exp_sum(x: &mut [f32], shift: f32) -> f32 {
    let mut lanes = [0.0f32; 16];
    let mut chunks = x.chunks_exact_mut(16);
    for c in &mut chunks {
        for j in 0..16 {
            c[j] = exp(c[j] - shift);
            lanes[j] += c[j];
        }
    }
    let mut tail = 0.0;
    for v in chunks.into_remainder() {
        *v = exp(*v - shift);
        tail += *v;
    }
    total(&lanes) + tail
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn functions_are_within_their_bounds() {
        for i in -20_000..20_000 {
            let x = i as f32 / 1000.0;
            let exact = f64::from(x);
            assert!((f64::from(exp(x)) / exact.exp() - 1.0).abs() < 3e-7, "exp({x})");
            let tanhs = [(tanh(x), exact.tanh()), (tanh(x / 1e3), f64::from(x / 1e3).tanh())];
            assert!(tanhs.iter().all(|(t, want)| (f64::from(*t) - want).abs() <= 4e-7 * want.abs()), "tanh({x})");
            assert!((f64::from(erf(x)) - candle_core::cpu::erf::erf_f64(exact)).abs() < 6e-7, "erf({x})");
        }
        assert_eq!(exp(-1000.0), exp(-88.0));
        assert!(exp(-1000.0) < 1e-37 && exp(1000.0).is_finite());
    }

    #[test]
    fn reductions_take_odd_lengths() {
        let a: Vec<f32> = (0..123).map(|i| (i % 7) as f32).collect();
        assert_eq!(dot(&a, &a), a.iter().map(|x| x * x).sum::<f32>());
        assert_eq!(sum(&a), a.iter().sum::<f32>());
        assert_eq!((max(&a), max(&a[..1])), (6.0, 0.0));
        vectorize! {
            fn total(e: &mut [f32]) -> f32 {
                exp_sum(e, 6.0)
            }
        }
        let total = total(&mut a.clone());
        assert!((total - a.iter().map(|x| (x - 6.0).exp()).sum::<f32>()).abs() < 1e-4);
    }
}
