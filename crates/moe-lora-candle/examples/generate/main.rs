//! A whole model on candle: attention and the rest are candle's operations, experts are this crate's.
//!
//!     cargo run --release -p moe-lora-candle --example generate -- MODEL [NAME=ADAPTER]... IN OUT
//!
//! IN and OUT are JSON lines as those of `moe-lora generate --requests`, with `prompt_tokens`. All requests run as one batch;
//! tokens are the best ones. `moe-lora-generate` is the same without candle, by continuous batching.
#![allow(clippy::print_stdout, clippy::print_stderr, reason = "an example speaks")]

mod model;

use candle_core::{D, Device};
use model::{Model, Sequence};
use serde_json::{Value, json};
use std::collections::HashMap;
use std::error::Error;
use std::time::Instant;

fn main() -> Result<(), Box<dyn Error>> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let [folder, adapters @ .., input, output] = args.as_slice() else {
        return Err("MODEL [NAME=DIR]... IN OUT".into());
    };
    let model = Model::open(folder, &Device::Cpu, &moe_lora::Device::cpu())?;
    let named = adapters.iter().map(|a| a.split_once('=').ok_or("an adapter that is not NAME=DIR"));
    let named = named.collect::<Result<Vec<_>, _>>()?;
    let lines = std::fs::read_to_string(input)?;
    let requests = lines.lines().map(serde_json::from_str).collect::<Result<Vec<Value>, _>>()?;

    let start = Instant::now();
    let load = |(name, dir): &(&str, &str)| Ok((name.to_string(), model.load(name, dir)?));
    let adapters = named.iter().map(load).collect::<Result<HashMap<_, _>, Box<dyn Error>>>()?;
    let mut running = Vec::new();
    let mut prompts = 0;
    for (n, request) in requests.iter().enumerate() {
        let tokens: Vec<u32> = serde_json::from_value(request["prompt_tokens"].clone())?;
        let adapter = request["adapter"].as_str().map(|name| adapters.get(name).ok_or("an unknown adapter"));
        let most = request["max_tokens"].as_u64().unwrap_or(128) as usize;
        prompts += tokens.len();
        running.push((n, tokens.len(), most, Sequence::new(tokens, adapter.transpose()?)));
    }
    let mut done: Vec<Option<Vec<u32>>> = vec![None; requests.len()];
    let mut new = 0;
    while !running.is_empty() {
        let (facts, mut sequences): (Vec<_>, Vec<_>) = running.into_iter().map(|(n, p, m, s)| ((n, p, m), s)).unzip();
        let best = model.step(&mut sequences)?.argmax(D::Minus1)?.to_vec1::<u32>()?;
        new += best.len();
        running = Vec::new();
        for (((n, prompt, most), mut sequence), token) in facts.into_iter().zip(sequences).zip(best) {
            sequence.tokens.push(token);
            let ended = model.config().eos_token_ids.contains(&token) || sequence.tokens.len() - prompt >= most;
            match ended {
                true => done[n] = Some(sequence.tokens[prompt..].to_vec()),
                false => running.push((n, prompt, most, sequence)),
            }
        }
    }
    let seconds = start.elapsed().as_secs_f64();
    let results: String = requests
        .iter()
        .zip(&done)
        .map(|(r, tokens)| format!("{}\n", json!({ "id": r["id"], "adapter": r["adapter"], "tokens": tokens })))
        .collect();
    std::fs::write(output, results)?;
    let texts = requests.len();
    eprintln!(
        "{texts} texts: {prompts} prompt tokens and {new} new ones in {seconds:.3} s, {:.1} new tokens/s",
        f64::from(new as u32) / seconds
    );
    Ok(())
}
