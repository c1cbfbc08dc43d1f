//! `cargo xtask <command>`: everything that is done with this repository, one file per command.
#![forbid(unsafe_code)]
#![allow(clippy::print_stdout, clippy::print_stderr, reason = "a command line speaks")]

mod bench;
mod bundle;
mod ci;
mod golden;
mod kernels;
mod sass;
mod shell;
mod test;
mod tidy;
mod toolkit;

use anyhow::{Result, bail};
use std::process::ExitCode;

const USAGE: &str = "\
cargo xtask <command>

  test              everything that can be tested on this machine
  ci                what must pass before a change lands: fmt, clippy, docs, tests, tidy, packages
  tidy              the house rules: imports between crates, file sizes, module docs, unsafe, READMEs
  toolkit           install the pinned CUDA compiler into target/ from the Python package index
  kernels           build the CUDA images; registers, shared memory and spills of every kernel [--prebuilt: for packages]
  sass              fail on spills, local memory and stacks in the built images
  golden            rebuild the fixtures from transformers and PEFT (needs Python and 12 GB of disk)
  bundle            GPU tests, command, benchmark and fixtures in one folder, for a GPU machine without Rust [FOLDER]
  bench --cpu       time the layer on this processor [--torch PYTHON: transformers and PEFT in the same run] [--json FILE]
  bench --gpu       time layers on a GPU, with their share of what the card can do: `--gpu --help` lists shapes and options
  bench --peers     the same layers through the C library and PyTorch, beside rows of vLLM and SGLang; runs those that are
                    named, in the same process [vllm] [sglang_0510] [sglang_0523_triton] [sglang_0523_cutedsl]
  bench --plot RUN FOLDER [PEERS]..., --compare RUN PEERS...
                    draw what `--gpu --json RUN` wrote, or put it beside other systems
";

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    match run(&args.iter().map(String::as_str).collect::<Vec<_>>()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(words: &[&str]) -> Result<()> {
    match words {
        ["test", rest @ ..] => test::run(rest),
        ["ci"] => ci::run(),
        ["tidy"] => tidy::run(),
        ["toolkit", rest @ ..] => toolkit::run(rest),
        ["kernels", rest @ ..] => kernels::run(rest),
        ["sass", rest @ ..] => sass::run(rest),
        ["golden"] => golden::run(),
        ["bundle", rest @ ..] => bundle::run(rest),
        ["bench", rest @ ..] => bench::run(rest),
        [] | ["help" | "--help" | "-h"] => {
            print!("{USAGE}");
            Ok(())
        }
        other => bail!("unknown command: {}\n\n{USAGE}", other.join(" ")),
    }
}
