// LoRA of the decode kernel of down, by a warpgroup of every block, beside those that multiply weights.
//
// First S = scale A h: all blocks share out all chunks. Once all have been done, every block adds w B S for its 64 features and its
// tokens (of a cluster every block has some) to a sum of its own, experts ascending, so that nothing depends on other tokens
// or on the base product. A warp has 16 features for itself: no barriers. A step is eight rows of a chunk by 16 ranks; B and S come
// straight to registers, eight steps ahead.
#pragma once
#include <cstdint>

#include "epilogue/expert_sum.cuh"
#include "mma/number.cuh"
#include "params.cuh"
#include "tile/stream.cuh"

constexpr int kShrinkThreads = 128;
constexpr uint32_t kShrinkRows = 16;  // rows and ranks of one product
constexpr uint32_t kShrinkPitch = 20;
constexpr uint32_t kShrinkPartial = 4 * kShrinkRows * kShrinkPitch;  // f32 in shared memory
constexpr uint32_t kStepRows = 8;
constexpr uint32_t kStepsTogether = 4;

__device__ __forceinline__ const AdapterEntry& down_entry(const DecodeDownParams& p, const Segment& chunk) {
    return reinterpret_cast<const AdapterEntry*>(
        p.adapters)[(static_cast<size_t>(chunk.slot) * p.num_experts + chunk.expert) * 3 + 2];
}

// 16 ranks of a chunk over a plane of k; every lane knows another one.
struct ShrinkItem {
    uint32_t first_row = 0, end_row = 0, first_rank = 0, ranks = 0, plane = 0;  // ranks: of these 16
    uint64_t a = 0;
    float scale = 0.0f;

    __device__ __forceinline__ ShrinkItem(const DecodeDownParams& p, uint32_t index, uint32_t total) {
        if (index >= total) return;
        const uint32_t groups = (p.max_rank + 15) / 16;
        const Segment chunk = reinterpret_cast<const Segment*>(p.chunks)[index / (groups * p.planes)];
        const AdapterEntry& entry = down_entry(p, chunk);
        plane = index % p.planes;
        first_rank = index / p.planes % groups * 16;
        ranks = min(max((entry.rank + 7u) / 8 * 8, first_rank) - first_rank, 16u);
        first_row = chunk.first_row;
        end_row = ranks > 0 ? chunk.end_row : first_row;
        a = entry.a + static_cast<uint64_t>(first_rank) * p.intermediate_size * 2;
        scale = entry.scale;
    }
    __device__ __forceinline__ ShrinkItem(const ShrinkItem& items, uint32_t lane)
        : first_row(__shfl_sync(~0u, items.first_row, lane)),
          end_row(__shfl_sync(~0u, items.end_row, lane)),
          first_rank(__shfl_sync(~0u, items.first_rank, lane)),
          ranks(__shfl_sync(~0u, items.ranks, lane)),
          plane(__shfl_sync(~0u, items.plane, lane)),
          a(__shfl_sync(~0u, items.a, lane)),
          scale(__shfl_sync(~0u, items.scale, lane)) {}
};

// 16 ranks by up to 8 kN rows over [first_k, end_k): every warp takes a fourth of k, in steps of 32. Operands go straight to
// registers: 16 bytes of a row are eight k, numbered alike on both sides.
template <class T, int kN>
__device__ __forceinline__ void shrink_block(const uint4* const (&a)[2], const uint4* const (&h)[2], uint32_t first_k, uint32_t end_k,
                                             float* partial) {
    constexpr int kSteps = kN == 1 ? 6 : 4;
    const uint32_t lane = threadIdx.x % 32, g = lane / 4, t = lane % 4, part = threadIdx.x / 32 % 4;
    float sum[kN][4] = {};
#pragma unroll 1
    for (uint32_t base = first_k + part * 32; base < end_k; base += kSteps * 128) {
        uint4 low[kSteps], high[kSteps], right[kSteps][kN];
#pragma unroll
        for (int i = 0; i < kSteps; ++i) {
            const uint32_t k = base + i * 128 + t * 8;
            const bool inside = k < end_k;
            low[i] = inside ? __ldg(a[0] + k / 8) : uint4{0, 0, 0, 0};
            high[i] = inside ? __ldg(a[1] + k / 8) : uint4{0, 0, 0, 0};
#pragma unroll
            for (int n = 0; n < kN; ++n) right[i][n] = inside ? __ldcg(h[n] + k / 8) : uint4{0, 0, 0, 0};
        }
#pragma unroll
        for (int i = 0; i < kSteps; ++i) {
#pragma unroll
            for (int n = 0; n < kN; ++n) {
                mma<T>(sum[n], low[i].x, high[i].x, low[i].y, high[i].y, right[i][n].x, right[i][n].y);
                mma<T>(sum[n], low[i].z, high[i].z, low[i].w, high[i].w, right[i][n].z, right[i][n].w);
            }
        }
    }
    float* mine = partial + part * kShrinkRows * kShrinkPitch;
#pragma unroll
    for (int n = 0; n < kN; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) mine[(n * 8 + 2 * t + i % 2) * kShrinkPitch + i / 2 * 8 + g] = sum[n][i];
    }
}

