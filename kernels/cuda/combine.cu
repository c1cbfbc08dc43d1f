// moe_lora_combine_{bf16,f16}: out = scaling * sum_j w_j y_j, a token's experts in order.
//
// rows_in [rows, H] (f32 or the activation's format), found by pair_row [T * k]; pairs without a row (-1) add nothing ->
// out [T, H] (f32 or the activation's format).
//
// A thread takes 8 features of a token and adds in f32 in the order of the experts, so the sum has one order whatever the
// batch. Cost: every row read once, every output written once.
// Limits: H a multiple of 8; grid: x blocks of kCombineThreads over the H / 8 parts of a token, y over tokens.
#include "mma/number.cuh"
#include "params.cuh"
#include "ptx/async.cuh"

namespace {

constexpr int kCombineThreads = 128;

template <class From>
__device__ __forceinline__ void load_row(float (&to)[8], const From* from) {
    __align__(16) From values[8];
#pragma unroll
    for (int i = 0; i < sizeof(values) / 16; ++i) {
        reinterpret_cast<uint4*>(values)[i] = __ldg(reinterpret_cast<const uint4*>(from) + i);
    }
#pragma unroll
    for (int i = 0; i < 8; ++i) to[i] = widen(values[i]);
}

template <class To>
__device__ __forceinline__ void store_row(To* to, const float (&from)[8]) {
    __align__(16) To values[8];
#pragma unroll
    for (int i = 0; i < 8; ++i) values[i] = narrow<To>(from[i]);
#pragma unroll
    for (int i = 0; i < sizeof(values) / 16; ++i) {
        reinterpret_cast<uint4*>(to)[i] = reinterpret_cast<const uint4*>(values)[i];
    }
}

template <class T, class From>
__device__ __forceinline__ void combine(const CombineParams& p, uint32_t token, uint32_t feature) {
    const auto* pair_row = reinterpret_cast<const int32_t*>(p.pair_row) + static_cast<size_t>(token) * p.top_k;
    const auto* weights = reinterpret_cast<const float*>(p.topk_weights) + static_cast<size_t>(token) * p.top_k;
    float sum[8] = {};
#pragma unroll 4
    for (uint32_t j = 0; j < p.top_k; ++j) {
        const int32_t row = pair_row[j];
        if (row < 0) continue;
        const float weight = p.topk_weights != 0 ? weights[j] : 1.0f;
        float y[8];
        load_row(y, reinterpret_cast<const From*>(p.rows_in) + static_cast<size_t>(row) * p.hidden_size + feature);
#pragma unroll
        for (int i = 0; i < 8; ++i) sum[i] += weight * y[i];
    }
#pragma unroll
    for (int i = 0; i < 8; ++i) sum[i] *= p.scaling;
    const size_t at = static_cast<size_t>(token) * p.hidden_size + feature;
    if (p.out_f32) {
        store_row(reinterpret_cast<float*>(p.out) + at, sum);
    } else {
        store_row(reinterpret_cast<T*>(p.out) + at, sum);
    }
}

template <class T>
__device__ __forceinline__ void combine_kernel(const CombineParams& p) {
    wait_for_previous_launch();
    const uint32_t feature = (blockIdx.x * kCombineThreads + threadIdx.x) * 8;
    if (feature >= p.hidden_size) return;
    for (uint32_t token = blockIdx.y; token < p.num_tokens; token += gridDim.y) {
        if (p.rows_f32) {
            combine<T, float>(p, token, feature);
        } else {
            combine<T, T>(p, token, feature);
        }
    }
}

}  // namespace

extern "C" __global__ void __launch_bounds__(kCombineThreads) moe_lora_combine_bf16(const CombineParams p) {
    combine_kernel<bf16>(p);
}

extern "C" __global__ void __launch_bounds__(kCombineThreads) moe_lora_combine_f16(const CombineParams p) {
    combine_kernel<f16>(p);
}
