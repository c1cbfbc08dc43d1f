//! What the benchmarks of moe-lora run on: layers of real models' sizes, and what a batch on them costs at least.
#![forbid(unsafe_code)]

mod work;

pub use work::{Work, count};

use moe_lora::LayerShape;

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
    pub fn shape(&self) -> Result<LayerShape, moe_lora::InputError> {
        let [experts, top_k, hidden, intermediate] = self.sizes;
        LayerShape::new(experts, top_k, hidden, intermediate)
    }
}

/// OLMoE-1B-7B.
pub const OLMOE: Preset = Preset { name: "olmoe", sizes: [64, 8, 2048, 1024] };

#[cfg(doctest)]
#[doc = include_str!("../../../README.md")]
struct Readme;
