//! Device memory, page-locked host memory, and how one allocation is shared out.

use crate::GpuError;
use cudarc::driver::{CudaContext, DriverError, result, sys};
use std::sync::Arc;

/// Alignment of every part of a [`Layout`], in bytes.
pub const ALIGNMENT: usize = 256;

/// Device memory. Freed when dropped, which waits until the GPU is done with it.
#[derive(Debug)]
pub struct DeviceBuffer {
    context: Arc<CudaContext>,
    address: sys::CUdeviceptr,
    bytes: usize,
}

impl DeviceBuffer {
    pub(crate) fn new(context: &Arc<CudaContext>, bytes: usize) -> Result<Self, GpuError> {
        context.bind_to_thread().map_err(|e| GpuError::driver("cuCtxSetCurrent", e))?;
        // SAFETY: the memory is handed out as an address only; whoever reads it answers for having written it.
        let address = unsafe { result::malloc_sync(bytes.max(1)) }.map_err(|error| match error {
            DriverError(sys::CUresult::CUDA_ERROR_OUT_OF_MEMORY) => {
                GpuError::OutOfMemory { bytes, free: context.mem_get_info().map_or(0, |(free, _)| free) }
            }
            error => GpuError::driver("cuMemAlloc", error),
        })?;
        Ok(Self { context: Arc::clone(context), address, bytes })
    }

    /// Its device address, a multiple of 256.
    #[must_use]
    pub const fn address(&self) -> u64 {
        self.address
    }

    /// Its size.
    #[must_use]
    pub const fn bytes(&self) -> usize {
        self.bytes
    }

    /// The address of a range of it.
    pub(crate) fn range(&self, offset: usize, bytes: usize) -> Result<u64, GpuError> {
        match offset.checked_add(bytes) {
            Some(end) if end <= self.bytes => Ok(self.address + offset as u64),
            _ => Err(GpuError::OutOfBounds { offset, bytes, size: self.bytes }),
        }
    }
}

impl Drop for DeviceBuffer {
    fn drop(&mut self) {
        // A failure here is an earlier kernel's, and the next call reports it.
        let _ = self.context.bind_to_thread();
        // SAFETY: the address came from cuMemAlloc and is freed once; cuMemFree waits for work in flight.
        let _ = unsafe { result::free_sync(self.address) };
    }
}

/// Page-locked host memory.
#[derive(Debug)]
pub struct PinnedBuffer {
    context: Arc<CudaContext>,
    pointer: *mut u8,
    bytes: usize,
}

// SAFETY: the memory belongs to this value alone and page-locked memory is usable from every thread.
unsafe impl Send for PinnedBuffer {}
// SAFETY: shared access only reads.
unsafe impl Sync for PinnedBuffer {}

impl PinnedBuffer {
    pub(crate) fn new(context: &Arc<CudaContext>, bytes: usize) -> Result<Self, GpuError> {
        context.bind_to_thread().map_err(|e| GpuError::driver("cuCtxSetCurrent", e))?;
        // Not write-combined: the host also reads it.
        // SAFETY: the memory is zeroed before anyone sees it.
        let pointer = unsafe { result::malloc_host(bytes.max(1), sys::CU_MEMHOSTALLOC_PORTABLE) }
            .map_err(|e| GpuError::driver("cuMemHostAlloc", e))?
            .cast::<u8>();
        // SAFETY: `bytes.max(1)` bytes were just allocated there.
        unsafe { pointer.write_bytes(0, bytes.max(1)) };
        Ok(Self { context: Arc::clone(context), pointer, bytes })
    }

    /// Its bytes.
    #[must_use]
    pub const fn as_slice(&self) -> &[u8] {
        // SAFETY: `bytes` bytes live there as long as `self`, initialised in `new`.
        unsafe { std::slice::from_raw_parts(self.pointer, self.bytes) }
    }

    /// Its bytes, to write.
    #[must_use]
    pub const fn as_mut_slice(&mut self) -> &mut [u8] {
        // SAFETY: as above, and `self` is borrowed exclusively.
        unsafe { std::slice::from_raw_parts_mut(self.pointer, self.bytes) }
    }

    /// The same bytes as a raw pointer, for copies that run while the host goes on.
    pub(crate) const fn pointer(&self) -> *mut u8 {
        self.pointer
    }
}

impl Drop for PinnedBuffer {
    fn drop(&mut self) {
        let _ = self.context.bind_to_thread();
        // SAFETY: the pointer came from cuMemHostAlloc and is freed once; cuMemFreeHost waits for copies in flight.
        let _ = unsafe { result::free_host(self.pointer.cast()) };
    }
}

/// Shares one allocation out: parts are added in order, each at a multiple of [`ALIGNMENT`], and the sum is what to allocate.
///
/// A workspace query and the code that uses the workspace call the same function with a layout each, so they cannot differ.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Layout {
    bytes: usize,
}

impl Layout {
    /// Adds `count` values of type `T` and returns their offset. Sizes beyond memory saturate, so that the allocation fails.
    pub fn add<T>(&mut self, count: usize) -> usize {
        let offset = self.bytes;
        let bytes = count.saturating_mul(size_of::<T>()).div_ceil(ALIGNMENT).saturating_mul(ALIGNMENT);
        self.bytes = self.bytes.saturating_add(bytes);
        offset
    }

    /// Bytes of all parts.
    #[must_use]
    pub const fn bytes(&self) -> usize {
        self.bytes
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_are_aligned_and_apart() {
        let mut layout = Layout::default();
        assert_eq!((layout.add::<u8>(1), layout.add::<f32>(64), layout.add::<u16>(0)), (0, 256, 512));
        assert_eq!((layout.add::<u64>(33), layout.bytes()), (512, 512 + 512));
        let _ = layout.add::<u64>(usize::MAX);
        assert!(layout.bytes() >= usize::MAX / ALIGNMENT * ALIGNMENT);
    }
}
