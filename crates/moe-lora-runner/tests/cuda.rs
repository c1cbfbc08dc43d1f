//! Layers on a GPU: random ones against the truth and the rounding-aware twin, the peers' grids in full, same bits.
//!
//! Skipped aloud by `moe_lora_cuda::testing::gpu` where there is none. Sanitizers are slow: `MOE_LORA_CASES` limits the number of
//! random layers, and leaves the rest out.
#![cfg(feature = "cuda")]
#![allow(clippy::unwrap_used, reason = "a test that cannot go on may panic")]

mod support;

use moe_lora_core::{DType, LayerShape};
use moe_lora_reference::random::{AdapterMix, AdapterSpec, Case, CaseSpec};
use moe_lora_reference::strategies;
use proptest::prelude::*;
use support::gpu::{OnGpu, broken, device, limit};

fn cases() -> u32 {
    limit().map_or(150, |most| most as u32)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: cases(), ..ProptestConfig::default() })]

    #[test]
    fn random_bf16_layers_equal_the_truth(case in strategies::gpu_case(DType::Bf16)) {
        prop_assert_eq!(broken(&case), None);
    }

    #[test]
    fn random_f16_layers_equal_the_truth(case in strategies::gpu_case(DType::F16)) {
        prop_assert_eq!(broken(&case), None);
    }
}

/// The tokens `tokens` of a case.
fn part(case: &Case, tokens: std::ops::Range<usize>) -> Case {
    let (width, k) = (case.spec.shape.hidden_size, case.spec.shape.top_k);
    let mut part = case.clone();
    part.spec.tokens = tokens.len();
    part.hidden = case.hidden[tokens.start * width..tokens.end * width].to_vec();
    part.topk_ids = case.topk_ids[tokens.start * k..tokens.end * k].to_vec();
    part.topk_weights = case.topk_weights[tokens.start * k..tokens.end * k].to_vec();
    part.token_slots = case.token_slots[tokens].to_vec();
    part
}

#[test]
fn a_token_does_not_see_its_neighbours() {
    let Some(device) = device().filter(|_| limit().is_none()) else { return };
    for (shape, ranks) in
        [((2, 2, 512, 2880), &[16][..]), ((8, 2, 2048, 256), &[16, 64, 5]), ((4, 1, 264, 136), &[512, 8])]
    {
        let shape = LayerShape::new(shape.0, shape.1, shape.2, shape.3).unwrap();
        let adapters = ranks.iter().copied().map(AdapterSpec::rank).collect();
        let spec = CaseSpec { adapters, mix: AdapterMix::Runs, ..CaseSpec::new(shape, 300).dtype(DType::Bf16) };
        let case = spec.build(21);
        let on_gpu = OnGpu::new(device, &case);
        // Sizes choose the kernels: few tokens and many are not summed in the same order, nor are 1 and 12 of high ranks.
        let [few, many] = [12, 300].map(|piece| on_gpu.forward(device, &case, true, piece));
        for (piece, all) in [(10, &few), (150, &many)] {
            assert!(on_gpu.forward(device, &case, true, piece) == *all, "{shape:?}: in pieces of {piece}");
        }
        for (tokens, all) in [(5..17, &few), (281..293, &few), (70..170, &many)] {
            let alone = on_gpu.forward(device, &part(&case, tokens.clone()), true, 300);
            let width = shape.hidden_size;
            assert!(alone == all[tokens.start * width..tokens.end * width], "{shape:?}: {tokens:?} alone");
        }
    }
}

