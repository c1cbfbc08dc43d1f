//! The command line.

use clap::{Parser, Subcommand};
use moe_lora::adapter::ExpertLayout;
use std::path::PathBuf;
use std::str::FromStr;

/// Serve many LoRA adapters at once on the expert layers of Mixture-of-Experts models.
#[derive(Parser, Debug)]
#[command(name = "moe-lora", version, arg_required_else_help = true)]
pub(crate) struct Args {
    #[command(subcommand)]
    pub(crate) command: Command,
}

#[derive(Subcommand, Debug)]
pub(crate) enum Command {
    /// Run one MoE layer of a checkpoint on a batch of tokens that each name their own adapter
    Forward(Forward),
    /// Generate text with a whole model (Qwen3-MoE, OLMoE), each prompt with its own adapter, all in one batch
    Generate(Generate),
    /// Say what a checkpoint or an adapter is, or why it is refused; with --pool, what adapters take side by side
    Inspect(Inspect),
    /// List processors and GPUs, and why a GPU cannot be used
    Devices(Devices),
    /// Make a small model and adapters on disk, serve a mixed batch and check it
    Demo(Demo),
}

#[derive(clap::Args, Debug)]
pub(crate) struct Forward {
    /// Hugging Face checkpoint folder: config.json, *.safetensors
    #[arg(long, value_name = "DIR")]
    pub(crate) model: PathBuf,
    /// Absolute decoder layer [default: the first MoE layer]
    #[arg(long, value_name = "N")]
    pub(crate) layer: Option<usize>,
    /// PEFT adapter folder under a name; may be repeated, `adapter_index` counts them from 0
    #[arg(long = "adapter", value_name = "NAME=DIR")]
    pub(crate) adapters: Vec<NamedAdapter>,
    /// direct or transposed: which way round target_parameters tensors are, where neither shapes nor peft_version tell
    #[arg(long, value_name = "LAYOUT", value_parser = expert_layout)]
    pub(crate) expert_layout: Option<ExpertLayout>,
    /// safetensors with hidden_states [T,H]; optional adapter_index [T], topk_ids [T,k], topk_weights [T,k]
    #[arg(long, value_name = "FILE")]
    pub(crate) input: PathBuf,
    /// safetensors to write: hidden_states [T,H] f32, topk_ids, topk_weights
    #[arg(long, value_name = "FILE")]
    pub(crate) output: PathBuf,
    /// auto (GPU 0 if it can be used, else the CPU), cpu or cuda:N
    #[arg(long, default_value = "auto")]
    pub(crate) device: DeviceChoice,
    /// Split the intermediate size over N tensor-parallel ranks
    #[arg(long, value_name = "N", default_value_t = 1, conflicts_with = "reference")]
    pub(crate) tp: usize,
    /// Split the experts over M expert-parallel ranks, each a group of N; ranks are threads, on a GPU each if there are as many
    #[arg(long, value_name = "M", default_value_t = 1, conflicts_with = "reference")]
    pub(crate) ep: usize,
    /// Cut all six matrices of adapters over the N tensor-parallel ranks, which then exchange what lies between A and B
    #[arg(long, conflicts_with = "reference")]
    pub(crate) fully_sharded: bool,
    /// Compute in f64, slowly: the truth that everything else is compared with
    #[arg(long)]
    pub(crate) reference: bool,
}

