"""Localized cultural knowledge (arXiv 2504.10191): it is there, it stays silent, a vector wakes it.

Ask a model in Turkish for a first name, and it says an American one; begin with "I live in Turkey",
and it knows better. What the country in the prompt (explicit) gains over the same prompt without it
(implicit) is the *gap*. The residual stream of the last prompt token, explicit minus implicit, mean
over questions, is a vector: added after one block, it closes the gap on tasks that it never saw.

`--model gemma-3-270m` asks a real model to complete sentences about nine cultures. The toy is a GPT
trained on documents of five: most of those without a country are the default culture's. Nothing
here is about real cultures: the lists in cultures.json are examples.

Read on: `add` (the method), `vectors` (what is added), `Toy` (the documents), `pick` (which block
and strength), `steer`, `judge` (the claims).
"""

import json
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

import common
import data
import pretrained
from model import GPT, GPTConfig, padded, residuals, sweep

LISTS = Path(__file__).with_name("cultures.json")
SETTINGS = "local", "english"  # prompts in each culture's own language, or in English
CONTEXTS = "none", "neutral", "own"  # in front: nothing, a sentence on music, one's own country


@dataclass
class Args(common.TrainFlags):
    """culture"""

    presets: ClassVar[dict] = {
        "smoke": dict(steps=8, n_layer=2, n_embd=32, warmup=2, strengths=[1.0], jobs=1),
        "toy": {},
        "paper": dict(model="google/gemma-2-9b", layers=list(range(21, 28)), strengths=[1.0, 2.0]),
    }
    limits: ClassVar[dict] = common.TrainFlags.limits | dict(
        layers=(0,), strengths=(0.01, 100), skew=(0.1, 0.9), n_layer=(1,), n_embd=(1,)
    )
    unused: ClassVar[set] = {"shard", "eval_every"}  # a steered run needs whole weights
    may_change: ClassVar[set] = common.TrainFlags.may_change | {"layers", "strengths"}

    model: str = ""  # gemma-3-270m, a hub id, a folder in place of the toy (paper: gemma-2-9b-it)
    lists: str = ""  # cultures, answers and sentences for --model [cultures.json]
    layers: list[int] = common.default_list()  # blocks to try [toy: all; else 1/2 to 5/6 of them]
    strengths: list[float] = common.default_list(0.5, 1.0, 1.5, 2.0)  # of the vector (paper: 1 2)
    steps: int = 1500
    batch_size: int = 32
    lr: float = 4e-3
    weight_decay: float = 0.01
    skew: float = 0.7  # the toy: share of documents without context that are the default culture's
    n_layer: int = 4  # the toy's blocks (paper: 42)
    n_embd: int = 64  # the toy's width (paper: 3584)


# ----------------- the method


def add(v, layer, strength):
    """Steering by v (L + 1, C), from the embedding on, as an intervention of `sweep`."""

    def shift(x):  # the residual stream after the block, at the last token
        return x + (strength * v[layer + 1]).to(x)

    return {layer: shift}


def probabilities(model, h, tokens):
    """P (..., A) of the answer tokens (A,), from normed residual vectors h (..., C)."""
    logits = model.unembed(h).float()
    return (logits[..., tokens] - logits.logsumexp(-1, keepdim=True)).exp().cpu()


def ask(model, prompts, tokens):
    """Prompts as they are: residual stream of the last token (L + 1, n, C), and P (n, A)."""
    idx, mask = padded(prompts, model.wte.weight.device)
    x = residuals(model, idx, mask)[:, :, 0]
    return x.cpu(), probabilities(model, model.final(x[-1]), tokens)


def steered(model, world, setting, k, task, interventions):
    """P (V, A) of a task's answers under V interventions, mean over prompts without a country."""
    idx, mask = padded(world.prompts(setting, "none", k, task), model.wte.weight.device)
    h = sweep(model, idx, interventions, 1, mask)[:, :, 0]
    return probabilities(model, h, world.answers[task][0]).mean(0)


def masses(p, owner, n):
    """The mass (..., n) on each culture's answers, of probabilities p (..., A) and owner (A,)."""
    return torch.stack([p[..., owner == k].sum(-1) for k in range(n)], -1).numpy()


