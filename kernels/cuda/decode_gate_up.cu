// moe_lora_decode_gate_up_{bf16,f16}: S = s A x, then h = act(W_gate x + B_g S_g + b_g, W_up x + B_u S_u + b_u), in one launch that
// reads every weight once, for tiles of few rows.
//
// hidden [T, H] gathered by row_pair / top_k; gate, up by a tensor map of [E, I, H] -> shrunk as moe_lora_shrink writes it,
// intermediate [rows, I].
//
// Blocks are persistent and take items in turn (tile/stream.cuh): first LoRA chunks (up to 64 of the ranks of gate and up
// together), then 32 features of a row tile, whose weights are 8 gate rows, 8 up rows, 8 gate rows and so on, so that gate and up of
// a feature meet in one lane. All shrunk ranks are counted; a block that needs them waits until all have been. Items are taken in
// order, so those waited for are being worked on: the grid must not exceed what runs at the same time.
// Cost: weights and adapters read once; tokens I / 32 times from L2.
// Limits: H, I multiples of 8; ranks up to 512; at most one block an SM.
#include "epilogue/activation.cuh"
#include "params.cuh"
#include "tile/stream.cuh"

namespace {

constexpr uint32_t kFeatures = kStreamRows / 2;
constexpr uint32_t kRankPasses = (kStreamRows + kTokenPass - 1) / kTokenPass;

struct Item {
    bool shrink;
    uint32_t expert, first_row, num_rows;
    uint32_t first;  // of an item's ranks or features
    uint32_t steps;  // stages; 0: nothing to do
    uint32_t first_segment;
    uint32_t ranks[2];  // of a chunk, multiples of 8
    AdapterEntry entry[2];
};

// What a block does: its chunks, then its tiles. Chunks are dealt to the blocks after the tiles, to those that have one tile less,
// and are done first.
struct Items {
    uint32_t shrinks, own_shrinks, first_shrink, own, rank_blocks, feature_blocks, steps;

