// moe_lora_cluster_align: what moe_lora_align makes, by one cluster of blocks that keep everything in shared memory.
//
// Tokens are sorted by slot, then their pairs by expert, each the same way: a block owns a share of them in order, its warps
// rank 32 at a time by ballots, the counts of every bin are summed over warps, then pushed to all blocks, which sum them over
// blocks and bins; so everyone knows the place of each of its own, and sends it to the block that owns that place. The lists
// follow from the sorted rows by one scan, whose totals are exchanged likewise. What a block sends is counted in bytes by a
// barrier of the receiver: no fence, no global memory. Nothing depends on the order of warps or blocks: equal inputs give
// equal bits.
// Cost: 16 bytes of global traffic a pair and the lists; five exchanges of a quarter of a microsecond. H100, cold L2, 8 of 128
// experts, 8 slots, with 3.4 us of an empty launch: T = 256 10.8 us, 1024 12.3, 8192 23.9 (moe_lora_align: 28, 33, 44).
// Limits: at least two blocks, E <= 1024, fewer than 1024 slots, T * k <= 2^17, and what fits in shared memory (see
// ClusterAlignParams::launch); T > 0; lists at multiples of 16 bytes.
#include "params.cuh"
#include "ptx/async.cuh"
#include "ptx/cluster.cuh"
#include "ptx/mbarrier.cuh"
#include "schedule/lists.cuh"

namespace {

constexpr uint32_t kMostBlocks = 16;  // of a cluster
constexpr uint32_t kPairBits = 17;    // of a row's first number: pair, then expert
enum Arrival : uint32_t { kSlotCounts, kExpertCounts, kTokens, kRows, kTotals, kArrivals };

struct Shared {
    uint64_t arrived[kArrivals];
    uint32_t warp_sums[2][32];   // of both sorts
    uint32_t warp_opened[3][32];
    uint4 totals[kMostBlocks];  // what every block found: segments, tiles, chunks, slots that should not be
    uint2 row_before;           // the last row of the block before
    uint32_t bad_slots;
    uint32_t all_tiles;
};
static_assert(sizeof(Shared) == 960, "as in ClusterAlignParams::launch");

// Where the parts of dynamic shared memory are, behind `Shared`. The same in all blocks.
struct Places {
    uint2* rows;         // [rows a block] pair | expert << kPairBits, slot + 1
    uint2* tokens;       // [tokens a block] token, slot + 1
    uint32_t* counts;    // [blocks, slot bins], then [blocks, expert bins]
    uint32_t* records;   // [pairs a block] bin << 16 | rank among those of its bin in its warp
    uint32_t* bases;     // [bins] place of the block's first of every bin
    uint32_t* starts;    // [bins + 1] first place of every bin
    uint32_t* heights;   // [E] rows of a tile << 22 | tiles
    uint32_t* first_tile;  // [E]
    float* tile_parts;   // [E] 1 / rows of a tile
    uint3* opened;       // [rows a block / 32] which of 32 rows open a segment, a tile, a chunk
    uint16_t* counters;  // [warps, bins]

    __device__ Places(char* shared, uint32_t tokens_each, uint32_t top_k, uint32_t count_words, uint32_t most_bins, uint32_t experts) {
        rows = reinterpret_cast<uint2*>(shared + sizeof(Shared));
        tokens = rows + tokens_each * top_k;
        counts = reinterpret_cast<uint32_t*>(tokens + tokens_each + (tokens_each * (top_k + 1)) % 2);  // 16-byte aligned
        records = counts + count_words;
        bases = records + tokens_each * top_k;
        starts = bases + most_bins;
        heights = starts + most_bins + 1;
        first_tile = heights + experts;
        tile_parts = reinterpret_cast<float*>(first_tile + experts);
        opened = reinterpret_cast<uint3*>(tile_parts + experts);
        counters = reinterpret_cast<uint16_t*>(opened + (tokens_each * top_k + blockDim.x) / 32);
    }
};

// The sum of the numbers of all warps before `before_warp`, and of all.
__device__ __forceinline__ uint32_t sum_of_warps(const uint32_t* of_warps, uint32_t before_warp, uint32_t& total) {
    const uint32_t lane = threadIdx.x % 32, number = lane < blockDim.x / 32 ? of_warps[lane] : 0;
    total = __reduce_add_sync(kAllLanes, number);
    return __reduce_add_sync(kAllLanes, lane < before_warp ? number : 0);
}

// Quotients of numbers up to 2^32 / by.
struct Divider {
    uint32_t by, factor;

