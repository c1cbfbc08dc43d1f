//! The gate of an expert: `h = act(gate, up)`.

/// How gate and up join.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Activation {
    /// `silu(gate) * up`, with `silu(x) = x * sigmoid(x)` (Mixtral, Qwen, OLMoE, DeepSeek).
    Silu,
    /// `gelu(gate) * up`, the exact form: `gelu(x) = x * Phi(x)`.
    Gelu,
    /// `gelu(gate) * up` in the tanh approximation (`gelu_pytorch_tanh`).
    GeluTanh,
    /// gpt-oss: gate clamped from above and up to `[-limit, limit]`, then
    /// `(up + 1) * gate * sigmoid(alpha * gate)`.
    ClampedSwiglu {
        /// Slope of the sigmoid, 1.702.
        alpha: f32,
        /// Clamp, 7.0.
        limit: f32,
    },
}

impl Activation {
    /// The gpt-oss constants.
    pub const GPT_OSS: Self = Self::ClampedSwiglu { alpha: 1.702, limit: 7.0 };
}
