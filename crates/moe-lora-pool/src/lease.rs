//! What a batch holds while it runs.

use crate::PoolError;
#[cfg(feature = "cuda")]
use crate::cuda::DeviceTable;
use crate::memory::{Block, Memory};
use crate::policy::Hold;
use crate::shared::Shared;
use moe_lora_core::AdapterTable;
#[cfg(feature = "cuda")]
use moe_lora_core::InputError;
use std::fmt;
use std::sync::Arc;

/// The adapters of a batch, at the versions that were current when it was taken.
///
/// Until it drops nothing of it is evicted or freed, whatever is unloaded or replaced meanwhile. Hold it until the last
/// reader is done; it keeps the pool alive.
pub struct Lease {
    shared: Arc<Shared>,
    held: Vec<(Hold, Arc<Block>)>,
}

impl Lease {
    pub(crate) const fn new(shared: Arc<Shared>, held: Vec<(Hold, Arc<Block>)>) -> Self {
        Self { shared, held }
    }

    /// Where the decoder layer `layer` (absolute index) finds the batch's adapters, by slot. Slots that the batch does not
    /// use are empty; so is every slot in a layer that no adapter changes.
    ///
    /// # Errors
    /// [`PoolError::Input`] if the pool is in GPU memory, which a CPU cannot read.
    pub fn table(&self, layer: usize) -> Result<AdapterTable<'_>, PoolError> {
        match self.shared.memory {
            Memory::Host(_) => Ok(AdapterTable::new(self.by_slot(|block| match block {
                Block::Host(weights) => weights.layers().get(&layer),
                #[cfg(feature = "cuda")]
                Block::Cuda(_) => None,
            }))),
            #[cfg(feature = "cuda")]
            Memory::Cuda(_) => Err(self.elsewhere("a pool in the host's memory")),
        }
    }

    /// [`table`](Self::table) for the kernels of the GPU that holds the pool.
    ///
    /// # Errors
    /// [`PoolError::Input`] if the pool is in the host's memory.
    #[cfg(feature = "cuda")]
    pub fn device_table(&self, layer: usize) -> Result<DeviceTable<'_>, PoolError> {
        let Memory::Cuda(memory) = &self.shared.memory else { return Err(self.elsewhere("a pool in GPU memory")) };
        Ok(DeviceTable {
            ordinal: memory.gpu().info().ordinal,
            dtype: self.shared.memory.dtype(&self.shared.shape),
            shape: &self.shared.shape.layer,
            slots: self.by_slot(|block| match block {
                Block::Cuda(block) => block.layers.get(&layer),
                Block::Host(_) => None,
            }),
        })
    }

    /// One entry a slot, up to the last one of the batch.
    fn by_slot<'a, T: Copy>(&'a self, part: impl Fn(&'a Block) -> Option<T>) -> Vec<Option<T>> {
        let len = self.held.iter().map(|(hold, _)| hold.slot as usize + 1).max().unwrap_or(0);
        let mut slots = vec![None; len];
        for (hold, block) in &self.held {
            if let Some(slot) = slots.get_mut(hold.slot as usize) {
                *slot = part(block);
            }
        }
        slots
    }

    #[cfg(feature = "cuda")]
    fn elsewhere(&self, expected: &str) -> PoolError {
        InputError::new(format!("a pool on {}", self.shared.memory), expected).into()
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        // The memory first, then the account of it: the pool never counts on bytes that are not free yet.
        let holds: Vec<Hold> = self.held.drain(..).map(|(hold, _)| hold).collect();
        let mut state = self.shared.state();
        holds.into_iter().for_each(|hold| state.policy.release(hold));
    }
}

impl fmt::Debug for Lease {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(self.held.iter().map(|(hold, _)| hold)).finish()
    }
}
