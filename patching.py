"""Separating tongue from thought (arXiv 2411.08745): language and concept can be patched apart.

A model translates a word: `Français: "eau" - English: "` -> water. Where inside is *what* to say, and where *in which
language*? Take the residual stream of another prompt S (another word, other languages), put it in place of this
prompt's (T) after block j, and see what is said. From the last token, early layers change nothing, late ones say all
that S would; in between the model says the *target's* concept in the *source's* language: language is fixed first. At
the last token of the word to translate, from layer j on, the patch changes the concept and keeps the language. There
even the *mean* of a concept's latents over several source languages does: so concept and language are separate parts,
z_concept + z_language, not one code per pair. And such a mean can be read out in words, as a definition.

The toy: a GPT trained on translations between nine languages, with a quarter of all (word, pair of languages)
combinations held out; the experiments ask for held-out ones. A definition is a category and two attributes. Its first
blocks see the previous position only (--local), which keeps words from the last position at first: so the toy does not
show that the order *must* be so. Nor the paper's absolute values, nor "latent English": for those, --model.

Tags: [P] the paper, [C] its code, [S] independent summaries, [I] inferred here. "pilot": our runs on seeds 100 and up.
Read on: `common.sweep` -> `probabilities` -> `World` -> `Toy` -> `last`, `concept`, `define`, `geometry` -> `judge`.
"""

import csv
import json
import re
from collections import Counter
from dataclasses import dataclass, field
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np
import torch
from tqdm import tqdm

import legacy as common
import pretrained
from model import GPT, GPTConfig, generate

STAGES = "last", "concept", "geometry"
CODES = "en fr de es it nl pt fi tr et hi ja ko ru zh".split()


@dataclass
class Args(common.TrainFlags):
    """patching"""

    presets: ClassVar[dict] = {
        "smoke": dict(
            steps=10,
            tok=["chunk"],
            n_embd=32,
            n_layer=3,
            eval_every=10,
            warmup=2,
            jobs=1,
            threads=1,
            pairs=6,
            concepts=40,
        )
        | dict(quads=["de-es:fr-fi"], languages=["de", "es", "fr", "fi", "nl"], k=3, local=1),
        "toy": {},
        "paper": dict(model="meta-llama/Llama-2-7b-hf", quads=["de-it:fr-es", "it-de:fr-es"], device="cuda"),
    }
    model: str = ""
    """a pretrained model in place of the toy: gemma-3-270m, a hub id, a folder (paper: Llama-2-7b and six more)"""
    words: str = ""
    """CSV of your own: a column per language code, synonyms in a cell joined by |, the first one used in prompts"""
    languages: list[str] = field(default_factory=lambda: CODES[:9])
    """of the toy: en fr de es it nl pt fi tr"""
    concepts: int = 60
    """words of each language in the toy, at most 120 (paper: 73 to 101)"""
    tok: list[str] = field(default_factory=lambda: ["word"])
    """pieces of a word in the toy: word (all of it), chunk (two letters), char; a training run each"""
    quads: list[str] = field(default_factory=list)
    """language quadruples source:target, as de-it:fr-zh (the paper's); default: six for the toy and the real model"""
    pairs: int = 0
    """pairs of concepts for each quadruple, a third of them in experiments 2 and 3 on a real model; default 60 for the
    toy, 200 for a real model (paper: 200)"""
    shots: int = 0
    """examples in a prompt; default 3 for the toy, 5 for a real model (paper: 5)"""
    score: Literal["first", "word"] = "first"
    """real models, experiments 2 and 3: probability of the first token, or of all (the toy: all)"""
    stages: list[str] = field(default_factory=lambda: list(STAGES))
    """experiments: last (1), concept (2 and 3, and definitions in the toy), geometry"""
    num_patches: int = 0
    """how many layers from j on are patched at the concept token; 0 is all (paper: all)"""
    k: int = 5
    """source languages in a mean latent (paper: 5)"""
    prompts: int = 64
    """prompts in a batch of patched runs"""
    steps: int = 1100
    """optimizer steps"""
    batch_size: int = 24
    """documents in a step"""
    lr: float = 4e-3
    """peak learning rate"""
    weight_decay: float = 0.3
    """of matrices and embeddings"""
    local: int = 3
    """of the toy: its first blocks see the previous position only, so that words are put together where they stand"""
    n_layer: int = 6
    """blocks (paper: 32)"""
    n_embd: int = 64
    """width (paper: 4096)"""


# -------------------------------------------------------------------------------------------------------- the method


@torch.no_grad()
def latents(model, prompts, size):
    """The residual stream of each prompt's last token after the embedding and every block: (L + 1, B, C)."""
    parts = [common.padded(prompts[i : i + size], model.wte.weight.device) for i in range(0, len(prompts), size)]
    return torch.cat([common.residuals(model, *part)[:, :, 0] for part in parts], 1)


def swap(z):
    """Experiment 1 as a step of `common.sweep`: z[j] takes the place of the first column after block j, once.

    z (L + 1, B, n, C): n sources side by side.
    """

    def step(j, x, clean):
        new = clean[:, None].repeat(1, z.shape[2], 1, 1)
        new[:, :, 0] = z[j + 1]
        return torch.cat((x, new), 1)

    return step


def hold(z, most=0):
    """Experiments 2 and 3: bundle j holds z after block j and all later ones (or the first `most` from j on)."""

    def step(j, x, clean):
        n = z.shape[2]
        x = torch.cat((x, clean[:, None].repeat(1, n, 1, 1)), 1)
        first = max(0, j + 2 - most) if most else 0
        x[:, first * n :, 0] = z[j + 1].repeat(1, j + 2 - first, 1)
        return x

    return step


