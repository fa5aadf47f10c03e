//! The frozen matrix of a linear layer, in the dtype that it is kept in, and its two products:
//! `y = x Wᵀ` and `dx = dy W`. It never gets a gradient.
//!
//! The elements are kept once: in the panels of [`simd`] where the processor has its instructions, which both products and
//! the decoding of a single token read in memory's order, else in the checkpoint's order, (out, in). A quantized matrix is
//! decoded some rows at a time into a scratch, of which the same products are taken, or one by one for few rows. f32 elements
//! that a checkpoint has in bf16 are kept in these 16 bits, too: widened as they are read, they give the f32 model's results
//! in half its memory.

use super::device::{Constant, Device, Dtype};
use super::glu::Units;
use super::math::{dot, vectorize};
use super::matmul::{Side, Threads, ViewMut, matmul};
#[cfg(target_arch = "x86_64")]
use super::matrix::round;
use super::matrix::{Matrix, Parked, View};
use super::quantized::{Rows, part_of};
use super::resident::Resident;
#[cfg(target_arch = "x86_64")]
use super::simd;
use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};
use rayon::prelude::*;
use std::ops::Range;

/// Elements that are decoded to f32 at a time: 1 MB, which stays in the second-level cache.
const PANEL: usize = 1 << 18;

/// Rows of a batch up to which a weight is better read in its own order.
const FEW: usize = 8;

/// Half of the largest relative change of a number that is rounded to bf16.
#[cfg(target_arch = "x86_64")]
const NEGLIGIBLE: f32 = 1.0 / 512.0;

/// Elements of a frozen matrix.
#[derive(Debug, Clone)]
pub enum Data {
    /// 32 bit.
    F32(Vec<f32>),
    /// bfloat16.
    Bf16(Vec<bf16>),
    /// IEEE half.
    F16(Vec<f16>),
}

impl Data {
    fn len(&self) -> usize {
        match self {
            Self::F32(v) => v.len(),
            Self::Bf16(v) => v.len(),
            Self::F16(v) => v.len(),
        }
    }

    fn bytes(&self) -> usize {
        match self {
            Self::F32(v) => size_of_val(v.as_slice()),
            Self::Bf16(v) => size_of_val(v.as_slice()),
            Self::F16(v) => size_of_val(v.as_slice()),
        }
    }

    /// The elements from `at` on, in f32.
    fn decode(&self, at: usize, out: &mut [f32]) {
        let elements = at..at + out.len();
        match self {
            Self::F32(v) => out.copy_from_slice(&v[elements]),
            Self::Bf16(v) => v[elements].convert_to_f32_slice(out),
            Self::F16(v) => v[elements].convert_to_f32_slice(out),
        }
    }

    /// The elements of a (rows, cols) matrix in panels.
    #[cfg(target_arch = "x86_64")]
    fn packed(&self, rows: usize, cols: usize) -> Self {
        fn packed<T: Copy + Default + Send + Sync>(v: &[T], rows: usize, cols: usize) -> Vec<T> {
            let mut out = vec![T::default(); simd::packed_len(rows, cols)];
            let reader = || |row: usize, out: &mut [T]| out.copy_from_slice(&v[row * cols..][..cols]);
            simd::pack(rows, cols, reader, &mut out);
            out
        }
        match self {
            Self::F32(v) => Self::F32(packed(v, rows, cols)),
            Self::Bf16(v) => Self::Bf16(packed(v, rows, cols)),
            Self::F16(v) => Self::F16(packed(v, rows, cols)),
        }
    }

    #[cfg(target_arch = "x86_64")]
    fn panels(&self) -> simd::Panels<'_> {
        match self {
            Self::F32(v) => simd::Panels::F32(v),
            Self::Bf16(v) => simd::Panels::Bf16(v),
            Self::F16(v) => simd::Panels::F16(v),
        }
    }
}

/// How frozen weights are kept in memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Store {
    /// 32 bit.
    F32,
    /// bfloat16.
    Bf16,
    /// IEEE half.
    F16,
}

