//! Times layers on a GPU.

mod check;
mod clock;
mod launch;
mod layer;
pub(crate) mod pool;
pub(crate) mod ranks;

use crate::arguments::{GpuArguments, Problem};
use anyhow::{Context, Result, ensure};
use check::{Batch, Checker};
use clock::Clock;
use launch::forward;
use layer::{Adapters, Layer, Most};
use moe_lora_bench::{AdapterSet, Card, Routes, Row, Run, StageTime, Touched, draw_slots};
use moe_lora_cuda::{Gpu, GpuError, Graph, Stream};
use moe_lora_kernels::Format;
use moe_lora_runner::raw::{self, ForwardArgs, Path as Kernels};
use std::collections::BTreeMap;
use std::path::Path;

const ABOUT: &str = "one forward from align to combine through the raw door, top-k outside; median of 20 replays of a CUDA graph, \
before each 256 MB written and another 256 MB read";
const WARM_UPS: usize = 3;

/// Times what the arguments ask for, prints each row as it comes, and writes the run after each layer.
pub(crate) fn run(arguments: &GpuArguments) -> Result<()> {
    let gpu = Gpu::open(arguments.device)?;
    let stream = gpu.stream()?;
    let clock = Clock::new(&gpu, &stream)?;
    let info = gpu.info();
    let ceilings = arguments.ceilings().map_or_else(|| clock.ceilings(&gpu, &stream), Ok)?;
    let driver = format!("{}.{}", info.driver_version.0, info.driver_version.1);
    let card = Card { name: info.name.clone(), driver, ceilings };
    println!("{}: reads {:.3} TB/s, multiplies {:.0} TFLOP/s", card.name, ceilings.read_tb_s, ceilings.peak_tflop_s);
    let mut all = Run { about: ABOUT.to_owned(), card, rows: Vec::new() };
    println!("{}", Row::header());
    for problem in arguments.problems()? {
        Bench { gpu: &gpu, stream: &stream, clock: &clock, arguments, problem: &problem, run: &mut all }.layer()?;
        if let Some(path) = &arguments.json {
            write(path, &all)?;
        }
    }
    println!("{}", all.summary());
    // Not the other way round: NaN is no small error.
    let right = all.rows.iter().filter(|row| row.rel_err.is_none_or(|error| error <= most_error(row))).count();
    let wrong = all.rows.len() - right;
    ensure!(
        wrong == 0,
        "{wrong} of {} rows are further from the reference than docs/numerics.md allows",
        all.rows.len()
    );
    Ok(())
}

/// The bound of `docs/numerics.md` for a layer whose experts' outputs may be stored in 16 bits.
fn most_error(row: &Row) -> f64 {
    if row.dtype == "f16" { 5e-4 } else { 3.3e-3 }
}

fn write(path: &Path, run: &Run) -> Result<()> {
    std::fs::write(path, serde_json::to_vec_pretty(run)?).with_context(|| path.display().to_string())
}

/// One layer's rows.
struct Bench<'a> {
    gpu: &'a Gpu,
    stream: &'a Stream,
    clock: &'a Clock,
    arguments: &'a GpuArguments,
    problem: &'a Problem,
    run: &'a mut Run,
}

