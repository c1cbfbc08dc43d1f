//! Where a backend may round, and how the twin follows it.

use half::{bf16, f16};
use moe_lora_core::DType;

/// A place in the layer where a value may be stored in a narrower format.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum RoundingPoint {
    /// `s A x` of gate and up, in rank space.
    GateUpShrink,
    /// `h = act(gate, up)`.
    Intermediate,
    /// `s A h` of down, in rank space.
    DownShrink,
    /// `y_j`, the output of one expert before it is weighted.
    ExpertOutput,
    /// The sum over experts.
    Output,
}

/// What happens to a value at a [`RoundingPoint`].
pub trait Rounding: Sync {
    /// The value as the backend keeps it.
    fn round(&self, point: RoundingPoint, value: f64) -> f64;
}

/// No rounding anywhere: the truth.
#[derive(Debug, Clone, Copy, Default)]
pub struct Exact;

impl Rounding for Exact {
    fn round(&self, _: RoundingPoint, value: f64) -> f64 {
        value
    }
}

impl<F: Fn(RoundingPoint, f64) -> f64 + Sync> Rounding for F {
    fn round(&self, point: RoundingPoint, value: f64) -> f64 {
        self(point, value)
    }
}

/// Where this project's GPU kernels round (`docs/numerics.md`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct GpuRounding {
    /// The format of weights and activations.
    pub dtype: DType,
    /// `y_j` stays f32 until the sum over experts.
    pub expert_outputs_f32: bool,
}

impl Rounding for GpuRounding {
    fn round(&self, point: RoundingPoint, value: f64) -> f64 {
        match point {
            // The sum of two numbers of the format.
            RoundingPoint::GateUpShrink | RoundingPoint::DownShrink => {
                let first = to_dtype(value, self.dtype);
                first + to_dtype(value - first, self.dtype)
            }
            RoundingPoint::ExpertOutput if self.expert_outputs_f32 => value,
            RoundingPoint::Intermediate | RoundingPoint::ExpertOutput | RoundingPoint::Output => {
                to_dtype(value, self.dtype)
            }
        }
    }
}

/// Rounds to nearest even in a storage format.
///
/// The halves are reached through f32, as on every device: accumulators are f32 and are rounded from there.
#[must_use]
pub fn to_dtype(value: f64, dtype: DType) -> f64 {
    let single = value as f32;
    f64::from(match dtype {
        DType::F32 => single,
        DType::F16 => f16::from_f32(single).to_f32(),
        DType::Bf16 => bf16::from_f32(single).to_f32(),
    })
}
