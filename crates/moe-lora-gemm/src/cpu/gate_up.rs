//! The first stage: `h = act(W13 x + B s A x)`.

use super::project::{BLOCK, Loras, pieces, project, typed};
use super::shrink::{self, Side};
use super::simd::{Engine, RowLora, for_each_block};
use super::workspace::{BAND_ROWS, Band, Workspace, row_stride};
use super::{Batch, Glu};
use bytemuck::cast_slice_mut;
use moe_lora_core::{Element, Projection, RouterWeightPlacement, Segment, Slice};
use rayon::prelude::*;

/// `exchange` is called if adapters are parts.
pub(super) fn run<E: Engine, R>(
    engine: E,
    batch: &Batch<'_>,
    hidden: Slice<'_>,
    ws: &mut Workspace,
    exchange: impl FnOnce(&mut [f32]) -> Result<(), R>,
) -> Result<(), R> {
    let Batch { weights, rows, adapters } = *batch;
    let shape = weights.shape();
    let max_rank = ws.max_rank;
    let buffers = &mut ws.buffers;
    let stride = row_stride::<E::X>(shape.hidden_size);
    let hidden: &[E::X] = {
        let copy = &mut cast_slice_mut(&mut buffers.hidden)[..rows.num_tokens * stride];
        convert(hidden, shape.hidden_size, copy, stride);
        copy
    };
    let x = |token: usize| &hidden[token * stride..][..shape.hidden_size];
    let row_x = |row: usize| x(rows.row_token(row));

    shrink::tokens(engine, batch, x, &buffers.token_slot, max_rank, &mut buffers.token_s);
    shrink::rows(engine, batch, &[Projection::Gate, Projection::Up], row_x, max_rank, 2 * max_rank, &mut buffers.row_s);
    if !shape.adapter_part.is_whole() {
        let count = if batch.any_adapter() { rows.num_rows() * 2 * max_rank } else { 0 };
        exchange(&mut buffers.row_s[..count])?;
    }
    let (row_s, token_s) = (&*buffers.row_s, &*buffers.token_s);

    let lora = |segment: &Segment, row: usize, projection| {
        let layer = adapters.layer(segment.slot)?;
        let lora = layer.experts()[segment.expert as usize].get(projection)?;
        let side = Side::of(layer, segment.expert as usize, projection);
        let (s, place) = if side.once_a_token { (token_s, rows.row_token(row)) } else { (row_s, row) };
        let offset = (2 * place + usize::from(side.projection == Projection::Up)) * max_rank;
        Some(RowLora { b: typed(lora.b()), s: &s[offset..][..lora.rank()], scale: lora.scale() })
    };

    let h_stride = row_stride::<E::X>(shape.intermediate_size);
    let h = &mut cast_slice_mut::<f32, E::X>(&mut buffers.h)[..rows.num_rows() * h_stride];
    for_each_block(
        h,
        [shape.intermediate_size, h_stride],
        &ws.bands,
        BLOCK,
        |Band { expert, rows: band }, mut block| {
            let expert = &weights.experts()[*expert];
            let features = block.cols();
            let mut vectors: [&[E::X]; BAND_ROWS] = [&[]; BAND_ROWS];
            for (vector, row) in vectors.iter_mut().zip(band.clone()) {
                *vector = row_x(row);
            }
            let vectors = &vectors[..band.len()];
            let mut sums = [[[0.0; BLOCK]; BAND_ROWS]; 2];
            for (sums, (projection, matrix)) in
                sums.iter_mut().zip([(Projection::Gate, &expert.gate), (Projection::Up, &expert.up)])
            {
                let mut loras: Loras<'_, E::W> = [None; BAND_ROWS];
                for (segment, piece) in pieces(&rows.segments, band) {
                    for row in piece {
                        loras[row - band.start] = lora(segment, row, projection);
                    }
                }
                project(engine, typed(matrix), features.clone(), vectors, &loras[..band.len()], sums);
            }
            let [gates, ups] = &mut sums;
            let bias = expert.bias.as_ref().map(|b| (&b.gate[features.clone()], &b.up[features.clone()]));
            for ((i, gate), up) in gates.iter_mut().enumerate().zip(ups).take(band.len()) {
                let weight = match weights.router_weight() {
                    RouterWeightPlacement::Input => rows.row_weight[band.start + i],
                    RouterWeightPlacement::Output => 1.0,
                };
                let glu = Glu { activation: weights.activation(), weight, bias };
                let n = features.len();
                engine.activate(&glu, &mut gate[..n], &mut up[..n], block.row(i));
            }
        },
    );
    Ok(())
}

/// Copies rows of `width` to rows `stride` apart, in another format.
pub(super) fn convert<X: Element>(from: Slice<'_>, width: usize, to: &mut [X], stride: usize) {
    fn each<S: Element, X: Element>(from: &[S], width: usize, to: &mut [X], stride: usize) {
        to.par_chunks_mut(stride).zip(from.par_chunks(width)).for_each(|(to, from)| {
            for (to, from) in to.iter_mut().zip(from) {
                *to = X::from_f32(from.to_f32());
            }
        });
    }
    match from {
        Slice::F32(v) => each(v, width, to, stride),
        Slice::F16(v) => each(v, width, to, stride),
        Slice::Bf16(v) => each(v, width, to, stride),
    }
}
