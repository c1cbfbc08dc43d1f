//! The kernels for few tokens on Hopper: their parameters, and how grids and shared memory follow from a batch's sizes.

use crate::params::sealed;
use crate::{AlignParams, Format, GateUpParams, Kernel, KernelParams, Launch, TensorMap};

/// Most tokens: y of 64 features must fit beside the weights.
pub(crate) const MOST_TOKENS: u32 = 256;
/// `kMostPairs`.
const MOST_PAIRS: u32 = 2048;
/// Largest rank of any adapter.
const MOST_RANK: u32 = 512;
/// Slots, and one for none, are 16-bit numbers in align.
const MOST_SLOTS: u32 = (1 << 16) - 2;
/// `kStreamThreads`.
const STREAM_THREADS: u32 = 384;
/// `kShrinkThreads` of `epilogue/lora_stream.cuh`.
const SHRINK_THREADS: u32 = 128;
/// `kStepBytes`, for four warps.
const STEP_BYTES: u32 = 4 * (512 + 512 + 16);
/// Bytes of `kShrinkPartial`.
const SHRINK_PARTIAL: u32 = 4 * 16 * 20 * 4;
/// `kStreamWeightBytes`, and what a token's 64 numbers take.
const WEIGHT_BYTES: u32 = 64 * 128;
const TOKEN_BYTES: u32 = 128;
/// What a block of Hopper can have.
pub(crate) const MOST_SHARED: u32 = 227 * 1024;

/// What a block can have while 60 KB are left to L1, not 28.
const LARGER_L1: u32 = 195 * 1024;

/// A ring of stages in shared memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Ring {
    /// Stages.
    pub stages: u32,
    /// 64s of k in a stage.
    pub stage_tiles: u32,
}

/// Sizes of a batch, its layer and its adapters.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct BatchSizes {
    /// Tokens, T.
    pub num_tokens: u32,
    /// Experts a token uses, k.
    pub top_k: u32,
    /// Experts, E.
    pub num_experts: u32,
    /// Width of a token, H.
    pub hidden_size: u32,
    /// Width inside an expert, I.
    pub intermediate_size: u32,
    /// Adapter slots, L.
    pub num_slots: u32,
    /// The largest rank that an adapter may have, a multiple of 8.
    pub max_rank: u32,
}

/// How the three launches of a batch of few tokens are shaped.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct DecodePlan {
    /// Most rows of a row tile, and of a LoRA chunk.
    pub tile_rows: u32,
    /// Most row tiles.
    pub max_tiles: u32,
    /// Of gate and up.
    pub gate_up: Ring,
    /// Of down.
    pub down: Ring,
    /// Blocks that share 64 features of down.
    pub cluster: u32,
    /// Parts of I that down shrinks apart.
    pub planes: u32,
    /// Steps in a ring of down for adapters; none without slots.
    pub lora_steps: u32,
}

impl DecodePlan {
    /// The plan of a batch on a GPU with `sm_count` SMs; none if these kernels cannot run it. Depends on sizes alone, never on
    /// routing or on what adapters there are.
    #[must_use]
    pub fn new(sizes: &BatchSizes, sm_count: u32) -> Option<Self> {
        let pairs = sizes.num_tokens.checked_mul(sizes.top_k)?;
        let fits = (1..=MOST_TOKENS).contains(&sizes.num_tokens)
            && pairs <= MOST_PAIRS
            && sizes.num_experts <= crate::launch::MOST_EXPERTS
            && sizes.max_rank <= MOST_RANK
            && sizes.num_slots <= MOST_SLOTS;
        if !fits {
            return None;
        }
        let cluster = Self::cluster(sizes.hidden_size, sm_count)?;
        let tile_rows = Self::tile_rows(pairs, sizes);
        let planes = if sizes.intermediate_size > 4096 { 2 } else { 1 };
        let plan = Self {
            tile_rows,
            max_tiles: pairs.min(sizes.num_experts) + pairs / tile_rows,
            gate_up: Self::gate_up_ring(tile_rows),
            down: Ring { stages: 0, stage_tiles: if tile_rows <= 32 { 2 } else { 1 } },
            cluster,
            planes,
            lora_steps: 0,
        };
        // With slots or without, the same batches have a plan.
        let with_lora = [16, 8, 4].map(|lora_steps| Self { lora_steps, ..plan }.filled(sizes));
        // Long rows of A stay long under way: they want a larger L1, which is what shared memory leaves.
        let calm = |plan: &Self| {
            let shared = plan.down_shared(sizes.num_tokens, sizes.top_k, plan.down.stages);
            sizes.intermediate_size <= 2048 || shared <= LARGER_L1
        };
        let lora = with_lora.iter().flatten().max_by_key(|plan| (plan.down.stages, calm(plan), plan.lora_steps));
        if sizes.num_slots > 0 { lora.copied() } else { lora.and_then(|_| plan.filled(sizes)) }
    }

