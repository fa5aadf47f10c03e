//! Frozen matrices in device memory and their products; `weight` has them on the host. A quantized matrix is decoded some
//! rows at a time into a scratch, of which cuBLAS takes the product; few rows of x are multiplied by its codes themselves.

use super::device::{Arg, Buffer, Constant, Device, Dtype, Operand, Product, int, long};
use super::int8_product::Eight;
use super::matrix::{Matrix, View};
use super::nf4::{Absmax, Kind4, NESTED_BLOCK, QUANT_BLOCK, nested_code};
use super::nf4_product::{Four, Fours};
use super::quantized::{Codes, Format, part_of};
use super::weight::Data;
use half::{bf16, f16};
use std::ops::Range;
use std::sync::{Arc, OnceLock};

/// Elements that are decoded at a time unless `LITGPT_DECODED_MB` says otherwise: 64 MB of bf16, enough rows for a product to
/// fill the device.
const PANEL: usize = 32 << 20;

/// Consecutive rows of a matrix of which some are in few bits, each part quantized by itself, in device memory.
#[derive(Debug, Clone)]
pub struct Part {
    rows: usize,
    /// Codes, or whole elements.
    codes: Buffer,
    scheme: Scheme,
}

#[derive(Debug, Clone)]
enum Scheme {
    /// 4 bits and their scales; with double quantization the scales of the scales' codes, these codes, and the scales' mean.
    Four { kind: Kind4, absmax: Buffer, double: Option<(Buffer, f32)> },
    /// 8 bits and their scales.
    Int8(Buffer),
    /// Elements of the type of the matrix's products.
    Whole,
}

impl Part {
    /// Copies what stays whole, as `dtype`, the type of the matrix's products.
    #[must_use]
    pub fn whole(device: &Device, dtype: Dtype, rows: usize, data: &Data) -> Self {
        Self { rows, codes: upload(device, data, dtype), scheme: Scheme::Whole }
    }

    /// Copies what was quantized on the host.
    #[must_use]
    pub fn upload(device: &Device, codes: &Codes) -> Self {
        let floats = |values: &[f32]| device.upload(bytemuck::cast_slice(values));
        match codes {
            Codes::Four(q) => {
                let (absmax, double) = match &q.absmax {
                    Absmax::Plain(absmax) => (absmax, None),
                    Absmax::Double { codes, nested_absmax, offset } => {
                        (nested_absmax, Some((device.upload(codes), *offset)))
                    }
                };
                let scheme = Scheme::Four { kind: q.kind, absmax: floats(absmax), double };
                Self { rows: q.rows, codes: device.upload(&q.packed), scheme }
            }
            Codes::Int8 { codes, absmax, .. } => Self {
                rows: absmax.len(),
                codes: device.upload(bytemuck::cast_slice(codes)),
                scheme: Scheme::Int8(floats(absmax)),
            },
        }
    }

    /// Quantizes `values`, the (rows, cols) elements of a part: 4 bits on the device, 8 bits on the host.
    #[must_use]
    pub fn quantize(device: &Device, format: Format, values: &[f32], rows: usize, cols: usize) -> Self {
        let Format::Four { kind, double } = format else {
            return Self::upload(device, &Codes::new(format, values, rows, cols));
        };
        let n = values.len();
        let blocks = n.div_ceil(QUANT_BLOCK);
        let x = device.upload(bytemuck::cast_slice(values));
        let (codes, absmax) = (device.allocate(n.div_ceil(2)), device.allocate(blocks * 4));
        let args = [(&x).into(), (&codes).into(), (&absmax).into(), long(n), Fours::code_of(kind)];
        device.launch("nf4_quantize_f32", None, [blocks.div_ceil(8).min(16_384), 1, 1], [256, 1], 0, &args);
        if !double {
            return Self { rows, codes, scheme: Scheme::Four { kind, absmax, double: None } };
        }
        let mean = device.allocate(4);
        let args = [(&absmax).into(), (&mean).into(), long(blocks)];
        device.launch("nf4_absmax_mean", None, [1, 1, 1], [256, 1], 0, &args);
        let nested_blocks = blocks.div_ceil(NESTED_BLOCK);
        let (scale_codes, nested_absmax) = (device.allocate(blocks), device.allocate(nested_blocks * 4));
        let nested = device.upload(bytemuck::cast_slice(nested_code().as_slice()));
        let args = [&absmax, &mean, &nested, &scale_codes, &nested_absmax].map(Arg::from);
        let args = [&args[..], &[long(blocks)]].concat();
        device.launch("nf4_quantize_absmax", None, [nested_blocks, 1, 1], [NESTED_BLOCK, 1], 0, &args);
        let mut offset = [0; 4];
        mean.read(&mut offset);
        let double = Some((scale_codes, f32::from_le_bytes(offset)));
        Self { rows, codes, scheme: Scheme::Four { kind, absmax: nested_absmax, double } }
    }

