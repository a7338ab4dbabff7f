"""What every script shares: flags, set-up, the training loop, checkpoints, claims, figures.

- flags: a dataclass is the command line, one line a flag; the comment behind a flag is its help
- one training loop for one process, for `torchrun` with DDP or FSDP2 (`--shard`), with exact resume
- `Run` is what every `main` has in common, from the flags to the table of claims

Read `Flags` and `parse` first, then `train`, then `Run`.
"""

import argparse
import inspect
import json
import math
import multiprocessing
import os
import re
import signal
import sys
import textwrap
import threading
import time
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from datetime import timedelta
from functools import partial
from itertools import zip_longest
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar, Literal, get_args, get_origin, get_type_hints

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

CORES = torch.get_num_threads()  # those that this process may use


def default_list(*items):
    """The default of a flag that is a list: a copy of its own for every `Args`."""
    return field(default_factory=list(items).copy)


@dataclass
class Flags:  # the docstring of a class of flags is the title of its group in --help
    """the run"""

    presets: ClassVar[dict] = {"toy": {}}  # name: defaults that differ from those below
    limits: ClassVar[dict] = {"seeds": (0, 2**32 - 1), "jobs": (1,)}  # (least, most), else (0,)
    unused: ClassVar[set] = set()  # inherited flags that this script does not take
    may_change: ClassVar[set] = set("seeds arms out device resume jobs strict".split())

    preset: str = "toy"  # a set of defaults; flags given beside it win
    device: str = "auto"  # auto, cpu, cuda, cuda:1, mps
    dtype: Literal["auto", "fp32", "bf16"] = "auto"  # of matrix products; auto: bf16 on CUDA
    seeds: list[int] = default_list(0)  # one full repetition each
    out: str = ""  # folder for results; default out/<script>
    resume: bool = False  # go on from the checkpoints in --out
    jobs: int = 2  # runs side by side on a CPU; they share its cores
    strict: bool = False  # exit code 1 if a claim does not hold


@dataclass
class TrainFlags(Flags):
    """training"""

    limits: ClassVar[dict] = Flags.limits | dict.fromkeys(
        "steps batch_size log_every eval_every save_every".split(), (1,)
    )
    may_change: ClassVar[set] = Flags.may_change | {"steps", "save_every"}

    steps: int = 1000  # optimizer steps
    batch_size: int = 16  # windows in a step, over all ranks
    micro_batch: int = 0  # windows in a forward pass on one device; 0: all of the rank's share
    lr: float = 1e-3  # peak learning rate
    warmup: int = 50  # steps of linear warm-up
    decay_steps: int = 0  # length of the cosine; 0: --steps
    min_lr: float = 0.1  # where the cosine ends, as a share of --lr
    weight_decay: float = 0.1  # AdamW's, of matrices and embeddings
    clip: float = 1.0  # largest norm of the gradient; 0: any
    compile: bool | None = None  # torch.compile every block; default: on CUDA only
    shard: bool = False  # FSDP2 in place of DDP under torchrun
    log_every: int = 10  # steps between logged losses
    eval_every: int = 100  # steps between evaluations
    save_every: int = 200  # steps between checkpoints


def parse(Args, argv=None):
    """An `Args` from the command line: its defaults, then `Args.presets[--preset]`, then the flags.

    A field is a flag of its name and type, the comment behind it is its help, and the docstring of
    its class its group. Bad flags end the program with one line on stderr and exit code 2.
    """
    module = sys.modules[Args.__module__]
    name = Path(module.__file__).stem
    parser = argparse.ArgumentParser(f"python {name}.py", "%(prog)s [flags]", allow_abbrev=False)
    parser.description = module.__doc__.split("\n\n")[0]
    parser.formatter_class = partial(argparse.HelpFormatter, max_help_position=28, width=100)
    parser.error = fail
    defaults = Args(**Args.presets[Args.preset])
    kinds = get_type_hints(Args) | {"preset": Literal[tuple(Args.presets)]}
    left = {f.name for f in fields(Args)} - Args.unused
    for cls in Args.__mro__[:-1]:  # the script's own flags first
        group = parser.add_argument_group(cls.__doc__)
        for flag, text in re.findall(r"(?m)^    (\w+): .*?  # (.*)", inspect.getsource(cls)):
            if flag in left:
                left.remove(flag)
                options = flag_options(kinds[flag], getattr(defaults, flag), text)
                group.add_argument(dashed(flag), **options)
    given = vars(parser.parse_args(argv))
    args = Args(**(Args.presets[given.get("preset", Args.preset)] | given))
    args.out = args.out or f"out/{name}"
    check_numbers(args)
    return args


