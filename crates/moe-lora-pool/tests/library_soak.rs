//! Threads that admit, lease, prefetch, pin, replace, register and forget, over a library that is too small for them, with
//! sources that fail; every number of every lease is checked. `MOE_LORA_SOAK` is the number of operations.
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test that cannot go on may panic")]

use moe_lora_core::{
    AdapterLayer, AdapterWeights, DType, ExpertLora, InputError, LayerShape, Lora, Matrix, ModelShape, Projection,
    TokenAdapters,
};
use moe_lora_pool::{
    AdapterLibrary, AdapterPool, Admission, Held, HostMemory, LibraryConfig, PoolConfig, PoolError, Source, Tier,
};
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread;
use std::time::Duration;

const NAMES: u32 = 24;
const THREADS: u64 = 4;
/// A version is `NAMES * n + name`: its scale and, modulo 251, every number of its matrices.
static VERSIONS: AtomicU32 = AtomicU32::new(1);

fn model() -> ModelShape {
    ModelShape::uniform(LayerShape::new(3, 1, 16, 8).unwrap(), 2, DType::F32)
}

fn weights(version: u32) -> AdapterWeights {
    let rank = 1 + (version % NAMES) as usize % 5;
    let number = (version % 251) as f32;
    let expert = || {
        let a = Matrix::from_vec(vec![number; rank * 8], rank, 8).unwrap();
        let b = Matrix::from_vec(vec![number; 16 * rank], 16, rank).unwrap();
        ExpertLora { down: Some(Lora::new(a, b, version as f32).unwrap()), ..Default::default() }
    };
    let layer = || AdapterLayer::new(&model().layer, (0..3).map(|_| expert()).collect()).unwrap();
    AdapterWeights::new(&model(), [(0, layer()), (1, layer())].into()).unwrap()
}

fn next_version(name: u32) -> u32 {
    VERSIONS.fetch_add(1, Ordering::Relaxed) * NAMES + name
}

/// One read in eight fails, and every version that is read is a new one.
fn source(name: u32) -> Source {
    Source::new(move || match next_version(name) {
        version if (version / NAMES).is_multiple_of(8) => Err(InputError::new("a torn file", "a whole one")),
        version => Ok(weights(version)),
    })
}

/// The batch of a request: whole versions of the right names, the same in all layers.
fn forward(pool: &AdapterPool, names: &[u32], held: &Held) {
    let ids = held.ids();
    let tokens: Vec<_> = ids.iter().copied().map(Some).collect();
    let lease = pool.lease(&TokenAdapters::from_ids(&tokens)).unwrap();
    let tables = [0, 1].map(|layer| lease.table(layer).unwrap());
    for (id, name) in ids.iter().zip(names) {
        let lora = |layer: usize, expert| tables[layer].get(id.slot as i32, expert, Projection::Down).unwrap();
        let version = lora(0, 0).scale() as u32;
        assert_eq!(version % NAMES, *name, "another adapter's weights");
        for (layer, expert) in [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2)] {
            let lora = lora(layer, expert);
            assert_eq!(lora.scale() as u32, version, "two versions in one lease");
            for matrix in [lora.a(), lora.b()] {
                assert!(matrix.to_vec::<f32>().iter().all(|x| *x as u32 == version % 251), "a wrong number");
            }
        }
    }
}

