//! The pool that everybody sees: the work is done outside the lock, the decisions inside.

use crate::check::check;
#[cfg(feature = "cuda")]
use crate::memory::cuda::TableAddress;
use crate::memory::{Packed, Store};
use crate::policy::Tenant;
use crate::shared::{Claim, Shared};
use crate::{AdapterSnapshot, Lease, Memory, PoolConfig, PoolError, PoolSnapshot};
use moe_lora_core::{AdapterId, AdapterWeights, InputError, ModelShape, TokenAdapters};
use std::collections::HashMap;
use std::fmt;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::sync::Arc;

/// An adapter in the form in which one pool's memory takes it. Clones share the bytes.
#[derive(Clone)]
pub struct PackedAdapter {
    pool: Arc<Shared>,
    packed: Packed,
    bytes: usize,
    max_rank: usize,
}

impl PackedAdapter {
    /// What the pool's budget is charged for it.
    #[must_use]
    pub const fn bytes(&self) -> usize {
        self.bytes
    }

    /// Bytes of host memory that it takes: page-locked ones for a GPU.
    #[must_use]
    pub fn host_bytes(&self) -> usize {
        match &self.packed {
            Packed::Host(_) => self.bytes,
            #[cfg(feature = "cuda")]
            Packed::Cuda(image) => image.bytes(),
        }
    }

    /// Its largest rank anywhere.
    #[must_use]
    pub const fn max_rank(&self) -> usize {
        self.max_rank
    }
}

impl fmt::Debug for PackedAdapter {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "PackedAdapter({} bytes, rank {})", self.bytes, self.max_rank)
    }
}

/// The adapters of one model, within a budget of bytes. Clones are handles to the same pool.
#[derive(Clone)]
pub struct AdapterPool {
    pub(crate) shared: Arc<Shared>,
}

impl AdapterPool {
    /// An empty pool for the adapters of a model.
    ///
    /// # Errors
    /// [`PoolError::Input`] if a limit is zero, there are more adapters than slot numbers, or the memory is that of a GPU
    /// whose kernels cannot run the model's layers; [`OutOfMemory`](PoolError::OutOfMemory) if the device tables do not fit.
    pub fn new(memory: impl Into<Memory>, shape: &ModelShape, config: PoolConfig) -> Result<Self, PoolError> {
        config.check()?;
        Ok(Self { shared: Arc::new(Shared::new(memory.into(), shape.clone(), config)?) })
    }

    /// Adds an adapter: converts it to the model's format and packs it, evicting the least recently used adapters that are
    /// neither pinned nor leased if bytes or slots are short.
    ///
    /// While it runs, `weights` and the packed copy both exist; the budget counts the copy.
    ///
    /// # Errors
    /// [`PoolError::Input`] if the weights do not fit the model, [`PoolConfig`] or, alone, the budget;
    /// [`AlreadyLoaded`](PoolError::AlreadyLoaded); [`NoRoom`](PoolError::NoRoom) or [`NoSlot`](PoolError::NoSlot) if what
    /// is pinned or in use leaves too little; [`OutOfMemory`](PoolError::OutOfMemory).
    pub fn load(&self, name: &str, weights: AdapterWeights) -> Result<AdapterId, PoolError> {
        let bytes = self.check(name, &weights)?;
        self.claim(name, bytes)?.fill(&weights)
    }

    /// Everything of a [`load`](Self::load) that needs no place in the pool, once for many: checks an adapter and converts it
    /// into the form in which the pool's memory takes it. For a GPU that is page-locked memory, which a copy engine reads at
    /// the speed of the link.
    ///
    /// # Errors
    /// [`PoolError::Input`] as [`load`](Self::load); [`OutOfMemory`](PoolError::OutOfMemory). `name` is for errors.
    pub fn pack(&self, name: &str, weights: &AdapterWeights) -> Result<PackedAdapter, PoolError> {
        let bytes = self.check(name, weights)?;
        let packed = self.shared.store.pack(weights, &self.shared.shape)?;
        Ok(PackedAdapter { pool: Arc::clone(&self.shared), packed, bytes, max_rank: weights.max_rank() })
    }

    /// [`load`](Self::load) of a packed adapter. On a GPU it returns when the copies are on their way.
    ///
    /// # Errors
    /// As [`load`](Self::load), and [`PoolError::Input`] if another pool packed it.
    pub fn load_packed(&self, name: &str, adapter: &PackedAdapter) -> Result<AdapterId, PoolError> {
        self.own(name, adapter)?;
        self.claim(name, adapter.bytes)?.store(&adapter.packed, adapter.max_rank)
    }

