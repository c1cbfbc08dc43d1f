//! One layer on the GPU, launched kernel by kernel from plain buffers: what the tests check.
#![allow(dead_code, unreachable_pub, reason = "every test uses its own part")]

mod adapters;
mod whole_layer;

use adapters::adapters;
use bytemuck::{Pod, cast_slice};
use moe_lora_core::{Activation, DType, Element, RouterWeightPlacement};
use moe_lora_cuda::{
    DeviceBuffer, Gpu, GpuError, Layout, Stream, decode_down, decode_gate_up, prefill_down, prefill_gate_up,
};
use moe_lora_kernels::{
    AlignParams, BatchSizes, ClusterAlignParams, CombineParams, DecodeAlignParams, DecodeDownParams, DecodePlan,
    DeviceSegment, DownParams, Format, GateUpParams, Kernel, LayerPlan, PrefillGateUpParams, PrefillShrinkParams,
    RouteBounds, RouteCounts, RowTile, ShrinkParams,
};
use moe_lora_reference::random::Case;

/// Sizes of a layer and its adapters.
#[derive(Debug, Clone, Copy)]
pub struct Sizes {
    pub experts: usize,
    pub top_k: usize,
    pub hidden: usize,
    pub intermediate: usize,
    pub slots: usize,
    pub max_rank: usize,
    /// Of a rank's part: the id of its first expert, and the experts of all ranks.
    pub first_expert: usize,
    pub all_experts: usize,
}

/// Everything of a layer that does not change with the batch.
pub struct Layer {
    pub sizes: Sizes,
    pub format: Format,
    pub interleaved: bool,
    pub activation: Activation,
    pub weigh_input: bool,
    pub scaling: f32,
    pub w13: DeviceBuffer,
    pub w2: DeviceBuffer,
    pub bias: Option<[DeviceBuffer; 3]>,
    pub adapters: DeviceBuffer,
    pub table: DeviceBuffer,
    /// The kernels of the next launches.
    pub path: Path,
}

/// A batch in device memory, with everything that the kernels write.
pub struct Batch {
    pub tokens: usize,
    pub bounds: RouteBounds,
    pub memory: DeviceBuffer,
    pub at: Places,
    /// The barrier of align: zero, and not to be poisoned.
    pub barrier: DeviceBuffer,
}

/// Offsets into [`Batch::memory`]. Inputs come first, up to `row_pair`.
#[derive(Debug, Clone, Copy)]
pub struct Places {
    pub hidden: usize,
    pub ids: usize,
    pub weights: usize,
    pub slots: usize,
    pub active: usize,
    pub row_pair: usize,
    pub row_weight: usize,
    pub pair_row: usize,
    pub segments: usize,
    pub tiles: usize,
    pub chunks: usize,
    pub counts: usize,
    pub order: usize,
    pub table: usize,
    pub shrunk: usize,
    pub intermediate: usize,
    pub rows: usize,
    pub flags: usize,
    pub parts: usize,
    pub out: usize,
}

pub fn upload<T: Pod>(gpu: &Gpu, stream: &Stream, values: &[T]) -> Result<DeviceBuffer, GpuError> {
    let buffer = gpu.alloc(size_of_val(values))?;
    stream.upload(&buffer, 0, values)?;
    Ok(buffer)
}

impl Batch {
    pub fn new(gpu: &Gpu, stream: &Stream, sizes: &Sizes, tokens: usize) -> Result<Self, GpuError> {
        let bounds = RouteBounds::new(tokens as u64, sizes.top_k as u64, sizes.experts as u64, sizes.slots as u64);
        let pairs = bounds.pairs as usize;
        let mut layout = Layout::default();
        let table = AlignParams::table_bytes(sizes.experts as u32, gpu.info().sm_count) as usize;
        let at = Places {
            hidden: layout.add::<u16>(tokens * sizes.hidden),
            ids: layout.add::<i32>(pairs),
            weights: layout.add::<f32>(pairs),
            slots: layout.add::<i32>(tokens),
            active: layout.add::<u8>(sizes.slots),
            row_pair: layout.add::<u32>(pairs),
            row_weight: layout.add::<f32>(pairs),
            pair_row: layout.add::<i32>(pairs),
            segments: layout.add::<DeviceSegment>(bounds.segments as usize),
            tiles: layout.add::<RowTile>(bounds.tiles as usize + pairs.min(2048) / 16),
            chunks: layout.add::<DeviceSegment>(bounds.chunks as usize + pairs.min(2048) / 16),
            counts: layout.add::<RouteCounts>(1),
            order: layout.add::<u32>(2 * tokens),
            table: layout.add::<u8>(table),
            shrunk: layout.add::<f32>(pairs * 2 * sizes.max_rank),
            intermediate: layout.add::<u16>(pairs * sizes.intermediate),
            rows: layout.add::<f32>(pairs * sizes.hidden),
            flags: layout.add::<u32>(LayerPlan::FLAGS),
            parts: layout.add::<f32>(LayerPlan::shrunk_numbers(
                pairs,
                sizes.hidden,
                sizes.intermediate,
                sizes.max_rank,
            )),
            out: layout.add::<f32>(tokens * sizes.hidden),
        };
        let memory = gpu.alloc(layout.bytes())?;
        let barrier = upload(gpu, stream, &[0_u32])?;
        Ok(Self { tokens, bounds, memory, at, barrier })
    }

