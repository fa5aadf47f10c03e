//! 4-bit codes that are chosen by what a matrix is multiplied with, so that its product changes least: GPTQ (Frantar et al.
//! 2022, arXiv:2210.17323) with the levels and blocks of `nf4`. What comes out is in bitsandbytes' format like any other.
//!
//! With the Gram matrix `H = Xᵀ X` of the inputs, the error `e = w - q` of a row changes the outputs by `e H eᵀ = |Lᵀ e|²`,
//! where `H = L Lᵀ`. Element `i` of `Lᵀ e` has the errors of the columns from `i` on: taken from the last column to the
//! first, each is rounded at `w_i + Σ_{j>i} L_ji e_j / L_ii`, which makes up for the errors so far. (GPTQ as Babai's nearest
//! plane, Chen et al. 2025, arXiv:2507.18553: the same codes without an inverse.) Columns with the largest inputs come first,
//! while there are others left to make up for theirs. Scales are chosen before, each block's for itself.

use super::matmul::{Side, Threads, ViewMut, matmul};
use super::matrix::{Matrix, View, rows_per_task};
use super::nf4::{Absmax, Kind4, QUANT_BLOCK, Quantized, SMALLEST_ABSMAX};
use rayon::prelude::*;

/// Columns that are factored or rounded between two products with all others.
const STRIP: usize = 64;
/// What is added to the diagonal, as a share of its mean: GPTQ's own. Ten times as much where that is not enough for
/// rounding errors not to make it indefinite.
const DAMPING: [f32; 4] = [0.01, 0.1, 1.0, 10.0];
/// A block's scale is at least this share of its largest magnitude.
const SMALLEST_SCALE: f32 = 0.62;
/// How many scales are tried.
const SCALES: usize = 20;

/// What is known of the inputs of a matrix.
#[derive(Debug)]
pub struct Inputs {
    /// Sum of squares of each, times that factor, damped.
    power: Vec<f32>,
    /// Columns by their power, ascending.
    order: Vec<usize>,
    /// `L`, in this order: (cols, cols), row after row; what is above the diagonal means nothing.
    factor: Vec<f32>,
}

impl Inputs {
    /// From the Gram matrix of inputs, times any positive factor. `None`: it holds numbers that are not finite, or none of
    /// such a matrix.
    ///
    /// # Shapes
    /// `gram`: (cols, cols), on the host.
    #[must_use]
    pub fn new(gram: &Matrix) -> Option<Self> {
        let cols = gram.cols();
        let diagonal: Vec<f32> = (0..cols).map(|i| gram.row(i)[i]).collect();
        let mean = diagonal.iter().sum::<f32>() / cols.max(1) as f32;
        if !mean.is_finite() {
            return None;
        }
        let mut order: Vec<usize> = (0..cols).collect();
        order.sort_by(|a, b| diagonal[*a].total_cmp(&diagonal[*b]));
        DAMPING.iter().find_map(|damping| {
            // Inputs that are always 0 leave a matrix that can still be factored.
            let added = (damping * mean).max(f32::MIN_POSITIVE);
            let mut factor = vec![0.0; cols * cols];
            factor.par_chunks_mut(cols.max(1)).zip(&order).for_each(|(out, row)| {
                let from = gram.row(*row);
                out.iter_mut().zip(&order).for_each(|(out, col)| *out = from[*col]);
                out.iter_mut().zip(&order).filter(|(_, col)| *col == row).for_each(|(out, _)| *out += added);
            });
            cholesky(&mut factor, cols).then(|| {
                let power = diagonal.iter().map(|d| d + added).collect();
                Self { power, order: order.clone(), factor }
            })
        })
    }

    /// The matrix in 4 bits; with `double` its scales as well.
    ///
    /// # Shapes
    /// `values`: (rows, cols), row after row.
    ///
    /// # Panics
    /// When `values` are not of whole rows.
    #[must_use]
    pub fn quantize(&self, values: &[f32], kind: Kind4, double: bool) -> Quantized {
        let cols = self.order.len();
        assert!(values.len().is_multiple_of(cols), "gptq: {} values of rows of {cols}", values.len());
        let rows = values.len() / cols;
        let scales = self.scales(values, kind);
        let absmax = if double { Absmax::double(&scales) } else { Absmax::Plain(scales) };
        let scales: Vec<f32> = (0..absmax.len()).map(|block| absmax.get(block)).collect();
        let codes = self.codes(values, rows, &scales, kind);
        let pair = |codes: &[u8]| codes[0] << 4 | codes.get(1).copied().unwrap_or(kind.code(0.0));
        let packed = codes.chunks(2).map(pair).collect();
        Quantized { kind, packed, absmax, rows, cols }
    }

