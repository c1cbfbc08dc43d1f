//! Adapters in the host's memory: one allocation each, every distinct matrix once, dense, without padding.

use crate::PoolError;
use half::{bf16, f16};
use moe_lora_core::{
    AdapterLayer, AdapterWeights, Buffer, DType, Element, ExpertLora, InputError, Lora, Matrix, ModelShape, Projection,
};
use std::collections::{BTreeMap, HashMap, HashSet};

/// Bytes; a cache line, and the widest vector.
const ALIGN: usize = 64;

/// The host's memory.
///
/// An adapter is one allocation in the model's format that starts at a multiple of 64 bytes. Its matrices follow each
/// other by layer, expert, projection, A before B; one that several experts or projections share is there once, and they
/// still share it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct HostMemory;

impl HostMemory {
    pub(crate) fn bytes(self, weights: &AdapterWeights, dtype: DType) -> usize {
        distinct(weights).map(|m| m.rows() * m.cols() * dtype.size()).sum()
    }

    pub(crate) fn store(self, weights: &AdapterWeights, shape: &ModelShape) -> Result<AdapterWeights, PoolError> {
        match shape.dtype {
            DType::F32 => pack::<f32>(weights, shape),
            DType::F16 => pack::<f16>(weights, shape),
            DType::Bf16 => pack::<bf16>(weights, shape),
        }
    }
}

/// Every distinct matrix of all layers once, in the order of storage.
fn distinct(weights: &AdapterWeights) -> impl Iterator<Item = &Matrix> {
    let mut seen = HashSet::new();
    let experts = weights.layers().values().flat_map(AdapterLayer::experts);
    let loras = experts.flat_map(|expert| Projection::ALL.into_iter().filter_map(|p| expert.get(p)));
    loras.flat_map(|lora| [lora.a(), lora.b()]).filter(move |matrix| seen.insert(matrix.storage_key()))
}

fn pack<T: Element>(weights: &AdapterWeights, shape: &ModelShape) -> Result<AdapterWeights, PoolError> {
    let size = T::DTYPE.size();
    let total: usize = distinct(weights).map(|m| m.rows() * m.cols()).sum();
    let slack = ALIGN / size - 1;

    let mut values: Vec<T> = Vec::new();
    values.try_reserve_exact(slack + total).map_err(|_| PoolError::OutOfMemory { bytes: (slack + total) * size })?;
    let first = values.as_ptr().align_offset(ALIGN).min(slack);
    values.resize(first, T::from_f32(0.0));
    let mut places = HashMap::new();
    for matrix in distinct(weights) {
        places.insert(matrix.storage_key(), values.len() * size);
        append(&mut values, matrix);
    }

    let buffer = Buffer::from_vec(values);
    // Every key is in `places`: both loops walk the same matrices.
    let matrix =
        |m: &Matrix| Matrix::new(buffer.clone(), T::DTYPE, places[&m.storage_key()], m.rows(), m.cols(), m.cols());
    let lora =
        |lora: Option<&Lora>| lora.map(|lora| lora.with_matrices(matrix(lora.a())?, matrix(lora.b())?)).transpose();
    let expert = |expert: &ExpertLora| -> Result<ExpertLora, InputError> {
        let [gate, up, down] = Projection::ALL.map(|p| lora(expert.get(p)));
        Ok(ExpertLora { gate: gate?, up: up?, down: down? })
    };
    let mut layers = BTreeMap::new();
    for (&n, layer) in weights.layers() {
        let experts = layer.experts().iter().map(expert).collect::<Result<_, _>>()?;
        layers.insert(n, AdapterLayer::new(&shape.layer, experts)?);
    }
    Ok(AdapterWeights::new(shape, layers)?)
}

/// Appends a matrix row by row, bit for bit if it is in the format already.
fn append<T: Element>(values: &mut Vec<T>, matrix: &Matrix) {
    fn convert<S: Element, T: Element>(values: &mut Vec<T>, matrix: &Matrix) {
        if let Some(view) = matrix.view::<S>() {
            for r in 0..view.rows() {
                values.extend(view.row(r).iter().map(|x| T::from_f32(x.to_f32())));
            }
        }
    }
    if let Some(view) = matrix.view::<T>() {
        (0..view.rows()).for_each(|r| values.extend_from_slice(view.row(r)));
        return;
    }
    match matrix.dtype() {
        DType::F32 => convert::<f32, T>(values, matrix),
        DType::F16 => convert::<f16, T>(values, matrix),
        DType::Bf16 => convert::<bf16, T>(values, matrix),
    }
}
