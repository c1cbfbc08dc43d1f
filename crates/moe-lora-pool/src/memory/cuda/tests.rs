//! What is really in the GPU's memory, byte by byte.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test that cannot go on may panic")]

use super::plan::Side;
use super::*;
use crate::memory::Store;
use crate::{AdapterLibrary, AdapterPool, Admission, Lease, LibraryConfig, Source};
use bytemuck::pod_read_unaligned;
use half::bf16;
use moe_lora_core::{AdapterId, LayerShape, Matrix, Projection, TokenAdapters};
use moe_lora_cuda::{DeviceBuffer, testing};
use moe_lora_kernels::AdapterEntry;
use moe_lora_reference::random::{AdapterSpec, CaseSpec};
use std::collections::BTreeMap;

const EXPERTS: usize = 5;

fn model() -> ModelShape {
    let layer = LayerShape::new(EXPERTS, 2, 64, 40).unwrap();
    ModelShape { layer, moe_layers: vec![1, 3, 4], dtype: DType::Bf16, storage: Default::default() }
}

/// Random, of some layers, with absent experts, shared matrices and ranks up to `max_rank`.
fn adapter(seed: u64, max_rank: usize) -> AdapterWeights {
    let mut rng = fastrand::Rng::with_seed(seed);
    let mut layers = BTreeMap::new();
    for layer in [1, 3, 4] {
        if rng.u8(..4) > 0 {
            let mut rank = || rng.usize(..=max_rank);
            let ranks = [rank(), rank(), rank()];
            let (shared_gate_up_a, shared_outer) = (rng.u8(..4) == 0, rng.u8(..4) == 0);
            let ranks = if shared_gate_up_a { [ranks[0], ranks[0], ranks[2]] } else { ranks };
            let spec = AdapterSpec { ranks, shared_gate_up_a, shared_outer, some_experts: rng.bool() };
            let case = CaseSpec { adapters: vec![spec], ..CaseSpec::new(model().layer, 1) };
            layers.insert(layer, case.build(seed * 10 + layer as u64).adapters[0].clone());
        }
    }
    AdapterWeights::new(&model(), layers).unwrap()
}

fn store(pool: &AdapterPool) -> &Arc<CudaStore> {
    match &pool.shared.store {
        Store::Cuda(store) => store,
        Store::Host(_) => unreachable!("made on a GPU"),
    }
}

fn lease(pool: &AdapterPool, ids: &[AdapterId]) -> Lease {
    pool.lease(&TokenAdapters::from_ids(&ids.iter().copied().map(Some).collect::<Vec<_>>())).unwrap()
}

/// Bytes at a device address of the arena.
fn read(store: &CudaStore, stream: &Stream, address: u64, bytes: usize) -> Vec<u8> {
    let state = store.state();
    let slab = state.arena.slab_of(address).expect("an address of the arena");
    let mut found = vec![0_u8; bytes];
    stream.download(slab, (address - slab.address()) as usize, &mut found).unwrap();
    found
}

/// Asserts that a slot of the device tables and what it points to are exactly `want`, once the stream has waited.
fn assert_holds(pool: &AdapterPool, lease: &Lease, slot: i32, want: &AdapterWeights) {
    let (store, stream) = (store(pool), store(pool).gpu.stream().unwrap());
    lease.wait_on(&stream).unwrap();
    for (at, &layer) in model().moe_layers.iter().enumerate() {
        let width = EXPERTS * 3 * size_of::<AdapterEntry>();
        let (mut entries, mut active) = (vec![0_u8; width], [9_u8]);
        {
            let state = store.state();
            state.tables.read(&stream, at, slot as usize, &mut entries, &mut active).unwrap();
        }
        let want = want.layers().get(&layer);
        assert_eq!(active[0] != 0, want.is_some_and(|layer| layer.max_rank() > 0), "layer {layer}");
        for (n, bytes) in entries.chunks_exact(size_of::<AdapterEntry>()).enumerate() {
            let entry: AdapterEntry = pod_read_unaligned(bytes);
            let lora = want.and_then(|layer| layer.experts()[n / 3].get(Projection::ALL[n % 3]));
            let Some(lora) = lora else {
                assert_eq!(entry, AdapterEntry::default());
                continue;
            };
            assert_eq!((entry.rank as usize, entry.scale), (lora.rank(), lora.scale()));
            let padded = |side: Side, matrix: &Matrix| {
                let mut bytes = Vec::new();
                side.write::<bf16>(matrix, &mut |part| bytes.extend_from_slice(part));
                bytes
            };
            for (side, address, matrix) in [(Side::A, entry.a, lora.a()), (Side::B, entry.b, lora.b())] {
                let want = padded(side, matrix);
                assert_eq!(address % 256, 0);
                assert!(read(store, &stream, address, want.len()) == want, "layer {layer} entry {n} {side:?}");
            }
        }
    }
}

