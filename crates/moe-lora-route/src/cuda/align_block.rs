//! The block format of the reference system on a GPU: the only unsafe code of this crate.
#![allow(unsafe_code, reason = "the kernel checks no address; why each launch is sound is said where it is")]

use crate::cpu::check_align_block;
use crate::{AlignBlockInput, AlignBlockOutput, RouteError};
use bytemuck::NoUninit;
use moe_lora_core::InputError;
use moe_lora_cuda::{DeviceBuffer, Gpu, GpuError, Layout, Stream};
use moe_lora_kernels::{AlignBlockParams, AlignParams, Format};

/// The largest batch of a [`CudaAlignBlock`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct AlignBlockLimits {
    /// Tokens, M.
    pub tokens: usize,
    /// Experts a token uses, k.
    pub top_k: usize,
    /// Experts, E, at most 1024.
    pub num_experts: usize,
    /// Adapter slots, L.
    pub max_loras: usize,
}

/// A batch whose arrays are in the memory of a GPU: addresses, all of i32 but for `topk_ids`. What they hold is said at
/// [`AlignBlockInput`] and [`AlignBlockOutput`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct AlignBlockAddresses {
    /// `[M, k]`.
    pub topk_ids: u64,
    /// Whether `topk_ids` are i64 and not i32.
    pub ids_are_i64: bool,
    /// `[S + 1]`.
    pub seg_indptr: u64,
    /// `[S]`.
    pub req_to_lora: u64,
    /// `[L]`.
    pub lora_ids: u64,
    /// `[L]`.
    pub adapter_enabled: u64,
    /// `[E]`, or 0 for none.
    pub expert_map: u64,
    /// `[L * p]`, out.
    pub sorted_token_ids: u64,
    /// `[L * p / block_size]`, out.
    pub expert_ids: u64,
    /// `[L]`, out.
    pub num_tokens_post_pad: u64,
    /// Tokens, M.
    pub num_tokens: usize,
    /// Segments, S.
    pub num_segments: usize,
    /// Entries of a block.
    pub block_size: usize,
    /// Entries of a slot, p: a multiple of `block_size`.
    pub slot_entries: usize,
}

/// [`moe_lora_align_block_size`](crate::moe_lora_align_block_size) on a GPU, with its workspace: one launch, no host in between,
/// equal outputs to the bit. Slots may be any number, pairs fewer than 2³¹.
///
/// What the CPU refuses is skipped here where only the GPU can see it: experts and slots that do not exist take no part, and
/// nothing is written outside the outputs. A workspace serves one batch at a time.
#[derive(Debug)]
pub struct CudaAlignBlock {
    gpu: Gpu,
    limits: AlignBlockLimits,
    /// Places for the largest batch: `enabled`, `token_slots`, `order`, `row_pair`, `starts`, `ends`, `table`.
    places: [usize; 7],
    memory: DeviceBuffer,
    barrier: DeviceBuffer,
}

impl CudaAlignBlock {
    /// Allocates all that any batch within `limits` needs.
    ///
    /// # Errors
    /// If there are more than 1024 experts, 2³¹ pairs or slots or more, or the memory does not suffice.
    pub fn new(gpu: &Gpu, limits: AlignBlockLimits) -> Result<Self, RouteError> {
        let AlignBlockLimits { tokens, top_k, num_experts, max_loras } = limits;
        let fits = |n: Option<usize>| n.is_some_and(|n| i32::try_from(n).is_ok());
        if !(1..=1024).contains(&num_experts)
            || top_k == 0
            || !fits(tokens.checked_mul(top_k))
            || !fits(Some(max_loras))
        {
            let expected = "1 to 1024 experts, at least one a token, fewer than 2^31 pairs and slots";
            return Err(InputError::new(format!("{limits:?}"), expected).into());
        }
        let (mut layout, shares) = (Layout::default(), max_loras.saturating_mul(num_experts));
        let table = AlignParams::table_bytes(num_experts as u32, gpu.info().sm_count) as usize;
        let counts = [max_loras, tokens, 2 * tokens, tokens * top_k, shares, shares, table / size_of::<u32>()];
        let places = counts.map(|count| layout.add::<u32>(count));
        let (memory, barrier) = (gpu.alloc(layout.bytes())?, gpu.alloc(size_of::<u32>())?);
        gpu.stream()?.upload(&barrier, 0, &[0_u32])?;
        Ok(Self { gpu: gpu.clone(), limits, places, memory, barrier })
    }

    /// Bytes of the workspace: a function of the limits and the GPU.
    #[must_use]
    pub const fn workspace_bytes(&self) -> usize {
        self.memory.bytes() + self.barrier.bytes()
    }

