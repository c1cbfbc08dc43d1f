//! The adapter pool on a GPU: how fast adapters arrive, and what running batches feel of it.

use super::launch::forward;
use super::layer::{Adapters, Layer, Most};
use crate::arguments::PoolArguments;
use anyhow::{Context, Result, ensure};
use moe_lora::pool::{CudaMemory, Eviction, PackedAdapter};
use moe_lora::{
    AdapterLayer, AdapterPool, AdapterWeights, DType, ExpertLora, LayerShape, Lora, Matrix, ModelShape, PoolConfig,
    Projection, TokenAdapters,
};
use moe_lora_bench::{AdapterSet, PRESETS, Routes, draw_slots, mixed_ranks_in, zipf};
use moe_lora_cuda::{Gpu, Graph, Stream};
use moe_lora_kernels::Format;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Instant;

/// Bytes of the copy that is the measure of all uploads.
const CEILING_BYTES: usize = 1 << 30;
const ROUNDS: usize = 12;

/// Prints uploads against the ceiling of the link, forwards while adapters swap, and what the same bytes hold.
pub(crate) fn run(arguments: &PoolArguments) -> Result<()> {
    let gpu = Gpu::open(arguments.device)?;
    let preset = PRESETS.iter().find(|preset| preset.name == arguments.preset);
    let shape = preset.with_context(|| format!("no preset {}", arguments.preset))?.shape()?;
    let bench = PoolBench::new(&gpu, shape, arguments)?;
    let ceiling = ceiling(&gpu)?;
    println!("{}: page-locked memory to the GPU at {ceiling:.1} GB/s", gpu.info().name);
    bench.uploads(ceiling)?;
    bench.forwards()?;
    for slots in [8, 16, 64] {
        let held = mixed_ranks_in(slots);
        println!(
            "bytes of {slots} slots of rank 64: {held} adapters of ranks 8, 16 and 64 ({:.2}x)",
            held as f64 / slots as f64
        );
    }
    for exponent in [0.8, 1.0, 1.2] {
        let met = |eviction| zipf(eviction, [500, 16], exponent, 200_000, 1);
        let (recent, frequent) = (met(Eviction::LeastRecent)?, met(Eviction::LeastFrequent)?);
        println!(
            "500 adapters, 16 in the pool, Zipf {exponent}: {:.1} % hits by recency, {:.1} % by frequency, {:.1} % at best",
            100.0 * recent.hits,
            100.0 * frequent.hits,
            100.0 * recent.best
        );
    }
    Ok(())
}

/// GB/s of one large copy from page-locked memory.
fn ceiling(gpu: &Gpu) -> Result<f64> {
    let (stream, from, to) = (gpu.stream()?, gpu.alloc_pinned(CEILING_BYTES)?, gpu.alloc(CEILING_BYTES)?);
    stream.upload(&to, 0, from.as_slice())?;
    let mut best = f64::INFINITY;
    for _ in 0..5 {
        let begin = Instant::now();
        stream.upload(&to, 0, from.as_slice())?;
        best = best.min(begin.elapsed().as_secs_f64());
    }
    Ok(CEILING_BYTES as f64 / best * 1e-9)
}

struct PoolBench<'a> {
    gpu: &'a Gpu,
    shape: LayerShape,
    tokens: usize,
    rank: usize,
    pool: AdapterPool,
    adapters: Vec<PackedAdapter>,
}

