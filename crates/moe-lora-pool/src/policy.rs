//! What stays and what goes: the pool's accounts of bytes, slots, generations, uses, pins and leases.
//!
//! The policy holds no weights, takes no locks and touches no memory. A load is `admit` (evicts what has to go and sets
//! the bytes and the slot aside), then, once the caller has stored the weights, `commit`, or else `cancel`; so loads that
//! run side by side cannot overshoot the budget together.

#[cfg(test)]
mod interleavings;
#[cfg(test)]
mod tests;

use crate::{Eviction, PoolError};
use moe_lora_core::AdapterId;
use std::collections::HashMap;
use std::mem;

#[derive(Debug)]
pub(crate) struct Policy {
    budget: usize,
    max_adapters: usize,
    slots: Vec<Slot>,
    rows: Rows,
    /// Versions that were unloaded or replaced under a lease, by key.
    draining: HashMap<u64, Stored>,
    /// Bytes set aside by tickets.
    loading: usize,
    /// Counts loads, replaces and leases: it dates uses and names versions.
    clock: u64,
    eviction: Eviction,
    /// Uses of adapters that are not loaded.
    absent: HashMap<u64, u32>,
    /// Uses since all counts were halved.
    counted: usize,
}

/// Uses an adapter known, after which all counts are halved: what was asked for long ago fades.
const FADE: usize = 32;

#[derive(Debug)]
struct Slot {
    generation: u32,
    state: State,
}

#[derive(Debug)]
enum State {
    Free,
    /// Held by a ticket.
    Loading,
    Loaded(Tenant),
    /// Out of generations: never used again, since an old id could come to mean a new tenant.
    Worn,
}

/// A loaded adapter.
#[derive(Debug)]
pub(crate) struct Tenant {
    pub(crate) stored: Stored,
    pub(crate) pinned: bool,
    replacing: bool,
    last_use: u64,
    /// Who it is, whatever slot it has.
    who: u64,
    uses: u32,
}

/// One version of an adapter in memory.
#[derive(Debug)]
pub(crate) struct Stored {
    key: u64,
    /// Its own as long as it is in memory, also while it drains.
    row: u32,
    pub(crate) bytes: usize,
    pub(crate) leases: usize,
}

/// A lease of one version.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Hold {
    pub(crate) slot: u32,
    pub(crate) row: u32,
    key: u64,
}

/// Rows of the memory's tables: every version in memory has one.
#[derive(Debug)]
struct Rows {
    most: usize,
    taken: Vec<bool>,
}

impl Rows {
    fn free(&self) -> usize {
        self.most - self.taken.iter().filter(|taken| **taken).count()
    }

    /// The lowest free one.
    fn take(&mut self) -> u32 {
        let row = self.taken.iter().position(|taken| !taken).unwrap_or(self.taken.len());
        if row == self.taken.len() {
            self.taken.push(false);
        }
        self.taken[row] = true;
        row as u32
    }

    fn give(&mut self, row: u32) {
        if let Some(taken) = self.taken.get_mut(row as usize) {
            *taken = false;
        }
    }
}

/// Bytes set aside for a load or a replace; to be committed or cancelled.
#[derive(Debug)]
pub(crate) struct Ticket {
    id: AdapterId,
    bytes: usize,
    /// Less than `bytes` where a replace counts on the bytes of the old version.
    charged: usize,
    row: u32,
    who: u64,
    replaces: bool,
    in_place: bool,
}

impl Ticket {
    /// The row of the new version.
    pub(crate) const fn row(&self) -> u32 {
        self.row
    }

    pub(crate) const fn id(&self) -> AdapterId {
        self.id
    }

    /// Whether the new version takes bytes and row of the one before.
    pub(crate) const fn in_place(&self) -> bool {
        self.in_place
    }
}

