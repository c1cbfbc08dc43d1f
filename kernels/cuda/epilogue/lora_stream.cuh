// LoRA of the decode kernel of down, by a warpgroup of every block, beside those that multiply weights.
//
// First S = scale A h: all blocks share out all chunks. Once all have been done, every block adds w B S for its 64 features and its
// tokens (of a cluster every block has some) to a sum of its own, experts ascending, so that nothing depends on other tokens
// or on the base product. A warp has 16 features for itself: no barriers. A step is eight rows of a chunk by 16 ranks; B and S come
// to a ring of the warp, several steps ahead: beside the stream of weights, whatever is read takes microseconds.
#pragma once
#include <cstdint>

#include "epilogue/expert_sum.cuh"
#include "mma/number.cuh"
#include "params.cuh"
#include "tile/stream.cuh"

constexpr int kShrinkThreads = 128;
constexpr uint32_t kShrinkRows = 16;  // rows and ranks of one product
constexpr uint32_t kShrinkPitch = 20;
constexpr uint32_t kShrinkPartial = 4 * kShrinkRows * kShrinkPitch;  // f32 in shared memory
constexpr uint32_t kStepRows = 8;
constexpr uint32_t kStepsTogether = 4;
// Of a step, in a warp's ring: B [16 features][16 ranks], S f32 [8 rows][16 ranks], what it is.
constexpr uint32_t kStepB = 512, kStepS = 512, kStepBytes = kStepB + kStepS + 16;

__device__ __forceinline__ const AdapterEntry& down_entry(const DecodeDownParams& p, const Segment& chunk) {
    return reinterpret_cast<const AdapterEntry*>(
        p.adapters)[(static_cast<size_t>(chunk.slot) * p.num_experts + chunk.expert) * 3 + 2];
}

// 16 ranks of a chunk over a plane of k; every lane knows another one.
struct ShrinkItem {
    uint32_t first_row = 0, end_row = 0, first_rank = 0, ranks = 0, plane = 0;  // ranks: of these 16
    uint64_t a = 0;
    float scale = 0.0f;

    __device__ __forceinline__ ShrinkItem(const DecodeDownParams& p, uint32_t index, uint32_t total) {
        if (index >= total) return;
        const uint32_t groups = (p.max_rank + 15) / 16;
        const Segment chunk = reinterpret_cast<const Segment*>(p.chunks)[index / (groups * p.planes)];
        const AdapterEntry& entry = down_entry(p, chunk);
        plane = index % p.planes;
        first_rank = index / p.planes % groups * 16;
        ranks = min(max((entry.rank + 7u) / 8 * 8, first_rank) - first_rank, 16u);
        first_row = chunk.first_row;
        end_row = ranks > 0 ? chunk.end_row : first_row;
        a = entry.a + static_cast<uint64_t>(first_rank) * p.intermediate_size * 2;
        scale = entry.scale;
    }
    __device__ __forceinline__ ShrinkItem(const ShrinkItem& items, uint32_t lane)
        : first_row(__shfl_sync(~0u, items.first_row, lane)),
          end_row(__shfl_sync(~0u, items.end_row, lane)),
          first_rank(__shfl_sync(~0u, items.first_rank, lane)),
          ranks(__shfl_sync(~0u, items.ranks, lane)),
          plane(__shfl_sync(~0u, items.plane, lane)),
          a(__shfl_sync(~0u, items.a, lane)),
          scale(__shfl_sync(~0u, items.scale, lane)) {}
};

