//! What the kernels of one layer get to know of a batch's adapters.

use crate::memory::cuda::TableAddress;
use crate::memory::{Memory, Store};
use crate::shared::Shared;
use crate::{Lease, PoolError};
use moe_lora_core::{DType, InputError, LayerShape};
use moe_lora_cuda::Stream;

/// Where one layer finds the adapters of a batch in GPU memory, good as long as the lease that it borrows.
#[derive(Debug)]
pub struct DeviceTable<'a> {
    lease: &'a Lease,
    layer: usize,
    ordinal: usize,
    dtype: DType,
    shape: &'a LayerShape,
    address: TableAddress,
}

impl<'a> DeviceTable<'a> {
    pub(crate) fn new(lease: &'a Lease, shared: &'a Shared, layer: usize) -> Result<Self, PoolError> {
        let (Memory::Cuda(memory), Store::Cuda(store)) = (&shared.memory, &shared.store) else {
            return Err(InputError::new(format!("a pool on {}", shared.memory), "a pool in GPU memory").into());
        };
        let address = store.address(layer).ok_or_else(|| {
            InputError::new(format!("layer {layer}"), format!("a MoE layer of {:?}", shared.shape.moe_layers))
        })?;
        let (ordinal, dtype) = (memory.gpu().info().ordinal, store.dtype());
        Ok(Self { lease, layer, ordinal, dtype, shape: &shared.shape.layer, address })
    }

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

    /// Where it lies: the same for every lease.
    #[must_use]
    pub const fn address(&self) -> TableAddress {
        self.address
    }

    /// The slot of every token's adapter, -1 for the base model, `[T]`.
    #[must_use]
    pub fn token_slots(&self) -> &'a [i32] {
        self.lease.device_slots()
    }

    /// The largest rank of the adapter in a slot, without padding; 0 if it leaves this layer alone. `None` if the lease does
    /// not hold the slot.
    #[must_use]
    pub fn rank(&self, slot: i32) -> Option<usize> {
        self.lease.blocks().find(|block| i64::from(block.slot()) == i64::from(slot)).map(|block| block.rank(self.layer))
    }

    /// The largest rank in any leased slot, without padding.
    #[must_use]
    pub fn max_rank(&self) -> usize {
        self.lease.blocks().map(|block| block.rank(self.layer)).max().unwrap_or(0)
    }

    /// Makes later work of a stream wait until this layer's adapters are in GPU memory; see [`Lease::wait_on`].
    ///
    /// # Errors
    /// If the GPU fails.
    pub fn wait_on(&self, stream: &Stream) -> Result<(), PoolError> {
        self.lease.wait_for_layer(self.layer, stream)
    }
}
