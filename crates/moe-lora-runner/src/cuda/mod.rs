//! The same layer on an NVIDIA GPU: weights copied once, a workspace made once, six launches a batch.

mod launch;
mod places;
mod runner;
mod weights;

pub use runner::CudaRunner;
pub use weights::CudaWeights;
