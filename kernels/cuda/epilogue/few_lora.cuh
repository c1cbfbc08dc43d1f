// LoRA of a layer of few pairs, beside its base product: a warpgroup of every block that multiplies nothing else.
//
// First it shrinks its share of all chunks, S = s A x, in parts of kShrinkDepth of k that are kept apart and added in order by who reads
// them. Then it brings B S of the block's items of gate and up to shared memory, an item or two ahead of those who need it; shrinks its
// share of S = s A h, each as soon as its tile's h is complete; and adds B S of down for the block's features.
#pragma once
#include <cstdint>

#include "mma/number.cuh"
#include "ptx/async.cuh"
#include "ptx/mbarrier.cuh"
#include "schedule/few.cuh"

constexpr uint32_t kSideThreads = 128;
constexpr uint32_t kFinishers = 64;  // threads that finish items, with what these bring
constexpr uint32_t kBarrierSide = 4;
constexpr uint32_t kShrinkDepth = 512;
constexpr uint32_t kShrinkSteps = kShrinkDepth / 128;  // of 32 k, for each of four warps
constexpr uint32_t kSidePitch = 20;
constexpr uint32_t kSideRows = 16;
constexpr uint32_t kSidePartial = 4 * kSideRows * kSidePitch;  // f32 in shared memory, and S of 16 rows afterwards

__device__ __forceinline__ uint32_t stored_rank(const AdapterEntry& entry) { return (entry.rank + 7) / 8 * 8; }
__device__ __forceinline__ uint32_t parts_of(uint32_t width) { return (width + kShrinkDepth - 1) / kShrinkDepth; }

// What is counted when blocks have done something: f32 of who waits are seen afterwards.
struct FewFlags {
    uint32_t* flags;

    __device__ __forceinline__ uint32_t* chunk(uint32_t index) const { return flags + index; }             // parts of gate and up
    __device__ __forceinline__ uint32_t* tile(uint32_t index) const { return flags + kFewPairs + index; }  // features of h
    __device__ __forceinline__ uint32_t* down() const { return flags + 2 * kFewPairs; }                    // parts of down, of all chunks
    static __device__ __forceinline__ void wait(const uint32_t* flag, uint32_t count) {
        Watchdog watchdog;
        while (counter_read(flag) < count) watchdog.turn();
    }
};

// Parts that the shrinking of projections [first, end) of a chunk counts.
__device__ __forceinline__ uint32_t counted(const AdapterEntry* entries, uint32_t first, uint32_t end, uint32_t width) {
    uint32_t groups = 0;
    for (uint32_t i = first; i < end; ++i) groups += (stored_rank(entries[i]) + 15) / 16;
    return groups * parts_of(width);
}

// A of an item of gate and up to L2: 16 rows of 1 KB.
template <class T>
__device__ __forceinline__ void prefetch_a(const DecodeLayerParams& p, const FewLists& s, uint32_t index, uint32_t of_chunk, uint32_t parts,
                                           uint32_t projections) {
    const uint32_t thread = threadIdx.x % kSideThreads, rest = index % of_chunk;
    const AdapterEntry& entry = s.entries[index / of_chunk][rest / parts % projections];
    const uint32_t rank = rest / parts / projections * 16 + thread / 8, k = rest % parts * kShrinkDepth + thread % 8 * 64;
    if (rank < stored_rank(entry) && k < p.hidden_size) {
        prefetch_l2(reinterpret_cast<const T*>(entry.a) + static_cast<size_t>(rank) * p.hidden_size + k);
    }
}

