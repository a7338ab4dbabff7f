"""train_hapax.py: the mask against its definition, the measures against hand-computed values, the script end to end."""

import json
import math
import re

import numpy as np
import pytest
import torch
import torch.nn as nn

import legacy as common
import data
import train_hapax as hapax
from model import GPT, GPTConfig

torch.set_num_threads(1)
RULES = ["any", "latest", "offset", "repeat"]


def brute(row, rule, n=2, docs=None):
    """The mask of one window by its definition."""
    out, docs = [], [0] * len(row) if docs is None else docs
    for t in range(1, len(row)):
        before = [i for i in range(1, t) if row[i - 1] == row[t - 1] and docs[i - 1] == docs[t - 1]]
        grams = [
            i for i in range(n - 1, t) if all(row[i - k] == row[t - k] and docs[i - k] == docs[t] for k in range(n))
        ]
        if docs[t - 1] != docs[t]:
            out.append(False)
        elif rule == "any":
            out.append(t >= n - 1 and len({*docs[t - n + 1 : t + 1]}) == 1 and bool(grams))
        elif rule == "latest":
            out.append(bool(before) and row[before[-1]] == row[t] and docs[before[-1]] == docs[t])
        elif rule == "offset":
            out.append(any(row[i] == row[t - 1] and docs[i] == docs[t - 1] for i in range(t - 1)))
        else:
            out.append(any(row[i] == row[t] and docs[i] == docs[t] for i in range(t)))
    return out


def marks(text, rule, n=2, docs=None):
    """The mask of a text of words as a string, one column a token, the first always '.'."""
    words = text.split()
    ids = np.array([[sorted(set(words)).index(w) for w in words]])
    docs = None if docs is None else np.array([docs])
    return "." + "".join(".#"[int(m)] for m in hapax.repeated(ids, rule, 100, n, docs)[0])


@pytest.mark.parametrize(
    "text, any_, latest, offset, repeat, any3",
    [
        ("The cat sat nicely The cat sat quietly .", ".....##..", ".....##..", ".....###.", "....###..", "......#.."),
        ("a a a a", "..##", "..##", "..##", ".###", "...#"),
        ("a b a b", "...#", "...#", "...#", "..##", "...."),
        ("a b a c a b", ".....#", "......", "...#.#", "..#.##", "......"),
        ("a b c d e f a h", "........", "........", ".......#", "......#.", "........"),
        ("a b c a b d a b c", "....#..##", "....#..#.", "....##.##", "...##.###", "........#"),
    ],
)
def test_mask_by_hand(text, any_, latest, offset, repeat, any3):
    assert [marks(text, r) for r in RULES] == [any_, latest, offset, repeat]
    assert marks(text, "any", 3) == any3


def test_document_traps():
    assert marks("a b a b", "any", docs=[0, 1, 1, 1]) == "...."  # the straddling pair is no earlier occurrence
    text, docs = "a E a b E a b", [0, 1, 1, 1, 2, 2, 2]
    assert marks(text, "any", docs=docs) == "......." and marks(text, "any") == ".....##"


@pytest.mark.parametrize("tensor", [lambda x: x, torch.from_numpy], ids=["numpy", "torch"])
def test_mask_equals_brute_force(tensor):
    rng = np.random.default_rng(0)
    for _ in range(150):
        B, W, V = rng.integers(1, 4), rng.integers(2, 40), rng.integers(1, 9)
        x, docs = rng.integers(0, V, (B, W)), np.sort(rng.integers(0, 3, (B, W)), 1) if rng.random() < 0.5 else None
        for rule, n in [(r, 2) for r in RULES] + [("any", 3), ("any", 4)]:
            if n <= W:
                mask = hapax.copies(tensor(x), rule, 9, n, docs if docs is None else tensor(docs))
                expected = [brute(row, rule, n, None if docs is None else docs[i]) for i, row in enumerate(x)]
                assert mask.tolist() == expected, (rule, n, x, docs)