#[derive(Debug, Clone)]
enum Kept {
    /// In the checkpoint's order.
    Whole(Data),
    /// In the order of [`simd::pack`]. `exact`: bf16 elements stand for the same in f32.
    #[cfg(target_arch = "x86_64")]
    Panels {
        data: Data,
        exact: bool,
    },
    /// `parts` are consecutive rows, some of them in few bits, each quantized by itself. `bf16`: products of many rows round the
    /// decoded values to bf16, as the rest of such a model is; else they are f32.
    Quantized {
        parts: Vec<Rows>,
        bf16: bool,
    },
    Resident(Resident),
}

/// A frozen (rows, cols) = (out, in) matrix.
#[derive(Debug, Clone)]
pub struct Weight {
    rows: usize,
    cols: usize,
    kept: Kept,
}

vectorize! {
    /// The products of a row of a weight and each row of `x`.
    fn dots(w: &[f32], x: View<'_>, out: &mut [f32]) {
        // A closure would be compiled without the vectors' instructions.
        for (t, out) in out.iter_mut().enumerate() {
            *out = dot(w, x.row(t));
        }
    }
}

impl Weight {
    /// A matrix of `rows * cols` elements, row after row.
    ///
    /// # Panics
    /// When `data` has another number of elements.
    #[must_use]
    pub fn new(rows: usize, cols: usize, data: Data) -> Self {
        let len = data.len();
        assert_eq!(len, rows * cols, "weight: {len} elements for ({rows}, {cols})");
        #[cfg(target_arch = "x86_64")]
        if simd::level().is_some() {
            return Self { rows, cols, kept: Kept::Panels { data: data.packed(rows, cols), exact: false } };
        }
        Self { rows, cols, kept: Kept::Whole(data) }
    }

    /// Whether f32 elements can be kept as the bf16 that they are in a checkpoint, by [`Self::widened`].
    #[must_use]
    pub fn widens() -> bool {
        #[cfg(target_arch = "x86_64")]
        return simd::level().is_some();
        #[cfg(not(target_arch = "x86_64"))]
        false
    }

    /// A matrix of f32 elements, kept as the bf16 that they are where this processor [`widens`](Self::widens).
    ///
    /// # Panics
    /// When `elements` has another length than `rows * cols`.
    #[must_use]
    pub fn widened(rows: usize, cols: usize, elements: Vec<bf16>) -> Self {
        #[cfg(target_arch = "x86_64")]
        if Self::widens() {
            let mut weight = Self::new(rows, cols, Data::Bf16(elements));
            if let Kept::Panels { exact, .. } = &mut weight.kept {
                *exact = true;
            }
            return weight;
        }
        Self::new(rows, cols, Data::F32(elements.iter().map(|v| v.to_f32()).collect()))
    }

    /// A matrix of which rows are in few bits, those of `parts` one after another; in a model of bf16 weights (`store`) its
    /// products may round the decoded elements to bf16.
    #[must_use]
    pub fn quantized(cols: usize, parts: Vec<Rows>, store: Store) -> Self {
        let rows = parts.iter().map(Rows::count).sum();
        Self { rows, cols, kept: Kept::Quantized { parts, bf16: store == Store::Bf16 } }
    }

    /// A matrix that is on a device already.
    #[must_use]
    pub fn resident(resident: Resident) -> Self {
        let (rows, cols) = resident.shape();
        Self { rows, cols, kept: Kept::Resident(resident) }
    }

    /// Device and type of its products, where it is not on the host.
    #[must_use]
    pub fn place(&self) -> Option<(&Device, Dtype)> {
        if let Kept::Resident(resident) = &self.kept { Some(resident.place()) } else { None }
    }

    /// Whether the row is kept in few bits, so that its elements are no longer the checkpoint's.
    #[must_use]
    pub fn is_quantized(&self, row: usize) -> bool {
        match &self.kept {
            Kept::Quantized { parts, .. } => matches!(part_of(parts, row, Rows::count), Some(Rows::Codes(_))),
            Kept::Resident(resident) => resident.is_quantized(row),
            Kept::Whole(_) => false,
            #[cfg(target_arch = "x86_64")]
            Kept::Panels { .. } => false,
        }
    }

