//! What a pool may hold.

use moe_lora_core::InputError;

/// The limits of a pool; fixed for its life.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PoolConfig {
    /// Budget in bytes for the numbers of all adapters, also of unloaded ones that a batch still uses. Default: 4 GiB.
    pub bytes: usize,
    /// The largest rank that an adapter may have anywhere. Default: 512. On a GPU a limit of 64, better 32 or 16, lets batches of
    /// few tokens take faster kernels: which ones run depends on this limit, not on the adapters that are there.
    pub max_rank: usize,
    /// Adapters at a time; one more evicts another. It costs nothing until they are there. Default: 256.
    pub max_adapters: usize,
    /// Who makes room. Default: the least recently used.
    pub eviction: Eviction,
    /// On a GPU, versions of adapters at a time, those that batches still use included: the rows of the device tables, of
    /// 73 bytes an expert and layer each. Default: 64.
    pub device_slots: usize,
    /// On a GPU, bytes of page-locked host memory that are kept for the next upload. Default: 1 GiB.
    pub host_bytes: usize,
}

/// Which adapter makes room first, of those that are neither pinned nor leased.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Eviction {
    /// The one whose last lease is the longest ago.
    #[default]
    LeastRecent,
    /// The one that was leased least often; counts fade with time and outlive evictions. Better where a few adapters are
    /// asked for again and again and many now and then.
    LeastFrequent,
}

impl Default for PoolConfig {
    fn default() -> Self {
        let bytes = usize::try_from(4_u64 << 30).unwrap_or(usize::MAX);
        let eviction = Eviction::LeastRecent;
        Self { bytes, max_rank: 512, max_adapters: 256, eviction, device_slots: 64, host_bytes: 1 << 30 }
    }
}

impl PoolConfig {
    pub(crate) fn check(&self) -> Result<(), InputError> {
        // A slot is an i32 wherever a token names it.
        const SLOTS: usize = i32::MAX as usize;
        for (name, value, most) in [
            ("bytes", self.bytes, usize::MAX),
            ("max_rank", self.max_rank, usize::MAX),
            ("max_adapters", self.max_adapters, SLOTS),
            ("device_slots", self.device_slots, SLOTS),
        ] {
            if value == 0 || value > most {
                return Err(
                    InputError::new(value.to_string(), format!("1 to {most}")).in_tensor(format!("PoolConfig::{name}"))
                );
            }
        }
        Ok(())
    }
}
