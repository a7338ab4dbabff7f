"""What every script shares: flags, set-up, the training loop, checkpoints, results, figures.

- flags: a dataclass is the command line; the string under a field is its help; `--preset` fills defaults
- one training loop for one process, `torchrun` with DDP, or FSDP2 (`--shard`), with exact resume
- a run's results: `metrics.jsonl` while it goes, `result.json` with claims and controls at the end
"""

import argparse
import ast
import inspect
import itertools
import json
import math
import multiprocessing
import os
import signal
import sys
import textwrap
import threading
import time
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, fields
from datetime import timedelta
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar, Literal, get_args, get_origin, get_type_hints

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

from model import KVCache, rope

# ------------------------------------------------------------------------------------------------------------- flags


@dataclass
class Flags:
    """the run"""

    presets: ClassVar[dict] = {"toy": {}}
    limits: ClassVar[dict] = {"seeds": (0,), "jobs": (1,), "threads": (0,)}  # least and, where there is one, most
    preset: str = "toy"
    """which set of defaults; flags given beside it win"""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1, mps"""
    dtype: Literal["auto", "fp32", "bf16"] = "auto"
    """of matrix products; auto is bf16 on CUDA, fp32 elsewhere"""
    seeds: list[int] = field(default_factory=lambda: [0])
    """one full repetition each; claims are judged on all of them together"""
    out: str = ""
    """folder for results; default out/<script>"""
    resume: bool = False
    """go on from the checkpoints in --out"""
    jobs: int = 2
    """on a CPU: runs side by side"""
    threads: int = 0
    """CPU threads of a run; 0 shares the cores among the jobs, a real model (--model) has them all"""
    strict: bool = False
    """exit code 1 if a claim does not hold"""


@dataclass
class TrainFlags(Flags):
    """training"""

    limits: ClassVar[dict] = {flag: (1,) for flag in ("steps", "batch_size", "log_every", "eval_every", "save_every")}
    limits |= {flag: (0,) for flag in ("micro_batch", "lr", "warmup", "decay_steps", "min_lr", "weight_decay", "clip")}
    steps: int = 1000
    """optimizer steps"""
    batch_size: int = 16
    """windows in a step, over all ranks"""
    micro_batch: int = 0
    """windows in a forward pass on one device; 0 is all of the rank's share"""
    lr: float = 1e-3
    """peak learning rate"""
    warmup: int = 50
    """steps of linear warm-up"""
    decay_steps: int = 0
    """length of the cosine; 0 is --steps"""
    min_lr: float = 0.1
    """where the cosine ends, as a share of --lr"""
    weight_decay: float = 0.1
    """AdamW's, of matrices and embeddings"""
    clip: float = 1.0
    """largest norm of the gradient; 0: any"""
    compile: bool | None = None
    """torch.compile every block; default on CUDA only"""
    shard: bool = False
    """FSDP2 in place of DDP under torchrun"""
    log_every: int = 10
    """steps between logged losses"""
    eval_every: int = 100
    """steps between evaluations"""
    save_every: int = 200
    """steps between checkpoints"""


@cache
def classes(module):
    """{name: statements} of the classes in a module's source."""
    tree = ast.parse(inspect.getsource(sys.modules[module]))
    return {node.name: node.body for node in tree.body if isinstance(node, ast.ClassDef)}


