//! The CUDA backend.

mod align_block;

pub use align_block::{AlignBlockAddresses, AlignBlockLimits, CudaAlignBlock};
