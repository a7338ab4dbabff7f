"""In-context learning without copying (arXiv 2511.05743): a GPT that never gains from copying.

Induction heads find an earlier occurrence of the current token and predict what followed it there.
Are they what in-context learning is made of? The paper leaves out of the loss every target that
such a head could get right: a target is masked if its bigram occurred before in the same window.
Everything else is ordinary training. What it found on a model of 1B parameters: copying collapses,
attention heads stop looking for earlier occurrences, and yet tasks whose answer is not in the
context are learnt from examples as well as before. Only tasks with few labels suffer: they copy.

The toy trains three arms on the same windows from the same initial weights. They differ in the loss
mask alone: none (vanilla), any (Hapax), random (as many targets, but anywhere: the control); a
fourth, offset, masks every target behind a repeated token. A window holds text (CPython's sources),
an abstractive task (fixed maps of symbols, distinct answers), a few-label task (the same symbols,
four labels), or an extractive one (name-value pairs drawn anew). What the toy can't show: that
abstract rules survive. Its maps are recognised from one example, then recalled.

Read on: `repeated` (the method), `World` (the data), `train_arm`, `measure`, `judge` (the claims).
"""

import itertools
import math
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import numpy as np
import torch

import common
import data
from model import GPT, GPTConfig

ARMS = "none", "any", "random", "offset"
AT_ONCE = 2**14  # tokens in a forward pass of the measures: their logits fit into memory
PYTHIA = dict(  # what the presets of its sizes share
    dataset="monology/pile-uncopyrighted",
    tokenizer="EleutherAI/gpt-neox-20b",
    mix=[1, 0, 0, 0],
    neox=True,
    block_size=2048,
    batch_size=512,
    micro_batch=8,
    samples=1000,
    warmup=30,
)


@dataclass
class Args(common.TrainFlags):
    """Hapax"""

    presets: ClassVar[dict] = {
        "smoke": dict(
            steps=12, n_embd=32, eval_every=6, save_every=5, samples=24, warmup=2, jobs=1
        ),
        "toy": {},
        "70m": PYTHIA | dict(n_layer=6, n_head=8, n_embd=512, lr=1e-3, steps=3000),
        "160m": PYTHIA | dict(n_layer=12, n_head=12, n_embd=768, lr=6e-4, steps=3000),
        "paper": PYTHIA
        | dict(n_layer=16, n_head=8, n_embd=2048, lr=2.5e-4, steps=20000, decay_steps=143000)
        | dict(batch_size=1024, warmup=1430, save_every=500),
    }
    limits: ClassVar[dict] = common.TrainFlags.limits | {
        "samples": (4,),
        "block_size": (65,),  # BOS and 16 examples of 4 tokens each: room to learn from them
        "label_noise": (0, 1),
        **dict.fromkeys(("n_layer", "n_head", "n_embd"), (1,)),
    }

    steps: int = 1200
    lr: float = 4e-3
    arms: list[str] = common.default_list("none", "any", "random")  # loss masks; also: offset
    dataset: str = "stdlib"  # text: stdlib, file:PATH or a `datasets` id (paper: the Pile)
    tokenizer: str = "bpe:512"  # byte, bpe:N, a tiktoken name, a tokenizer.json
    show: str = ""  # colour this text, or `heldout` text, by what the mask leaves out; then stop
    mix: list[int] = common.default_list(3, 2, 2, 9)  # parts of a batch: text, the three toy tasks
    label_noise: float = 0.4  # share of few-label answers redrawn: labels can't be memorised
    samples: int = 512  # prompts or windows in each final measure (paper: 1000)
    neox: bool = False  # Pythia's block; off: smeared keys, which make induction easy to learn
    n_layer: int = 2  # blocks (paper: 16)
    n_head: int = 4  # heads (paper: 8)
    n_embd: int = 64  # width (paper: 2048)
    block_size: int = 128  # window in tokens (paper: 2048)


# ----------------- the method


