//! The library on the host, step by step: what `work` does is decided here, not by threads.

use super::*;
use crate::{HostMemory, PoolConfig};
use moe_lora_core::{AdapterLayer, DType, ExpertLora, LayerShape, Lora, Matrix, ModelShape, TokenAdapters};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

fn model() -> ModelShape {
    ModelShape::uniform(LayerShape::new(2, 1, 8, 4).unwrap(), 1, DType::F32)
}

/// 48 bytes a rank; its scale is `seed`.
fn weights(rank: usize, seed: f32) -> AdapterWeights {
    let numbers = |n| (0..n).map(|x| x as f32 - 3.0).collect();
    let a = Matrix::from_vec::<f32>(numbers(rank * 4), rank, 4).unwrap();
    let b = Matrix::from_vec::<f32>(numbers(8 * rank), 8, rank).unwrap();
    let expert = ExpertLora { down: Some(Lora::new(a, b, seed).unwrap()), ..Default::default() };
    let layer = AdapterLayer::new(&model().layer, vec![expert, ExpertLora::default()]).unwrap();
    AdapterWeights::new(&model(), [(0, layer)].into()).unwrap()
}

/// Rank 1 each, `pool` and `host` of them fit; names are numbers.
fn library(pool: usize, host: usize, names: usize, patience: u32) -> (AdapterLibrary, Arc<AtomicUsize>) {
    let pool = AdapterPool::new(HostMemory, &model(), PoolConfig { bytes: 48 * pool, ..Default::default() }).unwrap();
    let config = LibraryConfig { host_bytes: 48 * host, loaders: 0, patience };
    let library = AdapterLibrary::new(pool, config).unwrap();
    let reads = Arc::new(AtomicUsize::new(0));
    for n in 0..names {
        let reads = Arc::clone(&reads);
        let read = move || {
            reads.fetch_add(1, Ordering::Relaxed);
            Ok(weights(1, n as f32))
        };
        library.register(&n.to_string(), Source::new(read)).unwrap();
    }
    (library, reads)
}

fn run(library: &AdapterLibrary) {
    while library.work() {}
}

fn ready(admission: Admission) -> Held {
    match admission {
        Admission::Ready(held) => held,
        other => unreachable!("{other:?}"),
    }
}

fn waiting(admission: Admission) -> Waiting {
    match admission {
        Admission::Waiting(waiting) => waiting,
        other => unreachable!("{other:?}"),
    }
}

/// Admits and loads.
fn hold(library: &AdapterLibrary, names: &[&str]) -> Held {
    match library.admit(names).unwrap() {
        Admission::Waiting(waiting) => {
            run(library);
            ready(waiting.poll().unwrap())
        }
        admission => ready(admission),
    }
}

fn states(library: &AdapterLibrary) -> Vec<AdapterState> {
    library.snapshot().adapters.into_iter().map(|adapter| adapter.state).collect()
}

use AdapterState::{Host, Registered, Resident};

#[test]
fn adapters_move_through_the_tiers_least_recently_used_first() {
    let (library, reads) = library(2, 3, 5, 8);
    assert_eq!((states(&library), reads.load(Ordering::Relaxed)), (vec![Registered; 5], 0));
    for name in ["0", "1", "2", "3"] {
        drop(hold(&library, &[name]));
    }
    assert_eq!(states(&library), [Registered, Host, Resident, Resident, Registered]);
    drop(hold(&library, &["1"]));
    assert_eq!(states(&library), [Registered, Resident, Host, Resident, Registered]);
    assert_eq!(reads.load(Ordering::Relaxed), 4, "the image in host memory was there still");
    drop(hold(&library, &["0"]));
    assert_eq!((states(&library)[0], reads.load(Ordering::Relaxed)), (Resident, 5));
    let snapshot = library.snapshot();
    assert_eq!((snapshot.host_bytes, snapshot.pool.used_bytes), (3 * 48, 2 * 48));
    assert_eq!((snapshot.counters.uploads, snapshot.counters.host_evictions), (6, 2));
}

