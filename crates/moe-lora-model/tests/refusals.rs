//! Every kind of bad input, one case each: the message names file, tensor or field, what was found, what was expected.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "helpers of tests")]

mod common;

use common::Folder;
use moe_lora_core::{DType, LayerShape};
use moe_lora_model::synthetic::{ExpertForm, TinyModel};
use moe_lora_model::{Checkpoint, Family};
use safetensors::Dtype;
use serde_json::{Value, json};

const INDEX: &str = "model.safetensors.index.json";
const SHARD_1: &str = "model-00001-of-00002.safetensors";
const SHARD_2: &str = "model-00002-of-00002.safetensors";
const GATE: &str = "model.layers.1.mlp.experts.3.gate_proj.weight";

fn qwen() -> Folder {
    Folder::of(Family::Qwen3Moe)
}

/// Two shards of one layer each.
fn sharded() -> Folder {
    let model = TinyModel::new(Family::Qwen3Moe, LayerShape::new(4, 2, 8, 6).unwrap());
    let layer_bytes = 2 * (model.shape.weight_count() + 4 * 8);
    let folder = Folder::new(&TinyModel { shard_bytes: Some(layer_bytes), ..model });
    assert!(folder.file(SHARD_2).exists());
    folder
}

fn refused_config(family: Family, field: &str, value: impl Into<Option<Value>>, refusal: &str) {
    let folder = Folder::of(family);
    assert_eq!(folder.config(field, value).refusal(), format!("config.json: {field}: {refusal}"));
}

#[test]
fn missing_folders_and_files() {
    let folder = qwen();
    let error = Checkpoint::open(folder.file("none")).unwrap_err();
    assert!(error.input().is_some());
    assert!(error.to_string().ends_with("none: found no such folder, expected a folder with a checkpoint"));
    std::fs::remove_file(folder.file("model.safetensors")).unwrap();
    let refusal = folder.refusal();
    assert!(
        refusal.ends_with("found 0 safetensors files, expected model.safetensors, or 1 to 10000 other ones"),
        "{refusal}"
    );
    std::fs::remove_file(folder.file("config.json")).unwrap();
    let refusal = folder.refusal();
    assert!(refusal.starts_with("config.json: found No such file"), "{refusal}");
    assert!(refusal.ends_with("expected a readable JSON file"), "{refusal}");
    let folder = qwen();
    std::fs::create_dir(folder.file(INDEX)).unwrap();
    assert!(folder.refusal().starts_with(INDEX), "an index that cannot be read is not an absent one");
}

#[test]
fn configs_that_are_no_config() {
    let folder = qwen();
    std::fs::write(folder.file("config.json"), "{").unwrap();
    assert!(folder.refusal().starts_with("config.json: found EOF while parsing"));
    std::fs::write(folder.file("config.json"), "[]").unwrap();
    assert_eq!(folder.refusal(), "config.json: found JSON that is no object, expected an object of settings");
    std::fs::write(folder.file("config.json"), vec![b' '; 5 << 20]).unwrap();
    assert_eq!(folder.refusal(), "config.json: found 5242880 bytes, expected at most 4194304 bytes");
}

#[test]
fn model_types() {
    let known = "expected one of mixtral, qwen2_moe, qwen3_moe, olmoe, deepseek_v2, deepseek_v3, gpt_oss";
    refused_config(Family::Mixtral, "model_type", None, &format!("found nothing, {known}"));
    refused_config(Family::Mixtral, "model_type", json!("llama"), &format!("found \"llama\", {known}"));
    refused_config(Family::Mixtral, "model_type", json!(3), "found 3, expected a string");
}

