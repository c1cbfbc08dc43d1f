//! Between text and tokens.

use moe_lora::InputError;
use std::path::Path;
use tokenizers::Tokenizer;

const FILE: &str = "tokenizer.json";

/// The checkpoint's tokenizer.
#[derive(Debug)]
pub(crate) struct Text {
    tokenizer: Tokenizer,
}

impl Text {
    /// Reads `tokenizer.json` of a checkpoint folder; `None` if there is none.
    pub(crate) fn open(folder: &Path) -> Result<Option<Self>, InputError> {
        let path = folder.join(FILE);
        if !path.exists() {
            return Ok(None);
        }
        let tokenizer = Tokenizer::from_file(&path)
            .map_err(|e| InputError::new(e.to_string(), "a tokenizer of Hugging Face").in_file(path))?;
        Ok(Some(Self { tokenizer }))
    }

    /// Tokens of a text, with those that the tokenizer puts around every text.
    pub(crate) fn encode(&self, text: &str) -> Result<Vec<u32>, InputError> {
        let encoding = self.tokenizer.encode(text, true);
        let encoding = encoding.map_err(|e| InputError::new(e.to_string(), "a text that the tokenizer takes"))?;
        Ok(encoding.get_ids().to_vec())
    }

    /// Text of tokens; special ones are left out.
    fn decode(&self, tokens: &[u32]) -> String {
        self.tokenizer.decode(tokens, true).unwrap_or_default()
    }
}

/// The text of a sequence as it grows. A token may be a part of a character, so text comes when it cannot change any more.
#[derive(Debug, Default)]
pub(crate) struct Growing {
    tokens: Vec<u32>,
    /// Tokens whose text is out.
    spoken: usize,
    /// Tokens before those that still matter for what comes: a few, as decoders look at neighbours.
    base: usize,
}

impl Growing {
    /// Adds a token; returns the text that is new.
    pub(crate) fn push(&mut self, text: &Text, token: u32) -> String {
        self.tokens.push(token);
        let whole = text.decode(&self.tokens[self.base..]);
        if whole.ends_with(char::REPLACEMENT_CHARACTER) {
            return String::new();
        }
        self.take(text, &whole)
    }

    /// What is left when no more tokens come, be it half a character.
    pub(crate) fn finish(&mut self, text: &Text) -> String {
        let whole = text.decode(&self.tokens[self.base..]);
        self.take(text, &whole)
    }

    fn take(&mut self, text: &Text, whole: &str) -> String {
        let known = text.decode(&self.tokens[self.base..self.spoken]);
        self.base = self.spoken;
        self.spoken = self.tokens.len();
        whole.get(known.len()..).unwrap_or_default().to_owned()
    }
}
