//! Products of small and medium f32 matrices with any strides, by [`super::simd`] or the `gemm` crate. Products with a
//! frozen weight are in `weight`.
#![allow(unsafe_code)] // the gemm crate takes raw pointers

use super::View;
use super::device::{Buffer, Dtype, Operand, Product};
#[cfg(target_arch = "x86_64")]
use super::simd;

/// Who computes a product.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Threads {
    /// The calling thread alone, as inside a parallel loop.
    One,
    /// All of the pool.
    All,
}

/// A rectangle of a row-major matrix, to write to.
#[derive(Debug)]
pub struct ViewMut<'a> {
    /// The elements of the whole matrix; none where it is on a device.
    pub data: &'a mut [f32],
    /// Where it is on a device, and of what type.
    pub place: Option<(&'a Buffer, Dtype)>,
    /// Index of the first element.
    pub offset: usize,
    /// Number of rows.
    pub rows: usize,
    /// Number of columns.
    pub cols: usize,
    /// Elements from one row to the next.
    pub stride: usize,
}

impl<'a> ViewMut<'a> {
    /// A view of all of `data`, which has `rows * cols` elements.
    #[must_use]
    pub fn of(data: &'a mut [f32], rows: usize, cols: usize) -> Self {
        Self { data, place: None, offset: 0, rows, cols, stride: cols }
    }

    /// Some columns of a matrix of `total_cols` columns.
    #[must_use]
    pub fn columns(data: &'a mut [f32], total_cols: usize, columns: std::ops::Range<usize>) -> Self {
        let rows = data.len() / total_cols.max(1);
        Self { data, place: None, offset: columns.start, rows, cols: columns.len(), stride: total_cols }
    }

    /// Address of the first element, on a device.
    ///
    /// # Panics
    /// When it is on the host.
    #[must_use]
    pub fn pointer(&self) -> u64 {
        let (buffer, dtype) = self.place.expect("a view of a matrix on a device");
        buffer.pointer() + (self.offset * dtype.size()) as u64
    }

    fn operand(&self, dtype: Dtype) -> Operand {
        Operand { pointer: self.pointer(), stride: self.stride, dtype, transposed: false }
    }
}

/// One side of a product: a view, read as it is or transposed.
#[derive(Debug, Clone, Copy)]
pub enum Side<'a> {
    /// As it is.
    N(View<'a>),
    /// Transposed.
    T(View<'a>),
}

impl Side<'_> {
    /// (rows, cols, row stride, column stride) as the product sees them.
    fn shape(&self) -> (usize, usize, isize, isize) {
        match self {
            Self::N(v) => (v.rows, v.cols, v.stride as isize, 1),
            Self::T(v) => (v.cols, v.rows, 1, v.stride as isize),
        }
    }

    fn view(&self) -> &View<'_> {
        match self {
            Self::N(v) | Self::T(v) => v,
        }
    }

    fn operand(&self) -> Operand {
        let view = self.view();
        let dtype = view.place.expect("all of a product is on the device").1;
        Operand { pointer: view.pointer(), stride: view.stride, dtype, transposed: matches!(self, Self::T(_)) }
    }
}

/// Whether a rectangle lies inside `len` elements.
pub(super) fn fits(len: usize, offset: usize, rows: usize, cols: usize, stride: usize) -> bool {
    rows == 0 || cols == 0 || (cols <= stride || rows == 1) && offset + (rows - 1) * stride + cols <= len
}

/// # Panics
/// When a view leaves its data.
fn check_bounds(dst: &ViewMut<'_>, sides: [&Side<'_>; 2]) {
    assert!(fits(dst.data.len(), dst.offset, dst.rows, dst.cols, dst.stride), "matmul: destination leaves its data");
    for side in sides {
        let v = side.view();
        assert!(fits(v.data.len(), v.offset, v.rows, v.cols, v.stride), "matmul: operand leaves its data");
    }
}