fn worker(library: &AdapterLibrary, seed: u64, calls: usize) -> usize {
    let mut rng = fastrand::Rng::with_seed(seed);
    let mut running: Vec<(Vec<u32>, Held)> = Vec::new();
    let mut served = 0;
    for _ in 0..calls {
        let name = rng.u32(..NAMES);
        let text = name.to_string();
        match rng.u8(..20) {
            0..=8 => {
                let names: Vec<u32> = (0..rng.usize(1..3)).map(|_| rng.u32(..NAMES)).collect();
                let texts: Vec<String> = names.iter().map(u32::to_string).collect();
                let asked: Vec<&str> = texts.iter().map(String::as_str).collect();
                // Requests that are running could hold all there is while this one waits.
                let answer = library.admit(&asked).and_then(|answer| match answer {
                    Admission::Waiting(waiting) if rng.bool() => {
                        running.clear();
                        waiting.wait(Duration::from_secs(20))
                    }
                    Admission::Waiting(waiting) => waiting.poll(),
                    answer => Ok(answer),
                });
                match answer {
                    Ok(Admission::Ready(held)) => {
                        forward(library.pool(), &names, &held);
                        served += 1;
                        running.push((names, held));
                    }
                    Ok(Admission::Waiting(_) | Admission::Never { .. }) | Err(PoolError::NotRegistered { .. }) => {}
                    Err(error) => assert!(error.input().is_some(), "{error}"),
                }
            }
            9..=12 => {
                if let Some((names, held)) = running.pop() {
                    forward(library.pool(), &names, &held);
                }
            }
            13 => drop(library.prefetch(&text, if rng.bool() { Tier::Pool } else { Tier::Host })),
            14 => drop(library.pin(&text)),
            15 | 16 => drop(library.unpin(&text)),
            17 => match library.replace(&text, &weights(next_version(name))) {
                Ok(version) => assert!(version > 1),
                Err(PoolError::Busy { .. } | PoolError::NotRegistered { .. } | PoolError::NoRoom { .. }) => {}
                Err(error) => panic!("{error}"),
            },
            18 => match library.unregister(&text) {
                Ok(()) | Err(PoolError::Busy { .. } | PoolError::NotRegistered { .. }) => {}
                Err(error) => panic!("{error}"),
            },
            _ => match library.register(&text, source(name)) {
                Ok(()) | Err(PoolError::AlreadyLoaded { .. }) => {}
                Err(error) => panic!("{error}"),
            },
        }
        while running.len() > 2 {
            running.remove(0);
        }
        if rng.u8(..64) == 0 {
            let snapshot = library.snapshot();
            assert!(snapshot.pool.used_bytes <= snapshot.pool.budget_bytes);
        }
    }
    served
}

#[test]
fn threads_see_whole_versions_and_nothing_leaks() {
    let calls = std::env::var("MOE_LORA_SOAK").ok().and_then(|n| n.parse().ok()).unwrap_or(100_000);
    let one = weights(4).size_bytes(); // the largest rank
    let pool = AdapterPool::new(HostMemory, &model(), PoolConfig { bytes: 6 * one, ..Default::default() }).unwrap();
    let config = LibraryConfig { host_bytes: 10 * one, loaders: 2, patience: 8 };
    let library = AdapterLibrary::new(pool, config).unwrap();
    for name in 0..NAMES {
        library.register(&name.to_string(), source(name)).unwrap();
    }
    let served: usize = thread::scope(|scope| {
        let workers: Vec<_> = (0..THREADS)
            .map(|seed| {
                let library = &library;
                scope.spawn(move || worker(library, seed, calls / THREADS as usize))
            })
            .collect();
        workers.into_iter().map(|worker| worker.join().unwrap()).sum()
    });
    let snapshot = library.snapshot();
    assert!(served > calls / 20, "{served} served\n{snapshot}");
    assert!(snapshot.counters.failures > 0 && snapshot.pool.evictions > 0 && snapshot.counters.replaces > 0);
    assert!(snapshot.waiting == 0 && snapshot.adapters.iter().all(|adapter| adapter.holds == 0), "{snapshot}");
    for adapter in &snapshot.adapters {
        let mut tries = 0;
        while let Err(PoolError::Busy { .. }) = library.unregister(&adapter.name) {
            tries += 1;
            assert!(tries < 10_000, "{adapter:?} stays busy");
            thread::sleep(Duration::from_millis(1));
        }
    }
    let snapshot = library.snapshot();
    assert_eq!((snapshot.host_bytes, snapshot.pool.used_bytes, snapshot.adapters.len()), (0, 0, 0));
}
