//! What a lease shows, what it costs, and what is refused.
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test that cannot go on may panic")]

mod common;

use common::{HIDDEN, INTERMEDIATE, MAX_RANK, Maker, adapter, assert_shows, bits, full, shape};
use half::bf16;
use moe_lora_core::{
    AdapterId, AdapterLayer, AdapterWeights, DType, ExpertLora, LayerShape, Lora, Matrix, ModelShape, Projection,
    Slice, TokenAdapters,
};
use moe_lora_pool::{AdapterPool, HostMemory, Lease, PoolConfig, PoolError};

const DTYPES: [DType; 3] = [DType::F32, DType::F16, DType::Bf16];

fn pool(dtype: DType, bytes: usize, max_adapters: usize) -> AdapterPool {
    AdapterPool::new(
        HostMemory,
        &shape(dtype),
        PoolConfig { bytes, max_rank: MAX_RANK, max_adapters, ..PoolConfig::default() },
    )
    .unwrap()
}

fn lease(pool: &AdapterPool, ids: &[AdapterId]) -> Lease {
    pool.lease(&TokenAdapters::from_ids(&ids.iter().copied().map(Some).collect::<Vec<_>>())).unwrap()
}

/// An adapter with these experts in layer 1 only.
fn layer_1(experts: Vec<ExpertLora>) -> AdapterWeights {
    let shape = shape(DType::F32);
    AdapterWeights::new(&shape, [(1, AdapterLayer::new(&shape.layer, experts).unwrap())].into()).unwrap()
}

/// Expert 1 has only a down projection: `A` of one row, `B` of one column.
fn down_only(a: [f32; INTERMEDIATE]) -> AdapterWeights {
    let b = Matrix::from_vec(vec![1_f32; HIDDEN], HIDDEN, 1).unwrap();
    let down = Lora::new(Matrix::from_vec(a.to_vec(), 1, INTERMEDIATE).unwrap(), b, 1.0).unwrap();
    layer_1(vec![ExpertLora::default(), ExpertLora { down: Some(down), ..Default::default() }, ExpertLora::default()])
}

#[test]
fn spec_4_1_mixed_ranks_cost_their_own_bytes_and_show_no_row_of_a_former_tenant() {
    for dtype in DTYPES {
        let pool = pool(dtype, 1 << 20, 8);
        let (small, large) = (full(1, 2), full(2, 5));
        let per_rank = 2 * 3 * 3 * (HIDDEN + INTERMEDIATE) * dtype.size();
        let former = pool.load("former", large.weights.clone()).unwrap();
        assert_eq!(pool.snapshot().used_bytes, 5 * per_rank);
        pool.unload(former).unwrap();
        let id = pool.load("small", small.weights.clone()).unwrap();
        let other = pool.load("large", large.weights.clone()).unwrap();
        assert_eq!((id.slot, id.generation), (former.slot, former.generation + 1));
        assert_eq!(pool.snapshot().used_bytes, (2 + 5) * per_rank);
        let lease = lease(&pool, &[id, other, id]);
        assert_shows(&lease, id, &small.weights, dtype);
        assert_shows(&lease, other, &large.weights, dtype);
        assert_eq!(lease.table(1).unwrap().max_rank(), 5);
    }
}

#[test]
fn spec_4_2_and_4_3_what_an_adapter_lacks_is_absent_whoever_had_the_slot_before() {
    let pool = pool(DType::Bf16, 1 << 20, 1);
    pool.load("former", full(1, 3).weights).unwrap();
    let one_sided = down_only([0.5, -0.25, 0.125, 1.0, -1.0, 2.0]);
    let id = pool.load("one-sided", one_sided.clone()).unwrap(); // takes the only slot
    let lease = lease(&pool, &[id]);
    assert_shows(&lease, id, &one_sided, DType::Bf16);
    let (table, slot) = (lease.table(1).unwrap(), id.slot as i32);
    for expert in 0..3 {
        for projection in Projection::ALL {
            let there = (expert, projection) == (1, Projection::Down);
            assert_eq!(table.get(slot, expert, projection).is_some(), there, "expert {expert} {projection}");
        }
    }
    assert!(lease.table(3).unwrap().layer(slot).is_none() && lease.table(0).unwrap().layer(slot).is_none());
}

