//! How many blocks a kernel wants: pure functions of the batch's sizes and the number of SMs, never of the routing.

use crate::{
    AlignBlockParams, AlignParams, CombineParams, DownParams, GateUpParams, NoiseParams, PeakParams, PrefillDownParams,
    PrefillGateUpParams, PrefillShrinkParams, ReadParams, ShrinkParams, SplitParams, TopkParams,
};

/// `kTileRows`.
const TILE_ROWS: u64 = 128;
/// `kChunkRows`.
const CHUNK_ROWS: u64 = 64;
/// `kSortWarps`.
const SORT_WARPS: u32 = 16;
/// `kSortDigit`.
const SORT_DIGIT: u32 = 1024;
/// Pairs that one block of align sorts faster than several.
const PAIRS_OF_ONE_BLOCK: u64 = 2048;
/// Pairs of a block otherwise.
const PAIRS_OF_A_BLOCK: u64 = 1024;
/// `kTopkWarps`.
const TOPK_WARPS: u32 = 4;
/// `kShrinkShared`.
pub(crate) const SHRINK_SHARED: u32 = 8 * 12 * 1024;
/// `kSplitThreads`.
const SPLIT_THREADS: u64 = 256;
/// `kProductShared + kLoraPartsBytes`.
pub(crate) const PRODUCT_SHARED: u32 = 96 * 1024 + 128 * 24;
/// `kGroupedShared`.
pub(crate) const GROUPED_SHARED: u32 = 1024 + 4 * (128 * 128 + 256 * 128) + 8 * 36 + 2 * 16384 + 256 * 4 + 4;
/// `kPiecesShared`: the ring, and for each of 4 pieces ahead 1072 bytes and two barriers, for each of 24 stages two barriers.
pub(crate) const PIECES_SHARED: u32 = 1024 + 216 * 1024 + 4 * (1072 + 16) + 24 * 16;
/// `kPiecesThreads`.
const PIECES_THREADS: u32 = 17 * 32;
/// `kMeasureThreads`.
const MEASURE_THREADS: u32 = 512;
/// `kPeakThreads`.
const PEAK_THREADS: u32 = 384;
/// `kPeakShared`.
pub(crate) const PEAK_SHARED: u32 = 4 * (16 + 32) * 1024 + 1024;
/// The experts that align and topk can tell apart.
pub(crate) const MOST_EXPERTS: u32 = 1024;
/// Blocks per SM that are worth launching; what they leave is done in turns.
const WAVES: u64 = 64;

/// The size of a launch.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Launch {
    /// Blocks.
    pub grid: [u32; 3],
    /// Threads of a block.
    pub block: u32,
    /// Bytes of dynamic shared memory.
    pub shared_bytes: u32,
    /// Blocks of a cluster along x; 1: no clusters.
    pub cluster: u32,
    /// All blocks must run at the same time.
    pub cooperative: bool,
}

impl Launch {
    pub(crate) const fn new(grid: [u32; 3], block: u32, shared_bytes: u32) -> Self {
        Self { grid, block, shared_bytes, cluster: 1, cooperative: false }
    }
}

/// How long the lists of a batch can become: what their memory and the grids are sized by.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct RouteBounds {
    /// (token, expert) pairs, and rows at most.
    pub pairs: u64,
    /// Segments.
    pub segments: u64,
    /// Row tiles.
    pub tiles: u64,
    /// LoRA chunks.
    pub chunks: u64,
}

impl RouteBounds {
    /// For T tokens with k of E experts each, and L slots.
    #[must_use]
    pub fn new(num_tokens: u64, top_k: u64, num_experts: u64, num_slots: u64) -> Self {
        let pairs = num_tokens * top_k;
        let with_slot = pairs.min(num_experts.saturating_mul(num_slots));
        Self {
            pairs,
            segments: pairs.min(num_experts.saturating_mul(num_slots + 1)),
            tiles: pairs.min(num_experts) + pairs / TILE_ROWS,
            chunks: if num_slots == 0 { 0 } else { pairs.min(with_slot + pairs / CHUNK_ROWS) },
        }
    }
}

/// A grid of at most `WAVES` blocks an SM that covers `items`, at least one.
fn covering(items: u64, sm_count: u32) -> u32 {
    items.clamp(1, u64::from(sm_count.max(1)) * WAVES) as u32
}

