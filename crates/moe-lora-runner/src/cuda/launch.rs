//! The launches of one layer, from the raw door's struct.
#![allow(unsafe_code, reason = "kernels check nothing; why each launch is sound is said where it is")]

use super::path::{Kernels, Path};
use super::prefill;
use super::raw::{DTYPE_F16, DTYPE_F32, ForwardArgs, check_sizes};
use super::workspace::Workspace;
use crate::RunnerError;
use moe_lora_core::{AdapterPart, InputError, LayerShape};
use moe_lora_cuda::{Gpu, GpuError, Stream, prefill_down, prefill_gate_up};
use moe_lora_kernels::{
    AlignParams, ClusterAlignParams, CombineParams, DownParams, Format, GateUpParams, KernelParams, Launch,
    PrefillGateUpParams, PrefillShrinkParams, RouteCounts, ShrinkParams, SplitParams,
};

/// Bytes of workspace that suffice for every [`forward`] on `gpu` of a layer of these sizes with up to `max_tokens` tokens
/// and `max_slots` adapter slots of ranks up to `max_rank`.
///
/// # Errors
/// If the kernels cannot run such layers, or so many tokens.
pub fn workspace_bytes(
    gpu: &Gpu,
    shape: &LayerShape,
    max_tokens: usize,
    max_slots: usize,
    max_rank: usize,
) -> Result<usize, InputError> {
    check_sizes(shape, max_tokens, max_rank)?;
    let max_rank = max_rank.next_multiple_of(8);
    Ok(Workspace::new(shape, gpu.info().sm_count, max_tokens, max_slots, max_rank).bytes)
}

/// Gives one layer to `args.stream`: six launches, four for no slots, on Hopper three for few tokens and two for
/// up to 16. Nothing is allocated, nothing waits, and the stream may
/// be in capture.
///
/// # Errors
/// Names the field that is wrong; nothing was launched then. Or the driver's error. What goes wrong on the GPU appears at a
/// later call.
///
/// # Safety
/// Until the stream has run it, every address in `args` must be valid on `gpu`, for what its field says and as large as the
/// sizes say, and `out`, `counts` and the workspace must not be touched by other work. Every entry of the table that a
/// token's slot and expert select must be of a rank up to `args.max_rank`, with matrices for these sizes in `args.dtype`.
/// `args.stream` must be a stream of `gpu`'s primary context. A captured forward promises the same for every replay.
pub unsafe fn forward(gpu: &Gpu, args: &ForwardArgs) -> Result<(), RunnerError> {
    // SAFETY: the caller's promise.
    unsafe { forward_on(gpu, args, None) }
}

/// [`forward`] on a path of the caller's choice, for tests and benchmarks; `None` takes the fastest one.
///
/// # Errors
/// As [`forward`], and if the path cannot run this batch on this GPU.
///
/// # Safety
/// As [`forward`].
pub unsafe fn forward_on(gpu: &Gpu, args: &ForwardArgs, path: Option<Path>) -> Result<(), RunnerError> {
    if args.adapter_parts > 1 {
        let expected = "at most 1; `forward_exchanging` takes parts";
        return Err(InputError::new(args.adapter_parts.to_string(), expected).in_tensor("adapter_parts").into());
    }
    // SAFETY: the caller's promise.
    unsafe { Call::new(gpu, args, path) }?.launch(&mut |_, _| Ok(()))
}

/// [`forward`] of a rank with parts of fully sharded adapters, in nine launches and with two exchanges. `exchange(offset, count)`
/// is called twice, if there are tokens: it has to give `args.stream` what replaces `count` f32 values, from byte `offset` of the
/// workspace on, by their sums over the ranks of the tensor-parallel group. `count` is 0 for no slots. Where adapters are whole
/// it is not called.
///
/// # Errors
/// As [`forward`], and those of `exchange`.
///
/// # Safety
/// As [`forward`]; and in the table A of gate and up holds the ranks, and B of down the rows, of
/// [`AdapterPart`]`::new(args.adapter_part, args.adapter_parts)`, A without padding.
pub unsafe fn forward_exchanging<E: From<RunnerError>>(
    gpu: &Gpu,
    args: &ForwardArgs,
    mut exchange: impl FnMut(usize, usize) -> Result<(), E>,
) -> Result<(), E> {
    // SAFETY: the caller's promise.
    unsafe { Call::new(gpu, args, None) }?.launch(&mut exchange)
}

