//! `Matrix`: activations of one micro batch, the recycling of their buffers, and their rounding while they wait for the
//! backward. Not here: arithmetic.

use super::device::{Buffer, Device, Dtype};
use super::math::vectorize;
use super::matmul::ViewMut;
use half::{bf16, f16};
use rayon::prelude::*;
use std::borrow::Cow;
use std::ops::{Deref, DerefMut, Range};
use std::sync::{Mutex, MutexGuard, PoisonError};

/// Tokens of one sample within the rows of a micro batch. Attention and positions stay inside a segment.
pub type Segment = Range<usize>;

/// The buffers of all matrices on the host.
///
/// This is an allocator's free list, which is why it is global: a training step asks for the same lengths again and
/// again, and glibc would return and fault their pages each time (12 to 14 % of a step, measured on the prototype).
struct Pool {
    /// Those that no matrix uses at the moment, by ascending length.
    free: Vec<Vec<f32>>,
    /// Elements of all.
    elements: usize,
    /// Above so many, free ones are given up for a new one.
    most: usize,
    reuse: Reuse,
}

static POOL: Mutex<Pool> = Mutex::new(Pool { free: Vec::new(), elements: 0, most: usize::MAX, reuse: Reuse::Any });

fn pool() -> MutexGuard<'static, Pool> {
    POOL.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Pool {
    /// A free buffer for `len` elements, else the length of a new one.
    fn take(&mut self, len: usize) -> Result<Vec<f32>, usize> {
        let fit = self.free.partition_point(|buffer| buffer.len() < len);
        // A buffer far too long is left for a request of its own size. Micro batches differ in length, by up to the first
        // factor, and a run starts with its longest: then every later request finds the buffer of its like.
        let longest = match self.reuse {
            Reuse::Any => 16 * len,
            Reuse::Double => 2 * len,
            Reuse::Near | Reuse::Steps => len + len / 8,
        };
        if self.free.get(fit).is_some_and(|buffer| buffer.len() <= longest + 1024) {
            return Ok(self.free.remove(fit));
        }
        let step = if self.reuse == Reuse::Steps { (len.next_power_of_two() / 16).max(1) } else { 1 };
        // A longer buffer replaces a shorter one, which would otherwise stay for ever beside it.
        if self.reuse != Reuse::Steps && fit > 0 && 2 * self.free[fit - 1].len() >= len {
            self.elements -= self.free.remove(fit - 1).len();
        }
        let len = len.next_multiple_of(step);
        self.elements += len;
        while self.elements > self.most
            && let Some(buffer) = self.free.pop()
        {
            self.elements -= buffer.len();
        }
        Err(len)
    }
}

/// Elements up to which the allocator is faster, which has free buffers of each thread: those here are all threads'.
const SMALL: usize = 8 << 10;

fn take(len: usize) -> Vec<f32> {
    if len <= SMALL {
        return vec![0.0; len];
    }
    let found = pool().take(len);
    found.unwrap_or_else(|len| vec![0.0; len])
}

/// Which recycled buffer serves a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reuse {
    /// One that is long enough.
    Any,
    /// One of about the length. The first pass of a run, its longest, must not put small matrices into large buffers, or it
    /// would need more of these than are ever full.
    Near,
    /// One of at most twice the length. A prefix is kept beside the passes that go on from it: if either were in buffers of
    /// the longest micro batch, they would need many times their memory.
    Double,
    /// One of about the length, in steps of a sixteenth; none is given up. A single long pass asks for nearly the same lengths
    /// layer after layer, and would throw out what the next one needs.
    Steps,
}

/// Runs `f` with buffers reused in this way.
pub fn reusing<R>(how: Reuse, f: impl FnOnce() -> R) -> R {
    pool().reuse = how;
    let result = f();
    pool().reuse = Reuse::Any;
    result
}

fn give(buffer: Vec<f32>) {
    if buffer.len() <= SMALL {
        return;
    }
    let mut pool = pool();
    let at = pool.free.partition_point(|other| other.len() < buffer.len());
    pool.free.insert(at, buffer);
}

/// From now on free buffers are given up rather than having a quarter more in all than now.
pub fn limit_buffers() {
    let mut pool = pool();
    pool.most = pool.elements + pool.elements / 4;
}