    /// Its kind and addresses, where it is in 4 bits.
    fn four(&self) -> Option<(Kind4, Four)> {
        let Scheme::Four { kind, absmax, double } = &self.scheme else { return None };
        let (codes, offset) = double.as_ref().map_or((0, 0.0), |(codes, offset)| (codes.pointer(), *offset));
        Some((*kind, Four { rows: self.rows, packed: self.codes.pointer(), absmax: absmax.pointer(), codes, offset }))
    }

    fn bytes(&self) -> usize {
        let scales = match &self.scheme {
            Scheme::Four { absmax, double, .. } => {
                absmax.bytes() + double.as_ref().map_or(0, |(codes, _)| codes.bytes())
            }
            Scheme::Int8(absmax) => absmax.bytes(),
            Scheme::Whole => 0,
        };
        self.codes.bytes() + scales
    }
}

#[derive(Debug, Clone)]
enum Kept {
    Whole(Buffer),
    Parts(Arc<Parts>),
}

/// The rows of one matrix, in order.
#[derive(Debug)]
struct Parts {
    list: Vec<Part>,
    /// The code book of double quantization.
    nested: Arc<Constant<f32>>,
    /// Rows that are multiplied at once, with their codes where these have products: all of `list` where it is in 4 bits of one
    /// kind, else each part by itself.
    runs: Vec<(Range<usize>, Option<Fused>)>,
}

/// Rows whose codes are multiplied as they are.
#[derive(Debug)]
enum Fused {
    Four(Fours),
    Eight(Eight),
}

impl Fused {
    /// As [`Fours::forward`].
    fn forward(&self, device: &Device, dtype: Dtype, x: View<'_>, y: View<'_>, accumulate: bool) -> bool {
        match self {
            Self::Four(fours) => fours.forward(device, dtype, x, y, accumulate),
            Self::Eight(eight) => eight.forward(device, dtype, x, y, accumulate),
        }
    }

    /// As [`Fours::backward`].
    fn backward(&self, device: &Device, dtype: Dtype, dy: View<'_>, dx: View<'_>, accumulate: bool) -> bool {
        match self {
            Self::Four(fours) => fours.backward(device, dtype, dy, dx, accumulate),
            Self::Eight(_) => false,
        }
    }
}

impl Parts {
    fn new(list: Vec<Part>, cols: usize) -> Self {
        let nested = Arc::new(Constant::from(nested_code().to_vec()));
        let run = |parts: &[Part]| {
            if let [Part { rows, codes, scheme: Scheme::Int8(absmax) }] = parts {
                let (codes, absmax) = (codes.pointer(), absmax.pointer());
                return Some(Fused::Eight(Eight { rows: *rows, cols, codes, absmax }));
            }
            let fours = parts.iter().map(Part::four).collect::<Option<Vec<_>>>()?;
            let kind = fours.first().map(|four| four.0).filter(|kind| fours.iter().all(|four| four.0 == *kind))?;
            let addresses = fours.into_iter().map(|four| four.1).collect();
            Some(Fused::Four(Fours::new(addresses, kind, cols, Arc::clone(&nested))))
        };
        let all = run(&list);
        let size = if all.is_some() { list.len() } else { 1 };
        let mut end = 0;
        let runs = list.chunks(size.max(1)).map(|parts| {
            let first = end;
            end += parts.iter().map(|part| part.rows).sum::<usize>();
            (first..end, run(parts))
        });
        let runs = runs.collect();
        Self { list, nested, runs }
    }
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

fn upload(device: &Device, data: &Data, dtype: Dtype) -> Buffer {
    fn converted<T, U: bytemuck::NoUninit>(device: &Device, values: &[T], convert: impl Fn(&T) -> U) -> Buffer {
        device.upload(bytemuck::cast_slice(&values.iter().map(convert).collect::<Vec<U>>()))
    }
    match (data, dtype) {
        (Data::F32(v), Dtype::F32) => device.upload(bytemuck::cast_slice(v)),
        (Data::Bf16(v), Dtype::Bf16) => device.upload(bytemuck::cast_slice(v)),
        (Data::F16(v), Dtype::F16) => device.upload(bytemuck::cast_slice(v)),
        (Data::F32(v), Dtype::Bf16) => converted(device, v, |v| bf16::from_f32(*v)),
        (Data::F32(v), Dtype::F16) => converted(device, v, |v| f16::from_f32(*v)),
        (Data::Bf16(v), Dtype::F32) => converted(device, v, |v| v.to_f32()),
        (Data::Bf16(v), Dtype::F16) => converted(device, v, |v| f16::from_f32(v.to_f32())),
        (Data::F16(v), Dtype::F32) => converted(device, v, |v| v.to_f32()),
        (Data::F16(v), Dtype::Bf16) => converted(device, v, |v| bf16::from_f32(v.to_f32())),
    }
}

/// Elements that are decoded at a time.
fn decoded_at_a_time() -> usize {
    static ELEMENTS: OnceLock<usize> = OnceLock::new();
    *ELEMENTS.get_or_init(|| {
        let megabytes = std::env::var("LITGPT_DECODED_MB").ok().and_then(|value| value.parse::<usize>().ok());
        megabytes.map_or(PANEL, |megabytes| megabytes << 19)
    })
}

impl Resident {
    /// A matrix of whole elements, kept as `dtype`.
    #[must_use]
    pub fn whole(device: &Device, dtype: Dtype, rows: usize, cols: usize, data: &Data) -> Self {
        let kept = Kept::Whole(upload(device, data, dtype));
        Self { device: device.clone(), dtype, rows, cols, kept }
    }