impl<'a> PoolBench<'a> {
    /// A pool with room for three adapters, and four of them packed.
    fn new(gpu: &'a Gpu, shape: LayerShape, arguments: &PoolArguments) -> Result<Self> {
        let model = ModelShape::uniform(shape, arguments.layers, DType::Bf16);
        let memory = || CudaMemory::new(gpu.clone());
        let weights = weights(&model, arguments.rank)?;
        let any = AdapterPool::new(memory(), &model, PoolConfig { bytes: usize::MAX, ..PoolConfig::default() })?;
        let bytes = any.pack("any", &weights)?.bytes();
        drop(any);
        let config = PoolConfig { bytes: 3 * bytes, device_slots: 8, host_bytes: 0, ..PoolConfig::default() };
        let pool = AdapterPool::new(memory(), &model, config)?;
        pool.reserve()?;
        let begin = Instant::now();
        let pack = |n: usize| pool.pack(&n.to_string(), &weights);
        let adapters = (0..4).map(pack).collect::<Result<Vec<_>, _>>()?;
        let seconds = begin.elapsed().as_secs_f64() / 4.0;
        println!(
            "an adapter of rank {} for {} layers: {:.1} MB, packed in {:.0} ms",
            arguments.rank,
            arguments.layers,
            bytes as f64 * 1e-6,
            1e3 * seconds
        );
        Ok(Self { gpu, shape, tokens: arguments.tokens, rank: arguments.rank, pool, adapters })
    }

    /// Brings an adapter to the pool and waits until it is there.
    fn load(&self, stream: &Stream, n: usize) -> Result<()> {
        let (name, adapter) = (n % 4, &self.adapters[n % 4]);
        let id = match self.pool.find(&name.to_string()) {
            Some(_) => self.pool.replace_packed(&name.to_string(), adapter)?,
            None => self.pool.load_packed(&name.to_string(), adapter)?,
        };
        let lease = self.pool.lease(&TokenAdapters::from_ids(&[Some(id)]))?;
        lease.wait_on(stream)?;
        drop(lease);
        Ok(stream.synchronize()?)
    }

    fn uploads(&self, ceiling: f64) -> Result<()> {
        let stream = self.gpu.stream()?;
        let bytes = self.adapters[0].bytes();
        let mut times = Vec::new();
        for n in 0..ROUNDS {
            let begin = Instant::now();
            self.load(&stream, n)?;
            times.push(begin.elapsed().as_secs_f64());
        }
        times.sort_by(f64::total_cmp);
        let speed = |time: f64| bytes as f64 / time * 1e-9;
        println!(
            "load to ready: {:.2} ms median, {:.1} GB/s, {:.1} % of the ceiling; slowest {:.2} ms",
            1e3 * times[ROUNDS / 2],
            speed(times[ROUNDS / 2]),
            100.0 * speed(times[ROUNDS / 2]) / ceiling,
            1e3 * times[ROUNDS - 1]
        );
        // Without a pause: every copy is queued behind the one before.
        let begin = Instant::now();
        let mut last = None;
        for n in 0..ROUNDS {
            let name = (n % 4).to_string();
            if let Some(id) = self.pool.find(&name) {
                self.pool.unload(id)?;
            }
            last = Some(self.pool.load_packed(&name, &self.adapters[n % 4])?);
        }
        let given = begin.elapsed().as_secs_f64();
        let lease = self.pool.lease(&TokenAdapters::from_ids(&[last]))?;
        lease.wait_on(&stream)?;
        stream.synchronize()?;
        let all = speed(begin.elapsed().as_secs_f64() / ROUNDS as f64);
        println!(
            "loads without a pause: {all:.1} GB/s, {:.1} % of the ceiling; the host is busy {:.2} ms a load",
            100.0 * all / ceiling,
            1e3 * given / ROUNDS as f64
        );
        Ok(())
    }