#[test]
fn sizes_in_the_config() {
    let whole = "expected a whole number from 0 to 1048576";
    let size = "expected 1 to 1048576";
    refused_config(Family::Mixtral, "num_experts_per_tok", json!(0), &format!("found 0, {size}"));
    refused_config(Family::Qwen3Moe, "hidden_size", json!(-8), &format!("found -8, {whole}"));
    refused_config(Family::Qwen3Moe, "hidden_size", json!(8.5), &format!("found 8.5, {whole}"));
    refused_config(Family::Qwen3Moe, "hidden_size", json!("8"), &format!("found \"8\", {whole}"));
    refused_config(Family::Qwen3Moe, "hidden_size", json!(0), &format!("found 0, {size}"));
    refused_config(Family::Qwen3Moe, "num_experts", json!(0), &format!("found 0, {size}"));
    refused_config(Family::Qwen3Moe, "moe_intermediate_size", json!(0), &format!("found 0, {size}"));
    refused_config(
        Family::Mixtral,
        "intermediate_size",
        json!(u64::MAX),
        &format!("found 18446744073709551615, {whole}"),
    );
    refused_config(Family::Mixtral, "num_hidden_layers", json!(0), "found 0, expected 1 to 10000");
    refused_config(Family::Mixtral, "num_hidden_layers", json!(1_000_000), "found 1000000, expected 1 to 10000");
}

#[test]
fn numbers_of_experts_that_disagree() {
    let refusal = "found 8, expected 4, as num_experts says";
    refused_config(Family::Qwen3Moe, "num_local_experts", json!(8), refusal);
    refused_config(Family::Qwen3Moe, "n_routed_experts", json!(8), refusal);
    refused_config(
        Family::DeepseekV2,
        "n_routed_experts",
        json!("4"),
        "found \"4\", expected a whole number from 0 to 1048576",
    );
}

#[test]
fn router_settings() {
    use Family::{DeepseekV2, DeepseekV3, Mixtral, Qwen2Moe};
    use refused_config as refused;
    refused(Mixtral, "num_experts_per_tok", json!(5), "found 5 experts a token, expected at most the layer's 4");
    refused(DeepseekV2, "num_experts_per_tok", None, "found nothing, expected the number of experts a token uses");
    refused(DeepseekV3, "n_group", json!(3), "found 3, expected a divisor of 4 experts");
    refused(DeepseekV3, "n_group", json!(0), "found 0, expected a divisor of 4 experts");
    refused(DeepseekV3, "topk_group", json!(3), "found 3, expected 1 to 2");
    refused(DeepseekV2, "n_group", None, "found nothing, expected a number, for group-limited top-k");
    refused(
        DeepseekV2,
        "topk_method",
        json!("noaux_tc"),
        "found \"noaux_tc\", expected \"greedy\" or \"group_limited_greedy\"",
    );
    refused(DeepseekV3, "topk_method", json!("greedy"), "found \"greedy\", expected \"noaux_tc\"");
    refused(DeepseekV3, "scoring_func", json!("softmax"), "found \"softmax\", expected \"sigmoid\"");
    refused(DeepseekV2, "scoring_func", json!("sigmoid"), "found \"sigmoid\", expected \"softmax\"");
    refused(DeepseekV3, "routed_scaling_factor", json!(1e300), "found 1e+300, expected a finite number");
    refused(DeepseekV3, "norm_topk_prob", json!(1), "found 1, expected true or false");
    refused(Qwen2Moe, "norm_topk_prob", json!("yes"), "found \"yes\", expected true or false");
    let folder = Folder::new(&TinyModel::new(DeepseekV2, LayerShape::new(8, 3, 4, 2).unwrap()));
    folder.config("n_group", json!(4));
    assert_eq!(folder.refusal(), "config.json: num_experts_per_tok: found 3, expected at most 1 groups of 2");
    let folder = Folder::of(DeepseekV3);
    folder.config("n_group", json!(4)).config("topk_group", json!(2));
    assert_eq!(folder.refusal(), "config.json: n_group: found groups of 1, expected groups of at least 2");
}

#[test]
fn layers_and_activations() {
    use Family::{DeepseekV3, GptOss, Mixtral, Qwen2Moe};
    refused_config(Qwen2Moe, "decoder_sparse_step", json!(0), "found 0, expected at least 1");
    refused_config(DeepseekV3, "moe_layer_freq", json!(0), "found 0, expected at least 1");
    refused_config(Qwen2Moe, "mlp_only_layers", json!([-1]), "found a list of 1, expected a list of layer indices");
    refused_config(Mixtral, "hidden_act", json!("relu"), "found \"relu\", expected silu, gelu or gelu_pytorch_tanh");
    refused_config(GptOss, "hidden_act", json!("gelu"), "found \"gelu\", expected \"silu\"");
    refused_config(GptOss, "swiglu_limit", json!(-7.0), "found -7.0, expected a positive number");
    let folder = Folder::of(DeepseekV3);
    let refusal = folder.config("first_k_dense_replace", json!(2)).refusal();
    assert_eq!(
        refusal,
        "config.json: num_hidden_layers: found 2 decoder layers, all dense, expected at least one MoE layer"
    );
}

