//! The kernel that does a whole layer of up to 16 tokens on Hopper: its parameters, and how they follow from a batch's sizes.

use crate::decode::{BatchSizes, MOST_SHARED};
use crate::params::sealed;
use crate::{Format, Kernel, KernelParams, Launch, TensorMap};

/// Most tokens, as rows of a tile.
const MOST_TOKENS: u32 = 16;
/// `kFewPairs`.
const MOST_PAIRS: u32 = 128;
/// Largest rank of any adapter.
const MOST_RANK: u32 = 64;
/// Slots, and one for none, are 15-bit numbers, and not the largest one.
const MOST_SLOTS: u32 = (1 << 15) - 2;
/// Features of down that a block can have.
const MOST_FEATURES: u32 = 64;
/// `kLayerThreads`.
const THREADS: u32 = 512;
/// `kWeightBytes`: of a stage.
const WEIGHT_BYTES: u32 = 16 * 1024;
/// 64s of k in a stage of gate and up, and the most of down.
const PIECES: u32 = 4;
const MOST_DOWN_PIECES: u32 = 8;
/// Bytes of 64 numbers.
const PIECE_BYTES: u32 = 128;
/// `sizeof(FewLists)`.
const LISTS: u32 = 14_960;
/// Bytes of `kSidePartial`.
const SIDE_PARTIAL: u32 = 4 * 16 * 20 * 4;
/// `kShrinkDepth`.
const SHRINK_DEPTH: u32 = 512;
/// Stages whose weights may be on their way at a time: enough to keep the memory busy, and few, so that what else is read comes soon.
const WINDOW: u32 = 3;
/// Bytes of barriers beside those of the ring.
const BARRIERS: u32 = 3 * 16 + 2 * 16;
const CLEAR_THREADS: u32 = 256;

/// How the launch of a batch of up to 16 tokens is shaped.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct LayerPlan {
    /// Most rows of a row tile.
    pub tile_rows: u32,
    /// Of the ring.
    pub stages: u32,
    /// Bytes of a stage.
    pub stage_bytes: u32,
    /// Features of down that a block owns.
    pub down_features: u32,
    /// 64s of k in a stage of down.
    pub down_pieces: u32,
    shared_bytes: u32,
}

impl LayerPlan {
    /// The plan of a batch on a GPU with `sm_count` SMs; none if the kernel cannot run it. Depends on sizes alone, never on routing or
    /// on what adapters there are, and the order of sums not even on the number of tokens.
    #[must_use]
    pub fn new(sizes: &BatchSizes, sm_count: u32) -> Option<Self> {
        let BatchSizes { num_tokens, hidden_size, intermediate_size, max_rank, .. } = *sizes;
        let fits = (1..=MOST_TOKENS).contains(&num_tokens)
            && num_tokens.checked_mul(sizes.top_k)? <= MOST_PAIRS
            && sizes.num_experts <= crate::launch::MOST_EXPERTS
            && max_rank <= MOST_RANK
            && sizes.num_slots <= MOST_SLOTS
            && [hidden_size, intermediate_size].iter().all(|size| size.is_multiple_of(64) && *size > 0);
        let down_features = (hidden_size / 8).div_ceil(sm_count.max(1)) * 8;
        if !fits || down_features > MOST_FEATURES {
            return None;
        }
        // Stages of down as large as may be, and all of a size.
        let most = (WEIGHT_BYTES / (down_features * PIECE_BYTES)).min(MOST_DOWN_PIECES);
        let pieces = intermediate_size / 64;
        let down_pieces = pieces.div_ceil(pieces.div_ceil(most));
        let tile_rows = num_tokens.next_power_of_two();
        let row_bytes = PIECES.max(down_pieces) * PIECE_BYTES + 64;
        let stage_bytes = WEIGHT_BYTES + (tile_rows * row_bytes).next_multiple_of(1024);
        let sums = 3 * 8 * tile_rows.div_ceil(8) * 128 * 4;
        let y = num_tokens * down_features * 4;
        let lora = match (sizes.num_slots, down_features) {
            (0, _) => 0,
            (_, 0..=16) => 4 * y,
            (_, 17..=32) => 2 * y,
            _ => y,
        };
        let side = if sizes.num_slots > 0 { SIDE_PARTIAL + 256 * tile_rows } else { 0 };
        let fixed = 1024 + LISTS + sums + y + lora + side + BARRIERS;
        let stages = (MOST_SHARED - fixed) / (stage_bytes + 24);
        let shared_bytes = fixed + stages * (stage_bytes + 24);
        Some(Self { tile_rows, stages, stage_bytes, down_features, down_pieces, shared_bytes })
    }

