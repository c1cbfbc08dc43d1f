// Everything that crosses from the host: one struct a kernel, and the records that kernels hand to each other.
//
// `src/params.rs` holds the same structs in Rust. Both sides assert every size, and the Rust side every offset, so that
// neither can change alone. All pointers are device addresses of 8 bytes; all other fields are 4 bytes wide.
#pragma once
#include <cstddef>
#include <cstdint>

#include "ptx/tma.cuh"

// Where one projection of one (slot, expert) finds its adapter. `a` is [rank8, in], `b` is [out, rank8], row-major,
// 16-byte aligned, with rank8 = rank rounded up to a multiple of 8 and the padding zero. rank 0 is no adapter.
struct AdapterEntry {
    uint64_t a;
    uint64_t b;
    int32_t rank;
    float scale;
};
static_assert(sizeof(AdapterEntry) == 24, "AdapterEntry");

// Rows [first_row, end_row) of one expert and one slot (-1: base model).
struct Segment {
    uint32_t expert;
    int32_t slot;
    uint32_t first_row;
    uint32_t end_row;
};
static_assert(sizeof(Segment) == 16, "Segment");

// At most kTileRows rows of one expert; `first_segment` is the index of the segment that holds the first of them.
struct RowTile {
    uint32_t expert;
    uint32_t first_row;
    uint32_t num_rows;
    uint32_t first_segment;
};
static_assert(sizeof(RowTile) == 16, "RowTile");

// What align found; written whole by every launch.
struct RouteCounts {
    uint32_t num_rows;
    uint32_t num_segments;
    uint32_t num_tiles;
    uint32_t num_chunks;
    uint32_t bad_experts;  // ids that are no expert of any rank, nor -1: skipped
    uint32_t bad_slots;    // slots outside [-1, L), taken as -1
    uint32_t claimed[2];   // zero: what kernels that share out a list as they go count with (gate_up, down); they leave zero
};
static_assert(sizeof(RouteCounts) == 32, "RouteCounts");

constexpr int kTileRows = 128;  // most rows of a RowTile
constexpr int kChunkRows = 64;  // most rows of a LoRA chunk
constexpr int kSortDigit = 1024;  // slots are sorted by digits of this base

struct TopkParams {
    uint64_t logits;          // f32 [T, E]
    uint64_t selection_bias;  // f32 [E] or 0
    uint64_t topk_ids;        // i32 [T, k], out
    uint64_t topk_weights;    // f32 [T, k], out
    uint32_t num_tokens;
    uint32_t num_experts;
    uint32_t top_k;
    uint32_t sigmoid;       // 0: softmax over all experts
    uint32_t renormalize;
    uint32_t num_groups;    // 0: no groups
    uint32_t top_groups;
    uint32_t group_top_two;  // 0: a group scores by its best expert, 1: by the sum of its best two
    float renormalize_epsilon;
    float scaling;
};
static_assert(sizeof(TopkParams) == 72, "TopkParams");

struct AlignParams {
    uint64_t topk_ids;      // i32 [T, k]
    uint64_t topk_weights;  // f32 [T, k]
    uint64_t token_slots;   // i32 [T] or 0: all base
    uint64_t slot_active;   // u8 [L] or 0: all; a slot with 0 has no adapter in this layer and counts as -1
    uint64_t row_pair;      // u32 [T * k], out
    uint64_t row_weight;    // f32 [T * k], out, or 0 where nobody reads it (not decode_align)
    uint64_t pair_row;      // i32 [T * k], out
    uint64_t segments;      // Segment [most segments], out
    uint64_t tiles;         // RowTile [most tiles], out
    uint64_t chunks;        // Segment [most chunks], out: LoRA work
    uint64_t counts;        // RouteCounts, out
    uint64_t order;         // u32 [2, T], scratch
    uint64_t table;         // u32 [grid, max(E + 2, 1024)], scratch; only for grid > 1
    uint64_t barrier;       // u32, zeroed once when allocated; only for grid > 1
    uint32_t num_tokens;
    uint32_t top_k;
    uint32_t num_experts;
    uint32_t num_slots;
    uint32_t tile_rows;  // 0: tiles of kTileRows rows; else an expert's rows in equal tiles of at most this many, a multiple of 16
    uint32_t first_expert;  // the id of expert 0
    uint32_t all_experts;   // ids below this that are not in [first_expert, first_expert + E) are like -1: other ranks' experts
    uint32_t reserved;
};
static_assert(sizeof(AlignParams) == 144, "AlignParams");

