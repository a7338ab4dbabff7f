"""Shared grammatical concepts (arXiv 2501.06346): is *plural* one feature in all languages?

A sparse autoencoder (SAE) writes an activation as a sum of a few directions out of many. Each
direction, a latent, is a candidate feature. The paper reads them in a language model like this:

1. train an SAE on the residual stream behind one block                  `SAE`, `train_sae`
2. fit a linear probe for a grammatical value in each language           `common.fit_probe`
3. rank latents by their attribution to the probe, keep the top ones     `attribution`
4. a latent at the top in two languages or more is multilingual          `shared`
5. remove these: the probes fall to chance, in all languages             `probes_after`
6. push along these: a translation changes its number or tense           `steer`

The toy: six languages without a word in common, texts that say one thing in four of them, and a
GPT that learns to translate. `--preset gemma` reads six real languages (grammar.csv).

What to look at: step 5 is less than it seems. Accuracy falls to chance since all logits have moved
to one side of the threshold. They still rank the sentences rightly (AUC), and a probe that is
fitted again reads the value as before: the feature is not gone.
"""

import copy
from collections import Counter
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from itertools import chain, permutations, product
from pathlib import Path
from typing import ClassVar, NamedTuple

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

import common
import data
import pretrained
from model import GPT, GPTConfig, generate, padded


@dataclass
class Args(common.TrainFlags):
    """sparse autoencoders"""

    presets: ClassVar[dict] = {
        "smoke": dict(steps=4, batch_size=8, saes=1, sae_steps=10, rows=2048, jobs=1),
        "toy": {},
        "gemma": dict(model="gemma-3-270m", layer=10, d_sae=2048, k=32, rows=2**15)
        | dict(saes=1, sae_steps=1000, sae_lr=1e-3),
        "paper": dict(model="meta-llama/Meta-Llama-3-8B", layer=16, d_sae=32768, k=64, top=32)
        | dict(sae_steps=61000, sae_batch=8192, sae_lr=5e-5, rows=2**20, refresh=True),
    }
    limits: ClassVar[dict] = common.TrainFlags.limits | {
        **dict.fromkeys(("d_sae", "k", "saes", "sae_steps", "sae_batch", "rows", "top"), (1,)),
        **dict.fromkeys(("layer", "sae_lr"), (0,)),
    }
    unused: ClassVar[set] = {"micro_batch"}
    may_change: ClassVar[set] = common.TrainFlags.may_change | {"top"}

    steps: int = 900
    batch_size: int = 32
    lr: float = 4e-3
    model: str = ""  # a pretrained model in place of the toy (paper: Llama-3-8B, Aya-23-8B)
    layer: int = 0  # block whose output is read, from 0 (paper: 16 of 32)
    dataset: str = "stdlib"  # real models: text for the SAE beside the sentences of grammar.csv
    d_sae: int = 96  # latents (paper: 32768, 8 times the width)
    k: int = 20  # active latents in a row (paper: a gated SAE, which has no k)
    saes: int = 3  # SAEs that are trained on a model: what is read is the mean, the last one steers
    sae_steps: int = 700  # training steps of an SAE
    sae_batch: int = 1024  # rows of activations in a step
    sae_lr: float = 3e-3  # peak learning rate of the SAE, Adam's
    rows: int = 2**16  # rows of activations that are harvested and shuffled at a time
    refresh: bool = False  # harvest new rows when all have been used; else go over them again
    top: int = 4  # length of the lists; four times as many latents are removed (paper: 32, 128)


# ---------------------------------------------------------------------------------- the sparse code

weighted_sums = partial(F.embedding_bag, mode="sum")  # of rows of a table, one sum for each bag


def select(pre, k, batch=False):
    """The k largest of relu(pre) in each row of pre (B, m); with `batch` the B k largest of all.

    Returns rows, latents and values, (B k,) each, sorted by row; too few positives leave zeros.
    """
    B, m = pre.shape
    if batch:
        flat = pre.flatten().topk(B * k, sorted=False).indices.sort().values
        return flat // m, flat % m, pre.flatten()[flat].relu()
    values, latents = pre.topk(k, sorted=False)
    rows = torch.arange(B, device=pre.device).repeat_interleave(k)
    return rows, latents.flatten(), values.flatten().relu()


