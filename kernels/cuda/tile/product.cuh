// One tile of a grouped product: kWeightRows rows of an expert's weights times kN tokens, over all of k, in f32 registers.
//
// Weights are the left operand (m16) and tokens the right one (n8), so that few tokens waste little. A ring of stages in
// shared memory is filled by cp.async; rows that do not exist, and k beyond the end, are filled with zeros.
#pragma once
#include <cstdint>

#include "epilogue/lora.cuh"
#include "mma/number.cuh"
#include "params.cuh"
#include "ptx/async.cuh"
#include "tile/swizzle.cuh"

constexpr int kProductThreads = 256;
constexpr int kWeightRows = 128;
constexpr int kProductShared = 96 * 1024;
static_assert(kTileRows == 128, "the widest TileShape");
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
constexpr int kProductBlocks = 2;  // blocks that share an SM: 128 registers a thread
#else
constexpr int kProductBlocks = 1;
#endif

// How a tile of kN tokens is shared out.
template <int kN_>
struct TileShape {
    static constexpr int kN = kN_;
    static constexpr int kWarpsN = kN >= 64 ? 2 : 1;
    static constexpr int kWarpsM = 8 / kWarpsN;
    static constexpr int kM16 = kWeightRows / 16 / kWarpsM;  // m16 fragments of a warp
    static constexpr int kN8 = kN / 8 / kWarpsN;             // n8 fragments of a warp
    static constexpr int kStageBytes = (kWeightRows + kN) * kTileRowBytes;
    static constexpr int kStages = kN == 128 ? 3 : kN == 16 ? 5 : 4;
    static_assert(kStages * kStageBytes <= kProductShared, "the ring fits");
    static_assert(kN8 % 2 == 0, "tokens are read 16 at a time");
};

// Adds 16 ranks of LoRA, whose segment has the tile's tokens [first, end).
template <class T, class Shape, bool kSplit>
__device__ __forceinline__ void lora_place(float (&sum)[Shape::kM16][Shape::kN8][4], uint32_t stage, int place,
                                           uint32_t first, uint32_t end) {
    const uint32_t lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
    const uint32_t left_row = warp / Shape::kWarpsN * Shape::kM16 * (kSplit ? 8 : 16) + g;
    const uint32_t warp_token = warp % Shape::kWarpsN * Shape::kN8 * 8;
    // Four ranks of this lane's two rows of every m16.
    uint2 left[Shape::kM16][2];
#pragma unroll
    for (int m = 0; m < Shape::kM16; ++m) {
        const uint32_t row = left_row + m * (kSplit ? 8 : 16);
        const uint32_t chunk = 2 * place + t / 2, within = t % 2 * 8;
        left[m][0] = load_shared8(stage + swizzled(row, chunk) + within);
        left[m][1] = load_shared8(stage + swizzled(row + (kSplit ? 64 : 8), chunk) + within);
    }
#pragma unroll
    for (int n = 0; n < Shape::kN8; ++n) {
        const uint32_t token = warp_token + 8 * n;
        if (end <= token || first >= token + 8) continue;
        if constexpr (kSplit) {
            // 8 ranks of gate and 8 of up in one product, zeros in the two off-diagonal quarters.
            const uint4 gate = load_shared16(stage + swizzled(kWeightRows + token + g, t));
            const uint4 up = load_shared16(stage + swizzled(kWeightRows + token + g, 4 + t));
#pragma unroll
            for (int m = 0; m < Shape::kM16; ++m) {
                mma<T>(sum[m][n], left[m][0].x, 0, 0, left[m][1].x, gate.x, up.x);
                mma<T>(sum[m][n], left[m][0].y, 0, 0, left[m][1].y, gate.y, up.y);
                mma<T>(sum[m][n], left[m][0].x, 0, 0, left[m][1].x, gate.z, up.z);
                mma<T>(sum[m][n], left[m][0].y, 0, 0, left[m][1].y, gate.w, up.w);
            }
        } else {
            const uint4 s = load_shared16(stage + swizzled(kWeightRows + token + g, 4 * place + t));
#pragma unroll
            for (int m = 0; m < Shape::kM16; ++m) {
                mma<T>(sum[m][n], left[m][0].x, left[m][1].x, left[m][0].y, left[m][1].y, s.x, s.y);
                mma<T>(sum[m][n], left[m][0].x, left[m][1].x, left[m][0].y, left[m][1].y, s.z, s.w);
            }
        }
    }
}

constexpr uint32_t kNoRow = ~0u;  // the offset of a row of zeros

// Row r of the weights begins at weights[r / 64] + 8 * weight_offset(r), row r of the tokens at tokens + 8 * token_offset(r).
// sum[m][n] of warp (warp / kWarpsN, warp % kWarpsN). kSplit: fragment rows 0..7 are tile rows 8 i.. and fragment rows 8..15
// tile rows 64 + 8 i.. (gate and up of the same features in the same lane); else 16 i...
// tokens_wait: the launch before this one writes the tokens, so only weights may be read before it is complete.
// read_lora(raw) begins to copy what list_lora(raw) needs, which returns the number of LoRA steps.
template <class T, class Shape, bool kSplit, class WeightOffset, class TokenOffset, class Lora, class ReadLora,
          class ListLora>
