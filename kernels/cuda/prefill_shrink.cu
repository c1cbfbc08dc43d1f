// moe_lora_prefill_shrink_{bf16,f16}: s = scale * A x, the narrow half of LoRA, beside the products for experts with many rows
// (Hopper). The same numbers as moe_lora_shrink in the format `octets`, summed in another order.
//
// input [*, K] (row = row_pair / top_k for gate and up; row for down), A [rank8, K] of each projection -> shrunk
// [rows, shrunk_stride], projection p from column p * max_rank on, rank8 columns written.
//
// Every block takes as much of the rows as every other, in order, cut into pieces of one segment (expert and slot), and up to 64
// ranks at a time, gate's then up's. A scout warp looks pieces up ahead of all others; two warpgroups copy their rows and their A,
// 64 k a stage, into a ring that runs through all pieces; two others multiply (wgmma, tokens on the M side, ranks on the N side).
// Every row's sum goes along k in order: it depends on nothing but the row.
// Cost: every row read once per 64 ranks and A once a piece, at the rate of L2 where the rows fit there.
// Limits: sm_90a; K a multiple of 8; grid: any, of kPiecesThreads; kPiecesShared bytes of dynamic shared memory.
#if !defined(__CUDA_ARCH__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
#include "mma/number.cuh"
#include "params.cuh"
#include "ptx/async.cuh"
#include "ptx/mbarrier.cuh"
#include "ptx/wgmma.cuh"
#include "tile/swizzle.cuh"

namespace {

constexpr int kCopyWarps = 8;
constexpr int kPiecesThreads = (8 + kCopyWarps + 1) * 32;  // two warpgroups that multiply, those that copy, the scout
constexpr int kPieceRows = 256;  // at most
constexpr int kPieceRanks = 64;  // at most
constexpr int kPiecesAhead = 4;
constexpr int kPiecesStages = 24;  // at most
constexpr uint32_t kPiecesRing = 216 * 1024;

// Rows of one segment and some of its ranks; no rows: there are no more pieces.
struct PieceHead {
    uint32_t first_row, num_rows;
    uint32_t first_octet, octets;  // of eight ranks each; gate's come before up's
    uint32_t octets_of[2];         // all that gate has, and up
    float scale[2];
    uint64_t a[2];
};
struct Piece : PieceHead {
    uint32_t from[kPieceRows];  // where the rows begin, in 16 bytes
};
static_assert(sizeof(Piece) == 1072, "Piece");

struct PiecesShared {
    Piece pieces[kPiecesAhead];
    uint64_t known[kPiecesAhead], done[kPiecesAhead];
    uint64_t full[kPiecesStages], empty[kPiecesStages];
};
constexpr int kPiecesShared = 1024 + kPiecesRing + sizeof(PiecesShared);

// How the ring is cut, for a whole launch: by how many rows segments have on average, and by the ranks there can be.
struct PiecesRing {
    uint32_t slots, rows, ranks, stages;
    uint32_t extra;  // what a segment costs beside its rows, in rows (as seen on an H100; no result depends on it)

    __device__ PiecesRing(const PrefillShrinkParams& p, const RouteCounts& counts, const char* shared) {
        const uint32_t mean = counts.num_rows / max(1u, counts.num_segments), most = p.num_projections * p.max_rank;
        slots = (shared_address(shared) + 1023) & ~1023u;
        rows = mean <= 48 ? 64 : mean <= 100 ? 128 : kPieceRows;
        extra = rows / 2;
        ranks = most <= 16 ? 16 : most <= 32 ? 32 : kPieceRanks;
        stages = min(static_cast<uint32_t>(kPiecesStages), kPiecesRing / ((rows + ranks) * kTileRowBytes));
    }
};

// A place in a ring of barriers, and whether its phase is an odd one.
struct PiecesPlace {
    uint32_t slot = 0, phase = 0;

    __device__ __forceinline__ void advance(uint32_t slots) {
        if (++slot == slots) {
            slot = 0;
            phase ^= 1;
        }
    }
};

// The first segment that has work behind `place`, where each counts as its rows and `extra` more. All threads of the block.
__device__ __forceinline__ uint32_t find_segment(const Segment* segments, uint32_t count, uint32_t extra, uint32_t place) {
    uint32_t first = 0, left = count;
    while (left > 0) {
        const uint32_t step = (left + kPiecesThreads - 1) / kPiecesThreads, last = (threadIdx.x + 1) * step;
        const bool before = last <= left && segments[first + last - 1].end_row + (first + last) * extra <= place;
        const uint32_t passed = __syncthreads_count(before) * step;
        first += passed;
        left = min(left - passed, step - 1);
    }
    return first;
}

struct Scout {
    const PrefillShrinkParams& p;
    PiecesShared& shared;
    const PiecesRing& ring;
    PiecesPlace at;

