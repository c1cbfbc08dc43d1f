//! How far a result is from the truth.

/// `|found - truth| / |truth|` in the Frobenius norm; 0 if both are zero, infinite for NaN or infinite results.
///
/// # Panics
/// If the lengths differ.
#[must_use]
pub fn relative_error(found: &[f64], truth: &[f64]) -> f64 {
    assert_eq!(found.len(), truth.len(), "results of different length");
    let distance: f64 = found.iter().zip(truth).map(|(f, t)| (f - t).powi(2)).sum();
    let norm: f64 = truth.iter().map(|t| t.powi(2)).sum();
    ratio(distance.sqrt(), norm.sqrt())
}

/// The largest [`relative_error`] of a single row of `width` values.
///
/// # Panics
/// If the lengths differ or are not multiples of `width`.
#[must_use]
pub fn worst_row_error(found: &[f64], truth: &[f64], width: usize) -> f64 {
    assert!(found.len() == truth.len() && found.len().is_multiple_of(width), "results of different shape");
    found.chunks_exact(width).zip(truth.chunks_exact(width)).map(|(f, t)| relative_error(f, t)).fold(0.0, f64::max)
}

/// [`relative_error`] of the change that adapters make: both results minus their base-only results.
///
/// # Panics
/// If the lengths differ.
#[must_use]
pub fn delta_error(found: &[f64], found_base: &[f64], truth: &[f64], truth_base: &[f64]) -> f64 {
    relative_error(&subtract(found, found_base), &subtract(truth, truth_base))
}

/// `|truth - base| / |truth|`: how much of an output the adapters make up.
///
/// # Panics
/// If the lengths differ.
#[must_use]
pub fn delta_share(truth: &[f64], base: &[f64]) -> f64 {
    relative_error(base, truth)
}

/// The share of values within `ulps` units in the last place of a format with `mantissa_bits` stored bits (bf16: 7), where
/// the unit is taken at `max(|reference|, rms of the row)`: a bound for results compared with a rounding-aware twin.
///
/// # Panics
/// If the lengths differ or are not multiples of `width`.
#[must_use]
pub fn share_within_ulps(found: &[f64], reference: &[f64], width: usize, mantissa_bits: i32, ulps: f64) -> f64 {
    assert!(found.len() == reference.len() && found.len().is_multiple_of(width), "results of different shape");
    if found.is_empty() {
        return 1.0;
    }
    let mut within = 0_usize;
    for (found, reference) in found.chunks_exact(width).zip(reference.chunks_exact(width)) {
        let rms = (reference.iter().map(|r| r * r).sum::<f64>() / width as f64).sqrt();
        for (f, r) in found.iter().zip(reference) {
            let unit = 2_f64.powi(r.abs().max(rms).max(f64::MIN_POSITIVE).log2().floor() as i32 - mantissa_bits);
            within += usize::from((f - r).abs() <= ulps * unit);
        }
    }
    within as f64 / found.len() as f64
}

/// Whether 99.9 % of all values are [`within`](share_within_ulps) 2 units of the twin; of few values one may lie further off,
/// where a rounding in between fell to the other side.
///
/// # Panics
/// If the lengths differ or are not multiples of `width`.
#[must_use]
pub fn is_near_twin(found: &[f64], twin: &[f64], width: usize, mantissa_bits: i32) -> bool {
    let outside = (1.0 - share_within_ulps(found, twin, width, mantissa_bits, 2.0)) * found.len() as f64;
    outside <= 1.0_f64.max(found.len() as f64 / 1000.0) + 1e-6
}

fn subtract(a: &[f64], b: &[f64]) -> Vec<f64> {
    assert_eq!(a.len(), b.len(), "results of different length");
    a.iter().zip(b).map(|(a, b)| a - b).collect()
}

fn ratio(distance: f64, norm: f64) -> f64 {
    if !distance.is_finite() {
        return f64::INFINITY;
    }
    if distance == 0.0 { 0.0 } else { distance / norm }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_nan_is_infinitely_wrong() {
        assert_eq!(relative_error(&[1.0, f64::NAN], &[1.0, 2.0]), f64::INFINITY);
        assert_eq!(worst_row_error(&[1.0, f64::NAN, 3.0, 4.0], &[1.0, 2.0, 3.0, 4.0], 2), f64::INFINITY);
        assert_eq!(share_within_ulps(&[f64::NAN, 1.0], &[1.0, 1.0], 2, 7, 2.0), 0.5);
        assert_eq!(relative_error(&[1.0], &[0.0]), f64::INFINITY);
    }

    #[test]
    fn errors_are_relative_to_the_truth() {
        assert_eq!(relative_error(&[3.0, 4.0], &[3.0, 4.0]), 0.0);
        assert!((relative_error(&[3.0, 5.0], &[3.0, 4.0]) - 0.2).abs() < 1e-15);
        assert!((worst_row_error(&[3.0, 5.0, 100.0, 0.0], &[3.0, 4.0, 100.0, 0.0], 2) - 0.2).abs() < 1e-15);
        assert!((delta_error(&[2.0], &[1.0], &[3.0], &[1.0]) - 0.5).abs() < 1e-15);
        assert_eq!(share_within_ulps(&[1.0 + 2.0 / 128.0], &[1.0], 1, 7, 2.0), 1.0);
        assert_eq!(share_within_ulps(&[1.0 + 2.1 / 128.0], &[1.0], 1, 7, 2.0), 0.0);
        assert!(is_near_twin(&[1.0, 1.1], &[1.0; 2], 2, 7) && !is_near_twin(&[1.1, 1.1], &[1.0; 2], 2, 7));
    }
}
