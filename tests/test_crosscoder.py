"""crosscoder.py: the method against hand-computed values and plain runs, the world, runs end to end."""

import json

import numpy as np
import pytest
import torch
from stand_in import tiny_llama

import common
import crosscoder as cx
import sae
from model import GPT, GPTConfig

torch.set_num_threads(1)
CPU = common.Env(torch.device("cpu"), torch.float32)


def by_hand():
    """Two models of width 2, three latents."""
    s = sae.SAE(2, 3, 2, streams=2, batch=True).requires_grad_(False)
    s.W_enc.copy_(torch.tensor([[1.0, 0, 1, 0], [0, 1, 0, 0], [1, 0, 0, -1]]))
    s.W_dec.copy_(torch.tensor([[1.0, 0, 1, 0], [0, 2, 0, 0], [3, 4, 0, 0.5]]))
    s.b_enc.copy_(torch.tensor([-1, 0, 0.5]))
    return s


def test_forward_by_hand():
    s = by_hand()
    x = torch.tensor([2.0, 1, 1, 3])
    f = s.encode(x)
    assert f.tolist() == [2, 1, 0]
    assert s.decode(f).tolist() == [2, 2, 2, 0]
    assert s.norms().sum(1).tolist() == [2, 2, 5.5]
    assert cx.relative_norm(s.norms()).tolist() == pytest.approx(
        [0.5, 0, 0.5 * (0.5 - 5) / 5 + 0.5]
    )
    assert s.encode(torch.tensor([2.0, 1, 1, 0])).tolist() == [2, 1, 2.5]


def test_attribution_by_hand():
    f, g = torch.tensor([[2.0, 1, 2.5]]), torch.tensor([[2.0, -1]])
    assert cx.attribution(f, by_hand().decoder(cx.FT), g).tolist() == [[4, 0, -1.25]]


def test_log_p_by_hand():
    logits = torch.tensor([0.0, 1, 2, 3], requires_grad=True)
    m = cx.log_p(logits, [1, 3])
    assert m.item() == pytest.approx(-0.313262, abs=1e-6)
    m.backward()
    wanted = [-0.032059, 0.032059, -0.236883, 0.236883]
    assert logits.grad.tolist() == pytest.approx(wanted, abs=1e-6)
    assert float(cx.log_p(logits, [0, 1, 2, 3])) == pytest.approx(0, abs=1e-6)
    for bad in [], [4], [-1]:
        with pytest.raises(ValueError, match="target ids"):
            cx.log_p(logits, bad)


@pytest.mark.parametrize(
    "norms, delta", [((3, 4), 0.625), ((0, 2), 1), ((1, 1), 0.5), ((5, 1), 0.1), ((0, 0), 0.5)]
)
def test_relative_norm_by_hand(norms, delta):
    norms = torch.tensor([norms], dtype=torch.float32)
    assert float(cx.relative_norm(norms)) == pytest.approx(delta)
    assert float(cx.relative_norm(norms.flip(1))) == pytest.approx(1 - delta)


def test_two_equal_models_have_no_latents_of_their_own(tmp_path):
    torch.manual_seed(3)
    rows = torch.randn(512, 8).relu().repeat(1, 2)
    s = sae.SAE(8, 24, 4, streams=2, batch=True)
    flags = "--sae-steps 60 --sae-batch 128 --sae-lr 0.01 --rows 512 --out".split()
    args = common.parse(cx.Args, [*flags, str(tmp_path)])
    sae.train_sae(s, lambda refill: rows, args, CPU, common.Log(args, CPU, "a"), 0)
    assert (cx.relative_norm(s.norms()) - 0.5).abs().max() < 0.02
    found = cx.explained(s, rows)
    assert found["crosscoder"][0] == pytest.approx(found["crosscoder"][1], abs=1e-3)


def test_steering_by_hand():
    h, v = torch.tensor([[3.0, 4]]), torch.tensor([[0.0, 2]])
    assert cx.pushes(h, v, 0.5).tolist() == [[[0, 2.5]]]
    states = torch.tensor([[[1.0, 1], [3, 4]]])
    assert cx.steer(states, v[0], 0.5).tolist() == [[[1, 1], [3, 6.5]]]
    assert torch.equal(cx.steer(states, v[0], 0.0), states)
    assert torch.equal(cx.steer(states[:, :1], v[0], 0.5), states[:, :1])  # a later token


def test_spearman_by_hand():
    x = torch.tensor([1.0, 5, 2, 8])
    assert cx.spearman(x, x**3) == pytest.approx(1) and cx.spearman(x, -x) == pytest.approx(-1)
    assert cx.spearman(x, torch.tensor([1.0, 2, 3, 4])) == pytest.approx(0.8)


# ------------------------------------------------------------------------------- against plain runs