    /// f32 of the shrunk ranks of a batch, in parts of k.
    #[must_use]
    pub const fn shrunk_numbers(pairs: usize, hidden_size: usize, intermediate_size: usize, max_rank: usize) -> usize {
        let parts = 2 * hidden_size.div_ceil(SHRINK_DEPTH as usize) + intermediate_size.div_ceil(SHRINK_DEPTH as usize);
        let (pairs, rank) = (Self::at_most(pairs, MOST_PAIRS), Self::at_most(max_rank, MOST_RANK));
        parts * pairs * rank
    }

    /// u32 of the flags, which [`DecodeClearParams`] zeroes.
    pub const FLAGS: usize = 2 * MOST_PAIRS as usize + 1;

    const fn at_most(n: usize, most: u32) -> usize {
        if n < most as usize { n } else { most as usize }
    }
}

/// A whole layer. Weights come by two tensor maps.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct DecodeLayerParams {
    /// Gate and up: boxes of 64 numbers, 16 rows, 4 times 64 of k, gate and up, an expert.
    pub gate_up: TensorMap,
    /// Down: boxes of 64 numbers, `down_features` rows, `down_pieces` times 64 of k, an expert.
    pub down: TensorMap,
    /// `[T, H]`; H and I are multiples of 64.
    pub hidden: u64,
    /// i32 `[T, k]`.
    pub topk_ids: u64,
    /// f32 `[T, k]`.
    pub topk_weights: u64,
    /// i32 `[T]` or 0: all base.
    pub token_slots: u64,
    /// u8 `[L]` or 0: all.
    pub slot_active: u64,
    /// f32 `[E, I]` or 0.
    pub gate_bias: u64,
    /// f32 `[E, I]` or 0.
    pub up_bias: u64,
    /// f32 `[E, H]` or 0.
    pub down_bias: u64,
    /// AdapterEntry `[L, E, 3]` or 0: no LoRA.
    pub adapters: u64,
    /// f32 [`LayerPlan::shrunk_numbers`], out.
    pub shrunk: u64,
    /// `[T * k, I]`, out.
    pub intermediate: u64,
    /// u32 [`LayerPlan::FLAGS`]; the launch before must be [`DecodeClearParams`]'.
    pub flags: u64,
    /// RouteCounts or 0, out.
    pub counts: u64,
    /// `[T, H]`, out.
    pub out: u64,
    /// Tokens, T.
    pub num_tokens: u32,
    /// Experts a token uses, k.
    pub top_k: u32,
    /// Experts, E.
    pub num_experts: u32,
    /// Adapter slots, L.
    pub num_slots: u32,
    /// Width of a token, H.
    pub hidden_size: u32,
    /// Width inside an expert, I.
    pub intermediate_size: u32,
    /// The largest rank, a multiple of 8.
    pub max_rank: u32,
    /// As [`GateUpParams::activation`](crate::GateUpParams).
    pub activation: u32,
    /// Multiply the products by the routing weight, before the bias, and not the sum over experts.
    pub weigh_input: u32,
    /// Of the clamped SwiGLU.
    pub alpha: f32,
    /// Of the clamped SwiGLU.
    pub limit: f32,
    /// Factor of the output.
    pub scaling: f32,
    /// `out` is f32 and not the activation's format.
    pub out_f32: u32,
    /// [`LayerPlan::tile_rows`].
    pub tile_rows: u32,
    /// [`LayerPlan::stages`].
    pub stages: u32,
    /// [`LayerPlan::stage_bytes`].
    pub stage_bytes: u32,
    /// [`LayerPlan::down_features`].
    pub down_features: u32,
    /// [`LayerPlan::down_pieces`].
    pub down_pieces: u32,
    /// Stages whose weights may be on their way at a time, up to `stages`.
    pub window: u32,
    /// Zero.
    pub reserved: u32,
}

/// Zeroes the flags of [`DecodeLayerParams`].
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct DecodeClearParams {
    /// u32 `[words]`, out.
    pub flags: u64,
    /// [`LayerPlan::FLAGS`].
    pub words: u64,
}

