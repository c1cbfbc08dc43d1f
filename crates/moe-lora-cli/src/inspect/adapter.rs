//! What an adapter is, and what it takes in a model's pool.

use super::{Facts, list, ranges};
use crate::table::bytes;
use anyhow::Result;
use moe_lora::adapter::{ExpertLayout, OpenOptions, TargetModules};
use moe_lora::{Checkpoint, PeftAdapter};
use serde_json::json;
use std::path::Path;

pub(super) fn facts(dir: &Path, expert_layout: Option<ExpertLayout>, model: Option<&Checkpoint>) -> Result<Facts> {
    let adapter = PeftAdapter::open_with(dir, OpenOptions { expert_layout, ..Default::default() })?;
    let (config, summary) = (adapter.config(), adapter.summary());
    let mut facts = Facts::default();
    facts.add("r", config.r.to_string(), config.r);
    facts.add("lora_alpha", config.lora_alpha.to_string(), config.lora_alpha);
    facts.add("use_rslora", config.use_rslora.to_string(), config.use_rslora);
    facts.add("peft_version", config.peft_version.clone().unwrap_or("not stated".into()), json!(config.peft_version));
    let base = &config.base_model_name_or_path;
    facts.add("base_model", base.clone().unwrap_or("not stated".into()), json!(base));
    let modules = match &config.target_modules {
        Some(TargetModules::Names(names)) => list(names),
        Some(TargetModules::Pattern(pattern)) => pattern.clone(),
        None => String::new(),
    };
    facts.add("target_modules", modules, json!(config.target_modules));
    facts.add("target_parameters", list(&config.target_parameters), config.target_parameters.clone());
    let forms: Vec<String> = summary.forms.iter().map(ToString::to_string).collect();
    facts.add("key_forms", forms.join("; "), forms);
    facts.add("layers", ranges(&summary.layers), summary.layers);
    facts.add("projections", list(&summary.projections), summary.projections);
    facts.add("dtypes", list(&summary.dtypes), summary.dtypes);
    facts.add("expert_tensors", summary.expert_tensors.to_string(), summary.expert_tensors);
    facts.add("expert_bytes", bytes(summary.expert_bytes), summary.expert_bytes);
    facts.add("tensors_for_the_engine", summary.unused_tensors.to_string(), adapter.unused_keys().to_vec());
    facts.add("warnings", list(adapter.warnings()), adapter.warnings().to_vec());
    let Some(model) = model else {
        facts.add("ranks", list(&summary.ranks), summary.ranks);
        facts.add("scales", list(&summary.scales), summary.scales);
        return Ok(facts);
    };

    let weights = adapter.resolve(model.shape())?;
    let loras = || {
        let experts = weights.layers().values().flat_map(|layer| layer.experts());
        experts.flat_map(|e| [e.gate.as_ref(), e.up.as_ref(), e.down.as_ref()]).flatten()
    };
    let mut ranks: Vec<usize> = loras().map(moe_lora::Lora::rank).collect();
    ranks.sort_unstable();
    ranks.dedup();
    let mut scales: Vec<f32> = loras().map(moe_lora::Lora::scale).collect();
    scales.sort_by(f32::total_cmp);
    scales.dedup();
    facts.add("ranks", list(&ranks), ranks);
    facts.add("scales", list(&scales), scales);
    let layers = weights.layers().len();
    facts.add("model", model.family().to_string(), model.family().to_string());
    facts.add("changed_moe_layers", format!("{layers} of {}", model.shape().moe_layers.len()), layers);
    facts.add("pool_bytes", bytes(weights.size_bytes()), weights.size_bytes());
    Ok(facts)
}
