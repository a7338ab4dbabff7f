"""zip2zip (arXiv 2506.01084): a language model whose vocabulary grows with the text in front of it.

LZW (lzw_tokenizer.py) merges what repeats in this very sequence into new ids, *hypertokens*, at most M base ids each.
A small hyper-encoder makes each hypertoken's input embedding and its output row from the embeddings of its base ids,
so that the model reads and writes ids nobody has trained. Base weights are frozen; LoRA and hyper-encoder learn from
the ordinary next-id loss over compressed ids. The paper: 15-40 % fewer ids, bits per byte 8-15 % worse.

The toy: a GPT is trained on a synthetic language whose documents have names of their own (new ones in the test), then
LoRA arms go on from it with the same windows: `cont` reads plain ids, `zip` compressed ones, `rand` has random rows in
place of the encoder's, `digits` never merges digits, `avg` averages embeddings, `m2`, `m4`: other M, `ae`: the
auto-encoding loss. zip is also measured with the rows of a window shuffled, and untrained (`zeroshot`).

A row is `residual + g`, g zero at the start: E[last id] on the way in, W[first id] on the way out (inferred: better
than the same vector on both sides, before and after training). A row exists for the softmax only once the text defines
it (exact online mask), and `avoid` (see lzw_tokenizer) leaves nothing unscorable.

Read on: `Zip` (the method) -> `generate` -> `transported` (theory) -> `Synth` -> `train_arm` -> `measure` -> `judge`.
"""

import copy
import functools
import itertools
import math
import statistics
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

import common
import data
from lzw_tokenizer import LZW, Decoder, digit_ids
from model import GPT, GPTConfig, KVCache, sample

ARMS = "cont", "zip", "rand", "digits", "avg", "attn", "m2", "m4", "ae", "canon"


@dataclass
class Args(common.TrainFlags):
    """zip2zip"""

    presets: ClassVar[dict] = {
        "smoke": dict(
            pretrain_steps=6, steps=4, n_embd=32, n_layer=2, enc_dim=16, block_size=64, samples=4, warmup=2, jobs=1,
            threads=1, timing_layers=1, timing_embd=32, eval_every=4, batch_size=4,
        ),
        "toy": dict(steps=150, eval_every=50),
        "paper": dict(
            model="microsoft/Phi-3.5-mini-instruct", dataset="epfl-dlab/zip2zip-1B", block_size=4096, max_codes=2048,
            max_len=4, lora_r=32, enc_dim=3072, enc_heads=32, enc_layers=2, untie=True, steps=8000, batch_size=16,
            micro_batch=1, lr=3e-4, min_lr=1 / 30, warmup=800, minutes=0, arms=["cont", "zip"], weight_decay=0.01,
        ),
    }  # fmt: skip
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
    pretrain_steps: int = 500
    """steps of the toy's base model"""
    samples: int = 32
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
        self.heads, self.norm, self.qkv, self.proj = (
            heads,
            nn.RMSNorm(dim),
            nn.Linear(dim, 3 * dim),
            nn.Linear(dim, dim),
        )
        self.mlp = nn.Sequential(nn.RMSNorm(dim), nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))
        self.mlp = self.mlp if mlp else None

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
            self.decoder = Decoder2(C, M, gpt.config.vocab_size, args)
        self.gpt.embed.register_forward_hook(lambda _, __, x: x if self.vectors is None else self.vectors(x))

    @property
    def blocks(self):
        return self.gpt.blocks

    def get_extra_state(self):
        """What training and use must agree on travels with the weights."""
        return self.lzw.config()

    def set_extra_state(self, saved):
        self.same_codes(saved)

    def same_codes(self, saved):
        """Raises ValueError if a checkpoint's ids mean something else here: its settings of LZW, beside ours."""
        ours = self.lzw.config()
        if odd := [f"{k} is {saved.get(k)} there, {ours[k]} here" for k in ours if saved.get(k) != ours[k]]:
            raise ValueError(f"the checkpoint is of other codes: {'; '.join(odd)}")

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

    def logits(self, h, vout, known):
        """Scores over V base ids and K rows: h (..., T, C), vout (..., K, C); rows from `known` (..., T) on -inf."""
        base, c = self.gpt.unembed(h).float(), self.config
        if not vout.shape[-2]:
            return base
        hyper = (h @ vout.transpose(-1, -2).to(h.dtype)).float() * c.logit_scale
        if c.logit_softcap:
            hyper = c.logit_softcap * torch.tanh(hyper / c.logit_softcap)
        slots = torch.arange(hyper.shape[-1], device=h.device)
        return torch.cat((base, hyper.masked_fill(slots >= known[..., None], -torch.inf)), -1)

    def forward(self, idx, targets, count, rows, banned=None, denom=None):
        """The training loss: sum over targets of -log p / denom (+ ae * the auto-encoding loss)."""
        vin, vout = self.encode_all(rows)
        h = self.hidden(idx, vin)
        known = count if self.args.row_mask == "online" else (rows[..., 0] >= 0).sum(1, keepdim=True).expand_as(count)

        def row_loss(h, vout, known, targets, ban):
            scores = self.logits(h, vout, known)
            scores = scores if ban is None else scores.masked_fill(ban[:, : scores.shape[-1]], -torch.inf)
            return F.cross_entropy(scores, targets, reduction="sum")

        total = 0.0
        for b in range(len(idx)):  # row by row, and again in the backward pass: (T, V) is never held for the batch
            part = h[b], vout[b], known[b], targets[b], None if banned is None else banned[b]
            total = total + checkpoint(row_loss, *part, use_reentrant=False)
        loss = total / (denom if denom is not None else (targets >= 0).sum())
        if self.decoder is not None:
            distinct = torch.unique(rows[rows[..., 0] >= 0], dim=0)
            loss = loss + self.args.ae * self.decoder.loss(self.encode(distinct)[0], distinct, self.gpt.wte.weight)
        return loss


