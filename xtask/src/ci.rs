//! `cargo xtask ci`: what must pass before a change lands, the same on every machine.

use crate::shell::{self, cargo};
use crate::{kernels, sass, test, tidy, toolkit};
use anyhow::Result;

pub(crate) fn run() -> Result<()> {
    shell::run(&mut cargo(&["fmt", "--all", "--check"]))?;
    tidy::run()?;
    toolkit::run(&[])?;
    kernels::run(&[])?;
    sass::run(&[])?;
    shell::run(&mut cargo(&["clippy", "--workspace", "--all-targets", "--all-features", "--", "-D", "warnings"]))?;
    let docs = ["doc", "--workspace", "--no-deps", "--all-features"];
    shell::run(cargo(&docs).env("RUSTDOCFLAGS", "-D warnings"))?;
    test::run(&[])?;
    // Every crate must build from what would be published, by itself.
    shell::run(&mut cargo(&["package", "--workspace", "--allow-dirty"]))
}
