// moe_lora_down_{bf16,f16}: y = W_down h + s B_d A_d h + b_d for every row.
//
// intermediate [rows, I], down [E, H, I], shrunk [rows, ...] from moe_lora_shrink -> rows_out [rows, H], f32 or the
// activation's format; moe_lora_combine weighs and adds them.
//
// A block takes 128 output features and the tokens of one RowTile: tile/product.cuh, LoRA-B included.
// Cost: weights of an expert read once a RowTile (128 tokens), tokens H / 128 times from L2; 2 H I flops a row; rows_out
// written once.
// Limits: H, I multiples of 8; grid: any, of kProductThreads; kProductShared + kLoraPartsBytes bytes of dynamic shared memory.
#include "epilogue/lora.cuh"
#include "params.cuh"
#include "tile/product.cuh"

namespace {

// Leaves the products of the tile in shared memory.
template <class T, class Shape>
__device__ __forceinline__ void down_products(const DownParams& p, const RowTile& tile, uint32_t num_segments,
                                              uint32_t first_feature, char* shared) {
    // The tile's features that have a row of B: all, but for fully sharded adapters.
    const uint32_t end_feature = min(first_feature + kWeightRows, p.hidden_size);
    const uint32_t first_b = max(first_feature, p.first_b), end_b = min(end_feature, p.first_b + p.num_b);
    const bool any_b = p.adapters != 0 && first_b < end_b;
    const TileLora<T, 1> lora{tile, reinterpret_cast<LoraPart*>(shared + kProductShared),
                             reinterpret_cast<const uint32_t*>(p.shrunk), p.shrunk_stride, 0, first_b - p.first_b,
                             end_b - first_b, first_b - first_feature};
    const T* half = reinterpret_cast<const T*>(p.down) + tile.expert * p.expert_stride;
    const T* const weights[2] = {half, half};
    float sum[Shape::kM16][Shape::kN8][4] = {};
    tile_product<T, Shape, false>(
        sum, shared, p.intermediate_size, weights, p.adapters == 0,
        [&](uint32_t row) {
            return first_feature + row < p.hidden_size ? (first_feature + row) * (p.row_stride / 8) : kNoRow;
        },
        reinterpret_cast<const T*>(p.intermediate),
        [&](uint32_t row) {
            return row < tile.num_rows ? (tile.first_row + row) * (p.intermediate_size / 8) : kNoRow;
        },
        lora,
        [&](uint32_t raw) {
            if (any_b) lora.read(raw, p.segments, num_segments);
        },
        [&](uint32_t raw) -> uint32_t {
            return !any_b ? 0 : lora.list(raw, num_segments, p.adapters, p.num_experts, 2);
        });
    stage_tile<Shape, false>(sum, reinterpret_cast<float*>(shared));
}

// Bias, rounding and stores, 8 features of a token at a time.
template <class T, class Out>
__device__ __forceinline__ void finish_tile(const DownParams& p, const RowTile& tile, uint32_t first_feature,
                                            const float* staged) {
    for (uint32_t i = threadIdx.x; i < tile.num_rows * (kWeightRows / 8); i += kProductThreads) {
        const uint32_t token = i / (kWeightRows / 8), within = i % (kWeightRows / 8) * 8;
        const uint32_t feature = first_feature + within;
        if (feature >= p.hidden_size) continue;
        __align__(16) Out y[8];
#pragma unroll
        for (int j = 0; j < 8; ++j) {
            float value = staged[token * kStagedPitch + within + j];
            if (p.bias != 0) {
                value += reinterpret_cast<const float*>(
                    p.bias)[static_cast<size_t>(tile.expert) * p.hidden_size + feature + j];
            }
            y[j] = narrow<Out>(value);
        }
        Out* to = reinterpret_cast<Out*>(p.rows_out) +
                  static_cast<size_t>(tile.first_row + token) * p.hidden_size + feature;
#pragma unroll
        for (int j = 0; j < sizeof(y) / 16; ++j) {
            reinterpret_cast<uint4*>(to)[j] = reinterpret_cast<const uint4*>(y)[j];
        }
    }
    __syncthreads();
}

template <class T>
__device__ __forceinline__ void down_kernel(const DownParams& p) {
    extern __shared__ __align__(128) char down_shared[];
    // The lists and weights are older than the launch before: with LoRA that is shrink, which only the LoRA steps have to wait for,
    // else gate_up, which the tokens have to wait for.
    const RouteCounts counts = *reinterpret_cast<const RouteCounts*>(p.counts);
    const uint32_t blocks = (p.hidden_size + kWeightRows - 1) / kWeightRows;
    for (uint32_t item = blockIdx.x; item < counts.num_tiles * blocks; item += gridDim.x) {
        const RowTile tile = reinterpret_cast<const RowTile*>(p.tiles)[item / blocks];
        const uint32_t first_feature = item % blocks * kWeightRows;
        for_tile_shape(tile.num_rows, [&](auto shape) {
            down_products<T, decltype(shape)>(p, tile, counts.num_segments, first_feature, down_shared);
        });
        if (p.rows_f32) {
            finish_tile<T, float>(p, tile, first_feature, reinterpret_cast<const float*>(down_shared));
        } else {
            finish_tile<T, T>(p, tile, first_feature, reinterpret_cast<const float*>(down_shared));
        }
    }
    wait_for_previous_launch();
}

}  // namespace

extern "C" __global__ void __launch_bounds__(kProductThreads, kProductBlocks) moe_lora_down_bf16(const DownParams p) {
    down_kernel<bf16>(p);
}

extern "C" __global__ void __launch_bounds__(kProductThreads, kProductBlocks) moe_lora_down_f16(const DownParams p) {
    down_kernel<f16>(p);
}