    // Announces a piece; `head` is the same in all lanes.
    __device__ __forceinline__ void announce(const PieceHead& head) {
        const uint32_t lane = threadIdx.x % 32;
        Piece& piece = shared.pieces[at.slot];
        mbarrier_wait(shared_address(&shared.done[at.slot]), at.phase ^ 1);
        const auto* row_pair = reinterpret_cast<const uint32_t*>(p.row_pair);
        for (uint32_t i = lane; i < head.num_rows; i += 32) {
            const uint32_t row = head.first_row + i;
            piece.from[i] = (row_pair != nullptr ? row_pair[row] / p.top_k : row) * (p.width / 8);
        }
        if (lane == 0) static_cast<PieceHead&>(piece) = head;
        __syncwarp();
        if (lane == 0) mbarrier_arrive(shared_address(&shared.known[at.slot]));
        at.advance(kPiecesAhead);
    }

    // The pieces of work [first, end), 32 segments at a time, a lane each.
    __device__ __forceinline__ void run(uint32_t index, uint32_t num_segments, uint32_t first, uint32_t end) {
        const uint32_t lane = threadIdx.x % 32;
        PieceHead head;
        for (bool more = true; more; index += 32) {
            Segment mine{0, -1, ~0u, ~0u};
            if (index + lane < num_segments) mine = reinterpret_cast<const Segment*>(p.segments)[index + lane];
            const uint32_t skipped = (index + lane + 1) * ring.extra;  // what of a place is not rows
            more = __all_sync(~0u, mine.first_row < end && mine.first_row + skipped - ring.extra < end);
            // Its rows behind `first` and before `end`.
            mine.first_row = min(mine.end_row, max(mine.first_row, first - min(first, skipped)));
            mine.end_row = min(mine.end_row, max(mine.first_row, end - min(end, skipped)));
            const bool any = mine.slot >= 0 && mine.first_row < mine.end_row;
            AdapterEntry entry[2] = {};
            if (any) {
                const auto* table = reinterpret_cast<const AdapterEntry*>(p.adapters) +
                                    (static_cast<size_t>(mine.slot) * p.num_experts + mine.expert) * 3 + p.first_projection;
                entry[0] = table[0];
                if (p.num_projections == 2) entry[1] = table[1];
            }
            const uint32_t octets = (entry[0].rank + 7) / 8 + (entry[1].rank + 7) / 8;
            for (uint32_t with_ranks = __ballot_sync(~0u, octets != 0); with_ranks != 0; with_ranks &= with_ranks - 1) {
                const uint32_t from = __ffs(with_ranks) - 1;
#pragma unroll
                for (int i = 0; i < 2; ++i) {
                    head.octets_of[i] = (__shfl_sync(~0u, entry[i].rank, from) + 7) / 8;
                    head.scale[i] = __shfl_sync(~0u, entry[i].scale, from);
                    head.a[i] = __shfl_sync(~0u, entry[i].a, from);
                }
                const uint32_t all = head.octets_of[0] + head.octets_of[1];
                const uint32_t begin = __shfl_sync(~0u, mine.first_row, from), stop = __shfl_sync(~0u, mine.end_row, from);
                const uint32_t pieces = (stop - begin + ring.rows - 1) / ring.rows;
                const uint32_t rows = ((stop - begin + pieces - 1) / pieces + 7) / 8 * 8;
                for (uint32_t row = begin; row < stop; row += rows) {
                    for (uint32_t octet = 0; octet < all; octet += ring.ranks / 8) {
                        head.first_row = row;
                        head.num_rows = min(rows, stop - row);
                        head.first_octet = octet;
                        head.octets = min(ring.ranks / 8, all - octet);
                        announce(head);
                    }
                }
            }
        }
        head.num_rows = 0;
        announce(head);
    }
};

// 16 bytes if `valid`, zeros if they do not exist.
__device__ __forceinline__ void copy16(uint32_t to, uint64_t from, uint32_t valid, uint32_t bytes) {
    asm volatile(
        "{\n.reg .pred p;\nsetp.ne.u32 p, %2, 0;\n@p cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %3;\n}" ::"r"(to), "l"(from),
        "r"(valid), "r"(bytes)
        : "memory");
}

// Copies all pieces, stage after stage. A thread takes 16 bytes of every kStep-th row; little else may be done per copy.
__device__ __forceinline__ void copy_pieces(const PrefillShrinkParams& p, PiecesShared& shared, const PiecesRing& ring) {
    constexpr int kStep = kCopyWarps * 4;
    const uint32_t thread = threadIdx.x - 256, row0 = thread / 8, chunk = thread % 8;
    const uint32_t write = swizzled(row0, chunk), slot_bytes = (ring.rows + ring.ranks) * kTileRowBytes;
    PiecesPlace at, piece_at;
    while (true) {
        const Piece& piece = shared.pieces[piece_at.slot];
        mbarrier_wait(shared_address(&shared.known[piece_at.slot]), piece_at.phase);
        const uint32_t rows = piece.num_rows;
        if (rows == 0) break;
        uint32_t from[kPieceRows / kStep], valid_rows = 0, valid_ranks = 0;
#pragma unroll
        for (int i = 0; i < kPieceRows / kStep; ++i) {
            const uint32_t row = row0 + kStep * i;
            from[i] = row < rows ? piece.from[row] + chunk : 0;
            valid_rows |= (row < rows) << i;
        }
        uint64_t a[kPieceRanks / kStep];
#pragma unroll
        for (int i = 0; i < kPieceRanks / kStep; ++i) {
            const uint32_t octet = (row0 + kStep * i) / 8, of_all = piece.first_octet + octet;
            const uint32_t up = of_all >= piece.octets_of[0];
            const uint64_t rank = 8 * (of_all - (up ? piece.octets_of[0] : 0)) + row0 % 8;
            a[i] = piece.a[up] + 2 * (rank * p.width + chunk * 8);
            valid_ranks |= (octet < piece.octets) << i;
        }
        __syncwarp();
        if (thread % 32 == 0) mbarrier_arrive(shared_address(&shared.done[piece_at.slot]));
        piece_at.advance(kPiecesAhead);
        uint64_t input = p.input;
#pragma unroll 1
        for (uint32_t k = 0; k < p.width; k += 64) {
            const uint32_t to = ring.slots + at.slot * slot_bytes + write, bytes = k + chunk * 8 < p.width ? 16 : 0;
            mbarrier_wait(shared_address(&shared.empty[at.slot]), at.phase ^ 1);
#pragma unroll
            for (int i = 0; i < kPieceRanks / kStep; ++i) {
                copy16(to + (ring.rows + kStep * i) * kTileRowBytes, a[i], valid_ranks & 1u << i, bytes);
                a[i] += 128;
            }
#pragma unroll
            for (int i = 0; i < kPieceRows / kStep; ++i) {
                if (i % 2 == 0 && kStep * i >= rows) break;
                copy16(to + kStep * i * kTileRowBytes, input + static_cast<uint64_t>(from[i]) * 16, valid_rows & 1u << i, bytes);
            }
            cp_async_arrive(shared_address(&shared.full[at.slot]));
            input += 128;
            at.advance(ring.stages);
        }
    }
    cp_async_wait<0>();
}

// The sums of this warpgroup's tiles of 64 rows by kRanks ranks of a piece, and their way out. What the ring has beyond the piece's
// rows and ranks may be anything: it ends in sums that nobody stores.
template <class T, int kRanks>
__device__ __forceinline__ void multiply_piece(const PrefillShrinkParams& p, PiecesShared& shared, const PiecesRing& ring,
                                               const Piece& piece, PiecesPlace& at) {
    const uint32_t group = threadIdx.x / 128, bytes = (ring.rows + ring.ranks) * kTileRowBytes;
    const uint32_t tiles = (piece.num_rows + 63) / 64;
    const uint32_t mine = __shfl_sync(~0u, tiles > group ? (tiles - group + 1) / 2 : 0, 0);  // uniform: wgmma may not diverge
    float sum[2][kRanks / 2];
#pragma unroll
    for (int i = 0; i < kRanks / 2; ++i) sum[0][i] = sum[1][i] = 0.0f;
    uint32_t before = 0;
#pragma unroll 1
    for (uint32_t k = 0; k < p.width; k += 64) {
        mbarrier_wait(shared_address(&shared.full[at.slot]), at.phase);
        const uint32_t slot = ring.slots + at.slot * bytes;
        const uint64_t ranks = wgmma_descriptor(slot + ring.rows * kTileRowBytes);
        const uint64_t rows = wgmma_descriptor(slot + group * 64 * kTileRowBytes);
        fence_async_shared();
        wgmma_fence();
#pragma unroll
        for (int tile = 0; tile < 2; ++tile) {
            if (tile >= mine) break;
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                Wgmma<T, kRanks>::mma(sum[tile], rows + tile * (128 * kTileRowBytes / 16) + 2 * i, ranks + 2 * i);
            }
        }
        wgmma_commit();
        wgmma_wait<1>();
        if (k != 0 && threadIdx.x % 32 == 0) mbarrier_arrive(shared_address(&shared.empty[before]));
        before = at.slot;
        at.advance(ring.stages);
    }
    wgmma_wait<0>();
    if (threadIdx.x % 32 == 0) mbarrier_arrive(shared_address(&shared.empty[before]));

