//! Disjoint blocks of a row-major buffer, written in parallel.

use crate::cpu::workspace::Band;
use rayon::prelude::*;
use std::marker::PhantomData;
use std::ops::Range;

/// Some rows and columns of a buffer that nobody else holds.
pub(in super::super) struct BlockMut<'a, T> {
    buffer: *mut T,
    stride: usize,
    rows: Range<usize>,
    cols: Range<usize>,
    lifetime: PhantomData<&'a mut [T]>,
}

impl<T> BlockMut<'_, T> {
    /// The columns, counted in the buffer.
    pub(in super::super) fn cols(&self) -> Range<usize> {
        self.cols.clone()
    }

    /// A row, counted in the block.
    pub(in super::super) fn row(&mut self, row: usize) -> &mut [T] {
        assert!(row < self.rows.len());
        let first = (self.rows.start + row) * self.stride + self.cols.start;
        // SAFETY: the place is inside the buffer, as `for_each_block` checked; only this block covers it, and `self` is
        // borrowed mutably for as long as the row lives.
        unsafe { std::slice::from_raw_parts_mut(self.buffer.add(first), self.cols.len()) }
    }
}

struct Shared<T>(*mut T);

// SAFETY: the pointer is only used for the disjoint blocks that `for_each_block` makes of it.
unsafe impl<T: Send> Sync for Shared<T> {}

/// Cuts `buffer`, rows of `width` that lie `stride` apart, into bands of rows and those into blocks of `cols` columns, and
/// calls `f(band, block)` for every block, in parallel. Bands must ascend and not overlap.
pub(in super::super) fn for_each_block<T: Send>(
    buffer: &mut [T],
    [width, stride]: [usize; 2],
    bands: &[Band],
    cols: usize,
    f: impl Fn(&Band, BlockMut<'_, T>) + Sync,
) {
    let mut end = 0;
    for Band { rows, .. } in bands {
        assert!(end <= rows.start && rows.start <= rows.end, "bands overlap");
        end = rows.end;
    }
    assert!(end * stride <= buffer.len() && width <= stride && cols > 0, "bands reach past the buffer");
    let shared = Shared(buffer.as_mut_ptr());
    let blocks = width.div_ceil(cols);
    (0..bands.len() * blocks).into_par_iter().for_each(|i| {
        let shared = &shared;
        let band = &bands[i / blocks];
        let first = i % blocks * cols;
        let block = BlockMut {
            buffer: shared.0,
            stride,
            rows: band.rows.clone(),
            cols: first..(first + cols).min(width),
            lifetime: PhantomData,
        };
        f(band, block);
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    fn band(rows: Range<usize>) -> Band {
        Band { expert: rows.start, rows }
    }

    #[test]
    fn every_place_of_the_bands_belongs_to_one_block() {
        // 6 rows of 5, 7 apart; rows 2 and 5 belong to no band.
        let mut buffer = vec![0; 6 * 7];
        for_each_block(&mut buffer, [5, 7], &[band(0..2), band(3..5)], 2, |band, mut block| {
            for (i, row) in band.rows.clone().enumerate() {
                let cols = block.cols();
                for (value, col) in block.row(i).iter_mut().zip(cols) {
                    *value += 1 + 100 * band.expert + 10 * row + col;
                }
            }
        });
        for (i, value) in buffer.into_iter().enumerate() {
            let (row, col) = (i / 7, i % 7);
            let inside = row != 2 && row != 5 && col < 5;
            let expert = if row < 2 { 0 } else { 3 };
            assert_eq!(value, if inside { 1 + 100 * expert + 10 * row + col } else { 0 });
        }
    }

    #[test]
    #[should_panic(expected = "bands overlap")]
    fn overlapping_bands_are_refused() {
        for_each_block(&mut [0; 12], [3, 3], &[band(0..2), band(1..3)], 3, |_, _| ());
    }

    #[test]
    #[should_panic(expected = "past the buffer")]
    fn bands_past_the_buffer_are_refused() {
        for_each_block(&mut [0; 12], [3, 3], &[band(0..2), band(2..5)], 3, |_, _| ());
    }
}