def test_mask_properties():
    rng = np.random.default_rng(1)
    x = rng.integers(0, 12, (40, 33))
    m = {rule: hapax.repeated(x, rule, 12) for rule in RULES} | {n: hapax.repeated(x, "any", 12, n) for n in (3, 4)}
    for small, large in ("latest", "any"), ("any", "offset"), ("any", "repeat"), (3, "any"), (4, 3):
        assert not (m[small] & ~m[large]).any() and m[small].sum() < m[large].sum()
    for rule in RULES:
        assert (hapax.repeated(rng.permutation(12)[x], rule, 12) == m[rule]).all()  # names of tokens don't matter
        assert (hapax.repeated(x[7:9], rule, 12) == m[rule][7:9]).all()  # nor other rows
        assert (hapax.repeated(x[:, :15], rule, 12) == m[rule][:, :14]).all()  # nor what comes later
        assert not hapax.repeated(np.arange(20)[None], rule).any()
    assert hapax.repeated(np.zeros((1, 20), int)).sum() == 18
    assert torch.equal(hapax.repeated(torch.from_numpy(x)), torch.from_numpy(m["any"]))


def test_long_windows_of_a_large_vocabulary_do_not_wrap():
    rng, W = np.random.default_rng(2), 131072
    x = rng.integers(2**18 - 300, 2**18, (1, W))
    docs = np.sort(rng.integers(0, 64, (1, W)), 1)
    seen, expected = set(), []
    for t in range(1, W):
        key = (docs[0, t], x[0, t - 1], x[0, t])
        expected.append(docs[0, t] == docs[0, t - 1] and key in seen)
        if docs[0, t] == docs[0, t - 1]:
            seen.add(key)
    assert hapax.repeated(x, docs=docs)[0].tolist() == expected


def test_thresholded():
    x = torch.from_numpy(np.random.default_rng(3).integers(0, 6, (5, 30)))
    assert torch.equal(hapax.thresholded(x, torch.eye(6), 1.0), hapax.repeated(x))
    assert (hapax.thresholded(x, torch.randn(6, 4), -1.0).sum(1) == 28).all()  # every target t >= 2
    shares = [
        hapax.thresholded(x, torch.randn(6, 4, generator=torch.Generator().manual_seed(0)), tau)
        for tau in (-0.5, 0.3, 0.9)
    ]
    assert (
        not (shares[1] & ~shares[0]).any()
        and not (shares[2] & ~shares[1]).any()
        and not (hapax.repeated(x) & ~shares[2]).any()
    )


def test_mask_errors():
    ok = np.zeros((1, 5), int)
    for args, match in [
        ((ok[:, :1],), "needed: \\(B, T"),
        ((ok[0],), "needed: \\(B, T"),
        ((ok.astype(float),), "integers"),
        ((ok - 1,), "allowed: 0 to"),
        ((ok + 9, "any", 9), "allowed: 0 to 8"),
        ((ok, "none"), "allowed: any"),
        ((ok, "any", 9, 1), "--min-n 1"),
    ]:
        with pytest.raises(ValueError, match=match):
            hapax.repeated(*args)


# -------------------------------------------------------------------------------------------------------------- world


@pytest.fixture(scope="module")
def world():
    rng = np.random.default_rng(0)
    return hapax.World(rng.integers(0, 60, 5000), rng.integers(0, 60, 3000), 60, 59, sep=True, seed=0)


