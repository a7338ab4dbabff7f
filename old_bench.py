"""Our speed beside what people would use instead: same process, same inputs, equal results asserted.

    python bench.py [mask train] [--device cuda]        # a table, and out/bench.json

Pairs are timed in turns, in random order, and a row gives the median of their ratios with its quartiles: a busy machine
shifts both sides alike. Peers are written here as plainly as people write them, or are installed libraries; one that is
missing is left out with a line that says so.
"""

import argparse
import json
import logging
import math
import random
import statistics
import sys
import tempfile
import time
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

import legacy as common
import data
import train_hapax
from model import GPT, GPTConfig
from model import generate as model_generate

# ------------------------------------------------------------------------------------------------------------- timing


@contextmanager
def stubs_taken_back(*packages):
    """Leaves sys.modules as it was where these packages are concerned: nothing else should take stubs for them."""
    theirs = lambda modules: {name: module for name, module in modules.items() if name.split(".")[0] in packages}
    before = theirs(sys.modules)
    try:
        yield
    finally:
        for name in theirs(sys.modules):
            del sys.modules[name]
        sys.modules.update(before)


def versus(what, ours, peers, device, rounds=15, tries=3):
    """Times `ours` beside each of `peers` {name: function}: a row a peer, ms of both, median ratio with quartiles."""
    sync = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    contenders, times = {"ours": ours} | peers, {}

    def seconds(f, repeat):
        sync()
        began = time.perf_counter()
        for _ in range(repeat):
            f()
        sync()
        return (time.perf_counter() - began) / repeat

    once = {name: min(seconds(f, 1) for _ in range(tries)) for name, f in contenders.items()}
    repeat = {name: 1 + int(0.02 / s) for name, s in once.items()}  # 20 ms a turn
    for _ in range(max(min(rounds, 5), min(rounds, int(20 / sum(once.values()))))):
        for name in random.sample(list(contenders), len(contenders)):
            times.setdefault(name, []).append(seconds(contenders[name], repeat[name]))
    rows = []
    for name in peers:
        ratios = [b / a for a, b in zip(times["ours"], times[name])]
        low, ratio, high = statistics.quantiles(ratios, n=4, method="inclusive")
        ours_ms, peer_ms = (1e3 * statistics.median(times[k]) for k in ("ours", name))
        rows.append(
            {
                "what": what,
                "peer": name,
                "ours_ms": ours_ms,
                "peer_ms": peer_ms,
                "ratio": ratio,
                "quartiles": [low, high],
            }
        )
    return rows


# --------------------------------------------------------------------------------------------------------------- mask


def mask(device):
    """The mask of Hapax: one thread on the CPU, against a Python set, a T x T comparison and a stable argsort."""
    torch.set_num_threads(1)

    def python_set(x):
        out = np.zeros((len(x), x.shape[1] - 1), bool)
        for i, row in enumerate(x.tolist()):
            seen = set()
            for t, pair in enumerate(zip(row, row[1:])):
                out[i, t] = pair in seen
                seen.add(pair)
        return torch.from_numpy(out)

    def broadcast(x):
        a, b = x[:, :-1], x[:, 1:]
        same = (a[:, :, None] == a[:, None, :]) & (b[:, :, None] == b[:, None, :])
        return same.tril(-1).any(2)

    def argsort(x, flat=True):
        pair = x[:, :-1] * 2**18 + x[:, 1:]
        if flat:  # all rows in one sort, as in the author's follow-up project
            pair = (pair + (torch.arange(len(x), device=x.device)[:, None] << 40)).view(1, -1)
        order = pair.argsort(dim=1, stable=True)
        value = pair.gather(1, order)
        again = F.pad(value[:, 1:] == value[:, :-1], (1, 0))
        return torch.zeros_like(again).scatter_(1, order, again).view(len(x), -1)

    text = "".join(data.load_text())
    ids = np.array(data.get_tokenizer("bpe:4096", text).encode(text))
    rows = []
    for B, T in (64, 2048), (16, 128):
        x = torch.from_numpy(data.windows(ids, np.random.default_rng(0), B, T + 1)).to(device)
        peers = {
            "Python set": python_set,
            "stable argsort": argsort,
            "... row by row": lambda x: argsort(x, False),
            "T x T comparison": broadcast,
        }
        for name, f in peers.items():
            assert torch.equal(train_hapax.repeated(x).cpu(), torch.cat([f(row) for row in x.split(4)]).cpu()), name
        size = 4 if T > 1000 else B  # the T x T comparison of all rows at once would fill the memory
        peers["T x T comparison"] = lambda x, size=size: [broadcast(rows) for rows in x.split(size)]
        timed = {name: lambda f=f, x=x: f(x) for name, f in peers.items()}
        rows += versus(f"mask, {B} x {T}", lambda x=x: train_hapax.repeated(x), timed, device, 9)
    return rows


# -------------------------------------------------------------------------------------------------------------- train


