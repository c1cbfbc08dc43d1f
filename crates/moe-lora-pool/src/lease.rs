//! What a batch holds while it runs.

use crate::PoolError;
#[cfg(feature = "cuda")]
use crate::device_table::DeviceTable;
use crate::memory::{Block, Memory};
use crate::policy::Hold;
use crate::shared::Shared;
use moe_lora_core::AdapterTable;
#[cfg(feature = "cuda")]
use moe_lora_core::InputError;
#[cfg(feature = "cuda")]
use moe_lora_cuda::Stream;
use std::fmt;
use std::sync::Arc;
#[cfg(feature = "cuda")]
use std::sync::{Mutex, PoisonError};

/// The adapters of a batch, at the versions that were current when it was taken.
///
/// Until it drops nothing of it is evicted or freed, whatever is unloaded or replaced meanwhile. Hold it until the last
/// reader is done, or, on a GPU, until the last reader was given to a stream that [waits for it](Self::wait_on): when it
/// drops, the pool records an event on these streams and reuses the memory behind it. It keeps the pool alive.
pub struct Lease {
    shared: Arc<Shared>,
    held: Vec<(Hold, Arc<Block>)>,
    /// One entry a token, -1 for the base model.
    rows: Vec<i32>,
    /// Those that read the adapters.
    #[cfg(feature = "cuda")]
    streams: Mutex<Vec<Stream>>,
}

impl Lease {
    pub(crate) fn new(shared: Arc<Shared>, held: Vec<(Hold, Arc<Block>)>, rows: Vec<i32>) -> Self {
        Self {
            shared,
            held,
            rows,
            #[cfg(feature = "cuda")]
            streams: Mutex::default(),
        }
    }

    /// Where the decoder layer `layer` (absolute index) finds the batch's adapters, by the slot of their ids. Slots that the
    /// batch does not use are empty; so is every slot in a layer that no adapter changes.
    ///
    /// # Errors
    /// [`PoolError::Input`] if the pool is in GPU memory, which a CPU cannot read.
    pub fn table(&self, layer: usize) -> Result<AdapterTable<'_>, PoolError> {
        match self.shared.memory {
            Memory::Host(_) => {
                let len = self.held.iter().map(|(hold, _)| hold.slot as usize + 1).max().unwrap_or(0);
                let mut slots = vec![None; len];
                for (hold, block) in &self.held {
                    if let Some(slot) = slots.get_mut(hold.slot as usize) {
                        *slot = block.host().and_then(|weights| weights.layers().get(&layer));
                    }
                }
                Ok(AdapterTable::new(slots))
            }
            #[cfg(feature = "cuda")]
            Memory::Cuda(_) => {
                Err(InputError::new(format!("a pool on {}", self.shared.memory), "a pool in the host's memory").into())
            }
        }
    }

    /// The slot of every token's adapter in the [device tables](Self::device_table), -1 for the base model, `[T]`: what the
    /// kernels take. Every version of an adapter has a slot of its own, so that a batch in flight never sees a part of the
    /// next version.
    #[must_use]
    pub fn device_slots(&self) -> &[i32] {
        &self.rows
    }
}

#[cfg(feature = "cuda")]
impl Lease {
    /// Where the kernels of the GPU that holds the pool find the adapters of decoder layer `layer` (absolute index).
    ///
    /// # Errors
    /// [`PoolError::Input`] if the pool is in the host's memory, or the model has no such MoE layer.
    pub fn device_table(&self, layer: usize) -> Result<DeviceTable<'_>, PoolError> {
        DeviceTable::new(self, &self.shared, layer)
    }

    /// Makes later work of a stream wait until all of the leased adapters is in GPU memory. Nothing waits on the host, and
    /// nothing at all for adapters that are there already. To be called before the first reader is given to the stream (not
    /// within a capture), once for every stream that reads.
    ///
    /// # Errors
    /// If the GPU fails.
    pub fn wait_on(&self, stream: &Stream) -> Result<(), PoolError> {
        self.wait(stream, None)
    }

    /// [`wait_on`](Self::wait_on) for a reader of one layer: later layers may still be on their way.
    ///
    /// # Errors
    /// If the GPU fails.
    pub fn wait_for_layer(&self, layer: usize, stream: &Stream) -> Result<(), PoolError> {
        self.wait(stream, Some(layer))
    }

    fn wait(&self, stream: &Stream, layer: Option<usize>) -> Result<(), PoolError> {
        let mut streams = self.streams.lock().unwrap_or_else(PoisonError::into_inner);
        if !streams.contains(stream) {
            streams.push(stream.clone());
        }
        drop(streams);
        for block in self.blocks() {
            block.wait_on(stream, layer)?;
        }
        Ok(())
    }

    /// Whether all of the leased adapters is in GPU memory now: no stream would wait.
    #[must_use]
    pub fn is_ready(&self) -> bool {
        self.blocks().all(|block| block.is_ready())
    }

    pub(crate) fn blocks(&self) -> impl Iterator<Item = &crate::memory::cuda::CudaBlock> {
        self.held.iter().filter_map(|(_, block)| match &**block {
            Block::Cuda(block) => Some(block),
            Block::Host(_) => None,
        })
    }

    /// Marks the end of the readers.
    fn record(&mut self) {
        let streams = std::mem::take(self.streams.get_mut().unwrap_or_else(PoisonError::into_inner));
        for stream in streams {
            match stream.record(false).map(Arc::new) {
                Ok(event) => self.blocks().for_each(|block| block.read_by(&stream, &event)),
                // Without an event the host has to wait; what fails here too, the next call reports.
                Err(_) => drop(stream.synchronize()),
            }
        }
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        #[cfg(feature = "cuda")]
        self.record();
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