/// Returns all recycled buffers to the allocator.
pub fn release_buffers() {
    let mut pool = pool();
    pool.elements -= pool.free.iter().map(Vec::len).sum::<usize>();
    pool.free.clear();
}

/// Where a matrix's elements are.
#[derive(Debug)]
enum Storage {
    Host(Vec<f32>),
    Device { buffer: Buffer, dtype: Dtype },
}

/// Row-major activations: `rows` tokens of `cols` channels; also, as one row, the parameters of all adapters. On the host
/// they are f32 and it dereferences to them.
#[derive(Debug)]
pub struct Matrix {
    rows: usize,
    cols: usize,
    storage: Storage,
}

impl Matrix {
    /// A matrix whose elements are whatever the recycled buffer held (NaN in debug builds): write each of them.
    #[must_use]
    pub fn new(rows: usize, cols: usize) -> Self {
        let mut matrix = Self { rows, cols, storage: Storage::Host(take(rows * cols)) };
        if cfg!(debug_assertions) {
            matrix.fill(f32::NAN);
        }
        matrix
    }

    /// A matrix of zeros.
    #[must_use]
    pub fn zeros(rows: usize, cols: usize) -> Self {
        let mut matrix = Self { rows, cols, storage: Storage::Host(take(rows * cols)) };
        matrix.fill(0.0);
        matrix
    }

    /// A copy of `values`, which has `rows * cols` elements.
    #[must_use]
    pub fn from_slice(rows: usize, cols: usize, values: &[f32]) -> Self {
        let mut matrix = Self { rows, cols, storage: Storage::Host(take(rows * cols)) };
        matrix.copy_from_slice(values);
        matrix
    }

    /// A matrix on a device, with unknown elements.
    #[must_use]
    pub fn new_on(device: &Device, dtype: Dtype, rows: usize, cols: usize) -> Self {
        let buffer = device.allocate(rows * cols * dtype.size());
        Self { rows, cols, storage: Storage::Device { buffer, dtype } }
    }

    /// A matrix with unknown elements at the same place and of the same type as this one.
    #[must_use]
    pub fn new_like(&self, rows: usize, cols: usize) -> Self {
        match &self.storage {
            Storage::Host(_) => Self::new(rows, cols),
            Storage::Device { buffer, dtype } => Self::new_on(buffer.device(), *dtype, rows, cols),
        }
    }

    /// A matrix of zeros at the same place and of the same type as this one.
    #[must_use]
    pub fn zeros_like(&self, rows: usize, cols: usize) -> Self {
        let mut matrix = self.new_like(rows, cols);
        matrix.zero();
        matrix
    }

    /// Zeros of a type on a device.
    #[must_use]
    pub fn zeros_on(device: &Device, dtype: Dtype, rows: usize, cols: usize) -> Self {
        let mut matrix = Self::new_on(device, dtype, rows, cols);
        matrix.zero();
        matrix
    }

    /// A copy on `device`, in its type, where one is given; else on the host.
    #[must_use]
    pub fn to(&self, device: Option<(&Device, Dtype)>) -> Self {
        let host = self.to_host();
        let Some((device, dtype)) = device else { return host };
        let buffer = match dtype {
            Dtype::F32 => device.upload(bytemuck::cast_slice(&host)),
            Dtype::Bf16 => {
                device.upload(bytemuck::cast_slice(&host.iter().map(|v| bf16::from_f32(*v)).collect::<Vec<_>>()))
            }
            Dtype::F16 => {
                device.upload(bytemuck::cast_slice(&host.iter().map(|v| f16::from_f32(*v)).collect::<Vec<_>>()))
            }
        };
        Self { rows: self.rows, cols: self.cols, storage: Storage::Device { buffer, dtype } }
    }

    /// A copy on the host; zeros after a failure of the device.
    #[must_use]
    pub fn to_host(&self) -> Self {
        let Storage::Device { buffer, dtype } = &self.storage else { return self.clone() };
        let mut bytes = vec![0; self.rows * self.cols * dtype.size()];
        buffer.read(&mut bytes);
        let mut out = Self::new(self.rows, self.cols);
        let halves = bytes.as_chunks::<2>().0.iter();
        match dtype {
            Dtype::F32 => out.iter_mut().zip(bytes.as_chunks::<4>().0).for_each(|(o, b)| *o = f32::from_le_bytes(*b)),
            Dtype::Bf16 => out.iter_mut().zip(halves).for_each(|(o, b)| *o = bf16::from_le_bytes(*b).to_f32()),
            Dtype::F16 => out.iter_mut().zip(halves).for_each(|(o, b)| *o = f16::from_le_bytes(*b).to_f32()),
        }
        out
    }

