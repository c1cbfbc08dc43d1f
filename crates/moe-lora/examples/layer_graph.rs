//! The safe door as a CUDA graph: one captured forward serves other tokens and an adapter that was loaded after the capture.
//!
//!     cargo run --release -p moe-lora --example layer_graph
#![allow(clippy::print_stdout, reason = "an example speaks")]

use half::bf16;
use moe_lora::reference::random::{AdapterSpec, CaseSpec};
use moe_lora::slices::cudarc::driver::CudaContext;
use moe_lora::{
    AdapterPool, AdapterWeights, DType, Device, FusedMoEWithLoRA, LayerShape, ModelShape, PoolConfig, Routing,
    TokenAdapters,
};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let device = match Device::cuda(0) {
        Ok(device) => device,
        Err(why) => {
            println!("no GPU to run on: {why}");
            return Ok(());
        }
    };
    // A drawn layer with two adapters; `Checkpoint` and `PeftAdapter` read real ones.
    let (shape, tokens) = (LayerShape::new(8, 2, 512, 256)?, 16);
    let spec = CaseSpec { adapters: vec![AdapterSpec::rank(8); 2], ..CaseSpec::new(shape, tokens).dtype(DType::Bf16) };
    let case = spec.build(1);
    let model = ModelShape::uniform(shape, 1, DType::Bf16);
    let pool = AdapterPool::new(&device, &model, PoolConfig::default())?;
    let adapter = |n: usize| AdapterWeights::new(&model, [(0, case.adapters[n].clone())].into());
    let math = pool.load("math", adapter(0)?)?;
    let layer = FusedMoEWithLoRA::new(0, case.weights.clone(), &device, &pool)?;

    let stream = CudaContext::new(0)?.new_stream()?;
    let mut graph = layer.capture::<bf16, f32>(&stream, tokens)?;
    let code = pool.load("code", adapter(1)?)?;
    for (turn, batch) in [vec![None; tokens], vec![Some(math); tokens], [None, Some(math), Some(code), None].repeat(4)]
        .into_iter()
        .enumerate()
    {
        let (batch, hidden) = (TokenAdapters::from_ids(&batch), scaled(&case.hidden, turn));
        let tensors = graph.tensors();
        stream.memcpy_htod(&hidden, &mut tensors.hidden_mut())?;
        stream.memcpy_htod(&case.topk_ids, &mut tensors.topk_ids_mut())?;
        stream.memcpy_htod(&case.topk_weights, &mut tensors.topk_weights_mut())?;
        graph.replay(&batch)?;
        let replayed = stream.clone_dtoh(&graph.tensors().out())?;

        let mut eager = vec![0.0_f32; hidden.len()];
        let routing = Routing::Selected { topk_ids: &case.topk_ids, topk_weights: &case.topk_weights };
        layer.forward(&hidden, routing, &batch, &mut eager)?;
        assert_eq!(replayed, eager, "a replay has the bits of a forward");
        println!("replay {turn}: the same {} numbers as without a graph", eager.len());
    }
    Ok(())
}

/// Other hidden states in every turn.
fn scaled(hidden: &[f64], turn: usize) -> Vec<bf16> {
    hidden.iter().map(|x| bf16::from_f64(x * (1.0 + turn as f64))).collect()
}
