//! The GPU memory of a pool: reserved in few large slabs, handed out by the matrix.

use crate::PoolError;
use crate::memory::extents::{Extents, GRAIN};
use moe_lora_cuda::{DeviceBuffer, Event, Gpu, GpuError, Stream};
use std::ops::Range;
use std::sync::Arc;

/// Least bytes of a slab, unless the budget is smaller.
const SLAB: usize = 1 << 30;
/// Slabs start so far apart that no range reaches from one into the next.
const STRIDE: usize = 1 << 44;

/// Memory of one GPU within a budget. Places are not addresses: [`locate`](Self::locate) turns them into some.
#[derive(Debug)]
pub(super) struct Arena {
    gpu: Gpu,
    budget: usize,
    slabs: Vec<DeviceBuffer>,
    extents: Extents,
    /// Bytes and number of all pieces so far.
    asked: (usize, usize),
    /// What was given back while the GPU could still read it, oldest first.
    retired: Vec<Retired>,
}

#[derive(Debug)]
struct Retired {
    ranges: Vec<Range<usize>>,
    readers: Vec<Arc<Event>>,
}

impl Arena {
    pub(super) fn new(gpu: &Gpu, budget: usize) -> Self {
        let (slabs, extents, retired) = (Vec::new(), Extents::default(), Vec::new());
        Self { gpu: gpu.clone(), budget, slabs, extents, asked: (0, 0), retired }
    }

    /// Bytes of GPU memory that the arena holds.
    pub(super) fn reserved(&self) -> usize {
        self.slabs.iter().map(DeviceBuffer::bytes).sum()
    }

    /// Free bytes of the reserve that pieces of the mean size so far cannot use.
    pub(super) fn unusable(&self) -> usize {
        self.extents.unusable(self.asked.0 / self.asked.1.max(1))
    }

    /// Allocates another slab of at least `bytes`, or of what the budget leaves. `false` if it leaves nothing.
    pub(super) fn grow(&mut self, bytes: usize) -> Result<bool, PoolError> {
        let left = (self.budget - self.reserved()) / GRAIN * GRAIN;
        if left == 0 {
            return Ok(false);
        }
        let least = bytes.min(left);
        let slab = match self.gpu.alloc(least.max(SLAB.min(left))) {
            Err(GpuError::OutOfMemory { .. }) => self.gpu.alloc(least)?,
            slab => slab?,
        };
        let start = self.slabs.len() * STRIDE;
        self.extents.give(start..start + slab.bytes());
        self.slabs.push(slab);
        Ok(true)
    }

    /// Takes places for all pieces, or for none. Work that is given to `copy` later may write there.
    pub(super) fn take(&mut self, pieces: &[usize], copy: &Stream) -> Result<Vec<usize>, PoolError> {
        self.reap();
        let bytes: usize = pieces.iter().sum();
        loop {
            if let Some(places) = self.extents.take(pieces) {
                self.asked = (self.asked.0 + bytes, self.asked.1 + pieces.len());
                return Ok(places);
            }
            if self.grow(bytes)? {
                continue;
            }
            if self.retired.is_empty() {
                return Err(PoolError::Fragmented { bytes, free: self.extents.free() });
            }
            let Retired { ranges, readers } = self.retired.remove(0);
            for reader in &readers {
                copy.wait(reader)?;
            }
            ranges.into_iter().for_each(|range| self.extents.give(range));
        }
    }

    /// Takes places for all pieces where `old` may lie too, which `readers` still read. On an error `old` is as before.
    pub(super) fn take_over(
        &mut self,
        old: &[Range<usize>],
        readers: Vec<Arc<Event>>,
        pieces: &[usize],
        copy: &Stream,
    ) -> Result<Vec<usize>, PoolError> {
        self.give(old.to_vec(), readers);
        self.take(pieces, copy).inspect_err(|_| {
            // Nothing was taken, so the old ranges are free or retired as a whole.
            self.retired.retain(|retired| retired.ranges != old);
            old.iter().for_each(|range| self.extents.claim(range.clone()));
        })
    }

    /// Takes ranges back that are free once `readers` are done.
    pub(super) fn give(&mut self, ranges: Vec<Range<usize>>, readers: Vec<Arc<Event>>) {
        self.retired.push(Retired { ranges, readers });
        self.reap();
    }

    /// Frees what nobody reads any more. After an error of the GPU nothing is ever done.
    fn reap(&mut self) {
        let extents = &mut self.extents;
        self.retired.retain(|Retired { ranges, readers }| {
            let done = readers.iter().all(|reader| reader.is_done().unwrap_or(false));
            if done {
                ranges.iter().for_each(|range| extents.give(range.clone()));
            }
            !done
        });
    }

    /// The slab of a place and the offset in it.
    pub(super) fn locate(&self, place: usize) -> (&DeviceBuffer, usize) {
        (&self.slabs[place / STRIDE], place % STRIDE)
    }

    pub(super) fn address(&self, place: usize) -> u64 {
        let (slab, offset) = self.locate(place);
        slab.address() + offset as u64
    }

    /// The slab that an address lies in.
    #[cfg(test)]
    pub(super) fn slab_of(&self, address: u64) -> Option<&DeviceBuffer> {
        self.slabs.iter().find(|slab| (slab.address()..slab.address() + slab.bytes() as u64).contains(&address))
    }
}