    __device__ Items(const DecodeGateUpParams& p, const RouteCounts& counts) {
        rank_blocks = p.gate_up.adapters == 0 ? 0 : (2 * p.gate_up.max_rank + kStreamRows - 1) / kStreamRows;
        feature_blocks = (p.gate_up.intermediate_size + kFeatures - 1) / kFeatures;
        shrinks = counts.num_chunks * rank_blocks;
        const uint32_t tiles = counts.num_tiles * feature_blocks;
        first_shrink = (blockIdx.x + gridDim.x - tiles % gridDim.x) % gridDim.x;
        own_shrinks = dealt(shrinks, first_shrink);
        own = own_shrinks + dealt(tiles, blockIdx.x);
        steps = (p.gate_up.hidden_size + p.stage_tiles * kTileDepth - 1) / (p.stage_tiles * kTileDepth);
    }
    static __device__ __forceinline__ uint32_t dealt(uint32_t count, uint32_t first) {
        return count > first ? (count - first - 1) / gridDim.x + 1 : 0;
    }
    __device__ __forceinline__ Item at(const DecodeGateUpParams& p, uint32_t turn) const {
        Item item{};
        item.shrink = turn < own_shrinks;
        const uint32_t index = item.shrink ? first_shrink + turn * gridDim.x : blockIdx.x + (turn - own_shrinks) * gridDim.x;
        if (item.shrink) {
            const Segment chunk = reinterpret_cast<const Segment*>(p.chunks)[index / rank_blocks];
            const auto* table = reinterpret_cast<const AdapterEntry*>(p.gate_up.adapters) +
                                (static_cast<size_t>(chunk.slot) * p.gate_up.num_experts + chunk.expert) * 3;
            item.entry[0] = table[0];
            item.entry[1] = table[1];
            item.ranks[0] = (item.entry[0].rank + 7) / 8 * 8;
            item.ranks[1] = (item.entry[1].rank + 7) / 8 * 8;
            item.first = index % rank_blocks * kStreamRows;
            item.expert = chunk.expert;
            item.first_row = chunk.first_row;
            item.num_rows = chunk.end_row - chunk.first_row;
            item.steps = item.first < item.ranks[0] + item.ranks[1] ? steps : 0;
        } else {
            const RowTile tile = reinterpret_cast<const RowTile*>(p.gate_up.tiles)[index / feature_blocks];
            item.first = index % feature_blocks * kFeatures;
            item.expert = tile.expert;
            item.first_row = tile.first_row;
            item.num_rows = tile.num_rows;
            item.first_segment = tile.first_segment;
            item.steps = steps;
        }
        return item;
    }
};

// One thread.
__device__ __forceinline__ void bring_weights(const DecodeGateUpParams& p, const Items& items, Stream stream) {
#pragma unroll 1
    for (uint32_t turn = 0; turn < items.own; ++turn) {
        const Item item = items.at(p, turn);
#pragma unroll 1
        for (uint32_t step = 0; step < item.steps; ++step) {
            stream.wait_empty();
            const uint32_t full = stream.full + 8 * stream.stage;
            if (item.shrink) {
                mbarrier_arrive(full);  // the token threads bring these weights
            } else {
                mbarrier_expect(full, p.stage_tiles * kStreamWeightBytes);
                for (uint32_t piece = 0; piece < p.stage_tiles; ++piece) {
                    tma_load_5d(stream.weights() + piece * kStreamWeightBytes, &p.weights, full,
                                (step * p.stage_tiles + piece) * kTileDepth, 0, 0, item.first / 8, item.expert);
                }
            }
            stream.next();
        }
    }
}

// Ranks of a chunk: rows of A of gate, then of up.
template <class T>
__device__ __forceinline__ void copy_ranks(const DecodeGateUpParams& p, const Stream& stream, const T* const (&rows)[kRankPasses],
                                           uint32_t step) {
    const uint32_t thread = threadIdx.x - kStreamConsumers, first = thread / 8, chunk = thread % 8;
    for (uint32_t piece = 0; piece < p.stage_tiles; ++piece) {
        const uint32_t k = (step * p.stage_tiles + piece) * kTileDepth + chunk * 8;
        const bool inside = k < p.gate_up.hidden_size;
#pragma unroll
        for (uint32_t i = 0; i < kRankPasses; ++i) {
            if (rows[i] == nullptr) continue;
            cp_async_stream(stream.weights() + piece * kStreamWeightBytes + swizzled(first + kTokenPass * i, chunk),
                            rows[i] + (inside ? k : 0), inside);
        }
    }
}

template <class T>
__device__ __forceinline__ void bring_tokens(const DecodeGateUpParams& p, const Items& items, Stream stream) {
    const T* hidden = reinterpret_cast<const T*>(p.gate_up.hidden);
    const auto* row_pair = reinterpret_cast<const uint32_t*>(p.gate_up.row_pair);
    const uint32_t first = (threadIdx.x - kStreamConsumers) / 8;
#pragma unroll 1
    for (uint32_t turn = 0; turn < items.own; ++turn) {
        const Item item = items.at(p, turn);
        const TokenRows rows(item.num_rows, [&](uint32_t row) {
            return row_pair[item.first_row + row] / p.gate_up.top_k * (p.gate_up.hidden_size / 8);
        });
        const T* ranks[kRankPasses];
#pragma unroll
        for (uint32_t i = 0; i < kRankPasses; ++i) {
            const uint32_t rank = item.first + first + kTokenPass * i;
            const bool up = rank >= item.ranks[0];
            const T* a = reinterpret_cast<const T*>(up ? item.entry[1].a : item.entry[0].a);
            const bool any = item.shrink && first + kTokenPass * i < kStreamRows && rank < item.ranks[0] + item.ranks[1];
            ranks[i] = any ? a + static_cast<size_t>(up ? rank - item.ranks[0] : rank) * p.gate_up.hidden_size : nullptr;
        }
#pragma unroll 1
        for (uint32_t step = 0; step < item.steps; ++step) {
            stream.wait_empty();
            if (item.shrink) copy_ranks<T>(p, stream, ranks, step);
            rows.copy(stream, hidden, step, p.gate_up.hidden_size);
            cp_async_arrive(stream.full + 8 * stream.stage);
            stream.next();
        }
    }
}

// Stores a chunk's ranks in the two-number form of params.cuh.
template <class T, int kColumns>
__device__ __forceinline__ void store_ranks(const DecodeGateUpParams& p, const Item& item, const float (&sum)[kColumns / 8][4]) {
    const uint32_t lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4;
#pragma unroll
    for (uint32_t half = 0; half < 2; ++half) {
        const uint32_t of_chunk = item.first + warp * 16 + half * 8 + lane / 4;
        if (of_chunk >= item.ranks[0] + item.ranks[1]) continue;
        const bool up = of_chunk >= item.ranks[0];
        const uint32_t rank = up ? of_chunk - item.ranks[0] : of_chunk;
        const float scale = up ? item.entry[1].scale : item.entry[0].scale;
#pragma unroll
        for (int j = 0; j < kColumns / 8; ++j) {
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                const uint32_t row = 8 * j + lane % 4 * 2 + i;
                if (row >= item.num_rows) continue;
                const float value = sum[j][half * 2 + i] * scale;
                const size_t at = static_cast<size_t>(item.first_row + row) * p.gate_up.shrunk_stride +
                                  (up ? p.gate_up.max_rank : 0) + rank / 4 * 4;
                T* to = reinterpret_cast<T*>(p.gate_up.shrunk) + at * 2 + rank % 4;
                const T high = narrow<T>(value);
                to[0] = high;
                to[4] = narrow<T>(value - widen(high));
            }
        }
    }
}

