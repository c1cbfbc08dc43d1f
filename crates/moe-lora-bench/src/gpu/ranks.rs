//! `moe-lora-bench ranks`: one layer over several GPUs, as threads of a process or a process each.
//!
//! Every rank checks a layer against the f64 truth, serves while adapters are replaced, times captured graphs with and without
//! their sums, and in the end the last rank dies, which must be an error on all others. Where GPUs are missing, ranks are threads
//! that share one, or the processor, and nothing is timed.

use super::clock::Clock;
use super::launch::forward_exchanging;
use super::layer::{Adapters, Layer, Most};
use crate::arguments::RanksArguments;
use anyhow::{Context, Result, anyhow, bail, ensure};
use half::bf16;
use moe_lora::collective::{Communicator, GpuCommunicator, NcclCommunicator, ThreadCommunicator};
use moe_lora::reference::metrics::relative_error;
use moe_lora::reference::random::{AdapterSpec, Case, CaseSpec};
use moe_lora::{
    AdapterId, AdapterPool, AdapterWeights, DType, Device, FusedMoEWithLoRA, LayerShape, ModelShape, PoolConfig,
    Routing, Shard, TokenAdapters,
};
use moe_lora_bench::{AdapterSet, Ceilings, PRESETS, Routes, Touched, draw_slots};
use moe_lora_cuda::{DeviceBuffer, Gpu, Graph, NcclId, Stream};
use moe_lora_kernels::Format;
use moe_lora_runner::raw::{DTYPE_F32, ForwardArgs};
use serde::{Deserialize, Serialize};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// How long ranks wait for each other: to start, and for one that is gone.
const PATIENCE: Duration = Duration::from_secs(20);
/// Replaced adapters that are served.
const SWAPS: usize = 20;
/// Of docs/numerics.md.
const MOST_ERROR: f64 = 3e-3;
/// What a card of the scaling model reads and multiplies, in docs/parallel.md.
const H100: Ceilings = Ceilings { read_tb_s: 3.15, peak_tflop_s: 797.0 };
/// GB/s between GPUs there.
const LINK: f64 = 360.0;

/// What one rank found.
#[derive(Debug, Serialize, Deserialize)]
struct Report {
    rank: usize,
    /// Relative errors with adapters and without.
    errors: [f64; 2],
    /// Batches that were served while adapters were replaced.
    swaps: usize,
    rows: Vec<RankRow>,
    /// What it was told when the last rank died, and after how many seconds; `None` for that rank, and of a rank alone.
    death: Option<(String, f64)>,
}

/// Times of one batch, in microseconds.
#[derive(Debug, Clone, Serialize, Deserialize)]
struct RankRow {
    model: String,
    tokens: usize,
    /// The whole layer on this GPU alone.
    single_us: f64,
    /// This rank's part without sums.
    part_us: f64,
    /// With them.
    us: f64,
    /// What the model of docs/parallel.md says of the part and of the sums.
    model_us: [f64; 2],
}

