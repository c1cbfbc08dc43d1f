"""moe-lora through its C library, on the same tensors as everybody: MOE_LORA_LIB names libmoe_lora_c.so and MOE_LORA_HEADER
moe_lora.h where they do not lie beside this folder, in ../lib and ../lib."""
import ctypes
import os
import pathlib
import re

import torch

NAME = "moe-lora"
NUMBERS = {"uint64_t": ctypes.c_uint64, "uint32_t": ctypes.c_uint32, "int32_t": ctypes.c_int32, "float": ctypes.c_float}
BESIDE = pathlib.Path(__file__).parent / "../lib"
HEADER = pathlib.Path(os.environ.get("MOE_LORA_HEADER", BESIDE / "moe_lora.h")).read_text()
LIBRARY = ctypes.CDLL(os.environ.get("MOE_LORA_LIB", str(BESIDE / "libmoe_lora_c.so")))
LIBRARY.moe_lora_last_error.restype = ctypes.c_char_p


def struct(name):
    """One of the header's structs."""
    body = re.search(r"typedef struct \{([^}]*)\} " + name + ";", HEADER).group(1)
    fields = re.findall(r"^\s*(uint64_t|uint32_t|int32_t|float) (\w+);", body, re.M)
    return type(name, (ctypes.Structure,), {"_fields_": [(field, NUMBERS[number]) for number, field in fields]})


ARGS, BUFFERS, ENTRY = (struct("moe_lora_" + n) for n in ("forward_args", "slot_buffers", "adapter_entry"))


def call(name, *args):
    """Calls the library and raises what it complains about."""
    if getattr(LIBRARY, name)(*args):
        raise RuntimeError(LIBRARY.moe_lora_last_error().decode())


CONTEXT = ctypes.c_void_p()
call("moe_lora_open", 0, ctypes.byref(CONTEXT))


def table(d):
    """The adapters' entries in GPU memory."""
    slots = d["L"]
    buffers = BUFFERS(*(d[n].data_ptr() for n in ("a13", "b13", "a2", "b2")), d["R"], 0)
    entries = (ENTRY * (slots * d["E"] * 3))()
    ranks, scales = (ctypes.c_uint32 * slots)(*[d["R"]] * slots), (ctypes.c_float * slots)(*[1.0] * slots)
    call("moe_lora_slot_entries", ctypes.byref(buffers), d["E"], d["H"], d["I"], slots, ranks, scales, entries)
    return torch.frombuffer(bytearray(entries), dtype=torch.uint8).cuda()


def prepare(d, lora):
    """A function that runs the layer and returns its output."""
    out = torch.full_like(d["x"], torch.nan)
    entries = table(d) if lora else None
    args = ARGS(
        hidden=d["x"].data_ptr(),
        topk_ids=d["topk_ids"].data_ptr(),
        topk_weights=d["topk_w"].data_ptr(),
        token_slots=d["slot"].data_ptr(),
        gate=d["w13"].data_ptr(),
        up=d["w13"][0, d["I"] :].data_ptr(),
        down=d["w2"].data_ptr(),
        adapters=entries.data_ptr() if lora else 0,
        out=out.data_ptr(),
        gate_up_expert_stride=2 * d["I"] * d["H"],
        down_expert_stride=d["H"] * d["I"],
        gate_up_row_stride=d["H"],
        down_row_stride=d["I"],
        num_tokens=d["T"],
        num_experts=d["E"],
        top_k=d["k"],
        hidden_size=d["H"],
        intermediate_size=d["I"],
        num_slots=d["L"] if lora else 0,
        max_rank=d["R"] if lora else 0,
        scaling=1.0,
    )
    size = ctypes.c_uint64()
    call("moe_lora_workspace_bytes", CONTEXT, ctypes.byref(args), ctypes.byref(size))
    workspace = torch.full((size.value,), 255, dtype=torch.uint8, device="cuda")
    args.workspace, args.workspace_bytes = workspace.data_ptr(), size.value

    def forward(keep=(d, entries, workspace)):
        args.stream = torch.cuda.current_stream().cuda_stream
        call("moe_lora_forward", CONTEXT, ctypes.byref(args))
        return out

    return forward
