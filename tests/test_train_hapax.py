"""train_hapax.py: the mask against its definition, the measures against hand-computed values, the script end to end."""

import json
import math
import re

import numpy as np
import pytest
import torch
import torch.nn as nn

import common
import train_hapax as hapax
from model import GPT, GPTConfig

torch.set_num_threads(1)
CPU = common.Env(torch.device("cpu"), torch.float32)


def brute(row, rule):
    """The mask of one window by its definition."""
    out = []
    for t in range(1, len(row)):
        before = [i for i in range(1, t) if row[i - 1] == row[t - 1]]
        if rule == "any":
            out.append(any(row[i] == row[t] for i in before))
        else:
            out.append(bool(before))
    return out


def marks(text, rule):
    """The mask of a text of words as a string, one column a token, the first always '.'."""
    words = text.split()
    ids = np.array([[sorted(set(words)).index(w) for w in words]])
    return "." + "".join(".#"[int(m)] for m in hapax.repeated(ids, rule)[0])


@pytest.mark.parametrize(
    "text, any_, offset",
    [
        ("The cat sat nicely The cat sat quietly .", ".....##..", ".....###."),
        ("a a a a", "..##", "..##"),
        ("a b a b", "...#", "...#"),
        ("a b a c a b", ".....#", "...#.#"),
        ("a b c d e f a h", "........", ".......#"),
        ("a b c a b d a b c", "....#..##", "....##.##"),
    ],
)
def test_mask_by_hand(text, any_, offset):
    assert [marks(text, rule) for rule in ("any", "offset")] == [any_, offset]


def test_mask_equals_brute_force():
    rng = np.random.default_rng(0)
    for _ in range(300):
        B, W, V = rng.integers(1, 4), rng.integers(2, 40), rng.integers(1, 9)
        x = rng.integers(0, V, (B, W))
        for rule in "any", "offset":
            assert hapax.repeated(x, rule).tolist() == [brute(row, rule) for row in x]


def test_mask_properties():
    rng = np.random.default_rng(1)
    x = rng.integers(0, 12, (40, 33))
    m = {rule: hapax.repeated(x, rule) for rule in ("any", "offset")}
    assert not (m["any"] & ~m["offset"]).any() and m["any"].sum() < m["offset"].sum()
    for rule in m:
        assert (hapax.repeated(rng.permutation(12)[x], rule) == m[rule]).all()  # names don't matter
        assert (hapax.repeated(x[7:9], rule) == m[rule][7:9]).all()  # nor other rows
        assert (hapax.repeated(x[:, :15], rule) == m[rule][:, :14]).all()  # nor what comes later
        assert (hapax.repeated(torch.from_numpy(x), rule) == m[rule]).all()
        assert not hapax.repeated(np.arange(20)[None], rule).any()
    assert hapax.repeated(np.zeros((1, 20), int)).sum() == 18


def test_long_windows_of_a_large_vocabulary_do_not_wrap():
    W = 131072
    x = np.random.default_rng(2).integers(2**20 - 300, 2**20, (1, W))
    seen, expected = set(), []
    for pair in zip(x[0], x[0, 1:]):
        expected.append(pair in seen)
        seen.add(pair)
    assert hapax.repeated(x)[0].tolist() == expected
    assert hapax.repeated(x.astype(np.int32))[0].tolist() == expected


def test_mask_errors():
    ok = np.zeros((1, 5), int)
    for x, match in [
        (ok[:, :1], "needed: integers \\(B, T"),
        (ok[0], "needed: integers \\(B, T"),
        (ok[:0], "needed: integers"),
        (ok.astype(float), "needed: integers"),
        (ok - 1, "allowed: 0 to"),
        (ok + 2**20, "allowed: 0 to 1048575"),
    ]:
        with pytest.raises(ValueError, match=match):
            hapax.repeated(x)


# -------------------------------------------------------------------------------------------------------------- world


@pytest.fixture(scope="module")
def world():
    rng = np.random.default_rng(0)
    return hapax.World(rng.integers(0, 60, 5000), rng.integers(0, 60, 3000), 60, 59, seed=0)


def test_windows_of_the_toy(world):
    rng = np.random.default_rng(0)
    x = world.abstractive(rng, 50)[:, :129]
    assert x.shape == (50, 129) and not hapax.repeated(x)[:, 2::4].any()  # answers are never masked
    assert (
        (x[:, 0] == world.bos).all()
        and (x[:, 2::4] == world.colon).all()
        and (x[:, 4::4] == world.end).all()
    )
    assert hapax.repeated(x).mean() == 0 and all(len({*row[1::4]}) == 32 for row in x)
    few = hapax.repeated(world.few_label(rng, 200, 0.0)[:, :129])
    assert abs(few.mean() - 0.438) < 0.02 and abs(few[:, 2::4].mean() - 0.875) < 0.01
    for overlap in True, False:
        prompts, answers = world.query(rng, 60, overlap)
        assert prompts.shape == (60, 1 + 5 * 4 + 2)
        assert all((a in row[3:21:4]) == overlap for row, a in zip(prompts, answers))
        pairs = {
            (x, y)
            for row, a in zip(prompts, answers)
            for x, y in [*zip(row[1::4], row[3::4]), (row[-2], a)]
        }
        assert pairs <= {
            (world.inputs[i], task[i]) for task in world.labels for i in range(hapax.INPUTS)
        }
    pairs = world.extractive(rng, 20, 129)
    assert pairs.shape == (20, 129) and all(
        3 <= len({*zip(row[0::3], row[1::3])}) <= 8 for row in pairs
    )


