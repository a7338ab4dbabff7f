"""Geometry of self-verification on CountDown (arXiv 2504.14379).

CountDown: make a target from a few numbers, each used once. A model that reinforcement trains on it
with a 0/1 reward ends in one rigid form, in which every attempt closes with a verdict: "(not 42)"
or "(this works)". So the moment of verification is easy to find, and the paper takes it apart from
both ends. From the top: a linear probe on the residual stream at the bracket tells right attempts
from wrong ones, and its direction reads as words of success or failure. From the bottom: attention
heads that look back at the target carry the verdict. With three of them switched off the model
searches on, past its own solution.

The toy: a small GPT first imitates searchers of two habits. Most answer with their first attempt,
unchecked; the others check each attempt and go on. GRPO meets this mixture as R1-Zero's recipe
meets a base model. What it makes of the mixture is measured beside the same run with permuted
rewards, and then the model is taken apart. What the toy can't show: search that was not in the
mixture, and verification learnt from reward alone. To compare two numbers is taught by a drill.

Read on: `evaluate`, `reward` (the task), `advantages`, `Objective` (the method), `Toy` (the world),
`grpo` (the loop), `dissect` and what it calls (the analysis), `judge` (the claims).
"""

import copy
import hashlib
import itertools
import math
import operator
import random
import re
import time
from collections import Counter
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import cache
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
# rollouts in place of a critic (32 prompts of 8 are the paper's 256 rollouts a batch); the KL stands
# in the loss, not in the reward; there is no entropy bonus (paper: .001).
PAPER = dict(
    model="Qwen/Qwen2.5-3B", arms=["grpo"], nums=[3, 4], num_max=99, cap=100, problems=1024
)
PAPER |= dict(rl_steps=300, rl_lr=1e-6, prompts=32, minibatches=4, beta=0.001, format_reward=0.1)
PAPER |= dict(micro_batch=2, eval_every=100, save_every=100)


@dataclass
class Args(common.TrainFlags):
    """CountDown"""

    presets: ClassVar[dict] = {
        "smoke": dict(steps=6, drill=2, batch_size=8, micro_batch=4, n_embd=32, rl_steps=2)
        | dict(prompts=2, problems=8, samples=6, eval_every=1, save_every=1, jobs=1),
        "toy": {},
        "paper": PAPER,
    }
    limits: ClassVar[dict] = common.TrainFlags.limits | {
        **dict.fromkeys(
            ("drill", "rl_steps", "rl_lr", "clip_ratio", "beta", "format_reward"), (0,)
        ),
        **dict.fromkeys(("num_max", "cap", "attempts", "n_head", "n_embd", "prompts"), (1,)),
        **dict.fromkeys(("max_new", "minibatches", "problems", "samples"), (1,)),
        **dict(nums=(2, 6), guess=(0, 1), group=(2,), n_layer=(3,)),
    }
    unused: ClassVar[set] = {"shard", "decay_steps"}
    may_change: ClassVar[set] = common.TrainFlags.may_change | {"rl_steps", "samples", "heads"}

    steps: int = 1000
    batch_size: int = 48
    micro_batch: int = 16
    lr: float = 1e-2
    min_lr: float = 0.03
    weight_decay: float = 1.0
    eval_every: int = 15
    save_every: int = 20
    model: str = ""  # a real checkpoint to train and take apart, in place of the toy
    dataset: str = ""  # its problems: file:X.jsonl or a `datasets` id, rows with nums and target
    nums: list[int] = common.default_list(3)  # how many numbers a problem has (paper: 3 4)
    num_max: int = 8  # numbers are 1 to this (paper: 99)
    cap: int = 40  # toy: every value is 0 to this; --model: targets are 10 to this (paper: 100)
    attempts: int = 8  # toy: most attempts in a trace
    guess: float = 0.85  # toy: share of traces that answer with the first attempt, unchecked
    drill: int = 240  # toy: the first of --steps, spent on comparing numbers
    n_layer: int = 4  # toy: blocks
    n_head: int = 8  # toy: attention heads; they share two heads of keys and values
    n_embd: int = 64  # toy: width
    max_new: int = 1024  # --model: longest response, in tokens (paper: 1024)
    arms: list[str] = common.default_list("grpo", "permuted")  # GRPO; its control: permuted rewards
    rl_steps: int = 60  # batches of rollouts; 0 is no GRPO (paper: 300)
    rl_lr: float = 2e-4  # learning rate of GRPO, constant (paper: 1e-6)
    prompts: int = 16  # prompts in a batch of rollouts, over all ranks (paper: 256)
    group: int = 8  # rollouts of a prompt (paper: 1, with a critic)
    minibatches: int = 1  # updates on a batch; 1 is on-policy, without clipping (paper: 4)
    clip_ratio: float = 0.2  # no gradient from ratios that have moved further than this from 1
    beta: float = 0.0  # weight of the KL to the model before GRPO (paper: .001)
    format_reward: float = 0.0  # reward of a wrong answer (paper: .1)
    problems: int = 400  # most held-out problems in an evaluation
    samples: int = 300  # steps of each verdict to choose on, and as many to test on (paper: 300)
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
    """1 for a right answer, `format_reward` for a wrong one, 0 for none: the last <answer> counts."""
    start = response.rfind("<answer>")
    end = response.find("</answer>", start)
    if start < 0 or end < 0:
        return 0.0
    try:
        value, used = evaluate(response[start + len("<answer>") : end])
    except ValueError:
        return format_reward
    return 1.0 if value == target and sorted(used) == sorted(nums) else format_reward