    const uint32_t lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4;
#pragma unroll
    for (int tile = 0; tile < 2; ++tile) {
        if (tile >= mine) break;
#pragma unroll
        for (int j = 0; j < kRanks / 8; ++j) {
            if (j >= piece.octets) break;
            const uint32_t of_all = piece.first_octet + j, up = of_all >= piece.octets_of[0];
            const uint32_t column = up ? p.max_rank + 8 * (of_all - piece.octets_of[0]) : 8 * of_all;
            const float scale = piece.scale[up];
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                const uint32_t row = (2 * tile + group) * 64 + warp * 16 + i * 8 + lane / 4;
                if (row >= piece.num_rows) continue;
                __align__(4) T first[2], second[2];
#pragma unroll
                for (int q = 0; q < 2; ++q) {
                    const float value = sum[tile][4 * j + 2 * i + q] * scale;
                    first[q] = narrow<T>(value);
                    second[q] = narrow<T>(value - widen(first[q]));
                }
                uint32_t* to = reinterpret_cast<uint32_t*>(p.shrunk) +
                               static_cast<size_t>(piece.first_row + row) * p.shrunk_stride + column + lane % 4;
                to[0] = *reinterpret_cast<const uint32_t*>(first);
                to[4] = *reinterpret_cast<const uint32_t*>(second);
            }
        }
    }
}

