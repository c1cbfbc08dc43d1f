//! Random sequences of calls against an obvious model of the pool: a list of adapters, least recently used first, and a
//! list of leases.
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test that cannot go on may panic")]

mod common;

use common::{MAX_RANK, Made, adapter, assert_shows, full, shape};
use moe_lora_core::{AdapterId, AdapterWeights, DType, LayerShape, ModelShape, TokenAdapters};
use moe_lora_pool::{AdapterPool, AdapterSnapshot, HostMemory, Lease, PoolConfig, PoolError};
use proptest::prelude::*;

#[derive(Debug, Clone)]
enum Op {
    Load {
        name: u8,
        seed: u32,
    },
    Replace {
        name: u8,
        seed: u32,
    },
    /// What is wrong with the weights: 0 too many bytes, 1 the rank, 2 the shape.
    Bad {
        name: u8,
        replace: bool,
        wrong: u8,
    },
    Unload(u8),
    Pin(u8, bool),
    Lease(Vec<Option<u8>>),
    /// A batch with one id that means nothing any more, picked from all that ever did.
    LeaseStale(Vec<Option<u8>>, prop::sample::Index),
    Drop(prop::sample::Index),
}

fn ops() -> impl Strategy<Value = Vec<Op>> {
    let name = || 0..7_u8;
    let seed = || 1..1_000_000_u32;
    let batch = || prop::collection::vec(prop::option::weighted(0.7, 0..7_u8), 0..6);
    let op = prop_oneof![
        8 => (name(), seed()).prop_map(|(name, seed)| Op::Load { name, seed }),
        4 => (name(), seed()).prop_map(|(name, seed)| Op::Replace { name, seed }),
        1 => (name(), any::<bool>(), 0..3_u8).prop_map(|(name, replace, wrong)| Op::Bad { name, replace, wrong }),
        2 => name().prop_map(Op::Unload),
        2 => (name(), any::<bool>()).prop_map(|(name, pin)| Op::Pin(name, pin)),
        5 => batch().prop_map(Op::Lease),
        1 => (batch(), any::<prop::sample::Index>()).prop_map(|(batch, index)| Op::LeaseStale(batch, index)),
        5 => any::<prop::sample::Index>().prop_map(Op::Drop),
    ];
    prop::collection::vec(op, 1..60)
}

#[derive(Debug, Clone)]
struct Entry {
    name: String,
    id: AdapterId,
    version: u64,
    /// Unlike any other version's.
    block: usize,
    made: Made,
    bytes: usize,
    pinned: bool,
}

struct Model {
    pool: AdapterPool,
    config: PoolConfig,
    dtype: DType,
    /// Least recently used first.
    entries: Vec<Entry>,
    leases: Vec<(Lease, Vec<Entry>)>,
    ids: Vec<AdapterId>,
    blocks: usize,
    loads: u64,
    evictions: u64,
    replaces: u64,
}

impl Model {
    fn leases_of(&self, block: usize) -> usize {
        self.leases.iter().filter(|(_, held)| held.iter().any(|e| e.block == block)).count()
    }

    fn draining(&self) -> usize {
        let mut blocks: Vec<_> =
            self.leases.iter().flat_map(|(_, held)| held.iter().map(|e| (e.block, e.bytes))).collect();
        blocks.sort_unstable();
        blocks.dedup();
        blocks.iter().filter(|(block, _)| self.entries.iter().all(|e| e.block != *block)).map(|(_, bytes)| bytes).sum()
    }

    fn used(&self) -> usize {
        self.entries.iter().map(|e| e.bytes).sum::<usize>() + self.draining()
    }

    /// The entries that would remain, if room can be made at all.
    fn after_eviction(&self, bytes: usize, adapters: usize, keep: Option<&str>) -> Option<Vec<Entry>> {
        let mut left = self.entries.clone();
        loop {
            let used = left.iter().map(|e| e.bytes).sum::<usize>() + self.draining();
            if used + bytes <= self.config.bytes && left.len() + adapters <= self.config.max_adapters {
                return Some(left);
            }
            let may_go = |e: &Entry| !e.pinned && self.leases_of(e.block) == 0 && keep != Some(e.name.as_str());
            left.remove(left.iter().position(may_go)?);
        }
    }

    fn keep(&mut self, left: Vec<Entry>) {
        self.evictions += (self.entries.len() - left.len()) as u64;
        self.entries = left;
    }

    fn position(&self, name: &str) -> Option<usize> {
        self.entries.iter().position(|e| e.name == name)
    }

    fn next_block(&mut self) -> usize {
        self.blocks += 1;
        self.blocks
    }