@cache
def attempts(nums, cap):
    """All attempts on a tuple of numbers by + - *, from left to right, every value in 0 to cap.

    An attempt uses each number once: ((8, "*", 3, 24), (24, "-", 7, 17)).
    """
    found = []
    for order in sorted(set(itertools.permutations(nums))):
        for ops in itertools.product("+-*", repeat=len(nums) - 1):
            steps, value = [], order[0]
            for op, b in zip(ops, order[1:]):
                result = APPLY[op](value, b)
                steps.append((value, op, b, result))
                value = result
            if all(0 <= step[-1] <= cap for step in steps):
                found.append(tuple(steps))
    return found


def chance(nums, target, cap, k):
    """The chance to solve a problem by k different random attempts."""
    results = [steps[-1][-1] for steps in attempts(nums, cap)]
    misses = len(results) - results.count(target)
    return 1 - math.comb(misses, k) / math.comb(len(results), k) if k <= len(results) else 1.0


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


def log_probs(model, idx, targets):
    """Log-probabilities (n,) of the n targets of a batch (B, T) that are not -100."""
    idx, targets = trimmed(idx, targets)
    here = targets != -100
    logits = model.unembed(model.hidden(idx)[here]).float()
    return -F.cross_entropy(logits, targets[here], reduction="none")


def trimmed(idx, targets):
    """A batch (B, T) without the last columns in which every row is padding."""
    n = int((targets != -100).any(0).nonzero().max()) + 1
    return idx[:, :n], targets[:, :n]


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
        n = max(args.nums)
        self.max_new = args.attempts * (6 * n - 2) + 3 * n + 3

    def encode(self, text):
        return [self.id[word] for word in re.findall(r"\n|[^ \n]+", text)]

    def decode(self, ids):
        return " ".join(self.words[i] for i in ids)

    def spans(self, ids):
        """[(first, last, value)] of the numbers in a sequence: each is one token."""
        return [(i, i, token) for i, token in enumerate(ids) if token < self.n_numbers]

    def prompt(self, nums, target, rng):
        """Ids of a prompt: numbers in any order, target first or last: it has no fixed place."""
        use, make = " ".join(map(str, rng.sample(nums, len(nums)))), f"make {target}"
        if rng.random() < 0.5:
            return self.encode(f"<bos> use {use} {make} <think>")
        return self.encode(f"<bos> {make} use {use} <think>")

    def verdict(self, right, target, rng):
        """Words of a verdict; three in ten are synonyms, so that a direction can read as words."""
        synonym = rng.random() < 0.3
        if right:
            return rng.choice(VALID[1:]) if synonym else "this works"
        return f"{rng.choice(INVALID[1:]) if synonym else 'not'} {target}"

    def written(self, nums, target, rng, checks=True):
        """A searcher's (prompt, response): random attempts, each once, until one works.

        One that does not check answers with its first attempt.
        """
        tries = attempts(nums, self.args.cap)
        text = ""
        for steps in rng.sample(tries, min(len(tries), self.args.attempts)):
            right = steps[-1][-1] == target
            text += " , ".join(f"{a} {op} {b} = {value}" for a, op, b, value in steps)
            text += f" [ {self.verdict(right, target, rng)} ] \n " if checks else " \n "
            if right or not checks:
                text += f"</think> <answer> {bracketed(steps)} </answer> <eos>"
                break
        return self.prompt(nums, target, rng), self.encode(text)

    def drill(self, nums, target, rng):
        """(ids, counts): a prompt and eight lines `= 17 [ not 31 ]`, where verdicts alone count."""
        ids = self.prompt(nums, target, rng)
        counts = [False] * len(ids)
        for _ in range(8):
            near = min(max(0, target + rng.choice((-2, -1, 1, 2))), self.args.cap)
            other = rng.choice((near, *nums, rng.randint(0, self.args.cap)))
            result = target if rng.random() < 0.5 else other
            verdict = self.encode(f"{self.verdict(result == target, target, rng)} ]")
            ids += self.encode(f"= {result} [") + verdict + self.encode("\n")
            counts += [False] * 3 + [True] * len(verdict) + [False]
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
                prompt, response = self.written(*problem, rng, rng.random() >= self.args.guess)
                rows.append(counted(prompt, response))
        rows.sort(key=lambda row: -len(row[0]))  # so that micro-batches can be trimmed
        return collate(rows)


