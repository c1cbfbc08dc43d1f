// LoRA of the decode kernel of down, beside the base product. A warpgroup of every block shrinks its share of all chunks; once all
// blocks have, it brings B and S of the chunks that its block adds through a ring of its own to the warpgroups that multiply.
//
// A block of a cluster adds every p.cluster-th chunk, in groups that follow the last tiles (struct Turns). A stage holds as many
// chunks as fit: a header of 16 records of 16 bytes (how many and whether the group ends, then one for each: first row | rows,
// ranks | scale | places in units of 16 bytes), B of 64 features [64][ranks], S f32 [planes][rows][ranks].
#pragma once
#include <cstdint>

#include "epilogue/expert_sum.cuh"
#include "mma/number.cuh"
#include "params.cuh"
#include "tile/stream.cuh"

constexpr int kShrinkThreads = 128;
constexpr uint32_t kShrinkRows = 16;                      // rows and ranks of one product
constexpr uint32_t kShrinkPitch = 20;
constexpr uint32_t kShrinkPartial = 4 * kShrinkRows * kShrinkPitch;  // f32 in shared memory
constexpr uint32_t kUnitsOfStage = 15;
constexpr uint32_t kStageHeader = 16;  // in units of 16 bytes
constexpr uint32_t kBytesBeforeLora = 512 * 1024;  // of weights that a block multiplies while chunks are shrunk

__device__ __forceinline__ const AdapterEntry& down_entry(const DecodeDownParams& p, const Segment& chunk) {
    return reinterpret_cast<const AdapterEntry*>(
        p.adapters)[(static_cast<size_t>(chunk.slot) * p.num_experts + chunk.expert) * 3 + 2];
}

__device__ __forceinline__ uint4 load_row16(const void* row, uint32_t at, uint32_t end) {
    return row != nullptr && at < end ? __ldg(reinterpret_cast<const uint4*>(row) + at / 8) : uint4{0, 0, 0, 0};
}

// 16 ranks by up to 8 kN rows over [first_k, end_k): every warp takes a fourth of k, in steps of 32; the fourths are added in order.
// Operands go straight to registers: 16 bytes of a row are eight k, numbered alike on both sides.
template <class T, int kN>
__device__ __forceinline__ void shrink_block(const DecodeDownParams& p, const T* const (&a)[2], const T* const (&h)[2],
                                             uint32_t first_k, uint32_t end_k, float* partial) {
    const uint32_t lane = threadIdx.x % 32, g = lane / 4, t = lane % 4, part = threadIdx.x / 32 % 4;
    float sum[kN][4] = {};
#pragma unroll 4
    for (uint32_t base = first_k + part * 32; base < end_k; base += 128) {
        const uint32_t k = base + t * 8;
        const uint4 low = load_row16(a[0], k, end_k), high = load_row16(a[1], k, end_k);
#pragma unroll
        for (int n = 0; n < kN; ++n) {
            const uint4 right = load_row16(h[n], k, end_k);
            mma<T>(sum[n], low.x, high.x, low.y, high.y, right.x, right.y);
            mma<T>(sum[n], low.z, high.z, low.w, high.w, right.z, right.w);
        }
    }
    float* mine = partial + part * kShrinkRows * kShrinkPitch;
#pragma unroll
    for (int n = 0; n < kN; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) mine[(n * 8 + 2 * t + i % 2) * kShrinkPitch + i / 2 * 8 + g] = sum[n][i];
    }
}

