"""In-context learning without copying (arXiv 2511.05743): train a GPT that never gains from repeating its context.

Induction heads find an earlier occurrence of the current token and predict what followed it there. Are they what
in-context learning is made of? The paper leaves out of the loss every target that such a head could get right: target t
is masked iff its bigram (x[t-1], x[t]) occurred before in the same window. Everything else is ordinary training.
What it found on a 1B model: copying collapses, heads stop matching prefixes, and yet tasks whose answer is *not* in the
context are learnt from examples as well as before, or better; only tasks with few labels suffer: there it is a copy.

The toy: arms see the same windows from the same initial weights, and differ in the loss mask alone.
  none     vanilla                                       any     Hapax, the paper's rule
  random   as many targets masked, but at random         latest  only what the *most recent* match predicts (by --arms)
                                                         offset  every target after a repeated token
Windows: text (CPython's sources), an *abstractive* task (fixed maps of symbols, distinct answers), a *few-label* task
(the same symbols, four labels), an *extractive* one (name-value pairs drawn anew for every window). The toy can't show
that abstract rules survive: its maps are recognised from one example, then recalled.

Tags: [S] the paper's site, [I] inferred here, [R] code of the work it builds on; "pilot": our runs on seeds 100 and up.
Read on: `repeated` (the method) -> `World` (the data) -> `train_arm` -> the measures -> `judge` (claims and controls).
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
import torch.nn.functional as F

import legacy as common
import data
from legacy import wilson
from model import GPT, GPTConfig

RULES = "none", "any", "latest", "offset", "repeat", "random", "thresholded"


@dataclass
class Args(common.TrainFlags):
    """Hapax"""

    presets: ClassVar[dict] = {
        "smoke": dict(steps=12, n_embd=32, eval_every=6, save_every=5, samples=24, warmup=2, jobs=1, threads=1),
        "toy": dict(steps=1200, lr=4e-3),
        "70m": dict(n_layer=6, n_head=8, n_embd=512, lr=1e-3, steps=3000, batch_size=512),
        "160m": dict(n_layer=12, n_head=12, n_embd=768, lr=6e-4, steps=3000, batch_size=512),
        "paper": dict(n_layer=16, n_head=8, n_embd=2048, lr=2.5e-4, steps=20000, warmup=1430, decay_steps=143000),
    }
    limits: ClassVar[dict] = {"samples": (4,), "block_size": (65,), "n_layer": (1,), "n_head": (1,), "n_embd": (1,)}
    arms: list[str] = field(default_factory=lambda: ["none", "any", "random", "offset"])
    """loss masks to train with: none any latest offset repeat random thresholded"""
    dataset: str = "stdlib"
    """text: stdlib, file:PATH or a `datasets` id (paper: the Pile)"""
    tokenizer: str = "bpe:512"
    """byte, bpe:N, a tiktoken name, a tokenizer.json (paper: EleutherAI/gpt-neox-20b)"""
    show: str = ""
    """colour this text, or `heldout` text, by what the mask leaves out; then stop"""
    mix: list[int] = field(default_factory=lambda: [6, 2, 2, 6])
    """windows of text, abstractive, few-label and extractive data, as parts (paper: text only)"""
    label_noise: float = 0.4
    """share of few-label answers redrawn in training, so that labels can't be memorised"""
    shot_format: Literal["sep", "nosep"] = "sep"
    """`x : y ;` or `x y ;`"""
    min_n: int = 2
    """mask the ends of repeated n-grams, n >= 2 (paper: 2)"""
    tau: float = 0.3
    """thresholded: tokens count as equal at this cosine (paper: .3, inferred)"""
    sim_emb: str = ""
    """thresholded: the checkpoint whose input embedding gives the cosines"""
    equiv: Literal["none", "surface"] = "none"
    """surface: tokens equal but for case and spaces count as equal"""
    doc_attn: bool = False
    """attention, and so the mask, inside documents only (paper: no)"""
    normalize: Literal["kept", "all"] = "kept"
    """divide the loss by the kept targets, or by all"""
    ablate: Literal["mean", "zero"] = "mean"
    """what stands in for an ablated head (paper: unknown)"""
    samples: int = 512
    """prompts or windows in each final measure; a quarter of it during training (paper: 1000)"""
    icl_dir: str = ""
    """folder of JSON lists of {input, output}: 5-shot tasks (paper: 26 + 28 of 2310.15213)"""
    neox: bool = False
    """Pythia's block: attention and MLP in parallel, rotary on a quarter of a head; off: in sequence, smeared keys"""
    n_layer: int = 2
    """blocks (paper: 16)"""
    n_head: int = 4
    """heads (paper: 8)"""
    n_embd: int = 64
    """width (paper: 2048)"""
    block_size: int = 128
    """window in tokens (paper: 2048)"""


for _name in "70m", "160m", "paper":  # what the large presets share: Pythia's recipe
    Args.presets[_name] = (
        dict(dataset="monology/pile-uncopyrighted", tokenizer="EleutherAI/gpt-neox-20b", mix=[1, 0, 0, 0], warmup=30)
        | dict(block_size=2048, batch_size=1024, micro_batch=8, samples=1000, save_every=500, neox=True)
        | Args.presets[_name]
    )

# -------------------------------------------------------------------------------------------------------- the method


def lib(a):
    """The library of an array: NumPy on the CPU (its sort is SIMD), torch elsewhere; both have what is used here."""
    return np if isinstance(a, np.ndarray) else torch