class PlainBlock(nn.Module):
    """A block of the plain GPT below: what people write after reading nanoGPT, with rotary positions."""

    def __init__(self, C, H):
        super().__init__()
        self.H, self.ln1, self.ln2 = H, nn.LayerNorm(C), nn.LayerNorm(C)
        self.c_attn, self.c_proj = nn.Linear(C, 3 * C), nn.Linear(C, C)
        self.c_fc, self.c_out = nn.Linear(C, 4 * C), nn.Linear(4 * C, C)

    def forward(self, x, cos, sin):
        B, T, C = x.shape
        q, k, v = (t.view(B, T, self.H, C // self.H).transpose(1, 2) for t in self.c_attn(self.ln1(x)).split(C, dim=2))
        turn = lambda t: t * cos + torch.cat((-t[..., t.shape[-1] // 2 :], t[..., : t.shape[-1] // 2]), -1) * sin
        y = F.scaled_dot_product_attention(turn(q), turn(k), v, is_causal=True)
        x = x + self.c_proj(y.transpose(1, 2).contiguous().view(B, T, C))
        return x + self.c_out(F.gelu(self.c_fc(self.ln2(x))))


class PlainGPT(nn.Module):
    """The peer: fused qkv, scaled_dot_product_attention, cross-entropy on all logits."""

    def __init__(self, c):
        super().__init__()
        self.wte, self.ln = nn.Embedding(c.vocab_size, c.n_embd), nn.LayerNorm(c.n_embd)
        self.blocks = nn.ModuleList(PlainBlock(c.n_embd, c.n_head) for _ in range(c.n_layer))
        self.head = nn.Linear(c.n_embd, c.vocab_size, bias=False)
        angle = torch.arange(c.block_size)[:, None] / 10000 ** (torch.arange(0, c.head_dim, 2) / c.head_dim)
        self.register_buffer("cos", torch.cat((angle, angle), 1).cos())
        self.register_buffer("sin", torch.cat((angle, angle), 1).sin())

    def forward(self, idx, targets):
        x, T = self.wte(idx), idx.shape[1]
        for block in self.blocks:
            x = block(x, self.cos[:T], self.sin[:T])
        logits = self.head(self.ln(x))
        return F.cross_entropy(logits.float().view(-1, logits.shape[-1]), targets.reshape(-1))


def copy_weights(ours, plain):
    """Puts our weights into the plain GPT, so that both compute the same loss."""
    ours = ours.state_dict()
    names = {"norm1": "ln1", "norm2": "ln2", "attn.qkv": "c_attn", "attn.proj": "c_proj", "mlp.up": "c_fc"}
    names |= {"mlp.down": "c_out", "final": "ln"}
    for old, new in names.items():
        ours = {k.replace(old, new): v for k, v in ours.items()}
    plain.load_state_dict(ours, strict=False)


def matmul_peak(device, dtype):
    """FLOP/s of a large matrix product on this machine, the best of ten."""
    n = 8192 if device.type == "cuda" else 2048
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    best = math.inf
    for _ in range(10):
        began = time.perf_counter()
        (a @ b).sum().item()
        best = min(best, time.perf_counter() - began)
    return 2 * n**3 / best


def train(device):
    """A training step (forward, loss, backward, clip, AdamW) of 6 x 384, context 256, vocabulary 4096, batch 16."""
    c, rows = GPTConfig(vocab_size=4096, block_size=256, n_layer=6, n_head=6, n_embd=384), []
    idx = torch.randint(4096, (16, 257), device=device)
    args = SimpleNamespace(lr=1e-4, weight_decay=0.1)
    matrices = 12 * c.n_layer * c.n_embd**2 + c.vocab_size * c.n_embd
    flops = 16 * 256 * (6 * matrices + 6 * c.n_layer * c.n_embd * 256)  # causal attention: half of the full square

    def stepper(model, dtype):
        env, opt = common.Env(device, dtype), common.optimizer(model, args)

        def step():
            with env.autocast():
                loss = model(idx[:, :-1], idx[:, 1:])
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            opt.step()
            opt.zero_grad(set_to_none=True)

        return step

    for dtype in (torch.float32, torch.bfloat16):
        peak = matmul_peak(device, dtype)
        for compiled in (False, True):
            torch.manual_seed(0)
            ours, plain = GPT(c).to(device), PlainGPT(c).to(device)
            copy_weights(ours, plain)
            a, b = (m(idx[:, :-1], idx[:, 1:]) for m in (ours, plain))
            assert torch.allclose(a, b, rtol=1e-4), (a, b)
            if compiled:
                for block in [*ours.blocks, *plain.blocks]:
                    block.compile()
            what = f"training step, {str(dtype)[6:]}, {'compiled' if compiled else 'eager'}"
            found = versus(what, stepper(ours, dtype), {"plain GPT": stepper(plain, dtype)}, device)
            for row in found:
                row |= {
                    "tokens_per_s": 16 * 256e3 / row["ours_ms"],
                    "share_of_peak": flops * 1e3 / row["ours_ms"] / peak,
                }
            rows += found
    return rows


# ----------------------------------------------------------------------------------------------------------- patching


def patching(device):
    """Patches at every layer of 12 x 384, 2 prompts of 100 tokens: one pass against a forward pass for each patch.

    The peer is the loop that hook libraries run (a hook, a forward pass, the last position read), without their own
    overhead, on the same model; for the last position also the libraries themselves. Every result is equal to 1e-4.
    """
    from patching import hold, swap

    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=4096, block_size=128, n_layer=12, n_head=6, n_embd=384)).to(device).eval()
    L, idx, strengths = (
        12,
        torch.randint(4096, (2, 100), device=device),
        torch.tensor([-1.0, 1.0, 2.0, 4.0], device=device),
    )
    z, v = torch.randn(L + 1, 2, 1, 384, device=device), torch.randn(L, 384, device=device)
    site = lambda j: f"blocks.{j}.resid_post" if j >= 0 else "embed"

    def put(column, value, x, add=False):
        x = x.clone()
        x[:, column] = x[:, column] + value if add else value
        return x

    @torch.no_grad()
    def loop(cells):
        """The last position under each of the patches in `cells`, a full forward pass for each: (2, cells, C)."""
        out = []
        for cell in cells:
            with model.patch({site(j): f for j, f in cell.items()}):
                out.append(model.hidden(idx)[:, -1])
        return torch.stack(out, 1)

    def steer(j, x, clean):
        return x if j < 0 else torch.cat((x, clean[:, None] + strengths[None, :, None, None] * v[j]), 1)

    tail, layers = 8, range(-1, L)
    jobs = {
        "last position, 13 layers": (swap(z), 1, [{j: partial(put, -1, z[j + 1, :, 0])} for j in layers]),
        "concept token on, 13 layers": (
            hold(z), tail, [{i: partial(put, -tail, z[i + 1, :, 0]) for i in range(j, L)} for j in layers]
        ),
        "steering, 12 layers x 4": (
            steer, 1, [{j: partial(put, -1, a * v[j], add=True)} for j in range(L) for a in strengths]
        ),
    }  # fmt: skip
    rows = []
    for what, (step, width, cells) in jobs.items():
        ours = lambda step=step, width=width: common.sweep(model, idx, step, width)[:, :, -1]
        peers = {"forward per patch": lambda cells=cells: loop(cells)}
        if what.startswith("last"):
            peers |= hook_libraries(model, idx, z)
        for name, peer in peers.items():
            assert torch.allclose(ours(), peer(), atol=1e-4), f"{what}, {name}"
        rows += versus(what, ours, peers, device, 5)
    return rows


def hook_libraries(model, idx, z):
    """{library: function}: z (L + 1, B, 1, C) put at the last position behind every block, as its users write it."""
    out = {}
    for name, library in {"nnsight": with_nnsight, "transformer-lens": with_lens, "pyvene": with_pyvene}.items():
        try:
            last = library(model, idx, z)
        except ImportError as error:
            print(f"{name} is left out: {error}")
            continue
        loop = lambda last=last: torch.stack([last(j) for j in range(-1, model.config.n_layer)], 1)
        out[name] = torch.no_grad()(loop)
    return out


def with_nnsight(model, idx, z):
    """last(j) -> the last position (B, C), patched behind block j (-1: the embedding), by a trace of our model."""
    from nnsight import NNsight

    wrapped = NNsight(model)

    def last(j):
        with wrapped.trace(idx):
            site = wrapped.blocks[j].resid_post if j >= 0 else wrapped.embed
            site.output[:, -1] = z[j + 1, :, 0]
            h = wrapped.final.output[:, -1].save()
        return h

    return last


def with_lens(model, idx, z):
    """The same by hooks of a HookedTransformer with our weights."""
    import transformer_lens

    lens = lens_model(transformer_lens, model)

    def last(j):
        kept = []

        def put(x, hook):
            x[:, -1] = z[j + 1, :, 0]
            return x

        site = f"blocks.{j}.hook_resid_post" if j >= 0 else "hook_embed"
        keep = ("ln_final.hook_normalized", lambda x, hook: kept.append(x[:, -1]))
        lens.run_with_hooks(idx, fwd_hooks=[(site, put), keep])
        return kept[0]

    return last


def with_pyvene(model, idx, z):
    """The same by interventions on our model."""
    import pyvene

    class Hidden(nn.Module):
        """Our model without its unembedding."""

        def __init__(self):
            super().__init__()
            self.gpt, self.config = model, model.config

        def forward(self, idx):
            return self.gpt.hidden(idx)[:, -1]

    whole = Hidden()

    def last(j):
        site = f"gpt.blocks[{j}].resid_post.output" if j >= 0 else "gpt.embed.output"
        put = lambda x, source: torch.cat((x[:, :-1], z[j + 1]), 1)
        return pyvene.IntervenableModel({"component": site, "intervention": put}, whole)({"idx": idx})[1]

    return last


def lens_model(transformer_lens, model):
    """A HookedTransformer of our model's shape and weights."""
    c, own = model.config, model.state_dict()
    shape = dict(n_layers=c.n_layer, d_model=c.n_embd, n_ctx=c.block_size, d_head=c.head_dim, n_heads=c.n_head)
    shape |= dict(d_vocab=c.vocab_size, d_mlp=c.d_mlp, act_fn="gelu", normalization_type="LN", rotary_dim=c.head_dim)
    shape |= dict(positional_embedding_type="rotary", device=str(model.wte.weight.device))
    state = {"embed.W_E": own["wte.weight"], "unembed.W_U": own["head.weight"].T}
    names = {"ln_final": "final"}
    for i in range(c.n_layer):
        ours, theirs = f"blocks.{i}.attn", f"blocks.{i}.attn."
        W, b = own[f"{ours}.qkv.weight"].view(3, c.n_head, -1, c.n_embd), own[f"{ours}.qkv.bias"].view(3, c.n_head, -1)
        state |= {f"{theirs}W_{n}": w.mT for n, w in zip("QKV", W)} | {f"{theirs}b_{n}": x for n, x in zip("QKV", b)}
        state[f"{theirs}W_O"] = own[f"{ours}.proj.weight"].T.reshape(c.n_head, -1, c.n_embd)
        state[f"{theirs}b_O"] = own[f"{ours}.proj.bias"]
        names |= {f"blocks.{i}.ln{j}": f"blocks.{i}.norm{j}" for j in (1, 2)}
        for theirs, name in (("in", "up"), ("out", "down")):
            state[f"blocks.{i}.mlp.W_{theirs}"] = own[f"blocks.{i}.mlp.{name}.weight"].T
            state[f"blocks.{i}.mlp.b_{theirs}"] = own[f"blocks.{i}.mlp.{name}.bias"]
    for theirs, name in names.items():
        state |= {f"{theirs}.w": own[f"{name}.weight"], f"{theirs}.b": own[f"{name}.bias"]}
    lens = transformer_lens.HookedTransformer(transformer_lens.HookedTransformerConfig(**shape))
    lens.load_state_dict(state, strict=False)
    return lens.eval()


# --------------------------------------------------------------------------------------------------------- crosscoder


def crosscoder(device):
    """Attribution, a training step and steering near the toy's shapes: 4 blocks of 64, 1,024 latents, 128 tokens.

    The peers are what the released code does [C]: every position encoded and kept, gradients of the whole network; a
    crosscoder step that multiplies all latents. Results equal; the reference holds 128 times our latents in memory.
    """
    import crosscoder as cx

    torch.manual_seed(0)
    plain = dict(norm="rms", gated=True, act="silu", d_mlp=128)
    base, ft = (GPT(GPTConfig(64, 160, 4, 4, 64, **plain)).to(device).eval() for _ in range(2))
    cc, layer, wait = cx.Crosscoder(2, 64, 1024, k=16).to(device), 2, [3, 4]
    cc.threshold.fill_(0.5)
    prompts = torch.randint(64, (64, 128)).tolist()
    idx, site = torch.tensor(prompts, device=device), cx.site(2)

    def ours():
        with torch.no_grad():
            return cx.attribute([base, ft], cc, layer, prompts, wait)[0]

    def reference():
        kept = {}
        with torch.no_grad():
            x0 = base.capture(idx, [site])[site]
        keep = lambda h: kept.setdefault("h", h)
        with ft.patch({site: keep}):
            logits = ft(idx)
        kept["h"].retain_grad()
        cx.log_p(logits[:, -1], wait).sum().backward()
        with torch.no_grad():
            a = cx.attribution(cc.encode(torch.stack((x0, kept["h"]), 2)), cc.decoder(), kept["h"].grad)
        ft.zero_grad()
        return a[:, -1]

    base.requires_grad_(False)
    theirs = reference()
    ft.requires_grad_(False)
    assert torch.allclose(ours(), theirs, atol=1e-5), "attribution differs"

    def full():
        ft.requires_grad_(True)
        reference()
        ft.requires_grad_(False)

    rows = versus("crosscoder: attribution, 64 x 128", ours, {"all positions": full}, device, 9)
    x = torch.randn(2048, 128, device=device)

    def step(dense):
        cc.zero_grad()
        if not dense:
            cc.loss(x).backward()
            return
        f = F.linear(x, cc.W_enc, cc.b_enc).relu()
        s = f * cc.norms().sum(1)
        f = f * (s >= s.flatten().topk(16 * len(x)).values[-1])
        (x - f @ cc.W_dec - cc.b_dec).square().sum(1).mean().backward()

    cc.silent.zero_()
    rows += versus("crosscoder: step, 2048 vectors", partial(step, False), {"dense": partial(step, True)}, device, 9)
    rows[-1]["what"] += f", {2048e3 / rows[-1]['ours_ms']:,.0f}/s"
    cc.requires_grad_(False)
    began, vectors = time.perf_counter(), cc.decoder()[:64]
    for i in range(0, 64, 8):
        patch = cx.steer(vectors[i : i + 8], [-1, -0.75, -0.5, -0.25, 0.25, 0.5, 0.75, 1])
        cx.intervene(ft, layer, prompts * 6 + prompts[:16], patch, lambda l: l[:, :, 0, wait])
    print(f"steering: 64 latents x 8 strengths x 400 prompts of 128 in {time.perf_counter() - began:.1f} s")
    return rows


# ----------------------------------------------------------------------------------------------------------- generate


def generate(device):
    """SmolLM2-135M, fp32: 64 greedy tokens after 16 prompts of 8 to 128; and reading it from its GGUF file."""
    try:
        from transformers import AutoModelForCausalLM, logging
    except ImportError:
        print("generate is left out: pip install -r requirements-bench.txt")
        return []
    import pretrained

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    name = "smollm2-135m-instruct"
    model, tokenizer = pretrained.load(name, device, "fp32")
    with tempfile.TemporaryDirectory() as folder:
        pretrained.save(model, tokenizer, folder)
        peer = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).to(device)
    text, rng = tokenizer.encode(next(data.load_text())), random.Random(0)
    prompts = [text[i : i + rng.randint(8, 128)] for i in rng.sample(range(len(text) - 128), 16)]
    longest = max(map(len, prompts))
    idx, mask = common.padded(prompts, device)

    def ours():
        return model_generate(model, prompts, 64, temperature=0)

    def theirs():
        options = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0, "max_new_tokens": 64}
        return peer.generate(idx, attention_mask=mask, **options)[:, longest:].tolist()

    assert ours() == theirs()
    rows = versus("generate, 16 x 64, fp32", ours, {"transformers": theirs}, device, rounds=3, tries=1)
    path = pretrained.find(name)
    read = {"gguf_file": path.name, "dtype": torch.float32}
    peers = {"transformers": lambda: AutoModelForCausalLM.from_pretrained(path.parent, **read).to(device)}
    load = lambda: pretrained.load(name, device, "fp32")
    return rows + versus("load from GGUF", load, peers, device, rounds=2, tries=1)


# ---------------------------------------------------------------------------------------------------------------- sae


@stubs_taken_back("dictionary_learning", "sae_lens", "transformer_lens")
def sae(device):
    """SAEs: a TopK training step (d 256, 4096 latents, k 32, 2048 rows), one draw of the buffer, attribution."""
    import importlib
    import types

    import sae as ours

    d, m, k, B = 256, 4096, 32, 2048
    truth = F.normalize(torch.randn(1024, d, device=device), dim=1)
    x = (torch.rand(B, 1024, device=device) < 0.02).float() @ truth
    x = x / x.square().sum(1).mean().sqrt()
    torch.manual_seed(0)
    first = ours.SAE(d, m, "topk", k).to(device).state_dict()

    def trainee():
        model = ours.SAE(d, m, "topk", k).to(device)
        model.load_state_dict(first)
        return model, torch.optim.Adam(model.parameters(), lr=2e-4, fused=True)

    def dense_loss(model):
        pre = F.linear(x - model.b_dec, model.W_enc, model.b_enc)
        values, which = pre.topk(k)
        code = torch.zeros_like(pre).scatter(1, which, values.relu())
        return (x - code @ model.W_dec - model.b_dec).square().sum(1).mean()

    def stepper(loss_of):
        model, opt = trainee()

        def step():
            opt.zero_grad(set_to_none=True)
            loss = loss_of(model)
            loss.backward()
            model.project()
            opt.step()
            model.normalize()
            return loss

        return step

    step = stepper(lambda model: model.loss(x, dead_after=10**9))
    peers = {"dense step": stepper(dense_loss)}

    def package(name, stub=False, **names):  # the packages' own __init__ want nnsight and transformer-lens, SAEs do not
        found = None if stub else importlib.util.find_spec(name)
        if not stub and found is None:
            raise ImportError(f"no package {name}")
        module = sys.modules[name] = types.ModuleType(name)
        module.__path__ = found.submodule_search_locations if found else []
        vars(module).update(names)

    try:
        package("dictionary_learning")
        trainer = importlib.import_module("dictionary_learning.trainers.top_k").TopKTrainer(
            10**6, d, m, k, layer=0, lm_name="", lr=2e-4, warmup_steps=0, device=str(device)
        )
        with torch.no_grad():
            trainer.ae.encoder.weight.copy_(first["W_enc"])
            trainer.ae.decoder.weight.copy_(first["W_dec"].T)
        peers["dictionary-learning"] = lambda: trainer.update(5, x)
    except (ImportError, AttributeError) as error:
        print(f"sae: dictionary-learning is left out ({error}): pip install --no-deps dictionary-learning einops")
    try:
        bases = {"HookPoint": nn.Identity, "HookedRootModule": type("Root", (nn.Module,), {"setup": lambda self: None})}
        for name in "", ".hook_points", ".HookedTransformer":
            package("transformer_lens" + name, stub=True, **bases)
        package("sae_lens", __version__="", logger=logging.getLogger())
        package("sae_lens.saes")
        lens = importlib.import_module("sae_lens.saes.topk_sae")
        lens_base = importlib.import_module("sae_lens.saes.sae")
        sys.modules["sae_lens.registry"].register_sae_class("topk", lens.TopKSAE, lens.TopKSAEConfig)
        config = {"d_in": d, "d_sae": m, "k": k, "decoder_init_norm": 1.0, "rescale_acts_by_decoder_norm": False}
        peer = lens.TopKTrainingSAE(lens.TopKTrainingSAEConfig(**config, device=str(device)))
        with torch.no_grad():
            peer.W_enc.copy_(first["W_enc"].T)
            peer.W_dec.copy_(first["W_dec"])
        peer_opt = torch.optim.Adam(peer.parameters(), lr=2e-4, fused=True)
        batch = lens_base.TrainStepInput(x, {}, torch.zeros(m, dtype=torch.bool, device=device), 0, False)

        def lens_step():
            peer_opt.zero_grad(set_to_none=True)
            loss = peer.training_forward_pass(batch).loss
            loss.backward()
            peer_opt.step()
            return loss

        peers["sae-lens"] = lens_step
    except (ImportError, AttributeError) as error:
        print(f"sae: sae-lens is left out ({error}): pip install --no-deps sae-lens")
    losses = {name: float(torch.as_tensor(f()).detach()) for name, f in ({"ours": step} | peers).items()}
    assert max(losses.values()) < 1.01 * min(losses.values()), losses
    rows = versus("SAE step, topk, 256 -> 4096", step, peers, device)

    buffer = ours.Buffer(lambda r: torch.randn(2**16, d, device=device), B)
    unread = torch.ones(2**16, dtype=torch.bool, device=device)

    def nonzero_draw():  # how dictionary_learning draws: a permutation of all unread rows for every batch
        free = unread.nonzero().squeeze(1)
        return buffer.rows[free[torch.randperm(len(free), device=device)[:B]]]

    rows += versus("buffer draw, 2048 of 65536 rows", lambda: buffer(1), {"nonzero, randperm": nonzero_draw}, device)

    model, sentences, w = trainee()[0].requires_grad_(False), x.view(64, 32, d), torch.randn(d, device=device)

    def closed():
        return (model.W_dec @ w) * model.encode(x).sum(0)

    def integrated():  # ten gradients a sentence, one sentence at a time, as the paper's code does
        total = torch.zeros(m, device=device)
        for sentence in sentences:
            f = model.encode(sentence)
            rest = sentence - model.decode(f)
            for s in range(10):
                part = (f * s / 10).requires_grad_()
                logit = ((model.decode(part) + s / 10 * rest).sum(0) * w).sum()
                total += (torch.autograd.grad(logit, part)[0] / 10 * f).sum(0)
        return total

    torch.testing.assert_close(closed(), integrated(), rtol=1e-3, atol=1e-3)
    return rows + versus("attribution, 64 sentences of 32", closed, {"integrated gradients": integrated}, device, 5)


# -------------------------------------------------------------------------------------------------------------- masks

JSON_LARK = r"""
start: WS? value WS?
value: object | array | STRING | NUMBER | "true" | "false" | "null"
object: "{" WS? (pair ("," WS? pair)*)? "}"
pair: STRING WS? ":" WS? value WS?
array: "[" WS? (value WS? ("," WS? value WS?)*)? "]"
STRING: /"([^"\\\x00-\x1f\x7f]|\\(["\\\/bfnrt]|u[0-9a-fA-F]{4}))*"/
NUMBER: /-?(0|[1-9][0-9]*)(\.[0-9]+)?([eE][-+]?[0-9]+)?/
WS: /[ \t\n\r]+/
"""


def documents(rng, n):
    """n random JSON documents: nested objects and lists, strings with escapes and other alphabets, indented or not."""
    letters = "abcdefgh_ é"

    def value(depth=0):
        kind = rng.random()
        if depth < 4 and kind < 0.45:
            keys = ["".join(rng.choices(letters, k=rng.randint(1, 8))) for _ in range(rng.randint(0, 4))]
            return {key: value(depth + 1) for key in keys}
        if depth < 4 and kind < 0.7:
            return [value(depth + 1) for _ in range(rng.randint(0, 4))]
        text = 'say "' + " ".join(rng.choices(["the", "quick", "brown", "fox", "你好", "\n"], k=5)) + '"'
        return rng.choice([None, True, False, rng.randint(-99, 9999), rng.random() * 1e3, text])

    return [json.dumps(value(), ensure_ascii=rng.random() < 0.5, indent=rng.choice([None, 2])) for _ in range(n)]


def mask_engines(grammar, lark, enc, trie, builtin=False):
    """{name: start}, where start() -> (fill, advance) of a fresh text; fill() -> the mask, packed or not."""
    import formal_tokenization as ft

    engine, engines = ft.Constraint(grammar, trie, enc.eot_token).engine, {}

    def ours():
        c = ft.Constraint(engine)
        return c.mask, c.advance

    engines["ours"] = ours
    unpack = lambda words: np.unpackbits(words.view(np.uint8), bitorder="little").astype(bool)
    try:
        from llguidance import LLMatcher
        from llguidance.numpy import allocate_token_bitmask, fill_next_token_bitmask
        from llguidance.tiktoken import lltokenizer_from_encoding

        tok = lltokenizer_from_encoding(enc)

        def llguidance():
            matcher, bits = LLMatcher(tok, LLMatcher.grammar_from_lark(lark)), allocate_token_bitmask(1, enc.n_vocab)
            assert not matcher.is_error(), matcher.get_error()

            def fill(show=False):
                fill_next_token_bitmask(matcher, bits)
                return unpack(bits[0]) if show else None

            return fill, matcher.consume_token

        engines["llguidance"] = llguidance
    except ImportError:
        print("llguidance is not installed: left out")
    try:
        import xgrammar

        pieces = [b or b"<special>" for b in trie.vocab]
        info = xgrammar.TokenizerInfo(
            pieces, vocab_type=xgrammar.VocabType.RAW, vocab_size=enc.n_vocab, stop_token_ids=[enc.eot_token]
        )
        compiler = xgrammar.GrammarCompiler(info, max_threads=1, cache_enabled=False)
        compiled = {"xgrammar": compiler.compile_grammar(grammar)}
        if builtin:
            compiled["xgrammar, its own JSON"] = compiler.compile_builtin_json_grammar()

        def matcher_of(rules):
            def start():
                matcher, bits = xgrammar.GrammarMatcher(rules), xgrammar.allocate_token_bitmask(1, enc.n_vocab)

                def fill(show=False):
                    needed = matcher.fill_next_token_bitmask(bits)
                    found = unpack(bits.numpy()[0]) if show else None
                    return found if needed or not show else np.ones_like(found)

                return fill, matcher.accept_token

            return start

        engines |= {name: matcher_of(rules) for name, rules in compiled.items()}
    except ImportError as error:
        print(f"xgrammar is not installed ({error}): left out")
    return engines


def masks(device):
    """Exact token masks of JSON over cl100k (100,256 ids; a trained vocabulary without it): unseen random documents.

    The same token streams for every engine, in random order; microseconds of mask + advance a token after 1,000 tokens
    of warm-up; then every bit is compared. Rows hold ms for 1,000 tokens.
    """
    import formal_tokenization as ft

    torch.set_num_threads(1)
    try:
        import tiktoken

        enc = tiktoken.get_encoding("cl100k_base")
    except Exception as error:  # no network: the libraries have exceptions of their own
        print(f"cl100k_base can't be had ({type(error).__name__}): a vocabulary of 4,096 in its place")
        enc = data.train_bpe("".join(data.load_text()), 4096)
    pieces = {i: b for b, i in enc._mergeable_ranks.items()}
    vocab = [pieces.get(i) for i in range(enc.n_vocab)]
    trie, streams = ft.Trie(vocab), [enc.encode(text) for text in documents(random.Random(0), 120)]
    began = time.perf_counter()
    engines = mask_engines(ft.JSON, JSON_LARK, enc, trie, builtin=True)
    print(f"all engines made in {time.perf_counter() - began:.2f} s")

    def replay(start, streams):
        times = []
        for ids in streams:
            fill, advance = start()
            for id in ids:
                a = time.perf_counter()
                fill()
                advance(id)
                times.append(time.perf_counter() - a)
        return np.array(times) * 1e6

    n = np.cumsum([len(ids) for ids in streams])
    warm, rest = streams[: int((n < 1000).sum()) + 1], streams[int((n < 1000).sum()) + 1 :]
    rest = rest[: int((n < 4500).sum()) - len(warm)]
    times = {name: [] for name in engines}
    names = list(engines)
    for name in random.sample(names, len(names)):
        slow = name.startswith("xgrammar")
        cold = replay(engines[name], warm[:4] if slow else warm)
        t = replay(engines[name], rest[:12] if slow else rest)
        times[name] = t
        line = "mean {:.1f}  p50 {:.2f}  p99 {:.0f}  max {:.0f} us; while cold, max {:.0f}"
        print(f"  {name:22s}", line.format(t.mean(), np.median(t), np.percentile(t, 99), t.max(), cold.max()))
    wrong = {name: 0 for name in names[1:] if "own" not in name}
    compared = 0
    for ids in streams[:20]:
        runs = {name: engines[name]() for name in ["ours", *wrong]}
        for id in ids[:60]:
            ours = runs["ours"][0]()[: len(pieces)]
            for name in wrong:
                theirs = runs[name][0](show=True)[: len(pieces)]
                if theirs.sum() == 1:  # llguidance spells what is forced in one way; its beginnings are right, too
                    forced = pieces[theirs.argmax()]
                    for i in np.flatnonzero(ours & ~theirs):
                        theirs[i] = forced.startswith(pieces[i])
                wrong[name] += int((theirs != ours).sum())
            compared += 1
            for _, advance in runs.values():
                advance(id)
    print(f"  bits that differ at {compared} positions x {len(pieces):,} ids: {wrong}")
    assert not any(wrong.values()), wrong
    mean = {name: t.mean() for name, t in times.items()}
    return [
        {"what": "JSON mask + advance, 1,000 tokens", "peer": name[:18], "ours_ms": mean["ours"], "peer_ms": mean[name]}
        | {"ratio": mean[name] / mean["ours"], "quartiles": [np.median(times[name]) / np.median(times["ours"])] * 2}
        for name in names[1:]
    ]


# ------------------------------------------------------------------------------------------------------------ crawler


def slow_server(port, latency=0.005):
    """A chat server on 127.0.0.1 in a process of its own: every answer takes `latency` seconds, exactly."""
    import socket
    import threading

    body = b'{"choices":[{"message":{"content":"no"},"finish_reason":"stop"}]}'
    reply = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body)

    def serve(connection):
        with connection, connection.makefile("rb") as lines:
            length = 0
            while line := lines.readline():  # until the client hangs up
                if line.lower().startswith(b"content-length"):
                    length = int(line.split(b":")[1])
                if line == b"\r\n":
                    lines.read(length)
                    time.sleep(latency)
                    connection.sendall(reply)

    listener = socket.create_server(("127.0.0.1", 0))
    port.value = listener.getsockname()[1]
    while True:
        threading.Thread(target=serve, args=(listener.accept()[0],), daemon=True).start()