impl Policy {
    /// `rows` limits the versions in memory, `max_adapters` those that are loaded.
    pub(crate) fn new(budget: usize, max_adapters: usize, rows: usize, eviction: Eviction) -> Self {
        Self {
            budget,
            max_adapters,
            slots: Vec::new(),
            rows: Rows { most: rows, taken: Vec::new() },
            draining: HashMap::new(),
            loading: 0,
            clock: 0,
            eviction,
            absent: HashMap::new(),
            counted: 0,
        }
    }

    /// Makes room for a new adapter; `who` is the same whenever it comes. Returns the slots whose tenants went for it; on an error none did.
    pub(crate) fn admit(&mut self, who: u64, bytes: usize) -> Result<(Ticket, Vec<u32>), PoolError> {
        let victims = self.victims(bytes, [1, 1], None)?;
        // Known before anybody goes, so that an error changes nothing.
        let no_slot = PoolError::NoSlot { max_adapters: self.max_adapters };
        let next = i32::try_from(self.slots.len()).map_err(|_| no_slot)?.unsigned_abs();
        victims.iter().for_each(|&slot| self.vacate(slot));
        let slot = (0..).zip(&self.slots).find(|(_, s)| matches!(s.state, State::Free)).map_or(next, |(slot, _)| slot);
        if slot == next {
            self.slots.push(Slot { generation: 0, state: State::Free });
        }
        let mut generation = 0;
        if let Some(place) = self.slots.get_mut(slot as usize) {
            place.state = State::Loading;
            generation = place.generation;
        }
        self.loading += bytes;
        let id = AdapterId { slot, generation };
        let row = self.rows.take();
        Ok((Ticket { id, bytes, charged: bytes, row, who, replaces: false, in_place: false }, victims))
    }

    /// Makes room for a new version beside the old one or, if others cannot make way and nobody leases the old version,
    /// in its place.
    pub(crate) fn admit_replacement(&mut self, id: AdapterId, bytes: usize) -> Result<(Ticket, Vec<u32>), PoolError> {
        let Stored { leases, bytes: old_bytes, row: old_row, .. } = self.tenant(id)?.stored;
        let (in_place, charged, victims) = match self.victims(bytes, [0, 1], Some(id.slot)) {
            Err(beside) if leases == 0 => {
                let more = bytes.saturating_sub(old_bytes);
                (true, more, self.victims(more, [0, 0], Some(id.slot)).map_err(|_| beside)?)
            }
            result => (false, bytes, result?),
        };
        victims.iter().for_each(|&slot| self.vacate(slot));
        self.tenant(id)?.replacing = true;
        self.loading += charged;
        let row = if in_place { old_row } else { self.rows.take() };
        Ok((Ticket { id, bytes, charged, row, who: 0, replaces: true, in_place }, victims))
    }

    /// Whether a replace of this adapter is under way.
    pub(crate) fn replacing(&mut self, id: AdapterId) -> Result<bool, PoolError> {
        Ok(self.tenant(id)?.replacing)
    }

    /// Whether [`commit`](Self::commit) would go well.
    pub(crate) fn check(&mut self, ticket: &Ticket) -> Result<(), PoolError> {
        if ticket.replaces && self.tenant(ticket.id)?.stored.leases > 0 && ticket.in_place {
            return Err(self.no_room(ticket.bytes)); // a batch leased the version whose bytes the ticket counted on
        }
        Ok(())
    }

    /// The new version becomes the one that is leased. After an error the ticket has to be cancelled.
    pub(crate) fn commit(&mut self, ticket: &Ticket) -> Result<AdapterId, PoolError> {
        self.check(ticket)?;
        let Ticket { id, bytes, charged, row, who, replaces, in_place } = *ticket;
        let now = self.tick();
        let new = Stored { key: now, row, bytes, leases: 0 };
        if replaces {
            let tenant = self.tenant(id)?;
            let old = mem::replace(&mut tenant.stored, new);
            (tenant.replacing, tenant.last_use) = (false, now);
            if !in_place {
                self.leave(old);
            }
        } else if let Some(slot) = self.slots.get_mut(id.slot as usize) {
            let uses = self.absent.remove(&who).unwrap_or(0);
            let (pinned, replacing, last_use) = (false, false, now);
            slot.state = State::Loaded(Tenant { stored: new, pinned, replacing, last_use, who, uses });
        }
        self.loading -= charged;
        Ok(id)
    }

