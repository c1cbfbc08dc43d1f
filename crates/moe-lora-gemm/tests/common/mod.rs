//! Running drawn cases through the stages.
#![allow(dead_code, reason = "every test file uses its part")]

use moe_lora_core::{AdapterTable, DType, Element, LayerShape, RowMap, Segment};
use moe_lora_gemm::GemmError;
use moe_lora_gemm::cpu::{Kernel, LayerArgs, Workspace, combine, down, gate_up};
use moe_lora_reference::random::Case;

/// The rows of a batch, sorted by (expert, slot), by the plainest means.
pub(crate) fn row_map(topk_ids: &[i32], topk_weights: &[f32], slots: &[i32], top_k: usize) -> RowMap {
    let mut pairs: Vec<usize> = (0..topk_ids.len()).filter(|&p| topk_ids[p] >= 0).collect();
    pairs.sort_by_key(|&p| (topk_ids[p], slots[p / top_k]));
    let mut map = RowMap { num_tokens: slots.len(), top_k, pair_row: vec![-1; topk_ids.len()], ..Default::default() };
    for (row, pair) in pairs.into_iter().enumerate() {
        map.row_pair.push(pair as u32);
        map.row_weight.push(topk_weights[pair]);
        map.pair_row[pair] = row as i32;
        let (expert, slot) = (topk_ids[pair] as u32, slots[pair / top_k]);
        match map.segments.last_mut() {
            Some(s) if (s.expert, s.slot) == (expert, slot) => s.num_rows += 1,
            _ => map.segments.push(Segment { expert, slot, first_row: row as u32, num_rows: 1 }),
        }
    }
    map
}

pub(crate) fn case_rows(case: &Case) -> RowMap {
    row_map(&case.topk_ids, &case.topk_weights, &case.token_slots, case.spec.shape.top_k)
}

/// The three stages, on a workspace and an output full of NaN.
pub(crate) fn stages<X: Element, Y: Element>(args: &LayerArgs<'_, X>, kernel: Kernel) -> Result<Vec<Y>, GemmError> {
    let shape: &LayerShape = args.weights.shape();
    let rank = args.adapters.max_rank();
    let mut ws = Workspace::new(shape, args.rows.num_tokens, rank)?;
    ws.poison();
    let mut out = vec![Y::from_f32(f32::NAN); args.rows.num_tokens * shape.hidden_size];
    gate_up(args, kernel, &mut ws)?;
    down(args, kernel, &mut ws)?;
    combine(args, &mut ws, &mut out)?;
    Ok(out)
}

/// A case through the stages with the adapters of `table`, as f32.
pub(crate) fn run_with(case: &Case, table: &AdapterTable<'_>, kernel: Kernel) -> Vec<f32> {
    fn typed<X: Element>(case: &Case, adapters: &AdapterTable<'_>, kernel: Kernel) -> Vec<f32> {
        let (hidden, rows) = (case.hidden_as::<X>(), case_rows(case));
        let args = LayerArgs { hidden: &hidden, weights: &case.weights, rows: &rows, adapters };
        stages(&args, kernel).unwrap()
    }
    match case.spec.hidden_dtype {
        DType::F32 => typed::<f32>(case, table, kernel),
        DType::F16 => typed::<half::f16>(case, table, kernel),
        DType::Bf16 => typed::<half::bf16>(case, table, kernel),
    }
}

pub(crate) fn run(case: &Case, kernel: Kernel) -> Vec<f32> {
    run_with(case, &case.table(), kernel)
}

/// Every kernel that can run a case here.
pub(crate) fn kernels(case: &Case) -> Vec<Kernel> {
    let (weights, hidden) = (case.spec.weight_dtype, case.spec.hidden_dtype);
    Kernel::available().filter(|k| k.supports(weights, hidden)).collect()
}

/// The relative error that a kernel may make.
pub(crate) fn bound(kernel: Kernel) -> f64 {
    // Only the bf16 kernel rounds anything to less than f32.
    if kernel == Kernel::Avx512Bf16 { 3e-3 } else { 1e-5 }
}

pub(crate) fn wide(values: &[f32]) -> Vec<f64> {
    values.iter().map(|&v| v.into()).collect()
}

pub(crate) fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|v| v.to_bits()).collect()
}
