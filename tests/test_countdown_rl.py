"""countdown_rl.py: the evaluator, GRPO's parts and the analysis against hand-computed values, exact resume, end to end."""

import copy
import json
import random
import re
from collections import Counter
from fractions import Fraction

import numpy as np
import pytest
import torch
from stand_in import tiny_llama

import common
import countdown_rl as cd
from model import GPT, GPTConfig

torch.set_num_threads(1)
ENV = common.Env(torch.device("cpu"), torch.float32)
SMALL = dict(attempts=2, num_max=6, cap=20)  # short traces


def args_of(**flags):
    return cd.Args(**(cd.Args.presets["smoke"] | SMALL | flags))


@pytest.fixture(scope="module")
def toy():
    args = args_of()
    world = cd.Toy(args, 0)
    model = cd.ToyGPT(args, world, 0)
    with torch.no_grad():  # larger weights: a random model whose heads and choices differ
        for p in model.parameters():
            p.mul_(3.0 if p.dim() == 2 else 1.0)
    rng = random.Random(0)
    texts = [(p, *world.written(*p, rng)) for p in rng.choices(world.train, k=150)]
    return args, world, model, cd.find_traces(world, texts, rng)


# ----------------------------------------------------------------------------------------- expressions, reward


@pytest.mark.parametrize(
    "text, value",
    [
        ("(1 + 2) / 3", 1),
        ("8 / (3 - 8 / 3)", 24),
        ("-3+5", 2),
        ("-(2 + 3) * 4", -20),
        ("7", 7),
        ("0*9", 0),
        ("1 - 2 - 3", -4),
        ("8 / 4 / 2", 1),
        ("1/3 + 1/6", Fraction(1, 2)),
        ("5 - -2 * --3", 11),
        ("\n1 +\t2\n", 3),
    ],
)
def test_evaluate(text, value):
    assert cd.evaluate(text)[0] == value


BAD = "9**2|6//4|0.5*4|07+1|2 3|3(4)|| |1/0|1/(2-2)|٣+1|1_000|1+|)|(1|1234567|2^3|abs(1)|1e3"


@pytest.mark.parametrize("text", [*BAD.split("|"), "1+1" * 80, "99**98**97", "3 = 3"])
def test_bad_expressions(text):
    with pytest.raises(ValueError):
        cd.evaluate(text)


def test_evaluator_limits():
    with pytest.raises(ValueError):
        cd.evaluate("1 / (3 - 3)")
    with pytest.raises(ValueError, match="200"):
        cd.evaluate("(" * 10_000)
    assert cd.evaluate("(" * 99 + "5" + ")" * 99)[0] == 5
    assert cd.evaluate("-" * 199 + "5")[0] == -5
    assert cd.evaluate("1+2*(3-4)/5")[1] == [1, 2, 3, 4, 5]


def test_evaluate_equals_python():
    rng = random.Random(0)

    def text(depth):
        if depth == 0 or rng.random() < 0.2:
            return str(rng.randint(0, 30))
        a, b, op = text(depth - 1), text(depth - 1), rng.choice("+-*/")
        return f"({a}{op}{b})" if rng.random() < 0.5 else f"{a} {op} {b}"

    for _ in range(1000):
        expression = text(rng.randint(0, 4))
        exact = re.sub(r"[0-9]+", lambda number: f"Fraction({number[0]})", expression)
        try:
            value = eval(exact, {"Fraction": Fraction})  # our own text, not a model's
        except ZeroDivisionError:
            value = None
        try:
            assert cd.evaluate(expression)[0] == value
        except ValueError:
            assert value is None or len(expression) > 200


def test_random_strings_give_a_value_or_an_error():
    rng = random.Random(1)
    values = 0
    for _ in range(10_000):
        text = "".join(rng.choices("0123456789+-*/() .x\n", k=rng.randint(0, 12)))
        try:
            value, numbers = cd.evaluate(text)
            assert isinstance(value, Fraction) and numbers
            values += 1
        except ValueError:
            pass
    assert values > 300