def runs(ids):
    """Sorts each row of `ids` (B, T) by value, equal values by position: copies come to stand side by side.

    Returns `order` (B, T), the places in the flattened array that the sorted entries came from, and `again` (B, T),
    True where an entry has the value of the one before it. The key (value, place) is unique, so sorting the keys alone
    is enough: no argsort, no stability.
    """
    n, xp = math.prod(ids.shape), lib(ids)
    bits, place = n.bit_length(), np.arange(n) if xp is np else torch.arange(n, device=ids.device)
    key = ids << bits
    key |= place.reshape(ids.shape)
    key = np.sort(key, axis=1) if xp is np else key.sort(1).values
    value = key >> bits
    again = xp.concatenate((xp.zeros_like(value[:, :1], dtype=bool), value[:, 1:] == value[:, :-1]), 1)
    key &= (1 << bits) - 1
    return key, again


def scatter(order, values):
    """Puts values in sorted order (B, T) back at their places."""
    out = lib(values).empty_like(values)
    out.reshape(-1)[order] = values
    return out


def seen(ids):
    """True where the same id stands earlier in the row."""
    return scatter(*runs(ids))


def rank(ids):
    """Ids renumbered 0, 1, ... in each row: equal where they were equal, and below T."""
    order, again = runs(ids)
    return scatter(order, (~again).cumsum(1) - 1)


def repeated(x, rule="any", vocab_size=2**18, min_n=2, docs=None):
    """Which targets an induction head could get right: the mask of Hapax.

    x     (B, T+1) int64 token ids below vocab_size, a window with its last target; NumPy or torch, on any device
    docs  (B, T+1) non-decreasing document numbers, if attention stays inside documents: then a copy must, too
    Returns bool (B, T), True at masked targets x[:, 1:]. O(B T log T) time, O(B T) memory. Rules [S: any; others I]:
      any     the bigram (x[t-1], x[t]) occurred earlier in the window (the n-gram ending at t, for min_n = n)
      latest  the most recent earlier x[t-1] was followed by x[t]: what a single sharp head predicts
      offset  x[t-1] occurred earlier, whatever followed: the incentive against copying goes, too
      repeat  x[t] occurred earlier
    """
    if x.ndim != 2 or x.shape[1] < 2:
        raise ValueError(f"windows have shape {tuple(x.shape)}, needed: (B, T+1) with T >= 1")
    if "int" not in str(x.dtype):
        raise ValueError(f"tokens are {x.dtype}, needed: integers")
    if min_n < 2:
        raise ValueError(f"--min-n {min_n}, allowed: 2 and up")
    if rule not in ("any", "latest", "offset", "repeat"):
        raise ValueError(f"mask rule {rule!r}, allowed: any, latest, offset, repeat")
    if lib(x) is torch and x.device.type == "cpu":
        return torch.from_numpy(repeated(x.numpy(), rule, vocab_size, min_n, None if docs is None else docs.numpy()))
    if lib(x) is np and not (0 <= x.min() and x.max() < vocab_size):  # on a GPU a look at the values would stall it
        raise ValueError(f"token ids from {x.min()} to {x.max()}, allowed: 0 to {vocab_size - 1}")
    return copies(x, rule, vocab_size, min_n, docs)


def copies(x, rule, vocab_size, min_n, docs):
    """`repeated` without its checks, on the device of x."""
    length = x.shape[1]
    if docs is not None:
        x, vocab_size = rank(docs * vocab_size + x), length  # the same token in another document is another token
    elif vocab_size**2 << math.prod(x.shape).bit_length() >= 2**63:
        x, vocab_size = rank(x), length
    if rule == "any":
        gram = x  # an id for the (n-1)-gram that ends at each position
        for n in range(2, min_n + 1):
            gram = (rank(gram) if n > 2 else gram)[:, :-1] * vocab_size + x[:, n - 1 :]
        mask = lib(x).concatenate((lib(x).zeros_like(x[:, : min_n - 2], dtype=bool), seen(gram)), 1)
    elif rule == "latest":
        order, again = runs(x)
        before = scatter(order, lib(x).where(again, lib(x).roll(order, 1, 1), -1))[:, :-1]  # of x[t-1]; -1: none
        mask = (before >= 0) & (x.reshape(-1)[before + 1] == x[:, 1:])
    else:
        mask = seen(x)[:, :-1] if rule == "offset" else seen(x)[:, 1:]
    return mask if docs is None else mask & (docs[:, 1:] == docs[:, :-1])


def thresholded(x, embedding, tau):
    """Thresholded-Hapax [S; the similarity: I]: `any` with cosine >= tau of embedding rows in place of equality.

    x (B, T+1) int64 tensor, embedding (V, C). Returns bool (B, T). Near-equality is not transitive, so there is nothing
    to sort: 2 T^2 C FLOP for a row.
    """
    if not -1 <= tau <= 1:
        raise ValueError(f"--tau {tau}, allowed: -1 to 1")

    def row(x):
        unit = F.normalize(embedding[x].float(), dim=1)
        same = unit @ unit.T >= tau - 1e-6
        return (same[:-1, :-1] & same[1:, 1:]).tril(-1).any(1)

    return torch.stack([row(r) for r in x])


def step_mask(rule, x, world, args, key):
    """The loss mask of an arm: bool tensor (B, T) for windows x (B, T+1); `key` (seed, step) draws the random one."""
    if rule == "none":
        return torch.zeros_like(x[:, 1:], dtype=torch.bool)
    if rule == "thresholded":
        return thresholded(x.to(world.embedding.device), world.embedding, args.tau).cpu()
    docs = (x == world.eos).cumsum(1) if args.doc_attn else None  # an end-of-text token opens its document
    x = x if world.classes is None else world.classes[x]
    mask = repeated(x, "any" if rule == "random" else rule, world.n_vocab, args.min_n, docs)
    if rule == "random":  # the control: as many targets, anywhere
        draw = np.random.default_rng([*key, 1]).random(mask.shape)
        mask = torch.from_numpy(draw < mask.float().mean().item())
    return mask


# --------------------------------------------------------------------------------------------------------- the world

