// The ends of the Hopper kernels: activations in f32 with the fast exponential and reciprocal (relative error about 1e-6), the
// rounding of two neighbours to 16 bits, and the way of 8x8 fragments to shared memory.
#pragma once
#include <cstdint>

#include "mma/number.cuh"

// x * sigmoid(z). A NaN stays one.
__device__ __forceinline__ float times_sigmoid(float x, float z) {
    float power, sigmoid;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(-1.44269504f * z));
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(sigmoid) : "f"(1.0f + power));
    return x * sigmoid;
}

__device__ __forceinline__ float swiglu(float gate, float up) { return times_sigmoid(gate, gate) * up; }

__device__ __forceinline__ float clamped_swiglu(float alpha, float limit, float gate, float up) {
    gate = gate > limit ? limit : gate;
    up = up > limit ? limit : (up < -limit ? -limit : up);
    return (up + 1.0f) * times_sigmoid(gate, alpha * gate);
}

// Stores four 8x8 matrices of 16-bit numbers, transposed; lane 8i + r gives the address of row r of what matrix i becomes.
__device__ __forceinline__ void stmatrix_transposed(uint32_t shared, uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1,%2,%3,%4};" ::"r"(shared), "r"(a), "r"(b), "r"(c), "r"(d)
                 : "memory");
}
