"""Shared grammatical concepts (arXiv 2501.06346): is *plural* one feature in all languages?

A sparse autoencoder (SAE) writes an activation as a sum of a few directions out of many.
Each direction, a latent, may be a feature. The paper looks for those of grammar:

1. train an SAE on the residual stream behind one block        `SAE`, `train_sae`
2. fit a linear probe for *plural* in each language            `common.fit_probe`
3. rank latents by their attribution to the probe              `attribution`
4. multilingual: at the top in two languages or more           `shared`
5. remove these: the probes fall to chance everywhere          `removals`
6. push along these: translations change their number          `steer`

The toy is a GPT that learns to translate between six languages without a common word;
`--preset gemma` reads six real ones.

Step 5 is less than it seems. Accuracy falls since all logits have moved past the
threshold. They still rank the sentences rightly (AUC), and a probe that is fitted
again reads the value as before: the feature is not gone.
"""

import copy
from collections import Counter, namedtuple
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain, permutations, product
from pathlib import Path
from typing import ClassVar

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
        "gemma": dict(model="gemma-3-270m", layer=10, d_sae=4096, k=32, top=40, rows=2**15)
        | dict(saes=1, sae_steps=1000, sae_lr=1e-3),
        "paper": dict(model="meta-llama/Meta-Llama-3-8B", layer=16, d_sae=32768, k=64, top=32)
        | dict(sae_steps=61000, sae_batch=8192, sae_lr=5e-5, rows=2**20),
    }
    limits: ClassVar[dict] = common.TrainFlags.limits | dict(layer=(0,), sae_lr=(0,))
    limits |= dict.fromkeys("d_sae k saes sae_steps sae_batch rows top".split(), (1,))
    unused: ClassVar[set] = {"micro_batch", "eval_every"}
    may_change: ClassVar[set] = common.TrainFlags.may_change - {"steps"} | {"top"}

    steps: int = 900
    batch_size: int = 32
    lr: float = 4e-3
    model: str = ""  # a real model in place of the toy (paper: Llama-3-8B, Aya-23-8B)
    layer: int = 0  # block whose output is read, from 0 (paper: 16 of 32)
    dataset: str = "stdlib"  # text for a real model's SAE, beside grammar.csv
    d_sae: int = 96  # latents (paper: 32768, 8 times the width)
    k: int = 20  # latents active at a token (the paper's SAE is gated: no k)
    saes: int = 3  # SAEs of a model; measures are means over them
    sae_steps: int = 700  # training steps of an SAE
    sae_batch: int = 1024  # activations in a step
    sae_lr: float = 3e-3  # peak learning rate of an SAE
    rows: int = 2**16  # activations to train on, again and again
    top: int = 4  # latents in a list; four times as many are removed (paper: 32, 128)


# --- the sparse code

weighted_sums = partial(F.embedding_bag, mode="sum")  # of a table's rows


def select(pre, k, batch=False):
    """Rows, latents, values of the k largest in each row of pre (B, m), or the B k of all."""
    B, m = pre.shape
    if batch:
        flat = pre.flatten().topk(B * k, sorted=False).indices.sort().values
        return flat // m, flat % m, pre.flatten()[flat].relu()
    values, latents = pre.topk(k, sorted=False)
    rows = torch.arange(B, device=pre.device).repeat_interleave(k)
    return rows, latents.flatten(), values.flatten().relu()


class SparseCode(torch.autograd.Function):
    """x (B, d) -> x_hat (B, d) by the latents that `select` keeps; no gradient for x.

    A dense step multiplies by all latents six times, four of them on the way back.
    Here the encoder alone does. The decoder sums k rows for each input. So do both
    gradients, once the pairs (row, latent) are sorted by latent.
    """

    @staticmethod
    def forward(ctx, x, W_enc, b_enc, W_dec, b_dec, k, batch):
        x = x - b_dec
        pre = torch.addmm(b_enc, x, W_enc.T)  # (B, m)
        rows, latents, values = select(pre, k, batch)
        starts = torch.searchsorted(rows, torch.arange(len(x), device=x.device))
        with torch.enable_grad():  # torch differentiates by values
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
        d_b_dec = grad.sum(0) - d_b_enc @ W_enc  # b_dec is added, and taken from x
        return None, d_W_enc, d_b_enc, d_W_dec, d_b_dec, None, None


