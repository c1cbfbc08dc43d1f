//! One projection of a few features for the rows of a band: the loop around the kernels.

use super::simd::{Engine, FEATURES, RowLora, TILE_ROWS, Tile};
use super::workspace::BAND_ROWS;
use moe_lora_core::{Element, Matrix, MatrixRef, Segment};
use std::ops::Range;

/// Features that are projected at a time.
pub(super) const BLOCK: usize = 32;

/// Results: a row of [`BLOCK`] features for every activation row.
pub(super) type Sums = [[f32; BLOCK]];

/// The adapters of the rows of a band.
pub(super) type Loras<'a, W> = [Option<RowLora<'a, W>>; BAND_ROWS];

/// `sums[n][f - features.start] = W[f] . x[n] + B[f] . (scale * s)[n]` for at most [`BLOCK`] features.
pub(super) fn project<E: Engine>(
    engine: E,
    w: MatrixRef<'_, E::W>,
    features: Range<usize>,
    x: &[&[E::X]],
    lora: &[Option<RowLora<'_, E::W>>],
    sums: &mut Sums,
) {
    for (i, tile) in even_parts(x.len(), E::ROWS).enumerate() {
        let (x, lora) = (&x[tile.clone()], &lora[tile.clone()]);
        for first in features.clone().step_by(FEATURES) {
            // A last group that is not full repeats the last feature, and the copies are dropped.
            let group: [usize; FEATURES] = std::array::from_fn(|m| (first + m).min(features.end - 1));
            // The first tile brings the weights in, and meanwhile the next group's; they stay for the other tiles.
            let ahead = if i == 0 { FEATURES * w.stride() } else { 0 };
            let mut out = [[0.0; FEATURES]; TILE_ROWS];
            let out = &mut out[..x.len()];
            engine.tile(&Tile { w: group.map(|f| w.row(f)), features: group, ahead, x, lora }, out);
            let (column, kept) = (first - features.start, FEATURES.min(features.end - first));
            for (sums, out) in sums[tile.clone()].iter_mut().zip(out) {
                for (sum, out) in sums[column..column + kept].iter_mut().zip(out) {
                    *sum = *out;
                }
            }
        }
    }
}

/// `0..n` in as few parts of at most `most` as possible, all nearly equal.
pub(super) fn even_parts(n: usize, most: usize) -> impl Iterator<Item = Range<usize>> {
    let parts = n.div_ceil(most);
    (0..parts).map(move |i| i * n / parts..(i + 1) * n / parts)
}

/// The segments that share rows with `rows`, each with the rows shared.
pub(super) fn pieces<'a>(
    segments: &'a [Segment],
    rows: &Range<usize>,
) -> impl Iterator<Item = (&'a Segment, Range<usize>)> {
    let (start, end) = (rows.start, rows.end);
    let first = segments.partition_point(|s| s.rows().end <= start);
    let touched = segments[first..].iter().take_while(move |s| s.rows().start < end);
    touched.map(move |s| (s, s.rows().start.max(start)..s.rows().end.min(end)))
}

/// A matrix whose format the checks have compared with the engine's.
pub(super) fn typed<W: Element>(matrix: &Matrix) -> MatrixRef<'_, W> {
    matrix.view().unwrap_or_else(|| unreachable!("{} where {} was checked", matrix.dtype(), W::DTYPE))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_are_even() {
        let sizes = |n, most| even_parts(n, most).map(|r| r.len()).collect::<Vec<_>>();
        assert_eq!(sizes(7, 6), [3, 4]);
        assert_eq!(sizes(12, 6), [6, 6]);
        assert_eq!(sizes(0, 6), []);
    }

    #[test]
    fn pieces_cut_segments_at_the_rows() {
        let segment = |first_row, num_rows| Segment { expert: 0, slot: first_row as i32, first_row, num_rows };
        let segments = [segment(0, 4), segment(4, 2), segment(6, 9)];
        let found: Vec<_> = pieces(&segments, &(3..7)).map(|(s, rows)| (s.first_row, rows)).collect();
        assert_eq!(found, [(0, 3..4), (4, 4..6), (6, 6..7)]);
    }
}
