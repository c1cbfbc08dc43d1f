//! `moe-lora forward`: one layer, one batch, from files to a file.

use crate::args::{Forward, NamedAdapter};
use crate::tensors::{Hidden, Input, read_input, write_output};
use crate::{devices, load};
use anyhow::{Context, Result};
use moe_lora::adapter::OpenOptions;
use moe_lora::reference::{self, LayerInput};
use moe_lora::{
    AdapterPool, AdapterTable, AdapterWeights, Checkpoint, DType, Device, FusedMoEWithLoRA, InputError, LayerError,
    ModelShape, PoolConfig, Routing, TokenAdapters, TopK,
};
use std::path::Path;
use std::time::{Duration, Instant};

pub(crate) fn run(args: &Forward) -> Result<()> {
    let model = Checkpoint::open(&args.model)?;
    let shape = model.shape();
    // The reference takes only its routing from the layer below.
    let device = if args.reference { Device::cpu() } else { devices::choose(args.device, &shape.layer)? };
    let n = args.layer.unwrap_or_else(|| model.first_moe_layer());
    let (weights, router) = (model.layer_weights(n)?, model.router(n)?);
    let sizes = &shape.layer;
    let input = read_input(&args.input, sizes.hidden_size, sizes.top_k, sizes.num_experts, args.adapters.len())?;
    // The truth takes adapters as their files state them; the layer takes them in the model's format.
    let dtype = if args.reference { DType::F32 } else { shape.dtype };
    let adapters = load::adapters(
        &args.adapters,
        &ModelShape { dtype, ..shape.clone() },
        &OpenOptions { expert_layout: args.expert_layout, ..Default::default() },
    )?;

    let all = args.adapters.len().max(1);
    let config = PoolConfig { bytes: usize::MAX, max_adapters: all, device_slots: all, ..Default::default() };
    let pool = AdapterPool::new(&device, shape, config)?;
    let layer = FusedMoEWithLoRA::new(n, weights, &device, &pool)?.with_router(router)?;
    if device != Device::cpu() && shape.dtype == DType::F32 {
        eprintln!("note: {device} computes this f32 checkpoint in bf16; the router stays f32");
    }
    let topk = route(&layer, &input)?;
    let (out, took) = if args.reference {
        reference(&layer, n, &input, &topk, &adapters)?
    } else {
        serve(&layer, &pool, args, &input, &topk, adapters)?
    };
    if out.iter().any(|v| !v.is_finite()) {
        return Err(not_finite(&args.model, n, &layer));
    }
    write_output(&args.output, &out, &topk, sizes.hidden_size, sizes.top_k)?;
    let place = if args.reference { "the f64 reference".to_owned() } else { device.to_string() };
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

fn route(layer: &FusedMoEWithLoRA, input: &Input) -> Result<TopK, LayerError> {
    if let Some(topk) = &input.topk {
        return Ok(topk.clone());
    }
    match &input.hidden {
        Hidden::F32(hidden) => layer.route(hidden, Routing::Router),
        Hidden::F16(hidden) => layer.route(hidden, Routing::Router),
        Hidden::Bf16(hidden) => layer.route(hidden, Routing::Router),
    }
}

fn serve(
    layer: &FusedMoEWithLoRA,
    pool: &AdapterPool,
    args: &Forward,
    input: &Input,
    topk: &TopK,
    adapters: Vec<AdapterWeights>,
) -> Result<(Vec<f32>, Duration)> {
    let load = |(named, weights): (&NamedAdapter, _)| {
        pool.load(&named.name, weights).with_context(|| format!("adapter {} at {}", named.name, named.dir.display()))
    };
    let ids = args.adapters.iter().zip(adapters).map(load).collect::<Result<Vec<_>>>()?;
    let tokens: Vec<_> = input.adapters.iter().map(|a| a.map(|a| ids[a])).collect();
    let tokens = TokenAdapters::from_ids(&tokens);
    let routing = Routing::Selected { topk_ids: &topk.topk_ids, topk_weights: &topk.topk_weights };
    let mut out = vec![0.0; tokens.ids().len() * layer.shape().hidden_size];
    let start = Instant::now();
    match &input.hidden {
        Hidden::F32(hidden) => layer.forward(hidden, routing, &tokens, &mut out),
        Hidden::F16(hidden) => layer.forward(hidden, routing, &tokens, &mut out),
        Hidden::Bf16(hidden) => layer.forward(hidden, routing, &tokens, &mut out),
    }?;
    Ok((out, start.elapsed()))
}

fn reference(
    layer: &FusedMoEWithLoRA,
    n: usize,
    input: &Input,
    topk: &TopK,
    adapters: &[AdapterWeights],
) -> Result<(Vec<f32>, Duration)> {
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
    Ok((truth.into_iter().map(|v| v as f32).collect(), start.elapsed()))
}

/// Hidden states, routing weights and adapters were checked, so a weight is to blame, or a sum beyond f32.
fn not_finite(model: &Path, n: usize, layer: &FusedMoEWithLoRA) -> anyhow::Error {
    for (e, expert) in layer.weights().experts().iter().enumerate() {
        for (name, matrix) in [("gate", &expert.gate), ("up", &expert.up), ("down", &expert.down)] {
            if let Some(bad) = matrix.to_vec::<f32>().into_iter().find(|w| !w.is_finite()) {
                let error = InputError::new(bad.to_string(), "finite weights");
                return error.in_tensor(format!("layer {n} expert {e} {name}")).in_file(model).into();
            }
        }
    }
    anyhow::anyhow!("layer {n}: the output is not finite: a sum left the range of f32")
}
