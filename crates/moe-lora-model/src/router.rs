//! A layer's router: found, all accounted for, checked.

use crate::convert::{Block, to_f32};
use crate::tensors::{Tensor, Tensors};
use crate::{Family, ModelConfig};
use moe_lora_core::{InputError, RouterWeights};

/// The tensors of a router.
pub(crate) struct Router<'a> {
    weight: Tensor<'a>,
    bias: Option<Tensor<'a>>,
    selection_bias: Option<Tensor<'a>>,
}

impl<'a> Router<'a> {
    /// Whether any tensor of the router is there: layers may be used with a choice of experts made elsewhere.
    pub(crate) fn exists(tensors: &Tensors, family: Family, block: &str) -> bool {
        tensors.with_prefix(&format!("{block}.{}.", family.router())).next().is_some()
    }

    pub(crate) fn find(tensors: &'a Tensors, config: &ModelConfig, block: &str) -> Result<Self, InputError> {
        const SELECTION_BIAS: &str = "e_score_correction_bias";
        let (e, h) = (config.layer.num_experts, config.layer.hidden_size);
        let prefix = format!("{block}.{}.", config.family.router());
        let has_selection_bias = config.family == Family::DeepseekV3;
        for tensor in tensors.with_prefix(&prefix) {
            let known = match tensor.name().strip_prefix(&prefix).unwrap_or_default() {
                "weight" => true,
                "bias" => config.family.has_bias(),
                SELECTION_BIAS => has_selection_bias,
                _ => false,
            };
            if !known {
                return Err(tensor.wrong("a tensor that this family's router does not have", "its weight"));
            }
        }
        let find = |name: &str, want: &[usize], meaning: &str| {
            let tensor = tensors.require(&format!("{prefix}{name}"))?;
            tensor.expect_shape(want, meaning)?;
            tensor.dtype()?;
            Ok::<_, InputError>(tensor)
        };
        Ok(Self {
            weight: find("weight", &[e, h], "[E, H]")?,
            bias: config.family.has_bias().then(|| find("bias", &[e], "[E]")).transpose()?,
            selection_bias: has_selection_bias.then(|| find(SELECTION_BIAS, &[e], "[E]")).transpose()?,
        })
    }

    /// The weight keeps its own format, whatever the experts have; biases become f32.
    pub(crate) fn load(&self, config: &ModelConfig) -> Result<RouterWeights, InputError> {
        Ok(RouterWeights {
            weight: Block::new(self.weight)?.matrix(0, config.layer.num_experts, config.layer.hidden_size)?,
            bias: self.bias.map(to_f32).transpose()?,
            selection_bias: self.selection_bias.map(to_f32).transpose()?,
            config: config.router,
        })
    }
}
