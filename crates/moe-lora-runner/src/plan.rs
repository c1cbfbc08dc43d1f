//! Which kernels run: a pure function of formats and processor, never of a batch's adapters or routing.

use moe_lora_core::DType;
use moe_lora_gemm::cpu::Kernel;

/// The choices for one layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Plan {
    /// The inner kernel of the expert GEMMs.
    pub kernel: Kernel,
}

impl Plan {
    /// The best plan on this processor for weights and hidden states of these formats.
    #[must_use]
    pub fn choose(weights: DType, hidden: DType) -> Self {
        Self { kernel: Kernel::best(weights, hidden) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_fastest_kernel_that_fits_the_formats_is_chosen() {
        let all = [DType::F32, DType::F16, DType::Bf16];
        for (weights, hidden) in all.into_iter().flat_map(|w| all.map(|h| (w, h))) {
            let fits = Kernel::available().find(|k| k.supports(weights, hidden));
            assert_eq!(Some(Plan::choose(weights, hidden).kernel), fits, "{weights} weights, {hidden} hidden states");
        }
        // bf16 products would round f32 hidden states.
        assert_ne!(Plan::choose(DType::Bf16, DType::F32).kernel, Kernel::Avx512Bf16);
    }
}
