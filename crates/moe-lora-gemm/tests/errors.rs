//! Every argument that does not fit is refused, by name and without a panic.
#![allow(clippy::unwrap_used, clippy::panic, reason = "helpers of tests")]

mod common;

use moe_lora_core::{AdapterLayer, AdapterTable, DType, ExpertLora, LayerShape, Lora, Matrix, RowMap, Segment};
use moe_lora_gemm::GemmError;
use moe_lora_gemm::cpu::{Kernel, LayerArgs, Workspace, combine, down, gate_up};
use moe_lora_reference::random::{AdapterSpec, Case, CaseSpec};

fn case() -> Case {
    let base = CaseSpec::new(LayerShape::new(4, 2, 16, 8).unwrap(), 6);
    CaseSpec { adapters: vec![AdapterSpec::rank(4)], ..base }.build(1)
}

fn first_stage(case: &Case, hidden: &[f32], rows: &RowMap, adapters: &AdapterTable<'_>) -> Result<(), GemmError> {
    let mut ws = Workspace::new(&case.spec.shape, 6, 4)?;
    gate_up(&LayerArgs { hidden, weights: &case.weights, rows, adapters }, Kernel::Portable, &mut ws)
}

/// The tensor that is to blame.
fn blamed(result: Result<(), GemmError>) -> String {
    match result.unwrap_err() {
        GemmError::Input(error) => error.tensor.unwrap(),
        other => panic!("{other}"),
    }
}

#[test]
fn broken_row_maps_are_refused() {
    let case = case();
    let (hidden, good, table) = (case.hidden_as::<f32>(), common::case_rows(&case), case.table());
    assert_eq!(first_stage(&case, &hidden, &good, &table), Ok(()));
    let changed = |change: &dyn Fn(&mut RowMap)| {
        let mut rows = good.clone();
        change(&mut rows);
        blamed(first_stage(&case, &hidden, &rows, &table))
    };
    assert_eq!(changed(&|r| r.num_tokens = 7), "batch");
    assert_eq!(changed(&|r| r.num_tokens = 5), "pair_row");
    assert_eq!(changed(&|r| r.top_k = 0), "pair_row");
    assert_eq!(changed(&|r| r.top_k = usize::MAX), "pair_row");
    assert_eq!(changed(&|r| r.row_pair.push(0)), "batch");
    assert_eq!(changed(&|r| r.row_pair[0] = u32::MAX), "row_pair");
    assert_eq!(changed(&|r| r.pair_row[0] = 1000), "row_pair");
    assert_eq!(changed(&|r| r.pair_row[0] = -2), "row_pair");
    assert_eq!(changed(&|r| r.row_weight.truncate(11)), "row_weight");
    assert_eq!(changed(&|r| r.segments[0].first_row = 1), "segments");
    assert_eq!(changed(&|r| r.segments[0].num_rows = u32::MAX), "segments");
    assert_eq!(changed(&|r| r.segments[0].num_rows = 0), "segments");
    assert_eq!(changed(&|r| r.segments.truncate(1)), "segments");
    assert_eq!(changed(&|r| r.segments.last_mut().unwrap().expert = 4), "segments");
    assert_eq!(changed(&|r| r.segments.swap(0, 1)), "segments");
    // A token that has an adapter in one expert and none in the other.
    let mut rows = common::row_map(&[0, 1], &[0.5; 2], &[0], 2);
    rows.segments[1].slot = -1;
    assert_eq!(blamed(first_stage(&case, &hidden[..16], &rows, &table)), "token 0");
}

