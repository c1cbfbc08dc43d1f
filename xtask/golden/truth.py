"""An independent answer: the layer in NumPy and f64, from dense weights and PEFT's own `get_delta_weight`.

It shares no code with the Hugging Face blocks; `build.py` compares both and stops if they differ.
"""

import numpy as np

from families import moe_block


def f64(tensor):
    return tensor.detach().double().numpy()


def router_of(model, layer):
    block = moe_block(model, layer)
    router = block.router if hasattr(block, "router") else block.gate
    bias = getattr(router, "bias", None)
    correction = getattr(router, "e_score_correction_bias", None)
    return (
        f64(router.weight),
        None if bias is None else f64(bias),
        None if correction is None else f64(correction),
    )


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def route(config, router, x):
    """ids `[T, k]` (best first), weights `[T, k]`, the smallest gap to another choice `[T]`, and notes `[T]`: whether
    group limit or correction bias changed the choice, whether the choice is the same for either value (0 or -inf) that
    transformers 4 and 5 give to experts outside the chosen groups."""
    weight, bias, correction = router
    k, kind = config.num_experts_per_tok, config.model_type
    logits = x @ weight.T + (0 if bias is None else bias)
    if kind == "gpt_oss":
        choice = logits
    elif kind == "deepseek_v3":
        scores = 1 / (1 + np.exp(-logits))
        choice = scores + correction
    else:
        scores = softmax(logits)
        choice = scores
    free = choice if kind != "deepseek_v3" else scores
    gap = np.full(len(x), np.inf)
    stable = np.full(len(x), True)
    grouped = kind == "deepseek_v3" or (kind == "deepseek_v2" and config.topk_method == "group_limited_greedy")
    if grouped:
        groups = choice.reshape(len(x), config.n_group, -1)
        best = np.sort(groups, -1)[..., ::-1]
        group_scores = best[..., :2].sum(-1) if kind == "deepseek_v3" else best[..., 0]
        order = np.argsort(-group_scores, -1)
        ranked = np.take_along_axis(group_scores, order, -1)
        if config.topk_group < config.n_group:
            gap = ranked[:, config.topk_group - 1] - ranked[:, config.topk_group]
        keep = np.zeros(group_scores.shape, bool)
        np.put_along_axis(keep, order[:, : config.topk_group], True, -1)
        choice = np.where(np.repeat(keep, groups.shape[-1], -1), choice, -np.inf)
    order = np.argsort(-choice, -1, kind="stable")
    ids = order[:, :k]
    ranked = np.take_along_axis(choice, order[:, : k + 1], -1)
    with np.errstate(invalid="ignore"):
        gap = np.minimum(gap, (ranked[:, :-1] - ranked[:, 1:]).min(-1))
    if kind == "deepseek_v3":
        stable = ranked[:, k - 1] > 1e-3
    unlimited = np.sort(np.argsort(-free, -1)[:, :k], -1)
    changed = (np.sort(ids, -1) != unlimited).any(-1)

    if kind == "gpt_oss":
        weights = softmax(np.take_along_axis(logits, ids, -1))
    else:
        weights = np.take_along_axis(scores, ids, -1)
        if kind == "mixtral" or (kind != "deepseek_v2" and config.norm_topk_prob):
            weights = weights / weights.sum(-1, keepdims=True)
        if kind.startswith("deepseek"):
            weights = weights * config.routed_scaling_factor
    return ids, weights, gap, changed, stable


def dense_experts(model, layer, adapter=None):
    """gate, up `[E, I, H]`, down `[E, H, I]`, their biases, deltas included. The model has to be in f64."""
    config = (model.base_model.model if adapter else model).config
    experts = moe_block(model, layer).experts
    if hasattr(experts, "__len__"):  # one module an expert
        names = ("w1", "w3", "w2") if hasattr(experts[0], "w1") else ("gate_proj", "up_proj", "down_proj")
        gate, up, down = (np.stack([f64(linear(getattr(e, n), adapter)) for e in experts]) for n in names)
        return gate, up, down, None
    deltas = {}
    while hasattr(experts, "parameter_name"):
        if adapter in experts.lora_A:
            deltas[experts.parameter_name] = f64(experts.get_delta_weight(adapter))
        experts = experts.base_layer
    gate_up = f64(experts.gate_up_proj) + deltas.get("gate_up_proj", 0)
    down = f64(experts.down_proj) + deltas.get("down_proj", 0)
    if config.model_type != "gpt_oss":
        gate, up = np.split(gate_up, 2, axis=1)
        return gate, up, down, None
    gate_up, down = gate_up.transpose(0, 2, 1), down.transpose(0, 2, 1)
    b13 = f64(experts.gate_up_proj_bias)
    return gate_up[:, 0::2], gate_up[:, 1::2], down, (b13[:, 0::2], b13[:, 1::2], f64(experts.down_proj_bias))


def linear(module, adapter):
    if adapter and hasattr(module, "base_layer"):
        weight = module.base_layer.weight
        return weight + module.get_delta_weight(adapter) if adapter in module.lora_A else weight
    return module.weight


def forward(x, ids, weights, experts):
    """The routed experts' output `[T, H]`."""
    gate, up, down, biases = experts
    out = np.zeros_like(x)
    for t in range(len(x)):
        for e, w in zip(ids[t], weights[t]):
            g, u = gate[e] @ x[t], up[e] @ x[t]
            if biases:
                g = np.minimum(g + biases[0][e], 7.0)
                u = np.clip(u + biases[1][e], -7.0, 7.0)
                h = (u + 1) * g / (1 + np.exp(-1.702 * g))
                y = down[e] @ h + biases[2][e]
            else:
                y = down[e] @ (g / (1 + np.exp(-g)) * u)
            out[t] += w * y
    return out
