// Bulk copies (sm_90): boxes of a tensor in global memory to shared memory, counted in bytes by an mbarrier. One thread issues a
// box; coordinates are in numbers, the innermost dimension first, and what lies outside of the tensor becomes zero.
#pragma once
#include <cstdint>

// As the driver encodes it. Part of a kernel's parameters, which must be __grid_constant__.
struct alignas(64) TensorMap {
    uint64_t words[16];
};
static_assert(sizeof(TensorMap) == 128, "TensorMap");

__device__ __forceinline__ void tma_prefetch(const TensorMap* map) {
    asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}
__device__ __forceinline__ void tma_load_3d(uint32_t shared, const TensorMap* map, uint32_t barrier, uint32_t c0, uint32_t c1,
                                            uint32_t c2) {
    asm volatile(
        "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3,%4,%5}], [%2];" ::"r"(shared),
        "l"(map), "r"(barrier), "r"(c0), "r"(c1), "r"(c2)
        : "memory");
}
__device__ __forceinline__ void tma_load_4d(uint32_t shared, const TensorMap* map, uint32_t barrier, uint32_t c0, uint32_t c1,
                                            uint32_t c2, uint32_t c3) {
    asm volatile(
        "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3,%4,%5,%6}], [%2];" ::"r"(
            shared),
        "l"(map), "r"(barrier), "r"(c0), "r"(c1), "r"(c2), "r"(c3)
        : "memory");
}
__device__ __forceinline__ void tma_load_5d(uint32_t shared, const TensorMap* map, uint32_t barrier, uint32_t c0, uint32_t c1,
                                            uint32_t c2, uint32_t c3, uint32_t c4) {
    asm volatile(
        "cp.async.bulk.tensor.5d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3,%4,%5,%6,%7}], [%2];" ::"r"(
            shared),
        "l"(map), "r"(barrier), "r"(c0), "r"(c1), "r"(c2), "r"(c3), "r"(c4)
        : "memory");
}
// Bytes in order, a multiple of 16 from a multiple of 16 on.
__device__ __forceinline__ void bulk_load(uint32_t shared, uint64_t global, uint32_t bytes, uint32_t barrier) {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(shared),
                 "l"(global), "r"(bytes), "r"(barrier)
                 : "memory");
}
// Brings bytes to L2, a multiple of 16 from a multiple of 16 on.
__device__ __forceinline__ void bulk_prefetch_l2(const void* global, uint32_t bytes) {
    asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(global), "r"(bytes) : "memory");
}
