/* moe-lora: one Mixture-of-Experts layer with many LoRA adapters at once, on an NVIDIA GPU.
 *
 * Addresses (uint64_t) are in GPU memory, 0 for what is absent. Tensors are row-major and without gaps, but for the base
 * weights, which have strides. Tensors of the layer's format lie at multiples of 16 bytes, the workspace at a multiple of
 * 256, everything else at multiples of its numbers' size.
 *
 * Functions return MOE_LORA_OK, MOE_LORA_FAILED (the GPU or its driver) or MOE_LORA_INVALID (an argument);
 * moe_lora_last_error() has the words. They may be called from any thread. */
#ifndef MOE_LORA_H
#define MOE_LORA_H

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

enum { MOE_LORA_OK = 0, MOE_LORA_FAILED = 1, MOE_LORA_INVALID = 2 };
enum { MOE_LORA_BF16 = 0, MOE_LORA_F16 = 1, MOE_LORA_F32 = 2 };
enum { MOE_LORA_SILU = 0, MOE_LORA_GELU = 1, MOE_LORA_GELU_TANH = 2, MOE_LORA_CLAMPED_SWIGLU = 3 };

/* An opened GPU: its primary context, with all kernels loaded. */
typedef struct moe_lora_context moe_lora_context;

/* T tokens, k experts a token, E experts, H width of a token, I width inside an expert. */
typedef struct {
    uint64_t stream;       /* CUstream; 0: the default stream */
    uint64_t hidden;       /* [T, H] */
    uint64_t topk_ids;     /* i32 [T, k]; -1: elsewhere; others that are no expert are skipped and counted */
    uint64_t topk_weights; /* f32 [T, k], used as they are */
    uint64_t token_slots;  /* i32 [T]; -1: base model; others outside [0, slots) are taken as -1 and counted */
    uint64_t gate;         /* [E, I, H] with the strides below */
    uint64_t up;           /* likewise, with the same strides */
    uint64_t down;         /* [E, H, I] with the strides below */
    uint64_t gate_bias;    /* f32 [E, I], or 0 */
    uint64_t up_bias;      /* f32 [E, I], or 0 */
    uint64_t down_bias;    /* f32 [E, H], or 0: added before the routing weight */
    uint64_t adapters;     /* moe_lora_adapter_entry [slots, E, 3], ranks up to max_rank */
    uint64_t slot_active;  /* u8 [slots], or 0: 0 for slots that hold nothing for this layer */
    uint64_t out;          /* [T, H], out; overlaps nothing */
    uint64_t counts;       /* moe_lora_counts, out, or 0 */
    uint64_t workspace;    /* whatever it holds; one stream at a time */
    uint64_t workspace_bytes;
    uint64_t gate_up_expert_stride; /* numbers from expert to expert: 2IH for w13 [E, 2I, H] */
    uint64_t down_expert_stride;    /* HI for w2 [E, H, I] */
    uint32_t gate_up_row_stride;    /* numbers from row to row: H, or 2H where gate and up rows alternate */
    uint32_t down_row_stride;       /* I */
    uint32_t num_tokens;
    uint32_t num_experts;       /* up to 1024 */
    uint32_t top_k;
    uint32_t hidden_size;       /* a multiple of 8 */
    uint32_t intermediate_size; /* a multiple of 8 */
    uint32_t num_slots;         /* 0: the base model alone */
    uint32_t max_rank;          /* the largest that the table may ever hold */
    uint32_t dtype;             /* MOE_LORA_BF16 or MOE_LORA_F16 */
    uint32_t out_dtype;         /* dtype, or MOE_LORA_F32 */
    uint32_t activation;        /* MOE_LORA_SILU or one of its kind */
    uint32_t weigh_input;       /* 1: experts see w_j x and are summed unweighted */
    float alpha;                /* of MOE_LORA_CLAMPED_SWIGLU */
    float limit;                /* of MOE_LORA_CLAMPED_SWIGLU */
    float scaling;              /* factor of the output */
    uint32_t first_expert;      /* under expert parallelism the id of this rank's first expert, else 0 */
    uint32_t all_experts;       /* and the experts of all ranks: ids below that are not this rank's are skipped, else 0 */
    uint32_t adapter_part;      /* 0 */
    uint32_t adapter_parts;     /* 0 or 1: adapters are whole; what parts exchange is for Rust's raw door */
} moe_lora_forward_args;

/* One matrix pair of one slot, expert and projection (gate, up, down). rank8 is rank rounded up to a multiple of 8; what
 * is beyond rank must be zero. All zero: no adapter. */
typedef struct {
    uint64_t a; /* [rank8, in] */
    uint64_t b; /* [out, rank8] */
    int32_t rank;
    float scale;
} moe_lora_adapter_entry;

/* What a forward found. */
typedef struct {
    uint32_t num_rows; /* pairs that have an expert here */
    uint32_t num_segments;
    uint32_t num_tiles;
    uint32_t num_chunks;
    uint32_t bad_experts; /* ids that are neither -1 nor any rank's expert */
    uint32_t bad_slots;   /* slots outside [-1, slots) */
    uint32_t reserved[2];
} moe_lora_counts;

/* One layer's adapters as four buffers; both buffers of a side are 0 if no adapter changes it. */
typedef struct {
    uint64_t gate_up_a;    /* [slots, E, 2R, H]: gate's rows, from row R on up's */
    uint64_t gate_up_b;    /* [slots, E, 2I, R] */
    uint64_t down_a;       /* [slots, E, R, I] */
    uint64_t down_b;       /* [slots, E, H, R] */
    uint32_t rank;         /* R, a multiple of 8 */
    uint32_t shared_outer; /* 1: E is 1 in gate_up_a and down_b */
} moe_lora_slot_buffers;

/* sizeof(moe_lora_forward_args) as the library has it. */
uint64_t moe_lora_forward_args_bytes(void);

/* Why this thread's last failing call failed; good until the next one, never NULL. */
const char *moe_lora_last_error(void);

int32_t moe_lora_open(uint32_t ordinal, moe_lora_context **context);

/* NULL is allowed. */
void moe_lora_close(moe_lora_context *context);

/* Bytes of workspace that suffice for every forward of args' sizes with up to its num_tokens, num_slots and max_rank. Reads
 * no other field of args. */
int32_t moe_lora_workspace_bytes(const moe_lora_context *context, const moe_lora_forward_args *args, uint64_t *bytes);

/* Gives one layer to args->stream and returns: nothing is allocated, nothing waits, and the stream may be in capture. All
 * memory must stay as it is until the stream has run it. */
int32_t moe_lora_forward(const moe_lora_context *context, const moe_lora_forward_args *args);

/* Fills entries [slots, E, 3] in host memory. Each slot's rank is 0 (empty), or one that R is the next multiple of 8 of. */
int32_t moe_lora_slot_entries(const moe_lora_slot_buffers *buffers, uint32_t num_experts, uint32_t hidden_size,
                              uint32_t intermediate_size, uint32_t num_slots, const uint32_t *ranks,
                              const float *scales, moe_lora_adapter_entry *entries);

#ifdef __cplusplus
}
#endif

#endif
