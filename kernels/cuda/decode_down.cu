// moe_lora_decode_down_{bf16,f16}: out = scaling * sum_j w_j (W_down h_j + s B_d A_d h_j + b_d) over a token's experts, in one launch
// that reads every weight once and writes no rows.
//
// intermediate [rows, I], down by a tensor map of [E, H, I] -> out [T, H], f32 or the activation's format.
//
// A cluster owns 64 features of all tokens; each of its blocks a part of k, turned by the expert's number so that all have the same
// load. The sums y [T][64] stay in f32 in shared memory. Two warpgroups take turns at the row tiles, experts ascending
// (tile/stream.cuh); a product is added to y in that order. Meanwhile a fourth warpgroup shrinks LoRA chunks, spread over all blocks,
// and adds B S to a sum of its own, for the tokens that its block finishes (epilogue/lora_stream.cuh). At the end the blocks of a
// cluster exchange their parts of y and add them in the order of their ranks, then LoRA.
// The ring is filled with weights before the launch before is complete: only the lists of align must be.
// Cost: weights and adapters read once, h H / 64 times from L2.
// Limits: T <= 256, H, I multiples of 8; the ring holds y; the grid must not exceed what runs at the same time.
#include "epilogue/expert_sum.cuh"
#include "epilogue/lora_stream.cuh"
#include "params.cuh"
#include "ptx/cluster.cuh"
#include "tile/stream.cuh"

namespace {

constexpr int kDownThreads = kStreamThreads + kShrinkThreads;

// The part of k of an expert's tile that a block of the cluster does, in stages. Parts are made of 128 of k whatever a stage holds, so
// that sums have the same order in every plan.
struct Part {
    uint32_t first, steps;

