"""Crosscoders on the state before *wait* (arXiv 2510.04128): what makes a reasoner stop?

A reasoning model writes "Wait" and goes another way: it checks, starts again, recalls a rule, or
admits a doubt. Is that decided in the state *before* the word? The paper asks it like this:

1. train a crosscoder: one sparse code for the residual streams of a base model and
   of the reasoner that was made from it                                      `sae.SAE`
2. tell by the decoder's norms in which of the two a latent lives             `relative_norm`
3. rank latents by attribution: what log P(wait) loses without each,
   to first order, at the token before                                        `attribution`
4. steer with the latents at the top                                          `pushes`

The toy has what the paper could not have, a ground truth. A small GPT learns to take digits
through maps, with errors and slips on the way. Its reasoner learns to wait after four causes, and
each has words and an episode of its own. So attribution is compared with exact ablation, and
steering with what a cause would have brought about, beside latents that are as often active and
random directions.

What to look at: the rank correlation of attribution and ablation (P1), and the matrix of pushed
latents and what the model then does (P4). A real pair of models: --base and --model.
"""

from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

import common
import data
import pretrained
import sae
from model import GPT, GPTConfig, generate, padded, sweep

BASE, FT = 0, 1  # the streams of the crosscoder: the base model, and the reasoner made from it
ALPHAS = [0.25, 0.5, 1.0]  # lengths of a push, in norms of the state


@dataclass
class Args(common.TrainFlags):
    """crosscoder"""

    presets: ClassVar[dict] = {
        "smoke": dict(
            steps=12, ft_steps=8, sae_steps=12, batch_size=8, n_layer=3, layer=1, d_sae=64
        )
        | dict(sae_batch=128, rows=1500, prompts=40, top=4, jobs=1),
        "toy": {},
        "paper": dict(base="meta-llama/Llama-3.1-8B", dataset="HuggingFaceFW/fineweb", layer=15)
        | dict(model="deepseek-ai/DeepSeek-R1-Distill-Llama-8B", d_sae=65536, k=100, top=50)
        | dict(sae_steps=195000, sae_lr=1e-4, rows=2**19, refresh=True),
    }
    limits: ClassVar[dict] = common.TrainFlags.limits | {
        **dict.fromkeys(("ft_steps", "n_layer", "d_sae", "k", "sae_steps", "sae_batch"), (1,)),
        **dict.fromkeys(("layer", "sae_lr"), (0,)),
        **{"rows": (1,), "prompts": (4,), "top": (1,), "answers": (1,)},
    }
    unused: ClassVar[set] = {"micro_batch"}
    may_change: ClassVar[set] = common.TrainFlags.may_change | {"top", "prompts"}

    steps: int = 1200  # optimizer steps of the base model
    ft_steps: int = 1200  # optimizer steps that make the reasoner of it
    batch_size: int = 32
    lr: float = 4e-3
    base: str = ""  # a pretrained base model in place of the toy (paper: Llama-3.1-8B)
    model: str = ""  # the reasoner made from it (paper: DeepSeek-R1-Distill-Llama-8B)
    dataset: str = "stdlib"  # real models: text, half of the rows; the others: answers (paper: web)
    texts: str = ""  # real models: JSON lines {"text": ...} with answers; default: sampled
    answers: int = 64  # real models: answers that are sampled
    wait: list[str] = common.default_list("wait", "Wait", " wait", " Wait")  # real: as in the paper
    n_layer: int = 4  # blocks of the toy
    layer: int = 2  # block whose output is read, from 0 (paper: 7, 15, 23 of 32)
    d_sae: int = 512  # latents (paper: 65536, 16 times the width)
    k: int = 24  # active latents at a position, on average (paper: 100)
    sae_steps: int = 600  # training steps of the crosscoder
    sae_batch: int = 2048  # positions in a step (paper: 2048)
    sae_lr: float = 2e-3  # peak learning rate of the crosscoder, Adam's (paper: 1e-4)
    rows: int = 100_000  # positions that are harvested and shuffled at a time
    refresh: bool = False  # harvest new rows when all have been used; else go over them again
    prompts: int = 400  # positions with a cause, and as many without, in a split (paper: 351)
    top: int = 10  # length of the lists of latents (paper: 50)


# -------------------------------------------------------------------------------------- the method


def relative_norm(norms):
    """Of decoder norms (m, 2): 0 for a latent of the base alone, .5 shared, 1 the reasoner's alone.

    Delta = ((|ft| - |base|) / max(|ft|, |base|) + 1) / 2, .5 where both are 0.
    """
    base, ft = norms.unbind(1)
    return ((ft - base) / torch.maximum(ft, base).clamp(min=1e-12) + 1) / 2


def log_p(logits, targets):
    """log of the total probability of the ids `targets`: logits (..., V) -> (...)."""
    V = logits.shape[-1]
    if not targets or not 0 <= min(targets) <= max(targets) < V:
        raise ValueError(f"target ids {list(targets)}, allowed: one or more of 0 to {V - 1}")
    return logits.float().log_softmax(-1)[..., list(targets)].logsumexp(-1)


