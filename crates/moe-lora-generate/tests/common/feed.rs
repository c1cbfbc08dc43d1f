//! Sequences that are fed what transformers chose.

use super::{Golden, Model};
use moe_lora_generate::{KvCache, Part};

/// One sequence, and the logits of its new tokens.
pub(crate) struct Fed<'a> {
    pub(crate) golden: &'a Golden,
    all: Vec<u32>,
    cache: KvCache,
    pub(crate) logits: Vec<f32>,
}

impl<'a> Fed<'a> {
    fn new(model: &Model, golden: &'a Golden) -> Self {
        let mut all = golden.prompt_tokens.clone();
        all.extend(&golden.tokens[..golden.tokens.len() - 1]);
        Self { cache: model.decoder.new_cache(all.len()), all, golden, logits: Vec::new() }
    }

    /// Tokens to the end of the prompt, at most `most`; then one by one.
    fn next(&self, most: usize) -> usize {
        let (done, prompt) = (self.cache.len(), self.golden.prompt_tokens.len());
        if done < prompt { (prompt - done).min(most) } else { usize::from(done < self.all.len()) }
    }

    /// The largest difference from transformers' logits.
    pub(crate) fn worst(&self) -> f32 {
        assert_eq!(self.logits.len(), self.golden.logits.len());
        self.logits.iter().zip(&self.golden.logits).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max)
    }
}

/// Feeds all sequences together, prompts in pieces of `most`.
pub(crate) fn feed<'a>(model: &Model, all: &'a [Golden], most: usize) -> Vec<Fed<'a>> {
    let mut fed: Vec<_> = all.iter().map(|golden| Fed::new(model, golden)).collect();
    loop {
        let steps: Vec<_> = fed.iter().map(|f| (f.cache.len(), f.next(most))).collect();
        let mut parts = Vec::new();
        let mut asked = Vec::new();
        for (f, (done, n)) in fed.iter_mut().zip(steps).filter(|(_, (_, n))| *n > 0) {
            let logits = done + n >= f.golden.prompt_tokens.len();
            let adapter = model.adapter(f.golden.adapter.as_deref());
            parts.push(Part { tokens: &f.all[done..done + n], cache: &mut f.cache, adapter, logits });
            if logits {
                asked.push(&mut f.logits);
            }
        }
        if parts.is_empty() {
            return fed;
        }
        let output = model.decoder.forward(&mut parts).unwrap();
        assert!(output.broken.iter().all(|broken| !broken));
        let vocab = model.decoder.config().vocab_size;
        assert_eq!(output.logits.len(), asked.len() * vocab);
        asked.into_iter().zip(output.logits.chunks(vocab)).for_each(|(to, from)| to.extend_from_slice(from));
    }
}