impl Bench<'_> {
    fn layer(&mut self) -> Result<()> {
        let (problem, arguments) = (self.problem, self.arguments);
        let base = AdapterSet::uniform(0, 0, 0.0);
        let slots_of = |set: &AdapterSet| arguments.slots_of(set);
        let most = Most {
            tokens: problem.tokens.iter().copied().max().context("a number of tokens")?,
            slots: problem.sets.iter().flat_map(slots_of).max().unwrap_or(0),
            rank: problem.sets.iter().map(AdapterSet::max_rank).max().unwrap_or(0),
        };
        let layer = Layer::new(self.gpu, self.stream, problem.shape, arguments.format(), most)?;
        let routes = Routes::draw(&problem.shape, most.tokens, arguments.skew, 1);
        layer.set_routes(self.stream, &routes)?;
        let mut checker = Checker::default();
        let mut base_us = BTreeMap::new();
        for (seed, set) in (2..).zip([&base].into_iter().chain(&problem.sets)) {
            let sizes = slots_of(set);
            let most_slots = sizes.iter().copied().max().unwrap_or(0);
            let adapters = Adapters::new(self.gpu, self.stream, &layer, set, most_slots)?;
            let slots = draw_slots(set, most.tokens, seed);
            layer.set_slots(self.stream, &slots)?;
            for &tokens in &problem.tokens {
                for (&num_slots, wanted) in
                    sizes.iter().flat_map(|size| arguments.paths().into_iter().map(move |p| (size, p)))
                {
                    let batch = Batch { routes: &routes, slots: &slots[..tokens] };
                    let args = layer.args(self.stream, &adapters, tokens, num_slots);
                    let path = match raw::path(self.gpu, &args, wanted) {
                        Ok(path) => path,
                        Err(_) if wanted.is_some() => continue,
                        Err(error) => return Err(error.into()),
                    };
                    let mut row = self.row(&layer, &adapters, &batch, (&args, path), &mut checker)?;
                    // Without a wanted path, that of the base may be another one.
                    let key = (tokens, wanted.map(|path| path.to_string()));
                    if set.ranks.is_empty() {
                        base_us.insert(key.clone(), row.us);
                    }
                    row.base_us = base_us.get(&key).copied();
                    println!("{row}");
                    self.run.rows.push(row);
                }
            }
        }
        Ok(())
    }

    fn row(
        &self,
        layer: &Layer,
        adapters: &Adapters,
        batch: &Batch<'_>,
        (args, path): (&ForwardArgs, Kernels),
        checker: &mut Checker,
    ) -> Result<Row> {
        let (stream, shape, set) = (self.stream, &layer.shape, &adapters.set);
        let tokens = batch.slots.len();
        stream.fill(&layer.out, 0, layer.out.bytes(), 0xff)?;
        for _ in 0..WARM_UPS {
            self.forward(args, path)?;
        }
        let graph = self.capture(args, path)?;
        graph.launch()?;
        stream.synchronize()?;
        let rel_err = match self.arguments.check_tokens {
            0 => None,
            count => Some(checker.relative_error(stream, layer, adapters, batch, count)?),
        };
        let us = self.clock.median(self.gpu, stream, || Ok(graph.launch()?))?;
        let touched = Touched::count(shape, &batch.routes.topk_ids[..tokens * shape.top_k], batch.slots, &set.ranks);
        let mut stages = Vec::new();
        if self.arguments.stages {
            for kernel in graph.kernels(stream)? {
                let us = self.clock.median(self.gpu, stream, || Ok(kernel.launch()?))?;
                stages.push(StageTime { kernel: kernel.name().to_owned(), us });
            }
        }
        Ok(Row {
            model: self.problem.name.clone(),
            sizes: [shape.num_experts, shape.top_k, shape.hidden_size, shape.intermediate_size],
            dtype: if layer.format == Format::F16 { "f16" } else { "bf16" }.to_owned(),
            adapters: set.ranks.len(),
            rank: set.max_rank(),
            slots: args.num_slots as usize,
            base_share: set.base_share,
            tokens,
            us,
            floor_us: touched.floor_us(&self.run.card.ceilings),
            base_us: None,
            path: path.to_string(),
            launches: graph.num_launches()?,
            rel_err,
            touched,
            stages,
        })
    }

    #[allow(unsafe_code, reason = "the raw door")]
    fn forward(&self, args: &ForwardArgs, path: Kernels) -> Result<()> {
        // SAFETY: `Layer::args` made them of buffers that live as long as the layer and its adapters, which outlive every
        // use of `args`; the table's matrices are of the layer's sizes and format, and one stream does all work.
        unsafe { forward(self.gpu, args, Some(path)) }
    }

    fn capture(&self, args: &ForwardArgs, path: Kernels) -> Result<Graph> {
        let mut failed = Ok(());
        let graph = self.stream.capture(|| {
            failed = self.forward(args, path);
            Ok::<(), GpuError>(())
        });
        failed?;
        Ok(graph?)
    }
}