#[test]
fn what_is_held_or_pinned_stays_and_ids_are_in_the_order_asked() {
    let (library, _) = library(3, 9, 6, 8);
    let held = hold(&library, &["2", "1", "2"]);
    let ids = held.ids();
    assert_eq!((ids.len(), ids[0] == ids[2], ids[0] == ids[1]), (3, true, false));
    let lease = library.pool().lease(&TokenAdapters::from_ids(&[Some(ids[1])])).unwrap();
    let scale = |lease: &crate::Lease, id: moe_lora_core::AdapterId| {
        lease.table(0).unwrap().get(id.slot as i32, 0, moe_lora_core::Projection::Down).unwrap().scale()
    };
    assert_eq!(scale(&lease, ids[1]), 1.0);
    for name in ["3", "4", "5"] {
        drop(hold(&library, &[name]));
    }
    assert!(library.state("1") == Some(Resident) && library.state("2") == Some(Resident));
    drop((held, lease));
    library.pin("5").unwrap();
    for name in ["0", "1", "2", "3"] {
        drop(hold(&library, &[name]));
    }
    assert_eq!(library.state("5"), Some(Resident));
    assert!(library.unregister("5").is_ok() && library.state("5").is_none());
    assert_eq!(library.admit(&["5"]).unwrap_err(), PoolError::NotRegistered { name: "5".into() });
}

#[test]
fn an_admission_says_whether_and_why() {
    let (library, _) = library(2, 9, 3, 8);
    library.register_weights("big", &weights(2, 7.0)).unwrap();
    assert!(library.register_weights("huge", &weights(3, 7.0)).unwrap_err().input().is_some());
    assert!(matches!(library.register("big", "nowhere"), Err(PoolError::AlreadyLoaded { .. })));
    drop(hold(&library, &["0"]));
    assert!(matches!(library.admit(&["0", "big"]).unwrap(), Admission::Never { needed: 144, budget: 96 }));
    library.pin("0").unwrap();
    assert!(matches!(library.admit(&["big"]).unwrap(), Admission::Never { needed: 144, budget: 96 }));
    library.unpin("0").unwrap();
    let waiting = waiting(library.admit(&["big", "big"]).unwrap());
    assert_eq!(waiting.outlook(), (96, 0));
    let behind = self::waiting(library.admit(&["1"]).unwrap());
    assert_eq!(behind.outlook(), (0, 1), "its size is not known yet");
    let waiting = self::waiting(waiting.poll().unwrap());
    run(&library);
    let held = ready(waiting.poll().unwrap());
    assert_eq!(held.ids().len(), 2);
    assert!(!library.work(), "no room, and nothing is read again");
    let behind = self::waiting(behind.poll().unwrap());
    assert_eq!(behind.outlook(), (48, 0));
    drop(held);
    run(&library);
    ready(behind.poll().unwrap());
    assert!(
        library.admit(&[]).is_ok_and(|answer| matches!(answer, Admission::Ready(_))),
        "the base model is always there"
    );
    assert_eq!(library.snapshot().counters.refused, 2);
}

#[test]
fn hot_adapters_cannot_starve_a_cold_one() {
    for patience in [0, 3, 20] {
        let (library, _) = library(2, 9, 4, patience);
        // Both hot ones are always held by an older request when a newer one comes.
        let mut held = vec![hold(&library, &["0"]), hold(&library, &["1"])];
        let mut cold = Some(waiting(library.admit(&["2"]).unwrap()));
        let mut queue: Vec<Waiting> = Vec::new();
        let mut passed = 0;
        for turn in 0..60 {
            run(&library);
            cold = match cold.map(Waiting::poll) {
                Some(Ok(Admission::Waiting(waiting))) => Some(waiting),
                Some(answer) => {
                    drop(ready(answer.unwrap()));
                    assert!(passed <= patience + 2, "overtaken {passed} times with a patience of {patience}");
                    None
                }
                None => None,
            };
            match library.admit(&[["0", "1"][turn % 2]]).unwrap() {
                Admission::Ready(new) => {
                    held.push(new);
                    passed += u32::from(cold.is_some());
                }
                Admission::Waiting(new) => queue.push(new),
                Admission::Never { .. } => unreachable!("each fits"),
            }
            if held.len() > 2 || (turn > 30 && !held.is_empty()) {
                drop(held.remove(0)); // the oldest is finished
            }
            run(&library);
            for waiting in std::mem::take(&mut queue) {
                match waiting.poll().unwrap() {
                    Admission::Ready(new) => held.push(new),
                    Admission::Waiting(waiting) => queue.push(waiting),
                    Admission::Never { .. } => unreachable!("each fits"),
                }
            }
        }
        assert!(cold.is_none(), "starved with a patience of {patience}");
    }
}

