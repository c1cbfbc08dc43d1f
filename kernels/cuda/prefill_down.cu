// moe_lora_prefill_down_{bf16,f16}: y = W_down h + s B_d A_d h + b_d for every row, where an expert has many rows (Hopper).
//
// intermediate [rows, I], down [E, H, I] through a tensor map, shrunk [rows, ...] -> rows_out [rows, H], f32 or the activation's
// format; moe_lora_combine weighs and adds them.
//
// A block takes 128 features and the tokens of one RowTile of up to 256 rows: tile/grouped.cuh. Rows leave in 128-byte pieces
// through shared memory, f32 rows in 32-byte pieces from registers.
// Cost: 2 H I flops a row at the tensor cores' rate; weights from memory about once a kTilesTogether tiles, tokens H / 128 times from L2.
// Limits: sm_90a; H, I multiples of 8; grid: one block an SM, of kGroupedThreads; kGroupedShared bytes of dynamic shared memory.
#if !defined(__CUDA_ARCH__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
#include "tile/grouped.cuh"
#include "epilogue/swiglu.cuh"

namespace {

template <class T>
struct DownProblem {
    static constexpr int kProjections = 1, kFirstProjection = 2, kFeatures = 128;
    const PrefillDownParams& all;
    const DownParams& d;

    __device__ explicit DownProblem(const PrefillDownParams& params) : all(params), d(params.down) {}
    __device__ uint32_t depth() const { return d.intermediate_size; }
    __device__ uint32_t features() const { return d.hidden_size; }
    __device__ uint64_t tokens() const { return d.intermediate; }
    __device__ uint64_t tiles() const { return d.tiles; }
    __device__ uint64_t counts() const { return d.counts; }
    __device__ uint32_t* claimed() const { return reinterpret_cast<RouteCounts*>(d.counts)->claimed + 1; }
    __device__ uint64_t segments() const { return d.segments; }
    __device__ uint64_t adapters() const { return d.adapters; }
    __device__ uint32_t num_experts() const { return d.num_experts; }
    __device__ uint64_t shrunk() const { return d.shrunk; }
    __device__ uint32_t shrunk_stride() const { return d.shrunk_stride; }
    __device__ uint32_t max_rank() const { return 0; }
    __device__ __forceinline__ uint32_t token_row(uint32_t row) const { return row; }
    __device__ __forceinline__ void load_weights(uint32_t to, uint32_t full, uint32_t k, const TileJob& job) const {
        tma_load_3d(to, &all.weights, full, k, job.first_feature, job.expert);
    }

    __device__ __forceinline__ void finish(const float (&sum)[2][64], const TileJob& job, uint32_t staged, uint32_t group) const {
        const uint32_t thread = threadIdx.x % 128, lane = thread % 32, warp = thread / 32;
        const uint32_t half = half_width(job.num_rows);
        const uint32_t first = job.first_feature + group * 64;  // of this warpgroup
        float bias[2] = {};
        if (d.bias != 0) {
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                const uint32_t feature = first + warp * 16 + i * 8 + lane / 4;
                if (feature < d.hidden_size) {
                    bias[i] = reinterpret_cast<const float*>(d.bias)[static_cast<size_t>(job.expert) * d.hidden_size + feature];
                }
            }
        }
        if (d.rows_f32) {
            float* to = reinterpret_cast<float*>(d.rows_out) + static_cast<size_t>(job.first_row) * d.hidden_size;
#pragma unroll
            for (int h = 0; h < 2; ++h) {
#pragma unroll
                for (int j = 0; j < 16; ++j) {
#pragma unroll
                    for (int i = 0; i < 4; ++i) {
                        const uint32_t token = 8 * j + lane % 4 * 2 + i % 2;
                        const uint32_t feature = first + warp * 16 + i / 2 * 8 + lane / 4;
                        if (token < half && h * half + token < job.num_rows && feature < d.hidden_size) {
                            to[static_cast<size_t>(h * half + token) * d.hidden_size + feature] = sum[h][4 * j + i] + bias[i / 2];
                        }
                    }
                }
            }
            return;
        }
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            if (h == 1 && job.num_rows <= 128) break;
            named_barrier(1 + group, 128);  // what was staged before has left shared memory
#pragma unroll
            for (int j = 0; j < 16; j += 2) {
                if (8 * j >= half) break;
                const float* s = &sum[h][4 * j];
                const uint32_t token = 8 * j + lane / 16 * 8 + lane % 8;
                stmatrix_transposed(staged + swizzled(token, warp * 2 + lane / 8 % 2), narrow_pair<T>(s[0] + bias[0], s[1] + bias[0]),
                               narrow_pair<T>(s[2] + bias[1], s[3] + bias[1]), narrow_pair<T>(s[4] + bias[0], s[5] + bias[0]),
                               narrow_pair<T>(s[6] + bias[1], s[7] + bias[1]));
            }
            named_barrier(1 + group, 128);
            const uint32_t piece = thread % 8, feature = first + piece * 8;
            if (feature < d.hidden_size) {
                T* to = reinterpret_cast<T*>(d.rows_out) + static_cast<size_t>(job.first_row + h * half) * d.hidden_size + feature;
                const uint32_t rows = min(half, job.num_rows - h * half);
#pragma unroll 4
                for (uint32_t token = thread / 8; token < rows; token += 16) {
                    *reinterpret_cast<uint4*>(to + static_cast<size_t>(token) * d.hidden_size) =
                        load_shared16(staged + swizzled(token, piece));
                }
            }
        }
    }
};

}  // namespace

extern "C" __global__ void __launch_bounds__(kGroupedThreads, 1)
    moe_lora_prefill_down_bf16(const __grid_constant__ PrefillDownParams p) {
    extern __shared__ char prefill_down_shared[];
    grouped_product<bf16>(DownProblem<bf16>(p), prefill_down_shared);
}

extern "C" __global__ void __launch_bounds__(kGroupedThreads, 1)
    moe_lora_prefill_down_f16(const __grid_constant__ PrefillDownParams p) {
    extern __shared__ char prefill_down_shared[];
    grouped_product<f16>(DownProblem<f16>(p), prefill_down_shared);
}
#endif
