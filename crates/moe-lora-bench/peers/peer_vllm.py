"""vLLM 0.33: its fused MoE layer with LoRA, from its package (`prepare.py FOLDER vllm`).

The kernels, their launch settings and the align library are the package's own files, called in the order of its
TritonExperts.apply with PunicaWrapperGPU's LoRA; only silu_and_mul, which lies in a library of 500 MB, is a Triton kernel here.
Base tokens are slot -1; as in its default graphs the grids cover all slots and one more.
"""
import ctypes
import logging
import types

import torch
import triton
import triton.language as tl

from stand_ins import Package

NAME = "vLLM 0.33"
PACKAGE = Package("vllm", "vllm")
ctypes.CDLL(str(PACKAGE.folder / "vllm/_moe_C_stable_libtorch.abi3.so"), mode=ctypes.RTLD_GLOBAL)
OPS = torch.ops._moe_C


class Environment(types.ModuleType):
    """vllm.envs without anything set."""

    def __getattr__(self, name):
        if name in ("VLLM_TUNED_CONFIG_FOLDER", "VLLM_TRITON_USE_TD"):
            return None
        if name.startswith("VLLM_"):
            return False
        raise AttributeError(name)


class Logger(logging.Logger):
    """vLLM's loggers have three more methods."""

    def info_once(self, *_, **__):
        """Says nothing."""

    warning_once = debug_once = info_once


class Platform:
    """vllm.platforms.current_platform on one NVIDIA GPU."""

    dispatch_key, device_type = "CUDA", "cuda"
    is_cuda = is_cuda_alike = lambda self: True
    is_xpu = is_rocm = lambda self: False

    def is_device_capability(self, capability):
        """As a two-digit number."""
        major, minor = torch.cuda.get_device_capability()
        return 10 * major + minor == capability

    def has_device_capability(self, capability):
        """Or newer."""
        major, minor = torch.cuda.get_device_capability()
        return 10 * major + minor >= capability

    def num_compute_units(self, index=0):
        """SMs."""
        return torch.cuda.get_device_properties(index or 0).multi_processor_count

    def fp8_dtype(self):
        """Unused by bf16 layers."""
        return torch.float8_e4m3fn


@triton.jit
def silu_mul_kernel(x, y, width, BLOCK: tl.constexpr):
    """Row by row: silu of the first half times the second."""
    row, col = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    gate = tl.load(x + row * 2 * width + col, mask=col < width, other=0.0).to(tl.float32)
    up = tl.load(x + row * 2 * width + width + col, mask=col < width, other=0.0).to(tl.float32)
    tl.store(y + row * width + col, (gate / (1 + tl.exp(-gate)) * up).to(y.dtype.element_ty), mask=col < width)


def load():
    """The package's modules that the layer calls."""
    package = PACKAGE
    nothing = lambda *_, **__: None
    platform = Platform()
    package.place("vllm.envs", Environment("vllm.envs"))
    package.stand_in("vllm.logger", init_logger=Logger)
    package.stand_in("vllm.platforms", current_platform=platform)
    same = lambda x: x
    package.stand_in(
        "vllm.distributed", tensor_model_parallel_all_gather=same, tensor_model_parallel_all_reduce=same
    )
    package.stand_in("vllm.triton_utils", tl=tl, triton=triton, HAS_TRITON=True)
    scratch = lambda size, alignment, stream: torch.empty(size, device="cuda", dtype=torch.int8)
    package.stand_in("vllm.triton_utils.allocation", set_triton_allocator=lambda device: triton.set_allocator(scratch))
    shared = torch.cuda.get_device_properties(0).shared_memory_per_block_optin
    package.stand_in("vllm.utils.mem_utils", get_max_shared_memory_bytes=lambda index=0: shared)
    to_device = lambda data, device=None, dtype=None, out=None: torch.tensor(data, dtype=dtype).to(device)
    package.stand_in("vllm.utils.torch_utils", async_tensor_h2d=to_device, direct_register_custom_op=nothing)
    package.stand_in(
        "vllm.utils.math_utils",
        next_power_of_2=triton.next_power_of_2,
        cdiv=triton.cdiv,
        round_up=lambda x, step: (x + step - 1) // step * step,
    )
    device_name = lambda: torch.cuda.get_device_name().replace(" ", "_")
    package.stand_in("vllm.utils.platform_utils", get_device_name_as_file_name=device_name)
    package.stand_in(
        "vllm._custom_ops",
        moe_align_block_size=OPS.moe_align_block_size,
        moe_lora_align_block_size=OPS.moe_lora_align_block_size,
        moe_sum=OPS.moe_sum,
    )
    moe = "vllm.model_executor.layers.fused_moe"
    package.stand_in(moe, get_config=nothing)
    package.stand_in(f"{moe}.modular_kernel")
    package.stand_in(
        f"{moe}.activation", MoEActivation=types.SimpleNamespace(SILU="silu"), apply_moe_activation=None
    )
    package.stand_in(
        f"{moe}.config",
        FUSED_MOE_UNQUANTIZED_CONFIG=None,
        FusedMoEQuantConfig=type("FusedMoEQuantConfig", (), {}),
        _get_config_dtype_str=nothing,
    )
    package.stand_in(
        f"{moe}.utils",
        enable_swap_ab=lambda m, n: platform.is_device_capability(90) and m < 64 <= n,
        moe_kernel_quantize_input=nothing,
        resolve_moe_use_td=lambda: False,
        warn_if_moe_use_td_ineffective=nothing,
    )
    package.real(f"{moe}.moe_align_block_size")
    fused_moe = package.real(f"{moe}.fused_moe")
    package.stand_in("vllm.lora.ops.triton_ops")
    names = package.real("vllm.lora.ops.triton_ops.utils")
    lora = package.real("vllm.lora.ops.triton_ops.fused_moe_lora_op")
    return fused_moe, names, lora, package.real("vllm.lora.layers.utils")


