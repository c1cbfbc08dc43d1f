//! The copies to the GPU and in it.
//!
//! All run on the pool's own stream, in order. Callers keep what is read alive and unchanged until an event recorded behind
//! the copy is done, and let nobody read what is written before that event; the stream has waited for its last readers.
#![allow(unsafe_code, reason = "copies run while the host goes on; why each is sound is said where it is")]

use super::arena::Arena;
use super::image::Image;
use super::views::Views;
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

/// Copies matrices in GPU memory to the places of their pieces, padded with zeros, behind the earlier work of their stream
/// and before its later work. Returns an event for every layer of the plan.
pub(super) fn views(
    copy: &Stream,
    arena: &Arena,
    places: &[usize],
    views: &Views,
) -> Result<Vec<Arc<Event>>, GpuError> {
    copy.wait(&views.stream.record(false)?)?;
    let mut events = Vec::new();
    for layer in &views.plan.layers {
        for piece in layer.pieces.clone() {
            let (side, matrix) = views.matrices[piece];
            let (bytes, to) = (views.plan.pieces[piece], arena.address(places[piece]));
            let (width, stride) = (2 * matrix.cols, side.stride(matrix.cols));
            // SAFETY: the piece is the arena's and free for this; `DeviceWeights::new` promises the other side, which the
            // matrix's stream leaves alone until the copies are done, or the caller waits after an error.
            unsafe {
                if bytes > width * matrix.rows {
                    copy.fill_address(to, bytes, 0)?;
                }
                copy.copy_rows_async((to, 2 * stride), (matrix.address, 2 * matrix.stride), width, matrix.rows)?;
            }
        }
        events.push(Arc::new(copy.record(false)?));
    }
    if let Some(last) = events.last() {
        views.stream.wait(last)?;
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