def dashed(flag):
    """A flag as it is typed."""
    return "--" + flag.replace("_", "-")


def flag_options(kind, default, text):
    """What argparse needs to know of a field."""
    if get_origin(kind) is Literal:
        options = {"choices": get_args(kind)}
    elif kind in (bool, bool | None):
        options = {"action": argparse.BooleanOptionalAction}
    elif get_origin(kind) is list:
        (inner,) = get_args(kind)
        options = {"type": inner, "nargs": "+", "metavar": inner.__name__}
        default = " ".join(map(str, default))
    else:
        options = {"type": kind, "metavar": kind.__name__}
    if default not in ("", None, False):
        text = f"{text} [{default}]"
    return options | {"default": argparse.SUPPRESS, "help": text.replace("%", "%%")}


def check_numbers(args):
    """Fails at a number that is not finite or outside `limits`, and at a seed given twice."""
    for flag, value in vars(args).items():
        values = value if isinstance(value, list) else [value]
        if flag in ("seeds", "arms", "only", "quads") and len(set(values)) < len(values):
            given = " ".join(map(str, values))
            fail(f"{dashed(flag)} {given}: each can be given once only")
        low, high = (*args.limits.get(flag, [0]), None)[:2]
        allowed = f"{low} and more" if high is None else f"{low} to {high}"
        for v in values:
            if isinstance(v, int | float) and not low <= v <= (high or sys.float_info.max):
                fail(f"{dashed(flag)} {v}, allowed: {allowed}")


def changed_flags(args, flags):
    """Those of `flags` that differ from what the preset sets, as "--steps --lr"; "" for none."""
    usual = type(args)(**args.presets[args.preset])
    changed = [flag for flag in flags if getattr(args, flag) != getattr(usual, flag)]
    return " ".join(map(dashed, sorted(changed)))


def fail(message):
    """Ends the program: one line on stderr, exit code 2."""
    print(f"error: {' '.join(str(message).split())}", file=sys.stderr)
    raise SystemExit(2)


@contextmanager
def bad_input(flag=""):
    """For code that reads what the user gave: its errors end in one line, named by the flag."""
    try:
        yield
    except BrokenPipeError:  # nobody's input: see `cli`
        raise
    except (ValueError, OSError, ImportError, RecursionError) as error:
        message = str(error)
        if isinstance(error, ModuleNotFoundError):
            message += f": pip install {error.name}"
        fail(f"{flag}: {message}" if flag and flag not in message else message)


def cli(main):
    """Calls a script's `main`; Ctrl-C and a reader that has gone (`| head -1`) end it quietly."""
    try:
        main()
        sys.stdout.flush()
    except KeyboardInterrupt:
        raise SystemExit("\nstopped") from None  # below the progress bars
    except BrokenPipeError:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())  # Python flushes once more when it ends
        raise SystemExit(1) from None


@dataclass
class Env:
    """Where a run computes, the `dtype` of its matrix products, its place under torchrun."""

    device: torch.device
    dtype: torch.dtype
    rank: int = 0
    world: int = 1

    def autocast(self):
        """Matrix products in bf16, if that is the dtype."""
        enabled = self.dtype == torch.bfloat16
        return torch.autocast(self.device.type, torch.bfloat16, enabled)


