"""common.py: flags, the schedule, checkpoints, results; killed and resumed runs; two ranks."""

import copy
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar, Literal

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
    words: list[str] = field(default_factory=lambda: ["a", "b"])
    """some words"""
    kind: Literal["one", "two"] = "one"
    """which"""
    steps: int = 3


# -------------------------------------------------------------------------------------------------------------- flags


def test_flags_presets_and_help(capsys):
    parse = lambda line: common.parse(Args, line.split())
    assert parse("").words == ["a", "b"] and parse("").steps == 3 and parse("").out == "out/test_common"
    big = parse("--preset big --kind two --words u v --compile --lr 2 --out there")
    assert (big.steps, big.words, big.kind, big.compile, big.lr, big.out) == (7, ["u", "v"], "two", True, 2.0, "there")
    assert (
        parse("--preset big --steps 9").steps == 9
        and parse("--no-compile").compile is False
        and parse("").compile is None
    )
    with pytest.raises(SystemExit):
        parse("--help")
    text = " ".join(capsys.readouterr().out.split())
    assert "this test:" in text and "some words [a b]" in text and "optimizer steps [3]" in text
    for line, match in [
        ("--kind six", "'two'"),
        ("--steps x", "--steps"),
        ("--preset no", "big"),
        ("--word x", "--word"),
    ]:
        with pytest.raises(SystemExit) as stop:
            parse(line)
        error = capsys.readouterr().err
        assert stop.value.code == 2 and match in error and error.count("\n") == 1


def test_learning_rate_by_hand():
    args = SimpleNamespace(lr=1.0, min_lr=0.1, warmup=10, steps=110, decay_steps=0)
    rates = [common.learning_rate(step, args) for step in (0, 9, 10, 60, 110, 500)]
    assert rates == pytest.approx([0.1, 1.0, 1.0, 0.55, 0.1, 0.1])
    args.decay_steps = 210
    assert common.learning_rate(110, args) == pytest.approx(0.55)


# -------------------------------------------------------------------------------------------------- checkpoints, logs


def test_checkpoints_are_whole_or_absent(tmp_path, monkeypatch):
    path = tmp_path / "a.pt"
    common.save_checkpoint(path, {"step": 1}, CPU)
    with monkeypatch.context() as m, pytest.raises(RuntimeError):
        m.setattr(torch, "save", lambda state, f: f.write(b"half") and (_ for _ in ()).throw(RuntimeError))
        common.save_checkpoint(path, {"step": 2}, CPU)
    assert common.load_checkpoint(path) == {"step": 1}
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(ValueError, match="damaged or cut short"):
        common.load_checkpoint(path)
    torch.save({"step": Path("x")}, path)
    with pytest.raises(ValueError, match="needs unpickling, which is refused"):
        common.load_checkpoint(path)


def test_log_rewinds_over_a_torn_line(tmp_path):
    log = common.Log(tmp_path, "a-s0")
    for step in range(5):
        log(step, loss=step / 2)
    with open(log.path, "a") as f:
        f.write('{"run": "a-s0", "st')
    log.rewind(3)
    assert common.read_jsonl(log.path) == [{"run": "a-s0", "step": s, "loss": s / 2} for s in range(3)]


def test_run_writes_the_contract(tmp_path, capsys):
    args = Args(out=str(tmp_path), seeds=[0], strict=True)
    run = common.Run(args, CPU, "demo", "1234.5678")
    run.claim("C1", "it works " * 9, "yes", {"us": torch.tensor(1.5)}, {"them": 0.25}, "us > them", True, True)
    result = run.finish()
    assert result == json.loads((tmp_path / "result.json").read_text()) and result["claims"][0]["measured"] == {
        "us": 1.5
    }
    assert "C1 it works" in capsys.readouterr().out
    run.claim("C2", "it flies", "yes", {"us": 0}, {"them": 1}, "us > them", False, True)
    with pytest.raises(SystemExit) as stop:
        run.finish()
    assert stop.value.code == 1


# ----------------------------------------------------------------------------------------------------------- training


def train(tmp_path, poison=None, **flags):
    """Trains a tiny model on random tokens; step `poison` gets an infinite weight."""
    torch.manual_seed(0)
    model, args = GPT(GPTConfig(50, 16, 1, 2, 8)), Args(**dict(steps=6, warmup=2, save_every=2, log_every=1) | flags)

    def batch(step):
        idx = torch.randint(50, (4, 17), generator=torch.Generator().manual_seed(step))
        weights = torch.full((4, 16), float("inf") if step == poison else 1.0)
        return {"idx": idx[:, :-1], "targets": idx[:, 1:], "weights": weights}

    log = common.Log(tmp_path, "tiny-s0", CPU)
    common.train(model, batch, args, CPU, log, evaluate=lambda step: {"score": step})
    return model, log


