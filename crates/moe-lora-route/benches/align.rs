//! Time of align and of expert choice on one batch, by tokens T and experts E, with 8 experts a token.

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use half::bf16;
use moe_lora_core::{Matrix, RouterConfig, RouterWeights, RowMap, TopK};
use moe_lora_route::{Aligner, router_logits, topk};

const TOP_K: usize = 8;

fn logits(tokens: usize, num_experts: usize) -> Vec<f32> {
    let mut rng = fastrand::Rng::with_seed(1);
    (0..tokens * num_experts).map(|_| rng.f32() * 8.0 - 4.0).collect()
}

fn align(c: &mut Criterion) {
    let mut group = c.benchmark_group("align");
    for num_experts in [128, 256] {
        for tokens in [1, 16, 256, 1024, 8192] {
            let mut chosen = TopK::default();
            let config = RouterConfig::softmax(TOP_K);
            if topk(&logits(tokens, num_experts), num_experts, &config, None, &mut chosen).is_err() {
                continue;
            }
            let mut rng = fastrand::Rng::with_seed(2);
            let mixed: Vec<i32> = (0..tokens).map(|_| rng.i32(-1..8)).collect();
            for (name, slots) in [("base", vec![-1; tokens]), ("8 adapters", mixed)] {
                let (mut aligner, mut map) = (Aligner::new(num_experts, TOP_K), RowMap::default());
                let id = BenchmarkId::new(format!("E{num_experts} {name}"), tokens);
                group.throughput(Throughput::Elements((tokens * TOP_K) as u64));
                group.bench_function(id, |b| {
                    b.iter(|| aligner.align(&chosen.topk_ids, &chosen.topk_weights, &slots, |_| true, &mut map));
                });
            }
        }
    }
}

fn choice(c: &mut Criterion) {
    let mut group = c.benchmark_group("topk");
    for num_experts in [128, 256] {
        for tokens in [1, 16, 256, 8192] {
            let logits = logits(tokens, num_experts);
            let mut chosen = TopK::default();
            group.throughput(Throughput::Elements(tokens as u64));
            group.bench_function(BenchmarkId::new(format!("E{num_experts}"), tokens), |b| {
                b.iter(|| topk(&logits, num_experts, &RouterConfig::softmax(TOP_K), None, &mut chosen));
            });
        }
    }
}

fn product(c: &mut Criterion) {
    let (num_experts, width) = (128, 2048);
    let numbers = |count| logits(count, 1).into_iter().map(bf16::from_f32).collect::<Vec<_>>();
    let Ok(weight) = Matrix::from_vec(numbers(num_experts * width), num_experts, width) else { return };
    let router = RouterWeights { weight, bias: None, selection_bias: None, config: RouterConfig::softmax(TOP_K) };
    let mut group = c.benchmark_group("router_logits");
    for tokens in [1, 16, 1024] {
        let hidden = numbers(tokens * width);
        let mut logits = Vec::new();
        group.throughput(Throughput::Elements((tokens * num_experts * width) as u64));
        group.bench_function(BenchmarkId::new("bf16 E128 H2048", tokens), |b| {
            b.iter(|| router_logits(&router, &hidden, &mut logits));
        });
    }
}

criterion_group!(benches, align, choice, product);
criterion_main!(benches);