def entropy(p, owner, k):
    """In bits, of culture k's answers, *given* that one of them is said; p (..., A)."""
    q = p[..., owner == k]
    q = q / q.sum(-1, keepdim=True).clamp(min=1e-30)
    return -(q * q.clamp(min=1e-30).log2()).sum(-1).numpy()


def shuffled(pairs, rng):
    """Mean of pairs (L + 1, n, C), half of them turned round: labels that mean nothing."""
    order = torch.from_numpy(rng.permutation(pairs.shape[1]))
    half = len(order) // 2
    turned = pairs[:, order[:half]].sum(1) - pairs[:, order[half : 2 * half]].sum(1)
    return turned / max(1, 2 * half)


def vectors(diffs, setting, k, tasks, rng):
    """Vectors {kind: (L + 1, C)} for culture k, built on some tasks from what `collect` finds."""

    def changes(language, context, *some):  # (L + 1, all prompts of some cultures, C)
        return torch.cat([diffs[language, context, j, t] for j, t in product(some, tasks)], 1)

    other = SETTINGS[1 - SETTINGS.index(setting)]
    cultures = sorted({culture for _, _, culture, _ in diffs})  # from 1 on: 0 is the default
    rest = [culture for culture in cultures if culture != k]
    own = changes(setting, "own", k)
    return {
        "own": own.mean(1),
        "cross": changes(other, "own", k).mean(1),  # from prompts in the other language
        "universal": changes(setting, "own", *rest).mean(1),  # from all cultures but k
        "minus": -own.mean(1),
        "wrong": changes(setting, "own", 1 + k % len(cultures)).mean(1),  # from the next culture
        "neutral": changes(setting, "neutral", k).mean(1),  # from a sentence without a country
        "cross neutral": changes(other, "neutral", k).mean(1),
        "shuffled": shuffled(own, rng),
    }


def pick(local, explicit, strengths):
    """For each task its cell (block and strength), chosen on all the other tasks.

    The smallest strength at which some block's local share (tasks, cells) reaches that of the
    explicit prompt (tasks,), and there the best block; where none does, the best cell of all.
    """
    chosen = []
    for task in range(len(local)):
        score = np.delete(local, task, 0).mean(0)
        reaches = score >= np.delete(explicit, task).mean()
        if reaches.any():
            score = np.where(reaches & (strengths == strengths[reaches].min()), score, -1)
        chosen.append(int(score.argmax()))
    return chosen


# -------------------- the toy

CULTURES = "us tr fr ru de".split()  # the first is the default
LANGUAGES = "en tr fr ru de".split()  # each culture's own
TASKS = "names cities dishes sweets drinks landmarks clothes holidays".split()
FACTS = "moon snow gold salt".split()  # questions with one answer everywhere
VERBS = "live", "am_from", "grew_up_in"
THINGS = "music", "rain", "tea", "books", "dogs", "sleep"
ANSWERS = 6  # of each culture to each task
SHOTS = 6  # questions in a document
RANKS = np.arange(1, 1 + ANSWERS)
NATIVE = RANKS**-0.5 / (RANKS**-0.5).sum()  # P of a culture's answers by rank: many are said
STEREOTYPE = RANKS**-2.0 / (RANKS**-2.0).sum()  # where the country is named: mostly the first


