//! Same inputs, same bits: whatever else is in the batch, in whatever order, on however many threads.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on may panic")]

mod support;

use moe_lora_core::{AdapterTable, DType};
use moe_lora_reference::random::{AdapterSpec, Case, CaseSpec};
use moe_lora_reference::strategies;
use moe_lora_runner::{Kernel, Limits, MoeRunner};
use proptest::prelude::*;
use support::{forward, run, runner};

fn bits(values: &[f64]) -> Vec<u64> {
    values.iter().map(|v| v.to_bits()).collect()
}

/// A case of one token of `case`.
fn token(case: &Case, t: usize) -> Case {
    let (width, k) = (case.spec.shape.hidden_size, case.spec.shape.top_k);
    let mut one = case.clone();
    one.spec.tokens = 1;
    one.hidden = case.hidden[t * width..][..width].to_vec();
    one.topk_ids = case.topk_ids[t * k..][..k].to_vec();
    one.topk_weights = case.topk_weights[t * k..][..k].to_vec();
    one.token_slots = vec![case.token_slots[t]];
    one
}

fn on_threads(threads: usize, case: &Case) -> Vec<f64> {
    rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap().install(|| run(case))
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 60, ..ProptestConfig::default() })]

    #[test]
    fn a_token_does_not_see_its_neighbours(case in strategies::dtype().prop_flat_map(strategies::case)) {
        let all = run(&case);
        for (t, row) in all.chunks(case.spec.shape.hidden_size).enumerate() {
            prop_assert_eq!(bits(row), bits(&run(&token(&case, t))), "token {}", t);
        }
    }

    #[test]
    fn base_rows_of_a_mixed_batch_equal_a_base_only_run(case in strategies::dtype().prop_flat_map(strategies::case)) {
        let mixed = run(&case);
        let base = forward(&mut runner(&case), &case, &AdapterTable::default()).unwrap();
        let width = case.spec.shape.hidden_size;
        for t in (0..case.spec.tokens).filter(|&t| case.token_slots[t] == -1) {
            prop_assert_eq!(bits(&mixed[t * width..][..width]), bits(&base[t * width..][..width]));
        }
    }

    #[test]
    fn one_thread_equals_two(case in strategies::dtype().prop_flat_map(strategies::case)) {
        prop_assert_eq!(bits(&on_threads(1, &case)), bits(&on_threads(2, &case)));
    }

    #[test]
    fn slots_in_another_order_change_nothing(case in strategies::dtype().prop_flat_map(strategies::case)) {
        let last = case.adapters.len() as i32 - 1;
        let mut turned = case.clone();
        turned.adapters.reverse();
        turned.token_slots.iter_mut().filter(|s| **s >= 0).for_each(|s| *s = last - *s);
        prop_assert_eq!(bits(&run(&case)), bits(&run(&turned)));
    }

    #[test]
    fn pieces_equal_the_whole(case in strategies::dtype().prop_flat_map(strategies::case), piece in 1_usize..9) {
        let limits = Limits { max_tokens: piece, max_rank: case.table().max_rank().max(1) };
        let mut pieces = MoeRunner::new(&case.spec.shape, limits).unwrap();
        prop_assert_eq!(bits(&run(&case)), bits(&forward(&mut pieces, &case, &case.table()).unwrap()));
    }
}

#[test]
fn a_used_runner_equals_a_fresh_one() {
    let shape = moe_lora_core::LayerShape::new(6, 2, 40, 24).unwrap();
    let limits = Limits { max_tokens: 64, max_rank: 64 };
    let mut used = MoeRunner::new(&shape, limits).unwrap();
    for seed in 0..20 {
        let spec = CaseSpec {
            adapters: vec![AdapterSpec::rank(1 + seed as usize), AdapterSpec::rank(3)],
            ..CaseSpec::new(shape, 3 * seed as usize).dtype(DType::Bf16)
        };
        let case = spec.build(seed);
        let again = forward(&mut used, &case, &case.table()).unwrap();
        assert_eq!(bits(&again), bits(&run(&case)), "what an earlier batch left behind was read");
    }
}

#[test]
fn every_kernel_of_this_processor_is_right() {
    let shape = moe_lora_core::LayerShape::new(5, 2, 72, 56).unwrap();
    for dtype in [DType::F32, DType::F16, DType::Bf16] {
        let case = CaseSpec {
            adapters: vec![AdapterSpec::rank(5), AdapterSpec::rank(16)],
            bias: true,
            ..CaseSpec::new(shape, 33).dtype(dtype)
        }
        .build(4);
        let truth = case.truth().unwrap();
        for kernel in Kernel::available().filter(|k| k.supports(dtype, dtype)) {
            let mut forced = runner(&case).with_kernel(kernel).unwrap();
            let found = forward(&mut forced, &case, &case.table()).unwrap();
            let error = moe_lora_reference::metrics::relative_error(&found, &truth);
            assert!(error <= support::bound(dtype), "{kernel} in {dtype}: {error:.2e}");
        }
    }
}