class Decoder2(nn.Module):
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
        return F.cross_entropy(self.scores(vector, rows[:, :-1], E).flatten(0, 1), rows.flatten(), ignore_index=-1)

    def exact(self, vector, rows, E):
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
            for t, ext in enumerate(extensions(lzw, z, book)[:-1]):
                batch["banned"][b, t] = torch.from_numpy(np.isin(first, ext))
    return batch


def extensions(lzw, codes, book):
    """For each code: the base ids that can't follow it in a canonical stream, as LZW would have merged them with it."""
    counts, children = lzw.counts(codes, book), {}
    for k, key in enumerate(book.table):
        parent, last = divmod(key, lzw.vocab_size)
        children.setdefault(parent, []).append((k, last))
    if lzw.kwkwk == "avoid":  # the row that the code before has just made is not used yet
        counts = np.concatenate(([0], counts[:-1]))
    return [[a for k, a in children.get(z, ()) if k < n] for z, n in zip(codes, counts)]


def transported(lzw, logp, ids):
    """-log p(z_t) of a canonical stream under the *transported* base model, exact (theorem 2.1 made executable).

    logp (n - 1, V): base log-probabilities of ids[1:]; the last id must be disabled, so that it ends the match before.
    p(z_t) = P(its base ids) * P(the next id doesn't extend it) / P(the first id doesn't extend z_{t-1}).
    """
    codes, book = lzw.encode(list(ids), book=True)
    ext, out, place, p = extensions(lzw, codes, book), [], len(book.expand(codes[0])), logp.exp()
    stays = lambda t, place: torch.log1p(-p[place - 1, ext[t]].sum()) if ext[t] and place <= len(p) else torch.zeros(())
    for t in range(1, len(codes)):
        word = book.expand(codes[t])
        here = sum(logp[place - 1 + j, a] for j, a in enumerate(word))
        out.append(-(here + stays(t, place + len(word)) - stays(t - 1, place)))
        place += len(word)
    return torch.stack(out)


# --------------------------------------------------------------------------------------------------------- generation


