"""model.py: the fast paths against slow ones, sites, loss, generate."""

import math
from collections import Counter

import pytest
import torch
import torch.nn.functional as F

from model import GPT, GPTConfig, KVCache, Linear, generate, rope, sample, sweep

torch.set_num_threads(1)
V, T, L, H, C = 97, 20, 2, 4, 32
CONFIGS = {
    "plain": {},
    "gpt2": dict(learned_pos=True, act="gelu_tanh", tie=True),
    "neox": dict(parallel="two_norms", rotary_pct=0.5),
    "cohere": dict(parallel="one_norm", norm_bias=False, logit_scale=0.25, tie=True, n_kv_head=2),
    "llama": dict(
        norm="rms",
        gated=True,
        act="silu",
        n_kv_head=2,
        qkv_bias=False,
        attn_bias=False,
        mlp_bias=False,
    ),
    "qwen3": dict(norm="rms", gated=True, act="silu", n_kv_head=1, qk_norm="head", head_dim=16),
    "gemma2": dict(
        norm="rms",
        post_norm=True,
        attn_softcap=5.0,
        logit_softcap=3.0,
        windows=[6, 0],
        embed_scale=5.7,
    ),
    "gemma3": dict(
        norm="rms",
        qk_norm="head",
        windows=[6, 0],
        rope_base_local=100.0,
        attn_scale=0.2,
        gated=True,
    ),
    "mistral": dict(norm="rms", gated=True, act="silu", windows=[5, 5], n_kv_head=2),
    "olmo2": dict(
        norm="rms",
        qk_norm="all",
        pre_norm=False,
        post_norm=True,
        gated=True,
        act="silu",
        n_kv_head=2,
    ),
    "smear": dict(smear_keys=True),
}


def make(name="plain", seed=0, **more):
    """A small model whose every parameter is random, so that every switch matters."""
    torch.manual_seed(seed)
    shape = dict(vocab_size=V, block_size=64, n_layer=L, n_head=H, n_embd=C)
    model = GPT(GPTConfig(**shape | CONFIGS[name] | more))
    with torch.no_grad():
        for p in model.parameters():
            p += 0.2 * torch.randn_like(p)
    return model


@pytest.fixture
def idx():
    return torch.randint(V, (3, T), generator=torch.Generator().manual_seed(1))


def naive(model, idx):
    """The forward pass of one row again, with loops over heads and queries (sequential blocks without q/k norm)."""
    c, x = model.config, model.wte(idx) * model.config.embed_scale
    for i, block in enumerate(model.blocks):
        attn, h, out = block.attn, block.norm1(x), []
        q, k, v = attn.qkv(h).split(
            [n * c.head_dim for n in (c.n_head, c.n_kv_head, c.n_kv_head)], dim=-1
        )
        for head in range(c.n_head):
            group = head // (c.n_head // c.n_kv_head)
            cut = lambda t, n: t[:, n * c.head_dim : (n + 1) * c.head_dim]
            qh, kh, vh = turn(cut(q, head)), turn(cut(k, group)), cut(v, group)
            rows = []
            for t in range(len(idx)):
                window = (c.windows or [0] * L)[i]
                first = max(0, t - window + 1) if window else 0
                score = (kh[first : t + 1] @ qh[t]) / math.sqrt(c.head_dim)
                if c.attn_softcap:
                    score = c.attn_softcap * torch.tanh(score / c.attn_softcap)
                rows.append(score.softmax(0) @ vh[first : t + 1])
            out.append(torch.stack(rows))
        x = x + attn.post_norm(attn.proj(torch.cat(out, -1)))
        x = x + block.mlp(block.norm2(x))
    return model.unembed(model.final(x))


def turn(x, base=10000.0):
    """Rotary positions by complex numbers, for x (T, D): entry j is paired with j + D/2."""
    half = x.shape[1] // 2
    angle = torch.arange(len(x))[:, None] * base ** (-torch.arange(half) / half)
    z = torch.complex(x[:, :half], x[:, half:]) * torch.polar(torch.ones_like(angle), angle)
    return torch.cat((z.real, z.imag), -1)


@pytest.mark.parametrize("name", ["plain", "llama", "mistral", "gemma2"])
def test_forward_equals_the_naive_loops(name, idx):
    model = make(name)
    torch.testing.assert_close(model(idx)[0], naive(model, idx[0]), atol=2e-5, rtol=1e-4)


