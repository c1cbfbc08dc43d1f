// The padded block format of other engines: every adapter slot's pairs by expert, each expert's share in whole blocks.
//
// Tokens are sorted by slot, pairs by expert, so that the pairs of one (slot, expert) are neighbours in their own order; a
// warp a slot then sums the blocks of its experts, and every pair goes to its place.
#pragma once
#include <cstdint>

#include "params.cuh"
#include "schedule/sort.cuh"

// What pairs and tokens mean. Nothing here trusts a number: what does not exist takes no part.
struct BlockKeys {
    const AlignBlockParams& p;

    // The slot of the segment that holds a token, if that takes part, else -1. enabled: of every slot.
    __device__ int32_t slot_of_segment(uint32_t token, const uint32_t* enabled) const {
        const auto* starts = reinterpret_cast<const int32_t*>(p.seg_indptr);
        uint32_t first = 0, end = p.num_segments + 1;  // the first start after the token lies in here
        while (first < end) {
            const uint32_t middle = (first + end) / 2;
            if (starts[middle] <= static_cast<int32_t>(token)) {
                first = middle + 1;
            } else {
                end = middle;
            }
        }
        if (first == 0 || first > p.num_segments) return -1;
        const int32_t slot = reinterpret_cast<const int32_t*>(p.req_to_lora)[first - 1];
        return slot >= 0 && slot < static_cast<int32_t>(p.max_loras) && __ldcg(enabled + slot) ? slot : -1;
    }
    __device__ int32_t slot(uint32_t pair) const {
        return __ldcg(reinterpret_cast<const int32_t*>(p.token_slots) + pair / p.top_k);
    }
    // The local expert, or E for none.
    __device__ uint32_t expert(uint32_t pair) const {
        const int64_t id = p.ids_are_i64 ? reinterpret_cast<const int64_t*>(p.topk_ids)[pair]
                                         : reinterpret_cast<const int32_t*>(p.topk_ids)[pair];
        if (id < 0 || id >= p.num_experts) return p.num_experts;
        if (p.expert_map == 0) return static_cast<uint32_t>(id);
        return min(static_cast<uint32_t>(reinterpret_cast<const int32_t*>(p.expert_map)[id]), p.num_experts);
    }
};

// Marks the slots that take part, finds every token's slot, and writes what an empty batch would give.
__device__ inline void begin_blocks(const AlignBlockParams& p, const BlockKeys& keys, uint32_t* barrier) {
    const uint32_t thread = blockIdx.x * kSortThreads + threadIdx.x, threads = gridDim.x * kSortThreads;
    auto* enabled = reinterpret_cast<uint32_t*>(p.enabled);
    for (uint32_t slot = thread; slot < p.max_loras; slot += threads) enabled[slot] = 0;
    sort_barrier(barrier);
    for (uint32_t i = thread; i < p.max_loras; i += threads) {
        const int32_t slot = reinterpret_cast<const int32_t*>(p.lora_ids)[i];
        if (slot < 0 || slot >= static_cast<int32_t>(p.max_loras)) continue;
        if (reinterpret_cast<const int32_t*>(p.adapter_enabled)[slot] != 0) enabled[slot] = 1;
    }
    sort_barrier(barrier);
    for (uint32_t token = thread; token < p.num_tokens; token += threads) {
        reinterpret_cast<int32_t*>(p.token_slots)[token] = keys.slot_of_segment(token, enabled);
    }
    const auto fill = [&](uint64_t address, size_t of_slot, int32_t value) {
        for (size_t i = thread; i < of_slot * p.max_loras; i += threads) {
            if (__ldcg(enabled + i / of_slot)) reinterpret_cast<int32_t*>(address)[i] = value;
        }
    };
    fill(p.sorted_token_ids, p.slot_entries, static_cast<int32_t>(p.num_tokens * p.top_k));
    fill(p.expert_ids, p.slot_entries / p.block_size, -1);
    fill(p.starts, p.num_experts, 0);
    fill(p.ends, p.num_experts, 0);
    sort_barrier(barrier);
}

// rows: pairs by (expert, slot), the first num_rows of row_pair.
__device__ inline void place_blocks(const AlignBlockParams& p, const BlockKeys& keys, uint32_t num_rows, uint32_t* barrier) {
    const uint32_t thread = blockIdx.x * kSortThreads + threadIdx.x, threads = gridDim.x * kSortThreads;
    const uint32_t lane = threadIdx.x % 32;
    const auto* row_pair = reinterpret_cast<const uint32_t*>(p.row_pair);
    auto* starts = reinterpret_cast<uint32_t*>(p.starts);
    auto* ends = reinterpret_cast<uint32_t*>(p.ends);
    // Where the counts of (slot, expert) are.
    const auto share_of = [&](uint32_t pair) {
        return static_cast<size_t>(keys.slot(pair)) * p.num_experts + keys.expert(pair);
    };
    for (uint32_t row = thread; row < num_rows; row += threads) {
        const size_t share = share_of(__ldcg(row_pair + row));
        if (row == 0 || share_of(__ldcg(row_pair + row - 1)) != share) starts[share] = row;
        if (row == num_rows - 1 || share_of(__ldcg(row_pair + row + 1)) != share) ends[share] = row + 1;
    }
    sort_barrier(barrier);

    // starts become what to add to a row for its place in its slot's part.
    for (uint32_t slot = thread / 32; slot < p.max_loras; slot += threads / 32) {
        if (!__ldcg(reinterpret_cast<const uint32_t*>(p.enabled) + slot)) continue;
        uint32_t before = 0;
        for (uint32_t base = 0; base < p.num_experts; base += 32) {
            const size_t share = static_cast<size_t>(slot) * p.num_experts + base + lane;
            const bool exists = base + lane < p.num_experts;
            const uint32_t start = exists ? __ldcg(starts + share) : 0;
            const uint32_t rows = exists ? __ldcg(ends + share) - start : 0;
            const uint32_t padded = (rows + p.block_size - 1) / p.block_size * p.block_size;
            uint32_t inclusive = padded;
            for (int d = 1; d < 32; d *= 2) {
                const uint32_t other = __shfl_up_sync(kAllLanes, inclusive, d);
                if (lane >= d) inclusive += other;
            }
            if (exists) starts[share] = before + inclusive - padded - start;
            before += __shfl_sync(kAllLanes, inclusive, 31);
        }
        if (lane == 0) reinterpret_cast<int32_t*>(p.num_tokens_post_pad)[slot] = static_cast<int32_t>(before);
    }
    sort_barrier(barrier);

    for (uint32_t row = thread; row < num_rows; row += threads) {
        const uint32_t pair = __ldcg(row_pair + row), place = row + __ldcg(starts + share_of(pair));
        if (place >= p.slot_entries) continue;  // the caller's buffers are too small
        const size_t slot = keys.slot(pair);
        reinterpret_cast<int32_t*>(p.sorted_token_ids)[slot * p.slot_entries + place] = static_cast<int32_t>(pair);
        if (place % p.block_size == 0) {
            const size_t at = slot * (p.slot_entries / p.block_size) + place / p.block_size;
            reinterpret_cast<int32_t*>(p.expert_ids)[at] = static_cast<int32_t>(keys.expert(pair));
        }
    }
}