def test_batch_depends_on_the_step_alone(world):
    args = hapax.Args()
    a, b, c = (world.batch(s, 16, 129, args) for s in (3, 4, 3))
    assert (a == c).all() and (a != b).any() and a.shape == (16, 129) and a.max() < world.n_vocab
    assert (a[:, 0] == world.bos).sum() == 4  # of 6 2 2 6: the windows of fixed maps


def test_loss_masks(world):
    x = np.concatenate([world.batch(s, 16, 129, hapax.Args()) for s in range(20)])
    share = hapax.loss_mask("any", x, (0, 0)).mean()
    random = hapax.loss_mask("random", x, (0, 0))
    assert abs(random.mean() - share) < 3 * math.sqrt(share * (1 - share) / random.size)
    assert (random == hapax.loss_mask("random", x, (0, 0))).all()
    assert (random != hapax.loss_mask("random", x, (0, 1))).any()
    assert not hapax.loss_mask("none", x, (0, 0)).any()


def test_masked_targets_have_no_gradient_and_micro_batches_add_up(world):
    args = hapax.Args(steps=1)
    model = GPT(GPTConfig(world.n_vocab, 128, 1, 2, 16))
    x = world.batch(0, 8, 129, args)
    mask = torch.from_numpy(hapax.repeated(x))
    x = torch.from_numpy(x)
    grads = []
    for size in 8, 1, 3:
        model.zero_grad()
        args.micro_batch = size
        parts = {"idx": x[:, :-1], "targets": x[:, 1:], "weights": (~mask).float()}
        loss = common.backward(model, parts, args, CPU)
        grads.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    torch.testing.assert_close(grads[0], grads[1], atol=1e-6, rtol=1e-4)
    torch.testing.assert_close(grads[0], grads[2], atol=1e-6, rtol=1e-4)
    plain = model.loss(x[:, :-1], x[:, 1:].masked_fill(mask, -100))
    torch.testing.assert_close(loss, plain.detach())


# ----------------------------------------------------------------------------------------------------------- measures


class Oracle(nn.Module):
    """A stand-in for a model: copies what followed the latest earlier occurrence of each token (or never does)."""

    def __init__(self, n_vocab, copies=True):
        super().__init__()
        self.wte, self.copies = nn.Embedding(n_vocab, 1), copies

    def hidden(self, idx):
        logits = torch.zeros(*idx.shape, self.wte.num_embeddings)
        for b, row in enumerate(idx.tolist()):
            for t, token in enumerate(row):
                earlier = [i for i in range(t) if row[i] == token]
                if earlier and self.copies:
                    logits[b, t, row[earlier[-1] + 1]] = 9.0
        return logits

    def unembed(self, h):
        return h


def test_repetition_of_oracles():
    rng, alphabet = np.random.default_rng(0), np.arange(5, 60)
    x = hapax.repeats(alphabet, 8, 10, rng)
    assert (
        x.shape == (8, 20)
        and (x[:, :10] == x[:, 10:]).all()
        and all(len({*row}) == 10 for row in x)
    )
    assert hapax.repetition(Oracle(64), x, alphabet) == (1.0, 1.0)
    assert hapax.repetition(Oracle(64, copies=False), x, alphabet)[0] == 0.0


def test_prefix_matching_by_hand():
    s = 5
    sharp = torch.zeros(1, 2, 2 * s, 2 * s)
    for q in range(s, 2 * s):
        sharp[0, 0, q, q - s + 1] = 1
    sharp[0, 1] = (torch.ones(2 * s, 2 * s).tril().T / torch.arange(1, 2 * s + 1)).T
    prefix = hapax.prefix_matching(sharp)
    assert prefix[0] == 1 and torch.isclose(
        prefix[1], torch.tensor([1 / (q + 1) for q in range(s, 2 * s)]).mean()
    )


def test_token_loss_difference():
    loss = np.array([[1.0, 2.0, 0.5, 3.0]])
    assert hapax.token_loss_difference(loss, (0, 0), width=0) == 0
    assert hapax.token_loss_difference(loss, (0, 2), width=0) == 0.5
    assert hapax.token_loss_difference(loss, (1, 3), width=0) == -1
    two = np.array([[1.0, 2.0, 0.5, 3.0], [4.0, 0.0, 0.0, 1.0]])
    counts = np.array([[True, True, True, True], [True, True, True, False]])
    assert hapax.token_loss_difference(two, (0, 3), counts, width=0) == -2
    assert np.isnan(hapax.token_loss_difference(two, (0, 3), ~counts, width=0))