// 16 ranks by up to 8 kN rows over [first_k, end_k): every warp takes a fourth of k, in steps of 32. Operands go straight to
// registers: 16 bytes of a row are eight k, numbered alike on both sides.
template <class T, int kN>
__device__ __forceinline__ void shrink_block(const uint4* const (&a)[2], const uint4* const (&h)[2], uint32_t first_k, uint32_t end_k,
                                             float* partial) {
    constexpr int kSteps = kN == 1 ? 6 : 4;
    const uint32_t lane = threadIdx.x % 32, g = lane / 4, t = lane % 4, part = threadIdx.x / 32 % 4;
    float sum[kN][4] = {};
#pragma unroll 1
    for (uint32_t base = first_k + part * 32; base < end_k; base += kSteps * 128) {
        uint4 low[kSteps], high[kSteps], right[kSteps][kN];
#pragma unroll
        for (int i = 0; i < kSteps; ++i) {
            const uint32_t k = base + i * 128 + t * 8;
            const bool inside = k < end_k;
            low[i] = inside ? __ldg(a[0] + k / 8) : uint4{0, 0, 0, 0};
            high[i] = inside ? __ldg(a[1] + k / 8) : uint4{0, 0, 0, 0};
#pragma unroll
            for (int n = 0; n < kN; ++n) right[i][n] = inside ? __ldcg(h[n] + k / 8) : uint4{0, 0, 0, 0};
        }
#pragma unroll
        for (int i = 0; i < kSteps; ++i) {
#pragma unroll
            for (int n = 0; n < kN; ++n) {
                mma<T>(sum[n], low[i].x, high[i].x, low[i].y, high[i].y, right[i][n].x, right[i][n].y);
                mma<T>(sum[n], low[i].z, high[i].z, low[i].w, high[i].w, right[i][n].z, right[i][n].w);
            }
        }
    }
    float* mine = partial + part * kShrinkRows * kShrinkPitch;
#pragma unroll
    for (int n = 0; n < kN; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) mine[(n * 8 + 2 * t + i % 2) * kShrinkPitch + i / 2 * 8 + g] = sum[n][i];
    }
}

// A block's share of all chunks; then it counts its items.
template <class T>
__device__ __forceinline__ void shrink_chunks(const DecodeDownParams& p, uint32_t total, float* partial) {
    const uint32_t lane = threadIdx.x % 32, thread = threadIdx.x % kShrinkThreads;
    ShrinkItem items(p, blockIdx.x + lane * gridDim.x, total);
    // A of the first ones comes to L2 while the launch before still runs.
    if (thread < 4 && items.ranks > 0 && items.plane == 0) {
        bulk_prefetch_l2(reinterpret_cast<const void*>(items.a), items.ranks * p.intermediate_size * 2);
    }
    wait_for_previous_launch();
    const uint32_t of_plane = (p.intermediate_size / p.planes + 31) / 32 * 32, width = p.intermediate_size / 8;
    uint32_t done = 0;
#pragma unroll 1
    for (uint32_t index = blockIdx.x; index < total; index += gridDim.x, ++done) {
        if (done > 0 && done % 32 == 0) items = ShrinkItem(p, index + lane * gridDim.x, total);
        const ShrinkItem item(items, done % 32);
        const uint32_t first_k = item.plane * of_plane, end_k = min(p.intermediate_size, first_k + of_plane);
        // Ranks and rows beyond the last one are the last one again, and not stored.
        const uint4* a[2];
        for (uint32_t i = 0; i < 2; ++i) {
            a[i] = reinterpret_cast<const uint4*>(item.a) + static_cast<size_t>(min(lane / 4 + 8 * i, item.ranks - 1)) * width;
        }
#pragma unroll 1
        for (uint32_t first = item.first_row; first < item.end_row; first += kShrinkRows) {
            const uint32_t rows = min(kShrinkRows, item.end_row - first);
            const uint4* h[2];
            for (uint32_t i = 0; i < 2; ++i) {
                h[i] = reinterpret_cast<const uint4*>(p.intermediate) +
                       static_cast<size_t>(first + min(lane / 4 + 8 * i, rows - 1)) * width;
            }
            if (rows <= 8) {
                shrink_block<T, 1>(a, h, first_k, end_k, partial);
            } else {
                shrink_block<T, 2>(a, h, first_k, end_k, partial);
            }
            named_barrier(kBarrierShrink, kShrinkThreads);
            for (uint32_t i = thread; i < rows * 16; i += kShrinkThreads) {
                const uint32_t row = i / 16, column = i % 16;
                if (column >= item.ranks) continue;
                float sum = 0.0f;
#pragma unroll
                for (uint32_t part = 0; part < 4; ++part) sum += partial[(part * kShrinkRows + row) * kShrinkPitch + column];
                const size_t to = static_cast<size_t>(item.plane) * p.num_tokens * p.top_k + first + row;
                reinterpret_cast<float*>(p.shrunk)[to * p.max_rank + item.first_rank + column] = sum * item.scale;
            }
            named_barrier(kBarrierShrink, kShrinkThreads);
        }
    }
    if (thread == 0 && done > 0) counter_add(&reinterpret_cast<RouteCounts*>(p.counts)->claimed[1], done);
}

