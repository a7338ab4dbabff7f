"""Crosscoders on the state before *wait* (arXiv 2510.04128): what makes a reasoner stop?

A reasoning model writes "Wait" and goes another way: it checks, starts again, doubts.
Is that decided in the state *before* the word? The paper's way to ask:

1. a crosscoder: one sparse code for the states of a base model and of
   the reasoner that was made from it                     `sae.SAE`
2. the decoder's norms tell in which of them a latent is  `relative_norm`
3. attribution ranks latents: what log P(wait) loses,
   to first order, without each                           `attribution`
4. the latents at the top steer                           `pushes`

In the toy the truth is known. A small GPT takes digits through maps, with errors; its
reasoner waits after four causes, and each has words of its own. So attribution can be
compared with ablation, and steering with what a cause would have brought about.
"""

from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar

import numpy as np
import torch
import torch.nn.functional as F

import common
import data
import pretrained
import sae
from model import GPT, GPTConfig, generate, padded, sweep

FT = 1  # the reasoner's stream; the base's is 0
ALONE, TOGETHER = 1.1, 2.0  # norms of the state: a push along one latent, along a list of them


@dataclass
class Args(common.TrainFlags):
    """crosscoder"""

    presets: ClassVar[dict] = {
        "smoke": dict(steps=12, ft_steps=8, sae_steps=12, batch_size=8, d_sae=64)
        | dict(sae_batch=128, rows=1500, prompts=10, top=4, jobs=1),
        "toy": {},
    }
    limits: ClassVar[dict] = common.TrainFlags.limits | {
        **dict.fromkeys("ft_steps d_sae k sae_steps sae_batch rows top answers".split(), (1,)),
        **dict.fromkeys(("layer", "sae_lr"), (0,)),
        "prompts": (8,),
    }
    unused: ClassVar[set] = {"micro_batch", "shard", "eval_every"}
    may_change: ClassVar[set] = common.TrainFlags.may_change - {"steps"} | {"top", "prompts"}

    steps: int = 1500  # training steps of the base model
    ft_steps: int = 1500  # training steps of the reasoner, which starts from it
    batch_size: int = 32
    lr: float = 4e-3
    base: str = ""  # a real base model (paper: Llama-3.1-8B)
    model: str = ""  # its reasoner (paper: DeepSeek-R1-Distill-Llama-8B)
    dataset: str = "stdlib"  # with --model: text to read beside the answers
    answers: int = 64  # with --model: how many answers are sampled (paper: 500)
    wait: list[str] = common.default_list("wait", "Wait", " wait", " Wait")  # wait words
    layer: int = 3  # block that is read, from 0 (paper: 7, 15, 23 of 32)
    d_sae: int = 256  # latents (paper: 65536)
    k: int = 32  # active latents, on average (paper: 100)
    sae_steps: int = 500  # training steps of the crosscoder (paper: 195000)
    sae_batch: int = 1024  # positions in a step of the crosscoder (paper: 2048)
    sae_lr: float = 2e-3  # peak learning rate of the crosscoder (paper: 1e-4)
    rows: int = 60_000  # positions that the crosscoder is trained on
    prompts: int = 100  # prompts of each cause; with --model: of all (paper: 351)
    top: int = 24  # latents in a list (paper: 50)


# ----------------- the method


def relative_norm(norms):
    """Delta of norms (m, 2): 0 for the base's latents, .5 shared, 1 the reasoner's."""
    base, ft = norms.unbind(1)
    return ((ft - base) / torch.maximum(ft, base).clamp(min=1e-12) + 1) / 2


def log_p(logits, targets):
    """log of the ids' total probability: logits (..., V) -> (...)."""
    return logits.float().log_softmax(-1)[..., targets].logsumexp(-1)


def last_states(models, prompts, layer):
    """Last tokens' states, all models side by side: (N, M C)."""
    parts = []
    for i in range(0, len(prompts), 64):
        idx, mask = padded(prompts[i : i + 64], models[0].wte.weight.device)
        streams = [sae.residual(model, idx, layer, mask)[:, -1] for model in models]
        parts.append(torch.cat(streams, 1))
    return torch.cat(parts)