def test_windows_of_the_toy(world):
    rng = np.random.default_rng(0)
    x = world.abstractive(rng, 50)[:, :129]
    assert x.shape == (50, 129) and not hapax.repeated(x)[:, 2::4].any()  # answers are never masked
    assert (x[:, 0] == world.bos).all() and (x[:, 2::4] == world.colon).all() and (x[:, 4::4] == world.end).all()
    assert hapax.repeated(x).mean() == 0 and all(len({*row[1::4]}) == 32 for row in x)
    few = hapax.repeated(world.few_label(rng, 200, 0.0)[:, :129])
    assert abs(few.mean() - 0.438) < 0.02 and abs(few[:, 2::4].mean() - 0.875) < 0.01
    for overlap in True, False:
        prompts, answers = world.query(rng, 60, 5, overlap)
        assert prompts.shape == (60, 1 + 5 * 4 + 2)
        assert all((a in row[3:21:4]) == overlap for row, a in zip(prompts, answers))
        pairs = {(x, y) for row, a in zip(prompts, answers) for x, y in [*zip(row[1::4], row[3::4]), (row[-2], a)]}
        assert pairs <= {(world.inputs[i], task[i]) for task in world.labels for i in range(hapax.INPUTS)}
    pairs = world.extractive(rng, 20, 129)
    assert pairs.shape == (20, 129) and all(3 <= len({*zip(row[0::3], row[1::3])}) <= 8 for row in pairs)


def test_batch_depends_on_the_step_alone(world):
    args = hapax.Args()
    a, b, c = (world.batch(s, 16, 129, args) for s in (3, 4, 3))
    assert torch.equal(a, c) and not torch.equal(a, b) and a.shape == (16, 129) and a.max() < world.n_vocab
    assert (a[:, 0] == world.bos).sum() == 4  # of 6 2 2 6: the windows of fixed maps


def test_step_masks(world):
    args = hapax.Args()
    x = torch.cat([world.batch(s, 16, 129, args) for s in range(20)])
    share = hapax.step_mask("any", x, world, args, (0, 0)).float().mean()
    random = hapax.step_mask("random", x, world, args, (0, 0))
    assert abs(random.float().mean() - share) < 3 * math.sqrt(share * (1 - share) / random.numel())
    assert torch.equal(random, hapax.step_mask("random", x, world, args, (0, 0)))
    assert not torch.equal(random, hapax.step_mask("random", x, world, args, (0, 1)))
    assert not hapax.step_mask("none", x, world, args, (0, 0)).any()


def test_masked_targets_have_no_gradient_and_micro_batches_add_up(world):
    args = hapax.Args(steps=1)
    model = GPT(GPTConfig(world.n_vocab, 128, 1, 2, 16))
    x = world.batch(0, 8, 129, args)
    mask = hapax.step_mask("any", x, world, args, (0, 0))
    grads = []
    for size in 8, 1, 3:
        model.zero_grad()
        args.micro_batch = size
        parts = {"idx": x[:, :-1], "targets": x[:, 1:], "weights": (~mask).float()}
        loss = common.backward(model, parts, args, common.Env(torch.device("cpu"), torch.float32))
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
    assert x.shape == (8, 20) and (x[:, :10] == x[:, 10:]).all() and all(len({*row}) == 10 for row in x)
    assert hapax.repetition(Oracle(64), x, alphabet) == (1.0, 1.0)
    assert hapax.repetition(Oracle(64, copies=False), x, alphabet)[0] == 0.0
    rows = rng.integers(0, 5, (20, 30))
    right = hapax.logits_at(Oracle(5), rows[:, :-1], slice(None)).argmax(-1).numpy() == rows[:, 1:]
    masked, latest = hapax.repeated(rows), hapax.repeated(rows, "latest")
    assert right[masked].mean() == latest.sum() / masked.sum()


def test_prefix_matching_by_hand():
    s = 5
    sharp = torch.zeros(1, 2, 2 * s, 2 * s)
    for q in range(s, 2 * s):
        sharp[0, 0, q, q - s + 1] = 1
    sharp[0, 1] = (torch.ones(2 * s, 2 * s).tril().T / torch.arange(1, 2 * s + 1)).T
    prefix, previous = hapax.prefix_matching(sharp)
    assert prefix[0] == 1 and torch.isclose(prefix[1], torch.tensor([1 / (q + 1) for q in range(s, 2 * s)]).mean())
    assert torch.isclose(previous[1], torch.tensor([1 / (q + 1) for q in range(1, 2 * s)]).mean())


