//! The device order of an adapter: every distinct matrix once, layer by layer, padded and aligned.

use crate::memory::extents::GRAIN;
use bytemuck::cast_slice;
use moe_lora_core::{AdapterLayer, AdapterWeights, Element, Lora, Matrix, Projection};
use std::collections::HashMap;
use std::hash::Hash;
use std::ops::Range;

/// What ranks are padded to: 16 bytes of numbers.
pub(super) const STEP: usize = 8;

/// Where the parts of an adapter are, as places in a list of pieces that have no addresses yet.
#[derive(Debug)]
pub(crate) struct Plan {
    /// Bytes of every piece, each a multiple of [`GRAIN`].
    pub(super) pieces: Vec<usize>,
    /// The changed layers in order.
    pub(super) layers: Vec<LayerPlan>,
}

/// One layer of a plan.
#[derive(Debug)]
pub(super) struct LayerPlan {
    /// Its absolute decoder index.
    pub(super) index: usize,
    /// Its own pieces; it may use those of layers before it too.
    pub(super) pieces: Range<usize>,
    /// `[E, 3]`; `None` is no change.
    pub(super) entries: Vec<Option<PlannedLora>>,
    /// Without padding.
    pub(super) max_rank: usize,
}

/// One projection of one expert.
#[derive(Debug, Clone, Copy)]
pub(super) struct PlannedLora {
    pub(super) a: usize,
    pub(super) b: usize,
    pub(super) rank: usize,
    pub(super) scale: f32,
}

/// Which matrix of a pair: they are padded in different directions.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum Side {
    /// `[rank, in]`, rows of zeros below.
    A,
    /// Some rows of such a matrix, without zeros: a rank's part of fully sharded adapters.
    PartOfA,
    /// `[out, rank]`, columns of zeros at the right.
    B,
}

impl Plan {
    /// The plan of an adapter, and its matrices in the order of the pieces.
    pub(super) fn new<'a>(weights: &'a AdapterWeights) -> (Self, Vec<(Side, &'a Matrix)>) {
        let parts = |lora: Option<&'a Lora>| lora.map(|lora| (lora.a(), lora.b(), lora.scale()));
        let layers = weights.layers().iter().map(|(&index, layer)| (index, loras(layer).map(parts).collect()));
        Self::of(layers, |matrix| (matrix.storage_key(), matrix.shape()))
    }

    /// The same of any matrices: layers by index with the A, B and scale of `[E, 3]` changes. `known` gives what two equal
    /// matrices share, and the shape.
    pub(super) fn of<M: Copy, K: Eq + Hash>(
        adapter: impl Iterator<Item = (usize, Vec<Option<(M, M, f32)>>)>,
        known: impl Fn(M) -> (K, [usize; 2]),
    ) -> (Self, Vec<(Side, M)>) {
        let (mut matrices, mut pieces, mut places) = (Vec::new(), Vec::new(), HashMap::new());
        let mut piece = |side: Side, matrix| {
            let (key, shape) = known(matrix);
            *places.entry((side, key)).or_insert_with(|| {
                matrices.push((side, matrix));
                pieces.push(side.bytes(shape));
                pieces.len() - 1
            })
        };
        let mut layers = Vec::new();
        let mut first = 0;
        for (index, loras) in adapter {
            let mut entry = |(a, b, scale)| {
                let ([rows, _], [_, rank]) = (known(a).1, known(b).1);
                let side = if rows == rank { Side::A } else { Side::PartOfA };
                PlannedLora { a: piece(side, a), b: piece(Side::B, b), rank, scale }
            };
            let entries: Vec<_> = loras.into_iter().map(|lora| lora.map(&mut entry)).collect();
            let end = entries.iter().flatten().map(|lora| lora.a.max(lora.b) + 1).fold(first, usize::max);
            let max_rank = entries.iter().flatten().map(|lora| lora.rank).max().unwrap_or(0);
            layers.push(LayerPlan { index, pieces: first..end, entries, max_rank });
            first = end;
        }
        (Self { pieces, layers }, matrices)
    }

    /// Bytes of all pieces.
    pub(crate) fn bytes(&self) -> usize {
        self.pieces.iter().sum()
    }
}

