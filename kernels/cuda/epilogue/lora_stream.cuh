// LoRA of the decode kernel of down, beside the base product. A warpgroup of every block shrinks its share of all chunks; once all
// blocks have, it brings B and S of the chunks that its block adds through a ring of its own to the warpgroups that multiply.
//
// A block of a cluster adds every p.cluster-th chunk, in groups that follow the last tiles (struct Turns), as units of up to eight
// rows. A stage holds up to p.lora_units of them: a header of 16 records of 16 bytes (how many and whether the group ends, then one
// for each: first row | rows, ranks | scale), then for each B of 64 features [64][ranks] and S f32 [planes][8][ranks].
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
constexpr uint32_t kUnitRows = 8;
constexpr uint32_t kUnitsTogether = 4;  // of a stage, whose products run side by side
constexpr uint32_t kStageHeader = 256;
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
        groups = min(max((tiles - alone) / 2, 1u), (chunks + kUnitsTogether - 1) / kUnitsTogether);
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
    uint32_t stages, bytes, unit_bytes;
    uint32_t stage = 0, phase = 0;

    // One thread.
    __device__ __forceinline__ void init() const {
        for (uint32_t i = 0; i < stages; ++i) {
            mbarrier_init(full + 8 * i, kShrinkThreads / 32 + kShrinkThreads);
            mbarrier_init(empty + 8 * i, 4);
        }
        store_shared4(empty + 8 * stages, 0);
    }
    __device__ __forceinline__ uint32_t at() const { return base + stage * bytes; }
    __device__ __forceinline__ uint32_t unit(uint32_t index) const { return at() + kStageHeader + index * unit_bytes; }
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

// Up to 32 chunks of a block, one a lane.
struct Chunks {
    Segment chunk{0, 0, 0, 0};
    AdapterEntry entry{0, 0, 0, 0.0f};

    __device__ __forceinline__ Chunks(const DecodeDownParams& p, uint32_t first, uint32_t end, uint32_t rank) {
        const uint32_t index = first + threadIdx.x % 32;
        if (index < end) {
            chunk = reinterpret_cast<const Segment*>(p.chunks)[index * p.cluster + rank];
            entry = down_entry(p, chunk);
        }
    }
    __device__ __forceinline__ uint32_t units() const {
        return entry.rank > 0 ? (chunk.end_row - chunk.first_row + kUnitRows - 1) / kUnitRows : 0;
    }
};

