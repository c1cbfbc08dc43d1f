//! `cargo xtask kernels [--prebuilt]`: builds the kernel images and prints what every kernel needs of an SM.
//!
//! The images land in `target/kernels`, where `MOE_LORA_FATBIN_DIR` may point, or in `kernels/prebuilt`, from where they are
//! packaged.

/// A link to the kernels crate's file, which its build script uses too: packages hold a copy each.
#[allow(dead_code, reason = "the build script uses the rest")]
#[path = "nvcc.rs"]
pub(crate) mod nvcc;

use crate::shell::root;
use anyhow::{Context, Result, anyhow, bail};
use nvcc::{Build, FAMILIES};
use std::fs;
use std::path::Path;
use std::time::Instant;

pub(crate) fn run(words: &[&str]) -> Result<()> {
    let out = match words {
        [] => root().join("target/kernels"),
        ["--prebuilt"] => root().join("kernels/prebuilt"),
        other => bail!("unknown arguments of kernels: {}", other.join(" ")),
    };
    build_into(&out)?;
    Ok(())
}

/// Builds all images and their manifest into a folder, and prints what every kernel needs.
pub(crate) fn build_into(out: &Path) -> Result<Build> {
    let start = Instant::now();
    let compiler = nvcc::find(&root()).context("no nvcc: install one with `cargo xtask toolkit`, or set NVCC")?;
    fs::create_dir_all(out).with_context(|| out.display().to_string())?;
    let build = nvcc::build(&compiler, &root().join("kernels/cuda"), out).map_err(|e| anyhow!(e))?;
    fs::write(out.join("manifest.txt"), build.manifest())?;
    println!("{:<24} {:>7} {:>9} {:>8} {:>6} {:>7}", "kernel", "arch", "registers", "shared", "stack", "spills");
    for k in &build.kernels {
        println!("{:<24} {:>7} {:>9} {:>8} {:>6} {:>7}", k.name, k.arch, k.registers, k.shared, k.stack, k.spills);
    }
    let mut bytes = 0;
    for family in FAMILIES {
        bytes += fs::metadata(out.join(format!("{family}.fatbin")))?.len();
    }
    println!("{}: {bytes} bytes of images in {:.0} s", out.display(), start.elapsed().as_secs_f64());
    Ok(build)
}
