//! `cargo xtask toolkit`: the pinned CUDA compiler from PyPI, installed into `target/toolkit`.

use crate::kernels::nvcc;
use crate::shell::{output, root, run as shell};
use anyhow::{Context, Result, ensure};
use std::fs::File;
use std::process::Command;
use std::time::SystemTime;

/// Everything nvcc needs, pinned: left to itself, pip mixes releases that reject each other's output. The last two read
/// machine code and may be newer.
const WHEELS: [&str; 7] = [
    "nvidia-cuda-nvcc==13.0.88",
    "nvidia-cuda-crt==13.0.88",
    "nvidia-nvvm==13.0.88",
    "nvidia-cuda-runtime==13.0.96",
    "nvidia-cuda-cccl==13.0.85",
    "nvidia-cuda-cuobjdump==13.2.51",
    "nvidia-cuda-nvdisasm==13.2.51",
];

pub(crate) fn run(words: &[&str]) -> Result<()> {
    ensure!(words.is_empty(), "toolkit takes no arguments");
    let folder = nvcc::toolkit(&root());
    let compiler = folder.join("nvidia/cu13/bin/nvcc");
    if !compiler.is_file() {
        let mut pip = Command::new("python3");
        pip.args(["-m", "pip", "install", "--no-deps", "--upgrade", "--target"]).arg(&folder).args(WHEELS);
        shell(&mut pip)?;
        // The kernels' build script did not find a compiler before: let it look again.
        let script = root().join("kernels/build.rs");
        let touched = File::options().append(true).open(&script).and_then(|f| f.set_modified(SystemTime::now()));
        touched.with_context(|| script.display().to_string())?;
    }
    let version = output(Command::new(&compiler).arg("--version"))?;
    let release = version.lines().find(|l| l.contains("release")).unwrap_or("an unknown release");
    println!("{}: {release}", compiler.display());
    Ok(())
}
