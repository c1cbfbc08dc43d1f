//! What all handles of a pool share: names and blocks under one lock.

use crate::memory::{Block, Packed, Store};
use crate::policy::{Policy, Ticket};
use crate::{Memory, PoolConfig, PoolError};
use moe_lora_core::{AdapterId, AdapterWeights, ModelShape};
use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

pub(crate) struct Shared {
    pub(crate) memory: Memory,
    pub(crate) store: Store,
    pub(crate) shape: ModelShape,
    pub(crate) config: PoolConfig,
    /// Held while memory that the policy already counts as free is being freed, so that nobody allocates it twice.
    /// Taken before `state`.
    freeing: Mutex<()>,
    state: Mutex<State>,
}

pub(crate) struct State {
    pub(crate) policy: Policy,
    /// `None` while the adapter is being loaded.
    pub(crate) names: HashMap<Arc<str>, Option<AdapterId>>,
    /// By slot.
    pub(crate) residents: HashMap<u32, Resident>,
    pub(crate) loads: u64,
    pub(crate) evictions: u64,
    pub(crate) replaces: u64,
}

/// A loaded adapter's side of a policy's tenant.
pub(crate) struct Resident {
    pub(crate) name: Arc<str>,
    pub(crate) version: u64,
    pub(crate) max_rank: usize,
    pub(crate) block: Arc<Block>,
}

impl Shared {
    pub(crate) fn new(memory: Memory, shape: ModelShape, config: PoolConfig) -> Result<Self, PoolError> {
        let store = Store::new(&memory, &shape, &config)?;
        let state = State {
            policy: Policy::new(config.bytes, config.max_adapters, store.rows(&config), config.eviction),
            names: HashMap::new(),
            residents: HashMap::new(),
            loads: 0,
            evictions: 0,
            replaces: 0,
        };
        Ok(Self { memory, store, shape, config, freeing: Mutex::new(()), state: Mutex::new(state) })
    }

    // No code under a lock panics, and each change is whole before the next call can fail: a poisoned lock is as good.
    pub(crate) fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn freeing(&self) -> MutexGuard<'_, ()> {
        self.freeing.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    /// Forgets tenants that had to go.
    pub(crate) fn evict(&mut self, slots: &[u32]) -> Vec<Resident> {
        self.evictions += slots.len() as u64;
        let evicted = self.take(slots);
        for Resident { name, .. } in &evicted {
            tracing::debug!(adapter = &**name, "evicted");
        }
        evicted
    }

    /// Forgets the tenants of slots that the policy emptied.
    pub(crate) fn take(&mut self, slots: &[u32]) -> Vec<Resident> {
        let taken: Vec<_> = slots.iter().filter_map(|slot| self.residents.remove(slot)).collect();
        for resident in &taken {
            self.names.remove(&resident.name);
        }
        taken
    }
}

/// A load or replace under way: bytes and a name that are given back unless it comes to its end.
pub(crate) struct Claim<'a> {
    shared: &'a Shared,
    name: Arc<str>,
    ticket: Ticket,
    loads: bool,
    open: bool,
}

impl<'a> Claim<'a> {
    /// `loads` says that the name came with the ticket and goes with it.
    pub(crate) const fn new(shared: &'a Shared, name: Arc<str>, ticket: Ticket, loads: bool) -> Self {
        Self { shared, name, ticket, loads, open: true }
    }

    /// Packs the weights, which is the slow part, stores them, and makes them the ones that are leased.
    pub(crate) fn fill(self, weights: &AdapterWeights) -> Result<AdapterId, PoolError> {
        let packed = self.shared.store.pack(weights, &self.shared.shape)?;
        self.store(&packed, weights.max_rank())
    }

    /// Stores packed weights, and makes them the ones that are leased.
    pub(crate) fn store(mut self, packed: &Packed, max_rank: usize) -> Result<AdapterId, PoolError> {
        let block = match self.ticket.in_place() {
            false => Some(self.place(packed)?),
            true => None,
        };
        let _freeing = self.shared.freeing();
        let mut guard = self.shared.state();
        let state = &mut *guard;
        state.policy.check(&self.ticket)?;
        let block = match block {
            Some(block) => block,
            None => self.place_instead(packed, state)?,
        };
        let id = state.policy.commit(&self.ticket)?;
        self.open = false;
        let version = state.residents.get(&id.slot).map_or(0, |old| old.version) + 1;
        let (name, block) = (self.name.clone(), Arc::new(block));
        let old = state.residents.insert(id.slot, Resident { name, version, max_rank, block });
        if self.loads {
            state.names.insert(self.name.clone(), Some(id));
            state.loads += 1;
        } else {
            state.replaces += 1;
        }
        let bytes = state.policy.used();
        drop(guard);
        drop(old);
        tracing::debug!(adapter = &*self.name, version, max_rank, used_bytes = bytes, "stored");
        Ok(id)
    }

