//! `cargo xtask bundle [FOLDER]`: all that a GPU machine without Rust needs to test and time this version.
//!
//! One folder (`target/bundle`): GPU tests, the command, the benchmark, fixtures, and `run.sh`, which says how to run them.
//! Nothing in it needs a path of the machine that made it. GPU tests are found, not listed: every test target whose
//! sources name one of [`MARKS`].

use crate::kernels::nvcc;
use crate::shell::{self, cargo, output, root, target};
use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;
use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

/// What a test that needs a GPU, or the command on its own, cannot do without.
const MARKS: [&str; 3] = ["testing::gpu", "MOE_LORA_REQUIRE_GPU", "MOE_LORA_BIN"];
const MOST_BYTES: u64 = 64 << 20;
const RUN: &str = include_str!("bundle/run.sh");
/// How every fatbin begins.
const FATBIN: [u8; 4] = [0x50, 0xed, 0x55, 0xba];

/// A test target: its package, `--test NAME` or `--lib`, and its name.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
struct Target {
    package: String,
    kind: String,
    name: String,
}

pub(crate) fn run(words: &[&str]) -> Result<()> {
    let folder = match words {
        [] => root().join("target/bundle"),
        [folder] => PathBuf::from(folder),
        other => bail!("unknown arguments of bundle: {}", other.join(" ")),
    };
    ensure!(nvcc::find(&root()).is_some(), "no nvcc: install one with `cargo xtask toolkit`, or set NVCC");
    if folder.exists() {
        let ours = folder.join("run.sh").exists() || fs::read_dir(&folder)?.next().is_none();
        ensure!(ours, "{} exists and is no bundle", folder.display());
        fs::remove_dir_all(&folder)?;
    }
    // First, so that the next run knows this folder even if this run is stopped.
    fs::create_dir_all(&folder)?;
    fs::write(folder.join("run.sh"), RUN)?;
    executable(&folder.join("run.sh"))?;
    let tests = gpu_tests()?;
    for (target, program) in build_tests(&tests)? {
        install_test(&program, &folder.join("tests").join(format!("{}-{}", target.package, target.name)))?;
    }
    let mut programs = cargo(&["build", "--release", "--message-format", "json-render-diagnostics"]);
    programs.args(["-p", "moe-lora-cli", "-p", "moe-lora-bench", "-p", "moe-lora-c"]);
    for (target, program) in executables(&mut programs)? {
        install(&program, &folder.join("bin").join(target.name))?;
    }
    let library = "libmoe_lora_c.so";
    install(&target().join("release").join(library), &folder.join("lib").join(library))?;
    fs::copy(root().join("crates/moe-lora-c/include/moe_lora.h"), folder.join("lib/moe_lora.h"))?;
    copy(&root().join("crates/moe-lora-bench/peers"), &folder.join("peers"))?;
    copy(&root().join("docs/benchmarks/peers"), &folder.join("peers/rows"))?;
    copy(&root().join("crates/moe-lora/tests/golden"), &folder.join("golden"))?;
    copy(&root().join("crates/moe-lora-generate/tests/golden"), &folder.join("golden-generate"))?;
    let bytes = size(&folder)?;
    ensure!(bytes < MOST_BYTES, "{} takes {bytes} bytes, at most {MOST_BYTES}", folder.display());
    println!("bundle: {} GPU test programs, {:.1} MB in {}", tests.len(), bytes as f64 / 1e6, folder.display());
    Ok(())
}

/// Every test target whose sources, or the modules they name, hold a mark.
fn gpu_tests() -> Result<BTreeSet<Target>> {
    let metadata: Value =
        serde_json::from_str(&output(&mut cargo(&["metadata", "--format-version", "1", "--no-deps"]))?)?;
    let mut found = BTreeSet::new();
    for package in metadata["packages"].as_array().context("packages")? {
        let package_name = package["name"].as_str().context("a package's name")?;
        for target in package["targets"].as_array().context("targets")? {
            let kind = target["kind"][0].as_str().unwrap_or_default();
            let path = Path::new(target["src_path"].as_str().context("a target's source")?);
            let tested = target["test"] == true && package_name != "xtask";
            if tested && !marked(path)?.is_empty() {
                let name = target["name"].as_str().context("a target's name")?;
                let kind = if kind == "test" { "test" } else { "lib" };
                found.insert(Target { package: package_name.into(), kind: kind.into(), name: name.into() });
            }
        }
    }
    Ok(found)
}

/// The files with a mark among `file` and the modules below it.
fn marked(file: &Path) -> Result<Vec<PathBuf>> {
    let text = fs::read_to_string(file).with_context(|| file.display().to_string())?;
    let mut found = Vec::new();
    if MARKS.iter().any(|mark| text.contains(mark)) && !file.ends_with("moe-lora-cuda/src/testing.rs") {
        found.push(file.to_owned());
    }
    let folder = file.parent().unwrap_or(Path::new(""));
    let stem = file.file_stem().unwrap_or_default();
    let mut named = None;
    for line in text.lines().map(str::trim) {
        if let Some(path) = line.strip_prefix("#[path = \"").and_then(|l| l.strip_suffix("\"]")) {
            named = Some(folder.join(path));
        } else if let Some(module) = line.strip_suffix(';').and_then(|l| l.rsplit_once("mod ")).map(|(_, name)| name) {
            let below = folder.join(stem);
            let places = [folder, &below].map(|f| [f.join(format!("{module}.rs")), f.join(module).join("mod.rs")]);
            let place = named.take().or_else(|| places.into_iter().flatten().find(|p| p.is_file()));
            if let Some(place) = place.filter(|p| p.is_file() && p != file) {
                found.extend(marked(&place)?);
            }
        }
    }
    Ok(found)
}