    fn load(&mut self, name: &str, made: Made) {
        let bytes = made.numbers * self.dtype.size();
        let result = self.pool.load(name, made.weights.clone());
        if self.position(name).is_some() {
            assert!(matches!(result, Err(PoolError::AlreadyLoaded { .. })), "{result:?}");
        } else if bytes > self.config.bytes {
            assert!(result.unwrap_err().input().is_some());
        } else if let Some(left) = self.after_eviction(bytes, 1, None) {
            let id = result.unwrap();
            assert!(!self.ids.contains(&id), "an id is given out once");
            assert!(left.iter().all(|e| e.id.slot != id.slot));
            self.ids.push(id);
            self.keep(left);
            let block = self.next_block();
            self.entries.push(Entry { name: name.into(), id, version: 1, block, made, bytes, pinned: false });
            self.loads += 1;
        } else {
            self.assert_no_room(&result.unwrap_err(), bytes);
        }
    }

    fn replace(&mut self, name: &str, made: Made) {
        let bytes = made.numbers * self.dtype.size();
        let result = self.pool.replace(name, made.weights.clone());
        if bytes > self.config.bytes {
            assert!(result.unwrap_err().input().is_some());
            return;
        }
        let Some(at) = self.position(name) else {
            assert_eq!(result.unwrap_err(), PoolError::NotLoaded { name: name.into() });
            return;
        };
        let old = self.entries[at].clone();
        let idle = self.leases_of(old.block) == 0;
        let left = self
            .after_eviction(bytes, 0, Some(name))
            .or_else(|| self.after_eviction(bytes.saturating_sub(old.bytes), 0, Some(name)).filter(|_| idle));
        if let Some(left) = left {
            assert_eq!(result.unwrap(), old.id, "the id stays");
            self.keep(left);
            let at = self.position(name).unwrap();
            self.entries.remove(at);
            let block = self.next_block();
            self.entries.push(Entry { version: old.version + 1, block, made, bytes, ..old });
            self.replaces += 1;
        } else {
            self.assert_no_room(&result.unwrap_err(), bytes);
        }
    }

    fn assert_no_room(&self, error: &PoolError, bytes: usize) {
        match *error {
            PoolError::NoRoom { needed, budget, free, evictable, pinned, in_use, loading } => {
                assert_eq!((needed, budget, loading), (bytes, self.config.bytes, 0));
                assert_eq!(free, budget - self.used());
                assert_eq!(pinned, self.entries.iter().filter(|e| e.pinned).map(|e| e.bytes).sum::<usize>());
                assert_eq!(free + evictable + pinned + in_use, budget);
            }
            PoolError::NoSlot { max_adapters } => assert_eq!(max_adapters, self.entries.len()),
            ref other => panic!("{other}"),
        }
    }

    fn bad(&self, name: &str, replace: bool, wrong: u8) {
        let weights = match wrong {
            0 => full(1, MAX_RANK).weights,
            1 => full(1, MAX_RANK + 1).weights,
            _ => {
                let other = ModelShape { layer: LayerShape::new(2, 2, 8, 6).unwrap(), ..shape(self.dtype) };
                let layer = moe_lora_core::AdapterLayer::new(&other.layer, vec![Default::default(); 2]).unwrap();
                AdapterWeights::new(&other, [(3, layer)].into()).unwrap()
            }
        };
        let result = if replace { self.pool.replace(name, weights) } else { self.pool.load(name, weights) };
        let error = result.unwrap_err();
        let input = error.input().unwrap();
        assert!(input.tensor.as_ref().unwrap().starts_with(&format!("adapter {name:?}")), "{error}");
    }

    fn batch(&self, names: &[Option<u8>]) -> Vec<Option<AdapterId>> {
        names.iter().map(|n| Some(self.entries[self.position(&(*n)?.to_string())?].id)).collect()
    }

    fn lease(&mut self, names: &[Option<u8>]) {
        let ids = self.batch(names);
        let lease = self.pool.lease(&TokenAdapters::from_ids(&ids)).unwrap();
        let (mut used, rest): (Vec<_>, _) = self.entries.drain(..).partition(|e| ids.contains(&Some(e.id)));
        used.sort_by_key(|e| e.id.slot);
        self.entries = rest;
        self.entries.extend(used.iter().cloned());
        self.leases.push((lease, used));
    }