def test_renormalised_by_hand():
    a, b, c, d = range(4)
    x, p = torch.tensor([[a, b, a, c, a, d]]), torch.tensor([0.2, 0.5, 0.2, 0.1])
    loss = hapax.renormalised(p.log().expand(1, 5, 4), x)
    assert (
        abs(loss[0, 4].item() - 1.0986) < 1e-4 and abs(-math.log(0.1) - 2.3026) < 1e-4
    )  # -ln(.1 / (1 - .5 - .2))
    torch.testing.assert_close(loss[0, :2], -p[[b, a]].log())  # nothing was seen before


# ------------------------------------------------------------------------------------------------------------- script


def test_smoke_writes_what_is_promised(tmp_path, capsys):
    result = hapax.main(["--preset", "smoke", "--out", str(tmp_path), "--seeds", "3", "4"])
    assert result == json.loads((tmp_path / "result.json").read_text())
    assert [c["id"] for c in result["claims"]] == ["C1", "C2", "C3", "C4", "C6"]
    for c in result["claims"]:
        assert c["measured"] and c["control"]
        assert isinstance(c["holds"], bool) and isinstance(c["control_fails"], bool)
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert {r["run"] for r in rows} == {f"{arm}-s{s}" for arm in result["metrics"] for s in (3, 4)}
    assert all({"run", "step", "seconds", "tokens_per_s"} <= r.keys() for r in rows)
    first = {r["loss"] for r in rows if r["step"] == 0 and r["run"].startswith("any")}
    assert len(first) == 2  # seeds differ
    shares = {arm: seeds[0]["share_masked"] for arm, seeds in result["metrics"].items()}
    assert shares["none"] == 0 and 0.2 < shares["any"] == pytest.approx(shares["random"], abs=0.02)
    assert (tmp_path / "hapax.png").stat().st_size > 10000 and "C6" in capsys.readouterr().out


def test_the_papers_model_and_data_run(tmp_path):
    flags = "--neox --mix 1 0 0 0 --block-size 512 --steps 2 --batch-size 2 --arms none any random offset"
    result = hapax.main(
        ["--preset", "smoke", "--samples", "4", "--out", str(tmp_path), *flags.split()]
    )
    assert [c["id"] for c in result["claims"]] == [
        "C1",
        "C4",
        "C5",
        "C6",
    ]  # no toy tasks, long windows
    config = hapax.config_of(
        hapax.Args(**hapax.Args.presets["paper"]), hapax.World(None, None, 50277, 0, 0)
    )
    assert round(2 * config.vocab_size * 2048 + 16 * 12 * 2048**2, -7) == 1_010_000_000  # Pythia 1B
    assert (config.parallel, config.rotary_pct, config.block_size) == ("two_norms", 0.25, 2048)


def test_show(tmp_path, capsys):
    flags = [
        "--show",
        "the cat sat. the cat sat!\x1b[2J",
        "--tokenizer",
        "byte",
        "--out",
        str(tmp_path),
    ]
    assert hapax.main(flags) is None
    out = capsys.readouterr().out
    assert "t\x1b[41;97mh\x1b[0m\x1b[41;97me\x1b[0m" in out and "\x1b[2J" not in out
    assert not (tmp_path / "result.json").exists()


def test_show_does_not_tear_characters(tmp_path, capsys):
    hapax.main(["--show", "für 🌍 für", "--tokenizer", "byte", "--out", str(tmp_path)])
    out = capsys.readouterr().out
    assert re.sub("\x1b.*?m", "", out).startswith("für 🌍 für\n")
    assert "f\x1b[41;97mü\x1b[0m\x1b[41;97mr\x1b[0m\n" in out


@pytest.mark.parametrize(
    "flags, match",
    [
        ("--arms any sometimes", "sometimes, allowed: none any"),
        ("--arms any any", "once only"),
        ("--mix 1 2", "four whole numbers"),
        ("--mix 0 1 1 1", "first"),
        ("--n-head 5", "--n-embd 32"),
        ("--label-noise 2", "0 to 1"),
        ("--preset huge", "smoke"),
        ("--steps many", "steps"),
        ("--stepz 5", "stepz"),
        ("--device toaster", "which has"),
        ("--dataset file:/no/such/file", "--dataset: .*/no/such/file"),
        ("--dataset EMPTY", "empty"),
        ("--dataset SHORT --tokenizer byte", "--dataset: .*one window needs 129"),
        ("--tokenizer bpe:3", "257"),
        ("--show x --tokenizer byte", "two tokens"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(flags, match, tmp_path, capsys):
    (tmp_path / "empty.txt").write_text("\n")
    (tmp_path / "short.txt").write_text("too short\n" * 12)
    flags = flags.replace("EMPTY", f"file:{tmp_path}/empty.txt").replace(
        "SHORT", f"file:{tmp_path}/short.txt"
    )
    with pytest.raises(SystemExit) as stop:
        hapax.main(["--preset", "smoke", "--out", str(tmp_path / "out"), *flags.split()])
    error = capsys.readouterr().err.split("\r")[-1].strip().splitlines()
    assert stop.value.code == 2 and error[-1].startswith("error: ") and re.search(match, error[-1])
    assert not list((tmp_path / "out").glob("*.json*"))
