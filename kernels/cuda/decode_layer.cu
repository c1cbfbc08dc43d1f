// moe_lora_decode_layer_{bf16,f16}: a whole layer in one launch, for up to 16 tokens: reading weights never pauses between gate, up and
// down. out = scaling * sum_j w_j (W_down h_j + B S_j + b_d) with h = act(W_gate x + B S + b_g, W_up x + B S + b_u).
// moe_lora_decode_clear: zero flags for it.
//
// hidden [T, H], topk_ids and weights [T, k], weights by two tensor maps -> out [T, H]; in between intermediate [rows, I] and S, in L2.
//
// One block an SM. Each makes the lists for itself (schedule/few.cuh), takes its share of the items of gate and up (16 features of a row
// tile, all of k), then, for a few features of H that are its own, the tiles of all experts, ascending, into y [T][features] in shared
// memory. One warp brings weights through all of that, as far ahead as the ring reaches; another one tokens, which for down wait until
// all features of a tile's h have been counted. Eight warps share the 16-row pieces of a stage and its k among them by mma; four
// more add up their sums in order and finish; four do LoRA meanwhile (epilogue/few_lora.cuh).
// A token's sums depend on sizes alone, not on its neighbours or on T.
// Cost: weights and adapters read once; tokens I / 16 times and h once a block, from L2.
// Limits: T <= 16, T * k <= 128, H and I multiples of 64, ranks up to 64; the grid must not exceed what runs at the same time.
#include "epilogue/activation.cuh"
#include "epilogue/few_lora.cuh"
#include "tile/swizzle.cuh"

namespace {

constexpr uint32_t kWarps = 8;  // that multiply, the first ones; then those that finish, the side of LoRA, one for weights, one for tokens
constexpr uint32_t kLayerThreads = kWarps * 32 + kFinishers + kSideThreads + 64;
constexpr uint32_t kSumSlots = 3;
constexpr uint32_t kFeatures = 16;        // of an item of gate and up
constexpr uint32_t kPieces = 4;           // 64s of k in its stage
constexpr uint32_t kWeightBytes = 16384;  // of a stage, at most
constexpr uint32_t kBarrierFinish = 1;    // finishers; before, those who make the lists

__device__ __forceinline__ constexpr uint32_t pitch_of(uint32_t pieces) { return pieces * kTileRowBytes + 64; }  // of tokens: no bank twice

struct Ring {
    uint32_t base, barriers;  // shared addresses; of a stage: weights are there, tokens are there, empty
    uint32_t stages, bytes;
    uint32_t stage = 0, phase = 0;

    // One thread.
    __device__ __forceinline__ void init() const {
        for (uint32_t i = 0; i < stages; ++i) {
            mbarrier_init(barriers + 24 * i, 1);
            mbarrier_init(barriers + 24 * i + 8, 1);
            mbarrier_init(barriers + 24 * i + 16, kWarps);
        }
    }
    __device__ __forceinline__ uint32_t weights() const { return base + stage * bytes; }
    __device__ __forceinline__ uint32_t tokens() const { return weights() + kWeightBytes; }
    __device__ __forceinline__ uint32_t weights_barrier() const { return barriers + 24 * stage; }
    __device__ __forceinline__ uint32_t tokens_barrier() const { return barriers + 24 * stage + 8; }
    __device__ __forceinline__ void wait_weights() const { mbarrier_wait(weights_barrier(), phase); }
    __device__ __forceinline__ void wait_tokens() const { mbarrier_wait(tokens_barrier(), phase); }
    __device__ __forceinline__ void wait_empty() const { mbarrier_wait(barriers + 24 * stage + 16, phase ^ 1); }
    __device__ __forceinline__ void release() const { mbarrier_arrive(barriers + 24 * stage + 16); }
    __device__ __forceinline__ void next() {
        if (++stage == stages) {
            stage = 0;
            phase ^= 1;
        }
    }
};

// What a block does.
struct Job {
    uint32_t items, feature_blocks, up_pieces, up_steps;      // of gate and up
    uint32_t tiles, first_feature, features, pieces, steps;  // of down

