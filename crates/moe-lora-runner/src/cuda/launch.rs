//! The launches of one layer: the only unsafe code of this crate.
#![allow(unsafe_code, reason = "kernels check nothing; why each launch is sound is said where it is")]

use super::places::Places;
use super::weights::CudaWeights;
use moe_lora_core::{Activation, LayerShape, RouterWeightPlacement};
use moe_lora_cuda::{DeviceBuffer, Gpu, GpuError, Stream};
use moe_lora_kernels::{AlignParams, CombineParams, DownParams, GateUpParams, KernelParams, Launch, ShrinkParams};
use moe_lora_pool::TableAddress;

/// One batch whose inputs are in GPU memory.
///
/// The caller answers for these, on which the launches rely: `places` is of the weights' shape and fits into `memory`; its
/// inputs are there, with experts in `[-1, E)` and slots that are -1 or leased; `table` holds `places.slots * E * 3` entries, in
/// these slots for matrices of that shape and the weights' format, of ranks up to `places.max_rank`; `barrier` is a u32 that was zeroed
/// once; all of it is on `gpu`, and neither freed nor used by anybody else until `stream` is done.
pub(super) struct Call<'a> {
    pub(super) gpu: &'a Gpu,
    pub(super) stream: &'a Stream,
    pub(super) weights: &'a CudaWeights,
    pub(super) places: &'a Places,
    pub(super) memory: &'a DeviceBuffer,
    pub(super) barrier: &'a DeviceBuffer,
    /// Used if the batch uses any adapter.
    pub(super) table: TableAddress,
    /// The output is f32 and not the weights' format.
    pub(super) out_f32: bool,
}

