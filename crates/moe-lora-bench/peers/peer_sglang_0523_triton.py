"""SGLang 0.5.23 with `--lora-backend triton_v2 --moe-runner-backend lora_triton`."""

from sglang_0523 import PACKAGE, engine, fused, lora, phases  # noqa: F401

NAME = "SGLang 0.5.23 triton"


def prepare(d, lora, phase, with_lora=lora):
    """A function that runs the layer and returns its output."""
    return with_lora(d, "triton", phase) if lora else fused(d)


def prepare_base_alt(d, phase):
    """The engine without LoRA."""
    return engine(d, "triton", phase)
