//! The whole adapter against its model.

use crate::flat;
use crate::fused::install;
use crate::index::Index;
use crate::key::Target;
use crate::load::Context;
use crate::{shard, stacked};
use moe_lora_core::{AdapterLayer, AdapterWeights, Element, ExpertLora, InputError, Shard};
use std::collections::BTreeMap;

/// Loads all layers, one target at a time, for each of `shards`.
pub(crate) fn resolve<T: Element>(
    cx: Context<'_>,
    index: &Index,
    shards: &[Shard],
) -> Result<Vec<AdapterWeights>, InputError> {
    for (n, layer) in &index.layers {
        if cx.shape.moe_layers.binary_search(n).is_err() {
            let tensor = layer.sites.values().next().and_then(|p| cx.tensor(p.a.or(p.b)));
            let name = tensor.map_or(layer.module.as_str(), |t| &*t.name);
            return Err(InputError::new(format!("layer {n}"), moe_layers(&cx.shape.moe_layers)).in_tensor(name));
        }
    }
    let plan = flat::plan(cx, index)?;
    let mut ranks = vec![BTreeMap::new(); shards.len()];
    for (&n, layer) in &index.layers {
        let cx = Context { layer: n, ..cx };
        let mut experts = vec![ExpertLora::default(); cx.shape.layer.num_experts];
        for target in Target::ALL {
            if let Some(parts) = stacked::load::<T>(cx, layer, target)? {
                install::<T>(cx, parts, &mut experts)?;
            }
        }
        if let Some(plan) = &plan {
            for parameter in plan.layers.get(&n).into_iter().flatten() {
                let parts = flat::load::<T>(cx, layer, parameter, plan.layout)?;
                install::<T>(cx, parts, &mut experts)?;
            }
        }
        let changed = |e: &ExpertLora| e.gate.is_some() || e.up.is_some() || e.down.is_some();
        if experts.iter().any(changed) {
            let layer = AdapterLayer::new(&cx.shape.layer, experts)?;
            let parts = shard::parts::<T>(layer, &cx.shape.layer, shards)?;
            ranks.iter_mut().zip(parts).for_each(|(layers, part)| drop(layers.insert(n, part)));
        }
    }
    shards.iter().zip(ranks).map(|(shard, layers)| AdapterWeights::new(&cx.shape.shard(shard)?, layers)).collect()
}

fn moe_layers(layers: &[usize]) -> String {
    match layers {
        [first, .., last] => format!("one of the model's {} MoE layers from {first} to {last}", layers.len()),
        _ => format!("a MoE layer of the model, {layers:?}"),
    }
}
