//! Where adapters lie. A memory packs, stores and frees; it decides nothing.

#[cfg(feature = "cuda")]
pub(crate) mod cuda;
#[cfg(any(feature = "cuda", test))]
mod extents;
mod host;

pub use host::HostMemory;

use crate::{PoolConfig, PoolError};
#[cfg(feature = "cuda")]
use cuda::{CudaBlock, CudaMemory, CudaStore, Image};
use moe_lora_core::{AdapterWeights, DType, ModelShape};
use std::fmt;
#[cfg(feature = "cuda")]
use std::sync::Arc;

/// The memory under a pool.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum Memory {
    /// The host's memory.
    Host(HostMemory),
    /// A GPU's memory.
    #[cfg(feature = "cuda")]
    Cuda(CudaMemory),
}

impl From<HostMemory> for Memory {
    fn from(memory: HostMemory) -> Self {
        Self::Host(memory)
    }
}

#[cfg(feature = "cuda")]
impl From<CudaMemory> for Memory {
    fn from(memory: CudaMemory) -> Self {
        Self::Cuda(memory)
    }
}

impl fmt::Display for Memory {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Host(_) => f.write_str("cpu"),
            #[cfg(feature = "cuda")]
            Self::Cuda(memory) => write!(f, "cuda:{}", memory.gpu().info().ordinal),
        }
    }
}

/// What one pool has in its memory.
#[derive(Debug)]
pub(crate) enum Store {
    Host(HostMemory),
    #[cfg(feature = "cuda")]
    Cuda(Arc<CudaStore>),
}

/// Bytes that a store holds.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct StoreBytes {
    pub(crate) reserved: usize,
    pub(crate) tables: usize,
    pub(crate) unusable: usize,
}

/// An adapter on the host, in the form in which its memory takes it.
#[derive(Debug, Clone)]
pub(crate) enum Packed {
    Host(AdapterWeights),
    #[cfg(feature = "cuda")]
    Cuda(Arc<Image>),
}

/// One stored adapter; dropping it frees its memory.
#[derive(Debug)]
pub(crate) enum Block {
    Host(AdapterWeights),
    #[cfg(feature = "cuda")]
    Cuda(CudaBlock),
}

impl Store {
    /// Fails if adapters of the model cannot be used from the memory.
    #[cfg_attr(not(feature = "cuda"), expect(unused_variables, reason = "the host takes any model"))]
    pub(crate) fn new(memory: &Memory, shape: &ModelShape, config: &PoolConfig) -> Result<Self, PoolError> {
        match memory {
            Memory::Host(memory) => Ok(Self::Host(*memory)),
            #[cfg(feature = "cuda")]
            Memory::Cuda(memory) => {
                CudaMemory::check_shape(&shape.layer)?;
                Ok(Self::Cuda(Arc::new(CudaStore::new(memory.gpu(), shape, config)?)))
            }
        }
    }

    /// The most versions of adapters at a time.
    #[cfg_attr(not(feature = "cuda"), expect(unused_variables, reason = "the host has no tables"))]
    pub(crate) const fn rows(&self, config: &PoolConfig) -> usize {
        match self {
            Self::Host(_) => usize::MAX,
            #[cfg(feature = "cuda")]
            Self::Cuda(_) => config.device_slots,
        }
    }

    /// The format in which adapters of a model are stored.
    pub(crate) fn dtype(&self, shape: &ModelShape) -> DType {
        match self {
            Self::Host(_) => shape.dtype,
            #[cfg(feature = "cuda")]
            Self::Cuda(store) => store.dtype(),
        }
    }

    /// The bytes that a checked adapter will take, to be charged before it is stored.
    pub(crate) fn bytes(&self, weights: &AdapterWeights, shape: &ModelShape) -> usize {
        match self {
            Self::Host(memory) => memory.bytes(weights, shape.dtype),
            #[cfg(feature = "cuda")]
            Self::Cuda(_) => CudaStore::bytes(weights),
        }
    }

    pub(crate) fn held(&self) -> StoreBytes {
        match self {
            Self::Host(_) => StoreBytes::default(),
            #[cfg(feature = "cuda")]
            Self::Cuda(store) => store.held(),
        }
    }

    /// Converts a checked adapter, on the host: the slow part.
    pub(crate) fn pack(&self, weights: &AdapterWeights, shape: &ModelShape) -> Result<Packed, PoolError> {
        match self {
            Self::Host(memory) => memory.store(weights, shape).map(Packed::Host),
            #[cfg(feature = "cuda")]
            Self::Cuda(store) => Ok(Packed::Cuda(Arc::new(store.pack(weights)?))),
        }
    }

    /// Puts a packed adapter into the memory; a GPU may still be busy with it when this returns. With `instead_of`, which
    /// nobody leases, it may lie where that block lies, which is then gone.
    #[cfg_attr(not(feature = "cuda"), expect(unused_variables, reason = "the host has no rows"))]
    pub(crate) fn place(&self, packed: &Packed, row: u32, instead_of: Option<&Block>) -> Result<Block, PoolError> {
        match (self, packed) {
            (_, Packed::Host(weights)) => Ok(Block::Host(weights.clone())),
            #[cfg(feature = "cuda")]
            (Self::Cuda(store), Packed::Cuda(image)) => {
                let old = instead_of.and_then(|old| match old {
                    Block::Cuda(block) => Some(block),
                    Block::Host(_) => None,
                });
                store.place(image, row, old).map(Block::Cuda)
            }
            #[cfg(feature = "cuda")]
            (Self::Host(_), Packed::Cuda(_)) => Err(PoolError::OutOfMemory { bytes: 0 }),
        }
    }
}

impl Block {
    /// The adapter, if it is in the host's memory.
    pub(crate) const fn host(&self) -> Option<&AdapterWeights> {
        match self {
            Self::Host(weights) => Some(weights),
            #[cfg(feature = "cuda")]
            Self::Cuda(_) => None,
        }
    }

    /// Whether all of it has arrived.
    pub(crate) fn is_ready(&self) -> bool {
        match self {
            Self::Host(_) => true,
            #[cfg(feature = "cuda")]
            Self::Cuda(block) => block.is_ready(),
        }
    }

    /// Whether another block took its memory.
    pub(crate) fn is_gone(&self) -> bool {
        match self {
            Self::Host(_) => false,
            #[cfg(feature = "cuda")]
            Self::Cuda(block) => block.is_gone(),
        }
    }
}
