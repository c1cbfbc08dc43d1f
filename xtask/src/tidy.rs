//! `cargo xtask tidy`: the house rules that a compiler does not know. Each is an invariant of `docs/architecture.md`.

use crate::shell::{cargo, output, root};
use anyhow::{Result, bail};
use serde_json::Value;
use std::path::{Path, PathBuf};
use std::process::Command;

/// The crates from the ground up: each may use only those before it. The facade and what follows may use all.
const ORDER: [&str; 18] = [
    "moe-lora-core",
    "moe-lora-files",
    "moe-lora-reference",
    "moe-lora-kernels",
    "moe-lora-cuda",
    "moe-lora-collective",
    "moe-lora-route",
    "moe-lora-gemm",
    "moe-lora-adapter",
    "moe-lora-pool",
    "moe-lora-runner",
    "moe-lora-layer",
    "moe-lora-model",
    "moe-lora",
    "moe-lora-generate",
    "moe-lora-candle",
    "moe-lora-c",
    "moe-lora-cli",
];

/// Crates that must build where CUDA does not exist, without a feature switch.
const NO_CUDA: [&str; 5] =
    ["moe-lora-core", "moe-lora-files", "moe-lora-reference", "moe-lora-adapter", "moe-lora-model"];

/// The only places where `unsafe` may stand.
const UNSAFE: &[&str] = &[
    "crates/moe-lora-bench/src/gpu.rs",
    "crates/moe-lora-bench/src/gpu/launch.rs",
    "crates/moe-lora-bench/src/gpu/pool.rs",
    "crates/moe-lora-bench/src/gpu/ranks.rs",
    "crates/moe-lora-c/src/",
    "crates/moe-lora-cuda/",
    "crates/moe-lora-files/src/map.rs",
    "crates/moe-lora-gemm/src/cpu/simd/",
    "crates/moe-lora-route/src/cuda/",
    "crates/moe-lora-pool/src/memory/cuda/upload.rs",
    "crates/moe-lora-pool/src/memory/cuda/views",
    "crates/moe-lora-runner/src/cuda/",
    "kernels/",
    // The list that you read.
    "xtask/src/tidy.rs",
    // Callers of the unsafe doors.
    "/examples/",
    // Allocators that count, in tests only.
    "/tests/",
];

const TOP_LEVEL: [&str; 15] = [
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    "Cargo.lock",
    "Cargo.toml",
    "LICENSE-APACHE",
    "LICENSE-MIT",
    "README.md",
    "SECURITY.md",
    "clippy.toml",
    "crates",
    "deny.toml",
    "docs",
    "kernels",
    "rustfmt.toml",
    "xtask",
];

const LONGEST_FILE: usize = 600;

pub(crate) fn run() -> Result<()> {
    let files = tracked_files()?;
    let mut broken = Vec::new();
    top_level(&files, &mut broken);
    sources(&files, &mut broken)?;
    crates(&mut broken)?;
    if !broken.is_empty() {
        bail!("house rules broken:\n  {}", broken.join("\n  "));
    }
    println!("tidy: {} files keep the house rules", files.len());
    Ok(())
}

fn tracked_files() -> Result<Vec<PathBuf>> {
    let mut git = Command::new("git");
    git.args(["ls-files", "--cached", "--others", "--exclude-standard"]).current_dir(root());
    Ok(output(&mut git)?.lines().map(PathBuf::from).filter(|p| root().join(p).exists()).collect())
}

fn top_level(files: &[PathBuf], broken: &mut Vec<String>) {
    for file in files {
        let first = file.components().next().map(|c| c.as_os_str().to_string_lossy().into_owned()).unwrap_or_default();
        if !first.starts_with('.') && !TOP_LEVEL.contains(&first.as_str()) {
            broken.push(format!("{}: does not belong at the top level", file.display()));
        }
    }
}

fn sources(files: &[PathBuf], broken: &mut Vec<String>) -> Result<()> {
    let source = |p: &&PathBuf| p.extension().is_some_and(|e| e == "rs" || e == "cu" || e == "cuh" || e == "py");
    for file in files.iter().filter(source) {
        let text = std::fs::read_to_string(root().join(file))?;
        let name = file.display().to_string().replace('\\', "/");
        let lines = text.lines().count();
        if lines > LONGEST_FILE {
            broken.push(format!("{name}: {lines} lines, at most {LONGEST_FILE}"));
        }
        let opens = match name.rsplit('.').next() {
            Some("rs") => text.starts_with("//!") || text.starts_with("#!"),
            Some("py") => text.trim_start_matches("#!/usr/bin/env python3\n").starts_with("\"\"\""),
            _ => text.starts_with("//"),
        };
        if !opens {
            broken.push(format!("{name}: does not open with what it is"));
        }
        if text.lines().any(|l| l.ends_with([' ', '\t'])) {
            broken.push(format!("{name}: white space at a line's end"));
        }
        if name.ends_with(".rs") && has_unsafe(&text) && !UNSAFE.iter().any(|place| name.contains(place)) {
            broken.push(format!("{name}: unsafe outside {UNSAFE:?}"));
        }
    }
    Ok(())
}

fn has_unsafe(text: &str) -> bool {
    let code = text.lines().map(|l| l.split("//").next().unwrap_or(""));
    code.into_iter().any(|l| ["unsafe {", "unsafe fn", "unsafe impl", "unsafe extern"].iter().any(|u| l.contains(u)))
}

fn crates(broken: &mut Vec<String>) -> Result<()> {
    let metadata: Value =
        serde_json::from_str(&output(&mut cargo(&["metadata", "--format-version", "1", "--no-deps"]))?)?;
    for package in metadata["packages"].as_array().into_iter().flatten() {
        let name = package["name"].as_str().unwrap_or_default();
        if name == "xtask" || name == "moe-lora-bench" {
            continue;
        }
        let Some(place) = ORDER.iter().position(|c| *c == name) else {
            broken.push(format!("{name}: has no place in the order of crates"));
            continue;
        };
        for dependency in package["dependencies"].as_array().into_iter().flatten() {
            let other = dependency["name"].as_str().unwrap_or_default();
            let normal = dependency["kind"].is_null();
            if normal && ORDER.iter().position(|c| *c == other).is_some_and(|p| p >= place) {
                broken.push(format!("{name}: imports {other}, which stands above it"));
            }
            if NO_CUDA.contains(&name) && (other == "cudarc" || other == "moe-lora-cuda" || other == "moe-lora-kernels")
            {
                broken.push(format!("{name}: must not know CUDA, but imports {other}"));
            }
            if !normal && other.starts_with("moe-lora") && dependency["req"] != "*" {
                broken.push(format!("{name}: dev-dependency {other} has a version, which packaging cannot resolve"));
            }
        }
        let manifest = PathBuf::from(package["manifest_path"].as_str().unwrap_or_default());
        readme(name, manifest.parent().unwrap_or(Path::new(".")), broken);
    }
    Ok(())
}

fn readme(name: &str, folder: &Path, broken: &mut Vec<String>) {
    match std::fs::read_to_string(folder.join("README.md")) {
        Ok(text) if text.contains("```") => {}
        Ok(_) => broken.push(format!("{name}: README.md without an example")),
        Err(_) => broken.push(format!("{name}: no README.md")),
    }
}
