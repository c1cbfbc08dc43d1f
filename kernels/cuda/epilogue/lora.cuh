// LoRA's wide half: adds B S to the f32 accumulators of a tile, as steps of the same ring that feeds the base product.
//
// A step is 16 ranks of one segment, or of two where there is one projection: B of all the tile's features where weights lie
// in other steps, S of all the tile's tokens where tokens lie, zeros for the tokens of other segments, so segments may begin
// anywhere. Both sides of a product number the ranks alike, so a lane takes four neighbouring ranks where the instruction's
// layout has two pairs.
// S comes as pairs of 16-bit numbers whose sum has twice the digits, and is multiplied twice: in effect it is not rounded.
#pragma once
#include <cstdint>

#include "mma/number.cuh"
#include "params.cuh"
#include "ptx/async.cuh"

// A segment of a tile as the product needs it: where its B are and how many ranks they have. An absent one has rank 0.
struct LoraPart {
    uint64_t b[2];
    uint32_t end_row;
    uint16_t rank8[2];
};
static_assert(sizeof(LoraPart) == 24, "LoraPart");

constexpr int kLoraPartsBytes = kTileRows * sizeof(LoraPart);

// The LoRA of one tile: kCount projections of every segment.
template <class T, int kCount>
struct TileLora {
    static constexpr int kPlaces = 2 / kCount;  // 16 ranks of all projections each: S of a token is 128 bytes a step

    const RowTile& tile;
    LoraPart* parts;        // shared [kTileRows]
    const uint32_t* shrunk;  // [rows, stride], see params.cuh
    uint32_t stride, max_rank;
    uint32_t first_row, num_rows;  // of B: the tile's features
    uint32_t before = 0;           // features of the tile in front of those

    // Begins to copy a segment a thread to shared memory, 16 bytes each from `raw` on. All threads.
    __device__ __forceinline__ void read(uint32_t raw, uint64_t segments, uint32_t num_segments) const {
        const uint32_t index = tile.first_segment + threadIdx.x;
        if (threadIdx.x < kTileRows) {
            cp_async(raw + threadIdx.x * 16, reinterpret_cast<const Segment*>(segments) + index, index < num_segments);
        }
    }

    // Lists what was read, projections from `first` on, and brings the segments' B on the way to L2. All threads; returns the
    // number of steps.
    __device__ __forceinline__ uint32_t list(uint32_t raw, uint32_t num_segments, uint64_t adapters, uint32_t num_experts,
                                             uint32_t first) const {
        const uint32_t end = tile.first_row + tile.num_rows;
        Segment segment{0, -1, ~0u, ~0u};
        if (threadIdx.x < kTileRows && tile.first_segment + threadIdx.x < num_segments) {
            const uint4 words = load_shared16(raw + threadIdx.x * 16);
            segment = Segment{words.x, static_cast<int32_t>(words.y), words.z, words.w};
        }
        if (segment.first_row < end) {
            LoraPart part{{0, 0}, segment.end_row, {0, 0}};
            if (segment.slot >= 0) {
                const auto* table = reinterpret_cast<const AdapterEntry*>(adapters);
                const size_t at = (static_cast<size_t>(segment.slot) * num_experts + segment.expert) * 3 + first;
                for (int i = 0; i < kCount; ++i) {
                    part.b[i] = table[at + i].b;
                    part.rank8[i] = static_cast<uint16_t>((table[at + i].rank + 7) / 8 * 8);
                }
            }
            parts[threadIdx.x] = part;
        }
        __syncthreads();
        uint32_t places = 0;
        for (uint32_t row = tile.first_row, i = 0; row < end; row = parts[i++].end_row) {
            places += (ranks(i) + 15) / 16;
            for (int p = 0; p < kCount; ++p) {
                const uint32_t row_bytes = parts[i].rank8[p] * sizeof(T);
                const char* from =
                    reinterpret_cast<const char*>(parts[i].b[p]) + static_cast<size_t>(first_row) * row_bytes;
                for (uint32_t at = threadIdx.x * 128; at < num_rows * row_bytes; at += blockDim.x * 128) {
                    prefetch_l2(from + at);
                }
            }
        }
        return (places + kPlaces - 1) / kPlaces;
    }

    __device__ __forceinline__ uint32_t ranks(uint32_t part) const {
        return max(parts[part].rank8[0], parts[part].rank8[1]);
    }
    __device__ __forceinline__ uint32_t first_row_of(uint32_t part) const {
        return part == 0 ? tile.first_row : parts[part - 1].end_row;
    }
    // 8 ranks of the row of B of the tile's feature `row`; null where there are none.
    __device__ __forceinline__ const T* b(uint32_t part, int projection, uint32_t row, uint32_t rank) const {
        const uint32_t rank8 = parts[part].rank8[projection];
        const uint32_t at = row - before;
        if (rank >= rank8 || at >= num_rows) return nullptr;
        return reinterpret_cast<const T*>(parts[part].b[projection]) + static_cast<size_t>(first_row + at) * rank8 + rank;
    }
    // 4 ranks of a token's S (the first and the second parts of each); null where there are none.
    __device__ __forceinline__ const uint32_t* s(uint32_t part, int projection, uint32_t token, uint32_t rank) const {
        const uint32_t row = tile.first_row + token;
        if (rank >= parts[part].rank8[projection] || row < first_row_of(part) || row >= parts[part].end_row) return nullptr;
        return shrunk + static_cast<size_t>(row) * stride + projection * max_rank + rank;
    }
};

// The walk over a tile's parts, 16 ranks at a time.
struct LoraWalk {
    uint32_t part = 0, rank = 0;

    // Goes to the next part that has ranks left; false if there is none.
    template <class Lora>
    __device__ __forceinline__ bool find(const Lora& lora) {
        const uint32_t end = lora.tile.first_row + lora.tile.num_rows;
        while (rank >= lora.ranks(part)) {
            if (lora.parts[part].end_row >= end) return false;
            part += 1;
            rank = 0;
        }
        return true;
    }
};
