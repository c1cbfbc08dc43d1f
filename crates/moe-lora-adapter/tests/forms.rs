//! Every layout gives the same canonical adapter.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use common::{
    Array, File, PROJ, Pair, Pairs, Sizes, W, assert_same, assert_same_delta, fuse_b, fused, gpt_oss, per_expert,
    random, stack, stacked,
};
use fastrand::Rng;
use moe_lora_core::{DType, ModelShape, Projection};
use serde_json::json;

const SIZES: Sizes = Sizes { e: 3, h: 16, i: 6 };
const LAYERS: usize = 2;

/// An adapter of rank 4 and scale 2 with one A for gate and up, and its model.
fn adapter(seed: u64) -> (Pairs, ModelShape) {
    (random(&mut Rng::with_seed(seed), SIZES, LAYERS, 4, 2.0, true), SIZES.model(LAYERS))
}

fn file() -> File {
    File::new(4, 8.0)
}

/// The fused or down pairs of all experts of a layer.
fn of_layer(pairs: &Pairs, layer: usize, n: usize, interleaved: bool) -> Vec<Pair> {
    let fused = fused(pairs, interleaved);
    (0..SIZES.e).map(|e| fused[&(layer, e)][n].clone()).collect()
}

fn each(pairs: &[Pair]) -> Vec<&Pair> {
    pairs.iter().collect()
}

#[test]
fn a_tensor_for_each_expert() {
    let pairs = random(&mut Rng::with_seed(1), SIZES, LAYERS, 4, 2.0, false);
    let shape = SIZES.model(LAYERS);
    for (block, names) in [("mlp", PROJ), ("block_sparse_moe", W), ("feed_forward", PROJ), ("mixer", PROJ)] {
        let mut file = file();
        per_expert(&mut file, &pairs, block, names);
        let weights = file.resolve(&shape).unwrap();
        assert_same(&weights, &pairs);
        assert!(!weights.layers()[&0].experts()[0].shares_gate_up_a());
    }
}

#[test]
fn formats_convert_and_prefixes_and_adapter_names_do_not_matter() {
    let (pairs, mut shape) = adapter(2);
    for dtype in [DType::F32, DType::F16, DType::Bf16] {
        shape.dtype = dtype;
        for file_dtype in [DType::F32, DType::F16, DType::Bf16] {
            let mut file = file().dtype(file_dtype);
            per_expert(&mut file, &pairs, "mlp", PROJ);
            for tensor in &mut file.tensors {
                tensor.0 = tensor.0.replace("model.model.model", "model.model.language_model.model");
                tensor.0 = tensor.0.replace(".weight", ".default.weight");
            }
            let weights = file.resolve(&shape).unwrap();
            assert_eq!(weights.layers()[&1].experts()[2].down.as_ref().unwrap().a().dtype(), dtype);
            assert_same(&weights, &pairs);
        }
    }
}

#[test]
fn narrowing_rounds_to_nearest_even() {
    let (mut shape, mut file) = (SIZES.model(1), File::new(1, 1.0));
    shape.dtype = DType::Bf16;
    // Exactly between two bf16 numbers: to the even one, once down and once up.
    let values = [1.0 + 1.0 / 256.0, 1.0 + 3.0 / 256.0, -1.0, -(1.0 + 3.0 / 256.0), 0.5, 3.0];
    file.put(0, "mlp.experts.1.down_proj.lora_A.weight", Array { shape: vec![1, 6], values: values.to_vec() });
    file.put(0, "mlp.experts.1.down_proj.lora_B.weight", Array::from_fn([16, 1], |[o, _]| o as f32 - 7.5));
    let weights = file.resolve(&shape).unwrap();
    let a: Vec<f32> = weights.layers()[&0].experts()[1].down.as_ref().unwrap().a().to_vec();
    assert_eq!(a, [1.0, 1.0 + 1.0 / 64.0, -1.0, -(1.0 + 1.0 / 64.0), 0.5, 3.0]);
}

#[test]
fn gate_and_up_fused_for_each_expert() {
    let (pairs, shape) = adapter(3);
    for (interleaved, projs) in [(false, false), (false, true), (true, true), (true, false)] {
        let shape = if interleaved { gpt_oss(shape.clone()) } else { shape.clone() };
        let mut file = file();
        for ((layer, e), pair) in fused(&pairs, interleaved) {
            for (name, pair) in ["gate_up_proj", "down_proj"].into_iter().zip(pair) {
                let path = if projs { format!("{name}s.{e}") } else { format!("{e}.{name}") };
                file.put(layer, format!("mlp.experts.{path}.lora_A.weight"), pair.a);
                file.put(layer, format!("mlp.experts.{path}.lora_B.weight"), pair.b);
            }
        }
        let weights = file.resolve(&shape).unwrap();
        assert_same(&weights, &pairs);
        assert!(weights.layers()[&0].experts().iter().all(|e| e.shares_gate_up_a()), "one A for gate and up");
    }
}

