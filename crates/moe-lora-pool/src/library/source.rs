//! Where an adapter's weights are read from, again and again.

use moe_lora_adapter::PeftAdapter;
use moe_lora_core::{AdapterWeights, InputError, ModelShape};
use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Where an adapter's weights are read from whenever no tier has them any more.
#[derive(Clone)]
pub struct Source(Kind);

type Read = dyn Fn() -> Result<AdapterWeights, InputError> + Send + Sync;

#[derive(Clone)]
enum Kind {
    Folder(Arc<Path>),
    Read(Arc<Read>),
}

impl Source {
    /// A folder in PEFT's format.
    #[must_use]
    pub fn folder(path: impl Into<PathBuf>) -> Self {
        Self(Kind::Folder(path.into().into()))
    }

    /// Anything else that makes the same weights whenever it is called, from any thread.
    #[must_use]
    pub fn new(read: impl Fn() -> Result<AdapterWeights, InputError> + Send + Sync + 'static) -> Self {
        Self(Kind::Read(Arc::new(read)))
    }

    pub(super) fn read(&self, shape: &ModelShape) -> Result<AdapterWeights, InputError> {
        match &self.0 {
            Kind::Read(read) => read(),
            Kind::Folder(path) => {
                let weights = PeftAdapter::open(path).and_then(|adapter| adapter.resolve(shape));
                weights.map_err(|error| {
                    let other = || InputError::new(error.to_string(), "an adapter");
                    error.input().cloned().unwrap_or_else(other)
                })
            }
        }
    }
}

impl From<PathBuf> for Source {
    fn from(path: PathBuf) -> Self {
        Self::folder(path)
    }
}

impl From<&Path> for Source {
    fn from(path: &Path) -> Self {
        Self::folder(path)
    }
}

impl From<&str> for Source {
    fn from(path: &str) -> Self {
        Self::folder(path)
    }
}

impl fmt::Debug for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.0 {
            Kind::Folder(path) => write!(f, "Source({})", path.display()),
            Kind::Read(_) => f.write_str("Source"),
        }
    }
}
