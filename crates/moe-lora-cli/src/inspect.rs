//! `moe-lora inspect`: what a checkpoint or an adapter is, or why it is refused; what adapters take in a pool.

mod adapter;
mod model;
mod pool;

use crate::args::Inspect;
use crate::table::print_fields;
use anyhow::Result;
use moe_lora::Checkpoint;
use serde_json::{Map, Value};

pub(crate) fn run(args: &Inspect) -> Result<()> {
    let model = args.model.as_ref().map(Checkpoint::open).transpose()?;
    if let (false, Some(model)) = (args.pool.is_empty(), &model) {
        return pool::print(args, model);
    }
    let facts = match &args.adapter {
        Some(dir) => adapter::facts(dir, args.expert_layout, model.as_ref())?,
        None => model.as_ref().map(model::facts).transpose()?.unwrap_or_default(),
    };
    facts.print(args.json)
}

/// What is to be said, once for people and once for programs.
#[derive(Default)]
struct Facts {
    fields: Vec<(&'static str, String)>,
    json: Map<String, Value>,
}

impl Facts {
    /// `key` is the name in JSON; people read it with spaces.
    fn add(&mut self, key: &'static str, text: impl Into<String>, value: impl Into<Value>) {
        self.fields.push((key, text.into()));
        self.json.insert(key.to_owned(), value.into());
    }

    fn print(self, json: bool) -> Result<()> {
        if json {
            println!("{}", serde_json::to_string_pretty(&self.json)?);
        } else {
            print_fields(&self.fields);
        }
        Ok(())
    }
}

/// `0, 1, 2, 5` as `0-2, 5`.
fn ranges(sorted: &[usize]) -> String {
    let runs = sorted.chunk_by(|a, b| a + 1 == *b);
    let run = |run: &[usize]| match run {
        [one] => one.to_string(),
        [first, .., last] => format!("{first}-{last}"),
        [] => String::new(),
    };
    runs.map(run).collect::<Vec<_>>().join(", ")
}

/// Values joined by commas.
fn list<T: ToString>(values: impl IntoIterator<Item = T>) -> String {
    values.into_iter().map(|v| v.to_string()).collect::<Vec<_>>().join(", ")
}

#[cfg(test)]
mod tests {
    #[test]
    fn neighbours_become_ranges() {
        assert_eq!(super::ranges(&[0, 1, 2, 5, 7, 8]), "0-2, 5, 7-8");
        assert_eq!(super::ranges(&[]), "");
    }
}