@torch.no_grad()
def probabilities(model, prompts, answers, rho, z, patch, size):
    """P(answer) at the end of every prompt, patched at column rho < 0 after each block: (B, L + 1, n, A).

    answers  for each prompt A answers; an answer is a collection of words, a word a tuple of tokens: their sum.
             One-token words make the paper's first-token score; more tokens are forced one after the other, under the
             patch. The row that forces "ca" serves every word that begins with it
    z        (L + 1, B, n, C) what is put there, by patch = swap or hold
    """
    rows = {}
    for b, options in enumerate(answers):
        for a, words in enumerate(options):
            for word in words:
                rows.setdefault((b, tuple(word[:-1])), []).append((a, word[-1]))
    out, keys = torch.zeros(len(prompts), len(z), z.shape[2], len(answers[0])), sorted(rows)
    for i in range(0, len(keys), size):
        part = keys[i : i + size]
        extra = max(len(forced) for _, forced in part)
        forced = [[*f, *[0] * (extra - len(f))] for _, f in part]  # what stands after the last forced token is not read
        idx, mask = common.padded([[*prompts[b], *f] for (b, _), f in zip(part, forced)], model.wte.weight.device)
        h = common.sweep(model, idx, patch(z[:, [b for b, _ in part]]), extra - rho, mask)
        for row, (b, f) in zip(h[:, :, -extra - 1 :], part):
            logits = model.unembed(row[:, : len(f) + 1]).float()  # (V, 1 + forced, vocabulary)
            total = logits.logsumexp(-1)  # logits - total would be a second copy of a large vocabulary
            before = sum(logits[:, i, token] - total[:, i] for i, token in enumerate(f))
            for a, token in rows[b, f]:
                logp = before + logits[:, len(f), token] - total[:, len(f)]
                out[b, :, :, a] += logp.exp().cpu().unflatten(0, out.shape[1:3])
    return out


def switch_layers(p):
    """(t_lang, t_conc) of mean probabilities p (L + 1, 4) of C_T^outT, C_T^outS, C_S^outS, C_S^outT; row 0 is j = -1.

    The first j from which the source's language (concept) is likelier than the target's; L if none [I].
    """
    tt, ts, ss, st = np.asarray(p)[:, :4].T
    first = lambda won: int(won.argmax()) - 1 if won.any() else len(p) - 1
    return first(ts + ss > tt + st), first(ss + st > tt + ts)


def band(values, axis=0):
    """Mean and half-width of its 95 % band over pairs, 1.96 sd / sqrt(N) [C]."""
    values = np.asarray(values, float)
    return values.mean(axis), 1.96 * values.std(axis, ddof=1) / values.shape[axis] ** 0.5


def bootstrap(statistic, n, seed=0, draws=2000):
    """95 % interval of statistic(rows), rows resampled from range(n) with replacement."""
    rng = np.random.default_rng(seed)
    return np.percentile([statistic(rng.integers(n, size=n)) for _ in range(draws)], [2.5, 97.5], axis=0)


def variance_split(x):
    """Two-way split of latents x (r, C, L, d): r contexts of C concepts in L languages -> shares of variance (3,).

    X_cl = mean + A_c + B_l + E_cl: concept, language, and what only the pair explains. The noise of contexts, the
    variance inside a cell, is taken out of each term, by as much as it adds in expectation.
    """
    r, C, L, _ = x.shape
    cell = x.mean(0)
    noise = ((x - cell) ** 2).sum() / (C * L * max(1, r - 1)) / r  # of a cell's mean
    mu, a, b = cell.mean((0, 1)), cell.mean(1), cell.mean(0)
    e = cell - a[:, None] - b + mu
    parts = [L * ((a - mu) ** 2).sum() - (C - 1) * noise, C * ((b - mu) ** 2).sum() - (L - 1) * noise]
    parts = torch.stack([*parts, (e**2).sum() - (C - 1) * (L - 1) * noise]).clamp(min=0)
    return parts / parts.sum().clamp(min=1e-30)


# ----------------------------------------------------------------------------------------------- words, prompts, pairs

LABELS = (
    "English Français Deutsch Español Italiano Nederlands Português Suomi Türkçe Eesti हिन्दी 日本語 한국어 Русский "
)
LABELS = dict(zip(CODES, (LABELS + "中文").split()))
CONCEPTS = Path(__file__).with_name("concepts.csv")  # 120 picturable nouns in nine languages; check before trusting


def read_words(path):
    """{language: [[synonyms]] by concept} of a CSV file; a column `category` is allowed, and one word a cell."""
    head, *rows = csv.reader(Path(path).read_text("utf-8").splitlines())
    if unknown := [code for code in head if code not in LABELS and code != "category"]:
        raise ValueError(f"{path}: unknown language {unknown[0]!r}, allowed: {', '.join(LABELS)}")
    for i, row in enumerate(rows, 2):
        if len(row) != len(head) or not all(cell.strip() for cell in row):
            raise ValueError(f"{path}, line {i}: an empty cell, needed: a word in each of {', '.join(head)}")
    return {code: [[w.strip() for w in row[i].split("|")] for row in rows] for i, code in enumerate(head)}


@dataclass
class World:
    """Words of several languages and how prompts are made of them, for any tokenizer."""

    tok: object
    table: dict  # language -> concept -> synonyms
    whole: bool  # experiments 2 and 3 score whole words, or first tokens

    def text(self, pair, shots, row, cut=""):
        """A translation prompt that ends in the opening quote of the answer, or with cut="word" after the query [C]."""
        (a, b), word = pair, lambda code, row: self.table[code][row][0]
        lines = [f'{LABELS[a]}: "{word(a, s)}" - {LABELS[b]}: "{word(b, s)}"\n' for s in shots]
        return "".join(lines) + f'{LABELS[a]}: "{word(a, row)}' + ("" if cut else f'" - {LABELS[b]}: "')

    def ids(self, text):
        return self.tok.encode(text, bos=True)

    def rho(self, whole, head):
        """The column, counted from the end of `whole`, of the last token of `head`, which must be its beginning."""
        whole, head = self.ids(whole), self.ids(head)
        if whole[: len(head)] != head:
            raise ValueError(f"the tokenizer merges the end of {self.tok.decode(head[-1:])!r} with what follows")
        return len(head) - len(whole) - 1

    def quoted(self, text):
        """The ids of a text as it is split behind an opening quote."""
        quote, ids = self.tok.encode('"'), self.tok.encode(f'"{text}')
        return ids[len(quote) :] if ids[: len(quote)] == quote else self.tok.encode(text)

    def answer(self, code, row, whole=False):
        """The words that count as concept `row` in a language: whole, or first tokens, with and without a space."""
        if whole:
            return {tuple(self.quoted(w)) for w in self.table[code][row]}
        firsts = [self.quoted(space + w)[0] for w in self.table[code][row] for space in ("", " ")]
        return {(t,) for t in firsts if self.tok.decode([t]).strip()}  # not the bare space token

    def rows(self, pair):
        """Concepts that may be asked for in this pair of languages, and those that may be examples."""
        everything = list(range(len(self.table[pair[0]])))
        return everything, everything

    def few_shot(self, rng, pair, row, n):
        """n concepts as examples for the query `row`, drawn anew for every prompt [C]."""
        pool = [i for i in self.rows(pair)[1] if i != row]
        if len(pool) < n:
            raise ValueError(f"{len(pool)} words for examples in {'-'.join(pair)}, needed: {n}")
        return rng.choice(pool, n, replace=False).tolist()

    def prompts(self, rng, pair, rows, n, cut="", scramble=False):
        """Ids of a prompt for each of `rows`, with its own examples; scramble: their translations change places."""
        prompts = []
        for row in rows:
            shots = self.few_shot(rng, pair, row, n)
            text = self.text(pair, shots, row, cut)
            if scramble:
                right = [self.table[pair[1]][s][0] for s in shots]
                for old, new in zip(right, right[1:] + right[:1]):
                    text = text.replace(f'{LABELS[pair[1]]}: "{old}"\n', f'{LABELS[pair[1]]}: "\0{new}"\n', 1)
                text = text.replace("\0", "")
            prompts.append(self.ids(text))
        return prompts


