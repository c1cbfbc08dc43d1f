"""SGLang 0.5.10, the first release that has LoRA on experts: TritonRunnerCoreWithLoRA, one layer as FusedMoEWithLoRA.forward runs
it in a decode graph. Timed: adapter_enabled (rebuilt in every layer), align, base GEMMs, LoRA align, shrink and expand, activation,
sum over k. Scratch is allocated before, as its graphs do.

Base tokens: the base model is one more slot with zero weights, as it has no -1. Its align walks the segments one after another:
one for each token up to T = 64 (decode); above, the batch is in the order of the adapters (few long prompts). Without LoRA:
fused_experts_impl. Stand-ins for its closed library: align and activation are 0.5.23's CUDA kernels, the sum over k is its own
Triton twin.
"""
import importlib

import torch
import torch._dynamo

from cuda_modules import Common, loader
from sglang_stand_ins import direct, no, nothing, object_of, settings
from stand_ins import Package

NAME = "SGLang 0.5.10"
PACKAGE = Package("sglang_0510", "sglang", "sgl_kernel")
SERVER = "sglang.srt"
MOE = f"{SERVER}.layers.moe"
# Up to 32 tokens it sums over k with torch.compile: one program for each shape.
torch._dynamo.config.automatic_dynamic_shapes = False
torch._dynamo.config.recompile_limit = 64


def load():
    """The package's modules that the layer calls."""
    package, common = PACKAGE, Common()
    package.folders(
        *("sglang", SERVER, f"{SERVER}.layers", MOE, f"{MOE}.moe_runner", f"{MOE}.fused_moe_triton", f"{SERVER}.lora"),
        *(f"{SERVER}.lora.triton_ops", "sglang.jit_kernel", f"{SERVER}.layers.quantization"),
    )
    utils = settings()
    package.stand_in(f"{SERVER}.utils", **utils)
    package.stand_in(f"{SERVER}.utils.common", **utils)
    package.stand_in(f"{SERVER}.utils.custom_op", register_custom_op=direct, register_custom_op_from_extern=direct)
    package.stand_in("sglang.utils", is_in_ci=no)
    package.stand_in(
        f"{SERVER}.distributed", tensor_model_parallel_all_gather=None, tensor_model_parallel_all_reduce=None
    )
    package.stand_in(f"{SERVER}.model_executor.cuda_graph_runner", get_is_capture_mode=lambda: True)
    package.stand_in(f"{SERVER}.batch_invariant_ops", is_batch_invariant_mode_enabled=no)
    server = object_of(enable_deterministic_inference=False, enable_fused_moe_sum_all_reduce=False)
    package.stand_in(f"{SERVER}.server_args", get_global_server_args=lambda: server)
    package.stand_in(
        f"{MOE}.utils",
        MoeA2ABackend=lambda name: name,
        RoutingMethodType=object,
        get_moe_padding_size=lambda *_: 0,
        MoeRunnerBackend=type("MoeRunnerBackend", (), {"TRITON": "triton", "__new__": lambda _, value: value}),
    )
    package.stand_in(
        "sgl_kernel",
        silu_and_mul=common.silu_and_mul,
        gelu_and_mul=None,
        moe_align_block_size=common.moe_align_block_size,
        moe_sum_reduce=None,
    )
    quantize = dict.fromkeys(("per_token_group_quant_fp8", "scaled_fp8_quant", "sglang_per_token_group_quant_fp8"), nothing)
    package.stand_in(f"{SERVER}.layers.quantization.fp8_kernel", **quantize)
    quantize = ("per_token_group_quant_int8", "per_token_quant_int8", "sglang_per_token_group_quant_int8")
    package.stand_in(f"{SERVER}.layers.quantization.int8_kernel", **dict.fromkeys(quantize, nothing))
    package.stand_in(f"{MOE}.fused_moe_triton", get_config=nothing)
    find = importlib.import_module
    runner_config = find(f"{MOE}.moe_runner.base").MoeRunnerConfig
    package.stand_in(f"{MOE}.moe_runner", MoeRunnerConfig=runner_config)
    fused = find(f"{SERVER}.lora.triton_ops.fused_moe_lora_kernel")._fused_moe_lora
    package.stand_in(f"{SERVER}.lora.triton_ops", fused_moe_lora=fused)
    find("sglang.jit_kernel.moe_lora_align").load_jit = loader(package.folder / "sglang/jit_kernel", "9.0")
    fused_moe = find(f"{MOE}.fused_moe_triton.fused_moe")
    fused_moe.moe_sum_reduce = fused_moe.moe_sum_reduce_triton
    return object_of(
        fused_moe=fused_moe,
        lora=find(f"{SERVER}.lora.lora_moe_runners"),
        quant=find(f"{MOE}.moe_runner.triton"),
        align=find(f"{MOE}.fused_moe_triton.moe_align_block_size").moe_align_block_size,
        settings=find(f"{MOE}.fused_moe_triton.fused_moe_triton_config").try_get_optimal_moe_config,
        runner_config=runner_config,
    )


