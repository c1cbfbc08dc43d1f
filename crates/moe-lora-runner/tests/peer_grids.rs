//! The parameter grids of SGLang's and vLLM's own tests (fused MoE-LoRA kernel and runner), with what theirs lack: signed
//! data, mixed and odd ranks, base tokens, missing parts, and bounds that a missing adapter cannot pass. On the GPU too, if
//! `moe_lora_cuda::testing::gpu` finds one.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on may panic")]

mod support;

use moe_lora_core::{Activation, DType, LayerShape, RouterWeightPlacement};
use moe_lora_reference::random::{AdapterMix, AdapterSpec, CaseSpec, RoutingMix};
use support::{check, run};

fn adapters(count: usize, rank: usize) -> Vec<AdapterSpec> {
    vec![AdapterSpec::rank(rank); count]
}

/// SGLang `test_fused_moe_lora_kernel` and vLLM's base cases: E 64, 100 tokens; widths an eighth of theirs (1408, 2048), which
/// the CPU's f64 truth can follow.
#[test]
fn fused_kernel_base_grid() {
    for top_k in [6, 12] {
        let shape = LayerShape::new(64, top_k, 256, 176).unwrap();
        for (count, rank, dtype) in [
            (4, 16, DType::Bf16),
            (6, 32, DType::F16),
            (16, 64, DType::Bf16),
            (4, 64, DType::F32),
            (16, 16, DType::F16),
        ] {
            let spec = CaseSpec { adapters: adapters(count, rank), mix: AdapterMix::Runs, ..CaseSpec::new(shape, 100) };
            check(&spec.dtype(dtype).build(42));
        }
    }
}

/// vLLM `naive_block_assignment`: fewer pairs than experts times adapters, every token its own adapter.
#[test]
fn few_tokens_many_adapters() {
    for tokens in [0, 1, 2, 4, 8] {
        for top_k in [1, 2] {
            for (experts, count) in [(64, 4), (128, 8)] {
                let shape = LayerShape::new(experts, top_k, 128, 96).unwrap();
                let spec = CaseSpec {
                    adapters: adapters(count, if tokens % 2 == 0 { 16 } else { 32 }),
                    mix: AdapterMix::RoundRobin,
                    ..CaseSpec::new(shape, tokens).dtype(DType::Bf16)
                };
                check(&spec.build(tokens as u64));
            }
        }
    }
}

/// vLLM `large_rank_fallback` (R 128, 256), and 160 and 512 beside it.
#[test]
fn large_ranks() {
    let shape = LayerShape::new(4, 2, 256, 256).unwrap();
    for rank in [128, 160, 256, 512] {
        for dtype in [DType::Bf16, DType::F16] {
            check(&CaseSpec { adapters: adapters(2, rank), ..CaseSpec::new(shape, 8) }.dtype(dtype).build(rank as u64));
        }
    }
}

/// vLLM `small_rank` and `npid_path`.
#[test]
fn small_ranks() {
    for (experts, tokens, rank) in [(8, 16, 4), (64, 100, 8), (8, 64, 8), (8, 64, 64), (64, 16, 4)] {
        let shape = LayerShape::new(experts, 2, 256, 176).unwrap();
        check(&CaseSpec { adapters: adapters(4, rank), ..CaseSpec::new(shape, tokens) }.dtype(DType::Bf16).build(7));
    }
}

/// What no peer tests: ranks 0 to 128 in one batch, 0, 25 and 100 % base tokens, both places of the routing weight.
#[test]
fn mixed_ranks_with_base_tokens() {
    let shape = LayerShape::new(16, 4, 192, 160).unwrap();
    let ranks = [4, 8, 16, 24, 64, 128];
    for router_weight in [RouterWeightPlacement::Output, RouterWeightPlacement::Input] {
        for mix in [AdapterMix::RoundRobin, AdapterMix::Mixed, AdapterMix::AllBase] {
            let specs = ranks.iter().map(|&r| AdapterSpec::rank(r));
            let spec = CaseSpec {
                adapters: specs.chain([AdapterSpec { ranks: [0; 3], ..AdapterSpec::rank(1) }]).collect(),
                mix,
                router_weight,
                ..CaseSpec::new(shape, 64).dtype(DType::Bf16)
            };
            check(&spec.build(11));
        }
    }
}

