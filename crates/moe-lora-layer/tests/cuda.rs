//! The layer with its pool on a GPU: random layers against the truth, same bits, eviction, replacement, refusals.
#![cfg(feature = "cuda")]
#![allow(clippy::unwrap_used, clippy::print_stderr, reason = "tests may fail loudly and speak")]

use fastrand::Rng;
use half::{bf16, f16};
use moe_lora_core::{
    Activation, AdapterId, AdapterTable, AdapterWeights, DType, Element, LayerShape, ModelShape, RouterWeightPlacement,
    Routing, TokenAdapters,
};
use moe_lora_cuda::testing;
use moe_lora_layer::{FusedMoEWithLoRA, LayerError};
use moe_lora_pool::{AdapterPool, PoolConfig};
use moe_lora_reference::metrics::{delta_error, delta_share, is_near_twin, relative_error, worst_row_error};
use moe_lora_reference::random::{AdapterMix, AdapterSpec, Case, CaseSpec, RoutingMix};
use moe_lora_reference::{GpuRounding, forward_rounded};
use moe_lora_runner::{Device, Limits};

/// GPU 0, or `None` after a loud word.
fn device(test: &str) -> Option<Device> {
    testing::gpu(test).map(|_| Device::cuda(0).unwrap())
}

/// A case's layer, and its adapters in the order of `order`.
struct Server {
    pool: AdapterPool,
    layer: FusedMoEWithLoRA,
    /// By the case's own slots.
    ids: Vec<AdapterId>,
}

impl Server {
    fn new(device: &Device, case: &Case, order: impl Iterator<Item = usize>, limits: Limits) -> Self {
        let model = ModelShape::uniform(case.spec.shape, 1, case.spec.weight_dtype);
        let pool = AdapterPool::new(device, &model, PoolConfig::default()).unwrap();
        let mut ids = vec![AdapterId { slot: 0, generation: 0 }; case.adapters.len()];
        for n in order {
            let weights = AdapterWeights::new(&model, [(0, case.adapters[n].clone())].into()).unwrap();
            ids[n] = pool.load(&n.to_string(), weights).unwrap();
        }
        let layer = FusedMoEWithLoRA::with_limits(0, case.weights.clone(), device, &pool, limits).unwrap();
        Self { pool, layer, ids }
    }

    fn of(device: &Device, case: &Case) -> Self {
        Self::new(device, case, 0..case.adapters.len(), Limits::default())
    }

    /// The output, which starts as NaN, with the case's adapters or with none.
    fn serve<X: Element, Y: Element>(&self, case: &Case, lora: bool) -> Result<Vec<Y>, LayerError> {
        let id = |slot: &i32| usize::try_from(*slot).ok().filter(|_| lora).map(|slot| self.ids[slot]);
        let tokens: Vec<_> = case.token_slots.iter().map(id).collect();
        let mut out = vec![Y::from_f32(f32::NAN); case.hidden.len()];
        let routing = Routing::Selected { topk_ids: &case.topk_ids, topk_weights: &case.topk_weights };
        self.layer.forward(&case.hidden_as::<X>(), routing, &TokenAdapters::from_ids(&tokens), &mut out)?;
        Ok(out)
    }
}

fn wide<T: Element>(values: &[T]) -> Vec<f64> {
    values.iter().map(|v| v.to_f32().into()).collect()
}

