//! The ranks of `forward --tp N --ep M`: threads of this process that each hold a share of the layer and of every adapter.

use crate::args::{DeviceChoice, Forward, NamedAdapter};
use crate::devices;
use crate::tensors::{Hidden, Input};
use anyhow::{Context, Error, Result, anyhow, ensure};
use moe_lora::collective::{CollectiveError, Communicator, NcclCommunicator, ThreadCommunicator};
use moe_lora::pool::CudaMemory;
use moe_lora::{
    AdapterPool, AdapterWeights, Checkpoint, DType, Device, FusedMoEWithLoRA, LayerError, PoolConfig, Routing, Shard,
    TokenAdapters, TopK,
};
use moe_lora_cuda::{Gpu, NcclId};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// How long ranks on GPUs of their own wait for each other.
const PATIENCE: Duration = Duration::from_secs(120);

/// What all ranks work on.
pub(crate) struct Job<'a> {
    pub(crate) model: &'a Checkpoint,
    /// The decoder layer.
    pub(crate) layer: usize,
    pub(crate) args: &'a Forward,
    pub(crate) input: &'a Input,
}

/// What a rank has when it is done.
pub(crate) struct Served {
    pub(crate) out: Vec<f32>,
    pub(crate) topk: TopK,
    pub(crate) took: Duration,
}

/// Where the ranks run, and how they meet.
pub(crate) struct Places {
    devices: Vec<Device>,
    /// Of all ranks, then of every group of ranks that share experts.
    nccl: Option<Vec<NcclId>>,
    /// In words.
    pub(crate) text: String,
}

impl Places {
    /// A GPU for each rank if there are as many, else one device for all; says so on standard error.
    pub(crate) fn choose(choice: DeviceChoice, model: &Checkpoint, grid: &[Shard]) -> Result<Self> {
        let shares =
            grid.iter().map(|shard| Ok(shard.share(&model.shape().layer)?.shape)).collect::<Result<Vec<_>>>()?;
        // One that a GPU cannot run keeps all from running there.
        let shape = shares.iter().find(|shape| CudaMemory::check_shape(shape).is_err()).unwrap_or(&shares[0]);
        let first = devices::choose(choice, shape)?;
        if first.gpu().is_some() && model.shape().dtype == DType::F32 {
            eprintln!("note: {first} computes this f32 checkpoint in bf16; the router stays f32");
        }
        let (ranks, on) = (grid.len(), first.to_string());
        if ranks == 1 {
            return Ok(Self { devices: vec![first], nccl: None, text: on });
        }
        let text = |on: &str| format!("{ranks} ranks (tp {}, ep {}) on {on}", grid[0].tp_size(), grid[0].ep_size());
        let Some(gpu) = first.gpu() else {
            return Ok(Self { devices: vec![first; ranks], nccl: None, text: text(&on) });
        };
        let gpus = Gpu::probe().map_or(0, |gpus| gpus.len());
        if gpu.info().ordinal != 0 || gpus < ranks {
            eprintln!("note: {ranks} ranks share {on}, as there are not as many GPUs");
            return Ok(Self { devices: vec![first; ranks], nccl: None, text: text(&on) });
        }
        let ids = (0..=grid[0].ep_size()).map(|_| NcclId::new()).collect::<Result<Vec<_>, _>>();
        let nccl = ids.inspect_err(|why| eprintln!("note: ranks sum through the host's memory: {why}")).ok();
        let devices =
            (0..ranks).map(|n| Device::cuda(n).with_context(|| format!("cuda:{n}"))).collect::<Result<_>>()?;
        Ok(Self { devices, nccl, text: text(&format!("cuda:0 to cuda:{}", ranks - 1)) })
    }
}

