// A barrier over all blocks of a cooperative launch.
#pragma once
#include <cstdint>

// One u32 in global memory, zero before the first use and left fit for the next one, whatever the grid. Block 0 adds what
// makes all blocks together add 2^31, so the top bit flips exactly when the last block arrives.
__device__ __forceinline__ void grid_barrier(uint32_t* word) {
    __syncthreads();
    if (threadIdx.x == 0) {
        const uint32_t arrive = blockIdx.x == 0 ? 0x80000000u - (gridDim.x - 1) : 1u;
        uint32_t before, now;
        __threadfence();
        asm volatile("atom.acq_rel.gpu.global.add.u32 %0, [%1], %2;" : "=r"(before) : "l"(word), "r"(arrive) : "memory");
        do {
            asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(now) : "l"(word) : "memory");
        } while (((before ^ now) & 0x80000000u) == 0);
        __threadfence();
    }
    __syncthreads();
}