    /// A matrix in few bits, whose rows are those of `parts` one after another; its products are of type `dtype`.
    #[must_use]
    pub fn quantized(device: &Device, dtype: Dtype, cols: usize, parts: Vec<Part>) -> Self {
        let rows = parts.iter().map(|part| part.rows).sum();
        let kept = Kept::Parts(Arc::new(Parts::new(parts, cols)));
        Self { device: device.clone(), dtype, rows, cols, kept }
    }

    /// (out, in).
    #[must_use]
    pub fn shape(&self) -> (usize, usize) {
        (self.rows, self.cols)
    }

    /// Where it is, and the type of its products.
    #[must_use]
    pub fn place(&self) -> (&Device, Dtype) {
        (&self.device, self.dtype)
    }

    /// Whether the row is kept in few bits.
    #[must_use]
    pub fn is_quantized(&self, row: usize) -> bool {
        let Kept::Parts(parts) = &self.kept else { return false };
        part_of(&parts.list, row, |part| part.rows).is_some_and(|part| !matches!(part.scheme, Scheme::Whole))
    }

    /// Rows that are multiplied at once, and what they are multiplied by where that is their codes.
    fn runs(&self) -> impl Iterator<Item = (Range<usize>, Option<&Fused>)> {
        let runs = if let Kept::Parts(parts) = &self.kept { parts.runs.as_slice() } else { &[] };
        let whole = runs.is_empty().then_some((0..self.rows, None));
        runs.iter().map(|(rows, fused)| (rows.clone(), fused.as_ref())).chain(whole)
    }

