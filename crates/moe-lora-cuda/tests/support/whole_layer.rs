//! The launches that do a whole layer for up to 16 tokens.

use super::{Batch, Layer};
use moe_lora_cuda::{Gpu, GpuError, Stream, decode_layer};
use moe_lora_kernels::{DecodeClearParams, DecodeLayerParams, DownParams, Format, GateUpParams, LayerPlan};

impl Batch {
    pub(super) fn clear_flags(&self, gpu: &Gpu, stream: &Stream) -> Result<(), GpuError> {
        let params = DecodeClearParams { flags: self.address(self.at.flags), words: LayerPlan::FLAGS as u64 };
        // SAFETY: a part of `memory`, laid out for as many words.
        unsafe { gpu.kernels().launch(stream, Format::Bf16, &params, params.launch()) }
    }
}

impl Layer {
    pub(super) fn layer_plan(&self, gpu: &Gpu, tokens: usize, lora: bool) -> Option<LayerPlan> {
        LayerPlan::new(&self.batch_sizes(tokens, lora), gpu.info().sm_count)
    }

    /// Behind [`Batch::clear_flags`].
    pub(super) fn whole_layer(
        &self,
        gpu: &Gpu,
        stream: &Stream,
        batch: &Batch,
        lora: bool,
        gate_up: &GateUpParams,
        down: &DownParams,
    ) -> Result<(), GpuError> {
        let (at, sm_count) = (&batch.at, gpu.info().sm_count);
        let Some(plan) = self.layer_plan(gpu, batch.tokens, lora) else { return Ok(()) };
        let rest = DecodeLayerParams {
            topk_ids: batch.address(at.ids),
            topk_weights: batch.address(at.weights),
            token_slots: if lora { batch.address(at.slots) } else { 0 },
            slot_active: if lora { batch.address(at.active) } else { 0 },
            shrunk: batch.address(at.parts),
            flags: batch.address(at.flags),
            counts: batch.address(at.counts),
            out: batch.address(at.out),
            num_tokens: batch.tokens as u32,
            num_slots: self.sizes.slots as u32,
            scaling: self.scaling,
            ..Default::default()
        };
        let params = decode_layer(self.format, gate_up, down, &plan, rest)?;
        // SAFETY: all addresses are parts of buffers that were made for these sizes, and the caller keeps them until the stream is done.
        unsafe { gpu.kernels().launch(stream, self.format, &params, params.launch(&plan, sm_count)) }
    }
}