    /// One layer, replayed from one graph, alone and while another thread swaps the adapters that it does not use.
    fn forwards(&self) -> Result<()> {
        let stream = self.gpu.stream()?;
        let table = self.pool.table_address(0).context("layer 0")?;
        let most = Most { tokens: self.tokens, slots: table.slots as usize, rank: self.rank };
        let layer = Layer::new(self.gpu, &stream, self.shape, Format::Bf16, most)?;
        let none = AdapterSet { ranks: Vec::new(), base_share: 0.0 };
        let empty = Adapters::new(self.gpu, &stream, &layer, &none, 0)?;
        layer.set_routes(&stream, &Routes::draw(&self.shape, self.tokens, 1.5, 1))?;
        for name in ["0", "1", "2", "3"] {
            if let Some(id) = self.pool.find(name) {
                self.pool.unload(id)?;
            }
        }
        let id = self.pool.load_packed("0", &self.adapters[0])?;
        let lease = self.pool.lease(&TokenAdapters::from_ids(&[Some(id)]))?;
        let slot = lease.device_slots()[0];
        let half = AdapterSet { ranks: vec![self.rank], base_share: 0.5 };
        let slots: Vec<i32> =
            draw_slots(&half, self.tokens, 1).into_iter().map(|s| if s < 0 { -1 } else { slot }).collect();
        layer.set_slots(&stream, &slots)?;
        lease.wait_on(&stream)?;
        let mut args = layer.args(&stream, &empty, self.tokens, table.slots as usize);
        (args.adapters, args.slot_active, args.max_rank) = (table.entries, table.active, self.rank as u32);
        #[allow(unsafe_code, reason = "the raw door")]
        // SAFETY: layer, pool and lease live until the last replay is done; the tokens use the leased slot alone.
        let graph = stream.capture(|| unsafe { forward(self.gpu, &args, None) })?;
        let alone = times(&stream, &graph)?;
        let (end, swaps) = (AtomicBool::new(false), AtomicUsize::new(0));
        let beside = std::thread::scope(|scope| {
            let swapper = scope.spawn(|| -> Result<()> {
                let stream = self.gpu.stream()?;
                for n in (1..4).cycle() {
                    if end.load(Ordering::Acquire) {
                        break;
                    }
                    self.load(&stream, n)?;
                    swaps.fetch_add(1, Ordering::Relaxed);
                }
                Ok(())
            });
            let beside = times(&stream, &graph);
            end.store(true, Ordering::Release);
            swapper.join().ok().context("the swapping thread")??;
            beside
        })?;
        drop(lease);
        ensure!(swaps.load(Ordering::Relaxed) > 2, "too few swaps to tell");
        let line = |what: &str, [p50, p99]: [f64; 2]| {
            println!("forward of {} tokens {what}: p50 {p50:.1} us, p99 {p99:.1} us", self.tokens)
        };
        line("alone", alone);
        line(&format!("while {} adapters came", swaps.load(Ordering::Relaxed)), beside);
        println!("p99 grows by {:.1} %", 100.0 * (beside[1] / alone[1] - 1.0));
        Ok(())
    }
}

/// Median and 99th percentile of many replays.
fn times(stream: &Stream, graph: &Graph) -> Result<[f64; 2]> {
    let mut times = Vec::new();
    for _ in 0..4000 {
        let begin = stream.record(true)?;
        graph.launch()?;
        let end = stream.record(true)?;
        times.push(begin.microseconds_to(&end)?);
    }
    times.drain(..200); // warm-up
    times.sort_by(f64::total_cmp);
    Ok([times[times.len() / 2], times[times.len() * 99 / 100]])
}

/// Every projection of every expert at one rank; numbers of one size repeat, bytes do not: each matrix has its own.
fn weights(model: &ModelShape, rank: usize) -> Result<AdapterWeights> {
    let bf16 = |rows: usize, cols: usize| -> Result<Matrix> {
        let values = (0..rows * cols).map(|n| half::bf16::from_f32(0.01 * ((n % 97) as f32 - 48.0))).collect();
        Ok(Matrix::from_vec::<half::bf16>(values, rows, cols)?)
    };
    let lora = |projection: Projection| -> Result<Option<Lora>> {
        let [out, width] = projection.base_shape(&model.layer);
        Ok(Some(Lora::new(bf16(rank, width)?, bf16(out, rank)?, 0.1)?))
    };
    let expert = || -> Result<ExpertLora> {
        Ok(ExpertLora { gate: lora(Projection::Gate)?, up: lora(Projection::Up)?, down: lora(Projection::Down)? })
    };
    let mut layers = std::collections::BTreeMap::new();
    for &n in &model.moe_layers {
        let experts = (0..model.layer.num_experts).map(|_| expert()).collect::<Result<_>>()?;
        layers.insert(n, AdapterLayer::new(&model.layer, experts)?);
    }
    Ok(AdapterWeights::new(model, layers)?)
}
