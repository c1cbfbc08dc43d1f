//! What `config.json` means: router settings, layers, activation, for every family and variant.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "helpers of tests")]

mod common;

use common::Folder;
use moe_lora_core::{Activation, GroupLimit, GroupScore, LayerShape, RouterConfig, Scoring};
use moe_lora_model::Family;
use moe_lora_model::synthetic::TinyModel;
use serde_json::{Value, json};

/// A checkpoint of 8 experts, top-2, and 6 layers, with some fields replaced; `null` removes the field.
fn folder(family: Family, changes: &Value) -> Folder {
    let model = TinyModel { num_layers: 6, ..TinyModel::new(family, LayerShape::new(8, 2, 4, 2).unwrap()) };
    let folder = Folder::new(&model);
    for (field, value) in changes.as_object().unwrap() {
        folder.config(field, Some(value.clone()).filter(|v| !v.is_null()));
    }
    folder
}

fn router(family: Family, changes: Value) -> RouterConfig {
    let checkpoint = folder(family, &changes).open();
    let router = checkpoint.router(checkpoint.first_moe_layer()).unwrap();
    assert_eq!(checkpoint.config().router, router.config);
    router.config
}

fn moe_layers(family: Family, changes: Value) -> Vec<usize> {
    folder(family, &changes).open().shape().moe_layers.clone()
}

fn activation(family: Family, changes: Value) -> Activation {
    let checkpoint = folder(family, &changes).open();
    let weights = checkpoint.layer_weights(checkpoint.first_moe_layer()).unwrap();
    assert_eq!(checkpoint.config().activation, weights.activation());
    weights.activation()
}

const SOFTMAX: RouterConfig = RouterConfig::softmax(2);

const fn groups(num_groups: usize, top_groups: usize, score: GroupScore) -> Option<GroupLimit> {
    Some(GroupLimit { num_groups, top_groups, score })
}

#[test]
fn mixtral_and_gpt_oss_always_renormalise() {
    for family in [Family::Mixtral, Family::GptOss] {
        assert_eq!(router(family, json!({})), SOFTMAX);
        assert_eq!(
            router(family, json!({"norm_topk_prob": false, "num_experts_per_tok": 3})),
            RouterConfig::softmax(3)
        );
    }
    assert_eq!(router(Family::Mixtral, json!({"num_experts_per_tok": null})).top_k, 2);
    assert_eq!(router(Family::GptOss, json!({"num_experts_per_tok": null})).top_k, 4);
}

#[test]
fn qwen_and_olmoe_renormalise_if_asked() {
    for (family, top_k) in [(Family::Qwen2Moe, 4), (Family::Qwen3Moe, 8), (Family::Olmoe, 8)] {
        for norm in [true, false] {
            let found = router(family, json!({"norm_topk_prob": norm}));
            assert_eq!(found, RouterConfig { renormalize: norm, ..SOFTMAX }, "{family}");
        }
        let found = router(family, json!({"norm_topk_prob": null, "num_experts_per_tok": null}));
        assert_eq!(found, RouterConfig { renormalize: false, ..RouterConfig::softmax(top_k) }, "{family}");
    }
}

