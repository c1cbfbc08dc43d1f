//! Why an engine could not start or go on, and why one request failed.

use moe_lora::{AdapterError, InputError, LayerError, ModelError, PoolError};
use moe_lora_core::DType;

/// The engine cannot start, or cannot go on.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum GenerateError {
    /// A file or an option is wrong.
    #[error(transparent)]
    Input(#[from] InputError),
    /// The checkpoint cannot be used.
    #[error(transparent)]
    Model(#[from] ModelError),
    /// The adapter pool cannot be made.
    #[error(transparent)]
    Pool(#[from] PoolError),
    /// A layer failed.
    #[error(transparent)]
    Layer(#[from] LayerError),
    /// A dense projection failed.
    #[error(transparent)]
    Gemm(#[from] moe_lora::gemm::GemmError),
    /// A thread could not be started.
    #[error("a thread that loads adapters cannot be started: {0}")]
    Thread(std::io::Error),
}

impl GenerateError {
    /// What is wrong with the input, if that is why.
    #[must_use]
    pub fn input(&self) -> Option<&InputError> {
        match self {
            Self::Input(error) => Some(error),
            Self::Model(error) => error.input(),
            Self::Pool(error) => error.input(),
            Self::Layer(error) => error.input(),
            Self::Gemm(_) | Self::Thread(_) => None,
        }
    }
}

/// One request failed; the others go on as if it had never been there.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum RequestError {
    /// The request itself is wrong.
    #[error(transparent)]
    Input(#[from] InputError),
    /// No adapter of that name was registered.
    #[error("adapter {name:?} is not known")]
    UnknownAdapter {
        /// The name.
        name: String,
    },
    /// The adapter's files cannot be used.
    #[error("adapter {name:?}: {error}")]
    Adapter {
        /// The name.
        name: String,
        /// Why.
        error: AdapterError,
    },
    /// The adapter cannot be held.
    #[error("adapter {name:?}: {error}")]
    Pool {
        /// The name.
        name: String,
        /// Why.
        error: PoolError,
    },
    /// Prompt and text do not fit into the model.
    #[error("a prompt of {prompt} tokens leaves no room in a model for {most}")]
    TooLong {
        /// Tokens of the prompt.
        prompt: usize,
        /// Tokens that a sequence may have.
        most: usize,
    },
    /// A number left the range of its format on the way.
    #[error("the model's numbers left the range of {dtype}, with this adapter and prompt")]
    NotFinite {
        /// The model's format.
        dtype: DType,
    },
}