__device__ __forceinline__ void tile_product(float (&sum)[Shape::kM16][Shape::kN8][4], char* shared, uint32_t depth,
                                             const T* const (&weights)[2], bool tokens_wait,
                                             WeightOffset weight_offset, const T* tokens, TokenOffset token_offset,
                                             const Lora& lora, ReadLora read_lora, ListLora list_lora) {
    const uint32_t lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const uint32_t copy_row = threadIdx.x / 8, copy_chunk = threadIdx.x % 8;
    constexpr int kWeightCopies = kWeightRows / 32;
    constexpr int kTokenCopies = (Shape::kN + 31) / 32;
    const uint32_t ring = shared_address(shared);

    uint32_t weight_at[kWeightCopies], token_at[kTokenCopies];
#pragma unroll
    for (int i = 0; i < kWeightCopies; ++i) weight_at[i] = weight_offset(copy_row + 32 * i);
#pragma unroll
    for (int i = 0; i < kTokenCopies; ++i) {
        const uint32_t row = copy_row + 32 * i;
        token_at[i] = row < Shape::kN ? token_offset(row) : kNoRow;
    }
    const uint32_t write = swizzled(copy_row, copy_chunk);
    const auto fill_weights = [&](uint32_t step) {
        const uint32_t stage = ring + step % Shape::kStages * Shape::kStageBytes;
        const uint32_t k = step * kTileDepth + copy_chunk * 8;
#pragma unroll
        for (int i = 0; i < kWeightCopies; ++i) {
            const T* from = weights[i / 2] + static_cast<size_t>(weight_at[i]) * 8 + k;
            cp_async_stream(stage + write + 32 * i * kTileRowBytes, from, weight_at[i] != kNoRow && k < depth);
        }
    };
    const auto fill_tokens = [&](uint32_t step) {
        const uint32_t stage = ring + step % Shape::kStages * Shape::kStageBytes;
        const uint32_t k = step * kTileDepth + copy_chunk * 8;
#pragma unroll
        for (int i = 0; i < kTokenCopies; ++i) {
            if (Shape::kN % 32 != 0 && copy_row + 32 * i >= Shape::kN) break;
            const T* from = tokens + static_cast<size_t>(token_at[i]) * 8 + k;
            cp_async(stage + (kWeightRows + 32 * i) * kTileRowBytes + write, from, token_at[i] != kNoRow && k < depth);
        }
    };

    // B where weights lie, S where tokens lie; a step has one or two places of 16 ranks.
    LoraWalk filled;
    const auto fill_lora = [&](uint32_t step) {
        wait_for_previous_launch();  // it writes S
        const uint32_t stage = ring + step % Shape::kStages * Shape::kStageBytes;
        // Every thread copies 16 bytes of one place's B (or none) and of one place's S.
        LoraWalk weight_place, token_place;
        bool weight_exists = false, token_exists = false;
#pragma unroll
        for (int place = 0; place < Lora::kPlaces; ++place) {
            const bool exists = filled.find(lora);
            if (copy_chunk / 2 == place) {
                weight_place = filled;
                weight_exists = exists;
            }
            if (kSplit || copy_chunk / 4 == place) {
                token_place = filled;
                token_exists = exists;
            }
            filled.rank += 16;
        }
        if (copy_chunk / 2 < Lora::kPlaces) {
#pragma unroll
            for (int i = 0; i < kWeightCopies; ++i) {
                const uint32_t row = copy_row + 32 * i, rank = weight_place.rank + copy_chunk % 2 * 8;
                const T* from = lora.b(weight_place.part, kSplit ? i / 2 : 0, kSplit ? row % 64 : row, rank);
                cp_async(stage + write + 32 * i * kTileRowBytes, from, weight_exists && from != nullptr);
            }
        }
#pragma unroll
        for (int i = 0; i < kTokenCopies; ++i) {
            if (Shape::kN % 32 != 0 && copy_row + 32 * i >= Shape::kN) break;
            const uint32_t rank = token_place.rank + copy_chunk % 4 * 4;
            const uint32_t* from = lora.s(token_place.part, kSplit ? copy_chunk / 4 : 0, copy_row + 32 * i, rank);
            cp_async(stage + (kWeightRows + 32 * i) * kTileRowBytes + write, from, token_exists && from != nullptr);
        }
    };

    const uint32_t steps = (depth + kTileDepth - 1) / kTileDepth;
    constexpr uint32_t kAhead = Shape::kStages - 1;
    const uint32_t raw = ring + kAhead * Shape::kStageBytes;  // a stage that is not filled before the loop
    read_lora(raw);
    cp_async_commit();
    if (tokens_wait) {
#pragma unroll 1
        for (uint32_t s = 0; s < min(kAhead, steps); ++s) fill_weights(s);
        wait_for_previous_launch();
    }
#pragma unroll 1
    for (uint32_t s = 0; s < kAhead; ++s) {
        if (s < steps) {
            if (!tokens_wait) fill_weights(s);
            fill_tokens(s);
        }
        cp_async_commit();
    }
    cp_async_wait<kAhead>();
    const uint32_t all_steps = steps + list_lora(raw);
#pragma unroll 1
    for (uint32_t s = steps; s < kAhead; ++s) {
        if (s < all_steps) fill_lora(s);
        cp_async_commit();
    }

    const uint32_t warp_m = warp / Shape::kWarpsN, warp_n = warp % Shape::kWarpsN;
    // ldmatrix: matrix lane / 8, row lane % 8. Weights: rows +0, +8 (or +64), k +0, +8. Tokens: k +0, +8, rows +0, +8.
    const uint32_t left_row = lane % 8 + lane / 8 % 2 * (kSplit ? 64 : 8) + warp_m * Shape::kM16 * (kSplit ? 8 : 16);
    const uint32_t right_row = kWeightRows + lane % 8 + lane / 16 * 8 + warp_n * Shape::kN8 * 8;
    LoraWalk used;
    for (uint32_t step = 0; step < all_steps; ++step) {
        cp_async_wait<Shape::kStages - 2>();
        __syncthreads();
        if (step + kAhead < steps) {
            fill_weights(step + kAhead);
            fill_tokens(step + kAhead);
        } else if (step + kAhead < all_steps) {
            fill_lora(step + kAhead);
        }
        cp_async_commit();
        const uint32_t stage = ring + step % Shape::kStages * Shape::kStageBytes;
        if (step >= steps) {
#pragma unroll
            for (int place = 0; place < Lora::kPlaces; ++place) {
                if (!used.find(lora)) break;
                const uint32_t first = lora.first_row_of(used.part) - lora.tile.first_row;
                const uint32_t end = lora.parts[used.part].end_row - lora.tile.first_row;
                used.rank += 16;
                lora_place<T, Shape, kSplit>(sum, stage, place, first, end);
            }
            continue;
        }
#pragma unroll
        for (int k16 = 0; k16 < kTileDepth / 16; ++k16) {
            uint32_t left[Shape::kM16][4];
#pragma unroll
            for (int m = 0; m < Shape::kM16; ++m) {
                ldmatrix(left[m], stage + swizzled(left_row + m * (kSplit ? 8 : 16), 2 * k16 + lane / 16));
            }
#pragma unroll
            for (int n = 0; n < Shape::kN8; n += 2) {
                uint32_t right[4];
                ldmatrix(right, stage + swizzled(right_row + n * 8, 2 * k16 + lane / 8 % 2));
#pragma unroll
                for (int m = 0; m < Shape::kM16; ++m) {
                    mma<T>(sum[m][n], left[m][0], left[m][1], left[m][2], left[m][3], right[0], right[1]);
                    mma<T>(sum[m][n + 1], left[m][0], left[m][1], left[m][2], left[m][3], right[2], right[3]);
                }
            }
        }
    }
    cp_async_wait<0>();
    __syncthreads();
}

