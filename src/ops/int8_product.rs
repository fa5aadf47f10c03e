//! Products of a few rows with 8-bit matrices in device memory, whose codes are multiplied as they are, by
//! `kernels/quantized.cu`: one byte a weight is read, where decoding it first moves five. For more rows `resident` decodes.

use super::device::{Arg, Device, Dtype, flag, int, long};
use super::matrix::View;

/// Rows of x up to which a product is one of decoding; `INT8_ROWS` of the kernels.
const FEW: usize = 8;
/// `INT8_WARPS` of the kernels: rows of W in a block.
const WARPS: usize = 8;

/// W (rows, cols) by its addresses, which must stay valid.
#[derive(Debug, Clone, Copy)]
pub struct Eight {
    /// Its rows.
    pub rows: usize,
    /// Elements of a row.
    pub cols: usize,
    /// Codes.
    pub codes: u64,
    /// The scale of each row.
    pub absmax: u64,
}

impl Eight {
    /// `y = x Wᵀ`, added to `y` where `accumulate`; false where it is not done, as W is to be decoded first.
    ///
    /// # Shapes
    /// `x`: (T, cols); `y`: (T, rows).
    pub fn forward(&self, device: &Device, dtype: Dtype, x: View<'_>, y: View<'_>, accumulate: bool) -> bool {
        let few = (1..=FEW).contains(&x.rows) && self.rows > 0;
        if few {
            let pointers = [self.codes, self.absmax, x.pointer(), y.pointer()].map(Arg::from);
            let sizes = [int(x.rows), int(self.rows), int(self.cols), long(x.stride), long(y.stride), flag(accumulate)];
            let args = [&pointers[..], &sizes].concat();
            device.launch("int8_product", Some(dtype), [self.rows.div_ceil(WARPS), 1, 1], [32 * WARPS, 1], 0, &args);
        }
        few
    }
}