// Pairs of every slot by expert, padded to whole blocks. Slots that are disabled or not listed: nothing is written.
struct AlignBlockParams {
    uint64_t topk_ids;             // i32 or i64 [T, k]
    uint64_t seg_indptr;           // i32 [S + 1], ascending: first token of each segment
    uint64_t req_to_lora;          // i32 [S]: slot or -1
    uint64_t lora_ids;             // i32 [L]: slots to work on, -1 for none
    uint64_t adapter_enabled;      // i32 [L]
    uint64_t expert_map;           // i32 [E] or 0: global to local expert, -1 for none
    uint64_t sorted_token_ids;     // i32 [L, p], out
    uint64_t expert_ids;           // i32 [L, p / block size], out
    uint64_t num_tokens_post_pad;  // i32 [L], out
    uint64_t enabled;              // u32 [L], scratch
    uint64_t token_slots;          // i32 [T], scratch
    uint64_t order;                // u32 [2, T], scratch
    uint64_t row_pair;             // u32 [T * k], scratch
    uint64_t starts;               // u32 [L, E], scratch
    uint64_t ends;                 // u32 [L, E], scratch
    uint64_t table;                // u32 [grid, max(E + 2, 1024)], scratch; only for grid > 1
    uint64_t barrier;              // u32, zeroed once when allocated; only for grid > 1
    uint32_t ids_are_i64;
    uint32_t num_tokens;
    uint32_t top_k;
    uint32_t num_experts;
    uint32_t num_segments;
    uint32_t max_loras;
    uint32_t block_size;
    uint32_t slot_entries;  // p, a multiple of block_size
};
static_assert(sizeof(AlignBlockParams) == 168, "AlignBlockParams");

// s = scale * A x for every row of every LoRA chunk. A value of `shrunk` is two numbers of the activation's format whose sum
// it is; of four (or eight) neighbouring ranks the first numbers come first, then the second ones.
struct ShrinkParams {
    uint64_t input;     // [*, K]
    uint64_t row_pair;  // u32 [rows]: input row = row_pair / top_k; 0: input row = row
    uint64_t chunks;    // Segment
    uint64_t counts;    // RouteCounts
    uint64_t adapters;  // AdapterEntry [L, E, 3]
    uint64_t shrunk;    // [rows, shrunk_stride] of 4 bytes, out
    uint32_t top_k;
    uint32_t num_experts;
    uint32_t width;            // K
    uint32_t first_projection;  // 0: gate, then up; 2: down
    uint32_t num_projections;   // 2 or 1
    uint32_t max_rank;          // multiple of 8; projection p starts at column p * max_rank
    uint32_t shrunk_stride;
    uint32_t octets;            // 1: of eight neighbouring ranks the eight first numbers come first, as the prefill kernels read them
    // Fully sharded adapters: `shrunk` is f32, which moe_lora_split makes pairs of when the ranks have added theirs.
    uint32_t part;   // A holds this part of its ranks, without padding; their columns alone are written
    uint32_t parts;  // 0: A is whole and `shrunk` is pairs
};
static_assert(sizeof(ShrinkParams) == 88, "ShrinkParams");

// Values of `shrunk` from f32 to two numbers of the activation's format whose sum they are, in place.
struct SplitParams {
    uint64_t counts;  // RouteCounts
    uint64_t shrunk;  // [rows, stride]
    uint32_t stride;  // a multiple of 8
    uint32_t octets;  // as in ShrinkParams
};
static_assert(sizeof(SplitParams) == 24, "SplitParams");

// The same for many rows (sm_90a), from segments; in octets.
struct PrefillShrinkParams {
    uint64_t input;     // [*, K]
    uint64_t row_pair;  // u32 [rows]: input row = row_pair / top_k; 0: input row = row
    uint64_t segments;  // Segment
    uint64_t counts;    // RouteCounts
    uint64_t adapters;  // AdapterEntry [L, E, 3]
    uint64_t shrunk;    // [rows, shrunk_stride] of 4 bytes, out
    uint32_t top_k;
    uint32_t num_experts;
    uint32_t width;             // K
    uint32_t first_projection;  // 0: gate, then up; 2: down
    uint32_t num_projections;   // 2 or 1
    uint32_t max_rank;          // multiple of 8; projection p starts at column p * max_rank
    uint32_t shrunk_stride;
    uint32_t reserved;
};
static_assert(sizeof(PrefillShrinkParams) == 80, "PrefillShrinkParams");