    /// With a ring for down, if there is room: what keeps the memory busy, since what is in flight makes everybody wait, and what the
    /// other blocks of a cluster send.
    fn filled(self, sizes: &BatchSizes) -> Option<Self> {
        let few = self.cluster == 3 && sizes.num_tokens <= 8;
        let weights = if self.tile_rows <= 32 && (self.cluster == 2 || few) { 96 * 1024 } else { 64 * 1024 };
        let sent = if self.cluster > 1 { sizes.num_tokens * 256 + 4096 } else { 0 };
        let slot = self.slot(self.down);
        let least = sent.div_ceil(slot).max(2);
        let room = MOST_SHARED.saturating_sub(self.down_shared(sizes.num_tokens, sizes.top_k, 0));
        let stages = least.max(weights / (WEIGHT_BYTES * self.down.stage_tiles)).min(room / (slot + 16));
        (stages >= least).then_some(Self { down: Ring { stages, ..self.down }, ..self })
    }

    /// Three, two or one block for 64 features, as many as surely run at the same time: clusters lie within parts of the chip.
    fn cluster(hidden_size: u32, sm_count: u32) -> Option<u32> {
        let blocks = hidden_size.div_ceil(64);
        if blocks * 3 <= sm_count / 8 * 7 {
            Some(3)
        } else if blocks * 2 <= sm_count {
            Some(2)
        } else {
            (blocks <= sm_count).then_some(1)
        }
    }

    /// Twice an expert's mean share of the rows and three standard deviations fit into one tile.
    fn tile_rows(pairs: u32, sizes: &BatchSizes) -> u32 {
        let twice = 2.0 * f64::from(pairs) / f64::from(sizes.num_experts.max(1));
        let rows = (twice + 3.0 * twice.sqrt() + 1.0).min(f64::from(sizes.num_tokens));
        (rows.ceil() as u32).next_power_of_two().clamp(16, 128)
    }

    fn gate_up_ring(tile_rows: u32) -> Ring {
        let slot = 2 * (WEIGHT_BYTES + tile_rows * TOKEN_BYTES);
        Ring { stages: ((MOST_SHARED - 1040) / (slot + 16)).min(6), stage_tiles: 2 }
    }

    const fn slot(&self, ring: Ring) -> u32 {
        ring.stage_tiles * (WEIGHT_BYTES + self.tile_rows * TOKEN_BYTES)
    }

    const fn gate_up_shared(&self) -> u32 {
        1040 + self.gate_up.stages * (self.slot(self.gate_up) + 16)
    }

    const fn down_shared(&self, num_tokens: u32, top_k: u32, stages: u32) -> u32 {
        let ring = stages * (self.slot(self.down) + 16);
        let lora_tokens = if self.lora_steps == 0 { 0 } else { num_tokens.div_ceil(self.cluster) };
        let lora = lora_tokens * (256 + top_k * 16) + self.lora_steps * STEP_BYTES;
        1024 + ring + num_tokens * 256 + lora + self.max_tiles * 16 + SHRINK_PARTIAL + 48 + num_tokens * top_k * 6 + 16
    }
}

/// [`AlignParams`] for [`DecodePlan`]s: the same lists, made by one block.
#[repr(transparent)]
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct DecodeAlignParams(pub AlignParams);