// Its share of all chunks, then one count.
template <class T>
__device__ __forceinline__ void shrink_chunks(const DecodeDownParams& p, uint32_t num_chunks, float* partial) {
    const uint32_t lane = threadIdx.x % 32, thread = threadIdx.x % kShrinkThreads;
    const uint32_t groups = (p.max_rank + 15) / 16, total = num_chunks * groups * p.planes;
    const auto* chunks = reinterpret_cast<const Segment*>(p.chunks);
    // A of the first items comes to L2 while the launch before still runs.
    const uint32_t early = blockIdx.x + thread * gridDim.x;
    if (thread < 4 && early < total && early % p.planes == 0) {
        const AdapterEntry& entry = down_entry(p, chunks[early / (groups * p.planes)]);
        const uint32_t rank = early / p.planes % groups * 16, ranks = (entry.rank + 7) / 8 * 8;
        if (rank < ranks) {
            bulk_prefetch_l2(reinterpret_cast<const T*>(entry.a) + static_cast<size_t>(rank) * p.intermediate_size,
                             min(ranks - rank, 16u) * p.intermediate_size * 2);
        }
    }
    wait_for_previous_launch();
    if (total == 0) return;
    const uint32_t of_plane = (p.intermediate_size / p.planes + 31) / 32 * 32;
    for (uint32_t index = blockIdx.x; index < total; index += gridDim.x) {
        const Segment chunk = chunks[index / (groups * p.planes)];
        const uint32_t plane = index % p.planes, rank = index / p.planes % groups * 16;
        const AdapterEntry& entry = down_entry(p, chunk);
        const uint32_t ranks = (entry.rank + 7) / 8 * 8;
        if (rank >= ranks) continue;
        const T* a[2];
        for (uint32_t i = 0; i < 2; ++i) {
            const uint32_t row = rank + lane / 4 + 8 * i;
            a[i] = row < ranks ? reinterpret_cast<const T*>(entry.a) + static_cast<size_t>(row) * p.intermediate_size : nullptr;
        }
        const uint32_t first_k = plane * of_plane, end_k = min(p.intermediate_size, first_k + of_plane);
        for (uint32_t first = chunk.first_row; first < chunk.end_row; first += kShrinkRows) {
            const uint32_t rows = min(kShrinkRows, chunk.end_row - first);
            const T* h[2];
            for (uint32_t i = 0; i < 2; ++i) {
                const uint32_t row = lane / 4 + 8 * i;
                h[i] = row < rows ? reinterpret_cast<const T*>(p.intermediate) +
                                        static_cast<size_t>(first + row) * p.intermediate_size
                                  : nullptr;
            }
            if (rows <= 8) {
                shrink_block<T, 1>(p, a, h, first_k, end_k, partial);
            } else {
                shrink_block<T, 2>(p, a, h, first_k, end_k, partial);
            }
            named_barrier(kBarrierShrink, kShrinkThreads);
            for (uint32_t i = thread; i < rows * 16; i += kShrinkThreads) {
                const uint32_t row = i / 16, column = i % 16;
                if (rank + column >= ranks) continue;
                float sum = 0.0f;
#pragma unroll
                for (uint32_t part = 0; part < 4; ++part) sum += partial[(part * kShrinkRows + row) * kShrinkPitch + column];
                const size_t to = static_cast<size_t>(plane) * p.num_tokens * p.top_k + first + row;
                reinterpret_cast<float*>(p.shrunk)[to * p.max_rank + rank + column] = sum;
            }
            named_barrier(kBarrierShrink, kShrinkThreads);
        }
    }
    named_barrier(kBarrierShrink, kShrinkThreads);
    if (thread == 0) counter_add(&reinterpret_cast<RouteCounts*>(p.counts)->claimed[1], 1);
}

// What the warpgroups that multiply take turns at: all tiles, and among the last ones, after every second, a group of chunks. The
// first half of the tiles comes before, and what takes about as long as the shrinking.
struct Turns {
    uint32_t tiles, chunks, groups, before, count;

    __device__ __forceinline__ Turns(const DecodeDownParams& p, uint32_t tiles, uint32_t num_chunks, uint32_t rank, uint32_t tile_bytes)
        : tiles(tiles), chunks(num_chunks > rank ? (num_chunks - rank - 1) / p.cluster + 1 : 0) {
        const uint32_t alone = min(tiles, max(tiles / 2, kBytesBeforeLora / tile_bytes));
        groups = min(max((tiles - alone) / 2, 1u), chunks);
        before = groups > 0 ? tiles - 2 * (groups - 1) : tiles;
        count = tiles + groups;
    }
    __device__ __forceinline__ bool is_group(uint32_t turn) const { return turn >= before && (turn - before) % 3 == 0 && groups > 0; }
    __device__ __forceinline__ uint32_t tile(uint32_t turn) const {
        return turn < before ? turn : before + (turn - before) / 3 * 2 + (turn - before) % 3 - 1;
    }
    __device__ __forceinline__ uint32_t end_of_group(uint32_t group) const { return (group + 1) * chunks / groups; }
};

struct LoraRing {
    uint32_t base, full, empty;  // shared addresses; stream_barrier_bytes from `full` on
    uint32_t stages, bytes;
    uint32_t stage = 0, phase = 0;

