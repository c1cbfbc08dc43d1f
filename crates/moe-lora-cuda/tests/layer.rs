//! Whole layers on the GPU against the f64 truth.
#![allow(clippy::unwrap_used, clippy::print_stderr, reason = "tests may fail loudly and speak")]

mod support;

use fastrand::Rng;
use half::{bf16, f16};
use moe_lora_core::{Activation, DType, Element, LayerShape, RouterWeightPlacement};
use moe_lora_cuda::{Gpu, GpuError, Stream, testing};
use moe_lora_reference::metrics::{delta_error, delta_share, is_near_twin, relative_error, worst_row_error};
use moe_lora_reference::random::{AdapterMix, AdapterSpec, Case, CaseSpec, RoutingMix};
use moe_lora_reference::{GpuRounding, forward_rounded};
use support::{Batch, Layer, Path};

/// All kernels, with expert outputs in f32 and in 16 bits where there are any.
const PATHS: [(Path, bool); 6] = [
    (Path::Portable, true),
    (Path::Portable, false),
    (Path::Prefill, true),
    (Path::Prefill, false),
    (Path::Decode, true),
    (Path::Layer, true),
];

fn batch_of<T: Element>(gpu: &Gpu, stream: &Stream, layer: &Layer, case: &Case) -> Result<Batch, GpuError> {
    let batch = Batch::new(gpu, stream, &layer.sizes, case.token_slots.len())?;
    let hidden = case.hidden_as::<T>();
    let active = vec![1; layer.sizes.slots];
    let words = bytemuck::cast_slice::<T, u16>(&hidden);
    batch.set(stream, words, &case.topk_ids, &case.topk_weights, &case.token_slots, &active)?;
    Ok(batch)
}

fn output<T: Element>(stream: &Stream, batch: &Batch, layer: &Layer) -> Result<Vec<T>, GpuError> {
    batch.read::<T>(stream, batch.at.out, batch.tokens * layer.sizes.hidden)
}

fn forward<T: Element>(
    gpu: &Gpu,
    stream: &Stream,
    layer: &Layer,
    batch: &Batch,
    rows_f32: bool,
    lora: bool,
) -> Result<Vec<T>, GpuError> {
    batch.poison(stream)?;
    layer.launch(gpu, stream, batch, rows_f32, lora)?;
    output(stream, batch, layer)
}

fn wide<T: Element>(values: &[T]) -> Vec<f64> {
    values.iter().map(|v| v.to_f32().into()).collect()
}

fn draw(rng: &mut Rng, dtype: DType) -> CaseSpec {
    let size = |rng: &mut Rng| 8 * [1 + rng.usize(0..12), 1 + rng.usize(0..40), 8 * rng.usize(1..6)][rng.usize(0..3)];
    let experts = 1 + rng.usize(0..10);
    let shape = LayerShape::new(experts, 1 + rng.usize(0..experts.min(4)), size(rng), size(rng)).unwrap();
    let tokens = [1, 2, 7, 8, 9, 16, 17, 33, 63, 64, 65, 129, 200, 260][rng.usize(0..14)];
    let adapter = |rng: &mut Rng| {
        let rank = |rng: &mut Rng| [0, 1, 3, 8, 13, 16, 24, 40, 64, 129][rng.usize(0..10)];
        let (gate, shared_gate_up_a) = (rank(rng), rng.u8(0..4) == 0);
        let up = if shared_gate_up_a { gate } else { rank(rng) };
        let (shared_outer, some_experts) = (rng.u8(0..4) == 0, rng.u8(0..4) == 0);
        AdapterSpec { ranks: [gate, up, rank(rng)], shared_gate_up_a, shared_outer, some_experts }
    };
    let adapters = (0..rng.usize(0..6)).map(|_| adapter(rng)).collect();
    let activations = [Activation::Silu, Activation::Gelu, Activation::GeluTanh, Activation::GPT_OSS];
    let routings = [
        RoutingMix::Uniform,
        RoutingMix::Skewed,
        RoutingMix::AllOnOne,
        RoutingMix::Duplicates,
        RoutingMix::ForeignExperts,
    ];
    let mixes = [AdapterMix::AllBase, AdapterMix::Mixed, AdapterMix::RoundRobin, AdapterMix::Runs];
    let placements = [RouterWeightPlacement::Output, RouterWeightPlacement::Input];
    CaseSpec {
        activation: activations[rng.usize(0..4)],
        bias: rng.bool(),
        interleaved: rng.bool(),
        router_weight: placements[usize::from(rng.u8(0..4) == 0)],
        routed_scaling_factor: 0.5 + 2.0 * rng.f32(),
        routing: routings[rng.usize(0..5)],
        adapters,
        mix: mixes[rng.usize(0..4)],
        ..CaseSpec::new(shape, tokens).dtype(dtype)
    }
}

