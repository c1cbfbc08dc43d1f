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
