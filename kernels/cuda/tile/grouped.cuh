// One tile of a grouped product on Hopper: 128 weight rows of an expert times up to 256 of its tokens, over all of k, LoRA-B
// included, in f32 registers. A block is persistent and takes tile after tile.
//
// Three warpgroups share a block. The third one fills a ring of stages of 64 k each: weights by one TMA box, tokens by 128
// threads that copy 16 bytes of gathered rows at a time; no copied rows, no padding in global memory. The first two multiply
// 64 weight rows each by all tokens of the tile (wgmma, weights on the M side), in one product of up to 128 tokens or two.
// Narrow tiles need more stages to hide the latency of memory, and as their stages are smaller they get them: 4 to 8.
//
// LoRA is more k: the ranks of a tile's segments follow the base product through the same ring, 32 to a stage, B where
// weights lie and S where tokens lie, zeros in the tokens of other segments. S is a pair of 16-bit numbers (see params.cuh),
// the first in columns 0 to 31 and the second in 32 to 63, and B is multiplied with both. A stage is multiplied only with
// those halves of the tile that have tokens in its segments. A segment has whole steps of 16 ranks, so that a token's sums do not
// depend on what is beside it.
#pragma once
#include <cstdint>

#include "mma/number.cuh"
#include "params.cuh"
#include "ptx/async.cuh"
#include "ptx/mbarrier.cuh"
#include "ptx/tma.cuh"
#include "ptx/wgmma.cuh"
#include "tile/swizzle.cuh"

constexpr int kGroupedThreads = 384;
constexpr int kGroupedStages = 8;  // at most
constexpr int kGroupedTokens = 256;
constexpr int kGroupedWeights = 128;
constexpr uint32_t kWeightStageBytes = kGroupedWeights * kTileRowBytes;
constexpr uint32_t kRingBytes = 4 * (kWeightStageBytes + kGroupedTokens * kTileRowBytes);
constexpr uint32_t kStagedBytes = 16384;  // of a consumer warpgroup: finished values on their way out
constexpr int kGroupedShared =
    1024 + kRingBytes + kGroupedStages * (16 + 16 + 4) + 2 * kStagedBytes + kGroupedTokens * 4 + 4;
constexpr uint32_t kTilesTogether = 4;  // at most, whose feature blocks run side by side

// How many tiles take turns, block of features by block of features. As few as keep about kTilesTogether of them running at once:
// neighbours on the GPU then read the same tokens, and the tiles of an expert, which follow each other, still share its weights.
__device__ __forceinline__ uint32_t tiles_together(uint32_t blocks, uint32_t running) {
    return min(kTilesTogether, (kTilesTogether * blocks + running - 1) / running);
}

// Tokens of a product; a tile of more than 128 rows is two products.
__device__ __forceinline__ uint32_t tile_halves(uint32_t rows) { return rows > 128 ? 2 : 1; }
__device__ __forceinline__ uint32_t half_width(uint32_t rows) {
    return rows > 128 ? (rows + 15) / 16 * 8 : (rows + 15) / 16 * 16;
}

// What a consumer has to know of a tile; no rows: there are no more tiles.
struct TileJob {
    uint32_t first_row, num_rows, first_feature, expert;
};

// Shared addresses.
struct Ring {
    uint32_t slots, staged, jobs, full, empty, lora, rows, next;

    __device__ explicit Ring(const char* shared) {
        slots = (shared_address(shared) + 1023) & ~1023u;
        staged = slots + kRingBytes;
        jobs = staged + 2 * kStagedBytes;
        full = jobs + kGroupedStages * 16;
        empty = full + kGroupedStages * 8;
        lora = empty + kGroupedStages * 8;
        rows = lora + kGroupedStages * 4;
        next = rows + kGroupedTokens * 4;
    }
    __device__ void init() const {
        if (threadIdx.x == 0) {
            for (int i = 0; i < kGroupedStages; ++i) {
                mbarrier_init(full + 8 * i, 1 + 128);
                mbarrier_init(empty + 8 * i, 2);
            }
            fence_mbarrier_init();
        }
        __syncthreads();
    }
};

