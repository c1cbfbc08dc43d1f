//! Twelve ways in which other systems fail in silence, one test each: here they are right, or an error.
//!
//! Line 12, tolerances that are widened until tests pass, is `docs/numerics.md`: the bounds below are its bounds.
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test that cannot go on may panic")]

use moe_lora::reference::metrics::{delta_error, relative_error};
use moe_lora::reference::random::{AdapterMix, AdapterSpec, Case, CaseSpec, RoutingMix};
use moe_lora::{
    Activation, AdapterId, AdapterPool, AdapterWeights, DType, Device, ExpertWeights, FusedMoEWithLoRA, LayerShape,
    LayerWeights, ModelShape, PeftAdapter, PoolConfig, Projection, Routing, TokenAdapters,
};

fn shape() -> LayerShape {
    LayerShape::new(4, 2, 32, 24).unwrap()
}

fn model() -> ModelShape {
    ModelShape::uniform(shape(), 1, DType::F32)
}

/// A layer over a pool of `bytes`.
fn server(weights: &LayerWeights, bytes: usize) -> (AdapterPool, FusedMoEWithLoRA) {
    let device = Device::cpu();
    let pool = AdapterPool::new(&device, &model(), PoolConfig { bytes, ..Default::default() }).unwrap();
    let layer = FusedMoEWithLoRA::new(0, weights.clone(), &device, &pool).unwrap();
    (pool, layer)
}

fn whole(case: &Case, n: usize) -> AdapterWeights {
    AdapterWeights::new(&model(), [(0, case.adapters[n].clone())].into()).unwrap()
}

/// Loads all adapters of a case and serves its batch; the output starts as NaN.
fn serve(case: &Case) -> Vec<f64> {
    let (pool, layer) = server(&case.weights, 1 << 30);
    let load = |n: usize| pool.load(&n.to_string(), whole(case, n)).unwrap();
    let ids: Vec<AdapterId> = (0..case.adapters.len()).map(load).collect();
    run(&layer, case, &ids)
}

fn run(layer: &FusedMoEWithLoRA, case: &Case, ids: &[AdapterId]) -> Vec<f64> {
    let tokens: Vec<_> = case.token_slots.iter().map(|&s| usize::try_from(s).ok().map(|s| ids[s])).collect();
    let hidden = case.hidden_as::<f32>();
    let mut out = vec![f32::NAN; hidden.len()];
    layer.forward(&hidden, routing(case), &TokenAdapters::from_ids(&tokens), &mut out).unwrap();
    out.into_iter().map(f64::from).collect()
}

fn routing(case: &Case) -> Routing<'_> {
    Routing::Selected { topk_ids: &case.topk_ids, topk_weights: &case.topk_weights }
}

fn spec(adapters: Vec<AdapterSpec>) -> CaseSpec {
    CaseSpec { adapters, ..CaseSpec::new(shape(), 20) }
}

#[track_caller]
fn right(case: &Case) {
    let error = relative_error(&serve(case), &case.truth().unwrap());
    assert!(error <= 1e-5, "{error:.1e}");
}

#[test]
fn line_01_mixed_ranks_and_former_tenants_rows() {
    right(&spec([1, 3, 8, 33, 64].map(AdapterSpec::rank).to_vec()).build(1));
    // A rank-3 adapter where a rank-32 one was, in a pool that holds only one of them.
    let case = spec(vec![AdapterSpec::rank(32), AdapterSpec::rank(3)]).build(2);
    let (pool, layer) = server(&case.weights, whole(&case, 0).size_bytes());
    let large = pool.load("large", whole(&case, 0)).unwrap();
    run(&layer, &case, &[large; 2]);
    pool.unload(large).unwrap();
    let small = pool.load("small", whole(&case, 1)).unwrap();
    let mut alone = case.clone();
    alone.token_slots.fill(1);
    assert!(relative_error(&run(&layer, &alone, &[small; 2]), &alone.truth().unwrap()) <= 1e-5);
}

#[test]
fn line_02_what_an_adapter_lacks_is_exactly_zero() {
    let partial = AdapterSpec { some_experts: true, ..AdapterSpec::rank(8) };
    let mut case = CaseSpec { mix: AdapterMix::RoundRobin, ..spec(vec![partial]) }.build(3);
    let mixed = serve(&case);
    case.token_slots.fill(-1);
    let base = serve(&case);
    let untouched = |t: &usize| case.topk_ids[2 * t..2 * t + 2].iter().all(|e| e % 2 == 1);
    let rows: Vec<usize> = (0..20).filter(untouched).collect();
    assert!(!rows.is_empty());
    rows.iter().for_each(|&t| assert_eq!(mixed[t * 32..][..32], base[t * 32..][..32]));
    assert_ne!(mixed, base);
}