// h = act(W_gate x + B S, W_up x + B S) for every row.
struct GateUpParams {
    uint64_t hidden;       // [T, H]
    uint64_t gate;         // [E, I, H] with the strides below
    uint64_t up;           // likewise
    uint64_t gate_bias;    // f32 [E, I] or 0
    uint64_t up_bias;      // f32 [E, I] or 0
    uint64_t row_pair;     // u32 [rows]
    uint64_t row_weight;   // f32 [rows]; read only if weigh_input
    uint64_t tiles;        // RowTile
    uint64_t segments;     // Segment
    uint64_t counts;       // RouteCounts
    uint64_t adapters;     // AdapterEntry [L, E, 3] or 0: no LoRA; else the launch before must be shrink for gate and up
    uint64_t shrunk;       // [rows, shrunk_stride] of 4 bytes
    uint64_t intermediate;  // [rows, I], out
    uint64_t expert_stride;  // numbers from expert to expert, of gate and of up
    uint32_t row_stride;     // numbers from row to row: H, or 2H where gate and up rows alternate
    uint32_t top_k;
    uint32_t num_experts;
    uint32_t hidden_size;
    uint32_t intermediate_size;
    uint32_t max_rank;  // column of up's part of a shrunk row
    uint32_t shrunk_stride;
    uint32_t activation;   // 0 SiLU, 1 GELU, 2 GELU in the tanh form, 3 clamped SwiGLU
    uint32_t weigh_input;  // multiply the products by the routing weight, before the bias
    float alpha;           // of the clamped SwiGLU
    float limit;
    uint32_t reserved;
};
static_assert(sizeof(GateUpParams) == 160, "GateUpParams");

// y = W_down h + B S + bias for every row.
struct DownParams {
    uint64_t intermediate;  // [rows, I]
    uint64_t down;          // [E, H, I]
    uint64_t bias;          // f32 [E, H] or 0
    uint64_t tiles;
    uint64_t segments;
    uint64_t counts;
    uint64_t adapters;  // AdapterEntry [L, E, 3] or 0: no LoRA; else the launch before must be shrink for down
    uint64_t shrunk;    // [rows, shrunk_stride] of 4 bytes
    uint64_t rows_out;  // [rows, H], out; without LoRA the launch before must be gate_up
    uint64_t expert_stride;
    uint32_t row_stride;
    uint32_t num_experts;
    uint32_t hidden_size;
    uint32_t intermediate_size;
    uint32_t shrunk_stride;
    uint32_t rows_f32;  // rows_out is f32 and not the activation's format
    uint32_t first_b;   // B has rows for features [first_b, first_b + num_b); all, but for fully sharded adapters
    uint32_t num_b;
};
static_assert(sizeof(DownParams) == 112, "DownParams");

// The same for experts with many rows (sm_90a). `weights`: boxes {64 k, 8 rows, gate and up, 8 groups of 8 rows, expert}.
struct PrefillGateUpParams {
    TensorMap weights;
    GateUpParams gate_up;
};
static_assert(sizeof(PrefillGateUpParams) == 320, "PrefillGateUpParams");

// `weights`: boxes {64 k, 128 rows, expert}.
struct PrefillDownParams {
    TensorMap weights;
    DownParams down;
};
static_assert(sizeof(PrefillDownParams) == 256, "PrefillDownParams");

// out = scaling * sum_j w_j y_j.
struct CombineParams {
    uint64_t rows_in;       // [rows, H]
    uint64_t pair_row;      // i32 [T * k]
    uint64_t topk_weights;  // f32 [T, k], or 0: all 1
    uint64_t out;           // [T, H]
    uint32_t num_tokens;
    uint32_t top_k;
    uint32_t hidden_size;
    uint32_t rows_f32;
    uint32_t out_f32;
    float scaling;
};
static_assert(sizeof(CombineParams) == 56, "CombineParams");

// T noise: index i is zero where i % width >= filled, else a random number of standard deviation `deviation`.
struct NoiseParams {
    uint64_t out;    // [count]
    uint64_t count;
    uint64_t width;
    uint64_t filled;
    uint32_t seed;
    float deviation;
};
static_assert(sizeof(NoiseParams) == 40, "NoiseParams");

struct ReadParams {
    uint64_t from;   // 16-byte aligned
    uint64_t bytes;  // a multiple of 16
    uint64_t sink;   // u32, hardly ever written
};
static_assert(sizeof(ReadParams) == 24, "ReadParams");

struct PeakParams {
    uint64_t a;     // bf16 [m_tiles, k_steps, 128 * 64]
    uint64_t b;     // bf16 [n_tiles, k_steps, 256 * 64]
    uint64_t sink;  // f32, hardly ever written
    uint32_t m_tiles;  // a multiple of 16
    uint32_t n_tiles;  // a multiple of 8
    uint32_t k_steps;
    uint32_t reserved;
};
static_assert(sizeof(PeakParams) == 40, "PeakParams");

