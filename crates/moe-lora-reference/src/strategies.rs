//! Strategies that draw whole cases for proptest: shapes, routings and adapter mixes, small enough to shrink well.

use crate::random::{AdapterMix, AdapterSpec, Case, CaseSpec, RoutingMix};
use moe_lora_core::{Activation, DType, LayerShape, RouterWeightPlacement};
use proptest::prelude::*;

/// Layers of up to 9 experts and sizes up to 96, most of them no multiple of anything.
pub fn layer_shape() -> impl Strategy<Value = LayerShape> {
    let size = || prop_oneof![1_usize..20, 20_usize..97, Just(32), Just(64)];
    (1_usize..10, size(), size()).prop_flat_map(|(experts, hidden, intermediate)| {
        (1..=experts.min(4))
            .prop_filter_map("a valid shape", move |top_k| LayerShape::new(experts, top_k, hidden, intermediate).ok())
    })
}

/// Adapters of ranks 1 to 128, one-sided, partial, shared or plain.
pub fn adapter_spec() -> impl Strategy<Value = AdapterSpec> {
    let rank = || prop_oneof![3 => 1_usize..20, 1 => Just(0), 1 => 20_usize..129];
    (rank(), rank(), rank(), any::<bool>(), any::<bool>(), any::<bool>()).prop_map(
        |(gate, up, down, shared_gate_up_a, shared_outer, some_experts)| {
            let up = if shared_gate_up_a { gate } else { up };
            AdapterSpec { ranks: [gate, up, down], shared_gate_up_a, shared_outer, some_experts }
        },
    )
}

/// Every activation.
pub fn activation() -> impl Strategy<Value = Activation> {
    prop_oneof![Just(Activation::Silu), Just(Activation::Gelu), Just(Activation::GeluTanh), Just(Activation::GPT_OSS),]
}

/// Every storage format.
pub fn dtype() -> impl Strategy<Value = DType> {
    prop_oneof![Just(DType::F32), Just(DType::F16), Just(DType::Bf16)]
}

/// Every way to choose experts.
pub fn routing_mix() -> impl Strategy<Value = RoutingMix> {
    prop_oneof![
        Just(RoutingMix::Uniform),
        Just(RoutingMix::Skewed),
        Just(RoutingMix::AllOnOne),
        Just(RoutingMix::Duplicates),
        Just(RoutingMix::ForeignExperts),
    ]
}

/// Every way to choose adapters.
pub fn adapter_mix() -> impl Strategy<Value = AdapterMix> {
    prop_oneof![
        Just(AdapterMix::AllBase),
        Just(AdapterMix::Mixed),
        Just(AdapterMix::RoundRobin),
        Just(AdapterMix::Runs),
    ]
}

/// Layers of up to 9 experts and sizes that GPUs take: multiples of 8 up to 400.
pub fn gpu_layer_shape() -> impl Strategy<Value = LayerShape> {
    let size = || prop_oneof![(1_usize..12).prop_map(|n| 8 * n), (1_usize..51).prop_map(|n| 8 * n)];
    (1_usize..10, size(), size()).prop_flat_map(|(experts, hidden, intermediate)| {
        (1..=experts.min(4))
            .prop_filter_map("a valid shape", move |top_k| LayerShape::new(experts, top_k, hidden, intermediate).ok())
    })
}

/// Everything at once, with weights and hidden states in `dtype`.
pub fn case(dtype: DType) -> impl Strategy<Value = Case> {
    case_of(dtype, layer_shape(), 40)
}

/// [`case`] for GPUs, of up to 299 tokens.
pub fn gpu_case(dtype: DType) -> impl Strategy<Value = Case> {
    case_of(dtype, gpu_layer_shape(), 300)
}

fn case_of(dtype: DType, shape: impl Strategy<Value = LayerShape>, tokens: usize) -> impl Strategy<Value = Case> {
    let placement = prop_oneof![Just(RouterWeightPlacement::Output), Just(RouterWeightPlacement::Input)];
    let layer = (shape, activation(), any::<bool>(), any::<bool>(), placement, 0.25_f32..3.0);
    let batch = (0..tokens, routing_mix(), proptest::collection::vec(adapter_spec(), 0..6), adapter_mix());
    (layer, batch, any::<u64>()).prop_map(move |(layer, batch, seed)| {
        let (shape, activation, bias, interleaved, router_weight, routed_scaling_factor) = layer;
        let (tokens, routing, adapters, mix) = batch;
        CaseSpec {
            activation,
            bias,
            interleaved,
            router_weight,
            routed_scaling_factor,
            routing,
            adapters,
            mix,
            ..CaseSpec::new(shape, tokens).dtype(dtype)
        }
        .build(seed)
    })
}
