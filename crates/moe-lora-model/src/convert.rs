//! From tensors in mapped files to matrices: views where the bytes allow it, copies where not.

use crate::tensors::Tensor;
use bytemuck::{pod_read_unaligned, try_cast_slice};
use half::{bf16, f16};
use moe_lora_core::{Buffer, DType, Element, InputError, Matrix};
use std::borrow::Cow;

/// A tensor of any rank as numbers that are aligned for their format: the mapped bytes, or a copy of this one tensor if
/// its place in the file is odd.
pub(crate) struct Block {
    buffer: Buffer,
    dtype: DType,
    offset: usize,
}

impl Block {
    pub(crate) fn new(tensor: Tensor<'_>) -> Result<Self, InputError> {
        let dtype = tensor.dtype()?;
        let bytes = tensor.bytes()?;
        if bytes.as_ptr().addr().is_multiple_of(dtype.size()) {
            let (buffer, offset) = tensor.mapped()?;
            return Ok(Self { buffer: buffer.clone(), dtype, offset });
        }
        let buffer = match dtype {
            DType::F32 => Buffer::from_vec(collect::<f32>(bytes)),
            DType::F16 => Buffer::from_vec(collect::<f16>(bytes)),
            DType::Bf16 => Buffer::from_vec(collect::<bf16>(bytes)),
        };
        Ok(Self { buffer, dtype, offset: 0 })
    }

    /// A dense `[rows, cols]` that starts `first` numbers into the tensor.
    pub(crate) fn matrix(&self, first: usize, rows: usize, cols: usize) -> Result<Matrix, InputError> {
        Matrix::new(self.buffer.clone(), self.dtype, self.offset + first * self.dtype.size(), rows, cols, cols)
    }
}

/// `count` columns of a dense `[rows, cols]` tensor slice, every `step`-th from column `first` on, as the rows of a new
/// matrix: `[count, rows]`. The slice starts `start` numbers into the tensor.
pub(crate) fn transposed_columns(
    tensor: Tensor<'_>,
    start: usize,
    [rows, cols]: [usize; 2],
    (first, step): (usize, usize),
    count: usize,
) -> Result<Matrix, InputError> {
    fn copy<T: Element>(
        bytes: &[u8],
        [rows, cols]: [usize; 2],
        (first, step): (usize, usize),
        count: usize,
    ) -> Result<Matrix, InputError> {
        /// Rows and columns that are turned at a time, in a block that stays in the first cache.
        const TILE: usize = 64;
        let source: Cow<'_, [T]> = numbers(bytes);
        let mut tile = [T::from_f32(0.0); TILE * TILE];
        let mut out = vec![T::from_f32(0.0); count * rows];
        for top in (0..rows).step_by(TILE) {
            let height = TILE.min(rows - top);
            for left in (0..count).step_by(TILE) {
                let width = TILE.min(count - left);
                for (r, row) in source[top * cols..].chunks_exact(cols).take(height).enumerate() {
                    let picked = row[first + left * step..].iter().step_by(step);
                    tile[r..].iter_mut().step_by(TILE).take(width).zip(picked).for_each(|(to, from)| *to = *from);
                }
                for (column, turned) in tile.chunks_exact(TILE).take(width).enumerate() {
                    out[(left + column) * rows + top..][..height].copy_from_slice(&turned[..height]);
                }
            }
        }
        Matrix::from_vec(out, count, rows)
    }
    let dtype = tensor.dtype()?;
    let size = dtype.size();
    let bytes = tensor.bytes()?.get(start * size..(start + rows * cols) * size);
    let bytes = bytes.ok_or_else(|| tensor.wrong("a slice outside the tensor", "a slice inside"))?;
    match dtype {
        DType::F32 => copy::<f32>(bytes, [rows, cols], (first, step), count),
        DType::F16 => copy::<f16>(bytes, [rows, cols], (first, step), count),
        DType::Bf16 => copy::<bf16>(bytes, [rows, cols], (first, step), count),
    }
}

/// A small tensor (a bias) in f32, which holds all formats exactly.
pub(crate) fn to_f32(tensor: Tensor<'_>) -> Result<Vec<f32>, InputError> {
    fn widen<T: Element>(bytes: &[u8]) -> Vec<f32> {
        numbers::<T>(bytes).iter().map(|x| x.to_f32()).collect()
    }
    let bytes = tensor.bytes()?;
    let values = match tensor.dtype()? {
        DType::F32 => widen::<f32>(bytes),
        DType::F16 => widen::<f16>(bytes),
        DType::Bf16 => widen::<bf16>(bytes),
    };
    match values.iter().position(|x| !x.is_finite()) {
        Some(at) => Err(tensor.wrong(format!("{} at place {at}", values[at]), "finite numbers")),
        None => Ok(values),
    }
}

fn numbers<T: Element>(bytes: &[u8]) -> Cow<'_, [T]> {
    try_cast_slice(bytes).map_or_else(|_| Cow::Owned(collect(bytes)), Cow::Borrowed)
}

fn collect<T: Element>(bytes: &[u8]) -> Vec<T> {
    bytes.chunks_exact(T::DTYPE.size()).map(pod_read_unaligned).collect()
}