#[test]
fn deepseek_v2_scales_and_never_renormalises() {
    let v2 = |changes| router(Family::DeepseekV2, changes);
    let plain = RouterConfig { renormalize: false, ..SOFTMAX };
    let scaled = |routed_scaling_factor| RouterConfig { routed_scaling_factor, ..plain };
    assert_eq!(v2(json!({"topk_method": "greedy", "n_group": 4, "routed_scaling_factor": 16.0})), scaled(16.0));
    assert_eq!(v2(json!({"topk_method": null, "routed_scaling_factor": null})), plain);
    assert_eq!(v2(json!({"topk_method": "greedy", "routed_scaling_factor": 2, "norm_topk_prob": true})), scaled(2.0));
    let limited = json!({"topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 3, "scoring_func": null});
    assert_eq!(v2(limited), RouterConfig { groups: groups(4, 3, GroupScore::Max), ..scaled(1.5) });
}

#[test]
fn deepseek_v3_is_sigmoid_with_groups() {
    let v3 = |changes| router(Family::DeepseekV3, changes);
    let plain = RouterConfig {
        scoring: Scoring::Sigmoid,
        renormalize_epsilon: 1e-20,
        routed_scaling_factor: 2.5,
        groups: groups(4, 2, GroupScore::TopTwoSum),
        ..SOFTMAX
    };
    assert_eq!(v3(json!({"n_group": 4, "topk_group": 2})), plain);
    let absent = json!({"n_group": 4, "topk_group": null, "norm_topk_prob": null, "routed_scaling_factor": null,
                        "topk_method": null, "scoring_func": null});
    assert_eq!(v3(absent), RouterConfig { groups: groups(4, 4, GroupScore::TopTwoSum), ..plain });
    let other = json!({"n_group": 1, "topk_group": 1, "norm_topk_prob": false, "routed_scaling_factor": 1.25});
    let want = RouterConfig { renormalize: false, routed_scaling_factor: 1.25, ..plain };
    assert_eq!(v3(other), RouterConfig { groups: groups(1, 1, GroupScore::TopTwoSum), ..want });
    let folder = folder(Family::DeepseekV3, &json!({}));
    folder.config("n_group", Value::Null).config("topk_group", Value::Null);
    assert_eq!(folder.open().router(0).unwrap().config, RouterConfig { groups: None, ..plain }, "null for both");
}

#[test]
fn dense_layers_are_left_out() {
    for family in [Family::Mixtral, Family::Olmoe, Family::GptOss] {
        assert_eq!(moe_layers(family, json!({"first_k_dense_replace": 3})), [0, 1, 2, 3, 4, 5]);
    }
    for family in [Family::Qwen2Moe, Family::Qwen3Moe] {
        assert_eq!(moe_layers(family, json!({"decoder_sparse_step": 2})), [1, 3, 5]);
        assert_eq!(moe_layers(family, json!({"mlp_only_layers": [0, 3, 77]})), [1, 2, 4, 5]);
        assert_eq!(moe_layers(family, json!({"decoder_sparse_step": 3, "mlp_only_layers": [2]})), [5]);
        assert_eq!(moe_layers(family, json!({"decoder_sparse_step": null, "mlp_only_layers": null})).len(), 6);
    }
    for family in [Family::DeepseekV2, Family::DeepseekV3] {
        assert_eq!(moe_layers(family, json!({"first_k_dense_replace": 1})), [1, 2, 3, 4, 5]);
        assert_eq!(moe_layers(family, json!({"first_k_dense_replace": 1, "moe_layer_freq": 2})), [2, 4]);
    }
    assert_eq!(moe_layers(Family::DeepseekV2, json!({"first_k_dense_replace": null})).len(), 6);
    assert_eq!(moe_layers(Family::DeepseekV3, json!({"first_k_dense_replace": null})), [3, 4, 5]);
}

#[test]
fn activations_are_those_of_the_config() {
    for (name, want) in [
        ("silu", Activation::Silu),
        ("swish", Activation::Silu),
        ("gelu", Activation::Gelu),
        ("gelu_pytorch_tanh", Activation::GeluTanh),
        ("gelu_new", Activation::GeluTanh),
    ] {
        assert_eq!(activation(Family::Qwen2Moe, json!({"hidden_act": name})), want);
    }
    assert_eq!(activation(Family::Mixtral, json!({"hidden_act": null})), Activation::Silu);
    assert_eq!(activation(Family::GptOss, json!({"swiglu_limit": null, "hidden_act": null})), Activation::GPT_OSS);
    let found = activation(Family::GptOss, json!({"swiglu_limit": 5, "swiglu_alpha": 1.5}));
    assert_eq!(found, Activation::ClampedSwiglu { alpha: 1.5, limit: 5.0 });
}

#[test]
fn the_number_of_experts_has_three_names() {
    for family in Family::ALL {
        for name in ["num_experts", "num_local_experts", "n_routed_experts"] {
            let changes = json!({"num_experts": null, "num_local_experts": null, "n_routed_experts": null});
            let folder = folder(family, &changes);
            folder.config(name, json!(8));
            assert_eq!(folder.open().shape().layer.num_experts, 8);
            folder.config("n_routed_experts", json!(8)).config("num_experts", json!(8));
            folder.config("num_local_experts", Value::Null);
            assert_eq!(folder.open().shape().layer, LayerShape::new(8, 2, 4, 2).unwrap());
        }
    }
}

#[test]
fn the_config_is_there_to_print() {
    let checkpoint = folder(Family::Qwen2Moe, &json!({"decoder_sparse_step": 4})).open();
    let config = checkpoint.config();
    assert_eq!(
        (config.family, config.num_hidden_layers, config.layer),
        (Family::Qwen2Moe, 6, checkpoint.shape().layer)
    );
    assert_eq!(config.moe_layers, [3]);
    assert_eq!(checkpoint.first_moe_layer(), 3);
    assert_eq!(checkpoint.family().to_string(), "Qwen2-MoE");
}

/// Sizes that `config.json` leaves out are those of transformers, and are still checked against the tensors.
#[test]
fn absent_sizes_have_defaults() {
    for (family, field, default) in [
        (Family::Mixtral, "intermediate_size", 14336),
        (Family::Qwen2Moe, "moe_intermediate_size", 1408),
        (Family::Qwen3Moe, "moe_intermediate_size", 768),
        (Family::Olmoe, "intermediate_size", 2048),
        (Family::DeepseekV2, "moe_intermediate_size", 1407),
        (Family::DeepseekV3, "moe_intermediate_size", 2048),
    ] {
        let refusal = folder(family, &json!({ field: null })).refusal();
        assert!(refusal.contains(&format!("found [2, 4], expected [{default}, 4]")), "{refusal}");
    }
    let refusal = folder(Family::GptOss, &json!({"intermediate_size": null})).refusal();
    assert!(refusal.ends_with("found [8, 4, 4], expected [8, 4, 5760] ([E, H, 2I] by config.json)"), "{refusal}");
    let refusal = folder(Family::DeepseekV3, &json!({"n_routed_experts": null})).refusal();
    assert!(
        refusal
            .ends_with("experts.8.gate_proj.weight: found no such tensor, expected it in one of the safetensors files")
    );
}
