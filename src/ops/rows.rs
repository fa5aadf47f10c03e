//! Rows moved, added and scaled: what stands between the products, norms and units.

use super::device::{Constant, Device, Dtype, flag, int, long};
use super::matmul::ViewMut;
use super::matrix::{Matrix, View};

/// Threads of a block that works on a row of `cols` elements.
fn threads(cols: usize) -> usize {
    (cols.div_ceil(32) * 32).clamp(32, 256)
}

fn launch_rows(kernel: &str, (device, dtype): (&Device, Dtype), rows: usize, cols: usize, args: &[super::device::Arg]) {
    device.launch(kernel, Some(dtype), [rows, 1, 1], [threads(cols), 1], 0, args);
}

/// Some rows of `x`.
///
/// # Shapes
/// `x`: (T, C); `index`: (R); returns (R, C).
#[must_use]
pub fn gather(x: &Matrix, index: &Constant<u32>) -> Matrix {
    let (rows, cols) = (index.len(), x.cols());
    let mut out = x.new_like(rows, cols);
    if let Some(place) = x.place() {
        let args = [x.pointer().into(), index.on(place.0).into(), out.pointer().into(), int(cols)];
        launch_rows("gather_rows", place, rows, cols, &args);
        return out;
    }
    out.chunks_exact_mut(cols).zip(&**index).for_each(|(out, row)| out.copy_from_slice(x.row(*row as usize)));
    out
}

/// `y[index[r]] += factors[r] · part[r]`, the factors 1 where none are given. No row is named twice.
///
/// # Shapes
/// `part`: (R, C); `index`, `factors`: (R); `y`: (T, C).
pub fn scatter_add(part: &Matrix, index: &Constant<u32>, factors: Option<&Constant<f32>>, y: &mut Matrix) {
    let cols = y.cols();
    if let Some(place) = y.place() {
        let factors = factors.map_or(0, |f| f.on(place.0));
        let args = [part.pointer().into(), index.on(place.0).into(), factors.into(), y.pointer().into(), int(cols)];
        return launch_rows("scatter_add_rows", place, index.len(), cols, &args);
    }
    for (i, (part, row)) in part.chunks_exact(cols).zip(&**index).enumerate() {
        let factor = factors.map_or(1.0, |f| f[i]);
        y[*row as usize * cols..][..cols].iter_mut().zip(part).for_each(|(y, v)| *y += factor * v);
    }
}

/// `x[r] *= factors[r]`.
///
/// # Shapes
/// `x`: (R, C); `factors`: (R).
pub fn scale_rows(x: &mut Matrix, factors: &Constant<f32>) {
    let (rows, cols) = (x.rows(), x.cols());
    if let Some(place) = x.place() {
        let args = [x.pointer().into(), factors.on(place.0).into(), int(cols)];
        return launch_rows("scale_rows", place, rows, cols, &args);
    }
    x.chunks_exact_mut(cols).zip(&**factors).for_each(|(x, f)| x.iter_mut().for_each(|v| *v *= f));
}

/// `out[index[r]] = a[r] · b[r]`.
///
/// # Shapes
/// `a`, `b`: (R, C); `index`: (R); `out`: f32, one row.
pub fn dot_rows(a: &Matrix, b: &Matrix, index: &Constant<u32>, out: &mut Matrix) {
    let (rows, cols) = (a.rows(), a.cols());
    if let Some(place) = a.place() {
        let to = [index.on(place.0).into(), out.pointer().into()];
        let args = [a.pointer().into(), b.pointer().into(), to[0], to[1], int(cols)];
        return launch_rows("dot_rows", place, rows, cols, &args);
    }
    for ((a, b), at) in a.chunks_exact(cols).zip(b.chunks_exact(cols)).zip(&**index) {
        out[*at as usize] = a.iter().zip(b).map(|(a, b)| a * b).sum();
    }
}

/// Copies a rectangle.
///
/// # Shapes
/// `from`, `to`: (T, C).
pub fn copy(from: View<'_>, to: &mut ViewMut<'_>) {
    if let Some((buffer, dtype)) = to.place {
        let strides = [long(from.stride), long(to.stride)];
        let args = [from.pointer().into(), to.pointer().into(), int(from.cols), strides[0], strides[1]];
        return launch_rows("copy_rows", (buffer.device(), dtype), from.rows, from.cols, &args);
    }
    for row in 0..from.rows {
        to.data[to.offset + row * to.stride..][..from.cols].copy_from_slice(from.row(row));
    }
}

/// `to += scale · from`; on a device also between types.
pub fn add_scaled(to: &mut Matrix, from: &Matrix, scale: f32) {
    if to.place().is_some() {
        return add_on(to, from, scale, true);
    }
    to.iter_mut().zip(from.iter()).for_each(|(t, f)| *t += scale * f);
}

/// `x *= factor`.
pub fn scale(x: &mut Matrix, factor: f32) {
    if factor == 1.0 {
        return;
    }
    if let Some((device, dtype)) = x.place() {
        let n = x.rows() * x.cols();
        let args = [x.pointer().into(), x.pointer().into(), long(n), factor.into(), flag(false)];
        return device.launch_over("add", Some(dtype), n, &args);
    }
    x.iter_mut().for_each(|v| *v *= factor);
}

/// A copy of `x` in another type of the same device.
#[must_use]
pub fn cast(x: &Matrix, dtype: Dtype) -> Matrix {
    let device = x.place().expect("a matrix on a device").0;
    let mut out = Matrix::new_on(device, dtype, x.rows(), x.cols());
    add_on(&mut out, x, 1.0, false);
    out
}

fn add_on(to: &mut Matrix, from: &Matrix, scale: f32, accumulate: bool) {
    let n = from.rows() * from.cols();
    let ((device, to_type), (_, from_type)) =
        (to.place().expect("on a device"), from.place().expect("all operands are on the device"));
    let kernel = match (from_type, to_type) {
        (a, b) if a == b => format!("add_{}", a.suffix()),
        (a, b) => format!("add_{}_to_{}", a.suffix(), b.suffix()),
    };
    let args = [from.pointer().into(), to.pointer().into(), long(n), scale.into(), flag(accumulate)];
    device.launch_over(&kernel, None, n, &args);
}

/// `y += bias` on every row.
///
/// # Shapes
/// `y`: (T, C); `bias`: (C).
pub fn add_bias(y: &mut Matrix, bias: &Constant<f32>) {
    let cols = y.cols();
    if let Some(place) = y.place() {
        let args = [y.pointer().into(), bias.on(place.0).into(), int(cols), long(cols)];
        return launch_rows("add_bias", place, y.rows(), cols, &args);
    }
    y.chunks_exact_mut(cols).for_each(|y| y.iter_mut().zip(&**bias).for_each(|(y, b)| *y += b));
}