def crawler(device):
    """128 calls of a crawl, 4 at once, with journal, to a server that takes 5 ms: against waiting alone, bare sockets
    (the same bytes, nothing read of them: what the concurrency allows), and urllib."""
    import multiprocessing
    import socket
    import urllib.request
    from concurrent.futures import ThreadPoolExecutor

    import crawler as script

    context = multiprocessing.get_context("spawn")
    port = context.Value("i", 0)
    server = context.Process(target=slow_server, args=(port,), daemon=True)
    server.start()
    while not port.value:
        time.sleep(0.01)
    pool, request = ThreadPoolExecutor(4), script.Request("answer", "Hi")
    url = f"http://127.0.0.1:{port.value}/v1"
    target = script.Endpoint("chat", url, "m", 0, script.Args(concurrency=4))
    payload = json.dumps(script.to_server("chat", "m", request, 0, "")[1]).encode()
    sockets = [socket.create_connection(("127.0.0.1", port.value)) for _ in range(4)]
    with tempfile.TemporaryDirectory() as folder:
        journal = script.Journal(Path(folder) / "calls", {})

        def ours():
            target.run([(journal, f"{len(journal.done)}.{i}", request) for i in range(128)])

        def bare(connection):
            for _ in range(32):
                connection.sendall(f"POST /v1/chat/completions{target.head}{len(payload)}\r\n\r\n".encode() + payload)
                assert connection.recv(4096).endswith(b"}")

        def urllib_():
            ask = urllib.request.Request(f"{url}/chat/completions", payload)
            post = lambda _: json.load(urllib.request.urlopen(ask))
            assert len(list(pool.map(post, range(128)))) == 128

        peers = {"waiting alone": lambda: list(pool.map(time.sleep, [0.005] * 128)), "urllib": urllib_}
        peers["bare sockets"] = lambda: list(pool.map(bare, sockets))
        rows = versus("crawl, 128 calls of 5 ms, 4 at once", ours, peers, device)
        assert all(reply.text == "no" for reply in journal.done.values())
    server.terminate()
    return rows