class SAE(nn.Module):
    """f = the k largest of relu(W_enc (x - b_dec) + b_enc), x_hat = sum_j f_j D_j + b_dec.

    batch    k is a mean over rows (BatchTopK); outside training `threshold` decides
    streams  activations of so many models, side by side, share a code (crosscoder)
    scale    divides activations, so that every stream has mean square norm 1
    """

    def __init__(self, d, m, k, streams=1, batch=False):
        super().__init__()
        self.d, self.k, self.streams, self.batch = d, k, streams, batch
        rows = F.normalize(torch.randn(m, d), dim=1).repeat(1, streams)
        self.W_enc = nn.Parameter(rows.clone())
        self.W_dec = nn.Parameter(rows / streams)
        self.b_enc = nn.Parameter(torch.zeros(m))
        self.b_dec = nn.Parameter(torch.zeros(streams * d))
        self.register_buffer("scale", torch.ones(streams * d))
        self.register_buffer("threshold", torch.tensor(-1.0))  # below 0: none yet
        self.register_buffer("silent", torch.zeros(m, dtype=torch.long))  # for so many steps

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
        """The directions D (m, d) that latents write in one stream."""
        return (self.W_dec * self.scale).chunk(self.streams, 1)[stream].detach()

    def norms(self):
        """Norms (m, streams) of the decoder's rows."""
        return self.W_dec.unflatten(1, (self.streams, self.d)).norm(dim=2)

    @torch.no_grad()
    def normalize(self, *_):
        """Makes a latent's norms sum to 1, so that latents compare by f."""
        self.W_dec /= self.norms().sum(1, keepdim=True).clamp(min=1e-12)

    def forward(self, idx, x, denom):
        """Squared error of rows x (B, streams * d) / denom + AuxK; idx numbers the rows."""
        x = x / self.scale
        weights = self.W_enc, self.b_enc, self.W_dec, self.b_dec
        x_hat, latents, values = SparseCode.apply(x, *weights, self.k, self.batch)
        self.silent += 1
        self.silent[latents[values > 0]] = 0
        if self.batch:
            least = torch.where(values > 0, values, torch.inf).min()
            self.threshold.lerp_(least, torch.where(self.threshold < 0, 1.0, 0.01))
        error = (x - x_hat).square().sum() / denom
        return error + self.dead_loss(x, x_hat, self.silent > 20) / 32  # AuxK's weight

    def dead_loss(self, x, x_hat, dead):
        """AuxK: the share of the error that dead latents leave. They learn it."""
        if not dead.any():
            return 0.0
        error = (x - x_hat).detach()
        dead = dead.nonzero().squeeze(1)
        pre = F.linear(x - self.b_dec.detach(), self.W_enc[dead], self.b_enc[dead])
        values, which = pre.topk(min(self.d // 2, len(dead)))
        code = torch.zeros_like(pre).scatter(1, which, values.relu())
        left = (error - code @ self.W_dec[dead]).square().sum()
        return (left / (error - error.mean(0)).square().sum()).nan_to_num(0.0)


def residual(model, idx, layer, mask=None):
    """The residual stream (B, T, C) behind a block; others do not run."""
    lower = copy.copy(model)  # the same weights, but not all blocks
    lower._modules = {**model._modules, "blocks": model.blocks[: layer + 1]}
    site = f"blocks.{layer}.resid_post"
    with torch.no_grad():
        return lower.capture(idx, [site], mask)[site].float()


def harvest(models, layer, batches, n, bos):
    """Rows (n, M * C): residual streams of M models on batches (ids, mask)."""
    parts = []
    for idx, mask in batches:
        keep = mask & (idx != bos)
        x = torch.stack([residual(model, idx, layer, mask)[keep] for model in models], 1)
        norms = x.norm(dim=2)
        usual = norms <= 10 * norms.median(0).values  # huge rows would rule the loss
        parts.append(x[usual.all(1)].flatten(1))
        if sum(map(len, parts)) >= n:
            break
    return torch.cat(parts)[:n]


def adam(sae, args):
    opt = torch.optim.Adam(sae.parameters(), lr=args.lr, fused=True)
    opt.register_step_post_hook(sae.normalize)  # after each step
    return opt


def train_sae(sae, x, args, env, log, seed):
    """Trains on rows x (N, streams * d), shuffled, again and again."""
    rng = torch.Generator().manual_seed(9973 * seed)  # no SAE's own
    x = x[torch.randperm(len(x), generator=rng).to(x.device)]
    size = args.sae_batch // env.world

    def batch(step):
        i = step % (len(x) // size)
        return {"idx": torch.arange(size), "x": x[i * size : (i + 1) * size]}

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
def pool(model, layer, sae, sentences, bos):
    """Activations X (N, d), codes (N, m): means over tokens but the start."""
    X, codes = [], []
    for i in range(0, len(sentences), 64):
        idx, mask = padded(sentences[i : i + 64], sae.scale.device)
        x = residual(model, idx, layer, mask)  # (B, T, d)
        weight = (mask & (idx != bos)).float()
        weight /= weight.sum(1, keepdim=True)
        X.append((weight[:, :, None] * x).sum(1).cpu())
        codes.append(torch.stack([w @ sae.encode(row) for w, row in zip(weight, x)]).cpu())
    return torch.cat(X).double(), torch.cat(codes).double()


# --- what probes can read


def training(rows):
    """Four fifths of the sentences, to fit probes; the rest test."""
    return rows[: len(rows) * 4 // 5]


def class_gap(X, y):
    """The mean of rows of label 1 minus that of label 0."""
    return X[y > 0].mean(0) - X[y == 0].mean(0)


def attribution(codes, y, D, w, contrast=False):
    """IE_j = (D_j . w) sum of f_j: integrated gradients of logits, in closed form.

    Codes f (N, m), decoder D (m, d), probe w (d,): the logit is linear in f, so its
    gradient is the same all the way from 0 to f. The paper's sum ranks latents high that
    are always on; `contrast` takes the gap between labels y (N,) in its place.
    """
    return (D @ w) * (class_gap(codes, y) if contrast else codes.sum(0))


def best(ie, n):
    """The n latents of the highest attribution, if it is positive."""
    return [j for j in ie.argsort(descending=True)[:n].tolist() if ie[j] > 0]


def shared(lists, chance=()):
    """Latents in two lists or more, more than by `chance`; their share."""
    counts = Counter(chain(*lists))
    by_chance = Counter(chain(*chance))
    found = [j for j in sorted(counts) if counts[j] >= 2 and counts[j] > by_chance[j]]
    found.sort(key=counts.get, reverse=True)
    return found, len(found) / max(1, len(counts))


def top_lists(parts, D, n, contrast=True, rng=None):
    """The `best` n latents of each language, one of parts; with `rng` of shuffled labels."""
    lists = []
    for part in parts:
        X, codes, y = map(training, part)
        if rng:
            y = y[torch.from_numpy(rng.permutation(len(y)))]
        w, _ = common.fit_probe(X, y)
        lists.append(best(attribution(codes, y, D, w, contrast), n))
    return lists


def ablate(X, codes, latents, D):
    """X (N, d) without some latents; what the SAE does not explain stays."""
    return X - codes[:, latents] @ D[latents]


def alike(latents, weight):
    """For each latent another of about the same mean activation, `weight` (m,)."""
    free = [j for j in range(len(weight)) if weight[j] > 0 and j not in latents]
    chosen = []
    for j in latents[: len(free)]:
        chosen.append(min(free, key=lambda i: abs(weight[i] - weight[j])))
        free.remove(chosen[-1])
    return chosen


def scores(logit, y):
    """Accuracy of logits (N,); AUC: how often label 1 has a pair's higher one."""
    lead = logit[y > 0][:, None] - logit[y == 0]
    auc = (lead > 0).double().mean() + (lead == 0).double().mean() / 2
    right = (logit > 0) == (y > 0)
    return {"accuracy": right.double().mean().item(), "auc": auc.item()}


def removals(parts, weight, D, n):
    """For each language, (X, codes, y): ({removed: scores}, {removed: test logits by label})."""
    lists = top_lists(parts, D, n, contrast=False)
    latents = shared(lists)[0][:n]
    rows = []
    for i, (X, codes, y) in enumerate(parts):
        others = shared(lists[:i] + lists[i + 1 :])[0][:n]
        means = F.normalize(class_gap(training(X), training(y)), dim=0)
        left = {
            "nothing": X,
            "multilingual": ablate(X, codes, latents, D),
            "from other languages": ablate(X, codes, others, D),
            "matched random": ablate(X, codes, alike(latents, weight), D),
            "difference of means": X - (X @ means)[:, None] * means,
        }
        w, b = common.fit_probe(training(X), training(y))
        test = y[len(training(y)) :]
        numbers, logits = {}, {}
        for name, x in left.items():
            again = common.fit_probe(training(x), training(y))
            x = x[-len(test) :]
            numbers[name] = scores(x @ w + b, test)
            numbers[name]["refit"] = scores(x @ again[0] + again[1], test)["accuracy"]
            logits[name] = [(x @ w + b)[test == label].tolist() for label in (0, 1)]
        rows.append((numbers, logits))
    return rows


def steering_vectors(parts, weight, D, n):
    """What a value adds to multilingual latents, (d,), and the same along random ones."""
    latents = shared(top_lists(parts, D, n))[0]
    gaps = [class_gap(training(codes), training(y))[latents] for _, codes, y in parts]
    gap = torch.stack(gaps).mean(0)
    random = alike(latents, weight)
    return {"multilingual": gap @ D[latents], "random": gap[: len(random)] @ D[random]}


# ------ the toy

NOUNS, VERBS = 8, 5
VALUES = {"plural": ("sg", "pl"), "past": ("pres", "past")}
LANGUAGES = {  # order, noun, verb; a dot is inside a word
    "A": ("SVO", "n{i}.{num}", "v{i}.{tense}.{num}"),
    "B": ("SOV", "n{i} {num}", "v{i} {tense} agr.{num}"),
    "C": ("VSO", "{num} n{i}", "aux.{tense}.{num} v{i}"),
    "D": ("SVO", "all.{num} n{i}", "v{i} {tense}"),
    "E": ("SOV", "n{i}.{num}.{case}", "v{i}.{tense}.{num}"),
    "F": ("VOS", "n{i} {num}", "v{i}.{tense}"),
}
LABELS = {"plural": (0, 0, 1, 1), "past": (0, 1, 0, 1)}  # of four versions


class Meaning(namedtuple("Meaning", "subject number verb tense object object_number")):
    """What a sentence says: three words by number; 0 or 1 for plural and past."""

    def turned(self, concept, value):
        """With the verb in the past or not, or all nouns in the plural or not."""
        if concept == "past":
            return self._replace(tense=value)
        return self._replace(number=value, object_number=value)

    def render(self, lang):
        """Its words in a language; "A:n3.pl" belongs to language A alone."""
        order, noun, verb = LANGUAGES[lang]
        numbers, tenses = VALUES.values()
        num = numbers[self.number]
        parts = {
            "S": noun.format(i=self.subject, num=num, case="nom"),
            "V": verb.format(i=self.verb, num=num, tense=tenses[self.tense]),
            "O": noun.format(i=self.object, num=numbers[self.object_number], case="acc"),
        }
        words = " ".join(parts[part] for part in order).split()
        return [f"{lang}:{word}" for word in words]

    def ids(self, lang):
        """Its words as ids, the language's tag before them."""
        return [ID[word] for word in [f"<{lang}>", *self.render(lang)]]


def draw_meaning(rng, held):
    """A random meaning; held: of the fifth that training never sees."""
    while True:
        m = Meaning(*rng.integers((NOUNS, 2, VERBS, 2, NOUNS, 2)).tolist())
        if ((m.subject + m.verb) % 5 == 0) == held:
            return m


WORDS = ["<pad>", "<bos>", "<eos>", *(f"<{lang}>" for lang in LANGUAGES)]
for noun, verb, number, tense in product(range(NOUNS), range(VERBS), (0, 1), (0, 1)):
    for lang in LANGUAGES:
        WORDS += Meaning(noun, number, verb, tense, noun, number).render(lang)
WORDS = [*dict.fromkeys(WORDS)]  # each once
ID = {word: i for i, word in enumerate(WORDS)}
PAD, BOS, EOS = range(3)
STOP = range(EOS, EOS + 1 + len(LANGUAGES))  # or the next sentence's tag


def texts(rng, n, translation):
    """n texts: one meaning in four languages, or four meanings in one."""
    rows = []
    for _ in range(n):
        langs = rng.permutation([*LANGUAGES])[: 4 if translation else 1]
        meanings = [draw_meaning(rng, held=False) for _ in range(4 // len(langs))]
        sentences = [m.ids(lang) for m, lang in product(meanings, langs)]
        rows.append(torch.tensor([BOS, *chain(*sentences), EOS]))
    full = nn.utils.rnn.pad_sequence(rows, batch_first=True)
    idx, targets = full[:, :-1], full[:, 1:]
    return {"idx": idx, "targets": targets.masked_fill(targets == PAD, -100)}


def toy_corpus(seed):
    """Each language's sentences, in four versions; the last fifth is unseen."""
    for lang in LANGUAGES:
        rng = np.random.default_rng([seed, ID[f"<{lang}>"]])
        meanings = [draw_meaning(rng, held=i >= 100) for i in range(125)]
        sentences = []
        for m, plural, past in product(meanings, (0, 1), (0, 1)):
            version = m.turned("plural", plural).turned("past", past)
            sentences.append([BOS, *version.ids(lang)])
        yield sentences


def push(x, direction, strength):
    """x (..., d) moved along a direction (d,), by `strength` times its norm."""
    unit = F.normalize(direction.float(), dim=0).to(x.device)
    return x + (strength * x.float().norm(dim=-1, keepdim=True) * unit).to(x.dtype)


def steer(model, layer, direction, strength, concept, seed, held):
    """Shares of translations that a push flips, and that are right word for word."""
    rng = np.random.default_rng([seed, 4])
    meanings = [draw_meaning(rng, held) for _ in range(4)]
    items = [*product(meanings, permutations(LANGUAGES, 2))]
    flipped = whole = 0
    for value, sign in (0, -1), (1, 1):
        prompts = []
        for m, (lang, into) in items:
            prompts.append([BOS, *m.turned(concept, 1 - value).ids(lang), ID[f"<{into}>"]])
        wanted, opposite = VALUES[concept][value], VALUES[concept][1 - value]
        patch = partial(push, direction=direction, strength=sign * strength)
        with model.patch({f"blocks.{layer}.resid_post": patch}):
            out = generate(model, prompts, 12, temperature=0, stop=STOP)
        for (m, (_, into)), row in zip(items, out):
            text = " ".join(WORDS[i] for i in row if i not in STOP)
            flipped += wanted in text and opposite not in text
            whole += text == " ".join(m.turned(concept, value).render(into))
    return flipped / (2 * len(items)), whole / (2 * len(items))


def steer_concepts(model, layer, directions, name, seed):
    """{concept: share of unseen translations flipped, kept: share of these that are right}."""
    numbers, whole = {}, 0
    for concept, by_name in directions.items():
        for strength in np.arange(0.6, 1.45, 0.05):  # norms of the stream
            pushed = partial(steer, model, layer, by_name[name], strength, concept, seed)
            if pushed(held=False)[0] >= 2 / 3:  # of seen ones
                break
        numbers[concept], right = pushed(held=True)
        whole += right
    return numbers | {"kept": whole / max(1e-9, sum(numbers.values()))}


def toy(args, env, log, translation, seed):
    """What `prepare` returns, for a model that is trained here."""
    torch.manual_seed(seed)
    model = GPT(GPTConfig(len(WORDS), 64, 4, 4, 64, qkv_bias=False, tie=True))

    def batch(step):
        return texts(np.random.default_rng([seed, 2, step]), args.batch_size, translation)

    def batches():
        rng = np.random.default_rng([seed, 3, 0])
        while True:
            idx = texts(rng, 256, translation)["idx"].to(env.device)
            yield idx, idx != PAD

    common.train(model, batch, args, env, log)
    model.eval().requires_grad_(False)
    rows = harvest([model], args.layer, batches(), args.rows, BOS)
    return model, [*toy_corpus(seed)], rows, BOS


def template_sentences(encode):
    """Each language's sentences, in four versions; the last fifth has other words."""
    table = data.read_table(Path(__file__).with_name("grammar.csv"))
    for lang in [*table[0]][2:]:
        sentences = []
        for split in "train", "test":
            forms = {"noun": [], "verb": [], "place": []}  # sings, sing, sang, sang
            for row in table:
                if row["split"] in (split, "both"):
                    forms[row["kind"]].append(row[lang].split("/"))
            for noun, verb, place, plural, past in product(*forms.values(), (0, 1), (0, 1)):
                text = f"{noun[plural]} {verb[2 * past + plural]} {place[0]}."
                sentences.append(encode(text[0].upper() + text[1:]))
        yield sentences


def prepare(args, env, out):
    """A real model, its corpus of ids, rows for the SAE, its start token or -1."""
    model, tok = pretrained.load(args.model, env.device, args.dtype)
    model.eval().requires_grad_(False)
    if args.layer >= model.config.n_layer:
        raise ValueError(f"--layer {args.layer}, allowed: 0 to {model.config.n_layer - 1}")
    bos = tok.bos if tok.opens else -1
    corpus = [*template_sentences(partial(tok.encode, bos=True))]
    own = sum(map(training, corpus), [])
    with common.rank_zero_first(env):
        folder, limit = out / "tokens", args.sae_steps * args.sae_batch
        tokens = data.token_file(args.dataset, "train", tok, folder, limit)

    def batches():
        for i in range(0, len(own), 64):
            yield padded(own[i : i + 64], env.device)
        rng = np.random.default_rng([0, env.rank])
        while True:
            idx = torch.from_numpy(data.windows(tokens, rng, 32, 64)).to(env.device)
            if tok.opens:
                idx[:, 0] = bos
            yield idx, torch.ones_like(idx, dtype=torch.bool)

    rows = harvest([model], args.layer, batches(), args.rows, bos)
    return model, corpus, rows, bos


def run_seed(real, args, env, log, arm, seed):
    """Means over a model's SAEs; arms: main, and alone: without translations."""
    model, corpus, rows, bos = real or toy(args, env, log, arm == "main", seed)
    removed, shares = [], []
    for i in range(args.saes):
        torch.manual_seed(1000 * seed + i)
        sae = SAE(model.config.n_embd, args.d_sae, args.k)
        train_sae(sae, rows, args, env, log.stage(str(i)), seed)
        pooled = [pool(model, args.layer, sae, sentences, bos) for sentences in corpus]
        weight = torch.stack([codes.mean(0) for _, codes in pooled]).mean(0)
        D = sae.decoder().double().cpu()
        directions = {}
        for concept, labels in LABELS.items():
            y = torch.tensor(labels).repeat(len(pooled[0][0]) // 4)
            parts = [(X, codes, y) for X, codes in pooled]
            removed += removals(parts, weight, D, 4 * args.top)
            directions[concept] = steering_vectors(parts, weight, D, 4 * args.top)
            rng = np.random.default_rng(seed)
            chance = top_lists(parts, D, args.top, rng=rng)
            _, share = shared(top_lists(parts, D, args.top), chance)
            _, by_chance = shared(top_lists(parts, D, args.top, rng=rng), chance)
            shares.append({"shared": share, "by_chance": by_chance})
    numbers, logits = zip(*removed)  # by SAE, concept, language
    sets = {name: common.mean([row[name] for row in numbers]) for name in numbers[0]}
    result = common.mean(shares) | {"sets": sets, "logits": logits[0]}
    if not real and arm == "main":  # the last SAE steers
        for name in "multilingual", "random":
            result[f"steer {name}"] = steer_concepts(model, args.layer, directions, name, seed)
    return result


def judge(run, main, alone):
    """The claims; controls must fail the same criteria."""
    sets = {name: [row["sets"][name] for row in main] for name in main[0]["sets"]}
    random = {"matched random": sets["matched random"]}
    means = {"difference of means": sets["difference of means"]}
    controls = {"shuffled labels": [{"shared": row["by_chance"]} for row in main]}
    if alone:
        controls["no translations"] = alone
    says = "of the latents at the top in one language, so many are in two or more"
    run.claim("C1", says, "many", "arm.shared >= .2", arm=main, controls=controls)
    says = "without the multilingual latents the probes are near chance"
    chance = "base.accuracy >= .9 and arm.accuracy <= .62"
    both = dict(base=sets["nothing"], arm=sets["multilingual"])
    run.claim("C2", says, "near chance", chance, **both, controls=random)
    says = "but the feature is not gone: logits rank, a probe fitted again reads it"
    rule = "arm.accuracy <= .7 and arm.auc >= .85 and arm.refit >= base.refit - .1"
    run.claim("C3", says, "not asked", rule, **both, controls=means)
    says = "latents that are multilingual in other languages do the same to a language"
    both["arm"] = sets["from other languages"]
    run.claim("C4", says, "implied", chance, **both, controls=random)
    if alone:
        random = {"random latents": [row["steer random"] for row in main]}
        both = dict(arm=[row["steer multilingual"] for row in main], controls=random)
        rule = "arm.plural >= .5 and arm.past >= .5"
        run.claim("C5", "pushed along them, translations take the value", "most", rule, **both)
        says = "and little else: the rest is as before, word for word"
        run.claim("C6", says, "little else", rule + " and arm.kept >= .8", **both)


def draw(path, logits):
    """What a probe says of each sentence: before, and after two removals."""
    points = {}
    for height, removed in enumerate(["nothing", "multilingual", "difference of means"]):
        for label, name in enumerate(["singular", "plural"]):
            x = logits[removed][label]
            y = height + 0.3 * label + np.linspace(0, 0.2, len(x))
            points[f"{name}, {removed} removed"] = x, y
    panel = dict(title="The same probe before (below) and after", points=points, yticks=[])
    panel |= dict(xlabel="logit; right of 0 the probe says plural", ylim=(-0.1, 4.2))
    common.panels(path, [panel])


def check(args, env):
    """What may be wrong: (whether it is, message)."""
    idle = common.changed_flags(args, ["steps", "batch_size", "lr"] if args.model else ["dataset"])
    return [
        (idle, f"{idle}: no effect with{'' if args.model else 'out'} --model"),
        (args.k > args.d_sae, f"--k {args.k}, allowed: 1 to {args.d_sae}"),
        (args.top > args.d_sae // 8, f"--top {args.top}, allowed: 1 to {args.d_sae // 8}"),
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
