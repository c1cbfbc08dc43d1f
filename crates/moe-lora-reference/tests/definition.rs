//! The reference against values worked out by hand and against itself.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on may panic")]

use moe_lora_core::{
    Activation, AdapterLayer, AdapterTable, DType, ExpertBias, ExpertLora, ExpertWeights, LayerShape, LayerWeights,
    Lora, Matrix, RouterWeightPlacement,
};
use moe_lora_reference::metrics::{delta_share, relative_error};
use moe_lora_reference::random::{AdapterMix, AdapterSpec, CaseSpec, RoutingMix};
use moe_lora_reference::{LayerInput, RoundingPoint, forward, forward_rounded, to_dtype};

fn one(value: f32) -> Matrix {
    Matrix::from_vec(vec![value], 1, 1).unwrap()
}

fn scalar_layer(activation: Activation, bias: Option<ExpertBias>) -> LayerWeights {
    let shape = LayerShape::new(1, 1, 1, 1).unwrap();
    let expert = ExpertWeights { gate: one(2.0), up: one(3.0), down: one(5.0), bias };
    LayerWeights::new(shape, vec![expert], activation).unwrap()
}

fn run(weights: &LayerWeights, adapters: &AdapterTable<'_>, x: f64, w: f32) -> f64 {
    let input = LayerInput { hidden: &[x], weights, topk_ids: &[0], topk_weights: &[w], token_slots: &[0], adapters };
    forward(&input).unwrap()[0]
}

fn close(found: f64, want: f64) {
    assert!((found - want).abs() <= 1e-12 * want.abs(), "{found} is not {want}");
}

#[test]
fn one_expert_of_one_number_by_hand() {
    let sigmoid = |x: f64| 1.0 / (1.0 + (-x).exp());
    let none = AdapterTable::default();
    close(run(&scalar_layer(Activation::Silu, None), &none, 0.5, 0.25), 0.25 * 5.0 * (sigmoid(1.0) * 1.5));

    // gate + 0.5 * 4 * 0.5 x, down + 2 * 3 * (-1) h.
    let lora = ExpertLora {
        gate: Some(Lora::new(one(0.5), one(4.0), 0.5).unwrap()),
        up: None,
        down: Some(Lora::new(one(-1.0), one(3.0), 2.0).unwrap()),
    };
    let layer = AdapterLayer::new(&LayerShape::new(1, 1, 1, 1).unwrap(), vec![lora]).unwrap();
    let table = AdapterTable::new(vec![Some(&layer)]);
    close(run(&scalar_layer(Activation::Silu, None), &table, 0.5, 1.0), (5.0 - 6.0) * (1.5 * sigmoid(1.5) * 1.5));

    // gpt-oss: gate 20 is clamped to 7, up -30 to -7; biases join before the clamp and after the down projection.
    let bias = ExpertBias { gate: vec![10.0], up: vec![-45.0], down: vec![1.0] };
    let h = (-7.0 + 1.0) * 7.0 * sigmoid(f64::from(1.702_f32) * 7.0);
    close(run(&scalar_layer(Activation::GPT_OSS, Some(bias)), &none, 5.0, 0.5), 0.5 * (5.0 * h + 1.0));

    // Llama-4: the expert sees w x.
    let weights = scalar_layer(Activation::Silu, None).with_router_weight(RouterWeightPlacement::Input);
    close(run(&weights, &none, 0.5, 0.25), 5.0 * (0.25 * sigmoid(0.25) * 0.375));
    close(run(&weights.with_routed_scaling_factor(2.5), &none, 0.5, 0.25), 12.5 * (0.25 * sigmoid(0.25) * 0.375));

    // gelu(1) = 0.8413447460685429, its tanh form 0.8411919906082768.
    let gelu = |activation| run(&scalar_layer(activation, None), &none, 0.5, 1.0) / (5.0 * 1.5);
    assert!((gelu(Activation::Gelu) - 0.841_344_746_068_542_9).abs() < 1e-12);
    assert!((gelu(Activation::GeluTanh) - 0.841_191_990_608_276_8).abs() < 1e-12);
}

#[test]
fn adapters_make_up_a_quarter_of_every_random_output() {
    let shape = LayerShape::new(6, 2, 48, 40).unwrap();
    for spec in [AdapterSpec::rank(1), AdapterSpec::rank(16), AdapterSpec { ranks: [0, 0, 8], ..AdapterSpec::rank(8) }]
    {
        let case =
            CaseSpec { adapters: vec![spec; 2], mix: AdapterMix::RoundRobin, ..CaseSpec::new(shape, 20) }.build(3);
        let share = delta_share(&case.truth().unwrap(), &case.base_truth().unwrap());
        assert!(share > 0.25, "{spec:?}: {share}");
    }
}

#[test]
fn foreign_experts_add_nothing_and_wrong_ids_are_refused() {
    let shape = LayerShape::new(4, 2, 8, 6).unwrap();
    let mut case = CaseSpec { routing: RoutingMix::ForeignExperts, ..CaseSpec::new(shape, 30) }.build(1);
    let all = case.truth().unwrap();
    for (id, weight) in case.topk_ids.iter_mut().zip(&mut case.topk_weights) {
        if *id == -1 {
            (*id, *weight) = (0, 0.0);
        }
    }
    assert_eq!(relative_error(&case.truth().unwrap(), &all), 0.0);
    case.topk_ids[3] = 4;
    assert_eq!(case.truth().unwrap_err().to_string(), "topk_ids: found expert 4, expected -1 to 3");
    case.topk_ids.pop();
    assert_eq!(case.truth().unwrap_err().tensor.as_deref(), Some("topk_ids"));
}

#[test]
fn the_twin_rounds_where_it_says() {
    let shape = LayerShape::new(4, 2, 64, 48).unwrap();
    let case =
        CaseSpec { adapters: vec![AdapterSpec::rank(8)], ..CaseSpec::new(shape, 16).dtype(DType::Bf16) }.build(9);
    let (table, truth) = (case.table(), case.truth().unwrap());
    let at = |only: RoundingPoint| {
        let rounding = move |point, value| if point == only { to_dtype(value, DType::Bf16) } else { value };
        relative_error(&forward_rounded(&case.input_with(&table), &rounding).unwrap(), &truth)
    };
    let [output, h, shrink] = [RoundingPoint::Output, RoundingPoint::Intermediate, RoundingPoint::DownShrink].map(at);
    assert!((1e-3..2.5e-3).contains(&output), "{output}");
    assert!((1e-4..2.5e-3).contains(&h), "{h}");
    assert!((1e-5..h).contains(&shrink), "{shrink}");
}