def repeated(x, rule="any"):
    """Which targets an induction head could get right: the mask of Hapax.

    x  (B, T+1) token ids, each row a window with its last target
    Returns bool (B, T), True at masked targets x[:, 1:]. Target t is masked
      any     if the bigram (x[t-1], x[t]) occurred earlier in the window (the paper's rule)
      offset  if x[t-1] occurred earlier, whatever followed it: no incentive against copying is left
    O(B T log T): sorted by (what, place), a repeated thing stands behind its earlier occurrence.
    """
    x = np.asarray(x)
    if x.ndim != 2 or not len(x) or x.shape[1] < 2 or x.dtype.kind not in "iu":
        raise ValueError(f"windows are {x.dtype} {x.shape}, needed: integers (B, T+1) with T >= 1")
    if x.min() < 0 or x.max() >= 2**20:
        raise ValueError(f"token ids from {x.min()} to {x.max()}, allowed: 0 to {2**20 - 1}")
    x = x.astype(np.int64)
    T = x.shape[1] - 1
    what = x[:, :-1]
    if rule == "any":  # a bigram as one number: two ids of 20 bits, which leave 23 for the place
        what = what * 2**20 + x[:, 1:]
    both = np.sort(what * T + np.arange(T), axis=1)  # (what, place) as one number
    what, place = np.divmod(both, T)
    again = np.zeros(what.shape, bool)
    again[:, 1:] = what[:, 1:] == what[:, :-1]
    mask = np.empty_like(again)
    np.put_along_axis(mask, place, again, axis=1)
    return mask


def loss_mask(arm, x, seeds):
    """The targets that an arm leaves out, bool (B, T), of windows x (B, T+1); random by `seeds`."""
    if arm == "none":
        return np.zeros(x[:, 1:].shape, bool)
    if arm != "random":
        return repeated(x, arm)
    share = repeated(x).mean()
    return np.random.default_rng([*seeds, 1]).random(x[:, 1:].shape) < share


# ------------------ the world

TASKS = 6  # maps of the abstractive task
INPUTS = 44  # symbols that they map: no shot repeats in a window
LABELS = 4  # of the few-label task
OWN = 48  # further symbols of the extractive task
PAIRS = 8  # the most name-value pairs in a window
SHOT = 4  # tokens of a shot, which is an example: x : y ;


