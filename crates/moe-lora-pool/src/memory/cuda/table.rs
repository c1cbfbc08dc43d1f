//! The device tables: where kernels find every adapter, at addresses that never change.

use super::plan::Plan;
use crate::PoolError;
use bytemuck::cast_slice;
use moe_lora_core::ModelShape;
use moe_lora_cuda::{DeviceBuffer, Event, Gpu, GpuError, PinnedBuffer, Stream};
use moe_lora_kernels::AdapterEntry;
use std::sync::Arc;

/// Where the kernels find the adapters of one layer. The addresses hold for the life of the pool, so a captured graph that
/// reads them serves every adapter that is loaded later.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TableAddress {
    /// [`AdapterEntry`] `[slots, E, 3]`. A slot that a batch does not lease holds anything.
    pub entries: u64,
    /// u8 `[slots]`: 0 where a slot's adapter leaves this layer alone.
    pub active: u64,
    /// [`PoolConfig::device_slots`](crate::PoolConfig::device_slots).
    pub slots: u32,
}

/// One table a MoE layer, in one allocation each for entries `[layers, slots, E, 3]` and flags `[layers, slots]`.
#[derive(Debug)]
pub(super) struct Tables {
    layers: Vec<usize>,
    /// Entries of one slot in one layer.
    width: usize,
    slots: usize,
    entries: DeviceBuffer,
    active: DeviceBuffer,
    rows: Vec<Row>,
}

/// One slot's part of every table.
#[derive(Debug, Default)]
struct Row {
    /// What copies read: entries `[layers, E, 3]`, then flags `[layers]`. Allocated when the slot is first used.
    staging: Option<PinnedBuffer>,
    /// Recorded after the last copies from it.
    written: Option<Arc<Event>>,
    /// What may still read the slot for its last tenant.
    readers: Vec<Arc<Event>>,
}

impl Tables {
    pub(super) fn new(gpu: &Gpu, copy: &Stream, shape: &ModelShape, slots: usize) -> Result<Self, GpuError> {
        let (layers, width) = (shape.moe_layers.clone(), 3 * shape.layer.num_experts);
        let all = layers.len().saturating_mul(slots);
        let entries = gpu.alloc(all.saturating_mul(width * size_of::<AdapterEntry>()))?;
        let active = gpu.alloc(all)?;
        copy.fill(&entries, 0, entries.bytes(), 0)?;
        copy.fill(&active, 0, active.bytes(), 0)?;
        copy.synchronize()?;
        let rows = std::iter::repeat_with(Row::default).take(slots).collect();
        Ok(Self { layers, width, slots, entries, active, rows })
    }

    /// Bytes of GPU memory.
    pub(super) const fn bytes(&self) -> usize {
        self.entries.bytes() + self.active.bytes()
    }

    /// `None` if the model has no such MoE layer.
    pub(super) fn address(&self, layer: usize) -> Option<TableAddress> {
        let at = self.layers.binary_search(&layer).ok()? * self.slots;
        let entries = self.entries.address() + (at * self.width * size_of::<AdapterEntry>()) as u64;
        Some(TableAddress { entries, active: self.active.address() + at as u64, slots: self.slots as u32 })
    }

    /// Begins to write a slot's rows of all layers, which is done at the event; `address` is that of a piece of the plan.
    pub(super) fn write(
        &mut self,
        gpu: &Gpu,
        copy: &Stream,
        slot: usize,
        plan: &Plan,
        address: impl Fn(usize) -> u64,
    ) -> Result<Arc<Event>, PoolError> {
        let (layers, row_bytes) = (self.layers.len(), self.width * size_of::<AdapterEntry>());
        let row = &mut self.rows[slot];
        for reader in row.readers.drain(..) {
            copy.wait(&reader)?;
        }
        if let Some(written) = row.written.take() {
            written.synchronize()?; // long over, but for a tenant that left at once
        }
        let staging = match &mut row.staging {
            Some(staging) => staging,
            none => none.insert(gpu.alloc_pinned(layers * (row_bytes + 1))?),
        };
        let (entries, active) = staging.as_mut_slice().split_at_mut(layers * row_bytes);
        for ((index, cells), active) in self.layers.iter().zip(entries.chunks_exact_mut(row_bytes)).zip(active) {
            let layer = plan.layers.binary_search_by_key(index, |layer| layer.index).ok().map(|at| &plan.layers[at]);
            *active = layer.is_some_and(|layer| layer.max_rank > 0).into();
            match layer {
                None => cells.fill(0),
                Some(layer) => {
                    for (bytes, lora) in cells.chunks_exact_mut(size_of::<AdapterEntry>()).zip(&layer.entries) {
                        let entry = lora.map_or(AdapterEntry::default(), |lora| AdapterEntry {
                            a: address(lora.a),
                            b: address(lora.b),
                            rank: lora.rank as i32,
                            scale: lora.scale,
                        });
                        bytes.copy_from_slice(cast_slice(&[entry]));
                    }
                }
            }
        }
        let entries = (&self.entries, slot * row_bytes, self.slots * row_bytes);
        super::upload::column(copy, entries, (staging, 0, row_bytes), layers)?;
        super::upload::column(copy, (&self.active, slot, self.slots), (staging, layers * row_bytes, 1), layers)?;
        let written = Arc::new(copy.record(false)?);
        row.written = Some(Arc::clone(&written));
        Ok(written)
    }

    /// Remembers what may still read a slot that its tenant leaves.
    pub(super) fn leave(&mut self, slot: usize, readers: &[Arc<Event>]) {
        if let Some(row) = self.rows.get_mut(slot) {
            row.readers.extend_from_slice(readers);
        }
    }

    /// What the GPU reads for a slot in the `at`-th layer.
    #[cfg(test)]
    pub(super) fn read(
        &self,
        stream: &Stream,
        at: usize,
        slot: usize,
        entries: &mut [u8],
        active: &mut [u8],
    ) -> Result<(), GpuError> {
        let row = at * self.slots + slot;
        stream.download(&self.entries, row * self.width * size_of::<AdapterEntry>(), entries)?;
        stream.download(&self.active, row, active)
    }
}
