"""Builds the fixtures of whole models: tiny checkpoints with tokenizers, adapters of experts and attention, and the text
that transformers and PEFT generate with them.

    python whole.py --out DIR          (environment: requirements-new.txt)

`DIR/<family>` is what `save_pretrained` wrote, with `tokenizer.json`; `DIR/adapters/<family>-<name>` what PEFT wrote.
`DIR/<family>-requests.json` lists requests: `prompt`, `adapter` (null = base), `prompt_tokens` (as the tokenizer gives
them), `tokens` (greedy, by `generate`) and `text`; `DIR/<family>-logits.safetensors` holds the logits `[new tokens, V]` of
each under its number. Every greedy choice is at least 0.02 above the next best, so rounding cannot change it; prompts for
which that does not hold are passed over.

Seeds are fixed; expected logits can differ in their last bits on another machine.
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

import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import save_file
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from adapters import draw
from families import generator

VOCAB = 320
NEW_TOKENS = 12
MARGIN = 0.02
LIMIT = 2 << 20
BOTH = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]

CONFIGS = {
    # Grouped heads wider than H / heads, biases, a dense layer in the middle, another base of the rotation.
    "qwen3_moe": transformers.Qwen3MoeConfig(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=40, moe_intermediate_size=24, num_hidden_layers=3,
        mlp_only_layers=[1], num_attention_heads=4, num_key_value_heads=2, head_dim=16, num_experts=8,
        num_experts_per_tok=2, norm_topk_prob=True, attention_bias=True, max_position_embeddings=96,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6}, eos_token_id=0, bos_token_id=None,
    ),
    # One norm over all heads, clipped queries, keys and values, head tied to the embedding, stretched positions. The widths of
    # both are multiples of 8, as kernels on GPUs ask for.
    "olmoe": transformers.OlmoeConfig(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, num_experts=6, num_experts_per_tok=3, norm_topk_prob=False, clip_qkv=1.5,
        max_position_embeddings=96, tie_word_embeddings=True,
        rope_parameters={"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0},
        eos_token_id=0, bos_token_id=1, pad_token_id=1,
    ),
}

ADAPTERS = {
    "experts": dict(r=4, lora_alpha=8, target_parameters=BOTH),
    "everything": dict(r=3, lora_alpha=5, use_rslora=True, target_parameters=BOTH, target_modules=ATTENTION),
    "attention": dict(r=6, lora_alpha=9, rank_pattern={"o_proj": 2}, target_modules=["q_proj", "o_proj"]),
}

TEXT = """A mixture of experts routes every token to a few of its many experts, and the others rest.
An adapter of low rank changes what an expert answers without touching the weights that all share.
When several adapters are served at once, each token brings its own, and the batch stays one batch.
The river ran slowly past the old mill; the miller counted his sacks, three, seven, twelve, and sang.
"""

PROMPTS = [
    "A token", "The river ran", "Every adapter changes", "and the batch stays one", "three, seven, twelve",
    "When several experts\nanswer at once, the miller counts", "It doesn't rest: the mill's weights are 42.",
    "The old mill routes every sack, and every sack brings its own token past the river; the others sing of low rank.",
    "Grüße, naïve café!", "x", "An adapter of an adapter of an adapter", "weights weights weights", "slowly, slowly",
    "Sing!  Two   spaces", "42 sacks", "The miller rests", "routes", "An expert's answer: forty-two", "every river sings",
]


def tokenizer(family):
    """Byte-level BPE as the family's own: Qwen splits by a regular expression, OLMoE puts a token before the text."""
    bpe = Tokenizer(models.BPE())
    bpe.normalizer = normalizers.NFC()
    if family == "qwen3_moe":
        pattern = (
            r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
        )
        split = pre_tokenizers.Split(Regex(pattern), "isolated")
        bpe.pre_tokenizer = pre_tokenizers.Sequence(
            [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
        )
    else:
        bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|start|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB, special_tokens=special, show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    bpe.train_from_iterator([TEXT], trainer)
    if family == "olmoe":
        bpe.post_processor = processors.TemplateProcessing(single="<|start|> $A", special_tokens=[("<|start|>", 1)])
    return bpe


@torch.no_grad()
def new_model(family):
    model = transformers.AutoModelForCausalLM.from_config(CONFIGS[family]).eval()
    for name, p in model.named_parameters():
        x = torch.randn(p.shape, generator=generator("whole", family, name))
        if "norm" in name:
            x = 1 + 0.2 * x
        elif name.endswith("bias"):
            x = 0.3 * x
        elif "embed" not in name:
            x = 1.2 * x / p.shape[-1] ** 0.5
        elif model.config.tie_word_embeddings:
            x = 0.15 * x  # it is the head too
        p.copy_(x)
    return model


def make_adapter(family, name, out):
    from_disk = transformers.AutoModelForCausalLM.from_pretrained(out / family)
    from_disk.name_or_path = from_disk.config._name_or_path = f"golden/{family}"
    config = dict(ADAPTERS[name], task_type="CAUSAL_LM")
    if name == "everything" and family == "qwen3_moe":  # its dense layer too
        config["target_modules"] = [*ATTENTION, "gate_proj", "up_proj", "down_proj"]
    model = get_peft_model(from_disk, LoraConfig(**config))
    draw(model, f"whole-{family}-{name}")
    directory = out / "adapters" / f"{family}-{name}"
    shutil.rmtree(directory, ignore_errors=True)
    model.save_pretrained(directory, save_embedding_layers=False)
    (directory / "README.md").unlink()  # a model card without content


@torch.no_grad()
def answer(model, tokens):
    """Greedy tokens, and the logits of each."""
    ids = torch.tensor([tokens])
    out = model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW_TOKENS, do_sample=False,
        output_logits=True, return_dict_in_generate=True, pad_token_id=1,
    )
    return out.sequences[0, len(tokens):].tolist(), torch.cat(out.logits)


