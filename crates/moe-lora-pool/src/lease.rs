//! What a batch holds while it runs.

use crate::memory::Block;
use crate::policy::Hold;
use crate::shared::Shared;
use moe_lora_core::AdapterTable;
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
    #[must_use]
    pub fn table(&self, layer: usize) -> AdapterTable<'_> {
        let len = self.held.iter().map(|(hold, _)| hold.slot as usize + 1).max().unwrap_or(0);
        let mut slots = vec![None; len];
        for (hold, block) in &self.held {
            if let Some(slot) = slots.get_mut(hold.slot as usize) {
                *slot = block.host().layers().get(&layer);
            }
        }
        AdapterTable::new(slots)
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