#[test]
fn stacked_with_the_rank_before_or_after_the_width() {
    let (pairs, shape) = adapter(4);
    for rank_last in [false, true] {
        for interleaved in [false, true] {
            let shape = if interleaved { gpt_oss(shape.clone()) } else { shape.clone() };
            let mut file = file();
            for layer in 0..LAYERS {
                for (n, name) in ["gate_up_proj", "down_proj"].into_iter().enumerate() {
                    let pairs = of_layer(&pairs, layer, n, interleaved);
                    stacked(&mut file, layer, &format!("feed_forward.experts.{name}"), &each(&pairs), rank_last);
                }
            }
            file.tensors.iter_mut().for_each(|t| t.0 = t.0.replace(".weight", ""));
            let weights = file.resolve(&shape).unwrap();
            assert_same(&weights, &pairs);
            assert!(weights.layers()[&1].experts()[1].shares_gate_up_a());
        }
        // Separate, on the block itself.
        let pairs = random(&mut Rng::with_seed(5), SIZES, 1, 4, 2.0, false);
        for (block, names) in [("block_sparse_moe", W), ("mlp", PROJ), ("mlp.experts", W)] {
            let mut file = file();
            for p in Projection::ALL {
                let one: Vec<&Pair> = (0..SIZES.e).map(|e| &pairs[&(0, e, p)]).collect();
                stacked(&mut file, 0, &format!("{block}.{}", names[p as usize]), &one, rank_last);
            }
            assert_same(&file.resolve(&shape).unwrap(), &pairs);
        }
    }
}

#[test]
fn stacked_a_may_hold_gate_rows_and_then_up_rows() {
    let pairs = random(&mut Rng::with_seed(6), SIZES, 1, 4, 2.0, false);
    let mut file = file();
    let (mut a, mut b) = (Vec::new(), Vec::new());
    for e in 0..SIZES.e {
        let [gate, up] = [Projection::Gate, Projection::Up].map(|p| &pairs[&(0, e, p)]);
        a.push(Array::from_fn([8, SIZES.h], |[k, c]| if k < 4 { gate.a.get([k, c]) } else { up.a.get([k - 4, c]) }));
        b.push(fuse_b(&gate.b, &up.b, false));
    }
    file.put(0, "mlp.experts.gate_up_proj.lora_A.weight", stack(&a.iter().collect::<Vec<_>>()));
    file.put(0, "mlp.experts.gate_up_proj.lora_B.weight", stack(&b.iter().collect::<Vec<_>>()));
    let weights = file.resolve(&SIZES.model(1)).unwrap();
    let expected = pairs.into_iter().filter(|((.., p), _)| *p != Projection::Down).collect();
    assert_same(&weights, &expected);
}

/// An adapter with one gate and up A and one down B for all experts.
fn outer(seed: u64) -> Pairs {
    let mut pairs = random(&mut Rng::with_seed(seed), SIZES, 1, 4, 2.0, true);
    let first = Projection::ALL.map(|p| pairs[&(0, 0, p)].clone());
    for ((.., p), pair) in &mut pairs {
        match p {
            Projection::Down => pair.b = first[2].b.clone(),
            _ => pair.a = first[0].a.clone(),
        }
    }
    pairs
}

fn one(array: &Array) -> Array {
    stack(&[array])
}

#[test]
fn what_all_experts_share_is_stored_once() {
    let (pairs, shape) = (outer(7), SIZES.model(1));
    let fused = fused(&pairs, false);
    let gate_up_b = stack(&fused.values().map(|[gate_up, _]| &gate_up.b).collect::<Vec<_>>());
    let down_a = stack(&fused.values().map(|[_, down]| &down.a).collect::<Vec<_>>());
    let [gate_up, down] = &fused[&(0, 0)];
    let mut file = file();
    file.put(0, "mlp.experts.gate_up_proj.lora_A.weight", one(&gate_up.a));
    file.put(0, "mlp.experts.gate_up_proj.lora_B.weight", gate_up_b);
    file.put(0, "mlp.experts.down_proj.lora_A.weight", down_a);
    file.put(0, "mlp.experts.down_proj.lora_B.weight", one(&down.b));
    let weights = file.resolve(&shape).unwrap();
    assert_same(&weights, &pairs);
    let layer = &weights.layers()[&0];
    assert!(Projection::ALL.into_iter().all(|p| layer.shares_outer(p)) && layer.experts()[2].shares_gate_up_a());
    let Sizes { e, h, i } = SIZES;
    assert_eq!(weights.size_bytes(), 4 * 4 * (2 * h + e * 3 * i), "one A and one B of width H");

    // The same adapter written out for every expert is the same change, in more bytes.
    let mut expanded = File::new(4, 8.0);
    per_expert(&mut expanded, &pairs, "mlp", PROJ);
    let expanded = expanded.resolve(&shape).unwrap();
    assert_same_delta(&expanded, &pairs);
    assert_eq!(expanded.size_bytes(), 4 * 4 * e * 3 * (h + i));
}