    /// For each block the scale with the least error, weighed by the power of its inputs.
    fn scales(&self, values: &[f32], kind: Kind4) -> Vec<f32> {
        let blocks = values.par_chunks(QUANT_BLOCK).enumerate();
        let scale = |(at, block): (usize, &[f32])| {
            let (mut values, mut powers) = ([0.0; QUANT_BLOCK], [0.0; QUANT_BLOCK]);
            values[..block.len()].copy_from_slice(block);
            let of_columns = self.power.iter().cycle().skip(at * QUANT_BLOCK % self.power.len());
            powers.iter_mut().zip(of_columns).for_each(|(to, power)| *to = *power);
            best_scale(&values, &powers, kind)
        };
        blocks.map(scale).collect()
    }

    /// A code for each value.
    fn codes(&self, values: &[f32], rows: usize, scales: &[f32], kind: Kind4) -> Vec<u8> {
        let cols = self.order.len();
        let mut codes = vec![0; values.len()];
        let (mut errors, mut shifts) = (vec![0.0; values.len()], vec![0.0; rows * STRIP]);
        let task = rows_per_task(rows);
        for first in (0..cols).step_by(STRIP).rev() {
            let strip = first..(first + STRIP).min(cols);
            let (n, later) = (strip.len(), strip.end..cols);
            let shifts = &mut shifts[..rows * n];
            if later.is_empty() {
                shifts.fill(0.0);
            } else {
                let errors = View::of(&errors, rows, cols).slice_cols(later.clone());
                let factor = View::of(&self.factor, cols, cols).slice_rows(later).slice_cols(strip.clone());
                let to = ViewMut::of(shifts, rows, n);
                matmul(Threads::All, to, false, 1.0, Side::N(errors), Side::N(factor));
            }
            let lines = codes.par_chunks_mut(task * cols).zip(errors.par_chunks_mut(task * cols));
            lines.zip(shifts.par_chunks_mut(task * n)).enumerate().for_each(|(at, ((codes, errors), shifts))| {
                let lines = codes.chunks_exact_mut(cols).zip(errors.chunks_exact_mut(cols));
                for (line, ((codes, errors), shifts)) in lines.zip(shifts.chunks_exact_mut(n)).enumerate() {
                    let row = at * task + line;
                    for i in (0..n).rev() {
                        let (place, column) = (first + i, self.order[first + i]);
                        let factor = &self.factor[place * cols + first..][..=i];
                        let at = row * cols + column;
                        let (value, scale) = (values[at], scales[at / QUANT_BLOCK]);
                        let code = kind.code((value + shifts[i] / factor[i]) / divisor(scale));
                        let error = value - kind.levels()[usize::from(code)] * scale;
                        (codes[column], errors[place]) = (code, error);
                        shifts[..i].iter_mut().zip(factor).for_each(|(shift, l)| *shift += error * l);
                    }
                }
            });
        }
        codes
    }
}

/// A scale that may be divided by. One that was quantized may have come out below 0.
fn divisor(scale: f32) -> f32 {
    if scale.abs() < SMALLEST_ABSMAX { SMALLEST_ABSMAX } else { scale }
}

fn best_scale(block: &[f32; QUANT_BLOCK], power: &[f32; QUANT_BLOCK], kind: Kind4) -> f32 {
    let largest = block.iter().fold(0f32, |m, v| m.max(v.abs()));
    let step = (1.0 - SMALLEST_SCALE) / (SCALES - 1) as f32;
    let mut best = (f32::INFINITY, largest);
    for number in 0..SCALES {
        let scale = largest * (1.0 - step * number as f32);
        let inverse = 1.0 / scale.max(SMALLEST_ABSMAX);
        let codes = kind.codes(&block.map(|v| v * inverse));
        let squares = block.iter().zip(codes).zip(power).map(|((v, code), power)| {
            let error = v - kind.levels()[usize::from(code)] * scale;
            error * error * power
        });
        let error = squares.sum::<f32>();
        if error < best.0 {
            best = (error, scale);
        }
    }
    best.1
}

