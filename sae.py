"""Shared grammatical concepts (arXiv 2501.06346): sparse autoencoders, and features that serve many languages.

A sparse autoencoder (SAE) writes an activation x as x_hat = sum_j f_j D_j + b with few f_j > 0; each latent j is a
candidate concept. The paper trains gated SAEs on the residual stream of Llama-3-8B and Aya-23, fits a linear probe for
each grammatical value (Number=Plur, Tense=Past, ...) and language, ranks latents by their attribution to the probe, and
calls *multilingual* those that rank high in two languages or more. Its claims: many are shared; removing these takes
the probes to near chance in all languages; setting them steers a translation. Both maps are linear in f and pooling is
linear too, so attribution and ablation need no model at all once the pooled codes are known (`attribution`, `ablate`).

The toy: six languages with *disjoint* vocabularies and different grammars, half of the text translations, and a GPT
trained on it. Controls: a model that never saw a translation, an untrained one, matched random latents, a difference of
means without any SAE. What the claims leave open is printed too: the null of sharing, AUC, re-fitted probes.

Tags: [P] the paper, [C] the authors' code, [L] SAE libraries, [I] inferred here.
Read on: `SparseCode` (the fast step) -> `SAE` (the zoo) -> `Buffer`, `fit` -> `attribution`, `ablate` -> `World`.
"""

import itertools
import json
import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm

import common
import data
import pretrained
from model import GPT, GPTConfig, generate

ARCHS = "relu", "gated", "topk", "batchtopk", "jumprelu"


@dataclass
class Args(common.TrainFlags):
    """sparse autoencoders"""

    # fmt: off
    presets: ClassVar[dict] = {
        "smoke": dict(steps=4, n_embd=16, batch_size=8, sae_steps=10, d_sae=64, rows=2048, n_probe=40, jobs=1,
                      threads=1, warmup=2, superposition_steps=5, meanings=1, widths=[32]),
        "toy": dict(steps=1500, batch_size=64, lr=4e-3, weight_decay=0.01),
        "gemma": dict(model="gemma-3-270m", d_sae=4096, k=32, sae_lr=1e-3, sae_steps=800, rows=2**16, pool="last",
                      block_size=64),
        "paper": dict(model="meta-llama/Meta-Llama-3-8B", layer=16, d_sae=32768, arch="gated", sae_lr=5e-5, rows=2**20,
                      sae_batch=8192, sae_steps=61000, sae_warmup=1000, block_size=128, pool="sum", ie="paper",
                      top=327, refresh=True),
    }
    # fmt: on
    model: str = ""
    """a pretrained model (gemma-3-270m, a Hugging Face id, a folder); empty: the toy. Paper: Llama-3-8B, Aya-23"""
    layer: int = -1
    """0-based block whose output is read; -1: the toy's third block, 10 of gemma-3-270m. Paper: 16 of 32"""
    dataset: str = "stdlib"
    """text to train the SAE on, beside the sentences: stdlib, file:PATH, a data set id"""
    ud: str = ""
    """folder of Universal Dependencies, one sub-folder of .conllu files a language; empty: template sentences"""
    sae: str = ""
    """an SAE to load in place of training one: the paper's .pt, dictionary_learning's ae.pt, ours"""
    n_embd: int = 64
    """width of the toy's GPT"""
    block_size: int = 32
    """context of the toy's GPT, and of the text windows. Paper: 128 [L]"""
    arch: Literal["relu", "gated", "topk", "batchtopk", "jumprelu"] = "topk"
    """kind of SAE. Paper: gated"""
    d_sae: int = 256
    """latents. Paper: 32768, 8 x the width"""
    k: int = 8
    """active latents a row (topk, batchtopk; target of jumprelu)"""
    l1: float = 0.1
    """sparsity of relu, gated, jumprelu"""
    sae_steps: int = 1200
    """SAE steps"""
    sae_batch: int = 1024
    """rows in an SAE step"""
    sae_lr: float = 3e-3
    """Adam's. Paper's library: 5e-5"""
    sae_warmup: int = 100
    """steps of linear warm-up, of the rate and of the sparsity"""
    rows: int = 2**17
    """rows in the activation buffer, harvested and shuffled at once"""
    max_norm_mult: float = 10.0
    """drop rows whose norm is above so many medians (attention sinks)"""
    frozen_decoder: bool = False
    """control: the decoder stays random"""
    pool: Literal["sum", "mean", "last"] = "mean"
    """what a probe reads of a sentence: sum (paper, BOS included), mean (without BOS), last token"""
    ie: Literal["paper", "contrast"] = "contrast"
    """attribution summed over both classes, or class 1 minus class 0 (no always-on latents)"""
    top: int = 16
    """latents kept for each language and concept. Paper: 1 %, 327"""
    refresh: bool = False
    """harvest new activations when the buffer is used up; else go over it again"""
    n_probe: int = 400
    """training sentences of a probe, half as many test sentences"""
    widths: list[int] = field(default_factory=lambda: [64, 128, 512])
    """further SAE widths: sharing against width"""
    meanings: int = 10
    """meanings translated in each of the 30 directions, for steering"""
    superposition_steps: int = 600
    """SAE steps in the test with known features"""


# -------------------------------------------------------------------------------------------- the code, sparse and fast


def select(pre, k, batch=False):
    """The k largest of relu(pre) in each row of pre (B, m), or the B k largest of all: rows, latents, values (B k,).

    Sorted by row. Ties and negative ones may fill up the k; their value is 0.
    """
    B, m = pre.shape
    if not 0 < k <= m:
        raise ValueError(f"k {k} latents of {m}, allowed: 1 to {m}")
    if batch:
        flat = pre.flatten().topk(B * k, sorted=False).indices.sort().values
        return flat // m, flat % m, pre.flatten()[flat].relu()
    values, latents = pre.topk(k, sorted=False)
    rows = torch.arange(B, device=pre.device).repeat_interleave(k)
    return rows, latents.flatten(), values.flatten().relu()


class SparseCode(torch.autograd.Function):
    """x (B, d) -> x_hat (B, d) through the few latents that `select` keeps; also latents and values, (B k,).

    Dense: encode, scatter, decode are 4 B d m FLOP forward and 6 back. Here only the encoder's product is dense:
    the decoder is an `embedding_bag` over B k rows, and so are the gradients of both matrices, once the (row, latent)
    pairs are sorted by latent. No gradient flows to x.
    """

    @staticmethod
    def forward(ctx, x, W_enc, b_enc, W_dec, b_dec, k, batch):
        x = x - b_dec
        rows, latents, values = select(torch.addmm(b_enc, x, W_enc.T), k, batch)
        starts = torch.searchsorted(rows, torch.arange(len(x), device=x.device))
        with torch.enable_grad():  # a small graph of its own: torch has a kernel for the gradient of the values
            leaf = values.detach().requires_grad_()
            bag = F.embedding_bag(latents, W_dec.detach(), starts, mode="sum", per_sample_weights=leaf)
        ctx.graph = leaf, bag
        ctx.save_for_backward(x, W_enc, rows, latents)
        ctx.mark_non_differentiable(latents, values)
        return bag.detach() + b_dec, latents, values

    @staticmethod
    def backward(ctx, G, *_):
        (x, W_enc, rows, latents), (leaf, bag) = ctx.saved_tensors, ctx.graph
        values = leaf.detach()
        d_pre = torch.autograd.grad(bag, leaf, G)[0] * (values > 0)
        latents, order = latents.sort()
        starts = torch.searchsorted(latents, torch.arange(len(W_enc), device=x.device))
        rows, values, d_pre = rows[order], values[order], d_pre[order]
        gather = lambda table, w: F.embedding_bag(rows, table, starts, mode="sum", per_sample_weights=w)
        d_b = d_pre.new_zeros(len(W_enc)).index_add_(0, latents, d_pre)
        return None, gather(x, d_pre), d_b, gather(G.contiguous(), values), G.sum(0) - d_b @ W_enc, None, None


class Jump(torch.autograd.Function):
    """pre * 1[pre > theta] and 1[pre > theta], with JumpReLU's rectangle of width eps as the gradient of the step."""

    @staticmethod
    def forward(ctx, pre, theta, eps):
        on = (pre > theta).to(pre.dtype)
        ctx.save_for_backward(on, ((pre - theta).abs() < eps / 2).to(pre.dtype), theta)
        ctx.eps = eps
        return pre * on, on

    @staticmethod
    def backward(ctx, d_f, d_on):
        on, near, theta = ctx.saved_tensors
        return d_f * on, (-(theta * d_f + d_on) / ctx.eps * near).sum(0), None


