//! Streams, events, copies and graphs: the order of work on a GPU.

use crate::{DeviceBuffer, GpuError, PinnedBuffer};
use bytemuck::{AnyBitPattern, NoUninit};
use cudarc::driver::{CudaEvent, CudaGraph, CudaStream, result, sys};
use std::sync::Arc;

/// A queue of work. Work on one stream runs in order; streams are ordered by [`Event`]s alone.
#[derive(Debug, Clone)]
pub struct Stream {
    inner: Arc<CudaStream>,
}

impl PartialEq for Stream {
    /// Whether both give work to the same queue.
    fn eq(&self, other: &Self) -> bool {
        self.raw() == other.raw() && self.inner.context() == other.inner.context()
    }
}

impl Eq for Stream {}

impl From<Arc<CudaStream>> for Stream {
    /// A stream that the caller has from cudarc.
    fn from(inner: Arc<CudaStream>) -> Self {
        Self { inner }
    }
}

/// A point in a stream.
#[derive(Debug)]
pub struct Event {
    inner: CudaEvent,
}

/// Captured work that can be launched again and again, with whatever the captured addresses then hold.
pub struct Graph {
    inner: CudaGraph,
}

impl Stream {
    pub(crate) const fn new(inner: Arc<CudaStream>) -> Self {
        Self { inner }
    }

    /// cudarc's stream.
    #[must_use]
    pub const fn cudarc(&self) -> &Arc<CudaStream> {
        &self.inner
    }

    /// The `CUstream` as a number.
    #[must_use]
    pub fn handle(&self) -> u64 {
        self.raw() as u64
    }

    pub(crate) fn raw(&self) -> sys::CUstream {
        self.inner.cu_stream()
    }

    /// Makes the context current in this thread, as every driver call needs.
    pub(crate) fn bind(&self) -> Result<(), GpuError> {
        self.inner.context().bind_to_thread().map_err(|e| GpuError::driver("cuCtxSetCurrent", e))
    }

    /// Waits until all work is done, and reports what went wrong in it.
    ///
    /// # Errors
    /// The error of the work.
    pub fn synchronize(&self) -> Result<(), GpuError> {
        self.inner.synchronize().map_err(|e| GpuError::driver("waiting for the GPU", e))
    }

    /// Copies `values` to byte `offset` of `to` and waits for it.
    ///
    /// # Errors
    /// If they do not fit, or the error of earlier work.
    pub fn upload<T: NoUninit>(&self, to: &DeviceBuffer, offset: usize, values: &[T]) -> Result<(), GpuError> {
        let address = to.range(offset, size_of_val(values))?;
        self.bind()?;
        // SAFETY: the range is inside the buffer, and `values` outlives the wait below.
        unsafe { result::memcpy_htod_async(address, values, self.raw()) }
            .map_err(|e| GpuError::driver("copying to the GPU", e))?;
        self.synchronize()
    }

    /// Copies `values` to a device address in stream order, and returns when they have been read.
    ///
    /// # Errors
    /// If the driver refuses.
    ///
    /// # Safety
    /// They must fit into GPU memory there that stays allocated, and that nobody else uses, until the stream has done it.
    pub unsafe fn upload_address<T: NoUninit>(&self, address: u64, values: &[T]) -> Result<(), GpuError> {
        self.bind()?;
        // SAFETY: the caller's promise; the driver keeps its own copy of memory that is not page-locked.
        unsafe { result::memcpy_htod_async(address, values, self.raw()) }
            .map_err(|e| GpuError::driver("copying to the GPU", e))
    }

    /// Copies from byte `offset` of `from` into `values` and waits for it.
    ///
    /// # Errors
    /// If the buffer is too small, or the error of earlier work.
    pub fn download<T: AnyBitPattern>(
        &self,
        from: &DeviceBuffer,
        offset: usize,
        values: &mut [T],
    ) -> Result<(), GpuError> {
        let address = from.range(offset, size_of_val(values))?;
        self.bind()?;
        // SAFETY: the range is inside the buffer, any bytes are a `T`, and `values` outlives the wait below.
        unsafe { result::memcpy_dtoh_async(values, address, self.raw()) }
            .map_err(|e| GpuError::driver("copying from the GPU", e))?;
        self.synchronize()
    }

