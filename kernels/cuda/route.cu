// Routing: which experts a token uses (topk), and the order in which all later kernels work (align).
//
// moe_lora_topk      logits [T, E] f32 -> topk_ids [T, k], topk_weights [T, k]. One warp a token; k rounds of a warp-wide
//                    maximum over scores in shared memory. Cost: T * E * 4 bytes read, k * E / 32 steps a warp.
//                    Follows `moe_lora_route::topk`: experts compare by score plus selection bias, or by logit where there
//                    is none; equal ones go to the lower id. A token with a logit that is not finite gets NaN weights.
// moe_lora_align     (token, expert) pairs -> rows sorted by (expert, slot), stable in pair order; segments, row tiles,
//                    LoRA chunks. Tokens are sorted by slot (digits of kSortDigit), pairs by expert, then the lists are
//                    built: see schedule/. No atomics but the barrier's counter, so equal inputs give equal bits. One
//                    launch, cooperative if the grid has more than one block.
//                    Cost: about 60 bytes of traffic a pair, mostly L2, and 3 + 2 * digits barriers.
// moe_lora_align_block  the same pairs in the padded block format of other engines, see schedule/blocks.cuh. One launch,
//                    likewise cooperative. Cost: as align, and 12 bytes a (slot, expert), 4 an entry of the output.
// Limits: E <= 1024, T * k < 2^31. Grid and block: any grid of kSortThreads; T > 0 (align).
#include "mma/number.cuh"
#include "params.cuh"
#include "ptx/async.cuh"
#include "schedule/blocks.cuh"
#include "schedule/lists.cuh"
#include "schedule/sort.cuh"

namespace {

constexpr int kTopkWarps = 4;

// The place of the largest of values[0..n), the lower of equal ones; -1 if all are NaN. NaN marks what was taken.
__device__ int warp_best(const float* values, uint32_t n) {
    float best = 0.0f;
    int at = -1;
    for (uint32_t i = threadIdx.x % 32; i < n; i += 32) {
        const float value = values[i];
        if (at < 0 ? value == value : value > best) {
            best = value;
            at = static_cast<int>(i);
        }
    }
    for (int d = 16; d > 0; d /= 2) {
        const float other = __shfl_xor_sync(kAllLanes, best, d);
        const int other_at = __shfl_xor_sync(kAllLanes, at, d);
        if (other_at >= 0 && (at < 0 || other > best || (other == best && other_at < at))) {
            best = other;
            at = other_at;
        }
    }
    return at;
}

__device__ void topk(const TopkParams& p, float* scores, float* keys, float* groups, uint32_t token) {
    const uint32_t lane = threadIdx.x % 32, n = p.num_experts;
    const float* logits = reinterpret_cast<const float*>(p.logits) + static_cast<size_t>(token) * n;
    const float* bias = reinterpret_cast<const float*>(p.selection_bias);
    const float nan = __int_as_float(0x7fffffff);

    float most = -__int_as_float(0x7f800000);
    bool finite = true;
    for (uint32_t e = lane; e < n; e += 32) {
        most = fmaxf(most, logits[e]);
        finite = finite && isfinite(logits[e]);
    }
    for (int d = 16; d > 0; d /= 2) most = fmaxf(most, __shfl_xor_sync(kAllLanes, most, d));
    finite = __all_sync(kAllLanes, finite);
    double sum = 0.0;
    for (uint32_t e = lane; e < n; e += 32) {
        scores[e] = p.sigmoid ? 1.0f / (1.0f + expf(-logits[e])) : expf(logits[e] - most);
        sum += scores[e];
    }
    for (int d = 16; d > 0; d /= 2) sum += __shfl_xor_sync(kAllLanes, sum, d);
    for (uint32_t e = lane; e < n; e += 32) {
        if (!p.sigmoid) scores[e] = scores[e] / static_cast<float>(sum);
        keys[e] = bias ? scores[e] + bias[e] : logits[e];
    }
    __syncwarp();

    if (p.num_groups > 0) {
        const uint32_t size = n / p.num_groups;
        for (uint32_t g = lane; g < p.num_groups; g += 32) {
            float first = -__int_as_float(0x7f800000), second = first;
            for (uint32_t e = g * size; e < (g + 1) * size; ++e) {
                const float value = bias ? keys[e] : scores[e];
                second = value > first ? first : fmaxf(second, value);
                first = fmaxf(first, value);
            }
            groups[g] = p.group_top_two ? first + second : first;
        }
        __syncwarp();
        // Taken groups become NaN: those are the open ones.
        for (uint32_t i = 0; i < p.top_groups; ++i) {
            const int g = warp_best(groups, p.num_groups);
            __syncwarp();
            if (lane == 0 && g >= 0) groups[g] = nan;
            __syncwarp();
        }
        for (uint32_t e = lane; e < n; e += 32) {
            if (groups[e / size] == groups[e / size]) keys[e] = nan;
        }
        __syncwarp();
    }

    int32_t* ids = reinterpret_cast<int32_t*>(p.topk_ids) + static_cast<size_t>(token) * p.top_k;
    float* weights = reinterpret_cast<float*>(p.topk_weights) + static_cast<size_t>(token) * p.top_k;
    float sum_chosen = 0.0f;  // in the order of choice, as on the CPU
    for (uint32_t j = 0; j < p.top_k; ++j) {
        const int e = warp_best(keys, n);
        __syncwarp();
        const float score = e < 0 ? nan : scores[e];
        sum_chosen += score;
        if (lane == 0) {
            ids[j] = e;
            weights[j] = finite ? score : nan;
            if (e >= 0) keys[e] = nan;
        }
        __syncwarp();
    }
    sum_chosen += p.renormalize_epsilon;
    for (uint32_t j = lane; j < p.top_k; j += 32) {
        const float weight = p.renormalize ? weights[j] / sum_chosen : weights[j];
        weights[j] = weight * p.scaling;
    }
}

}  // namespace

