//! LoRA of attention and dense layers, beside the experts'.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use common::{Array, File, PROJ, Sizes, assert_same, per_expert, random};
use fastrand::Rng;
use moe_lora_adapter::{AdapterError, LinearAdapters};
use moe_lora_core::{DType, Lora};
use serde_json::json;

const SIZES: Sizes = Sizes { e: 3, h: 16, i: 6 };

/// q is [24, 16], o is [16, 24]; two layers.
fn shape_of(layer: usize, module: &str) -> Option<[usize; 2]> {
    match module {
        _ if layer > 1 => None,
        "self_attn.q_proj" => Some([24, 16]),
        "self_attn.o_proj" => Some([16, 24]),
        _ => None,
    }
}

/// Ranks 4 and, for o of layer 1, 2.
fn file(rng: &mut Rng) -> File {
    let patterns = json!({ "1.self_attn.o_proj": 2 });
    let mut file = File::new(4, 8.0).set("rank_pattern", patterns).set("alpha_pattern", json!({ "q_proj": 1.0 }));
    for (layer, module, rank) in [(0, "q", 4), (0, "o", 4), (1, "q", 4), (1, "o", 2)] {
        let [out, inner] = shape_of(layer, &format!("self_attn.{module}_proj")).unwrap();
        let name = |side| format!("self_attn.{module}_proj.lora_{side}.weight");
        file.put(layer, name("A"), Array::random(rng, [rank, inner]));
        file.put(layer, name("B"), Array::random(rng, [out, rank]));
    }
    file
}

fn resolve(file: &File, dtype: DType) -> Result<LinearAdapters, AdapterError> {
    file.open()?.resolve_linear(dtype, shape_of)
}

fn refusal(file: &File) -> String {
    let error = resolve(file, DType::F32).expect_err("it should be refused");
    assert!(error.input().unwrap().file.is_some(), "{error}");
    error.to_string()
}

fn same(lora: &Lora, file: &mut File, module: &str) -> bool {
    let a = file.tensor(&format!("{module}.lora_A.weight")).2.values.clone();
    let b = file.tensor(&format!("{module}.lora_B.weight")).2.values.clone();
    lora.a().to_vec::<f32>() == a && lora.b().to_vec::<f32>() == b
}

#[test]
fn modules_come_with_their_own_ranks_and_scales_beside_experts() {
    let rng = &mut Rng::with_seed(1);
    let pairs = random(rng, SIZES, 2, 4, 2.0, false);
    for dtype in [DType::F32, DType::Bf16] {
        let mut file = file(rng).dtype(dtype);
        per_expert(&mut file, &pairs, "mlp", PROJ);
        file.put(0, "mlp.gate.lora_A.weight", Array::random(rng, [4, 16]));
        let opened = file.open().unwrap();
        assert_same(&opened.resolve(&SIZES.model(2)).unwrap(), &pairs);
        let linear = opened.resolve_linear(dtype, shape_of).unwrap();
        let found = |layer, module| linear.get(layer, module).unwrap();
        for (layer, name, rank, scale) in [
            (0, "self_attn.q_proj", 4, 0.25),
            (0, "self_attn.o_proj", 4, 2.0),
            (1, "self_attn.q_proj", 4, 0.25),
            (1, "self_attn.o_proj", 2, 4.0),
        ] {
            let lora = found(layer, name);
            assert_eq!((lora.rank(), lora.scale(), lora.a().dtype()), (rank, scale, dtype));
            assert!(same(lora, &mut file, &format!("{layer}.{name}")));
        }
        assert_eq!(linear.size_bytes(), dtype.size() * (3 * 4 + 2) * (16 + 24));
        assert_eq!(linear.left(), ["base_model.model.model.layers.0.mlp.gate.lora_A.weight"]);
        assert!(linear.get(0, "self_attn.k_proj").is_none() && linear.get(2, "self_attn.q_proj").is_none());
    }
}

#[test]
fn what_is_wrong_is_named() {
    let file = || file(&mut Rng::with_seed(2));
    let mut one = file();
    one.remove("0.self_attn.q_proj.lora_B.weight");
    assert!(refusal(&one).contains("0.self_attn.q_proj.lora_A.weight: found A without B"), "{}", refusal(&one));

    let mut one = file();
    one.tensor("1.self_attn.o_proj.lora_A.weight").2.shape = vec![2, 24, 1];
    assert!(refusal(&one).contains("found [2, 24, 1], expected [2, 24] (rank 2"), "{}", refusal(&one));

    let mut one = file();
    one.tensor("1.self_attn.q_proj.lora_B.weight").2.values[5] = f32::NAN;
    assert!(refusal(&one).contains("layer 1 self_attn.q_proj: NaN as number 5"), "{}", refusal(&one));

    let mut one = file();
    let twice = one.tensor("0.self_attn.q_proj.lora_A.weight").2.clone();
    one.put(0, "self_attn.q_proj.lora_A.default.weight", twice);
    assert!(refusal(&one).contains("the same tensor twice"), "{}", refusal(&one));

    let one = file().set("r", json!(1000));
    assert!(refusal(&one).contains("rank 1000"), "{}", refusal(&one));
}
