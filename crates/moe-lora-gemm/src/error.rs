//! What can be wrong with a call of a stage.

use crate::cpu::Kernel;
use moe_lora_core::InputError;

/// Why a stage refused to run. Nothing was written.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum GemmError {
    /// An argument does not fit the layer or the workspace.
    #[error(transparent)]
    Input(#[from] InputError),
    /// The kernel cannot be used.
    #[error("the {kernel} kernel cannot run: {reason}")]
    Kernel {
        /// The kernel that was asked for.
        kernel: Kernel,
        /// What it lacks.
        reason: &'static str,
    },
    /// A stage ran before the one whose results it needs, or on another batch.
    #[error("{stage} was called without {needs} of the same batch before it")]
    Order {
        /// The stage that was called.
        stage: &'static str,
        /// The stage that has to run first.
        needs: &'static str,
    },
    /// The workspace does not fit into memory.
    #[error("a workspace of {bytes} bytes does not fit into memory")]
    OutOfMemory {
        /// Its size, `usize::MAX` if it cannot be counted.
        bytes: usize,
    },
}
