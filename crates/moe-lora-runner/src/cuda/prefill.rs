//! When the products of Hopper for experts with many rows run.

use super::raw::{ACTIVATION_CLAMPED_SWIGLU, ACTIVATION_SILU, ForwardArgs};
use moe_lora_cuda::Gpu;
use moe_lora_kernels::{Format, Kernel};

/// Rows of an expert, on average, from which these products are faster: see docs/kernels.md.
const LEAST_ROWS: u64 = 24;

/// Whether the batch takes this path: a function of sizes, activation, layout and GPU, never of routing or adapters.
pub(super) fn suits(gpu: &Gpu, format: Format, args: &ForwardArgs) -> bool {
    let loaded = gpu.kernels().function(Kernel::PrefillGateUp(format)).is_some();
    loaded && fits(args) && many_rows(args.num_tokens, args.top_k, args.num_experts)
}

/// What the kernels can compute: the activations they know, and up behind gate, as one tensor map reaches both.
const fn fits(args: &ForwardArgs) -> bool {
    matches!(args.activation, ACTIVATION_SILU | ACTIVATION_CLAMPED_SWIGLU) && args.up > args.gate
}

fn many_rows(num_tokens: u32, top_k: u32, num_experts: u32) -> bool {
    u64::from(num_tokens) * u64::from(top_k) >= LEAST_ROWS * u64::from(num_experts)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn experts_with_many_rows_take_this_path() {
        // Qwen3-30B, DeepSeek-V3, Mixtral.
        for (top_k, experts, least) in [(8, 128, 384), (8, 256, 768), (2, 8, 96)] {
            assert!(!many_rows(least - 1, top_k, experts) && many_rows(least, top_k, experts));
        }
        assert!(many_rows(u32::MAX, 8, 1024) && !many_rows(0, 8, 1));
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