    /// As if the ticket had never been, but for what was evicted for it.
    pub(crate) fn cancel(&mut self, ticket: &Ticket) {
        self.loading -= ticket.charged;
        if !ticket.in_place {
            self.rows.give(ticket.row);
        }
        if ticket.replaces {
            if let Ok(tenant) = self.tenant(ticket.id) {
                tenant.replacing = false;
            }
        } else if let Some(slot) = self.slots.get_mut(ticket.id.slot as usize) {
            slot.state = State::Free; // nobody saw the id: the generation goes on
        }
    }

    pub(crate) fn unload(&mut self, id: AdapterId) -> Result<(), PoolError> {
        self.tenant(id)?;
        self.vacate(id.slot);
        Ok(())
    }

    pub(crate) fn pin(&mut self, id: AdapterId, pinned: bool) -> Result<(), PoolError> {
        self.tenant(id)?.pinned = pinned;
        Ok(())
    }

    /// One hold for every distinct adapter, in the order of appearance; on an error none.
    pub(crate) fn lease(&mut self, ids: &[Option<AdapterId>]) -> Result<Vec<Hold>, PoolError> {
        let mut seen = vec![false; self.slots.len()];
        let mut holds = Vec::new();
        for &id in ids.iter().flatten() {
            let Stored { key, row, .. } = self.tenant(id)?.stored;
            if seen.get_mut(id.slot as usize).is_some_and(|seen| !mem::replace(seen, true)) {
                holds.push(Hold { slot: id.slot, row, key });
            }
        }
        let now = self.tick();
        for hold in &holds {
            if let Some(State::Loaded(tenant)) = self.slots.get_mut(hold.slot as usize).map(|s| &mut s.state) {
                tenant.stored.leases += 1;
                tenant.last_use = now;
                tenant.uses = tenant.uses.saturating_add(1);
            }
        }
        self.fade(holds.len());
        Ok(holds)
    }

    pub(crate) fn release(&mut self, hold: Hold) {
        if let Some(State::Loaded(tenant)) = self.slots.get_mut(hold.slot as usize).map(|s| &mut s.state)
            && tenant.stored.key == hold.key
        {
            tenant.stored.leases -= 1;
        } else if let Some(old) = self.draining.get_mut(&hold.key) {
            old.leases -= 1;
            if old.leases == 0 {
                self.draining.remove(&hold.key);
                self.rows.give(hold.row);
            }
        }
    }

    /// The loaded adapters by slot.
    pub(crate) fn tenants(&self) -> impl Iterator<Item = (AdapterId, &Tenant)> {
        (0..).zip(&self.slots).filter_map(|(slot, place)| match &place.state {
            State::Loaded(tenant) => Some((AdapterId { slot, generation: place.generation }, tenant)),
            _ => None,
        })
    }

    pub(crate) fn draining(&self) -> usize {
        self.draining.values().map(|s| s.bytes).sum()
    }

    pub(crate) const fn loading(&self) -> usize {
        self.loading
    }

    pub(crate) fn used(&self) -> usize {
        self.tenants().map(|(_, t)| t.stored.bytes).sum::<usize>() + self.draining() + self.loading
    }

    fn free(&self) -> usize {
        self.budget.saturating_sub(self.used())
    }

    fn tick(&mut self) -> u64 {
        self.clock += 1;
        self.clock
    }

    fn tenant(&mut self, id: AdapterId) -> Result<&mut Tenant, PoolError> {
        match self.slots.get_mut(id.slot as usize) {
            Some(Slot { generation, state: State::Loaded(tenant) }) if *generation == id.generation => Ok(tenant),
            _ => Err(PoolError::Stale { id }),
        }
    }

