#!/usr/bin/env python3
"""Times one system on every layer and batch of shapes.py, with and without LoRA, and writes its rows.

    bench_peer.py SYSTEM ROWS.json [--models A,B] [--tokens 1,16] [--adapters 1:16,8:64] [--seconds 400] [--card RUN.json]

SYSTEM is the module peer_SYSTEM: `prepare(d, lora)` gives a function that runs the layer d and returns its output. Optional:
`NAME`; `phases(T)`, plans that are passed as phase= (the fastest counts); `prepare_base_alt(d)`, a second layer without LoRA
(the faster counts). prepare may reorder the batch inside d; the check follows d. The choice of experts is outside of what is
timed, everything else inside. RUN.json is what `moe-lora-bench gpu` wrote on this card: its bandwidth and peak are taken over.
"""
import argparse
import importlib
import json
import time
import traceback

import torch

import shapes

MOST_ADAPTER_BYTES = 30e9


def check(d, forward):
    """The relative error of a few tokens."""
    out = forward()
    idx, few = shapes.spread(torch, d)
    want = shapes.reference(torch, few)
    return float((out[idx].double() - want).norm() / want.norm())


def fastest(system, batch, lora, prepares):
    """Microseconds and relative error of the fastest way that the system has for a batch."""
    found = []
    for prepare in prepares:
        for phase in getattr(system, "phases", lambda tokens: [None])(batch()["T"]):
            d = batch()
            forward = prepare(d, **({"phase": phase} if phase else {}))
            truth = d if lora else dict(d, slot=torch.full_like(d["slot"], -1))
            error = check(truth, forward)
            found.append((shapes.bench(torch, forward), error))
    return min(found)


def rows_of(system, name, options):
    """Yields the rows as they are measured."""
    end = time.time() + options.seconds
    for model in options.models:
        E, _, H, I = shapes.MODELS[model]
        for slots, rank, base_share in shapes.ADAPTERS:
            if options.adapters and f"{slots}:{rank}" not in options.adapters:
                continue
            if slots * E * rank * 6 * (H + I) > MOST_ADAPTER_BYTES:
                continue
            everything = shapes.make(torch, model, max(shapes.TOKENS), slots, rank, base_share)
            for tokens in options.tokens:
                cut = {n: everything[n][:tokens].contiguous() for n in ("x", "topk_w", "topk_ids", "slot")}
                batch = lambda: dict(everything, T=tokens, base_share=base_share, **{n: t.clone() for n, t in cut.items()})
                ways = [(True, [lambda d, **kw: system.prepare(d, lora=True, **kw)])]
                if (slots, rank) == shapes.ADAPTERS[0][:2]:
                    plain = [lambda d, **kw: system.prepare(d, lora=False, **kw)]
                    if hasattr(system, "prepare_base_alt"):
                        plain.append(system.prepare_base_alt)
                    ways.append((False, plain))
                for lora, prepares in ways:
                    if time.time() > end:
                        print("out of time")
                        return
                    try:
                        us, error = fastest(system, batch, lora, prepares)
                    except Exception as why:
                        traceback.print_exc(limit=-4)
                        if isinstance(why, torch.AcceleratorError):
                            return
                        continue
                    sizes = dict(adapters=slots, rank=rank) if lora else dict(adapters=0, rank=0)
                    row = dict(peer=name, model=model, **sizes, tokens=tokens, us=round(us, 2), rel_err=error)
                    print(" ".join(f"{v:.3g}" if isinstance(v, float) else str(v) for v in row.values()), flush=True)
                    yield dict(row, **shapes.touched(batch(), lora))
            del everything
            torch.cuda.empty_cache()


def main():
    """Measures what the command line asks for."""
    words = lambda text: text.split(",")
    parser = argparse.ArgumentParser()
    parser.add_argument("system")
    parser.add_argument("out")
    parser.add_argument("--models", type=words, default=list(shapes.MODELS))
    parser.add_argument("--tokens", type=lambda text: [int(t) for t in words(text)], default=shapes.TOKENS)
    parser.add_argument("--adapters", type=words)
    parser.add_argument("--seconds", type=float, default=400)
    parser.add_argument("--card")
    options = parser.parse_args()
    system = importlib.import_module("peer_" + options.system)
    name = getattr(system, "NAME", options.system)
    card = dict(name=torch.cuda.get_device_name(), driver=torch.version.cuda, read_tb_s=3.15, peak_tflop_s=797.0)
    if options.card:
        card = json.load(open(options.card))["card"]
    about = f"{name}: median of 20 CUDA graph replays, cold and clean L2, by bench_peer.py; torch {torch.__version__}"
    rows = []
    for row in rows_of(system, name, options):
        rows.append(row)
        with open(options.out, "w") as file:
            json.dump(dict(about=about, card=card, rows=rows), file, indent=0)
    print(len(rows), "rows")


if __name__ == "__main__":
    main()
