"""What both releases of SGLang import from their server and from closed libraries."""

import logging
import os
from types import SimpleNamespace

import torch
import triton


def nothing(*_, **__):
    """For what a bf16 layer on one GPU never needs."""


def no(*_, **__):
    """For features that are off."""
    return False


def direct(function=None, **_):
    """A custom operator is its plain function."""
    return function if function is not None else direct


def no_custom_op(*_, **__):
    """Without torch.library the packages call their functions directly."""
    raise AttributeError


def settings():
    """Adds what their loggers have more, and gives what both take from sglang.srt.utils."""
    for name in ("warning_once", "info_once"):
        setattr(logging.Logger, name, nothing)
    logging.getLogger("sglang").setLevel(logging.ERROR)
    kinds = ("hip", "musa", "xpu", "cpu", "npu", "mps", "sm100_supported", "blackwell_supported", "sm120_supported")
    properties = torch.cuda.get_device_properties
    return {f"is_{kind}": no for kind in (*kinds, "flashinfer_available")} | dict(
        is_cuda=lambda: True,
        is_sm90_supported=lambda *_: True,
        cpu_has_amx_support=no,
        supports_custom_op=no,
        use_intel_xpu_backend=no,
        ceil_div=lambda a, b: -(-a // b),
        ceil_align=lambda a, b: -(-a // b) * b,
        get_bool_env_var=lambda name, default="false": os.getenv(name, default).lower() in ("1", "true"),
        get_device_name=lambda *_: torch.cuda.get_device_name(),
        next_power_of_2=triton.next_power_of_2,
        get_device_capability=lambda *_: torch.cuda.get_device_capability(),
        get_device_core_count=lambda *_: properties(0).multi_processor_count,
        dispose_tensor=nothing,
        direct_register_custom_op=no_custom_op,
        log_info_on_rank0=nothing,
        get_cuda_version=lambda: tuple(map(int, torch.version.cuda.split("."))),
    )


def object_of(**contents):
    """An object with these attributes."""
    return SimpleNamespace(**contents)
