// The lists of a batch of few pairs, made by every block for itself in shared memory: pairs sorted by (expert, slot), stable, each
// ranked by comparing itself with all others; row tiles, and LoRA chunks (rows of a tile with one adapter) with their entries.
#pragma once
#include <cstdint>

#include "params.cuh"
#include "ptx/mbarrier.cuh"

constexpr uint32_t kFewPairs = 128;
constexpr uint32_t kNoChunk = 0xffff;

struct FewTile {
    uint32_t expert, first_row, num_rows;
    uint16_t first_chunk, end_chunk;
};

struct FewChunk {
    uint16_t tile, first_row, end_row, slot;
};

struct FewLists {
    uint32_t keys[kFewPairs];  // of a pair: expert, slot + 1, pair; ~0: none
    uint16_t token[kFewPairs];  // of a row, and what else a row has
    uint16_t chunk[kFewPairs];
    uint32_t key[kFewPairs];
    uint32_t within[kFewPairs];  // its place among the rows of its expert
    float weight[kFewPairs];
    FewTile tiles[kFewPairs];
    FewChunk chunks[kFewPairs];
    AdapterEntry entries[kFewPairs][3];  // of a chunk
    uint32_t opens[4][kFewPairs / 32];   // rows that open a tile, a chunk, either or a segment, a segment
    uint32_t bad[kFewPairs / 32], known[kFewPairs / 32];  // pairs of a warp: with a bad expert | slot, with an expert
    uint32_t num_rows, num_tiles, num_chunks;

    // How many rows of a list there are up to this one, and where the next one is.
    __device__ __forceinline__ uint32_t through(uint32_t list, uint32_t row) const {
        uint32_t count = __popc(opens[list][row / 32] << (31 - row % 32));
        for (uint32_t i = 0; i < row / 32; ++i) count += __popc(opens[list][i]);
        return count;
    }
    __device__ __forceinline__ uint32_t next(uint32_t list, uint32_t row) const {
        uint32_t rest = row % 32 == 31 ? 0 : opens[list][row / 32] >> (row % 32 + 1) << (row % 32 + 1);
        for (uint32_t i = row / 32;;) {
            if (rest != 0) return i * 32 + __ffs(rest) - 1;
            if (++i == kFewPairs / 32) return num_rows;
            rest = opens[list][i];
        }
    }
    // Whether a row continues its token's row before: the token names the expert twice.
    __device__ __forceinline__ bool repeats(uint32_t row, uint32_t first) const { return row > first && token[row] == token[row - 1]; }
};

static_assert(sizeof(FewLists) == 14960, "FewLists");

// + 1; 0: none.
__device__ __forceinline__ uint32_t slot_of(uint32_t key) { return key >> 7 & 0x7fff; }