# --------------------------------------------------------------------------------------------------------------- lzw


def lzw(device):
    """The LZW tokenizer of zip2zip, one thread, beside the official Rust package: the same codes, ids and rows."""
    from lzw_tokenizer import LZW

    try:
        from zip2zip_compression import LZWCompressor
    except ImportError:
        print("lzw: zip2zip-compression is not installed (pip install zip2zip-compression==0.3.4), left out")
        return []
    V, rows, rng = 32011, [], np.random.default_rng(0)
    text = "".join(data.load_text())[:200_000]
    real = data.get_tokenizer("bpe:4096", text).encode(text)[:40_000]
    for name, ids, W, M in (
        ("code", real, 1024, 3),
        ("code", real, 2048, 4),
        ("random", rng.integers(1, 50, 40_000).tolist(), 1024, 3),
    ):
        ours, rust = LZW(V, W, M, [0]), LZWCompressor(V, W, M, 0, [0])
        parts = [ids[i : i + W] for i in range(0, len(ids), W)]
        codes = [ours.encode(part) for part in parts]
        assert codes == [rust.encode(part)[0] for part in parts]
        assert [ours.decode(z) for z in codes] == [rust.decode(z)[0] for z in codes] == parts
        for part in parts[:3]:
            book = ours.encode(part, book=True)[1]
            assert [list(row) for row in book.to_dict().values()] == list(rust.encode(part)[2].to_dict().values())
        each = lambda f, items: lambda: [f(item) for item in items]
        jobs = {
            "encode": (each(ours.encode, parts), each(rust.encode, parts)),
            "decode": (each(ours.decode, codes), each(rust.decode, codes)),
            "encode + rows": (
                each(lambda p, ours=ours: ours.encode(p, book=True)[1].array(), parts),
                each(lambda p, rust=rust: np.array(rust.encode(p)[2].to_list(True)), parts),
            ),
        }
        for what, (a, b) in jobs.items():
            rows += versus(f"lzw, {name}, {W} ids, M={M}: {what}", a, {"zip2zip-compression": b}, device, 5)
    return rows