    __device__ __forceinline__ Job(const DecodeLayerParams& p, const FewLists& s) {
        feature_blocks = p.intermediate_size / kFeatures;
        const uint32_t all = s.num_tiles * feature_blocks;
        items = all > blockIdx.x ? (all - blockIdx.x - 1) / gridDim.x + 1 : 0;
        up_pieces = p.hidden_size / 64;
        up_steps = (up_pieces + kPieces - 1) / kPieces;
        first_feature = min(blockIdx.x * p.down_features, p.hidden_size);
        features = min(p.down_features, p.hidden_size - first_feature);
        tiles = features > 0 ? s.num_tiles : 0;
        pieces = p.intermediate_size / 64;
        steps = (pieces + p.down_pieces - 1) / p.down_pieces;
    }
    __device__ __forceinline__ uint32_t item(uint32_t turn) const { return blockIdx.x + turn * gridDim.x; }
};

// One thread.
__device__ __forceinline__ void bring_weights(const DecodeLayerParams& p, const FewLists& s, const Job& job, Ring ring) {
    Ring arriving = ring;
    uint32_t in_flight = 0;
    const auto begin = [&](uint32_t bytes) {
        if (in_flight == p.window) {
            arriving.wait_weights();
            arriving.next();
        } else {
            ++in_flight;
        }
        ring.wait_empty();
        mbarrier_expect(ring.weights_barrier(), bytes);
    };
#pragma unroll 1
    for (uint32_t turn = 0; turn < job.items; ++turn) {
        const uint32_t item = job.item(turn), expert = s.tiles[item / job.feature_blocks].expert;
#pragma unroll 1
        for (uint32_t step = 0; step < job.up_steps; ++step) {
            begin(2 * kPieces * kFeatures * kTileRowBytes);
            tma_load_5d(ring.weights(), &p.gate_up, ring.weights_barrier(), 0, item % job.feature_blocks * kFeatures, step * kPieces, 0, expert);
            ring.next();
        }
    }
#pragma unroll 1
    for (uint32_t tile = 0; tile < job.tiles; ++tile) {
#pragma unroll 1
        for (uint32_t step = 0; step < job.steps; ++step) {
            begin(p.down_features * p.down_pieces * kTileRowBytes);
            tma_load_4d(ring.weights(), &p.down, ring.weights_barrier(), 0, job.first_feature, step * p.down_pieces, s.tiles[tile].expert);
            ring.next();
        }
    }
}

// A warp: lane i brings row i.
template <class T>
__device__ __forceinline__ void bring_rows(Ring& ring, const T* row, uint32_t rows, uint32_t steps, uint32_t of_step, uint32_t pieces) {
    const uint32_t lane = threadIdx.x % 32;
#pragma unroll 1
    for (uint32_t step = 0; step < steps; ++step) {
        const uint32_t bytes = min(of_step, pieces - step * of_step) * kTileRowBytes;
        ring.wait_empty();
        if (lane == 0) mbarrier_expect(ring.tokens_barrier(), rows * bytes);
        __syncwarp();
        if (lane < rows) {
            bulk_load(ring.tokens() + lane * pitch_of(of_step), reinterpret_cast<uint64_t>(row + step * of_step * 64), bytes,
                      ring.tokens_barrier());
        }
        ring.next();
    }
}

template <class T>
__device__ __forceinline__ void bring_tokens(const DecodeLayerParams& p, const FewLists& s, const Job& job, FewFlags flags, Ring ring) {
    const uint32_t lane = threadIdx.x % 32;
#pragma unroll 1
    for (uint32_t turn = 0; turn < job.items; ++turn) {
        const FewTile tile = s.tiles[job.item(turn) / job.feature_blocks];
        const uint32_t token = s.token[tile.first_row + min(lane, tile.num_rows - 1)];
        bring_rows(ring, reinterpret_cast<const T*>(p.hidden) + static_cast<size_t>(token) * p.hidden_size, tile.num_rows, job.up_steps,
                   kPieces, job.up_pieces);
    }
#pragma unroll 1
    for (uint32_t i = 0; i < job.tiles; ++i) {
        const FewTile tile = s.tiles[i];
        FewFlags::wait(flags.tile(i), job.feature_blocks);
        fence_async_global();
        bring_rows(ring, reinterpret_cast<const T*>(p.intermediate) + static_cast<size_t>(tile.first_row + lane) * p.intermediate_size,
                   tile.num_rows, job.steps, p.down_pieces, job.pieces);
    }
}

// How a stage's weights lie in shared memory: 16-row piece i of 64 k number j is at i * row_step + j * k_step. Rows of 128 bytes.
struct Layout {
    uint32_t row_step, k_step, of_step, pieces;
};

// sum += a warp's share of the product of `steps` stages: 16 weight rows, of every 32 k each `parts`-th. Operands are 16 bytes a lane:
// eight k, numbered alike on both sides. Row g of the product is weight row row_of(g), so that lanes meet in no bank.
__device__ __forceinline__ uint32_t row_of(uint32_t g) { return g / 2 | (g & 1) << 2; }

template <class T>
__device__ __forceinline__ void multiply(float (&sum)[2][4], Ring& ring, const Layout& layout, uint32_t steps, uint32_t rows, uint32_t piece,
                                         uint32_t part, uint32_t parts) {
    const uint32_t lane = threadIdx.x % 32, g = lane / 4, t = lane % 4, row = row_of(g);
    const uint32_t a_lane = piece * layout.row_step + row * kTileRowBytes, b_lane = g * pitch_of(layout.of_step) + t * 16;
#pragma unroll 1
    for (uint32_t step = 0; step < steps; ++step) {
        const uint32_t count = 2 * min(layout.of_step, layout.pieces - step * layout.of_step);
        ring.wait_weights();
        ring.wait_tokens();
#pragma unroll 2
        for (uint32_t i = part; i < count; i += parts) {
            const uint32_t a = ring.weights() + a_lane + i / 2 * layout.k_step + ((i % 2 * 4 + t ^ row) << 4);
            const uint32_t b = ring.tokens() + b_lane + i * 64;
            const uint4 low = load_shared16(a), high = load_shared16(a + 8 * kTileRowBytes), right = load_shared16(b);
            mma<T>(sum[0], low.x, high.x, low.y, high.y, right.x, right.y);
            mma<T>(sum[0], low.z, high.z, low.w, high.w, right.z, right.w);
            if (rows > 8) {
                const uint4 more = load_shared16(b + 8 * pitch_of(layout.of_step));
                mma<T>(sum[1], low.x, high.x, low.y, high.y, more.x, more.y);
                mma<T>(sum[1], low.z, high.z, low.w, high.w, more.z, more.w);
            }
        }
        __syncwarp();
        if (lane == 0) ring.release();
        ring.next();
    }
}

// Sums of the warps on their way to those who finish: f32 [slot][warp][row / 8][16 weight rows][8] in shared memory.
struct Sums {
    float* at;
    uint32_t barriers;  // shared address, for each slot: sums are there, they were read
    uint32_t groups;    // of 8 rows
    uint32_t slot = 0, phase = 0;

