//! Tensor- and expert-parallel ranks against the truth of the whole layer: every grid, every feature, the same bits on every
//! rank; and a failure on one rank, which is an error on all. Ranks are threads, on the CPU or on one GPU.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test that cannot go on may panic")]

use half::{bf16, f16};
use moe_lora_collective::{Communicator, ThreadCommunicator};
use moe_lora_core::{
    Activation, AdapterId, AdapterWeights, DType, Element, InputError, LayerShape, ModelShape, RouterConfig,
    RouterWeightPlacement, RouterWeights, Routing, Shard, TokenAdapters,
};
use moe_lora_layer::{FusedMoEWithLoRA, LayerError};
use moe_lora_pool::{AdapterPool, PoolConfig};
use moe_lora_reference::metrics::{delta_error, delta_share, relative_error, worst_row_error};
use moe_lora_reference::random::{AdapterMix, AdapterSpec, Case, CaseSpec, RoutingMix, matrix};
use moe_lora_runner::{Device, Limits};
use std::sync::Arc;

/// Everything that one rank has.
struct Rank {
    shard: Shard,
    pool: AdapterPool,
    layer: FusedMoEWithLoRA,
    ids: Vec<AdapterId>,
}

impl Rank {
    fn new(device: &Device, case: &Case, shard: Shard, communicator: Option<Arc<dyn Communicator>>) -> Self {
        Self::in_group(device, case, shard, communicator, None)
    }

    fn in_group(
        device: &Device,
        case: &Case,
        shard: Shard,
        communicator: Option<Arc<dyn Communicator>>,
        group: Option<Arc<dyn Communicator>>,
    ) -> Self {
        let whole = ModelShape::uniform(case.spec.shape, 1, case.spec.weight_dtype);
        let pool = AdapterPool::new(device, &whole.shard(&shard).unwrap(), PoolConfig::default()).unwrap();
        let load = |(n, adapter): (usize, &moe_lora_core::AdapterLayer)| {
            let adapter = AdapterWeights::new(&whole, [(0, adapter.clone())].into()).unwrap();
            pool.load(&n.to_string(), adapter.shard(&whole, &shard).unwrap()).unwrap()
        };
        let ids = case.adapters.iter().enumerate().map(load).collect();
        // Batches run in pieces.
        let (weights, limits) = (case.weights.shard(&shard).unwrap(), Limits { max_tokens: 16, max_rank: 64 });
        let layer = FusedMoEWithLoRA::with_limits(0, weights, device, &pool, limits).unwrap();
        let mut layer = layer.with_shard(&whole.layer, &shard, communicator).unwrap();
        if let Some(group) = group {
            layer = layer.with_adapter_group(group).unwrap();
        }
        Self { shard, pool, layer, ids }
    }

    fn serve<T: Element>(&self, case: &Case, lora: bool) -> Result<Vec<T>, LayerError> {
        let id = |slot: &i32| usize::try_from(*slot).ok().filter(|_| lora).map(|slot| self.ids[slot]);
        let tokens: Vec<_> = case.token_slots.iter().map(id).collect();
        let routing = Routing::Selected { topk_ids: &case.topk_ids, topk_weights: &case.topk_weights };
        let mut out = vec![T::from_f32(f32::NAN); case.hidden.len()];
        self.layer.forward(&case.hidden_as::<T>(), routing, &TokenAdapters::from_ids(&tokens), &mut out)?;
        Ok(out)
    }
}

/// Runs `work` on every rank of a grid at once; `None` of one that panicked.
fn on_ranks<R: Send>(
    device: &Device,
    case: &Case,
    (tp, ep): (usize, usize),
    work: impl Fn(Rank) -> R + Sync,
) -> Vec<Option<R>> {
    on_shards(device, case, Shard::grid(tp, ep).unwrap(), work)
}