#[test]
fn what_cannot_be_read_is_an_error_for_its_requests_alone() {
    let (library, _) = library(2, 9, 2, 0);
    let broken = Arc::new(AtomicBool::new(true));
    let mends = Arc::clone(&broken);
    let read = move || match mends.load(Ordering::Relaxed) {
        true => Err(InputError::new("a torn file", "a whole one")),
        false => Ok(weights(1, 5.0)),
    };
    library.register("torn", Source::new(read)).unwrap();
    library.register("nowhere", "/nowhere/at/all").unwrap();
    let torn = waiting(library.admit(&["0", "torn"]).unwrap());
    let nowhere = waiting(library.admit(&["nowhere"]).unwrap());
    let good = waiting(library.admit(&["1"]).unwrap());
    run(&library);
    assert_eq!(torn.poll().unwrap_err().to_string(), "found a torn file, expected a whole one");
    assert!(nowhere.poll().unwrap_err().input().is_some());
    drop(ready(good.poll().unwrap()));
    broken.store(false, Ordering::Relaxed);
    drop(hold(&library, &["torn", "1"]));
    assert_eq!((library.snapshot().counters.failures, library.snapshot().waiting), (2, 0));
}

#[test]
fn a_training_loop_replaces_an_adapter_from_memory_and_versions_show() {
    let (library, reads) = library(3, 9, 3, 8);
    let held = hold(&library, &["0"]);
    let id = held.ids()[0];
    let old = library.pool().lease(&TokenAdapters::from_ids(&[Some(id)])).unwrap();
    for step in 2..10 {
        assert_eq!(library.replace("0", &weights(1, 100.0 * step as f32)).unwrap(), step);
    }
    let new = library.pool().lease(&TokenAdapters::from_ids(&[Some(id)])).unwrap();
    let scale = |lease: &crate::Lease| {
        lease.table(0).unwrap().get(id.slot as i32, 0, moe_lora_core::Projection::Down).unwrap().scale()
    };
    assert_eq!((scale(&old), scale(&new)), (0.0, 900.0));
    drop((old, new, held));
    for name in ["1", "2", "1", "2"] {
        drop(hold(&library, &[name]));
    }
    let entry = |library: &AdapterLibrary| library.snapshot().adapters.swap_remove(0);
    assert_eq!((entry(&library).version, entry(&library).in_host), (9, true));
    let reads_before = reads.load(Ordering::Relaxed);
    let held = hold(&library, &["0"]);
    let lease = library.pool().lease(&TokenAdapters::from_ids(&[Some(held.ids()[0])])).unwrap();
    assert_eq!(
        lease.table(0).unwrap().get(held.ids()[0].slot as i32, 0, moe_lora_core::Projection::Down).unwrap().scale(),
        900.0
    );
    assert_eq!(reads.load(Ordering::Relaxed), reads_before, "its files no longer count");
    assert!(library.replace("nobody", &weights(1, 1.0)).is_err());
    let (small, _) = self::library(2, 1, 0, 8);
    small.register_weights("a", &weights(1, 1.0)).unwrap();
    assert!(matches!(small.register_weights("b", &weights(1, 1.0)), Err(PoolError::NoRoom { .. })));
    assert_eq!(small.replace("a", &weights(1, 2.0)), Ok(2));
}

#[test]
fn prefetch_brings_an_adapter_to_its_tier_behind_those_who_wait() {
    let (library, _) = library(1, 3, 4, 8);
    library.prefetch("0", Tier::Host).unwrap();
    library.prefetch("1", Tier::Pool).unwrap();
    let waiting = waiting(library.admit(&["2"]).unwrap());
    assert!(library.work() && library.state("2") == Some(Resident));
    run(&library);
    assert_eq!(
        states(&library),
        [Host, Host, Resident, Registered],
        "the first request's adapter is not evicted for it"
    );
    drop(ready(waiting.poll().unwrap()));
    run(&library);
    assert_eq!(states(&library), [Host, Resident, Host, Registered]);
    assert!(library.prefetch("9", Tier::Host).is_err());
    library.unregister("0").unwrap();
    assert!(!library.work());
}

#[test]
fn a_snapshot_prints_as_a_table() {
    let (library, _) = library(2, 9, 2, 8);
    let _held = hold(&library, &["1"]);
    let text = library.snapshot().to_string();
    assert!(
        text.contains("1 requests: 0 ready at once, 1 waited")
            && text.contains("registered")
            && text.contains("resident"),
        "{text}"
    );
}

#[test]
fn ten_thousand_names_cost_little() {
    let (library, _) = library(2, 9, 0, 8);
    for n in 0..10_000 {
        library.register(&format!("tenant-{n:05}"), Source::folder(format!("/adapters/tenant-{n:05}"))).unwrap();
    }
    let names: usize = library.shared.state().entries.capacity() * (size_of::<Entry>() + size_of::<Arc<str>>() + 1);
    let texts = 10_000 * (2 * 16 + 48);
    assert!(names + texts < 5 << 20, "{names} and {texts} bytes");
}
