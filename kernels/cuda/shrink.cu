// moe_lora_shrink_{bf16,f16}: s = scale * A x, the narrow half of LoRA, for the rows of every LoRA chunk.
//
// input [*, K] (row = row_pair / top_k for gate and up, whose input is the hidden state; row for down), A [rank8, K] of each
// projection -> shrunk [rows, shrunk_stride], projection p from column p * max_rank on, rank8 columns written.
//
// One block takes one chunk (at most kChunkRows rows of one expert and slot) and up to four groups of 8 ranks, gate's then
// up's. Warps split K, and where there is more than one m16 of ranks those too; the parts of K are added in order, so the
// result of a row depends on nothing but the row. Operands go from global memory straight to registers: a lane reads 16
// contiguous bytes of its A row and its token, which are eight k; as both operands number k alike, any such order gives the
// product. S is kept in two 16-bit numbers, see params.cuh.
// Cost: A read once a chunk, the tokens once a group of 32 ranks (16 where the chunk has at most 8 rows), mostly from L2.
// Limits: K a multiple of 8; grid: any, of kShrinkThreads; kShrinkShared bytes of dynamic shared memory.
#include "mma/number.cuh"
#include "params.cuh"
#include "ptx/async.cuh"

namespace {

constexpr int kShrinkWarps = 8;
constexpr int kShrinkThreads = kShrinkWarps * 32;
constexpr uint32_t kNoRow = ~0u;
constexpr int kShrinkShared = 4 * 32 * 36 * 4;

// A chunk's projections as one list of groups of 8 ranks.
struct RankGroups {
    AdapterEntry entry[2];
    uint32_t groups[2];

    __device__ RankGroups(const ShrinkParams& p, const Segment& chunk) {
        const auto* table = reinterpret_cast<const AdapterEntry*>(p.adapters);
        const size_t at = (static_cast<size_t>(chunk.slot) * p.num_experts + chunk.expert) * 3 + p.first_projection;
        for (uint32_t i = 0; i < 2; ++i) {
            entry[i] = i < p.num_projections ? table[at + i] : AdapterEntry{0, 0, 0, 0.0f};
            groups[i] = (entry[i].rank + 7) / 8;
        }
    }
    __device__ uint32_t count() const { return groups[0] + groups[1]; }
    // The row of A that lane `g` of 8 reads for this group, or null.
    template <class T>
    __device__ const T* row(uint32_t group, uint32_t g, uint32_t width) const {
        if (group >= count()) return nullptr;
        const bool second = group >= groups[0];
        const T* a = reinterpret_cast<const T*>(second ? entry[1].a : entry[0].a);
        return a + static_cast<size_t>((second ? group - groups[0] : group) * 8 + g) * width;
    }
};

__device__ __forceinline__ uint4 load16(const void* row, uint32_t at, uint32_t width) {
    return row != nullptr && at < width ? __ldg(reinterpret_cast<const uint4*>(row) + at / 8) : uint4{0, 0, 0, 0};
}

// kM groups of 16 ranks, each done by kShrinkWarps / kM warps, by kN groups of 8 rows. first_group: of 8 ranks.
template <class T, int kM, int kN, int kUnroll>
__device__ __forceinline__ void shrink(const ShrinkParams& p, const Segment& chunk, const RankGroups& ranks,
                                       uint32_t first_group, float* partial) {
    constexpr int kParts = kShrinkWarps / kM;  // of K
    constexpr int kPitch = kM * 16 + 4;
    static_assert(kParts * kN * 8 * kPitch * 4 <= kShrinkShared, "the partial sums fit");
    const uint32_t lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    const uint32_t part = threadIdx.x / 32 / kM, m = threadIdx.x / 32 % kM;

    const T* a[2];
    for (int half = 0; half < 2; ++half) a[half] = ranks.row<T>(first_group + 2 * m + half, g, p.width);
    const T* input = reinterpret_cast<const T*>(p.input);
    uint32_t x[kN];  // offsets of 8 numbers
#pragma unroll
    for (int n = 0; n < kN; ++n) {
        const uint32_t row = chunk.first_row + n * 8 + g;
        const auto* row_pair = reinterpret_cast<const uint32_t*>(p.row_pair);
        const uint32_t from = row >= chunk.end_row ? 0 : row_pair != nullptr ? row_pair[row] / p.top_k : row;
        x[n] = row < chunk.end_row ? from * (p.width / 8) : kNoRow;
    }

    float sum[kN][4] = {};
#pragma unroll kUnroll
    for (uint32_t base = part * 32; base < p.width; base += kParts * 32) {
        const uint32_t k = base + t * 8;
        const uint4 low = load16(a[0], k, p.width), high = load16(a[1], k, p.width);
        uint4 right[kN];
#pragma unroll
        for (int n = 0; n < kN; ++n) {
            right[n] = load16(x[n] == kNoRow ? nullptr : input + static_cast<size_t>(x[n]) * 8, k, p.width);
        }
#pragma unroll
        for (int n = 0; n < kN; ++n) {
            mma<T>(sum[n], low.x, high.x, low.y, high.y, right[n].x, right[n].y);
            mma<T>(sum[n], low.z, high.z, low.w, high.w, right[n].z, right[n].w);
        }
    }

    // partial[part][row][rank]
    float* mine = partial + part * kN * 8 * kPitch;
#pragma unroll
    for (int n = 0; n < kN; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) mine[(n * 8 + 2 * t + i % 2) * kPitch + m * 16 + i / 2 * 8 + g] = sum[n][i];
    }
    __syncthreads();
    for (uint32_t i = threadIdx.x; i < kN * 8 * kM * 16; i += kShrinkThreads) {
        const uint32_t n = i / (kM * 16), column = i % (kM * 16);
        const uint32_t row = chunk.first_row + n, group = first_group + column / 8;
        if (row >= chunk.end_row || group >= ranks.count()) continue;
        float total = 0.0f;
#pragma unroll
        for (int k = 0; k < kParts; ++k) total += partial[(k * kN * 8 + n) * kPitch + column];
        const bool second = group >= ranks.groups[0];
        const uint32_t rank = (second ? group - ranks.groups[0] : group) * 8 + column % 8;
        const float value = total * (second ? ranks.entry[1].scale : ranks.entry[0].scale);
        const uint32_t together = p.octets ? 8 : 4;
        const size_t at = static_cast<size_t>(row) * p.shrunk_stride + (second ? p.max_rank : 0) + rank / together * together;
        T* shrunk = reinterpret_cast<T*>(p.shrunk) + at * 2 + rank % together;
        const T first = narrow<T>(value);
        shrunk[0] = first;
        shrunk[together] = narrow<T>(value - widen(first));
    }
    __syncthreads();
}