/// Starts all ranks, and prints what they found; or is one of them.
pub(crate) fn run(arguments: &RanksArguments) -> Result<()> {
    if let (Some(rank), Some(folder)) = (arguments.rank, &arguments.meet) {
        let meeting = Meeting::Files(folder.clone());
        let report = Rank::new(arguments, rank, meeting)?.run()?;
        println!("{}", serde_json::to_string(&report)?);
        return Ok(());
    }
    let grid = arguments.grid()?;
    let gpus = if arguments.cpu { 0 } else { Gpu::probe().map_or(0, |gpus| gpus.len()) };
    let nccl = gpus >= grid.len() && NcclId::new().inspect_err(|why| println!("note: {why}")).is_ok();
    let place = match (nccl, gpus) {
        (true, _) => format!("a GPU each, NCCL, {}", if arguments.processes { "processes" } else { "threads" }),
        (false, 0) => "the processor, threads".to_owned(),
        (false, gpus) => format!("one of {gpus} GPUs, threads: nothing is timed"),
    };
    let full = if arguments.fully_sharded { ", fully sharded adapters" } else { "" };
    println!("{} ranks (tp {}, ep {}{full}) on {place}", grid.len(), arguments.tp, arguments.ep);
    let folder = std::env::temp_dir().join(format!("moe-lora-ranks-{}", std::process::id()));
    std::fs::create_dir_all(&folder).with_context(|| folder.display().to_string())?;
    let reports = match (nccl, arguments.processes) {
        (true, true) => in_processes(grid.len(), &folder),
        (true, false) => in_threads(arguments, (0..grid.len()).map(|_| Meeting::Files(folder.clone())).collect()),
        (false, _) => {
            let all = ThreadCommunicator::group(grid.len());
            let groups = grid.chunks(arguments.tp).flat_map(|group| ThreadCommunicator::group(group.len()));
            in_threads(arguments, all.into_iter().zip(groups).map(|(a, g)| Meeting::Threads(a, g)).collect())
        }
    };
    std::fs::remove_dir_all(&folder)?;
    let reports = reports?;
    show(arguments, &reports);
    if let Some(path) = &arguments.json {
        std::fs::write(path, serde_json::to_vec_pretty(&reports)?).with_context(|| path.display().to_string())?;
    }
    let right = |r: &Report| r.errors.iter().all(|&e| e <= MOST_ERROR) && r.swaps == SWAPS;
    ensure!(reports.iter().all(right), "a rank is further from the truth than docs/numerics.md allows");
    let told = reports.iter().filter(|r| r.death.is_some()).count();
    ensure!(told + 1 == grid.len(), "{told} ranks were told of the one that died");
    Ok(())
}

fn in_threads(arguments: &RanksArguments, meetings: Vec<Meeting>) -> Result<Vec<Report>> {
    std::thread::scope(|scope| {
        let start = |(rank, meeting)| scope.spawn(move || Rank::new(arguments, rank, meeting)?.run());
        let threads: Vec<_> = meetings.into_iter().enumerate().map(start).collect();
        threads.into_iter().map(|thread| thread.join().map_err(|_| anyhow!("a rank panicked"))?).collect()
    })
}

fn in_processes(size: usize, folder: &Path) -> Result<Vec<Report>> {
    let program = std::env::current_exe()?;
    let start = |rank: usize| {
        let mut command = Command::new(&program);
        command.args(std::env::args_os().skip(1)).arg("--rank").arg(rank.to_string()).arg("--meet").arg(folder);
        Ok(command.stdout(Stdio::piped()).spawn()?)
    };
    let children = (0..size).map(start).collect::<Result<Vec<_>>>()?;
    let mut reports = Vec::new();
    for (rank, child) in children.into_iter().enumerate() {
        let output = child.wait_with_output()?;
        let text = String::from_utf8_lossy(&output.stdout);
        // The last one dies by a signal when it has said what it found.
        let dies = rank + 1 == size && size > 1;
        ensure!(output.status.success() != dies, "rank {rank} ended with {}", output.status);
        reports.push(serde_json::from_str(text.lines().last().context("a report")?)?);
    }
    Ok(reports)
}

