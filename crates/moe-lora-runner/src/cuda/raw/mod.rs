//! The raw door: device addresses, sizes and a stream in one struct, for engines with tensors of their own.
//!
//! [`workspace_bytes`] says how much memory a forward needs beside its inputs; the caller allocates it once and hands it in.
//! [`forward`] checks what a host can check, then gives the layer to the stream: it neither allocates on the GPU nor waits
//! nor looks at what the addresses hold, so a CUDA graph can capture it. A captured forward stays good for any tokens,
//! routing and adapters that its addresses later hold, for as long as its sizes stay.
//!
//! Adapters are a table of [`AdapterEntry`] `[slots, E, 3]`: the pool's, or the engine's own; [`SlotBuffers`] makes one of
//! the 4-D buffers that other systems keep.

mod args;
mod check;
mod entries;

pub use super::launch::{forward, forward_exchanging, forward_on, path, workspace_bytes};
pub use super::path::Path;
pub use args::{
    ACTIVATION_CLAMPED_SWIGLU, ACTIVATION_GELU, ACTIVATION_GELU_TANH, ACTIVATION_SILU, DTYPE_BF16, DTYPE_F16,
    DTYPE_F32, ForwardArgs,
};
pub(super) use check::check_sizes;
pub use entries::SlotBuffers;
pub use moe_lora_cuda::{Gpu, GpuError};
pub use moe_lora_kernels::{AdapterEntry, RouteCounts};
