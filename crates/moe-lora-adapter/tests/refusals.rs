//! One file for each thing that is wrong; the line names layer, expert and projection, found and expected.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use common::{Array, File, PROJ, Pairs, Sizes, W, per_expert, random, stack, stacked};
use fastrand::Rng;
use moe_lora_adapter::{OpenOptions, PeftAdapter};
use moe_lora_core::{DType, ModelShape, Projection};
use serde_json::json;

const SIZES: Sizes = Sizes { e: 3, h: 16, i: 6 };

fn shape() -> ModelShape {
    SIZES.model(2)
}

fn pairs() -> Pairs {
    random(&mut Rng::with_seed(1), SIZES, 2, 4, 2.0, true)
}

/// A good F1 file of two layers.
fn each() -> File {
    let mut file = File::new(4, 8.0);
    per_expert(&mut file, &pairs(), "mlp", PROJ);
    assert!(file.resolve(&shape()).is_ok());
    file
}

/// A good F4 file of layer 1, gate and up apart.
fn stacks() -> File {
    let (mut file, pairs) = (File::new(4, 8.0), pairs());
    for p in Projection::ALL {
        let one: Vec<_> = (0..SIZES.e).map(|e| &pairs[&(1, e, p)]).collect();
        stacked(&mut file, 1, &format!("mlp.experts.{}", PROJ[p as usize]), &one, false);
    }
    assert!(file.resolve(&shape()).is_ok());
    file
}

#[track_caller]
fn refused(file: &File, parts: &[&str]) {
    let line = file.refusal(&shape());
    for part in parts {
        assert!(line.contains(part), "{line}\nlacks {part}");
    }
}

const A: &str = "layers.1.mlp.experts.2.up_proj.lora_A.weight";
const B: &str = "layers.1.mlp.experts.2.up_proj.lora_B.weight";

fn ones<const N: usize>(shape: [usize; N]) -> Array {
    Array::from_fn(shape, |_| 1.0)
}

#[test]
fn names() {
    let mut file = each();
    file.put(1, "mlp.experts.2.side_proj.lora_A.weight", ones([4, 16]));
    refused(&file, &["layers.1.mlp.experts.2.side_proj.lora_A.weight: found an unknown expert tensor"]);

    let mut file = each();
    file.put(1, "mlp.experts.2.up_proj.lora_A.default.weight", ones([4, 16]));
    refused(&file, &["layer 1: the same tensor twice", A]);

    let mut file = each();
    file.put(1, "mlp.experts.0.w1.lora_A.weight", ones([4, 16]));
    refused(&file, &["layer 1: two key forms"]);

    let mut file = each();
    file.put(1, "block_sparse_moe.experts.2.up_proj.lora_A.weight", ones([4, 16]));
    refused(&file, &["layer 1: two key forms, under model.layers.1.", "block_sparse_moe.experts"]);

    let mut file = each();
    file.put(1, "mlp.experts.2.gate_up_proj.lora_A.weight", ones([4, 16]));
    refused(&file, &["layer 1: gate_up and also gate or up"]);

    let mut file = each();
    file.put(1, "mlp.experts.up_proj.lora_A.weight", ones([3, 4, 16]));
    refused(&file, &["layer 1: two key forms for up"]);
    file.tensors.last_mut().unwrap().2 = ones([1, 4, 16]);
    refused(&file, &["layer 1: two key forms for up"]);

    let mut file = each();
    file.put(1, "mlp.experts.lora_A.weight", ones([12, 16]));
    refused(&file, &["layer 1: two key forms, target_parameters and named projections"]);

    let mut file = stacks();
    file.put(1, "mlp.experts.w2.lora_A.weight", ones([3, 4, 6]));
    refused(&file, &["layer 1: two key forms"]);

    let mut file = each();
    let name = "base_model.model.talker.layers.0.mlp.experts.0.up_proj.lora_A.weight";
    file.tensors.push((name.to_owned(), DType::F32, ones([4, 16])));
    refused(&file, &[name, "experts of one stack of layers"]);

    let mut file = each();
    file.put(1, "mlp.experts.2.up_proj.lora_magnitude_vector.weight", ones([6]));
    refused(&file, &["a magnitude vector (DoRA)"]);
    let mut file = each();
    file.put(1, "mlp.experts.2.up_proj.lora_B.bias", ones([6]));
    refused(&file, &["a bias of lora_B"]);
}

