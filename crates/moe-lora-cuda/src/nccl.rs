//! Collectives between GPUs through NCCL, which is looked for when first needed.
//!
//! cudarc binds NCCL too, but panics where the library is missing, does not look for `libnccl.so.2`, the name that wheels and
//! runtime packages give it, and keeps a communicator in one thread. The ten functions used here are older than any CUDA
//! release that the kernels run on.

mod library;

use crate::{DeviceBuffer, Gpu, GpuError, Stream};
use library::{Api, FLOAT32, IN_PROGRESS, RawComm, SUM};
use std::ffi::CStr;
use std::fmt;
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError, mpsc};
use std::time::{Duration, Instant};

/// Why a collective between GPUs did not happen. One line each.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum NcclError {
    /// No NCCL library can be loaded.
    #[error("no NCCL library: {reason}")]
    NotFound {
        /// What was tried, and what the system said.
        reason: String,
    },
    /// A call failed.
    #[error("{what}: {reason} (NCCL error {code})")]
    Failed {
        /// What was being done.
        what: &'static str,
        /// NCCL's number.
        code: i32,
        /// NCCL's words.
        reason: String,
    },
    /// Another rank did not come, or the GPU did not finish.
    #[error("{what}: nothing for {after:?}; a rank died or hangs")]
    TimedOut {
        /// What was being done.
        what: &'static str,
        /// How long.
        after: Duration,
    },
    /// The communicator was aborted, here or by an earlier failure.
    #[error("the communicator was aborted")]
    Aborted,
    /// A rank, buffer or stream that does not fit.
    #[error("{found}, expected {expected}")]
    Unfit {
        /// What was found.
        found: String,
        /// What has to be.
        expected: String,
    },
    /// The GPU failed.
    #[error(transparent)]
    Gpu(#[from] GpuError),
}

/// What names a group of ranks: made by one of them and told to all.
#[derive(Clone, Copy, PartialEq, Eq)]
#[repr(C)]
pub struct NcclId {
    bytes: [u8; Self::BYTES],
}

impl NcclId {
    /// Its size.
    pub const BYTES: usize = 128;

    /// A new one. The rank that makes it must live while the group comes together.
    ///
    /// # Errors
    /// [`NotFound`](NcclError::NotFound), or why NCCL cannot listen on any network interface.
    pub fn new() -> Result<Self, NcclError> {
        let api = api()?;
        let mut id = Self { bytes: [0; Self::BYTES] };
        // SAFETY: NCCL writes 128 bytes.
        api.check("ncclGetUniqueId", unsafe { (api.get_unique_id)(&raw mut id) })?;
        Ok(id)
    }

    /// An id that came from another process.
    #[must_use]
    pub const fn from_bytes(bytes: [u8; Self::BYTES]) -> Self {
        Self { bytes }
    }

    /// Its bytes, to be sent to the other ranks.
    #[must_use]
    pub const fn bytes(&self) -> &[u8; Self::BYTES] {
        &self.bytes
    }
}

impl fmt::Debug for NcclId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("NcclId")
    }
}

/// NCCL's version, 22304 for 2.23.4.
///
/// # Errors
/// [`NotFound`](NcclError::NotFound).
pub fn nccl_version() -> Result<u32, NcclError> {
    let (api, mut version) = (api()?, 0);
    // SAFETY: NCCL writes one number.
    api.check("ncclGetVersion", unsafe { (api.get_version)(&raw mut version) })?;
    Ok(version.unsigned_abs())
}

fn api() -> Result<&'static Api, NcclError> {
    static API: OnceLock<Result<Api, NcclError>> = OnceLock::new();
    API.get_or_init(Api::load).as_ref().map_err(Clone::clone)
}

impl Api {
    fn check(&self, what: &'static str, code: i32) -> Result<(), NcclError> {
        if code == 0 {
            return Ok(());
        }
        // SAFETY: NCCL returns a constant string for every number.
        let reason = unsafe { CStr::from_ptr((self.get_error_string)(code)) }.to_string_lossy().into_owned();
        Err(NcclError::Failed { what, code, reason })
    }
}

/// A rank's end of a group of GPUs, one for each rank. Dropping it aborts what is still under way.
pub struct NcclComm {
    api: &'static Api,
    gpu: Gpu,
    rank: usize,
    size: usize,
    /// `None` once aborted. One thread at a time may use it.
    raw: Mutex<Option<Handle>>,
}

struct Handle(RawComm);

// SAFETY: NCCL lets any thread use a communicator, one at a time, which the mutex around it sees to.
unsafe impl Send for Handle {}

