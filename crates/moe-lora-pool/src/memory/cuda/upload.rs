//! The copies to the GPU: the only unsafe code of this crate.
//!
//! All run on the pool's own stream, in order. Callers keep what is read alive and unchanged until an event recorded behind
//! the copy is done, and let nobody read what is written before that event; the stream has waited for its last readers.
#![allow(unsafe_code, reason = "copies run while the host goes on; why each is sound is said where it is")]

use super::arena::Arena;
use super::image::Image;
use crate::memory::extents::runs;
use moe_lora_cuda::{DeviceBuffer, Event, GpuError, PinnedBuffer, Stream};
use std::ops::Range;
use std::sync::Arc;

/// Copies rows of `width` bytes to places that are `pitch` bytes apart.
pub(super) fn column(
    copy: &Stream,
    to: (&DeviceBuffer, usize, usize),
    from: (&PinnedBuffer, usize, usize),
    rows: usize,
) -> Result<(), GpuError> {
    // SAFETY: the callers of this module keep both sides alone until the copy is done.
    unsafe { copy.upload_column_async(to, from, rows) }
}

/// Copies an image to the places of its pieces, layer by layer: few large copies where places follow each other. Returns
/// an event for every layer of the plan.
pub(super) fn layers(
    copy: &Stream,
    arena: &Arena,
    places: &[usize],
    image: &Image,
) -> Result<Vec<Arc<Event>>, GpuError> {
    let mut source = Source { chunks: &image.chunks, at: 0 };
    let mut events = Vec::new();
    for layer in &image.plan.layers {
        for run in runs(&image.plan.pieces[layer.pieces.clone()], &places[layer.pieces.clone()]) {
            source.copy(copy, arena, run)?;
        }
        events.push(Arc::new(copy.record(false)?));
    }
    Ok(events)
}

/// An image as one row of bytes, read from the front.
struct Source<'a> {
    chunks: &'a [PinnedBuffer],
    at: usize,
}

impl Source<'_> {
    fn copy(&mut self, copy: &Stream, arena: &Arena, mut run: Range<usize>) -> Result<(), GpuError> {
        while let Some((chunk, later)) = self.chunks.split_first().filter(|_| !run.is_empty()) {
            let bytes = run.len().min(chunk.as_slice().len() - self.at);
            let (slab, offset) = arena.locate(run.start);
            // SAFETY: the callers of this module keep both sides alone until the copy is done.
            unsafe { copy.upload_async(slab, offset, chunk, self.at, bytes) }?;
            run.start += bytes;
            self.at += bytes;
            if self.at == chunk.as_slice().len() {
                (self.chunks, self.at) = (later, 0);
            }
        }
        Ok(())
    }
}
