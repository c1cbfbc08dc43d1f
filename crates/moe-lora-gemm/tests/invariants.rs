//! The bits of a token depend on nothing but the token.
#![allow(clippy::unwrap_used, clippy::panic, reason = "helpers of tests")]

mod common;

use common::{bits, case_rows, kernels, run, run_with};
use moe_lora_core::{AdapterTable, DType, LayerShape};
use moe_lora_gemm::cpu::{LayerArgs, Workspace, combine, down, gate_up};
use moe_lora_reference::random::{AdapterMix, AdapterSpec, Case, CaseSpec, RoutingMix};

const FORMATS: [(DType, DType); 4] =
    [(DType::Bf16, DType::Bf16), (DType::Bf16, DType::F32), (DType::F16, DType::F16), (DType::F32, DType::F32)];

fn cases(tokens: usize, mix: AdapterMix) -> impl Iterator<Item = Case> {
    FORMATS.into_iter().map(move |(weight_dtype, hidden_dtype)| {
        let shape = LayerShape::new(5, 2, 75, 45).unwrap();
        let adapters = vec![
            AdapterSpec::rank(4),
            AdapterSpec::rank(17),
            AdapterSpec { shared_outer: true, ..AdapterSpec::rank(6) },
        ];
        let base = CaseSpec::new(shape, tokens);
        CaseSpec { weight_dtype, hidden_dtype, adapters, mix, routing: RoutingMix::Skewed, bias: true, ..base }.build(1)
    })
}

/// The tokens of a case that `keep` chooses.
fn select(case: &Case, keep: impl Fn(usize) -> bool) -> Case {
    let (h, k) = (case.spec.shape.hidden_size, case.spec.shape.top_k);
    let kept: Vec<usize> = (0..case.spec.tokens).filter(|&t| keep(t)).collect();
    let mut small = case.clone();
    small.spec.tokens = kept.len();
    small.hidden = kept.iter().flat_map(|&t| case.hidden[t * h..][..h].to_vec()).collect();
    small.topk_ids = kept.iter().flat_map(|&t| case.topk_ids[t * k..][..k].to_vec()).collect();
    small.topk_weights = kept.iter().flat_map(|&t| case.topk_weights[t * k..][..k].to_vec()).collect();
    small.token_slots = kept.iter().map(|&t| case.token_slots[t]).collect();
    small
}

fn rows_of(case: &Case, out: &[f32], keep: impl Fn(usize) -> bool) -> Vec<u32> {
    let rows = out.chunks(case.spec.shape.hidden_size).enumerate().filter(|(t, _)| keep(*t));
    rows.flat_map(|(_, row)| bits(row)).collect()
}

#[test]
fn base_rows_of_a_mixed_batch_have_the_bits_of_a_base_only_run() {
    for case in cases(90, AdapterMix::Mixed) {
        let is_base = |t: usize| case.token_slots[t] == -1;
        assert!((0..90).any(is_base) && !(0..90).all(is_base));
        for kernel in kernels(&case) {
            let (mixed, base) = (run(&case, kernel), run_with(&case, &AdapterTable::default(), kernel));
            assert_eq!(rows_of(&case, &mixed, is_base), rows_of(&case, &base, is_base), "{kernel}");
            assert_ne!(bits(&mixed), bits(&base));
        }
    }
}

#[test]
fn a_token_does_not_depend_on_its_neighbours() {
    for case in cases(300, AdapterMix::Mixed) {
        for kernel in kernels(&case) {
            let all = run(&case, kernel);
            for (step, first) in [(300, 0), (300, 211), (7, 3), (2, 1)] {
                let keep = |t: usize| t % step == first;
                let few = run(&select(&case, keep), kernel);
                assert_eq!(bits(&few), rows_of(&case, &all, keep), "{kernel}, tokens {first} + n {step}");
            }
        }
    }
}

#[test]
fn threads_do_not_change_bits() {
    let pool = |n| rayon::ThreadPoolBuilder::new().num_threads(n).build().unwrap();
    let pools = [pool(1), pool(2), pool(5)];
    for case in cases(70, AdapterMix::Runs) {
        for kernel in kernels(&case) {
            let [one, two, five] = pools.each_ref().map(|p| bits(&p.install(|| run(&case, kernel))));
            assert!(one == two && one == five, "{kernel}");
        }
    }
}

#[test]
fn a_slot_and_what_others_hold_do_not_change_bits() {
    for case in cases(40, AdapterMix::RoundRobin) {
        let mut moved = case.clone();
        moved.adapters.insert(0, moved.adapters[1].clone());
        moved.token_slots.iter_mut().for_each(|s| *s += 1);
        for kernel in kernels(&case) {
            assert_eq!(bits(&run(&case, kernel)), bits(&run(&moved, kernel)), "{kernel}");
        }
    }
}

#[test]
fn a_used_workspace_leaves_no_trace() {
    let [large, small] = [120, 3].map(|tokens| cases(tokens, AdapterMix::RoundRobin).next().unwrap());
    for kernel in kernels(&large) {
        let shape = large.spec.shape;
        let mut ws = Workspace::new(&shape, 120, 32).unwrap();
        for case in [&small, &large, &small, &large] {
            let (rows, table) = (case_rows(case), case.table());
            let hidden = case.hidden_as::<half::bf16>();
            let args = LayerArgs { hidden: &hidden, weights: &case.weights, rows: &rows, adapters: &table };
            let mut out = vec![f32::NAN; hidden.len()];
            gate_up(&args, kernel, &mut ws).unwrap();
            down(&args, kernel, &mut ws).unwrap();
            combine(&args, &mut ws, &mut out).unwrap();
            assert_eq!(bits(&out), bits(&run(case, kernel)), "{kernel}");
        }
    }
}
