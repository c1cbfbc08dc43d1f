//! Opening models and adapters, with a word to the one who waits.

use crate::args::NamedAdapter;
use anyhow::Result;
use indicatif::{ProgressBar, ProgressStyle};
use moe_lora::adapter::OpenOptions;
use moe_lora::{AdapterWeights, InputError, ModelShape, PeftAdapter, Shard};
use std::collections::HashSet;

/// A bar on standard error; none off a terminal.
pub(crate) fn progress(steps: usize) -> ProgressBar {
    let style = ProgressStyle::with_template("{bar:24} {pos}/{len} {msg}");
    ProgressBar::new(steps as u64).with_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()))
}

/// Opens all adapters and resolves each for all ranks, which reads it once; every rank's share of all of them, rank by rank.
/// Warnings go to standard error.
pub(crate) fn adapters(
    named: &[NamedAdapter],
    shape: &ModelShape,
    options: &OpenOptions,
    grid: &[Shard],
) -> Result<Vec<Vec<AdapterWeights>>> {
    unique_names(named)?;
    let bar = progress(named.len());
    let mut ranks = vec![Vec::with_capacity(named.len()); grid.len()];
    for NamedAdapter { name, dir } in named {
        bar.set_message(format!("loading {name}"));
        let adapter = PeftAdapter::open_with(dir, options.clone())?;
        let shares = adapter.resolve_shards(shape, grid)?;
        bar.suspend(|| notes(name, &adapter));
        ranks.iter_mut().zip(shares).for_each(|(rank, share)| rank.push(share));
        bar.inc(1);
    }
    bar.finish_and_clear();
    Ok(ranks)
}

/// That no name was given to two adapters.
pub(crate) fn unique_names(named: &[NamedAdapter]) -> Result<(), InputError> {
    let mut names = HashSet::new();
    match named.iter().find(|a| !names.insert(&a.name)) {
        None => Ok(()),
        Some(twice) => {
            let found = format!("the name {:?} twice", twice.name);
            Err(InputError::new(found, "unique names").in_tensor("--adapter"))
        }
    }
}

fn notes(name: &str, adapter: &PeftAdapter) {
    adapter.warnings().iter().for_each(|warning| eprintln!("warning: adapter {name}: {warning}"));
    let unused = adapter.unused_keys();
    if let Some(first) = unused.first() {
        eprintln!("note: adapter {name}: {} tensors outside the experts are the engine's ({first}, ...)", unused.len());
    }
}