@pytest.mark.parametrize(
    "response, score",
    [
        ("<answer>3+4+8</answer>", 1),
        ("<answer>3*4+8</answer>", 0),
        ("<answer>3+4</answer>", 0),  # not all numbers
        ("<answer>3*4+3</answer>", 0),  # a number twice
        ("<answer>3+4+8+0</answer>", 0),
        ("<answer>99**98**97</answer>", 0),
        ("3+4+8", 0),
        ("<answer>3+4+8", 0),
        ("<answer>3+4</answer> <answer>8+4+3</answer>", 1),
        ("<answer>8+4+3</answer> <answer>3+4</answer>", 0),
        ("<answer> talk <answer>8+4+3</answer>", 1),
        ("</answer>8+4+3<answer>", 0),
        ("<answer>3+4+8</answer>\nDone.", 1),
        ("<answer>" * 50_000, 0),
    ],
)
def test_reward(response, score):
    assert cd.reward(response, (3, 4, 8), 15) == score


# -------------------------------------------------------------------------------------------------------- world


def test_attempts_by_hand():
    values = Counter(steps[-1][-1] for steps in cd.attempts((2, 3, 7), 99))
    expected = {2: 2, 6: 3, 7: 1, 8: 5, 11: 2, 12: 6, 13: 2, 15: 1, 17: 2, 19: 2, 20: 2, 23: 2}
    expected |= {27: 2, 35: 2, 42: 6}
    assert values == expected and values.total() == 40
    found = {cd.bracketed(steps) for steps in cd.attempts((2, 3, 7), 99) if steps[-1][-1] == 13}
    assert found == {"( 2 * 3 ) + 7", "( 3 * 2 ) + 7"}
    hard = cd.attempts((5, 11, 68), 99)
    assert len(hard) == 15 and sum(steps[-1][-1] == 62 for steps in hard) == 3


def test_problems_of_the_toy():
    for num_max, cap, total in ((9, 60, 1656), (12, 99, 3971)):
        world = cd.Toy(args_of(num_max=num_max, cap=cap), 0)
        assert len(world.train) + len(world.heldout) == total
        assert not {*world.train} & {*world.heldout}
    assert [n for n, _ in world.heldout[:50]] != sorted(n for n, _ in world.heldout[:50])
    other = cd.Toy(args_of(num_max=12, cap=99), 1)
    assert other.heldout == world.heldout  # the same for every seed


def test_written_traces_are_right(toy):
    args, world, *_ = toy
    rng = random.Random(2)
    solved = 0
    for _ in range(300):
        problem = rng.choice(world.train)
        prompt, response = world.written(*problem, rng)
        text = world.decode(response)
        words = cd.verdicts_in(text)
        assert 1 <= len(words) <= args.attempts and len(response) <= world.max_new
        lines = re.findall(r"\[ (.*?) ([a-z]+)", text)
        assert [word for _, word in lines] == words
        for equations, word in lines:
            for equation in equations.split(" , "):
                left, result = equation.split(" = ")
                assert cd.evaluate(left)[0] == int(result)
            assert word in (cd.VALID if int(result) == problem[1] else cd.INVALID)
        right = [word for word in words if word in cd.VALID]
        assert cd.reward(text, *problem) == len(right) == ("</answer>" in text)
        solved += len(right)
        words = world.decode(prompt + response).split(" ")[1:]
        numbers = [(i, int(word)) for i, word in enumerate(words) if word.isdigit()]
        assert cd.numbers_in(world, prompt + response) == numbers
        guess = world.decode(world.written(*problem, rng, checks=False)[1])
        assert "[" not in guess and guess.endswith("</answer> <eos>")
    assert 30 < solved < 270


