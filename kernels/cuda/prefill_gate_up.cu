// moe_lora_prefill_gate_up_{bf16,f16}: h = act(W_gate x + s B_g A_g x + b_g, W_up x + s B_u A_u x + b_u) for every row, where an
// expert has many rows (Hopper).
//
// hidden [T, H] gathered by row_pair / top_k; gate and up through one tensor map whose box of 128 rows interleaves 8 rows of
// gate with 8 of up, so that both of a feature meet in one thread; shrunk [rows, ...] -> intermediate [rows, I].
//
// A block takes 64 features and the tokens of one RowTile of up to 256 rows: tile/grouped.cuh. Activation in registers, h leaves
// through shared memory in 64-byte pieces. h is rounded once.
// Cost: 4 H I flops a row at the tensor cores' rate; weights from memory about once a kTilesTogether tiles, tokens I / 64 times from L2.
// Limits: sm_90a; H, I multiples of 8; activations SiLU and clamped SwiGLU; grid: one block an SM, of kGroupedThreads;
// kGroupedShared bytes of dynamic shared memory.
#if !defined(__CUDA_ARCH__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
#include "tile/grouped.cuh"
#include "epilogue/swiglu.cuh"

namespace {

template <class T>
struct GateUpProblem {
    static constexpr int kProjections = 2, kFirstProjection = 0, kFeatures = 64;
    const PrefillGateUpParams& all;
    const GateUpParams& g;

    __device__ explicit GateUpProblem(const PrefillGateUpParams& params) : all(params), g(params.gate_up) {}
    __device__ uint32_t depth() const { return g.hidden_size; }
    __device__ uint32_t features() const { return g.intermediate_size; }
    __device__ uint64_t tokens() const { return g.hidden; }
    __device__ uint64_t tiles() const { return g.tiles; }
    __device__ uint64_t counts() const { return g.counts; }
    __device__ uint32_t* claimed() const { return reinterpret_cast<RouteCounts*>(g.counts)->claimed + 0; }
    __device__ uint64_t segments() const { return g.segments; }
    __device__ uint64_t adapters() const { return g.adapters; }
    __device__ uint32_t num_experts() const { return g.num_experts; }
    __device__ uint64_t shrunk() const { return g.shrunk; }
    __device__ uint32_t shrunk_stride() const { return g.shrunk_stride; }
    __device__ uint32_t max_rank() const { return g.max_rank; }
    __device__ __forceinline__ uint32_t token_row(uint32_t row) const {
        return reinterpret_cast<const uint32_t*>(g.row_pair)[row] / g.top_k;
    }
    __device__ __forceinline__ void load_weights(uint32_t to, uint32_t full, uint32_t k, const TileJob& job) const {
        tma_load_5d(to, &all.weights, full, k, 0, 0, job.first_feature / 8, job.expert);
    }

    // Activation, rounding and stores of a warpgroup's 32 features.
    template <bool kClamped>
    __device__ __forceinline__ void finish_as(const float (&sum)[2][64], const TileJob& job, uint32_t staged,
                                              uint32_t group) const {
        const uint32_t thread = threadIdx.x % 128, lane = thread % 32, warp = thread / 32;
        const uint32_t half = half_width(job.num_rows);
        float gate_bias = 0.0f, up_bias = 0.0f;
        if (g.gate_bias != 0) {
            const uint32_t feature = job.first_feature + group * 32 + warp * 8 + lane / 4;
            if (feature < g.intermediate_size) {
                const size_t at = static_cast<size_t>(job.expert) * g.intermediate_size + feature;
                gate_bias = reinterpret_cast<const float*>(g.gate_bias)[at];
                up_bias = reinterpret_cast<const float*>(g.up_bias)[at];
            }
        }
        named_barrier(1 + group, 128);  // the tile before has left shared memory
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            if (h == 1 && job.num_rows <= 128) break;
#pragma unroll
            for (int j = 0; j < 16; j += 4) {
                if (8 * j >= half) break;
                uint32_t words[4];
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    float value[2];
#pragma unroll
                    for (int q = 0; q < 2; ++q) {
                        const float gate = sum[h][4 * (j + i) + q], up = sum[h][4 * (j + i) + 2 + q];
                        value[q] = kClamped ? clamped_swiglu(g.alpha, g.limit, gate + gate_bias, up + up_bias)
                                            : swiglu(gate + gate_bias, up + up_bias);
                    }
                    words[i] = narrow_pair<T>(value[0], value[1]);
                }
                const uint32_t token = h * half + 8 * j + lane;
                stmatrix_transposed(staged + token * 64 + ((warp ^ (token / 2 % 4)) << 4), words[0], words[1], words[2], words[3]);
            }
        }
        named_barrier(1 + group, 128);
        const uint32_t piece = thread % 4, feature = job.first_feature + group * 32 + piece * 8;
        if (feature >= g.intermediate_size) return;
        T* to = reinterpret_cast<T*>(g.intermediate) + static_cast<size_t>(job.first_row) * g.intermediate_size + feature;
#pragma unroll 4
        for (uint32_t token = thread / 4; token < job.num_rows; token += 32) {
            *reinterpret_cast<uint4*>(to + static_cast<size_t>(token) * g.intermediate_size) =
                load_shared16(staged + token * 64 + ((piece ^ (token / 2 % 4)) << 4));
        }
    }

    // Multiplies the products of a token by its routing weight; the weights go by way of shared memory.
    __device__ __forceinline__ void weigh(float (&sum)[2][64], const TileJob& job, uint32_t staged, uint32_t group) const {
        const float* weights = reinterpret_cast<const float*>(g.row_weight) + job.first_row;
        named_barrier(1 + group, 128);  // the tile before has left shared memory
        for (uint32_t i = threadIdx.x % 128; i < kGroupedTokens; i += 128) {
            store_shared1(staged + 4 * i, i < job.num_rows ? __float_as_uint(weights[i]) : 0);
        }
        named_barrier(1 + group, 128);
        const uint32_t mine = staged + threadIdx.x % 4 * 8, half = half_width(job.num_rows);
#pragma unroll
        for (int h = 0; h < 2; ++h) {
#pragma unroll
            for (int j = 0; j < 16; ++j) {
                const uint2 pair = load_shared8(mine + 4 * (h * half + 8 * j));
#pragma unroll
                for (int i = 0; i < 4; ++i) sum[h][4 * j + i] *= __uint_as_float(i % 2 == 0 ? pair.x : pair.y);
            }
        }
    }

    __device__ __forceinline__ void finish(float (&sum)[2][64], const TileJob& job, uint32_t staged, uint32_t group) const {
        if (g.weigh_input) weigh(sum, job, staged, group);
        if (g.activation == 3) {
            finish_as<true>(sum, job, staged, group);
        } else {
            finish_as<false>(sum, job, staged, group);
        }
    }
};

}  // namespace

extern "C" __global__ void __launch_bounds__(kGroupedThreads, 1)
    moe_lora_prefill_gate_up_bf16(const __grid_constant__ PrefillGateUpParams p) {
    extern __shared__ char prefill_gate_up_shared[];
    grouped_product<bf16>(GateUpProblem<bf16>(p), prefill_gate_up_shared);
}

extern "C" __global__ void __launch_bounds__(kGroupedThreads, 1)
    moe_lora_prefill_gate_up_f16(const __grid_constant__ PrefillGateUpParams p) {
    extern __shared__ char prefill_gate_up_shared[];
    grouped_product<f16>(GateUpProblem<f16>(p), prefill_gate_up_shared);
}
#endif