// What a block adds B S to: tokens [first_token, end_token), features from `first_feature` on.
struct LoraShare {
    uint32_t first_token, end_token, first_feature, num_chunks;
    const uint16_t* tokens;  // [rows]
    const float* weights;    // [rows]
    float* y;                // [own tokens][64], see place()
    uint4* pieces;           // [own tokens * k]

    // Where 16 features of a token are: feature i and i + 8 side by side.
    __device__ __forceinline__ uint32_t place(uint32_t token, uint32_t sixteen) const {
        return (token - first_token) * 64 + ((sixteen ^ token) & 3) * 16;
    }
};

// Rows of a chunk whose tokens are a block's, as 16 bytes in shared memory.
struct Piece {
    uint64_t b = 0;  // of the block's features
    uint32_t row = 0, end = 0, ranks = 0;
    bool repeats = false;  // a token has two of the rows: its pairs name an expert twice

    Piece() = default;
    __device__ __forceinline__ Piece(const DecodeDownParams& p, const LoraShare& share, uint32_t index) {
        const Segment chunk = reinterpret_cast<const Segment*>(p.chunks)[index];
        const AdapterEntry& entry = down_entry(p, chunk);
        ranks = (entry.rank + 7) / 8 * 8;
        b = entry.b + static_cast<uint64_t>(share.first_feature) * ranks * 2;
        if (ranks == 0) return;
        // Rows ascend by token.
        row = chunk.first_row;
        while (row < chunk.end_row && share.tokens[row] < share.first_token) ++row;
        end = row;
        while (end < chunk.end_row && share.tokens[end] < share.end_token) {
            repeats = repeats || (end > row && share.tokens[end] == share.tokens[end - 1]);
            ++end;
        }
    }
    __device__ __forceinline__ explicit Piece(uint4 words)
        : b(words.x | static_cast<uint64_t>(words.y) << 32),
          row(words.z & 0xffff),
          end(words.z >> 16),
          ranks(words.w & 0xffff),
          repeats(words.w >> 16 != 0) {}
    __device__ __forceinline__ uint4 words() const {
        return uint4{static_cast<uint32_t>(b), static_cast<uint32_t>(b >> 32), row | end << 16, ranks | (repeats ? 1u << 16 : 0)};
    }
    __device__ __forceinline__ void prefetch(const DecodeDownParams& p, const LoraShare& share) const {
        bulk_prefetch_l2(reinterpret_cast<const void*>(b), min(kStreamRows, p.hidden_size - share.first_feature) * ranks * 2);
    }
    // How many pieces B comes to L2 ahead.
    static __device__ __forceinline__ uint32_t ahead(const DecodeDownParams& p) { return p.max_rank <= 16 ? 32 : p.max_rank <= 64 ? 8 : 2; }
};

// Lists a block's pieces, in the order of chunks; returns how many. A warpgroup, every thread some chunks in a row.
__device__ __forceinline__ uint32_t list_pieces(const DecodeDownParams& p, const LoraShare& share, uint32_t* warp_counts) {
    const uint32_t thread = threadIdx.x % kShrinkThreads, lane = thread % 32, warp = thread / 32;
    const uint32_t each = (share.num_chunks + kShrinkThreads - 1) / kShrinkThreads;
    const uint32_t first = min(share.num_chunks, thread * each), end = min(share.num_chunks, first + each);
    uint32_t count = 0;
#pragma unroll 4
    for (uint32_t index = first; index < end; ++index) {
        const Piece piece(p, share, index);
        count += piece.row < piece.end;
    }
    uint32_t through = count;
#pragma unroll
    for (int d = 1; d < 32; d *= 2) {
        const uint32_t other = __shfl_up_sync(~0u, through, d);
        if (lane >= d) through += other;
    }
    if (lane == 31) warp_counts[warp] = through;
    named_barrier(kBarrierShrink, kShrinkThreads);
    uint32_t at = through - count, total = 0;
    for (uint32_t i = 0; i < kShrinkThreads / 32; ++i) {
        at += i < warp ? warp_counts[i] : 0;
        total += warp_counts[i];
    }
    for (uint32_t index = first; index < end; ++index) {
        const Piece piece(p, share, index);
        if (piece.row >= piece.end) continue;
        if (at < Piece::ahead(p)) piece.prefetch(p, share);
        share.pieces[at++] = piece.words();
    }
    named_barrier(kBarrierShrink, kShrinkThreads);
    return total;
}