    pub fn set(
        &self,
        stream: &Stream,
        hidden: &[u16],
        ids: &[i32],
        weights: &[f32],
        slots: &[i32],
        active: &[u8],
    ) -> Result<(), GpuError> {
        stream.upload(&self.memory, self.at.hidden, hidden)?;
        stream.upload(&self.memory, self.at.ids, ids)?;
        stream.upload(&self.memory, self.at.weights, weights)?;
        stream.upload(&self.memory, self.at.slots, slots)?;
        stream.upload(&self.memory, self.at.active, active)
    }

    /// NaN in everything that the kernels write.
    pub fn poison(&self, stream: &Stream) -> Result<(), GpuError> {
        stream.fill(&self.memory, self.at.row_pair, self.memory.bytes() - self.at.row_pair, 0xff)
    }

    pub fn read<T: Pod>(&self, stream: &Stream, offset: usize, count: usize) -> Result<Vec<T>, GpuError> {
        let mut values = vec![T::zeroed(); count];
        stream.download(&self.memory, offset, &mut values)?;
        Ok(values)
    }

    pub fn counts(&self, stream: &Stream) -> Result<RouteCounts, GpuError> {
        Ok(self.read::<RouteCounts>(stream, self.at.counts, 1)?[0])
    }

    fn address(&self, offset: usize) -> u64 {
        self.memory.address() + offset as u64
    }

    pub fn align(
        &self,
        gpu: &Gpu,
        stream: &Stream,
        sizes: &Sizes,
        lora: bool,
        tile_rows: u32,
        aligner: Aligner,
    ) -> Result<(), GpuError> {
        let params = AlignParams {
            topk_ids: self.address(self.at.ids),
            topk_weights: self.address(self.at.weights),
            token_slots: if lora { self.address(self.at.slots) } else { 0 },
            slot_active: if lora { self.address(self.at.active) } else { 0 },
            row_pair: self.address(self.at.row_pair),
            row_weight: self.address(self.at.row_weight),
            pair_row: self.address(self.at.pair_row),
            segments: self.address(self.at.segments),
            tiles: self.address(self.at.tiles),
            chunks: self.address(self.at.chunks),
            counts: self.address(self.at.counts),
            order: self.address(self.at.order),
            table: self.address(self.at.table),
            barrier: self.barrier.address(),
            num_tokens: self.tokens as u32,
            top_k: sizes.top_k as u32,
            num_experts: sizes.experts as u32,
            num_slots: sizes.slots as u32,
            tile_rows,
            first_expert: sizes.first_expert as u32,
            all_experts: sizes.all_experts as u32,
            reserved: 0,
        };
        let kernels = gpu.kernels();
        let cluster = ClusterAlignParams(params);
        // SAFETY, for every launch: every address is a part of `memory`, laid out for these sizes.
        match (aligner, cluster.launch(kernels.align_cluster())) {
            (Aligner::Decode, _) => {
                let params = DecodeAlignParams(params);
                // SAFETY: see above.
                unsafe { kernels.launch(stream, Format::Bf16, &params, params.launch()) }
            }
            // SAFETY: see above.
            (Aligner::Cluster, Some(launch)) => unsafe { kernels.launch(stream, Format::Bf16, &cluster, launch) },
            _ => {
                let launch = params.launch(gpu.info().sm_count);
                // SAFETY: see above.
                unsafe { kernels.launch(stream, Format::Bf16, &params, launch) }
            }
        }
    }

    /// Whether one cluster can align this batch on this GPU.
    pub fn fits_cluster(&self, gpu: &Gpu, sizes: &Sizes) -> bool {
        let params = AlignParams {
            token_slots: 1,
            num_tokens: self.tokens as u32,
            top_k: sizes.top_k as u32,
            num_experts: sizes.experts as u32,
            num_slots: sizes.slots as u32,
            ..Default::default()
        };
        let most_blocks = gpu.kernels().align_cluster();
        most_blocks > 0 && ClusterAlignParams(params).launch(most_blocks).is_some()
    }
}