#[test]
fn sides_and_ranks() {
    let mut file = each();
    file.remove(B);
    refused(&file, &[A, "layer 1 expert 2 up: A [4, 16] without B"]);
    let mut file = each();
    file.remove(A);
    refused(&file, &[B, "layer 1 expert 2 up: B [6, 4] without A"]);
    let mut file = each();
    file.tensor(A).2 = Array { shape: vec![0, 16], values: vec![] };
    refused(&file, &["layer 1 expert 2 up: B [6, 4] without A"]);
    let mut file = stacks();
    file.remove("down_proj.lora_B.weight");
    refused(&file, &["layer 1 expert 0 down: A [4, 6] without B"]);

    let mut file = each();
    file.tensor(A).2 = ones([3, 16]);
    refused(&file, &["layer 1 expert 2 up: A of rank 3, B of rank 4", "expected one rank"]);
    file.tensor(B).2 = ones([6, 3]);
    refused(&file, &["layer 1 expert 2 up: rank 3, expected rank 4, as adapter_config.json says"]);
    let file = file.set("rank_pattern", json!({"layers.1.mlp.experts.2.up_proj": 3}));
    assert!(file.resolve(&shape()).is_ok());

    let mut file = stacks();
    file.tensor("down_proj.lora_A.weight").2 = ones([3, 5, 6]);
    refused(&file, &["layer 1 down: A [3, 5, 6], B [3, 16, 4]", "of one rank"]);

    let options = OpenOptions { max_rank: 3, ..Default::default() };
    let error = each().open_with(options).unwrap().resolve(&shape()).unwrap_err().to_string();
    assert!(error.contains("layer 0 expert 0 gate: rank 4, expected at most the maximum of 3"), "{error}");
}

#[test]
fn sizes() {
    let mut file = each();
    file.tensor(A).2 = ones([4, 6]);
    refused(&file, &[A, "layer 1 expert 2 up: [4, 6], expected A [rank, 16]"]);
    let mut file = each();
    file.tensor(B).2 = ones([12, 4]);
    refused(&file, &[B, "layer 1 expert 2 up: [12, 4], expected B [6, rank]"]);
    let mut file = each();
    file.tensor(B).2 = ones([6, 4, 1]);
    refused(&file, &["layer 1 expert 2 up: [6, 4, 1]"]);
    let mut file = stacks();
    file.tensor("down_proj.lora_A.weight").2 = ones([2, 4, 6]);
    refused(&file, &["layer 1 down: A [2, 4, 6], B [3, 16, 4]", "A [1 or 3, rank, 6]"]);
    let mut file = stacks();
    file.tensor("down_proj.lora_A.weight").2 = ones([12, 6]);
    refused(&file, &["layer 1 down: A [12, 6]"]);

    let mut file = each();
    file.put(1, "mlp.experts.3.up_proj.lora_A.weight", ones([4, 16]));
    refused(&file, &["layer 1 expert 3 up", "expected experts below the model's 3"]);
    let mut file = each();
    file.put(2, "mlp.experts.0.up_proj.lora_A.weight", ones([4, 16]));
    refused(&file, &["layers.2.mlp.experts.0.up_proj", "found layer 2", "2 MoE layers from 0 to 1"]);
    let sparse = ModelShape { moe_layers: vec![1], ..shape() };
    assert!(each().refusal(&sparse).contains("found layer 0, expected a MoE layer of the model, [1]"));
}

#[test]
fn a_rank_as_large_as_the_widths_can_be_read_both_ways() {
    let square = Sizes { e: 3, h: 4, i: 4 };
    let mut file = File::new(4, 8.0);
    for side in ["A", "B"] {
        file.put(0, format!("mlp.experts.down_proj.lora_{side}.weight"), ones([3, 4, 4]));
    }
    let line = file.refusal(&square.model(1));
    assert!(line.contains("layer 0 down: A [3, 4, 4], B [3, 4, 4], expected shapes that fit one order"), "{line}");
}

#[test]
fn numbers() {
    for (value, dtype, model, shown) in [
        (f32::NAN, DType::F32, DType::F32, "NaN as number 5, expected finite f32 values"),
        (f32::INFINITY, DType::Bf16, DType::Bf16, "inf as number 5, expected finite bf16 values"),
        (f32::NEG_INFINITY, DType::F16, DType::Bf16, "-inf as number 5"),
        (1e6, DType::F32, DType::F16, "1000000 as number 5, expected finite f16 values"),
        (f32::MAX, DType::F32, DType::Bf16, "expected finite bf16 values"),
    ] {
        let mut file = each();
        file.tensor(B).1 = dtype;
        file.tensor(B).2.values[5] = value;
        let line = file.refusal(&ModelShape { dtype: model, ..shape() });
        assert!(line.contains(&format!("{B}: found layer 1 expert 2 up: ")) && line.contains(shown), "{line}");
    }
    let mut file = stacks();
    file.tensor("down_proj.lora_B.weight").2.values[2 * 16 * 4] = f32::NAN;
    refused(&file, &["layer 1 expert 2 down: NaN"]);
    file.remove("down_proj.lora_B.weight");
    let mut outer = stack(&[&ones([16, 4])]);
    outer.values[7] = f32::NAN;
    file.put(1, "mlp.experts.down_proj.lora_B.weight", outer);
    refused(&file, &["layer 1 down: NaN as number 7"]);
}

