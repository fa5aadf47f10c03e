//! Rotary position embedding (Su et al. 2021, arXiv:2104.09864), in the half-split order of Hugging Face checkpoints.
//!
//! Of each head the first `rotary_dim` channels turn in pairs `(i, i + rotary_dim / 2)` by `position · inv_freq[i]`;
//! the rest passes. The backward is the rotation by the negative angle. The frequency scalings are those of
//! transformers' `modeling_rope_utils.py`: linear, llama3, yarn (Peng et al. 2023, arXiv:2309.00071), longrope (Ding et al.
//! 2024, arXiv:2402.13753).

use super::device::{Constant, int, long};
use super::math::vectorize;
use super::matrix::{Matrix, rows_per_task};
use rayon::prelude::*;
use std::ops::Range;

/// How the frequencies are stretched for contexts longer than the pretraining's.
#[derive(Debug, Clone, PartialEq)]
pub enum Scaling {
    /// Not at all.
    None,
    /// All frequencies divided by `factor`.
    Linear {
        /// Divisor.
        factor: f64,
    },
    /// Long wavelengths divided by `factor`, short ones kept, a blend between.
    Llama3 {
        /// Divisor of the long wavelengths.
        factor: f64,
        /// Wavelengths above `original_context / low_freq_factor` are stretched in full.
        low_freq_factor: f64,
        /// Wavelengths below `original_context / high_freq_factor` are kept.
        high_freq_factor: f64,
        /// Context length of the pretraining, tokens.
        original_context: f64,
    },
    /// A ramp between kept and divided frequencies, with a factor on the attention logits.
    Yarn {
        /// Divisor of the slow frequencies.
        factor: f64,
        /// Rotations in the original context above which a frequency is kept.
        beta_fast: f64,
        /// Rotations in the original context below which a frequency is divided.
        beta_slow: f64,
        /// Context length of the pretraining, tokens.
        original_context: f64,
        /// Factor on cosine and sine.
        attention_factor: f64,
        /// Whether the ramp's ends are rounded to whole channels.
        truncate: bool,
    },
    /// A divisor for each frequency, one for texts within the original context and another for longer ones, all of whose
    /// positions then turn by it.
    Long {
        /// Divisors within it: (rotary_dim / 2).
        short: Vec<f64>,
        /// Divisors beyond it: (rotary_dim / 2).
        long: Vec<f64>,
        /// Context length of the pretraining, tokens.
        original_context: usize,
        /// Factor on cosine and sine.
        attention_factor: f64,
    },
}

impl Scaling {
    /// Longest text that turns as the shorter ones do.
    #[must_use]
    pub fn alike(&self) -> usize {
        if let Self::Long { original_context, .. } = self { *original_context } else { usize::MAX }
    }

    /// Factor on cosine and sine.
    fn attention_factor(&self) -> f64 {
        match self {
            Self::Yarn { attention_factor, .. } | Self::Long { attention_factor, .. } => *attention_factor,
            _ => 1.0,
        }
    }
}

/// Frequencies of the rotated channel pairs in a text of `tokens` tokens: (rotary_dim / 2).
#[must_use]
pub fn inverse_frequencies(theta: f64, rotary_dim: usize, scaling: &Scaling, tokens: usize) -> Vec<f64> {
    let plain = (0..rotary_dim / 2).map(|i| theta.powf(-((2 * i) as f64) / rotary_dim as f64));
    match *scaling {
        Scaling::Long { ref short, ref long, .. } => {
            let divisors = if tokens > scaling.alike() { long } else { short };
            plain.zip(divisors).map(|(f, divisor)| f / divisor).collect()
        }
        Scaling::None => plain.collect(),
        Scaling::Linear { factor } => plain.map(|f| f / factor).collect(),
        Scaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_context } => plain
            .map(|f| {
                let wavelength = 2.0 * std::f64::consts::PI / f;
                if wavelength < original_context / high_freq_factor {
                    return f;
                }
                if wavelength > original_context / low_freq_factor {
                    return f / factor;
                }
                let smooth = (original_context / wavelength - low_freq_factor) / (high_freq_factor - low_freq_factor);
                (1.0 - smooth) * f / factor + smooth * f
            })
            .collect(),
        Scaling::Yarn { factor, beta_fast, beta_slow, original_context, truncate, .. } => {
            let channel = |rotations: f64| {
                rotary_dim as f64 * (original_context / (rotations * 2.0 * std::f64::consts::PI)).ln()
                    / (2.0 * theta.ln())
            };
            let (mut low, mut high) = (channel(beta_fast), channel(beta_slow));
            if truncate {
                (low, high) = (low.floor(), high.ceil());
            }
            let (low, mut high) = (low.max(0.0), high.min(rotary_dim as f64 - 1.0));
            if low == high {
                high += 0.001;
            }
            plain
                .enumerate()
                .map(|(i, f)| {
                    let divided = ((i as f64 - low) / (high - low)).clamp(0.0, 1.0);
                    f / factor * divided + f * (1.0 - divided)
                })
                .collect()
        }
    }
}