def test_the_drill_counts_results_and_verdicts(toy):
    _, world, *_ = toy
    rng = random.Random(0)
    kinds = Counter()
    for problem in world.train:
        ids, counts = world.drill(*problem, rng)
        words = world.decode(ids).split(" ")[1:]
        short = sum(word in cd.VALID[1:] for word in words)  # [ yes ] in place of [ this works ]
        assert len(ids) == len(counts) == 8 + 2 * 16 - short
        assert not any(counts[:8])
        start = 8
        while start < len(words):
            end = words.index("\n", start) + 1
            line, counted = words[start:end], counts[start:end]
            verdict = next(i for i, word in enumerate(line) if word in cd.VALID + cd.INVALID)
            known = [i >= verdict or i > 0 and line[i - 1] == "=" for i in range(len(line))]
            right = line[verdict - 1] == str(problem[1])
            assert all(counted) or counted == known and right
            kinds[all(counted), right] += 1
            start = end
    assert abs(kinds[False, True] / kinds.total() - 0.5) < 0.1 and kinds[True, True] > 0


def test_batches_hold_training_problems_only(toy):
    args, world, *_ = toy
    for step in 0, 3:
        a, b = world.batch(step, ENV), world.batch(step, ENV)
        assert all(torch.equal(a[k], b[k]) for k in a)
        for row in a["idx"].tolist():
            words = world.decode(row).split()
            numbers = words[words.index("use") + 1 :][:3]
            target = int(words[words.index("make") + 1])
            assert (tuple(sorted(map(int, numbers))), target) in {*world.train}
    assert not torch.equal(world.batch(0, ENV)["idx"], world.batch(1, ENV)["idx"])
    halves = [world.batch(0, common.Env(ENV.device, ENV.dtype, rank, 2)) for rank in (0, 1)]
    assert sum(len(half["idx"]) for half in halves) == args.batch_size


def test_collate_by_hand():
    rows = [cd.counted([1, 2], [3, 4]), cd.counted([5], [6])]
    batch = cd.collate(rows)
    assert batch["idx"].tolist() == [[1, 2, 3], [5, 6, 0]]
    assert batch["targets"].tolist() == [[-100, 3, 4], [6, -100, -100]]
    idx, targets = cd.trimmed(batch["idx"][1:], batch["targets"][1:])
    assert idx.tolist() == [[5]] and targets.tolist() == [[6]]


def test_verdicts_in():
    text = "[ 3 + 4 = 7 , 7 * 5 = 35 not 31 ] \n 3 * 4 = 12 , 12 + 5 = 17 \n junk \n [ 1 + = 2 yes ] \n"
    assert cd.verdicts_in(text + " </think> 1 = 2 not") == ["not", "", "yes"]
    assert cd.verdicts_in("[ 3 + 4 = 7 , 7 * 5 = 35 yes ] \n [ 3 + 4 = 7 , 7 - 5") == ["yes"]
    paper = "- 40 - 7 - 9 = 33 - 9 = 24 (not 42)\n- (40 - 7) + 9 = 33 + 9 = 42 (this works)\n"
    assert cd.verdicts_in(paper) == ["not", "this"]


# --------------------------------------------------------------------------------------------------------- GRPO


def test_advantages_by_hand():
    r = torch.tensor([1, 0.1, 0.1, 0])
    expected = torch.tensor([1.4924, -0.4264, -0.4264, -0.6396])
    assert torch.allclose(cd.advantages(r, 4), expected, atol=1e-3)
    two = cd.advantages(torch.cat((r, torch.full((4,), 0.1))), 4)
    assert torch.equal(two[:4], cd.advantages(r, 4))
    assert torch.equal(two[4:], torch.zeros(4))  # exactly, though .1 is no binary fraction


def test_clip_by_hand():
    for advantage, ratio, value, has_gradient in (
        (1, 1.5, 1.2, 0),
        (1, 0.5, 0.5, 1),
        (-1, 0.5, -0.8, 0),
        (-1, 1.5, -1.5, 1),
    ):
        rho = torch.tensor(ratio, requires_grad=True)
        gain = cd.clipped_gain(rho, torch.tensor(float(advantage)), 0.2)
        gain.backward()
        assert gain.item() == pytest.approx(value) and (rho.grad != 0) == has_gradient


def test_gradient_of_the_divergence_by_enumeration():
    """Its mean over the three choices of a policy is the gradient of KL(policy || reference)."""
    torch.manual_seed(0)
    for _ in range(20):
        logits, reference = torch.randn(2, 3)
        logits.requires_grad_()
        reference = reference.log_softmax(0)
        logp = logits.log_softmax(0)
        (logp.exp() * (logp - reference)).sum().backward()
        exact, logits.grad = logits.grad, None
        logp = logits.log_softmax(0)
        (logp.exp().detach() * cd.divergence(logp, reference)).sum().backward()
        assert torch.allclose(logits.grad, exact, atol=1e-6)