impl Call<'_> {
    /// Gives a whole layer to the stream: six launches, four without adapters, none for no token.
    pub(super) fn launch(&self) -> Result<(), GpuError> {
        if self.places.tokens == 0 {
            return Ok(());
        }
        let (sm_count, bounds) = (self.gpu.info().sm_count, &self.places.bounds);
        let lora = self.places.slots > 0;
        let align = self.align();
        self.give(&align, align.launch(sm_count))?;
        if lora {
            let shrink = self.shrink_gate_up();
            self.give(&shrink, shrink.launch(bounds, sm_count))?;
        }
        let gate_up = self.gate_up();
        self.give(&gate_up, gate_up.launch(bounds, sm_count))?;
        if lora {
            let shrink = self.shrink_down();
            self.give(&shrink, shrink.launch(bounds, sm_count))?;
        }
        let down = self.down();
        self.give(&down, down.launch(bounds, sm_count))?;
        let combine = self.combine();
        self.give(&combine, combine.launch())
    }

    fn give<P: KernelParams>(&self, params: &P, launch: Launch) -> Result<(), GpuError> {
        // SAFETY: the functions below set every address to a buffer or a place of the kind and size that its field asks
        // for, all of them multiples of 256, by what the caller promises of this struct; `launch` is `params`' own.
        unsafe { self.gpu.kernels().launch(self.stream, self.weights.format(), params, launch) }
    }

    const fn at(&self, offset: usize) -> u64 {
        self.memory.address() + offset as u64
    }

    const fn adapters(&self) -> u64 {
        if self.places.slots > 0 { self.table.entries } else { 0 }
    }

    const fn shape(&self) -> &LayerShape {
        self.weights.shape()
    }

    const fn shrunk_stride(&self) -> u32 {
        2 * self.places.max_rank as u32
    }

    fn bias(&self) -> [u64; 3] {
        self.weights.bias.as_ref().map_or([0; 3], |b| [b[0].address(), b[1].address(), b[2].address()])
    }

    fn weigh_input(&self) -> bool {
        self.weights.router_weight == RouterWeightPlacement::Input
    }

    fn align(&self) -> AlignParams {
        let (places, shape) = (self.places, self.shape());
        AlignParams {
            topk_ids: self.at(places.topk_ids),
            topk_weights: self.at(places.topk_weights),
            token_slots: if places.slots > 0 { self.at(places.token_slots) } else { 0 },
            slot_active: if places.slots > 0 { self.table.active } else { 0 },
            row_pair: self.at(places.row_pair),
            row_weight: self.at(places.row_weight),
            pair_row: self.at(places.pair_row),
            segments: self.at(places.segments),
            tiles: self.at(places.tiles),
            chunks: self.at(places.chunks),
            counts: self.at(places.counts),
            order: self.at(places.order),
            table: self.at(places.sort_table),
            barrier: self.barrier.address(),
            num_tokens: places.tokens as u32,
            top_k: shape.top_k as u32,
            num_experts: shape.num_experts as u32,
            num_slots: places.slots as u32,
        }
    }

    fn shrink(&self) -> ShrinkParams {
        ShrinkParams {
            chunks: self.at(self.places.chunks),
            counts: self.at(self.places.counts),
            adapters: self.adapters(),
            shrunk: self.at(self.places.shrunk),
            top_k: self.shape().top_k as u32,
            num_experts: self.shape().num_experts as u32,
            max_rank: self.places.max_rank as u32,
            shrunk_stride: self.shrunk_stride(),
            ..Default::default()
        }
    }

    fn shrink_gate_up(&self) -> ShrinkParams {
        ShrinkParams {
            input: self.at(self.places.hidden),
            row_pair: self.at(self.places.row_pair),
            width: self.shape().hidden_size as u32,
            first_projection: 0,
            num_projections: 2,
            ..self.shrink()
        }
    }

    fn shrink_down(&self) -> ShrinkParams {
        ShrinkParams {
            input: self.at(self.places.intermediate),
            width: self.shape().intermediate_size as u32,
            first_projection: 2,
            num_projections: 1,
            ..self.shrink()
        }
    }

    fn gate_up(&self) -> GateUpParams {
        let (places, shape) = (self.places, self.shape());
        let half = shape.intermediate_size as u64 * shape.hidden_size as u64;
        let [gate_bias, up_bias, _] = self.bias();
        let (activation, alpha, limit) = match self.weights.activation {
            Activation::Silu => (0, 0.0, 0.0),
            Activation::Gelu => (1, 0.0, 0.0),
            Activation::GeluTanh => (2, 0.0, 0.0),
            Activation::ClampedSwiglu { alpha, limit } => (3, alpha, limit),
        };
        GateUpParams {
            hidden: self.at(places.hidden),
            gate: self.weights.w13.address(),
            up: self.weights.w13.address() + 2 * half,
            gate_bias,
            up_bias,
            row_pair: self.at(places.row_pair),
            row_weight: self.at(places.row_weight),
            tiles: self.at(places.tiles),
            segments: self.at(places.segments),
            counts: self.at(places.counts),
            adapters: self.adapters(),
            shrunk: self.at(places.shrunk),
            intermediate: self.at(places.intermediate),
            expert_stride: 2 * half,
            row_stride: shape.hidden_size as u32,
            top_k: shape.top_k as u32,
            num_experts: shape.num_experts as u32,
            hidden_size: shape.hidden_size as u32,
            intermediate_size: shape.intermediate_size as u32,
            max_rank: places.max_rank as u32,
            shrunk_stride: self.shrunk_stride(),
            activation,
            weigh_input: u32::from(self.weigh_input()),
            alpha,
            limit,
            reserved: 0,
        }
    }

    fn down(&self) -> DownParams {
        let (places, shape) = (self.places, self.shape());
        DownParams {
            intermediate: self.at(places.intermediate),
            down: self.weights.w2.address(),
            bias: self.bias()[2],
            tiles: self.at(places.tiles),
            segments: self.at(places.segments),
            counts: self.at(places.counts),
            adapters: self.adapters(),
            shrunk: self.at(places.shrunk),
            rows_out: self.at(places.rows),
            expert_stride: shape.intermediate_size as u64 * shape.hidden_size as u64,
            row_stride: shape.intermediate_size as u32,
            num_experts: shape.num_experts as u32,
            hidden_size: shape.hidden_size as u32,
            intermediate_size: shape.intermediate_size as u32,
            shrunk_stride: self.shrunk_stride(),
            rows_f32: u32::from(places.rows_f32),
        }
    }

    fn combine(&self) -> CombineParams {
        let places = self.places;
        CombineParams {
            rows_in: self.at(places.rows),
            pair_row: self.at(places.pair_row),
            topk_weights: if self.weigh_input() { 0 } else { self.at(places.topk_weights) },
            out: self.at(places.out),
            num_tokens: places.tokens as u32,
            top_k: self.shape().top_k as u32,
            hidden_size: self.shape().hidden_size as u32,
            rows_f32: u32::from(places.rows_f32),
            out_f32: u32::from(self.out_f32),
            scaling: self.weights.routed_scaling_factor,
        }
    }
}
