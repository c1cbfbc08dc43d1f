//! Matrices whose bytes are shared, wherever they live: a vector, a mapped file, an adapter pool.

use crate::{DType, Element, InputError, Slice};
use bytemuck::cast_slice;
use std::fmt;
use std::hash::Hash;
use std::ops::Range;
use std::sync::Arc;

/// Bytes with shared ownership, aligned for their use when a [`Matrix`] is made of them.
#[derive(Clone)]
pub struct Buffer {
    bytes: Arc<dyn AsRef<[u8]> + Send + Sync>,
}

impl Buffer {
    /// Shares bytes that somebody else laid out, a mapped file for instance.
    pub fn from_bytes(bytes: impl AsRef<[u8]> + Send + Sync + 'static) -> Self {
        Self { bytes: Arc::new(bytes) }
    }

    /// Takes numbers over without a copy.
    pub fn from_vec<T: Element>(values: Vec<T>) -> Self {
        Self { bytes: Arc::new(Typed(values)) }
    }

    /// All bytes.
    #[must_use]
    pub fn bytes(&self) -> &[u8] {
        (*self.bytes).as_ref()
    }
}

impl fmt::Debug for Buffer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Buffer({} bytes)", self.bytes().len())
    }
}

struct Typed<T>(Vec<T>);

impl<T: Element> AsRef<[u8]> for Typed<T> {
    fn as_ref(&self) -> &[u8] {
        cast_slice(&self.0)
    }
}

/// A row-major matrix of run-time format, `[rows, cols]`, whose rows may lie apart.
///
/// A row stride above `cols` expresses views without a copy: the gate rows of an interleaved `w13` are
/// `Matrix::new(buffer, dtype, offset, I, H, 2 * H)`.
#[derive(Clone, Debug)]
pub struct Matrix {
    buffer: Buffer,
    dtype: DType,
    /// Bytes of the buffer that this matrix spans.
    span: Range<usize>,
    rows: usize,
    cols: usize,
    stride: usize,
}

impl Matrix {
    /// A view of `rows` x `cols` numbers that starts `offset` bytes into the buffer, rows `row_stride` numbers apart.
    ///
    /// # Errors
    /// If a size is zero, the matrix reaches past the buffer, or the bytes are not aligned for `dtype`.
    pub fn new(
        buffer: Buffer,
        dtype: DType,
        offset: usize,
        rows: usize,
        cols: usize,
        row_stride: usize,
    ) -> Result<Self, InputError> {
        let whole = || format!("{rows} rows of {cols} {dtype}, {row_stride} apart, from byte {offset}");
        if rows == 0 || cols == 0 || row_stride < cols {
            return Err(InputError::new(whole(), "at least one row and column, rows that do not overlap"));
        }
        let length = buffer.bytes().len();
        let end = (rows - 1)
            .checked_mul(row_stride)
            .and_then(|n| n.checked_add(cols)?.checked_mul(dtype.size())?.checked_add(offset));
        let Some(end) = end.filter(|&end| end <= length) else {
            return Err(InputError::new(whole(), format!("a matrix within {length} bytes")));
        };
        if !(buffer.bytes()[offset..].as_ptr() as usize).is_multiple_of(dtype.size()) {
            return Err(InputError::new(whole(), format!("an address that is a multiple of {}", dtype.size())));
        }
        Ok(Self { buffer, dtype, span: offset..end, rows, cols, stride: row_stride })
    }

    /// A dense matrix that takes over its numbers.
    ///
    /// # Errors
    /// If a size is zero or `values` does not hold `rows * cols` numbers.
    pub fn from_vec<T: Element>(values: Vec<T>, rows: usize, cols: usize) -> Result<Self, InputError> {
        if rows.checked_mul(cols) != Some(values.len()) {
            return Err(InputError::new(format!("{} numbers", values.len()), format!("[{rows}, {cols}]")));
        }
        Self::new(Buffer::from_vec(values), T::DTYPE, 0, rows, cols, cols)
    }

    /// `count` rows from `first` on, every `step`-th one, as a view of the same bytes.
    ///
    /// # Errors
    /// If the rows do not exist.
    pub fn select_rows(&self, first: usize, count: usize, step: usize) -> Result<Self, InputError> {
        let last = count.checked_sub(1).and_then(|n| n.checked_mul(step)?.checked_add(first));
        if step == 0 || last.is_none_or(|last| last >= self.rows) {
            return Err(InputError::new(
                format!("{count} rows from {first} in steps of {step}"),
                format!("rows of a matrix of {}", self.rows),
            ));
        }
        let offset = self.span.start + first * self.stride * self.dtype.size();
        Self::new(self.buffer.clone(), self.dtype, offset, count, self.cols, self.stride * step)
    }

