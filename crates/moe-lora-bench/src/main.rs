//! `moe-lora-bench`: times layers on a GPU, draws what it found, and compares it with other systems.
#![allow(clippy::print_stdout, reason = "a command line speaks")]

mod arguments;
mod gpu;

use anyhow::{Context, Result};
use arguments::{Arguments, Command};
use clap::Parser;
use moe_lora_bench::{Peers, compare, plots, plots_beside, steps};
use serde::de::DeserializeOwned;
use std::fs;
use std::path::{Path, PathBuf};

fn main() -> Result<()> {
    match Arguments::parse().command {
        Command::Gpu(arguments) => gpu::run(&arguments),
        Command::Pool(arguments) => gpu::pool::run(&arguments),
        Command::Ranks(arguments) => gpu::ranks::run(&arguments),
        Command::Plot { run, folder, peers } => {
            fs::create_dir_all(&folder).with_context(|| folder.display().to_string())?;
            let files = match peers.is_empty() {
                true => plots(&read(&run)?),
                false => plots_beside(&read(&run)?, &read_all(&peers)?, 8, 16),
            };
            for (name, svg) in files {
                fs::write(folder.join(name), svg)?;
            }
            Ok(())
        }
        Command::Steps { run } => {
            print!("{}", steps(&read(&run)?));
            Ok(())
        }
        Command::Compare { run, peers } => {
            print!("{}", compare(&read(&run)?, &read_all(&peers)?));
            Ok(())
        }
    }
}

fn read_all(paths: &[PathBuf]) -> Result<Vec<Peers>> {
    paths.iter().map(|path| read(path)).collect()
}

fn read<T: DeserializeOwned>(path: &Path) -> Result<T> {
    let text = fs::read(path).with_context(|| path.display().to_string())?;
    serde_json::from_slice(&text).with_context(|| path.display().to_string())
}
