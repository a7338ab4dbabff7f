"""Geometry of self-verification on CountDown (arXiv 2504.14379).

CountDown: make a target from a few numbers, each used once. A model trained on it by reinforcement with a 0/1 reward
ends in one rigid format, in which every attempt closes with a verdict: "(not 42)" or "(this works)". That makes the
moment of verification easy to find, and the paper takes it apart from both ends. Top-down: a linear probe on the
residual stream at the bracket separates right from wrong, and the MLP's output vectors nearest to it decode to words of
success or failure. Bottom-up: the attention heads that look back at the target set these vectors off; with three of
them zeroed the model searches on past its own solution.

The toy: a small GPT first imitates searchers of two habits. Most answer with their first attempt unchecked, the others
check each attempt and go on. GRPO meets this mixture as R1-Zero's recipe meets a base model; what it makes of it is
measured, beside the same run with rewards permuted. Then the model is taken apart, each finding beside a control.
It can't show search that was not in the mixture, nor verification learnt from reward alone: comparing two numbers is
taught by a drill before the traces (without one, verdicts stay at chance for as long as a toy can wait).

Tags: [C] the paper's released code, [T] TinyZero, whose recipe it trains with, [I] inferred or ours.
Read on: `evaluate`, `reward` -> `Toy` -> `rollout`, `Policy`, `grpo` -> `analyse` and what it calls -> `judge`.
"""

import copy
import hashlib
import itertools
import json
import math
import operator
import os
import random
import re
from collections import Counter
from dataclasses import dataclass, field, replace
from fractions import Fraction
from functools import cache
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

import legacy as common
from model import GPT, GPTConfig, KVCache, generate, prefill, sample

STAGES = "sft", "grpo", "control", "analysis"


@dataclass
class Args(common.TrainFlags):
    """CountDown"""

    presets: ClassVar[dict] = {
        "smoke": dict(steps=6, drill=2, batch_size=4, n_embd=32, head_dim=4, rl_steps=2, prompts=2)
        | dict(problems=8, samples=12, save_every=2, prev_thresh=0.0, jobs=1, threads=1),
        "toy": dict(steps=1300, batch_size=16, lr=4e-3, min_lr=0.03, jobs=1),
        "paper": dict(model="Qwen/Qwen2.5-3B", stages=["grpo", "analysis"], nums=[3, 4], num_max=99, cap=100)
        | dict(prompts=256, max_new=1024, rl_lr=1e-6, beta=0.001, rl_steps=1200, format_reward=0.1, clip_high=0.2)
        | dict(micro_batch=4, problems=1024, save_every=100, samples=300, steering=20.0, minibatches=4, rank="diag")
        | dict(grad_checkpoint=True, scope="prompt", glu_k=50),
    }
    limits: ClassVar[dict] = dict.fromkeys("prompts rl_steps inner_epochs minibatches samples problems".split(), (1,))
    limits |= dict.fromkeys("n_head n_embd head_dim".split(), (1,)) | {"n_layer": (3,), "guess": (0, 1)}
    limits |= dict.fromkeys("glu_k drill max_new ref_reset".split(), (0,))
    stages: list[str] = field(default_factory=lambda: list(STAGES))
    """of sft grpo control analysis; what is left out is read from --out"""
    model: str = ""
    """a real checkpoint: GRPO from it (no SFT), or analysis alone, on traces that the solver writes"""
    dataset: str = ""
    """problems for --model: a `datasets` id or file:X.jsonl, rows with nums and target [random ones]"""
    nums: list[int] = field(default_factory=lambda: [3])
    """how many numbers a problem has (paper: 3 4)"""
    num_max: int = 8
    """numbers are 1 to this (paper: 99)"""
    cap: int = 40
    """toy: every value in 0 to this; --model: targets 10 to this (paper: 100)"""
    attempts: int = 4
    """toy: most attempts in a trace"""
    guess: float = 0.67
    """toy: share of traces that answer with the first attempt, unchecked"""
    drill: int = 240
    """toy: the first of --steps, spent on comparing numbers"""
    n_layer: int = 4
    """toy: blocks"""
    n_head: int = 8
    """toy: heads"""
    n_embd: int = 64
    """toy: width; twice as many GLU neurons"""
    head_dim: int = 16
    """toy: of a head"""
    rl_steps: int = 44
    """optimizer steps of GRPO, and of its control with permuted rewards (paper: 1200, on 300 batches)"""
    rl_lr: float = 2e-4
    """constant (paper: 1e-6)"""
    prompts: int = 16
    """prompts in a batch of rollouts, over all ranks (paper: 256)"""
    group: int = 8
    """rollouts of a prompt (paper: 1, with PPO)"""
    max_new: int = 0
    """longest response; 0 is what --attempts need (paper: 1024)"""
    format_reward: float = 0.0
    """reward of a wrong answer (TinyZero: .1; under group norm it pays to answer wrongly)"""
    tinyzero_compat: bool = False
    """only the last line of a response is scored, as in TinyZero"""
    use_all: bool = True
    """an answer must use every number; off: none more than once, as TinyZero's prompt has it"""
    adv_norm: Literal["group", "batch", "none"] = "group"
    """divide advantages by the std of the group, of the batch, or not (Dr. GRPO)"""
    loss_agg: Literal["token", "seq", "const"] = "token"
    """mean over tokens (DAPO), over responses of their means (GRPO), or sum / (N L_max) (Dr. GRPO)"""
    clip_low: float = 0.2
    """no gradient from ratios below 1 - this"""
    clip_high: float = 0.28
    """nor above 1 + this (DAPO: .28)"""
    dynamic_sampling: bool = False
    """draw again, up to 4 times, the prompts whose group has one reward (DAPO)"""
    overlong: Literal["zero", "mask", "soft"] = "zero"
    """truncated responses: no reward, no loss, or a penalty that grows over the last eighth of --max-new"""
    beta: float = 0.0
    """weight of the KL to the reference (paper: .001)"""
    kl: Literal["k1", "k2", "k3"] = "k3"
    """its estimator"""
    ref_reset: int = 0
    """steps after which the policy becomes the reference; 0 is never"""
    is_level: Literal["token", "sequence"] = "token"
    """importance ratio of a token, or of the sequence (GSPO)"""
    inner_epochs: int = 1
    """passes over a batch of rollouts"""
    minibatches: int = 1
    """optimizer steps a pass (paper: 4); 1 and 1 is on-policy: no clipping"""
    grad_checkpoint: bool = False
    """recompute blocks in the backward pass"""
    problems: int = 400
    """most held-out problems in an evaluation"""
    samples: int = 150
    """valid, and as many invalid, steps in the analysis (paper: 300)"""
    prev_thresh: float = 0.1
    """mean attention to the target that makes a previous-token head"""
    scope: Literal["all", "prompt"] = "all"
    """occurrences of the target that count: all earlier ones, or the prompt's (paper: prompt)"""
    rank: Literal["mass", "contrast", "effect", "direct", "compose", "diag"] = "effect"
    """order of the heads: by attention, or by how they drive the GLU vectors (paper: diag)"""
    glu_k: int = 0
    """GLU vectors a layer; 0 is 5 % (paper: 50 of 11008)"""
    steering: float = 1.0
    """length of the steering vector, in mean norms of the residual stream (--model: absolute; paper: 20)"""
    heads: list[str] = field(default_factory=list)
    """--model: heads to check without RL, as L17H11 [on 36 layers the paper's three]"""
    neurons: list[str] = field(default_factory=list)
    """--model: GLU neurons to read, as 26:6475 [on 36 layers the paper's]"""


# -------------------------------------------------------------------------------------------- expressions and reward