    /// Device and element type, where it is not on the host.
    #[must_use]
    pub fn place(&self) -> Option<(&Device, Dtype)> {
        match &self.storage {
            Storage::Host(_) => None,
            Storage::Device { buffer, dtype } => Some((buffer.device(), *dtype)),
        }
    }

    /// Address on the device.
    ///
    /// # Panics
    /// When it is on the host.
    #[must_use]
    pub fn pointer(&self) -> u64 {
        match &self.storage {
            Storage::Host(_) => unreachable!("a matrix on the host has no device pointer"),
            Storage::Device { buffer, .. } => buffer.pointer(),
        }
    }

    /// Writes zeros.
    pub fn zero(&mut self) {
        match &mut self.storage {
            Storage::Host(_) => self.fill(0.0),
            Storage::Device { buffer, .. } => buffer.zero(),
        }
    }

    /// Number of tokens.
    #[must_use]
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Number of channels.
    #[must_use]
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// The channels of one token.
    #[must_use]
    pub fn row(&self, row: usize) -> &[f32] {
        &self[row * self.cols..][..self.cols]
    }

    /// All of it, as a view.
    #[must_use]
    pub fn view(&self) -> View<'_> {
        self.columns(0..self.cols)
    }

    /// Some columns of all rows.
    #[must_use]
    pub fn columns(&self, columns: Range<usize>) -> View<'_> {
        View { offset: columns.start, rows: self.rows, cols: columns.len(), stride: self.cols, ..self.elements() }
    }

    /// Consecutive elements, as rows of `cols`.
    #[must_use]
    pub fn part(&self, elements: Range<usize>, cols: usize) -> View<'_> {
        View { offset: elements.start, rows: elements.len() / cols.max(1), cols, stride: cols, ..self.elements() }
    }

    fn elements(&self) -> View<'_> {
        let (data, place) = match &self.storage {
            Storage::Host(_) => (&**self, None),
            Storage::Device { buffer, dtype } => (&[][..], Some((buffer, *dtype))),
        };
        View { data, place, offset: 0, rows: self.rows, cols: self.cols, stride: self.cols }
    }

    /// All of it, to write to.
    #[must_use]
    pub fn view_mut(&mut self) -> ViewMut<'_> {
        let columns = 0..self.cols;
        self.columns_mut(columns)
    }

    /// Some columns of all rows, to write to.
    #[must_use]
    pub fn columns_mut(&mut self, columns: Range<usize>) -> ViewMut<'_> {
        let (rows, stride) = (self.rows, self.cols);
        ViewMut { offset: columns.start, rows, cols: columns.len(), stride, ..self.elements_mut() }
    }

    /// Consecutive elements, as rows of `cols`, to write to.
    #[must_use]
    pub fn part_mut(&mut self, elements: Range<usize>, cols: usize) -> ViewMut<'_> {
        let rows = elements.len() / cols.max(1);
        ViewMut { offset: elements.start, rows, cols, stride: cols, ..self.elements_mut() }
    }

    fn elements_mut(&mut self) -> ViewMut<'_> {
        let (rows, cols) = (self.rows, self.cols);
        let (data, place) = match &mut self.storage {
            Storage::Host(buffer) => (&mut buffer[..rows * cols], None),
            Storage::Device { buffer, dtype } => (&mut [][..], Some((&*buffer, *dtype))),
        };
        ViewMut { data, place, offset: 0, rows, cols, stride: cols }
    }
}

impl Clone for Matrix {
    fn clone(&self) -> Self {
        match &self.storage {
            Storage::Host(_) => Self::from_slice(self.rows, self.cols, self),
            Storage::Device { buffer, dtype } => {
                let storage = Storage::Device { buffer: buffer.clone(), dtype: *dtype };
                Self { rows: self.rows, cols: self.cols, storage }
            }
        }
    }
}

impl Deref for Matrix {
    type Target = [f32];