// A block's share of all chunks; then it counts its items.
template <class T>
__device__ __forceinline__ void shrink_chunks(const DecodeDownParams& p, uint32_t total, float* partial) {
    const uint32_t lane = threadIdx.x % 32, thread = threadIdx.x % kShrinkThreads;
    ShrinkItem items(p, blockIdx.x + lane * gridDim.x, total);
    // A of the first ones comes to L2 while the launch before still runs.
    if (thread < 4 && items.ranks > 0 && items.plane == 0) {
        bulk_prefetch_l2(reinterpret_cast<const void*>(items.a), items.ranks * p.intermediate_size * 2);
    }
    wait_for_previous_launch();
    const uint32_t of_plane = (p.intermediate_size / p.planes + 31) / 32 * 32, width = p.intermediate_size / 8;
    uint32_t done = 0;
#pragma unroll 1
    for (uint32_t index = blockIdx.x; index < total; index += gridDim.x, ++done) {
        if (done > 0 && done % 32 == 0) items = ShrinkItem(p, index + lane * gridDim.x, total);
        const ShrinkItem item(items, done % 32);
        const uint32_t first_k = item.plane * of_plane, end_k = min(p.intermediate_size, first_k + of_plane);
        // Ranks and rows beyond the last one are the last one again, and not stored.
        const uint4* a[2];
        for (uint32_t i = 0; i < 2; ++i) {
            a[i] = reinterpret_cast<const uint4*>(item.a) + static_cast<size_t>(min(lane / 4 + 8 * i, item.ranks - 1)) * width;
        }
#pragma unroll 1
        for (uint32_t first = item.first_row; first < item.end_row; first += kShrinkRows) {
            const uint32_t rows = min(kShrinkRows, item.end_row - first);
            const uint4* h[2];
            for (uint32_t i = 0; i < 2; ++i) {
                h[i] = reinterpret_cast<const uint4*>(p.intermediate) +
                       static_cast<size_t>(first + min(lane / 4 + 8 * i, rows - 1)) * width;
            }
            if (rows <= 8) {
                shrink_block<T, 1>(a, h, first_k, end_k, partial);
            } else {
                shrink_block<T, 2>(a, h, first_k, end_k, partial);
            }
            named_barrier(kBarrierShrink, kShrinkThreads);
            for (uint32_t i = thread; i < rows * 16; i += kShrinkThreads) {
                const uint32_t row = i / 16, column = i % 16;
                if (column >= item.ranks) continue;
                float sum = 0.0f;
#pragma unroll
                for (uint32_t part = 0; part < 4; ++part) sum += partial[(part * kShrinkRows + row) * kShrinkPitch + column];
                const size_t to = static_cast<size_t>(item.plane) * p.num_tokens * p.top_k + first + row;
                reinterpret_cast<float*>(p.shrunk)[to * p.max_rank + item.first_rank + column] = sum * item.scale;
            }
            named_barrier(kBarrierShrink, kShrinkThreads);
        }
    }
    if (thread == 0 && done > 0) counter_add(&reinterpret_cast<RouteCounts*>(p.counts)->claimed[1], done);
}

// What a block adds B S to: tokens [first_token, end_token) of `sum`, features from `first_feature` on.
struct LoraShare {
    ExpertSum sum;
    uint32_t first_token, end_token, first_feature, num_chunks;
};

// Chunks from one on, one a lane. Fewer where ranks are high: their B comes to L2 at once.
struct ChunkList {
    Segment chunk;
    uint32_t ranks;
    uint64_t b;