/// The path that [`forward_on`] takes: for `None` the one that was seen to be fastest for such sizes on such a GPU.
///
/// # Errors
/// As [`forward_on`].
pub fn path(gpu: &Gpu, args: &ForwardArgs, path: Option<Path>) -> Result<Path, InputError> {
    args.check()?;
    Ok(Kernels::of(gpu, format(args), args, path)?.path())
}

const fn format(args: &ForwardArgs) -> Format {
    if args.dtype == DTYPE_F16 { Format::F16 } else { Format::Bf16 }
}

/// A forward that was checked.
pub(super) struct Call<'a> {
    pub(super) gpu: &'a Gpu,
    stream: Stream,
    pub(super) args: &'a ForwardArgs,
    pub(super) workspace: Workspace,
    /// A multiple of 8.
    max_rank: u32,
    pub(super) format: Format,
    kernels: Kernels,
    /// Of fully sharded adapters.
    part: AdapterPart,
}

impl<'a> Call<'a> {
    /// Checks what a host can check.
    ///
    /// # Safety
    /// As [`forward_exchanging`].
    unsafe fn new(gpu: &'a Gpu, args: &'a ForwardArgs, path: Option<Path>) -> Result<Self, RunnerError> {
        let shape = args.check()?;
        let (tokens, slots) = (args.num_tokens as usize, args.num_slots as usize);
        let max_rank = (args.max_rank as usize).next_multiple_of(8);
        let workspace = Workspace::new(&shape, gpu.info().sm_count, tokens, slots, max_rank);
        if tokens > 0 && (workspace.bytes as u64) > args.workspace_bytes {
            let expected = format!("at least {} for {tokens} tokens and {slots} slots", workspace.bytes);
            return Err(InputError::new(args.workspace_bytes.to_string(), expected)
                .in_tensor("workspace_bytes")
                .into());
        }
        // SAFETY: the caller's promise; the borrowed handle is dropped before the caller's function returns.
        let stream = unsafe { gpu.borrow_stream(args.stream as usize as _) };
        let format = format(args);
        let kernels = Kernels::of(gpu, format, args, path)?;
        Ok(Self { gpu, stream, args, workspace, max_rank: max_rank as u32, format, kernels, part: shape.adapter_part })
    }

    /// The kernels, in order.
    fn launch<E: From<RunnerError>>(&self, exchange: &mut dyn FnMut(usize, usize) -> Result<(), E>) -> Result<(), E> {
        let given = |launched: Result<(), GpuError>| launched.map_err(|error| E::from(error.into()));
        if self.args.num_tokens == 0 {
            return given(match self.args.counts {
                0 => Ok(()),
                counts => self.zero(counts, size_of::<RouteCounts>()),
            });
        }
        if let Kernels::Layer(plan) = &self.kernels {
            return given(self.launch_layer(plan));
        }
        if let Kernels::Decode(plan) = &self.kernels {
            return given(self.launch_decode(plan));
        }
        given(self.launch_to_gate_up())?;
        if !self.part.is_whole() {
            exchange(self.workspace.shrunk, self.shrunk_count(2))?;
        }
        given(self.launch_to_down())?;
        if !self.part.is_whole() {
            exchange(self.workspace.shrunk, self.shrunk_count(1))?;
        }
        given(self.launch_rest())
    }

    const fn lora(&self) -> bool {
        self.args.num_slots > 0
    }

    /// Values of S.
    fn shrunk_count(&self, projections: usize) -> usize {
        if self.lora() { self.workspace.bounds.pairs as usize * projections * self.max_rank as usize } else { 0 }
    }

    /// Align, and shrink for gate and up.
    fn launch_to_gate_up(&self) -> Result<(), GpuError> {
        let (sm_count, bounds) = (self.gpu.info().sm_count, &self.workspace.bounds);
        self.launch_align()?;
        if self.lora() {
            if !self.part.is_whole() {
                // What other parts have of A, they will add.
                self.zero(self.at(self.workspace.shrunk), self.shrunk_count(2) * size_of::<f32>())?;
            }
            let shrink = self.shrink_gate_up();
            if self.prefill() && prefill::long_segments(self.args) {
                let shrink = PrefillShrinkParams::new(&shrink, self.at(self.workspace.segments));
                self.give(&shrink, shrink.launch(sm_count))?;
            } else {
                self.give(&shrink, shrink.launch(bounds, sm_count))?;
            }
        }
        Ok(())
    }