def disjoint(answers):
    """No word of an answer is a word of another, nor its beginning."""
    clash = lambda a, b: any(u[: len(v)] == v or v[: len(u)] == u for u in a for v in b)
    return not any(clash(a, b) for a, b in combinations(answers, 2))


def draw_pairs(rng, sources, targets, answers_of, n):
    """Up to n pairs (source row, target row) of different concepts, whose answers don't collide [C].

    Returns the pairs, their answers, and a Counter of what was passed over.
    """
    product, passed, pairs = [(s, t) for s in sources for t in targets], Counter(), []
    for i in rng.permutation(len(product)):
        s, t = product[i]
        answers = answers_of(s, t)
        odd = "same concept" if s == t else "no token" if not all(answers) else "" if disjoint(answers) else "collision"
        if odd:
            passed[odd] += 1
        else:
            pairs.append((s, t, answers))
        if len(pairs) == n:
            break
    return pairs, passed


# ------------------------------------------------------------------------------------------------------------ the toy


class ToyTokenizer:
    """Marks, labels and attributes are one token each; words are cut into pieces of `size` letters."""

    def __init__(self, words, whole, size):
        self.size = size
        self.names = ["<pad>", "<bos>", "\n", '"', ': "', " - ", " = ", *whole]
        self.whole = set(self.names)
        self.names += sorted({piece for word in words for piece in self.cut(word)})
        self.number = {name: i for i, name in enumerate(self.names)}

    def cut(self, word):
        return [word] if word in self.whole else [word[i : i + self.size] for i in range(0, len(word), self.size)]

    def encode(self, text, bos=False):
        parts = re.findall(r': "| - | = |"|\n|[^\s":=-]+', text)  # spaces between attributes are no tokens
        return [1] * bos + [self.number[piece] for part in parts for piece in self.cut(part)]

    def decode(self, ids):
        return "".join(self.names[i] for i in ids)


