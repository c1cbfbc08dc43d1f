"""SGLang 0.5.23 with `--lora-backend triton_v2 --moe-runner-backend lora_cutedsl`, its fastest for bf16 on Hopper."""

from sglang_0523 import PACKAGE, engine, lora, phases  # noqa: F401

NAME = "SGLang 0.5.23 cutedsl"


def prepare(d, lora, phase, with_lora=lora):
    """A function that runs the layer and returns its output."""
    return with_lora(d, "cutedsl", phase) if lora else engine(d, "cutedsl", phase)
