//! What can go wrong with a checkpoint.

use moe_lora_core::InputError;
use std::io;
use std::path::PathBuf;

/// Why a checkpoint could not be opened, used or written.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ModelError {
    /// The checkpoint is not what it has to be; a missing file or folder counts.
    #[error(transparent)]
    Input(#[from] InputError),
    /// A synthetic checkpoint could not be written.
    #[error("{}: cannot be written: {source}", path.display())]
    Write {
        /// The file or folder.
        path: PathBuf,
        /// What the system says.
        source: io::Error,
    },
}

impl ModelError {
    /// The bad input, if that is what it was.
    #[must_use]
    pub const fn input(&self) -> Option<&InputError> {
        match self {
            Self::Input(error) => Some(error),
            Self::Write { .. } => None,
        }
    }
}
