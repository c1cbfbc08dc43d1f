//! Packed adapters in page-locked host memory: what a copy engine reads while host and GPU go on.

use super::plan::Plan;
use crate::PoolError;
use half::{bf16, f16};
use moe_lora_core::{AdapterWeights, DType};
use moe_lora_cuda::{Gpu, PinnedBuffer};
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Bytes of a whole chunk; long enough that copies of it run at the link's speed.
const CHUNK: usize = 4 << 20;
/// The smallest chunk: tails come in powers of two between both.
const SMALLEST: usize = 4 << 10;

/// Chunks of page-locked memory, kept when nobody uses them: locking pages is slow and stops the GPU.
#[derive(Debug)]
pub(crate) struct Chunks {
    gpu: Gpu,
    /// Unused bytes that are kept.
    most: usize,
    unused: Mutex<Unused>,
}

#[derive(Debug, Default)]
struct Unused {
    by_bytes: BTreeMap<usize, Vec<PinnedBuffer>>,
    bytes: usize,
}

/// One packed adapter, in the order of its plan, all pieces one behind the other.
#[derive(Debug)]
pub(crate) struct Image {
    pub(super) plan: Plan,
    pub(super) chunks: Vec<PinnedBuffer>,
    home: Arc<Chunks>,
}

impl Chunks {
    pub(super) fn new(gpu: &Gpu, most: usize) -> Self {
        Self { gpu: gpu.clone(), most, unused: Mutex::default() }
    }

    fn unused(&self) -> MutexGuard<'_, Unused> {
        self.unused.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn chunk(&self, bytes: usize) -> Result<PinnedBuffer, PoolError> {
        let kept = {
            let mut unused = self.unused();
            let kept = unused.by_bytes.get_mut(&bytes).and_then(Vec::pop);
            unused.bytes -= kept.as_ref().map_or(0, |_| bytes);
            kept
        };
        match kept {
            Some(chunk) => Ok(chunk),
            None => self.gpu.alloc_pinned(bytes).map_err(|_| PoolError::OutOfMemory { bytes }),
        }
    }

    fn keep(&self, chunks: Vec<PinnedBuffer>) {
        let mut unused = self.unused();
        for chunk in chunks {
            let bytes = chunk.as_slice().len();
            if unused.bytes + bytes <= self.most {
                unused.bytes += bytes;
                unused.by_bytes.entry(bytes).or_default().push(chunk);
            }
        }
    }
}

/// Sizes of the chunks for `bytes` bytes.
fn chunk_sizes(bytes: usize) -> impl Iterator<Item = usize> {
    let tail = bytes % CHUNK;
    let tail = (tail > 0).then(|| tail.next_power_of_two().max(SMALLEST));
    std::iter::repeat_n(CHUNK, bytes / CHUNK).chain(tail)
}

impl Image {
    /// Packs an adapter in f16 or bf16.
    pub(super) fn pack(home: &Arc<Chunks>, weights: &AdapterWeights, dtype: DType) -> Result<Self, PoolError> {
        let (plan, matrices) = Plan::new(weights);
        let chunks = chunk_sizes(plan.bytes()).map(|bytes| home.chunk(bytes)).collect::<Result<_, _>>()?;
        let mut image = Self { plan, chunks, home: Arc::clone(home) };
        let mut writer = Writer { chunks: &mut image.chunks, chunk: 0, at: 0 };
        for (side, matrix) in matrices {
            match dtype {
                DType::F16 => side.write::<f16>(matrix, &mut |bytes| writer.write(bytes)),
                _ => side.write::<bf16>(matrix, &mut |bytes| writer.write(bytes)),
            }
        }
        Ok(image)
    }

    /// Bytes of page-locked memory.
    pub(crate) fn bytes(&self) -> usize {
        self.chunks.iter().map(|chunk| chunk.as_slice().len()).sum()
    }
}

impl Drop for Image {
    fn drop(&mut self) {
        self.home.keep(std::mem::take(&mut self.chunks));
    }
}

/// Writes over the ends of chunks.
struct Writer<'a> {
    chunks: &'a mut [PinnedBuffer],
    chunk: usize,
    at: usize,
}

impl Writer<'_> {
    fn write(&mut self, mut bytes: &[u8]) {
        while let Some(chunk) = self.chunks.get_mut(self.chunk).filter(|_| !bytes.is_empty()) {
            let room = &mut chunk.as_mut_slice()[self.at..];
            let (now, later) = bytes.split_at(bytes.len().min(room.len()));
            room[..now.len()].copy_from_slice(now);
            (bytes, self.at) = (later, self.at + now.len());
            if self.at == chunk.as_slice().len() {
                (self.chunk, self.at) = (self.chunk + 1, 0);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn chunks_hold_the_bytes_and_waste_less_than_half_of_the_last_one() {
        for bytes in [0, 256, SMALLEST, SMALLEST + 256, CHUNK - 256, CHUNK, CHUNK + 256, 5 * CHUNK / 2, 1 << 30] {
            let sizes: Vec<_> = chunk_sizes(bytes).collect();
            let sum: usize = sizes.iter().sum();
            let last = sizes.last().copied().unwrap_or(0);
            assert!(sum >= bytes && (last == SMALLEST || 2 * (sum - bytes) <= last), "{bytes}: {sizes:?}");
        }
    }
}
