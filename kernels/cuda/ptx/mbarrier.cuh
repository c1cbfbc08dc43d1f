// Barriers in shared memory (sm_90) that count arrivals and bytes of copies. Thin names for single instructions, and the wait.
// Every phase has a parity, 0 first; waiting for a parity returns once the phase of that parity is over.
#pragma once
#include <cstdint>

__device__ __forceinline__ void mbarrier_init(uint32_t barrier, uint32_t arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}
// Makes initialised barriers known to the copy engine and to the cluster.
__device__ __forceinline__ void fence_mbarrier_init() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }

__device__ __forceinline__ void mbarrier_arrive(uint32_t barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}
// Arrives twice, for barriers where one warp may stand for two.
__device__ __forceinline__ void mbarrier_arrive_twice(uint32_t barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0], 2;" ::"r"(barrier) : "memory");
}
// Arrives, and lets the phase wait for this many bytes of copies too.
__device__ __forceinline__ void mbarrier_expect(uint32_t barrier, uint32_t bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}
// Arrives once all of this thread's earlier cp.async are done.
__device__ __forceinline__ void cp_async_arrive(uint32_t barrier) {
    asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(barrier) : "memory");
}

__device__ __forceinline__ bool mbarrier_try_wait(uint32_t barrier, uint32_t parity) {
    uint32_t over;
    asm volatile(
        "{\n.reg .pred p;\nmbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\nselp.b32 %0, 1, 0, p;\n}"
        : "=r"(over)
        : "r"(barrier), "r"(parity)
        : "memory");
    return over != 0;
}

// Whether a phase is over, without waiting.
__device__ __forceinline__ bool mbarrier_test(uint32_t barrier, uint32_t parity) {
    uint32_t over;
    asm volatile(
        "{\n.reg .pred p;\nmbarrier.test_wait.parity.shared::cta.b64 p, [%1], %2;\nselp.b32 %0, 1, 0, p;\n}"
        : "=r"(over)
        : "r"(barrier), "r"(parity)
        : "memory");
    return over != 0;
}

// What a wait that will never end does in debug builds (MOE_LORA_WATCHDOG): it faults, so that the launch fails. Not by `trap`,
// which costs registers where it stands in a wait.
struct Watchdog {
#ifdef MOE_LORA_WATCHDOG
    uint32_t turns = 0;
    __device__ __forceinline__ void turn() {
        if (++turns > 40000000) asm volatile("st.shared.u32 [%0], %0;" ::"r"(0xfffffff0u));
    }
#else
    __device__ __forceinline__ void turn() {}
#endif
};

__device__ __forceinline__ void mbarrier_wait(uint32_t barrier, uint32_t parity) {
    Watchdog watchdog;
    while (!mbarrier_try_wait(barrier, parity)) watchdog.turn();
}

// Some threads of the block: all of `count` come, none goes before.
__device__ __forceinline__ void named_barrier(uint32_t id, uint32_t count) {
    asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(count) : "memory");
}
// Comes and goes on at once.
__device__ __forceinline__ void named_barrier_arrive(uint32_t id, uint32_t count) {
    asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(count) : "memory");
}

// Shared memory written by this thread, or known to it, is what the copy engine and wgmma see from here on.
__device__ __forceinline__ void fence_async_shared() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// The same for global memory: both who writes and, after he knows of it, who copies in bulk.
__device__ __forceinline__ void fence_async_global() { asm volatile("fence.proxy.async.global;" ::: "memory"); }

// Registers of every thread of this warpgroup.
template <int kRegisters>
__device__ __forceinline__ void registers_inc() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
template <int kRegisters>
__device__ __forceinline__ void registers_dec() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

// A counter in global memory that blocks of one launch add to, and its value; what was written before an addition is seen after
// the value was read.
__device__ __forceinline__ void counter_add(uint32_t* counter, uint32_t value) {
    asm volatile("red.release.gpu.global.add.u32 [%0], %1;" ::"l"(counter), "r"(value) : "memory");
}
__device__ __forceinline__ uint32_t counter_read(const uint32_t* counter) {
    uint32_t value;
    asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(value) : "l"(counter) : "memory");
    return value;
}