extern "C" __global__ void __launch_bounds__(kTopkWarps * 32) moe_lora_topk(const TopkParams p) {
    extern __shared__ float topk_shared[];
    wait_for_previous_launch();
    float* mine = topk_shared + threadIdx.x / 32 * 3 * p.num_experts;
    for (uint32_t token = blockIdx.x * kTopkWarps + threadIdx.x / 32; token < p.num_tokens;
         token += gridDim.x * kTopkWarps) {
        topk(p, mine, mine + p.num_experts, mine + 2 * p.num_experts, token);
        __syncwarp();
    }
}

extern "C" __global__ void __launch_bounds__(kSortThreads) moe_lora_align(const AlignParams p) {
    // Of one sort at a time: starts [bins + 1], counters [kSortWarps, bins], with E + 2 bins or those of a slot digit.
    extern __shared__ uint32_t align_shared[];
    wait_for_previous_launch();
    const auto* ids = reinterpret_cast<const int32_t*>(p.topk_ids);
    const auto* slots = reinterpret_cast<const int32_t*>(p.token_slots);
    const auto* active = reinterpret_cast<const uint8_t*>(p.slot_active);
    auto* row_pair = reinterpret_cast<uint32_t*>(p.row_pair);
    auto* pair_row = reinterpret_cast<int32_t*>(p.pair_row);
    auto* counts = reinterpret_cast<RouteCounts*>(p.counts);
    auto* table = reinterpret_cast<uint32_t*>(p.table);
    auto* barrier = reinterpret_cast<uint32_t*>(p.barrier);
    const uint32_t num_pairs = p.num_tokens * p.top_k, experts = p.num_experts;

    const auto slot_of = [&](uint32_t token) -> int32_t {
        const int32_t slot = slots[token];
        if (slot < 0 || slot >= static_cast<int32_t>(p.num_slots)) return -1;
        return active == nullptr || active[slot] != 0 ? slot : -1;
    };
    // Two bins follow the experts: -1 and other ranks' experts, and ids that should not be.
    const auto expert_of = [&](uint32_t pair) -> uint32_t {
        const uint32_t id = static_cast<uint32_t>(ids[pair]), local = id - p.first_expert;
        return local < experts ? local : id == ~0u || id < p.all_experts ? experts : experts + 1;
    };

    uint32_t bad_slots = 0;
    if (slots != nullptr) {
        const WarpRange range(p.num_tokens);
        for (uint32_t token = range.first + threadIdx.x % 32; token < range.end; token += 32) {
            bad_slots += slots[token] < -1 || slots[token] >= static_cast<int32_t>(p.num_slots);
        }
        bad_slots = __reduce_add_sync(kAllLanes, bad_slots);
    }

    const uint32_t* order =
        digit_sort(p.num_tokens, slots == nullptr ? 1 : p.num_slots + 1, reinterpret_cast<uint32_t*>(p.order),
                   align_shared, table, barrier, [&](uint32_t token) { return static_cast<uint32_t>(slot_of(token) + 1); });

    // Pairs by expert.
    const auto pair_at = [&](uint32_t i) {
        const uint32_t token = i / p.top_k;
        return order == nullptr ? i : __ldcg(order + token) * p.top_k + (i - token * p.top_k);
    };
    const auto* weights = reinterpret_cast<const float*>(p.topk_weights);
    auto* row_weight = reinterpret_cast<float*>(p.row_weight);
    counting_sort(
        num_pairs, experts + 2, align_shared, align_shared + experts + 3, table, barrier,
        [&](uint32_t i) { return expert_of(pair_at(i)); },
        [&](uint32_t i, uint32_t row) {
            const uint32_t pair = pair_at(i);
            if (expert_of(pair) >= experts) {
                pair_row[pair] = -1;
            } else {
                row_pair[row] = pair;
                if (row_weight != nullptr) row_weight[row] = weights[pair];
                pair_row[pair] = static_cast<int32_t>(row);
            }
        });

    const uint32_t num_rows = align_shared[experts];
    if (blockIdx.x == 0 && threadIdx.x == 0) {
        counts->num_rows = num_rows;
        counts->bad_experts = num_pairs - align_shared[experts + 1];
        counts->claimed[0] = counts->claimed[1] = 0;
    }
    build_lists(
        num_rows, experts, p.tile_rows, align_shared + experts + 3, bad_slots, align_shared,
        [&](uint32_t row) {
            const uint32_t pair = __ldcg(row_pair + row);
            return RowKey{static_cast<uint32_t>(ids[pair]) - p.first_expert, slots == nullptr ? -1 : slot_of(pair / p.top_k)};
        },
        table, barrier, reinterpret_cast<Segment*>(p.segments), reinterpret_cast<RowTile*>(p.tiles),
        reinterpret_cast<Segment*>(p.chunks), counts);
}

