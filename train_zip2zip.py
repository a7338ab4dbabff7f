"""zip2zip (arXiv 2506.01084): a language model whose vocabulary grows with the text in front of it.

LZW (lzw_tokenizer.py) merges what repeats in this very sequence into new ids, *hypertokens*, at most M base ids each.
A small hyper-encoder makes each hypertoken's input embedding and its output row from the embeddings of its base ids,
so that the model reads and writes ids nobody has trained. Base weights are frozen; LoRA and hyper-encoder learn from
the ordinary next-id loss over compressed ids. The paper: 15-40 % fewer ids, bits per byte 8-15 % worse.

The toy: a GPT is trained on a synthetic language whose documents have names of their own (new ones in the test), then
LoRA arms go on from it with the same windows: `cont` reads plain ids, `zip` compressed ones, `rand` has random rows in
place of the encoder's, `digits` never merges digits; --arms all adds `avg`, `attn`: simpler encoders, `m2`, `m4`: other
M, `ae`: the auto-encoding loss, `canon`: what LZW can't emit next is masked. zip is also measured with the rows of a
window shuffled (`shuffle`), and with averaged embeddings, untrained (`zeroshot`).

A row is `residual + g`, g zero at the start: E[last id] on the way in, W[first id] on the way out (inferred: better
than the same vector on both sides, before and after training). A row exists for the softmax only once the text defines
it (exact online mask), and `avoid` (see lzw_tokenizer) leaves nothing unscorable.

Read on: `Zip` (the method) -> `transported` (theory) -> `generate` -> `Synth` -> `train_arm` -> `run_seed` -> `judge`.
"""

import copy
import functools
import itertools
import math
import random
import re
import statistics
import time
from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

import legacy as common
import data
from lzw_tokenizer import LZW, Decoder, digit_ids
from model import GPT, GPTConfig, KVCache, sample

SCORES = 2**26  # numbers that the scores of the softmax may take up at once
ARMS = "cont", "zip", "rand", "digits", "avg", "attn", "m2", "m4", "ae", "canon"


@dataclass
class Args(common.TrainFlags):
    """zip2zip"""

    presets: ClassVar[dict] = {
        "smoke": dict(
            pretrain_steps=6, steps=4, n_embd=32, n_layer=2, enc_dim=16, block_size=64, samples=4, warmup=2, jobs=1,
            threads=1, timing_layers=1, timing_embd=32, eval_every=4, batch_size=4,
        ),
        "toy": dict(batch_size=8, lr=3e-3, steps=100, eval_every=50),
        "real": dict(
            model="smollm2-135m-instruct", arms=["cont", "zip"], block_size=512, batch_size=2, lr=1.5e-3, lora_r=16,
            enc_dim=192, samples=16,
        ),
        "paper": dict(
            model="microsoft/Phi-3.5-mini-instruct", dataset="epfl-dlab/zip2zip-1B", block_size=4096, max_codes=2048,
            max_len=4, lora_r=32, enc_dim=3072, enc_heads=32, enc_layers=2, untie=True, steps=8000, batch_size=16,
            micro_batch=1, lr=3e-4, min_lr=1 / 30, warmup=800, minutes=0, arms=["cont", "zip"], weight_decay=0.01,
        ),
    }  # fmt: skip
    limits: ClassVar[dict] = {"samples": (1,)}
    arms: list[str] = field(default_factory=lambda: ["cont", "zip", "rand", "digits"])
    """of cont zip rand digits avg attn m2 m4 ae canon, or all"""
    model: str = ""
    """a real model to adapt: smollm2-135m-instruct, a folder, a hub id (paper: Phi-3.5-mini); none: the toy"""
    dataset: str = "stdlib"
    """text for --model: stdlib, file:PATH, a `datasets` id (paper: epfl-dlab/zip2zip-1B)"""
    minutes: float = 15.0
    """with --model: budget of all arms together; 0 takes --steps"""
    max_len: int = 3
    """M, base ids of a row (paper: 3 or 4)"""
    max_codes: int = 1024
    """N, rows of a sequence (paper: the window)"""
    kwkwk: Literal["avoid", "classic"] = "avoid"
    """may a row be used right after the id that made it (paper: classic)"""
    encoder: Literal["transformer", "attn", "avg"] = "transformer"
    """hyper-encoder (paper: transformer)"""
    enc_layers: int = 1
    """its layers (paper: 2)"""
    enc_dim: int = 64
    """its width (paper: the model's)"""
    enc_heads: int = 2
    """its heads (paper: 32)"""
    untie: bool = False
    """a second encoder, over the rows of the LM head, for the output"""
    residual: Literal["last_first", "first_first", "none"] = "last_first"
    """which base id's rows the encoder adds to, in and out (paper: none)"""
    row_mask: Literal["online", "window"] = "online"
    """rows the softmax sees in training: those that exist, or all of the window (paper: window)"""
    ae: float = 0.1
    """weight of the auto-encoding loss in the arm ae (paper: .1; its released models: 0)"""
    lora_r: int = 8
    """rank of LoRA; alpha = 2 r (paper: r = alpha = 32)"""
    pretrain_steps: int = 350
    """steps of the toy's base model"""
    samples: int = 24
    """held-out windows, prompts"""
    n_layer: int = 3
    """blocks of the toy"""
    n_head: int = 4
    """heads of the toy"""
    n_embd: int = 96
    """width of the toy"""
    block_size: int = 256
    """window in base ids (paper: what fills 1024 or 2048 codes)"""
    timing_layers: int = 8
    """blocks of the random model that the time per byte is measured on"""
    timing_embd: int = 512
    """its width"""


# -------------------------------------------------------------------------------------------------------- the method


class LoRA(nn.Module):
    """A frozen linear layer plus (alpha / r) B A x; B is zero at first, so that nothing changes."""

    def __init__(self, linear, r, alpha):
        super().__init__()
        self.linear, self.scale = linear, alpha / r
        self.A = nn.Parameter(torch.randn(r, linear.in_features) / math.sqrt(linear.in_features))
        self.B = nn.Parameter(torch.zeros(linear.out_features, r))

    def forward(self, x):
        return self.linear(x) + F.linear(F.linear(x, self.A.to(x.dtype)), self.B.to(x.dtype)) * self.scale


