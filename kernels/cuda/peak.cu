// moe_lora_peak: the main loop of a bf16 product and nothing else; the rate that no layer can exceed.
//
// Tiles of 128 x 256 of C [m_tiles * 128, n_tiles * 256], one a block at a time, K in steps of 64. Operands are noise that
// lies as the copies want it: A [m_tiles, k_steps] parts of 16 KB, B [n_tiles, k_steps] parts of 32 KB. One warp copies,
// two warpgroups multiply; sums run on from tile to tile and are thrown away. Blocks that run together share rows and
// columns of 16 x 8 tiles, so that L2 serves most reads, as in a product that is meant.
//
// Without wgmma (all but sm_90a) eight warps do the same number of operations with mma.sync, from registers.
// Limits: m_tiles a multiple of 16, n_tiles of 8.
#include "mma/number.cuh"
#include "params.cuh"
#include "ptx/async.cuh"
#include "ptx/mbarrier.cuh"
#include "ptx/tma.cuh"
#include "ptx/wgmma.cuh"

namespace {

constexpr int kPeakThreads = 384;
constexpr int kPeakStages = 4;
constexpr uint32_t kPartA = 128 * 64 * 2, kPartB = 256 * 64 * 2;
constexpr uint32_t kPeakShared = kPeakStages * (kPartA + kPartB) + 1024;
static_assert(kPeakShared == 193 * 1024, "what the host asks for");

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

template <class Body>
__device__ __forceinline__ void for_steps(const PeakParams& p, Body body) {
    uint32_t count = 0;
    for (uint32_t tile = blockIdx.x; tile < p.m_tiles * p.n_tiles; tile += gridDim.x) {
        const uint32_t group = tile / 128, groups_m = p.m_tiles / 16;
        const uint32_t m = group % groups_m * 16 + tile % 16, n = group / groups_m * 8 + tile / 16 % 8;
        for (uint32_t k = 0; k < p.k_steps; ++k, ++count) body(m * p.k_steps + k, n * p.k_steps + k, count);
    }
}

__device__ __forceinline__ void peak(const PeakParams& p) {
    extern __shared__ uint8_t shared[];
    __shared__ __align__(8) uint64_t barriers[2 * kPeakStages];
    const uint32_t ring = (shared_address(shared) + 1023) & ~1023u;
    const auto full = [&](uint32_t stage) { return shared_address(&barriers[stage]); };
    const auto empty = [&](uint32_t stage) { return shared_address(&barriers[kPeakStages + stage]); };
    if (threadIdx.x == 0) {
        for (uint32_t stage = 0; stage < kPeakStages; ++stage) {
            mbarrier_init(full(stage), 1);
            mbarrier_init(empty(stage), 2);
        }
        fence_mbarrier_init();
    }
    __syncthreads();
    if (threadIdx.x < 128) {
        if (threadIdx.x > 0) return;
        for_steps(p, [&](uint32_t part_a, uint32_t part_b, uint32_t count) {
            const uint32_t stage = count % kPeakStages, to = ring + stage * (kPartA + kPartB);
            if (count >= kPeakStages) mbarrier_wait(empty(stage), (count / kPeakStages - 1) & 1);
            mbarrier_expect(full(stage), kPartA + kPartB);
            bulk_load(to, p.a + static_cast<uint64_t>(part_a) * kPartA, kPartA, full(stage));
            bulk_load(to + kPartA, p.b + static_cast<uint64_t>(part_b) * kPartB, kPartB, full(stage));
        });
        return;
    }
    const uint32_t half = threadIdx.x / 128 - 1;
    float c[128] = {};
    for_steps(p, [&](uint32_t, uint32_t, uint32_t count) {
        const uint32_t stage = count % kPeakStages, from = ring + stage * (kPartA + kPartB);
        mbarrier_wait(full(stage), count / kPeakStages & 1);
        const uint64_t a = wgmma_descriptor(from + half * (kPartA / 2)), b = wgmma_descriptor(from + kPartA);
        wgmma_fence();
#pragma unroll
        for (int k16 = 0; k16 < 4; ++k16) Wgmma<bf16, 256>::mma(c, a + 2 * k16, b + 2 * k16);
        wgmma_commit();
        wgmma_wait<1>();
        // The step before this one is done with its stage.
        if (count > 0 && threadIdx.x % 128 == 0) mbarrier_arrive(empty((count - 1) % kPeakStages));
    });
    wgmma_wait<0>();
    float all = 0.0f;
#pragma unroll
    for (int i = 0; i < 128; ++i) all += c[i];
    // Almost never true, but no compiler knows.
    if (all == 1.0e30f) *reinterpret_cast<float*>(p.sink) = all;
}

#else

__device__ __forceinline__ void peak(const PeakParams& p) {
    if (threadIdx.x < 128) return;
    const auto* operands = reinterpret_cast<const uint32_t*>(p.a) + threadIdx.x * 8;
    uint32_t a[4], b[2];
    for (int i = 0; i < 4; ++i) a[i] = operands[i];
    for (int i = 0; i < 2; ++i) b[i] = operands[4 + i];
    float c[16][4] = {};
    for (uint32_t tile = blockIdx.x; tile < p.m_tiles * p.n_tiles; tile += gridDim.x) {
        for (uint32_t k = 0; k < p.k_steps; ++k) {
            // 1024 products of 16 x 8 x 16 a step, 128 a warp.
            for (int i = 0; i < 8; ++i) {
#pragma unroll
                for (int j = 0; j < 16; ++j) mma<bf16>(c[j], a[0], a[1], a[2], a[3], b[0], b[1]);
            }
        }
    }
    float all = 0.0f;
    for (int j = 0; j < 16; ++j) all += c[j][0] + c[j][1] + c[j][2] + c[j][3];
    if (all == 1.0e30f) *reinterpret_cast<float*>(p.sink) = all;
}

#endif

}  // namespace

extern "C" __global__ void __launch_bounds__(kPeakThreads, 1) moe_lora_peak(const PeakParams p) { peak(p); }