def parse(Args, argv=None):
    """An `Args` from the command line: field defaults, then `Args.presets[--preset]`, then the flags given.

    A field is a flag of its name and type; the string below it in the source is its help, the docstring of its class is
    its group. Bad flags, numbers that aren't finite or outside `limits`: one line on stderr and exit code 2.
    """
    script, defaults = sys.modules[Args.__module__], Args(**Args.presets[Args.preset])
    name, about = Path(script.__file__).stem, script.__doc__.split("\n\n")[0]
    parser = argparse.ArgumentParser(usage=f"python {name}.py [flags]", description=about, allow_abbrev=False)
    parser.error = lambda message: fail(f"{message} (python {name}.py --help lists the flags)")
    types, left = get_type_hints(Args), {f.name for f in fields(Args)}
    for cls in [c for c in reversed(Args.__mro__) if "__dataclass_fields__" in vars(c)]:
        group, body = parser.add_argument_group(cls.__doc__), classes(cls.__module__)[cls.__name__]
        for node, below in zip(body, body[1:]):
            if not isinstance(node, ast.AnnAssign) or node.target.id not in left:
                continue
            flag, text = node.target.id, below.value.value
            left.remove(flag)
            default = getattr(defaults, flag)
            default = " ".join(map(str, default)) if isinstance(default, list) else default
            kind = next(
                (k for k in get_args(types[flag]) if k is not type(None)), types[flag]
            )  # of the list, or not None
            options = {"type": kind, "metavar": flag.upper()}
            if kind is bool:
                options = {"action": argparse.BooleanOptionalAction}
            elif get_origin(types[flag]) is Literal or flag == "preset":
                options = {"choices": Args.presets if flag == "preset" else get_args(types[flag])}
            elif get_origin(types[flag]) is list:
                options["nargs"] = "+"
            text = f"{text} [{default}]".replace("%", "%%")
            group.add_argument(
                "--" + flag.replace("_", "-"), dest=flag, default=argparse.SUPPRESS, help=text, **options
            )
    given = vars(parser.parse_args(argv))
    args = Args(**(Args.presets[given.get("preset", Args.preset)] | given))
    args.out = args.out or f"out/{name}"
    limits = dict.fromkeys(vars(args), (-math.inf,))
    for cls in reversed(Args.__mro__):
        limits |= vars(cls).get("limits", {})
    with bad_input():
        check_limits(args, limits)
    return args


def check_limits(args, limits):
    """ValueError for a number of a flag that isn't finite, or outside limits {flag: (least,) or (least, most)}."""
    for flag, ends in limits.items():
        value, (low, high) = getattr(args, flag), (*ends, math.inf)[:2]
        for v in value if isinstance(value, list) else [value]:
            if isinstance(v, (int, float)) and not (low <= v <= high and math.isfinite(v)):
                allowed = f"{low} to {high}".replace("-inf to inf", "finite numbers").replace(" to inf", " and more")
                raise ValueError(f"--{flag.replace('_', '-')} {v}, allowed: {allowed}")


def fail(message):
    """Ends the program: one line on stderr, exit code 2."""
    print(f"error: {' '.join(str(message).split())}", file=sys.stderr)
    raise SystemExit(2)


@contextmanager
def bad_input():
    """For the stretch of a script that reads what the user gave: its errors end in one line and exit code 2."""
    try:
        yield
    except (ValueError, OSError, ImportError, KeyError) as error:
        fail(error.args[0] if isinstance(error, KeyError) else error)


# ------------------------------------------------------------------------------------------------------------ set-up


@dataclass
class Env:
    """Where a run computes: `device`, `dtype` of matrix products, and its place among the processes of torchrun."""

    device: torch.device
    dtype: torch.dtype
    rank: int = 0
    world: int = 1

    def autocast(self):
        """Matrix products in bf16, if that is the dtype."""
        return torch.autocast(self.device.type, torch.bfloat16) if self.dtype == torch.bfloat16 else nullcontext()


def find_device(name):
    """The torch.device of a name, with its index (cuda is cuda:0); auto: an accelerator if there is one. ValueError."""
    found = torch.accelerator.current_accelerator().type if torch.accelerator.is_available() else "cpu"
    try:
        return torch.empty(0, device=found if name == "auto" else name).device
    except (RuntimeError, AssertionError):  # how torch says that it doesn't know the name, or finds no such device
        here = "cpu" if found == "cpu" else f"cpu, {found} ({torch.accelerator.device_count()})"
        raise ValueError(f"device {str(name)!r} is not on this machine, which has: {here}") from None


