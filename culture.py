"""Localized cultural knowledge (arXiv 2504.10191): it is there, it stays silent, a vector wakes it.

Ask a model in Turkish for a first name, and it says an American one; begin with "I live in Turkey",
and it knows better. What the country in the prompt (explicit) gains over the same prompt without it
(implicit) is the *explicit-implicit gap*. Take the residual stream of the last prompt token,
explicit minus implicit, and average it over questions: added after one block, this vector localises
answers without a word about the country. It does so for other tasks and in another language than
those that it was built from, in part even if it was built from other cultures. And where naming the
country makes answers more alike, steering keeps more of their diversity.

`--model gemma-3-270m` asks a real model to complete sentences about nine cultures. The toy is a GPT
trained on documents of five cultures in five languages; in those without context the answers are
the default culture's in seven of ten (`--skew`). So the size of the gap is put in, and so is that
documents which name a country are stereotyped. Not put in: that one direction moves the model, and
what it does to other tasks, languages and cultures. Nothing here is about real cultures: the lists
in cultures.json are examples.

Read on: `add` (the method), `vectors` (what is added), `Toy` (the documents), `pick` (which block
and strength), `study`, `judge` (the claims).
"""

import json
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from tqdm import tqdm

import common
import data
import pretrained
from model import GPT, GPTConfig, padded, residuals, sweep

LISTS = Path(__file__).with_name("cultures.json")
SETTINGS = "local", "english"  # prompts in each culture's own language, or in English
CONTEXTS = "none", "neutral", "own"  # in front: nothing, a sentence on music, one's own country
SHORT = "tv", "currency"  # tasks whose answers may be of one or two letters


@dataclass
class Args(common.TrainFlags):
    """culture"""

    presets: ClassVar[dict] = {
        "smoke": dict(
            steps=8, n_layer=2, n_embd=32, warmup=2, eval_every=4, strengths=[1.0], jobs=1
        ),
        "toy": {},
        "paper": dict(model="google/gemma-2-9b", layers=list(range(21, 28)), strengths=[1.0, 2.0]),
    }
    limits: ClassVar[dict] = common.TrainFlags.limits | {
        "layers": (0,),
        "strengths": (0.01, 100),
        "skew": (0.1, 0.9),
        **dict.fromkeys(("prompts", "n_layer", "n_embd"), (1,)),
    }
    unused: ClassVar[set] = {"shard"}  # a steered run needs whole weights
    may_change: ClassVar[set] = common.TrainFlags.may_change | {"layers", "strengths", "prompts"}

    model: str = ""  # gemma-3-270m, a hub id, a folder in place of the toy (paper: gemma-2-9b-it)
    lists: str = ""  # cultures, answers and sentences for --model [cultures.json]
    layers: list[int] = common.default_list()  # blocks to try [toy: all; else 1/2 to 5/6 of them]
    strengths: list[float] = common.default_list(0.5, 1.0, 1.5, 2.0)  # to try (paper: 1 2)
    prompts: int = 32  # prompts in a batch of steered runs
    steps: int = 1500
    batch_size: int = 32
    lr: float = 4e-3
    weight_decay: float = 0.01
    eval_every: int = 500
    skew: float = 0.7  # the toy: share of documents without context that are the default culture's
    n_layer: int = 4  # the toy's blocks (paper: 42)
    n_embd: int = 64  # the toy's width (paper: 3584)


# -------------------------------------------------------------------------------------- the method


def shift(x, v):
    """The residual stream x (B, tail, C) plus v (C,)."""
    return x + v.to(x)


def add(v, layer, strength):
    """Steering as an intervention of `sweep`: h += strength * v after a block, at the last token.

    v  (L + 1, C), from the embedding on
    """
    return {layer: partial(shift, v=strength * v[layer + 1])}


