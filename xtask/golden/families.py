"""The model families: tiny configurations, random weights, and where each family keeps its MoE block.

Sizes are small but never convenient: OLMoE has H = 2 I and gpt-oss H = I, where PEFT's two orientations of an adapter have
one shape; Qwen2-MoE has sizes that are no multiple of 8; DeepSeek and Qwen have dense layers between the MoE layers.
"""

import zlib

import torch
from torch import nn

VOCAB = 32
COMMON = dict(vocab_size=VOCAB, max_position_embeddings=64, bos_token_id=1, eos_token_id=2, tie_word_embeddings=False)
HEADS = dict(num_attention_heads=2, num_key_value_heads=1)
MLA = dict(
    num_attention_heads=2,
    num_key_value_heads=2,
    kv_lora_rank=8,
    q_lora_rank=8,
    qk_nope_head_dim=4,
    qk_rope_head_dim=4,
    v_head_dim=4,
    n_shared_experts=1,
    first_k_dense_replace=1,
)

# name -> (transformers class prefix, configuration)
FAMILIES = {
    "mixtral": (
        "Mixtral",
        dict(
            COMMON,
            **HEADS,
            hidden_size=40,
            intermediate_size=24,
            num_hidden_layers=2,
            num_local_experts=4,
            num_experts_per_tok=2,
            head_dim=8,
        ),
    ),
    "qwen2_moe": (
        "Qwen2Moe",
        dict(
            COMMON,
            **HEADS,
            hidden_size=36,
            intermediate_size=12,
            moe_intermediate_size=20,
            shared_expert_intermediate_size=12,
            num_hidden_layers=4,
            decoder_sparse_step=2,  # MoE layers 1 and 3
            num_experts=6,
            num_experts_per_tok=3,
            norm_topk_prob=False,
        ),
    ),
    "qwen3_moe": (
        "Qwen3Moe",
        dict(
            COMMON,
            **HEADS,
            hidden_size=32,
            intermediate_size=12,
            moe_intermediate_size=24,
            num_hidden_layers=3,
            mlp_only_layers=[1],  # MoE layers 0 and 2
            num_experts=8,
            num_experts_per_tok=2,
            norm_topk_prob=True,
            head_dim=8,
        ),
    ),
    "olmoe": (
        "Olmoe",
        dict(
            COMMON,
            **HEADS,
            hidden_size=32,
            intermediate_size=16,  # H = 2 I
            num_hidden_layers=2,
            num_experts=5,
            num_experts_per_tok=2,
            norm_topk_prob=True,
        ),
    ),
    "deepseek_v2": (
        "DeepseekV2",
        dict(
            COMMON,
            **MLA,
            hidden_size=40,
            intermediate_size=12,
            moe_intermediate_size=16,
            num_hidden_layers=3,
            n_routed_experts=8,
            num_experts_per_tok=3,
            topk_method="group_limited_greedy",
            n_group=4,
            topk_group=2,
            norm_topk_prob=False,
            routed_scaling_factor=2.5,
        ),
    ),
    "deepseek_v3": (
        "DeepseekV3",
        dict(
            COMMON,
            **MLA,
            hidden_size=48,
            intermediate_size=12,
            moe_intermediate_size=16,
            num_hidden_layers=3,
            n_routed_experts=8,
            num_experts_per_tok=3,
            n_group=4,
            topk_group=2,
            norm_topk_prob=True,
            routed_scaling_factor=2.5,
        ),
    ),
    "gpt_oss": (
        "GptOss",
        dict(
            COMMON,
            **HEADS,
            hidden_size=24,
            intermediate_size=24,  # H = I
            num_hidden_layers=2,
            num_local_experts=4,
            num_experts_per_tok=2,
            head_dim=8,
        ),
    ),
}


def generator(*key):
    """A random generator that depends on the words of `key` only."""
    return torch.Generator().manual_seed(zlib.crc32("/".join(map(str, key)).encode()))


def new_model(family):
    """A randomly drawn model of the family, in f32."""
    import transformers

    prefix, config = FAMILIES[family]
    config = getattr(transformers, f"{prefix}Config")(**config)
    model = getattr(transformers, f"{prefix}ForCausalLM")(config).float().eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(draw_weight(family, name, p.shape))
        for name, b in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                b.copy_(torch.rand(b.shape, generator=generator(family, name)) * 0.8 - 0.3)
    return model


def draw_weight(family, name, shape):
    """Signed numbers with activations of order one; gpt-oss is drawn so large that its clamps act."""
    x = torch.randn(shape, generator=generator(family, name))
    if "norm" in name:
        return 1 + 0.1 * x
    if len(shape) == 1 or name.endswith("bias"):
        return 0.5 * x
    fan_in = shape[1] if len(shape) == 3 else shape[-1]
    gain = 1.0
    if name.endswith(("gate.weight", "router.weight")):
        gain = 1.5
    elif family == "gpt_oss" and "gate_up_proj" in name:
        gain = 4.0
    elif "experts" in name:
        gain = 1.3
    return gain * x / fan_in**0.5


def load_model(directory, dtype=torch.float32):
    """The checkpoint through `from_pretrained`, widened to f32 unless told otherwise, with the plain loop over experts."""
    import transformers

    kwargs = {} if transformers.__version__.startswith("4.") else dict(experts_implementation="eager")
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=dtype, **kwargs).eval()
    model.name_or_path = f"golden/{directory.name}"
    model.config._name_or_path = model.name_or_path
    return model


def moe_block(model, layer):
    """The MoE block of a decoder layer of a plain or a PEFT model."""
    if hasattr(model, "base_model") and hasattr(model, "peft_config"):
        model = model.base_model.model
    decoder = model.model.layers[layer]
    return decoder.block_sparse_moe if hasattr(decoder, "block_sparse_moe") else decoder.mlp


class Zero(nn.Module):
    """Stands in for the shared experts, so that a block returns its routed experts alone."""

    def forward(self, x):
        return torch.zeros_like(x)


@torch.no_grad()
def run_block(model, layer, hidden):
    """Hugging Face's own block on `[T, H]`: the routed experts' output `[T, H]`."""
    block = moe_block(model, layer)
    for name in ("shared_expert", "shared_experts"):
        if hasattr(block, name):
            setattr(block, name, Zero())
    out = block(hidden[None])
    return (out[0] if isinstance(out, tuple) else out).reshape(hidden.shape)


@torch.no_grad()
def run_router(model, layer, hidden):
    """The family's own router (transformers 5): ids and weights `[T, k]`, in its order."""
    block = moe_block(model, layer)
    router = block.router if hasattr(block, "router") else block.gate
    _, weights, ids = router(hidden)
    return ids, weights
