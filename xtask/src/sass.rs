//! `cargo xtask sass`: what the machine code must and must not hold. Needs no GPU.
//!
//! No kernel may spill or use local memory, on any architecture; the products must run on tensor cores.

use crate::kernels::{build_into, nvcc};
use crate::shell::{output, root};
use anyhow::{Context, Result, bail, ensure};
use nvcc::FAMILIES;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::{env, fs};

/// Loads and stores of local memory.
const LOCAL: [&str; 2] = ["LDL", "STL"];
/// Families whose work is matrix products.
const TENSOR_CORES: [&str; 10] = [
    "shrink",
    "gate_up",
    "down",
    "peak",
    "prefill_shrink",
    "prefill_gate_up",
    "prefill_down",
    "decode_gate_up",
    "decode_down",
    "decode_layer",
];
/// Kernels of these that multiply nothing.
const WITHOUT: [&str; 2] = ["moe_lora_split_", "moe_lora_decode_clear"];

pub(crate) fn run(words: &[&str]) -> Result<()> {
    ensure!(words.is_empty(), "sass takes no arguments");
    let out = root().join("target/kernels");
    let build = build_into(&out)?;
    let mut broken = Vec::new();
    for k in &build.kernels {
        if k.spills > 0 || k.stack > 0 {
            broken.push(format!("{} {}: {} bytes spilled, {} of stack", k.name, k.arch, k.spills, k.stack));
        }
    }
    let mut checked = 0;
    for family in FAMILIES {
        if fs::metadata(out.join(format!("{family}.fatbin")))?.len() == 0 {
            continue;
        }
        for (kernel, code) in disassemble(&out, family)? {
            checked += 1;
            let has = |what: &str| code.iter().any(|line| line.contains(what));
            if LOCAL.into_iter().any(|what| has(&format!(" {what}"))) {
                broken.push(format!("{kernel}: uses local memory"));
            }
            let multiplies = TENSOR_CORES.contains(&family) && !WITHOUT.iter().any(|name| kernel.starts_with(name));
            if multiplies && !has("HMMA") && !has("HGMMA") {
                broken.push(format!("{kernel}: no tensor-core instruction"));
            }
        }
    }
    ensure!(checked == build.kernels.len(), "{checked} kernels disassembled of {}", build.kernels.len());
    if !broken.is_empty() {
        bail!("machine code:\n  {}", broken.join("\n  "));
    }
    println!("sass: {checked} kernels, no spills, no local memory, tensor cores where they belong");
    Ok(())
}

/// The instructions of every kernel of a family on every architecture, by "kernel architecture".
fn disassemble(images: &Path, family: &str) -> Result<BTreeMap<String, Vec<String>>> {
    let folder = images.join("cubin").join(family);
    if folder.exists() {
        fs::remove_dir_all(&folder)?;
    }
    fs::create_dir_all(&folder)?;
    let image = images.join(format!("{family}.fatbin"));
    output(Command::new(tool("cuobjdump")?).args(["-xelf", "all"]).arg(image).current_dir(&folder))?;
    let mut kernels: BTreeMap<String, Vec<String>> = BTreeMap::new();
    for entry in fs::read_dir(&folder)? {
        let cubin = entry?.path();
        let name = cubin.file_stem().unwrap_or_default().to_string_lossy().into_owned();
        let arch = name.rsplit('.').next().unwrap_or_default().to_owned();
        let mut kernel = None;
        for line in output(Command::new(tool("nvdisasm")?).arg("-c").arg(&cubin))?.lines() {
            if let Some(symbol) = line.strip_prefix(".text.").and_then(|l| l.strip_suffix(':')) {
                kernel = Some(format!("{symbol} {arch}"));
            } else if let Some(kernel) = &kernel {
                kernels.entry(kernel.clone()).or_default().push(line.to_owned());
            }
        }
    }
    Ok(kernels)
}

/// A tool beside the installed nvcc, or on `PATH`.
fn tool(name: &str) -> Result<PathBuf> {
    let beside = nvcc::find(&root()).and_then(|nvcc| Some(nvcc.parent()?.join(name)));
    let wheel = nvcc::toolkit(&root()).join("nvidia/cu13/bin").join(name);
    let path = env::var_os("PATH").unwrap_or_default();
    let on_path = env::split_paths(&path).map(|dir| dir.join(name));
    let mut places = beside.into_iter().chain([wheel]).chain(on_path);
    places.find(|p| p.is_file()).with_context(|| format!("no {name}: install it with `cargo xtask toolkit`"))
}