/// Error bounds of spec section 5: rows kept in f32, rows rounded, for the format.
fn bound(dtype: DType, rows_f32: bool) -> f64 {
    match (dtype, rows_f32) {
        (DType::F16, _) => 5e-4,
        (_, true) => 3e-3,
        (_, false) => 3.3e-3,
    }
}

fn check_random<T: Element>(gpu: &Gpu, stream: &Stream, seeds: std::ops::Range<u64>) -> Result<(), GpuError> {
    // Sanitizers are slow: `MOE_LORA_CASES` limits the number of cases.
    let most = std::env::var("MOE_LORA_CASES").ok().and_then(|n| n.parse().ok()).unwrap_or(usize::MAX);
    let mut broken = Vec::new();
    for seed in seeds.take(most) {
        let spec = draw(&mut Rng::with_seed(seed), T::DTYPE);
        let case = spec.clone().build(seed);
        let mut layer = Layer::from_case::<T>(gpu, stream, &case)?;
        let batch = batch_of::<T>(gpu, stream, &layer, &case)?;
        let (truth, truth_base) = (case.truth().unwrap(), case.base_truth().unwrap());
        for (path, rows_f32) in PATHS {
            if !layer.take(gpu, batch.tokens, path) {
                continue;
            }
            let found = forward::<T>(gpu, stream, &layer, &batch, rows_f32, true)?;
            let again = forward::<T>(gpu, stream, &layer, &batch, rows_f32, true)?;
            assert!(found == again, "seed {seed}: not the same bits twice");
            let base = forward::<T>(gpu, stream, &layer, &batch, rows_f32, false)?;
            let rows = found.chunks(layer.sizes.hidden).zip(base.chunks(layer.sizes.hidden));
            for (token, (with, without)) in rows.enumerate().filter(|(t, _)| case.token_slots[*t] < 0) {
                assert!(with == without, "seed {seed}: base token {token} differs in a mixed batch");
            }
            let (found, base) = (wide(&found), wide(&base));
            let mantissa_bits = if T::DTYPE == DType::F16 { 10 } else { 7 };
            let rounding = GpuRounding { dtype: T::DTYPE, expert_outputs_f32: rows_f32 };
            let twin = forward_rounded(&case.input_with(&case.table()), &rounding).unwrap();
            let near = is_near_twin(&found, &twin, layer.sizes.hidden, mantissa_bits);
            let (error, base_error) = (relative_error(&found, &truth), relative_error(&base, &truth_base));
            let share = delta_share(&truth, &truth_base);
            let what = format!(
                "seed {seed}, {path:?}, rows_f32 {rows_f32}: {error:.2e}, base {base_error:.2e}, share {share:.2}, {} values",
                found.len()
            );
            if !near {
                broken.push(format!("far from the twin: {what} {spec:?}"));
            }
            // The stated bounds are means over many values, of layers of which adapters make up a quarter.
            let bound = bound(T::DTYPE, rows_f32);
            if found.len() >= 4096 && (base_error > bound || share >= 0.25 && error > bound) {
                broken.push(format!("far from the truth: {what} {spec:?}"));
            }
        }
    }
    assert!(broken.is_empty(), "{}", broken.join("\n"));
    Ok(())
}

#[test]
fn random_layers_are_right_in_bf16() -> Result<(), GpuError> {
    let Some(gpu) = testing::gpu("random layers, bf16") else { return Ok(()) };
    check_random::<bf16>(&gpu, &gpu.stream()?, 0..120)
}

#[test]
fn random_layers_are_right_in_f16() -> Result<(), GpuError> {
    let Some(gpu) = testing::gpu("random layers, f16") else { return Ok(()) };
    check_random::<f16>(&gpu, &gpu.stream()?, 1000..1060)
}

/// Some of a case's tokens.
fn part(case: &Case, tokens: std::ops::Range<usize>) -> Case {
    let (width, k) = (case.spec.shape.hidden_size, case.spec.shape.top_k);
    let mut part = case.clone();
    part.hidden = case.hidden[tokens.start * width..tokens.end * width].to_vec();
    part.topk_ids = case.topk_ids[tokens.start * k..tokens.end * k].to_vec();
    part.topk_weights = case.topk_weights[tokens.start * k..tokens.end * k].to_vec();
    part.token_slots = case.token_slots[tokens].to_vec();
    part
}

