"""Geometry of self-verification on CountDown (arXiv 2504.14379).

CountDown: make a target from a few numbers, each used once. Rewarded for right answers, a model
comes to write in one form: every attempt ends in a verdict, "(not 42)" or "(this works)". There a
linear probe tells right from wrong; its direction reads as words of success or failure. Heads that
look back at the target carry the verdict: with three off, the model searches on.

The toy: a small GPT imitates searchers, most of whom answer with their first attempt, unchecked;
the others check each one. The control permutes its rewards.
"""

import ast
import copy
import hashlib
import itertools
import math
import operator
import random
import re
from collections import namedtuple
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import lru_cache, partial
from typing import ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence

import common
import data
import pretrained
from model import GPT, GPTConfig, generate, residuals

# Departures from the paper: GRPO for PPO, so groups for a critic (32 prompts of 8 are its 256
# rollouts); the KL in the loss, not in the reward; no entropy bonus; no reward for form.
PAPER = dict(model="Qwen/Qwen2.5-3B", dataset="Jiayi-Pan/Countdown-Tasks-3to4")
PAPER |= dict(rl_steps=300, rl_lr=1e-6, prompts=32, minibatches=4, beta=0.001)
PAPER |= dict(problems=1024, micro_batch=2, eval_every=400, save_every=100)
TOY = dict(steps=1200, batch_size=32, micro_batch=16)
TOY |= dict(lr=6e-3, min_lr=0.03, weight_decay=0.3, eval_every=15, save_every=20)
SMOKE = TOY | dict(steps=6, drill=2, batch_size=8, micro_batch=4, n_embd=32)
SMOKE |= dict(rl_steps=2, prompts=2, problems=8, samples=20, eval_every=1, save_every=1, jobs=1)


@dataclass
class Args(common.TrainFlags):
    """CountDown"""

    presets: ClassVar[dict] = {"smoke": SMOKE, "toy": TOY, "paper": PAPER}
    limits: ClassVar[dict] = common.TrainFlags.limits | dict(n_layer=(3,), group=(2,), max_new=(1,))
    limits |= dict.fromkeys("drill rl_steps rl_lr beta".split(), (0,))
    limits |= dict.fromkeys("num_max cap n_head n_embd prompts problems samples".split(), (1,))
    limits |= dict(attempts=(2,), nums=(2, 5), guess=(0, 1), clip_ratio=(0, 1), minibatches=(1,))
    unused: ClassVar[set] = {"shard", "decay_steps"}
    may_change: ClassVar[set] = common.TrainFlags.may_change | {"rl_steps"}

    model: str = ""  # a real checkpoint in place of the toy
    dataset: str = ""  # with --model: problems (nums, target), file:X.jsonl or a hub id
    max_new: int = 1024  # with --model: longest response, in tokens (paper: 1024)
    nums: int = 3  # toy: numbers in a problem (paper: 3 and 4)
    num_max: int = 8  # toy: the largest of them (paper: 99)
    cap: int = 40  # toy: the largest target or result on the way (paper: 100)
    attempts: int = 8  # toy: most attempts in a text to imitate
    guess: float = 0.85  # toy: share of these texts with one attempt, unchecked
    drill: int = 500  # toy: the first of --steps, which drill sums and verdicts
    n_layer: int = 4  # toy: blocks
    n_head: int = 8  # toy: heads, on two of keys and values
    n_embd: int = 64  # toy: width
    rl_steps: int = 60  # batches of responses; 0: no GRPO (paper: 300)
    rl_lr: float = 2e-4  # learning rate of GRPO, constant (paper: 1e-6)
    prompts: int = 16  # problems in a batch of GRPO, over all ranks (paper: 256)
    group: int = 8  # responses to each problem (paper: 1, with a critic)
    minibatches: int = 1  # updates on a batch (paper: 4); with 1 nothing is clipped
    clip_ratio: float = 0.2  # probabilities that changed by more gain nothing
    beta: float = 0.0  # weight of the KL (paper: .001)
    problems: int = 400  # most held-out problems to measure on
    samples: int = 300  # texts to choose heads on, and to test on (paper: 300)


# --- the method


def advantages(rewards, group):
    """A_i = (r_i - mean r) / (std r + 1e-4) within each group of consecutive rewards (N,)."""
    r = rewards.view(-1, group)
    scaled = (r - r.mean(1, keepdim=True)) / (r.std(1, keepdim=True) + 1e-4)
    differ = (r != r[:, :1]).any(1, keepdim=True)  # else 0, exactly
    return (scaled * differ).flatten()