    /// Whether its products, on the host, are those of a bf16 model: of many rows they may round its elements and their input
    /// to bf16.
    #[must_use]
    pub fn is_bf16(&self) -> bool {
        match &self.kept {
            Kept::Quantized { bf16, .. } => *bf16,
            Kept::Resident(_) => false,
            Kept::Whole(data) => matches!(data, Data::Bf16(_)),
            #[cfg(target_arch = "x86_64")]
            Kept::Panels { data, exact } => matches!(data, Data::Bf16(_)) && !exact,
        }
    }

    /// Share of a gradient of its output that does not matter to that of its input: less than rounding it to the weight's own
    /// type may change. 0 where leaving it out saves nothing.
    #[must_use]
    pub fn negligible(&self) -> f32 {
        #[cfg(target_arch = "x86_64")]
        if self.is_bf16() && simd::level().is_some() && self.rows >= simd::WIDE {
            return NEGLIGIBLE;
        }
        0.0
    }

    /// Output channels.
    #[must_use]
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Input channels.
    #[must_use]
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// Bytes in memory.
    #[must_use]
    pub fn bytes(&self) -> usize {
        match &self.kept {
            Kept::Whole(data) => data.bytes(),
            #[cfg(target_arch = "x86_64")]
            Kept::Panels { data, .. } => data.bytes(),
            Kept::Quantized { parts, .. } => parts.iter().map(Rows::bytes).sum(),
            Kept::Resident(resident) => resident.bytes(),
        }
    }

    /// Some rows in f32.
    pub fn decode_rows(&self, rows: Range<usize>, out: &mut [f32]) {
        match &self.kept {
            Kept::Whole(data) => data.decode(rows.start * self.cols, out),
            #[cfg(target_arch = "x86_64")]
            Kept::Panels { data, .. } => {
                for (row, out) in rows.zip(out.chunks_exact_mut(self.cols)) {
                    for (panel, out) in out.chunks_mut(simd::PANEL).enumerate() {
                        data.decode((panel * self.rows + row) * simd::PANEL, out);
                    }
                }
            }
            Kept::Quantized { parts, .. } => self.decode_parts(parts, rows, out),
            Kept::Resident(resident) => out.copy_from_slice(&resident.rows(rows).to_host()),
        }
    }

    fn decode_parts(&self, parts: &[Rows], rows: Range<usize>, out: &mut [f32]) {
        let mut first = 0;
        for part in parts {
            let here = rows.start.max(first)..rows.end.min(first + part.count());
            if !here.is_empty() {
                let to = (here.start - rows.start) * self.cols..(here.end - rows.start) * self.cols;
                part.decode(here.start - first..here.end - first, &mut out[to]);
            }
            first += part.count();
        }
    }

    /// The rows of some ids, where the matrix is.
    ///
    /// # Shapes
    /// `ids`: (T); returns (T, in).
    #[must_use]
    pub fn gather(&self, ids: &Constant<u32>) -> Matrix {
        if let Kept::Resident(resident) = &self.kept {
            return resident.gather(ids);
        }
        let mut x = Matrix::new(ids.len(), self.cols);
        x.chunks_exact_mut(self.cols).zip(&**ids).for_each(|(row, id)| {
            self.decode_rows(*id as usize..*id as usize + 1, row);
        });
        x
    }

    /// The level of its products, where the processor has one.
    #[cfg(target_arch = "x86_64")]
    fn level(&self) -> Option<simd::Level> {
        simd::level().map(|level| if self.is_bf16() { level } else { level.exact() })
    }

    fn panels(&self) -> impl Iterator<Item = Range<usize>> + use<> {
        let rows = (PANEL / self.cols.max(1)).max(16);
        let all = self.rows;
        (0..all.div_ceil(rows)).map(move |i| i * rows..((i + 1) * rows).min(all))
    }

    /// Decodes a panel into `scratch` with all threads.
    fn decode_panel(&self, rows: &Range<usize>, scratch: &mut Vec<f32>) {
        scratch.resize(rows.len() * self.cols, 0.0);
        let share = rows.len().div_ceil(rayon::current_num_threads()).max(1);
        scratch.par_chunks_mut(share * self.cols).enumerate().for_each(|(i, out)| {
            let from = rows.start + i * share;
            self.decode_rows(from..from + out.len() / self.cols, out);
        });
    }

