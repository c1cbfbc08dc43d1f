// moe_lora_decode_align: what moe_lora_align makes, for at most 2048 pairs, by one block that keeps everything in shared memory.
//
// Tokens are ranked by slot (each compares itself with all others), then pairs, in that order, are sorted by expert: a warp
// ranks 32 pairs at a time, per-warp counts of every expert are summed over warps, then over experts. The lists follow from
// the sorted rows by one scan. Equal inputs give equal bits: nothing depends on the order of the warps.
// Cost: 28 bytes of traffic a pair, T * T / 32 steps a warp for the ranks, six barriers; 2 to 8 microseconds.
// Limits: T <= 256, T * k <= 2048, E <= 1024; one block of at least 32 threads and at least T * k / 2, up to 1024; tile_rows > 0.
#include "params.cuh"
#include "ptx/async.cuh"
#include "schedule/sort.cuh"

namespace {

constexpr uint32_t kMostPairs = 2048;
constexpr uint32_t kMostTokens = 256;
constexpr uint32_t kMostWarps = 32;

struct Shared {
    uint32_t slot_keys[kMostTokens];  // slot + 1 of a token
    uint16_t order[kMostTokens];      // tokens by slot
    uint16_t pair[kMostPairs];        // of a row, and what else a row has
    uint16_t expert[kMostPairs];
    uint16_t slot[kMostPairs];  // + 1
    float weight[kMostPairs];
    uint32_t warp_sums[2][kMostWarps];
    uint32_t starts[];  // [E + 2]: first row of an expert, rows, pairs; then u16 counts [warps][E + 2]
};

// The sum of `value` over all threads before this one, and `total`.
__device__ __forceinline__ uint32_t block_sum_before(uint32_t value, uint32_t* warp_sums, uint32_t& total) {
    const uint32_t lane = threadIdx.x % 32, warps = blockDim.x / 32;
    uint32_t inclusive = value;
#pragma unroll
    for (int d = 1; d < 32; d *= 2) {
        const uint32_t other = __shfl_up_sync(kAllLanes, inclusive, d);
        if (lane >= d) inclusive += other;
    }
    if (lane == 31) warp_sums[threadIdx.x / 32] = inclusive;
    __syncthreads();
    const uint32_t sum = lane < warps ? warp_sums[lane] : 0;
    uint32_t sums = sum;
#pragma unroll
    for (int d = 1; d < 32; d *= 2) {
        const uint32_t other = __shfl_up_sync(kAllLanes, sums, d);
        if (lane >= d) sums += other;
    }
    total = __shfl_sync(kAllLanes, sums, 31);
    return inclusive - value + __shfl_sync(kAllLanes, sums - sum, threadIdx.x / 32);
}

}  // namespace