#[test]
fn shared_matrices_are_stored_once_and_stay_shared() {
    for dtype in DTYPES {
        let mut maker = Maker::new(7);
        let a = maker.matrix(4, HIDDEN, DType::F32);
        let down_b = maker.matrix(HIDDEN, 4, DType::F32);
        let experts = (0..3).map(|_| ExpertLora {
            gate: Some(Lora::new(a.clone(), maker.matrix(INTERMEDIATE, 4, DType::F32), 0.5).unwrap()),
            up: Some(Lora::new(a.clone(), maker.matrix(INTERMEDIATE, 4, DType::F32), 0.5).unwrap()),
            down: Some(Lora::new(maker.matrix(4, INTERMEDIATE, DType::F32), down_b.clone(), 0.5).unwrap()),
        });
        let weights = layer_1(experts.collect());
        let pool = pool(dtype, 1 << 20, 8);
        let id = pool.load("shared outer", weights.clone()).unwrap();
        assert_eq!(pool.snapshot().used_bytes, 4 * (2 * HIDDEN + 9 * INTERMEDIATE) * dtype.size());
        let lease = lease(&pool, &[id]);
        assert_shows(&lease, id, &weights, dtype);
        let layer = lease.table(1).unwrap().layer(id.slot as i32).unwrap();
        assert!(Projection::ALL.into_iter().all(|p| layer.shares_outer(p)) && layer.experts()[2].shares_gate_up_a());
    }
}

fn address(matrix: &Matrix) -> usize {
    match matrix.slice() {
        Slice::F32(v) => v.as_ptr() as usize,
        Slice::F16(v) => v.as_ptr() as usize,
        Slice::Bf16(v) => v.as_ptr() as usize,
    }
}

#[test]
fn an_adapter_is_one_aligned_allocation_without_gaps() {
    for dtype in DTYPES {
        for seed in 1..20 {
            let pool = pool(dtype, 1 << 20, 1);
            let id = pool.load("x", adapter(seed).weights).unwrap();
            let lease = lease(&pool, &[id]);
            let tables = [1, 3].map(|n| lease.table(n).unwrap());
            let layers = tables.iter().filter_map(|t| t.layer(id.slot as i32));
            let mut places: Vec<_> = layers.flat_map(|l| l.matrices()).map(|m| (address(m), m.size_bytes())).collect();
            places.sort_unstable();
            assert_eq!(places[0].0 % 64, 0);
            assert!(places.windows(2).all(|w| w[0].0 + w[0].1 == w[1].0), "{places:?}");
            assert_eq!(places.iter().map(|p| p.1).sum::<usize>(), pool.snapshot().used_bytes);
        }
    }
}

#[test]
fn f32_weights_are_rounded_to_nearest_even_in_a_bf16_pool() {
    // bf16 steps at 1 are 2^-7: a tie goes to the even neighbour, a hair more goes up.
    let a = [1.0 + 1.0 / 256.0, 1.0 + 3.0 / 256.0, 1.0 + 1.01 / 256.0, -1.0 - 1.0 / 256.0, -3.0e38, 1.0e-40];
    let want: [u16; INTERMEDIATE] = [0x3f80, 0x3f82, 0x3f81, 0xbf80, 0xff62, 0x0001];
    let pool = pool(DType::Bf16, 1 << 20, 1);
    let id = pool.load("ties", down_only(a)).unwrap();
    let lease = lease(&pool, &[id]);
    let table = lease.table(1).unwrap();
    let got = table.get(id.slot as i32, 1, Projection::Down).unwrap().a();
    assert_eq!(got.view::<bf16>().unwrap().row(0), want.map(bf16::from_bits));
}

#[test]
fn weights_of_the_model_format_are_kept_bit_for_bit() {
    for dtype in DTYPES {
        let mut maker = Maker::new(3);
        let lora = maker.lora(Projection::Gate, 3, dtype, -2.5);
        let (a, b) = (bits(lora.a(), dtype), bits(lora.b(), dtype));
        let experts =
            vec![ExpertLora { gate: Some(lora), ..Default::default() }, Default::default(), Default::default()];
        let pool = pool(dtype, 1 << 20, 1);
        let id = pool.load("x", layer_1(experts)).unwrap();
        let lease = lease(&pool, &[id]);
        let table = lease.table(1).unwrap();
        let got = table.get(id.slot as i32, 0, Projection::Gate).unwrap();
        assert_eq!((bits(got.a(), dtype), bits(got.b(), dtype), got.scale()), (a, b, -2.5));
    }
}

