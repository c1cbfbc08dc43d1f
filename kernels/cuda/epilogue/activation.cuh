// h = act(gate, up) in f32.
#pragma once
#include <cstdint>

// A NaN in gate or up must come out as a NaN: comparisons are written so that they let it pass, unlike fminf.
__device__ __forceinline__ float sigmoid(float x) { return 1.0f / (1.0f + __expf(-x)); }

__device__ __forceinline__ float activate(uint32_t kind, float alpha, float limit, float gate, float up) {
    if (kind == 0) return gate * sigmoid(gate) * up;
    if (kind == 1) return 0.5f * gate * erfcf(gate * -0.70710678f) * up;
    if (kind == 2) {
        // 0.5 (1 + tanh(z)) = sigmoid(2 z), z = sqrt(2 / pi) (x + 0.044715 x^3)
        return gate * sigmoid(1.5957691f * (gate + 0.044715f * gate * gate * gate)) * up;
    }
    gate = gate > limit ? limit : gate;
    up = up > limit ? limit : (up < -limit ? -limit : up);
    return (up + 1.0f) * gate * sigmoid(alpha * gate);
}