    /// Stores a version beside all others; if the free bytes are in too small holes, others make way.
    fn place(&self, packed: &Packed) -> Result<Block, PoolError> {
        loop {
            let placed = self.shared.store.place(packed, self.ticket.row(), None);
            let Err(PoolError::Fragmented { .. }) = placed else { return placed };
            let _freeing = self.shared.freeing();
            let mut state = self.shared.state();
            let Some(victim) = state.policy.evict_one() else { return placed };
            let evicted = state.evict(&[victim]);
            drop(state);
            drop(evicted);
        }
    }

    /// Stores a version in the place of the one before, which nobody leases. If the GPU fails on the way, the adapter is
    /// lost: what is in its place is neither version.
    fn place_instead(&self, packed: &Packed, state: &mut State) -> Result<Block, PoolError> {
        let slot = self.ticket.id().slot;
        let old = state.residents.get(&slot).map(|resident| Arc::clone(&resident.block));
        self.shared.store.place(packed, self.ticket.row(), old.as_deref()).inspect_err(|_| {
            if old.is_some_and(|old| old.is_gone()) {
                let _ = state.policy.unload(self.ticket.id());
                drop(state.take(&[slot]));
            }
        })
    }
}

impl Drop for Claim<'_> {
    fn drop(&mut self) {
        if self.open {
            let mut state = self.shared.state();
            state.policy.cancel(&self.ticket);
            if self.loads {
                state.names.remove(&self.name);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{AdapterPool, HostMemory};
    use moe_lora_core::{DType, LayerShape, TokenAdapters};
    use std::collections::BTreeMap;

    #[test]
    fn a_poisoned_lock_does_not_spread() {
        let shape = ModelShape::uniform(LayerShape::new(2, 1, 8, 4).unwrap(), 1, DType::F32);
        let pool = AdapterPool::new(HostMemory, &shape, PoolConfig::default()).unwrap();
        let other = pool.clone();
        let panicked = std::thread::spawn(move || {
            let _freeing = other.shared.freeing();
            let _state = other.shared.state();
            panic!("on purpose");
        });
        assert!(panicked.join().is_err() && pool.shared.state.is_poisoned() && pool.shared.freeing.is_poisoned());
        let nothing = AdapterWeights::new(&shape, BTreeMap::new()).unwrap();
        let id = pool.load("nothing", nothing).unwrap();
        drop(pool.lease(&TokenAdapters::from_ids(&[Some(id)])).unwrap());
        assert_eq!((pool.find("nothing"), pool.snapshot().used_bytes), (Some(id), 0));
    }

    #[test]
    fn a_claim_that_does_not_come_to_its_end_gives_everything_back() {
        let shape = ModelShape::uniform(LayerShape::new(2, 1, 8, 4).unwrap(), 1, DType::F32);
        let pool = AdapterPool::new(HostMemory, &shape, PoolConfig::default()).unwrap();
        let nothing = || AdapterWeights::new(&shape, BTreeMap::new()).unwrap();
        let before = pool.snapshot();
        let (ticket, _) = pool.shared.state().policy.admit(0, 100).unwrap();
        pool.shared.state().names.insert("new".into(), None);
        let claim = Claim::new(&pool.shared, "new".into(), ticket, true);
        assert_eq!((pool.snapshot().used_bytes, pool.find("new")), (100, None));
        assert!(matches!(pool.load("new", nothing()), Err(PoolError::AlreadyLoaded { .. })));
        assert!(matches!(pool.replace("new", nothing()), Err(PoolError::NotLoaded { .. })));
        drop(claim);
        assert_eq!(pool.snapshot(), before);

        let id = pool.load("new", nothing()).unwrap();
        let before = pool.snapshot();
        let (ticket, _) = pool.shared.state().policy.admit_replacement(id, 100).unwrap();
        let claim = Claim::new(&pool.shared, "new".into(), ticket, false);
        assert_eq!((pool.snapshot().used_bytes, pool.find("new")), (100, Some(id)));
        assert!(matches!(pool.replace("new", nothing()), Err(PoolError::Busy { .. })));
        drop(claim);
        assert_eq!((pool.snapshot(), pool.replace("new", nothing())), (before, Ok(id)));
    }
}
