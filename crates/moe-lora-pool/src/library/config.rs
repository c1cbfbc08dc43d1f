//! The limits of a library.

/// The limits of a library; fixed for its life.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LibraryConfig {
    /// Budget in bytes for packed images in host memory: page-locked for a GPU. An image that is on its way to the pool may
    /// exceed it for that time. Default: 16 GiB.
    pub host_bytes: usize,
    /// Background threads that read and upload. With 0 the program calls [`work`](crate::AdapterLibrary::work). Default: 1.
    pub loaders: usize,
    /// Admissions that may overtake the first request that waits. Default: 64.
    pub patience: u32,
}

impl Default for LibraryConfig {
    fn default() -> Self {
        Self { host_bytes: usize::try_from(16_u64 << 30).unwrap_or(usize::MAX), loaders: 1, patience: 64 }
    }
}