    __device__ __forceinline__ Part(const DecodeDownParams& p, uint32_t rank, uint32_t expert) {
        const uint32_t all = (p.intermediate_size + 2 * kTileDepth - 1) / (2 * kTileDepth), turned = expert % p.cluster;
        const uint32_t begin = (all * rank + turned) / p.cluster, end = (all * (rank + 1) + turned) / p.cluster;
        first = begin * 2 / p.stage_tiles;
        steps = (end - begin) * 2 / p.stage_tiles;
    }
};

// What a block works on, and where its shared memory is.
struct Job {
    uint32_t rank, first_feature, num_tiles;
    const RowTile* tiles;
    ExpertSum sum;
    LoraShare lora;
};

// One thread.
__device__ __forceinline__ void bring_weights(const DecodeDownParams& p, const Job& job, Stream stream) {
#pragma unroll 1
    for (uint32_t i = 0; i < job.num_tiles; ++i) {
        const uint32_t expert = job.tiles[i].expert;
        const Part part(p, job.rank, expert);
#pragma unroll 1
        for (uint32_t step = 0; step < part.steps; ++step) {
            stream.wait_empty();
            const uint32_t full = stream.full + 8 * stream.stage;
            mbarrier_expect(full, p.stage_tiles * kStreamWeightBytes);
            for (uint32_t piece = 0; piece < p.stage_tiles; ++piece) {
                tma_load_3d(stream.weights() + piece * kStreamWeightBytes, &p.weights, full,
                            ((part.first + step) * p.stage_tiles + piece) * kTileDepth, job.first_feature, expert);
            }
            stream.next();
        }
    }
}

template <class T>
__device__ __forceinline__ void bring_tokens(const DecodeDownParams& p, const Job& job, Stream stream) {
    const T* input = reinterpret_cast<const T*>(p.intermediate);
#pragma unroll 1
    for (uint32_t i = 0; i < job.num_tiles; ++i) {
        const RowTile tile = job.tiles[i];
        const Part part(p, job.rank, tile.expert);
        const TokenRows rows(tile.num_rows, [&](uint32_t row) { return (tile.first_row + row) * (p.intermediate_size / 8); });
#pragma unroll 1
        for (uint32_t step = 0; step < part.steps; ++step) {
            stream.wait_empty();
            rows.copy(stream, input, part.first + step, p.intermediate_size);
            cp_async_arrive(stream.full + 8 * stream.stage);
            stream.next();
        }
    }
}

template <class T>
__device__ __forceinline__ void consume(const DecodeDownParams& p, const Job& job, Stream stream) {
    const uint32_t group = threadIdx.x / 128;
    const uint32_t feature = threadIdx.x / 32 % 4 * 16 + threadIdx.x % 32 / 4;
#pragma unroll 1
    for (uint32_t turn = group; turn < job.num_tiles; turn += 2) {
        const bool hand_over = turn + 1 < job.num_tiles;
        const RowTile tile = job.tiles[turn];
        const Part part(p, job.rank, tile.expert);
        float bias[2] = {0.0f, 0.0f};
        if (p.bias != 0 && job.rank == 0) {
            const auto* from = reinterpret_cast<const float*>(p.bias) + static_cast<size_t>(tile.expert) * p.hidden_size;
            for (uint32_t i = 0; i < 2; ++i) {
                const uint32_t at = job.first_feature + feature + 8 * i;
                if (at < p.hidden_size) bias[i] = from[at];
            }
        }
        stream.take_turn(turn == 0);
        for_columns(tile.num_rows, [&](auto columns) {
            constexpr int kColumns = decltype(columns)::value;
            float sum[kColumns / 8][4] = {};
            stream_product<T, kColumns>(sum, stream, part.steps, hand_over);
            if (turn > 0) named_barrier(kBarrierAccumulate + group, kStreamConsumers);
            const bool repeats = job.sum.repeats(tile.first_row, tile.num_rows);
#pragma unroll
            for (int j = 0; j < kColumns / 8; ++j) {
                if (8 * j < tile.num_rows) job.sum.add(sum[j], tile.first_row, 8 * j, tile.num_rows, feature, bias, repeats);
            }
        });
        __syncwarp();
        if (hand_over) named_barrier_arrive(kBarrierAccumulate + (group ^ 1), kStreamConsumers);
    }
}

// Tokens of every block of a cluster but the last.
__device__ __forceinline__ uint32_t tokens_each(const DecodeDownParams& p) { return (p.num_tokens + p.cluster - 1) / p.cluster; }

// Adds up the cluster's parts of y and writes them out. Consumers only. The ring takes the parts of other blocks.
template <class T>
__device__ __forceinline__ void finish(const DecodeDownParams& p, const Job& job, char* ring, uint32_t received, uint32_t ready) {
    const uint32_t each = tokens_each(p);
    const auto tokens_of = [&](uint32_t rank) { return min(each, p.num_tokens - min(p.num_tokens, rank * each)); };
    float* y = job.sum.y;
    fence_async_shared();
    named_barrier(kBarrierConsumers, kStreamConsumers);
    if (p.cluster > 1) {
        if (threadIdx.x < p.cluster && threadIdx.x != job.rank) {
            const uint32_t to = threadIdx.x, bytes = tokens_of(to) * kSumRowBytes;
            mbarrier_arrive_remote(cluster_address(ready, to));
            if (bytes > 0) {
                mbarrier_wait(ready, 0);
                bulk_push(cluster_address(shared_address(ring) + job.rank * each * kSumRowBytes, to),
                          shared_address(y) + to * each * kSumRowBytes, bytes, cluster_address(received, to));
            }
        }
        __syncwarp();
        if (tokens_of(job.rank) > 0) mbarrier_wait(received, 0);
    }
    const bool lora = job.lora.num_chunks > 0;
    if (lora) named_barrier(kBarrierLora, kStreamConsumers + kShrinkThreads);
    for (uint32_t i = threadIdx.x; i < tokens_of(job.rank) * 8; i += kStreamConsumers) {
        const uint32_t token = job.rank * each + i / 8, at = job.sum.place(token, i % 8 * 8) - token * 64;
        const uint32_t feature = job.first_feature + i % 8 * 8;
        float sum[8] = {};
        for (uint32_t part = 0; part < p.cluster; ++part) {
            const float* from = part == job.rank ? y + token * 64 : reinterpret_cast<const float*>(ring) + (part * each + i / 8) * 64;
            const float4 low = *reinterpret_cast<const float4*>(from + at), high = *reinterpret_cast<const float4*>(from + at + 4);
            sum[0] += low.x, sum[1] += low.y, sum[2] += low.z, sum[3] += low.w;
            sum[4] += high.x, sum[5] += high.y, sum[6] += high.z, sum[7] += high.w;
        }
        if (lora) {
            const float* from = job.lora.y + job.lora.place(token, i % 8 / 2) + i % 2;
#pragma unroll
            for (int j = 0; j < 8; ++j) sum[j] += from[2 * j];
        }
        if (feature >= p.hidden_size) continue;
        const size_t to = static_cast<size_t>(token) * p.hidden_size + feature;
        if (p.out_f32) {
            float* out = reinterpret_cast<float*>(p.out) + to;
#pragma unroll
            for (int j = 0; j < 8; ++j) out[j] = sum[j] * p.scaling;
        } else {
            __align__(16) T out[8];
#pragma unroll
            for (int j = 0; j < 8; ++j) out[j] = narrow<T>(sum[j] * p.scaling);
            *reinterpret_cast<uint4*>(reinterpret_cast<T*>(p.out) + to) = *reinterpret_cast<const uint4*>(out);
        }
    }
    __syncwarp();
}

template <class T>
__device__ __forceinline__ void decode_down_kernel(const DecodeDownParams& p) {
    extern __shared__ char decode_down_shared[];
    const uint32_t skipped = -shared_address(decode_down_shared) & 1023u;
    char* ring = decode_down_shared + skipped;
    const uint32_t pairs = p.num_tokens * p.top_k;
    const uint32_t slot = p.stage_tiles * (kStreamWeightBytes + p.tile_rows * kTileRowBytes);
    const uint32_t each = tokens_each(p), lora_tokens = p.adapters != 0 ? each : 0;
    float* y = reinterpret_cast<float*>(ring + p.stages * slot);
    float* lora_y = y + p.num_tokens * 64;
    auto* pieces = reinterpret_cast<uint4*>(lora_y + lora_tokens * 64);
    auto* steps = reinterpret_cast<char*>(pieces + lora_tokens * p.top_k);
    auto* tiles = reinterpret_cast<RowTile*>(steps + p.lora_steps * (kShrinkThreads / 32) * kStepBytes);
    float* partial = reinterpret_cast<float*>(tiles + p.max_tiles);
    uint32_t* barriers = reinterpret_cast<uint32_t*>(partial + kShrinkPartial);
    const uint32_t received = shared_address(barriers) + stream_barrier_bytes(p.stages), ready = received + 8;
    float* weights = reinterpret_cast<float*>(barriers) + stream_barrier_bytes(p.stages) / 4 + 4;
    auto* tokens = reinterpret_cast<uint16_t*>(weights + pairs);
    const Stream stream(shared_address(ring), shared_address(barriers), p.stages, p.stage_tiles, p.tile_rows);

    // Align is complete: the launch before has waited for it.
    const RouteCounts counts = *reinterpret_cast<const RouteCounts*>(p.counts);
    const uint32_t rank = p.cluster > 1 ? cluster_rank() : 0, num_chunks = p.adapters != 0 ? counts.num_chunks : 0;
    const uint32_t first_feature = blockIdx.x / p.cluster * kStreamRows, first_token = min(p.num_tokens, rank * each);
    const LoraShare lora{first_token, first_token + each, first_feature, num_chunks, tokens, weights, lora_y, pieces};
    const Job job{rank, first_feature, counts.num_tiles, tiles, ExpertSum{y, tokens, weights}, lora};
    if (threadIdx.x == 0) {
        tma_prefetch(&p.weights);
        stream.init();
        mbarrier_init(received, 1);
        mbarrier_init(ready, max(p.cluster, 2u) - 1);
        fence_mbarrier_init();
        if (p.cluster > 1) mbarrier_expect(received, min(each, p.num_tokens - first_token) * kSumRowBytes * (p.cluster - 1));
    }
    for (uint32_t i = threadIdx.x; i < counts.num_tiles; i += kDownThreads) {
        tiles[i] = reinterpret_cast<const RowTile*>(p.tiles)[i];
    }
    for (uint32_t i = threadIdx.x; i < counts.num_rows; i += kDownThreads) {
        tokens[i] = static_cast<uint16_t>(reinterpret_cast<const uint32_t*>(p.row_pair)[i] / p.top_k);
        weights[i] = p.row_weight != 0 ? reinterpret_cast<const float*>(p.row_weight)[i] : 1.0f;
    }
    for (uint32_t i = threadIdx.x; i < (p.num_tokens + lora_tokens) * 16; i += kDownThreads) reinterpret_cast<float4*>(y)[i] = float4{0, 0, 0, 0};
    __syncthreads();
    if (p.cluster > 1) cluster_barrier_relaxed();

    const uint32_t warp = threadIdx.x / 32;
    if (warp < kStreamConsumers / 32) {
        wait_for_previous_launch();
        consume<T>(p, job, stream);
        finish<T>(p, job, ring, received, ready);
    } else if (warp < (kStreamConsumers + kStreamTokenThreads) / 32) {
        wait_for_previous_launch();
        bring_tokens<T>(p, job, stream);
    } else if (warp < kStreamThreads / 32) {
        if (threadIdx.x % 32 == 0) bring_weights(p, job, stream);
        __syncwarp();
    } else {
        const uint32_t shrinks = num_chunks * ((p.max_rank + 15) / 16) * p.planes;
        const uint32_t own = list_pieces(p, lora, reinterpret_cast<uint32_t*>(partial));
        shrink_chunks<T>(p, shrinks, partial);
        const uint32_t lora_ring = shared_address(steps) + warp % 4 * p.lora_steps * kStepBytes;
        add_lora<T>(p, lora, lora_ring, own, shrinks);
        __syncwarp();
        if (num_chunks > 0) named_barrier_arrive(kBarrierLora, kStreamConsumers + kShrinkThreads);
    }
    if (p.cluster > 1) cluster_barrier_relaxed();
}

}  // namespace

extern "C" __global__ void __launch_bounds__(kDownThreads, 1) moe_lora_decode_down_bf16(const __grid_constant__ DecodeDownParams p) {
    decode_down_kernel<bf16>(p);
}

extern "C" __global__ void __launch_bounds__(kDownThreads, 1) moe_lora_decode_down_f16(const __grid_constant__ DecodeDownParams p) {
    decode_down_kernel<f16>(p);
}
