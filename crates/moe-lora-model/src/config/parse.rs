//! From JSON to [`ModelConfig`].

use super::fields::Fields;
use super::{ModelConfig, router};
use crate::Family;
use moe_lora_core::{Activation, InputError, LayerShape};
use serde_json::{Map, Value};

/// Models of more decoder layers are refused.
const MAX_LAYERS: usize = 10_000;

/// Reads a whole `config.json`. Errors name the field, not the file.
pub(crate) fn parse(config: &Value) -> Result<ModelConfig, InputError> {
    let Value::Object(root) = config else {
        return Err(InputError::new("JSON that is no object", "an object of settings"));
    };
    let (family, fields) = family_and_fields(root)?;
    refuse_quantised(Fields::new(root, ""))?;
    refuse_quantised(fields)?;
    let default = Defaults::of(family);
    let layer = layer_shape(family, fields, &default)?;
    let num_hidden_layers = fields.size("num_hidden_layers")?.unwrap_or(default.layers);
    if num_hidden_layers == 0 || num_hidden_layers > MAX_LAYERS {
        return Err(fields.wrong("num_hidden_layers", format!("1 to {MAX_LAYERS}")));
    }
    Ok(ModelConfig {
        family,
        layer,
        num_hidden_layers,
        moe_layers: moe_layers(family, fields, num_hidden_layers)?,
        activation: activation(family, fields)?,
        router: router::config(family, fields, &layer)?,
    })
}

/// The family and the object that holds its settings: the file's own, or the `text_config` of a multimodal model.
pub(crate) fn family_and_fields(root: &Map<String, Value>) -> Result<(Family, Fields<'_>), InputError> {
    let fields = Fields::new(root, "");
    if let Some(family) = fields.text("model_type")?.and_then(Family::from_model_type) {
        return Ok((family, fields));
    }
    if let Some(Value::Object(text)) = fields.get("text_config") {
        let nested = Fields::new(text, "text_config.");
        if let Some(family) = nested.text("model_type")?.and_then(Family::from_model_type) {
            return Ok((family, nested));
        }
    }
    let known = Family::ALL.map(Family::model_type).join(", ");
    Err(fields.wrong("model_type", format!("one of {known}")))
}

fn refuse_quantised(fields: Fields<'_>) -> Result<(), InputError> {
    for field in ["quantization_config", "compression_config"] {
        let Some(value) = fields.get(field) else { continue };
        if value.as_object().is_some_and(Map::is_empty) {
            continue;
        }
        let method = value.get("quant_method").and_then(Value::as_str).unwrap_or("unnamed method");
        return Err(InputError::new(
            format!("a checkpoint quantised with {method}"),
            "f32, f16 or bf16 weights (dequantise it first)",
        )
        .in_tensor(fields.name(field)));
    }
    Ok(())
}

/// What transformers assumes for absent fields.
struct Defaults {
    experts: usize,
    /// `None`: the field must be there.
    top_k: Option<usize>,
    hidden: usize,
    intermediate: usize,
    layers: usize,
}

impl Defaults {
    const fn of(family: Family) -> Self {
        let (experts, top_k, hidden, intermediate, layers) = match family {
            Family::Mixtral => (8, Some(2), 4096, 14336, 32),
            Family::Qwen2Moe => (60, Some(4), 2048, 1408, 24),
            Family::Qwen3Moe => (128, Some(8), 2048, 768, 24),
            Family::Olmoe => (64, Some(8), 2048, 2048, 16),
            Family::DeepseekV2 => (64, None, 4096, 1407, 32),
            Family::DeepseekV3 => (256, Some(8), 7168, 2048, 61),
            Family::GptOss => (128, Some(4), 2880, 2880, 36),
        };
        Self { experts, top_k, hidden, intermediate, layers }
    }
}