/// The same where there are so many pairs that Hopper shrinks them by segments.
#[test]
fn a_token_of_many_does_not_see_its_neighbours() {
    let Some(device) = device().filter(|_| limit().is_none()) else { return };
    let shape = LayerShape::new(8, 4, 256, 256).unwrap();
    let adapters = [16, 64, 5].map(AdapterSpec::rank).to_vec();
    let spec = CaseSpec { adapters, mix: AdapterMix::Runs, ..CaseSpec::new(shape, 5000).dtype(DType::Bf16) };
    let case = spec.build(22);
    let on_gpu = OnGpu::new(device, &case);
    let all = on_gpu.forward(device, &case, true, 5000);
    let tokens = 300..4700;
    let alone = on_gpu.forward(device, &part(&case, tokens.clone()), true, 5000);
    assert!(alone == all[tokens.start * shape.hidden_size..tokens.end * shape.hidden_size]);
}

fn adapters(count: usize, rank: usize) -> Vec<AdapterSpec> {
    vec![AdapterSpec::rank(rank); count]
}

#[track_caller]
fn check(spec: CaseSpec, seed: u64) {
    assert_eq!(broken(&spec.clone().build(seed)), None, "{spec:?}");
}

/// SGLang `test_fused_moe_lora_kernel` and vLLM's base cases, every combination at an eighth of their widths, which the f64
/// truth can follow, and one at their own.
#[test]
fn fused_kernel_base_grid() {
    if device().is_none() || limit().is_some() {
        return;
    }
    for top_k in [6, 12] {
        for (count, dtype) in [(4, DType::Bf16), (6, DType::F16), (16, DType::Bf16), (16, DType::F16)] {
            for rank in [16, 32, 64] {
                let shape = LayerShape::new(64, top_k, 256, 176).unwrap();
                let spec =
                    CaseSpec { adapters: adapters(count, rank), mix: AdapterMix::Runs, ..CaseSpec::new(shape, 100) };
                check(spec.dtype(dtype), 42);
            }
        }
    }
    let shape = LayerShape::new(8, 6, 2048, 1408).unwrap();
    let spec = CaseSpec { adapters: adapters(2, 64), mix: AdapterMix::Runs, ..CaseSpec::new(shape, 100) };
    check(spec.dtype(DType::Bf16), 42);
}

/// vLLM `naive_block_assignment`, whole: fewer pairs than experts times adapters, every token its own adapter.
#[test]
fn few_tokens_many_adapters() {
    if device().is_none() || limit().is_some() {
        return;
    }
    for (tokens, top_k) in [0, 1, 2, 4, 8].into_iter().flat_map(|tokens| [(tokens, 1), (tokens, 2)]) {
        for (experts, count) in [(64, 4), (64, 8), (128, 4), (128, 8)] {
            for (rank, dtype) in [(16, DType::Bf16), (32, DType::F16)] {
                let shape = LayerShape::new(experts, top_k, 128, 96).unwrap();
                let spec = CaseSpec {
                    adapters: adapters(count, rank),
                    mix: AdapterMix::RoundRobin,
                    ..CaseSpec::new(shape, tokens)
                };
                check(spec.dtype(dtype), tokens as u64);
            }
        }
    }
}

/// vLLM `large_rank_fallback` with 160 and 512 beside it, `small_rank` and `npid_path`, whole but for widths.
#[test]
fn large_and_small_ranks() {
    if device().is_none() || limit().is_some() {
        return;
    }
    for (rank, dtype) in [128, 160, 256, 512].into_iter().flat_map(|rank| [(rank, DType::Bf16), (rank, DType::F16)]) {
        let shape = LayerShape::new(4, 2, 256, 256).unwrap();
        check(CaseSpec { adapters: adapters(2, rank), ..CaseSpec::new(shape, 8) }.dtype(dtype), rank as u64);
    }
    for tokens in [16, 64, 100] {
        for (experts, dtype) in [(8, DType::Bf16), (8, DType::F16), (64, DType::Bf16), (64, DType::F16)] {
            for rank in [4, 8, 16, 32, 64] {
                let shape = LayerShape::new(experts, 2, 256, 176).unwrap();
                check(CaseSpec { adapters: adapters(4, rank), ..CaseSpec::new(shape, tokens) }.dtype(dtype), 7);
            }
        }
    }
}
