//! Adapters in the memory of a GPU: every distinct matrix once, ranks padded to multiples of 8, in a reserve made once.
//!
//! ```text
//! weights --plan, image--> page-locked memory --upload--> arena, tables      copy stream, an event a layer
//!                                 batch waits for the events of what it leases ----^      |
//!                                 memory is reused behind the last reader's event  <------'
//! ```

mod arena;
mod image;
mod plan;
mod table;
#[cfg(test)]
mod tests;
mod upload;

pub use table::TableAddress;

pub(crate) use image::Image;

use crate::memory::StoreBytes;
use crate::memory::extents::runs;
use crate::{PoolConfig, PoolError};
use arena::Arena;
use image::Chunks;
use moe_lora_core::{AdapterWeights, DType, InputError, LayerShape, ModelShape};
use moe_lora_cuda::{Event, Gpu, GpuError, Stream};
use plan::{Plan, STEP};
use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use table::Tables;

/// The experts that the kernels tell apart.
const MOST_EXPERTS: usize = 1024;

/// The memory of one GPU.
///
/// Adapters are stored in the model's format, or in bf16 for an f32 model. Ranks are padded with zeros to the next multiple
/// of 8, matrices start at multiples of 256 bytes, and these padded bytes are what the pool's budget is charged. A matrix
/// that several experts or projections share is there once. The matrices of an adapter may lie apart, so every hole that
/// holds one is of use.
#[derive(Debug, Clone)]
pub struct CudaMemory {
    gpu: Gpu,
}

impl CudaMemory {
    /// The memory of an opened GPU.
    #[must_use]
    pub const fn new(gpu: Gpu) -> Self {
        Self { gpu }
    }

    /// The GPU.
    #[must_use]
    pub const fn gpu(&self) -> &Gpu {
        &self.gpu
    }

    /// The format that a model of `dtype` has on a GPU: f16 for f16, else bf16.
    #[must_use]
    pub const fn dtype(dtype: DType) -> DType {
        match dtype {
            DType::F16 => DType::F16,
            DType::F32 | DType::Bf16 => DType::Bf16,
        }
    }

    /// Whether the kernels can run layers of these sizes.
    ///
    /// # Errors
    /// If a width is no multiple of 8, or there are more than 1024 experts.
    pub fn check_shape(shape: &LayerShape) -> Result<(), InputError> {
        let LayerShape { num_experts, hidden_size, intermediate_size, .. } = *shape;
        if !hidden_size.is_multiple_of(STEP) || !intermediate_size.is_multiple_of(STEP) {
            let found = format!("hidden size {hidden_size} and intermediate size {intermediate_size}");
            return Err(InputError::new(found, "multiples of 8 on a GPU; the CPU takes any"));
        }
        if num_experts > MOST_EXPERTS {
            let expected = format!("at most {MOST_EXPERTS} on a GPU; the CPU takes any");
            return Err(InputError::new(format!("{num_experts} experts"), expected));
        }
        Ok(())
    }
}

impl PartialEq for CudaMemory {
    fn eq(&self, other: &Self) -> bool {
        self.gpu.info().ordinal == other.gpu.info().ordinal
    }
}

impl Eq for CudaMemory {}

impl From<GpuError> for PoolError {
    fn from(error: GpuError) -> Self {
        match error {
            GpuError::OutOfMemory { bytes, .. } => Self::OutOfMemory { bytes },
            error => Self::Gpu(error),
        }
    }
}

/// What one pool has in a GPU's memory, and the stream that brings it there.
#[derive(Debug)]
pub(crate) struct CudaStore {
    gpu: Gpu,
    dtype: DType,
    copy: Stream,
    chunks: Arc<Chunks>,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    arena: Arena,
    tables: Tables,
    /// Images that copies may still read, and the event behind these copies.
    uploads: Vec<(Arc<Event>, Arc<Image>)>,
}

impl CudaStore {
    pub(crate) fn new(gpu: &Gpu, shape: &ModelShape, config: &PoolConfig) -> Result<Self, PoolError> {
        let copy = gpu.stream()?;
        let tables = Tables::new(gpu, &copy, shape, config.device_slots)?;
        let state = State { arena: Arena::new(gpu, config.bytes), tables, uploads: Vec::new() };
        Ok(Self {
            gpu: gpu.clone(),
            dtype: CudaMemory::dtype(shape.dtype),
            copy,
            chunks: Arc::new(Chunks::new(gpu, config.host_bytes)),
            state: Mutex::new(state),
        })
    }

