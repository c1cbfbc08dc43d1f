//! Continuous batching: requests join at the next step and leave when they are done.

mod sequence;

use crate::adapters::{Adapters, Status};
use crate::text::Text;
use crate::{Decoder, Event, GenerateError, KvCache, Part, PartAdapter, Prompt, Request, RequestError, RequestId};
use moe_lora::adapter::OpenOptions;
use moe_lora::{AdapterPool, Checkpoint, Device, InputError, Limits, PoolConfig, PoolError};
use rayon::prelude::*;
use sequence::{Sequence, Waiting};
use std::collections::VecDeque;
use std::path::{Path, PathBuf};

/// How an engine is set up.
#[derive(Debug, Clone)]
pub struct Options {
    /// Where the experts run and adapters live; attention runs on the processor.
    pub device: Device,
    /// The pool of adapters.
    pub adapters: PoolConfig,
    /// How adapters are read.
    pub open: OpenOptions,
    /// Sequences that run at once.
    pub max_batch: usize,
    /// New tokens in a step: one of each running sequence, and prompts in pieces.
    pub max_step_tokens: usize,
    /// Bytes of all key-value caches.
    pub cache_bytes: usize,
}

impl Default for Options {
    /// The processor; 64 sequences, 256 tokens a step, 4 GiB of caches, and of adapters what [`PoolConfig`] says.
    fn default() -> Self {
        Self {
            device: Device::cpu(),
            adapters: PoolConfig::default(),
            open: OpenOptions::default(),
            max_batch: 64,
            max_step_tokens: 256,
            cache_bytes: 4 << 30,
        }
    }
}

/// What an engine did, and what it holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Statistics {
    /// Steps.
    pub steps: u64,
    /// Tokens of prompts that were read.
    pub prompt_tokens: u64,
    /// Tokens that were generated.
    pub new_tokens: u64,
    /// Bytes of adapters in the pool.
    pub pool_bytes: usize,
    /// Bytes of what loaded adapters change in attention and dense layers.
    pub linear_bytes: usize,
    /// Adapters that were loaded.
    pub loads: u64,
    /// Adapters that had to go for others.
    pub evictions: u64,
}

/// Generates text for many requests at once.
#[derive(Debug)]
pub struct Engine {
    decoder: Decoder,
    text: Option<Text>,
    adapters: Adapters,
    options: Options,
    waiting: VecDeque<Waiting>,
    running: Vec<Sequence>,
    /// Events from between two steps.
    events: Vec<Event>,
    next: RequestId,
    cache_used: usize,
    statistics: Statistics,
}

impl Engine {
    /// Opens a checkpoint folder; `progress(done, all)` hears of every layer.
    ///
    /// # Errors
    /// If the checkpoint or an option cannot be used.
    pub fn open(
        model: impl AsRef<Path>,
        options: Options,
        progress: impl FnMut(usize, usize),
    ) -> Result<Self, GenerateError> {
        if options.max_batch == 0 || options.max_step_tokens == 0 {
            return Err(InputError::new("a batch of nothing", "a batch and a step of at least 1").into());
        }
        let checkpoint = Checkpoint::open(model)?;
        let text = Text::open(checkpoint.folder())?;
        let pool = AdapterPool::new(&options.device, checkpoint.shape(), options.adapters)?;
        let limits = Limits { max_tokens: options.max_step_tokens, max_rank: options.adapters.max_rank };
        let decoder = Decoder::new(&checkpoint, &options.device, &pool, limits, progress)?;
        let adapters = Adapters::new(pool, decoder.config().clone(), decoder.dtype(), options.open.clone())?;
        Ok(Self {
            decoder,
            text,
            adapters,
            options,
            waiting: VecDeque::new(),
            running: Vec::new(),
            events: Vec::new(),
            next: 0,
            cache_used: 0,
            statistics: Statistics::default(),
        })
    }

    /// Lets requests name the adapter in `folder`. It is read when the first request asks for it.
    pub fn register(&mut self, name: &str, folder: impl Into<PathBuf>) {
        self.adapters.register(name, folder.into());
    }

    /// The model.
    #[must_use]
    pub const fn decoder(&self) -> &Decoder {
        &self.decoder
    }

    /// Takes a request, which joins the batch at the next step that has room and its adapter. What is wrong with it comes
    /// as [`Event::Failed`].
    pub fn submit(&mut self, request: Request) -> RequestId {
        let id = self.next;
        self.next += 1;
        match self.check(request) {
            Ok((request, prompt)) => self.waiting.push_back(Waiting { id, request, prompt }),
            Err(error) => self.events.push(Event::Failed { id, error }),
        }
        id
    }

