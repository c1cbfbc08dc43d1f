//! Moves numbers into canonical order. Every function writes runs of a rank or longer.

/// `[rows, rank, experts]` to `[experts, rows, rank]`.
pub(crate) fn experts_first<T: Copy>(values: &[T], rows: usize, rank: usize, experts: usize) -> Vec<T> {
    let mut out = values.to_vec();
    for (row, from) in values.chunks_exact(rank * experts).enumerate() {
        for (e, to) in out.chunks_exact_mut(rows * rank).enumerate() {
            let to = to.iter_mut().skip(row * rank).take(rank);
            for (to, from) in to.zip(from.iter().skip(e).step_by(experts)) {
                *to = *from;
            }
        }
    }
    out
}

/// `[n, rows, cols]` to `[n, cols, rows]`.
pub(crate) fn transpose_each<T: Copy>(values: &[T], rows: usize, cols: usize) -> Vec<T> {
    let mut out = Vec::with_capacity(values.len());
    for matrix in values.chunks_exact(rows * cols) {
        for col in 0..cols {
            out.extend(matrix.iter().skip(col).step_by(cols));
        }
    }
    out
}

/// `[n, rows, cols]` with rows gate, up, gate, up to rows gate, gate, up, up.
pub(crate) fn deinterleave_each<T: Copy>(values: &[T], rows: usize, cols: usize) -> Vec<T> {
    let mut out = Vec::with_capacity(values.len());
    for matrix in values.chunks_exact(rows * cols) {
        for first in [0, 1] {
            for row in matrix.chunks_exact(cols).skip(first).step_by(2) {
                out.extend_from_slice(row);
            }
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn index_by_index() {
        let (rows, rank, experts) = (5, 3, 4);
        let values: Vec<usize> = (0..rows * rank * experts).collect();
        let out = experts_first(&values, rows, rank, experts);
        let turned = transpose_each(&values, rank, experts);
        for o in 0..rows {
            for k in 0..rank {
                for e in 0..experts {
                    let from = values[(o * rank + k) * experts + e];
                    assert_eq!(out[(e * rows + o) * rank + k], from);
                    assert_eq!(turned[(o * experts + e) * rank + k], from);
                }
            }
        }
        assert_eq!(deinterleave_each(&[0, 1, 2, 3, 4, 5, 6, 7], 4, 1), [0, 2, 1, 3, 4, 6, 5, 7]);
        assert_eq!(deinterleave_each(&[0, 1, 2, 3, 4, 5, 6, 7], 4, 2), [0, 1, 4, 5, 2, 3, 6, 7]);
    }
}