class SparseCode(torch.autograd.Function):
    """x (B, d) -> x_hat (B, d) through the few latents that `select` keeps; no gradient for x.

    A dense step multiplies by all m latents: to encode, to decode, and four times on the way back.
    Here only the encoder's product is dense. The decoder sums k rows for each input, and both
    gradients are such sums, once the (row, latent) pairs are sorted by latent.
    """

    @staticmethod
    def forward(ctx, x, W_enc, b_enc, W_dec, b_dec, k, batch):
        x = x - b_dec
        pre = torch.addmm(b_enc, x, W_enc.T)  # (B, m)
        rows, latents, values = select(pre, k, batch)
        starts = torch.searchsorted(rows, torch.arange(len(x), device=x.device))
        with torch.enable_grad():  # a small graph of its own: torch differentiates by the values
            leaf = values.detach().requires_grad_()
            x_hat = weighted_sums(latents, W_dec.detach(), starts, per_sample_weights=leaf)
        ctx.graph = leaf, x_hat
        ctx.save_for_backward(x, W_enc, rows, latents)
        ctx.mark_non_differentiable(latents, values)
        return x_hat.detach() + b_dec, latents, values

    @staticmethod
    def backward(ctx, grad, *_):
        x, W_enc, rows, latents = ctx.saved_tensors
        leaf, x_hat = ctx.graph
        d_pre = torch.autograd.grad(x_hat, leaf, grad)[0] * (leaf > 0)
        latents, order = latents.sort()
        rows, d_pre = rows[order], d_pre[order]
        values = leaf.detach()[order]
        starts = torch.searchsorted(latents, torch.arange(len(W_enc), device=x.device))
        d_W_enc = weighted_sums(rows, x, starts, per_sample_weights=d_pre)
        d_W_dec = weighted_sums(rows, grad.contiguous(), starts, per_sample_weights=values)
        d_b_enc = d_pre.new_zeros(len(W_enc)).index_add_(0, latents, d_pre)
        d_b_dec = grad.sum(0) - d_b_enc @ W_enc  # b_dec is added at the end, and taken from x
        return None, d_W_enc, d_b_enc, d_W_dec, d_b_dec, None, None


