"""Localized cultural knowledge (arXiv 2504.10191): it is there, it stays silent, and one vector makes it speak.

Ask a model in Turkish for a first name and it says an American one; say "I live in Turkey" and it knows better. The
accuracy with the country in the prompt (explicit) minus that without (implicit) is the *explicit-implicit gap*. The paper
takes the mean difference of the residual stream at the last prompt token, explicit minus implicit, and adds it to one
block: localisation rises without a word about the country, on other tasks and in other languages than those the vector
was built from, even with a *universal* vector built from other cultures. And naming the country makes answers more
alike and more stereotyped; steering is said to keep more of their diversity.

The toy: five cultures, five languages, eight tasks with six answers each. In text without context the answers are of
the default culture in seven documents of ten: so the *size* of the gap is put in, and so is that text which names a
country is stereotyped. Not put in: that one additive direction moves the model, what it does to other tasks, languages
and cultures, and to diversity. Nothing here is about real cultures; the lists for real models are examples.

Rungs: the toy -> `--model gemma-3-270m`, a base model, sentences to complete (--format cloze) -> instruct models, the
paper's questions with two options (--format choice). Localisation is exact probability here, not a judge's opinion.
Tags: [P] the paper, [C] its code and result files, [I] inferred here; "pilot": our runs on seeds 100 and up.
Read on: `measure` -> `add` -> `difference` -> `Toy` -> `vectors` -> `study` -> `judge` (claims and controls).
"""

import csv
import json
import math
import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

import common
import pretrained
from model import GPT, GPTConfig, generate

LISTS = Path(__file__).with_name("cultures.json")
CONTEXTS = "none", "neutral", "default", "own"  # the sentence in front: no, of music, of the default country, of one's own
MEASURES = "loc", "def", "other", "junk", "H", "stereo", "pairacc", "theirs"
FOLDS = 4  # of tasks: one to test a vector, one to choose layer and strength, the others to build it


@dataclass
class Args(common.TrainFlags):
    """culture"""

    presets: ClassVar[dict] = {
        "smoke": dict(steps=8, n_layer=2, n_embd=32, warmup=2, jobs=1, threads=1, draws=2, pairs="all"),
        "toy": {},
        "paper": dict(model="google/gemma-2-9b-it", device="cuda", alphas=[1, 2], layers=list(range(21, 28)), open=30),
    }
    model: str = ""
    """a pretrained model in place of the toy: gemma-3-270m, a hub id, a folder (paper: gemma-2-9b-it and six more)"""
    dataset: str = ""
    """FILE.json in the layout of cultures.json, or FILE.csv: task,country,lang,hint,question,local,other[,id]"""
    format: Literal["auto", "cloze", "choice"] = "auto"
    """real models: sentences to complete, or two options; auto is choice with a chat template or a CSV (paper: choice)"""
    layers: list[int] = field(default_factory=list)
    """blocks to steer; default all for the toy, for a real model from the middle on (paper: 21 to 27 of 42)"""
    alphas: list[float] = field(default_factory=list)
    """strengths; default .5 1 1.5 2 3 for the toy, 1 2 for a real model (paper: -2 -1 1 2)"""
    pairs: Literal["answered", "all"] = "answered"
    """build vectors from prompts answered locally with the country and not without (paper), or from all"""
    avg: Literal["micro", "macro"] = "micro"
    """mean over pairs, or over tasks' means (paper: micro)"""
    draws: int = 20
    """random directions; 3 for a real model"""
    open: int = 0
    """real models: so many open-ended texts for each prompt and condition, in open.jsonl (paper: 30)"""
    max_new: int = 256
    """tokens of an open-ended text (paper: 256)"""
    prompts: int = 32
    """prompts in a batch"""
    samples: int = 64
    """documents in an evaluation while training"""
    skew: float = 0.7
    """toy: share of documents without context that answer as the default culture does"""
    steps: int = 700
    """optimizer steps"""
    batch_size: int = 64
    """documents in a step"""
    lr: float = 3e-3
    """peak learning rate"""
    n_layer: int = 6
    """blocks of the toy (paper: 42)"""
    n_embd: int = 64
    """its width (paper: 3584)"""


# -------------------------------------------------------------------------------------------------------- the method


@dataclass
class Ask:
    """n prompts and the first tokens of what may follow."""

    prompts: list  # n id lists
    items: list  # n names of questions: a pair for a vector is a question with and without the sentence
    tokens: torch.Tensor  # (n, A) answer tokens
    owner: torch.Tensor  # (A,) the culture whose answer it is


def padded(prompts, device):
    """Id lists as one tensor (B, T), padded on the left, and its mask of real tokens."""
    longest = max(map(len, prompts))
    idx = torch.tensor([[0] * (longest - len(p)) + p for p in prompts], device=device)
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], dtype=torch.bool, device=device)
    return idx, mask