def add_lora(gpt, r, alpha):
    """Freezes a GPT and puts LoRA around every linear layer of its blocks, in place."""
    gpt.requires_grad_(False)
    for block in gpt.blocks:
        for part, name in (block.attn, "qkv"), (block.attn, "proj"), (block.mlp, "up"), (block.mlp, "down"):
            setattr(part, name, LoRA(getattr(part, name), r, alpha).to(gpt.wte.weight.device))
    return gpt


class EncoderLayer(nn.Module):
    """Pre-norm self-attention over the M places of a row, padding hidden; then an MLP, if it is a transformer."""

    def __init__(self, dim, heads, mlp):
        super().__init__()
        self.heads, self.norm = heads, nn.RMSNorm(dim)
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        layers = nn.RMSNorm(dim), nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim)
        self.mlp = nn.Sequential(*layers) if mlp else None

    def forward(self, x, see):
        q, k, v = self.qkv(self.norm(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        z = F.scaled_dot_product_attention(q, k, v, see)
        x = x + self.proj(z.transpose(1, 2).flatten(2))
        return x if self.mlp is None else x + self.mlp(x)


class HyperEncoder(nn.Module):
    """Rows of base ids -> vectors: embeddings of M places (R, M, C) and `real` (R, M) -> one (R, C) for each head."""

    def __init__(self, C, M, args, heads):
        super().__init__()
        d = args.enc_dim
        self.inp, self.pos = nn.Linear(C, d), nn.Parameter(0.02 * torch.randn(M, d))
        layers = (EncoderLayer(d, args.enc_heads, args.encoder == "transformer") for _ in range(args.enc_layers))
        self.layers, self.norm = nn.ModuleList(layers), nn.RMSNorm(d)
        self.out = nn.ModuleList(nn.Linear(d, C, bias=False) for _ in range(heads))
        for head in self.out if args.residual != "none" else ():
            nn.init.zeros_(head.weight)

    def forward(self, e, real):
        x, see = self.inp(e) + self.pos, real[:, None, None, :]
        for layer in self.layers:
            x = layer(x, see)
        x = (self.norm(x) * real[..., None]).sum(1) / real.sum(1, keepdim=True)
        return [head(x) for head in self.out]


class Zip(nn.Module):
    """A GPT that reads and writes compressed ids: z < V is the base id z, V + k the row k of its own sequence.

    Batches: idx, targets, count (B, T) compressed ids, next ids (-100: none), rows known (LZW.counts); rows (B, K, M)
    the base ids of all rows, -1 where there is none. With rows (B, 0, M) it is the plain model with LoRA, bit for bit.
    """

    def __init__(self, gpt, lzw, args, arm="zip"):
        super().__init__()
        self.gpt, self.lzw, self.config, self.arm, self.args = gpt, lzw, gpt.config, arm, args
        C, M, self.vectors = gpt.config.n_embd, lzw.max_len, None
        self.encoder = self.output_encoder = self.decoder = None
        if M > 1 and arm != "rand" and args.encoder != "avg":
            self.encoder = HyperEncoder(C, M, args, 1 if args.untie else 2)
            self.output_encoder = HyperEncoder(C, M, args, 1) if args.untie else None
        if arm == "rand":  # the control: a fixed vector of an embedding's size for each slot
            size = gpt.wte.weight.float().norm(dim=1).mean() / math.sqrt(C)
            draw = torch.Generator().manual_seed(1)
            self.register_buffer("random", torch.randn(lzw.max_codes, C, generator=draw).to(size.device) * size)
        if arm == "ae":
            self.decoder = RowDecoder(C, M, gpt.config.vocab_size, args)
        self.gpt.embed.register_forward_hook(lambda _, __, x: x if self.vectors is None else self.vectors(x))

    @property
    def blocks(self):
        return self.gpt.blocks

    def get_extra_state(self):
        """What training and use must agree on travels with the weights."""
        return self.lzw.config() | {"residual": self.args.residual, "row_mask": self.args.row_mask}

    def set_extra_state(self, saved):
        """Raises ValueError if a checkpoint's ids mean something else here: its settings, beside ours."""
        ours = self.get_extra_state()
        if odd := [f"{k} is {saved.get(k)} there, {ours[k]} here" for k in ours if saved.get(k) != ours[k]]:
            raise ValueError(f"the checkpoint is of other codes: {'; '.join(odd)}")

    def state_dict(self, *args, **how):
        """LoRA, encoders and settings; the frozen base model is not saved with every arm."""
        learns = {name for name, p in self.named_parameters() if p.requires_grad} | {"_extra_state"}
        return {k: v for k, v in super().state_dict(*args, **how).items() if k in learns}

    def load_state_dict(self, state, **how):
        if odd := self.state_dict().keys() ^ state.keys():
            raise ValueError(f"the checkpoint is of another arm: {', '.join(sorted(odd)[:3])} only on one side")
        return super().load_state_dict(state, strict=False)

    def encode(self, rows):
        """Input and output vectors of rows (R, M) of base ids, -1 on the right: two tensors (R, C)."""
        real, ids, last = rows >= 0, rows.clamp(min=0), (rows >= 0).sum(1) - 1
        E, W, way = self.gpt.wte.weight, self.gpt.head.weight, self.args.residual
        e, w = F.embedding(ids, E), F.embedding(ids, W)
        if self.encoder is None:
            mean = lambda x: (x * real[..., None]).sum(1) / real.sum(1, keepdim=True)
            vin, vout = mean(e), mean(w)
        else:
            made = self.encoder(e.to(self.encoder.pos.dtype), real)
            vin = made[0]
            vout = made[1] if self.output_encoder is None else self.output_encoder(w.to(vin.dtype), real)[0]
            if way != "none":
                place = last if way == "last_first" else torch.zeros_like(last)
                vin, vout = vin + e[torch.arange(len(rows)), place], vout + w[:, 0]
        return vin * self.config.embed_scale, vout

    def encode_all(self, rows, shuffle=False):
        """`encode` for a batch (B, K, M), every distinct row once: two tensors (B, K, C), zero where there is no row.

        shuffle: the control that gives each row the vectors of another row of its sequence.
        """
        B, K, M = rows.shape
        exists = rows[..., 0] >= 0
        if self.arm == "rand":
            both = self.random[:K].expand(B, K, -1)
            return both, both
        distinct, where = torch.unique(rows[exists], dim=0, return_inverse=True)
        if shuffle:
            where = torch.cat([w.roll(1 + len(w) // 2) for w in where.split(exists.sum(1).tolist())])
        out = []
        for vectors in self.encode(distinct):
            full = vectors.new_zeros(B, K, vectors.shape[-1])
            full[exists] = vectors[where]
            out.append(full)
        return out

    def hidden(self, idx, vin, mask=None, cache=None):
        """The normed residual stream (B, T, C) over compressed ids; `vin` (B, K, C) input vectors of the rows."""
        V = self.config.vocab_size

        def put(x):
            if not vin.shape[1]:
                return x
            own = vin.gather(1, (idx - V).clamp(min=0)[..., None].expand(-1, -1, vin.shape[-1]))
            return torch.where((idx >= V)[..., None], own.to(x.dtype), x)

        self.vectors = put
        try:
            return self.gpt.hidden(torch.where(idx < V, idx, 0), mask, cache=cache)
        finally:
            self.vectors = None

    def logits(self, h, vout, known, banned=None):
        """Scores over V base ids and K rows: h (..., T, C), vout (..., K, C); rows from `known` (..., T) on -inf."""
        scores, c = self.gpt.unembed(h).float(), self.config
        if vout.shape[-2]:
            hyper = (h @ vout.transpose(-1, -2).to(h.dtype)).float() * c.logit_scale
            if c.logit_softcap:
                hyper = c.logit_softcap * torch.tanh(hyper / c.logit_softcap)
            slots = torch.arange(hyper.shape[-1], device=h.device)
            scores = torch.cat((scores, hyper.masked_fill(slots >= known[..., None], -torch.inf)), -1)
        return scores if banned is None else scores.masked_fill(banned, -torch.inf)

    def forward(self, idx, targets, count, rows, banned=None, denom=None):
        """The training loss: (sum over targets of -log p + ae * sum over rows of the auto-encoding loss) / denom.

        denom: how many targets there are, those of other micro-batches and ranks included; so the parts add up.
        """
        vin, vout = self.encode_all(rows)
        h = self.hidden(idx, vin)
        known = count if self.args.row_mask == "online" else (rows[..., 0] >= 0).sum(1, keepdim=True).expand_as(count)

        def nll(h, vout, known, targets, banned):
            scores = self.logits(h, vout, known, banned)
            return F.cross_entropy(scores.flatten(0, 1), targets.flatten(), reduction="sum")

        total, parts = 0.0, (h, vout, known, targets, banned)
        size = max(1, SCORES // (h.shape[1] * (self.config.vocab_size + vout.shape[1])))
        if size < len(idx):  # the scores of a part are made again in the backward pass, not kept
            nll = functools.partial(checkpoint, nll, use_reentrant=False)
        for i in range(0, len(idx), size):
            total = total + nll(*(x if x is None else x[i : i + size] for x in parts))
        if self.decoder is not None:
            distinct, times = torch.unique(rows[rows[..., 0] >= 0], dim=0, return_counts=True)
            ae = self.decoder.loss(self.encode(distinct)[0], distinct, self.gpt.wte.weight)
            total = total + self.args.ae * (times * ae).sum()
        return total / (denom if denom is not None else (targets >= 0).sum())


class RowDecoder(nn.Module):
    """The auto-encoding loss (section 3): a causal transformer reads [row vector, E[y_1], ...], says y_1, y_2, ..."""

    def __init__(self, C, M, V, args):
        super().__init__()
        d = args.enc_dim
        self.inp, self.pos = nn.Linear(C, d), nn.Parameter(0.02 * torch.randn(M, d))
        self.layer, self.head = EncoderLayer(d, args.enc_heads, True), nn.Linear(d, V)

    def scores(self, vector, ids, E):
        """Logits (R, m, V) of the ids y_1 .. y_m from the vector (R, C) and y_1 .. y_{m-1}, ids (R, m - 1)."""
        x = self.inp(torch.cat((vector[:, None], F.embedding(ids.clamp(min=0), E).to(vector.dtype)), 1))
        m = x.shape[1]
        see = torch.ones(m, m, dtype=torch.bool, device=x.device).tril()
        return self.head(self.layer(x + self.pos[:m], see))

    def loss(self, vector, rows, E):
        """Mean cross-entropy of each row's ids (R,), given the right ones before."""
        scores = self.scores(vector, rows[:, :-1], E).transpose(1, 2)
        return F.cross_entropy(scores, rows, ignore_index=-1, reduction="none").sum(1) / (rows >= 0).sum(1)

    @torch.no_grad()
    def recovered(self, vector, rows, E):
        """Share of rows that greedy decoding from the vector alone gives back."""
        ids = rows[:, :0]
        for _ in range(rows.shape[1]):
            ids = torch.cat((ids, self.scores(vector, ids, E)[:, -1:].argmax(-1)), 1)
        return ((ids == rows) | (rows < 0)).all(1).float().mean().item()


def pack(lzw, windows, canonical=False):
    """Windows of base ids -> a batch for `Zip` (right-padded): idx, targets, count, rows, and `banned` if asked for."""
    coded = [lzw.encode(list(map(int, w)), book=True) for w in windows]
    B, T, K = len(coded), max(len(z) for z, _ in coded) - 1, max(len(book) for _, book in coded)
    idx, targets, count = (torch.full((B, T), fill) for fill in (0, -100, 0))
    rows = torch.full((B, K, lzw.max_len), -1)
    for b, (z, book) in enumerate(coded):
        n, z = len(z) - 1, np.array(z)
        idx[b, :n], targets[b, :n] = torch.from_numpy(z[:-1]), torch.from_numpy(z[1:])
        count[b, :n] = torch.from_numpy(lzw.counts(z, book)[:n])
        count[b, :n] += torch.from_numpy(z[1:] - lzw.vocab_size == count[b, :n].numpy())  # KwKwK: the tentative row
        rows[b, : len(book)] = torch.from_numpy(book.array(-1))
    batch = {"idx": idx, "targets": targets, "count": count, "rows": rows}
    if canonical:
        batch["banned"] = torch.zeros(B, T, lzw.vocab_size + K, dtype=torch.bool)
        for b, (z, book) in enumerate(coded):
            first = np.concatenate((np.arange(lzw.vocab_size), rows[b, :, 0].clamp(min=0).numpy()))
            for t, ext in enumerate(lzw.extensions(z, book)[:-1]):
                batch["banned"][b, t] = torch.from_numpy(np.isin(first, ext))
    return batch


def transported(lzw, logp, ids):
    """-log p(z_t) of a canonical stream under the *transported* base model, exact (theorem 2.1 made executable).

    logp (n - 1, V): base log-probabilities of ids[1:]; the last id must be disabled, so that it ends the match before.
    p(z_t) = P(its base ids) * P(the next id doesn't extend it) / P(the first id doesn't extend z_{t-1}).
    """
    codes, book = lzw.encode(list(ids), book=True)
    ext, out, place, p = lzw.extensions(codes, book), [], len(book.expand(codes[0])), logp.exp()
    stays = lambda t, place: torch.log1p(-p[place - 1, ext[t]].sum()) if ext[t] and place <= len(p) else torch.zeros(())
    for t in range(1, len(codes)):
        word = book.expand(codes[t])
        here = sum(logp[place - 1 + j, a] for j, a in enumerate(word))
        out.append(-(here + stays(t, place + len(word)) - stays(t - 1, place)))
        place += len(word)
    return torch.stack(out)


def transported_mass(lzw, predict, ids):
    """What the transported p of all codes that may come after base ids add up to; and P(base ids of the code) alone.

    predict: base ids (R, T) -> log-probabilities of the id after each place (R, T, V). The first number is 1 if the
    factors of `transported` are right. The second counts a text once for every way to cut it.
    """
    codes, book = lzw.encode(ids, book=True)
    tails = [book.expand(c) for c in range(lzw.vocab_size + len(book))]
    word = book.expand(codes[-1])
    if lzw.kwkwk == "classic" and len(book) < lzw.max_codes and len(word) < lzw.max_len:
        tails.append((*word, word[0]))  # KwKwK: the row that is being made
    logp = predict(torch.tensor([[*ids, *w] + [0] * (lzw.max_len - len(w)) for w in tails]))[:, len(ids) - 1 :]
    now, total, alone = lzw.extensions(codes, book)[-1], 0.0, 0.0
    stays = lambda logp, ext: 1 - logp.exp()[ext].sum().item()
    for word, lp in zip(tails, logp):
        p = math.exp(sum(lp[j, a].item() for j, a in enumerate(word)))
        after, book = lzw.encode([*ids, *word], book=True)
        if after[:-1] == codes:  # else LZW would have cut the text in another way
            total += p * stays(lp[len(word)], lzw.extensions(after, book)[-1]) / stays(lp[0], now)
            alone += p
    return total, alone


# --------------------------------------------------------------------------------------------------------- generation


@torch.inference_mode()
def generate(model, prompts, n_base, temperature=0.0, seed=0, replay=None, store=None):
    """Continues every prompt (lists of base ids) until it has n_base new base ids or more; the codebook grows with it.

    replay  codes to feed in place of sampled ones (`LZW.encode_behind`), a list for each prompt: what a text costs
    store   the row cache: base ids -> vectors. Rows don't depend on context, so a row is encoded once per process
    Returns a list of (new codes, new base ids).
    """
    lzw, gpt, device, store = model.lzw, model.gpt, model.gpt.wte.weight.device, {} if store is None else store
    codes, alive, step = [lzw.encode(list(p)) for p in prompts], list(range(len(prompts))), 0
    rng, B, T = torch.Generator(device).manual_seed(seed), len(prompts), max(map(len, codes))
    N = min(lzw.max_codes, max(map(len, prompts)) + n_base + lzw.max_len) if lzw.max_len > 1 else 0
    rows = torch.zeros(2, B, N, gpt.config.n_embd, device=device, dtype=gpt.wte.weight.dtype)  # vectors in and out
    cache = KVCache(gpt.config, B, T + n_base, device, rows.dtype)
    decoders, sizes = [Decoder(lzw) for _ in prompts], [0] * B

    def install(new):
        """Puts the rows that a step makes, a list [(row of the batch, base ids)], where the model finds them."""
        if missing := [] if model.arm == "rand" else list({word for _, word in new if word not in store}):
            padded = [word + (-1,) * (lzw.max_len - len(word)) for word in missing]
            made = torch.stack(model.encode(torch.tensor(padded, device=device)), 1).to(rows.dtype)
            store.update(zip(missing, made))
        for i, group in itertools.groupby(new, lambda pair: pair[0]):
            here = slice(sizes[i], sizes[i] + len(words := [word for _, word in group]))
            rows[:, i, here] = model.random[here] if model.arm == "rand" else torch.stack([store[w] for w in words], 1)
            sizes[i] = here.stop

    install([(b, word) for b, z in enumerate(codes) for c in z for word in decoders[b].push(c)[1]])
    idx, mask = common.padded(codes, device)
    out = [([], []) for _ in prompts]
    while alive:
        known = torch.tensor(sizes, device=device)[:, None]
        with gpt.eager():
            h = model.hidden(idx, rows[0], mask, cache)[:, -1:]
        scores, mask = model.logits(h, rows[1, :, : max(sizes)], known)[:, 0], None
        idx = sample(scores, temperature, rng=rng)
        if replay:
            idx = torch.tensor([[replay[b][step]] for b in alive], device=device)
        new, keep, step = [], [], step + 1
        for i, (b, code) in enumerate(zip(alive, idx[:, 0].tolist())):
            base, made = decoders[b].push(code)
            out[b][0].append(code)
            out[b][1].extend(base)
            new += [(i, word) for word in made]
            if len(out[b][1]) < n_base and not (replay and step == len(replay[b])):
                keep.append(i)
        install(new)
        if len(keep) < len(alive):
            rest = torch.tensor(keep, dtype=torch.long, device=device)
            idx, rows, alive, sizes = idx[rest], rows[:, rest], [alive[i] for i in keep], [sizes[i] for i in keep]
            cache.keep(rest)
    return out


def prompt_lookup_steps(ids, start, draft=8, n=2):
    """Forward passes of exact n-gram prompt lookup for ids[start:], if the model agrees with the text: the baseline."""
    at, steps, seen, filled = start, 0, {}, n
    while at < len(ids):
        for j in range(filled, at):  # n-grams that end before the current one: where they went on
            seen[tuple(ids[j - n : j])] = j
        filled, right, guess = max(filled, at), 0, seen.get(tuple(ids[at - n : at]), at)
        while right < draft and guess + right < at < len(ids) - right and ids[guess + right] == ids[at + right]:
            right += 1
        at, steps = at + right + 1, steps + 1
    return steps


# --------------------------------------------------------------------------------------------------------- the worlds


class Synth:
    """A language of 188 ids: documents with 2-6 names of syllables (drawn anew for each), verbs, nouns, numbers.

    Names come as 1/rank; now and then a number of 8 random digits is said twice. One window is one document.
    """

    def __init__(self, args, seed):
        syllables = [c + v for c in "bcdfghklmnprstz" for v in "aeiou"]
        words = "sees likes helps finds calls pays meets thanks|house river garden market road bridge school tower boat"
        verbs, nouns = ([f" {w}" for w in part.split()] for part in words.split("|"))
        rest = [" is", " near", " the", " of", " and", " with", " number", " again", ".", "\n"]
        parts = [["<end>"], syllables, [f" {s}" for s in syllables], verbs, nouns, rest, [f" {d}" for d in range(10)]]
        self.text = [text for part in parts for text in part]
        ends = np.cumsum([len(p) for p in parts])
        self.tail, self.head, self.verbs, self.nouns, rest, self.digits = [range(*r) for r in zip(ends, ends[1:])]
        self.word = {self.text[i].strip() or "\n": int(i) for i in rest}
        self.n_vocab, self.special, self.length, self.seed = int(ends[-1]), [0], args.block_size, seed
        self.bytes = np.array([0] + [len(t) for t in self.text[1:]])

    def document(self, rng):
        """Ids of one document, at least a window, opened by the end of the one before."""
        w, weights, out = self.word, [1 / i for i in range(1, 7)], [0]
        names = [[rng.choice(self.head), *rng.choices(self.tail, k=rng.randint(1, 3))] for _ in weights]
        liked = rng.sample(range(4), 2)
        while len(out) <= self.length:
            (a, b), v, n = rng.choices(names, weights, k=2), rng.choice(self.verbs), rng.choice(self.nouns)
            sentence = [
                [*a, v, *b], [*a, w["is"], w["near"], w["the"], n, w["of"], *b],
                [w["the"], n, w["of"], *a, w["and"], *b], [*a, v, w["the"], n, w["with"], *b],
            ][rng.choice(liked) if rng.random() < 0.7 else rng.randrange(4)]  # fmt: skip
            if rng.random() < 0.15:
                number = rng.choices(self.digits, k=8)
                sentence = [w["number"], *number, w["again"], *number]
            out += [*sentence, w["."]] + ([w["\n"]] if rng.random() < 0.2 else [])
        return out[: self.length + 1]

    def windows(self, split, step, n):
        """n windows (n, length + 1): documents of this step, or of the held-out ones."""
        rng = random.Random(f"{self.seed} {split} {step}")
        return np.array([self.document(rng) for _ in range(n)])

    def n_bytes(self, ids):
        return int(self.bytes[np.asarray(ids)].sum())

    def names(self, ids):
        """The names in a list of ids, tuples, but for those at its ends, which may be cut."""
        kinds = "".join("h" if a in self.head else "t" if a in self.tail else " " for a in ids)
        return [tuple(ids[m.start() : m.end()]) for m in re.finditer("(?<=.)ht+(?=[ h])", kinds)]


class Text:
    """Windows of a real text in a real model's ids."""

    def __init__(self, args, tok, seed):
        local = args.dataset == "stdlib" or args.dataset.startswith("file:")
        limit = None if local else args.steps * args.batch_size * (args.block_size + 1)
        folder = Path(args.out) / "tokens"
        read = lambda split, most: data.token_file(args.dataset, split, tok, folder, most)
        self.tokens = {"train": read("train", limit), "heldout": read("heldout", limit and 2**20)}
        self.tok, self.length, self.seed = tok, args.block_size, seed
        self.special = [i for i, t in tok.backend.get_added_tokens_decoder().items() if t.special]
        self.digits = digit_ids(tok)
        for part in self.tokens.values():
            data.windows(part, np.random.default_rng(0), 1, self.length + 1)

    def windows(self, split, step, n):
        rng = np.random.default_rng([self.seed, split == "heldout", step])
        return data.windows(self.tokens[split], rng, n, self.length + 1)

    def n_bytes(self, ids):
        return len(self.tok.decode(list(map(int, ids))).encode())


# ------------------------------------------------------------------------------------------------------------ training


def build(args, base, world, arm):
    """The model of an arm around the base model, whose frozen weights all arms share; LoRA starts the same in all."""
    M, encoder = {"cont": 1, "m2": 2, "m4": 4}, {"avg": "avg", "zeroshot": "avg", "attn": "attn"}
    disabled = [*world.special, *(world.digits if args.model or arm == "digits" else ())]
    lzw = LZW(base.config.vocab_size, args.max_codes, M.get(arm, args.max_len), disabled, args.kwkwk)
    torch.manual_seed(world.seed)
    gpt = add_lora(copy.deepcopy(base, {id(p): p for p in base.parameters()}), args.lora_r, 2 * args.lora_r)
    return Zip(gpt, lzw, replace(args, encoder=encoder.get(arm, args.encoder)), arm).to(gpt.wte.weight.device)


def config_of(args, world):
    """The toy's shape."""
    shape = world.n_vocab, 2 * args.block_size, args.n_layer, args.n_head, args.n_embd
    return GPTConfig(*shape, norm="rms", tie=True, smear_keys=True)  # names are copied sooner with smeared keys


def base_model(args, env, world, log):
    """The toy's base model, trained on plain ids (once a seed), or the real one."""
    if args.model:
        return load_real(args.model, env.dtype)[0].to(env.device)
    torch.manual_seed(world.seed)

    def batch(step):
        x = torch.from_numpy(world.windows("train", step, args.batch_size)[env.rank :: env.world])
        return {"idx": x[:, :-1], "targets": x[:, 1:]}

    common.train(gpt := GPT(config_of(args, world)), batch, replace(args, steps=args.pretrain_steps, lr=4e-3), env, log)
    return gpt


def train_arm(args, model, env, world, log):
    """Uptrains the model of one arm; every arm sees the same windows."""
    if args.resume and log.path.with_suffix(".pt").exists():
        with common.bad_input():
            model.set_extra_state(common.load_checkpoint(log.path.with_suffix(".pt"))["model"]["_extra_state"])

    def batch(step):
        windows = world.windows("train", 10**6 + step, args.batch_size)[env.rank :: env.world]
        part = pack(model.lzw, windows, model.arm == "canon")
        return part | {"denom": common.all_reduce((part["targets"] >= 0).sum().float().to(env.device), env)}

    def evaluate(step):
        return {"bpb": bits_per_byte(model, world, max(2, args.samples // 4), env)["bpb"]}

    common.train(model, batch, args, env, log, evaluate)
    return model.eval()


# ------------------------------------------------------------------------------------------------------------ measures


@torch.no_grad()
def bits_per_byte(model, world, n, env, shuffle=False):
    """Held-out windows, every byte scored, only rows that exist: bits per byte, ids per base id, nats by kind, ...

    off_canonical: the probability on ids that LZW can't emit next. It is lost, and `canon` takes it away.
    """
    windows, V, sums = world.windows("heldout", 0, n), model.config.vocab_size, Counter()
    nll, hyper = [], []
    for part in np.array_split(windows, max(1, n // 8)):
        batch = {k: v.to(env.device) for k, v in pack(model.lzw, part, canonical=True).items()}
        with env.autocast():
            vin, vout = model.encode_all(batch["rows"], shuffle)
            h = model.hidden(batch["idx"], vin)
        for b, targets in enumerate(batch["targets"]):
            real, banned = targets >= 0, batch["banned"][b]
            with env.autocast():
                scores = model.logits(h[b], vout[b], batch["count"][b], banned if model.arm == "canon" else None)
            logp, targets = scores[real].log_softmax(-1), targets[real]
            nll.append(-logp.gather(1, targets[:, None])[:, 0])
            hyper.append(targets >= V)
            sums["off"] += (logp.exp() * banned[real]).sum().item()
            sums["made"] += (batch["rows"][b, :, 0] >= 0).sum().item()
            sums["used"] += len(targets[targets >= V].unique())
    nll, hyper = torch.cat(nll), torch.cat(hyper)
    size, codes = sum(world.n_bytes(w[1:]) for w in windows), len(nll)
    return {
        "bpb": nll.sum().item() / size / math.log(2), "ratio": codes / windows[:, 1:].size,
        "ids_per_byte": codes / size, "hyper_share": hyper.float().mean().item(),
        "reuse": sums["used"] / max(1, sums["made"]), "off_canonical": sums["off"] / codes,
        "nats_base": nll[~hyper].mean().item(), "nats_hyper": nll[hyper].mean().item() if hyper.any() else 0.0,
    }  # fmt: skip


def measure_generation(model, world, args):
    """Free generation from held-out prompts: are hypertokens used, are names and numbers copied right?"""
    quarter, out, V = args.block_size // 4, {}, model.config.vocab_size
    prompts = [w[: 2 * quarter].tolist() for w in world.windows("heldout", 1, args.samples)]
    for name, temperature in ("greedy", 0.0), ("sampled", 0.8):
        done = generate(model, prompts, quarter, temperature, seed=world.seed)
        codes, base = (sum((d[i] for d in done), []) for i in (0, 1))
        hyper = [c for c in codes if c >= V]
        out |= {f"{name}_hyper_share": len(hyper) / len(codes), f"{name}_ids_per_base": len(codes) / len(base)}
    if isinstance(world, Synth):  # the sampled ones
        pairs = [n in set(world.names(p)) for p, d in zip(prompts, done) for n in world.names(d[1])]
        out["names_copied"] = float(np.mean(pairs)) if pairs else 0.0
        rng, w = random.Random(world.seed), world.word
        numbers = [rng.choices(world.digits, k=8) for _ in prompts]
        asked = [p[: 2 * quarter - 12] + [w["."], w["number"], *n, w["again"]] for p, n in zip(prompts, numbers)]
        done = generate(model, asked, 8)
        out["digits_copied"] = float(np.mean([a == b for d, n in zip(done, numbers) for a, b in zip(d[1], n)]))
        out["numbers_copied"] = float(np.mean([d[1][:8] == n for d, n in zip(done, numbers)]))
    return out


def time_per_byte(plain, zipped, world, half, rounds=5):
    """Replay of held-out text through cached decoding: seconds per output byte, zip / base, in turns, by text.

    Each turn starts with an empty row cache, and includes the tokenizer and the rows. `random ids` is the control: a
    text in which nothing repeats. Prompt lookup is exact and needs no training: the baseline for steps per base id.
    """
    texts, out = {"text": world.windows("heldout", 2, 1)[0][: 2 * half]}, {}
    texts["random ids"] = np.random.default_rng(0).integers(1, plain.config.vocab_size, 2 * half)
    for name, ids in texts.items():
        prompt, rest, ratios = ids[:half].tolist(), ids[half:].tolist(), []

        def seconds(model, prompt=prompt, rest=rest):
            began = time.perf_counter()
            generate(model, [prompt], half, replay=[model.lzw.encode_behind(prompt, rest)])
            return time.perf_counter() - began

        for _ in range(rounds):
            base = seconds(plain)
            ratios.append(seconds(zipped) / base)
        out[name] = statistics.median(ratios)
        out[f"{name}, ids per base id"] = len(zipped.lzw.encode_behind(prompt, rest)) / half
        out[f"{name}, prompt lookup steps per base id"] = prompt_lookup_steps(ids.tolist(), half) / half
    return out


@torch.no_grad()
def oracle(gpt, lzw, world, n, env):
    """Theorem 2.1: bits per byte of the base model and of its transported model, on windows that end with a text's end.

    mass: the worst |sum of p over the codes that may come next - 1|; alone: the same of P(base ids of the code).
    """
    predict = lambda idx: gpt(idx.to(env.device)).double().log_softmax(-1).cpu()
    out, size = Counter(), 0
    for w in world.windows("heldout", 0, n):
        ids = [*w[:-1].tolist(), world.special[0]]
        logp = predict(torch.tensor([ids[:-1]]))[0]
        out["plain"] -= logp[torch.arange(len(ids) - 1), ids[1:]].sum().item()
        out["oracle"] += transported(lzw, logp, ids).sum().item()
        size += world.n_bytes(ids[1:])
    out = {k: v / size / math.log(2) for k, v in out.items()}
    masses = [transported_mass(lzw, predict, ids[:t]) for t in (len(ids) // 4, len(ids) // 3)]
    return out | {name: max(abs(m[i] - 1) for m in masses) for i, name in enumerate(("mass", "alone"))}


def run_seed(args, seed):
    """One seed: the base model, every arm, every measure: ({arm: measures}, the logs)."""
    env, out = common.setup(args), Path(args.out)
    world, log = make_world(args, env, seed), common.Log(out, f"base-s{seed}", env)
    base, logs, found, models = base_model(args, env, world, log), [log], {}, {}
    arm_of = lambda arm: build(args, base, world, arm)
    measure = lambda model, **how: bits_per_byte(model.eval(), world, args.samples, env, **how)
    found["zeroshot"], found["base"] = measure(arm_of("zeroshot")), measure(arm_of("cont"))
    if not args.model:
        found["base"] |= oracle(base.eval(), arm_of("zip").lzw, world, min(4, args.samples), env)
    elif args.minutes:
        args = budget(args, arm_of("zip"), env, world)
    for arm in args.arms:
        logs.append(common.Log(out, f"{arm}-s{seed}", env))
        models[arm] = model = train_arm(args, arm_of(arm), env, world, logs[-1])
        found[arm] = measure(model)
        with env.autocast():
            found[arm] |= measure_generation(model, world, args)
        if arm == "zip":
            found["shuffle"] = measure(model, shuffle=True)
        if arm == "ae":
            rows = pack(model.lzw, world.windows("heldout", 0, 8))["rows"].flatten(0, 1).unique(dim=0)
            rows = rows[rows[:, 0] >= 0].to(env.device)
            found[arm]["rows_recovered"] = model.decoder.recovered(model.encode(rows)[0], rows, base.wte.weight)
        if env.rank == 0:
            print(f"{arm}-s{seed}: " + ", ".join(f"{k} {v:.3f}" for k, v in found[arm].items()), flush=True)
    if args.model:
        found["time"] = time_per_byte(models["cont"], models["zip"], world, min(128, args.block_size // 2), 3)
    else:  # time does not depend on the weights: a larger model, not trained
        config = GPTConfig(4096, 2 * args.block_size, args.timing_layers, 8, args.timing_embd, norm="rms", tie=True)
        pair = (build(args, GPT(config), world, arm).to(env.device).eval() for arm in ("cont", "zip"))
        found["time"] = time_per_byte(*pair, world, args.block_size // 2)
    lzw, texts = models["zip"].lzw, world.windows("heldout", 0, 8).tolist()
    mixed = [random.Random(i).sample(w, len(w)) for i, w in enumerate(texts)]
    found["mixed"] = {"ratio": sum(len(lzw.encode(w)) for w in mixed) / sum(map(len, mixed))}
    return found, logs


def budget(args, model, env, world):
    """--minutes as steps: times a step of zip; two thirds are for training. A resumed run keeps its steps."""
    log = common.Log(args.out, "budget", env)
    with common.rank_zero_first(env):
        if not (env.rank or args.resume and log.path.exists()):
            log.rewind(0)
            batch = pack(model.lzw, world.windows("train", 0, args.batch_size // env.world))
            for _ in range(2):  # the first one warms up
                began = time.perf_counter()
                with env.autocast():
                    loss = model(**{k: v.to(env.device) for k, v in batch.items()})
                    loss.backward()
                loss.item()  # waits for the device
                seconds = time.perf_counter() - began
            log(max(4, int(40 * args.minutes / len(args.arms) / seconds)), seconds_per_step=seconds)
    steps = common.read_jsonl(log.path)[0]["step"]
    print(f"{steps} steps an arm in {args.minutes:g} minutes")
    return replace(args, steps=steps, warmup=min(args.warmup, steps // 10), eval_every=max(1, steps // 4))


# --------------------------------------------------------------------------------------------------------- the verdict
# fmt: off


def judge(run, results):
    """The claims, medians over seeds, each beside the controls that must fail the same criterion."""
    m = lambda arm, key: float(np.median([r[arm][key] for r in results]))
    cont, arms = m("cont", "bpb"), [a for a in ("zeroshot", "shuffle", "rand") if a in results[0]]
    test = lambda arm: m(arm, "ratio") <= 0.8
    run.claim("C1", "fewer ids for the same text", "-15 to -40 %", {"ids per base id": m("zip", "ratio")},
              {"words in random order": m("mixed", "ratio")}, "<= .8", test("zip"), not test("mixed"))
    test = lambda arm: m(arm, "bpb") <= 1.2 * cont
    run.claim("C2", "at little cost: bits per byte against LoRA on plain ids", "1.08 to 1.15 x",
              {"cont": cont, "zip": m("zip", "bpb"), "zip / cont": m("zip", "bpb") / cont},
              {a: m(a, "bpb") for a in arms}, "zip <= 1.2 cont", test("zip"), not any(map(test, arms)))
    if "rand" in arms:
        test = lambda arm: m(arm, "bpb") - cont <= 0.5 * min(m("rand", "bpb") - cont, m("shuffle", "bpb") - cont)
        run.claim("C3", "it is the encoder's rows that do it: excess over cont, against other rows", "-",
                  {"zip": m("zip", "bpb") - cont}, {a: m(a, "bpb") - cont for a in arms},
                  "excess <= half that of rand and of shuffle", test("zip"), not any(map(test, arms)))
    if "rand" in arms and "names_copied" in results[0]["zip"]:
        keys = "sampled_hyper_share", "sampled_ids_per_base", "names_copied"
        show = lambda arm: {f"{arm} {k}": m(arm, k) for k in keys}
        test = lambda arm: (m(arm, "sampled_hyper_share") >= 0.1 and m(arm, "sampled_ids_per_base") <= 0.9
                            and m(arm, "names_copied") >= m("cont", "names_copied") - 0.05)
        run.claim("C4", "hypertokens are generated, and names copied as well as by cont", "ids .77 to .92 of base ids",
                  show("zip") | {"cont names_copied": m("cont", "names_copied")}, show("rand"),
                  "hyper share >= .1, ids per base id <= .9, names >= cont - .05", test("zip"), not test("rand"))
    x, y = m("time", "text"), m("time", "random ids")
    run.claim("C5", "less time per output byte than the base model, text replayed", "decode +9 to +47 %",
              {"zip / base": x}, {"text without repetition": y}, "< 1", x < 1, y >= 1)
    if "oracle" in results[0]["base"]:
        gap = max(abs(r["base"]["oracle"] - r["base"]["plain"]) for r in results)
        mass, alone = (max(r["base"][k] for r in results) for k in ("mass", "alone"))
        run.claim("C6", "the transported base model (theorem 2.1) loses no bit and is a distribution over codes", "0",
                  {"bits per byte lost": gap, "|sum p - 1|": mass}, {"|sum p - 1|, without the factors": alone},
                  "<= 1e-4", max(gap, mass) <= 1e-4, alone > 1e-4)
    if "digits" in results[0] and "digits_copied" in results[0]["zip"]:
        copied = lambda arm: m(arm, "digits_copied")
        test = lambda arm: copied(arm) >= copied("cont") - 0.05
        run.claim("C7", "numbers are copied as well as by cont if digits are never merged",
                  "GSM8K .356 -> .610 (successor)", {"cont": copied("cont"), "protected": copied("digits")},
                  {"unprotected": copied("zip")}, ">= cont - .05", test("digits"), not test("zip"))


# fmt: on


def draw(path, results, logs):
    """Bits per byte against ids per base id; the curves of training; what is generated, by arm."""
    mean = lambda arm, key: np.mean([r[arm][key] for r in results])
    arms = [a for a in results[0] if "bpb" in results[0][a]]
    colour = dict(zip(arms, itertools.cycle("#888888 #bbbbbb #4477aa #ee6677 #ccbb44 #aa3377 #228833 #66ccee".split())))
    with common.figure(path, 1, 3) as (trade, curves, use):
        for arm in arms:
            at = mean(arm, "ratio"), mean(arm, "bpb")
            trade.plot(*at, "o", color=colour[arm])
            trade.annotate(arm, at, (5, -11 if arm == "base" else 4), textcoords="offset points", fontsize=8)
        trade.set(title="Held-out text", xlabel="ids per base id", ylabel="bits per byte")
        trade.margins(0.18, 0.1)
        for log in logs:
            arm, rows = log.run.rsplit("-", 1)[0], [r for r in common.read_jsonl(log.path) if "bpb" in r]
            if rows:
                label = None if arm in curves.get_legend_handles_labels()[1] else arm
                curves.plot([r["step"] for r in rows], [r["bpb"] for r in rows], color=colour[arm], label=label)
        curves.set(title="Uptraining", xlabel="step", ylabel="bits per byte")
        curves.legend(fontsize=7)
        trained = [a for a in arms if "sampled_hyper_share" in results[0][a]]
        keys = {"sampled_hyper_share": "hypertokens,\nshare of ids", "names_copied": "names\nfrom the prompt",
                "digits_copied": "digits copied"}  # fmt: skip
        keys = {k: v for k, v in keys.items() if k in results[0]["zip"]}
        for i, arm in enumerate(trained):
            at = np.arange(len(keys)) + 0.8 * i / len(trained)
            use.bar(at, [mean(arm, k) for k in keys], 0.8 / len(trained), color=colour[arm], label=arm, align="edge")
        use.set(title="Generation", xticks=np.arange(len(keys)) + 0.4, xticklabels=keys.values(), ylim=(0, 1.25))
        use.legend(fontsize=7, ncols=4)


# --------------------------------------------------------------------------------------------------------------- main


def make_world(args, env, seed):
    return Text(args, load_real(args.model, env.dtype)[1], seed) if args.model else Synth(args, seed)


@functools.cache
def load_real(name, dtype):
    """(GPT, tokenizer) of a real model, once a process; its frozen weights in bf16 if products are (--dtype)."""
    import pretrained

    return pretrained.load(name, "cpu", "bf16" if dtype == torch.bfloat16 else "fp32")


def check(args, env):
    """Bad flags end here."""
    args.arms = list(ARMS) if args.arms == ["all"] else args.arms
    for bad, message in (
        (set(args.arms) - set(ARMS), f"--arms {' '.join(args.arms)}, allowed: all, {' '.join(ARMS)}"),
        ({"cont", "zip"} - set(args.arms), f"--arms {' '.join(args.arms)} lacks cont or zip, measure of the others"),
        (args.enc_dim % args.enc_heads, f"--enc-dim {args.enc_dim} is not a multiple of --enc-heads {args.enc_heads}"),
        (args.batch_size % env.world, f"--batch-size {args.batch_size} is not a multiple of {env.world} processes"),
        (args.lora_r < 1, f"--lora-r {args.lora_r}, allowed: from 1"),
        (args.block_size < 32, f"--block-size {args.block_size}, allowed: from 32"),
        (args.shard, "--shard: every process holds the frozen base model, allowed: --no-shard"),
    ):
        if bad:
            raise ValueError(message)
    LZW(2, args.max_codes, args.max_len)
    GPTConfig(8, 8, args.n_layer, args.n_head, args.n_embd)


def main(argv=None):
    """The paper end to end; returns what it writes to result.json."""
    args = common.parse(Args, argv)
    with common.bad_input():
        env, out = common.setup(args), Path(args.out)
        run = common.Run(args, env, "train_zip2zip", "2506.01084")
        check(args, env)
        out.mkdir(parents=True, exist_ok=True)
        with common.rank_zero_first(env):  # tokenizes once
            world = make_world(args, env, args.seeds[0])
        for seed in args.seeds if args.resume and not args.model else ():
            common.check_resume(out / f"base-s{seed}.pt", config_of(args, world))
    jobs = common.job_count(args, env)
    done = common.side_by_side(run_seed, [(args, seed) for seed in args.seeds], jobs)
    if env.rank:
        return None
    results, logs = [found for found, _ in done], [log for _, logs in done for log in logs]
    run.metrics = {arm: [r[arm] for r in results] for arm in results[0]}
    judge(run, results)
    draw(out / "zip2zip.png", results, logs)
    return run.finish(logs)


if __name__ == "__main__":
    main()