// Lane i knows segment `first` + i of a tile: rows of the tile, B of gate and up, and their ranks.
struct TileSegments {
    uint32_t first_row, end_row;  // end 0: none, or no adapter
    uint64_t b[2];
    uint32_t ranks[2];
    bool more;  // there may be segments after these

    __device__ __forceinline__ TileSegments(const GateUpParams& p, const Item& item, uint32_t num_segments, uint32_t first) {
        const uint32_t index = first + threadIdx.x % 32, end = item.first_row + item.num_rows;
        Segment segment{0, -1, ~0u, ~0u};
        if (p.adapters != 0 && index < num_segments) segment = reinterpret_cast<const Segment*>(p.segments)[index];
        const bool inside = segment.first_row < end;
        more = __all_sync(0xffffffffu, inside);
        first_row = end_row = 0;
        b[0] = b[1] = 0;
        ranks[0] = ranks[1] = 0;
        if (inside && segment.slot >= 0) {
            const auto* table = reinterpret_cast<const AdapterEntry*>(p.adapters) +
                                (static_cast<size_t>(segment.slot) * p.num_experts + segment.expert) * 3;
            first_row = max(segment.first_row, item.first_row) - item.first_row;
            end_row = min(segment.end_row, end) - item.first_row;
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                b[i] = table[i].b;
                ranks[i] = (table[i].rank + 7) / 8 * 8;
            }
        }
    }
    template <class T>
    __device__ __forceinline__ void prefetch(const GateUpParams& p, const Item& item) const {
        const uint32_t rows = min(kFeatures, p.intermediate_size - item.first);
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            if (ranks[i] > 0) bulk_prefetch_l2(reinterpret_cast<const T*>(b[i]) + item.first * ranks[i], rows * ranks[i] * 2);
        }
    }
};

template <class T>
__device__ __forceinline__ uint2 four_ranks(uint64_t b, uint32_t feature, uint32_t ranks, uint32_t rank, bool any) {
    if (!any || rank >= ranks) return uint2{0, 0};
    return __ldg(reinterpret_cast<const uint2*>(reinterpret_cast<const T*>(b) + static_cast<size_t>(feature) * ranks + rank));
}