/// The kernel that makes the lists.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Aligner {
    /// That of every GPU.
    Portable,
    /// By one cluster of blocks.
    Cluster,
    /// By one block, for few tokens.
    Decode,
}

/// The kernels that a layer runs on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Path {
    /// Those of every GPU.
    Portable,
    /// Hopper's products for experts with many rows.
    Prefill,
    /// Hopper's launches for few tokens.
    Decode,
    /// Hopper's launch of a whole layer for up to 16 tokens.
    Layer,
}

/// One step of [`Layer::launch`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stage {
    Align,
    ShrinkGateUp,
    GateUp,
    ShrinkDown,
    Down,
    Combine,
}

pub const STAGES: [Stage; 6] =
    [Stage::Align, Stage::ShrinkGateUp, Stage::GateUp, Stage::ShrinkDown, Stage::Down, Stage::Combine];

impl Layer {
    /// A reference case's weights and adapters in device memory. Unused ranks are zero, gaps are NaN.
    pub fn from_case<T: Element>(gpu: &Gpu, stream: &Stream, case: &Case) -> Result<Self, GpuError> {
        let shape = *case.weights.shape();
        let experts = case.weights.experts();
        let mut w13: Vec<T> = Vec::new();
        let mut w2: Vec<T> = Vec::new();
        for expert in experts {
            let (gate, up) = (expert.gate.to_vec::<T>(), expert.up.to_vec::<T>());
            if case.spec.interleaved {
                let rows = gate.chunks(shape.hidden_size).zip(up.chunks(shape.hidden_size));
                rows.for_each(|(g, u)| w13.extend(g.iter().chain(u)));
            } else {
                w13.extend(gate.iter().chain(&up));
            }
            w2.extend(expert.down.to_vec::<T>());
        }
        let bias = match case.spec.bias {
            false => None,
            true => {
                let all = |pick: fn(&moe_lora_core::ExpertBias) -> &Vec<f32>| -> Vec<f32> {
                    experts.iter().flat_map(|e| e.bias.iter().flat_map(|b| pick(b).clone())).collect()
                };
                Some([
                    upload(gpu, stream, &all(|b| &b.gate))?,
                    upload(gpu, stream, &all(|b| &b.up))?,
                    upload(gpu, stream, &all(|b| &b.down))?,
                ])
            }
        };
        let max_rank = case.adapters.iter().map(|a| a.max_rank()).max().unwrap_or(0).next_multiple_of(8);
        let (adapters, table) = adapters::<T>(gpu, stream, case)?;
        Ok(Self {
            sizes: Sizes {
                experts: shape.num_experts,
                top_k: shape.top_k,
                hidden: shape.hidden_size,
                intermediate: shape.intermediate_size,
                slots: case.adapters.len(),
                max_rank,
                first_expert: 0,
                all_experts: shape.num_experts,
            },
            format: if T::DTYPE == DType::F16 { Format::F16 } else { Format::Bf16 },
            interleaved: case.spec.interleaved,
            activation: case.weights.activation(),
            weigh_input: case.weights.router_weight() == RouterWeightPlacement::Input,
            scaling: case.weights.routed_scaling_factor(),
            w13: upload(gpu, stream, cast_slice::<T, u16>(&w13))?,
            w2: upload(gpu, stream, cast_slice::<T, u16>(&w2))?,
            bias,
            adapters,
            table,
            path: Path::Portable,
        })
    }

    /// Takes a path, if the GPU, the layer and the batch are made for it.
    pub fn take(&mut self, gpu: &Gpu, tokens: usize, path: Path) -> bool {
        let loaded = |kernel| gpu.kernels().function(kernel).is_some();
        let known = matches!(self.activation, Activation::Silu | Activation::ClampedSwiglu { .. });
        self.path = path;
        match path {
            Path::Portable => true,
            Path::Prefill => known && loaded(Kernel::PrefillGateUp(self.format)),
            Path::Decode => loaded(Kernel::DecodeAlign) && self.plan(gpu, tokens, true).is_some(),
            Path::Layer => loaded(Kernel::DecodeClear) && self.layer_plan(gpu, tokens, true).is_some(),
        }
    }

    /// The plan of a batch of few tokens.
    fn plan(&self, gpu: &Gpu, tokens: usize, lora: bool) -> Option<DecodePlan> {
        DecodePlan::new(&self.batch_sizes(tokens, lora), gpu.info().sm_count)
    }