impl Job<'_> {
    /// Runs all ranks at once, each with its adapters of `adapters`. Ranks that sum as threads must agree to the bit.
    pub(crate) fn run(&self, grid: &[Shard], places: &Places, adapters: Vec<Vec<AdapterWeights>>) -> Result<Served> {
        let groups = grid.chunks(grid[0].tp_size()).flat_map(|group| ThreadCommunicator::group(group.len()));
        let threads = ThreadCommunicator::group(grid.len()).into_iter().zip(groups);
        let ranks = grid.iter().zip(&places.devices).zip(adapters).zip(threads);
        let done: Vec<Result<Served>> = std::thread::scope(|scope| {
            let threads: Vec<_> = ranks
                .map(|(((shard, device), adapters), threads)| {
                    scope.spawn(move || self.rank(shard, device, places.nccl.as_deref(), threads, adapters))
                })
                .collect();
            threads
                .into_iter()
                .map(|thread| thread.join().unwrap_or_else(|_| Err(anyhow!("a rank panicked"))))
                .collect()
        });
        let (mut served, mut failed) = (Vec::new(), Vec::new());
        done.into_iter().for_each(|rank| rank.map_or_else(|e| failed.push(e), |s| served.push(s)));
        // The rank that failed says why; the others say only that it did.
        failed.sort_by_key(is_of_another_rank);
        if let Some(error) = failed.into_iter().next() {
            return Err(error);
        }
        let differ = |other: &Served| {
            places.nccl.is_none() && served[0].out.iter().zip(&other.out).any(|(a, b)| a.to_bits() != b.to_bits())
        };
        ensure!(!served.iter().any(differ), "the ranks differ in their results");
        served.into_iter().next().context("no rank ran")
    }

    fn rank(
        &self,
        shard: &Shard,
        device: &Device,
        nccl: Option<&[NcclId]>,
        (threads, group): (ThreadCommunicator, ThreadCommunicator),
        adapters: Vec<AdapterWeights>,
    ) -> Result<Served> {
        let (model, n) = (self.model, self.layer);
        let whole = model.shape();
        let all = self.args.adapters.len().max(1);
        let default = PoolConfig::default();
        // No larger than it must be: GPUs have faster kernels for small ranks.
        let max_rank = adapters.iter().map(AdapterWeights::max_rank).max().unwrap_or(0).clamp(1, default.max_rank);
        let config = PoolConfig { bytes: usize::MAX, max_rank, max_adapters: all, device_slots: all, ..default };
        let pool = AdapterPool::new(device, &whole.shard(shard)?, config)?;
        let mut layer = FusedMoEWithLoRA::new(n, model.layer_shard(n, shard)?, device, &pool)?;
        if *shard != Shard::WHOLE {
            // Ranks meet through NCCL, by the `id`-th of its ids, or as threads.
            let meet = |rank, size, id: usize, threads: ThreadCommunicator| -> Result<Arc<dyn Communicator>> {
                Ok(match (nccl, device.gpu()) {
                    (Some(ids), Some(gpu)) => Arc::new(NcclCommunicator::join(gpu, rank, size, ids[id], PATIENCE)?),
                    _ => Arc::new(threads),
                })
            };
            let communicator = meet(shard.rank(), shard.world_size(), 0, threads)?;
            layer = layer.with_shard(&whole.layer, shard, Some(communicator))?;
            if self.args.fully_sharded {
                let group = meet(shard.tp_rank(), shard.tp_size(), 1 + shard.ep_rank(), group)?;
                layer = layer.with_adapter_group(group)?;
            }
        }
        let layer = layer.with_router(model.router(n)?)?;
        let load = |(named, weights): (&NamedAdapter, _)| {
            pool.load(&named.name, weights)
                .with_context(|| format!("adapter {} at {}", named.name, named.dir.display()))
        };
        let ids = self.args.adapters.iter().zip(adapters).map(load).collect::<Result<Vec<_>>>()?;
        let tokens: Vec<_> = self.input.adapters.iter().map(|a| a.map(|a| ids[a])).collect();
        let tokens = TokenAdapters::from_ids(&tokens);
        let topk = route(&layer, self.input)?;
        let routing = Routing::Selected { topk_ids: &topk.topk_ids, topk_weights: &topk.topk_weights };
        let mut out = vec![0.0; tokens.ids().len() * layer.shape().hidden_size];
        let start = Instant::now();
        match &self.input.hidden {
            Hidden::F32(hidden) => layer.forward(hidden, routing, &tokens, &mut out),
            Hidden::F16(hidden) => layer.forward(hidden, routing, &tokens, &mut out),
            Hidden::Bf16(hidden) => layer.forward(hidden, routing, &tokens, &mut out),
        }?;
        Ok(Served { out, topk, took: start.elapsed() })
    }
}

/// The experts of every token: those that the input names, or those that the layer's router chooses.
pub(crate) fn route(layer: &FusedMoEWithLoRA, input: &Input) -> Result<TopK, LayerError> {
    if let Some(topk) = &input.topk {
        return Ok(topk.clone());
    }
    match &input.hidden {
        Hidden::F32(hidden) => layer.route(hidden, Routing::Router),
        Hidden::F16(hidden) => layer.route(hidden, Routing::Router),
        Hidden::Bf16(hidden) => layer.route(hidden, Routing::Router),
    }
}

fn is_of_another_rank(error: &Error) -> bool {
    matches!(error.downcast_ref(), Some(LayerError::Collective(_))) || error.downcast_ref::<CollectiveError>().is_some()
}
