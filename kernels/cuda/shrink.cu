// moe_lora_shrink_{bf16,f16}: s = scale * A x, the narrow half of LoRA, for the rows of every LoRA chunk.
//
// input [*, K] (row = row_pair / top_k for gate and up, whose input is the hidden state; row for down), A [rank8, K] of each
// projection -> shrunk [rows, shrunk_stride], projection p from column p * max_rank on, rank8 columns written.
//
// A block takes up to 64 rows of a chunk (one expert and slot) and its groups of 8 ranks, gate's then up's, two or four at a
// time. Every warp sums its own eighth of K and the eighths are added in order, whatever the block's rows and ranks are: so
// the result of a row depends on nothing but the row. How chunks are dealt to blocks (`Deal`) then is a question of speed.
// A lane copies 16 contiguous bytes of its A rows and its tokens, eight k each, to a queue in shared memory that only
// itself reads: no barriers, and up to 96 KB in flight. As both operands number k alike, any such order gives the product.
// S is kept in two 16-bit numbers, see params.cuh.
// Of fully sharded adapters A holds a part of the ranks, and S stays f32 until moe_lora_split_{bf16,f16}, when the ranks of the
// group have added theirs.
// Cost: A read once per 8 to 64 rows, the tokens once per 16 or 32 ranks, mostly from L2.
// Limits: K a multiple of 8; grid: any, of kShrinkThreads; kShrinkShared bytes of dynamic shared memory.
#include "mma/number.cuh"
#include "params.cuh"
#include "ptx/async.cuh"

namespace {

constexpr int kShrinkWarps = 8;
constexpr int kShrinkThreads = kShrinkWarps * 32;
constexpr int kQueueBytes = 12 * 1024;  // of a warp
constexpr int kShrinkShared = kShrinkWarps * kQueueBytes;
constexpr uint32_t kNoRow = ~0u;
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
constexpr int kShrinkBlocks = 2;  // blocks that share an SM: 128 registers a thread
#else
constexpr int kShrinkBlocks = 1;
#endif

// A chunk's projections as one list of groups of 8 ranks. In shared memory: registers are short.
struct RankGroups {
    AdapterEntry entry[2];
    uint32_t groups[2];
    uint32_t first[2], rows[2];  // of a part: the first rank of all that A has, and how many

    __device__ void read(const ShrinkParams& p, const Segment& chunk) {
        const auto* table = reinterpret_cast<const AdapterEntry*>(p.adapters);
        const size_t at = (static_cast<size_t>(chunk.slot) * p.num_experts + chunk.expert) * 3 + p.first_projection;
        for (uint32_t i = 0; i < 2; ++i) {
            entry[i] = i < p.num_projections ? table[at + i] : AdapterEntry{0, 0, 0, 0.0f};
            const uint32_t rank = entry[i].rank, each = p.parts > 1 ? rank / p.parts : rank;
            const uint32_t longer = p.parts > 1 ? rank % p.parts : 0;
            first[i] = p.part * each + min(p.part, longer);
            rows[i] = p.parts > 1 ? each + (p.part < longer) : (rank + 7) / 8 * 8;
            groups[i] = (rows[i] + 7) / 8;
        }
    }
    __device__ uint32_t count() const { return groups[0] + groups[1]; }
    // The row of A that lane `g` of 8 reads for this group, or null.
    template <class T>
    __device__ const T* row(uint32_t group, uint32_t g, uint32_t width) const {
        if (group >= count()) return nullptr;
        const bool second = group >= groups[0];
        const T* a = reinterpret_cast<const T*>(second ? entry[1].a : entry[0].a);
        const uint32_t row = (second ? group - groups[0] : group) * 8 + g;
        return row < (second ? rows[1] : rows[0]) ? a + static_cast<size_t>(row) * width : nullptr;
    }
    // Four ranks of a row of a part, from `rank` of group `group` on.
    __device__ void store_part(const ShrinkParams& p, uint32_t row, uint32_t group, uint32_t rank,
                               const float (&total)[4]) const {
        const uint32_t i = group >= groups[0], at = (group - (i ? groups[0] : 0)) * 8 + rank;
        float* to = reinterpret_cast<float*>(p.shrunk) + static_cast<size_t>(row) * p.shrunk_stride + i * p.max_rank + first[i];
        for (uint32_t j = 0; j < 4; ++j) {
            if (at + j < rows[i]) to[at + j] = total[j] * entry[i].scale;
        }
    }
};

// How the work is dealt out: a block takes `rows` rows of a chunk and every splits-th set of `groups` groups of ranks. Blocks
// that split the ranks of a chunk run at the same time, so that its tokens come from memory once.
struct Deal {
    uint32_t rows, groups, splits;

