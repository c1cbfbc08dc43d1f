//! The model families: what each calls its tensors and how its code stores experts.

use moe_lora_core::ExpertStorage;
use std::fmt;

/// A family of MoE models, by the `model_type` of its `config.json`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Family {
    /// `mixtral`.
    Mixtral,
    /// `qwen2_moe`.
    Qwen2Moe,
    /// `qwen3_moe`.
    Qwen3Moe,
    /// `olmoe`.
    Olmoe,
    /// `deepseek_v2`.
    DeepseekV2,
    /// `deepseek_v3`.
    DeepseekV3,
    /// `gpt_oss`.
    GptOss,
}

impl Family {
    /// All families.
    pub const ALL: [Self; 7] =
        [Self::Mixtral, Self::Qwen2Moe, Self::Qwen3Moe, Self::Olmoe, Self::DeepseekV2, Self::DeepseekV3, Self::GptOss];

    /// The `model_type` of `config.json`.
    #[must_use]
    pub const fn model_type(self) -> &'static str {
        match self {
            Self::Mixtral => "mixtral",
            Self::Qwen2Moe => "qwen2_moe",
            Self::Qwen3Moe => "qwen3_moe",
            Self::Olmoe => "olmoe",
            Self::DeepseekV2 => "deepseek_v2",
            Self::DeepseekV3 => "deepseek_v3",
            Self::GptOss => "gpt_oss",
        }
    }

    /// The family of a `model_type`.
    #[must_use]
    pub fn from_model_type(model_type: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|f| f.model_type() == model_type)
    }

    /// How the family's code in transformers holds its 3-D expert parameters.
    #[must_use]
    pub const fn storage(self) -> ExpertStorage {
        let gpt_oss = matches!(self, Self::GptOss);
        ExpertStorage { transposed: gpt_oss, interleaved: gpt_oss }
    }

    /// Whether experts and router have biases.
    pub(crate) const fn has_bias(self) -> bool {
        matches!(self, Self::GptOss)
    }

    /// What a decoder layer calls its MoE block. Mixtral checkpoints say `block_sparse_moe`, transformers 5 says `mlp`.
    pub(crate) const fn blocks(self) -> &'static [&'static str] {
        match self {
            Self::Mixtral => &["block_sparse_moe", "mlp"],
            _ => &["mlp"],
        }
    }

    /// What an expert calls gate, up and down, in checkpoints of one tensor an expert.
    pub(crate) const fn projections(self) -> [&'static str; 3] {
        match self {
            Self::Mixtral => ["w1", "w3", "w2"],
            _ => ["gate_proj", "up_proj", "down_proj"],
        }
    }

    /// What the block calls its router.
    pub(crate) const fn router(self) -> &'static str {
        match self {
            Self::GptOss => "router",
            _ => "gate",
        }
    }
}

impl fmt::Display for Family {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Mixtral => "Mixtral",
            Self::Qwen2Moe => "Qwen2-MoE",
            Self::Qwen3Moe => "Qwen3-MoE",
            Self::Olmoe => "OLMoE",
            Self::DeepseekV2 => "DeepSeek-V2",
            Self::DeepseekV3 => "DeepSeek-V3",
            Self::GptOss => "gpt-oss",
        })
    }
}
