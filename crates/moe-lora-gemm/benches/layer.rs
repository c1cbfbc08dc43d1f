//! One layer of E 64, k 8, H 2048, I 1024, base only and with four adapters of rank 16: `cargo bench -p moe-lora-gemm`.
//! "elem" counts floating-point operations of the base layer, bytes are the expert weights that the batch touches.
#![allow(clippy::unwrap_used, clippy::expect_used, missing_docs, reason = "a benchmark")]

#[path = "../tests/common/mod.rs"]
mod common;

use criterion::{BenchmarkId, Criterion, SamplingMode, Throughput, criterion_group, criterion_main};
use half::bf16;
use moe_lora_core::{AdapterTable, DType, LayerShape};
use moe_lora_gemm::cpu::{Kernel, LayerArgs, Workspace, combine, down, gate_up};
use moe_lora_reference::random::{AdapterMix, AdapterSpec, CaseSpec};

const TOKENS: [usize; 3] = [1, 16, 256];

fn layer(c: &mut Criterion) {
    let shape = LayerShape::new(64, 8, 2048, 1024).expect("sizes that fit");
    let spec =
        CaseSpec { adapters: vec![AdapterSpec::rank(16); 4], mix: AdapterMix::Mixed, ..CaseSpec::new(shape, 256) };
    let case = spec.dtype(DType::Bf16).build(1);
    let hidden = case.hidden_as::<bf16>();
    let kernel = Kernel::best(DType::Bf16, DType::Bf16);
    let weight_bytes = 2 * case.weights.shape().weight_count() / shape.num_experts;

    let mut group = c.benchmark_group("layer/bf16");
    group.sampling_mode(SamplingMode::Flat).sample_size(30);
    for tokens in TOKENS {
        let pairs = tokens * shape.top_k;
        // The only token of the smallest batch has an adapter too.
        let mut slots = case.token_slots[..tokens].to_vec();
        slots[0] = 0;
        let rows = common::row_map(&case.topk_ids[..pairs], &case.topk_weights[..pairs], &slots, shape.top_k);
        let bytes = (rows.experts().count() * weight_bytes) as u64;
        let flops = (pairs * weight_bytes) as u64;
        group.throughput(Throughput::ElementsAndBytes { elements: flops, bytes });
        for (name, adapters) in [("base", AdapterTable::default()), ("lora", case.table())] {
            let mut ws = Workspace::new(&shape, tokens, 16).expect("memory");
            let mut out = vec![bf16::ZERO; tokens * shape.hidden_size];
            let hidden = &hidden[..out.len()];
            let args = LayerArgs { hidden, weights: &case.weights, rows: &rows, adapters: &adapters };
            group.bench_function(BenchmarkId::new(name, tokens), |b| {
                b.iter(|| {
                    gate_up(&args, kernel, &mut ws).expect("valid arguments");
                    down(&args, kernel, &mut ws).expect("valid arguments");
                    combine(&args, &mut ws, &mut out).expect("valid arguments");
                });
            });
        }
    }
    group.finish();
}

criterion_group!(benches, layer);
criterion_main!(benches);