    /// Takes the tenant out. Its version drains if it is leased.
    fn vacate(&mut self, slot: u32) {
        let Some(place) = self.slots.get_mut(slot as usize) else { return };
        let next = place.generation.checked_add(1);
        let old = mem::replace(&mut place.state, if next.is_some() { State::Free } else { State::Worn });
        place.generation = next.unwrap_or(place.generation);
        if let State::Loaded(Tenant { stored, who, uses, .. }) = old {
            self.leave(stored);
            if uses > 0 {
                self.absent.insert(who, uses);
            }
        }
    }

    /// Halves all counts from time to time.
    fn fade(&mut self, uses: usize) {
        self.counted += uses;
        if self.counted > FADE * (self.slots.len() + self.absent.len()) {
            self.counted = 0;
            self.absent.retain(|_, uses| {
                *uses /= 2;
                *uses > 0
            });
            for slot in &mut self.slots {
                if let State::Loaded(tenant) = &mut slot.state {
                    tenant.uses /= 2;
                }
            }
        }
    }

    /// A version that nobody can lease any more: it drains, or it is gone.
    fn leave(&mut self, stored: Stored) {
        if stored.leases > 0 {
            self.draining.insert(stored.key, stored);
        } else {
            self.rows.give(stored.row);
        }
    }

    /// Evicts the first adapter that may go. Returns its slot.
    pub(crate) fn evict_one(&mut self) -> Option<u32> {
        let idle = self.tenants().filter(|(_, tenant)| tenant.evictable());
        let (_, slot) = idle.map(|(id, tenant)| (self.rank(tenant), id.slot)).min()?;
        self.vacate(slot);
        Some(slot)
    }

    /// What goes first has the lowest rank.
    const fn rank(&self, tenant: &Tenant) -> (u32, u64) {
        match self.eviction {
            Eviction::LeastRecent => (0, tenant.last_use),
            Eviction::LeastFrequent => (tenant.uses, tenant.last_use),
        }
    }

    /// The first of those that may go, as many as `bytes` more bytes, slots and rows need; lower slots first
    /// among those last used by the same batch.
    fn victims(&self, bytes: usize, [slots, rows]: [usize; 2], keep: Option<u32>) -> Result<Vec<u32>, PoolError> {
        let mut idle: Vec<_> = self
            .tenants()
            .filter(|(id, tenant)| tenant.evictable() && keep != Some(id.slot))
            .map(|(id, tenant)| (self.rank(tenant), id.slot, tenant.stored.bytes))
            .collect();
        idle.sort_unstable();
        let mut idle = idle.into_iter();
        let mut free = self.free();
        let taken = self.slots.iter().filter(|s| matches!(s.state, State::Loading | State::Loaded(_))).count();
        let mut free_slots = self.max_adapters.saturating_sub(taken);
        let mut free_rows = self.rows.free();
        let mut victims = Vec::new();
        while free < bytes || free_slots < slots || free_rows < rows {
            let Some((_, slot, freed)) = idle.next() else {
                return Err(match free < bytes {
                    true => self.no_room(bytes),
                    false => PoolError::NoSlot { max_adapters: self.max_adapters.min(self.rows.most) },
                });
            };
            free += freed;
            free_slots += 1;
            free_rows += 1;
            victims.push(slot);
        }
        Ok(victims)
    }

    fn no_room(&self, needed: usize) -> PoolError {
        let sum = |class: fn(&Tenant) -> bool| -> usize {
            self.tenants().filter(|(_, t)| class(t)).map(|(_, t)| t.stored.bytes).sum()
        };
        PoolError::NoRoom {
            needed,
            budget: self.budget,
            free: self.free(),
            evictable: sum(Tenant::evictable),
            pinned: sum(|t| t.pinned),
            in_use: sum(|t| !t.pinned && !t.evictable()) + self.draining(),
            loading: self.loading,
        }
    }
}

impl Tenant {
    const fn evictable(&self) -> bool {
        !self.pinned && !self.replacing && self.stored.leases == 0
    }
}
