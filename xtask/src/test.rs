//! `cargo xtask test`: every test of every crate, and the parsers under mutated files.

use crate::shell::{self, cargo};
use anyhow::Result;

/// Mutated files for each parser; the fuzz targets beside them go on from the same corpus without end.
const MUTATIONS: &str = "200000";

pub(crate) fn run_all() -> Result<()> {
    shell::run(&mut cargo(&["test", "--workspace", "--all-features"]))?;
    let mutations = ["test", "-p", "moe-lora-adapter", "-p", "moe-lora-model", "--test", "mutations"];
    shell::run(
        cargo(&mutations).env("MOE_LORA_FUZZ_RUNS", std::env::var("MOE_LORA_FUZZ_RUNS").unwrap_or(MUTATIONS.into())),
    )
}

pub(crate) fn run(rest: &[&str]) -> Result<()> {
    if rest.is_empty() {
        return run_all();
    }
    shell::run(cargo(&["test", "--workspace", "--all-features"]).args(rest))
}
