//! Where adapters lie. A memory stores and frees; it decides nothing.

use crate::{HostMemory, PoolError};
use moe_lora_core::{AdapterWeights, ModelShape};

/// The memory under a pool.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub enum Memory {
    /// The host's memory.
    Host(HostMemory),
}

impl From<HostMemory> for Memory {
    fn from(memory: HostMemory) -> Self {
        Self::Host(memory)
    }
}

impl Memory {
    /// The bytes that a checked adapter will take, to be charged before it is stored.
    pub(crate) fn bytes(&self, weights: &AdapterWeights, shape: &ModelShape) -> usize {
        match self {
            Self::Host(memory) => memory.bytes(weights, shape.dtype),
        }
    }

    /// Copies a checked adapter into this memory, in the model's format.
    pub(crate) fn store(&self, weights: &AdapterWeights, shape: &ModelShape) -> Result<Block, PoolError> {
        match self {
            Self::Host(memory) => memory.store(weights, shape).map(Block::Host),
        }
    }
}

/// One stored adapter; dropping it frees its memory.
#[derive(Debug)]
pub(crate) enum Block {
    Host(AdapterWeights),
}

impl Block {
    /// The adapter where the CPU can read it.
    pub(crate) const fn host(&self) -> &AdapterWeights {
        match self {
            Self::Host(weights) => weights,
        }
    }
}
