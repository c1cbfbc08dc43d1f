//! Checks of strict mode that need no model.

use crate::config::{AdapterConfig, TargetModules};
use crate::index::Index;
use crate::key::{Target, module_path};
use moe_lora_core::InputError;
use moe_lora_files::SafetensorsFile;
use regex::bytes::RegexBuilder;
use std::collections::BTreeSet;

/// Refuses an expert projection that `target_modules` names but no tensor changes.
pub(crate) fn check(config: &AdapterConfig, index: &Index, file: &SafetensorsFile) -> Result<(), InputError> {
    let mut missing: BTreeSet<String> = match &config.target_modules {
        None => return Ok(()),
        Some(TargetModules::Names(names)) => names.iter().filter(|n| is_projection(n)).cloned().collect(),
        Some(TargetModules::Pattern(pattern)) => by_pattern(pattern, index)?,
    };
    for tensor in file.tensors() {
        if missing.is_empty() {
            break;
        }
        let path = module_path(&tensor.name);
        missing.remove(path);
        for (dot, _) in path.match_indices('.') {
            missing.remove(path.get(dot + 1..).unwrap_or_default());
        }
    }
    match missing.into_iter().next() {
        None => Ok(()),
        Some(name) => Err(InputError::new(format!("no tensor of the targeted {name}"), "all of them (strict)")
            .in_tensor("target_modules")),
    }
}

fn is_projection(name: &str) -> bool {
    Target::from_name(name.rsplit('.').next().unwrap_or(name)).is_some()
}

/// The projections of the file's first expert that a regular expression targets. `all-linear` is for the model to tell.
fn by_pattern(pattern: &str, index: &Index) -> Result<BTreeSet<String>, InputError> {
    let Some(layer) = index.layers.values().next() else { return Ok(BTreeSet::new()) };
    if pattern.eq_ignore_ascii_case("all-linear") {
        return Ok(BTreeSet::new());
    }
    let regex = RegexBuilder::new(&format!("^(?:{pattern})$")).unicode(false).size_limit(1 << 20).build();
    let regex = regex.map_err(|_| {
        let shown: String = pattern.chars().take(80).collect();
        InputError::new(format!("{shown:?}"), "a regular expression that can be checked (strict)")
            .in_tensor("target_modules")
    })?;
    let experts = [Target::Gate, Target::Up, Target::GateUp, Target::Down].into_iter();
    let first = experts.filter_map(|t| layer.each(t).next()).map(|(expert, _)| expert).min();
    let Some(expert) = first else { return Ok(BTreeSet::new()) };
    let names = if layer.uses_numbered_names() { ["w1", "w2", "w3"] } else { ["gate_proj", "up_proj", "down_proj"] };
    let targeted = |name: &&str| regex.is_match(format!("{}.{expert}.{name}", layer.module).as_bytes());
    Ok(names.into_iter().filter(targeted).map(str::to_owned).collect())
}