def last_states(models, prompts, layer, size=64):
    """Residual streams of each prompt's last token, all models side by side: (N, M C)."""
    parts = []
    for i in range(0, len(prompts), size):
        idx, mask = padded(prompts[i : i + size], models[0].wte.weight.device)
        streams = [sae.residual(model, idx, layer, mask)[:, -1] for model in models]
        parts.append(torch.cat(streams, 1))
    return torch.cat(parts)


def gradient(model, prompts, layer, targets):
    """d log P(targets) / d h (N, C) for the residual h of each prompt's last token behind `layer`.

    The model runs as it is: no reconstruction is spliced in. Prompts may differ in length.
    """
    size = max(1, min(64, 2**13 // max(map(len, prompts))))  # a graph holds all blocks above
    states, parts = [], []

    def cut(h):
        states.append(h[:, -1:].detach().requires_grad_())
        return torch.cat((h[:, :-1].detach(), states[-1]), 1)

    for i in range(0, len(prompts), size):
        idx, mask = padded(prompts[i : i + size], model.wte.weight.device)
        with torch.enable_grad(), model.patch({f"blocks.{layer}.resid_post": cut}):
            logits = model.unembed(model.hidden(idx, mask)[:, -1])
            total = log_p(logits, targets).sum()
        parts.append(torch.autograd.grad(total, states.pop())[0][:, 0])
    return torch.cat(parts).float()


def attribution(f, D, g):
    """a_ji = f_ji <D_i, g_j>: to first order, what log P loses at prompt j without latent i.

    Codes f (N, m), the reasoner's decoder D (m, C), gradients g (N, C) -> (N, m).
    """
    return f * (g @ D.T)


def attribute(models, code, layer, prompts, targets):
    """Attributions and codes of prompts, (N, m) each. Only their last token is encoded."""
    f = code.encode(last_states(models, prompts, layer))
    g = gradient(models[FT], prompts, layer, targets)
    return attribution(f, code.decoder(FT), g), f


def add(x, change):
    """A patch."""
    return x + change.to(x.dtype)


@torch.no_grad()
def outcomes(model, layer, prompts, changes, groups):
    """log P of groups of ids [[id, ...], ...] behind the prompts, under V changes of the state.

    changes  (N, V, C): what is added to the last token's residual after block `layer`
    Returns (N, V, len(groups)), exact: all V changes go through the blocks above in one pass.
    """
    V = changes.shape[1]
    size = max(1, min(64, 2**24 // (V * model.config.vocab_size)))  # all logits of a batch are held
    parts = []
    for i in range(0, len(prompts), size):
        idx, mask = padded(prompts[i : i + size], model.wte.weight.device)
        here = changes[i : i + size, :, None]
        patches = [{layer: partial(add, change=here[:, v])} for v in range(V)]
        logits = model.unembed(sweep(model, idx, patches, mask=mask)[:, :, 0])
        parts.append(torch.stack([log_p(logits, group) for group in groups], -1))
    return torch.cat(parts)


def pushes(h, vectors, alpha):
    """The paper's steering: alpha |h| v / |v| for states h (N, C) and vectors (V, C): (N, V, C)."""
    return alpha * h.norm(dim=1)[:, None, None] * F.normalize(vectors, dim=1)


def steer(h, vector, alpha):
    """A patch for `generate`: pushes the state of the prompt's last token, and no later one."""
    if h.shape[1] == 1:  # a new token behind the cache
        return h
    h = h.clone()
    h[:, -1] += pushes(h[:, -1].float(), vector[None], alpha)[:, 0].to(h.dtype)
    return h


def spearman(x, y):
    """Rank correlation of two vectors."""
    ranks = torch.stack([values.argsort().argsort().double() for values in (x, y)])
    return torch.corrcoef(ranks)[0, 1].item()


def against_ablation(models, code, layer, prompts, targets):
    """P1: attribution beside exact ablation, for each active latent of each prompt."""
    a, f = attribute(models, code, layer, prompts, targets)
    most = int((f > 0).sum(1).max())
    active = f.topk(most).indices  # (N, V): as many as the busiest prompt has; idle ones are 0
    f, a = f.gather(1, active), a.gather(1, active)
    off = -f[..., None] * code.decoder(FT)[active]
    nothing = torch.zeros_like(off[:, :1])
    logp = outcomes(models[FT], layer, prompts, torch.cat((nothing, off), 1), [targets])[..., 0]
    lost = (logp[:, :1] - logp[:, 1:])[f > 0].cpu()
    a = a[f > 0].cpu()
    shuffled = a[torch.randperm(len(a), generator=torch.Generator().manual_seed(0))]
    row = {"rho": spearman(a, lost), "rho_permuted": spearman(shuffled, lost)}
    return row | {"attribution": a.tolist(), "ablation": lost.tolist()}


# --------------------------------------------------------------------------------------- the world

PATTERNS = {  # what the reasoner does: the words it begins with, one of two; and the cause of it
    "check": ("check", "verify"),  # an error in this step
    "restart": ("again", "begin"),  # a slip: this step began from a wrong number
    "recall": ("recall", "rule"),  # the next stage is @, defined at the start
    "unsure": ("maybe", "unsure"),  # the next stage is ?, an unknown map
}
CAUSES = [*PATTERNS, "none"]
MAPS = {"a": (3, 1), "b": (7, 4), "c": (9, 9)}  # x -> 3 x + 1, 7 x + 4, 9 x + 9, modulo 10
VOCAB = (
    "<pad> <bos> <eos> 0 1 2 3 4 5 6 7 8 9 a b c @ ? : ; = | def Q A or think fast ok bad".split()
)
VOCAB += [word for pair in PATTERNS.values() for word in pair]
ID = {word: i for i, word in enumerate(VOCAB)}
MARKS = [[ID[word] for word in pair] for pair in PATTERNS.values()]  # of each pattern
WAIT = sum(MARKS, [])  # the paper's wait words: here they say what comes
LONGEST = 88


class Task(NamedTuple):
    """A problem: a digit goes through stages, each a map, or @, or the unknown ?."""

    first: int
    define: str  # the map that @ stands for
    stages: list


class Decision(NamedTuple):
    """The end of a step: here the reasoner waits or goes on."""

    at: int  # index of the step's `;`
    cause: str  # one of CAUSES, or "mixed": two at once
    pattern: str  # what it does, "" to go on


def draw_task(rng):
    """A random problem of three to five stages; the first is plain."""
    stages = []
    for i in range(rng.integers(3, 6)):
        stage = "abc"[rng.integers(3)]
        kind = rng.random()
        if i and kind < 0.15:
            stage = "@"
        elif i and kind < 0.3:
            stage = "?"
        stages.append(stage)
    return Task(int(rng.integers(10)), "abc"[rng.integers(3)], stages)


def header(mode, task):
    """The words of a problem, up to the `;` that ends it."""
    words = ["<bos>", mode, "def", "@", "=", task.define, "|", "Q", str(task.first), ":"]
    return [*words, *task.stages, ";"]


class Solution:
    """Writes an answer step by step: `words`, `decisions`, and the running `value`."""

    def __init__(self, rng, task):
        self.rng, self.task = rng, task
        self.value = task.first
        self.settled = {}  # stage: the map that an episode put in the place of ?
        self.words, self.decisions = [], []

    def other(self, x):
        """A digit that is not x."""
        return (x + int(self.rng.integers(1, 10))) % 10

    def result(self, x, i):
        """The digit behind stage i; behind an unknown map it can be any."""
        stage = self.task.stages[i]
        if stage == "@":
            stage = self.task.define
        stage = self.settled.get(i, stage)
        if stage == "?":
            return int(self.rng.integers(10))
        factor, term = MAPS[stage]
        return (factor * x + term) % 10

    def write(self, x, i, result):
        """The words of a step; behind @ and a settled ? stands what it means."""
        stage = self.task.stages[i]
        means = {"@": self.task.define}.get(stage, self.settled.get(i, ""))
        shown = [stage, means] if means else [stage]
        self.words += [str(x), *shown, "=", str(result), ";"]
        self.value = result

    def step(self, i, noise):
        """Stage i, with an error, with a slip, or right; then the decision's cause is known."""
        x = self.other(self.value) if noise == "restart" else self.value
        right = self.result(x, i)
        self.write(x, i, self.other(right) if noise == "check" else right)
        coming = ""
        if i + 1 < len(self.task.stages):
            coming = {"@": "recall", "?": "unsure"}.get(self.task.stages[i + 1], "")
        if noise and coming:
            return "mixed", x
        return noise or coming or "none", x

    def episode(self, pattern, i, x):
        """What the reasoner does after its word, done rightly."""
        self.words.append(str(self.rng.choice(PATTERNS[pattern])))
        if pattern == "check":
            self.write(x, i, self.result(x, i))
        elif pattern == "restart":
            self.value = self.task.first
            for j in range(i + 1):
                self.write(self.value, j, self.result(self.value, j))
        elif pattern == "recall":
            self.words += ["@", "=", self.task.define, ";"]
        else:
            settled, other = self.rng.choice([*MAPS], 2).tolist()
            self.settled[i + 1] = settled
            self.words += ["?", "=", settled, "or", other, ";"]


def solve(rng, task, grade=0.0, waits=False):
    """An answer with noise in it: one step in eight is wrong, one in ten a slip (one at most).

    grade  how often a step is followed by ok or bad, as the base model learns to see noise; then
           there is three times as much
    waits  whether causes are followed by episodes, three times in four; without a cause .03
    Returns words and decisions; an index counts from the answer's first word.
    """
    s = Solution(rng, task)
    slipped = False
    for i, stage in enumerate(task.stages):
        u = rng.random() / (3 if grade else 1)
        noise = ""
        if u < 0.12 and stage != "?":  # of an unknown map any result is right
            noise = "check"
        elif 0.12 <= u < 0.22 and not slipped and i < 3:
            noise, slipped = "restart", True
        cause, x = s.step(i, noise)
        pattern = ""
        if waits and cause in PATTERNS and rng.random() < 0.75:
            pattern = cause
        elif waits and cause == "none" and rng.random() < 0.03:
            pattern = str(rng.choice([*PATTERNS]))
        s.decisions.append(Decision(len(s.words) - 1, cause, pattern))
        if rng.random() < grade:
            s.words.append("bad" if noise else "ok")
        if pattern:
            s.episode(pattern, i, x)
    return [*s.words, "A", str(s.value), "<eos>"], s.decisions


def document(rng, reasoner):
    """One document as words: the base's grades half of its steps in mode think, and never waits."""
    mode = "think" if rng.random() < 0.75 else "fast"
    task = draw_task(rng)
    think = mode == "think"
    grade = 0.5 if think and not reasoner else 0.0
    return header(mode, task) + solve(rng, task, grade, think and reasoner)[0]


def batch_of(rows, reasoner):
    """Documents as inputs, targets (B, T) and weights: 0 behind the end, 6 where it counts.

    That is a grade, or for the reasoner the word behind a step: they are few among all words.
    """
    longest = min(LONGEST + 1, max(map(len, rows)))
    full = torch.zeros(len(rows), longest, dtype=torch.long)
    for row, words in zip(full, rows):
        cut = words[:longest]
        row[: len(cut)] = torch.tensor([ID[word] for word in cut])
    idx, targets = full[:, :-1], full[:, 1:]
    if reasoner:
        heavy = idx == ID[";"]
    else:
        heavy = (targets == ID["ok"]) | (targets == ID["bad"])
    return {"idx": idx, "targets": targets, "weights": (targets > 0) * (1.0 + 5.0 * heavy)}


def positions(rng, n):
    """A split: prompts up to a decision, and its cause; n without one, n / 4 of each other."""
    prompts, causes = [], []
    count = dict.fromkeys(CAUSES, 0)
    while min(count.values()) < n // 4:
        task = draw_task(rng)
        head = header("think", task)
        words, decisions = solve(rng, task, waits=True)
        for decision in decisions:
            end = len(head) + decision.at + 1
            limit = n if decision.cause == "none" else n // 4
            if end < LONGEST and count.get(decision.cause, n) < limit:
                count[decision.cause] += 1
                prompts.append([ID[word] for word in (head + words)[:end]])
                causes.append(decision.cause)
    return prompts, np.array(causes)


# ---------------------------------------------------------------------------- train, and harvest


def train_model(args, env, log, seed, start=None):
    """The base model; or from its weights, `start`, the reasoner."""
    torch.manual_seed(seed)
    shape = dict(norm="rms", gated=True, act="silu", d_mlp=128)
    model = GPT(GPTConfig(len(VOCAB), LONGEST, args.n_layer, 4, 64, **shape))
    reasoner = start is not None
    if reasoner:
        model.load_state_dict(start.state_dict())
        args = replace(args, steps=args.ft_steps)

    def batch(step):
        rng = np.random.default_rng([seed, reasoner, step])
        return batch_of([document(rng, reasoner) for _ in range(args.batch_size)], reasoner)

    common.train(model, batch, args, env, log.stage("reasoner" if reasoner else "base"))
    return model.eval().requires_grad_(False)


def states_of(models, args, env, seed, n):
    """n rows of both streams over documents of both corpora, half and half."""

    def batches():
        rng = np.random.default_rng([seed, 2])
        while True:
            for reasoner in False, True:
                idx = batch_of([document(rng, reasoner) for _ in range(128)], reasoner)["idx"]
                yield idx.to(env.device), idx.to(env.device) != ID["<pad>"]

    return sae.harvest(models, args.layer, batches(), n, ID["<bos>"])


# ----------------------------------------------------------------------------------------- measure


def gates(models, layer, prompts, causes):
    """G1: P(wait) after causes, without one, and in mode fast; and whether the pattern is right."""
    device = models[FT].wte.weight.device
    none = torch.zeros(len(prompts), 1, models[FT].config.n_embd, device=device)
    p = {}
    for name, model in ("reasoner", models[FT]), ("base", models[BASE]):
        p[name] = outcomes(model, layer, prompts, none, [WAIT, *MARKS])[:, 0]
        p[name] = p[name].exp().cpu()
    fast = [[ID["fast"] if i == ID["think"] else i for i in prompt] for prompt in prompts]
    p["fast"] = outcomes(models[FT], layer, fast, none, [WAIT, *MARKS])[:, 0].exp().cpu()
    rows = {}
    for name, found in p.items():
        after = {cause: found[causes == cause].mean(0) for cause in CAUSES}
        waits = [after[cause][0] for cause in PATTERNS]
        right = [after[cause][1 + i] / after[cause][0] for i, cause in enumerate(PATTERNS)]
        rows[name] = {
            "least": min(waits).item(),
            "without": after["none"][0].item(),
            "right": min(right).item(),
        }
    return rows


def swapped(models, layer, prompts, causes):
    """G3: the state before the word from another prompt; how often does the donor's pattern come?

    Returns the share among donors of another cause, and how often a donor of the same cause
    changes the pattern.
    """
    rng = np.random.default_rng(3)
    h = last_states(models[FT:], prompts, layer)
    caused = np.flatnonzero(causes != "none")
    zero = torch.zeros(len(prompts), 1, h.shape[1])
    before = outcomes(models[FT], layer, prompts, zero.to(h), MARKS)[:, 0].argmax(1).cpu().numpy()
    found = {}
    for name in "other", "same":
        donors = []
        for i in caused:
            alike = causes[caused] == causes[i]
            pool = caused[alike & (caused != i) if name == "same" else ~alike]
            donors.append(rng.choice(pool))
        change = (h[donors] - h[caused])[:, None]
        here = [prompts[i] for i in caused]
        after = outcomes(models[FT], layer, here, change, MARKS)[:, 0].argmax(1).cpu().numpy()
        theirs = np.array([CAUSES.index(causes[i]) for i in donors])
        hits = after == theirs if name == "other" else after != before[caused]
        found[name] = float(hits.mean())
    return found


def lists_off(models, code, layer, prompts, lists, wait):
    """P2: by how much P(wait) falls, as a share, at prompts with a cause without each list."""
    f = code.encode(last_states(models, prompts, layer))
    D = code.decoder(FT)
    changes = [torch.zeros_like(f @ D)]
    changes += [-f[:, latents] @ D[latents] for latents in lists.values()]
    p = outcomes(models[FT], layer, prompts, torch.stack(changes, 1), [wait])[..., 0].exp().mean(0)
    return {name: (1 - p[1 + i] / p[0]).item() for i, name in enumerate(lists)}


def pushed(models, layer, prompts, vectors, alpha, groups):
    """P of groups of ids as the prompts are, (G,), and pushed along each vector (V, C): (V, G)."""
    h = last_states(models[FT:], prompts, layer)
    changes = torch.cat((torch.zeros_like(h)[:, None], pushes(h, vectors, alpha)), 1)
    p = outcomes(models[FT], layer, prompts, changes, groups).exp().mean(0).cpu()
    return p[0], p[1:]


def patterns(models, code, layer, splits, rate, args):
    """P4: where there is no cause, a list is pushed that was chosen for one pattern; what comes?

    A list: the latents of the highest attribution to the pattern's words, pushed together along
    the sum of their directions. Alpha is chosen on the split `dev`, for each kind of list alike.
    Returns {kind of list: rise of P(pattern) (4, 4), a row a list}, the vectors, their alphas.
    """
    D = code.decoder(FT)
    rng = torch.Generator().manual_seed(5)
    vectors = {"chosen": [], "matched": [], "random direction": []}
    prompts, causes = splits["discover"]
    for pattern, marks in zip(PATTERNS, MARKS):
        here = [p for p, cause in zip(prompts, causes) if cause == pattern]
        a = attribute(models, code, layer, here, marks)[0].mean(0).cpu()
        latents = sae.best(a, args.top)
        for name, some in ("chosen", latents), ("matched", sae.alike(latents, rate)):
            weight = a[latents][: len(some), None].to(D)
            vectors[name].append((weight * F.normalize(D[some], dim=1)).sum(0))
        vectors["random direction"].append(torch.randn(D.shape[1], generator=rng).to(D))
    none = {}
    for split in "dev", "test":
        none[split] = [p for p, cause in zip(*splits[split]) if cause == "none"]
    found, alphas = {}, {}
    for name, rows in vectors.items():
        rows = torch.stack(rows)
        rises = []
        for alpha in ALPHAS:
            before, after = pushed(models, layer, none["dev"], rows, alpha, MARKS)
            rises.append((after - before).diagonal())
        alphas[name] = [ALPHAS[i] for i in torch.stack(rises).argmax(0).tolist()]
        matrix = []
        for row, alpha in zip(rows, alphas[name]):
            before, after = pushed(models, layer, none["test"], row[None], alpha, MARKS)
            matrix.append((after[0] - before).tolist())
        found[name] = matrix
    return found, vectors["chosen"], alphas["chosen"]


def brought_about(matrix):
    """How many lists raise their own pattern by .25 or more, and no other pattern as much."""
    matrix = np.array(matrix)
    return sum(row[i] >= 0.25 and row.argmax() == i for i, row in enumerate(matrix))


def examples(models, layer, prompt, vectors, alphas):
    """What follows a prompt as it is, and pushed for each pattern: {pattern: words}."""
    texts = {"prompt": " ".join(VOCAB[i] for i in prompt)}
    names = ["as it is", *PATTERNS]
    for name, vector, alpha in zip(names, [vectors[0], *vectors], [0.0, *alphas]):
        patch = partial(steer, vector=vector, alpha=alpha)
        with models[FT].patch({f"blocks.{layer}.resid_post": patch}):
            room = LONGEST - len(prompt)
            row = generate(models[FT], [prompt], room, temperature=0, stop=[ID["<eos>"]])[0]
        texts[name] = " ".join(VOCAB[i] for i in row)
    return texts


def lists_of(a, rate, top, seed):
    """Lists of latents: at the top of attributions a (m,), as often active, random; and the alive.

    rate  (m,): the share of prompts at which a latent is active
    """
    alive = rate.nonzero().squeeze(1)
    rng = torch.Generator().manual_seed(seed)
    first = sae.best(a, top)
    if len(alive) < 2 * len(first):
        raise ValueError(f"--top {top}: only {len(alive)} latents are active before the word")
    random = alive[torch.randperm(len(alive), generator=rng)[: len(first)]].tolist()
    return {"top": first, "matched": sae.alike(first, rate), "random": random}, alive


def measures(models, code, layer, caused, none, lists, alive, wait, seed):
    """D, P1, P2 at prompts with a cause, P3 at prompts without."""
    delta = relative_norm(code.norms()).cpu()
    D = code.decoder(FT)
    row = {"delta": delta[alive].tolist(), "delta_of": {"all": delta[alive].mean().item()}}
    for name, some in lists.items():
        row["delta_of"][name] = delta[some].mean().item()
    row["ablation"] = against_ablation(models, code, layer, caused, wait)
    row["off"] = lists_off(models, code, layer, caused, lists, wait)
    vectors = {name: D[some] for name, some in lists.items()}
    rng = torch.Generator().manual_seed(seed)
    vectors["random direction"] = torch.randn(D[lists["top"]].shape, generator=rng).to(D)
    row["rise"] = {}
    for name, some in vectors.items():
        before, after = pushed(models, layer, none, some, 0.5, [wait])
        row["rise"][name] = (after.mean() - before).item()
    return row


@torch.no_grad()
def explained(code, x):
    """G2: the share of the variance of rows x (N, 2 C) that is explained, in each stream.

    By the crosscoder; and by as many neurons of each row, the ones furthest from their mean.
    """
    mean = x.mean(0)
    far = (x - mean) / x.std(0)
    least = far.abs().topk(code.k, dim=1).values[:, -1:]
    guesses = {"crosscoder": code.decode(code.encode(x)) - mean}
    guesses["neurons"] = (x - mean) * (far.abs() >= least)
    total = (x - mean).square().sum(0).view(2, -1).sum(1)
    found = {}
    for name, guess in guesses.items():
        wrong = (x - mean - guess).square().sum(0).view(2, -1).sum(1)
        found[name] = (1 - wrong / total).tolist()
    return found


def toy(args, env, log, arm, seed):
    """Everything for one seed: base, reasoner, crosscoder, measures."""
    base = train_model(args, env, log, seed)
    models = [base, train_model(args, env, log, seed, start=base)]
    layer = args.layer
    rows = states_of(models, args, env, seed, args.rows)
    torch.manual_seed(seed)
    code = sae.SAE(64, args.d_sae, args.k, streams=2, batch=True)
    sae.train_sae(code, lambda refill: rows, args, env, log, seed)
    splits = {}
    for i, name in enumerate(("discover", "dev", "test")):
        splits[name] = positions(np.random.default_rng([seed, 4, i]), args.prompts)
    prompts, causes = splits["discover"]
    caused = [p for p, cause in zip(prompts, causes) if cause != "none"]
    a = attribute(models, code, layer, caused, WAIT)[0].mean(0).cpu()
    rate = (code.encode(last_states(models, prompts, layer)) > 0).double().mean(0).cpu()
    lists, alive = lists_of(a, rate, args.top, seed)
    prompts, causes = splits["test"]
    caused = [p for p, cause in zip(prompts, causes) if cause != "none"]
    none = [p for p, cause in zip(prompts, causes) if cause == "none"]
    held = states_of(models, args, env, seed + 2**20, min(args.rows, 2**13))
    row = measures(models, code, layer, caused, none, lists, alive, WAIT, seed)
    row["gates"] = gates(models, layer, prompts, causes)
    row["swap"] = swapped(models, layer, prompts, causes)
    row["explained"] = explained(code, held)
    row["l0"] = (code.encode(held) > 0).float().sum(1).mean().item()
    row["matrices"], chosen, alphas = patterns(models, code, layer, splits, rate, args)
    row["texts"] = examples(models, layer, none[0], chosen, alphas)
    return row


# ----------------------------------------------------------------------------------- a real pair

QUESTIONS = [
    "What is the probability of rolling a sum of {} with two dice?",
    "Is {}91 a prime number?",
    "What is the sum of all divisors of {}4?",
    "Find the smallest prime larger than 1{}0.",
]


def load_pair(args, env):
    """The two models and their tokenizer. ValueError if they do not belong together."""
    base, tok = pretrained.load(args.base, env.device, args.dtype)
    ft, tok_ft = pretrained.load(args.model, env.device, args.dtype)
    shapes = [(m.config.n_layer, m.config.n_embd) for m in (base, ft)]
    if shapes[0] != shapes[1]:
        raise ValueError(f"{args.base} and {args.model} differ in layers and width: {shapes}")
    for text in "Wait, 1 + 2 = 3.\n", "hesitation", "été 你好":
        if tok.encode(text) != tok_ft.encode(text):
            raise ValueError(f"the tokenizers of {args.base} and {args.model} differ on {text!r}")
    if args.layer >= shapes[0][0]:
        raise ValueError(f"--layer {args.layer}, allowed: 0 to {shapes[0][0] - 1}")
    models = [model.eval().requires_grad_(False) for model in (base, ft)]
    return models, tok_ft


def answers_of(args, model, tok):
    """Id lists of questions with the reasoner's answers: from --texts, or sampled."""
    if args.texts:
        rows = data.read_rows(args.texts, text=str)
        return [tok.encode(row["text"], bos=True)[: model.config.block_size] for row in rows]
    found = []
    for i in range(args.answers):
        question = QUESTIONS[i % len(QUESTIONS)].format(2 + i // len(QUESTIONS))
        head = tok.encode(question, bos=True)
        if tok.template:
            head = tok.chat([{"role": "user", "content": question}])
        options = dict(temperature=0.6, top_p=0.95, stop=tok.stops, seed=i)
        found.append(head + generate(model, [head], 1000, **options)[0])
    return found


def prepare(args, env, out):
    """A real pair: models, wait ids, prompts up to a wait, and the source of rows."""
    models, tok = load_pair(args, env)
    wait = sorted({tok.encode(word)[0] for word in args.wait if tok.encode(word)})
    answers = answers_of(args, models[FT], tok)
    prompts = []
    for row in answers:
        prompts += [row[:i] for i in range(8, len(row)) if row[i] in wait]
    if len(prompts) < 8:
        raise ValueError(f"{len(prompts)} wait words in {len(answers)} answers, needed: 8 or more")
    limit = args.sae_steps * args.sae_batch
    tokens = data.token_file(args.dataset, "train", tok, out / "tokens", limit=limit)

    def batches(refill):
        rng = np.random.default_rng(refill)
        length = min(256, models[FT].config.block_size)
        while True:
            text = data.windows(tokens, rng, 8, length).tolist()
            own = [answers[i][:length] for i in rng.integers(len(answers), size=8)]
            for part in text, own:
                yield padded(part, env.device)

    def fill(refill):
        return sae.harvest(models, args.layer, batches(refill), args.rows, tok.bos)

    rng = np.random.default_rng(0)
    order = rng.permutation(len(prompts))[: 2 * args.prompts].tolist()
    return models, wait, [prompts[i] for i in order], fill


def real(prepared, args, env, log, arm, seed):
    """One seed of the crosscoder on a real pair: attribution, exact ablation, single pushes."""
    models, wait, prompts, fill = prepared
    layer = args.layer
    torch.manual_seed(seed)
    code = sae.SAE(models[FT].config.n_embd, args.d_sae, args.k, streams=2, batch=True)
    sae.train_sae(code, fill, args, env, log, seed)
    half = len(prompts) // 2
    discover, test = prompts[:half], prompts[half:]
    a, f = attribute(models, code, layer, discover, wait)
    rate = (f > 0).double().mean(0).cpu()
    lists, alive = lists_of(a.mean(0).cpu(), rate, args.top, seed)
    return measures(models, code, layer, test, test, lists, alive, wait, seed)


# ------------------------------------------------------------------------------ claims and figure


def judge(run, rows, is_toy):
    """The paper's claims, each beside the controls that must fail the same criterion."""

    def lists(key, names, measure):
        return {name: [{measure: row[key][name]} for row in rows] for name in names}

    if is_toy:
        gate = {name: [row["gates"][name] for row in rows] for name in rows[0]["gates"]}
        says = "the reasoner waits for its causes, and then does what the cause asks for"
        criterion = "arm.least >= .6 and arm.without <= .1 and arm.right >= .85"
        controls = {"base": gate["base"], "mode fast": gate["fast"]}
        run.claim("G1", says, "toy only", criterion, arm=gate["reasoner"], controls=controls)
        fve = [{"fve": min(row["explained"]["crosscoder"])} for row in rows]
        control = [{"fve": min(row["explained"]["neurons"])} for row in rows]
        says = "a sparse code explains the states of both models"
        controls = {"as many neurons": control}
        run.claim("G2", says, "about .9", "arm.fve >= .85", arm=fve, controls=controls)
        says = "the state before the word decides the pattern: swapped, the donor's comes"
        swaps = lists("swap", ("other", "same"), "donor")
        controls = {"donor of the same cause": swaps["same"]}
        run.claim("G3", says, "asked", "arm.donor >= .5", arm=swaps["other"], controls=controls)
    delta = lists("delta_of", rows[0]["delta_of"], "delta")
    says = "latents that promote waiting are more the reasoner's than latents in general"
    arms = dict(base=delta["all"], arm=delta["top"])
    controls = {name: delta[name] for name in ("matched", "random")}
    criterion = "arm.delta >= base.delta + .05"
    run.claim("D", says, "classified", criterion, **arms, controls=controls)
    rho = [{"rho": row["ablation"]["rho"]} for row in rows]
    permuted = [{"rho": row["ablation"]["rho_permuted"]} for row in rows]
    says = "attribution ranks latents as exact ablation does"
    controls = {"permuted": permuted}
    run.claim("P1", says, "not tested", "arm.rho >= .9", arm=rho, controls=controls)
    off = lists("off", rows[0]["off"], "cut")
    says = "without the latents at the top, P(wait) falls"
    controls = {name: off[name] for name in ("matched", "random")}
    run.claim("P2", says, "falls", "arm.cut >= .4", arm=off["top"], controls=controls)
    rise = lists("rise", rows[0]["rise"], "rise")
    says = "pushed along one of them, it rises"
    top = rise.pop("top")
    run.claim("P3", says, "9.7 waits for 1", "arm.rise >= .15", arm=top, controls=rise)
    if is_toy:
        won = {}
        for name in rows[0]["matrices"]:
            won[name] = [{"won": brought_about(row["matrices"][name])} for row in rows]
        says = "latents chosen for one pattern bring it about where nothing calls for it"
        chosen = won.pop("chosen")
        run.claim("P4", says, "for some", "arm.won >= 3", arm=chosen, controls=won)


def draw(path, rows):
    """Attribution beside ablation, lists off, whose the latents are, the matrix of patterns."""
    first = rows[0]
    with common.figure(path, 1, 4 if "matrices" in first else 3, size=(4, 3.4)) as axes:
        x, y = first["ablation"]["attribution"], first["ablation"]["ablation"]
        title = f"Each latent, each prompt: rank correlation {first['ablation']['rho']:.2f}"
        labels = dict(xlabel="attribution, nats", ylabel="lost by ablation, nats")
        axes[0].plot(x, y, ".", ms=2, alpha=0.4)
        common.draw_panel(axes[0], title=title, **labels)
        names = [*first["off"]]
        bars = {"lists off": [[row["off"][name] for name in names] for row in rows]}
        labels = dict(title="Lists of latents off", ylabel="share of P(wait) lost")
        common.draw_panel(axes[1], bars=bars, names=names, **labels)
        axes[2].hist(np.concatenate([row["delta"] for row in rows]), np.linspace(0, 1, 41))
        for name, mean in first["delta_of"].items():
            axes[2].axvline(mean, color="0.3", ls="-" if name == "top" else ":", label=name)
        labels = dict(xlabel="base alone: 0, shared: .5, reasoner alone: 1", ylabel="latents")
        common.draw_panel(axes[2], title="Whose latents are they?", **labels)
        if "matrices" in first:
            matrix = np.mean([row["matrices"]["chosen"] for row in rows], 0)
            axes[3].imshow(matrix, cmap="RdBu", vmin=-1, vmax=1)
            for i, j in np.ndindex(4, 4):
                axes[3].text(j, i, f"{matrix[i, j]:+.2f}", ha="center", va="center", fontsize=8)
            axes[3].set_xticks(range(4), PATTERNS)
            axes[3].set_yticks(range(4), PATTERNS)
            axes[3].set(title="Change of P(pattern)", ylabel="pushed: list for")


# ------------------------------------------------------------------------------------------- main


def check(args, env):
    """What is wrong with the flags: (whether it is, what to say)."""
    real = bool(args.base or args.model)
    longest = args.d_sae // 4
    changed = common.changed_flags(args, ["dataset", "texts"])
    return [
        (args.k > args.d_sae, f"--k {args.k}, allowed: 1 to {args.d_sae}, the latents"),
        (args.top > longest, f"--top {args.top}, allowed: 1 to {longest}, a fourth of --d-sae"),
        (args.rows < args.sae_batch, f"--rows {args.rows}, allowed: {args.sae_batch} and more"),
        (real and not (args.base and args.model), "a real pair needs both --base and --model"),
        (
            not real and args.layer >= args.n_layer,
            f"--layer {args.layer}, allowed: 0 to {args.n_layer - 1}",
        ),
        (changed and not real, f"{changed} has no effect without --model"),
        (env.world > 1, "crosscoder.py runs in one process: start it without torchrun"),
    ]


def main(argv=None):
    """The toy, or the pair of --base and --model; returns what it writes to result.json."""
    run = common.Run(Args, argv, "2510.04128", check)
    args = run.args
    if args.model:
        with common.bad_input("--model"):
            prepared = prepare(args, run.env, run.out)
        rows = run.each(partial(real, prepared), ["pair"])["pair"]
    else:
        rows = run.each(toy, ["toy"])["toy"]
    judge(run, rows, is_toy=not args.model)
    draw(run.out / "crosscoder.png", rows)
    for row in rows:  # a point for every latent of every prompt: for the picture alone
        for points in "attribution", "ablation":
            row["ablation"].pop(points)
    return run.finish({"toy" if not args.model else "pair": rows})


if __name__ == "__main__":
    common.cli(main)
