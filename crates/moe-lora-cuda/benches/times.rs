//! Times of whole layers and their stages under graph replay with a cold, clean L2; `TIMES_ONLY=1x16,8x64` limits them to
//! these numbers of adapters and ranks.
#![allow(clippy::print_stdout, reason = "tests may fail loudly and speak")]

#[path = "../tests/support/mod.rs"]
mod support;

use fastrand::Rng;
use moe_lora_core::Activation;
use moe_lora_cuda::{DeviceBuffer, Gpu, GpuError, Graph, Stream, testing};
use moe_lora_kernels::{AdapterEntry, CombineParams, Format};
use std::collections::HashSet;
use support::{Batch, Layer, Path, STAGES, Sizes, Stage, upload};

const READ_BANDWIDTH: f64 = 3.15e12;
const PEAK: f64 = 797e12;

/// Signed bf16 noise of about the given size, the same few megabytes over and over.
fn noise(gpu: &Gpu, stream: &Stream, count: usize, exponent: u16) -> Result<DeviceBuffer, GpuError> {
    let mut rng = Rng::with_seed(1);
    let values: Vec<u16> = (0..4 << 20).map(|_| rng.u16(..) & 0x80ff | (exponent << 7)).collect();
    let buffer = gpu.alloc(count * 2)?;
    for first in (0..count).step_by(values.len()) {
        stream.upload(&buffer, first * 2, &values[..values.len().min(count - first)])?;
    }
    Ok(buffer)
}

/// What makes the L2 cold and clean: 256 MB written, then another 256 MB read.
struct Flush {
    written: DeviceBuffer,
    read: DeviceBuffer,
    rows: DeviceBuffer,
    out: DeviceBuffer,
}

impl Flush {
    const BYTES: usize = 256 << 20;

    fn new(gpu: &Gpu, stream: &Stream) -> Result<Self, GpuError> {
        let rows: Vec<i32> = (0..65_536).collect();
        let read = gpu.alloc(Self::BYTES)?;
        stream.fill(&read, 0, Self::BYTES, 0)?;
        let rows = upload(gpu, stream, &rows)?;
        Ok(Self { written: gpu.alloc(Self::BYTES)?, read, rows, out: gpu.alloc(4 << 20)? })
    }

    fn run(&self, gpu: &Gpu, stream: &Stream) -> Result<(), GpuError> {
        stream.fill(&self.written, 0, Self::BYTES, 1)?;
        // Sums 64 rows of 1024 f32 at a time: reads 256 MB, writes 4.
        let params = CombineParams {
            rows_in: self.read.address(),
            pair_row: self.rows.address(),
            topk_weights: 0,
            out: self.out.address(),
            num_tokens: 1024,
            top_k: 64,
            hidden_size: 1024,
            rows_f32: 1,
            out_f32: 1,
            scaling: 1.0,
        };
        // SAFETY: 65536 rows of 4 KB are 256 MB, 1024 outputs of 4 KB are 4 MB.
        unsafe { gpu.kernels().launch(stream, Format::Bf16, &params, params.launch()) }
    }

    fn median(&self, gpu: &Gpu, stream: &Stream, graph: &Graph, runs: usize) -> Result<f64, GpuError> {
        let mut times = Vec::new();
        for _ in 0..runs {
            self.run(gpu, stream)?;
            let begin = stream.record(true)?;
            graph.launch()?;
            let end = stream.record(true)?;
            times.push(begin.microseconds_to(&end)?);
        }
        times.sort_by(f64::total_cmp);
        Ok(times[times.len() / 2])
    }
}

struct Model {
    name: &'static str,
    experts: usize,
    top_k: usize,
    hidden: usize,
    intermediate: usize,
}

const MODELS: [Model; 5] = [
    Model { name: "qwen3-30b", experts: 128, top_k: 8, hidden: 2048, intermediate: 768 },
    Model { name: "olmoe", experts: 64, top_k: 8, hidden: 2048, intermediate: 1024 },
    Model { name: "deepseek-v3-tp8", experts: 256, top_k: 8, hidden: 7168, intermediate: 256 },
    Model { name: "mixtral-8x7b", experts: 8, top_k: 2, hidden: 4096, intermediate: 14336 },
    Model { name: "gpt-oss-20b", experts: 32, top_k: 4, hidden: 2880, intermediate: 2880 },
];