    /// Gate and up, and shrink for down.
    fn launch_to_down(&self) -> Result<(), GpuError> {
        let (sm_count, bounds) = (self.gpu.info().sm_count, &self.workspace.bounds);
        self.split(2)?;
        let gate_up = self.gate_up();
        if self.prefill() {
            let gate_up = prefill_gate_up(self.format, gate_up)?;
            self.give(&gate_up, gate_up.launch(sm_count))?;
        } else {
            self.give(&gate_up, gate_up.launch(bounds, sm_count))?;
        }
        if self.lora() {
            let shrink = self.shrink_down();
            self.give(&shrink, shrink.launch(bounds, sm_count))?;
        }
        Ok(())
    }

    /// Down and the sum.
    fn launch_rest(&self) -> Result<(), GpuError> {
        let (sm_count, bounds) = (self.gpu.info().sm_count, &self.workspace.bounds);
        self.split(1)?;
        let down = self.down();
        if self.prefill() {
            let down = prefill_down(self.format, down)?;
            self.give(&down, down.launch(sm_count))?;
        } else {
            self.give(&down, down.launch(bounds, sm_count))?;
        }
        let combine = self.combine();
        self.give(&combine, combine.launch())
    }

    /// Makes S of all parts what the products read.
    fn split(&self, projections: u32) -> Result<(), GpuError> {
        if self.part.is_whole() || !self.lora() {
            return Ok(());
        }
        let split = SplitParams {
            counts: self.counts(),
            shrunk: self.at(self.workspace.shrunk),
            stride: projections * self.max_rank,
            octets: u32::from(self.prefill()),
        };
        self.give(&split, split.launch(&self.workspace.bounds, self.gpu.info().sm_count))
    }

    /// Numbers from row to row of the down projection's S: what is exchanged has no gaps.
    const fn down_stride(&self) -> u32 {
        if self.part.is_whole() { 2 * self.max_rank } else { self.max_rank }
    }

    /// By one cluster on Hopper, if the batch fits into its shared memory, else by as many blocks as it needs.
    fn launch_align(&self) -> Result<(), GpuError> {
        let read = self.args.weigh_input == 1;
        let align =
            AlignParams { row_weight: if read { self.at(self.workspace.row_weight) } else { 0 }, ..self.align() };
        let (cluster, most_blocks) = (ClusterAlignParams(align), self.gpu.kernels().align_cluster());
        if let Some(launch) = cluster.launch(most_blocks).filter(|_| most_blocks > 0) {
            return self.give(&cluster, launch);
        }
        let launch = align.launch(self.gpu.info().sm_count);
        if launch.cooperative {
            self.zero(align.barrier, size_of::<u32>())?;
        }
        self.give(&align, launch)
    }

    pub(super) fn give<P: KernelParams>(&self, params: &P, launch: Launch) -> Result<(), GpuError> {
        // SAFETY: the functions below set every address to one of the caller's, or to a part of the workspace that was laid
        // out for these sizes; `launch` is `params`' own.
        unsafe { self.gpu.kernels().launch(&self.stream, self.format, params, launch) }
    }

    fn zero(&self, address: u64, bytes: usize) -> Result<(), GpuError> {
        // SAFETY: a part of the workspace, or the caller's counts.
        unsafe { self.stream.fill_address(address, bytes, 0) }
    }

    pub(super) const fn at(&self, offset: usize) -> u64 {
        self.args.workspace + offset as u64
    }

    /// Whether Hopper's products for many rows run, and not the portable ones.
    const fn prefill(&self) -> bool {
        matches!(self.kernels, Kernels::Prefill)
    }

    /// Whether expert outputs stay f32 until the sum. Where products are many they would cost 3 % of the layer's time.
    const fn rows_f32(&self) -> bool {
        self.workspace.rows_f32 && !self.prefill()
    }

    const fn adapters(&self) -> u64 {
        if self.args.num_slots > 0 { self.args.adapters } else { 0 }
    }

    const fn counts(&self) -> u64 {
        if self.args.counts > 0 { self.args.counts } else { self.at(self.workspace.counts) }
    }

