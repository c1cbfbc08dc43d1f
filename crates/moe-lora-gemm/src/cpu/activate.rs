//! Bias and activation between the two projections.
//!
//! The functions are written without branches, in operations that every vector unit rounds alike, so that each kernel
//! compiles them for its own vectors and all give the same bits.
#![expect(clippy::excessive_precision, reason = "constants as published")]

use moe_lora_core::{Activation, Element};

/// What happens to the gate and up accumulators of one row.
pub(super) struct Glu<'a> {
    /// The function.
    pub(super) activation: Activation,
    /// The row's routing weight if the expert sees it, else 1.
    pub(super) weight: f32,
    /// Bias of gate and up for the columns at hand.
    pub(super) bias: Option<(&'a [f32], &'a [f32])>,
}

impl Glu<'_> {
    /// `h = act(weight * gate + bias, weight * up + bias)`; `gate` and `up` are clobbered.
    #[inline(always)]
    pub(super) fn apply<X: Element>(&self, gate: &mut [f32], up: &mut [f32], h: &mut [X]) {
        for (gate, up) in gate.iter_mut().zip(up.iter_mut()) {
            *gate *= self.weight;
            *up *= self.weight;
        }
        if let Some((gate_bias, up_bias)) = self.bias {
            add(gate, gate_bias);
            add(up, up_bias);
        }
        match self.activation {
            Activation::Silu => map(gate, up, h, |g, u| g * sigmoid(g) * u),
            Activation::Gelu => map(gate, up, h, |g, u| gelu(g) * u),
            Activation::GeluTanh => map(gate, up, h, |g, u| gelu_tanh(g) * u),
            Activation::ClampedSwiglu { alpha, limit } => map(gate, up, h, |g, u| {
                // Comparisons, not `min` and `max`: these would turn a NaN into the limit.
                let g = if g > limit { limit } else { g };
                let u = if u > limit { limit } else { u };
                let u = if u < -limit { -limit } else { u };
                (u + 1.0) * (g * sigmoid(alpha * g))
            }),
        }
    }
}

#[inline(always)]
fn add(values: &mut [f32], bias: &[f32]) {
    for (value, bias) in values.iter_mut().zip(bias) {
        *value += bias;
    }
}

#[inline(always)]
fn map<X: Element>(gate: &[f32], up: &[f32], h: &mut [X], f: impl Fn(f32, f32) -> f32) {
    for ((h, &gate), &up) in h.iter_mut().zip(gate).zip(up) {
        *h = X::from_f32(f(gate, up));
    }
}

/// `e^x` to 2 ulp, clamped to the normal numbers.
#[inline(always)]
fn exp(x: f32) -> f32 {
    // Adding and subtracting 1.5 * 2^23 rounds to an integer, which the sum's low bits hold.
    const ROUND: f32 = 12_582_912.0;
    const LN2_HIGH: f32 = 0.693_359_375;
    const LN2_LOW: f32 = -2.121_944_4e-4;
    let x = if x > 88.0 { 88.0 } else { x };
    let x = if x < -87.0 { -87.0 } else { x };
    let shifted = x * std::f32::consts::LOG2_E + ROUND;
    let n = shifted - ROUND;
    let r = (x - n * LN2_HIGH) - n * LN2_LOW;
    // Taylor's series to the 7th power: |r| <= 0.35, so the remainder is below 1e-8.
    let mut p = 1.0 / 5040.0;
    for c in [1.0 / 720.0, 1.0 / 120.0, 1.0 / 24.0, 1.0 / 6.0, 0.5, 1.0, 1.0] {
        p = p * r + c;
    }
    p * f32::from_bits((shifted.to_bits() << 23).wrapping_add(1_f32.to_bits()))
}

#[inline(always)]
fn sigmoid(x: f32) -> f32 {
    1.0 / (1.0 + exp(-x))
}

/// `x * Phi(x)`, with the complementary error function of Press et al., Numerical Recipes, `erfcc` (error 1.2e-7).
#[inline(always)]
fn gelu(x: f32) -> f32 {
    let z = x.abs() * std::f32::consts::FRAC_1_SQRT_2;
    let t = 1.0 / (1.0 + 0.5 * z);
    let mut p = 0.170_872_77;
    for c in [
        -0.822_152_23,
        1.488_515_87,
        -1.135_203_98,
        0.278_868_07,
        -0.186_288_06,
        0.096_784_18,
        0.374_091_96,
        1.000_023_68,
        -1.265_512_23,
    ] {
        p = p * t + c;
    }
    let erfc = t * exp(p - z * z);
    x * 0.5 * if x < 0.0 { erfc } else { 2.0 - erfc }
}

/// `0.5 x (1 + tanh(y)) = x sigmoid(2 y)`, `y = sqrt(2 / pi) (x + 0.044715 x^3)`.
#[inline(always)]
fn gelu_tanh(x: f32) -> f32 {
    x * sigmoid(1.595_769_1 * (x + 0.044_715 * x * x * x))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exp_keeps_six_digits() {
        for i in -8700..8800 {
            let x = i as f32 / 100.0;
            let want = f64::from(x).exp();
            assert!((f64::from(exp(x)) / want - 1.0).abs() < 3e-7, "{x}");
        }
        assert!(exp(f32::NAN).is_nan() && exp(-1e30) < 1e-37 && exp(1e30) > 1e38);
    }

    #[test]
    fn gelus_meet_known_values() {
        // Phi(1) = 0.841344746, Phi(-2) = 0.022750132
        assert!((gelu(1.0) - 0.841_344_75).abs() < 3e-7);
        assert!((gelu(-2.0) + 0.045_500_264).abs() < 3e-7);
        assert_eq!(gelu(30.0), 30.0);
        assert!(gelu(-30.0).abs() < 1e-30);
        assert!((gelu_tanh(1.0) - 0.841_191_99).abs() < 3e-7);
        assert!(gelu(f32::NAN).is_nan() && gelu_tanh(f32::NAN).is_nan());
    }
}