fn pool(gpu: &Gpu, config: PoolConfig) -> AdapterPool {
    AdapterPool::new(CudaMemory::new(gpu.clone()), &model(), config).unwrap()
}

#[test]
fn every_byte_of_every_adapter_arrives_whatever_is_loaded_and_unloaded() {
    let Some(gpu) = testing::gpu("pool bytes") else { return };
    let bytes = 300 << 10;
    let pool = pool(&gpu, PoolConfig { bytes, device_slots: 7, ..Default::default() });
    let mut rng = fastrand::Rng::with_seed(7);
    let mut held: BTreeMap<String, (AdapterId, u64)> = BTreeMap::new();
    for round in 0..400_u64 {
        let name = rng.u8(..12).to_string();
        let seed = round + 1;
        let result = match (rng.u8(..5), held.get(&name)) {
            (0, Some(&(id, _))) => {
                pool.unload(id).unwrap();
                held.remove(&name);
                continue;
            }
            (_, Some(_)) => pool.replace(&name, adapter(seed, 24)),
            (_, None) => pool.load(&name, adapter(seed, 24)),
        };
        if let Ok(id) = result {
            held.insert(name, (id, seed));
        }
        held.retain(|name, (id, _)| pool.find(name) == Some(*id));
        let snapshot = pool.snapshot();
        assert!(snapshot.used_bytes <= bytes && snapshot.reserved_bytes <= bytes);
        if round % 20 == 0 {
            for (id, seed) in held.values() {
                let lease = lease(&pool, &[*id]);
                assert_holds(&pool, &lease, lease.device_slots()[0], &adapter(*seed, 24));
            }
        }
    }
    assert!(held.len() > 2 && pool.snapshot().evictions > 20);
}

#[test]
fn a_version_in_use_stays_as_it_is_and_the_next_one_lies_elsewhere() {
    let Some(gpu) = testing::gpu("pool versions") else { return };
    let pool = pool(&gpu, PoolConfig { bytes: 1 << 20, device_slots: 3, ..Default::default() });
    let id = pool.load("rl", adapter(1, 16)).unwrap();
    let old = lease(&pool, &[id]);
    for step in 2..12 {
        assert_eq!(pool.replace("rl", adapter(step, 16)).unwrap(), id);
        let new = lease(&pool, &[id]);
        assert_ne!(old.device_slots(), new.device_slots());
        assert_holds(&pool, &new, new.device_slots()[0], &adapter(step, 16));
        assert_holds(&pool, &old, old.device_slots()[0], &adapter(1, 16));
    }
    pool.unload(id).unwrap();
    assert_holds(&pool, &old, old.device_slots()[0], &adapter(1, 16));
    drop(old);
    assert_eq!(pool.snapshot().used_bytes, 0);
}

/// Work that keeps a stream busy for tens of milliseconds.
fn occupy(gpu: &Gpu, stream: &Stream) -> DeviceBuffer {
    let buffer = gpu.alloc(512 << 20).unwrap();
    (0..100).for_each(|n| stream.fill(&buffer, 0, buffer.bytes(), n).unwrap());
    buffer
}
#[test]
fn memory_is_reused_only_behind_its_last_reader_and_nobody_waits_on_the_host() {
    let Some(gpu) = testing::gpu("pool reuse") else { return };
    let weights = |seed| adapter(seed, 24);
    let most = (1..9).map(|seed| CudaStore::bytes(&weights(seed))).max().unwrap();
    let pool = pool(&gpu, PoolConfig { bytes: most, device_slots: 1, ..Default::default() });
    let stream = gpu.stream().unwrap();
    let mut busy = 0;
    pool.load("0", weights(1)).unwrap();
    for seed in 2..9_u64 {
        let (last, next) = ((seed - 2).to_string(), (seed - 1).to_string());
        let id = pool.find(&last).unwrap();
        let reader = lease(&pool, &[id]);
        reader.wait_on(&stream).unwrap();
        let _work = occupy(&gpu, &stream);
        let end = stream.record(false).unwrap();
        drop(reader);
        // By unload, eviction and replacement in place in turn.
        let new = match seed % 3 {
            0 => {
                pool.unload(id).unwrap();
                pool.load(&next, weights(seed)).unwrap()
            }
            1 => pool.load(&next, weights(seed)).unwrap(),
            _ => {
                let id = pool.replace(&last, weights(seed)).unwrap();
                let early = lease(&pool, &[id]);
                assert!(!early.is_ready() || end.is_done().unwrap(), "the copy did not wait for the reader");
                busy += usize::from(!end.is_done().unwrap());
                assert_holds(&pool, &early, 0, &weights(seed));
                drop(early);
                pool.load(&next, weights(seed)).unwrap()
            }
        };
        let lease = lease(&pool, &[new]);
        while !lease.is_ready() {
            std::thread::yield_now();
        }
        assert!(end.is_done().unwrap(), "the copy did not wait for the reader");
        assert_holds(&pool, &lease, 0, &weights(seed));
    }
    assert!(busy > 0, "the host waited for the reader every time");
}