def toy_model(seed=0, layers=3):
    torch.manual_seed(seed)
    shape = dict(norm="rms", gated=True, act="silu", d_mlp=32)
    model = GPT(GPTConfig(len(cx.VOCAB), 64, layers, 4, 16, **shape))
    return model.eval().requires_grad_(False)


PROMPTS = [[1, 5, 9, 30], [1, 4], [2, 6, 7, 8, 9, 10, 11], [20, 3, 3]]


def plain_log_p(model, prompt, change, targets):
    """log P behind one prompt, without padding, with `change` added at its last token."""

    def push(h):
        return torch.cat((h[:, :-1], h[:, -1:] + change), 1)

    with model.patch({"blocks.1.resid_post": push}):
        return cx.log_p(model(torch.tensor([prompt]))[0, -1], targets)


def test_outcomes_equal_one_run_at_a_time():
    model = toy_model()
    changes = torch.randn(len(PROMPTS), 3, 16)
    groups = [cx.WAIT, cx.MARKS[1]]
    found = cx.outcomes(model, 1, PROMPTS, changes, groups)
    assert found.shape == (len(PROMPTS), 3, 2)
    for i, prompt in enumerate(PROMPTS):
        for v in range(3):
            for j, group in enumerate(groups):
                alone = plain_log_p(model, prompt, changes[i, v], group)
                assert float(found[i, v, j]) == pytest.approx(float(alone), abs=1e-4)


def test_gradient_is_that_of_the_last_position_whatever_the_batch():
    model = toy_model()
    g = cx.gradient(model, PROMPTS, 1, cx.WAIT)
    alone = torch.cat([cx.gradient(model, [p], 1, cx.WAIT) for p in PROMPTS])
    assert torch.allclose(g, alone, atol=1e-5)
    model = model.double()
    v, eps = torch.randn(16).double(), 1e-3
    for prompt, row in zip(PROMPTS, g):
        up, down = (plain_log_p(model, prompt, sign * eps * v, cx.WAIT) for sign in (1, -1))
        assert float(row.double() @ v) == pytest.approx(float(up - down) / (2 * eps), abs=5e-4)


def test_states_of_both_models_stand_side_by_side():
    models = [toy_model(0), toy_model(1)]
    states = cx.last_states(models, PROMPTS, 1)
    for prompt, row in zip(PROMPTS, states):
        for i, model in enumerate(models):
            alone = sae.residual(model, torch.tensor([prompt]), 1)[0, -1]
            assert torch.allclose(row[16 * i : 16 * i + 16], alone, atol=1e-5)


def test_ablation_is_exact_and_attribution_its_first_order():
    models = [toy_model(0), toy_model(1)]
    torch.manual_seed(0)
    code = sae.SAE(16, 24, 4, streams=2, batch=True).requires_grad_(False)
    code.W_dec.mul_(1e-3)  # small steps, for which the first order is all there is
    row = cx.against_ablation(models, code, 1, PROMPTS, cx.WAIT)
    assert row["rho"] > 0.99 and abs(row["rho_permuted"]) < 0.5
    a, lost = (torch.tensor(row[name]) for name in ("attribution", "ablation"))
    assert (a - lost).abs().max() < 0.02 * lost.abs().max()
    f = code.encode(cx.last_states(models, PROMPTS, 1))
    i, j = 2, int(f[2].argmax())
    clean = plain_log_p(models[1], PROMPTS[i], torch.zeros(16), cx.WAIT)
    without = plain_log_p(models[1], PROMPTS[i], -f[i, j] * code.decoder(cx.FT)[j], cx.WAIT)
    assert (lost - (clean - without)).abs().min() < 1e-6


def test_lists_off_and_pushes():
    models = [toy_model(0), toy_model(1)]
    code = sae.SAE(16, 24, 4, streams=2, batch=True).requires_grad_(False)
    off = cx.lists_off(models, code, 1, PROMPTS, {"none": [], "two": [3, 5]}, cx.WAIT)
    assert off["none"] == pytest.approx(0, abs=1e-6) and off["two"] != 0
    vectors = torch.randn(2, 16)
    before, after = cx.pushed(models, 1, PROMPTS, vectors, 0.0, [cx.WAIT])
    assert torch.allclose(after, before.expand(2, 1), atol=1e-6)


def test_lists():
    a = torch.tensor([0.5, -1, 2, 0.1, 0, 0.3, 0.2])
    rate = torch.tensor([0.5, 0.4, 0.1, 0.52, 0.0, 0.12, 0.9])
    lists, alive = cx.lists_of(a, rate, 2, 0)
    assert lists["top"] == [2, 0] and lists["matched"] == [5, 3]
    assert alive.tolist() == [0, 1, 2, 3, 5, 6] and len(lists["random"]) == 2
    with pytest.raises(ValueError, match="--top 4: only 6 latents"):
        cx.lists_of(a, rate, 4, 0)


