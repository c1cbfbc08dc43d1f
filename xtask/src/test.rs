//! `cargo xtask test`: every test of every crate, and the parsers under mutated files.

use crate::shell::{self, cargo};
use anyhow::Result;

/// Mutated files for each parser; the fuzz targets beside them go on from the same corpus without end.
const MUTATIONS: &str = "200000";

pub(crate) fn run(rest: &[&str]) -> Result<()> {
    let mutations = std::env::var("MOE_LORA_FUZZ_RUNS").unwrap_or(MUTATIONS.into());
    let mut tests = cargo(&["test", "--workspace", "--all-features"]);
    shell::run(tests.args(rest).env("MOE_LORA_FUZZ_RUNS", mutations))
}