    /// The units of `x Wᵀ`, and what stands before them as it waits for the backward; `None` where one is made after the other.
    ///
    /// # Shapes
    /// `x`: (T, cols); returns (T, rows / 2).
    #[must_use]
    #[cfg_attr(not(target_arch = "x86_64"), allow(unused_variables))]
    pub fn forward_units(&self, x: &Matrix, units: Units, bf16: bool) -> Option<(Matrix, Parked)> {
        #[cfg(target_arch = "x86_64")]
        if let (Kept::Panels { data, .. }, Some(level)) = (&self.kept, self.level())
            && units.gated
            && x.rows() > FEW
            && simd::makes_units(level, data.panels())
        {
            let (mut h, mut kept) = (Matrix::new(x.rows(), self.rows / 2), Parked::new(x.rows(), self.rows, bf16));
            let of_rows = |width: usize, x: &[f32], h: &mut [f32]| units.of_rows(width, x, h);
            let (w, shape) = (data.panels(), (self.rows, self.cols));
            simd::forward_units(level, x.view(), w, shape, &mut h, kept.elements_mut(), of_rows);
            return Some((h, kept));
        }
        None
    }

    /// Calls `each` with rows and their elements until all rows were given: at once, or decoded some at a time.
    #[cfg(target_arch = "x86_64")]
    fn each_panel(&self, mut each: impl FnMut(Range<usize>, simd::Panels<'_>)) {
        match &self.kept {
            Kept::Panels { data, .. } => each(0..self.rows, data.panels()),
            Kept::Quantized { parts, bf16: true } => self.each_decoded(
                |first, scratch: &mut [bf16], rows| {
                    let reader = || {
                        let mut row = vec![0.0; self.cols];
                        move |at: usize, out: &mut [bf16]| {
                            self.decode_parts(parts, first + at..first + at + 1, &mut row);
                            round(out, &row);
                        }
                    };
                    simd::pack(rows, self.cols, reader, scratch);
                },
                |rows, scratch| each(rows, simd::Panels::Bf16(scratch)),
            ),
            Kept::Quantized { parts, bf16: false } => self.each_decoded(
                |first, scratch: &mut [f32], rows| {
                    let reader =
                        || |at: usize, out: &mut [f32]| self.decode_parts(parts, first + at..first + at + 1, out);
                    simd::pack(rows, self.cols, reader, scratch);
                },
                |rows, scratch| each(rows, simd::Panels::F32(scratch)),
            ),
            Kept::Whole(_) | Kept::Resident(_) => unreachable!("kept for other products"),
        }
    }

    /// Fills a scratch by `decode(first row, scratch, number of rows)` and calls `each` with it, until all rows were given.
    #[cfg(target_arch = "x86_64")]
    fn each_decoded<T: Copy + Default>(
        &self,
        decode: impl Fn(usize, &mut [T], usize),
        mut each: impl FnMut(Range<usize>, &[T]),
    ) {
        let mut scratch = Vec::new();
        for rows in self.panels() {
            scratch.resize(simd::packed_len(rows.len(), self.cols), T::default());
            decode(rows.start, &mut scratch, rows.len());
            each(rows, &scratch);
        }
    }

    /// `y = x Wᵀ`, added to `y` where `accumulate`.
    ///
    /// # Shapes
    /// `x`: (T, in); `y`: (T, out).
    pub fn forward(&self, x: View<'_>, y: &mut Matrix, accumulate: bool) {
        if let Kept::Resident(resident) = &self.kept {
            return resident.forward(x, y, accumulate);
        }
        if let Kept::Quantized { parts, .. } = &self.kept
            && x.rows <= FEW
        {
            return self.forward_few(parts, x, y, accumulate);
        }
        #[cfg(target_arch = "x86_64")]
        if let Some(level) = self.level() {
            let total = y.cols();
            return self.each_panel(|rows, w| {
                let shape = (rows.len(), self.cols);
                let y = ViewMut::columns(y, total, rows);
                if x.rows <= FEW {
                    simd::few_rows(level, x, w, shape, y, accumulate);
                } else {
                    simd::forward(level, x, w, shape, y, accumulate);
                }
            });
        }
        self.forward_portable(x, y, accumulate);
    }

    /// `y = x Wᵀ` for few rows of x, each row of W decoded where its products need it.
    fn forward_few(&self, parts: &[Rows], x: View<'_>, y: &mut Matrix, accumulate: bool) {
        let t = x.rows;
        assert!(x.cols == self.cols && y.rows() == t && y.cols() == self.rows, "product: shapes do not fit");
        let mut products = Matrix::new(self.rows, t);
        let share = self.rows.div_ceil(8 * rayon::current_num_threads()).max(1);
        products.par_chunks_mut((share * t).max(1)).enumerate().for_each(|(i, out)| {
            let mut row = Matrix::new(1, self.cols);
            for (at, out) in out.chunks_exact_mut(t.max(1)).enumerate() {
                let at = i * share + at;
                self.decode_parts(parts, at..at + 1, &mut row);
                dots(&row, x, out);
            }
        });
        for (t, y) in y.chunks_exact_mut(self.rows.max(1)).enumerate() {
            let products = products.chunks_exact(x.rows.max(1)).map(|products| products[t]);
            y.iter_mut().zip(products).for_each(|(y, v)| *y = if accumulate { *y + v } else { v });
        }
    }

    fn forward_portable(&self, x: View<'_>, y: &mut Matrix, accumulate: bool) {
        let (total, cols) = (y.cols(), self.cols);
        if let Kept::Whole(Data::F32(w)) = &self.kept {
            let w = View::of(w, self.rows, cols);
            return matmul(Threads::All, ViewMut::columns(y, total, 0..total), accumulate, 1.0, Side::N(x), Side::T(w));
        }
        let mut scratch = Vec::new();
        for rows in self.panels() {
            self.decode_panel(&rows, &mut scratch);
            let w = View::of(&scratch, rows.len(), cols);
            matmul(Threads::All, ViewMut::columns(y, total, rows), accumulate, 1.0, Side::N(x), Side::T(w));
        }
    }

    /// `dx = dy W`, added to `dx` where `accumulate`.
    ///
    /// # Shapes
    /// `dy`: (T, out); `dx`: (T, in).
    pub fn backward(&self, dy: View<'_>, dx: &mut Matrix, accumulate: bool) {
        if let Kept::Resident(resident) = &self.kept {
            return resident.backward(dy, dx, accumulate);
        }
        #[cfg(target_arch = "x86_64")]
        if let Some(level) = self.level() {
            let total = dx.cols();
            return self.each_panel(|rows, w| {
                let (shape, add) = ((rows.len(), self.cols), accumulate || rows.start > 0);
                let (dy, dx) = (dy.slice_cols(rows), ViewMut::columns(dx, total, 0..total));
                match simd::NonZeros::of(level, dy) {
                    Some(dy) => simd::sparse_backward(level, &dy, w, shape, dx, add),
                    None => simd::backward(level, dy, w, shape, dx, add),
                }
            });
        }
        self.backward_portable(dy, dx, accumulate);
    }

    fn backward_portable(&self, dy: View<'_>, dx: &mut Matrix, accumulate: bool) {
        let total = dx.cols();
        if let Kept::Whole(Data::F32(w)) = &self.kept {
            let w = View::of(w, self.rows, self.cols);
            return matmul(
                Threads::All,
                ViewMut::columns(dx, total, 0..total),
                accumulate,
                1.0,
                Side::N(dy),
                Side::N(w),
            );
        }
        let mut scratch = Vec::new();
        for rows in self.panels() {
            self.decode_panel(&rows, &mut scratch);
            let (w, add) = (View::of(&scratch, rows.len(), self.cols), accumulate || rows.start > 0);
            let dy = dy.slice_cols(rows);
            matmul(Threads::All, ViewMut::columns(dx, total, 0..total), add, 1.0, Side::N(dy), Side::N(w));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::quantized::{Codes, Format};
    use crate::ops::testing::{Oracle, assert_close, random};

    /// `tolerance`: products of bf16 weights may round the input to bf16.
    fn check(weight: &Weight, t: usize, tolerance: f32, portable: bool) {
        let (out, inn) = (weight.rows, weight.cols);
        let mut decoded = vec![0.0; out * inn];
        weight.decode_rows(0..out, &mut decoded);
        let (x, dy) = (random(t * inn, 2), random(t * out, 3));
        let oracle = Oracle::run(&[(&x, t, inn), (&decoded, out, inn)], |i| i[0].matmul(&i[1].t()?), &dy);
        let mut y = Matrix::from_slice(t, out, &vec![1.0; t * out]);
        let mut dx = Matrix::new(t, inn);
        if portable {
            weight.forward_portable(View::of(&x, t, inn), &mut y, true);
            weight.backward_portable(View::of(&dy, t, out), &mut dx, false);
        } else {
            weight.forward(View::of(&x, t, inn), &mut y, true);
            weight.backward(View::of(&dy, t, out), &mut dx, false);
        }
        let want: Vec<f32> = oracle.y.iter().map(|v| v + 1.0).collect();
        assert_close(&y, &want, tolerance);
        assert_close(&dx, &oracle.grads[0], tolerance);
    }

    #[test]
    fn both_products_equal_the_reference_in_every_store() {
        // Odd sizes, few rows, several panels, and more depth than one panel has.
        for (t, out, inn) in
            [(5, 123, 77), (1, 64, 32), (37, 9, 130), (3, 700, 900), (29, 66, 1301), (13, 1203, 35), (49, 601, 90)]
        {
            let w = random(out * inn, 1);
            let bf: Vec<bf16> = w.iter().map(|v| bf16::from_f32(*v)).collect();
            let hf: Vec<f16> = w.iter().map(|v| f16::from_f32(*v)).collect();
            for (data, tolerance) in [(Data::F32(w.clone()), 1e-5), (Data::F16(hf), 1e-5), (Data::Bf16(bf), 8e-3)] {
                let weight = Weight::new(out, inn, data.clone());
                check(&weight, t, tolerance, false);
                check(&weight, t, 1e-5, true);
                check(&Weight { kept: Kept::Whole(data), ..weight }, t, 1e-5, true);
            }
            let bf: Vec<bf16> = w.iter().map(|v| bf16::from_f32(*v)).collect();
            let widened = Weight::widened(out, inn, bf);
            assert!(!widened.is_bf16());
            check(&widened, t, 1e-5, false);
            check(&widened, t, 1e-5, true);
        }
    }

    #[test]
    fn bf16_elements_kept_for_f32_give_f32s_results() {
        let (t, out, inn) = (29, 130, 77);
        let elements: Vec<bf16> = random(out * inn, 1).iter().map(|v| bf16::from_f32(*v)).collect();
        let (x, dy) = (random(t * inn, 2), random(t * out, 3));
        let products = |weight: &Weight| {
            let (mut y, mut dx) = (Matrix::new(t, out), Matrix::new(t, inn));
            weight.forward(View::of(&x, t, inn), &mut y, false);
            weight.backward(View::of(&dy, t, out), &mut dx, false);
            (y.to_vec(), dx.to_vec())
        };
        let narrow = Weight::widened(out, inn, elements.clone());
        let wide = Weight::new(out, inn, Data::F32(elements.iter().map(|v| v.to_f32()).collect()));
        assert_eq!(wide.bytes(), narrow.bytes() * if Weight::widens() { 2 } else { 1 });
        let (narrow, wide) = (products(&narrow), products(&wide));
        // AMX is within 2^-17 of each product of two elements, by which a result is off by no more than this share of
        // their magnitudes' sum; that the others give the same bits is tested with their levels.
        let within = |(got, want): (&[f32], &[f32]), magnitude: &dyn Fn(usize) -> f32| {
            for (i, (got, want)) in got.iter().zip(want).enumerate() {
                assert!((got - want).abs() <= magnitude(i) / 131072.0, "element {i}: got {got}, want {want}");
            }
        };
        let w = |row: usize, column: usize| elements[row * inn + column].to_f32().abs();
        within((&narrow.0, &wide.0), &|i| (0..inn).map(|k| x[i / out * inn + k].abs() * w(i % out, k)).sum());
        within((&narrow.1, &wide.1), &|i| (0..out).map(|k| dy[i / inn * out + k].abs() * w(k, i % inn)).sum());
    }

    #[test]
    fn a_gradient_of_few_elements_goes_back_as_a_full_one() {
        // More rows than `NonZeros` looks at, odd columns; every store.
        let (t, out, inn) = (7, 5003, 77);
        let w = random(out * inn, 1);
        let mut dy = vec![0.0; t * out];
        random(300, 3).iter().enumerate().for_each(|(i, v)| dy[(i * i * 7919) % (t * out)] = *v);
        dy[t * out - 1] = 1.0;
        let bf: Vec<bf16> = w.iter().map(|v| bf16::from_f32(*v)).collect();
        let hf: Vec<f16> = w.iter().map(|v| f16::from_f32(*v)).collect();
        for data in [Data::F32(w.clone()), Data::F16(hf), Data::Bf16(bf)] {
            let weight = Weight::new(out, inn, data);
            #[cfg(target_arch = "x86_64")]
            if let Some(level) = simd::level() {
                assert!(simd::NonZeros::of(level, View::of(&dy, t, out)).is_some());
            }
            let [mut sparse, mut dense] = [Matrix::zeros(t, inn), Matrix::zeros(t, inn)];
            weight.backward(View::of(&dy, t, out), &mut sparse, false);
            weight.backward(View::of(&dy, t, out), &mut sparse, true);
            weight.backward_portable(View::of(&dy, t, out), &mut dense, false);
            let want: Vec<f32> = dense.iter().map(|v| 2.0 * v).collect();
            assert_close(&sparse, &want, 1e-5);
        }
    }

    const FORMATS: [&str; 5] = ["nf4", "nf4-dq", "fp4", "fp4-dq", "int8"];

    #[test]
    fn both_products_of_a_quantized_weight_are_those_of_its_decoded_elements() {
        // Odd sizes, few rows, and several panels.
        for (t, out, inn) in [(5, 123, 77), (1, 64, 32), (37, 700, 901), (3, 1203, 335)] {
            let w = random(out * inn, 1);
            for format in FORMATS.map(|name| Format::named(name).unwrap()) {
                for (store, tolerance) in [(Store::F32, 1e-5), (Store::Bf16, 1.2e-2)] {
                    // Parts that end within a block of 64 and within a panel.
                    let (first, second) = w.split_at(out / 3 * inn);
                    let parts = [(first, out / 3), (second, out - out / 3)];
                    let codes = parts.map(|(values, rows)| Rows::Codes(Codes::new(format, values, rows, inn)));
                    // And one that stays whole, below and above others.
                    let whole = Rows::Whole(Weight::new(7, inn, Data::F32(random(7 * inn, 2))));
                    let [one, two] = codes;
                    let weight = Weight::quantized(inn, vec![whole.clone(), one, whole, two], store);
                    let quantized = [0, 6, 7, 6 + out / 3, 7 + out / 3, 13 + out / 3, 14 + out / 3, out + 13];
                    let quantized = quantized.map(|row| weight.is_quantized(row));
                    assert_eq!(quantized, [false, false, true, true, false, false, true, true]);
                    check(&weight, t, 1e-5, true);
                    check(&weight, t, tolerance, false);
                }
            }
        }
    }

    #[test]
    fn four_bits_are_less_than_0_3_of_bf16() {
        let (rows, cols) = (96, 320);
        let w = random(rows * cols, 1);
        let share = |name: &str| {
            let codes = Codes::new(Format::named(name).unwrap(), &w, rows, cols);
            let weight = Weight::quantized(cols, vec![Rows::Codes(codes)], Store::Bf16);
            weight.bytes() as f64 / (2 * rows * cols) as f64
        };
        let shares = FORMATS.map(share);
        assert_eq!([shares[0], shares[2]], [0.28125; 2]);
        assert!(shares[1] < 0.26 && shares[3] < 0.26 && shares[4] < 0.51, "{shares:?}");
    }
}
