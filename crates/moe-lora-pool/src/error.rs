//! Why the pool refuses.

use moe_lora_core::{AdapterId, InputError};

/// Why a pool did not do what it was asked to. The pool is as it was before the call.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum PoolError {
    /// The weights or the configuration are wrong, whatever else the pool holds.
    #[error(transparent)]
    Input(#[from] InputError),
    /// `load` of a name that is loaded or is being loaded; `replace` it or `unload` it first.
    #[error("adapter {name:?} is loaded already")]
    AlreadyLoaded {
        /// The name.
        name: String,
    },
    /// `replace` of a name that is not loaded.
    #[error("adapter {name:?} is not loaded")]
    NotLoaded {
        /// The name.
        name: String,
    },
    /// A name that an [`AdapterLibrary`](crate::AdapterLibrary) does not know.
    #[error("adapter {name:?} is not registered")]
    NotRegistered {
        /// The name.
        name: String,
    },
    /// An id that means no adapter: unloaded or evicted since, or never given out by this pool.
    #[error("adapter id (slot {}, generation {}) means no loaded adapter: unloaded, evicted or never given out", id.slot, id.generation)]
    Stale {
        /// The id.
        id: AdapterId,
    },
    /// An adapter that another call is replacing or loading, or that requests hold.
    #[error("adapter {name:?} is being replaced or loaded by another call, or is in use")]
    Busy {
        /// The name.
        name: String,
    },
    /// The bytes are not there, and what is pinned or in use is not evicted.
    #[error(
        "no room for {needed} bytes: of a budget of {budget}, {free} are free, {evictable} evictable, {pinned} pinned, \
         {in_use} in use and {loading} being loaded"
    )]
    NoRoom {
        /// Bytes of the new adapter.
        needed: usize,
        /// The pool's budget.
        budget: usize,
        /// Bytes that nobody uses.
        free: usize,
        /// Bytes of adapters that are neither pinned, leased nor being replaced.
        evictable: usize,
        /// Bytes of pinned adapters.
        pinned: usize,
        /// Bytes of unpinned adapters, and of unloaded or replaced versions, that leases hold.
        in_use: usize,
        /// Bytes of other loads and replaces that are under way.
        loading: usize,
    },
    /// As many adapters as allowed are loaded, and all are pinned or in use.
    #[error("no slot for one more adapter: all {max_adapters} are pinned, in use or being loaded")]
    NoSlot {
        /// [`PoolConfig::max_adapters`](crate::PoolConfig::max_adapters).
        max_adapters: usize,
    },
    /// Enough bytes are free, but no holes for all matrices, and nothing more can be evicted.
    #[error("no holes for {bytes} bytes of matrices in {free} free bytes")]
    Fragmented {
        /// Bytes of the new adapter.
        bytes: usize,
        /// Free bytes of the GPU memory.
        free: usize,
    },
    /// The GPU failed.
    #[cfg(feature = "cuda")]
    #[error(transparent)]
    Gpu(moe_lora_cuda::GpuError),
    /// The system or the GPU has not the memory that the budget allows. Adapters that were evicted for it stay evicted.
    #[error("the system or the GPU refuses {bytes} bytes of memory")]
    OutOfMemory {
        /// Bytes asked for.
        bytes: usize,
    },
}

impl PoolError {
    /// What is wrong with the input, if that is the reason.
    #[must_use]
    pub const fn input(&self) -> Option<&InputError> {
        match self {
            Self::Input(error) => Some(error),
            _ => None,
        }
    }
}