    /// Whether every request is answered and every event handed out.
    #[must_use]
    pub fn is_idle(&self) -> bool {
        self.waiting.is_empty() && self.running.is_empty() && self.events.is_empty()
    }

    /// Sequences in the batch.
    #[must_use]
    pub fn running(&self) -> usize {
        self.running.len()
    }

    /// What was done so far.
    #[must_use]
    pub fn statistics(&self) -> Statistics {
        let pool = self.adapters.pool().snapshot();
        Statistics {
            pool_bytes: pool.used_bytes,
            linear_bytes: self.adapters.linear_bytes(),
            loads: pool.loads,
            evictions: pool.evictions,
            ..self.statistics
        }
    }

    /// Lets waiting requests join, and runs one step of all that are in the batch: the next token of each, and pieces of
    /// new prompts. If all wait for an adapter, waits for the first one that is loaded.
    ///
    /// # Errors
    /// If the model cannot run at all. What is wrong with one request is an event.
    pub fn step(&mut self) -> Result<Vec<Event>, GenerateError> {
        self.take_loaded(false);
        self.join();
        if self.running.is_empty() && !self.waiting.is_empty() && self.events.is_empty() {
            self.take_loaded(true);
            self.join();
        }
        if !self.running.is_empty() {
            self.run()?;
        }
        Ok(std::mem::take(&mut self.events))
    }

    /// Everything about a request that can be told before it runs.
    fn check(&self, request: Request) -> Result<(Request, Vec<u32>), RequestError> {
        let config = self.decoder.config();
        if let Some(name) = request.adapter.as_ref().filter(|name| !self.adapters.is_known(name)) {
            return Err(RequestError::UnknownAdapter { name: name.clone() });
        }
        if !request.sampling.is_valid() || request.max_tokens == 0 {
            let found = format!("{:?}, max_tokens {}", request.sampling, request.max_tokens);
            return Err(InputError::new(found, "temperature >= 0, top_p in (0, 1], max_tokens >= 1").into());
        }
        let prompt = match (&request.prompt, &self.text) {
            (Prompt::Tokens(tokens), _) => tokens.clone(),
            (Prompt::Text(prompt), Some(text)) => text.encode(prompt)?,
            (Prompt::Text(_), None) => {
                let found = "a text, and a checkpoint without tokenizer.json";
                return Err(InputError::new(found, "a prompt of tokens").into());
            }
        };
        if prompt.is_empty() {
            return Err(InputError::new("an empty prompt", "at least one token").into());
        }
        crate::decoder::check_tokens(&prompt, config.vocab_size)?;
        let most = config.max_position_embeddings;
        if prompt.len() >= most {
            return Err(RequestError::TooLong { prompt: prompt.len(), most });
        }
        let capacity = self.capacity(&prompt, &request);
        let bytes = KvCache::bytes_for(config, self.decoder.dtype(), capacity);
        if bytes > self.options.cache_bytes {
            let expected = format!("at most the {} of all caches", self.options.cache_bytes);
            return Err(InputError::new(format!("{capacity} tokens in {bytes} bytes"), expected).into());
        }
        Ok((request, prompt))
    }

    /// Tokens that a request's sequence may have.
    fn capacity(&self, prompt: &[u32], request: &Request) -> usize {
        prompt.len().saturating_add(request.max_tokens).min(self.decoder.config().max_position_embeddings)
    }

    /// Takes over adapters that were read meanwhile; those that could not be read fail the requests that wait for them.
    fn take_loaded(&mut self, mut wait: bool) {
        while let Some(loaded) = self.adapters.loaded(wait) {
            wait = false;
            let name = loaded.name;
            let error = match loaded.result {
                Ok(mut ready) => {
                    let warnings = std::mem::take(&mut ready.warnings);
                    let bytes = self.adapters.keep(&name, ready);
                    self.events.push(Event::Loaded { adapter: name, bytes, warnings });
                    continue;
                }
                Err(error) => error,
            };
            let crowded = matches!(
                error,
                RequestError::Pool {
                    error: PoolError::NoRoom { .. } | PoolError::NoSlot { .. } | PoolError::Fragmented { .. },
                    ..
                }
            );
            if crowded && self.adapters.try_again(&name, !self.running.is_empty()) {
                continue;
            }
            let events = &mut self.events;
            self.waiting.retain(|waiting| {
                let failed = waiting.request.adapter.as_ref() == Some(&name);
                if failed {
                    events.push(Event::Failed { id: waiting.id, error: error.clone() });
                }
                !failed
            });
        }
    }