// Goes through the steps of a block: ranks of eight rows, planes of S, the next rows, the next piece. It is at one if row < end.
struct Steps {
    Piece piece;
    uint32_t next = 0, count;
    uint32_t rank = 0, plane = 0;

    __device__ __forceinline__ Steps(const DecodeDownParams& p, const LoraShare& share, uint32_t count) : count(count) {
        next_piece(p, share);
    }
    __device__ __forceinline__ void advance(const DecodeDownParams& p, const LoraShare& share) {
        rank += 16;
        if (rank < piece.ranks) return;
        rank = 0;
        if (++plane < p.planes) return;
        plane = 0;
        piece.row += kStepRows;
        if (piece.row >= piece.end) next_piece(p, share);
    }
    __device__ __forceinline__ void next_piece(const DecodeDownParams& p, const LoraShare& share) {
        if (next >= count) {
            piece.row = piece.end = piece.ranks = 0;
            return;
        }
        piece = Piece(share.pieces[next]);
        const uint32_t later = next + Piece::ahead(p);
        if (threadIdx.x % kShrinkThreads == 0 && later < count) Piece(share.pieces[later]).prefetch(p, share);
        ++next;
    }
    // Brings the step to a place of the ring. What it is: first row, rows << 16 (0: no step), then the flags below.
    static constexpr uint32_t kLast = 1u << 24, kRepeats = 1u << 25;  // the rows' last ranks; rows share a token
    template <class T>
    __device__ __forceinline__ void bring(const DecodeDownParams& p, const LoraShare& share, uint32_t to) const {
        const uint32_t lane = threadIdx.x % 32, feature = threadIdx.x / 32 % 4 * 16 + lane / 2;
        const uint32_t rows = min(kStepRows, piece.end - piece.row);
        if (rows > 0) {
            const bool any_b = rank + lane % 2 * 8 < piece.ranks && share.first_feature + feature < p.hidden_size;
            const T* b = reinterpret_cast<const T*>(piece.b) + (any_b ? feature * piece.ranks + rank + lane % 2 * 8 : 0);
            cp_async(to + lane * 16, b, any_b);
            const bool any_s = lane / 4 < rows && rank + lane % 4 * 4 < piece.ranks;
            const uint32_t row = plane * p.num_tokens * p.top_k + piece.row + (any_s ? lane / 4 : 0);
            cp_async(to + kStepB + lane * 16, reinterpret_cast<const float*>(p.shrunk) + row * p.max_rank + rank + (any_s ? lane % 4 * 4 : 0),
                     any_s);
        }
        const bool last = rank + 16 >= piece.ranks && plane + 1 == p.planes;
        const uint32_t what = piece.row | rows << 16 | (last ? kLast : 0) | (piece.repeats ? kRepeats : 0);
        if (lane == 0) store_shared4(to + kStepB + kStepS, rows > 0 ? what : 0);
    }
};

