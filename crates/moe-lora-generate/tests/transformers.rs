//! Logits of transformers and PEFT, alone and in mixed batches, in one step or many.
#![allow(clippy::unwrap_used, clippy::panic, reason = "tests may fail loudly")]

mod common;

use common::feed::feed;
use common::{FAMILIES, Golden, Model, golden};
use moe_lora::Device;
use moe_lora_generate::Part;

#[test]
fn logits_are_those_of_transformers_and_peft() {
    for family in FAMILIES {
        let (model, all) = (Model::open(family, &Device::cpu()), golden(family));
        for fed in feed(&model, &all, usize::MAX) {
            let worst = fed.worst();
            let Golden { prompt, adapter, .. } = fed.golden;
            assert!(worst < 1e-3, "{family}, {prompt:?} with {adapter:?}: {worst:e}");
        }
    }
}

#[test]
fn bits_do_not_depend_on_the_batch_or_on_how_prompts_are_cut() {
    for family in FAMILIES {
        let (model, all) = (Model::open(family, &Device::cpu()), golden(family));
        let together = feed(&model, &all, usize::MAX);
        let pieces = feed(&model, &all, 3);
        for (i, (a, b)) in together.iter().zip(&pieces).enumerate() {
            let alone = feed(&model, &all[i..=i], usize::MAX);
            let bits = |v: &[f32]| v.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
            assert_eq!(bits(&a.logits), bits(&b.logits), "{family}: request {i} in pieces of 3");
            assert_eq!(bits(&a.logits), bits(&alone[0].logits), "{family}: request {i} alone");
        }
    }
}

#[test]
fn what_does_not_fit_is_refused() {
    let model = Model::open("olmoe", &Device::cpu());
    let mut cache = model.decoder.new_cache(4);
    let mut run = |tokens: &[u32]| {
        let mut part = [Part { tokens, cache: &mut cache, adapter: None, logits: true }];
        model.decoder.forward(&mut part).map(|_| ())
    };
    assert!(run(&[1, 2, 3]).is_ok());
    assert!(run(&[]).is_err());
    assert!(run(&[1, 2]).unwrap_err().to_string().contains("1 to 1"));
    assert!(run(&[320]).unwrap_err().to_string().contains("token 320"));
    assert!(run(&[319]).is_ok());
}

#[test]
fn tensors_that_the_settings_do_not_know_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    for file in std::fs::read_dir(common::folder().join("qwen3_moe")).unwrap().map(Result::unwrap) {
        std::fs::copy(file.path(), folder.path().join(file.file_name())).unwrap();
    }
    // Transformers would leave the trained biases out, with a warning.
    let path = folder.path().join("config.json");
    let text = std::fs::read_to_string(&path).unwrap();
    std::fs::write(&path, text.replace("\"attention_bias\": true", "\"attention_bias\": false")).unwrap();
    let checkpoint = moe_lora::Checkpoint::open(folder.path()).unwrap();
    let error = checkpoint.decoder_layer(0).unwrap_err().to_string();
    assert!(
        error.contains("model.layers.0.self_attn.k_proj.bias: found a tensor that the model by config.json"),
        "{error}"
    );
}
