"""Geometry of self-verification on CountDown (arXiv 2504.14379).

CountDown: make a target from a few numbers, each used once. A model that reinforcement trains on it
with a 0/1 reward ends in one rigid form, in which every attempt closes with a verdict: "(not 42)"
or "(this works)". So the moment of verification is easy to find, and the paper takes it apart from
both ends. From the top: a linear probe on the residual stream at the bracket tells right attempts
from wrong ones, and its direction reads as words of success or failure. From the bottom: attention
heads that look back at the target carry the verdict. With three of them switched off the model
searches on, past its own solution.

The toy: a small GPT imitates searchers of two habits. Most answer with their first attempt,
unchecked; the others check each attempt and go on. GRPO meets this mixture as R1-Zero's recipe
meets a base model; the control is the same run with permuted rewards. What the toy can't show:
search that was not in the mixture, and verification learnt from reward alone (a drill teaches it).

Read on: `evaluate`, `reward` (the task), `advantages`, `Objective` (the method), `Toy` (the world),
`grpo` (the loop), `from_the_top` and `from_the_bottom` (the analysis), `judge` (the claims).
"""

import copy
import hashlib
import itertools
import math
import operator
import random
import re
import time
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import lru_cache
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

import common
import data
import pretrained
from model import GPT, GPTConfig, generate, padded, residuals

# Where the preset for a real model departs from the paper: GRPO in place of PPO, so groups of
# rollouts in place of a critic (32 prompts of 8 are the paper's 256 rollouts a batch); the KL is in
# the loss, not in the reward; there is no entropy bonus (paper: .001).
PAPER = dict(model="Qwen/Qwen2.5-3B", dataset="Jiayi-Pan/Countdown-Tasks-3to4", arms=["grpo"])
PAPER |= dict(rl_steps=300, rl_lr=1e-6, prompts=32, minibatches=4, beta=0.001, format_reward=0.1)
PAPER |= dict(problems=1024, micro_batch=2, eval_every=100, save_every=100)
SMOKE = dict(steps=6, drill=2, batch_size=8, micro_batch=4, n_embd=32, rl_steps=2, prompts=2)
SMOKE |= dict(problems=8, samples=6, eval_every=1, save_every=1, jobs=1)


@dataclass
class Args(common.TrainFlags):
    """CountDown"""

    presets: ClassVar[dict] = {"smoke": SMOKE, "toy": {}, "paper": PAPER}
    limits: ClassVar[dict] = common.TrainFlags.limits | {
        **dict.fromkeys(("drill", "rl_steps", "rl_lr", "beta", "format_reward"), (0,)),
        **dict.fromkeys(("num_max", "cap", "attempts", "n_head", "n_embd", "prompts"), (1,)),
        **dict.fromkeys(("max_new", "minibatches", "problems", "samples"), (1,)),
        **dict(nums=(2, 6), guess=(0, 1), clip_ratio=(0, 1), group=(2,), n_layer=(3,)),
    }
    unused: ClassVar[set] = {"shard", "decay_steps"}
    may_change: ClassVar[set] = common.TrainFlags.may_change | {"rl_steps", "samples", "heads"}

    steps: int = 1200
    batch_size: int = 32
    micro_batch: int = 16
    lr: float = 6e-3
    min_lr: float = 0.03
    weight_decay: float = 0.3
    eval_every: int = 15
    save_every: int = 20
    model: str = ""  # a real checkpoint to train and take apart, in place of the toy
    dataset: str = ""  # --model: file:X.jsonl or a `datasets` id; rows of nums and target
    max_new: int = 1024  # --model: longest response, in tokens (paper: 1024)
    nums: list[int] = common.default_list(3)  # toy: numbers in a problem (paper: 3 4)
    num_max: int = 8  # toy: numbers are 1 to this (paper: 99)
    cap: int = 40  # toy: all values are 0 to this (paper: targets of 10 to 100)
    attempts: int = 8  # toy: most attempts in a trace
    guess: float = 0.85  # toy: share of traces with one attempt, unchecked
    drill: int = 500  # toy: the first of --steps, which teach sums and verdicts
    n_layer: int = 4  # toy: blocks
    n_head: int = 8  # toy: heads; they share two heads of keys and values
    n_embd: int = 64  # toy: width
    arms: list[str] = common.default_list("grpo", "permuted")  # the control permutes rewards
    rl_steps: int = 60  # batches of rollouts; 0 is no GRPO (paper: 300)
    rl_lr: float = 2e-4  # learning rate of GRPO, constant (paper: 1e-6)
    prompts: int = 16  # prompts in a batch, over all ranks (paper: 256)
    group: int = 8  # rollouts of a prompt (paper: 1, with a critic)
    minibatches: int = 1  # updates on a batch; at 1 nothing is clipped (paper: 4)
    clip_ratio: float = 0.2  # no gradient from ratios further than this from 1
    beta: float = 0.0  # weight of the KL to the model before GRPO (paper: .001)
    format_reward: float = 0.0  # reward of a wrong answer (paper: .1)
    problems: int = 400  # most held-out problems in an evaluation
    samples: int = 300  # most steps of each verdict to choose on, and to test on (paper: 300)
    heads: list[str] = common.default_list()  # switch these off, as L17H11, not the three found


# -------------------------------------------------------------------------------------- the task