#[test]
fn the_budget_is_exact_and_what_the_gpu_refuses_changes_nothing() {
    let Some(gpu) = testing::gpu("pool budget") else { return };
    let bytes = CudaStore::bytes(&adapter(1, 16));
    let pool_of = |bytes| pool(&gpu, PoolConfig { bytes, ..Default::default() });
    let exact = pool_of(bytes);
    exact.reserve().unwrap();
    assert_eq!((exact.snapshot().reserved_bytes, exact.snapshot().used_bytes), (bytes, 0));
    let id = exact.load("1", adapter(1, 16)).unwrap();
    let held = lease(&exact, &[id]);
    assert_holds(&exact, &held, 0, &adapter(1, 16));
    let before = exact.snapshot();
    assert!(matches!(exact.load("2", adapter(2, 1)), Err(PoolError::NoRoom { .. })));
    assert_eq!(exact.snapshot(), before);
    assert!(pool_of(bytes - 1).load("1", adapter(1, 16)).unwrap_err().input().is_some());

    let huge = pool_of(1 << 50);
    let id = huge.load("1", adapter(1, 16)).unwrap();
    let before = huge.snapshot();
    assert!(matches!(huge.reserve(), Err(PoolError::OutOfMemory { .. })));
    assert_eq!(huge.snapshot(), before);
    let held = lease(&huge, &[id]);
    assert_holds(&huge, &held, 0, &adapter(1, 16));
}

/// The library over a GPU: what is admitted is in the GPU's memory, byte by byte, while adapters come and go and change.
#[test]
fn a_library_keeps_its_promises_on_a_gpu() {
    let Some(gpu) = testing::gpu("library") else { return };
    let most = (1..40).map(|seed| CudaStore::bytes(&adapter(seed, 24))).max().unwrap();
    let pool = pool(&gpu, PoolConfig { bytes: 4 * most, device_slots: 7, ..Default::default() });
    let config = LibraryConfig { host_bytes: 24 * most, loaders: 2, patience: 4 };
    let library = AdapterLibrary::new(pool, config).unwrap();
    let mut seeds: Vec<u64> = (1..20).collect();
    for (name, &seed) in seeds.iter().enumerate() {
        library.register(&name.to_string(), Source::new(move || Ok(adapter(seed, 24)))).unwrap();
    }
    let mut rng = fastrand::Rng::with_seed(5);
    let mut running = std::collections::VecDeque::new();
    for step in 0..300 {
        let name = rng.usize(..seeds.len());
        if rng.u8(..4) == 0 {
            match library.replace(&name.to_string(), &adapter(20 + step % 20, 24)) {
                Ok(_) => seeds[name] = 20 + step % 20,
                Err(error) => assert!(matches!(error, PoolError::Busy { .. } | PoolError::NoRoom { .. }), "{error}"),
            }
        }
        let mut answer = library.admit(&[&name.to_string()]).unwrap();
        if let Admission::Waiting(waiting) = answer {
            answer = waiting.wait(std::time::Duration::from_secs(10)).unwrap();
        }
        let Admission::Ready(held) = answer else { unreachable!("{answer:?}") };
        if rng.u8(..4) == 0 {
            let lease = lease(library.pool(), &held.ids());
            assert_holds(library.pool(), &lease, lease.device_slots()[0], &adapter(seeds[name], 24));
        }
        running.push_back(held);
        if running.len() > 2 {
            running.pop_front();
        }
    }
    let snapshot = library.snapshot();
    assert!(snapshot.counters.uploads > 50 && snapshot.pool.used_bytes <= 4 * most, "{snapshot}");
}
