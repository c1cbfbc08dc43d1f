//! Settings of whole models: defaults, both generations of RoPE settings, and what is refused.
#![allow(clippy::unwrap_used, clippy::panic, reason = "tests may fail loudly")]

use moe_lora_core::LayerShape;
use moe_lora_model::synthetic::{TinyModel, write_checkpoint};
use moe_lora_model::{Checkpoint, DecoderConfig, Family, QkNorm};
use serde_json::{Value, json};
use std::path::Path;

/// A checkpoint without attention, whose settings are `changes` (null removes) over those of a tiny model.
fn open(folder: &Path, family: Family, changes: Value) -> Checkpoint {
    let shape = LayerShape::new(4, 2, 32, 16).unwrap();
    write_checkpoint(folder, &TinyModel::new(family, shape)).unwrap();
    let path = folder.join("config.json");
    let mut config: Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
    for (field, value) in changes.as_object().unwrap() {
        config[field] = value.clone();
    }
    std::fs::write(&path, config.to_string()).unwrap();
    Checkpoint::open(folder).unwrap()
}

fn config(family: Family, changes: Value) -> Result<DecoderConfig, String> {
    let folder = tempfile::tempdir().unwrap();
    open(folder.path(), family, changes).decoder_config().map_err(|error| {
        assert!(error.input().unwrap().file.is_some(), "{error}");
        error.to_string()
    })
}

#[test]
fn absent_settings_are_those_of_transformers() {
    let absent = json!({ "num_attention_heads": null, "num_key_value_heads": null });
    let olmoe = config(Family::Olmoe, absent).unwrap();
    assert_eq!((olmoe.num_attention_heads, olmoe.num_key_value_heads, olmoe.head_dim), (16, 16, 2));
    assert_eq!((olmoe.qk_norm, olmoe.clip_qkv, olmoe.rms_norm_eps), (QkNorm::AllHeads, None, 1e-5));
    assert_eq!((olmoe.rope_theta, olmoe.rope_factor, olmoe.max_position_embeddings), (10_000.0, 1.0, 4096));
    assert_eq!((olmoe.vocab_size, olmoe.tie_word_embeddings, olmoe.attention_bias), (50304, false, false));
    let absent = json!({ "num_attention_heads": null, "num_key_value_heads": null, "head_dim": 128 });
    let qwen = config(Family::Qwen3Moe, absent).unwrap();
    assert_eq!((qwen.num_attention_heads, qwen.num_key_value_heads, qwen.head_dim), (32, 4, 128));
    assert_eq!((qwen.qk_norm, qwen.rms_norm_eps, qwen.vocab_size), (QkNorm::EachHead, 1e-6, 151_936));
    assert!(qwen.dense_layers.is_empty() && qwen.eos_token_ids.is_empty());
}

#[test]
fn both_generations_of_rope_settings_are_read() {
    let rope = |changes| config(Family::Olmoe, changes).map(|c| (c.rope_theta, c.rope_factor)).unwrap();
    assert_eq!(rope(json!({ "rope_theta": 5e5 })), (5e5, 1.0));
    assert_eq!(rope(json!({ "rope_parameters": { "rope_type": "default", "rope_theta": 1e6 } })), (1e6, 1.0));
    assert_eq!(rope(json!({ "rope_theta": 5e5, "rope_scaling": { "type": "linear", "factor": 4.0 } })), (5e5, 4.0));
    let linear = json!({ "rope_type": "linear", "rope_theta": 2e4, "factor": 2 });
    assert_eq!(rope(json!({ "rope_parameters": linear })), (2e4, 2.0));
}

#[test]
fn the_generation_settings_decide_what_ends_a_text() {
    let folder = tempfile::tempdir().unwrap();
    let checkpoint = open(folder.path(), Family::Olmoe, json!({ "eos_token_id": 7 }));
    let ends = || checkpoint.decoder_config().map(|c| c.eos_token_ids);
    assert_eq!(ends().unwrap(), [7]);
    let generation = folder.path().join("generation_config.json");
    std::fs::write(&generation, json!({ "eos_token_id": [3, 4] }).to_string()).unwrap();
    assert_eq!(ends().unwrap(), [3, 4]);
    std::fs::write(&generation, json!({ "eos_token_id": null }).to_string()).unwrap();
    assert_eq!(ends().unwrap(), [7]);
    std::fs::write(&generation, json!({ "eos_token_id": "stop" }).to_string()).unwrap();
    assert!(ends().unwrap_err().to_string().contains("generation_config.json: eos_token_id"));
}

#[test]
fn what_is_not_computed_is_refused_by_name() {
    let sliding = json!({ "use_sliding_window": true, "sliding_window": 4096, "head_dim": 8 });
    for (family, changes, why) in [
        (Family::Mixtral, json!({}), "model_type: found \"mixtral\""),
        (Family::Olmoe, json!({ "rope_scaling": { "rope_type": "yarn", "factor": 4.0 } }), "rope_scaling.rope_type"),
        (Family::Olmoe, json!({ "rope_scaling": { "type": "linear", "factor": 0 } }), "rope_scaling.factor"),
        (Family::Olmoe, json!({ "rope_parameters": 5 }), "rope_parameters"),
        (Family::Olmoe, json!({ "rope_parameters": { "partial_rotary_factor": 0.5 } }), "partial_rotary_factor"),
        (Family::Olmoe, json!({ "rope_theta": -1.0 }), "rope_theta"),
        (Family::Qwen3Moe, sliding, "use_sliding_window"),
        (Family::Olmoe, json!({ "num_attention_heads": 3 }), "head_dim"),
        (Family::Olmoe, json!({ "num_attention_heads": 32, "num_key_value_heads": 32 }), "head_dim"),
        (Family::Olmoe, json!({ "num_attention_heads": 4, "num_key_value_heads": 3 }), "num_key_value_heads"),
        (Family::Olmoe, json!({ "num_key_value_heads": 0 }), "num_key_value_heads"),
        (Family::Olmoe, json!({ "vocab_size": 0 }), "vocab_size"),
        (Family::Olmoe, json!({ "eos_token_id": -1 }), "eos_token_id"),
        (Family::Olmoe, json!({ "rms_norm_eps": -1e-5 }), "rms_norm_eps"),
    ] {
        let error = config(family, changes.clone()).expect_err(&changes.to_string());
        assert!(error.contains(why), "{changes}: {error}");
    }
}

#[test]
fn missing_tensors_are_named() {
    let folder = tempfile::tempdir().unwrap();
    let checkpoint = open(folder.path(), Family::Olmoe, json!({}));
    let error = checkpoint.decoder_layer(1).unwrap_err().to_string();
    assert!(error.contains("model.layers.1.self_attn.q_proj.weight: found no such tensor"), "{error}");
    let error = checkpoint.decoder_ends().unwrap_err().to_string();
    assert!(error.contains("model.embed_tokens.weight: found no such tensor"), "{error}");
}
