//! Requests from the command line or from a file of JSON lines.

use crate::args::Generate;
use anyhow::Result;
use moe_lora::InputError;
use moe_lora_generate::{Prompt, Request, Sampling};
use serde::Deserialize;
use serde_json::Value;
use std::io::{BufRead, BufReader};

/// A request, and the name that its result gets.
pub(crate) struct Entry {
    pub(crate) id: Value,
    pub(crate) request: Request,
}

/// A line of `--requests`.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Line {
    id: Option<Value>,
    prompt: Option<String>,
    prompt_tokens: Option<Vec<u32>>,
    adapter: Option<String>,
    max_tokens: Option<usize>,
    temperature: Option<f32>,
    top_p: Option<f32>,
    seed: Option<u64>,
}

pub(crate) fn entries(args: &Generate) -> Result<Vec<Entry>> {
    let Some(path) = &args.requests else {
        return Ok(args.prompts.iter().enumerate().map(|(n, text)| prompt(args, n, text)).collect());
    };
    let unreadable = |e: std::io::Error| InputError::new(e.to_string(), "a readable file of JSON lines").in_file(path);
    let file = BufReader::new(std::fs::File::open(path).map_err(unreadable)?);
    let mut entries = Vec::new();
    for (n, line) in file.lines().enumerate() {
        let line = line.map_err(unreadable)?;
        if line.trim().is_empty() {
            continue;
        }
        let wrong = |found: String, expected: &str| {
            InputError::new(found, expected).in_tensor(format!("line {}", n + 1)).in_file(path)
        };
        let line: Line = serde_json::from_str(&line).map_err(|e| wrong(e.to_string(), "a request in JSON"))?;
        let prompt = match (line.prompt, line.prompt_tokens) {
            (Some(text), None) => Prompt::Text(text),
            (None, Some(tokens)) => Prompt::Tokens(tokens),
            _ => return Err(wrong("none or both of them".into(), "prompt or prompt_tokens").into()),
        };
        let sampling = Sampling {
            temperature: line.temperature.unwrap_or(args.temperature),
            top_p: line.top_p.unwrap_or(args.top_p),
            seed: line.seed.unwrap_or(args.seed),
        };
        let max_tokens = line.max_tokens.unwrap_or(args.max_tokens);
        let request = Request { prompt, adapter: line.adapter, max_tokens, sampling };
        entries.push(Entry { id: line.id.unwrap_or_else(|| entries.len().into()), request });
    }
    Ok(entries)
}

/// `NAME: TEXT` for a known name, or the text as it is.
fn prompt(args: &Generate, n: usize, text: &str) -> Entry {
    let known = |name: &str| args.adapters.iter().any(|a| a.name == name);
    let (adapter, text) = match text.split_once(": ") {
        Some((name, rest)) if known(name) => (Some(name.to_owned()), rest),
        Some((name, _)) if !args.adapters.is_empty() && !name.contains(char::is_whitespace) => {
            eprintln!("note: prompt {} is for the base model, as {name:?} is no adapter's name", n + 1);
            (None, text)
        }
        _ => (None, text),
    };
    let sampling = Sampling { temperature: args.temperature, top_p: args.top_p, seed: args.seed };
    let request = Request { prompt: Prompt::Text(text.to_owned()), adapter, max_tokens: args.max_tokens, sampling };
    Entry { id: n.into(), request }
}
