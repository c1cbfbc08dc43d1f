//! Base weights of one MoE layer.

use crate::{Activation, DType, InputError, LayerShape, Matrix};

/// Biases of one expert, in f32.
#[derive(Debug, Clone, PartialEq)]
pub struct ExpertBias {
    /// Added to gate before the activation, `[I]`.
    pub gate: Vec<f32>,
    /// Added to up before the activation, `[I]`.
    pub up: Vec<f32>,
    /// Added to the down projection and weighted with it, `[H]`.
    pub down: Vec<f32>,
}

/// One expert: three matrices, wherever and however their rows lie.
#[derive(Debug, Clone)]
pub struct ExpertWeights {
    /// `[I, H]`.
    pub gate: Matrix,
    /// `[I, H]`.
    pub up: Matrix,
    /// `[H, I]`.
    pub down: Matrix,
    /// Biases, if the model has them (gpt-oss).
    pub bias: Option<ExpertBias>,
}

/// Where a token's routing weight is applied.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum RouterWeightPlacement {
    /// `out = sum_j w_j y_j` (all but Llama-4).
    #[default]
    Output,
    /// The expert sees `w_j x` and its output is summed unweighted (Llama-4, `apply_router_weight_on_input`).
    Input,
}

/// The base weights of one MoE layer and what it does with them.
#[derive(Debug, Clone)]
pub struct LayerWeights {
    shape: LayerShape,
    dtype: DType,
    experts: Vec<ExpertWeights>,
    activation: Activation,
    router_weight: RouterWeightPlacement,
    routed_scaling_factor: f32,
}

impl LayerWeights {
    /// Checks every matrix against `shape`.
    ///
    /// # Errors
    /// Names the expert and projection, its shape or format, and what it has to be.
    pub fn new(shape: LayerShape, experts: Vec<ExpertWeights>, activation: Activation) -> Result<Self, InputError> {
        let LayerShape { num_experts, hidden_size, intermediate_size, .. } = shape;
        if experts.len() != num_experts {
            return Err(InputError::new(format!("{} experts", experts.len()), format!("{num_experts} experts")));
        }
        let dtype = experts[0].gate.dtype();
        for (e, expert) in experts.iter().enumerate() {
            for (name, matrix, want) in [
                ("gate", &expert.gate, [intermediate_size, hidden_size]),
                ("up", &expert.up, [intermediate_size, hidden_size]),
                ("down", &expert.down, [hidden_size, intermediate_size]),
            ] {
                if matrix.shape() != want || matrix.dtype() != dtype {
                    return Err(InputError::new(
                        format!("{:?} {}", matrix.shape(), matrix.dtype()),
                        format!("{want:?} {dtype}"),
                    )
                    .in_tensor(format!("expert {e} {name}")));
                }
            }
            if expert.bias.is_some() != experts[0].bias.is_some() {
                return Err(InputError::new("biases for some experts only", "for all or none")
                    .in_tensor(format!("expert {e} bias")));
            }
            if let Some(bias) = &expert.bias {
                let found = [bias.gate.len(), bias.up.len(), bias.down.len()];
                let want = [intermediate_size, intermediate_size, hidden_size];
                if found != want {
                    return Err(InputError::new(format!("{found:?}"), format!("{want:?}"))
                        .in_tensor(format!("expert {e} gate, up, down bias")));
                }
            }
        }
        let router_weight = RouterWeightPlacement::Output;
        Ok(Self { shape, dtype, experts, activation, router_weight, routed_scaling_factor: 1.0 })
    }

    /// Applies the routing weight where `placement` says.
    #[must_use]
    pub fn with_router_weight(mut self, placement: RouterWeightPlacement) -> Self {
        self.router_weight = placement;
        self
    }

    /// Multiplies the layer's output by `factor`, for callers whose `topk_weights` do not include it yet. Checkpoints
    /// opened with `moe-lora-model` put it into the router instead, and leave this at 1.
    #[must_use]
    pub fn with_routed_scaling_factor(mut self, factor: f32) -> Self {
        self.routed_scaling_factor = factor;
        self
    }

    /// Sizes.
    #[must_use]
    pub const fn shape(&self) -> &LayerShape {
        &self.shape
    }

    /// Format of all weights.
    #[must_use]
    pub const fn dtype(&self) -> DType {
        self.dtype
    }

    /// One entry an expert.
    #[must_use]
    pub fn experts(&self) -> &[ExpertWeights] {
        &self.experts
    }

    /// How gate and up join.
    #[must_use]
    pub const fn activation(&self) -> Activation {
        self.activation
    }

    /// Where the routing weight goes.
    #[must_use]
    pub const fn router_weight(&self) -> RouterWeightPlacement {
        self.router_weight
    }

    /// Factor on the output.
    #[must_use]
    pub const fn routed_scaling_factor(&self) -> f32 {
        self.routed_scaling_factor
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_wrong_matrix_is_named() {
        let shape = LayerShape::new(2, 1, 4, 3).unwrap();
        let m = |rows, cols| Matrix::from_vec(vec![0_f32; rows * cols], rows, cols).unwrap();
        let expert = |down| ExpertWeights { gate: m(3, 4), up: m(3, 4), down, bias: None };
        assert!(LayerWeights::new(shape, vec![expert(m(4, 3)), expert(m(4, 3))], Activation::Silu).is_ok());
        let error = LayerWeights::new(shape, vec![expert(m(4, 3)), expert(m(3, 4))], Activation::Silu).unwrap_err();
        assert_eq!(error.to_string(), "expert 1 down: found [3, 4] f32, expected [4, 3] f32");
    }
}
