//! The raw door: addresses, sizes and a stream, for an engine with tensors of its own. Captures one forward as a CUDA graph and
//! times it with 8 and with 64 adapter slots, of which the batch uses 8.
//!
//!     cargo run --release -p moe-lora --example raw_door
#![allow(clippy::print_stdout, reason = "an example speaks")]

use half::bf16;
use moe_lora::LayerShape;
use moe_lora::raw::{self, AdapterEntry, ForwardArgs, Gpu, RouteCounts, SlotBuffers};
use moe_lora_cuda::{DeviceBuffer, Stream};

const TOKENS: usize = 64;
const RANK: usize = 16;
const ADAPTERS: usize = 8;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let gpu = match Gpu::open(0) {
        Ok(gpu) => gpu,
        Err(why) => {
            println!("no GPU to run on: {why}");
            return Ok(());
        }
    };
    let shape = LayerShape::new(64, 8, 2048, 1024)?;
    let (experts, hidden, inner) = (shape.num_experts, shape.hidden_size, shape.intermediate_size);
    let stream = gpu.stream()?;
    let random = |count: usize, deviation: f32| random(&gpu, &stream, count, deviation);

    let (w13, w2) = (random(experts * 2 * inner * hidden, 0.02)?, random(experts * hidden * inner, 0.03)?);
    let tokens = random(TOKENS * hidden, 1.0)?;
    let topk_ids: Vec<i32> = (0..TOKENS * shape.top_k).map(|pair| (pair * 37 % experts) as i32).collect();
    let topk_ids = upload(&gpu, &stream, &topk_ids)?;
    let topk_weights = upload(&gpu, &stream, &[1.0 / shape.top_k as f32; TOKENS * 8])?;
    let token_slots: Vec<i32> = (0..TOKENS).map(|token| (token % (ADAPTERS + 1)) as i32 - 1).collect();
    let token_slots = upload(&gpu, &stream, &token_slots)?;
    let adapters = [
        random(ADAPTERS * experts * 2 * RANK * hidden, 0.02)?,
        random(ADAPTERS * experts * 2 * inner * RANK, 0.1)?,
        random(ADAPTERS * experts * RANK * inner, 0.03)?,
        random(ADAPTERS * experts * hidden * RANK, 0.1)?,
    ];
    let [gate_up_a, gate_up_b, down_a, down_b] = adapters.each_ref().map(DeviceBuffer::address);
    let buffers = SlotBuffers { gate_up_a, gate_up_b, down_a, down_b, rank: RANK, shared_outer: false };
    let mut entries = buffers.entries(&shape, &[RANK; ADAPTERS], &[2.0; ADAPTERS])?;

    for slots in [8, 64] {
        // A slot without an adapter is a row of zeros.
        entries.resize(slots * experts * 3, AdapterEntry::default());
        let table = upload(&gpu, &stream, &entries)?;
        let workspace = gpu.alloc(raw::workspace_bytes(&gpu, &shape, TOKENS, slots, RANK)?)?;
        let (out, counts) = (gpu.alloc(TOKENS * hidden * 2)?, gpu.alloc(size_of::<RouteCounts>())?);
        let args = ForwardArgs {
            stream: stream.handle(),
            hidden: tokens.address(),
            topk_ids: topk_ids.address(),
            topk_weights: topk_weights.address(),
            token_slots: token_slots.address(),
            adapters: table.address(),
            out: out.address(),
            counts: counts.address(),
            workspace: workspace.address(),
            workspace_bytes: workspace.bytes() as u64,
            num_tokens: TOKENS as u32,
            num_experts: experts as u32,
            top_k: shape.top_k as u32,
            hidden_size: hidden as u32,
            intermediate_size: inner as u32,
            num_slots: slots as u32,
            max_rank: RANK as u32,
            scaling: 1.0,
            ..Default::default()
        }
        .with_w13(w13.address(), false)
        .with_w2(w2.address());

        #[allow(unsafe_code, reason = "the raw door")]
        // SAFETY: every buffer is of the size that its field asks for and outlives the waits below.
        let graph = stream.capture(|| unsafe { raw::forward(&gpu, &args) })?;
        let mut times = Vec::new();
        for _ in 0..50 {
            let start = stream.record(true)?;
            graph.launch()?;
            let end = stream.record(true)?;
            times.push(start.microseconds_to(&end)?);
        }
        times.sort_by(f64::total_cmp);
        let mut found = [RouteCounts::default()];
        stream.download(&counts, 0, &mut found)?;
        let mut result = vec![bf16::ZERO; TOKENS * hidden];
        stream.download(&out, 0, &mut result)?;
        assert!(result.iter().all(|value| value.is_finite()) && found[0].bad_experts == 0);
        println!("{slots} slots, {ADAPTERS} in use: {:.1} us a replay (weights partly in the cache)", times[25]);
    }
    Ok(())
}

/// Numbers of mean 0: a thousand and one of them, again and again.
fn random(gpu: &Gpu, stream: &Stream, count: usize, deviation: f32) -> Result<DeviceBuffer, raw::GpuError> {
    let mut state = count as u32;
    let mut next = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        bf16::from_f32(((state >> 8) as f32 / f32::from_bits(0x4b00_0000) - 1.0) * 1.7 * deviation)
    };
    let some: Vec<bf16> = (0..1001).map(|_| next()).collect();
    let all: Vec<bf16> = some.iter().cycle().take(count).copied().collect();
    upload(gpu, stream, &all)
}

fn upload<T: bytemuck::NoUninit>(gpu: &Gpu, stream: &Stream, values: &[T]) -> Result<DeviceBuffer, raw::GpuError> {
    let buffer = gpu.alloc(size_of_val(values))?;
    stream.upload(&buffer, 0, values)?;
    Ok(buffer)
}
