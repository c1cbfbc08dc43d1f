//! An opened GPU.

use crate::kernels::Kernels;
use crate::{DeviceBuffer, DeviceInfo, GpuError, PinnedBuffer, Stream, probe};
use cudarc::driver::{CudaContext, sys};
use std::sync::Arc;

/// An opened GPU: the primary context, and every kernel loaded. Clones share both.
///
/// Streams are the GPU's own, never the default stream, which cannot be captured. The [`context`](Self::context) is our own
/// handle on the primary context: what another library allocated on that GPU can be used here and the other way round,
/// and our streams do not switch that library's cudarc to tracking events.
#[derive(Debug, Clone)]
pub struct Gpu {
    info: DeviceInfo,
    context: Arc<CudaContext>,
    kernels: Arc<Kernels>,
}

impl Gpu {
    /// All GPUs of this machine, without opening any of them.
    ///
    /// # Errors
    /// [`NoDriver`](GpuError::NoDriver) or [`NoDevice`](GpuError::NoDevice) on a machine that has none. Never panics.
    pub fn probe() -> Result<Vec<DeviceInfo>, GpuError> {
        probe::devices()
    }

    /// Opens one GPU and loads all kernels.
    ///
    /// # Errors
    /// Why it cannot be used: see [`GpuError`]. Never panics.
    pub fn open(ordinal: usize) -> Result<Self, GpuError> {
        let devices = probe::devices()?;
        let count = devices.len();
        let info = devices.into_iter().nth(ordinal).ok_or(GpuError::NoSuchDevice { ordinal, count })?;
        usable(&info)?;
        let context = CudaContext::new(ordinal).map_err(|e| GpuError::driver("cuDevicePrimaryCtxRetain", e))?;
        let kernels = Arc::new(Kernels::load(&context, &info)?);
        Ok(Self { info, context, kernels })
    }

    /// What it is.
    #[must_use]
    pub const fn info(&self) -> &DeviceInfo {
        &self.info
    }

    /// Its loaded kernels.
    #[must_use]
    pub fn kernels(&self) -> &Kernels {
        &self.kernels
    }

    /// The primary context, for callers that use cudarc themselves.
    #[must_use]
    pub const fn context(&self) -> &Arc<CudaContext> {
        &self.context
    }

    /// A new stream.
    ///
    /// # Errors
    /// If the driver refuses.
    pub fn stream(&self) -> Result<Stream, GpuError> {
        let stream = self.context.new_stream().map_err(|e| GpuError::driver("cuStreamCreate", e))?;
        Ok(Stream::new(stream))
    }

    /// An engine's stream.
    ///
    /// # Safety
    /// `stream` must be a stream of this GPU's primary context and outlive what is returned.
    #[must_use]
    pub unsafe fn borrow_stream(&self, stream: sys::CUstream) -> Stream {
        // SAFETY: the caller's promise.
        Stream::new(unsafe { self.context.wrap_borrowed_stream(stream) })
    }

    /// Device memory, whatever it held before.
    ///
    /// # Errors
    /// [`OutOfMemory`](GpuError::OutOfMemory).
    pub fn alloc(&self, bytes: usize) -> Result<DeviceBuffer, GpuError> {
        DeviceBuffer::new(&self.context, bytes)
    }

    /// Page-locked host memory, zeroed: what copies can read and write while the host goes on.
    ///
    /// # Errors
    /// If the driver refuses.
    pub fn alloc_pinned(&self, bytes: usize) -> Result<PinnedBuffer, GpuError> {
        PinnedBuffer::new(&self.context, bytes)
    }

    /// Bytes of memory that are free now.
    ///
    /// # Errors
    /// If the driver refuses.
    pub fn free_bytes(&self) -> Result<usize, GpuError> {
        Ok(self.context.mem_get_info().map_err(|e| GpuError::driver("cuMemGetInfo", e))?.0)
    }
}

/// Whether the kernels of this build can run on a GPU.
pub(crate) fn usable(info: &DeviceInfo) -> Result<(), GpuError> {
    if info.compute_capability < (8, 0) {
        let (ordinal, name, found) = (info.ordinal, info.name.clone(), info.compute_capability);
        return Err(GpuError::UnsupportedArch { ordinal, name, found });
    }
    if !moe_lora_kernels::built() {
        return Err(GpuError::KernelsNotBuilt);
    }
    match toolkit_version(moe_lora_kernels::manifest()) {
        Some(needed) if info.driver_version < needed => {
            Err(GpuError::DriverTooOld { found: info.driver_version, needed })
        }
        _ => Ok(()),
    }
}

/// The CUDA version of the nvcc that made the images.
fn toolkit_version(manifest: &str) -> Option<(i32, i32)> {
    let version = manifest.split("release ").nth(1)?.split(',').next()?;
    let (major, minor) = version.split_once('.')?;
    Some((major.parse().ok()?, minor.parse().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn info() -> DeviceInfo {
        DeviceInfo {
            ordinal: 1,
            name: "Old GPU".to_owned(),
            compute_capability: (7, 5),
            sm_count: 40,
            memory_bytes: 1 << 30,
            driver_version: (13, 0),
            shared_bytes_per_block: 65_536,
        }
    }

    #[test]
    fn an_old_gpu_and_an_old_driver_are_named() {
        let error = usable(&info()).unwrap_err();
        let expected = "GPU 1 (Old GPU) has compute capability 7.5, 8.0 or newer is needed";
        assert_eq!(error.to_string(), expected);
        let old_driver = DeviceInfo { compute_capability: (9, 0), driver_version: (11, 4), ..info() };
        match usable(&old_driver).unwrap_err() {
            GpuError::DriverTooOld { found, .. } => assert!(moe_lora_kernels::built() && found == (11, 4)),
            other => assert!(!moe_lora_kernels::built() && other == GpuError::KernelsNotBuilt, "{other}"),
        }
    }

    #[test]
    fn the_toolkit_is_read_off_the_manifest() {
        let manifest = "source 12\nnvcc Cuda compilation tools, release 13.0, V13.0.88\n";
        assert_eq!(toolkit_version(manifest), Some((13, 0)));
        assert_eq!(toolkit_version(""), None);
    }

    #[test]
    fn the_probe_gives_a_reason_or_a_gpu() {
        match Gpu::probe() {
            Ok(devices) => assert!(!devices.is_empty()),
            Err(GpuError::NoDriver { reason }) => assert!(!reason.is_empty()),
            Err(error) => assert_eq!(error, GpuError::NoDevice),
        }
        assert!(Gpu::open(usize::MAX).is_err());
    }
}
