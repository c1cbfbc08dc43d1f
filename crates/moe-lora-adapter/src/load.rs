//! One tensor from the file: read, converted to the model's format, checked number by number.

use crate::key::Target;
use bytemuck::{cast_slice, pod_collect_to_vec, pod_read_unaligned};
use half::{bf16, f16};
use moe_lora_core::{Buffer, DType, Element, InputError, Matrix, ModelShape};
use moe_lora_files::{Dtype, SafetensorsFile, TensorInfo};
use std::fmt;

use crate::{AdapterConfig, OpenOptions};

/// All that resolving one layer needs.
#[derive(Clone, Copy)]
pub(crate) struct Context<'a> {
    pub(crate) file: &'a SafetensorsFile,
    pub(crate) config: &'a AdapterConfig,
    pub(crate) options: &'a OpenOptions,
    pub(crate) shape: &'a ModelShape,
    pub(crate) layer: usize,
}

impl<'a> Context<'a> {
    pub(crate) fn tensor(&self, place: Option<usize>) -> Option<&'a TensorInfo> {
        self.file.tensors().get(place?)
    }

    pub(crate) fn place(&self, target: Target, expert: Option<usize>) -> Place {
        Place { layer: self.layer, expert, target }
    }
}

/// Names a part of the model in errors.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Place {
    layer: usize,
    expert: Option<usize>,
    target: Target,
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "layer {} ", self.layer)?;
        if let Some(expert) = self.expert {
            write!(f, "expert {expert} ")?;
        }
        write!(f, "{}", self.target)
    }
}

/// Reads a tensor. `expert_of` tells the expert of the n-th number, for errors.
pub(crate) fn read<T: Element>(
    cx: Context<'_>,
    tensor: &TensorInfo,
    target: Target,
    expert_of: impl Fn(usize) -> Option<usize>,
) -> Result<Vec<T>, InputError> {
    numbers(cx.file, tensor, |at| cx.place(target, expert_of(at)).to_string())
}

/// Reads a tensor. `place` tells what the n-th number belongs to, for errors.
pub(crate) fn numbers<T: Element>(
    file: &SafetensorsFile,
    tensor: &TensorInfo,
    place: impl Fn(usize) -> String,
) -> Result<Vec<T>, InputError> {
    let bytes = file.read(tensor)?;
    let values = match tensor.dtype {
        Dtype::F32 => convert::<f32, T>(&bytes),
        Dtype::F16 => convert::<f16, T>(&bytes),
        Dtype::BF16 => convert::<bf16, T>(&bytes),
        other => {
            let found = format!("{}: {other:?}", place(0));
            return Err(InputError::new(found, "BF16, F16 or F32").in_tensor(&*tensor.name));
        }
    };
    values.map_err(|(at, value)| {
        let found = format!("{}: {value} as number {at}", place(at));
        InputError::new(found, format!("finite {} values", T::DTYPE)).in_tensor(&*tensor.name)
    })
}

/// Converts; the error is the first number that is not finite in the new format.
fn convert<S: Element, T: Element>(bytes: &[u8]) -> Result<Vec<T>, (usize, f32)> {
    let numbers = || bytes.chunks_exact(S::DTYPE.size()).map(|n| pod_read_unaligned::<S>(n).to_f32());
    let values: Vec<T> =
        if S::DTYPE == T::DTYPE { pod_collect_to_vec(bytes) } else { numbers().map(T::from_f32).collect() };
    match first_non_finite(&values) {
        None => Ok(values),
        Some(at) => Err((at, numbers().nth(at).unwrap_or(f32::NAN))),
    }
}

/// Infinities and NaNs have all bits of the exponent set. A blockwise `or` first, since it vectorises.
fn first_non_finite<T: Element>(values: &[T]) -> Option<usize> {
    fn find<N: Copy>(values: &[N], bad: impl Fn(N) -> bool) -> Option<usize> {
        const BLOCK: usize = 4096;
        let block = values.chunks(BLOCK).position(|block| block.iter().fold(false, |any, &n| any | bad(n)))?;
        values.iter().skip(block * BLOCK).position(|&n| bad(n)).map(|at| block * BLOCK + at)
    }
    let half = |exponent: u16| find(cast_slice::<T, u16>(values), move |n| n & exponent == exponent);
    match T::DTYPE {
        DType::F32 => find(cast_slice::<T, u32>(values), |n| n & 0x7f80_0000 == 0x7f80_0000),
        DType::Bf16 => half(0x7f80),
        DType::F16 => half(0x7c00),
    }
}

/// Cuts `[n, rows, cols]` into matrices that share one buffer.
pub(crate) fn matrices<T: Element>(values: Vec<T>, rows: usize, cols: usize) -> Result<Vec<Matrix>, InputError> {
    let n = values.len() / (rows * cols);
    let buffer = Buffer::from_vec(values);
    let bytes = rows * cols * T::DTYPE.size();
    (0..n).map(|i| Matrix::new(buffer.clone(), T::DTYPE, i * bytes, rows, cols, cols)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_non_finite_number_is_found() {
        for at in [0, 4095, 4096, 9000] {
            let mut values = vec![-1.5_f32; 9001];
            values[at] = f32::NEG_INFINITY;
            assert_eq!(first_non_finite(&values), Some(at));
            let halves: Vec<f16> = values.iter().map(|&v| f16::from_f32(v)).collect();
            assert_eq!(first_non_finite(&halves), Some(at));
            values[at] = f32::NAN;
            let brains: Vec<bf16> = values.iter().map(|&v| bf16::from_f32(v)).collect();
            assert_eq!(first_non_finite(&brains), Some(at));
        }
        assert_eq!(first_non_finite(&[f32::MAX, f32::MIN_POSITIVE, 0.0]), None);
        assert_eq!(first_non_finite(&[f16::MAX, f16::MIN]), None);
    }
}