    static __device__ __forceinline__ uint32_t size(const DecodeDownParams& p) { return p.max_rank <= 16 ? 32 : p.max_rank <= 64 ? 8 : 1; }
    __device__ __forceinline__ void load(const DecodeDownParams& p, uint32_t first, uint32_t num_chunks) {
        const uint32_t lane = threadIdx.x % 32;
        chunk = Segment{0, -1, 0, 0};
        if (lane < size(p) && first + lane < num_chunks) chunk = reinterpret_cast<const Segment*>(p.chunks)[first + lane];
    }
    __device__ __forceinline__ void load_entries(const DecodeDownParams& p) {
        ranks = 0;
        b = 0;
        if (chunk.slot < 0) return;
        const AdapterEntry& entry = down_entry(p, chunk);
        ranks = entry.rank;
        b = entry.b;
    }
    // Those rows whose tokens are this block's, and B of its features.
    __device__ __forceinline__ void narrow(const DecodeDownParams& p, const LoraShare& share) {
        ranks = (ranks + 7) / 8 * 8;
        if (ranks == 0) chunk.end_row = chunk.first_row;
        chunk.first_row = first_row_from(share, share.first_token);
        chunk.end_row = first_row_from(share, share.end_token);
        b += static_cast<uint64_t>(share.first_feature) * ranks * 2;
        if (chunk.first_row < chunk.end_row && threadIdx.x / 32 % 4 == 0) {
            bulk_prefetch_l2(reinterpret_cast<const void*>(b), min(kStreamRows, p.hidden_size - share.first_feature) * ranks * 2);
        }
    }
    // Rows of a chunk ascend by token.
    __device__ __forceinline__ uint32_t first_row_from(const LoraShare& share, uint32_t token) const {
        uint32_t row = chunk.first_row, end = chunk.end_row;
        while (row < end) {
            const uint32_t middle = (row + end) / 2;
            if (share.sum.tokens[middle] < token) {
                row = middle + 1;
            } else {
                end = middle;
            }
        }
        return row;
    }
};

// Goes through the steps of a block: ranks of eight rows, planes of S, the next rows, the next chunk. It is at one if row < end.
struct Steps {
    // Of three lists, what is loaded: all of this one, entries of the next one, chunks of the one after. So nobody waits for them.
    ChunkList now, next, after;
    uint32_t first_after = 0, left = 0;  // chunk of `after`, and lanes of `now` that are to come
    uint32_t row = 0, end = 0, rank = 0, ranks = 0, plane = 0;
    uint64_t b = 0;

    __device__ __forceinline__ Steps(const DecodeDownParams& p, const LoraShare& share) {
        next.load(p, 0, share.num_chunks);
        next.load_entries(p);
        after.load(p, ChunkList::size(p), share.num_chunks);
        now = next;
        now.narrow(p, share);  // for what it brings to L2
        first_after = ChunkList::size(p);
    }

    // To the next list, if this one is done.
    __device__ __forceinline__ void refill(const DecodeDownParams& p, const LoraShare& share) {
        while (row == end && first_after < share.num_chunks + ChunkList::size(p)) {
            now = next;
            next = after;
            next.load_entries(p);
            first_after += ChunkList::size(p);
            after.load(p, first_after, share.num_chunks);
            now.narrow(p, share);
            left = __ballot_sync(~0u, now.chunk.first_row < now.chunk.end_row);
            next_chunk();
        }
    }
    // To the next step of this list.
    __device__ __forceinline__ void advance(const DecodeDownParams& p) {
        rank += 16;
        if (rank < ranks) return;
        rank = 0;
        if (++plane < p.planes) return;
        plane = 0;
        row += kStepRows;
        if (row >= end) next_chunk();
    }
    __device__ __forceinline__ void next_chunk() {
        const int from = max(__ffs(left), 1) - 1;
        row = __shfl_sync(~0u, now.chunk.first_row, from);
        end = __shfl_sync(~0u, now.chunk.end_row, from);
        ranks = __shfl_sync(~0u, now.ranks, from);
        b = __shfl_sync(~0u, now.b, from);
        if (left == 0) end = row, ranks = 0;
        left &= left - 1;
    }
};

// Steps side by side: B, S, and where they go.
template <class T>
struct StepGroup {
    uint2 b[kStepsTogether][2] = {};  // 16 features of a warp: lane / 4 and + 8; four neighbouring ranks are a lane's k
    float4 s[kStepsTogether] = {};
    // First row, rank / 16 << 16, plane << 21, rows << 24 (0: no step), whether `value` is whole after it, whether the lane has a row
    // and ranks.
    uint32_t what[kStepsTogether] = {};
    static constexpr uint32_t kLast = 1u << 28, kInside = 1u << 29;

    __device__ __forceinline__ bool any() const { return rows(0) > 0; }
    __device__ __forceinline__ uint32_t row(uint32_t step) const { return what[step] & 0xffff; }
    __device__ __forceinline__ uint32_t rows(uint32_t step) const { return what[step] >> 24 & 15; }

