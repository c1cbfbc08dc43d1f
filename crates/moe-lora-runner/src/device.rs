//! Where layers run.

use moe_lora_pool::{HostMemory, Memory};
use std::fmt;

/// A kind of device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Backend {
    /// This machine's processor, all cores that rayon may use.
    Cpu,
    /// An NVIDIA GPU.
    #[cfg(feature = "cuda")]
    Cuda,
}

/// A place where layers run and adapters live.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Device {
    memory: Memory,
}

impl Device {
    /// The processor.
    #[must_use]
    pub const fn cpu() -> Self {
        Self { memory: Memory::Host(HostMemory) }
    }

    /// A GPU by its number, opened, with all kernels loaded.
    ///
    /// # Errors
    /// Why it cannot be used: no driver, no such GPU, too old a GPU or driver, or a build without kernels.
    #[cfg(feature = "cuda")]
    pub fn cuda(ordinal: usize) -> Result<Self, moe_lora_cuda::GpuError> {
        let gpu = moe_lora_cuda::Gpu::open(ordinal)?;
        Ok(Self { memory: Memory::Cuda(moe_lora_pool::CudaMemory::new(gpu)) })
    }

    /// The first GPU if it can be used, else the processor. `Device::cuda(0)` says why it cannot.
    #[must_use]
    pub fn best() -> Self {
        #[cfg(feature = "cuda")]
        if let Ok(device) = Self::cuda(0) {
            return device;
        }
        Self::cpu()
    }

    /// Its kind.
    #[must_use]
    pub const fn backend(&self) -> Backend {
        match self.memory {
            #[cfg(feature = "cuda")]
            Memory::Cuda(_) => Backend::Cuda,
            _ => Backend::Cpu,
        }
    }

    /// The GPU that it is, if it is one.
    #[cfg(feature = "cuda")]
    #[must_use]
    pub const fn gpu(&self) -> Option<&moe_lora_cuda::Gpu> {
        match &self.memory {
            Memory::Cuda(memory) => Some(memory.gpu()),
            _ => None,
        }
    }

    /// The memory that its adapters live in.
    #[must_use]
    pub const fn memory(&self) -> &Memory {
        &self.memory
    }
}

impl fmt::Display for Device {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.memory.fmt(f)
    }
}

impl From<&Device> for Memory {
    fn from(device: &Device) -> Self {
        device.memory.clone()
    }
}