// Where a warpgroup is in the ring. Fills are counted over all tiles and take the barriers in turns; the slots' size and number
// follow the tile's width, and begin anew where that changes.
struct RingPlace {
    uint32_t fill = 0, first = 0, slot = 0, stages = 0, bytes = 0;

    // Returns whether the slots change.
    __device__ __forceinline__ bool lay_out(uint32_t rows) {
        const uint32_t width = rows <= 64 ? 64 : rows <= 128 ? 128 : rows <= 176 ? 176 : 256;
        const uint32_t count = rows <= 64 ? 8 : rows <= 128 ? 6 : rows <= 176 ? 5 : 4;
        if (count == stages) return false;
        stages = count;
        bytes = kWeightStageBytes + width * kTileRowBytes;
        first = fill;
        slot = 0;
        return true;
    }
    __device__ __forceinline__ void advance() {
        ++fill;
        if (++slot == stages) slot = 0;
    }
    __device__ __forceinline__ uint32_t index() const { return fill % kGroupedStages; }
    __device__ __forceinline__ uint32_t weights(const Ring& ring) const { return ring.slots + slot * bytes; }
    __device__ __forceinline__ uint32_t tokens(const Ring& ring) const { return weights(ring) + kWeightStageBytes; }
    __device__ __forceinline__ uint32_t full(const Ring& ring) const { return ring.full + 8 * index(); }
    __device__ __forceinline__ void wait_full(const Ring& ring) const { mbarrier_wait(full(ring), fill / kGroupedStages % 2); }
    // Until the consumers are done with the fill that was `ago` fills before this one.
    __device__ __forceinline__ void wait_empty(const Ring& ring, uint32_t ago) const {
        const uint32_t which = fill - ago;
        mbarrier_wait(ring.empty + 8 * (which % kGroupedStages), which / kGroupedStages % 2);
    }
    __device__ __forceinline__ void acquire(const Ring& ring) const {
        if (fill - first >= stages) wait_empty(ring, stages);
    }
};

__device__ __forceinline__ void store_shared4(uint32_t at, uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
    asm volatile("st.shared.v4.b32 [%0], {%1,%2,%3,%4};" ::"r"(at), "r"(a), "r"(b), "r"(c), "r"(d) : "memory");
}
__device__ __forceinline__ void store_shared1(uint32_t at, uint32_t a) {
    asm volatile("st.shared.b32 [%0], %1;" ::"r"(at), "r"(a) : "memory");
}
__device__ __forceinline__ uint32_t load_shared1(uint32_t at) {
    uint32_t a;
    asm volatile("ld.shared.b32 %0, [%1];" : "=r"(a) : "r"(at) : "memory");
    return a;
}
__device__ __forceinline__ void cp_async_sized(uint32_t shared, const void* global, uint32_t bytes) {
    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(shared), "l"(global), "r"(bytes) : "memory");
}
// A stage of LoRA in one word: steps of 16 ranks, halves of the tile, whether it is the tile's last stage.
__device__ __forceinline__ uint32_t lora_word(uint32_t steps, uint32_t halves, bool last) {
    return steps | halves << 4 | (last ? 256u : 0u);
}

// The segments of a tile, a lane each, up to 32 at a time.
struct LanePart {
    uint64_t b[2];
    uint32_t octets[2];  // groups of eight ranks
    uint32_t rows;       // first | end << 16, in the tile
    uint32_t end;        // octets of this and all parts before, an even number each
};

// Problem: depth, token_row(row), tokens, load_weights(...), features, kProjections, kFirstProjection, and the fields of LoRA.
template <class T, class Problem>
struct Producer {
    const Problem& p;
    const Ring& ring;
    RingPlace at;
    uint32_t thread, row0, chunk, write;

    __device__ Producer(const Problem& problem, const Ring& r) : p(problem), ring(r) {
        thread = threadIdx.x - 256;
        row0 = thread / 8;
        chunk = thread % 8;
        write = swizzled(row0, chunk);
    }