with PACKAGE.alone():
    FUSED_MOE, NAMES, LORA, LAYERS = load()
SLICES = {}


def slices(d):
    """Gate's and up's adapters apart, as vLLM keeps them; made once for each set."""
    if SLICES.get("of") is not d["a13"]:
        SLICES.clear()
        parts = lambda t, n: [t[:, :, :n].contiguous(), t[:, :, n:].contiguous()]
        SLICES.update(of=d["a13"], a13=parts(d["a13"], d["R"]), b13=parts(d["b13"], d["I"]))
    return SLICES["a13"], SLICES["b13"]


def lora_settings(d, op):
    """vLLM's launch settings of one LoRA kernel."""
    found = LAYERS.try_get_optimal_moe_lora_config(op, d["w13"].shape, d["w2"].shape, d["R"], d["k"], None, d["T"])
    return NAMES._normalize_lora_config_keys(found)


def launch_words(settings):
    """As fused_moe_lora takes them."""
    sizes = [settings[f"BLOCK_SIZE_{x}"] for x in "MNK"] + [settings["GROUP_SIZE_M"]]
    return *sizes, settings.get("NUM_WARPS", 4), settings.get("NUM_STAGES", 3), settings.get("SPLIT_K", 1)


def lora_align(d, block, lora_ids, enabled):
    """The rows of every (adapter, expert), or the plain ids where few tokens need no sorting."""
    pairs, E, most = d["T"] * d["k"], d["E"], d["L"]
    if pairs * 8 <= E * most:
        return None, d["topk_ids"].reshape(-1), None
    padded = pairs * block if pairs < E else pairs + E * (block - 1)
    blocks = triton.cdiv(padded, block)
    integers = dict(dtype=torch.int32, device="cuda")
    rows = torch.empty(most * padded, **integers)
    experts = torch.full((most * blocks,), -1, **integers)
    counts = torch.empty(most, **integers)
    OPS.moe_lora_align_block_size(
        d["topk_ids"], d["slot"], E, block, most, padded, blocks, rows, experts, counts, enabled, lora_ids, None
    )
    return rows.view(most, -1), experts.view(most, -1), counts


def prepare(d, lora):
    """A function that runs the layer and returns its output."""
    T, k, E, H, I = d["T"], d["k"], d["E"], d["H"], d["I"]
    a13, b13 = slices(d)
    used = torch.unique(d["slot"].cpu(), sorted=True).int()
    lora_ids = torch.full((d["L"] + 1,), -1, dtype=torch.int32)
    lora_ids[: used.numel()] = used
    lora_ids, active = lora_ids.cuda(), torch.tensor([d["L"] + 1], dtype=torch.int32)
    enabled = torch.ones(d["L"] + 1, dtype=torch.int32, device="cuda")
    plain = dict(use_fp8_w8a8=False, use_int8_w8a8=False, use_int8_w8a16=False, use_int4_w4a16=False)
    plain.update(per_channel_quant=False, compute_type=tl.bfloat16)
    config = FUSED_MOE.try_get_optimal_moe_config(d["w13"].size(), d["w2"].size(), k, None, T)
    add = dict(ids=lora_ids, active=active, enabled=enabled)

    def add_lora(to, x, a, b, aligned, op, weighted):
        shrink, expand = (launch_words(lora_settings(d, f"fused_moe_lora_{op}_{part}")) for part in ("shrink", "expand"))
        LORA.fused_moe_lora(
            to, x, a, b, d["topk_w"], *aligned, d["slot"], d["R"], k, add["ids"], add["active"], add["enabled"],
            *shrink, *expand, weighted, False, 0, True,
        )  # fmt: skip

    def forward():
        x, make = d["x"], lambda *shape: torch.empty(*shape, dtype=torch.bfloat16, device="cuda")
        gate_up, inner, rows, out = make(T, k, 2 * I), make(T * k, I), make(T, k, H), make(T, H)
        sorted_ids, expert_ids, count = FUSED_MOE._prepare_expert_assignment(d["topk_ids"], config, T, k, E, None)
        FUSED_MOE.invoke_fused_moe_triton_kernel(
            x, d["w13"], gate_up, None, None, None, sorted_ids, expert_ids, count, False, k, config, **plain
        )
        if lora:
            block = lora_settings(d, "fused_moe_lora_w13_shrink")["BLOCK_SIZE_M"]
            aligned = lora_align(d, block, lora_ids, enabled)
            add_lora(gate_up, x, a13, b13, aligned, "w13", False)
        silu_mul_kernel[(T * k, triton.cdiv(I, 1024))](gate_up, inner, I, BLOCK=1024)
        FUSED_MOE.invoke_fused_moe_triton_kernel(
            inner, d["w2"], rows, None, None, d["topk_w"], sorted_ids, expert_ids, count, True, 1, config, **plain
        )
        if lora:
            add_lora(rows, inner, [d["a2"]], [d["b2"]], aligned, "w2", True)
        OPS.moe_sum(rows, out, None, None)
        return out

    return forward