// An item is 16 ranks of a chunk over a part of k. kDown: of h, once that is there. `between`: what a warp does after each.
template <class T, bool kDown, class Between>
__device__ __forceinline__ void shrink_few(const DecodeLayerParams& p, const FewLists& s, FewFlags flags, float* shrunk, float* partial,
                                           Between between) {
    constexpr uint32_t kFirst = kDown ? 2 : 0, kProjections = kDown ? 1 : 2;
    const uint32_t thread = threadIdx.x % kSideThreads, warp = thread / 32, lane = thread % 32, g = lane / 4, t = lane % 4;
    const uint32_t width = kDown ? p.intermediate_size : p.hidden_size, parts = parts_of(width);
    const uint32_t groups = (p.max_rank + 15) / 16, of_chunk = parts * groups * kProjections;
    const T* input = reinterpret_cast<const T*>(kDown ? p.intermediate : p.hidden);
    const uint32_t stride = kProjections * p.max_rank;
#pragma unroll 1
    for (uint32_t index = blockIdx.x; index < s.num_chunks * of_chunk; index += gridDim.x) {
        const uint32_t at = index / of_chunk, rest = index % of_chunk, part = rest % parts;
        const uint32_t projection = rest / parts % kProjections, rank = rest / parts / kProjections * 16;
        const FewChunk chunk = s.chunks[at];
        const AdapterEntry entry = s.entries[at][kFirst + projection];
        const uint32_t ranks = stored_rank(entry), rows = chunk.end_row - chunk.first_row;
        if (!kDown && index + gridDim.x < s.num_chunks * of_chunk) prefetch_a<T>(p, s, index + gridDim.x, of_chunk, parts, kProjections);
        if (rank >= ranks) continue;
        const uint32_t first_k = part * kShrinkDepth + warp * 32 + t * 8;
        const T* a = reinterpret_cast<const T*>(entry.a) + static_cast<size_t>(rank + g) * width;
        uint4 low[kShrinkSteps], high[kShrinkSteps];
#pragma unroll
        for (uint32_t i = 0; i < kShrinkSteps; ++i) {
            const uint32_t k = first_k + i * 128;
            low[i] = k < width ? __ldg(reinterpret_cast<const uint4*>(a + k)) : uint4{0, 0, 0, 0};
            high[i] = k < width && rank + 8 < ranks ? __ldg(reinterpret_cast<const uint4*>(a + 8 * width + k)) : uint4{0, 0, 0, 0};
        }
        if (kDown) FewFlags::wait(flags.tile(chunk.tile), p.intermediate_size / 16);
        float sum[2][4] = {};
#pragma unroll
        for (uint32_t n = 0; n < 2; ++n) {
            if (n * 8 >= rows) break;
            const uint32_t row = chunk.first_row + n * 8 + g, source = kDown ? row : s.token[min(row, kFewPairs - 1)];
            const bool any = n * 8 + g < rows;
            const T* x = input + static_cast<size_t>(any ? source : 0) * width;
#pragma unroll
            for (uint32_t i = 0; i < kShrinkSteps; ++i) {
                const uint32_t k = first_k + i * 128;
                const uint4 right = any && k < width ? __ldcg(reinterpret_cast<const uint4*>(x + k)) : uint4{0, 0, 0, 0};
                mma<T>(sum[n], low[i].x, high[i].x, low[i].y, high[i].y, right.x, right.y);
                mma<T>(sum[n], low[i].z, high[i].z, low[i].w, high[i].w, right.z, right.w);
            }
#pragma unroll
            for (uint32_t i = 0; i < 4; ++i) {
                partial[(warp * kSideRows + n * 8 + 2 * t + i % 2) * kSidePitch + i / 2 * 8 + g] = sum[n][i];
            }
        }
        named_barrier(kBarrierSide, kSideThreads);
        for (uint32_t i = thread; i < rows * 16; i += kSideThreads) {
            const uint32_t row = i / 16, column = i % 16;
            if (rank + column >= ranks) continue;
            float value = 0.0f;
#pragma unroll
            for (uint32_t w = 0; w < 4; ++w) value += partial[(w * kSideRows + row) * kSidePitch + column];
            const size_t to = static_cast<size_t>(part) * p.num_tokens * p.top_k + chunk.first_row + row;
            shrunk[to * stride + projection * p.max_rank + rank + column] = value * entry.scale;
        }
        named_barrier(kBarrierSide, kSideThreads);
        if (thread == 0) counter_add(kDown ? flags.down() : flags.chunk(at), 1);
        between();
    }
}