/// The same with fully sharded adapters.
fn on_full_ranks<R: Send>(
    device: &Device,
    case: &Case,
    (tp, ep): (usize, usize),
    work: impl Fn(Rank) -> R + Sync,
) -> Vec<Option<R>> {
    let grid = Shard::grid(tp, ep).unwrap().into_iter().map(Shard::with_fully_sharded_adapters);
    on_shards(device, case, grid.collect(), work)
}

fn on_shards<R: Send>(
    device: &Device,
    case: &Case,
    grid: Vec<Shard>,
    work: impl Fn(Rank) -> R + Sync,
) -> Vec<Option<R>> {
    let groups: Vec<_> = grid.chunks(grid[0].tp_size()).flat_map(|g| ThreadCommunicator::group(g.len())).collect();
    let all = ThreadCommunicator::group(grid.len());
    let ranks = grid.into_iter().zip(all.into_iter().zip(groups));
    std::thread::scope(|scope| {
        let start = |(shard, (all, group)): (Shard, (ThreadCommunicator, ThreadCommunicator))| {
            let work = &work;
            scope.spawn(move || work(Rank::in_group(device, case, shard, Some(Arc::new(all)), Some(Arc::new(group)))))
        };
        ranks.map(start).collect::<Vec<_>>().into_iter().map(|thread| thread.join().ok()).collect()
    })
}

fn wide<T: Element>(values: &[T]) -> Vec<f64> {
    values.iter().map(|v| v.to_f32().into()).collect()
}

/// The grid's output and base output, after all ranks were found to have the same bits. With `full`, adapters are fully sharded.
fn serve<T: Element + PartialEq>(
    device: &Device,
    case: &Case,
    grid: (usize, usize),
    full: bool,
) -> (Vec<f64>, Vec<f64>) {
    let both = |rank: Rank| (rank.serve::<T>(case, true).unwrap(), rank.serve::<T>(case, false).unwrap());
    let mut all = if full { on_full_ranks(device, case, grid, both) } else { on_ranks(device, case, grid, both) };
    let first = all.pop().unwrap().expect("no rank panics");
    assert!(all.into_iter().all(|other| other.as_ref() == Some(&first)), "ranks of {grid:?} differ");
    (wide(&first.0), wide(&first.1))
}

fn check<T: Element + PartialEq>(device: &Device, name: &str, case: &Case, grids: &[(usize, usize)], bound: f64) {
    let (truth, base_truth) = (case.truth().unwrap(), case.base_truth().unwrap());
    let width = case.spec.shape.hidden_size;
    let share = delta_share(&truth, &base_truth);
    let mut single = None;
    for (grid, full) in
        grids.iter().flat_map(|&grid| [(grid, false), (grid, true)]).filter(|(g, full)| g.0 > 1 || !full)
    {
        let (out, base) = serve::<T>(device, case, grid, full);
        let (error, row) = (relative_error(&out, &truth), worst_row_error(&out, &truth, width));
        let what = format!("{name} {} on tp, ep {grid:?}, full {full}: {error:.2e}, worst row {row:.2e}", T::DTYPE);
        assert!(error <= bound && row <= 1e-2, "{what}");
        assert!(relative_error(&base, &base_truth) <= bound, "{what}, base");
        if share > 0.25 {
            let delta = delta_error(&out, &base, &truth, &base_truth);
            assert!(delta <= 2e-2, "{what}, delta {delta:.2e}");
        }
        // Sums of partial sums are rounded once; only f32's own rounding may grow, by little.
        let single = *single.get_or_insert(error);
        assert!(error <= 1.3 * single + 4e-7, "{what}, on one rank {single:.2e}");
        for (token, slot) in case.token_slots.iter().enumerate().filter(|(_, slot)| **slot < 0) {
            let row = token * width..(token + 1) * width;
            assert_eq!(out[row.clone()], base[row], "{what}: token {token} of slot {slot} is the base model's");
        }
    }
}

