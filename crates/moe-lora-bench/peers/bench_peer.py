#!/usr/bin/env python3
"""Times systems on the layers and batches of shapes.py, with and without LoRA, all in one process and on the same tensors.

    bench_peer.py FOLDER SYSTEM... [--models A,B] [--tokens 1,16] [--adapters 1:16,8:64] [--seconds 400] [--card RUN.json]

The rows of a system are written to FOLDER/SYSTEM.json as they are measured. SYSTEM is the module peer_SYSTEM: `prepare(d, lora)`
gives a function that runs the layer d and returns its output. Optional: `NAME`; `PACKAGE`, within which its imports are looked up;
`phases(T)`, plans that are passed as phase= (the fastest counts); `prepare_base_alt(d)`, a second layer without LoRA (the faster
counts). A system that sorts the batch inside d leaves the order in d["order"]. The choice of experts is outside of what is timed,
everything else inside. RUN.json is what `moe-lora-bench gpu` wrote on this card: its bandwidth and peak are taken over.
"""

import argparse
import contextlib
import importlib
import json
import pathlib
import time
import traceback

import torch

import shapes

MOST_ADAPTER_BYTES = 30e9


class System:
    """One system, and its rows so far."""

    def __init__(self, module, folder, card):
        self.module = importlib.import_module("peer_" + module)
        self.name = getattr(self.module, "NAME", module)
        self.path = folder / f"{module}.json"
        self.phases = getattr(self.module, "phases", lambda tokens: [None])
        package = getattr(self.module, "PACKAGE", None)
        self.alone = package.alone if package else contextlib.nullcontext
        how = "CUDA graph replays, cold and clean L2, by bench_peer.py"
        self.file = dict(about=f"{self.name}: median of {how}; torch {torch.__version__}", card=card, rows=[])

    def ways(self, lora):
        """Its layers with or without LoRA."""
        ways = [lambda d, **kw: self.module.prepare(d, lora=lora, **kw)]
        if not lora and hasattr(self.module, "prepare_base_alt"):
            ways.append(self.module.prepare_base_alt)
        return ways

    def measure(self, batch, lora, truth):
        """Microseconds and relative error of the fastest way that it has for a batch."""
        found = []
        with self.alone():
            for prepare in self.ways(lora):
                for phase in self.phases(batch()["T"]):
                    d = batch()
                    forward = prepare(d, **({"phase": phase} if phase else {}))
                    error = check(d, forward, truth)
                    found.append((shapes.bench(torch, forward), error))
        return min(found)

    def keep(self, row):
        """Adds a row to the file."""
        self.file["rows"].append(row)
        self.path.write_text(json.dumps(self.file, indent=0))


def check(d, forward, truth):
    """The relative error of a few tokens."""
    out, (idx, want) = forward(), truth
    if "order" in d:
        out = torch.empty_like(out).index_copy_(0, d["order"], out)
    return float((out[idx].double() - want).norm() / want.norm())


def batches(options):
    """Yields (what makes a batch, with LoRA or without, what its row says, truth of a few tokens)."""
    sets = {f"{slots}:{rank}": (slots, rank, base_share) for slots, rank, base_share in shapes.ADAPTERS}
    for slots, rank, base_share in [sets[name] for name in options.adapters or sets]:
        for model in options.models:
            E, _, H, I = shapes.MODELS[model]
            if slots * E * rank * 6 * (H + I) > MOST_ADAPTER_BYTES:
                continue
            everything = shapes.make(torch, model, max(shapes.TOKENS), slots, rank, base_share)
            for tokens in options.tokens:
                cut = {n: everything[n][:tokens].contiguous() for n in ("x", "topk_w", "topk_ids", "slot")}
                batch = lambda: dict(everything, T=tokens, base_share=base_share, **{n: t.clone() for n, t in cut.items()})
                for lora in (True, False) if (slots, rank) == shapes.ADAPTERS[0][:2] else (True,):
                    idx, few = shapes.spread(torch, batch())
                    if not lora:
                        few["slot"] = torch.full_like(few["slot"], -1)
                    sizes = dict(adapters=slots, rank=rank) if lora else dict(adapters=0, rank=0)
                    about = dict(model=model, **sizes, tokens=tokens), shapes.touched(batch(), lora)
                    yield batch, lora, about, (idx, shapes.reference(torch, few))
            del everything
            torch.cuda.empty_cache()


def main():
    """Measures what the command line asks for."""
    words = lambda text: text.split(",")
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=pathlib.Path)
    parser.add_argument("systems", nargs="+")
    parser.add_argument("--models", type=words, default=list(shapes.MODELS))
    parser.add_argument("--tokens", type=lambda text: [int(t) for t in words(text)], default=shapes.TOKENS)
    parser.add_argument("--adapters", type=words)
    parser.add_argument("--seconds", type=float, default=400)
    parser.add_argument("--card")
    options = parser.parse_args()
    end = time.time() + options.seconds
    card = dict(name=torch.cuda.get_device_name(), driver=torch.version.cuda, read_tb_s=3.15, peak_tflop_s=797.0)
    if options.card:
        card = json.load(open(options.card))["card"]
    options.folder.mkdir(parents=True, exist_ok=True)
    systems = []
    for module in options.systems:
        try:
            systems.append(System(module, options.folder, card))
        except Exception:
            print(f"{module} cannot be run:")
            traceback.print_exc()
    for batch, lora, (about, touched), truth in batches(options):
        line = "{model} T {tokens} L {adapters} R {rank}:".format(**about)
        for system in systems:
            if time.time() > end:
                print("out of time")
                return
            try:
                us, error = system.measure(batch, lora, truth)
            except Exception as why:
                traceback.print_exc(limit=-4)
                if isinstance(why, torch.AcceleratorError):
                    return
                continue
            system.keep(dict(peer=system.name, **about, us=round(us, 2), rel_err=error, **touched))
            line += f" {system.name} {us:.1f} ({error:.1e})"
        print(line, flush=True)
    for system in systems:
        print(f"{system.name}: {len(system.file['rows'])} rows")


if __name__ == "__main__":
    main()
