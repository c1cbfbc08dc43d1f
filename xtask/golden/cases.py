"""The cases: a checkpoint, a layer, and a batch in which every token has its own adapter."""

from dataclasses import dataclass

import torch

from families import generator
from truth import f64, route

MARGIN = 2e-3  # least distance of a choice of the router from any other choice


@dataclass
class Case:
    name: str
    checkpoint: str
    layer: int
    adapters: list
    tokens: int = 14
    dtype: torch.dtype = torch.float32
    # Adapters whose shapes fit two readings, which neither file nor version decides: the right one.
    ambiguous: dict | None = None


def names(checkpoint, *adapters):
    return [f"{checkpoint}-{a}" for a in adapters]


CASES = [
    Case("mixtral", "mixtral", 0,
         names("mixtral", "old-attention", "new-both", "new-resaved-plain", "peft018-both"), 16),
    Case("mixtral-layer1", "mixtral", 1, names("mixtral", "old-plain", "peft018-both", "new-resaved-plain")),
    Case("mixtral-sharded", "mixtral-sharded", 1, names("mixtral", "old-plain", "new-both", "new-resaved-plain")),
    Case("qwen2_moe", "qwen2_moe", 1, names("qwen2_moe", "old-rslora", "old-patterns", "new-patterns")),
    Case("qwen2_moe-layer3", "qwen2_moe", 3, names("qwen2_moe", "old-patterns", "new-patterns")),
    Case("qwen2_moe-f16", "qwen2_moe-f16", 3, names("qwen2_moe", "new-patterns", "new-down"), dtype=torch.float16),
    Case("qwen3_moe", "qwen3_moe", 0, names("qwen3_moe", "old-down", "old-gate-up", "new-gate-up", "new-down"), 16),
    Case("qwen3_moe-layer2", "qwen3_moe", 2, names("qwen3_moe", "old-up-layer2", "new-layer2", "new-down")),
    # The first two adapters change the other layer only, the third four of eight experts.
    Case("qwen3_moe-partial", "qwen3_moe", 0,
         names("qwen3_moe", "old-up-layer2", "new-layer2", "old-some-experts")),
    Case("qwen3_moe-bf16", "qwen3_moe-bf16", 0, names("qwen3_moe", "new-gate-up", "new-down"), dtype=torch.bfloat16),
    Case("olmoe", "olmoe", 0, names("olmoe", "old-plain", "new-both", "peft018-both")),
    Case("olmoe-rslora", "olmoe", 1, names("olmoe", "old-rslora", "new-resaved-rslora", "new-both")),
    Case("olmoe-onesided", "olmoe", 1, names("olmoe", "new-gate-up", "new-down", "peft018-gate-up")),
    Case("olmoe-fused", "olmoe-fused", 1, names("olmoe", "old-plain", "new-both"), 12),
    Case("deepseek_v2", "deepseek_v2", 1, names("deepseek_v2", "old-everywhere", "new-both")),
    Case("deepseek_v2-greedy", "deepseek_v2-greedy", 2, names("deepseek_v2", "old-everywhere", "new-both"), 12),
    Case("deepseek_v3", "deepseek_v3", 2, names("deepseek_v3", "old-plain", "new-both", "peft018-down"), 16),
    Case("deepseek_v3-sharded", "deepseek_v3-sharded", 1, names("deepseek_v3", "new-both", "new-gate-up"), 12),
    Case("deepseek_v3-bf16", "deepseek_v3-bf16", 1, names("deepseek_v3", "new-both", "new-gate-up"), 12,
         dtype=torch.bfloat16),
    Case("gpt_oss", "gpt_oss", 0, names("gpt_oss", "old-both", "new-both", "peft019-both")),
    Case("gpt_oss-onesided", "gpt_oss", 1, names("gpt_oss", "old-gate-up", "new-gate-up", "old-down")),
    Case("gpt_oss-ambiguous", "gpt_oss", 1, names("gpt_oss", "new-down", "peft019-down"), 12,
         ambiguous={"gpt_oss-new-down": "direct", "gpt_oss-peft019-down": "transposed"}),
    Case("gpt_oss-bf16", "gpt_oss-bf16", 0, names("gpt_oss", "new-both", "new-gate-up"), dtype=torch.bfloat16),
]


def draw_hidden(case, config, router):
    """Hidden states whose routing nobody can dispute, all experts in use; for DeepSeek half of them are tokens whose
    choice the group limit or the correction bias changed."""
    x = torch.randn(4096, config.hidden_size, generator=generator("hidden", case.name)).to(case.dtype).float()
    ids, _, gap, changed, stable = route(config, router, f64(x))
    good = [t for t in range(len(x)) if gap[t] > MARGIN and stable[t]]
    assert len(good) > 200, f"{case.name}: {len(good)} tokens with a clear choice"
    if changed[good].any():
        some = [t for t in good if changed[t]][: case.tokens // 2]
        good = some + [t for t in good if not changed[t]]
    chosen = good[: case.tokens]
    experts = len(router[0])
    for t in good[case.tokens:]:
        used = {e for u in chosen for e in ids[u]}
        if len(used) == experts:
            break
        if any(e not in used for e in ids[t]):
            chosen[-1 - len(used) % 3] = t
    assert {e for u in chosen for e in ids[u]} == set(range(experts)), case.name
    return x[chosen]


def adapter_index(case):
    """Base and every adapter about equally often, in random order, the first token on the last adapter."""
    n = len(case.adapters)
    index = torch.arange(case.tokens) % (n + 1) - 1
    index = index[torch.randperm(case.tokens, generator=generator("index", case.name))]
    first = int((index == n - 1).nonzero()[0])
    index[[0, first]] = index[[first, 0]]
    return index.to(torch.int32)