template <class T>
__device__ __forceinline__ void multiply_pieces(const PrefillShrinkParams& p, PiecesShared& shared, const PiecesRing& ring) {
    PiecesPlace at, piece_at;
    while (true) {
        const Piece& piece = shared.pieces[piece_at.slot];
        mbarrier_wait(shared_address(&shared.known[piece_at.slot]), piece_at.phase);
        if (piece.num_rows == 0) return;
        const uint32_t octets = __shfl_sync(~0u, piece.octets, 0);  // uniform: wgmma may not diverge
        if (octets <= 2) {
            multiply_piece<T, 16>(p, shared, ring, piece, at);
        } else if (octets <= 4) {
            multiply_piece<T, 32>(p, shared, ring, piece, at);
        } else {
            multiply_piece<T, kPieceRanks>(p, shared, ring, piece, at);
        }
        __syncwarp();
        if (threadIdx.x % 32 == 0) mbarrier_arrive(shared_address(&shared.done[piece_at.slot]));
        piece_at.advance(kPiecesAhead);
    }
}

template <class T>
__device__ __forceinline__ void prefill_shrink_kernel(const PrefillShrinkParams& p) {
    extern __shared__ __align__(16) char prefill_shrink_shared[];
    PiecesShared& shared = *reinterpret_cast<PiecesShared*>(prefill_shrink_shared + 1024 + kPiecesRing);
    if (threadIdx.x == 0) {
        for (int i = 0; i < kPiecesAhead; ++i) {
            mbarrier_init(shared_address(&shared.known[i]), 1);
            mbarrier_init(shared_address(&shared.done[i]), 8 + kCopyWarps);
        }
        for (int i = 0; i < kPiecesStages; ++i) {
            mbarrier_init(shared_address(&shared.full[i]), kCopyWarps * 32);
            mbarrier_init(shared_address(&shared.empty[i]), 8);  // warps: those of a warpgroup without a tile run apart
        }
        fence_mbarrier_init();
    }
    __syncthreads();
    wait_for_previous_launch();
    const RouteCounts counts = *reinterpret_cast<const RouteCounts*>(p.counts);
    const PiecesRing ring(p, counts, prefill_shrink_shared);
    const uint64_t work = counts.num_rows + static_cast<uint64_t>(counts.num_segments) * ring.extra;
    const uint32_t first = static_cast<uint32_t>(work * blockIdx.x / gridDim.x);
    const uint32_t end = static_cast<uint32_t>(work * (blockIdx.x + 1) / gridDim.x);
    const uint32_t index = find_segment(reinterpret_cast<const Segment*>(p.segments), counts.num_segments, ring.extra, first);
    const uint32_t warp = __shfl_sync(~0u, threadIdx.x / 32, 0);
    if (warp == 8 + kCopyWarps) {
        Scout{p, shared, ring, {}}.run(index, counts.num_segments, first, end);
    } else if (warp >= 8) {
        copy_pieces(p, shared, ring);
    } else {
        multiply_pieces<T>(p, shared, ring);
    }
}

}  // namespace

extern "C" __global__ void __launch_bounds__(kPiecesThreads, 1) moe_lora_prefill_shrink_bf16(const PrefillShrinkParams p) {
    prefill_shrink_kernel<bf16>(p);
}

extern "C" __global__ void __launch_bounds__(kPiecesThreads, 1) moe_lora_prefill_shrink_f16(const PrefillShrinkParams p) {
    prefill_shrink_kernel<f16>(p);
}
#endif
