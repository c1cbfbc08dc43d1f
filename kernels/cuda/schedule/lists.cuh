// From sorted rows to the lists of work: segments (expert, slot), row tiles of the expert products, chunks of LoRA work.
//
// Tiles of kTileRows rows lie in the order of rows; tiles of equal parts of an expert (AlignParams::tile_rows) by their
// height, highest first, so that kernels that share out tiles as they go end with small ones.
//
// A row opens a segment where expert or slot change, a tile every kTileRows rows of an expert, and a chunk where a segment
// with an adapter opens or kChunkRows rows of the expert have passed. Every list is the rows that open something, in
// order; its records are written by those rows (and their ends by the rows after them).
#pragma once
#include <cstdint>

#include "params.cuh"
#include "schedule/sort.cuh"

struct RowKey {
    uint32_t expert;
    int32_t slot;
};

// Rows of a tile of an expert with `rows` rows.
__device__ __forceinline__ uint32_t rows_of_tile(uint32_t rows, uint32_t most) {
    const uint32_t tiles = max(1u, (rows + most - 1) / most);
    return ((rows + tiles - 1) / tiles + 7) / 8 * 8;
}

struct Openings {
    bool segment, tile, chunk;
};

// height[e]: rows of a tile of expert e; first_tile[e]: how many tiles come before its first: those of experts with higher tiles,
// or equal ones and a lower number. Returns the number of all, in warps that have an expert. E * E / blockDim.x steps of a thread.
__device__ __forceinline__ uint32_t place_tiles(uint32_t experts, const uint32_t* starts, uint32_t most, uint32_t* height,
                                                uint32_t* first_tile) {
    uint32_t* packed = first_tile + experts;  // height and number of tiles
    __syncthreads();
    for (uint32_t e = threadIdx.x; e < experts; e += blockDim.x) {
        const uint32_t rows = starts[e + 1] - starts[e];
        height[e] = rows_of_tile(rows, most);
        packed[e] = rows == 0 ? 0 : height[e] << 22 | (rows + height[e] - 1) / height[e];
    }
    __syncthreads();
    uint32_t total = 0;
    for (uint32_t e = threadIdx.x / 32; e < experts; e += blockDim.x / 32) {
        const uint32_t mine = packed[e] >> 22;
        uint32_t before = 0, all = 0;
        for (uint32_t other = threadIdx.x % 32; other < experts; other += 32) {
            const uint32_t others = packed[other] >> 22, tiles = packed[other] & 0x3fffff;
            all += tiles;
            before += others > mine || (others == mine && other < e) ? tiles : 0;
        }
        total = __reduce_add_sync(kAllLanes, all);
        before = __reduce_add_sync(kAllLanes, before);
        if (threadIdx.x % 32 == 0) first_tile[e] = before;
    }
    __syncthreads();
    return total;
}