def setup(args) -> Env:
    """Resolves --device and --dtype, joins torchrun's processes, sets threads. ValueError if the device isn't there."""
    rank, world, device = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1)), find_device(args.device)
    if world > 1:
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if device.type == "cuda" else device
        if not dist.is_initialized():
            patience = timedelta(days=1)  # rank 0 may be tokenizing for long
            dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=patience)
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")
    bf16 = args.dtype == "bf16" or args.dtype == "auto" and device.type == "cuda"
    env = Env(device, torch.bfloat16 if bf16 else torch.float32, rank, world)
    if device.type == "cpu":
        torch.set_num_threads(args.threads or max(1, os.cpu_count() // (world * job_count(args, env))))
    return env


# ---------------------------------------------------------------------------------------------------------- training


def learning_rate(step, args):
    """Linear warm-up, then a cosine from lr to min_lr * lr over decay_steps."""
    if step < args.warmup:
        return args.lr * (step + 1) / args.warmup
    done = min(1.0, (step - args.warmup) / max(1, (args.decay_steps or args.steps) - args.warmup))
    return args.lr * (args.min_lr + (1 - args.min_lr) * 0.5 * (1 + math.cos(math.pi * done)))


def train(model, batch, args, env, log, evaluate=None, position=0, make_optimizer=None, unit=1):
    """Trains `model` for args.steps optimizer steps, in place; goes on from a checkpoint under --resume.

    batch     batch(step) -> dict of this rank's (n, T) tensors for `model.forward`: idx, targets, weights, ...; it
              depends on the step alone, so that a resumed run sees the same. "denom" overrides the sum of weights
    log       a `Log`; its path with .pt in place of .jsonl is the checkpoint
    evaluate  evaluate(step) -> dict of numbers, logged every eval_every steps, before the step, and at the end
    make_optimizer  make_optimizer(model, args) in place of AdamW
    unit      steps that belong together: checkpoints and stops come after multiples of it only
    """
    net, opt = parallelise(model.to(env.device), args, env), (make_optimizer or optimizer)(model, args)
    path, state = log.path.with_suffix(".pt"), {"step": 0, "seconds": 0.0, "tokens": 0, "config": asdict(model.config)}
    if args.resume and path.exists():
        state = load_checkpoint(path)
        snapshot(model, opt, put=state)
        del state["model"], state["optimizer"]
    elif env.rank == 0:
        path.unlink(missing_ok=True)  # of an earlier run: not to be resumed by mistake
    log.rewind(state["step"])
    bar = tqdm(
        desc=log.run, total=args.steps, initial=state["step"], position=position, leave=False, disable=env.rank > 0
    )
    bar.mininterval, stop = 0.2 if sys.stderr.isatty() else 10, False
    with bar, interruptible() as stopped:  # the bar is cleared before a message of the exit
        while True:
            step, row = state["step"], {}
            if evaluate and (step % args.eval_every == 0 or step == args.steps):
                row = evaluate(step)
            if step == args.steps:
                break
            began = time.perf_counter()
            for group in opt.param_groups:
                group["lr"] = learning_rate(step, args)
            parts = batch(step)
            loss = backward(net, parts, args, env)
            torch.nn.utils.clip_grad_norm_(model.parameters(), args.clip or math.inf)
            opt.step()
            opt.zero_grad(set_to_none=True)
            stop, whole = stop or agreed(stopped, step % args.log_every == 0, env), (step + 1) % unit == 0
            save = whole and (stop or (step + 1) % args.save_every < unit) or step + 1 == args.steps
            if step % args.log_every == 0 or save:
                value = all_reduce(loss, env).item()
                if not math.isfinite(value):
                    kept = f"the last checkpoint is {path}" if path.exists() else "there is no checkpoint yet"
                    raise SystemExit(f"error: the loss of step {step} is {value}; {kept}; a smaller --lr may help")
            state["step"] = step + 1
            state["tokens"] += parts["idx"].numel() * env.world
            state["seconds"] += time.perf_counter() - began  # of training: without evaluations
            if step % args.log_every == 0:
                row |= {"loss": value, "lr": group["lr"]}
                bar.set_postfix(loss=f"{value:.3f}", refresh=False)
            if row:
                log(step, **row, **timing(state))
            if save:
                save_checkpoint(path, state | snapshot(model, opt), env)
            bar.update()
            if stop and whole:
                raise SystemExit(f"{log.run} stopped after step {step}; --resume goes on from there")
    if row:
        log(args.steps, **row, **timing(state))


def timing(state):
    """The fields of a log line that tell how far and how fast."""
    speed = state["tokens"] / max(state["seconds"], 1e-9)
    return {"tokens": state["tokens"], "seconds": state["seconds"], "tokens_per_s": speed}


def optimizer(model, args):
    """AdamW in one fused kernel; weight decay on matrices and embeddings only."""
    groups = [
        {"params": [p for p in model.parameters() if (p.dim() == 2) == decays], "weight_decay": decay}
        for decays, decay in ((True, args.weight_decay), (False, 0.0))
    ]
    return torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.95), eps=1e-8, fused=True)


