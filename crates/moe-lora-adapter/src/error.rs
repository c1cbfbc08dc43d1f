//! What can go wrong with an adapter.

use moe_lora_core::InputError;

/// An adapter cannot be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum AdapterError {
    /// The folder, a file, a configuration field or a tensor is not what it has to be, or asks for something that cannot
    /// be expressed as LoRA on experts.
    #[error(transparent)]
    Input(#[from] InputError),
}

impl AdapterError {
    /// Place, found and expected, if the input is at fault.
    #[must_use]
    pub const fn input(&self) -> Option<&InputError> {
        match self {
            Self::Input(error) => Some(error),
        }
    }
}
