//! Four threads on one pool that is too small for them; every number of every lease is checked.
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test that cannot go on may panic")]

mod common;

use common::{MAX_RANK, adapter, assert_shows, shape};
use moe_lora_core::{AdapterId, DType, Projection, TokenAdapters};
use moe_lora_pool::{AdapterPool, HostMemory, Lease, PoolConfig, PoolError};
use std::thread;

const NAMES: u32 = 8;
const THREADS: u64 = 4;
const CALLS: usize = 5000;
/// Weights are made of a seed that is the name plus a multiple of this, and show it as the scale of layer 1.
const STEP: u32 = 100;

/// The seed of the adapter under `id`: any projection of layer 1 knows it.
fn seed(lease: &Lease, id: AdapterId) -> Option<u32> {
    let table = lease.table(1).unwrap();
    let places = (0..3).flat_map(|e| Projection::ALL.map(|p| (e, p)));
    places.filter_map(|(e, p)| table.get(id.slot as i32, e, p)).map(|lora| lora.scale() as u32).next()
}

fn check(lease: &Lease, held: &[(u32, AdapterId)]) {
    for &(name, id) in held {
        if let Some(seed) = seed(lease, id) {
            assert_eq!(seed % STEP, name, "an id that was found under a name means that name's weights");
            assert_shows(lease, id, &adapter(seed).weights, DType::Bf16);
        }
    }
}

/// Returns how often loads, replaces and leases went well.
fn worker(pool: &AdapterPool, thread: u64) -> [u64; 3] {
    let mut rng = fastrand::Rng::with_seed(thread);
    let mut leases: Vec<(Lease, Vec<(u32, AdapterId)>)> = Vec::new();
    let [mut loads, mut replaces, mut leased] = [0; 3];
    for _ in 0..CALLS {
        let name = rng.u32(1..=NAMES);
        let text = name.to_string();
        let seed = name + STEP * rng.u32(1..1000);
        let weights = || adapter(seed).weights;
        match rng.u8(..16) {
            0..4 => match pool.load(&text, weights()) {
                Ok(_) => loads += 1,
                Err(PoolError::AlreadyLoaded { .. } | PoolError::NoRoom { .. } | PoolError::NoSlot { .. }) => {}
                Err(other) => panic!("{other}"),
            },
            4..7 => match pool.replace(&text, weights()) {
                Ok(_) => replaces += 1,
                Err(PoolError::NotLoaded { .. } | PoolError::NoRoom { .. }) => {}
                Err(PoolError::Busy { .. } | PoolError::Stale { .. }) => {}
                Err(other) => panic!("{other}"),
            },
            7 => {
                if let Some(id) = pool.find(&text) {
                    let _ = if rng.bool() { pool.unload(id) } else { pool.pin(id) };
                }
            }
            8 => (1..=NAMES).filter_map(|n| pool.find(&n.to_string())).for_each(|id| drop(pool.unpin(id))),
            9..12 => {
                let names = (0..2).map(|_| rng.u32(1..=NAMES));
                let held: Vec<_> = names.filter_map(|n| Some((n, pool.find(&n.to_string())?))).collect();
                let ids: Vec<_> = held.iter().map(|&(_, id)| Some(id)).collect();
                match pool.lease(&TokenAdapters::from_ids(&ids)) {
                    Ok(lease) => {
                        leased += 1;
                        check(&lease, &held);
                        leases.push((lease, held));
                    }
                    Err(PoolError::Stale { id }) => assert!(ids.contains(&Some(id))),
                    Err(other) => panic!("{other}"),
                }
            }
            _ => {
                leases.drain(..).for_each(|(lease, held)| check(&lease, &held));
            }
        }
        let snapshot = pool.snapshot();
        let loaded: usize = snapshot.adapters.iter().map(|a| a.bytes).sum();
        assert_eq!(snapshot.used_bytes, loaded + snapshot.draining_bytes + snapshot.loading_bytes);
        assert!(snapshot.used_bytes <= snapshot.budget_bytes && snapshot.adapters.len() <= 5);
    }
    leases.iter().for_each(|(lease, held)| check(lease, held));
    [loads, replaces, leased]
}

#[test]
fn four_threads_see_whole_versions_within_the_budget() {
    let config = PoolConfig { bytes: 7000, max_rank: MAX_RANK, max_adapters: 5, ..PoolConfig::default() };
    let pool = AdapterPool::new(HostMemory, &shape(DType::Bf16), config).unwrap();
    let done: Vec<_> = thread::scope(|scope| {
        let workers: Vec<_> =
            (0..THREADS).map(|t| (t, pool.clone())).map(|(t, p)| scope.spawn(move || worker(&p, t))).collect();
        workers.into_iter().map(|w| w.join().unwrap()).collect()
    });
    let sum = |n: usize| done.iter().map(|d| d[n]).sum::<u64>();
    let end = pool.snapshot();
    assert_eq!((end.loads, end.replaces), (sum(0), sum(1)));
    assert!(end.evictions > 100 && sum(1) > 100 && sum(2) > 100, "{end:?} {done:?}");
    assert_eq!((end.draining_bytes, end.loading_bytes), (0, 0), "all leases are gone");
    assert!(end.adapters.iter().all(|a| a.leases == 0));
    for adapter in end.adapters {
        pool.unload(adapter.id).unwrap();
    }
    assert_eq!(pool.snapshot().used_bytes, 0);
}