// The accumulators of a tile as f32 [kN][kStagedPitch] in shared memory, where the ring was.
constexpr uint32_t kStagedPitch = kWeightRows + 4;
static_assert(kTileRows * kStagedPitch * 4 <= kProductShared, "the largest tile fits");

template <class Shape, bool kSplit>
__device__ __forceinline__ void stage_tile(const float (&sum)[Shape::kM16][Shape::kN8][4], float* staged) {
    const uint32_t lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const uint32_t row = warp / Shape::kWarpsN * Shape::kM16 * (kSplit ? 8 : 16) + lane / 4;
    const uint32_t token = warp % Shape::kWarpsN * Shape::kN8 * 8 + lane % 4 * 2;
    float* at = staged + token * kStagedPitch + row;
#pragma unroll
    for (int m = 0; m < Shape::kM16; ++m) {
#pragma unroll
        for (int n = 0; n < Shape::kN8; ++n) {
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const int weight_row = m * (kSplit ? 8 : 16) + i / 2 * (kSplit ? 64 : 8);
                at[(n * 8 + i % 2) * kStagedPitch + weight_row] = sum[m][n][i];
            }
        }
    }
    __syncthreads();
}

// Calls body(TileShape<...>{}) with the narrowest tile that holds `rows` tokens.
template <class Body>
__device__ __forceinline__ void for_tile_shape(uint32_t rows, Body body) {
    if (rows <= 16) {
        body(TileShape<16>{});
    } else if (rows <= 32) {
        body(TileShape<32>{});
    } else if (rows <= 64) {
        body(TileShape<64>{});
    } else {
        body(TileShape<128>{});
    }
}