pub(crate) const fn topk_shared(num_experts: u32) -> u32 {
    TOPK_WARPS * 3 * num_experts * 4
}

pub(crate) const fn align_shared(num_experts: u32, num_slots: u32) -> u32 {
    let digit = if num_slots >= SORT_DIGIT { SORT_DIGIT } else { num_slots + 1 };
    let bins = if num_experts + 2 > digit { num_experts + 2 } else { digit };
    (bins + 1 + SORT_WARPS * bins) * 4
}

impl TopkParams {
    /// One warp a token.
    #[must_use]
    pub fn launch(&self, sm_count: u32) -> Launch {
        let blocks = covering(u64::from(self.num_tokens).div_ceil(u64::from(TOPK_WARPS)), sm_count);
        Launch::new([blocks, 1, 1], TOPK_WARPS * 32, topk_shared(self.num_experts))
    }
}

impl AlignParams {
    /// One block for few pairs, else up to one an SM, which must run together.
    #[must_use]
    pub fn launch(&self, sm_count: u32) -> Launch {
        let pairs = u64::from(self.num_tokens) * u64::from(self.top_k);
        let blocks = match pairs {
            0..=PAIRS_OF_ONE_BLOCK => 1,
            _ => pairs.div_ceil(PAIRS_OF_A_BLOCK).min(u64::from(sm_count.max(1))) as u32,
        };
        let shared = align_shared(self.num_experts, self.num_slots);
        Launch { cooperative: blocks > 1, ..Launch::new([blocks, 1, 1], SORT_WARPS * 32, shared) }
    }

    /// Bytes that `table` needs for any batch.
    #[must_use]
    pub fn table_bytes(num_experts: u32, sm_count: u32) -> u64 {
        u64::from(sm_count) * u64::from((num_experts + 2).max(SORT_DIGIT)) * 4
    }
}

impl AlignBlockParams {
    /// Enough blocks for the pairs and for the entries to write, at most one an SM: they must run together.
    #[must_use]
    pub fn launch(&self, sm_count: u32) -> Launch {
        let pairs = u64::from(self.num_tokens) * u64::from(self.top_k);
        let entries = u64::from(self.max_loras) * u64::from(self.slot_entries);
        let blocks = match pairs.max(entries / 16) {
            0..=PAIRS_OF_ONE_BLOCK => 1,
            work => work.div_ceil(PAIRS_OF_A_BLOCK).min(u64::from(sm_count.max(1))) as u32,
        };
        let shared = align_shared(self.num_experts, self.max_loras);
        Launch { cooperative: blocks > 1, ..Launch::new([blocks, 1, 1], SORT_WARPS * 32, shared) }
    }
}

impl ShrinkParams {
    /// Two blocks an SM, which share the chunks out, or one for every 8 rows and 16 ranks if that is fewer.
    #[must_use]
    pub fn launch(&self, bounds: &RouteBounds, sm_count: u32) -> Launch {
        let rank_blocks = (u64::from(self.num_projections) * u64::from(self.max_rank)).div_ceil(16);
        let pieces = bounds.pairs.min(bounds.chunks * (CHUNK_ROWS / 8)) * rank_blocks;
        let blocks = pieces.clamp(1, 2 * u64::from(sm_count.max(1))) as u32;
        Launch::new([blocks, 1, 1], 256, SHRINK_SHARED)
    }
}

impl SplitParams {
    /// One block 2048 numbers, up to eight an SM.
    #[must_use]
    pub fn launch(&self, bounds: &RouteBounds, sm_count: u32) -> Launch {
        let blocks = (bounds.pairs * u64::from(self.stride)).div_ceil(8 * SPLIT_THREADS);
        Launch::new([blocks.clamp(1, 8 * u64::from(sm_count.max(1))) as u32, 1, 1], SPLIT_THREADS as u32, 0)
    }
}

impl GateUpParams {
    /// One block a row tile and 64 features, at most.
    #[must_use]
    pub fn launch(&self, bounds: &RouteBounds, sm_count: u32) -> Launch {
        let blocks = bounds.tiles * u64::from(self.intermediate_size.div_ceil(64));
        Launch::new([covering(blocks, sm_count), 1, 1], 256, PRODUCT_SHARED)
    }
}