class Muon(torch.optim.Optimizer):
    """For `train`: Muon (momentum made orthogonal) for the matrices of the blocks, Adam for the rest; one rate."""

    def __init__(self, model, args):
        matrices = {id(p) for p in model.blocks.parameters() if p.dim() == 2}
        groups = [[p for p in model.parameters() if (id(p) in matrices) == kind] for kind in (True, False)]
        super().__init__([{"params": g, "matrix": kind} for g, kind in zip(groups, (True, False))], {"lr": args.lr})

    @torch.no_grad()
    def step(self):
        for group, p in ((g, p) for g in self.param_groups for p in g["params"]):
            s, g = self.state[p], p.grad
            if not s:
                s.update(n=torch.zeros(()), m=torch.zeros_like(p), v=torch.zeros_like(p))
            s["n"] += 1
            if group["matrix"]:
                s["m"].mul_(0.95).add_(g)
                p.add_(orthogonal(g + 0.95 * s["m"]), alpha=-0.2 * group["lr"] * max(p.shape) ** 0.5)
            else:
                s["m"].lerp_(g, 0.1)
                s["v"].lerp_(g * g, 0.05)
                scale = ((s["v"] / (1 - 0.95 ** s["n"])).sqrt() + 1e-8) * (1 - 0.9 ** s["n"])
                p.addcdiv_(s["m"], scale, value=-group["lr"])


def orthogonal(g):
    """U V^T, about, of a matrix g = U S V^T: five Newton-Schulz steps (coefficients of Jordan, 2024)."""
    x = g.T if g.shape[0] > g.shape[1] else g
    x = x / (x.norm() + 1e-7)
    for _ in range(5):
        a = x @ x.T
        x = 3.4445 * x + (-4.775 * a + 2.0315 * a @ a) @ x
    return x.T if g.shape[0] > g.shape[1] else x


def backward(net, parts, args, env):
    """Gradients of sum(weights * loss) / sum(weights) over all micro-batches and ranks; returns this rank's share."""
    n, denom = len(parts["idx"]), parts.pop("denom", None)
    if denom is None:
        denom = all_reduce(parts.get("weights", torch.ones(parts["idx"].shape)).sum().to(env.device), env).clamp(
            min=1.0
        )
    loss, size = torch.zeros((), device=env.device), args.micro_batch or n
    for i in range(0, n, size):
        part = {k: v[i : i + size].to(env.device, non_blocking=True) for k, v in parts.items()}
        wait = (
            net.no_sync() if i + size < n and hasattr(net, "no_sync") else nullcontext()
        )  # DDP: reduce once, at the end
        with env.autocast(), wait:
            share = net(**part, denom=denom / env.world)  # ranks are averaged: hence / world
            share.backward()
        loss += share.detach() / env.world
    return loss


def parallelise(model, args, env):
    """The model as the training loop calls it: compiled block by block, in DDP, or sharded by FSDP2 (all in place)."""
    if env.device.type == "cuda" if args.compile is None else args.compile:
        for block in model.blocks:
            block.compile()
    if env.world == 1:
        return model
    if not args.shard:
        return torch.nn.parallel.DistributedDataParallel(model)
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

    policy = MixedPrecisionPolicy(param_dtype=env.dtype, reduce_dtype=torch.float32)
    for part in [*model.blocks, model]:
        fully_shard(part, mp_policy=policy)
    for name in "hidden", "unembed":  # what evaluations call besides forward
        register_fsdp_forward_method(model, name)
    return model


@contextmanager
def rank_zero_first(env):
    """Rank 0 runs the block, then the others: they find what it has written."""
    if env.rank > 0:
        dist.barrier()
    yield
    if env.rank == 0 and env.world > 1:
        dist.barrier()


def all_reduce(value, env):
    """The sum of a tensor over ranks, in place."""
    if env.world > 1:
        dist.all_reduce(value)
    return value