impl NcclComm {
    /// Joins rank `rank` of `size` on a GPU; returns when all have joined. Every rank needs a GPU of its own.
    ///
    /// # Errors
    /// [`TimedOut`](NcclError::TimedOut) if not all ranks are there after `patience`: a thread that waits for them is left
    /// behind then. Else what NCCL says, two ranks on one GPU for instance.
    pub fn join(gpu: &Gpu, rank: usize, size: usize, id: NcclId, patience: Duration) -> Result<Self, NcclError> {
        let api = api()?;
        let (Ok(n), Ok(r)) = (i32::try_from(size), i32::try_from(rank)) else {
            return Err(NcclError::Unfit { found: format!("rank {rank} of {size}"), expected: "fewer ranks".into() });
        };
        if rank >= size {
            return Err(NcclError::Unfit {
                found: format!("rank {rank} of {size}"),
                expected: "a rank below it".into(),
            });
        }
        let (sender, receiver) = mpsc::sync_channel::<Result<Handle, NcclError>>(0);
        let stream = gpu.stream()?;
        // Joining blocks until all ranks are there, so it waits in a thread that can be left.
        std::thread::spawn(move || {
            let joined = stream.bind().map_err(NcclError::from).and_then(|()| {
                let mut raw: RawComm = std::ptr::null_mut();
                // SAFETY: NCCL writes one pointer; the context of the rank's GPU is current.
                api.check("ncclCommInitRank", unsafe { (api.comm_init_rank)(&raw mut raw, n, id, r) })?;
                Ok(Handle(raw))
            });
            if let Err(mpsc::SendError(Ok(handle))) = sender.send(joined) {
                // SAFETY: nobody else has this communicator.
                unsafe { (api.comm_abort)(handle.0) };
            }
        });
        let handle = match receiver.recv_timeout(patience) {
            Ok(joined) => joined?,
            Err(_) => return Err(NcclError::TimedOut { what: "waiting for all ranks to join", after: patience }),
        };
        let comm = Self { api, gpu: gpu.clone(), rank, size, raw: Mutex::new(Some(handle)) };
        // The first collective sets connections up, which no captured one should have to.
        let (stream, buffer) = (gpu.stream()?, gpu.alloc(size_of::<f32>())?);
        stream.upload(&buffer, 0, &[1_f32])?;
        comm.all_reduce(&stream, &buffer, 0, 1)?;
        comm.wait(&stream, patience)?;
        Ok(comm)
    }

    /// This rank.
    #[must_use]
    pub const fn rank(&self) -> usize {
        self.rank
    }

    /// All ranks.
    #[must_use]
    pub const fn size(&self) -> usize {
        self.size
    }

    /// Its GPU.
    #[must_use]
    pub const fn gpu(&self) -> &Gpu {
        &self.gpu
    }

    /// Replaces `count` f32 values from byte `offset` of `buffer` on by their sums over all ranks, in stream order. Every rank
    /// must give its stream the same collectives in the same order. Can be captured into a graph.
    ///
    /// # Errors
    /// If the range does not fit or the stream is another GPU's; [`Aborted`](NcclError::Aborted); what NCCL says.
    pub fn all_reduce(
        &self,
        stream: &Stream,
        buffer: &DeviceBuffer,
        offset: usize,
        count: usize,
    ) -> Result<(), NcclError> {
        let address = buffer.range(offset, count.saturating_mul(size_of::<f32>()))?;
        let (found, expected) = (stream.cudarc().context().ordinal(), self.gpu.info().ordinal);
        if found != expected {
            let (found, expected) = (format!("a stream of GPU {found}"), format!("one of GPU {expected}"));
            return Err(NcclError::Unfit { found, expected });
        }
        let raw = self.raw();
        let handle = raw.as_ref().ok_or(NcclError::Aborted)?;
        stream.bind()?;
        let place = address as usize as *mut std::ffi::c_void;
        // SAFETY: the range lies in a live buffer; `raw` is a live communicator that nobody else uses now; work on the
        // buffer is ordered by the stream, as for every other use of a buffer.
        let code = unsafe { (self.api.all_reduce)(place, place, count, FLOAT32, SUM, handle.0, stream.raw().cast()) };
        self.api.check("ncclAllReduce", code)
    }

    /// Waits until all work given to the stream is done. A rank that fails, or nothing for `patience`, aborts the
    /// communicator, so that this rank goes on with an error.
    ///
    /// # Errors
    /// [`TimedOut`](NcclError::TimedOut), or what failed.
    pub fn wait(&self, stream: &Stream, patience: Duration) -> Result<(), NcclError> {
        let (done, start) = (stream.record(false)?, Instant::now());
        let what = "waiting for a collective";
        loop {
            if done.is_done()? {
                return Ok(());
            }
            let failed = self.failure(what).err();
            if let Some(error) = failed {
                self.abort();
                return Err(error);
            }
            if start.elapsed() > patience {
                self.abort();
                return Err(NcclError::TimedOut { what, after: patience });
            }
            // Short waits spin: a layer takes tens of microseconds.
            if start.elapsed() > Duration::from_millis(2) {
                std::thread::sleep(Duration::from_micros(100));
            } else {
                std::hint::spin_loop();
            }
        }
    }

    /// What NCCL found out about the other ranks since.
    fn failure(&self, what: &'static str) -> Result<(), NcclError> {
        let raw = self.raw();
        let handle = raw.as_ref().ok_or(NcclError::Aborted)?;
        let mut code = 0;
        // SAFETY: a live communicator; NCCL writes one number.
        self.api.check("ncclCommGetAsyncError", unsafe { (self.api.comm_get_async_error)(handle.0, &raw mut code) })?;
        if code == IN_PROGRESS { Ok(()) } else { self.api.check(what, code) }
    }

    /// Ends the group: what is under way on the GPU returns, and every later call fails. The other ranks find out when their
    /// patience ends, or at once where NCCL tells them.
    pub fn abort(&self) {
        if let Some(handle) = self.raw().take() {
            let _ = self.gpu.context().bind_to_thread();
            // SAFETY: taken out, so nobody uses it any more.
            unsafe { (self.api.comm_abort)(handle.0) };
        }
    }

    fn raw(&self) -> MutexGuard<'_, Option<Handle>> {
        self.raw.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for NcclComm {
    fn drop(&mut self) {
        self.abort();
    }
}

impl fmt::Debug for NcclComm {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "NcclComm(rank {} of {} on GPU {})", self.rank, self.size, self.gpu.info().ordinal)
    }
}