    /// Bytes of memory.
    #[must_use]
    pub fn bytes(&self) -> usize {
        match &self.kept {
            Kept::Whole(buffer) => buffer.bytes(),
            Kept::Parts(parts) => parts.list.iter().map(Part::bytes).sum(),
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
        let address = |row: usize| to + ((row - rows.start) * self.cols * self.dtype.size()) as u64;
        match &self.kept {
            Kept::Whole(table) => self.copy(table, rows, to),
            Kept::Parts(parts) => {
                let mut first = 0;
                for part in &parts.list {
                    let here = rows.start.max(first)..rows.end.min(first + part.rows);
                    if !here.is_empty() {
                        self.decode_part(
                            part,
                            here.start - first..here.end - first,
                            address(here.start),
                            &parts.nested,
                        );
                    }
                    first += part.rows;
                }
            }
        }
    }

    /// Copies some rows of whole elements.
    fn copy(&self, elements: &Buffer, rows: Range<usize>, to: u64) {
        let (first, n) = (rows.start * self.cols, rows.len() * self.cols);
        let from = elements.pointer() + (first * self.dtype.size()) as u64;
        let args = [from.into(), to.into(), long(n), 1f32.into(), int(0)];
        self.device.launch_over("add", Some(self.dtype), n, &args);
    }

    fn decode_part(&self, part: &Part, rows: Range<usize>, to: u64, nested: &Constant<f32>) {
        let (first, n) = (rows.start * self.cols, rows.len() * self.cols);
        let (codes, out) = ((&part.codes).into(), to.into());
        // Eight values a thread, and enough blocks for every multiprocessor to have some.
        let grid = [n.div_ceil(8 * 256).clamp(1, 16_384), 1, 1];
        match &part.scheme {
            Scheme::Whole => self.copy(&part.codes, rows, to),
            Scheme::Int8(absmax) => {
                let args = [codes, absmax.into(), out, long(rows.start), int(self.cols)];
                self.device.launch("int8_dequantize", Some(self.dtype), [rows.len(), 1, 1], [128, 1], 0, &args);
            }
            Scheme::Four { kind, absmax, double: None } => {
                let args = [codes, absmax.into(), out, long(first), long(n), Fours::code_of(*kind)];
                self.device.launch("nf4_dequantize", Some(self.dtype), grid, [256, 1], 0, &args);
            }
            Scheme::Four { kind, absmax, double: Some((scale_codes, offset)) } => {
                let nested = nested.on(&self.device).into();
                let scales = [scale_codes.into(), absmax.into(), nested, (*offset).into()];
                let args = [&[codes][..], &scales, &[out, long(first), long(n), Fours::code_of(*kind)]].concat();
                self.device.launch("nf4_dequantize_double", Some(self.dtype), grid, [256, 1], 0, &args);
            }
        }
    }

    /// Calls `each` with rows and their elements until all of `rows` were given: at once, or decoded a panel at a time.
    fn each_panel(&self, rows: Range<usize>, mut each: impl FnMut(Range<usize>, Operand)) {
        let operand = |pointer| Operand { pointer, stride: self.cols, dtype: self.dtype, transposed: false };
        if let Kept::Whole(table) = &self.kept {
            return each(rows, operand(table.pointer()));
        }
        // Panels begin where cuBLAS's fastest products want the columns of y to begin.
        let panel = (decoded_at_a_time() / self.cols.max(1) / 128 * 128).max(128).min(rows.len().max(1));
        let scratch = self.device.allocate(panel * self.cols * self.dtype.size());
        for from in rows.clone().step_by(panel) {
            let rows = from..(from + panel).min(rows.end);
            self.decode(rows.clone(), scratch.pointer());
            each(rows, operand(scratch.pointer()));
        }
    }

    /// `y = x Wᵀ`, added to `y` where `accumulate`.
    ///
    /// # Shapes
    /// `x`: (T, in); `y`: (T, out).
    pub fn forward(&self, x: View<'_>, y: &mut Matrix, accumulate: bool) {
        for (rows, fused) in self.runs() {
            let out = y.columns(rows.clone());
            if fused.is_some_and(|f| f.forward(&self.device, self.dtype, x, out, accumulate)) {
                continue;
            }
            self.each_panel(rows, |rows, w| {
                let out = operand(y.columns(rows.clone()));
                let (m, n, k) = (x.rows, rows.len(), self.cols);
                let rhs = Operand { transposed: true, ..w };
                self.device.product(&Product { m, n, k, alpha: 1.0, accumulate, out, lhs: operand(x), rhs });
            });
        }
    }

    /// `dx = dy W`, added to `dx` where `accumulate`.
    ///
    /// # Shapes
    /// `dy`: (T, out); `dx`: (T, in).
    pub fn backward(&self, dy: View<'_>, dx: &mut Matrix, accumulate: bool) {
        for (rows, fused) in self.runs() {
            let (accumulate, part) = (accumulate || rows.start > 0, dy.slice_cols(rows.clone()));
            if fused.is_some_and(|f| f.backward(&self.device, self.dtype, part, dx.view(), accumulate)) {
                continue;
            }
            self.each_panel(rows.clone(), |panel, rhs| {
                let (m, n, k) = (dy.rows, self.cols, panel.len());
                let accumulate = accumulate || panel.start > rows.start;
                let (out, lhs) = (operand(dx.view()), operand(dy.slice_cols(panel)));
                self.device.product(&Product { m, n, k, alpha: 1.0, accumulate, out, lhs, rhs });
            });
        }
    }
}

fn operand(view: View<'_>) -> Operand {
    let dtype = view.place.expect("all of a product is on the device").1;
    Operand { pointer: view.pointer(), stride: view.stride, dtype, transposed: false }
}
