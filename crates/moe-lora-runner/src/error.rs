//! Why a layer could not run.

use moe_lora_core::InputError;
use moe_lora_gemm::GemmError;
use moe_lora_route::RouteError;

/// A forward that did not happen; the output holds nothing useful then.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RunnerError {
    /// An argument does not fit.
    #[error(transparent)]
    Input(#[from] InputError),
    /// Routing or align failed.
    #[error(transparent)]
    Route(#[from] RouteError),
    /// A stage failed.
    #[error(transparent)]
    Gemm(#[from] GemmError),
    /// The adapters could not be used.
    #[cfg(feature = "cuda")]
    #[error(transparent)]
    Pool(#[from] moe_lora_pool::PoolError),
    /// The GPU failed.
    #[cfg(feature = "cuda")]
    #[error(transparent)]
    Gpu(#[from] moe_lora_cuda::GpuError),
}

impl RunnerError {
    /// What is wrong with the input, if that is why.
    #[must_use]
    pub fn input(&self) -> Option<&InputError> {
        match self {
            Self::Input(e) => Some(e),
            #[cfg(feature = "cuda")]
            Self::Pool(e) => e.input(),
            Self::Route(RouteError::Input(e)) | Self::Gemm(GemmError::Input(e)) => Some(e),
            _ => None,
        }
    }
}