    pub(super) const fn align(&self) -> AlignParams {
        let (args, places) = (self.args, &self.workspace);
        AlignParams {
            topk_ids: args.topk_ids,
            topk_weights: args.topk_weights,
            token_slots: if args.num_slots > 0 { args.token_slots } else { 0 },
            slot_active: if args.num_slots > 0 { args.slot_active } else { 0 },
            row_pair: self.at(places.row_pair),
            row_weight: self.at(places.row_weight),
            pair_row: self.at(places.pair_row),
            segments: self.at(places.segments),
            tiles: self.at(places.tiles),
            chunks: self.at(places.chunks),
            counts: self.counts(),
            order: self.at(places.order),
            table: self.at(places.sort_table),
            barrier: self.at(places.barrier),
            num_tokens: args.num_tokens,
            top_k: args.top_k,
            num_experts: args.num_experts,
            num_slots: args.num_slots,
            tile_rows: if self.prefill() { PrefillGateUpParams::TILE_ROWS } else { 0 },
            first_expert: args.first_expert,
            all_experts: args.all_experts,
            reserved: 0,
        }
    }

    fn shrink(&self) -> ShrinkParams {
        ShrinkParams {
            chunks: self.at(self.workspace.chunks),
            counts: self.counts(),
            adapters: self.adapters(),
            shrunk: self.at(self.workspace.shrunk),
            top_k: self.args.top_k,
            num_experts: self.args.num_experts,
            max_rank: self.max_rank,
            shrunk_stride: 2 * self.max_rank,
            octets: self.prefill() as u32,
            ..Default::default()
        }
    }

    fn shrink_gate_up(&self) -> ShrinkParams {
        ShrinkParams {
            input: self.args.hidden,
            row_pair: self.at(self.workspace.row_pair),
            width: self.args.hidden_size,
            first_projection: 0,
            num_projections: 2,
            part: self.part.index() as u32,
            parts: if self.part.is_whole() { 0 } else { self.part.of() as u32 },
            ..self.shrink()
        }
    }

    fn shrink_down(&self) -> ShrinkParams {
        ShrinkParams {
            input: self.at(self.workspace.intermediate),
            width: self.args.intermediate_size,
            first_projection: 2,
            num_projections: 1,
            shrunk_stride: self.down_stride(),
            // Every rank has all ranks of A, for a part of I.
            parts: u32::from(!self.part.is_whole()),
            ..self.shrink()
        }
    }

    pub(super) const fn gate_up(&self) -> GateUpParams {
        let (args, places) = (self.args, &self.workspace);
        GateUpParams {
            hidden: args.hidden,
            gate: args.gate,
            up: args.up,
            gate_bias: args.gate_bias,
            up_bias: args.up_bias,
            row_pair: self.at(places.row_pair),
            row_weight: self.at(places.row_weight),
            tiles: self.at(places.tiles),
            segments: self.at(places.segments),
            counts: self.counts(),
            adapters: self.adapters(),
            shrunk: self.at(places.shrunk),
            intermediate: self.at(places.intermediate),
            expert_stride: args.gate_up_expert_stride,
            row_stride: args.gate_up_row_stride,
            top_k: args.top_k,
            num_experts: args.num_experts,
            hidden_size: args.hidden_size,
            intermediate_size: args.intermediate_size,
            max_rank: self.max_rank,
            shrunk_stride: 2 * self.max_rank,
            activation: args.activation,
            weigh_input: args.weigh_input,
            alpha: args.alpha,
            limit: args.limit,
            reserved: 0,
        }
    }

    pub(super) fn down(&self) -> DownParams {
        let (args, places) = (self.args, &self.workspace);
        let b = self.part.hidden(args.hidden_size as usize);
        DownParams {
            intermediate: self.at(places.intermediate),
            down: args.down,
            bias: args.down_bias,
            tiles: self.at(places.tiles),
            segments: self.at(places.segments),
            counts: self.counts(),
            adapters: self.adapters(),
            shrunk: self.at(places.shrunk),
            rows_out: self.at(places.rows),
            expert_stride: args.down_expert_stride,
            row_stride: args.down_row_stride,
            num_experts: args.num_experts,
            hidden_size: args.hidden_size,
            intermediate_size: args.intermediate_size,
            shrunk_stride: self.down_stride(),
            rows_f32: u32::from(self.rows_f32()),
            first_b: b.start as u32,
            num_b: b.len() as u32,
        }
    }

    fn combine(&self) -> CombineParams {
        let (args, places) = (self.args, &self.workspace);
        CombineParams {
            rows_in: self.at(places.rows),
            pair_row: self.at(places.pair_row),
            topk_weights: if args.weigh_input == 1 { 0 } else { args.topk_weights },
            out: args.out,
            num_tokens: args.num_tokens,
            top_k: args.top_k,
            hidden_size: args.hidden_size,
            rows_f32: u32::from(self.rows_f32()),
            out_f32: u32::from(args.out_dtype == DTYPE_F32),
            scaling: args.scaling,
        }
    }
}
