//! One MoE layer with LoRA, token by token, in f64.

use crate::rounding::{Exact, Rounding, RoundingPoint};
use moe_lora_core::{
    Activation, AdapterTable, Element, ExpertWeights, InputError, LayerWeights, Lora, Matrix, Projection,
    RouterWeightPlacement,
};
use rayon::prelude::*;

/// Everything that decides the output of a layer.
#[derive(Debug, Clone, Copy)]
pub struct LayerInput<'a> {
    /// `[T, H]`.
    pub hidden: &'a [f64],
    /// Base weights.
    pub weights: &'a LayerWeights,
    /// `[T, k]`; -1 is skipped.
    pub topk_ids: &'a [i32],
    /// `[T, k]`.
    pub topk_weights: &'a [f32],
    /// Adapter slot of every token, -1 for the base model, `[T]`.
    pub token_slots: &'a [i32],
    /// Where the slots' adapters are.
    pub adapters: &'a AdapterTable<'a>,
}

/// The layer's output `[T, H]`: for each token `routed_scaling * sum_j w_j y_j`, with
///
/// ```text
/// gate = (W_gate + s B A) x + b_gate      up likewise
/// h    = act(gate, up)
/// y_j  = (W_down + s B A) h + b_down
/// ```
///
/// # Errors
/// If lengths do not fit together or an expert id is outside `[-1, E)`.
pub fn forward(input: &LayerInput<'_>) -> Result<Vec<f64>, InputError> {
    forward_rounded(input, &Exact)
}

/// [`forward`] with a hook at every [`RoundingPoint`].
///
/// # Errors
/// As [`forward`].
pub fn forward_rounded(input: &LayerInput<'_>, rounding: &impl Rounding) -> Result<Vec<f64>, InputError> {
    input.validate()?;
    let shape = input.weights.shape();
    let mut out = vec![0.0; input.hidden.len()];
    out.par_chunks_mut(shape.hidden_size).enumerate().for_each(|(token, out)| input.token(token, out, rounding));
    Ok(out)
}

