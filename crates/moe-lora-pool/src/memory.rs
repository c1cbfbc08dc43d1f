//! Where adapters lie. A memory stores and frees; it decides nothing.

#[cfg(feature = "cuda")]
use crate::cuda::{CudaBlock, CudaMemory};
use crate::{HostMemory, PoolError};
use moe_lora_core::{AdapterWeights, DType, InputError, ModelShape};
use std::fmt;

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

impl Memory {
    /// Whether adapters of a model can be used from here.
    #[cfg_attr(not(feature = "cuda"), expect(unused_variables, reason = "the host takes any model"))]
    pub(crate) fn check(&self, shape: &ModelShape) -> Result<(), InputError> {
        match self {
            Self::Host(_) => Ok(()),
            #[cfg(feature = "cuda")]
            Self::Cuda(_) => CudaMemory::check_shape(&shape.layer),
        }
    }

    /// The format in which adapters of a model are stored.
    pub(crate) const fn dtype(&self, shape: &ModelShape) -> DType {
        match self {
            Self::Host(_) => shape.dtype,
            #[cfg(feature = "cuda")]
            Self::Cuda(_) => CudaMemory::dtype(shape.dtype),
        }
    }

    /// The bytes that a checked adapter will take, to be charged before it is stored.
    pub(crate) fn bytes(&self, weights: &AdapterWeights, shape: &ModelShape) -> usize {
        match self {
            Self::Host(memory) => memory.bytes(weights, shape.dtype),
            #[cfg(feature = "cuda")]
            Self::Cuda(_) => CudaMemory::bytes(weights),
        }
    }

    /// Copies a checked adapter into this memory.
    pub(crate) fn store(&self, weights: &AdapterWeights, shape: &ModelShape) -> Result<Block, PoolError> {
        match self {
            Self::Host(memory) => memory.store(weights, shape).map(Block::Host),
            #[cfg(feature = "cuda")]
            Self::Cuda(memory) => memory.store(weights, shape.dtype).map(Block::Cuda),
        }
    }
}

/// One stored adapter; dropping it frees its memory.
#[derive(Debug)]
pub(crate) enum Block {
    Host(AdapterWeights),
    #[cfg(feature = "cuda")]
    Cuda(CudaBlock),
}