/// Every feature once.
fn features(shape: LayerShape) -> Vec<(&'static str, CaseSpec)> {
    let rank = AdapterSpec::rank;
    let spec = |adapters: Vec<AdapterSpec>| CaseSpec { adapters, ..CaseSpec::new(shape, 19) };
    vec![
        ("plain", spec(vec![rank(8), rank(8), rank(8)])),
        ("mixed ranks", spec(vec![rank(1), rank(40), AdapterSpec { ranks: [4, 16, 9], ..rank(1) }])),
        (
            "one-sided",
            spec(vec![AdapterSpec { ranks: [8, 0, 0], ..rank(8) }, AdapterSpec { ranks: [0, 0, 8], ..rank(8) }]),
        ),
        (
            "shared outer",
            spec(vec![
                AdapterSpec { shared_outer: true, ..rank(8) },
                AdapterSpec { shared_gate_up_a: true, ..rank(16) },
                AdapterSpec { some_experts: true, ..rank(8) },
            ]),
        ),
        (
            "gpt-oss",
            CaseSpec {
                activation: Activation::GPT_OSS,
                bias: true,
                interleaved: true,
                ..spec(vec![rank(8), rank(24)])
            },
        ),
        ("weighted input", CaseSpec { router_weight: RouterWeightPlacement::Input, bias: true, ..spec(vec![rank(8)]) }),
        (
            "foreign ids",
            CaseSpec {
                routing: RoutingMix::ForeignExperts,
                routed_scaling_factor: 2.5,
                ..spec(vec![rank(8), rank(3)])
            },
        ),
        (
            "duplicates",
            CaseSpec { routing: RoutingMix::Duplicates, mix: AdapterMix::Runs, ..spec(vec![rank(8), rank(3)]) },
        ),
        ("one expert", CaseSpec { routing: RoutingMix::AllOnOne, mix: AdapterMix::RoundRobin, ..spec(vec![rank(8)]) }),
        ("base only", CaseSpec { activation: Activation::Gelu, ..spec(vec![]) }),
    ]
}

const SIZES: [usize; 4] = [1, 2, 4, 8];

fn all_grids() -> Vec<(usize, usize)> {
    SIZES.into_iter().flat_map(|tp| SIZES.map(|ep| (tp, ep))).collect()
}

fn every_grid(device: &Device, grids: &[(usize, usize)]) {
    let shape = LayerShape::new(8, 3, 48, 64).unwrap();
    for (seed, (name, spec)) in features(shape).into_iter().enumerate() {
        if device == &Device::cpu() {
            check::<f32>(device, name, &spec.clone().build(seed as u64), grids, 1e-5);
        }
        check::<bf16>(device, name, &spec.clone().dtype(DType::Bf16).build(seed as u64), grids, 3e-3);
        check::<f16>(device, name, &spec.dtype(DType::F16).build(seed as u64), grids, 5e-4);
    }
}

#[test]
fn every_grid_and_feature_gives_the_truth() {
    every_grid(&Device::cpu(), &all_grids());
}

#[test]
fn uneven_parts_give_the_truth() {
    // Experts 10 over 4 and 8 ranks, widths of 9 steps of 8 and of 21 single ones.
    for inner in [72, 21] {
        let shape = LayerShape::new(10, 4, 40, inner).unwrap();
        for (seed, (name, spec)) in features(shape).into_iter().enumerate() {
            let grids = [(1, 1), (2, 4), (4, 1), (8, 8), (5, 3)];
            check::<f32>(&Device::cpu(), name, &spec.build(100 + seed as u64), &grids, 1e-5);
        }
    }
}

