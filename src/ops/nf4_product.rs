//! Products with 4-bit matrices in device memory whose codes are decoded where they are multiplied, by
//! `kernels/nf4_product.cu`. To decode a matrix first moves nine times its bytes, which for a few hundred tokens takes longer
//! than the product; for many more tokens cuBLAS is faster on a decoded one, and `resident` decodes it.

use super::device::{Arg, COUNTERS, Constant, Device, Dtype, flag, fused_tokens, int, long};
use super::matrix::View;
use super::nf4::{Kind4, QUANT_BLOCK};
use std::sync::{Arc, LazyLock};

/// Rows of x up to which a forward product is one of decoding; `PRODUCT_ROWS` of the kernels.
const FEW: usize = 8;
/// Tokens up to which codes are decoded within the product, unless `LITGPT_FUSED_NF4` says otherwise. An estimate from rates of memory and tensor cores until it is
/// measured: on an H100 decoding costs what some 500 tokens lose without cuBLAS.
static FUSED_TOKENS: LazyLock<usize> = LazyLock::new(|| fused_tokens("NF4", 512));

/// `SIDE` of the kernels: tokens and columns of y in a tile, and what is summed over in a stage.
const SIDE: usize = 128;
/// `MANY_SHARED` of the kernels, bytes.
const SHARED: usize = 2 * (SIDE * SIDE * 2 + SIDE * SIDE / 2 + 2 * SIDE * 4);
/// Most shares that a sum is cut into.
const SHARES: usize = 4;

/// The addresses of one matrix.
#[derive(Debug, Clone, Copy)]
pub struct Four {
    /// Its rows.
    pub rows: usize,
    /// Codes.
    pub packed: u64,
    /// Scales, or with double quantization the scales of their codes.
    pub absmax: u64,
    /// Codes of the scales, or 0.
    pub codes: u64,
    /// Mean of the scales, with double quantization.
    pub offset: f32,
}

/// W (rows, cols), whose rows are those of some matrices one after another, each quantized by itself.
#[derive(Debug)]
pub struct Fours {
    matrices: Vec<Four>,
    kind: Kind4,
    cols: usize,
    /// The code book of double quantization.
    nested: Arc<Constant<f32>>,
    /// `matrices` as the kernels' `Rows4`.
    table: Constant<u64>,
}

impl Fours {
    /// The matrices of these addresses, which must stay valid; `nested` is the code book of double quantization.
    #[must_use]
    pub fn new(mut matrices: Vec<Four>, kind: Kind4, cols: usize, nested: Arc<Constant<f32>>) -> Self {
        matrices.retain(|four| four.rows > 0);
        let entry = |four: &Four| {
            let numbers = u64::from(four.offset.to_bits()) | (four.rows as u64) << 32;
            [four.packed, four.absmax, four.codes, numbers]
        };
        let table = matrices.iter().flat_map(entry).collect();
        Self { matrices, kind, cols, nested, table }
    }

    /// As `kernels/nf4.cu` numbers it.
    #[must_use]
    pub fn code_of(kind: Kind4) -> Arg {
        int(usize::from(kind == Kind4::Fp4))
    }

    /// `y = x Wᵀ`, added to `y` where `accumulate`; false where it is not done, as W is to be decoded first.
    ///
    /// # Shapes
    /// `x`: (T, cols); `y`: (T, rows).
    pub fn forward(&self, device: &Device, dtype: Dtype, x: View<'_>, y: View<'_>, accumulate: bool) -> bool {
        if (1..=FEW).contains(&x.rows) {
            let mut first = 0;
            for four in &self.matrices {
                self.few(device, dtype, four, x, y.slice_cols(first..first + four.rows), accumulate);
                first += four.rows;
            }
            return true;
        }
        let fits = self.fits(dtype, x);
        if fits {
            let tiles = self.matrices.iter().map(|four| four.rows.div_ceil(SIDE)).sum();
            let stages = self.cols.div_ceil(SIDE);
            self.many(device, dtype, ("nf4_product_many", tiles, stages), x, y, accumulate);
        }
        fits
    }

    /// `dx = dy W`, added to `dx` where `accumulate`; false where it is not done, as W is to be decoded first.
    ///
    /// # Shapes
    /// `dy`: (T, rows); `dx`: (T, cols).
    pub fn backward(&self, device: &Device, dtype: Dtype, dy: View<'_>, dx: View<'_>, accumulate: bool) -> bool {
        let fits = self.fits(dtype, dy) && self.matrices.iter().all(|four| four.rows.is_multiple_of(8));
        if fits {
            let stages = self.matrices.iter().map(|four| four.rows.div_ceil(SIDE)).sum();
            let tiles = self.cols.div_ceil(SIDE);
            self.many(device, dtype, ("nf4_product_many_backward", tiles, stages), dy, dx, accumulate);
        }
        fits
    }

