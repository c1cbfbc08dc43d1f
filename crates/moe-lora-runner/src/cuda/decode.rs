//! The launches for few tokens on Hopper: align, gate and up, down.

use super::launch::Call;
use super::raw::{DTYPE_F32, ForwardArgs};
use moe_lora_cuda::{Gpu, GpuError, decode_down, decode_gate_up};
use moe_lora_kernels::{BatchSizes, DecodeAlignParams, DecodeDownParams, DecodePlan, Format, Kernel};

/// Rows of an expert, on average, up to which these launches are faster than products of larger tiles. With ranks those of `prefill`
/// are from the next one on.
const fn most_rows(max_rank: u32) -> u64 {
    if max_rank == 0 { 16 } else { 11 }
}

/// (Token, expert) pairs up to which they are faster, by the largest rank that is configured: see docs/kernels.md.
const fn most_pairs(max_rank: u32) -> u64 {
    match max_rank {
        0..=32 => 512,
        33..=64 => 128,
        _ => 0,
    }
}

/// The plan of a batch that these launches can run: a function of sizes, layout and GPU, never of routing or adapters.
pub(super) fn plan(gpu: &Gpu, format: Format, args: &ForwardArgs) -> Option<DecodePlan> {
    let loaded = gpu.kernels().function(Kernel::DecodeGateUp(format)).is_some();
    (loaded && args.up > args.gate).then(|| DecodePlan::new(&sizes(args), gpu.info().sm_count))?
}

/// Whether they are fastest where they can run.
pub(super) fn few_rows(args: &ForwardArgs) -> bool {
    let pairs = u64::from(args.num_tokens) * u64::from(args.top_k);
    pairs <= most_pairs(args.max_rank).min(most_rows(args.max_rank) * u64::from(args.num_experts))
}

pub(super) const fn sizes(args: &ForwardArgs) -> BatchSizes {
    BatchSizes {
        num_tokens: args.num_tokens,
        top_k: args.top_k,
        num_experts: args.num_experts,
        hidden_size: args.hidden_size,
        intermediate_size: args.intermediate_size,
        num_slots: args.num_slots,
        max_rank: args.max_rank.next_multiple_of(8),
    }
}

impl Call<'_> {
    /// Three launches, with adapters or without.
    pub(super) fn launch_decode(&self, plan: &DecodePlan) -> Result<(), GpuError> {
        let (args, places, sm_count) = (self.args, &self.workspace, self.gpu.info().sm_count);
        let mut align = self.align();
        align.tile_rows = plan.tile_rows;
        let align = DecodeAlignParams(align);
        self.give(&align, align.launch())?;
        let chunks = self.at(places.chunks);
        let gate_up = decode_gate_up(self.format, self.gate_up(), chunks, plan)?;
        self.give(&gate_up, gate_up.launch(plan, sm_count))?;
        let rest = DecodeDownParams {
            row_pair: self.at(places.row_pair),
            row_weight: if args.weigh_input == 1 { 0 } else { self.at(places.row_weight) },
            chunks,
            out: args.out,
            num_tokens: args.num_tokens,
            top_k: args.top_k,
            out_f32: u32::from(args.out_dtype == DTYPE_F32),
            scaling: args.scaling,
            ..Default::default()
        };
        let down = decode_down(self.format, &self.down(), plan, rest)?;
        self.give(&down, down.launch(plan))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn few_rows_of_an_expert_and_few_pairs_take_this_path() {
        for (top_k, num_experts, most) in [(8, 128, 64), (8, 256, 64), (2, 8, 64), (4, 32, 128), (1, 8, 128)] {
            let args = |num_tokens| ForwardArgs { num_tokens, top_k, num_experts, ..Default::default() };
            assert!(few_rows(&args(most)) && !few_rows(&args(most + 1)));
        }
        let args = |max_rank, num_tokens| ForwardArgs {
            num_tokens,
            top_k: 8,
            num_experts: 128,
            max_rank,
            ..Default::default()
        };
        for (max_rank, most) in [(8, 64), (32, 64), (40, 16), (64, 16)] {
            assert!(few_rows(&args(max_rank, most)) && !few_rows(&args(max_rank, most + 1)), "{max_rank}");
        }
        let few_experts = |num_tokens| ForwardArgs { top_k: 2, num_experts: 8, ..args(16, num_tokens) };
        assert!(few_rows(&few_experts(44)) && !few_rows(&few_experts(45)));
        assert!(!few_rows(&args(72, 1)));
    }
}
