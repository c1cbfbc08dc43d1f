"""The layers, batches and adapters that every system is measured on, the truth, and the clock. bf16, one layer."""

MODELS = {
    # name: experts, top_k, hidden, intermediate
    "qwen3-30b": (128, 8, 2048, 768),
    "mixtral-8x7b": (8, 2, 4096, 14336),
    "olmoe": (64, 8, 2048, 1024),
    "deepseek-v3-tp8": (256, 8, 7168, 256),
    "gpt-oss-20b": (32, 4, 2880, 2880),
}
TOKENS = [1, 4, 16, 64, 256, 1024, 4096, 8192]
# adapters, rank, share of tokens without an adapter
ADAPTERS = [(1, 16, 0.0), (8, 16, 0.0), (8, 64, 0.0), (32, 16, 0.25)]


def make(torch, model, tokens, slots, rank, base_share, seed=0, dev="cuda"):
    """A random layer with adapters and a batch. Equal arguments give equal tensors."""
    E, k, H, I = MODELS[model]
    g = torch.Generator(device=dev).manual_seed(seed)
    rn = lambda *s, scale=1.0: torch.randn(*s, generator=g, device=dev, dtype=torch.float32) * scale
    bf = torch.bfloat16

    def big(*s, scale):
        """In slices, to bound what f32 takes."""
        out = torch.empty(*s, device=dev, dtype=bf)
        for i in range(s[0]):
            out[i] = rn(*s[1:], scale=scale).to(bf)
        return out

    d = dict(E=E, k=k, H=H, I=I, T=tokens, L=slots, R=rank)
    d["x"] = rn(tokens, H).to(bf)
    logits = rn(tokens, E) + torch.linspace(0, 1.5, E, device=dev)  # a little skewed, as real routers are
    w, ids = torch.softmax(logits, -1).topk(k, -1)
    d["topk_w"] = (w / w.sum(-1, keepdim=True)).float().contiguous()
    d["topk_ids"] = ids.to(torch.int32).contiguous()
    d["w13"] = big(E, 2 * I, H, scale=H**-0.5)
    d["w2"] = big(E, H, I, scale=I**-0.5)
    slot = torch.randint(0, slots, (tokens,), generator=g, device=dev, dtype=torch.int32)
    if base_share:
        slot[torch.rand(tokens, generator=g, device=dev) < base_share] = -1
    d["slot"] = slot
    d["a13"] = big(slots, E, 2 * rank, H, scale=H**-0.5)
    d["b13"] = big(slots, E, 2 * I, rank, scale=0.3 * rank**-0.5)
    d["a2"] = big(slots, E, rank, I, scale=I**-0.5)
    d["b2"] = big(slots, E, H, rank, scale=0.3 * rank**-0.5)
    return d


def touched(d, lora):
    """What a batch touches at least, as `Touched` of the Rust side counts it."""
    ids, slot = d["topk_ids"].long(), d["slot"].long()
    on = slot >= 0 if lora else slot < -1
    pairs = (slot[on, None] * d["E"] + ids[on]).unique().numel()
    experts, lora_tokens = ids.unique().numel(), int(on.sum())
    base, adapter = 6 * d["H"] * d["I"], 6 * d["R"] * (d["H"] + d["I"])
    return dict(
        experts=experts,
        pairs=pairs,
        lora_tokens=lora_tokens,
        bytes=experts * base + pairs * adapter + 4 * d["T"] * d["H"],
        flops=d["k"] * (d["T"] * base + lora_tokens * adapter),
    )


def reference(torch, d):
    """The layer in f64, token by token."""
    x, I, R = d["x"].double(), d["I"], d["R"]
    out = torch.zeros(d["T"], d["H"], dtype=torch.float64, device=x.device)
    for t in range(d["T"]):
        s = int(d["slot"][t])
        for j in range(d["k"]):
            e = int(d["topk_ids"][t, j])
            gu = d["w13"][e].double() @ x[t]
            if s >= 0:
                a, b = d["a13"][s, e].double() @ x[t], d["b13"][s, e].double()
                gu = gu + torch.cat([b[:I] @ a[:R], b[I:] @ a[R:]])
            h = torch.nn.functional.silu(gu[:I]) * gu[I:]
            y = d["w2"][e].double() @ h
            if s >= 0:
                y = y + d["b2"][s, e].double() @ (d["a2"][s, e].double() @ h)
            out[t] += d["topk_w"][t, j].double() * y
    return out


def spread(torch, d, n=4):
    """n tokens spread over the batch: their indices, and a batch of their own."""
    idx = torch.linspace(0, d["T"] - 1, min(n, d["T"]), device=d["x"].device).long()
    return idx, dict(d, T=idx.numel(), **{k: d[k][idx] for k in ("x", "topk_w", "topk_ids", "slot")})


# Timed replays: this many, or fewer, but at least LEAST_RUNS, once they have taken MOST_US together.
RUNS, LEAST_RUNS, MOST_US = 20, 5, 60_000


def bench(torch, fn, flush={}):
    """Median microseconds of a CUDA graph of `fn`, with a cold and clean L2."""
    if not flush:
        written = torch.empty(256 * 1024 * 1024 // 4, dtype=torch.float32, device="cuda")
        flush.update(written=written, read=torch.zeros_like(written), sink=torch.empty((), device="cuda"))
    s = torch.cuda.Stream()
    s.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(s):
        for _ in range(2):  # some systems keep scratch per stream
            fn()
        s.synchronize()
        g = torch.cuda.CUDAGraph()
        g.capture_begin()  # torch.cuda.graph would empty the allocator's cache first, which takes longer than all else
        try:
            fn()
        finally:
            g.capture_end()
    torch.cuda.current_stream().wait_stream(s)
    g.replay()
    torch.cuda.synchronize()
    times = []
    while len(times) < RUNS and (len(times) < LEAST_RUNS or sum(times) < MOST_US):
        flush["written"].zero_()
        torch.sum(flush["read"], dim=0, out=flush["sink"])  # no dirty line is written back inside the timed region
        a, b = torch.cuda.Event(True), torch.cuda.Event(True)
        a.record()
        g.replay()
        b.record()
        torch.cuda.synchronize()
        times.append(a.elapsed_time(b) * 1e3)
    times.sort()
    return times[len(times) // 2]