/// Ranks on one GPU; `MOE_LORA_CASES` limits the grids, as sanitizers are slow.
#[cfg(feature = "cuda")]
#[test]
fn ranks_on_one_gpu_give_the_truth() {
    if moe_lora_cuda::testing::gpu("parallel ranks on one GPU").is_none() {
        return;
    }
    let device = Device::cuda(0).unwrap();
    let most = std::env::var("MOE_LORA_CASES").ok().and_then(|n| n.parse().ok()).unwrap_or(usize::MAX);
    let grids: Vec<_> = [(1, 1), (2, 1), (4, 2), (1, 2), (8, 1), (1, 8)].into_iter().take(most).collect();
    every_grid(&device, &grids);
}

#[test]
fn a_rank_holds_its_share_and_no_more() {
    let shape = LayerShape::new(8, 2, 64, 64).unwrap();
    let case = CaseSpec { adapters: vec![AdapterSpec::rank(8); 3], ..CaseSpec::new(shape, 4) }.build(5);
    for (tp, ep) in all_grids() {
        let used = on_ranks(&Device::cpu(), &case, (tp, ep), |rank| rank.pool.snapshot().used_bytes);
        // Of six sides, gate A, up A and down B are whole.
        let expert = 3 * 8 * (3 * 64 + 3 * 64 / tp) * 4;
        assert!(used.into_iter().all(|bytes| bytes == Some(8 / ep * expert)), "tp {tp}, ep {ep}");
    }
}

#[test]
fn a_rank_of_fully_sharded_adapters_holds_its_part_of_all_six_matrices() {
    let shape = LayerShape::new(8, 2, 64, 64).unwrap();
    for rank in [16, 8, 5] {
        let case = CaseSpec { adapters: vec![AdapterSpec::rank(rank); 3], ..CaseSpec::new(shape, 4) }.build(5);
        for (tp, ep) in all_grids() {
            let used = on_full_ranks(&Device::cpu(), &case, (tp, ep), |rank| rank.pool.snapshot().used_bytes);
            for (n, bytes) in used.into_iter().enumerate() {
                // A rank below tp leaves parts of one unused row.
                let rows = (rank / tp + usize::from(n % tp < rank % tp)).max(1);
                let expert = 3 * (2 * 64 * rows + 4 * 64 / tp * rank) * 4;
                assert_eq!(bytes, Some(8 / ep * expert), "rank {rank}, tp {tp}, ep {ep}, {n}");
            }
        }
    }
}

#[test]
fn without_a_communicator_the_parts_add_up_to_the_truth() {
    let shape = LayerShape::new(8, 3, 48, 64).unwrap();
    let spec = CaseSpec { adapters: vec![AdapterSpec::rank(8); 2], bias: true, ..CaseSpec::new(shape, 9) };
    let case = spec.build(6);
    let mut sum = vec![0.0; case.hidden.len()];
    for shard in Shard::grid(2, 4).unwrap() {
        let part = Rank::new(&Device::cpu(), &case, shard, None).serve::<f32>(&case, true).unwrap();
        sum.iter_mut().zip(part).for_each(|(sum, part)| *sum += f64::from(part));
    }
    let error = relative_error(&sum, &case.truth().unwrap());
    assert!(error <= 1e-5, "{error:.2e}");
}

