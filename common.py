"""What every script shares: flags, set-up, the training loop, checkpoints, results, figures.

- flags: a dataclass is the command line; the string under a field is its help; `--preset` fills defaults
- one training loop for one process, `torchrun` with DDP, or FSDP2 (`--shard`), with exact resume
- a run's results: `metrics.jsonl` while it goes, `result.json` with claims and controls at the end
"""

import argparse
import ast
import inspect
import json
import math
import multiprocessing
import os
import signal
import sys
import textwrap
import time
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import ClassVar, Literal, get_args, get_origin, get_type_hints

import torch
import torch.distributed as dist
from tqdm import tqdm

# ------------------------------------------------------------------------------------------------------------- flags


@dataclass
class Flags:
    """the run"""

    presets: ClassVar[dict] = {"toy": {}}
    preset: str = "toy"
    """which set of defaults; flags given beside it win"""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1, mps"""
    dtype: Literal["auto", "fp32", "bf16"] = "auto"
    """of matrix products; auto is bf16 on CUDA, fp32 elsewhere"""
    seeds: list[int] = field(default_factory=lambda: [0])
    """one full repetition each; claims are judged on the median"""
    out: str = ""
    """folder for results; default out/<script>"""
    resume: bool = False
    """go on from the checkpoints in --out"""
    jobs: int = 2
    """on a CPU: runs side by side, one thread each"""
    strict: bool = False
    """exit code 1 if a claim does not hold"""


@dataclass
class TrainFlags(Flags):
    """training"""

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
    """of matrices and embeddings"""
    clip: float = 1.0
    """largest norm of the gradient"""
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


def parse(Args, argv=None):
    """An `Args` from the command line: field defaults, then `Args.presets[--preset]`, then the flags given.

    A field is a flag of its name and type; the string below it in the source is its help, the docstring of the class
    that defines it is its group. Bad flags end in one line on stderr and exit code 2.
    """
    script = Path(sys.modules[Args.__module__].__file__)
    about = sys.modules[Args.__module__].__doc__.strip().split("\n\n")[0]
    parser = argparse.ArgumentParser(
        script.name, description=about, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.error = lambda message: fail(message)
    types, left = get_type_hints(Args), {f.name for f in fields(Args)}
    defaults = Args(**Args.presets[Args.preset])
    for cls in [c for c in reversed(Args.__mro__) if "__dataclass_fields__" in vars(c)]:
        group, body = (
            parser.add_argument_group(cls.__doc__),
            ast.parse(textwrap.dedent(inspect.getsource(cls))).body[0].body,
        )
        for node, below in zip(body, body[1:]):
            name = node.target.id if isinstance(node, ast.AnnAssign) else None
            if name not in left:
                continue
            left.remove(name)
            kind, default = types[name], getattr(defaults, name)
            text = below.value.value if isinstance(below, ast.Expr) else ""
            options = {
                "dest": name,
                "default": argparse.SUPPRESS,
                "help": f"{text} [{show(default)}]".replace("%", "%%"),
            }
            inner = [k for k in get_args(kind) if k is not type(None)]
            if kind is bool or bool in inner:
                options["action"] = argparse.BooleanOptionalAction
            elif get_origin(kind) is list:
                options |= {"type": inner[0], "nargs": "+", "metavar": name.upper()}
            elif get_origin(kind) is Literal:
                options["choices"] = inner
            else:
                options |= {"type": inner[0] if inner else kind, "metavar": name.upper()}
            if name == "preset":
                options["choices"] = Args.presets
            group.add_argument("--" + name.replace("_", "-"), **options)
    given = vars(parser.parse_args(argv))
    args = Args(**(Args.presets[given.get("preset", Args.preset)] | given))
    args.out = args.out or f"out/{script.stem}"
    return args


def show(value):
    """A flag's default as one would type it."""
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


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