def test_token_loss_difference():
    early, late = np.array([[1.0, 2.0]]), np.array([[0.5, 3.0]])
    assert hapax.token_loss_difference(early, early) == 0 and hapax.token_loss_difference(early, late) == -0.25
    assert hapax.token_loss_difference(early, late, (np.array([[True, True]]), np.array([[True, False]]))) == 0.5


def test_renormalised_by_hand():
    a, b, c, d = range(4)
    x, p = torch.tensor([[a, b, a, c, a, d]]), torch.tensor([0.2, 0.5, 0.2, 0.1])
    loss = hapax.renormalised(p.log().expand(1, 5, 4), x)
    assert abs(loss[0, 4].item() - 1.0986) < 1e-4 and abs(-math.log(0.1) - 2.3026) < 1e-4  # -ln(.1 / (1 - .5 - .2))
    torch.testing.assert_close(loss[0, :2], -p[[b, a]].log())  # nothing was seen before


def test_head_effects_of_a_head_that_does_nothing(world):
    torch.manual_seed(0)
    model = GPT(GPTConfig(world.n_vocab, 128, 2, 2, 16))
    with torch.no_grad():
        model.blocks[1].attn.proj.weight[:, 8:] = 0
    x = hapax.repeats(world.alphabets["mix"], 4, 10, np.random.default_rng(0))
    effects = hapax.head_effects(model, x, "zero", world.alphabets["mix"], np.random.default_rng(0))
    assert effects.shape == (2, 2) and abs(effects[1, 1]) < 1e-8 < abs(effects[1, 0])


def test_statistics_by_hand():
    a, b = [True] * 8 + [False] * 2, [True] * 2 + [False] * 8
    assert hapax.mcnemar(a, b) == pytest.approx(2 / 64) and hapax.mcnemar(a, a) == 1.0
    assert hapax.wilson(8, 10) == pytest.approx((0.4902, 0.9433), abs=1e-4)


def test_icl_prompts(tmp_path):
    rows = [{"input": f"in{i}", "output": "yes" if i % 2 else "no"} for i in range(30)]
    (tmp_path / "task.json").write_text(json.dumps(rows))
    (tmp_path / "one.json").write_text(json.dumps([{"input": str(i), "output": "same"} for i in range(30)]))
    tok = data.get_tokenizer("byte")
    tasks = hapax.icl_tasks(tmp_path, tok, 12)
    assert set(tasks) == {"task/any", "task/no overlap", "one/any"}
    for key, (prompts, answers) in tasks.items():
        for prompt, answer in zip(prompts, answers):
            shots = tok.decode(prompt).split("\n\n")
            assert len(prompts) == 12 and len(shots) == 6 and shots[-1].startswith("Q: ") and shots[-1].endswith("\nA:")
            if key.startswith("task"):
                query = int(shots[-1][5:-3])
                assert all(s in [f"Q: {r['input']}\nA: {r['output']}" for r in rows] for s in shots[:-1])
                assert "no overlap" not in key or not any(s.endswith(rows[query]["output"]) for s in shots[:-1])
                assert answer == ord(" ")  # byte tokens: an answer begins with its space


# ------------------------------------------------------------------------------------------------------------- script


def test_smoke_writes_what_is_promised(tmp_path, capsys):
    result = hapax.main(["--preset", "smoke", "--out", str(tmp_path), "--seeds", "3", "4"])
    assert result == json.loads((tmp_path / "result.json").read_text())
    assert [c["id"] for c in result["claims"]] == ["C1", "C2", "C3", "C4", "C5", "C5b", "C6"]
    for c in result["claims"]:
        assert c["measured"] and c["control"] and isinstance(c["holds"], bool) and isinstance(c["control_fails"], bool)
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert {r["run"] for r in rows} == {f"{arm}-s{s}" for arm in result["metrics"] for s in (3, 4)}
    assert all({"run", "step", "seconds", "tokens_per_s"} <= r.keys() for r in rows) and rows[0]["loss"] > 0
    assert len({r["loss"] for r in rows if r["step"] == 0 and r["run"].startswith("any")}) == 2  # seeds differ
    assert all((tmp_path / f).stat().st_size > 10000 for f in ("hapax.png", "mask.png"))
    assert "\x1b[41" in (out := capsys.readouterr().out) and "C5b" in out


