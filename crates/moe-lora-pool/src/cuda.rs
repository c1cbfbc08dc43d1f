//! Adapters in the memory of a GPU: one allocation each, every distinct matrix once, ranks padded to multiples of 8.

use crate::PoolError;
use half::{bf16, f16};
use moe_lora_core::{AdapterLayer, AdapterWeights, DType, Element, InputError, LayerShape, Lora, Matrix, Projection};
use moe_lora_cuda::{DeviceBuffer, Gpu, GpuError, Stream};
use moe_lora_kernels::AdapterEntry;
use std::collections::{BTreeMap, HashMap};

/// What ranks are padded to, and what widths have to be multiples of: 16 bytes of numbers.
const STEP: usize = 8;
/// The experts that the kernels tell apart.
const MOST_EXPERTS: usize = 1024;

/// The memory of one GPU.
///
/// An adapter is one allocation in the model's format, or in bf16 for an f32 model. Its ranks are padded with zeros to the
/// next multiple of 8, and these padded bytes are what the pool's budget is charged; what the driver rounds an allocation
/// up to is not counted. A matrix that several experts or projections share is there once. Uploads run on a stream of their
/// own.
#[derive(Debug, Clone)]
pub struct CudaMemory {
    gpu: Gpu,
    stream: Stream,
}

impl CudaMemory {
    /// The memory of an opened GPU.
    ///
    /// # Errors
    /// If the driver gives no stream.
    pub fn new(gpu: Gpu) -> Result<Self, GpuError> {
        let stream = gpu.stream()?;
        Ok(Self { gpu, stream })
    }

    /// The GPU.
    #[must_use]
    pub const fn gpu(&self) -> &Gpu {
        &self.gpu
    }

    /// The format that a model of `dtype` has on a GPU: f16 for f16, else bf16.
    #[must_use]
    pub const fn dtype(dtype: DType) -> DType {
        match dtype {
            DType::F16 => DType::F16,
            DType::F32 | DType::Bf16 => DType::Bf16,
        }
    }

    /// Whether the kernels can run layers of these sizes.
    ///
    /// # Errors
    /// If a width is no multiple of 8, or there are more than 1024 experts.
    pub fn check_shape(shape: &LayerShape) -> Result<(), InputError> {
        let LayerShape { num_experts, hidden_size, intermediate_size, .. } = *shape;
        if !hidden_size.is_multiple_of(STEP) || !intermediate_size.is_multiple_of(STEP) {
            let found = format!("hidden size {hidden_size} and intermediate size {intermediate_size}");
            return Err(InputError::new(found, "multiples of 8 on a GPU; the CPU takes any"));
        }
        if num_experts > MOST_EXPERTS {
            let expected = format!("at most {MOST_EXPERTS} on a GPU; the CPU takes any");
            return Err(InputError::new(format!("{num_experts} experts"), expected));
        }
        Ok(())
    }

    pub(crate) fn bytes(weights: &AdapterWeights) -> usize {
        distinct(weights).map(|(side, m)| side.padded(m) * 2).sum()
    }

    pub(crate) fn store(&self, weights: &AdapterWeights, dtype: DType) -> Result<CudaBlock, PoolError> {
        match Self::dtype(dtype) {
            DType::F16 => self.pack::<f16>(weights),
            _ => self.pack::<bf16>(weights),
        }
    }

    fn pack<T: Element>(&self, weights: &AdapterWeights) -> Result<CudaBlock, PoolError> {
        let bytes = Self::bytes(weights);
        let mut values: Vec<T> = Vec::new();
        values.try_reserve_exact(bytes / size_of::<T>()).map_err(|_| PoolError::OutOfMemory { bytes })?;
        let mut places = HashMap::new();
        for (side, matrix) in distinct(weights) {
            places.insert((side, matrix.storage_key()), size_of_val(&values[..]) as u64);
            side.append(&mut values, matrix);
        }
        let memory = self.gpu.alloc(bytes)?;
        if !values.is_empty() {
            self.stream.upload(&memory, 0, &values)?;
        }

        // Every key is in `places`: both loops walk the same matrices.
        let address = |side: Side, m: &Matrix| memory.address() + places[&(side, m.storage_key())];
        let entry = |lora: Option<&Lora>| {
            lora.map_or(AdapterEntry::default(), |lora| AdapterEntry {
                a: address(Side::A, lora.a()),
                b: address(Side::B, lora.b()),
                rank: lora.rank() as i32,
                scale: lora.scale(),
            })
        };
        let layer = |layer: &AdapterLayer| DeviceLayer {
            entries: loras(layer).map(entry).collect(),
            max_rank: layer.max_rank(),
        };
        let layers = weights.layers().iter().map(|(&n, l)| (n, layer(l))).collect();
        Ok(CudaBlock { _memory: memory, layers })
    }
}

impl PartialEq for CudaMemory {
    fn eq(&self, other: &Self) -> bool {
        self.gpu.info().ordinal == other.gpu.info().ordinal
    }
}

impl Eq for CudaMemory {}

impl From<GpuError> for PoolError {
    fn from(error: GpuError) -> Self {
        match error {
            GpuError::OutOfMemory { bytes, .. } => Self::OutOfMemory { bytes },
            error => Self::Gpu(error),
        }
    }
}

/// One stored adapter.
#[derive(Debug)]
pub(crate) struct CudaBlock {
    /// What the entries' addresses point into.
    _memory: DeviceBuffer,
    pub(crate) layers: BTreeMap<usize, DeviceLayer>,
}