// sum += B S: 16 ranks of gate, then of up, at a time; either has half of the rows. A lane's k are four neighbouring ranks.
template <class T, int kColumns>
__device__ __forceinline__ void add_lora(const GateUpParams& p, const Item& item, const TileSegments& segments, uint32_t feature,
                                         float (&sum)[kColumns / 8][4]) {
    const uint32_t lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    const auto* shrunk = reinterpret_cast<const uint4*>(p.shrunk) + static_cast<size_t>(item.first_row) * (p.shrunk_stride / 4);
    uint32_t left = __ballot_sync(0xffffffffu, segments.end_row > 0);
    while (left != 0) {
        const int from = __ffs(left) - 1;
        left &= left - 1;
        const uint32_t first = __shfl_sync(0xffffffffu, segments.first_row, from);
        const uint32_t end = __shfl_sync(0xffffffffu, segments.end_row, from);
        const uint64_t gate = __shfl_sync(0xffffffffu, segments.b[0], from), up = __shfl_sync(0xffffffffu, segments.b[1], from);
        const uint32_t gate_ranks = __shfl_sync(0xffffffffu, segments.ranks[0], from);
        const uint32_t up_ranks = __shfl_sync(0xffffffffu, segments.ranks[1], from);
#pragma unroll 1
        for (uint32_t rank = 4 * t; rank < max(gate_ranks, up_ranks) + 4 * t; rank += 16) {
            const uint2 gate_b = four_ranks<T>(gate, feature, gate_ranks, rank, feature < p.intermediate_size);
            const uint2 up_b = four_ranks<T>(up, feature, up_ranks, rank, feature < p.intermediate_size);
#pragma unroll
            for (int j = 0; j < kColumns / 8; ++j) {
                if (8 * j >= end || 8 * j + 8 <= first) continue;
                const uint32_t row = 8 * j + g;
                const bool inside = row >= first && row < end;
                const uint4* s = shrunk + static_cast<size_t>(row) * (p.shrunk_stride / 4) + rank / 4;
                const uint4 gate_s = inside && rank < gate_ranks ? __ldcg(s) : uint4{0, 0, 0, 0};
                const uint4 up_s = inside && rank < up_ranks ? __ldcg(s + p.max_rank / 4) : uint4{0, 0, 0, 0};
                mma<T>(sum[j], gate_b.x, 0, gate_b.y, 0, gate_s.x, gate_s.y);
                mma<T>(sum[j], gate_b.x, 0, gate_b.y, 0, gate_s.z, gate_s.w);
                mma<T>(sum[j], 0, up_b.x, 0, up_b.y, up_s.x, up_s.y);
                mma<T>(sum[j], 0, up_b.x, 0, up_b.y, up_s.z, up_s.w);
            }
        }
    }
}

// Routing weight, bias, activation, rounding.
template <class T, int kColumns>
__device__ __forceinline__ void store_features(const GateUpParams& p, const Item& item, uint32_t feature,
                                               const float (&sum)[kColumns / 8][4]) {
    if (feature >= p.intermediate_size) return;
    const auto* weight = reinterpret_cast<const float*>(p.row_weight) + item.first_row;
    const size_t bias_at = static_cast<size_t>(item.expert) * p.intermediate_size + feature;
    const float gate_bias = p.gate_bias != 0 ? reinterpret_cast<const float*>(p.gate_bias)[bias_at] : 0.0f;
    const float up_bias = p.gate_bias != 0 ? reinterpret_cast<const float*>(p.up_bias)[bias_at] : 0.0f;
    T* to = reinterpret_cast<T*>(p.intermediate) + static_cast<size_t>(item.first_row) * p.intermediate_size + feature;
#pragma unroll
    for (int j = 0; j < kColumns / 8; ++j) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const uint32_t row = 8 * j + threadIdx.x % 4 * 2 + i;
            if (row >= item.num_rows) continue;
            const float factor = p.weigh_input ? weight[row] : 1.0f;
            const float gate = sum[j][i] * factor + gate_bias, up = sum[j][2 + i] * factor + up_bias;
            to[static_cast<size_t>(row) * p.intermediate_size] = narrow<T>(activate(p.activation, p.alpha, p.limit, gate, up));
        }
    }
}