#[test]
fn spec_4_9_bad_weights_are_named_before_anything_changes() {
    let pool = pool(DType::F16, 5000, 1);
    let kept = full(1, 2);
    let id = pool.load("kept", kept.weights.clone()).unwrap();
    let before = pool.snapshot();

    let other = |layer: LayerShape, n: usize, expert: ExpertLora| {
        let model = ModelShape { layer, moe_layers: vec![n], ..shape(DType::F32) };
        let experts = (0..layer.num_experts).map(|_| expert.clone()).collect();
        AdapterWeights::new(&model, [(n, AdapterLayer::new(&layer, experts).unwrap())].into()).unwrap()
    };
    let wide = Lora::new(
        Matrix::from_vec(vec![1_f32; 7], 1, 7).unwrap(),
        Matrix::from_vec(vec![1_f32; HIDDEN], HIDDEN, 1).unwrap(),
        1.0,
    );
    let wide = ExpertLora { down: Some(wide.unwrap()), ..Default::default() };
    for (weights, tensor, found, expected) in [
        (
            other(shape(DType::F32).layer, 2, ExpertLora::default()),
            "adapter \"new\"",
            "layer 2",
            "a MoE layer of [1, 3]",
        ),
        (
            other(LayerShape::new(2, 2, 8, 6).unwrap(), 3, ExpertLora::default()),
            "adapter \"new\" layer 3",
            "2 experts",
            "the model's 3",
        ),
        (
            other(LayerShape::new(3, 2, 8, 7).unwrap(), 1, wide),
            "adapter \"new\" layer 1 expert 0 down",
            "B A of [8, 7]",
            "[8, 6]",
        ),
        (
            full(2, MAX_RANK + 1).weights,
            "adapter \"new\" layer 1 expert 0 gate",
            "rank 17",
            "at most the pool's max_rank of 16",
        ),
        (
            down_only([0.0, 0.0, 0.0, 0.0, f32::NAN, 0.0]),
            "adapter \"new\" layer 1 expert 1 down A",
            "NaN at row 0, column 4",
            "a number that is finite in f16",
        ),
        (
            down_only([0.0, -70000.0, 0.0, 0.0, 0.0, 0.0]),
            "adapter \"new\" layer 1 expert 1 down A",
            "-70000 at row 0, column 1",
            "a number that is finite in f16",
        ),
        (full(2, 10).weights, "adapter \"new\"", "5040 bytes", "at most the pool's budget of 5000 bytes"),
    ] {
        let error = pool.load("new", weights.clone()).unwrap_err();
        let input = error.input().unwrap();
        assert_eq!(input.tensor.as_deref(), Some(tensor));
        assert_eq!((input.found.as_str(), input.expected.as_str()), (found, expected));
        let error = pool.replace("kept", weights).unwrap_err();
        assert!(error.input().is_some_and(|input| input.found == found), "{error}");
        assert_eq!((pool.snapshot(), pool.find("new")), (before.clone(), None));
    }
    assert_shows(&lease(&pool, &[id]), id, &kept.weights, DType::F16);

    for config in [
        PoolConfig { bytes: 0, ..PoolConfig::default() },
        PoolConfig { max_rank: 0, ..PoolConfig::default() },
        PoolConfig { max_adapters: 0, ..PoolConfig::default() },
        PoolConfig { max_adapters: usize::MAX, ..PoolConfig::default() },
    ] {
        assert!(AdapterPool::new(HostMemory, &shape(DType::F32), config).unwrap_err().input().is_some());
    }
}

#[test]
fn spec_4_10_more_adapters_than_fit_evict_or_are_refused_and_the_pool_serves_on() {
    let bytes = full(1, 2).numbers * 4;
    for (budget, max_adapters) in [(3 * bytes, 100), (1 << 20, 3)] {
        let pool = pool(DType::F32, budget, max_adapters);
        let mut ids = Vec::new();
        for n in 1..=20 {
            ids.push(pool.load(&n.to_string(), full(n, 2).weights).unwrap());
            assert!(pool.snapshot().adapters.len() <= 3);
        }
        assert_eq!(pool.snapshot().evictions, 17);
        let stale = pool.lease(&TokenAdapters::from_ids(&[Some(ids[19]), Some(ids[0])])).unwrap_err();
        assert_eq!(stale, PoolError::Stale { id: ids[0] }, "an error for that request");

        let held = lease(&pool, &ids[17..]);
        let before = pool.snapshot();
        let refused = pool.load("one more", full(21, 2).weights).unwrap_err();
        assert!(matches!(refused, PoolError::NoRoom { .. } | PoolError::NoSlot { max_adapters: 3 }), "{refused}");
        assert_eq!(pool.snapshot(), before);
        for n in 18..=20_u32 {
            assert_shows(&held, ids[n as usize - 1], &full(n, 2).weights, DType::F32);
        }
        drop(held);
        pool.pin(ids[17]).unwrap();
        pool.load("one more", full(21, 2).weights).unwrap();
        assert_eq!((pool.find("18"), pool.find("19")), (Some(ids[17]), None), "the pinned one stays");
    }
}

