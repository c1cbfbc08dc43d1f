//! Running a drawn case through the runner.
#![allow(
    dead_code,
    unreachable_pub,
    missing_docs,
    clippy::unwrap_used,
    reason = "each test file uses its part of this, and may panic"
)]

#[cfg(feature = "cuda")]
pub mod gpu;

use half::{bf16, f16};
use moe_lora_core::{AdapterTable, DType, Element};
use moe_lora_reference::metrics::{delta_error, delta_share, relative_error, worst_row_error};
use moe_lora_reference::random::Case;
use moe_lora_runner::{Batch, Limits, MoeRunner, RunnerError};

pub const F32_BOUND: f64 = 1e-5;
pub const F16_BOUND: f64 = 5e-4;
pub const BF16_BOUND: f64 = 3e-3;
pub const ROW_BOUND: f64 = 1e-2;
pub const DELTA_BOUND: f64 = 2e-2;

/// A runner for a case; its limits hold it in one piece.
pub fn runner(case: &Case) -> MoeRunner {
    let max_rank = case.table().max_rank().max(1);
    MoeRunner::new(&case.spec.shape, Limits { max_tokens: case.spec.tokens.max(1), max_rank }).unwrap()
}

/// The output in the case's own format, widened; it starts as NaN.
pub fn forward(runner: &mut MoeRunner, case: &Case, adapters: &AdapterTable<'_>) -> Result<Vec<f64>, RunnerError> {
    match case.spec.hidden_dtype {
        DType::F32 => typed::<f32>(runner, case, adapters),
        DType::F16 => typed::<f16>(runner, case, adapters),
        DType::Bf16 => typed::<bf16>(runner, case, adapters),
    }
}

fn typed<X: Element>(
    runner: &mut MoeRunner,
    case: &Case,
    adapters: &AdapterTable<'_>,
) -> Result<Vec<f64>, RunnerError> {
    let hidden = case.hidden_as::<X>();
    let mut out = vec![X::from_f32(f32::NAN); hidden.len()];
    let batch = Batch {
        hidden: &hidden,
        topk_ids: &case.topk_ids,
        topk_weights: &case.topk_weights,
        token_slots: &case.token_slots,
        adapters,
    };
    runner.forward(&case.weights, &batch, &mut out)?;
    Ok(out.iter().map(|v| v.to_f32().into()).collect())
}

/// [`forward`] with a fresh runner and the case's adapters.
pub fn run(case: &Case) -> Vec<f64> {
    forward(&mut runner(case), case, &case.table()).unwrap()
}

pub fn bound(dtype: DType) -> f64 {
    match dtype {
        DType::F32 => F32_BOUND,
        DType::F16 => F16_BOUND,
        DType::Bf16 => BF16_BOUND,
    }
}

/// Checks a case against the truth with the bounds of `docs/numerics.md`: the whole output, its worst row, and what the
/// adapters changed; on the GPU too, if there is one.
#[track_caller]
pub fn check(case: &Case) {
    let (found, truth) = (run(case), case.truth().unwrap());
    let error = relative_error(&found, &truth);
    let bound = bound(case.spec.weight_dtype).max(bound(case.spec.hidden_dtype));
    assert!(error <= bound, "relative error {error:.2e}, bound {bound:.1e}: {:?}", case.spec);
    let worst = worst_row_error(&found, &truth, case.spec.shape.hidden_size);
    assert!(worst <= ROW_BOUND, "worst row {worst:.2e}: {:?}", case.spec);
    let base_truth = case.base_truth().unwrap();
    if delta_share(&truth, &base_truth) > 0.25 {
        let base = forward(&mut runner(case), case, &AdapterTable::default()).unwrap();
        let delta = delta_error(&found, &base, &truth, &base_truth);
        assert!(delta <= DELTA_BOUND, "error of the adapters' change {delta:.2e}: {:?}", case.spec);
    }
    #[cfg(feature = "cuda")]
    assert_eq!(gpu::broken(case), None, "on the GPU: {:?}", case.spec);
}
