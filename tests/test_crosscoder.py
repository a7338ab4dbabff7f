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
    sae.train_sae(s, rows, args, CPU, common.Log(args, CPU, "a"), 0)
    assert (cx.relative_norm(s.norms()) - 0.5).abs().max() < 0.02


def test_norms_tell_whose_a_feature_is(tmp_path):
    rng = torch.Generator().manual_seed(0)
    on = (torch.rand(4096, 12, generator=rng) < 0.1) * (1 + torch.rand(4096, 12, generator=rng))
    directions = torch.randn(2, 12, 16, generator=rng)
    base, ft = torch.nn.functional.normalize(directions, dim=2)
    base[:3] = 0  # features of the reasoner alone
    ft[3:6] = 0  # of the base alone; the others are of both, in directions of their own
    rows = torch.cat((on @ base, on @ ft), 1)
    torch.manual_seed(0)
    code = sae.SAE(16, 32, 3, streams=2, batch=True)
    flags = "--sae-steps 300 --sae-batch 256 --sae-lr 0.01 --rows 4096 --out".split()
    args = common.parse(cx.Args, [*flags, str(tmp_path)])
    sae.train_sae(code, rows, args, CPU, common.Log(args, CPU, "a"), 0)
    codes = code.encode(rows)
    likeness = torch.corrcoef(torch.cat((on, codes), 1).T)[:12, 12:].nan_to_num()
    delta = cx.relative_norm(code.norms())[likeness.argmax(1)]
    assert delta[:3].min() > delta[6:].max() and delta[6:].min() > delta[3:6].max()


def test_steering_by_hand():
    h, v = torch.tensor([[3.0, 4]]), torch.tensor([[0.0, 2]])
    assert cx.pushes(h, v, 0.5).tolist() == [[[0, 2.5]]]


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


PROMPTS = [[1, 5, 9, 20], [1, 4], [2, 6, 7, 8, 9, 10, 11], [20, 3, 3]]


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
    assert found.shape == (len(PROMPTS), 4, 2)
    for i, prompt in enumerate(PROMPTS):
        for v in range(3):
            for j, group in enumerate(groups):
                alone = plain_log_p(model, prompt, changes[i, v], group)
                assert float(found[i, 1 + v, j].log()) == pytest.approx(float(alone), abs=1e-4)
    as_it_is = plain_log_p(model, PROMPTS[1], torch.zeros(16), cx.WAIT)
    assert float(found[1, 0, 0].log()) == pytest.approx(float(as_it_is), abs=1e-4)


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
    a, lost = cx.against_ablation(models, code, 1, PROMPTS, cx.WAIT)
    assert cx.spearman(a, lost) > 0.99
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
    assert cx.pushed(models[1], 1, PROMPTS, vectors, 0.0, [cx.WAIT]).abs().max() < 1e-6


def test_lists_need_latents_enough():
    models = [toy_model(0), toy_model(1)]
    code = sae.SAE(16, 24, 4, streams=2, batch=True).requires_grad_(False)
    args = common.parse(cx.Args, "--layer 1 --top 30".split())
    with pytest.raises(ValueError, match="--top 30: "):
        cx.study(models, code, args, PROMPTS, PROMPTS, PROMPTS, cx.WAIT, 0)
    args = common.parse(cx.Args, "--layer 1 --top 3".split())
    row, rate = cx.study(models, code, args, PROMPTS, PROMPTS, PROMPTS, cx.WAIT, 0)
    assert set(row["delta"]) == {"all", "top", "matched", "random"} == {"all", *row["off"]}
    assert rate.shape == (24,) and abs(row["rho"]["permuted"]) < 0.9


def test_patterns_brought_about_by_hand():
    assert cx.brought_about(0.3 * np.eye(4)) == 4
    assert cx.brought_about(0.2 * np.eye(4)) == 0
    assert cx.brought_about([[0.3, 0.4, 0, 0], [0, 0.5, 0, 0], [0] * 4, [0, 0, 0, 0.26]]) == 2


def test_explained_by_hand():
    code = by_hand()  # x_hat of (2, 1, 1, 3) is (2, 2, 2, 0); of (0, 0, 0, 0), nothing
    code.b_enc.copy_(torch.tensor([-1.0, 0, 0]))
    x = torch.tensor([[2.0, 1, 1, 3], [0, 0, 0, 0]])
    # by stream: errors 1 and 1 + 9, variances 2 + .5 and .5 + 4.5
    assert cx.explained(code, x) == pytest.approx(1 - 10 / 5)


# --------------------------------------------------------------------------------------- the world


def steps_of(words):
    """The steps of an answer or of a part of it: (x, map or ?, result), @ and ? as what they mean."""
    out = []
    for part in " ".join(words).split(" ; "):
        words = part.split()
        if "=" in words and words[words.index("=") - 1].isdigit():
            at = words.index("=")
            out.append((int(words[at - 1]), words[at - 2], int(words[at + 1])))
    return out