fn draw(rng: &mut Rng, dtype: DType) -> CaseSpec {
    let size = |rng: &mut Rng| 8 * [1 + rng.usize(0..12), 1 + rng.usize(0..40)][rng.usize(0..2)];
    let experts = 1 + rng.usize(0..10);
    let shape = LayerShape::new(experts, 1 + rng.usize(0..experts.min(4)), size(rng), size(rng)).unwrap();
    let tokens = [0, 1, 2, 7, 17, 33, 64, 129, 300][rng.usize(0..9)];
    let adapter = |rng: &mut Rng| {
        let rank = |rng: &mut Rng| [0, 1, 3, 8, 13, 16, 40, 64, 129][rng.usize(0..9)];
        let (gate, shared_gate_up_a) = (rank(rng), rng.u8(0..4) == 0);
        let up = if shared_gate_up_a { gate } else { rank(rng) };
        let (shared_outer, some_experts) = (rng.u8(0..4) == 0, rng.u8(0..4) == 0);
        AdapterSpec { ranks: [gate, up, rank(rng)], shared_gate_up_a, shared_outer, some_experts }
    };
    let activations = [Activation::Silu, Activation::Gelu, Activation::GeluTanh, Activation::GPT_OSS];
    let routings = [
        RoutingMix::Uniform,
        RoutingMix::Skewed,
        RoutingMix::AllOnOne,
        RoutingMix::Duplicates,
        RoutingMix::ForeignExperts,
    ];
    let mixes = [AdapterMix::AllBase, AdapterMix::Mixed, AdapterMix::RoundRobin, AdapterMix::Runs];
    let placements = [RouterWeightPlacement::Output, RouterWeightPlacement::Input];
    CaseSpec {
        activation: activations[rng.usize(0..4)],
        bias: rng.bool(),
        interleaved: rng.bool(),
        router_weight: placements[usize::from(rng.u8(0..4) == 0)],
        routed_scaling_factor: 0.5 + 2.0 * rng.f32(),
        routing: routings[rng.usize(0..5)],
        adapters: (0..rng.usize(0..6)).map(|_| adapter(rng)).collect(),
        mix: mixes[rng.usize(0..4)],
        ..CaseSpec::new(shape, tokens).dtype(dtype)
    }
}

/// The bounds of `docs/numerics.md`; expert outputs beyond 16 MiB are kept in 16 bits.
fn bound(case: &Case) -> f64 {
    let rows_f32 = case.topk_ids.len() * case.spec.shape.hidden_size * 4 <= 16 << 20;
    match case.spec.weight_dtype {
        DType::F16 => 5e-4,
        _ if rows_f32 => 3e-3,
        _ => 3.3e-3,
    }
}

/// How many values of two results differ in a bit.
fn differing<T: PartialEq>(a: &[T], b: &[T]) -> usize {
    assert_eq!(a.len(), b.len());
    a.iter().zip(b).filter(|(a, b)| a != b).count()
}

fn random_layers<T: Element>(device: &Device, seeds: std::ops::Range<u64>) {
    // Sanitizers are slow: `MOE_LORA_CASES` limits the number of cases.
    let most = std::env::var("MOE_LORA_CASES").ok().and_then(|n| n.parse().ok()).unwrap_or(usize::MAX);
    let mut broken = Vec::new();
    for seed in seeds.take(most) {
        let case = draw(&mut Rng::with_seed(seed), T::DTYPE).build(seed);
        let (server, count) = (Server::of(device, &case), case.adapters.len());
        let found: Vec<T> = server.serve::<T, T>(&case, true).unwrap();
        let base: Vec<T> = server.serve::<T, T>(&case, false).unwrap();
        let mut same = |what: &str, a: &[T], b: &[T]| {
            if differing(a, b) > 0 {
                broken.push(format!("seed {seed}, {what}: {} of {} values differ", differing(a, b), a.len()));
            }
        };
        same("twice", &found, &server.serve::<T, T>(&case, true).unwrap());
        let width = case.spec.shape.hidden_size;
        for t in (0..case.spec.tokens).filter(|&t| case.token_slots[t] < 0) {
            same("base token in a mixed batch", &found[t * width..][..width], &base[t * width..][..width]);
        }
        let turned = Server::new(device, &case, (0..count).rev(), Limits::default());
        same("slots in another order", &found, &turned.serve::<T, T>(&case, true).unwrap());
        let pieces = Server::new(device, &case, 0..count, Limits { max_tokens: 13, max_rank: 129 });
        same("in pieces", &found, &pieces.serve::<T, T>(&case, true).unwrap());

        let (truth, truth_base) = (case.truth().unwrap(), case.base_truth().unwrap());
        let (found, base) = (wide(&found), wide(&base));
        let rounding = GpuRounding { dtype: T::DTYPE, expert_outputs_f32: true };
        let twin = forward_rounded(&case.input_with(&case.table()), &rounding).unwrap();
        let near = is_near_twin(&found, &twin, width, if T::DTYPE == DType::F16 { 10 } else { 7 });
        let errors = [(&found, &truth), (&base, &truth_base)].map(|(found, truth)| relative_error(found, truth));
        // The stated bounds are means over many values, of layers of which adapters make up a quarter.
        let stated = found.len() >= 4096 && delta_share(&truth, &truth_base) >= 0.25;
        if !near || (stated && errors.iter().any(|e| *e > bound(&case))) {
            broken.push(format!("seed {seed}: near the twin: {near}, errors {errors:?} {:?}", case.spec));
        }
    }
    assert!(broken.is_empty(), "{}", broken.join("\n"));
}

