//! Every path against the f64 reference.
#![allow(clippy::unwrap_used, clippy::panic, reason = "helpers of tests")]

mod common;

use common::{bound, kernels, run, run_with, wide};
use half::bf16;
use moe_lora_core::{
    Activation, AdapterLayer, AdapterTable, DType, ExpertLora, LayerShape, Lora, Projection, RouterWeightPlacement,
};
use moe_lora_gemm::cpu::Kernel;
use moe_lora_reference::metrics::{delta_error, delta_share, relative_error, share_within_ulps, worst_row_error};
use moe_lora_reference::random::{AdapterMix, AdapterSpec, Case, CaseSpec, RoutingMix, matrix};
use moe_lora_reference::{RoundingPoint, forward_rounded, to_dtype};

const DTYPES: [DType; 3] = [DType::F32, DType::F16, DType::Bf16];

fn check(case: &Case) {
    let truth = case.truth().unwrap();
    let width = case.spec.shape.hidden_size;
    for kernel in kernels(case) {
        let found = wide(&run(case, kernel));
        let (error, worst) = (relative_error(&found, &truth), worst_row_error(&found, &truth, width));
        assert!(error <= bound(kernel), "{kernel}: {error:e} in {:?}", case.spec);
        assert!(worst <= 1e-2, "{kernel}: worst row {worst:e} in {:?}", case.spec);
    }
}

fn shape(experts: usize, top_k: usize, hidden: usize, intermediate: usize) -> LayerShape {
    LayerShape::new(experts, top_k, hidden, intermediate).unwrap()
}

/// Ranks from 1 to more than a vector, mixed in one batch; one-sided and partial adapters among them.
fn adapters() -> Vec<AdapterSpec> {
    vec![
        AdapterSpec::rank(1),
        AdapterSpec::rank(16),
        AdapterSpec { shared_gate_up_a: true, ..AdapterSpec::rank(8) },
        AdapterSpec { ranks: [3, 33, 128], ..AdapterSpec::rank(0) },
        AdapterSpec { ranks: [4, 0, 0], ..AdapterSpec::rank(0) },
        AdapterSpec { ranks: [0, 5, 0], ..AdapterSpec::rank(0) },
        AdapterSpec { ranks: [0, 0, 6], ..AdapterSpec::rank(0) },
        AdapterSpec { some_experts: true, ..AdapterSpec::rank(7) },
        AdapterSpec { shared_outer: true, ..AdapterSpec::rank(9) },
        AdapterSpec { shared_outer: true, shared_gate_up_a: true, ..AdapterSpec::rank(12) },
    ]
}

#[test]
fn all_formats_and_activations() {
    let activations = [Activation::Silu, Activation::Gelu, Activation::GeluTanh, Activation::GPT_OSS];
    for (i, weight_dtype) in DTYPES.into_iter().enumerate() {
        for (j, hidden_dtype) in DTYPES.into_iter().enumerate() {
            for (n, activation) in activations.into_iter().enumerate() {
                let base = CaseSpec::new(shape(6, 2, 72, 40), 24);
                let spec = CaseSpec { weight_dtype, hidden_dtype, activation, adapters: adapters(), ..base };
                check(&spec.build((i * 12 + j * 4 + n) as u64));
            }
        }
    }
}

#[test]
fn biases_views_placement_and_scaling() {
    for dtype in DTYPES {
        for (i, router_weight) in [RouterWeightPlacement::Output, RouterWeightPlacement::Input].into_iter().enumerate()
        {
            for interleaved in [false, true] {
                let base = CaseSpec::new(shape(4, 2, 64, 48), 20).dtype(dtype);
                let spec = CaseSpec {
                    bias: true,
                    interleaved,
                    router_weight,
                    routed_scaling_factor: 2.5,
                    activation: Activation::GPT_OSS,
                    adapters: adapters(),
                    ..base
                };
                check(&spec.build(100 + i as u64));
            }
        }
    }
}

#[test]
fn all_kinds_of_routing() {
    use RoutingMix::{AllOnOne, Duplicates, ForeignExperts, Skewed, Uniform};
    for dtype in DTYPES {
        for routing in [Uniform, Skewed, AllOnOne, Duplicates, ForeignExperts] {
            for mix in [AdapterMix::Mixed, AdapterMix::RoundRobin, AdapterMix::Runs, AdapterMix::AllBase] {
                let base = CaseSpec::new(shape(8, 3, 40, 24), 33).dtype(dtype);
                check(&CaseSpec { routing, mix, adapters: adapters(), ..base }.build(200));
            }
        }
    }
}

#[test]
fn bands_and_tiles_of_all_lengths() {
    // All tokens on one expert: 1 to 6 rows fill one tile, 65 and 130 rows need several bands.
    for tokens in [1, 2, 3, 4, 5, 6, 7, 13, 64, 65, 130] {
        let base = CaseSpec::new(shape(2, 1, 40, 36), tokens).dtype(DType::Bf16);
        check(&CaseSpec { routing: RoutingMix::AllOnOne, adapters: adapters(), ..base }.build(tokens as u64));
    }
}

#[test]
fn odd_sizes() {
    for (hidden, intermediate) in [(3, 1), (1, 3), (5, 7), (31, 33), (33, 31), (65, 17), (130, 5)] {
        for dtype in DTYPES {
            let base = CaseSpec::new(shape(3, 2, hidden, intermediate), 9).dtype(dtype);
            let spec = CaseSpec { adapters: adapters(), interleaved: true, bias: true, ..base };
            let case = spec.build(300);
            if hidden > 3 || dtype != DType::Bf16 {
                check(&case);
            } else {
                // So few numbers do not average their rounding: compare with the twin that rounds where we do.
                twin(&case);
            }
        }
    }
}

