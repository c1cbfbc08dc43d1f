//! The one struct that the raw door takes.

use moe_lora_core::{Activation, DType};

/// [`ForwardArgs::dtype`]: bfloat16.
pub const DTYPE_BF16: u32 = 0;
/// [`ForwardArgs::dtype`]: IEEE 754 binary16.
pub const DTYPE_F16: u32 = 1;
/// [`ForwardArgs::out_dtype`]: IEEE 754 binary32.
pub const DTYPE_F32: u32 = 2;

/// [`ForwardArgs::activation`]: `SiLU(g) * u`.
pub const ACTIVATION_SILU: u32 = 0;
/// [`ForwardArgs::activation`]: `GELU(g) * u`.
pub const ACTIVATION_GELU: u32 = 1;
/// [`ForwardArgs::activation`]: the same with the tanh form of GELU.
pub const ACTIVATION_GELU_TANH: u32 = 2;
/// [`ForwardArgs::activation`]: `(u + 1) * g * sigmoid(alpha g)` with `g <= limit` and `|u| <= limit` (gpt-oss).
pub const ACTIVATION_CLAMPED_SWIGLU: u32 = 3;

/// One forward of one layer: where its tensors are, how large, and what the layer does.
///
/// Fields of type `u64` are addresses in GPU memory, 0 for what is absent, unless they say otherwise. All tensors are
/// row-major and without gaps, but for the base weights, which have strides. Tensors of the layer's format lie at multiples
/// of 16 bytes, the workspace at a multiple of 256, everything else at multiples of its numbers' size. The layout is that of
/// the same struct in C, without padding.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct ForwardArgs {
    /// The `CUstream` to run on; 0 is the default stream.
    pub stream: u64,
    /// `[T, H]`.
    pub hidden: u64,
    /// i32 `[T, k]`: experts, -1 for one that is elsewhere, as are ids of other ranks' experts. Others are skipped and counted.
    pub topk_ids: u64,
    /// f32 `[T, k]`, used as they are.
    pub topk_weights: u64,
    /// i32 `[T]`: adapter slots, -1 for the base model. Other numbers are taken as -1 and counted. Not read for no slots.
    pub token_slots: u64,
    /// `[E, I, H]` with the strides below.
    pub gate: u64,
    /// Likewise, with the same strides.
    pub up: u64,
    /// `[E, H, I]` with the strides below.
    pub down: u64,
    /// f32 `[E, I]`, or 0.
    pub gate_bias: u64,
    /// f32 `[E, I]`, or 0.
    pub up_bias: u64,
    /// f32 `[E, H]`, or 0: added before the routing weight.
    pub down_bias: u64,
    /// AdapterEntry `[slots, E, 3]`, ranks up to `max_rank`. Not read for no slots.
    pub adapters: u64,
    /// u8 `[slots]`, or 0: 0 for slots that hold nothing for this layer, whose tokens then cost what the base model's cost.
    pub slot_active: u64,
    /// `[T, H]` in `out_dtype`, out; every number is written. May not overlap any other tensor.
    pub out: u64,
    /// RouteCounts, out, or 0: what align found, with ids that are out of range. 8-byte aligned.
    pub counts: u64,
    /// At least `workspace_bytes` bytes, whatever they hold. One stream at a time.
    pub workspace: u64,
    /// Bytes there.
    pub workspace_bytes: u64,
    /// Numbers from expert to expert in gate and in up: `2 I H` for `w13 [E, 2I, H]`. A multiple of 8.
    pub gate_up_expert_stride: u64,
    /// Numbers from expert to expert in down: `H I` for `w2 [E, H, I]`. A multiple of 8.
    pub down_expert_stride: u64,
    /// Numbers from row to row in gate and in up: `H`, or `2H` where gate and up rows alternate. A multiple of 8.
    pub gate_up_row_stride: u32,
    /// Numbers from row to row in down: `I`. A multiple of 8.
    pub down_row_stride: u32,
    /// Tokens, T; none is allowed.
    pub num_tokens: u32,
    /// Experts, E, up to 1024.
    pub num_experts: u32,
    /// Experts a token uses, k.
    pub top_k: u32,
    /// Width of a token, H: a multiple of 8.
    pub hidden_size: u32,
    /// Width inside an expert, I: a multiple of 8.
    pub intermediate_size: u32,
    /// Adapter slots; 0 is the base model alone, in four launches and not six.
    pub num_slots: u32,
    /// The largest rank that the table may ever hold; what the workspace is sized by and kernels are chosen by.
    pub max_rank: u32,
    /// Format of hidden states, weights and adapters: [`DTYPE_BF16`] or [`DTYPE_F16`].
    pub dtype: u32,
    /// Format of `out`: `dtype`, or [`DTYPE_F32`].
    pub out_dtype: u32,
    /// [`ACTIVATION_SILU`] or one of its kind.
    pub activation: u32,
    /// 1: the expert sees `w_j x` and its output is summed unweighted (Llama-4); 0: the output is weighted.
    pub weigh_input: u32,
    /// Of [`ACTIVATION_CLAMPED_SWIGLU`].
    pub alpha: f32,
    /// Of [`ACTIVATION_CLAMPED_SWIGLU`].
    pub limit: f32,
    /// Factor of the output.
    pub scaling: f32,
    /// Under expert parallelism the id of this rank's first expert, else 0.
    pub first_expert: u32,
    /// Under expert parallelism the experts of all ranks: ids below this that are not this rank's are skipped, not counted. Else 0.
    pub all_experts: u32,
    /// Of fully sharded adapters the part that is here: some ranks of gate and up A, some rows of down B.
    pub adapter_part: u32,
    /// How many parts there are; 0 and 1: adapters are whole.
    pub adapter_parts: u32,
}

