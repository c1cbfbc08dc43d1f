//! The second stage: `y = W2 h + b2 + B s A h`.

use super::Batch;
use super::project::{BLOCK, Loras, pieces, project, typed};
use super::shrink;
use super::simd::{Engine, RowLora, for_each_block};
use super::workspace::{BAND_ROWS, Band, Workspace, row_stride};
use bytemuck::cast_slice;
use moe_lora_core::{Projection, Segment};

/// `exchange` is called if adapters are parts.
pub(super) fn run<E: Engine, R>(
    engine: E,
    batch: &Batch<'_>,
    ws: &mut Workspace,
    exchange: impl FnOnce(&mut [f32]) -> Result<(), R>,
) -> Result<(), R> {
    let Batch { weights, rows, adapters } = *batch;
    let shape = weights.shape();
    let max_rank = ws.max_rank;
    let buffers = &mut ws.buffers;
    let h: &[E::X] = cast_slice(&buffers.h);
    let stride = row_stride::<E::X>(shape.intermediate_size);
    let x = |row: usize| &h[row * stride..][..shape.intermediate_size];
    shrink::rows(engine, batch, &[Projection::Down], x, max_rank, max_rank, &mut buffers.row_s);
    if !shape.adapter_part.is_whole() {
        let count = if batch.any_adapter() { rows.num_rows() * max_rank } else { 0 };
        exchange(&mut buffers.row_s[..count])?;
    }
    let row_s = &*buffers.row_s;
    // The features whose B is here.
    let here = shape.adapter_part.hidden(shape.hidden_size);

    let lora = |segment: &Segment, row: usize| {
        // A shared B is applied in `combine`, to the sum over the token's experts.
        let layer = adapters.layer(segment.slot).filter(|l| !l.shares_outer(Projection::Down))?;
        let lora = layer.experts()[segment.expert as usize].get(Projection::Down)?;
        Some(RowLora { b: typed(lora.b()), s: &row_s[row * max_rank..][..lora.rank()], scale: lora.scale() })
    };

    let y = &mut buffers.y[..rows.num_rows() * shape.hidden_size];
    for_each_block(y, [shape.hidden_size; 2], &ws.bands, BLOCK, |Band { expert, rows: band }, mut block| {
        let expert = &weights.experts()[*expert];
        let features = block.cols();
        let mut vectors: [&[E::X]; BAND_ROWS] = [&[]; BAND_ROWS];
        for (vector, row) in vectors.iter_mut().zip(band.clone()) {
            *vector = x(row);
        }
        let mut loras: Loras<'_, E::W> = [None; BAND_ROWS];
        for (segment, piece) in pieces(&rows.segments, band) {
            for row in piece {
                loras[row - band.start] = lora(segment, row);
            }
        }
        let (start, end) =
            (here.start.clamp(features.start, features.end), here.end.clamp(features.start, features.end));
        let (vectors, loras, none) = (&vectors[..band.len()], &loras[..band.len()], &[None; BAND_ROWS][..band.len()]);
        for (part, base, loras) in
            [(features.start..start, 0, none), (start..end, here.start, loras), (end..features.end, 0, none)]
        {
            if part.is_empty() {
                continue;
            }
            // Rows of W and of B from `base` on.
            let mut sums = [[0.0; BLOCK]; BAND_ROWS];
            project(
                engine,
                typed(&expert.down).rows_from(base),
                part.start - base..part.end - base,
                vectors,
                loras,
                &mut sums,
            );
            for (i, sums) in sums.iter().enumerate().take(band.len()) {
                let first = part.start - features.start;
                block.row(i)[first..first + part.len()].copy_from_slice(&sums[..part.len()]);
            }
        }
        for i in 0..band.len() {
            let y = block.row(i);
            if let Some(bias) = &expert.bias {
                for (y, bias) in y.iter_mut().zip(&bias.down[features.clone()]) {
                    *y += bias;
                }
            }
        }
    });
    Ok(())
}
