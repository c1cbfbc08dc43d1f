"""Times text from an OLMoE-shaped model of 4 layers: moe-lora, transformers, and transformers with PEFT.

    python generate.py --moe-lora target/release/moe-lora [--device cpu|cuda] [--work DIR] [--tokens 32] [--rounds 3]

The same 8 requests (prompts of 16 to 128 tokens) on 3 adapters of rank 16, on experts and attention, everywhere in bf16 and
greedy. moe-lora runs them as one continuous batch; PEFT has one active adapter at a time, so each adapter's requests run as a
batch of their own; transformers alone runs all 8 without adapters as one batch, with the faster of its two ways to compute
experts. Rounds of the three alternate, and each keeps its best. The model (4 GB) is made once, in DIR. `--program` is another
program that takes a model's folder, `NAME=DIR` of each adapter, the requests and a file for its results.

Prints JSON: new tokens a second of each, prompts included, and of every round; and how many tokens of a request are PEFT's before
the first that is not, on average (all of them are equal only by luck: a model of noise has near ties, and bf16 decides them).
"""
import argparse
import json
import re
import subprocess
import sys
import time
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, OlmoeConfig

VOCAB = 50304
ADAPTERS = ["math", "code", "poems"]
PROMPTS = [16, 24, 32, 48, 64, 80, 96, 128]
BOTH = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


def make_files(work, device):
    config = OlmoeConfig(
        hidden_size=2048, intermediate_size=1024, num_hidden_layers=4, num_attention_heads=16, num_experts=64,
        num_experts_per_tok=8, vocab_size=VOCAB, eos_token_id=None, pad_token_id=1,
    )
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "norm" not in name:
                p.normal_(std=p.shape[-1] ** -0.5)
    model.save_pretrained(work / "model")
    modules = ["q_proj", "k_proj", "v_proj", "o_proj"]
    lora = LoraConfig(r=16, lora_alpha=16, target_parameters=BOTH, target_modules=modules)
    model = get_peft_model(model, lora)
    for name in ADAPTERS:
        with torch.no_grad():
            for key, p in model.named_parameters():
                if "lora_" in key:
                    p.data = (torch.randn(p.shape, device=p.device) * 0.02).to(torch.bfloat16)
        model.save_pretrained(work / name, save_embedding_layers=False)
    (work / "done").touch()


def requests(tokens):
    generator = torch.Generator().manual_seed(1)
    draw = lambda n: torch.randint(10, VOCAB, (n,), generator=generator).tolist()
    return [
        dict(id=i, prompt_tokens=draw(n), adapter=ADAPTERS[i % 3], max_tokens=tokens) for i, n in enumerate(PROMPTS)
    ]


@torch.no_grad()
def generate(model, some, tokens):
    """One batch, padded on the left."""
    longest = max(len(r["prompt_tokens"]) for r in some)
    ids = torch.ones(len(some), longest, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, r in enumerate(some):
        prompt = r["prompt_tokens"]
        ids[row, longest - len(prompt) :] = torch.tensor(prompt)
        mask[row, longest - len(prompt) :] = 1
    out = model.generate(
        input_ids=ids.to(model.device), attention_mask=mask.to(model.device), max_new_tokens=tokens, min_new_tokens=tokens,
        do_sample=False, pad_token_id=1,
    )
    assert out.shape[1] == longest + tokens
    return {r["id"]: row for r, row in zip(some, out[:, longest:].tolist())}


def timed(run):
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def by_adapter(model, all_requests, tokens):
    results = {}
    for name in ADAPTERS:
        model.set_adapter(name)
        results |= generate(model, [r for r in all_requests if r["adapter"] == name], tokens)
    return results


def run(command):
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return float(re.search(r"new ones in ([0-9.]+) s", done.stderr)[1])


def moe_lora(program, work, device):
    command = [program, "generate", "--device", device, "--model", work / "model", "--requests", work / "requests.jsonl"]
    for name in ADAPTERS:
        command += ["--adapter", f"{name}={work / name}"]
    return run(command + ["--output", work / "moe_lora.jsonl"])


def other(program, work):
    adapters = [f"{name}={work / name}" for name in ADAPTERS]
    return run([program, work / "model", *adapters, work / "requests.jsonl", work / "program.jsonl"])


def agreement(file, results):
    lines = {r["id"]: r["tokens"] for r in map(json.loads, file.read_text().splitlines())}
    pairs = [zip(lines[n], tokens) for n, tokens in results.items()]
    return sum(next((i for i, (a, b) in enumerate(p) if a != b), len(lines[0])) for p in pairs) / len(pairs)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--moe-lora", type=Path, required=True)
    parser.add_argument("--program", type=Path)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--work", type=Path, default=Path("target/bench-generate"))
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    if not (args.work / "done").exists():
        make_files(args.work, args.device)
    all_requests = requests(args.tokens)
    (args.work / "requests.jsonl").write_text("".join(json.dumps(r) + "\n" for r in all_requests))

    base = AutoModelForCausalLM.from_pretrained(args.work / "model", dtype=torch.bfloat16).to(args.device).eval()
    first, *others = ADAPTERS
    peft = PeftModel.from_pretrained(base, args.work / first, adapter_name=first)
    for name in others:
        peft.load_adapter(args.work / name, adapter_name=name)
    peft.eval()

    def base_with(implementation):
        peft.base_model.model.config._experts_implementation = implementation
        with peft.disable_adapter():
            return timed(lambda: generate(peft, all_requests, args.tokens))

    warm = {name: base_with(name) for name in ["grouped_mm", "eager"]}
    print({name: f"{t:.2f} s" for name, t in warm.items()}, "warm-up of transformers", file=sys.stderr)
    implementation = min(warm, key=warm.get)
    seconds = {"moe_lora": [], "program": [], "transformers_base": [], "transformers_peft": []}
    found = {}
    for _ in range(args.rounds):
        seconds["moe_lora"].append(moe_lora(args.moe_lora, args.work, args.device))
        if args.program:
            seconds["program"].append(other(args.program, args.work))
        seconds["transformers_base"].append(base_with(implementation))
        seconds["transformers_peft"].append(timed(lambda: found.update(by_adapter(peft, all_requests, args.tokens))))
        seconds = {name: times for name, times in seconds.items() if times}
        print({name: f"{times[-1]:.2f} s" for name, times in seconds.items()}, file=sys.stderr)
    new = len(PROMPTS) * args.tokens
    rates = {name: [new / t for t in times] for name, times in seconds.items()}
    equal = {name: agreement(args.work / f"{name}.jsonl", found) for name in ("moe_lora", "program") if name in seconds}
    best = {name: max(r) for name, r in rates.items()}
    report = {"device": args.device, "new_tokens_per_second": best, "rounds": rates, "tokens_before_a_difference": equal}
    json.dump(report, sys.stdout, indent=1)
    print()


main()