    // One thread.
    __device__ __forceinline__ void init() const {
        for (uint32_t i = 0; i < stages; ++i) {
            mbarrier_init(full + 8 * i, 1 + kShrinkThreads);
            mbarrier_init(empty + 8 * i, 4);
        }
        store_shared4(empty + 8 * stages, 0);
    }
    __device__ __forceinline__ uint32_t at() const { return base + stage * bytes; }
    __device__ __forceinline__ void wait_full() const { mbarrier_wait(full + 8 * stage, phase); }
    __device__ __forceinline__ void wait_empty() const { mbarrier_wait(empty + 8 * stage, phase ^ 1); }
    __device__ __forceinline__ void next() {
        if (++stage == stages) {
            stage = 0;
            phase ^= 1;
        }
    }
    // Where the group before has ended; part of a turn.
    __device__ __forceinline__ void resume() {
        const uint32_t position = load_shared4(empty + 8 * stages);
        stage = position & 0xffff;
        phase = position >> 16;
    }
    __device__ __forceinline__ void leave() const {
        if (threadIdx.x % 128 == 0) store_shared4(empty + 8 * stages, stage | phase << 16);
    }
};

// The shrinking warpgroup, afterwards.
template <class T>
__device__ __forceinline__ void bring_lora(const DecodeDownParams& p, LoraRing ring, const Turns& turns, uint32_t rank,
                                           uint32_t first_feature) {
    if (turns.chunks == 0) return;
    const uint32_t lane = threadIdx.x % 32, thread = threadIdx.x % kShrinkThreads;
    const uint32_t features = min(kStreamRows, p.hidden_size - first_feature), room = ring.bytes / 16;
    uint32_t units = 0, used = kStageHeader, group = 0;
    const auto flush = [&](bool last) {
        if (units == 0) ring.wait_empty();
        cp_async_arrive(ring.full + 8 * ring.stage);
        if (thread == 0) {
            store_shared16(ring.at(), uint4{units, last, 0, 0});
            mbarrier_arrive(ring.full + 8 * ring.stage);
        }
        ring.next();
        units = 0;
        used = kStageHeader;
    };
    Segment chunk{0, 0, 0, 0};
    AdapterEntry entry{0, 0, 0, 0.0f};
    bool ready = false;
#pragma unroll 1
    for (uint32_t index = 0; index < turns.chunks; ++index) {
        if (index % 32 == 0) {
            entry.rank = 0;
            if (index + lane < turns.chunks) {
                chunk = reinterpret_cast<const Segment*>(p.chunks)[(index + lane) * p.cluster + rank];
                entry = down_entry(p, chunk);
            }
            const uint32_t bytes = (entry.rank + 7) / 8 * 8 * sizeof(T);
            if (bytes > 0 && thread < 32) {
                bulk_prefetch_l2(reinterpret_cast<const char*>(entry.b) + static_cast<size_t>(first_feature) * bytes, features * bytes);
            }
        }
        if (!ready) {
            if (lane == 0) {
                Watchdog watchdog;
                while (counter_read(&reinterpret_cast<RouteCounts*>(p.counts)->claimed[1]) < gridDim.x) watchdog.turn();
            }
            __syncwarp();
            ready = true;
        }
        const uint32_t from = index % 32, ranks = (__shfl_sync(0xffffffffu, entry.rank, from) + 7) / 8 * 8;
        const float scale = __shfl_sync(0xffffffffu, entry.scale, from);
        const char* b = reinterpret_cast<const char*>(__shfl_sync(0xffffffffu, entry.b, from)) +
                        static_cast<size_t>(first_feature) * ranks * sizeof(T);
        uint32_t row = __shfl_sync(0xffffffffu, chunk.first_row, from);
        const uint32_t end = ranks > 0 ? __shfl_sync(0xffffffffu, chunk.end_row, from) : row;
        const uint32_t of_b = kStreamRows * ranks / 8, of_row = p.planes * ranks / 4;
        while (row < end) {
            const uint32_t fit = room > used + of_b ? (room - used - of_b) / of_row : 0;
            if (units > 0 && (fit < end - row || units == kUnitsOfStage)) {
                flush(false);
                continue;
            }
            if (units == 0) ring.wait_empty();
            const uint32_t rows = min(fit, end - row), to = ring.at() + used * 16;
            for (uint32_t at = thread; at < of_b; at += kShrinkThreads) {
                const bool inside = at * 8 < features * ranks;
                cp_async(to + at * 16, b + (inside ? at * 16 : 0), inside);
            }
            for (uint32_t at = thread; at < rows * of_row; at += kShrinkThreads) {
                const uint32_t of_rank = at % (ranks / 4), plane_row = at / (ranks / 4);
                const size_t s = static_cast<size_t>(plane_row / rows) * p.num_tokens * p.top_k + row + plane_row % rows;
                cp_async(to + (of_b + at) * 16, reinterpret_cast<const float*>(p.shrunk) + s * p.max_rank + of_rank * 4, true);
            }
            if (thread == 0) {
                store_shared16(ring.at() + (1 + units) * 16,
                               uint4{row, rows | ranks << 16, __float_as_uint(scale), used | (used + of_b) << 16});
            }
            units += 1;
            used += of_b + rows * of_row;
            row += rows;
        }
        if (index + 1 == turns.end_of_group(group)) {
            flush(true);
            group += 1;
        }
    }
}

