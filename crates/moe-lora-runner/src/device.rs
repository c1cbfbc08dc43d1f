//! Where layers run.

use moe_lora_pool::{HostMemory, Memory};
use std::fmt;

/// A kind of device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Backend {
    /// This machine's processor, all cores that rayon may use.
    Cpu,
}

/// A place where layers run and adapters live.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Device {
    backend: Backend,
}

impl Device {
    /// The processor.
    #[must_use]
    pub const fn cpu() -> Self {
        Self { backend: Backend::Cpu }
    }

    /// The fastest device that this build can use: the processor, as long as no GPU backend is part of it.
    #[must_use]
    pub const fn best() -> Self {
        Self::cpu()
    }

    /// Its kind.
    #[must_use]
    pub const fn backend(&self) -> Backend {
        self.backend
    }
}

impl fmt::Display for Device {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.backend {
            Backend::Cpu => f.write_str("cpu"),
        }
    }
}

impl From<&Device> for Memory {
    fn from(device: &Device) -> Self {
        match device.backend {
            Backend::Cpu => Self::Host(HostMemory),
        }
    }
}
