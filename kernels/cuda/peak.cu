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

namespace {

constexpr int kPeakThreads = 384;
constexpr int kPeakStages = 4;
constexpr uint32_t kPartA = 128 * 64 * 2, kPartB = 256 * 64 * 2;
constexpr uint32_t kPeakShared = kPeakStages * (kPartA + kPartB) + 1024;
static_assert(kPeakShared == 193 * 1024, "what the host asks for");

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

__device__ __forceinline__ void barrier_init(uint32_t barrier, uint32_t count) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(count) : "memory");
}

__device__ __forceinline__ void barrier_arrive(uint32_t barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

__device__ __forceinline__ void barrier_expect(uint32_t barrier, uint32_t bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}

__device__ __forceinline__ void barrier_wait(uint32_t barrier, uint32_t phase) {
    asm volatile(
        "{\n.reg .pred done;\nagain:\n"
        "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
        "@!done bra again;\n}" ::"r"(barrier), "r"(phase)
        : "memory");
}

__device__ __forceinline__ void bulk_copy(uint32_t to, uint64_t from, uint32_t bytes, uint32_t barrier) {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(to),
                 "l"(from), "r"(bytes), "r"(barrier)
                 : "memory");
}

// c[64, 256] += a[64, 16] b[256, 16]^T by one warpgroup, both operands in shared memory in rows of 128 bytes, swizzled.
__device__ __forceinline__ void wgmma_256(float (&c)[128], uint64_t a, uint64_t b) {
    asm volatile(
        "wgmma.mma_async.sync.aligned.m64n256k16.f32.bf16.bf16 {"
        "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
        "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
        "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
        "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, "
        "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, "
        "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, "
        "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, "
        "%112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127} "
        ", %128, %129, 1, 1, 1, 0, 0;"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]), "+f"(c[4]), "+f"(c[5]), "+f"(c[6]), "+f"(c[7]),
          "+f"(c[8]), "+f"(c[9]), "+f"(c[10]), "+f"(c[11]), "+f"(c[12]), "+f"(c[13]), "+f"(c[14]), "+f"(c[15]),
          "+f"(c[16]), "+f"(c[17]), "+f"(c[18]), "+f"(c[19]), "+f"(c[20]), "+f"(c[21]), "+f"(c[22]), "+f"(c[23]),
          "+f"(c[24]), "+f"(c[25]), "+f"(c[26]), "+f"(c[27]), "+f"(c[28]), "+f"(c[29]), "+f"(c[30]), "+f"(c[31]),
          "+f"(c[32]), "+f"(c[33]), "+f"(c[34]), "+f"(c[35]), "+f"(c[36]), "+f"(c[37]), "+f"(c[38]), "+f"(c[39]),
          "+f"(c[40]), "+f"(c[41]), "+f"(c[42]), "+f"(c[43]), "+f"(c[44]), "+f"(c[45]), "+f"(c[46]), "+f"(c[47]),
          "+f"(c[48]), "+f"(c[49]), "+f"(c[50]), "+f"(c[51]), "+f"(c[52]), "+f"(c[53]), "+f"(c[54]), "+f"(c[55]),
          "+f"(c[56]), "+f"(c[57]), "+f"(c[58]), "+f"(c[59]), "+f"(c[60]), "+f"(c[61]), "+f"(c[62]), "+f"(c[63]),
          "+f"(c[64]), "+f"(c[65]), "+f"(c[66]), "+f"(c[67]), "+f"(c[68]), "+f"(c[69]), "+f"(c[70]), "+f"(c[71]),
          "+f"(c[72]), "+f"(c[73]), "+f"(c[74]), "+f"(c[75]), "+f"(c[76]), "+f"(c[77]), "+f"(c[78]), "+f"(c[79]),
          "+f"(c[80]), "+f"(c[81]), "+f"(c[82]), "+f"(c[83]), "+f"(c[84]), "+f"(c[85]), "+f"(c[86]), "+f"(c[87]),
          "+f"(c[88]), "+f"(c[89]), "+f"(c[90]), "+f"(c[91]), "+f"(c[92]), "+f"(c[93]), "+f"(c[94]), "+f"(c[95]),
          "+f"(c[96]), "+f"(c[97]), "+f"(c[98]), "+f"(c[99]), "+f"(c[100]), "+f"(c[101]), "+f"(c[102]), "+f"(c[103]),
          "+f"(c[104]), "+f"(c[105]), "+f"(c[106]), "+f"(c[107]), "+f"(c[108]), "+f"(c[109]), "+f"(c[110]), "+f"(c[111]),
          "+f"(c[112]), "+f"(c[113]), "+f"(c[114]), "+f"(c[115]), "+f"(c[116]), "+f"(c[117]), "+f"(c[118]), "+f"(c[119]),
          "+f"(c[120]), "+f"(c[121]), "+f"(c[122]), "+f"(c[123]), "+f"(c[124]), "+f"(c[125]), "+f"(c[126]), "+f"(c[127])
        : "l"(a), "l"(b));
}

// Rows of 128 bytes, swizzled over 1024.
__device__ __forceinline__ uint64_t operand(uint32_t shared) {
    return (shared >> 4) | (uint64_t{1} << 16) | (uint64_t{1024 >> 4} << 32) | (uint64_t{1} << 62);
}

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
            barrier_init(full(stage), 1);
            barrier_init(empty(stage), 2);
        }
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    }
    __syncthreads();
    if (threadIdx.x < 128) {
        if (threadIdx.x > 0) return;
        for_steps(p, [&](uint32_t part_a, uint32_t part_b, uint32_t count) {
            const uint32_t stage = count % kPeakStages, to = ring + stage * (kPartA + kPartB);
            if (count >= kPeakStages) barrier_wait(empty(stage), (count / kPeakStages - 1) & 1);
            barrier_expect(full(stage), kPartA + kPartB);
            bulk_copy(to, p.a + static_cast<uint64_t>(part_a) * kPartA, kPartA, full(stage));
            bulk_copy(to + kPartA, p.b + static_cast<uint64_t>(part_b) * kPartB, kPartB, full(stage));
        });
        return;
    }
    const uint32_t half = threadIdx.x / 128 - 1;
    float c[128] = {};
    for_steps(p, [&](uint32_t, uint32_t, uint32_t count) {
        const uint32_t stage = count % kPeakStages, from = ring + stage * (kPartA + kPartB);
        barrier_wait(full(stage), count / kPeakStages & 1);
        const uint64_t a = operand(from + half * (kPartA / 2)), b = operand(from + kPartA);
        asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#pragma unroll
        for (int k16 = 0; k16 < 4; ++k16) wgmma_256(c, a + 2 * k16, b + 2 * k16);
        asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
        asm volatile("wgmma.wait_group.sync.aligned 1;" ::: "memory");
        // The step before this one is done with its stage.
        if (count > 0 && threadIdx.x % 128 == 0) barrier_arrive(empty((count - 1) % kPeakStages));
    });
    asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
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
