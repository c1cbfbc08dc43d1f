//! The work behind the scenes: read, pack, upload.

use super::Shared;
use super::state::{State, Tier};
use crate::{PackedAdapter, PoolError};
use std::collections::HashSet;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};
use std::time::Duration;

/// How long a loader that found no room waits for some; an end of a lease is not announced.
const RETRY: Duration = Duration::from_millis(1);
const IDLE: Duration = Duration::from_secs(1);

/// The background threads; they end when this drops.
pub(super) struct Loaders {
    shared: Arc<Shared>,
    end: Arc<AtomicBool>,
    threads: Vec<JoinHandle<()>>,
}

impl Loaders {
    pub(super) fn start(shared: &Arc<Shared>, count: usize) -> io::Result<Self> {
        let mut loaders = Self { shared: Arc::clone(shared), end: Arc::default(), threads: Vec::new() };
        for n in 0..count {
            let (shared, end) = (Arc::clone(shared), Arc::clone(&loaders.end));
            let work = move || {
                while !end.load(Ordering::Acquire) {
                    if !shared.work() {
                        let state = shared.state();
                        let wait = if state.waiters.is_empty() && state.wanted.is_empty() { IDLE } else { RETRY };
                        drop(shared.changed.wait_timeout(state, wait));
                    }
                }
            };
            loaders.threads.push(thread::Builder::new().name(format!("moe-lora-loader-{n}")).spawn(work)?);
        }
        Ok(loaders)
    }
}

impl Drop for Loaders {
    fn drop(&mut self) {
        self.end.store(true, Ordering::Release);
        // Under the lock, so that no loader is between its last look at `end` and its wait.
        drop(self.shared.state());
        self.shared.changed.notify_all();
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}

/// One step of one adapter towards a tier.
struct Job {
    name: Arc<str>,
    tier: Tier,
    image: Option<PackedAdapter>,
    read: Option<super::Source>,
}

impl Shared {
    /// Does the first piece of work that can be done. `false` if there is none.
    pub(super) fn work(&self) -> bool {
        let mut skip: Vec<Arc<str>> = Vec::new();
        loop {
            let mut state = self.state();
            let Some(job) = state.next_job(self, &skip) else { return false };
            if let Ok(entry) = state.entry(&job.name) {
                entry.busy = true;
            }
            drop(state);
            let result = self.run(&job);
            let mut state = self.state();
            if let Ok(entry) = state.entry(&job.name) {
                entry.busy = false;
            }
            let no_room = matches!(
                result,
                Err(PoolError::NoRoom { .. } | PoolError::NoSlot { .. } | PoolError::Fragmented { .. })
            );
            if no_room {
                drop(state);
                skip.push(job.name); // others may be small enough, or only read
                continue;
            }
            state.finish(&job, result.err(), self);
            drop(state);
            self.changed.notify_all();
            return true;
        }
    }

    fn run(&self, job: &Job) -> Result<(), PoolError> {
        let image = match (&job.image, &job.read) {
            (Some(image), _) => image.clone(),
            (None, None) => return Ok(()), // unregistered meanwhile
            (None, Some(source)) => {
                let weights = source.read(self.pool.shape())?;
                let image = self.pool.pack(&job.name, &weights)?;
                drop(weights);
                tracing::debug!(adapter = &*job.name, bytes = image.bytes(), "read and packed");
                let mut state = self.state();
                state.counters.reads += 1;
                if let Ok(entry) = state.entry(&job.name) {
                    (entry.bytes, entry.image) = (Some(image.bytes()), Some(image.clone()));
                }
                state.trim_host(self.config.host_bytes);
                image
            }
        };
        if job.tier == Tier::Pool {
            match self.pool.load_packed(&job.name, &image) {
                Ok(_) => self.state().counters.uploads += 1,
                Err(PoolError::AlreadyLoaded { .. }) => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }
}

impl State {
    /// What requests wait for, in their order, as long as all of it fits into the pool together; then prefetches.
    fn next_job(&mut self, shared: &Shared, skip: &[Arc<str>]) -> Option<Job> {
        let (budget, slots) = shared.pool.limits();
        let (mut bytes, host_used) = (0, self.host_used());
        let mut seen: HashSet<&Arc<str>> = HashSet::new();
        for waiter in self.waiters.values().filter(|waiter| waiter.failed.is_none()) {
            for name in &waiter.names {
                if !seen.insert(name) {
                    continue;
                }
                bytes += self.entries.get(name).and_then(|entry| entry.bytes).unwrap_or(0);
                let known = self.entries.get(name).and_then(|entry| entry.bytes);
                let tier = match bytes <= budget && seen.len() <= slots {
                    true => Tier::Pool,
                    // Beyond this, bringing one would evict another that was brought and not yet held; to host memory only
                    // what stays there.
                    false if known.is_none_or(|bytes| host_used + bytes <= shared.config.host_bytes) => Tier::Host,
                    false => continue,
                };
                if let Some(job) = self.job(name, tier, shared).filter(|job| !skip.contains(&job.name)) {
                    return Some(job);
                }
            }
        }
        let mut wanted = std::mem::take(&mut self.wanted);
        // What is there already needs no prefetch any more.
        wanted.retain(|name| {
            let Some(entry) = self.entries.get_mut(name) else { return false };
            let tier = entry.wants.unwrap_or(Tier::Host);
            let there = shared.pool.find(name).is_some() || (tier == Tier::Host && entry.image.is_some());
            if there {
                entry.wants = None;
            }
            !there
        });
        self.wanted = wanted;
        let next = self.wanted.iter().filter(|name| !skip.contains(name));
        next.filter_map(|name| self.job(name, self.entries.get(name)?.wants?, shared)).next()
    }

    /// What has to be done for an adapter to reach a tier; `None` if nothing, or another loader is at it.
    fn job(&self, name: &Arc<str>, tier: Tier, shared: &Shared) -> Option<Job> {
        let entry = self.entries.get(name).filter(|entry| !entry.busy)?;
        if shared.pool.find(name).is_some() || (tier == Tier::Host && entry.image.is_some()) {
            return None;
        }
        Some(Job { name: Arc::clone(name), tier, image: entry.image.clone(), read: entry.source.clone() })
    }

    fn unwant(&mut self, name: &Arc<str>) {
        self.wanted.retain(|wanted| wanted != name);
        if let Some(entry) = self.entries.get_mut(name) {
            entry.wants = None;
        }
    }

    fn finish(&mut self, job: &Job, error: Option<PoolError>, shared: &Shared) {
        match &error {
            None => self.sync_pin(&job.name, &shared.pool),
            Some(error) => {
                tracing::warn!(adapter = &*job.name, %error, "cannot be loaded");
                self.counters.failures += 1;
                for waiter in self.waiters.values_mut().filter(|waiter| waiter.names.contains(&job.name)) {
                    waiter.failed = Some(error.clone());
                }
            }
        }
        self.trim_host(shared.config.host_bytes);
        if error.is_some() || self.entries.get(&job.name).is_some_and(|entry| entry.wants <= Some(job.tier)) {
            self.unwant(&job.name);
        }
    }
}