def test_rotary_by_hand():
    cos, sin = rope(GPTConfig(n_head=1, n_embd=4), torch.tensor([[0, 1, 7]]))
    assert cos.shape == (1, 1, 3, 2)
    torch.testing.assert_close(
        sin[0, 0],
        torch.tensor([[0, 0], [math.sin(1), math.sin(0.01)], [math.sin(7), math.sin(0.07)]]),
    )
    scaling = dict(
        rope_type="llama3",
        factor=8.0,
        low_freq_factor=1.0,
        high_freq_factor=4.0,
        original_max_position_embeddings=64,
    )
    c = GPTConfig(n_head=1, n_embd=6, rope_base=1000.0, rope_scaling=scaling)
    angle = torch.acos(rope(c, torch.tensor([[1]]))[0])[0, 0, 0]
    # wavelengths 6.28 (< 64/4: kept), 62.8 (ramp: 64/62.8 turns), 628 (> 64: stretched)
    ramp = (64 / (20 * math.pi) - 1) / 3
    torch.testing.assert_close(
        angle, torch.tensor([1.0, 0.1 * (ramp + (1 - ramp) / 8), 0.01 / 8]), atol=1e-5, rtol=1e-3
    )
    with pytest.raises(KeyError):
        rope(GPTConfig(rope_scaling={"rope_type": "yarn"}), torch.tensor([[1]]))


