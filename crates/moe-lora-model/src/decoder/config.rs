//! The settings of a whole decoder.

use crate::config::{Fields, family_and_fields};
use crate::{Family, ModelConfig};
use moe_lora_core::{Activation, InputError};
use serde_json::Value;

/// How queries and keys are normalised before they are rotated.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum QkNorm {
    /// Each head by itself, all with one weight of `head_dim` (Qwen3-MoE).
    EachHead,
    /// All heads of a token as one vector (OLMoE).
    AllHeads,
}

/// What `config.json` says about a decoder, for families whose whole model is known.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct DecoderConfig {
    /// Width of a token, H.
    pub hidden_size: usize,
    /// Decoder layers.
    pub num_hidden_layers: usize,
    /// Query heads.
    pub num_attention_heads: usize,
    /// Key and value heads; each serves `num_attention_heads / num_key_value_heads` query heads.
    pub num_key_value_heads: usize,
    /// Width of a head, even.
    pub head_dim: usize,
    /// Where queries and keys are normalised.
    pub qk_norm: QkNorm,
    /// Bound of queries, keys and values after their projection (OLMoE `clip_qkv`).
    pub clip_qkv: Option<f32>,
    /// Whether q, k, v and o have biases.
    pub attention_bias: bool,
    /// Base of the rotary frequencies.
    pub rope_theta: f32,
    /// Positions are divided by this (`rope_type: linear`); 1 without scaling.
    pub rope_factor: f32,
    /// Longest sequence.
    pub max_position_embeddings: usize,
    /// Added to the mean square under every root.
    pub rms_norm_eps: f32,
    /// Tokens.
    pub vocab_size: usize,
    /// Whether the head is the embedding.
    pub tie_word_embeddings: bool,
    /// Layers without experts, and their width.
    pub dense_layers: Vec<usize>,
    /// See [`dense_layers`](Self::dense_layers).
    pub dense_intermediate_size: usize,
    /// Activation of dense layers.
    pub activation: Activation,
    /// Tokens that end a text, as `generation_config.json` says, or else `config.json`.
    pub eos_token_ids: Vec<u32>,
}

/// Reads the settings. Errors name the field, not the file.
pub(crate) fn config(settings: &Value, model: &ModelConfig) -> Result<DecoderConfig, InputError> {
    let root = settings.as_object().ok_or_else(|| InputError::new("JSON that is no object", "an object"))?;
    let (family, fields) = family_and_fields(root)?;
    let (qk_norm, heads, kv_heads, positions, vocab, eps, dense) = match family {
        Family::Qwen3Moe => (QkNorm::EachHead, 32, Some(4), 32768, 151_936, 1e-6, 6144),
        Family::Olmoe => (QkNorm::AllHeads, 16, None, 4096, 50304, 1e-5, 0),
        _ => return Err(fields.wrong("model_type", "qwen3_moe or olmoe, whose whole models are known")),
    };
    let size = |field, default: usize| match fields.size(field)? {
        Some(0) => Err(fields.wrong(field, "at least 1")),
        size => Ok(size.unwrap_or(default)),
    };
    let hidden_size = model.layer.hidden_size;
    let num_attention_heads = size("num_attention_heads", heads)?;
    let num_key_value_heads = size("num_key_value_heads", kv_heads.unwrap_or(num_attention_heads))?;
    if !num_attention_heads.is_multiple_of(num_key_value_heads) {
        return Err(fields.wrong("num_key_value_heads", format!("a divisor of {num_attention_heads} heads")));
    }
    let head_dim = match fields.size("head_dim")? {
        Some(dim) => dim,
        None if hidden_size.is_multiple_of(num_attention_heads) => hidden_size / num_attention_heads,
        None => return Err(fields.wrong("head_dim", format!("it, as {hidden_size} is no multiple of the heads"))),
    };
    if head_dim == 0 || !head_dim.is_multiple_of(2) || head_dim > 1024 {
        return Err(fields.wrong("head_dim", format!("an even width of 2 to 1024 (it is {head_dim})")));
    }
    if fields.flag("use_sliding_window")? == Some(true) && fields.get("sliding_window").is_some() {
        return Err(fields.wrong("use_sliding_window", "false: attention here sees all that came before"));
    }
    let clip_qkv = if family == Family::Olmoe { fields.number("clip_qkv")? } else { None };
    let (rope_theta, rope_factor) = rope(fields)?;
    let rms_norm_eps = fields.number("rms_norm_eps")?.unwrap_or(eps);
    if rms_norm_eps < 0.0 {
        return Err(fields.wrong("rms_norm_eps", "no negative number"));
    }
    let dense_layers: Vec<usize> =
        (0..model.num_hidden_layers).filter(|n| model.moe_layers.binary_search(n).is_err()).collect();
    Ok(DecoderConfig {
        hidden_size,
        num_hidden_layers: model.num_hidden_layers,
        num_attention_heads,
        num_key_value_heads,
        head_dim,
        qk_norm,
        clip_qkv,
        attention_bias: fields.flag("attention_bias")?.unwrap_or(false),
        rope_theta,
        rope_factor,
        max_position_embeddings: size("max_position_embeddings", positions)?,
        rms_norm_eps,
        vocab_size: size("vocab_size", vocab)?,
        tie_word_embeddings: fields.flag("tie_word_embeddings")?.unwrap_or(false),
        dense_intermediate_size: if dense_layers.is_empty() { 0 } else { size("intermediate_size", dense)? },
        dense_layers,
        activation: model.activation,
        eos_token_ids: token_ids(fields.get("eos_token_id"))
            .ok_or_else(|| fields.wrong("eos_token_id", "a token id or a list of them"))?,
    })
}