#[test]
fn a_shared_side_may_stand_beside_tensors_for_each_expert() {
    let (mut pairs, shape) = (outer(8), SIZES.model(1));
    pairs.remove(&(0, 1, Projection::Up));
    let mut file = file();
    per_expert(&mut file, &pairs, "mlp", PROJ);
    for name in ["gate_proj", "up_proj"] {
        file.tensors.retain(|t| !t.0.ends_with(&format!("{name}.lora_A.weight")));
        file.put(0, format!("mlp.experts.{name}.lora_A.weight"), one(&pairs[&(0, 0, Projection::Gate)].a));
    }
    file.tensors.retain(|t| !t.0.ends_with("down_proj.lora_B.weight"));
    file.put(0, "mlp.experts.down_proj.lora_B.weight", one(&pairs[&(0, 0, Projection::Down)].b));
    for order in [false, true] {
        if order {
            file.tensors.reverse();
        }
        let weights = file.resolve(&shape).unwrap();
        assert_same(&weights, &pairs);
        assert!(
            weights.layers()[&0].shares_outer(Projection::Gate) && weights.layers()[&0].shares_outer(Projection::Down)
        );
        assert!(!weights.layers()[&0].shares_outer(Projection::Up), "expert 1 has no up");
    }
    file.tensors.retain(|t| !t.0.contains("down_proj.lora_A"));
    assert!(file.refusal(&shape).contains("layer 0 expert 0 down: B [16, 4] without A"));
}

#[test]
fn block_diagonal_gate_up_is_cut_into_gate_and_up() {
    let pairs = random(&mut Rng::with_seed(9), SIZES, LAYERS, 2, 4.0, false);
    let shape = SIZES.model(LAYERS);
    // As PEFT re-saves it: rank and alpha doubled, A's rows one after the other, B zero off the diagonal.
    let fuse = |gate: &Pair, up: &Pair| Pair {
        a: Array::from_fn([4, SIZES.h], |[k, c]| if k < 2 { gate.a.get([k, c]) } else { up.a.get([k - 2, c]) }),
        b: Array::from_fn([2 * SIZES.i, 4], |[o, k]| match (o < SIZES.i, k < 2) {
            (true, true) => gate.b.get([o, k]),
            (false, false) => up.b.get([o - SIZES.i, k - 2]),
            _ => 0.0,
        }),
        scale: 0.0,
    };
    let mut file = File::new(2, 8.0)
        .set("target_parameters", json!(["gate_up_proj", "down_proj", "gate.weight"]))
        .set("rank_pattern", json!({r".*\.gate_up_proj": 4}))
        .set("alpha_pattern", json!({r".*\.gate_up_proj": 16}));
    for layer in 0..LAYERS {
        let of = |p| (0..SIZES.e).map(|e| &pairs[&(layer, e, p)]).collect::<Vec<_>>();
        let gate_up: Vec<Pair> =
            of(Projection::Gate).into_iter().zip(of(Projection::Up)).map(|(g, u)| fuse(g, u)).collect();
        common::flat(&mut file, layer, "mlp.experts.base_layer", &each(&gate_up), false);
        common::flat(&mut file, layer, "mlp.experts", &of(Projection::Down), false);
    }
    let weights = file.resolve(&shape).unwrap();
    assert_same(&weights, &pairs);
    assert_eq!(weights.max_rank(), 2);

    // One number off the diagonal, and it is an ordinary fused adapter again.
    let b = &mut file.tensor("layers.1.mlp.experts.base_layer.lora_B.weight").2;
    b.values[(4 - 1) * SIZES.e + 1] = 0.5; // [row 0, rank 3, expert 1]
    let weights = file.resolve(&shape).unwrap();
    assert_eq!(weights.layers()[&0].max_rank(), 2);
    assert_eq!(weights.layers()[&1].max_rank(), 4);
    assert!(weights.layers()[&1].experts()[0].shares_gate_up_a());
}