def setup(args, threads=None) -> Env:
    """Resolves --device and --dtype, joins the processes of torchrun, sets threads. Raises ValueError for a missing device."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    found = torch.accelerator.current_accelerator().type if torch.accelerator.is_available() else "cpu"
    try:
        device = torch.device(found if args.device == "auto" else args.device)
        count = torch.accelerator.device_count() if device.type == found != "cpu" else int(device.type == "cpu")
    except RuntimeError:
        raise ValueError(f"--device {args.device!r} is no device, allowed: auto, cpu, cuda, cuda:1, mps") from None
    if (device.index or 0) >= count:
        raise ValueError(
            f"--device {args.device}: there is none here; found: cpu{'' if found == 'cpu' else ', ' + found}"
        )
    if world > 1:
        if device.type == "cuda":
            device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        if not dist.is_initialized():
            dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")
    if threads:
        torch.set_num_threads(threads)
    bf16 = args.dtype == "bf16" or args.dtype == "auto" and device.type == "cuda"
    return Env(device, torch.bfloat16 if bf16 else torch.float32, rank, world)


# --------------------------------------------------------------------------------------------------------- training


def learning_rate(step, args):
    """Linear warm-up, then a cosine from lr to min_lr * lr over decay_steps."""
    if step < args.warmup:
        return args.lr * (step + 1) / args.warmup
    done = min(1.0, (step - args.warmup) / max(1, (args.decay_steps or args.steps) - args.warmup))
    return args.lr * (args.min_lr + (1 - args.min_lr) * 0.5 * (1 + math.cos(math.pi * done)))


def train(model, batch, args, env, log, evaluate=None, position=0):
    """Trains `model` for args.steps optimizer steps, in place.

    batch     batch(step) -> dict of this rank's (n, T) tensors for `model.forward`: idx, targets, weights, ...; a function
              of the step alone, so that a resumed run sees the same batches. "denom" overrides the sum of the weights.
    log       a `Log`; its path with .pt in place of .jsonl is the checkpoint
    evaluate  evaluate(step) -> dict of numbers, logged every eval_every steps, before the step
    The loss of a step is sum(weights * loss) / sum(weights), both over all micro-batches and ranks.
    """
    model.to(env.device)
    if env.device.type == "cuda" if args.compile is None else args.compile:
        for block in model.blocks:
            block.compile()
    net = parallelise(model, args, env)
    matrices, vectors = ([p for p in model.parameters() if (p.dim() >= 2) == big] for big in (True, False))
    groups = [{"params": matrices, "weight_decay": args.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    opt = torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.95), eps=1e-8, fused=True)
    path, start, seconds, tokens = log.path.with_suffix(".pt"), 0, 0.0, 0
    if args.resume and path.exists():
        state = load_checkpoint(path)
        start, seconds, tokens = state["step"], state["seconds"], state["tokens"]
        restore(model, opt, state, args)
    log.rewind(start)
    bar = tqdm(
        total=args.steps, initial=start, desc=log.run, position=position, disable=env.rank > 0, leave=False,
        mininterval=0.2 if sys.stderr.isatty() else 10,
    )  # fmt: skip
    with interruptible() as stopped:
        for step in range(start, args.steps + 1):
            row, began = {}, time.perf_counter()
            if evaluate and (step % args.eval_every == 0 or step == args.steps):
                row = evaluate(step)
                seconds -= time.perf_counter() - began  # evaluations don't count as training time
            if step == args.steps:
                break
            parts = batch(step)
            n = len(parts["idx"])
            denom = parts.pop("denom", None)
            if denom is None:
                denom = parts["weights"].sum() if "weights" in parts else torch.tensor(float(parts["idx"].numel()))
                denom = all_reduce(denom.to(env.device), env)
            denom = torch.as_tensor(denom, dtype=torch.float32, device=env.device).clamp(min=1.0)
            for group in opt.param_groups:
                group["lr"] = learning_rate(step, args)
            loss, micro = torch.zeros((), device=env.device), args.micro_batch or n
            for i in range(0, n, micro):
                part = {k: v[i : i + micro].to(env.device, non_blocking=True) for k, v in parts.items()}
                last = i + micro >= n
                with env.autocast(), nullcontext() if last or not hasattr(net, "no_sync") else net.no_sync():
                    share = net(**part, denom=denom / env.world)  # DDP and FSDP average over ranks: hence / world
                    share.backward()
                loss += share.detach() / env.world
            torch.nn.utils.clip_grad_norm_(model.parameters(), args.clip)
            opt.step()
            opt.zero_grad(set_to_none=True)
            tokens += parts["idx"].numel() * env.world
            save = (step + 1) % args.save_every == 0 or step + 1 == args.steps or stopped()
            if step % args.log_every == 0 or save:
                value = all_reduce(loss, env).item()
                if not math.isfinite(value):
                    kept = f"the last checkpoint is {path}" if path.exists() else "there is no checkpoint yet"
                    raise SystemExit(f"error: the loss of step {step} is {value}; {kept}; try a smaller --lr")
            seconds += time.perf_counter() - began
            if step % args.log_every == 0:
                row |= {"loss": value, "lr": group["lr"], "tokens": tokens}
                bar.set_postfix(loss=f"{value:.3f}", refresh=False)
            if row:
                log(step, **row, seconds=seconds, tokens_per_s=tokens / seconds)
            if save:
                state = {"step": step + 1, "seconds": seconds, "tokens": tokens, "config": asdict(model.config)}
                save_checkpoint(path, state | full_state(model, opt, args, env), env)
            bar.update()
            if stopped():
                bar.close()
                raise SystemExit(f"stopped at step {step + 1} of {log.run}; --resume goes on from there")
    if row:
        log(args.steps, **row, tokens=tokens, seconds=seconds, tokens_per_s=tokens / max(seconds, 1e-9))
    bar.close()


def parallelise(model, args, env):
    """The model as the training loop calls it: itself, in DDP, or sharded by FSDP2 (parameters kept in place)."""
    if env.world == 1:
        return model
    if args.shard:
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

        policy = MixedPrecisionPolicy(param_dtype=env.dtype, reduce_dtype=torch.float32)
        for block in model.blocks:
            fully_shard(block, mp_policy=policy)
        return fully_shard(model, mp_policy=policy)
    return torch.nn.parallel.DistributedDataParallel(model)


def all_reduce(value, env):
    """The sum of a tensor over ranks."""
    if env.world > 1:
        dist.all_reduce(value)
    return value


@contextmanager
def interruptible():
    """Yields a function: whether Ctrl-C or SIGTERM has come, or the process that started this worker is gone."""
    parent, signals = multiprocessing.parent_process(), []
    old = {s: signal.signal(s, lambda number, frame: signals.append(number)) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: bool(signals) or parent is not None and not parent.is_alive()
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


def side_by_side(function, tasks, jobs):
    """[function(*task) for task in tasks], `jobs` at a time, each in a process of its own; stops them all on Ctrl-C."""
    if jobs <= 1 or len(tasks) <= 1:
        return [function(*task) for task in tasks]
    context = multiprocessing.get_context("spawn")
    lock = context.RLock()
    with ProcessPoolExecutor(min(jobs, len(tasks)), context, tqdm.set_lock, (lock,)) as pool:
        signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))
        futures = [pool.submit(function, *task) for task in tasks]
        try:
            return [f.result() for f in futures]
        except BaseException:
            for process in multiprocessing.active_children():
                process.terminate()
            pool.shutdown(cancel_futures=True)
            raise


# ------------------------------------------------------------------------------------------------------- checkpoints


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
    """The state in a checkpoint of ours, on the CPU. ValueError if it is damaged or holds more than tensors and numbers."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise
    except Exception as error:  # zip, pickle and torch each have their own
        unsafe = "weights_only" in str(error) or "Unsupported" in str(error)
        what = "needs unpickling, which is refused" if unsafe else "is damaged or cut short"
        raise ValueError(f"checkpoint {path} {what}: delete it, or run without --resume") from None