// S of four neighbouring ranks in two 16-bit numbers each, as right operands of mma.
template <class T>
__device__ __forceinline__ void split_ranks(const float4& s, uint32_t (&high)[2], uint32_t (&low)[2]) {
    const float from[4] = {s.x, s.y, s.z, s.w};
    __align__(8) T first[4], second[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        first[i] = narrow<T>(from[i]);
        second[i] = narrow<T>(from[i] - widen(first[i]));
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        high[i] = reinterpret_cast<const uint32_t*>(first)[i];
        low[i] = reinterpret_cast<const uint32_t*>(second)[i];
    }
}

// Where S of one projection lies: f32 [parts][all rows][stride].
struct Shrunk {
    const float* at;
    uint32_t stride, parts, of_part;
};

// B S of kN chunks side by side (index kNoChunk: none): 16 features by rows first .. first + 8 of each, as mma lays sums out. A warp;
// ranks 16 at a time, four a lane.
template <class T, int kN>
__device__ __forceinline__ void expand_few(float (&sum)[kN][4], const FewLists& s, const Shrunk& shrunk, const uint32_t (&chunks)[kN],
                                           uint32_t projection, uint32_t first, uint32_t feature, uint32_t end) {
    const uint32_t lane = threadIdx.x % 32, g = lane / 4, first_rank = lane % 4 * 4;
    uint32_t most = 0;
    const auto ranks_of = [&](int i) { return chunks[i] == kNoChunk ? 0 : stored_rank(s.entries[chunks[i]][projection]); };
#pragma unroll
    for (int i = 0; i < kN; ++i) most = max(most, ranks_of(i));
#pragma unroll 1
    for (uint32_t rank = first_rank; rank < most + first_rank; rank += 16) {
        uint2 low[kN], high[kN];
        float4 value[kN] = {};
        const float* from[kN];
        bool inside[kN];
#pragma unroll
        for (int i = 0; i < kN; ++i) {
            const uint32_t ranks = ranks_of(i);
            const bool any = rank < ranks;
            const FewChunk chunk = s.chunks[any ? chunks[i] : 0];
            const T* b = reinterpret_cast<const T*>(s.entries[any ? chunks[i] : 0][projection].b) + static_cast<size_t>(feature + g) * ranks + rank;
            low[i] = any && feature + g < end ? __ldg(reinterpret_cast<const uint2*>(b)) : uint2{0, 0};
            high[i] = any && feature + g + 8 < end ? __ldg(reinterpret_cast<const uint2*>(b + 8 * ranks)) : uint2{0, 0};
            const uint32_t row = chunk.first_row + first + g;
            inside[i] = any && row < chunk.end_row;
            from[i] = shrunk.at + (inside[i] ? row * shrunk.stride + rank : 0);
        }
#pragma unroll(kN > 1 ? 1 : 4)
        for (uint32_t part = 0; part < shrunk.parts; ++part) {
#pragma unroll
            for (int i = 0; i < kN; ++i) {
                // Read by all lanes, so that no load waits for another.
                const float4 v = __ldcg(reinterpret_cast<const float4*>(from[i] + part * shrunk.of_part));
                value[i].x += inside[i] ? v.x : 0.0f, value[i].y += inside[i] ? v.y : 0.0f;
                value[i].z += inside[i] ? v.z : 0.0f, value[i].w += inside[i] ? v.w : 0.0f;
            }
        }
#pragma unroll
        for (int i = 0; i < kN; ++i) {
            uint32_t numbers[2], rest[2];
            split_ranks<T>(value[i], numbers, rest);
            mma<T>(sum[i], low[i].x, high[i].x, low[i].y, high[i].y, numbers[0], numbers[1]);
            mma<T>(sum[i], low[i].x, high[i].x, low[i].y, high[i].y, rest[0], rest[1]);
        }
    }
}

// B S of a block's items, gate and up, in shared memory: f32 [2][gate and up][16 features][tile_rows]. Two are there at a time.
struct Deltas {
    float* at;
    uint32_t barriers;  // shared address, for each of the two: it is there, it was read
    uint32_t tile_rows;

