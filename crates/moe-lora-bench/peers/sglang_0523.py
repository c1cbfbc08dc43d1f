"""SGLang 0.5.23's engine for LoRA on experts, one layer, for both of its bf16 base products (peer_sglang_0523_*.py).

Timed: its LoRA route (rebuilt in every layer), rows and align, base products, LoRA A and B (on a side stream where its plan says
so), activation, finalize. Plans: its table for sm90, or its fallback where the table ends (hidden above 4096). Align comes from
its CUDA port, the sum over k from its Triton twin.
"""
import contextlib
import importlib
from typing import Any, NamedTuple

import torch

from cuda_modules import GATED, Common, loader
from sglang_stand_ins import direct, no, nothing, object_of, settings
from stand_ins import Package

PACKAGE = Package("sglang_0523", "sglang", "sgl_kernel")
SERVER = "sglang.srt"
MOE = f"{SERVER}.layers.moe"


class CombineInput(NamedTuple):
    """As the server's."""

    hidden_states: Any


class DispatchOutput(NamedTuple):
    """As the server's."""

    hidden_states: Any
    hidden_states_scale: Any
    topk_output: Any


class TopK(NamedTuple):
    """As the server's."""

    topk_weights: Any
    topk_ids: Any
    router_logits: Any = None


def stand_in(package, common):
    """Puts what the engine imports from the server where it looks for it."""
    package.folders(
        *("sglang", SERVER, f"{SERVER}.layers", MOE, f"{MOE}.moe_runner", f"{MOE}.moe_runner.triton_utils"),
        *(f"{SERVER}.lora", f"{MOE}.token_dispatcher", f"{SERVER}.layers.quantization"),
    )
    utils = settings() | dict(direct_register_custom_op=nothing)
    package.stand_in(f"{SERVER}.utils", **utils)
    package.stand_in(f"{SERVER}.utils.common", **utils)
    package.stand_in(f"{SERVER}.utils.patch_torch", register_fake_if_exists=lambda *_, **__: direct)
    package.stand_in(f"{SERVER}.utils.custom_op", register_custom_op=direct)
    package.stand_in(f"{SERVER}.utils.hf_transformers_utils", AutoConfig=object)
    package.stand_in(f"{SERVER}.model_executor.forward_batch_info", ForwardBatch=object, ForwardMode=object)
    package.stand_in(f"{MOE}.utils", get_moe_runner_backend=nothing, get_moe_padding_size=lambda *_: 0)
    dispatcher = dict(StandardCombineInput=CombineInput, StandardDispatchOutput=DispatchOutput)
    package.stand_in(f"{MOE}.token_dispatcher.standard", **dispatcher)
    checker = object_of(format_is_standard=lambda _: True)
    package.stand_in(f"{MOE}.topk", TopKOutputChecker=checker, StandardTopKOutput=TopK)
    package.stand_in(f"{SERVER}.batch_invariant_ops", is_batch_invariant_mode_enabled=no)
    execution = object_of(
        deterministic=object_of(enable_deterministic_inference=False),
        moe=object_of(enable_fused_moe_sum_all_reduce=False),
    )
    package.stand_in(
        f"{SERVER}.runtime_context", get_exec=lambda: execution, get_parallel=lambda: object_of(tp_group=None)
    )
    package.stand_in(
        f"{SERVER}.distributed.device_communicators.pynccl_allocator",
        use_symmetric_memory=lambda *_, **__: contextlib.nullcontext(),
    )
    package.stand_in(f"{SERVER}.layers.dp_attention", is_allocation_symmetric=no)
    package.stand_in(f"{MOE}.moe_runner.triton_utils", get_config=nothing)
    package.stand_in(f"{MOE}.moe_runner", MoeRunnerConfig=object)
    package.stand_in("sgl_kernel", moe_align_block_size=common.moe_align_block_size, moe_sum_reduce=None)


def load():
    """The package's modules that the layer calls."""
    package, common, find = PACKAGE, Common(), importlib.import_module
    stand_in(package, common)
    jit = loader(package.folder / "sglang/kernels/jit", "9.0a")
    find("sglang.kernels.ops.moe.moe_align").load_jit = jit
    find("sglang.kernels.ops.moe").moe_align_block_size = common.moe_align_block_size
    gated = lambda wrappers: [w for w in wrappers if w[0] in GATED]
    activation = find("sglang.kernels.ops.activation.activation")
    activation.load_jit = lambda *names, cuda_wrappers, **how: jit(*names, cuda_wrappers=gated(cuda_wrappers), **how)
    fused_moe = find(f"{MOE}.moe_runner.triton_utils.fused_moe")
    fused_moe.moe_sum_reduce = fused_moe.moe_sum_reduce_triton
    runner = find(f"{SERVER}.lora.moe.runner")
    return object_of(
        fused_moe=fused_moe,
        Runner=runner.MoeLoraRunner,
        Batch=runner.MoeLoraBatch,
        activation=find("sglang.kernels.ops.lora.moe.activation").ActivationFn.SILU,
        plans=find(f"{SERVER}.lora.moe.plan").resolve_plans,
        Quant=find(f"{SERVER}.lora.moe.quant_info").MoeLoraBf16QuantInfo,
        provider=find(f"{SERVER}.lora.moe.base_gemm_provider").select_provider_cls,
        Phase=find(f"{SERVER}.lora.utils").Phase,
        Workspace=find(f"{SERVER}.lora.workspace").LoraWorkspace,
    )


