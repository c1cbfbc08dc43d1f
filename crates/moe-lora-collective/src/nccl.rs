//! Ranks that each have a GPU.

use crate::rendezvous::{by_file, by_tcp};
use crate::{CollectiveError, Communicator, GpuCommunicator};
use moe_lora_cuda::{DeviceBuffer, Gpu, NcclComm, NcclId, Stream};
use std::net::SocketAddr;
use std::path::Path;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

/// A rank of a group of GPUs, in one process (a thread a rank) or many, on one machine or many.
///
/// Runs with the same ranks on the same machines give the same bits, as far as NCCL chooses the same algorithm; NCCL does not
/// promise the same bits on every rank.
///
/// A rank that dies is noticed when a collective that needs it takes longer than the group's patience; then the group ends
/// on this rank, with an error.
#[derive(Debug)]
pub struct NcclCommunicator {
    comm: NcclComm,
    patience: Duration,
    /// For values that are in the host's memory.
    staging: Mutex<Staging>,
}

#[derive(Debug)]
struct Staging {
    stream: Stream,
    buffer: DeviceBuffer,
}

impl NcclCommunicator {
    /// Joins with an id that the caller brought to all ranks. Returns when all have joined.
    ///
    /// # Errors
    /// If NCCL's library is missing, two ranks have one GPU, or not all ranks come within `patience`.
    pub fn join(gpu: &Gpu, rank: usize, size: usize, id: NcclId, patience: Duration) -> Result<Self, CollectiveError> {
        let comm = NcclComm::join(gpu, rank, size, id, patience)?;
        let staging = Mutex::new(Staging { stream: gpu.stream()?, buffer: gpu.alloc(0)? });
        Ok(Self { comm, patience, staging })
    }

    /// [`join`](Self::join) with an id that rank 0 makes and writes to a new file, which all ranks can see. The file is gone
    /// when all have joined.
    ///
    /// # Errors
    /// As [`join`](Self::join) and [`by_file`].
    pub fn join_by_file(
        gpu: &Gpu,
        rank: usize,
        size: usize,
        path: &Path,
        patience: Duration,
    ) -> Result<Self, CollectiveError> {
        let id = by_file(path, own_id(rank)?, patience)?;
        let joined = Self::join(gpu, rank, size, NcclId::from_bytes(id), patience);
        if rank == 0 {
            // What cannot be removed is refused at the next start, by name.
            let _ = std::fs::remove_file(path);
        }
        joined
    }

    /// [`join`](Self::join) with an id that rank 0 makes and tells at a TCP address, which all ranks can reach.
    ///
    /// # Errors
    /// As [`join`](Self::join) and [`by_tcp`].
    pub fn join_by_tcp(
        gpu: &Gpu,
        rank: usize,
        size: usize,
        address: SocketAddr,
        patience: Duration,
    ) -> Result<Self, CollectiveError> {
        let id = by_tcp(address, rank, size, own_id(rank)?, patience)?;
        Self::join(gpu, rank, size, NcclId::from_bytes(id), patience)
    }
}

fn own_id(rank: usize) -> Result<Option<[u8; NcclId::BYTES]>, CollectiveError> {
    Ok(if rank == 0 { Some(*NcclId::new()?.bytes()) } else { None })
}

impl Communicator for NcclCommunicator {
    fn rank(&self) -> usize {
        self.comm.rank()
    }

    fn size(&self) -> usize {
        self.comm.size()
    }

    fn all_reduce(&self, values: &mut [f32]) -> Result<(), CollectiveError> {
        let mut staging = self.staging.lock().unwrap_or_else(PoisonError::into_inner);
        let bytes = size_of_val(values);
        if staging.buffer.bytes() < bytes {
            staging.buffer = self.comm.gpu().alloc(bytes)?;
        }
        staging.stream.upload(&staging.buffer, 0, values)?;
        self.comm.all_reduce(&staging.stream, &staging.buffer, 0, values.len())?;
        self.comm.wait(&staging.stream, self.patience)?;
        Ok(staging.stream.download(&staging.buffer, 0, values)?)
    }

    fn abort(&self, _reason: &str) {
        self.comm.abort();
    }

    fn gpu(&self) -> Option<&dyn GpuCommunicator> {
        Some(self)
    }
}

impl GpuCommunicator for NcclCommunicator {
    fn all_reduce_on(
        &self,
        stream: &Stream,
        buffer: &DeviceBuffer,
        offset: usize,
        count: usize,
    ) -> Result<(), CollectiveError> {
        Ok(self.comm.all_reduce(stream, buffer, offset, count)?)
    }

    fn wait(&self, stream: &Stream) -> Result<(), CollectiveError> {
        Ok(self.comm.wait(stream, self.patience)?)
    }
}
