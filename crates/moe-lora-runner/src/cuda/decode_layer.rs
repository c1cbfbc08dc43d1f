//! The launches for up to 16 tokens on Hopper: flags cleared, then a whole layer.

use super::decode::sizes;
use super::launch::Call;
use super::raw::{DTYPE_F32, ForwardArgs};
use moe_lora_cuda::{Gpu, GpuError, decode_layer};
use moe_lora_kernels::{DecodeClearParams, DecodeLayerParams, Format, Kernel, LayerPlan};

/// Ranks up to which every batch that the kernel can run is faster than in the launches for more tokens.
const SMALL_RANK: u32 = 16;
/// (Token, expert) pairs times the largest rank, beyond: four warps a block shrink, and larger ranks would keep the others waiting.
const MOST_RANKS: u64 = 1024;

/// The plan of a batch that these launches can run: a function of sizes, layout and GPU, never of routing or adapters.
pub(super) fn plan(gpu: &Gpu, format: Format, args: &ForwardArgs) -> Option<LayerPlan> {
    let loaded = gpu.kernels().function(Kernel::DecodeLayer(format)).is_some();
    (loaded && args.up > args.gate).then(|| LayerPlan::new(&sizes(args), gpu.info().sm_count))?
}

/// Whether this path is fastest where it can run.
pub(super) fn few_ranks(args: &ForwardArgs) -> bool {
    let ranks = u64::from(args.num_tokens) * u64::from(args.top_k) * u64::from(args.max_rank);
    args.max_rank <= SMALL_RANK || ranks <= MOST_RANKS
}

impl Call<'_> {
    /// Two launches, with adapters or without.
    pub(super) fn launch_layer(&self, plan: &LayerPlan) -> Result<(), GpuError> {
        let (args, places) = (self.args, &self.workspace);
        let clear = DecodeClearParams { flags: self.at(places.flags), words: LayerPlan::FLAGS as u64 };
        self.give(&clear, clear.launch())?;
        let align = self.align();
        let rest = DecodeLayerParams {
            topk_ids: align.topk_ids,
            topk_weights: align.topk_weights,
            token_slots: align.token_slots,
            slot_active: align.slot_active,
            shrunk: self.at(places.parts),
            flags: clear.flags,
            counts: args.counts,
            out: args.out,
            num_tokens: args.num_tokens,
            num_slots: args.num_slots,
            scaling: args.scaling,
            out_f32: u32::from(args.out_dtype == DTYPE_F32),
            ..Default::default()
        };
        let layer = decode_layer(self.format, &self.gate_up(), &self.down(), plan, rest)?;
        self.give(&layer, layer.launch(plan, self.gpu.info().sm_count))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn large_ranks_leave_this_path_earlier() {
        for (max_rank, most) in [(0, 16), (16, 16), (32, 4), (64, 2)] {
            let args = |num_tokens| ForwardArgs { num_tokens, top_k: 8, max_rank, ..Default::default() };
            assert!(few_ranks(&args(most)) && (most == 16 || !few_ranks(&args(most + 1))), "{max_rank}");
        }
    }
}
