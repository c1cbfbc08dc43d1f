//! Every field of adapter_config.json: used, let through, warned of or refused.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use common::File;
use moe_lora_adapter::{AdapterError, OpenOptions, PeftAdapter, TargetModules};
use serde_json::{Value, json};

fn open(field: &str, value: Value) -> Result<PeftAdapter, AdapterError> {
    File::new(4, 8.0).set(field, value).open()
}

#[track_caller]
fn refused(field: &str, value: Value, expected: &str) {
    let error = open(field, value.clone()).expect_err(&format!("{field} = {value}"));
    let input = error.input().unwrap();
    assert_eq!(input.tensor.as_deref(), Some(field), "{error}");
    assert!(input.file.as_ref().unwrap().ends_with("adapter_config.json"), "{error}");
    assert!(error.to_string().contains(expected), "{error}");
}

#[test]
fn what_is_not_plain_lora_is_refused_by_name() {
    for (field, value, expected) in [
        ("peft_type", json!("LOHA"), "expected LORA"),
        ("peft_type", json!(null), "found nothing, expected LORA"),
        ("use_dora", json!(true), "DoRA"),
        ("lora_bias", json!(true), "bias"),
        ("bias", json!("all"), "\"none\""),
        ("bias", json!("lora_only"), "\"none\""),
        ("modules_to_save", json!(["lm_head"]), "\"lm_head\""),
        ("trainable_token_indices", json!([1, 2]), "embeddings"),
        ("trainable_token_indices", json!({"embed_tokens": [1]}), "embeddings"),
        ("fan_in_fan_out", json!(true), "false"),
        ("init_lora_weights", json!("pissa"), "unchanged"),
        ("init_lora_weights", json!("pissa_niter_4"), "unchanged"),
        ("init_lora_weights", json!("olora"), "unchanged"),
        ("init_lora_weights", json!("corda"), "unchanged"),
        ("init_lora_weights", json!("loftq"), "unchanged"),
        ("init_lora_weights", json!("lora_ga"), "unchanged"),
        ("init_lora_weights", json!("of_tomorrow"), "unchanged"),
        ("layer_replication", json!([[0, 4], [2, 5]]), "plain LoRA"),
        ("use_bdlora", json!({"nblocks": 2}), "plain LoRA"),
        ("use_qalora", json!(true), "QALoRA"),
        ("kasa_config", json!({"beta": 1}), "plain LoRA"),
        ("arrow_config", json!({"top_k": 3}), "plain LoRA"),
        ("monteclora_config", json!({"num_samples": 3}), "plain LoRA"),
        ("alora_invocation_tokens", json!([5, 6]), "aLoRA"),
    ] {
        refused(field, value, expected);
    }
}

#[test]
fn wrong_types_are_refused() {
    for (field, value) in [
        ("r", json!(0)),
        ("r", json!(-8)),
        ("r", json!(8.5)),
        ("r", json!("8")),
        ("r", json!(true)),
        ("r", json!(1_u64 << 40)),
        ("lora_alpha", json!("16")),
        ("lora_alpha", json!([16])),
        ("use_rslora", json!("true")),
        ("use_rslora", json!(1)),
        ("use_dora", json!("false")),
        ("rank_pattern", json!([4])),
        ("rank_pattern", json!({"up_proj": 0})),
        ("rank_pattern", json!({"up_proj": "4"})),
        ("rank_pattern", json!({"(?!up)_proj": 4})),
        ("alpha_pattern", json!({"up_proj": null})),
        ("target_modules", json!(3)),
        ("target_modules", json!([3])),
        ("target_parameters", json!("experts.*")),
        ("modules_to_save", json!("lm_head")),
        ("init_lora_weights", json!(3)),
    ] {
        refused(field, value, "");
    }
}