APPLY = {"+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.truediv}


class BadExpression(ValueError):
    """Why a text is no expression."""


def evaluate(text):
    """(value, ints, number of operations) of an arithmetic expression, exact; raises BadExpression.

    Nothing that a model writes is run: expr = term {+- term}, term = factor {*/ factor}, factor = [-] (int | (expr)),
    at most 200 characters, 32 levels, 6 digits. `**`, `//`, decimals and leading zeros are not in the grammar.
    """
    if len(text) > 200:
        raise BadExpression("longer than 200 characters")
    tokens, ints = re.findall(r"[0-9]+|\S", text)[::-1], []  # the next token is the last

    def factor(depth):
        token = tokens.pop() if tokens else "the end"
        if token == "-" and tokens and tokens[-1] != "-":
            return -factor(depth)
        if token == "(":
            if depth == 32:
                raise BadExpression("nested deeper than 32")
            value = chain("+-", term, depth + 1)
            if not tokens or tokens.pop() != ")":
                raise BadExpression("a bracket is not closed")
            return value
        if not re.fullmatch("0|[1-9][0-9]{0,5}", token):
            raise BadExpression(f"{token[:9]} where a number is due")
        ints.append(int(token))
        return Fraction(token)

    def chain(ops, part, depth):
        value = part(depth)
        while tokens and tokens[-1] in ops:
            op, other = tokens.pop(), part(depth)
            if op == "/" and not other:
                raise BadExpression("division by zero")
            value = APPLY[op](value, other)
        return value

    term = lambda depth: chain("*/", factor, depth)
    value = chain("+-", term, 0)
    if tokens:
        raise BadExpression(f"{tokens[-1][:9]} after the end")
    return value, ints, len(ints) - 1


def reward(response, nums, target, args):
    """1 for the right answer, args.format_reward for another one, 0 for none [T, but exact and without eval]."""
    text = response.rsplit("\n", 1)[-1] if args.tinyzero_compat else response
    answers = re.findall(r"<answer>(.*?)</answer>", text, re.DOTALL)
    if not answers:
        return 0.0
    try:
        value, ints, _ = evaluate(answers[-1].strip())
    except BadExpression:
        return args.format_reward
    fits = sorted(ints) == sorted(nums) if args.use_all else not Counter(ints) - Counter(nums)
    return 1.0 if fits and value == target else args.format_reward


# ------------------------------------------------------------------------------------------------------------- solver


@cache
def attempts(nums, cap):
    """All left-to-right attempts on a tuple of numbers by + - *: [((a, op, b, value), (value, op, c, value), ...)].

    Each number once, in any order, every value in 0..cap.
    """
    out = []

    def extend(value, rest, steps):
        if not rest:
            out.append(tuple(steps))
        for b in sorted(set(rest)):
            left = list(rest)
            left.remove(b)
            for op in "+-*" if value is not None else "":
                if 0 <= (result := APPLY[op](value, b)) <= cap:
                    extend(result, left, [*steps, (value, op, b, result)])
            if value is None:
                extend(b, left, steps)

    extend(None, list(nums), [])
    return out


def expressions(values):
    """Every (value, text) that joins all of [(Fraction, text), ...]: a pair becomes one, in six ways; then recurse."""
    if len(values) == 1:
        yield values[0]
    for i, j in itertools.combinations(range(len(values)), 2):
        rest = [v for k, v in enumerate(values) if k not in (i, j)]
        ways = [(op, values[i], values[j]) for op in APPLY] + [(op, values[j], values[i]) for op in "-/"]
        for op, (a, x), (b, y) in ways:
            if op != "/" or b:
                yield from expressions([*rest, (APPLY[op](a, b), f"({x} {op} {y})")])


@cache
def reachable(nums):
    """{value: an expression} of all that a sorted tuple of numbers can make, each used once: the full solver."""
    return dict(expressions([(Fraction(n), str(n)) for n in nums]))


def baselines(problems, cap, k):
    """Mean chance to hit within k attempts without replacement: random ones; random first steps, then the best."""
    miss = lambda n, hits: math.comb(n - hits, k) / math.comb(n, k) if n >= k else float(not hits)
    rates = []
    for nums, target in problems:
        tries = attempts(nums, cap)
        hits = [t for t in tries if t[-1][-1] == target]
        firsts = [len({t[:-1] for t in part}) for part in (tries, hits)]
        rates.append((1 - miss(len(tries), len(hits)), 1 - miss(*firsts)))
    return np.mean(rates, 0).tolist()


# ------------------------------------------------------------------------------------------------------ the toy world

VALID, INVALID = ("this", "yes", "correct", "success"), ("not", "no", "wrong", "false")
WORDS = "<pad> <bos> <eos> use make <think> </think> <answer> </answer> + - * = , ( ) [ ] works".split()


class Toy:
    """Problems, tokens, traces. A number is one token; a trace is `<bos> use 3 8 7 make 31 <think>` and then lines

        8 * 3 = 24 , 24 - 7 = 17 [ not 31 ]
        8 * 3 = 24 , 24 + 7 = 31 [ this works ]
        </think> <answer> ( 8 * 3 ) + 7 </answer> <eos>

    The verdict's bracket is square because the answer's is round; in Qwen's tokens the two differ as well: " (", "(".
    """

    def __init__(self, args, seed):
        self.args, self.seed, self.numbers = args, seed, max(args.cap, args.num_max) + 1
        self.words = [str(n) for n in range(self.numbers)] + WORDS + ["\n", *VALID, *INVALID]
        self.id = {word: i for i, word in enumerate(self.words)}
        self.pad, self.paren, self.stops = self.id["<pad>"], self.id["["], [self.id["<eos>"]]
        self.valid, self.invalid = ([self.id[w] for w in words] for words in (VALID, INVALID))
        sets = [s for n in args.nums for s in itertools.combinations_with_replacement(range(1, args.num_max + 1), n)]
        every = [(s, t) for s in sets for t in sorted({a[-1][-1] for a in attempts(s, args.cap)} - {0})]
        held = lambda problem: hashlib.sha256(repr(problem).encode()).digest()[0] < 51  # a fifth, whatever the seed
        self.train, self.heldout = [p for p in every if not held(p)], [p for p in every if held(p)]
        if not self.train or not self.heldout:
            raise ValueError(f"--nums {args.nums} --num-max {args.num_max} --cap {args.cap}: too few problems")
        n = max(args.nums)
        self.max_new = args.max_new or args.attempts * (6 * n - 2) + 3 * n + 3
        self.longest = self.max_new + n + 5

    def encode(self, text):
        return [self.id[w] for w in re.findall(r"\n|[^ \n]+", text)]

    def decode(self, ids):
        return " ".join(self.words[i] for i in ids)

    def spans(self, ids):
        """[(first, last, value)] of the numbers in a sequence."""
        return [(i, i, t) for i, t in enumerate(ids) if t < self.numbers]

    def prompt(self, nums, target, rng):
        """Ids of the prompt: numbers in any order, target first or last, so that it has no fixed place."""
        use, make = f"use {' '.join(map(str, rng.sample(nums, len(nums))))}", f"make {target}"
        return self.encode(f"<bos> {use} {make} <think>" if rng.random() < 0.5 else f"<bos> {make} {use} <think>")

    def verdict(self, right, target, rng):
        """Words of a verdict; three in ten are synonyms, which reward can't tell apart but the logit lens can."""
        word = rng.choice((VALID if right else INVALID)[1:]) if rng.random() < 0.3 else None
        return (word or "this works") if right else f"{word or 'not'} {target}"

    def written(self, nums, target, rng, checks=True):
        """A searcher's (prompt ids, response ids): random attempts without replacement, checked until one works."""
        tries, text = attempts(nums, self.args.cap), ""
        for steps in rng.sample(tries, min(len(tries), self.args.attempts)):
            right = steps[-1][-1] == target
            text += " , ".join(f"{a} {op} {b} = {v}" for a, op, b, v in steps)
            text += f" [ {self.verdict(right, target, rng)} ] \n " if checks else " \n "
            if right or not checks:
                text += f"</think> <answer> {bracketed(steps)} </answer> <eos>"
                break
        return self.prompt(nums, target, rng), self.encode(text)

    def drill(self, nums, target, rng):
        """(ids, weights): a prompt and eight verdicts `= y [ not t ]`, loss on the verdicts only."""
        ids = self.prompt(nums, target, rng)
        weights = [0.0] * len(ids)
        for _ in range(8):
            near = min(max(0, target + rng.choice((-2, -1, 1, 2))), self.args.cap)
            y = target if rng.random() < 0.5 else rng.choice((near, *nums, rng.randint(0, self.args.cap)))
            line = self.encode(f"= {y} [ {self.verdict(y == target, target, rng)} ] \n")
            ids, weights = ids + line, weights + [0.0] * 3 + [1.0] * (len(line) - 4) + [0.0]
        return ids, weights

    def batch(self, step):
        """Rows packed with whole documents, for a step of SFT: drill alone, then traces with some drill."""
        args, rng, length = self.args, random.Random(f"{self.seed} {step}"), max(128, self.longest)
        rows, drills = [[] for _ in range(args.batch_size)], 5
        while True:
            problem, drills = rng.choice(self.train), drills - 1
            if step < args.drill or drills >= 0:
                ids, w = self.drill(*problem, rng)
            else:
                prompt, response = self.written(*problem, rng, checks=rng.random() >= args.guess)
                ids, w = prompt + response, [0.0] * len(prompt)
                w += [4.0 if before == self.paren else 1.0 for before in ids[len(w) - 1 : -1]]
            row = next((row for row in rows if sum(len(i) for i, _ in row) + len(ids) <= length), None)
            if row is None:
                break
            row.append((ids, w))
        idx, targets, docs = (torch.zeros(len(rows), length, dtype=torch.long) for _ in range(3))
        weights = torch.zeros(len(rows), length)
        for r, row in enumerate(rows):
            at = 0
            for d, (ids, w) in enumerate(row, 1):
                end = at + len(ids)
                idx[r, at:end], docs[r, at:end] = torch.tensor(ids), d
                targets[r, at : end - 1], weights[r, at : end - 1] = torch.tensor(ids[1:]), torch.tensor(w[1:])
                at = end
        return {"idx": idx, "targets": targets, "weights": weights, "docs": docs}

    def examine(self, problems, texts):
        """What responses look like: accuracy, arithmetic, verdicts, form; problems and texts one for one."""
        n, words, forms, traces = Counter(), Counter(), Counter(), {}
        for (nums, target), text in zip(problems, texts):
            lines = re.findall(r"^ ?([^\[\]<>\n]+?)(?: \[ (\w+)[^\]\n]*\])? $", text.split("</think>")[0], re.MULTILINE)
            ok = bool(lines) and (text.endswith("</answer> <eos>") or len(lines) >= self.args.attempts)
            for line, verdict in lines:
                steps = [re.fullmatch(r"(\d+) ([-+*]) (\d+) = (\d+)", s) for s in line.split(" , ")]
                if not all(steps) or len(steps) != len(nums) - 1:
                    ok = False
                    continue
                true = all(APPLY[op](int(a), int(b)) == int(v) for a, op, b, v in (s.groups() for s in steps))
                n.update(lines=1, arithmetic=true, checked=bool(verdict))
                if verdict:
                    kind, good = ("valid", VALID) if int(steps[-1][4]) == target else ("invalid", INVALID)
                    words[kind, verdict] += 1
                    n.update({kind: 1, f"{kind} seen": verdict in good})
            right = reward(text, nums, target, self.args) == 1
            n.update(traces=1, accuracy=right, attempts=len(lines), wellformed=ok)
            forms[bool(lines) and all(v for _, v in lines)] += 1
            traces.setdefault((nums, target), set()).add(text)
        share = lambda a, b: n[a] / max(1, n[b])
        entropy = lambda c: -sum(v / c.total() * math.log(v / c.total()) for v in c.values())
        kinds = [Counter({w: v for w, v in words.items() if w[0] == kind}) for kind in ("valid", "invalid")]
        out = {k: share(k, "traces") for k in ("accuracy", "attempts", "wellformed")}
        out |= {k: share(k, "lines") for k in ("arithmetic", "checked")}
        out |= {f"recall_{k}": share(f"{k} seen", k) for k in ("valid", "invalid")}
        out |= {"form_entropy": entropy(forms), "word_entropy": sum(map(entropy, kinds)) / 2}
        return out | {"distinct": float(np.mean([len(t) for t in traces.values()]))}


def bracketed(steps):
    """The expression of an attempt: ( 8 * 3 ) + 7."""
    text = str(steps[0][0])
    for i, (_, op, b, _) in enumerate(steps):
        text = f"{text} {op} {b}" if i == 0 else f"( {text} ) {op} {b}"
    return text


def toy_model(args, world, seed):
    """The toy's GPT, Llama-shaped."""
    torch.manual_seed(seed)
    plain = dict(norm="rms", gated=True, act="silu", qkv_bias=False, attn_bias=False, mlp_bias=False)
    sizes = dict(n_layer=args.n_layer, n_head=args.n_head, n_embd=args.n_embd, d_mlp=2 * args.n_embd)
    return Policy(GPTConfig(len(world.words), max(128, world.longest), **sizes, head_dim=args.head_dim, **plain))


# ------------------------------------------------------------------------------------------------------- a real model

PROMPT = """A conversation between User and Assistant. The Assistant first thinks about the reasoning, then answers.
User: Using the numbers {nums}, create an equation that equals {target}. You can use basic arithmetic operations \
(+, -, *, /) and each number can only be used once. Show your work in <think> </think> tags, and return the final \
equation in <answer> </answer> tags, for example <answer> (1 + 2) / 3 </answer>.
Assistant: Let me solve this step by step.
<think>"""
PAPER_HEADS = "L17H11 L17H14 L17H10".split()
PAPER_NEURONS = "26:6475 29:6676 25:1124 27:10388 30:8233 32:5650 32:767 31:10127 30:6404 26:744 23:7356".split()


class Real:
    """What Toy is, for a checkpoint: TinyZero's kind of prompt, its own tokenizer, digits, round brackets."""

    def __init__(self, args, tok, seed):
        self.args, self.tok, self.stops, self.decode, self.seed = args, tok, tok.stops, tok.decode, seed
        self.max_new, self.pad, self.paren = args.max_new or 1024, tok.stops[0], self.single(" (")
        self.valid, self.invalid = [self.single("this")], [self.single("not")]
        problems = read_problems(args.dataset) if args.dataset else self.generate()
        held = max(1, min(args.problems, len(problems) // 5))
        self.heldout, self.train = problems[:held], problems[held:]

    def single(self, text):
        """The id of a text that must be one token."""
        if len(ids := self.tok.encode(text)) != 1:
            raise ValueError(f"the tokenizer of {self.tok.name} has no single token {text!r}, which the analysis needs")
        return ids[0]

    def generate(self, n=4096):
        """n random problems that can be solved, whole targets of 10 to --cap."""
        rng, found = random.Random(f"problems {self.seed}"), {}
        while len(found) < n:
            nums = tuple(rng.randint(1, self.args.num_max) for _ in range(rng.choice(self.args.nums)))
            value = Fraction(nums[0])
            for b in nums[1:]:
                value = APPLY[rng.choice("+-*/")](value, b)
            if value.denominator == 1 and 10 <= value <= self.args.cap:
                found[tuple(sorted(nums)), int(value)] = None
        return list(found)

    def prompt(self, nums, target, rng):
        return self.tok.encode(PROMPT.format(nums=rng.sample(nums, len(nums)), target=target), bos=True)

    def spans(self, ids):
        """[(first, last, value)] of the numbers in a sequence: runs of digits, so 62 is not found in 162 or 620."""
        out = []
        for i, piece in enumerate(self.tok.decode([t]) for t in ids):
            if re.fullmatch(r"\s*[0-9]+", piece):
                if out and out[-1][1] == i - 1 and piece[0].isdigit():
                    out[-1] = (out[-1][0], i, int(f"{out[-1][2]}{piece}"))
                else:
                    out.append((i, i, int(piece)))
        return out

    def written(self, nums, target, rng):
        """(prompt ids, ids of a trace by the solver): wrong attempts and a right one, in the paper's format."""
        tries = attempts(tuple(sorted(nums)), 9999)
        kinds = [[t for t in tries if (t[-1][-1] == target) == right] for right in (False, True)]
        lines = [t for k, n in zip(kinds, (rng.randint(1, 3), 1)) for t in rng.sample(k, min(len(k), n))]
        text = f"\nThe numbers are {list(nums)} and the target is {target}. Let's try different combinations:\n"
        for steps in lines:
            left = [bracketed(steps[i:]).replace("( ", "(").replace(" )", ")") for i in range(len(steps))]
            verdict = "this works" if steps[-1][-1] == target else f"not {target}"
            text += f"- {' = '.join(left)} = {steps[-1][-1]} ({verdict})\n"
        return self.prompt(nums, target, rng), self.tok.encode(text)

    def examine(self, problems, texts):
        """Accuracy of responses."""
        return {"accuracy": float(np.mean([reward(t, *p, self.args) == 1 for p, t in zip(problems, texts)]))}


def read_problems(name):
    """[(nums, target)] of file:X.jsonl or a `datasets` id; ValueError if a problem can't be solved."""
    if name.startswith("file:"):
        rows = common.read_jsonl(Path(name[5:]).expanduser())
    else:
        from datasets import load_dataset

        rows = load_dataset(name, split="train")
    problems = [(tuple(row["nums"]), int(row["target"])) for row in rows]
    for nums, target in problems[:100]:
        if len(nums) < 2 or Fraction(target) not in reachable(tuple(sorted(nums))):
            raise ValueError(f"--dataset {name}: {target} can't be made from {list(nums)}")
    if len(problems) < 2:
        raise ValueError(f"--dataset {name}: no problems, needed: rows with nums and target")
    return problems


# ------------------------------------------------------------------------------------------------------------ rollouts


@torch.no_grad()
def rollout(model, prompts, group, max_new, temperature, stops, seed, dtype=None):
    """`group` responses to each prompt: prefilled once, its keys repeated; finished rows leave every eight tokens.

    Returns lists, prompt by prompt: response ids (the stop id last, if reached), log-probabilities (tensors) of them;
    and the mean entropy of the choices in nats.
    """
    device = model.wte.weight.device
    rng, stop = torch.Generator(device).manual_seed(seed), torch.tensor(stops, device=device)
    kv = KVCache(model.config, len(prompts), max(map(len, prompts)) + max_new, device, dtype or model.wte.weight.dtype)
    with model.eager():
        h = prefill(model, prompts, kv).repeat_interleave(group, 0)
    kv.keep(torch.arange(len(prompts), device=device).repeat_interleave(group))
    out = torch.zeros(len(h), max_new, dtype=torch.long, device=device)
    logps, lengths, rows = out.float(), torch.full_like(out[:, 0], max_new), torch.arange(len(h), device=device)
    entropy, choices = 0.0, 0
    for t in range(max_new):
        logp = (model.unembed(h).float() / (temperature or 1.0)).log_softmax(-1)
        idx = sample(logp, float(temperature > 0), rng=rng)
        out[rows, t], logps[rows, t] = idx[:, 0], logp.gather(1, idx)[:, 0]
        going = lengths[rows] == max_new
        entropy, choices = entropy - ((logp.exp() * logp).sum(-1) * going).sum(), choices + going.sum()
        lengths[rows] = torch.where(torch.isin(idx[:, 0], stop) & going, t + 1, lengths[rows])
        if t % 8 == 7 and t + 1 < max_new:
            keep = (lengths[rows] == max_new).nonzero()[:, 0]
            if not len(keep):
                break
            if len(keep) < len(rows):
                rows, idx = rows[keep], idx[keep]
                kv.keep(keep)
        if t + 1 < max_new:
            with model.eager():
                h = model.hidden(idx, cache=kv)[:, -1]
    cut = lambda table: [row[:n] for row, n in zip(table.cpu(), lengths.tolist())]
    return [ids.tolist() for ids in cut(out)], cut(logps), float(entropy / choices)


def measure(model, world, env, problems, samples=0, seed=0):
    """What `world.examine` finds in greedy responses and in those at temperature 1; or in `samples` of the latter."""
    out, rng = {}, random.Random(seed)
    for name, temperature, n in (("greedy", 0.0, 1), ("sampled", 1.0, 1)) if not samples else (("", 1.0, samples),):
        texts = []
        for i in range(0, len(problems), 256):
            prompts = [world.prompt(*p, rng) for p in problems[i : i + 256]]
            with env.autocast():
                ids, *_ = rollout(model, prompts, n, world.max_new, temperature, world.stops, seed + i, env.dtype)
            texts += [world.decode(r) for r in ids]
        found = world.examine([p for p in problems for _ in range(n)], texts)
        out |= {f"{name}_{k}".removesuffix("_accuracy") if name else k: v for k, v in found.items()}
    return out


# ---------------------------------------------------------------------------------------------------------------- GRPO


def advantages(rewards, group, norm="group"):
    """A_i = (r_i - mean r) / (std r + 1e-4) over each group of consecutive rewards (N,); sample std (ddof 1)."""
    if group < 2:
        raise ValueError(f"--group {group}: the group size must be at least 2")
    r = rewards.view(-1, group)
    a = r - r.mean(1, keepdim=True)
    std = {"group": lambda: r.std(1, keepdim=True) + 1e-4, "batch": lambda: r.std() + 1e-4, "none": lambda: 1.0}
    return (a / std[norm]()).flatten()


def surrogate(ratio, advantage, low, high):
    """min(rho A, clip(rho, 1 - low, 1 + high) A): no gain, so no gradient, beyond the clip."""
    return torch.minimum(ratio * advantage, ratio.clamp(1 - low, 1 + high) * advantage)


def divergence(logp, ref, kind="k3"):
    """KL(policy || reference) estimated from the log-probabilities of sampled tokens; k3 = exp(d) - d - 1 >= 0."""
    d = ref - logp
    return {"k1": -d, "k2": d * d / 2, "k3": d.exp() - d - 1}[kind]


def aggregation(lengths, kind, longest):
    """The loss is the sum of weights (N,) x token losses / denominator, for responses of `lengths` (N,) tokens."""
    n = torch.tensor(float(len(lengths)))
    weights = 1 / lengths.clamp(min=1) if kind == "seq" else torch.ones_like(lengths)
    return weights, {"token": lengths.sum(), "seq": n, "const": n * longest}[kind]


def token_logps(model, h, targets):
    """Log-probabilities (n,) of targets (n,) from hidden states (n, C), in slices of 2^26 logits."""
    f = lambda h, y: model.unembed(h).float().log_softmax(-1).gather(1, y[:, None])[:, 0]
    parts = list(zip(*(t.split(max(256, 2**26 // model.config.vocab_size)) for t in (h, targets))))
    return torch.cat([f(*p) if len(parts) == 1 else checkpoint(f, *p, use_reentrant=False) for p in parts])


class Policy(GPT):
    """A GPT whose forward, given advantages, is the loss of GRPO: what `common.train` needs."""

    def forward(self, idx, targets=None, weights=None, denom=None, advantage=None, old=None, ref=None, **kwargs):
        """-sum w [min(rho A, clip(rho) A) - beta kl] / denom over the tokens with targets (B, T) other than -100.

        advantage, weights: (B,); old, ref: (B, T), the log-probabilities when sampled, and of the reference.
        """
        if advantage is None:
            return super().forward(idx, targets, weights, denom, **kwargs)
        args, rows = self.args, targets != -100
        logp = token_logps(self, self.hidden(idx)[rows], targets[rows])
        row, log_ratio = rows.nonzero()[:, 0], logp - old[rows]
        if args.is_level == "sequence":  # the geometric mean of the tokens' ratios
            sums = torch.zeros(len(idx), device=idx.device).index_add(0, row, log_ratio)
            log_ratio = (sums / rows.sum(1).clamp(min=1))[row]
        gain = surrogate(log_ratio.exp(), advantage[row], args.clip_low, args.clip_high)
        if ref is not None:
            gain = gain - args.beta * divergence(logp, ref[rows], args.kl)
        return -(weights[row] * gain).sum() / denom


def score(world, problem, response, args):
    """The reward of response ids, and what --overlong makes of truncated ones."""
    value = reward(world.decode(response), *problem, args)
    if args.overlong == "soft":
        return value - max(0.0, 8 * len(response) / world.max_new - 7)
    return value if response[-1] in world.stops else 0.0


def draw_rollouts(policy, world, args, env, step, shuffle=False):
    """This rank's rollouts of a step, [(prompt, response, log-probabilities)], with rewards (N,) and choices' entropy.

    With dynamic sampling, groups of one reward are drawn anew, up to four times. `shuffle` permutes the rewards.
    """
    rng, groups = random.Random(f"{world.seed} {step} {env.rank} {shuffle}"), []
    size = max(1, 2**18 // (args.group * world.max_new))  # prompts at once: a large model's cache is large
    for last in (False, False, False, True) if args.dynamic_sampling else (True,):
        problems = [rng.choice(world.train) for _ in range(args.prompts // env.world - len(groups))]
        if not problems:
            break
        prompts, seed, parts = [world.prompt(*p, rng) for p in problems], rng.getrandbits(31), []
        for i in range(0, len(prompts), size):
            part = prompts[i : i + size], args.group, world.max_new, 1.0, world.stops, seed + i, env.dtype
            parts.append(rollout(policy, *part))
        ids, logps = (sum((p[k] for p in parts), []) for k in (0, 1))
        entropy = float(np.mean([p[2] for p in parts]))
        for i, problem in enumerate(problems):
            part = slice(i * args.group, (i + 1) * args.group)
            rewards = [score(world, problem, r, args) for r in ids[part]]
            if last or len(set(rewards)) > 1:
                groups.append(([(prompts[i], r, l) for r, l in zip(ids[part], logps[part])], rewards))
    rewards = [r for _, part in groups for r in part]
    if shuffle:
        rng.shuffle(rewards)
    return [row for part, _ in groups for row in part], torch.tensor(rewards), entropy


def collate(rows):
    """[(prompt, response, log-probabilities)] as right-padded idx, targets (-100 but at responses) and old, (B, T)."""
    T = max(len(p) + len(r) for p, r, _ in rows) - 1
    idx, targets = torch.zeros(len(rows), T).long(), torch.full((len(rows), T), -100)
    old = torch.zeros(len(rows), T)
    for i, (p, r, logp) in enumerate(rows):
        here = slice(len(p) - 1, len(p) + len(r) - 1)
        idx[i, : here.stop], targets[i, here], old[i, here] = torch.tensor([*p, *r][:-1]), torch.tensor(r), logp
    return {"idx": idx, "targets": targets, "old": old}


def grpo(policy, world, args, env, log, shuffle=False, position=0):
    """GRPO in place, by `common.train`: a batch is a set of rollouts with their advantages, or a part of one."""
    ref, kept, store = copy.deepcopy(policy) if args.beta else None, log.path.with_suffix(".ref.pt"), {}
    policy.args, updates = args, args.inner_epochs * args.minibatches
    if not args.resume:
        kept.unlink(missing_ok=True)  # of an earlier run
    if ref and kept.exists():
        ref.load_state_dict(common.load_checkpoint(kept)["model"])

    @torch.no_grad()
    def prepare(step):
        rows, rewards, entropy = draw_rollouts(policy, world, args, env, step, shuffle)
        cut = torch.tensor([r[-1] not in world.stops for _, r, _ in rows])
        keep = ~cut if args.overlong == "mask" else torch.ones_like(cut)
        store.update(collate(rows), advantage=advantages(rewards, args.group, args.adv_norm))
        idx, targets, old = store["idx"], store["targets"], store["old"]
        lengths = (targets != -100).sum(1).float()
        store.update(weights=keep.float(), lengths=lengths * keep)
        same = (rewards.view(-1, args.group).std(1) == 0).float().mean().item()
        row = dict(reward=rewards.mean().item(), entropy=entropy, length=lengths.mean().item(), zero_variance=same)
        if ref:
            store["ref"], size = torch.zeros_like(old), args.micro_batch or len(idx)
            for i in range(0, len(idx), size):
                x, y = (t[i : i + size].to(env.device) for t in (idx, targets))
                on = y != -100
                store["ref"][i : i + size][on.cpu()] = token_logps(ref, ref.hidden(x)[on], y[on]).cpu()
            row["kl"] = divergence(old, store["ref"], "k3").sum().item() / lengths.sum().item()
        log(step, **row)

    def batch(step):
        if step % updates == 0 or not store:
            if ref and args.ref_reset and step and step % args.ref_reset == 0:
                ref.load_state_dict(policy.state_dict())
                common.save_checkpoint(kept, {"model": ref.state_dict()}, env)
            with env.autocast():
                prepare(step)
        order = torch.randperm(len(store["idx"]), generator=torch.Generator().manual_seed(step // args.minibatches))
        part = {k: v[order[step % args.minibatches :: args.minibatches]] for k, v in store.items()}
        weights, denom = aggregation(part.pop("lengths"), args.loss_agg, world.max_new)
        denom = common.all_reduce(denom.to(env.device), env).clamp(min=1)
        return part | {"weights": weights * part["weights"], "denom": denom}

    for block in policy.blocks if args.grad_checkpoint else ():
        block.forward = lambda *x, f=block.forward: checkpoint(f, *x, use_reentrant=False)
    flags = replace(args, steps=args.rl_steps, lr=args.rl_lr, min_lr=1.0, warmup=5, weight_decay=0.0, compile=False)
    flags.eval_every = max(1, args.rl_steps // 4)
    test = lambda step: measure(policy, world, env, world.heldout[: args.problems])
    with policy.eager():  # the lengths of a batch differ from step to step
        common.train(policy, batch, flags, env, log, test, position, unit=updates)


# --------------------------------------------------------------------------------------------------- steps and passes


@dataclass
class Steps:
    """Moments of verification: N prefixes that end at the verdict's bracket, right-padded."""

    ids: torch.Tensor  # (N, T)
    paren: torch.Tensor  # (N,) place of the bracket; the result's last token stands before it
    before: torch.Tensor  # (N,) place of the token before the result
    valid: torch.Tensor  # (N,) bool: the verdict that follows in the trace
    truth: torch.Tensor  # (N,) bool: the written result is the target
    seen: torch.Tensor  # (N, T) bool: last tokens of the target's earlier occurrences
    result: torch.Tensor  # (N,)
    attempt: torch.Tensor  # (N,) which attempt of its trace
    problem: torch.Tensor  # (N,) which trace: a probe's training and test share none
    distractor: torch.Tensor  # (N,) bool: the result is one of the numbers, not the target

    def __getitem__(self, rows):
        return Steps(**{k: v[rows] for k, v in vars(self).items()})

    def __len__(self):
        return len(self.ids)


def find_steps(world, traces, scope="all"):
    """The Steps of traces [((nums, target), prompt ids, response ids)]; ValueError if there is none."""
    rows, verdicts = [], world.valid + world.invalid
    for n, ((nums, target), prompt, response) in enumerate(traces):
        ids, attempt = [*prompt, *response], itertools.count()
        spans = world.spans(ids)
        for first, last, value in spans:
            p = last + 1
            if not len(prompt) < p < len(ids) - 1 or ids[p] != world.paren or ids[p + 1] not in verdicts:
                continue
            seen = [b for _, b, v in spans if v == target and b < (first if scope == "all" else len(prompt))]
            row = dict(paren=p, before=first - 1, valid=ids[p + 1] in world.valid, truth=value == target, result=value)
            row |= dict(attempt=next(attempt), problem=n, distractor=value in nums and value != target)
            rows.append((ids[: p + 1], seen, row))
    if not rows:
        raise ValueError("no attempt with a verdict in any trace")
    ids = torch.full((len(rows), max(len(ids) for ids, *_ in rows)), world.pad)
    seen = torch.zeros_like(ids, dtype=torch.bool)
    for i, (row, places, _) in enumerate(rows):
        ids[i, : len(row)], seen[i, places] = torch.tensor(row), True
    return Steps(ids, seen=seen, **{k: torch.tensor([row[k] for *_, row in rows]) for k in rows[0][2]})


def balanced(steps, n, rng):
    """n valid, then n invalid steps, or as many as there are of both; ValueError if there is none of a kind."""
    found = [(steps.valid == v).nonzero()[:, 0].tolist() for v in (True, False)]
    for rows, kind in zip(found, ("valid", "invalid")):
        if not rows:
            raise ValueError(f"{len(steps)} steps, none of them {kind}: both kinds are needed")
    n = min(n, *map(len, found))
    return steps[torch.tensor(rng.sample(found[0], n) + rng.sample(found[1], n))]


@torch.no_grad()
def run(model, steps, patches=None, read=None, which=None):
    """One pass over the prefixes of `steps`: logits at the bracket (M, V), and {site: what was read}, row by row.

    which    (M,) the step of each row [each once]: one batch holds many configurations
    patches  patches(part, idx) -> {site: fn} for the rows `part` (b,), idx = which[part] their steps
    read     {site: f(x, idx)}
    """
    device, which = model.wte.weight.device, torch.arange(len(steps)) if which is None else which
    order, logits, kept = steps.paren[which].argsort(), [], {site: [] for site in read or {}}
    for part in order.split(256 if model.config.vocab_size < 1000 else 8):  # rows of like length together
        idx = which[part]
        ids, hooks = steps.ids[idx, : int(steps.paren[idx].max()) + 1].to(device), {}
        for site, f in (read or {}).items():
            hooks[site] = lambda x, site=site, f=f, idx=idx: kept[site].append(f(x, idx))
        with model.patch(patches(part, idx) if patches else {}), model.patch(hooks):
            h = model.hidden(ids)
        logits.append(model.unembed(h[torch.arange(len(part)), steps.paren[idx]]).float().cpu())
    back = order.argsort()
    return torch.cat(logits)[back], {site: torch.cat(parts).cpu()[back] for site, parts in kept.items()}


def layers(c, site):
    """The names of a site in every block."""
    return [f"blocks.{l}.{site}" for l in range(c.n_layer)]


def at(place):
    """A reader for `run`: the tensor (b, T, ...) at `place` (N,)."""
    return lambda x, idx: x[torch.arange(len(idx)), place[idx]].float()


def says(logits, world):
    """Of greedy next tokens: 1 a valid verdict, 0 an invalid one, nan neither."""
    top, out = logits.argmax(-1), torch.full((len(logits),), torch.nan)
    for value, ids in (1.0, world.valid), (0.0, world.invalid):
        out[torch.isin(top, torch.tensor(ids))] = value
    return out


def heads_off(sets, c, means=None):
    """Patches for `run` that switch off sets[row], heads [(layer, head), ...], at all positions.

    The head's slice before the output projection is zeroed, or set to its mean (means: a layer's (H, D)): the same as
    taking its output off the stream [C], without a C-vector for every head.
    """
    mask = torch.ones(len(sets), c.n_layer, c.n_head)
    for row, heads in enumerate(sets):
        for layer, head in heads:
            mask[row, layer, head] = 0

    def off(z, m, mean):
        m = m[:, None, :, None].to(z)
        return z * m if mean is None else z * m + (1 - m) * mean.to(z)

    return lambda part, idx: {
        f"blocks.{l}.attn.z": lambda z, l=l: off(z, mask[part, l], means and means[l])
        for l in range(c.n_layer) if not mask[part, l].all()
    }  # fmt: skip


def glu_off(steps, sets):
    """Patches for `run` that zero GLU neurons {layer: indices} at the bracket."""

    def off(x, idx, neurons):
        x = x.clone()
        x[torch.arange(len(idx))[:, None], steps.paren[idx][:, None], neurons[None]] = 0
        return x

    return lambda part, idx: {f"blocks.{l}.mlp.act": lambda x, n=n: off(x, idx, n) for l, n in sets.items()}


def disable(model, world, steps, sets, means=None, read=None):
    """Share of valid verdicts (K,) over `steps` with each of K sets of heads off, in one sweep; and what was read."""
    config, which = torch.arange(len(sets)).repeat_interleave(len(steps)), torch.arange(len(steps)).repeat(len(sets))
    logits, kept = run(model, steps, heads_off([sets[k] for k in config], model.config, means), read, which)
    share = says(logits, world).nan_to_num(0).view(len(sets), -1).mean(1)
    return share, {k: v.unflatten(0, (len(sets), -1)) for k, v in kept.items()}


def random_heads(heads, c, rng, outside):
    """As many heads from the same layers, none of `outside`; where a layer has no more, from the nearest that has."""
    out = []
    for layer, _ in heads:
        free = [(l, h) for l in range(c.n_layer) for h in range(c.n_head) if (l, h) not in [*outside, *out]]
        near = min((abs(l - layer) for l, _ in free), default=0)
        out += [rng.choice([x for x in free if abs(x[0] - layer) == near])] if free else []
    return out


# ------------------------------------------------------------------------------------------------- probes, GLU, heads


def fit_probe(x, y, groups, seed=0, epochs=300):
    """A softmax probe without bias on each x[l] (L, N, C) -> W (L, C, 2) and balanced accuracy (L,) on unseen groups.

    60 % of the groups train, 20 % choose the epoch, 20 % test. W starts at zero: what it starts with stays, as the
    gradients of its columns are opposite [I; in C it starts at N(0, 1 / d)]. Rows are in units of their mean norm.
    """
    for value, name in (False, "invalid"), (True, "valid"):
        if not (y == value).any():
            raise ValueError(f"a probe needs steps of both kinds, there is no {name} one")
    x, names = x / x.norm(dim=-1).mean(1).clamp(min=1e-6)[:, None, None], sorted(set(groups.tolist()))
    random.Random(seed).shuffle(names)
    ends = [0, int(0.6 * len(names)), int(0.8 * len(names)), len(names)]
    train, val, test = (torch.isin(groups, torch.tensor(names[a:b])) for a, b in zip(ends, ends[1:]))
    w = torch.zeros(len(x), x.shape[-1], 2, requires_grad=True)
    best, kept = torch.full((len(x),), torch.inf), torch.zeros_like(w)
    opt = torch.optim.AdamW([w], lr=0.05, betas=(0.9, 0.99), weight_decay=0.01)
    share = torch.where(y, 0.5 / y.float().mean(), 0.5 / (~y).float().mean())  # both kinds count the same

    def loss(rows):
        logp = (x[:, rows] @ w).log_softmax(-1).gather(2, y[rows].long().expand(len(x), -1)[..., None])[..., 0]
        return -(logp * share[rows]).mean(1)

    with torch.enable_grad():
        for _ in range(epochs):
            now = loss(val).detach()
            kept[now < best], best = w.detach()[now < best], torch.minimum(now, best)
            loss(train).sum().backward()
            opt.step()
            opt.zero_grad()
    right = ((x[:, test] @ kept).argmax(-1) == y[test]).float()
    return kept, torch.stack([right[:, y[test] == v].mean(1) for v in (True, False) if (y[test] == v).any()]).mean(0)


def glu_sets(model, W, k, n):
    """Neurons whose output vector (a column of down) is nearest to a probe's direction, by cosine [C].

    Returns {layer: k indices} of the upper half for valid, the same for invalid: the intervention sets; and the n best
    (layer, index) for valid over all probes of the upper half and layers at or below each: the ranking set.
    """
    if k > model.config.d_mlp:
        raise ValueError(f"--glu-k {k} is more than the {model.config.d_mlp} neurons of a layer")
    columns = [F.normalize(b.mlp.down.weight.float().cpu(), dim=0) for b in model.blocks]
    near = lambda layer, probe, label: F.normalize(W[probe + 1, :, label], dim=0) @ columns[layer]  # W[0]: embedding
    upper, best = range(len(columns) // 2, len(columns)), {}
    for layer, probe in ((l, p) for p in upper for l in range(p + 1)):
        for value, index in zip(*(t.tolist() for t in near(layer, probe, 1).topk(k))):
            best[layer, index] = max(value, best.get((layer, index), -1.0))
    valid, invalid = ({l: near(l, l, label).topk(k).indices for l in upper} for label in (1, 0))
    return valid, invalid, sorted(best, key=best.get, reverse=True)[:n]


def lens(model, vectors, k):
    """Top-k token ids (n, k) of vectors (n, C): final norm's gain folded in, the mean unembedding row taken off."""
    rows = model.head.weight.float() * model.final.weight.float()
    return (vectors.float() @ (rows - rows.mean(0)).T).topk(k).indices.cpu()


def ov(block, head):
    """(W_V (C, D), W_O (D, C)) of a head, o = x W_V W_O; grouped-query heads share their V."""
    c = block.attn.config
    v = (c.n_head + c.n_kv_head + head * c.n_kv_head // c.n_head) * c.head_dim
    wo = block.attn.proj.weight.T[head * c.head_dim : (head + 1) * c.head_dim]
    return block.attn.qkv.weight[v : v + c.head_dim].T.float(), wo.float()


def diag_score(wv, wo, gate, up):
    """The released code's score [C], mean over neurons (n, C): SiLU(g . diag(OV)) (u . diag(OV))."""
    diagonal = (wv * wo.T).sum(1)
    return (F.silu(gate @ diagonal) * (up @ diagonal)).mean()


def compose_score(wv, wo, vectors):
    """|OV n| / (|OV| |n|), mean over vectors n (n, C) [I]: sign-free, what is off the diagonal included."""
    whole = ((wv.T @ wv) * (wo @ wo.T)).sum().sqrt()  # |W_V W_O| without the C x C product
    return ((vectors @ wo.T @ wv.T).norm(dim=1) / (whole * vectors.norm(dim=1))).mean()


def rank_heads(model, world, steps, neurons, effect):
    """{ranker: scores (L, H)}: how each head drives the neurons of the ranking set at valid steps.

    diag and compose from weights; direct: fall of the mean activation m_n without the head's own output, at the MLPs
    above it; effect: the fall when it is switched off.
    """
    c, d = model.config, model.config.d_mlp
    scores = {name: torch.zeros(c.n_layer, c.n_head) for name in ("diag", "compose", "direct")}
    index = {l: torch.tensor([i for m, i in neurons if m == l]) for l in sorted({l for l, _ in neurons})}
    gu = {l: [part[i] for part in model.blocks[l].mlp.up.weight.float().split(d)] for l, i in index.items()}
    gate, up = (torch.cat([g[side] for g in gu.values()]) for side in (0, 1))
    norms = {l: copy.deepcopy(model.blocks[l].norm2).float() for l in gu}
    gain = torch.cat([model.blocks[l].norm2.weight.float().expand(len(i), -1) for l, i in index.items()])
    read = [name for site in ("attn.z", "resid_post", "mlp.out") for name in layers(c, site)]
    acts = {k: v.to(gate) for k, v in run(model, steps, read=dict.fromkeys(read, at(steps.paren)))[1].items()}
    for l, h in itertools.product(range(c.n_layer), range(c.n_head)):
        wv, wo = ov(model.blocks[l], h)
        scores["diag"][l, h] = diag_score(wv, wo, gate, up)
        folded = wv * model.blocks[l].norm1.weight.float()[:, None]
        scores["compose"][l, h] = compose_score(folded, wo, torch.cat((gate * gain, up * gain)))
        o = acts[f"blocks.{l}.attn.z"][:, h] @ wo
        for m in (m for m in gu if m >= l):  # the MLP follows the attention in a block
            x, norm = acts[f"blocks.{m}.resid_post"] - acts[f"blocks.{m}.mlp.out"], norms[m]
            on, off = (F.silu(norm(v) @ gu[m][0].T) * (norm(v) @ gu[m][1].T) for v in (x, x - o))
            scores["direct"][l, h] += (on - off).sum(1).mean().cpu() / len(neurons)
    if effect:
        single = [[(l, h)] for l in range(c.n_layer) for h in range(c.n_head)]
        drive = drives(model, world, steps, [[], *single], neurons)
        scores["effect"] = (drive[0] - drive[1:]).view(c.n_layer, c.n_head)
    return scores


def drives(model, world, steps, sets, neurons):
    """Mean activation m_n (K,) of neurons [(layer, index)] at the bracket, with each of K sets of heads off."""
    index = {l: torch.tensor([i for m, i in neurons if m == l]) for l in {l for l, _ in neurons}}
    read = {f"blocks.{l}.mlp.act": lambda x, idx, i=i: at(steps.paren)(x, idx)[:, i].sum(1) for l, i in index.items()}
    return sum(disable(model, world, steps, sets, read=read)[1].values()).mean(1) / len(neurons)


def target_attention(model, steps, place):
    """Attention (L, H, N) from `place` (N,) to the earlier occurrences of the target."""
    row = lambda x, idx: x[torch.arange(len(idx)), :, place[idx]].cpu()  # (b, H, T)
    mass = lambda x, idx: (row(x, idx) * steps.seen[idx, : x.shape[-1]][:, None]).sum(-1)
    sites = layers(model.config, "attn.pattern")
    return torch.stack([t.T for t in run(model, steps, read=dict.fromkeys(sites, mass))[1].values()]).float()


def continued(model, world, steps, make, max_new):
    """Greedy continuations of the prefixes, with the patches make(steps) in force whenever a verdict is due, only then.

    The pass after a bracket is run whole and patched; what follows the verdict comes from a cache of unpatched keys.
    """
    rows = [ids[: p + 1].tolist() for ids, p in zip(steps.ids, steps.paren.tolist())]
    start, going, room = [len(r) for r in rows], range(len(rows)), max_new
    while going and room > 1:
        ids = torch.full((len(going), max(len(rows[i]) for i in going)), world.pad)
        for row, i in zip(ids, going):
            row[: len(rows[i])] = torch.tensor(rows[i])
        now = replace(steps[torch.tensor(list(going))], ids=ids, paren=torch.tensor([len(rows[i]) - 1 for i in going]))
        for i, token in zip(going, run(model, now, make(now))[0].argmax(-1).tolist()):
            rows[i].append(token)
        new = generate(model, [rows[i] for i in going], room - 1, 0.0, stop=[world.paren, *world.stops])
        for i, more in zip(going, new):
            rows[i] += more
        going = [i for i in going if rows[i][-1] == world.paren]
        room = max_new - max((len(rows[i]) - start[i] for i in going), default=0)
    return [row[s:] for row, s in zip(rows, start)]


def classify(world, new):
    """fail: the verdict is valid; partial: it is not, but an answer follows; success: it searches on; or unknown."""
    if new[0] not in world.valid + world.invalid:
        return "unknown"
    return "fail" if new[0] in world.valid else "partial" if "<answer>" in world.decode(new) else "success"


# ------------------------------------------------------------------------------------------------------- the analysis


@torch.no_grad()
def analyse(model, world, steps, args, seed, base=None, fresh=None):
    """What the paper does to the trained model, each with its control: a dict of numbers and lists.

    steps: all that were found; base: the model before RL; fresh: one of random weights, control of the probe.
    """
    rng, c, odd = random.Random(f"analysis {seed}"), model.config, steps[steps.distractor][:200]
    m = {"verdict_is_true": (steps.valid == steps.truth).float().mean().item(), "distractors": len(odd)}
    steps = balanced(steps, args.samples, rng)
    n, y = len(steps) // 2, steps.valid
    good, bad = steps[:n], steps[n:]
    few, name = good[:80], lambda head: f"L{head[0]}H{head[1]}"
    for key, part in ("none_off", good), ("false_accepts_before", bad), ("distractors_accepted", odd):
        m |= {key: says(run(model, part)[0], world).nan_to_num(0).mean().item()} if len(part) else {}

    # probes on the stream at the bracket, at the result, and before it
    sites, places = layers(c, "resid_post"), (steps.paren, steps.paren - 1, steps.before)
    three_places = lambda x, idx: torch.stack([at(p)(x, idx) for p in places], 1)  # (b, 3, C)
    read = dict.fromkeys(["embed", *sites], three_places)
    stream = lambda net: torch.stack([*run(net, steps, read=read)[1].values()])  # (L + 1, N, 3, C)
    x, W = stream(model), None
    onehot = [F.one_hot(t.unique(return_inverse=True)[1]).float() for t in (steps.result, steps.attempt)]
    inputs = {"bracket": x[:, :, 0], "result": x[:, :, 1], "before": x[:, :, 2], "shuffled": x[:, :, 0]}
    inputs |= {"lexical": torch.cat(onehot, 1)[None]} | ({"fresh": stream(fresh)[:, :, 0]} if fresh else {})
    for key, part in inputs.items():
        labels = y[torch.tensor(rng.sample(range(2 * n), 2 * n))] if key == "shuffled" else y
        w, accuracy = fit_probe(part, labels, steps.problem, seed)
        W, m[f"probe_{key}"] = w if W is None else W, accuracy.tolist()
    best = lambda key: max(m[f"probe_{key}"])
    m |= {
        "inner_layer": max(m["probe_bracket"][1:-1]),
        "embedding": m["probe_result"][0],  # the bracket's own is the same in every row
        "before_result": best("before"),
    }
    m |= {"probe_of_shuffled_labels": best("shuffled"), "probe_of_result_and_attempt": best("lexical")}
    m |= {"inner_layer_at_result": max(m["probe_result"][1:-1])} | (
        {"probe_of_random_weights": best("fresh")} if fresh else {}
    )

    # GLU vectors: what they read as, along and against
    k = args.glu_k or max(1, round(0.05 * c.d_mlp))
    glu_valid, glu_invalid, neurons = glu_sets(model, W, k, 200 if args.model else 2 * k)
    free = {l: sorted({*range(c.d_mlp)} - {*glu_valid[l].tolist(), *glu_invalid[l].tolist()}) for l in glu_valid}
    others = lambda size: {l: torch.tensor(rng.sample(free[l], min(size, len(free[l])))) for l in free}
    pairs = lambda sets: [(l, i) for l, some in sets.items() for i in some.tolist()]
    vectors = lambda sets: torch.stack([model.blocks[l].mlp.down.weight[:, i] for l, i in pairs(sets)])
    for kind, sets in (("", (glu_valid, glu_invalid)), ("_random", (others(k),) * 2)):
        for label, chosen, words in zip(("valid", "invalid"), sets, (world.valid, world.invalid)):
            reads = torch.isin(lens(model, vectors(chosen), 3), torch.tensor(words)).any(1)
            m[f"lens_{label}{kind}"] = reads.float().mean().item()
    acts = run(model, steps, read={f"blocks.{l}.mlp.act": at(steps.paren) for l in glu_valid})[1]
    word, m["lens"] = lambda ids: " ".join(repr(world.decode([i])) for i in ids.tolist()), []
    for kind, chosen in (("valid", glu_valid), ("invalid", glu_invalid)):
        for (l, i), along, against in zip(pairs(chosen), *(lens(model, s * vectors(chosen), 5) for s in (1, -1))):
            a = acts[f"blocks.{l}.mlp.act"][:, i]
            row = {"set": kind, "neuron": f"{l}:{i}", "reads": word(along), "antipode": word(against)}
            row |= {"m_valid": a[:n].mean().item(), "m_invalid": a[n:].mean().item()}
            m["lens"].append(row | {"negative": (a < 0).float().mean().item()})

    # heads that look back at the target, in six orders
    mass, bracket = (target_attention(model, steps, place) for place in (steps.paren - 1, steps.paren))
    scores = {"mass": mass[:, :, :n].mean(2), "contrast": mass[:, :, :n].mean(2) - mass[:, :, n:].mean(2)}
    every = list(itertools.product(range(c.n_layer), range(c.n_head)))
    prev = [x for x in every if scores["mass"][x] > args.prev_thresh]
    if not prev:
        most = sorted(every, key=lambda x: -scores["mass"][x])[:5]
        top = ", ".join(f"{name(x)} {scores['mass'][x]:.3f}" for x in most)
        raise ValueError(
            f"no head attends to the target more than --prev-thresh {args.prev_thresh}; the largest: {top}"
        )
    scores |= rank_heads(model, world, few, neurons, len(every) <= 64 or args.rank == "effect")
    order = {r: sorted(prev, key=lambda x, s=s: -s[x].item()) for r, s in scores.items()}
    best = order[args.rank]
    three = best[:3]
    m |= {"prev": [name(x) for x in best], "heads_in_A_prev": len(prev), "heads": []}
    for head in every:
        row = {"head": name(head), "at_bracket": bracket[head][:n].mean().item()}
        m["heads"].append(row | {r: score[head].item() for r, score in scores.items()})

    # switching them off
    off = lambda part, sets, net=model, means=None: disable(net, world, part, sets, means)[0]
    draws = lambda heads, times: [random_heads(heads, c, rng, prev) for _ in range(times)]
    m["counts"] = [k for k in (1, 2, 3, 4, 6, 8, 12) if k <= len(prev)]
    m["curves"] = {r: off(few, [heads[:k] for k in m["counts"]]).tolist() for r, heads in order.items()}
    m["curve_random"] = [off(few[:25], draws(best[:k], 20)).tolist() for k in m["counts"]]
    m["smallest_k_to_.2"] = next((k for k, p in zip(m["counts"], m["curves"][args.rank]) if p <= 0.2), 0)
    m["A_prev_off"], m["3_off"] = off(good, [prev, three]).tolist()
    randoms, same = draws(three, 20), draws(prev, 5)
    m |= {"3_random_off": off(few, randoms).mean().item(), "like_A_prev_random_off": off(few, same).mean().item()}
    m |= {"of_which": len(same[0]), "false_accepts": off(bad, [three]).item()}
    mean = lambda z, idx: torch.stack([row[: p + 1].mean(0) for row, p in zip(z, steps.paren[idx])])
    means = [z.mean(0) for z in run(model, steps, read=dict.fromkeys(layers(c, "attn.z"), mean))[1].values()]
    m["3_at_their_mean"] = off(good, [three], means=means).item()
    drive = drives(model, world, few, [[], three, *randoms], pairs(glu_valid))
    m |= {"fall": (1 - drive[1] / drive[0]).item(), "fall_random_heads": (1 - drive[2:].mean() / drive[0]).item()}
    if base:
        m["base_on"], m["base_off"] = off(few, [[], three], base).tolist()
        outs = [torch.cat([w for b in net.blocks for w in (b.mlp.down.weight.T, b.attn.proj.weight.T)])
                for net in (base, model)]  # fmt: skip
        m["rl_cosine"] = F.cosine_similarity(*outs).mean().item()

    # whole continuations: the paper's table
    both = {l: torch.cat((glu_valid[l], glu_invalid[l])).unique() for l in glu_valid}
    heads = lambda chosen: lambda s: heads_off([chosen] * len(s), c)
    glu = lambda sets: lambda s: glu_off(s, sets)
    makes = {"none": lambda s: None, "GLU valid": glu(glu_valid), "GLU both": glu(both)}
    makes |= {"random GLU": glu(others(2 * k)), "3 random": heads(randoms[0])}
    makes |= {"3 heads": heads(three), "A_prev": heads(prev)}
    room, m["table"] = min(40, c.block_size - steps.ids.shape[1] - 1), {}
    for what, make in makes.items():
        kinds = Counter(classify(world, new) for new in continued(model, world, few, make, room))
        m["table"][what] = {kind: kinds[kind] / len(few) for kind in ("success", "partial", "fail", "unknown")}
        m[f"on_{what.replace(' ', '_')}"] = m["table"][what]["success"]
    size = x[:, :, 0].norm(dim=2).mean(1)
    return m | sufficiency(model, world, good, bad, three, draws(three, 5), W, size, args, rng)


def sufficiency(model, world, good, bad, heads, controls, W, norms, args, rng):
    """Does the verdict follow the heads, and the probe's direction? The shares of invalid steps that are called valid.

    patch: the heads' outputs at result and bracket come from a valid step that wrote the same result, so that they
    bring the target that would make it right, or from any valid step; steered: the valid direction at the bracket.
    """
    c, share = model.config, lambda *of: says(run(model, *of)[0], world).nan_to_num(0).mean().item()
    pairs = [(i, j) for i, r in enumerate(bad.result.tolist()) for j in (good.result == r).nonzero()[:1, 0].tolist()]
    m, takers = {"patch_pairs": len(pairs)}, bad[torch.tensor([i for i, _ in pairs], dtype=torch.long)]
    ends = lambda steps, idx: torch.stack((steps.paren[idx] - 1, steps.paren[idx]), 1)  # result and bracket
    read = lambda z, idx: z[torch.arange(len(idx))[:, None], ends(good, idx)]
    z = list(run(model, good, read=dict.fromkeys(layers(c, "attn.z"), read))[1].values())  # L of (N, 2, H, D)

    def swap(chosen, donors):
        def put(x, idx, l):
            x, own = x.clone(), torch.tensor([h for layer, h in chosen if layer == l])
            rows = torch.arange(len(idx))[:, None, None]
            x[rows, ends(takers, idx)[..., None], own] = z[l][donors[idx]][:, :, own].to(x)
            return x

        return share(takers, lambda part, idx: {
            f"blocks.{l}.attn.z": lambda x, l=l: put(x, idx, l) for l in {l for l, _ in chosen}
        })  # fmt: skip

    if pairs:
        same, any_ = torch.tensor([j for _, j in pairs]), torch.tensor(rng.choices(range(len(good)), k=len(pairs)))
        m |= {"patched": swap(heads, same), "patched_from_any": swap(heads, any_)}
        m["patched_random_heads"] = float(np.mean([swap(chosen, same) for chosen in controls]))

    def steer(direction):
        def add(x, idx, l):
            x, length = x.clone(), args.steering * (1 if args.model else norms[l + 1])
            x[torch.arange(len(idx)), bad.paren[idx]] += (F.normalize(direction(l), dim=0) * length).to(x)
            return x

        late = range(2 * c.n_layer // 3, c.n_layer)
        return share(bad, lambda part, idx: {f"blocks.{l}.resid_post": lambda x, l=l: add(x, idx, l) for l in late})

    noise = torch.Generator().manual_seed(0)
    m["steered"] = steer(lambda l: W[l + 1, :, 1])
    random_ = [steer(lambda l: torch.randn(c.n_embd, generator=noise)) for _ in range(5)]
    return m | {"steered_at_random": float(np.mean(random_))}


@torch.no_grad()
def check_listed(model, world, steps, args, heads, neurons):
    """The cheap check of a checkpoint, which needs no RL: the paper's parts are there before it.

    An attempt is shown up to its result, and the model asked whether it is right: p(Yes) / (p(Yes) + p(No)) with the
    listed heads on, off, and as many random ones of the same layers off. Then what the listed neurons read as.
    """
    rng, m = random.Random(0), {}
    yes, no = ([world.tok.encode(t)[0] for t in (w, f" {w}", w.lower(), f" {w.lower()}")] for w in ("Yes", "No"))
    question = world.tok.encode("\nIs this attempt correct? Answer Yes or No. Answer:")
    for kind, part in (("right", steps[steps.truth][: args.samples]), ("wrong", steps[~steps.truth][: args.samples])):
        rows = [ids[:p].tolist() + question for ids, p in zip(part.ids, part.paren.tolist())]
        ids = torch.tensor([r + [world.pad] * (max(map(len, rows)) - len(r)) for r in rows])
        asked = replace(part, ids=ids, paren=torch.tensor([len(r) - 1 for r in rows]))
        for what, chosen in (("on", []), ("off", heads), ("random", random_heads(heads, model.config, rng, heads))):
            p = run(model, asked, heads_off([chosen] * len(asked), model.config))[0].softmax(-1)
            y, n = (p[:, sorted(set(ids))].sum(1) for ids in (yes, no))
            m[f"yes_{kind}_{what}"] = (y / (y + n)).mean().item()
    for l, i in neurons:
        along, against = (lens(model, s * model.blocks[l].mlp.down.weight[None, :, i], 10)[0] for s in (1, -1))
        m[f"neuron {l}:{i}"] = " ".join(repr(world.decode([t])) for t in along.tolist())
        m[f"antipode {l}:{i}"] = " ".join(repr(world.decode([t])) for t in against.tolist())
    print("\n".join(f"{k}: {v if isinstance(v, str) else round(v, 3)}" for k, v in m.items()))
    return m


# -------------------------------------------------------------------------------------------------------- the verdict
# fmt: off


def judge(run, seeds):
    """C1-C8: a claim holds if it does in two of three seeds and on their mean; its control must fail."""
    numbers = [k for k, v in seeds[0].items() if isinstance(v, (int, float)) and all(k in s for s in seeds)]
    mean = {k: float(np.mean([s[k] for s in seeds])) for k in numbers}

    def claim(id, text, paper, measured, control, criterion, test, control_passes):
        keys = [[key.strip() for key in side.split(";")] for side in (measured, control)]
        if not {*keys[0], *keys[1]} <= set(mean):
            return  # a stage was left out
        holds = 3 * sum(map(test, seeds)) >= 2 * len(seeds) and test(mean)
        shown = [{key.replace("_", " "): mean[key] for key in side} for side in keys]
        run.claim(id, text, paper, *shown, criterion, holds, not control_passes(mean))

    claim("C1", "GRPO raises held-out greedy accuracy", "0 to about .6 (3B)",
          "sft_greedy; grpo_greedy; gain; gain_worst_seed; sft_sampled; grpo_sampled",
          "gain_rewards_permuted", "gain >= .08, every seed > 0; control within .04 of 0",
          lambda s: s["gain"] >= 0.08 and s["gain_worst_seed"] > 0, lambda s: abs(s["gain_rewards_permuted"]) > 0.04)
    collapsed = lambda s, net: s[f"{net}_checked"] >= 0.98 and s[f"{net}_form_entropy"] <= 0.1
    claim("C2", "RL leaves one form: every attempt is checked (T=1)", "every attempt ends in a verdict",
          "grpo_checked; grpo_form_entropy; grpo_wellformed", "sft_checked; sft_form_entropy",
          "checked >= .98, entropy <= .1, well-formed >= .98; SFT not",
          lambda s: collapsed(s, "grpo") and s["grpo_wellformed"] >= 0.98, lambda s: collapsed(s, "sft"))
    rigid = lambda s, net: all(s[f"{net}_{key}"] < s[f"sft_{key}"] for key in ("word_entropy", "distinct"))
    claim("C2b", "verdicts' words and traces collapse as well (T=1; distinct traces of 8)", "one rigid wording",
          "sft_word_entropy; sft_distinct; grpo_word_entropy; grpo_distinct", "control_word_entropy; control_distinct",
          "both below SFT's; with permuted rewards not", lambda s: rigid(s, "grpo"), lambda s: rigid(s, "control"))
    controls = ["probe_of_shuffled_labels", "probe_of_result_and_attempt"]
    controls += ["probe_of_random_weights"] if "probe_of_random_weights" in mean else []
    claim("C3", "a probe at the bracket tells right from wrong before the last layer (balanced accuracy)",
          "near 1 at 4 of 36", "inner_layer; embedding; inner_layer_at_result; before_result", "; ".join(controls),
          "inner >= .95, the result's embedding <= .60; shuffled <= .60, other controls < .95",
          lambda s: s["inner_layer"] >= 0.95 and s["embedding"] <= 0.6,
          lambda s: s[controls[0]] > 0.6 or max(s[k] for k in controls) >= 0.95)
    claim("C4", "GLU vectors near the probe read as verdicts (share with one in the top 3)",
          "success, yes; not, incorrect", "lens_valid; lens_invalid", "lens_valid_random; lens_invalid_random",
          "both >= .5; random <= .15", lambda s: min(s["lens_valid"], s["lens_invalid"]) >= 0.5,
          lambda s: max(s["lens_valid_random"], s["lens_invalid_random"]) > 0.15)
    claim("C5", "three heads that look at the target hold verification: P(valid verdict | valid step), heads off",
          "33 heads .003, 3 heads 0", "none_off; A_prev_off; 3_off; 3_at_their_mean; heads_in_A_prev; smallest_k_to_.2",
          "3_random_off; like_A_prev_random_off; of_which", "none >= .95, A_prev <= .20, 3 <= .30; 3 random >= .80",
          lambda s: s["none_off"] >= 0.95 and s["A_prev_off"] <= 0.2 and s["3_off"] <= 0.3,
          lambda s: s["3_random_off"] < 0.8)
    claim("C6", "GLU vectors disable less than both sets, these less than the heads (share that searches on)",
          ".16 < .45 < .95", "on_GLU_valid; on_GLU_both; on_3_heads; on_A_prev", "on_random_GLU",
          "GLU valid < both < A_prev; random <= .1",
          lambda s: s["on_GLU_valid"] < s["on_GLU_both"] < s["on_A_prev"], lambda s: s["on_random_GLU"] > 0.1)
    claim("C7", "without the 3 heads the valid GLU vectors fall silent (fall of mean m), and nothing wrong is accepted",
          "activations vanish", "fall; false_accepts; false_accepts_before", "fall_random_heads",
          "fall >= .7, false accepts <= before + .05; random <= .2",
          lambda s: s["fall"] >= 0.7 and s["false_accepts"] <= s["false_accepts_before"] + 0.05,
          lambda s: s["fall_random_heads"] > 0.2)
    claim("C8", "sufficiency: invalid steps called valid, 3 heads patched from a valid step of this result; steered",
          "not shown", "patched; patched_from_any; steered", "patched_random_heads; steered_at_random",
          "both >= .5; controls <= .1", lambda s: min(s["patched"], s["steered"]) >= 0.5,
          lambda s: max(s["patched_random_heads"], s["steered_at_random"]) > 0.1)


def draw(path, seeds, logs, args, lines):
    """The README's picture: learning, probes, heads, disabling curves, the paper's table (means; heads of one seed)."""
    first, colours = seeds[0], ["#4477aa", "#ee6677", "#228833", "#ccbb44", "#66ccee", "#aa3377"]
    with common.figure(path, 2, 3, size=(3.9, 2.85)) as (learn, form, probe, heads, curve, table):
        for (stage, name), colour in zip((("grpo", "GRPO"), ("control", "permuted")), ("#4477aa", "#999999")):
            for i, log in enumerate(logs.get(stage, [])):
                rows = [r for r in common.read_jsonl(log.path) if "greedy" in r]
                for ax, key, style, what in (
                    (learn, "greedy", "-", "greedy"), (learn, "sampled", ":", "T = 1"),
                    (form, "sampled_checked", "-", "checked"), (form, "sampled_arithmetic", ":", "arithmetic right")):
                    y, label = [r[key] for r in rows if key in r], None if i else f"{name}, {what}"
                    ax.plot([r["step"] for r in rows][: len(y)], y, style, color=colour, label=label)
        for (label, value), style in zip(lines.items(), (":", "--", "-.")):
            learn.axhline(value, color="k", lw=0.8, ls=style, label=label)
        learn.set(title="Held-out accuracy", xlabel="step", ylim=(0, 1.2))
        form.set(title="Attempts at temperature 1", xlabel="step", ylabel="share", ylim=(0, 1.05))
        for key, colour in zip(("bracket", "result", "before", "shuffled", "fresh"), colours):
            if f"probe_{key}" in first:
                label = {"shuffled": "shuffled labels", "fresh": "random weights"}.get(key, f"at the {key}")
                y = np.mean([s[f"probe_{key}"] for s in seeds], 0)
                probe.plot(y, "o-", ms=3, color=colour, label=label.replace("at the before", "before the result"))
        probe.set(title="Probe: is this attempt right?", ylabel="balanced accuracy", ylim=(0.35, 1.03))
        probe.set(xlabel="after layer (0: embedding)")
        place = lambda name: tuple(map(int, name[1:].split("H")))
        grid = np.zeros(np.max([place(h["head"]) for h in first["heads"]], 0) + 1)
        for h in first["heads"]:
            grid[place(h["head"])] = h["mass"]
        heads.figure.colorbar(heads.imshow(grid, cmap="Blues", vmin=0, aspect="auto", origin="lower"), ax=heads)
        for y, x in map(place, first["prev"][:3]):
            heads.text(x, y, "x", ha="center", va="center", color="#ee6677", weight="bold")
        heads.set(title=f"Attention of the result to the target\n(seed {args.seeds[0]}; x: the three switched off)")
        heads.set(xlabel="head", ylabel="layer", yticks=range(len(grid)))
        counts = min((s["counts"] for s in seeds), key=len)
        for ranker, colour in zip(first["curves"], colours):
            y = np.mean([s["curves"][ranker][: len(counts)] for s in seeds], 0)
            curve.plot(counts, y, "o-", ms=3, color=colour, label=f"by {ranker}")
        spread = np.array([np.concatenate([s["curve_random"][i] for s in seeds]) for i in range(len(counts))])
        curve.fill_between(counts, spread.min(1), spread.max(1), color="#bbbbbb", alpha=0.5)
        curve.plot(counts, spread.mean(1), color="#888888", label="random, same layers")
        curve.set(title="P(valid verdict | valid step)", xlabel="heads switched off", ylim=(-0.03, 1.05))
        names, left = list(first["table"]), np.zeros(len(first["table"]))
        for kind, label, colour in (("success", "searches on", "#228833"), ("partial", "partial", "#ccbb44"),
                                    ("fail", "stops", "#dddddd"), ("unknown", "unknown", "#ee6677")):
            share = np.mean([[s["table"][n][kind] for n in names] for s in seeds], 0)
            table.barh(names, share, left=left, color=colour, label=label)
            left = left + share
        table.set(title="What it does with a solution", xlabel="share", xlim=(0, 1), ylim=(len(names) + 1.2, -0.6))
        for ax in (learn, form, probe, curve, table):
            ax.legend(fontsize=6.5, ncols=2 if ax in (learn, table) else 1)


# fmt: on

# --------------------------------------------------------------------------------------------------------------- main


def listed(args, c):
    """The (layer, index) pairs of --heads and of --neurons; ValueError if the model has no such."""
    out, papers = [], (PAPER_HEADS, PAPER_NEURONS) if c.n_layer == 36 else ([], [])
    for flag, form, names, size in (
        ("--heads", r"L(\d+)H(\d+)", args.heads or papers[0], c.n_head),
        ("--neurons", r"(\d+):(\d+)", args.neurons or papers[1], c.d_mlp),
    ):
        found = [re.fullmatch(form, n) for n in names]
        if not all(found) or any(int(p[1]) >= c.n_layer or int(p[2]) >= size for p in found):
            raise ValueError(f"{flag} {' '.join(names)}, allowed: {form} within {c.n_layer} layers of {size}")
        out.append([(int(p[1]), int(p[2])) for p in found])
    return out


def traces_of(model, world, args, env, seed):
    """[((nums, target), prompt ids, response ids)]: the toy model's own at T = 1; the solver's for a checkpoint.

    And for a toy model that gives either verdict fewer than ten times: the number returned beside them is then 0.
    """
    rng = random.Random(f"traces {seed}")
    written = [(p, *world.written(*p, rng)) for p in rng.choices(world.train, k=4 * args.samples)]
    if args.model:
        return written, 0
    own = []
    for i in range(0, len(written), 256):
        prompts = [prompt for _, prompt, _ in written[i : i + 256]]
        own += rollout(model, prompts, 1, world.max_new, 1.0, world.stops, seed + i, env.dtype)[0]
    given = Counter(b for ids in own for a, b in itertools.pairwise(ids) if a == world.paren)
    if min(sum(given[word] for word in words) for words in (world.valid, world.invalid)) < 10:
        return written, 0
    return [(p, prompt, ids) for (p, prompt, _), ids in zip(written, own)], 1


def run_seed(args, seed, position=0):
    """One full repetition; returns its measures."""
    env, out, m, toy = common.setup(args), Path(args.out), {}, not args.model
    kept, flags = out / f"measures-s{seed}.json", {k: v for k, v in vars(args).items() if k not in ("resume", "seeds")}
    if args.resume and kept.exists() and (done := json.loads(kept.read_text()))["flags"] == flags:
        return done["measures"]  # this seed was finished before
    if not env.rank:
        kept.unlink(missing_ok=True)
    log = lambda stage: common.Log(out, f"{stage}-s{seed}", env)
    stored = lambda stage: model.load_state_dict(common.load_checkpoint(log(stage).path.with_suffix(".pt"))["model"])
    if toy:
        world = Toy(args, seed)
        model = toy_model(args, world, seed).to(env.device)
        test = lambda step: measure(model, world, env, world.heldout[:64])
        batch = lambda step: {k: v[env.rank :: env.world] for k, v in world.batch(step).items()}
        if "sft" in args.stages:
            common.train(model, batch, args, env, log("sft"), test, position, common.Muon)
        else:
            stored("sft")
    else:
        from pretrained import load

        model, tok = load(args.model, env.device, "fp32" if "grpo" in args.stages else env.dtype)
        world, model.__class__ = Real(args, tok, seed), Policy
        heads, neurons = listed(args, model.config)
    base = copy.deepcopy(model) if toy or "control" in args.stages else None
    if "grpo" in args.stages:
        grpo(model, world, args, env, log("grpo"), False, position)
    elif toy:
        stored("grpo")
    control = copy.deepcopy(base) if "control" in args.stages else None
    if control:
        grpo(control, world, args, env, log("control"), True, position)
    if env.rank or "analysis" not in args.stages:
        return m
    held = world.heldout[: args.problems]
    nets = {"sft": base, "grpo": model} | ({"control": control} if control else {})
    for name, net in nets.items() if toy else ():
        found = measure(net, world, env, held) | measure(net, world, env, held[: len(held) // 4], 8, seed)
        m |= {f"{name}_{k}": v for k, v in found.items()}
    if toy:
        m["gain"] = m["grpo_greedy"] - m["sft_greedy"]
    if toy and control:
        m["gain_rewards_permuted"] = m["control_greedy"] - m["sft_greedy"]
    with env.autocast(), model.eager():
        traces, m["own_traces"] = traces_of(model, world, args, env, seed)
        steps = find_steps(world, traces, args.scope)
        if not toy and heads:
            m |= check_listed(model, world, steps, args, heads, neurons)
        fresh = toy_model(args, world, seed + 1000).to(env.device) if toy else None
        m |= analyse(model, world, steps, args, seed, base if toy else None, fresh)
    common.write_text(kept, json.dumps({"flags": flags, "measures": m}))
    return m


def check(args):
    """ValueError for flags that can't work; before any work."""
    if unknown := set(args.stages) - set(STAGES):
        raise ValueError(f"--stages {' '.join(sorted(unknown))}, allowed: {' '.join(STAGES)}")
    if min(args.nums) < 2 or args.cap < 1 or args.attempts < 1:
        raise ValueError(f"--nums {args.nums} --cap {args.cap} --attempts {args.attempts}, allowed: 2, 1 and 1 and up")
    advantages(torch.zeros(args.group), args.group, args.adv_norm)
    if args.shard:
        raise ValueError("--shard: rollouts end at different steps on different ranks, allowed: --no-shard")
    if args.prompts % int(os.environ.get("WORLD_SIZE", 1)):
        raise ValueError(f"--prompts {args.prompts} is not a multiple of the number of processes")
    if not args.model and args.glu_k > 2 * args.n_embd:
        raise ValueError(f"--glu-k {args.glu_k} is more than the {2 * args.n_embd} neurons of a layer")
    for stage, seed in itertools.product(STAGES[:2], args.seeds if not args.model else ()):
        path = Path(args.out) / f"{stage}-s{seed}.pt"
        if stage not in args.stages and not path.exists():
            raise ValueError(f"--stages without {stage} needs the checkpoint {path}")
        if stage not in args.stages or args.resume:
            common.check_resume(path, toy_model(args, Toy(args, seed), seed).config)


def main(argv=None):
    """The paper end to end; returns what it writes to result.json."""
    args = common.parse(Args, argv)
    with common.bad_input():
        env, out = common.setup(args), Path(args.out)
        run = common.Run(args, env, "countdown_rl", "2504.14379")
        check(args)
        out.mkdir(parents=True, exist_ok=True)
        jobs = common.job_count(args, env)
        seeds = common.side_by_side(run_seed, [(args, s, i % jobs) for i, s in enumerate(args.seeds)], jobs)
    if env.rank:
        return None
    trained = [stage for stage in STAGES[:3] if stage in args.stages]
    logs = {stage: [common.Log(out, f"{stage}-s{s}") for s in args.seeds] for stage in trained}
    lines = {}
    if not args.model:
        world = Toy(args, 0)
        (one, _), (several, ahead) = (baselines(world.heldout, args.cap, k) for k in (1, args.attempts))
        lines = {"one random attempt": one, f"{args.attempts} random attempts": several, "lookahead": ahead}
    run.metrics = {"seeds": seeds, "baselines": lines}
    if "analysis" in args.stages:
        for s in seeds:
            s |= {"gain_worst_seed": min(x["gain"] for x in seeds)} if "gain" in s else {}
        judge(run, seeds)
        draw(out / "countdown_rl.png", seeds, logs, args, lines)
        rows = [[f"{v:.2f}" if isinstance(v, float) else v for v in row.values()] for row in seeds[0]["lens"]]
        rows = [list(seeds[0]["lens"][0]), ["---"] * 7, *rows]
        common.write_text(out / "lens.md", "".join(f"| {' | '.join(row)} |\n" for row in rows))
    return run.finish([log for stage in logs.values() for log in stage])


if __name__ == "__main__":
    main()