with PACKAGE.alone():
    SGLANG = load()
SLOTS = {}


def slots(d):
    """The adapters; where base tokens are in the batch, with one more slot of zeros."""
    if not d["base_share"]:
        return d["a13"], d["b13"], d["a2"], d["b2"]
    if SLOTS.get("of") is not d["a13"]:
        SLOTS.clear()
        more = lambda t: torch.cat([t, torch.zeros_like(t[:1])])
        SLOTS.update(of=d["a13"], all=tuple(more(d[n]) for n in ("a13", "b13", "a2", "b2")))
    return SLOTS["all"]


def segments(d, zero_slot):
    """Adapter and bounds of each segment; sorts large batches by adapter first."""
    if d["T"] > 64:
        d["order"] = torch.argsort(d["slot"].cpu(), descending=True, stable=True).cuda()
        for name in ("x", "topk_w", "topk_ids", "slot"):
            d[name] = d[name][d["order"]].contiguous()
    slot = d["slot"].cpu()
    slot = torch.where(slot < 0, zero_slot, slot)
    if d["T"] <= 64:
        return slot.int().cuda(), torch.arange(d["T"] + 1, dtype=torch.int32).cuda()
    adapters, counts = torch.unique_consecutive(slot, return_counts=True)
    bounds = torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)])
    return adapters.int().cuda(), bounds.int().cuda()


def prepare(d, lora):
    """A function that runs the layer and returns its output."""
    E, k, H, I, T, R = d["E"], d["k"], d["H"], d["I"], d["T"], d["R"]
    if not lora:
        plain = dict(inplace=False, activation="silu", is_gated=True, filter_expert=False)
        run = SGLANG.fused_moe.fused_experts_impl
        return lambda: run(d["x"], d["w13"], d["w2"], d["topk_w"], d["topk_ids"], **plain)
    a13, b13, a2, b2 = slots(d)
    L = a13.shape[0]
    adapters, bounds = segments(d, L - 1)
    config = SGLANG.settings(d["w13"].shape, d["w2"].shape, k, None, T)
    padded = -(-(T * k + E * 63) // 64) * 64
    integers = lambda *shape: torch.empty(*shape, dtype=torch.int32, device="cuda")
    numbers = lambda *shape: torch.empty(*shape, dtype=torch.bfloat16, device="cuda")
    buffers = dict(
        intermediate_cache1=numbers(T, k, 2 * I),
        intermediate_cache2=numbers(T * k, I),
        intermediate_cache3=numbers(T, k, H),
        out_hidden_states=numbers(T, H),
        sorted_token_ids_lora=integers(L * padded),
        expert_ids_lora=integers(L * padded // 64),
        num_tokens_post_padded_lora=integers(L),
        lora_ids=torch.arange(L, dtype=torch.int32, device="cuda"),
        cumsum_buffer=integers(L * (E + 1)).zero_(),
        token_mask=integers(L * T),
    )
    enabled, index = integers(L).zero_(), adapters.long()
    sizes = dict(top_k=k, num_experts=E, num_local_experts=E)
    config_of_runner = SGLANG.runner_config(activation="silu", is_gated=True, inplace=False, **sizes)
    core = SGLANG.lora.TritonRunnerCoreWithLoRA(config_of_runner)
    quant = SGLANG.quant.TritonMoeQuantInfo(w13_weight=d["w13"], w2_weight=d["w2"])
    info = SGLANG.lora.LoRAInfo(
        gate_up_lora_a_weights=a13,
        gate_up_lora_b_weights=b13,
        down_lora_a_weights=a2,
        down_lora_b_weights=b2,
        seg_indptr=bounds,
        req_to_lora=adapters,
        lora_ranks=integers(L).fill_(R),
        adapter_enabled=enabled,
        max_lora_rank=R,
        num_experts=E,
        cg_buffers=buffers,
        has_active_lora=True,
    )

    def forward():
        enabled.zero_()
        index.copy_(adapters)
        enabled.index_fill_(0, index, 1)
        aligned = SGLANG.align(d["topk_ids"], config["BLOCK_SIZE_M"], E)
        batch = SGLANG.quant.TritonRunnerInput(d["x"], d["topk_w"], d["topk_ids"], *aligned)
        return core.run(batch, quant, {"config": config}, info).hidden_states

    return forward
