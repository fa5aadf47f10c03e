//! Frozen matrices in device memory and their products; `weight` has them on the host. A quantized matrix is decoded some
//! rows at a time into a scratch, of which cuBLAS takes the product.

use super::device::{Buffer, Constant, Device, Dtype, Operand, Product, int, long};
use super::matrix::{Matrix, View};
use super::nf4::{Absmax, Kind4, nested_code};
use super::quantized::Codes;
use super::weight::Data;
use half::{bf16, f16};
use std::ops::Range;
use std::sync::Arc;

/// Elements that are decoded at a time: 64 MB of bf16, enough rows for a product to fill the device.
const PANEL: usize = 32 << 20;

/// Consecutive rows of a matrix in 4 bits, quantized by themselves.
#[derive(Debug, Clone)]
struct Four {
    kind: Kind4,
    rows: usize,
    packed: Buffer,
    /// Scales, or with double quantization the scales of their codes.
    absmax: Buffer,
    /// Codes of the scales, and their mean.
    double: Option<(Buffer, f32)>,
}

#[derive(Debug, Clone)]
enum Kept {
    Whole(Buffer),
    Four(Vec<Four>, Arc<Constant<f32>>),
    Int8 { codes: Buffer, absmax: Buffer },
}

/// A frozen (rows, cols) = (out, in) matrix in device memory, whose products are of type `dtype`.
#[derive(Debug, Clone)]
pub struct Resident {
    device: Device,
    dtype: Dtype,
    rows: usize,
    cols: usize,
    kept: Kept,
}

fn bytes_of(data: &Data, dtype: Dtype) -> Vec<u8> {
    fn collect<const N: usize>(values: impl Iterator<Item = [u8; N]>) -> Vec<u8> {
        values.flatten().collect()
    }
    match (data, dtype) {
        (Data::F32(v), Dtype::F32) => collect(v.iter().map(|v| v.to_le_bytes())),
        (Data::F32(v), Dtype::Bf16) => collect(v.iter().map(|v| bf16::from_f32(*v).to_le_bytes())),
        (Data::F32(v), Dtype::F16) => collect(v.iter().map(|v| f16::from_f32(*v).to_le_bytes())),
        (Data::Bf16(v), Dtype::F32) => collect(v.iter().map(|v| v.to_f32().to_le_bytes())),
        (Data::Bf16(v), Dtype::Bf16) => collect(v.iter().map(|v| v.to_le_bytes())),
        (Data::Bf16(v), Dtype::F16) => collect(v.iter().map(|v| f16::from_f32(v.to_f32()).to_le_bytes())),
        (Data::F16(v), Dtype::F32) => collect(v.iter().map(|v| v.to_f32().to_le_bytes())),
        (Data::F16(v), Dtype::Bf16) => collect(v.iter().map(|v| bf16::from_f32(v.to_f32()).to_le_bytes())),
        (Data::F16(v), Dtype::F16) => collect(v.iter().map(|v| v.to_le_bytes())),
    }
}

fn float_bytes(values: &[f32]) -> Vec<u8> {
    values.iter().flat_map(|v| v.to_le_bytes()).collect()
}

impl Resident {
    /// A matrix of whole elements, kept as `dtype`.
    #[must_use]
    pub fn whole(device: &Device, dtype: Dtype, rows: usize, cols: usize, data: &Data) -> Self {
        let kept = Kept::Whole(device.upload(&bytes_of(data, dtype)));
        Self { device: device.clone(), dtype, rows, cols, kept }
    }

    /// A matrix in few bits, whose rows are those of `parts` one after another; its products are of type `dtype`.
    ///
    /// # Panics
    /// When the parts are of different kinds.
    #[must_use]
    pub fn quantized(device: &Device, dtype: Dtype, rows: usize, cols: usize, parts: &[&Codes]) -> Self {
        let upload = |bytes: &[u8]| device.upload(bytes);
        let mut four = Vec::new();
        let (mut all_codes, mut all_absmax) = (Vec::new(), Vec::new());
        for part in parts {
            match part {
                Codes::Four(q) => {
                    let (absmax, double) = match &q.absmax {
                        Absmax::Plain(absmax) => (absmax, None),
                        Absmax::Double { codes, nested_absmax, offset } => {
                            (nested_absmax, Some((upload(codes), *offset)))
                        }
                    };
                    let (packed, absmax) = (upload(&q.packed), upload(&float_bytes(absmax)));
                    four.push(Four { kind: q.kind, rows: q.rows, packed, absmax, double });
                }
                Codes::Int8 { codes, absmax, .. } => {
                    all_codes.extend(codes.iter().map(|c| c.cast_unsigned()));
                    all_absmax.extend_from_slice(absmax);
                }
            }
        }
        assert!(four.is_empty() || all_codes.is_empty(), "a matrix is quantized in one way");
        let kept = if four.is_empty() {
            Kept::Int8 { codes: upload(&all_codes), absmax: upload(&float_bytes(&all_absmax)) }
        } else {
            Kept::Four(four, Arc::new(nested_code().to_vec().into()))
        };
        Self { device: device.clone(), dtype, rows, cols, kept }
    }

    /// Where it is, and the type of its products.
    #[must_use]
    pub fn place(&self) -> (&Device, Dtype) {
        (&self.device, self.dtype)
    }

    /// Whether it is kept in few bits.
    #[must_use]
    pub fn is_quantized(&self) -> bool {
        !matches!(self.kept, Kept::Whole(_))
    }

    /// Bytes of memory.
    #[must_use]
    pub fn bytes(&self) -> usize {
        match &self.kept {
            Kept::Whole(buffer) => buffer.bytes(),
            Kept::Int8 { codes, absmax } => codes.bytes() + absmax.bytes(),
            Kept::Four(parts, _) => {
                let double = |p: &Four| p.double.as_ref().map_or(0, |d| d.0.bytes());
                parts.iter().map(|p| p.packed.bytes() + p.absmax.bytes() + double(p)).sum()
            }
        }
    }