def clipped_gain(ratio, advantage, clip):
    """min(rho A, clip(rho, 1 - clip, 1 + clip) A): no gradient beyond the clip."""
    return torch.minimum(ratio * advantage, ratio.clamp(1 - clip, 1 + clip) * advantage)


def divergence(logp, reference):
    """(log p - log p_ref)^2 / 2: on average its gradient is that of the KL."""
    return (logp - reference) ** 2 / 2


def trimmed(idx, targets):
    """A batch (B, T) without columns that are padding in every row."""
    n = int((targets != -100).any(0).nonzero().max()) + 1
    return idx[:, :n], targets[:, :n]


class Objective(torch.nn.Module):
    """GRPO's loss around a policy; checkpoints hold its rollouts too."""

    def __init__(self, policy, args):
        super().__init__()
        self.policy, self.args, self.rollouts = policy, args, {}

    def get_extra_state(self):
        return self.rollouts

    def set_extra_state(self, state):
        self.rollouts = state

    def forward(self, idx, targets, advantage, old=None, reference=None, denom=1.0):
        """-sum_t [min(rho_t A, clip(rho_t) A) - beta KL_t] / denom, over all tokens.

        advantage (B,), the rest (B, T). old and reference are log-probabilities: of the policy
        that drew the batch (None: this), and of the model before GRPO (None: no KL).
        """
        here = targets != -100  # responses
        idx, shorter = trimmed(idx, targets)
        logits = self.policy.unembed(self.policy.hidden(idx)[shorter != -100]).float()
        logp = -F.cross_entropy(logits, targets[here], reduction="none")
        ratio = torch.exp(logp - (logp.detach() if old is None else old[here]))
        response = here.nonzero()[:, 0]  # the row of each token
        gain = clipped_gain(ratio, advantage[response], self.args.clip_ratio)
        if reference is not None:
            gain = gain - self.args.beta * divergence(logp, reference[here])
        return -gain.sum() / denom


# --- the task

