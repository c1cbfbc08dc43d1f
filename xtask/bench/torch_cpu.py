"""Times transformers' OLMoE layer on this processor in bf16: the base model alone, and with four PEFT adapters.

Prints JSON: {"<tokens>": {"base_us": ..., "peft_us": ...}}. With PEFT each adapter's tokens run as a batch of their own, as
PEFT has one active adapter at a time; a fifth of the tokens uses none.
"""
import json
import sys
import time

import torch
from peft import LoraConfig, get_peft_model
from transformers import OlmoeConfig
from transformers.models.olmoe.modeling_olmoe import OlmoeSparseMoeBlock

TOKENS = [1, 16, 256]


class Layer(torch.nn.Module):
    """The block under the name that PEFT's target_parameters look for."""

    def __init__(self, config):
        super().__init__()
        self.mlp = OlmoeSparseMoeBlock(config)

    def forward(self, hidden):
        return self.mlp(hidden)


def median_us(run):
    """Median of at least five runs over at least two seconds, after one warm-up."""
    run()
    times = []
    while len(times) < 5 or sum(times) < 2:
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
        if sum(times) > 20:
            break
    return sorted(times)[len(times) // 2] * 1e6


def main():
    torch.manual_seed(0)
    config = OlmoeConfig(hidden_size=2048, intermediate_size=1024, num_experts=64, num_experts_per_tok=8)
    layer = Layer(config).to(torch.bfloat16).eval()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_(std=parameter.shape[-1] ** -0.5)
        rows = {str(t): {"base_us": fastest_base(layer, config, hidden(t))} for t in TOKENS}
        peft = with_adapters(layer)
        for tokens in TOKENS:
            rows[str(tokens)]["peft_us"] = median_us(lambda h=hidden(tokens): mixed(peft, h))
    json.dump(rows, sys.stdout)


def fastest_base(layer, config, h):
    """The better of transformers' two ways to run experts on a processor: grouped products, or a loop over experts."""
    times = []
    for implementation in ["grouped_mm", "eager"]:
        config._experts_implementation = implementation
        times.append(median_us(lambda: layer(h)))
        print(f"T={h.shape[1]} {implementation}: {times[-1]:.0f} us", file=sys.stderr)
    return min(times)


def hidden(tokens):
    return torch.randn(1, tokens, 2048).to(torch.bfloat16)


def with_adapters(layer):
    config = LoraConfig(r=16, lora_alpha=16, target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"])
    model = get_peft_model(layer, config, adapter_name="0")
    for name in ["1", "2", "3"]:
        model.add_adapter(name, config)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.normal_(std=0.02).to(torch.bfloat16)
    return model.eval()


def mixed(model, h):
    """Token t uses adapter t % 5 - 1, or the base model if that is -1."""
    for adapter in range(4):
        part = h[:, adapter + 1 :: 5] if h.shape[1] > 1 else h[:, : int(adapter == 0)]
        if part.shape[1]:
            model.set_adapter(str(adapter))
            model(part)
    if h.shape[1] > 1:
        with model.disable_adapter():
            model(h[:, ::5])


main()
