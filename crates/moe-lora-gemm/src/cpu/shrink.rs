//! `s = A x`: the narrow side of the adapters, unscaled.

use super::Batch;
use super::project::{BLOCK, Sums, pieces, project, typed};
use super::simd::Engine;
use super::workspace::BAND_ROWS;
use moe_lora_core::{AdapterLayer, Matrix, Projection};
use rayon::prelude::*;
use std::ops::Range;

/// Where the narrow side of a projection is found.
#[derive(PartialEq)]
pub(super) struct Side {
    /// The projection that it is computed for: gate also for an up with the same A.
    pub(super) projection: Projection,
    /// All experts share A, so a token has one result and not one for each of its rows.
    pub(super) once_a_token: bool,
}

impl Side {
    pub(super) fn of(layer: &AdapterLayer, expert: usize, projection: Projection) -> Self {
        let same = projection == Projection::Up && layer.experts()[expert].shares_gate_up_a();
        let projection = if same { Projection::Gate } else { projection };
        Self { once_a_token: projection != Projection::Down && layer.shares_outer(projection), projection }
    }
}

/// For adapters whose gate or up A is shared by all experts: `out[t] = [A_gate x, A_up x]`, rows of `2 * max_rank`.
pub(super) fn tokens<'x, E: Engine>(
    engine: E,
    batch: &Batch<'_>,
    x: impl Fn(usize) -> &'x [E::X] + Sync,
    slots: &[i32],
    max_rank: usize,
    out: &mut [f32],
) where
    E::X: 'x,
{
    let shared = |slot, projection| batch.adapters.layer(slot).filter(|l| l.shares_outer(projection));
    let any = |slot| shared(slot, Projection::Gate).or_else(|| shared(slot, Projection::Up)).is_some();
    if !batch.rows.segments.iter().any(|s| any(s.slot)) {
        return;
    }
    let slots = &slots[..batch.rows.num_tokens];
    slots.par_iter().zip(out.par_chunks_mut(2 * max_rank)).enumerate().for_each(|(token, (&slot, out))| {
        let (gate, up) = out.split_at_mut(max_rank);
        for (projection, out) in [(Projection::Gate, gate), (Projection::Up, up)] {
            let Some(layer) = shared(slot, projection) else { continue };
            // The first expert stands for all; an up with gate's A has nothing of its own.
            let Some(lora) = layer.experts().first().and_then(|e| e.get(projection)) else { continue };
            let nothing_new = Side { projection: Projection::Gate, once_a_token: true };
            if projection == Projection::Gate || Side::of(layer, 0, projection) != nothing_new {
                apply(engine, lora.a(), &[x(token)], |_, r, sums| out[r].copy_from_slice(sums));
            }
        }
    });
}

/// For every row with an adapter and each of `projections`: `out[row] = [A x(row)]`, rows of `stride`, a projection's
/// result `max_rank` after the one before. What [`Side::of`] finds elsewhere is left out.
pub(super) fn rows<'x, E: Engine>(
    engine: E,
    batch: &Batch<'_>,
    projections: &[Projection],
    x: impl Fn(usize) -> &'x [E::X] + Sync,
    max_rank: usize,
    stride: usize,
    out: &mut [f32],
) where
    E::X: 'x,
{
    let (segments, part) = (&batch.rows.segments, batch.weights.shape().adapter_part);
    // An adapter that changes nothing here may come with a workspace for rank 0.
    if stride == 0 || !batch.any_adapter() {
        return;
    }
    let num_rows = batch.rows.num_rows();
    if !part.is_whole() {
        // What other parts have of A, they will add.
        out[..num_rows * stride].fill(0.0);
    }
    // Enough shares for the threads, large enough that rows of a segment use A together.
    let share = num_rows.div_ceil(8 * rayon::current_num_threads()).clamp(1, 24);
    out[..num_rows * stride].par_chunks_mut(share * stride).enumerate().for_each(|(i, out)| {
        let first = i * share;
        for (segment, piece) in pieces(segments, &(first..first + out.len() / stride)) {
            let Some(layer) = batch.adapters.layer(segment.slot) else { continue };
            let expert = segment.expert as usize;
            let mut vectors: [&[E::X]; BAND_ROWS] = [&[]; BAND_ROWS];
            for (vector, row) in vectors.iter_mut().zip(piece.clone()) {
                *vector = x(row);
            }
            for (p, &projection) in projections.iter().enumerate() {
                let Some(lora) = layer.experts()[expert].get(projection) else { continue };
                let ranks = if projection == Projection::Down { 0..lora.rank() } else { part.ranks(lora.rank()) };
                let own = Side::of(layer, expert, projection) == Side { projection, once_a_token: false };
                if own && !ranks.is_empty() {
                    apply(engine, lora.a(), &vectors[..piece.len()], |n, r: Range<usize>, sums| {
                        let offset = (piece.start + n - first) * stride + p * max_rank + ranks.start;
                        out[offset + r.start..offset + r.end].copy_from_slice(sums);
                    });
                }
            }
        }
    });
}

/// `write(n, r, (A x[n])[r])` for every one of at most [`BAND_ROWS`] vectors and every block of ranks.
pub(super) fn apply<E: Engine>(
    engine: E,
    a: &Matrix,
    x: &[&[E::X]],
    mut write: impl FnMut(usize, Range<usize>, &[f32]),
) {
    let mut sums = [[0.0; BLOCK]; BAND_ROWS];
    let sums: &mut Sums = &mut sums[..x.len()];
    for first in (0..a.rows()).step_by(BLOCK) {
        let ranks = first..(first + BLOCK).min(a.rows());
        project(engine, typed(a), ranks.clone(), x, &[None; BAND_ROWS][..x.len()], sums);
        for (n, sums) in sums.iter().enumerate() {
            write(n, ranks.clone(), &sums[..ranks.len()]);
        }
    }
}