/// A graph of a part reads the ids of all experts, and skips those of other ranks.
#[cfg(feature = "cuda")]
#[test]
fn parts_in_graphs_add_up_to_the_truth() {
    let Some(gpu) = moe_lora_cuda::testing::gpu("parts in graphs") else { return };
    let device = Device::cuda(0).unwrap();
    let shape = LayerShape::new(10, 4, 64, 64).unwrap();
    for (seed, tokens) in [(21, 3), (22, 16)] {
        let spec = CaseSpec { adapters: vec![AdapterSpec::rank(8); 2], bias: true, ..CaseSpec::new(shape, tokens) };
        let case = spec.dtype(DType::Bf16).build(seed);
        let mut sum = vec![0.0; case.hidden.len()];
        for shard in Shard::grid(2, 3).unwrap() {
            let rank = Rank::new(&device, &case, shard, None);
            let stream = gpu.stream().unwrap();
            let queue = stream.cudarc();
            let mut graph = rank.layer.capture::<bf16, f32>(queue, tokens).unwrap();
            let tensors = graph.tensors();
            queue.memcpy_htod(&case.hidden_as::<bf16>(), &mut tensors.hidden_mut()).unwrap();
            queue.memcpy_htod(&case.topk_ids, &mut tensors.topk_ids_mut()).unwrap();
            queue.memcpy_htod(&case.topk_weights, &mut tensors.topk_weights_mut()).unwrap();
            let id = |slot: &i32| usize::try_from(*slot).ok().map(|slot| rank.ids[slot]);
            graph.replay(&TokenAdapters::from_ids(&case.token_slots.iter().map(id).collect::<Vec<_>>())).unwrap();
            let part = queue.clone_dtoh(&graph.tensors().out()).unwrap();
            sum.iter_mut().zip(part).for_each(|(sum, part)| *sum += f64::from(part));
        }
        let error = relative_error(&sum, &case.truth().unwrap());
        assert!(error <= 3e-3, "{tokens} tokens: {error:.2e}");
    }
}

#[test]
fn every_rank_routes_over_all_experts() {
    let shape = LayerShape::new(8, 3, 48, 64).unwrap();
    let mut case = CaseSpec { adapters: vec![AdapterSpec::rank(8)], ..CaseSpec::new(shape, 21) }.build(7);
    let router = RouterWeights {
        weight: matrix(&mut fastrand::Rng::with_seed(1), DType::F32, 8, 48, 0.3),
        bias: None,
        selection_bias: None,
        config: RouterConfig::softmax(3),
    };
    let hidden = case.hidden_as::<f32>();
    let outs = on_ranks(&Device::cpu(), &case, (2, 4), |rank| {
        let id = |slot: &i32| usize::try_from(*slot).ok().map(|slot| rank.ids[slot]);
        let tokens = TokenAdapters::from_ids(&case.token_slots.iter().map(id).collect::<Vec<_>>());
        let layer = rank.layer.with_router(router.clone()).unwrap();
        let mut out = vec![f32::NAN; hidden.len()];
        layer.forward(&hidden, Routing::Router, &tokens, &mut out).unwrap();
        (out, layer.route(&hidden, Routing::Router).unwrap())
    });
    let (_, topk) = outs[0].clone().unwrap();
    assert!(topk.topk_ids.iter().any(|&e| e >= 6), "experts of the last rank are chosen");
    (case.topk_ids, case.topk_weights) = (topk.topk_ids, topk.topk_weights);
    let truth = case.truth().unwrap();
    assert!(outs.into_iter().all(|o| relative_error(&wide(&o.unwrap().0), &truth) <= 1e-5));
}

#[test]
fn what_fails_on_one_rank_is_an_error_on_all_and_the_next_batch_runs() {
    let shape = LayerShape::new(8, 2, 48, 64).unwrap();
    let case = CaseSpec { adapters: vec![AdapterSpec::rank(8); 2], ..CaseSpec::new(shape, 9) }.build(8);
    let truth = case.base_truth().unwrap();
    let work = |rank: Rank| {
        if rank.shard.rank() == 2 {
            rank.pool.unload(rank.ids[0]).unwrap();
        }
        let failed = rank.serve::<f32>(&case, true).expect_err("an adapter is gone on rank 2");
        let mut bad = case.clone();
        bad.topk_ids[3] = 8;
        let refused = rank.serve::<f32>(&bad, true).expect_err("there is no expert 8");
        let base = wide(&rank.serve::<f32>(&case, false).unwrap());
        (rank.shard.rank(), failed, refused, relative_error(&base, &truth))
    };
    for full in [false, true] {
        let grid = (2, 2);
        let results = match full {
            true => on_full_ranks(&Device::cpu(), &case, grid, work),
            false => on_ranks(&Device::cpu(), &case, grid, work),
        };
        for (rank, failed, _, error) in results.into_iter().map(|r| r.expect("no rank panics")) {
            match (rank, &failed) {
                (2, LayerError::Pool(_)) => {}
                // Its neighbour hears of it in their own group, where it is the first.
                (3, LayerError::Collective(e)) if full => {
                    assert!(e.to_string().starts_with("rank 0 failed: adapter id"), "{e}");
                }
                (0 | 1 | 3, LayerError::Collective(e)) => {
                    assert!(e.to_string().starts_with("rank 2 failed: adapter id"), "{e}");
                }
                other => panic!("{other:?}"),
            }
            assert!(error <= 1e-5);
        }
    }
}