APPLY = {"+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.truediv}
SIGNS = {ast.Add: "+", ast.Sub: "-", ast.Mult: "*", ast.Div: "/"}


def evaluate(text):
    """The exact value of an expression and the numbers in it, or ValueError.

    It is never run: its syntax tree holds + - * / and numbers below a million.
    """
    if len(text) > 200 or not re.fullmatch(r"[-+*/()\s0-9]*", text):
        raise ValueError("no arithmetic in 200 characters")
    numbers = []

    def value(node):
        if isinstance(node, ast.Constant) and node.value < 10**6:
            numbers.append(node.value)
            return Fraction(node.value)
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
            return -value(node.operand)
        if isinstance(node, ast.BinOp) and type(node.op) in SIGNS:
            return APPLY[SIGNS[type(node.op)]](value(node.left), value(node.right))
        raise ValueError("more than + - * / of numbers below a million")

    try:
        return value(ast.parse(" ".join(text.split()), mode="eval").body), numbers
    except (SyntaxError, ZeroDivisionError) as error:
        raise ValueError(str(error)) from None


def reward(response, nums, target):
    """1 if the last answer is right, otherwise 0."""
    _, opened, rest = response.rpartition("<answer>")
    answer, closed, _ = rest.partition("</answer>")
    try:
        value, used = evaluate(answer if opened and closed else "")
    except ValueError:
        return 0.0
    return float(value == target and sorted(used) == sorted(nums))


@lru_cache(128)
def attempts(nums, cap):
    """All ways to use each number once, left to right, with values of 0 to cap.

    Each is its steps: ((8, "*", 3, 24), (24, "-", 7, 17)).
    """
    found = []
    for order in sorted(set(itertools.permutations(nums))):
        for ops in itertools.product("+-*", repeat=len(nums) - 1):
            values = [order[0]]
            for op, b in zip(ops, order[1:]):
                values.append(APPLY[op](values[-1], b))
            if 0 <= min(values[1:]) and max(values[1:]) <= cap:
                found.append(tuple(zip(values, ops, order[1:], values[1:])))
    return found


def bracketed(steps):
    """The expression of an attempt: ( 8 * 3 ) - 7."""
    text = str(steps[0][0])
    for i, (_, op, b, _) in enumerate(steps):
        text = f"( {text} ) {op} {b}" if i else f"{text} {op} {b}"
    return text


VALID = "this", "yes", "correct", "success"
INVALID = "not", "no", "wrong", "false"
WORDS = "<bos> <eos> use make <think> </think> <answer> </answer> + - * = , ( ) [ ] works".split()


class Toy:
    """Problems, tokens, traces. A number is one token. A prompt and its trace:

    <bos> use 3 8 7 make 31 <think>
    [ 8 * 3 = 24 , 24 - 7 = 17 not 31 ]
    [ 8 * 3 = 24 , 24 + 7 = 31 this works ]
    </think> <answer> ( 8 * 3 ) + 7 </answer> <eos>
    """

    def __init__(self, args, seed):
        self.args, self.seed = args, seed
        numbers = map(str, range(max(args.cap, args.num_max) + 1))
        self.words = [*numbers, *WORDS, "\n", *VALID, *INVALID]
        self.id = {word: i for i, word in enumerate(self.words)}
        self.opening, self.stops = [], [self.id["<eos>"]]
        self.valid = [self.id[word] for word in VALID]
        self.invalid = [self.id[word] for word in INVALID]
        self.max_new = args.attempts * (6 * args.nums - 2) + 4 * args.nums
        self.train, self.heldout = [], []
        for nums in itertools.combinations_with_replacement(range(1, args.num_max + 1), args.nums):
            for target in sorted({steps[-1][-1] for steps in attempts(nums, args.cap)} - {0}):
                digest = hashlib.sha256(repr((nums, target)).encode()).digest()
                part = self.heldout if digest[0] < 51 else self.train  # a fifth
                part.append((nums, target))
        if not self.train or not self.heldout:
            raise ValueError("--nums, --num-max and --cap leave too few problems")
        random.Random(0).shuffle(self.heldout)

    def encode(self, text):
        return [self.id[word] for word in re.findall(r"\n|[^ \n]+", text)]

    def decode(self, ids):
        return "".join(f" {self.words[i]}" for i in ids)

    def prompt(self, nums, target, rng):
        """Ids: numbers in any order, the target first or last."""
        use = f"use {' '.join(map(str, rng.sample(nums, len(nums))))}"
        make = f"make {target}"
        order = [use, make] if rng.random() < 0.5 else [make, use]
        return self.encode(f"<bos> {' '.join(order)} <think>")

    def line(self, steps, target, rng, checks=True):
        """An attempt; three verdicts in ten are synonyms."""
        text = " , ".join(f"{a} {op} {b} = {value}" for a, op, b, value in steps)
        synonym = rng.random() < 0.3
        if steps[-1][-1] == target:
            verdict = rng.choice(VALID[1:]) if synonym else "this works"
        else:
            verdict = f"{rng.choice(INVALID[1:]) if synonym else 'not'} {target}"
        return f"[ {text} {verdict} ] \n " if checks else f"{text} \n "

    def written(self, nums, target, rng, checks=True):
        """(prompt, response): who searches checks, others answer at once."""
        tries = attempts(nums, self.args.cap)
        text = ""
        for steps in rng.sample(tries, min(len(tries), self.args.attempts)):
            text += self.line(steps, target, rng, checks)
            if steps[-1][-1] == target or not checks:
                text += f"</think> <answer> {bracketed(steps)} </answer> <eos>"
                break
        return self.prompt(nums, target, rng), self.encode(text)

    def drill(self, nums, target, rng):
        """(ids, counts): checked attempts, half of them picked to be right.

        Of these only the results count, and the verdict.
        """
        tries = attempts(nums, self.args.cap)
        right = [steps for steps in tries if steps[-1][-1] == target]
        ids = self.prompt(nums, target, rng)
        counts = [False] * len(ids)
        for _ in range(self.args.attempts):
            picked = rng.random() < 0.5
            line = self.encode(self.line(rng.choice(right if picked else tries), target, rng))
            results = [i + 1 for i, token in enumerate(line) if token == self.id["="]]
            for i in range(len(line)):
                counts.append(not picked or i in results or i > results[-1])
            ids += line
        return ids, counts

    def batch(self, step, env):
        """Documents: one in eight, and early all of them, are drill."""
        rng = random.Random(f"{self.seed} {step}")
        rows = []
        for i in range(self.args.batch_size):
            problem = rng.choice(self.train)
            if step < self.args.drill or i % 8 == 0:
                rows.append(self.drill(*problem, rng))
            else:
                checks = rng.random() >= self.args.guess
                rows.append(counted(*self.written(*problem, rng, checks)))
        rows.sort(key=lambda row: -len(row[0]))  # to trim micro-batches
        return collate(rows[env.rank :: env.world])


def counted(prompt, response):
    """(ids, counts) of a document whose response counts."""
    return prompt + response, [False] * len(prompt) + [True] * len(response)


def collate(rows):
    """[(ids, counts)] as idx and targets (B, T), padded on the right."""
    idx = pad_sequence([torch.tensor(ids) for ids, _ in rows], True)
    counts = pad_sequence([torch.tensor(counts) for _, counts in rows], True)
    return {"idx": idx[:, :-1], "targets": idx.where(counts, -100)[:, 1:]}


class ToyGPT(GPT):
    """The toy's model, Llama-shaped; it trains without the padding."""

    def __init__(self, args, world, seed):
        torch.manual_seed(seed)
        size = 5 + args.nums + world.max_new  # prompt, response
        shape = dict(n_layer=args.n_layer, n_head=args.n_head, n_embd=args.n_embd, head_dim=16)
        shape |= dict(n_kv_head=1 if args.n_head % 2 else 2, d_mlp=2 * args.n_embd)
        shape |= dict(norm="rms", gated=True, act="silu")
        shape |= dict.fromkeys(("qkv_bias", "attn_bias", "mlp_bias"), False)
        super().__init__(GPTConfig(len(world.words), size, **shape))

    def forward(self, idx, targets=None, *args, **kwargs):
        if targets is not None:
            idx, targets = trimmed(idx, targets)
        return super().forward(idx, targets, *args, **kwargs)


PROMPT = """Make {target} from the numbers {nums} by + - * /, using each once. Think in \
<think> </think>, step by step, then answer in <answer> </answer>.
<think>"""


class Real:
    """What Toy is, for a checkpoint with its own tokens."""

    def __init__(self, args, tok, seed):
        self.tok, self.seed = tok, seed
        self.stops, self.decode = tok.stops, tok.decode
        self.max_new, self.opening = args.max_new, tok.encode("1 (")[len(tok.encode("1")) :]
        first = partial(pretrained.first_token, tok)
        self.valid = [first("this"), *[first(f" {word}") for word in VALID]]
        self.invalid = [first("not"), *[first(f" {word}") for word in INVALID]]
        problems = read_problems(args.dataset)
        held = max(1, min(args.problems, len(problems) // 5))
        self.heldout, self.train = problems[:held], problems[held:]

    def prompt(self, nums, target, rng):
        """Ids, with the numbers in any order."""
        text = PROMPT.format(nums=rng.sample(nums, len(nums)), target=target)
        return self.tok.encode(text, bos=True)


def read_problems(name):
    """[(nums, target)] of --dataset; ValueError names a bad row."""
    if name.startswith("file:"):
        rows = data.read_rows(data.files_of(name)[0], nums=list, target=int)
    else:
        rows = list(data.hub_rows(name, "nums", "target"))
    for i, row in enumerate(rows, 1):
        nums = row["nums"]
        numbers = all(type(n) is int and 0 <= n < 10**6 for n in [*nums, row["target"]])
        if not numbers or not 2 <= len(nums) <= 5:
            raise ValueError(f"{name}, row {i}: needs 2 to 5 nums under a million, a target")
    if len(rows) < 2:
        raise ValueError(f"{name} has {len(rows)} problems, needed: 2")
    return [(tuple(sorted(row["nums"])), row["target"]) for row in rows]


# --- training


def verdicts_in(text):
    """The verdict's first word, or "", of each line with a "="."""
    found = []
    for line in text.partition("</think>")[0].split("\n")[:-1]:  # the last one may be cut
        words = [word for word in re.findall("[a-z]+", line) if word in VALID + INVALID]
        if "=" in line:
            found.append(words[0] if words else "")
    return found


def respond(model, world, problems, rng, env, samples=1, seed=None):
    """[(problem, prompt, response)], `samples` of each problem."""
    prompts = [world.prompt(*problem, rng) for problem in problems]
    seed = rng.getrandbits(31) if seed is None else seed
    options = dict(stop=world.stops, seed=seed, samples=samples)
    with env.autocast():
        responses = generate(model, prompts, world.max_new, **options)
    found = []
    for i, response in enumerate(responses):
        found.append((problems[i // samples], prompts[i // samples], response))
    return found


def measure(model, world, args, env, samples=1):
    """Shares of right responses, and of checked attempts."""
    problems, rng = world.heldout[: args.problems], random.Random("measure")
    found = respond(model, world, problems, rng, env, samples, seed=0)
    texts = [world.decode(response) for _, _, response in found]
    right = [reward(text, *problem) for text, (problem, _, _) in zip(texts, found)]
    verdicts = sum(map(verdicts_in, texts), [])
    checked = sum(map(bool, verdicts)) / max(1, len(verdicts))
    example = world.decode(found[0][1]) + texts[0]
    return dict(accuracy=np.mean(right), checked=checked, example=example)


def imitate(args, env, log, arm, seed):
    """The toy's model learns to write as searchers do."""
    world = Toy(args, seed)
    common.train(ToyGPT(args, world, seed), partial(world.batch, env=env), args, env, log)


def load_model(args, env, seed, stage):
    """(model, world) after "imitate" (--model: as it is) or "grpo"."""
    if args.model:
        dtype = "fp32" if args.rl_steps else env.dtype
        with common.bad_input():
            model, tok = pretrained.load(args.model, env.device, dtype)
            world = Real(args, tok, seed)
    else:
        world = Toy(args, seed)
        model = ToyGPT(args, world, seed).to(env.device)
    if stage == "grpo" or not args.model:
        with common.rank_zero_first(env):  # which wrote it
            state = common.load_checkpoint(f"{args.out}/{stage}-s{seed}.pt")
        net = Objective(model, args) if stage == "grpo" else model
        net.load_state_dict(state["model"])
    return model, world


def draw_batch(policy, world, args, env, number, permuted=False):
    """Rollouts for `Objective`, and their mean reward."""
    rng = random.Random(f"{world.seed} {number} {env.rank}")
    problems = [rng.choice(world.train) for _ in range(math.ceil(args.prompts / env.world))]
    found = respond(policy, world, problems, rng, env, args.group)
    rewards = [reward(world.decode(response), *problem) for problem, _, response in found]
    if permuted:
        rng.shuffle(rewards)
    batch = collate([counted(prompt, response) for _, prompt, response in found])
    batch["advantage"] = advantages(torch.tensor(rewards), args.group)
    return batch, np.mean(rewards)


def scored(model, batch, env):
    """Log-probabilities (B, T) of responses; 0 elsewhere."""
    idx, targets = batch["idx"].to(env.device), batch["targets"].to(env.device)
    with env.autocast():
        rows = [model.token_loss(a[None], b[None]) for a, b in zip(idx, targets)]
    return -torch.cat(rows).cpu()


def minibatch(batch, args, number, part):
    """A random part of a batch, the longest rows first."""
    lengths = (batch["targets"] != -100).sum(1)
    order = torch.randperm(len(lengths), generator=torch.Generator().manual_seed(number))
    rows = order[part :: args.minibatches]
    denom = lengths[rows].sum()
    if not args.beta:  # rows of no advantage only count in the denominator
        useful = batch["advantage"][rows] != 0
        rows = rows[useful] if useful.any() else rows[:1]  # no part is empty
    rows = rows[lengths[rows].argsort(descending=True)]
    return {name: value[rows] for name, value in batch.items()} | {"denom": denom}


def reinforce(args, env, log, arm, seed):
    """GRPO; `decay_steps` ties its checkpoint to the imitator of --steps."""
    policy, world = load_model(args, env, seed, "imitate")
    before = measure(policy, world, args, env, samples=4)
    reference = copy.deepcopy(policy) if args.beta else None
    net, permuted = Objective(policy, args), arm == "permuted"

    def batch(step):
        number, part = divmod(step, args.minibatches)
        if part == 0:
            net.rollouts, mean = draw_batch(policy, world, args, env, number, permuted)
            log(step, reward=mean)
            if args.minibatches > 1:
                net.rollouts["old"] = scored(policy, net.rollouts, env)
            if reference:
                net.rollouts["reference"] = scored(reference, net.rollouts, env)
        rows = minibatch(net.rollouts, args, number, part)
        return rows | {"denom": common.all_reduce(rows["denom"].to(env.device), env)}

    def evaluate(step):
        return measure(policy, world, args, env)

    rate = dict(lr=args.rl_lr, warmup=0, min_lr=1.0, decay_steps=args.steps, weight_decay=0.0)
    own = replace(args, **rate, steps=args.rl_steps * args.minibatches, compile=False, log_every=1)
    common.train(net, batch, own, env, log, evaluate)
    curve = [row["accuracy"] for row in common.read_log(log.path) if "accuracy" in row]
    after = measure(policy, world, args, env, samples=4)
    return dict(before=before, after=after, curve=curve)


# ---- moments of verification


# ids: up to where a right attempt's verdict is due; wrong: where a wrong one's was;
# seen: where the target was seen
Trace = namedtuple("Trace", "ids wrong seen problem")


def numbers_in(world, ids):
    """[(last place, value)] of runs of digits: 162 holds no 62."""
    found = []
    for i, piece in enumerate(world.decode([token]) for token in ids):
        if re.fullmatch("[0-9]+", piece) and found and found[-1][0] == i - 1:
            found[-1] = i, min(10**6, int(f"{found[-1][1]}{piece}"))
        elif re.fullmatch(r"\s*[0-9]+", piece):
            found.append((i, int(piece)))
    return found


def find_traces(world, texts, rng):
    """Traces of (problem, prompt, response) with true verdicts of both kinds."""
    found = []
    for problem, prompt, response in texts:
        ids, target = prompt + response, problem[1]
        wrong, seen = [], []
        for place, value in numbers_in(world, ids):
            end = place + 1 + len(world.opening)  # where the verdict would stand
            due = len(prompt) < end < len(ids) and ids[place + 1 : end] == world.opening
            verdict = ids[end] if due else None
            if value != target and verdict in world.invalid:
                wrong.append(end - 1)
            if value == target and verdict in world.valid and wrong:
                found.append(Trace(ids[:end], rng.choice(wrong), seen, problem))
                break
            if value == target:
                seen.append(place)
    return found


def halves(model, world, args, env, rng):
    """Traces to choose on, and of other problems to test on."""
    problems = rng.choices(world.train, k=5 * args.samples)
    if args.model:
        texts = respond(model, world, problems, rng, env, seed=world.seed)
    else:
        texts = [(problem, *world.written(*problem, rng)) for problem in problems]
    found = [], []
    for trace in find_traces(world, texts, rng):
        side = random.Random(repr(trace.problem)).randrange(2)
        found[side].append(trace)
    if min(map(len, found)) < 3:
        common.fail(f"too few traces for --samples {args.samples}")
    for half in found:
        del half[args.samples :]
        half.sort(key=lambda trace: len(trace.ids))  # little padding in a batch
    return found


def batches(model, traces):
    """(idx, at): x[at] of a tensor (B, T, ...) is at its two verdicts."""
    size = 32 if model.config.vocab_size < 1000 else 8
    for i in range(0, len(traces), size):
        some = traces[i : i + size]
        idx = pad_sequence([torch.tensor(trace.ids) for trace in some], True)
        due = torch.tensor([[len(trace.ids) - 1, trace.wrong] for trace in some])
        yield idx.to(model.wte.weight.device), (torch.arange(len(some))[:, None], due)


def stream(model, traces):
    """The stream (L + 1, 2N, C) at verdicts: right, wrong, right, ..."""
    found = []
    for idx, (rows, due) in batches(model, traces):
        x = residuals(model, idx, tail=idx.shape[1])[:, rows, due]
        found.append(x.flatten(1, 2).float().cpu())
    return torch.cat(found, 1)


def probe_accuracy(x, y, x_test, y_test):
    """Of a linear probe of each layer of x (L + 1, N, C), on x_test."""
    layers = []
    for layer, test in zip(x, x_test):
        w, b = common.fit_probe(layer, y)
        layers.append(((test.double() @ w + b > 0) == y_test).double().mean().item())
    return dict(layers=layers, inner=max(layers[1:-1]), embedding=layers[0])


def verdict_words(model, world, directions):
    """How far directions (n, C) of the stream read as verdicts, and the words.

    That is, of the four words at either end, the share of success or of failure.
    """
    rows = model.head.weight.float() * model.final.weight.float()
    logits = directions.to(rows) @ (rows - rows.mean(0)).T
    ends = logits.topk(4).indices.cpu(), (-logits).topk(4).indices.cpu()
    success = torch.isin(ends[0], torch.tensor(world.valid)).float().mean(1)
    failure = torch.isin(ends[1], torch.tensor(world.invalid)).float().mean(1)
    return torch.minimum(success, failure), *ends


def from_the_top(model, world, args, choose, test, rng):
    """Probes, the direction to right, and GLU neurons along it."""
    y = torch.tensor([True, False]).repeat(len(choose))
    y_test = torch.tensor([True, False]).repeat(len(test))
    shuffled = y[torch.tensor(rng.sample(range(len(y)), len(y)))]
    x, x_test = stream(model, choose), stream(model, test)
    found = {"trained": probe_accuracy(x, y, x_test, y_test)}
    found["shuffled labels"] = probe_accuracy(x, shuffled, x_test, y_test)
    if not args.model:
        fresh = ToyGPT(args, world, world.seed + 1).to(model.wte.weight.device)
        seen = stream(fresh, choose), y, stream(fresh, test), y_test
        found["random weights"] = probe_accuracy(*seen)
    directions = x[:, y].mean(1) - x[:, ~y].mean(1)  # (L + 1, C)
    middle = model.config.n_layer // 2
    upper = directions[middle + 1 :]
    reads, success, failure = verdict_words(model, world, upper)
    best = reads.argmax()
    found["direction"] = {"reads": reads[best].item()}
    found["words"] = [world.decode(end.tolist()) for end in (success[best], failure[best])]
    torch.manual_seed(world.seed)
    noise = verdict_words(model, world, torch.randn(20, upper.shape[1]))[0]
    found["noise"] = {"reads": noise.max().item()}
    k = max(1, min(50, model.config.d_mlp // 20))  # 50 of 11,008 in the paper
    neurons = []
    for layer in range(middle, model.config.n_layer):
        columns = F.normalize(model.blocks[layer].mlp.down.weight.float(), dim=0)
        near = directions[layer + 1].to(columns) @ columns
        neurons += [(layer, index) for index in near.topk(k).indices.tolist()]
    return found, neurons


def target_attention(model, world, traces):
    """Mean attention (L, H) from right results to the target; even attention."""
    sites = [f"blocks.{layer}.attn.pattern" for layer in range(model.config.n_layer)]
    total, even = 0, 0
    for trace in traces:
        patterns = model.capture(next(batches(model, [trace]))[0], sites)
        result = len(trace.ids) - 1 - len(world.opening)
        mass = [patterns[site][0, :, result, trace.seen].sum(-1) for site in sites]
        total = total + torch.stack(mass).float().cpu() / len(traces)
        even += len(trace.seen) / (result + 1) / len(traces)
    return total, even


def searches_on(token, world):
    """Whether this, in a verdict's place, goes on searching."""
    text = world.decode([token])
    return token in world.invalid or bool(re.fullmatch(r"[-+*/=()\[\],\s\d]*", text))


def switch_off(model, world, traces, neurons, sets):
    """Of each set of heads, switched off at all positions:

    says_valid, searches_on: shares of right attempts
    false_accepts: the share of wrong attempts
    glu: the mean activation of `neurons` at right attempts
    """
    inputs = [f"blocks.{layer}.resid_pre" for layer in range(model.config.n_layer)]
    sites = [f"blocks.{layer}.mlp.act" for layer, _ in neurons]
    said, glu = [[] for _ in sets], [[] for _ in sets]
    for idx, at in batches(model, traces):
        right = [index[:, 0] for index in at]  # at right attempts alone
        clean = model.capture(idx, ["final", *inputs, *sites])
        for k, heads in enumerate(sets):
            acts = clean
            if heads:  # below the first of them nothing changes
                first = min(heads)[0]
                go_on = dict(first=first, x=clean[inputs[first]])
                with model.patch(common.heads_off(heads, model)):
                    changed = model.capture(idx, ["final", *sites], **go_on)
                acts = clean | changed
            said[k] += model.unembed(acts["final"][at]).argmax(-1).tolist()
            active = [acts[site][(*right, i)] for site, (_, i) in zip(sites, neurons)]
            glu[k] += torch.stack(active).float().mean(0).tolist()
    found = []
    for tokens, active in zip(said, glu):
        valid, accepts = np.isin(tokens, world.valid).mean(0)
        goes_on = np.mean([searches_on(token, world) for token, _ in tokens])
        row = dict(says_valid=valid, searches_on=goes_on, false_accepts=accepts)
        found.append(row | {"glu": np.mean(active)})
    return found


def random_heads(heads, config, rng, outside):
    """As many, not `outside`, from the same layers or the nearest."""
    free = list(itertools.product(range(config.n_layer), range(config.n_head)))
    free = [head for head in rng.sample(free, len(free)) if head not in outside]
    drawn = []
    for layer, _ in heads[: len(free)]:
        drawn.append(min(free, key=lambda head: abs(head[0] - layer)))
        free.remove(drawn[-1])
    return drawn


def from_the_bottom(model, world, choose, test, neurons, rng):
    """Heads that look back, chosen on some traces, off on others."""
    c = model.config
    mass, even = target_attention(model, world, choose)
    third = mass.flatten().topk(3).values[-1]
    enough = min(max(0.1, 3 * even), third)  # at least three heads have it
    prev = [tuple(head) for head in (mass >= enough).nonzero().tolist()]  # A_prev
    alone = switch_off(model, world, choose, neurons, [[head] for head in prev])
    glu_without = {head: row["glu"] for head, row in zip(prev, alone)}
    prev.sort(key=glu_without.get)  # the strongest drivers first
    sets = [[], prev[:3], prev] + [random_heads(prev[:3], c, rng, prev) for _ in range(10)]
    rows = switch_off(model, world, test, neurons, sets)
    found = {"all_on": rows[0], "three": rows[1], "A_prev": rows[2]}
    found["random"] = common.mean(rows[3:])
    return found | {"heads": [f"L{layer}H{head}" for layer, head in prev]}


def dissect(args, env, log, arm, seed):
    """What the paper does to the trained model."""
    model, world = load_model(args, env, seed, "grpo" if args.rl_steps else "imitate")
    rng = random.Random(f"dissect {seed}")
    with torch.no_grad(), env.autocast(), model.eager():
        choose, test = halves(model, world, args, env, rng)
        found, neurons = from_the_top(model, world, args, choose, test, rng)
        found |= from_the_bottom(model, world, choose, test, neurons, rng)
    return found | {"traces": [len(choose), len(test)]}


# --- claims and figure


def judge(run, found):
    """The paper's claims, each beside its controls."""
    if "permuted" in found:
        before = [seed["before"] for seed in found["grpo"]]
        after = [seed["after"] for seed in found["grpo"]]
        controls = {"permuted rewards": [seed["after"] for seed in found["permuted"]]}
        says = "GRPO solves more held-out problems (share right)"
        rule = "arm.accuracy >= base.accuracy + .2"
        run.claim("C1", says, "0 to about .6", rule, base=before, arm=after, controls=controls)
        says = "it leaves one form: every attempt is checked (share)"
        controls["before GRPO"] = before
        run.claim("C2", says, "every attempt", "arm.checked >= .98", arm=after, controls=controls)
    rows = found["dissect"]
    sides = {name: [row[name] for row in rows] for name in rows[0]}
    says = "a probe tells right from wrong before the last layer (accuracy)"
    rule = "arm.inner >= .95 and arm.embedding <= .6"
    controls = {net: sides[net] for net in ("shuffled labels", "random weights") if net in sides}
    paper = "near 1 from layer 4 of 36"
    run.claim("C3", says, paper, rule, arm=sides["trained"], controls=controls)
    says = "its direction reads as verdicts (share of 4 words)"
    controls = {"20 random directions": sides["noise"]}
    paper = "success, yes; not, incorrect"
    run.claim("C4", says, paper, "arm.reads >= .5", arm=sides["direction"], controls=controls)
    controls = {"three random heads": sides["random"]}
    both = dict(base=sides["all_on"], arm=sides["three"], controls=controls)
    says = "with three heads off it searches on past its solution"
    rule = "base.says_valid >= .95 and arm.says_valid <= .3 and arm.searches_on >= .6"
    run.claim("C5", says, "3 of 576 heads: .95 search on", rule, **both)
    says = "without them GLU units fall silent, and nothing wrong is accepted"
    rule = "base.glu > 0 and arm.glu <= .3 * base.glu"
    rule += " and arm.false_accepts <= base.false_accepts + .05"
    run.claim("C7", says, "activations vanish", rule, **both)


def draw(path, found, args):
    """Accuracy during GRPO, the probe by layer, heads switched off."""
    panels, lines = [], {}
    for arm in [arm for arm in found if arm != "dissect"]:
        y = [seed["curve"] for seed in found[arm]]
        lines[arm] = range(0, len(y[0]) * args.eval_every, args.eval_every), y
    labels = dict(title="Held-out accuracy at temperature 1", xlabel="updates by GRPO")
    if lines:
        panels.append(dict(lines=lines, **labels))
    rows, lines = found["dissect"], {}
    for net in "trained", "shuffled labels":
        y = [row[net]["layers"] for row in rows]
        lines[net] = range(len(y[0])), y
    panels.append(dict(title="Probe: is the attempt right?", xlabel="after layer", lines=lines))
    sets = dict(all_on="all on", random="3 random off", three="3 off", A_prev="A_prev off")
    bars = {}
    for kind in "says_valid", "searches_on":
        bars[kind] = [[row[name][kind] for name in sets] for row in rows]
    panels.append(dict(title="What follows a right attempt", bars=bars, names=list(sets.values())))
    common.panels(path, panels)


def check(args, env):
    """What may be wrong: (whether it is, message)."""
    toy = "steps lr nums num_max cap attempts guess drill n_layer n_head n_embd".split()
    idle = common.changed_flags(args, toy if args.model else ["max_new"])
    if not args.model:
        for seed in args.seeds:
            halves(None, Toy(args, seed), args, env, random.Random(f"dissect {seed}"))
    many = args.minibatches * env.world > args.prompts * args.group
    return [
        (bool(args.model) != bool(args.dataset), "--model and --dataset go together"),
        (idle, f"{idle}: no effect with{'' if args.model else 'out'} --model"),
        (many, f"--minibatches {args.minibatches} is more than the rollouts"),
    ]


def main(argv=None):
    """The paper end to end; returns what is in result.json."""
    run = common.Run(Args, argv, "2504.14379", check)
    args = run.args
    found = {}
    if not args.model:
        run.each(imitate, ["imitate"])
    if args.rl_steps:
        arms = ["grpo"] if args.model else ["grpo", "permuted"]
        found |= run.each(reinforce, arms) or {}
    found |= run.each(dissect, ["dissect"]) or {}
    if run.env.rank > 0:
        return None
    judge(run, found)
    draw(run.out / "countdown_rl.png", found, args)
    return run.finish(found)


if __name__ == "__main__":
    common.cli(main)