/// A token's bits do not depend on the tokens beside it: alone, in pieces, and all at once.
fn check_neighbours<T: Element>(gpu: &Gpu, stream: &Stream) -> Result<(), GpuError> {
    for (shape, tokens, ranks) in [
        (LayerShape::new(2, 2, 512, 2880).unwrap(), 300, vec![16]),
        (LayerShape::new(8, 2, 4096, 256).unwrap(), 200, vec![16, 64, 5]),
        (LayerShape::new(4, 1, 264, 136).unwrap(), 700, vec![512, 8]),
        (LayerShape::new(12, 3, 264, 4104).unwrap(), 150, vec![512, 8, 40]),
    ] {
        let adapters = ranks.into_iter().map(AdapterSpec::rank).collect();
        let spec = CaseSpec { adapters, mix: AdapterMix::Runs, ..CaseSpec::new(shape, tokens).dtype(T::DTYPE) };
        let case = spec.build(21);
        let mut layer = Layer::from_case::<T>(gpu, stream, &case)?;
        for path in [Path::Portable, Path::Prefill, Path::Decode] {
            if !layer.take(gpu, tokens, path) {
                continue;
            }
            let all = forward::<T>(gpu, stream, &layer, &batch_of::<T>(gpu, stream, &layer, &case)?, true, true)?;
            for piece in [1, 7, 33, 150] {
                for first in [0, (tokens - piece) / 2, tokens - piece] {
                    let width = shape.hidden_size;
                    let batch = batch_of::<T>(gpu, stream, &layer, &part(&case, first..first + piece))?;
                    let found = forward::<T>(gpu, stream, &layer, &batch, true, true)?;
                    let want = &all[first * width..(first + piece) * width];
                    assert!(found == want, "{shape:?}: tokens {first} to {} differ in a larger batch", first + piece);
                }
            }
        }
    }
    Ok(())
}

#[test]
fn a_token_does_not_see_its_neighbours() -> Result<(), GpuError> {
    let Some(gpu) = testing::gpu("neighbours") else { return Ok(()) };
    if std::env::var_os("MOE_LORA_CASES").is_some() {
        return Ok(());
    }
    check_neighbours::<bf16>(&gpu, &gpu.stream()?)?;
    check_neighbours::<f16>(&gpu, &gpu.stream()?)
}

/// Up to 16 tokens in one launch: every number of tokens has the same sums.
#[test]
fn few_tokens_have_the_same_bits_in_every_batch() -> Result<(), GpuError> {
    let Some(gpu) = testing::gpu("few tokens") else { return Ok(()) };
    let stream = gpu.stream()?;
    // One, two and four pieces of 16 features of down a block; experts that a token names twice; more than 8 rows a tile.
    for (shape, routing) in [
        (LayerShape::new(16, 4, 256, 192).unwrap(), RoutingMix::Uniform),
        (LayerShape::new(4, 4, 2880, 576).unwrap(), RoutingMix::Duplicates),
        (LayerShape::new(3, 2, 7168, 64).unwrap(), RoutingMix::AllOnOne),
    ] {
        let (tokens, adapters) = (16, [16, 64, 5].map(AdapterSpec::rank).to_vec());
        let spec = CaseSpec {
            adapters,
            routing,
            mix: AdapterMix::Mixed,
            bias: true,
            ..CaseSpec::new(shape, tokens).dtype(DType::Bf16)
        };
        let case = spec.build(5);
        let mut layer = Layer::from_case::<bf16>(&gpu, &stream, &case)?;
        if !layer.take(&gpu, tokens, Path::Layer) {
            continue;
        }
        let all = forward::<bf16>(&gpu, &stream, &layer, &batch_of::<bf16>(&gpu, &stream, &layer, &case)?, true, true)?;
        assert!(relative_error(&wide(&all), &case.truth().unwrap()) <= bound(DType::Bf16, true), "{shape:?}");
        for piece in [1, 3, 9] {
            for first in [0, 4, tokens - piece] {
                let found = forward::<bf16>(
                    &gpu,
                    &stream,
                    &layer,
                    &batch_of::<bf16>(&gpu, &stream, &layer, &part(&case, first..first + piece))?,
                    true,
                    true,
                )?;
                let want = &all[first * shape.hidden_size..(first + piece) * shape.hidden_size];
                assert!(found == want, "{shape:?}: tokens {first} to {} differ in a larger batch", first + piece);
            }
        }
    }
    Ok(())
}

