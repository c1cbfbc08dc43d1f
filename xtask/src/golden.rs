//! `cargo xtask golden`: rebuilds the fixtures from Hugging Face's own code, see `xtask/golden/README.md`.

use crate::shell::{self, root};
use anyhow::Result;
use std::path::{Path, PathBuf};
use std::process::Command;

/// Two generations of transformers, and on the newer one three of PEFT: adapters of all of them are in the field, and
/// they differ. The order is the one that `build.py` asks for.
const STAGES: [(&str, Option<&str>); 4] =
    [("old", None), ("new", Some("peft018")), ("new", Some("peft019")), ("new", None)];

pub(crate) fn run() -> Result<()> {
    let scripts = root().join("xtask/golden");
    let out = root().join("crates/moe-lora/tests/golden");
    for (environment, peft) in STAGES {
        let python = python(&scripts, environment)?;
        let mut build = Command::new(&python);
        build.arg(scripts.join("build.py")).arg("--out").arg(&out).args(["--stage", peft.unwrap_or(environment)]);
        if let Some(peft) = peft {
            build.env("PYTHONPATH", older_peft(&scripts, &python, peft)?);
        }
        shell::run(&mut build)?;
    }
    let mut whole = Command::new(python(&scripts, "new")?);
    shell::run(
        whole.arg(scripts.join("whole.py")).arg("--out").arg(root().join("crates/moe-lora-generate/tests/golden")),
    )
}

/// A virtual environment under `target/golden` with the pinned packages; returns its interpreter.
fn python(scripts: &Path, environment: &str) -> Result<PathBuf> {
    let folder = root().join("target/golden").join(environment);
    let python = folder.join(if cfg!(windows) { "Scripts/python.exe" } else { "bin/python" });
    if !python.exists() {
        shell::run(Command::new("python3").args(["-m", "venv"]).arg(&folder))?;
    }
    install(&python, scripts, environment, &[])?;
    Ok(python)
}

/// An older PEFT in a folder of its own, to stand before the environment's.
fn older_peft(scripts: &Path, python: &Path, peft: &str) -> Result<PathBuf> {
    let folder = root().join("target/golden").join(peft);
    if !folder.exists() {
        install(python, scripts, peft, &["--no-deps", "--target", &folder.display().to_string()])?;
    }
    Ok(folder)
}

fn install(python: &Path, scripts: &Path, requirements: &str, extra: &[&str]) -> Result<()> {
    let file = scripts.join(format!("requirements-{requirements}.txt"));
    shell::run(
        Command::new(python).args(["-m", "pip", "install", "--quiet"]).args(extra).arg("--requirement").arg(file),
    )
}