/// The bf16 kernel against the reference that rounds `h` as the documentation says.
fn twin(case: &Case) {
    let table = case.table();
    let round = |point, x| if point == RoundingPoint::Intermediate { to_dtype(x, DType::Bf16) } else { x };
    let twin = forward_rounded(&case.input_with(&table), &round).unwrap();
    for kernel in kernels(case).into_iter().filter(|&k| k == Kernel::Avx512Bf16) {
        let found = wide(&run(case, kernel));
        let share = share_within_ulps(&found, &twin, case.spec.shape.hidden_size, 7, 2.0);
        assert!(share >= 0.999, "{share} within 2 ulp");
        assert!(relative_error(&found, &twin) < 1.5e-3, "{:e}", relative_error(&found, &twin));
    }
}

#[test]
fn the_bf16_kernel_rounds_where_it_says() {
    let base = CaseSpec::new(shape(8, 2, 256, 128), 40).dtype(DType::Bf16);
    twin(&CaseSpec { adapters: adapters(), ..base }.build(400));
}

#[test]
fn ranks_from_1_to_512_in_one_batch() {
    let ranks = [1, 3, 16, 17, 64, 128, 512];
    for dtype in DTYPES {
        let base = CaseSpec::new(shape(3, 2, 48, 40), 21).dtype(dtype);
        let adapters = ranks.map(AdapterSpec::rank).to_vec();
        check(&CaseSpec { adapters, mix: AdapterMix::RoundRobin, ..base }.build(500));
    }
}

#[test]
fn every_token_its_own_adapter() {
    let base = CaseSpec::new(shape(4, 2, 40, 24), 24).dtype(DType::Bf16);
    let adapters = (1..=24).map(AdapterSpec::rank).collect();
    check(&CaseSpec { adapters, mix: AdapterMix::RoundRobin, ..base }.build(600));
}

/// Gate A, up A and down B each shared by all experts or not, and gate and up with one A or two.
#[test]
fn all_kinds_of_sharing() {
    for bits in 0..16 {
        let [gate, up, down, fused] = std::array::from_fn(|i| bits >> i & 1 == 1);
        for router_weight in [RouterWeightPlacement::Output, RouterWeightPlacement::Input] {
            let shape = shape(4, 2, 40, 24);
            let dtype = DType::Bf16;
            let base = CaseSpec::new(shape, 20).dtype(dtype);
            let spec = CaseSpec { adapters: vec![AdapterSpec::rank(5), AdapterSpec::rank(20)], router_weight, ..base };
            let mut case = spec.build(700);
            let mut rng = fastrand::Rng::with_seed(bits as u64);
            case.adapters[1] = {
                let mut draw = |rows, cols| matrix(&mut rng, dtype, rows, cols, 0.2);
                let shared = [draw(20, 40), draw(20, 40), draw(40, 20)];
                let mut expert = |e: usize| {
                    let gate_a = if gate { shared[0].clone() } else { draw(20, 40) };
                    // Sharing that differs from expert to expert must work as well.
                    let fused = fused || (up && e == 0);
                    let up_a = if up { shared[1].clone() } else { draw(20, 40) };
                    let (gate_a, up_a) = match (fused, up) {
                        (true, true) if !gate => (up_a.clone(), up_a),
                        (true, _) => (gate_a.clone(), gate_a),
                        (false, _) => (gate_a, up_a),
                    };
                    let down_b = if down { shared[2].clone() } else { draw(40, 20) };
                    let lora = |a, b, scale| Some(Lora::new(a, b, scale).unwrap());
                    ExpertLora {
                        gate: lora(gate_a, draw(24, 20), 0.5 + e as f32),
                        up: lora(up_a, draw(24, 20), 1.5 - e as f32),
                        down: lora(draw(20, 24), down_b, 0.75 + e as f32),
                    }
                };
                AdapterLayer::new(&shape, (0..4).map(&mut expert).collect()).unwrap()
            };
            assert_eq!(case.adapters[1].shares_outer(Projection::Down), down);
            check(&case);
        }
    }
}

#[test]
fn the_delta_alone_is_right() {
    for dtype in DTYPES {
        let base = CaseSpec::new(shape(8, 2, 128, 96), 32).dtype(dtype);
        let spec = CaseSpec {
            adapters: vec![AdapterSpec::rank(16), AdapterSpec::rank(64)],
            mix: AdapterMix::RoundRobin,
            ..base
        };
        let case = spec.build(800);
        let (truth, truth_base) = (case.truth().unwrap(), case.base_truth().unwrap());
        assert!(delta_share(&truth, &truth_base) >= 0.25);
        for kernel in kernels(&case) {
            let found = wide(&run(&case, kernel));
            let found_base = wide(&run_with(&case, &AdapterTable::default(), kernel));
            let error = delta_error(&found, &found_base, &truth, &truth_base);
            assert!(error <= 2e-2, "{kernel}: {error:e}");
        }
    }
}

#[test]
fn outputs_in_every_format_are_the_rounded_f32() {
    use moe_lora_gemm::cpu::LayerArgs;
    let base = CaseSpec::new(shape(4, 2, 40, 24), 8).dtype(DType::Bf16);
    let case = CaseSpec { adapters: adapters(), ..base }.build(900);
    let (table, rows, hidden) = (case.table(), common::case_rows(&case), case.hidden_as::<bf16>());
    let args = LayerArgs { hidden: &hidden, weights: &case.weights, rows: &rows, adapters: &table };
    for kernel in kernels(&case) {
        let single: Vec<f32> = common::stages(&args, kernel).unwrap();
        let half: Vec<bf16> = common::stages(&args, kernel).unwrap();
        assert_eq!(half, single.iter().map(|&x| bf16::from_f32(x)).collect::<Vec<_>>());
    }
}