fn check_large<T: Element>(gpu: &Gpu, stream: &Stream) -> Result<(), GpuError> {
    let shape = LayerShape::new(8, 2, 512, 384).unwrap();
    for (largest, tokens, bias) in [(512, 4, false), (512, 48, true), (512, 300, false), (40, 4, true), (40, 48, false)]
    {
        let adapters = [16, 8, 64, 5, largest].map(AdapterSpec::rank).to_vec();
        let spec = CaseSpec { adapters, bias, ..CaseSpec::new(shape, tokens).dtype(T::DTYPE) };
        let case = spec.build(77);
        let mut layer = Layer::from_case::<T>(gpu, stream, &case)?;
        let batch = batch_of::<T>(gpu, stream, &layer, &case)?;
        let (truth, truth_base) = (case.truth().unwrap(), case.base_truth().unwrap());
        assert!(delta_share(&truth, &truth_base) > 0.25);
        for (path, rows_f32) in PATHS {
            if !layer.take(gpu, batch.tokens, path) {
                continue;
            }
            let found = wide(&forward::<T>(gpu, stream, &layer, &batch, rows_f32, true)?);
            let base = wide(&forward::<T>(gpu, stream, &layer, &batch, rows_f32, false)?);
            let error = relative_error(&found, &truth);
            let worst = worst_row_error(&found, &truth, shape.hidden_size);
            let delta = delta_error(&found, &base, &truth, &truth_base);
            let kind = format!("{} T {tokens} {path:?} rows_f32 {rows_f32}", T::DTYPE);
            eprintln!("{kind}: {error:.2e} worst {worst:.2e} delta {delta:.2e}");
            assert!(error <= bound(T::DTYPE, rows_f32) && worst <= 1e-2 && delta <= 2e-2);
        }
    }
    Ok(())
}

#[test]
fn errors_stay_under_the_stated_bounds() -> Result<(), GpuError> {
    let Some(gpu) = testing::gpu("stated bounds") else { return Ok(()) };
    check_large::<bf16>(&gpu, &gpu.stream()?)?;
    check_large::<f16>(&gpu, &gpu.stream()?)
}

/// One graph, captured with one batch, replayed with others: other routings, adapters, and none.
#[test]
fn a_graph_serves_any_batch() -> Result<(), GpuError> {
    let Some(gpu) = testing::gpu("graph") else { return Ok(()) };
    let stream = gpu.stream()?;
    let shape = LayerShape::new(16, 4, 256, 192).unwrap();
    let mixes = [AdapterMix::Mixed, AdapterMix::AllBase, AdapterMix::RoundRobin, AdapterMix::Mixed];
    let routings = [RoutingMix::Uniform, RoutingMix::AllOnOne, RoutingMix::ForeignExperts, RoutingMix::Skewed];
    let paths = [
        (5, Path::Portable),
        (5, Path::Decode),
        (5, Path::Layer),
        (200, Path::Decode),
        (700, Path::Portable),
        (700, Path::Prefill),
    ];
    for (tokens, path) in paths {
        let spec = CaseSpec {
            adapters: [16, 8, 64].map(AdapterSpec::rank).to_vec(),
            ..CaseSpec::new(shape, tokens).dtype(DType::Bf16)
        };
        let case = spec.clone().build(3);
        let mut layer = Layer::from_case::<bf16>(&gpu, &stream, &case)?;
        if !layer.take(&gpu, tokens, path) {
            continue;
        }
        let batch = batch_of::<bf16>(&gpu, &stream, &layer, &case)?;
        let graph = stream.capture(|| layer.launch(&gpu, &stream, &batch, false, true))?;
        for (i, (mix, routing)) in mixes.into_iter().zip(routings).enumerate() {
            let other = CaseSpec { mix, routing, ..spec.clone() }.build(100 + i as u64);
            let hidden = other.hidden_as::<bf16>();
            let words = bytemuck::cast_slice::<bf16, u16>(&hidden);
            batch.set(&stream, words, &other.topk_ids, &other.topk_weights, &other.token_slots, &[1; 3])?;
            let eager = forward::<bf16>(&gpu, &stream, &layer, &batch, false, true)?;
            for _ in 0..12 {
                batch.poison(&stream)?;
                graph.launch()?;
                assert!(output::<bf16>(&stream, &batch, &layer)? == eager, "T {tokens} batch {i}");
            }
        }
    }
    Ok(())
}