    // One thread.
    __device__ __forceinline__ void init() const {
        for (uint32_t i = 0; i < 2; ++i) {
            mbarrier_init(barriers + 16 * i, kSideThreads);
            mbarrier_init(barriers + 16 * i + 8, kFinishers);
        }
    }
    __device__ __forceinline__ float* of(uint32_t turn, uint32_t up) const { return at + (turn % 2 * 2 + up) * 16 * tile_rows; }
    __device__ __forceinline__ uint32_t ready(uint32_t turn) const { return barriers + turn % 2 * 16; }
    __device__ __forceinline__ uint32_t read(uint32_t turn) const { return barriers + turn % 2 * 16 + 8; }
};

// Whether the delta of an item can be made without waiting; of a warp.
__device__ __forceinline__ bool can_expand(const DecodeLayerParams& p, const FewLists& s, FewFlags flags, const Deltas& deltas, uint32_t turn,
                                           const FewTile& tile) {
    const uint32_t at = tile.first_chunk + threadIdx.x % 32;
    bool ready = mbarrier_test(deltas.read(turn), turn / 2 % 2 ^ 1);
    if (ready && at < tile.end_chunk) ready = counter_read(flags.chunk(at)) >= counted(s.entries[at], 0, 2, p.hidden_size);
    return __all_sync(0xffffffffu, ready);
}

// The delta of an item: two warps do gate, two up, each every other chunk.
template <class T>
__device__ __forceinline__ void expand_item(const DecodeLayerParams& p, const FewLists& s, FewFlags flags, const float* shrunk,
                                            const Deltas& deltas, uint32_t turn, const FewTile& tile, uint32_t first_feature) {
    const uint32_t lane = threadIdx.x % 32, g = lane / 4, t = lane % 4, warp = threadIdx.x % kSideThreads / 32, up = warp % 2;
    if (tile.first_chunk + warp / 2 < tile.end_chunk && t == 0) {
        const AdapterEntry& entry = s.entries[tile.first_chunk + warp / 2][up];
        const uint32_t ranks = stored_rank(entry);
        const T* b = reinterpret_cast<const T*>(entry.b) + static_cast<size_t>(first_feature + g) * ranks;
        if (ranks > 0) prefetch_l2(b);
        if (ranks > 0) prefetch_l2(b + 8 * ranks);
    }
    mbarrier_wait(deltas.read(turn), turn / 2 % 2 ^ 1);
    float* to = deltas.of(turn, up);
#pragma unroll 1
    for (uint32_t at = tile.first_chunk + warp / 2; at < tile.end_chunk; at += 2) {
        const FewChunk chunk = s.chunks[at];
        FewFlags::wait(flags.chunk(at), counted(s.entries[at], 0, 2, p.hidden_size));
        const uint32_t stride = 2 * p.max_rank, rows = chunk.end_row - chunk.first_row, chunks[1] = {at};
        const Shrunk of_up{shrunk + up * p.max_rank, stride, parts_of(p.hidden_size), p.num_tokens * p.top_k * stride};
#pragma unroll 1
        for (uint32_t first = 0; first < rows; first += 8) {
            float sum[1][4] = {};
            expand_few<T, 1>(sum, s, of_up, chunks, up, first, first_feature, p.intermediate_size);
#pragma unroll
            for (uint32_t i = 0; i < 4; ++i) {
                const uint32_t row = first + 2 * t + i % 2;
                if (row < rows) to[(g + i / 2 * 8) * p.tile_rows + chunk.first_row - tile.first_row + row] = sum[0][i];
            }
        }
    }
    mbarrier_arrive(deltas.ready(turn));
}

