"""Localized cultural knowledge (arXiv 2504.10191): it is there, it stays silent, and one vector makes it speak.

Ask a model in Turkish for a first name and it says an American one; say "I live in Turkey" and it knows better. The
accuracy with the country in the prompt (explicit) minus that without (implicit) is the *explicit-implicit gap*. The
mean difference of the residual stream at the last prompt token, explicit minus implicit, is a vector: added after one
block, it localises answers without a word about the country, on other tasks and in other languages than it was built
from, even a *universal* one built from other cultures. And naming the country makes answers more alike and more
stereotyped; steering is said to keep more of their diversity.

The toy: five cultures, five languages, eight tasks with six answers each. In text without context the answers are of
the default culture in seven documents of ten: so the *size* of the gap is put in, and so is that text which names a
country is stereotyped. Not put in: that one additive direction moves the model, what it does to other tasks, languages
and cultures, and to diversity. Nothing here is about real cultures; the lists for real models are examples.

Rungs: the toy -> base models (`--model gemma-3-270m`): sentences to complete -> instruct models, or a CSV: the paper's
questions with two options. Localisation is exact probability here, no judge's opinion.
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

import legacy as common
import pretrained
from model import GPT, GPTConfig, generate

LISTS = Path(__file__).with_name("cultures.json")
CONTEXTS = "none", "neutral", "default", "own"  # the sentence in front: no, of music, of the default country, one's own
MEASURES = "loc", "def", "other", "junk", "H", "stereo", "pairacc", "theirs"
SHORT = "tv", "currency"  # tasks whose answers may be of one or two letters
FOLDS = 4  # of the tasks: one tests a vector, on one its layer and strength are picked, the others build it


@dataclass
class Args(common.TrainFlags):
    """culture"""

    presets: ClassVar[dict] = {
        "smoke": dict(steps=8, n_layer=2, n_embd=32, warmup=2, alphas=[1.0], draws=2, pairs="all", jobs=1, threads=1),
        "toy": dict(steps=800, batch_size=32, lr=4e-3, weight_decay=0.01, eval_every=400),
        "paper": dict(
            model="google/gemma-2-9b-it", device="cuda", layers=list(range(21, 28)), alphas=[-2.0, -1.0, 1.0, 2.0]
        ),
    }
    limits: ClassVar[dict] = {"draws": (0, 1000), "prompts": (1, 10**6), "skew": (0.1, 1)}
    model: str = ""
    """a pretrained model in place of the toy: gemma-3-270m, a hub id, a folder (paper: gemma-2-9b-it and six more)"""
    dataset: str = ""
    """real models: FILE.json as cultures.json, or FILE.csv: task,country,lang,hint,question,local,other[,id]; id joins
    a question's languages"""
    layers: list[int] = field(default_factory=list)
    """blocks to steer; default all of the toy, of a real model 9 to 14 in 18 (paper: 21 to 27 of 42)"""
    alphas: list[float] = field(default_factory=list)
    """strengths; default .5 1 1.5 2 3 for the toy, 1 2 for a real model (paper: -2 -1 1 2)"""
    pairs: Literal["auto", "answered", "all"] = "auto"
    """build vectors from prompts answered locally only with the country (paper), or all; auto: all for sentences"""
    draws: int = 0
    """random directions; default 20 for the toy, 3 for a real model"""
    prompts: int = 32
    """prompts in a batch"""
    skew: float = 0.7
    """toy: share of documents without context that answer as the default culture does"""
    n_layer: int = 4
    """blocks of the toy (paper: 42)"""
    n_embd: int = 64
    """its width (paper: 3584)"""


# -------------------------------------------------------------------------------------------------------- the method


@dataclass
class Ask:
    """n prompts and the first tokens of what may follow."""

    prompts: list  # n id lists
    items: list  # n names of questions: a vector's pairs are the same question with and without the sentence
    tokens: torch.Tensor  # (n, A) answer tokens
    owner: torch.Tensor  # (A,) the culture whose answer it is

    def batches(self, size, device):
        """Slices of rows, with ids (B, T) padded on the left, their mask of real tokens, and the answers."""
        for i in range(0, len(self.prompts), size):
            idx, mask = common.padded(self.prompts[i : i + size], device)
            yield slice(i, i + size), idx, mask, self.tokens[i : i + size].to(device)