/// Cosines and sines of all positions, a row each; where long texts turn otherwise, first those of short ones.
#[derive(Debug, Clone)]
pub struct Tables {
    rotary_dim: usize,
    positions: usize,
    /// Longest text that turns by the first rows.
    alike: usize,
    cos: Constant<f32>,
    sin: Constant<f32>,
}

impl Tables {
    /// Tables for `positions` positions of heads that rotate `rotary_dim` channels (even).
    #[must_use]
    pub fn new(theta: f64, rotary_dim: usize, scaling: &Scaling, positions: usize) -> Self {
        let (alike, factor) = (scaling.alike(), scaling.attention_factor() as f32);
        let (mut cos, mut sin) = (Vec::new(), Vec::new());
        // Of the longest text within `alike`, and of one beyond it.
        for tokens in [positions.min(alike), positions].into_iter().take(if positions > alike { 2 } else { 1 }) {
            let inv_freq = inverse_frequencies(theta, rotary_dim, scaling, tokens);
            cos.reserve(tokens * inv_freq.len());
            sin.reserve(tokens * inv_freq.len());
            for position in 0..tokens {
                for f in &inv_freq {
                    // transformers keeps the frequencies in f32 and multiplies there: the same rounding.
                    let angle = f64::from(position as f32 * *f as f32);
                    cos.push(angle.cos() as f32 * factor);
                    sin.push(angle.sin() as f32 * factor);
                }
            }
        }
        Self { rotary_dim, positions, alike, cos: cos.into(), sin: sin.into() }
    }

    /// Number of positions.
    #[must_use]
    pub fn positions(&self) -> usize {
        self.positions
    }

    /// The row of the first position of a text of `tokens` tokens.
    #[must_use]
    pub fn first_row(&self, tokens: usize) -> usize {
        if tokens > self.alike { self.alike } else { 0 }
    }

    /// Rotates the heads within `columns` of every row, in place.
    ///
    /// # Shapes
    /// `x`: (T, C); `columns`: whole heads of `head_size`; `rows`: each token's of these tables, (T).
    pub fn forward(&self, x: &mut Matrix, columns: Range<usize>, head_size: usize, rows: &Constant<u32>) {
        self.rotate(x, columns, head_size, rows, 1.0);
    }

    /// Rotates the gradient back, in place; shapes as in [`Self::forward`].
    pub fn backward(&self, dx: &mut Matrix, columns: Range<usize>, head_size: usize, rows: &Constant<u32>) {
        self.rotate(dx, columns, head_size, rows, -1.0);
    }

    fn rotate(&self, x: &mut Matrix, columns: Range<usize>, head_size: usize, positions: &Constant<u32>, sign: f32) {
        let half = self.rotary_dim / 2;
        if half == 0 {
            return;
        }
        let cols = x.cols();
        if let Some((device, dtype)) = x.place() {
            let args = [
                x.columns(columns.clone()).pointer().into(),
                self.cos.on(device).into(),
                self.sin.on(device).into(),
                positions.on(device).into(),
                int(columns.len() / head_size),
                int(head_size),
                int(self.rotary_dim),
                long(cols),
                sign.into(),
            ];
            return device.launch("rope", Some(dtype), [x.rows(), 1, 1], [128, 1], 0, &args);
        }
        let rows = rows_per_task(x.rows());
        x.par_chunks_mut(cols * rows).zip(positions.par_chunks(rows)).for_each(|(x, positions)| {
            rotate_rows((&self.cos, &self.sin), x, (cols, columns.clone(), head_size), positions, half, sign);
        });
    }
}