const _: () = assert!(size_of::<ForwardArgs>() == 19 * 8 + 20 * 4);

impl ForwardArgs {
    /// Sets gate, up and their strides to a tensor `w13 [E, 2I, H]` that has all gate rows of an expert before its up rows
    /// or, `interleaved`, gate and up rows in turns. The sizes must be set before.
    #[must_use]
    pub const fn with_w13(mut self, w13: u64, interleaved: bool) -> Self {
        let (hidden, intermediate) = (self.hidden_size as u64, self.intermediate_size as u64);
        self.gate = w13;
        self.up = w13 + 2 * if interleaved { hidden } else { intermediate * hidden };
        self.gate_up_row_stride = self.hidden_size * if interleaved { 2 } else { 1 };
        self.gate_up_expert_stride = 2 * intermediate * hidden;
        self
    }

    /// Sets down and its strides to a tensor `w2 [E, H, I]`. The sizes must be set before.
    #[must_use]
    pub const fn with_w2(mut self, w2: u64) -> Self {
        self.down = w2;
        self.down_row_stride = self.intermediate_size;
        self.down_expert_stride = self.intermediate_size as u64 * self.hidden_size as u64;
        self
    }

    /// Sets the activation and its numbers.
    #[must_use]
    pub const fn with_activation(mut self, activation: Activation) -> Self {
        (self.activation, self.alpha, self.limit) = match activation {
            Activation::Silu => (ACTIVATION_SILU, 0.0, 0.0),
            Activation::Gelu => (ACTIVATION_GELU, 0.0, 0.0),
            Activation::GeluTanh => (ACTIVATION_GELU_TANH, 0.0, 0.0),
            Activation::ClampedSwiglu { alpha, limit } => (ACTIVATION_CLAMPED_SWIGLU, alpha, limit),
        };
        self
    }

    /// The number of a format.
    #[must_use]
    pub const fn dtype_code(dtype: DType) -> u32 {
        match dtype {
            DType::Bf16 => DTYPE_BF16,
            DType::F16 => DTYPE_F16,
            DType::F32 => DTYPE_F32,
        }
    }
}