    /// `count` columns from `first` on, as a view of the same bytes.
    ///
    /// # Errors
    /// If the columns do not exist.
    pub fn select_cols(&self, first: usize, count: usize) -> Result<Self, InputError> {
        if count == 0 || first.checked_add(count).is_none_or(|end| end > self.cols) {
            let found = format!("{count} columns from {first}");
            return Err(InputError::new(found, format!("columns of a matrix of {}", self.cols)));
        }
        let offset = self.span.start + first * self.dtype.size();
        Self::new(self.buffer.clone(), self.dtype, offset, self.rows, count, self.stride)
    }

    /// Rows.
    #[must_use]
    pub const fn rows(&self) -> usize {
        self.rows
    }

    /// Columns.
    #[must_use]
    pub const fn cols(&self) -> usize {
        self.cols
    }

    /// `[rows, cols]`.
    #[must_use]
    pub const fn shape(&self) -> [usize; 2] {
        [self.rows, self.cols]
    }

    /// Numbers from the start of one row to the start of the next.
    #[must_use]
    pub const fn row_stride(&self) -> usize {
        self.stride
    }

    /// The format.
    #[must_use]
    pub const fn dtype(&self) -> DType {
        self.dtype
    }

    /// Bytes of the numbers themselves, without what lies between rows.
    #[must_use]
    pub const fn size_bytes(&self) -> usize {
        self.rows * self.cols * self.dtype.size()
    }

    /// Whether both are the very same view of the same bytes (not merely equal numbers).
    #[must_use]
    pub fn same_storage(&self, other: &Self) -> bool {
        self.storage_key() == other.storage_key()
    }

    /// A key that is equal for matrices of the [same storage](Self::same_storage) while both live.
    #[must_use]
    pub fn storage_key(&self) -> impl Eq + Hash + use<> {
        let address = self.buffer.bytes().as_ptr() as usize + self.span.start;
        (address, self.dtype, self.rows, self.cols, self.stride)
    }

    /// The numbers from the first row's first to the last row's last, gaps included.
    #[must_use]
    pub fn slice(&self) -> Slice<'_> {
        let bytes = &self.buffer.bytes()[self.span.clone()];
        match self.dtype {
            DType::F32 => Slice::F32(cast_slice(bytes)),
            DType::F16 => Slice::F16(cast_slice(bytes)),
            DType::Bf16 => Slice::Bf16(cast_slice(bytes)),
        }
    }

    /// A typed view; `None` if the matrix holds another format.
    #[must_use]
    pub fn view<T: Element>(&self) -> Option<MatrixRef<'_, T>> {
        let data = T::unwrap(self.slice())?;
        Some(MatrixRef { data, rows: self.rows, cols: self.cols, stride: self.stride })
    }

    /// The number at a place, widened; for tests and references, not for speed.
    ///
    /// # Panics
    /// If the place is outside.
    #[must_use]
    pub fn get(&self, row: usize, col: usize) -> f32 {
        assert!(row < self.rows && col < self.cols, "({row}, {col}) is outside {:?}", self.shape());
        self.slice().get(row * self.stride + col)
    }

    /// A dense copy in format `T`, rounded to nearest even.
    #[must_use]
    pub fn to_vec<T: Element>(&self) -> Vec<T> {
        fn convert<S: Element, T: Element>(view: MatrixRef<'_, S>) -> Vec<T> {
            (0..view.rows()).flat_map(|r| view.row(r).iter().map(|x| T::from_f32(x.to_f32()))).collect()
        }
        match self.dtype {
            DType::F32 => self.view::<f32>().map(convert),
            DType::F16 => self.view::<half::f16>().map(convert),
            DType::Bf16 => self.view::<half::bf16>().map(convert),
        }
        .unwrap_or_default()
    }
}

/// A borrowed, typed [`Matrix`].
#[derive(Clone, Copy, Debug)]
pub struct MatrixRef<'a, T> {
    data: &'a [T],
    rows: usize,
    cols: usize,
    stride: usize,
}

