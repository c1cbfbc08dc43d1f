//! How strictly to read, and what the reader knows that the files do not say.

/// Which way round PEFT wrote the two matrices of a 3-D parameter; see `README.md`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum ExpertLayout {
    /// A is `[rank, in]` and B is `[out, rank]` for each expert.
    Direct,
    /// A is `[rank, out]` and B is `[in, rank]` for each expert.
    Transposed,
}

/// Settings of [`PeftAdapter::open_with`](crate::PeftAdapter::open_with).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct OpenOptions {
    /// Refuse what is otherwise a warning or let through: unknown configuration fields, and projections that
    /// `target_modules` or `target_parameters` name but the file lacks.
    pub strict: bool,
    /// Layout of `target_parameters` tensors, used only where neither their shapes nor `peft_version` decide.
    pub expert_layout: Option<ExpertLayout>,
    /// Larger ranks are refused.
    pub max_rank: usize,
    /// What the caller deals with itself, so that it is no reason to refuse: entries of `modules_to_save`, or the fields
    /// `trainable_token_indices` and `alora_invocation_tokens`.
    pub engine_handles: Vec<String>,
    /// Tokens of the model: an `added_tokens.json` with larger ids is refused. `None` does not look.
    pub vocab_size: Option<usize>,
}

impl Default for OpenOptions {
    fn default() -> Self {
        Self { strict: false, expert_layout: None, max_rank: 512, engine_handles: Vec::new(), vocab_size: None }
    }
}
