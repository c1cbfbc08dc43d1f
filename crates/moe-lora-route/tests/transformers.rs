//! Fixed results of the router classes of Hugging Face `transformers` 5.23.0 with torch 2.15.0, in f32: four tokens of
//! width 4, eight experts, three of them chosen. Within a token sorted by expert, as torch leaves the order open.
#![allow(clippy::unwrap_used)] // Helpers of tests are test code too.

use moe_lora_core::{GroupLimit, GroupScore, Matrix, RouterConfig, RouterWeights, Scoring, TopK};
use moe_lora_route::route;

#[rustfmt::skip]
const WEIGHT: [f32; 32] = [
    0.578125, -0.796875, 1.15625, -1.625, -1.421875, -1.25, 0.921875, -1.546875, -0.296875, -1.703125, -1.3125, 1.46875,
    1.34375, -1.453125, -0.078125, -1.28125, 1.390625, -1.53125, -1.015625, -0.21875, -1.515625, 1.171875, -1.609375,
    -0.234375, -1.640625, -0.9375, 0.3125, 1.34375, -0.859375, -1.0625, 0.453125, -0.5625,
];
const HIDDEN: [f32; 16] = [
    -1.1875, -0.5, 0.96875, -1.234375, -1.5, -1.53125, -0.359375, 1.96875, 1.40625, 0.5, 1.71875, 1.625, 0.890625,
    0.390625, -0.015625, -0.5625,
];
const BIAS: [f32; 8] = [-0.0625, -1.359375, 0.390625, 1.953125, 0.734375, 1.578125, 0.296875, -1.421875];
const SELECTION_BIAS: [f32; 8] = [-0.390625, 0.390625, 0.203125, -0.296875, 0.046875, -0.328125, 0.34375, 0.203125];

fn check(config: RouterConfig, bias: Option<&[f32]>, selection: Option<&[f32]>, ids: [i32; 12], weights: [f64; 12]) {
    let router = RouterWeights {
        weight: Matrix::from_vec(WEIGHT.to_vec(), 8, 4).unwrap(),
        bias: bias.map(<[f32]>::to_vec),
        selection_bias: selection.map(<[f32]>::to_vec),
        config,
    };
    let mut out = TopK::default();
    route(&router, &HIDDEN, &mut out).unwrap();
    for token in 0..4 {
        let mut found: Vec<(i32, f32)> =
            (token * 3..token * 3 + 3).map(|p| (out.topk_ids[p], out.topk_weights[p])).collect();
        found.sort_by_key(|f| f.0);
        for (j, (id, weight)) in found.into_iter().enumerate() {
            let want = weights[token * 3 + j];
            assert_eq!(id, ids[token * 3 + j], "{config:?} token {token}");
            assert!(
                (f64::from(weight) / want - 1.0).abs() < 1e-6,
                "{config:?} token {token} expert {id}: {weight} {want}"
            );
        }
    }
}

fn groups(num_groups: usize, top_groups: usize, score: GroupScore) -> Option<GroupLimit> {
    Some(GroupLimit { num_groups, top_groups, score })
}

#[test]
fn mixtral_and_qwen3_moe() {
    #[rustfmt::skip]
    check(
        RouterConfig::softmax(3), None, None,
        [0, 1, 7, 2, 6, 7, 0, 4, 6, 0, 3, 4],
        [
            0.0860869437, 0.840026915, 0.073886171, 0.494622231, 0.501186311, 0.00419143168, 0.368727714, 0.18823576,
            0.443036526, 0.332024068, 0.426952332, 0.24102363,
        ],
    );
}

#[test]
fn olmoe_without_renormalisation() {
    #[rustfmt::skip]
    check(
        RouterConfig { renormalize: false, ..RouterConfig::softmax(3) }, None, None,
        [0, 1, 7, 2, 6, 7, 0, 4, 6, 0, 3, 4],
        [
            0.0835273564, 0.815050721, 0.0716893449, 0.49258253, 0.49911952, 0.00417414727, 0.262853324, 0.134186804,
            0.315825522, 0.283275664, 0.364266366, 0.205636084,
        ],
    );
}

#[test]
fn gpt_oss_with_a_logit_bias() {
    #[rustfmt::skip]
    check(
        RouterConfig::softmax(3), Some(&BIAS), None,
        [0, 1, 3, 2, 5, 6, 3, 4, 6, 0, 3, 4],
        [
            0.222305775, 0.593035936, 0.184658274, 0.517513037, 0.00503280805, 0.477454245, 0.538064718, 0.183335662,
            0.27859962, 0.081554085, 0.787100732, 0.131345183,
        ],
    );
}

#[test]
fn deepseek_v2_greedy_and_group_limited() {
    let greedy = RouterConfig { renormalize: false, routed_scaling_factor: 1.5, ..RouterConfig::softmax(3) };
    #[rustfmt::skip]
    check(
        greedy, None, None,
        [0, 1, 7, 2, 6, 7, 0, 4, 6, 0, 3, 4],
        [
            0.125291035, 1.22257614, 0.107534021, 0.73887378, 0.74867928, 0.00626122113, 0.394279987, 0.201280206,
            0.473738283, 0.424913496, 0.546399534, 0.308454126,
        ],
    );
    #[rustfmt::skip]
    check(
        RouterConfig { groups: groups(4, 2, GroupScore::Max), ..greedy }, None, None,
        [0, 1, 7, 2, 6, 7, 0, 6, 7, 0, 1, 3],
        [
            0.125291035, 1.22257614, 0.107534021, 0.73887378, 0.74867928, 0.00626122113, 0.394279987, 0.473738283,
            0.0767712966, 0.424913496, 0.0575900823, 0.546399534,
        ],
    );
}

#[test]
fn deepseek_v3_also_with_negative_choice_scores() {
    let config = RouterConfig {
        scoring: Scoring::Sigmoid,
        renormalize_epsilon: 1e-20,
        routed_scaling_factor: 2.5,
        groups: groups(4, 2, GroupScore::TopTwoSum),
        ..RouterConfig::softmax(3)
    };
    let negative = SELECTION_BIAS.map(|b| b - 1.5);
    for bias in [SELECTION_BIAS, negative] {
        #[rustfmt::skip]
        check(
            config, None, Some(&bias),
            [1, 6, 7, 2, 6, 7, 1, 6, 7, 1, 6, 7],
            [
                0.929678321, 0.694791198, 0.875530362, 0.880372405, 0.88039124, 0.739236534, 0.107504643, 1.87871981,
                0.513775468, 1.10543239, 0.267141312, 1.12742651,
            ],
        );
    }
    #[rustfmt::skip]
    check(
        RouterConfig { renormalize: false, groups: groups(2, 1, GroupScore::TopTwoSum), ..config },
        None, Some(&SELECTION_BIAS),
        [4, 6, 7, 4, 6, 7, 4, 6, 7, 4, 6, 7],
        [
            0.420090556, 1.85722089, 2.34034801, 1.3703233, 2.4959743, 2.09579015, 0.716920257, 1.21552384, 0.332410604,
            1.71382141, 0.174764901, 0.737566888,
        ],
    );
}