/// Factors a symmetric matrix as `L Lᵀ` in its lower triangle. `false`: it is not positive definite.
///
/// Strips of columns from the left: each is made up for those before it by one product, then factored by itself.
fn cholesky(matrix: &mut [f32], n: usize) -> bool {
    let mut strip = Vec::new();
    for first in (0..n).step_by(STRIP) {
        let cols = first..(first + STRIP).min(n);
        let (rows, width) = (n - first, cols.len());
        strip.clear();
        strip.extend(matrix[first * n..].chunks_exact(n).flat_map(|row| row[cols.clone()].iter().copied()));
        if first > 0 {
            let before = View::of(matrix, n, n).slice_cols(0..first);
            let to = ViewMut::of(&mut strip, rows, width);
            let (below, beside) = (before.slice_rows(first..n), before.slice_rows(cols.clone()));
            matmul(Threads::All, to, true, -1.0, Side::N(below), Side::T(beside));
        }
        let (top, below) = strip.split_at_mut(width * width);
        if !cholesky_small(top, width) {
            return false;
        }
        below.par_chunks_exact_mut(width).for_each(|row| {
            for i in 0..width {
                let (done, rest) = row.split_at_mut(i);
                let factor = &top[i * width..][..=i];
                let sum: f32 = done.iter().zip(factor).map(|(a, b)| a * b).sum();
                rest[0] = (rest[0] - sum) / factor[i];
            }
        });
        let lines = matrix[first * n..].par_chunks_exact_mut(n).zip(strip.par_chunks_exact(width));
        lines.for_each(|(row, from)| row[cols.clone()].copy_from_slice(from));
    }
    true
}