def rollouts(toy, permuted=False, **flags):
    args, world, model, _ = toy
    args = args_of(prompts=6, group=4, **flags)
    return args, world, model, *cd.draw_batch(model, world, args, ENV, 3, permuted)


def test_a_batch_of_rollouts(toy, monkeypatch):
    monkeypatch.setattr(cd, "reward", lambda text, nums, target: len(text) % 3 / 2)
    args, world, model, batch, mean = rollouts(toy)
    assert len(batch["idx"]) == 24 == len(batch["advantage"])
    again = rollouts(toy)[3]
    assert all(torch.equal(batch[key], again[key]) for key in batch)
    other = rollouts(toy, permuted=True)[3]
    assert torch.equal(batch["targets"], other["targets"])  # the same rollouts
    assert not torch.equal(batch["advantage"], other["advantage"])
    here = batch["targets"] != -100
    scored = cd.scored(model, batch, ENV)
    full = model(batch["idx"]).log_softmax(-1)
    expected = full.gather(2, batch["targets"].clamp(min=0)[..., None])[..., 0]
    assert torch.allclose(scored[here], expected[here], atol=1e-5) and (scored[~here] == 0).all()
    assert 0 < mean < 1


def test_on_policy_gradient(toy):
    """rho = 1, and the gradient is that of -A log p, averaged over all tokens."""
    args, world, model, batch, _ = rollouts(toy)
    advantage = torch.randn(24)
    here = batch["targets"] != -100
    denom = here.sum()
    for old in None, cd.scored(model, batch, ENV):
        model.zero_grad()
        loss = cd.Objective(model, args)(
            batch["idx"], batch["targets"], advantage, old, None, denom
        )
        loss.backward()
        grads = [p.grad.clone() for p in model.parameters()]
        model.zero_grad()
        logp = model(batch["idx"]).log_softmax(-1)
        logp = logp.gather(2, batch["targets"].clamp(min=0)[..., None])[..., 0]
        (-(advantage[:, None] * logp)[here].sum() / denom).backward()
        for a, p in zip(grads, model.parameters()):
            assert torch.allclose(a, p.grad, atol=1e-5)
    model.zero_grad()


def test_rows_without_advantage_are_dropped_and_still_counted(toy):
    args, world, model, batch, _ = rollouts(toy, minibatches=3)
    batch["advantage"] = torch.tensor([1.0, -1, 0, 0] * 6)
    parts = [cd.minibatch(batch, args, 5, part) for part in range(3)]
    lengths = (batch["targets"] != -100).sum(1)
    assert sum(int(part["denom"]) for part in parts) == lengths.sum()
    assert sum(len(part["idx"]) for part in parts) == 12
    assert all((part["advantage"] != 0).all() for part in parts)
    kept = [cd.minibatch(batch, args_of(minibatches=3, beta=0.1), 5, part) for part in range(3)]
    rows = torch.cat([part["idx"] for part in kept]).tolist()
    assert sorted(rows) == sorted(batch["idx"].tolist())  # each row in one part
    assert sum(len(part["idx"]) for part in kept) == 24
    batch["advantage"] *= 0
    assert [len(cd.minibatch(batch, args, 5, part)["idx"]) for part in range(3)] == [1, 1, 1]


def test_beta_pulls_back_to_the_reference(toy):
    """With no advantage the loss is beta times the mean divergence, and its gradient isn't zero."""
    args, world, model, batch, _ = rollouts(toy, beta=0.5)
    here = batch["targets"] != -100
    reference = cd.scored(model, batch, ENV) - 0.1
    objective = cd.Objective(model, args)
    loss = objective(batch["idx"], batch["targets"], torch.zeros(24), None, reference, here.sum())
    assert loss.item() == pytest.approx(0.5 * 0.1**2 / 2, rel=1e-3)


