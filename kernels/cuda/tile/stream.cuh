// Weights streamed through a block once: a ring of stages in shared memory, and the product of what is in them.
//
// An item is 64 weight rows of an expert times the rows (tokens) of one RowTile over all of k or a part of it. A stage holds
// stage_tiles times 64 of k: weights [stage_tiles][64 rows], then tokens [stage_tiles][tile_rows], rows of 128 bytes, swizzled.
// One thread brings weights by bulk copies, three warps bring tokens by 16 bytes, two warpgroups take turns at the items.
// Weights are on the M side, so a tile of few rows costs few columns.
#pragma once
#include <cstdint>

#include "mma/number.cuh"
#include "ptx/async.cuh"
#include "ptx/mbarrier.cuh"
#include "ptx/wgmma.cuh"
#include "tile/swizzle.cuh"

constexpr uint32_t kStreamRows = 64;
constexpr uint32_t kStreamWeightBytes = kStreamRows * kTileRowBytes;
constexpr uint32_t kStreamConsumers = 256;     // threads 0 ..
constexpr uint32_t kStreamTokenThreads = 96;   // the next ones; then a warp for weights
constexpr uint32_t kStreamThreads = 384;
constexpr uint32_t kTokenPass = kStreamTokenThreads / 8;  // rows that token threads copy 128 bytes of at a time

// Named barriers: 0 is __syncthreads.
constexpr uint32_t kBarrierConsumers = 1;
constexpr uint32_t kBarrierTurn = 2;        // + warpgroup: its turn to wait for stages
constexpr uint32_t kBarrierAccumulate = 4;  // + warpgroup: its turn to add up
constexpr uint32_t kBarrierGroup = 6;       // + warpgroup: its own
constexpr uint32_t kBarrierShrink = 8;
constexpr uint32_t kBarrierLora = 9;

// Two barriers a stage, and where the consumers are.
__host__ __device__ constexpr uint32_t stream_barrier_bytes(uint32_t stages) { return 16 * stages + 16; }

struct Stream {
    uint32_t base, full, empty;  // shared addresses; stream_barrier_bytes from `full` on
    uint32_t stages, stage_tiles, tile_rows, slot_bytes;
    uint32_t stage = 0, phase = 0;

    __device__ __forceinline__ Stream(uint32_t base, uint32_t barriers, uint32_t stages, uint32_t stage_tiles, uint32_t tile_rows)
        : base(base), full(barriers), empty(barriers + 8 * stages), stages(stages), stage_tiles(stage_tiles), tile_rows(tile_rows),
          slot_bytes(stage_tiles * (kStreamWeightBytes + tile_rows * kTileRowBytes)) {}

    // One thread.
    __device__ __forceinline__ void init() const {
        for (uint32_t i = 0; i < stages; ++i) {
            mbarrier_init(full + 8 * i, 1 + kStreamTokenThreads);
            mbarrier_init(empty + 8 * i, 8);
        }
        fence_mbarrier_init();
        fence_async_shared();
    }
    __device__ __forceinline__ uint32_t weights() const { return base + stage * slot_bytes; }
    __device__ __forceinline__ uint32_t tokens() const { return weights() + stage_tiles * kStreamWeightBytes; }
    __device__ __forceinline__ void wait_full() const { mbarrier_wait(full + 8 * stage, phase); }
    __device__ __forceinline__ void wait_empty() const { mbarrier_wait(empty + 8 * stage, phase ^ 1); }
    __device__ __forceinline__ void next() {
        if (++stage == stages) {
            stage = 0;
            phase ^= 1;
        }
    }
    // A warpgroup's turn: it goes on where the other one has stopped to wait. `first`: nobody was before.
    __device__ __forceinline__ void take_turn(bool first) {
        if (first) return;
        named_barrier(kBarrierTurn + threadIdx.x / 128, kStreamConsumers);
        const uint32_t position = load_shared4(empty + 8 * stages);
        stage = position & 0xffff;
        phase = position >> 16;
    }
    __device__ __forceinline__ void pass_turn() const {
        if (threadIdx.x % 128 == 0) store_shared4(empty + 8 * stages, stage | phase << 16);
        named_barrier_arrive(kBarrierTurn + (threadIdx.x / 128 ^ 1), kStreamConsumers);
    }
};

