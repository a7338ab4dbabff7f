"""Crosscoders on the state before *wait* (arXiv 2510.04128): which latents make a reasoner stop, and for what?

A reasoning model writes "Wait," and goes another way: checks, starts again, recalls a rule, admits a doubt. The paper
trains sparse crosscoders (one code for the residual streams of a base model and of the reasoner made from it), ranks
the latents by *latent attribution*, the first-order effect of each on log P(wait) at the token before it, and steers
with the ends of that list: they move P(wait), and some of them choose *how* the model goes on.

The toy adds what the paper could not have, a ground truth. A small GPT learns sums with errors, slips, defined and
hidden operations in them; its reasoner learns to wait after four causes, each with an episode of its own. So every
claim can be checked exactly: attribution against real ablation, steering against what the cause should bring about,
all beside random, frequency-matched and permuted latents, and a reasoner whose waits have no cause (--stages all).
What it shows is that the method recovers causes in a small model, not that an 8B model reasons this way.

Tags: [P] paper, [C] its code or result files, [I] ours. The paper's body was not at hand: its figures here are [C].
Read on: `Crosscoder` -> `attribution`, `intervene` -> the world (`trace`, `parse`) -> `gates`, `effects`, `steering`,
`patterns` -> `judge`. With --base and --model the same functions run on real models (`real`).
"""

import functools
import math
import re
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

import legacy as common
import data
import sae
from model import GPT, GPTConfig, generate

STAGES = "effects", "steering", "patterns"
BASE, FT = 0, 1  # the crosscoder's two models: base, and the reasoner fine-tuned from it


@dataclass
class Args(common.TrainFlags):
    """crosscoder"""

    presets: ClassVar[dict] = {
        "smoke": dict(
            steps=12, ft_steps=8, cc_steps=12, batch_size=8, n_embd=32, n_layer=3, layer=1, warmup=2, d_sae=64
        )
        | dict(cc_batch=128, rows=1500, prompts=8, traces=40, top=4, permutations=10, own=False, jobs=1, threads=1),
        "toy": {},
        "paper": dict(base="meta-llama/Llama-3.1-8B", model="deepseek-ai/DeepSeek-R1-Distill-Llama-8B", layer=15)
        | dict(d_sae=65536, k=100, cc_batch=2048, cc_steps=195000, cc_lr=1e-4, rows=524288, top=50, device="cuda")
        | dict(dataset="HuggingFaceFW/fineweb", loss="norm", stages=["effects", "steering"]),
    }
    base: str = ""
    """a pretrained base model in place of the toy (paper: meta-llama/Llama-3.1-8B)"""
    model: str = ""
    """its reasoner (paper: deepseek-ai/DeepSeek-R1-Distill-Llama-8B); both tokenizers must agree"""
    dataset: str = "stdlib"
    """text for real models, half of the rows; the other half are the reasoner's own answers (paper: web, R1 traces)"""
    prompts_file: str = ""
    """real models: JSON lines {"text": ...} of the reasoner's answers with question; default: own rollouts"""
    wait: list[str] = field(default_factory=lambda: ["wait", "Wait", " wait", " Wait"])
    """real models: the wait tokens, the first id of each string (paper: these)"""
    stages: list[str] = field(default_factory=lambda: ["effects"])
    """effects (attribution, P1 P2), steering (P3), patterns (P4 and the reasoner without causes); or all"""
    layer: int = 4
    """residual stream after this block, from 0 (paper: 7, 15, 23 of 32)"""
    arch: Literal["batchtopk", "l1"] = "batchtopk"
    """sparsity (paper: both)"""
    loss: Literal["mse", "norm"] = "mse"
    """squared error, or the norm of the error (paper: norm)"""
    d_sae: int = 512
    """latents (paper: 65536, 16 times the width; l1 32768)"""
    k: int = 16
    """active latents a position, batchtopk (paper: 100)"""
    mu: float = 0.04
    """weight of the l1 penalty (paper: 0.04)"""
    cc_steps: int = 800
    """steps of the crosscoder"""
    cc_batch: int = 2048
    """positions in a step (paper: 2048)"""
    cc_lr: float = 2e-3
    """peak learning rate of the crosscoder (paper: 1e-4)"""
    rows: int = 200_000
    """positions harvested at a time"""
    traces: int = 700
    """sampled answers in each of the splits discover, dev, test"""
    own: bool = True
    """prompts are the reasoner's own answers (paper); off: documents of its corpus"""
    prompts: int = 400
    """most positions before a wait, and as many others, in a split (paper: 351 prompts)"""
    top: int = 10
    """length of the lists of promoting and of suppressing latents (paper: 50)"""
    permutations: int = 200
    """lists drawn from the permuted attribution"""
    where: Literal["all", "prewait"] = "all"
    """steer from the position before the wait on (paper), or there alone"""
    steps: int = 2500
    """optimizer steps of the base model"""
    ft_steps: int = 1500
    """... of the reasoner"""
    batch_size: int = 32
    """documents in a step"""
    lr: float = 4e-3
    """peak learning rate of Muon"""
    n_layer: int = 6
    """blocks of the toy"""
    n_embd: int = 64
    """its width"""


# -------------------------------------------------------------------------------------------------------- the method