class SAE(nn.Module):
    """The zoo: `encode` x (B, d) -> f (B, m), `decode` f -> x_hat, `loss`. Rows of W_dec have norm 1.

    The encoder reads x - b_dec and starts as the decoder's transpose. Gated [C]: a gate 1[u + b_gate > 0], a size
    relu(exp(r_mag) u + b_mag), u = W_enc (x - b_dec); the gate learns from the auxiliary path alone.
    """

    def __init__(self, d, m, arch="topk", k=32, l1=0.1, eps=0.03, frozen=False):
        super().__init__()
        if arch not in ARCHS:
            raise ValueError(f"arch {arch!r}, allowed: {', '.join(ARCHS)}")
        if m < 1 or not 0 < k <= m:
            raise ValueError(f"k {k} latents of {m}, allowed: 1 to {m}")
        self.arch, self.k, self.l1, self.eps = arch, k, l1, eps
        self.W_dec = nn.Parameter(F.normalize(torch.randn(m, d), dim=1), requires_grad=not frozen)
        self.W_enc = nn.Parameter(self.W_dec.detach().clone())
        self.b_dec = nn.Parameter(torch.zeros(d))
        self.b_enc = nn.Parameter(torch.zeros(m))  # gated: b_gate
        if arch == "gated":
            self.b_mag, self.r_mag = nn.Parameter(torch.zeros(m)), nn.Parameter(torch.zeros(m))
        if arch == "jumprelu":
            self.theta = nn.Parameter(torch.full((m,), 0.001))
        if arch == "batchtopk":
            self.register_buffer("threshold", torch.tensor(-1.0))  # of inference; -1 until the first step
        self.register_buffer("silent", torch.zeros(m, dtype=torch.long), persistent=False)  # steps since it fired

    def encode(self, x):
        """Codes f (..., m) of raw activations x (..., d)."""
        if x.shape[-1] != self.b_dec.shape[0]:
            raise ValueError(f"activations of width {x.shape[-1]}, this SAE reads {self.b_dec.shape[0]}")
        u = F.linear(x - self.b_dec, self.W_enc)
        pre = u + self.b_enc
        if self.arch == "topk":
            values, latents = pre.topk(self.k)
            return torch.zeros_like(pre).scatter_(-1, latents, values.relu())
        if self.arch == "batchtopk":
            return pre * (pre > self.threshold.clamp(min=0))
        if self.arch == "gated":
            return (pre > 0) * (self.r_mag.exp() * u + self.b_mag).relu()
        return Jump.apply(pre, self.theta, self.eps)[0] if self.arch == "jumprelu" else pre.relu()

    def decode(self, f):
        """x_hat (..., d) of codes f (..., m)."""
        return f @ self.W_dec + self.b_dec

    def loss(self, x, warm=1.0, dead_after=20, alpha=1 / 32):
        """Mean over rows of the summed squared error, plus the variant's sparsity; `warm` scales that (0 to 1)."""
        if self.arch in ("topk", "batchtopk"):
            batch = self.arch == "batchtopk"
            x_hat, latents, values = SparseCode.apply(x, self.W_enc, self.b_enc, self.W_dec, self.b_dec, self.k, batch)
            self.silent += 1
            self.silent[latents[values > 0]] = 0
            if batch:
                least = torch.where(values > 0, values, torch.inf).min()
                self.threshold.copy_(torch.where(self.threshold < 0, least, 0.99 * self.threshold + 0.01 * least))
            return (x - x_hat).square().sum(1).mean() + alpha * self.aux(x, x_hat, self.silent > dead_after)
        u = F.linear(x - self.b_dec, self.W_enc)
        pre = u + self.b_enc
        if self.arch == "jumprelu":
            f, on = Jump.apply(pre, self.theta, self.eps)
            penalty = (on.sum(1).mean() / self.k - 1).square()
        elif self.arch == "relu":
            f = pre.relu()
            penalty = f.sum(1).mean()  # rows of the decoder have norm 1
        else:
            f = (pre > 0) * (self.r_mag.exp() * u + self.b_mag).relu()
            gate = pre.relu()
            x_gate = gate @ self.W_dec.detach() + self.b_dec.detach()
            penalty = gate.sum(1).mean()
        self.silent.add_(1).mul_((f == 0).all(0))
        loss = (x - self.decode(f)).square().sum(1).mean() + self.l1 * warm * penalty
        return loss + (x - x_gate).square().sum(1).mean() if self.arch == "gated" else loss

    def aux(self, x, x_hat, dead):
        """AuxK: the share of the error's variance that the largest dead latents do not explain; 0 if none is dead."""
        if not dead.any():
            return 0.0
        error, dead = (x - x_hat).detach(), dead.nonzero().squeeze(1)
        pre = F.linear(x - self.b_dec.detach(), self.W_enc[dead], self.b_enc[dead])
        values, which = pre.topk(min(x.shape[1] // 2, len(dead)))
        code = torch.zeros_like(pre).scatter(1, which, values.relu())
        wrong = (error - code @ self.W_dec[dead]).square().sum()
        return (wrong / (error - error.mean(0)).square().sum()).nan_to_num(0.0)

    @torch.no_grad()
    def project(self):
        """Takes out of the decoder's gradient what would only change a row's norm."""
        if self.W_dec.grad is not None:
            along = (self.W_dec.grad * self.W_dec).sum(1, keepdim=True)
            self.W_dec.grad -= along * self.W_dec

    @torch.no_grad()
    def normalize(self):
        """Decoder rows back to norm 1."""
        self.W_dec.copy_(F.normalize(self.W_dec, dim=1))

    @torch.no_grad()
    def fold(self, scale):
        """From an SAE of x / scale to one of x: biases and thresholds grow; codes then come out scale times larger."""
        for name in "b_dec", "b_enc", "b_mag", "theta", "threshold":
            if hasattr(self, name):
                getattr(self, name).mul_(scale)
        return self


@torch.no_grad()
def resample(sae, opt, x, dead):
    """The other cure for dead latents: each gets an input the SAE does badly on; its Adam moments start anew.

    x (N, d) activations, dead (m,) bool. Inputs are drawn by squared error; the encoder gets 0.2 mean alive norms.
    """
    dead = dead.nonzero().squeeze(1)
    if len(dead):
        error = (x - sae.decode(sae.encode(x))).square().sum(1)
        rows = F.normalize(x[torch.multinomial(error, len(dead), replacement=len(dead) > len(x))] - sae.b_dec, dim=1)
        alive = torch.ones(len(sae.W_enc), dtype=torch.bool, device=x.device).index_fill(0, dead, False)
        norm = sae.W_enc[alive].norm(dim=1).mean() if alive.any() else 1.0
        sae.W_dec[dead], sae.W_enc[dead], sae.b_enc[dead] = rows, 0.2 * norm * rows, 0.0
        for p in (sae.W_dec, sae.W_enc, sae.b_enc):
            for moment in ("exp_avg", "exp_avg_sq"):
                if moment in opt.state[p]:
                    opt.state[p][moment][dead] = 0


# ------------------------------------------------------------------------------------------------ activations, training


class Buffer:
    """Activations without terabytes on disk: `fill(r)` harvests the rows (n, d) of refill r, shuffled once.

    Batch `step` depends on the step alone, as refill r depends on r alone: a resumed run harvests one refill again and
    goes on. Every row is served once; drawing is one gather.
    """

    def __init__(self, fill, batch, seed=0):
        self.fill, self.batch, self.seed, self.refill = fill, batch, seed, None
        self.load(0)
        if len(self.rows) < batch:
            raise ValueError(f"the source has {len(self.rows)} rows, one batch needs {batch}")
        self.per = len(self.rows) // batch

    def load(self, r):
        if r != self.refill:
            self.rows, self.refill = self.fill(r), r
            self.order = torch.randperm(len(self.rows), generator=torch.Generator().manual_seed(self.seed * 9973 + r))

    def __call__(self, step):
        """Batch `step`, (batch, d) float32."""
        r, i = divmod(step, self.per)
        self.load(r)
        return self.rows[self.order[i * self.batch : (i + 1) * self.batch].to(self.rows.device)].float()


def fit(sae, batch, steps, lr, warmup=100, env=None, log=None, save=None, resume=False, every=1000):
    """Trains in place on batch(step) -> (B, d), normalised inside to mean square norm 1, and folds that away; -> sae.

    Also a crosscoder's trainer: anything with `loss(x, warm)`, `project`, `normalize`, `fold` and `b_dec`.
    Adam, linear warm-up of rate and sparsity, linear decay over the last fifth. Under torchrun every rank draws rows of
    its own and gradients are averaged. save: checkpoint path, written `every` so many steps.
    """
    env = env or common.Env(torch.device("cpu"), torch.float32)
    sae.to(env.device)
    first, start = batch(0), 0
    scale, mean = first.square().sum(1).mean().sqrt(), first.mean(0)
    if not (first - mean).square().sum() > 0:
        raise ValueError("all activations are the same: nothing to explain")
    both = torch.cat((scale[None], mean))
    scale, mean = (common.all_reduce(both, env) / env.world).split((1, len(mean)))
    sae.b_dec.data.copy_(mean / scale)
    opt = torch.optim.Adam([p for p in sae.parameters() if p.requires_grad], lr=lr, betas=(0.9, 0.999), fused=True)
    if resume and save and save.exists():
        state = common.load_checkpoint(save)
        sae.load_state_dict(state["sae"])
        opt.load_state_dict(state["optimizer"])
        sae.silent.copy_(state["silent"])
        start, scale = state["step"], state["scale"].to(env.device)
    elif save:
        save.unlink(missing_ok=True)  # of an earlier run
    with common.interruptible() as stopped:
        for step in tqdm(range(start, steps), desc="SAE", initial=start, total=steps, leave=False, disable=log is None):
            x = batch(step) / scale
            warm = min(1.0, (step + 1) / max(1, warmup))
            opt.param_groups[0]["lr"] = lr * warm * min(1.0, 5 * (steps - step) / steps)
            loss = sae.loss(x, warm)
            opt.zero_grad(set_to_none=True)
            loss.backward()
            for p in sae.parameters() if env.world > 1 else ():
                if p.grad is not None:
                    common.all_reduce(p.grad.div_(env.world), env)
            sae.project()
            opt.step()
            sae.normalize()
            if (
                getattr(sae, "arch", "topk") in ("relu", "gated", "jumprelu")
                and step in (steps // 4, steps // 2)
                and env.world == 1
            ):
                resample(sae, opt, x, sae.silent > steps // 10)  # the others have AuxK
            if log and step % 100 == 0:
                if not math.isfinite(loss.item()):
                    raise SystemExit(
                        f"error: the SAE's loss of step {step} is {loss.item()}; a smaller --sae-lr may help"
                    )
                log(step, loss=loss.item())
            stop = env.world == 1 and stopped()
            if save and (stop or (step + 1) % every == 0):
                state = {"sae": sae.state_dict(), "optimizer": opt.state_dict(), "silent": sae.silent}
                common.save_checkpoint(save, state | {"step": step + 1, "scale": scale}, env)
            if stop:
                raise SystemExit(f"the SAE stopped after step {step}; --resume goes on from there")
    return sae.fold(scale.item())


@torch.no_grad()
def metrics(sae, x):
    """L0, FVU, dead share, shrinkage gamma = E|x_hat|^2 / E<x, x_hat>, and the densities (m,) on rows x (N, d)."""
    total = (x - x.mean(0)).square().sum()
    if not total > 0:
        raise ValueError("all activations are the same: their variance is 0, FVU has no meaning")
    wrong = l0 = size = dot = 0.0
    fires = torch.zeros(len(sae.W_dec), device=x.device)
    for part in x.split(4096):
        f = sae.encode(part)
        x_hat = sae.decode(f)
        wrong, l0, fires = wrong + (part - x_hat).square().sum(), l0 + (f > 0).sum(), fires + (f > 0).sum(0)
        size, dot = size + x_hat.square().sum(), dot + (part * x_hat).sum()
    numbers = {"l0": l0 / len(x), "fvu": wrong / total, "dead": (fires == 0).float().mean(), "gamma": size / dot}
    return {k: float(v) for k, v in numbers.items()}, fires / len(x)


def match(A, B):
    """Cosines of directions A (n, d) with distinct rows of B (m, d), m >= n: mean |cos| of the best matching is MCC.

    Shortest augmenting paths (Hungarian), O(n^2 m). Returns |cos| of each row of A with its partner, (n,).
    """
    cos = (F.normalize(A, dim=1) @ F.normalize(B, dim=1).T).abs().double().numpy()
    n, m = cos.shape
    if n > m:
        raise ValueError(f"{n} directions can't be matched with {m}, allowed: at most as many")
    u, v, partner = np.zeros(n + 1), np.zeros(m + 1), np.zeros(m + 1, int)  # column 0 and row 0 are the start
    for i in range(1, n + 1):
        partner[0], j, best, way = i, 0, np.full(m + 1, np.inf), np.zeros(m + 1, int)
        used = np.zeros(m + 1, bool)
        while partner[j]:
            used[j], row = True, partner[j]
            slack = -cos[row - 1] - u[row] - v[1:]
            better = ~used[1:] & (slack < best[1:])
            best[1:][better], way[1:][better] = slack[better], j
            free = np.where(used, np.inf, best)
            j = int(free.argmin())
            delta = free[j]
            u[partner[used]] += delta
            v[used] -= delta
            best[~used] -= delta
        while j:
            partner[j], j = partner[way[j]], way[j]
    return np.array([cos[partner[j] - 1, j - 1] for j in np.argsort(partner[1:], kind="stable") + 1 if partner[j]])


# ------------------------------------------------------------------------------------------------------ released files

KEYS = {  # ours -> the released name; "T": transposed there. gated is also the paper's layout [C], the others are [L]
    "relu": {"W_enc": "encoder.weight", "b_enc": "encoder.bias", "W_dec": "decoder.weight T", "b_dec": "bias"},
    "gated": {"W_enc": "encoder.weight", "W_dec": "decoder.weight T", "b_dec": "decoder_bias", "r_mag": "r_mag",
              "b_enc": "gate_bias", "b_mag": "mag_bias"},
    "topk": {"W_enc": "encoder.weight", "b_enc": "encoder.bias", "W_dec": "decoder.weight T", "b_dec": "b_dec"},
    "jumprelu": {"W_enc": "W_enc T", "b_enc": "b_enc", "W_dec": "W_dec", "b_dec": "b_dec", "theta": "threshold"},
}  # fmt: skip
KEYS["batchtopk"] = KEYS["topk"] | {"threshold": "threshold"}


def save_sae(sae, path):
    """Writes an SAE under the released names, its arch and k in a config.json beside it."""
    state, ours = {}, dict(sae.state_dict())
    if sae.arch == "jumprelu":  # released: the encoder reads x, not x - b_dec
        ours["b_enc"] = ours["b_enc"] - ours["W_enc"] @ ours["b_dec"]
    for name, key in KEYS[sae.arch].items():
        state[key.removesuffix(" T")] = ours[name].T.contiguous() if key.endswith(" T") else ours[name]
    if "topk" in sae.arch:
        state["k"] = torch.tensor(sae.k)
    common.save_checkpoint(path, state)
    common.write_text(path.with_name("config.json"), json.dumps({"arch": sae.arch, "k": sae.k}) + "\n")


def load_sae(path, d=None):
    """An SAE from a released file, told by its names: the paper's, dictionary_learning's, ours; else ValueError."""
    path, state = Path(path), common.load_checkpoint(Path(path))
    about = json.loads(text.read_text()) if (text := path.with_name("config.json")).exists() else {}
    names = lambda arch: {key.removesuffix(" T") for key in KEYS[arch].values()}
    fits = [a for a in ("gated", "jumprelu", "batchtopk", "topk", "relu") if names(a) <= set(state)]
    fits = [a for a in fits if a == about.get("arch")] or fits
    if not fits:
        raise ValueError(f"{path}: no SAE known has the tensors {', '.join(sorted(state))[:200]}")
    flip = {n: state[k[:-2]].T if k.endswith(" T") else state[k] for n, k in KEYS[fits[0]].items()}
    m, width = flip["W_dec"].shape
    if d is not None and width != d:
        raise ValueError(f"{path} is an SAE of width {width}, the model has {d}")
    sae = SAE(width, m, fits[0], int(state.get("k", about.get("k", min(64, m)))))
    if fits[0] == "jumprelu":
        flip["b_enc"] = flip["b_enc"] + flip["W_enc"] @ flip["b_dec"]
    sae.load_state_dict({n: t.float() for n, t in flip.items()})
    return sae


# ------------------------------------------------------------------------------------- probes, attribution, ablation


def fit_probe(X, y, C=1.0, iterations=30):
    """L2 logistic regression by Newton steps on standardised features: w (d,), b with logit = X w + b. Float64."""
    if len(set(y.tolist())) < 2:
        raise ValueError("a probe needs both classes, all labels are the same")
    X, y = X.double(), y.double()
    mean, std = X.mean(0), X.std(0).clamp(min=1e-9)
    Z = F.pad((X - mean) / std, (0, 1), value=1.0)
    ridge = torch.full((Z.shape[1],), 1 / C, dtype=Z.dtype, device=Z.device)
    ridge[-1] = 1e-6
    w = torch.zeros_like(ridge)
    for _ in range(iterations):
        p = torch.sigmoid(Z @ w)
        step = torch.linalg.solve(Z.T @ (Z * (p * (1 - p))[:, None]) + ridge.diag(), Z.T @ (y - p) - ridge * w)
        w = w + step / max(1.0, step.norm().item() / 5)
        if step.abs().max() < 1e-8:
            break
    w, b = w[:-1] / std, w[-1]
    return w, b - mean @ w


def accuracy(logit, y):
    """Share of logits on the right side of 0."""
    return ((logit > 0) == (y > 0)).double().mean().item()


def auc(logit, y):
    """Probability that a random positive scores above a random negative; ties count half."""
    gap = logit[y > 0][:, None] - logit[y == 0][None]
    return ((gap > 0).double() + 0.5 * (gap == 0).double()).mean().item()


def attribution(codes, y, D, w, mode="contrast"):
    """Integrated gradients of the probe's logit, in closed form: IE_j = (D_j . w) sum of f_j; > 0 supports label 1.

    codes (N, m) pooled over tokens, D (m, d). Decoder, pooling and probe are linear in f, so the gradient on the path
    from 0 to f is constant [I]. The paper sums over both classes; contrast: mean over class 1 minus mean over class 0.
    """
    effect = D.double() @ w
    if mode == "paper":
        return effect * codes.double().sum(0)
    return effect * (codes[y > 0].double().mean(0) - codes[y == 0].double().mean(0))


def ablate(X, codes, latents, D, mean=None):
    """Pooled activations (N, d) without these latents, error term kept: X - f_S D_S. mean (m,): mean ablation."""
    f = codes[:, latents] if mean is None else codes[:, latents] - mean[latents]
    return X - f @ D[latents]


def shared(tops):
    """From {language: [latent, ...]}: multilingual latents (in >= 2 lists, most lists first, ties by id), counts."""
    if len(tops) < 2:
        raise ValueError(f"sharing needs >= 2 languages, got {len(tops)}")
    counts = {}
    for latents in tops.values():
        for j in latents:
            counts[j] = counts.get(j, 0) + 1
    return [j for j in sorted(counts, key=lambda j: (-counts[j], j)) if counts[j] >= 2], counts


def share_null(alive, k, L):
    """The shared share if L languages drew k of `alive` latents at random."""
    p = min(1.0, k / alive)
    return 1 - L * p * (1 - p) ** (L - 1) / (1 - (1 - p) ** L)


def alike(latents, weight, rng):
    """As many other alive latents of like weight (m,), mean activation: drawn from the 20 nearest in log weight."""
    log, taken = weight.clamp(min=1e-12).log(), set(latents)
    free = [j for j in (weight > 0).nonzero().squeeze(1).tolist() if j not in taken]
    chosen = []
    for j in latents:
        near = sorted(free, key=lambda i: abs(float(log[i] - log[j])))[:20]
        if near:
            chosen.append(near[rng.integers(len(near))])
            free.remove(chosen[-1])
    return chosen


def balance(y, n, rng):
    """At most n row numbers, as many of label 1 as of label 0, without replacement; -1 is no label."""
    ones, zeros = (rng.permutation(np.flatnonzero(y == c)) for c in (1, 0))
    size = min(len(ones), len(zeros), n // 2)
    return np.sort(np.concatenate((ones[:size], zeros[:size])))


def study(pooled, D, concepts, args, seed):
    """The paper's tables on pooled[language][split] = (X (N, d), codes (N, m), {concept: labels}).

    For every concept: top latents of each language, the shared share beside its null, and the fixed probe's accuracy
    and AUC and a re-fitted probe's accuracy on test sentences under every ablation. For transfer, the others rank.
    """
    out, weight, D = {}, sum(p["train"][1].mean(0) for p in pooled.values()) / len(pooled), D.double()
    for concept in concepts:
        rng, parts, probes, ranks, against, lots = np.random.default_rng(seed), {}, {}, {}, {}, {}
        for lang, splits in pooled.items():
            parts[lang] = {}
            for split, n in (("train", args.n_probe), ("test", args.n_probe // 2)):
                X, codes, labels = splits[split]
                y = labels.get(concept, np.full(len(X), -1))
                rows = balance(y, n, rng)
                parts[lang][split] = X[rows].double(), codes[rows].double(), torch.from_numpy(y[rows]).to(X.device)
            if min(len(parts[lang][s][0]) for s in ("train", "test")) < 16:
                del parts[lang]  # the language does not show the concept
                continue
            X, codes, y = parts[lang]["train"]
            probes[lang] = fit_probe(X, y)
            shuffled = y[torch.from_numpy(rng.permutation(len(y))).to(y.device)]  # control: a probe of nothing
            noise = attribution(codes, shuffled, D, fit_probe(X, shuffled)[0], args.ie)
            lots[lang] = noise.topk(min(args.top, len(noise))).indices.tolist()
            ie = attribution(codes, y, D, probes[lang][0], args.ie)
            order = ie.argsort(descending=True)
            ranks[lang] = order[: args.top][ie[order[: args.top]] > 0].tolist()
            against[lang] = order.flip(0)[: args.top][ie[order.flip(0)[: args.top]] < 0].tolist()
        if len(parts) < 2:
            continue
        multi, counts = shared(ranks)
        multi, low = multi[: args.top], shared(against)[0][: args.top]
        alive = np.mean([(p["train"][1].sum(0) > 0).sum().item() for p in parts.values()])  # in one language: strict
        row = {"share": len([j for j in counts.values() if j >= 2]) / max(1, len(counts)), "counts": [], "tops": ranks}
        row |= {
            "null": share_null(alive, args.top, len(ranks)),
            "multi": multi,
            "low": low,
            "alive": alive,
            "ablations": {},
        }
        drawn = shared(lots)
        row["shuffled"] = len(drawn[0]) / len(drawn[1])
        row["counts"] = [sum(c == n for c in counts.values()) for n in range(1, len(ranks) + 1)]
        mono = {lang: [j for j in ranks[lang] if counts[j] == 1][: len(multi)] for lang in ranks}
        for lang, p in parts.items():
            X, codes, y = p["train"]
            other = [l for l in mono if l != lang]
            elsewhere = [j for l in other for j in mono[l]][: len(multi)]
            rest = {l: ranks[l] for l in other}
            sets = {"clean": [], "multi": multi, "multi, mean-ablated": multi, "multi but the first": multi[1:]}
            sets |= {"own mono": mono[lang], "others' mono": elsewhere, "matched random": alike(multi, weight, rng)}
            sets["own top"] = ranks[lang]
            sets["multi of both values"] = multi + [j for j in low if j not in multi]
            sets["matched random, both"] = alike(sets["multi of both values"], weight, rng)
            if len(rest) > 1:
                sets["multi of the others"] = shared(rest)[0][: args.top]
            gap = F.normalize(X[y > 0].mean(0) - X[y == 0].mean(0), dim=0)
            for name, latents in (sets | {"difference of means": None}).items():
                if latents is None:
                    train, test = ((Z - (Z @ gap)[:, None] * gap) for Z in (X, p["test"][0]))
                else:
                    mean = codes.mean(0) if "mean" in name else None
                    train, test = (ablate(a, b, latents, D, mean) for a, b, _ in (p["train"], p["test"]))
                (w, b), (w2, b2), target = probes[lang], fit_probe(train, y), p["test"][2]
                logit = test @ w + b
                row["ablations"].setdefault(name, {})[lang] = {
                    "accuracy": accuracy(logit, target),
                    "auc": auc(logit, target),
                    "refit": accuracy(test @ w2 + b2, target),
                    "says 1": (logit > 0).double().mean().item(),
                }
        out[concept] = row
    return out


def averaged(study, name, key):
    """The mean over languages (and concepts) of one figure of `study` under one ablation."""
    return float(np.mean([v[key] for r in study.values() for v in r["ablations"].get(name, {}).values()]))


# --------------------------------------------------------------------------------------------------- the model's side


class Stop(Exception):
    """Ends a forward pass at the hooked layer: the layers above it would be computed for nothing."""


@torch.no_grad()
def residual(model, idx, layer, mask=None):
    """The residual stream (B, T, C) behind block `layer`, in fp32; the model runs no further."""
    kept = []

    def stop(x):
        kept.append(x.float())
        raise Stop

    try:
        with model.patch({f"blocks.{layer}.resid_post": stop}):
            model.hidden(idx, mask)
    except Stop:
        return kept[0]


def batches(sentences, size, device):
    """Right-padded batches of id lists, in order: idx (B, T), mask (B, T)."""
    for i in range(0, len(sentences), size):
        part = sentences[i : i + size]
        T = max(map(len, part))
        idx = torch.tensor([s + [0] * (T - len(s)) for s in part], device=device)
        yield idx, torch.tensor([[True] * len(s) + [False] * (T - len(s)) for s in part], device=device)


@torch.no_grad()
def pool(model, layer, sae, sentences, how, env):
    """Activations X (N, d) and codes (N, m) of sentences, pooled over tokens; the mean and last leave out BOS."""
    X, codes = [], []
    for idx, mask in batches(sentences, 64, env.device):
        x = residual(model, idx, layer, mask)
        if how == "last":
            weight = F.one_hot(mask.sum(1) - 1, mask.shape[1])
        else:
            weight = mask.clone()
            weight[:, 0] = how == "sum"
        weight = weight.float() / (weight.sum(1, keepdim=True) if how == "mean" else 1)
        X.append((weight[:, :, None] * x).sum(1))
        codes.append(torch.stack([w @ sae.encode(row) for row, w in zip(x, weight)]))
    return torch.cat(X).cpu(), torch.cat(codes).cpu()


def harvest(model, layer, blocks, n, max_norm_mult, env):
    """At least n rows (N, d) of residual stream from (idx, mask) blocks: no BOS, no padding, no norms far off.

    max_norm_mult: rows above so many medians go (attention sinks: a few huge rows would rule the loss).
    """
    rows, total, site = [], 0, next(blocks, None)
    while site is not None and total < n:
        idx, mask = site
        mask = mask.clone()
        mask[:, 0] = False
        x = residual(model, idx, layer, site[1])[mask]
        norm = x.norm(dim=1)
        x = x[norm <= max_norm_mult * norm.median()]
        rows.append(x)
        total, site = total + len(x), next(blocks, None)
    return torch.cat(rows)[:n] if rows else torch.zeros(0, model.config.n_embd)


@torch.no_grad()
def ce_recovered(model, layer, sae, idx, targets):
    """Next-token loss with the stream replaced by x_hat: clean, sae, zero, and (zero - sae) / (zero - clean)."""
    site, losses = f"blocks.{layer}.resid_post", {}
    for name, fn in {
        "clean": lambda x: x,
        "sae": lambda x: sae.decode(sae.encode(x.float())).to(x.dtype),
        "zero": lambda x: 0 * x,
    }.items():
        with model.patch({site: fn}):
            losses[name] = model.loss(idx, targets).item()
    return losses | {"recovered": (losses["zero"] - losses["sae"]) / (losses["zero"] - losses["clean"])}


def steering(sae, on, off, values, where="active"):
    """A patch: latents `on` at their maximum `values` and `off` at 0, the SAE's error kept.

    where  last: at the last position of every call (the paper); active: wherever a latent of `off` fires (a swap);
           all: at every position but the first
    """

    def patch(x):
        f = sae.encode(x.float())
        new = f.clone()
        new[..., on], new[..., off] = values, 0.0
        change = (new - f) @ sae.W_dec
        if where == "active":
            change = change * (f[..., off].amax(-1, keepdim=True) > 0)
        elif where == "last":
            change[:, :-1] = 0
        elif x.shape[1] > 1:
            change[:, 0] = 0
        return x + change.to(x.dtype)

    return patch


# ------------------------------------------------------------------------------------------------------ the toy world

LANGS = "ABCDEF"
NOUNS, VERBS, ADJS = 10, 6, 4
NUMBER, TENSE, GENDER = ("sg", "pl"), ("pres", "past"), ("m", "f")  # lexical gender of noun i: i % 2


def noun(lang, i, num, case="nom"):
    """A noun with its number, as the language writes it: a list of words without the language's prefix."""
    n, plural = f"n{i}", num == "pl"
    return {
        "A": [f"{n}.{num}"],
        "B": [n, "PL"] if plural else [n],
        "C": ["PL", n] if plural else [n],
        "D": ["many" if plural else "one", n],
        "E": [f"{n}.{num}.{case}"],
        "F": [n, num],
    }[lang]


def render(m, lang):
    """The words of a meaning (adj, subject, number, (noun, number) or None, verb, tense, (noun, number) or None).

    A: S V O, B: S O V, C: V S O, D: S V O, E: S O V, F: V O S; adjectives before the noun in A, B, D. The third noun
    phrase hangs on the subject by the word `at`, between it and the verb in A, B, D, E: an attractor for agreement.
    """
    adj, s, num, pp, v, tense, obj = m
    gender = GENDER[s % 2]
    subject = noun(lang, s, num)
    if adj is not None:
        word = [f"a{adj}" + {"C": f".{gender}.{num}", "F": f".{num}"}.get(lang, "")]
        subject = word + subject if lang in "ABD" else subject + word
    if pp:
        subject += [*noun(lang, *pp, "acc"), "at"] if lang in "BE" else ["at", *noun(lang, *pp, "acc")]
    verb = {
        "A": [f"v{v}.{tense}.{num}"],
        "B": [f"v{v}", tense, "AGR" + num],
        "C": [f"x.{tense}.{num}", f"v{v}"],
        "D": [f"v{v}", tense],
        "E": [f"v{v}.{tense}.{num}.{gender}"],
        "F": [f"v{v}.{tense}"],
    }[lang]
    parts = {"S": subject, "V": verb, "O": noun(lang, *obj, "acc") if obj else []}
    order = {"A": "SVO", "B": "SOV", "C": "VSO", "D": "SVO", "E": "SOV", "F": "VOS"}[lang]
    return [lang + word for p in order for word in parts[p]]


def parse(words, lang):
    """The meaning of a sentence, or None if it is not one: reads lemmas and marks, then renders and compares."""
    if not words or any(w[0] != lang for w in words):
        return None
    words = [w[1:] for w in words]
    nouns, adj, verb, tense = [], None, None, None
    for i, w in enumerate(words):
        lemma, *forms = w.split(".")
        tense = next((t for t in [*forms, w] if t in TENSE), tense)
        if re.fullmatch(r"n\d+", lemma):
            before, after = words[i - 1] if i else "", words[i + 1] if i + 1 < len(words) else ""
            mark = {"B": after, "F": after, "C": before, "D": before}.get(lang, forms and forms[0])
            nouns.append((i, int(lemma[1:]), "pl" if mark in ("pl", "PL", "many") else "sg"))
        elif re.fullmatch(r"[av]\d+", lemma):
            adj, verb = (int(lemma[1:]), verb) if lemma[0] == "a" else (adj, int(lemma[1:]))
    pp = None
    if "at" in words:
        at = words.index("at")
        near = [n for n in nouns if (n[0] < at) == (lang in "BE")]
        if near:
            pp = near[-1] if lang in "BE" else near[0]
            nouns.remove(pp)
    if verb is None or tense is None or not 1 <= len(nouns) <= 2:
        return None
    subject, obj = (nouns[-1], nouns[0]) if lang == "F" else (nouns[0], nouns[-1])
    m = (adj, *subject[1:], pp and pp[1:], verb, tense, obj[1:] if len(nouns) == 2 else None)
    return m if render(m, lang) == [lang + w for w in words] else None


def meaning(rng, held=None):
    """A random meaning; held True or False: of the 20 % (subject, verb) pairs kept out of training, or of the rest."""
    flip = lambda p: rng.random() < p
    thing = lambda: (int(rng.integers(NOUNS)), NUMBER[rng.integers(2)])
    while True:
        s, v = int(rng.integers(NOUNS)), int(rng.integers(VERBS))
        if held is None or ((s + v) % 5 == 0) == held:
            break
    adj, pp, obj = (
        int(rng.integers(ADJS)) if flip(0.4) else None,
        thing() if flip(0.4) else None,
        thing() if flip(0.5) else None,
    )
    return adj, s, NUMBER[rng.integers(2)], pp, v, TENSE[rng.integers(2)], obj


class World:
    """Vocabulary of the six languages and batches of their text; every batch depends on seed and step alone."""

    def __init__(self, seed=0, translation=True):
        self.seed, self.translation = seed, translation
        words, numbers = ["<pad>", "<bos>", "<eos>", *(f"<{l}>" for l in LANGS)], itertools.product(NUMBER, TENSE)
        forms = [(v % ADJS, s, n, (s, n), v, t, (s, n)) for n, t in numbers for s in range(NOUNS) for v in range(VERBS)]
        words += sorted({word for lang in LANGS for m in forms for word in render(m, lang)})
        self.words, self.id = words, {w: i for i, w in enumerate(words)}
        self.eos = self.id["<eos>"]

    def ids(self, m, lang):
        return [self.id[w] for w in [f"<{lang}>", *render(m, lang)]]

    def prompt(self, m, source, target):
        """BOS, the sentence, and the tag that asks for its translation."""
        return [self.id["<bos>"], *self.ids(m, source), self.id[f"<{target}>"]]

    def batch(self, step, n, held=False):
        """n windows: half translations, half two unrelated sentences of one language; targets -100 at padding."""
        rng = np.random.default_rng((self.seed, step, held))
        rows = []
        for i in range(n):
            m = meaning(rng, held)
            x, y = rng.permutation(6)[:2]
            if not self.translation or i % 2:
                second = self.ids(meaning(rng, held), LANGS[x])
            else:
                second = self.ids(m, LANGS[y])
            rows.append([self.id["<bos>"], *self.ids(m, LANGS[x]), *second, self.eos])
        T = max(map(len, rows))
        full = torch.tensor([r + [0] * (T - len(r)) for r in rows])
        return {"idx": full[:, :-1], "targets": full[:, 1:].masked_fill(full[:, 1:] == 0, -100)}

    def corpus(self, n, seed):
        """{language: {split: (sentences, {concept: 0/1 array})}}: n training, n // 2 test ones of held-out pairs.

        Number and gender are the subject's; D and B, A, F show no gender.
        """
        out = {}
        for l, lang in enumerate(LANGS):
            out[lang] = {}
            for split, size in (("train", n), ("test", n // 2)):
                rng = np.random.default_rng((seed, l, split == "test", 7))
                ms = [meaning(rng, split == "test") for _ in range(size)]
                labels = {"plural": [m[2] == "pl" for m in ms], "past": [m[5] == "past" for m in ms]}
                if lang in "CE":
                    labels["feminine"] = [m[1] % 2 for m in ms]
                sentences = [[self.id["<bos>"], *self.ids(m, lang)] for m in ms]
                out[lang][split] = sentences, {c: np.array(y, int) for c, y in labels.items()}
        return out


@torch.no_grad()
def translate(model, world, items, env, patch=None):
    """Greedy translations of items (meaning, source, target) as meanings, None where the output is no sentence."""
    prompts = [world.prompt(*item) for item in items]
    with model.patch(patch or {}):
        out = generate(model, prompts, 14, temperature=0, stop=[world.eos])
    return [
        parse([world.words[i] for i in ids[:-1]], t) if ids[-1] == world.eos else None
        for ids, (_, _, t) in zip(out, items)
    ]


def steer_toy(model, layer, sae, world, pooled, studied, args, env, seed):
    """Steers subject number in translation, both ways; shares of flipped and of otherwise intact output.

    The multilingual latents of the target value go to their maximum, those of the opposite to 0 (`steering`); then one
    latent each, as in the paper, and matched random ones. Only what the model translates rightly unsteered counts.
    """
    rng = np.random.default_rng((seed, 5))
    items = [(meaning(rng, True), s, t) for _ in range(args.meanings) for s in LANGS for t in LANGS if s != t]
    site, out = f"blocks.{layer}.resid_post", {}
    plain = translate(model, world, items, env)
    weight = sum(p["train"][1].mean(0) for p in pooled.values()) / len(pooled)
    sentences = [s for p in world.corpus(64, seed).values() for s in p["train"][0]]
    rows = harvest(model, layer, batches(sentences, 64, env.device), 10**6, args.max_norm_mult, env)
    top = sae.encode(rows).amax(0)
    plural, single = studied["plural"]["multi"], studied["plural"]["low"]
    plural, single = ([j for j in a if j not in b] for a, b in ((plural, single), (single, plural)))
    sets = {"multi": (plural, single), "one latent": (plural[:1], single[:1])}
    sets["matched random"] = alike(plural, weight, rng), alike(single, weight, rng)
    right = [(item, p) for item, p in zip(items, plain) if p == item[0]]
    for (name, (up, down)), where in itertools.product(sets.items(), ("active", "all", "last")):
        done = []  # (flipped, the rest intact) of every sentence
        for value, on, off in (("pl", up, down), ("sg", down, up)):
            use = [item for item, _ in right if item[0][2] != value]
            if use and on and off:
                new = translate(model, world, use, env, {site: steering(sae, on, off, top[on], where)})
                want = [(*m[:2], value, *m[3:]) for m, _, _ in use]
                done += [(n is not None and n[2] == value, n == w) for n, w in zip(new, want)]
        flipped, intact = (sum(x) for x in zip(*done)) if done else (0, 0)
        row = {"flipped": flipped / max(1, len(done)), "intact": intact / max(1, flipped), "n": len(done)}
        out[f"{name}, {where}"] = row
    again = translate(model, world, items, env)
    out["unsteered"] = {"flipped": float(np.mean([a != b for a, b in zip(again, plain)])), "n": len(items)}
    return out


# ------------------------------------------------------------------------------------------------- sentences, real text

# six languages, the lemmas in one order: nouns male, female in turn, "singular/plural"; verbs "present singular/present
# plural/past singular/past plural[/past feminine]"; places. The last four nouns and two verbs are for the test
TEMPLATES = {
    "en": """the king/the kings,the queen/the queens,the father/the fathers,the mother/the mothers,the son/the sons,
        the daughter/the daughters,the brother/the brothers,the sister/the sisters,the uncle/the uncles,
        the aunt/the aunts,the actor/the actors,the actress/the actresses
        | sings/sing/sang/sang,dances/dance/danced/danced,sleeps/sleep/slept/slept,works/work/worked/worked,
        laughs/laugh/laughed/laughed,waits/wait/waited/waited
        | in the garden,in the house,in the city,on the street""",
    "fr": """le roi/les rois,la reine/les reines,le père/les pères,la mère/les mères,le fils/les fils,
        la fille/les filles,le frère/les frères,la sœur/les sœurs,l'oncle/les oncles,la tante/les tantes,
        l'acteur/les acteurs,l'actrice/les actrices
        | chante/chantent/chantait/chantaient,danse/dansent/dansait/dansaient,dort/dorment/dormait/dormaient,
        travaille/travaillent/travaillait/travaillaient,rit/rient/riait/riaient,attend/attendent/attendait/attendaient
        | dans le jardin,dans la maison,dans la ville,dans la rue""",
    "de": """der König/die Könige,die Königin/die Königinnen,der Vater/die Väter,die Mutter/die Mütter,
        der Sohn/die Söhne,die Tochter/die Töchter,der Bruder/die Brüder,die Schwester/die Schwestern,
        der Onkel/die Onkel,die Tante/die Tanten,der Schauspieler/die Schauspieler,
        die Schauspielerin/die Schauspielerinnen
        | singt/singen/sang/sangen,tanzt/tanzen/tanzte/tanzten,schläft/schlafen/schlief/schliefen,
        arbeitet/arbeiten/arbeitete/arbeiteten,lacht/lachen/lachte/lachten,wartet/warten/wartete/warteten
        | im Garten,im Haus,in der Stadt,auf der Straße""",
    "es": """el rey/los reyes,la reina/las reinas,el padre/los padres,la madre/las madres,el hijo/los hijos,
        la hija/las hijas,el hermano/los hermanos,la hermana/las hermanas,el tío/los tíos,la tía/las tías,
        el actor/los actores,la actriz/las actrices
        | canta/cantan/cantaba/cantaban,baila/bailan/bailaba/bailaban,duerme/duermen/dormía/dormían,
        trabaja/trabajan/trabajaba/trabajaban,ríe/ríen/reía/reían,espera/esperan/esperaba/esperaban
        | en el jardín,en la casa,en la ciudad,en la calle""",
    "it": """il re/i re,la regina/le regine,il padre/i padri,la madre/le madri,il figlio/i figli,la figlia/le figlie,
        il fratello/i fratelli,la sorella/le sorelle,lo zio/gli zii,la zia/le zie,l'attore/gli attori,
        l'attrice/le attrici
        | canta/cantano/cantava/cantavano,balla/ballano/ballava/ballavano,dorme/dormono/dormiva/dormivano,
        lavora/lavorano/lavorava/lavoravano,ride/ridono/rideva/ridevano,aspetta/aspettano/aspettava/aspettavano
        | in giardino,in casa,in città,in strada""",
    "ru": """король/короли,королева/королевы,отец/отцы,мать/матери,сын/сыновья,дочь/дочери,брат/братья,
        сестра/сёстры,дядя/дяди,тётя/тёти,актёр/актёры,актриса/актрисы
        | поёт/поют/пел/пели/пела,танцует/танцуют/танцевал/танцевали/танцевала,
        спит/спят/спал/спали/спала,работает/работают/работал/работали/работала,
        смеётся/смеются/смеялся/смеялись/смеялась,ждёт/ждут/ждал/ждали/ждала
        | в саду,в доме,в городе,на улице""",
}


def template_sentences():
    """{language: {split: (sentences, {concept: 0/1 array})}}: number x tense x place; test lemmas are unseen."""
    out = {}
    for lang, text in TEMPLATES.items():
        nouns, verbs, places = ([w.strip() for w in part.split(",")] for part in text.split("|"))
        out[lang] = {split: ([], {"plural": [], "past": [], "feminine": []}) for split in ("train", "test")}
        for i, thing in enumerate(nouns):
            for j, verb in enumerate(verbs):
                if (i < 8) != (j < 4):
                    continue
                texts, labels = out[lang]["train" if i < 8 else "test"]
                for place in places:
                    for plural in (0, 1):
                        for past in (0, 1):
                            forms = verb.split("/")
                            form = (
                                forms[4]
                                if len(forms) == 5 and past and i % 2 and not plural
                                else forms[2 * past + plural]
                            )
                            text = f"{thing.split('/')[plural]} {form} {place}."
                            texts.append(text[0].upper() + text[1:])
                            for concept, value in zip(("plural", "past", "feminine"), (plural, past, i % 2)):
                                labels[concept].append(value)
        for split, (texts, labels) in out[lang].items():
            out[lang][split] = texts, {c: np.array(y) for c, y in labels.items()}
    return out


def read_conllu(path):
    """(text, {(key, value), ...}) of every sentence of a .conllu file: the features some token has [C]."""
    out, text, seen = [], None, set()
    for line in [*path.read_text("utf-8").splitlines(), ""]:
        if line.startswith("# text ="):
            text = line[8:].strip()
        elif line and not line.startswith("#"):
            cells = line.split("\t")
            if len(cells) < 6:
                raise ValueError(f"{path} is no CoNLL-U: a line of {len(cells)} columns, needed: 10")
            if cells[0].isdigit() and cells[5] != "_":  # 1-2 is a range, 1.1 an empty node
                pairs = (pair.split("=") for pair in cells[5].split("|"))
                seen |= {(key, value) for key, values in pairs for value in values.split(",")}
        elif not line and text:
            out.append((text, seen))
            text, seen = None, set()
    return out


def ud_sentences(folder, least=(128, 32)):
    """Universal Dependencies as `template_sentences` gives its own: one sub-folder a language, *-train / *-test.conllu.

    A concept is kept in a language if both splits have `least` sentences with it and as many without [C].
    """
    folders = sorted(p for p in Path(folder).expanduser().iterdir() if p.is_dir())
    out = {}
    for path in folders:
        read = {s: [x for f in sorted(path.glob(f"*{s}*.conllu")) for x in read_conllu(f)] for s in ("train", "test")}
        names = {n for rows in read.values() for _, seen in rows for n in seen}
        labels = {s: {n: np.array([n in seen for _, seen in rows], int) for n in names} for s, rows in read.items()}
        enough = lambda y, n: min(y.sum(), len(y) - y.sum()) >= n / 2
        names = [n for n in names if all(enough(labels[s][n], m) for s, m in zip(("train", "test"), least))]
        out[path.name] = {s: ([t for t, _ in read[s]], {"=".join(n): labels[s][n] for n in names}) for s in read}
    if sum(bool(v["train"][1]) for v in out.values()) < 2:
        raise ValueError(f"--ud {folder}: sharing needs >= 2 languages with a concept, in sub-folders of .conllu files")
    return out


def prepare(args, env):
    """The real model's rung: (model, layer, corpus of id lists, fill for the buffer)."""
    model, tok = pretrained.load(args.model, env.device, "fp32" if env.dtype == torch.float32 else "bf16")
    model.eval().requires_grad_(False)
    layer, deep = 10 if args.layer < 0 else args.layer, model.config.n_layer
    if not 0 <= layer < deep:
        raise ValueError(f"--layer {layer}, allowed: 0 to {deep - 1}")
    corpus = ud_sentences(args.ud) if args.ud else template_sentences()
    cut = args.block_size if args.ud else None
    for splits in corpus.values():
        for split, (texts, labels) in splits.items():
            splits[split] = [tok.encode(t, bos=True)[:cut] for t in texts], labels
    with common.rank_zero_first(env):
        limit = 2 * args.sae_steps * args.sae_batch * env.world
        tokens = {
            s: data.token_file(args.dataset, s, tok, Path(args.out) / "tokens", limit, env.rank > 0)
            for s in ("train", "heldout")
        }
    own = [s for splits in corpus.values() for s in splits["train"][0]]

    def text(r):
        """(idx, mask) blocks of refill r: the corpus's training sentences, then windows of text; -1: held out."""
        yield from batches(own, 64, env.device) if r >= 0 else ()
        rng = np.random.default_rng((abs(r), r < 0, env.rank))
        while True:
            idx = data.windows(tokens["heldout" if r < 0 else "train"], rng, 32, args.block_size)
            idx[:, 0] = tok.eos if tok.bos is None else tok.bos
            idx = torch.from_numpy(idx).to(env.device)
            yield idx, torch.ones_like(idx, dtype=torch.bool)

    fill = lambda r: harvest(
        model, layer, text(r), args.rows if r >= 0 else min(args.rows, 2**13), args.max_norm_mult, env
    )
    return model, layer, corpus, fill, next(text(-1))[0]


# ------------------------------------------------------------------------------------------------------ superposition


def superposition(seed, steps, d=32, n=96, m=128, active=4, archs=ARCHS):
    """SAEs on x = sum of few of n known unit directions in d < n dimensions: does the dictionary find them?

    Returns {arm: {mcc, found (share of features with |cos| > .9), fvu, l0, dead}}, with `random`: the chance level of
    m random directions, and `frozen`: a topk SAE whose decoder never moved.
    """
    g = torch.Generator().manual_seed(seed + 10**6)  # not the stream that initialises the SAEs
    A = F.normalize(torch.randn(n, d, generator=g), dim=1)

    def batch(step, size=512):
        g = torch.Generator().manual_seed(seed * 10**6 + step)
        on = torch.rand(size, n, generator=g) < active / n
        return (on * (0.5 + torch.rand(size, n, generator=g))) @ A + 0.01 * torch.randn(size, d, generator=g)

    out, test = {}, batch(10**5, 8192)
    for arm in [*archs, "frozen"]:
        torch.manual_seed(seed)
        sae = SAE(
            d,
            m,
            "topk" if arm == "frozen" else arm,
            active,
            l1={"jumprelu": 0.1}.get(arm, 0.15),
            frozen=arm == "frozen",
        )
        fit(sae, batch, steps, 3e-3)
        cos = match(A, sae.W_dec.detach())
        out[arm] = {"mcc": cos.mean(), "found": (cos > 0.9).mean(), **metrics(sae, test)[0]}
    cos = match(A, torch.randn(m, d, generator=g))
    out["random"] = {"mcc": cos.mean(), "found": (cos > 0.9).mean()}
    return {arm: {k: float(v) for k, v in row.items()} for arm, row in out.items()}


# -------------------------------------------------------------------------------------------------------- the toy, run


def analyse(model, layer, corpus, fill, args, env, seed, log, d_sae=None, save=None):
    """Harvest, SAE, pooled codes, tables of one model: (sae, pooled, study, metrics)."""
    torch.manual_seed(seed)
    if args.sae:
        sae = load_sae(args.sae, model.config.n_embd).to(env.device)
    else:
        first = None if args.refresh else fill(0)
        buffer = Buffer(fill if args.refresh else lambda r: first, args.sae_batch, seed * env.world + env.rank)
        sae = SAE(model.config.n_embd, d_sae or args.d_sae, args.arch, args.k, args.l1, frozen=args.frozen_decoder)
        steps = args.sae_steps if d_sae is None else args.sae_steps // 2
        fit(sae, buffer, steps, args.sae_lr, args.sae_warmup, env, log, save, args.resume)
    fresh = fill(-1)[: 2**15].float()
    numbers, _ = metrics(sae, fresh)
    pooled = {}
    for lang, splits in corpus.items():
        pooled[lang] = {s: (*pool(model, layer, sae, x, args.pool, env), y) for s, (x, y) in splits.items()}
    concepts = sorted({c for splits in corpus.values() for c in splits["train"][1]})
    return sae, pooled, study(pooled, sae.W_dec.detach().cpu(), concepts, args, seed), numbers


def toy(args, seed, arm, position=0):
    """One arm and seed of the toy, start to end; returns its numbers. arm: main, no translation, untrained."""
    env, world = common.setup(args), World(seed, arm == "main")
    log = common.Log(args.out, f"{arm.replace(' ', '-')}-s{seed}")
    torch.manual_seed(seed)
    config = GPTConfig(len(world.words), args.block_size, 4, 4, args.n_embd, qkv_bias=False, tie=True)
    model = GPT(config).to(env.device)
    held = {k: v.to(env.device) for k, v in world.batch(0, 256, held=True).items()}
    evaluate = lambda step: {"heldout_loss": model.loss(**held).item()}
    if arm == "untrained":
        log.rewind(0)
    else:
        part = common.SimpleNamespace(**vars(args))
        part.steps = args.steps if arm == "main" else args.steps // 2
        common.train(
            model, lambda step: world.batch(step, args.batch_size), part, env, log, torch.no_grad()(evaluate), position
        )
    model.eval().requires_grad_(False)
    layer = 2 if args.layer < 0 else args.layer

    def fill(r):  # refill -1 is held-out text
        blocks = (world.batch(10**6 * (r + 2) + i, 256, held=r < 0)["idx"].to(env.device) for i in range(10**6))
        blocks = ((idx, idx != 0) for idx in blocks)
        return harvest(model, layer, blocks, args.rows if r >= 0 else 2**15, args.max_norm_mult, env)

    corpus = world.corpus(2 * args.n_probe, seed)
    save = log.path.with_name(log.path.stem + "-sae.pt")
    sae, pooled, studied, numbers = analyse(model, layer, corpus, fill, args, env, seed, log, save=save)
    out = {"sae": numbers, "study": studied}
    if arm == "main":
        rng = np.random.default_rng((seed, 3))
        items = [(meaning(rng, True), s, t) for _ in range(args.meanings) for s in LANGS for t in LANGS if s != t]
        out["translation"] = float(
            np.mean([a == m for a, (m, _, _) in zip(translate(model, world, items, env), items)])
        )
        out["ce"] = ce_recovered(model, layer, sae, **held)
        out["steer"] = steer_toy(model, layer, sae, world, pooled, studied, args, env, seed)
        out["widths"] = {str(args.d_sae): [studied["plural"]["share"], studied["plural"]["null"], numbers["fvu"]]}
        for m in args.widths:
            *_, st, num = analyse(model, layer, corpus, fill, args, env, seed, None, m)
            out["widths"][str(m)] = [st["plural"]["share"], st["plural"]["null"], num["fvu"]]
    return out


def real(args):
    """The real model's rung, one SAE seed after the other: the same tables, and the model's loss with the SAE."""
    out = []
    with common.bad_input():
        env = common.setup(args)
        model, layer, corpus, fill, idx = prepare(args, env)
    for seed in args.seeds:
        log = common.Log(args.out, f"main-s{seed}", env)
        log.rewind(0)
        save = log.path.with_name(f"main-s{seed}-sae.pt")
        sae, _, studied, numbers = analyse(model, layer, corpus, fill, args, env, seed, log, save=save)
        if env.rank == 0:
            save_sae(sae, Path(args.out) / f"ae-s{seed}.pt")
        out.append({"sae": numbers, "study": studied, "ce": ce_recovered(model, layer, sae, idx[:8, :-1], idx[:8, 1:])})
    return out, env


# ------------------------------------------------------------------------------------------------------- the verdict
# fmt: off


def judge(run, results):
    """The paper's claims, medians over seeds, each beside the control that must fail the same criterion."""
    main, med = results["main"], lambda xs: float(np.median(list(xs)))
    over = lambda rows, f: med(np.mean([f(c) for c in r["study"].values()]) for r in rows)
    share = lambda rows: over(rows, lambda c: c["share"])
    null = over(main, lambda c: c["null"])
    get = lambda name, key, rows=main: med(averaged(r["study"], name, key) for r in rows)
    ratio = lambda rows, key="share": over(rows, lambda c: c[key]) / max(1e-9, over(rows, lambda c: c["null"]))
    control = {"shuffled labels, ratio": ratio(main, "shuffled")}
    control |= {f"{arm}, ratio": ratio(results[arm]) for arm in ("no translation", "untrained") if arm in results}
    run.claim("C1", "features are shared: of the top latents, the share in two languages or more", "many [P]",
              {"shared": share(main), "null": null, "ratio": ratio(main)}, control,
              "shared >= 2 x null", ratio(main) >= 2, all(r < 2 for r in control.values()))
    clean, multi, random = (get(n, "accuracy") for n in ("clean", "multi", "matched random"))
    test = lambda x: clean >= 0.9 and x <= 0.62
    run.claim("C2", "removing the multilingual latents takes the fixed probe to near chance", "near chance [P]",
              {"clean": clean, "multi": multi},
              {"matched random": random, "others' mono": get("others' mono", "accuracy")},
              "clean >= .9, then <= .62", test(multi), not test(random))  # fmt: skip
    both, kept = "multi of both values", "matched random, both"
    test = lambda n: get(n, "auc") <= 0.75 and get(n, "refit") <= clean - 0.15
    run.claim("C3", "the information is gone, not the threshold shifted: AUC and a re-fitted probe fall too", "-",
              {f"{n}, {k}": get(n, k) for n in ("multi", both) for k in ("auc", "refit")}
              | {"mean-ablated, accuracy": get("multi, mean-ablated", "accuracy")},
              {f"random, {k}": get(kept, k) for k in ("auc", "refit")},
              "both values: AUC <= .75 and re-fit <= clean - .15", test(both), not test(kept))
    if any("multi of the others" in c["ablations"] for c in main[0]["study"].values()):  # 3 languages and more
        test = lambda n: get(n, "accuracy") <= clean - 0.15
        run.claim("C4", "transfer: latents ranked in the other languages alone work in a language", "implied",
                  {"clean": clean, "multi of the others": get("multi of the others", "accuracy")},
                  {"others' mono": get("others' mono", "accuracy")}, "accuracy <= clean - .15",
                  test("multi of the others"), not test("others' mono"))  # fmt: skip
    if "steer" in main[0]:
        steer = lambda name, key: med(r["steer"][name][key] for r in main if name in r["steer"])
        ways = ("active", "all", "last")
        run.claim("C5", "steering: the number of the translated subject flips", "most [P]",
                  {f"multi, {w}": steer(f"multi, {w}", "flipped") for w in ways},
                  {f"random, {w}": steer(f"matched random, {w}", "flipped") for w in ways}
                  | {"unsteered": steer("unsteered", "flipped")}, "active: >= .5",
                  steer("multi, active", "flipped") >= 0.5, steer("matched random, active", "flipped") < 0.5)
        run.claim("C6", "selectivity: everything else in the flipped translations is intact", "little else [P]",
                  {f"multi, {w}": steer(f"multi, {w}", "intact") for w in ways},
                  {f"random, {w}": steer(f"matched random, {w}", "intact") for w in ways}, "active: >= .8",
                  steer("multi, active", "intact") >= 0.8, steer("matched random, active", "intact") < 0.8)  # fmt: skip
    if "superposition" in results:
        mcc = lambda arm: med(r[arm]["mcc"] for r in results["superposition"])
        run.claim("C7", "an SAE finds known features in superposition (mean |cos| of the best matching)", "-",
                  {arm: mcc(arm) for arm in ARCHS}, {"frozen decoder": mcc("frozen"), "random": mcc("random")},
                  "topk >= .9", mcc("topk") >= 0.9, max(mcc("frozen"), mcc("random")) < 0.9)  # fmt: skip


def draw(path, results):
    """Sharing beside its null, ablation beside AUC and re-fit; and for the toy: width, steering, superposition."""
    main, colours = results["main"], ("#ee6677", "#4477aa", "#228833", "#999999")
    toy_run = "steer" in main[0]
    mean, concepts = lambda f, rows=main: np.mean([f(r) for r in rows], 0), list(main[0]["study"])
    arms = [a for a in ("main", "no translation", "untrained") if a in results]

    def barh(ax, names, rows):  # rows: label -> function of a name
        for i, (label, f) in enumerate(rows.items()):
            ax.barh(np.arange(len(names)) + 0.8 * i / len(rows), [f(n) for n in names], 0.76 / len(rows),
                    color=colours[i], label=label)
        ax.set(yticks=np.arange(len(names)) + 0.3, yticklabels=names)
        ax.invert_yaxis()

    with common.figure(path, 2 if toy_run else 1, 3 if toy_run else 2, (5, 3.4)) as axes:
        sharing, left = axes[:2]
        rows = {arm: lambda c, arm=arm: mean(lambda r: r["study"][c]["share"], results[arm]) for arm in arms}
        barh(sharing, concepts, rows | {"null: random latents": lambda c: mean(lambda r: r["study"][c]["null"])})
        sharing.set(title="Top latents that two languages or more share", xlabel="share", xlim=(0, 1.02))
        names = ["clean", "multi", "multi, mean-ablated", "multi of both values", "multi of the others", "others' mono",
                 "matched random", "matched random, both", "difference of means"]
        names = [n for n in names if any(n in c["ablations"] for c in main[0]["study"].values())]
        keys = {"fixed probe, accuracy": "accuracy", "fixed probe, AUC": "auc", "re-fitted probe, accuracy": "refit"}
        barh(left, names, {l: lambda n, k=k: mean(lambda r: averaged(r["study"], n, k)) for l, k in keys.items()})
        left.axvline(0.5, color="k", lw=0.6)
        left.set(title="What probes read after removing latents", xlim=(0.3, 1.02))
        if toy_run:
            counts, width, steer, sup = axes[2:]
            for c in concepts:
                row = mean(lambda r, c=c: r["study"][c]["counts"])
                counts.plot(range(1, 1 + len(row)), row, "o-", ms=3, label=c)
            counts.set(title="In how many languages a latent is at the top", xlabel="languages", ylabel="latents")
            ms = sorted(map(int, main[0]["widths"]))
            for i, (label, style) in enumerate((("shared", "o-"), ("null", "k--"), ("FVU", "s:"))):
                width.plot(ms, [mean(lambda r, m=m, i=i: r["widths"][str(m)][i]) for m in ms], style, label=label, ms=4)
            width.set(title="Feature splitting: the dictionary's width", xlabel="latents", xscale="log")
            width.set_xticks(ms, ms)
            width.minorticks_off()
            names = [n for n in main[0]["steer"] if n != "unsteered"]
            barh(steer, names, {k: lambda n, k=k: mean(lambda r: r["steer"][n][k]) for k in ("flipped", "intact")})
            steer.set(title="Steering number; intact: the rest, of the flipped", xlim=(0, 1.02))
            barh(sup, [*ARCHS, "frozen", "random"],
                 {"MCC": lambda a: mean(lambda r: r[a]["mcc"], results["superposition"])})
            sup.set(title="Known features in superposition", xlim=(0, 1.02))
        for ax in axes[:5] if toy_run else axes:
            ax.legend(fontsize=7)


# fmt: on


def report(results):
    """Prints the tables of the first seed: sharing and ablations of every concept."""
    for concept, row in results["main"][0]["study"].items():
        print(f"\n{concept}: shared {row['share']:.2f}, null {row['null']:.2f}; in 1, 2, ... languages {row['counts']}")
        print(f"{'':24s} accuracy    AUC  re-fit  says 1")
        for name in row["ablations"]:
            cells = (averaged({concept: row}, name, key) for key in ("accuracy", "auc", "refit", "says 1"))
            print(f"{name:24s} " + " ".join(f"{x:7.3f}" for x in cells))


def main(argv=None):
    """The paper end to end; returns what it writes to result.json."""
    args = common.parse(Args, argv)
    with common.bad_input():
        env = common.setup(args)
        check(args, env)
        Path(args.out).mkdir(parents=True, exist_ok=True)
    run = common.Run(args, env, "sae", "2501.06346")
    if args.model:
        results = {"main": real(args)[0]}
        if env.rank:
            return None
    else:
        arms = ["main", "no translation", "untrained"]
        tasks = [
            (args, seed, arm, i % args.jobs) for i, (arm, seed) in enumerate((a, s) for a in arms for s in args.seeds)
        ]
        done = common.side_by_side(toy, tasks, args.jobs if env.device.type == "cpu" else 1)
        results = {arm: [r for r, (_, _, a, _) in zip(done, tasks) if a == arm] for arm in arms}
        results["superposition"] = [superposition(s, args.superposition_steps) for s in args.seeds]
        low = [r["translation"] for r in results["main"] if r["translation"] < 0.9]
        if low:
            print(f"UNDERTRAINED: held-out translations exact {min(low):.2f}, needed .9: more --steps")
    run.metrics = results
    report(results)
    judge(run, results)
    draw(Path(args.out) / "sae.png", results)
    arms = [arm for arm in results if arm != "superposition"]
    return run.finish([common.Log(args.out, f"{arm.replace(' ', '-')}-s{s}") for arm in arms for s in args.seeds])


def check(args, env):
    """ValueError for flags that can't be, before any long work."""
    SAE(2, args.d_sae, args.arch, args.k)
    for name in "top", "sae_steps", "sae_batch", "rows", "n_probe":
        if getattr(args, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} {getattr(args, name)}, allowed: 1 and more")
    if args.rows < args.sae_batch:
        raise ValueError(f"--rows {args.rows} is less than one batch, --sae-batch {args.sae_batch}")
    if not args.model and not -1 <= args.layer < 4:
        raise ValueError(f"--layer {args.layer}, allowed: 0 to 3 in the toy")
    if not args.model and env.world > 1:
        raise ValueError("the toy runs in one process; torchrun is for --model")
    if args.sae:
        load_sae(args.sae, None if args.model else args.n_embd)
    if args.ud and not Path(args.ud).expanduser().is_dir():
        raise ValueError(f"--ud {args.ud} is no folder")


if __name__ == "__main__":
    main()