    fn deref(&self) -> &[f32] {
        match &self.storage {
            Storage::Host(buffer) => &buffer[..self.rows * self.cols],
            Storage::Device { .. } => unreachable!("elements of a matrix on a device"),
        }
    }
}

impl DerefMut for Matrix {
    fn deref_mut(&mut self) -> &mut [f32] {
        let len = self.rows * self.cols;
        match &mut self.storage {
            Storage::Host(buffer) => &mut buffer[..len],
            Storage::Device { .. } => unreachable!("elements of a matrix on a device"),
        }
    }
}

impl Drop for Matrix {
    fn drop(&mut self) {
        if let Storage::Host(buffer) = &mut self.storage {
            give(std::mem::take(buffer));
        }
    }
}

/// A matrix that waits for its backward: as it is, or on the host rounded to bf16, which takes half the memory.
#[derive(Debug)]
pub struct Parked {
    /// The matrix, or two elements in each of its own.
    matrix: Matrix,
    /// Columns of the matrix where it was rounded.
    rounded: Option<usize>,
}

/// Elements of a parked matrix on the host, row after row, to write to.
#[derive(Debug)]
pub enum ParkedMut<'a> {
    /// As they are.
    Whole(&'a mut Matrix),
    /// Rounded to bf16.
    Rounded(&'a mut [bf16]),
}

impl Parked {
    /// One on the host whose elements are still to be written; where they are to be rounded, `cols` is even.
    #[must_use]
    pub fn new(rows: usize, cols: usize, bf16: bool) -> Self {
        assert!(!bf16 || cols.is_multiple_of(2), "parked: rows of whole elements");
        Self { matrix: Matrix::new(rows, if bf16 { cols / 2 } else { cols }), rounded: bf16.then_some(cols) }
    }

    /// Its elements.
    pub fn elements_mut(&mut self) -> ParkedMut<'_> {
        match self.rounded {
            Some(_) => ParkedMut::Rounded(bytemuck::cast_slice_mut(&mut self.matrix)),
            None => ParkedMut::Whole(&mut self.matrix),
        }
    }

    /// Parks `matrix`, rounded to bf16 where that is asked for and it is on the host, while `work` reads it.
    pub fn beside<R: Send>(matrix: Matrix, bf16: bool, work: impl FnOnce(&Matrix) -> R + Send) -> (R, Self) {
        if !bf16 || matrix.place().is_some() {
            return (work(&matrix), Self { matrix, rounded: None });
        }
        let cols = matrix.cols();
        let (result, matrix) = rayon::join(|| work(&matrix), || rounded(&matrix));
        (result, Self { matrix, rounded: Some(cols) })
    }

    /// The matrix, of f32 elements where it was on the host.
    #[must_use]
    pub fn restore(self) -> Matrix {
        if self.rounded.is_none() { self.matrix } else { self.get().into_owned() }
    }

    /// The same, while `work` runs.
    pub fn restored_beside<R: Send>(self, work: impl FnOnce() -> R + Send) -> (R, Matrix) {
        if self.rounded.is_none() {
            return (work(), self.matrix);
        }
        rayon::join(work, || self.restore())
    }

    /// The same, and it stays parked.
    #[must_use]
    pub fn get(&self) -> Cow<'_, Matrix> {
        let Some(cols) = self.rounded else { return Cow::Borrowed(&self.matrix) };
        let mut matrix = Matrix::new(self.matrix.rows(), cols);
        each_row(&mut matrix, |row, to| widen(to, bytemuck::cast_slice(self.matrix.row(row))));
        Cow::Owned(matrix)
    }

    /// The matrix on the host, after `work` was called with each row's number and elements, as they were restored.
    #[must_use]
    pub fn restored_with(self, work: impl Fn(usize, &mut [f32]) + Sync) -> Matrix {
        let Some(cols) = self.rounded else {
            let mut matrix = self.matrix;
            each_row(&mut matrix, work);
            return matrix;
        };
        let mut matrix = Matrix::new(self.matrix.rows(), cols);
        each_row(&mut matrix, |row, to| {
            widen(to, bytemuck::cast_slice(self.matrix.row(row)));
            work(row, to);
        });
        matrix
    }
}