#[test]
fn random_layers_are_right_and_keep_their_bits() {
    let Some(device) = device("random layers") else { return };
    random_layers::<bf16>(&device, 0..60);
    random_layers::<f16>(&device, 1000..1030);
}

fn stated_bounds<T: Element>(device: &Device) {
    // The last batch keeps the experts' outputs in 16 bits.
    for (hidden, tokens, bias) in [(512, 4, false), (512, 48, true), (512, 300, false), (2048, 1100, false)] {
        let shape = LayerShape::new(8, 2, hidden, 256).unwrap();
        let adapters = [16, 8, 64, 5, 512].map(AdapterSpec::rank).to_vec();
        let case = CaseSpec { adapters, bias, ..CaseSpec::new(shape, tokens).dtype(T::DTYPE) }.build(77);
        let server = Server::new(device, &case, 0..5, Limits { max_tokens: 1100, max_rank: 512 });
        let (found, base) = (
            wide::<T>(&server.serve::<T, T>(&case, true).unwrap()),
            wide(&server.serve::<T, T>(&case, false).unwrap()),
        );
        let (truth, truth_base) = (case.truth().unwrap(), case.base_truth().unwrap());
        assert!(delta_share(&truth, &truth_base) > 0.25);
        let (error, worst) = (relative_error(&found, &truth), worst_row_error(&found, &truth, hidden));
        let delta = delta_error(&found, &base, &truth, &truth_base);
        eprintln!("{} H {hidden} T {tokens}: {error:.2e} worst {worst:.2e} delta {delta:.2e}", T::DTYPE);
        assert!(error <= bound(&case) && worst <= 1e-2 && delta <= 2e-2, "{error:e} {worst:e} {delta:e}");
    }
}

#[test]
fn errors_stay_under_the_stated_bounds() {
    let Some(device) = device("stated bounds") else { return };
    stated_bounds::<bf16>(&device);
    stated_bounds::<f16>(&device);
}

/// f32 weights and hidden states are rounded to bf16 on the way in; an output of any format is rounded once.
#[test]
fn every_format_goes_in_and_comes_out() {
    let Some(device) = device("formats") else { return };
    let shape = LayerShape::new(8, 2, 256, 192).unwrap();
    let spec = CaseSpec { adapters: vec![AdapterSpec::rank(8); 3], ..CaseSpec::new(shape, 48) };
    let wide_case = spec.clone().build(5);
    let truth = wide_case.truth().unwrap();
    let found = wide(&Server::of(&device, &wide_case).serve::<f32, f32>(&wide_case, true).unwrap());
    let error = relative_error(&found, &truth);
    eprintln!("an f32 layer in bf16: {error:.2e}");
    assert!(error <= 1e-2 && error > 1e-4, "{error:e}");

    let case = spec.dtype(DType::Bf16).build(5);
    let server = Server::of(&device, &case);
    let out: Vec<f32> = server.serve::<bf16, f32>(&case, true).unwrap();
    assert_eq!(out, server.serve::<f32, f32>(&case, true).unwrap(), "bf16 values are the same in f32");
    let rounded: Vec<bf16> = server.serve::<bf16, bf16>(&case, true).unwrap();
    assert_eq!(rounded, out.iter().map(|&v| bf16::from_f32(v)).collect::<Vec<_>>());
    let rounded: Vec<f16> = server.serve::<bf16, f16>(&case, true).unwrap();
    assert_eq!(rounded, out.iter().map(|&v| f16::from_f32(v)).collect::<Vec<_>>());
}