# ----------------------------------------------------------------------------------------------------- analysis


def test_traces_by_hand(toy):
    _, world, *_ = toy
    prompt = "<bos> use 3 4 5 make 17 <think>"
    wrong, right = (
        "[ 3 + 4 = 7 , 7 + 5 = 12 not 17 ] \n ",
        "[ 3 * 4 = 12 , 12 + 5 = 17 this works ] \n",
    )
    false = wrong.replace("not 17", "yes"), right.replace("this works", "no 17")
    problem = ((3, 4, 5), 17)
    texts = [wrong + right, false[0] + right, wrong + false[1], right, wrong + false[1] + right]
    texts = [(problem, world.encode(prompt), world.encode(text)) for text in texts]
    traces = cd.find_traces(world, texts, random.Random(0))
    assert len(traces) == 2  # both verdicts, and true
    words = (prompt + " " + wrong + right).replace("\n", "newline").split()
    for trace in traces:
        assert world.decode(trace.ids[-2:]) == " = 17"
        assert world.decode(trace.ids[: trace.wrong + 1]).endswith("7 + 5 = 12")
    assert traces[0].seen == [6, words.index("not") + 1] and len(traces[1].seen) == 4


def test_attention_to_the_target_by_hand(toy):
    args, world, model, traces = toy
    mass, even = cd.target_attention(model, world, traces[:7])
    by_hand, evenly = 0, []
    for trace in traces[:7]:
        words = [world.words[token] for token in trace.ids]
        assert trace.seen == [j for j, word in enumerate(words[:-1]) if word == words[-1]]
        with torch.no_grad():
            site = "blocks.2.attn.pattern"
            pattern = model.capture(torch.tensor([trace.ids]), [site])[site]
        by_hand = by_hand + pattern[0, :, -1][:, trace.seen].sum(-1) / 7
        evenly.append(len(trace.seen) / len(trace.ids))
    assert torch.allclose(mass[2], by_hand, atol=1e-5)
    assert even == pytest.approx(np.mean(evenly))


def test_halves_share_no_problem(toy):
    args, world, model, _ = toy
    a, b = cd.halves(model, world, args, ENV, random.Random(0))
    assert not {trace.problem for trace in a} & {trace.problem for trace in b}
    for half in a, b:
        assert 3 <= len(half) <= args.samples
        assert half == sorted(half, key=lambda trace: len(trace.ids))


def test_heads_off_equal_one_prefix_at_a_time_in_full(toy):
    args, world, model, traces = toy
    traces = traces[:20]
    neurons = [(1, 3), (3, 5)]
    sets = [[], [(0, 1)], [(1, 2), (3, 0)], [(2, 7)]]
    with torch.no_grad():
        rows = cd.switch_off(model, world, traces, neurons, sets)
        for heads, row in zip(sets, rows):
            said, glu = {"right": [], "wrong": []}, []
            for trace in traces:
                for side, ids in ("right", trace.ids), ("wrong", trace.ids[: trace.wrong + 1]):
                    with model.patch(common.heads_off(heads, model)):
                        sites = [f"blocks.{layer}.mlp.act" for layer, _ in neurons]
                        acts = model.capture(torch.tensor([ids]), ["final", *sites])
                    token = model.unembed(acts["final"])[0, -1].argmax().item()
                    said[side].append(token)
                    if side == "right":
                        glu += [acts[f"blocks.{l}.mlp.act"][0, -1, i].item() for l, i in neurons]
            assert row["glu"] == pytest.approx(np.mean(glu), abs=1e-5)
            assert row["says_valid"] == np.mean([token in world.valid for token in said["right"]])
            assert row["false_accepts"] == np.mean([t in world.valid for t in said["wrong"]])
            goes_on = [cd.searches_on(token, world) for token in said["right"]]
            assert row["searches_on"] == np.mean(goes_on)


