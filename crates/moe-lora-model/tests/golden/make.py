"""Makes the golden checkpoints beside this file with transformers 5 (`pip install torch transformers`).

One folder a family: `config.json` and `model.safetensors` as `save_pretrained` writes them, cut down to the MoE blocks;
`fused.safetensors`, the same tensors as the model holds them in memory; and `expected.safetensors`, what layer 1 computes:
`hidden_states` [T, H], dense routing weights `routing` [T, E], and `output` [T, H] of the routed experts.
"""

import json
import shutil
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

COMMON = dict(hidden_size=8, intermediate_size=6, moe_intermediate_size=6, num_hidden_layers=2, vocab_size=16,
              num_attention_heads=1, num_key_value_heads=1, head_dim=8, tie_word_embeddings=False, pad_token_id=0,
              bos_token_id=0, eos_token_id=0)
MLA = dict(kv_lora_rank=4, q_lora_rank=4, qk_rope_head_dim=4, qk_nope_head_dim=4, v_head_dim=4)
FAMILIES = {
    "mixtral": dict(num_local_experts=4, num_experts_per_tok=2),
    "qwen2_moe": dict(num_experts=6, num_experts_per_tok=3, decoder_sparse_step=2, shared_expert_intermediate_size=6),
    "qwen3_moe": dict(num_experts=6, num_experts_per_tok=3, norm_topk_prob=True, mlp_only_layers=[0]),
    "olmoe": dict(num_experts=6, num_experts_per_tok=3, hidden_act="gelu_pytorch_tanh"),
    "deepseek_v2": dict(n_routed_experts=8, num_experts_per_tok=3, n_shared_experts=1, first_k_dense_replace=1, n_group=4,
                        topk_group=2, topk_method="group_limited_greedy", routed_scaling_factor=1.7, **MLA),
    "deepseek_v3": dict(n_routed_experts=8, num_experts_per_tok=3, n_shared_experts=1, first_k_dense_replace=1, n_group=4,
                        topk_group=2, **MLA),
    "gpt_oss": dict(num_local_experts=4, num_experts_per_tok=2, swiglu_limit=1.5),
}


def is_moe(name):
    return ".experts." in name or any(name.endswith(f".{r}.{p}") for r in ("gate", "router")
                                      for p in ("weight", "bias", "e_score_correction_bias"))


def make(family, settings, folder):
    torch.manual_seed(len(family) + len(settings))
    config = AutoConfig.for_model(family, **{**COMMON, **settings})
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, experts_implementation="eager").eval()
    state = model.state_dict()
    for tensor in state.values():
        tensor.normal_(0, 0.6)
    for name, tensor in state.items():
        if name.endswith("e_score_correction_bias"):
            tensor.mul_(0.3)

    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    with tempfile.TemporaryDirectory() as whole:
        model.save_pretrained(whole)
        saved = load_file(Path(whole) / "model.safetensors")
        saved_config = json.loads((Path(whole) / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(saved_config, indent=1, sort_keys=True) + "\n")
    save_file({n: t for n, t in saved.items() if is_moe(n)}, folder / "model.safetensors", {"format": "pt"})
    save_file({n: t.contiguous() for n, t in state.items() if is_moe(n)}, folder / "fused.safetensors")

    block = model.model.layers[1].mlp
    hidden = torch.randn(7, config.hidden_size)
    with torch.no_grad():
        router = block.router if family == "gpt_oss" else block.gate
        _, weights, ids = router(hidden)
        routing = torch.zeros(7, router.weight.shape[0]).scatter(1, ids, weights)
        output = block.experts(hidden, ids, weights)
    save_file(dict(hidden_states=hidden, routing=routing, output=output), folder / "expected.safetensors")


if __name__ == "__main__":
    here = Path(__file__).parent
    for family in sys.argv[1:] or FAMILIES:
        make(family, FAMILIES[family], here / family)