template <class T>
__device__ __forceinline__ void shrink_kernel(const ShrinkParams& p) {
    extern __shared__ float shrink_shared[];
    wait_for_previous_launch();
    const uint32_t num_chunks = reinterpret_cast<const RouteCounts*>(p.counts)->num_chunks;
    // The finest split: 16 ranks a block. Chunks of more than 8 rows take twice that, and leave the upper half idle.
    const uint32_t blocks = (p.num_projections * p.max_rank + 15) / 16;
    for (uint32_t item = blockIdx.x; item < num_chunks * blocks; item += gridDim.x) {
        const Segment chunk = reinterpret_cast<const Segment*>(p.chunks)[item / blocks];
        const RankGroups ranks(p, chunk);
        const uint32_t rows = chunk.end_row - chunk.first_row, block = item % blocks;
        if (rows <= 8) {
            if (block * 2 < ranks.count()) shrink<T, 1, 1, 4>(p, chunk, ranks, block * 2, shrink_shared);
        } else if (block * 4 < ranks.count()) {
            if (rows <= 16) {
                shrink<T, 2, 2, 4>(p, chunk, ranks, block * 4, shrink_shared);
            } else {
                shrink<T, 2, 4, 2>(p, chunk, ranks, block * 4, shrink_shared);
            }
        }
    }
}

}  // namespace

extern "C" __global__ void __launch_bounds__(kShrinkThreads, 3) moe_lora_shrink_bf16(const ShrinkParams p) {
    shrink_kernel<bf16>(p);
}

extern "C" __global__ void __launch_bounds__(kShrinkThreads, 3) moe_lora_shrink_f16(const ShrinkParams p) {
    shrink_kernel<f16>(p);
}