/// Six adapters of rank 5, which take the bytes of rank 8, in a pool with room for three.
#[test]
fn evicted_and_replaced_adapters_are_never_anothers() {
    let Some(device) = device("eviction and replacement") else { return };
    let shape = LayerShape::new(6, 2, 256, 128).unwrap();
    let spec = CaseSpec { adapters: vec![AdapterSpec::rank(5); 6], ..CaseSpec::new(shape, 12).dtype(DType::Bf16) };
    let case = spec.build(1);
    let model = ModelShape { moe_layers: vec![2, 4], ..ModelShape::uniform(shape, 1, DType::Bf16) };
    let one = 3 * 6 * 8 * (256 + 128) * 2;
    let pool = AdapterPool::new(&device, &model, PoolConfig { bytes: 3 * one, ..Default::default() }).unwrap();
    let layer = FusedMoEWithLoRA::new(4, case.weights.clone(), &device, &pool).unwrap();
    let adapter = |n: usize| AdapterWeights::new(&model, [(4, case.adapters[n].clone())].into()).unwrap();
    let load = |n: usize| pool.load(&n.to_string(), adapter(n)).unwrap();
    let serve = |ids: &[Option<AdapterId>]| {
        let mut out = vec![f32::NAN; ids.len() * 256];
        let (topk_ids, topk_weights) = (&case.topk_ids[..2 * ids.len()], &case.topk_weights[..2 * ids.len()]);
        let routing = Routing::Selected { topk_ids, topk_weights };
        let hidden = &case.hidden_as::<bf16>()[..out.len()];
        layer.forward(hidden, routing, &TokenAdapters::from_ids(ids), &mut out).map(|()| wide(&out))
    };
    let check = |ids: &[Option<AdapterId>], slots: &[i32]| {
        let table = AdapterTable::new(case.adapters.iter().map(Some).collect());
        let mut input = case.input_with(&table);
        (input.hidden, input.token_slots) = (&case.hidden[..slots.len() * 256], slots);
        (input.topk_ids, input.topk_weights) =
            (&case.topk_ids[..2 * slots.len()], &case.topk_weights[..2 * slots.len()]);
        let error = relative_error(&serve(ids).unwrap(), &moe_lora_reference::forward(&input).unwrap());
        assert!(error <= 3e-3, "{slots:?}: {error:e}");
    };

    let first: Vec<_> = (0..3).map(|n| Some(load(n))).collect();
    assert_eq!(pool.snapshot().used_bytes, 3 * one);
    check(&[first[0], None, first[2], first[1], None], &[0, -1, 2, 1, -1]);
    let held = pool.lease(&TokenAdapters::from_ids(&first[2..])).unwrap();
    let second: Vec<_> = (3..5).map(|n| Some(load(n))).collect();
    assert!(pool.load("5", adapter(5)).is_ok(), "the least recently used that nobody leases goes");
    let second = [second[1], pool.find("5")];
    check(&[first[2], second[0], None, second[1]], &[2, 4, -1, 5]);
    assert!(serve(&[None, first[1]]).is_err(), "an evicted adapter must not be another one's weights");
    drop(held);
    pool.pin(second[0].unwrap()).unwrap();

    assert_eq!(pool.replace("5", adapter(0)).unwrap(), second[1].unwrap());
    check(&[second[1], None, second[0]], &[0, -1, 4]);
    let elsewhere = AdapterWeights::new(&model, [(2, case.adapters[0].clone())].into()).unwrap();
    let elsewhere = pool.load("elsewhere", elsewhere).unwrap();
    assert_eq!(serve(&[Some(elsewhere); 4]).unwrap(), serve(&[None; 4]).unwrap(), "a layer that it leaves alone");
    assert!(serve(&[]).unwrap().is_empty());
}

