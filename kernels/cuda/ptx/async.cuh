// Copies from global to shared memory that run beside the arithmetic (sm_80), and the dependency between two launches
// (sm_90). Thin names for single instructions, nothing else.
#pragma once
#include <cstdint>

__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
    return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// Copies 16 bytes, or writes 16 zero bytes and reads nothing if not `valid`.
__device__ __forceinline__ void cp_async(uint32_t shared, const void* global, bool valid) {
    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(shared), "l"(global), "r"(valid ? 16 : 0)
                 : "memory");
}

// The same for data that is read once, in order: fetches the next 128 bytes of the row too.
__device__ __forceinline__ void cp_async_stream(uint32_t shared, const void* global, bool valid) {
    asm volatile("cp.async.cg.shared.global.L2::256B [%0], [%1], 16, %2;" ::"r"(shared), "l"(global), "r"(valid ? 16 : 0)
                 : "memory");
}

__device__ __forceinline__ void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until at most `kPending` groups are in flight.
template <int kPending>
__device__ __forceinline__ void cp_async_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

__device__ __forceinline__ void prefetch_l2(const void* global) {
    asm volatile("prefetch.global.L2 [%0];" ::"l"(global));
}

// Under programmatic launch: waits until the launch before this one is complete, and with it all before that, then lets the
// next launch fill the SMs that this one leaves. Every block of every kernel calls it at least once; most do so first.
// What was complete before the previous launch's blocks called it may be read earlier.
// Without the launch attribute, and before sm_90, it does nothing.
__device__ __forceinline__ void wait_for_previous_launch() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}