    __device__ __forceinline__ void load_b(const DecodeDownParams& p, const LoraShare& share, Steps& steps) {
        const uint32_t lane = threadIdx.x % 32, g = lane / 4, t = lane % 4, feature = threadIdx.x / 32 % 4 * 16;
        const uint32_t features = p.hidden_size - share.first_feature;
        steps.refill(p, share);
#pragma unroll
        for (uint32_t i = 0; i < kStepsTogether; ++i) {
            const uint32_t own = min(kStepRows, steps.end - steps.row);
            const bool inside = own > 0 && steps.rank + 4 * t < steps.ranks;
            const bool last = steps.rank + 16 >= steps.ranks && steps.plane + 1 == p.planes;
            what[i] = steps.row | steps.rank << 12 | steps.plane << 21 | own << 24 | (last ? kLast : 0) | (inside && g < own ? kInside : 0);
            const T* from = reinterpret_cast<const T*>(steps.b) + (feature + g) * steps.ranks + steps.rank + 4 * t;
            b[i][0] = inside && feature < features ? __ldg(reinterpret_cast<const uint2*>(from)) : uint2{0, 0};
            b[i][1] = inside && feature + 8 < features ? __ldg(reinterpret_cast<const uint2*>(from + 8 * steps.ranks)) : uint2{0, 0};
            steps.advance(p);
        }
    }
    __device__ __forceinline__ void load_s(const DecodeDownParams& p) {
        const uint32_t g = threadIdx.x % 32 / 4, t = threadIdx.x % 4, of_plane = p.num_tokens * p.top_k;
#pragma unroll
        for (uint32_t i = 0; i < kStepsTogether; ++i) {
            const uint32_t of_row = row(i) + g + (what[i] >> 21 & 1) * of_plane;
            const float4* from = reinterpret_cast<const float4*>(p.shrunk) + of_row * (p.max_rank / 4) + (what[i] >> 16 & 31) * 4 + t;
            s[i] = what[i] & kInside ? __ldcg(from) : float4{0.0f, 0.0f, 0.0f, 0.0f};
        }
    }
    // Products side by side, S as two 16-bit numbers; then sums one after the other: rows may share tokens. `value`: of the ranks before.
    __device__ __forceinline__ void add(const ExpertSum& sum, float (&value)[4]) const {
        const uint32_t feature = threadIdx.x / 32 % 4 * 16 + threadIdx.x % 32 / 4;
        const float no_bias[2] = {0.0f, 0.0f};
        float product[kStepsTogether][4] = {};
#pragma unroll
        for (uint32_t i = 0; i < kStepsTogether; ++i) {
            const uint32_t low = narrow_pair<T>(s[i].x, s[i].y), high = narrow_pair<T>(s[i].z, s[i].w);
            const float2 of_low = widen_pair<T>(low), of_high = widen_pair<T>(high);
            mma<T>(product[i], b[i][0].x, b[i][1].x, b[i][0].y, b[i][1].y, low, high);
            mma<T>(product[i], b[i][0].x, b[i][1].x, b[i][0].y, b[i][1].y, narrow_pair<T>(s[i].x - of_low.x, s[i].y - of_low.y),
                   narrow_pair<T>(s[i].z - of_high.x, s[i].w - of_high.y));
        }
#pragma unroll
        for (uint32_t i = 0; i < kStepsTogether; ++i) {
#pragma unroll
            for (int j = 0; j < 4; ++j) value[j] += product[i][j];
            if (what[i] & kLast) {
                sum.add(value, row(i), 0, rows(i), feature, no_bias, sum.repeats(row(i), rows(i)));
                __syncwarp();
#pragma unroll
                for (int j = 0; j < 4; ++j) value[j] = 0.0f;
            }
        }
    }
};

// `shrinks`: what must have been counted before S is read.
template <class T>
__device__ __forceinline__ void add_lora(const DecodeDownParams& p, const LoraShare& share, Steps& steps, uint32_t shrinks) {
    StepGroup<T> one, two;
    float value[4] = {};
    bool ready = false;
    do {
        one.add(share.sum, value);
        one.load_b(p, share, steps);
        if (!ready) {
            if (!one.any()) return;
            if (threadIdx.x % kShrinkThreads == 0) {
                Watchdog watchdog;
                while (counter_read(&reinterpret_cast<const RouteCounts*>(p.counts)->claimed[1]) < shrinks) watchdog.turn();
            }
            named_barrier(kBarrierShrink, kShrinkThreads);
            ready = true;
        }
        one.load_s(p);
        two.add(share.sum, value);
        two.load_b(p, share, steps);
        two.load_s(p);
    } while (one.any());
}
