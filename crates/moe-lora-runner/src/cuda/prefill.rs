//! When the products of Hopper for experts with many rows run.

use super::raw::{ACTIVATION_CLAMPED_SWIGLU, ACTIVATION_SILU, ForwardArgs};
use moe_lora_cuda::Gpu;
use moe_lora_kernels::{Format, Kernel};

/// Rows of an expert, on average, from which these products are faster, by the largest rank that is configured: see docs/kernels.md.
const fn least_rows(max_rank: u32) -> u64 {
    match max_rank {
        0 => 16,
        1..=32 => 12,
        _ => 24,
    }
}

/// Rows times numbers of an expert matrix: the smallest batch measured has twice this. Less is done in microseconds either way.
const LEAST_WORK: u64 = 1 << 30;
/// (token, expert) pairs from which the shrink of Hopper is faster for gate and up, whose rows are gathered, and what an expert and
/// slot must have of them when all slots are in use: with fewer, the shrink by chunks reads as little and is up to 19 % faster.
const LEAST_PAIRS: u64 = 1 << 14;
const LEAST_SEGMENT: u64 = 64;

/// Whether these products can run the batch: a function of activation, layout and GPU.
pub(super) fn fits(gpu: &Gpu, format: Format, args: &ForwardArgs) -> bool {
    gpu.kernels().function(Kernel::PrefillGateUp(format)).is_some() && known(args)
}

/// Whether such a batch shrinks for gate and up by segments, one block an SM, and not by chunks.
pub(super) fn long_segments(args: &ForwardArgs) -> bool {
    let pairs = u64::from(args.num_tokens) * u64::from(args.top_k);
    let segments = u64::from(args.num_experts) * u64::from(args.num_slots);
    pairs >= LEAST_PAIRS && pairs >= segments.saturating_mul(LEAST_SEGMENT)
}

/// What they can compute: the activations they know, and up behind gate, as one tensor map reaches both.
const fn known(args: &ForwardArgs) -> bool {
    matches!(args.activation, ACTIVATION_SILU | ACTIVATION_CLAMPED_SWIGLU) && args.up > args.gate
}

/// Whether they are fastest where they can run: a function of sizes, never of routing or adapters.
pub(super) fn many_rows(args: &ForwardArgs) -> bool {
    let rows = u64::from(args.num_tokens) * u64::from(args.top_k);
    let matrix = u64::from(args.hidden_size) * u64::from(args.intermediate_size);
    rows >= least_rows(args.max_rank) * u64::from(args.num_experts) && rows.saturating_mul(matrix) >= LEAST_WORK
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn experts_with_many_rows_take_this_path() {
        let many = |num_tokens, max_rank, [num_experts, top_k, hidden_size, intermediate_size]: [u32; 4]| {
            let sizes = ForwardArgs { num_experts, top_k, hidden_size, intermediate_size, ..Default::default() };
            many_rows(&ForwardArgs { num_tokens, max_rank, ..sizes })
        };
        // Qwen3-30B, DeepSeek-V3 TP8, Mixtral.
        for (shape, least) in [([128, 8, 2048, 768], 256), ([256, 8, 7168, 256], 512), ([8, 2, 4096, 14336], 64)] {
            for (max_rank, least) in [(0, least), (16, least / 4 * 3), (64, least / 2 * 3)] {
                assert!(!many(least - 1, max_rank, shape) && many(least, max_rank, shape), "{shape:?} {max_rank}");
            }
        }
        assert!(many(u32::MAX, 0, [1024, 8, u32::MAX, u32::MAX]) && !many(0, 0, [1, 8, u32::MAX, u32::MAX]));
        // Small layers stay where they are.
        assert!(!many(1024, 0, [8, 2, 512, 512]) && many(4096, 0, [2, 1, 512, 512]));
    }

    #[test]
    fn long_segments_are_shrunk_whole() {
        // Qwen3-30B with 1, 8 and 64 slots.
        for (num_slots, least) in [(1, 2048), (8, 8192), (64, 65536)] {
            let args =
                |num_tokens| ForwardArgs { num_tokens, top_k: 8, num_experts: 128, num_slots, ..Default::default() };
            assert!(!long_segments(&args(least - 1)) && long_segments(&args(least)), "{num_slots}");
        }
    }

    #[test]
    fn layers_that_the_kernels_do_not_know_stay_portable() {
        let args = ForwardArgs { hidden_size: 64, intermediate_size: 64, ..Default::default() };
        assert!(known(&args.with_w13(4096, false)) && known(&args.with_w13(4096, true)));
        assert!(!known(&ForwardArgs { gate: 8192, up: 4096, ..args }));
        for (activation, expected) in
            [(ACTIVATION_SILU, true), (1, false), (2, false), (ACTIVATION_CLAMPED_SWIGLU, true)]
        {
            assert_eq!(known(&ForwardArgs { activation, ..args.with_w13(4096, false) }), expected);
        }
    }
}