    __device__ explicit Divider(uint32_t number) : by(number), factor(0xffffffffu / number + 1) {}
    __device__ __forceinline__ uint32_t operator()(uint32_t n) const { return by == 1 ? n : __umulhi(n, factor); }
};

// Lanes with the same bin, of `bits` bits, at most 11.
__device__ __forceinline__ uint32_t lanes_with(uint32_t bin, uint32_t bits) {
    uint32_t equal = kAllLanes;
    const auto split = [&](int b) {
        const bool set = bin >> b & 1;
        const uint32_t with = __ballot_sync(kAllLanes, set);
        equal &= set ? with : ~with;
    };
#pragma unroll
    for (int b = 0; b < 8; ++b) split(b);
    if (bits > 8) {
#pragma unroll
        for (int b = 8; b < 11; ++b) split(b);
    }
    return equal;
}

__device__ __forceinline__ uint32_t round_up(uint32_t n, uint32_t to) { return (n + to - 1) / to * to; }

}  // namespace

extern "C" __global__ void __launch_bounds__(1024) moe_lora_cluster_align(const AlignParams p) {
    extern __shared__ __align__(16) char cluster_align_shared[];
    Shared& s = *reinterpret_cast<Shared*>(cluster_align_shared);
    const uint32_t thread = threadIdx.x, lane = thread % 32, warp = thread / 32, warps = blockDim.x / 32;
    const uint32_t blocks = gridDim.x, rank = blockIdx.x, experts = p.num_experts;
    const bool by_slot = p.token_slots != 0;
    const uint32_t slot_bins = by_slot ? p.num_slots + 1 : 0, expert_bins = experts + 2;  // two for -1 and ids that should not be
    const uint32_t slot_words = round_up(slot_bins, 4), expert_words = round_up(expert_bins, 4);
    const uint32_t tokens_each = (p.num_tokens + blocks - 1) / blocks;
    const uint32_t first_token = min(p.num_tokens, rank * tokens_each);
    const uint32_t tokens_here = min(p.num_tokens - first_token, tokens_each);
    const Places at(cluster_align_shared, tokens_each, p.top_k, blocks * (slot_words + expert_words),
                    max(slot_words, expert_words), experts);
    const Divider by_top_k(p.top_k), by_tokens(tokens_each);
    const auto arrived = [&](uint32_t which) { return shared_address(&s.arrived[which]); };

    if (warp == 0) {
        if (lane < kArrivals) {
            mbarrier_init(arrived(lane), 1);
            fence_mbarrier_init();
        }
        __syncwarp();
        if (lane < kArrivals && lane != kRows) {
            const uint32_t others = (blocks - 1) * 4;
            mbarrier_expect(arrived(lane), lane == kSlotCounts     ? others * slot_words
                                           : lane == kExpertCounts ? others * expert_words
                                           : lane == kTokens       ? tokens_here * 8
                                                                   : blocks * 16);
        }
    }
    if (thread == 0) s.bad_slots = s.all_tiles = 0;
    cluster_arrive_relaxed();
    if (!by_slot) {
        for (uint32_t i = thread; i < tokens_here; i += blockDim.x) at.tokens[i] = make_uint2(first_token + i, 0);
    }
    wait_for_previous_launch();
    const auto* ids = reinterpret_cast<const int32_t*>(p.topk_ids);
    const auto* active = reinterpret_cast<const uint8_t*>(p.slot_active);
    if (by_slot) {
        // What is needed once tokens are sorted.
        const uint32_t bytes = tokens_here * p.top_k * 4;
        for (uint32_t i = thread * 128; i < bytes; i += blockDim.x * 128) {
            prefetch_l2(reinterpret_cast<const char*>(ids + first_token * p.top_k) + i);
        }
        if (active != nullptr && thread * 128 < p.num_slots) prefetch_l2(active + thread * 128);
    }

#pragma unroll 1
    for (uint32_t pass = by_slot ? 0 : 1; pass < 2; ++pass) {
        const uint32_t n = pass == 0 ? tokens_here : tokens_here * p.top_k;
        const uint32_t bins = pass == 0 ? slot_bins : expert_bins, words = pass == 0 ? slot_words : expert_words;
        uint32_t* const counts = at.counts + pass * blocks * slot_words;
        if (pass == 1 && by_slot) mbarrier_wait(arrived(kTokens), 0);
        __syncthreads();
        // A warp owns neighbours.
        const uint32_t each = (n + blockDim.x - 1) / blockDim.x * 32, first = warp * each, end = min(n, first + each);
        const uint32_t bits = 32 - __clz(bins);
        uint16_t* const mine = at.counters + warp * bins;
        for (uint32_t b = lane; b < bins; b += 32) mine[b] = 0;
#pragma unroll 4
        for (uint32_t i = first + lane; i < end; i += 32) {
            if (pass == 0) {
                const int32_t slot = reinterpret_cast<const int32_t*>(p.token_slots)[first_token + i];
                const bool known = slot >= 0 && slot < static_cast<int32_t>(p.num_slots);
                if (!known && slot != -1) atomicAdd(&s.bad_slots, 1);
                at.records[i] = known && (active == nullptr || active[slot] != 0) ? slot + 1 : 0;
            } else {
                const uint32_t of_token = by_top_k(i);
                const uint32_t id = static_cast<uint32_t>(ids[at.tokens[of_token].x * p.top_k + i - of_token * p.top_k]);
                const uint32_t local = id - p.first_expert;
                at.records[i] = local < experts ? local : id == ~0u || id < p.all_experts ? experts : experts + 1;
            }
        }
        __syncwarp();
#pragma unroll 1
        for (uint32_t base = first; base < end; base += 32) {
            const bool valid = base + lane < end;
            const uint32_t bin = valid ? at.records[base + lane] : bins;
            const uint32_t equal = lanes_with(bin, bits), below = __popc(equal & lanes_below());
            if (valid) at.records[base + lane] = bin << 16 | (mine[bin] + below);
            __syncwarp();
            if (valid && below == 0) mine[bin] += __popc(equal);
            __syncwarp();
        }
        __syncthreads();
        uint32_t* const own = counts + rank * words;
        for (uint32_t b = thread; b < bins; b += blockDim.x) {
            uint32_t sum = 0;
#pragma unroll 8
            for (uint32_t w = 0; w < warps; ++w) {
                const uint32_t count = at.counters[w * bins + b];
                at.counters[w * bins + b] = static_cast<uint16_t>(sum);
                sum += count;
            }
            own[b] = sum;
        }
        fence_async_shared();
        __syncthreads();
        if (pass == (by_slot ? 0 : 1)) cluster_wait();  // everyone's barriers are initialised
        if (thread < blocks && thread != rank) {
            bulk_push(cluster_address(shared_address(own), thread), shared_address(own), words * 4,
                      cluster_address(arrived(pass), thread));
        }
        mbarrier_wait(arrived(pass), 0);

        // Over blocks, then over bins.
        const uint32_t bins_each = (bins + blockDim.x - 1) / blockDim.x;
        const uint32_t first_bin = min(bins, thread * bins_each), end_bin = min(bins, first_bin + bins_each);
        uint32_t sum = 0, total;
        for (uint32_t b = first_bin; b < end_bin; ++b) {
            uint32_t all = 0, before = 0;
#pragma unroll 4
            for (uint32_t block = 0; block < blocks; ++block) {
                const uint32_t count = counts[block * words + b];
                before += block < rank ? count : 0;
                all += count;
            }
            at.bases[b] = before;
            at.starts[b] = all;
            sum += all;
        }
        uint32_t inclusive = sum;
#pragma unroll
        for (int d = 1; d < 32; d *= 2) {
            const uint32_t other = __shfl_up_sync(kAllLanes, inclusive, d);
            if (lane >= d) inclusive += other;
        }
        if (lane == 31) s.warp_sums[pass][warp] = inclusive;
        __syncthreads();
        uint32_t start = sum_of_warps(s.warp_sums[pass], warp, total) + inclusive - sum;
        for (uint32_t b = first_bin; b < end_bin; ++b) {
            const uint32_t all = at.starts[b];
            at.starts[b] = start;
            at.bases[b] += start;
            start += all;
        }
        if (thread == 0) at.starts[bins] = total;
        __syncthreads();

        // To their places.
        const uint32_t num_rows = at.starts[experts];  // of the second pass
        const uint32_t rows_each = max(1u, (num_rows + blocks - 1) / blocks);
        const Divider by_rows(rows_each);
#pragma unroll 1
        for (uint32_t i = first + lane; i < end; i += 32) {
            const uint32_t record = at.records[i], bin = record >> 16;
            const uint32_t to = at.bases[bin] + mine[bin] + (record & 0xffff);
            if (pass == 0) {
                const uint32_t block = by_tokens(to);
                push_pair(cluster_address(shared_address(at.tokens + (to - block * tokens_each)), block), first_token + i, bin,
                          cluster_address(arrived(kTokens), block));
                continue;
            }
            const uint32_t of_token = by_top_k(i);
            const uint2 token = at.tokens[of_token];
            const uint32_t pair = token.x * p.top_k + i - of_token * p.top_k;
            reinterpret_cast<int32_t*>(p.pair_row)[pair] = bin < experts ? static_cast<int32_t>(to) : -1;
            if (bin >= experts) continue;
            const uint32_t block = by_rows(to), within = to - block * rows_each;
            push_pair(cluster_address(shared_address(at.rows + within), block), pair | bin << kPairBits, token.y,
                      cluster_address(arrived(kRows), block));
            if (within + 1 == rows_each && to + 1 < num_rows) {
                push_pair(cluster_address(shared_address(&s.row_before), block + 1), pair | bin << kPairBits, token.y,
                          cluster_address(arrived(kRows), block + 1));
            }
        }
    }

    const uint32_t num_rows = at.starts[experts], rows_each = max(1u, (num_rows + blocks - 1) / blocks);
    const uint32_t first_row = min(num_rows, rank * rows_each), rows_here = min(num_rows - first_row, rows_each);
    if (thread == 0) mbarrier_expect(arrived(kRows), rows_here * 8 + (first_row > 0 && rows_here > 0 ? 8 : 0));
    for (uint32_t e = thread; e < experts; e += blockDim.x) {
        const uint32_t rows = at.starts[e + 1] - at.starts[e];
        const uint32_t height = p.tile_rows == 0 ? kTileRows : rows_of_tile(rows, p.tile_rows);
        at.heights[e] = rows == 0 ? 0 : height << 22 | (rows + height - 1) / height;
        at.tile_parts[e] = __frcp_rn(static_cast<float>(height));
        if (rank == 0) atomicAdd(&s.all_tiles, at.heights[e] & 0x3fffff);
    }
    mbarrier_wait(arrived(kRows), 0);
    __syncthreads();
    const auto expert_of = [](uint2 row) { return row.x >> kPairBits; };
    // Tiles before an expert's first: those of experts with higher ones, or equal ones and a lower number.
    if (p.tile_rows != 0 && rows_here > 0) {
        const uint32_t end_expert = expert_of(at.rows[rows_here - 1]) + 1;
        for (uint32_t e = expert_of(at.rows[0]) + warp; e < end_expert; e += warps) {
            const uint32_t height = at.heights[e] >> 22;
            uint32_t before = 0;
#pragma unroll 4
            for (uint32_t other = lane; other < experts; other += 32) {
                const uint32_t others = at.heights[other] >> 22, tiles = at.heights[other] & 0x3fffff;
                before += others > height || (others == height && other < e) ? tiles : 0;
            }
            before = __reduce_add_sync(kAllLanes, before);
            if (lane == 0) at.first_tile[e] = before;
        }
    }

    // What a row opens: a segment, a row tile, a LoRA chunk. A warp owns neighbours.
    const auto before_row = [&](uint32_t i) {
        return i > 0 ? at.rows[i - 1] : first_row > 0 ? s.row_before : make_uint2(~0u, 0);
    };
    const auto tile_of = [&](uint32_t expert, uint32_t within) { return __float2uint_rn(within * at.tile_parts[expert]); };
    const uint32_t each = (rows_here + blockDim.x - 1) / blockDim.x * 32, first = warp * each, end = min(rows_here, first + each);
    const auto* weights = reinterpret_cast<const float*>(p.topk_weights);
    auto* row_weight = reinterpret_cast<float*>(p.row_weight);
    uint32_t found[3] = {0, 0, 0};
#pragma unroll 1
    for (uint32_t base = first; base < end; base += 32) {
        const uint32_t i = base + lane;
        bool segment = false, tile = false, chunk = false;
        if (i < end) {
            const uint2 row = at.rows[i], before = before_row(i);
            const uint32_t pair = row.x & ((1u << kPairBits) - 1), expert = expert_of(row);
            reinterpret_cast<uint32_t*>(p.row_pair)[first_row + i] = pair;
            if (row_weight != nullptr) row_weight[first_row + i] = weights[pair];
            const uint32_t within = first_row + i - at.starts[expert];
            segment = expert_of(before) != expert || before.y != row.y;
            tile = tile_of(expert, within) * (at.heights[expert] >> 22) == within;  // exact where it is one
            chunk = row.y > 0 && (segment || within % kChunkRows == 0);
        }
        const uint3 opened = make_uint3(__ballot_sync(kAllLanes, segment), __ballot_sync(kAllLanes, tile),
                                        __ballot_sync(kAllLanes, chunk));
        if (lane == 0) at.opened[base / 32] = opened;
        found[0] += __popc(opened.x);
        found[1] += __popc(opened.y);
        found[2] += __popc(opened.z);
    }
    if (lane < 3) s.warp_opened[lane][warp] = lane == 0 ? found[0] : lane == 1 ? found[1] : found[2];
    __syncthreads();
    uint32_t next[3], here[3];
#pragma unroll
    for (int list = 0; list < 3; ++list) next[list] = sum_of_warps(s.warp_opened[list], warp, here[list]);
    if (thread < blocks) {
        push_four(cluster_address(shared_address(&s.totals[rank]), thread), here[0], here[1], here[2], s.bad_slots,
                  cluster_address(arrived(kTotals), thread));
    }
    mbarrier_wait(arrived(kTotals), 0);
    cluster_arrive_relaxed();
    const uint4 of_block = lane < blocks ? s.totals[lane] : make_uint4(0, 0, 0, 0);
    next[0] += __reduce_add_sync(kAllLanes, lane < rank ? of_block.x : 0);
    next[1] += __reduce_add_sync(kAllLanes, lane < rank ? of_block.y : 0);
    next[2] += __reduce_add_sync(kAllLanes, lane < rank ? of_block.z : 0);
    if (rank == 0 && warp == 0) {
        const uint32_t all[4] = {__reduce_add_sync(kAllLanes, of_block.x), __reduce_add_sync(kAllLanes, of_block.y),
                                 __reduce_add_sync(kAllLanes, of_block.z), __reduce_add_sync(kAllLanes, of_block.w)};
        if (lane == 0) {
            *reinterpret_cast<RouteCounts*>(p.counts) =
                RouteCounts{num_rows, all[0], p.tile_rows == 0 ? all[1] : s.all_tiles, all[2],
                            p.num_tokens * p.top_k - at.starts[experts + 1], all[3], {0, 0}};
        }
    }
    auto* segments = reinterpret_cast<Segment*>(p.segments);
    auto* tiles = reinterpret_cast<RowTile*>(p.tiles);
    auto* chunks = reinterpret_cast<Segment*>(p.chunks);
#pragma unroll 1
    for (uint32_t base = first; base < end; base += 32) {
        const uint32_t i = base + lane, row_index = first_row + i;
        const uint3 opened = at.opened[base / 32];
        // Of every list: the records that opened before this row.
        const uint32_t segment = next[0] + __popc(opened.x & lanes_below());
        const uint32_t tile = next[1] + __popc(opened.y & lanes_below());
        const uint32_t chunk = next[2] + __popc(opened.z & lanes_below());
        next[0] += __popc(opened.x);
        next[1] += __popc(opened.y);
        next[2] += __popc(opened.z);
        const bool opens_segment = opened.x >> lane & 1, opens_tile = opened.y >> lane & 1, opens_chunk = opened.z >> lane & 1;
        const bool last = row_index + 1 == num_rows;
        if (i >= end || !(opens_segment || opens_tile || opens_chunk || last)) continue;
        const uint2 row = at.rows[i];
        const uint32_t expert = expert_of(row);
        const int32_t slot = static_cast<int32_t>(row.y) - 1;
        if (opens_segment) {
            *reinterpret_cast<uint2*>(&segments[segment]) = make_uint2(expert, slot);
            segments[segment].first_row = row_index;
            if (row_index > 0) segments[segment - 1].end_row = row_index;
        }
        if (opens_tile) {
            const uint32_t within = row_index - at.starts[expert], height = at.heights[expert] >> 22;
            const uint32_t rows = min(height, at.starts[expert + 1] - row_index);
            const uint32_t place = p.tile_rows == 0 ? tile : at.first_tile[expert] + tile_of(expert, within);
            *reinterpret_cast<uint4*>(&tiles[place]) = make_uint4(expert, row_index, rows, segment + opens_segment - 1);
        }
        if (opens_chunk) {
            *reinterpret_cast<uint2*>(&chunks[chunk]) = make_uint2(expert, slot);
            chunks[chunk].first_row = row_index;
        }
        if (row_index > 0 && (opens_segment || opens_chunk) && before_row(i).y > 0) chunks[chunk - 1].end_row = row_index;
        if (last) {
            segments[segment + opens_segment - 1].end_row = num_rows;
            if (slot >= 0) chunks[chunk + opens_chunk - 1].end_row = num_rows;
        }
    }
    cluster_wait();  // nobody reads this block's shared memory any more
}