def gradient(model, prompts, layer, targets):
    """d log P(targets) / d h (N, C), h the last token's state behind block `layer`."""
    size = max(1, min(64, 2**13 // max(map(len, prompts))))  # 2**13 tokens in a pass
    states, parts = [], []

    def cut(h):  # the graph begins here, at the last state
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
    """a_ji = f_ji <D_i, g_j>: what log P loses at j without latent i, to first order.

    Codes f (N, m), the reasoner's decoder D (m, C), gradients g (N, C) -> (N, m).
    """
    return f * (g @ D.T)


def attribute(models, code, layer, prompts, targets):
    """Attributions and codes (N, m) of prompts' last tokens."""
    f = code.encode(last_states(models, prompts, layer))
    g = gradient(models[FT], prompts, layer, targets)
    return attribution(f, code.decoder(FT), g), f


@torch.no_grad()
def outcomes(model, layer, prompts, changes, groups):
    """P of groups of ids behind prompts: as they are, then with V changes (N, V, C).

    They are added to the last state behind block `layer`. Returns (N, 1 + V, groups).
    """
    V = changes.shape[1]
    size = max(1, min(64, 2**24 // (V + 1) // model.config.vocab_size))  # of logits
    parts = []
    for i in range(0, len(prompts), size):
        idx, mask = padded(prompts[i : i + size], model.wte.weight.device)
        here = changes[i : i + size, :, None].to(model.wte.weight.dtype)
        patches = [{layer: here[:, v].add} for v in range(V)]  # h -> h + change
        logits = model.unembed(sweep(model, idx, [{}, *patches], mask=mask)[:, :, 0])
        parts.append(torch.stack([log_p(logits, group) for group in groups], -1))
    return torch.cat(parts).exp().cpu()


def pushes(h, vectors, alpha):
    """alpha |h| v / |v| for states h (N, C) and vectors v (V, C): (N, V, C)."""
    return alpha * h.norm(dim=1)[:, None, None] * F.normalize(vectors, dim=1)


# ------------------ the world

PATTERNS = {  # what the reasoner does: two words for it; and the cause
    "check": ("check", "verify"),  # an error in this step
    "restart": ("again", "begin"),  # a slip: the step began from a wrong digit
    "recall": ("recall", "rule"),  # the next stage is @, defined at the start
    "unsure": ("maybe", "unsure"),  # the next stage is ?, an unknown map
}
CAUSES = [*PATTERNS, "none"]
MAPS = {"a": (2, 1), "b": (3, 4), "c": (4, 4)}  # 2 x + 1, 3 x + 4, 4 x + 4, modulo 5
VOCAB = "<pad> <bos> <eos> 0 1 2 3 4 a b c @ ? : ; = | A or ok bad".split()
for words in PATTERNS.values():
    VOCAB += words
ID = {word: i for i, word in enumerate(VOCAB)}
MARKS = [[ID[word] for word in pair] for pair in PATTERNS.values()]  # of each pattern
WAIT = sum(MARKS, [])  # the wait words: here they say what comes
LONGEST = 80


class Story:
    """A digit goes through three to five stages: maps, or @, or the unknown ?.

    words      the problem, and then the answer, step by step
    decisions  (index of a step's `;`, its cause, the pattern that follows or "")
    """

    def __init__(self, rng):
        self.rng = rng
        self.first = self.value = int(rng.integers(5))
        self.define = str(rng.choice([*MAPS]))  # the map that @ stands for
        self.settled = {}  # stage: the map that an episode put in the place of ?
        self.decisions = []
        self.stages = [str(rng.choice([*MAPS]))]
        for _ in range(rng.integers(2, 5)):
            kind = rng.random()
            stage = str(rng.choice([*MAPS]))
            if kind < 0.3:
                stage = "@" if kind < 0.15 else "?"
            self.stages.append(stage)
        self.words = ["<bos>", "@", "=", self.define, "|"]
        self.words += [str(self.first), ":", *self.stages, ";"]

    def __len__(self):
        return len(self.words)

    def other(self, x):
        """A digit that is not x."""
        return (x + int(self.rng.integers(1, 5))) % 5

    def meaning(self, i):
        """The map of stage i; "" if it is unknown."""
        stage = self.stages[i]
        return {"@": self.define, "?": self.settled.get(i, "")}.get(stage, stage)

    def result(self, x, i):
        """The digit behind stage i; behind an unknown map, any."""
        if not self.meaning(i):
            return int(self.rng.integers(5))
        factor, term = MAPS[self.meaning(i)]
        return (factor * x + term) % 5

    def write(self, x, i, result):
        """The words of a step; behind @ and a settled ? their meaning."""
        stage, means = self.stages[i], self.meaning(i)
        shown = [stage, means] if means not in ("", stage) else [stage]
        self.words += [*shown, str(x), "=", str(result), ";"]
        self.value = result

    def step(self, i, noise):
        """Stage i, maybe with noise. Returns the decision's cause, and x."""
        x = self.other(self.value) if noise == "restart" else self.value
        right = self.result(x, i)
        self.write(x, i, self.other(right) if noise == "check" else right)
        coming = self.stages[i + 1] if i + 1 < len(self.stages) else ""
        coming = {"@": "recall", "?": "unsure"}.get(coming, "")
        if noise and coming:
            return "mixed", x
        return noise or coming or "none", x

    def episode(self, pattern, i, x):
        """What the reasoner does after its word, done rightly."""
        self.words.append(str(self.rng.choice(PATTERNS[pattern])))
        if pattern == "check":
            self.write(x, i, self.result(x, i))
        elif pattern == "restart":
            self.value = self.first
            for j in range(i + 1):
                self.write(self.value, j, self.result(self.value, j))
        elif pattern == "recall":
            self.words += ["@", "=", self.define, ";"]
        else:
            settled, other = self.rng.choice([*MAPS], 2).tolist()
            self.settled[i + 1] = settled
            self.words += ["?", "=", settled, "or", other, ";"]


def tell(rng, reasoner):
    """A story with noise: some steps are wrong, at most one is a slip.

    The base grades half of its steps, so that it learns to see noise. The reasoner
    has an episode after three causes in four, and after no cause with .03.
    """
    s = Story(rng)
    wrong, slip = (0.12, 0.1) if reasoner else (0.3, 0.3)
    slipped = False
    for i, stage in enumerate(s.stages):
        u = rng.random()
        noise = ""
        if u < wrong and stage != "?":  # of an unknown map any result is right
            noise = "check"
        elif wrong <= u < wrong + slip and not slipped and i < 3:  # later, too much to repeat
            noise, slipped = "restart", True
        cause, x = s.step(i, noise)
        pattern = ""
        if reasoner and cause in PATTERNS and rng.random() < 0.75:
            pattern = cause
        elif reasoner and cause == "none" and rng.random() < 0.03:
            pattern = str(rng.choice([*PATTERNS]))
        s.decisions.append((len(s.words) - 1, cause, pattern))
        if pattern:
            s.episode(pattern, i, x)
        elif not reasoner and rng.random() < 0.5:
            s.words.append("bad" if noise else "ok")
    s.words += ["A", str(s.value), "<eos>"]
    return s


def collate(stories, reasoner):
    """Tokens; weights are 0 in the problem, 6 for a grade or behind a step."""
    longest = min(LONGEST + 1, max(map(len, stories)))
    full = torch.zeros(len(stories), longest, dtype=torch.long)
    for row, s in zip(full, stories):
        ids = [ID[word] for word in s.words[:longest]]
        row[: len(ids)] = torch.tensor(ids)
    idx, targets = full[:, :-1], full[:, 1:]
    heavy = (targets == ID["ok"]) | (targets == ID["bad"])
    if reasoner:
        heavy = idx == ID[";"]
    in_answer = (idx == ID[";"]).cumsum(1) > 0
    weights = (targets > 0) * in_answer * (1.0 + 5.0 * heavy)
    return {"idx": idx, "targets": targets, "weights": weights}


def positions(rng, n):
    """{cause: n prompts}; they end where the reasoner decides."""
    split = {cause: [] for cause in CAUSES}
    while min(map(len, split.values())) < n:
        s = tell(rng, reasoner=True)
        for end, cause, _ in s.decisions:
            if end < LONGEST and cause in split and len(split[cause]) < n:
                split[cause].append([ID[word] for word in s.words[: end + 1]])
    return split


def train_model(args, env, log, seed, start=None):
    """The base model; or from its weights, `start`, the reasoner."""
    torch.manual_seed(seed)
    shape = dict(norm="rms", gated=True, act="silu", d_mlp=128)
    model = GPT(GPTConfig(len(VOCAB), LONGEST, 5, 4, 64, **shape))
    reasoner = start is not None
    if reasoner:
        model.load_state_dict(start.state_dict())
        args = replace(args, steps=args.ft_steps)

    def batch(step):
        """One of four batches, sorted by length: less padding."""
        rng = np.random.default_rng([seed, reasoner, step // 4])
        stories = [tell(rng, reasoner) for _ in range(4 * args.batch_size)]
        stories.sort(key=len)
        part = rng.permutation(4)[step % 4] * args.batch_size
        return collate(stories[part : part + args.batch_size], reasoner)

    common.train(model, batch, args, env, log.stage("reasoner" if reasoner else "base"))
    return model.eval().requires_grad_(False)


def states_of(models, args, env, seed, n):
    """n rows of both streams, over stories of both kinds."""

    def batches():
        rng = np.random.default_rng([seed, 2])
        while True:
            for reasoner in False, True:
                stories = [tell(rng, reasoner) for _ in range(128)]
                idx = collate(stories, reasoner)["idx"]
                yield idx.to(env.device), idx.to(env.device) != ID["<pad>"]

    return sae.harvest(models, args.layer, batches(), n, ID["<bos>"])


# -------------------- measure


def gate(model, split):
    """G1: P(wait) after the worst cause and after none; how much of it is right."""
    p = {}  # cause -> [P of all wait words, of each pattern's]
    for cause, prompts in split.items():
        no_change = torch.zeros(len(prompts), 0, 1)
        found = outcomes(model, 0, prompts, no_change, [WAIT, *MARKS])
        p[cause] = found[:, 0].mean(0).tolist()
    least = min(p[cause][0] for cause in PATTERNS)
    right = min(p[cause][i] / p[cause][0] for i, cause in enumerate(PATTERNS, 1))
    return {"least": least, "right": right, "without": p["none"][0]}


def swapped(model, layer, split):
    """G3: with a donor's last state, how often comes its pattern (same cause: a new one)?"""
    rng = np.random.default_rng(3)
    h = {cause: last_states([model], split[cause], layer) for cause in PATTERNS}
    hits = {"other cause": [], "same cause": []}
    for cause in PATTERNS:
        for j, donor in enumerate(PATTERNS):
            donors = h[donor][rng.permutation(len(h[donor]))]
            change = (donors - h[cause])[:, None]
            p = outcomes(model, layer, split[cause], change, MARKS)  # (N, 2, patterns)
            before, after = p.argmax(2).T
            if cause == donor:
                hits["same cause"] += (after != before).tolist()
            else:
                hits["other cause"] += (after == j).tolist()
    return {name: float(np.mean(some)) for name, some in hits.items()}


def explained(code, x):
    """G2: explained share of the variance of x (N, 2 C), the worse stream's."""
    wrong = (x - code.decode(code.encode(x))).square().sum(0)
    total = (x - x.mean(0)).square().sum(0)
    return (1 - wrong.view(2, -1).sum(1) / total.view(2, -1).sum(1)).min().item()


def spearman(x, y):
    """Rank correlation of two vectors."""
    ranks = torch.stack([values.argsort().argsort().double() for values in (x, y)])
    return torch.corrcoef(ranks)[0, 1].item()


def against_ablation(models, code, layer, prompts, targets):
    """P1: attribution, and log P lost by ablation, of all prompts' active latents: two (n,)."""
    a, f = attribute(models, code, layer, prompts, targets)
    most = int((f > 0).sum(1).max())
    active = f.topk(most).indices  # (N, V): some are idle
    f, a = f.gather(1, active), a.gather(1, active)
    off = -f[..., None] * code.decoder(FT)[active]
    logp = outcomes(models[FT], layer, prompts, off, [targets])[..., 0].log()
    is_active = (f > 0).cpu()
    return a.cpu()[is_active], (logp[:, :1] - logp[:, 1:])[is_active]


def lists_off(models, code, layer, prompts, lists, wait):
    """P2: the share of P(wait) that goes without each list of latents."""
    f = code.encode(last_states(models, prompts, layer))
    D = code.decoder(FT)
    off = torch.stack([-f[:, some] @ D[some] for some in lists.values()], 1)
    p = outcomes(models[FT], layer, prompts, off, [wait])[..., 0].mean(0)
    return {name: (1 - p[1 + i] / p[0]).item() for i, name in enumerate(lists)}


def pushed(model, layer, prompts, vectors, alpha, groups):
    """The rise of P of groups of ids, pushed along vectors (V, C): (V, G)."""
    h = last_states([model], prompts, layer)
    p = outcomes(model, layer, prompts, pushes(h, vectors, alpha), groups).mean(0)
    return p[1:] - p[0]


def study(models, code, args, prompts, caused, none, wait, seed):
    """D, P1, P2 at prompts with a cause, P3 without; lists come from `prompts`.

    Returns numbers, and how often each latent is active at `prompts`.
    """
    layer = args.layer
    a, f = attribute(models, code, layer, prompts, wait)
    rate = (f > 0).double().mean(0).cpu()
    alive = rate.nonzero().squeeze(1)
    if len(alive) < 2 * args.top:
        raise ValueError(f"--top {args.top}: {len(alive)} latents are active there")
    rng = torch.Generator().manual_seed(seed)
    top = sae.best(a.mean(0).cpu(), args.top)
    random = alive[torch.randperm(len(alive), generator=rng)[: len(top)]].tolist()
    lists = {"top": top, "matched": sae.alike(top, rate), "random": random}
    D, delta = code.decoder(FT), relative_norm(code.norms()).cpu()
    vectors = {name: D[some] for name, some in lists.items()}
    vectors["random direction"] = torch.randn(D[top].shape, generator=rng).to(D)
    row = {"delta": {}, "rise": {}}
    row["off"] = lists_off(models, code, layer, caused, lists, wait)
    for name, some in (lists | {"all": alive}).items():
        row["delta"][name] = delta[some].mean().item()
    for name, some in vectors.items():
        rise = pushed(models[FT], layer, none, some, ALONE, [wait])
        row["rise"][name] = rise.mean().item()
    a, lost = against_ablation(models, code, layer, caused, wait)
    order = torch.randperm(len(a), generator=rng)
    row["rho"] = {"attribution": spearman(a, lost), "permuted": spearman(a[order], lost)}
    row["points"] = a[order[:500]].tolist(), lost[order[:500]].tolist()
    return row, rate


def patterns(models, code, args, discover, none, rate):
    """P4: {kind of list: rises of each P(pattern), a row a list} where there is no cause.

    A list is chosen by attribution to the pattern's words, and pushed as one direction.
    """
    D = code.decoder(FT)
    directions = F.normalize(D, dim=1)
    rng = torch.Generator().manual_seed(5)
    vectors = {"chosen": [], "matched": [], "random direction": []}
    for pattern, marks in zip(PATTERNS, MARKS):
        a = attribute(models, code, args.layer, discover[pattern], marks)[0].mean(0)
        latents = sae.best(a.cpu(), args.top)
        for name, some in ("chosen", latents), ("matched", sae.alike(latents, rate)):
            vectors[name].append((a[latents, None] * directions[some]).sum(0))
        vectors["random direction"].append(torch.randn(D[0].shape, generator=rng).to(D))
    matrices = {}
    for name, rows in vectors.items():
        rise = pushed(models[FT], args.layer, none, torch.stack(rows), TOGETHER, MARKS)
        matrices[name] = rise.tolist()
    return matrices


def brought_about(matrix):
    """How many lists raise their pattern by .25 or more, and no other as much."""
    return sum(row[i] >= 0.25 and max(row) == row[i] for i, row in enumerate(matrix))


def run_toy(args, env, log, arm, seed):
    """Everything for one seed: base, reasoner, crosscoder, measures."""
    base = train_model(args, env, log, seed)
    models = [base, train_model(args, env, log, seed, start=base)]
    rows = states_of(models, args, env, seed, args.rows)
    torch.manual_seed(seed)
    code = sae.SAE(64, args.d_sae, args.k, streams=2, batch=True)
    sae.train_sae(code, rows, args, env, log, seed)
    discover = positions(np.random.default_rng([seed, 4]), args.prompts)
    test = positions(np.random.default_rng([seed, 5]), args.prompts)
    prompts = sum((discover[cause] for cause in PATTERNS), [])
    caused, none = sum((test[cause] for cause in PATTERNS), []), test["none"]
    row, rate = study(models, code, args, prompts, caused, none, WAIT, seed)
    row["gate"] = gate(models[FT], test)
    row["base gate"] = gate(base, test)
    row["swap"] = swapped(models[FT], args.layer, test)
    held = states_of(models, args, env, seed + 2**20, min(args.rows, 2**13))  # other stories
    base_states, ft_states = held.chunk(2, 1)
    apart = torch.cat((base_states.roll(1, 0), ft_states), 1)
    row["fve"] = {"code": explained(code, held), "base at another token": explained(code, apart)}
    matrices = patterns(models, code, args, discover, none, rate)
    row["matrix"] = matrices["chosen"]
    row["won"] = {name: brought_about(matrix) for name, matrix in matrices.items()}
    return row


# ---------------- a real pair


def load_pair(args, env):
    """Two models and their tokenizer. ValueError if they differ."""
    base, tok = pretrained.load(args.base, env.device, args.dtype)
    ft, tok_ft = pretrained.load(args.model, env.device, args.dtype)
    shapes = [(m.config.n_layer, m.config.n_embd) for m in (base, ft)]
    if shapes[0] != shapes[1]:
        raise ValueError(f"the pair differs in layers, width: {shapes}")
    text = "Wait, 1 + 2 = 3.\n hesitation été 你好"
    if tok.encode(text) != tok_ft.encode(text):
        raise ValueError(f"the pair differs in its tokenizers: {text!r}")
    if args.layer >= shapes[0][0]:
        raise ValueError(f"--layer {args.layer}, allowed: 0 to {shapes[0][0] - 1}")
    return [model.eval().requires_grad_(False) for model in (base, ft)], tok_ft


def answers_of(model, tok, n):
    """The ids of n questions, each with the reasoner's answer."""
    questions = [f"Find the smallest prime larger than 1{i}0." for i in range(n)]
    heads = [tok.encode(question, bos=True) for question in questions]
    if tok.template:
        heads = [tok.chat([{"role": "user", "content": text}]) for text in questions]
    room = min(1000, model.config.block_size - max(map(len, heads)))
    options = dict(temperature=0.6, top_p=0.95, stop=tok.stops, seed=0)
    tails = generate(model, heads, room, **options)
    return [head + tail for head, tail in zip(heads, tails)]


def prepare(args, env, out):
    """A real pair: models, wait ids, prompts up to a wait, rows for the code."""
    models, tok = load_pair(args, env)
    wait = sorted({pretrained.first_token(tok, word) for word in args.wait})
    answers = answers_of(models[FT], tok, args.answers)
    prompts = []
    for row in answers:
        prompts += [row[:i] for i in range(8, len(row)) if row[i] in wait]
    if len(prompts) < 8:
        raise ValueError(f"{len(prompts)} wait words in the answers, needed: 8")
    n, folder = args.sae_steps * args.sae_batch, out / "tokens"
    tokens = data.token_file(args.dataset, "train", tok, folder, n)

    def batches():
        rng, length = np.random.default_rng(0), min(256, models[FT].config.block_size)
        while True:
            text = data.windows(tokens, rng, 8, length)
            if tok.opens:
                text[:, 0] = tok.bos
            own = [answers[i][:length] for i in rng.integers(len(answers), size=8)]
            yield padded([*text.tolist(), *own], env.device)

    rows = sae.harvest(models, args.layer, batches(), args.rows, tok.bos)
    order = np.random.default_rng(0).permutation(len(prompts))[: args.prompts]
    return models, wait, [prompts[i] for i in order], rows


def run_pair(prepared, args, env, log, arm, seed):
    """One seed on a real pair."""
    models, wait, prompts, rows = prepared
    torch.manual_seed(seed)
    code = sae.SAE(models[FT].config.n_embd, args.d_sae, args.k, streams=2, batch=True)
    sae.train_sae(code, rows, args, env, log, seed)
    return study(models, code, args, prompts[::2], prompts[1::2], prompts[1::2], wait, seed)[0]


# ------- claims, figure, main


def sides(rows, key, arm, measure):
    """A measure of each seed, by side, for `run.claim`."""
    found = {}
    for name in rows[0][key]:
        found[name] = [{measure: row[key][name]} for row in rows]
    return {"arm": found.pop(arm), "controls": found}


def judge(run, rows):
    """The paper's claims, beside controls that must fail the same criteria."""
    whose = sides(rows, "delta", "top", "delta")
    whose["base"] = whose["controls"].pop("all")
    says = "latents that promote waiting are more the reasoner's than others"
    run.claim("D", says, "classified", "arm.delta >= base.delta + .05", **whose)
    says = "attribution ranks latents as exact ablation does"
    run.claim("P1", says, "not tested", "arm.rho >= .9", **sides(rows, "rho", "attribution", "rho"))
    says = "without the latents at the top, P(wait) falls"
    run.claim("P2", says, "falls", "arm.cut >= .4", **sides(rows, "off", "top", "cut"))
    says = "pushed along one of them, it rises"
    both = sides(rows, "rise", "top", "rise")
    run.claim("P3", says, "9.7 waits for 1", "arm.rise >= .15", **both)


def judge_toy(run, rows):
    """The gates; and P4, which needs known patterns."""
    says = "the reasoner waits for its causes, and does what each asks for"
    rule = "arm.least >= .6 and arm.without <= .1 and arm.right >= .85"
    arm = [row["gate"] for row in rows]
    controls = {"the base": [row["base gate"] for row in rows]}
    run.claim("G1", says, "toy only", rule, arm=arm, controls=controls)
    says = "a sparse code explains the states of both models"
    run.claim("G2", says, "about .9", "arm.fve >= .85", **sides(rows, "fve", "code", "fve"))
    says = "the state before decides the pattern: swapped, the donor's comes"
    both = sides(rows, "swap", "other cause", "donor")
    run.claim("G3", says, "asked", "arm.donor >= .5", **both)
    says = "latents chosen for a pattern bring it about without a cause"
    run.claim("P4", says, "for some", "arm.won >= 3", **sides(rows, "won", "chosen", "won"))


def draw(path, rows):
    """Attribution, lists off, whose latents they are, patterns."""
    points = {f"rank correlation {rows[0]['rho']['attribution']:.2f}": rows[0]["points"]}
    panels = [dict(title="Latents of the first seed", points=points)]
    panels[0] |= dict(xlabel="attribution, nats", ylabel="lost by ablation, nats")
    for key, title in ("off", "Lists off: P(wait) lost"), ("delta", "Whose are they?"):
        bars = {"mean": [[*row[key].values()] for row in rows]}
        panels.append(dict(title=title, bars=bars, names=[*rows[0][key]]))
    panels[2] |= dict(ylabel="base 0, shared .5, reasoner 1", ylim=(0, 1))
    if "matrix" in rows[0]:
        matrix = np.array([row["matrix"] for row in rows])
        bars = {f"of {pattern}": matrix[:, :, i] for i, pattern in enumerate(PATTERNS)}
        names = [f"for {pattern}" for pattern in PATTERNS]
        panels.append(dict(title="Pushed: rise of P(pattern)", bars=bars, names=names))
    common.panels(path, panels)


def check(args, env):
    """What may be wrong: (whether it is, message)."""
    pair = bool(args.base) + bool(args.model)
    idle = common.changed_flags(args, ["ft_steps"] if pair else ["dataset", "answers", "wait"])
    return [
        (args.k > args.d_sae, f"--k {args.k}, allowed: 1 to {args.d_sae}"),
        (args.top > args.d_sae // 4, f"--top {args.top}, allowed: 1 to {args.d_sae // 4}"),
        (args.rows < args.sae_batch, f"--rows {args.rows}, allowed: {args.sae_batch} and more"),
        (pair == 1, "a pair needs both --base and --model"),
        (args.layer > 4 and not pair, f"--layer {args.layer}, allowed: 0 to 4 in the toy"),
        (idle, f"{idle} has no effect with{'' if pair else 'out'} --model"),
        (env.world > 1, "one process: start it without torchrun"),
    ]


def main(argv=None):
    """The toy, or a real pair; returns what it writes to result.json."""
    run = common.Run(Args, argv, "2510.04128", check)
    if run.args.model:
        with common.bad_input("--model"):
            prepared = prepare(run.args, run.env, run.out)
        found = run.each(partial(run_pair, prepared), ["pair"])
    else:
        found = run.each(run_toy, ["toy"])
    (rows,) = found.values()
    judge(run, rows)
    if not run.args.model:
        judge_toy(run, rows)
    draw(run.out / "crosscoder.png", rows)
    return run.finish(found)


if __name__ == "__main__":
    common.cli(main)