@pytest.mark.parametrize("name", CONFIGS)
def test_cache_in_odd_chunks_equals_one_pass(name, idx):
    model, cache = make(name), KVCache(GPTConfig(V, 64, L, H, C, **CONFIGS[name]), 3, 30)
    parts = [model(part, cache=cache) for part in idx.split([7, 1, 1, 8, 3], dim=1)]
    torch.testing.assert_close(torch.cat(parts, 1), model(idx), atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("name", CONFIGS)
def test_padding_changes_nothing(name, idx):
    model = make(name)
    wide, mask = torch.full((3, 26), 5), torch.zeros(3, 26, dtype=torch.bool)
    for row, start in enumerate((6, 0, 2)):  # left, right, both
        wide[row, start : start + T], mask[row, start : start + T] = idx[row], True
    out = model(wide, mask=mask)
    assert out.isfinite().all()
    torch.testing.assert_close(out[mask].view(3, T, V), model(idx), atol=2e-5, rtol=1e-4)
    cache = KVCache(model.config, 3, 40)  # left-padded prompts, then more tokens
    mask = torch.arange(T)[None] >= torch.tensor([[5], [0], [12]])
    model(idx, mask=mask, cache=cache)
    more = model(idx[:, :3], cache=cache)
    for row in range(3):
        alone = model(torch.cat((idx[row][mask[row]], idx[row, :3]))[None])[0, -3:]
        torch.testing.assert_close(more[row], alone, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("name", CONFIGS)
def test_written_out_attention_equals_sdpa(name, idx):
    model, site = make(name), "blocks.1.attn.pattern"
    with model.patch({"blocks.0.attn.pattern": lambda p: p, site: lambda p: p}):
        torch.testing.assert_close(model(idx), make(name)(idx), atol=2e-5, rtol=1e-4)
    pattern = model.capture(idx, [site])[site]
    assert pattern.shape == (3, H, T, T) and (pattern.triu(1) == 0).all()
    torch.testing.assert_close(pattern.sum(-1), torch.ones(3, H, T))


# --------------------------------------------------------------------------------------------------------------- loss


@pytest.mark.parametrize("name", ["plain", "cohere", "gemma2"])
def test_loss_and_gradients_equal_the_plain_formula(name, idx):
    model, g = make(name), torch.Generator().manual_seed(2)
    targets, weights = (
        torch.randint(V, (3, T), generator=g),
        torch.rand(3, T, generator=g) * (torch.rand(3, T, generator=g) < 0.6),
    )
    targets[0, :3] = -100
    model.loss(idx, targets, weights).backward()
    fast = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    plain = F.cross_entropy(
        model(idx).flatten(0, 1), targets.flatten(), reduction="none", ignore_index=-100
    )
    w = (weights * (targets != -100)).flatten()
    loss = (plain * w).sum() / w.sum()
    loss.backward()
    torch.testing.assert_close(model.loss(idx, targets, weights), loss)
    for a, p in zip(fast, model.parameters()):
        torch.testing.assert_close(a, p.grad, atol=1e-6, rtol=1e-4)


def test_loss_defaults_slices_and_denominator(idx, monkeypatch):
    model, targets = make(), idx.roll(-1, 1)
    plain = F.cross_entropy(model(idx).flatten(0, 1), targets.flatten())
    torch.testing.assert_close(model.loss(idx, targets), plain)
    torch.testing.assert_close(model.loss(idx, targets, denom=torch.tensor(10.0)), plain * 6)
    torch.testing.assert_close(model.token_loss(idx, targets).mean(), plain)
    seen = []
    multiply = (
        torch.Tensor.__matmul__
    )  # the loss's own products: a slice of rows times the unembedding
    monkeypatch.setattr(
        torch.Tensor, "__matmul__", lambda a, b: seen.append(a.shape) or multiply(a, b)
    )
    weights = torch.zeros(3, T)
    weights[1, 4:9] = 1
    with torch.no_grad():
        model.loss(idx, targets, weights)
    assert [s for s in seen if s[-1] == C] == [
        (5, C)
    ]  # five rows have weight: five rows are unembedded


def test_large_vocabulary_is_never_held_whole():
    model = GPT(GPTConfig(vocab_size=2**17, block_size=128, n_layer=1, n_head=1, n_embd=8))
    idx = torch.randint(2**17, (4, 128))
    with torch.profiler.profile(
        profile_memory=True, activities=[torch.profiler.ProfilerActivity.CPU]
    ) as profile:
        model.loss(idx, idx).backward()
    largest = max(
        e.cpu_memory_usage
        for e in profile.events()
        if e.name == "aten::empty" or e.name == "aten::mm"
    )
    assert largest < idx.numel() * 2**17 * 4 / 2
    torch.testing.assert_close(
        model.loss(idx, idx), F.cross_entropy(model(idx).flatten(0, 1), idx.flatten())
    )


def test_no_weight_no_gradient(idx):
    model = make()
    loss = model.loss(idx, idx, torch.zeros(3, T))
    loss.backward()
    assert loss == 0 and all(
        p.grad.isfinite().all() and not p.grad.any() for p in model.parameters()
    )
    other = idx.clone()
    other[:, 5] = 1  # a target without weight is nothing to the loss
    weights = torch.ones(3, T)
    weights[:, 5] = 0
    assert model.loss(idx, idx, weights) == model.loss(idx, other, weights)


def test_bf16_autocast_is_close(idx):
    model = make()
    exact = torch.autograd.grad(model.loss(idx, idx), model.head.weight)[0]
    with torch.autocast("cpu", torch.bfloat16):
        rough = torch.autograd.grad(model.loss(idx, idx), model.head.weight)[0]
    assert (
        rough.dtype == torch.float32
        and F.cosine_similarity(exact.flatten(), rough.flatten(), dim=0) > 0.999
    )


# -------------------------------------------------------------------------------------------------------------- sites


def test_sites_have_their_shapes_and_values(idx):
    model, D = make(), C // H
    stream, inner = (
        (3, T, C),
        {"attn.pattern": (3, H, T, T), "attn.z": (3, T, H, D), "mlp.act": (3, T, 4 * C)},
    )
    shapes = (
        dict.fromkeys(("embed", "final", "resid_pre", "resid_post", "attn.out", "mlp.out"), stream)
        | inner
    )
    sites = [s if s in ("embed", "final") else f"blocks.1.{s}" for s in shapes]
    acts = model.capture(idx, sites)
    assert [tuple(acts[s].shape) for s in sites] == list(shapes.values())
    a = {s.removeprefix("blocks.1."): v for s, v in acts.items()}
    torch.testing.assert_close(a["resid_post"], a["resid_pre"] + a["attn.out"] + a["mlp.out"])
    torch.testing.assert_close(
        a["attn.out"], model.blocks[1].attn.proj(a["attn.z"].flatten(2)), atol=1e-5, rtol=1e-4
    )
    torch.testing.assert_close(model.unembed(a["final"]), model(idx), atol=1e-5, rtol=1e-4)
    assert not any(m._forward_hooks for m in model.modules())


def test_patching_a_head_equals_cutting_its_columns(idx):
    model, site, D = make(), "blocks.0.attn.z", C // H

    def drop(z):
        z = z.clone()
        z[:, :, 2] = 0
        return z

    with model.patch({site: drop}):
        patched, new = model(idx), generate(model, [[1, 2, 3], [4]], 6, temperature=0)
        assert not model.capture(idx, [site])[site][:, :, 2].any()  # a capture sees what is patched
    with torch.no_grad():
        model.blocks[0].attn.proj.weight[:, 2 * D : 3 * D] = 0
    torch.testing.assert_close(patched, model(idx), atol=1e-5, rtol=1e-4)
    assert new == generate(model, [[1, 2, 3], [4]], 6, temperature=0)


def test_patches_under_autograd_nested_and_after_errors(idx):
    model, bias = make(), torch.zeros(C, requires_grad=True)
    with (
        model.patch({"blocks.0.resid_post": lambda x: x + bias}),
        model.patch({"final": lambda x: 2 * x}),
    ):
        model.loss(idx, idx).backward()
    assert bias.grad.abs().sum() > 0
    with pytest.raises(RuntimeError, match="boom"), model.patch({"final": lambda x: x}):
        raise RuntimeError("boom")
    assert not any(m._forward_hooks for m in model.modules())
    with pytest.raises(KeyError, match=r"blocks\.1\.attn\.z"):
        model.capture(idx, ["blocks.1.attn.zz"])
    with pytest.raises(KeyError, match="2 layers"):
        model.capture(idx, ["blocks.2.mlp.out"])


# ----------------------------------------------------------------------------------------------------------- generate

PROMPTS = [[1, 2, 3], [4] * 9, [7, 8], [3, 3, 9, 10, 11]]


@pytest.mark.parametrize("name", CONFIGS)
def test_greedy_batch_equals_one_by_one_equals_uncached(name):
    model = make(name)
    together = generate(model, PROMPTS, 8, temperature=0)
    assert together == [generate(model, [p], 8, temperature=0)[0] for p in PROMPTS]
    for prompt, new in zip(PROMPTS, together):
        ids = list(prompt)
        for token in new:
            assert model(torch.tensor([ids]))[0, -1].argmax() == token
            ids.append(token)


def test_few_rows_are_multiplied_alike():
    for shape, bias in ((48, 30), False), ((16, 4096), False), ((16, 32), True):
        linear, x = Linear(*shape, bias=bias), torch.randn(2, 33, shape[0])
        for part in x[0, :1], x[:, :5], x[:, :16].transpose(0, 1), x:
            expected = F.linear(part, linear.weight, linear.bias)
            torch.testing.assert_close(linear(part), expected, atol=1e-6, rtol=1e-5)
            got, want = (
                torch.autograd.grad(y.square().sum(), linear.weight)[0]
                for y in (linear(part), expected)
            )
            torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-4)


def test_stop_ends_a_row_and_frees_its_place(monkeypatch):
    model = make()
    free = generate(model, PROMPTS, 8, temperature=0)
    stop = free[1][2]
    rows, hidden = [], model.hidden
    monkeypatch.setattr(
        model, "hidden", lambda idx, *a, **k: rows.append(len(idx)) or hidden(idx, *a, **k)
    )
    short = generate(model, PROMPTS, 8, temperature=0, stop=(stop,))
    cut = [f[: f.index(stop) + 1] if stop in f else f for f in free]
    assert short == cut
    assert rows == [
        sum(len(c) > i for c in cut) for i in range(max(map(len, cut)))
    ]  # a row of four is an eighth


def test_sampling():
    model = make()
    greedy = generate(model, PROMPTS, 8, temperature=0)
    assert generate(model, PROMPTS, 8, temperature=1e-40) == greedy
    assert generate(model, PROMPTS, 8, top_k=1) == greedy == generate(model, PROMPTS, 8, top_p=1e-6)
    assert (
        generate(model, PROMPTS, 8, seed=3)
        == generate(model, PROMPTS, 8, seed=3)
        != generate(model, PROMPTS, 8, seed=4)
    )
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0]).expand(20000, -1)
    share = lambda **k: (
        sample(logits, rng=torch.Generator().manual_seed(0), **k).flatten().bincount(minlength=4)
        / 20000
    )
    torch.testing.assert_close(share(), logits[0].softmax(0), atol=0.015, rtol=0)
    torch.testing.assert_close(
        share(temperature=0.5), (2 * logits[0]).softmax(0), atol=0.015, rtol=0
    )
    torch.testing.assert_close(share(top_k=2)[:2], logits[0, :2].softmax(0), atol=0.015, rtol=0)
    assert (share(top_p=0.8) > 0).tolist() == [True, True, False, False]  # .64 + .24 reach .8