    // As in `Shared`: a poisoned lock is as good.
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) const fn dtype(&self) -> DType {
        self.dtype
    }

    pub(crate) fn bytes(weights: &AdapterWeights) -> usize {
        Plan::new(weights).0.bytes()
    }

    pub(crate) fn pack(&self, weights: &AdapterWeights) -> Result<Image, PoolError> {
        Image::pack(&self.chunks, weights, self.dtype)
    }

    /// Allocates all that the budget allows.
    pub(crate) fn reserve(&self) -> Result<(), PoolError> {
        let mut state = self.state();
        while state.arena.grow(usize::MAX)? {}
        Ok(())
    }

    pub(crate) fn held(&self) -> StoreBytes {
        let State { arena, tables, .. } = &*self.state();
        StoreBytes { reserved: arena.reserved(), tables: tables.bytes(), unusable: arena.unusable() }
    }

    pub(crate) fn address(&self, layer: usize) -> Option<TableAddress> {
        self.state().tables.address(layer)
    }

    /// Begins to upload an image and its rows of the tables, and returns without waiting. With `instead_of`, which nobody
    /// leases, the image may lie where that block lies; that block is then gone, unless this fails for want of room.
    pub(crate) fn place(
        self: &Arc<Self>,
        image: &Arc<Image>,
        slot: u32,
        instead_of: Option<&CudaBlock>,
    ) -> Result<CudaBlock, PoolError> {
        let mut guard = self.state();
        let state = &mut *guard;
        state.uploads.retain(|(done, _)| !done.is_done().unwrap_or(true));
        let plan = &image.plan;
        let places = match instead_of {
            None => state.arena.take(&plan.pieces, &self.copy)?,
            Some(old) => {
                let (mut ranges, readers) = (old.ranges(), old.reader_events());
                let places = match ranges.as_deref() {
                    Some(old) => state.arena.take_over(old, readers.clone(), &plan.pieces, &self.copy)?,
                    None => state.arena.take(&plan.pieces, &self.copy)?,
                };
                *ranges = None;
                state.tables.leave(old.slot as usize, &readers);
                places
            }
        };
        let ranges = runs(&plan.pieces, &places);
        match self.upload(state, image, slot, &places) {
            Ok((written, uploaded)) => {
                let layer = |(layer, uploaded): (&plan::LayerPlan, _)| (layer.index, layer.max_rank, uploaded);
                Ok(CudaBlock {
                    store: Arc::clone(self),
                    slot,
                    ranges: Mutex::new(Some(ranges)),
                    written,
                    layers: plan.layers.iter().zip(uploaded).map(layer).collect(),
                    ready: AtomicBool::new(false),
                    readers: Mutex::default(),
                })
            }
            Err(error) => {
                // Copies that were begun read the image.
                let _ = self.copy.synchronize();
                state.arena.give(ranges, Vec::new());
                Err(error)
            }
        }
    }

    fn upload(
        &self,
        state: &mut State,
        image: &Arc<Image>,
        slot: u32,
        places: &[usize],
    ) -> Result<(Arc<Event>, Vec<Arc<Event>>), PoolError> {
        let State { arena, tables, uploads } = state;
        let address = |piece: usize| arena.address(places[piece]);
        let written = tables.write(&self.gpu, &self.copy, slot as usize, &image.plan, address)?;
        let uploaded = upload::layers(&self.copy, arena, places, image)?;
        uploads.push((Arc::clone(uploaded.last().unwrap_or(&written)), Arc::clone(image)));
        Ok((written, uploaded))
    }
}

/// One version of an adapter in GPU memory. Dropping it frees the memory behind its last reader.
#[derive(Debug)]
pub(crate) struct CudaBlock {
    store: Arc<CudaStore>,
    /// Its slot in the tables.
    slot: u32,
    /// `None` once another block took them over.
    ranges: Mutex<Option<Vec<Range<usize>>>>,
    /// Behind the rows of the tables.
    written: Arc<Event>,
    /// Index, largest rank, and the event behind the matrices of every changed layer.
    layers: Vec<(usize, usize, Arc<Event>)>,
    /// All events above are known to be done.
    ready: AtomicBool,
    /// The last work that read it, by stream.
    readers: Mutex<Vec<(Stream, Arc<Event>)>>,
}

impl CudaBlock {
    fn ranges(&self) -> MutexGuard<'_, Option<Vec<Range<usize>>>> {
        self.ranges.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn readers(&self) -> MutexGuard<'_, Vec<(Stream, Arc<Event>)>> {
        self.readers.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn reader_events(&self) -> Vec<Arc<Event>> {
        self.readers().iter().map(|(_, event)| Arc::clone(event)).collect()
    }

    pub(crate) const fn slot(&self) -> u32 {
        self.slot
    }

    /// Whether its memory went to a block that took it over.
    pub(crate) fn is_gone(&self) -> bool {
        self.ranges().is_none()
    }

    /// The largest rank in a layer, without padding.
    pub(crate) fn rank(&self, layer: usize) -> usize {
        self.layers.binary_search_by_key(&layer, |l| l.0).map_or(0, |at| self.layers[at].1)
    }

    /// Makes a stream wait for the upload of one layer, or of all.
    pub(crate) fn wait_on(&self, stream: &Stream, layer: Option<usize>) -> Result<(), GpuError> {
        if self.ready.load(Ordering::Acquire) {
            return Ok(());
        }
        let last = self.layers.last().map_or(&self.written, |l| &l.2);
        if last.is_done()? {
            self.ready.store(true, Ordering::Release);
            return Ok(());
        }
        let at = layer.map(|layer| self.layers.binary_search_by_key(&layer, |l| l.0));
        stream.wait(match at {
            None => last,
            Some(Ok(at)) => &self.layers[at].2,
            Some(Err(_)) => &self.written,
        })
    }

    /// Whether all of it has arrived.
    pub(crate) fn is_ready(&self) -> bool {
        let last = self.layers.last().map_or(&self.written, |l| &l.2);
        self.ready.load(Ordering::Acquire) || last.is_done().unwrap_or(false)
    }

    /// Remembers that work before `event` on `stream` reads it.
    pub(crate) fn read_by(&self, stream: &Stream, event: &Arc<Event>) {
        let mut readers = self.readers();
        match readers.iter_mut().find(|(known, _)| known == stream) {
            Some((_, last)) => *last = Arc::clone(event),
            None => readers.push((stream.clone(), Arc::clone(event))),
        }
    }
}

impl Drop for CudaBlock {
    fn drop(&mut self) {
        if let Some(ranges) = self.ranges().take() {
            let readers = self.reader_events();
            let mut state = self.store.state();
            state.tables.leave(self.slot as usize, &readers);
            state.arena.give(ranges, readers);
        }
    }
}