#[test]
fn formats() {
    let name = "base_model.model.model.layers.0.mlp.experts.1.up_proj.lora_A.weight";
    for (dtype, size) in [("F64", 8), ("I8", 1), ("F8_E4M3", 1), ("I32", 4)] {
        let bytes = common::safetensors([(name, dtype.to_owned(), vec![4, 16], vec![0; 64 * size])].into_iter());
        let adapter = PeftAdapter::from_bytes(&File::new(4, 8.0).config_bytes(), bytes).unwrap();
        let line = adapter.resolve(&shape()).unwrap_err().to_string();
        assert!(line.contains("layer 0 expert 1 up: ") && line.contains("expected BF16, F16 or F32"), "{line}");
    }
}

#[test]
fn scales_have_to_be_finite() {
    let file = each().set("lora_alpha", json!(1e300));
    refused(&file, &["lora_alpha", "a finite f32 scale"]);
    let adapter = each().set("lora_alpha", json!(0)).open().unwrap();
    assert!(adapter.warnings()[0].contains("lora_alpha is 0"));
    assert!(adapter.resolve(&shape()).is_ok());
}

#[test]
fn strict_mode_misses_what_was_targeted() {
    let strict = |file: &File| file.open_with(OpenOptions { strict: true, ..Default::default() });
    let mut file = each();
    file.tensors.retain(|t| !t.0.contains("down_proj"));
    for targets in [json!(["q_proj", "up_proj", "down_proj"]), json!(r".*\.experts\.\d+\.(up|down)_proj")] {
        let file = file.clone().set("target_modules", targets);
        assert!(file.resolve(&shape()).is_ok());
        let line = strict(&file).unwrap_err().to_string();
        assert!(line.contains("target_modules: found no tensor of the targeted down_proj"), "{line}");
    }
    for targets in
        [json!(["q_proj", "up_proj", "gate_proj"]), json!("all-linear"), json!(r".*(up|gate)_proj"), json!(null)]
    {
        assert!(strict(&file.clone().set("target_modules", targets)).is_ok());
    }
    assert!(strict(&file.clone().set("target_modules", json!("(?=x)"))).is_err());
    let mut mixtral = File::new(4, 8.0).set("target_modules", json!(r".*w\d"));
    per_expert(&mut mixtral, &pairs(), "block_sparse_moe", W);
    assert!(strict(&mixtral).is_ok());
    mixtral.tensors.retain(|t| !t.0.contains(".w3."));
    assert!(strict(&mixtral).unwrap_err().to_string().contains("w3"));
}

#[test]
fn folders() {
    let folder = tempfile::tempdir().unwrap();
    let (dir, file) = (folder.path(), each());
    let line = |dir: &std::path::Path| PeftAdapter::open(dir).unwrap_err().to_string();
    let write = |name: &str, bytes: &[u8]| std::fs::write(dir.join(name), bytes).unwrap();
    assert!(line(&dir.join("none")).contains("found nothing, expected a folder"));
    assert!(line(dir).contains("adapter_config.json: found "));
    write("adapter_config.json", &file.config_bytes());
    assert!(line(&dir.join("adapter_config.json")).contains("found a file, expected a folder"));
    assert!(line(dir).contains("found no tensors, expected adapter_model.safetensors"));
    write("adapter_model.bin", b"");
    assert!(line(dir).contains("found adapter_model.bin, which is a pickle, expected adapter_model.safetensors"));
    write("adapter_model-00001-of-00002.safetensors", b"");
    assert!(line(dir).contains("one of several parts"));
    #[cfg(unix)]
    {
        std::os::unix::fs::symlink("gone", dir.join("adapter_model.safetensors")).unwrap();
        assert!(line(dir).contains("found adapter_model-00001-of-00002.safetensors, one of several parts"));
        std::fs::remove_file(dir.join("adapter_model-00001-of-00002.safetensors")).unwrap();
        std::fs::remove_file(dir.join("adapter_model.bin")).unwrap();
        assert!(line(dir).contains("found a link to nothing, expected adapter_model.safetensors"));
        std::fs::remove_file(dir.join("adapter_model.safetensors")).unwrap();
    }
    write("adapter_model.safetensors", b"short");
    assert!(line(dir).contains("adapter_model.safetensors: found 5 bytes"));
    write("adapter_model.safetensors", &file.bytes());
    common::assert_same(&PeftAdapter::open(dir).unwrap().resolve(&shape()).unwrap(), &pairs());

    write("added_tokens.json", br#"{"<|im_end|>": 99, "<extra>": 100}"#);
    let with = |vocab_size| PeftAdapter::open_with(dir, OpenOptions { vocab_size, ..Default::default() });
    assert!(with(None).is_ok() && with(Some(101)).is_ok());
    let error = with(Some(100)).unwrap_err();
    assert!(error.to_string().contains("token \"<extra>\" with id 100, expected ids below the vocabulary's 100"));
    assert!(error.input().unwrap().file.as_ref().unwrap().ends_with("added_tokens.json"));
}
