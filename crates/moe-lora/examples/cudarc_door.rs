//! The cudarc door: slices and a stream of the program's own cudarc context, checked against the f64 reference.
//!
//!     cargo run --release -p moe-lora --example cudarc_door
#![allow(clippy::print_stdout, reason = "an example speaks")]

use half::bf16;
use moe_lora::raw::{self, SlotBuffers};
use moe_lora::reference::metrics::relative_error;
use moe_lora::reference::random::{AdapterSpec, CaseSpec};
use moe_lora::slices::cudarc::driver::{CudaContext, DevicePtr};
use moe_lora::slices::{self, AdapterSlices, BatchSlices, Gpu, LayerSlices};
use moe_lora::{Activation, DType, LayerShape, RouterWeightPlacement};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let gpu = match Gpu::open(0) {
        Ok(gpu) => gpu,
        Err(why) => {
            println!("no GPU to run on: {why}");
            return Ok(());
        }
    };
    // What an engine has: a context, a stream, and tensors. Here they are drawn.
    let (shape, rank) = (LayerShape::new(8, 2, 512, 256)?, 16);
    let spec = CaseSpec { adapters: vec![AdapterSpec::rank(rank); 2], ..CaseSpec::new(shape, 48).dtype(DType::Bf16) };
    let case = spec.build(1);
    let stream = CudaContext::new(0)?.new_stream()?;
    let (mut w13, mut w2): (Vec<bf16>, Vec<bf16>) = Default::default();
    for expert in case.weights.experts() {
        w13.extend(expert.gate.to_vec::<bf16>());
        w13.extend(expert.up.to_vec::<bf16>());
        w2.extend(expert.down.to_vec::<bf16>());
    }
    let (w13, w2) = (stream.clone_htod(&w13)?, stream.clone_htod(&w2)?);
    let hidden = stream.clone_htod(&case.hidden_as::<bf16>())?;
    let (topk_ids, topk_weights) = (stream.clone_htod(&case.topk_ids)?, stream.clone_htod(&case.topk_weights)?);
    let token_slots = stream.clone_htod(&case.token_slots)?;

    // Adapters in 4-D buffers: slot, expert, rows, columns. One scale a slot, so each B takes up its own.
    let mut buffers: [Vec<bf16>; 4] = Default::default();
    for lora in case.adapters.iter().flat_map(|adapter| adapter.experts()) {
        let [Some(gate), Some(up), Some(down)] = [&lora.gate, &lora.up, &lora.down] else { continue };
        let scaled = |lora: &moe_lora::Lora| -> Vec<bf16> {
            lora.b().to_vec::<f32>().iter().map(|b| bf16::from_f32(b * lora.scale())).collect()
        };
        buffers[0].extend([gate.a().to_vec::<bf16>(), up.a().to_vec::<bf16>()].concat());
        buffers[1].extend([scaled(gate), scaled(up)].concat());
        buffers[2].extend(down.a().to_vec::<bf16>());
        buffers[3].extend(scaled(down));
    }
    let on_gpu = [
        stream.clone_htod(&buffers[0])?,
        stream.clone_htod(&buffers[1])?,
        stream.clone_htod(&buffers[2])?,
        stream.clone_htod(&buffers[3])?,
    ];
    let [gate_up_a, gate_up_b, down_a, down_b] = on_gpu.each_ref().map(|slice| slice.device_ptr(&stream).0);
    let layout = SlotBuffers { gate_up_a, gate_up_b, down_a, down_b, rank, shared_outer: false };
    let entries = layout.entries(&shape, &[rank; 2], &[1.0; 2])?;
    let table = stream.clone_htod(bytemuck::cast_slice::<_, u8>(&entries))?;
    #[allow(unsafe_code, reason = "the table holds addresses")]
    // SAFETY: the table's addresses are those of `on_gpu`, which outlives the forward.
    let adapters = unsafe { AdapterSlices::new(token_slots.as_view(), table.as_view(), rank) };

    let layer = LayerSlices {
        shape,
        w13: w13.as_view(),
        interleaved: false,
        w2: w2.as_view(),
        bias: None,
        activation: Activation::Silu,
        router_weight: RouterWeightPlacement::Output,
        routed_scaling_factor: 1.0,
    };
    let batch =
        BatchSlices { hidden: hidden.as_view(), topk_ids: topk_ids.as_view(), topk_weights: topk_weights.as_view() };
    let mut workspace = stream.alloc_zeros::<u8>(raw::workspace_bytes(&gpu, &shape, 48, 2, rank)?)?;
    let mut out = stream.alloc_zeros::<f32>(48 * shape.hidden_size)?;
    let (workspace, out_view) = (&mut workspace.as_view_mut(), &mut out.as_view_mut());
    slices::forward(&gpu, &stream, &layer, &batch, Some(&adapters), workspace, out_view)?;

    let found: Vec<f64> = stream.clone_dtoh(&out)?.into_iter().map(f64::from).collect();
    let error = relative_error(&found, &case.truth()?);
    println!("48 tokens on two adapters and the base model: relative error {error:.2e} (B was rounded once more)");
    assert!(error < 6e-3);
    Ok(())
}
