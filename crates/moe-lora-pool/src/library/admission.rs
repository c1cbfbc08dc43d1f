//! Who may start now, who waits, and that nobody waits for ever.

use super::state::State;
use super::{AdapterLibrary, Shared};
use crate::PoolError;
use moe_lora_core::AdapterId;
use std::cmp::Reverse;
use std::collections::HashSet;
use std::fmt;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// What a request for adapters is told.
#[derive(Debug)]
pub enum Admission {
    /// All of them are in the pool, or on their way there in front of any batch that leases them.
    Ready(Held),
    /// They are being brought; ask again.
    Waiting(Waiting),
    /// They do not fit, whatever else leaves.
    Never {
        /// Bytes of the pool that they and what is pinned need together.
        needed: usize,
        /// Bytes of the pool.
        budget: usize,
    },
}

/// Adapters that a request holds: the pool keeps them until this drops.
pub struct Held {
    shared: Arc<Shared>,
    names: Vec<Arc<str>>,
    ids: Vec<AdapterId>,
    places: Vec<usize>,
}

/// A request's place in the queue; dropping it gives it up.
pub struct Waiting {
    shared: Arc<Shared>,
    ticket: u64,
}

#[derive(Debug)]
pub(super) struct Waiter {
    /// Each once.
    pub(super) names: Vec<Arc<str>>,
    /// For every name asked for, the place in `names`.
    places: Vec<usize>,
    since: Instant,
    /// Admissions since this one is the first to wait.
    overtaken: u32,
    /// Why it will never be ready.
    pub(super) failed: Option<PoolError>,
}

impl Waiter {
    fn parts(&self) -> (Vec<Arc<str>>, Vec<usize>, Option<PoolError>) {
        (self.names.clone(), self.places.clone(), self.failed.clone())
    }
}

impl AdapterLibrary {
    /// Asks for the adapters of one request. Those that are not in the pool are brought there, in the order in which requests
    /// ask.
    ///
    /// # Errors
    /// [`NotRegistered`](PoolError::NotRegistered). What goes wrong while an adapter is read is an error of
    /// [`Waiting::poll`].
    pub fn admit(&self, names: &[&str]) -> Result<Admission, PoolError> {
        let mut guard = self.shared.state();
        let state = &mut *guard;
        let (mut unique, mut places): (Vec<Arc<str>>, _) = (Vec::new(), Vec::new());
        for &name in names {
            let Some((known, _)) = state.entries.get_key_value(name) else {
                return Err(PoolError::NotRegistered { name: name.into() });
            };
            let place = unique.iter().position(|n| n == known).unwrap_or(unique.len());
            if place == unique.len() {
                unique.push(Arc::clone(known));
            }
            places.push(place);
        }
        if let Some((needed, budget)) = state.never_fits(&unique, &self.shared) {
            state.counters.refused += 1;
            return Ok(Admission::Never { needed, budget });
        }
        let waiter = Waiter { names: unique, places, since: Instant::now(), overtaken: 0, failed: None };
        if state.may_pass(&waiter.names, None, &self.shared)
            && let Some(held) = state.hold(&waiter.names, &waiter.places, &self.shared)
        {
            state.counters.ready_at_once += 1;
            state.overtake();
            return Ok(Admission::Ready(held));
        }
        state.tickets += 1;
        let ticket = state.tickets;
        state.waiters.insert(ticket, waiter);
        state.counters.waited += 1;
        state.pin_first(&self.shared);
        drop(guard);
        self.shared.changed.notify_all();
        Ok(Admission::Waiting(Waiting { shared: Arc::clone(&self.shared), ticket }))
    }
}

impl State {
    /// Bytes needed and there, if the adapters can never be in the pool together. Sizes that are not known yet count nothing.
    fn never_fits(&self, names: &[Arc<str>], shared: &Shared) -> Option<(usize, usize)> {
        let asked: usize = names.iter().filter_map(|name| self.entries.get(name)?.bytes).sum();
        let others = self.pinned.iter().filter(|name| !names.contains(name) && shared.pool.find(name).is_some());
        let others: Vec<usize> = others.filter_map(|name| self.entries.get(name)?.bytes).collect();
        let pinned: usize = others.iter().sum();
        let (budget, slots) = shared.pool.limits();
        let needed = asked.saturating_add(pinned);
        (needed > budget || names.len() + others.len() > slots).then_some((needed, budget))
    }

    /// Whether a request (that waits with `ticket`) may start before the first one that waits: as long as that one is patient,
    /// and then only if the request's adapters fit beside those that it needs, the most recently used first.
    fn may_pass(&self, names: &[Arc<str>], ticket: Option<u64>, shared: &Shared) -> bool {
        let Some((number, first)) = self.first() else { return true };
        if ticket == Some(number) || names.is_empty() || first.overtaken < shared.config.patience {
            return true;
        }
        let (budget, slots) = shared.pool.limits();
        let of = |name: &Arc<str>| self.entries.get(name).and_then(|entry| entry.bytes).unwrap_or(0);
        let mut bytes: usize = first.names.iter().map(of).sum();
        let mut kept: HashSet<&Arc<str>> = first.names.iter().collect();
        let resident = shared.pool.snapshot().adapters;
        let entry = |name: &str| self.entries.get_key_value(name).filter(|(name, _)| !kept.contains(name));
        let mut others: Vec<_> = resident
            .iter()
            .filter_map(|adapter| entry(&adapter.name))
            .map(|(name, entry)| (!entry.pinned, Reverse(entry.last_use), name))
            .collect();
        others.sort_unstable();
        for (.., name) in others {
            if bytes + of(name) <= budget && kept.len() < slots {
                bytes += of(name);
                kept.insert(name);
            }
        }
        names.iter().all(|name| kept.contains(name))
    }