def probabilities(model, h, tokens):
    """P (B, V, A) of the answer tokens (A,), from normed residual vectors h (B, V, C)."""
    parts = []
    for rows in h.flatten(0, 1).split(max(1, 2**24 // model.config.vocab_size)):
        logits = model.unembed(rows).float()
        parts.append((logits[:, tokens] - logits.logsumexp(1, keepdim=True)).exp())
    return torch.cat(parts).unflatten(0, h.shape[:2]).cpu()


@torch.no_grad()
def ask(model, prompts, tokens, size):
    """Prompts as they are: residual stream of the last token (L + 1, n, C), and P (n, A)."""
    z, p = [], []
    for start in range(0, len(prompts), size):
        idx, mask = padded(prompts[start : start + size], model.wte.weight.device)
        x = residuals(model, idx, mask)[:, :, 0]
        z.append(x.cpu())
        p.append(probabilities(model, model.final(x[-1])[:, None], tokens)[:, 0])
    return torch.cat(z, 1), torch.cat(p)


@torch.no_grad()
def steered(model, prompts, tokens, interventions, size):
    """P (n, V, A) of the answer tokens under each of V interventions, in one pass."""
    parts = []
    for start in range(0, len(prompts), size):
        idx, mask = padded(prompts[start : start + size], model.wte.weight.device)
        h = sweep(model, idx, interventions, 1, mask)[:, :, 0]
        parts.append(probabilities(model, h, tokens))
    return torch.cat(parts)


def masses(p, owner, n):
    """Of probabilities p (..., A): the mass (..., n) on each culture's answers; owner (A,)."""
    return torch.stack([p[..., owner == k].sum(-1) for k in range(n)], -1).numpy()


def entropy(p, owner, k):
    """In bits, of culture k's answers, *given* that one of them is said; p (..., A)."""
    q = p[..., owner == k]
    q = q / q.sum(-1, keepdim=True).clamp(min=1e-30)
    return -(q * q.clamp(min=1e-30).log2()).sum(-1).numpy()


def paired(plus, minus):
    """Differences (L + 1, n, C) of latents: each question after every sentence, minus without.

    plus (L + 1, sentences * questions, C), sentence by sentence; minus (L + 1, questions, C)
    """
    return plus - minus.repeat(1, plus.shape[1] // minus.shape[1], 1)


def difference(parts):
    """The mean (L + 1, C) over all pairs of several tasks, each (L + 1, n, C)."""
    return torch.cat(parts, 1).mean(1)


def shuffled(parts, rng):
    """The same with half of the pairs turned round at random: labels that mean nothing."""
    whole = torch.cat(parts, 1)
    order = torch.from_numpy(rng.permutation(whole.shape[1]))
    half = len(order) // 2
    turned = whole[:, order[:half]].sum(1) - whole[:, order[half : 2 * half]].sum(1)
    return turned / max(1, 2 * half)


def vectors(diffs, setting, k, tasks, rng):
    """The vectors for culture k, built on some tasks: {kind: (L + 1, C)}.

    diffs      {(setting, context, culture, task): differences (L + 1, n, C)}
    own        with k's country minus without, prompts in the language of the setting
    cross      the same from prompts of the other setting
    universal  the same, from all cultures but k
    Controls: minus (-own), wrong (the next culture's), neutral and cross neutral (from a sentence
    without a country), shuffled.
    """
    other = SETTINGS[1 - SETTINGS.index(setting)]
    cultures = sorted({key[2] for key in diffs})
    own = [diffs[setting, "own", k, t] for t in tasks]
    rest = [diffs[setting, "own", j, t] for j in cultures if j != k for t in tasks]
    wrong = following(k, len(cultures))
    return {
        "own": difference(own),
        "cross": difference([diffs[other, "own", k, t] for t in tasks]),
        "universal": difference(rest),
        "minus": -difference(own),
        "wrong": difference([diffs[setting, "own", wrong, t] for t in tasks]),
        "neutral": difference([diffs[setting, "neutral", k, t] for t in tasks]),
        "cross neutral": difference([diffs[other, "neutral", k, t] for t in tasks]),
        "shuffled": shuffled(own, rng),
    }


def following(k, n):
    """The culture after k, of those from 1 to n."""
    return 1 + k % n


def pick(local, explicit, strengths):
    """For each task its cell (block and strength), chosen on all the other tasks.

    The smallest strength at which some block's local share reaches that of the explicit prompt, and
    there the best block; where none reaches it, the best cell of all.

    local (tasks, cells), explicit (tasks,), strengths (cells,)
    """
    chosen = []
    for task in range(len(local)):
        score = np.delete(local, task, 0).mean(0)
        reaches = score >= np.delete(explicit, task).mean()
        allowed = np.ones(len(score), bool)
        if reaches.any():
            allowed = reaches & (strengths == strengths[reaches].min())
        chosen.append(int(np.where(allowed, score, -1).argmax()))
    return chosen


def at_localisation(local, values, target):
    """`values` where `local`, both along the strength, first reaches a target; nan if never."""
    reached = np.flatnonzero(local >= target)
    if not len(reached):
        return np.nan
    i = reached[0]
    if i == 0:
        return values[0]
    w = (target - local[i - 1]) / (local[i] - local[i - 1])
    return w * values[i] + (1 - w) * values[i - 1]


# ----------------------------------------------------------------------------------------- the toy

CULTURES = 5
TASKS = 8
ANSWERS = 6  # of each culture to each task
FACTS = 4  # questions with one answer everywhere
SHOTS = 6  # questions in a document
NATIVE, STEREOTYPE = (np.arange(1, 1 + ANSWERS) ** -power for power in (0.5, 2.0))
NATIVE, STEREOTYPE = NATIVE / NATIVE.sum(), STEREOTYPE / STEREOTYPE.sum()  # P of answers by rank
VERBS = "live", "am_from", "grew_up_in"


class Toy:
    """The toy's words, documents and true probabilities. A word is a token.

    A document in French: `I.fr live.fr ru.fr ;.fr cities.fr ?.fr cities:Moscow(ru) ; ...`. Culture
    0 is the default, language k is that of culture k.
    """

    def __init__(self, seed, skew):
        lists = json.loads(data.read_text(LISTS))
        self.seed, self.skew = seed, skew
        self.cultures = lists["cultures"][:CULTURES]
        self.languages = lists["languages"][:CULTURES]
        self.tasks = list(lists["answers"])[:TASKS]
        self.facts = [f"fact{i}" for i in range(FACTS)]
        words = ["<pad>", "<bos>", ";"]
        self.answers = {}  # task -> (tokens (A,), their owners (A,))
        for task in self.tasks:
            first = len(words)
            for culture in self.cultures:
                for answer in lists["answers"][task][culture].split("|")[:ANSWERS]:
                    spelling = answer.split("/")[0].replace(" ", "_")
                    words.append(f"{task}:{spelling}({culture})")
            owner = torch.arange(CULTURES).repeat_interleave(ANSWERS)
            self.answers[task] = torch.arange(first, len(words)), owner
        words += [f"{fact}:yes" for fact in self.facts]
        self.n_answers = len(words)
        things = [f"thing{i}" for i in range(6)]
        every = ["I", "like", "?", ";", *VERBS, *things, *self.tasks, *self.facts, *self.cultures]
        for language in self.languages:
            words += [f"{word}.{language}" for word in every]
        self.number = {word: i for i, word in enumerate(words)}
        rng = np.random.default_rng([seed, 1])
        foreign = [(i, k) for i, k in product(range(1, CULTURES), range(CULTURES)) if i != k]
        self.held = [foreign[i] for i in rng.permutation(len(foreign))[: len(foreign) // 2]]
        told = [pair for pair in foreign if pair not in self.held]
        native = [(k, k) for k in range(1, CULTURES)]
        # (language, country) of documents that name a country; those held out never occur
        self.told = native * 2 + [(0, k) for k in range(CULTURES)] + told

    def encode(self, text):
        return [1] + [self.number[word] for word in text.split()]

    def in_language(self, i, words):
        return " ".join(f"{word}.{self.languages[i]}" for word in words.split())

    def sentences(self, i, context, k):
        """The sentences of a context, in language i and about culture k."""
        if context == "none":
            return [""]
        if context == "neutral":
            return [self.in_language(i, f"I like thing{n} ;") for n in range(6)]
        return [self.in_language(i, f"I {verb} {self.cultures[k]} ;") for verb in VERBS]

    def prompts(self, setting, context, k, task):
        """Ids of a task's question after each sentence of a context."""
        i = k if setting == "local" else 0
        question = self.in_language(i, f"{task} ?")
        return [self.encode(f"{s} {question}") for s in self.sentences(i, context, k)]

    def unrelated(self, k):
        """Prompts that have nothing to do with cultures."""
        return [self.encode(self.in_language(k, f"{fact} ?")) for fact in self.facts]

    def truth(self, i, context, k):
        """What documents say first after such a beginning: P (A,) by culture and rank."""
        p = np.zeros((CULTURES, ANSWERS))
        if context == "own":
            p[k] = STEREOTYPE
        else:
            p[0] += self.skew * NATIVE
            p[i] += (1 - self.skew) * NATIVE
        return p.ravel()

    def document(self, rng):
        """The text of a document: six questions, answered by one culture throughout.

        Half the documents have no context, .35 name a country and are of its culture, .15 begin
        with a sentence that says nothing. Without a country, the default culture answers with
        probability `skew`, else that of the language.
        """
        context = rng.choice(["none", "own", "neutral"], p=[0.5, 0.35, 0.15])
        if context == "own":
            i, k = self.told[rng.integers(len(self.told))]
        else:
            i = rng.integers(CULTURES)
            k = 0 if rng.random() < self.skew else i
        sentences = self.sentences(i, context, k)
        ids = self.encode(sentences[rng.integers(len(sentences))])
        ranks = rng.choice(ANSWERS, SHOTS, p=STEREOTYPE if context == "own" else NATIVE)
        for rank in ranks:
            task = (self.tasks + self.facts)[rng.integers(TASKS + FACTS)]
            ids += self.encode(self.in_language(i, f"{task} ?"))[1:]
            if task in self.answers:
                ids.append(int(self.answers[task][0][k * ANSWERS + rank]))
            else:
                ids.append(self.number[f"{task}:yes"])
            ids.append(2)
        return ids

    def batch(self, step, args, env):
        """The documents of one step; this rank's share of them. Only answers count in the loss."""
        rng = np.random.default_rng([self.seed, 2, step])
        ids = torch.zeros(args.batch_size, 1 + 4 + 4 * SHOTS, dtype=torch.long)
        for row in ids:
            document = self.document(rng)
            row[: len(document)] = torch.tensor(document)
        idx, targets = ids[env.rank :: env.world, :-1], ids[env.rank :: env.world, 1:]
        weights = (targets > 2) & (targets < self.n_answers)
        return {"idx": idx, "targets": targets, "weights": weights.float()}


def divergence(model, world, size):
    """KL in nats from documents to model, of first answers: {context: mean of tasks, cultures}."""
    found = {}
    for context in CONTEXTS:
        kl = []
        for k, task in product(range(CULTURES), world.tasks):
            prompts = world.prompts("local", context, k, task)
            p = ask(model, prompts, world.answers[task][0], size)[1].double().numpy()
            truth = world.truth(k, context, k)
            said = truth > 0
            kl.append((truth[said] * np.log(truth[said] / p[:, said])).sum(1).mean())
        found[f"kl_{context}"] = float(np.mean(kl))
    return found


def train_toy(args, env, log, seed):
    """(the toy's model, its world), trained."""
    world = Toy(seed, args.skew)
    torch.manual_seed(seed)
    plain = dict(norm="rms", tie=True, qkv_bias=False, attn_bias=False, mlp_bias=False)
    model = GPT(GPTConfig(len(world.number), 64, args.n_layer, 4, args.n_embd, **plain))

    def evaluate(step):
        return divergence(model, world, args.prompts)

    common.train(model, partial(world.batch, args=args, env=env), args, env, log, evaluate)
    return model.eval(), world


# -------------------------------------------------------------------------------------- real models


class Real:
    """Sentences for a real model to complete: `I live in Turkey. My favourite drink is`.

    What counts is an answer's first token, in every spelling of the lists. Tokens that begin
    answers of two cultures are dropped, and pieces of under three letters (but see SHORT).
    """

    def __init__(self, tok, lists):
        self.tok, self.lists = tok, lists
        self.cultures, self.languages = lists["cultures"], lists["languages"]
        self.tasks = list(lists["answers"])
        self.answers = {task: self.first_tokens(task) for task in self.tasks}

    def first_tokens(self, task):
        """Tokens (A,) that begin an answer, and the culture of each (A,)."""
        owners = {}  # token -> cultures
        for k, culture in enumerate(self.cultures):
            for spelling in self.lists["answers"][task][culture].replace("/", "|").split("|"):
                token = pretrained.first_token(self.tok, " " + spelling)
                owners.setdefault(token, set()).add(k)
        least = 1 if task in SHORT else 3
        kept = []
        for token, cultures in sorted(owners.items()):
            if len(cultures) == 1 and len(self.tok.decode([token]).strip()) >= least:
                kept.append((token, *cultures))
        for k, culture in enumerate(self.cultures):
            if k not in {owner for _, owner in kept}:
                raise ValueError(f"{task}, {culture}: no answer has a first token of its own")
        tokens, owner = zip(*kept)
        return torch.tensor(tokens), torch.tensor(owner)

    def sentences(self, language, context, k):
        """The sentences of a context, in a language and about culture k."""
        if context == "none":
            return [""]
        country = self.lists["countries"][self.cultures[k]]
        texts = self.lists["hints"][language][context].split("|")
        return [text.replace("{}", country) for text in texts]

    def prompts(self, setting, context, k, task):
        """Ids of a task's sentences to complete, after each sentence of a context."""
        language = self.languages[k if setting == "local" else 0]
        questions = self.lists["prompts"][language][task].split("|")
        texts = product(self.sentences(language, context, k), questions)
        return [self.tok.encode("".join(text), bos=True) for text in texts]

    def unrelated(self, k):
        """Prompts that have nothing to do with cultures (in English)."""
        facts = [fact.partition("|")[0] for fact in self.lists["facts"]]
        return [self.tok.encode(fact, bos=True) for fact in facts]


def read_lists(path):
    """cultures.json, or a file of its form. ValueError names what is missing."""
    try:
        lists = json.loads(data.read_text(path))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: {error}") from None
    if not isinstance(lists, dict):
        raise ValueError(f"{path} holds no JSON object")

    for key in "cultures", "languages", "answers", "countries", "hints", "prompts", "facts":
        if not lists.get(key):
            raise ValueError(f"{path} lacks {key}")
    cultures, tasks = lists["cultures"], lists["answers"]
    languages = lists["languages"]
    if len(cultures) < 3 or len(tasks) < 3 or len(languages) != len(cultures):
        raise ValueError(f"{path}, needed: three cultures, a language for each, three tasks")
    needed = [("countries", culture) for culture in cultures]
    needed += product(["answers"], tasks, cultures)
    needed += product(["hints"], languages, ["own", "neutral"])
    needed += product(["prompts"], languages, tasks)
    for keys in needed:
        at = lists
        for key in keys:
            at = at.get(key) if isinstance(at, dict) else None
        if not isinstance(at, str) or not at.strip():
            raise ValueError(f"{path} lacks {' > '.join(keys)}")
    return lists


# ---------------------------------------------------------------------------------------- the study


def collect(model, world, size):
    """Every prompt once, and what a sentence in front of it changes in the residual stream.

    Returns {(setting, context, culture, task): P (n, A)}, and by the same keys, for contexts with a
    sentence, the differences (L + 1, n, C) from the questions without one.
    """
    seen, latents = {}, {}
    said, diffs = {}, {}
    cultures = range(1, len(world.cultures))
    for key in product(SETTINGS, CONTEXTS, cultures, world.tasks):
        setting, context, k, task = key
        prompts = world.prompts(*key)
        same = task, str(prompts)  # in English without a country, for example
        if same not in seen:
            seen[same] = ask(model, prompts, world.answers[task][0], size)
        latents[key], said[key] = seen[same]
        if context != "none":
            diffs[key] = paired(latents[key], latents[setting, "none", k, task])
    return said, diffs


def study(model, world, args, log, seed):
    """All measurements on one model."""
    n = len(world.cultures)
    cultures = range(1, n)
    shape = n - 1, len(world.tasks), n
    runs, diffs = collect(model, world, args.prompts)
    said = {}  # (setting, prompt or vector) -> masses (cultures but 0, tasks, cultures)
    for setting, context in product(SETTINGS, CONTEXTS):
        table = []
        for k, task in product(cultures, world.tasks):
            p = runs[setting, context, k, task]
            table.append(masses(p, world.answers[task][1], n).mean(0))
        said[setting, f"prompt {context}"] = np.reshape(table, shape)
    steering = Steering(model, world, args, diffs, np.random.default_rng([seed, 5]))
    for setting in SETTINGS:
        tables = {}
        for k in tqdm(cultures, f"{log.run}, {setting}", leave=False):
            explicit = said[setting, "prompt own"][k - 1, :, k]
            for kind, rows in steering.run(setting, k, explicit).items():
                tables.setdefault(kind, []).append(rows)
        said |= {(setting, kind): np.reshape(table, shape) for kind, table in tables.items()}
    profile = np.mean(steering.profiles[steering.main], (0, 1)).reshape(len(args.layers), -1)
    for layer, row in zip(args.layers, profile):
        log(0 if args.model else args.steps, layer=layer, local=row.tolist())
    rows = measures(said)
    found = {"profile": profile, "picked": steering.picked, "rows": rows, "kl": steering.kl()}
    if not args.model:
        found["entropy"] = steering.diversity(runs)
        for name in "steered", "other language", "mixture":
            more = np.subtract(found["entropy"][name], found["entropy"]["explicit"])
            bits, low, high = common.interval(more)
            rows[f"entropy {name}"] = {"bits": bits, "low": low, "high": high}
            rows[f"entropy {name}"]["reached"] = np.isfinite(more).mean()  # else it is left out
    return found


class Steering:
    """Vectors for every culture and task, and what they do: a task's are built on all others."""

    def __init__(self, model, world, args, diffs, rng):
        self.model, self.world = model, world
        self.args = args
        self.diffs, self.rng = diffs, rng
        self.main = main_setting(args)
        self.cells = list(product(args.layers, args.strengths))
        self.profiles = {setting: [] for setting in SETTINGS}  # of own: (tasks, cells) a culture
        self.picked = {}  # "culture, setting" -> (block, strength) for each task
        self.own = {}  # (culture, task) -> own vector of the main setting

    def run(self, setting, k, explicit):
        """Masses (tasks, cultures) without a country, steered in the cells that `pick` chooses.

        {kind of vector: such a table}; explicit (tasks,): the share that the country brings out
        """
        tasks = self.world.tasks
        banks, profile = [], []
        for task in tasks:
            build = [other for other in tasks if other != task]
            bank = vectors(self.diffs, setting, k, build, self.rng)
            tries = [add(bank["own"], *cell) for cell in self.cells]
            profile.append(self.said(setting, k, task, tries)[:, k])
            banks.append(bank)
            if setting == self.main:
                self.own[k, task] = bank["own"]
        strengths = np.array([strength for _, strength in self.cells])
        chosen = [self.cells[i] for i in pick(np.array(profile), explicit, strengths)]
        self.profiles[setting].append(profile)
        self.picked[f"{self.world.cultures[k]}, {setting}"] = chosen
        tables = {}
        for task, bank, cell in zip(tasks, banks, chosen):
            done = self.said(setting, k, task, [add(v, *cell) for v in bank.values()])
            for kind, row in zip(bank, done):
                tables.setdefault(kind, []).append(row)
        return tables

    def said(self, setting, k, task, interventions):
        """Masses (V, cultures) under each intervention, means over prompts without a country."""
        p = self.answer(setting, k, task, interventions)
        return masses(p, self.world.answers[task][1], len(self.world.cultures)).mean(0)

    def answer(self, setting, k, task, interventions):
        """P (n, V, A) of a task's answers."""
        prompts = self.world.prompts(setting, "none", k, task)
        tokens = self.world.answers[task][0]
        return steered(self.model, prompts, tokens, interventions, self.args.prompts)

    @torch.no_grad()
    def kl(self):
        """Side effect of the own vectors: mean KL in nats of what follows unrelated prompts."""
        found = []
        for (k, task), v in self.own.items():
            if task != self.world.tasks[k % len(self.world.tasks)]:
                continue  # one task a culture is enough
            place = self.world.tasks.index(task)
            cell = self.picked[f"{self.world.cultures[k]}, {self.main}"][place]
            idx, mask = padded(self.world.unrelated(k), self.model.wte.weight.device)
            for h in sweep(self.model, idx, [{}, add(v, *cell)], 1, mask)[:, :, 0]:
                plain, changed = self.model.unembed(h).float().log_softmax(-1)
                found.append((plain.exp() * (plain - changed)).sum().item())
        return np.mean(found)

    def diversity(self, runs):
        """Entropies in bits of local answers where their share is .9 of the explicit prompt's.

        steered: by the own vector, at the strength that just reaches it; explicit: the prompt that
        names the country; other language: the same in English; mixture: explicit and implicit
        answers mixed until they are as local. {name: one for each culture and task}
        """
        n, found = len(self.world.cultures), {}
        weights = torch.linspace(0, 1, 101)[:, None]
        for (k, task), v in self.own.items():
            owner = self.world.answers[task][1]
            place = self.world.tasks.index(task)
            layer, _ = self.picked[f"{self.world.cultures[k]}, {self.main}"][place]
            plain = runs["local", "none", k, task].mean(0)
            explicit = runs["local", "own", k, task].mean(0)
            english = runs["english", "own", k, task].mean(0)
            mixed = weights * explicit + (1 - weights) * plain
            tries = [add(v, layer, strength) for strength in np.linspace(0, 4, 33)]
            p = self.answer("local", k, task, tries).mean(0)
            target = 0.9 * masses(explicit, owner, n)[k]
            for name, curve in ("steered", p), ("mixture", mixed):
                local = masses(curve, owner, n)[:, k]
                bits = at_localisation(local, entropy(curve, owner, k), target)
                found.setdefault(name, []).append(float(bits))
            for name, one in ("explicit", explicit), ("other language", english):
                found.setdefault(name, []).append(float(entropy(one, owner, k)))
        return found


def main_setting(args):
    """Where the gap is looked for. A real model is asked in English: it speaks that best."""
    return "english" if args.model else "local"


def measures(said):
    """The numbers that the claims compare: {"setting, then prompt or vector": {measure: number}}.

    local, theirs, others: mass on the culture's own answers, on the next culture's, and on those of
    all but itself and the default; *_rise: more than without a country. closed: the part of the gap
    from implicit to explicit.
    """
    rows = {}
    for (setting, name), mass in said.items():  # prompts come first: none, then own
        n = mass.shape[-1]
        local, theirs, others = [], [], []
        for k in range(1, n):
            of = mass[k - 1]  # (tasks, cultures)
            local.append(of[:, k])
            theirs.append(of[:, following(k, n - 1)])
            others.append(of.sum(1) - of[:, k] - of[:, 0])
        row = {"local": np.mean(local), "theirs": np.mean(theirs), "others": np.mean(others)}
        before = rows.get(f"{setting} prompt none", row)
        for measure in "local", "theirs", "others":
            row[f"{measure}_rise"] = row[measure] - before[measure]
        gap = rows.get(f"{setting} prompt own", row)["local_rise"]
        row["closed"] = row["local_rise"] / gap if gap else 0
        rows[f"{setting} {name}"] = row
    return rows


def run_seed(real, args, env, log, arm, seed):
    """Everything on the (model, world) of a pretrained model, or on a toy that is trained first."""
    if real:
        log.rewind(0)
        return study(*real, args, log, seed)
    model, world = train_toy(args, env, log, seed)
    return study(model, world, args, log, seed) | divergence(model, world, args.prompts)


# ------------------------------------------------------------------------------- claims and figure


def judge(run, found):
    """The paper's claims, each beside the controls that must fail the same criterion."""
    rows = {name: [result["rows"][name] for result in found] for name in found[0]["rows"]}
    main = main_setting(run.args)
    put_in = f"abs(arm.local_rise - {run.args.skew:g}) <= .1"  # as large as the toy's text has it
    run.claim(
        "C1",
        f"naming the country brings out the local answer (probability, {main} prompts)",
        ".55 -> .90",
        "arm.local >= 2 * base.local" if run.args.model else put_in,
        base=rows[f"{main} prompt none"],
        arm=rows[f"{main} prompt own"],
        controls={"neutral sentence": rows[f"{main} prompt neutral"]},
    )
    run.claim(
        "C2",
        f"a culture's own vector closes the gap, on a task that it was not built from ({main})",
        ".21 to .67 of it",
        "arm.closed >= .4 and arm.others_rise < arm.local_rise",
        arm=rows[f"{main} own"],
        controls={name: rows[f"{main} {name}"] for name in ("neutral", "shuffled", "minus")},
    )
    run.claim(
        "C2b",
        "another culture's vector brings out that culture's answers (English prompts)",
        "-",
        "arm.theirs >= 2 * base.theirs and arm.theirs_rise > arm.local_rise",
        base=rows["english prompt none"],
        arm=rows["english wrong"],
        controls={"own vector": rows["english own"]},
    )
    run.claim(
        "C3",
        "a vector built from English prompts works in the culture's language",
        ".44 of the gap",
        "arm.closed >= .2",
        arm=rows["local cross"],
        controls={"neutral, from English": rows["local cross neutral"]},
    )
    if "entropy steered" in rows:
        run.claim(
            "C5",
            "as local as 9/10 of explicit answers, steered ones are more diverse (bits)",
            "less alike in most languages",
            "arm.low >= .1 and arm.reached >= .9",
            arm=rows["entropy steered"],
            controls={"explicit, in English": rows["entropy other language"]},
        )
    run.claim(
        "C6",
        "a universal vector, of other cultures only, still localises",
        ".22 to .43 of the gap",
        "arm.closed >= .1",
        arm=rows["local universal"],
        controls={name: rows[f"local {name}"] for name in ("neutral", "shuffled")},
    )


KINDS = "own", "cross", "universal", "neutral", "cross neutral", "shuffled", "minus"


def draw(path, found, args, title):
    """Prompts, vectors, blocks, and (the toy) how alike the answers are."""

    def mean(measure, names):
        return [[result["rows"][name][measure] for name in names] for result in found]

    bars = {}
    for setting in SETTINGS:
        names = [f"{setting} prompt {context}" for context in CONTEXTS]
        bars[f"{setting} prompts"] = mean("local", names)
    profile = np.array([result["profile"] for result in found])
    lines = {}
    for i, strength in enumerate(args.strengths):
        lines[f"strength {strength:g}"] = args.layers, profile[:, :, i]
    main = main_setting(args)
    explicit = np.mean(mean("local", [f"{main} prompt own"]))
    closed = {f"{main} prompts": mean("closed", [f"{main} {kind}" for kind in KINDS])}
    kinds = [kind.replace(" ", "\n") for kind in KINDS]
    items = [
        dict(title=f"{title}: a sentence in front", bars=bars, names=CONTEXTS),
        dict(title="Own vector after one block", lines=lines, levels={"explicit": explicit}),
        dict(title="Closed of the gap", bars=closed, names=kinds),
    ]
    for item in items[:2]:
        item["ylabel"] = "probability of local answers"
    items[1]["xlabel"] = "block"
    if "entropy" in found[0]:
        names = "explicit", "mixture", "steered"
        bits = [[np.nanmean(result["entropy"][name]) for name in names] for result in found]
        items.append(dict(title="Entropy of local answers, bits", bars={"": bits}, names=names))
    common.panels(path, items)


# -------------------------------------------------------------------------------------------- main


def check(args, env):
    """What is wrong with the flags: (whether it is, what to say)."""
    toy = set(vars(common.TrainFlags())) - set(vars(common.Flags()))
    toy |= {"resume", "skew", "n_layer", "n_embd"}
    idle = common.changed_flags(args, toy if args.model else ["lists"])
    without = "with" if args.model else "without"
    return [
        (idle, f"{idle}: no effect {without} --model"),
        (args.model and env.world > 1, "--model runs in one process"),
        (args.n_embd % 8, f"--n-embd {args.n_embd}, allowed: multiples of 8"),
        (args.batch_size % env.world, f"--batch-size is no multiple of {env.world} processes"),
    ]


def main(argv=None):
    """The paper end to end; returns what it writes to result.json."""
    run = common.Run(Args, argv, "2504.10191", check)
    args = run.args
    real, name = None, "toy"
    n = args.n_layer
    if args.model:
        with common.bad_input("--lists"):
            lists = read_lists(args.lists or LISTS)
        with common.bad_input("--model"):
            model, tok = pretrained.load(args.model, run.env.device, args.dtype)
        with common.bad_input("--lists"):
            real = model.eval(), Real(tok, lists)
        n, name = model.config.n_layer, Path(args.model).name
    args.strengths = sorted({*args.strengths})
    middle = range(n // 2, n - n // 6) if args.model else range(n)
    args.layers = sorted({*args.layers}) or [*middle]
    with common.bad_input("--layers"):
        if args.layers[-1] >= n:
            raise ValueError(f"--layers {args.layers[-1]}, allowed: 0 to {n - 1}")
    found = run.each(partial(run_seed, real), [name])
    if found is None:
        return None
    judge(run, found[name])
    draw(run.out / "culture.png", found[name], args, name)
    return run.finish(found)


if __name__ == "__main__":
    common.cli(main)