    /// Some rows, decoded or as they are.
    ///
    /// # Shapes
    /// Returns (rows, in).
    #[must_use]
    pub fn rows(&self, rows: Range<usize>) -> Matrix {
        let out = Matrix::new_on(&self.device, self.dtype, rows.len(), self.cols);
        self.decode(rows, out.pointer());
        out
    }

    /// The rows of some ids.
    ///
    /// # Shapes
    /// `ids`: (T); returns (T, in).
    ///
    /// # Panics
    /// When it is quantized.
    #[must_use]
    pub fn gather(&self, ids: &Constant<u32>) -> Matrix {
        let Kept::Whole(table) = &self.kept else { unreachable!("an embedding is not quantized") };
        let out = Matrix::new_on(&self.device, self.dtype, ids.len(), self.cols);
        let args = [table.into(), ids.on(&self.device).into(), out.pointer().into(), int(self.cols)];
        self.device.launch("gather_rows", Some(self.dtype), [ids.len(), 1, 1], [128, 1], 0, &args);
        out
    }

    fn decode(&self, rows: Range<usize>, to: u64) {
        let n = rows.len() * self.cols;
        let address = |row: usize| to + ((row - rows.start) * self.cols * self.dtype.size()) as u64;
        match &self.kept {
            Kept::Whole(table) => {
                let from = table.pointer() + (rows.start * self.cols * self.dtype.size()) as u64;
                let args = [from.into(), to.into(), long(n), 1f32.into(), int(0)];
                self.device.launch_over("add", Some(self.dtype), n, &args);
            }
            Kept::Int8 { codes, absmax } => {
                let args = [codes.into(), absmax.into(), to.into(), long(rows.start), int(self.cols)];
                self.device.launch("int8_dequantize", Some(self.dtype), [rows.len(), 1, 1], [128, 1], 0, &args);
            }
            Kept::Four(parts, nested) => {
                let mut first = 0;
                for part in parts {
                    let here = rows.start.max(first)..rows.end.min(first + part.rows);
                    if !here.is_empty() {
                        let within = here.start - first..here.end - first;
                        self.decode_four(part, within, address(here.start), nested);
                    }
                    first += part.rows;
                }
            }
        }
    }

    fn decode_four(&self, part: &Four, rows: Range<usize>, to: u64, nested: &Constant<f32>) {
        let (first, n) = (rows.start * self.cols, rows.len() * self.cols);
        let kind = int(usize::from(part.kind == Kind4::Fp4));
        let (packed, absmax) = ((&part.packed).into(), (&part.absmax).into());
        // Eight values a thread, and enough blocks for every multiprocessor to have some.
        let grid = [n.div_ceil(8 * 256).clamp(1, 16_384), 1, 1];
        match &part.double {
            None => {
                let args = [packed, absmax, to.into(), long(first), long(n), kind];
                self.device.launch("nf4_dequantize", Some(self.dtype), grid, [256, 1], 0, &args);
            }
            Some((codes, offset)) => {
                let nested = nested.on(&self.device).into();
                let args =
                    [packed, codes.into(), absmax, nested, (*offset).into(), to.into(), long(first), long(n), kind];
                self.device.launch("nf4_dequantize_double", Some(self.dtype), grid, [256, 1], 0, &args);
            }
        }
    }

    /// Calls `each` with rows and their elements until all rows were given: at once, or decoded a panel at a time.
    fn each_panel(&self, mut each: impl FnMut(Range<usize>, Operand)) {
        let operand = |pointer| Operand { pointer, stride: self.cols, dtype: self.dtype, transposed: false };
        if let Kept::Whole(table) = &self.kept {
            return each(0..self.rows, operand(table.pointer()));
        }
        let panel = (PANEL / self.cols.max(1)).clamp(1, self.rows.max(1));
        let scratch = self.device.allocate(panel * self.cols * self.dtype.size());
        for from in (0..self.rows).step_by(panel) {
            let rows = from..(from + panel).min(self.rows);
            self.decode(rows.clone(), scratch.pointer());
            each(rows, operand(scratch.pointer()));
        }
    }

    /// `y = x Wᵀ`, added to `y` where `accumulate`.
    ///
    /// # Shapes
    /// `x`: (T, in); `y`: (T, out).
    pub fn forward(&self, x: View<'_>, y: &mut Matrix, accumulate: bool) {
        self.each_panel(|rows, w| {
            let out = operand(y.columns(rows.clone()));
            let (m, n, k) = (x.rows, rows.len(), self.cols);
            let rhs = Operand { transposed: true, ..w };
            self.device.product(&Product { m, n, k, alpha: 1.0, accumulate, out, lhs: operand(x), rhs });
        });
    }

    /// `dx = dy W`, added to `dx` where `accumulate`.
    ///
    /// # Shapes
    /// `dy`: (T, out); `dx`: (T, in).
    pub fn backward(&self, dy: View<'_>, dx: &mut Matrix, accumulate: bool) {
        self.each_panel(|rows, rhs| {
            let (m, n, k) = (dy.rows, self.cols, rows.len());
            let accumulate = accumulate || rows.start > 0;
            let (out, lhs) = (operand(dx.view()), operand(dy.slice_cols(rows)));
            self.device.product(&Product { m, n, k, alpha: 1.0, accumulate, out, lhs, rhs });
        });
    }
}

fn operand(view: View<'_>) -> Operand {
    let dtype = view.place.expect("all of a product is on the device").1;
    Operand { pointer: view.pointer(), stride: view.stride, dtype, transposed: false }
}