// S of a row in two 16-bit numbers: pairs of ranks 0, 1 and 2, 3.
template <class T>
__device__ __forceinline__ void split(const float4& s, uint32_t (&high)[2], uint32_t (&low)[2]) {
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

// One chunk, or some of its rows, to `sum`: a warp does 16 features.
template <class T>
__device__ __forceinline__ void add_unit(const DecodeDownParams& p, uint32_t stage, uint32_t unit, const ExpertSum& sum) {
    const uint32_t lane = threadIdx.x % 32, g = lane / 4, t = lane % 4, feature = threadIdx.x / 32 % 4 * 16 + g;
    const uint4 record = load_shared16(stage + (1 + unit) * 16);
    const uint32_t rows = record.y & 0xffff, ranks = record.y >> 16;
    const float scale = __uint_as_float(record.z), no_bias[2] = {0.0f, 0.0f};
    const uint32_t b = stage + (record.w & 0xffff) * 16 + feature * ranks * 2 + t * 8;
    const uint32_t s = stage + (record.w >> 16) * 16 + t * 16;
    const bool repeats = sum.repeats(record.x, rows);
#pragma unroll 1
    for (uint32_t row = 0; row < rows; row += 8) {
        float value[4] = {};
#pragma unroll 1
        for (uint32_t first = 0; first < ranks; first += 16) {
            const bool any = first + t * 4 < ranks;
            const uint2 low_b = any ? load_shared8(b + first * 2) : uint2{0, 0};
            const uint2 high_b = any ? load_shared8(b + (first + 8 * ranks) * 2) : uint2{0, 0};
            float4 of_row{0.0f, 0.0f, 0.0f, 0.0f};
            if (any && row + g < rows) {
                for (uint32_t plane = 0; plane < p.planes; ++plane) {
                    const uint4 bits = load_shared16(s + ((plane * rows + row + g) * ranks + first) * 4);
                    of_row.x += __uint_as_float(bits.x), of_row.y += __uint_as_float(bits.y);
                    of_row.z += __uint_as_float(bits.z), of_row.w += __uint_as_float(bits.w);
                }
                of_row.x *= scale, of_row.y *= scale, of_row.z *= scale, of_row.w *= scale;
            }
            uint32_t high[2], low[2];
            split<T>(of_row, high, low);
            mma<T>(value, low_b.x, high_b.x, low_b.y, high_b.y, high[0], high[1]);
            mma<T>(value, low_b.x, high_b.x, low_b.y, high_b.y, low[0], low[1]);
        }
        sum.add(value, record.x, row, rows, feature, no_bias, repeats);
    }
    __syncwarp();  // the next one may have the same tokens
}

// A group of chunks, in a warpgroup's turn `turn`; `hand_over`: there is another turn.
template <class T>
__device__ __forceinline__ void consume_group(const DecodeDownParams& p, const Stream& stream, LoraRing& ring, uint32_t turn,
                                              bool hand_over, const ExpertSum& sum) {
    bool first = true;
    ring.resume();
    for (bool last = false; !last;) {
        ring.wait_full();
        const uint32_t stage = ring.at(), empty = ring.empty + 8 * ring.stage;
        const uint4 header = load_shared16(stage);
        last = header.y != 0;
        ring.next();
        if (last) {
            ring.leave();
            if (hand_over) stream.pass_turn();
        }
        if (first && turn > 0) named_barrier(kBarrierAccumulate + threadIdx.x / 128, kStreamConsumers);
        first = false;
        for (uint32_t unit = 0; unit < header.x; ++unit) add_unit<T>(p, stage, unit, sum);
        if (threadIdx.x % 32 == 0) mbarrier_arrive(empty);
    }
}