    __device__ Deal(const ShrinkParams& p, uint32_t which) {
        const uint32_t most_groups = p.num_projections * p.max_rank / 8;
        groups = which / 4 == 0 ? 4 : 2;
        rows = static_cast<uint32_t>(kChunkRows) >> which % 4;
        // At most this many, for blocks that find no ranks cost time where small adapters are beside large ones.
        splits = min((most_groups + groups - 1) / groups, 16 / groups);
    }

    // The fastest of eight, one a lane, by how long the last block is busy and how much all blocks read together. The
    // numbers are of the chunks' mean size and largest rank: rough, but no result depends on them.
    __device__ static Deal best(const ShrinkParams& p, const RouteCounts& counts) {
        constexpr float kLatency = 50e3f;  // how many numbers a block could read while it starts and ends an item
        constexpr float kShare = 4.0f;     // a block alone reads so much faster than one of many
        const uint32_t lane = threadIdx.x % 32;
        const Deal deal(p, lane % 8);
        const float most_groups = static_cast<float>(p.num_projections * p.max_rank / 8);
        const float chunks = static_cast<float>(counts.num_chunks);
        const float chunk_rows = fminf(kChunkRows, __fdividef(static_cast<float>(counts.num_rows), chunks));
        const float items = chunks * ceilf(__fdividef(chunk_rows, deal.rows)) * deal.splits;
        const float sets = ceilf(__fdividef(most_groups, deal.groups * deal.splits));
        const float numbers = sets * (fminf(deal.groups, most_groups) * 8 + fminf(deal.rows, chunk_rows)) * p.width;
        const float turns = __fdividef(items, gridDim.x);
        const float cost = (numbers + kLatency) * fmaxf(ceilf(turns), kShare * turns);
        return Deal(p, __reduce_min_sync(~0u, __float_as_uint(cost) & ~7u | lane % 8) & 7u);
    }
};

// kM pairs of groups of 8 ranks, from group `first` on, by up to kN * 8 rows, from `first_row` on.
template <class T, int kM, int kN>
__device__ __forceinline__ void shrink(const ShrinkParams& p, const RankGroups& ranks, uint32_t first, uint32_t first_row,
                                       uint32_t end_row, char* shared) {
    constexpr int kCopies = 2 * kM + kN;  // of 16 bytes a lane, for 32 k
    constexpr int kDepth = kQueueBytes / (kCopies * 512);
    constexpr int kPitch = kM * 16 + 4;
    static_assert(kN * 8 * kPitch * 4 <= kQueueBytes, "a warp's sums fit where its queue was");
    const uint32_t lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
    char* const mine = shared + warp * kQueueBytes;
    const uint32_t queue = shared_address(mine) + lane * 16;

    const T* a[2 * kM];
#pragma unroll
    for (int i = 0; i < 2 * kM; ++i) a[i] = ranks.row<T>(first + i, g, p.width);
    const T* input = reinterpret_cast<const T*>(p.input);
    uint32_t x[kN];  // offsets of 8 numbers
#pragma unroll
    for (int n = 0; n < kN; ++n) {
        const uint32_t row = first_row + n * 8 + g;
        const auto* row_pair = reinterpret_cast<const uint32_t*>(p.row_pair);
        const uint32_t from = row >= end_row ? 0 : row_pair != nullptr ? row_pair[row] / p.top_k : row;
        x[n] = row < end_row ? from * (p.width / 8) : kNoRow;
    }

    // This warp's part of K, in steps of 32.
    const uint32_t part = (p.width + kShrinkWarps * 32 - 1) / (kShrinkWarps * 32) * 32;
    const uint32_t begin = min(warp * part, p.width), end = min(begin + part, p.width);
    uint32_t to_fill = begin + t * 8;
    const auto fill = [&](uint32_t at) {
        const bool exists = to_fill < end;
#pragma unroll
        for (int i = 0; i < 2 * kM; ++i) cp_async_stream(at + i * 512, a[i] + to_fill, exists && a[i] != nullptr);
#pragma unroll
        for (int n = 0; n < kN; ++n) {
            cp_async(at + (2 * kM + n) * 512, input + static_cast<size_t>(x[n]) * 8 + to_fill, exists && x[n] != kNoRow);
        }
        to_fill += 32;
    };
#pragma unroll 1
    for (int s = 0; s < kDepth; ++s) {
        if (begin + s * 32 < end) fill(queue + s * kCopies * 512);
        cp_async_commit();
    }
    float sum[kM][kN][4] = {};
    uint32_t at = queue;
#pragma unroll 1
    for (uint32_t k = begin; k < end; k += 32) {
        cp_async_wait<kDepth - 1>();
        uint4 left[2 * kM];
#pragma unroll
        for (int i = 0; i < 2 * kM; ++i) left[i] = load_shared16(at + i * 512);
#pragma unroll
        for (int n = 0; n < kN; ++n) {
            const uint4 right = load_shared16(at + (2 * kM + n) * 512);
#pragma unroll
            for (int m = 0; m < kM; ++m) {
                const uint4 &low = left[2 * m], &high = left[2 * m + 1];
                mma<T>(sum[m][n], low.x, high.x, low.y, high.y, right.x, right.y);
                mma<T>(sum[m][n], low.z, high.z, low.w, high.w, right.z, right.w);
            }
        }
        // The products above have read what this overwrites.
        if (k + kDepth * 32 < end) fill(at);
        cp_async_commit();
        at += kCopies * 512;
        if (at == queue + kDepth * kCopies * 512) at = queue;
    }

    // Every warp's sums, [row][rank].
    float* partial = reinterpret_cast<float*>(mine);
    __syncwarp();
#pragma unroll
    for (int m = 0; m < kM; ++m) {
#pragma unroll
        for (int n = 0; n < kN; ++n) {
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                partial[(n * 8 + 2 * t + i % 2) * kPitch + m * 16 + i / 2 * 8 + g] = sum[m][n][i];
            }
        }
    }
    __syncthreads();
    // Four ranks of a row are 16 bytes of S.
    for (uint32_t i = threadIdx.x; i < kN * 8 * kM * 4; i += kShrinkThreads) {
        const uint32_t n = i / (kM * 4), column = i % (kM * 4) * 4;
        const uint32_t row = first_row + n, group = first + column / 8;
        if (row >= end_row || group >= ranks.count()) continue;
        float total[4] = {};
#pragma unroll
        for (int w = 0; w < kShrinkWarps; ++w) {
            const float4 of_warp =
                *reinterpret_cast<const float4*>(shared + w * kQueueBytes + (n * kPitch + column) * 4);
            total[0] += of_warp.x;
            total[1] += of_warp.y;
            total[2] += of_warp.z;
            total[3] += of_warp.w;
        }
        if (p.parts != 0) {
            ranks.store_part(p, row, group, column % 8, total);
            continue;
        }
        const bool second = group >= ranks.groups[0];
        const uint32_t rank = (second ? group - ranks.groups[0] : group) * 8 + column % 8;
        const float scale = second ? ranks.entry[1].scale : ranks.entry[0].scale;
        __align__(16) T numbers[8];
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            const float value = total[j] * scale;
            numbers[j] = narrow<T>(value);
            numbers[4 + j] = narrow<T>(value - widen(numbers[j]));
        }
        const size_t to = static_cast<size_t>(row) * p.shrunk_stride + (second ? p.max_rank : 0) + rank;
        if (p.octets) {
            uint2* octet = reinterpret_cast<uint2*>(p.shrunk) + to / 8 * 4;
            octet[rank / 4 % 2] = *reinterpret_cast<const uint2*>(numbers);
            octet[2 + rank / 4 % 2] = *reinterpret_cast<const uint2*>(numbers + 4);
        } else {
            reinterpret_cast<uint4*>(p.shrunk)[to / 4] = *reinterpret_cast<const uint4*>(numbers);
        }
    }
    __syncthreads();  // the sums are read
}

