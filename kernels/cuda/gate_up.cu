// moe_lora_gate_up_{bf16,f16}: h = act(W_gate x + s B_g A_g x + b_g, W_up x + s B_u A_u x + b_u) for every row.
//
// hidden [T, H] gathered by row_pair / top_k; gate, up [E, I, H] (any row and expert stride); shrunk [rows, ...] from
// moe_lora_shrink -> intermediate [rows, I].
//
// A block takes 64 features (64 gate rows and the 64 up rows of the same features) and the tokens of one RowTile. Gate and
// up of a feature meet in one lane, so LoRA, bias and activation need no exchange. LoRA-B joins the accumulators.
// h is rounded once. Blocks of one RowTile are neighbours, so its tokens stay in L2.
// Cost: weights of an expert read once a RowTile (128 tokens), tokens I / 64 times from L2; 4 H I flops a row.
// Limits: H, I multiples of 8; grid: any, of kProductThreads; kProductShared + kLoraPartsBytes bytes of dynamic shared memory.
#include "epilogue/activation.cuh"
#include "epilogue/lora.cuh"
#include "params.cuh"
#include "tile/product.cuh"

namespace {

constexpr uint32_t kFeatures = kWeightRows / 2;

// Leaves the products of the tile in shared memory, gate of feature f in column f, up in column 64 + f.
template <class T, class Shape>
__device__ __forceinline__ void gate_up_products(const GateUpParams& p, const RowTile& tile, uint32_t num_segments,
                                                 uint32_t first_feature, char* shared) {
    const TileLora<T, 2> lora{tile, reinterpret_cast<LoraPart*>(shared + kProductShared),
                             reinterpret_cast<const uint32_t*>(p.shrunk), p.shrunk_stride, p.max_rank, first_feature,
                             min(kFeatures, p.intermediate_size - first_feature)};
    const auto* row_pair = reinterpret_cast<const uint32_t*>(p.row_pair);
    const size_t expert = tile.expert * p.expert_stride;
    const T* const weights[2] = {reinterpret_cast<const T*>(p.gate) + expert, reinterpret_cast<const T*>(p.up) + expert};
    float sum[Shape::kM16][Shape::kN8][4] = {};
    tile_product<T, Shape, true>(
        sum, shared, p.hidden_size, weights, false,
        [&](uint32_t row) {
            const uint32_t feature = first_feature + row % kFeatures;
            return feature < p.intermediate_size ? feature * (p.row_stride / 8) : kNoRow;
        },
        reinterpret_cast<const T*>(p.hidden),
        [&](uint32_t row) {
            if (row >= tile.num_rows) return kNoRow;
            return row_pair[tile.first_row + row] / p.top_k * (p.hidden_size / 8);
        },
        lora,
        [&](uint32_t raw) {
            if (p.adapters != 0) lora.read(raw, p.segments, num_segments);
        },
        [&](uint32_t raw) -> uint32_t {
            return p.adapters == 0 ? 0 : lora.list(raw, num_segments, p.adapters, p.num_experts, 0);
        });
    stage_tile<Shape, true>(sum, reinterpret_cast<float*>(shared));
}

// Bias and activation, 8 features of a token at a time.
template <class T>
__device__ __forceinline__ void finish_tile(const GateUpParams& p, const RowTile& tile, uint32_t first_feature,
                                            const float* staged) {
    for (uint32_t i = threadIdx.x; i < tile.num_rows * (kFeatures / 8); i += kProductThreads) {
        const uint32_t token = i / (kFeatures / 8), within = i % (kFeatures / 8) * 8, feature = first_feature + within;
        if (feature >= p.intermediate_size) continue;
        const size_t row = tile.first_row + token;
        const size_t bias_at = static_cast<size_t>(tile.expert) * p.intermediate_size + feature;
        const float weight = p.weigh_input ? reinterpret_cast<const float*>(p.row_weight)[row] : 1.0f;
        __align__(16) T h[8];
#pragma unroll
        for (int j = 0; j < 8; ++j) {
            float gate = staged[token * kStagedPitch + within + j] * weight;
            float up = staged[token * kStagedPitch + kFeatures + within + j] * weight;
            if (p.gate_bias != 0) {
                gate += reinterpret_cast<const float*>(p.gate_bias)[bias_at + j];
                up += reinterpret_cast<const float*>(p.up_bias)[bias_at + j];
            }
            h[j] = narrow<T>(activate(p.activation, p.alpha, p.limit, gate, up));
        }
        T* to = reinterpret_cast<T*>(p.intermediate) + row * p.intermediate_size + feature;
        *reinterpret_cast<uint4*>(to) = *reinterpret_cast<const uint4*>(h);
    }
    __syncthreads();
}

template <class T>
__device__ __forceinline__ void gate_up_kernel(const GateUpParams& p) {
    extern __shared__ __align__(128) char gate_up_shared[];
    // With LoRA the launch before is shrink, which only the LoRA steps have to wait for: all else is older.
    if (p.adapters == 0) wait_for_previous_launch();
    const RouteCounts counts = *reinterpret_cast<const RouteCounts*>(p.counts);
    const uint32_t blocks = (p.intermediate_size + kFeatures - 1) / kFeatures;
    for (uint32_t item = blockIdx.x; item < counts.num_tiles * blocks; item += gridDim.x) {
        const RowTile tile = reinterpret_cast<const RowTile*>(p.tiles)[item / blocks];
        const uint32_t first_feature = item % blocks * kFeatures;
        for_tile_shape(tile.num_rows, [&](auto shape) {
            gate_up_products<T, decltype(shape)>(p, tile, counts.num_segments, first_feature, gate_up_shared);
        });
        finish_tile<T>(p, tile, first_feature, reinterpret_cast<const float*>(gate_up_shared));
    }
    wait_for_previous_launch();
}

}  // namespace

extern "C" __global__ void __launch_bounds__(kProductThreads, kProductBlocks) moe_lora_gate_up_bf16(const GateUpParams p) {
    gate_up_kernel<bf16>(p);
}

extern "C" __global__ void __launch_bounds__(kProductThreads, kProductBlocks) moe_lora_gate_up_f16(const GateUpParams p) {
    gate_up_kernel<f16>(p);
}
