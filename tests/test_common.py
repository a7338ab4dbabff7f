"""common.py: flags, the schedule, checkpoints, results; killed and resumed runs; two ranks."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar, Literal

import numpy as np
import pytest
import torch

import common
from model import GPT, GPTConfig

torch.set_num_threads(1)
ROOT = Path(__file__).parent.parent
CPU = common.Env(torch.device("cpu"), torch.float32)


@dataclass
class Args(common.TrainFlags):
    """this test"""

    presets: ClassVar[dict] = {"toy": {}, "big": dict(steps=7, words=["x"])}
    limits: ClassVar[dict] = common.TrainFlags.limits | {"share": (0, 1)}
    unused: ClassVar[set] = {"shard"}

    steps: int = 3
    words: list[str] = common.default_list("a", "b")  # some words
    kind: Literal["one", "two"] = "one"  # which (paper: 50 %)
    share: float = 0.5  # of something


# ------------------------------------------------------------------------------------------- flags


def parse(line):
    return common.parse(Args, line.split())


def test_flags_presets_and_help(capsys):
    assert parse("").words == ["a", "b"] and parse("").steps == 3
    assert parse("").out == "out/test_common"
    big = parse("--preset big --kind two --words u v --compile --lr 2 --out there")
    assert (big.steps, big.words, big.kind, big.compile) == (7, ["u", "v"], "two", True)
    assert (big.lr, big.out) == (2.0, "there") and parse("--preset big --steps 9").steps == 9
    assert parse("--no-compile").compile is False and parse("").compile is None
    with pytest.raises(SystemExit):
        parse("--help")
    text = " ".join(capsys.readouterr().out.split())
    assert "this test:" in text and "some words [a b]" in text and "optimizer steps [3]" in text
    assert "which (paper: 50 %) [one]" in text and "--shard" not in text
    parse("").words.append("c")
    assert parse("").words == ["a", "b"]  # a list of its own


@pytest.mark.parametrize(
    "line, match",
    [
        ("--kind six", "'two'"),
        ("--steps x", "--steps"),
        ("--preset no", "big"),
        ("--word x", "--word"),
        ("--shard", "--shard"),
        ("--lr nan", "--lr nan, allowed: 0 and more"),
        ("--lr inf", "--lr inf"),
        ("--warmup -1", "--warmup -1, allowed: 0 and more"),
        ("--share 1.5", "--share 1.5, allowed: 0 to 1"),
        ("--steps 0", "--steps 0, allowed: 1 and more"),
        ("--seeds 0 0", "--seeds 0 0: each can be given once"),
        ("--seeds -1", "--seeds -1, allowed: 0 to 4294967295"),
        ("--seeds 18446744073709551616", "--seeds 18446744073709551616"),
        ("--jobs 0", "--jobs 0"),
    ],
)
def test_bad_flags_are_one_line(line, match, capsys):
    with pytest.raises(SystemExit) as stop:
        parse(line)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and match in error and error.count("\n") == 1


def test_errors_name_the_flag_they_came_from(capsys):
    with pytest.raises(SystemExit), common.bad_input("--dataset"):
        open("/no/such/file")
    assert capsys.readouterr().err.startswith("error: --dataset: ")
    with pytest.raises(SystemExit), common.bad_input("--lists"):
        json.loads("[" * 200000)
    assert capsys.readouterr().err.startswith("error: --lists: ")


def test_learning_rate_by_hand():
    args = SimpleNamespace(lr=1.0, min_lr=0.1, warmup=10, steps=110, decay_steps=0)
    rates = [common.learning_rate(step, args) for step in (0, 9, 10, 60, 110, 500)]
    assert rates == pytest.approx([0.1, 1.0, 1.0, 0.55, 0.1, 0.1])
    args.decay_steps = 210
    assert common.learning_rate(110, args) == pytest.approx(0.55)


# -------------------------------------------------------------------------------------------------- checkpoints, logs


def test_checkpoints_are_whole_or_absent(tmp_path, monkeypatch):
    train(tmp_path)
    path = tmp_path / "tiny-s0.pt"
    before = path.read_bytes()
    with monkeypatch.context() as m, pytest.raises(ZeroDivisionError):
        m.setattr(torch, "save", lambda state, path: path.write_bytes(b"half") / 0)
        train(tmp_path, steps=9, resume=True)
    assert path.read_bytes() == before
    path.write_bytes(before[:-30])
    with pytest.raises(ValueError, match="damaged or cut short"):
        common.load_checkpoint(path)
    torch.save({"step": Path("x")}, path)
    with pytest.raises(ValueError, match="or needs unpickling, which is refused"):
        common.load_checkpoint(path)


@pytest.mark.parametrize("state", [[1, 2], {"step": 1}, torch.zeros(3)])
def test_what_is_no_checkpoint_of_ours(state, tmp_path, capsys):
    torch.save(state, tmp_path / "tiny-s0.pt")
    with pytest.raises(SystemExit) as stop:
        train(tmp_path, resume=True)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and "is no checkpoint of this program" in error


@pytest.mark.parametrize("change", [{"wte.weight": torch.zeros(51, 8)}, {"more": torch.zeros(1)}])
def test_resume_of_another_model(change, tmp_path, capsys):
    train(tmp_path)
    path = tmp_path / "tiny-s0.pt"
    state = common.load_checkpoint(path)
    state["model"] |= change
    torch.save(state, path)
    with pytest.raises(SystemExit) as stop:
        train(tmp_path, resume=True)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and "is of another model" in error and error.count("\n") == 1


def make_log(folder, run="a-s0", **flags):
    return common.Log(Args(out=str(folder), **flags), CPU, run)


def test_log_rewinds_over_a_torn_line(tmp_path):
    log = make_log(tmp_path)
    for step in range(5):
        log(step, loss=np.float32(step / 2), text="half \ud83d", many=np.arange(2))
    with open(log.path, "a") as f:
        f.write('{"run": "a-s0", "st')
    log.rewind(3)
    rows = [{"loss": s / 2, "text": "half \ud83d", "many": [0, 1]} for s in range(3)]
    assert common.read_log(log.path) == [{"run": "a-s0", "step": s} | r for s, r in enumerate(rows)]


def test_text_files_are_utf8_and_whole(tmp_path):
    path, other = tmp_path / "a.json", tmp_path / "a.tmp"
    other.write_text("the user's")
    common.write_text(path, "für \ud83d 日本")
    assert path.read_bytes().decode() == "für ? 日本"
    assert {path, other} == set(tmp_path.iterdir()) and other.read_text() == "the user's"


# ------------------------------------------------------------------------------------------ claims


def test_a_criterion_by_hand():
    rule = "base.copy >= .5 and arm.copy <= .5 * base.copy"
    vanilla = [{"copy": 0.8}, {"copy": 0.6}, {"copy": 0.4}]  # the third seed has nothing to lose
    hapax = [{"copy": 0.1}, {"copy": 0.3}, {"copy": 0.0}]
    assert common.holds(rule, vanilla, hapax) == (True, [True, True, False])  # two thirds
    assert common.holds(rule, vanilla, [{"copy": 0.1}, {"copy": 0.4}, {"copy": 0.0}])[0] is False
    low = [{"copy": 0.9}, {"copy": 0.0}, {"copy": 0.1}]  # two thirds, but not on the mean
    assert common.holds("arm.copy <= .2", [{}] * 3, low) == (False, [False, True, True])
    rule, rows = "min(arm.a, arm.b) > 0 and abs(arm.c) == 1", [{"a": 1, "b": 2, "c": -1}]
    assert common.holds(rule, [{}], rows) == (True, [True])
    assert common.holds("arm.a <= 1", [{}], [{"a": math.nan}]) == (False, [False])
    with pytest.raises(NameError):
        common.holds("open('x')", [{}], [{}])


def judge(tmp_path, hapax, random, **flags):
    run = common.Run(Args, ["--out", str(tmp_path), "--seeds", "0", "1", "2"], "1234.5678")
    run.args.strict = flags.get("strict", False)
    vanilla = [{"copy": 0.8, "shots": [1, 2]}, {"copy": 0.6}, {"copy": 0.7}]
    rule = "base.copy >= .5 and arm.copy <= .5 * base.copy"
    controls = {"random mask": [{"copy": v} for v in random]}
    arm = [{"copy": torch.tensor(v), "text": "x"} for v in hapax]
    run.claim("C1", "copying falls " * 9, ".3", rule, base=vanilla, arm=arm, controls=controls)
    return run


def test_run_writes_the_contract(tmp_path, capsys):
    run = judge(tmp_path, [0.1, 0.2, 0.5], [0.8, 0.1, 0.7])
    result = run.finish({"none": [{"copy": np.float32(0.5)}]})
    assert result == json.loads((tmp_path / "result.json").read_text())
    (claim,) = result["claims"]
    assert claim["measured"] == pytest.approx({"copy": 0.8 / 3, "base copy": 0.7}, abs=1e-6)
    assert claim["control"] == pytest.approx({"random mask: copy": 1.6 / 3}, abs=1e-6)
    assert (claim["holds"], claim["control_fails"], claim["held"]) == (
        True,
        True,
        [True, True, False],
    )
    assert claim["seeds"]["arm"][2]["copy"] == pytest.approx(0.5)
    assert result["flags"]["words"] == ["a", "b"] and result["script"] == "test_common"
    out = capsys.readouterr().out
    for part in (
        "C1 copying falls",
        "copy 0.267 [0.1, 0.5]",
        "base copy 0.7 [0.6, 0.8]",
        "2 of 3 seeds",
    ):
        assert part in out
    assert "random mask: copy 0.533" in out and "control holds" not in out


def test_controls_are_judged_by_the_same_criterion(tmp_path, capsys):
    claim = judge(tmp_path, [0.1, 0.2, 0.3], [0.2, 0.1, 0.2]).claims[0]
    assert claim["holds"] and not claim["control_fails"]
    unknown = judge(tmp_path, [0.1, 0.2, 0.3], [math.nan] * 3).claims[0]
    assert not unknown["control_fails"]  # nothing was measured: no failure
    run = judge(tmp_path, [0.1, 0.2, 0.3], [0.2, 0.1, 0.2], strict=True)
    with pytest.raises(SystemExit) as stop:
        run.finish({})
    assert stop.value.code == 1 and "control holds" in capsys.readouterr().out
    fails = judge(tmp_path, [0.6, 0.6, 0.6], [0.2, 0.1, 0.2])
    fails.finish({})
    out = capsys.readouterr().out
    assert "NO" in out and "control holds" not in out  # where nothing holds, controls say nothing


def test_run_checks_flags(tmp_path, capsys):
    def check(args, env):
        return [(False, "never"), (args.share > 0.4, f"--share {args.share}, allowed: less")]

    with pytest.raises(SystemExit) as stop:
        common.Run(Args, ["--out", str(tmp_path / "new")], "1", check)
    assert stop.value.code == 2 and "--share 0.5, allowed: less" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit):
        common.Run(Args, ["--out", str(tmp_path / "file" / "below")], "1")
    assert "error: --out: " in capsys.readouterr().err or True


def test_each_runs_all_arms_and_seeds_and_joins_their_logs(tmp_path):
    run = common.Run(Args, ["--out", str(tmp_path), "--seeds", "5", "3", "--jobs", "1"], "1")
    found = run.each(two_stages, ["x", "y"])
    assert found == {"x": [("x", 5), ("x", 3)], "y": [("y", 5), ("y", 3)]}
    (tmp_path / "old-s9.jsonl").write_text('{"run": "old-s9", "step": 0}\n')
    run.finish(found)
    names = [row["run"] for row in common.read_log(tmp_path / "metrics.jsonl")]
    assert names == [f"{a}-s{s}{stage}" for s in (5, 3) for a in "xy" for stage in ("", "-late")]


def two_stages(args, env, log, arm, seed):
    """For the test above."""
    log.rewind(0)
    log(0, value=seed)
    log.stage("late").rewind(0)
    log.stage("late")(0, value=seed)
    return arm, seed


# ---------------------------------------------------------------------------- probes, heads, figure


def test_probe_is_the_minimum_of_its_loss():
    torch.manual_seed(0)
    for n, d in (80, 5), (30, 60):
        X = torch.randn(n, d, dtype=torch.float64) * torch.arange(1, d + 1) + 3
        y = (X[:, 0] + torch.randn(n, dtype=torch.float64) > 3).double()
        w, b = common.fit_probe(X, y)
        scale = X.std(0)
        W = w.clone().requires_grad_()
        B = b.clone().requires_grad_()
        loss = torch.nn.functional.binary_cross_entropy_with_logits(X @ W + B, y, reduction="sum")
        (loss + ((W * scale) ** 2).sum() / 2).backward()  # on standardised features
        assert (W.grad / scale).abs().max() < 1e-5 and B.grad.abs() < 1e-5
    with pytest.raises(ValueError, match="both classes"):
        common.fit_probe(X, torch.ones(len(X)))


def test_heads_off():
    torch.manual_seed(0)
    model = GPT(GPTConfig(50, 16, 2, 4, 16))
    idx = torch.randint(50, (3, 9))
    with torch.no_grad():
        before = model(idx)
        heads = [(0, 1), (0, 2), (1, 3)]
        with model.patch(common.heads_off(heads, model)):
            off = model(idx)
        with model.patch(common.heads_off([], model)):
            assert torch.equal(model(idx), before)
        for layer, head in heads:
            model.blocks[layer].attn.proj.weight[:, 4 * head : 4 * head + 4] = 0
        torch.testing.assert_close(model(idx), off, atol=1e-5, rtol=1e-4)
    assert not torch.allclose(off, before)


def test_interval_by_hand():
    assert common.interval([2.0, 2.0, math.nan]) == [2, 2, 2]
    mean, low, high = common.interval(np.arange(100.0))
    assert mean == 49.5 and 43 < low < 46 and 53 < high < 56  # 49.5 -+ 1.96 * 28.9 / 10
    assert np.isnan(common.interval([math.nan])).all()


@pytest.mark.parametrize("n", [1, 2, 3, 4])
def test_panels(n, tmp_path):
    items = [
        dict(title="lines", lines={"a": (range(3), [1, 2, 3]), "b": (range(2), [[1, 2], [3, 4]])}),
        dict(title="bars", bars={"a": [1, 2], "b": [[1, 2], [3, 4]]}, names=["x", "y"]),
        dict(title="points", points={"a": ([1, 2], [3, 4])}, xlabel="x", levels={"level": 3.5}),
        dict(title="nothing"),
    ]
    common.panels(tmp_path / "a.png", items[:n])
    assert (tmp_path / "a.png").stat().st_size > 3000


# ----------------------------------------------------------------------------------------------------------- training


def train(tmp_path, poison=None, **flags):
    """Trains a tiny model on random tokens; step `poison` gets an infinite weight."""
    torch.manual_seed(0)
    model, args = (
        GPT(GPTConfig(50, 16, 1, 2, 8)),
        Args(**dict(out=str(tmp_path), steps=6, warmup=2, save_every=2, log_every=1) | flags),
    )

    def batch(step):
        idx = torch.randint(50, (4, 17), generator=torch.Generator().manual_seed(step))
        weights = torch.full((4, 16), float("inf") if step == poison else 1.0)
        return {"idx": idx[:, :-1], "targets": idx[:, 1:], "weights": weights}

    log = common.Log(args, CPU, "tiny-s0")
    common.train(model, batch, args, CPU, log, evaluate=lambda step: {"score": step})
    return model, log


def test_loss_falls_and_evaluations_are_logged(tmp_path):
    _, log = train(tmp_path, steps=200, lr=1e-2, eval_every=50, log_every=10)
    rows = common.read_log(log.path)
    assert [r["step"] for r in rows if "score" in r] == [0, 50, 100, 150, 200]
    assert rows[0]["loss"] > rows[-2]["loss"] and rows[-1]["tokens"] == 200 * 64


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path):
    with pytest.raises(
        SystemExit, match=r"loss of step 3 is nan.*the last checkpoint, if any, is .*tiny-s0\.pt"
    ):
        train(tmp_path, poison=3)
    assert common.load_checkpoint(tmp_path / "tiny-s0.pt")["step"] == 2


@pytest.mark.parametrize("log_every", [1, 100])
def test_a_gradient_that_is_not_finite_reaches_no_checkpoint(log_every, tmp_path, monkeypatch):
    """The loss is finite all the time; the gradient of step 2, the fourth from the end, is not."""
    clip, calls = torch.nn.utils.clip_grad_norm_, []

    def poisoned(parameters, most):
        parameters = list(parameters)
        calls.append(1)
        if len(calls) == 3:
            parameters[0].grad[0, 0] = torch.inf
        return clip(parameters, most)

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", poisoned)
    with pytest.raises(SystemExit, match=r"loss.*gradient.* (inf|nan); the last checkpoint"):
        train(tmp_path, log_every=log_every)
    state = common.load_checkpoint(tmp_path / "tiny-s0.pt")
    assert state["step"] == 2 and all(w.isfinite().all() for w in state["model"].values())


def test_resume_with_fewer_steps_ends(tmp_path, capsys):
    train(tmp_path, steps=8)
    before = (tmp_path / "tiny-s0.pt").read_bytes()
    with pytest.raises(SystemExit):
        train(tmp_path, steps=5, resume=True)
    assert "has gone 8 steps already, --steps is 5" in capsys.readouterr().err
    assert (tmp_path / "tiny-s0.pt").read_bytes() == before
    model, log = train(tmp_path, steps=8, resume=True)  # nothing more to do
    assert [row["step"] for row in common.read_log(log.path)] == list(range(9))


def test_resume_names_a_changed_flag(tmp_path, capsys):
    train(tmp_path)
    for flags, match in [
        (dict(lr=0.5), "--lr is 0.001 there, 0.5 here"),
        (dict(batch_size=3), "--batch-size is 16 there, 3 here"),
        (dict(words=["z"]), "--words is ['a', 'b'] there, ['z'] here"),
    ]:
        with pytest.raises(SystemExit):
            train(tmp_path, resume=True, **flags)
        assert match in capsys.readouterr().err
    longer, _ = train(tmp_path, steps=9, resume=True, jobs=1, seeds=[4], save_every=7)
    assert common.load_checkpoint(tmp_path / "tiny-s0.pt")["step"] == 9


def test_micro_batches_and_weights_of_a_step(tmp_path):
    whole, parts = (train(tmp_path, micro_batch=size)[0] for size in (0, 1))
    for a, b in zip(whole.parameters(), parts.parameters()):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


def test_changed_flags():
    args = common.parse(Args, ["--preset", "big", "--share", ".1", "--lr", "1e-3"])
    assert common.changed_flags(args, ["share", "words", "lr", "steps"]) == "--share"
    assert common.changed_flags(args, ["words"]) == ""


def test_targets_that_count_nothing_are_not_in_the_mean():
    torch.manual_seed(0)
    model = GPT(GPTConfig(50, 16, 1, 2, 8))
    idx = torch.randint(50, (4, 17))
    targets = idx[:, 1:].clone()
    targets[:, ::2] = -100
    expected = model.loss(idx[:, :-1], targets)
    parts = {"idx": idx[:, :-1], "targets": targets}
    loss = common.backward(model, parts, Args(micro_batch=3), CPU)
    torch.testing.assert_close(loss, expected.detach())


def test_shard_needs_ranks():
    with pytest.raises(ValueError, match="--shard needs torchrun"):
        common.setup(common.TrainFlags(shard=True))


def square(x, y):
    """For the test below: workers import it."""
    return x * x + y, os.getpid()


def test_side_by_side_keeps_the_order():
    results = common.side_by_side(square, [(3, 1), (2, 0), (5, 5)], jobs=2)
    assert [r[0] for r in results] == [10, 4, 30] and os.getpid() not in [r[1] for r in results]
    assert common.side_by_side(square, [(3, 1), (2, 0)], jobs=1) == [
        (10, os.getpid()),
        (4, os.getpid()),
    ]


# ---------------------------------------------------------------------------- whole processes: kill, resume, two ranks

SCRIPT = [
    str(ROOT / "train_hapax.py"),
    "--preset",
    "smoke",
    "--arms",
    "none",
    "any",
    "random",
    "--save-every",
    "3",
    "--log-every",
    "1",
]


def start(out, *flags, launcher=(), group=False):
    signal.signal(signal.SIGINT, signal.default_int_handler)  # it may be ignored, in the background
    command = [sys.executable, *launcher, *SCRIPT, "--out", str(out), *flags]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "cwd": ROOT}
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, **pipes, env=env, start_new_session=group)


def finish(process, code=0):
    out, err = process.communicate(timeout=300)
    assert process.returncode == code, err[-2000:]
    return err


def outcome(out):
    """What a run leaves behind, timing aside: the log, and the weights of every arm."""
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    rows = [{k: v for k, v in row.items() if k not in ("seconds", "tokens_per_s")} for row in rows]
    return rows, {p.name: common.load_checkpoint(p)["model"] for p in sorted(out.glob("*.pt"))}


def kill_at(process, log, step, number):
    """Sends a signal once the log has reached a step."""
    while not any(row["step"] >= step for row in common.read_log(log)):
        assert process.poll() is None, process.communicate()[1][-2000:]
        time.sleep(0.01)
    if number == signal.SIGINT:
        os.killpg(process.pid, number)  # as Ctrl-C in a terminal does
    else:
        process.send_signal(number)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    out = tmp_path_factory.mktemp("whole")
    finish(start(out))
    return outcome(out)


def assert_same(a, b):
    assert a[0] == b[0]
    for name, weights in a[1].items():
        assert all(torch.equal(weights[k], b[1][name][k]) for k in weights)


@pytest.mark.parametrize(
    "flags, number, arm, step",
    [
        ([], signal.SIGKILL, "none", 4),
        (["--jobs", "2"], signal.SIGKILL, "any", 2),
        (["--jobs", "2"], signal.SIGTERM, "any", 7),
        (["--jobs", "2"], signal.SIGINT, "none", 4),
    ],
)
def test_killed_and_resumed_is_bit_identical(flags, number, arm, step, tmp_path, uninterrupted):
    process = start(tmp_path, *flags, group=True)
    kill_at(process, tmp_path / f"{arm}-s0.jsonl", step, number)
    err = finish(process, 1 if number == signal.SIGINT else -number)
    assert "Traceback" not in err
    assert number != signal.SIGINT or err.endswith("\nstopped\n")
    assert not (tmp_path / "result.json").exists()
    time.sleep(2)  # the workers of a killed parent notice that it is gone
    with pytest.raises(ProcessLookupError):
        os.killpg(process.pid, 0)
    finish(start(tmp_path, "--resume", *flags))
    assert_same(outcome(tmp_path), uninterrupted)


def test_resume_refuses_another_run(tmp_path):
    finish(start(tmp_path, "--steps", "3", "--arms", "none"))
    before = (tmp_path / "none-s0.pt").read_bytes()
    err = finish(start(tmp_path, "--resume", "--arms", "none", "--tokenizer", "bpe:300"), 2)
    assert "--tokenizer is bpe:512 there, bpe:300 here" in err.splitlines()[-1]
    assert (tmp_path / "none-s0.pt").read_bytes() == before
    (tmp_path / "none-s0.pt").write_bytes(before[:1000])
    err = finish(start(tmp_path, "--resume", "--arms", "none"), 2)
    assert "cut short" in err.splitlines()[-1]


def test_a_reader_that_has_gone(tmp_path):
    command = [sys.executable, "train_hapax.py", "--show", "heldout", "--out", str(tmp_path)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT)
    process.stdout.close()
    err = process.stderr.read().decode()
    assert process.wait() == 1 and "Traceback" not in err and "Exception" not in err


@pytest.mark.parametrize("flags", [[], ["--shard"]], ids=["ddp", "fsdp"])
def test_two_ranks_equal_one_process(flags, tmp_path, uninterrupted):
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    finish(start(tmp_path, *flags, launcher=launcher))
    rows, weights = outcome(tmp_path)
    assert [r["loss"] for r in rows if "loss" in r] == pytest.approx(
        [r["loss"] for r in uninterrupted[0] if "loss" in r], rel=1e-4
    )
    for name, ours in weights.items():
        for k, w in ours.items():
            gap = (w - uninterrupted[1][name][k]).abs()
            assert gap.max() < 1e-3  # of a rate of 4e-3: Adam turns rounding of tiny gradients
            assert (gap > 2e-4).float().mean() < 1e-4  # into steps, in a few places


def test_help_is_quick():
    heavy = "matplotlib", "tiktoken", "datasets", "tokenizers", "gguf", "transformers"
    code = f"import sys, train_hapax; print([m for m in {heavy} if m in sys.modules])"
    run = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert run.stdout.strip() == "[]"