// The shrinking warpgroup, afterwards. A warp brings every fourth unit.
template <class T>
__device__ __forceinline__ void bring_lora(const DecodeDownParams& p, LoraRing ring, const Turns& turns, uint32_t rank,
                                           uint32_t first_feature, Chunks next) {
    const uint32_t lane = threadIdx.x % 32, warp = threadIdx.x % kShrinkThreads / 32;
    const uint32_t features = min(kStreamRows, p.hidden_size - first_feature);
    bool ready = false;
    Chunks now = next;
    for (uint32_t group = 0, first = 0; group < turns.groups; ++group) {
        const uint32_t end = turns.end_of_group(group);
#pragma unroll 1
        while (first < end) {
            if (first % 32 == 0) {
                now = next;
                next = Chunks(p, first + 32, turns.chunks, rank);
            }
            // Of the chunks that the lanes hold, those of this group.
            const uint32_t from_lane = first % 32, to_lane = min(from_lane + end - first, 32u);
            const uint32_t own = lane >= from_lane && lane < to_lane ? now.units() : 0;
            first += to_lane - from_lane;
            uint32_t through = own;  // units of this lane's chunk and those before
#pragma unroll
            for (int d = 1; d < 32; d *= 2) {
                const uint32_t other = __shfl_up_sync(0xffffffffu, through, d);
                if (lane >= d) through += other;
            }
            const uint32_t total = __shfl_sync(0xffffffffu, through, 31);
            const bool ends = first == end;
            for (uint32_t base = 0; base < total || (base == 0 && ends); base += p.lora_units) {
                ring.wait_empty();
                const uint32_t count = min(p.lora_units, total - base), full = ring.full + 8 * ring.stage;
                for (uint32_t unit = warp; unit < count; unit += kShrinkThreads / 32) {
                    const int from = __ffs(__ballot_sync(0xffffffffu, through > base + unit)) - 1;
                    const uint32_t before = __shfl_sync(0xffffffffu, through - own, from);
                    const uint32_t ranks = (__shfl_sync(0xffffffffu, now.entry.rank, from) + 7) / 8 * 8;
                    const float scale = __shfl_sync(0xffffffffu, now.entry.scale, from);
                    const uint32_t row = __shfl_sync(0xffffffffu, now.chunk.first_row, from) + (base + unit - before) * kUnitRows;
                    const uint32_t rows = min(kUnitRows, __shfl_sync(0xffffffffu, now.chunk.end_row, from) - row);
                    const char* b = reinterpret_cast<const char*>(__shfl_sync(0xffffffffu, now.entry.b, from)) +
                                    static_cast<size_t>(first_feature) * ranks * sizeof(T);
                    const uint32_t to = ring.unit(unit);
                    for (uint32_t at = lane; at < kStreamRows * ranks / 8; at += 32) {
                        const bool inside = at * 8 < features * ranks;
                        cp_async(to + at * 16, b + (inside ? at * 16 : 0), inside);
                    }
                    if (!ready) {
                        if (lane == 0) {
                            Watchdog watchdog;
                            const uint32_t* counter = &reinterpret_cast<RouteCounts*>(p.counts)->claimed[1];
                            while (counter_read(counter) < gridDim.x) watchdog.turn();
                        }
                        __syncwarp();
                        ready = true;
                    }
                    if (lane / 4 < rows) {
                        for (uint32_t plane = 0; plane < p.planes; ++plane) {
                            const size_t of_row = static_cast<size_t>(plane) * p.num_tokens * p.top_k + row + lane / 4;
                            const float* s = reinterpret_cast<const float*>(p.shrunk) + of_row * p.max_rank;
                            for (uint32_t at = lane % 4; at < ranks / 4; at += 4) {
                                cp_async(to + (32 + plane * kUnitRows + lane / 4) * ranks * 4 + at * 16, s + at * 4, true);
                            }
                        }
                    }
                    if (lane == 0) {
                        store_shared16(ring.at() + (1 + unit) * 16, uint4{row, rows | ranks << 16, __float_as_uint(scale), 0});
                    }
                }
                cp_async_arrive(full);
                if (lane == 0) {
                    if (warp == 0) store_shared16(ring.at(), uint4{count, ends && base + count >= total, 0, 0});
                    mbarrier_arrive(full);
                }
                ring.next();
            }
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

// The units of a stage to `sum`: a warp does 16 features. Products side by side, then sums one after the other: units may share
// tokens.
template <class T>
__device__ __forceinline__ void add_units(const DecodeDownParams& p, const LoraRing& ring, uint32_t count, const ExpertSum& sum) {
    const uint32_t lane = threadIdx.x % 32, g = lane / 4, t = lane % 4, feature = threadIdx.x / 32 % 4 * 16 + g;
    const float no_bias[2] = {0.0f, 0.0f};
#pragma unroll 1
    for (uint32_t first = 0; first < count; first += kUnitsTogether) {
        float value[kUnitsTogether][4] = {};
        uint4 record[kUnitsTogether];
        bool repeats[kUnitsTogether];
#pragma unroll
        for (uint32_t i = 0; i < kUnitsTogether; ++i) {
            record[i] = first + i < count ? load_shared16(ring.at() + (1 + first + i) * 16) : uint4{0, 0, 0, 0};
        }
        const auto step = [&](uint32_t i, uint32_t rank) {
            const uint32_t rows = record[i].y & 0xffff, ranks = record[i].y >> 16;
            const bool any = rank + t * 4 < ranks;
            const uint32_t unit = ring.unit(first + i), b = unit + (feature * ranks + rank + t * 4) * 2;
            const uint2 low_b = any ? load_shared8(b) : uint2{0, 0};
            const uint2 high_b = any ? load_shared8(b + 16 * ranks) : uint2{0, 0};
            float4 s{0.0f, 0.0f, 0.0f, 0.0f};
            if (any && g < rows) {
                for (uint32_t plane = 0; plane < p.planes; ++plane) {
                    const uint4 bits = load_shared16(unit + ((32 + plane * kUnitRows + g) * ranks + rank + t * 4) * 4);
                    s.x += __uint_as_float(bits.x), s.y += __uint_as_float(bits.y);
                    s.z += __uint_as_float(bits.z), s.w += __uint_as_float(bits.w);
                }
                const float scale = __uint_as_float(record[i].z);
                s.x *= scale, s.y *= scale, s.z *= scale, s.w *= scale;
            }
            uint32_t high[2], low[2];
            split<T>(s, high, low);
            mma<T>(value[i], low_b.x, high_b.x, low_b.y, high_b.y, high[0], high[1]);
            mma<T>(value[i], low_b.x, high_b.x, low_b.y, high_b.y, low[0], low[1]);
        };
        uint32_t most = 0;
#pragma unroll
        for (uint32_t i = 0; i < kUnitsTogether; ++i) {
            step(i, 0);
            repeats[i] = sum.repeats(record[i].x, record[i].y & 0xffff);
            most = max(most, record[i].y >> 16);
        }
#pragma unroll 1
        for (uint32_t rank = 16; rank < most; rank += 16) {
#pragma unroll
            for (uint32_t i = 0; i < kUnitsTogether; ++i) {
                if (rank < record[i].y >> 16) step(i, rank);
            }
        }
#pragma unroll
        for (uint32_t i = 0; i < kUnitsTogether; ++i) {
            sum.add(value[i], record[i].x, 0, record[i].y & 0xffff, feature, no_bias, repeats[i]);
            __syncwarp();
        }
    }
}

// A group of chunks, in a warpgroup's turn `turn`; `hand_over`: there is another turn.
template <class T>
__device__ __forceinline__ void consume_group(const DecodeDownParams& p, const Stream& stream, LoraRing& ring, uint32_t turn,
                                              bool hand_over, const ExpertSum& sum) {
    bool first = true;
    ring.resume();
    for (bool last = false; !last;) {
        ring.wait_full();
        const LoraRing stage = ring;
        const uint4 header = load_shared16(stage.at());
        last = header.y != 0;
        ring.next();
        if (last) {
            ring.leave();
            if (hand_over) stream.pass_turn();
        }
        if (first && turn > 0) named_barrier(kBarrierAccumulate + threadIdx.x / 128, kStreamConsumers);
        first = false;
        add_units<T>(p, stage, header.x, sum);
        if (threadIdx.x % 32 == 0) mbarrier_arrive(stage.empty + 8 * stage.stage);
    }
}