def write_requests(family, out):
    bpe = Tokenizer.from_file(str(out / family / "tokenizer.json"))
    base = transformers.AutoModelForCausalLM.from_pretrained(out / family).eval()
    models = {None: base}
    for name in ADAPTERS:
        fresh = transformers.AutoModelForCausalLM.from_pretrained(out / family)
        models[name] = PeftModel.from_pretrained(fresh, out / "adapters" / f"{family}-{name}").eval()
    requests, logits = [], {}
    for number, prompt in enumerate(PROMPTS):
        adapter = [None, *ADAPTERS][number % (len(ADAPTERS) + 1)]
        tokens = bpe.encode(prompt).ids
        new, scores = answer(models[adapter], tokens)
        best = scores.topk(2).values
        if (best[:, 0] - best[:, 1]).min() < MARGIN:
            continue
        if adapter:
            plain = answer(base, tokens)[1]
            change = (plain[0] - scores[0]).norm() / scores[0].norm()
            assert change > 0.25, f"{family} {adapter}: changes the logits by {change:.2f} only"
        logits[str(len(requests))] = scores.contiguous()
        text = bpe.decode(new)
        requests.append(dict(prompt=prompt, adapter=adapter, prompt_tokens=tokens, tokens=new, text=text))
    assert {r["adapter"] for r in requests} == {None, *ADAPTERS} and len(requests) >= 8, len(requests)
    print(family, len(requests), "requests;", sum(r["tokens"][-1] == 0 for r in requests), "end by themselves")
    (out / f"{family}-requests.json").write_text(json.dumps(requests, indent=1, ensure_ascii=False) + "\n")
    save_file(logits, out / f"{family}-logits.safetensors")


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, required=True)
    out = parser.parse_args().out
    for family in CONFIGS:
        directory = out / family
        shutil.rmtree(directory, ignore_errors=True)
        new_model(family).save_pretrained(directory)
        tokenizer(family).save(str(directory / "tokenizer.json"), pretty=False)
        for name in ADAPTERS:
            make_adapter(family, name, out)
        write_requests(family, out)
    size = sum(f.stat().st_size for f in out.rglob("*") if f.is_file())
    print(f"{size / 1e6:.2f} MB")
    assert size < LIMIT


main()