    // Where the rows of a tile begin, in 16 bytes from the first: two a thread.
    __device__ __forceinline__ void place_rows(const RowTile& tile) const {
        for (uint32_t i = thread; i < kGroupedTokens; i += 128) {
            const uint32_t row = tile.first_row + min(i, tile.num_rows - 1);
            store_shared1(ring.rows + 4 * i, p.token_row(row) * (p.depth() / 8));
        }
    }

    __device__ __forceinline__ void base(const TileJob& job) {
        const uint32_t width = tile_halves(job.num_rows) * half_width(job.num_rows);
        uint32_t from[16];
#pragma unroll
        for (int i = 0; i < 16; ++i) from[i] = load_shared1(ring.rows + 4 * (row0 + 16 * i)) + chunk;
        const uint4* tokens = reinterpret_cast<const uint4*>(p.tokens());
        if (at.lay_out(job.num_rows) && at.fill > 0) at.wait_empty(ring, 1);
#pragma unroll 1
        for (uint32_t k = 0; k < p.depth(); k += 64) {
            at.acquire(ring);
            const uint32_t full = at.full(ring);
            if (thread == 0) {
                if (k == 0) {
                    store_shared4(ring.jobs + 16 * at.index(), job.first_row, job.num_rows, job.first_feature, job.expert);
                }
                mbarrier_expect(full, kWeightStageBytes);
                p.load_weights(at.weights(ring), full, k, job);
            }
            const uint32_t to = at.tokens(ring) + write;
            const uint32_t bytes = k + chunk * 8 < p.depth() ? 16 : 0;
#pragma unroll
            for (int i = 0; i < 16; ++i) {
                if (16 * i >= width) break;
                cp_async_sized(to + i * 16 * kTileRowBytes, tokens + from[i], bytes);
            }
            tokens += 8;
            cp_async_arrive(full);
            at.advance();
        }
    }

    // Reads the segment that this lane answers for; rank 0 where there is none.
    __device__ __forceinline__ bool part(LanePart& part, const TileJob& job, uint32_t index, uint32_t num_segments) const {
        part = LanePart{{0, 0}, {0, 0}, 0, 0};
        Segment segment{0, -1, ~0u, ~0u};
        if (index < num_segments) segment = reinterpret_cast<const Segment*>(p.segments())[index];
        const bool in_tile = index < num_segments && segment.first_row < job.first_row + job.num_rows;
        if (in_tile && segment.slot >= 0) {
            const auto* entry = reinterpret_cast<const AdapterEntry*>(p.adapters()) +
                                (static_cast<size_t>(segment.slot) * p.num_experts() + segment.expert) * 3 +
                                Problem::kFirstProjection;
#pragma unroll
            for (int i = 0; i < Problem::kProjections; ++i) {
                part.b[i] = entry[i].b;
                part.octets[i] = (entry[i].rank + 7) / 8;
            }
            const uint32_t first = max(segment.first_row, job.first_row) - job.first_row;
            part.rows = first | (min(segment.end_row - job.first_row, job.num_rows) << 16);
        }
        part.end = (part.octets[0] + part.octets[1] + 1) / 2 * 2;
#pragma unroll
        for (int d = 1; d < 32; d *= 2) {
            const uint32_t before = __shfl_up_sync(~0u, part.end, d);
            if (threadIdx.x % 32 >= d) part.end += before;
        }
        return in_tile;
    }

