//! The third stage: `out = routed_scaling * sum_j w_j y_j`.

use super::Batch;
use super::project::{BLOCK, project, typed};
use super::simd::Engine;
use super::workspace::Workspace;
use moe_lora_core::{AdapterLayer, Element, Projection, RouterWeightPlacement};
use rayon::prelude::*;

/// `engine` computes the shared down B, on f32.
pub(super) fn run<E: Engine<X = f32>, Y: Element>(engine: E, batch: &Batch<'_>, ws: &mut Workspace, out: &mut [Y]) {
    let Batch { weights, rows, adapters } = *batch;
    let shape = weights.shape();
    let max_rank = ws.max_rank;
    let buffers = &mut ws.buffers;
    let (y, row_s) = (&*buffers.y, &*buffers.row_s);
    let scaling = weights.routed_scaling_factor();
    let row_weight = |row: usize| match weights.router_weight() {
        RouterWeightPlacement::Output => rows.row_weight[row],
        RouterWeightPlacement::Input => 1.0,
    };
    // Expert of a row.
    let expert = |row: usize| {
        let segment = rows.segments.partition_point(|s| s.rows().end <= row);
        rows.segments[segment].expert as usize
    };
    let token = |t: usize, out: &mut [Y], s: &mut [f32]| {
        // The rows of the token, by j.
        let pairs = &rows.pair_row[t * rows.top_k..][..rows.top_k];
        let live = || pairs.iter().filter_map(|&row| usize::try_from(row).ok());
        let layer = adapters.layer(buffers.token_slot[t]).filter(|l| l.shares_outer(Projection::Down));
        let shared = layer.and_then(|layer: &AdapterLayer| {
            let lora = |expert: usize| layer.experts()[expert].down.as_ref();
            let b = lora(0)?.b();
            let s = &mut s[..b.cols()];
            s.fill(0.0);
            for row in live() {
                let factor = row_weight(row) * lora(expert(row))?.scale();
                for (s, x) in s.iter_mut().zip(&row_s[row * max_rank..]) {
                    *s += factor * x;
                }
            }
            Some((typed(b), &*s))
        });
        for (i, out) in out.chunks_mut(BLOCK).enumerate() {
            let first = i * BLOCK;
            let mut sums = [0.0; BLOCK];
            for row in live() {
                let weight = row_weight(row);
                let y = &y[row * shape.hidden_size + first..][..out.len()];
                for (sum, y) in sums.iter_mut().zip(y) {
                    *sum += weight * y;
                }
            }
            if let Some((b, s)) = shared {
                let mut delta = [[0.0; BLOCK]];
                project(engine, b, first..first + out.len(), &[s], &[None], &mut delta);
                for (sum, delta) in sums.iter_mut().zip(delta[0]) {
                    *sum += delta;
                }
            }
            for (out, sum) in out.iter_mut().zip(sums) {
                *out = Y::from_f32(scaling * sum);
            }
        }
    };
    let tokens = out.par_chunks_mut(shape.hidden_size).enumerate();
    if max_rank == 0 {
        tokens.for_each(|(t, out)| token(t, out, &mut []));
    } else {
        tokens.zip(buffers.token_s.par_chunks_mut(2 * max_rank)).for_each(|((t, out), s)| token(t, out, s));
    }
}
