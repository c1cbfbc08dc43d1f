//! Expert choice against a plain sort in f64, and the cases at its edges.
#![allow(clippy::unwrap_used)] // Helpers of tests are test code too.

use moe_lora_core::{GroupLimit, GroupScore, RouterConfig, Scoring, TopK};
use moe_lora_route::topk;

/// Scores this close may swap places in f32; equal ones may not.
const NEAR: f64 = 1e-7;

fn config(scoring: Scoring, groups: Option<(usize, usize, GroupScore)>, top_k: usize) -> RouterConfig {
    let groups = groups.map(|(num_groups, top_groups, score)| GroupLimit { num_groups, top_groups, score });
    RouterConfig { scoring, groups, ..RouterConfig::softmax(top_k) }
}

fn choose(logits: &[f32], num_experts: usize, config: &RouterConfig, bias: Option<&[f32]>) -> TopK {
    let mut out = TopK { topk_ids: vec![-9; 3], topk_weights: vec![f32::NAN; 7] };
    topk(logits, num_experts, config, bias, &mut out).unwrap();
    out
}

/// Indices by descending score, ties by index; `None` if two scores near the front are too close to call in f32.
fn sorted(scores: &[f64], candidates: Vec<usize>, take: usize) -> Option<Vec<usize>> {
    let mut order = candidates;
    order.sort_by(|&a, &b| scores[b].total_cmp(&scores[a]).then(a.cmp(&b)));
    let front = &order[..order.len().min(take + 1)];
    let close = |pair: &[usize]| (1e-300..NEAR).contains(&(scores[pair[0]] - scores[pair[1]]));
    (!front.windows(2).any(close)).then(|| order[..take].to_vec())
}

/// Ids and weights of one token.
fn oracle(logits: &[f32], config: &RouterConfig, bias: Option<&[f32]>) -> Option<Vec<(usize, f64)>> {
    let exact = logits.iter().map(|&x| f64::from(x));
    let scores: Vec<f64> = match config.scoring {
        Scoring::Sigmoid => exact.map(|x| 1.0 / (1.0 + (-x).exp())).collect(),
        Scoring::Softmax => {
            let sum: f64 = exact.clone().map(f64::exp).sum();
            exact.map(|x| x.exp() / sum).collect()
        }
    };
    let choice: Vec<f64> = (0..scores.len()).map(|e| scores[e] + bias.map_or(0.0, |b| f64::from(b[e]))).collect();
    let mut open: Vec<usize> = (0..scores.len()).collect();
    if let Some(groups) = config.groups {
        let size = scores.len() / groups.num_groups;
        let group_scores: Vec<f64> = choice
            .chunks(size)
            .map(|group| {
                let mut best = group.to_vec();
                best.sort_by(|a, b| b.total_cmp(a));
                best[..if groups.score == GroupScore::Max { 1 } else { 2 }].iter().sum()
            })
            .collect();
        let best = sorted(&group_scores, (0..groups.num_groups).collect(), groups.top_groups)?;
        open.retain(|e| best.contains(&(e / size)));
    }
    let ids = sorted(&choice, open, config.top_k)?;
    let sum: f64 = ids.iter().map(|&e| scores[e]).sum::<f64>() + f64::from(config.renormalize_epsilon);
    let factor = f64::from(config.routed_scaling_factor) / if config.renormalize { sum } else { 1.0 };
    Some(ids.into_iter().map(|e| (e, scores[e] * factor)).collect())
}

#[test]
fn equals_a_sort_in_f64() {
    let mut rng = fastrand::Rng::with_seed(1);
    let (mut compared, mut skipped) = (0, 0);
    let mut kinds = vec![None];
    for score in [GroupScore::Max, GroupScore::TopTwoSum] {
        kinds.extend([(4, 2), (8, 3), (4, 4), (2, 1)].map(|(groups, top)| Some((groups, top, score))));
    }
    for num_experts in [8, 64, 128, 1024] {
        for top_k in [1, 2, 8].map(|k: usize| k.min(num_experts / 4)) {
            for kind in &kinds {
                if kind.is_some_and(|(groups, top, _)| num_experts / groups < 2 || top * num_experts / groups < top_k) {
                    continue;
                }
                for scoring in [Scoring::Softmax, Scoring::Sigmoid] {
                    for case in 0..8 {
                        // Every second case draws from few values, so that ties abound.
                        let logit = |rng: &mut fastrand::Rng| match case % 2 {
                            0 => rng.f32() * 12.0 - 6.0,
                            _ => (rng.i32(-12..12) as f32) / 2.0,
                        };
                        let logits: Vec<f32> = (0..3 * num_experts).map(|_| logit(&mut rng)).collect();
                        let bias: Option<Vec<f32>> = (case & 2 != 0)
                            .then(|| (0..num_experts).map(|_| (rng.i32(-16..16) as f32) / 16.0).collect());
                        let config = RouterConfig {
                            renormalize: case & 4 != 0,
                            renormalize_epsilon: if case & 2 != 0 { 1e-20 } else { 0.0 },
                            routed_scaling_factor: if case & 2 != 0 { 2.5 } else { 1.0 },
                            ..config(scoring, *kind, top_k)
                        };
                        let out = choose(&logits, num_experts, &config, bias.as_deref());
                        assert_eq!((out.topk_ids.len(), out.topk_weights.len()), (3 * top_k, 3 * top_k));
                        for (token, logits) in logits.chunks(num_experts).enumerate() {
                            let Some(want) = oracle(logits, &config, bias.as_deref()) else {
                                skipped += 1;
                                continue;
                            };
                            compared += 1;
                            for (j, (id, weight)) in want.into_iter().enumerate() {
                                let pair = token * top_k + j;
                                assert_eq!(out.topk_ids[pair], id as i32, "{config:?} token {token} place {j}");
                                let error = f64::from(out.topk_weights[pair]) / weight - 1.0;
                                assert!(error.abs() < 2e-6, "{config:?}: {} {weight}", out.topk_weights[pair]);
                            }
                        }
                    }
                }
            }
        }
    }
    assert!(compared > 4000 && skipped * 100 < compared, "{compared} compared, {skipped} too close to call");
}