fn layer_shape(family: Family, fields: Fields<'_>, default: &Defaults) -> Result<LayerShape, InputError> {
    let intermediate_field = match family {
        Family::Mixtral | Family::Olmoe | Family::GptOss => "intermediate_size",
        _ => "moe_intermediate_size",
    };
    let (experts_field, experts) = num_experts(fields)?.unwrap_or(("num_experts", default.experts));
    let top_k_field = "num_experts_per_tok";
    let top_k = fields.size(top_k_field)?.or(default.top_k);
    let top_k = top_k.ok_or_else(|| fields.wrong(top_k_field, "the number of experts a token uses"))?;
    let hidden = fields.size("hidden_size")?.unwrap_or(default.hidden);
    let intermediate = fields.size(intermediate_field)?.unwrap_or(default.intermediate);
    LayerShape::new(experts, top_k, hidden, intermediate).map_err(|error| {
        let field = match error.tensor.as_deref() {
            Some("num_experts") => experts_field,
            Some("top_k") => top_k_field,
            Some("intermediate_size") => intermediate_field,
            _ => "hidden_size",
        };
        InputError { tensor: Some(fields.name(field)), ..error }
    })
}

/// The number of experts under any of its names, which must agree.
fn num_experts(fields: Fields<'_>) -> Result<Option<(&'static str, usize)>, InputError> {
    let mut known: Option<(&'static str, usize)> = None;
    for field in ["num_experts", "num_local_experts", "n_routed_experts"] {
        let Some(experts) = fields.size(field)? else { continue };
        match known {
            Some((other, n)) if n != experts => {
                return Err(fields.wrong(field, format!("{n}, as {} says", fields.name(other))));
            }
            _ => known = known.or(Some((field, experts))),
        }
    }
    Ok(known)
}

fn moe_layers(family: Family, fields: Fields<'_>, layers: usize) -> Result<Vec<usize>, InputError> {
    let step = |field| match fields.size(field)? {
        Some(0) => Err(fields.wrong(field, "at least 1")),
        step => Ok(step.unwrap_or(1)),
    };
    let moe: Vec<usize> = match family {
        Family::Mixtral | Family::Olmoe | Family::GptOss => (0..layers).collect(),
        Family::Qwen2Moe | Family::Qwen3Moe => {
            let dense = fields.indices("mlp_only_layers")?;
            let step = step("decoder_sparse_step")?;
            (0..layers).filter(|&n| (n + 1).is_multiple_of(step) && !dense.contains(&(n as u64))).collect()
        }
        Family::DeepseekV2 | Family::DeepseekV3 => {
            let default = if family == Family::DeepseekV3 { 3 } else { 0 };
            let first = fields.size("first_k_dense_replace")?.unwrap_or(default);
            let step = step("moe_layer_freq")?;
            (first..layers).filter(|n| n.is_multiple_of(step)).collect()
        }
    };
    if moe.is_empty() {
        let found = format!("{layers} decoder layers, all dense");
        return Err(InputError::new(found, "at least one MoE layer").in_tensor(fields.name("num_hidden_layers")));
    }
    Ok(moe)
}

fn activation(family: Family, fields: Fields<'_>) -> Result<Activation, InputError> {
    let name = fields.text("hidden_act")?.unwrap_or("silu");
    if family == Family::GptOss {
        fields.only("hidden_act", "silu")?;
        let Activation::ClampedSwiglu { alpha, limit } = Activation::GPT_OSS else { return Ok(Activation::GPT_OSS) };
        let limit = fields.number("swiglu_limit")?.unwrap_or(limit);
        if limit <= 0.0 {
            return Err(fields.wrong("swiglu_limit", "a positive number"));
        }
        return Ok(Activation::ClampedSwiglu { alpha: fields.number("swiglu_alpha")?.unwrap_or(alpha), limit });
    }
    match name {
        "silu" | "swish" => Ok(Activation::Silu),
        "gelu" | "gelu_python" => Ok(Activation::Gelu),
        "gelu_pytorch_tanh" | "gelu_python_tanh" | "gelu_new" => Ok(Activation::GeluTanh),
        _ => Err(fields.wrong("hidden_act", "silu, gelu or gelu_pytorch_tanh")),
    }
}