def check_resume(path, config):
    """Raises ValueError if the checkpoint at `path` can't be read or is not of a model of this config."""
    saved, ours = load_checkpoint(path)["config"], asdict(config)
    odd = [f"{k} is {saved.get(k)} there, {ours[k]} here" for k in ours if saved.get(k) != ours[k]]
    if odd:
        raise ValueError(f"checkpoint {path} is of another model: {'; '.join(odd)}")


def restore(model, opt, state, args):
    """Puts a checkpoint's weights and optimizer state in place."""
    if args.shard:
        from torch.distributed.checkpoint.state_dict import StateDictOptions, set_state_dict

        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        set_state_dict(
            model, opt, model_state_dict=state["model"], optim_state_dict=state["optimizer"], options=options
        )
    else:
        model.load_state_dict(state["model"])
        opt.load_state_dict(state["optimizer"])


def full_state(model, opt, args, env):
    """Weights and optimizer state, gathered from all ranks if they are sharded."""
    if args.shard and env.world > 1:
        from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict

        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        weights, moments = get_state_dict(model, opt, options=options)
        return {"model": weights, "optimizer": moments}
    return {"model": model.state_dict(), "optimizer": opt.state_dict()}


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
            rows = [row for row in read_jsonl(self.path) if row["step"] < step]
            write_text(self.path, "".join(json.dumps(row) + "\n" for row in rows))