def find_device(name):
    """The torch.device of a name, with its index; auto: an accelerator if there is one."""
    found = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    try:
        return torch.empty(0, device=found if name == "auto" else name).device
    except (RuntimeError, AssertionError):  # torch does not know the name, or finds no such device
        what = f"device {str(name)!r} is not on this machine, which has"
        raise ValueError(f"{what}: {' '.join(sorted({'cpu', found.type}))}") from None


def setup(args) -> Env:
    """Resolves --device and --dtype, joins torchrun's processes, sets threads. ValueError."""
    rank = int(os.environ.get("RANK", 0))
    world = int(os.environ.get("WORLD_SIZE", 1))
    if getattr(args, "shard", False) and world == 1:
        raise ValueError("--shard needs torchrun with two processes or more")
    device = find_device(args.device)
    backend, bf16 = "gloo", args.dtype == "bf16"
    if device.type == "cuda":
        if world > 1:
            device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")
        backend, bf16 = "nccl", args.dtype != "fp32"
    if world > 1 and not dist.is_initialized():
        dist.init_process_group(backend, timeout=timedelta(days=1))  # tokenizing takes long
    env = Env(device, torch.bfloat16 if bf16 else torch.float32, rank, world)
    torch.set_num_threads(max(1, CORES // job_count(args, env)))
    return env


def job_count(args, env):
    """--jobs; 1 where runs would share a device, the ranks, or the memory of a real model."""
    alone = env.device.type != "cpu" or env.world > 1 or getattr(args, "model", "")
    return 1 if alone else args.jobs


def learning_rate(step, args):
    """Linear warm-up, then a cosine from lr to min_lr * lr over decay_steps."""
    if step < args.warmup:
        return args.lr * (step + 1) / args.warmup
    length = max(1, (args.decay_steps or args.steps) - args.warmup)
    done = min(1.0, (step - args.warmup) / length)
    return args.lr * (args.min_lr + (1 - args.min_lr) * 0.5 * (1 + math.cos(math.pi * done)))


def optimizer(model, args):
    """AdamW in one fused kernel; weight decay on matrices and embeddings only."""
    matrices = [p for p in model.parameters() if p.dim() == 2]
    vectors = [p for p in model.parameters() if p.dim() != 2]
    groups = [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}]
    options = {"betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": args.weight_decay}
    return torch.optim.AdamW(groups, lr=args.lr, **options, fused=True)


def train(model, batch, args, env, log, evaluate=None, make_optimizer=optimizer):
    """Trains `model` in place for args.steps steps; goes on from a checkpoint under --resume.

    batch     batch(step) -> dict of this rank's (n, T) tensors for `model.forward`: idx, targets,
              weights, ...; of the step alone, so that a resumed run sees the same. "denom"
              overrides the sum of weights
    log       a `Log`; its path with .pt in place of .jsonl is the checkpoint
    evaluate  evaluate(step) -> dict of numbers, logged every eval_every steps, before the step,
              and at the end
    """
    net = parallelise(model.to(env.device), args, env)
    opt = make_optimizer(model, args)
    path = log.path.with_suffix(".pt")
    state = begin(path, log, model, opt, args, env)
    worker = re.sub(r"\D", "", multiprocessing.current_process().name)  # SpawnProcess-1, -2, ...
    bar = {"position": int(worker or 0) % args.jobs, "leave": False, "disable": env.rank > 0}
    todo = range(state["step"], args.steps)
    steps = tqdm(todo, log.run, args.steps, initial=state["step"], **bar)
    for step in steps:
        row = evaluate(step) if evaluate and step % args.eval_every == 0 else {}
        began = time.perf_counter()
        for group in opt.param_groups:
            group["lr"] = learning_rate(step, args)
        parts = batch(step)
        loss = backward(net, parts, args, env)
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), args.clip or math.inf)
        opt.step()
        opt.zero_grad(set_to_none=True)
        state["step"] += 1
        state["tokens"] += parts["idx"].numel() * env.world
        due = step % args.log_every == 0
        save = state["step"] % args.save_every == 0 or state["step"] == args.steps
        if due or save:  # only these steps wait for the device
            loss = all_reduce(loss, env).item()
            norm = (norm.full_tensor() if args.shard else norm).item()
            if not math.isfinite(loss + norm):  # no such weights are saved
                what = f"the loss of step {step} is {loss}, its gradient's norm {norm}"
                raise SystemExit(f"error: {what}; the last checkpoint, if any, is {path}")
        state["seconds"] += time.perf_counter() - began  # evaluations don't count
        if due:
            row |= {"loss": loss, "lr": group["lr"]}
            steps.set_postfix(loss=f"{loss:.3f}", refresh=False)
        if row:
            log(step, **row, **timing(state))
        if save:
            save_checkpoint(path, state, model, opt, args, env)
    if evaluate:
        log(args.steps, **evaluate(args.steps), **timing(state))