    fn lease_stale(&self, names: &[Option<u8>], index: prop::sample::Index) {
        let stale: Vec<_> = self.ids.iter().filter(|id| self.entries.iter().all(|e| e.id != **id)).collect();
        if !stale.is_empty() {
            let id = *stale[index.index(stale.len())];
            let mut ids = self.batch(names);
            ids.push(Some(id));
            assert_eq!(self.pool.lease(&TokenAdapters::from_ids(&ids)).unwrap_err(), PoolError::Stale { id });
        }
    }

    fn apply(&mut self, op: Op) {
        let id = |model: &Self, name: u8| Some(model.entries[model.position(&name.to_string())?].id);
        match op {
            Op::Load { name, seed } => self.load(&name.to_string(), adapter(seed)),
            Op::Replace { name, seed } => self.replace(&name.to_string(), adapter(seed)),
            Op::Bad { name, replace, wrong } => self.bad(&name.to_string(), replace, wrong),
            Op::Unload(name) => {
                if let Some(id) = id(self, name) {
                    self.pool.unload(id).unwrap();
                    self.entries.retain(|e| e.id != id);
                }
            }
            Op::Pin(name, pinned) => {
                if let Some(id) = id(self, name) {
                    if pinned {
                        self.pool.pin(id).unwrap()
                    } else {
                        self.pool.unpin(id).unwrap()
                    }
                    self.entries.iter_mut().filter(|e| e.id == id).for_each(|e| e.pinned = pinned);
                }
            }
            Op::Lease(names) => self.lease(&names),
            Op::LeaseStale(names, index) => self.lease_stale(&names, index),
            Op::Drop(index) => {
                if !self.leases.is_empty() {
                    self.leases.remove(index.index(self.leases.len()));
                }
            }
        }
    }

    fn check(&self) {
        let snapshot = self.pool.snapshot();
        let mut entries: Vec<_> = self.entries.iter().collect();
        entries.sort_by_key(|e| e.id.slot);
        let want: Vec<_> = entries
            .into_iter()
            .map(|e| AdapterSnapshot {
                name: e.name.clone(),
                id: e.id,
                version: e.version,
                max_rank: e.made.weights.max_rank(),
                bytes: e.bytes,
                pinned: e.pinned,
                leases: self.leases_of(e.block),
            })
            .collect();
        assert_eq!(snapshot.adapters, want);
        assert_eq!(snapshot.used_bytes, self.used());
        assert_eq!(snapshot.draining_bytes, self.draining());
        assert_eq!((snapshot.loading_bytes, snapshot.budget_bytes), (0, self.config.bytes));
        assert!(snapshot.used_bytes <= snapshot.budget_bytes);
        assert!(snapshot.adapters.len() <= self.config.max_adapters);
        let counters = (snapshot.loads, snapshot.evictions, snapshot.replaces);
        assert_eq!(counters, (self.loads, self.evictions, self.replaces));
        for name in 0..7 {
            let name = name.to_string();
            assert_eq!(self.pool.find(&name), self.entries.iter().find(|e| e.name == name).map(|e| e.id));
        }
        for &id in self.ids.iter().filter(|id| self.entries.iter().all(|e| e.id != **id)) {
            let stale = Err(PoolError::Stale { id });
            assert_eq!((self.pool.unload(id), self.pool.unpin(id)), (stale.clone(), stale));
        }
        for (lease, held) in &self.leases {
            for entry in held {
                assert_shows(lease, entry.id, &entry.made.weights, self.dtype);
            }
            let slots = held.iter().map(|e| e.id.slot);
            let in_use = (0..lease.table(1).unwrap().len() as u32)
                .filter(|&s| lease.table(1).unwrap().layer(s as i32).is_some());
            assert_eq!(in_use.collect::<Vec<_>>(), slots.collect::<Vec<_>>(), "nobody else's slots");
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn the_pool_does_what_the_model_does(
        ops in ops(),
        dtype in prop::sample::select(vec![DType::F32, DType::F16, DType::Bf16]),
        numbers in 1000..3500_usize,
        max_adapters in 2..6_usize,
    ) {
        let config = PoolConfig { bytes: numbers * dtype.size(), max_rank: MAX_RANK, max_adapters, ..PoolConfig::default() };
        let pool = AdapterPool::new(HostMemory, &shape(dtype), config).unwrap();
        let (entries, leases, ids) = (vec![], vec![], vec![]);
        let mut model =
            Model { pool, config, dtype, entries, leases, ids, blocks: 0, loads: 0, evictions: 0, replaces: 0 };
        for op in ops {
            model.apply(op);
            model.check();
        }
        model.leases.clear();
        model.check();
        for entry in std::mem::take(&mut model.entries) {
            model.pool.unload(entry.id).unwrap();
        }
        prop_assert_eq!(model.pool.snapshot().used_bytes, 0);
    }
}