def right(x, name, result):
    """Whether a step is right; behind an unknown map any result is."""
    return name == "?" or result == {"a": 2 * x + 1, "b": 3 * x + 4, "c": 4 * x + 4}[name] % 5


def test_answers_are_what_their_decisions_say():
    rng, seen = np.random.default_rng(0), {}
    marks = {cx.VOCAB[i] for i in cx.WAIT}
    for _ in range(2000):
        s = cx.tell(rng, reasoner=True)
        words = s.words
        assert len(s.decisions) == len(s.stages) and words[-1] == "<eos>"
        value, begin = s.first, words.index(";") + 1
        for i, (end, cause, pattern) in enumerate(s.decisions):
            assert words[end] == ";"
            x, name, result = steps_of(words[begin : end + 1])[-1]
            slip, wrong = x != value, not right(x, name, result)
            assert not (slip and wrong)
            noise = "restart" if slip else "check" if wrong else ""
            coming = s.stages[i + 1] if i + 1 < len(s.stages) else ""
            coming = {"@": "recall", "?": "unsure"}.get(coming, "")
            assert cause == ("mixed" if noise and coming else noise or coming or "none")
            seen.setdefault(cause, []).append(pattern)
            value = result
            begin = end + 1
            assert (words[begin] in marks) == bool(pattern)
            if not pattern:
                continue
            assert words[begin] in cx.PATTERNS[pattern]
            rest = words[begin + 1 :]
            if pattern == "check":
                y, same, value = steps_of(rest)[0]
                assert (y, same) == (x, name) and right(y, same, value)
                begin += 1 + rest.index(";") + 1
            elif pattern == "restart":
                value = s.first
                for y, name, result in steps_of(rest)[: i + 1]:
                    assert y == value and right(y, name, result)
                    value = result
                ends = [j for j, word in enumerate(rest) if word == ";"]
                begin += 1 + ends[i] + 1
            else:
                wanted = ["@", "=", s.define] if pattern == "recall" else ["?", "="]
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
    base = [cx.tell(rng, False).words for _ in range(300)]
    marks, grades = {cx.VOCAB[i] for i in cx.WAIT}, {"ok", "bad"}
    assert not any(marks & {*words} for words in base)
    assert np.mean([bool(grades & {*words}) for words in base]) > 0.7
    ft = [cx.tell(rng, True).words for _ in range(300)]
    assert np.mean([bool(marks & {*words}) for words in ft]) > 0.4
    assert not any(grades & {*words} for words in ft)
    assert max(map(len, base + ft)) <= cx.LONGEST + 1


def test_batches_by_hand():
    rng = np.random.default_rng(0)
    stories = [cx.Story(rng), cx.Story(rng)]
    stories[0].words = "<bos> 1 ; ok <eos>".split()
    stories[1].words = "<bos> ; <eos>".split()
    batch = cx.collate(stories, reasoner=False)
    assert batch["idx"].tolist()[1] == [1, cx.ID[";"], 2, 0]
    assert batch["targets"].tolist()[1] == [cx.ID[";"], 2, 0, 0]
    assert batch["weights"].tolist() == [[0, 0, 6, 1], [0, 1, 0, 0]]
    stories[0].words = "<bos> ; again 3".split()
    assert cx.collate(stories, reasoner=True)["weights"].tolist()[0] == [0, 6, 1]


def test_positions_end_at_a_step():
    split = cx.positions(np.random.default_rng(0), 10)
    assert {cause: len(prompts) for cause, prompts in split.items()} == dict.fromkeys(cx.CAUSES, 10)
    for cause, prompts in split.items():
        for prompt in prompts:
            words = [cx.VOCAB[i] for i in prompt]
            assert words[-1] == ";"
            if cause == "check":
                assert not right(*steps_of(words)[-1])


def test_swapping_a_state_for_itself_changes_nothing():
    split = dict.fromkeys(cx.PATTERNS, [[1, 5, 9, 20]] * 3)
    found = cx.swapped(toy_model(1), 1, split)  # all states are equal here
    assert found == {"same cause": 0, "other cause": 0.25}


# ------------------------------------------------------------------------------------------ script


def test_smoke_writes_what_is_promised(tmp_path):
    flags = ["--preset", "smoke", "--out", str(tmp_path), "--seeds", "3"]
    result = cx.main(flags)
    written = json.loads((tmp_path / "result.json").read_text())
    assert json.dumps(result) == json.dumps(written)
    assert [c["id"] for c in result["claims"]] == ["D", "P1", "P2", "P3", "G1", "G2", "G3", "P4"]
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert {r["run"] for r in rows} == {f"toy-s3-{part}" for part in ("base", "reasoner", "sae")}
    assert (tmp_path / "crosscoder.png").stat().st_size > 10000
    assert np.shape(result["metrics"]["toy"][0]["matrix"]) == (4, 4)
    again = cx.main([*flags, "--resume"])
    assert json.dumps(again["claims"]) == json.dumps(result["claims"])
    with pytest.raises(SystemExit):  # the reasoner and its crosscoder would be of another base
        cx.main([*flags, "--resume", "--steps", "14"])