    /// Gives one batch to the stream.
    ///
    /// # Errors
    /// If a size is beyond the limits, or the driver refuses the launch.
    ///
    /// # Safety
    /// Every address must be that of an array of the size and kind stated at its field, on this GPU, valid and not touched by
    /// other work until the launch has run, and only one launch with this workspace may run at a time.
    pub unsafe fn launch(&self, stream: &Stream, batch: &AlignBlockAddresses) -> Result<(), RouteError> {
        let limits = &self.limits;
        let whole_blocks = batch.block_size > 0 && batch.slot_entries.is_multiple_of(batch.block_size);
        let sizes = [batch.num_segments, batch.slot_entries, batch.block_size];
        if batch.num_tokens > limits.tokens || !whole_blocks || sizes.iter().any(|&n| i32::try_from(n).is_err()) {
            let found = format!("{} tokens, {sizes:?} segments, entries a slot and a block", batch.num_tokens);
            let expected = format!("at most {} tokens, whole blocks, sizes below 2^31", limits.tokens);
            return Err(InputError::new(found, expected).into());
        }
        let [enabled, token_slots, order, row_pair, starts, ends, table] =
            self.places.map(|place| self.memory.address() + place as u64);
        let params = AlignBlockParams {
            topk_ids: batch.topk_ids,
            seg_indptr: batch.seg_indptr,
            req_to_lora: batch.req_to_lora,
            lora_ids: batch.lora_ids,
            adapter_enabled: batch.adapter_enabled,
            expert_map: batch.expert_map,
            sorted_token_ids: batch.sorted_token_ids,
            expert_ids: batch.expert_ids,
            num_tokens_post_pad: batch.num_tokens_post_pad,
            enabled,
            token_slots,
            order,
            row_pair,
            starts,
            ends,
            table,
            barrier: self.barrier.address(),
            ids_are_i64: u32::from(batch.ids_are_i64),
            num_tokens: batch.num_tokens as u32,
            top_k: limits.top_k as u32,
            num_experts: limits.num_experts as u32,
            num_segments: batch.num_segments as u32,
            max_loras: limits.max_loras as u32,
            block_size: batch.block_size as u32,
            slot_entries: batch.slot_entries as u32,
        };
        let launch = params.launch(self.gpu.info().sm_count);
        // SAFETY: inputs and outputs are the caller's promise; the scratch was laid out for sizes at least as large, and the
        // barrier was zeroed.
        Ok(unsafe { self.gpu.kernels().launch(stream, Format::Bf16, &params, launch) }?)
    }

    /// [`moe_lora_align_block_size`](crate::moe_lora_align_block_size) of arrays in host memory: checked, copied to the GPU,
    /// computed there, copied back.
    ///
    /// # Errors
    /// What that function refuses, sizes other than the limits' (`top_k`, `num_experts`, `max_loras`) or beyond them, and
    /// errors of the GPU. Unless the GPU fails, nothing is written then.
    pub fn align<I: Copy + Into<i64> + NoUninit>(
        &mut self,
        input: AlignBlockInput<'_, I>,
        output: AlignBlockOutput<'_>,
    ) -> Result<(), RouteError> {
        let slot_entries = check_align_block(&input, &output)?;
        let found = [input.top_k, input.num_experts, input.max_loras];
        let want = [self.limits.top_k, self.limits.num_experts, self.limits.max_loras];
        if found != want {
            let text = |n: [usize; 3]| format!("k, E, L = {n:?}");
            return Err(InputError::new(text(found), text(want)).into());
        }
        let stream = self.gpu.stream()?;
        // What slots that take no part keep.
        let sorted_token_ids = self.copy(&stream, output.sorted_token_ids)?;
        let expert_ids = self.copy(&stream, output.expert_ids)?;
        let num_tokens_post_pad = self.copy(&stream, output.num_tokens_post_pad)?;
        let ids_are_i64 = size_of::<I>() != size_of::<i32>();
        let topk_ids = match ids_are_i64 {
            false => self.copy(&stream, input.topk_ids)?,
            true => self.copy(&stream, &input.topk_ids.iter().map(|&id| id.into()).collect::<Vec<i64>>())?,
        };
        let [seg_indptr, req_to_lora, lora_ids, adapter_enabled] =
            [input.seg_indptr, input.req_to_lora, input.lora_ids, input.adapter_enabled].map(|a| self.copy(&stream, a));
        let (seg_indptr, req_to_lora) = (seg_indptr?, req_to_lora?);
        let (lora_ids, adapter_enabled) = (lora_ids?, adapter_enabled?);
        let expert_map = input.expert_map.map(|map| self.copy(&stream, map)).transpose()?;
        let batch = AlignBlockAddresses {
            topk_ids: topk_ids.address(),
            ids_are_i64,
            seg_indptr: seg_indptr.address(),
            req_to_lora: req_to_lora.address(),
            lora_ids: lora_ids.address(),
            adapter_enabled: adapter_enabled.address(),
            expert_map: expert_map.as_ref().map_or(0, DeviceBuffer::address),
            sorted_token_ids: sorted_token_ids.address(),
            expert_ids: expert_ids.address(),
            num_tokens_post_pad: num_tokens_post_pad.address(),
            num_tokens: input.topk_ids.len() / input.top_k,
            num_segments: input.req_to_lora.len(),
            block_size: input.block_size,
            slot_entries,
        };
        // SAFETY: the buffers hold arrays of the sizes that were just checked, live until the copies below have waited for the
        // launch, and nobody else knows them; `self` is borrowed exclusively.
        unsafe { self.launch(&stream, &batch) }?;
        stream.download(&sorted_token_ids, 0, output.sorted_token_ids)?;
        stream.download(&expert_ids, 0, output.expert_ids)?;
        Ok(stream.download(&num_tokens_post_pad, 0, output.num_tokens_post_pad)?)
    }

    fn copy<T: NoUninit>(&self, stream: &Stream, values: &[T]) -> Result<DeviceBuffer, GpuError> {
        let buffer = self.gpu.alloc(size_of_val(values))?;
        stream.upload(&buffer, 0, values)?;
        Ok(buffer)
    }
}
