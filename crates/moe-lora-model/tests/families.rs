//! Every family, form, format and sharding: what was written is what is loaded, number for number.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "helpers of tests")]

mod common;

use common::{Folder, read, write, write_unpadded};
use moe_lora_core::{DType, ExpertStorage, LayerShape, Matrix, Shard};
use moe_lora_model::synthetic::{ExpertForm, Part, TinyModel};
use moe_lora_model::{Checkpoint, Family};
use safetensors::Dtype;
use serde_json::json;

fn shape() -> LayerShape {
    LayerShape::new(4, 2, 10, 6).unwrap()
}

fn equal(model: &TinyModel, layer: usize, part: Part, expert: usize, matrix: &Matrix) {
    for row in 0..matrix.rows() {
        for col in 0..matrix.cols() {
            let want = model.value(layer, part, expert, row, col);
            assert_eq!(matrix.get(row, col), want, "{model:?} layer {layer} {part:?} of {expert} at {row}, {col}");
        }
    }
}

fn equal_bias(model: &TinyModel, layer: usize, part: Part, expert: usize, bias: &[f32]) {
    let want: Vec<f32> = (0..bias.len()).map(|i| model.value(layer, part, expert, i, 0)).collect();
    assert_eq!(bias, want, "{part:?}");
}

fn check(model: &TinyModel, checkpoint: &Checkpoint, layer: usize) {
    let weights = checkpoint.layer_weights(layer).unwrap();
    assert_eq!(*weights.shape(), model.shape);
    assert_eq!((weights.dtype(), checkpoint.shape().dtype), (model.dtype, model.dtype));
    assert_eq!(weights.routed_scaling_factor(), 1.0, "it is in the router");
    for (e, expert) in weights.experts().iter().enumerate() {
        equal(model, layer, Part::Gate, e, &expert.gate);
        equal(model, layer, Part::Up, e, &expert.up);
        equal(model, layer, Part::Down, e, &expert.down);
        assert_eq!(expert.bias.is_some(), model.family == Family::GptOss);
        if let Some(bias) = &expert.bias {
            equal_bias(model, layer, Part::GateBias, e, &bias.gate);
            equal_bias(model, layer, Part::UpBias, e, &bias.up);
            equal_bias(model, layer, Part::DownBias, e, &bias.down);
        }
    }
    let router = checkpoint.router(layer).unwrap();
    router.validate(&model.shape).unwrap();
    equal(model, layer, Part::Router, 0, &router.weight);
    assert_eq!(router.bias.is_some(), model.family == Family::GptOss);
    assert_eq!(router.selection_bias.is_some(), model.family == Family::DeepseekV3);
    router.bias.iter().for_each(|bias| equal_bias(model, layer, Part::RouterBias, 0, bias));
    router.selection_bias.iter().for_each(|bias| equal_bias(model, layer, Part::SelectionBias, 0, bias));
}

#[test]
fn all_families_forms_formats_and_shardings_load() {
    for family in Family::ALL {
        for form in [ExpertForm::Each, ExpertForm::Fused] {
            for dtype in [DType::F32, DType::F16, DType::Bf16] {
                for shard_bytes in [None, Some(if dtype == DType::F16 { 1 } else { 1500 })] {
                    let model = TinyModel { form, dtype, shard_bytes, seed: 3, ..TinyModel::new(family, shape()) };
                    let folder = Folder::new(&model);
                    let files = std::fs::read_dir(folder.path()).unwrap().count();
                    assert!(if shard_bytes.is_some() { files > 4 } else { files == 2 }, "{files} files");
                    let checkpoint = folder.open();
                    assert_eq!(checkpoint.family(), family);
                    assert_eq!(checkpoint.shape().moe_layers, [0, 1]);
                    assert_eq!(checkpoint.first_moe_layer(), 0);
                    (0..2).for_each(|layer| check(&model, &checkpoint, layer));
                }
            }
        }
    }
}

#[test]
fn storage_is_that_of_the_models_code() {
    for family in Family::ALL {
        let gpt_oss = family == Family::GptOss;
        let want = ExpertStorage { transposed: gpt_oss, interleaved: gpt_oss };
        assert_eq!(Folder::of(family).open().shape().storage, want, "{family}");
    }
}