/// [`GateUpParams`] and its shrink in one launch.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct DecodeGateUpParams {
    /// Gate and up: boxes of 64 numbers, 8 rows, gate and up, 4 groups of 8 rows, an expert.
    pub weights: TensorMap,
    /// The launch before must be [`DecodeAlignParams`]'; `shrunk` is out too.
    pub gate_up: GateUpParams,
    /// Segment, of at most `tile_rows` rows.
    pub chunks: u64,
    /// `DecodePlan::tile_rows`.
    pub tile_rows: u32,
    /// Of the ring.
    pub stages: u32,
    /// Of the ring.
    pub stage_tiles: u32,
    /// Zero.
    pub reserved: [u32; 3],
}

/// Down with its shrink and the sum over experts in one launch: `out = scaling * sum_j w_j (W_down h_j + B S_j + bias)`.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct DecodeDownParams {
    /// Down: boxes of 64 numbers, 64 rows, an expert.
    pub weights: TensorMap,
    /// `[rows, I]`; the launch before must be [`DecodeGateUpParams`]'.
    pub intermediate: u64,
    /// f32 `[E, H]` or 0.
    pub bias: u64,
    /// u32 `[rows]`.
    pub row_pair: u64,
    /// f32 `[rows]`, or 0: all 1.
    pub row_weight: u64,
    /// RowTile.
    pub tiles: u64,
    /// Segment.
    pub chunks: u64,
    /// RouteCounts.
    pub counts: u64,
    /// AdapterEntry `[L, E, 3]` or 0: no LoRA.
    pub adapters: u64,
    /// f32 `[planes, T * k, max_rank]`, out.
    pub shrunk: u64,
    /// `[T, H]`, out.
    pub out: u64,
    /// Tokens, T.
    pub num_tokens: u32,
    /// Experts a token uses, k.
    pub top_k: u32,
    /// Experts, E.
    pub num_experts: u32,
    /// Width of a token, H.
    pub hidden_size: u32,
    /// Width inside an expert, I.
    pub intermediate_size: u32,
    /// Numbers from row to row of `shrunk`.
    pub max_rank: u32,
    /// `DecodePlan::planes`.
    pub planes: u32,
    /// `DecodePlan::tile_rows`.
    pub tile_rows: u32,
    /// Of the ring.
    pub stages: u32,
    /// Of the ring.
    pub stage_tiles: u32,
    /// `DecodePlan::cluster`.
    pub cluster: u32,
    /// `DecodePlan::max_tiles`.
    pub max_tiles: u32,
    /// `out` is f32 and not the activation's format.
    pub out_f32: u32,
    /// Factor of the output.
    pub scaling: f32,
    /// `DecodePlan::lora_steps`.
    pub lora_steps: u32,
    /// Zero.
    pub reserved: u32,
}

const _: () = {
    assert!(size_of::<DecodeGateUpParams>() == 320 && core::mem::offset_of!(DecodeGateUpParams, chunks) == 288);
    assert!(core::mem::offset_of!(DecodeGateUpParams, stage_tiles) == 304);
    assert!(size_of::<DecodeDownParams>() == 320 && core::mem::offset_of!(DecodeDownParams, num_tokens) == 208);
    assert!(core::mem::offset_of!(DecodeDownParams, lora_steps) == 264);
};

impl sealed::Sealed for DecodeAlignParams {}

impl KernelParams for DecodeAlignParams {
    fn kernel(_: Format) -> Kernel {
        Kernel::DecodeAlign
    }
}

impl sealed::Sealed for DecodeGateUpParams {}

impl KernelParams for DecodeGateUpParams {
    fn kernel(format: Format) -> Kernel {
        Kernel::DecodeGateUp(format)
    }
}

impl sealed::Sealed for DecodeDownParams {}

impl KernelParams for DecodeDownParams {
    fn kernel(format: Format) -> Kernel {
        Kernel::DecodeDown(format)
    }
}

/// Bytes of the struct `Shared` of `decode_route.cu`, starts of experts and counters of warps.
pub(crate) const fn align_shared(num_experts: u32, warps: u32) -> u32 {
    let bins = num_experts + 2;
    MOST_TOKENS * 6 + MOST_PAIRS * 10 + 2 * 32 * 4 + (bins + 1) * 4 + warps * bins * 2
}

