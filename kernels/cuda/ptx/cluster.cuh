// Blocks of a cluster (sm_90) and their shared memory. Thin names for single instructions.
#pragma once
#include <cstdint>

__device__ __forceinline__ uint32_t cluster_rank() {
    uint32_t rank;
    asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    return rank;
}
// The address of a place of this block's shared memory in block `rank` of the cluster.
__device__ __forceinline__ uint32_t cluster_address(uint32_t shared, uint32_t rank) {
    uint32_t address;
    asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(address) : "r"(shared), "r"(rank));
    return address;
}
// All threads of all blocks come before any goes; orders no memory, which would cost a fence of the whole GPU.
__device__ __forceinline__ void cluster_barrier_relaxed() {
    asm volatile("barrier.cluster.arrive.relaxed.aligned;\nbarrier.cluster.wait.aligned;" ::: "memory");
}
// The same in two halves.
__device__ __forceinline__ void cluster_arrive_relaxed() { asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory"); }
__device__ __forceinline__ void cluster_wait() { asm volatile("barrier.cluster.wait.aligned;" ::: "memory"); }
// Arrives at a barrier of another block. Not with .release.cluster, which is a fence of the whole GPU.
__device__ __forceinline__ void mbarrier_arrive_remote(uint32_t cluster_barrier) {
    asm volatile("mbarrier.arrive.shared::cluster.b64 _, [%0];" ::"r"(cluster_barrier) : "memory");
}
// Copies shared memory of this block to another block's, counted in bytes by a barrier there.
__device__ __forceinline__ void bulk_push(uint32_t cluster_to, uint32_t shared_from, uint32_t bytes, uint32_t cluster_barrier) {
    asm volatile(
        "cp.async.bulk.shared::cluster.shared::cta.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(cluster_to),
        "r"(shared_from), "r"(bytes), "r"(cluster_barrier)
        : "memory");
}
// Stores two or four numbers in a block's shared memory, counted in bytes by a barrier there.
__device__ __forceinline__ void push_pair(uint32_t cluster_to, uint32_t a, uint32_t b, uint32_t cluster_barrier) {
    asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.v2.b32 [%0], {%1, %2}, [%3];" ::"r"(cluster_to), "r"(a),
                 "r"(b), "r"(cluster_barrier)
                 : "memory");
}
__device__ __forceinline__ void push_four(uint32_t cluster_to, uint32_t a, uint32_t b, uint32_t c, uint32_t d, uint32_t cluster_barrier) {
    asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.b32 [%0], {%1, %2, %3, %4}, [%5];" ::"r"(cluster_to),
                 "r"(a), "r"(b), "r"(c), "r"(d), "r"(cluster_barrier)
                 : "memory");
}