@pytest.mark.parametrize(
    "change", [{}, {"windows": [3, 0, 5], "rope_base_local": 50.0}, {"learned_pos": True}]
)
def test_a_pass_goes_on_from_a_block(change):
    model = GPT(GPTConfig(20, 32, 3, 2, 16, **change))
    idx = torch.randint(20, (2, 11))
    inputs = [f"blocks.{layer}.resid_pre" for layer in range(3)]
    acts = model.capture(idx, [*inputs, "final"])
    for first, site in enumerate(inputs):
        assert torch.equal(model.hidden(idx, first=first, x=acts[site]), acts["final"])


def test_what_searches_on(toy):
    _, world, *_ = toy
    for word in *cd.INVALID, "7", "=", "\n", "[", "]":
        assert cd.searches_on(world.id[word], world)
    for word in *cd.VALID, "works", "<eos>", "</think>", "make":
        assert not cd.searches_on(world.id[word], world)


def test_random_heads_are_of_the_same_layers_and_outside():
    c, rng = GPTConfig(50, 32, 4, 8, 16), random.Random(0)
    heads = [(1, 0), (1, 1), (2, 5)]
    for _ in range(50):
        drawn = cd.random_heads(heads, c, rng, heads)
        assert [l for l, _ in drawn] == [1, 1, 2]
        assert not {*drawn} & {*heads} and len({*drawn}) == 3
    full = [(1, h) for h in range(8)]
    assert {l for l, _ in cd.random_heads(heads[:1], c, rng, full)} <= {0, 2}


def test_probe_and_lens_of_what_was_put_there(toy):
    _, world, model, _ = toy
    gen = torch.Generator().manual_seed(0)
    y = torch.arange(200) % 2 == 0
    x = torch.randn(3, 200, 8, generator=gen)
    x[1, :, 3] += torch.where(y, 3.0, -3.0)
    found = cd.probe_accuracy(x[:, :100], y[:100], x[:, 100:], y[100:])
    assert found["inner"] == found["layers"][1] > 0.97
    assert found["embedding"] == found["layers"][0] < 0.7 > found["layers"][2]
    model = copy.deepcopy(model)
    direction = torch.randn(32, generator=gen)
    with torch.no_grad():
        model.head.weight[world.valid] += direction
        model.head.weight[world.invalid] -= direction
    reads, success, failure = cd.verdict_words(model, world, direction[None])
    assert reads.item() == 1
    assert {*success[0].tolist()} == {*world.valid} and {*failure[0].tolist()} == {*world.invalid}
    assert cd.verdict_words(model, world, -direction[None])[0].item() == 0