// The first kFewPairs threads of a block; the others know the lists after the next __syncthreads. Entries come later.
__device__ __forceinline__ void make_lists(const DecodeLayerParams& p, FewLists& s, uint32_t barrier) {
    const uint32_t thread = threadIdx.x, pairs = p.num_tokens * p.top_k, token = thread / p.top_k;
    uint32_t key = ~0u;
    float weight = 0.0f;
    bool bad_expert = false, bad_slot = false;
    if (thread < pairs) {
        const uint32_t expert = static_cast<uint32_t>(reinterpret_cast<const int32_t*>(p.topk_ids)[thread]);
        weight = reinterpret_cast<const float*>(p.topk_weights)[thread];
        uint32_t slot = 0;
        if (p.token_slots != 0) {
            const int32_t found = reinterpret_cast<const int32_t*>(p.token_slots)[token];
            const bool known = found >= 0 && found < static_cast<int32_t>(p.num_slots);
            bad_slot = !known && found != -1 && thread % p.top_k == 0;
            const auto* active = reinterpret_cast<const uint8_t*>(p.slot_active);
            slot = known && (active == nullptr || active[found] != 0) ? found + 1 : 0;
        }
        bad_expert = expert >= p.num_experts && expert != ~0u;
        if (expert < p.num_experts) key = expert << 22 | slot << 7 | thread;
    }
    s.keys[thread] = key;
    const uint32_t bad = __popc(__ballot_sync(~0u, bad_expert)) | __popc(__ballot_sync(~0u, bad_slot)) << 16;
    const uint32_t known = __popc(__ballot_sync(~0u, key != ~0u));
    if (thread % 32 == 0) {
        s.bad[thread / 32] = bad;
        s.known[thread / 32] = known;
    }
    named_barrier(barrier, kFewPairs);
    const uint32_t num_rows = s.known[0] + s.known[1] + s.known[2] + s.known[3], of_expert = key >> 22 << 22;
    uint32_t place = 0, start = 0;
    for (uint32_t i = 0; i < pairs; i += 4) {
        const uint4 other = *reinterpret_cast<const uint4*>(s.keys + i);
        place += (other.x < key) + (other.y < key) + (other.z < key) + (other.w < key);
        start += (other.x < of_expert) + (other.y < of_expert) + (other.z < of_expert) + (other.w < of_expert);
    }
    if (key != ~0u) {
        s.token[place] = static_cast<uint16_t>(token);
        s.key[place] = key;
        s.within[place] = place - start;
        s.weight[place] = weight;
    }
    named_barrier(barrier, kFewPairs);
    const uint32_t row = thread;
    const bool any = row < num_rows;
    const uint32_t slot = any ? slot_of(s.key[row]) : 0;
    const bool tile = any && s.within[row] % p.tile_rows == 0;
    const bool segment = any && (s.within[row] == 0 || slot != slot_of(s.key[row - 1]));
    const bool chunk = (tile || segment) && slot > 0;
    const uint32_t open_tiles = __ballot_sync(~0u, tile), open_chunks = __ballot_sync(~0u, chunk);
    const uint32_t open_segments = __ballot_sync(~0u, segment);
    if (thread % 32 == 0) {
        s.opens[0][thread / 32] = open_tiles;
        s.opens[1][thread / 32] = open_chunks;
        s.opens[2][thread / 32] = open_tiles | open_segments;
        s.opens[3][thread / 32] = open_segments;
    }
    if (thread == 0) s.num_rows = num_rows;
    named_barrier(barrier, kFewPairs);
    const uint32_t tiles = any ? s.through(0, row) : 0, chunks = any ? s.through(1, row) : 0;
    if (any) s.chunk[row] = static_cast<uint16_t>(slot > 0 ? chunks - 1 : kNoChunk);
    if (tile) {
        const uint32_t end = s.next(0, row), end_chunk = s.through(1, end - 1);
        s.tiles[tiles - 1] = FewTile{s.key[row] >> 22, row, end - row, static_cast<uint16_t>(chunks - chunk),
                                     static_cast<uint16_t>(end_chunk)};
    }
    if (chunk) {
        s.chunks[chunks - 1] = FewChunk{static_cast<uint16_t>(tiles - 1), static_cast<uint16_t>(row),
                                        static_cast<uint16_t>(s.next(2, row)), static_cast<uint16_t>(slot - 1)};
    }
    if (row + 1 == num_rows) {
        s.num_tiles = tiles;
        s.num_chunks = chunks;
    }
    if (thread == 0 && num_rows == 0) s.num_tiles = s.num_chunks = 0;
    if (thread == 0 && blockIdx.x == 0 && p.counts != 0) {
        const uint32_t last = kFewPairs - 1, bad_of_all = s.bad[0] + s.bad[1] + s.bad[2] + s.bad[3];
        *reinterpret_cast<RouteCounts*>(p.counts) = RouteCounts{
            num_rows, s.through(3, last), s.through(0, last), s.through(1, last), bad_of_all & 0xffff, bad_of_all >> 16, {0, 0}};
    }
}
