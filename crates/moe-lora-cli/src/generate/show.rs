//! Texts as they grow: streamed for people, or a JSON line each when they are done.

use super::line;
use super::requests::Entry;
use crate::args::Generate;
use anyhow::{Context, Result};
use moe_lora_generate::{Event, Finish, Prompt, RequestId};
use serde_json::json;
use std::fs::File;
use std::io::{Write, stdout};

pub(crate) enum Show {
    /// All texts in the order of the prompts: the first that is not done streams, what others say meanwhile is kept.
    Texts {
        /// The one that streams.
        current: usize,
        /// What each has said and was not shown, and whether it is done.
        kept: Vec<(String, bool)>,
    },
    /// Lines for `--output`, or for standard output.
    Lines(Option<File>),
}

impl Show {
    /// Begins to show, when the model is loaded.
    pub(crate) fn begin(&self, entries: &[Entry]) -> Result<()> {
        match self {
            Self::Texts { .. } => header(&mut stdout(), entries, 0),
            Self::Lines(_) => Ok(()),
        }
    }

    pub(crate) fn new(args: &Generate, entries: &[Entry]) -> Result<Self> {
        if args.requests.is_none() {
            return Ok(Self::Texts { current: 0, kept: vec![(String::new(), false); entries.len()] });
        }
        let create = |path| File::create(path).with_context(|| format!("{path:?}: cannot be written"));
        Ok(Self::Lines(args.output.as_ref().map(create).transpose()?))
    }

    pub(crate) fn take(&mut self, entries: &[Entry], event: Event) -> Result<()> {
        match event {
            Event::Token { id, text, .. } => self.text(entries, id, &text, false),
            Event::Finished { id, rest, completion } => {
                let finish = match completion.finish {
                    Finish::Stop => "stop",
                    Finish::Length => "length",
                };
                let adapter = entries.get(id as usize).and_then(|e| e.request.adapter.as_deref());
                self.line(&json!({
                    "id": entries.get(id as usize).map(|e| &e.id),
                    "adapter": adapter,
                    "text": completion.text,
                    "tokens": completion.tokens,
                    "prompt_tokens": completion.prompt_tokens,
                    "finish_reason": finish,
                }))?;
                self.text(entries, id, &rest, true)
            }
            Event::Failed { id, error } => {
                let entry = entries.get(id as usize);
                let error = line(&error);
                self.line(&json!({
                    "id": entry.map(|e| &e.id),
                    "adapter": entry.and_then(|e| e.request.adapter.as_deref()),
                    "error": error,
                }))?;
                self.text(entries, id, &format!("(failed: {error})"), true)
            }
            Event::Loaded { adapter, warnings, .. } => {
                warnings.iter().for_each(|warning| eprintln!("warning: adapter {adapter}: {warning}"));
                Ok(())
            }
            _ => Ok(()),
        }
    }

    fn line(&mut self, value: &serde_json::Value) -> Result<()> {
        match self {
            Self::Texts { .. } => {}
            Self::Lines(Some(file)) => writeln!(file, "{value}").context("--output")?,
            Self::Lines(None) => writeln!(stdout(), "{value}")?,
        }
        Ok(())
    }

    fn text(&mut self, entries: &[Entry], id: RequestId, text: &str, done: bool) -> Result<()> {
        let Self::Texts { current, kept } = self else { return Ok(()) };
        let mut out = stdout().lock();
        if let Some((unsaid, over)) = kept.get_mut(id as usize) {
            unsaid.push_str(text);
            *over = done;
        }
        while let Some((unsaid, over)) = kept.get_mut(*current) {
            write!(out, "{}", std::mem::take(unsaid))?;
            if !*over {
                break;
            }
            writeln!(out)?;
            *current += 1;
            header(&mut out, entries, *current)?;
        }
        Ok(out.flush()?)
    }
}

/// The prompt that a text goes on from, and whose it is, if there are several.
fn header(out: &mut impl Write, entries: &[Entry], n: usize) -> Result<()> {
    let (Some(entry), true) = (entries.get(n), entries.len() > 1) else { return Ok(()) };
    let Prompt::Text(prompt) = &entry.request.prompt else { return Ok(()) };
    let gap = if n > 0 { "\n" } else { "" };
    write!(out, "{gap}[{}] {prompt}", entry.request.adapter.as_deref().unwrap_or("base model"))?;
    Ok(())
}