const _: () = {
    assert!(size_of::<DecodeLayerParams>() == 448 && core::mem::offset_of!(DecodeLayerParams, hidden) == 256);
    assert!(core::mem::offset_of!(DecodeLayerParams, out) == 360);
    assert!(core::mem::offset_of!(DecodeLayerParams, down_pieces) == 436);
    assert!(size_of::<DecodeClearParams>() == 16);
};

impl sealed::Sealed for DecodeLayerParams {}

impl KernelParams for DecodeLayerParams {
    fn kernel(format: Format) -> Kernel {
        Kernel::DecodeLayer(format)
    }
}

impl sealed::Sealed for DecodeClearParams {}

impl KernelParams for DecodeClearParams {
    fn kernel(_: Format) -> Kernel {
        Kernel::DecodeClear
    }
}

impl DecodeLayerParams {
    /// Sets what the plan says.
    #[must_use]
    pub const fn with_plan(self, plan: &LayerPlan) -> Self {
        let LayerPlan { tile_rows, stages, stage_bytes, down_features, down_pieces, .. } = *plan;
        let window = if stages < WINDOW { stages } else { WINDOW };
        Self { tile_rows, stages, stage_bytes, down_features, down_pieces, window, ..self }
    }

    /// One block an SM.
    #[must_use]
    pub const fn launch(&self, plan: &LayerPlan, sm_count: u32) -> Launch {
        Launch::new([sm_count, 1, 1], THREADS, plan.shared_bytes)
    }
}

impl DecodeClearParams {
    /// One block.
    #[must_use]
    pub const fn launch(&self) -> Launch {
        Launch::new([1, 1, 1], CLEAR_THREADS, 0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sizes(num_tokens: u32, [num_experts, top_k, hidden_size, intermediate_size]: [u32; 4]) -> BatchSizes {
        BatchSizes { num_tokens, top_k, num_experts, hidden_size, intermediate_size, num_slots: 8, max_rank: 64 }
    }

    const QWEN3: [u32; 4] = [128, 8, 2048, 768];

    #[test]
    fn shared_memory_suffices_and_every_block_has_its_features() {
        for shape in
            [QWEN3, [8, 2, 4096, 14336], [256, 8, 7168, 256], [32, 4, 2880, 2880], [64, 8, 2048, 1024], [1, 1, 64, 64]]
        {
            for num_tokens in 1..=16 {
                for sm_count in [114, 132] {
                    let plan = LayerPlan::new(&sizes(num_tokens, shape), sm_count).unwrap();
                    assert!(plan.shared_bytes <= MOST_SHARED && plan.stages >= 4, "{shape:?} {num_tokens} {plan:?}");
                    assert!(plan.down_features * sm_count >= shape[2]);
                    // A box of TMA, and the last rows of a product of 16, lie in a stage.
                    let rows = plan.down_features.next_multiple_of(16) + plan.down_features * (plan.down_pieces - 1);
                    assert!(
                        rows * PIECE_BYTES <= plan.stage_bytes
                            && plan.down_pieces * plan.down_features * 128 <= WEIGHT_BYTES
                    );
                }
            }
        }
    }

    #[test]
    fn sums_do_not_depend_on_the_number_of_tokens() {
        let plans = [1, 2, 13, 16].map(|tokens| LayerPlan::new(&sizes(tokens, QWEN3), 132).unwrap());
        assert!(plans.iter().all(|plan| [plan.down_features, plan.down_pieces] == [16, 6]));
        assert_eq!(plans.map(|plan| plan.tile_rows), [1, 2, 16, 16]);
    }

    #[test]
    fn what_does_not_fit_has_no_plan() {
        let fits = |sizes: BatchSizes| LayerPlan::new(&sizes, 132).is_some();
        assert!(fits(sizes(16, QWEN3)) && !fits(sizes(0, QWEN3)) && !fits(sizes(17, [128, 1, 2048, 768])));
        assert!(
            !fits(sizes(16, [128, 9, 2048, 768]))
                && !fits(sizes(1, [128, 8, 2056, 768]))
                && !fits(sizes(1, [128, 8, 2048, 72]))
        );
        assert!(fits(sizes(1, [8, 2, 64 * 132, 64])) && !fits(sizes(1, [8, 2, 64 * 133, 64])));
        assert!([0, 8].iter().all(|&num_slots| !fits(BatchSizes { max_rank: 72, num_slots, ..sizes(4, QWEN3) })));
        assert!(!fits(BatchSizes { num_slots: 1 << 15, ..sizes(4, QWEN3) }));
    }
}