__device__ __forceinline__ void wait_for_ranks(const RouteCounts* counts, uint32_t shrinks) {
    if (threadIdx.x % 32 == 0) {
        Watchdog watchdog;
        while (counter_read(&counts->claimed[0]) < shrinks) watchdog.turn();
    }
    __syncwarp();
}

template <class T>
__device__ __forceinline__ void consume(const DecodeGateUpParams& p, const Items& items, uint32_t num_segments, Stream stream) {
    const uint32_t group = threadIdx.x / 128, lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4;
    auto* counts = reinterpret_cast<RouteCounts*>(p.gate_up.counts);
#pragma unroll 1
    for (uint32_t turn = group; turn < items.own; turn += 2) {
        const Item item = items.at(p, turn);
        const TileSegments segments(p.gate_up, item, item.shrink ? 0 : num_segments, item.first_segment);
        if (warp == 0) segments.template prefetch<T>(p.gate_up, item);
        const bool hand_over = turn + 1 < items.own;
        stream.take_turn(turn == 0);
        for_columns(item.num_rows, [&](auto columns) {
            constexpr int kColumns = decltype(columns)::value;
            float sum[kColumns / 8][4] = {};
            stream_product<T, kColumns>(sum, stream, item.steps, hand_over);
            if (item.shrink) {
                if (item.steps > 0) store_ranks<T, kColumns>(p, item, sum);
                return;
            }
            const uint32_t feature = item.first + warp * 8 + lane / 4;
            if (__any_sync(0xffffffffu, segments.end_row > 0)) {
                wait_for_ranks(counts, items.shrinks);
                add_lora<T, kColumns>(p.gate_up, item, segments, feature, sum);
            }
            if constexpr (kColumns > 32) {
                for (uint32_t first = item.first_segment + 32, more = segments.more; more; first += 32) {
                    const TileSegments others(p.gate_up, item, num_segments, first);
                    wait_for_ranks(counts, items.shrinks);
                    add_lora<T, kColumns>(p.gate_up, item, others, feature, sum);
                    more = others.more;
                }
            }
            store_features<T, kColumns>(p.gate_up, item, feature, sum);
        });
        if (item.shrink) {
            named_barrier(kBarrierGroup + group, 128);
            if (threadIdx.x % 128 == 0) counter_add(&counts->claimed[0], 1);
        }
    }
}

template <class T>
__device__ __forceinline__ void decode_gate_up_kernel(const DecodeGateUpParams& p) {
    extern __shared__ char decode_gate_up_shared[];
    const uint32_t base = (shared_address(decode_gate_up_shared) + 1023) & ~1023u;
    const uint32_t slot = p.stage_tiles * (kStreamWeightBytes + p.tile_rows * kTileRowBytes);
    const Stream stream(base, base + p.stages * slot, p.stages, p.stage_tiles, p.tile_rows);
    if (threadIdx.x == 0) {
        tma_prefetch(&p.weights);
        stream.init();
    }
    __syncthreads();
    wait_for_previous_launch();
    const RouteCounts counts = *reinterpret_cast<const RouteCounts*>(p.gate_up.counts);
    const Items items(p, counts);
    if (threadIdx.x < kStreamConsumers) {
        consume<T>(p, items, counts.num_segments, stream);
    } else if (threadIdx.x < kStreamConsumers + kStreamTokenThreads) {
        bring_tokens<T>(p, items, stream);
    } else if (threadIdx.x % 32 == 0) {
        bring_weights(p, items, stream);
    }
}

}  // namespace

extern "C" __global__ void __launch_bounds__(kStreamThreads, 1)
    moe_lora_decode_gate_up_bf16(const __grid_constant__ DecodeGateUpParams p) {
    decode_gate_up_kernel<bf16>(p);
}

extern "C" __global__ void __launch_bounds__(kStreamThreads, 1)
    moe_lora_decode_gate_up_f16(const __grid_constant__ DecodeGateUpParams p) {
    decode_gate_up_kernel<f16>(p);
}