@pytest.mark.parametrize(
    "flags",
    [
        "--doc-attn --normalize all",
        "--equiv surface --shot-format nosep --arms none repeat",
        "--neox --ablate zero --mix 1 0 0 0",
    ],
)
def test_variants_run(flags, tmp_path):
    arms = [] if "--arms" in flags else ["--arms", "none", "any", "random"]
    result = hapax.main(["--preset", "smoke", "--steps", "2", "--out", str(tmp_path), *flags.split(), *arms])
    assert result["metrics"]["none"][0]["share"] == 0


def test_thresholded_and_few_shot_tasks_run(tmp_path):
    hapax.main(["--preset", "smoke", "--steps", "2", "--arms", "none", "--out", str(tmp_path)])
    (tmp_path / "t.json").write_text(json.dumps([{"input": str(i), "output": "ab"[i % 2]} for i in range(40)]))
    flags = [
        "--arms",
        "none",
        "any",
        "thresholded",
        "--sim-emb",
        str(tmp_path / "none-s0.pt"),
        "--icl-dir",
        str(tmp_path),
    ]
    (tmp_path / "result.json").unlink()
    result = hapax.main(["--preset", "smoke", "--steps", "2", "--out", str(tmp_path / "b"), *flags])
    assert result["metrics"]["thresholded"][0]["share"] >= result["metrics"]["any"][0]["share"] > 0.3
    lines = (tmp_path / "b" / "icl.csv").read_text().splitlines()
    assert lines[0].startswith("task,arm,n,") and len(lines) == 1 + 2 * 3


def test_show(tmp_path, capsys):
    assert hapax.main(["--show", "the cat sat. the cat sat!", "--tokenizer", "byte", "--out", str(tmp_path)]) is None
    assert (
        "t\x1b[41;97mh\x1b[0m\x1b[41;97me\x1b[0m" in capsys.readouterr().out and not (tmp_path / "result.json").exists()
    )


@pytest.mark.parametrize(
    "flags, match",
    [
        ("--arms any sometimes", "allowed: none any"),
        ("--arms thresholded", "--sim-emb"),
        ("--mix 1 2", "four whole numbers"),
        ("--mix 0 1 1 1", "first"),
        ("--min-n 1", "2 and up"),
        ("--tau 1.5", "-1 to 1"),
        ("--n-head 5", "n_head 5"),
        ("--preset huge", "smoke"),
        ("--shot-format csv", "nosep"),
        ("--steps many", "steps"),
        ("--stepz 5", "stepz"),
        ("--device cuda:77", "which has"),
        ("--device toaster", "which has"),
        ("--dataset file:/no/such/file", "/no/such/file"),
        ("--dataset EMPTY", "empty"),
        ("--dataset SHORT --tokenizer byte", "one window needs 129"),
        ("--tokenizer bpe:3", "257"),
        ("--sim-emb SHORT --arms thresholded", "damaged"),
        ("--icl-dir /no/such/folder", "no \\*.json"),
        ("--show x --tokenizer byte", "two tokens"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(flags, match, tmp_path, capsys):
    (tmp_path / "empty.txt").write_text("\n")
    (tmp_path / "short.txt").write_text("too short\n" * 12)
    flags = flags.replace("EMPTY", f"file:{tmp_path}/empty.txt")
    flags = flags.replace("--sim-emb SHORT", f"--sim-emb {tmp_path}/short.txt").replace(
        "SHORT", f"file:{tmp_path}/short.txt"
    )
    with pytest.raises(SystemExit) as stop:
        hapax.main(["--preset", "smoke", "--out", str(tmp_path / "out"), *flags.split()])
    error = capsys.readouterr().err.split("\r")[-1].strip().splitlines()
    assert stop.value.code == 2 and error[-1].startswith("error: ") and re.search(match, error[-1])
    assert not list((tmp_path / "out").glob("*.json*"))
