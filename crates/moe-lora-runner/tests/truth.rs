//! Random whole layers against the f64 truth, in every format, and against the rounding-aware twin.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on may panic")]

mod support;

use moe_lora_core::DType;
use moe_lora_reference::metrics::{is_near_twin, relative_error};
use moe_lora_reference::random::Case;
use moe_lora_reference::{RoundingPoint, forward_rounded, strategies, to_dtype};
use moe_lora_runner::{Kernel, Plan};
use proptest::prelude::*;
use support::{bound, run};

/// The reference, rounded where `moe-lora-gemm` documents that it rounds.
fn twin(case: &Case) -> Vec<f64> {
    let kernel = Plan::choose(case.spec.weight_dtype, case.spec.hidden_dtype).kernel;
    let out = case.spec.hidden_dtype;
    let rounding = move |point, value| match point {
        RoundingPoint::Intermediate if kernel == Kernel::Avx512Bf16 => to_dtype(value, DType::Bf16),
        RoundingPoint::Output => to_dtype(value, out),
        _ => value,
    };
    forward_rounded(&case.input_with(&case.table()), &rounding).unwrap()
}

fn near(case: &Case, mantissa_bits: i32) -> Result<(), TestCaseError> {
    let (found, twin) = (run(case), twin(case));
    let width = case.spec.shape.hidden_size;
    prop_assert!(is_near_twin(&found, &twin, width, mantissa_bits), "far from the twin");
    // Sums of a few numbers can cancel, which no relative bound survives; 512 values average it out.
    if found.len() >= 512 && width >= 16 && case.spec.shape.intermediate_size >= 16 {
        let (error, bound) = (relative_error(&found, &case.truth().unwrap()), bound(case.spec.hidden_dtype));
        prop_assert!(error <= bound, "relative error {error:.2e}, bound {bound:.1e}");
    }
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, ..ProptestConfig::default() })]

    #[test]
    fn f32_layers_equal_the_truth(case in strategies::case(DType::F32)) {
        // 16 bits short of f32's own precision: what is left after sums that cancel.
        near(&case, 16)?;
    }

    #[test]
    fn bf16_layers_equal_the_truth(case in strategies::case(DType::Bf16)) {
        near(&case, 7)?;
    }

    #[test]
    fn f16_layers_equal_the_truth(case in strategies::case(DType::F16)) {
        near(&case, 10)?;
    }

    #[test]
    fn f32_hidden_states_stay_f32_on_narrow_weights(
        case in strategies::case(DType::F32),
        weights in prop_oneof![Just(DType::Bf16), Just(DType::F16)],
    ) {
        let mut spec = case.spec.clone();
        spec.weight_dtype = weights;
        near(&spec.build(1), 16)?;
    }
}
