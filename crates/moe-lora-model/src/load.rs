//! A rank's weights of one layer, from the tensors found for the layer.

use crate::convert::{Block, to_f32, transposed_columns};
use crate::experts::{Expert, Experts};
use moe_lora_core::{ExpertBias, ExpertStorage, ExpertWeights, InputError, LayerShape, Share};
use rayon::prelude::*;

/// Views of the mapped files; of gpt-oss's 3-D tensors the share is copied into dense rows, as their columns alternate gate
/// and up.
pub(crate) fn load(
    experts: &Experts<'_>,
    layer: &LayerShape,
    storage: ExpertStorage,
    share: &Share,
) -> Result<Vec<ExpertWeights>, InputError> {
    match experts {
        Experts::Each(experts) => {
            let mine = experts.get(share.experts.clone()).unwrap_or_default();
            mine.iter().map(|e| share.of_expert(&load_each(e, layer)?)).collect()
        }
        Experts::Fused { gate_up, down, bias } => {
            let LayerShape { hidden_size: h, intermediate_size: i, .. } = *layer;
            let biases = match *bias {
                Some([gate_up, down]) => fused_biases(&to_f32(gate_up)?, &to_f32(down)?, layer),
                None => Vec::new(),
            };
            if storage.transposed {
                let (first, part) = (share.intermediate.start, share.intermediate.len());
                let load = |e| {
                    let gate_up =
                        |half| transposed_columns(*gate_up, e * h * 2 * i, [h, 2 * i], (2 * first + half, 2), part);
                    Ok(ExpertWeights {
                        gate: gate_up(0)?,
                        up: gate_up(1)?,
                        down: transposed_columns(*down, (e * i + first) * h, [part, h], (0, 1), h)?,
                        bias: biases.get(e).map(|bias| share.of_bias(bias)).transpose()?,
                    })
                };
                return share.experts.clone().into_par_iter().map(load).collect();
            }
            let (gate_up, down) = (Block::new(*gate_up)?, Block::new(*down)?);
            let load = |e| {
                share.of_expert(&ExpertWeights {
                    gate: gate_up.matrix(2 * e * i * h, i, h)?,
                    up: gate_up.matrix((2 * e + 1) * i * h, i, h)?,
                    down: down.matrix(e * h * i, h, i)?,
                    bias: biases.get(e).cloned(),
                })
            };
            share.experts.clone().map(load).collect()
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