#[test]
fn quantised_checkpoints() {
    let dense = "expected f32, f16 or bf16 weights (dequantise it first)";
    for (family, method) in [(Family::GptOss, "mxfp4"), (Family::DeepseekV3, "fp8"), (Family::Mixtral, "awq")] {
        let found = format!("found a checkpoint quantised with {method}, {dense}");
        refused_config(family, "quantization_config", json!({"quant_method": method}), &found);
    }
    let found = format!("found a checkpoint quantised with unnamed method, {dense}");
    refused_config(Family::Mixtral, "compression_config", json!({"x": 1}), &found);
    for harmless in [json!({}), Value::Null] {
        assert_eq!(qwen().config("quantization_config", harmless).open().shape().dtype, DType::Bf16);
    }
}

#[test]
fn quantised_tensors() {
    let folder = Folder::of(Family::GptOss);
    folder.edit_model(|tensors| {
        let name = "model.layers.1.mlp.experts.gate_up_proj";
        tensors.remove(name).unwrap();
        tensors.insert(format!("{name}_blocks"), (Dtype::U8, vec![4, 12, 1, 16], vec![0; 768]));
    });
    let refusal = folder.refusal();
    assert!(
        refusal.starts_with("model.safetensors: model.layers.1.mlp.experts.gate_up_proj_blocks: found MXFP4 weights")
    );

    let folder = qwen();
    folder.edit_model(|tensors| *tensors.get_mut(GATE).unwrap() = (Dtype::F8_E4M3, vec![6, 8], vec![0; 48]));
    let want = "found F8_E4M3 numbers, expected F32, F16 or BF16 (quantised checkpoints have to be dequantised first)";
    assert_eq!(folder.refusal(), format!("model.safetensors: {GATE}: {want}"));

    let folder = qwen();
    let scale = format!("{GATE}_scale_inv");
    folder.edit_model(|tensors| drop(tensors.insert(scale.clone(), (Dtype::F32, vec![1, 1], vec![0; 4]))));
    assert!(folder.refusal().starts_with(&format!("model.safetensors: {scale}: found a part of quantised weights")));
}

#[test]
fn shards_that_are_missing_or_broken_whichever_layer_they_hold() {
    let folder = sharded();
    let whole = std::fs::read(folder.file(SHARD_2)).unwrap();
    std::fs::write(folder.file(SHARD_2), &whole[..whole.len() - 100]).unwrap();
    let refusal = folder.refusal();
    assert!(
        refusal.starts_with(&format!("{SHARD_2}: found {} bytes of data", 2 * (3 * 4 * 48 + 32) - 100)),
        "{refusal}"
    );
    assert!(refusal.contains("bytes that the header describes"), "{refusal}");
    std::fs::write(folder.file(SHARD_2), &whole[..100]).unwrap();
    assert!(folder.refusal().starts_with(&format!("{SHARD_2}: found a header of")));
    std::fs::write(folder.file(SHARD_2), b"").unwrap();
    assert_eq!(folder.refusal(), format!("{SHARD_2}: found 0 bytes, expected a safetensors file of at least 8 bytes"));
    std::fs::remove_file(folder.file(SHARD_2)).unwrap();
    let refusal = folder.refusal();
    assert!(refusal.starts_with(&format!("{SHARD_2}: found No such file")), "{refusal}");
}