#[test]
fn what_does_not_fit_is_refused() {
    let Some(device) = device("refusals") else { return };
    let shape = LayerShape::new(4, 2, 24, 16).unwrap();
    let spec = CaseSpec { adapters: vec![AdapterSpec::rank(4)], ..CaseSpec::new(shape, 6).dtype(DType::Bf16) };
    let case = spec.build(1);
    let server = Server::of(&device, &case);
    for id in [4, -2, i32::MAX, i32::MIN] {
        let mut bad = case.clone();
        bad.topk_ids[5] = id;
        let error = server.serve::<f32, f32>(&bad, true).unwrap_err();
        let line = format!("topk_ids: found expert {id} for token 2 at place 1, expected -1 to 3");
        assert!(error.input().is_some() && error.to_string() == line, "{error}");
    }
    assert!(server.serve::<f32, f32>(&case, true).is_ok());

    let odd = LayerShape::new(4, 2, 20, 16).unwrap();
    let error =
        AdapterPool::new(&device, &ModelShape::uniform(odd, 1, DType::Bf16), PoolConfig::default()).unwrap_err();
    assert!(error.to_string().contains("hidden size 20 and intermediate size 16"), "{error}");
    let model = |dtype| ModelShape::uniform(shape, 1, dtype);
    let on = |device: &Device, dtype| AdapterPool::new(device, &model(dtype), PoolConfig::default()).unwrap();
    let layer = |pool: &AdapterPool, device: &Device| FusedMoEWithLoRA::new(0, case.weights.clone(), device, pool);
    let cpu = Device::cpu();
    let error = layer(&on(&cpu, DType::Bf16), &device).unwrap_err().to_string();
    assert_eq!(error, "found a pool on cpu, expected one on cuda:0");
    let error = layer(&server.pool, &cpu).unwrap_err().to_string();
    assert_eq!(error, "found a pool on cuda:0, expected one on cpu");
    assert!(layer(&on(&device, DType::F16), &device).unwrap_err().to_string().contains("a pool in f16"));
    let on_cpu = layer(&on(&cpu, DType::Bf16), &cpu).unwrap();
    assert!(on_cpu.sharing_workspace_with(&server.layer).is_err());

    let tokens = TokenAdapters::from_ids(&[Some(server.ids[0])]);
    let lease = server.pool.lease(&tokens).unwrap();
    assert!(lease.table(0).is_err() && lease.device_table(0).is_ok());
    let small = Limits { max_tokens: 8, max_rank: 3 };
    let narrow = FusedMoEWithLoRA::with_limits(0, case.weights.clone(), &device, &server.pool, small).unwrap();
    let routing = Routing::Selected { topk_ids: &[0, 1], topk_weights: &[0.5, 0.5] };
    let error = narrow.forward(&[0.0_f32; 24], routing, &tokens, &mut [0.0_f32; 24]).unwrap_err();
    assert_eq!(error.to_string(), "adapters: found rank 4, expected at most 3");
}

#[test]
fn layers_can_share_one_workspace_across_threads() {
    let Some(device) = device("a shared workspace") else { return };
    let shape = LayerShape::new(6, 2, 128, 64).unwrap();
    let case = |seed| {
        CaseSpec { adapters: vec![AdapterSpec::rank(8); 2], ..CaseSpec::new(shape, 12).dtype(DType::F16) }.build(seed)
    };
    let cases = [case(1), case(2)];
    let [one, mut two] = [0, 1].map(|n| Server::of(&device, &cases[n]));
    let want = [(&one, &cases[0]), (&two, &cases[1])].map(|(s, case)| s.serve::<f16, f16>(case, true).unwrap());
    two.layer = two.layer.sharing_workspace_with(&one.layer).unwrap();
    std::thread::scope(|scope| {
        for (server, case, want) in [(&one, &cases[0], &want[0]), (&two, &cases[1], &want[1])] {
            scope.spawn(move || (0..30).for_each(|_| assert_eq!(&server.serve::<f16, f16>(case, true).unwrap(), want)));
        }
    });
}