#[test]
fn scales_follow_rank_alpha_rslora_and_patterns() {
    let mut pairs = random(&mut Rng::with_seed(10), SIZES, LAYERS, 4, 8.0, false);
    let shape = SIZES.model(LAYERS);
    // gate 2, up 4, down 8, and one module of rank 2 with alpha / 4.
    for ((.., p), pair) in &mut pairs {
        pair.scale = [2.0, 4.0, 8.0][*p as usize];
    }
    let special = (1, 2, Projection::Gate);
    let rng = &mut Rng::with_seed(11);
    pairs
        .insert(special, Pair { a: Array::random(rng, [2, SIZES.h]), b: Array::random(rng, [SIZES.i, 2]), scale: 1.0 });
    let mut file = File::new(4, 32.0)
        .set("rank_pattern", json!({"layers.1.mlp.experts.2.gate_proj": 2, "gate_proj": 4.0}))
        .set("alpha_pattern", json!({r"model\.layers\.1\..*\.2\.gate_proj": 2, "gate_proj": 8.0, "up_proj": 16}));
    per_expert(&mut file, &pairs, "mlp", PROJ);
    assert_same(&file.resolve(&shape).unwrap(), &pairs);
    let summary = file.open().unwrap().summary();
    assert_eq!((summary.ranks, summary.scales), (vec![2, 4], vec![1.0, 2.0, 4.0, 8.0]));

    let pairs = random(&mut Rng::with_seed(12), SIZES, 1, 16, 32.0 / 16_f32.sqrt(), false);
    let mut file = File::new(16, 32.0).set("use_rslora", json!(true));
    per_expert(&mut file, &pairs, "mlp", PROJ);
    assert_same(&file.resolve(&shape).unwrap(), &pairs);
}

#[test]
fn missing_parts_are_no_change() {
    let (pairs, shape) = adapter(13);
    for keep in [
        (|(layer, ..)| layer == 1) as fn((usize, usize, Projection)) -> bool,
        |(_, e, _)| e == 2,
        |(.., p)| p == Projection::Down,
        |(.., p)| p != Projection::Gate,
    ] {
        let some: Pairs = pairs.clone().into_iter().filter(|(key, _)| keep(*key)).collect();
        let mut file = file();
        per_expert(&mut file, &some, "mlp", PROJ);
        file.put(0, "mlp.experts.0.gate_proj.lora_A.default.weight", Array { shape: vec![0], values: vec![] });
        file.put(0, "mlp.experts.0.gate_proj.lora_B.default.weight", Array { shape: vec![6, 0], values: vec![] });
        let mut file = file;
        if keep((0, 0, Projection::Gate)) {
            file.remove("lora_A.default.weight");
        }
        assert_same(&file.resolve(&shape).unwrap(), &some);
    }
}

#[test]
fn other_tensors_are_handed_back() {
    let (pairs, shape) = adapter(14);
    let mut file = file();
    per_expert(&mut file, &pairs, "mlp", PROJ);
    let others =
        ["mlp.gate.lora_A.weight", "mlp.shared_expert.up_proj.lora_B.weight", "self_attn.q_proj.lora_A.weight"];
    for other in others {
        file.put(0, other, Array::from_fn([2, 2], |_| f32::NAN));
    }
    let adapter = file.open().unwrap();
    assert_eq!(adapter.unused_keys(), others.map(|o| format!("base_model.model.model.layers.0.{o}")));
    assert_same(&adapter.resolve(&shape).unwrap(), &pairs);
    assert!(adapter.warnings().is_empty());
}

#[test]
fn the_summary_needs_no_model() {
    let (pairs, _) = adapter(15);
    let mut file = file();
    for (n, name) in ["gate_up_proj", "down_proj"].into_iter().enumerate() {
        stacked(&mut file, 1, &format!("mlp.experts.{name}"), &each(&of_layer(&pairs, 1, n, false)), n == 1);
    }
    let summary = file.dtype(DType::Bf16).open().unwrap().summary();
    assert_eq!(
        serde_json::to_value(&summary).unwrap(),
        json!({
            "forms": ["stacked", "rank_last"], "layers": [1], "experts": 3, "projections": ["gate_up", "down"], "ranks": [4],
            "scales": [2.0], "dtypes": ["BF16"], "expert_tensors": 4, "expert_bytes": 3 * 4 * (16 + 12 + 6 + 16) * 2,
            "unused_tensors": 0,
        })
    );
}