#[test]
fn wrong_lengths_are_refused() {
    let case = case();
    let (mut hidden, rows, table) = (case.hidden_as::<f32>(), common::case_rows(&case), case.table());
    let mut ws = Workspace::new(&case.spec.shape, 6, 4).unwrap();
    let args = LayerArgs { hidden: &hidden, weights: &case.weights, rows: &rows, adapters: &table };
    gate_up(&args, Kernel::Portable, &mut ws).unwrap();
    down(&args, Kernel::Portable, &mut ws).unwrap();
    assert_eq!(blamed(combine(&args, &mut ws, &mut [0.0_f32; 95])), "out");
    hidden.pop();
    assert_eq!(blamed(first_stage(&case, &hidden, &rows, &table)), "hidden");
    let other = LayerShape::new(4, 2, 16, 9).unwrap();
    let args = LayerArgs { hidden: &case.hidden_as::<f32>(), weights: &case.weights, rows: &rows, adapters: &table };
    let mut ws = Workspace::new(&other, 6, 4).unwrap();
    assert_eq!(blamed(gate_up(&args, Kernel::Portable, &mut ws)), "workspace");
}

#[test]
fn adapters_that_do_not_fit_are_refused() {
    let case = case();
    let (hidden, rows) = (case.hidden_as::<f32>(), common::case_rows(&case));
    let refused = |layer: &AdapterLayer| {
        let table = AdapterTable::new(vec![Some(layer)]);
        blamed(first_stage(&case, &hidden, &rows, &table))
    };
    let drawn = |shape, spec: AdapterSpec, dtype| {
        CaseSpec { adapters: vec![spec], ..CaseSpec::new(shape, 1).dtype(dtype) }.build(2).adapters.remove(0)
    };
    let shape = case.spec.shape;
    assert!(refused(&drawn(shape, AdapterSpec::rank(5), DType::F32)).starts_with("adapter slot 0"), "rank");
    assert!(refused(&drawn(shape, AdapterSpec::rank(4), DType::Bf16)).starts_with("adapter slot 0"), "format");
    let wider = LayerShape::new(4, 2, 17, 8).unwrap();
    assert!(refused(&drawn(wider, AdapterSpec::rank(4), DType::F32)).starts_with("adapter slot 0"), "size");
    let fewer = LayerShape::new(2, 2, 16, 8).unwrap();
    assert_eq!(refused(&drawn(fewer, AdapterSpec::rank(4), DType::F32)), "adapter slot 0", "experts");
}

#[test]
fn stages_out_of_order_are_refused() {
    let case = case();
    let (hidden, rows, table) = (case.hidden_as::<f32>(), common::case_rows(&case), case.table());
    let args = LayerArgs { hidden: &hidden, weights: &case.weights, rows: &rows, adapters: &table };
    let mut ws = Workspace::new(&case.spec.shape, 6, 4).unwrap();
    let mut out = vec![0_f32; hidden.len()];
    assert!(matches!(down(&args, Kernel::Portable, &mut ws), Err(GemmError::Order { stage: "down", .. })));
    gate_up(&args, Kernel::Portable, &mut ws).unwrap();
    assert!(matches!(combine(&args, &mut ws, &mut out), Err(GemmError::Order { needs: "down", .. })));
    if let Some(other) = Kernel::available().find(|&k| k != Kernel::Portable && k != Kernel::Avx512Bf16) {
        assert!(matches!(down(&args, other, &mut ws), Err(GemmError::Kernel { .. })));
    }
    down(&args, Kernel::Portable, &mut ws).unwrap();
    let empty = RowMap { top_k: 2, ..RowMap::default() };
    let nothing = LayerArgs { hidden: &[] as &[f32], rows: &empty, ..args };
    assert!(matches!(combine(&nothing, &mut ws, &mut [0_f32; 0]), Err(GemmError::Order { .. })), "another batch");
    combine(&args, &mut ws, &mut out).unwrap();
}