def test_loss_falls_and_evaluations_are_logged(tmp_path):
    _, log = train(tmp_path, steps=200, lr=1e-2, eval_every=50, log_every=10)
    rows = common.read_jsonl(log.path)
    assert [r["step"] for r in rows if "score" in r] == [0, 50, 100, 150, 200]
    assert rows[0]["loss"] > rows[-2]["loss"] and rows[-1]["tokens"] == 200 * 64


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path):
    with pytest.raises(SystemExit, match=r"loss of step 3 is nan; the last checkpoint is .*tiny-s0\.pt"):
        train(tmp_path, poison=3)
    assert common.load_checkpoint(tmp_path / "tiny-s0.pt")["step"] == 2


def test_micro_batches_and_weights_of_a_step(tmp_path):
    whole, parts = (train(tmp_path, micro_batch=size)[0] for size in (0, 1))
    for a, b in zip(whole.parameters(), parts.parameters()):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


def square(x, y):
    """For the test below: workers import it."""
    return x * x + y, os.getpid()


def test_side_by_side_keeps_the_order():
    results = common.side_by_side(square, [(3, 1), (2, 0), (5, 5)], jobs=2)
    assert [r[0] for r in results] == [10, 4, 30] and os.getpid() not in [r[1] for r in results]
    assert common.side_by_side(square, [(3, 1), (2, 0)], jobs=1) == [(10, os.getpid()), (4, os.getpid())]


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


def start(out, *flags, launcher=()):
    return subprocess.Popen(
        [sys.executable, *launcher, *SCRIPT, "--out", str(out), *flags],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip


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
    while not any(row["step"] >= step for row in common.read_jsonl(log)):
        assert process.poll() is None, process.communicate()[1][-2000:]
        time.sleep(0.01)
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
    [([], signal.SIGKILL, "none", 4), ([], signal.SIGTERM, "any", 7), (["--jobs", "2"], signal.SIGKILL, "any", 2)],
)
def test_killed_and_resumed_is_bit_identical(flags, number, arm, step, tmp_path, uninterrupted):
    process = start(tmp_path, *flags)
    kill_at(process, tmp_path / f"{arm}-s0.jsonl", step, number)
    err = finish(process, -signal.SIGKILL if number == signal.SIGKILL else 1)
    assert number == signal.SIGKILL or "--resume goes on" in err.splitlines()[-1]
    assert not (tmp_path / "result.json").exists()
    if "--jobs" in flags:
        time.sleep(2)  # the workers of a killed parent notice that it is gone
    finish(start(tmp_path, "--resume", *flags))
    assert_same(outcome(tmp_path), uninterrupted)


def test_sigterm_stops_the_workers_where_sigint_is_ignored(tmp_path):
    old = signal.signal(signal.SIGINT, signal.SIG_IGN)  # as a shell does for what it starts in the background
    process = start(tmp_path, "--jobs", "2")
    signal.signal(signal.SIGINT, old)
    kill_at(process, tmp_path / "any-s0.jsonl", 2, signal.SIGTERM)
    assert "--resume goes on" in finish(process, 1)


def test_resume_refuses_another_model(tmp_path, uninterrupted):
    finish(start(tmp_path, "--steps", "3", "--arms", "none"))
    before = (tmp_path / "none-s0.pt").read_bytes()
    err = finish(start(tmp_path, "--resume", "--arms", "none", "--tokenizer", "bpe:300"), 2)
    assert "vocab_size is 896 there, 704 here" in err.splitlines()[-1]
    (tmp_path / "none-s0.pt").write_bytes(before[:1000])
    assert "cut short" in finish(start(tmp_path, "--resume", "--arms", "none"), 2).splitlines()[-1]


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
            torch.testing.assert_close(w, uninterrupted[1][name][k], atol=2e-4, rtol=1e-3)


def test_help_is_quick():
    heavy = "matplotlib", "tiktoken", "datasets", "tokenizers", "gguf", "transformers"
    code = f"import sys, train_hapax; print([m for m in {heavy} if m in sys.modules])"
    run = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert run.stdout.strip() == "[]"


def test_muon_steps_are_orthogonal_and_resume():
    torch.manual_seed(0)
    g = torch.randn(6, 16)
    U, _, Vh = torch.linalg.svd(g, full_matrices=False)
    assert ((common.orthogonal(g) - U @ Vh).norm() / 6**0.5) < 0.35  # singular values between .7 and 1.2, not 1
    model = GPT(GPTConfig(11, 8, 2, 2, 8))
    opt = common.Muon(model, common.parse(common.TrainFlags, []))
    assert sum(len(group["params"]) for group in opt.param_groups) == len(list(model.parameters()))
    idx = torch.randint(11, (2, 8))

    def step(opt):
        opt.zero_grad()
        model.loss(idx, idx).backward()
        opt.step()
        return [p.detach().clone() for p in model.parameters()]

    step(opt)
    weights, state = copy.deepcopy(model.state_dict()), copy.deepcopy(opt.state_dict())
    after = step(opt)
    model.load_state_dict(weights)
    again = common.Muon(model, common.parse(common.TrainFlags, []))
    again.load_state_dict(state)
    assert all(torch.equal(a, b) for a, b in zip(after, step(again)))
