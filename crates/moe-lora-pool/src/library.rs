//! Hundreds of adapters over a pool that holds a few: names, three tiers, prefetch, admission.
//!
//! ```text
//! Source (files) --read, check, pack--> host tier (packed images) --upload--> pool (GPU)
//!      registered                            Host                   Uploading, Resident
//! admit(names) -> Ready(Held) | Waiting -> poll | Never             loaders: background threads, or work()
//! ```

mod admission;
mod config;
mod loader;
mod snapshot;
mod source;
mod state;
#[cfg(test)]
mod tests;

pub use admission::{Admission, Held, Waiting};
pub use config::LibraryConfig;
pub use snapshot::{AdapterState, Counters, LibraryEntry, LibrarySnapshot};
pub use source::Source;
pub use state::Tier;

use crate::{AdapterPool, PoolError};
use loader::Loaders;
use moe_lora_core::{AdapterWeights, InputError};
use state::{Entry, State};
use std::fmt;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

/// All adapters that a server knows by name, most of them on disk, some packed in host memory, a few in the pool.
///
/// A request [asks to be admitted](Self::admit) with the names of its adapters and holds them until it is finished; its
/// batches lease them from the [`pool`](Self::pool) by their ids. What nobody holds makes room, least recently used first,
/// in the pool and in host memory alike. Requests that wait are served in order; once the first of them was overtaken often
/// enough, requests for adapters that do not fit beside its own wait too, so that it cannot starve.
///
/// The pins of the pool are the library's while it lives. Clones are handles to the same library; the background threads end
/// with the last of them.
#[derive(Clone)]
pub struct AdapterLibrary {
    shared: Arc<Shared>,
    _loaders: Arc<Loaders>,
}

struct Shared {
    pool: AdapterPool,
    config: LibraryConfig,
    state: Mutex<State>,
    /// Something changed that a loader or a request may wait for.
    changed: Condvar,
}