/// vLLM `one_shot_early_exit` and `zero_grid`: nothing to add must leave the base output alone, bit for bit.
#[test]
fn nothing_to_add_changes_no_bit() {
    let shape = LayerShape::new(8, 4, 128, 96).unwrap();
    let spec = CaseSpec { mix: AdapterMix::RoundRobin, ..CaseSpec::new(shape, 32).dtype(DType::Bf16) };
    let base = run(&spec.clone().build(5));
    let empty = AdapterSpec { ranks: [0; 3], ..AdapterSpec::rank(1) };
    let mut case = spec.build(5);
    case.adapters = CaseSpec { adapters: vec![empty; 2], ..case.spec.clone() }.build(6).adapters;
    case.token_slots = (0..32).map(|t| t % 2).collect();
    assert_eq!(run(&case), base, "an adapter that changes nothing");
    case.token_slots = (0..32).map(|t| 100 + t).collect();
    assert_eq!(run(&case), base, "slots without an adapter");
}

/// SGLang `test_lora_moe_runner`: M {32, 64}, k {1, 2}, E {8, 20}, R {8, 16}, biases; with gate, up, adapters and experts
/// all different, in the plain and the gpt-oss form.
#[test]
fn runner_grid() {
    for (tokens, top_k, experts, rank) in [(32, 1, 8, 8), (32, 2, 20, 16), (64, 2, 8, 16), (64, 1, 20, 8)] {
        let shape = LayerShape::new(experts, top_k, 256, 128).unwrap();
        for (activation, bias, interleaved) in
            [(Activation::Silu, true, false), (Activation::GPT_OSS, true, true), (Activation::Gelu, false, true)]
        {
            let spec =
                CaseSpec { adapters: adapters(2, rank), activation, bias, interleaved, ..CaseSpec::new(shape, tokens) };
            check(&spec.clone().build(1));
            check(&spec.dtype(DType::Bf16).build(2));
        }
    }
}

/// Shared-outer, one-sided, partial adapters and shared gate/up A together in one batch.
#[test]
fn every_kind_of_adapter_in_one_batch() {
    let shape = LayerShape::new(12, 3, 160, 96).unwrap();
    let kinds = vec![
        AdapterSpec { shared_outer: true, ..AdapterSpec::rank(8) },
        AdapterSpec { ranks: [0, 0, 16], ..AdapterSpec::rank(1) },
        AdapterSpec { ranks: [5, 7, 0], ..AdapterSpec::rank(1) },
        AdapterSpec { ranks: [0, 9, 0], ..AdapterSpec::rank(1) },
        AdapterSpec { some_experts: true, ..AdapterSpec::rank(32) },
        AdapterSpec { shared_gate_up_a: true, ..AdapterSpec::rank(12) },
        AdapterSpec { shared_outer: true, shared_gate_up_a: true, ranks: [6, 6, 11], some_experts: false },
        AdapterSpec { shared_outer: true, some_experts: true, ..AdapterSpec::rank(4) },
    ];
    for routing in [
        RoutingMix::Uniform,
        RoutingMix::Skewed,
        RoutingMix::AllOnOne,
        RoutingMix::Duplicates,
        RoutingMix::ForeignExperts,
    ] {
        for dtype in [DType::F32, DType::F16, DType::Bf16] {
            let spec = CaseSpec { adapters: kinds.clone(), routing, ..CaseSpec::new(shape, 72).dtype(dtype) };
            check(&spec.build(3));
        }
    }
}

/// Widths that are no multiple of anything, and gpt-oss's 2880.
#[test]
fn odd_widths() {
    for (hidden, intermediate) in [(2880, 60), (60, 2880), (1, 1), (3, 130), (129, 3), (17, 19)] {
        let shape = LayerShape::new(4, 2, hidden, intermediate).unwrap();
        check(&CaseSpec { adapters: adapters(2, 3), ..CaseSpec::new(shape, 24) }.build(8));
    }
}
