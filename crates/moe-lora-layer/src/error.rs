//! Why a layer could not run.

use moe_lora_collective::CollectiveError;
use moe_lora_core::InputError;
use moe_lora_pool::PoolError;
use moe_lora_route::RouteError;
use moe_lora_runner::RunnerError;

/// A layer that could not be built, or a forward that did not happen.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum LayerError {
    /// An argument does not fit.
    #[error(transparent)]
    Input(#[from] InputError),
    /// A token's adapter cannot be used.
    #[error(transparent)]
    Pool(#[from] PoolError),
    /// The experts could not be chosen.
    #[error(transparent)]
    Route(#[from] RouteError),
    /// The stages failed.
    #[error(transparent)]
    Runner(#[from] RunnerError),
    /// Another rank did not bring its part.
    #[error(transparent)]
    Collective(#[from] CollectiveError),
}

impl LayerError {
    /// What is wrong with the input, if that is why.
    #[must_use]
    pub fn input(&self) -> Option<&InputError> {
        match self {
            Self::Input(e) => Some(e),
            Self::Pool(e) => e.input(),
            Self::Route(RouteError::Input(e)) => Some(e),
            Self::Route(_) | Self::Collective(_) => None,
            Self::Runner(e) => e.input(),
        }
    }
}
