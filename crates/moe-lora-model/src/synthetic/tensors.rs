//! The tensors of a synthetic checkpoint: names, sizes, and each number by its place.

use super::{ExpertForm, Part, TinyModel};
use crate::Family;
use moe_lora_core::{DType, LayerShape};

/// One tensor, whose numbers are made when they are written.
pub(super) struct Tensor {
    pub(super) name: String,
    pub(super) dtype: DType,
    pub(super) shape: Vec<usize>,
    /// From a flat index to the number.
    pub(super) value: Box<dyn Fn(usize) -> f32>,
}

impl Tensor {
    pub(super) fn len(&self) -> usize {
        self.shape.iter().product()
    }

    pub(super) fn bytes(&self) -> usize {
        self.len() * self.dtype.size()
    }
}

pub(super) fn tensors(model: &TinyModel) -> Vec<Tensor> {
    let mut all = Vec::new();
    for layer in 0..model.num_layers {
        let block = model.family.blocks()[0];
        let prefix = format!("model.layers.{layer}.{block}.");
        router(model, layer, &prefix, &mut all);
        match model.form {
            ExpertForm::Each => each(model, layer, &prefix, &mut all),
            ExpertForm::Fused if model.family.storage().transposed => transposed(model, layer, &prefix, &mut all),
            ExpertForm::Fused => fused(model, layer, &prefix, &mut all),
        }
    }
    all
}

/// Collects tensors of one layer; `value` gets the indices of the innermost three dimensions.
fn push(
    all: &mut Vec<Tensor>,
    model: &TinyModel,
    dtype: DType,
    name: String,
    shape: &[usize],
    value: impl Fn(&TinyModel, [usize; 3]) -> f32 + 'static,
) {
    let model = model.clone();
    let [.., cols] = *shape else { return };
    let rows = if shape.len() > 1 { shape[shape.len() - 2] } else { 1 };
    let value = Box::new(move |flat| value(&model, [flat / cols / rows, flat / cols % rows, flat % cols]));
    all.push(Tensor { name, dtype, shape: shape.to_vec(), value });
}

fn router(model: &TinyModel, layer: usize, prefix: &str, all: &mut Vec<Tensor>) {
    let LayerShape { num_experts: e, hidden_size: h, .. } = model.shape;
    let name = |part: &str| format!("{prefix}{}.{part}", model.family.router());
    push(all, model, model.dtype, name("weight"), &[e, h], move |m, [_, r, c]| m.value(layer, Part::Router, 0, r, c));
    let mut bias = |name, part| {
        push(all, model, model.dtype_of(part), name, &[e], move |m, [_, _, c]| m.value(layer, part, 0, c, 0));
    };
    match model.family {
        Family::GptOss => bias(name("bias"), Part::RouterBias),
        Family::DeepseekV3 => bias(name("e_score_correction_bias"), Part::SelectionBias),
        _ => {}
    }
}

fn each(model: &TinyModel, layer: usize, prefix: &str, all: &mut Vec<Tensor>) {
    let LayerShape { num_experts, hidden_size: h, intermediate_size: i, .. } = model.shape;
    let parts =
        [(Part::Gate, Part::GateBias, [i, h]), (Part::Up, Part::UpBias, [i, h]), (Part::Down, Part::DownBias, [h, i])];
    for e in 0..num_experts {
        for (projection, (weight, bias, shape)) in model.family.projections().into_iter().zip(parts) {
            let name = |part: &str| format!("{prefix}experts.{e}.{projection}.{part}");
            push(all, model, model.dtype, name("weight"), &shape, move |m, [_, r, c]| m.value(layer, weight, e, r, c));
            if model.family.has_bias() {
                push(all, model, model.dtype, name("bias"), &shape[..1], move |m, [_, _, c]| {
                    m.value(layer, bias, e, c, 0)
                });
            }
        }
    }
}

/// `[E, 2I, H]`, gate rows first, and `[E, H, I]`.
fn fused(model: &TinyModel, layer: usize, prefix: &str, all: &mut Vec<Tensor>) {
    let LayerShape { num_experts: e, hidden_size: h, intermediate_size: i, .. } = model.shape;
    push(all, model, model.dtype, format!("{prefix}experts.gate_up_proj"), &[e, 2 * i, h], move |m, [e, r, c]| {
        if r < i { m.value(layer, Part::Gate, e, r, c) } else { m.value(layer, Part::Up, e, r - i, c) }
    });
    push(all, model, model.dtype, format!("{prefix}experts.down_proj"), &[e, h, i], move |m, [e, r, c]| {
        m.value(layer, Part::Down, e, r, c)
    });
}

/// gpt-oss: `[E, H, 2I]`, gate and up columns alternating, `[E, I, H]`, and their biases.
fn transposed(model: &TinyModel, layer: usize, prefix: &str, all: &mut Vec<Tensor>) {
    let LayerShape { num_experts: e, hidden_size: h, intermediate_size: i, .. } = model.shape;
    let name = |part: &str| format!("{prefix}experts.{part}");
    push(all, model, model.dtype, name("gate_up_proj"), &[e, h, 2 * i], move |m, [e, r, c]| {
        m.value(layer, if c % 2 == 0 { Part::Gate } else { Part::Up }, e, c / 2, r)
    });
    push(all, model, model.dtype, name("down_proj"), &[e, i, h], move |m, [e, r, c]| {
        m.value(layer, Part::Down, e, c, r)
    });
    push(all, model, model.dtype, name("gate_up_proj_bias"), &[e, 2 * i], move |m, [_, e, c]| {
        m.value(layer, if c % 2 == 0 { Part::GateBias } else { Part::UpBias }, e, c / 2, 0)
    });
    push(all, model, model.dtype, name("down_proj_bias"), &[e, h], move |m, [_, e, c]| {
        m.value(layer, Part::DownBias, e, c, 0)
    });
}