APPLY = {"+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.truediv}


def evaluate(text):
    """The exact value of an arithmetic expression, a Fraction, and the whole numbers in it.

    Nothing that a model writes is run as code. The grammar has no `**`, `//` or decimals:
        expression = term {+- term}, term = factor {*/ factor}, factor = [-] (number | (expression))
    Raises ValueError, also beyond 200 characters, 32 levels of brackets, 6 digits.
    """
    if len(text) > 200:
        raise ValueError("longer than 200 characters")
    tokens = re.findall(r"[0-9]+|\S", text)[::-1]  # the next one is the last
    numbers = []

    def chain(ops, part, depth):
        value = part(depth)
        while tokens and tokens[-1] in ops:
            op = tokens.pop()
            other = part(depth)
            if op == "/" and other == 0:
                raise ValueError("division by zero")
            value = APPLY[op](value, other)
        return value

    def term(depth):
        return chain("*/", factor, depth)

    def factor(depth):
        token = tokens.pop() if tokens else "the end"
        if token == "-" and tokens and tokens[-1] != "-":
            return -factor(depth)
        if token == "(" and depth < 32:
            value = chain("+-", term, depth + 1)
            if not tokens or tokens.pop() != ")":
                raise ValueError("a bracket is not closed")
            return value
        if not re.fullmatch("0|[1-9][0-9]{0,5}", token):
            raise ValueError(f"{token[:9]} where a number is due")
        numbers.append(int(token))
        return Fraction(token)

    value = chain("+-", term, 0)
    if tokens:
        raise ValueError(f"{tokens[-1][:9]} after the end")
    return value, numbers


def reward(response, nums, target, format_reward=0.0):
    """1 for a right answer, `format_reward` for a wrong one, 0 for none. The last one counts."""
    start = response.rfind("<answer>")
    end = response.find("</answer>", start)
    if start < 0 or end < 0:
        return 0.0
    try:
        value, used = evaluate(response[start + len("<answer>") : end])
    except ValueError:
        return format_reward
    return 1.0 if value == target and sorted(used) == sorted(nums) else format_reward


@lru_cache(128)
def attempts(nums, cap):
    """All attempts on a tuple of numbers by + - *, from left to right, every value in 0 to cap.

    An attempt uses each number once: ((8, "*", 3, 24), (24, "-", 7, 17)).
    """
    found = []
    for order in sorted(set(itertools.permutations(nums))):
        for ops in itertools.product("+-*", repeat=len(nums) - 1):
            steps = []
            value = order[0]
            for op, b in zip(ops, order[1:]):
                steps.append((value, op, b, APPLY[op](value, b)))
                value = steps[-1][-1]
            if all(0 <= step[-1] <= cap for step in steps):
                found.append(tuple(steps))
    return found


def bracketed(steps):
    """The expression of an attempt: ( 8 * 3 ) - 7."""
    text = str(steps[0][0])
    for i, (_, op, b, _) in enumerate(steps):
        text = f"( {text} ) {op} {b}" if i else f"{text} {op} {b}"
    return text


# ------------------------------------------------------------------------------------ the method


def advantages(rewards, group):
    """A_i = (r_i - mean r) / (std r + 1e-4) within each group of consecutive rewards (N,).

    The std is the sample's (ddof 1). A group of one reward says nothing: exactly 0.
    """
    r = rewards.view(-1, group)
    differ = (r != r[:, :1]).any(1, keepdim=True)
    return ((r - r.mean(1, keepdim=True)) / (r.std(1, keepdim=True) + 1e-4) * differ).flatten()


def clipped_gain(ratio, advantage, clip):
    """min(rho A, clip(rho, 1 - clip, 1 + clip) A): no gain, so no gradient, beyond the clip."""
    return torch.minimum(ratio * advantage, ratio.clamp(1 - clip, 1 + clip) * advantage)


def divergence(logp, reference):
    """(log policy - log reference)^2 / 2 of sampled tokens, as an estimate of their KL.

    The mean of its gradient over samples of the policy is the gradient of KL(policy || reference).
    """
    return (logp - reference) ** 2 / 2


def trimmed(idx, targets):
    """A batch (B, T) without the last columns in which every row is padding."""
    n = int((targets != -100).any(0).nonzero().max()) + 1
    return idx[:, :n], targets[:, :n]


def log_probs(model, idx, targets):
    """Log-probabilities (n,) of the n targets of a batch (B, T) that are not -100."""
    idx, targets = trimmed(idx, targets)
    here = targets != -100
    logits = model.unembed(model.hidden(idx)[here]).float()
    return -F.cross_entropy(logits, targets[here], reduction="none")


class Objective(torch.nn.Module):
    """The loss of GRPO around a policy; a module, so that DDP can wrap it."""

    def __init__(self, policy, args):
        super().__init__()
        self.policy, self.args = policy, args

    def forward(self, idx, targets, advantage, old=None, reference=None, denom=1.0):
        """-sum_t [min(rho_t A, clip(rho_t) A) - beta KL_t] / denom, t all tokens of all responses.

        idx, targets    (B, T), padded on the right; targets are -100 but at the responses
        advantage       (B,): every token of a response has its response's
        old, reference  (B, T) log-probabilities: of the policy that drew the batch (None: this
                        one, so rho = 1), and of the model before GRPO (None: no KL)
        """
        here = targets != -100
        logp = log_probs(self.policy, idx, targets)
        ratio = torch.exp(logp - (logp.detach() if old is None else old[here]))
        response = here.nonzero()[:, 0]  # the row of each token
        gain = clipped_gain(ratio, advantage[response], self.args.clip_ratio)
        if reference is not None:
            gain = gain - self.args.beta * divergence(logp, reference[here])
        return -gain.sum() / denom


# ------------------------------------------------------------------------------------- the world

VALID = "this", "yes", "correct", "success"
INVALID = "not", "no", "wrong", "false"
WORDS = "<bos> <eos> use make <think> </think> <answer> </answer> + - * = , ( ) [ ] works".split()


class Toy:
    """Problems, tokens, traces. A number is one token. A prompt and its trace:

        <bos> use 3 8 7 make 31 <think>
        8 * 3 = 24 , 24 - 7 = 17 [ not 31 ]
        8 * 3 = 24 , 24 + 7 = 31 [ this works ]
        </think> <answer> ( 8 * 3 ) + 7 </answer> <eos>

    The verdict's bracket is square, the answer's round: Qwen's tokens of the two differ as well.
    """

    def __init__(self, args, seed):
        self.args, self.seed = args, seed
        self.n_numbers = max(args.cap, args.num_max) + 1
        self.words = [str(n) for n in range(self.n_numbers)] + WORDS + ["\n", *VALID, *INVALID]
        self.id = {word: i for i, word in enumerate(self.words)}
        self.bracket, self.stops = self.id["["], [self.id["<eos>"]]
        self.valid = self.success = [self.id[word] for word in VALID]
        self.invalid = self.failure = [self.id[word] for word in INVALID]
        self.max_new = args.attempts * (6 * max(args.nums) - 2) + 3 * max(args.nums) + 3
        self.train, self.heldout = [], []
        for n in args.nums:
            for nums in itertools.combinations_with_replacement(range(1, args.num_max + 1), n):
                for target in sorted({steps[-1][-1] for steps in attempts(nums, args.cap)} - {0}):
                    digest = hashlib.sha256(repr((nums, target)).encode()).digest()
                    held = digest[0] < 51  # a fifth, the same for every seed
                    (self.heldout if held else self.train).append((nums, target))
        if not self.train or not self.heldout:
            raise ValueError("--nums, --num-max and --cap leave too few problems")
        random.Random(0).shuffle(self.heldout)

    def encode(self, text):
        return [self.id[word] for word in re.findall(r"\n|[^ \n]+", text)]

    def decode(self, ids):
        return " ".join(self.words[i] for i in ids)

    def spans(self, ids):
        """[(first, last, value)] of the numbers in a sequence: each is one token."""
        return [(i, i, token) for i, token in enumerate(ids) if token < self.n_numbers]

    def prompt(self, nums, target, rng):
        """Ids of a prompt: numbers in any order, target first or last: it has no fixed place."""
        use = f"use {' '.join(map(str, rng.sample(nums, len(nums))))}"
        make = f"make {target}"
        order = [use, make] if rng.random() < 0.5 else [make, use]
        return self.encode(f"<bos> {' '.join(order)} <think>")

    def line(self, steps, target, rng, checks=True):
        """An attempt, with a verdict; three in ten verdicts are synonyms of `this works` or `not`,
        so that a direction can read as words."""
        text = " , ".join(f"{a} {op} {b} = {value}" for a, op, b, value in steps)
        synonym = rng.random() < 0.3
        if steps[-1][-1] == target:
            verdict = rng.choice(VALID[1:]) if synonym else "this works"
        else:
            verdict = f"{rng.choice(INVALID[1:]) if synonym else 'not'} {target}"
        return f"{text} [ {verdict} ] \n " if checks else f"{text} \n "

    def written(self, nums, target, rng, checks=True):
        """A searcher's (prompt, response): random attempts, each once, until one works.

        One that does not check answers with its first attempt.
        """
        tries = attempts(nums, self.args.cap)
        text = ""
        for steps in rng.sample(tries, min(len(tries), self.args.attempts)):
            text += self.line(steps, target, rng, checks)
            if steps[-1][-1] == target or not checks:
                text += f"</think> <answer> {bracketed(steps)} </answer> <eos>"
                break
        return self.prompt(nums, target, rng), self.encode(text)

    def drill(self, nums, target, rng):
        """(ids, counts): a prompt and checked attempts, half of them picked to be right.

        Of those only what follows from the rest counts: results, and what is behind a bracket.
        """
        tries = attempts(nums, self.args.cap)
        right = [steps for steps in tries if steps[-1][-1] == target]
        ids = self.prompt(nums, target, rng)
        counts = [False] * len(ids)
        for _ in range(self.args.attempts):
            picked = rng.random() < 0.5
            line = self.encode(self.line(rng.choice(right if picked else tries), target, rng))
            behind = line.index(self.bracket)
            for i, before in enumerate([None, *line[:-1]]):
                counts.append(not picked or i > behind or before == self.id["="])
            ids += line
        return ids, counts

    def batch(self, step):
        """The documents of a step of imitation: one in eight, and early all of them, are drill."""
        rng = random.Random(f"{self.seed} {step}")
        rows = []
        for i in range(self.args.batch_size):
            problem = rng.choice(self.train)
            if step < self.args.drill or i % 8 == 0:
                rows.append(self.drill(*problem, rng))
            else:
                checks = rng.random() >= self.args.guess
                rows.append(counted(*self.written(*problem, rng, checks)))
        rows.sort(key=lambda row: -len(row[0]))  # so that micro-batches can be trimmed
        return collate(rows)


def counted(prompt, response):
    """(ids, counts) of a document whose response counts."""
    return prompt + response, [False] * len(prompt) + [True] * len(response)


def collate(rows):
    """[(ids, counts)] as idx and targets (B, T), padded on the right; -100: does not count."""
    T = max(len(ids) for ids, _ in rows) - 1
    idx = torch.zeros(len(rows), T, dtype=torch.long)
    targets = torch.full_like(idx, -100)
    for i, (ids, counts) in enumerate(rows):
        n = len(ids) - 1
        idx[i, :n] = torch.tensor(ids[:-1])
        targets[i, :n] = torch.tensor(ids[1:]).where(torch.tensor(counts[1:]), -100)
    return {"idx": idx, "targets": targets}


class ToyGPT(GPT):
    """The toy's model, Llama-shaped; in training it leaves out columns of padding."""

    def __init__(self, args, world, seed):
        torch.manual_seed(seed)
        size = 5 + max(args.nums) + world.max_new
        shape = dict(n_layer=args.n_layer, n_head=args.n_head, n_embd=args.n_embd, head_dim=16)
        shape |= dict(n_kv_head=math.gcd(2, args.n_head), d_mlp=2 * args.n_embd)
        llama = dict(norm="rms", gated=True, act="silu")
        llama |= dict(qkv_bias=False, attn_bias=False, mlp_bias=False)
        super().__init__(GPTConfig(len(world.words), size, **shape, **llama))

    def forward(self, idx, targets=None, *args, **kwargs):
        if targets is not None:
            idx, targets = trimmed(idx, targets)
        return super().forward(idx, targets, *args, **kwargs)


# -------------------------------------------------------------------------------- a real checkpoint

PROMPT = """A conversation between User and Assistant. The Assistant first thinks about the \
reasoning, then answers.
User: Using the numbers {nums}, create an equation that equals {target}. You can use basic \
arithmetic operations (+, -, *, /) and each number can only be used once. Show your work in \
<think> </think> tags, and return the final equation in <answer> </answer> tags, for example \
<answer> (1 + 2) / 3 </answer>.
Assistant: Let me solve this step by step.
<think>"""
SUCCESS = " this", " works", " yes", " correct", " success", " right", " exactly"
FAILURE = " not", " no", " wrong", " false", " incorrect", " failed", " never"


class Real:
    """What Toy is, for a checkpoint: a prompt like TinyZero's, and the checkpoint's own tokens."""

    def __init__(self, args, tok, seed):
        self.tok, self.seed = tok, seed
        self.stops, self.decode = tok.stops, tok.decode
        self.max_new, self.bracket = args.max_new, self.single(" (")
        self.valid, self.invalid = [self.single("this")], [self.single("not")]
        self.success = self.valid + [pretrained.first_token(tok, word) for word in SUCCESS]
        self.failure = self.invalid + [pretrained.first_token(tok, word) for word in FAILURE]
        problems = read_problems(args.dataset)
        held = max(1, min(args.problems, len(problems) // 5))
        self.heldout, self.train = problems[:held], problems[held:]

    def single(self, text):
        """The id of a text that has to be one token."""
        ids = self.tok.encode(text)
        if len(ids) != 1:
            raise ValueError(f"the tokenizer has no single token {text!r}: verdicts can't be found")
        return ids[0]

    def prompt(self, nums, target, rng):
        """Ids of a prompt, with the numbers in any order."""
        text = PROMPT.format(nums=rng.sample(nums, len(nums)), target=target)
        return self.tok.encode(text, bos=True)

    def spans(self, ids):
        """[(first, last, value)] of the numbers: runs of digits, so 62 is not found in 162."""
        found = []
        for i, piece in enumerate(self.decode([token]) for token in ids):
            if re.fullmatch(r"[0-9]+", piece) and found and found[-1][1] == i - 1:
                first, _, value = found.pop()
                found.append((first, i, int(f"{value}{piece}")))
            elif re.fullmatch(r"\s*[0-9]+", piece):
                found.append((i, i, int(piece)))
        return found

    def written(self, nums, target, rng):
        """(prompt, response) of a solver, in the paper's form: wrong attempts, then a right one."""
        tries = attempts(nums, 9999)
        right = [steps for steps in tries if steps[-1][-1] == target]
        chosen = rng.sample(tries, min(len(tries), rng.randint(1, 3)))
        chosen = [steps for steps in chosen if steps not in right] + rng.sample(right, bool(right))
        text = f"\nThe numbers are {list(nums)} and the target is {target}. "
        text += "Let's try different combinations:\n"
        for steps in chosen:
            sides = [bracketed(steps[i:]) for i in range(len(steps))]
            chain = " = ".join(sides).replace("( ", "(").replace(" )", ")")
            verdict = "this works" if steps in right else f"not {target}"
            text += f"- {chain} = {steps[-1][-1]} ({verdict})\n"
        return self.prompt(nums, target, rng), self.tok.encode(text)


def read_problems(name):
    """[(nums, target)] of file:X.jsonl or a `datasets` id. ValueError that names a bad row."""
    if name.startswith("file:"):
        rows = data.read_rows(Path(name[5:]).expanduser(), nums=list, target=int)
    else:
        data.import_or_explain("datasets")
        from datasets import load_dataset

        with data.explained(f"data set {name!r} can't be read", "give file:X.jsonl"):
            rows = load_dataset(name, split="train").select_columns(["nums", "target"]).to_list()
    problems = []
    for i, row in enumerate(rows, 1):
        nums, target = row["nums"], row["target"]
        whole = all(type(n) is int and 0 <= n < 10**6 for n in [*nums, target])
        if not whole or not 2 <= len(nums) <= 5:
            needed = "needs nums, 2 to 5 whole numbers below a million, and target, another"
            raise ValueError(f"{name}, row {i}: {needed}")
        problems.append((tuple(sorted(nums)), target))
    if len(problems) < 2:
        raise ValueError(f"{name} has {len(problems)} problems, needed: 2 and more")
    return problems


# -------------------------------------------------------------------------------------- training


def attempts_in(text):
    """[(equations, first word of the verdict, or "")] of the whole lines of thinking in a response.

    What stands behind the last line break is no whole line: there the response was cut.
    """
    found = []
    for line in text.partition("</think>")[0].split("\n")[:-1]:
        line = line.strip().removeprefix("- ")
        verdict = re.search(r"[\[(]\s*([a-z]+)[^\])]*[\])]$", line)
        equations = line[: verdict.start()] if verdict else line
        if "=" in equations:
            found.append((equations, verdict[1] if verdict else ""))
    return found


def is_right(equations):
    """Whether `8 * 3 = 24 , 24 - 7 = 17` is true, or a chain such as `8 * 3 - 7 = 24 - 7 = 17`."""
    try:
        for equation in equations.split(","):
            if len({evaluate(side)[0] for side in equation.split("=")}) > 1:
                return False
    except ValueError:
        return False
    return True


def measure(model, world, args, env, samples=1, temperature=1.0):
    """What responses to held-out problems are like: the share that is right, attempts in each, the
    shares of all attempts that have a verdict, and right arithmetic; and one as an example."""
    problems = world.heldout[: args.problems]
    rng = random.Random("measure")
    prompts = [world.prompt(*problem, rng) for problem in problems]
    draw = dict(stop=world.stops, seed=0, samples=samples)
    with env.autocast():
        responses = generate(model, prompts, world.max_new, temperature, **draw)
    texts = [world.decode(ids) for ids in responses]
    right = [reward(text, *problems[i // samples]) == 1 for i, text in enumerate(texts)]
    lines = sum(map(attempts_in, texts), [])
    n = max(1, len(lines))
    return {
        "accuracy": np.mean(right),
        "attempts": len(lines) / len(texts),
        "checked": sum(verdict != "" for _, verdict in lines) / n,
        "arithmetic": sum(is_right(equations) for equations, _ in lines) / n,
        "example": f"{world.decode(prompts[0])} {texts[0]}",
    }


def imitate(args, env, log, arm, seed):
    """The toy's model learns to write as the two kinds of searchers do."""
    world = Toy(args, seed)

    def batch(step):
        rows = world.batch(step)
        return {name: value[env.rank :: env.world] for name, value in rows.items()}

    common.train(ToyGPT(args, world, seed), batch, args, env, log)


def load_model(args, env, seed, stage):
    """(model, world): the toy's after the stage "imitate" or "grpo", or --model before or after."""
    if args.model:
        dtype = "fp32" if args.rl_steps else env.dtype
        model, tok = pretrained.load(args.model, env.device, dtype)
        world = Real(args, tok, seed)
    else:
        world = Toy(args, seed)
        model = ToyGPT(args, world, seed).to(env.device)
    if stage != "imitate" or not args.model:
        path = Path(args.out) / f"{stage}-s{seed}.pt"
        with common.rank_zero_first(env):  # which wrote it
            model.load_state_dict(common.load_checkpoint(path)["model"])
    return model, world


def draw_batch(policy, world, args, env, step, permuted=False):
    """The rollouts of a step as a batch for `Objective`, and numbers for the log.

    With `permuted`, the control, rewards go to other rollouts than those that earned them.
    """
    rng = random.Random(f"{world.seed} {step} {env.rank}")
    problems = [rng.choice(world.train) for _ in range(args.prompts // env.world)]
    prompts = [world.prompt(*problem, rng) for problem in problems]
    draw = dict(stop=world.stops, seed=rng.getrandbits(31), samples=args.group)
    with env.autocast():
        responses = generate(policy, prompts, world.max_new, **draw)
    rows, rewards = [], []
    for i, response in enumerate(responses):
        problem = problems[i // args.group]
        rows.append(counted(prompts[i // args.group], response))
        ended = response[-1] in world.stops
        text = world.decode(response) if ended else ""
        rewards.append(reward(text, *problem, args.format_reward))
    if permuted:
        rng.shuffle(rewards)
    advantage = advantages(torch.tensor(rewards), args.group)
    numbers = {"reward": np.mean(rewards), "length": np.mean([len(ids) for ids in responses])}
    return collate(rows) | {"advantage": advantage}, numbers


@torch.no_grad()
def scored(model, batch, args, env):
    """Log-probabilities (B, T) of a batch's responses under a model; 0 elsewhere."""
    found = torch.zeros(batch["idx"].shape)
    size = args.micro_batch or len(found)
    for i in range(0, len(found), size):
        idx, targets = batch["idx"][i : i + size], batch["targets"][i : i + size]
        with env.autocast():
            logp = log_probs(model, idx.to(env.device), targets.to(env.device))
        found[i : i + size][targets != -100] = logp.cpu()
    return found


def minibatches(batch, args, step):
    """The batch in --minibatches random parts of like size, the longest rows of a part first.

    Rows without advantage have no gradient but the KL's. Without it they are left out (all but one,
    so that no part is empty); their tokens still count in the denominator.
    """
    lengths = (batch["targets"] != -100).sum(1)
    order = torch.randperm(len(lengths), generator=torch.Generator().manual_seed(step))
    parts = []
    for i in range(args.minibatches):
        rows = order[i :: args.minibatches]
        denom = lengths[rows].sum()
        if not args.beta:
            useful = batch["advantage"][rows] != 0
            rows = rows[useful] if useful.any() else rows[:1]
        rows = rows[lengths[rows].argsort(descending=True)]
        parts.append({name: value[rows] for name, value in batch.items()} | {"denom": denom})
    return parts


def grpo(policy, world, args, env, log, permuted=False):
    """GRPO in place: a step draws a batch of rollouts and makes --minibatches updates on it.

    Checkpoints lie between steps: a resumed run draws the batches that an uninterrupted one draws.
    """
    args = replace(args, steps=args.rl_steps, lr=args.rl_lr, weight_decay=0.0, compile=False)
    reference = copy.deepcopy(policy) if args.beta else None
    net = common.parallelise(Objective(policy, args), args, env)
    optimizer = common.optimizer(policy, args)
    path = log.path.with_suffix(".pt")
    state = common.begin(path, log, policy, optimizer, args, env)
    bar = dict(total=args.steps, initial=state["step"], leave=False, disable=env.rank > 0)
    steps = range(state["step"], args.steps)
    with common.interruptible() as signals:
        for step in tqdm(steps, log.run, position=common.bar_line(args), **bar):
            row = measure(policy, world, args, env) if step % args.eval_every == 0 else {}
            began = time.perf_counter()
            batch, numbers = draw_batch(policy, world, args, env, step, permuted)
            if args.minibatches > 1:
                batch["old"] = scored(policy, batch, args, env)
            if reference:
                batch["reference"] = scored(reference, batch, args, env)
            for part in minibatches(batch, args, step):
                part["denom"] = common.all_reduce(part["denom"].to(env.device), env)
                loss = common.backward(net, part, args, env)
                norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), args.clip or math.inf)
                common.check_finite(step, loss.item(), norm.item(), path)
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
            state["step"] += 1
            state["tokens"] += int((batch["targets"] != -100).sum()) * env.world
            state["seconds"] += time.perf_counter() - began
            log(step, **row, **numbers, loss=loss.item(), **common.timing(state))
            stop = common.all_reduce(torch.tensor(len(signals), device=env.device), env) > 0
            if stop or state["step"] % args.save_every == 0 or state["step"] == args.steps:
                common.save_state(path, state, policy, optimizer, args, env)
            if stop:
                raise SystemExit(f"{log.run} stopped after step {step}; --resume goes on")
    log(args.steps, **measure(policy, world, args, env), **common.timing(state))


def reinforce(args, env, log, arm, seed):
    """GRPO from the imitator, or from --model; measures before and after."""
    policy, world = load_model(args, env, seed, "imitate")
    found = {}
    for when in "before", "after":
        if when == "after":
            grpo(policy, world, args, env, log, arm == "permuted")
        found[when] = measure(policy, world, args, env, samples=4)
        found[f"greedy_{when}"] = measure(policy, world, args, env, temperature=0.0)["accuracy"]
    return found


# -------------------------------------------------------------------------- moments of verification


@dataclass
class Step:
    """A moment of verification: a prefix that ends at the verdict's bracket, behind the result."""

    ids: list
    valid: bool  # whether the result is the target, as the verdict that follows says
    seen: list  # places of the target's earlier occurrences (the last token of each)
    problem: tuple


def find_steps(world, traces):
    """The Steps of traces [(problem, prompt, response)], but those with a false verdict."""
    steps = []
    for problem, prompt, response in traces:
        ids = prompt + response
        spans = world.spans(ids)
        for first, last, value in spans:
            end = last + 2  # of the prefix, behind the bracket
            if len(prompt) < end < len(ids) and ids[end - 1] == world.bracket:
                valid = value == problem[1]
                if ids[end] in (world.valid if valid else world.invalid):
                    seen = [place for _, place, n in spans if n == problem[1] and place < first]
                    steps.append(Step(ids[:end], valid, seen, problem))
    return steps


def steps_of(model, world, args, seed):
    """(Steps of what the model writes at temperature 1, True).

    Of what a searcher writes, and False, where it gives fewer than ten of either verdict: a real
    model without GRPO is taken to.
    """
    rng = random.Random(f"traces {seed}")
    problems = rng.choices(world.train, k=5 * args.samples)
    if not args.model or args.rl_steps:
        prompts = [world.prompt(*problem, rng) for problem in problems]
        responses = generate(model, prompts, world.max_new, stop=world.stops, seed=seed)
        steps = find_steps(world, zip(problems, prompts, responses))
        valid = sum(step.valid for step in steps)
        if min(valid, len(steps) - valid) >= 10:
            return steps, True
    return find_steps(world, [(p, *world.written(*p, rng)) for p in problems]), False


def halves(steps, samples, rng):
    """Steps to choose on and, of other problems, to test on: up to `samples` of each verdict.

    Both are sorted by length, so that a batch holds little padding.
    """
    problems = sorted({step.problem for step in steps})
    first = set(rng.sample(problems, len(problems) // 2))
    found = []
    for chosen in True, False:
        half = [step for step in steps if (step.problem in first) == chosen]
        valid = [step for step in half if step.valid]
        invalid = [step for step in half if not step.valid]
        n = min(samples, len(valid), len(invalid))
        part = rng.sample(valid, n) + rng.sample(invalid, n)
        found.append(sorted(part, key=lambda step: len(step.ids)))
    return found


def parts(model, steps, copies=1):
    """[(steps, idx, mask)]: so many steps at a time that `copies` of them fit a batch."""
    size = max(1, (64 if model.config.vocab_size < 1000 else 8) // copies)
    found = []
    for i in range(0, len(steps), size):
        some = steps[i : i + size]
        found.append((some, *padded([step.ids for step in some], model.wte.weight.device)))
    return found


def labels(steps):
    """Which steps are valid, bool (N,)."""
    return torch.tensor([step.valid for step in steps])


# ------------------------------------------------------------------------------------ from the top


def stream(model, steps):
    """The residual stream (2, L + 1, N, C), embedding and blocks, at the result and the bracket."""
    found = []
    for _, idx, mask in parts(model, steps):
        found.append(residuals(model, idx, mask, tail=2).float().cpu())
    return torch.cat(found, 1).permute(2, 0, 1, 3)


def probe_accuracy(x, y, x_test, y_test):
    """Of a linear probe on each layer of x (L + 1, N, C): its accuracy on other problems' steps."""
    found = []
    for layer, test in zip(x, x_test):
        w, b = common.fit_probe(layer, y)
        found.append(((test.double() @ w + b > 0) == y_test).double().mean().item())
    return found


def reads_as(model, vectors, k):
    """The k tokens (n, k) that directions (n, C) of the stream say most, unembedded.

    With the final norm's gain, and without the mean token's row, which all have in common.
    """
    rows = model.head.weight.float() * model.final.weight.float()
    return (vectors.to(rows) @ (rows - rows.mean(0)).T).topk(k).indices.cpu()


def verdict_words(model, world, directions, k=4):
    """For directions (n, C): of the k tokens that each says, the share of words of success, and of
    failure for the opposite direction. The smaller of the two, (n,)."""
    success = torch.isin(reads_as(model, directions, k), torch.tensor(world.success))
    failure = torch.isin(reads_as(model, -directions, k), torch.tensor(world.failure))
    return torch.minimum(success.float().mean(1), failure.float().mean(1))


def nearest_neurons(model, directions, k):
    """GLU neurons [(layer, index)] of the upper half: of each layer the k whose output vectors
    are nearest to the layer's direction, of directions (L + 1, C)."""
    found = []
    for layer in range(model.config.n_layer // 2, model.config.n_layer):
        columns = F.normalize(model.blocks[layer].mlp.down.weight.float(), dim=0)
        near = directions[layer + 1].to(columns) @ columns
        found += [(layer, index) for index in near.topk(k).indices.tolist()]
    return found


def from_the_top(model, world, args, choose, test, rng):
    """Probes, the direction between right and wrong, and the GLU neurons along it."""
    y, y_test = labels(choose), labels(test)
    x, x_test = stream(model, choose), stream(model, test)
    shuffled = y[torch.tensor(rng.sample(range(len(y)), len(y)))]
    nets = {"trained": (x, x_test, y), "shuffled labels": (x, x_test, shuffled)}
    if not args.model:
        fresh = ToyGPT(args, world, world.seed + 1).to(model.wte.weight.device)
        nets["random weights"] = stream(fresh, choose), stream(fresh, test), y
    found = {"probe": {}}
    for name, (a, b, seen) in nets.items():
        at_result = probe_accuracy(a[0], seen, b[0], y_test)
        at_bracket = probe_accuracy(a[1], seen, b[1], y_test)
        row = {"at_result": at_result, "at_bracket": at_bracket}
        row |= {"inner": max(at_bracket[1:-1]), "embedding": at_result[0]}
        found["probe"][name] = row
    directions = x[1][:, y].mean(1) - x[1][:, ~y].mean(1)  # (L + 1, C)
    n = model.config.n_embd
    noise = torch.randn(20, n, generator=torch.Generator().manual_seed(world.seed))
    upper = directions[model.config.n_layer // 2 + 1 :]
    reads = verdict_words(model, world, upper)
    found["direction"] = {"reads": reads.max().item()}
    found["noise"] = {"reads": verdict_words(model, world, noise).max().item()}
    best = upper[reads.argmax()][None]
    found["success"] = world.decode(reads_as(model, best, 5)[0].tolist())
    found["failure"] = world.decode(reads_as(model, -best, 5)[0].tolist())
    k = max(1, min(50, model.config.d_mlp // 20))  # 50 of 11,008 in the paper
    return found, nearest_neurons(model, directions, k)


# --------------------------------------------------------------------------------- from the bottom


def target_attention(model, steps):
    """Attention (2, L, H, N) to the target's earlier occurrences, from the result and the bracket.

    And what attention spread evenly would give, (N,).
    """
    sites = [f"blocks.{layer}.attn.pattern" for layer in range(model.config.n_layer)]
    found, even = [], []
    for some, idx, mask in parts(model, steps):
        seen = torch.zeros(idx.shape, device=idx.device)
        for row, step in zip(seen, some):
            row[[place - len(step.ids) for place in step.seen]] = 1  # the padding is on the left
            even.append(len(step.seen) / len(step.ids))
        patterns = model.capture(idx, sites, mask)
        mass = [(patterns[site][:, :, -2:] * seen[:, None, None]).sum(-1) for site in sites]
        found.append(torch.stack(mass).permute(3, 0, 2, 1).float().cpu())
    return torch.cat(found, 3), torch.tensor(even)


def kind_of(token, world):
    """What a model does that says this token at the bracket."""
    if token in world.valid:
        return "says_valid"
    goes_on = re.fullmatch(r"[-+*/=()\[\],\s\d]*", world.decode([token]))
    return "searches_on" if token in world.invalid or goes_on else "unknown"


def switch_off(model, world, steps, neurons, sets):
    """What each of K sets of heads, switched off at all positions, makes of verdicts: K rows of

    says_valid, searches_on (an invalid verdict, or more search), unknown: shares of valid steps
    false_accepts: the share of invalid steps that is called valid
    glu: the mean activation of `neurons` at the bracket of valid steps
    """
    K = len(sets)
    sites = sorted({f"blocks.{layer}.mlp.act" for layer, _ in neurons})
    said, glu = [], []
    for _, idx, mask in parts(model, steps, K):
        with model.patch(common.heads_off(sets, model.config)):
            acts = model.capture(idx.repeat(K, 1), ["final", *sites], mask.repeat(K, 1))
        said.append(model.unembed(acts["final"][:, -1]).argmax(-1).view(K, -1))
        units = [acts[f"blocks.{layer}.mlp.act"][:, -1, index] for layer, index in neurons]
        glu.append(torch.stack(units).float().mean(0).view(K, -1))
    said, glu = torch.cat(said, 1).cpu(), torch.cat(glu, 1).cpu()
    valid = labels(steps)
    rows = []
    for k in range(K):
        kinds = [kind_of(token, world) for token in said[k, valid].tolist()]
        row = {kind: kinds.count(kind) / len(kinds) for kind in KINDS}
        row["false_accepts"] = np.mean([token in world.valid for token in said[k, ~valid].tolist()])
        rows.append(row | {"glu": glu[k, valid].mean().item()})
    return rows


KINDS = "says_valid", "searches_on", "unknown"


def random_heads(heads, config, rng, outside):
    """As many heads, none of them `outside`, from the same layers, or the nearest with one left."""
    free = list(itertools.product(range(config.n_layer), range(config.n_head)))
    free = [head for head in free if head not in outside]
    rng.shuffle(free)
    drawn = []
    for layer, _ in heads[: len(free)]:
        drawn.append(min(free, key=lambda head: abs(head[0] - layer)))
        free.remove(drawn[-1])
    return drawn


def parse_heads(names, shape):
    """[(17, 11)] of ["L17H11"]. ValueError for a head that a model of this shape doesn't have."""
    heads = []
    for name in names:
        match = re.fullmatch(r"L(\d+)H(\d+)", name)
        head = (int(match[1]), int(match[2])) if match else (shape.n_layer, 0)
        if head[0] >= shape.n_layer or head[1] >= shape.n_head:
            most = f"L{shape.n_layer - 1}H{shape.n_head - 1}"
            raise ValueError(f"--heads {name}, allowed: L0H0 to {most}")
        heads.append(head)
    return heads


def from_the_bottom(model, world, args, choose, test, neurons, rng):
    """Heads that look back at the target, chosen on some steps and switched off on others.

    A_prev: those that give it, from the result or the bracket of valid steps, a tenth of their
    attention and three times what even attention would. The three: those without which the GLU
    neurons are least active.
    """
    c = model.config
    mass, even = target_attention(model, choose)
    valid = labels(choose)
    mass = mass[..., valid].mean(-1).amax(0)  # (L, H)
    threshold = max(0.1, 3 * even[valid].mean().item())
    every = itertools.product(range(c.n_layer), range(c.n_head))
    every = sorted(every, key=lambda head: -mass[head])
    prev = [head for head in every if mass[head] > threshold]
    prev = prev if len(prev) >= 3 else every[:3]
    alone = switch_off(model, world, choose, neurons, [[head] for head in prev])
    drive = {head: row["glu"] for head, row in zip(prev, alone)}
    prev.sort(key=drive.get)
    three = parse_heads(args.heads, c) or prev[:3]
    sets = [[], three, prev, random_heads(prev, c, rng, prev)]
    sets += [random_heads(three, c, rng, prev + three) for _ in range(10)]
    rows = switch_off(model, world, test, neurons, sets)
    found = dict(zip(("all_on", "three", "A_prev", "as_many_others"), rows))
    found["random"] = common.mean(rows[4:])
    found["heads"] = [f"L{layer}H{head}" for layer, head in prev]
    curve = switch_off(model, world, test, neurons, [prev[: k + 1] for k in range(len(prev))])
    found["curve"] = [row["says_valid"] for row in curve]
    return found


def dissect(args, env, log, arm, seed):
    """What the paper does to the trained model: the findings, each beside its controls."""
    model, world = load_model(args, env, seed, "grpo" if args.rl_steps else "imitate")
    if env.rank > 0:
        return None
    rng = random.Random(f"dissect {seed}")
    with torch.no_grad(), env.autocast(), model.eager():
        steps, own = steps_of(model, world, args, seed)
        choose, test = halves(steps, args.samples, rng)
        if not choose or not test:
            raise SystemExit("error: too few verdicts of both kinds to take the model apart")
        found, neurons = from_the_top(model, world, args, choose, test, rng)
        found |= from_the_bottom(model, world, args, choose, test, neurons, rng)
    return found | {"own_text": own, "steps": [len(choose), len(test)]}


# ------------------------------------------------------------------------------- claims and figure


def judge(run, found):
    """The paper's claims, each beside the controls that must fail the same criterion."""
    if "grpo" in found and "permuted" in found:
        before = [seed["before"] for seed in found["grpo"]]
        after = [seed["after"] for seed in found["grpo"]]
        controls = {"permuted rewards": [seed["after"] for seed in found["permuted"]]}
        says = "GRPO solves more held-out problems (share right at temperature 1)"
        criterion = "arm.accuracy >= base.accuracy + .2"
        run.claim("C1", says, "0 to about .6", criterion, base=before, arm=after, controls=controls)
        says = "it leaves one form: every attempt is checked (share of attempts)"
        controls["before GRPO"] = before
        paper = "every attempt ends in a verdict"
        run.claim("C2", says, paper, "arm.checked >= .98", arm=after, controls=controls)
    rows = found["dissect"]
    base = [row["all_on"] for row in rows]
    three = [row["three"] for row in rows]
    random_three = {"three random heads": [row["random"] for row in rows]}
    probes = {}
    for net in rows[0]["probe"]:
        probes[net] = [row["probe"][net] for row in rows]
    says = "a probe at the bracket tells right from wrong before the last layer (accuracy)"
    paper = "near 1 from layer 4 of 36"
    criterion = "arm.inner >= .95 and arm.embedding <= .6"
    run.claim("C3", says, paper, criterion, arm=probes.pop("trained"), controls=probes)
    says = (
        "a layer's direction between right and wrong reads as verdicts (share of its top 4 words)"
    )
    paper = "success, yes; not, incorrect"
    noise = {"best of 20 random directions": [row["noise"] for row in rows]}
    directions = [row["direction"] for row in rows]
    run.claim("C4", says, paper, "arm.reads >= .5", arm=directions, controls=noise)
    says = "with three heads off that look back it searches on past its solution (shares of those)"
    paper = "3 of 576 heads: .95 search on"
    criterion = "base.says_valid >= .95 and arm.says_valid <= .3 and arm.searches_on >= .6"
    run.claim("C5", says, paper, criterion, base=base, arm=three, controls=random_three)
    says = "without them GLU units along the direction fall silent, and nothing wrong is accepted"
    criterion = "base.glu > 0 and arm.glu <= .3 * base.glu"
    criterion += " and arm.false_accepts <= base.false_accepts + .05"
    paper = "activations vanish"
    run.claim("C7", says, paper, criterion, base=base, arm=three, controls=random_three)


def draw(path, found, folder, args):
    """Four panels: accuracy and checking during GRPO, probes by layer, heads switched off."""
    curves = {"accuracy": {}, "checked": {}}
    for arm in args.arms if args.rl_steps else []:
        logs = [common.read_log(folder / f"{arm}-s{seed}.jsonl") for seed in args.seeds]
        for measured, lines in curves.items():
            steps = [row["step"] for row in logs[0] if measured in row]
            y = []
            for log in logs:
                y.append([row[measured] for row in log if measured in row])
            lines["GRPO" if arm == "grpo" else "rewards permuted"] = steps, y
    rows = found["dissect"]
    probes = {}
    for net in "trained", "shuffled labels":
        y = [row["probe"][net]["at_bracket"] for row in rows]
        probes[net] = range(len(y[0])), y
    bars = {"says valid": [], "searches on": []}
    for row in rows:
        sets = [row[name] for name in ("all_on", "random", "three", "A_prev")]
        bars["says valid"].append([one["says_valid"] for one in sets])
        bars["searches on"].append([one["searches_on"] for one in sets])
    layers = "after layer (0: embedding)"
    names = "all on", "3 random off", "3 off", "A_prev off"
    panels = [
        dict(title="Held-out accuracy, T = 1", lines=curves["accuracy"], xlabel="step"),
        dict(title="Attempts with a verdict", lines=curves["checked"], xlabel="step"),
        dict(title="Probe at the bracket: is the attempt right?", lines=probes, xlabel=layers),
        dict(title="What follows a solution", bars=bars, names=names),
    ]
    common.panels(path, panels if args.rl_steps else panels[2:])


# -------------------------------------------------------------------------------------------- main


def check(args, env):
    """What is wrong with the flags: (whether it is, what to say)."""
    toy = "steps nums num_max cap attempts guess drill n_layer n_head n_embd".split()
    changed = common.changed_flags(args, toy if args.model else ["dataset", "max_new"])
    mode = "with --model" if args.model else "without --model"
    many = args.minibatches * env.world > args.prompts * args.group
    arms = " ".join(args.arms)
    return [
        (set(args.arms) - {"grpo", "permuted"}, f"--arms {arms}, allowed: grpo permuted"),
        (args.rl_steps and "grpo" not in args.arms, f"--arms {arms} lacks grpo, which is analysed"),
        (args.model and not args.dataset, "--model needs problems: --dataset"),
        (changed, f"{changed} has no effect {mode}"),
        (args.prompts % env.world, f"--prompts {args.prompts} is no multiple of the processes"),
        (many, f"--minibatches {args.minibatches} is more than the rollouts of a batch"),
    ]


def try_out(args, env):
    """ValueError before any long work if checkpoint, problems or heads are no good."""
    if args.model:
        model, tok = pretrained.load(args.model, env.device)  # it goes again: arms load their own
        Real(args, tok, 0)
        parse_heads(args.heads, model.config)
    else:
        Toy(args, 0)
        parse_heads(args.heads, args)


def main(argv=None):
    """The paper end to end; returns what it writes to result.json."""
    run = common.Run(Args, argv, "2504.14379", check)
    args = run.args
    with common.bad_input():
        try_out(args, run.env)
    found = {}
    if not args.model:
        run.each(imitate, ["imitate"])
    if args.rl_steps:
        found |= run.each(reinforce, args.arms) or {}
    found |= run.each(dissect, ["dissect"]) or {}
    if run.env.rank > 0:
        return None
    judge(run, found)
    draw(run.out / "countdown_rl.png", found, run.out, args)
    return run.finish(found)


if __name__ == "__main__":
    common.cli(main)