def test_patterns_brought_about_by_hand():
    assert cx.brought_about(0.3 * np.eye(4)) == 4
    assert cx.brought_about(0.2 * np.eye(4)) == 0
    assert cx.brought_about([[0.3, 0.4, 0, 0], [0, 0.5, 0, 0], [0] * 4, [0, 0, 0, 0.26]]) == 2


def test_explained():
    torch.manual_seed(0)
    x = torch.randn(300, 8)
    code = sae.SAE(4, 16, 2, streams=2)
    found = cx.explained(code, x)
    assert 0.2 < min(found["neurons"]) and max(found["neurons"]) < 0.8  # two of eight are kept
    assert len(found["crosscoder"]) == 2


# --------------------------------------------------------------------------------------- the world


def steps_of(words):
    """The steps of an answer or of a part of it: (x, map or ?, result), @ and ? as what they mean."""
    out = []
    for part in " ".join(words).split(" ; "):
        words = part.split()
        if "=" in words and words[0].isdigit():
            at = words.index("=")
            out.append((int(words[0]), words[at - 1], int(words[at + 1])))
    return out


def right(x, name, result):
    """Whether a step is right; behind an unknown map any result is."""
    return name == "?" or result == {"a": 3 * x + 1, "b": 7 * x + 4, "c": 9 * x + 9}[name] % 10


def test_answers_are_what_their_decisions_say():
    rng, seen = np.random.default_rng(0), {}
    marks = {cx.VOCAB[i] for i in cx.WAIT}
    for _ in range(2000):
        task = cx.draw_task(rng)
        words, decisions = cx.solve(rng, task, waits=True)
        assert len(decisions) == len(task.stages) and words[-1] == "<eos>"
        value, begin = task.first, 0
        for i, decision in enumerate(decisions):
            assert words[decision.at] == ";"
            x, name, result = steps_of(words[begin : decision.at + 1])[-1]
            slip, wrong = x != value, not right(x, name, result)
            assert not (slip and wrong)
            noise = "restart" if slip else "check" if wrong else ""
            coming = task.stages[i + 1] if i + 1 < len(task.stages) else ""
            coming = {"@": "recall", "?": "unsure"}.get(coming, "")
            cause = "mixed" if noise and coming else noise or coming or "none"
            assert decision.cause == cause
            seen.setdefault(cause, []).append(decision.pattern)
            value = result
            begin = decision.at + 1
            assert (words[begin] in marks) == bool(decision.pattern)
            if not decision.pattern:
                continue
            assert words[begin] in cx.PATTERNS[decision.pattern]
            rest = words[begin + 1 :]
            if decision.pattern == "check":
                y, same, value = steps_of(rest)[0]
                assert (y, same) == (x, name) and right(y, same, value)
                begin += 1 + rest.index(";") + 1
            elif decision.pattern == "restart":
                value = task.first
                for y, name, result in steps_of(rest)[: i + 1]:
                    assert y == value and right(y, name, result)
                    value = result
                ends = [j for j, word in enumerate(rest) if word == ";"]
                begin += 1 + ends[i] + 1
            else:
                wanted = ["@", "=", task.define] if decision.pattern == "recall" else ["?", "="]
                assert rest[: len(wanted)] == wanted
                begin += 1 + rest.index(";") + 1
        assert words[-3:-1] == ["A", str(value)]
    for cause in cx.PATTERNS:
        share = np.mean([pattern == cause for pattern in seen[cause]])
        assert abs(share - 0.75) < 3 * (0.75 * 0.25 / len(seen[cause])) ** 0.5
    assert 0.02 < np.mean([pattern != "" for pattern in seen["none"]]) < 0.045
    assert not any(seen["mixed"])


def test_base_and_reasoner_differ_where_they_should():
    rng = np.random.default_rng(1)
    base = [cx.document(rng, False) for _ in range(300)]
    marks = {cx.VOCAB[i] for i in cx.WAIT}
    assert not any(marks & {*words} for words in base)
    graded = [{"ok", "bad"} & {*words} for words in base if words[1] == "think"]
    assert np.mean([bool(some) for some in graded]) > 0.7
    assert not any({"ok", "bad"} & {*words} for words in base if words[1] == "fast")
    ft = [cx.document(rng, True) for _ in range(300)]
    assert np.mean([bool(marks & {*words}) for words in ft if words[1] == "think"]) > 0.4
    assert not any((marks | {"ok", "bad"}) & {*words} for words in ft if words[1] == "fast")
    assert max(map(len, base + ft)) <= cx.LONGEST + 1