def read_jsonl(path):
    """The objects of a JSON-lines file; a missing file has none, a torn last line is dropped."""
    rows = []
    for line in Path(path).read_text().splitlines() if Path(path).exists() else []:
        try:
            rows.append(json.loads(line))
        except ValueError:
            break
    return rows


def write_text(path, text):
    """Writes a file whole or not at all."""
    partial = Path(path).with_suffix(".tmp")
    partial.write_text(text)
    os.replace(partial, path)


def claim(id, claim, paper, measured, control, criterion, holds, control_fails):
    """One row of the result: a sentence, the paper's figure, our numbers, and those of the control that must fail."""
    numbers = lambda d: {k: round(float(v), 4) for k, v in d.items()}
    return {"id": id, "claim": claim, "paper": paper, "measured": numbers(measured), "control": numbers(control),
            "criterion": criterion, "holds": bool(holds), "control_fails": bool(control_fails)}  # fmt: skip


def finish(args, env, script, paper, began, claims, metrics, runs=()):
    """Writes metrics.jsonl (the runs' logs, joined) and result.json, prints the table of claims, returns the result."""
    out = Path(args.out)
    if runs:
        rows = [row for run in runs for row in read_jsonl(out / f"{run}.jsonl")]
        write_text(out / "metrics.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    result = {"script": script, "paper": paper, "preset": args.preset, "seeds": args.seeds, "device": str(env.device),
              "seconds": round(time.time() - began, 1), "claims": claims, "metrics": metrics}  # fmt: skip
    write_text(out / "result.json", json.dumps(result, indent=1) + "\n")
    brief = lambda d: "\n".join(f"{k} {v:.3g}" for k, v in d.items())
    table(
        ["claim", "paper", "measured", "control", "holds"],
        [
            (f"{c['id']} {c['claim']}\n  {c['criterion']}", c["paper"], brief(c["measured"]), brief(c["control"]),
             ("yes" if c["holds"] else "NO") + ("" if c["control_fails"] else "\ncontrol does NOT fail"))
            for c in claims
        ],
        [44, 24, 24, 24, 8],
    )  # fmt: skip
    print(f"{out}/result.json, figures beside it; {result['seconds']:.0f} s")
    if args.strict and not all(c["holds"] and c["control_fails"] for c in claims):
        raise SystemExit(1)
    return result


def table(head, rows, widths):
    """Prints a table with wrapped cells."""
    for row in [head, *rows]:
        wrap = lambda cell, w: [
            s for line in str(cell).split("\n") for s in textwrap.wrap(line, w, subsequent_indent="  ")
        ]
        cells = [wrap(cell, w) for cell, w in zip(row, widths)]
        for i in range(max(map(len, cells))):
            print("  ".join((c[i] if i < len(c) else "").ljust(w) for c, w in zip(cells, widths)).rstrip())
        print("-" * (sum(widths) + 2 * len(widths) - 2))


@contextmanager
def figure(path, rows=1, cols=1, size=(5, 3.4)):
    """`with figure("a.png", 1, 2) as (left, right):` draws matplotlib axes and saves them."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    style = {"axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False, "font.size": 9}
    with plt.rc_context(style):
        fig, axes = plt.subplots(
            rows, cols, figsize=(size[0] * cols, size[1] * rows), layout="constrained", squeeze=False
        )
        yield axes.flat[0] if rows * cols == 1 else axes.flat
        fig.savefig(path, dpi=130)
        plt.close(fig)