    /// Sets `bytes` bytes from `offset` on, in stream order.
    ///
    /// # Errors
    /// If they do not fit, or the driver refuses.
    pub fn fill(&self, to: &DeviceBuffer, offset: usize, bytes: usize, value: u8) -> Result<(), GpuError> {
        let address = to.range(offset, bytes)?;
        self.bind()?;
        // SAFETY: the range is inside the buffer.
        unsafe { result::memset_d8_async(address, value, bytes, self.raw()) }
            .map_err(|e| GpuError::driver("filling GPU memory", e))
    }

    /// Sets `bytes` bytes at a device address, in stream order.
    ///
    /// # Errors
    /// If the driver refuses.
    ///
    /// # Safety
    /// They must be in GPU memory that stays allocated, and that nobody else uses, until the stream has done it.
    pub unsafe fn fill_address(&self, address: u64, bytes: usize, value: u8) -> Result<(), GpuError> {
        self.bind()?;
        // SAFETY: the caller's promise.
        unsafe { result::memset_d8_async(address, value, bytes, self.raw()) }
            .map_err(|e| GpuError::driver("filling GPU memory", e))
    }

    /// Begins a copy from page-locked memory and returns at once.
    ///
    /// # Errors
    /// If a range does not fit, or the driver refuses.
    ///
    /// # Safety
    /// Neither range may be written or freed, nor the device range used, until work after the copy on this stream, or behind
    /// an event recorded there, runs.
    pub unsafe fn upload_async(
        &self,
        to: &DeviceBuffer,
        to_offset: usize,
        from: &PinnedBuffer,
        from_offset: usize,
        bytes: usize,
    ) -> Result<(), GpuError> {
        let address = to.range(to_offset, bytes)?;
        let size = from.as_slice().len();
        if from_offset.checked_add(bytes).is_none_or(|end| end > size) {
            return Err(GpuError::OutOfBounds { offset: from_offset, bytes, size });
        }
        self.bind()?;
        // SAFETY: both ranges are inside their buffers; the caller keeps them alone until the copy is done.
        let result = unsafe {
            let source = from.pointer().add(from_offset);
            sys::cuMemcpyHtoDAsync_v2(address, source.cast(), bytes, self.raw())
        };
        GpuError::check("copying to the GPU", result)
    }

    /// Begins a copy of a column of a table from page-locked memory and returns at once: `rows` rows of `width` bytes, `width`
    /// apart in `from` and `pitch` apart in `to`.
    ///
    /// # Errors
    /// If a range does not fit, or the driver refuses.
    ///
    /// # Safety
    /// As [`upload_async`](Self::upload_async).
    pub unsafe fn upload_column_async(
        &self,
        (to, to_offset, pitch): (&DeviceBuffer, usize, usize),
        (from, from_offset, width): (&PinnedBuffer, usize, usize),
        rows: usize,
    ) -> Result<(), GpuError> {
        if rows == 0 || width == 0 {
            return Ok(());
        }
        let span = (rows - 1).saturating_mul(pitch).saturating_add(width);
        let (address, bytes) = (to.range(to_offset, span)?, rows.saturating_mul(width));
        let size = from.as_slice().len();
        if from_offset.checked_add(bytes).is_none_or(|end| end > size) {
            return Err(GpuError::OutOfBounds { offset: from_offset, bytes, size });
        }
        self.bind()?;
        // SAFETY: the offset is inside the buffer.
        let source = unsafe { from.pointer().add(from_offset) };
        let copy = sys::CUDA_MEMCPY2D {
            srcXInBytes: 0,
            srcY: 0,
            srcMemoryType: sys::CUmemorytype::CU_MEMORYTYPE_HOST,
            srcHost: source.cast(),
            srcDevice: 0,
            srcArray: std::ptr::null_mut(),
            srcPitch: width,
            dstXInBytes: 0,
            dstY: 0,
            dstMemoryType: sys::CUmemorytype::CU_MEMORYTYPE_DEVICE,
            dstHost: std::ptr::null_mut(),
            dstDevice: address,
            dstArray: std::ptr::null_mut(),
            dstPitch: pitch.max(width),
            WidthInBytes: width,
            Height: rows,
        };
        // SAFETY: both ranges are inside their buffers; the caller keeps them alone until the copy is done.
        GpuError::check("copying to the GPU", unsafe { sys::cuMemcpy2DAsync_v2(&raw const copy, self.raw()) })
    }