#[test]
fn kernels_refuse_what_they_do_not_compute() {
    let case = case();
    let (hidden, rows, table) = (case.hidden_as::<f32>(), common::case_rows(&case), case.table());
    let args = LayerArgs { hidden: &hidden, weights: &case.weights, rows: &rows, adapters: &table };
    let mut ws = Workspace::new(&case.spec.shape, 6, 4).unwrap();
    let error = gate_up(&args, Kernel::Avx512Bf16, &mut ws).unwrap_err();
    assert_eq!(error.to_string(), "the avx512-bf16 kernel cannot run: it needs bf16 weights and bf16 activations");
    assert!(Kernel::available().any(|k| k == Kernel::Portable));
    assert_ne!(Kernel::best(DType::Bf16, DType::F32), Kernel::Avx512Bf16);
}

#[test]
fn empty_batches_and_dropped_tokens() {
    let case = case();
    let table = case.table();
    let mut ws = Workspace::new(&case.spec.shape, 6, 4).unwrap();
    // No token at all.
    for empty in [RowMap::default(), RowMap { top_k: 2, ..RowMap::default() }] {
        let args = LayerArgs { hidden: &[] as &[f32], weights: &case.weights, rows: &empty, adapters: &table };
        gate_up(&args, Kernel::Portable, &mut ws).unwrap();
        down(&args, Kernel::Portable, &mut ws).unwrap();
        combine(&args, &mut ws, &mut [0_f32; 0]).unwrap();
    }
    // Tokens without a row become zero.
    let rows = common::row_map(&[-1, -1, -1, 3], &[0.5; 4], &[0, 0], 2);
    assert_eq!(rows.segments, [Segment { expert: 3, slot: 0, first_row: 0, num_rows: 1 }]);
    let hidden = case.hidden_as::<f32>();
    let args = LayerArgs { hidden: &hidden[..32], weights: &case.weights, rows: &rows, adapters: &table };
    let out: Vec<f32> = common::stages(&args, Kernel::Portable).unwrap();
    assert!(out[..16].iter().all(|x| x.to_bits() == 0) && out[16..].iter().all(|&x| x != 0.0 && x.is_finite()));
}

#[test]
fn an_adapter_of_nothing_is_the_base_model() {
    let case = case();
    let (hidden, rows) = (case.hidden_as::<f32>(), common::case_rows(&case));
    let nothing = AdapterLayer::new(&case.spec.shape, vec![ExpertLora::default(); 4]).unwrap();
    let run = |table: &AdapterTable<'_>| {
        let args = LayerArgs { hidden: &hidden, weights: &case.weights, rows: &rows, adapters: table };
        common::stages::<f32, f32>(&args, Kernel::Portable).unwrap()
    };
    let base = run(&AdapterTable::default());
    assert_eq!(run(&AdapterTable::new(vec![Some(&nothing)])), base);
    // B of zeros adds nothing either.
    let zero = |out, rank, inner| {
        let (a, b) = (vec![1_f32; rank * inner], vec![0_f32; out * rank]);
        Lora::new(Matrix::from_vec(a, rank, inner).unwrap(), Matrix::from_vec(b, out, rank).unwrap(), 1.0).unwrap()
    };
    let expert = ExpertLora { gate: Some(zero(8, 2, 16)), up: None, down: Some(zero(16, 1, 8)) };
    let zeros = AdapterLayer::new(&case.spec.shape, vec![expert; 4]).unwrap();
    assert_eq!(run(&AdapterTable::new(vec![Some(&zeros)])), base);
}

#[test]
fn workspaces_that_cannot_exist_are_refused() {
    let shape = LayerShape::new(1 << 20, 1 << 20, 1 << 20, 1 << 20).unwrap();
    assert_eq!(Workspace::new(&shape, usize::MAX, 1).unwrap_err(), GemmError::OutOfMemory { bytes: usize::MAX });
    assert!(matches!(Workspace::new(&shape, 1 << 10, 1), Err(GemmError::OutOfMemory { .. })));
    let shape = LayerShape::new(64, 8, 2048, 1024).unwrap();
    let bytes = Workspace::new(&shape, 256, 16).unwrap().size_bytes();
    assert!(bytes == Workspace::bytes_for(&shape, 256, 16) && bytes < 64 << 20);
}