def test_process_sees_its_own_row_and_its_logits_are_sampled():
    """Each prompt may say only its own letters, in its own order, then the stop: rows leave, the others go on."""
    model, orders = make(), [[5, 6], [7, 8, 9, 5], [11], [12, 13, 14]]
    free, shapes = generate(model, PROMPTS, 5, temperature=0), []

    def process(logits, alive, out):
        shapes.append((tuple(logits.shape), logits.dtype))
        allowed = torch.full_like(logits, -torch.inf)
        for row, prompt in enumerate(alive):
            allowed[row, (orders[prompt] + [0])[len(out[prompt])]] = 0
        return logits + allowed

    assert generate(model, PROMPTS, 9, stop=(0,), process=process) == [
        order + [0] for order in orders
    ]
    assert shapes == [((n, V), torch.float32) for n in (4, 4, 3, 2, 1)]
    assert (
        generate(model, PROMPTS, 5, temperature=0, process=lambda logits, alive, out: logits)
        == free
    )
    ban = lambda logits, alive, out: logits.index_fill(
        1, torch.tensor([row[0] for row in free]), -torch.inf
    )
    assert not {row[0] for row in free} & set(sum(generate(model, PROMPTS, 5, process=ban), []))


def test_errors(idx):
    model = make()
    with pytest.raises(ValueError, match="block_size 64"):
        model(torch.zeros(1, 65, dtype=torch.long))
    with pytest.raises(ValueError, match="block_size 64"):
        generate(model, [[1] * 60], 5)
    with pytest.raises(ValueError, match="at least one"):
        generate(model, [[1], []], 5)
    with pytest.raises(ValueError, match="cache holds 4"):
        model(idx, cache=KVCache(model.config, 3, 4))
    odd = dict(head_dim=7), dict(rotary_pct=0.4), dict(norm="batch"), dict(act="relu")
    for wrong in (dict(n_head=5), dict(n_kv_head=3), dict(windows=[1]), *odd):
        with pytest.raises(ValueError):
            GPTConfig(**dict(n_layer=2, n_head=4, n_embd=32) | wrong)