    // Ranks [8 i, 8 i + 8) of a stage are octet `octet` of all, i = chunk % 4; chunks 0 to 3 of a token are the first numbers of S.
    __device__ __forceinline__ void lora_stage(const LanePart& mine, const TileJob& job, uint32_t octet, uint32_t total,
                                               uint32_t& index, bool last) {
        bool exists = octet < total;
        const uint32_t wanted = exists ? octet : total - 1;
        while (true) {
            const bool behind = total != 0 && wanted >= __shfl_sync(~0u, mine.end, index);
            if (!__any_sync(~0u, behind)) break;
            index += behind;
        }
        const uint32_t octets = __shfl_sync(~0u, mine.octets[0], index), octets_of_up = __shfl_sync(~0u, mine.octets[1], index);
        const uint32_t rows = __shfl_sync(~0u, mine.rows, index);
        const uint32_t end_of_part = __shfl_sync(~0u, mine.end, index);
        uint32_t local = wanted - (end_of_part - (octets + octets_of_up + 1) / 2 * 2);
        uint64_t b = __shfl_sync(~0u, mine.b[0], index);
        exists = exists && local < octets + octets_of_up;
        const uint32_t projection = Problem::kProjections == 2 && local >= octets;
        if (Problem::kProjections == 2) {
            const uint64_t other = __shfl_sync(~0u, mine.b[1], index);
            b = projection ? other : b;
            local -= projection ? octets : 0;
        }
        const uint32_t rank8 = 8 * (projection ? octets_of_up : octets);
        const uint32_t first = exists ? rows & 0xffff : 0, end = exists ? rows >> 16 : 0;  // no row: zeros
        const uint32_t half = half_width(job.num_rows), width = tile_halves(job.num_rows) * half;
        const uint32_t halves = __reduce_or_sync(~0u, exists ? (first < half ? 1u : 0u) | (end > half ? 2u : 0u) : 0u);
        const uint32_t here = min(4u, total - min(total, octet - chunk % 4)), steps = (here + 1) / 2;

        at.acquire(ring);
        if (chunk % 4 < 2 * steps) {
            const uint32_t* s = reinterpret_cast<const uint32_t*>(p.shrunk()) + projection * p.max_rank() + local * 8 + chunk / 4 * 4;
            const uint32_t to = at.tokens(ring) + write;
#pragma unroll
            for (int i = 0; i < 16; ++i) {
                if (16 * i >= width) break;
                const uint32_t row = row0 + 16 * i;
                if (!((halves & 1) && 16 * i < half) && !((halves & 2) && 16 * i + 16 > half)) continue;
                const uint32_t bytes = row >= first && row < end ? 16 : 0;
                cp_async_sized(to + i * 16 * kTileRowBytes,
                               s + static_cast<size_t>(job.first_row + row) * p.shrunk_stride(), bytes);
            }
            // The threads of chunks 4 to 7 take every other row of B.
            const T* from = reinterpret_cast<const T*>(b) + local * 8;
            const uint32_t left = at.weights(ring) + swizzled(row0, chunk % 4);
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const uint32_t group = 2 * i + chunk / 4;  // of 16 rows
                const uint32_t feature = job.first_feature + (Problem::kProjections == 2 ? 8 * group + row0 % 8 : row0 + 16 * group);
                const bool valid = exists && feature < p.features() && (Problem::kProjections == 1 || row0 / 8 == projection);
                cp_async_sized(left + group * 16 * kTileRowBytes, from + static_cast<size_t>(feature) * rank8, valid ? 16 : 0);
            }
        }
        if (thread == 0) {
            store_shared1(ring.lora + 4 * at.index(), lora_word(steps, halves, last));
            mbarrier_arrive(at.full(ring));
        }
        cp_async_arrive(at.full(ring));
        at.advance();
    }

    __device__ __forceinline__ void lora(const TileJob& job, uint32_t first_segment, uint32_t num_segments) {
        for (bool more = true; more;) {
            LanePart mine;
            const uint32_t lane = threadIdx.x % 32;
            const bool in_tile = part(mine, job, first_segment + lane, num_segments);
            first_segment += 32;
            more = __all_sync(~0u, in_tile);
            const uint32_t total = __shfl_sync(~0u, mine.end, 31);
            const uint32_t stages = max((total + 3) / 4, more ? 0u : 1u);
            uint32_t index = 0;
#pragma unroll 1
            for (uint32_t s = 0; s < stages; ++s) {
                lora_stage(mine, job, s * 4 + chunk % 4, total, index, !more && s + 1 == stages);
            }
        }
    }


    // Tiles come with their blocks of features, some tiles side by side. While an item is on its way its successor is
    // claimed and looked up.
    __device__ __forceinline__ void run() {
        if (p.adapters() == 0) wait_for_previous_launch();
        const RouteCounts counts = *reinterpret_cast<const RouteCounts*>(p.counts());
        const uint32_t blocks = (p.features() + Problem::kFeatures - 1) / Problem::kFeatures;
        const uint32_t items = counts.num_tiles * blocks;
        const uint32_t most_together = tiles_together(blocks, gridDim.x);
        const auto tile_of = [&](uint32_t item, uint32_t& first_feature) {
            const uint32_t group = item / (most_together * blocks), within = item - group * (most_together * blocks);
            const uint32_t together = min(most_together, counts.num_tiles - group * most_together);
            const uint32_t block = within / together;
            first_feature = block * Problem::kFeatures;
            return reinterpret_cast<const RowTile*>(p.tiles())[group * most_together + within - block * together];
        };
        // Blocks take items off one list. Each block comes too late once, and the last of them leaves zero.
        const auto claim = [&] { return thread == 0 ? atomicAdd(p.claimed(), 1) : 0; };
        const auto share = [&](uint32_t item) {
            if (thread == 0) {
                store_shared1(ring.next, item);
                if (item == items + gridDim.x - 1) *p.claimed() = 0;
            }
            named_barrier(3, 128);
            return load_shared1(ring.next);
        };
        bool waited = false;
        uint32_t item = share(claim()), first_feature = 0;
        RowTile tile{};
        if (item < items) {
            tile = tile_of(item, first_feature);
            place_rows(tile);
        }
#pragma unroll 1
        while (item < items) {
            named_barrier(3, 128);  // the rows are placed
            const TileJob job{tile.first_row, tile.num_rows, first_feature, tile.expert};
            const uint32_t first_segment = tile.first_segment;
            const uint32_t claimed = claim();
            base(job);
            item = share(claimed);
            if (item < items) tile = tile_of(item, first_feature);
            if (p.adapters() != 0) {
                if (!waited) wait_for_previous_launch();
                waited = true;
                lora(job, first_segment, counts.num_segments);
            }
            if (item < items) place_rows(tile);
        }
        if (at.fill > 0) at.acquire(ring);
        if (thread == 0) {
            store_shared4(ring.jobs + 16 * at.index(), 0, 0, 0, 0);
            mbarrier_arrive(at.full(ring));
        }
        cp_async_arrive(at.full(ring));
        cp_async_wait<0>();
        wait_for_previous_launch();
    }
};

