//! `moe-lora forward`: one layer, one batch, from files to a file.

use crate::args::Forward;
use crate::load;
use crate::ranks::{Job, Places, Served, route};
use crate::tensors::{read_input, write_output};
use anyhow::Result;
use moe_lora::adapter::OpenOptions;
use moe_lora::reference::{self, LayerInput};
use moe_lora::{
    AdapterPool, AdapterTable, AdapterWeights, Checkpoint, DType, Device, FusedMoEWithLoRA, InputError, LayerWeights,
    ModelShape, PoolConfig, Shard,
};
use std::path::Path;
use std::time::Instant;

pub(crate) fn run(args: &Forward) -> Result<()> {
    let model = Checkpoint::open(&args.model)?;
    let shape = model.shape();
    let mut grid = Shard::grid(args.tp, args.ep)?;
    if args.fully_sharded {
        grid.iter_mut().for_each(|shard| *shard = shard.with_fully_sharded_adapters());
    }
    let places = if args.reference { None } else { Some(Places::choose(args.device, &model, &grid)?) };
    let n = args.layer.unwrap_or_else(|| model.first_moe_layer());
    let sizes = &shape.layer;
    let input = read_input(&args.input, sizes.hidden_size, sizes.top_k, sizes.num_experts, args.adapters.len())?;
    // The truth takes adapters as their files state them; the layer takes them in the model's format.
    let dtype = if args.reference { DType::F32 } else { shape.dtype };
    let adapters = load::adapters(
        &args.adapters,
        &ModelShape { dtype, ..shape.clone() },
        &OpenOptions { expert_layout: args.expert_layout, ..Default::default() },
        &grid,
    )?;

    let job = Job { model: &model, layer: n, args, input: &input };
    let (Served { out, topk, took }, place) = match &places {
        None => (reference(&job, adapters.first().map_or(&[], Vec::as_slice))?, "the f64 reference"),
        Some(places) => (job.run(&grid, places, adapters)?, places.text.as_str()),
    };
    if out.iter().any(|v| !v.is_finite()) {
        return Err(not_finite(&args.model, n, &model.layer_weights(n)?));
    }
    write_output(&args.output, &out, &topk, sizes.hidden_size, sizes.top_k)?;
    println!(
        "layer {n} of {}: {} tokens, {} adapters, {:.3} ms on {place} -> {}",
        model.family(),
        input.adapters.len(),
        args.adapters.len(),
        took.as_secs_f64() * 1e3,
        args.output.display()
    );
    Ok(())
}

fn reference(job: &Job<'_>, adapters: &[AdapterWeights]) -> Result<Served> {
    let (model, n, input) = (job.model, job.layer, job.input);
    // Only its routing is taken from the layer.
    let device = Device::cpu();
    let pool = AdapterPool::new(&device, model.shape(), PoolConfig::default())?;
    let layer = FusedMoEWithLoRA::new(n, model.layer_weights(n)?, &device, &pool)?.with_router(model.router(n)?)?;
    let topk = route(&layer, input)?;
    let start = Instant::now();
    let slots: Vec<i32> = input.adapters.iter().map(|a| a.map_or(-1, |a| a as i32)).collect();
    let truth = reference::forward(&LayerInput {
        hidden: &input.hidden.widened(),
        weights: layer.weights(),
        topk_ids: &topk.topk_ids,
        topk_weights: &topk.topk_weights,
        token_slots: &slots,
        adapters: &AdapterTable::new(adapters.iter().map(|a| a.layers().get(&n)).collect()),
    })?;
    Ok(Served { out: truth.into_iter().map(|v| v as f32).collect(), topk, took: start.elapsed() })
}

/// Hidden states, routing weights and adapters were checked, so a weight is to blame, or a sum beyond f32.
fn not_finite(model: &Path, n: usize, weights: &LayerWeights) -> anyhow::Error {
    for (e, expert) in weights.experts().iter().enumerate() {
        for (name, matrix) in [("gate", &expert.gate), ("up", &expert.up), ("down", &expert.down)] {
            if let Some(bad) = matrix.to_vec::<f32>().into_iter().find(|w| !w.is_finite()) {
                let error = InputError::new(bad.to_string(), "finite weights");
                return error.in_tensor(format!("layer {n} expert {e} {name}")).in_file(model).into();
            }
        }
    }
    anyhow::anyhow!("layer {n}: the output is not finite: a sum left the range of f32")
}
