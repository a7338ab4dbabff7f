"""Our speed beside what people would use instead: same process, same inputs, equal results asserted.

    python bench.py [mask train] [--device cuda]        # a table, and out/bench.json

Pairs are timed in turns, in random order, and a row gives the median of their ratios with its quartiles: a busy machine
shifts both sides alike. Peers are written here as plainly as people write them, or are installed libraries; one that is
missing is left out with a line that says so.
"""

import argparse
import json
import math
import random
import statistics
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

import common
import data
import train_hapax
from model import GPT, GPTConfig

# ------------------------------------------------------------------------------------------------------------- timing


def versus(what, ours, peers, device, rounds=15):
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

    once = {name: min(seconds(f, 1) for _ in range(3)) for name, f in contenders.items()}
    repeat = {name: 1 + int(0.02 / s) for name, s in once.items()}  # 20 ms a turn
    for _ in range(max(5, min(rounds, int(20 / sum(once.values()))))):
        for name in random.sample(list(contenders), len(contenders)):
            times.setdefault(name, []).append(seconds(contenders[name], repeat[name]))
    rows = []
    for name in peers:
        low, ratio, high = statistics.quantiles([b / a for a, b in zip(times["ours"], times[name])], n=4)
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
    overhead, on the same model; every result is equal to 1e-4.
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
        raw = lambda cells=cells: loop(cells)
        assert torch.allclose(ours(), raw(), atol=1e-4), what
        rows += versus(what, ours, {"forward per patch": raw}, device, 5)
    return rows


SECTIONS = {"mask": mask, "train": train, "patching": patching}


def main(argv=None):
    """Runs the sections named (default all), prints the table, writes it as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("sections", nargs="*", default=list(SECTIONS), help=f"of {', '.join(SECTIONS)} [all]")
    parser.add_argument("--device", default="cpu", help="cpu or cuda [cpu]")
    parser.add_argument("--out", default="out/bench.json", help="[out/bench.json]")
    args = parser.parse_args(argv)
    if unknown := set(args.sections) - set(SECTIONS):
        common.fail(f"no section {', '.join(sorted(unknown))}, allowed: {', '.join(SECTIONS)}")
    threads, rows = torch.get_num_threads(), []
    for name in args.sections:
        torch.set_num_threads(threads)
        for row in SECTIONS[name](torch.device(args.device)):
            line = "{what:34s} {ours_ms:9.2f} ms   {peer:18s} {peer_ms:9.2f} ms   {ratio:6.2f}x".format(**row)
            line += "  [{:.2f}, {:.2f}]".format(*row["quartiles"])
            if "share_of_peak" in row:
                line += "  {tokens_per_s:,.0f} tok/s, {share_of_peak:.0%} of peak".format(**row)
            print(line, flush=True)
            rows.append(row)
    Path(args.out).parent.mkdir(parents=True, exist_ok=True)
    common.write_text(Path(args.out), json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
