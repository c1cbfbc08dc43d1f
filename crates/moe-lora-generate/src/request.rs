//! What comes in, and what goes out.

use crate::{RequestError, Sampling};

/// The prompt of a request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Prompt {
    /// For the checkpoint's tokenizer.
    Text(String),
    /// Tokens as they are.
    Tokens(Vec<u32>),
}

/// One text to be generated.
#[derive(Debug, Clone, PartialEq)]
pub struct Request {
    /// Where it starts.
    pub prompt: Prompt,
    /// A registered adapter; `None` is the base model.
    pub adapter: Option<String>,
    /// Tokens at most.
    pub max_tokens: usize,
    /// How tokens are chosen.
    pub sampling: Sampling,
}

impl Request {
    /// A greedy request of 128 tokens at most.
    #[must_use]
    pub fn new(prompt: Prompt, adapter: Option<&str>) -> Self {
        Self { prompt, adapter: adapter.map(str::to_owned), max_tokens: 128, sampling: Sampling::default() }
    }
}

/// The number of a request, from 0 in the order of [`submit`](crate::Engine::submit).
pub type RequestId = u64;

/// Why a text ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Finish {
    /// The model ended it.
    Stop,
    /// `max_tokens`, or the longest sequence of the model.
    Length,
}

/// A text that is done.
#[derive(Debug, Clone, PartialEq)]
pub struct Completion {
    /// Tokens of the prompt.
    pub prompt_tokens: usize,
    /// The new tokens; the one that ended the text is the last.
    pub tokens: Vec<u32>,
    /// Their text, without special tokens; empty without a tokenizer.
    pub text: String,
    /// Why it ended.
    pub finish: Finish,
}

/// What a step did.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub enum Event {
    /// A new token. The text is what cannot change any more, and may be empty.
    Token {
        /// Whose.
        id: RequestId,
        /// The token.
        token: u32,
        /// The text that is new.
        text: String,
    },
    /// A request is done. `rest` is the text that no [`Token`](Self::Token) brought.
    Finished {
        /// Which.
        id: RequestId,
        /// The end of the text.
        rest: String,
        /// All of it.
        completion: Completion,
    },
    /// A request failed. The others are not touched by it.
    Failed {
        /// Which.
        id: RequestId,
        /// Why.
        error: RequestError,
    },
    /// An adapter was loaded; `warnings` are its reader's.
    Loaded {
        /// Its name.
        adapter: String,
        /// Bytes in the pool, and of attention and dense layers on the host.
        bytes: [usize; 2],
        /// What is odd about it.
        warnings: Vec<String>,
    },
}
