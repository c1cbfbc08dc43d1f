//! Weights of one layer, from the tensors found for it.

use crate::convert::{Block, to_f32, transposed_columns};
use crate::experts::{Expert, Experts};
use moe_lora_core::{ExpertBias, ExpertStorage, ExpertWeights, InputError, LayerShape};
use rayon::prelude::*;

/// Views of the mapped files; gpt-oss's 3-D tensors are copied into dense rows, as their columns alternate gate and up.
pub(crate) fn load(
    experts: &Experts<'_>,
    layer: &LayerShape,
    storage: ExpertStorage,
) -> Result<Vec<ExpertWeights>, InputError> {
    match experts {
        Experts::Each(experts) => experts.iter().map(|e| load_each(e, layer)).collect(),
        Experts::Fused { gate_up, down, bias } => {
            let LayerShape { hidden_size: h, intermediate_size: i, .. } = *layer;
            let biases = match *bias {
                Some([gate_up, down]) => fused_biases(&to_f32(gate_up)?, &to_f32(down)?, layer),
                None => Vec::new(),
            };
            let bias = |e: usize| biases.get(e).cloned();
            if storage.transposed {
                let load = |e| {
                    Ok(ExpertWeights {
                        gate: transposed_columns(*gate_up, e * h * 2 * i, [h, 2 * i], 0, 2)?,
                        up: transposed_columns(*gate_up, e * h * 2 * i, [h, 2 * i], 1, 2)?,
                        down: transposed_columns(*down, e * i * h, [i, h], 0, 1)?,
                        bias: bias(e),
                    })
                };
                return (0..layer.num_experts).into_par_iter().map(load).collect();
            }
            let (gate_up, down) = (Block::new(*gate_up)?, Block::new(*down)?);
            let load = |e| {
                Ok(ExpertWeights {
                    gate: gate_up.matrix(2 * e * i * h, i, h)?,
                    up: gate_up.matrix((2 * e + 1) * i * h, i, h)?,
                    down: down.matrix(e * h * i, h, i)?,
                    bias: bias(e),
                })
            };
            (0..layer.num_experts).map(load).collect()
        }
    }
}

fn load_each(expert: &Expert<'_>, layer: &LayerShape) -> Result<ExpertWeights, InputError> {
    let LayerShape { hidden_size: h, intermediate_size: i, .. } = *layer;
    let [gate, up, down] = expert.weights;
    let bias = expert.bias.map(|[gate, up, down]| {
        Ok::<_, InputError>(ExpertBias { gate: to_f32(gate)?, up: to_f32(up)?, down: to_f32(down)? })
    });
    Ok(ExpertWeights {
        gate: Block::new(gate)?.matrix(0, i, h)?,
        up: Block::new(up)?.matrix(0, i, h)?,
        down: Block::new(down)?.matrix(0, h, i)?,
        bias: bias.transpose()?,
    })
}

/// Splits `[E, 2I]`, gate and up alternating, and `[E, H]`.
fn fused_biases(gate_up: &[f32], down: &[f32], layer: &LayerShape) -> Vec<ExpertBias> {
    let experts = gate_up.chunks(2 * layer.intermediate_size).zip(down.chunks(layer.hidden_size));
    experts
        .map(|(gate_up, down)| ExpertBias {
            gate: gate_up.iter().step_by(2).copied().collect(),
            up: gate_up.iter().skip(1).step_by(2).copied().collect(),
            down: down.to_vec(),
        })
        .collect()
}