template <class T, int kM>
__device__ __forceinline__ void shrink_rows(const ShrinkParams& p, const RankGroups& ranks, uint32_t first,
                                            uint32_t first_row, uint32_t end_row, char* shared) {
    const uint32_t rows = end_row - first_row;
    if (rows <= 8) {
        shrink<T, kM, 1>(p, ranks, first, first_row, end_row, shared);
    } else if (rows <= 16) {
        shrink<T, kM, 2>(p, ranks, first, first_row, end_row, shared);
    } else if (rows <= 32) {
        shrink<T, kM, 4>(p, ranks, first, first_row, end_row, shared);
    } else {
        shrink<T, kM, 8>(p, ranks, first, first_row, end_row, shared);
    }
}

template <class T>
__device__ __forceinline__ void shrink_kernel(const ShrinkParams& p) {
    extern __shared__ __align__(128) char shrink_shared[];
    __shared__ RankGroups ranks;
    wait_for_previous_launch();
    const RouteCounts counts = *reinterpret_cast<const RouteCounts*>(p.counts);
    const Deal deal = Deal::best(p, counts);
    const uint32_t pieces = kChunkRows / deal.rows;
    for (uint32_t item = blockIdx.x; item < counts.num_chunks * pieces * deal.splits; item += gridDim.x) {
        const Segment chunk = reinterpret_cast<const Segment*>(p.chunks)[item / deal.splits / pieces];
        const uint32_t first_row = chunk.first_row + item / deal.splits % pieces * deal.rows;
        if (first_row >= chunk.end_row) continue;
        const uint32_t end_row = min(chunk.end_row, first_row + deal.rows);
        __syncthreads();  // nobody reads the ranks of the last item any more, also where it had none for this block
        if (threadIdx.x == 0) ranks.read(p, chunk);
        __syncthreads();
        for (uint32_t first = item % deal.splits * deal.groups; first < ranks.count();
             first += deal.splits * deal.groups) {
            if (deal.groups == 2 || first + 2 >= ranks.count()) {
                shrink_rows<T, 1>(p, ranks, first, first_row, end_row, shrink_shared);
            } else {
                shrink_rows<T, 2>(p, ranks, first, first_row, end_row, shrink_shared);
            }
        }
    }
}