#[test]
fn what_changes_nothing_at_inference_is_let_through() {
    for (field, value) in [
        ("peft_type", json!("lora")),
        ("r", json!(4.0)),
        ("lora_alpha", json!(8.5)),
        ("exclude_modules", json!(["gate"])),
        ("layers_to_transform", json!([1, 2])),
        ("layers_pattern", json!("layers")),
        ("lora_dropout", json!(0.1)),
        ("inference_mode", json!(true)),
        ("runtime_config", json!({"ephemeral_gpu_offload": true})),
        ("megatron_config", json!({"a": 1})),
        ("megatron_core", json!("megatron.core")),
        ("ensure_weight_tying", json!(true)),
        ("velora_config", json!({"num_groups": 4})),
        ("loftq_config", json!({"loftq_bits": 4})),
        ("eva_config", json!({"rho": 2.0})),
        ("corda_config", json!({"cache_file": null})),
        ("lora_ga_config", json!({"scale": "stable"})),
        ("qalora_group_size", json!(16)),
        ("revision", json!("main")),
        ("task_type", json!("CAUSAL_LM")),
        ("auto_mapping", json!({"base_model_class": "M"})),
        ("base_model_name_or_path", json!("org/model")),
        ("init_lora_weights", json!(false)),
        ("init_lora_weights", json!("gaussian")),
        ("init_lora_weights", json!("eva")),
        ("use_bdlora", json!(false)),
        ("a_field_of_tomorrow", json!(false)),
        ("a_field_of_tomorrow", json!(null)),
    ] {
        let adapter = open(field, value.clone()).unwrap_or_else(|e| panic!("{field} = {value}: {e}"));
        let warnings = adapter.warnings();
        assert!(warnings.len() == 1 && warnings[0].starts_with("no expert tensors"), "{field}: {warnings:?}");
    }
    // Absent, in each of its spellings, is the default.
    for field in
        ["use_dora", "modules_to_save", "layer_replication", "rank_pattern", "bias", "lora_alpha", "r", "kasa_config"]
    {
        for absent in [json!(null), json!([]), json!({}), json!("")] {
            assert!(open(field, absent).is_ok(), "{field}");
        }
    }
    let config = open("r", json!(null)).unwrap().config().clone();
    assert_eq!((config.r, config.lora_alpha, config.use_rslora), (8, 8.0, false));
}

#[test]
fn unknown_fields_warn_or_are_refused_in_strict_mode() {
    let file = File::new(4, 8.0).set("a_field_of_tomorrow", json!({"x": 1}));
    assert!(file.open().unwrap().warnings()[0].contains("\"a_field_of_tomorrow\""));
    let error = file.open_with(OpenOptions { strict: true, ..Default::default() }).unwrap_err();
    assert_eq!(error.input().unwrap().tensor.as_deref(), Some("a_field_of_tomorrow"));
}

#[test]
fn an_engine_may_handle_more() {
    let engine_handles = ["score", "alora_invocation_tokens", "trainable_token_indices"].map(str::to_owned).to_vec();
    let options = OpenOptions { engine_handles, ..Default::default() };
    let open = |field: &str, value| File::new(4, 8.0).set(field, value).open_with(options.clone());
    assert!(open("modules_to_save", json!(["score"])).is_ok());
    assert!(open("modules_to_save", json!(["score", "lm_head"])).is_err());
    assert!(open("alora_invocation_tokens", json!([1])).is_ok());
    assert!(open("trainable_token_indices", json!([1])).is_ok());
}

#[test]
fn malformed_text_is_refused() {
    let file = File::new(4, 8.0).bytes();
    let open = |text: &str| PeftAdapter::from_bytes(text.as_bytes(), file.clone());
    let deep = "[".repeat(100_000);
    for text in
        ["", "[]", "{", "null", "{} {}", r#"{"peft_type": "LORA", "r": NaN}"#, &deep, &format!("{{\"x\": {deep}")]
    {
        let error = open(text).unwrap_err();
        assert!(error.to_string().starts_with("adapter_config.json: found "), "{error}");
    }
    let twice = open(r#"{"peft_type": "LORA", "use_dora": true, "use_dora": false}"#).unwrap_err();
    assert!(twice.to_string().contains("use_dora: found the field twice"), "{twice}");
    let many: String = (0..2000).map(|i| format!("\"f{i}\": 1,")).collect();
    assert!(open(&format!("{{{many} \"peft_type\": \"LORA\"}}")).is_err());
}

#[test]
fn the_settings_are_told() {
    let file = File::new(4, 8.0)
        .set("target_modules", json!(["up_proj", "q_proj"]))
        .set("target_parameters", json!(["experts.gate_up_proj"]))
        .set("peft_version", json!("0.18.1"))
        .set("base_model_name_or_path", json!("org/model"))
        .set("use_rslora", json!(true));
    let adapter = file.open().unwrap();
    let config = adapter.config();
    assert_eq!((config.r, config.lora_alpha, config.use_rslora), (4, 8.0, true));
    assert_eq!(config.target_modules, Some(TargetModules::Names(vec!["up_proj".to_owned(), "q_proj".to_owned()])));
    assert_eq!(config.target_parameters, ["experts.gate_up_proj"]);
    assert_eq!(config.peft_version.as_deref(), Some("0.18.1"));
    assert_eq!(serde_json::to_value(config).unwrap()["base_model_name_or_path"], "org/model");
}