    fn batch_sizes(&self, tokens: usize, lora: bool) -> BatchSizes {
        let s = &self.sizes;
        BatchSizes {
            num_tokens: tokens as u32,
            top_k: s.top_k as u32,
            num_experts: s.experts as u32,
            hidden_size: s.hidden as u32,
            intermediate_size: s.intermediate as u32,
            num_slots: if lora { s.slots as u32 } else { 0 },
            max_rank: s.max_rank as u32,
        }
    }

    /// Gives one stage to the stream.
    pub fn stage(
        &self,
        gpu: &Gpu,
        stream: &Stream,
        batch: &Batch,
        stage: Stage,
        rows_f32: bool,
        lora: bool,
    ) -> Result<(), GpuError> {
        let s = &self.sizes;
        let (sm_count, kernels, at) = (gpu.info().sm_count, gpu.kernels(), &batch.at);
        let lora = lora && s.max_rank > 0;
        let plan = if self.path == Path::Decode { self.plan(gpu, batch.tokens, lora) } else { None };
        let adapters = if lora { self.table.address() } else { 0 };
        let [gate_bias, up_bias, down_bias] =
            self.bias.as_ref().map_or([0; 3], |b| [b[0].address(), b[1].address(), b[2].address()]);
        let gate = self.w13.address();
        let half = if self.interleaved { s.hidden } else { s.intermediate * s.hidden };
        let shrink = ShrinkParams {
            chunks: batch.address(at.chunks),
            counts: batch.address(at.counts),
            adapters,
            shrunk: batch.address(at.shrunk),
            top_k: s.top_k as u32,
            num_experts: s.experts as u32,
            max_rank: s.max_rank as u32,
            shrunk_stride: 2 * s.max_rank as u32,
            octets: u32::from(self.path == Path::Prefill),
            ..Default::default()
        };
        let (activation, alpha, limit) = match self.activation {
            Activation::Silu => (0, 0.0, 0.0),
            Activation::Gelu => (1, 0.0, 0.0),
            Activation::GeluTanh => (2, 0.0, 0.0),
            Activation::ClampedSwiglu { alpha, limit } => (3, alpha, limit),
        };
        let gate_up = GateUpParams {
            hidden: batch.address(at.hidden),
            gate,
            up: gate + 2 * half as u64,
            gate_bias,
            up_bias,
            row_pair: batch.address(at.row_pair),
            row_weight: batch.address(at.row_weight),
            tiles: batch.address(at.tiles),
            segments: batch.address(at.segments),
            counts: batch.address(at.counts),
            adapters,
            shrunk: batch.address(at.shrunk),
            intermediate: batch.address(at.intermediate),
            expert_stride: 2 * (s.intermediate * s.hidden) as u64,
            row_stride: (s.hidden * if self.interleaved { 2 } else { 1 }) as u32,
            top_k: s.top_k as u32,
            num_experts: s.experts as u32,
            hidden_size: s.hidden as u32,
            intermediate_size: s.intermediate as u32,
            max_rank: s.max_rank as u32,
            shrunk_stride: 2 * s.max_rank as u32,
            activation,
            weigh_input: u32::from(self.weigh_input),
            alpha,
            limit,
            reserved: 0,
        };
        let down = DownParams {
            intermediate: batch.address(at.intermediate),
            down: self.w2.address(),
            bias: down_bias,
            tiles: batch.address(at.tiles),
            segments: batch.address(at.segments),
            counts: batch.address(at.counts),
            adapters,
            shrunk: batch.address(at.shrunk),
            rows_out: batch.address(at.rows),
            expert_stride: (s.intermediate * s.hidden) as u64,
            row_stride: s.intermediate as u32,
            num_experts: s.experts as u32,
            hidden_size: s.hidden as u32,
            intermediate_size: s.intermediate as u32,
            shrunk_stride: 2 * s.max_rank as u32,
            rows_f32: u32::from(rows_f32),
            first_b: 0,
            num_b: s.hidden as u32,
        };
        // SAFETY, for every launch: all addresses are parts of buffers that were made for these sizes, and the caller keeps
        // them until the stream is done.
        match stage {
            Stage::Align if self.path == Path::Layer => batch.clear_flags(gpu, stream),
            Stage::Align => {
                let tile_rows = match (self.path, plan) {
                    (Path::Portable, _) => 0,
                    (Path::Prefill, _) => PrefillGateUpParams::TILE_ROWS,
                    (_, plan) => plan.map_or(0, |plan| plan.tile_rows),
                };
                let aligner = match self.path {
                    Path::Decode => Aligner::Decode,
                    _ if batch.fits_cluster(gpu, s) => Aligner::Cluster,
                    _ => Aligner::Portable,
                };
                batch.align(gpu, stream, s, lora, tile_rows, aligner)
            }
            Stage::GateUp if self.path == Path::Layer => self.whole_layer(gpu, stream, batch, lora, &gate_up, &down),
            _ if self.path == Path::Layer => Ok(()),
            Stage::ShrinkGateUp | Stage::ShrinkDown if !lora || plan.is_some() => Ok(()),
            Stage::Combine if plan.is_some() => Ok(()),
            Stage::ShrinkGateUp => {
                let params = ShrinkParams {
                    input: batch.address(at.hidden),
                    row_pair: batch.address(at.row_pair),
                    width: s.hidden as u32,
                    first_projection: 0,
                    num_projections: 2,
                    ..shrink
                };
                if self.path == Path::Prefill {
                    let params = PrefillShrinkParams::new(&params, batch.address(at.segments));
                    // SAFETY: see above.
                    return unsafe { kernels.launch(stream, self.format, &params, params.launch(sm_count)) };
                }
                let launch = params.launch(&batch.bounds, sm_count);
                // SAFETY: see above.
                unsafe { kernels.launch(stream, self.format, &params, launch) }
            }
            Stage::GateUp => {
                if let Some(plan) = plan {
                    let params = decode_gate_up(self.format, gate_up, batch.address(at.chunks), &plan)?;
                    // SAFETY: see above.
                    return unsafe { kernels.launch(stream, self.format, &params, params.launch(&plan, sm_count)) };
                }
                if self.path == Path::Prefill {
                    let params = prefill_gate_up(self.format, gate_up)?;
                    // SAFETY: see above.
                    return unsafe { kernels.launch(stream, self.format, &params, params.launch(sm_count)) };
                }
                let launch = gate_up.launch(&batch.bounds, sm_count);
                // SAFETY: see above.
                unsafe { kernels.launch(stream, self.format, &gate_up, launch) }
            }
            Stage::ShrinkDown => {
                let params = ShrinkParams {
                    input: batch.address(at.intermediate),
                    width: s.intermediate as u32,
                    first_projection: 2,
                    num_projections: 1,
                    ..shrink
                };
                let launch = params.launch(&batch.bounds, sm_count);
                // SAFETY: see above.
                unsafe { kernels.launch(stream, self.format, &params, launch) }
            }
            Stage::Down => {
                if let Some(plan) = plan {
                    let rest = DecodeDownParams {
                        row_pair: batch.address(at.row_pair),
                        row_weight: if self.weigh_input { 0 } else { batch.address(at.row_weight) },
                        chunks: batch.address(at.chunks),
                        out: batch.address(at.out),
                        num_tokens: batch.tokens as u32,
                        top_k: s.top_k as u32,
                        scaling: self.scaling,
                        ..Default::default()
                    };
                    let params = decode_down(self.format, &down, &plan, rest)?;
                    // SAFETY: see above.
                    return unsafe { kernels.launch(stream, self.format, &params, params.launch(&plan)) };
                }
                if self.path == Path::Prefill {
                    let params = prefill_down(self.format, down)?;
                    // SAFETY: see above.
                    return unsafe { kernels.launch(stream, self.format, &params, params.launch(sm_count)) };
                }
                let launch = down.launch(&batch.bounds, sm_count);
                // SAFETY: see above.
                unsafe { kernels.launch(stream, self.format, &down, launch) }
            }
            Stage::Combine => {
                let params = CombineParams {
                    rows_in: batch.address(at.rows),
                    pair_row: batch.address(at.pair_row),
                    topk_weights: if self.weigh_input { 0 } else { batch.address(at.weights) },
                    out: batch.address(at.out),
                    num_tokens: batch.tokens as u32,
                    top_k: s.top_k as u32,
                    hidden_size: s.hidden as u32,
                    rows_f32: u32::from(rows_f32),
                    out_f32: 0,
                    scaling: self.scaling,
                };
                // SAFETY: see above.
                unsafe { kernels.launch(stream, self.format, &params, params.launch()) }
            }
        }
    }

    /// Gives a whole layer to the stream.
    pub fn launch(
        &self,
        gpu: &Gpu,
        stream: &Stream,
        batch: &Batch,
        rows_f32: bool,
        lora: bool,
    ) -> Result<(), GpuError> {
        STAGES.into_iter().try_for_each(|stage| self.stage(gpu, stream, batch, stage, rows_f32, lora))
    }
}
