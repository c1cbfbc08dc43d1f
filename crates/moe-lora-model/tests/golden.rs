//! Checkpoints that transformers wrote, and what its code computes with them (`golden/make.py`).
//!
//! The layer is evaluated here from the loaded weights by the formulas of the models, in f64 and in the plainest way.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "helpers of tests")]

mod common;

use common::{Folder, floats, read};
use moe_lora_core::{Activation, GroupScore, LayerShape, LayerWeights, Matrix, RouterWeights, Scoring};
use moe_lora_model::{Checkpoint, Family};
use std::path::{Path, PathBuf};

fn golden(family: Family) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(family.model_type())
}

#[test]
fn layers_compute_what_transformers_computes() {
    for family in Family::ALL {
        let checkpoint = Checkpoint::open(golden(family)).unwrap();
        check(&checkpoint, &golden(family));
    }
}

/// The names and 3-D layouts that the models have in memory (`state_dict`).
#[test]
fn fused_tensors_compute_the_same() {
    for family in Family::ALL {
        let folder = Folder::of(family);
        std::fs::copy(golden(family).join("config.json"), folder.file("config.json")).unwrap();
        std::fs::copy(golden(family).join("fused.safetensors"), folder.file("model.safetensors")).unwrap();
        check(&folder.open(), &golden(family));
    }
}

fn check(checkpoint: &Checkpoint, folder: &Path) {
    let expected = read(&folder.join("expected.safetensors"));
    let [hidden, routing, output] = ["hidden_states", "routing", "output"].map(|n| floats(&expected[n]));
    let LayerShape { num_experts, hidden_size, .. } = checkpoint.shape().layer;
    let layer = checkpoint.layer_weights(1).unwrap();
    let router = checkpoint.router(1).unwrap();
    router.validate(&checkpoint.shape().layer).unwrap();
    for (t, x) in hidden.chunks(hidden_size).enumerate() {
        let weights = route(&router, x);
        close(&weights, &routing[t * num_experts..][..num_experts], &format!("{} routing", checkpoint.family()));
        let mut sum = vec![0.0; hidden_size];
        for (e, weight) in weights.iter().enumerate().filter(|(_, w)| **w != 0.0) {
            sum.iter_mut().zip(expert(&layer, e, x)).for_each(|(sum, y)| *sum += weight * y);
        }
        close(&sum, &output[t * hidden_size..][..hidden_size], &format!("{} output", checkpoint.family()));
    }
}

fn close(found: &[f64], want: &[f32], what: &str) {
    for (found, want) in found.iter().zip(want) {
        let want = f64::from(*want);
        assert!((found - want).abs() <= 1e-5 * want.abs().max(1.0), "{what}: {found} is not {want}");
    }
}

fn multiply(matrix: &Matrix, x: &[f64]) -> Vec<f64> {
    let row = |r| x.iter().enumerate().map(|(c, x)| f64::from(matrix.get(r, c)) * x).sum();
    (0..matrix.rows()).map(row).collect()
}

fn wide(x: &[f32]) -> Vec<f64> {
    x.iter().map(|&x| f64::from(x)).collect()
}

fn sigmoid(x: f64) -> f64 {
    1.0 / (1.0 + (-x).exp())
}

fn expert(layer: &LayerWeights, e: usize, x: &[f32]) -> Vec<f64> {
    let expert = &layer.experts()[e];
    let bias = |values: Option<&Vec<f32>>, y: Vec<f64>| match values {
        Some(values) => y.iter().zip(values).map(|(y, b)| y + f64::from(*b)).collect(),
        None => y,
    };
    let gate = bias(expert.bias.as_ref().map(|b| &b.gate), multiply(&expert.gate, &wide(x)));
    let up = bias(expert.bias.as_ref().map(|b| &b.up), multiply(&expert.up, &wide(x)));
    let join = |(g, u): (f64, f64)| match layer.activation() {
        Activation::Silu => g * sigmoid(g) * u,
        Activation::GeluTanh => {
            let inner = (2.0 / std::f64::consts::PI).sqrt() * (g + 0.044715 * g.powi(3));
            0.5 * g * (1.0 + inner.tanh()) * u
        }
        Activation::ClampedSwiglu { alpha, limit } => {
            let (alpha, limit) = (f64::from(alpha), f64::from(limit));
            let g = g.min(limit);
            (u.clamp(-limit, limit) + 1.0) * g * sigmoid(alpha * g)
        }
        other => panic!("no golden model has {other:?}"),
    };
    let h: Vec<f64> = gate.into_iter().zip(up).map(join).collect();
    bias(expert.bias.as_ref().map(|b| &b.down), multiply(&expert.down, &h))
}

/// A weight for each expert, zero for those not chosen.
fn route(router: &RouterWeights, x: &[f32]) -> Vec<f64> {
    let mut logits = multiply(&router.weight, &wide(x));
    let zeros = vec![0.0; logits.len()];
    logits.iter_mut().zip(router.bias.as_ref().unwrap_or(&zeros)).for_each(|(l, b)| *l += f64::from(*b));
    let total: f64 = logits.iter().map(|l| l.exp()).sum();
    let scores: Vec<f64> = match router.config.scoring {
        Scoring::Softmax => logits.iter().map(|l| l.exp() / total).collect(),
        Scoring::Sigmoid => logits.iter().map(|l| sigmoid(*l)).collect(),
    };
    let bias = router.selection_bias.as_ref().unwrap_or(&zeros);
    let mut choice: Vec<f64> = scores.iter().zip(bias).map(|(s, b)| s + f64::from(*b)).collect();
    if let Some(groups) = router.config.groups {
        let size = choice.len() / groups.num_groups;
        let best = |group: &[f64]| {
            let mut sorted = group.to_vec();
            sorted.sort_by(|a, b| b.total_cmp(a));
            match groups.score {
                GroupScore::Max => sorted[0],
                GroupScore::TopTwoSum => sorted[0] + sorted[1],
            }
        };
        let kept = largest(&choice.chunks(size).map(best).collect::<Vec<_>>(), groups.top_groups);
        let lost = (0..choice.len()).filter(|e| !kept.contains(&(e / size)));
        lost.collect::<Vec<_>>().into_iter().for_each(|e| choice[e] = f64::NEG_INFINITY);
    }
    let chosen = largest(&choice, router.config.top_k);
    let sum: f64 = chosen.iter().map(|&e| scores[e]).sum();
    let divisor = if router.config.renormalize { sum + f64::from(router.config.renormalize_epsilon) } else { 1.0 };
    let mut weights = vec![0.0; scores.len()];
    chosen.iter().for_each(|&e| weights[e] = scores[e] / divisor * f64::from(router.config.routed_scaling_factor));
    weights
}

fn largest(values: &[f64], count: usize) -> Vec<usize> {
    let mut order: Vec<usize> = (0..values.len()).collect();
    order.sort_by(|&a, &b| values[b].total_cmp(&values[a]));
    order.truncate(count);
    order
}