fn show(arguments: &RanksArguments, reports: &[Report]) {
    let worst = |pick: fn(&Report) -> f64| reports.iter().map(pick).fold(0.0, f64::max);
    println!(
        "relative error with adapters {:.2e}, without {:.2e}; {SWAPS} batches while adapters were replaced",
        worst(|r| r.errors[0]),
        worst(|r| r.errors[1])
    );
    for report in reports {
        if let Some((told, seconds)) = &report.death {
            println!("rank {} after {seconds:.1} s: {told}", report.rank);
        }
    }
    if reports[0].rows.is_empty() {
        return;
    }
    println!("{} adapters of rank {}, bf16, us; the slowest rank", arguments.adapters, arguments.adapter_rank);
    println!("| model | T | one GPU | part | model | with sums | sums | model | speed-up |");
    println!("|---|---|---|---|---|---|---|---|---|");
    for (n, row) in reports[0].rows.iter().enumerate() {
        let most = |pick: fn(&RankRow) -> f64| reports.iter().map(|r| pick(&r.rows[n])).fold(0.0, f64::max);
        let (part, us) = (most(|r| r.part_us), most(|r| r.us));
        println!(
            "| {} | {} | {:.1} | {part:.1} | {:.1} | {us:.1} | {:.1} ({:.0}%) | {:.1} | {:.2} |",
            row.model,
            row.tokens,
            row.single_us,
            most(|r| r.model_us[0]),
            us - part,
            100.0 * (us - part) / us,
            row.model_us[1],
            row.single_us / us
        );
    }
}

/// How a rank finds the others.
enum Meeting {
    /// All ranks, and those of its tensor-parallel group.
    Threads(ThreadCommunicator, ThreadCommunicator),
    /// A folder, for NCCL.
    Files(PathBuf),
}

struct Rank<'a> {
    arguments: &'a RanksArguments,
    shard: Shard,
    device: Device,
    all: Arc<dyn Communicator>,
    group: Arc<dyn Communicator>,
}

impl<'a> Rank<'a> {
    fn new(arguments: &'a RanksArguments, rank: usize, meeting: Meeting) -> Result<Self> {
        let shard = *arguments.grid()?.get(rank).context("a rank of the grid")?;
        let (device, all, group): (_, Arc<dyn Communicator>, Arc<dyn Communicator>) = match meeting {
            Meeting::Threads(all, group) => {
                let device = if arguments.cpu { Device::cpu() } else { Device::best() };
                (device, Arc::new(all), Arc::new(group))
            }
            Meeting::Files(folder) => {
                let device = Device::cuda(rank)?;
                let gpu = device.gpu().context("a GPU")?;
                let join = |rank, size, name: String| {
                    NcclCommunicator::join_by_file(gpu, rank, size, &folder.join(name), PATIENCE).map(Arc::new)
                };
                let all = join(rank, shard.world_size(), "all".to_owned())?;
                let group = join(shard.tp_rank(), shard.tp_size(), format!("group-{}", shard.ep_rank()))?;
                (device, all, group)
            }
        };
        Ok(Self { arguments, shard, device, all, group })
    }

    fn run(self) -> Result<Report> {
        let case = self.case()?;
        let (pool, layer) = self.layer(&case)?;
        let truth = [case.truth()?, case.base_truth()?];
        let ids: Vec<AdapterId> =
            (0..case.adapters.len()).map(|n| pool.find(&n.to_string()).context("an adapter")).collect::<Result<_>>()?;
        let first = [serve(&layer, &case, &ids)?, serve(&layer, &case, &[])?];
        let error = |n: usize| relative_error(&first[n].iter().map(|&v| v.into()).collect::<Vec<_>>(), &truth[n]);
        let errors = [error(0), error(1)];
        let swaps = self.swap(&pool, &layer, &case, ids, &first[0])?;
        let rows = match (self.device.gpu(), self.all.gpu(), self.group.gpu()) {
            (Some(gpu), Some(all), Some(group)) => self.times(gpu, all, group)?,
            _ => Vec::new(),
        };
        let rank = self.shard.rank();
        let mut report = Report { rank, errors, swaps, rows, death: None };
        if rank + 1 < self.shard.world_size() {
            let begin = Instant::now();
            match serve(&layer, &case, &[]) {
                Ok(_) => bail!("rank {rank} was not told that the last rank died"),
                Err(error) => report.death = Some((error.to_string(), begin.elapsed().as_secs_f64())),
            }
        } else if rank > 0 && self.arguments.rank.is_some() {
            println!("{}", serde_json::to_string(&report)?);
            std::process::abort();
        }
        Ok(report)
    }

