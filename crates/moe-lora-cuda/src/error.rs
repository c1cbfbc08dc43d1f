//! Why a GPU cannot be used, or a call to it failed.

use cudarc::driver::DriverError;
use cudarc::driver::sys::CUresult;

/// Why a GPU cannot be used, or a call to it failed. One line each.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum GpuError {
    /// The driver's library cannot be loaded or started.
    #[error("no NVIDIA driver: {reason}")]
    NoDriver {
        /// What the system said.
        reason: String,
    },
    /// There is a driver and no GPU.
    #[error("the NVIDIA driver sees no GPU")]
    NoDevice,
    /// There is no GPU of this number.
    #[error("no GPU {ordinal}: the driver sees {count}")]
    NoSuchDevice {
        /// The number asked for.
        ordinal: usize,
        /// GPUs there are.
        count: usize,
    },
    /// The GPU is older than the kernels.
    #[error("GPU {ordinal} ({name}) has compute capability {}.{}, 8.0 or newer is needed", found.0, found.1)]
    UnsupportedArch {
        /// Its number.
        ordinal: usize,
        /// Its name.
        name: String,
        /// Its compute capability.
        found: (i32, i32),
    },
    /// The driver is older than the toolkit that made the kernels.
    #[error("the driver supports CUDA {}.{}, the kernels were built with {}.{}", found.0, found.1, needed.0, needed.1)]
    DriverTooOld {
        /// What the driver supports.
        found: (i32, i32),
        /// What the kernels need.
        needed: (i32, i32),
    },
    /// This build carries no kernel images.
    #[error("this build has no CUDA kernels: it was made without nvcc (see `cargo xtask toolkit`)")]
    KernelsNotBuilt,
    /// The GPU's memory does not suffice.
    #[error("out of GPU memory: {bytes} bytes asked for, {free} free")]
    OutOfMemory {
        /// Bytes of the allocation.
        bytes: usize,
        /// Bytes free at that time.
        free: usize,
    },
    /// A place in a buffer that does not exist.
    #[error("{bytes} bytes from byte {offset} on do not fit into a buffer of {size} bytes")]
    OutOfBounds {
        /// First byte.
        offset: usize,
        /// Bytes.
        bytes: usize,
        /// Size of the buffer.
        size: usize,
    },
    /// A driver call failed.
    #[error("{what}: {name} (CUDA error {code})")]
    Driver {
        /// What was being done.
        what: &'static str,
        /// The driver's number.
        code: u32,
        /// The driver's name for it.
        name: String,
    },
}

impl GpuError {
    /// Describes a driver's error. Only once a GPU was opened or listed, as the name comes from the driver.
    #[must_use]
    pub fn driver(what: &'static str, error: DriverError) -> Self {
        let code = error.0 as u32;
        let name = error.error_name().map_or_else(|_| "unknown".to_owned(), |n| n.to_string_lossy().into_owned());
        Self::Driver { what, code, name }
    }

    /// The same for a call of `cudarc::driver::sys`.
    pub(crate) fn check(what: &'static str, result: CUresult) -> Result<(), Self> {
        result.result().map_err(|e| Self::driver(what, e))
    }
}
