"""The adapters: what each one targets, and how PEFT makes it.

`get_peft_model` builds the adapter, A and B are then drawn (PEFT starts B at zero), and `save_pretrained` writes the files.
Nothing here names a tensor or knows a layout.
"""

import shutil
from dataclasses import dataclass, field

import torch

from families import generator, load_model

BOTH = ["experts.gate_up_proj", "experts.down_proj"]
GATE_UP, DOWN = BOTH[:1], BOTH[1:]
EXPERTS = r".*\.experts\.\d+\.(gate|up|down)_proj"  # PEFT takes a string as a regular expression


@dataclass
class Adapter:
    stage: str
    checkpoint: str
    name: str
    config: dict = field(default_factory=dict)
    dtype: torch.dtype = torch.float32
    resaved_from: str = ""


def old(checkpoint, name, dtype=torch.float32, **config):
    return Adapter("old", checkpoint, f"{checkpoint}-old-{name}", config, dtype)


def param(stage, checkpoint, name, parameters, dtype=torch.float32, modules=(), **config):
    config |= dict(target_parameters=parameters, target_modules=list(modules))
    return Adapter(stage, checkpoint, f"{checkpoint}-{stage}-{name}", config, dtype)


def resaved(source):
    checkpoint, what = source.split("-old-")
    return Adapter("new", checkpoint, f"{checkpoint}-new-resaved-{what}", resaved_from=source)


W123, GUD = ["w1", "w2", "w3"], ["gate_proj", "up_proj", "down_proj"]
ADAPTERS = [
    # One module an expert (transformers 4).
    old("mixtral", "plain", r=3, lora_alpha=6, target_modules=W123),
    old("mixtral", "attention", r=4, lora_alpha=8, lora_dropout=0.05, target_modules=[*W123, "q_proj", "v_proj"]),
    old("qwen2_moe", "rslora", r=4, lora_alpha=8, use_rslora=True, target_modules=EXPERTS),
    old(
        "qwen2_moe",
        "patterns",
        r=4,
        lora_alpha=8,
        target_modules=EXPERTS,
        # The first key that matches wins: the second one changes nothing. PEFT sorts the keys when it saves, so patterns
        # that overlap in another order come out as files that PEFT itself cannot load.
        rank_pattern={
            "experts.0.gate_proj": 3,
            "layers.3.mlp.experts.0.gate_proj": 5,
            "experts.1.down_proj": 16,
            r"experts\.[23]\.up_proj": 8,
            "model.layers.1.mlp.experts.4.up_proj": 1,
        },
        alpha_pattern={"experts.0.gate_proj": 9, "down_proj": 24, r"layers\.3\..*\.up_proj": 3.5},
    ),
    old("qwen3_moe", "down", r=5, lora_alpha=10, target_modules=["down_proj"]),  # the dense layer's too
    old(
        "qwen3_moe",
        "gate-up",
        torch.float16,
        r=4,
        lora_alpha=16,
        target_modules=r".*\.experts\.\d+\.(gate|up)_proj",
    ),
    old(
        "qwen3_moe",
        "up-layer2",
        r=7,
        lora_alpha=7,
        target_modules=["up_proj"],
        layers_to_transform=[2],
        layers_pattern="layers",
    ),
    # Without layers_pattern PEFT takes the last number of the path: experts 1, 2, 5 and 6 of every layer.
    old("qwen3_moe", "some-experts", r=3, lora_alpha=9, target_modules=GUD, layers_to_transform=[1, 2, 5, 6]),
    old("olmoe", "plain", torch.bfloat16, r=4, lora_alpha=8, target_modules=GUD),
    old("olmoe", "rslora", r=3, lora_alpha=5, use_rslora=True, target_modules=GUD),
    # Dense layer, shared experts and attention are targeted too.
    old("deepseek_v2", "everywhere", r=2, lora_alpha=4, target_modules=[*GUD, "q_b_proj", "kv_b_proj", "o_proj"]),
    old("deepseek_v3", "plain", r=4, lora_alpha=6, target_modules=EXPERTS),
    # gpt-oss has fused parameters in transformers 4 too.
    param("old", "gpt_oss", "both", BOTH, r=4, lora_alpha=8),
    param("old", "gpt_oss", "gate-up", GATE_UP, r=3, lora_alpha=9),
    param("old", "gpt_oss", "down", DOWN, r=3, lora_alpha=9),
    # PEFT 0.18.1 and 0.19.0 on transformers 5: the other orientations. (0.19.0 lays Mixtral out as 0.18.1 does, and cannot
    # load it with this transformers.)
    param("peft018", "mixtral", "both", BOTH, r=3, lora_alpha=12),
    param("peft018", "olmoe", "both", BOTH, r=4, lora_alpha=4),
    param("peft018", "olmoe", "gate-up", GATE_UP, r=3, lora_alpha=3),
    param("peft018", "deepseek_v3", "down", DOWN, r=5, lora_alpha=10),
    param("peft019", "gpt_oss", "both", BOTH, r=3, lora_alpha=6),
    param("peft019", "gpt_oss", "down", DOWN, r=4, lora_alpha=6),
    # PEFT 0.21 on transformers 5.
    param("new", "mixtral", "both", BOTH, r=3, lora_alpha=12, task_type="CAUSAL_LM"),
    param(
        "new",
        "qwen2_moe",
        "patterns",
        BOTH,
        r=6,
        lora_alpha=9,
        rank_pattern={"layers.3.mlp.experts.down_proj": 16, "gate_up_proj": 5},
        alpha_pattern={r"layers\.1\..*gate_up_proj": 20, "experts.down_proj": 3},
    ),
    param("new", "qwen2_moe", "down", DOWN, r=2, lora_alpha=3),
    param("new", "qwen3_moe", "gate-up", GATE_UP, r=4, lora_alpha=8),
    param("new", "qwen3_moe", "down", DOWN, torch.bfloat16, r=4, lora_alpha=8),
    param("new", "qwen3_moe", "layer2", [f"layers.2.mlp.{p}" for p in BOTH], r=3, lora_alpha=6, use_rslora=True),
    param("new", "olmoe", "both", BOTH, r=4, lora_alpha=4, use_rslora=True),
    param("new", "olmoe", "gate-up", GATE_UP, r=3, lora_alpha=3),
    param("new", "olmoe", "down", DOWN, r=3, lora_alpha=3),
    param("new", "deepseek_v2", "both", BOTH, modules=["q_a_proj", "o_proj"], r=3, lora_alpha=6),
    param("new", "deepseek_v3", "both", BOTH, torch.float16, r=3, lora_alpha=6),
    param("new", "deepseek_v3", "gate-up", GATE_UP, r=4, lora_alpha=2),
    param("new", "gpt_oss", "both", BOTH, modules=["q_proj", "v_proj"], r=4, lora_alpha=8),
    param("new", "gpt_oss", "gate-up", GATE_UP, r=3, lora_alpha=9),
    param("new", "gpt_oss", "down", DOWN, r=3, lora_alpha=9),
    # Adapters of single experts, loaded and saved again by PEFT 0.21: gate and up fused, B block-diagonal.
    resaved("mixtral-old-plain"),
    resaved("olmoe-old-rslora"),
]


