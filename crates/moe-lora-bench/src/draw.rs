//! Batches: who goes to which expert, with which adapter.

use crate::AdapterSet;
use fastrand::Rng;
use moe_lora::LayerShape;

/// The experts of every token.
#[derive(Debug, Clone, PartialEq)]
pub struct Routes {
    /// `[T, k]`.
    pub topk_ids: Vec<i32>,
    /// `[T, k]`, summing to 1 for each token.
    pub topk_weights: Vec<f32>,
}

impl Routes {
    /// The top k of a softmax over normal logits, to which `skew * e / (E - 1)` is added: as uneven as real routers are at
    /// 1.5, even at 0.
    #[must_use]
    pub fn draw(shape: &LayerShape, tokens: usize, skew: f32, seed: u64) -> Self {
        let mut rng = Rng::with_seed(seed);
        let (experts, top_k) = (shape.all_experts(), shape.top_k);
        let slope = skew / experts.saturating_sub(1).max(1) as f32;
        let mut routes = Self { topk_ids: Vec::new(), topk_weights: Vec::new() };
        let mut logits: Vec<(f32, i32)> = Vec::new();
        for _ in 0..tokens {
            logits.clear();
            logits.extend((0..experts).map(|e| (normal(&mut rng) + slope * e as f32, e as i32)));
            logits.sort_unstable_by(|a, b| b.0.total_cmp(&a.0));
            // A softmax over all experts, divided by the sum of the chosen ones, is a softmax over those.
            let chosen = &logits[..top_k];
            let exponentials: Vec<f32> = chosen.iter().map(|(logit, _)| (logit - chosen[0].0).exp()).collect();
            let sum: f32 = exponentials.iter().sum();
            routes.topk_ids.extend(chosen.iter().map(|(_, expert)| expert));
            routes.topk_weights.extend(exponentials.iter().map(|x| x / sum));
        }
        routes
    }
}

/// The adapter of every token, -1 for none.
#[must_use]
pub fn draw_slots(adapters: &AdapterSet, tokens: usize, seed: u64) -> Vec<i32> {
    let mut rng = Rng::with_seed(seed);
    let count = adapters.ranks.len() as i32;
    let mut slot = || if count == 0 || rng.f64() < adapters.base_share { -1 } else { rng.i32(0..count) };
    (0..tokens).map(|_| slot()).collect()
}

/// `count` tokens spread over a batch, its first and last among them.
#[must_use]
pub fn spread(tokens: usize, count: usize) -> Vec<usize> {
    match count.min(tokens) {
        0 => Vec::new(),
        1 => vec![0],
        count => (0..count).map(|i| i * (tokens - 1) / (count - 1)).collect(),
    }
}

fn normal(rng: &mut Rng) -> f32 {
    let radius = (-2.0 * (1.0 - rng.f32()).ln()).sqrt();
    radius * (std::f32::consts::TAU * rng.f32()).cos()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn routes_are_distinct_weighed_and_skewed() {
        let shape = LayerShape::new(16, 4, 8, 8).unwrap();
        let routes = Routes::draw(&shape, 2000, 1.5, 1);
        for (ids, weights) in routes.topk_ids.chunks(4).zip(routes.topk_weights.chunks(4)) {
            assert!((0..4).all(|i| !ids[..i].contains(&ids[i]) && (0..16).contains(&ids[i])), "{ids:?}");
            assert!(weights.windows(2).all(|w| w[0] >= w[1]) && (weights.iter().sum::<f32>() - 1.0).abs() < 1e-5);
        }
        let count = |expert| routes.topk_ids.iter().filter(|&&e| e == expert).count();
        assert!(count(15) > 2 * count(0), "{} {}", count(15), count(0));
    }

    #[test]
    fn slots_and_spread() {
        let slots = draw_slots(&AdapterSet::uniform(3, 16, 0.25), 4000, 2);
        let base = slots.iter().filter(|&&s| s == -1).count();
        assert!((800..1200).contains(&base) && slots.iter().all(|s| (-1..3).contains(s)));
        assert!(draw_slots(&AdapterSet::uniform(0, 16, 0.0), 9, 2).iter().all(|&s| s == -1));
        assert_eq!(spread(8192, 4), [0, 2730, 5460, 8191]);
        assert_eq!((spread(1, 4), spread(2, 4)), (vec![0], vec![0, 1]));
    }
}