class World:
    """What all arms see: text, and the symbols and maps of the toy tasks, which the seed draws."""

    def __init__(self, train, heldout, n_text, eos, seed):
        self.train, self.heldout, self.seed = train, heldout, seed
        self.bos, self.colon, self.end = range(n_text, n_text + 3)  # the end of a shot is the ;
        ends = np.cumsum([n_text + 3, INPUTS, TASKS * INPUTS, 2 * LABELS, OWN])  # ids in this order
        _, self.inputs, outputs, labels, own = np.split(np.arange(ends[-1]), ends[:-1])
        self.n_vocab = math.ceil(ends[-1] / 64) * 64  # GPUs like a multiple of 64
        rng = np.random.default_rng([seed, 2])
        self.maps = rng.permuted(outputs.reshape(TASKS, INPUTS), axis=1)  # task, input -> output
        evenly = np.stack([np.resize(row, INPUTS) for row in labels.reshape(2, LABELS)])
        self.labels = rng.permuted(evenly, axis=1)  # task, input -> one of its four labels
        text = np.setdiff1d(np.arange(n_text), [eos])
        self.alphabet = np.concatenate((text, own))  # what extractive windows are written in

    def shots(self, x, y):
        """Inputs and answers (n, k) as tokens (n, 1 + 4 k): BOS, then `x : y ;` k times."""
        colon, end = np.full_like(x, self.colon), np.full_like(x, self.end)
        tokens = np.stack((x, colon, y, end), 2).reshape(len(x), SHOT * x.shape[1])
        return np.concatenate((np.full((len(x), 1), self.bos), tokens), 1)

    def abstractive(self, rng, n, mixed=False):
        """Windows of one map, each input once; mixed: a map a shot, so that examples are no use."""
        picks = rng.random((n, INPUTS)).argsort(1)
        tasks = rng.integers(TASKS, size=(n, INPUTS if mixed else 1))
        return self.shots(self.inputs[picks], self.maps[tasks, picks])

    def few_label(self, rng, n, noise):
        """Windows of one of two maps to four labels; a share `noise` of answers is redrawn."""
        picks = rng.random((n, INPUTS)).argsort(1)
        tasks = rng.integers(2, size=(n, 1))
        redrawn = self.labels[tasks, rng.integers(INPUTS, size=picks.shape)]
        noisy = rng.random(picks.shape) < noise
        return self.shots(self.inputs[picks], np.where(noisy, redrawn, self.labels[tasks, picks]))

    def query(self, rng, n, overlap, shots=5):
        """Few-label prompts (n, T) of some shots and a query, and its labels (n,).

        Its label is that of one of the shots (overlap), or of none: then it can't be copied.
        """
        rows, answers = [], []
        while len(rows) < n:
            labels = self.labels[rng.integers(2)]
            query, *others = rng.permutation(INPUTS)
            if overlap:
                picks = others[:shots]
            else:
                picks = [i for i in others if labels[i] != labels[query]][:shots]
            if overlap and labels[query] not in labels[picks]:
                continue
            picks = np.array([*picks, query])[None]
            rows.append(self.shots(self.inputs[picks], labels[picks])[0, :-2])  # ends at the colon
            answers.append(labels[query])
        return np.stack(rows), np.array(answers)

    def extractive(self, rng, n, length):
        """3 to 8 name-value pairs a window, drawn anew, shown again and again: `name value ;`."""
        rows = []
        for _ in range(n):
            pairs = rng.choice(self.alphabet, (PAIRS, 2), replace=False)
            n_pairs = rng.integers(3, PAIRS + 1)
            which = rng.integers(n_pairs, size=length // 3 + 1)
            end = np.full((len(which), 1), self.end)
            rows.append(np.concatenate((pairs[which], end), 1).ravel()[:length])
        return np.stack(rows)

    def batch(self, step, n, length, args):
        """`n` windows (n, length) of one step, the same for every arm."""
        rng = np.random.default_rng([self.seed, step])
        edges = np.cumsum(args.mix) / sum(args.mix)
        kinds = np.searchsorted(edges, (np.arange(n) + 0.5) / n)  # whose share row i falls into
        n_text, n_abstractive, n_few, n_extractive = np.bincount(kinds, minlength=4)
        parts = [data.windows(self.train, rng, n_text, length)]
        if n_abstractive:
            parts.append(self.abstractive(rng, n_abstractive)[:, :length])
        if n_few:
            parts.append(self.few_label(rng, n_few, args.label_noise)[:, :length])
        if n_extractive:
            parts.append(self.extractive(rng, n_extractive, length))
        return np.concatenate(parts)


def config_of(args, world):
    """The toy's model, or Pythia's block with its initialisation."""
    wiring = dict(smear_keys=True)
    if args.neox:
        proj_std = 2 / (args.n_layer * args.n_embd**0.5)  # of what writes to the stream
        wiring = dict(parallel="two_norms", rotary_pct=0.25, proj_std=proj_std)
    shape = args.block_size, args.n_layer, args.n_head, args.n_embd
    return GPTConfig(world.n_vocab, *shape, **wiring)


def train_arm(source, args, env, log, arm, seed):
    """Trains one arm; returns its final measures. source: (train, heldout, n_vocab, eos)."""
    world = World(*source, seed)
    torch.manual_seed(seed)  # the same initial weights for every arm
    model = GPT(config_of(args, world))

    def batch(step):
        x = world.batch(step, args.batch_size, args.block_size + 1, args)
        kept = torch.from_numpy(~loss_mask(arm, x, (seed, step))).float()
        x = torch.from_numpy(x)
        rows = slice(env.rank, None, env.world)
        return {"idx": x[rows, :-1], "targets": x[rows, 1:], "weights": kept[rows]}

    def evaluate(step):
        with env.autocast(), model.eager():
            return measure(model, world, args, max(8, args.samples // 4))

    common.train(model, batch, args, env, log, evaluate)
    with env.autocast(), model.eager():
        found = measure(model, world, args, args.samples, final=True)
    masked = []
    for step in range(20):
        x = world.batch(step, 16, args.block_size + 1, args)
        masked.append(loss_mask(arm, x, (seed, step)).mean())
    return found | {"share_masked": np.mean(masked)}


# --------------- the measures


@torch.no_grad()
def guesses(model, x, columns, among=None):
    """The likeliest next token (of those in `among`) at k `columns` of windows x (n, T): (n, k)."""
    found = []
    for part in torch.as_tensor(x).split(max(1, AT_ONCE // x.shape[1])):
        h = model.hidden(part.to(model.wte.weight.device))[:, columns]
        logits = model.unembed(h).float().cpu().numpy()
        found.append(logits.argmax(-1) if among is None else among[logits[..., among].argmax(-1)])
    return np.concatenate(found)


def repeats(alphabet, n, s, rng):
    """n sequences of s distinct tokens, each said twice: (n, 2s)."""
    half = np.stack([rng.choice(alphabet, s, replace=False) for _ in range(n)])
    return np.concatenate((half, half), 1)


def repetition(model, x, alphabet):
    """Accuracy on sequences said twice (n, 2s): of the last token, and of the second half.

    The guess is the likeliest token of the alphabet: no separator, which follows nearly anything.
    """
    s = x.shape[1] // 2
    right = guesses(model, x[:, :-1], slice(s, None), alphabet) == x[:, s + 1 :]
    return right[:, -1].mean(), right.mean()


def shot_curve(model, x):
    """Accuracy (k,) of the answers of shots 0, 1, ... in windows x (n, T)."""
    columns = np.arange(SHOT - 2, x.shape[1] - 1, SHOT)
    return (guesses(model, x, columns) == x[:, columns + 1]).mean(0)


def prefix_matching(pattern):
    """How much each head attends, where a token comes again, to what followed it the first time.

    pattern (B, H, 2s, 2s), of sequences said twice; returns (H,).
    """
    s = pattern.shape[-1] // 2
    q = torch.arange(s, 2 * s)
    return pattern[:, :, q, q - s + 1].mean((0, 2))


@torch.no_grad()
def head_scores(model, x):
    """Prefix-matching scores (L * H,) on sequences said twice."""
    sites = [f"blocks.{i}.attn.pattern" for i in range(model.config.n_layer)]
    patterns = model.capture(torch.as_tensor(x).to(model.wte.weight.device), sites)
    return np.concatenate([prefix_matching(patterns[site].float()).cpu() for site in sites])


@torch.no_grad()
def renormalised(logits, x):
    """The loss that vanilla would have at kept targets if it knew that they are no copies.

    At a kept target all earlier continuations C of x[t-1] are wrong by construction, and Hapax is
    trained to know it: so compare it with -log(p(x[t]) / (1 - p(C))). logits (B, T, V), x (B, T+1);
    returns (B, T), void at masked targets.
    """
    p = logits.softmax(-1)
    first = torch.from_numpy(~repeated(x.cpu())).to(x.device)
    before, after = x[:, :-1], x[:, 1:]
    follows = before[:, None, :] == before[:, :, None]  # (B, t, i): x[i-1] = x[t-1]
    follows = (follows & first[:, None, :]).tril(-1)  # i < t, and each continuation once
    each = after[:, None, :].expand(-1, after.shape[1], -1)
    copies = (p.gather(2, each) * follows).sum(2)  # p(C)
    target = p.gather(2, after[..., None])[..., 0]
    return -torch.log(target / (1 - copies).clamp(min=1e-6))


def token_loss_difference(loss, at, counts=None, width=4):
    """Mean loss around position at[0] minus that around at[1]: what the context between is worth.

    loss (n, T); counts bool (n, T): only pairs of positions that both count.
    """
    early = np.s_[:, at[0] - width : at[0] + width + 1]
    late = np.s_[:, at[1] - width : at[1] + width + 1]
    both = np.ones(loss[early].shape, bool) if counts is None else counts[early] & counts[late]
    return (loss[early] - loss[late])[both].mean() if both.any() else np.nan


@torch.no_grad()
def text_measures(model, world, args, n, final):
    """Loss on held-out text, split by the mask of Hapax, and what context is worth there."""
    T = args.block_size
    x = data.windows(world.heldout, np.random.default_rng([world.seed, 3]), n, T + 1)
    kept = ~repeated(x)
    losses, fair = [], []
    for part in torch.from_numpy(x).to(model.wte.weight.device).split(max(1, AT_ONCE // T)):
        losses.append(model.token_loss(part[:, :-1], part[:, 1:]).cpu())
        if final:
            fair.append(renormalised(model(part[:, :-1]).float(), part).cpu())
    loss = torch.cat(losses).numpy()
    at = (50, 500) if T > 504 else (T * 12 // 128, T * 120 // 128)  # the paper's; in short windows
    found = {
        "loss_kept": loss[kept].mean(),
        "loss_masked": loss[~kept].mean(),
        "tld": token_loss_difference(loss, at),
        "tld_kept": token_loss_difference(loss, at, kept),
    }
    if final:
        found["loss_kept_renormalised"] = torch.cat(fair).numpy()[kept].mean()
    return found


def measure(model, world, args, n, final=False):
    """All measures of a model, on the same prompts for every arm."""
    rngs = [np.random.default_rng([world.seed, 4, i]) for i in range(4)]
    s = min(50, args.block_size * 3 // 16)  # the paper's 50; said twice it fits a short window
    x = repeats(world.alphabet, n, s, rngs[0])
    last, half = repetition(model, x, world.alphabet)
    found = {"copy": last, "copy_half": half} | text_measures(model, world, args, n, final)
    scores = np.sort(head_scores(model, x[: max(8, n // 4)]))[::-1]
    top = max(2, round(len(scores) / 13))  # the paper's 10 of 128, 2 of the toy's 8
    found |= {"prefix_max": scores[0], "prefix_top": scores[:top].mean()}
    if args.mix[1]:
        shots = shot_curve(model, world.abstractive(rngs[1], n)[:, : args.block_size])
        mixed = shot_curve(model, world.abstractive(rngs[2], n, mixed=True)[:, : args.block_size])
        found |= {"zero_shot": shots[0], "abstractive": shots[5:].mean()}
        found |= {"mixed": mixed[5:].mean(), "shots": shots}
    if args.mix[2]:
        for name, overlap in ("overlap", True), ("no_overlap", False):
            prompts, answers = world.query(rngs[3], n, overlap)
            found[f"label_{name}"] = (guesses(model, prompts, [-1])[:, 0] == answers).mean()
    return found


# ---------- claims and figure


def judge(run, found):
    """The paper's claims, each beside the control that must fail the same criterion."""
    vanilla, hapax = found["none"], found["any"]
    against = {"base": vanilla, "arm": hapax, "controls": {"random mask": found["random"]}}
    run.claim(
        "C1",
        "copying is suppressed (accuracy on the last token of a random sequence said twice)",
        ".935 -> .32",
        "base.copy >= .5 and arm.copy <= .5 * base.copy",
        **against,
    )
    if "abstractive" in vanilla[0]:
        mixed = [row | {"abstractive": row["mixed"]} for row in hapax]
        run.claim(
            "C2",
            "abstractive tasks are still learnt from examples (accuracy at 5 shots and more)",
            "better on 13 of 21 tasks",
            "arm.abstractive >= base.abstractive - .05 and arm.abstractive >= arm.zero_shot + .3",
            base=vanilla,
            arm=hapax,
            controls={"examples of mixed tasks": mixed},
        )
    if "label_overlap" in vanilla[0]:
        gap = "base.label_overlap - arm.label_overlap"
        rest = "base.label_no_overlap - arm.label_no_overlap"
        run.claim(
            "C3",
            "few-label tasks suffer, but only where the label can be copied (accuracy)",
            "sentiment -.48; without overlap +.33",
            f"{gap} >= .1 and {rest} <= .5 * ({gap})",
            **against,
        )
    run.claim(
        "C4",
        "held-out text: worse at masked targets, no worse at kept ones (nats)",
        "kept -.08 to -.13",
        "arm.loss_masked >= base.loss_masked + .5 and arm.loss_kept <= base.loss_kept",
        **against,
    )
    if run.args.block_size > 504:
        run.claim(
            "C5",
            "context helps less over all, as much where it can't be copied (token-loss difference)",
            "all +.40 -> -.39, kept .05-.10 -> .13-.15",
            "arm.tld <= base.tld - .1 and arm.tld_kept >= base.tld_kept - .02",
            **against,
        )
    run.claim(
        "C6",
        "heads match prefixes less (the best one, the mean of the top ones)",
        "top 10: .61 -> .40",
        "arm.prefix_max <= .75 * base.prefix_max and arm.prefix_top <= .75 * base.prefix_top",
        **against,
    )


def draw(path, found, folder, seeds):
    """Four panels: copying during training; shots, losses and heads of the trained models."""
    names = {"none": "vanilla", "any": "Hapax", "random": "random mask", "offset": "offset mask"}
    copying, shots, losses, heads = {}, {}, {}, {}
    for arm, rows in found.items():
        logs = [common.read_log(folder / f"{arm}-s{seed}.jsonl") for seed in seeds]
        evaluated = [[row for row in log if "copy_half" in row] for log in logs]
        steps = [row["step"] for row in evaluated[0]]
        copying[names[arm]] = steps, [[row["copy_half"] for row in log] for log in evaluated]
        losses[names[arm]] = [[row["loss_kept"], row["loss_masked"]] for row in rows]
        heads[names[arm]] = [[row["prefix_max"], row["prefix_top"]] for row in rows]
        if "shots" in rows[0]:
            shots[names[arm]] = range(len(rows[0]["shots"])), [row["shots"] for row in rows]
    first = next(iter(found))  # "none", unless --arms says otherwise
    fair = np.mean([row["loss_kept_renormalised"] for row in found[first]])
    items = [
        dict(
            title="Copying a random sequence said twice",
            lines=copying,
            xlabel="step",
            ylabel="accuracy, second half",
            ylim=(0, 1),
        ),
        dict(
            title="Abstractive task: no answer repeats",
            lines=shots,
            xlabel="examples before",
            ylabel="accuracy",
            ylim=(0, 1.05),
        ),
        dict(
            title="Loss on held-out text",
            bars=losses,
            names=["kept targets", "masked targets"],
            ylabel="nats",
            levels={f"kept, {names[first]} that knows no copies": fair},
        ),
        dict(
            title="Attention to what followed before",
            bars=heads,
            names=["best head", "mean of the top"],
            ylabel="prefix-matching score",
        ),
    ]
    common.panels(path, items)


def show(text, tok, length):
    """Prints a text, the tokens that Hapax leaves out of the loss in colour."""
    ids = [tok.eos, *tok.encode(text)]
    if len(ids) < 3:
        raise ValueError("--show needs a text of at least two tokens")
    mask = []
    for start in range(0, len(ids) - 1, length):
        mask += repeated(np.array([ids[start : start + length + 1]]))[0].tolist()
    for text, i in data.whole_characters([[token] for token in ids[1:]], tok.decode):
        text = data.printable(text)
        print(f"\x1b[41;97m{text}\x1b[0m" if mask[i] else text, end="")
    print(f"\n\n{np.mean(mask):.0%} of the tokens end a bigram seen before in a window of {length}")


# ----------------------- main


def check(args, env):
    """What may be wrong: (whether it is, message)."""
    unknown = [arm for arm in args.arms if arm not in ARMS]
    wrong_mix = len(args.mix) != 4 or min(args.mix) < 0 or args.mix[0] == 0
    longest = SHOT * INPUTS
    too_long = any(args.mix[1:3]) and args.block_size > longest
    return [
        (unknown, f"--arms {' '.join(unknown)}, allowed: {' '.join(ARMS)}"),
        (wrong_mix, f"--mix {args.mix}, needed: four whole numbers, the first (text) above 0"),
        (too_long, f"--block-size {args.block_size}: above {longest} give --mix 1 0 0 1"),
        (args.n_embd % args.n_head, f"--n-embd {args.n_embd} is no multiple of --n-head"),
        (args.batch_size % env.world, f"--batch-size is no multiple of {env.world} processes"),
    ]


def main(argv=None):
    """The paper end to end; returns what it writes to result.json."""
    run = common.Run(Args, argv, "2511.05743", check)
    args = run.args
    with common.bad_input("--dataset"):
        sample = "".join(itertools.islice(data.load_text(args.dataset), 2000))  # documents
    with common.bad_input("--tokenizer"):
        tok = data.get_tokenizer(args.tokenizer, sample)
    if args.show:
        text = args.show
        if text == "heldout":
            text = next(data.load_text(args.dataset, "heldout"))[:4000]
        with common.bad_input():
            return show(text, tok, args.block_size)
    with common.bad_input("--dataset"), common.rank_zero_first(run.env):
        needed = args.steps * args.batch_size * args.block_size  # tokens of a stream
        limit = None if data.is_local(args.dataset) else needed
        read = partial(data.token_file, folder=run.out / "tokens")
        train = read(args.dataset, "train", tok, limit=limit)
        heldout = read(args.dataset, "heldout", tok, limit=2**22)  # more than is measured on
        for part in train, heldout:  # a ValueError if it is shorter than a window
            data.windows(part, np.random.default_rng(0), 1, args.block_size + 1)
    source = train, heldout, tok.n_vocab, tok.eos
    found = run.each(partial(train_arm, source), args.arms)
    if found is None:
        return None
    if {"none", "any", "random"} <= set(found):
        judge(run, found)
    draw(run.out / "hapax.png", found, run.out, args.seeds)
    return run.finish(found)


if __name__ == "__main__":
    common.cli(main)
