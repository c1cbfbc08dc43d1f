//! The same layer on an NVIDIA GPU: one pipeline behind a raw door, and a safe door that uses it.

mod decode;
mod decode_layer;
mod graph;
mod launch;
mod path;
mod prefill;
pub mod raw;
mod runner;
pub mod slices;
mod weights;
mod workspace;

pub use graph::CapturedForward;
pub use runner::{CudaRunner, Sum, Sums};
pub use weights::CudaWeights;