def counted(prompt, response):
    """(ids, counts) of a document whose response counts."""
    return prompt + response, [False] * len(prompt) + [True] * len(response)


def collate(rows):
    """[(ids, counts)] as idx and targets (B, T), padded on the right; -100 is what doesn't count."""
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
        self.args, self.tok, self.seed = args, tok, seed
        self.stops, self.decode, self.max_new = tok.stops, tok.decode, args.max_new
        self.bracket, *words = [self.single(text) for text in (" (", "this", "not")]
        self.valid, self.invalid = [words[:1], words[1:]]
        self.success = self.valid + [pretrained.first_token(tok, word) for word in SUCCESS]
        self.failure = self.invalid + [pretrained.first_token(tok, word) for word in FAILURE]
        problems = read_problems(args.dataset) if args.dataset else self.random_problems()
        if len(problems) < 2:
            raise ValueError("fewer than two problems: --dataset, or --nums, --num-max and --cap")
        held = max(1, min(args.problems, len(problems) // 5))
        self.heldout, self.train = problems[:held], problems[held:]

    def single(self, text):
        """The id of a text that has to be one token."""
        ids = self.tok.encode(text)
        if len(ids) != 1:
            raise ValueError(f"the tokenizer has no single token {text!r}: verdicts can't be found")
        return ids[0]

    def random_problems(self):
        """Thousands that can be solved from left to right, with targets of 10 to --cap."""
        rng = random.Random(f"problems {self.seed}")
        found = []
        for _ in range(40_000):
            nums = [rng.randint(1, self.args.num_max) for _ in range(rng.choice(self.args.nums))]
            target = nums[0]
            for b in nums[1:]:
                target = APPLY[rng.choice("+-*")](target, b)
            if 10 <= target <= self.args.cap:
                found.append((tuple(sorted(nums)), target))
        return list(dict.fromkeys(found))

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
        right, wrong = [], []
        for steps in attempts(nums, 9999):
            (right if steps[-1][-1] == target else wrong).append(steps)
        chosen = rng.sample(wrong, min(len(wrong), rng.randint(1, 3)))
        chosen += rng.sample(right, min(len(right), 1))
        text = f"\nThe numbers are {list(nums)} and the target is {target}. "
        text += "Let's try different combinations:\n"
        for steps in chosen:
            sides = [bracketed(steps[i:]) for i in range(len(steps))]
            chain = " = ".join(sides).replace("( ", "(").replace(" )", ")")
            verdict = "this works" if steps[-1][-1] == target else f"not {target}"
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
        if not whole or not 2 <= len(nums) <= 6:
            needed = "needs nums, 2 to 6 whole numbers below a million, and target, another"
            raise ValueError(f"{name}, row {i}: {needed}")
        problems.append((tuple(sorted(nums)), target))
    return problems


# ----------------------------------------------------------------------------- what models write


def attempts_in(text):
    """[(equations, first word of the verdict, or "")] of a response, for each line of thinking."""
    found = []
    for line in text.partition("</think>")[0].split("\n"):
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
    lines = [line for text in texts for line in attempts_in(text)]
    n = max(1, len(lines))
    return {
        "accuracy": np.mean(right),
        "attempts": len(lines) / len(texts),
        "checked": sum(verdict != "" for _, verdict in lines) / n,
        "arithmetic": sum(is_right(equations) for equations, _ in lines) / n,
        "example": f"{world.decode(prompts[0])} {texts[0]}",
    }


# -------------------------------------------------------------------------------------- training


def imitate(args, env, log, arm, seed):
    """The toy's model learns to write as the two kinds of searchers do."""
    world = Toy(args, seed)

    def batch(step):
        rows = world.batch(step)
        denom = (rows["targets"] != -100).sum()
        return {k: v[env.rank :: env.world] for k, v in rows.items()} | {"denom": denom}

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
        nums, target = problems[i // args.group]
        rows.append(counted(prompts[i // args.group], response))
        rewards.append(0.0)
        if response[-1] in world.stops:
            rewards[-1] = reward(world.decode(response), nums, target, args.format_reward)
    if permuted:
        rng.shuffle(rewards)
    advantage = advantages(torch.tensor(rewards), args.group)
    numbers = {"reward": np.mean(rewards), "length": np.mean([len(ids) for ids in responses])}
    numbers["no_advantage"] = (advantage == 0).double().mean().item()
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
    state = {"step": 0, "seconds": 0.0, "tokens": 0}
    if args.resume and path.exists():
        with common.bad_input():
            state = common.restore(path, policy, optimizer, args)
    elif env.rank == 0:
        path.unlink(missing_ok=True)  # of an earlier run: not to be resumed by mistake
    log.rewind(state["step"])
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
                flags = {"flags": common.shaping_flags(args)}
                whole = state | common.weights_of(policy, optimizer) | flags
                common.save_checkpoint(path, whole, env)
            if stop and state["step"] < args.steps:
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
    rng.shuffle(problems)
    first = set(problems[::2])
    found = []
    for part in (
        [s for s in steps if s.problem in first],
        [s for s in steps if s.problem not in first],
    ):
        valid = [step for step in part if step.valid]
        invalid = [step for step in part if not step.valid]
        n = min(samples, len(valid), len(invalid))
        chosen = rng.sample(valid, n) + rng.sample(invalid, n)
        found.append(sorted(chosen, key=lambda step: len(step.ids)))
    return found


def parts(model, steps, copies=1):
    """[(steps, idx, mask)]: so many steps at a time that `copies` of them fit a batch."""
    size = max(1, (512 if model.config.vocab_size < 1000 else 8) // copies)
    found = []
    for i in range(0, len(steps), size):
        some = steps[i : i + size]
        found.append((some, *padded([step.ids for step in some], model.wte.weight.device)))
    return found


def labels(steps):
    """Which steps are valid, bool (N,)."""
    return torch.tensor([step.valid for step in steps])


# --------------------------------------------------------------------------------------- dissection


def stream(model, steps):
    """The residual stream (2, L + 1, N, C), embedding and blocks, at the result and the bracket."""
    found = [
        residuals(model, idx, mask, tail=2).float().cpu() for _, idx, mask in parts(model, steps)
    ]
    return torch.cat(found, 1).permute(2, 0, 1, 3)


def probe_accuracy(x, y, x_test, y_test):
    """Accuracy on steps of unseen problems of a linear probe on each layer of x (L + 1, N, C)."""
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
    said, glu, valid = torch.cat(said, 1).cpu(), torch.cat(glu, 1).cpu(), labels(steps)
    rows = []
    for k in range(K):
        kinds = Counter(kind_of(token, world) for token in said[k, valid].tolist())
        row = {kind: kinds[kind] / sum(valid) for kind in ("says_valid", "searches_on", "unknown")}
        row["false_accepts"] = np.mean([token in world.valid for token in said[k, ~valid].tolist()])
        rows.append(row | {"glu": glu[k, valid].mean().item()})
    return rows


def random_heads(heads, config, rng, outside):
    """As many heads, none of them `outside`, from the same layers, or the nearest with one left."""
    free = [(l, h) for l in range(config.n_layer) for h in range(config.n_head)]
    free = [head for head in free if head not in outside]
    rng.shuffle(free)
    drawn = []
    for layer, _ in heads[: len(free)]:
        drawn.append(min(free, key=lambda head: abs(head[0] - layer)))
        free.remove(drawn[-1])
    return drawn


def dissect(args, env, log, arm, seed):
    """What the paper does to the trained model; each finding beside its controls, as dictionaries."""
    model, world = load_model(args, env, seed, "grpo" if args.rl_steps else "imitate")
    if env.rank > 0:
        return None
    rng, c = random.Random(f"dissect {seed}"), model.config
    with torch.no_grad(), env.autocast(), model.eager():
        steps, own = steps_of(model, world, args, seed)
        choose, test = halves(steps, args.samples, rng)
        if not choose or not test:
            raise SystemExit("error: too few verdicts of both kinds to take the model apart")
        found = {"own_text": own, "steps": [len(choose), len(test)]}
        y, y_test = labels(choose), labels(test)
        x, x_test = stream(model, choose), stream(model, test)

        # from the top: probes, the direction between right and wrong, the neurons along it
        shuffled = y[torch.tensor(rng.sample(range(len(y)), len(y)))]
        nets = {"trained": (x, x_test, y), "shuffled labels": (x, x_test, shuffled)}
        if not args.model:
            fresh = ToyGPT(args, world, seed + 1).to(env.device)
            nets["random weights"] = stream(fresh, choose), stream(fresh, test), y
        found["probe"] = {}
        for name, (a, b, labels_) in nets.items():
            at_result, at_bracket = (probe_accuracy(a[i], labels_, b[i], y_test) for i in (0, 1))
            row = {"at_result": at_result, "at_bracket": at_bracket}
            row |= {"inner": max(at_bracket[1:-1]), "embedding": at_result[0]}
            found["probe"][name] = row
        directions = x[1][:, y].mean(1) - x[1][:, ~y].mean(1)  # (L + 1, C)
        noise = torch.randn(20, c.n_embd, generator=torch.Generator().manual_seed(seed))
        found["direction"] = {"reads": verdict_words(model, world, directions[-1:]).item()}
        found["noise"] = {"reads": verdict_words(model, world, noise).max().item()}
        for name, sign in ("success", 1), ("failure", -1):
            found[name] = world.decode(reads_as(model, sign * directions[-1:], 5)[0].tolist())
        neurons = nearest_neurons(model, directions, max(1, min(50, c.d_mlp // 20)))

        # from the bottom: heads that look back at the target, chosen on one half, tested on the other
        mass, even = target_attention(model, choose)
        mass = mass[..., y].mean(-1).amax(0)  # (L, H)
        threshold = max(0.1, 3 * even[y].mean().item())
        every = sorted(itertools.product(range(c.n_layer), range(c.n_head)), key=lambda h: -mass[h])
        prev = [head for head in every if mass[head] > threshold]
        prev = prev if len(prev) >= 3 else every[:3]
        rows = switch_off(model, world, choose, neurons, [[head] for head in prev])
        drive = {head: row["glu"] for head, row in zip(prev, rows)}
        prev.sort(key=drive.get)
        three = [parse_head(name) for name in args.heads] or prev[:3]
        sets = [[], three, prev, random_heads(prev, c, rng, prev)]
        draws = [random_heads(three, c, rng, prev + three) for _ in range(10)]
        rows = switch_off(model, world, test, neurons, sets + draws)
        names = "all_on", "three", "A_prev", "as_many_others"
        found |= dict(zip(names, rows))
        found["random"] = common.mean(rows[4:])
        found["heads"] = [f"L{l}H{h}" for l, h in prev]
        ks = range(1, min(12, len(prev)) + 1)
        curve = switch_off(model, world, test, neurons, [prev[:k] for k in ks])
        found["curve"] = [row["says_valid"] for row in curve]
    return found


def parse_head(name):
    """(17, 11) of L17H11. ValueError for anything else."""
    match = re.fullmatch(r"L(\d+)H(\d+)", name)
    if not match:
        raise ValueError(f"--heads {name}, allowed: names such as L17H11")
    return int(match[1]), int(match[2])


# ------------------------------------------------------------------------------- claims and figure


def judge(run, found):
    """The paper's claims, each beside the controls that must fail the same criterion."""
    if "grpo" in found and "permuted" in found:
        before, after = [[seed[when] for seed in found["grpo"]] for when in ("before", "after")]
        permuted = [seed["after"] for seed in found["permuted"]]
        run.claim(
            "C1",
            "GRPO solves more held-out problems (share right at temperature 1)",
            "0 to about .6",
            "arm.accuracy >= base.accuracy + .2",
            base=before,
            arm=after,
            controls={"permuted rewards": permuted},
        )
        run.claim(
            "C2",
            "it leaves one form: every attempt is checked (share of attempts)",
            "every attempt ends in a verdict",
            "arm.checked >= .98",
            arm=after,
            controls={"before GRPO": before, "permuted rewards": permuted},
        )
    rows = found["dissect"]
    probes = {name: [row["probe"][name] for row in rows] for name in rows[0]["probe"]}
    three, random_three = [[row[name] for row in rows] for name in ("three", "random")]
    run.claim(
        "C3",
        "a probe at the bracket tells right from wrong before the last layer (accuracy)",
        "near 1 from layer 4 of 36",
        "arm.inner >= .95 and arm.embedding <= .6",
        arm=probes.pop("trained"),
        controls=probes,
    )
    run.claim(
        "C4",
        "the direction between right and wrong reads as verdicts (share of its top 4 words)",
        "success, yes; not, incorrect",
        "arm.reads >= .5",
        arm=[row["direction"] for row in rows],
        controls={"best of 20 random directions": [row["noise"] for row in rows]},
    )
    run.claim(
        "C5",
        "three heads that look back hold the verdict: with them off the model searches on past its "
        "solution (shares of right attempts)",
        "3 of 576 heads: .95 search on",
        "base.says_valid >= .95 and arm.says_valid <= .3 and arm.searches_on >= .6",
        base=[row["all_on"] for row in rows],
        arm=three,
        controls={"three random heads": random_three},
    )
    run.claim(
        "C7",
        "without them GLU units along the direction fall silent, and nothing wrong is accepted",
        "activations vanish",
        "arm.glu <= .3 * base.glu and arm.false_accepts <= base.false_accepts + .05",
        base=[row["all_on"] for row in rows],
        arm=three,
        controls={"three random heads": random_three},
    )


def draw(path, found, folder, args):
    """Four panels: accuracy and checking during GRPO, probes by layer, heads switched off."""
    names = {"grpo": "GRPO", "permuted": "rewards permuted"}
    curves = {"accuracy": {}, "checked": {}}
    for arm, name in names.items():
        logs = [common.read_log(folder / f"{arm}-s{seed}.jsonl") for seed in args.seeds]
        logs = [[row for row in log if "accuracy" in row] for log in logs]
        if all(logs):
            for key, lines in curves.items():
                lines[name] = (
                    [row["step"] for row in logs[0]],
                    [[r[key] for r in log] for log in logs],
                )
    rows = found["dissect"]
    probes = {
        "at the bracket": [row["probe"]["trained"]["at_bracket"] for row in rows],
        "at the result": [row["probe"]["trained"]["at_result"] for row in rows],
        "shuffled labels": [row["probe"]["shuffled labels"]["at_bracket"] for row in rows],
    }
    layers = range(len(probes["at the result"][0]))
    bars = {
        name: [
            [row[sets][kind] for sets in ("all_on", "random", "three", "A_prev")] for row in rows
        ]
        for name, kind in (("valid", "says_valid"), ("searches on", "searches_on"))
    }
    common.panels(
        path,
        [
            dict(title="Held-out accuracy, T = 1", lines=curves["accuracy"], xlabel="step"),
            dict(title="Attempts with a verdict", lines=curves["checked"], xlabel="step"),
            dict(
                title="Probe: is the attempt right?",
                lines={name: (layers, y) for name, y in probes.items()},
                xlabel="after layer (0: embedding)",
            ),
            dict(
                title="What follows a solution",
                bars=bars,
                names=["all on", "3 random off", "3 off", "A_prev off"],
            ),
        ],
    )


# -------------------------------------------------------------------------------------------- main


def check(args, env):
    """What is wrong with the flags: (whether it is, what to say)."""
    usual = Args(**Args.presets[args.preset])
    toy = "steps attempts guess drill n_layer n_head n_embd".split()
    idle = toy if args.model else ["dataset", "max_new"]
    changed = [flag for flag in idle if getattr(args, flag) != getattr(usual, flag)]
    unknown = set(args.arms) - {"grpo", "permuted"}
    return [
        (unknown, f"--arms {' '.join(args.arms)}, allowed: grpo permuted"),
        (
            changed,
            f"{', '.join('--' + f.replace('_', '-') for f in changed)} has no effect "
            + ("with --model" if args.model else "without --model"),
        ),
        (args.prompts % env.world, f"--prompts {args.prompts} is no multiple of the processes"),
        (
            args.minibatches * env.world > args.prompts * args.group,
            f"--minibatches {args.minibatches} is more than the rollouts of a batch",
        ),
        ([parse_head(name) for name in args.heads] and False, ""),
    ]


def main(argv=None):
    """The paper end to end; returns what it writes to result.json."""
    run = common.Run(Args, argv, "2504.14379", check)
    args = run.args
    with common.bad_input():
        if args.model:
            Real(args, pretrained.load(args.model, run.env.device)[1], 0)
        else:
            Toy(args, 0)
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