# --------------------------------------------------------------------------------------------------------------- clip


@stubs_taken_back("open_clip", "transformers", "torchvision")
def open_clip_model():
    """open_clip's module of models, without its package's __init__, which wants torchvision; ImportError if missing."""
    import importlib.util
    import types

    spec = importlib.util.find_spec("open_clip")
    if spec is None:
        raise ImportError("pip install --no-deps open_clip_torch")
    package = types.ModuleType("open_clip")
    package.__path__ = list(spec.submodule_search_locations)
    stubs = {n: types.ModuleType(n) for n in ("torchvision", "torchvision.ops", "torchvision.ops.misc")}
    stubs["torchvision.ops.misc"].FrozenBatchNorm2d = type("FrozenBatchNorm2d", (), {})
    sys.modules.update(stubs, open_clip=package, transformers=None)
    return importlib.import_module("open_clip.model")


def clip(device):
    """Latent-CLIP: a training step and the VAE beside the libraries', same weights; ReNO by latents beside pixels."""
    import latent_clip as lc

    torch.manual_seed(0)
    config = lc.CLIPConfig(side=64, patch=8, width=384, layers=4, heads=6, embed=256, vocab=49408, context=77,
                           text_width=256, text_heads=4, text_layers=4)  # fmt: skip
    ours, z, tokens = lc.CLIP(config).to(device), torch.randn(16, 4, 64, 64, device=device), torch.zeros(16, 77).long()
    for row, n in zip(tokens, torch.randint(8, 22, (16,))):  # captions of some ten words
        row[:n] = torch.randint(1, 40000, (n,))
        row[n] = 49407
    tokens = tokens.to(device)

    def step(model, loss):
        def run():
            model.zero_grad(set_to_none=True)
            loss().backward()

        return run

    peers = {"77 tokens": step(ours, lambda: ours(tokens, z))}
    try:
        module = open_clip_model()
        vision = module.CLIPVisionCfg(layers=4, width=384, head_width=64, patch_size=8, image_size=64)
        text = module.CLIPTextCfg(context_length=77, vocab_size=49408, width=256, heads=4, layers=4)
        theirs = module.CLIP(256, vision, text).to(device)
        theirs.visual.conv1 = nn.Conv2d(4, 384, 8, 8, bias=False, device=device)
        theirs.load_state_dict(ours.state_dict())

        def loss():
            image, words, scale = theirs(z, tokens)
            labels = torch.arange(len(z), device=device)
            logits = scale * image @ words.T
            return (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2

        torch.testing.assert_close(ours(lc.trim(tokens), z), loss(), atol=1e-4, rtol=1e-4)
        peers["open_clip"] = step(theirs, loss)
    except (ImportError, AttributeError) as error:
        print(f"clip: open_clip is left out ({error})")
    rows = versus("CLIP step, 16 pairs", step(ours, lambda: ours(lc.trim(tokens), z)), peers, device)

    vae, x = lc.VAE(lc.VAEConfig((32, 64, 128, 128), 2, 32)), torch.rand(1, 3, 128, 128, device=device)
    vae.to(device).eval()
    try:
        from diffusers import AutoencoderKL

        blocks = {"down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4}
        theirs = AutoencoderKL(block_out_channels=(32, 64, 128, 128), layers_per_block=2, latent_channels=4, **blocks)
        theirs.to(device).eval().load_state_dict(vae.state_dict())
        both = [lambda: vae.decode(vae.moments(x)[0]), lambda: theirs.decode(theirs.encode(x).latent_dist.mean).sample]
        with torch.no_grad():
            torch.testing.assert_close(both[0](), both[1](), atol=1e-4, rtol=1e-4)
            rows += versus("VAE there and back, 128 px", both[0], {"diffusers": both[1]}, device)
    except ImportError as error:
        print(f"clip: diffusers is left out ({error}): pip install --no-deps diffusers")

    args = SimpleNamespace(out="", euler=4)
    models = {arm: lc.toy_model(args, 0, arm, False).to(device).eval().requires_grad_(False) for arm in ("vae", "flow")}
    clips = {arm: lc.toy_model(args, 0, arm, False).to(device).requires_grad_(False) for arm in ("latent", "pixel")}
    noise, text = torch.randn(32, 4, 8, 8, device=device), F.normalize(torch.randn(32, 64, device=device), dim=1)
    words = lc.toy_tokens(["a red circle"] * 32)[:, : lc.FLOW.context].to(device)
    rewards = {"latent": lc.latent_reward(clips["latent"], 1.0, text)}
    rewards["pixel"] = lc.pixel_reward(clips["pixel"], models["vae"], 1.0, text)
    for k in 1, 4:
        generate = lambda noise, k=k: models["flow"].generate(noise, words, k)
        run = {arm: lambda r=r, g=generate: lc.reno(g, r, noise, 2, 0.6) for arm, r in rewards.items()}
        rows += versus(f"ReNO by latents, {k} steps", run["latent"], {"by pixels": run["pixel"]}, device, 9)
    return rows


# --------------------------------------------------------------------------------------------------------------- grpo


def grpo(device):
    """The toy of countdown_rl.py: rollouts beside transformers, a GRPO step beside TRL, heads off beside no cache."""
    import countdown_rl as script
    import pretrained

    args = script.Args(**script.Args.presets["toy"])
    world = script.Toy(args, 0)
    model = script.toy_model(args, world, 0).to(device)
    problems, rng, rows = world.train[: args.prompts], random.Random(0), []
    prompts = [world.prompt(*p, rng) for p in problems]
    idx, G, new = torch.tensor(prompts, device=device), args.group, world.max_new
    with tempfile.TemporaryDirectory() as folder:
        try:
            from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, logging

            logging.set_verbosity_error()
            logging.disable_progress_bar()
            pretrained.save(model, None, folder)
            peer = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).to(device)
            with torch.no_grad():
                torch.testing.assert_close(peer(idx).logits, model(idx), atol=1e-4, rtol=1e-4)
            options = {
                "do_sample": True,
                "top_k": 0,
                "num_return_sequences": G,
                "eos_token_id": None,
                "pad_token_id": 0,
            }
            mask = torch.ones_like(idx)
            theirs = lambda: peer.generate(idx, attention_mask=mask, max_new_tokens=new, **options)
            ours = lambda: script.rollout(model, prompts, G, new, 1.0, [-1], 0)
            assert [len(ids) for ids in ours()[0]] == [new] * G * len(prompts) == [new] * len(theirs())
            rows += versus(f"rollouts, {len(prompts)} x {G} x {new}", ours, {"transformers": theirs}, device, 5, 1)
            rows += trl_step(script, args, world, model, prompts, folder, PreTrainedTokenizerFast, device)
        except ImportError as error:
            print(
                f"grpo: transformers or trl is left out ({error}): pip install -r requirements-bench.txt; trl --no-deps"
            )

    traces = [(p, *world.written(*p, rng)) for p in problems]
    steps = script.find_steps(world, traces)[:24]
    sets = [[(l, h)] for l in range(2) for h in range(2)]
    off = lambda heads: lambda s: script.heads_off([heads] * len(s), model.config)
    ours = lambda: [script.continued(model, world, steps, off(heads), 24) for heads in sets]

    @torch.no_grad()
    def uncached():  # as the released code does it: four rows at a time, a whole pass a token, outputs (B, T, H, C)
        out, c = [], model.config
        for [(layer, head)], first in ((heads, i) for heads in sets for i in range(0, len(steps), 4)):
            rows = [ids[: p + 1].tolist() for ids, p in zip(steps.ids[first:][:4], steps.paren[first:][:4].tolist())]
            start, wo, kept = [len(r) for r in rows], model.blocks[layer].attn.proj.weight.T, {}

            def put(_, wo=wo, kept=kept, rows=rows, head=head):
                each = torch.einsum("bthd,hdc->bthc", kept["z"], wo.view(c.n_head, -1, c.n_embd))
                due = torch.tensor([r[-1] == world.paren for r in rows], device=device)
                each[:, :, head] *= ~due[:, None, None]
                return each.sum(2)

            sites = {f"blocks.{layer}.attn.z": lambda z, kept=kept: kept.update(z=z), f"blocks.{layer}.attn.out": put}
            for _ in range(24):
                ids, mask = common.padded(rows, device)
                with model.patch(sites):
                    for r, token in zip(rows, model(ids, mask=mask)[:, -1].argmax(-1).tolist()):
                        r.append(token)
            out += [r[n:] for r, n in zip(rows, start)]
        return out

    for a, b in zip((row for part in ours() for row in part), uncached()):
        assert a[: min(len(a), len(b))] == b[: min(len(a), len(b))]
    return rows + versus("heads off, 4 sets x 24 x 24", ours, {"uncached, one by one": uncached}, device, 5, 1)


def trl_step(script, args, world, model, prompts, folder, Fast, device):
    """A step of GRPO, rollouts and update, beside TRL's trainer: same model, prompts, group, longest response."""
    try:
        import datasets
        from transformers import AutoModelForCausalLM, PrinterCallback
        from trl import GRPOConfig, GRPOTrainer
    except Exception as error:  # trl checks the versions of much that it doesn't need here
        print(f"grpo: trl is left out ({str(error).splitlines()[0]}): pip install --no-deps trl")
        return []
    from tokenizers import Tokenizer, models, pre_tokenizers

    backend = Tokenizer(models.WordLevel({w.replace("\n", "<nl>"): i for w, i in world.id.items()}, unk_token="<pad>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tok = Fast(tokenizer_object=backend, eos_token="<eos>", pad_token="<pad>")
    G, new, opt = args.group, world.max_new, torch.optim.AdamW(model.parameters(), lr=1e-5)
    texts = [world.decode(p) for p in prompts]
    options = {"per_device_train_batch_size": G * len(prompts), "num_generations": G, "max_completion_length": new}
    options |= {"report_to": [], "save_strategy": "no", "logging_strategy": "no", "disable_tqdm": True, "beta": 0.0}
    config = GRPOConfig(
        output_dir=folder, max_steps=1, learning_rate=1e-5, use_cpu=device.type == "cpu", bf16=False, **options
    )
    noise = lambda completions, **_: [random.random() for _ in completions]
    peer = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    data_ = datasets.Dataset.from_dict({"prompt": texts})
    trainer = GRPOTrainer(peer, reward_funcs=noise, args=config, train_dataset=data_, processing_class=tok)
    trainer.remove_callback(PrinterCallback)
    model.args = args

    def ours():
        ids, logps, _ = script.rollout(model, prompts, G, new, 1.0, world.stops, random.getrandbits(31))
        rows = [(p, r, l) for p, r, l in zip([p for p in prompts for _ in range(G)], ids, logps)]
        part = script.collate(rows)
        lengths = torch.tensor([float(len(r)) for r in ids])
        weights, denom = script.aggregation(lengths, "token", new)
        advantage = script.advantages(torch.rand(len(rows)), G)
        part = {k: v.to(device) for k, v in (part | {"weights": weights, "advantage": advantage}).items()}
        model(**part, denom=denom.to(device)).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        opt.step()
        opt.zero_grad()

    return versus(f"GRPO step, {len(prompts)} x {G} x {new}", ours, {"trl": trainer.train}, device, 5, 1)


SECTIONS = {
    "mask": mask,
    "train": train,
    "patching": patching,
    "sae": sae,
    "crosscoder": crosscoder,
    "generate": generate,
    "masks": masks,
    "crawler": crawler,
    "lzw": lzw,
    "grpo": grpo,
    "clip": clip,
}


def main(argv=None):
    """Runs the sections named (default all), prints the table, writes it as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("sections", nargs="*", default=list(SECTIONS), help=f"of {', '.join(SECTIONS)} [all]")
    parser.add_argument("--device", default="cpu", help="cpu or cuda [cpu]")
    parser.add_argument("--out", default="out/bench.json", help="[out/bench.json]")
    args = parser.parse_args(argv)
    if unknown := set(args.sections) - set(SECTIONS):
        common.fail(f"no section {', '.join(sorted(unknown))}, allowed: {', '.join(SECTIONS)}")
    with common.bad_input():
        device = common.find_device(args.device)
    torch.backends.cudnn.allow_tf32 = False  # convolutions in fp32, where results are compared
    threads, rows = torch.get_num_threads(), []
    Path(args.out).parent.mkdir(parents=True, exist_ok=True)
    for name in args.sections:
        torch.set_num_threads(threads)
        for row in SECTIONS[name](device):
            line = "{what:34s} {ours_ms:9.2f} ms   {peer:18s} {peer_ms:9.2f} ms   {ratio:6.2f}x".format(**row)
            line += "  [{:.2f}, {:.2f}]".format(*row["quartiles"])
            if "share_of_peak" in row:
                line += "  {tokens_per_s:,.0f} tok/s, {share_of_peak:.0%} of peak".format(**row)
            print(line, flush=True)
            rows.append(row)
        common.write_text(Path(args.out), json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
