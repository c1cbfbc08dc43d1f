//! The small functions between the projections.

use moe_lora_core::Element;
use rayon::prelude::*;

/// `out = weight * x / sqrt(mean(x^2) + eps)`, row by row of `weight.len()`.
pub(crate) fn rms_norm<X: Element>(x: &[f32], weight: &[f32], eps: f32, out: &mut [X]) {
    let width = weight.len();
    out.par_chunks_mut(width).zip(x.par_chunks(width)).for_each(|(out, x)| {
        let factor = rms_factor(x, eps);
        for ((out, x), weight) in out.iter_mut().zip(x).zip(weight) {
            *out = X::from_f32(x * factor * weight);
        }
    });
}

/// The same for one vector in place.
pub(crate) fn rms_norm_one(x: &mut [f32], weight: &[f32], eps: f32) {
    let factor = rms_factor(x, eps);
    x.iter_mut().zip(weight).for_each(|(x, weight)| *x *= factor * weight);
}

fn rms_factor(x: &[f32], eps: f32) -> f32 {
    const LANES: usize = 16;
    let (blocks, rest) = x.as_chunks::<LANES>();
    let mut sums = [0.0_f32; LANES];
    for block in blocks {
        for (sum, x) in sums.iter_mut().zip(block) {
            *sum += x * x;
        }
    }
    let sum = sums.iter().sum::<f32>() + rest.iter().map(|x| x * x).sum::<f32>();
    // Squares beyond f32 would give 0 and hide that the vector is out of range.
    if sum.is_finite() { 1.0 / (sum / x.len() as f32 + eps).sqrt() } else { f32::NAN }
}

/// Turns the first `end` scores into weights that sum to one, and the others into zeros. The scores must be
/// multiplied by the attention's scale already.
pub(crate) fn softmax(scores: &mut [f32], end: usize) {
    let (seen, hidden) = scores.split_at_mut(end);
    hidden.fill(0.0);
    let highest = seen.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let mut sum = 0.0;
    for score in seen.iter_mut() {
        *score = (*score - highest).exp();
        sum += *score;
    }
    let factor = 1.0 / sum;
    seen.iter_mut().for_each(|score| *score *= factor);
}

/// Cosines and sines of the rotations of one position, `[head_dim / 2]` pairs.
#[derive(Debug, Clone)]
pub(crate) struct Rotations {
    frequencies: Vec<f32>,
}

impl Rotations {
    pub(crate) fn new(head_dim: usize, theta: f32, factor: f32) -> Self {
        let frequency = |i: usize| {
            let exponent = 2.0 * i as f64 / head_dim as f64;
            ((1.0 / f64::from(theta).powf(exponent)) as f32) / factor
        };
        Self { frequencies: (0..head_dim / 2).map(frequency).collect() }
    }

    /// Appends cosine and sine of each frequency at a position.
    pub(crate) fn at(&self, position: usize, out: &mut Vec<[f32; 2]>) {
        out.extend(self.frequencies.iter().map(|f| {
            let (sin, cos) = (position as f32 * f).sin_cos();
            [cos, sin]
        }));
    }
}

/// Rotates one head: number `i` of the first half with number `i` of the second.
pub(crate) fn rotate(head: &mut [f32], rotations: &[[f32; 2]]) {
    let (first, second) = head.split_at_mut(rotations.len());
    for ((a, b), [cos, sin]) in first.iter_mut().zip(second).zip(rotations) {
        (*a, *b) = (*a * cos - *b * sin, *b * cos + *a * sin);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn softmax_hides_what_comes_later() {
        let mut scores = [1000.0, 1000.0, 998.0, f32::NAN];
        softmax(&mut scores, 3);
        let e = (-2.0_f32).exp();
        assert!((scores[0] - 1.0 / (2.0 + e)).abs() < 1e-6 && (scores[2] - e / (2.0 + e)).abs() < 1e-6);
        assert_eq!(scores[3], 0.0);
    }

    #[test]
    fn rotations_keep_lengths_and_turn_by_the_position() {
        let rotations = Rotations::new(4, 100.0, 1.0);
        let mut at = Vec::new();
        rotations.at(3, &mut at);
        let mut head = [1.0, 2.0, 0.0, -1.0];
        rotate(&mut head, &at);
        // Frequencies 1 and 1/10.
        assert!((head[0] - 3_f32.cos()).abs() < 1e-6 && (head[2] - 3_f32.sin()).abs() < 1e-6);
        assert!((head[1] - (2.0 * 0.3_f32.cos() + 0.3_f32.sin())).abs() < 1e-6);
        assert!((head.iter().map(|x| x * x).sum::<f32>() - 6.0).abs() < 1e-5);
    }

    #[test]
    fn norms_have_the_mean_square_of_their_weights() {
        let x: Vec<f32> = (0..40).map(|i| i as f32 - 7.5).collect();
        let weight: Vec<f32> = (0..20).map(|i| 1.0 + 0.1 * i as f32).collect();
        let mut out = vec![0.0_f32; 40];
        rms_norm(&x, &weight, 1e-6, &mut out);
        for (x, out) in x.chunks(20).zip(out.chunks(20)) {
            let mean = x.iter().map(|x| f64::from(x * x)).sum::<f64>() / 20.0;
            for ((x, out), weight) in x.iter().zip(out).zip(&weight) {
                let want = f64::from(*x) / (mean + 1e-6).sqrt() * f64::from(*weight);
                assert!((f64::from(*out) - want).abs() < 1e-5 * want.abs().max(1.0));
            }
            let mut one = x.to_vec();
            rms_norm_one(&mut one, &weight, 1e-6);
            assert!(one.iter().zip(out).all(|(a, b)| (a - b).abs() < 1e-6));
        }
        let mut large = [1e30, 1.0];
        rms_norm_one(&mut large, &[1.0; 2], 1e-6);
        assert!(large.iter().all(|x| x.is_nan()));
    }
}