/// A transposition that needs more than one tile.
#[test]
fn wide_gpt_oss_layers_load() {
    let model = TinyModel { num_layers: 1, ..TinyModel::new(Family::GptOss, LayerShape::new(2, 1, 200, 130).unwrap()) };
    check(&model, &Folder::new(&model).open(), 0);
}

#[test]
fn prefixes_of_multimodal_and_headless_models_are_known() {
    for prefix in ["model.language_model.", "language_model.model.", ""] {
        let model = TinyModel::new(Family::Qwen3Moe, shape());
        let folder = Folder::new(&model);
        folder.edit_model(|tensors| {
            *tensors = std::mem::take(tensors).into_iter().map(|(n, t)| (n.replacen("model.", prefix, 1), t)).collect();
        });
        check(&model, &folder.open(), 1);
    }
}

#[test]
fn a_nested_text_config_is_used() {
    let model = TinyModel::new(Family::DeepseekV3, shape());
    let folder = Folder::new(&model);
    folder
        .edit_json("config.json", |c| *c = json!({"model_type": "kimi_vl", "hidden_size": 3, "text_config": c.take()}));
    check(&model, &folder.open(), 0);
    folder.edit_json("config.json", |c| c["text_config"]["n_group"] = json!(3));
    assert_eq!(folder.refusal(), "config.json: text_config.n_group: found 3, expected a divisor of 4 experts");
}

#[test]
fn without_an_index_all_files_of_the_folder_count() {
    let model = TinyModel { shard_bytes: Some(900), ..TinyModel::new(Family::Olmoe, shape()) };
    let folder = Folder::new(&model);
    std::fs::remove_file(folder.file("model.safetensors.index.json")).unwrap();
    check(&model, &folder.open(), 1);
}

#[test]
fn shards_may_lie_in_folders_and_behind_links() {
    let model = TinyModel { shard_bytes: Some(usize::MAX), ..TinyModel::new(Family::Mixtral, shape()) };
    let folder = Folder::new(&model);
    std::fs::create_dir(folder.file("weights")).unwrap();
    std::fs::rename(folder.file("model-00001-of-00001.safetensors"), folder.file("weights/x.safetensors")).unwrap();
    folder.edit_json("model.safetensors.index.json", |index| {
        let files = index["weight_map"].as_object_mut().unwrap().values_mut();
        files.for_each(|f| *f = json!("weights/x.safetensors"));
    });
    check(&model, &folder.open(), 0);
}

/// Views where the bytes are aligned: nothing is copied, and two calls give the very same storage. Copies where not.
#[test]
fn weights_are_views_of_the_mapped_file() {
    for form in [ExpertForm::Each, ExpertForm::Fused] {
        let model = TinyModel { form, dtype: DType::F32, ..TinyModel::new(Family::Qwen2Moe, shape()) };
        let folder = Folder::new(&model);
        let tensors = read(&folder.file("model.safetensors"));
        for aligned in [true, false] {
            write_unpadded(&folder.file("model.safetensors"), &tensors, aligned);
            let checkpoint = folder.open();
            check(&model, &checkpoint, 1);
            let [a, b] = [0, 1].map(|_| checkpoint.layer_weights(1).unwrap().experts()[2].clone());
            assert_eq!(a.gate.same_storage(&b.gate) && a.up.same_storage(&b.up), aligned);
            let [a, b] = [0, 1].map(|_| checkpoint.router(1).unwrap().weight);
            assert_eq!(a.same_storage(&b), aligned);
        }
    }
}

#[test]
fn misaligned_gpt_oss_tensors_load() {
    let model = TinyModel { dtype: DType::F32, ..TinyModel::new(Family::GptOss, shape()) };
    let folder = Folder::new(&model);
    let tensors = read(&folder.file("model.safetensors"));
    write_unpadded(&folder.file("model.safetensors"), &tensors, false);
    check(&model, &folder.open(), 1);
}

