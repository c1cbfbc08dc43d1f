// The sum over a token's experts for 64 features, y [T][64] in f32 in shared memory.
#pragma once
#include <cstdint>

constexpr uint32_t kSumRowBytes = 64 * 4;

struct ExpertSum {
    float* y;
    const uint16_t* tokens;  // [rows]
    const float* weights;    // [rows]

    // Tokens differ in which banks hold a feature, so that lanes with different tokens do not collide.
    __device__ __forceinline__ uint32_t place(uint32_t token, uint32_t feature) const {
        return token * 64 + (feature ^ (token & 3) << 3);
    }
    // Whether a token has two of these rows (its pairs name an expert twice). Those are neighbours. A warp.
    __device__ __forceinline__ bool repeats(uint32_t first_row, uint32_t num_rows) const {
        bool found = false;
        for (uint32_t row = 1 + threadIdx.x % 32; row < num_rows; row += 32) {
            found = found || tokens[first_row + row] == tokens[first_row + row - 1];
        }
        return __any_sync(0xffffffffu, found);
    }
    // Adds weight * (value + bias) for rows `row` .. of `num_rows`, laid out as the result of mma: features `feature` and + 8 of rows
    // row + 2 t and + 1. A warp; where tokens repeat, lanes with the same one go one after the other.
    __device__ __forceinline__ void add(const float (&value)[4], uint32_t first_row, uint32_t row, uint32_t num_rows,
                                        uint32_t feature, const float (&bias)[2], bool repeats) const {
        const uint32_t mine = threadIdx.x % 4;
#pragma unroll 1
        for (uint32_t turn = 0; turn < (repeats ? 4 : 1); ++turn) {
            if (!repeats || turn == mine) add_lane(value, first_row, row + 2 * mine, num_rows, feature, bias);
            __syncwarp();
        }
    }
    __device__ __forceinline__ void add_lane(const float (&value)[4], uint32_t first_row, uint32_t row, uint32_t num_rows,
                                             uint32_t feature, const float (&bias)[2]) const {
#pragma unroll
        for (uint32_t i = 0; i < 2; ++i) {
            if (row + i >= num_rows) return;
            const uint32_t token = tokens[first_row + row + i];
            const float weight = weights[first_row + row + i];
            y[place(token, feature)] += weight * (value[i] + bias[0]);
            y[place(token, feature + 8)] += weight * (value[2 + i] + bias[1]);
        }
    }
};