class Toy(World):
    """The toy's words, attributes and documents, drawn from a seed.

    Held out: a shuffle of the languages says for every concept which one of them (two, of nine languages or more) each
    word is never translated into: one in n - 1 of all combinations, of nine languages two in eight. So every word
    misses as many partners as input as it does as output, and keeps the others.
    """

    def __init__(self, args, seed, tok):
        rng, words = np.random.default_rng([seed, 1]), read_words(CONCEPTS)
        keep = np.sort(rng.permutation(len(words["en"]))[: args.concepts])
        table = {code: [[words[code][i][0].lower()] for i in keep] for code in args.languages}
        self.facts = [(words["category"][i][0], f"x{rng.integers(8)}", f"y{rng.integers(8)}") for i in keep]
        attributes = [f"{name}.{code}" for code in table for name in sorted({n for fact in self.facts for n in fact})]
        words = [word for rows in table.values() for (word,) in rows]
        size = {"char": 1, "chunk": 2, "word": 99}[tok]
        super().__init__(ToyTokenizer(words, [LABELS[c] for c in table] + attributes, size), table, True)
        self.seed, self.held = seed, {}
        for row in range(len(keep)):
            order = list(rng.permutation(args.languages))
            for step in range(1, 2 + len(order) // 9):
                for pair in zip(order, order[step:] + order[:step]):
                    self.held.setdefault(pair, []).append(row)
        every = {(a, b): range(len(keep)) for a in table for b in table}
        self.trained = {pair: [r for r in rows if r not in self.held.get(pair, ())] for pair, rows in every.items()}

    def rows(self, pair):
        return self.held.get(pair, []), self.trained[pair]

    def definition(self, code, row, between='" = '):
        """`Label: "word" = ` (or `Label: "word `) and its answer, category and two attributes in the same language."""
        facts = " ".join(f"{name}.{code}" for name in self.facts[row])
        return f'{LABELS[code]}: "{self.table[code][row][0]}{between}', f"{facts}\n"

    def document(self, rng):
        """Ids of 3 to 5 lines of one kind, and which of them count in the loss: what answers. [I]

        Half the documents translate, a tenth copies, the others define: facts come after a mark, or right after the
        word, whose last piece then has to know what the word means, as in text.
        """
        kind, n, (a, b) = rng.random(), rng.integers(3, 6), rng.choice(list(self.table), 2, replace=False)
        b, between = (a if 0.5 <= kind < 0.6 else b), " " if kind < 0.8 else '" = '
        ids, counts = [1], [0]
        for row in rng.choice(self.trained[a, b] if kind < 0.6 else len(self.facts), n, replace=False):
            question, answer = self.text((a, b), [], row), self.table[b][row][0] + '"\n'
            if kind >= 0.6:
                question, answer = self.definition(a, row, between)
            for part, count in (question, 0), (answer, 1):
                new = self.tok.encode(part)
                ids, counts = ids + new, counts + [count] * len(new)
        return ids, counts

    def batch(self, step, args, env):
        """The documents of one step, padded on the right; this rank's share of them."""
        rng = np.random.default_rng([self.seed, 2, step])
        docs = [self.document(rng) for _ in range(args.batch_size)]
        T = max(len(ids) for ids, _ in docs)
        rows = slice(env.rank, None, env.world)
        idx, counts = (torch.tensor([part + [0] * (T - len(part)) for part in parts])[rows] for parts in zip(*docs))
        return {"idx": idx[:, :-1], "targets": idx[:, 1:], "weights": counts[:, 1:].float()}


def config_of(args, world):
    """A small Llama without biases, embedding and unembedding tied."""
    plain = dict(norm="rms", tie=True, qkv_bias=False, attn_bias=False, mlp_bias=False)
    plain["windows"] = [2] * args.local + [0] * (args.n_layer - args.local)
    return GPTConfig(len(world.tok.names), 256, args.n_layer, 4, args.n_embd, **plain)


def accuracy(model, world, args, n):
    """Share of n translations that are right to the last piece, greedily: of held-out combinations, and of trained."""
    out, pairs = {}, [(a, b) for a in world.table for b in world.table if a != b]
    for which, name in enumerate(("held_out", "trained")):
        rng, prompts, right = np.random.default_rng([world.seed, 3]), [], []
        for pair in [pairs[i] for i in rng.integers(len(pairs), size=n)]:
            row = int(rng.choice(world.rows(pair)[which]))
            prompts += world.prompts(rng, pair, [row], args.shots)
            right.append(world.tok.encode(world.table[pair[1]][row][0] + '"'))
        said = generate(model, prompts, 12, temperature=0, stop=world.tok.encode('"'))
        out[name] = float(np.mean([a == b for a, b in zip(said, right)]))
    return out


def train_toy(args, world, name, env, position=0):
    """The toy's model, trained."""
    torch.manual_seed(world.seed)
    model, log = GPT(config_of(args, world)), common.Log(args.out, name, env)
    batch = lambda step: world.batch(step, args, env)
    common.train(model, batch, args, env, log, lambda step: accuracy(model, world, args, 100), position)
    return model.eval()


# ---------------------------------------------------------------------------------------------------- the experiments


def ask(world, quad, seed, n, first=True):
    """What experiment 1 (or 2) asks for in a quadruple: its random numbers, n source rows, target rows, answers.

    Answers are C_T^outT, C_T^outS, C_S^outS, C_S^outT and, where English is none of the outputs, both concepts in
    English; for experiment 2 C_S^outT and C_T^outT. Raises ValueError if there are fewer than n pairs.
    """
    ((sa, sb), (ta, tb)), rng = quad, np.random.default_rng([seed, 4 + (not first)])
    latent = first and "en" in world.table and "en" not in (sb, tb)

    def cell(s, t):
        if not first:
            return [world.answer(tb, row, world.whole) for row in (s, t)]
        four = [world.answer(code, row) for code, row in ((tb, t), (sb, t), (sb, s), (tb, s))]
        return four + ([world.answer("en", s) | world.answer("en", t)] if latent else [])

    # experiment 2: the source's word was never translated into the target's language
    sources, targets = world.rows((sa, sb if first else tb))[0], world.rows((ta, tb))[0]
    pairs, passed = draw_pairs(rng, sources, targets, cell, n)
    if len(pairs) < n:
        why = ", ".join(f"{count} {reason}" for reason, count in passed.items())
        raise ValueError(
            f"{sa}-{sb}:{ta}-{tb} has {len(pairs)} pairs of concepts, --pairs {n} is too many; left out: {why}"
        )
    return rng, *map(list, zip(*pairs))


def last(model, world, args, quad, seed, n, controls=True):
    """Experiment 1: a source's last-token latent in place of the target's, layer by layer: {name: array}.

    P(answer) by source (n, L + 1, A), answers as in `ask`. Row j = -1 is the target prompt as it is, row L - 1 the
    source prompt as it is. Sources besides the paper's: one factor only (the other is the target's), scrambled
    examples, Gaussian noise. And two lenses (L + 1, A): the latents unembedded, and read by an identity prompt.
    """
    (source, target), (rng, s, t, answers) = quad, ask(world, quad, seed, n)
    prompts = world.prompts(rng, target, t, args.shots)
    z = {"source": latents(model, world.prompts(rng, source, s, args.shots), args.prompts)}
    if controls:
        texts = {"language only": (source, t), "concept only": (target, s), "scrambled": (source, s)}
        for name, (pair, rows) in texts.items():
            own = world.prompts(rng, pair, rows, args.shots, scramble=name == "scrambled")
            z[name] = latents(model, own, args.prompts)
        noise = torch.randn(z["source"].shape, generator=torch.Generator().manual_seed(seed)).to(z["source"])
        z["noise"] = noise * z["source"].norm(dim=-1, keepdim=True) / noise.norm(dim=-1, keepdim=True)
    p = probabilities(model, prompts, answers, -1, torch.stack([*z.values()], 2), swap, args.prompts).numpy()
    out = {name: p[:, :, i] for i, name in enumerate(z)}
    if controls:
        out["logit lens"] = logit_lens(model, z["source"], answers).numpy()
    if controls and args.model:
        read = probabilities(model, [world.ids(IDENTITY)] * n, answers, -1, z["source"][:, :, None], swap, args.prompts)
        out["patchscope"] = read.mean((0, 2)).numpy()
    return out


def concept(model, world, args, sources, target, seed, n):
    """Experiments 2 and 3: latents of a word's last token, or their mean, held at the target's word from layer j on.

    Returns P(answer) by what is held, {name: (n, L + 1, 2)}; answers C_S^outT, C_T^outT.
      single1..k  one source of each language pair            mean1..k   the mean over the first 1..k of them
      contexts    the mean over k contexts of the first pair  mixed      the mean over k different concepts
      unrelated   a single latent of neither concept
    """
    k, (rng, s, t, answers) = len(sources), ask(world, (sources[0], target), seed, n, first=False)
    of = lambda pair, rows: latents(model, world.prompts(rng, pair, rows, args.shots, "word"), args.prompts)
    strange = lambda pair: [r for r in range(len(world.table[target[0]])) if r not in pair]
    others = np.array([rng.choice(strange(pair), k, replace=False) for pair in zip(s, t)])
    one, strangers = ([of(pair, part) for pair, part in zip(sources, parts)] for parts in ([s] * k, others.T))
    mean = lambda parts: torch.stack(parts).mean(0)
    z = {f"single{i + 1}": one[i] for i in range(k)} | {f"mean{i + 1}": mean(one[: i + 1]) for i in range(k)}
    z["contexts"] = mean(one[:1] + [of(sources[0], s) for _ in range(k - 1)])
    z |= {"mixed": mean(one[:1] + strangers[1:]), "unrelated": strangers[0]}
    (rho,) = {world.rho(world.text(target, [], row), world.text(target, [], row, "word")) for row in t}
    prompts, patch = world.prompts(rng, target, t, args.shots), lambda z: hold(z, args.num_patches)
    p = probabilities(model, prompts, answers, rho, torch.stack([*z.values()], 2), patch, -(-args.prompts // 4)).numpy()
    return {name: p[:, :, i] for i, name in enumerate(z)}


def define(model, world, args, sources, code, seed, layer, n):
    """The toy's definitions of a word whose last token holds a mean latent from `layer` on: F1 of the three attributes.

    Returns {"patched", "unrelated", "plain"}: (F1 against the source's concept, F1 against the target's own).
    """
    rng, facts = np.random.default_rng([seed, 6]), [{*names} for names in world.facts]
    apart = lambda s, *rest: all(not facts[s] & facts[t] for t in rest)
    product = [(s, t) for s in range(len(facts)) for t in range(len(facts)) if apart(s, t)]
    pairs = [product[i] for i in rng.permutation(len(product))[:n]]
    other = [int(rng.choice([r for r in range(len(facts)) if apart(r, *pair)])) for pair in pairs]
    question, prompts = lambda row: world.definition(code, row)[0], []
    for _, t in pairs:
        shots = world.few_shot(rng, (code, code), t, args.shots)
        prompts.append(world.ids("".join("".join(world.definition(code, i)) for i in shots) + question(t)))
    rho = world.rho(question(0), question(0).partition('" =')[0])

    def of(rows):
        texts = [world.prompts(rng, pair, rows, args.shots, "word") for pair in sources]
        return torch.stack([latents(model, part, args.prompts) for part in texts]).mean(0)

    idx, mask = common.padded(prompts, model.wte.weight.device)
    T = idx.shape[1]

    def put(value, x):
        x = x.clone()
        x[:, T + rho] = value
        return x

    out = {}
    for name, z in {"patched": of([s for s, _ in pairs]), "unrelated": of(other), "plain": None}.items():
        later, said = range(layer, model.config.n_layer) if z is not None else (), idx
        with torch.no_grad(), model.patch({f"blocks.{j}.resid_post": partial(put, z[j + 1]) for j in later}):
            for _ in range(3):  # greedy, without a cache: `generate` puts prompts in an order of its own
                real = torch.cat((mask, torch.ones_like(said[:, T:], dtype=torch.bool)), 1)
                said = torch.cat((said, model.unembed(model.hidden(said, real)[:, -1:]).argmax(-1)), 1)
        said = [{world.tok.names[i].split(".")[0] for i in ids} for ids in said[:, T:].tolist()]
        out[name] = [np.mean([len(got & facts[pair[i]]) / 3 for got, pair in zip(said, pairs)]) for i in (0, 1)]
    return out


def geometry(model, world, args, seed, contexts=4, languages=4, concepts=24):
    """Shares of variance (L + 1, 3) of concept-token latents: concept, language, both; and with concepts shuffled."""
    rng, codes = np.random.default_rng([seed, 7]), list(world.table)[:languages]
    rows = rng.permutation(len(world.table[codes[0]]))[:concepts].tolist()
    x = []
    for r in range(contexts):
        for i, code in enumerate(codes):
            pair = code, codes[(i + 1 + r % (len(codes) - 1)) % len(codes)]
            x.append(latents(model, world.prompts(rng, pair, rows, args.shots, "word"), args.prompts))
    x = torch.stack(x).unflatten(0, (contexts, len(codes))).permute(2, 0, 3, 1, 4).float()  # L + 1, r, C, languages, d
    order = [torch.from_numpy(rng.permutation(len(rows))) for _ in codes]  # its own for each language
    shuffled = torch.stack([x[:, :, o, i] for i, o in enumerate(order)], 3)
    return tuple(torch.stack([variance_split(layer) for layer in each]) for each in (x, shuffled))


@torch.no_grad()
def logit_lens(model, z, answers):
    """P of each answer's first tokens read by norm and unembedding from latents z (L + 1, n, C): (L + 1, A)."""
    out = torch.zeros(len(z), len(answers[0]))
    for i, options in enumerate(answers):
        p = model.unembed(model.final(z[:, i])).float().softmax(-1).cpu()
        out += torch.stack([p[:, sorted({w[0] for w in words})].sum(-1) for words in options], 1)
    return out / len(answers)


REAL_QUADS = ["fr-en:es-fr", "de-en:es-fr", "es-fr:de-en", "fr-es:it-en", "en-fr:de-es", "de-it:fr-es"]
IDENTITY = "king king\n1135 1135\nhello hello\n?"  # [C]


def study(model, world, args, name, seed):
    """All experiments on one model; returns their results as plain numbers. --resume takes up what is in --out."""
    (quads, sources, target), n, toy = languages_of(args, world), args.pairs, not args.model
    cells, out = {}, {"quads": {}}
    for i, (text, quad) in enumerate(tqdm(quads.items(), f"patch {name}", leave=False, disable=None)):
        controls, of = toy or i == 0, f"{args.steps} steps" if toy else Path(args.words).stem or "words"
        path = f"{name} {text.replace(':', ' ')} {n}x{args.shots} {of}{' controls' * controls}".replace(" ", "-")
        path = Path(args.out) / f"{path}.npz"
        if not (args.resume and path.exists()):
            np.savez(path.with_suffix(".tmp.npz"), **last(model, world, args, quad, seed, n, controls))
            path.with_suffix(".tmp.npz").replace(path)
        p = dict(np.load(path))
        if i == 0:
            out |= {lens: p[lens] for lens in ("logit lens", "patchscope") if lens in p}
        mean, half = band(p["source"])
        able = bool(min(mean[0, 0], mean[-1, 2]) >= 0.3)  # the model can do both translations
        for source, values in p.items() if able or i == 0 else ():
            if values.ndim == 3:
                cells.setdefault(source, []).append(values[:, :, :4])
        interval = bootstrap(lambda rows, p=p["source"]: switch_layers(p[rows].mean(0)), n)
        found = {"able": able, "mean": mean, "band": half, "t": switch_layers(mean), "t_interval": interval}
        out["quads"][text] = found
    p = {source: np.concatenate(values) for source, values in cells.items()}
    out["last"] = {source: v.mean(0) for source, v in p.items()}
    t = {source: switch_layers(v) for source, v in out["last"].items()}
    out |= {"t": t["source"], "t_one_factor": (t["language only"][0], t["concept only"][1])}

    if "concept" in args.stages:
        out |= hold_concepts(model, world, args, sources, target, seed)
    if "geometry" in args.stages:
        out["geometry"], out["geometry_shuffled"] = geometry(model, world, args, seed)
    torch.manual_seed(seed)
    untrained = GPT(model.config).to(model.wte.weight.device, model.wte.weight.dtype)
    out["untrained"] = last(untrained, world, args, quad, seed, min(n, 32), False)["source"].mean(0).max()
    return json.loads(json.dumps(out, default=lambda a: a.tolist()))  # arrays and NumPy's numbers as plain ones


def hold_concepts(model, world, args, sources, target, seed):
    """Experiments 2 and 3 and the definitions, as plain numbers."""
    m = -(-args.pairs // 3) if args.model else args.pairs  # a dozen sources side by side are a dozen times the work
    p = concept(model, world, args, sources, target, seed, m)
    single = np.mean([v[:, :, 0] for name, v in p.items() if name.startswith("single")], 0)  # (m, L + 1)
    j = 1 + int(single.mean(0)[1:].argmax())  # the best block; a patch of the embedding changes the word itself
    means = {name: v[:, j, 0] for name, v in p.items() if name.startswith("mean")}
    out = {"concept_layer": j - 1, "k_sweep": [common.interval(v) for v in means.values()]}
    others = {name: p[name][:, j, 0] for name in ("contexts", "mixed")}
    out["gain"] = {name: common.interval(v - single[:, j]) for name, v in (means | others).items()}
    out["concept"] = {name: v.mean(0) for name, v in p.items()}
    out |= {"single": single.mean(0), "baseline": out["concept"]["mean1"][-1, 1]}
    if not args.model:
        out["define"] = define(model, world, args, sources, target[1], seed, j - 1, m)
    return out


def run_toy(args, tok, seed, position=0):
    """Trains the toy for one tokenization and seed and runs everything on it."""
    env, world, name = common.setup(args), Toy(args, seed, tok), f"{tok}-s{seed}"
    model = train_toy(args, world, name, env, position)
    if env.rank:
        return None
    return {"accuracy": accuracy(model, world, args, 300)} | study(model, world, args, name, seed)


def languages_of(args, world):
    """({quadruple: its pairs}, k source pairs, target pair): --quads, or rotations of the toy's languages.

    Experiment 3 goes into the target of the first quadruple, from pairs of the remaining languages, as in the paper.
    """
    codes = list(world.table)
    at = lambda i: codes[i % len(codes)]
    default = [f"{at(i)}-{at(i + 1)}:{at(i + 2)}-{at(i + 3)}" for i in range(min(6, len(codes)))]
    default = REAL_QUADS if args.model and not args.words else default
    quads = {text: parse_quad(text, world) for text in args.quads or default}
    rest = [c for c in codes if c not in (target := next(iter(quads.values()))[1])]
    sources = [(a, b) for step in range(1, len(rest)) for a, b in zip(rest, rest[step:] + rest[:step])]
    if len(sources) < args.k:
        raise ValueError(f"--k {args.k}: {len(sources)} pairs of languages are left beside {'-'.join(target)}")
    return quads, sources[: args.k], target


def parse_quad(text, world):
    """(("de", "it"), ("fr", "zh")) of "de-it:fr-zh"."""
    found = re.fullmatch(r"(\w+)-(\w+):(\w+)-(\w+)", text)
    if not found or not {*found.groups()} <= {*world.table}:
        raise ValueError(f"--quads {text}: needed source:target as de-it:fr-es, of {', '.join(world.table)}")
    a, b, c, d = found.groups()
    if a == b or c == d or b == d:
        raise ValueError(f"--quads {text}: a pair needs two languages, and source and target two output languages")
    return (a, b), (c, d)


# -------------------------------------------------------------------------------------------------------- the verdict
# fmt: off


def judge(run, results):
    """The claims: medians over seeds, each beside a control that must fail."""
    m = lambda f: float(np.median([f(r) for r in results]))
    cell = lambda r, source, i: max(row[i] for row in r["last"][source])
    most = lambda test: np.mean([test(r) for r in results]) > 0.5
    mixed = lambda source: m(lambda r: cell(r, source, 1))
    stray = m(lambda r: max(cell(r, "noise", i) for i in (1, 2, 3)))
    run.claim("T1", "from the last token, the language arrives before the concept: in between, the target's concept is "
              "said in the source's language", ".62 at layer 14; t_lang 13, t_conc 16 of 32",
              {"C_T in source's language": mixed("source"), "t_lang": m(lambda r: r["t"][0]),
               "t_conc": m(lambda r: r["t"][1])},
              {"noise, any other cell": stray, "untrained, any cell": m(lambda r: r["untrained"])},
              "cell >= .3 at some layer and t_lang < t_conc, in most seeds; controls < .05",
              most(lambda r: cell(r, "source", 1) >= 0.3 and r["t"][0] < r["t"][1]),
              max(stray, m(lambda r: r["untrained"])) < 0.05)

    run.claim("T1b", "the same with one factor at a time: sources that share the target's concept, or its languages",
              "-", {"language only, C_T in source's language": mixed("language only"),
               "concept only, C_S in target's language": m(lambda r: cell(r, "concept only", 3)),
               "t_lang": m(lambda r: r["t_one_factor"][0]), "t_conc": m(lambda r: r["t_one_factor"][1])},
              {"noise, C_T in source's language": mixed("noise"),
               "noise, C_S in target's language": m(lambda r: cell(r, "noise", 3))},
              "both cells >= .3 and t_lang < t_conc, in most seeds",
              most(lambda r: min(cell(r, "language only", 1), cell(r, "concept only", 3)) >= 0.3
                   and r["t_one_factor"][0] < r["t_one_factor"][1]),
              m(lambda r: min(cell(r, "noise", 1), cell(r, "noise", 3))) < 0.3)

    if "concept" in results[0]:
        judge_concept(run, results, m, cell, most)
    if "geometry" in results[0]:
        best = lambda r, which: max(r[which], key=lambda row: row[0])
        share = lambda which, i: m(lambda r: best(r, which)[i])
        test = lambda which: share(which, 2) <= 0.5 * share(which, 0)
        run.claim("G", "concept and language add up: shares of variance at the word's last token, best layer",
                  "-", {name: share("geometry", i) for i, name in enumerate(("concept", "language", "both together"))},
                  {"shuffled: concept": share("geometry_shuffled", 0), "both": share("geometry_shuffled", 2)},
                  "interaction <= half of concept", test("geometry"), not test("geometry_shuffled"))


def judge_concept(run, results, m, cell, most):
    """The claims of experiments 2 and 3 and of the definitions."""
    top = lambda name: m(lambda r: max(row[0] for row in r["concept"][name][1:]))
    base, from_last = m(lambda r: r["baseline"]), m(lambda r: cell(r, "source", 3))
    test = lambda p: p >= 0.5 * base
    run.claim("T2", "at the word's last token the patch changes the concept and keeps the language",
              ".35 of .75", {"C_S in target's language": top("single1"), "unpatched target": base},
              {"unrelated concept": top("unrelated"), "from the last token": from_last},
              ">= half of the unpatched target's; unrelated < .05", test(top("single1")),
              top("unrelated") < 0.05 and not test(from_last))

    k = f"mean{len(results[0]['k_sweep'])}"
    gain = lambda name, i: m(lambda r: r["gain"][name][i])
    rising = most(lambda r: all(b[2] >= a[1] for a, b in zip(r["k_sweep"], r["k_sweep"][1:])))
    single = m(lambda r: max(r["single"][1:]))
    run.claim("T3", "the mean over languages does as well as a single one, or better", ".45 against .35",
              {"single": single, f"{k} - single": gain(k, 0), "low": gain(k, 1), "high": gain(k, 2),
               "contexts - single": gain("contexts", 0)},
              {"mean over concepts - single": gain("mixed", 0)},
              "lower bound >= -.02, not falling with k; the mean over concepts loses >= .3"
              + (" (saturated: can't show a gain)" if single > 0.97 else ""),
              gain(k, 1) >= -0.02 and rising, gain("mixed", 0) <= -0.3)

    if "define" in results[0]:
        f1 = lambda name, i: m(lambda r: r["define"][name][i])
        test = lambda name: f1(name, 0) >= 0.6 and f1(name, 1) <= 0.2
        run.claim("T4", "a mean latent is read out as a definition (F1 of three attributes)",
                  "as good as the word itself", {"source's concept": f1("patched", 0), "overwritten": f1("patched", 1)},
                  {"no patch": f1("plain", 0), "unrelated latent": f1("unrelated", 0)},
                  "source's >= .6 and overwritten's <= .2", test("patched"),
                  not test("plain") and not test("unrelated"))


BLUE, RED, GREEN, GOLD, GREY = "#4477aa", "#ee6677", "#228833", "#ccbb44", "#999999"


def draw(path, r, title):
    """One picture of a run: experiment 1 and its controls; switch layers; experiments 2 and 3; the geometry."""
    name, main = next(iter(r["quads"].items()))
    (sa, sb), (ta, tb) = (pair.split("-") for pair in name.split(":"))
    x, mean, half = np.arange(len(main["mean"])) - 1, np.array(main["mean"]), np.array(main["band"])
    panels = ["curves", "factors"] + ["switches"] * (len(r["quads"]) > 1)
    panels += ["held", "sweep"] * ("concept" in r) + ["shares"] * ("geometry" in r)
    with common.figure(path, -(-len(panels) // 3), min(3, len(panels)), (4.1, 3.1)) as axes:
        ax = dict(zip(panels, axes))
        lines = (f"target's concept in {tb}, its language", BLUE), (f"target's concept in {sb}, the source's", RED)
        lines += (f"source's concept in {sb}", GREEN), (f"source's concept in {tb}", GOLD), ("either, in English", GREY)
        for (label, colour), y, d in zip(lines, mean.T, half.T):
            ax["curves"].plot(x, y, color=colour, label=label)
            ax["curves"].fill_between(x, y - d, y + d, color=colour, alpha=0.2, lw=0)
        for t, colour, what in zip(main["t"], (RED, GREEN), ("language", "concept")):
            ax["curves"].axvline(t, color=colour, ls=":", lw=1, label=f"{what} switches at {t}")
        ax["curves"].set(title=f"{title}: {sa}→{sb} patched into {ta}→{tb}", ylim=(-0.02, 2.1 * mean.max()))
        last = {k: np.array(v) for k, v in r["last"].items()}
        factors = ("language only", 1, "same concept: in source's language", RED, "-"),
        factors += ("concept only", 3, "same languages: source's concept", GREEN, "-"),
        factors += ("scrambled", 0, "scrambled examples: target's answer", BLUE, "--"),
        for key, i, label, colour, style in factors:
            ax["factors"].plot(x, last[key][:, i], color=colour, ls=style, label=label)
        ax["factors"].plot(x, last["noise"][:, 1:].max(1), color=GREY, ls="--", label="noise: largest other cell")
        ax["factors"].set(title="One factor at a time, and controls", ylim=(-0.02, 1.8 * last["language only"].max()))
        for i, quad in enumerate(r["quads"].values() if "switches" in ax else ()):
            for which, colour, label in (0, RED, "language"), (1, GREEN, "concept"):
                low, high = np.array(quad["t_interval"])[:, which]
                ax["switches"].plot([low, high], [i, i], color=colour, lw=5, alpha=0.35)
                ax["switches"].plot(quad["t"][which], i, "o", color=colour, label=None if i else label)
        if "switches" in ax:
            names = [q.replace("-", "→").replace(":", " into ") for q in r["quads"]]
            ax["switches"].set(title="From this layer on, the source's wins", yticks=range(len(names)))
            ax["switches"].set_yticklabels(names)
        if "concept" in r:
            k, (mid, low, high) = len(r["k_sweep"]), np.array(r["k_sweep"]).T
            ax["held"].plot(x, r["single"], color=BLUE, label="one source")
            kinds = (f"mean{k}", "languages", RED), ("contexts", "contexts", GOLD), ("mixed", "concepts", GREY)
            for key, what, colour in kinds:
                ax["held"].plot(x, np.array(r["concept"][key])[:, 0], color=colour, label=f"mean of {k} {what}")
            ax["held"].axhline(r["baseline"], color="k", ls=":", lw=1, label="target, unpatched")
            top = 1.5 * max(r["baseline"], *(row[0] for row in r["concept"][f"mean{k}"]))
            ax["held"].set(title="Held at the word: source's concept", ylim=(-0.02 * top, top))
            ax["sweep"].errorbar(range(1, k + 1), mid, (mid - low, high - mid), fmt="o-", color=RED, capsize=3)
            ax["sweep"].axhline(max(r["single"][1:]), color=BLUE, ls=":", lw=1, label="one source, mean over all")
            ax["sweep"].set(title=f"Mean over k languages, from layer {r['concept_layer']} on")
        if "geometry" in r:
            names = ["concept", "language", "both together"]
            ax["shares"].stackplot(x, np.array(r["geometry"]).T, colors=[GREEN, RED, GREY], labels=names, alpha=0.8)
            ax["shares"].set(title="Variance at the word's last token", ylim=(0, 1), xlim=(x[0], x[-1]))
        for panel, one in ax.items():
            one.set_xlabel("k" if panel == "sweep" else "layer")
            one.xaxis.get_major_locator().set_params(integer=True)
            one.set_ylabel({"switches": "", "shares": "share"}.get(panel, "probability"))
            one.legend(fontsize=7)


def report(name, r):
    """Prints the curves of a run layer by layer, and where each quadruple of languages switches."""
    print(f"\n{name}", "".join(f", {k} accuracy {v:.2f}" for k, v in r.get("accuracy", {}).items()))
    for quad, q in r["quads"].items():
        ends = f"target {q['mean'][0][0]:.2f}, source {q['mean'][-1][2]:.2f}"
        print(f"  {quad}: {ends}, t_lang {q['t'][0]}, t_conc {q['t'][1]}, 95 % {q['t_interval']}")
    print("  layer  T in outT  T in outS  S in outS  S in outT  logit lens  held at the word: one source, mean")
    mean = [row[0] for row in r["concept"][f"mean{len(r['k_sweep'])}"]] if "concept" in r else []
    for j, (row, lens) in enumerate(zip(r["last"]["source"], r["logit lens"])):
        held = [r["single"][j], mean[j]] if mean else []
        print(f"  {j - 1:5d}" + "".join(f"{v:11.3f}" for v in [*row, lens[2], *held]))


# fmt: on
# --------------------------------------------------------------------------------------------------------------- main


def prepare(args, env):
    """Checks the flags, draws all pairs once; returns the real (model, world), or None for the toy."""
    toy = not args.model
    args.shots, args.pairs = args.shots or (3 if toy else 5), args.pairs or (60 if toy else 200)
    limits = {"pairs": (2, 10**6), "shots": (1, 50), "k": (1, 30), "prompts": (1, 10**6), "concepts": (20, 120)}
    common.check_limits(args, limits | {"local": (0, args.n_layer), "num_patches": (0, 10**6)})
    if args.shard:
        raise ValueError("--shard: patched runs need whole weights, allowed: --no-shard")
    if "last" not in args.stages or not {*args.stages} <= {*STAGES}:
        raise ValueError(f"--stages {' '.join(args.stages)}, allowed: {' '.join(STAGES)}, last always among them")
    if toy:
        if args.words:
            raise ValueError("--words needs --model: the toy is trained on the built-in words")
        if not 4 <= len({*args.languages} & {*CODES[:9]}) == len(args.languages):
            raise ValueError(f"--languages: needed four or more, each once, of {' '.join(CODES[:9])}")
        if not {*args.tok} <= {"chunk", "word", "char"}:
            raise ValueError(f"--tok {' '.join(args.tok)}, allowed: chunk word char")
        worlds = [(Toy(args, seed, tok), seed, tok) for tok in args.tok for seed in args.seeds]
        for world, seed, tok in worlds:
            config = config_of(args, world)
            if args.resume:
                common.check_resume(Path(args.out) / f"{tok}-s{seed}.pt", config)
    else:
        table = read_words(args.words or CONCEPTS)
        table.pop("category", None)
        if (n := len(next(iter(table.values())))) <= args.shots:
            raise ValueError(f"{n} words, needed for {args.shots} examples and a query: {args.shots + 1} or more")
        worlds = [(World(None, table, args.score == "word"), seed, "") for seed in args.seeds]
        languages_of(args, worlds[0][0])
        model, tok = pretrained.load(args.model, env.device, args.dtype)
        for world, *_ in worlds:
            world.tok = tok
    for world, seed, _ in worlds:
        quads, sources, target = languages_of(args, world)
        for quad in quads.values():
            ask(world, quad, seed, args.pairs)
        ask(world, (sources[0], target), seed, args.pairs, first=False)
    return None if toy else (model.eval(), world)


def main(argv=None):
    """The paper end to end; returns what it writes to result.json."""
    args = common.parse(Args, argv)
    with common.bad_input():
        env, out = common.setup(args), Path(args.out)
        run = common.Run(args, env, "patching", "2411.08745")
        out.mkdir(parents=True, exist_ok=True)
        real = prepare(args, env)
    if env.rank and real:
        return None
    kinds = [Path(args.model).name] if real else args.tok
    runs = [(kind, seed) for kind in kinds for seed in args.seeds]
    if real:
        results = [study(*real, args, f"{kind}-s{seed}", seed) for kind, seed in runs]
    else:
        jobs = common.job_count(args, env)
        results = common.side_by_side(run_toy, [(args, *r, i % jobs) for i, r in enumerate(runs)], jobs)
    if env.rank:
        return None
    by_kind = {kind: [r for r, (k, _) in zip(results, runs) if k == kind] for kind in kinds}
    judge(run, by_kind[kinds[0]])
    logs = []
    for (kind, seed), r in zip(runs, results):
        run.metrics[name := f"{kind}-s{seed}"] = r
        report(name, r)
        logs.append(log := common.Log(out, name))
        if real:
            log.rewind(-1)
        for j, row in enumerate(r["last"]["source"]):
            log(j - 1 if real else args.steps, layer=j - 1, **dict(zip(("TT", "TS", "SS", "ST"), row)))
    draw(out / "patching.png", by_kind[kinds[0]][0], kinds[0] if real else "toy")
    return run.finish(logs)


if __name__ == "__main__":
    main()
