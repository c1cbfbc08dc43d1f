//! The sorted work of a batch: the one structure that every stage shares.

use std::ops::Range;

/// Neighbouring rows of one expert and one adapter.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Segment {
    /// Expert.
    pub expert: u32,
    /// Adapter slot, -1 for the base model.
    pub slot: i32,
    /// First row.
    pub first_row: u32,
    /// Rows, at least one.
    pub num_rows: u32,
}

impl Segment {
    /// The rows as a range.
    #[must_use]
    pub fn rows(&self) -> Range<usize> {
        self.first_row as usize..(self.first_row + self.num_rows) as usize
    }
}

/// All rows of one expert.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ExpertRows<'a> {
    /// Expert.
    pub expert: u32,
    /// First row.
    pub first_row: u32,
    /// Rows, at least one.
    pub num_rows: u32,
    /// Its segments, slots ascending from -1.
    pub segments: &'a [Segment],
}

impl ExpertRows<'_> {
    /// The rows as a range.
    #[must_use]
    pub fn rows(&self) -> Range<usize> {
        self.first_row as usize..(self.first_row + self.num_rows) as usize
    }
}

/// The (token, expert) pairs of a batch sorted by (expert, adapter slot), stable in token order.
///
/// A *pair* is `t * top_k + j`: token `t`, its `j`-th expert. A *row* is a place in the sorted order. Pairs whose expert
/// is -1 have no row. The fields are filled by `moe-lora-route`, which keeps their capacity from batch to batch.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct RowMap {
    /// Tokens, T.
    pub num_tokens: usize,
    /// Experts a token uses, k.
    pub top_k: usize,
    /// Row to pair, `[rows]`.
    pub row_pair: Vec<u32>,
    /// Row to routing weight, `[rows]`.
    pub row_weight: Vec<f32>,
    /// Pair to row, `[T * k]`; -1 where the pair was dropped.
    pub pair_row: Vec<i32>,
    /// Rows by (expert, slot), ascending.
    pub segments: Vec<Segment>,
}

impl RowMap {
    /// Rows: pairs that were not dropped.
    #[must_use]
    pub fn num_rows(&self) -> usize {
        self.row_pair.len()
    }

    /// The token of a row.
    #[must_use]
    #[inline]
    pub fn row_token(&self, row: usize) -> usize {
        self.row_pair[row] as usize / self.top_k
    }

    /// The experts that have rows, ascending.
    pub fn experts(&self) -> impl Iterator<Item = ExpertRows<'_>> {
        self.segments.chunk_by(|a, b| a.expert == b.expert).map(|segments| ExpertRows {
            expert: segments[0].expert,
            first_row: segments[0].first_row,
            num_rows: segments.iter().map(|s| s.num_rows).sum(),
            segments,
        })
    }
}