constexpr int kSplitThreads = 256;

// Eight neighbouring ranks a thread. Rows without an adapter hold anything, before and after.
template <class T>
__device__ __forceinline__ void split_kernel(const SplitParams& p) {
    wait_for_previous_launch();
    const uint64_t octets = static_cast<uint64_t>(reinterpret_cast<const RouteCounts*>(p.counts)->num_rows) * (p.stride / 8);
    for (uint64_t i = blockIdx.x * kSplitThreads + threadIdx.x; i < octets; i += gridDim.x * kSplitThreads) {
        uint4* at = reinterpret_cast<uint4*>(p.shrunk) + 2 * i;
        __align__(16) float values[8];
        *reinterpret_cast<uint4*>(values) = at[0];
        *reinterpret_cast<uint4*>(values + 4) = at[1];
        __align__(16) T first[8], second[8];
#pragma unroll
        for (int j = 0; j < 8; ++j) {
            first[j] = narrow<T>(values[j]);
            second[j] = narrow<T>(values[j] - widen(first[j]));
        }
        const uint4 a = *reinterpret_cast<const uint4*>(first), b = *reinterpret_cast<const uint4*>(second);
        at[0] = p.octets ? a : uint4{a.x, a.y, b.x, b.y};
        at[1] = p.octets ? b : uint4{a.z, a.w, b.z, b.w};
    }
}

}  // namespace

extern "C" __global__ void __launch_bounds__(kShrinkThreads, kShrinkBlocks) moe_lora_shrink_bf16(const ShrinkParams p) {
    shrink_kernel<bf16>(p);
}

extern "C" __global__ void __launch_bounds__(kShrinkThreads, kShrinkBlocks) moe_lora_shrink_f16(const ShrinkParams p) {
    shrink_kernel<f16>(p);
}

extern "C" __global__ void __launch_bounds__(kSplitThreads) moe_lora_split_bf16(const SplitParams p) {
    split_kernel<bf16>(p);
}

extern "C" __global__ void __launch_bounds__(kSplitThreads) moe_lora_split_f16(const SplitParams p) {
    split_kernel<f16>(p);
}
