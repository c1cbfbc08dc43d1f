//! When the products of Hopper for experts with many rows run.

use super::raw::{ACTIVATION_CLAMPED_SWIGLU, ACTIVATION_SILU, ForwardArgs};
use moe_lora_cuda::Gpu;
use moe_lora_kernels::{Format, Kernel};

/// Rows of an expert, on average, from which these products are faster: see docs/kernels.md.
const LEAST_ROWS: u64 = 24;
/// Rows times numbers of an expert matrix: the smallest batch measured has twice this. Less is done in microseconds either way.
const LEAST_WORK: u64 = 1 << 30;
/// (token, expert) pairs from which the shrink of Hopper is faster for gate and up, whose rows are gathered.
const LEAST_PAIRS: u64 = 1 << 14;

/// Whether the batch takes this path: a function of sizes, activation, layout and GPU, never of routing or adapters.
pub(super) fn suits(gpu: &Gpu, format: Format, args: &ForwardArgs) -> bool {
    let loaded = gpu.kernels().function(Kernel::PrefillGateUp(format)).is_some();
    let matrix = u64::from(args.hidden_size) * u64::from(args.intermediate_size);
    loaded && fits(args) && many_rows(args.num_tokens, args.top_k, args.num_experts, matrix)
}

/// Whether such a batch shrinks for gate and up by segments, one block an SM, and not by chunks.
pub(super) const fn many_pairs(pairs: u64) -> bool {
    pairs >= LEAST_PAIRS
}

/// What the kernels can compute: the activations they know, and up behind gate, as one tensor map reaches both.
const fn fits(args: &ForwardArgs) -> bool {
    matches!(args.activation, ACTIVATION_SILU | ACTIVATION_CLAMPED_SWIGLU) && args.up > args.gate
}

fn many_rows(num_tokens: u32, top_k: u32, num_experts: u32, matrix: u64) -> bool {
    let rows = u64::from(num_tokens) * u64::from(top_k);
    rows >= LEAST_ROWS * u64::from(num_experts) && rows.saturating_mul(matrix) >= LEAST_WORK
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn experts_with_many_rows_take_this_path() {
        // Qwen3-30B, DeepSeek-V3 TP8, Mixtral.
        for (top_k, experts, matrix, least) in
            [(8, 128, 2048 * 768, 384), (8, 256, 7168 * 256, 768), (2, 8, 4096 * 14336, 96)]
        {
            assert!(!many_rows(least - 1, top_k, experts, matrix) && many_rows(least, top_k, experts, matrix));
        }
        assert!(many_rows(u32::MAX, 8, 1024, u64::MAX) && !many_rows(0, 8, 1, u64::MAX));
        // Small layers stay where they are.
        assert!(!many_rows(1024, 2, 8, 512 * 512) && many_rows(4096, 1, 2, 512 * 512));
    }

    #[test]
    fn layers_that_the_kernels_do_not_know_stay_portable() {
        let args = ForwardArgs { hidden_size: 64, intermediate_size: 64, ..Default::default() };
        assert!(fits(&args.with_w13(4096, false)) && fits(&args.with_w13(4096, true)));
        assert!(!fits(&ForwardArgs { gate: 8192, up: 4096, ..args }));
        for (activation, known) in [(ACTIVATION_SILU, true), (1, false), (2, false), (ACTIVATION_CLAMPED_SWIGLU, true)]
        {
            assert_eq!(fits(&ForwardArgs { activation, ..args.with_w13(4096, false) }), known);
        }
    }
}