# ------------------------------------------------------------------------------------------------- a real model


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A checkpoint of random weights whose tokenizer has ` (`, `this` and `not` as single tokens."""
    lines = [cd.PROMPT, "- 40 - 7 = 33 (not 42)", "(this works)", " (", "this not"] * 20
    shape = dict(block_size=1024, n_layer=3, n_head=4, n_embd=32, n_kv_head=2)
    return tiny_llama(tmp_path_factory.mktemp("real"), lines, 420, **shape)


@pytest.fixture(scope="module")
def problems(tmp_path_factory):
    path = tmp_path_factory.mktemp("problems") / "p.jsonl"
    rows = [{"nums": [3, 4, n], "target": 7 + n} for n in range(1, 40)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def real(folder, problems, out, flags):
    common_flags = (
        f"--preset smoke --max-new 6 --problems 4 --model {folder} --dataset file:{problems}"
    )
    return cd.main([*common_flags.split(), "--out", str(out), *flags.split()])


def test_a_real_model_is_taken_apart_on_its_own_text(folder, problems, tmp_path, monkeypatch):
    from pretrained import load

    tok = load(str(folder))[1]

    def write(model, prompts, *given, **options):
        texts = []
        for prompt in prompts:
            target = re.search(r"Make (\d+)", tok.decode(prompt))[1]
            text = f"\n- 4 + 2 = 6 (not {target})\n- 3 + 4 = 7 = {target} (this works)\n"
            texts.append(tok.encode(text))
        return texts

    monkeypatch.setattr(cd, "generate", write)
    result = real(folder, problems, tmp_path, "--rl-steps 0")
    assert [claim["id"] for claim in result["claims"]] == ["C3", "C4", "C5", "C7"]
    assert min(result["metrics"]["dissect"][0]["traces"]) >= 3


def test_a_real_model_that_writes_no_verdicts(folder, problems, tmp_path, capsys):
    with pytest.raises(SystemExit):
        real(folder, problems, tmp_path, "--rl-steps 0")
    assert "too few traces" in capsys.readouterr().err


def test_tokens_of_a_verdict_in_sentencepiece(problems):
    """A tokenizer that puts a blank before every text: ` (` is one piece inside a text, two alone."""
    from types import SimpleNamespace

    pieces = ["▁", "▁(", "(", "1", "x", ".", "▁the"]
    pieces += [mark + word for word in cd.VALID + cd.INVALID for mark in ("", "▁")]

    def encode(text, bos=False):
        text, ids = "▁" + text.replace(" ", "▁"), []
        while text:
            piece = max((p for p in pieces if text.startswith(p)), key=len)
            ids.append(pieces.index(piece))
            text = text[len(piece) :]
        return ids

    def decode(ids):
        return "".join(pieces[i] for i in ids).replace("▁", " ").removeprefix(" ")

    tok = SimpleNamespace(encode=encode, decode=decode, stops=[0], name="pieces")
    world = cd.Real(cd.Args(model="x", dataset=f"file:{problems}"), tok, 0)
    assert world.opening == [pieces.index("▁(")]
    assert [pieces[i] for i in world.valid] == ["this", *["▁" + word for word in cd.VALID]]
    assert [pieces[i] for i in world.invalid] == ["not", *["▁" + word for word in cd.INVALID]]
    assert encode(" (")[:1] != world.opening


def test_a_real_model_is_trained(folder, problems, tmp_path, monkeypatch):
    monkeypatch.setattr(cd, "dissect", nothing)
    monkeypatch.setattr(cd, "judge", nothing)
    monkeypatch.setattr(cd, "draw", nothing)
    flags = "--beta .01 --minibatches 2 --micro-batch 2 --rl-lr .1"
    result = real(folder, problems, tmp_path, flags)
    assert set(result["metrics"]) == {"grpo", "dissect"}
    weights = common.load_checkpoint(tmp_path / "grpo-s0.pt")["model"]
    assert "policy.blocks.2.mlp.down.weight" in weights


def nothing(*given):
    """In place of what a test doesn't need."""


def test_numbers_of_digits_and_traces_in_the_papers_form(folder, problems):
    from pretrained import load

    args = cd.Args(model="x", dataset=f"file:{problems}")
    world = cd.Real(args, load(str(folder))[1], 0)
    encode = world.tok.encode
    assert [v for _, v in cd.numbers_in(world, encode("162 + 62 - 620"))] == [162, 62, 620]
    assert cd.numbers_in(world, encode("9") * 5000) == [(4999, 10**6)]  # a model that goes on
    text = "- 40 - 7 - 9 = 33 - 9 = 24 (not 42)\n- 40 - 7 + 9 = 33 + 9 = 42 (this works)\n"
    prompt = world.prompt((7, 9, 40), 42, random.Random(0))
    (trace,) = cd.find_traces(world, [(((7, 9, 40), 42), prompt, encode(text))], random.Random(0))
    assert world.decode(trace.ids).endswith("= 33 + 9 = 42 (")
    assert world.decode(trace.ids[: trace.wrong + 1]).endswith("= 24 (")
    assert len(trace.seen) == 2 and trace.ids[: len(prompt)] == prompt


# --------------------------------------------------------------------------------------------------- the script

TINY = "--preset smoke --attempts 2 --num-max 6 --cap 20".split()


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    out = tmp_path_factory.mktemp("smoke")
    return out, cd.main([*TINY, "--out", str(out)])


def test_smoke(smoke):
    out, result = smoke
    assert result == json.loads((out / "result.json").read_text())
    assert [c["id"] for c in result["claims"]] == ["C1", "C2", "C3", "C4", "C5", "C7"]
    assert all(c["measured"] and c["control"] for c in result["claims"])
    rows = common.read_log(out / "metrics.jsonl")
    assert {r["run"] for r in rows} == {"imitate-s0", "grpo-s0", "permuted-s0"}
    assert (out / "countdown_rl.png").stat().st_size > 10_000
    before = [result["metrics"][arm][0]["before"] for arm in ("grpo", "permuted")]
    assert before[0] == before[1]  # both arms start from the same model