extern "C" __global__ void __launch_bounds__(1024) moe_lora_decode_align(const AlignParams p) {
    extern __shared__ __align__(16) char decode_align_shared[];
    Shared& s = *reinterpret_cast<Shared*>(decode_align_shared);
    const uint32_t thread = threadIdx.x, lane = thread % 32, warp = thread / 32, warps = blockDim.x / 32;
    const uint32_t bins = p.num_experts + 2, pairs = p.num_tokens * p.top_k, each = pairs > blockDim.x ? 2 : 1;
    auto* counters = reinterpret_cast<uint16_t*>(s.starts + bins + 1);
    for (uint32_t i = thread; i < warps * bins; i += blockDim.x) counters[i] = 0;
    wait_for_previous_launch();
    const auto* ids = reinterpret_cast<const int32_t*>(p.topk_ids);
    const auto* weights = reinterpret_cast<const float*>(p.topk_weights);

    // Tokens by slot.
    bool bad_slot = false;
    if (thread < p.num_tokens) {
        uint32_t key = 0;
        if (p.token_slots != 0) {
            const int32_t slot = reinterpret_cast<const int32_t*>(p.token_slots)[thread];
            const bool known = slot >= 0 && slot < static_cast<int32_t>(p.num_slots);
            bad_slot = !known && slot != -1;
            const auto* active = reinterpret_cast<const uint8_t*>(p.slot_active);
            key = known && (active == nullptr || active[slot] != 0) ? slot + 1 : 0;
        }
        s.slot_keys[thread] = key;
    }
    for (uint32_t i = p.num_tokens + thread; i < (p.num_tokens + 3) / 4 * 4; i += blockDim.x) s.slot_keys[i] = ~0u;
    const uint32_t bad_slots = __syncthreads_count(bad_slot);
    if (thread < p.num_tokens) {
        const uint32_t key = s.slot_keys[thread];
        uint32_t rank = 0;
        for (uint32_t i = 0; i < p.num_tokens; i += 4) {
            const uint4 other = *reinterpret_cast<const uint4*>(s.slot_keys + i);
            rank += (other.x < key || (other.x == key && i < thread)) + (other.y < key || (other.y == key && i + 1 < thread)) +
                    (other.z < key || (other.z == key && i + 2 < thread)) + (other.w < key || (other.w == key && i + 3 < thread));
        }
        s.order[rank] = static_cast<uint16_t>(thread);
    }
    __syncthreads();

    // Pairs by expert; two bins follow the experts: -1 and other ranks' experts, and ids that should not be. A warp owns 32 * each pairs in a row.
    uint32_t pair[2], bin[2], rank[2];
    float weight[2];
    uint16_t* mine = counters + warp * bins;
#pragma unroll
    for (uint32_t i = 0; i < 2; ++i) {
        if (i >= each) break;
        const uint32_t at = (warp * each + i) * 32 + lane;
        const bool any = at < pairs;
        const uint32_t token = any ? s.order[at / p.top_k] : 0;
        pair[i] = token * p.top_k + at % p.top_k;
        const uint32_t id = any ? static_cast<uint32_t>(ids[pair[i]]) : 0, local = id - p.first_expert;
        weight[i] = any ? weights[pair[i]] : 0.0f;
        const bool elsewhere = id == ~0u || id < p.all_experts;
        bin[i] = !any ? ~0u : local < p.num_experts ? local : elsewhere ? p.num_experts : p.num_experts + 1;
    }
#pragma unroll
    for (uint32_t i = 0; i < 2; ++i) {
        if (i >= each) break;
        const uint32_t equal = __match_any_sync(kAllLanes, bin[i]), below = __popc(equal & lanes_below());
        rank[i] = below + (bin[i] != ~0u ? mine[bin[i]] : 0);
        __syncwarp();
        if (bin[i] != ~0u && below == 0) mine[bin[i]] += __popc(equal);
        __syncwarp();
    }
    __syncthreads();
    const uint32_t bins_each = (bins + blockDim.x - 1) / blockDim.x, first_bin = min(bins, thread * bins_each);
    uint32_t sum = 0, total;
    for (uint32_t b = first_bin; b < min(bins, first_bin + bins_each); ++b) {
        uint32_t of_bin = 0;
#pragma unroll 8
        for (uint32_t w = 0; w < warps; ++w) {
            const uint32_t count = counters[w * bins + b];
            counters[w * bins + b] = static_cast<uint16_t>(of_bin);
            of_bin += count;
        }
        s.starts[b] = of_bin;
        sum += of_bin;
    }
    uint32_t before = block_sum_before(sum, s.warp_sums[0], total);
    for (uint32_t b = first_bin; b < min(bins, first_bin + bins_each); ++b) {
        const uint32_t of_bin = s.starts[b];
        s.starts[b] = before;
        before += of_bin;
    }
    if (thread == 0) s.starts[bins] = total;
    __syncthreads();
    const uint32_t num_rows = s.starts[p.num_experts];
    auto* pair_row = reinterpret_cast<int32_t*>(p.pair_row);
#pragma unroll
    for (uint32_t i = 0; i < 2; ++i) {
        if (i >= each) break;
        if (bin[i] == ~0u) continue;
        if (bin[i] >= p.num_experts) {
            pair_row[pair[i]] = -1;
            continue;
        }
        const uint32_t row = s.starts[bin[i]] + mine[bin[i]] + rank[i];
        s.pair[row] = static_cast<uint16_t>(pair[i]);
        s.expert[row] = static_cast<uint16_t>(bin[i]);
        s.slot[row] = static_cast<uint16_t>(s.slot_keys[pair[i] / p.top_k]);
        s.weight[row] = weight[i];
    }
    __syncthreads();

    // What a row opens: a segment, a row tile, a LoRA chunk.
    const uint32_t chunk_rows = min(static_cast<uint32_t>(kChunkRows), p.tile_rows);
    bool segment[2], tile[2], chunk[2];
    uint32_t of_tile[2], opened = 0, opened_chunks = 0, all, all_chunks;
#pragma unroll
    for (uint32_t i = 0; i < 2; ++i) {
        const uint32_t row = thread * each + i;
        segment[i] = tile[i] = chunk[i] = false;
        of_tile[i] = 0;
        if (i >= each || row >= num_rows) continue;
        const uint32_t expert = s.expert[row], within = row - s.starts[expert], rows = s.starts[expert + 1] - s.starts[expert];
        segment[i] = within == 0 || s.slot[row] != s.slot[row - 1];
        chunk[i] = s.slot[row] > 0 && (segment[i] || within % chunk_rows == 0);
        const uint32_t tiles = (rows + p.tile_rows - 1) / p.tile_rows, size = ((rows + tiles - 1) / tiles + 7) / 8 * 8;
        tile[i] = within % size == 0;
        of_tile[i] = min(size, rows - within);
        opened += segment[i] + (tile[i] << 16);
        opened_chunks += chunk[i];
    }
    opened = block_sum_before(opened, s.warp_sums[1], all);
    opened_chunks = block_sum_before(opened_chunks, s.warp_sums[0], all_chunks);
    auto* segments = reinterpret_cast<Segment*>(p.segments);
    auto* chunks = reinterpret_cast<Segment*>(p.chunks);
#pragma unroll
    for (uint32_t i = 0; i < 2; ++i) {
        const uint32_t row = thread * each + i;
        if (i >= each || row >= num_rows) continue;
        const uint32_t expert = s.expert[row], pair_of_row = s.pair[row];
        const int32_t slot = static_cast<int32_t>(s.slot[row]) - 1;
        reinterpret_cast<uint32_t*>(p.row_pair)[row] = pair_of_row;
        reinterpret_cast<float*>(p.row_weight)[row] = s.weight[row];
        pair_row[pair_of_row] = static_cast<int32_t>(row);
        if (segment[i]) {
            const uint32_t at = opened & 0xffff;
            segments[at].expert = expert;
            segments[at].slot = slot;
            segments[at].first_row = row;
            if (row > 0) segments[at - 1].end_row = row;
        }
        if ((segment[i] || chunk[i]) && row > 0 && s.slot[row - 1] > 0) chunks[opened_chunks - 1].end_row = row;
        if (chunk[i]) {
            chunks[opened_chunks].expert = expert;
            chunks[opened_chunks].slot = slot;
            chunks[opened_chunks].first_row = row;
        }
        opened += segment[i];
        opened_chunks += chunk[i];
        if (tile[i]) {
            reinterpret_cast<RowTile*>(p.tiles)[opened >> 16] = RowTile{expert, row, of_tile[i], (opened & 0xffff) - 1};
            opened += 1u << 16;
        }
        if (row + 1 == num_rows) {
            segments[(opened & 0xffff) - 1].end_row = num_rows;
            if (slot >= 0) chunks[opened_chunks - 1].end_row = num_rows;
        }
    }
    if (thread == 0) {
        *reinterpret_cast<RouteCounts*>(p.counts) = RouteCounts{
            num_rows, all & 0xffff, all >> 16, all_chunks, pairs - s.starts[p.num_experts + 1], bad_slots, {0, 0}};
    }
}
