//! Router logits against f64, in every mix of formats and at sizes that fill no block.
#![allow(clippy::unwrap_used)] // Helpers of tests are test code too.

use half::{bf16, f16};
use moe_lora_core::{Element, Matrix, RouterConfig, RouterWeights, TopK};
use moe_lora_route::{route, router_logits, topk};

fn signed<T: Element>(rng: &mut fastrand::Rng, count: usize) -> Vec<T> {
    (0..count).map(|_| T::from_f32(rng.f32() * 2.0 - 1.0)).collect()
}

fn router<W: Element>(rng: &mut fastrand::Rng, experts: usize, width: usize, bias: bool) -> RouterWeights {
    RouterWeights {
        weight: Matrix::from_vec(signed::<W>(rng, experts * width), experts, width).unwrap(),
        bias: bias.then(|| signed(rng, experts)),
        selection_bias: None,
        config: RouterConfig::softmax(1),
    }
}

fn check<X: Element, W: Element>(rng: &mut fastrand::Rng, tokens: usize, experts: usize, width: usize) {
    let router = router::<W>(rng, experts, width, experts.is_multiple_of(2));
    let hidden = signed::<X>(rng, tokens * width);
    let weight: Vec<f32> = router.weight.to_vec();
    let mut logits = vec![f32::NAN; 5];
    router_logits(&router, &hidden, &mut logits).unwrap();
    assert_eq!(logits.len(), tokens * experts);
    for (row, logits) in hidden.chunks(width).zip(logits.chunks(experts)) {
        for (e, (weight, &logit)) in weight.chunks(width).zip(logits).enumerate() {
            let bias = router.bias.as_ref().map_or(0.0, |b| f64::from(b[e]));
            let products = || row.iter().zip(weight).map(|(x, w)| f64::from(x.to_f32()) * f64::from(*w));
            let (want, size) = (products().sum::<f64>() + bias, products().map(f64::abs).sum::<f64>() + bias.abs());
            assert!((f64::from(logit) - want).abs() <= 5e-7 * size, "{tokens} {experts} {width}: {logit} {want}");
        }
    }
}

#[test]
fn equal_f64_at_all_sizes_and_formats() {
    let mut rng = fastrand::Rng::with_seed(1);
    for (tokens, experts, width) in
        [(0, 4, 8), (1, 1, 1), (1, 3, 7), (2, 16, 512), (31, 17, 513), (32, 130, 64), (33, 33, 2880), (70, 4, 1031)]
    {
        check::<f32, f32>(&mut rng, tokens, experts, width);
        check::<bf16, bf16>(&mut rng, tokens, experts, width);
        check::<f16, f16>(&mut rng, tokens, experts, width);
        check::<bf16, f32>(&mut rng, tokens, experts, width);
        check::<f32, f16>(&mut rng, tokens, experts, width);
    }
}

#[test]
fn a_token_has_the_same_bits_in_every_batch() {
    let mut rng = fastrand::Rng::with_seed(2);
    let router = router::<bf16>(&mut rng, 21, 777, true);
    let hidden = signed::<bf16>(&mut rng, 67 * 777);
    let (mut all, mut one) = (Vec::new(), Vec::new());
    router_logits(&router, &hidden, &mut all).unwrap();
    for (row, logits) in hidden.chunks(777).zip(all.chunks(21)) {
        router_logits(&router, row, &mut one).unwrap();
        assert_eq!(one, logits);
    }
}

#[test]
fn rows_of_the_weight_may_lie_apart() {
    let mut rng = fastrand::Rng::with_seed(3);
    let apart = router::<f32>(&mut rng, 10, 20, false);
    let every_second = RouterWeights { weight: apart.weight.select_rows(1, 5, 2).unwrap(), ..apart.clone() };
    let hidden = signed::<f32>(&mut rng, 3 * 20);
    let (mut all, mut half) = (Vec::new(), Vec::new());
    router_logits(&apart, &hidden, &mut all).unwrap();
    router_logits(&every_second, &hidden, &mut half).unwrap();
    assert_eq!(half, all.iter().copied().skip(1).step_by(2).collect::<Vec<_>>());
}

#[test]
fn route_is_logits_then_topk_and_names_bad_input() {
    let mut rng = fastrand::Rng::with_seed(4);
    let mut router = router::<f32>(&mut rng, 6, 12, true);
    router.selection_bias = Some(signed(&mut rng, 6));
    router.config.top_k = 3;
    let mut hidden = signed::<f32>(&mut rng, 5 * 12);
    let (mut logits, mut want, mut out) = (Vec::new(), TopK::default(), TopK::default());
    router_logits(&router, &hidden, &mut logits).unwrap();
    topk(&logits, 6, &router.config, router.selection_bias.as_deref(), &mut want).unwrap();
    route(&router, &hidden, &mut out).unwrap();
    assert_eq!(out, want);

    hidden[13] = f32::NAN;
    let error = route(&router, &hidden, &mut out).unwrap_err().to_string();
    assert!(error.starts_with("router logits: found NaN for token 1, expert 0"), "{error}");
    let error = route(&router, &hidden[1..], &mut out).unwrap_err().to_string();
    assert!(error.starts_with("hidden: found 59 numbers"), "{error}");
    router.bias = Some(vec![0.0; 5]);
    let error = route(&router, &hidden, &mut out).unwrap_err().to_string();
    assert!(error.starts_with("router bias"), "{error}");
}