// The sums of one tile are sum[half], of a warpgroup's 64 weight rows. 16 of k:
template <class T, int kWidth, bool kPair>
__device__ __forceinline__ void multiply_step(float (&sum)[2][64], uint64_t weights, uint64_t tokens, uint32_t halves) {
    if (!kPair || (halves & 1)) Wgmma<T, kWidth>::mma(sum[0], weights, tokens);
    if (kPair && (halves & 2)) Wgmma<T, kWidth>::mma(sum[1], weights, tokens + kWidth * kTileRowBytes / 16);
}

template <class T, int kWidth, bool kPair>
__device__ __forceinline__ void multiply_tile(float (&sum)[2][64], const Ring& ring, RingPlace& at, uint32_t steps, bool lora) {
    const uint32_t group = threadIdx.x / 128;
    uint32_t before = 0;
    const auto stage = [&](bool first, auto multiply) {
        fence_async_shared();
        wgmma_fence();
        multiply(wgmma_descriptor(at.weights(ring) + group * 64 * kTileRowBytes), wgmma_descriptor(at.tokens(ring)));
        wgmma_commit();
        wgmma_wait<1>();
        if (!first && threadIdx.x % 128 == 0) mbarrier_arrive(ring.empty + 8 * before);
        before = at.index();
        at.advance();
    };
#pragma unroll 1
    for (uint32_t i = 0; i < steps; ++i) {
        at.wait_full(ring);
        stage(i == 0, [&](uint64_t weights, uint64_t tokens) {
#pragma unroll
            for (int k = 0; k < 4; ++k) multiply_step<T, kWidth, kPair>(sum, weights + 2 * k, tokens + 2 * k, 3);
        });
    }
#pragma unroll 1
    for (bool more = lora; more;) {
        at.wait_full(ring);
        const uint32_t word = __shfl_sync(~0u, load_shared1(ring.lora + 4 * at.index()), 0);  // uniform: wgmma may not diverge
        more = (word & 256) == 0;
        stage(false, [&](uint64_t weights, uint64_t tokens) {
            const uint32_t steps = word & 7, halves = word >> 4 & 3;
#pragma unroll
            for (uint32_t k = 0; k < 2; ++k) {
                if (k >= steps) continue;
                multiply_step<T, kWidth, kPair>(sum, weights + 2 * k, tokens + 2 * k, halves);
                multiply_step<T, kWidth, kPair>(sum, weights + 2 * k, tokens + 4 + 2 * k, halves);
            }
        });
    }
    wgmma_wait<0>();
    if (threadIdx.x % 128 == 0) mbarrier_arrive(ring.empty + 8 * before);
}