def timing(state):
    """The fields of a log line that tell how far and how fast."""
    speed = state["tokens"] / max(state["seconds"], 1e-9)
    return {"tokens": state["tokens"], "seconds": state["seconds"], "tokens_per_s": speed}


def backward(net, parts, args, env):
    """Gradients of sum(weights * loss) / sum(weights) over micro-batches and ranks; the loss."""
    n = len(parts["idx"])
    size = args.micro_batch or n
    denom = parts.pop("denom", None)
    if denom is None:
        weights = parts.get("weights", torch.ones(parts["idx"].shape))
        if "targets" in parts:
            weights = weights * (parts["targets"] != -100)
        denom = all_reduce(weights.sum().to(env.device), env).clamp(min=1.0)
    loss = torch.zeros((), device=env.device)
    for i in range(0, n, size):
        part = {k: v[i : i + size].to(env.device, non_blocking=True) for k, v in parts.items()}
        net.require_backward_grad_sync = i + size >= n  # DDP reduces gradients once, at the end
        with env.autocast():
            share = net(**part, denom=denom / env.world)  # DDP takes the mean over ranks
            share.backward()
        loss += share.detach() / env.world
    return loss


def parallelise(model, args, env):
    """The model as the loop calls it: compiled block by block, in DDP, or sharded by FSDP2."""
    if args.compile or args.compile is None and env.device.type == "cuda":
        for block in model.blocks:
            block.compile()
    if env.world == 1:
        return model
    if not args.shard:
        return torch.nn.parallel.DistributedDataParallel(model)
    from torch.distributed import fsdp

    policy = fsdp.MixedPrecisionPolicy(param_dtype=env.dtype, reduce_dtype=torch.float32)
    for part in [*model.blocks, model]:
        fsdp.fully_shard(part, mp_policy=policy)
    for name in "hidden", "unembed":  # what evaluations call besides forward
        fsdp.register_fsdp_forward_method(model, name)
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


def shaping_flags(args):
    """The flags that a checkpoint depends on: all but those that may change under --resume."""
    return {flag: value for flag, value in vars(args).items() if flag not in args.may_change}


def check_flags(saved, args, path):
    """ValueError naming the flags by which the run of a checkpoint differs from this one."""
    odd = []
    for flag, value in shaping_flags(args).items():
        if saved.get(flag) != value:
            odd.append(f"{dashed(flag)} is {saved.get(flag)} there, {value} here")
    if odd:
        raise ValueError(f"{path} is of another run: {'; '.join(odd)}")


def begin(path, log, model, opt, args, env):
    """The counts to start from; under --resume weights, optimizer and log are as they were then."""
    state = {"step": 0, "seconds": 0.0, "tokens": 0}
    if args.resume and path.exists():
        with bad_input():
            saved = load_checkpoint(path)
            check_flags(saved["flags"], args, path)
            if saved["step"] > args.steps:
                gone = f"{path} has gone {saved['step']} steps already"
                raise ValueError(f"{gone}, --steps is {args.steps}")
            try:
                weights_of(model, opt, put=saved)
            except RuntimeError as error:  # names and shapes, a line each
                raise ValueError(f"{path} is of another model: {error}") from None
        state = {key: saved[key] for key in state}
    elif env.rank == 0:
        path.unlink(missing_ok=True)  # not to be resumed by mistake
    log.rewind(state["step"])
    return state