impl Side {
    /// Bytes of the padded matrix in 16-bit numbers, at the grain.
    pub(super) fn bytes(self, [rows, cols]: [usize; 2]) -> usize {
        let numbers = match self {
            Self::A => rows.next_multiple_of(STEP) * cols,
            Self::PartOfA => rows * cols,
            Self::B => rows * self.stride(cols),
        };
        (2 * numbers).next_multiple_of(GRAIN)
    }

    /// Numbers from row to row of the padded matrix.
    pub(super) const fn stride(self, cols: usize) -> usize {
        match self {
            Self::A | Self::PartOfA => cols,
            Self::B => cols.next_multiple_of(STEP),
        }
    }

    /// Hands the padded matrix's bytes to `write`, part by part.
    pub(super) fn write<T: Element>(self, matrix: &Matrix, write: &mut impl FnMut(&[u8])) {
        let [rows, cols] = matrix.shape();
        let mut written = 2 * rows * cols;
        let padded = self.stride(cols);
        if let Some(view) = matrix.view::<T>().filter(|_| padded == cols) {
            match view.stride() == cols {
                true => write(cast_slice(&view.data()[..rows * cols])),
                false => (0..rows).for_each(|r| write(cast_slice(view.row(r)))),
            }
        } else {
            // A row at a time: as much as the cache holds, whatever the matrix is.
            let mut row: Vec<T> = vec![T::from_f32(0.0); padded];
            for r in 0..rows {
                read_row(matrix, r, &mut row[..cols]);
                write(cast_slice(&row));
            }
            written = 2 * rows * padded;
        }
        const ZEROS: [u8; 4096] = [0; 4096];
        let mut left = self.bytes(matrix.shape()) - written;
        while left > 0 {
            let part = left.min(ZEROS.len());
            write(&ZEROS[..part]);
            left -= part;
        }
    }
}

fn read_row<T: Element>(matrix: &Matrix, r: usize, to: &mut [T]) {
    fn convert<S: Element, T: Element>(matrix: &Matrix, r: usize, to: &mut [T]) {
        if let Some(view) = matrix.view::<S>() {
            to.iter_mut().zip(view.row(r)).for_each(|(to, x)| *to = T::from_f32(x.to_f32()));
        }
    }
    match matrix.dtype() {
        moe_lora_core::DType::F32 => convert::<f32, T>(matrix, r, to),
        moe_lora_core::DType::F16 => convert::<half::f16, T>(matrix, r, to),
        moe_lora_core::DType::Bf16 => convert::<half::bf16, T>(matrix, r, to),
    }
}

fn loras(layer: &AdapterLayer) -> impl Iterator<Item = Option<&Lora>> {
    layer.experts().iter().flat_map(|expert| Projection::ALL.map(|p| expert.get(p)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use half::bf16;

    fn written(side: Side, matrix: &Matrix) -> Vec<bf16> {
        let mut bytes: Vec<u8> = Vec::new();
        side.write::<bf16>(matrix, &mut |part| bytes.extend_from_slice(part));
        assert_eq!(bytes.len(), side.bytes(matrix.shape()));
        bytes.chunks_exact(2).map(|b| bf16::from_le_bytes([b[0], b[1]])).collect()
    }

    #[test]
    fn ranks_are_padded_with_zeros_in_their_own_direction() {
        for convert in [true, false] {
            let numbers = |n: usize| (1..=n).map(|x| x as f32);
            let matrix = |n, rows, cols| match convert {
                true => Matrix::from_vec(numbers(n).collect(), rows, cols).unwrap(),
                false => Matrix::from_vec(numbers(n).map(bf16::from_f32).collect(), rows, cols).unwrap(),
            };
            let a = written(Side::A, &matrix(32, 2, 16));
            assert_eq!(a.len(), 128);
            assert!(a[..32].iter().zip(1..).all(|(v, n)| v.to_f32() == n as f32));
            assert!(a[32..].iter().all(|v| v.to_f32() == 0.0));

            let b = written(Side::B, &matrix(48, 16, 3));
            for (n, row) in b.chunks(8).enumerate() {
                let first = 3.0 * n as f32 + 1.0;
                let want = [first, first + 1.0, first + 2.0, 0.0, 0.0, 0.0, 0.0, 0.0].map(bf16::from_f32);
                assert_eq!(row, want);
            }
            assert_eq!(written(Side::B, &matrix(128, 16, 8)).len(), 128, "nothing to pad");
        }
    }
}