#[test]
fn a_token_does_not_depend_on_its_batch() {
    let mut rng = fastrand::Rng::with_seed(2);
    let logits: Vec<f32> = (0..100 * 16).map(|_| rng.f32() * 8.0 - 4.0).collect();
    let config = config(Scoring::Softmax, Some((4, 2, GroupScore::Max)), 3);
    let all = choose(&logits, 16, &config, None);
    for (token, logits) in logits.chunks(16).enumerate() {
        let one = choose(logits, 16, &config, None);
        assert_eq!(one.topk_ids, all.topk_ids[token * 3..][..3]);
        assert_eq!(one.topk_weights, all.topk_weights[token * 3..][..3]);
    }
    assert_eq!(choose(&[], 16, &config, None), TopK::default());
}

#[test]
fn logits_count_where_their_scores_round_to_one_value() {
    // gpt-oss compares logits: all scores but the first underflow to 0, the order is still that of the logits.
    let out = choose(&[1.0, 4.0, 1000.0, 2.0, 3.0, 4.0], 6, &RouterConfig::softmax(4), None);
    assert_eq!(out.topk_ids, [2, 1, 5, 4]);
    assert_eq!(out.topk_weights, [1.0, 0.0, 0.0, 0.0]);
    let out = choose(&[30.0, 40.0, 50.0], 3, &config(Scoring::Sigmoid, None, 2), None);
    assert_eq!((out.topk_ids, out.topk_weights), (vec![2, 1], vec![0.5, 0.5]));
    let out = choose(&[0.0, -0.0, 0.0, -0.0], 4, &RouterConfig::softmax(3), None);
    assert_eq!(out.topk_ids, [0, 1, 2], "the two zeros are equal");
}

#[test]
fn masked_groups_are_closed_even_to_negative_and_vanishing_scores() {
    let bias = [-2.0, -3.0, -4.0, -5.0, -1.0, -1.0, -9.0, -9.0];
    let v3 = config(Scoring::Sigmoid, Some((4, 2, GroupScore::TopTwoSum)), 4);
    let out = choose(&[0.0; 8], 8, &v3, Some(&bias));
    assert_eq!(out.topk_ids, [4, 5, 0, 1], "masked experts would win if they counted as 0");
    let v2 = config(Scoring::Softmax, Some((4, 1, GroupScore::Max)), 2);
    let out = choose(&[-900.0, -900.0, 0.0, 0.0, 200.0, -900.0, 0.0, 0.0], 8, &v2, None);
    assert_eq!(out.topk_ids, [4, 5]);
    assert_eq!(out.topk_weights, [1.0, 0.0]);
}

#[test]
fn bad_input_is_named() {
    let refused = |logits: &[f32], config: RouterConfig, bias: Option<&[f32]>, text: &str| {
        let mut out = TopK { topk_ids: vec![1], topk_weights: vec![1.0] };
        let error = topk(logits, 4, &config, bias, &mut out).unwrap_err().to_string();
        assert!(error.contains(text), "{error}");
        assert_eq!(out, TopK::default(), "nothing half-done");
    };
    let two = RouterConfig::softmax(2);
    for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        let mut logits = [0.0; 12];
        logits[10] = bad;
        refused(&logits, two, None, &format!("router logits: found {bad} for token 2, expert 2"));
        refused(&[0.0; 4], two, Some(&[0.0, bad, 0.0, 0.0]), &format!("selection bias: found {bad} for expert 1"));
        refused(&[0.0; 4], RouterConfig { renormalize_epsilon: bad, ..two }, None, "renormalize_epsilon");
    }
    refused(&[0.0; 6], two, None, "router logits: found 6 numbers, expected [T, 4]");
    refused(&[0.0; 4], two, Some(&[0.0; 3]), "selection bias");
    refused(&[0.0; 4], RouterConfig::softmax(5), None, "top_k");
    let mut out = TopK::default();
    assert!(topk(&[], 0, &two, None, &mut out).is_err());

    // 70 tokens, of which the last two cannot be renormalised: the first of them is named.
    let mut logits = [0.0; 70 * 4];
    logits[68 * 4..].fill(-200.0);
    let sigmoid = config(Scoring::Sigmoid, None, 2);
    refused(&logits, sigmoid, None, "token 68 that sum to 0");
    let out = choose(&logits, 4, &RouterConfig { renormalize_epsilon: 1e-20, ..sigmoid }, None);
    assert_eq!(out.topk_weights[69 * 2..], [0.0, 0.0]);
}