impl DownParams {
    /// One block a row tile and 128 features, at most.
    #[must_use]
    pub fn launch(&self, bounds: &RouteBounds, sm_count: u32) -> Launch {
        let blocks = bounds.tiles * u64::from(self.hidden_size.div_ceil(128));
        Launch::new([covering(blocks, sm_count), 1, 1], 256, PRODUCT_SHARED)
    }
}

impl PrefillShrinkParams {
    /// One block an SM, each with as much of the work.
    #[must_use]
    pub fn launch(&self, sm_count: u32) -> Launch {
        Launch::new([sm_count, 1, 1], PIECES_THREADS, PIECES_SHARED)
    }
}

impl PrefillGateUpParams {
    /// Rows of a tile, [`AlignParams::tile_rows`] of the batch.
    pub const TILE_ROWS: u32 = 256;

    /// One block an SM, which takes tile after tile.
    #[must_use]
    pub fn launch(&self, sm_count: u32) -> Launch {
        Launch::new([sm_count, 1, 1], 384, GROUPED_SHARED)
    }
}

impl PrefillDownParams {
    /// One block an SM, which takes tile after tile.
    #[must_use]
    pub fn launch(&self, sm_count: u32) -> Launch {
        Launch::new([sm_count, 1, 1], 384, GROUPED_SHARED)
    }
}

impl CombineParams {
    /// One block 1024 features of a token.
    #[must_use]
    pub fn launch(&self) -> Launch {
        Launch::new([self.hidden_size.div_ceil(8 * 128), self.num_tokens.min(65_535), 1], 128, 0)
    }
}

impl NoiseParams {
    /// Four blocks an SM.
    #[must_use]
    pub const fn launch(&self, sm_count: u32) -> Launch {
        Launch::new([4 * sm_count, 1, 1], MEASURE_THREADS, 0)
    }
}

impl ReadParams {
    /// Four blocks an SM: all that fit at once.
    #[must_use]
    pub const fn launch(&self, sm_count: u32) -> Launch {
        Launch::new([4 * sm_count, 1, 1], MEASURE_THREADS, 0)
    }
}