    /// Moves waiting requests into the batch: in their order, but none waits for another one's adapter.
    fn join(&mut self) {
        let mut full = false;
        for _ in 0..self.waiting.len() {
            let Some(waiting) = self.waiting.pop_front() else { break };
            let capacity = self.capacity(&waiting.prompt, &waiting.request);
            let bytes = KvCache::bytes_for(self.decoder.config(), self.decoder.dtype(), capacity);
            // Who came later does not pass one for whom there is no room, nor are adapters read for later.
            full |= self.running.len() >= self.options.max_batch
                || bytes > self.options.cache_bytes.saturating_sub(self.cache_used);
            let adapter = match waiting.request.adapter.as_deref().filter(|_| !full) {
                None => None,
                Some(name) => match self.adapters.hold(name) {
                    Status::Ready(held) => Some(held),
                    Status::Later => {
                        self.waiting.push_back(waiting);
                        continue;
                    }
                },
            };
            if full {
                self.waiting.push_back(waiting);
                continue;
            }
            self.cache_used += bytes;
            self.running.push(Sequence::new(waiting, adapter, self.decoder.new_cache(capacity), bytes));
        }
        self.adapters.settled();
    }

    /// One step of the batch.
    fn run(&mut self) -> Result<(), GenerateError> {
        // Running texts first, so that a long prompt holds none of them up.
        let mut room = self.options.max_step_tokens;
        let mut takes: Vec<usize> = self.running.iter().map(|s| usize::from(s.pending().len() == 1)).collect();
        room = room.saturating_sub(takes.iter().sum());
        for (take, sequence) in takes.iter_mut().zip(&self.running).filter(|(take, _)| **take == 0) {
            *take = sequence.pending().len().min(room);
            room -= *take;
        }
        let mut asked = Vec::new();
        let mut parts = Vec::new();
        for (sequence, take) in self.running.iter_mut().zip(takes).filter(|(_, take)| *take > 0) {
            let Sequence { tokens, cache, adapter, id, .. } = sequence;
            let done = cache.len();
            let adapter = adapter.as_ref().map(|held| PartAdapter { id: held.id, linear: &held.linear });
            let logits = done + take == tokens.len();
            asked.push((*id, logits));
            parts.push(Part { tokens: &tokens[done..done + take], cache, adapter, logits });
        }
        let output = self.decoder.forward(&mut parts)?;
        self.statistics.steps += 1;

        // What each part gave: nothing yet, logits, or a failure.
        let mut logits = output.logits.chunks(self.decoder.config().vocab_size);
        let mut results = asked.into_iter().zip(output.broken).map(|((id, asked), broken)| {
            let logits = if asked { logits.next() } else { None };
            (id, logits, broken)
        });
        let mut next = results.next();
        let mut steps = Vec::new();
        for sequence in &mut self.running {
            let Some((_, logits, broken)) = next.take_if(|(id, ..)| *id == sequence.id) else { continue };
            next = results.next();
            steps.push((sequence, logits, broken));
        }
        let dtype = self.decoder.dtype();
        let config = self.decoder.config();
        let text = self.text.as_ref();
        let events: Vec<_> = steps
            .into_par_iter()
            .map(|(sequence, logits, broken)| {
                let finite = !broken && logits.is_none_or(|l| l.iter().fold(true, |all, x| all & x.is_finite()));
                if !finite {
                    sequence.over = true;
                    let error = RequestError::NotFinite { dtype };
                    return (0, vec![Event::Failed { id: sequence.id, error }]);
                }
                logits.map_or_else(|| (0, Vec::new()), |l| (1, sequence.push(l, text, &config.eos_token_ids)))
            })
            .collect();
        for (new, events) in events {
            self.statistics.new_tokens += new;
            self.events.extend(events);
        }
        self.statistics.prompt_tokens += self.running.iter_mut().map(Sequence::count_prompt).sum::<u64>();

        let before = self.running.len();
        let cache_used = &mut self.cache_used;
        self.running.retain(|sequence| {
            *cache_used -= if sequence.over { sequence.cache_bytes } else { 0 };
            !sequence.over
        });
        if self.running.len() < before {
            self.adapters.room_may_be_free();
        }
        Ok(())
    }
}
