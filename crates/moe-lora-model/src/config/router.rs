//! Router settings, as the family's code in transformers reads them.

use super::fields::Fields;
use crate::Family;
use moe_lora_core::{GroupLimit, GroupScore, InputError, LayerShape, RouterConfig, Scoring};

pub(super) fn config(family: Family, fields: Fields<'_>, layer: &LayerShape) -> Result<RouterConfig, InputError> {
    let softmax = RouterConfig::softmax(layer.top_k);
    let config = match family {
        // gpt-oss takes the softmax over the chosen logits: the same as over all, renormalised.
        Family::Mixtral | Family::GptOss => softmax,
        Family::Qwen2Moe | Family::Qwen3Moe | Family::Olmoe => {
            RouterConfig { renormalize: fields.flag("norm_topk_prob")?.unwrap_or(false), ..softmax }
        }
        Family::DeepseekV2 => {
            fields.only("scoring_func", "softmax")?;
            // Transformers reads `norm_topk_prob` here and does nothing with it; so do we, to give its weights.
            fields.flag("norm_topk_prob")?;
            let groups = match fields.text("topk_method")?.unwrap_or("greedy") {
                "greedy" => None,
                "group_limited_greedy" => Some(required_groups(fields, GroupScore::Max)?),
                _ => return Err(fields.wrong("topk_method", "\"greedy\" or \"group_limited_greedy\"")),
            };
            RouterConfig { renormalize: false, groups, routed_scaling_factor: scaling(fields, 1.0)?, ..softmax }
        }
        Family::DeepseekV3 => {
            fields.only("scoring_func", "sigmoid")?;
            fields.only("topk_method", "noaux_tc")?;
            RouterConfig {
                scoring: Scoring::Sigmoid,
                renormalize: fields.flag("norm_topk_prob")?.unwrap_or(true),
                renormalize_epsilon: 1e-20,
                groups: v3_groups(fields)?,
                routed_scaling_factor: scaling(fields, 2.5)?,
                ..softmax
            }
        }
    };
    config.validate(layer.num_experts).map_err(|error| {
        let field = match error.tensor.as_deref() {
            Some("top_k") => "num_experts_per_tok",
            Some(other) => other,
            None => "router",
        };
        InputError { tensor: Some(fields.name(field)), ..error }
    })?;
    Ok(config)
}

fn scaling(fields: Fields<'_>, default: f32) -> Result<f32, InputError> {
    Ok(fields.number("routed_scaling_factor")?.unwrap_or(default))
}

fn required_groups(fields: Fields<'_>, score: GroupScore) -> Result<GroupLimit, InputError> {
    let required = |field| fields.size(field)?.ok_or_else(|| fields.wrong(field, "a number, for group-limited top-k"));
    Ok(GroupLimit { num_groups: required("n_group")?, top_groups: required("topk_group")?, score })
}

/// 8 groups of which 4, unless the config says otherwise; `null` for both is no limit.
fn v3_groups(fields: Fields<'_>) -> Result<Option<GroupLimit>, InputError> {
    if fields.is_null("n_group") && fields.is_null("topk_group") {
        return Ok(None);
    }
    let num_groups = fields.size("n_group")?.unwrap_or(8);
    let top_groups = fields.size("topk_group")?.unwrap_or(4);
    Ok(Some(GroupLimit { num_groups, top_groups, score: GroupScore::TopTwoSum }))
}
