//! What can go wrong.

use moe_lora_core::InputError;

/// Why a batch could not be routed or aligned. Outputs are then as they were before the call, or empty.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum RouteError {
    /// Something handed in is not what it has to be.
    #[error(transparent)]
    Input(#[from] InputError),
    /// The GPU failed.
    #[cfg(feature = "cuda")]
    #[error(transparent)]
    Gpu(#[from] moe_lora_cuda::GpuError),
}

/// Checks the length of an argument.
pub(crate) fn check_len(name: &str, found: usize, want: Option<usize>, shape: &str) -> Result<(), RouteError> {
    if want == Some(found) {
        return Ok(());
    }
    let want = want.map_or("a countable size".to_owned(), |n| n.to_string());
    Err(InputError::new(format!("{found} numbers"), format!("{shape} = {want}")).in_tensor(name).into())
}
