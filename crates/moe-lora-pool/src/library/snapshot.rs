//! What a library holds at one moment.

use super::AdapterLibrary;
use super::state::Entry;
use crate::{AdapterPool, PoolSnapshot};
use std::fmt;
use std::time::Duration;

/// Where an adapter is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
#[non_exhaustive]
pub enum AdapterState {
    /// Known by name; where it was registered has its weights.
    Registered,
    /// A loader reads, packs or uploads it.
    Loading,
    /// Packed in host memory.
    Host,
    /// In the pool, its copies under way: batches that lease it wait on the GPU.
    Uploading,
    /// In the pool.
    Resident,
}

/// Counts since the library was made.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Counters {
    /// Requests that were ready when they asked.
    pub ready_at_once: u64,
    /// Requests that had to wait.
    pub waited: u64,
    /// Requests that can never fit.
    pub refused: u64,
    /// The time that admitted requests waited, all together.
    pub wait_total: Duration,
    /// The longest of them.
    pub wait_longest: Duration,
    /// Adapters read from their sources.
    pub reads: u64,
    /// Adapters brought to the pool.
    pub uploads: u64,
    /// Images dropped from host memory.
    pub host_evictions: u64,
    /// Replaces that succeeded.
    pub replaces: u64,
    /// Loads that failed.
    pub failures: u64,
}

impl Counters {
    pub(super) fn wait(&mut self, time: Duration) {
        self.wait_total += time;
        self.wait_longest = self.wait_longest.max(time);
    }
}

/// A picture of a library and its pool. It prints as a table.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LibrarySnapshot {
    /// Adapters by name.
    pub adapters: Vec<LibraryEntry>,
    /// Bytes of host memory that images take.
    pub host_bytes: usize,
    /// Their budget.
    pub host_budget: usize,
    /// Requests that wait.
    pub waiting: usize,
    /// Counts so far.
    pub counters: Counters,
    /// The pool at the same time, nearly.
    pub pool: PoolSnapshot,
}

/// One registered adapter.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LibraryEntry {
    /// Its name.
    pub name: String,
    /// Where it is.
    pub state: AdapterState,
    /// Whether its image is in host memory.
    pub in_host: bool,
    /// What the pool is charged for it, once it was read.
    pub bytes: Option<usize>,
    /// 1, one more with every replace.
    pub version: u64,
    /// Whether it is pinned.
    pub pinned: bool,
    /// Requests that hold it.
    pub holds: usize,
}

pub(super) fn state_of(name: &str, entry: &Entry, pool: &AdapterPool) -> AdapterState {
    match pool.is_uploaded(name) {
        Some(true) => AdapterState::Resident,
        Some(false) => AdapterState::Uploading,
        None if entry.busy => AdapterState::Loading,
        None if entry.image.is_some() => AdapterState::Host,
        None => AdapterState::Registered,
    }
}

impl AdapterLibrary {
    /// What the library holds now.
    #[must_use]
    pub fn snapshot(&self) -> LibrarySnapshot {
        let state = self.shared.state();
        let pool = &self.shared.pool;
        let mut adapters: Vec<_> = state
            .entries
            .iter()
            .map(|(name, entry)| LibraryEntry {
                name: name.as_ref().into(),
                state: state_of(name, entry, pool),
                in_host: entry.image.is_some(),
                bytes: entry.bytes,
                version: entry.version,
                pinned: entry.pinned,
                holds: entry.holds,
            })
            .collect();
        adapters.sort_unstable_by(|a, b| a.name.cmp(&b.name));
        LibrarySnapshot {
            adapters,
            host_bytes: state.host_used(),
            host_budget: self.shared.config.host_bytes,
            waiting: state.waiters.len(),
            counters: state.counters,
            pool: pool.snapshot(),
        }
    }
}

impl fmt::Display for LibrarySnapshot {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (pool, counters) = (&self.pool, &self.counters);
        let mib = |bytes: usize| format!("{:.1}", bytes as f64 / f64::from(1 << 20));
        writeln!(
            f,
            "pool  {} of {} MiB: {} draining, {} loading, {} reserved, {} in holes too small",
            mib(pool.used_bytes),
            mib(pool.budget_bytes),
            mib(pool.draining_bytes),
            mib(pool.loading_bytes),
            mib(pool.reserved_bytes),
            mib(pool.fragmented_bytes),
        )?;
        writeln!(f, "host  {} of {} MiB", mib(self.host_bytes), mib(self.host_budget))?;
        let asked = counters.ready_at_once + counters.waited;
        writeln!(
            f,
            "{asked} requests: {} ready at once, {} waited ({:.1} ms mean, {:.1} ms most), {} refused, {} wait now",
            counters.ready_at_once,
            counters.waited,
            1e3 * counters.wait_total.as_secs_f64() / counters.waited.max(1) as f64,
            1e3 * counters.wait_longest.as_secs_f64(),
            counters.refused,
            self.waiting,
        )?;
        writeln!(
            f,
            "{} read, {} uploaded, {} evicted from the pool, {} from the host, {} replaced, {} failed",
            counters.reads,
            counters.uploads,
            pool.evictions,
            counters.host_evictions,
            counters.replaces,
            counters.failures,
        )?;
        let width = self.adapters.iter().map(|a| a.name.len()).max().unwrap_or(0).max(7);
        writeln!(f, "{:width$}  {:10}  {:>10}  {:>7}  {:>5}  pinned", "adapter", "state", "MiB", "version", "held")?;
        for adapter in &self.adapters {
            writeln!(
                f,
                "{:width$}  {:10}  {:>10}  {:>7}  {:>5}  {}",
                adapter.name,
                format!("{:?}", adapter.state).to_lowercase(),
                adapter.bytes.map_or_else(|| "?".to_owned(), mib),
                adapter.version,
                adapter.holds,
                if adapter.pinned { "yes" } else { "" },
            )?;
        }
        Ok(())
    }
}