#[test]
fn line_03_one_sided_adapters_work() {
    for ranks in [[8, 8, 0], [0, 0, 8], [8, 0, 0], [0, 8, 0]] {
        let one_sided = AdapterSpec { ranks, ..AdapterSpec::rank(8) };
        let case = CaseSpec { mix: AdapterMix::RoundRobin, ..spec(vec![one_sided]) }.build(4);
        right(&case);
        assert!(relative_error(&case.truth().unwrap(), &case.base_truth().unwrap()) > 0.1, "a change that is seen");
    }
}

#[test]
fn line_04_foreign_and_impossible_experts() {
    right(&CaseSpec { routing: RoutingMix::ForeignExperts, ..spec(vec![AdapterSpec::rank(4); 2]) }.build(5));
    for id in [4, -2, i32::MAX, i32::MIN] {
        let mut case = spec(Vec::new()).build(6);
        case.topk_ids[7] = id;
        let (_, layer) = server(&case.weights, 1 << 20);
        let mut out = vec![0.0_f32; 20 * 32];
        let tokens = TokenAdapters::base(20);
        let error = layer.forward(&case.hidden_as::<f32>(), routing(&case), &tokens, &mut out).unwrap_err();
        assert!(error.input().is_some() && error.to_string().contains(&id.to_string()), "{error}");
    }
}

#[test]
fn line_05_segments_in_any_order_and_no_stale_tails() {
    let case = CaseSpec { mix: AdapterMix::Runs, ..spec(vec![AdapterSpec::rank(4); 5]) }.build(7);
    let (pool, layer) = server(&case.weights, 1 << 30);
    // Loaded in another order than the batch names them; a smaller batch after a larger one.
    let mut ids: Vec<_> = (0..5).rev().map(|n| pool.load(&n.to_string(), whole(&case, n)).unwrap()).collect();
    ids.reverse();
    let large = run(&layer, &case, &ids);
    assert!(relative_error(&large, &case.truth().unwrap()) <= 1e-5);
    let mut small = case.clone();
    small.hidden.truncate(3 * 32);
    small.topk_ids.truncate(6);
    small.topk_weights.truncate(6);
    small.token_slots.truncate(3);
    assert_eq!(run(&layer, &small, &ids), large[..3 * 32]);
}

#[test]
fn line_06_clamp_and_biases_stay_with_lora() {
    let gpt_oss =
        CaseSpec { activation: Activation::GPT_OSS, bias: true, interleaved: true, ..spec(vec![AdapterSpec::rank(8)]) };
    let mut case = gpt_oss.build(8);
    // Large enough that many gates and ups reach the clamp at 7.
    case.hidden.iter_mut().for_each(|x| *x *= 8.0);
    right(&case);
    // The clamp and the biases decide this output, so losing them would be seen.
    let no_clamp = Activation::ClampedSwiglu { alpha: 1.702, limit: 1e6 };
    for loose in [CaseSpec { activation: no_clamp, ..case.spec.clone() }, CaseSpec { bias: false, ..case.spec.clone() }]
    {
        let mut other = case.clone();
        let experts = case
            .weights
            .experts()
            .iter()
            .map(|e| ExpertWeights { bias: if loose.bias { e.bias.clone() } else { None }, ..e.clone() });
        other.weights = LayerWeights::new(shape(), experts.collect(), loose.activation).unwrap();
        assert!(relative_error(&other.truth().unwrap(), &case.truth().unwrap()) > 1e-2);
    }
}

#[test]
fn line_07_the_input_is_never_written() {
    // `hidden` is a shared borrow and `out` an exclusive one: they cannot be the same memory, and hidden keeps its bits.
    let case = spec(vec![AdapterSpec::rank(4)]).build(9);
    let hidden = case.hidden_as::<f32>();
    serve(&case);
    assert_eq!(hidden, case.hidden_as::<f32>());
}

/// An adapter file on the down projection of all experts, in PEFT's `target_parameters` layout.
fn flat_adapter(config: &str) -> PeftAdapter {
    let (experts, rank) = (4, 2);
    let a: Vec<f32> = (0..rank * experts * 24).map(|i| (i as f32 * 0.37).sin()).collect();
    let b: Vec<f32> = (0..32 * rank * experts).map(|i| (i as f32 * 0.73).cos()).collect();
    let key = "base_model.model.model.layers.0.mlp.experts";
    let a_bytes = a.len() * 4;
    let header = format!(
        r#"{{"{key}.lora_A.weight":{{"dtype":"F32","shape":[{},24],"data_offsets":[0,{a_bytes}]}},
            "{key}.lora_B.weight":{{"dtype":"F32","shape":[32,{}],"data_offsets":[{a_bytes},{}]}}}}"#,
        rank * experts,
        rank * experts,
        a_bytes + b.len() * 4
    );
    let mut file = (header.len() as u64).to_le_bytes().to_vec();
    file.extend_from_slice(header.as_bytes());
    file.extend_from_slice(bytemuck::cast_slice(&a));
    file.extend_from_slice(bytemuck::cast_slice(&b));
    PeftAdapter::from_bytes(config.as_bytes(), file).unwrap()
}