def pair(tmp_path, text="Question: what is two and two? wait Wait maybe it is four. "):
    shape = dict(block_size=128, n_layer=3, n_head=4, n_embd=32)
    folders = []
    for i, words in enumerate(
        ("Question: what is two and two? wait Wait maybe it is four. ", text)
    ):
        folders.append(str(tiny_llama(tmp_path / str(i), [words * 4], 300, i, **shape)))
    return ["--preset", "smoke", "--base", folders[0], "--model", folders[1], "--layer", "1"]


def test_a_real_pair(tmp_path):
    (tmp_path / "text.txt").write_text("what is it? maybe it is four and two. " * 2000)
    flags = [*pair(tmp_path), "--dataset", f"file:{tmp_path}/text.txt", "--rows", "1000"]
    flags += ["--answers", "12", "--wait", "e", "t", "a", "o", "--out", str(tmp_path / "out")]
    result = cx.main(flags)
    assert [c["id"] for c in result["claims"]] == ["D", "P1", "P2", "P3"]
    assert result["claims"][1]["measured"]["rho"] > 0.5
    assert (tmp_path / "out" / "crosscoder.png").stat().st_size > 10000


def test_texts_begin_and_waits_are_words_inside_a_text(tmp_path, monkeypatch):
    (tmp_path / "text.txt").write_text("what is it? maybe it is four and two. " * 2000)
    flags = [*pair(tmp_path), "--dataset", f"file:{tmp_path}/text.txt", "--out", str(tmp_path)]
    waits = [" e", " i", " f", " m"]
    args = cx.common.parse(cx.Args, [*flags, "--wait", *waits, "--answers", "12"])
    base, ft = (cx.pretrained.load(folder)[0] for folder in (args.base, args.model))
    tok = cx.pretrained.load(args.model)[1]
    tok.bos, tok.opens = tok.n_vocab - 1, True
    plain = tok.encode_batch
    bare = tok.encode(" ")[0]

    def encode_batch(texts):  # as SentencePiece: a blank piece opens a text that opens with a blank
        return [[bare] * text.startswith(" ") + ids for text, ids in zip(texts, plain(texts))]

    tok.encode_batch = encode_batch
    monkeypatch.setattr(cx, "load_pair", lambda args, env: ([base, ft], tok))
    seen = []

    def harvest(models, layer, batches, n, bos):
        idx, mask = next(batches)
        seen.append(idx[:8, 0])
        return torch.zeros(n, 64)

    monkeypatch.setattr(cx.sae, "harvest", harvest)
    env = cx.common.Env(torch.device("cpu"), torch.float32)
    _, wait, _, _ = cx.prepare(args, env, tmp_path)
    words = {cx.pretrained.first_token(tok, word) for word in waits}
    assert set(wait) == words and bare not in wait and len(words) == 4
    assert seen[0].tolist() == [tok.bos] * 8  # a window of text begins as the model expects it


def test_a_pair_that_does_not_belong_together(tmp_path, capsys):
    flags = pair(tmp_path, "entirely other words make another tokenizer " * 9)
    with pytest.raises(SystemExit) as end:
        cx.main([*flags, "--out", str(tmp_path / "out")])
    assert end.value.code == 2 and "in its tokenizers" in capsys.readouterr().err


@pytest.mark.parametrize(
    "flags, message",
    [
        ("--layer 9", "--layer 9, allowed: 0 to 4"),
        ("--k 600", "--k 600, allowed: 1 to 256"),
        ("--top 0", "--top 0, allowed"),
        ("--top 200", "--top 200, allowed: 1 to 64"),
        ("--base x", "needs both --base and --model"),
        ("--answers 3", "--answers has no effect without --model"),
        ("--wait foo", "--wait has no effect without --model"),
        ("--base x --model x --ft-steps 5", "--ft-steps has no effect with --model"),
        ("--rows 100", "--rows 100, allowed: 1024 and more"),
        ("--base nothing-here --model nothing-here", "nothing-here"),
    ],
)
def test_bad_input_is_one_line(flags, message, tmp_path, capsys):
    with pytest.raises(SystemExit) as end:
        cx.main([*flags.split(), "--out", str(tmp_path)])
    error = capsys.readouterr().err.strip()
    assert end.value.code == 2 and error.startswith("error: ") and "\n" not in error
    assert message in error