TASKS, INPUTS, LABELS, OWN, PAIRS = 6, 44, 4, 48, 8


@dataclass
class World:
    """What all arms see: text, and the symbols and fixed maps of the toy tasks (drawn from the seed)."""

    train: np.ndarray
    heldout: np.ndarray
    n_text: int  # ids of the tokenizer
    eos: int
    sep: bool  # `x : y ;` or `x y ;`
    seed: int = 0
    classes: torch.Tensor | None = None  # --equiv: token id -> class id
    embedding: torch.Tensor | None = None  # --sim-emb
    icl: dict | None = None  # --icl-dir: (task, condition) -> prompts, first answer tokens

    def __post_init__(self):
        self.bos, self.colon, self.end = range(self.n_text, self.n_text + 3)
        sizes = {"inputs": INPUTS, "outputs": TASKS * INPUTS, "labels": 2 * LABELS, "own": OWN}
        ends = np.cumsum([self.n_text + 3, *sizes.values()])
        ranges = [np.arange(a, b) for a, b in zip(ends, ends[1:])]
        self.inputs, outputs, labels, self.own = ranges
        self.n_vocab = int(-(-ends[-1] // 64) * 64)
        rng = np.random.default_rng([self.seed, 2])
        self.maps = np.stack([rng.permutation(o) for o in outputs.reshape(TASKS, INPUTS)])  # task, input -> output
        self.labels = np.stack([rng.permutation(np.resize(l, INPUTS)) for l in labels.reshape(2, LABELS)])
        text = np.setdiff1d(np.arange(self.n_text), [self.eos])
        self.alphabets = {"mix": np.concatenate((text, self.own)), "text": text, "own": self.own, "inputs": self.inputs}
        self.step = 4 if self.sep else 3  # tokens of a shot

    def write(self, x, y):
        """Shots (n, k) of inputs and answers as tokens: BOS, then `x : y ;` or `x y ;` k times."""
        fill = lambda token: np.full_like(x, token)
        parts = [x, fill(self.colon), y, fill(self.end)] if self.sep else [x, y, fill(self.end)]
        return np.concatenate((fill(self.bos)[:, :1], np.stack(parts, 2).reshape(len(x), -1)), 1)

    def abstractive(self, rng, n, mixed=False):
        """One map a window (mixed: one a shot, so that examples tell nothing), each input once: windows of 44 shots."""
        picks = rng.random((n, INPUTS)).argsort(1)
        tasks = rng.integers(TASKS, size=(n, INPUTS if mixed else 1))
        return self.write(self.inputs[picks], self.maps[tasks, picks])

    def few_label(self, rng, n, noise):
        """One of two maps to four labels; a share `noise` of the answers is redrawn from the four."""
        picks, tasks = rng.random((n, INPUTS)).argsort(1), rng.integers(2, size=(n, 1))
        redrawn = self.labels[tasks, rng.integers(INPUTS, size=picks.shape)]
        return self.write(
            self.inputs[picks], np.where(rng.random(picks.shape) < noise, redrawn, self.labels[tasks, picks])
        )

    def query(self, rng, n, shots, overlap):
        """Few-label prompts of `shots` examples and a query; its label is among theirs, or in none. Prompts, labels."""
        rows, answers = [], []
        while len(rows) < n:
            labels, picks = self.labels[rng.integers(2)], rng.permutation(INPUTS)
            same = labels[picks] == labels[picks[0]]  # the query comes first here, last in the prompt
            if not overlap:
                picks = np.concatenate((picks[:1], picks[~same]))
            elif not same[1 : shots + 1].any():
                continue
            picks = picks[shots::-1]
            rows.append(self.write(self.inputs[picks][None], labels[picks][None])[0, : 1 + self.step * (shots + 1) - 2])
            answers.append(labels[picks[-1]])
        return np.stack(rows), np.array(answers)

    def extractive(self, rng, n, length):
        """3 to 8 name-value pairs a window, any text or own tokens, shown again and again: `x v ;`."""
        symbols, k = self.alphabets["mix"], -(-length // 3)
        pick = np.stack([rng.choice(symbols, 2 * PAIRS, replace=False).reshape(PAIRS, 2) for _ in range(n)])
        which = (rng.random((n, k)) * rng.integers(3, PAIRS + 1, size=(n, 1))).astype(int)
        shots = pick[np.arange(n)[:, None], which]  # (n, k, 2)
        return np.concatenate((shots, np.full((n, k, 1), self.end)), 2).reshape(n, -1)[:, :length]

    def batch(self, step, n, length, args):
        """`n` windows of `length` tokens for one step, int64 (n, length): the same for every arm."""
        rng = np.random.default_rng([self.seed, step])
        edges = np.cumsum(args.mix) / sum(args.mix)
        counts = np.bincount(np.searchsorted(edges, (np.arange(n) + 0.5) / n), minlength=4)
        make = (
            lambda m: data.windows(self.train, rng, m, length),
            lambda m: self.abstractive(rng, m)[:, :length],
            lambda m: self.few_label(rng, m, args.label_noise)[:, :length],
            lambda m: self.extractive(rng, m, length),
        )
        return torch.from_numpy(np.concatenate([f(m) for f, m in zip(make, counts) if m]))


def config_of(args, world):
    """The toy's model, or Pythia's block with its initialisation."""
    neox = dict(parallel="two_norms", rotary_pct=0.25, proj_std=2 / (args.n_layer * args.n_embd**0.5))
    wiring = neox if args.neox else dict(smear_keys=True)
    return GPTConfig(world.n_vocab, args.block_size, args.n_layer, args.n_head, args.n_embd, **wiring)


def train_arm(args, world, arm, position=0):
    """Trains one arm; returns its final measures."""
    env = common.setup(args)
    if world.embedding is not None:
        world.embedding = world.embedding.to(env.device)
    torch.manual_seed(world.seed)  # the same initial weights for every arm
    model = GPT(config_of(args, world))

    def batch(step):
        x = world.batch(step, args.batch_size, args.block_size + 1, args)
        mask = step_mask(arm, x, world, args, (world.seed, step))
        rows = slice(env.rank, None, env.world)
        part = {"idx": x[rows, :-1], "targets": x[rows, 1:], "weights": (~mask[rows]).float()}
        if args.doc_attn:
            part["docs"] = (part["idx"] == world.eos).cumsum(1)
        if args.normalize == "all":
            part["denom"] = mask.numel()
        return part

    def evaluate(step):
        with env.autocast(), model.eager():
            return measure(model, world, args, max(8, args.samples // 4))

    log = common.Log(args.out, f"{arm}-s{world.seed}", env)
    common.train(model, batch, args, env, log, evaluate, position)
    with env.autocast(), model.eager():
        result = measure(model, world, args, args.samples, final=True)
        if arm == "none":
            result |= transplant(model, world, args)
    shares = [step_mask(arm, world.batch(s, args.batch_size, args.block_size + 1, args), world, args, (world.seed, s))
              for s in range(20)]  # fmt: skip
    return result | {"share": torch.cat(shares).float().mean().item()}


# ------------------------------------------------------------------------------------------------------ the measures


@torch.no_grad()
def logits_at(model, x, columns, read=lambda logits: logits):
    """Logits (n, k, V) of windows x (n, T) at the given columns, or what is read of them, a few windows at a time."""
    x, size = torch.as_tensor(x).to(model.wte.weight.device), max(1, 2**14 // x.shape[1])
    return torch.cat([read(model.unembed(model.hidden(part)[:, columns]).float()) for part in x.split(size)])


def repetition(model, x, ordinary):
    """Accuracy on repeated random sequences x = r r (n, 2s): of the last token; of the second half without its first.

    The guess is the likeliest of the `ordinary` tokens: not the toy's separators, which follow nearly anything.
    """
    s = x.shape[1] // 2
    likeliest = lambda logits: logits[..., ordinary].argmax(-1)
    guess = ordinary[logits_at(model, x[:, :-1], slice(s, None), likeliest).cpu()]
    right = guess == x[:, s + 1 :]
    return right[:, -1].mean(), right.mean()


def repeats(alphabet, n, s, rng):
    """n sequences of s distinct tokens, each said twice: (n, 2s)."""
    half = np.stack([rng.choice(alphabet, s, replace=False) for _ in range(n)])
    return np.concatenate((half, half), 1)


def prefix_matching(pattern):
    """Mean attention (H,) from each token of the second half of r r to the token after its first occurrence.

    pattern (B, H, 2s, 2s). Returns it beside the mean attention to the previous token, over all queries.
    """
    s = pattern.shape[-1] // 2
    q, every = torch.arange(s, 2 * s), torch.arange(1, 2 * s)
    return pattern[:, :, q, q - s + 1].mean((0, 2)), pattern[:, :, every, every - 1].mean((0, 2))


@torch.no_grad()
def head_scores(model, x, patch=None):
    """Prefix-matching and previous-token scores (L, H) on x = r r; `patch` as for `model.patch`."""
    sites = [f"blocks.{i}.attn.pattern" for i in range(model.config.n_layer)]
    with model.patch(patch or {}):
        patterns = model.capture(torch.as_tensor(x).to(model.wte.weight.device), sites)
    scores = [prefix_matching(patterns[site].float()) for site in sites]
    return np.stack([[s.cpu().numpy() for s in pair] for pair in scores], 1)  # (2, L, H)


@torch.no_grad()
def head_effects(model, x, ablate, alphabet, rng):
    """What each head adds to the probability of copies in x = r r: intact - ablated, (L, H); negative: it hurts.

    `mean` puts a head's mean output over random tokens in its place [R: 2502.14010], `zero` nothing.
    """
    c, s, device = model.config, x.shape[1] // 2, model.wte.weight.device
    sites = [f"blocks.{i}.attn.z" for i in range(c.n_layer)]
    stream = torch.from_numpy(rng.choice(alphabet, x.shape)).to(device)
    means = {site: z.mean((0, 1)) for site, z in model.capture(stream, sites).items()}
    parts = torch.as_tensor(x).to(device).split(max(1, 2**14 // x.shape[1]))
    p = lambda x: logits_at(model, x[:, :-1], slice(s, None)).softmax(-1).gather(2, x[:, s + 1 :, None])
    copied = lambda: torch.cat([p(part) for part in parts]).mean().item()

    def ablated(site, h):
        stand_in = means[site][h] if ablate == "mean" else 0.0

        def put(z):
            z = z.clone()
            z[:, :, h] = stand_in
            return z

        with model.patch({site: put}):
            return copied()

    intact = copied()
    return np.array([[intact - ablated(site, h) for h in range(c.n_head)] for site in sites])


@torch.no_grad()
def renormalised(logits, x):
    """The loss vanilla would have at kept targets if it, too, knew that earlier continuations are not the answer.

    At a kept target all earlier continuations C of x[t-1] are wrong by construction, and Hapax is trained to know it:
    so compare it with -log(p(x[t]) / (1 - p(C))). logits (B, T, V), x (B, T+1); returns (B, T), void at masked targets.
    """
    p, mask = logits.softmax(-1), repeated(x.cpu()).to(x.device)
    before, after = x[:, :-1], x[:, 1:]
    follows = before[:, None, :] == before[:, :, None]  # (B, t, i): x[i-1] = x[t-1]
    follows = (follows & ~mask[:, None, :]).tril(-1)  # i < t, and each continuation once
    taken = (p.gather(2, after[:, None, :].expand(-1, len(after[0]), -1)) * follows).sum(2)  # p(C)
    return -torch.log(p.gather(2, after[..., None])[..., 0] / (1 - taken).clamp(min=1e-6))


def token_loss_difference(early, late, count=None):
    """Mean loss at the early minus that at the late positions (n, k), over the pairs where `count` holds in both."""
    both = np.ones(early.shape, bool) if count is None else count[0] & count[1]
    return (early[both] - late[both]).mean() if both.any() else np.nan


@torch.no_grad()
def text_measures(model, world, args, n, final):
    """Loss on held-out text, split by the mask, and what context is worth there."""
    T, device = args.block_size, model.wte.weight.device
    x = data.windows(world.heldout, np.random.default_rng([world.seed, 3]), n, T + 1)
    masked, x = repeated(x, "any", world.n_vocab), torch.from_numpy(x).to(device)
    size = max(1, 2**14 // T)
    loss = torch.cat([model.token_loss(p[:, :-1], p[:, 1:]) for p in x.split(size)]).cpu().numpy()
    out = {"loss_kept": loss[~masked].mean(), "loss_masked": loss[masked].mean(), "loss_all": loss.mean()}
    at, width = ((50, 500), 4) if T > 504 else ((T * 12 // 128, T * 120 // 128), 4)
    early, late = (slice(a - width, a + width + 1) for a in at)
    count = ~masked[:, early], ~masked[:, late]
    out["tld"] = token_loss_difference(loss[:, early], loss[:, late])
    out["tld_new"] = token_loss_difference(loss[:, early], loss[:, late], count)
    if final:
        cut = x[:, at[1] - at[0] :]  # the late targets again, with the short context of the early ones
        short = torch.cat([model.token_loss(p[:, :-1], p[:, 1:]) for p in cut.split(size)]).cpu().numpy()
        out["tld_new_short"] = token_loss_difference(loss[:, early], short[:, early], count)
        again = torch.cat([renormalised(logits_at(model, p[:, :-1], slice(None)), p) for p in x.split(size)])
        out["loss_kept_renormalised"] = again.cpu().numpy()[~masked].mean()
    return out


@torch.no_grad()
def measure(model, world, args, n, final=False):
    """All measures of a model: cheap ones during training, `final` adds the rest. The same prompts for every arm."""
    rng = lambda i: np.random.default_rng([world.seed, 4, i])
    s = min(50, args.block_size * 3 // 16)  # 24 for the toy
    x = repeats(world.alphabets["mix"], n, s, rng(0))
    out = dict(zip(("copy", "copy_half"), repetition(model, x, world.alphabets["mix"])))
    out |= text_measures(model, world, args, n, final)
    prefix, previous = head_scores(model, x[: max(8, n // 4)])
    out |= {"prefix": prefix.ravel().tolist(), "previous": previous.ravel().tolist()}
    top = np.sort(prefix.ravel())[::-1]
    out |= {"prefix_max": top[0], "prefix_top": top[: max(2, len(top) // 13)].mean()}  # 2 of 8; the paper's 10 of 128
    if args.mix[1]:
        length = min(args.block_size, 1 + world.step * INPUTS)
        curve = lambda x: shot_curve(model, x[:, :length], world.step)
        shots = curve(world.abstractive(rng(1), n))
        out |= {"zero_shot": shots[0], "abstractive": shots[5:].mean()}
        if final:
            out |= {"shots": shots.tolist(), "mixed": curve(world.abstractive(rng(2), n, mixed=True))[5:].mean()}
    if args.mix[2]:
        for name, overlap in ("overlap", True), ("no_overlap", False):
            x5, answers = world.query(rng(3), n, 5, overlap)
            guess = logits_at(model, x5, [-1], lambda logits: logits.argmax(-1))[:, 0]
            out[f"label_{name}"] = (guess.cpu().numpy() == answers).mean()
    if final:
        for name, alphabet in list(world.alphabets.items())[1:]:
            if args.mix[3] or name == "text":
                out[f"copy_{name}"] = repetition(model, repeats(alphabet, n, s, rng(4)), world.alphabets["mix"])[0]
        out["effects"] = head_effects(model, x, args.ablate, world.alphabets["mix"], rng(5)).ravel().tolist()
        if world.icl:
            out["icl"] = {key: answer(model, *task) for key, task in world.icl.items()}
    return {k: v if isinstance(v, (list, dict)) else float(v) for k, v in out.items()}


def shot_curve(model, x, step):
    """Accuracy (k,) of the answers of shots 0, 1, ... in windows x (n, T) of shots of `step` tokens."""
    columns = np.arange(step - 2, x.shape[1] - 1, step)
    guess = logits_at(model, x, columns, lambda logits: logits.argmax(-1))
    return (guess.cpu().numpy() == x[:, columns + 1]).mean(0)


def transplant(model, world, args):
    """The paper's cross-checkpoint patch: the trained attention output of one early layer in the untrained model.

    Previous-token information alone makes untrained heads of later layers look prefix-matching.
    """
    torch.manual_seed(world.seed)
    untrained = GPT(model.config).to(model.wte.weight.device)
    x = repeats(world.alphabets["mix"], args.samples // 4, min(50, args.block_size * 3 // 16), np.random.default_rng(6))
    site = f"blocks.{args.n_layer // 4}.attn.out"
    with torch.no_grad():
        trained = model.capture(torch.as_tensor(x).to(model.wte.weight.device), [site])[site]
    plain, patched = (head_scores(untrained, x, patch)[0] for patch in ({}, {site: lambda _: trained}))
    return {"untrained_prefix": plain.ravel().tolist(), "transplanted_prefix": patched.ravel().tolist()}


# ----------------------------------------------------------------------------------------- few-shot tasks from a folder


def icl_tasks(folder, tok, n, shots=5):
    """Prompts of few-shot tasks: {"task/any" | "task/no overlap": (prompts, first tokens of the answers)}.

    folder  *.json, each a list of {"input", "output"}; demonstrations come from a fixed 70 %, queries from the rest [R]
    `no overlap` draws demonstrations without the query's answer [S]; tasks with one answer have no such prompts.
    """
    paths = sorted(Path(folder).glob("*.json"))
    if not paths:
        raise ValueError(f"--icl-dir {folder} has no *.json")
    tasks = {}
    for path in paths:
        rng, rows = np.random.default_rng(42), json.loads(path.read_text())
        rows = [rows[i] for i in rng.permutation(len(rows))]
        demos, queries = rows[: len(rows) * 7 // 10], rows[len(rows) * 7 // 10 :]
        for condition in "any", "no overlap":
            prompts, answers = [], []
            for query in [queries[i % len(queries)] for i in range(n)]:
                pool = [d for d in demos if condition == "any" or d["output"] != query["output"]]
                if len(pool) < shots:
                    continue
                pick = [pool[i] for i in rng.choice(len(pool), shots, replace=False)]
                text = "".join(f"Q: {d['input']}\nA: {d['output']}\n\n" for d in pick) + f"Q: {query['input']}\nA:"
                start, whole = len(tok.encode(text)), tok.encode(f"{text} {query['output']}")
                prompts.append(whole[:start])
                answers.append(whole[start])
            if prompts:
                tasks[f"{path.stem}/{condition}"] = prompts, answers
            else:
                print(f"{path.stem}: too few other answers for the condition {condition!r}, left out")
    return tasks


@torch.no_grad()
def answer(model, prompts, answers, size=16):
    """Whether the likeliest next token is the answer's first, for each prompt: list of bool."""
    device, right = model.wte.weight.device, []
    for i in range(0, len(prompts), size):
        idx, mask = common.padded(prompts[i : i + size], device)
        right += (
            model.unembed(model.hidden(idx, mask)[:, -1]).argmax(-1).cpu() == torch.tensor(answers[i : i + size])
        ).tolist()
    return right


def mcnemar(a, b):
    """Exact two-sided McNemar test of paired outcomes: the chance of so uneven a split of the pairs that differ."""
    wins, losses = sum(x and not y for x, y in zip(a, b)), sum(y and not x for x, y in zip(a, b))
    n, k = wins + losses, min(wins, losses)
    return min(1.0, 2 * sum(math.comb(n, i) for i in range(k + 1)) / 2**n)


def write_icl(path, results):
    """icl.csv: accuracy of every task and arm (first seed), tested against vanilla; prints the paper's count."""
    lines, better, significant = ["task,arm,n,accuracy,low,high,mcnemar_p"], 0, 0
    for key, base in results["none"][0]["icl"].items():
        for arm, seeds in results.items():
            right = seeds[0]["icl"][key]
            p, (low, high) = mcnemar(right, base), wilson(sum(right), len(right))
            lines.append(f"{key},{arm},{len(right)},{np.mean(right):.4f},{low:.4f},{high:.4f},{p:.4g}")
            if arm == "any" and p < 0.05:
                significant, better = significant + 1, better + (sum(right) > sum(base))
    common.write_text(path, "\n".join(lines) + "\n")
    print(f"few-shot tasks: {significant} differ from vanilla (McNemar p < .05), Hapax is better on {better} of them")


# -------------------------------------------------------------------------------------------------------- the verdict
# fmt: off


def judge(run, results):
    """The paper's claims, medians over seeds, each beside the control that must fail the same criterion."""
    m = lambda arm, key: float(np.median([r[key] for r in results[arm]]))
    both = lambda key: {"vanilla": m("none", key), "hapax": m("any", key)}

    v, h, r = (m(arm, "copy") for arm in ("none", "any", "random"))
    test = lambda copies: v >= 0.5 and copies <= 0.5 * v
    run.claim("C1", "copying is suppressed: accuracy on the last token of a repeated random sequence",
              ".935 -> .32 (-66 %)", both("copy"), {"random mask": r},
              "vanilla >= .5 and hapax <= .5 vanilla", test(h), not test(r))

    if "abstractive" in results["none"][0]:
        v, zero = m("none", "abstractive"), max(m("none", "zero_shot"), m("any", "zero_shot"))
        control = {"mixed-task examples": max(m("none", "mixed"), m("any", "mixed"))}
        if "offset" in results:
            control["offset mask"] = m("offset", "abstractive")
        test = lambda accuracy: accuracy >= v - 0.05 and min(accuracy, v) >= zero + 0.3
        run.claim("C2", "abstractive tasks are still learnt from examples (accuracy at 5 shots and more)",
                  "better on 13 of 21 tasks", both("abstractive") | {"zero-shot": zero}, control,
                  "hapax >= vanilla - .05, both >= zero-shot + .3", test(m("any", "abstractive")),
                  not any(map(test, control.values())))

    if "label_overlap" in results["none"][0]:
        gap = lambda arm, key: m("none", key) - m(arm, key)
        test = lambda arm: (x := gap(arm, "label_overlap")) >= 0.1 and gap(arm, "label_no_overlap") <= x / 2
        run.claim("C3", "few-label tasks suffer where the label can be copied (vanilla - arm)",
                  "sentiment .48; without overlap -.33",
                  {"overlap": gap("any", "label_overlap"), "no overlap": gap("any", "label_no_overlap")},
                  {"random mask, overlap": gap("random", "label_overlap")},
                  "gap >= .1, without overlap at most half of it", test("any"), not test("random"))

    worse = lambda arm, key: m(arm, key) - m("none", key)
    test = lambda arm: worse(arm, "loss_masked") >= 0.5 and worse(arm, "loss_kept") <= 0
    run.claim("C4", "held-out text: worse at masked targets, no worse at kept ones (arm - vanilla, nats)",
              "kept -.08 to -.13", {"masked": worse("any", "loss_masked"), "kept": worse("any", "loss_kept")},
              {"random, masked": worse("random", "loss_masked"), "random, kept": worse("random", "loss_kept")},
              "masked >= .5 and kept <= 0", test("any"), not test("random"))

    v, r, test = m("none", "tld"), m("random", "tld"), lambda tld: tld <= v - 0.1
    run.claim("C5", "context helps less over all: token-loss difference, early - late targets", "+.40 against -.39",
              both("tld"), {"random mask": r}, "hapax <= vanilla - .1", test(m("any", "tld")), not test(r))
    v, short, test = m("none", "tld_new"), m("any", "tld_new_short"), lambda tld: tld >= v - 0.02
    run.claim("C5b", "context beyond copying helps as much: the same over non-extractive targets",
              "+.05..+.10 against +.13..+.15", both("tld_new"), {"hapax, short context": short},
              "hapax >= vanilla - .02", test(m("any", "tld_new")), not test(short))

    scores = lambda arm: {f"{arm}, {k[7:]}": m(arm, k) for k in ("prefix_max", "prefix_top")}
    test = lambda arm: all(m(arm, k) <= 0.75 * m("none", k) for k in ("prefix_max", "prefix_top"))
    run.claim("C6", "heads match prefixes less: the best head, the mean of the top heads", "top 10: .61 -> .40",
              scores("none") | scores("any"), scores("random"), "hapax <= .75 vanilla", test("any"), not test("random"))


# fmt: on

COLOURS = {"none": "#4477aa", "any": "#ee6677", "random": "#999999", "latest": "#228833", "offset": "#ccbb44"}
NAMES = {"none": "vanilla", "any": "Hapax"}


def draw(path, results, logs, args):
    """One picture of all measures: what changes with training above, what the trained models do below."""
    colour, name = lambda arm: COLOURS.get(arm, "#aa3377"), lambda arm: NAMES.get(arm, arm)
    with common.figure(path, 2, 3) as axes:
        copying, heads, context, shots, losses, effects = axes
        for arm, seeds in logs.items():
            for i, log in enumerate(seeds):
                rows = [r for r in common.read_jsonl(log.path) if "copy_half" in r]
                style = dict(color=colour(arm), lw=1.4, alpha=0.9)
                steps, label = [r["step"] for r in rows], name(arm) if i == 0 else None
                copying.plot(steps, [r["copy_half"] for r in rows], label=label, **style)
                if arm in ("none", "any"):
                    lines = heads.plot(steps, [r["prefix"] for r in rows], **style | dict(lw=0.9))
                    lines[0].set_label(label)
                    context.plot(steps, [r["tld"] for r in rows], label=label and f"{label}, all targets", **style)
                    style["ls"] = ":"
                    context.plot(
                        steps, [r["tld_new"] for r in rows], label=label and f"{label}, non-extractive", **style
                    )
        copying.set(
            title="Copying: repeated random sequences", ylabel="accuracy, second half", xlabel="step", ylim=(-0.02, 1)
        )
        heads.set(
            title="Prefix matching, every head", ylabel="attention to the copy's next token", xlabel="step", ylim=(0, 1)
        )
        context.set(title="Token-loss difference (early - late)", ylabel="nats", xlabel="step")
        context.axhline(0, color="k", lw=0.5)
        mean = lambda arm, key: np.mean([r[key] for r in results[arm]], 0)
        for arm in results if "shots" in results["none"][0] else ():
            shots.plot(mean(arm, "shots"), color=colour(arm), label=name(arm))
        shots.set(
            title="Abstractive task, answers never repeat",
            ylabel="accuracy",
            xlabel="examples before",
            ylim=(-0.02, 1.05),
        )
        for i, arm in enumerate(results):
            bars = [mean(arm, k) for k in ("loss_kept", "loss_masked")]
            losses.bar(
                np.arange(2) + 0.8 * i / len(results), bars, 0.8 / len(results), color=colour(arm), label=name(arm)
            )
        losses.plot([0, 0.35], [mean("none", "loss_kept_renormalised")] * 2, "k--", lw=1, label="vanilla, renormalised")
        losses.set(
            title="Held-out text",
            ylabel="loss, nats",
            ylim=(0, 6),
            xticks=[0.3, 1.3],
            xticklabels=["kept targets", "masked targets"],
        )
        pair = [arm for arm in ("none", "any") if arm in results]
        for i, arm in enumerate(pair):
            bars = mean(arm, "effects")
            effects.bar(np.arange(len(bars)) + 0.4 * i, bars, 0.4, color=colour(arm), label=name(arm))
        effects.set(
            title=f"Effect of a head on copying ({args.ablate} ablation)",
            ylabel="p(copy) lost without it",
            xlabel="head",
        )
        for ax in axes:
            ax.legend(fontsize=7, ncols=2 if ax is losses else 1)


def show(text, tok, path, args):
    """Prints and draws a text with the tokens that Hapax leaves out of the loss in colour; then the masked shares."""
    ids = np.array([[tok.eos, *tok.encode(text)]])
    if ids.shape[1] < 3:
        raise ValueError("--show needs a text of at least two tokens")
    mask = repeated(ids[:, : args.block_size + 1], "any", tok.n_vocab, args.min_n)[0]
    pieces = [(tok.decode([t]), m) for t, m in zip(ids[0, 1:].tolist(), mask)]
    print("".join(f"\x1b[41;97m{piece}\x1b[0m" if m else piece for piece, m in pieces), "\n")
    placed, line, column, width = [], 0, 0, 88  # (line, column, text, masked)
    for piece, m in pieces:
        for part in re.split("(\n)", piece):
            if part == "\n" or column + len(part) > width:
                line, column = line + 1, 0
            if part != "\n":
                placed.append((line, column, part, m))
                column += len(part)
    with common.figure(path, size=(9, 0.6 + 0.2 * (line + 1))) as ax:
        ax.axis("off")
        ax.set(xlim=(0, width), ylim=(line + 1, 0))
        for line, column, part, m in placed:
            box = {"facecolor": "#ee6677", "alpha": 0.45, "edgecolor": "none", "pad": 0.8} if m else None
            ax.text(column, line + 0.5, part, family="monospace", fontsize=11.8, va="center", bbox=box)
        ax.set_title(
            f"Hapax trains on the plain tokens; the coloured {mask.mean():.0%} end a bigram seen before", loc="left"
        )
    for length in 128, 512, 2048:
        if ids.shape[1] > length:
            rows = np.stack([ids[0, i : i + length + 1] for i in range(0, ids.shape[1] - length, length)])
            shares = {rule: repeated(rows, rule, tok.n_vocab).mean() for rule in ("any", "latest", "offset", "repeat")}
            print(f"masked in windows of {length}: " + ", ".join(f"{k} {v:.1%}" for k, v in shares.items()))


# --------------------------------------------------------------------------------------------------------------- main


def prepare(args, env):
    """Checks the flags, reads the text: a `World` for each seed, and the tokenizer."""
    for arm in args.arms:
        if arm not in RULES:
            raise ValueError(f"--arms {arm}, allowed: {' '.join(RULES)}")
    if "thresholded" in args.arms and not args.sim_emb:
        raise ValueError("the arm thresholded needs --sim-emb CHECKPOINT, whose input embedding tells similar tokens")
    if len(args.mix) != 4 or min(args.mix) < 0 or not args.mix[0]:
        raise ValueError(f"--mix {args.mix}, needed: four whole numbers, the first (text) above 0")
    if args.batch_size % env.world:
        raise ValueError(f"--batch-size {args.batch_size} is not a multiple of the {env.world} processes")
    repeated(np.zeros((1, 2), np.int64), min_n=args.min_n)
    thresholded(torch.zeros(1, 2, dtype=torch.long), torch.ones(1, 1), args.tau)
    text = "".join(itertools.islice(data.load_text(args.dataset), 2000)) if args.tokenizer.startswith("bpe:") else None
    tok = data.get_tokenizer(args.tokenizer, text)
    limit = args.steps * args.batch_size * args.block_size if "/" in args.dataset else None
    with common.rank_zero_first(env):
        tokens = [
            data.token_file(args.dataset, split, tok, Path(args.out) / "tokens", most, quiet=env.rank > 0)
            for split, most in (("train", limit), ("heldout", limit and 2**22))
        ]
    for part in tokens:
        data.windows(part, np.random.default_rng(0), 1, args.block_size + 1)
    worlds = [World(*tokens, tok.n_vocab, tok.eos, args.shot_format == "sep", seed) for seed in args.seeds]
    for world in worlds:
        if args.equiv == "surface":
            surface = [tok.decode([i]).strip().casefold() for i in range(tok.n_vocab)]
            surface = [s if s and "\ufffd" not in s else i for i, s in enumerate(surface)]  # not blanks, bytes
            number = {s: i for i, s in enumerate(dict.fromkeys(surface))}
            world.classes = torch.arange(world.n_vocab)
            world.classes[: tok.n_vocab] = torch.tensor([number[s] for s in surface])
        if args.sim_emb:
            world.embedding = common.load_checkpoint(Path(args.sim_emb))["model"]["wte.weight"]
            if len(world.embedding) != world.n_vocab:
                raise ValueError(f"--sim-emb has {len(world.embedding)} tokens, this vocabulary {world.n_vocab}")
        if args.icl_dir:
            world.icl = icl_tasks(args.icl_dir, tok, args.samples)
            longest = max(len(p) for prompts, _ in world.icl.values() for p in prompts)
            if longest > args.block_size:
                raise ValueError(f"--icl-dir has prompts of {longest} tokens, --block-size is {args.block_size}")
    return worlds, tok


def main(argv=None):
    """The paper end to end; returns what it writes to result.json."""
    args = common.parse(Args, argv)
    with common.bad_input():
        env, out = common.setup(args), Path(args.out)
        run = common.Run(args, env, "train_hapax", "2511.05743")
        out.mkdir(parents=True, exist_ok=True)
        worlds, tok = prepare(args, env)
        sample = "".join(itertools.islice(data.load_text(args.dataset, "heldout"), 20))
        text = sample if args.show in ("", "heldout") else args.show
        if args.show:
            return show(text, tok, out / "mask.png", args)
        config = config_of(args, worlds[0])
        runs = [(world, arm, common.Log(out, f"{arm}-s{world.seed}")) for world in worlds for arm in args.arms]
        for *_, log in runs if args.resume else ():
            common.check_resume(log.path.with_suffix(".pt"), config)
    jobs = common.job_count(args, env)
    tasks = [(args, world, arm, i % jobs) for i, (world, arm, _) in enumerate(runs)]
    measured = common.side_by_side(train_arm, tasks, jobs)
    if env.rank:
        return None
    run.metrics = {arm: [m for m, (_, a, _) in zip(measured, runs) if a == arm] for arm in args.arms}
    if {"none", "any", "random"} <= set(args.arms):
        judge(run, run.metrics)
    if "none" in args.arms:
        draw(out / "hapax.png", run.metrics, {arm: [log for _, a, log in runs if a == arm] for arm in args.arms}, args)
        if args.icl_dir:
            write_icl(out / "icl.csv", run.metrics)
    show(text, tok, out / "mask.png", args)
    return run.finish([log for *_, log in runs])


if __name__ == "__main__":
    main()