fn build_tests(tests: &BTreeSet<Target>) -> Result<BTreeMap<Target, PathBuf>> {
    let mut build = cargo(&["test", "--release", "--no-run", "--message-format", "json-render-diagnostics"]);
    for target in tests {
        build.args(["-p", &target.package]);
        match target.kind.as_str() {
            "test" => build.args(["--test", &target.name]),
            _ => build.arg("--lib"),
        };
    }
    let mut built = executables(&mut build)?;
    built.retain(|target, _| tests.contains(target));
    for target in tests {
        ensure!(built.contains_key(target), "cargo made no program of {target:?}");
    }
    Ok(built)
}

/// Runs cargo and returns the programs that it made.
fn executables(command: &mut Command) -> Result<BTreeMap<Target, PathBuf>> {
    let mut programs = BTreeMap::new();
    for line in output(command)?.lines() {
        let message: Value = serde_json::from_str(line)?;
        let Some(program) = message["executable"].as_str() else { continue };
        let manifest: PathBuf = message["manifest_path"].as_str().unwrap_or_default().into();
        let folder = manifest.parent().and_then(Path::file_name).unwrap_or_default();
        let kind = message["target"]["kind"][0].as_str().unwrap_or_default();
        let target = Target {
            package: folder.to_string_lossy().into_owned(),
            kind: if kind == "test" || kind == "bin" { kind } else { "lib" }.to_owned(),
            name: message["target"]["name"].as_str().unwrap_or_default().to_owned(),
        };
        programs.insert(target, program.into());
    }
    Ok(programs)
}

/// Copies a program without its symbols, and makes sure that it brings its kernels.
fn install(program: &Path, to: &Path) -> Result<()> {
    let kernels = strip(program, to)?;
    ensure!(kernels, "{}: no kernel image; was nvcc there when it was built?", to.display());
    Ok(())
}

/// [`install`] for a test. One without kernels opens no GPU: it is left out, unless it starts the command, which does.
fn install_test(program: &Path, to: &Path) -> Result<()> {
    if !strip(program, to)? && !holds(&fs::read(to)?, b"MOE_LORA_BIN") {
        println!("bundle: {} opens no GPU", to.display());
        fs::remove_file(to)?;
    }
    Ok(())
}

/// Copies a program without its symbols; whether it brings kernels.
fn strip(program: &Path, to: &Path) -> Result<bool> {
    fs::create_dir_all(to.parent().context("a folder")?)?;
    shell::run(Command::new("strip").arg("-o").arg(to).arg(program))?;
    Ok(holds(&fs::read(to)?, &FATBIN))
}

fn holds(bytes: &[u8], what: &[u8]) -> bool {
    bytes.windows(what.len()).any(|window| window == what)
}

fn copy(from: &Path, to: &Path) -> Result<()> {
    fs::create_dir_all(to)?;
    for entry in fs::read_dir(from).with_context(|| from.display().to_string())? {
        let path = entry?.path();
        let to = to.join(path.file_name().unwrap_or_default());
        if path.is_dir() {
            copy(&path, &to)?;
        } else {
            fs::copy(&path, &to)?;
        }
    }
    Ok(())
}

fn size(folder: &Path) -> Result<u64> {
    fs::read_dir(folder)?.try_fold(0, |sum, entry| {
        let path = entry?.path();
        Ok(sum + if path.is_dir() { size(&path)? } else { fs::metadata(&path)?.len() })
    })
}

#[cfg(unix)]
fn executable(path: &Path) -> Result<()> {
    use std::os::unix::fs::PermissionsExt;
    Ok(fs::set_permissions(path, fs::Permissions::from_mode(0o755))?)
}

#[cfg(not(unix))]
fn executable(_: &Path) -> Result<()> {
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Every file below a `tests` folder that opens a GPU is part of a program that the bundle carries.
    #[test]
    fn no_gpu_test_is_forgotten() {
        let found = gpu_tests().unwrap();
        let crates = root().join("crates");
        let mut checked = 0;
        for entry in fs::read_dir(crates).unwrap() {
            let package = entry.unwrap().path();
            let name = package.file_name().unwrap().to_string_lossy().into_owned();
            let Ok(tests) = fs::read_dir(package.join("tests")) else { continue };
            for file in tests.map(|e| e.unwrap().path()).filter(|p| p.extension().is_some_and(|e| e == "rs")) {
                let text = fs::read_to_string(&file).unwrap();
                let opens = ["Gpu::open", "Device::cuda", "testing::", "cuda:0"].iter().any(|w| text.contains(w));
                let stem = file.file_stem().unwrap().to_string_lossy().into_owned();
                let target = Target { package: name.clone(), kind: "test".into(), name: stem };
                assert!(!opens || found.contains(&target), "{} is in no bundle", file.display());
                checked += usize::from(opens);
            }
        }
        assert!(checked > 4, "{checked}: are the tests elsewhere now?");
        assert!(found.iter().any(|t| t.package == "moe-lora-cli" && t.name == "command"), "{found:?}");
    }
}
