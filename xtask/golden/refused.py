"""Adapters that PEFT writes and that a reader of A and B alone would compute wrongly: all have to be refused.

Made in stage `old` on the Mixtral checkpoint, one expert of one layer, so that they stay small.
"""

import json
import shutil

from adapters import draw
from families import load_model

EXPERT = r".*layers\.0\..*experts\.1\.w[123]"
# name -> (configuration, why)
REFUSED = {
    "dora": (dict(use_dora=True), "use_dora: magnitude vectors change the norm of the weights"),
    "lora-bias": (dict(lora_bias=True), "lora_bias: B carries a bias vector"),
    "bias": (dict(bias="all"), "bias: the base's biases were trained"),
    "modules-to-save": (dict(modules_to_save=["lm_head"]), "modules_to_save: a whole module was trained"),
    "pissa": (dict(init_lora_weights="pissa"), "init_lora_weights: the base weights were changed"),
    "overlap": (
        dict(rank_pattern={"layers.0.block_sparse_moe.experts.1.w1": 4, "experts.1.w1": 2}),
        "rank_pattern: PEFT sorted the keys when it saved, the first match is 2 and the tensors have rank 4; "
        "PEFT cannot load this file either",
    ),
    "ia3": (None, "peft_type: IA3"),
}


def make_refused(out):
    """Writes `out/refused/<name>` and the reasons as `out/refused.json`."""
    from peft import IA3Config, LoraConfig, get_peft_model

    for name, (config, _) in REFUSED.items():
        directory = out / "refused" / name
        shutil.rmtree(directory, ignore_errors=True)
        if config is None:
            config = IA3Config(target_modules=EXPERT, feedforward_modules=[])
        else:
            config = LoraConfig(r=3, lora_alpha=6, target_modules=EXPERT, **config)
        model = get_peft_model(load_model(out / "checkpoints" / "mixtral"), config)
        if name != "ia3":
            draw(model, name)
        model.save_pretrained(directory, save_embedding_layers=False)
        (directory / "README.md").unlink()
    reasons = [dict(adapter=f"refused/{n}", checkpoint="checkpoints/mixtral", why=w) for n, (_, w) in REFUSED.items()]
    (out / "refused.json").write_text(json.dumps(reasons, indent=2) + "\n")
