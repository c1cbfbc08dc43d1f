//! Small checkpoints of random weights, for demos and tests.
//!
//! A folder that [`write_checkpoint`] made has the names, layouts and settings that transformers gives a model of the
//! family, for the MoE blocks alone: no attention, embeddings or shared experts. Every number is a function of the seed and
//! its place ([`TinyModel::value`]), the same in either [`ExpertForm`], so that a test can say what has to come out.

mod config;
mod tensors;
mod write;

use half::{bf16, f16};
use moe_lora_core::{DType, Element, LayerShape};

pub use write::write_checkpoint;

use crate::Family;

/// What [`write_checkpoint`] writes.
#[derive(Debug, Clone, PartialEq)]
pub struct TinyModel {
    /// Names, layouts and settings.
    pub family: Family,
    /// Sizes of every layer.
    pub shape: LayerShape,
    /// Decoder layers, all with experts.
    pub num_layers: usize,
    /// Format of all tensors but DeepSeek-V3's selection bias, which is f32.
    pub dtype: DType,
    /// Other seeds give other numbers.
    pub seed: u64,
    /// One tensor an expert, or one for all.
    pub form: ExpertForm,
    /// A file is closed before it would hold more bytes than this, and an index is written. `None`: one file, no index.
    pub shard_bytes: Option<usize>,
}

/// The two forms of expert tensors that checkpoints come in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ExpertForm {
    /// `experts.0.gate_proj.weight` and so on.
    Each,
    /// `experts.gate_up_proj` and `experts.down_proj`, 3-D.
    Fused,
}

/// A weight or bias of a MoE block, with the meaning of (expert, row, column) in [`TinyModel::value`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Part {
    /// `[I, H]` of each expert.
    Gate,
    /// `[I, H]` of each expert.
    Up,
    /// `[H, I]` of each expert.
    Down,
    /// `[I]` of each expert, as row (gpt-oss).
    GateBias,
    /// `[I]` of each expert, as row (gpt-oss).
    UpBias,
    /// `[H]` of each expert, as row (gpt-oss).
    DownBias,
    /// `[E, H]`; the expert is 0.
    Router,
    /// `[E]`, as row (gpt-oss).
    RouterBias,
    /// `[E]`, as row (DeepSeek-V3).
    SelectionBias,
}

impl TinyModel {
    /// Two layers in bf16, in one file, in the form in which the family is published.
    #[must_use]
    pub const fn new(family: Family, shape: LayerShape) -> Self {
        let form = if matches!(family, Family::GptOss) { ExpertForm::Fused } else { ExpertForm::Each };
        Self { family, shape, num_layers: 2, dtype: DType::Bf16, seed: 0, form, shard_bytes: None }
    }

    /// A number of the model, rounded as it is stored: signed, and as large as keeps activations near one.
    #[must_use]
    pub fn value(&self, layer: usize, part: Part, expert: usize, row: usize, col: usize) -> f32 {
        let matrix = (layer as u64) << 32 | (expert as u64) << 8 | part as u64;
        let bits = mix(mix(mix(self.seed) ^ matrix) ^ ((row as u64) << 32 | col as u64));
        let unit = (bits >> 40) as f32 / (1_u64 << 23) as f32 - 1.0;
        let fan_in = |n: usize| (3.0 / n as f32).sqrt();
        let scale = match part {
            Part::Gate | Part::Up => fan_in(self.shape.hidden_size),
            Part::Down => fan_in(self.shape.intermediate_size),
            Part::Router => 2.0 * fan_in(self.shape.hidden_size),
            _ => 0.25,
        };
        let value = unit * scale;
        match self.dtype_of(part) {
            DType::F32 => value,
            DType::F16 => f16::from_f32(value).to_f32(),
            DType::Bf16 => Element::to_f32(bf16::from_f32(value)),
        }
    }

    const fn dtype_of(&self, part: Part) -> DType {
        if matches!(part, Part::SelectionBias) { DType::F32 } else { self.dtype }
    }
}

/// The finaliser of splitmix64.
const fn mix(state: u64) -> u64 {
    let z = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}