def weights_of(model, opt, put=None):
    """Weights and optimizer state, whole even if sharded; `put`: such a state to put in place."""
    if hasattr(next(model.parameters()), "full_tensor"):  # FSDP has split them over the ranks
        from torch.distributed.checkpoint import state_dict as sharded

        options = sharded.StateDictOptions(full_state_dict=True, cpu_offload=True)
        if put:
            sharded.set_model_state_dict(model, put["model"], options=options)
            sharded.set_optimizer_state_dict(model, opt, put["optimizer"], options=options)
        weights, moments = sharded.get_state_dict(model, opt, options=options)
        return {"model": weights, "optimizer": moments}
    if put:
        model.load_state_dict(put["model"])
        opt.load_state_dict(put["optimizer"])
    return {"model": model.state_dict(), "optimizer": opt.state_dict()}


def save_checkpoint(path, state, model, opt, args, env):
    """Writes what `begin` goes on from, whole or not at all: to a temporary name, then renamed."""
    state = state | weights_of(model, opt) | {"flags": shaping_flags(args)}
    if env.rank == 0:
        aside = path.with_name(path.name + ".tmp")
        torch.save(state, aside)
        os.replace(aside, path)


def load_checkpoint(path):
    """The state in a checkpoint, on the CPU. ValueError if it is damaged or needs unpickling."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # zip, pickle and torch each have their own
        what = "is missing, damaged or cut short, or needs unpickling, which is refused"
        raise ValueError(f"checkpoint {path} {what}") from error
    if not isinstance(state, dict) or not {"model", "optimizer", "flags", "step"} <= set(state):
        raise ValueError(f"{path} is no checkpoint of this program")
    return state


class Log:
    """The metrics of one run (an arm and a seed), one JSON object a line: `<out>/<run>.jsonl`.

    What does not go through `train` calls `rewind(0)` first, or an earlier run's lines stay.
    """

    def __init__(self, args, env, run):
        self.args, self.env, self.run = args, env, run
        self.path = Path(args.out) / f"{run}.jsonl"

    def stage(self, name):
        """The log, and so the checkpoint, of one stage of the run."""
        return Log(self.args, self.env, f"{self.run}-{name}")

    def __call__(self, step, **values):
        if self.env.rank == 0:
            row = {"run": self.run, "step": step, **values}
            with open(self.path, "a", encoding="utf-8") as f:
                f.write(json.dumps(row, default=plain) + "\n")

    def rewind(self, step):
        """Forgets what was logged at `step` and later: a resumed run will log it again."""
        if self.env.rank == 0:
            rows = [row for row in read_log(self.path) if row["step"] < step]
            write_text(self.path, "".join(json.dumps(row) + "\n" for row in rows))


def read_log(path):
    """The rows of one of our logs; a missing file has none, a torn last line is left out."""
    if not Path(path).exists():
        return []
    lines = Path(path).read_text("utf-8").split("\n")
    return [json.loads(line) for line in lines[:-1]]


def write_text(path, text):
    """Writes a file whole or not at all."""
    aside = Path(f"{Path(path)}.tmp")
    aside.write_text(text, "utf-8", errors="replace")
    os.replace(aside, path)


def plain(x):
    """For json: arrays and tensors as lists, their scalars as numbers."""
    return x.tolist()


def holds(criterion, base, arm):
    """Whether "arm.copy <= .5 * base.copy" holds on the mean and in two thirds of the seeds.

    base, arm  [{measure: number}, ...], one a seed; also returned: whether it holds in each
    """
    known = {"__builtins__": {}, "min": min, "max": max, "abs": abs}
    seeds = []
    for b, a in [*zip(base, arm, strict=True), (mean(base), mean(arm))]:
        names = {"base": SimpleNamespace(**b), "arm": SimpleNamespace(**a)}
        seeds.append(bool(eval(criterion, known, names)))
    on_mean = seeds.pop()
    return on_mean and 3 * sum(seeds) >= 2 * len(seeds), seeds


def mean(rows):
    """{measure: its mean over the seeds} of rows [{measure: number}], one a seed."""
    return {key: float(np.mean([row[key] for row in rows])) for key in rows[0]}


def named(side, criterion, rows):
    """Of each row only the measures that a criterion names after "arm." or "base.", as numbers."""
    names = sorted(set(re.findall(rf"\b{side}\.(\w+)", criterion)))
    return [{name: float(row[name]) for name in names} for row in rows]


class Run:
    """A script's run: `args`, `env`, the folder `out`; in the end the claims and result.json.

    Args   the dataclass of flags; the file that it stands in is the script
    check  check(args, env) -> [(whether it is wrong, message), ...]: the script's rules for flags
    """

    def __init__(self, Args, argv, paper, check=None):
        self.began, self.paper, self.claims, self.names = time.time(), paper, [], []
        self.script = Path(sys.modules[Args.__module__].__file__).stem
        self.args = parse(Args, argv)
        self.out = Path(self.args.out)
        with bad_input():
            self.env = setup(self.args)
            for wrong, message in check(self.args, self.env) if check else []:
                if wrong:
                    raise ValueError(message)
        with bad_input("--out"):
            self.out.mkdir(parents=True, exist_ok=True)

    def each(self, function, arms):
        """{arm: [function(args, env, log, arm, seed) of each seed]}; None off rank 0."""
        tasks = [(function, self.args, arm, seed) for seed in self.args.seeds for arm in arms]
        self.names += [f"{arm}-s{seed}" for _, _, arm, seed in tasks]
        results = side_by_side(run_one, tasks, job_count(self.args, self.env))
        if self.env.rank > 0:
            return None
        return {arm: results[i :: len(arms)] for i, arm in enumerate(arms)}

    def claim(self, id, says, paper, criterion, *, base=None, arm, controls):
        """Judges a claim seed by seed, the arm and in its place each control.

        says, paper  a sentence, and the paper's figure
        criterion    an expression over `base.<measure>` and `arm.<measure>`: shown, and tested
        base, arm    [{measure: number}, ...], one a seed; controls: {name: such a list}
        """
        base = named("base", criterion, base or [{}] * len(arm))
        arm = named("arm", criterion, arm)
        controls = {name: named("arm", criterion, rows) for name, rows in controls.items()}
        verdict, held = holds(criterion, base, arm)
        passed = {name: holds(criterion, base, rows)[0] for name, rows in controls.items()}
        measured = mean(arm) | {f"base {key}": value for key, value in mean(base).items()}
        control = {}
        for name, rows in controls.items():
            control |= {f"{name}: {key}": value for key, value in mean(rows).items()}
        unknown = any(math.isnan(value) for value in control.values())
        fails = not unknown and not any(passed.values())
        seeds = {"base": base, "arm": arm, **controls}
        row = {"id": id, "claim": says, "paper": paper, "measured": measured, "control": control}
        row |= {"criterion": criterion, "holds": verdict, "held": held}
        self.claims.append(row | {"control_passes": passed, "control_fails": fails, "seeds": seeds})

    def finish(self, found):
        """Joins the logs, writes result.json, prints the table of claims; returns the result."""
        rows = []
        for name in self.names:
            for path in [self.out / f"{name}.jsonl", *sorted(self.out.glob(f"{name}-*.jsonl"))]:
                rows += read_log(path)
        write_text(self.out / "metrics.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
        args, seconds = self.args, round(time.time() - self.began, 1)
        result = {"script": self.script, "paper": self.paper, "preset": args.preset}
        result |= {"seeds": args.seeds, "device": str(self.env.device), "seconds": seconds}
        result |= {"flags": asdict(args), "claims": self.claims, "metrics": found}
        text = json.dumps(result, indent=1, default=plain)
        write_text(self.out / "result.json", text + "\n")
        if self.claims:
            print_table(self.claims)
        print(f"{self.out}/result.json, figures beside it; {seconds:.0f} s")
        if args.strict and not all(c["holds"] and c["control_fails"] for c in self.claims):
            raise SystemExit(1)
        return json.loads(text)


def print_table(claims, widths=(42, 22, 26, 28, 13)):
    """Prints claims in columns; that a control holds, too, is said only where the claim does."""
    table = [[[title] for title in ("claim", "paper", "measured", "control", "holds")]]
    for c in claims:
        says = [f"{c['id']} {c['claim']}", c["criterion"]]
        measured = ranges(c["seeds"]["arm"]) + ranges(c["seeds"]["base"], "base ")
        control = [f"{name} {number(value)}" for name, value in c["control"].items()]
        verdict = ["yes" if c["holds"] else "NO", f"{sum(c['held'])} of {len(c['held'])} seeds"]
        if c["holds"] and not c["control_fails"]:
            verdict.append("control holds")
        table.append([says, [c["paper"]], measured, control, verdict])
    for row in table:
        columns = []
        for cell, width in zip(row, widths):
            columns.append(sum((textwrap.wrap(line, width) for line in cell), []))
        for line in zip_longest(*columns, fillvalue=""):
            print("  ".join(part.ljust(width) for part, width in zip(line, widths)).rstrip())
        print("-" * (sum(widths) + 8))


def ranges(rows, prefix=""):
    """["copy 0.8 [0.77, 0.81]", ...]: the mean of each measure, its least and its largest seed."""
    lines = []
    for name, value in mean(rows).items():
        values = [row[name] for row in rows]
        span = f" [{number(min(values))}, {number(max(values))}]" if len(values) > 1 else ""
        lines.append(f"{prefix}{name} {number(value)}{span}")
    return lines


def number(v):
    """A figure for people: whole numbers with separators, others to three digits."""
    return f"{v:,.0f}" if float(v).is_integer() else f"{v:.3g}"


def run_one(function, args, arm, seed):
    """One arm and seed of `Run.each`, in whichever process it falls to."""
    env = setup(args)
    return function(args, env, Log(args, env, f"{arm}-s{seed}"), arm, seed)


def side_by_side(function, tasks, jobs):
    """[function(*task) for task in tasks], `jobs` at a time, each in a process of its own."""
    if jobs == 1 or len(tasks) == 1:
        return [function(*task) for task in tasks]
    context = multiprocessing.get_context("spawn")
    lock = (context.RLock(),)
    with ProcessPoolExecutor(min(jobs, len(tasks)), context, start_worker, lock) as pool:
        heard = signal.signal(signal.SIGINT, signal.SIG_IGN)  # by the workers, who inherit it
        futures = [pool.submit(function, *task) for task in tasks]
        signal.signal(signal.SIGINT, heard)
        try:
            return [future.result() for future in futures]
        except BaseException:  # an error in one, or Ctrl-C, ends the others
            for process in multiprocessing.active_children():
                process.terminate()
            raise


def start_worker(lock):
    """A worker draws its bars under a common lock, and ends with the process that started it."""
    tqdm.set_lock(lock)
    parent = multiprocessing.parent_process()

    def end_with_parent():  # else it would go on writing what a run with --resume reads
        parent.join()
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()


def interval(values, draws=2000):
    """[mean, low, high]: 95 % bootstrap interval of the mean of `values`; nan is left out."""
    values = np.asarray(values, float).ravel()
    values = values[~np.isnan(values)]
    if not len(values):
        return [math.nan] * 3
    rows = np.random.default_rng(0).integers(len(values), size=(draws, len(values)))
    return [values.mean(), *np.percentile(values[rows].mean(1), [2.5, 97.5])]


def fit_probe(X, y):
    """Logistic regression on standardised features, |w|^2 / 2 as penalty, by Newton in float64.

    X (N, d), y (N,) of 0 and 1. Returns w (d,) and b with logit = X w + b. ValueError if all
    labels are the same.
    """
    X, y = X.double(), y.double()
    if y.min() == y.max():
        raise ValueError("a probe needs both classes, all labels are the same")
    center, scale = X.mean(0), X.std(0).clamp(min=1e-9)
    Z = (X - center) / scale
    basis = None
    if Z.shape[1] > len(Z):  # more features than rows: the weights lie in the span of the rows
        basis = torch.linalg.qr(Z.T)[0]
        Z = Z @ basis
    Z = torch.nn.functional.pad(Z, (0, 1), value=1.0)  # the last weight is the bias
    ridge = torch.ones_like(Z[0])
    ridge[-1] = 1e-6
    w = torch.zeros_like(ridge)
    for _ in range(30):
        p = torch.sigmoid(Z @ w)
        hessian = Z.T @ (Z * (p * (1 - p))[:, None]) + ridge.diag()
        step = torch.linalg.solve(hessian, Z.T @ (y - p) - ridge * w)
        w = w + step / max(1.0, step.norm().item() / 5)  # Newton overshoots far from the end
        if step.abs().max() < 1e-8:
            break
    direction = (w[:-1] if basis is None else basis @ w[:-1]) / scale
    return direction, w[-1] - center @ direction


def heads_off(heads, model):
    """Patches for `model.patch` that zero heads [(layer, head), ...] before the projection."""
    shape = model.config.n_layer, model.config.n_head, 1
    keep = torch.ones(shape, dtype=torch.bool, device=model.wte.weight.device)
    for layer, head in heads:
        keep[layer, head] = False
    return {f"blocks.{layer}.attn.z": partial(torch.mul, keep[layer]) for layer, _ in heads}


@contextmanager
def figure(path, rows=1, cols=1):
    """`with figure("a.png", 1, 2) as (left, right):` draws on matplotlib's axes."""
    import matplotlib.figure

    look = {"axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False}
    with matplotlib.rc_context(look | {"font.size": 9}):
        fig = matplotlib.figure.Figure((5 * cols, 3.4 * rows), layout="constrained")
        yield fig.subplots(rows, cols, squeeze=False).flat
        fig.savefig(path, dpi=130)


def panels(path, items):
    """A figure of one to four panels, each a dictionary of what `draw_panel` takes."""
    cols = 2 if len(items) == 4 else len(items)
    with figure(path, len(items) // cols, cols) as axes:
        for ax, panel in zip(axes, items):
            draw_panel(ax, **panel)


def draw_panel(ax, lines=(), bars=(), points=(), levels=(), names=(), **labels):
    """One panel on matplotlib's axes; labels: title, xlabel, ylabel, ylim, ... as in `ax.set`.

    lines   {name: (x, y)}, y (n,) or (seeds, n): the mean, in a band from least to most
    bars    {name: y}, y (k,) or (seeds, k): means, seeds as dots; `names` of the k groups
    points  {name: (x, y)}
    levels  {name: y}: dashed horizontal lines
    """
    for name, (x, y) in dict(lines).items():
        y = np.atleast_2d(np.asarray(y, float))
        (line,) = ax.plot(x, y.mean(0), label=name)
        ax.fill_between(x, y.min(0), y.max(0), color=line.get_color(), alpha=0.2, lw=0)
    for i, (name, y) in enumerate(dict(bars).items()):
        y = np.atleast_2d(np.asarray(y, float))
        width = 0.8 / len(bars)
        x = np.arange(y.shape[1]) + width * (i - (len(bars) - 1) / 2)
        ax.bar(x, y.mean(0), width, label=name)
        if len(y) > 1:
            ax.plot(x, y.T, "k.", ms=3)
    for name, (x, y) in dict(points).items():
        ax.scatter(x, y, s=12, label=name)
    for name, y in dict(levels).items():
        ax.axhline(y, color="0.5", ls="--", lw=1, label=name)
    if len(names):
        ax.set_xticks(range(len(names)), names)
    if len(bars):
        ax.margins(y=0.35)  # room for the legend
    ax.set(**labels)
    if ax.get_legend_handles_labels()[0]:
        ax.legend(fontsize=7)