class SAE(nn.Module):
    """x -> f = the k largest of relu(W_enc (x - b_dec) + b_enc) -> x_hat = sum_j f_j D_j + b_dec.

    batch    k latents are active in a row on average (BatchTopK); `threshold` follows the least
             active one, and decides outside training
    streams  a crosscoder: the activations of so many models, side by side, share one code
    The norms of a latent's decoder rows, one for each stream, sum to 1: so latents compare by f.
    Inside, activations are divided by `scale`, so that every stream has mean square norm 1.
    """

    def __init__(self, d, m, k, streams=1, batch=False):
        super().__init__()
        if not 0 < k <= m:
            raise ValueError(f"k {k} latents of {m}, allowed: 1 to {m}")
        self.d, self.k, self.streams, self.batch = d, k, streams, batch
        rows = F.normalize(torch.randn(m, d), dim=1).repeat(1, streams)
        self.W_enc = nn.Parameter(rows.clone())
        self.W_dec = nn.Parameter(rows / streams)
        self.b_enc = nn.Parameter(torch.zeros(m))
        self.b_dec = nn.Parameter(torch.zeros(streams * d))
        self.register_buffer("scale", torch.ones(streams * d))
        self.register_buffer("threshold", torch.tensor(-1.0))  # below 0: none yet
        self.register_buffer("silent", torch.zeros(m, dtype=torch.long))  # so many steps by now

    def encode(self, x):
        """Codes f (..., m) of activations x (..., streams * d)."""
        pre = F.linear(x / self.scale - self.b_dec, self.W_enc, self.b_enc)
        if self.batch:
            return pre * (pre > self.threshold.clamp(min=0))
        values, latents = pre.topk(self.k)
        return torch.zeros_like(pre).scatter_(-1, latents, values.relu())

    def decode(self, f):
        """x_hat (..., streams * d) of codes f (..., m)."""
        return (f @ self.W_dec + self.b_dec) * self.scale

    def decoder(self, stream=0):
        """The directions D (m, d) that latents write in the activations of one stream."""
        part = slice(stream * self.d, (stream + 1) * self.d)
        return (self.W_dec[:, part] * self.scale[part]).detach()

    def norms(self):
        """Norms (m, streams) of the decoder's rows."""
        return self.W_dec.unflatten(1, (self.streams, self.d)).norm(dim=2)

    @torch.no_grad()
    def normalize(self, *_):
        """Makes the norms of each latent's decoder rows sum to 1 again: after every step."""
        self.W_dec /= self.norms().sum(1, keepdim=True).clamp(min=1e-12)

    def forward(self, idx, x, denom):
        """The loss on rows x (B, streams * d): squared error / denom + a share for dead latents.

        idx  which rows they are: the training loop counts these
        """
        x = x / self.scale
        weights = self.W_enc, self.b_enc, self.W_dec, self.b_dec
        x_hat, latents, values = SparseCode.apply(x, *weights, self.k, self.batch)
        self.silent += 1
        self.silent[latents[values > 0]] = 0
        if self.batch:
            least = torch.where(values > 0, values, torch.inf).min()
            slow = torch.lerp(self.threshold, least, 0.01)
            self.threshold.copy_(torch.where(self.threshold < 0, least, slow))
        error = (x - x_hat).square().sum() / denom
        return error + self.dead_loss(x, x_hat, self.silent > 20) / 32

    def dead_loss(self, x, x_hat, dead):
        """The share of the error that the best dead latents don't explain (AuxK): they learn it."""
        if not dead.any():
            return 0.0
        error = (x - x_hat).detach()
        dead = dead.nonzero().squeeze(1)
        pre = F.linear(x - self.b_dec.detach(), self.W_enc[dead], self.b_enc[dead])
        values, which = pre.topk(min(self.d // 2, len(dead)))
        code = torch.zeros_like(pre).scatter(1, which, values.relu())
        left = (error - code @ self.W_dec[dead]).square().sum()
        return (left / (error - error.mean(0)).square().sum()).nan_to_num(0.0)


# --------------------------------------------------------------------- activations, and their SAE


def residual(model, idx, layer, mask=None):
    """The residual stream (B, T, C) behind block `layer`, in fp32. The blocks above do not run."""
    lower = copy.copy(model)
    lower._modules = {**model._modules, "blocks": model.blocks[: layer + 1]}
    site = f"blocks.{layer}.resid_post"
    with torch.no_grad():
        return lower.capture(idx, [site], mask)[site].float()


def harvest(models, layer, batches, n, bos):
    """At most n rows of residual streams, those of all `models` side by side: (n, M * C).

    From batches of ids and masks (B, T); without padding and without the start token `bos`.
    """
    parts, total = [], 0
    for idx, mask in batches:
        keep = mask & (idx != bos)
        x = torch.stack([residual(model, idx, layer, mask)[keep] for model in models], 1)
        norms = x.norm(dim=2)
        usual = norms <= 10 * norms.median(0).values  # a few huge rows would rule the loss
        parts.append(x[usual.all(1)].flatten(1))
        total += len(parts[-1])
        if total >= n:
            break
    return torch.cat(parts)[:n]


def adam(sae, args):
    """Adam, and the decoder's norms put right after every step."""
    opt = torch.optim.Adam(sae.parameters(), lr=args.lr, fused=True)
    opt.register_step_post_hook(sae.normalize)
    return opt


def train_sae(sae, fill, args, env, log, seed):
    """Trains on the rows of fill(0), again and again; with --refresh of fill(0), fill(1), ..."""

    @lru_cache(maxsize=1)
    def shuffled(refill):
        rows = fill(refill)
        rng = torch.Generator().manual_seed(9973 * seed + refill)
        return rows[torch.randperm(len(rows), generator=rng).to(rows.device)]

    x = shuffled(0)
    size = args.sae_batch // env.world
    count = len(x) // size  # batches in a refill
    if not count:
        raise ValueError(f"the source has {len(x)} rows, one batch needs {size}")

    def batch(step):
        refill, i = divmod(step, count)
        x = shuffled(refill if args.refresh else 0)[i * size : (i + 1) * size]
        return {"idx": torch.arange(size), "x": x}

    square = x.square().mean(0).unflatten(0, (sae.streams, sae.d)).sum(1)
    square = common.all_reduce(square, env) / env.world
    sae.to(env.device).scale.copy_(square.sqrt().repeat_interleave(sae.d))
    sae.b_dec.data.copy_(x.mean(0) / sae.scale)
    rate = dict(lr=args.sae_lr, warmup=min(1000, args.sae_steps // 10), decay_steps=0)
    args = replace(args, steps=args.sae_steps, **rate, compile=False, shard=False)
    env = replace(env, dtype=torch.float32)
    common.train(sae, batch, args, env, log.stage("sae"), make_optimizer=adam)
    sae.requires_grad_(False)


@torch.no_grad()
def unexplained(sae, x):
    """FVU: the share of the variance of rows x (N, d) that a code does not explain."""
    wrong = (x - sae.decode(sae.encode(x))).square().sum()
    return (wrong / (x - x.mean(0)).square().sum()).item()


@torch.no_grad()
def pool(model, layer, sae, sentences, bos):
    """Activations X (N, d) and codes (N, m) of id lists: means over all tokens but the start."""
    X, codes = [], []
    for i in range(0, len(sentences), 64):
        idx, mask = padded(sentences[i : i + 64], sae.scale.device)
        x = residual(model, idx, layer, mask)  # (B, T, d)
        weight = (mask & (idx != bos)).float()
        weight /= weight.sum(1, keepdim=True).clamp(min=1)
        X.append((weight[:, :, None] * x).sum(1).cpu())
        codes.append(torch.stack([w @ sae.encode(row) for w, row in zip(weight, x)]).cpu())
    return torch.cat(X).double(), torch.cat(codes).double()


# --------------------------------------------------------------- steps 2 to 5: what probes can read


def training(rows):
    """The first four fifths of a language's sentences: probes are fitted on them, the rest test."""
    return rows[: len(rows) * 4 // 5]


def class_gap(X, y):
    """Mean of the rows of label 1 minus that of label 0."""
    return X[y > 0].mean(0) - X[y == 0].mean(0)


def attribution(codes, y, D, w, contrast=False):
    """Integrated gradients of a probe's logits, in closed form: IE_j = (D_j . w) sum of f_j.

    Codes f (N, m), decoder D (m, d), probe w (d,): all is linear in f, so the gradient is constant
    on the way from 0 to f. The paper sums over both labels, so latents that are always active rank
    high; `contrast` takes the gap between the labels y (N,) instead.
    """
    return (D @ w) * (class_gap(codes, y) if contrast else codes.sum(0))


def best(ie, n):
    """The n latents of the highest attribution that support label 1, highest first."""
    return [j for j in ie.argsort(descending=True)[:n].tolist() if ie[j] > 0]


def shared(lists, chance=None):
    """Multilingual latents, in two of the lists {language: latents} or more; their share of all.

    Most lists first, ties by id. Those count that are in more of `lists` than of lists by `chance`.
    """
    counts = Counter(chain(*lists.values()))
    by_chance = Counter(chain(*chance.values())) if chance else Counter()
    found = [j for j in counts if counts[j] >= 2 and counts[j] > by_chance[j]]
    found.sort(key=lambda j: (-counts[j], j))
    return found, len(found) / max(1, len(counts))


def top_lists(parts, D, n, contrast=True, rng=None):
    """{language: its n latents of the highest attribution}; with `rng` of shuffled labels."""
    lists = {}
    for lang, part in parts.items():
        X, codes, y = map(training, part)
        if rng:
            y = y[torch.from_numpy(rng.permutation(len(y)))]
        w, _ = common.fit_probe(X, y)
        lists[lang] = best(attribution(codes, y, D, w, contrast), n)
    return lists


def ablate(X, codes, latents, D):
    """Pooled activations X (N, d) without some latents; what the SAE does not explain stays."""
    return X - codes[:, latents] @ D[latents]


def alike(latents, weight):
    """For each latent another one, of the nearest mean activation `weight` (m,), each once."""
    free = [j for j in range(len(weight)) if weight[j] > 0 and j not in latents]
    chosen = []
    for j in latents[: len(free)]:
        chosen.append(min(free, key=lambda i: abs(weight[i] - weight[j])))
        free.remove(chosen[-1])
    return chosen


def read(logit, y):
    """What logits (N,) tell of labels y: accuracy, and AUC, which knows no threshold."""
    gap = logit[y > 0][:, None] - logit[y == 0]  # a random positive against a random negative
    auc = (gap > 0).double().mean() + (gap == 0).double().mean() / 2
    return {"accuracy": ((logit > 0) == (y > 0)).double().mean().item(), "auc": auc.item()}


def probes_after(removed, X, codes, y, D):
    """What one language's probe and one fitted again read without each of {name: latents}."""
    n = len(training(y))
    probe = common.fit_probe(X[:n], y[:n])
    means = F.normalize(class_gap(X[:n], y[:n]), dim=0)
    found = {}
    for name, latents in removed.items():
        left = ablate(X, codes, latents, D)
        if name == "difference of means":
            left = X - (X @ means)[:, None] * means
        w, b = common.fit_probe(left[:n], y[:n])
        logit = left[n:] @ probe[0] + probe[1]
        numbers = read(logit, y[n:])
        numbers["refit"] = read(left[n:] @ w + b, y[n:])["accuracy"]
        by_label = [logit[y[n:] == label].tolist() for label in (0, 1)]
        found[name] = {"numbers": numbers, "logits": by_label}
    return found


def removals(parts, weight, D, n):
    """Step 5, parts {language: (X, codes, y)} of a concept: {removed: numbers} of each language."""
    lists = top_lists(parts, D, n, contrast=False)
    latents = shared(lists)[0][:n]
    rows = []
    for lang, part in parts.items():
        others = {other: some for other, some in lists.items() if other != lang}
        removed = {
            "nothing": [],
            "multilingual": latents,
            "from other languages": shared(others)[0][:n],
            "matched random": alike(latents, weight),
            "difference of means": [],
        }
        rows.append(probes_after(removed, *part, D))
    return rows


def pushes(parts, weight, D, n):
    """Directions: the sum of multilingual latents times what the value adds to each; and others."""
    latents = shared(top_lists(parts, D, n))[0]
    gaps = [class_gap(training(codes), training(y))[latents] for _, codes, y in parts.values()]
    gap = torch.stack(gaps).mean(0)
    random = alike(latents, weight)
    return {"multilingual": gap @ D[latents], "random": gap[: len(random)] @ D[random]}


def versions(items, say):
    """Every item in four versions, plural or not, past or not: sentences, {concept: labels}."""
    grid = [*product(items, (0, 1), (0, 1))]
    _, plural, past = zip(*grid)
    return [say(*version) for version in grid], {"plural": plural, "past": past}


# ------------------------------------------------------------------------------------------ the toy

NOUNS, VERBS = 8, 5
NUMBERS, TENSES = ("sg", "pl"), ("pres", "past")
LANGUAGES = {  # order of subject, verb, object; words of a noun and a verb; a dot is inside a word
    "A": ("SVO", "n{i}.{num}", "v{i}.{tense}.{num}"),
    "B": ("SOV", "n{i} {num}", "v{i} {tense} agr.{num}"),
    "C": ("VSO", "{num} n{i}", "aux.{tense}.{num} v{i}"),
    "D": ("SVO", "all.{num} n{i}", "v{i} {tense}"),
    "E": ("SOV", "n{i}.{num}.{case}", "v{i}.{tense}.{num}"),
    "F": ("VOS", "n{i} {num}", "v{i}.{tense}"),
}


class Meaning(NamedTuple):
    """What a sentence says; numbers and tense are 0 or 1."""

    subject: int
    number: int
    verb: int
    tense: int
    object: int
    object_number: int

    def turned(self, concept, value):
        """With all nouns in the plural (1) or singular (0), or the verb in the past or present."""
        if concept == "past":
            return self._replace(tense=value)
        return self._replace(number=value, object_number=value)


def render(m, lang):
    """The words of a meaning in a language; "A:n3.pl" belongs to language A alone."""
    order, noun, verb = LANGUAGES[lang]
    number = NUMBERS[m.number]
    parts = {
        "S": noun.format(i=m.subject, num=number, case="nom"),
        "V": verb.format(i=m.verb, num=number, tense=TENSES[m.tense]),
        "O": noun.format(i=m.object, num=NUMBERS[m.object_number], case="acc"),
    }
    words = " ".join(parts[part] for part in order).split()
    return [f"{lang}:{word}" for word in words]


def shows(words, concept, value):
    """Whether words carry the value, and nowhere the opposite one."""
    values = TENSES if concept == "past" else NUMBERS
    marks = set(chain(*(word.split(":")[-1].split(".") for word in words)))
    return marks & {*values} == {values[value]}


def draw_meaning(rng, held):
    """A random meaning; held: with a (subject, verb) pair of the fifth that training never sees."""
    while True:
        m = Meaning(*rng.integers((NOUNS, 2, VERBS, 2, NOUNS, 2)).tolist())
        if ((m.subject + m.verb) % 5 == 0) == held:
            return m


WORDS = ["<pad>", "<bos>", "<eos>", *(f"<{lang}>" for lang in LANGUAGES)]
for noun, verb, number, tense in product(range(NOUNS), range(VERBS), (0, 1), (0, 1)):
    for lang in LANGUAGES:
        WORDS += render(Meaning(noun, number, verb, tense, noun, number), lang)
WORDS = [*dict.fromkeys(WORDS)]  # each once
ID = {word: i for i, word in enumerate(WORDS)}
PAD, BOS, EOS = range(3)
STOP = range(EOS, EOS + 1 + len(LANGUAGES))  # the end, or the tag of the next sentence
STRENGTHS = np.arange(0.6, 1.45, 0.05)  # of a push, in norms of the residual stream


def ids(m, lang):
    """A sentence as ids, the language's tag before it."""
    return [ID[word] for word in [f"<{lang}>", *render(m, lang)]]


def texts(rng, n, translation):
    """n texts of four sentences as idx and targets (n, T), -100 at padding.

    One meaning in four languages; without translation, four meanings in one language.
    """
    rows = []
    for _ in range(n):
        langs = rng.permutation([*LANGUAGES])[:4]
        if translation:
            meanings = [draw_meaning(rng, held=False)] * 4
        else:
            meanings = [draw_meaning(rng, held=False) for _ in range(4)]
            langs = langs[:1].repeat(4)
        sentences = [ids(m, lang) for m, lang in zip(meanings, langs)]
        rows.append(torch.tensor([BOS, *chain(*sentences), EOS]))
    full = nn.utils.rnn.pad_sequence(rows, batch_first=True)
    return {"idx": full[:, :-1], "targets": full[:, 1:].masked_fill(full[:, 1:] == PAD, -100)}


def toy_corpus(seed):
    """{language: (sentences, {concept: labels})}; the last fifth says what training never sees."""

    def say(item, plural, past):
        m, lang = item
        return [BOS, *ids(m.turned("plural", plural).turned("past", past), lang)]

    corpus = {}
    for lang in LANGUAGES:
        rng = np.random.default_rng([seed, ID[f"<{lang}>"]])
        items = [(draw_meaning(rng, held=i >= 100), lang) for i in range(125)]
        corpus[lang] = versions(items, say)
    return corpus


def tasks(seed, held):
    """Four meanings, to be translated from each language into each: (meaning, from, into)."""
    rng = np.random.default_rng([seed, 4])
    meanings = [draw_meaning(rng, held) for _ in range(4)]
    return [(m, *pair) for m, pair in product(meanings, permutations(LANGUAGES, 2))]


def translate(model, items, patch=None):
    """Greedy translations, as words, of items (meaning, language, into language)."""
    prompts = [[BOS, *ids(m, lang), ID[f"<{into}>"]] for m, lang, into in items]
    with model.patch(patch or {}):
        out = generate(model, prompts, 12, temperature=0, stop=STOP)
    return [[WORDS[i] for i in row if i not in STOP] for row in out]


def push(x, direction, strength):
    """A patch: x (..., d) moved along a direction (d,), by `strength` times its norm."""
    step = strength * x.float().norm(dim=-1, keepdim=True) * F.normalize(direction, dim=0)
    return x + step.to(x.dtype)


def steer(model, layer, direction, strength, concept, items):
    """Pushes translations to the other value, both ways: two shares of them.

    flipped  show the value, and nowhere the opposite
    whole    are what they should be, word for word: nothing else has changed
    """
    flipped = whole = 0
    for value, sign in (0, -1), (1, 1):
        turned = [(m.turned(concept, 1 - value), lang, into) for m, lang, into in items]
        patch = partial(push, direction=direction, strength=sign * strength)
        said = translate(model, turned, {f"blocks.{layer}.resid_post": patch})
        for (m, _, into), words in zip(turned, said):
            flipped += shows(words, concept, value)
            whole += words == render(m.turned(concept, value), into)
    return flipped / (2 * len(items)), whole / (2 * len(items))


def steer_concepts(model, args, directions, seed):
    """Flips of each concept, {concept: direction}, by the gentlest push that does on seen ones.

    kept: of the flipped translations, the share of which nothing else has changed.
    """
    numbers, whole = {}, 0
    for concept, direction in directions.items():
        for strength in STRENGTHS:
            pushed = model, args.layer, direction, strength, concept
            if steer(*pushed, tasks(seed, held=False))[0] >= 2 / 3:
                break
        numbers[concept], right = steer(*pushed, tasks(seed, held=True))
        whole += right
    return numbers | {"kept": whole / max(1e-9, sum(numbers.values()))}


def toy(args, env, log, translation, seed):
    """A model that is trained here, and what `prepare` has for a real one."""
    torch.manual_seed(seed)
    model = GPT(GPTConfig(len(WORDS), 64, 4, 4, 64, qkv_bias=False, tie=True))

    def batch(step):
        return texts(np.random.default_rng([seed, 2, step]), args.batch_size, translation)

    common.train(model, batch, args, env, log)

    def batches(refill):
        rng = np.random.default_rng([seed, 3, refill])
        while True:
            idx = texts(rng, 256, translation)["idx"].to(env.device)
            yield idx, idx != PAD

    return model.eval().requires_grad_(False), toy_corpus(seed), batches, BOS


# ------------------------------------------------------------------------------------ a real model


def template_sentences():
    """{language: (sentences, {concept: labels})} from grammar.csv; the last fifth has other words.

    Forms: singular/plural; of a verb present singular/present plural/past singular/past plural.
    """
    table = data.read_table(Path(__file__).with_name("grammar.csv"), ["kind", "split"])

    def say(words, plural, past):
        noun, verb, place = words
        text = f"{noun[plural]} {verb[2 * past + plural]} {place[0]}."
        return text[0].upper() + text[1:]

    corpus = {}
    for lang in [*table[0]][2:]:
        items = []
        for split in "train", "test":
            forms = {"noun": [], "verb": [], "place": []}
            for row in table:
                if row["split"] in (split, "both"):
                    forms[row["kind"]].append(row[lang].split("/"))
            items += product(*forms.values())
        corpus[lang] = versions(items, say)
    return corpus


def prepare(args, env, out):
    """A real model, its corpus of ids, its source of rows, and the id of its start token or -1."""
    model, tok = pretrained.load(args.model, env.device, args.dtype)
    model.eval().requires_grad_(False)
    if args.layer >= model.config.n_layer:
        raise ValueError(f"--layer {args.layer}, allowed: 0 to {model.config.n_layer - 1}")
    bos = tok.bos if tok.opens else -1
    corpus = template_sentences()
    own = []
    for lang, (sentences, labels) in corpus.items():
        rows = [tok.encode(text, bos=True) for text in sentences]
        corpus[lang] = rows, labels
        own += training(rows)
    with common.rank_zero_first(env):
        limit = args.sae_steps * args.sae_batch
        tokens = data.token_file(args.dataset, "train", tok=tok, folder=out / "tokens", limit=limit)

    def batches(refill):
        """The sentences of all languages, then windows of text without end."""
        for i in range(0, len(own), 64):
            yield padded(own[i : i + 64], env.device)
        rng = np.random.default_rng([refill, env.rank])
        while True:
            idx = torch.from_numpy(data.windows(tokens, rng, 32, 64)).to(env.device)
            if tok.opens:
                idx[:, 0] = bos
            yield idx, torch.ones_like(idx, dtype=torch.bool)

    return model, corpus, batches, bos


# ----------------------------------------------------------------------- one seed, claims, figure


def study(sae, model, corpus, bos, args, seed):
    """Steps 2 to 6 with one SAE: numbers of each language and concept, shares, directions."""
    concepts, weights = {"plural": {}, "past": {}}, []
    for lang, (sentences, labels) in corpus.items():
        X, codes = pool(model, args.layer, sae, sentences, bos)
        weights.append(codes.mean(0))
        for concept, parts in concepts.items():
            parts[lang] = X, codes, torch.tensor(labels[concept])
    weight = torch.stack(weights).mean(0)  # mean activations of the latents
    D = sae.decoder().double().cpu()
    rows, shares, directions = [], [], {"multilingual": {}, "random": {}}
    for concept, parts in concepts.items():
        rows += removals(parts, weight, D, 4 * args.top)
        for name, direction in pushes(parts, weight, D, 4 * args.top).items():
            directions[name][concept] = direction.to(sae.scale)
        rng = np.random.default_rng(seed)
        chance = top_lists(parts, D, args.top, rng=rng)
        value, fake = top_lists(parts, D, args.top), top_lists(parts, D, args.top, rng=rng)
        shares.append({"shared": shared(value, chance)[1], "by_chance": shared(fake, chance)[1]})
    return rows, shares, directions


def run_seed(real, args, env, log, arm, seed):
    """SAEs of a real model or the toy, means over them; arms: "main", "alone" (no translations)."""
    model, corpus, batches, bos = real or toy(args, env, log, arm == "main", seed)

    @lru_cache(maxsize=1)
    def fill(refill):
        return harvest([model], args.layer, batches(refill), args.rows, bos)

    rows, shares = [], []
    for i in range(args.saes):
        torch.manual_seed(1000 * seed + i)
        sae = SAE(model.config.n_embd, args.d_sae, args.k)
        train_sae(sae, fill, args, env, log.stage(str(i)), seed)
        found = study(sae, model, corpus, bos, args, seed)
        rows += found[0]
        shares += found[1]
    row = common.mean(shares) | {"fvu": unexplained(sae, fill(0)[: 2**13])}
    row |= {"sets": {}, "logits": {}}
    for name, first in rows[0].items():
        row["sets"][name] = common.mean([numbers[name]["numbers"] for numbers in rows])
        row["logits"][name] = first["logits"]
    if not real and arm == "main":
        items = tasks(seed, held=True)
        said = translate(model, items)
        right = [words == render(m, into) for words, (m, _, into) in zip(said, items)]
        row["translation"] = np.mean(right)
        for name, directions in found[2].items():
            row[f"steer {name}"] = steer_concepts(model, args, directions, seed)
    return row


def judge(run, main, alone):
    """The paper's claims, each beside the controls that must fail the same criterion."""
    sets = {}
    for name in main[0]["sets"]:
        sets[name] = [row["sets"][name] for row in main]
    random = {"matched random": sets["matched random"]}
    controls = {"shuffled labels": [{"shared": row["by_chance"]} for row in main]}
    if alone:
        controls["no translations"] = alone
    says = "languages share latents: of those at the top in one, so many are in two or more"
    run.claim("C1", says, "many", "arm.shared >= .2", arm=main, controls=controls)
    chance = "base.accuracy >= .9 and arm.accuracy <= .62"
    says = "without the multilingual latents the probes are near chance"
    arms = dict(base=sets["nothing"], arm=sets["multilingual"])
    run.claim("C2", says, "near chance", chance, **arms, controls=random)
    says = "but the feature is not gone: logits still rank, and a probe fitted again reads it"
    stays = "arm.accuracy <= .7 and arm.auc >= .85 and arm.refit >= base.refit - .1"
    means = {"difference of means": sets["difference of means"]}
    run.claim("C3", says, "not asked", stays, **arms, controls=means)
    says = "latents that are multilingual in the other languages do the same to a language"
    arms["arm"] = sets["from other languages"]
    run.claim("C4", says, "implied", chance, **arms, controls=random)
    if alone:
        random = {"random latents": [row["steer random"] for row in main]}
        arms = dict(arm=[row["steer multilingual"] for row in main], controls=random)
        flips = "arm.plural >= .5 and arm.past >= .5"
        run.claim("C5", "pushed along them, translations take the value", "most", flips, **arms)
        says = "and little else: the rest is as before, word for word"
        run.claim("C6", says, "little else", flips + " and arm.kept >= .8", **arms)


def draw(path, logits):
    """What one probe says of each sentence, by label: before, and after two removals."""
    points = {}
    for height, removed in enumerate(["nothing", "multilingual", "difference of means"]):
        for label, name in enumerate(["singular", "plural"]):
            x = logits[removed][label]
            y = height + 0.3 * label + np.linspace(0, 0.2, len(x))
            points[f"{name}, {removed} removed"] = x, y
    panel = dict(title="The same probe before (below) and after", points=points, yticks=[])
    panel |= dict(xlabel="logit; right of 0 the probe says plural", ylim=(-0.1, 4.2))
    common.panels(path, [panel])


# -------------------------------------------------------------------------------------------- main


def check(args, env):
    """What is wrong with the flags: (whether it is, what to say)."""
    longest = args.d_sae // 8
    unread = args.dataset != Args.dataset and not args.model
    return [
        (unread, f"--dataset {args.dataset} has no effect without --model"),
        (args.k > args.d_sae, f"--k {args.k}, allowed: 1 to {args.d_sae}, the latents"),
        (args.top > longest, f"--top {args.top}, allowed: 1 to {longest}, an eighth of --d-sae"),
        (args.rows < args.sae_batch, f"--rows {args.rows}, allowed: {args.sae_batch} and more"),
        (args.layer > 3 and not args.model, f"--layer {args.layer}, allowed: 0 to 3 in the toy"),
    ]


def main(argv=None):
    """The paper end to end; returns what it writes to result.json."""
    run = common.Run(Args, argv, "2501.06346", check)
    real = None
    if run.args.model:
        with common.bad_input("--model"):
            real = prepare(run.args, run.env, run.out)
    found = run.each(partial(run_seed, real), ["main"] if real else ["main", "alone"])
    if found is None:
        return None
    judge(run, found["main"], found.get("alone"))
    draw(run.out / "sae.png", found["main"][0]["logits"])
    return run.finish(found)


if __name__ == "__main__":
    common.cli(main)
