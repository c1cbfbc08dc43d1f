//! PEFT's flat tensors: which is which, which way round.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use common::{Array, File, Pair, Pairs, Sizes, assert_same, flat, fused, gpt_oss, random};
use fastrand::Rng;
use moe_lora_adapter::{ExpertLayout, KeyForm, OpenOptions};
use moe_lora_core::{AdapterWeights, ModelShape, Projection};
use serde_json::json;

/// Ordinary; H = 2I (OLMoE); H = I (gpt-oss).
const SIZES: [Sizes; 3] = [Sizes { e: 3, h: 16, i: 6 }, Sizes { e: 3, h: 8, i: 4 }, Sizes { e: 3, h: 8, i: 8 }];

fn file() -> File {
    File::new(2, 4.0).set("target_parameters", json!(["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]))
}

/// One layer's fused gate_up pairs, or its down pairs.
fn of(pairs: &Pairs, n: usize, interleaved: bool) -> Vec<Pair> {
    fused(pairs, interleaved).into_values().map(|pair| pair[n].clone()).collect()
}

fn put(file: &mut File, module: &str, pairs: &[Pair], transposed: bool) {
    flat(file, 0, &format!("mlp.{module}"), &pairs.iter().collect::<Vec<_>>(), transposed);
}

fn only(pairs: &Pairs, keep: impl Fn(Projection) -> bool) -> Pairs {
    pairs.clone().into_iter().filter(|((.., p), _)| keep(*p)).collect()
}

/// What PEFT computes for a parameter `[E, d1, d2]`: einsum "o r e, e r i -> e o i", or its transpose where it took the
/// dimensions the other way round.
fn peft_delta(a: &Array, b: &Array, e: usize, scale: f32, expert: usize, transposed: bool) -> Vec<f64> {
    let (r, inner, out) = (a.shape[0] / e, a.shape[1], b.shape[0]);
    let at = |o: usize, i: usize| {
        let sum = |k: usize| f64::from(b.get([o, k * e + expert])) * f64::from(a.get([expert * r + k, i]));
        f64::from(scale) * (0..r).map(sum).sum::<f64>()
    };
    if transposed {
        (0..inner).flat_map(|i| (0..out).map(move |o| (o, i))).map(|(o, i)| at(o, i)).collect()
    } else {
        (0..out).flat_map(|o| (0..inner).map(move |i| (o, i))).map(|(o, i)| at(o, i)).collect()
    }
}

#[test]
fn both_parameters_tell_the_layout_for_all_sizes() {
    for (n, sizes) in SIZES.into_iter().enumerate() {
        let pairs = random(&mut Rng::with_seed(n as u64), sizes, 1, 2, 2.0, true);
        for interleaved in [false, true] {
            let shape = if interleaved { gpt_oss(sizes.model(1)) } else { sizes.model(1) };
            for transposed in [false, true] {
                let mut file = file();
                put(&mut file, "experts.base_layer", &of(&pairs, 0, interleaved), transposed);
                put(&mut file, "experts", &of(&pairs, 1, interleaved), transposed);
                let weights = file.resolve(&shape).unwrap();
                assert_same(&weights, &pairs);
                assert!(weights.layers()[&0].experts()[0].shares_gate_up_a());
            }
        }
    }
}

#[test]
fn the_change_is_what_peft_computes_from_the_raw_tensors() {
    let Sizes { e, h, i } = SIZES[0];
    let rng = &mut Rng::with_seed(3);
    for transposed in [false, true] {
        let (inner, out) = if transposed { (h, i) } else { (i, h) };
        let (a, b) = (Array::random(rng, [2 * e, inner]), Array::random(rng, [out, 2 * e]));
        let mut file = file();
        file.put(0, "mlp.experts.lora_A.weight", a.clone());
        file.put(0, "mlp.experts.lora_B.weight", b.clone());
        let found = common::loaded(&file.resolve(&SIZES[0].model(1)).unwrap());
        assert_eq!(found.len(), e);
        for (&(_, expert, p), pair) in &found {
            assert_eq!(p, Projection::Down, "told by its size, though the key is the outermost");
            assert_eq!(pair.delta(), peft_delta(&a, &b, e, 2.0, expert, transposed));
        }
    }
}

/// A file with one parameter whose sizes fit both layouts.
fn ambiguous(sizes: Sizes, pairs: &Pairs, n: usize, transposed: bool) -> File {
    let name = ["experts.gate_up_proj", "experts.down_proj"][n];
    let mut file = File::new(2, 4.0).set("target_parameters", json!([name]));
    put(&mut file, "experts", &of(pairs, n, false), transposed);
    assert_eq!(sizes.h, [2 * sizes.i, sizes.i][n]);
    file
}

#[test]
fn one_parameter_that_fits_both_ways_needs_version_or_option() {
    for (sizes, n) in [(SIZES[1], 0), (SIZES[2], 1)] {
        let pairs = random(&mut Rng::with_seed(4), sizes, 1, 2, 2.0, true);
        let expected = only(&pairs, |p| (p == Projection::Down) == (n == 1));
        let shape = sizes.model(1);
        for (transposed, version) in [(true, "0.18.1"), (true, "0.19.0"), (false, "0.19.1"), (false, "0.21.2")] {
            let file = ambiguous(sizes, &pairs, n, transposed).set("peft_version", json!(version));
            assert_same(&file.resolve(&shape).unwrap(), &expected);
        }
        for (transposed, layout) in [(false, ExpertLayout::Direct), (true, ExpertLayout::Transposed)] {
            for version in [json!(null), json!("0.99.0"), json!("0.19.1.dev0@abc")] {
                let file = ambiguous(sizes, &pairs, n, transposed).set("peft_version", version);
                let line = file.refusal(&shape);
                assert!(line.contains(&format!("layer 0 {}", ["gate_up", "down"][n])), "{line}");
                assert!(line.contains("expert_layout"), "{line}");
                let options = OpenOptions { expert_layout: Some(layout), ..Default::default() };
                assert_same(&file.open_with(options).unwrap().resolve(&shape).unwrap(), &expected);
            }
        }
        // Stored [E, in, out], later versions depend on a flag of the model's code.
        let stored_in_out = ModelShape { storage: gpt_oss(shape.clone()).storage, ..shape };
        if n == 1 {
            let file = ambiguous(sizes, &pairs, n, false).set("peft_version", json!("0.18.1"));
            assert_same(&file.resolve(&stored_in_out).unwrap(), &expected);
            let file = ambiguous(sizes, &pairs, n, false).set("peft_version", json!("0.21.2"));
            assert!(file.refusal(&stored_in_out).contains("peft_version 0.21.2"));
        }
    }
}

#[test]
fn one_layer_decides_for_all() {
    // Down alone is ambiguous in layer 0; gate_up of layer 1 was written under the same rule.
    let sizes = SIZES[2];
    let pairs = random(&mut Rng::with_seed(5), sizes, 1, 2, 2.0, true);
    let targets = json!(["layers.0.mlp.experts.down_proj", "1.mlp.experts.gate_up_proj"]);
    let mut file = File::new(2, 4.0).set("target_parameters", targets);
    put(&mut file, "experts", &of(&pairs, 1, false), true);
    flat(&mut file, 1, "mlp.experts", &of(&pairs, 0, false).iter().collect::<Vec<_>>(), true);
    let expected = pairs.into_iter().map(|((_, e, p), pair)| ((usize::from(p != Projection::Down), e, p), pair));
    assert_same(&file.resolve(&sizes.model(2)).unwrap(), &expected.collect());
}

/// Separate parameters, the first one deepest.
fn separate(pairs: &Pairs, names: &[&str], projections: &[Projection], transposed: bool) -> File {
    let mut file = File::new(2, 4.0).set("target_parameters", json!(names));
    for (n, p) in projections.iter().enumerate() {
        let one: Vec<Pair> = pairs.iter().filter(|((.., q), _)| q == p).map(|(_, pair)| pair.clone()).collect();
        let depth = ".base_layer".repeat(projections.len() - 1 - n);
        put(&mut file, &format!("experts{depth}"), &one, transposed);
    }
    file
}

#[test]
fn separate_parameters_follow_the_order_of_registration() {
    use Projection::{Down, Gate, Up};
    let sizes = SIZES[0];
    let pairs = random(&mut Rng::with_seed(6), sizes, 1, 2, 2.0, false);
    let shape = sizes.model(1);
    let resolve = |names: &[&str], order: &[Projection], transposed: bool| -> AdapterWeights {
        separate(&pairs, names, order, transposed).resolve(&shape).unwrap_or_else(|e| panic!("{names:?}: {e}"))
    };
    for transposed in [false, true] {
        for order in [vec![Gate, Up, Down], vec![Up, Down], vec![Gate, Up], vec![Gate, Down], vec![Up], vec![Down]] {
            let names: Vec<&str> =
                order.iter().rev().map(|p| ["gate_proj", "up_proj", "down_proj"][*p as usize]).collect();
            assert_same(&resolve(&names, &order, transposed), &only(&pairs, |p| order.contains(&p)));
        }
        // w1, w2, w3 may be registered in either order; the sizes tell.
        for order in [[Gate, Up, Down], [Gate, Down, Up]] {
            assert_same(&resolve(&["w1", "w2", "w3"], &order, transposed), &pairs);
        }
    }
    let line = separate(&pairs, &["w2", "w3"], &[Down, Up], false).refusal(&shape);
    assert!(line.contains("whose order in the module is known"), "{line}");
    let line = separate(&pairs, &["gate_proj", "w1"], &[Gate, Up], false).refusal(&shape);
    assert!(line.contains("layer 0: the parameters gate_proj, w1"), "{line}");
    let line = separate(&pairs, &["gate_proj"], &[Gate, Up], false).refusal(&shape);
    assert!(line.contains("2 parameters of sizes 16 and 6") && line.contains("(gate_proj)"), "{line}");
}

#[test]
fn target_parameters_has_to_agree() {
    let sizes = SIZES[0];
    let pairs = random(&mut Rng::with_seed(7), sizes, 1, 2, 2.0, true);
    let shape = sizes.model(1);
    let mut file = file();
    put(&mut file, "experts", &of(&pairs, 0, false), false);
    let expected = only(&pairs, |p| p != Projection::Down);
    assert_same(&file.resolve(&shape).unwrap(), &expected);
    let strict = OpenOptions { strict: true, ..Default::default() };
    let error = file.open_with(strict.clone()).unwrap().resolve(&shape).unwrap_err().to_string();
    assert!(error.contains("all that target_parameters names (gate_up_proj, down_proj)"), "{error}");
    file = file.set("target_parameters", json!(["down_proj"]));
    assert!(file.refusal(&shape).contains("layer 0: gate_up by its sizes"));
    file = file.set("target_parameters", json!([]));
    let adapter = file.open().unwrap();
    assert!(adapter.warnings()[0].contains("target_parameters"));
    assert_same(&adapter.resolve(&shape).unwrap(), &expected);
}

#[test]
fn sizes_that_fit_nothing_are_refused() {
    let sizes = SIZES[0];
    let pairs = random(&mut Rng::with_seed(8), sizes, 1, 2, 2.0, true);
    let mut good = file();
    put(&mut good, "experts.base_layer", &of(&pairs, 0, false), false);
    put(&mut good, "experts", &of(&pairs, 1, false), false);
    let line = good.refusal(&Sizes { e: 4, ..sizes }.model(1));
    assert!(line.contains("A [rank * 4, ..] and B [.., rank * 4] for 4 experts"), "{line}");
    let line = good.refusal(&Sizes { e: 2, ..sizes }.model(1));
    assert!(
        line.contains("found layer 0 expert 0 gate_up: rank 3, expected rank 2, as adapter_config.json says"),
        "{line}"
    );
    let line = good.refusal(&Sizes { i: 7, ..sizes }.model(1));
    assert!(line.contains("A [6, 16], B [12, 6]") && line.contains("14 (gate_up)"), "{line}");
    // gate_up direct, down transposed: not written under one rule.
    let mut mixed = file();
    put(&mut mixed, "experts.base_layer", &of(&pairs, 0, false), false);
    put(&mut mixed, "experts", &of(&pairs, 1, false), true);
    assert!(mixed.refusal(&sizes.model(1)).contains("orientation of the other parameters"));
    good.remove("experts.lora_B.weight");
    assert!(good.refusal(&sizes.model(1)).contains("layer 0: A without B"));
}

#[test]
fn the_summary_tells_what_the_settings_name() {
    let pairs = random(&mut Rng::with_seed(9), SIZES[0], 1, 2, 2.0, true);
    let mut file = file().set("rank_pattern", json!({"down_proj": 1}));
    put(&mut file, "experts.base_layer", &of(&pairs, 0, false), false);
    file.put(0, "mlp.experts.lora_A.weight", Array::from_fn([3, 6], |_| 1.0));
    file.put(0, "mlp.experts.lora_B.weight", Array::from_fn([16, 3], |_| 1.0));
    let summary = file.open().unwrap().summary();
    assert_eq!((summary.forms, summary.experts), (vec![KeyForm::TargetParameters], 3));
    assert_eq!((summary.projections.join(" "), summary.ranks), ("gate_up down".to_owned(), vec![1, 2]));
    assert_eq!(summary.scales, [2.0, 4.0]);
}