/// Where the kernels find one adapter's matrices of one layer.
#[derive(Debug)]
pub struct DeviceLayer {
    entries: Vec<AdapterEntry>,
    max_rank: usize,
}

impl DeviceLayer {
    /// One entry a projection of an expert, `[E, 3]`.
    #[must_use]
    pub fn entries(&self) -> &[AdapterEntry] {
        &self.entries
    }

    /// The largest rank, without padding; 0 for an adapter that changes nothing here.
    #[must_use]
    pub const fn max_rank(&self) -> usize {
        self.max_rank
    }
}

/// Where one layer finds the adapters of a batch in GPU memory, by slot: an [`AdapterTable`](moe_lora_core::AdapterTable)
/// of device addresses, good as long as the lease that it borrows.
#[derive(Debug, Clone)]
pub struct DeviceTable<'a> {
    pub(crate) ordinal: usize,
    pub(crate) dtype: DType,
    pub(crate) shape: &'a LayerShape,
    pub(crate) slots: Vec<Option<&'a DeviceLayer>>,
}

impl<'a> DeviceTable<'a> {
    /// The number of the GPU whose addresses it holds.
    #[must_use]
    pub const fn ordinal(&self) -> usize {
        self.ordinal
    }

    /// The format of all matrices.
    #[must_use]
    pub const fn dtype(&self) -> DType {
        self.dtype
    }

    /// Sizes of the layer that the adapters are for.
    #[must_use]
    pub const fn shape(&self) -> &LayerShape {
        self.shape
    }

    /// The adapter in a slot; `None` also for -1, for slots that do not exist, and for an adapter without any change.
    #[must_use]
    pub fn layer(&self, slot: i32) -> Option<&'a DeviceLayer> {
        self.slots.get(usize::try_from(slot).ok()?).copied().flatten().filter(|layer| layer.max_rank > 0)
    }

    /// The largest rank in any slot, without padding.
    #[must_use]
    pub fn max_rank(&self) -> usize {
        self.slots.iter().flatten().map(|layer| layer.max_rank).max().unwrap_or(0)
    }
}

/// Which matrix of a pair: they are padded in different directions.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum Side {
    /// `[rank, in]`, rows of zeros below.
    A,
    /// `[out, rank]`, columns of zeros at the right.
    B,
}

impl Side {
    /// Numbers of the padded matrix.
    const fn padded(self, matrix: &Matrix) -> usize {
        let [rows, cols] = matrix.shape();
        match self {
            Self::A => rows.next_multiple_of(STEP) * cols,
            Self::B => rows * cols.next_multiple_of(STEP),
        }
    }

    fn append<T: Element>(self, values: &mut Vec<T>, matrix: &Matrix) {
        let (numbers, zero) = (matrix.to_vec::<T>(), T::from_f32(0.0));
        let end = values.len() + self.padded(matrix);
        match self {
            Self::A => values.extend(numbers),
            Self::B => {
                for row in numbers.chunks(matrix.cols()) {
                    values.extend_from_slice(row);
                    values.resize(values.len().next_multiple_of(STEP), zero);
                }
            }
        }
        values.resize(end, zero);
    }
}

fn loras(layer: &AdapterLayer) -> impl Iterator<Item = Option<&Lora>> {
    layer.experts().iter().flat_map(|expert| Projection::ALL.map(|p| expert.get(p)))
}

/// Every distinct matrix of all layers once, in the order of storage.
fn distinct(weights: &AdapterWeights) -> impl Iterator<Item = (Side, &Matrix)> {
    let mut seen = std::collections::HashSet::new();
    let matrices = weights.layers().values().flat_map(loras).flatten();
    let sides = matrices.flat_map(|lora| [(Side::A, lora.a()), (Side::B, lora.b())]);
    sides.filter(move |(side, matrix)| seen.insert((*side, matrix.storage_key())))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranks_are_padded_with_zeros_in_their_own_direction() {
        let matrix = Matrix::from_vec((1..=16).map(|x| x as f32).collect(), 2, 8).unwrap();
        let mut values: Vec<f32> = Vec::new();
        Side::A.append(&mut values, &matrix);
        assert_eq!((values.len(), Side::A.padded(&matrix)), (64, 64));
        assert!(values[..16].iter().zip(1..).all(|(v, n)| *v == n as f32) && values[16..].iter().all(|v| *v == 0.0));

        let matrix = Matrix::from_vec((1..=24).map(|x| x as f32).collect(), 8, 3).unwrap();
        Side::B.append(&mut values, &matrix);
        assert_eq!((values.len(), Side::B.padded(&matrix)), (128, 64));
        for (n, row) in values[64..].chunks(8).enumerate() {
            let first = 3.0 * n as f32 + 1.0;
            assert_eq!(row, [first, first + 1.0, first + 2.0, 0.0, 0.0, 0.0, 0.0, 0.0]);
        }
    }

    #[test]
    fn sizes_that_the_kernels_cannot_run_are_named() {
        let check =
            |experts, hidden, inner| CudaMemory::check_shape(&LayerShape::new(experts, 1, hidden, inner).unwrap());
        assert!(check(1024, 8, 2888).is_ok());
        assert_eq!(
            check(4, 16, 12).unwrap_err().to_string(),
            "found hidden size 16 and intermediate size 12, expected multiples of 8 on a GPU; the CPU takes any"
        );
        assert!(check(1025, 8, 8).unwrap_err().to_string().contains("1025 experts"));
    }
}