@torch.inference_mode()
def generate(model, prompts, n_base, temperature=0.0, seed=0, replay=None, store=None):
    """Continues every prompt (lists of base ids) until it has n_base new base ids or more; the codebook grows with it.

    replay  codes to feed in place of sampled ones, a list for each prompt: what a text costs, whatever the model says
    store   the row cache: base ids -> vectors. Rows don't depend on context, so a row is encoded once per process
    Returns a list of (new codes, new base ids).
    """
    lzw, gpt, device, store = model.lzw, model.gpt, model.gpt.wte.weight.device, {} if store is None else store
    C, N, B = gpt.config.n_embd, lzw.max_codes if lzw.max_len > 1 else 0, len(prompts)
    rng = torch.Generator(device).manual_seed(seed)
    decoders, known = [Decoder(lzw) for _ in prompts], torch.zeros(B, dtype=torch.long, device=device)
    N = min(N, max(map(len, prompts)) + n_base + lzw.max_len)
    rows = torch.zeros(2, B, N, C, device=device, dtype=gpt.wte.weight.dtype)  # input and output vectors

    def install(new):
        """Puts the rows made by this step, a list [(b, base ids)], where the model finds them."""
        missing = [] if model.arm == "rand" else list({word for _, word in new if word not in store})
        if missing:
            padded = [word + (-1,) * (lzw.max_len - len(word)) for word in missing]
            made = torch.stack(model.encode(torch.tensor(padded, device=device))).to(rows.dtype)
            store.update({word: made[:, i] for i, word in enumerate(missing)})
        for b, group in itertools.groupby(new, lambda pair: pair[0]):
            words, k = [word for _, word in group], int(sizes[b])
            rows[:, b, k : k + len(words)] = (
                model.random[None, k : k + len(words)]
                if model.arm == "rand"
                else torch.stack([store[w] for w in words], 1)
            )
            sizes[b] += len(words)
            known[b] = sizes[b]

    sizes, codes, new = [0] * B, [lzw.encode(list(p)) for p in prompts], []
    for b, z in enumerate(codes):
        new += [(b, word) for c in z for word in decoders[b].push(c)[1]]
    install(new)
    T = max(map(len, codes))
    idx = torch.tensor([[0] * (T - len(z)) + z for z in codes], device=device)
    mask = torch.tensor([[0] * (T - len(z)) + [1] * len(z) for z in codes], dtype=torch.bool, device=device)
    cache = KVCache(gpt.config, B, T + n_base, device, gpt.wte.weight.dtype)
    out, alive, step = [([], []) for _ in prompts], list(range(B)), 0
    while True:
        top = max(sizes[b] for b in alive)
        at = torch.tensor(alive, device=device)
        live = rows if len(alive) == B else rows[:, at]
        h = model.hidden(idx, live[0], mask, cache)[:, -1:]
        mask = None
        scores = model.logits(h, live[1, :, :top], known[at, None])[:, 0]
        if replay is None:
            idx = sample(scores, temperature, rng=rng)
        else:
            idx = torch.tensor([[replay[b][step]] for b in alive], device=device)
        new, keep = [], []
        for i, (b, code) in enumerate(zip(alive, idx[:, 0].tolist())):
            base, made = decoders[b].push(code)
            out[b][0].append(code)
            out[b][1].extend(base)
            new += [(b, word) for word in made]
            if len(out[b][1]) < n_base and (replay is None or step + 1 < len(replay[b])):
                keep.append(i)
        install(new)
        step += 1
        if not keep:
            return out
        if len(keep) < len(alive):
            rest = torch.tensor(keep, device=device)
            idx, alive = idx[rest], [alive[i] for i in keep]
            cache.keep(rest)


