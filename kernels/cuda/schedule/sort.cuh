// A stable counting sort by all blocks of a launch, without atomics: every key's place is its bin's start, plus the equal
// keys of lower blocks and warps, plus those before it in its own warp.
//
// Every warp of the launch owns a contiguous range of the input. Shared memory: kSortWarps counters a bin.
#pragma once
#include <cstdint>

#include "params.cuh"
#include "ptx/grid.cuh"

constexpr int kSortWarps = 16;
constexpr int kSortThreads = kSortWarps * 32;
constexpr uint32_t kAllLanes = 0xffffffffu;

__device__ __forceinline__ uint32_t lanes_below() { return (1u << (threadIdx.x % 32)) - 1u; }

// The contiguous range of this warp when `n` things are dealt to all warps of the launch.
struct WarpRange {
    uint32_t first, end;
    __device__ explicit WarpRange(uint32_t n) {
        const uint32_t warps = gridDim.x * kSortWarps;
        const uint32_t length = ((n + warps - 1) / warps + 31) / 32 * 32;
        const uint32_t warp = blockIdx.x * kSortWarps + threadIdx.x / 32;
        first = min(n, warp * length);
        end = min(n, first + length);
    }
};

// Barrier over everything that takes part, with all earlier writes visible behind it.
__device__ __forceinline__ void sort_barrier(uint32_t* barrier) {
    if (gridDim.x > 1) {
        grid_barrier(barrier);
    } else {
        __syncthreads();
    }
}

// Replaces values[0..n) by their exclusive prefix sums, and sets values[n] to the total.
__device__ inline void block_scan(uint32_t* values, uint32_t n) {
    __shared__ uint32_t warp_sums[kSortWarps];
    const uint32_t each = (n + kSortThreads - 1) / kSortThreads;
    const uint32_t first = min(n, threadIdx.x * each), end = min(n, first + each);
    uint32_t sum = 0;
    for (uint32_t i = first; i < end; ++i) sum += values[i];
    uint32_t inclusive = sum;
    for (int d = 1; d < 32; d *= 2) {
        const uint32_t other = __shfl_up_sync(kAllLanes, inclusive, d);
        if (threadIdx.x % 32 >= d) inclusive += other;
    }
    __syncthreads();
    if (threadIdx.x % 32 == 31) warp_sums[threadIdx.x / 32] = inclusive;
    __syncthreads();
    uint32_t before = inclusive - sum;
    for (int w = 0; w < threadIdx.x / 32; ++w) before += warp_sums[w];
    for (uint32_t i = first; i < end; ++i) {
        const uint32_t value = values[i];
        values[i] = before;
        before += value;
    }
    if (threadIdx.x == kSortThreads - 1) values[n] = before;
    __syncthreads();
}

// Calls place(i, destination) for every i in 0..n, where destinations sort key(i) in 0..bins stably.
// starts: shared [bins + 1], the first destination of every bin, left for the caller. counters: shared [kSortWarps, bins].
// table: global [grid, bins] (only if grid > 1).
template <class Key, class Place>
__device__ void counting_sort(uint32_t n, uint32_t bins, uint32_t* starts, uint32_t* counters, uint32_t* table,
                              uint32_t* barrier, Key key, Place place) {
    const uint32_t lane = threadIdx.x % 32;
    uint32_t* mine = counters + threadIdx.x / 32 * bins;
    for (uint32_t i = threadIdx.x; i < kSortWarps * bins; i += kSortThreads) counters[i] = 0;
    __syncthreads();

    const WarpRange range(n);
    for (uint32_t base = range.first; base < range.end; base += 32) {
        const bool valid = base + lane < range.end;
        const uint32_t bin = valid ? key(base + lane) : ~0u;
        const uint32_t equal = __match_any_sync(kAllLanes, bin);
        if (valid && (equal & lanes_below()) == 0) mine[bin] += __popc(equal);
        __syncwarp();
    }
    __syncthreads();

    // Counters become the number of equal keys in lower warps of the block.
    for (uint32_t b = threadIdx.x; b < bins; b += kSortThreads) {
        uint32_t sum = 0;
        for (int w = 0; w < kSortWarps; ++w) {
            const uint32_t count = counters[w * bins + b];
            counters[w * bins + b] = sum;
            sum += count;
        }
        starts[b] = sum;
        if (gridDim.x > 1) table[blockIdx.x * bins + b] = sum;
    }
    if (gridDim.x > 1) {
        grid_barrier(barrier);
        for (uint32_t b = threadIdx.x; b < bins; b += kSortThreads) {
            uint32_t before = 0, all = 0;
            for (uint32_t block = 0; block < gridDim.x; ++block) {
                const uint32_t count = __ldcg(table + block * bins + b);
                before += block < blockIdx.x ? count : 0;
                all += count;
            }
            starts[b] = all;
            for (int w = 0; w < kSortWarps; ++w) counters[w * bins + b] += before;
        }
    }
    __syncthreads();
    block_scan(starts, bins);

    for (uint32_t base = range.first; base < range.end; base += 32) {
        const bool valid = base + lane < range.end;
        const uint32_t bin = valid ? key(base + lane) : ~0u;
        const uint32_t equal = __match_any_sync(kAllLanes, bin);
        const uint32_t below = __popc(equal & lanes_below());
        if (valid) place(base + lane, starts[bin] + mine[bin] + below);
        __syncwarp();
        if (valid && below == 0) mine[bin] += __popc(equal);
        __syncwarp();
    }
    sort_barrier(barrier);
}

// Sorts 0..n by key(i) in 0..num_keys, a digit at a time, lowest first; returns the list of i, in one of the halves of
// order [2, n], or null where there is one key only: then it is 0..n itself. Shared memory as for a counting_sort of a digit.
template <class Key>
__device__ const uint32_t* digit_sort(uint32_t n, uint32_t num_keys, uint32_t* order, uint32_t* shared, uint32_t* table,
                                      uint32_t* barrier, Key key) {
    const uint32_t* from = nullptr;
    for (uint32_t shift = 0; shift < 32 && ((num_keys - 1) >> shift) > 0; shift += 10) {
        uint32_t* next = order + static_cast<size_t>(shift / 10 % 2) * n;
        const uint32_t bins = min(static_cast<uint32_t>(kSortDigit), ((num_keys - 1) >> shift) + 1);
        counting_sort(
            n, bins, shared, shared + bins + 1, table, barrier,
            [&](uint32_t i) { return (key(from == nullptr ? i : __ldcg(from + i)) >> shift) % kSortDigit; },
            [&](uint32_t i, uint32_t to) { next[to] = from == nullptr ? i : __ldcg(from + i); });
        from = next;
    }
    return from;
}