def read(model, h, tokens):
    """P (B, V, A) of answer tokens (B, A) from normed residual vectors h (B, V, C)."""
    (B, V, _), size = h.shape, max(1, 2**24 // model.config.vocab_size)  # rows of logits at once
    tokens, out = tokens[:, None].expand(B, V, -1).flatten(0, 1), []
    for part, t in zip(h.flatten(0, 1).split(size), tokens.split(size)):
        logits = model.unembed(part).float()
        out.append((logits.gather(1, t) - logits.logsumexp(1, keepdim=True)).exp())
    return torch.cat(out).unflatten(0, (B, V)).cpu()


@torch.no_grad()
def run(model, ask, size):
    """Each prompt once: the last token's residual stream (L + 1, n, C), embedding and every block, and P (n, A)."""
    z, p = [], []
    for _, idx, mask, tokens in ask.batches(size, model.wte.weight.device):
        x = common.residuals(model, idx, mask)[:, :, 0]
        z.append(x.cpu())
        p.append(read(model, model.final(x[-1])[:, None], tokens)[:, 0])
    return torch.cat(z, 1), torch.cat(p)


@torch.no_grad()
def patched(model, ask, step, size):
    """P (n, V, A) under each of V patches, all in one pass: step(rows) is that of some prompts for `common.sweep`."""
    batches = ask.batches(size, model.wte.weight.device)
    return torch.cat([read(model, common.sweep(model, idx, step(rows), mask=mask)[:, :, 0], tokens)
                      for rows, idx, mask, tokens in batches])  # fmt: skip


def add(v, layers, alphas):
    """Steering as a step of `common.sweep`: h^l += alpha v^l at the last token [C], V = layers x vectors x alphas.

    v (n, L + 1, C), from the embedding on. Where text is generated, see `steered`.
    """
    scaled = (torch.tensor(alphas)[None, :, None, None] * v[:, None]).flatten(0, 1).transpose(0, 1)
    put = lambda j, clean: clean[:, None] + scaled[j + 1][:, None].to(clean)
    return lambda j, x, clean: torch.cat((x, put(j, clean)), 1) if j in layers else x


def swap(z):
    """Patching [C] as a step: a source's last token z (L + 1, B, C) in place of the prompt's own, after every block."""
    return lambda j, x, clean: torch.cat((x, z[j + 1][:, None, None].to(clean)), 1)


def steered(model, layer, v):
    """A context in which `generate` adds v (C,) after block `layer` at the last prompt token and all later ones [C]."""
    return model.patch({f"blocks.{layer}.resid_post": lambda x: torch.cat((x[:, :-1], x[:, -1:] + v.to(x)), 1)})


def measure(p, owner, k, theirs=0):
    """What culture k's answers get of probabilities p (..., A): (..., 8), in the order of MEASURES.

    loc, def, other, junk: mass on k's answers, the default culture's (k = 0: all others'), the others', on all else.
    H: entropy in bits *given* an answer of k; stereo: the largest share among those. pairacc: share of pairs (k's
    answer, a default one) with the first likelier, the paper's accuracy over all pairs. theirs: mass on that culture.
    """
    own, west, total = owner == k, owner == 0 if k else owner > 0, p.sum(-1)
    loc, default = p[..., own].sum(-1), p[..., west].sum(-1)
    q = p[..., own] / loc[..., None].clamp(min=1e-30)
    H = -(q * q.clamp(min=1e-30).log2()).sum(-1)
    pairacc = (p[..., own, None] > p[..., None, west]).float().mean((-2, -1))
    rest = total - loc - default, 1 - total, H, q.max(-1).values, pairacc, p[..., owner == theirs].sum(-1)
    return torch.stack((loc, default, *rest), -1)


def pair(plus, minus):
    """The same questions: rows of the items `plus`, and of `minus`; those without a partner are left out."""
    at = {item: j for j, item in enumerate(minus)}
    found = [(i, at[item]) for i, item in enumerate(plus) if item in at]
    return [i for i, _ in found], [j for _, j in found]


def difference(parts, avg="micro"):
    """Mean of paired differences (n, ...) of several tasks: micro, all pairs alike, or macro, all tasks alike."""
    if not (parts := [part for part in parts if len(part)]):
        raise ValueError("nothing is answered locally with the country and not without; --pairs all takes all")
    return torch.cat(parts).mean(0) if avg == "micro" else torch.stack([part.mean(0) for part in parts]).mean(0)


def shuffled(diffs, rng):
    """Mean of paired differences (n, ...), half of their signs turned at random: labels that mean nothing."""
    order, half = torch.from_numpy(rng.permutation(len(diffs))), len(diffs) // 2
    return (diffs[order[:half]].sum(0) - diffs[order[half : 2 * half]].sum(0)) / max(1, 2 * half)


def parse_answer(text, options):
    """Index of the option that a text names first, by its number or its words; None if it names none [C].

    "12" names neither 1 nor 2 (in the paper's code it does).
    """
    marks = [(rf"(?<!\d){i + 1}(?!\d)|(?<!\w){re.escape(option)}(?!\w)", i) for i, option in enumerate(options)]
    found = [(match.start(), i) for pattern, i in marks if (match := re.search(pattern, text))]
    return min(found)[1] if found else None


def denominators(types):
    """{rule: (accuracy, coverage)} of items asked in both orders, types [("local" | "west" | None) x 2].

    consistent: items with the same answer in both orders, the paper's [C]; valid: runs that named an option; all.
    """
    runs, same = [t for both in types for t in both], [a for a, b in types if a == b and a]
    valid, share = [t for t in runs if t], lambda part: sum(t == "local" for t in part) / max(1, len(part))
    rules = {"consistent": (same, len(types)), "valid": (valid, len(runs)), "all": (runs, len(runs))}
    return {rule: (share(part), len(part) / n) for rule, (part, n) in rules.items()}


# ----------------------------------------------------------------------------------------------- worlds: what is asked


class World:
    """Cultures (0 is the default), their languages, and tasks, asked as sentence + question."""

    main = "local"  # where the gap is looked for: prompts in each culture's own language; Cloze: in English

    def language(self, setting, k):
        return self.languages[k if setting == "local" else 0]

    def ask(self, lang, context, task, k):
        """A task in a language, after each of the sentences of a context."""
        questions, sentences = self.questions(lang, task), self.sentences(lang, context, k)
        prompts = [self.encode(s + q) for s in sentences for q in questions]
        tokens, owner = self.answers(task)
        return Ask(prompts, [*range(len(questions))] * len(sentences), tokens.expand(len(prompts), -1), owner)

    def transfer(self, k, task):
        """Patch sources, another task in k's language with k's country or without; targets, `task` in English without.

        What may follow: the target task's answers, and the source task's, of "culture" n_cultures + owner.
        """
        other = self.tasks[(self.tasks.index(task) + 1) % len(self.tasks)]
        target, (tokens, owner) = self.ask(self.languages[0], "none", task, k), self.answers(other)
        n, asks = len(target.prompts), {c: self.ask(self.languages[k], c, other, k).prompts for c in ("own", "none")}
        target.tokens = torch.cat((target.tokens, tokens.expand(n, -1)), 1)
        target.owner = torch.cat((target.owner, owner + len(self.cultures)))
        return {c: [prompts[i % len(prompts)] for i in range(n)] for c, prompts in asks.items()}, target


class Toy(World):
    """The toy's words, documents and true probabilities.

    Text is words with spaces, one token each: `I.fr live.fr ru.fr ;.fr cities.fr ?.fr cities:Moscow(ru) ;`
    """

    N, FACTS, SHOTS, NATIVE, STEREO = 5, 4, 6, 0.5, 2.0  # answer r of a culture and task: p_r ~ (r + 1)^-power

    def __init__(self, seed, skew):
        data, rng, n = json.loads(LISTS.read_text("utf-8")), np.random.default_rng([seed, 1]), self.N
        self.seed, self.skew, self.cultures, self.languages = seed, skew, data["cultures"][:n], data["languages"][:n]
        self.tasks = list(data["answers"])[:8]
        cells = [(t, c, a) for t in self.tasks for c in self.cultures for a in data["answers"][t][c].split("|")[:6]]
        words = ["<pad>", "<bos>", ";"] + [f"{t}:{a.split('/')[0].replace(' ', '_')}({c})" for t, c, a in cells]
        words += [f"fact{i}" for i in range(self.FACTS)]
        asked = [*self.tasks, *(f"what{i}" for i in range(self.FACTS))]  # the last ones have one answer everywhere
        parts = "I live am_from grew_up_in like ; ?".split() + [f"thing{i}" for i in range(6)] + asked + self.cultures
        words += [f"{w}.{l}" for l in self.languages for w in parts]
        self.words, self.number = words, {w: i for i, w in enumerate(words)}
        self.answer = 3 + np.arange(48 * n).reshape(8, n, 6)  # ids by task, culture, rank
        self.names = {l: [f"{name}.{l} ?.{l}" for name in asked] for l in self.languages}
        foreign = [(l, c) for l in range(1, n) for c in range(n) if l != c]
        self.held = [foreign[i] for i in rng.permutation(16)[:8]]  # (language, country) that no document has
        combos = [(l, l) for l in range(1, n)] * 2 + [(0, c) for c in range(n)]
        self.combos = np.array(combos + [combo for combo in foreign if combo not in self.held])
        ids = lambda f: np.array([[self.encode(text)[1:] for text in f(l)] for l in self.languages])
        self.shots, self.neutral = ids(lambda l: self.names[l]), ids(lambda l: self.sentences(l, "neutral", 0))
        self.own = np.stack([ids(lambda l, k=k: self.sentences(l, "own", k)) for k in range(n)], 1)  # l, k, verb, word

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
        answers = [self.number[f"fact{i}"] for i in range(self.FACTS)]
        return [self.encode(name) for name in self.names[lang][8:]], answers

    def truth(self, lang, context, k):
        """What the documents say first after such a beginning: P (30,) of a task's answers, by culture and rank."""
        native, stereo = (np.arange(1, 7.0) ** -power for power in (self.NATIVE, self.STEREO))
        p = np.zeros((self.N, 6))
        if context == "own":
            p[k] = stereo / stereo.sum()
        else:
            p[0] += self.skew * native / native.sum()
            p[self.languages.index(lang)] += (1 - self.skew) * native / native.sum()
        return torch.from_numpy(p).flatten().float()

    def documents(self, rng, n):
        """n documents: ids (n, T), and their (language, kind, culture that answers). Kinds: 0 none, 1 own, 2 neutral.

        Half have no context, .35 name a country, .15 begin with a neutral sentence. One culture answers all of a
        document's questions: the country's; else the default with probability `skew`, or the language's.
        """
        kind, lang = np.searchsorted([0.5, 0.85], rng.random(n), side="right"), rng.integers(self.N, size=n)
        combo = self.combos[rng.integers(len(self.combos), size=n)]
        lang = np.where(kind == 1, combo[:, 0], lang)
        culture = np.where(kind == 1, combo[:, 1], np.where(rng.random(n) < self.skew, 0, lang))
        task = rng.integers(8 + self.FACTS, size=(n, self.SHOTS))
        p = np.arange(1, 7.0) ** -np.where(kind == 1, self.STEREO, self.NATIVE)[:, None]
        rank = (rng.random((n, self.SHOTS, 1)) > (p.cumsum(1) / p.sum(1, keepdims=True))[:, None]).sum(2)
        answer = np.where(task < 8, self.answer[task % 8, culture[:, None], rank], self.number["fact0"] + task - 8)
        answer = answer[..., None]
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
        return {"idx": idx, "targets": targets, "weights": ((targets > 2) & (targets < self.number["I.en"])).float()}


def config_of(args, world):
    """A small Llama without biases, embedding and unembedding tied."""
    plain = dict(norm="rms", tie=True, qkv_bias=False, attn_bias=False, mlp_bias=False)
    return GPTConfig(len(world.words), 64, args.n_layer, 4, args.n_embd, **plain)


def divergence(model, world, size):
    """KL(generator || model) of a document's first answer, mean over languages and tasks: {"kl_<context>": nats}."""
    out = {}
    for context in "none", "neutral", "own":
        kl = []
        for k, lang in enumerate(world.languages):
            truth, asks = world.truth(lang, context, k), [world.ask(lang, context, task, k) for task in world.tasks]
            prompts, tokens = sum((ask.prompts for ask in asks), []), torch.cat([ask.tokens for ask in asks])
            p = run(model, Ask(prompts, [], tokens, None), size)[1]
            kl.append(F.kl_div(p.clamp(min=1e-12).log(), truth.expand_as(p), reduction="batchmean").item())
        out[f"kl_{context}"] = float(np.mean(kl))
    return out


def train_toy(args, seed, skew, position=0):
    """The toy's model, trained, and its world."""
    env, world, _ = common.setup(args), Toy(seed, skew), torch.manual_seed(seed)
    model, log = GPT(config_of(args, world)), common.Log(args.out, f"skew{skew:g}-s{seed}", env)
    batch, evaluate = lambda step: world.batch(step, args, env), lambda step: divergence(model, world, 256)
    common.train(model, batch, args, env, log, evaluate, position)
    return model.eval(), world


class Cloze(World):
    """Sentences to complete, for base models: `I live in Turkey. My favourite drink is` -> an answer's first token.

    Every spelling in the lists counts, in any language. First tokens of two cultures are dropped, as are pieces of
    under three letters (but for TV channels and currencies) [pilot].
    """

    main = "en"

    def __init__(self, tok, data):
        self.tok, self.data, self.kept = tok, data, {}
        self.cultures, self.languages, self.tasks = data["cultures"], data["languages"], list(data["answers"])
        for task, lists in data["answers"].items():
            words = [[s for a in lists[c].split("|") for s in a.split("/")] for c in self.cultures]
            firsts, letters = [{tok.encode(" " + s)[0] for s in own} for own in words], 1 if task in SHORT else 3
            kept = [(t, k) for k, own in enumerate(firsts) for t in sorted(own) if sum(t in f for f in firsts) == 1]
            kept = [(t, k) for t, k in kept if len(tok.decode([t]).strip()) >= letters]
            if missing := {*range(len(firsts))} - {k for _, k in kept}:
                raise ValueError(f"{task}, {self.cultures[min(missing)]}: no answer has a first token of its own")
            self.kept[task] = tuple(map(torch.tensor, zip(*kept)))

    def encode(self, text):
        return self.tok.encode(text, bos=True)

    def sentences(self, lang, context, k):
        hints = self.data["hints"][lang]
        if context == "none":
            return [""]
        if context == "neutral" or context in hints and context == "default":
            return hints[context].split("|")
        country = self.data["countries"][self.cultures[k if context == "own" else 0]]
        return [hint.format(country) for hint in hints["own"].split("|")]

    def questions(self, lang, task):
        return self.data["prompts"][lang][task].split("|")

    def answers(self, task):
        return self.kept[task]

    def facts(self, lang):
        """Sentences with one ending everywhere, in English, and the endings' first tokens."""
        parts = [fact.split("|") for fact in self.data["facts"]]
        return [self.encode(text) for text, _ in parts], [self.tok.encode(answer)[0] for _, answer in parts]


def split(whole):
    """What several id lists share, and the next id of each; none if one is the beginning of another."""
    same = os.path.commonprefix(whole)
    return same, [ids[len(same)] for ids in whole] if len(same) < min(map(len, whole)) else []


class Choice(Cloze):
    """The paper's questions with two options, in both orders [C]: of a CSV, or made of the lists.

    To steer: options as strings and the assistant's `My guess is **` begun, so that the next token starts the answer.
    For the gap: numbered options and a whole answer. Base models see two demonstrations.
    """

    main = "local"
    DEMOS = ("What am I?", ("Human", "Robot")), ("Which planet is closest to the sun?", ("Mercury", "Venus"))

    def __init__(self, tok, data, rows):
        """rows: dicts of task, country, lang, hint, question, local, other, and id, a question's in all languages."""
        self.tok, self.data, self.rows = tok, data, {}
        for r in rows:
            if r["lang"] not in data["frame"]:
                raise ValueError(f"lang {r['lang']!r}, allowed: {', '.join(data['frame'])}")
            old = self.rows.setdefault((r["task"], r["country"], r["lang"]), {}).setdefault(r["id"], r)
            old["hint"] = old["hint"] or r["hint"]  # rows with and without it are one question
        self.tasks, countries = list(dict.fromkeys(r["task"] for r in rows)), {r["country"] for r in rows}
        self.cultures = sorted(countries, key=lambda c: (c != "us", c))
        if "us" not in countries or len(countries) < 3 or len(self.tasks) < FOLDS:
            raise ValueError(f"{self.cultures} x {self.tasks}, needed: country us and two more, {FOLDS} tasks")
        spoken = lambda c: sorted({lang for _, country, lang in self.rows if country == c} - {"en"})
        self.languages = ["en"] + [(spoken(c) or ["en"])[0] for c in self.cultures[1:]]
        for c, own in zip(self.cultures, self.languages):
            for key in [(t, c, l) for l in ("en", own) for t in self.tasks]:
                if key not in self.rows or not all(row["hint"].strip() for row in self.rows[key].values()):
                    what = "a question has no hint" if key in self.rows else "no questions"
                    raise ValueError(f"{', '.join(key)}: {what}")
            if not all(self.rows[t, c, "en"].keys() & self.rows[t, c, own].keys() for t in self.tasks):
                raise ValueError(f"{c}: no question has the same id in en and {own}")

    def write(self, lang, sentence, row, order, labels="", answer=""):
        """Ids of a prompt, `answer` included; order 1: the local option second; `labels` stand before the options."""
        header, rule, options, answers, prefix = self.data["frame"][lang]
        rule = f" {rule}" if labels else ""

        def body(question, pair):
            lines = [f"{mark}{o}" for mark, o in zip([f"{m}. " for m in labels] or ["- "] * 2, pair)]
            return "\n".join([f"{header}{rule} {question}", options, *lines])

        text = body(sentence + row["question"], (row["local"], row["other"])[:: 1 - 2 * order])
        if self.tok.template:
            return self.tok.chat([{"role": "user", "content": text}], ("" if labels else prefix) + answer)
        demos = [f"{body(q, o)}\n{answers} {labels[0] if labels else o[0]}\n\n" for q, o in self.DEMOS]
        return self.encode("".join(demos) + f"{text}\n{answers}{' ' if answer else ''}{answer}")

    def sentence(self, row, lang, context):
        if context in ("own", "none", "steered"):
            return row["hint"].strip() + " " if context == "own" else ""
        return self.sentences(lang, context, 0)[0]

    def ask(self, lang, context, task, k):
        """All questions in both orders; what may follow: the first token of the local answer, and of the other."""
        prompts, items, tokens = [], [], []
        for i, order in [(i, order) for i in self.rows[task, self.cultures[k], lang] for order in (0, 1)]:
            row = self.rows[task, self.cultures[k], lang][i]
            sentence = self.sentence(row, lang, context)
            same, firsts = split([self.write(lang, sentence, row, order, "", row[a]) for a in ("local", "other")])
            if firsts:  # else one answer begins with the other
                prompts, items, tokens = prompts + [same], items + [(i, order)], tokens + [firsts]
        if not prompts:
            raise ValueError(f"{task}, {self.cultures[k]}, {lang}: one answer begins with the other in every question")
        return Ask(prompts, items, torch.tensor(tokens), torch.tensor([k, int(not k)]))

    def transfer(self, k, task):
        """Targets in English, options 1 and 2; sources in k's language, options swapped, A and B [C]; at most 50."""
        lang, prompts, tokens, sources = self.languages[k], [], [], {"own": [], "none": []}
        english, local = (self.rows[task, self.cultures[k], l] for l in ("en", lang))
        for en, own in [(english[i], local[i]) for i in english if i in local][:50]:
            same, firsts = split([self.write("en", "", en, 0, "12", mark) for mark in "12"])
            for c in sources:
                ids, (_, label) = split([self.write(lang, self.sentence(own, lang, c), own, 1, "AB", m) for m in "AB"])
                sources[c].append(ids)
            prompts, tokens = prompts + [same], tokens + [[*firsts, label]]
        return sources, Ask(prompts, [], torch.tensor(tokens), torch.tensor([k, 0, k + len(self.cultures)]))


def choice_rows(data):
    """Questions made of the lists: the r-th local answer or the r-th American one (for the US the second culture's)."""
    rows = []
    for k, (country, native) in enumerate(zip(data["cultures"], data["languages"])):
        for lang, task in [(l, t) for l in dict.fromkeys(("en", native)) for t in data["questions"][l]]:
            lists, hint = data["answers"][task], data["hints"][lang]["own"].split("|")[0]
            pairs = zip(lists[country].split("|"), lists["us" if k else data["cultures"][1]].split("|"))
            for i, pair in enumerate(pairs):  # of several spellings the last is Cyrillic, where the list has it
                local, other = (text.split("/")[-1 if lang == "ru" else 0] for text in pair)
                row = dict(task=task, country=country, lang=lang, hint=hint.format(data["countries"][country]))
                rows.append(row | dict(question=data["questions"][lang][task], local=local, other=other, id=i))
    return rows


def read_rows(path):
    """The questions of a CSV file; `id` joins a question's languages, and its rows with and without hint."""
    needed = "task country lang hint question local other".split()
    rows = list(csv.DictReader(Path(path).read_text("utf-8").splitlines()))
    if not rows or (missing := [c for c in needed if c not in rows[0]]):
        what = f"no column {missing[0]}" if rows else "no rows"
        raise ValueError(f"{path}: {what}, needed: {','.join(needed)}[,id]")
    for i, row in enumerate(rows, 2):
        if empty := [c for c in needed if c != "hint" and not (row[c] or "").strip()]:
            raise ValueError(f"{path}, line {i}: no {empty[0]}")
        row["hint"], row["id"] = row["hint"] or "", row.get("id") or f"line {i}"
    return rows


# --------------------------------------------------------------------------------------------------- the measurements


def collect(model, world, args, contexts=CONTEXTS):
    """Every prompt once: {(setting, context, culture, task): (Ask, latents (L + 1, n, C), P (n, A))}."""
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
    last two of own's norm in every block.
    """
    n = 1 + max(key[2] for key in diffs)
    of = lambda plus="own", j=k, s=setting, d=diffs: difference([d[s, plus, j, t] for t in tasks])
    norm = lambda v: v / v.norm(dim=-1, keepdim=True).clamp(min=1e-9) * own.norm(dim=-1, keepdim=True)
    rest, mine = [j for j in range(1, n) if j != k], [diffs[setting, "own", k, t] for t in tasks]
    if not any(map(len, mine)):
        raise ValueError(f"culture {k}: nothing of {', '.join(tasks)} is local only with the country; try --pairs all")
    own, other = of(), "en" if setting == "local" else "local"
    out = {"own": own, "cross": of(s=other), "one task": max(mine, key=len).mean(0)}
    out["universal"] = difference([diffs[setting, "own", j, t] for j in rest for t in tasks])
    out |= {"centred": own - torch.stack([of(j=j) for j in rest]).mean(0), "implicit": of("implicit", s="local")}
    out |= {"minus": -own, "wrong": of(j=1 + k % (n - 1)), "default": of("default"), "neutral": of("neutral")}
    out["shuffled"] = shuffled(torch.cat(mine), rng)
    if untrained:
        out["untrained"] = norm(of(d=untrained))
    draws = torch.from_numpy(rng.standard_normal((args.draws, *own.shape))).float()
    return out | {f"random{i}": norm(v) for i, v in enumerate(draws)}


def folds(tasks):
    """The tasks in FOLDS parts. Vectors for a part are built without it and the next one, where cells are picked."""
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
                p = patched(model, ask, lambda _, s=step: s, args.prompts).unflatten(1, (len(args.layers), nk, -1))
                m = measure(p.transpose(1, 2).flatten(2, 3), ask.owner, k, 1 + k % (K - 1))
                out[role][k - 1, world.tasks.index(t)] = m.mean(0)
    return out


def pick(g, world, kinds, na):
    """What each kind of vector does in one cell (layer, alpha): {rule: {kind: (K - 1, tasks, 8)}}, and which, own's.

    clean: the cell of most local mass for the culture on the next fold's tasks, which neither built nor test it;
    paper: on the tested answers themselves [C]; same: own's clean cell, of (K - 1, FOLDS, 2) places in args.layers and
    args.alphas. Random directions are averaged.
    """
    (test, select), cells = (g["test"], g["select"][..., 0]), []
    out = {rule: {kind: torch.zeros_like(test[:, :, 0, 0]) for kind in kinds} for rule in ("clean", "paper", "same")}
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

    steered: own vector, at the strength that just reaches it; explicit: the prompt itself; mixture: of explicit and
    implicit answers, as localised; other language: the other explicit prompt. And mean (loc, H, stereo) along strength.
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
            for name, x in zip(list(rows)[1:], (p, w * p[i] + (1 - w) * p0[j], runs[other, "own", k, t][2])):
                rows[name].append(measure(x, ask.owner, k)[:, 4].mean().item())
            curves.append(m[:, [0, 4, 5]])
    return rows, torch.stack(curves).mean(0)


def transfer(model, world, args):
    """The last token patched after the embedding and every block, {context of the source: (L + 1, 3)}.

    Mass on the target task's answers of the source's culture, on what the source would say, on the target's default.
    """
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
    """(accuracy, KL from the plain model in nats) on questions with one answer everywhere: (3, 2).

    Of the plain model, with the own vector in its cell, and with an explicit prompt's last token patched in there.
    """
    rows = []
    for (f, k), bank in banks.items():
        layer, alpha = args.layers[cells[k - 1, f, 0]], args.alphas[cells[k - 1, f, 1]]
        prompts, answers = world.facts(world.language(world.main, k))
        z = runs[world.main, "own", k, world.tasks[0]][1][layer + 1, 0]
        steps, ask = add(bank["own"][None], [layer], [0, alpha]), Ask(prompts, [], torch.tensor(answers), None)
        ((_, idx, mask, _),) = ask.batches(len(prompts), model.wte.weight.device)
        put = lambda j, x, clean, z=z: torch.cat((x, z.to(clean).expand_as(clean)[:, None]), 1)
        step = lambda j, x, clean, s=steps, l=layer, put=put: put(j, s(j, x, clean), clean) if j == l else x
        for h, answer in zip(common.sweep(model, idx, step, mask=mask)[:, :, 0], answers):
            logp = model.unembed(h).float().log_softmax(-1)
            kl = (logp[0].exp() * (logp[0] - logp)).sum(-1)
            rows.append(torch.stack(((logp.argmax(-1) == answer).float(), kl), -1).cpu())
    return torch.stack(rows).mean(0)


def conditions(runs, world):
    """{"setting context": (K - 1, tasks, 8)}: what prompts say as they are."""
    K, out = len(world.cultures), {}
    for s, c in dict.fromkeys((s, c) for s, c, _, _ in runs):
        cells = [(k, *runs[s, c, k, t]) for k in range(1, K) for t in world.tasks]
        m = torch.stack([measure(p, ask.owner, k, 1 + k % (K - 1)).mean(0) for k, ask, _, p in cells])
        out[f"{s} {c}"] = m.unflatten(0, (K - 1, -1))
    return out


def study(model, world, args, seed, untrained=None):
    """All measurements on one model, as plain numbers."""
    rng, main, K = np.random.default_rng([seed, 5]), world.main, len(world.cultures)
    runs = collect(model, world, args)
    diffs, table = contrasts(runs, args.pairs), conditions(runs, world)
    bare = contrasts(collect(untrained, world, args, ("none", "own")), "all") if untrained else None
    out = {"conditions": {name: v.mean((0, 1)) for name, v in table.items()}}
    out["pairs"] = {world.cultures[k]: sum(len(diffs[main, "own", k, t]) for t in world.tasks) for k in range(1, K)}
    for s in ("local", "en"):
        banks = {}
        for f, k in [(f, k) for f in range(FOLDS) for k in range(1, K)]:
            build = [t for i, part in enumerate(folds(world.tasks)) if i not in (f, (f + 1) % FOLDS) for t in part]
            banks[f, k] = vectors(diffs, k, s, build, args, rng, bare)
            if s != main:
                banks[f, k] = {kind: banks[f, k][kind] for kind in ("own", "cross", "neutral", "default")}
        g, kinds = grid(model, world, args, runs, banks, s), list(banks[0, 1])
        picked, cells = pick(g, world, kinds, len(args.alphas))
        best = dict(zip(kinds, g["test"][..., 0].mean((0, 1)).amax(-1).tolist()))  # of the grid, on the tested answers
        for kind, v in picked["clean"].items():
            rules = {rule: by_kind[kind].mean((0, 1)) for rule, by_kind in picked.items()}
            rules["best"] = max(b for name, b in best.items() if name.startswith(kind))
            rules["gain"] = common.interval((v - table[f"{s} none"])[..., 0])
            out.setdefault(f"steer {s}", {})[kind] = rules
        if s == main:
            out["profile"] = g["test"][:, :, 0, :, 0].mean((0, 1)).unflatten(0, (len(args.layers), -1))
            out["H"], out["frontier"] = diversity(model, world, args, runs, banks, cells)
            out["side effects"] = side_effects(model, world, args, runs, banks, cells)
            out["by culture"] = {c: picked["clean"]["own"][i].mean(0) for i, c in enumerate(world.cultures[1:])}
            out["picked"] = [[args.layers[i], args.alphas[j]] for i, j in cells.reshape(-1, 2)]
            layer = args.layers[int(np.bincount(cells[..., 0].ravel()).argmax())]
    out["patch"] = transfer(model, world, args)
    whole = lambda s, c, k: difference([diffs[s, c, k, t] for t in world.tasks])[layer + 1]
    named = {f"{world.cultures[k]} {s}": whole(s, "own", k) for s in ("local", "en") for k in range(1, K)}
    v = F.normalize(torch.stack([*named.values(), whole(main, "neutral", 1)]), dim=1)
    out["cosines"] = [*named, "neutral"], v @ v.T
    if isinstance(world, Choice):
        alpha = float(np.median([alpha for _, alpha in out["picked"]]))
        chosen = {k: alpha * named[f"{world.cultures[k]} {main}"] for k in range(1, K)}
        out["spoken"] = spoken(model, world, args, layer, chosen)
    return json.loads(json.dumps(out, default=lambda a: a.tolist()))


def run_toy(args, seed, skew, position=0):
    """Trains the toy and measures it; the model without skew, C1's control, only for its gap."""
    model, world = train_toy(args, seed, skew, position)
    out = divergence(model, world, 256)
    if skew:
        torch.manual_seed(seed + 1)
        return out | study(model, world, args, seed, GPT(model.config).to(model.wte.weight.device).eval())
    table = conditions(collect(model, world, args, ("none", "own")), world)
    return out | {"gap": (table["local own"] - table["local none"])[..., 0].mean().item()}


def spoken(model, world, args, layer, chosen):
    """The gap as the paper counts it: {"setting context": {rule: [accuracy, coverage]}}, means over cultures and tasks.

    Whole greedy answers of at most 15 tokens to numbered options, in both orders, by the rules of `denominators`. The
    context "steered": no country, but chosen {k: (C,)} added after a block, built on all tasks as the paper's are.
    """
    out = {}
    for s, c in [(s, c) for s in ("local", "en") for c in ("none", "own", "steered")]:
        cells = []
        for (_, country, lang), items in world.rows.items():
            k = world.cultures.index(country)
            if not k or lang != world.language(s, k):
                continue
            asked, types = [(row, order) for row in items.values() for order in (0, 1)], []
            prompts = [world.write(lang, world.sentence(row, lang, c), row, order, "12") for row, order in asked]
            with steered(model, layer, chosen[k] * (c == "steered")):
                said = [
                    ids
                    for i in range(0, len(prompts), args.prompts)
                    for ids in generate(model, prompts[i : i + args.prompts], 15, 0.0, stop=world.tok.stops)
                ]
            for ids, (row, order) in zip(said, asked):
                options = (row["local"], row["other"])[:: 1 - 2 * order]
                which = parse_answer(world.tok.decode(ids).split("\n\n")[0], options)
                types.append(None if which is None else ("local", "west")[which ^ order])
            cells.append(denominators(list(zip(types[::2], types[1::2]))))
        out[f"{s} {c}"] = {rule: np.mean([cell[rule] for cell in cells], 0) for rule in cells[0]}
    return out


# -------------------------------------------------------------------------------------------------------- the verdict
# fmt: off


def judge(run, results, main, skew0):
    """The claims: medians over seeds, each beside a control that must fail. skew0: the gaps of C1's control model."""
    m, real = lambda f: float(np.median([f(r) for r in results])), bool(run.args.model)
    mean = lambda r, key, name: r["conditions"][key][MEASURES.index(name)]
    gap = lambda r, name="loc", c="own": mean(r, f"{main} {c}", name) - mean(r, f"{main} none", name)
    value = lambda r, kind, rule, name: r[f"steer {main}"][kind][rule][MEASURES.index(name)]
    up = lambda r, kind, name, rule: value(r, kind, rule, name) - mean(r, f"{main} none", name)
    rise = lambda kind, name, rule="clean": m(lambda r: up(r, kind, name, rule))
    share = lambda kind, rule="clean": m(lambda r: up(r, kind, "loc", rule) / gap(r))
    closed = lambda *kinds: {kind: share(kind, "same") for kind in kinds}  # controls, in own's cell
    at = lambda kind, name: m(lambda r: value(r, kind, "clean", name))
    if real:
        title, criterion, name, test = f"share of pairs, {main} prompts", "gap >= .2", "pairacc", lambda g: g >= 0.2
        extra = {"in mass": m(gap), "paper's": m(lambda r: mean(r, "en own", name) - mean(r, "local none", name))}
    else:
        title, criterion, name = "mass", "gap >= .4, and as the text has it +- .1", "loc"
        test, extra = lambda g: g >= 0.4 and abs(g - run.args.skew) <= 0.1, {"KL to text": m(lambda r: r["kl_none"])}
    g, controls = m(lambda r: gap(r, name)), {"neutral sentence": m(lambda r: gap(r, name, "neutral"))}
    controls |= {} if real else {"no skew": float(np.median(skew0))}
    run.claim("C1", f"naming the country brings out the local answer ({title})", ".55 -> .90",
              {"gap": g, "implicit": m(lambda r: mean(r, f"{main} none", name))} | extra, controls, criterion,
              test(g), not any(map(test, controls.values())))
    own, waste = share("own"), at("own", "other") + at("own", "junk")
    clean = rise("own", "other") < rise("own", "loc") if real else waste <= 0.15
    controls = closed("random", "shuffled", "neutral", "minus", *([] if real else ["untrained"]))
    run.claim("C2", "a culture's own vector closes the gap, on tasks it was not built from", ".21 to .67 of it",
              {"share closed": own, "picked on the test": share("own", "paper"), "mass on local": at("own", "loc"),
               "pairs": at("own", "pairacc"), "other + junk": waste}, controls,
              f">= .4 closed, {'others rise less' if real else 'other + junk <= .15'}; controls < .1",
              own >= 0.4 and clean, max(controls.values()) < 0.1)
    wrong, right = ([rise(kind, name, "same") for name in ("theirs", "loc")] for kind in ("wrong", "own"))
    names = "their answers rise", "local ones"
    run.claim("C2b", "another culture's vector brings out that culture's answers", "-", dict(zip(names, wrong)),
              {f"own vector: {n}": v for n, v in zip(names, right)}, "theirs rise, and more",
              wrong[0] > max(wrong[1], 0), not right[0] > max(right[1], 0))
    others = {kind: share(kind) for kind in ("cross", "implicit", "one task", "centred")}
    controls, universal = closed("random", "neutral"), share("universal")
    run.claim("C3", "a vector built in the other language works, too", ".44 of it", others, controls,
              "cross >= .2 closed; controls < .1", others["cross"] >= 0.2, max(controls.values()) < 0.1)
    explicit, rows = m(lambda r: mean(r, "en own", "loc")), lambda r, c: np.array(r["patch"][c])
    moved = lambda c: m(lambda r: max((row[0] for row in rows(r, c) if row[0] > row[1]), default=0.0))
    run.claim("C4", "another task's last token, patched in, brings the culture, not the task", ".87 at layer 26 of 42",
              {"moved": moved("own"), "explicit": explicit, "layer": m(lambda r: rows(r, "own")[:, 0].argmax() - 1)},
              {"source without country": moved("none")}, "where the task isn't, >= half of explicit; control < .1",
              moved("own") >= 0.5 * explicit, moved("none") < 0.1 * explicit)
    more = lambda r, a, b: np.array(r["H"][a], float) - np.array(r["H"][b], float)
    apart = lambda a, b="explicit": np.median([common.interval(more(r, a, b)) for r in results], 0)
    steered, other = apart("steered"), apart("other language")
    run.claim("C5", "steered answers are more diverse than explicit ones at 90 % of their localisation (bits)",
              "less alike in most languages", {"steered - explicit": steered[0], "low": steered[1], "high": steered[2],
              "steered - mixture": apart("steered", "mixture")[0],
              "reached": m(lambda r: np.isfinite(np.array(r["H"]["steered"], float)).mean())},
              {"explicit, other language": other[0], "low": other[1]}, "lower bound >= .1",
              steered[1] >= 0.1, other[1] < 0.1)
    run.claim("C6", "a universal vector, of other cultures only, still localises", ".22 to .43 of the gap",
              {"share closed": universal, "local rises": rise("universal", "loc"),
               "others rise": rise("universal", "other")}, controls, ">= .1 closed; controls < .1",
              universal >= 0.1, max(controls.values()) < 0.1)
    (plain, _), (vector, kl), (patch, kl_patch) = np.median([r["side effects"] for r in results], 0)
    run.claim("C7", "questions with one answer everywhere are still answered", "-",
              {"accuracy lost": plain - vector, "of": plain, "KL": kl},
              {"last token patched in, lost": plain - patch, "KL": kl_patch}, "< .02 lost",
              plain - vector < 0.02, plain - patch >= 0.02)


MEASURES_LONG = {"loc": "mass on local answers", "pairacc": "local likelier than default, share of pairs",
                 "H": "entropy given a local answer, bits"}
CONTROLS = "minus", "wrong", "default", "neutral", "shuffled", "untrained"
BLUE, RED, GREEN, GOLD, GREY = "#4477aa", "#ee6677", "#228833", "#ccbb44", "#999999"


def draw(path, r, args, world, title):
    """One picture of a run: the gap, what each vector closes of it, layers, the patch, diversity, cosines."""
    main, i = world.main, MEASURES.index("pairacc" if args.model else "loc")
    with common.figure(path, 2, 3, (3.8, 2.9)) as (bars, kinds, layers, patch, frontier, matrix):
        for x, s, label, colour in (0, "local", "in the local language", BLUE), (0.4, "en", "in English", RED):
            values = [r["conditions"][f"{s} {c}"][i] for c in CONTEXTS]
            bars.bar(np.arange(4) + x, values, 0.38, color=colour, label=label)
        bars.set(title=f"{title}: a sentence in front", ylim=(0, 1.25), ylabel=MEASURES_LONG[MEASURES[i]])
        bars.set_xticks(np.arange(4) + 0.2, ["none", "neutral", "default\ncountry", "own\ncountry"])
        none, own = (r["conditions"][f"{main} {c}"] for c in ("none", "own"))
        rows = [(kind, rules["gain"]) for kind, rules in r[f"steer {main}"].items()][::-1]
        for y, (kind, (mid, *ends)) in enumerate(rows):
            kinds.barh(y, mid / (own[0] - none[0]), color=GREY if kind in CONTROLS or kind == "random" else GREEN)
            kinds.plot(np.array(ends) / (own[0] - none[0]), [y, y], color="k", lw=1)
        kinds.axvline(1, color="k", ls=":", lw=1)
        kinds.set(title="Share of the gap closed (grey: controls)")
        kinds.set_yticks(range(len(rows)), [kind for kind, _ in rows])
        for alpha, line in zip(args.alphas, np.array(r["profile"]).T):
            layers.plot(args.layers, line, "o-", ms=3, label=f"strength {alpha:g}")
        for y, style, label in (own[0], "--", "explicit"), (none[0], ":", "implicit"):
            layers.axhline(y, color="k", ls=style, lw=1, label=label)
        layers.set(title="Own vector added after one block", xlabel="layer", ylabel=MEASURES_LONG["loc"])
        layers.set_xticks(args.layers)
        p, bare = (np.array(r["patch"][c]) for c in ("own", "none"))
        x, labels = np.arange(len(p)) - 1, ("source's culture, target's task", "all of the source", "no effect")
        for y, label, colour in zip(p.T, labels, (GREEN, GREY, BLUE)):
            patch.plot(x, y, color=colour, label=label)
        patch.plot(x, bare[:, 0], color=GREEN, ls=":", label="the first, source without country")
        patch.set(title="Another task's last token patched in", xlabel="layer", ylabel="mass", ylim=(0, 1.5 * p.max()))
        loc, H, _ = np.array(r["frontier"]).T
        frontier.plot(loc, H, "o-", ms=3, color=GREEN, label="own vector, strength 0 to 4")
        frontier.plot([none[0], own[0]], [none[4], own[4]], "s", color=BLUE, label="implicit, explicit")
        frontier.plot(0.9 * own[0], np.mean(r["H"]["mixture"]), "D", color=GOLD, label="mixture of both")
        frontier.set(title="Diversity against localisation", xlabel=MEASURES_LONG["loc"], ylabel=MEASURES_LONG["H"])
        names, cos = r["cosines"]
        matrix.figure.colorbar(matrix.imshow(cos, vmin=-1, vmax=1, cmap="RdBu_r"), ax=matrix, shrink=0.8)
        matrix.set_title("Cosines of the own vectors")
        matrix.set_xticks(range(len(names)), names, rotation=90, fontsize=6)
        matrix.set_yticks(range(len(names)), names, fontsize=6)
        for ax in (bars, layers, patch, frontier):
            ax.legend(fontsize=7)


def report(name, r):
    """Prints what prompts and vectors do, and whether the toy was trained to its end."""
    kl = {key: v for key, v in r.items() if key.startswith("kl_")}
    print(f"\n{name}", *(f"{k} {v:.3f}" for k, v in kl.items()), "UNDER-TRAINED" * any(v > 0.05 for v in kl.values()))
    print(f"  {'prompts':24s}" + "".join(f"{n:>9s}" for n in MEASURES[:7]) + "   picked on the test, best of the grid")
    line = lambda key, row, more="": print(f"  {key:24s}" + "".join(f"{v:9.3f}" for v in row[:7]) + more)
    for key, row in r["conditions"].items():
        line(key, row)
    for s in ("local", "en"):
        for kind, rules in r[f"steer {s}"].items():
            line(f"{s} + {kind}", rules["clean"], f"   {rules['paper'][0]:.3f} {rules['best']:.3f}")
    print(*(f"  spoken, {key}: {v}\n" for key, v in r.get("spoken", {}).items()), end="")


# fmt: on
# --------------------------------------------------------------------------------------------------------------- main


def prepare(args, env):
    """Checks the flags, fills in defaults; returns the real (model, world), or None for the toy."""
    toy = not args.model
    args.alphas = args.alphas or ([0.5, 1, 1.5, 2, 3] if toy else [1, 2])
    if not all(math.isfinite(a) and a for a in args.alphas):
        raise ValueError(f"--alphas {' '.join(map(str, args.alphas))}, allowed: finite numbers, not 0")
    model, world, n = None, None, args.n_layer
    if toy:
        if args.dataset:
            raise ValueError("--dataset needs --model: the toy makes its own documents")
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
        world = Choice(tok, data, rows or choice_rows(data)) if rows or tok.template else Cloze(tok, data)
        n = model.config.n_layer
    args.draws = args.draws or (20 if toy else 3)
    args.pairs = args.pairs if args.pairs != "auto" else "all" if type(world) is Cloze else "answered"
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
        jobs = common.job_count(args, env)
        runs = [(seed, skew) for seed in args.seeds for skew in (args.skew, 0.0)]
        results = common.side_by_side(run_toy, [(args, *r, i % jobs) for i, r in enumerate(runs)], jobs)
        skew0, results, world = [r["gap"] for r in results[1::2]], results[::2], Toy(args.seeds[0], args.skew)
    if env.rank:
        return None
    judge(run, results, world.main, skew0)
    logs = []
    for seed, r in zip(args.seeds, results):
        run.metrics[f"{name}-s{seed}"] = r
        report(f"{name}, seed {seed}", r)
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
