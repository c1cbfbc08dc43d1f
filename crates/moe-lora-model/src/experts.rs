//! The expert tensors of one layer: found, all accounted for, checked against the configuration.

use crate::tensors::{Tensor, Tensors};
use crate::{Family, ModelConfig};
use moe_lora_core::{DType, InputError, LayerShape};

/// The tensors of a layer's experts, in either of the two forms that checkpoints come in.
pub(crate) enum Experts<'a> {
    /// Tensors of their own for each expert.
    Each(Vec<Expert<'a>>),
    /// 3-D tensors of all experts, as transformers 5 holds them.
    Fused {
        /// `[E, 2I, H]`; gpt-oss `[E, H, 2I]` with alternating columns.
        gate_up: Tensor<'a>,
        /// `[E, H, I]`; gpt-oss `[E, I, H]`.
        down: Tensor<'a>,
        /// `[E, 2I]` alternating, and `[E, H]`.
        bias: Option<[Tensor<'a>; 2]>,
    },
}

/// One expert of the [`Experts::Each`] form: gate and up `[I, H]`, down `[H, I]`.
pub(crate) struct Expert<'a> {
    pub(crate) weights: [Tensor<'a>; 3],
    /// `[I]`, `[I]` and `[H]`.
    pub(crate) bias: Option<[Tensor<'a>; 3]>,
}

impl<'a> Experts<'a> {
    /// Finds the tensors under `block` (`model.layers.0.mlp`). A tensor too many is an error like one too few: it would
    /// change the result if the model's code knew it.
    pub(crate) fn find(tensors: &'a Tensors, config: &ModelConfig, block: &str) -> Result<Self, InputError> {
        let ModelConfig { family, layer, .. } = *config;
        let experts = format!("{block}.experts.");
        let fused = ["gate_up_proj", "down_proj"].iter().any(|n| tensors.get(&format!("{experts}{n}")).is_some());
        for tensor in tensors.with_prefix(&experts) {
            let name = tensor.name().strip_prefix(&experts).unwrap_or_default();
            let known = if fused { is_fused(family, name) } else { is_each(family, name, &layer, tensor)? };
            if !known {
                return Err(refuse(tensor, name, fused));
            }
        }
        if fused {
            Self::fused(tensors, family, &layer, &experts)
        } else {
            Self::each(tensors, family, &layer, &experts)
        }
    }

    fn each(tensors: &'a Tensors, family: Family, layer: &LayerShape, prefix: &str) -> Result<Self, InputError> {
        let (h, i) = (layer.hidden_size, layer.intermediate_size);
        let mut experts = Vec::new();
        for e in 0..layer.num_experts {
            let find = |projection: usize, part: &str, want: &[usize], meaning: &str| {
                let tensor = tensors.require(&format!("{prefix}{e}.{}.{part}", family.projections()[projection]))?;
                tensor.expect_shape(want, meaning)?;
                Ok::<_, InputError>(tensor)
            };
            let weight = |p, want: [usize; 2], meaning| find(p, "weight", &want, meaning);
            let weights = [weight(0, [i, h], "[I, H]")?, weight(1, [i, h], "[I, H]")?, weight(2, [h, i], "[H, I]")?];
            let bias = |p, want, meaning| find(p, "bias", &[want], meaning);
            let bias = if family.has_bias() {
                Some([bias(0, i, "[I]")?, bias(1, i, "[I]")?, bias(2, h, "[H]")?])
            } else {
                None
            };
            experts.push(Expert { weights, bias });
        }
        Ok(Self::Each(experts))
    }

    fn fused(tensors: &'a Tensors, family: Family, layer: &LayerShape, prefix: &str) -> Result<Self, InputError> {
        let LayerShape { num_experts: e, hidden_size: h, intermediate_size: i, .. } = *layer;
        let find = |name: &str, want: &[usize], meaning: &str| {
            let tensor = tensors.require(&format!("{prefix}{name}"))?;
            tensor.expect_shape(want, meaning)?;
            Ok::<_, InputError>(tensor)
        };
        let (gate_up, down) = if family.storage().transposed {
            (find("gate_up_proj", &[e, h, 2 * i], "[E, H, 2I]")?, find("down_proj", &[e, i, h], "[E, I, H]")?)
        } else {
            (find("gate_up_proj", &[e, 2 * i, h], "[E, 2I, H]")?, find("down_proj", &[e, h, i], "[E, H, I]")?)
        };
        let bias = if family.has_bias() {
            Some([find("gate_up_proj_bias", &[e, 2 * i], "[E, 2I]")?, find("down_proj_bias", &[e, h], "[E, H]")?])
        } else {
            None
        };
        Ok(Self::Fused { gate_up, down, bias })
    }

    /// The format of all weights, which must be one. Biases may have another: they become f32.
    pub(crate) fn dtype(&self) -> Result<DType, InputError> {
        let weights: Vec<Tensor<'_>> = match self {
            Self::Each(experts) => experts.iter().flat_map(|e| e.weights).collect(),
            Self::Fused { gate_up, down, .. } => vec![*gate_up, *down],
        };
        let mut all: Option<DType> = None;
        for weight in weights {
            let dtype = weight.dtype()?;
            match all {
                Some(all) if all != dtype => {
                    return Err(weight.wrong(dtype.to_string(), format!("{all}, as the layer's other experts")));
                }
                _ => all = Some(dtype),
            }
        }
        all.ok_or_else(|| InputError::new("no experts", "at least one"))
    }
}

fn is_fused(family: Family, name: &str) -> bool {
    match name {
        "gate_up_proj" | "down_proj" => true,
        "gate_up_proj_bias" | "down_proj_bias" => family.has_bias(),
        _ => false,
    }
}

/// Whether `name` is `{expert}.{projection}.weight`; an error if only the expert's number is wrong.
fn is_each(family: Family, name: &str, layer: &LayerShape, tensor: Tensor<'_>) -> Result<bool, InputError> {
    let Some((number, rest)) = name.split_once('.') else { return Ok(false) };
    let Ok(expert) = number.parse::<usize>() else { return Ok(false) };
    if expert >= layer.num_experts {
        let expected = format!("experts 0 to {} by config.json", layer.num_experts - 1);
        return Err(tensor.wrong(format!("expert {expert}"), expected));
    }
    let Some((projection, part)) = rest.split_once('.') else { return Ok(false) };
    let part_known = part == "weight" || (part == "bias" && family.has_bias());
    // "007" is a number but no name that the lookup of expert 7 would find.
    Ok(part_known && family.projections().contains(&projection) && number == expert.to_string())
}

fn refuse(tensor: Tensor<'_>, name: &str, fused: bool) -> InputError {
    if name.ends_with("_blocks") || name.ends_with("_scales") {
        return tensor.wrong("MXFP4 weights", "bf16, f16 or f32 weights (dequantise the checkpoint first)");
    }
    if ["scale", "qweight", "qzeros", "packed"].iter().any(|part| name.contains(part)) {
        return tensor
            .wrong("a part of quantised weights", "f32, f16 or bf16 weights (dequantise the checkpoint first)");
    }
    let form =
        if fused { "gate_up_proj and down_proj of all experts" } else { "one weight a projection of each expert" };
    tensor.wrong("a tensor that this family does not have", form)
}