#[derive(clap::Args, Debug)]
pub(crate) struct Generate {
    /// Hugging Face checkpoint folder: config.json, *.safetensors, tokenizer.json
    #[arg(long, value_name = "DIR")]
    pub(crate) model: PathBuf,
    /// PEFT adapter folder under a name; may be repeated; read when a request first asks for it
    #[arg(long = "adapter", value_name = "NAME=DIR")]
    pub(crate) adapters: Vec<NamedAdapter>,
    /// direct or transposed: which way round target_parameters tensors are, where neither shapes nor peft_version tell
    #[arg(long, value_name = "LAYOUT", value_parser = expert_layout)]
    pub(crate) expert_layout: Option<ExpertLayout>,
    /// A text to go on with; may be repeated; "NAME: TEXT" uses the adapter NAME
    #[arg(long = "prompt", value_name = "TEXT", required_unless_present = "requests", conflicts_with = "requests")]
    pub(crate) prompts: Vec<String>,
    /// JSON lines: prompt or prompt_tokens; optional id, adapter, max_tokens, temperature, top_p, seed
    #[arg(long, value_name = "FILE.jsonl")]
    pub(crate) requests: Option<PathBuf>,
    /// Where the results of --requests go, a JSON line each, as they are done [default: standard output]
    #[arg(long, value_name = "FILE.jsonl", requires = "requests")]
    pub(crate) output: Option<PathBuf>,
    /// New tokens a text, at most
    #[arg(long, value_name = "N", default_value_t = 128)]
    pub(crate) max_tokens: usize,
    /// 0 takes the best token always
    #[arg(long, value_name = "T", default_value_t = 0.0)]
    pub(crate) temperature: f32,
    /// Draw among the likeliest tokens that make up this probability
    #[arg(long, value_name = "P", default_value_t = 1.0)]
    pub(crate) top_p: f32,
    /// Of the draws
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub(crate) seed: u64,
    /// Texts that are generated at once; the others wait
    #[arg(long, value_name = "N", default_value_t = 64)]
    pub(crate) max_batch: usize,
    /// Memory for adapters, in MiB; the least recently used go when it is full
    #[arg(long, value_name = "MIB", default_value_t = 4096)]
    pub(crate) adapter_memory: usize,
    /// Memory for what the running texts have seen, in MiB
    #[arg(long, value_name = "MIB", default_value_t = 4096)]
    pub(crate) cache_memory: usize,
    /// Where the experts run: auto (GPU 0 if it can be used, else the CPU), cpu or cuda:N
    #[arg(long, default_value = "auto")]
    pub(crate) device: DeviceChoice,
}

#[derive(clap::Args, Debug)]
pub(crate) struct Inspect {
    /// Checkpoint folder; together with --adapter, the model that the adapter is for
    #[arg(long, value_name = "DIR", required_unless_present = "adapter")]
    pub(crate) model: Option<PathBuf>,
    /// PEFT adapter folder
    #[arg(long, value_name = "DIR")]
    pub(crate) adapter: Option<PathBuf>,
    /// Load an adapter into a pool in host memory and say what that holds in the end; may be repeated
    #[arg(long, value_name = "NAME=DIR", requires = "model", conflicts_with = "adapter")]
    pub(crate) pool: Vec<NamedAdapter>,
    /// Memory of that pool, in MiB; the least recently loaded go when it is full
    #[arg(long, value_name = "MIB", default_value_t = 4096, requires = "pool")]
    pub(crate) adapter_memory: usize,
    /// direct or transposed: which way round target_parameters tensors are, where neither shapes nor peft_version tell
    #[arg(long, value_name = "LAYOUT", value_parser = expert_layout)]
    pub(crate) expert_layout: Option<ExpertLayout>,
    /// Print JSON
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(clap::Args, Debug)]
pub(crate) struct Devices {
    /// Print JSON
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(clap::Args, Debug)]
pub(crate) struct Demo {
    /// Keep the model and adapters in this new folder [default: a temporary one, removed afterwards]
    #[arg(long, value_name = "DIR")]
    pub(crate) dir: Option<PathBuf>,
}

/// `NAME=DIR`.
#[derive(Debug, Clone)]
pub(crate) struct NamedAdapter {
    pub(crate) name: String,
    pub(crate) dir: PathBuf,
}

impl FromStr for NamedAdapter {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text.split_once('=') {
            Some((name, dir)) if !name.is_empty() && !dir.is_empty() => {
                Ok(Self { name: name.to_owned(), dir: PathBuf::from(dir) })
            }
            _ => Err("expected NAME=DIR".to_owned()),
        }
    }
}

fn expert_layout(text: &str) -> Result<ExpertLayout, String> {
    match text {
        "direct" => Ok(ExpertLayout::Direct),
        "transposed" => Ok(ExpertLayout::Transposed),
        _ => Err("expected direct or transposed".to_owned()),
    }
}

/// Where to run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum DeviceChoice {
    Auto,
    Cpu,
    Cuda(usize),
}

impl FromStr for DeviceChoice {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let ordinal = |n: &str| n.parse().ok().map(Self::Cuda);
        match text {
            "auto" => Some(Self::Auto),
            "cpu" => Some(Self::Cpu),
            "cuda" => Some(Self::Cuda(0)),
            _ => text.strip_prefix("cuda:").and_then(ordinal),
        }
        .ok_or_else(|| "expected auto, cpu or cuda:N".to_owned())
    }
}