#[test]
fn indexes() {
    for outside in ["../model.safetensors", "/etc/passwd", "", "a/../../x", "a\\b"] {
        let folder = sharded();
        folder.edit_json(INDEX, |index| index["weight_map"][GATE] = json!(outside));
        let refusal = folder.refusal();
        let want = format!("{INDEX}: found the file name {outside:?}, expected a name inside the folder");
        assert_eq!(refusal, want);
    }
    let folder = sharded();
    folder.edit_json(INDEX, |index| index["weight_map"][GATE] = json!(SHARD_1));
    let want = format!("{INDEX}: {GATE}: found {SHARD_1}, which lacks the tensor, expected a file that holds it");
    assert_eq!(folder.refusal(), want);
    folder.edit_json(INDEX, |index| index["weight_map"] = json!(["a"]));
    assert!(
        folder.refusal().starts_with(&format!("{INDEX}: found invalid type: sequence, expected a map from tensor"))
    );
    folder.edit_json(INDEX, |index| *index = json!({"metadata": {}}));
    assert!(folder.refusal().starts_with(&format!("{INDEX}: found missing field `weight_map`")));
    folder.edit_json(INDEX, |index| *index = json!({"weight_map": {}}));
    assert!(folder.refusal().contains("model.layers.N.mlp.experts: found no expert weights"));
    let many: serde_json::Map<_, _> = (0..10_001).map(|n| (n.to_string(), json!(n.to_string()))).collect();
    folder.edit_json(INDEX, |index| *index = json!({ "weight_map": many }));
    assert!(folder.refusal().starts_with(&format!("{INDEX}: found more than 10000 files")));
}

#[test]
fn a_tensor_in_two_shards() {
    let folder = sharded();
    let twin = common::read(&folder.file(SHARD_2))[GATE].clone();
    folder.edit(SHARD_1, |tensors| drop(tensors.insert(GATE.to_owned(), twin)));
    let refusal = folder.refusal();
    let want = format!("{SHARD_2}: {GATE}: found it in {SHARD_1} also, expected each tensor in one file");
    assert_eq!(refusal, want);
}

#[test]
fn tensors_of_the_wrong_shape() {
    let folder = qwen();
    folder.edit_model(|tensors| tensors.get_mut(GATE).unwrap().1 = vec![8, 6]);
    assert_eq!(
        folder.refusal(),
        format!("model.safetensors: {GATE}: found [8, 6], expected [6, 8] ([I, H] by config.json)")
    );

    let folder = qwen();
    folder.edit_model(|tensors| tensors.get_mut("model.layers.0.mlp.gate.weight").unwrap().1 = vec![32]);
    let want = "model.safetensors: model.layers.0.mlp.gate.weight: found [32], expected [4, 8] ([E, H] by config.json)";
    assert_eq!(folder.refusal(), want);

    let fused = TinyModel::new(Family::Mixtral, LayerShape::new(4, 2, 8, 6).unwrap());
    let folder = Folder::new(&TinyModel { form: ExpertForm::Fused, ..fused });
    let refusal = folder.config("num_local_experts", json!(3)).refusal();
    let want = "experts.gate_up_proj: found [4, 12, 8], expected [3, 12, 8] ([E, 2I, H] by config.json)";
    assert!(refusal.ends_with(want), "{refusal}");
}

#[test]
fn experts_missing_or_too_many() {
    let folder = qwen();
    folder.edit_model(|tensors| drop(tensors.remove(GATE)));
    let refusal = folder.refusal();
    assert!(refusal.ends_with(&format!("{GATE}: found no such tensor, expected it in one of the safetensors files")));
    let refusal = qwen().config("num_experts", json!(5)).refusal();
    assert!(refusal.contains("model.layers.0.mlp.experts.4.gate_proj.weight: found no such tensor"), "{refusal}");
    let refusal = qwen().config("num_experts", json!(3)).refusal();
    let want = "experts.3.down_proj.weight: found expert 3, expected experts 0 to 2 by config.json";
    assert_eq!(refusal, format!("model.safetensors: model.layers.0.mlp.{want}"));
    let folder = Folder::of(Family::GptOss);
    folder.edit_model(|tensors| drop(tensors.remove("model.layers.1.mlp.experts.down_proj_bias")));
    assert!(folder.refusal().contains("model.layers.1.mlp.experts.down_proj_bias: found no such tensor"));
    let folder = Folder::of(Family::DeepseekV3);
    folder.edit_model(|tensors| drop(tensors.remove("model.layers.1.mlp.gate.e_score_correction_bias")));
    assert!(folder.refusal().contains("e_score_correction_bias: found no such tensor"));
}