#[test]
fn a_rank_that_dies_is_an_error_on_all() {
    let shape = LayerShape::new(8, 2, 48, 64).unwrap();
    let case = CaseSpec { adapters: vec![AdapterSpec::rank(8)], ..CaseSpec::new(shape, 5) }.build(9);
    let work = |rank: Rank| {
        rank.serve::<f32>(&case, true).unwrap();
        assert!(rank.shard.rank() != 5, "on purpose");
        rank.serve::<f32>(&case, true).map(drop).map_err(|e| e.to_string())
    };
    for (rank, result) in on_ranks(&Device::cpu(), &case, (4, 2), work).into_iter().enumerate() {
        assert_eq!(result, (rank != 5).then(|| Err("rank 5 is gone".to_owned())));
    }
    for (rank, result) in on_full_ranks(&Device::cpu(), &case, (4, 2), work).into_iter().enumerate() {
        // Of its own group, where it is rank 1, or of all.
        let gone = |n| Some(Err(format!("rank {n} is gone")));
        let expected = match rank {
            5 => None,
            4..8 => gone(1),
            _ => gone(5),
        };
        assert_eq!(result, expected, "rank {rank}");
    }
}

#[test]
fn parts_that_do_not_belong_together_are_refused() {
    let shape = LayerShape::new(8, 2, 48, 64).unwrap();
    let case = CaseSpec::new(shape, 1).build(10);
    let shard = Shard::new(1, 2, 0, 2).unwrap();
    let layer = |weights| {
        let model = ModelShape { layer: *case.weights.shape(), ..ModelShape::uniform(shape, 1, DType::F32) };
        let pool = AdapterPool::new(&Device::cpu(), &model, PoolConfig::default()).unwrap();
        FusedMoEWithLoRA::new(0, weights, &Device::cpu(), &pool).unwrap()
    };
    let message = |error: LayerError| error.input().map(InputError::to_string).unwrap();
    let error = message(layer(case.weights.clone()).with_shard(&shape, &shard, None).unwrap_err());
    assert!(error.starts_with("layer weights: found LayerShape") && error.contains("the share of Shard"), "{error}");
    let ranks: Vec<Arc<dyn Communicator>> =
        ThreadCommunicator::group(2).into_iter().map(|c| Arc::new(c) as Arc<dyn Communicator>).collect();
    let whole = |rank: &Arc<dyn Communicator>| {
        layer(case.weights.clone()).with_shard(&shape, &Shard::WHOLE, Some(Arc::clone(rank))).map(drop)
    };
    assert_eq!(message(whole(&ranks[1]).unwrap_err()), "communicator: found rank 1 of 2, expected rank 0 of 1");
    let alone = Rank::new(&Device::cpu(), &case, Shard::new(0, 2, 0, 1).unwrap().with_fully_sharded_adapters(), None);
    let error = message(alone.serve::<f32>(&case, false).unwrap_err());
    assert_eq!(error, "layer: found fully sharded adapters without a group, expected a layer `with_adapter_group`");
    let error = message(alone.layer.with_adapter_group(Arc::clone(&ranks[1])).unwrap_err());
    assert_eq!(error, "adapter group: found rank 1 of 2, expected rank 0 of 2");
}