/// A left side of several products on the calling thread, on the host.
#[derive(Debug)]
pub enum Left<'a> {
    /// In f32.
    Plain(Side<'a>),
    /// Rounded to bf16 by each product.
    #[cfg(target_arch = "x86_64")]
    Rounding(Side<'a>),
    /// Rounded to bf16.
    #[cfg(target_arch = "x86_64")]
    Pairs(simd::PairsLeft),
}

/// A right side of several products on the calling thread, on the host.
#[derive(Debug)]
pub enum Right<'a> {
    /// In f32.
    Plain(Side<'a>),
    /// In f32, laid out for the processor.
    #[cfg(target_arch = "x86_64")]
    Panels(simd::Panelled),
    /// Rows of f32 that become columns, read where they lie.
    #[cfg(target_arch = "x86_64")]
    Rows(simd::Level, View<'a>),
    /// Rounded to bf16 by each product.
    #[cfg(target_arch = "x86_64")]
    Rounding(Side<'a>),
    /// Rounded to bf16.
    #[cfg(target_arch = "x86_64")]
    Pairs(simd::PairsRight),
}

impl<'a> Left<'a> {
    /// A side, rounded to bf16 where it may be and the processor is faster with that.
    #[must_use]
    #[cfg_attr(not(target_arch = "x86_64"), allow(unused_variables))]
    pub fn of(side: Side<'a>, rounded: bool) -> Self {
        #[cfg(target_arch = "x86_64")]
        if rounded {
            if let Some(pairs) = simd::PairsLeft::of(side) {
                return Self::Pairs(pairs);
            }
            if simd::rounds() {
                return Self::Rounding(side);
            }
        }
        Self::Plain(side)
    }
}

impl<'a> Right<'a> {
    /// A side, rounded to bf16 where it may be and the processor is faster with that.
    #[must_use]
    #[cfg_attr(not(target_arch = "x86_64"), allow(unused_variables))]
    pub fn of(side: Side<'a>, rounded: bool) -> Self {
        #[cfg(target_arch = "x86_64")]
        {
            if let Some(pairs) = rounded.then(|| simd::PairsRight::of(side)).flatten() {
                return Self::Pairs(pairs);
            }
            if rounded && simd::rounds() {
                return Self::Rounding(side);
            }
            if let (Side::T(view), Some(level)) = (side, simd::level()) {
                return Self::Panels(simd::Panelled::of(level, view));
            }
        }
        Self::Plain(side)
    }

    /// Rows that become columns, for one product with a few rows.
    #[must_use]
    pub fn of_rows(rows: View<'a>) -> Self {
        #[cfg(target_arch = "x86_64")]
        if let Some(level) = simd::level().filter(|_| simd::are_panels(rows.cols)) {
            return Self::Rows(level, rows);
        }
        Self::of(Side::T(rows), false)
    }
}

/// The first `rows` and `cols` of a side.
fn first(side: Side<'_>, rows: usize, cols: usize) -> Side<'_> {
    match side {
        Side::N(v) => Side::N(v.slice_rows(0..rows).slice_cols(0..cols)),
        Side::T(v) => Side::T(v.slice_rows(0..cols).slice_cols(0..rows)),
    }
}

/// `dst = alpha · lhs · rhs`, added to `dst` where `accumulate`, on the calling thread, with the first rows and columns of `rhs`
/// that this takes.
///
/// # Panics
/// As [`matmul`], when only one side is rounded, and when a rounded product has nothing to multiply.
pub fn matmul_by(dst: ViewMut<'_>, accumulate: bool, alpha: f32, lhs: &Left<'_>, rhs: &Right<'_>) {
    let cols = dst.cols;
    match (lhs, rhs) {
        (Left::Plain(lhs), Right::Plain(rhs)) => {
            matmul(Threads::One, dst, accumulate, alpha, *lhs, first(*rhs, lhs.shape().1, cols));
        }
        #[cfg(target_arch = "x86_64")]
        (Left::Plain(lhs), Right::Panels(rhs)) => {
            check_bounds(&dst, [lhs, lhs]);
            // SAFETY: `fits` checked that every element of both views lies inside its data.
            unsafe { rhs.product(dst, accumulate, alpha, *lhs) }
        }
        #[cfg(target_arch = "x86_64")]
        (Left::Plain(Side::N(lhs)), Right::Rows(level, rows)) => {
            let rows = rows.slice_rows(0..cols);
            check_bounds(&dst, [&Side::N(*lhs), &Side::T(rows)]);
            // SAFETY: `fits` checked that every element of the three views lies inside its data.
            unsafe { simd::few_by_rows(*level, *lhs, rows, dst, accumulate, alpha) }
        }
        #[cfg(target_arch = "x86_64")]
        (Left::Pairs(lhs), Right::Pairs(rhs)) => simd::product_of_pairs(dst, accumulate, alpha, lhs, rhs),
        #[cfg(target_arch = "x86_64")]
        (Left::Rounding(lhs), Right::Rounding(rhs)) => {
            let (m, k, ..) = lhs.shape();
            let rhs = first(*rhs, k, cols);
            assert!(dst.rows == m && m > 0 && cols > 0 && k > 0, "matmul: shapes do not fit");
            check_bounds(&dst, [lhs, &rhs]);
            // SAFETY: every element of the three views lies inside its data.
            unsafe { simd::rounded(dst, accumulate, alpha, *lhs, rhs) }
        }
        #[cfg(target_arch = "x86_64")]
        _ => unreachable!("both sides are rounded or neither"),
    }
}

/// `dst = alpha · lhs · rhs`, added to `dst` where `accumulate`.
///
/// # Panics
/// When the shapes do not fit together or a view leaves its data.
pub fn matmul(threads: Threads, dst: ViewMut<'_>, accumulate: bool, alpha: f32, lhs: Side<'_>, rhs: Side<'_>) {
    let (m, k, lhs_rs, lhs_cs) = lhs.shape();
    let (k2, n, rhs_rs, rhs_cs) = rhs.shape();
    assert!(
        dst.rows == m && dst.cols == n && k == k2,
        "matmul: ({m}, {k}) x ({k2}, {n}) into ({}, {})",
        dst.rows,
        dst.cols
    );
    if let Some((buffer, dtype)) = dst.place {
        let (out, lhs, rhs) = (dst.operand(dtype), lhs.operand(), rhs.operand());
        return buffer.device().product(&Product { m, n, k, alpha, accumulate, out, lhs, rhs });
    }
    check_bounds(&dst, [&lhs, &rhs]);
    if m == 0 || n == 0 {
        return;
    }
    #[cfg(target_arch = "x86_64")]
    if let Some(level) = simd::level().filter(|_| simd::is_small(k, n)) {
        // SAFETY: `fits` checked that every element of the three views lies inside its data.
        return unsafe { simd::small(level, threads, dst, accumulate, alpha, lhs, rhs) };
    }
    let parallelism = match threads {
        Threads::One => gemm::Parallelism::None,
        Threads::All => gemm::Parallelism::Rayon(0),
    };
    // SAFETY: `fits` checked that every element the strides reach lies inside the three slices, and `dst` is borrowed
    // mutably, so it overlaps neither operand.
    unsafe {
        gemm::gemm(
            m,
            n,
            k,
            dst.data.as_mut_ptr().add(dst.offset),
            1,
            dst.stride as isize,
            accumulate,
            lhs.view().data.as_ptr().add(lhs.view().offset),
            lhs_cs,
            lhs_rs,
            rhs.view().data.as_ptr().add(rhs.view().offset),
            rhs_cs,
            rhs_rs,
            1.0,
            alpha,
            false,
            false,
            false,
            parallelism,
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn strided_transposed_and_accumulated() {
        let a: Vec<f32> = (0..12).map(|i| i as f32).collect(); // (3, 4)
        let b: Vec<f32> = (0..10).map(|i| 1.0 - i as f32).collect(); // (2, 5)
        let mut c = vec![1.0; 3 * 4];
        let lhs = View::of(&a, 3, 4).slice_cols(1..3); // (3, 2)
        let rhs = View::of(&b, 2, 5).slice_cols(2..4); // (2, 2)
        matmul(Threads::One, ViewMut::columns(&mut c, 4, 1..3), true, 2.0, Side::N(lhs), Side::T(rhs));
        for i in 0..3 {
            for j in 0..2 {
                let want: f32 = 1.0 + 2.0 * (0..2).map(|k| a[i * 4 + 1 + k] * b[j * 5 + 2 + k]).sum::<f32>();
                assert_eq!(c[i * 4 + 1 + j], want);
            }
        }
        assert_eq!((c[0], c[3]), (1.0, 1.0));
    }

    #[test]
    fn both_sides_rounded_in_every_order() {
        use crate::ops::testing::{assert_close, random};
        // Rows, columns and depths of less than a tile, of one and a half, of more than are multiplied at a time.
        for (m, n, k) in [(16, 1, 1), (17, 16, 31), (33, 17, 33), (40, 50, 700), (64, 32, 64), (70, 100, 5)] {
            let bf16 = |n, seed| random(n, seed).into_iter().map(|v| half::bf16::from_f32(v).to_f32());
            let (a, b): (Vec<f32>, Vec<f32>) = (bf16(m * k, 1).collect(), bf16(k * n, 2).collect());
            let turned = |x: &[f32], rows: usize, cols: usize| -> Vec<f32> {
                (0..rows * cols).map(|i| x[i % rows * cols + i / rows]).collect()
            };
            let (at, bt) = (turned(&a, m, k), turned(&b, k, n));
            let want: Vec<f32> = (0..m * n)
                .map(|i| 1.0 + 0.5 * (0..k).map(|l| a[i / n * k + l] * b[l * n + i % n]).sum::<f32>())
                .collect();
            for lhs in [Side::N(View::of(&a, m, k)), Side::T(View::of(&at, k, m))] {
                for rhs in [Side::N(View::of(&b, k, n)), Side::T(View::of(&bt, n, k))] {
                    let mut y = vec![1.0; m * n];
                    let (lhs, rhs) = (Left::of(lhs, true), Right::of(rhs, true));
                    matmul_by(ViewMut::of(&mut y, m, n), true, 0.5, &lhs, &rhs);
                    assert_close(&y, &want, 1e-5);
                    matmul_by(ViewMut::of(&mut y, m, n), false, 0.5, &lhs, &rhs);
                    y.iter_mut().for_each(|v| *v += 1.0);
                    assert_close(&y, &want, 1e-5);
                }
            }
        }
    }

    #[test]
    #[should_panic(expected = "leaves its data")]
    fn a_view_outside_its_data_is_refused() {
        let a = [0.0; 4];
        let mut c = [0.0; 6];
        let bad = View { data: &a, place: None, offset: 0, rows: 3, cols: 2, stride: 2 };
        matmul(Threads::One, ViewMut::of(&mut c, 3, 2), false, 1.0, Side::N(bad), Side::N(View::of(&a, 2, 2)));
    }
}