impl PeakParams {
    /// One block an SM.
    #[must_use]
    pub const fn launch(&self, sm_count: u32, shared_bytes_per_block: u32) -> Launch {
        // Where it does not fit, nothing of it is used.
        let shared = if shared_bytes_per_block < PEAK_SHARED { 0 } else { PEAK_SHARED };
        Launch::new([sm_count, 1, 1], PEAK_THREADS, shared)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The longest lists that a batch can make, by brute force over how rows spread over experts and slots.
    #[test]
    fn bounds_hold_for_the_worst_spread() {
        for (tokens, k, experts, slots) in [(1, 2, 4, 3), (64, 8, 128, 8), (300, 1, 1, 1), (33, 2, 3, 40), (5, 3, 4, 0)]
        {
            let bounds = RouteBounds::new(tokens, k, experts, slots);
            for spread in 1..=experts {
                // `spread` experts share all rows, each expert's rows cycle over `used` slots.
                for used in 0..=slots {
                    let (mut segments, mut tiles, mut chunks) = (0, 0, 0);
                    for expert in 0..spread {
                        let rows = bounds.pairs / spread + u64::from(expert < bounds.pairs % spread);
                        tiles += rows.div_ceil(TILE_ROWS);
                        let parts = rows.min(used.max(1));
                        segments += parts;
                        if used > 0 {
                            // Every segment opens a chunk, and every 64th row that is not at a border.
                            chunks += parts + rows.saturating_sub(1) / CHUNK_ROWS;
                        }
                    }
                    assert!(segments <= bounds.segments && tiles <= bounds.tiles, "{bounds:?} {spread} {used}");
                    assert!(chunks.min(bounds.pairs) <= bounds.chunks, "{bounds:?} {spread} {used}");
                }
            }
        }
    }

    #[test]
    fn grids_do_not_depend_on_routing_and_stay_small() {
        let params = GateUpParams { intermediate_size: 768, ..Default::default() };
        let bounds = RouteBounds::new(65_536, 8, 128, 64);
        assert_eq!(params.launch(&bounds, 132).grid, [132 * 64, 1, 1]);
        assert_eq!(params.launch(&RouteBounds::new(1, 8, 128, 64), 132).grid, [8 * 12, 1, 1]);
        let align = AlignParams { num_tokens: 131_072, top_k: 8, num_experts: 1024, ..Default::default() };
        assert!(align.launch(132).cooperative && align.launch(132).grid[0] == 132);
    }

    /// The numbers above that `cuda/` must agree with.
    #[test]
    fn the_sources_have_the_same_constants() {
        let sources = [
            include_str!("../cuda/params.cuh"),
            include_str!("../cuda/route.cu"),
            include_str!("../cuda/shrink.cu"),
            include_str!("../cuda/prefill_shrink.cu"),
            include_str!("../cuda/combine.cu"),
            include_str!("../cuda/measure.cu"),
            include_str!("../cuda/peak.cu"),
            include_str!("../cuda/schedule/sort.cuh"),
            include_str!("../cuda/tile/product.cuh"),
            include_str!("../cuda/epilogue/lora.cuh"),
            include_str!("../cuda/tile/grouped.cuh"),
            include_str!("../cuda/tile/swizzle.cuh"),
            include_str!("../cuda/tile/stream.cuh"),
            include_str!("../cuda/epilogue/lora_stream.cuh"),
            include_str!("../cuda/decode_route.cu"),
            include_str!("../cuda/cluster_route.cu"),
        ];
        for line in [
            format!("kTileRows = {TILE_ROWS};"),
            format!("kChunkRows = {CHUNK_ROWS};"),
            format!("kSortDigit = {SORT_DIGIT};"),
            format!("kSortWarps = {SORT_WARPS};"),
            format!("kTopkWarps = {TOPK_WARPS};"),
            "kQueueBytes = 12 * 1024;".to_owned(),
            "kShrinkShared = kShrinkWarps * kQueueBytes;".to_owned(),
            format!("kMeasureThreads = {MEASURE_THREADS};"),
            format!("kPeakThreads = {PEAK_THREADS};"),
            "kPeakShared = kPeakStages * (kPartA + kPartB) + 1024;".to_owned(),
            "kPeakStages = 4;".to_owned(),
            "kProductShared = 96 * 1024;".to_owned(),
            "kLoraPartsBytes = kTileRows * sizeof(LoraPart);".to_owned(),
            "static_assert(sizeof(LoraPart) == 24".to_owned(),
            "kProductThreads = 256;".to_owned(),
            "kShrinkWarps = 8;".to_owned(),
            format!("kSplitThreads = {SPLIT_THREADS};"),
            "kCombineThreads = 128;".to_owned(),
            "kWeightRows = 128;".to_owned(),
            "kPiecesThreads = (8 + kCopyWarps + 1) * 32;".to_owned(),
            "kCopyWarps = 8;".to_owned(),
            "kPiecesShared = 1024 + kPiecesRing + sizeof(PiecesShared);".to_owned(),
            "kPiecesRing = 216 * 1024;".to_owned(),
            "kPiecesAhead = 4;".to_owned(),
            "kPiecesStages = 24;".to_owned(),
            "static_assert(sizeof(Piece) == 1072".to_owned(),
            "kGroupedThreads = 384;".to_owned(),
            "kGroupedStages = 8;".to_owned(),
            "kGroupedTokens = 256;".to_owned(),
            "kGroupedWeights = 128;".to_owned(),
            "kStagedBytes = 16384;".to_owned(),
            "kTileDepth = 64;".to_owned(),
            "kStreamThreads = 384;".to_owned(),
            "kStreamRows = 64;".to_owned(),
            "kShrinkThreads = 128;".to_owned(),
            "kShrinkPartial = 4 * kShrinkRows * kShrinkPitch;".to_owned(),
            "kShrinkPitch = 20;".to_owned(),
            "kMostPairs = 2048;".to_owned(),
            "kMostTokens = 256;".to_owned(),
            "kMostBlocks = 16;".to_owned(),
            "static_assert(sizeof(Shared) == 960,".to_owned(),
            "1024 + kRingBytes + kGroupedStages * (16 + 16 + 4) + 2 * kStagedBytes + kGroupedTokens * 4 + 4;"
                .to_owned(),
        ] {
            assert!(sources.iter().any(|s| s.contains(&line)), "{line}");
        }
    }

    #[test]
    fn shared_memory_fits_every_supported_gpu() {
        for kernel in crate::Kernel::ALL {
            let hopper = kernel.family().hopper() || kernel == crate::Kernel::Peak;
            let most = if hopper { 227 * 1024 } else { 99 * 1024 };
            assert!(kernel.most_shared_bytes() <= most, "{kernel:?}");
        }
    }
}