@contextmanager
def interruptible():
    """Yields a function: whether Ctrl-C or SIGTERM has come."""
    signals = []
    old = {s: signal.signal(s, lambda number, _: signals.append(number)) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: bool(signals)
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


def agreed(stopped, due, env):
    """Whether a stop has come; under torchrun, to any rank: they ask each other, so only at steps where it is `due`."""
    if env.world == 1:
        return stopped()
    return due and all_reduce(torch.tensor(float(stopped()), device=env.device), env).item() > 0


def start_worker(lock):
    """A worker process begins: it draws its bars under the common lock, and ends with the process that started it."""
    tqdm.set_lock(lock)
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


def job_count(args, env):
    """How many runs go side by side: --jobs on a CPU; one on an accelerator, under torchrun and with a real model."""
    return args.jobs if env.device.type == "cpu" and env.world == 1 and not getattr(args, "model", "") else 1


def side_by_side(function, tasks, jobs):
    """[function(*task) for task in tasks], `jobs` at a time, each in a process of its own; Ctrl-C stops them all."""
    if jobs <= 1 or len(tasks) <= 1:
        return [function(*task) for task in tasks]
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(jobs, len(tasks)), context, start_worker, (context.RLock(),)) as pool:
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # also where SIGINT is ignored, as behind nohup
        futures = [pool.submit(function, *task) for task in tasks]
        try:
            return [f.result() for f in futures]
        except KeyboardInterrupt:
            raise SystemExit("stopped; --resume goes on from there") from None
        finally:  # after an error or Ctrl-C: the training loops save their state on this, then end
            pool.shutdown(wait=False, cancel_futures=True)
            for process in multiprocessing.active_children():
                process.terminate()


# ------------------------------------------------------------------------------------------------------- checkpoints


def snapshot(model, opt, put=None):
    """Weights and optimizer state, whole even if sharded; with `put`, such a state is first put in place."""
    if not hasattr(next(model.parameters()), "full_tensor"):
        if put:
            model.load_state_dict(put["model"])
            opt.load_state_dict(put["optimizer"])
        return {"model": model.state_dict(), "optimizer": opt.state_dict()}
    from torch.distributed.checkpoint import state_dict as sharded

    options = sharded.StateDictOptions(full_state_dict=True, cpu_offload=True)
    if put:
        sharded.set_state_dict(
            model, opt, model_state_dict=put["model"], optim_state_dict=put["optimizer"], options=options
        )
    return dict(zip(("model", "optimizer"), sharded.get_state_dict(model, opt, options=options)))


def save_checkpoint(path, state, env=None):
    """Writes `state` whole or not at all: to a temporary name, to disk, then renamed."""
    if env is None or env.rank == 0:
        partial = path.with_suffix(".tmp")
        with open(partial, "wb") as f:
            torch.save(state, f)
            f.flush()
            os.fsync(f.fileno())
        os.replace(partial, path)


def load_checkpoint(path):
    """The state in a checkpoint, on the CPU. ValueError if it is damaged or holds more than tensors and numbers."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise
    except Exception as error:  # zip, pickle and torch each have their own
        unsafe = "weights_only" in str(error) or "Unsupported" in str(error)
        what = "needs unpickling, which is refused" if unsafe else "is damaged or cut short"
        raise ValueError(f"checkpoint {path} {what}: delete it, or run without --resume") from None


def check_resume(path, config):
    """Raises ValueError if there is a checkpoint at `path` that can't be read or is not of a model of this config."""
    if path.exists():
        saved, ours = load_checkpoint(path)["config"], asdict(config)
        odd = [f"{k} is {saved.get(k)} there, {ours[k]} here" for k in ours if saved.get(k) != ours[k]]
        if odd:
            raise ValueError(f"checkpoint {path} is of another model: {'; '.join(odd)}")


# ------------------------------------------------------------------------------------------- patches at every layer


def padded(prompts, device):
    """Id lists as one tensor (B, T), padded on the left, and its mask of real tokens."""
    longest = max(map(len, prompts))
    idx = torch.tensor([[0] * (longest - len(p)) + list(p) for p in prompts], device=device)
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], dtype=torch.bool, device=device)
    return idx, mask


