//! `cargo xtask bench --cpu`: the layer on this processor, one line a row, Criterion underneath. `--gpu`, `--pool`, `--plot`
//! and `--compare` are `moe-lora-bench`'s, which also stands in the bundle.

use crate::shell::{cargo, output, root, run as run_command, target};
use anyhow::{Context, Result, bail};
use serde_json::{Value, json};
use std::path::Path;
use std::process::Command;

struct Options<'a> {
    torch: Option<&'a str>,
    json: Option<&'a str>,
}

pub(crate) fn run(args: &[&str]) -> Result<()> {
    if let [command @ ("--gpu" | "--pool" | "--plot" | "--compare"), rest @ ..] = args {
        let mut program = cargo(&["run", "--quiet", "--release", "-p", "moe-lora-bench", "--"]);
        return run_command(program.arg(&command[2..]).args(rest));
    }
    if let ["--peers", rest @ ..] = args {
        return peers(rest);
    }
    let options = parse(args)?;
    run_command(&mut cargo(&["bench", "--quiet", "-p", "moe-lora-bench", "--bench", "cpu"]))?;
    let rows = rows()?;
    let peers = options.torch.map(torch).transpose()?;
    print(&rows, peers.as_ref());
    if let Some(path) = options.json {
        let all = json!({ "moe-lora": rows, "transformers": peers });
        std::fs::write(path, serde_json::to_vec_pretty(&all)?).with_context(|| path.to_owned())?;
    }
    Ok(())
}

fn parse<'a>(args: &[&'a str]) -> Result<Options<'a>> {
    let mut options = Options { torch: None, json: None };
    let (mut cpu, mut rest) = (false, args);
    while let [first, tail @ ..] = rest {
        rest = match (*first, tail) {
            ("--cpu", _) => {
                cpu = true;
                tail
            }
            ("--torch", [python, tail @ ..]) => {
                options.torch = Some(python);
                tail
            }
            ("--json", [path, tail @ ..]) => {
                options.json = Some(path);
                tail
            }
            _ => bail!("bench: unknown or incomplete option {first}"),
        };
    }
    if !cpu {
        bail!("bench: --cpu, --gpu, --pool, --peers, --plot or --compare");
    }
    Ok(options)
}

/// Times us through the C library on PyTorch's tensors (`PYTHON` names the interpreter) and, in the same process, the systems that
/// are named first, from their published packages; prints how they compare with us, and those whose rows lie in
/// `docs/benchmarks/peers`. The other arguments are those of `bench_peer.py`.
fn peers(arguments: &[&str]) -> Result<()> {
    run_command(&mut cargo(&["build", "--release", "-p", "moe-lora-c", "-p", "moe-lora-bench"]))?;
    let (scripts, packages) = (root().join("crates/moe-lora-bench/peers"), target().join("peers"));
    let rows = packages.join("rows");
    let python = |script: &str| {
        let mut python = Command::new(std::env::var_os("PYTHON").unwrap_or_else(|| "python3".into()));
        python.arg(scripts.join(script));
        python
    };
    let systems = arguments.iter().take_while(|word| !word.starts_with("--")).count();
    let systems = &arguments[..systems];
    if !systems.is_empty() {
        run_command(python("prepare.py").arg(&packages).args(systems))?;
    }
    let mut harness = python("bench_peer.py");
    harness.arg(&rows).arg("moe_lora").args(arguments).env("PEERS", &packages);
    harness.env("MOE_LORA_HEADER", root().join("crates/moe-lora-c/include/moe_lora.h"));
    run_command(harness.env("MOE_LORA_LIB", target().join("release/libmoe_lora_c.so")))?;
    let json = |name: &str| rows.join(format!("{name}.json"));
    let mut compare = Command::new(target().join("release/moe-lora-bench"));
    compare
        .arg("compare")
        .arg(json("moe_lora"))
        .args(systems.iter().map(|name| json(name)).filter(|rows| rows.exists()));
    for entry in std::fs::read_dir(root().join("docs/benchmarks/peers"))? {
        compare.args(Some(entry?.path()).filter(|path| path.extension().is_some_and(|e| e == "json")));
    }
    run_command(&mut compare)
}

/// Joins Criterion's medians with the work that each row counts for.
fn rows() -> Result<Vec<Value>> {
    let folder = target().join("criterion/olmoe");
    let mut rows: Vec<Value> = read(&folder.join("cpu-rows.json"))?;
    for row in &mut rows {
        let id = row["id"].as_str().unwrap_or_default();
        let estimates: Value = read(&folder.join(id).join("new/estimates.json"))?;
        let nanoseconds = estimates["median"]["point_estimate"].as_f64().context("a median")?;
        let per_second = |count: &Value| count.as_f64().unwrap_or(0.0) / nanoseconds;
        let (gb_s, gflop_s) = (per_second(&row["bytes"]), per_second(&row["flops"]));
        row["us"] = json!(nanoseconds / 1e3);
        row["gb_s"] = json!(gb_s);
        row["gflop_s"] = json!(gflop_s);
    }
    Ok(rows)
}

fn read<T: serde::de::DeserializeOwned>(path: &Path) -> Result<T> {
    let text = std::fs::read(path).with_context(|| path.display().to_string())?;
    serde_json::from_slice(&text).with_context(|| path.display().to_string())
}

/// Times transformers' own layer, base only and with PEFT adapters, on the same processor.
fn torch(python: &str) -> Result<Value> {
    let mut script = Command::new(python);
    script.arg(root().join("xtask/bench/torch_cpu.py"));
    Ok(serde_json::from_str(&output(&mut script)?)?)
}

fn print(rows: &[Value], peers: Option<&Value>) {
    println!("OLMoE layer (E 64, k 8, H 2048, I 1024), bf16; lora: 4 adapters of rank 16 mixed with base tokens");
    println!(
        "{:<10} {:>10} {:>9} {:>8} {:>10} {:>16} {:>12}",
        "row", "us", "GFLOP/s", "GB/s", "over base", "transformers us", "their PEFT us"
    );
    let number = |v: &Value| v.as_f64().unwrap_or(f64::NAN);
    let mut base = f64::NAN;
    for row in rows {
        let id = row["id"].as_str().unwrap_or_default();
        let us = number(&row["us"]);
        let over = if id.ends_with("base") {
            base = us;
            String::new()
        } else {
            format!("{:+.1} %", 100.0 * (us / base - 1.0))
        };
        let peer = peers.map(|p| &p[row["tokens"].to_string()]);
        let cell = |key: &str| peer.map_or("-".to_owned(), |p| format!("{:.0}", number(&p[key])));
        println!(
            "{id:<10} {us:>10.0} {:>9.1} {:>8.1} {over:>10} {:>16} {:>12}",
            number(&row["gflop_s"]),
            number(&row["gb_s"]),
            cell("base_us"),
            cell("peft_us"),
        );
    }
}