def make(adapter, out):
    """Writes `out/adapters/<name>`."""
    from peft import LoraConfig, PeftModel, get_peft_model

    model = load_model(out / "checkpoints" / adapter.checkpoint)
    if adapter.resaved_from:
        model = PeftModel.from_pretrained(model, out / "adapters" / adapter.resaved_from)
    else:
        model = get_peft_model(model, LoraConfig(init_lora_weights=True, **adapter.config))
        draw(model, adapter.name)
        for name, p in model.named_parameters():
            if "lora_" in name:
                p.data = p.data.to(adapter.dtype)
    directory = out / "adapters" / adapter.name
    shutil.rmtree(directory, ignore_errors=True)
    model.save_pretrained(directory, save_embedding_layers=False)
    (directory / "README.md").unlink()  # a model card without content


@torch.no_grad()
def draw(model, name):
    """Draws A and B, signed; B is scaled so that the change has 0.7 of the norm of the weight that it changes."""
    for path, module in model.named_modules():
        if "default" not in getattr(module, "lora_A", {}):
            continue
        a, b = module.lora_A["default"].weight, module.lora_B["default"].weight
        a.copy_(torch.randn(a.shape, generator=generator(name, path, "A")) / a.shape[1] ** 0.5)
        b.copy_(torch.randn(b.shape, generator=generator(name, path, "B")))
        base = module.get_param() if hasattr(module, "get_param") else module.get_base_layer().weight
        b.mul_(0.7 * base.norm() / module.get_delta_weight("default").norm())


def load(adapter_name, checkpoint, out):
    """A fresh base model with the adapter, both read from their files by Hugging Face's own loaders."""
    from peft import PeftModel

    model = PeftModel.from_pretrained(load_model(out / "checkpoints" / checkpoint), out / "adapters" / adapter_name)
    assert not any(p.abs().max() == 0 for n, p in model.named_parameters() if "lora_B" in n), adapter_name
    return model.eval()