with PACKAGE.alone():
    SGLANG = load()


class Runner(SGLANG.Runner):
    """Its runner, with the output from PyTorch's allocator."""

    def _allocate_output(self, *, num_tokens, dtype, device):
        return torch.empty((num_tokens, self.hidden_size), dtype=dtype, device=device)


def phases(tokens):
    """SGLang chooses by what the requests do: a batch of 64 or 256 can be either, so both are timed."""
    return ["decode", "prefill"] if tokens in (64, 256) else ["decode" if tokens < 64 else "prefill"]


def plans(d):
    """What its table says for this layer."""
    sizes = dict(physical_rank=d["R"], hidden_size=d["H"], num_local_experts=d["E"])
    activation = dict(activation=SGLANG.activation, quant_family="bf16", is_shared_outer=False)
    return SGLANG.plans(architecture="sm90", **sizes, **activation)


PROVIDERS = {}


def providers(d, vendor, chosen):
    """Its base products, made once for each layer."""
    if PROVIDERS.get("of") is not d["w13"]:
        sizes = dict(num_local_experts=d["E"], intermediate_size=d["I"], hidden_size=d["H"])
        PROVIDERS.clear()
        PROVIDERS.update(of=d["w13"], quant=SGLANG.Quant(w13_weight=d["w13"], w2_weight=d["w2"], **sizes))
    made = PROVIDERS.setdefault(vendor, {})
    for rows in {plan.base_gemm_rows for plan in chosen.values()} - made.keys():
        made[rows] = SGLANG.provider(rows, "bf16", vendor)(PROVIDERS["quant"])
    return made


def lora(d, vendor, phase):
    """One layer with LoRA."""
    chosen = plans(d)
    how = dict(providers=providers(d, vendor, chosen), top_k=d["k"], routed_scaling_factor=None)
    runner = Runner(**how, activation=SGLANG.activation, workspace=SGLANG.Workspace())
    runner.plans = dict(chosen)
    for plan in chosen.values():
        runner.validate_plan(plan.plan, base_gemm_rows=plan.base_gemm_rows)
    x = DispatchOutput(d["x"], None, TopK(d["topk_w"], d["topk_ids"]))
    batch = SGLANG.Batch(
        gate_up_lora_a=d["a13"],
        gate_up_lora_b=d["b13"],
        down_lora_a=d["a2"],
        down_lora_b=d["b2"],
        token_lora_mapping=d["slot"],
        use_cuda_graph=True,
        is_prefill=phase == "prefill",
    )
    return lambda: runner.run(x, batch).hidden_states


def engine(d, vendor, phase):
    """The engine's base stages: rows, gate_up, activation, down, finalize. They also write the activations in pair order."""
    base = providers(d, vendor, plans(d))[plans(d)[SGLANG.Phase(phase)].base_gemm_rows]
    workspace = SGLANG.Workspace()
    x, weights, ids = d["x"], d["topk_w"], d["topk_ids"]
    format = dict(dtype=x.dtype, device=x.device)

    def forward():
        workspace.begin_forward(graph_mode=True, is_prefill_graph=phase == "prefill")
        state = base.prepare(x, ids, d["k"], workspace)
        gate_up = workspace.tensor("base:gateup", base.gateup_out_shape(state), **format)
        base.gateup(state, gate_up)
        base.release_prepared_inputs(state)
        inner = workspace.tensor("act:masked", base.act_out_shape(state), **format)
        pairs = workspace.tensor("act:pairs", (d["T"], d["k"], d["I"]), **format)
        base.act_with_delta(state, gate_up, None, ids, inner, pairs, activation="silu")
        out = torch.empty_like(x)
        rows = base.down_output(state, workspace)
        base.down(state, inner, rows)
        base.finalize(state, rows, ids, weights, None, out, lora_delta=None)
        return out

    return forward


def fused(d):
    """Its plain Triton layer, which runs where no batch has LoRA."""
    plain = dict(inplace=False, activation="silu", is_gated=True, filter_expert=False)
    run = SGLANG.fused_moe.fused_experts_impl
    return lambda: run(d["x"], d["w13"], d["w2"], d["topk_w"], d["topk_ids"], **plain)