/// `eos_token_id` of either configuration file: one id, a list or nothing.
pub(crate) fn token_ids(value: Option<&Value>) -> Option<Vec<u32>> {
    let id = |v: &Value| u32::try_from(v.as_u64()?).ok();
    match value {
        None | Some(Value::Null) => Some(Vec::new()),
        Some(Value::Array(ids)) => ids.iter().map(id).collect(),
        Some(one) => Some(vec![id(one)?]),
    }
}

/// Base and divisor of positions, from either generation of the settings: `rope_parameters`, or `rope_theta` with
/// `rope_scaling`.
fn rope(fields: Fields<'_>) -> Result<(f32, f32), InputError> {
    let object = |field| match fields.get(field) {
        None => Ok(None),
        Some(Value::Object(map)) => Ok(Some(map)),
        Some(_) => Err(fields.wrong(field, "an object")),
    };
    let mut theta = fields.number("rope_theta")?;
    let mut factor = 1.0;
    for (field, place) in [("rope_scaling", "rope_scaling."), ("rope_parameters", "rope_parameters.")] {
        let Some(map) = object(field)? else { continue };
        let inner = Fields::new(map, place);
        theta = inner.number("rope_theta")?.or(theta);
        let kind = inner.text("rope_type")?.or(inner.text("type")?).unwrap_or("default");
        match kind {
            "default" => {}
            "linear" => {
                factor = inner.number("factor")?.filter(|f| *f > 0.0).unwrap_or(f32::NAN);
                if factor.is_nan() {
                    return Err(inner.wrong("factor", "a positive number"));
                }
            }
            other => {
                let expected = "\"default\" or \"linear\"; other scalings of positions are not computed here";
                return Err(InputError::new(format!("{other:?}"), expected).in_tensor(inner.name("rope_type")));
            }
        }
        if inner.number("partial_rotary_factor")?.is_some_and(|f| f != 1.0) {
            return Err(inner.wrong("partial_rotary_factor", "1"));
        }
    }
    let theta = theta.unwrap_or(10_000.0);
    if theta <= 0.0 {
        return Err(fields.wrong("rope_theta", "a positive number"));
    }
    Ok((theta, factor))
}