impl Shared {
    // Changes are whole before anything can fail, and nothing under the lock panics.
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl AdapterLibrary {
    /// An empty library over a pool.
    ///
    /// # Errors
    /// [`PoolError::Input`] if the system gives no thread.
    pub fn new(pool: AdapterPool, config: LibraryConfig) -> Result<Self, PoolError> {
        let shared = Shared { pool, config, state: Mutex::default(), changed: Condvar::new() };
        let shared = Arc::new(shared);
        let loaders = Loaders::start(&shared, config.loaders)
            .map_err(|error| InputError::new(format!("no thread: {error}"), format!("{} loaders", config.loaders)))?;
        Ok(Self { shared, _loaders: Arc::new(loaders) })
    }

    /// The pool that the adapters go to.
    #[must_use]
    pub fn pool(&self) -> &AdapterPool {
        &self.shared.pool
    }

    /// Makes an adapter known. Nothing is read yet.
    ///
    /// # Errors
    /// [`AlreadyLoaded`](PoolError::AlreadyLoaded) if the name is known.
    pub fn register(&self, name: &str, source: impl Into<Source>) -> Result<(), PoolError> {
        self.shared.state().insert(name, Entry::of_source(source.into()))
    }

    /// Makes an adapter known that is in memory and nowhere else. It is packed now, and its image stays in host memory.
    ///
    /// # Errors
    /// [`PoolError::Input`] if it does not fit the model or the pool; [`AlreadyLoaded`](PoolError::AlreadyLoaded);
    /// [`NoRoom`](PoolError::NoRoom) or [`OutOfMemory`](PoolError::OutOfMemory) in host memory.
    pub fn register_weights(&self, name: &str, weights: &AdapterWeights) -> Result<(), PoolError> {
        let image = self.shared.pool.pack(name, weights)?;
        let mut state = self.shared.state();
        if state.entries.contains_key(name) {
            return Err(PoolError::AlreadyLoaded { name: name.into() });
        }
        state.make_host_room(image.host_bytes(), self.shared.config.host_bytes)?;
        state.insert(name, Entry::of_image(image))
    }

    /// Gives an adapter new weights: the step of a training loop. Batches in flight keep the version that they leased, later
    /// ones see the new one, none a mixture. Its files no longer count: the new image stays in host memory.
    ///
    /// # Errors
    /// As [`AdapterPool::replace`], and as [`register_weights`](Self::register_weights); the old version stays served.
    pub fn replace(&self, name: &str, weights: &AdapterWeights) -> Result<u64, PoolError> {
        let image = self.shared.pool.pack(name, weights)?;
        let mut state = self.shared.state();
        let entry = state.entry(name)?;
        if entry.busy {
            return Err(PoolError::Busy { name: name.into() });
        }
        let old = entry.image.take();
        if let Err(error) = state.make_host_room(image.host_bytes(), self.shared.config.host_bytes) {
            state.entry(name)?.image = old;
            return Err(error);
        }
        if self.shared.pool.find(name).is_some() {
            match self.shared.pool.replace_packed(name, &image) {
                // Evicted since the line above: the next load takes the new image.
                Ok(_) | Err(PoolError::NotLoaded { .. }) => {}
                Err(error) => {
                    state.entry(name)?.image = old;
                    return Err(error);
                }
            }
        }
        let entry = state.entry(name)?;
        (entry.source, entry.bytes, entry.image) = (None, Some(image.bytes()), Some(image));
        entry.version += 1;
        let version = entry.version;
        state.counters.replaces += 1;
        drop(state);
        tracing::debug!(adapter = name, version, "replaced");
        Ok(version)
    }

    /// Forgets an adapter, in all tiers.
    ///
    /// # Errors
    /// [`NotRegistered`](PoolError::NotRegistered); [`Busy`](PoolError::Busy) if a request holds or awaits it, or it is
    /// being loaded.
    pub fn unregister(&self, name: &str) -> Result<(), PoolError> {
        let mut state = self.shared.state();
        let entry = state.entry(name)?;
        if entry.busy || entry.holds > 0 || state.awaited(name) {
            return Err(PoolError::Busy { name: name.into() });
        }
        state.entries.remove(name);
        state.pinned.remove(name);
        match self.shared.pool.find(name).map(|id| self.shared.pool.unload(id)) {
            // A loader may evict it between the two calls.
            None | Some(Ok(()) | Err(PoolError::Stale { .. })) => Ok(()),
            Some(error) => error,
        }
    }

    /// Asks for an adapter to be brought to a tier soon. Returns at once; what waits in [`admit`](Self::admit) goes first.
    ///
    /// # Errors
    /// [`NotRegistered`](PoolError::NotRegistered).
    pub fn prefetch(&self, name: &str, tier: Tier) -> Result<(), PoolError> {
        let mut state = self.shared.state();
        state.want(name, tier)?;
        drop(state);
        self.shared.changed.notify_all();
        Ok(())
    }

    /// Keeps an adapter in the pool once it is there, and its image in host memory.
    ///
    /// # Errors
    /// [`NotRegistered`](PoolError::NotRegistered).
    pub fn pin(&self, name: &str) -> Result<(), PoolError> {
        self.set_pinned(name, true)
    }

    /// Lets an adapter be evicted again.
    ///
    /// # Errors
    /// [`NotRegistered`](PoolError::NotRegistered).
    pub fn unpin(&self, name: &str) -> Result<(), PoolError> {
        self.set_pinned(name, false)
    }

    fn set_pinned(&self, name: &str, pinned: bool) -> Result<(), PoolError> {
        let mut state = self.shared.state();
        state.entry(name)?.pinned = pinned;
        match pinned {
            true => state.pinned.insert(name.into()),
            false => state.pinned.remove(name),
        };
        state.sync_pin(name, &self.shared.pool);
        drop(state);
        self.shared.changed.notify_all();
        Ok(())
    }

    /// Where an adapter is now.
    #[must_use]
    pub fn state(&self, name: &str) -> Option<AdapterState> {
        let state = self.shared.state();
        Some(snapshot::state_of(name, state.entries.get(name)?, &self.shared.pool))
    }

    /// Does the next piece of a loader's work on this thread: for programs that bring their own threads. `false` if there is
    /// nothing that can be done now.
    pub fn work(&self) -> bool {
        self.shared.work()
    }
}

impl fmt::Debug for AdapterLibrary {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "AdapterLibrary({} adapters, {:?})", self.shared.state().entries.len(), self.shared.pool)
    }
}