    /// The same on every rank.
    fn case(&self) -> Result<Case> {
        let adapters = vec![AdapterSpec::rank(self.arguments.adapter_rank); self.arguments.adapters.max(2)];
        Ok(CaseSpec { adapters, ..CaseSpec::new(LayerShape::new(16, 4, 1024, 512)?, 24).dtype(DType::Bf16) }.build(7))
    }

    /// This rank's part, and a pool that serves it the case's adapters.
    fn layer(&self, case: &Case) -> Result<(AdapterPool, FusedMoEWithLoRA)> {
        let whole = ModelShape::uniform(case.spec.shape, 1, DType::Bf16);
        let pool = AdapterPool::new(&self.device, &whole.shard(&self.shard)?, PoolConfig::default())?;
        for n in 0..case.adapters.len() {
            pool.load(&n.to_string(), self.adapter(case, n)?)?;
        }
        let layer = FusedMoEWithLoRA::new(0, case.weights.shard(&self.shard)?, &self.device, &pool)?;
        let layer = layer.with_shard(&whole.layer, &self.shard, Some(Arc::clone(&self.all)))?;
        Ok((pool, layer.with_adapter_group(Arc::clone(&self.group))?))
    }

    fn adapter(&self, case: &Case, n: usize) -> Result<AdapterWeights> {
        let whole = ModelShape::uniform(case.spec.shape, 1, DType::Bf16);
        let adapter = AdapterWeights::new(&whole, [(0, case.adapters[n].clone())].into())?;
        Ok(adapter.shard(&whole, &self.shard)?)
    }

    /// Serves while adapter 0 becomes adapter 1 and back; how many batches had the bits that belong to its adapters.
    fn swap(
        &self,
        pool: &AdapterPool,
        layer: &FusedMoEWithLoRA,
        case: &Case,
        mut ids: Vec<AdapterId>,
        first: &[f32],
    ) -> Result<usize> {
        let mut other = Vec::new();
        let mut right = 0;
        for n in 0..SWAPS {
            let back = n % 2 == 1;
            ids[0] = pool.replace("0", self.adapter(case, usize::from(!back))?)?;
            let found = serve(layer, case, &ids)?;
            if other.is_empty() {
                ensure!(found != first, "another adapter changes nothing");
                other.clone_from(&found);
            }
            right += usize::from(found == if back { first } else { &other[..] });
        }
        Ok(right)
    }

    fn times(&self, gpu: &Gpu, all: &dyn GpuCommunicator, group: &dyn GpuCommunicator) -> Result<Vec<RankRow>> {
        let stream = gpu.stream()?;
        let clock = Clock::new(gpu, &stream)?;
        let (arguments, mut rows) = (self.arguments, Vec::new());
        let one = gpu.alloc(4)?;
        for preset in PRESETS.iter().filter(|p| arguments.preset.iter().any(|name| name == p.name)) {
            let whole = preset.shape()?;
            for &tokens in &arguments.tokens {
                let timer = Timer { gpu, stream: &stream, clock: &clock, arguments, one: &one, all };
                let single = timer.graph(whole, tokens, &whole, None)?;
                let shape = self.shard.share(&whole)?.shape;
                let part = timer.graph(shape, tokens, &whole, None)?;
                let with = timer.graph(shape, tokens, &whole, Some(group))?;
                rows.push(RankRow {
                    model: preset.name.to_owned(),
                    tokens,
                    single_us: single.0,
                    part_us: part.0,
                    us: with.0,
                    model_us: [with.1, all_reduce_us(self.shard.world_size(), tokens * whole.hidden_size)],
                });
            }
        }
        Ok(rows)
    }
}