// GateUpParams and its shrink in one launch, for few rows an expert, on Hopper. The launch before must be align, with tile_rows.
struct DecodeGateUpParams {
    TensorMap weights;     // gate and up: boxes of 64 numbers, 8 rows, gate and up, 4 groups of 8 rows, an expert
    GateUpParams gate_up;  // shrunk is out too; counts->claimed[0] must be 0 and counts what was shrunk
    uint64_t chunks;       // Segment, of at most tile_rows rows
    uint32_t tile_rows;    // most rows of a tile, 16, 32, 64 or 128
    uint32_t stages;       // of the ring
    uint32_t stage_tiles;  // 64s of k in a stage
    uint32_t reserved[3];
};
static_assert(sizeof(DecodeGateUpParams) == 320, "DecodeGateUpParams");

// Shrink, product and weighted sum over experts in one launch, for few tokens, on Hopper: out = scaling * sum_j w_j (W_down h_j +
// B S_j + bias). The launch before must be gate_up for the same lists, and align before that.
struct DecodeDownParams {
    TensorMap weights;      // down: boxes of 64 numbers, 64 rows, an expert
    uint64_t intermediate;  // [rows, I]
    uint64_t bias;          // f32 [E, H] or 0
    uint64_t row_pair;      // u32 [rows]
    uint64_t row_weight;    // f32 [rows], or 0: all 1
    uint64_t tiles;         // RowTile
    uint64_t chunks;        // Segment
    uint64_t counts;        // RouteCounts; claimed[1] must be 0 and counts what was shrunk
    uint64_t adapters;      // AdapterEntry [L, E, 3] or 0: no LoRA
    uint64_t shrunk;        // f32 [planes, T * k, max_rank], out
    uint64_t out;           // [T, H]
    uint32_t num_tokens;
    uint32_t top_k;
    uint32_t num_experts;
    uint32_t hidden_size;
    uint32_t intermediate_size;
    uint32_t max_rank;
    uint32_t planes;       // parts of I that are shrunk apart, 1 or 2
    uint32_t tile_rows;    // most rows of a tile, 16, 32, 64 or 128
    uint32_t stages;       // of the ring
    uint32_t stage_tiles;  // 64s of k in a stage, 1 or 2
    uint32_t cluster;      // blocks that share the k of 64 features
    uint32_t max_tiles;    // places for tiles in shared memory
    uint32_t out_f32;      // out is f32 and not the activation's format
    float scaling;
    uint32_t lora_steps;   // in a warp's ring for LoRA: 16, 8 or 4
    uint32_t reserved;
};
static_assert(sizeof(DecodeDownParams) == 320, "DecodeDownParams");

// A whole layer in one launch, for up to 16 tokens and 128 pairs, on Hopper. H and I are multiples of 64. The launch before must be
// DecodeClear for the same flags.
struct DecodeLayerParams {
    TensorMap gate_up;      // boxes of {64 k, 16 rows, 4 pieces of k, gate and up, expert}
    TensorMap down;         // boxes of {64 k, down_features rows, down_pieces pieces of k, expert}
    uint64_t hidden;        // [T, H]
    uint64_t topk_ids;      // i32 [T, k]
    uint64_t topk_weights;  // f32 [T, k]
    uint64_t token_slots;   // i32 [T] or 0: all base
    uint64_t slot_active;   // u8 [L] or 0: all
    uint64_t gate_bias;     // f32 [E, I] or 0
    uint64_t up_bias;       // f32 [E, I] or 0
    uint64_t down_bias;     // f32 [E, H] or 0
    uint64_t adapters;      // AdapterEntry [L, E, 3] or 0: no LoRA
    uint64_t shrunk;        // f32 [ceil(H / 512), T * k, 2 max_rank], then [ceil(I / 512), T * k, max_rank], out
    uint64_t intermediate;  // [T * k, I], out
    uint64_t flags;         // u32 [2 * 128 + 1], zero; out
    uint64_t counts;        // RouteCounts or 0, out
    uint64_t out;           // [T, H], out
    uint32_t num_tokens;
    uint32_t top_k;
    uint32_t num_experts;
    uint32_t num_slots;
    uint32_t hidden_size;
    uint32_t intermediate_size;
    uint32_t max_rank;      // a multiple of 8
    uint32_t activation;    // as GateUpParams
    uint32_t weigh_input;
    float alpha;
    float limit;
    float scaling;
    uint32_t out_f32;
    uint32_t tile_rows;      // most rows of a tile, up to 16
    uint32_t stages;         // of the ring
    uint32_t stage_bytes;    // a multiple of 1024: weights, then tokens
    uint32_t down_features;  // of a block, a multiple of 8 up to 64
    uint32_t down_pieces;    // 64s of k in a stage of down
    uint32_t window;         // stages whose weights may be on their way at a time
    uint32_t reserved;
};
static_assert(sizeof(DecodeLayerParams) == 448, "DecodeLayerParams");

struct DecodeClearParams {
    uint64_t flags;  // u32 [words], out
    uint64_t words;
};
static_assert(sizeof(DecodeClearParams) == 16, "DecodeClearParams");