def residuals(model, idx, mask=None, tail=1, **kwargs):
    """The residual stream of the last `tail` columns: after the embedding and every block, (L + 1, B, tail, C)."""
    kept, sites = [], ["embed"] + [f"blocks.{i}.resid_post" for i in range(model.config.n_layer)]
    with model.patch({site: lambda x: kept.append(x[:, -tail:].clone()) for site in sites}):
        model.hidden(idx, mask, **kwargs)
    return torch.stack(kept)


@torch.no_grad()
def sweep(model, idx, step, tail=1, mask=None):
    """Many interventions on the same prompts in one pass, exact: what the `final` site holds under each of them.

    A patch after block j at column p changes nothing before p and nothing below j. So the prompts run once; then the
    last `tail` columns (p is the first of them) go through the blocks again, as one bundle per intervention. A bundle
    joins behind the block where it begins, attends to the keys of the one prefix and to itself, to no other bundle.

    idx   (B, T) token ids; `mask` (B, T) for padding on the left: the last `tail` columns must be real
    step  step(j, x, clean) -> the bundles (B, V', tail, C) that leave block j (-1: the embedding), from those that
          came so far, x (B, V, tail, C), and the unpatched columns, clean (B, tail, C): rewrites and appends
    Returns (B, V, tail, C), normed as `model.unembed` wants it.
    """
    c, (B, T) = model.config, idx.shape
    if c.smear_keys or not 0 < tail < T:
        raise ValueError(f"a sweep over {tail} of {T} columns, allowed: 1 to {T - 1}, in a model without smeared keys")
    cache, S = KVCache(c, B, T, idx.device, model.wte.weight.dtype), T - tail
    clean = residuals(model, idx, mask, tail, cache=cache)
    bundles = SimpleNamespace(  # what a block needs of a cache
        append=lambda layer, k, v: [torch.cat((a[layer, :, :, :S], b), 2) for a, b in ((cache.k, k), (cache.v, v))]
    )
    x = step(-1, clean[0][:, None][:, :0], clean[0])
    for j, block in enumerate(model.blocks):
        V, window = x.shape[1], c.windows[j] if c.windows else 0
        if V:
            pos = cache.pos[:, S:].repeat(1, V)
            own = torch.block_diag(*[torch.ones(tail, tail, device=idx.device).tril()] * V).bool()
            see = torch.cat((cache.real[:, None, :S].expand(-1, V * tail, -1), own.expand(B, -1, -1)), 2)
            if window:
                see = see & (torch.cat((cache.pos[:, :S], pos), 1)[:, None] > pos[:, :, None] - window)
            rotary = None if c.learned_pos else rope(c, pos, local=window > 0)
            with model.eager():
                x = block(x.flatten(1, 2), rotary, see[:, None], None, bundles).unflatten(1, (V, tail))
        x = step(j, x, clean[j + 1])
    return model.final(x)


# ----------------------------------------------------------------------------------------------------------- results


class Log:
    """The metrics of one run (an arm and a seed), one JSON object a line, in `folder/<run>.jsonl`."""

    def __init__(self, folder, run, env=None):
        self.path, self.run, self.quiet = Path(folder) / f"{run}.jsonl", run, bool(env and env.rank)

    def __call__(self, step, **values):
        if not self.quiet:
            with open(self.path, "a") as f:
                f.write(json.dumps({"run": self.run, "step": step, **values}) + "\n")

    def rewind(self, step):
        """Forgets what was logged at `step` and later: a resumed run will log it again."""
        if not self.quiet:
            write_jsonl(self.path, [row for row in read_jsonl(self.path) if row["step"] < step])


def read_jsonl(path):
    """The objects of a JSON-lines file; a missing file has none, a torn last line is dropped."""
    rows = []
    for line in Path(path).read_text().splitlines() if Path(path).exists() else []:
        try:
            rows.append(json.loads(line))
        except ValueError:
            break
    return rows


def write_jsonl(path, rows):
    """Writes objects as JSON lines, whole or not at all."""
    write_text(path, "".join(json.dumps(row) + "\n" for row in rows))


def write_text(path, text):
    """Writes a file whole or not at all."""
    partial = Path(path).with_suffix(".tmp")
    partial.write_text(text)
    os.replace(partial, path)