impl LayerInput<'_> {
    fn validate(&self) -> Result<(), InputError> {
        let shape = self.weights.shape();
        let tokens = self.token_slots.len();
        for (name, found, want) in [
            ("hidden", self.hidden.len(), tokens * shape.hidden_size),
            ("topk_ids", self.topk_ids.len(), tokens * shape.top_k),
            ("topk_weights", self.topk_weights.len(), tokens * shape.top_k),
        ] {
            if found != want {
                let expected = format!("{want} for {tokens} tokens");
                return Err(InputError::new(format!("{found} values"), expected).in_tensor(name));
            }
        }
        let outside = |id: &i32| *id < -1 || i64::from(*id) >= shape.num_experts as i64;
        match self.topk_ids.iter().find(|id| outside(id)) {
            Some(id) => Err(InputError::new(format!("expert {id}"), format!("-1 to {}", shape.num_experts - 1))
                .in_tensor("topk_ids")),
            None => Ok(()),
        }
    }

    fn token(&self, token: usize, out: &mut [f64], rounding: &impl Rounding) {
        let shape = self.weights.shape();
        let x = &self.hidden[token * shape.hidden_size..][..shape.hidden_size];
        let slot = self.token_slots[token];
        for j in 0..shape.top_k {
            let pair = token * shape.top_k + j;
            let Ok(e) = usize::try_from(self.topk_ids[pair]) else { continue };
            let weight = f64::from(self.topk_weights[pair]);
            let (on_input, on_output) = match self.weights.router_weight() {
                RouterWeightPlacement::Input => (weight, 1.0),
                RouterWeightPlacement::Output => (1.0, weight),
            };
            let expert = &self.weights.experts()[e];
            let lora = |projection| self.adapters.get(slot, e, projection);
            let y = self.expert(x, expert, on_input, &lora, rounding);
            out.iter_mut().zip(y).for_each(|(out, y)| *out += on_output * y);
        }
        let scaling = f64::from(self.weights.routed_scaling_factor());
        out.iter_mut().for_each(|v| *v = rounding.round(RoundingPoint::Output, *v * scaling));
    }

    fn expert<'l>(
        &self,
        x: &[f64],
        expert: &ExpertWeights,
        on_input: f64,
        lora: &impl Fn(Projection) -> Option<&'l Lora>,
        rounding: &impl Rounding,
    ) -> Vec<f64> {
        let shrink = |point, lora: &Lora, x: &[f64]| -> Vec<f64> {
            let s = f64::from(lora.scale());
            matvec(lora.a(), x).into_iter().map(|v| rounding.round(point, s * v)).collect()
        };
        let project = |point, matrix: &Matrix, projection, x: &[f64]| -> Vec<f64> {
            let mut y = matvec(matrix, x);
            if let Some(lora) = lora(projection) {
                add(&mut y, &matvec(lora.b(), &shrink(point, lora, x)));
            }
            y
        };
        let mut gate = project(RoundingPoint::GateUpShrink, &expert.gate, Projection::Gate, x);
        let mut up = project(RoundingPoint::GateUpShrink, &expert.up, Projection::Up, x);
        // Weighting x is the same as weighting W x, for the products are linear; biases come after.
        gate.iter_mut().chain(&mut up).for_each(|v| *v *= on_input);
        if let Some(bias) = &expert.bias {
            add(&mut gate, &widen(&bias.gate));
            add(&mut up, &widen(&bias.up));
        }
        let activation = self.weights.activation();
        let h: Vec<f64> = gate
            .iter()
            .zip(&up)
            .map(|(&g, &u)| rounding.round(RoundingPoint::Intermediate, activate(activation, g, u)))
            .collect();
        let mut y = project(RoundingPoint::DownShrink, &expert.down, Projection::Down, &h);
        if let Some(bias) = &expert.bias {
            add(&mut y, &widen(&bias.down));
        }
        y.iter_mut().for_each(|v| *v = rounding.round(RoundingPoint::ExpertOutput, *v));
        y
    }
}

fn activate(activation: Activation, gate: f64, up: f64) -> f64 {
    let sigmoid = |x: f64| 1.0 / (1.0 + (-x).exp());
    match activation {
        Activation::Silu => gate * sigmoid(gate) * up,
        Activation::Gelu => 0.5 * gate * libm::erfc(-gate / std::f64::consts::SQRT_2) * up,
        Activation::GeluTanh => {
            let inner = (2.0 / std::f64::consts::PI).sqrt() * (gate + 0.044_715 * gate.powi(3));
            0.5 * gate * (1.0 + inner.tanh()) * up
        }
        Activation::ClampedSwiglu { alpha, limit } => {
            let (alpha, limit) = (f64::from(alpha), f64::from(limit));
            let gate = gate.min(limit);
            (up.clamp(-limit, limit) + 1.0) * gate * sigmoid(alpha * gate)
        }
    }
}

fn matvec(matrix: &Matrix, x: &[f64]) -> Vec<f64> {
    fn typed<T: Element>(matrix: &Matrix, x: &[f64]) -> Option<Vec<f64>> {
        let view = matrix.view::<T>()?;
        let dot = |row: &[T]| row.iter().zip(x).map(|(w, x)| f64::from(w.to_f32()) * x).sum();
        Some((0..view.rows()).map(|r| dot(view.row(r))).collect())
    }
    typed::<f32>(matrix, x)
        .or_else(|| typed::<half::bf16>(matrix, x))
        .or_else(|| typed::<half::f16>(matrix, x))
        .unwrap_or_default()
}

fn add(sum: &mut [f64], terms: &[f64]) {
    sum.iter_mut().zip(terms).for_each(|(sum, term)| *sum += term);
}

fn widen(values: &[f32]) -> Vec<f64> {
    values.iter().map(|&v| f64::from(v)).collect()
}