// expert_starts: shared [E + 1], first row of every expert and the number of rows; scratch: shared [3 E]. table: global [grid, 4].
// bad_slots: what this warp found, the same number in all lanes.
template <class KeyOfRow>
__device__ void build_lists(uint32_t num_rows, uint32_t experts, uint32_t most_tile_rows, uint32_t* scratch, uint32_t bad_slots, const uint32_t* expert_starts, KeyOfRow key_of_row, uint32_t* table,
                            uint32_t* barrier, Segment* segments, RowTile* tiles, Segment* chunks,
                            RouteCounts* counts) {
    __shared__ uint32_t warp_counts[4][kSortWarps];
    const uint32_t lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const WarpRange range(num_rows);
    const auto tile_rows = [&](uint32_t expert) { return most_tile_rows == 0 ? kTileRows : scratch[expert]; };

    // visit(row, key, slot before, openings) for every row of the warp, all lanes together; row >= end: no row.
    const auto for_rows = [&](auto visit) {
        RowKey last{~0u, -1};
        if (range.first > 0 && range.first < range.end) last = key_of_row(range.first - 1);
        for (uint32_t base = range.first; base < range.end; base += 32) {
            const uint32_t row = base + lane;
            const bool valid = row < range.end;
            const RowKey key = valid ? key_of_row(row) : RowKey{~0u, -1};
            RowKey before{__shfl_up_sync(kAllLanes, key.expert, 1), __shfl_up_sync(kAllLanes, key.slot, 1)};
            if (lane == 0) before = last;
            const uint32_t within = valid ? row - expert_starts[key.expert] : 1;
            Openings opens;
            opens.segment = valid && (key.expert != before.expert || key.slot != before.slot);
            opens.tile = valid && within % tile_rows(key.expert) == 0;
            opens.chunk = valid && key.slot >= 0 && (opens.segment || within % kChunkRows == 0);
            visit(row, valid, key, before, within, opens);
            last = RowKey{__shfl_sync(kAllLanes, key.expert, 31), __shfl_sync(kAllLanes, key.slot, 31)};
        }
    };

    // Thread 0's is the total: it has an expert.
    const uint32_t placed_tiles = most_tile_rows == 0 ? 0 : place_tiles(experts, expert_starts, most_tile_rows, scratch, scratch + experts);
    uint32_t found[3] = {0, 0, 0};
    for_rows([&](uint32_t, bool, RowKey, RowKey, uint32_t, Openings opens) {
        found[0] += __popc(__ballot_sync(kAllLanes, opens.segment));
        found[1] += __popc(__ballot_sync(kAllLanes, opens.tile));
        found[2] += __popc(__ballot_sync(kAllLanes, opens.chunk));
    });
    if (lane == 0) {
        for (int list = 0; list < 3; ++list) warp_counts[list][warp] = found[list];
        warp_counts[3][warp] = bad_slots;
    }
    __syncthreads();
    __shared__ uint32_t block_first[4], total[4];
    if (threadIdx.x < 4) {
        uint32_t sum = 0;
        for (int w = 0; w < kSortWarps; ++w) sum += warp_counts[threadIdx.x][w];
        block_first[threadIdx.x] = 0;
        total[threadIdx.x] = sum;
        if (gridDim.x > 1) table[blockIdx.x * 4 + threadIdx.x] = sum;
    }
    if (gridDim.x > 1) {
        grid_barrier(barrier);
        if (threadIdx.x < 4) {
            uint32_t before = 0, all = 0;
            for (uint32_t block = 0; block < gridDim.x; ++block) {
                const uint32_t count = __ldcg(table + block * 4 + threadIdx.x);
                before += block < blockIdx.x ? count : 0;
                all += count;
            }
            block_first[threadIdx.x] = before;
            total[threadIdx.x] = all;
        }
    }
    __syncthreads();
    if (blockIdx.x == 0 && threadIdx.x == 0) {
        counts->num_segments = total[0];
        counts->num_tiles = most_tile_rows == 0 ? total[1] : placed_tiles;
        counts->num_chunks = total[2];
        counts->bad_slots = total[3];
    }

    uint32_t next[3];
    for (int list = 0; list < 3; ++list) {
        next[list] = block_first[list];
        for (int w = 0; w < warp; ++w) next[list] += warp_counts[list][w];
    }
    for_rows([&](uint32_t row, bool valid, RowKey key, RowKey before, uint32_t within, Openings opens) {
        const uint32_t opened[3] = {__ballot_sync(kAllLanes, opens.segment), __ballot_sync(kAllLanes, opens.tile),
                                    __ballot_sync(kAllLanes, opens.chunk)};
        // Of every list: the records that opened before this row.
        const uint32_t segment = next[0] + __popc(opened[0] & lanes_below());
        const uint32_t tile = next[1] + __popc(opened[1] & lanes_below());
        const uint32_t chunk = next[2] + __popc(opened[2] & lanes_below());
        for (int list = 0; list < 3; ++list) next[list] += __popc(opened[list]);
        if (!valid) return;
        if (opens.segment) {
            segments[segment].expert = key.expert;
            segments[segment].slot = key.slot;
            segments[segment].first_row = row;
            if (row > 0) segments[segment - 1].end_row = row;
        }
        if (opens.tile) {
            const uint32_t rows = min(tile_rows(key.expert), expert_starts[key.expert + 1] - row);
            const uint32_t place = most_tile_rows == 0 ? tile : scratch[experts + key.expert] + within / tile_rows(key.expert);
            tiles[place] = RowTile{key.expert, row, rows, segment + opens.segment - 1};
        }
        if (opens.chunk) {
            chunks[chunk].expert = key.expert;
            chunks[chunk].slot = key.slot;
            chunks[chunk].first_row = row;
        }
        if (row > 0 && before.slot >= 0 && (opens.segment || opens.chunk)) chunks[chunk - 1].end_row = row;
        if (row == num_rows - 1) {
            segments[segment + opens.segment - 1].end_row = num_rows;
            if (key.slot >= 0) chunks[chunk + opens.chunk - 1].end_row = num_rows;
        }
    });
}
