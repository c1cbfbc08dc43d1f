//! `cargo xtask ci`: what must pass before a change lands, the same on every machine.

use crate::shell::{self, cargo, root};
use crate::{sass, test, tidy, toolkit};
use anyhow::Result;
use std::time::SystemTime;

pub(crate) fn run() -> Result<()> {
    shell::run(&mut cargo(&["fmt", "--all", "--check"]))?;
    tidy::run()?;
    toolkit::run(&[])?;
    // Builds the kernels too, and prints what each of them needs.
    sass::run(&[])?;
    shell::run(&mut cargo(&["clippy", "--workspace", "--all-targets", "--all-features", "--", "-D", "warnings"]))?;
    let docs = ["doc", "--workspace", "--no-deps", "--all-features"];
    shell::run(cargo(&docs).env("RUSTDOCFLAGS", "-D warnings"))?;
    test::run(&[])?;
    packages()
}

/// Every crate must build from what would be published, by itself. Cargo unpacks the packages once for each folder that
/// they are made in and never looks again, so each run needs a folder of its own.
fn packages() -> Result<()> {
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH)?.as_nanos();
    let folder = root().join(format!("target/packages-{now}"));
    let done = shell::run(cargo(&["package", "--workspace", "--allow-dirty", "--target-dir"]).arg(&folder));
    std::fs::remove_dir_all(&folder).ok();
    done
}