    /// Holds all adapters of a request if all are in the pool.
    fn hold(&mut self, names: &[Arc<str>], places: &[usize], shared: &Arc<Shared>) -> Option<Held> {
        let pin = |name: &Arc<str>| {
            let id = shared.pool.find(name)?;
            shared.pool.pin(id).ok().map(|()| id)
        };
        let Some(ids) = names.iter().map(pin).collect::<Option<Vec<_>>>() else {
            names.iter().for_each(|name| self.sync_pin(name, &shared.pool));
            return None;
        };
        let now = self.tick();
        for name in names {
            if let Some(entry) = self.entries.get_mut(name) {
                (entry.holds, entry.last_use) = (entry.holds + 1, now);
            }
        }
        Some(Held { shared: Arc::clone(shared), names: names.to_vec(), ids, places: places.to_vec() })
    }

    /// One more request was admitted before the first that waits.
    fn overtake(&mut self) {
        if let Some(first) = self.waiters.values_mut().find(|waiter| waiter.failed.is_none()) {
            first.overtaken = first.overtaken.saturating_add(1);
        }
    }

    /// Pins what the first request that waits needs, as far as it is in the pool.
    pub(super) fn pin_first(&self, shared: &Shared) {
        if let Some((_, first)) = self.first() {
            first.names.iter().for_each(|name| self.sync_pin(name, &shared.pool));
        }
    }

    fn leave(&mut self, ticket: u64, shared: &Shared) -> Option<Waiter> {
        let waiter = self.waiters.remove(&ticket)?;
        waiter.names.iter().for_each(|name| self.sync_pin(name, &shared.pool));
        self.pin_first(shared);
        Some(waiter)
    }
}

impl Waiting {
    /// Whether the request may start now.
    ///
    /// # Errors
    /// Why one of its adapters cannot be used: its files, its numbers, its size.
    pub fn poll(self) -> Result<Admission, PoolError> {
        let shared = Arc::clone(&self.shared);
        let mut state = shared.state();
        // A ticket leaves the queue with its owner only.
        let waiter = state.waiters.get(&self.ticket);
        let (names, places, failed) = waiter.map_or_else(Default::default, Waiter::parts);
        if let Some(failed) = failed {
            return Err(failed);
        }
        if let Some((needed, budget)) = state.never_fits(&names, &shared) {
            state.counters.refused += 1;
            return Ok(Admission::Never { needed, budget });
        }
        let passes = state.may_pass(&names, Some(self.ticket), &shared);
        let Some(held) = passes.then(|| state.hold(&names, &places, &shared)).flatten() else {
            drop(state);
            return Ok(Admission::Waiting(self));
        };
        let first = state.first().is_some_and(|(ticket, _)| ticket == self.ticket);
        if let Some(waiter) = state.leave(self.ticket, &shared) {
            state.counters.wait(waiter.since.elapsed());
        }
        if !first {
            state.overtake();
        }
        drop(state);
        shared.changed.notify_all();
        Ok(Admission::Ready(held))
    }

    /// [`poll`](Self::poll), again and again for up to `timeout`.
    ///
    /// # Errors
    /// As [`poll`](Self::poll).
    pub fn wait(mut self, timeout: Duration) -> Result<Admission, PoolError> {
        let end = Instant::now() + timeout;
        loop {
            self = match self.poll()? {
                Admission::Waiting(waiting) if Instant::now() < end => waiting,
                answer => return Ok(answer),
            };
            let state = self.shared.state();
            // A lease that ends is not announced, so this looks again by itself.
            drop(self.shared.changed.wait_timeout(state, Duration::from_millis(1)));
        }
    }

    /// Bytes that still have to be brought to the pool, as far as sizes are known, and how many requests wait before this
    /// one.
    #[must_use]
    pub fn outlook(&self) -> (usize, usize) {
        let state = self.shared.state();
        let missing = |name: &Arc<str>| match self.shared.pool.find(name) {
            Some(_) => None,
            None => state.entries.get(name)?.bytes,
        };
        let names = state.waiters.get(&self.ticket).map_or(&[][..], |waiter| &waiter.names);
        (names.iter().filter_map(missing).sum(), state.waiters.range(..self.ticket).count())
    }
}

impl Drop for Waiting {
    fn drop(&mut self) {
        let mut state = self.shared.state();
        if state.leave(self.ticket, &self.shared).is_some() {
            drop(state);
            self.shared.changed.notify_all();
        }
    }
}

impl Held {
    /// The id of every name that was asked for, in that order: what batches lease.
    #[must_use]
    pub fn ids(&self) -> Vec<AdapterId> {
        self.places.iter().filter_map(|&place| self.ids.get(place).copied()).collect()
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        let mut state = self.shared.state();
        for name in &self.names {
            if let Some(entry) = state.entries.get_mut(name) {
                entry.holds -= 1;
            }
            state.sync_pin(name, &self.shared.pool);
        }
        drop(state);
        self.shared.changed.notify_all();
    }
}

impl fmt::Debug for Held {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Held").field(&self.names).finish()
    }
}

impl fmt::Debug for Waiting {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Waiting(ticket {})", self.ticket)
    }
}