    /// [`replace`](Self::replace) by a packed adapter.
    ///
    /// # Errors
    /// As [`replace`](Self::replace), and [`PoolError::Input`] if another pool packed it.
    pub fn replace_packed(&self, name: &str, adapter: &PackedAdapter) -> Result<AdapterId, PoolError> {
        self.own(name, adapter)?;
        self.claim_replacement(name, adapter.bytes)?.store(&adapter.packed, adapter.max_rank)
    }

    fn own(&self, name: &str, adapter: &PackedAdapter) -> Result<(), InputError> {
        match Arc::ptr_eq(&self.shared, &adapter.pool) {
            true => Ok(()),
            false => Err(InputError::new("an adapter that another pool packed", "one that this pool packed")
                .in_tensor(format!("adapter {name:?}"))),
        }
    }

    /// Room for a new adapter.
    fn claim(&self, name: &str, bytes: usize) -> Result<Claim<'_>, PoolError> {
        let _freeing = self.shared.freeing();
        let mut state = self.shared.state();
        if state.names.contains_key(name) {
            return Err(PoolError::AlreadyLoaded { name: name.into() });
        }
        let (ticket, victims) = state.policy.admit(who(name), bytes)?;
        let evicted = state.evict(&victims);
        let name: Arc<str> = name.into();
        state.names.insert(name.clone(), None);
        drop(state);
        drop(evicted);
        Ok(Claim::new(&self.shared, name, ticket, true))
    }

    /// Room for a new version.
    fn claim_replacement(&self, name: &str, bytes: usize) -> Result<Claim<'_>, PoolError> {
        let _freeing = self.shared.freeing();
        let mut state = self.shared.state();
        let Some((name, id)) = state.names.get_key_value(name).and_then(|(name, id)| Some((name.clone(), (*id)?)))
        else {
            return Err(PoolError::NotLoaded { name: name.into() });
        };
        if state.policy.replacing(id)? {
            return Err(PoolError::Busy { name: name.as_ref().into() });
        }
        let (ticket, victims) = state.policy.admit_replacement(id, bytes)?;
        let evicted = state.evict(&victims);
        drop(state);
        drop(evicted);
        Ok(Claim::new(&self.shared, name, ticket, false))
    }

    /// Gives a loaded adapter new weights under the same id. Leases taken before keep the old version, leases taken
    /// after see the new one, and none sees a mixture; pins stay.
    ///
    /// The new version is built beside the old one, so both have to fit into the budget; others are evicted for it as by
    /// [`load`](Self::load). Where that is not enough and nobody leases the old version, its bytes count for the new one:
    /// for the time of the call the memory then exceeds the budget by up to the smaller of the two, and the account never
    /// does. If a batch leases the old version during such a call, the call fails with `NoRoom`.
    ///
    /// # Errors
    /// As [`load`](Self::load), and [`NotLoaded`](PoolError::NotLoaded); [`Busy`](PoolError::Busy) if another thread is
    /// replacing the adapter; [`Stale`](PoolError::Stale) if it was unloaded meanwhile. The old version stays served.
    pub fn replace(&self, name: &str, weights: AdapterWeights) -> Result<AdapterId, PoolError> {
        let bytes = self.check(name, &weights)?;
        self.claim_replacement(name, bytes)?.fill(&weights)
    }

    /// Takes an adapter out, pinned or not. Its id is stale at once; its bytes are free at once or when the last lease of
    /// it drops.
    ///
    /// # Errors
    /// [`PoolError::Stale`].
    pub fn unload(&self, id: AdapterId) -> Result<(), PoolError> {
        let _freeing = self.shared.freeing();
        let mut state = self.shared.state();
        state.policy.unload(id)?;
        let gone = state.take(&[id.slot]);
        drop(state);
        drop(gone);
        Ok(())
    }

    /// Keeps an adapter from being evicted. Pinning twice is pinning once.
    ///
    /// # Errors
    /// [`PoolError::Stale`].
    pub fn pin(&self, id: AdapterId) -> Result<(), PoolError> {
        self.shared.state().policy.pin(id, true)
    }

    /// Lets an adapter be evicted again.
    ///
    /// # Errors
    /// [`PoolError::Stale`].
    pub fn unpin(&self, id: AdapterId) -> Result<(), PoolError> {
        self.shared.state().policy.pin(id, false)
    }

    /// The id of a loaded adapter.
    #[must_use]
    pub fn find(&self, name: &str) -> Option<AdapterId> {
        *self.shared.state().names.get(name)?
    }

    /// Whether all bytes of a loaded adapter have arrived; `None` if it is not loaded.
    #[must_use]
    pub fn is_uploaded(&self, name: &str) -> Option<bool> {
        let state = self.shared.state();
        let id = (*state.names.get(name)?)?;
        Some(state.residents.get(&id.slot)?.block.is_ready())
    }

    /// The most bytes and the most adapters at a time.
    pub(crate) fn limits(&self) -> (usize, usize) {
        let Shared { config, store, .. } = &*self.shared;
        (config.bytes, config.max_adapters.min(store.rows(config)))
    }

    /// Holds all adapters of a batch, which counts as a use of each.
    ///
    /// # Errors
    /// [`PoolError::Stale`] names the first id that means no loaded adapter; then nothing is held.
    pub fn lease(&self, tokens: &TokenAdapters) -> Result<Lease, PoolError> {
        let mut state = self.shared.state();
        let holds = state.policy.lease(tokens.ids())?;
        // Every tenant of the policy has its resident: both change under one lock.
        let block = |slot: u32| state.residents.get(&slot).map(|resident| resident.block.clone());
        let held: Vec<_> = holds.into_iter().filter_map(|hold| Some((hold, block(hold.slot)?))).collect();
        drop(state);
        let row: HashMap<u32, i32> = held.iter().map(|(hold, _)| (hold.slot, hold.row as i32)).collect();
        let rows = tokens.ids().iter().map(|id| id.and_then(|id| row.get(&id.slot).copied()).unwrap_or(-1)).collect();
        Ok(Lease::new(self.shared.clone(), held, rows))
    }

    /// Allocates the whole budget of GPU memory now; else it is allocated in few large parts as adapters come. Nothing to
    /// do in the host's memory.
    ///
    /// # Errors
    /// [`OutOfMemory`](PoolError::OutOfMemory).
    pub fn reserve(&self) -> Result<(), PoolError> {
        match &self.shared.store {
            Store::Host(_) => Ok(()),
            #[cfg(feature = "cuda")]
            Store::Cuda(store) => store.reserve(),
        }
    }

    /// Where the kernels find the adapters of a decoder layer (absolute index), for the life of the pool: what a graph may
    /// be captured with. `None` for a pool in the host's memory or a layer that is not MoE.
    #[cfg(feature = "cuda")]
    #[must_use]
    pub fn table_address(&self, layer: usize) -> Option<TableAddress> {
        match &self.shared.store {
            Store::Host(_) => None,
            Store::Cuda(store) => store.address(layer),
        }
    }

    /// What the pool holds now.
    #[must_use]
    pub fn snapshot(&self) -> PoolSnapshot {
        let state = self.shared.state();
        let held = self.shared.store.held();
        let adapter = |(id, tenant): (AdapterId, &Tenant)| {
            let resident = state.residents.get(&id.slot)?;
            Some(AdapterSnapshot {
                name: resident.name.as_ref().into(),
                id,
                version: resident.version,
                max_rank: resident.max_rank,
                bytes: tenant.stored.bytes,
                pinned: tenant.pinned,
                leases: tenant.stored.leases,
            })
        };
        PoolSnapshot {
            budget_bytes: self.shared.config.bytes,
            used_bytes: state.policy.used(),
            draining_bytes: state.policy.draining(),
            loading_bytes: state.policy.loading(),
            reserved_bytes: held.reserved,
            table_bytes: held.tables,
            fragmented_bytes: held.unusable,
            adapters: state.policy.tenants().filter_map(adapter).collect(),
            loads: state.loads,
            evictions: state.evictions,
            replaces: state.replaces,
        }
    }

    /// The model that the adapters are for.
    #[must_use]
    pub fn shape(&self) -> &ModelShape {
        &self.shared.shape
    }

    /// Where the adapters lie.
    #[must_use]
    pub fn memory(&self) -> &Memory {
        &self.shared.memory
    }

    /// Everything that needs no lock. Returns the bytes to charge.
    fn check(&self, name: &str, weights: &AdapterWeights) -> Result<usize, InputError> {
        let Shared { store, shape, config, .. } = &*self.shared;
        check(weights, shape, store.dtype(shape), config).map_err(|mut error| {
            error.tensor = Some(format!("adapter {name:?} {}", error.tensor.unwrap_or_default()).trim_end().into());
            error
        })?;
        let bytes = store.bytes(weights, shape);
        if bytes > config.bytes {
            let expected = format!("at most the pool's budget of {} bytes", config.bytes);
            return Err(InputError::new(format!("{bytes} bytes"), expected).in_tensor(format!("adapter {name:?}")));
        }
        Ok(bytes)
    }
}

/// The same for a name whenever it comes.
fn who(name: &str) -> u64 {
    let mut hasher = DefaultHasher::new();
    name.hash(&mut hasher);
    hasher.finish()
}

impl fmt::Debug for AdapterPool {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("AdapterPool").field(&self.snapshot()).finish()
    }
}
