"""Builds the golden fixtures: tiny checkpoints, PEFT adapters, and what Hugging Face computes with them.

    python build.py --out DIR [--work DIR] [--stage old|peft018|peft019|new]

Four stages, in this order, each in an environment of its own (the stage must fit the versions that are installed, and
follows from them when not given):

    old      pip install -r requirements-old.txt                    transformers 4.57, PEFT 0.18: checkpoints of all
                                                                    families, adapters of one module an expert
    peft018  pip install --no-deps --target P018 -r requirements-peft018.txt
             PYTHONPATH=P018, the environment of `new`              PEFT 0.18 on transformers 5: target_parameters as they
                                                                    were laid out then
    peft019  the same with requirements-peft019.txt                 PEFT 0.19.0: another layout for gpt-oss
    new      pip install -r requirements-new.txt                    transformers 5, PEFT 0.21: sharded, fused, bf16 and f16
                                                                    checkpoints, adapters, re-saved adapters, and the cases

A token's expected row comes from Hugging Face's own MoE block in f32 with the token's adapter loaded by PEFT, in the stage
that made the adapter. Each run is compared with an f64 computation in NumPy from dense weights (`truth.py`), and the script
stops if the relative error exceeds 1e-5, if an adapter contributes less than 25 % of the output, or if the files exceed
4 MB. `--work` keeps what the stages hand on (default: `<out>/.work`, removed by the last stage).

Seeds are fixed and files are byte-identical from run to run on one machine; expected outputs can differ in the last bits
on another.
"""

import argparse
import json
import os
import shutil
import sys
from pathlib import Path

if os.environ.get("PYTHONHASHSEED") != "0":  # PEFT writes sets into adapter_config.json
    os.environ["PYTHONHASHSEED"] = "0"
    os.execv(sys.executable, [sys.executable, *sys.argv])
os.environ["HF_HUB_OFFLINE"] = "1"

import numpy as np
import peft
import torch
import transformers
from safetensors.torch import load_file, save_file

import adapters as adapters_module
from adapters import ADAPTERS
from cases import CASES, adapter_index, draw_hidden
from families import FAMILIES, load_model, new_model, run_block, run_router
from refused import make_refused
from truth import dense_experts, forward, route, router_of

STAGES = ["old", "peft018", "peft019", "new"]
LIMIT = 4 << 20
ADAPTER = {a.name: a for a in ADAPTERS}

# Checkpoints that transformers 5 writes: name -> (source, dtype, configuration changes, save_pretrained arguments)
REWRITTEN = {
    "mixtral-sharded": ("mixtral", torch.float32, {}, dict(max_shard_size="40KB")),
    "qwen2_moe-f16": ("qwen2_moe", torch.float16, {}, {}),
    "qwen3_moe-bf16": ("qwen3_moe", torch.bfloat16, {}, {}),
    "olmoe-fused": ("olmoe", torch.float32, dict(norm_topk_prob=False), dict(save_original_format=False)),
    "deepseek_v2-greedy": (
        "deepseek_v2",
        torch.float32,
        dict(topk_method="greedy", n_group=1, topk_group=1),
        {},
    ),
    "deepseek_v3-sharded": ("deepseek_v3", torch.float32, dict(norm_topk_prob=False), dict(max_shard_size="50KB")),
    "deepseek_v3-bf16": ("deepseek_v3", torch.bfloat16, {}, {}),  # the correction bias stays f32
    "gpt_oss-bf16": ("gpt_oss", torch.bfloat16, {}, {}),
}

# Adapters of single experts that PEFT 0.21 can load on transformers 5 (those with dropout or a regular expression for
# their targets it cannot) -> whether they still mean the same. With rsLoRA they do not: rank and alpha of gate_up are
# doubled, and alpha / sqrt(rank) grows by sqrt(2).
CONVERTED = {
    "mixtral-old-plain": True,
    "qwen3_moe-old-down": True,
    "olmoe-old-plain": True,
    "olmoe-old-rslora": False,
    "deepseek_v2-old-everywhere": True,
}


def stage_of_environment():
    versions = transformers.__version__.split(".")[0], ".".join(peft.__version__.split(".")[:2])
    stages = {("4", "0.18"): "old", ("5", "0.18"): "peft018", ("5", "0.19"): "peft019", ("5", "0.21"): "new"}
    return stages.get(versions)


def write_checkpoints(stage, out):
    if stage == "old":
        for family in FAMILIES:
            model = new_model(family)
            save_checkpoint(model, out / "checkpoints" / family)
    if stage == "new":
        for name, (source, dtype, changes, arguments) in REWRITTEN.items():
            model = load_model(out / "checkpoints" / source, dtype)
            for key, value in changes.items():
                assert hasattr(model.config, key)
                setattr(model.config, key, value)
            save_checkpoint(model, out / "checkpoints" / name, **arguments)


def save_checkpoint(model, directory, **arguments):
    shutil.rmtree(directory, ignore_errors=True)
    model.save_pretrained(directory, **arguments)
    (directory / "generation_config.json").unlink(missing_ok=True)


def run(model, layer, hidden, adapter=None):
    """Hugging Face's output for all tokens, and its relative error against the f64 truth."""
    got = run_block(model, layer, hidden)
    plain = model.base_model.model if adapter else model
    model.double()
    x = hidden.double().numpy()
    ids, weights, *_ = route(plain.config, router_of(model, layer), x)
    want = forward(x, ids, weights, dense_experts(model, layer, adapter))
    return got, float(np.linalg.norm(got.double().numpy() - want) / np.linalg.norm(want))


