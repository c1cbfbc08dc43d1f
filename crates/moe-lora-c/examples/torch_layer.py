#!/usr/bin/env python3
"""One layer with two adapters on PyTorch tensors, through the C library, checked against PyTorch.

    cargo build --release -p moe-lora-c && python3 crates/moe-lora-c/examples/torch_layer.py target/release/libmoe_lora_c.so
"""
import ctypes
import pathlib
import re
import sys

import torch

NUMBERS = {"uint64_t": ctypes.c_uint64, "uint32_t": ctypes.c_uint32, "int32_t": ctypes.c_int32, "float": ctypes.c_float}


def structs(header):
    """The header's structs as ctypes classes."""
    found = re.findall(r"typedef struct \{(.*?)\} (\w+);", header, re.S)
    field = re.compile(r"^\s*(uint64_t|uint32_t|int32_t|float) (\w+)(?:\[(\d+)\])?;", re.M)
    kind = lambda name, length: NUMBERS[name] * int(length) if length else NUMBERS[name]
    fields = lambda body: [(name, kind(number, length)) for number, name, length in field.findall(body)]
    return {name: type(name, (ctypes.Structure,), {"_fields_": fields(body)}) for body, name in found}


def open_library(path, header):
    """The library, and a function that calls it and raises its errors."""
    library = ctypes.CDLL(path)
    library.moe_lora_last_error.restype = ctypes.c_char_p
    library.moe_lora_forward_args_bytes.restype = ctypes.c_uint64
    assert library.moe_lora_forward_args_bytes() == ctypes.sizeof(structs(header)["moe_lora_forward_args"])

    def call(name, *args):
        if getattr(library, name)(*args):
            raise RuntimeError(library.moe_lora_last_error().decode())

    return call


def expected(hidden, ids, weights, slots, w13, w2, gate_up_a, gate_up_b, down_a, down_b, scales):
    """The layer in f64, token by token."""
    out = torch.zeros(hidden.shape, dtype=torch.float64, device=hidden.device)
    rank, inner = down_a.shape[2], w2.shape[2]
    for t in range(hidden.shape[0]):
        slot, x = int(slots[t]), hidden[t].double()
        for e, weight in zip(ids[t].tolist(), weights[t].tolist()):
            gate_up, down = w13[e].double(), w2[e].double()
            if slot >= 0:
                a, b = gate_up_a[slot, e].double(), gate_up_b[slot, e].double()
                change = torch.cat([b[:inner] @ a[:rank], b[inner:] @ a[rank:]])
                gate_up = gate_up + scales[slot] * change
                down = down + scales[slot] * down_b[slot, e].double() @ down_a[slot, e].double()
            gate, up = (gate_up @ x).chunk(2)
            out[t] += weight * (down @ (torch.nn.functional.silu(gate) * up))
    return out


def main():
    """Builds a random layer, runs it, and compares."""
    torch.manual_seed(1)
    header = (pathlib.Path(__file__).parent / "../include/moe_lora.h").read_text()
    types, call = structs(header), open_library(sys.argv[1], header)
    tokens, experts, top_k, width, inner, slots, rank = 48, 8, 2, 512, 256, 2, 16
    random = lambda *shape, std=1.0: (torch.randn(*shape, device="cuda") * std).bfloat16()
    hidden, ids = random(tokens, width), torch.rand(tokens, experts, device="cuda").topk(top_k).indices.int()
    weights = torch.rand(tokens, top_k, device="cuda")
    token_slots = torch.arange(tokens, device="cuda", dtype=torch.int32) % 3 - 1
    w13, w2 = random(experts, 2 * inner, width, std=width**-0.5), random(experts, width, inner, std=inner**-0.5)
    gate_up_a = random(slots, experts, 2 * rank, width, std=width**-0.5)
    gate_up_b = random(slots, experts, 2 * inner, rank, std=rank**-0.5)
    down_a = random(slots, experts, rank, inner, std=inner**-0.5)
    down_b = random(slots, experts, width, rank, std=rank**-0.5)
    scales, ranks = [0.5, 2.0], [rank, rank]

    buffers = [t.data_ptr() for t in (gate_up_a, gate_up_b, down_a, down_b)]
    buffers = types["moe_lora_slot_buffers"](*buffers, rank, 0)
    entries = (types["moe_lora_adapter_entry"] * (slots * experts * 3))()
    ranks, c_scales = (ctypes.c_uint32 * slots)(*ranks), (ctypes.c_float * slots)(*scales)
    call("moe_lora_slot_entries", ctypes.byref(buffers), experts, width, inner, slots, ranks, c_scales, entries)
    table = torch.frombuffer(bytearray(entries), dtype=torch.uint8).cuda()

    context = ctypes.c_void_p()
    call("moe_lora_open", 0, ctypes.byref(context))
    out = torch.full_like(hidden, torch.nan)
    args = types["moe_lora_forward_args"](
        hidden=hidden.data_ptr(), topk_ids=ids.data_ptr(), topk_weights=weights.data_ptr(),
        token_slots=token_slots.data_ptr(), gate=w13.data_ptr(), up=w13[0, inner:].data_ptr(), down=w2.data_ptr(),
        adapters=table.data_ptr(), out=out.data_ptr(), gate_up_expert_stride=2 * inner * width,
        down_expert_stride=inner * width, gate_up_row_stride=width, down_row_stride=inner, num_tokens=tokens,
        num_experts=experts, top_k=top_k, hidden_size=width, intermediate_size=inner, num_slots=slots, max_rank=rank,
        scaling=1.0,
    )
    size = ctypes.c_uint64()
    call("moe_lora_workspace_bytes", context, ctypes.byref(args), ctypes.byref(size))
    workspace = torch.full((size.value,), 255, dtype=torch.uint8, device="cuda")
    args.workspace, args.workspace_bytes = workspace.data_ptr(), size.value

    def forward():
        args.stream = torch.cuda.current_stream().cuda_stream
        call("moe_lora_forward", context, ctypes.byref(args))

    forward()
    first = out.clone()
    want = expected(hidden, ids, weights, token_slots, w13, w2, gate_up_a, gate_up_b, down_a, down_b, scales)
    error = float((first.double() - want).norm() / want.norm())
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        forward()
    out.fill_(torch.nan)
    graph.replay()
    same = torch.equal(out, first)
    torch.cuda.synchronize()
    call_failed = None
    try:
        args.hidden += 2
        forward()
    except RuntimeError as why:
        call_failed = str(why)
    ctypes.CDLL(sys.argv[1]).moe_lora_close(context)
    print(f"relative error {error:.2e}, graph replay {'same bits' if same else 'DIFFERS'}, refusal: {call_failed}")
    return 0 if error <= 3e-3 and same and call_failed and call_failed.startswith("hidden") else 1


if __name__ == "__main__":
    sys.exit(main())
