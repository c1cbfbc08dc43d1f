//! `moe-lora`: run, inspect and demonstrate MoE layers with many LoRA adapters.
//!
//! Exit codes: 0; 1 a run failed; 2 bad input, with one line that names the file, the tensor, what was found and what was
//! expected.
#![forbid(unsafe_code)]
#![allow(clippy::print_stdout, clippy::print_stderr, reason = "a command line speaks")]

mod args;
mod demo;
mod devices;
mod forward;
mod generate;
mod inspect;
mod load;
mod outcome;
mod ranks;
mod table;
mod tensors;

use args::{Args, Command};
use clap::Parser;
use std::process::ExitCode;

fn main() -> ExitCode {
    let done = match Args::parse().command {
        Command::Forward(args) => forward::run(&args),
        Command::Generate(args) => generate::run(&args),
        Command::Inspect(args) => inspect::run(&args),
        Command::Devices(args) => devices::run(&args),
        Command::Demo(args) => demo::run(&args),
    };
    outcome::exit_code(done)
}