def prompt_lookup_steps(ids, start, draft=8, n=2):
    """Forward passes of exact n-gram prompt lookup for ids[start:], if the model agrees with the text: the baseline."""
    at, steps, ids = start, 0, list(ids)
    seen, filled = {}, n
    while at < len(ids):
        for j in range(filled, at):  # n-grams that end before the current one: where they went on
            seen[tuple(ids[j - n : j])] = j
        filled = max(filled, at)
        guess = seen.get(tuple(ids[at - n : at]))
        right = 0
        while guess is not None and right < draft and at + right < len(ids) and guess + right < at:
            if ids[guess + right] != ids[at + right]:
                break
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
        self.tail, self.head, self.verbs, self.nouns, rest, self.digits = [np.arange(*r) for r in zip(ends, ends[1:])]
        self.word = {self.text[i].strip() or "\n": int(i) for i in rest}
        self.n_vocab, self.eos, self.length, self.seed = int(ends[-1]), 0, args.block_size, seed
        self.bytes = np.array([0] + [len(t) for t in self.text[1:]])

    def document(self, rng):
        """Ids of one document, at least a window, opened by the end of the one before."""
        w, names = self.word, []
        for _ in range(6):
            names.append([rng.choice(self.head), *rng.choice(self.tail, rng.integers(1, 4))])
        weights = 1 / np.arange(1, 7)
        liked, out = rng.permutation(4)[:2], [self.eos]
        while len(out) <= self.length:
            a, b = (names[i] for i in rng.choice(6, 2, p=weights / weights.sum()))
            v, n, kind = rng.choice(self.verbs), rng.choice(self.nouns), rng.random()
            form = rng.choice(liked) if rng.random() < 0.7 else rng.integers(4)
            sentence = [
                [*a, v, *b], [*a, w["is"], w["near"], w["the"], n, w["of"], *b],
                [w["the"], n, w["of"], *a, w["and"], *b], [*a, v, w["the"], n, w["with"], *b],
            ][form]  # fmt: skip
            if kind < 0.15:
                number = rng.choice(self.digits, 8)
                sentence = [w["number"], *number, w["again"], *number]
            out += [*sentence, w["."]] + ([w["\n"]] if rng.random() < 0.2 else [])
        return np.array(out[: self.length + 1])

    def windows(self, split, step, n):
        """n windows (n, length + 1): documents of this step, or of the held-out ones."""
        rng = np.random.default_rng([self.seed, split == "heldout", step])
        return np.stack([self.document(rng) for _ in range(n)])

    def n_bytes(self, ids):
        return int(self.bytes[np.asarray(ids)].sum())

    def names(self, ids):
        """The names in a list of ids, tuples, except the first and last run, which may be cut."""
        runs, head, tail = [], set(self.head), set(self.tail)
        for a in ids:
            if a in head:
                runs.append([a])
            elif a in tail and runs and runs[-1]:
                runs[-1].append(a)
            else:
                runs.append([])
        return [tuple(r) for r in runs[1:-1] if r]


class Text:
    """Windows of a real text in a real model's ids."""

    def __init__(self, args, tok, seed):
        local = args.dataset == "stdlib" or args.dataset.startswith("file:")
        limit = None if local else args.steps * args.batch_size * (args.block_size + 1)
        folder = Path(args.out) / "tokens"
        read = lambda split, most: data.token_file(args.dataset, split, tok, folder, most)
        self.tokens = {"train": read("train", limit), "heldout": read("heldout", limit and 2**20)}
        self.tok, self.eos, self.length, self.seed = tok, tok.eos, args.block_size, seed
        self.digits = np.array(digit_ids(tok))
        for part in self.tokens.values():
            data.windows(part, np.random.default_rng(0), 1, self.length + 1)

    def windows(self, split, step, n):
        rng = np.random.default_rng([self.seed, split == "heldout", step])
        return data.windows(self.tokens[split], rng, n, self.length + 1)

    def n_bytes(self, ids):
        return len(self.tok.decode(list(map(int, ids))).encode())


# ------------------------------------------------------------------------------------------------------------ training


def settings(args, arm):
    """(flags, M, protects digits) of an arm."""
    changed = {"avg": {"encoder": "avg"}, "zeroshot": {"encoder": "avg"}, "attn": {"encoder": "attn"}}.get(arm, {})
    flags = type(args)(**(vars(args) | changed))
    return flags, {"cont": 1, "m2": 2, "m4": 4}.get(arm, args.max_len), arm == "digits" or bool(args.model)


def build(args, gpt, world, arm):
    """The model of an arm around a base GPT, LoRA in place."""
    flags, M, protect = settings(args, arm)
    disabled = [world.eos, *(world.digits.tolist() if protect else ())]
    lzw = LZW(gpt.config.vocab_size, args.max_codes, M, disabled, args.kwkwk)
    torch.manual_seed(world.seed)
    gpt = add_lora(gpt, args.lora_r, 2 * args.lora_r)  # drawn first: the same in all arms
    return Zip(gpt, lzw, flags, arm).to(gpt.wte.weight.device)


def base_model(args, env, world, log):
    """The toy's base model, trained on plain ids (once a seed), or the real one."""
    if args.model:
        return load_real(args.model)[0].to(env.device)
    torch.manual_seed(world.seed)
    config = GPTConfig(world.n_vocab, 2 * args.block_size, args.n_layer, args.n_head, args.n_embd, norm="rms", tie=True)
    config.smear_keys = True
    gpt, flags = GPT(config), type(args)(**(vars(args) | {"steps": args.pretrain_steps, "lr": 4e-3}))

    def batch(step):
        x = torch.from_numpy(world.windows("train", step, args.batch_size))
        return {"idx": x[:, :-1], "targets": x[:, 1:]}

    common.train(gpt, batch, flags, env, log)
    return gpt