impl<'a, T> MatrixRef<'a, T> {
    /// A view of `rows` x `cols` numbers of `data`, rows `stride` numbers apart.
    ///
    /// # Errors
    /// If rows overlap or reach past `data`.
    pub fn new(data: &'a [T], rows: usize, cols: usize, stride: usize) -> Result<Self, InputError> {
        let end = rows.saturating_sub(1).checked_mul(stride).and_then(|n| n.checked_add(cols));
        if stride < cols || end.is_none_or(|end| end > data.len()) {
            return Err(InputError::new(
                format!("{rows} rows of {cols}, {stride} apart"),
                format!("rows within {} numbers that do not overlap", data.len()),
            ));
        }
        Ok(Self { data, rows, cols, stride })
    }

    /// Rows.
    #[must_use]
    pub const fn rows(&self) -> usize {
        self.rows
    }

    /// Columns.
    #[must_use]
    pub const fn cols(&self) -> usize {
        self.cols
    }

    /// Numbers from the start of one row to the start of the next.
    #[must_use]
    pub const fn stride(&self) -> usize {
        self.stride
    }

    /// The numbers from the first row's first to the last row's last, gaps included.
    #[must_use]
    pub const fn data(&self) -> &'a [T] {
        self.data
    }

    /// The rows from `first` on, or none if there is no such row.
    #[must_use]
    pub fn rows_from(&self, first: usize) -> Self {
        let first = first.min(self.rows);
        let data = self.data.get(first * self.stride..).unwrap_or_default();
        Self { data, rows: self.rows - first, ..*self }
    }

    /// One row.
    ///
    /// # Panics
    /// If there is no such row.
    #[must_use]
    #[inline]
    pub fn row(&self, row: usize) -> &'a [T] {
        &self.data[row * self.stride..][..self.cols]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn interleaved_rows_are_a_view() {
        let all = Matrix::from_vec((0..12).map(|x| x as f32).collect(), 6, 2).unwrap();
        let up = all.select_rows(1, 3, 2).unwrap();
        assert_eq!(up.to_vec::<f32>(), [2.0, 3.0, 6.0, 7.0, 10.0, 11.0]);
        assert_eq!(up.get(2, 1), 11.0);
        assert!(!up.same_storage(&all) && up.same_storage(&up.clone()));
        assert!(all.select_rows(1, 4, 2).is_err());
        assert!(all.select_rows(0, 0, 1).is_err());
    }

    #[test]
    fn columns_are_a_view() {
        let all = Matrix::from_vec((0..12).map(|x| x as f32).collect(), 3, 4).unwrap();
        let last = all.select_cols(2, 2).unwrap();
        assert_eq!((last.to_vec::<f32>(), last.row_stride()), (vec![2.0, 3.0, 6.0, 7.0, 10.0, 11.0], 4));
        assert_eq!(last.select_cols(1, 1).unwrap().select_rows(1, 2, 1).unwrap().to_vec::<f32>(), [7.0, 11.0]);
        assert!(all.select_cols(3, 2).is_err() && all.select_cols(0, 0).is_err() && all.select_cols(9, 1).is_err());
    }

    #[test]
    fn bytes_that_do_not_fit_are_refused() {
        let buffer = Buffer::from_vec(vec![0_f32; 4]);
        let new = |offset, rows, cols, stride| Matrix::new(buffer.clone(), DType::F32, offset, rows, cols, stride);
        assert!(new(0, 2, 2, 2).is_ok());
        assert!(new(0, 2, 2, 3).is_err(), "past the end");
        assert!(new(2, 1, 1, 1).is_err(), "misaligned");
        assert!(new(0, 0, 2, 2).is_err(), "empty");
        assert!(new(0, 2, 2, 1).is_err(), "overlapping rows");
        assert!(new(0, usize::MAX, usize::MAX, usize::MAX).is_err(), "overflow");

        let values = [1, 2, 3, 4, 5];
        assert_eq!(MatrixRef::new(&values, 2, 2, 3).unwrap().row(1), [4, 5]);
        assert!(MatrixRef::new(&values, 2, 2, 4).is_err(), "past the end");
        assert!(MatrixRef::new(&values, 2, 2, 1).is_err(), "overlapping rows");
        assert!(MatrixRef::new(&values, usize::MAX, 2, usize::MAX).is_err(), "overflow");
    }
}
