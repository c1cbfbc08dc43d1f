//! The choice of the next token.

use fastrand::Rng;
use std::cmp::Ordering;

/// How a request's tokens are chosen.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Sampling {
    /// 0 takes the best token always; else logits are divided by it before one is drawn.
    pub temperature: f32,
    /// Tokens are drawn among the likeliest whose probabilities sum to this; 1 is all.
    pub top_p: f32,
    /// Equal seeds give equal texts.
    pub seed: u64,
}

impl Default for Sampling {
    /// The best token always.
    fn default() -> Self {
        Self { temperature: 0.0, top_p: 1.0, seed: 0 }
    }
}

impl Sampling {
    pub(crate) fn is_valid(&self) -> bool {
        self.temperature.is_finite() && self.temperature >= 0.0 && self.top_p > 0.0 && self.top_p <= 1.0
    }

    /// Chooses from finite logits.
    pub(crate) fn choose(&self, logits: &[f32], rng: &mut Rng) -> u32 {
        if self.temperature == 0.0 {
            return best(logits) as u32;
        }
        let highest = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let weight = |logit: f32| f64::from((logit - highest) / self.temperature).exp();
        let all: f64 = logits.iter().map(|&l| weight(l)).sum();
        if self.top_p >= 1.0 {
            return draw(0..logits.len(), |i| weight(logits[i]), all, rng) as u32;
        }
        let (kept, sum) = nucleus(logits, weight, f64::from(self.top_p) * all);
        draw(kept.into_iter(), |i| weight(logits[i]), sum, rng) as u32
    }
}

/// The first of the largest.
fn best(logits: &[f32]) -> usize {
    (1..logits.len()).fold(0, |best, i| if logits[i] > logits[best] { i } else { best })
}

/// The fewest best tokens whose weights reach `enough`, best first, and their sum.
fn nucleus(logits: &[f32], weight: impl Fn(f32) -> f64, enough: f64) -> (Vec<usize>, f64) {
    let better = |a: &usize, b: &usize| logits[*b].partial_cmp(&logits[*a]).unwrap_or(Ordering::Equal).then(a.cmp(b));
    let mut order: Vec<usize> = (0..logits.len()).collect();
    // Sorting all of a large vocabulary would cost more than the rest: a few of the best mostly do.
    let mut most = 64.min(order.len());
    loop {
        if most < order.len() {
            order.select_nth_unstable_by(most, better);
        }
        order[..most].sort_unstable_by(better);
        let mut sum = 0.0;
        for (n, &i) in order[..most].iter().enumerate() {
            sum += weight(logits[i]);
            if sum >= enough || n + 1 == order.len() {
                order.truncate(n + 1);
                return (order, sum);
            }
        }
        most = (8 * most).min(order.len());
    }
}

/// One of the candidates, by weight.
fn draw(candidates: impl Iterator<Item = usize>, weight: impl Fn(usize) -> f64, sum: f64, rng: &mut Rng) -> usize {
    let mut left = rng.f64() * sum;
    let mut last = 0;
    for i in candidates {
        last = i;
        left -= weight(i);
        if left < 0.0 {
            break;
        }
    }
    last
}

#[cfg(test)]
mod tests {
    use super::*;

    fn counts(sampling: Sampling, logits: &[f32], n: usize) -> Vec<usize> {
        let mut rng = Rng::with_seed(5);
        let mut counts = vec![0; logits.len()];
        (0..n).for_each(|_| counts[sampling.choose(logits, &mut rng) as usize] += 1);
        counts
    }

    #[test]
    fn without_temperature_the_first_of_the_best_wins() {
        assert_eq!(counts(Sampling::default(), &[1.0, 3.0, 3.0, 2.0], 10), [0, 10, 0, 0]);
    }

    #[test]
    fn tokens_come_as_often_as_they_are_likely() {
        // Probabilities 1/2, 1/4, 1/8, 1/8 at temperature 2.
        let logits: Vec<f32> = [0.5_f32, 0.25, 0.125, 0.125].iter().map(|p| 2.0 * p.ln()).collect();
        let all = Sampling { temperature: 2.0, ..Sampling::default() };
        let found = counts(all, &logits, 8000);
        for (found, want) in found.iter().zip([4000, 2000, 1000, 1000]) {
            assert!(found.abs_diff(want) < 150, "{found} where {want} were due");
        }
        let found = counts(Sampling { top_p: 0.7, ..all }, &logits, 3000);
        assert!(found[0].abs_diff(2000) < 150 && found[1] + found[0] == 3000, "{found:?}");
        assert_eq!(counts(Sampling { top_p: 0.4, ..all }, &logits, 10), [10, 0, 0, 0]);
    }

    #[test]
    fn a_wide_nucleus_is_found() {
        // 1000 equal tokens: half of the probability needs 500 of them.
        let found = counts(Sampling { temperature: 1.0, top_p: 0.5, seed: 0 }, &[0.0; 1000], 20_000);
        assert!(found[..500].iter().all(|&n| n > 0) && found[501..].iter().all(|&n| n == 0));
    }

    #[test]
    fn odd_settings_are_told() {
        let ok = |temperature, top_p| Sampling { temperature, top_p, seed: 0 }.is_valid();
        assert!(ok(0.0, 1.0) && ok(1.5, 0.1));
        assert!(!ok(-1.0, 1.0) && !ok(f32::NAN, 1.0) && !ok(1.0, 0.0) && !ok(1.0, 1.1) && !ok(1.0, f32::NAN));
    }
}
