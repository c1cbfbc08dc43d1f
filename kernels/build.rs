//! Makes the kernel images, or empty ones. Never fails a build: see README.md for the order of what is tried.

// The list of kernels and the toolkit's place are for xtask.
#[allow(dead_code, reason = "xtask uses the rest")]
mod nvcc;

use std::path::{Path, PathBuf};
use std::{env, fs};

fn main() {
    let root = PathBuf::from(env::var_os("CARGO_MANIFEST_DIR").unwrap_or_default());
    let out = PathBuf::from(env::var_os("OUT_DIR").unwrap_or_default());
    for name in nvcc::VARIABLES {
        println!("cargo::rerun-if-env-changed={name}");
    }
    for path in ["cuda", "build.rs", "nvcc.rs"] {
        println!("cargo::rerun-if-changed={path}");
    }
    if let Err(why) = images(&root, &out) {
        if !why.is_empty() {
            println!("cargo::warning=no kernel images: {}", why.replace('\n', " | "));
        }
        for family in nvcc::FAMILIES {
            write(&out.join(format!("{family}.fatbin")), b"");
        }
        write(&out.join("manifest.txt"), b"");
    }
}

/// Puts images and a manifest into `out`. An empty message is a machine that has no nvcc, which is no reason to warn.
fn images(root: &Path, out: &Path) -> Result<(), String> {
    if env::var_os("DOCS_RS").is_some() {
        return Err(String::new());
    }
    let cuda = root.join("cuda");
    if let Some(dir) = env::var_os("MOE_LORA_FATBIN_DIR") {
        return copy(Path::new(&dir), out);
    }
    let hash = nvcc::source_hash(&cuda).map_err(|e| e.to_string())?;
    let prebuilt = root.join("prebuilt");
    let manifest = fs::read_to_string(prebuilt.join("manifest.txt")).unwrap_or_default();
    if manifest.lines().next() == Some(&format!("source {hash}")) {
        println!("cargo::rerun-if-changed=prebuilt");
        return copy(&prebuilt, out);
    }
    let workspace = root.parent().unwrap_or(root);
    let compiler = nvcc::find(workspace).ok_or_else(String::new)?;
    println!("cargo::rerun-if-changed={}", compiler.display());
    let build = nvcc::build(&compiler, &cuda, out)?;
    write(&out.join("manifest.txt"), build.manifest().as_bytes());
    Ok(())
}

fn copy(from: &Path, to: &Path) -> Result<(), String> {
    let files = nvcc::FAMILIES.iter().map(|f| format!("{f}.fatbin")).chain(["manifest.txt".to_owned()]);
    for file in files {
        let path = from.join(&file);
        fs::copy(&path, to.join(&file)).map_err(|e| format!("{}: {e}", path.display()))?;
    }
    Ok(())
}

fn write(path: &Path, bytes: &[u8]) {
    if let Err(error) = fs::write(path, bytes) {
        println!("cargo::warning={}: {error}", path.display());
    }
}