/// The same of a matrix of one strip, with sums in f64.
fn cholesky_small(matrix: &mut [f32], n: usize) -> bool {
    for i in 0..n {
        for j in 0..=i {
            let [a, b] = [i, j].map(|row| &matrix[row * n..][..j]);
            let sum: f64 = a.iter().zip(b).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum();
            let rest = f64::from(matrix[i * n + j]) - sum;
            if i == j && (rest <= 0.0 || !rest.is_finite()) {
                return false;
            }
            matrix[i * n + j] = if i == j { rest.sqrt() } else { rest / f64::from(matrix[j * n + j]) } as f32;
        }
    }
    true
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::testing::random;

    /// Inputs that hang together, as those of a model do, with some much larger than others: (tokens, cols).
    fn inputs(tokens: usize, cols: usize) -> Matrix {
        let (hidden, mix) = (random(tokens * 12, 1), random(12 * cols, 2));
        let (own, sizes) = (random(tokens * cols, 3), random(cols, 4));
        let mut x = Matrix::zeros(tokens, cols);
        let (hidden, mix) = (View::of(&hidden, tokens, 12), View::of(&mix, 12, cols));
        matmul(Threads::All, x.view_mut(), false, 1.0, Side::N(hidden), Side::N(mix));
        let sizes = sizes.iter().map(|s| (3.0 * s).exp()).collect::<Vec<_>>();
        x.chunks_exact_mut(cols).zip(own.chunks_exact(cols)).for_each(|(x, own)| {
            x.iter_mut().zip(own).zip(&sizes).for_each(|((x, own), size)| *x = size * (*x + 0.3 * own));
        });
        x
    }

    fn gram(x: &Matrix) -> Matrix {
        let mut gram = Matrix::zeros(x.cols(), x.cols());
        matmul(Threads::All, gram.view_mut(), false, 1.0, Side::T(x.view()), Side::N(x.view()));
        gram
    }

    /// Mean square of what `x (W - Q)ᵀ` differs from 0 by.
    fn change(x: &Matrix, values: &[f32], quantized: &Quantized) -> f64 {
        let mut decoded = vec![0.0; values.len()];
        quantized.dequantize_into(&mut decoded).unwrap();
        let error: Vec<f32> = values.iter().zip(&decoded).map(|(a, b)| a - b).collect();
        let mut out = Matrix::zeros(x.rows(), quantized.rows);
        let error = View::of(&error, quantized.rows, quantized.cols);
        matmul(Threads::All, out.view_mut(), false, 1.0, Side::N(x.view()), Side::T(error));
        out.iter().map(|v| f64::from(v * v)).sum::<f64>() / out.len() as f64
    }

    #[test]
    fn the_factor_gives_the_matrix_back() {
        for n in [1, 5, 64, 65, 200] {
            let mut all = gram(&inputs(2 * n, n));
            (0..n).for_each(|i| all[i * n + i] += 0.1);
            let mut factor = all.to_vec();
            assert!(cholesky(&mut factor, n), "{n}");
            for i in 0..n {
                for j in 0..=i {
                    let [a, b] = [i, j].map(|row| &factor[row * n..][..=j]);
                    let sum: f64 = a.iter().zip(b).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum();
                    let scale = (all[i * n + i] * all[j * n + j]).sqrt();
                    assert!((sum - f64::from(all[i * n + j])).abs() <= 1e-5 * f64::from(scale), "{n}: {i}, {j}");
                }
            }
        }
        assert!(!cholesky(&mut [1.0, 0.0, 2.0, 1.0], 2));
        assert!(!cholesky(&mut [f32::NAN], 1));
    }

    #[test]
    fn the_product_changes_less_than_with_the_nearest_codes() {
        for (rows, cols) in [(40, 192), (41, 75)] {
            changes_less(rows, cols);
        }
    }

    fn changes_less(rows: usize, cols: usize) {
        let (x, values) = (inputs(600, cols), random(rows * cols, 5));
        let inputs = Inputs::new(&gram(&x)).unwrap();
        for (kind, double) in [(Kind4::Nf4, false), (Kind4::Nf4, true), (Kind4::Fp4, false), (Kind4::Fp4, true)] {
            let nearest = Quantized::quantize(&values, rows, cols, kind, double).unwrap();
            let (before, after) =
                (change(&x, &values, &nearest), change(&x, &values, &inputs.quantize(&values, kind, double)));
            assert!(after < 0.35 * before, "{kind:?} {double}: {before} to {after}");
        }
    }

    /// Every element alone: no choice is better for the product, all others given, than by what was left to make up for it.
    #[test]
    fn each_code_is_the_best_given_those_before_it() {
        let (rows, cols) = (3, 128);
        let (x, mut values) = (inputs(400, cols), random(rows * cols, 6));
        values[..QUANT_BLOCK].fill(0.0);
        values[QUANT_BLOCK] = 40.0;
        let inputs = Inputs::new(&gram(&x)).unwrap();
        [false, true].iter().for_each(|double| each_code_is_best(&inputs, &values, rows, *double));
    }

    fn each_code_is_best(inputs: &Inputs, values: &[f32], rows: usize, double: bool) {
        let cols = values.len() / rows;
        let quantized = inputs.quantize(values, Kind4::Nf4, double);
        let mut decoded = vec![0.0; values.len()];
        quantized.dequantize_into(&mut decoded).unwrap();
        for row in 0..rows {
            let at = |place: usize| row * cols + inputs.order[place];
            let error = |place: usize| f64::from(values[at(place)] - decoded[at(place)]);
            for i in 0..cols {
                let l = |j: usize| f64::from(inputs.factor[j * cols + i]);
                let made_up: f64 = (i + 1..cols).map(|j| l(j) * error(j)).sum::<f64>() / l(i);
                let scale = f64::from(quantized.absmax.get(at(i) / QUANT_BLOCK));
                let target = f64::from(values[at(i)]) + made_up;
                let off = |level: f32| (target - f64::from(level) * scale).abs();
                let least = Kind4::Nf4.levels().iter().map(|l| off(*l)).fold(f64::INFINITY, f64::min);
                let got = (target - f64::from(decoded[at(i)])).abs();
                assert!(got <= least + 1e-4 * scale.abs(), "row {row}, place {i}: {got} for {least}");
            }
        }
    }

    #[test]
    fn inputs_that_do_not_hang_together_leave_the_nearest_codes() {
        let (rows, cols) = (8, 128);
        let mut values = random(rows * cols, 7);
        values[..QUANT_BLOCK].fill(0.0);
        let mut one = Matrix::zeros(cols, cols);
        (0..cols).for_each(|i| one[i * cols + i] = 1.0);
        let quantized = Inputs::new(&one).unwrap().quantize(&values, Kind4::Nf4, false);
        let mut decoded = vec![0.0; values.len()];
        quantized.dequantize_into(&mut decoded).unwrap();
        for (at, (value, decoded)) in values.iter().zip(&decoded).enumerate() {
            let scale = quantized.absmax.get(at / QUANT_BLOCK);
            let off = Kind4::Nf4.levels().iter().map(|l| (value - l * scale).abs()).fold(f32::INFINITY, f32::min);
            assert!((value - decoded).abs() <= off + 1e-6, "{value} became {decoded}");
        }
    }

    #[test]
    fn inputs_of_zero_and_numbers_that_are_none() {
        let cols = 64;
        let values = random(cols, 8);
        let quantized = Inputs::new(&Matrix::zeros(cols, cols)).unwrap().quantize(&values, Kind4::Nf4, false);
        let nearest = Quantized::quantize(&values, 1, cols, Kind4::Nf4, false).unwrap();
        let mut one = Matrix::zeros(cols, cols);
        (0..cols).for_each(|i| one[i * cols + i] = 1.0);
        // Where no input says more than another, the scale alone is better.
        assert!(change(&one, &values, &quantized) <= change(&one, &values, &nearest));
        let mut gram = Matrix::zeros(cols, cols);
        gram[0] = f32::NAN;
        assert!(Inputs::new(&gram).is_none());
    }
}