#[test]
fn line_08_rslora_patterns_and_target_parameters() {
    let scale = |extra: &str| {
        let config = format!(
            r#"{{"peft_type":"LORA","r":2,"lora_alpha":6,"target_parameters":["mlp.experts.down_proj"]{extra}}}"#
        );
        let weights = flat_adapter(&config).resolve(&model()).unwrap();
        let down = weights.layers()[&0].experts()[3].get(Projection::Down).unwrap().clone();
        // A_e is rows 2e.. of A; B_e[o, r] = B[o, r * E + e].
        assert_eq!(down.a().get(1, 5), ((7 * 24 + 5) as f32 * 0.37).sin());
        assert_eq!(down.b().get(9, 1), ((9 * 8 + 4 + 3) as f32 * 0.73).cos());
        down.scale()
    };
    assert_eq!(scale(""), 3.0);
    assert_eq!(scale(r#","use_rslora":true"#), (6.0 / 2_f64.sqrt()) as f32);
    assert_eq!(scale(r#","alpha_pattern":{"mlp.experts.down_proj":10}"#), 5.0);
}

#[test]
fn line_09_everything_is_checked_before_anything_changes() {
    let case = spec(vec![AdapterSpec::rank(4)]).build(10);
    let (pool, _) = server(&case.weights, 1 << 20);
    let id = pool.load("good", whole(&case, 0)).unwrap();
    let before = pool.snapshot();
    let other =
        CaseSpec { adapters: vec![AdapterSpec::rank(4)], ..CaseSpec::new(LayerShape::new(4, 2, 32, 25).unwrap(), 1) };
    let wrong = ModelShape { layer: other.shape, ..model() };
    let wrong = AdapterWeights::new(&wrong, [(0, other.build(1).adapters[0].clone())].into()).unwrap();
    assert!(pool.load("bad", wrong.clone()).unwrap_err().input().is_some());
    assert!(pool.replace("good", wrong).unwrap_err().input().is_some());
    let after = pool.snapshot();
    assert_eq!((after.used_bytes, after.loads, pool.find("good")), (before.used_bytes, before.loads, Some(id)));
}

#[test]
fn line_10_more_adapters_than_fit() {
    let case = spec(vec![AdapterSpec::rank(4); 3]).build(11);
    let (pool, layer) = server(&case.weights, 2 * whole(&case, 0).size_bytes());
    let first = pool.load("first", whole(&case, 0)).unwrap();
    pool.pin(first).unwrap();
    let second = pool.load("second", whole(&case, 1)).unwrap();
    let third = pool.load("third", whole(&case, 2)).unwrap();
    assert!(pool.find("second").is_none(), "the one that is not pinned made room");
    let serve = |id| {
        let mut out = [0.0_f32; 32];
        let one = Routing::Selected { topk_ids: &case.topk_ids[..2], topk_weights: &case.topk_weights[..2] };
        layer.forward(&case.hidden_as::<f32>()[..32], one, &TokenAdapters::from_ids(&[Some(id)]), &mut out)
    };
    assert!(serve(first).is_ok() && serve(third).is_ok());
    assert!(serve(second).is_err(), "an error for that request alone");
    pool.pin(third).unwrap();
    assert!(pool.load("fourth", whole(&case, 1)).is_err(), "nothing may be evicted");
    assert!(serve(first).is_ok());
}

#[test]
fn line_11_swapped_gate_and_up_are_seen() {
    let case = CaseSpec { mix: AdapterMix::RoundRobin, ..spec(vec![AdapterSpec::rank(8)]) }.build(12);
    let (truth, base) = (case.truth().unwrap(), case.base_truth().unwrap());
    let mut base_only = case.clone();
    base_only.token_slots.fill(-1);
    let (out, out_base) = (serve(&case), serve(&base_only));
    assert!(delta_error(&out, &out_base, &truth, &base) <= 2e-2);
    let mut swapped = case.clone();
    let experts =
        case.weights.experts().iter().map(|e| ExpertWeights { gate: e.up.clone(), up: e.gate.clone(), ..e.clone() });
    swapped.weights = LayerWeights::new(shape(), experts.collect(), Activation::Silu).unwrap();
    assert!(relative_error(&serve(&swapped), &truth) > 0.1);
}
