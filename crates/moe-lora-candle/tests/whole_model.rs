//! The example's whole model against transformers and PEFT: the same greedy tokens in one mixed batch.
#![allow(clippy::unwrap_used, clippy::panic, reason = "tests may fail loudly")]

#[path = "../examples/generate/model.rs"]
#[allow(dead_code, reason = "the example uses the rest")]
mod model;

use candle_core::{D, Device};
use model::{Model, Sequence};
use serde_json::Value;
use std::path::{Path, PathBuf};

fn folder() -> PathBuf {
    let beside = Path::new(env!("CARGO_MANIFEST_DIR")).join("../moe-lora-generate/tests/golden");
    std::env::var_os("MOE_LORA_GENERATE_FIXTURES").map_or(beside, PathBuf::from)
}

fn tokens(request: &Value, field: &str) -> Vec<u32> {
    serde_json::from_value(request[field].clone()).unwrap()
}

#[test]
fn a_mixed_batch_gives_the_tokens_of_transformers_and_peft() {
    for family in ["qwen3_moe", "olmoe"] {
        let text = std::fs::read(folder().join(format!("{family}-requests.json"))).unwrap();
        let requests: Vec<Value> = serde_json::from_slice(&text).unwrap();
        let model =
            Model::open(folder().join(family).to_str().unwrap(), &Device::Cpu, &moe_lora::Device::cpu()).unwrap();
        let load = |name: &&str| {
            let dir = folder().join("adapters").join(format!("{family}-{name}"));
            ((*name).to_owned(), model.load(name, dir.to_str().unwrap()).unwrap())
        };
        let adapters: std::collections::HashMap<_, _> =
            ["experts", "everything", "attention"].iter().map(load).collect();
        let sequence =
            |r: &Value| Sequence::new(tokens(r, "prompt_tokens"), r["adapter"].as_str().map(|name| &adapters[name]));
        let mut sequences: Vec<_> = requests.iter().map(sequence).collect();
        let mut compared = 0;
        for n in 0..12 {
            let best = model.step(&mut sequences).unwrap().argmax(D::Minus1).unwrap().to_vec1::<u32>().unwrap();
            for ((sequence, token), request) in sequences.iter_mut().zip(best).zip(&requests) {
                sequence.tokens.push(token);
                // Texts that ended go on here, unseen.
                if let Some(want) = tokens(request, "tokens").get(n) {
                    let (prompt, adapter) = (&request["prompt"], &request["adapter"]);
                    assert_eq!(token, *want, "{family}: token {n} of {prompt} with {adapter}");
                    compared += 1;
                }
            }
        }
        assert!(compared > 90, "{compared}");
    }
}
