//! The experts on a GPU, which takes the f32 fixtures in bf16: logits near those of transformers and PEFT, and the same
//! greedy tokens wherever rounding cannot change them.
#![allow(clippy::unwrap_used, clippy::panic, reason = "tests may fail loudly")]

mod common;

use common::feed::feed;
use common::{ADAPTERS, FAMILIES, Golden, Model, adapter_dir, folder, golden};
use moe_lora::Device;
use moe_lora_cuda::testing;
use moe_lora_generate::{Engine, Event, Options, Prompt, Request};
use std::collections::HashMap;

/// What bf16 may change in a logit of these models, whose logits have a root mean square of about 1.
const BOUND: f32 = 0.05;

fn gpu(test: &str) -> Option<Device> {
    testing::gpu(test).map(|_| Device::cuda(0).unwrap())
}

/// New tokens up to the first one whose lead over the next best rounding could take away.
fn certain(golden: &Golden) -> usize {
    let lead = |logits: &[f32]| {
        let mut sorted = logits.to_vec();
        sorted.sort_by(|a, b| b.total_cmp(a));
        sorted[0] - sorted[1]
    };
    let vocab = golden.logits.len() / golden.tokens.len();
    golden.logits.chunks(vocab).position(|logits| lead(logits) < 2.0 * BOUND).unwrap_or(golden.tokens.len())
}

#[test]
fn logits_are_near_those_of_transformers_and_peft() {
    let Some(device) = gpu("generate: logits") else { return };
    for family in FAMILIES {
        let (model, all) = (Model::open(family, &device), golden(family));
        let (mut worst, mut squares, mut count) = (0.0_f32, 0.0, 0);
        for fed in feed(&model, &all, usize::MAX) {
            worst = worst.max(fed.worst());
            squares += fed.logits.iter().zip(&fed.golden.logits).map(|(a, b)| f64::from(a - b).powi(2)).sum::<f64>();
            count += fed.logits.len();
        }
        println!(
            "{family}: logits differ by at most {worst:.4}, {:.4} on average",
            (squares / f64::from(count as u32)).sqrt()
        );
        assert!(worst < BOUND, "{family}: {worst}");
        // Bits on one GPU do not change from run to run.
        let runs = [(); 2].map(|()| feed(&model, &all, 3).into_iter().map(|fed| fed.logits).collect::<Vec<_>>());
        assert_eq!(runs[0], runs[1], "{family}");
    }
}

#[test]
fn requests_that_come_and_go_get_their_tokens() {
    let Some(device) = gpu("generate: requests") else { return };
    let mut sure = 0;
    for family in FAMILIES {
        let all = golden(family);
        for (max_batch, max_step_tokens) in [(64, 256), (4, 16), (1, 256)] {
            let options = Options { device: device.clone(), max_batch, max_step_tokens, ..Options::default() };
            let mut engine = Engine::open(folder().join(family), options, |_, _| ()).unwrap();
            ADAPTERS.iter().for_each(|name| engine.register(name, adapter_dir(family, name)));
            let mut done = HashMap::new();
            let mut waiting = all.iter();
            // One more request at every step.
            loop {
                let next = waiting.next().map(|golden| {
                    let request = Request::new(Prompt::Text(golden.prompt.clone()), golden.adapter.as_deref());
                    engine.submit(Request { max_tokens: 12, ..request })
                });
                if next.is_none() && engine.is_idle() {
                    break;
                }
                for event in engine.step().unwrap() {
                    match event {
                        Event::Finished { id, completion, .. } => _ = done.insert(id, completion.tokens),
                        Event::Failed { error, .. } => panic!("{error}"),
                        _ => {}
                    }
                }
            }
            for (id, golden) in (0..).zip(&all) {
                let n = certain(golden);
                assert_eq!(
                    done[&id][..n],
                    golden.tokens[..n],
                    "{family}, {:?} with {:?}",
                    golden.prompt,
                    golden.adapter
                );
                sure += n;
            }
            assert_eq!(engine.statistics().loads, 3);
        }
    }
    println!("{sure} tokens are those of transformers for certain");
    assert!(sure > 100);
}