    /// A new event, recorded after all work given to this stream so far. `timing` events can be subtracted.
    ///
    /// # Errors
    /// If the driver refuses.
    pub fn record(&self, timing: bool) -> Result<Event, GpuError> {
        let flags =
            if timing { sys::CUevent_flags::CU_EVENT_DEFAULT } else { sys::CUevent_flags::CU_EVENT_DISABLE_TIMING };
        let inner = self.inner.record_event(Some(flags)).map_err(|e| GpuError::driver("cuEventRecord", e))?;
        Ok(Event { inner })
    }

    /// Makes all later work of this stream wait for the event. The host goes on.
    ///
    /// # Errors
    /// If the driver refuses.
    pub fn wait(&self, event: &Event) -> Result<(), GpuError> {
        self.inner.wait(&event.inner).map_err(|e| GpuError::driver("cuStreamWaitEvent", e))
    }

    /// Records what `work` gives to this stream into a graph instead of running it. `work` may neither allocate, nor wait, nor
    /// copy from or to memory that is not page-locked.
    ///
    /// # Errors
    /// What `work` returned, or why it cannot be captured.
    pub fn capture<E: From<GpuError>>(&self, work: impl FnOnce() -> Result<(), E>) -> Result<Graph, E> {
        let mode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
        self.inner.begin_capture(mode).map_err(|e| GpuError::driver("cuStreamBeginCapture", e))?;
        let done = work();
        // Also after a failure: a stream that stays in capture is of no use.
        let graph = self.inner.end_capture(sys::CUgraphInstantiate_flags(0));
        done?;
        let failed = |e| GpuError::driver("capturing a graph", e);
        let inner = graph
            .map_err(failed)?
            .ok_or_else(|| failed(cudarc::driver::DriverError(sys::CUresult::CUDA_ERROR_STREAM_CAPTURE_INVALIDATED)))?;
        Ok(Graph { inner })
    }
}

impl Event {
    /// Whether the work before it is done.
    ///
    /// # Errors
    /// The error of that work.
    pub fn is_done(&self) -> Result<bool, GpuError> {
        self.inner.try_is_complete().map_err(|e| GpuError::driver("cuEventQuery", e))
    }

    /// Waits until the work before it is done.
    ///
    /// # Errors
    /// The error of that work.
    pub fn synchronize(&self) -> Result<(), GpuError> {
        self.inner.synchronize().map_err(|e| GpuError::driver("cuEventSynchronize", e))
    }

    /// Microseconds from this event to a later one; waits for both. Both must be timing events.
    ///
    /// # Errors
    /// If they are not, or the error of the work between them.
    pub fn microseconds_to(&self, end: &Self) -> Result<f64, GpuError> {
        let milliseconds = self.inner.elapsed_ms(&end.inner).map_err(|e| GpuError::driver("cuEventElapsedTime", e))?;
        Ok(f64::from(milliseconds) * 1e3)
    }
}

// SAFETY: a graph may be used by any thread, by one at a time.
unsafe impl Send for Graph {}

impl std::fmt::Debug for Graph {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Graph").finish_non_exhaustive()
    }
}

impl Graph {
    pub(crate) fn raw(&self) -> sys::CUgraph {
        self.inner.cu_graph()
    }

    /// Runs the captured work once, on the stream it was captured on.
    ///
    /// # Errors
    /// If the driver refuses.
    pub fn launch(&self) -> Result<(), GpuError> {
        self.inner.launch().map_err(|e| GpuError::driver("cuGraphLaunch", e))
    }
}