@torch.no_grad()
def read(model, h, tokens):
    """P (B, V, A) of answer tokens (B, A) from normed residual vectors h (B, V, C)."""
    (B, V, _), size = h.shape, max(1, 2**24 // model.config.vocab_size)  # rows of logits at once
    tokens = tokens.to(h.device)[:, None].expand(B, V, -1).flatten(0, 1)
    out = []
    for part, t in zip(h.flatten(0, 1).split(size), tokens.split(size)):
        logits = model.unembed(part).float()
        out.append((logits.gather(1, t) - logits.logsumexp(1, keepdim=True)).exp())
    return torch.cat(out).unflatten(0, (B, V)).cpu()


@torch.no_grad()
def run(model, ask, size):
    """Each prompt once: its last token's residual stream (L + 1, n, C), after the embedding and every block, and P (n, A)."""
    z, p = [], []
    for i in range(0, len(ask.prompts), size):
        x = common.residuals(model, *padded(ask.prompts[i : i + size], model.wte.weight.device))[:, :, 0]
        z.append(x.cpu())
        p.append(read(model, model.final(x[-1])[:, None], ask.tokens[i : i + size])[:, 0])
    return torch.cat(z, 1), torch.cat(p)


@torch.no_grad()
def patched(model, ask, step, size):
    """P (n, V, A) under every one of V patches in one pass; step(rows) makes those of some prompts, for `common.sweep`."""
    out = []
    for i in range(0, len(ask.prompts), size):
        rows = slice(i, i + size)
        idx, mask = padded(ask.prompts[rows], model.wte.weight.device)
        out.append(read(model, common.sweep(model, idx, step(rows), mask=mask)[:, :, 0], ask.tokens[rows]))
    return torch.cat(out)


def add(v, layers, alphas):
    """Steering as a step of `common.sweep`: alpha v[k] joins the last token after one block; layers x vectors x alphas.

    v (n, L + 1, C): h^l += alpha v^l [C]. Under `generate`, see `steered`.
    """
    scaled = torch.tensor(alphas)[None, :, None, None] * v[:, None]  # n, alphas, L + 1, C
    scaled = scaled.flatten(0, 1).transpose(0, 1)

    def step(j, x, clean):
        return torch.cat((x, clean[:, None] + scaled[j + 1][:, None].to(clean)), 1) if j in layers else x

    return step


def swap(z):
    """The patch of §2.4 [C] as a step: the source's last token z (L + 1, B, C) in place of the target's, layer by layer."""
    return lambda j, x, clean: torch.cat((x, z[j + 1][:, None, None].to(clean)), 1)


def steered(model, layer, v):
    """A context in which `generate` runs with v (C,) added after block `layer` at the last prompt token and all later."""

    def put(x):
        x = x.clone()
        x[:, -1] += v.to(x)
        return x

    return model.patch({f"blocks.{layer}.resid_post": put})


def measure(p, owner, k, theirs=0):
    """What culture k's answers get of probabilities p (..., A): (..., 8), in the order of MEASURES.

    loc, def, other, junk: mass on k's answers, on the default culture's (for the default itself: everyone else's), on
    the others', on all else. H: entropy in bits *given* an answer of k; stereo: the largest share among those.
    pairacc: share of pairs (k's answer, a default one) whose first is likelier: the paper's accuracy, all pairs.
    theirs: mass on culture `theirs`.
    """
    own, west = owner == k, owner == 0 if k else owner > 0
    loc, default, total = (p[..., own].sum(-1), p[..., west].sum(-1), p.sum(-1))
    q = p[..., own] / loc[..., None].clamp(min=1e-30)
    H = -(q * q.clamp(min=1e-30).log2()).sum(-1)
    stereo = q.max(-1).values if own.any() else loc
    wins = (p[..., own, None] > p[..., None, west]).float().flatten(-2)
    pairacc = wins.mean(-1) if wins.shape[-1] else loc
    parts = loc, default, total - loc - default, 1 - total, H, stereo, pairacc, p[..., owner == theirs].sum(-1)
    return torch.stack(parts, -1)


def pair(plus, minus):
    """Pairs of the same question: rows of the items `plus`, and of `minus`; those without a partner are left out."""
    at = {item: i for i, item in reversed(list(enumerate(minus)))}
    found = [(i, at[item]) for i, item in enumerate(plus) if item in at]
    return [i for i, _ in found], [j for _, j in found]


def difference(parts, avg="micro"):
    """Mean of paired differences, tensors (n, ...) of several tasks: micro, all pairs alike, or macro, all tasks alike."""
    parts = [part for part in parts if len(part)]
    if not parts:
        raise ValueError("no question is answered locally with the country named and not without; --pairs all takes all")
    return torch.cat(parts).mean(0) if avg == "micro" else torch.stack([part.mean(0) for part in parts]).mean(0)


def shuffled(diffs, rng):
    """Mean of paired differences (n, ...), half of their signs turned at random and exactly balanced: labels without meaning."""
    order, half = torch.from_numpy(rng.permutation(len(diffs))), len(diffs) // 2
    return (diffs[order[:half]].sum(0) - diffs[order[half : 2 * half]].sum(0)) / max(1, 2 * half)


def bootstrap(values, seed=0, draws=2000):
    """(mean, low, high): 95 % interval of the mean of `values`, cells (culture x task) resampled."""
    values = np.asarray(values, float).ravel()
    means = values[np.random.default_rng(seed).integers(len(values), size=(draws, len(values)))].mean(1)
    return [values.mean(), *np.percentile(means, [2.5, 97.5])]


def parse_answer(text, options):
    """Index of the option that a text names first, by its number or its words; None if it names none [C].

    "12" names neither 1 nor 2 (in the paper's code it does).
    """
    found = []
    for i, option in enumerate(options):
        places = [re.search(rf"(?<!\d){i + 1}(?!\d)", text), re.search(rf"(?<!\w){re.escape(option)}(?!\w)", text)]
        found += [(match.start(), i) for match in places if match]
    return min(found)[1] if found else None


def denominators(types):
    """Accuracy and coverage of items asked in both orders, types [("local" | "west" | None) x 2], by three rules.

    consistent: both orders gave the same answer, which is the paper's [C]; valid: all runs that named an option; all.
    """
    runs, same = [t for both in types for t in both], [a for a, b in types if a == b and a]
    share = lambda part: sum(t == "local" for t in part) / max(1, len(part))
    valid = [t for t in runs if t]
    out = {"consistent": (share(same), len(same) / len(types)), "valid": (share(valid), len(valid) / len(runs))}
    return out | {"all": (share(runs), 1.0)}


def homogeneity(x):
    """Mean cosine over all pairs of rows of x (n, d): 1 is the same text n times."""
    x = F.normalize(torch.as_tensor(x).float(), dim=1)
    return ((x @ x.T).sum().item() - len(x)) / (len(x) * (len(x) - 1))


# ----------------------------------------------------------------------------------------------- worlds: what is asked


class World:
    """Cultures (0 is the default), a language of each, tasks, and how they are asked: `sentence` + `question`."""

    main = "local"  # the language in which the gap is looked for: each culture's own; Cloze: "en"

    def language(self, setting, k):
        return self.languages[k if setting == "local" else 0]

    def ask(self, lang, context, task, k):
        """A task in a language after the sentences of a context."""
        questions, sentences = self.questions(lang, task), self.sentences(lang, context, k)
        prompts = [self.encode(s + q) for s in sentences for q in questions]
        tokens, owner = self.answers(task)
        return Ask(prompts, [*range(len(questions))] * len(sentences), tokens.expand(len(prompts), -1), owner)

    def transfer(self, k, task):
        """Sources and targets of the patch: another task with the country, in k's language; `task` in English without.

        What may follow is the target's task, then the source's: of "culture" n_cultures + owner.
        """
        other = self.tasks[(self.tasks.index(task) + 1) % len(self.tasks)]
        target = self.ask(self.languages[0], "none", task, k)
        tokens, owner = self.answers(other)
        sources = {c: self.ask(self.languages[k], c, other, k).prompts for c in ("own", "none")}
        n = len(target.prompts)
        target.tokens = torch.cat((target.tokens, tokens.expand(n, -1)), 1)
        target.owner = torch.cat((target.owner, owner + len(self.cultures)))
        return {c: [prompts[i % len(prompts)] for i in range(n)] for c, prompts in sources.items()}, target


class Toy(World):
    """The toy's words, documents and true probabilities. A task's name is two syllables, in each language its own.

    Text is words with spaces, one token each: `I.fr live.fr ru.fr ;.fr ba.fr do.fr ?.fr cities:Moscow ;`
    """

    N, FACTS, SHOTS, NATIVE, STEREO = 5, 4, 6, 0.5, 2.0  # answer r of culture and task: p_r ~ (r + 1)^-power

    def __init__(self, seed, skew):
        data, rng = json.loads(LISTS.read_text("utf-8")), np.random.default_rng([seed, 1])
        self.seed, self.skew = seed, skew
        self.cultures, self.languages, self.tasks = data["cultures"][:5], data["languages"][:5], list(data["answers"])[:8]
        cells = [(t, c, a) for t in self.tasks for c in self.cultures for a in data["answers"][t][c].split("|")[:6]]
        words = ["<pad>", "<bos>", ";"] + [f"{t}:{a.split('/')[0].replace(' ', '_')}({c})" for t, c, a in cells]
        words += [f"fact{i}" for i in range(self.FACTS)]
        parts = ["I", "live", "am_from", "grew_up_in", "like", ";", "?", *self.cultures, *(f"thing{i}" for i in range(6))]
        words += [f"{w}.{l}" for l in self.languages for w in parts + [a + b for b in "ao" for a in "bdgk"]]
        self.words, self.number = words, {w: i for i, w in enumerate(words)}
        self.answer = 3 + np.arange(240).reshape(8, self.N, 6)  # ids by task, culture, rank
        pairs = [f"{a}a.{{0}} {b}o.{{0}} ?.{{0}}" for a in "bdgk" for b in "bdgk"]
        self.names = {l: [pairs[i].format(l) for i in rng.permutation(16)[: 8 + self.FACTS]] for l in self.languages}
        foreign = [(l, c) for l in range(1, self.N) for c in range(self.N) if l != c]
        self.held = [foreign[i] for i in rng.permutation(16)[:8]]  # (language, country) pairs that no document has
        self.combos = [(l, l) for l in range(1, self.N)] * 2 + [(0, c) for c in range(self.N)]
        self.combos = np.array(self.combos + [combo for combo in foreign if combo not in self.held])
        every = lambda f: np.array([[self.encode(text)[1:] for text in f(l)] for l in self.languages])
        self.shots = every(lambda l: self.names[l])  # ids by language and task, 3
        self.own = np.stack([every(lambda l, k=k: self.sentences(l, "own", k)) for k in range(self.N)], 1)  # l, k, verb, 4
        self.neutral = every(lambda l: self.sentences(l, "neutral", 0))

    def encode(self, text):
        return [1] + [self.number[word] for word in text.split()]

    def sentences(self, lang, context, k):
        if context == "none":
            return [""]
        if context == "neutral":
            return [f"I.{lang} like.{lang} thing{i}.{lang} ;.{lang} " for i in range(6)]
        country = self.cultures[k if context == "own" else 0]
        return [f"I.{lang} {verb}.{lang} {country}.{lang} ;.{lang} " for verb in ("live", "am_from", "grew_up_in")]

    def questions(self, lang, task):
        return [self.names[lang][self.tasks.index(task)]]

    def answers(self, task):
        tokens = torch.from_numpy(self.answer[self.tasks.index(task)]).flatten()
        return tokens, torch.arange(self.N).repeat_interleave(6)

    def facts(self, lang):
        """Prompts of the tasks that have one answer everywhere, and the answers' ids."""
        return [self.encode(name) for name in self.names[lang][8:]], [243 + i for i in range(self.FACTS)]

    def truth(self, lang, context, k):
        """What the documents say after such a beginning: P (5 x 6,) of a task's answers, by culture and rank."""
        power = lambda a: (p := np.arange(1, 7.0) ** -a) / p.sum()
        p, native = np.zeros((self.N, 6)), self.languages.index(lang)
        if context in ("own", "default"):
            p[k if context == "own" else 0] = power(self.STEREO)
        else:
            p[0] += self.skew * power(self.NATIVE)
            p[native] += (1 - self.skew) * power(self.NATIVE)
        return torch.from_numpy(p).flatten().float()

    def documents(self, rng, n):
        """n documents: ids (n, T), and language, kind, the culture that answers (n,). Kinds: 0 none, 1 own, 2 neutral.

        Half have no context, .35 name a country, .15 begin with a neutral sentence. One culture answers all questions
        of a document: the country's; else the default one with probability `skew`, or the language's.
        """
        kind, lang = np.searchsorted([0.5, 0.85], rng.random(n), side="right"), rng.integers(self.N, size=n)
        combo = self.combos[rng.integers(len(self.combos), size=n)]
        lang = np.where(kind == 1, combo[:, 0], lang)
        culture = np.where(kind == 1, combo[:, 1], np.where(rng.random(n) < self.skew, 0, lang))
        task = rng.integers(8 + self.FACTS, size=(n, self.SHOTS))
        p = np.arange(1, 7.0) ** -np.where(kind == 1, self.STEREO, self.NATIVE)[:, None]
        rank = (rng.random((n, self.SHOTS, 1)) > (p.cumsum(1) / p.sum(1, keepdims=True))[:, None]).sum(2)
        answer = np.where(task < 8, self.answer[task % 8, culture[:, None], rank], 235 + task)[..., None]
        shots = np.concatenate((self.shots[lang[:, None], task], answer, np.full_like(answer, 2)), 2).reshape(n, -1)
        sentence = self.own[lang, culture, rng.integers(3, size=n)]
        sentence = np.where(kind[:, None] == 1, sentence, self.neutral[lang, rng.integers(6, size=n)])
        bos, pad = np.ones((n, 1), int), np.zeros((n, 4), int)
        bare, whole = np.concatenate((bos, shots, pad), 1), np.concatenate((bos, sentence, shots), 1)
        return np.where(kind[:, None] == 0, bare, whole), (lang, kind, culture)

    def batch(self, step, args, env):
        """The documents of one step; this rank's share of them. What answers counts in the loss."""
        ids = torch.from_numpy(self.documents(np.random.default_rng([self.seed, 2, step]), args.batch_size)[0])
        idx, targets = ids[env.rank :: env.world, :-1], ids[env.rank :: env.world, 1:]
        return {"idx": idx, "targets": targets, "weights": ((targets > 2) & (targets < 243 + self.FACTS)).float()}


def config_of(args, world):
    """A small Llama without biases, embedding and unembedding tied."""
    plain = dict(norm="rms", tie=True, qkv_bias=False, attn_bias=False, mlp_bias=False)
    return GPTConfig(len(world.words), 64, args.n_layer, 4, args.n_embd, **plain)


def divergence(model, world, size):
    """KL(generator || model) in nats, mean over languages and tasks, of a document's first answer: {context: nats}."""
    out = {}
    for context in "none", "neutral", "own":
        kl = []
        for k, lang in enumerate(world.languages):
            truth = world.truth(lang, context, k)
            for task in world.tasks:
                p = run(model, world.ask(lang, context, task, k), size)[1].clamp(min=1e-12)
                kl.append((truth * (truth.clamp(min=1e-12).log() - p.log())).sum(-1).mean())
        out[context] = torch.stack(kl).mean().item()
    return out


def train_toy(args, seed, skew, position=0):
    """The toy's model, trained, and its world."""
    env, world = common.setup(args), Toy(seed, skew)
    torch.manual_seed(seed)
    model, log = GPT(config_of(args, world)), common.Log(args.out, f"skew{skew:g}-s{seed}", env)
    evaluate = lambda step: {f"kl_{context}": v for context, v in divergence(model, world, 64).items()}
    common.train(model, lambda step: world.batch(step, args, env), args, env, log, evaluate, position)
    return model.eval(), world


class Cloze(World):
    """Sentences to complete, for base models: `I live in Turkey. My favourite drink is` -> the first token of an answer.

    Both languages count every spelling in the lists. First tokens of two cultures are dropped, as are pieces of under
    three letters (but for TV channels and currencies) [pilot].
    """

    main = "en"

    def __init__(self, tok, data):
        self.tok, self.data = tok, data
        self.cultures, self.languages, self.tasks = data["cultures"], data["languages"], list(data["answers"])
        self.kept, self.dropped = {}, 0
        for task, lists in data["answers"].items():
            firsts = [
                {tok.encode(" " + s)[0] for a in lists[c].split("|") for s in a.split("/")} for c in self.cultures
            ]
            cells = [(t, k) for k, own in enumerate(firsts) for t in sorted(own)]
            short = lambda t: len(tok.decode([t]).strip()) < (1 if task in ("tv", "currency") else 3)
            good = [(t, k) for t, k in cells if not short(t) and sum(t in other for other in firsts) == 1]
            self.dropped += len(cells) - len(good)
            if missing := {*range(len(self.cultures))} - {k for _, k in good}:
                raise ValueError(f"no answer of {self.cultures[min(missing)]} to {task} is left: its first tokens are shared")
            self.kept[task] = tuple(map(torch.tensor, zip(*good)))

    def encode(self, text):
        return self.tok.encode(text, bos=True)

    def sentences(self, lang, context, k):
        hints, home = self.data["hints"][lang], lang == self.languages[0]
        if context == "none":
            return [""]
        if context == "neutral" or context == "default" and not home:
            return hints[context].split("|")
        country = self.data["countries"][self.cultures[k if context == "own" else 0]]
        return [hint.format(country) for hint in hints["own"].split("|")]

    def questions(self, lang, task):
        return self.data["prompts"][lang][task].split("|")

    def answers(self, task):
        return self.kept[task]

    def facts(self, lang):
        """Prompts with one answer everywhere, in English, and the answers' first tokens."""
        parts = [fact.split("|") for fact in self.data["facts"]]
        return [self.encode(text) for text, _ in parts], [self.tok.encode(answer)[0] for _, answer in parts]


def split(whole):
    """What several id lists share, and the next id of each; none if one is the beginning of another."""
    same = os.path.commonprefix(whole)
    return same, [ids[len(same)] for ids in whole] if len(same) < min(map(len, whole)) else []


class Choice(World):
    """The paper's questions with two options, in both orders [C]: of a CSV, or made of the lists.

    Two formats: with the options as strings and the assistant's `My guess is **` begun, so that the next token starts the
    answer (steering); with numbered options and a whole answer (the gap). Base models see two demonstrations.
    """

    DEMOS = (("What am I?", ("Human", "Robot"), 0), ("Which planet is closest to the sun?", ("Mercury", "Venus"), 0))

    def __init__(self, tok, data, rows):
        """rows: dicts of task, country, lang, hint, question, local, other, id; a question in two languages shares its id."""
        self.tok, self.data, self.dropped, self.rows = tok, data, 0, {}
        self.cultures = sorted({r["country"] for r in rows}, key=lambda c: (c != "us", c))
        self.tasks, languages = sorted({r["task"] for r in rows}), {c: {"en"} for c in self.cultures}
        for r in rows:
            languages[r["country"]].add(r["lang"])
            old = self.rows.setdefault((r["task"], r["country"], r["lang"]), {}).setdefault(r["id"], r)
            old["hint"] = old["hint"] or r["hint"]  # a row each with and without it is one question
        self.languages = [min(languages[c] - {"en"}, default="en") for c in self.cultures]
        for (task, country, lang), items in self.rows.items():
            if lang not in data["frame"] or lang not in data["hints"]:
                raise ValueError(f"lang {lang!r} has no frame, allowed: {', '.join(data['hints'])}")
            if missing := [i for i, r in items.items() if not r["hint"].strip()]:
                raise ValueError(f"{task}, {country}, {lang}: no hint in question {missing[0]}")
        for k, country in enumerate(self.cultures):
            for task in self.tasks:
                for lang in {"en", self.languages[k]}:
                    if (task, country, lang) not in self.rows:
                        raise ValueError(f"no questions for task {task}, country {country}, lang {lang}")
        if self.cultures[0] != "us" or len(self.cultures) < 3 or len(self.tasks) < FOLDS:
            raise ValueError(f"needed: country us and two more, and {FOLDS} tasks; got {self.cultures}, {self.tasks}")

    def write(self, lang, sentence, row, order, labels=None, answer=""):
        """Ids of a prompt: options as strings and the answer begun, or with `labels` in front of them."""
        header, rule, options, answers, prefix = self.data["frame"][lang]
        rule = f" {rule}" if labels else ""

        def body(question, pair, marks=labels):
            lines = [f"{mark}. {o}" for mark, o in zip(marks, pair)] if marks else [f"- {o}" for o in pair]
            return "\n".join([f"{header}{rule} {question}", options, *lines])

        pair = (row["local"], row["other"])[:: 1 - 2 * order]
        text = body(f"{sentence}{row['question']}", pair)
        if self.tok.template:
            return self.tok.chat([{"role": "user", "content": text}], ("" if labels else prefix) + answer)
        demos = [f"{body(q, o)}\n{answers} {labels[i] if labels else o[i]}\n\n" for q, o, i in self.DEMOS]
        return self.tok.encode("".join(demos) + f"{text}\n{answers}{' ' if answer else ''}{answer}", bos=True)

    def sentence(self, row, lang, context):
        if context == "own":
            return row["hint"].strip() + " "
        hints = self.data["hints"][lang]
        default = hints.get("default") or hints["own"].format(self.data["countries"]["us"])
        return {"none": "", "neutral": hints["neutral"].split("|")[0], "default": default.split("|")[0]}[context]

    def ask(self, lang, context, task, k):
        """All questions of a task and culture in both orders; what may follow: the local answer's first token, the other's."""
        prompts, items, tokens = [], [], []
        for i, row in self.rows[task, self.cultures[k], lang].items():
            for order in 0, 1:
                sentence = self.sentence(row, lang, context)
                same, nexts = split([self.write(lang, sentence, row, order, None, row[a]) for a in ("local", "other")])
                if nexts:
                    prompts, items, tokens = prompts + [same], items + [(i, order)], tokens + [nexts]
                else:
                    self.dropped += 1
        if not prompts:
            raise ValueError(f"{task}, {self.cultures[k]}: in every question one answer begins with the other")
        return Ask(prompts, items, torch.tensor(tokens), torch.tensor([k, int(not k)]))

    def transfer(self, k, task):
        """§2.4: targets in English, options 1 and 2; sources in k's language, options swapped and lettered A and B."""
        lang, english = self.languages[k], self.rows[task, self.cultures[k], "en"]
        rows = [(english[i], r) for i, r in self.rows[task, self.cultures[k], lang].items() if i in english][:50]
        prompts, tokens, sources = [], [], {"own": [], "none": []}
        for en, own in rows:
            same, (local, other) = split([self.write("en", "", en, 0, "12", mark) for mark in "12"])
            for c in sources:
                sentence = self.sentence(own, lang, c)
                ids, (_, label) = split([self.write(lang, sentence, own, 1, "AB", mark) for mark in "AB"])
                sources[c].append(ids)
            prompts, tokens = prompts + [same], tokens + [[local, other, label]]
        owner = torch.tensor([k, 0, k + len(self.cultures)])
        return sources, Ask(prompts, list(range(len(rows))), torch.tensor(tokens), owner)

    def facts(self, lang):
        return Cloze.facts(self, lang)

    def encode(self, text):
        return self.tok.encode(text, bos=True)


def choice_rows(data):
    """The paper's kind of items from the lists: the r-th local answer against the r-th American one."""
    rows, lists = [], data["answers"]
    for k, (country, native) in enumerate(zip(data["cultures"], data["languages"])):
        for lang in {"en", native}:
            hints = data["hints"][lang]
            hint = hints["own"].split("|")[0].format(data["countries"][country])
            for task, question in data["questions"][lang].items():
                foreign = lists[task]["us" if k else data["cultures"][1]].split("|")
                for i, (a, b) in enumerate(zip(lists[task][country].split("|"), foreign)):
                    pick = -1 if lang == "ru" else 0  # Cyrillic, where the list has it
                    local, other = (text.split("/")[pick] for text in (a, b))
                    rows.append(dict(task=task, country=country, lang=lang, hint=hint, question=question, id=i))
                    rows[-1] |= dict(local=local, other=other)
    return rows


COLUMNS = "task country lang hint question local other".split()


def read_rows(path):
    """The questions of a CSV file; `id` joins the languages and hints of a question, default: its place in the file."""
    rows = list(csv.DictReader(Path(path).read_text("utf-8").splitlines()))
    if not rows or (missing := [c for c in COLUMNS if c not in rows[0]]):
        raise ValueError(f"{path}: {'no rows' if not rows else 'no column ' + missing[0]}, needed: {','.join(COLUMNS)}[,id]")
    for i, row in enumerate(rows, 2):
        if empty := [c for c in COLUMNS if c != "hint" and not (row[c] or "").strip()]:
            raise ValueError(f"{path}, line {i}: no {empty[0]}")
        row["hint"], row["id"] = row["hint"] or "", row.get("id") or i
    return rows


# --------------------------------------------------------------------------------------------------- the measurements


def collect(model, world, args, contexts=CONTEXTS):
    """Every prompt once, in both settings: {(setting, context, culture, task): (Ask, latents (L + 1, n, C), P (n, A))}."""
    seen, runs, K = {}, {}, range(len(world.cultures))
    keys = [(s, c, k, t) for s in ("local", "en") for c in contexts for k in K for t in world.tasks]
    for s, c, k, t in tqdm(keys, "prompts", leave=False, disable=None):
        ask = world.ask(world.language(s, k), c, t, k)
        key = json.dumps([ask.prompts, ask.tokens.tolist()])  # in English most prompts are the same for all cultures
        if key not in seen:
            seen[key] = run(model, ask, args.prompts)
        runs[s, c, k, t] = ask, *seen[key]
    return runs


def contrasts(runs, pairs):
    """Differences {(setting, context, culture, task): (n, L + 1, C)}: the same question with a sentence minus without.

    "answered" keeps, for a culture's own sentence, only pairs answered locally with it and not without [C]. ("local",
    "implicit"): without any sentence, in the culture's language minus in English.
    """
    diffs = {}
    for s, c, k, t in runs:
        if (s, c) == ("en", "none"):
            continue
        plus, minus = runs[s, c, k, t], runs["en" if c == "none" else s, "none", k, t]
        i, j = pair(plus[0].items, minus[0].items)
        if pairs == "answered" and c == "own" and k:
            after, before = (measure(p[rows], ask.owner, k) for (ask, _, p), rows in ((plus, i), (minus, j)))
            keep = (after[:, 0] > after[:, 1]) & (before[:, 0] < before[:, 1])
            i, j = torch.tensor(i)[keep], torch.tensor(j)[keep]
        diffs[s, "implicit" if c == "none" else c, k, t] = (plus[1][:, i] - minus[1][:, j]).transpose(0, 1).float()
    return diffs


def vectors(diffs, k, setting, tasks, args, rng, untrained=None):
    """The steering vectors for culture k, of several kinds, built on `tasks`: {kind: (L + 1, C)}.

      own       with k's country minus without, in the language of the setting    cross     the same in the other one
      one task  own, from a single task                                           universal  from all *other* cultures
      centred   own minus the mean of the others' own                             implicit  k's language minus English
    Controls: minus (-own), wrong (the next culture's own), default (the default country's), neutral (a neutral
    sentence's), shuffled (labels turned for half the pairs), untrained (another model's own) and random directions, the
    last two of own's norm in every block. ValueError if no pair is left.
    """
    n = 1 + max(key[2] for key in diffs)
    of = lambda plus="own", j=k, s=setting, d=diffs: difference([d[s, plus, j, t] for t in tasks], args.avg)
    norm = lambda v: v / v.norm(dim=-1, keepdim=True).clamp(min=1e-9) * own.norm(dim=-1, keepdim=True)
    rest, mine = [j for j in range(1, n) if j != k], [diffs[setting, "own", k, t] for t in tasks]
    own, other = of(), "en" if setting == "local" else "local"
    out = {"own": own, "cross": of(s=other), "one task": max(mine, key=len).mean(0)}
    out["universal"] = difference([diffs[setting, "own", j, t] for j in rest for t in tasks], args.avg)
    out |= {"centred": own - torch.stack([of(j=j) for j in rest]).mean(0), "implicit": of("implicit", s="local")}
    out |= {"minus": -own, "wrong": of(j=following(k, n)), "default": of("default"), "neutral": of("neutral")}
    out["shuffled"] = shuffled(torch.cat(mine), rng)
    if untrained:
        out["untrained"] = norm(of(d=untrained))
    return out | {f"random{i}": norm(torch.from_numpy(rng.standard_normal(own.shape)).float()) for i in range(args.draws)}


def following(k, n):
    """The culture after k, of 1 to n - 1: whose vector is the wrong one."""
    return 1 + k % (n - 1)


def folds(tasks):
    """The tasks in FOLDS parts. Vectors for part f are built without it and without the next one, where cells are picked."""
    return [list(part) for part in np.array_split(tasks, FOLDS)]


def grid(model, world, args, runs, banks, setting):
    """What vectors do, layer by layer and strength by strength: {role: (K - 1, tasks, kinds, layers x alphas, 8)}.

    banks[fold, k]: {kind: vector}; "test": on the fold's own tasks, "select": on those of the next.
    """
    K, nk, cells = len(world.cultures), len(banks[0, 1]), len(args.layers) * len(args.alphas)
    out = {role: torch.zeros(K - 1, len(world.tasks), nk, cells, len(MEASURES)) for role in ("test", "select")}
    for (f, k), bank in tqdm(banks.items(), f"steer, {setting}", leave=False, disable=None):
        step = add(torch.stack([*bank.values()]), args.layers, args.alphas)
        for i, role in enumerate(out):
            for t in folds(world.tasks)[(f + i) % FOLDS]:
                ask = runs[setting, "none", k, t][0]
                m = measure(patched(model, ask, lambda _, s=step: s, args.prompts), ask.owner, k, following(k, K)).mean(0)
                m = m.unflatten(0, (len(args.layers), nk, -1)).transpose(0, 1).flatten(1, 2)
                out[role][k - 1, world.tasks.index(t)] = m
    return out


def pick(g, world, kinds, na):
    """What each kind of vector does in one cell (layer, alpha): {rule: {kind: (K - 1, tasks, 8)}}; own's cells (K - 1, FOLDS, 2).

    clean: the cell of most local mass for the culture on the next fold's tasks, which neither built nor test the vector;
    paper: on the tested answers themselves [C]; same: own's clean cell. Random directions are averaged.
    """
    test, select = g["test"], g["select"][..., 0]
    out, cells = {rule: {kind: torch.zeros_like(test[:, :, 0, 0]) for kind in kinds} for rule in ("clean", "paper", "same")}, []
    rows = [[world.tasks.index(t) for t in part] for part in folds(world.tasks)]
    for k in range(len(test)):
        paper = test[k, ..., 0].mean(0).argmax(-1)
        for f, part in enumerate(rows):
            clean = select[k, rows[(f + 1) % FOLDS]].mean(0).argmax(-1)
            cells.append(divmod(int(clean[0]), na))
            for i, kind in enumerate(kinds):
                for rule, cell in ("clean", clean[i]), ("paper", paper[i]), ("same", clean[0]):
                    out[rule][kind][k, part] = test[k, part, i, cell]
    for by_kind in out.values():
        if draws := [by_kind.pop(kind) for kind in kinds if kind.startswith("random")]:
            by_kind["random"] = torch.stack(draws).mean(0)
    return out, np.array(cells).reshape(len(test), FOLDS, 2)


def at_localisation(loc, values, target):
    """`values` where `loc`, both along the strength, first reaches `target`, linearly between; nan if it never does."""
    i = int((loc >= target).float().argmax())
    if loc[i] < target:
        return float("nan")
    w = float((target - loc[i - 1]) / (loc[i] - loc[i - 1])) if i else 1.0
    return float(w * values[i] + (1 - w) * values[max(0, i - 1)])


def diversity(model, world, args, runs, banks, cells, share=0.9):
    """Entropy given a local answer, in bits, at matched localisation, `share` of the explicit prompt's; for all cells.

    "steered": own vector, at the strength that just reaches it; "explicit": the prompt itself; "mixture": of explicit and
    implicit answers, as localised; "other language": the other explicit prompt. And the mean (loc, H, stereo) along strength.
    """
    rows, curves = {name: [] for name in ("steered", "explicit", "mixture", "other language")}, []
    s, other = world.main, "en" if world.main == "local" else "local"
    for (f, k), bank in banks.items():
        step = add(bank["own"][None], [args.layers[cells[k - 1, f, 0]]], np.linspace(0, 4, 33).tolist())
        for t in folds(world.tasks)[f]:
            (ask, _, p), (bare, _, p0) = runs[s, "own", k, t], runs[s, "none", k, t]
            m = measure(patched(model, bare, lambda _, step=step: step, args.prompts), bare.owner, k).mean(0)
            after, before, (i, j) = measure(p, ask.owner, k), measure(p0, bare.owner, k), pair(ask.items, bare.items)
            target = share * after[:, 0].mean()
            w = ((target - before[j, 0]) / (after[i, 0] - before[j, 0])).clamp(0, 1)[:, None]
            rows["steered"].append(at_localisation(m[:, 0], m[:, 4], target))
            others = after, measure(w * p[i] + (1 - w) * p0[j], ask.owner, k), measure(runs[other, "own", k, t][2], ask.owner, k)
            for name, x in zip(list(rows)[1:], others):
                rows[name].append(float(x[:, 4].mean()))
            curves.append(m[:, [0, 4, 5]])
    return rows, torch.stack(curves).mean(0)


def transfer(model, world, args):
    """The last token patched block by block, {context of the source: (L + 1, 3)}: mass on the target task's answers of the
    source's culture, on all that the source would say, on the target's default answers; row 0: after the embedding."""
    out, K = {"own": [], "none": []}, len(world.cultures)
    for k, t in [(k, t) for k in range(1, K) for t in world.tasks]:
        sources, ask = world.transfer(k, t)
        for c, prompts in sources.items():
            z = run(model, Ask(prompts, [], ask.tokens, ask.owner), args.prompts)[0]
            p = patched(model, ask, lambda rows, z=z: swap(z[:, rows]), args.prompts)
            out[c].append(torch.stack([p[..., ask.owner == o].sum(-1).mean(0) for o in (k, K + k, 0)], -1))
    return {c: torch.stack(v).mean(0) for c, v in out.items()}


@torch.no_grad()
def side_effects(model, world, args, runs, banks, cells):
    """On questions with one answer everywhere: (accuracy, KL from the plain model in nats) of the plain model, with the own
    vector in its cell, and with the last token of an explicit prompt put in that place, which localises as well."""
    rows = []
    for (f, k), bank in banks.items():
        layer, alpha = args.layers[cells[k - 1, f, 0]], args.alphas[cells[k - 1, f, 1]]
        prompts, answers = world.facts(world.language(world.main, k))
        z = runs[world.main, "own", k, world.tasks[0]][1][layer + 1, 0]
        steps, (idx, mask) = add(bank["own"][None], [layer], [0, alpha]), padded(prompts, model.wte.weight.device)

        def step(j, x, clean, steps=steps, z=z, layer=layer):
            x = steps(j, x, clean)
            return torch.cat((x, z.to(clean).expand_as(clean)[:, None]), 1) if j == layer else x

        for h, answer in zip(common.sweep(model, idx, step, mask=mask)[:, :, 0], answers):
            logp = model.unembed(h).float().log_softmax(-1)
            kl = (logp[0].exp() * (logp[0] - logp)).sum(-1)
            rows.append(torch.stack(((logp.argmax(-1) == answer).float(), kl), -1).cpu())
    return torch.stack(rows).mean(0)


def study(model, world, args, seed, untrained=None):
    """All measurements on one model, as plain numbers."""
    rng, main, K, out = np.random.default_rng([seed, 5]), world.main, len(world.cultures), {"conditions": {}}
    runs = collect(model, world, args)
    diffs = contrasts(runs, args.pairs)
    bare = contrasts(collect(untrained, world, args, ("none", "own")), "all") if untrained else None
    local = {}
    for s, c in [(s, c) for s in ("local", "en") for c in CONTEXTS]:
        cells = [runs[s, c, k, t] + (k,) for k in range(1, K) for t in world.tasks]
        m = torch.stack([measure(p, ask.owner, k, following(k, K)).mean(0) for ask, _, p, k in cells])
        local[s, c], out["conditions"][f"{s} {c}"] = m[:, 0].unflatten(0, (K - 1, -1)), m.mean(0)
    out["pairs"] = {world.cultures[k]: sum(len(diffs[main, "own", k, t]) for t in world.tasks) for k in range(1, K)}
    for s in ("local", "en"):
        banks, own = {}, {}
        for f, k in [(f, k) for f in range(FOLDS) for k in range(1, K)]:
            build = [t for i, part in enumerate(folds(world.tasks)) if i not in (f, (f + 1) % FOLDS) for t in part]
            own[f, k] = banks[f, k] = vectors(diffs, k, s, build, args, rng, bare)
            if s != main:
                banks[f, k] = {kind: own[f, k][kind] for kind in ("own", "cross", "neutral", "default")}
        g, kinds = grid(model, world, args, runs, banks, s), list(banks[0, 1])
        picked, cells = pick(g, world, kinds, len(args.alphas))
        out[f"steer {s}"] = {kind: {rule: picked[rule][kind].mean((0, 1)) for rule in picked} for kind in picked["clean"]}
        out[f"gain {s}"] = {kind: bootstrap(v[..., 0] - local[s, "none"], seed) for kind, v in picked["clean"].items()}
        best = g["test"][..., 0].mean((0, 1)).max(-1).values  # over the grid, on the tested answers
        out[f"best {s}"] = {kind: max(float(b) for b, name in zip(best, kinds) if name.startswith(kind)) for kind in picked["clean"]}
        if s == main:
            out |= {"picked": cells, "profile": g["test"][:, :, 0, :, 0].mean((0, 1)).unflatten(0, (len(args.layers), -1))}
            out["H"], out["frontier"] = diversity(model, world, args, runs, banks, cells)
            out["side effects"] = side_effects(model, world, args, runs, banks, cells)
            out["by culture"] = {c: picked["clean"]["own"][i].mean(0) for i, c in enumerate(world.cultures[1:])}
            layer = args.layers[int(np.bincount(cells[..., 0].ravel()).argmax())]
    out["patch"] = transfer(model, world, args)
    all_tasks = lambda k, s, plus="own": difference([diffs[s, plus, k, t] for t in world.tasks], args.avg)
    named = {f"{world.cultures[k]} {s}": all_tasks(k, s) for s in ("local", "en") for k in range(1, K)}
    v = F.normalize(torch.stack([v[layer + 1] for v in (named | {"neutral": all_tasks(1, main, "neutral")}).values()]), dim=1)
    out["cosines"] = [*named, "neutral"], v @ v.T
    if isinstance(world, Choice):
        out["spoken"] = spoken(model, world, args)
    if args.open:
        chosen = {k: named[f"{world.cultures[k]} {main}"][layer + 1] for k in range(1, K)}
        out["homogeneity"] = open_ended(model, world, args, chosen, layer, seed)
    return json.loads(json.dumps(out, default=lambda a: a.tolist()))


def run_toy(args, seed, skew, position=0):
    """Trains the toy and measures it; the model without skew, C1's control, only for its gap."""
    model, world = train_toy(args, seed, skew, position)
    out = {"divergence": divergence(model, world, args.prompts)}
    if skew:
        torch.manual_seed(seed + 1)
        return out | study(model, world, args, seed, GPT(model.config).to(model.wte.weight.device).eval())
    gaps = []
    for k, t in [(k, t) for k in range(1, world.N) for t in world.tasks]:
        asks = [world.ask(world.languages[k], c, t, k) for c in ("own", "none")]
        own, none = (measure(run(model, ask, args.prompts)[1], ask.owner, k)[:, 0].mean() for ask in asks)
        gaps.append(float(own - none))
    return out | {"gap": float(np.mean(gaps))}


def spoken(model, world, args):
    """The gap as the paper counts it: {"setting context": {rule: [accuracy, coverage]}}, means over cultures and tasks.

    Whole greedy answers of at most 15 tokens to numbered options, in both orders; the rules are those of `denominators`.
    """
    out = {}
    for s, c in [(s, c) for s in ("local", "en") for c in ("none", "own")]:
        cells = []
        for (task, country, lang), items in world.rows.items():
            if lang != world.language(s, world.cultures.index(country)):
                continue
            asked = [(row, order) for row in items.values() for order in (0, 1)]
            prompts = [world.write(lang, world.sentence(row, lang, c), row, order, "12") for row, order in asked]
            types = []
            for i in range(0, len(prompts), args.prompts):
                said = generate(model, prompts[i : i + args.prompts], 15, temperature=0, stop=world.tok.stops)
                for ids, (row, order) in zip(said, asked[i:]):
                    options = (row["local"], row["other"])[:: 1 - 2 * order]
                    which = parse_answer(world.tok.decode(ids).split("\n\n")[0], options)
                    types.append(None if which is None else ("local", "west")[which ^ order])
            cells.append(denominators(list(zip(types[::2], types[1::2]))))
        out[f"{s} {c}"] = {rule: np.mean([cell[rule] for cell in cells], 0) for rule in cells[0]}
    return out


def open_ended(model, world, args, chosen, layer, seed, alpha=2.0):
    """Texts without context, with the country named, and steered by chosen {k: (C,)} with strength 2 [C], in open.jsonl.

    Temperature .7, top-k 50, top-p .9 [C]. Returns homogeneity {condition: (inside a prompt, over all texts of a culture, as
    the paper has it)} of word counts [I]; the paper's embeddings, and its judge of stereotypes, are services.
    """
    rng, rows, tok, groups = np.random.default_rng([seed, 6]), [], world.tok, {}
    wrap = (lambda t: tok.chat([{"role": "user", "content": t}])) if tok.template else lambda t: world.encode(t + "\n")
    prompts = [(k, text, c) for k in chosen for text in world.data["open"]["en"] for c in ("implicit", "explicit", "steered")]
    for k, text, condition in tqdm(prompts, "texts", leave=False, disable=None):
        country = world.data["countries"].get(world.cultures[k], world.cultures[k])
        hint = f" You are speaking with a person from {country}." if condition == "explicit" else ""
        with steered(model, layer, (alpha if condition == "steered" else 0.0) * chosen[k]):
            said = generate(model, [wrap(text + hint)] * args.open, args.max_new, 0.7, 50, 0.9, tok.stops, int(rng.integers(2**31)))
        texts = [tok.decode([i for i in ids if i not in tok.stops]) for ids in said]
        rows += [{"culture": world.cultures[k], "prompt": text, "condition": condition, "text": t} for t in texts]
        groups.setdefault((condition, k), []).append(texts)
    common.write_jsonl(Path(args.out) / "open.jsonl", rows)
    number = {w: i for i, w in enumerate(sorted({w for r in rows for w in r["text"].lower().split()}))}
    words = lambda t: torch.tensor([number[w] for w in t.lower().split()], dtype=torch.long)
    alike = lambda texts: homogeneity(torch.stack([torch.bincount(words(t), minlength=len(number) + 1) for t in texts]))
    out = {c: ([], []) for c, _ in groups}
    for (c, _), parts in groups.items():
        out[c][0].append(np.mean([alike(texts) for texts in parts if len(texts) > 1]))
        out[c][1].append(alike(sum(parts, [])))
    return {c: [float(np.mean(x)) for x in pair] for c, pair in out.items()}


# -------------------------------------------------------------------------------------------------------- the verdict
# fmt: off


def judge(run, results, main, skew0):
    """The claims: medians over seeds, each beside a control that must fail. skew0: the gaps of C1's control model."""
    m = lambda f: float(np.median([f(r) for r in results]))
    real, mean = bool(run.args.model), lambda r, key, name: r["conditions"][key][MEASURES.index(name)]
    gap = lambda r, name="loc", c="own": mean(r, f"{main} {c}", name) - mean(r, f"{main} none", name)
    closed = lambda kind: m(lambda r: r[f"gain {main}"][kind][0] / gap(r))
    at = lambda kind, name, rule="clean": m(lambda r: r[f"steer {main}"][kind][rule][MEASURES.index(name)])
    none = lambda name: m(lambda r: mean(r, f"{main} none", name))

    if real:
        run.claim("C1", f"naming the country brings out the local answer (share of pairs, prompts: {main})", ".55 -> .90",
                  {"gap": m(lambda r: gap(r, "pairacc")), "implicit": none("pairacc"), "loc gap": m(gap),
                   "explicit en - implicit local": m(lambda r: mean(r, "en own", "pairacc") - mean(r, "local none", "pairacc"))},
                  {"neutral sentence": m(lambda r: gap(r, "pairacc", "neutral"))}, "gap >= .2 of pairs",
                  m(lambda r: gap(r, "pairacc")) >= 0.2, m(lambda r: gap(r, "pairacc", "neutral")) < 0.2)
    else:
        test = lambda g: g >= 0.4 and abs(g - 0.7) <= 0.1
        controls = {"no skew": float(np.median(skew0)), "neutral sentence": m(lambda r: gap(r, "loc", "neutral"))}
        run.claim("C1", "naming the country brings out the local answer (mass), as the text has it", ".55 -> .90",
                  {"gap": m(gap), "implicit": none("loc"), "KL to the text": m(lambda r: max(r["divergence"].values()))},
                  controls, "gap >= .4, .7 +- .1; controls < .1", test(m(gap)), max(controls.values()) < 0.1)

    fails = ["random", "shuffled", "neutral"] + ["untrained"] * (not real) + ["minus"]
    waste = at("own", "other") + at("own", "junk")
    spill = at("own", "other") - none("other") < at("own", "loc") - none("loc") if real else waste <= 0.15
    run.claim("C2", "a culture's own vector closes the gap on tasks it was not built from", ".21 to .67 of it",
              {"share closed": closed("own"), "loc": at("own", "loc"), "pairacc": at("own", "pairacc"),
               "other + junk": waste, "picked on the test": m(lambda r: (r[f"steer {main}"]["own"]["paper"][0]
               - mean(r, f"{main} none", "loc")) / gap(r))},
              {kind: closed(kind) for kind in fails}, ">= .4; " + ("others' answers rise less" if real else
              "other + junk <= .15") + "; controls < .1", closed("own") >= 0.4 and spill, max(map(closed, fails)) < 0.1)

    rise = lambda kind, name: at(kind, name, "same") - none(name)
    run.claim("C2b", "another culture's vector brings out that culture's answers, not the local ones (rise in mass)", "-",
              {"theirs": rise("wrong", "theirs"), "local": rise("wrong", "loc")},
              {"own vector, theirs": rise("own", "theirs"), "own vector, local": rise("own", "loc")}, "theirs > local",
              rise("wrong", "theirs") > rise("wrong", "loc"), rise("own", "theirs") <= rise("own", "loc"))

    run.claim("C3", "a vector built in another language works, too", ".44 of it", {"share closed": closed("cross"),
              "implicit vector": closed("implicit"), "one task's": closed("one task"), "centred": closed("centred")},
              {kind: closed(kind) for kind in ("random", "neutral")}, ">= .2; controls < .1",
              closed("cross") >= 0.2, max(closed("random"), closed("neutral")) < 0.1)

    explicit = m(lambda r: mean(r, "en own", "loc"))
    window = lambda r, c: max((row[0] for row in r["patch"][c] if row[0] > row[1]), default=0.0)
    run.claim("C4", "patching the last token from another task moves the culture first: the target's task, the source's culture",
              ".87 at layer 26 of 42", {"moved": m(lambda r: window(r, "own")), "explicit": explicit,
              "layer": m(lambda r: max(range(len(r["patch"]["own"])), key=lambda j: r["patch"]["own"][j][0]) - 1)},
              {"source without country": m(lambda r: window(r, "none"))},
              "moved >= half of explicit at a layer where the source's task is not copied; control < .1 of it",
              m(lambda r: window(r, "own")) >= 0.5 * explicit, m(lambda r: window(r, "none")) < 0.1 * explicit)

    def apart(r, a, b):
        d = np.array(r["H"][a], float) - np.array(r["H"][b], float)
        return bootstrap(d[~np.isnan(d)]) if (~np.isnan(d)).any() else [float("nan")] * 3
    diff = lambda a, b, i=0: m(lambda r: apart(r, a, b)[i])
    run.claim("C5", "steered answers are more diverse than explicit ones at 90 % of their localisation (bits)",
              "less alike in most", {"steered - explicit": diff("steered", "explicit"), "low": diff("steered", "explicit", 1),
              "high": diff("steered", "explicit", 2), "steered - mixture": diff("steered", "mixture"),
              "reached": m(lambda r: np.mean(~np.isnan(np.array(r["H"]["steered"], float))))},
              {"explicit, other language": diff("other language", "explicit"), "low": diff("other language", "explicit", 1)},
              "lower bound >= .1", diff("steered", "explicit", 1) >= 0.1, diff("other language", "explicit", 1) < 0.1)

    theirs = lambda kind: m(lambda r: r[f"steer {main}"][kind]["clean"][2] - mean(r, f"{main} none", "other"))
    run.claim("C6", "a universal vector, from other cultures only, still localises", ".22 to .43 of the gap",
              {"share closed": closed("universal"), "others' answers rise": theirs("universal"),
               "own vector": closed("own")}, {kind: closed(kind) for kind in ("random", "neutral")},
              ">= .1; controls < .1", closed("universal") >= 0.1, max(closed("random"), closed("neutral")) < 0.1)

    lost = lambda i: m(lambda r: r["side effects"][0][0] - r["side effects"][i][0])
    run.claim("C7", "questions with one answer everywhere are still answered", "-", {"accuracy lost": lost(1),
              "KL": m(lambda r: r["side effects"][1][1]), "accuracy": m(lambda r: r["side effects"][0][0])},
              {"last token patched in, lost": lost(2), "KL": m(lambda r: r["side effects"][2][1])}, "< .02 lost",
              lost(1) < 0.02, lost(2) >= 0.02)


BLUE, RED, GREEN, GOLD, GREY = "#4477aa", "#ee6677", "#228833", "#ccbb44", "#999999"


def draw(path, r, args, world, title):
    """One picture of a run: the gap, what each vector closes of it, layers, the patch, diversity, cosines."""
    main, i = world.main, MEASURES.index("pairacc" if args.model else "loc")
    with common.figure(path, 2, 3, (4.2, 3.2)) as (bars, kinds, layers, patch, frontier, matrix):
        for x, (setting, colour) in enumerate((("local", BLUE), ("en", RED))):
            values = [r["conditions"][f"{setting} {c}"][i] for c in CONTEXTS]
            bars.bar(np.arange(4) + 0.4 * x, values, 0.38, color=colour,
                     label="in the local language" if setting == "local" else "in English")
        bars.set(title=f"{title}: what the sentence in front does", ylim=(0, 1.25), xticks=np.arange(4) + 0.2,
                 ylabel="local beats default, share of pairs" if args.model else "mass on local answers")
        bars.set_xticklabels(["none", "neutral", "default\ncountry", "own\ncountry"])
        bars.legend(fontsize=7, ncols=2)
        gap = r["conditions"][f"{main} own"][0] - r["conditions"][f"{main} none"][0]
        rows = list(r[f"gain {main}"].items())[::-1]
        control = {"minus", "wrong", "default", "neutral", "shuffled", "untrained", "random"}
        for y, (kind, (mid, low, high)) in enumerate(rows):
            kinds.barh(y, mid / gap, color=GREY if kind in control else GREEN)
            kinds.plot([low / gap, high / gap], [y, y], color="k", lw=1)
        kinds.axvline(1, color="k", ls=":", lw=1)
        kinds.set(title="Share of the gap closed, unseen tasks (grey: controls)", yticks=range(len(rows)))
        kinds.set_yticklabels([kind for kind, _ in rows])
        for alpha, line, colour in zip(args.alphas, np.array(r["profile"]).T, (GOLD, RED, GREEN, BLUE, GREY)):
            layers.plot(args.layers, line, "o-", ms=3, color=colour, label=f"strength {alpha:g}")
        for c, style in ("own", "--"), ("none", ":"):
            layers.axhline(r["conditions"][f"{main} {c}"][0], color="k", ls=style, lw=1,
                           label={"own": "explicit", "none": "implicit"}[c])
        layers.set(title="Own vector added after one block", xlabel="layer", ylabel="mass on local answers")
        p = np.array(r["patch"]["own"])
        labels = "source's culture, target's task", "all of the source", "default culture: no effect"
        for line, label, colour in zip(p.T, labels, (GREEN, GREY, BLUE)):
            patch.plot(np.arange(len(p)) - 1, line, color=colour, label=label)
        patch.plot(np.arange(len(p)) - 1, np.array(r["patch"]["none"])[:, 0], color=GREEN, ls=":", label="source without country")
        patch.set(title="Last token patched from another task", xlabel="layer", ylabel="mass", ylim=(-0.02, 1.45 * p.max()))
        line = np.array(r["frontier"])
        frontier.plot(line[:, 0], line[:, 1], "o-", ms=3, color=GREEN, label="own vector, strength 0 to 4")
        ends = np.array([[r["conditions"][f"{main} {c}"][j] for j in (0, 4)] for c in ("none", "own")])
        frontier.plot(*ends.T, "s--", color=BLUE, label="implicit, explicit, between")
        frontier.plot(0.1 * ends[0, 0] + 0.9 * ends[1, 0] if not args.model else 0.9 * ends[1, 0], np.mean(r["H"]["mixture"]),
                      "D", color=GOLD, label="mixture of both")
        frontier.set(title="Diversity against localisation", xlabel="mass on local answers",
                     ylabel="entropy given a local answer, bits")
        names, cos = r["cosines"]
        image = matrix.imshow(cos, vmin=-1, vmax=1, cmap="RdBu_r")
        matrix.figure.colorbar(image, ax=matrix, shrink=0.8)
        matrix.set(title="Cosines of the vectors", xticks=range(len(names)), yticks=range(len(names)))
        matrix.set_xticklabels(names, rotation=90, fontsize=6)
        matrix.set_yticklabels(names, fontsize=6)
        for ax in (layers, patch, frontier):
            ax.legend(fontsize=7)


def report(name, r, main):
    """Prints the tables of a run: conditions, vectors, layers x strengths, spoken answers."""
    print(f"\n{name}: KL to the text " + str({k: round(v, 3) for k, v in r["divergence"].items()})
          + (" UNDER-TRAINED" if max(r["divergence"].values()) > 0.05 else "") if "divergence" in r else f"\n{name}")
    print(f"  {'prompt':24s}" + "".join(f"{n:>9s}" for n in MEASURES[:7]))
    for key, row in r["conditions"].items():
        print(f"  {key:24s}" + "".join(f"{v:9.3f}" for v in row[:7]))
    for setting in ("local", "en"):
        for kind, rules in r[f"steer {setting}"].items():
            print(f"  {setting + ' + ' + kind:24s}" + "".join(f"{v:9.3f}" for v in rules["clean"][:7])
                  + f"   picked on the test {rules['paper'][0]:.3f}, in own's cell {rules['same'][0]:.3f}, "
                  f"grid maximum {r[f'best {setting}'][kind]:.3f}")
    for context, rules in (r.get("spoken") or {}).items():
        print(f"  spoken, {context}: {rules}")


# fmt: on
# --------------------------------------------------------------------------------------------------------------- main


def prepare(args, env):
    """Checks the flags, fills in defaults; returns the real (model, world), or None for the toy."""
    toy = not args.model
    args.alphas = args.alphas or ([0.5, 1, 1.5, 2, 3] if toy else [1, 2])
    if not all(math.isfinite(a) and a for a in args.alphas):
        raise ValueError(f"--alphas {' '.join(map(str, args.alphas))}, allowed: finite numbers, not 0")
    limits = {"draws": (1, 1000), "prompts": (1, 10**6), "open": (0, 10**4), "max_new": (1, 10**5), "skew": (0.1, 1)}
    for flag, (low, high) in limits.items():
        if not low <= getattr(args, flag) <= high:
            raise ValueError(f"--{flag.replace('_', '-')} {getattr(args, flag)}, allowed: {low} to {high}")
    model, world, n = None, None, args.n_layer
    if toy:
        for flag in ("dataset", "open"):
            if getattr(args, flag):
                raise ValueError(f"--{flag} needs --model: the toy makes its own documents")
        for seed in args.seeds:
            config = config_of(args, Toy(seed, args.skew))
            if args.resume:
                common.check_resume(Path(args.out) / f"skew{args.skew:g}-s{seed}.pt", config)
    else:
        data, table = json.loads(LISTS.read_text("utf-8")), args.dataset.endswith(".csv")
        if args.dataset.endswith(".json"):
            data |= json.loads(Path(args.dataset).read_text("utf-8"))
        elif args.dataset and not table:
            raise ValueError(f"--dataset {args.dataset}, allowed: FILE.json or FILE.csv")
        rows = read_rows(args.dataset) if table else None
        model, tok = pretrained.load(args.model, env.device, args.dtype)
        chosen = args.format if args.format != "auto" else "choice" if table or tok.template else "cloze"
        if table and chosen == "cloze":
            raise ValueError("--format cloze takes --dataset FILE.json")
        world = Choice(tok, data, rows or choice_rows(data)) if chosen == "choice" else Cloze(tok, data)
        n, args.draws = model.config.n_layer, min(args.draws, 3)
    args.layers = args.layers or list(range(n) if toy else range(n // 2, n - n // 6))
    if not all(0 <= layer < n for layer in args.layers):
        raise ValueError(f"--layers {' '.join(map(str, args.layers))}, allowed: 0 to {n - 1}")
    args.layers = sorted({*args.layers})
    return None if toy else (model.eval(), world)


def main(argv=None):
    """The paper end to end; returns what it writes to result.json."""
    args = common.parse(Args, argv)
    with common.bad_input():
        env, out = common.setup(args), Path(args.out)
        run = common.Run(args, env, "culture", "2504.10191")
        out.mkdir(parents=True, exist_ok=True)
        real = prepare(args, env)
        name = Path(args.model).name if real else "toy"
        if real:
            results, skew0, world = [study(*real, args, seed) for seed in args.seeds], [], real[1]
    if not real:
        jobs = args.jobs if env.device.type == "cpu" and env.world == 1 else 1
        runs = [(seed, skew) for seed in args.seeds for skew in (args.skew, 0.0)]
        results = common.side_by_side(run_toy, [(args, *r, i % jobs) for i, r in enumerate(runs)], jobs)
        skew0, results, world = [r["gap"] for r in results[1::2]], results[::2], Toy(args.seeds[0], args.skew)
    if env.rank:
        return None
    judge(run, results, world.main, skew0)
    logs = []
    for seed, r in zip(args.seeds, results):
        run.metrics[f"{name}-s{seed}"] = r
        report(f"{name}, seed {seed}", r, world.main)
        if real:
            logs.append(log := common.Log(out, f"{name}-s{seed}", env))
            log.rewind(-1)
            for layer, line in zip(args.layers, r["profile"]):
                log(layer, layer=layer, **{f"loc_{a:g}": v for a, v in zip(args.alphas, line)})
        else:
            logs += [common.Log(out, f"skew{skew:g}-s{seed}", env) for skew in (args.skew, 0.0)]
    draw(out / "culture.png", results[0], args, world, name)
    return run.finish(logs)


if __name__ == "__main__":
    main()