fn layer(gpu: &Gpu, stream: &Stream, model: &Model, slots: usize, rank: usize) -> Result<Layer, GpuError> {
    let Model { experts, hidden, intermediate, .. } = *model;
    let of_expert = [hidden, intermediate, hidden, intermediate, intermediate, hidden];
    let per_expert: usize = of_expert.iter().sum::<usize>() * rank;
    let adapters = noise(gpu, stream, slots * experts * per_expert, 119)?;
    let mut entries = Vec::new();
    let mut at = adapters.address();
    for _ in 0..slots * experts {
        for pair in of_expert.chunks(2) {
            let (a, b) = (at, at + (2 * pair[0] * rank) as u64);
            at = b + (2 * pair[1] * rank) as u64;
            entries.push(AdapterEntry { a, b, rank: rank as i32, scale: 0.5 });
        }
    }
    Ok(Layer {
        sizes: Sizes {
            experts,
            top_k: model.top_k,
            hidden,
            intermediate,
            slots,
            max_rank: rank,
            first_expert: 0,
            all_experts: experts,
        },
        format: Format::Bf16,
        interleaved: false,
        activation: Activation::Silu,
        weigh_input: false,
        scaling: 1.0,
        w13: noise(gpu, stream, 2 * experts * hidden * intermediate, 119)?,
        w2: noise(gpu, stream, experts * hidden * intermediate, 119)?,
        bias: None,
        table: upload(gpu, stream, &entries)?,
        adapters,
        path: Path::Portable,
    })
}

fn main() -> Result<(), GpuError> {
    let Some(gpu) = testing::gpu("times") else { return Ok(()) };
    let stream = gpu.stream()?;
    let flush = Flush::new(&gpu, &stream)?;
    println!("model T L R: lora us (share of floor), base us (share), stages us");
    for model in &MODELS {
        for (slots, rank) in [(1, 16), (8, 16), (8, 64)] {
            if model.experts == 256 && rank == 64 {
                continue;
            }
            if std::env::var("TIMES_ONLY").is_ok_and(|only| !only.contains(&format!("{slots}x{rank}"))) {
                continue;
            }
            let layer = layer(&gpu, &stream, model, slots, rank)?;
            for tokens in [1, 4, 16, 64, 256, 1024, 4096, 8192] {
                row(&gpu, &stream, &flush, model, &layer, tokens)?;
            }
        }
    }
    Ok(())
}

fn row(gpu: &Gpu, stream: &Stream, flush: &Flush, model: &Model, layer: &Layer, tokens: usize) -> Result<(), GpuError> {
    let mut rng = Rng::with_seed(9);
    let Sizes { experts, top_k, hidden, intermediate, slots, max_rank, .. } = layer.sizes;
    let batch = Batch::new(gpu, stream, &layer.sizes, tokens)?;
    let mut all: Vec<i32> = (0..experts as i32).collect();
    let mut ids = Vec::new();
    for _ in 0..tokens {
        rng.shuffle(&mut all);
        ids.extend_from_slice(&all[..top_k]);
    }
    let token_slots: Vec<i32> = (0..tokens).map(|_| rng.i32(0..slots as i32)).collect();
    let x: Vec<u16> = (0..tokens * hidden).map(|_| rng.u16(..) & 0x80ff | (126 << 7)).collect();
    batch.set(stream, &x, &ids, &vec![0.125; tokens * top_k], &token_slots, &vec![1; slots])?;

    let touched: HashSet<i32> = ids.iter().copied().collect();
    let pairs: HashSet<(i32, i32)> = ids.iter().enumerate().map(|(p, &e)| (e, token_slots[p / top_k])).collect();
    let in_out = 4 * tokens * hidden;
    let base_bytes = touched.len() * 6 * hidden * intermediate + in_out;
    let lora_bytes = pairs.len() * 6 * max_rank * (hidden + intermediate);
    let floor = |bytes: usize, width: usize| {
        let flops = 6.0 * (tokens * top_k) as f64 * width as f64;
        (bytes as f64 / READ_BANDWIDTH).max(flops / PEAK) * 1e6
    };
    let base_floor = floor(base_bytes, hidden * intermediate);
    let lora_floor = floor(base_bytes + lora_bytes, hidden * intermediate + max_rank * (hidden + intermediate));

    let rows_f32 = tokens * top_k * hidden * 4 <= 16 << 20;
    let mut whole = [0.0; 2];
    for (time, lora) in whole.iter_mut().zip([true, false]) {
        layer.launch(gpu, stream, &batch, rows_f32, lora)?;
        let graph = stream.capture(|| layer.launch(gpu, stream, &batch, rows_f32, lora))?;
        graph.launch()?;
        *time = flush.median(gpu, stream, &graph, 15)?;
    }
    let mut stages = String::new();
    for stage in STAGES {
        let graph = stream.capture(|| layer.stage(gpu, stream, &batch, stage, rows_f32, true))?;
        stages += &format!(" {:.1}", flush.median(gpu, stream, &graph, 7)?);
        if stage == Stage::Align {
            stages += " |";
        }
    }
    println!(
        "{} {tokens} {slots} {max_rank}: {:.1} ({:.0}%), {:.1} ({:.0}%),{stages}",
        model.name,
        whole[0],
        100.0 * lora_floor / whole[0],
        whole[1],
        100.0 * base_floor / whole[1],
    );
    Ok(())
}
