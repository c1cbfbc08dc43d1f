// The activations of the Hopper kernels in f32, with the fast exponential and reciprocal (relative error about 1e-6), and the
// rounding of two neighbours to 16 bits.
#pragma once
#include <cstdint>

#include "mma/number.cuh"

// x * sigmoid(z). A NaN stays one.
__device__ __forceinline__ float times_sigmoid(float x, float z) { return __fdividef(x, 1.0f + __expf(-z)); }

__device__ __forceinline__ float swiglu(float gate, float up) { return times_sigmoid(gate, gate) * up; }

__device__ __forceinline__ float clamped_swiglu(float alpha, float limit, float gate, float up) {
    gate = gate > limit ? limit : gate;
    up = up > limit ? limit : (up < -limit ? -limit : up);
    return (up + 1.0f) * times_sigmoid(gate, alpha * gate);
}

template <class T>
__device__ __forceinline__ uint32_t pack(float low, float high);
template <>
__device__ __forceinline__ uint32_t pack<bf16>(float low, float high) {
    const __nv_bfloat162 both = __floats2bfloat162_rn(low, high);
    return *reinterpret_cast<const uint32_t*>(&both);
}
template <>
__device__ __forceinline__ uint32_t pack<f16>(float low, float high) {
    const __half2 both = __floats2half2_rn(low, high);
    return *reinterpret_cast<const uint32_t*>(&both);
}
