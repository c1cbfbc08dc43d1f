//! What a pool in GPU memory shows and charges; what the kernels then compute with it is tested with the layer.
#![cfg(feature = "cuda")]
#![allow(clippy::unwrap_used, reason = "a test that cannot go on may panic")]

mod common;

use common::{full, shape};
use moe_lora_core::{AdapterWeights, DType, LayerShape, ModelShape, TokenAdapters};
use moe_lora_cuda::testing;
use moe_lora_pool::{AdapterPool, CudaMemory, HostMemory, PoolConfig};
use moe_lora_reference::random::{AdapterSpec, CaseSpec};

#[test]
fn a_host_pool_has_no_device_addresses() {
    let pool = AdapterPool::new(HostMemory, &shape(DType::F32), PoolConfig::default()).unwrap();
    let id = pool.load("host", full(1, 2).weights).unwrap();
    let lease = pool.lease(&TokenAdapters::from_ids(&[Some(id)])).unwrap();
    assert!(lease.table(1).is_ok());
    let line = lease.device_table(1).unwrap_err().to_string();
    assert_eq!(line, "found a pool on cpu, expected a pool in GPU memory");
}

#[test]
fn entries_point_at_padded_matrices_that_sharing_stores_once() {
    let Some(gpu) = testing::gpu("pool entries") else { return };
    let layer = LayerShape::new(4, 2, 32, 16).unwrap();
    let model = ModelShape { moe_layers: vec![7], ..ModelShape::uniform(layer, 1, DType::F32) };
    let memory = CudaMemory::new(gpu).unwrap();
    let pool = AdapterPool::new(memory, &model, PoolConfig { bytes: 1 << 20, ..Default::default() }).unwrap();
    let plain = AdapterSpec { ranks: [3, 8, 9], ..AdapterSpec::rank(1) };
    let shared = AdapterSpec { shared_outer: true, shared_gate_up_a: true, ..AdapterSpec::rank(5) };
    let nothing = AdapterSpec { ranks: [0; 3], ..AdapterSpec::rank(1) };
    let case = CaseSpec { adapters: vec![plain, shared, nothing], ..CaseSpec::new(layer, 1) }.build(1);
    let ids: Vec<_> = (0..3)
        .map(|n| {
            let weights = AdapterWeights::new(&model, [(7, case.adapters[n].clone())].into()).unwrap();
            pool.load(&n.to_string(), weights).unwrap()
        })
        .collect();
    // bf16; A and B of a projection have 32 + 16 numbers a rank.
    let bytes: Vec<_> = pool.snapshot().adapters.iter().map(|a| a.bytes).collect();
    assert_eq!(bytes, [4 * (8 + 8 + 16) * 48 * 2, (8 * 32 + 8 * 32 + 4 * 3 * 8 * 16) * 2, 0]);

    let tokens: Vec<_> = ids.iter().copied().map(Some).collect();
    let lease = pool.lease(&TokenAdapters::from_ids(&tokens)).unwrap();
    assert!(lease.table(7).is_err());
    let table = lease.device_table(7).unwrap();
    assert_eq!((table.dtype(), table.max_rank(), table.shape()), (DType::Bf16, 9, &layer));
    let of = |n: usize| table.layer(ids[n].slot as i32);
    assert!(of(2).is_none() && table.layer(-1).is_none() && lease.device_table(6).unwrap().max_rank() == 0);
    for n in [0, 1] {
        let entries = of(n).unwrap().entries();
        assert_eq!(entries.len(), 4 * 3);
        for (entry, spec_rank) in entries.iter().zip(case.spec.adapters[n].ranks.into_iter().cycle()) {
            assert!(entry.a % 16 == 0 && entry.b % 16 == 0 && entry.a != entry.b && entry.a > 0);
            assert_eq!(entry.rank, spec_rank as i32);
        }
    }
    let outer = of(1).unwrap().entries();
    assert!(outer.iter().step_by(3).all(|gate| gate.a == outer[0].a), "one A for all experts");
    assert!(outer[1].a == outer[0].a && outer[1].b != outer[0].b, "one A for gate and up");
    assert!(outer.iter().skip(2).step_by(3).all(|down| down.b == outer[2].b), "one B for all experts");
}
