//! One request on its way.

use crate::adapters::Held;
use crate::text::{Growing, Text};
use crate::{Completion, Event, Finish, KvCache, Request, RequestId};
use fastrand::Rng;

/// A request that is not in the batch yet.
#[derive(Debug)]
pub(super) struct Waiting {
    pub(super) id: RequestId,
    pub(super) request: Request,
    pub(super) prompt: Vec<u32>,
}

/// A request in the batch.
#[derive(Debug)]
pub(super) struct Sequence {
    pub(super) id: RequestId,
    request: Request,
    /// The prompt, then what was generated.
    pub(super) tokens: Vec<u32>,
    prompt: usize,
    /// Tokens of the prompt that were counted.
    counted: usize,
    pub(super) cache: KvCache,
    pub(super) cache_bytes: usize,
    pub(super) adapter: Option<Held>,
    rng: Rng,
    growing: Growing,
    text: String,
    /// It is done or failed, and leaves the batch.
    pub(super) over: bool,
}

impl Sequence {
    pub(super) fn new(waiting: Waiting, adapter: Option<Held>, cache: KvCache, cache_bytes: usize) -> Self {
        let Waiting { id, request, prompt } = waiting;
        Self {
            id,
            rng: Rng::with_seed(request.sampling.seed),
            request,
            prompt: prompt.len(),
            counted: 0,
            tokens: prompt,
            cache,
            cache_bytes,
            adapter,
            growing: Growing::default(),
            text: String::new(),
            over: false,
        }
    }

    /// Tokens that the model has not seen yet.
    pub(super) fn pending(&self) -> &[u32] {
        &self.tokens[self.cache.len()..]
    }

    /// Tokens of the prompt that the last step read.
    pub(super) fn count_prompt(&mut self) -> u64 {
        let seen = self.cache.len().min(self.prompt);
        (seen - std::mem::replace(&mut self.counted, seen)) as u64
    }

    /// Chooses the next token.
    pub(super) fn push(&mut self, logits: &[f32], text: Option<&Text>, ends: &[u32]) -> Vec<Event> {
        let token = self.request.sampling.choose(logits, &mut self.rng);
        self.tokens.push(token);
        let new = text.map(|text| self.growing.push(text, token)).unwrap_or_default();
        self.text.push_str(&new);
        let id = self.id;
        let mut events = vec![Event::Token { id, token, text: new }];
        let count = self.tokens.len() - self.prompt;
        let finish = if ends.contains(&token) {
            Finish::Stop
        } else if count >= self.request.max_tokens || self.tokens.len() >= self.cache.capacity() {
            Finish::Length
        } else {
            return events;
        };
        let rest = text.map(|text| self.growing.finish(text)).unwrap_or_default();
        self.text.push_str(&rest);
        self.over = true;
        let completion = Completion {
            prompt_tokens: self.prompt,
            tokens: self.tokens[self.prompt..].to_vec(),
            text: std::mem::take(&mut self.text),
            finish,
        };
        events.push(Event::Finished { id, rest, completion });
        events
    }
}
