//! Adapters whose matrices are in the GPU's memory already: what a training loop on the same GPU has.
#![allow(unsafe_code, reason = "addresses are a promise of the caller's")]

#[cfg(test)]
mod tests;

use super::plan::{Plan, Side};
use crate::PoolConfig;
use moe_lora_core::{DType, InputError, LayerShape, ModelShape, Projection};
use moe_lora_cuda::{Gpu, Stream};
use std::collections::BTreeMap;

/// A matrix in GPU memory, row-major. The same address and sizes mean one matrix, which is stored once.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct DeviceMatrix {
    /// Of the first number.
    pub address: u64,
    /// Rows.
    pub rows: usize,
    /// Columns; the numbers of a row lie one behind the other.
    pub cols: usize,
    /// Numbers from the start of a row to that of the next, at least `cols`.
    pub stride: usize,
}

/// The change of one matrix, `W + scale * B A`, in GPU memory.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct DeviceLora {
    /// `[rank, in]`, or a part of these rows in a pool of fully sharded adapters.
    pub a: DeviceMatrix,
    /// `[out, rank]`, likewise.
    pub b: DeviceMatrix,
    /// `lora_alpha / rank` (or over its root with rsLoRA), not yet in either matrix.
    pub scale: f32,
}

/// One layer: an entry an expert, in it gate, up and down ([`Projection::ALL`]); `None` is no change.
pub type DeviceLayer = Vec<[Option<DeviceLora>; 3]>;

/// A whole adapter in GPU memory, for [`AdapterPool::load_device`](crate::AdapterPool::load_device) and
/// [`replace_device`](crate::AdapterPool::replace_device).
#[derive(Debug, Clone)]
pub struct DeviceWeights {
    dtype: DType,
    layers: BTreeMap<usize, DeviceLayer>,
    stream: Stream,
}

impl DeviceWeights {
    /// Matrices of one format, by absolute decoder layer; layers that the adapter does not change may be absent.
    ///
    /// `stream` is the one whose work writes the matrices. The pool copies behind the work that was given to it before the
    /// call of the pool, and work that is given to it after that call runs behind the copies: nobody waits on the host, and
    /// the next training step may overwrite the matrices. It must not be capturing then.
    ///
    /// # Safety
    /// During every call of a pool with these weights, and from there on until later work of `stream` runs, every matrix
    /// must be `rows` rows of `cols` numbers of `dtype`, `stride` apart, in memory of the pool's GPU that is allocated and
    /// that other streams do not write.
    #[must_use]
    pub unsafe fn new(dtype: DType, layers: BTreeMap<usize, DeviceLayer>, stream: &Stream) -> Self {
        Self { dtype, layers, stream: stream.clone() }
    }

    /// The largest rank anywhere.
    #[must_use]
    pub fn max_rank(&self) -> usize {
        self.loras().map(|(.., lora)| lora.b.cols).max().unwrap_or(0)
    }

    /// Layer, expert, projection and change.
    fn loras(&self) -> impl Iterator<Item = (usize, usize, Projection, &DeviceLora)> {
        self.layers.iter().flat_map(|(&n, layer)| {
            layer.iter().enumerate().flat_map(move |(e, expert)| {
                let all = Projection::ALL.into_iter().zip(expert);
                all.filter_map(move |(p, lora)| Some((n, e, p, lora.as_ref()?)))
            })
        })
    }

    /// Everything that can be wrong, but for the numbers, which the host does not see.
    pub(crate) fn check(
        &self,
        gpu: &Gpu,
        dtype: DType,
        shape: &ModelShape,
        config: &PoolConfig,
    ) -> Result<(), InputError> {
        if self.stream.cudarc().context() != gpu.context() {
            return Err(InputError::new("a stream of another GPU", format!("one of cuda:{}", gpu.info().ordinal)));
        }
        if self.dtype != dtype {
            return Err(InputError::new(format!("{} in GPU memory", self.dtype), format!("the pool's {dtype}")));
        }
        for (n, layer) in &self.layers {
            if shape.moe_layers.binary_search(n).is_err() {
                return Err(InputError::new(format!("layer {n}"), format!("a MoE layer of {:?}", shape.moe_layers)));
            }
            if layer.len() != shape.layer.num_experts {
                let found = format!("{} experts", layer.len());
                return Err(InputError::new(found, format!("the model's {}", shape.layer.num_experts))
                    .in_tensor(format!("layer {n}")));
            }
        }
        for (n, e, projection, lora) in self.loras() {
            lora.check(dtype, projection, &shape.layer, config.max_rank)
                .map_err(|error| error.in_tensor(format!("layer {n} expert {e} {projection}")))?;
        }
        Ok(())
    }
}

impl DeviceLora {
    fn check(
        &self,
        dtype: DType,
        projection: Projection,
        shape: &LayerShape,
        max_rank: usize,
    ) -> Result<(), InputError> {
        let Self { a, b, scale } = self;
        let ([out, input], rank) = (projection.lora_shape(shape), b.cols);
        if [a.rows, a.cols, b.rows] != [projection.a_rows(shape, rank), input, out] {
            let found = format!("A {:?}, B {:?}", [a.rows, a.cols], [b.rows, b.cols]);
            return Err(InputError::new(found, format!("A [rank, {input}], B [{out}, rank]")));
        }
        if rank == 0 || rank > max_rank {
            return Err(InputError::new(format!("rank {rank}"), format!("1 to the pool's max_rank of {max_rank}")));
        }
        if !scale.is_finite() {
            return Err(InputError::new(format!("scale {scale}"), "a finite scale"));
        }
        for (side, matrix) in [("A", a), ("B", b)] {
            let size = dtype.size();
            let span = matrix.stride.checked_mul(matrix.rows).and_then(|numbers| numbers.checked_mul(size));
            let end = span.and_then(|span| matrix.address.checked_add(span as u64));
            if matrix.stride < matrix.cols || end.is_none() {
                let found = format!("{side} with a stride of {}", matrix.stride);
                return Err(InputError::new(found, format!("at least its {} columns", matrix.cols)));
            }
            if matrix.address == 0 || !matrix.address.is_multiple_of(size as u64) {
                let found = format!("{side} at address {:#x}", matrix.address);
                return Err(InputError::new(found, format!("an address of {dtype} numbers")));
            }
        }
        Ok(())
    }
}

/// Checked weights in the order of their plan.
#[derive(Debug)]
pub(crate) struct Views {
    pub(super) plan: Plan,
    pub(super) matrices: Vec<(Side, DeviceMatrix)>,
    pub(super) stream: Stream,
}

impl Views {
    pub(crate) fn new(weights: &DeviceWeights) -> Self {
        let layers = weights.layers.iter().map(|(&n, layer)| {
            (n, layer.iter().flatten().map(|lora| lora.as_ref().map(|lora| (lora.a, lora.b, lora.scale))).collect())
        });
        let (plan, matrices) = Plan::of(layers, |matrix| (matrix, [matrix.rows, matrix.cols]));
        Self { plan, matrices, stream: weights.stream.clone() }
    }

    pub(crate) fn bytes(&self) -> usize {
        self.plan.bytes()
    }
}