    fn fits(&self, dtype: Dtype, x: View<'_>) -> bool {
        let tokens = 1..=*FUSED_TOKENS;
        !self.matrices.is_empty()
            && dtype != Dtype::F32
            && self.cols.is_multiple_of(QUANT_BLOCK)
            && tokens.contains(&x.rows)
            && in_sixteens(x)
    }

    fn few(&self, device: &Device, dtype: Dtype, four: &Four, x: View<'_>, y: View<'_>, accumulate: bool) {
        let nested = if four.codes == 0 { 0 } else { self.nested.on(device) };
        let matrix = [four.packed, four.absmax, four.codes, nested].map(Arg::from);
        let shape =
            [four.offset.into(), x.pointer().into(), y.pointer().into(), int(x.rows), int(four.rows), int(self.cols)];
        let rest = [long(x.stride), long(y.stride), flag(accumulate), Self::code_of(self.kind)];
        let tensor_cores = dtype != Dtype::F32 && self.cols.is_multiple_of(32) && in_sixteens(x);
        let (kernel, rows) = if tensor_cores { ("nf4_product_mma", 16) } else { ("nf4_product", 8) };
        let grid = [four.rows.div_ceil(rows), 1, 1];
        device.launch(kernel, Some(dtype), grid, [256, 1], 0, &[&matrix[..], &shape, &rest].concat());
    }

    /// A product with `tiles` of columns of y, each the sum of `stages`.
    fn many(
        &self,
        device: &Device,
        dtype: Dtype,
        (kernel, tiles, stages): (&str, usize, usize),
        x: View<'_>,
        y: View<'_>,
        accumulate: bool,
    ) {
        let token_tiles = x.rows.div_ceil(SIDE);
        let tile_tokens = x.rows.div_ceil(token_tiles).next_multiple_of(16);
        let shares = shares(token_tiles * tiles, stages, y.rows * y.cols, device.processors());
        let (partial, done) = if shares > 1 {
            (device.allocate(shares * y.rows * y.cols * 4), device.counters())
        } else {
            (device.allocate(0), 0)
        };
        let nested = if self.matrices.iter().all(|four| four.codes == 0) { 0 } else { self.nested.on(device) };
        let rows = self.matrices.iter().map(|four| four.rows).sum();
        let pointers = [self.table.on(device), nested, x.pointer(), y.pointer()].map(Arg::from);
        let sizes = [(&partial).into(), done.into(), int(x.rows), int(tile_tokens), int(rows), int(self.cols)];
        let rest = [long(x.stride), long(y.stride), flag(accumulate), Self::code_of(self.kind)];
        let args = [&pointers[..], &sizes, &rest].concat();
        device.launch(kernel, Some(dtype), [token_tiles, tiles, shares], [256, 1], SHARED, &args);
    }
}

/// Whether rows can be read 16 bytes at a time, of two bytes an element.
fn in_sixteens(x: View<'_>) -> bool {
    x.stride.is_multiple_of(8) && x.pointer().is_multiple_of(16)
}

/// How many shares of its stages a product is cut into, so that all of the device's processors have a tile: that which takes the
/// fewest times of a stage. A tile begins and ends in about three; to write a sum and read it again takes one for each
/// 300,000 (0.8 µs and 8 bytes each on an H100), and to add up each share about one more.
fn shares(tiles: usize, stages: usize, sums: usize, processors: usize) -> usize {
    let time = |shares: usize| {
        let rounds = (tiles * shares).div_ceil(processors.max(1));
        rounds * (stages.div_ceil(shares) + 3) + if shares > 1 { 1 + shares + shares * sums / 300_000 } else { 0 }
    };
    let most = if tiles > COUNTERS { 1 } else { SHARES.min(stages.max(1)) };
    (1..=most).min_by_key(|&shares| time(shares)).unwrap_or(1)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Llama 2 7B's at 160 tokens, two tiles, on an H100.
    #[test]
    fn sums_are_shared_where_there_are_too_few_tiles() {
        let processors = 132;
        assert_eq!(shares(2 * 32, 32, 160 * 4096, processors), 2, "o: half of them would idle");
        assert_eq!(shares(2 * 172, 32, 160 * 22_016, processors), 1, "gate and up: three rounds");
        assert_eq!(shares(32, 86, 100 * 4096, processors), 4, "down of a short sample");
        assert_eq!((shares(1, 1, 100, processors), shares(3, 0, 100, 0)), (1, 1));
    }
}