def test_cache_rows_can_repeat(idx):
    model = make()
    cache = KVCache(model.config, 3, 30)
    model(idx, cache=cache)
    cache.keep(torch.tensor([2, 0, 2]))
    after = model(idx[:, :2], cache=cache)
    rows = torch.cat((idx[[2, 0, 2]], idx[:, :2]), 1)
    torch.testing.assert_close(after, model(rows)[:, -2:], atol=2e-5, rtol=1e-4)


def test_compiled_blocks_still_honour_patches(idx):
    model = make()
    plain = model(idx).detach()
    for block in model.blocks:
        block.compile(backend="eager")  # dynamo without a compiler: quick, and as deaf to hooks
    torch.testing.assert_close(model(idx), plain)
    with model.patch({"blocks.1.attn.z": lambda z: 0 * z}):
        assert not torch.allclose(model(idx), plain)
    torch.testing.assert_close(model(idx), plain)


def test_whatever_is_compiled_patches_work(idx):
    model = make()
    plain = model(idx).detach()
    whole = torch.compile(model, backend="eager")
    model.blocks[0].attn.compile(backend="eager")
    torch.testing.assert_close(whole(idx), plain)
    with model.patch({"blocks.0.attn.z": lambda z: 0 * z}):
        assert not torch.allclose(whole(idx), plain)
    torch.testing.assert_close(whole(idx), plain)


# ------------------------------------------------------------------------------ samples, bad input


def test_samples_share_one_prefill(monkeypatch):
    model, shapes, hidden = make(), [], GPT.hidden

    def counted(self, idx, *args, **kwargs):
        shapes.append(tuple(idx.shape))
        return hidden(self, idx, *args, **kwargs)

    monkeypatch.setattr(GPT, "hidden", counted)
    many = generate(model, [[1, 2, 3], [4, 5]], 6, seed=0, samples=5)
    assert len(many) == 10 and shapes == [(2, 3)] + [(10, 1)] * 5
    greedy = generate(model, [[1, 2, 3], [4, 5]], 6, temperature=0)
    assert generate(model, [[1, 2, 3], [4, 5]], 6, temperature=0, samples=3) == [
        g for g in greedy for _ in range(3)
    ]