def run_stage(case, stage, out, work):
    """Runs base and adapters of a case as far as they belong to this stage, and keeps `[T, H]` of each."""
    checkpoint = out / "checkpoints" / case.checkpoint
    if not checkpoint.is_dir():
        return  # a later stage's
    folder = work / case.name
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "hidden.safetensors").exists():
        model = load_model(checkpoint)
        hidden = draw_hidden(case, model.config, router_of(model, case.layer))
        save_file({"hidden": hidden}, folder / "hidden.safetensors")
    hidden = load_file(folder / "hidden.safetensors")["hidden"]

    base, error = run(load_model(checkpoint), case.layer, hidden)
    report(case, "base", stage, error)
    if (folder / "base.safetensors").exists():
        other = load_file(folder / "base.safetensors")["out"]
        assert (base - other).norm() <= 1e-5 * other.norm(), f"{case.name}: stages disagree on the base model"
    save_file({"out": base}, folder / "base.safetensors")
    for name in case.adapters:
        # A checkpoint that the last stage wrote is run there with all adapters.
        if ADAPTER[name].stage != stage and not (stage == "new" and case.checkpoint in REWRITTEN):
            if stage == "new" and name in CONVERTED:
                compare_converted(case, name, out, folder, hidden)
            continue
        got, error = run(adapters_module.load(name, case.checkpoint, out), case.layer, hidden, "default")
        delta = float((got - base).norm() / got.norm())
        touched = delta > 0
        assert touched == (not (case.name.endswith("partial") and "layer2" in name)), f"{case.name} {name}: {delta}"
        assert delta > 0.25 or not touched, f"{case.name} {name}: delta {delta:.3f} of the output"
        report(case, name, stage, error, delta)
        save_file({"out": got}, folder / f"{name}.safetensors")


def compare_converted(case, name, out, folder, hidden):
    """The last stage's PEFT converts adapters of single experts while it loads them: does the answer stay the same?"""
    want = load_file(folder / f"{name}.safetensors")["out"]
    got, _ = run(adapters_module.load(name, case.checkpoint, out), case.layer, hidden, "default")
    error = float((got - want).norm() / want.norm())
    print(f"{case.name:22} {name:30} {'new':8} error {error:.1e}  after PEFT's conversion, against stage old", flush=True)
    assert (error < 1e-5) == CONVERTED[name], "PEFT converts differently from what is documented"


def report(case, name, stage, error, delta=0.0):
    print(f"{case.name:22} {name:30} {stage:8} error {error:.1e}  delta {delta:5.2f}", flush=True)
    assert error < 1e-5, "Hugging Face and the f64 truth disagree"


def write_case(case, out, work):
    """Puts the rows of all stages together."""
    folder = work / case.name
    hidden = load_file(folder / "hidden.safetensors")["hidden"]
    index = adapter_index(case)
    rows = load_file(folder / "base.safetensors")["out"].clone()
    for i, name in enumerate(case.adapters):
        rows[index == i] = load_file(folder / f"{name}.safetensors")["out"][index == i]
    model = load_model(out / "checkpoints" / case.checkpoint)
    ids, weights = run_router(model, case.layer, hidden)
    tensors = {
        "hidden_states": hidden.to(case.dtype),
        "adapter_index": index,
        "expected_hidden_states": rows,
        "expected_topk_ids": ids.to(torch.int32),
        "expected_topk_weights": weights.float(),
    }
    save_file({k: v.contiguous() for k, v in tensors.items()}, out / f"case-{case.name}.safetensors")
    order = "unspecified (torch.topk with sorted=False)" if "deepseek" in case.checkpoint else "best first"
    exact = "exact (f32)" if case.dtype == torch.float32 else f"exact {case.dtype} numbers; computed in f32 after widening"
    description = {
        "family": model.config.model_type,
        "checkpoint": f"checkpoints/{case.checkpoint}",
        "layer": case.layer,
        "adapters": [[name, f"adapters/{name}"] for name in case.adapters],
        "tolerance_note": f"Inputs and weights are {exact}. Expected outputs are f32, within 1e-5 (relative Frobenius) "
        f"of f64. Order of the chosen experts: {order}; gaps between choices exceed 1e-3.",
    }
    if case.ambiguous:
        description["orientation"] = case.ambiguous
    (out / f"case-{case.name}.json").write_text(json.dumps(description, indent=2) + "\n")


def finish(out, work):
    """Checks what the fixtures promise, and their size."""
    for case in CASES:
        write_case(case, out, work)
    shutil.rmtree(work)
    files = [p for p in out.rglob("*") if p.is_file()]
    size = sum(p.stat().st_size for p in files)
    print(f"{len(files)} files, {size} bytes")
    for file in files:
        assert str(Path.home()).encode() not in file.read_bytes() and str(out).encode() not in file.read_bytes(), file
    assert size < LIMIT, "the fixtures are too large"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--work", type=Path)
    parser.add_argument("--stage", choices=STAGES)
    args = parser.parse_args()
    installed = f"transformers {transformers.__version__}, PEFT {peft.__version__}"
    stage = stage_of_environment()
    if stage is None or args.stage not in (None, stage):
        sys.exit(f"{installed}: the environment of stage {stage}, not of {args.stage}")
    print(f"stage {stage}: {installed}, torch {torch.__version__}")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(1)
    out, work = args.out.resolve(), (args.work or args.out / ".work").resolve()
    if stage == STAGES[0]:
        for folder in (out / "checkpoints", out / "adapters", out / "refused", work):
            shutil.rmtree(folder, ignore_errors=True)
        for case in out.glob("case-*"):
            case.unlink()
    write_checkpoints(stage, out)
    for adapter in ADAPTERS:
        if adapter.stage == stage:
            adapters_module.make(adapter, out)
    if stage == "old":
        make_refused(out)
    for case in CASES:
        run_stage(case, stage, out, work)
    if stage == STAGES[-1]:
        finish(out, work)


if __name__ == "__main__":
    main()