// value += B S: S as two 16-bit numbers. A lane's k are four neighbouring ranks.
template <class T>
__device__ __forceinline__ void multiply_step(uint32_t step, float (&value)[4]) {
    const uint32_t lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    const uint2 b = load_shared8(step + g * 32 + t * 8), b8 = load_shared8(step + (g + 8) * 32 + t * 8);
    const uint4 bits = load_shared16(step + kStepB + lane * 16);
    const float s[4] = {__uint_as_float(bits.x), __uint_as_float(bits.y), __uint_as_float(bits.z), __uint_as_float(bits.w)};
    const uint32_t low = narrow_pair<T>(s[0], s[1]), high = narrow_pair<T>(s[2], s[3]);
    const float2 of_low = widen_pair<T>(low), of_high = widen_pair<T>(high);
    mma<T>(value, b.x, b8.x, b.y, b8.y, low, high);
    mma<T>(value, b.x, b8.x, b.y, b8.y, narrow_pair<T>(s[0] - of_low.x, s[1] - of_low.y),
           narrow_pair<T>(s[2] - of_high.x, s[3] - of_high.y));
}

// Lanes with the same token go one after the other.
__device__ __forceinline__ void add_rows(const LoraShare& share, const float (&value)[4], uint32_t first, uint32_t rows, bool repeats) {
    const uint32_t g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
#pragma unroll 1
    for (uint32_t turn = 0; turn < (repeats ? 4 : 1); ++turn) {
#pragma unroll
        for (uint32_t i = 0; i < 2; ++i) {
            const uint32_t row = first + 2 * t + i;
            if (2 * t + i >= rows || (repeats && turn != t)) continue;
            const float weight = share.weights[row];
            float2& to = reinterpret_cast<float2*>(share.y + share.place(share.tokens[row], threadIdx.x / 32))[g];
            to = float2{to.x + weight * value[i], to.y + weight * value[2 + i]};
        }
        __syncwarp();
    }
}

// Waits until the oldest steps of a ring are there; the later ones may be under way.
__device__ __forceinline__ void wait_for_steps(uint32_t steps) {
    if (steps == 4 * kStepsTogether) {
        cp_async_wait<3>();
    } else if (steps == 2 * kStepsTogether) {
        cp_async_wait<1>();
    } else {
        cp_async_wait<0>();
    }
    __syncwarp();
}

// `ring`: of the warp; `shrinks`: what must have been counted before S is read. Products side by side, then sums one after the other:
// steps may share tokens.
template <class T>
__device__ __forceinline__ void add_lora(const DecodeDownParams& p, const LoraShare& share, uint32_t ring, uint32_t pieces,
                                         uint32_t shrinks) {
    if (pieces == 0) return;
    if (threadIdx.x % kShrinkThreads == 0) {
        Watchdog watchdog;
        while (counter_read(&reinterpret_cast<const RouteCounts*>(p.counts)->claimed[1]) < shrinks) watchdog.turn();
    }
    named_barrier(kBarrierShrink, kShrinkThreads);
    Steps steps(p, share, pieces);
    float value[4] = {};
    const uint32_t end = ring + p.lora_steps * kStepBytes;
    uint32_t to = ring;
    bool full = false;
#pragma unroll 1
    for (;;) {
#pragma unroll
        for (uint32_t i = 0; i < kStepsTogether; ++i) {
            steps.bring<T>(p, share, to + i * kStepBytes);
            steps.advance(p, share);
        }
        cp_async_commit();
        to += kStepsTogether * kStepBytes;
        if (to == end) to = ring, full = true;
        if (!full) continue;
        wait_for_steps(p.lora_steps);
        float product[kStepsTogether][4] = {};
        uint32_t what[kStepsTogether];
#pragma unroll
        for (uint32_t i = 0; i < kStepsTogether; ++i) what[i] = load_shared4(to + i * kStepBytes + kStepB + kStepS);
#pragma unroll
        for (uint32_t i = 0; i < kStepsTogether; ++i) multiply_step<T>(to + i * kStepBytes, product[i]);
        if (what[0] == 0) break;
#pragma unroll
        for (uint32_t i = 0; i < kStepsTogether; ++i) {
#pragma unroll
            for (int j = 0; j < 4; ++j) value[j] += product[i][j];
            if (what[i] & Steps::kLast) {
                add_rows(share, value, what[i] & 0xffff, what[i] >> 16 & 255, what[i] & Steps::kRepeats);
#pragma unroll
                for (int j = 0; j < 4; ++j) value[j] = 0.0f;
            }
        }
        __syncwarp();
    }
}