def test_resume_of_grpo_is_exact(tmp_path, monkeypatch):
    monkeypatch.setattr(cd, "reward", lambda *given: float(len(given[0]) % 2))  # that differ
    flags = dict(minibatches=2, rl_steps=6, save_every=3, rl_lr=0.01, beta=0.1, eval_every=9)
    taken, calls = cd.minibatch, []

    def interrupted(*given):
        calls.append(0)
        if len(calls) == 5:
            raise MemoryError
        return taken(*given)

    def run(name):
        args = args_of(resume=True, out=str(tmp_path / name), problems=2, **flags)
        (tmp_path / name).mkdir(exist_ok=True)
        cd.imitate(args, ENV, common.Log(args, ENV, "imitate-s0"), "imitate", 0)
        log = common.Log(args, ENV, "grpo-s0")
        found = cd.reinforce(args, ENV, log, "grpo", 0)
        rows = common.read_log(log.path)
        for row in rows:
            row.pop("seconds", None), row.pop("tokens_per_s", None)
        return common.load_checkpoint(tmp_path / name / "grpo-s0.pt")["model"], rows, found

    whole = run("whole")
    monkeypatch.setattr(cd, "minibatch", interrupted)
    with pytest.raises(MemoryError):
        run("halves")
    monkeypatch.setattr(cd, "minibatch", taken)
    # of twelve updates, two on a batch: in the middle of one
    path = tmp_path / "halves" / "grpo-s0.pt"
    assert common.load_checkpoint(path)["step"] == 3
    halves = run("halves")
    weights = [key for key in whole[0] if key.startswith("policy.")]
    start = common.load_checkpoint(tmp_path / "whole" / "imitate-s0.pt")["model"]
    assert not torch.equal(start["head.weight"], whole[0]["policy.head.weight"])
    assert all(torch.equal(whole[0][key], halves[0][key]) for key in weights)
    assert whole[1:] == halves[1:]
    flags["steps"] = 9
    with pytest.raises(SystemExit):  # GRPO would go on from another imitator than it began with
        run("halves")


@pytest.mark.parametrize(
    "flags, message",
    [
        ("--group 1", "2 and more"),
        ("--minibatches 0", "1 and more"),
        ("--minibatches 999", "more than the rollouts"),
        ("--nums 1", "allowed: 2"),
        ("--nums 2 --num-max 1", "too few problems"),
        ("--cap 0", "--cap 0"),
        ("--attempts 1", "--attempts 1, allowed: 2"),
        ("--samples 1", "too few traces for --samples 1"),
        ("--nums 2 --num-max 2 --cap 4 --samples 3", "too few"),
        ("--max-new 9", "--max-new: no effect without --model"),
        (
            "--model /nowhere --dataset file:x.jsonl --nums 4 --guess .5",
            "--guess --nums: no effect",
        ),
        ("--dataset file:x.jsonl", "--model and --dataset"),
        ("--model /nowhere", "--model and --dataset"),
        ("--model /nowhere --dataset file:x.jsonl", "no model"),
    ],
)
def test_bad_flags(flags, message, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        cd.main(["--preset", "smoke", "--out", str(tmp_path), *flags.split()])
    err = capsys.readouterr().err.strip().splitlines()
    assert stop.value.code == 2 and len(err) == 1 and message in err[0]


@pytest.mark.parametrize(
    "row",
    ['{"nums": [4], "target": 4}', '{"nums": ["3", "4"], "target": 7}', '{"nums": [3, 4]}']
    + ['{"nums": [3, 4], "target": 31.9}', '{"nums": [3, true], "target": 4}', "[1]", "{"],
)
def test_bad_problems(row, tmp_path):
    path = tmp_path / "p.jsonl"
    path.write_text('{"nums": [3, 4], "target": 7}\n' + row + "\n")
    with pytest.raises(ValueError, match="p.jsonl.*2"):
        cd.read_problems(f"file:{path}")
