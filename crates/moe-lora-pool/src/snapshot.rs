//! What a pool holds at one moment.

use moe_lora_core::AdapterId;

/// A consistent picture of a pool.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PoolSnapshot {
    /// The budget in bytes.
    pub budget_bytes: usize,
    /// Bytes taken: loaded adapters, draining versions and loads under way. Never above the budget.
    pub used_bytes: usize,
    /// Of these, bytes of unloaded or replaced versions that leases still hold.
    pub draining_bytes: usize,
    /// Of these, bytes set aside by loads and replaces under way.
    pub loading_bytes: usize,
    /// Bytes of GPU memory that the pool holds for adapters, at most the budget; 0 in the host's memory.
    pub reserved_bytes: usize,
    /// Bytes of GPU memory beside the budget: the device tables.
    pub table_bytes: usize,
    /// Free bytes of the reserve in holes too small for a matrix of the mean size.
    pub fragmented_bytes: usize,
    /// The loaded adapters, by slot.
    pub adapters: Vec<AdapterSnapshot>,
    /// Loads that succeeded since the pool was made.
    pub loads: u64,
    /// Adapters evicted to make room.
    pub evictions: u64,
    /// Replaces that succeeded.
    pub replaces: u64,
}

/// One loaded adapter.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AdapterSnapshot {
    /// The name it was loaded under.
    pub name: String,
    /// Its id.
    pub id: AdapterId,
    /// 1 when loaded, one more with every replace.
    pub version: u64,
    /// Its largest rank anywhere.
    pub max_rank: usize,
    /// Its bytes.
    pub bytes: usize,
    /// Whether it is pinned.
    pub pinned: bool,
    /// Leases that hold this version.
    pub leases: usize,
}