extern "C" __global__ void __launch_bounds__(kSortThreads) moe_lora_align_block(const AlignBlockParams p) {
    extern __shared__ uint32_t align_block_shared[];
    wait_for_previous_launch();
    auto* table = reinterpret_cast<uint32_t*>(p.table);
    auto* barrier = reinterpret_cast<uint32_t*>(p.barrier);
    const BlockKeys keys{p};
    begin_blocks(p, keys, barrier);
    const auto* token_slots = reinterpret_cast<const int32_t*>(p.token_slots);
    const uint32_t* order = digit_sort(p.num_tokens, p.max_loras + 1, reinterpret_cast<uint32_t*>(p.order),
                                       align_block_shared, table, barrier,
                                       [&](uint32_t token) { return static_cast<uint32_t>(__ldcg(token_slots + token) + 1); });
    const auto pair_at = [&](uint32_t i) {
        const uint32_t token = i / p.top_k;
        return order == nullptr ? i : __ldcg(order + token) * p.top_k + (i - token * p.top_k);
    };
    // Pairs that take no part come last.
    counting_sort(
        p.num_tokens * p.top_k, p.num_experts + 1, align_block_shared, align_block_shared + p.num_experts + 2, table,
        barrier,
        [&](uint32_t i) {
            const uint32_t pair = pair_at(i);
            return keys.slot(pair) < 0 ? p.num_experts : keys.expert(pair);
        },
        [&](uint32_t i, uint32_t row) { reinterpret_cast<uint32_t*>(p.row_pair)[row] = pair_at(i); });
    place_blocks(p, keys, align_block_shared[p.num_experts], barrier);
}