// The rows of a tile that a token thread copies 16 bytes of, as offsets of 16 bytes: every kTokenPass-th row.
struct TokenRows {
    static constexpr uint32_t kMost = (128 + kTokenPass - 1) / kTokenPass;

    uint32_t offset[kMost];
    uint32_t count;

    template <class Offset>
    __device__ __forceinline__ TokenRows(uint32_t count, Offset offset_of) : count(count) {
        const uint32_t first = (threadIdx.x - kStreamConsumers) / 8;
#pragma unroll
        for (uint32_t i = 0; i < kMost; ++i) offset[i] = first + kTokenPass * i < count ? offset_of(first + kTokenPass * i) : 0;
    }
    // Brings one step's tokens; the caller arrives.
    template <class T>
    __device__ __forceinline__ void copy(const Stream& stream, const T* input, uint32_t step, uint32_t width) const {
        const uint32_t thread = threadIdx.x - kStreamConsumers, first = thread / 8, chunk = thread % 8;
#pragma unroll 1
        for (uint32_t piece = 0; piece < stream.stage_tiles; ++piece) {
            const uint32_t k = (step * stream.stage_tiles + piece) * kTileDepth + chunk * 8;
            const uint32_t to = stream.tokens() + piece * stream.tile_rows * kTileRowBytes;
            const T* from = input + (k < width ? k : 0);
#pragma unroll
            for (uint32_t i = 0; i < kMost; ++i) {
                if (kTokenPass * i >= count) break;
                if (first + kTokenPass * i < count) {
                    cp_async(to + swizzled(first + kTokenPass * i, chunk), from + static_cast<size_t>(offset[i]) * 8, k < width);
                }
            }
        }
    }
};

// sum += weights times tokens over `steps` stages, by a warpgroup. The other one may wait for stages once this one waits for none.
template <class T, int kColumns>
__device__ __forceinline__ void stream_product(float (&sum)[kColumns / 8][4], Stream& stream, uint32_t steps,
                                               bool hand_over) {
    uint32_t previous = ~0u;
#pragma unroll 1
    for (uint32_t step = 0; step < steps; ++step) {
        stream.wait_full();
        fence_async_shared();
        wgmma_fence();
        uint64_t weights = wgmma_descriptor(stream.weights()), tokens = wgmma_descriptor(stream.tokens());
#pragma unroll 1
        for (uint32_t piece = 0; piece < stream.stage_tiles; ++piece) {
#pragma unroll
            for (int k = 0; k < kTileDepth / 16; ++k) Wgmma<T, kColumns>::mma(&sum[0][0], weights + 2 * k, tokens + 2 * k);
            weights += kStreamWeightBytes / 16;
            tokens += stream.tile_rows * (kTileRowBytes / 16);
        }
        wgmma_commit();
        wgmma_wait<1>();
        if (previous != ~0u && threadIdx.x % 32 == 0) mbarrier_arrive_twice(stream.empty + 8 * previous);
        previous = stream.stage;
        stream.next();
    }
    if (hand_over) stream.pass_turn();
    wgmma_wait<0>();
    if (previous != ~0u && threadIdx.x % 32 == 0) mbarrier_arrive_twice(stream.empty + 8 * previous);
}

// Calls body(Columns<N>{}) with the narrowest product that holds `rows` tokens.
template <int N>
struct Columns {
    static constexpr int value = N;
};
template <class Body>
__device__ __forceinline__ void for_columns(uint32_t rows, Body body) {
    if (rows <= 8) {
        body(Columns<8>{});
    } else if (rows <= 16) {
        body(Columns<16>{});
    } else if (rows <= 32) {
        body(Columns<32>{});
    } else if (rows <= 64) {
        body(Columns<64>{});
    } else {
        body(Columns<128>{});
    }
}
