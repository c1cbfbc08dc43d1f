//! The layers, batches and adapters that everybody is measured on.

use moe_lora::{InputError, LayerShape};

/// Sizes of a published model's layer.
#[derive(Debug, Clone, Copy)]
pub struct Preset {
    /// How it is named on the command line and in results.
    pub name: &'static str,
    /// `[E, k, H, I]`.
    pub sizes: [usize; 4],
}

impl Preset {
    /// The sizes, checked.
    ///
    /// # Errors
    /// Never for the presets of this crate.
    pub fn shape(&self) -> Result<LayerShape, InputError> {
        let [experts, top_k, hidden, intermediate] = self.sizes;
        LayerShape::new(experts, top_k, hidden, intermediate)
    }
}

/// OLMoE-1B-7B.
pub const OLMOE: Preset = Preset { name: "olmoe", sizes: [64, 8, 2048, 1024] };

/// Five layers from many narrow experts to few wide ones.
pub const PRESETS: [Preset; 5] = [
    Preset { name: "qwen3-30b", sizes: [128, 8, 2048, 768] },
    Preset { name: "mixtral-8x7b", sizes: [8, 2, 4096, 14_336] },
    OLMOE,
    // One of eight ranks, each with an eighth of every expert.
    Preset { name: "deepseek-v3-tp8", sizes: [256, 8, 7168, 256] },
    Preset { name: "gpt-oss-20b", sizes: [32, 4, 2880, 2880] },
];

/// Tokens of a batch, from one sequence that decodes to a long prompt.
pub const TOKENS: [usize; 8] = [1, 4, 16, 64, 256, 1024, 4096, 8192];

/// The adapters of a batch.
#[derive(Debug, Clone, PartialEq)]
pub struct AdapterSet {
    /// The rank of each; every token draws one of them.
    pub ranks: Vec<usize>,
    /// Share of the tokens that use none.
    pub base_share: f64,
}

impl AdapterSet {
    /// `count` adapters of one rank.
    #[must_use]
    pub fn uniform(count: usize, rank: usize, base_share: f64) -> Self {
        Self { ranks: vec![rank; count], base_share }
    }

    /// One, eight, eight wide, and many adapters beside the base model.
    #[must_use]
    pub fn presets() -> Vec<Self> {
        let sets = [(1, 16, 0.0), (8, 16, 0.0), (8, 64, 0.0), (32, 16, 0.25)];
        sets.map(|(count, rank, base_share)| Self::uniform(count, rank, base_share)).to_vec()
    }

    /// The largest rank, 0 for none.
    #[must_use]
    pub fn max_rank(&self) -> usize {
        self.ranks.iter().copied().max().unwrap_or(0)
    }
}