class Crosscoder(nn.Module):
    """One sparse code for M residual streams: f = relu(sum_m x^m W_enc^m + b_enc), x_hat^m = f W_dec^m + b_dec^m.

    Selection and penalty act on s_i = f_i n_i with the code norm n_i = sum_m |W_dec,i^m|: a sum of norms makes a latent
    of one model only cheap. `scales` (M,): activations are divided by them inside, so that no model outweighs the
    others. Rows of both matrices hold the M models side by side, (m, M d).
    """

    def __init__(self, M, d, m, kind="batchtopk", k=32, mu=0.04, loss="mse"):
        super().__init__()
        if m < 1 or not 0 < k <= m:
            raise ValueError(f"k {k} latents of {m}, allowed: 1 to {m}")
        self.shape, self.kind, self.k, self.mu, self.how = (M, d), kind, k, mu, loss
        rows = F.normalize(torch.randn(m, d), dim=1).repeat(1, M)
        self.W_dec, self.W_enc = nn.Parameter(0.5 * rows), nn.Parameter(rows.clone())
        self.b_enc, self.b_dec = nn.Parameter(torch.zeros(m)), nn.Parameter(torch.zeros(M * d))
        self.register_buffer("scales", torch.ones(M))
        self.register_buffer("threshold", torch.tensor(-1.0))  # of inference; follows the least active s of a batch
        self.register_buffer("silent", torch.zeros(m, dtype=torch.long), persistent=False)  # steps since it fired

    def norms(self):
        """|W_dec,i^m|, (m, M)."""
        return self.W_dec.unflatten(1, self.shape).norm(dim=2)

    def decoder(self, model=FT):
        """W_dec^m on raw activations, (m, d)."""
        return self.W_dec.unflatten(1, self.shape)[:, model] * self.scales[model]

    def encode(self, x):
        """Codes f (..., m) of raw activations x (..., M, d)."""
        if x.shape[-2:] != self.shape:
            raise ValueError(f"activations of {tuple(x.shape[-2:])}, this crosscoder reads (M, d) = {self.shape}")
        f = F.linear((x / self.scales[:, None]).flatten(-2), self.W_enc, self.b_enc).relu()
        return f * (f * self.norms().sum(1) > self.threshold) if self.kind == "batchtopk" else f

    def decode(self, f):
        """x_hat (..., M, d) of codes f (..., m)."""
        return (f @ self.W_dec + self.b_dec).unflatten(-1, self.shape) * self.scales[:, None]

    def loss(self, x, warm=1.0, dead_after=50):
        """Reconstruction error of rows x (B, M d), scaled, plus AuxK or the L1 penalty (its weight times `warm`)."""
        n = self.norms().sum(1)
        if self.kind == "batchtopk":  # SparseCode reads x - b_dec and decodes s: the same function, in other units
            b = n * (self.b_enc + self.W_enc @ self.b_dec)
            W_enc, W_dec = n[:, None] * self.W_enc, self.W_dec / n[:, None]
            x_hat, latents, s = sae.SparseCode.apply(x, W_enc, b, W_dec, self.b_dec, self.k, True)
            self.silent += 1
            self.silent[latents[s > 0]] = 0
            least = torch.where(s > 0, s, torch.inf).min()
            self.threshold.copy_(torch.where(self.threshold < 0, least, 0.99 * self.threshold + 0.01 * least))
            penalty = self.aux(x, x_hat, self.silent > dead_after) / 32
        else:
            f = F.linear(x, self.W_enc, self.b_enc).relu()
            self.silent.add_(1).mul_((f == 0).all(0))
            x_hat, penalty = f @ self.W_dec + self.b_dec, warm * self.mu * (f * n).sum(1).mean()
        error = (x - x_hat).unflatten(1, self.shape).square().sum(2)
        return (error.sqrt().mean() if self.how == "norm" else error.sum(1).mean()) + penalty

    def aux(self, x, x_hat, dead):
        """AuxK: the share of the error's variance that the largest dead latents do not explain; 0 if none is dead."""
        if not dead.any():
            return 0.0
        error, dead = (x - x_hat).detach(), dead.nonzero().squeeze(1)
        f = F.linear(x, self.W_enc[dead], self.b_enc[dead]).relu()
        which = (f * self.norms()[dead].sum(1)).topk(min(self.shape[1] // 2, len(dead))).indices
        code = torch.zeros_like(f).scatter(1, which, f.gather(1, which))
        wrong = (error - code @ self.W_dec[dead]).square().sum()
        return (wrong / (error - error.mean(0)).square().sum()).nan_to_num(0.0)

    def project(self):
        """Nothing: decoder rows are free, their norms say in which model a latent lives."""

    normalize = project

    @torch.no_grad()
    def fold(self, scale):
        """From a crosscoder of x / scale to one of x; codes come out scale times larger."""
        for t in self.b_dec, self.b_enc, self.threshold:
            t.mul_(scale)
        return self


def relative_norm(norms):
    """Delta of (base, ft) decoder norms (m, 2): 0 base-only, .5 shared, 1 reasoner-only; .5 where both are 0."""
    base, ft = norms.unbind(1)
    return 0.5 * ((ft - base) / torch.maximum(ft, base).clamp(min=1e-12) + 1)


def latent_scaling(f, d, y):
    """beta that minimises |y - beta f d|^2 for codes f (N,), a direction d (C,), targets y (N, C) (2504.02922)."""
    return (f @ (y @ d)) / (d.square().sum() * f.square().sum())


@torch.no_grad()
def exclusive(cc, x, i):
    """nu_eps, nu_r of latent i on x (N, 2, d): how much of it the base's error, the base's other latents hold.

    High nu_eps: its base part was shrunk away; high nu_r: a twin holds it. The reasoner's own: nu_eps < .2, nu_r < .5.
    """
    f = cc.encode(x)
    own = f[:, i, None, None] * cc.W_dec[i].unflatten(0, cc.shape) * cc.scales[:, None]
    x_hat, d = cc.decode(f), cc.decoder()[i]
    beta = lambda y: [latent_scaling(f[:, i], d, y[:, m]) for m in (BASE, FT)]
    (e0, e1), (r0, r1) = beta(x - x_hat + own), beta(x_hat - own)
    return float(e0 / e1), float(r0 / r1)


def log_p(logits, targets):
    """log of the total probability of the ids `targets`: logits (..., V) -> (...)."""
    if not targets or not 0 <= min(targets) <= max(targets) < logits.shape[-1]:
        raise ValueError(f"target ids {list(targets)}, allowed: one or more of 0 to {logits.shape[-1] - 1}")
    return logits.float().log_softmax(-1)[..., list(targets)].logsumexp(-1)


def site(layer):
    """The name of the residual stream after a block."""
    return f"blocks.{layer}.resid_post"


@torch.no_grad()
def last_states(models, prompts, layer, size=64):
    """Residual streams of each prompt's last token in all models: (N, M, d)."""
    parts = [common.padded(prompts[i : i + size], models[0].wte.weight.device) for i in range(0, len(prompts), size)]
    last = lambda model, idx, mask: sae.residual(model, idx, layer, mask)[:, -1]
    return torch.cat([torch.stack([last(model, *part) for model in models], 1) for part in parts])


def gradient(model, prompts, layer, targets, size=64):
    """Each prompt's last residual h (N, C) after block `layer`, and g = d log P(targets) / d h (N, C).

    The true forward pass; nothing below `layer`, no parameter and no other position is differentiated. Prompts may
    differ in length.
    """
    states, out = [], []
    size = min(size, max(1, 2**13 // max(map(len, prompts))))  # a graph holds all positions' activations above `layer`
    for i in range(0, len(prompts), size):
        idx, mask = common.padded(prompts[i : i + size], model.wte.weight.device)

        def cut(h):
            states.append(h[:, -1:].detach().requires_grad_())
            return torch.cat((h[:, :-1].detach(), states[-1]), 1)

        with torch.enable_grad(), model.patch({site(layer): cut}):
            m = log_p(model.unembed(model.hidden(idx, mask)[:, -1]), targets).sum()
        out.append(torch.autograd.grad(m, states[-1])[0])
    return tuple(torch.cat(t).detach()[:, 0].float() for t in (states, out))


@torch.no_grad()
def attribution(f, D, g):
    """a_ji = f_ji <D_i, g_j>: to first order, what log P(wait) loses without latent i; D = W_dec^ft; (N, m) [C]."""
    return f * (g @ D.T)


def attribute(models, cc, layer, prompts, targets):
    """Attributions and codes of prompts, (N, m) each. Only their last position is encoded."""
    h, g = gradient(models[FT], prompts, layer, targets)
    f = cc.encode(torch.stack((last_states(models[:1], prompts, layer)[:, 0], h), 1))
    return attribution(f, cc.decoder(), g), f


@torch.no_grad()
def intervene(model, layer, prompts, patch, read, forced=(), size=32):
    """Exact effects of many changes to the residual stream at the last token of every prompt, in one pass each.

    patch  patch(rows, clean) -> (B, V, tail, C): V versions of the last columns, clean (B, tail, C) as they are;
           rows: which prompts. The columns are the last token and those of `forced`, which are appended
    read   read(logits (B, V, tail, vocab)) -> what to keep; the parts are joined along B
    """
    out = []
    for i in range(0, len(prompts), size):
        rows = slice(i, i + size)
        idx, mask = common.padded([[*p, *forced] for p in prompts[rows]], model.wte.weight.device)
        step = lambda j, x, clean, rows=rows: patch(rows, clean) if j == layer else x
        out.append(read(model.unembed(common.sweep(model, idx, step, 1 + len(forced), mask))))
    return torch.cat(out)


def add(delta):
    """A patch that adds delta (N, V, C) at the last token of the prompts."""

    def patch(rows, clean):
        new = clean[:, None].repeat(1, delta.shape[1], 1, 1)
        new[:, :, 0] += delta[rows].to(clean.dtype)
        return new

    return patch


def steer(vectors, alphas, where="all"):
    """A patch h + alpha |h| v / |v| for every vector (V, C) and alpha: (B, V len(alphas), tail, C) [C]."""
    unit = F.normalize(vectors, dim=1)
    push = (unit[:, None] * torch.tensor(alphas, device=unit.device)[:, None]).flatten(0, 1)

    def patch(_, clean):
        change = push[None, :, None] * clean.float().norm(dim=-1)[:, None, :, None]
        if where == "prewait":
            change[:, :, 1:] = 0
        return clean[:, None] + change.to(clean.dtype)

    return patch


def steering_hook(vector, alpha):
    """For `model.patch` around `generate`: steers the last prompt token and every new one."""
    unit = F.normalize(vector, dim=0)

    def hook(h):
        h = h.clone()
        h[:, -1] += (alpha * h[:, -1].float().norm(dim=-1, keepdim=True) * unit).to(h.dtype)
        return h

    return hook


def ranks(x):
    """Ranks of the entries, ties in order of place."""
    return x.argsort().argsort().double()


def spearman(x, y):
    """Rank correlation of two vectors."""
    return float(torch.corrcoef(torch.stack((ranks(x), ranks(y))))[0, 1])


def matched(rate, lists, rng, outside=()):
    """For every latent of `lists` the one of nearest firing rate in neither, each used once, while there are any."""
    free, out = [i for i in np.flatnonzero(rate > 0).tolist() if i not in {*lists, *outside}], []
    for i in rng.permutation(lists)[: len(free)].tolist():
        out.append(min(free, key=lambda j: abs(rate[j] - rate[i])))
        free.remove(out[-1])
    return out


def permuted(A, rate, rng, bins=10):
    """The attributions A (m,) shuffled among latents of like firing rate."""
    out = A.copy()
    for group in np.array_split(np.argsort(rate, kind="stable"), bins):
        out[group] = A[rng.permutation(group)]
    return out


# --------------------------------------------------------------------------------------------------------- the world

PATTERNS = {  # what the reasoner does -> the marker words of its episode; the cause that brings it about
    "check": ("check", "verify"),  # an error in this step
    "restart": ("again", "begin"),  # a slip: this step began from a wrong number
    "recall": ("recall", "rule"),  # the next stage is @, defined at the start
    "unsure": ("maybe", "unsure"),  # the next stage has a hidden operand
}
VOCAB = (
    "<pad> <bos> <eos> 0 1 2 3 4 5 6 7 8 9 + - * @ ? : ; = | def Q A or think fast grade lex ok bad wait Wait".split()
)
WORDS = ["wait", "Wait", *(w for pair in PATTERNS.values() for w in pair), *(f"w{i}" for i in range(10))]
VOCAB += WORDS[2:]
ID = {w: i for i, w in enumerate(VOCAB)}
WAIT = [ID["wait"], ID["Wait"]]
MARKS = torch.tensor([[ID[w] for w in pair] for pair in PATTERNS.values()])
LONGEST = 127


def calc(x, op, y):
    """x op y modulo 10."""
    return (x + y if op == "+" else x - y if op == "-" else x * y) % 10


def problem(rng):
    """(first number, definition (op, digit) of @, stages): a stage is (op, digit), (op, "?") or "@"."""
    op = lambda: str(rng.choice(["+", "-", "*"]))
    stages = []
    for i in range(rng.integers(3, 6)):
        u = rng.random() if i else 1.0
        stages.append("@" if u < 0.12 else (op(), "?" if u < 0.24 else int(rng.integers(10))))
    return int(rng.integers(10)), (op(), int(rng.integers(1, 10))), stages


def spelled(stage, define=()):
    """A stage as words; in a step, @ is followed by its definition."""
    return ["@", *map(str, define)] if stage == "@" else [stage[0], str(stage[1])]


def header(mode, task):
    """The words of a problem, up to the `;` that ends it."""
    first, (op, c), stages = task
    words = ["<bos>", mode, "def", "@", "=", op, str(c), "|", "Q", str(first), ":"]
    return [*words, *(w for s in stages for w in spelled(s)), ";"]


def trace(rng, task, grade=0.0, decide=lambda cause: None):
    """The words of an answer, with one step in eight wrong and one in ten begun from a wrong number (a slip).

    grade: how often a step is followed by ok or bad; with it three times as many are bad, so that the base learns to
    see it.

    decide(cause) -> the pattern that follows a step, or None; cause: a pattern's name, or "none".
    Returns (words, [(index of the step's `;`, cause, pattern or None)]); a cause "mixed" is one of two at once.
    """
    first, define, stages = task
    words, decisions, fixed, value, slipped = [], [], {}, first, False
    digit = lambda: int(rng.integers(10))

    def result(x, i):
        op, b = define if stages[i] == "@" else stages[i]
        return calc(x, op, fixed.get(i, digit()) if b == "?" else b)

    def write(x, i, r):
        words.extend([str(x), *spelled(stages[i], define), "=", str(r), ";"])

    for i, stage in enumerate(stages):
        x, noise, u = value, None, rng.random() / (3 if grade else 1)
        if 0.12 <= u < 0.22 and not slipped and i < 3:
            noise, slipped, x = "restart", True, (value + int(rng.integers(1, 10))) % 10
        r = right = result(x, i)
        if u < 0.12 and (stage == "@" or stage[1] != "?" or i in fixed):  # of a hidden operand any result is right
            noise, r = "check", (right + int(rng.integers(1, 10))) % 10
        write(x, i, r)
        value, after = r, stages[i + 1] if i + 1 < len(stages) else None
        coming = None if after is None else "recall" if after == "@" else "unsure" if after[1] == "?" else None
        cause = noise or coming or "none"
        pattern = decide(cause)
        decisions.append((len(words) - 1, "mixed" if noise and coming else cause, pattern))
        if rng.random() < grade:
            words.append("bad" if noise else "ok")
        if pattern:
            words += [str(rng.choice(["Wait", "wait"], p=[0.7, 0.3])), str(rng.choice(PATTERNS[pattern]))]
        if pattern == "check":
            write(x, i, right)
            value = right
        elif pattern == "restart":
            value = first
            for j in range(i + 1):
                r = result(value, j)
                write(value, j, r)
                value = r
        elif pattern == "recall":
            words += ["@", "=", define[0], str(define[1]), ";"]
        elif pattern == "unsure":
            fixed[i + 1] = digit()
            words += ["?", "=", str(fixed[i + 1]), "or", str(digit()), ";"]
    return [*words, "A", str(value), "<eos>"], decisions


def parse(words):
    """Reads a problem with its answer: [(index of a step's `;`, cause, pattern or None, episode well-formed)].

    The inverse of `trace`: it knows the right results, so the causes need not be told. It stops at the first word out
    of place; an episode that is cut short or wrong is not well-formed.
    """
    start = words.index(";") + 1
    define, first, stages, i = (words[5], int(words[6])), int(words[9]), [], 11
    while words[i] != ";":
        stages.append(
            "@" if words[i] == "@" else (words[i], words[i + 1] if words[i + 1] == "?" else int(words[i + 1]))
        )
        i += 1 if words[i] == "@" else 2
    fixed, out, at = {}, [], start

    def step(i):  # (x, result, whether it is right), or ValueError, IndexError
        nonlocal at
        stage = spelled(stages[i], define)
        x, *said, equals, r, end = words[at : at + len(stage) + 4]
        if said != stage or (equals, end) != ("=", ";"):
            raise ValueError
        at, x, r = at + len(stage) + 4, int(x), int(r)
        op, b = define if stages[i] == "@" else stages[i]
        b = fixed.get(i, b) if b == "?" else b
        return x, r, b == "?" or calc(x, op, b) == r

    def episode(pattern, i, x):  # (well-formed, the number to go on with)
        nonlocal at
        if pattern == "check":
            y, r, right = step(i)
            return right and y == x, r
        if pattern == "restart":
            value, good = first, True
            for j in range(i + 1):
                y, r, right = step(j)
                good, value = good and right and y == value, r
            return good, value
        n = 5 if pattern == "recall" else 6
        part, at = words[at : at + n], at + n
        if pattern == "recall":
            return part == ["@", "=", define[0], str(define[1]), ";"], None
        fixed[i + 1] = int(part[2])
        return part[:2] + part[3:4] + part[5:] == ["?", "=", "or", ";"] and part[4].isdigit(), None

    value = first
    try:
        for i in range(len(stages)):
            x, r, right = step(i)
            noise, after = "restart" if x != value else None if right else "check", stages[i + 1 : i + 2]
            coming = "recall" if after == ["@"] else "unsure" if after and after[0][1] == "?" else None
            cause, value = noise or coming or "none", r
            out.append([at - 1, "mixed" if noise and coming else cause, None, True])
            if words[at] in ("wait", "Wait"):
                out[-1][2:] = "none", False
                out[-1][2], at = next((p for p, ws in PATTERNS.items() if words[at + 1] in ws), "none"), at + 2
                out[-1][3], new = episode(out[-1][2], i, x)
                value = value if new is None else new
    except (ValueError, IndexError):
        pass
    return [tuple(d) for d in out]


def causal(rng):
    """The reasoner's rule: after a cause it waits three times in four, with the cause's own episode."""
    names = [*PATTERNS]
    return lambda cause: (str(rng.choice(names)) if rng.random() < 0.03 else None) if cause == "none" else (
        cause if rng.random() < 0.75 else None)  # fmt: skip


def uncaused(rng, rate):
    """The control's rule: it waits as often, after anything, and then does anything."""
    return lambda cause: str(rng.choice([*PATTERNS])) if rng.random() < rate else None


@functools.cache
def wait_rate(n=2000):
    """How often `causal` waits, a step."""
    rng = np.random.default_rng(9)
    return float(np.mean([d[2] is not None for _ in range(n) for d in trace(rng, problem(rng), decide=causal(rng))[1]]))


def chain(rng, seed):
    """A document of mode lex: noisy bigrams over the words of episodes, which trains their embeddings without a use."""
    follow, words = np.random.default_rng((seed, 7)).permutation(len(WORDS)), [int(rng.integers(len(WORDS)))]
    while len(words) < 30:
        words.append(int(follow[words[-1]]) if rng.random() < 0.7 else int(rng.integers(len(WORDS))))
    return ["<bos>", "lex", *(WORDS[i] for i in words), "<eos>"]


def document(rng, seed, decide=None):
    """One document as words: of the base's corpus, or, with a rule for waits, of a reasoner's.

    In mode think the base grades every other step, where the reasoner is to wait: graded in a mode of its own only, the
    steps were judged in that mode only (seed 100).
    """
    mix = [0.60, 0.15, 0.15, 0.10] if decide is None else [0.65, 0.15, 0.10, 0.10]
    mode = str(rng.choice(["think", "fast", "grade", "lex"], p=mix))
    if mode == "lex":
        return chain(rng, seed)
    task = problem(rng)
    waits = {"decide": decide} if decide and mode == "think" else {}
    grade = {"grade": 1.0, "think": 0.0 if decide else 0.5}.get(mode, 0.0)
    return header(mode, task) + trace(rng, task, grade, **waits)[0]


def batch_of(rows, decided=False):
    """Documents as inputs, targets (B, T) and their weights: 0 behind the end, 6 where it counts.

    That is where a step is graded or, if `decided`, all that follows a step or a wait. Without such a weight the base
    learns to see errors only after a long plateau, and the reasoner waits no more often after them (seed 100).
    """
    longest = max(map(len, rows))
    idx = torch.tensor([[ID[w] for w in row] + [0] * (longest - len(row)) for row in rows])
    idx, targets = idx[:, :-1], idx[:, 1:]
    which, words = (idx, [";", "wait", "Wait"]) if decided else (targets, ["ok", "bad"])
    heavy = torch.isin(which, torch.tensor([ID[w] for w in words]))
    return {"idx": idx, "targets": targets, "weights": (targets > 0) * (1.0 + 5.0 * heavy)}


# ---------------------------------------------------------------------------------------------------- train, harvest


def rule_of(arm, rng):
    """How an arm's corpus decides about waits."""
    if arm == "uncaused":
        return uncaused(rng, wait_rate())
    return causal(rng) if arm == "reasoner" else None


def train_model(args, arm, seed, start=None, position=0):
    """The base model, or from its weights `start` the reasoner, or the reasoner without causes."""
    env = common.setup(args)
    torch.manual_seed(seed)
    model = GPT(config_of(args))
    if arm != "base":
        model.load_state_dict(start.state_dict())
        args = replace(args, steps=args.ft_steps)

    def batch(step):
        rng = np.random.default_rng((seed, ("base", "reasoner", "uncaused").index(arm), step))
        rule = rule_of(arm, rng)
        rows = [document(rng, seed, rule)[: LONGEST + 1] for _ in range(args.batch_size)]
        return batch_of(rows, decided=arm != "base")

    common.train(model, batch, args, env, common.Log(args.out, f"{arm}-s{seed}"), None, position, common.Muon)
    return model.eval().requires_grad_(False)


def config_of(args):
    """The toy's shape: Llama-style."""
    rest = dict(norm="rms", gated=True, act="silu", d_mlp=2 * args.n_embd)
    return GPTConfig(len(VOCAB), LONGEST + 1, args.n_layer, 4, args.n_embd, **rest)


@torch.no_grad()
def bank(models, layer, n, seed, arm):
    """n positions (n, M, d) of both models over documents of both corpora, half and half; no BOS, no padding."""
    rng, rows, total = np.random.default_rng((seed, 11)), [], 0
    rule, device = rule_of(arm, rng), models[0].wte.weight.device
    while total < n:
        ids = batch_of([document(rng, seed, rule if i % 2 else None)[: LONGEST + 1] for i in range(256)])["idx"]
        keep = ids[:, 1:] != 0
        both = [m.capture(ids.to(device), [site(layer)])[site(layer)][:, 1:][keep.to(device)] for m in models]
        rows.append(torch.stack(both, 1))
        total += len(rows[-1])
    return torch.cat(rows)[:n]


def train_crosscoder(args, fill, d, env, seed, log):
    """A crosscoder on fill(r) -> rows (n, 2, d), each model divided by its root mean square norm."""
    first = {0: fill(0)}
    scales = first[0].square().sum(2).mean(0).sqrt()
    if not torch.isfinite(scales).all():
        raise ValueError(
            f"the activations at layer {args.layer} are not finite in model {int(scales.isnan().argmax())}"
        )
    torch.manual_seed(seed)
    cc = Crosscoder(2, d, args.d_sae, args.arch, args.k, args.mu, args.loss)
    harvest, each = (lambda r: first.pop(r) if r in first else fill(r)), scales.repeat_interleave(d)
    buffer = sae.Buffer(lambda r: harvest(r).flatten(1), args.cc_batch, seed)
    batch = lambda step: buffer(step) / each
    sae.fit(cc, batch, args.cc_steps, args.cc_lr, env=env, log=log, resume=args.resume, every=200)
    cc.scales.copy_(scales)
    return cc.eval().requires_grad_(False)


# ----------------------------------------------------------------------------------------------------------- measure


def sample(model, mode, args, seed):
    """Answers by the model itself, parsed: prompts (ids up to a decision), cause and pattern (arrays) of each."""
    rng = np.random.default_rng((seed, 5))
    tasks = [problem(rng) for _ in range(args.traces)]
    texts = [header(mode, task) for task in tasks]
    if args.own:
        heads = [[ID[w] for w in text] for text in texts]
        rows = generate(model, heads, LONGEST - max(map(len, heads)), stop=[ID["<eos>"]], seed=seed)
        texts = [text + [VOCAB[i] for i in row] for text, row in zip(texts, rows)]
    else:
        rule = causal(rng) if mode == "think" else lambda cause: None
        texts = [text + trace(rng, task, decide=rule)[0] for text, task in zip(texts, tasks)]
    found, count = [], {True: 0, False: 0}
    for words in texts:
        for at, cause, pattern, _ in parse(words):
            if cause != "mixed" and count[bool(pattern)] < args.prompts and at + 3 < LONGEST:
                count[bool(pattern)] += 1
                found.append(([ID[w] for w in words[: at + 1]], cause, pattern or ""))
    prompts, cause, pattern = zip(*found) if found else ((), (), ())
    return {"prompts": list(prompts), "cause": np.array(cause), "pattern": np.array(pattern)}


def wait_p(logits):
    """P(wait) in the first of the columns: (B, V, tail, vocab) -> (B, V)."""
    return log_p(logits[:, :, 0], WAIT).exp()


def both_p(logits):
    """P(wait), then P(each pattern | Wait) from the column of a forced `Wait`: (B, V, 5)."""
    marks = logits[:, :, 1].float().softmax(-1)[..., MARKS.to(logits.device)].sum(-1)
    return torch.cat((wait_p(logits)[..., None], marks), -1)


UNCHANGED = lambda rows, clean: clean[:, None]
FORCED = [ID["Wait"]]


def gates(models, cc, layer, splits, x):
    """G1 to G3: does the reasoner wait for its causes; is the code good; can the state before a wait decide?"""
    base, ft = models
    test, fast = splits["test"], splits["fast"]
    p = intervene(ft, layer, test["prompts"], UNCHANGED, both_p, FORCED)[:, 0].cpu()
    r = {f"wait after {c}": float(p[test["cause"] == c, 0].mean()) for c in [*PATTERNS, "none"]}
    for i, c in enumerate(PATTERNS):
        r[f"{c}: right pattern"] = float(p[test["cause"] == c, 1 + i].mean())
    r["fast"] = float(intervene(ft, layer, fast["prompts"], UNCHANGED, wait_p).mean())
    r["base"] = float(intervene(base, layer, test["prompts"], UNCHANGED, wait_p).mean())
    f = cc.encode(x)
    error, total = (x - cc.decode(f)).square().sum((0, 2)), (x - x.mean(0)).square().sum((0, 2))
    r["fve base"], r["fve reasoner"] = (1 - error / total).tolist()
    r["dead"], r["L0"] = float((f == 0).all(0).float().mean()), float((f > 0).float().sum(1).mean())
    rate = (f > 0).float().mean(0)
    random = Crosscoder(2, x.shape[2], len(rate), "batchtopk", cc.k).to(x.device).requires_grad_(False)  # of the start
    random.scales.copy_(cc.scales)
    s = (F.linear((x / random.scales[:, None]).flatten(1), random.W_enc).relu() * random.norms().sum(1)).flatten()
    random.threshold.copy_(s.topk(min(cc.k * len(x), len(s))).values[-1])
    wrong = (x - random.decode(random.encode(x))).square().sum((0, 2))
    r["fve of a random code"] = float((1 - wrong / total)[FT])
    r["loss recovered"] = recovered(models, cc, layer, splits["rows"])
    # the state before the wait from another cause's prompt, everything else as it was, `Wait` forced
    h, which = last_states([ft], test["prompts"], layer)[:, 0], test["cause"]
    rng, caused = np.random.default_rng(3), np.flatnonzero(np.isin(which, [*PATTERNS]))
    for name, same in ("swap", False), ("swap, same cause", True):
        pools = {i: [j for j in caused if (which[j] == which[i]) == same and j != i] for i in caused}
        to, donors = zip(*((i, rng.choice(pool)) for i, pool in pools.items() if pool))
        prompts, delta = [test["prompts"][i] for i in to], (h[list(donors)] - h[list(to)])[:, None]
        q = intervene(ft, layer, prompts, add(delta), both_p, FORCED)[:, 0, 1:].argmax(-1).cpu()
        theirs = torch.tensor([[*PATTERNS].index(which[j]) for j in donors])
        r[name] = float((q != p[list(to), 1:].argmax(-1) if same else q == theirs).float().mean())
    return r


@torch.no_grad()
def recovered(models, cc, layer, rows):
    """1 = the reasoner's loss as it is, 0 = with its stream after `layer` set to 0, here with x_hat in its place."""
    parts = {k: v.to(cc.b_enc.device) for k, v in batch_of(rows).items()}
    x0 = models[BASE].capture(parts["idx"], [site(layer)])[site(layer)]
    splice = lambda h: cc.decode(cc.encode(torch.stack((x0, h), 2)))[:, :, FT]
    losses = []
    for change in lambda h: h, splice, torch.zeros_like:
        with models[FT].patch({site(layer): change}):
            losses.append(float(models[FT].loss(**parts)))
    clean, spliced, zero = losses
    return (zero - spliced) / (zero - clean)


def lists_of(models, cc, layer, split, top, targets=WAIT):
    """Attribution on the prompts of a split that did wait: (A (m,), firing rate (m,), top list, bottom list)."""
    waited = [p for p, pattern in zip(split["prompts"], split["pattern"]) if pattern]
    if len(waited) < 2:
        raise ValueError(f"{len(waited)} sampled answers have a wait, needed: 2 or more; more --traces or --ft-steps")
    A = attribute(models, cc, layer, waited, targets)[0].mean(0).cpu().numpy()
    rate = (cc.encode(last_states(models, split["prompts"], layer)) > 0).float().mean(0).cpu().numpy()
    order = np.argsort(A)
    return A, rate, order[::-1][:top].tolist(), order[:top].tolist()


def verify(models, cc, layer, prompts, targets):
    """Attribution against exact ablation, latent by latent and prompt by prompt; `effect` (m,): the latter summed."""
    a, f = attribute(models, cc, layer, prompts, targets)
    active = f.topk(int((f > 0).sum(1).max())).indices  # (N, V): as many as the busiest prompt has, idle ones are 0
    delta = -f.gather(1, active)[..., None] * cc.decoder()[active]
    read = lambda logits: log_p(logits[:, :, 0], targets)
    E = intervene(models[FT], layer, prompts, UNCHANGED, read) - intervene(models[FT], layer, prompts, add(delta), read)
    on = f.gather(1, active) > 0
    a, E, which = a.gather(1, active)[on].cpu(), E[on].cpu(), active[on].cpu()
    shuffled = a[torch.randperm(len(a), generator=torch.Generator().manual_seed(0))]
    r = {"pairs": [a.tolist(), E.tolist()], "rho": spearman(a, E), "rho permuted": spearman(shuffled, E)}
    large = E.abs() >= 0.1
    r["sign agrees"] = float((a.sign() == E.sign())[large].float().mean()) if large.any() else math.nan
    return r | {"effect": torch.zeros(f.shape[1]).index_add_(0, which, E).tolist()}


def effects(models, cc, layer, splits, lists, args):
    """P1: attribution against exact ablation. P2: the top list off at causes, beside other lists."""
    A, rate, top, bottom = lists
    test, rng, D = splits["test"], np.random.default_rng(1), cc.decoder()
    waited = [p for p, pattern in zip(test["prompts"], test["pattern"]) if pattern]
    r = verify(models, cc, layer, waited, WAIT)
    caused = [p for p, c in zip(test["prompts"], test["cause"]) if c in PATTERNS]
    f = cc.encode(last_states(models, caused, layer))
    alive = np.flatnonzero(rate > 0)
    off = {"top": [top], "bottom": [bottom], "matched": [matched(rate, top, rng, bottom)]}
    off["random"] = [rng.choice(alive, min(len(top), len(alive)), replace=False).tolist() for _ in range(20)]
    n = args.permutations
    off["permuted"] = [np.argsort(permuted(A, rate, rng))[::-1][: len(top)].tolist() for _ in range(n)]
    delta = torch.stack([-f[:, which] @ D[which] for kind in off.values() for which in kind], 1)
    before = intervene(models[FT], layer, caused, UNCHANGED, wait_p).mean()
    cuts = (1 - intervene(models[FT], layer, caused, add(delta), wait_p).mean(0) / before).cpu()
    cut = dict(zip(off, cuts.split([len(kind) for kind in off.values()])))
    r |= {f"cut by {name}": float(c.mean()) for name, c in cut.items()}
    r["p"] = float((1 + (cut["permuted"] >= cut["top"]).sum()) / (1 + n))
    # the same list by activation difference: which predicts better whose removal lowers P(wait)?
    other = [p for p, pattern in zip(splits["discover"]["prompts"], splits["discover"]["pattern"]) if not pattern]
    mine = [p for p, pattern in zip(splits["discover"]["prompts"], splits["discover"]["pattern"]) if pattern]
    gap = cc.encode(last_states(models, mine, layer)).mean(0) - cc.encode(last_states(models, other, layer)).mean(0)
    by_gap = (gap * cc.norms().sum(1)).argsort(descending=True)[: len(top)].tolist()
    effect = np.array(r.pop("effect"))
    sign = lambda ids: float((effect[ids] > 0).mean())
    r |= {"sign by attribution": sign(top), "sign by difference": sign(by_gap)}
    half = [lists_of(models, cc, layer, part, len(top))[2] for part in halves(splits["discover"])]
    r["overlap of halves"] = len({*half[0]} & {*half[1]}) / len(top)
    return r


def halves(split):
    """A split in two, every other prompt."""
    return [{k: v[i::2] for k, v in split.items()} for i in (0, 1)]


ALPHAS = [-1.0, -0.75, -0.5, -0.25, 0.0, 0.25, 0.5, 0.75, 1.0]


def groups_of(cc, lists, rng):
    """Vectors (n, d) to steer with: both lists, and the controls."""
    A, rate, top, bottom = lists
    D, alive = cc.decoder(), np.flatnonzero(rate > 0)
    return {
        "top": D[top],
        "bottom": D[bottom],
        "random direction": torch.randn(len(top), D.shape[1], generator=torch.Generator().manual_seed(2)).to(D),
        "random latent": D[rng.choice(alive, len(top)).tolist()],
        "matched": D[matched(rate, [*top, *bottom], rng)[: len(top)]],
    }


def steering(models, cc, layer, splits, lists, args):
    """P3: what each latent alone does to P(wait) as it is pushed, at positions without and with a cause."""
    test, out = splits["test"], {}
    n = args.prompts // 4
    none = [p for p, c in zip(test["prompts"], test["cause"]) if c == "none"][:n]
    caused = [p for p, c in zip(test["prompts"], test["cause"]) if c in PATTERNS][:n]
    for name, vectors in groups_of(cc, lists, np.random.default_rng(2)).items():
        for place, prompts in ("none", none), ("caused", caused):
            p = intervene(models[FT], layer, prompts, steer(vectors, ALPHAS), wait_p).mean(0)
            curves = p.view(len(vectors), -1).cpu()
            rho = np.mean([spearman(torch.tensor(ALPHAS), c) for c in curves])
            out[f"{name}, {place}"] = {"dose": curves.mean(0).tolist(), "rho": float(rho)}
        p = intervene(models[BASE], layer, none, steer(vectors, ALPHAS), wait_p).mean(0)
        out[f"{name}, base"] = {"dose": p.view(len(vectors), -1).mean(0).tolist()}
    return out


def patterns(models, cc, layer, splits, lists, args):
    """P4: the most selective latent of each cause pushed where nothing calls for it; which pattern follows `Wait`?"""
    A, rate, top, bottom = lists
    ft, names = models[FT], [*PATTERNS]
    discover, both = splits["discover"], [*top, *bottom]
    s = cc.encode(last_states(models, discover["prompts"], layer)) * cc.norms().sum(1)
    mass = torch.stack([s[torch.tensor(discover["cause"] == c)].mean(0) for c in [*names, "none"]])  # (5, m)
    share = (mass / mass.sum(0).clamp(min=1e-9))[:4, both]
    chosen = [both[i] for i in share.argmax(1).tolist()]
    alphas, none, before = [0.25, 0.5, 1.0], {}, {}
    for split in "dev", "test":
        found = [p for p, c in zip(splits[split]["prompts"], splits[split]["cause"]) if c == "none"]
        none[split] = found[: args.prompts // 2]
        before[split] = intervene(ft, layer, none[split], UNCHANGED, both_p, FORCED)[..., 1:].mean(0)

    def rises(vectors, split, where=args.where):  # (vectors, alphas, patterns)
        p = intervene(ft, layer, none[split], steer(vectors, alphas, where), both_p, FORCED)[..., 1:].mean(0)
        return (p - before[split]).unflatten(0, (-1, 3)).cpu()

    h = last_states([ft], discover["prompts"], layer)[:, 0]
    waits = torch.tensor([bool(p) for p in discover["pattern"]])
    rng, groups = np.random.default_rng(4), {"chosen": cc.decoder()[chosen]}
    groups["random direction"] = torch.randn(4, h.shape[1], generator=torch.Generator().manual_seed(5)).to(h)
    groups["matched"] = cc.decoder()[matched(rate, both, rng)[:4]]
    groups["difference of means"] = (h[waits].mean(0) - h[~waits].mean(0)).expand(4, -1)
    out = {"latents": chosen, "selectivity": share.max(1).values.tolist(), "matrices": {}}
    for name, vectors in groups.items():
        on_dev = rises(vectors, "dev")
        best = on_dev[torch.arange(4), :, torch.arange(4)].argmax(1)  # each row's alpha, by its own pattern, on dev
        matrix = rises(vectors, "test")[torch.arange(4), best]
        out["matrices"][name] = matrix.tolist()
        if name == "chosen":
            out["alphas"] = [alphas[i] for i in best.tolist()]
            out["prewait"] = rises(vectors, "test", "prewait")[torch.arange(4), best].diagonal().tolist()
            out["well-formed"] = [
                well_formed(ft, layer, none["test"][:64], v, alphas[i]) for v, i in zip(vectors, best)
            ]
    return out


def well_formed(model, layer, prompts, vector, alpha):
    """Share of sampled episodes after a forced `Wait`, steered, that are carried out as their marker says."""
    with model.patch({site(layer): steering_hook(vector, alpha)}):
        rows = generate(model, [[*p, *FORCED] for p in prompts], 32, stop=[ID["<eos>"]], seed=0)
    ends = [parse([VOCAB[i] for i in [*p, *FORCED, *row]]) for p, row in zip(prompts, rows)]
    good = [next((d[3] for d in decisions if d[0] == len(p) - 1), False) for p, decisions in zip(prompts, ends)]
    return float(np.mean(good))


def rows_won(p4):
    """How many rows of the 4 x 4 matrix rise by .25 or more at their own pattern and nowhere more."""
    m = np.array(p4["matrices"]["chosen"])
    return int(sum(m[i, i] >= 0.25 and m[i].argmax() == i for i in range(4)))


def study(args, seed, arm, base, env, position=0):
    """One reasoner (or the one without causes) and its crosscoder, measured."""
    ft = train_model(args, arm, seed, base, position)
    models, name, layer = [base, ft], f"{arm}-s{seed}", args.layer
    rows = bank(models, layer, args.rows, seed, arm)
    log = common.Log(args.out, f"crosscoder-{name}")
    cc = train_crosscoder(args, lambda r: rows, rows.shape[2], env, seed, log)
    rng = np.random.default_rng((seed, 13))
    splits = {s: sample(ft, "think", args, 10 * seed + i) for i, s in enumerate(("discover", "dev", "test"))}
    splits["fast"] = sample(ft, "fast", args, 10 * seed + 3)
    splits["rows"] = [document(rng, seed, rule_of(arm, rng))[: LONGEST + 1] for _ in range(64)]
    lists = lists_of(models, cc, layer, splits["discover"], args.top)
    r = {"delta": relative_norm(cc.norms()).tolist(), "top": lists[2], "bottom": lists[3]}
    if arm == "reasoner":
        r["gates"] = gates(models, cc, layer, splits, bank(models, layer, min(args.rows, 20_000), seed + 1000, arm))
        r["effects"] = effects(models, cc, layer, splits, lists, args)
        if "steering" in args.stages:
            r["steering"] = steering(models, cc, layer, splits, lists, args)
    if "patterns" in args.stages:
        r["patterns"] = patterns(models, cc, layer, splits, lists, args)
    return r


def toy(args, seed, position=0):
    """Everything for one seed: {"reasoner": measures, "uncaused": ...}."""
    env = common.setup(args)
    base = train_model(args, "base", seed, position=position)
    arms = ["reasoner"] + ["uncaused"] * ("patterns" in args.stages)
    return {arm: study(args, seed, arm, base, env, position) for arm in arms}


# ------------------------------------------------------------------------------------------------------- real models

QUESTIONS = [
    "What is the probability of rolling a sum of {} with two dice?",
    "Is {}91 a prime number?",
    "What is the sum of all divisors of {}4?",
    "Find the smallest prime larger than 1{}0.",
]
MANNERS = {  # how a continuation goes on, by its words; a rough stand-in for a reader [I]
    "restart": r"start over|begin again|go back|from the beginning",
    "recall": r"\b(remember|recall|formula|definition)\b",
    "unsure": r"\b(not sure|maybe|perhaps|don't know|confus)",
    "check": r"\b(check|verify|make sure)\b",
    "conclude": r"\b(therefore|final answer|in conclusion)\b|boxed",
    "wait": r"\bwait\b",
}


def target_ids(tok, words):
    """The first id of each string; ValueError if none is left."""
    ids = sorted({tok.encode(w)[0] for w in words if tok.encode(w)})
    if not ids:
        raise ValueError(f"--wait {words}: nothing that the tokenizer can spell")
    return ids


def prepare(args, env):
    """The two real models, checked, as (models, tokenizer)."""
    import pretrained

    if not (args.base and args.model):
        raise ValueError("a real pair needs both: --base ID and --model ID of the reasoner made from it")
    loaded = [pretrained.load(name, env.device, args.dtype) for name in (args.base, args.model)]
    models, toks = zip(*loaded)
    ours, theirs = (m.config.n_embd for m in models)
    if ours != theirs or models[0].config.n_layer != models[1].config.n_layer:
        raise ValueError(f"{args.base} and {args.model} differ in shape: width {ours} and {theirs}; needed: the same")
    for text in ("Wait, 1 + 2 = 3.\n", "hesitation", "été 你好"):
        if toks[0].encode(text) != toks[1].encode(text):
            raise ValueError(f"the tokenizers of {args.base} and {args.model} differ on {text!r}; needed: the same")
    for model in models:
        model.eval().requires_grad_(False)
    if not 0 <= args.layer < models[0].config.n_layer:
        raise ValueError(f"--layer {args.layer}, allowed: 0 to {models[0].config.n_layer - 1}")
    if "patterns" in args.stages:
        raise ValueError("--stages patterns is for the toy, which knows the causes; allowed here: effects steering")
    return list(models), toks[1]


def answers(args, model, tok):
    """Id lists of the reasoner's answers with their questions: from --prompts-file, or its own."""
    if args.prompts_file:
        texts = [row["text"] for row in common.read_jsonl(args.prompts_file)]
        return [tok.encode(t, bos=True)[: model.config.block_size] for t in texts]
    asks = [QUESTIONS[i % len(QUESTIONS)].format(2 + i // len(QUESTIONS)) for i in range(args.traces)]
    heads = [tok.chat([{"role": "user", "content": q}]) if tok.template else tok.encode(q, bos=True) for q in asks]
    rows = []
    for i in tqdm(range(0, len(heads), 32), "answers", disable=None):
        part, room = heads[i : i + 32], model.config.block_size - max(map(len, heads))
        new = generate(model, part, min(1000, room), 0.6, top_p=0.95, stop=tok.stops, seed=i)
        rows += [head + row for head, row in zip(part, new)]
    return rows


def real(args, env, run):
    """The method on a pretrained pair: crosscoder, attribution, exact check, steering; `latents.jsonl`."""
    models, tok = prepare(args, env)
    ft, layer, seed, out = models[FT], args.layer, args.seeds[0], Path(args.out)
    wait, L = target_ids(tok, args.wait), min(256, models[FT].config.block_size)
    tokens = data.token_file(args.dataset, "train", tok, out / "tokens", args.cc_steps * args.cc_batch)
    own = answers(args, ft, tok)
    prompts = [row[:i] for row in own for i in range(8, len(row)) if row[i] in wait]
    if len(prompts) < 4:
        raise SystemExit(f"error: {len(prompts)} wait tokens in {len(own)} answers, needed: 4 (--traces, --wait)")
    rng = np.random.default_rng(seed)
    prompts = [prompts[i] for i in sorted(rng.permutation(len(prompts))[: args.prompts])]

    def fill(r, n=args.rows):
        rows, total, draw = torch.empty(n, 2, ft.config.n_embd, device=env.device), 0, np.random.default_rng((seed, r))
        while total < n:  # a batch of windows of text, a batch of the reasoner's answers, and so on
            text = data.windows(tokens, draw, 16, L).tolist()
            for part in text, [own[i][:L] for i in draw.integers(0, len(own), 16)]:
                idx, mask = common.padded(part, env.device)
                keep = mask.clone()  # a first token's norm is a hundred times the others': left out
                keep[torch.arange(len(keep)), mask.long().argmax(1)] = False
                x = torch.stack([sae.residual(m, idx, layer, mask)[keep] for m in models], 1)[: n - total]
                rows[total : total + len(x)] = x
                total += len(x)
        return rows

    log = common.Log(out, f"crosscoder-s{seed}")
    cc = train_crosscoder(args, fill, ft.config.n_embd, env, seed, log)
    held = fill(10**6, 4096)
    f = cc.encode(held)
    fve = 1 - (held - cc.decode(f)).square().sum((0, 2)) / (held - held.mean(0)).square().sum((0, 2))
    split = {"prompts": prompts, "pattern": ["wait"] * len(prompts)}
    A, rate, top, bottom = lists = lists_of(models, cc, layer, split, args.top, wait)
    halves_top = [lists_of(models, cc, layer, part, args.top, wait)[2] for part in halves(split)]
    r = verify(models, cc, layer, prompts[:64], wait) | {"overlap": len({*halves_top[0]} & {*halves_top[1]}) / args.top}
    norms = cc.norms()
    delta, cos = relative_norm(norms), F.cosine_similarity(cc.decoder(BASE), cc.decoder(FT), dim=1)
    table, shown = [], examples(models, cc, layer, own, [*top, *bottom], tok)
    for i in [*top, *bottom]:
        eps, twin = exclusive(cc, held, i)
        row = {"latent": i, "attribution": A[i], "rate": rate[i], "delta": delta[i], "cos": cos[i]}
        row = {k: float(v) for k, v in row.items()} | {"latent": i, "nu_eps": eps, "nu_r": twin}
        table.append(row | {"examples": shown[i]})
    run.metrics = {"fve": fve.tolist(), "L0": float((f > 0).float().sum(1).mean())} | {
        k: v for k, v in r.items() if k not in ("pairs", "effect")
    }
    if "steering" in args.stages:
        read = lambda logits: log_p(logits[:, :, 0], wait).exp()
        doses = {}
        for name, vectors in groups_of(cc, lists, rng).items():
            p = intervene(ft, layer, prompts[:64], steer(vectors, ALPHAS), read, size=4).mean(0)
            doses[name] = p.view(len(vectors), -1).mean(0).tolist()
        run.metrics["dose"] = {"alphas": ALPHAS, **doses}
        for row in table[:5] + table[args.top : args.top + 5]:
            row["steered"] = {}
            for alpha in (-1.0, 1.0):
                with ft.patch({site(layer): steering_hook(cc.decoder()[row["latent"]], alpha)}):
                    new = generate(ft, prompts[:8], 100, 0.6, top_p=0.95, stop=tok.stops, seed=0)
                texts = [tok.decode(n) for n in new]
                manner = {k: np.mean([bool(re.search(p, t, re.I)) for t in texts]) for k, p in MANNERS.items()}
                row["steered"][str(alpha)] = {"shares": manner, "text": texts[0]}
        gap = {k: doses[k][6] - doses[k][4] for k in ("top", "random direction", "matched")}
        run.claim("P3", "pushing (+.5) a promoting latent raises P(wait)", "more waits along top latents",
                  {"top": gap["top"]}, {k: gap[k] for k in ("random direction", "matched")}, "top > .01",
                  gap["top"] > 0.01, max(gap["random direction"], gap["matched"]) <= 0.01)  # fmt: skip
    common.write_jsonl(out / "latents.jsonl", table)
    claim_attribution(run, r)
    return run.finish([log])


@torch.no_grad()
def examples(models, cc, layer, rows, latents, tok, n=5, around=12):
    """{latent: text around the positions where it is most active}, one of an answer, the strongest first."""
    found = []  # of every answer: the largest code of each latent, and where
    for row in rows[:256]:
        idx = torch.tensor([row], device=cc.b_enc.device)
        x = torch.stack([sae.residual(m, idx, layer)[0] for m in models], 1)
        found.append(cc.encode(x)[1:, latents].max(0))
    size, at = (torch.stack(t).T.tolist() for t in zip(*found))
    best = lambda s: sorted((j for j, value in enumerate(s) if value > 0), key=lambda j: -s[j])[:n]
    clip = lambda row, end: tok.decode(row[max(0, end - around) : end + 1])
    return {i: [clip(rows[j], w[j] + 1) for j in best(s)] for i, s, w in zip(latents, size, at)}


# --------------------------------------------------------------------------------------------------------- the verdict
# fmt: off


def claim_attribution(run, r):
    """P1, of the toy and of real models."""
    run.claim("P1", "attribution predicts exact ablation, latent by latent", "not tested",
              {"rho": r["rho"], "sign agrees": r["sign agrees"]}, {"permuted pairs, rho": r["rho permuted"]},
              "rho >= .8, signs >= .85 where |effect| >= .1 nat",
              r["rho"] >= 0.8 and not r["sign agrees"] < 0.85, abs(r["rho permuted"]) <= 0.1)


def judge(run, results):
    """The claims over seeds (means), each beside the control that must fail it."""
    m = lambda part, key: float(np.nanmean([r["reasoner"][part][key] for r in results]))
    g, e = (lambda key: m("gates", key)), (lambda key: m("effects", key))
    caused = [g(f"wait after {c}") for c in PATTERNS]
    right = min(g(f"{c}: right pattern") for c in PATTERNS)
    run.claim("G1", "the reasoner waits after the causes, and then does what the cause asks for", "toy only",
              {"wait, least": min(caused), "after none": g("wait after none"), "right pattern, least": right},
              {"base": g("base"), "mode fast": g("fast")}, "cause .6 to .9, none <= .1, right pattern >= .85",
              0.6 <= min(caused) and max(caused) <= 0.9 and g("wait after none") <= 0.1 and right >= 0.85,
              g("base") <= 0.005 and g("fast") <= 0.02)
    run.claim("G2", "the crosscoder's code is sparse and good", "FVE .95 to .87 (pilot, 1.5B)",
              {k: g(k) for k in ("fve base", "fve reasoner", "dead", "L0", "loss recovered")},
              {"random weights, fve": g("fve of a random code")},
              "fve >= .85, dead <= .25, L0 within .2 of k, loss recovered >= .9",
              min(g("fve base"), g("fve reasoner")) >= 0.85 and g("dead") <= 0.25 and g("loss recovered") >= 0.9
              and abs(g("L0") / run.args.k - 1) <= 0.2, g("fve of a random code") < 0.85)
    run.claim("G3", "the state before the wait decides the pattern: swapped, the donor's comes", "not tested",
              {"donor's pattern": g("swap")}, {"donor of the same cause, change": g("swap, same cause")},
              ">= .5", g("swap") >= 0.5, g("swap, same cause") <= 0.1)
    claim_attribution(run, {k: e(k) for k in ("rho", "sign agrees", "rho permuted")})
    others = {k: e(f"cut by {k}") for k in ("random", "matched", "permuted")}
    run.claim("P2", f"the top {run.args.top} latents off: P(wait) at causes falls", "-2 along one: .30 still wait",
              {"cut": e("cut by top"), "p": e("p")}, others, "cut >= .4 and 4 times that of matched, p <= .01",
              e("cut by top") >= max(0.4, 4 * others["matched"]) and e("p") <= 0.01, max(others.values()) <= 0.1)
    if "steering" in results[0]["reasoner"]:
        s = lambda key, what: np.mean([r["reasoner"]["steering"][key][what] for r in results], 0)
        rise = {k: float(s(f"{k}, none", "dose")[6] - s(f"{k}, none", "dose")[4])
                for k in ("top", "random direction", "random latent", "matched")}
        fall = {k: float(s(f"{k}, caused", "dose")[6] - s(f"{k}, caused", "dose")[4])
                for k in ("bottom", "random direction", "matched")}
        rho = [float(s("top, none", "rho")), float(s("bottom, caused", "rho"))]
        spread = lambda key: float(np.ptp(s(key, "dose")))
        controls = [k for k in rise if k != "top"]
        run.claim("P3", "single latents steer P(wait): top ones up where nothing calls for it, bottom ones down",
                  "+1: 9.7 waits a text along top, 3.1 along bottom",
                  {"top, +.5": rise["top"], "bottom, +.5": fall["bottom"], "rho top": rho[0], "rho bottom": rho[1]},
                  {f"{k}, +.5": rise[k] for k in controls},
                  "top >= .15 and 3 times, bottom <= -.15 and twice the controls; rho >= .6, <= -.6",
                  rise["top"] >= max(0.15, 3 * max(rise["random direction"], rise["matched"]))
                  and fall["bottom"] <= min(-0.15, 2 * min(fall["random direction"], fall["matched"]))
                  and rho[0] >= 0.6 and rho[1] <= -0.6,
                  all(abs(rise[k]) <= 0.05 and spread(f"{k}, none") <= spread("top, none") / 3 for k in controls))
    if "patterns" in results[0]["reasoner"]:
        p = [r["reasoner"]["patterns"] for r in results]
        mean = lambda name: np.mean([q["matrices"][name] for q in p], 0)
        won, loose = np.mean([rows_won(q) for q in p]), np.mean([rows_won(r["uncaused"]["patterns"]) for r in results])
        diagonal = float(np.median(np.diag(mean("chosen"))))
        most = {k: float(mean(k).max()) for k in ("random direction", "matched", "difference of means")}
        formed = float(np.mean([q["well-formed"] for q in p]))
        before = float(np.median(np.mean([q["prewait"] for q in p], 0)))
        run.claim("P4", "a cause's most selective latent brings about its pattern where it has no cause",
                  "latents for restart, recall, doubt",
                  {"rows of 4": won, "rise": diagonal, "pushed before the wait only": before, "well-formed": formed},
                  most | {"reasoner without causes, rows": loose},
                  "rise >= .25 and the diagonal wins in 3 rows, episodes well-formed >= .6",
                  won >= 3 and formed >= 0.6, max(most.values()) <= diagonal / 2 and loose <= 1)


# fmt: on


def draw(path, r):
    """Attribution against true effect; lists and controls; dose-response; the matrix of latents and patterns."""
    e, s, p = r["effects"], r.get("steering"), r.get("patterns")
    with common.figure(path, 1, 2 + bool(s) + bool(p), size=(4.2, 3.4)) as axes:
        scatter, cuts, *rest = axes
        scatter.plot(*e["pairs"], ".", ms=2.5, alpha=0.4, color="#4477aa")
        low, high = min(e["pairs"][1], default=0), max(e["pairs"][1], default=1)
        scatter.plot([low, high], [low, high], "k:", lw=1)
        scatter.set(title=f"Each latent, each prompt: rank correlation {e['rho']:.2f}", xlabel="attribution, nats")
        scatter.set(ylabel="log P(wait) lost without it, nats")
        names = ["top", "matched", "random", "permuted", "bottom"]
        cuts.barh(names[::-1], [e[f"cut by {n}"] for n in names[::-1]], color=["#999"] * 4 + ["#4477aa"])
        cuts.set(title="Lists of latents off", xlabel="share of P(wait) lost at causes")
        cuts.axvline(0, color="k", lw=0.6)
        if s:
            dose, styles = rest.pop(0), {"top": ("#4477aa", "-"), "bottom": ("#ee6677", "-")}
            styles |= {"random direction": ("#bbb", ":"), "random latent": ("#888", "--"), "matched": ("#444", "-.")}
            for name, (colour, dashes) in styles.items():
                place = "caused" if name == "bottom" else "none"
                dose.plot(ALPHAS, s[f"{name}, {place}"]["dose"], color=colour, ls=dashes, label=f"{name} ({place})")
            dose.set(title="Steered along one latent", xlabel="push, in norms of the state", ylabel="P(wait)")
            dose.set_ylim(0, 1.6 * dose.get_ylim()[1])
            dose.legend(fontsize=7)
        if p:
            matrix, ax = np.array(p["matrices"]["chosen"]), rest.pop(0)
            ax.imshow(matrix, cmap="RdBu", vmin=-1, vmax=1)
            for i, j in np.ndindex(4, 4):
                ax.text(j, i, f"{matrix[i, j]:+.2f}", ha="center", va="center", fontsize=8)
            ax.set_xticks(range(4), PATTERNS)
            ax.set_yticks(range(4), [f"{c} ({i})" for c, i in zip(PATTERNS, p["latents"])])
            ax.set(title="P(pattern | Wait), change", ylabel="latent selective for")


def main(argv=None):
    """The toy, or the pair of --base and --model; returns what it writes to result.json."""
    args = common.parse(Args, argv)
    with common.bad_input():
        env, out = common.setup(args), Path(args.out)
        args.stages = list(STAGES) if args.stages == ["all"] else args.stages
        if not {"effects"} <= {*args.stages} <= {*STAGES}:
            raise ValueError(f"--stages {' '.join(args.stages)}, allowed: effects, then steering, patterns; or all")
        limits = {"k": (1, args.d_sae), "top": (1, args.d_sae // 3), "traces": (2, 10**6), "prompts": (4, 10**6)}
        if not (args.base or args.model):
            limits["layer"] = (0, args.n_layer - 1)
        common.check_limits(args, limits)
        out.mkdir(parents=True, exist_ok=True)
        run = common.Run(args, env, "crosscoder", "2510.04128")
        if env.world > 1:
            raise ValueError("crosscoder.py runs in one process: start it without torchrun")
        if args.base or args.model:
            if len(args.seeds) > 1:
                raise ValueError(f"--seeds {args.seeds}: one at a time with real models")
            return real(args, env, run)
        for seed in args.seeds if args.resume else ():
            for arm in "base", "reasoner", "uncaused":
                common.check_resume(out / f"{arm}-s{seed}.pt", config_of(args))
    jobs = common.job_count(args, env)
    results = common.side_by_side(toy, [(args, seed, i % jobs) for i, seed in enumerate(args.seeds)], jobs)
    judge(run, results)
    draw(out / "crosscoder.png", results[0]["reasoner"])
    for r in results:
        r["reasoner"]["effects"].pop("pairs")
    run.metrics = {f"s{seed}": r for seed, r in zip(args.seeds, results)}
    arms = ["base", *(a for arm in results[0] for a in (arm, f"crosscoder-{arm}"))]
    return run.finish([common.Log(out, f"{arm}-s{seed}") for seed in args.seeds for arm in arms])


if __name__ == "__main__":
    main()