template <class T>
__device__ __forceinline__ void multiply(float (&sum)[2][64], const Ring& ring, RingPlace& at, const TileJob& job,
                                         uint32_t steps, bool lora) {
    const uint32_t width = half_width(job.num_rows);
    if (tile_halves(job.num_rows) == 1) {
        switch (width / 16) {
            case 1: return multiply_tile<T, 16, false>(sum, ring, at, steps, lora);
            case 2: return multiply_tile<T, 32, false>(sum, ring, at, steps, lora);
            case 3: return multiply_tile<T, 48, false>(sum, ring, at, steps, lora);
            case 4: return multiply_tile<T, 64, false>(sum, ring, at, steps, lora);
            case 5: return multiply_tile<T, 80, false>(sum, ring, at, steps, lora);
            case 6: return multiply_tile<T, 96, false>(sum, ring, at, steps, lora);
            case 7: return multiply_tile<T, 112, false>(sum, ring, at, steps, lora);
            default: return multiply_tile<T, 128, false>(sum, ring, at, steps, lora);
        }
    }
    switch (width / 8) {
        case 9: return multiply_tile<T, 72, true>(sum, ring, at, steps, lora);
        case 10: return multiply_tile<T, 80, true>(sum, ring, at, steps, lora);
        case 11: return multiply_tile<T, 88, true>(sum, ring, at, steps, lora);
        case 12: return multiply_tile<T, 96, true>(sum, ring, at, steps, lora);
        case 13: return multiply_tile<T, 104, true>(sum, ring, at, steps, lora);
        case 14: return multiply_tile<T, 112, true>(sum, ring, at, steps, lora);
        case 15: return multiply_tile<T, 120, true>(sum, ring, at, steps, lora);
        default: return multiply_tile<T, 128, true>(sum, ring, at, steps, lora);
    }
}

template <class T, class Problem>
__device__ __forceinline__ void grouped_product(const Problem& problem, char* shared) {
    const Ring ring(shared);
    ring.init();
    const uint32_t group = __shfl_sync(~0u, threadIdx.x / 128, 0);
    if (group == 2) {
        registers_dec<88>();
        Producer<T, Problem>(problem, ring).run();
        return;
    }
    registers_inc<208>();
    RingPlace at;
    const uint32_t steps = (problem.depth() + 63) / 64;
    while (true) {
        at.wait_full(ring);
        const uint4 words = load_shared16(ring.jobs + 16 * at.index());
        const TileJob job{words.x, words.y, words.z, words.w};
        if (job.num_rows == 0) return;
        at.lay_out(job.num_rows);
        float sum[2][64];
#pragma unroll
        for (int i = 0; i < 64; ++i) sum[0][i] = sum[1][i] = 0.0f;
        multiply<T>(sum, ring, at, job, steps, problem.adapters() != 0);
        problem.finish(sum, job, ring.staged + group * kStagedBytes, group);
    }
}