def train_arm(args, gpt, env, world, arm, log):
    """Uptrains one arm from the base model; every arm sees the same windows. Returns the model."""
    model = build(args, gpt, world, arm)
    if args.resume and log.path.with_suffix(".pt").exists():
        with common.bad_input():
            model.same_codes(common.load_checkpoint(log.path.with_suffix(".pt"))["model"]["_extra_state"])

    def batch(step):
        return pack(
            model.lzw, world.windows("train", 10**6 + step, args.batch_size)[env.rank :: env.world], arm == "canon"
        )

    def evaluate(step):
        return {"bpb": bits_per_byte(model, world, max(2, args.samples // 4), env)["bpb"]}

    common.train(model, batch, args, env, log, evaluate)
    return model.eval()


# ------------------------------------------------------------------------------------------------------------ measures


@torch.no_grad()
def bits_per_byte(model, world, n, env, shuffle=False):
    """Held-out windows, every byte scored, only rows that exist: bits per byte, ids per base id, nats by kind."""
    windows, V = world.windows("heldout", 0, n), model.config.vocab_size
    nll, kinds, codes, made, used = [], [], 0, 0, 0
    for part in np.array_split(windows, max(1, n // 8)):
        batch = {k: v.to(env.device) for k, v in pack(model.lzw, part, model.arm == "canon").items()}
        with env.autocast():
            vin, vout = model.encode_all(batch["rows"], shuffle)
            h = model.hidden(batch["idx"], vin)
            for b in range(len(part)):
                scores = model.logits(h[b], vout[b], batch["count"][b])
                if "banned" in batch:
                    scores = scores.masked_fill(batch["banned"][b], -torch.inf)
                real = batch["targets"][b] >= 0
                nll.append(F.cross_entropy(scores[real], batch["targets"][b][real], reduction="none"))
                kinds.append(batch["targets"][b][real] >= V)
                made, used = (
                    made + int((batch["rows"][b, :, 0] >= 0).sum()),
                    used + len(batch["targets"][b][real][kinds[-1]].unique()),
                )
        codes += int((batch["targets"] >= 0).sum())
    nll, hyper = torch.cat(nll), torch.cat(kinds)
    size, base = sum(world.n_bytes(w[1:]) for w in windows), windows[:, 1:].size
    return {
        "bpb": nll.sum().item() / size / math.log(2), "ratio": codes / base, "ids_per_byte": codes / size,
        "hyper_share": hyper.float().mean().item(), "reuse": used / max(1, made),
        "nats_base": nll[~hyper].mean().item(),
        "nats_hyper": nll[hyper].mean().item() if hyper.any() else 0.0,
    }  # fmt: skip


def measure_generation(model, world, args):
    """Free generation from held-out prompts: are hypertokens used, are names and numbers copied right?"""
    quarter, out = args.block_size // 4, {}
    prompts = [w[: 2 * quarter].tolist() for w in world.windows("heldout", 1, args.samples)]
    for name, temperature in ("sampled", 0.8), ("greedy", 0.0):
        done = generate(model, prompts, quarter, temperature, seed=world.seed)
        codes, base = ([sum((d[i] for d in done), [])][0] for i in (0, 1))
        hyper = [c for c in codes if c >= model.config.vocab_size]
        out |= {f"{name}_hyper_share": len(hyper) / len(codes), f"{name}_ids_per_base": len(codes) / len(base)}
        if isinstance(world, Synth) and name == "sampled":
            pairs = [(n in set(world.names(p))) for p, d in zip(prompts, done) for n in world.names(d[1])]
            out["names_copied"] = float(np.mean(pairs)) if pairs else 0.0
    if isinstance(world, Synth):
        rng, w = np.random.default_rng([world.seed, 7]), world.word
        numbers = [rng.choice(world.digits, 8).tolist() for _ in prompts]
        asked = [p[: 2 * quarter - 12] + [w["."], w["number"], *n, w["again"]] for p, n in zip(prompts, numbers)]
        done = generate(model, asked, 8)
        out["digits_copied"] = float(np.mean([a == b for d, n in zip(done, numbers) for a, b in zip(d[1], n)]))
        out["numbers_copied"] = float(np.mean([d[1][:8] == n for d, n in zip(done, numbers)]))
    return out


def time_per_byte(args, world, env, rounds=5):
    """Replay of held-out text through cached decoding of a larger random model: seconds a byte, base and zip in turns.

    Each turn starts with an empty row cache, and includes the tokenizer and the rows. `random ids` is the control: a
    text in which nothing repeats. Time does not depend on the weights.
    """
    V, half = 4096, args.block_size // 2
    config = GPTConfig(V, 2 * args.block_size, args.timing_layers, 8, args.timing_embd, norm="rms", tie=True)
    plain, zipped = (build(args, GPT(config), world, arm).to(env.device).eval() for arm in ("cont", "zip"))
    texts = {
        "text": world.windows("heldout", 2, 1)[0] % V,
        "random ids": np.random.default_rng(0).integers(1, V, 2 * half + 1),
    }
    out = {}
    for name, ids in texts.items():
        times, prompt, rest = {"base": [], "zip": []}, ids[:half].tolist(), ids[half:].tolist()
        codes = zipped.lzw.encode(rest)
        for _ in range(rounds):
            for arm, model, fed in ("base", plain, rest), ("zip", zipped, codes):
                began = time.perf_counter()
                generate(model, [prompt], len(rest), replay=[fed])
                times[arm].append((time.perf_counter() - began) / len(rest))
        out[name] = statistics.median(z / b for z, b in zip(times["zip"], times["base"]))
        out[f"{name}, ids per base id"] = len(codes) / len(rest)
        out[f"{name}, prompt lookup steps per base id"] = prompt_lookup_steps(ids.tolist(), half) / len(rest)
    return out


@torch.no_grad()
def oracle(gpt, lzw, world, n, env):
    """Bits per byte of the base model and of its transported model on the same windows, ended by an end of text."""
    sums, size = {"base": 0.0, "oracle": 0.0}, 0
    for w in world.windows("heldout", 0, n):
        ids = [*w[:-1].tolist(), world.eos]
        logp = gpt(torch.tensor([ids[:-1]], device=env.device))[0].double().log_softmax(-1).cpu()
        sums["base"] -= logp[torch.arange(len(ids) - 1), ids[1:]].sum().item()
        sums["oracle"] += transported(lzw, logp, ids).sum().item()
        size += world.n_bytes(ids[1:])
    return {k: v / size / math.log(2) for k, v in sums.items()}


def run_seed(args, seed, env=None):
    """One seed: the base model, every arm, every measure: ({arm: measures}, the logs)."""
    env, out = env or common.setup(args), Path(args.out)
    world = make_world(args, seed)
    log = common.Log(out, f"base-s{seed}", env)
    base, logs, found = base_model(args, env, world, log), [log], {}
    fresh = lambda: copy.deepcopy(base)  # LoRA is put in place
    zeroshot = build(args, fresh(), world, "zeroshot").eval()
    if not args.model:
        found["base"] = bits_per_byte(build(args, fresh(), world, "cont"), world, args.samples, env)
        found["base"] |= {"oracle": oracle(base.float().eval(), zeroshot.lzw, world, min(4, args.samples), env)}
    found["zeroshot"] = bits_per_byte(zeroshot, world, args.samples, env)
    if args.model and args.minutes:
        args = budget(args, fresh(), env, world)
    for arm in args.arms:
        logs.append(common.Log(out, f"{arm}-s{seed}", env))
        model = train_arm(args, fresh(), env, world, arm, logs[-1])
        found[arm] = bits_per_byte(model, world, args.samples, env)
        with env.autocast():
            found[arm] |= measure_generation(model, world, args)
        if arm == "zip":
            found["shuffle"] = bits_per_byte(model, world, args.samples, env, shuffle=True)
        if arm == "ae":
            rows = torch.unique(pack(model.lzw, world.windows("heldout", 0, 8))["rows"].flatten(0, 1), dim=0)[1:].to(
                env.device
            )
            with torch.no_grad():
                found[arm]["rows_recovered"] = model.decoder.exact(model.encode(rows)[0], rows, model.gpt.wte.weight)
        print(f"{arm}-s{seed}: " + ", ".join(f"{k} {v:.3f}" for k, v in found[arm].items()), flush=True)
    if isinstance(world, Synth):
        found["time"] = time_per_byte(args, world, env)
        mixed = [np.random.default_rng(i).permutation(w).tolist() for i, w in enumerate(world.windows("heldout", 0, 8))]
        found["time"]["ratio, words in random order"] = np.mean([len(zeroshot.lzw.encode(w)) / len(w) for w in mixed])
    return found, logs


def budget(args, gpt, env, world):
    """--minutes as steps: times three steps of zip, and leaves a fifth of the time to the measures."""
    flags = type(args)(**(vars(args) | {"steps": 4, "eval_every": 10**9, "save_every": 10**9, "resume": False}))
    log = common.Log(args.out, "timing", env)
    train_arm(flags, gpt, env, world, "zip", log)
    seconds = common.read_jsonl(log.path)[-1]["seconds"] / 4
    steps = max(4, int(0.7 * 60 * args.minutes / len(args.arms) / seconds))
    print(f"{seconds:.1f} s a step: {steps} steps an arm in {args.minutes:g} minutes")
    return type(args)(
        **(vars(args) | {"steps": steps, "warmup": min(args.warmup, steps // 10), "eval_every": max(1, steps // 4)})
    )


# --------------------------------------------------------------------------------------------------------- the verdict
# fmt: off


def judge(run, results):
    """The claims, medians over seeds, each beside the controls that must fail the same criterion."""
    m = lambda arm, key: float(np.median([r[arm][key] for r in results]))
    test = lambda ratio: ratio <= 0.8
    mixed = m("time", "ratio, words in random order") if "time" in results[0] else 1.0
    run.claim("C1", "fewer ids for the same text", "-15 to -40 %", {"ids per base id": m("zip", "ratio")},
              {"ids in random order": mixed}, "<= .8", test(m("zip", "ratio")), not test(mixed))
    cont, arms = m("cont", "bpb"), [a for a in ("zeroshot", "shuffle", "rand") if a in results[0]]
    test = lambda arm: m(arm, "bpb") <= 1.2 * cont
    run.claim("C2", "at little cost: bits per byte against LoRA on plain ids", "1.08 to 1.15 x",
              {"cont": cont, "zip": m("zip", "bpb"), "zip / cont": m("zip", "bpb") / cont},
              {a: m(a, "bpb") for a in arms}, "zip <= 1.2 cont", test("zip"), not any(map(test, arms)))
    if "rand" in results[0]:
        test = lambda arm: m(arm, "bpb") - cont <= 0.5 * min(m("rand", "bpb") - cont, m("shuffle", "bpb") - cont)
        run.claim("C3", "it is the encoder's rows that do it: the excess over cont, against random and shuffled rows",
                  "-",
                  {"zip": m("zip", "bpb") - cont}, {a: m(a, "bpb") - cont for a in arms},
                  "excess <= half that of rand and of shuffle", test("zip"), not any(map(test, arms)))
    def uses(arm):
        share, ids = m(arm, "sampled_hyper_share"), m(arm, "sampled_ids_per_base")
        return share >= 0.1 and ids <= 0.9 and m(arm, "names_copied") >= m("cont", "names_copied") - 0.05
    if "rand" in results[0] and "names_copied" in results[0]["zip"]:
        keys = "sampled_hyper_share", "sampled_ids_per_base", "names_copied"
        show = lambda arm: {f"{arm} {k}": m(arm, k) for k in keys}
        run.claim("C4", "hypertokens are generated, and names copied as well as by cont", "ids .77 to .92 of base ids",
                  show("zip") | {"cont names_copied": m("cont", "names_copied")}, show("rand"),
                  "hyper share >= .1, ids per base id <= .9, names >= cont - .05", uses("zip"), not uses("rand"))
    if "time" in results[0]:
        x, y = m("time", "text"), m("time", "random ids")
        run.claim("C5", "less time per output byte than the base model (replay on a larger random model)",
                  "decode +9 to +47 %",
                  {"zip / base": x}, {"text without repetition": y}, "< 1", x < 1, y >= 1)
        o = [r["base"]["oracle"] for r in results]
        gap = max(abs(r["oracle"] - r["base"]) for r in o)
        zero = abs(m("zeroshot", "bpb") - m("base", "bpb"))
        run.claim("C6", "the transported base model loses nothing (theorem 2.1): difference in bits per byte", "0",
                  {"oracle": gap}, {"zeroshot": zero}, "<= 1e-4", gap <= 1e-4, zero > 1e-4)
    if "digits" in results[0] and "digits_copied" in results[0]["zip"]:
        a, b = m("digits", "digits_copied"), m("zip", "digits_copied")
        test = lambda arm: m(arm, "digits_copied") >= m("cont", "digits_copied") - 0.05
        run.claim("C7", "numbers are copied as well as by cont if digits are never merged",
                  "GSM8K .356 -> .610 (successor)",
                  {"cont": m("cont", "digits_copied"), "protected": a}, {"unprotected": b}, ">= cont - .05",
                  test("digits"), not test("zip"))


# fmt: on


def draw(path, results, logs):
    """Bits per byte against ids per base id; the curves of training; bits and use by arm."""
    mean = lambda arm, key: np.mean([r[arm][key] for r in results])
    arms = [a for a in results[0] if "bpb" in results[0][a]]
    colour = dict(
        zip(arms, ["#999999", "#bbbbbb", "#4477aa", "#ee6677", "#ccbb44", "#aa3377", "#228833", "#66ccee"] * 2)
    )
    with common.figure(path, 1, 3) as (trade, curves, use):
        for arm in arms:
            trade.plot(mean(arm, "ratio"), mean(arm, "bpb"), "o", color=colour[arm])
            trade.annotate(arm, (mean(arm, "ratio"), mean(arm, "bpb")), (5, 4), textcoords="offset points", fontsize=8)
        trade.set(title="Held-out text", xlabel="ids per base id", ylabel="bits per byte")
        trade.margins(0.18, 0.1)
        for log in logs:
            rows, arm = [r for r in common.read_jsonl(log.path) if "bpb" in r], log.run.rsplit("-", 1)[0]
            if rows:
                label = arm if arm not in curves.get_legend_handles_labels()[1] else None
                curves.plot([r["step"] for r in rows], [r["bpb"] for r in rows], color=colour[arm], label=label)
        curves.set(title="Uptraining", xlabel="step", ylabel="bits per byte")
        curves.legend(fontsize=7)
        trained = [a for a in arms if "sampled_hyper_share" in results[0][a]]
        keys = {
            "sampled_hyper_share": "hypertokens, share of ids",
            "names_copied": "names from the prompt",
            "digits_copied": "digits copied",
        }
        keys = {k: v for k, v in keys.items() if k in results[0][trained[0]]}
        for i, arm in enumerate(trained):
            at = np.arange(len(keys)) + 0.8 * i / len(trained)
            use.bar(at, [mean(arm, k) for k in keys], 0.8 / len(trained), color=colour[arm], label=arm, align="edge")
        use.set(title="Generation", xticks=np.arange(len(keys)) + 0.4, ylim=(0, 1.25))
        use.set_xticklabels([v.replace(", ", ",\n").replace(" from", "\nfrom") for v in keys.values()], fontsize=7)
        use.legend(fontsize=7, ncols=4)


# --------------------------------------------------------------------------------------------------------------- main


def make_world(args, seed):
    return Text(args, load_real(args.model)[1], seed) if args.model else Synth(args, seed)


@functools.cache
def load_real(name):
    """(GPT in bf16, tokenizer) of a real model, once a process."""
    import pretrained

    return pretrained.load(name, "cpu", "bf16")


def check(args, env):
    """Bad flags end here; checkpoints to resume must be of the same codes."""
    args.arms = list(ARMS) if args.arms == ["all"] else args.arms
    if odd := [a for a in args.arms if a not in ARMS]:
        raise ValueError(f"--arms {odd[0]}, allowed: all, {' '.join(ARMS)}")
    if not {"cont", "zip"} <= set(args.arms):
        raise ValueError(f"--arms {' '.join(args.arms)} lacks cont or zip, which the others are compared with")
    if args.enc_dim % args.enc_heads:
        raise ValueError(f"--enc-dim {args.enc_dim} is not a multiple of --enc-heads {args.enc_heads}")
    if args.batch_size % env.world:
        raise ValueError(f"--batch-size {args.batch_size} is not a multiple of the {env.world} processes")
    if args.lora_r < 1 or args.block_size < 32:
        raise ValueError(f"--lora-r {args.lora_r} and --block-size {args.block_size}, allowed: from 1, from 32")
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
        world = make_world(args, args.seeds[0])
    del world
    jobs = args.jobs if env.device.type == "cpu" and env.world == 1 else 1
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