#[test]
fn a_replace_is_seen_by_later_leases_only_and_keeps_id_and_pin() {
    let bytes = full(1, 2).numbers * 4;
    let pool = pool(DType::F32, 2 * bytes, 4);
    let id = pool.load("policy", full(1, 2).weights).unwrap();
    pool.pin(id).unwrap();
    let old = lease(&pool, &[id]);
    assert_eq!(pool.replace("policy", full(2, 2).weights).unwrap(), id);
    let new = lease(&pool, &[id]);
    assert_shows(&old, id, &full(1, 2).weights, DType::F32);
    assert_shows(&new, id, &full(2, 2).weights, DType::F32);
    let snapshot = pool.snapshot();
    assert_eq!((snapshot.used_bytes, snapshot.draining_bytes), (2 * bytes, bytes));
    assert_eq!((snapshot.adapters[0].version, snapshot.adapters[0].pinned), (2, true));

    let error = pool.replace("policy", full(3, 2).weights).unwrap_err();
    let (needed, budget, pinned, in_use) = (bytes, 2 * bytes, bytes, bytes);
    assert_eq!(error, PoolError::NoRoom { needed, budget, free: 0, evictable: 0, pinned, in_use, loading: 0 });
    assert_shows(&lease(&pool, &[id]), id, &full(2, 2).weights, DType::F32);
    drop((old, new));
    assert_eq!(pool.snapshot().used_bytes, bytes);
}

#[test]
fn an_unleased_adapter_that_fills_the_budget_can_be_replaced_again_and_again() {
    let bytes = full(1, 3).numbers * 2;
    let pool = pool(DType::Bf16, bytes, 4);
    let id = pool.load("policy", full(1, 3).weights).unwrap();
    for n in 2..12 {
        assert_eq!(pool.replace("policy", full(n, 3).weights).unwrap(), id);
        assert_shows(&lease(&pool, &[id]), id, &full(n, 3).weights, DType::Bf16);
        assert_eq!(pool.snapshot().used_bytes, bytes);
    }
    let held = lease(&pool, &[id]);
    assert!(matches!(pool.replace("policy", full(12, 1).weights), Err(PoolError::NoRoom { .. })));
    assert_shows(&held, id, &full(11, 3).weights, DType::Bf16);
}

#[test]
fn an_unloaded_adapter_lives_as_long_as_its_leases_even_without_its_pool() {
    let pool = pool(DType::F32, 1 << 20, 4);
    let id = pool.load("x", full(1, 2).weights).unwrap();
    let lease = lease(&pool, &[id]);
    pool.unload(id).unwrap();
    assert_eq!((pool.find("x"), pool.unload(id)), (None, Err(PoolError::Stale { id })));
    assert_shows(&lease, id, &full(1, 2).weights, DType::F32);
    drop(pool);
    assert_shows(&lease, id, &full(1, 2).weights, DType::F32);
}

#[test]
fn a_batch_of_the_base_model_and_an_adapter_that_changes_nothing_cost_nothing() {
    let pool = pool(DType::F32, 1, 4);
    let nothing = AdapterWeights::new(&shape(DType::F32), Default::default()).unwrap();
    let id = pool.load("nothing", nothing).unwrap();
    assert_eq!(pool.snapshot().used_bytes, 0);
    assert!(lease(&pool, &[id]).table(1).unwrap().layer(id.slot as i32).is_none());
    assert!(pool.lease(&TokenAdapters::base(100)).unwrap().table(1).unwrap().is_empty());
    fn handle<T: Clone + Send + Sync>(_: &T) {}
    fn shared<T: Send + Sync>(_: &T) {}
    handle(&pool);
    shared(&lease(&pool, &[id]));
}