    // One thread.
    __device__ __forceinline__ void init() const {
        for (uint32_t i = 0; i < kSumSlots; ++i) {
            mbarrier_init(barriers + 16 * i, kWarps * 32);
            mbarrier_init(barriers + 16 * i + 8, kFinishers);
        }
    }
    __device__ __forceinline__ void next() {
        if (++slot == kSumSlots) {
            slot = 0;
            phase ^= 1;
        }
    }
    // A warp's own, as mma lays them out; row g of it is weight row row_of(g).
    __device__ __forceinline__ void put(const float (&sum)[2][4], uint32_t rows) {
        const uint32_t lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
        float* to = at + (slot * kWarps + threadIdx.x / 32) * groups * 128 + row_of(g) * 8 + 2 * t;
        mbarrier_wait(barriers + 16 * slot + 8, phase ^ 1);
#pragma unroll
        for (uint32_t n = 0; n < 2; ++n) {
            if (n * 8 >= rows) break;
            *reinterpret_cast<float2*>(to + n * 128) = float2{sum[n][0], sum[n][1]};
            *reinterpret_cast<float2*>(to + n * 128 + 64) = float2{sum[n][2], sum[n][3]};
        }
        mbarrier_arrive(barriers + 16 * slot);
        next();
    }
    __device__ __forceinline__ void wait() const { mbarrier_wait(barriers + 16 * slot, phase); }
    // Of warps first, first + step and so on; step is a power of two.
    __device__ __forceinline__ float get(uint32_t first, uint32_t step, uint32_t feature, uint32_t row) const {
        const float* from = at + slot * kWarps * groups * 128 + row / 8 * 128 + feature * 8 + row % 8;
        float sum = 0.0f;
#pragma unroll
        for (uint32_t warp = 0; warp < kWarps; ++warp) {
            if ((warp & (step - 1)) == first) sum += from[warp * groups * 128];
        }
        return sum;
    }
    __device__ __forceinline__ void release() {
        mbarrier_arrive(barriers + 16 * slot + 8);
        next();
    }
};

// Shared memory beside the ring and the lists.
struct Places {
    Deltas deltas;
    float *y, *lora, *partial;  // [T][features], [shares][T][features], of the side
};

// How 16-row pieces of a block's features of down and their k are shared out: warp i does piece i % across.
__device__ __forceinline__ uint32_t down_across(const DecodeLayerParams& p) {
    return p.down_features <= 16 ? 1 : p.down_features <= 32 ? 2 : 4;
}

template <class T>
__device__ __forceinline__ void consume(const DecodeLayerParams& p, const FewLists& s, const Job& job, Sums sums, Ring ring) {
    const uint32_t warp = threadIdx.x / 32;
    const Layout of_up{kPieces * kFeatures * kTileRowBytes, kFeatures * kTileRowBytes, kPieces, job.up_pieces};
#pragma unroll 1
    for (uint32_t turn = 0; turn < job.items; ++turn) {
        const uint32_t rows = s.tiles[job.item(turn) / job.feature_blocks].num_rows;
        float sum[2][4] = {};
        multiply<T>(sum, ring, of_up, job.up_steps, rows, warp % 2, warp / 2, kWarps / 2);
        sums.put(sum, rows);
    }
    const uint32_t across = down_across(p), piece = warp % across;
    const Layout of_down{kFeatures * kTileRowBytes, p.down_features * kTileRowBytes, p.down_pieces, job.pieces};
#pragma unroll 1
    for (uint32_t i = 0; i < job.tiles; ++i) {
        const uint32_t rows = s.tiles[i].num_rows;
        float sum[2][4] = {};
        multiply<T>(sum, ring, of_down, job.steps, rows, piece, piece * 16 < p.down_features ? warp / across : ~0u, kWarps / across);
        sums.put(sum, rows);
    }
}

// h of an item: LoRA, routing weight, bias, activation, rounding; then it is counted.
template <class T>
__device__ __forceinline__ void finish_item(const DecodeLayerParams& p, const FewLists& s, const Places& places, FewFlags flags, const Sums& sums,
                                            uint32_t turn, uint32_t tile_index, uint32_t first_feature) {
    const uint32_t thread = threadIdx.x % kFinishers;
    const FewTile tile = s.tiles[tile_index];
    const size_t bias_at = static_cast<size_t>(tile.expert) * p.intermediate_size + first_feature + thread % kFeatures;
    const float gate_bias = p.gate_bias != 0 ? reinterpret_cast<const float*>(p.gate_bias)[bias_at] : 0.0f;
    const float up_bias = p.gate_bias != 0 ? reinterpret_cast<const float*>(p.up_bias)[bias_at] : 0.0f;
    sums.wait();
    if (p.adapters != 0) mbarrier_wait(places.deltas.ready(turn), turn / 2 % 2);
    for (uint32_t row = thread / kFeatures; row < tile.num_rows; row += kFinishers / kFeatures) {
        const uint32_t feature = thread % kFeatures, of_all = tile.first_row + row;
        float gate = sums.get(0, 2, feature, row), up = sums.get(1, 2, feature, row);
        if (s.chunk[of_all] != kNoChunk) {
            gate += places.deltas.of(turn, 0)[feature * p.tile_rows + row];
            up += places.deltas.of(turn, 1)[feature * p.tile_rows + row];
        }
        const float factor = p.weigh_input ? s.weight[of_all] : 1.0f;
        reinterpret_cast<T*>(p.intermediate)[static_cast<size_t>(of_all) * p.intermediate_size + first_feature + feature] =
            narrow<T>(activate(p.activation, p.alpha, p.limit, gate * factor + gate_bias, up * factor + up_bias));
    }
    fence_async_global();
    named_barrier(kBarrierFinish, kFinishers);
    if (thread == 0) counter_add(flags.tile(tile_index), 1);
    if (p.adapters != 0) mbarrier_arrive(places.deltas.read(turn));
}

// A tile's part of y.
__device__ __forceinline__ void finish_tile(const DecodeLayerParams& p, const FewLists& s, const Job& job, const Places& places,
                                            const Sums& sums, uint32_t index) {
    const uint32_t across = down_across(p), thread = threadIdx.x % kFinishers, feature = thread % (16 * across);
    const FewTile tile = s.tiles[index];
    float bias = 0.0f;
    if (p.down_bias != 0 && feature < job.features) {
        bias = reinterpret_cast<const float*>(p.down_bias)[static_cast<size_t>(tile.expert) * p.hidden_size + job.first_feature + feature];
    }
    sums.wait();
    for (uint32_t row = thread / (16 * across); row < tile.num_rows && feature < job.features; row += kFinishers / (16 * across)) {
        uint32_t of_all = tile.first_row + row;
        if (s.repeats(of_all, tile.first_row)) continue;
        float* y = places.y + s.token[of_all] * job.features + feature;
        float value = *y;
        do {
            const float product = sums.get(feature / 16, across, feature % 16, of_all - tile.first_row) + bias;
            value += p.weigh_input ? product : s.weight[of_all] * product;
        } while (++of_all < tile.first_row + tile.num_rows && s.repeats(of_all, tile.first_row));
        *y = value;
    }
    named_barrier(kBarrierFinish, kFinishers);
}

template <class T>
__device__ __forceinline__ void finish(const DecodeLayerParams& p, const FewLists& s, const Job& job, const Places& places, FewFlags flags,
                                       Sums sums) {
#pragma unroll 1
    for (uint32_t turn = 0; turn < job.items; ++turn) {
        const uint32_t item = job.item(turn);
        finish_item<T>(p, s, places, flags, sums, turn, item / job.feature_blocks, item % job.feature_blocks * kFeatures);
        sums.release();
    }
#pragma unroll 1
    for (uint32_t i = 0; i < job.tiles; ++i) {
        finish_tile(p, s, job, places, sums, i);
        sums.release();
    }
}

template <class T>
__device__ __forceinline__ void store(const DecodeLayerParams& p, const Job& job, const Places& places) {
    for (uint32_t i = threadIdx.x; i < p.num_tokens * job.features; i += kLayerThreads) {
        float lora = 0.0f;
        for (uint32_t share = 0; p.adapters != 0 && share < down_shares(p.down_features); ++share) {
            lora += places.lora[share * p.num_tokens * job.features + i];
        }
        const float value = (places.y[i] + lora) * p.scaling;
        const size_t to = static_cast<size_t>(i / job.features) * p.hidden_size + job.first_feature + i % job.features;
        if (p.out_f32) {
            reinterpret_cast<float*>(p.out)[to] = value;
        } else {
            reinterpret_cast<T*>(p.out)[to] = narrow<T>(value);
        }
    }
}

template <class T>
__device__ __forceinline__ void decode_layer_kernel(const DecodeLayerParams& p) {
    extern __shared__ char decode_layer_shared[];
    char* memory = decode_layer_shared + (-shared_address(decode_layer_shared) & 1023u);
    const uint32_t thread = threadIdx.x, base = shared_address(memory);
    auto& s = *reinterpret_cast<FewLists*>(memory + p.stages * p.stage_bytes);
    float* rest = reinterpret_cast<float*>(&s + 1);
    const auto take = [&](uint32_t count) {
        float* taken = rest;
        rest += count;
        return taken;
    };
    const uint32_t groups = (p.tile_rows + 7) / 8, of_y = p.num_tokens * p.down_features, lora = p.adapters != 0;
    const uint32_t of_lora = lora * down_shares(p.down_features) * of_y;
    Sums sums{take(kSumSlots * kWarps * groups * 128), 0, groups};
    Places places{{}, take(of_y), take(of_lora), take(lora * kSidePartial)};
    places.deltas = Deltas{take(lora * 4 * 16 * p.tile_rows), 0, p.tile_rows};
    const uint32_t barriers = shared_address(rest);
    const Ring ring{base, barriers, p.stages, p.stage_bytes};
    sums.barriers = barriers + 24 * p.stages;
    places.deltas.barriers = sums.barriers + 16 * kSumSlots;
    const FewFlags flags{reinterpret_cast<uint32_t*>(p.flags)};

    if (thread == 0) {
        tma_prefetch(&p.gate_up);
        tma_prefetch(&p.down);
        ring.init();
        sums.init();
        places.deltas.init();
        fence_mbarrier_init();
    }
    for (uint32_t i = thread; i < of_y + of_lora; i += kLayerThreads) places.y[i] = 0.0f;
    const uint32_t pairs = p.num_tokens * p.top_k;
    if (thread * 32 < pairs) {
        prefetch_l2(reinterpret_cast<const int32_t*>(p.topk_ids) + thread * 32);
        prefetch_l2(reinterpret_cast<const float*>(p.topk_weights) + thread * 32);
    }
    if (thread == 64 && p.token_slots != 0) prefetch_l2(reinterpret_cast<const int32_t*>(p.token_slots));
    const uint32_t line = blockIdx.x + thread * gridDim.x;  // of hidden
    if (line < p.num_tokens * p.hidden_size / 64) prefetch_l2(reinterpret_cast<const T*>(p.hidden) + line * 64);
    wait_for_previous_launch();
    if (thread < kFewPairs) make_lists(p, s, kBarrierFinish);
    __syncthreads();
    const Job job(p, s);

    const uint32_t warp = thread / 32;
    if (warp < kWarps) {
        consume<T>(p, s, job, sums, ring);
    } else if (warp < kWarps + kFinishers / 32) {
        finish<T>(p, s, job, places, flags, sums);
    } else if (warp < kLayerThreads / 32 - 2) {
        if (lora) {
            const auto* table = reinterpret_cast<const AdapterEntry*>(p.adapters);
            for (uint32_t i = thread % kSideThreads; i < s.num_chunks * 3; i += kSideThreads) {
                const FewChunk chunk = s.chunks[i / 3];
                s.entries[i / 3][i % 3] = table[(static_cast<size_t>(chunk.slot) * p.num_experts + s.tiles[chunk.tile].expert) * 3 + i % 3];
            }
            named_barrier(kBarrierSide, kSideThreads);
            float* of_up = reinterpret_cast<float*>(p.shrunk);
            float* of_down = of_up + static_cast<size_t>(parts_of(p.hidden_size)) * pairs * 2 * p.max_rank;
            uint32_t turn = 0;
            const auto tile_of = [&] { return s.tiles[job.item(turn) / job.feature_blocks]; };
            const auto next_delta = [&] {
                expand_item<T>(p, s, flags, of_up, places.deltas, turn, tile_of(), job.item(turn) % job.feature_blocks * kFeatures);
                ++turn;
            };
            shrink_few<T, false>(p, s, flags, of_up, places.partial, [&] {
                while (turn < job.items && can_expand(p, s, flags, places.deltas, turn, tile_of())) next_delta();
            });
            while (turn + 1 < job.items) next_delta();
            prefetch_down<T>(p, s);
            if (job.features > 0) prefetch_b<T>(s, thread % kSideThreads < kPrefetched ? thread % kSideThreads : kFewPairs, job.first_feature, job.features);
            while (turn < job.items) next_delta();
            shrink_few<T, true>(p, s, flags, of_down, places.partial, [] {});
            if (job.features > 0 && s.num_chunks > 0) {
                uint32_t count = 0;
                for (uint32_t i = 0; i < s.num_chunks; ++i) count += counted(s.entries[i], 2, 3, p.intermediate_size);
                FewFlags::wait(flags.down(), count);
                expand_down<T>(p, s, of_down, job.first_feature, job.features, places.lora);
            }
        }
    } else if (warp == kLayerThreads / 32 - 2) {
        if (thread % 32 == 0) bring_weights(p, s, job, ring);
    } else {
        bring_tokens<T>(p, s, job, flags, ring);
    }
    __syncthreads();
    store<T>(p, job, places);
}

}  // namespace

extern "C" __global__ void __launch_bounds__(kLayerThreads, 1) moe_lora_decode_layer_bf16(const __grid_constant__ DecodeLayerParams p) {
    decode_layer_kernel<bf16>(p);
}

extern "C" __global__ void __launch_bounds__(kLayerThreads, 1) moe_lora_decode_layer_f16(const __grid_constant__ DecodeLayerParams p) {
    decode_layer_kernel<f16>(p);
}

extern "C" __global__ void __launch_bounds__(256) moe_lora_decode_clear(const DecodeClearParams p) {
    wait_for_previous_launch();
    for (uint32_t i = threadIdx.x; i < p.words; i += blockDim.x) reinterpret_cast<uint32_t*>(p.flags)[i] = 0;
}