#[test]
fn the_router_keeps_its_own_format() {
    let model = TinyModel::new(Family::DeepseekV2, shape());
    let wide = TinyModel { dtype: DType::F32, ..model.clone() };
    let (folder, other) = (Folder::new(&model), Folder::new(&wide));
    let name = "model.layers.1.mlp.gate.weight";
    let router = read(&other.file("model.safetensors"))[name].clone();
    folder.edit_model(|tensors| *tensors.get_mut(name).unwrap() = router);
    let checkpoint = folder.open();
    assert_eq!(checkpoint.shape().dtype, DType::Bf16);
    let router = checkpoint.router(1).unwrap();
    assert_eq!(router.weight.dtype(), DType::F32);
    equal(&wide, 1, Part::Router, 0, &router.weight);
}

#[test]
fn tensors_of_other_parts_and_layers_are_left_alone() {
    let folder = Folder::of(Family::DeepseekV3);
    folder.edit_model(|tensors| {
        for name in [
            "model.embed_tokens.weight",
            "model.layers.0.self_attn.q_proj.weight",
            "model.layers.0.mlp.shared_experts.gate_proj.weight",
            "model.layers.2.mlp.experts.0.gate_proj.weight", // multi-token prediction
        ] {
            tensors.insert(name.to_owned(), (Dtype::I64, vec![1], vec![0; 8]));
        }
    });
    assert_eq!(folder.open().shape().moe_layers, [0, 1]);
}

#[test]
fn a_checkpoint_cut_down_to_one_layer_serves_it() {
    let model = TinyModel::new(Family::Qwen3Moe, shape());
    let folder = Folder::new(&model);
    folder.edit_model(|tensors| tensors.retain(|name, _| name.contains("layers.1.")));
    let checkpoint = folder.open();
    check(&model, &checkpoint, 1);
    let error = checkpoint.layer_weights(0).unwrap_err();
    assert!(
        error.to_string().contains("model.layers.0.mlp.experts.0.gate_proj.weight: found no such tensor"),
        "{error}"
    );
    assert!(checkpoint.router(0).is_err());
}

#[test]
fn the_writer_says_where_it_failed() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("file");
    write(&file, &Default::default());
    let model = TinyModel::new(Family::Mixtral, shape());
    let error = moe_lora_model::synthetic::write_checkpoint(&file, &model).unwrap_err();
    assert!(error.input().is_none() && error.to_string().contains("file: cannot be written"), "{error}");
}

#[test]
fn ranks_load_their_own_part_of_every_form() {
    for (family, form) in [
        (Family::Qwen3Moe, ExpertForm::Each),
        (Family::Qwen3Moe, ExpertForm::Fused),
        (Family::GptOss, ExpertForm::Each),
        (Family::GptOss, ExpertForm::Fused),
    ] {
        let model = TinyModel { form, seed: 4, ..TinyModel::new(family, LayerShape::new(5, 2, 10, 24).unwrap()) };
        let checkpoint = Folder::new(&model).open();
        let whole = checkpoint.layer_weights(1).unwrap();
        for shard in [(1, 1), (2, 1), (1, 5), (3, 2)].into_iter().flat_map(|(tp, ep)| Shard::grid(tp, ep).unwrap()) {
            let (part, want) = (checkpoint.layer_shard(1, &shard).unwrap(), whole.shard(&shard).unwrap());
            assert_eq!((part.shape(), part.activation()), (want.shape(), want.activation()));
            for (part, want) in part.experts().iter().zip(want.experts()) {
                assert_eq!(part.bias, want.bias);
                for (part, want) in [(&part.gate, &want.gate), (&part.up, &want.up), (&part.down, &want.down)] {
                    assert_eq!((part.shape(), part.to_vec::<f32>()), (want.shape(), want.to_vec::<f32>()), "{shard:?}");
                    let copied = family == Family::GptOss && form == ExpertForm::Fused;
                    assert_eq!(part.same_storage(want), !copied, "{family} {form:?}: a view of the mapped file");
                }
            }
        }
        assert!(checkpoint.layer_shard(1, &Shard::new(0, 1, 0, 6).unwrap()).is_err());
    }
}