impl DecodeAlignParams {
    /// One block, a thread for one or two pairs.
    #[must_use]
    pub fn launch(&self) -> Launch {
        let AlignParams { num_tokens, top_k, num_experts, .. } = self.0;
        let pairs = num_tokens * top_k;
        let threads = if pairs <= 1024 { pairs } else { pairs.div_ceil(2) };
        let threads = threads.max(num_tokens).next_multiple_of(32).max(64);
        Launch::new([1, 1, 1], threads, align_shared(num_experts, threads / 32))
    }
}

impl DecodeGateUpParams {
    /// One block an SM, which takes item after item.
    #[must_use]
    pub fn launch(&self, plan: &DecodePlan, sm_count: u32) -> Launch {
        Launch::new([sm_count, 1, 1], STREAM_THREADS, plan.gate_up_shared())
    }
}

impl DecodeDownParams {
    /// A cluster for every 64 features.
    #[must_use]
    pub fn launch(&self, plan: &DecodePlan) -> Launch {
        let shared = plan.down_shared(self.num_tokens, self.top_k, plan.down.stages);
        let grid = [self.hidden_size.div_ceil(64) * plan.cluster, 1, 1];
        Launch { cluster: plan.cluster, ..Launch::new(grid, STREAM_THREADS + SHRINK_THREADS, shared) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn qwen3(num_tokens: u32) -> BatchSizes {
        let (num_experts, top_k, num_slots, max_rank) = (128, 8, 8, 64);
        BatchSizes { num_tokens, top_k, num_experts, hidden_size: 2048, intermediate_size: 768, num_slots, max_rank }
    }

    #[test]
    fn plans_follow_the_number_of_rows() {
        let tile_rows = [1, 16, 64, 128, 256].map(|tokens| DecodePlan::new(&qwen3(tokens), 132).unwrap().tile_rows);
        assert_eq!(tile_rows, [16, 16, 32, 32, 64]);
        let clusters = [64, 2048, 2880, 4096, 7168]
            .map(|hidden_size| DecodePlan::new(&BatchSizes { hidden_size, ..qwen3(4) }, 132).unwrap().cluster);
        assert_eq!(clusters, [3, 3, 2, 2, 1]);
    }

    #[test]
    fn what_does_not_fit_has_no_plan() {
        let fits = |sizes: BatchSizes| DecodePlan::new(&sizes, 132).is_some();
        assert!(fits(qwen3(1)) && fits(qwen3(256)) && !fits(qwen3(0)) && !fits(qwen3(257)));
        // With slots or without: base rows have the same bits.
        assert!([0, 8].iter().all(|&num_slots| !fits(BatchSizes { max_rank: 520, num_slots, ..qwen3(4) })));
        assert!(!fits(BatchSizes { hidden_size: 64 * 133, ..qwen3(4) }));
        assert!(!fits(BatchSizes { top_k: 9, ..qwen3(256) }) && !fits(BatchSizes { num_slots: 1 << 16, ..qwen3(4) }));
        assert!(!fits(BatchSizes { num_experts: 1025, ..qwen3(4) }));
    }

    #[test]
    fn shared_memory_suffices_for_every_plan() {
        for (num_experts, hidden_size, intermediate_size) in
            [(128, 2048, 768), (8, 4096, 14336), (256, 7168, 256), (1, 8, 8)]
        {
            for num_tokens in 1..=MOST_TOKENS {
                for top_k in [1, 2, 8] {
                    let sizes = BatchSizes { num_experts, top_k, hidden_size, intermediate_size, ..qwen3(num_tokens) };
                    let Some(plan) = DecodePlan::new(&sizes, 132) else {
                        assert!(num_tokens * top_k > 1024, "{sizes:?}");
                        continue;
                    };
                    let shared = plan.down_shared(num_tokens, top_k, plan.down.stages);
                    assert!(shared <= MOST_SHARED && plan.gate_up_shared() <= MOST_SHARED, "{sizes:?} {plan:?}");
                    assert!(plan.gate_up.stages >= 3 && plan.down.stages >= 2, "{plan:?}");
                }
            }
        }
        assert!(align_shared(crate::launch::MOST_EXPERTS, 32) <= MOST_SHARED);
    }
}
