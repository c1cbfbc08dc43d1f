//! The `config.json` of a synthetic checkpoint.

use super::TinyModel;
use crate::Family;
use moe_lora_core::{DType, LayerShape};
use serde_json::{Map, Value, json};

pub(super) fn config(model: &TinyModel) -> Value {
    let LayerShape { num_experts, top_k, hidden_size, intermediate_size, .. } = model.shape;
    let common = json!({
        "model_type": model.family.model_type(),
        "hidden_act": "silu",
        "hidden_size": hidden_size,
        "num_attention_heads": 1,
        "num_experts_per_tok": top_k,
        "num_hidden_layers": model.num_layers,
        "num_key_value_heads": 1,
        "torch_dtype": match model.dtype {
            DType::F32 => "float32",
            DType::F16 => "float16",
            DType::Bf16 => "bfloat16",
        },
    });
    let (n_group, topk_group) = groups(&model.shape);
    let own = match model.family {
        Family::Mixtral => json!({ "intermediate_size": intermediate_size, "num_local_experts": num_experts }),
        Family::Olmoe => {
            json!({ "intermediate_size": intermediate_size, "num_experts": num_experts, "norm_topk_prob": false })
        }
        Family::Qwen2Moe | Family::Qwen3Moe => json!({
            "decoder_sparse_step": 1,
            "intermediate_size": 2 * intermediate_size,
            "mlp_only_layers": [],
            "moe_intermediate_size": intermediate_size,
            "norm_topk_prob": model.family == Family::Qwen3Moe,
            "num_experts": num_experts,
        }),
        Family::DeepseekV2 => json!({
            "first_k_dense_replace": 0,
            "intermediate_size": 2 * intermediate_size,
            "moe_intermediate_size": intermediate_size,
            "moe_layer_freq": 1,
            "n_group": n_group,
            "n_routed_experts": num_experts,
            "norm_topk_prob": false,
            "routed_scaling_factor": 1.5,
            "scoring_func": "softmax",
            "topk_group": topk_group,
            "topk_method": if n_group.is_some() { "group_limited_greedy" } else { "greedy" },
        }),
        Family::DeepseekV3 => json!({
            "first_k_dense_replace": 0,
            "intermediate_size": 2 * intermediate_size,
            "moe_intermediate_size": intermediate_size,
            "moe_layer_freq": 1,
            "n_group": n_group,
            "n_routed_experts": num_experts,
            "norm_topk_prob": true,
            "routed_scaling_factor": 2.5,
            "scoring_func": "sigmoid",
            "topk_group": topk_group,
            "topk_method": "noaux_tc",
        }),
        Family::GptOss => json!({
            "intermediate_size": intermediate_size,
            "num_local_experts": num_experts,
            "swiglu_limit": 7.0,
        }),
    };
    let fields = [common, own].into_iter().filter_map(|v| if let Value::Object(map) = v { Some(map) } else { None });
    Value::Object(fields.flatten().collect::<Map<_, _>>())
}

/// The better of two groups where the sizes allow it, one group else, and none for a single expert.
fn groups(shape: &LayerShape) -> (Option<usize>, Option<usize>) {
    let half = shape.num_experts / 2;
    if shape.num_experts.is_multiple_of(2) && half >= shape.top_k.max(2) {
        (Some(2), Some(1))
    } else if shape.num_experts >= 2 {
        (Some(1), Some(1))
    } else {
        (None, None)
    }
}
