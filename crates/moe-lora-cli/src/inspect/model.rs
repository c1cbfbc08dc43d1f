//! What a checkpoint is.

use super::{Facts, ranges};
use crate::table::bytes;
use anyhow::Result;
use moe_lora::Checkpoint;

pub(super) fn facts(model: &Checkpoint) -> Result<Facts> {
    let (shape, config) = (model.shape(), model.config());
    let layer = shape.layer;
    // Views of the mapped file: this proves that the experts are whole without reading them.
    let weights = model.layer_weights(model.first_moe_layer())?;
    let router = model.router(model.first_moe_layer())?;
    let expert_bytes = layer.weight_count() * shape.dtype.size();
    let mut facts = Facts::default();
    facts.add("family", model.family().to_string(), model.family().to_string());
    facts.add("decoder_layers", config.num_hidden_layers.to_string(), config.num_hidden_layers);
    facts.add("moe_layers", ranges(&shape.moe_layers), shape.moe_layers.clone());
    facts.add("experts", layer.num_experts.to_string(), layer.num_experts);
    facts.add("top_k", layer.top_k.to_string(), layer.top_k);
    facts.add("hidden_size", layer.hidden_size.to_string(), layer.hidden_size);
    facts.add("intermediate_size", layer.intermediate_size.to_string(), layer.intermediate_size);
    facts.add("dtype", shape.dtype.to_string(), shape.dtype.to_string());
    facts.add("activation", format!("{:?}", weights.activation()), format!("{:?}", weights.activation()));
    let scoring = format!("{:?}", router.config.scoring).to_lowercase();
    let router_text = format!(
        "{scoring}{}{}{}{}, weights times {}",
        if router.config.renormalize { ", renormalised" } else { "" },
        router.config.groups.map_or(String::new(), |g| format!(", best {} of {} groups", g.top_groups, g.num_groups)),
        if router.selection_bias.is_some() { ", selection bias" } else { "" },
        if router.bias.is_some() { ", bias" } else { "" },
        router.config.routed_scaling_factor
    );
    facts.add("router", router_text.clone(), router_text);
    facts.add("expert_bytes_per_layer", bytes(expert_bytes), expert_bytes);
    facts.add("expert_bytes", bytes(expert_bytes * shape.moe_layers.len()), expert_bytes * shape.moe_layers.len());
    let slot = 3 * layer.num_experts * (layer.hidden_size + layer.intermediate_size) * shape.dtype.size();
    let all = slot * 16 * shape.moe_layers.len();
    facts.add("adapter_bytes_at_rank_16", bytes(all), all);
    Ok(facts)
}