/// The output of the case's batch, with adapters or with none.
fn serve(layer: &FusedMoEWithLoRA, case: &Case, ids: &[AdapterId]) -> Result<Vec<f32>> {
    let id = |slot: &i32| usize::try_from(*slot).ok().and_then(|slot| ids.get(slot)).copied();
    let tokens = TokenAdapters::from_ids(&case.token_slots.iter().map(id).collect::<Vec<_>>());
    let routing = Routing::Selected { topk_ids: &case.topk_ids, topk_weights: &case.topk_weights };
    let mut out = vec![f32::NAN; case.hidden.len()];
    layer.forward(&case.hidden_as::<bf16>(), routing, &tokens, &mut out)?;
    Ok(out)
}

/// The all-reduce of docs/parallel.md, of f32 values.
fn all_reduce_us(ranks: usize, values: usize) -> f64 {
    let latency = match ranks {
        1 => return 0.0,
        2 => 8.0,
        3..=4 => 9.0,
        _ => 11.0,
    };
    latency + 2.0 * (ranks - 1) as f64 / ranks as f64 * 4.0 * values as f64 / LINK * 1e-3
}

/// Times one batch of one layer in a graph.
struct Timer<'a> {
    gpu: &'a Gpu,
    stream: &'a Stream,
    clock: &'a Clock,
    arguments: &'a RanksArguments,
    /// Four bytes that ranks add up to begin together.
    one: &'a DeviceBuffer,
    all: &'a dyn GpuCommunicator,
}

impl Timer<'_> {
    /// Microseconds of a graph and of the floor: a part of `whole` with random numbers, with sums over a group and all or alone.
    fn graph(
        &self,
        shape: LayerShape,
        tokens: usize,
        whole: &LayerShape,
        group: Option<&dyn GpuCommunicator>,
    ) -> Result<(f64, f64)> {
        let (gpu, stream, arguments) = (self.gpu, self.stream, self.arguments);
        let set = AdapterSet::uniform(arguments.adapters, arguments.adapter_rank, 0.0);
        let most = Most { tokens, slots: set.ranks.len(), rank: set.max_rank() };
        let layer = Layer::new(gpu, stream, shape, Format::Bf16, most)?;
        let routes = Routes::draw(whole, tokens, 0.0, 1);
        layer.set_routes(stream, &routes)?;
        let adapters = Adapters::new(gpu, stream, &layer, &set, set.ranks.len())?;
        let slots = draw_slots(&set, tokens, 2);
        layer.set_slots(stream, &slots)?;
        let out = gpu.alloc(4 * tokens * shape.hidden_size)?;
        let args = ForwardArgs {
            out: out.address(),
            out_dtype: DTYPE_F32,
            ..layer.args(stream, &adapters, tokens, set.ranks.len())
        };
        let launch = || -> Result<()> {
            #[allow(unsafe_code, reason = "the raw door")]
            // SAFETY: all buffers live to the end of this function, where the stream is waited for.
            unsafe {
                forward_exchanging(gpu, &args, |offset, count| match group {
                    Some(group) if count > 0 => Ok(group.all_reduce_on(stream, layer.workspace(), offset, count)?),
                    _ => Ok(()),
                })?;
            }
            match group {
                Some(_) => Ok(self.all.all_reduce_on(stream, &out, 0, tokens * shape.hidden_size)?),
                None => Ok(()),
            }
        };
        for _ in 0..3 {
            launch()?;
        }
        let mut failed = Ok(());
        let graph = stream.capture(|| {
            failed = launch();
            Ok::<(), moe_lora_cuda::GpuError>(())
        });
        failed?;
        let graph: Graph = graph?;
        let together = || Ok(self.all.all_reduce_on(stream, self.one, 0, 1)?);
        let us = self.clock.median_after(gpu, stream, together, || Ok(graph.launch()?))?;
        self.all.wait(stream)?;
        let touched = Touched::count(&shape, &routes.topk_ids, &slots, &set.ranks);
        Ok((us, touched.floor_us(&H100)))
    }
}