def test_samples_have_the_models_distribution():
    model, n = make(), 4000
    first = torch.tensor(
        [row[0] for row in generate(model, [[1, 2, 3], [9]], 1, seed=0, samples=n)]
    ).view(2, n)
    for prompt, drawn in zip(([1, 2, 3], [9]), first):
        p = model(torch.tensor([prompt]))[0, -1].softmax(0)
        share = drawn.bincount(minlength=V) / n
        assert ((share - p).abs() < 5 * (p * (1 - p) / n).sqrt() + 1e-3).all()


def test_finished_rows_leave_when_they_are_an_eighth(monkeypatch):
    model, rows, hidden = make(), [], GPT.hidden
    free = generate(model, [[1, 2, 3]], 12, seed=1, samples=32)
    stop = [token for token, _ in Counter(row[0] for row in free).most_common(4)]

    def counted(self, idx, *args, **kwargs):
        rows.append(len(idx))
        return hidden(self, idx, *args, **kwargs)

    monkeypatch.setattr(GPT, "hidden", counted)
    out = generate(model, [[1, 2, 3]], 12, seed=1, samples=32, stop=stop)
    assert all(not set(row[:-1]) & set(stop) for row in out)
    assert all(row[-1] in stop or len(row) == 12 for row in out)
    for step, batch in enumerate(rows[1:], 1):
        alive = sum(len(row) > step for row in out)
        assert batch >= alive and (batch == alive or alive >= batch * 7 / 8)


@pytest.mark.parametrize(
    "more, match",
    [
        (dict(temperature=-1), "temperature -1"),
        (dict(temperature=math.nan), "temperature nan"),
        (dict(process=lambda logits, alive, out: logits - torch.inf), "no token is allowed"),
        (dict(process=lambda logits, alive, out: logits * torch.nan), "not finite"),
    ],
)
def test_generate_refuses(more, match):
    with pytest.raises(ValueError, match=match):
        generate(make(), [[1, 2]], 3, **more)


def test_ids_outside_the_vocabulary_are_an_error():
    for prompts in [[-1, 2]], [[V]]:
        with pytest.raises(IndexError):
            generate(make(), prompts, 3)


# ------------------------------------------------------------------------------------------- sweep


def put_first(value):
    """An intervention's function: `value` (B, C) in place of the first column."""

    def put(x):
        x = x.clone()
        x[:, 0] = value
        return x

    return put


def plain_patch(model, idx, mask, tail, functions):
    """The same by a whole forward pass: what `sweep` has to equal, (B, tail, C)."""

    def on_tail(fn):
        return lambda x: torch.cat((x[:, :-tail], fn(x[:, -tail:])), 1)

    sites = {
        ("embed" if l < 0 else f"blocks.{l}.resid_post"): on_tail(fn) for l, fn in functions.items()
    }
    with model.patch(sites):
        return model.hidden(idx, mask)[:, -tail:]


@pytest.mark.parametrize("name", [name for name in CONFIGS if name != "smear"])
def test_sweep_equals_whole_passes(name, idx):
    model, g = make(name, n_layer=2), torch.Generator().manual_seed(3)
    mask = torch.arange(T)[None] >= torch.tensor([[5], [0], [12]])
    for tail in 1, 4:
        z = torch.randn(3, 3, C, generator=g)
        swaps = [{layer: put_first(z[layer + 1])} for layer in (-1, 0, 1)]
        holds = [{k: put_first(z[k + 1]) for k in range(layer, L)} for layer in (0, -1)]
        steer = {0: lambda x: x + z[0][:, None]}
        interventions = [*swaps, {}, *holds, steer, {1: torch.zeros_like, -1: put_first(z[0])}]
        for real in None, mask:
            fast = sweep(model, idx, interventions, tail, real)
            assert fast.shape == (3, len(interventions), tail, C)
            for v, functions in enumerate(interventions):
                slow = plain_patch(model, idx, real, tail, functions)
                torch.testing.assert_close(fast[:, v], slow, atol=3e-5, rtol=1e-3)


def test_sweep_refuses(idx):
    for tail, name in ((0, "plain"), (T, "plain"), (1, "smear")):
        with pytest.raises(ValueError, match="sweep over"):
            sweep(make(name), idx, [{0: torch.zeros_like}], tail)
    for layer in -2, L:
        with pytest.raises(ValueError, match=f"allowed: -1 to {L - 1}"):
            sweep(make("plain"), idx, [{}, {layer: torch.zeros_like}])