class Run:
    """What a script has to say in the end: `metrics` and claims, for result.json and for the reader."""

    def __init__(self, args, env, script, paper):
        self.args, self.env, self.script, self.paper, self.began = args, env, script, paper, time.time()
        self.claims, self.metrics = [], {}

    def claim(self, id, claim, paper, measured, control, criterion, holds, control_fails):
        """Adds a sentence, the paper's figure, our numbers, and those of the control that must fail the criterion."""
        measured, control = ({k: round(float(v), 4) for k, v in d.items()} for d in (measured, control))
        verdict = {"holds": bool(holds), "control_fails": bool(control_fails)}
        numbers = {"measured": measured, "control": control, "criterion": criterion}
        self.claims.append({"id": id, "claim": claim, "paper": paper, **numbers, **verdict})

    def finish(self, logs=()):
        """Writes metrics.jsonl (the `Log`s joined) and result.json, prints the table of claims, returns the result."""
        args, out = self.args, Path(self.args.out)
        write_jsonl(out / "metrics.jsonl", [row for log in logs for row in read_jsonl(log.path)])
        result = {"script": self.script, "paper": self.paper, "preset": args.preset, "seeds": args.seeds}
        result |= {"device": str(self.env.device), "seconds": round(time.time() - self.began, 1)}
        result |= {"claims": self.claims, "metrics": self.metrics}
        write_text(out / "result.json", json.dumps(result, indent=1) + "\n")
        rows = [["claim", "paper", "measured", "control", "holds"]]
        for c in self.claims:
            numbers = ["\n".join(f"{k} {number(v)}" for k, v in c[side].items()) for side in ("measured", "control")]
            verdict = ("yes" if c["holds"] else "NO") + ("" if c["control_fails"] else "\ncontrol does not fail")
            rows.append([f"{c['id']} {c['claim']}\n  {c['criterion']}", c["paper"], *numbers, verdict])
        table(rows, widths=(44, 22, 24, 24, 10))
        print(f"{out}/result.json, figures beside it; {result['seconds']:.0f} s")
        if args.strict and not all(c["holds"] and c["control_fails"] for c in self.claims):
            raise SystemExit(1)
        return result


def wilson(k, n, z=1.96):
    """95 % Wilson interval of a share k / n; (0, 1) for n = 0."""
    if not n:
        return 0.0, 1.0
    p, centre = k / n, (k / n + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * (p * (1 - p) / n + z * z / (4 * n * n)) ** 0.5
    return centre - half, centre + half


def interval(values, draws=2000):
    """[mean, low, high]: 95 % bootstrap interval of the mean of `values`, of any shape; nan is left out."""
    values = np.asarray(values, float).ravel()
    values = values[~np.isnan(values)] if not np.isnan(values).all() else np.array([math.nan])
    means = values[np.random.default_rng(0).integers(len(values), size=(draws, len(values)))].mean(1)
    return [values.mean(), *np.percentile(means, [2.5, 97.5])]


def number(v):
    """A figure for people: whole numbers with separators, others to three digits."""
    return f"{v:,.0f}" if float(v).is_integer() else f"{v:.3g}"


def table(rows, widths):
    """Prints rows of cells, each wrapped to its column's width."""
    for row in rows:
        wrapped = [[textwrap.wrap(line, w) for line in cell.split("\n")] for cell, w in zip(row, widths)]
        for line in itertools.zip_longest(*(itertools.chain(*cell) for cell in wrapped), fillvalue=""):
            print("  ".join(part.ljust(w) for part, w in zip(line, widths)).rstrip())
        print("-" * (sum(widths) + 2 * len(widths) - 2))


@contextmanager
def figure(path, rows=1, cols=1, size=(5, 3.4)):
    """`with figure("a.png", 1, 2) as (left, right):` draws matplotlib axes and saves them."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    style = {"axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False, "font.size": 9}
    with plt.rc_context(style):
        shape = {"figsize": (size[0] * cols, size[1] * rows), "layout": "constrained", "squeeze": False}
        fig, axes = plt.subplots(rows, cols, **shape)
        yield axes[0, 0] if rows * cols == 1 else list(axes.flat)
        fig.savefig(path, dpi=130)
        plt.close(fig)