def test_batches_by_hand():
    rows = [["<bos>", "1", ";", "ok", "<eos>"], ["<bos>", "<eos>"]]
    batch = cx.batch_of(rows, reasoner=False)
    assert batch["idx"].tolist()[1] == [1, 2, 0, 0]
    assert batch["targets"].tolist()[1] == [2, 0, 0, 0]
    assert batch["weights"].tolist() == [[1, 1, 6, 1], [1, 0, 0, 0]]
    rows = [["<bos>", ";", "again", "3"], ["<bos>", "<eos>"]]
    assert cx.batch_of(rows, reasoner=True)["weights"].tolist()[0] == [1, 6, 1]


def test_positions_are_balanced_and_end_at_a_step():
    prompts, causes = cx.positions(np.random.default_rng(0), 40)
    assert {cause: int((causes == cause).sum()) for cause in cx.CAUSES} == {
        **dict.fromkeys(cx.PATTERNS, 10),
        "none": 40,
    }
    for prompt, cause in zip(prompts, causes):
        words = [cx.VOCAB[i] for i in prompt]
        assert words[-1] == ";" and words[1] == "think"
        if cause == "check":
            assert not right(*steps_of(words)[-1])


def test_swapping_a_state_for_itself_changes_nothing(monkeypatch):
    models = [toy_model(0), toy_model(1)]
    prompts = [[1, 5, 9, 30]] * 6
    causes = np.array(["check", "check", "recall", "recall", "none", "none"])
    found = cx.swapped(models, 1, prompts, causes)
    assert found["same"] == 0  # all states are equal here


# ------------------------------------------------------------------------------------------ script


def test_smoke_writes_what_is_promised(tmp_path):
    flags = ["--preset", "smoke", "--out", str(tmp_path), "--seeds", "3"]
    result = cx.main(flags)
    written = json.loads((tmp_path / "result.json").read_text())
    assert json.dumps(result) == json.dumps(written)
    assert [c["id"] for c in result["claims"]] == ["G1", "G2", "G3", "D", "P1", "P2", "P3", "P4"]
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert {r["run"] for r in rows} == {f"toy-s3-{part}" for part in ("base", "reasoner", "sae")}
    assert (tmp_path / "crosscoder.png").stat().st_size > 10000
    assert set(result["metrics"]["toy"][0]["texts"]) == {"prompt", "as it is", *cx.PATTERNS}
    again = cx.main([*flags, "--resume"])
    assert json.dumps(again["claims"]) == json.dumps(result["claims"])


def pair(tmp_path, text="Question: what is two and two? wait Wait maybe it is four. "):
    shape = dict(block_size=128, n_layer=3, n_head=4, n_embd=32)
    folders = []
    for i, words in enumerate(
        ("Question: what is two and two? wait Wait maybe it is four. ", text)
    ):
        folders.append(str(tiny_llama(tmp_path / str(i), [words * 4], 300, i, **shape)))
    return ["--preset", "smoke", "--base", folders[0], "--model", folders[1], "--layer", "1"]


def test_a_real_pair(tmp_path):
    rows = []
    for i in range(20):
        rows.append({"text": f"Question: what is two and {i}? it is wait maybe four. Wait"})
    (tmp_path / "answers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "text.txt").write_text("what is it? maybe it is four and two. " * 2000)
    flags = [*pair(tmp_path), "--dataset", f"file:{tmp_path}/text.txt", "--rows", "1000"]
    flags += ["--texts", str(tmp_path / "answers.jsonl"), "--out", str(tmp_path / "out")]
    result = cx.main(flags)
    assert [c["id"] for c in result["claims"]] == ["D", "P1", "P2", "P3"]
    assert result["claims"][1]["measured"]["rho"] > 0.5
    assert (tmp_path / "out" / "crosscoder.png").stat().st_size > 10000


def test_a_pair_that_does_not_belong_together(tmp_path, capsys):
    flags = pair(tmp_path, "entirely other words make another tokenizer " * 9)
    with pytest.raises(SystemExit) as end:
        cx.main([*flags, "--out", str(tmp_path / "out")])
    assert end.value.code == 2 and "tokenizers of" in capsys.readouterr().err


@pytest.mark.parametrize(
    "flags, message",
    [
        ("--layer 9", "--layer 9, allowed: 0 to 3"),
        ("--k 600", "--k 600, allowed: 1 to 512"),
        ("--top 0", "--top 0, allowed"),
        ("--top 200", "--top 200, allowed: 1 to 128"),
        ("--base x", "needs both --base and --model"),
        ("--texts x", "--texts has no effect without --model"),
        ("--rows 100", "--rows 100, allowed: 2048 and more"),
        ("--base nothing-here --model nothing-here", "nothing-here"),
    ],
)
def test_bad_input_is_one_line(flags, message, tmp_path, capsys):
    with pytest.raises(SystemExit) as end:
        cx.main([*flags.split(), "--out", str(tmp_path)])
    error = capsys.readouterr().err.strip()
    assert end.value.code == 2 and error.startswith("error: ") and "\n" not in error
    assert message in error