vectorize! {
    /// Rotates the heads of some rows of `cols` columns.
    fn rotate_rows(
        tables: (&[f32], &[f32]),
        x: &mut [f32],
        heads: (usize, Range<usize>, usize),
        positions: &[u32],
        half: usize,
        sign: f32,
    ) {
        let (cols, columns, head_size) = heads;
        for (x, position) in x.chunks_exact_mut(cols).zip(positions) {
            let at = *position as usize * half;
            let (cos, sin) = (&tables.0[at..][..half], &tables.1[at..][..half]);
            for head in x[columns.clone()].chunks_exact_mut(head_size) {
                let (a, b) = head[..2 * half].split_at_mut(half);
                for i in 0..half {
                    let (u, v, s) = (a[i], b[i], sin[i] * sign);
                    a[i] = u * cos[i] - v * s;
                    b[i] = v * cos[i] + u * s;
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::testing::{Oracle, assert_close, random};
    use candle_core::{Device, Tensor};

    #[test]
    fn equals_candle_and_turns_back() {
        let (t, heads, head_size, rotary) = (5, 3, 20, 8);
        let cols = heads * head_size;
        let tables = Tables::new(10_000.0, rotary, &Scaling::None, 9);
        let positions: Constant<u32> = vec![0, 1, 2, 0, 8].into();
        let (x, dy) = (random(t * cols, 1), random(t * cols, 2));
        let reference = |input: &[Tensor]| {
            let cpu = &Device::Cpu;
            let pick = |table: &[f32]| {
                let rows: Vec<f32> =
                    positions.iter().flat_map(|p| table[*p as usize * rotary / 2..][..rotary / 2].to_vec()).collect();
                Tensor::from_vec(rows, (t, 1, rotary / 2), cpu)
            };
            let (cos, sin) = (pick(&tables.cos)?, pick(&tables.sin)?);
            let x = input[0].reshape((t, heads, head_size))?;
            let (a, b) = (x.narrow(2, 0, rotary / 2)?, x.narrow(2, rotary / 2, rotary / 2)?);
            let rest = x.narrow(2, rotary, head_size - rotary)?;
            let first = (a.broadcast_mul(&cos)? - b.broadcast_mul(&sin)?)?;
            let second = (b.broadcast_mul(&cos)? + a.broadcast_mul(&sin)?)?;
            Tensor::cat(&[first, second, rest], 2)?.reshape((t, cols))
        };
        let oracle = Oracle::run(&[(&x, t, cols)], reference, &dy);
        let mut y = Matrix::from_slice(t, cols, &x);
        tables.forward(&mut y, 0..cols, head_size, &positions);
        assert_close(&y, &oracle.y, 1e-6);
        let mut dx = Matrix::from_slice(t, cols, &dy);
        tables.backward(&mut dx, 0..cols, head_size, &positions);
        assert_close(&dx, &oracle.grads[0], 1e-6);
    }

    #[test]
    fn scalings_follow_their_definitions() {
        let plain = inverse_frequencies(10_000.0, 16, &Scaling::None, 9);
        assert!((plain[1] - 10_000f64.powf(-0.125)).abs() < 1e-12);
        let linear = inverse_frequencies(10_000.0, 16, &Scaling::Linear { factor: 4.0 }, 9);
        assert_eq!(linear[3] * 4.0, plain[3]);
        let llama3 =
            Scaling::Llama3 { factor: 8.0, low_freq_factor: 1.0, high_freq_factor: 4.0, original_context: 64.0 };
        let scaled = inverse_frequencies(500_000.0, 16, &llama3, 9);
        let unscaled = inverse_frequencies(500_000.0, 16, &Scaling::None, 9);
        assert_eq!(scaled[0], unscaled[0]);
        assert_eq!(scaled[7], unscaled[7] / 8.0);
        let yarn = Scaling::Yarn {
            factor: 4.0,
            beta_fast: 32.0,
            beta_slow: 1.0,
            original_context: 2048.0,
            attention_factor: 1.1,
            truncate: true,
        };
        let scaled = inverse_frequencies(10_000.0, 64, &yarn, 9);
        let unscaled = inverse_frequencies(10_000.0, 64, &Scaling::None, 9);
        assert_eq!(scaled[0], unscaled[0]);
        assert_eq!(scaled[31], unscaled[31] / 4.0);
        assert!((Tables::new(10_000.0, 64, &yarn, 1).cos[0] - 1.1).abs() < 1e-6);
    }

    #[test]
    fn long_texts_turn_by_divisors_of_their_own() {
        let (short, long) = (vec![1.0, 2.0], vec![4.0, 8.0]);
        let scaling = Scaling::Long { short, long, original_context: 3, attention_factor: 1.5 };
        let tables = Tables::new(100.0, 4, &scaling, 5);
        assert_eq!((tables.positions(), tables.cos.len()), (5, (3 + 5) * 2));
        assert_eq!([3, 4, 5].map(|tokens| tables.first_row(tokens)), [0, 3, 3]);
        let cos = |row: usize, pair: usize| tables.cos[row * 2 + pair];
        let close = |got: f32, angle: f64| assert!((f64::from(got) - 1.5 * angle.cos()).abs() < 1e-6);
        close(cos(2, 0), 2.0);
        close(cos(2, 1), 2.0 * 0.1 / 2.0);
        close(cos(3 + 4, 0), 4.0 / 4.0);
        close(cos(3 + 4, 1), 4.0 * 0.1 / 8.0);
        assert_eq!(Tables::new(100.0, 4, &scaling, 3).cos.len(), 3 * 2, "no text is long");
    }
}
