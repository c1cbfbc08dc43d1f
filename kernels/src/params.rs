//! The parameter struct of every kernel, as `cuda/params.cuh` declares it.
//!
//! Fields of type `u64` are device addresses; shapes and formats are given field by field, "out" marks what a kernel writes.
//! The kernels check nothing: whoever launches them answers for addresses, sizes and alignment (16 bytes for everything of
//! the activation's format).

use crate::{Format, Kernel};

pub(crate) mod sealed {
    pub trait Sealed {}
}

/// A struct that a kernel takes.
pub trait KernelParams: Copy + sealed::Sealed {
    /// The kernel that takes it.
    fn kernel(format: Format) -> Kernel;
}

/// Declares a struct, its kernel, and the size and offsets that `params.cuh` asserts for it: fields without padding.
macro_rules! params {
    ($(#[$doc:meta])* $name:ident, $size:literal, $kernel:expr, { $($(#[$field_doc:meta])* $field:ident: $type:ty,)* }) => {
        $(#[$doc])*
        #[repr(C)]
        #[derive(Debug, Clone, Copy, PartialEq, Default)]
        pub struct $name {
            $($(#[$field_doc])* pub $field: $type,)*
        }

        impl sealed::Sealed for $name {}

        impl KernelParams for $name {
            fn kernel(format: Format) -> Kernel {
                let kernel: fn(Format) -> Kernel = $kernel;
                kernel(format)
            }
        }

        const _: () = {
            let mut at = 0;
            $(
                assert!(core::mem::offset_of!($name, $field) == at, stringify!($name, $field));
                at += size_of::<$type>();
            )*
            assert!(at == $size && size_of::<$name>() == $size, stringify!($name));
        };
    };
}

params!(
    /// Logits to expert ids and weights.
    TopkParams, 72, |_| Kernel::Topk, {
        /// f32 `[T, E]`.
        logits: u64,
        /// f32 `[E]` or 0.
        selection_bias: u64,
        /// i32 `[T, k]`, out.
        topk_ids: u64,
        /// f32 `[T, k]`, out.
        topk_weights: u64,
        /// Tokens, T.
        num_tokens: u32,
        /// Experts, E, at most 1024.
        num_experts: u32,
        /// Experts a token uses, k.
        top_k: u32,
        /// 0: softmax over all experts, 1: sigmoid.
        sigmoid: u32,
        /// Divide by the sum of the chosen.
        renormalize: u32,
        /// Groups of experts, 0: none.
        num_groups: u32,
        /// Groups a token may use.
        top_groups: u32,
        /// 0: a group scores by its best expert, 1: by the sum of its best two.
        group_top_two: u32,
        /// Added to the sum that renormalisation divides by.
        renormalize_epsilon: f32,
        /// Factor of every weight.
        scaling: f32,
    }
);

params!(
    /// Pairs to rows sorted by (expert, slot), and the lists of work. Needs T > 0.
    AlignParams, 144, |_| Kernel::Align, {
        /// i32 `[T, k]`.
        topk_ids: u64,
        /// f32 `[T, k]`.
        topk_weights: u64,
        /// i32 `[T]` or 0: all base.
        token_slots: u64,
        /// u8 `[L]` or 0: all; a slot with 0 has no adapter in this layer and counts as -1.
        slot_active: u64,
        /// u32 `[T * k]`, out.
        row_pair: u64,
        /// f32 `[T * k]`, out, or 0 where nobody reads it.
        row_weight: u64,
        /// i32 `[T * k]`, out.
        pair_row: u64,
        /// Segment `[most segments]`, out.
        segments: u64,
        /// RowTile `[most tiles]`, out.
        tiles: u64,
        /// Segment `[most chunks]`, out: LoRA work.
        chunks: u64,
        /// RouteCounts, out.
        counts: u64,
        /// u32 `[2, T]`, scratch.
        order: u64,
        /// u32 `[grid, max(E + 2, 1024)]`, scratch; only for grid > 1.
        table: u64,
        /// u32, zeroed once when allocated; only for grid > 1.
        barrier: u64,
        /// Tokens, T.
        num_tokens: u32,
        /// Experts a token uses, k.
        top_k: u32,
        /// Experts, E, at most 1024.
        num_experts: u32,
        /// Adapter slots, L.
        num_slots: u32,
        /// 0: row tiles of 128 rows; else an expert's rows in equal tiles of at most this many, a multiple of 16.
        tile_rows: u32,
        /// The id of expert 0.
        first_expert: u32,
        /// Ids below this that are not in `first_expert..first_expert + E` are like -1: other ranks' experts.
        all_experts: u32,
        /// Zero.
        reserved: u32,
    }
);

params!(
    /// Pairs of every slot by expert, padded to whole blocks. Slots that are disabled or not listed: nothing is written.
    AlignBlockParams, 168, |_| Kernel::AlignBlock, {
        /// i32 or i64 `[T, k]`.
        topk_ids: u64,
        /// i32 `[S + 1]`, ascending: first token of each segment.
        seg_indptr: u64,
        /// i32 `[S]`: slot or -1.
        req_to_lora: u64,
        /// i32 `[L]`: slots to work on, -1 for none.
        lora_ids: u64,
        /// i32 `[L]`.
        adapter_enabled: u64,
        /// i32 `[E]` or 0: global to local expert, -1 for none.
        expert_map: u64,
        /// i32 `[L, p]`, out.
        sorted_token_ids: u64,
        /// i32 `[L, p / block size]`, out.
        expert_ids: u64,
        /// i32 `[L]`, out.
        num_tokens_post_pad: u64,
        /// u32 `[L]`, scratch.
        enabled: u64,
        /// i32 `[T]`, scratch.
        token_slots: u64,
        /// u32 `[2, T]`, scratch.
        order: u64,
        /// u32 `[T * k]`, scratch.
        row_pair: u64,
        /// u32 `[L, E]`, scratch.
        starts: u64,
        /// u32 `[L, E]`, scratch.
        ends: u64,
        /// u32 `[grid, max(E + 2, 1024)]`, scratch; only for grid > 1.
        table: u64,
        /// u32, zeroed once when allocated; only for grid > 1.
        barrier: u64,
        /// `topk_ids` are i64.
        ids_are_i64: u32,
        /// Tokens, T.
        num_tokens: u32,
        /// Experts a token uses, k.
        top_k: u32,
        /// Experts, E, at most 1024.
        num_experts: u32,
        /// Segments, S.
        num_segments: u32,
        /// Adapter slots, L.
        max_loras: u32,
        /// Entries of a block.
        block_size: u32,
        /// Entries of a slot, p, a multiple of the block size.
        slot_entries: u32,
    }
);

params!(
    /// `s = scale * A x` for every row of every LoRA chunk.
    ShrinkParams, 88, Kernel::Shrink, {
        /// `[*, K]`.
        input: u64,
        /// u32 `[rows]`: input row = row_pair / top_k; 0: input row = row.
        row_pair: u64,
        /// Segment.
        chunks: u64,
        /// RouteCounts.
        counts: u64,
        /// AdapterEntry `[L, E, 3]`.
        adapters: u64,
        /// `[rows, shrunk_stride]` of 4 bytes, out.
        shrunk: u64,
        /// Experts a token uses, k.
        top_k: u32,
        /// Experts, E.
        num_experts: u32,
        /// K.
        width: u32,
        /// 0: gate, then up; 2: down.
        first_projection: u32,
        /// 2 for gate and up, 1 for down.
        num_projections: u32,
        /// Multiple of 8; projection p starts at column p * max_rank.
        max_rank: u32,
        /// Numbers from row to row of `shrunk`, a multiple of 8.
        shrunk_stride: u32,
        /// 1: of eight neighbouring ranks the eight first numbers come first, as the prefill kernels read them; 0: of four.
        octets: u32,
        /// A holds this part of its ranks, without padding; their columns alone are written.
        part: u32,
        /// 0: A is whole, and `shrunk` is pairs of numbers; else it is f32, for [`SplitParams`] when all parts are added.
        parts: u32,
    }
);

params!(
    /// Values of `shrunk` from f32 to two numbers of the activation's format whose sum they are, in place.
    SplitParams, 24, Kernel::Split, {
        /// RouteCounts.
        counts: u64,
        /// `[rows, stride]`.
        shrunk: u64,
        /// Numbers from row to row, a multiple of 8.
        stride: u32,
        /// As in [`ShrinkParams`].
        octets: u32,
    }
);

params!(
    /// [`ShrinkParams`] for many rows, on Hopper, from segments.
    PrefillShrinkParams, 80, Kernel::PrefillShrink, {
        /// `[*, K]`.
        input: u64,
        /// u32 `[rows]`: input row = row_pair / top_k; 0: input row = row.
        row_pair: u64,
        /// Segment.
        segments: u64,
        /// RouteCounts.
        counts: u64,
        /// AdapterEntry `[L, E, 3]`.
        adapters: u64,
        /// `[rows, shrunk_stride]` of 4 bytes in octets, out.
        shrunk: u64,
        /// Experts a token uses, k.
        top_k: u32,
        /// Experts, E.
        num_experts: u32,
        /// K.
        width: u32,
        /// 0: gate, then up; 2: down.
        first_projection: u32,
        /// 2 for gate and up, 1 for down.
        num_projections: u32,
        /// Multiple of 8; projection p starts at column p * max_rank.
        max_rank: u32,
        /// Numbers from row to row of `shrunk`, a multiple of 8.
        shrunk_stride: u32,
        /// Nothing.
        reserved: u32,
    }
);

impl PrefillShrinkParams {
    /// The same work as `shrink`'s, which knows it by chunks of these segments.
    #[must_use]
    pub const fn new(shrink: &ShrinkParams, segments: u64) -> Self {
        Self {
            input: shrink.input,
            row_pair: shrink.row_pair,
            segments,
            counts: shrink.counts,
            adapters: shrink.adapters,
            shrunk: shrink.shrunk,
            top_k: shrink.top_k,
            num_experts: shrink.num_experts,
            width: shrink.width,
            first_projection: shrink.first_projection,
            num_projections: shrink.num_projections,
            max_rank: shrink.max_rank,
            shrunk_stride: shrink.shrunk_stride,
            reserved: 0,
        }
    }
}

params!(
    /// `h = act(W_gate x + B S, W_up x + B S)` for every row.
    GateUpParams, 160, Kernel::GateUp, {
        /// `[T, H]`.
        hidden: u64,
        /// `[E, I, H]` with the strides below.
        gate: u64,
        /// Likewise.
        up: u64,
        /// f32 `[E, I]` or 0.
        gate_bias: u64,
        /// f32 `[E, I]` or 0.
        up_bias: u64,
        /// u32 `[rows]`.
        row_pair: u64,
        /// f32 `[rows]`; read only if weigh_input.
        row_weight: u64,
        /// RowTile.
        tiles: u64,
        /// Segment.
        segments: u64,
        /// RouteCounts.
        counts: u64,
        /// AdapterEntry `[L, E, 3]` or 0: no LoRA; else the launch before must be shrink for gate and up.
        adapters: u64,
        /// `[rows, shrunk_stride]` of 4 bytes.
        shrunk: u64,
        /// `[rows, I]`, out.
        intermediate: u64,
        /// Numbers from expert to expert, of gate and of up.
        expert_stride: u64,
        /// Numbers from row to row: H, or 2H where gate and up rows alternate.
        row_stride: u32,
        /// Experts a token uses, k.
        top_k: u32,
        /// Experts, E.
        num_experts: u32,
        /// Width of a token, H.
        hidden_size: u32,
        /// Width inside an expert, I.
        intermediate_size: u32,
        /// Column of up's part of a shrunk row.
        max_rank: u32,
        /// Numbers from row to row of `shrunk`.
        shrunk_stride: u32,
        /// 0 SiLU, 1 GELU, 2 GELU in the tanh form, 3 clamped SwiGLU.
        activation: u32,
        /// Multiply the products by the routing weight, before the bias.
        weigh_input: u32,
        /// Of the clamped SwiGLU.
        alpha: f32,
        /// Clamp of the clamped SwiGLU.
        limit: f32,
        /// Zero.
        reserved: u32,
    }
);

params!(
    /// `y = W_down h + B S + bias` for every row.
    DownParams, 112, Kernel::Down, {
        /// `[rows, I]`.
        intermediate: u64,
        /// `[E, H, I]`.
        down: u64,
        /// f32 `[E, H]` or 0.
        bias: u64,
        /// RowTile.
        tiles: u64,
        /// Segment.
        segments: u64,
        /// RouteCounts.
        counts: u64,
        /// AdapterEntry `[L, E, 3]` or 0: no LoRA; else the launch before must be shrink for down.
        adapters: u64,
        /// `[rows, shrunk_stride]` of 4 bytes.
        shrunk: u64,
        /// `[rows, H]`, out; without LoRA the launch before must be gate_up.
        rows_out: u64,
        /// Numbers from expert to expert.
        expert_stride: u64,
        /// Numbers from row to row.
        row_stride: u32,
        /// Experts, E.
        num_experts: u32,
        /// Width of a token, H.
        hidden_size: u32,
        /// Width inside an expert, I.
        intermediate_size: u32,
        /// Numbers from row to row of `shrunk`.
        shrunk_stride: u32,
        /// Rows_out is f32 and not the activation's format.
        rows_f32: u32,
        /// The first feature that B has a row for: 0, but for fully sharded adapters.
        first_b: u32,
        /// Rows of B: H, but for fully sharded adapters.
        num_b: u32,
    }
);

params!(
    /// `out = scaling * sum_j w_j y_j`. Needs T > 0.
    CombineParams, 56, Kernel::Combine, {
        /// `[rows, H]`.
        rows_in: u64,
        /// i32 `[T * k]`.
        pair_row: u64,
        /// f32 `[T, k]`, or 0: all 1.
        topk_weights: u64,
        /// `[T, H]`.
        out: u64,
        /// Tokens, T.
        num_tokens: u32,
        /// Experts a token uses, k.
        top_k: u32,
        /// Width of a token, H.
        hidden_size: u32,
        /// `rows_in` is f32 and not the activation's format.
        rows_f32: u32,
        /// `out` is f32 and not the activation's format.
        out_f32: u32,
        /// Factor of the output.
        scaling: f32,
    }
);

params!(
    /// Signed noise for benchmarks, a function of seed and index alone.
    NoiseParams, 40, Kernel::Noise, {
        /// `[count]`, out.
        out: u64,
        /// Numbers.
        count: u64,
        /// Numbers of a row.
        width: u64,
        /// Numbers of a row that are not zero: its first ones.
        filled: u64,
        /// Equal seeds give equal noise.
        seed: u32,
        /// Standard deviation.
        deviation: f32,
    }
);

params!(
    /// Reads memory and keeps nothing, to measure how fast that is.
    ReadParams, 24, |_| Kernel::Read, {
        /// First address, a multiple of 16.
        from: u64,
        /// Bytes, a multiple of 16.
        bytes: u64,
        /// u32, hardly ever written.
        sink: u64,
    }
);

params!(
    /// Multiplies and keeps nothing, to measure how fast that is: `2 * 128 m * 256 n * 64 k` operations.
    PeakParams, 40, |_| Kernel::Peak, {
        /// bf16 `[m_tiles, k_steps, 128 * 64]`.
        a: u64,
        /// bf16 `[n_tiles, k_steps, 256 * 64]`.
        b: u64,
        /// f32, hardly ever written.
        sink: u64,
        /// Tiles of 128 rows, a multiple of 16.
        m_tiles: u32,
        /// Tiles of 256 columns, a multiple of 8.
        n_tiles: u32,
        /// Steps of 64 along k.
        k_steps: u32,
        /// Zero.
        reserved: u32,
    }
);

/// A tensor map as the driver encodes it: the place, strides and box of a tensor that a kernel copies from.
#[repr(C, align(64))]
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct TensorMap {
    /// Opaque.
    pub words: [u64; 16],
}

/// [`GateUpParams`] for experts with many rows, on Hopper: SiLU and clamped SwiGLU, tiles of up to 256 rows.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct PrefillGateUpParams {
    /// Gate and up: boxes of 64 numbers, 8 rows, gate and up, 8 groups of 8 rows, an expert.
    pub weights: TensorMap,
    /// All else.
    pub gate_up: GateUpParams,
}

/// [`DownParams`] likewise.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct PrefillDownParams {
    /// Down: boxes of 64 numbers, 128 rows, an expert.
    pub weights: TensorMap,
    /// All else.
    pub down: DownParams,
}

impl sealed::Sealed for PrefillGateUpParams {}

impl KernelParams for PrefillGateUpParams {
    fn kernel(format: Format) -> Kernel {
        Kernel::PrefillGateUp(format)
    }
}

impl sealed::Sealed for PrefillDownParams {}

impl KernelParams for PrefillDownParams {
    fn kernel(format: Format) -> Kernel {
        Kernel::PrefillDown(format)
    }
}

const _: () = {
    assert!(size_of::<TensorMap>() == 128);
    assert!(size_of::<PrefillGateUpParams>() == 320 && core::mem::offset_of!(PrefillGateUpParams, gate_up) == 128);
    assert!(size_of::<PrefillDownParams>() == 256 && core::mem::offset_of!(PrefillDownParams, down) == 128);
};
