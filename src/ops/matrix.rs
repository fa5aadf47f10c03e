//! `Matrix`: activations of one micro batch, and the recycling of their buffers. Not here: arithmetic.

use std::ops::{Deref, DerefMut, Range};
use std::sync::Mutex;

/// Tokens of one sample within the rows of a micro batch. Attention and positions stay inside a segment.
pub type Segment = Range<usize>;

/// Buffers that no matrix uses at the moment, by ascending length.
///
/// This is an allocator's free list, which is why it is global: a training step asks for the same lengths again and
/// again, and glibc would return and fault their pages each time (12 to 14 % of a step, measured on the prototype).
static FREE: Mutex<Vec<Vec<f32>>> = Mutex::new(Vec::new());

fn take(len: usize) -> Vec<f32> {
    let mut free = FREE.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
    let fit = free.partition_point(|buffer| buffer.len() < len);
    // A buffer far too long is left for a request of its own size. Micro batches differ in length, by up to this factor,
    // and a run starts with its longest: then every later request finds the buffer of its like.
    if free.get(fit).is_some_and(|buffer| buffer.len() <= 16 * len + 1024) {
        return free.remove(fit);
    }
    // A longer buffer replaces a shorter one, which would otherwise stay for ever beside it.
    if fit > 0 && 2 * free[fit - 1].len() >= len {
        free.remove(fit - 1);
    }
    drop(free);
    vec![0.0; len]
}

fn give(buffer: Vec<f32>) {
    if buffer.is_empty() {
        return;
    }
    let mut free = FREE.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
    let at = free.partition_point(|other| other.len() < buffer.len());
    free.insert(at, buffer);
}

/// Returns all recycled buffers to the allocator.
pub fn release_buffers() {
    FREE.lock().unwrap_or_else(|poisoned| poisoned.into_inner()).clear();
}

/// Row-major f32 activations: `rows` tokens of `cols` channels. Dereferences to its elements.
#[derive(Debug)]
pub struct Matrix {
    rows: usize,
    cols: usize,
    buffer: Vec<f32>,
}

impl Matrix {
    /// A matrix whose elements are whatever the recycled buffer held (NaN in debug builds): write each of them.
    #[must_use]
    pub fn new(rows: usize, cols: usize) -> Self {
        let mut matrix = Self { rows, cols, buffer: take(rows * cols) };
        if cfg!(debug_assertions) {
            matrix.fill(f32::NAN);
        }
        matrix
    }

    /// A matrix of zeros.
    #[must_use]
    pub fn zeros(rows: usize, cols: usize) -> Self {
        let mut matrix = Self { rows, cols, buffer: take(rows * cols) };
        matrix.fill(0.0);
        matrix
    }

    /// A copy of `values`, which has `rows * cols` elements.
    #[must_use]
    pub fn from_slice(rows: usize, cols: usize, values: &[f32]) -> Self {
        let mut matrix = Self { rows, cols, buffer: take(rows * cols) };
        matrix.copy_from_slice(values);
        matrix
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
        View { data: self, offset: columns.start, rows: self.rows, cols: columns.len(), stride: self.cols }
    }
}

impl Clone for Matrix {
    fn clone(&self) -> Self {
        Self::from_slice(self.rows, self.cols, self)
    }
}

impl Deref for Matrix {
    type Target = [f32];

    fn deref(&self) -> &[f32] {
        &self.buffer[..self.rows * self.cols]
    }
}

impl DerefMut for Matrix {
    fn deref_mut(&mut self) -> &mut [f32] {
        let len = self.rows * self.cols;
        &mut self.buffer[..len]
    }
}

impl Drop for Matrix {
    fn drop(&mut self) {
        give(std::mem::take(&mut self.buffer));
    }
}

/// A rectangle of a row-major matrix, to read from.
#[derive(Debug, Clone, Copy)]
pub struct View<'a> {
    /// The elements of the whole matrix.
    pub data: &'a [f32],
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
        Self { data, offset: 0, rows, cols, stride: cols }
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
    fn views_read_rectangles() {
        let matrix = Matrix::from_slice(2, 3, &[0.0, 1.0, 2.0, 3.0, 4.0, 5.0]);
        assert_eq!(matrix.columns(1..3).slice_rows(1..2).row(0), [4.0, 5.0]);
        assert_eq!(matrix.view().slice_cols(0..1).row(1), [3.0]);
    }
}
