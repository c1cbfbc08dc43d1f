//! What a layer refuses, in one line each; and the silent failures of other systems that cannot happen here.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on may panic")]

mod support;

use moe_lora_core::{AdapterTable, DType, LayerShape};
use moe_lora_reference::random::{AdapterMix, AdapterSpec, Case, CaseSpec};
use moe_lora_runner::{Limits, MoeRunner};
use support::{forward, run, runner};

fn case() -> Case {
    let shape = LayerShape::new(4, 2, 24, 16).unwrap();
    CaseSpec { adapters: vec![AdapterSpec::rank(4); 2], ..CaseSpec::new(shape, 6) }.build(1)
}

fn refusal(case: &Case) -> String {
    forward(&mut runner(case), case, &case.table()).unwrap_err().to_string()
}

#[test]
fn expert_ids_outside_the_layer() {
    for id in [4, -2, i32::MAX, i32::MIN] {
        let mut case = case();
        case.topk_ids[5] = id;
        assert!(refusal(&case).contains(&id.to_string()), "{}", refusal(&case));
    }
}

#[test]
fn lengths_that_do_not_fit() {
    let mut short = case();
    short.topk_weights.pop();
    assert!(refusal(&short).contains("topk_weights"));
    let mut short = case();
    short.hidden.pop();
    assert!(refusal(&short).contains("hidden"));
}

#[test]
fn ranks_beyond_the_workspace() {
    let case = case();
    let limits = Limits { max_tokens: 6, max_rank: 3 };
    let error = forward(&mut MoeRunner::new(&case.spec.shape, limits).unwrap(), &case, &case.table()).unwrap_err();
    assert_eq!(error.to_string(), "adapters: found rank 4, expected at most 3");
}

#[test]
fn layers_of_another_shape() {
    let case = case();
    let other = LayerShape::new(4, 2, 24, 17).unwrap();
    let mut runner = MoeRunner::new(&other, Limits::default()).unwrap();
    assert!(forward(&mut runner, &case, &AdapterTable::default()).unwrap_err().to_string().contains("layer weights"));
    assert!(MoeRunner::new(&other, Limits { max_tokens: 0, max_rank: 1 }).is_err());
}

/// Line 2: what an adapter lacks is exactly nothing, not what a former tenant left.
#[test]
fn absent_experts_and_projections_add_exactly_nothing() {
    let shape = LayerShape::new(4, 1, 32, 24).unwrap();
    let partial = AdapterSpec { some_experts: true, ..AdapterSpec::rank(8) };
    let spec = CaseSpec {
        adapters: vec![partial],
        mix: AdapterMix::RoundRobin,
        ..CaseSpec::new(shape, 40).dtype(DType::Bf16)
    };
    let mut case = spec.build(2);
    // A former tenant of the same slot, with all experts, runs first in the same workspace.
    let mut runner = runner(&case);
    let mut tenant = case.clone();
    tenant.adapters = CaseSpec { adapters: vec![AdapterSpec::rank(8)], ..case.spec.clone() }.build(9).adapters;
    forward(&mut runner, &tenant, &tenant.table()).unwrap();
    let found = forward(&mut runner, &case, &case.table()).unwrap();
    case.token_slots.fill(-1);
    let base = run(&case);
    for t in (0..40).filter(|&t| case.topk_ids[t] % 2 == 1) {
        assert_eq!(found[t * 32..][..32], base[t * 32..][..32], "token {t} on an expert that the adapter leaves alone");
    }
    assert_ne!(found, base);
}

/// Line 11: with gate and up exchanged every output is far from the truth, so the bounds see it.
#[test]
fn swapped_gate_and_up_would_be_seen() {
    let case = case();
    let (found, truth) = (run(&case), case.truth().unwrap());
    let mut swapped = case.clone();
    let experts = case.weights.experts().iter().map(|e| moe_lora_core::ExpertWeights {
        gate: e.up.clone(),
        up: e.gate.clone(),
        down: e.down.clone(),
        bias: None,
    });
    swapped.weights =
        moe_lora_core::LayerWeights::new(case.spec.shape, experts.collect(), moe_lora_core::Activation::Silu).unwrap();
    let error = |found: &[f64]| moe_lora_reference::metrics::relative_error(found, &truth);
    assert!(error(&found) < 1e-5 && error(&run(&swapped)) > 0.1);
}
