//! One OLMoE-sized layer in bf16 on the processor: the base model alone, and 4 adapters of rank 16 mixed with it.
//!
//! Writes `cpu-rows.json` beside Criterion's own results, with the bytes and operations that each row counts for.
#![allow(missing_docs, reason = "Criterion's macros document nothing")]
#![allow(clippy::unwrap_used, reason = "a benchmark that cannot go on may panic")]

use criterion::{Criterion, criterion_group, criterion_main};
use half::bf16;
use moe_lora::reference::random::{AdapterMix, AdapterSpec, CaseSpec};
use moe_lora::{Batch, DType, Limits, MoeRunner};
use moe_lora_bench::{OLMOE, count};
use serde_json::json;
use std::time::Duration;

const TOKENS: [usize; 3] = [1, 16, 256];

fn layer(criterion: &mut Criterion) {
    let shape = OLMOE.shape().unwrap();
    let spec = CaseSpec { adapters: vec![AdapterSpec::rank(16); 4], ..CaseSpec::new(shape, 256).dtype(DType::Bf16) };
    let all = spec.build(0);
    let mut runner = MoeRunner::new(&shape, Limits::default()).unwrap();
    let mut group = criterion.benchmark_group(OLMOE.name);
    group.sample_size(20).warm_up_time(Duration::from_secs(1)).measurement_time(Duration::from_secs(4));
    let mut rows = Vec::new();
    for tokens in TOKENS {
        for mix in [AdapterMix::AllBase, AdapterMix::Mixed] {
            let mut case = all.clone();
            case.hidden.truncate(tokens * shape.hidden_size);
            case.topk_ids.truncate(tokens * shape.top_k);
            case.topk_weights.truncate(tokens * shape.top_k);
            case.token_slots.truncate(tokens);
            if mix == AdapterMix::AllBase {
                case.token_slots.fill(-1);
            } else {
                // A base token among the adapters' from 2 tokens on, whatever was drawn.
                (0..tokens).for_each(|t| case.token_slots[t] = (t % 5) as i32 - i32::from(tokens > 1));
            }
            let id = format!("T{tokens}-{}", if mix == AdapterMix::AllBase { "base" } else { "lora" });
            let (hidden, table) = (case.hidden_as::<bf16>(), case.table());
            let batch = Batch {
                hidden: &hidden,
                topk_ids: &case.topk_ids,
                topk_weights: &case.topk_weights,
                token_slots: &case.token_slots,
                adapters: &table,
            };
            let mut out = vec![bf16::ZERO; hidden.len()];
            group.bench_function(&id, |b| b.iter(|| runner.forward(&case.weights, &batch, &mut out).unwrap()));
            let work = count(&case);
            rows.push(json!({ "id": id, "tokens": tokens, "bytes": work.bytes, "flops": work.flops }));
        }
    }
    group.finish();
    let target = std::env::var_os("CARGO_TARGET_DIR").map_or("../../target".into(), std::path::PathBuf::from);
    let folder = target.join("criterion").join(OLMOE.name);
    std::fs::create_dir_all(&folder).unwrap();
    std::fs::write(folder.join("cpu-rows.json"), serde_json::to_vec_pretty(&rows).unwrap()).unwrap();
}

criterion_group!(benches, layer);
criterion_main!(benches);