// Brings A of this block's items of down to L2, shortly before.
template <class T>
__device__ __forceinline__ void prefetch_down(const DecodeLayerParams& p, const FewLists& s) {
    const uint32_t thread = threadIdx.x % kSideThreads, parts = parts_of(p.intermediate_size);
    const uint32_t of_chunk = parts * ((p.max_rank + 15) / 16);
    for (uint32_t index = blockIdx.x; index < s.num_chunks * of_chunk; index += gridDim.x) {
        const AdapterEntry& entry = s.entries[index / of_chunk][2];
        const uint32_t rank = index % of_chunk / parts * 16 + thread / 8, k = index % parts * kShrinkDepth + thread % 8 * 64;
        if (rank < stored_rank(entry) && k < p.intermediate_size) {
            prefetch_l2(reinterpret_cast<const T*>(entry.a) + static_cast<size_t>(rank) * p.intermediate_size + k);
        }
    }
}

// Warps that do the same features of down share the chunks, by expert, and have a y each.
__device__ __forceinline__ uint32_t down_shares(uint32_t features) { return features <= 16 ? 4 : features <= 32 ? 2 : 1; }

constexpr uint32_t kPrefetched = 16;  // chunks ahead

// B of this block's features of chunk `at` to L2. One thread.
template <class T>
__device__ __forceinline__ void prefetch_b(const FewLists& s, uint32_t at, uint32_t first_feature, uint32_t features) {
    if (at >= s.num_chunks) return;
    const AdapterEntry& entry = s.entries[at][2];
    const uint32_t ranks = stored_rank(entry);
    if (ranks > 0) bulk_prefetch_l2(reinterpret_cast<const T*>(entry.b) + static_cast<size_t>(first_feature) * ranks, features * ranks * sizeof(T));
}

// y += w B S for this block's features, experts ascending. y: f32 [shares][T][features].
template <class T>
__device__ __forceinline__ void expand_down(const DecodeLayerParams& p, const FewLists& s, const float* shrunk, uint32_t first_feature,
                                            uint32_t features, float* y) {
    constexpr int kTogether = 4;
    const uint32_t lane = threadIdx.x % 32, g = lane / 4, t = lane % 4, warp = threadIdx.x % kSideThreads / 32;
    const uint32_t shares = down_shares(p.down_features), share = warp % shares, feature = warp / shares * 16;
    if (feature >= features) return;
    y += share * p.num_tokens * features + feature;
    const Shrunk of_down{shrunk, p.max_rank, parts_of(p.intermediate_size), p.num_tokens * p.top_k * p.max_rank};
    for (uint32_t next = 0;;) {
        uint32_t chunks[kTogether], most = 0;
#pragma unroll
        for (int i = 0; i < kTogether; ++i) {
            while (next < s.num_chunks && (s.tiles[s.chunks[next].tile].expert & (shares - 1)) != share) ++next;
            chunks[i] = next < s.num_chunks ? next : kNoChunk;
            if (next < s.num_chunks) most = max(most, s.chunks[next].end_row - s.chunks[next].first_row);
            ++next;
        }
        if (most == 0) return;
        if (feature == 0) prefetch_b<T>(s, lane < 2 * kTogether * shares ? next + kPrefetched + lane : kFewPairs, first_feature, features);
        for (uint32_t first = 0; first < most; first += 8) {
            float sum[kTogether][4] = {};
            expand_few<T, kTogether>(sum, s, of_down, chunks, 2, first, first_feature + feature, first_feature + features);
#pragma unroll
            for (int i = 0; i < kTogether; ++i) {
                if (chunks[i] == kNoChunk) continue;
                const uint32_t first_row = s.chunks[chunks[i]].first_row, rows = s.chunks[chunks[i]].end_row - first_row;
                const bool repeats = __any_sync(0xffffffffu, lane > 0 && lane < rows && s.repeats(first_row + lane, first_row));
                for (uint32_t lanes = 0; lanes < (repeats ? 4 : 1); ++lanes) {
#pragma unroll
                    for (uint32_t j = 0; j < 4; ++j) {
                        const uint32_t row = first + 2 * t + j % 2, of_all = first_row + row, at = g + j / 2 * 8;
                        if (row >= rows || feature + at >= features || (repeats && lanes != t)) continue;
                        y[s.token[of_all] * features + at] += (p.weigh_input ? 1.0f : s.weight[of_all]) * sum[i][j];
                    }
                    __syncwarp();
                }
            }
        }
    }
}