class Toy:
    """The toy's words, documents and prompts. A word is a token.

    A document in French about Russia: `I.fr live.fr ru.fr ;.fr cities.fr ?.fr cities:ru0 ; ...`
    """

    cultures, tasks, main = CULTURES, TASKS, "local"

    def __init__(self, seed, skew):
        self.seed, self.skew = seed, skew
        owner = torch.arange(len(CULTURES)).repeat_interleave(ANSWERS)
        words = ["<pad>", "<bos>", ";"]
        self.answers = {}  # task -> (tokens (A,), their owners (A,))
        for task in TASKS:
            self.answers[task] = len(words) + torch.arange(len(owner)), owner
            words += [f"{task}:{k}{rank}" for k, rank in product(CULTURES, range(ANSWERS))]
        words += [f"{fact}:yes" for fact in FACTS]
        self.answers_end = len(words)
        for language in LANGUAGES:
            own = ["I", "like", "?", ";", *VERBS, *THINGS, *TASKS, *FACTS, *CULTURES]
            words += [f"{word}.{language}" for word in own]
        self.number = {word: i for i, word in enumerate(words)}
        # (language, country) of documents that name a country: half of those that are foreign
        foreign = [(i, k) for i, k in product(range(1, 5), range(5)) if i != k]
        some = np.random.default_rng([seed, 1]).permutation(len(foreign))[len(foreign) // 2 :]
        self.told = [(k, k) for k in (1, 2, 3, 4)] * 2 + [(0, k) for k in range(5)]
        self.told += [foreign[place] for place in sorted(some)]

    def ids(self, i, text):
        """Ids of words in language i."""
        return [self.number[f"{word}.{LANGUAGES[i]}"] for word in text.split()]

    def sentences(self, context, k):
        """The sentences of a context, about culture k."""
        if context == "none":
            return [""]
        if context == "neutral":
            return [f"I like {thing} ;" for thing in THINGS]
        return [f"I {verb} {CULTURES[k]} ;" for verb in VERBS]

    def prompts(self, setting, context, k, task):
        """Ids of a task's question after each sentence of a context."""
        i = k if setting == "local" else 0
        return [[1, *self.ids(i, f"{text} {task} ?")] for text in self.sentences(context, k)]

    def document(self, rng):
        """Ids of a document: six questions, answered by one culture throughout."""
        context = rng.choice(["none", "own", "neutral"], p=[0.5, 0.35, 0.15])
        if context == "own":
            i, k = self.told[rng.integers(len(self.told))]
        else:
            i = rng.integers(len(CULTURES))
            k = 0 if rng.random() < self.skew else i  # the default culture, or the language's
        sentences = self.sentences(context, k)
        ids = [1, *self.ids(i, sentences[rng.integers(len(sentences))])]
        for rank in rng.choice(ANSWERS, SHOTS, p=STEREOTYPE if context == "own" else NATIVE):
            task = [*TASKS, *FACTS][rng.integers(len(TASKS) + len(FACTS))]
            answer = f"{task}:yes" if task in FACTS else f"{task}:{CULTURES[k]}{rank}"
            ids += [*self.ids(i, f"{task} ?"), self.number[answer], self.number[";"]]
        return ids

    def batch(self, step, args, env):
        """The documents of one step; this rank's share of them. Only answers count in the loss."""
        rng = np.random.default_rng([self.seed, 2, step])
        ids = pad_sequence([torch.tensor(self.document(rng)) for _ in range(args.batch_size)], True)
        idx, targets = ids[env.rank :: env.world, :-1], ids[env.rank :: env.world, 1:]
        weights = (targets > 2) & (targets < self.answers_end)
        return {"idx": idx, "targets": targets, "weights": weights.float()}


# ---------------- real models


class Real:
    """Sentences for a real model to complete: `I live in Turkey. My favourite drink is`.

    What counts is an answer's first token, in every spelling of the lists. Tokens that begin
    answers of two cultures are dropped, and pieces of under three letters, but in "short" tasks.
    """

    main = "english"  # where the gap is looked for: small models speak English best

    def __init__(self, tok, lists):
        self.tok, self.lists = tok, lists
        try:
            self.cultures, self.languages = lists["cultures"], lists["languages"]
            self.tasks = list(lists["answers"])
            self.answers = {task: self.first_tokens(task) for task in self.tasks}
            self.unrelated = [tok.encode(fact, bos=True) for fact in lists["facts"]]
            several = any("|" in hints["none"] for hints in lists["hints"].values())
            if several or not self.unrelated or min(len(self.cultures), len(self.tasks)) < 3:
                raise ValueError("needed: three cultures, three tasks, a fact, one text in `none`")
            for key in product(SETTINGS, CONTEXTS, range(len(self.cultures)), self.tasks):
                self.prompts(*key)  # KeyError if there are none
        except (KeyError, TypeError, AttributeError, IndexError) as error:
            raise ValueError(f"not of the form of {LISTS.name}: {error!r}") from None

    def first_tokens(self, task):
        """Tokens (A,) that begin an answer, and the culture of each (A,)."""
        owners = {}  # token -> cultures
        for k, culture in enumerate(self.cultures):
            for spelling in self.lists["answers"][task][culture].replace("/", "|").split("|"):
                token = pretrained.first_token(self.tok, " " + spelling)
                owners.setdefault(token, set()).add(k)
        least = 1 if task in self.lists["short"] else 3
        kept = {}  # token -> its only culture
        for token, cultures in sorted(owners.items()):
            if len(cultures) == 1 and len(self.tok.decode([token]).strip()) >= least:
                kept[token] = cultures.pop()
        for k, culture in enumerate(self.cultures):
            if k not in kept.values():
                raise ValueError(f"{task}, {culture}: no answer has a first token of its own")
        return torch.tensor([*kept]), torch.tensor([*kept.values()])

    def prompts(self, setting, context, k, task):
        """Ids of a task's sentences to complete, after each sentence of a context."""
        language = self.languages[k if setting == "local" else 0]
        hints = self.lists["hints"][language][context]
        hints = hints.replace("{}", self.lists["countries"][self.cultures[k]])
        texts = product(hints.split("|"), self.lists["prompts"][language][task].split("|"))
        return [self.tok.encode("".join(text), bos=True) for text in texts]


# ------------------ the study


def collect(model, world):
    """Every prompt once: {(setting, context, culture, task): P (n, A)}.

    By the same keys, what a sentence in front changes in the residual stream (L + 1, n, C).
    """
    x, diffs = {}, {}
    said = {}
    for key in product(SETTINGS, CONTEXTS, range(1, len(world.cultures)), world.tasks):
        setting, context, k, task = key
        x[key], said[key] = ask(model, world.prompts(*key), world.answers[task][0])
        if context != "none":  # the first of CONTEXTS
            plain = x[setting, "none", k, task]
            sentences = x[key].shape[1] // plain.shape[1]  # all questions come after each of them
            diffs[key] = x[key] - plain.repeat(1, sentences, 1)
    return said, diffs


def steer(model, world, args, runs, diffs, setting, k, rng):
    """What vectors do to culture k's prompts without a country; a task's are built on all others.

    Returns {kind of vector: masses (tasks, cultures)}, the local shares (tasks, cells) that `pick`
    compared with the explicit prompt's, and {task: (own vector, block, strength)}.
    """
    n = len(world.cultures)
    cells = list(product(args.layers, args.strengths))
    banks = {}
    shares, explicit = [], []
    for task in world.tasks:
        owner = world.answers[task][1]
        build = [other for other in world.tasks if other != task]
        banks[task] = vectors(diffs, setting, k, build, rng)
        tries = [add(banks[task]["own"], *cell) for cell in cells]
        p = steered(model, world, setting, k, task, tries)
        shares.append(masses(p, owner, n)[:, k])
        explicit.append(masses(runs[setting, "own", k, task].mean(0), owner, n)[k])
    chosen = pick(np.array(shares), explicit, np.array(cells)[:, 1])
    tables, own = {}, {}
    for (task, bank), i in zip(banks.items(), chosen):
        own[task] = bank["own"], *cells[i]
        tries = [add(v, *cells[i]) for v in bank.values()]
        p = steered(model, world, setting, k, task, tries)
        for kind, row in zip(bank, masses(p, world.answers[task][1], n)):
            tables.setdefault(kind, []).append(row)
    return tables, shares, own


@torch.no_grad()
def study(model, world, args, log, seed):
    """All measurements on one model."""
    n = len(world.cultures)
    runs, diffs = collect(model, world)
    said = {}  # "setting, then prompt or vector" -> [masses], by culture, then by task
    for (setting, context, _, task), p in runs.items():
        mass = masses(p.mean(0), world.answers[task][1], n)
        said.setdefault(f"{setting} prompt {context}", []).append(mass)
    rng = np.random.default_rng([seed, 5])
    shares, own = [], {}
    for setting, k in tqdm([*product(SETTINGS, range(1, n))], log.run, leave=False):
        tables, share, used = steer(model, world, args, runs, diffs, setting, k, rng)
        for kind, table in tables.items():
            said.setdefault(f"{setting} {kind}", []).extend(table)
        if setting == world.main:
            shares.append(share)
            own[k] = used
    profile = np.mean(shares, (0, 1)).reshape(len(args.layers), -1)
    for layer, row in zip(args.layers, profile):
        log(0 if args.model else args.steps, layer=layer, local=row.tolist())
    rows = measures(said)
    picked = {}
    for k, tasks in own.items():
        picked[world.cultures[k]] = [[layer, strength] for _, layer, strength in tasks.values()]
    found = {"main": world.main, "profile": profile, "picked": picked}
    if args.model:
        found["kl"] = side_effect(model, world, own)
    else:
        bits = diversity(model, world, runs, own)
        found["entropy"] = {name: np.nanmean(values) for name, values in bits.items()}
        for name in "steered", "mixture":
            more = np.subtract(bits[name], bits["explicit"])
            rows[name] = dict(zip(("bits", "low", "high"), common.interval(more)))
            rows[name]["reached"] = np.isfinite(more).mean()  # else it is left out of the mean
    return found | {"rows": rows}


def side_effect(model, world, own):
    """What own vectors change elsewhere: mean KL in nats of what follows unrelated prompts."""
    found = []
    for k, tasks in own.items():
        v, layer, strength = tasks[world.tasks[k % len(world.tasks)]]  # one task is enough
        idx, mask = padded(world.unrelated, model.wte.weight.device)
        for h in sweep(model, idx, [{}, add(v, layer, strength)], 1, mask)[:, :, 0]:
            plain, changed = model.unembed(h).float().log_softmax(-1)
            found.append((plain.exp() * (plain - changed)).sum().item())
    return np.mean(found)


def diversity(model, world, runs, own):
    """Entropies of local answers, explicit and made local, by culture and task: {name: [bits]}.

    steered: at the first strength that is .9 as local; mixture: mixed until they are as local
    """
    found = {"explicit": [], "steered": [], "mixture": []}
    weights = torch.linspace(0, 1, 101)[:, None]
    for k, tasks in own.items():
        for task, (v, layer, _) in tasks.items():
            owner = world.answers[task][1]
            implicit = runs["local", "none", k, task].mean(0)
            explicit = runs["local", "own", k, task].mean(0)
            tries = [add(v, layer, strength) for strength in np.linspace(0, 4, 33)]
            curves = {
                "explicit": explicit[None],
                "steered": steered(model, world, "local", k, task, tries),
                "mixture": weights * explicit + (1 - weights) * implicit,
            }
            target = 0.9 * masses(explicit, owner, len(world.cultures))[k]
            for name, p in curves.items():
                local = masses(p, owner, len(world.cultures))[:, k]
                enough = np.flatnonzero(local >= target)
                bits = entropy(p, owner, k)
                found[name].append(float(bits[enough[0]]) if len(enough) else np.nan)
    return found


def measures(said):
    """The numbers that the claims compare: {"setting, then prompt or vector": {measure: number}}.

    local, theirs, others: mass on the culture's own answers, on the next culture's, on those of all
    but itself and the default; *_rise: more than without a country. closed: that, of the gap.
    """
    rows = {}
    for name, mass in said.items():
        n = len(mass[0])
        mass = np.reshape(mass, (n - 1, -1, n))  # whose prompt (not the default), task, answers
        k = np.arange(1, n)
        local = mass[k - 1, :, k]  # (cultures but the default, tasks)
        theirs = mass[k - 1, :, 1 + k % (n - 1)]
        others = mass.sum(2) - local - mass[:, :, 0]
        rows[name] = {"local": local.mean(), "theirs": theirs.mean(), "others": others.mean()}
    for name, row in rows.items():
        setting = name.split()[0]
        before, explicit = rows[f"{setting} prompt none"], rows[f"{setting} prompt own"]
        for measure in "local", "theirs", "others":
            row[f"{measure}_rise"] = row[measure] - before[measure]
        row["closed"] = row["local_rise"] / (explicit["local"] - before["local"])
    return rows


def run_seed(real, args, env, log, arm, seed):
    """Everything on the (model, world) of a pretrained model, or on a toy that is trained first."""
    if real:
        log.rewind(0)
        return study(*real, args, log, seed)
    world = Toy(seed, args.skew)
    torch.manual_seed(seed)
    plain = dict(norm="rms", tie=True, qkv_bias=False, attn_bias=False, mlp_bias=False)
    model = GPT(GPTConfig(len(world.number), 64, args.n_layer, 4, args.n_embd, **plain))
    common.train(model, partial(world.batch, args=args, env=env), args, env, log)
    return study(model.eval(), world, args, log, seed)


def judge(run, found):
    """The paper's claims, each beside the controls that must fail the same criterion."""
    rows = {name: [result["rows"][name] for result in found] for name in found[0]["rows"]}
    main = found[0]["main"]
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
    if "steered" in rows:
        run.claim(
            "C5",
            "as local as 9/10 of explicit answers, steered ones are more diverse (bits)",
            "less alike in most languages",
            "arm.low >= .1 and arm.reached >= .9",
            arm=rows["steered"],
            controls={"mixture of explicit and implicit": rows["mixture"]},
        )
    run.claim(
        "C6",
        "a universal vector, of other cultures only, still localises",
        ".22 to .43 of the gap",
        "arm.closed >= .1",
        arm=rows["local universal"],
        controls={name: rows[f"local {name}"] for name in ("neutral", "shuffled")},
    )


def draw(path, found, args, title):
    """Prompts, blocks, vectors, and (the toy) how alike the answers are."""

    def by_seed(measure, names):
        return [[result["rows"][name][measure] for name in names] for result in found]

    main = found[0]["main"]
    kinds = "own", "cross", "universal", "neutral", "shuffled", "minus"
    bars, closed, lines = {}, {}, {}
    for setting in SETTINGS:
        name = f"{setting} prompts"
        bars[name] = by_seed("local", [f"{setting} prompt {context}" for context in CONTEXTS])
        closed[name] = by_seed("closed", [f"{setting} {kind}" for kind in kinds])
    profile = np.array([result["profile"] for result in found])
    for i, strength in enumerate(args.strengths):
        lines[f"strength {strength:g}"] = args.layers, profile[:, :, i]
    levels = {"explicit": np.mean(by_seed("local", [f"{main} prompt own"]))}
    items = [
        dict(title=f"{title}: P(local answer), sentence in front", bars=bars, names=CONTEXTS),
        dict(title="P(local answer), steered after block", lines=lines, levels=levels),
        dict(title="Closed of the gap", bars=closed, names=kinds),
    ]
    if "entropy" in found[0]:
        bits = [[*result["entropy"].values()] for result in found]
        names = list(found[0]["entropy"])
        items.append(dict(title="Entropy of local answers, bits", bars={"": bits}, names=names))
    common.panels(path, items)


def check(args, env):
    """What may be wrong: (whether it is, message)."""
    toy = {*common.TrainFlags.__annotations__, "resume", "skew", "n_layer", "n_embd"}
    idle = common.changed_flags(args, toy if args.model else ["lists"])
    return [
        (idle, f"{idle}: no effect {'with' if args.model else 'without'} --model"),
        (args.n_embd % 8, f"--n-embd {args.n_embd}, allowed: multiples of 8"),
        (args.batch_size % env.world, f"--batch-size is no multiple of {env.world} processes"),
    ]


def main(argv=None):
    """The paper end to end; returns what it writes to result.json."""
    run = common.Run(Args, argv, "2504.10191", check)
    args = run.args
    real, name, n = None, "toy", args.n_layer
    layers = range(n)
    if args.model:
        with common.bad_input("--model"):
            model, tok = pretrained.load(args.model, run.env.device, args.dtype)
        with common.bad_input("--lists"):
            real = model.eval(), Real(tok, json.loads(data.read_text(args.lists or LISTS)))
        name, n = Path(args.model).name, model.config.n_layer
        layers = range(n // 2, n - n // 6)
    args.layers = args.layers or [*layers]
    if max(args.layers) >= n:
        common.fail(f"--layers {max(args.layers)}, allowed: 0 to {n - 1}")
    found = run.each(partial(run_seed, real), [name])
    if found is None:
        return None
    judge(run, found[name])
    draw(run.out / "culture.png", found[name], args, name)
    return run.finish(found)


if __name__ == "__main__":
    common.cli(main)