/// Calls `f` with each row's number and elements, in parallel.
fn each_row(matrix: &mut Matrix, f: impl Fn(usize, &mut [f32]) + Sync) {
    let (task, cols) = (rows_per_task(matrix.rows()), matrix.cols().max(1));
    matrix.par_chunks_mut(task * cols).enumerate().for_each(|(i, rows)| {
        rows.chunks_exact_mut(cols).enumerate().for_each(|(row, to)| f(i * task + row, to));
    });
}

/// Elements rounded to bf16, two in each of the result's.
fn rounded(matrix: &Matrix) -> Matrix {
    let (rows, cols) = (matrix.rows(), matrix.cols());
    let mut halves = Matrix::new(rows, cols.div_ceil(2));
    let (task, width) = (rows_per_task(rows), halves.cols());
    halves.par_chunks_mut(task * width).zip(matrix.par_chunks(task * cols)).for_each(|(to, from)| {
        for (to, from) in to.chunks_exact_mut(width).zip(from.chunks_exact(cols)) {
            let to: &mut [bf16] = bytemuck::cast_slice_mut(to);
            round(to, from);
        }
    });
    halves
}

vectorize! {
    /// To nearest even.
    pub(super) fn round(to: &mut [bf16], from: &[f32]) {
        to.iter_mut().zip(from).for_each(|(to, from)| *to = bf16::from_f32(*from));
    }
}

vectorize! {
    fn widen(to: &mut [f32], from: &[bf16]) {
        to.iter_mut().zip(from).for_each(|(to, from)| *to = from.to_f32());
    }
}

/// A rectangle of a row-major matrix, to read from.
#[derive(Debug, Clone, Copy)]
pub struct View<'a> {
    /// The elements of the whole matrix; none where it is on a device.
    pub data: &'a [f32],
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

impl<'a> View<'a> {
    /// A view of all of `data`, which has `rows * cols` elements.
    #[must_use]
    pub fn of(data: &'a [f32], rows: usize, cols: usize) -> Self {
        Self { data, place: None, offset: 0, rows, cols, stride: cols }
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

    /// Some of the rows.
    #[must_use]
    pub fn slice_rows(self, rows: Range<usize>) -> Self {
        debug_assert!(rows.end <= self.rows);
        Self { offset: self.offset + rows.start * self.stride, rows: rows.len(), ..self }
    }

    /// Some of the columns.
    #[must_use]
    pub fn slice_cols(self, cols: Range<usize>) -> Self {
        debug_assert!(cols.end <= self.cols);
        Self { offset: self.offset + cols.start, cols: cols.len(), ..self }
    }

    /// The elements of one row.
    #[must_use]
    pub fn row(self, row: usize) -> &'a [f32] {
        &self.data[self.offset + row * self.stride..][..self.cols]
    }
}

/// Rows a parallel task takes: enough tasks to share, none of them tiny.
#[must_use]
pub fn rows_per_task(rows: usize) -> usize {
    rows.div_ceil(4 * rayon::current_num_threads()).max(1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_buffer_is_recycled_for_the_same_length() {
        let first = Matrix::zeros(1237, 911);
        let address = first.as_ptr();
        drop(first);
        let second = Matrix::zeros(1237, 911);
        assert_eq!(address, second.as_ptr());
    }

    #[test]
    fn a_parked_matrix_comes_back_rounded_or_as_it_was() {
        let values: Vec<f32> = (0..7 * 33).map(|i| (i as f32 * 0.37).sin()).collect();
        let matrix = || Matrix::from_slice(7, 33, &values);
        let parked = |bf16| Parked::beside(matrix(), bf16, |matrix| assert_eq!(matrix[..], values[..])).1;
        assert_eq!(parked(false).restore()[..], values[..]);
        let rounded: Vec<f32> = values.iter().map(|v| bf16::from_f32(*v).to_f32()).collect();
        let parked = parked(true);
        assert_eq!(parked.matrix.len(), 7 * 17);
        let back = parked.restore();
        assert_eq!((back.rows(), back.cols()), (7, 33));
        assert_eq!(back[..], rounded[..]);
    }

    #[test]
    fn views_read_rectangles() {
        let matrix = Matrix::from_slice(2, 3, &[0.0, 1.0, 2.0, 3.0, 4.0, 5.0]);
        assert_eq!(matrix.columns(1..3).slice_rows(1..2).row(0), [4.0, 5.0]);
        assert_eq!(matrix.view().slice_cols(0..1).row(1), [3.0]);
    }
}
