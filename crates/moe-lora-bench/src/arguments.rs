//! The command line.

use anyhow::{Result, bail, ensure};
use clap::{Args, Parser, Subcommand, ValueEnum};
use moe_lora::{LayerShape, Shard};
use moe_lora_bench::{AdapterSet, Ceilings, PRESETS, TOKENS};
use moe_lora_kernels::Format;
use moe_lora_runner::raw::Path;
use std::path::PathBuf;

/// Benchmarks of moe-lora on an NVIDIA GPU.
#[derive(Debug, Parser)]
#[command(name = "moe-lora-bench")]
pub(crate) struct Arguments {
    #[command(subcommand)]
    pub(crate) command: Command,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Times whole layers: five published shapes, or one of your own.
    Gpu(Box<GpuArguments>),
    /// Times the adapter pool: uploads, forwards while adapters swap, what a budget holds.
    Pool(PoolArguments),
    /// Checks and times a layer over several GPUs, swaps adapters, and lets a rank die.
    Ranks(RanksArguments),
    /// Draws the plots of a run.
    Plot {
        /// What `gpu --json` wrote.
        run: PathBuf,
        /// Where the SVG files go.
        folder: PathBuf,
        /// Rows of other systems: draws everybody's share of the floor with eight adapters of rank 16.
        peers: Vec<PathBuf>,
    },
    /// Finds where time falls or jumps from one batch size of a run to the next.
    Steps {
        /// What `gpu --json` wrote.
        run: PathBuf,
    },
    /// Puts a run beside rows of other systems.
    Compare {
        /// What `gpu --json` wrote.
        run: PathBuf,
        /// Files with rows of other systems, as in docs/benchmarks/peers; the first one that has a system counts.
        #[arg(required = true)]
        peers: Vec<PathBuf>,
    },
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum DTypeName {
    Bf16,
    F16,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum PathName {
    Layer,
    Decode,
    Portable,
    Prefill,
}

#[derive(Debug, Args)]
pub(crate) struct GpuArguments {
    /// Layers by name (all five without any name or size).
    #[arg(long, value_delimiter = ',', value_name = "NAME")]
    pub(crate) preset: Vec<String>,
    /// Experts of a layer of your own, E.
    #[arg(long, requires_all = ["top_k", "hidden", "intermediate"], conflicts_with = "preset")]
    pub(crate) experts: Option<usize>,
    /// Experts a token uses, k.
    #[arg(long, requires = "experts")]
    pub(crate) top_k: Option<usize>,
    /// Width of a token, H.
    #[arg(long, requires = "experts")]
    pub(crate) hidden: Option<usize>,
    /// Width inside an expert, I.
    #[arg(long, requires = "experts")]
    pub(crate) intermediate: Option<usize>,
    /// Divides the width inside an expert, as tensor parallelism over so many GPUs does.
    #[arg(long, default_value_t = 1, value_name = "GPUS")]
    pub(crate) tp_shard: usize,
    /// Divides the experts, as expert parallelism over so many GPUs does: the rank in the middle, with all tokens.
    #[arg(long, default_value_t = 1, value_name = "GPUS")]
    pub(crate) ep_shard: usize,
    /// Batch sizes.
    #[arg(long, value_delimiter = ',', default_values_t = TOKENS)]
    pub(crate) tokens: Vec<usize>,
    /// Adapters of a batch; 0 is the plain layer alone (four sets without this and --ranks).
    #[arg(long)]
    pub(crate) adapters: Option<usize>,
    /// Their ranks, in turns.
    #[arg(long, value_delimiter = ',')]
    pub(crate) ranks: Vec<usize>,
    /// Share of the tokens that use no adapter.
    #[arg(long, default_value_t = 0.0)]
    pub(crate) base_share: f64,
    /// Sizes of the adapter table to time; what the adapters leave is empty.
    #[arg(long, value_delimiter = ',')]
    pub(crate) slots: Vec<usize>,
    /// How much more the last expert's logit is than the first one's; logits have deviation 1.
    #[arg(long, default_value_t = 1.5)]
    pub(crate) skew: f32,
    /// Format of activations, weights and adapters.
    #[arg(long, value_enum, default_value = "bf16")]
    dtype: DTypeName,
    /// Kernels to run, in turns, instead of those that are fastest; batches that they cannot run are left out.
    #[arg(long, value_enum, value_delimiter = ',')]
    path: Vec<PathName>,
    /// Times each kernel alone, too.
    #[arg(long)]
    pub(crate) stages: bool,
    /// Tokens of each batch that are compared with the f64 reference; 0 for none.
    #[arg(long, default_value_t = 4)]
    pub(crate) check_tokens: usize,
    /// TB/s and TFLOP/s to compute floors with, instead of measuring them.
    #[arg(long, value_names = ["READ", "PEAK"], num_args = 2)]
    ceilings: Vec<f64>,
    /// The GPU.
    #[arg(long, default_value_t = 0)]
    pub(crate) device: usize,
    /// Writes the run there.
    #[arg(long)]
    pub(crate) json: Option<PathBuf>,
}

#[derive(Debug, Args)]
pub(crate) struct PoolArguments {
    /// The layers, by name.
    #[arg(long, default_value = "qwen3-30b", value_name = "NAME")]
    pub(crate) preset: String,
    /// Layers that an adapter changes.
    #[arg(long, default_value_t = 6)]
    pub(crate) layers: usize,
    /// Rank of the adapters.
    #[arg(long, default_value_t = 16)]
    pub(crate) rank: usize,
    /// Tokens of the batch that runs meanwhile.
    #[arg(long, default_value_t = 16)]
    pub(crate) tokens: usize,
    /// The GPU.
    #[arg(long, default_value_t = 0)]
    pub(crate) device: usize,
}

#[derive(Debug, Args)]
pub(crate) struct RanksArguments {
    /// Tensor-parallel ranks.
    #[arg(long, default_value_t = 2)]
    pub(crate) tp: usize,
    /// Groups of them, each with its own experts.
    #[arg(long, default_value_t = 1)]
    pub(crate) ep: usize,
    /// Cuts all six matrices of adapters over the tensor-parallel ranks.
    #[arg(long)]
    pub(crate) fully_sharded: bool,
    /// A process a rank, not a thread.
    #[arg(long)]
    pub(crate) processes: bool,
    /// Threads on the processor, whatever GPUs there are.
    #[arg(long)]
    pub(crate) cpu: bool,
    /// The layers that are timed, by name.
    #[arg(long, value_delimiter = ',', value_name = "NAME", default_values_t = ["qwen3-30b".to_owned(), "mixtral-8x7b".to_owned()])]
    pub(crate) preset: Vec<String>,
    /// Their batch sizes.
    #[arg(long, value_delimiter = ',', default_values_t = [1, 16, 64, 1024, 8192])]
    pub(crate) tokens: Vec<usize>,
    /// Adapters of a batch.
    #[arg(long, default_value_t = 8)]
    pub(crate) adapters: usize,
    /// Their rank.
    #[arg(long = "adapter-rank", default_value_t = 16)]
    pub(crate) adapter_rank: usize,
    /// Writes what every rank found there.
    #[arg(long)]
    pub(crate) json: Option<PathBuf>,
    /// This process is that rank.
    #[arg(long, hide = true, requires = "meet")]
    pub(crate) rank: Option<usize>,
    /// Where ranks meet.
    #[arg(long, hide = true)]
    pub(crate) meet: Option<PathBuf>,
}

impl RanksArguments {
    /// All ranks.
    pub(crate) fn grid(&self) -> Result<Vec<Shard>> {
        let grid = Shard::grid(self.tp, self.ep)?.into_iter();
        Ok(grid.map(|shard| if self.fully_sharded { shard.with_fully_sharded_adapters() } else { shard }).collect())
    }
}

/// A layer and what to time on it.
#[derive(Debug)]
pub(crate) struct Problem {
    pub(crate) name: String,
    pub(crate) shape: LayerShape,
    pub(crate) tokens: Vec<usize>,
    pub(crate) sets: Vec<AdapterSet>,
}

impl GpuArguments {
    pub(crate) fn problems(&self) -> Result<Vec<Problem>> {
        ensure!(self.tokens.iter().all(|&t| t > 0) && !self.tokens.is_empty(), "--tokens: at least 1");
        ensure!((0.0..=1.0).contains(&self.base_share), "--base-share: from 0 to 1");
        let sets = self.sets()?;
        let problem = |name: &str, [experts, top_k, hidden, intermediate]: [usize; 4]| -> Result<Problem> {
            let shards = self.tp_shard;
            ensure!(shards > 0 && intermediate.is_multiple_of(shards), "--tp-shard: a divisor of {intermediate}");
            let name = if shards > 1 { format!("{name}-tp{shards}") } else { name.to_owned() };
            let groups = self.ep_shard;
            let name = if groups > 1 { format!("{name}-ep{groups}") } else { name };
            let shape = LayerShape::new(experts, top_k, hidden, intermediate / shards)?;
            let shape = Shard::new(0, 1, groups / 2, groups)?.share(&shape)?.shape;
            Ok(Problem { name, shape, tokens: self.tokens.clone(), sets: sets.clone() })
        };
        if let (Some(experts), Some(top_k), Some(hidden), Some(intermediate)) =
            (self.experts, self.top_k, self.hidden, self.intermediate)
        {
            let name = format!("e{experts}-k{top_k}-h{hidden}-i{intermediate}");
            return Ok(vec![problem(&name, [experts, top_k, hidden, intermediate])?]);
        }
        for name in &self.preset {
            if PRESETS.iter().all(|p| p.name != name) {
                bail!("--preset {name}: one of {}", PRESETS.map(|p| p.name).join(", "));
            }
        }
        let chosen = PRESETS.iter().filter(|p| self.preset.is_empty() || self.preset.iter().any(|n| n == p.name));
        chosen.map(|p| problem(p.name, p.sizes)).collect()
    }

    fn sets(&self) -> Result<Vec<AdapterSet>> {
        ensure!(self.ranks.iter().all(|&r| r > 0), "--ranks: at least 1");
        let ranks = if self.ranks.is_empty() { &[16][..] } else { &self.ranks };
        let count = match self.adapters {
            None if self.ranks.is_empty() => return Ok(AdapterSet::presets()),
            None => ranks.len(),
            Some(0) => return Ok(Vec::new()),
            Some(count) => count,
        };
        let ranks = ranks.iter().copied().cycle().take(count).collect();
        Ok(vec![AdapterSet { ranks, base_share: self.base_share }])
    }

    /// The table sizes to time a set with.
    pub(crate) fn slots_of(&self, set: &AdapterSet) -> Vec<usize> {
        let count = set.ranks.len();
        let larger: Vec<usize> = self.slots.iter().copied().filter(|&s| s >= count).collect();
        if count == 0 || larger.is_empty() { vec![count] } else { larger }
    }

    pub(crate) const fn format(&self) -> Format {
        match self.dtype {
            DTypeName::Bf16 => Format::Bf16,
            DTypeName::F16 => Format::F16,
        }
    }

    /// The paths to time; none is the fastest.
    pub(crate) fn paths(&self) -> Vec<Option<Path>> {
        let path = |name: &PathName| match name {
            PathName::Layer => Path::Layer,
            PathName::Decode => Path::Decode,
            PathName::Portable => Path::Portable,
            PathName::Prefill => Path::Prefill,
        };
        if self.path.is_empty() { vec![None] } else { self.path.iter().map(path).map(Some).collect() }
    }

    pub(crate) fn ceilings(&self) -> Option<Ceilings> {
        match self.ceilings[..] {
            [read_tb_s, peak_tflop_s] => Some(Ceilings { read_tb_s, peak_tflop_s }),
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn gpu(words: &[&str]) -> GpuArguments {
        match Arguments::parse_from(["moe-lora-bench", "gpu"].iter().chain(words)).command {
            Command::Gpu(arguments) => *arguments,
            other => unreachable!("{other:?}"),
        }
    }

    #[test]
    fn presets_sizes_and_sets() {
        let all = gpu(&[]).problems().unwrap();
        assert_eq!((all.len(), all[0].tokens.len(), all[0].sets.len()), (5, 8, 4));
        let own =
            "--experts 8 --top-k 2 --hidden 64 --intermediate 32 --tp-shard 2 --tokens 3,5 --adapters 3 --ranks 8,64";
        let own = gpu(&own.split(' ').collect::<Vec<_>>()).problems().unwrap();
        assert_eq!((own[0].name.as_str(), own[0].shape.intermediate_size), ("e8-k2-h64-i32-tp2", 16));
        assert_eq!((own[0].tokens.as_slice(), own[0].sets[0].ranks.as_slice()), (&[3, 5][..], &[8, 64, 8][..]));
        assert!(gpu(&["--adapters", "0", "--preset", "olmoe"]).problems().unwrap()[0].sets.is_empty());
        assert!(gpu(&["--preset", "gpt-5"]).problems().unwrap_err().to_string().contains("qwen3-30b"));
        assert!(gpu(&["--tp-shard", "5"]).problems().is_err() && gpu(&["--tokens", "0"]).problems().is_err());
    }

    #[test]
    fn paths() {
        assert_eq!(gpu(&[]).paths(), [None]);
        assert_eq!(gpu(&["--path", "decode,prefill"]).paths(), [Some(Path::Decode), Some(Path::Prefill)]);
    }

    #[test]
    fn tables_are_never_smaller_than_the_set() {
        let arguments = gpu(&["--slots", "4,8,64"]);
        assert_eq!(arguments.slots_of(&AdapterSet::uniform(8, 16, 0.0)), [8, 64]);
        assert_eq!(arguments.slots_of(&AdapterSet::uniform(0, 0, 0.0)), [0]);
        assert_eq!(gpu(&[]).slots_of(&AdapterSet::uniform(8, 16, 0.0)), [8]);
    }
}