#[test]
fn tensors_that_the_family_does_not_have() {
    for name in
        ["experts.0.gate_proj.bias", "experts.00.gate_proj.weight", "experts.0.w1.weight", "experts.x", "experts.0"]
    {
        let folder = qwen();
        let name = format!("model.layers.0.mlp.{name}");
        folder.edit_model(|tensors| drop(tensors.insert(name.clone(), (Dtype::BF16, vec![6], vec![0; 12]))));
        let refusal = folder.refusal();
        let want =
            format!("model.safetensors: {name}: found a tensor that this family does not have, expected one weight");
        assert!(refusal.starts_with(&want), "{refusal}");
    }
    let folder = qwen();
    folder.edit_model(|tensors| {
        tensors.insert("model.layers.0.mlp.experts.down_proj".to_owned(), (Dtype::BF16, vec![4, 8, 6], vec![0; 384]));
    });
    let want = "found a tensor that this family does not have, expected gate_up_proj and down_proj of all experts";
    assert!(folder.refusal().ends_with(want), "both forms");
    let folder = Folder::of(Family::DeepseekV2);
    folder.edit_model(|tensors| {
        let name = "model.layers.0.mlp.gate.e_score_correction_bias";
        tensors.insert(name.to_owned(), (Dtype::F32, vec![4], vec![0; 16]));
    });
    assert!(folder.refusal().contains("found a tensor that this family's router does not have"));
}

#[test]
fn two_spellings_of_one_model() {
    let folder = Folder::of(Family::Mixtral);
    folder.edit_model(|tensors| {
        tensors.insert("model.layers.0.mlp.experts.down_proj".to_owned(), (Dtype::BF16, vec![1], vec![0; 2]));
    });
    let refusal = folder.refusal();
    assert!(
        refusal
            .contains("model.layers.N.block_sparse_moe.experts: found experts under model.layers.N.mlp.experts also")
    );
}

#[test]
fn formats_that_differ() {
    let folder = qwen();
    folder.edit_model(|tensors| *tensors.get_mut(GATE).unwrap() = (Dtype::F32, vec![6, 8], vec![0; 192]));
    let want = format!("model.safetensors: {GATE}: found f32, expected bf16, as the layer's other experts");
    assert_eq!(folder.refusal(), want);
    let folder = qwen();
    folder.edit_model(|tensors| {
        for (name, tensor) in tensors.iter_mut() {
            if name.contains("layers.1.mlp.experts") {
                tensor.0 = Dtype::F16;
            }
        }
    });
    let refusal = folder.refusal();
    assert!(
        refusal.ends_with("model.layers.1.mlp.experts: found f16, expected bf16, as the experts of layer 0"),
        "{refusal}"
    );
}

#[test]
fn biases_that_are_not_finite() {
    let folder = Folder::of(Family::DeepseekV3);
    let name = "model.layers.1.mlp.gate.e_score_correction_bias";
    folder.edit_model(|tensors| tensors.get_mut(name).unwrap().2[8..12].copy_from_slice(&f32::NAN.to_le_bytes()));
    let error = folder.open().router(1).unwrap_err().to_string();
    assert!(error.ends_with(&format!("{name}: found NaN at place 2, expected finite numbers")), "{error}");
}

#[test]
fn layers_without_experts() {
    let model = TinyModel::new(Family::DeepseekV2, LayerShape::new(4, 2, 8, 6).unwrap());
    let folder = Folder::new(&TinyModel { num_layers: 4, ..model });
    folder.config("first_k_dense_replace", json!(1));
    let checkpoint = folder.open();
    for layer in [0, 4, usize::MAX] {
        for error in [checkpoint.layer_weights(layer).unwrap_err(), checkpoint.router(layer).unwrap_err()] {
            let text = error.to_string();
            assert!(error.input().is_some());
            let want = format!("config.json: found layer {layer}, expected a MoE layer: 1 to 3");
            assert!(text.ends_with(&want), "{text}");
        }
    }
}
