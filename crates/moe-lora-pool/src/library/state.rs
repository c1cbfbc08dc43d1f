//! The library's books: names, images in host memory, what is wanted, who waits.

use super::admission::Waiter;
use super::snapshot::Counters;
use super::source::Source;
use crate::{AdapterPool, PackedAdapter, PoolError};
use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet, VecDeque};
use std::sync::Arc;

/// How near an adapter is to be brought.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Tier {
    /// Packed, in host memory.
    Host,
    /// In the pool.
    Pool,
}

#[derive(Debug, Default)]
pub(super) struct State {
    pub(super) entries: HashMap<Arc<str>, Entry>,
    /// Those whose entries are pinned.
    pub(super) pinned: BTreeSet<Arc<str>>,
    /// Prefetches in order.
    pub(super) wanted: VecDeque<Arc<str>>,
    /// By ticket: in the order of arrival.
    pub(super) waiters: BTreeMap<u64, Waiter>,
    pub(super) tickets: u64,
    pub(super) counters: Counters,
    /// Dates uses.
    clock: u64,
}

/// One registered adapter.
#[derive(Debug)]
pub(super) struct Entry {
    /// `None` if the image is all there is.
    pub(super) source: Option<Source>,
    pub(super) image: Option<PackedAdapter>,
    /// What the pool is charged, once it is known.
    pub(super) bytes: Option<usize>,
    /// 1, one more with every replace.
    pub(super) version: u64,
    pub(super) wants: Option<Tier>,
    /// A loader is at work on it.
    pub(super) busy: bool,
    pub(super) pinned: bool,
    /// Requests that hold it.
    pub(super) holds: usize,
    pub(super) last_use: u64,
}

impl Entry {
    pub(super) const fn of_source(source: Source) -> Self {
        Self {
            source: Some(source),
            image: None,
            bytes: None,
            version: 1,
            wants: None,
            busy: false,
            pinned: false,
            holds: 0,
            last_use: 0,
        }
    }

    pub(super) fn of_image(image: PackedAdapter) -> Self {
        let bytes = Some(image.bytes());
        let (version, last_use, holds) = (1, 0, 0);
        let (wants, busy, pinned) = (None, false, false);
        Self { source: None, image: Some(image), bytes, version, wants, busy, pinned, holds, last_use }
    }
}

impl State {
    pub(super) fn entry(&mut self, name: &str) -> Result<&mut Entry, PoolError> {
        self.entries.get_mut(name).ok_or_else(|| PoolError::NotRegistered { name: name.into() })
    }

    pub(super) fn insert(&mut self, name: &str, entry: Entry) -> Result<(), PoolError> {
        if self.entries.contains_key(name) {
            return Err(PoolError::AlreadyLoaded { name: name.into() });
        }
        self.entries.insert(name.into(), entry);
        Ok(())
    }

    /// Queues a prefetch.
    pub(super) fn want(&mut self, name: &str, tier: Tier) -> Result<(), PoolError> {
        let now = self.tick();
        let entry = self.entry(name)?;
        let queued = entry.wants.is_some();
        (entry.wants, entry.last_use) = (entry.wants.max(Some(tier)), now);
        if !queued {
            self.wanted.push_back(name.into());
        }
        Ok(())
    }

    pub(super) fn tick(&mut self) -> u64 {
        self.clock += 1;
        self.clock
    }

    pub(super) fn host_used(&self) -> usize {
        self.entries.values().filter_map(|entry| entry.image.as_ref()).map(PackedAdapter::host_bytes).sum()
    }

    /// Images that may be dropped, least recently used first: those that can be read again and that nobody waits for.
    fn idle_images(&self) -> Vec<(u64, Arc<str>, usize)> {
        let awaited: HashSet<&Arc<str>> = self.waiters.values().flat_map(|waiter| &waiter.names).collect();
        let mut idle: Vec<_> = self
            .entries
            .iter()
            .filter(|(name, entry)| entry.source.is_some() && !entry.busy && !entry.pinned && !awaited.contains(name))
            .filter_map(|(name, entry)| Some((entry.last_use, Arc::clone(name), entry.image.as_ref()?.host_bytes())))
            .collect();
        idle.sort_unstable();
        idle
    }

    /// Drops images until no more than `budget` bytes are left, as far as they may be dropped.
    pub(super) fn trim_host(&mut self, budget: usize) {
        let mut used = self.host_used();
        if used <= budget {
            return;
        }
        for (_, name, freed) in self.idle_images() {
            if used <= budget {
                break;
            }
            used -= freed;
            self.counters.host_evictions += 1;
            if let Some(entry) = self.entries.get_mut(&name) {
                entry.image = None;
            }
        }
    }

    /// Drops images until `bytes` more fit; none if that is not enough.
    pub(super) fn make_host_room(&mut self, bytes: usize, budget: usize) -> Result<(), PoolError> {
        let used = self.host_used();
        let evictable: usize = self.idle_images().iter().map(|(.., bytes)| bytes).sum();
        let pinned = used - evictable;
        if pinned.saturating_add(bytes) > budget {
            let free = budget.saturating_sub(used);
            return Err(PoolError::NoRoom { needed: bytes, budget, free, evictable, pinned, in_use: 0, loading: 0 });
        }
        self.trim_host(budget - bytes);
        Ok(())
    }

    /// The first request that waits and may still be served.
    pub(super) fn first(&self) -> Option<(u64, &Waiter)> {
        self.waiters.iter().find(|(_, waiter)| waiter.failed.is_none()).map(|(ticket, waiter)| (*ticket, waiter))
    }

    /// The pool keeps what somebody pinned or holds, and what the first request that waits needs.
    pub(super) fn sync_pin(&self, name: &str, pool: &AdapterPool) {
        let Some(id) = pool.find(name) else { return };
        let first = self.first().is_some_and(|(_, waiter)| waiter.names.iter().any(|n| **n == *name));
        let keep = first || self.entries.get(name).is_some_and(|entry| entry.pinned || entry.holds > 0);
        // An adapter that has just been evicted needs no pin.
        let _ = if keep { pool.pin(id) } else { pool.unpin(id) };
    }

    /// Whether a request waits for an adapter.
    pub(super) fn awaited(&self, name: &str) -> bool {
        self.waiters.values().any(|waiter| waiter.names.iter().any(|n| **n == *name))
    }
}
