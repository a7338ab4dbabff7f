"""countdown_rl.py: evaluator, solver and losses against hand-computed values, passes against each other, end to end."""

import itertools
import json
import random
import shutil
import signal
import time
from collections import Counter
from dataclasses import replace
from fractions import Fraction

import pytest
import torch
import torch.nn.functional as F

import legacy as common
import countdown_rl as cd
from model import GPT, GPTConfig, generate

torch.set_num_threads(1)
ENV = common.Env(torch.device("cpu"), torch.float32)


def args_of(**flags):
    return cd.Args(**(cd.Args.presets["smoke"] | flags))


@pytest.fixture(scope="module")
def toy():
    args = args_of()
    world = cd.Toy(args, 0)
    model = cd.toy_model(args, world, 0)
    with torch.no_grad():  # larger weights: a random model whose heads and choices differ
        for p in model.parameters():
            p.mul_(3.0 if p.dim() == 2 else 1.0)
    rng = random.Random(0)
    traces = [(p, *world.written(*p, rng)) for p in rng.choices(world.train, k=60)]
    return args, world, model, cd.find_steps(world, traces)


# ------------------------------------------------------------------------------------------------ expressions, reward


@pytest.mark.parametrize(
    "text, value",
    [("(1 + 2) / 3", 1), ("8 / (3 - 8 / 3)", 24), ("-3+5", 2), ("-(2 + 3) * 4", -20), ("7", 7), ("0*9", 0)]
    + [("1 - 2 - 3", -4), ("8 / 4 / 2", 1), ("1/3 + 1/6", Fraction(1, 2))],
)
def test_evaluate(text, value):
    assert cd.evaluate(text)[0] == value


@pytest.mark.parametrize(
    "text",
    ["9**2", "6//4", "0.5*4", "07+1", "2 3", "3(4)", "", " ", "1/0", "1/(2-2)", "٣+1", "1_000", "1+", ")", "(1", "--1"]
    + ["1234567", "1+1" * 80, "2^3", "abs(1)", "1e3", "99**98**97", "3 = 3"],
)
def test_bad_expressions(text):
    with pytest.raises(cd.BadExpression):
        cd.evaluate(text)


def test_evaluator_limits():
    with pytest.raises(cd.BadExpression, match="division by zero"):
        cd.evaluate("1 / (3 - 3)")
    with pytest.raises(cd.BadExpression, match="deeper"):
        cd.evaluate("(" * 200)
    with pytest.raises(cd.BadExpression, match="200"):
        cd.evaluate("(" * 10_000)
    assert cd.evaluate("(" * 32 + "5" + ")" * 32)[0] == 5
    assert cd.evaluate("1+2*(3-4)/5")[1:] == ([1, 2, 3, 4, 5], 4)


def test_evaluate_equals_python():
    rng = random.Random(0)

    def text(depth):
        if depth == 0 or rng.random() < 0.2:
            return str(rng.randint(0, 30))
        a, b, op = text(depth - 1), text(depth - 1), rng.choice("+-*/")
        return f"({a}{op}{b})" if rng.random() < 0.5 else f"{a} {op} {b}"

    for _ in range(2000):
        expression = text(rng.randint(0, 4))
        exact = __import__("re").sub(r"[0-9]+", lambda m: f"Fraction({m[0]})", expression)
        try:
            value = eval(exact, {"Fraction": Fraction})  # our own text, not a model's
        except ZeroDivisionError:
            value = None
        try:
            assert cd.evaluate(expression)[0] == value
        except cd.BadExpression:
            assert value is None or len(expression) > 200


def test_random_strings_give_a_value_or_bad_expression():
    rng, began = random.Random(1), time.monotonic()
    for _ in range(20_000):
        text = "".join(rng.choices("0123456789+-*/() .x\n", k=rng.randint(0, 40)))
        try:
            value, ints, ops = cd.evaluate(text)
            assert isinstance(value, Fraction) and ops == len(ints) - 1
        except cd.BadExpression:
            pass
    assert time.monotonic() - began < 60  # no hang


@pytest.mark.parametrize(
    "response, plain, compat, subset",
    [
        ("<answer>3+4+8</answer>", 1, 1, 1),
        ("<answer>3*4+8</answer>", 0.1, 0.1, 0.1),
        ("<answer>3+4</answer>", 0.1, 0.1, 0.1),
        ("<answer>3*4+3</answer>", 0.1, 0.1, 0.1),  # a number twice
        ("<answer>3+4+8+0</answer>", 0.1, 0.1, 0.1),
        ("<answer>99**98**97</answer>", 0.1, 0.1, 0.1),
        ("3+4+8", 0, 0, 0),
        ("<answer>3+4</answer> <answer>8+4+3</answer>", 1, 1, 1),
        ("<answer>3+4+8</answer>\nDone.", 1, 0, 1),
    ],
)
def test_reward(response, plain, compat, subset):
    args = args_of(format_reward=0.1)
    scores = [
        cd.reward(response, (3, 4, 8), 15, a)
        for a in (args, replace(args, tinyzero_compat=True), replace(args, use_all=False))
    ]
    assert scores == [plain, compat, subset]
    assert cd.reward("<answer>3+4</answer>", (3, 4, 8), 7, replace(args, use_all=False)) == 1


# ------------------------------------------------------------------------------------------------------ solver, world


def test_attempts_by_hand():
    values = Counter(t[-1][-1] for t in cd.attempts((2, 3, 7), 99))
    expected = {2: 2, 6: 3, 7: 1, 8: 5, 11: 2, 12: 6, 13: 2, 15: 1, 17: 2, 19: 2, 20: 2, 23: 2, 27: 2, 35: 2, 42: 6}
    assert values == expected and values.total() == 40
    thirteen = {cd.bracketed(t) for t in cd.attempts((2, 3, 7), 99) if t[-1][-1] == 13}
    assert thirteen == {"( 2 * 3 ) + 7", "( 3 * 2 ) + 7"}
    hard = cd.attempts((5, 11, 68), 99)
    assert len(hard) == 15 and sum(t[-1][-1] == 62 for t in hard) == 3


def test_full_solver():
    numbers = [(Fraction(n), str(n)) for n in (3, 5, 7, 11)]
    assert [len(list(cd.expressions(numbers[:n]))) for n in (3, 4)] == [108, 3888]
    assert Fraction(24) in cd.reachable((3, 3, 8, 8)) and Fraction(1000) not in cd.reachable((1, 2, 3))
    for value, text in cd.reachable((2, 3, 7)).items():
        assert cd.evaluate(text)[0] == value


def test_worlds_sizes_and_baselines():
    for num_max, cap, total, hit in ((9, 60, 1656, 0.45), (12, 99, 3971, 0.43)):
        world = cd.Toy(args_of(num_max=num_max, cap=cap), 0)
        assert len(world.train) + len(world.heldout) == total and not {*world.train} & {*world.heldout}
        assert abs(cd.baselines(world.train + world.heldout, cap, 6)[0] - hit) < 0.006
    assert abs(cd.baselines(world.train + world.heldout, cap, 6)[1] - 0.76) < 0.006


def test_traces_parse_and_score(toy):
    args, world, *_ = toy
    rng = random.Random(2)
    for _ in range(300):
        problem = rng.choice(world.train)
        prompt, response = world.written(*problem, rng)
        text = world.decode(response)
        found = world.examine([problem], [text])
        assert found["arithmetic"] == found["checked"] == found["wellformed"] == 1 and len(response) <= world.max_new
        assert found["accuracy"] == ("this" in text or any(w in text for w in cd.VALID)) == ("</answer>" in text)
        assert len(prompt) + len(response) <= world.longest
        for _, last, value in world.spans(prompt + response):
            assert world.words[(prompt + response)[last]] == str(value)
        guess = world.decode(world.written(*problem, rng, checks=False)[1])
        assert "[" not in guess and guess.endswith("</answer> <eos>")


def test_batches_hold_training_problems_only(toy):
    args, world, *_ = toy
    for step in (0, 3, 5):
        a, b = world.batch(step), world.batch(step)
        assert all(torch.equal(a[k], b[k]) for k in a)
        ids, docs = a["idx"].tolist(), a["docs"].tolist()
        for row, doc in zip(ids, docs):
            for d in range(1, max(doc) + 1):
                words = [world.words[i] for i, e in zip(row, doc) if e == d]
                head = words[: words.index("<think>")]
                target = int(head[head.index("make") + 1])
                at = head.index("use")
                assert (tuple(sorted(map(int, head[at + 1 : at + 4]))), target) in {*world.train}
        assert (a["weights"][a["docs"] == 0] == 0).all()
    args = args_of(steps=100, drill=0, guess=0.0)
    part = cd.Toy(args, 0).batch(90)  # no drill so late: every next token of a document counts, but for the prompt's
    inside = (part["docs"][:, 1:] == part["docs"][:, :-1]) & (part["docs"][:, 1:] > 0)
    assert torch.equal(part["targets"][:, :-1][inside], part["idx"][:, 1:][inside])
    assert (part["weights"][:, :-1][~inside] == 0).all() and part["weights"].max() == 4


def test_examine_counts_slips(toy):
    _, world, *_ = toy
    text = "3 + 4 = 7 , 7 * 5 = 36 [ not 35 ] \n 3 * 4 = 12 , 12 + 5 = 35 [ this works ] \n </think>"
    text += " <answer> ( 3 * 4 ) + 5 </answer> <eos>"
    found = world.examine([((3, 4, 5), 35)], [text])
    assert found["accuracy"] == 0 and found["arithmetic"] == 0 and found["checked"] == 1
    assert found["recall_valid"] == found["recall_invalid"] == 1 and found["attempts"] == 2


# ---------------------------------------------------------------------------------------------------------------- GRPO


def test_advantages_by_hand():
    r = torch.tensor([1, 0.1, 0.1, 0])
    assert torch.allclose(cd.advantages(r, 4), torch.tensor([1.4924, -0.4264, -0.4264, -0.6396]), atol=1e-3)
    assert torch.allclose(cd.advantages(r, 4, "none"), torch.tensor([0.7, -0.2, -0.2, -0.3]))
    two = cd.advantages(torch.cat((r, torch.full((4,), 0.5))), 4)
    assert torch.equal(two[4:], torch.zeros(4)) and torch.equal(two[:4], cd.advantages(r, 4))
    with pytest.raises(ValueError, match="at least 2"):
        cd.advantages(r, 1)


def test_divergence_and_clip_by_hand():
    logp = torch.zeros(4)
    k3 = cd.divergence(logp, torch.tensor([0.1, -0.1, 0.5, 0.0]))
    assert torch.allclose(k3, torch.tensor([0.0051709, 0.0048374, 0.1487213, 0.0]), atol=1e-6)
    assert (cd.divergence(torch.randn(1000), torch.randn(1000)) >= 0).all()
    for advantage, ratio, value, has_gradient in (
        (1, 1.5, 1.28, 0),
        (1, 0.5, 0.5, 1),
        (-1, 0.5, -0.8, 0),
        (-1, 1.5, -1.5, 1),
    ):
        rho = torch.tensor(ratio, requires_grad=True)
        gain = cd.surrogate(rho, torch.tensor(float(advantage)), 0.2, 0.28)
        gain.backward()
        assert gain.item() == pytest.approx(value) and (rho.grad != 0) == has_gradient


@pytest.mark.parametrize("kind, expected", [("seq", 0.0), ("token", -1 / 3), ("const", -0.125)])
def test_aggregation_by_hand(kind, expected):
    lengths, losses = torch.tensor([2.0, 4.0]), torch.tensor([1.0, -1.0])
    weights, denom = cd.aggregation(lengths, kind, 8)
    assert ((weights * losses * lengths).sum() / denom).item() == pytest.approx(expected)


def rollouts(toy, n=6, group=4, **flags):
    args, world, model, _ = toy
    args = replace(args, prompts=n, group=group, **flags)
    return args, world, model, *cd.draw_rollouts(model, world, args, ENV, 3)


def test_rollout_equals_the_full_forward(toy):
    args, world, model, rows, rewards, _ = rollouts(toy)
    assert len(rows) == 24 == len(rewards) and len({tuple(r) for _, r, _ in rows}) > 1
    for prompt, response, logp in rows:
        full = model(torch.tensor([prompt + response])).log_softmax(-1)[0, len(prompt) - 1 : -1]
        assert torch.allclose(logp, full[torch.arange(len(response)), response], atol=1e-5)
        assert world.stops[0] not in response[:-1]
    prompts = [world.prompt(*p, random.Random(0)) for p in world.train[:5]]
    greedy = cd.rollout(model, prompts, 2, 30, 0.0, world.stops, 0)[0]
    assert greedy[::2] == greedy[1::2] == generate(model, prompts, 30, 0.0, stop=world.stops)
    again = rollouts(toy)[3]
    assert [r for _, r, _ in again] == [r for _, r, _ in rows]


def test_shuffled_rewards_are_the_same_rewards(toy):
    args, world, model, _ = toy
    args = replace(args, prompts=6, group=4, overlong="soft")  # rewards that differ
    plain, shuffled = (cd.draw_rollouts(model, world, args, ENV, 3, s) for s in (False, True))
    assert len(plain[0]) == len(shuffled[0]) == 24
    # the shuffled run drew other rollouts; scored again, its rewards are the same multiset in another order
    problems = [problem_of(world, p) for p, *_ in shuffled[0]]
    scores = [cd.score(world, problem, r, args) for problem, (_, r, _) in zip(problems, shuffled[0])]
    assert sorted(scores) == pytest.approx(sorted(shuffled[1].tolist())) and scores != shuffled[1].tolist()


def problem_of(world, prompt):
    words = [world.words[i] for i in prompt]
    at = words.index("use")
    return tuple(sorted(map(int, words[at + 1 : at + 4]))), int(words[words.index("make") + 1])


def test_policy_gradient_on_policy(toy):
    """rho = 1, and the gradient is that of -A log p, for every aggregation."""
    args, world, model, rows, _, _ = rollouts(toy)
    advantage = torch.randn(len(rows))
    idx, targets, old = cd.collate(rows).values()
    lengths = torch.tensor([float(len(r)) for _, r, _ in rows])
    for kind, level in itertools.product(("token", "seq", "const"), ("token", "sequence")):
        if level == "sequence" and kind != "seq":
            continue  # GSPO's gradient equals GRPO's on-policy if responses are averaged first
        model.args = replace(args, is_level=level)
        weights, denom = cd.aggregation(lengths, kind, world.max_new)
        model.zero_grad()
        model(idx, targets=targets, advantage=advantage, old=old, weights=weights, denom=denom).backward()
        grads = [p.grad.clone() for p in model.parameters()]
        model.zero_grad()
        logp = model(idx).log_softmax(-1).gather(2, targets.clamp(min=0)[..., None])[..., 0] * (targets != -100)
        (-(advantage * weights)[:, None] * logp / denom).sum().backward()
        for a, p in zip(grads, model.parameters()):
            assert torch.allclose(a, p.grad, atol=1e-5), kind
    model.zero_grad()


def test_dynamic_sampling_drops_groups_of_one_reward(toy, monkeypatch):
    args, world, model, _ = toy
    monkeypatch.setattr(cd, "score", lambda w, p, r, a: float(len(r) % 2))
    _, rewards, _ = cd.draw_rollouts(model, world, replace(args, prompts=4, group=2, dynamic_sampling=True), ENV, 0)
    assert len(rewards) == 8
    monkeypatch.setattr(cd, "score", lambda w, p, r, a: 1.0)
    _, rewards, _ = cd.draw_rollouts(model, world, replace(args, prompts=4, group=2, dynamic_sampling=True), ENV, 0)
    assert len(rewards) == 8  # the last round keeps what there is


# ------------------------------------------------------------------------------------------------------------ analysis


def test_head_masks_equal_one_at_a_time(toy):
    args, world, model, steps = toy
    c, steps = model.config, steps[:9]
    plain, _ = cd.run(model, steps)
    assert torch.equal(plain, cd.run(model, steps, cd.heads_off([[]] * len(steps), c))[0])
    sets = [[(0, 1)], [(1, 2), (3, 0)], [], [(2, 7)]]
    which = torch.arange(len(steps)).repeat(len(sets))
    rows = [sets[k] for k in torch.arange(len(sets)).repeat_interleave(len(steps))]
    swept = cd.run(model, steps, cd.heads_off(rows, c), which=which)[0].view(len(sets), len(steps), -1)
    for k, heads in enumerate(sets):
        assert torch.allclose(swept[k], cd.run(model, steps, cd.heads_off([heads] * len(steps), c))[0], atol=1e-5)
    ids = steps.ids[:1, : int(steps.paren[0]) + 1]
    with torch.no_grad():  # after the output projection, as the released code does it
        take = {}
        model.capture(ids, [])
        with model.patch({"blocks.0.attn.z": lambda z: take.setdefault("z", z)}):
            model.hidden(ids)
        gone = take["z"][:, :, 1] @ model.blocks[0].attn.proj.weight.T[c.head_dim : 2 * c.head_dim]
        with model.patch({"blocks.0.attn.out": lambda out: out - gone}):
            logits = model(ids)[0, -1]
    assert torch.allclose(logits, swept[0, 0], atol=1e-4)
    total = sum(take["z"][:, :, h] @ cd.ov(model.blocks[0], h)[1] for h in range(c.n_head))
    assert torch.allclose(total, take["z"].flatten(2) @ model.blocks[0].attn.proj.weight.T, atol=1e-5)


def test_glu_off_is_no_mlp_at_the_bracket(toy):
    args, world, model, steps = toy
    steps = steps[:5]
    everything = {l: torch.arange(model.config.d_mlp) for l in range(model.config.n_layer)}
    off = cd.run(model, steps, cd.glu_off(steps, everything))[0]

    def silent(x, idx):
        x = x.clone()
        x[torch.arange(len(idx)), steps.paren[idx]] = 0
        return x

    sites = [f"blocks.{l}.mlp.out" for l in range(model.config.n_layer)]
    assert torch.allclose(off, cd.run(model, steps, lambda part, idx: {s: lambda x: silent(x, idx) for s in sites})[0])


def test_head_scores_by_hand():
    wv, wo = torch.tensor([[1.0, 0], [2, 1], [0, 1]]), torch.tensor([[0.0, 1, 1], [1, 0, 2]])
    assert (wv @ wo).tolist() == [[0, 1, 1], [1, 2, 4], [1, 0, 2]]
    g, u = torch.tensor([[1.0, 0, 1]]), torch.tensor([[0.0, 1, 1]])
    assert cd.diag_score(wv, wo, g, u).item() == pytest.approx(7.04638, abs=1e-4)
    assert cd.compose_score(wv, wo, g).item() == pytest.approx(0.790569, abs=1e-5)
    assert F.silu(torch.tensor(-1.278465)).item() == pytest.approx(-0.278465, abs=1e-6)


def test_grouped_query_heads_share_their_v():
    c = GPTConfig(50, 32, 1, 4, 16, n_kv_head=2, qkv_bias=False, attn_bias=False)
    model = GPT(c)
    x = torch.randn(1, 1, 16)
    with torch.no_grad():
        out = model.blocks[0].attn(x, cd.common.rope(c, torch.zeros(1, 1)), None, None, None)
        total = sum(x[0, 0] @ a @ b for a, b in (cd.ov(model.blocks[0], h) for h in range(4)))
    assert torch.allclose(out[0, 0], total, atol=1e-6)


def test_probe():
    gen = torch.Generator().manual_seed(0)
    y = torch.arange(200) % 2 == 0
    x = torch.randn(2, 200, 8, generator=gen)
    x[1, :, 3] += torch.where(y, 3.0, -3.0)
    groups = torch.arange(200) // 2
    W, accuracy = cd.fit_probe(x, y, groups)
    assert accuracy[1] > 0.97 and accuracy[0] < 0.75 and W.shape == (2, 8, 2)
    assert W[1, :, 1].argmax() == 3 and torch.allclose(W[..., 0], -W[..., 1], atol=1e-5)
    with pytest.raises(ValueError, match="no valid one"):
        cd.fit_probe(x, torch.zeros(200).bool(), groups)


def test_steps_and_attention_to_the_target(toy):
    args, world, model, steps = toy
    assert torch.equal(steps.valid, steps.truth)  # the searchers' verdicts are right
    for i in range(len(steps)):
        ids = steps.ids[i, : steps.paren[i] + 1].tolist()
        words = [world.words[t] for t in ids]
        target = words[words.index("make") + 1]
        assert words[-1] == "[" and int(words[-2]) == steps.result[i] and words[steps.before[i]] == "="
        assert steps.truth[i] == (words[-2] == target)
        expected = [j for j, w in enumerate(words[:-2]) if w == target]
        assert steps.seen[i].nonzero()[:, 0].tolist() == expected
    mass = cd.target_attention(model, steps[:7], steps.paren[:7] - 1)
    i = 3
    ids = steps.ids[i : i + 1, : int(steps.paren[i]) + 1]
    with torch.no_grad():
        pattern = model.capture(ids, ["blocks.2.attn.pattern"])["blocks.2.attn.pattern"]
    by_hand = pattern[0, :, -2][:, steps.seen[i, : ids.shape[1]]].sum(-1)
    assert torch.allclose(mass[2, :, i], by_hand, atol=1e-6)


def test_continuation_without_patches_is_greedy(toy):
    args, world, model, steps = toy
    few = steps[:6]
    prompts = [ids[: p + 1].tolist() for ids, p in zip(few.ids, few.paren.tolist())]
    plain = generate(model, prompts, 20, 0.0, stop=world.stops)
    for a, b in zip(cd.continued(model, world, few, lambda s: None, 20), plain):
        n = min(len(a), len(b))
        assert n and a[:n] == b[:n]


def test_classify(toy):
    _, world, *_ = toy
    kinds = {"this works ] \n </think>": "fail", "yes ]": "fail", "not 7 ] \n 3": "success", "= 3": "unknown"}
    kinds["no 7 ] \n </think> <answer> 3 </answer>"] = "partial"
    for text, kind in kinds.items():
        assert cd.classify(world, world.encode(text)) == kind


def test_random_heads_are_layer_matched_and_outside():
    c, rng = GPTConfig(50, 32, 4, 8, 16), random.Random(0)
    heads = [(1, 0), (1, 1), (2, 5)]
    for _ in range(50):
        drawn = cd.random_heads(heads, c, rng, heads)
        assert [l for l, _ in drawn] == [1, 1, 2] and not {*drawn} & {*heads} and len({*drawn}) == 3
    full = [(1, h) for h in range(8)]
    assert {l for l, _ in cd.random_heads(heads[:1], c, rng, full)} <= {0, 2}


# -------------------------------------------------------------------------------------------------------- real models


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A random-weight Qwen2 folder in the real format, with a byte-level BPE trained on the prompts."""
    from safetensors.torch import save_file
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

    path = tmp_path_factory.mktemp("qwen")
    tok = Tokenizer(models.BPE())
    digits = pre_tokenizers.Digits(individual_digits=True)
    tok.pre_tokenizer = pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tok.decoder = decoders.ByteLevel()
    text = [cd.PROMPT, "- 40 - 7 = 33 (not 42)", "(this works)", " (", "this not"] * 20
    tok.train_from_iterator(
        text, trainers.BpeTrainer(vocab_size=420, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    )
    tok.add_special_tokens([AddedToken("<|endoftext|>", special=True)])
    tok.save(str(path / "tokenizer.json"))
    (path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|endoftext|>"}))
    V, C, H, K, D, M = tok.get_vocab_size(), 32, 4, 2, 8, 48
    hf = dict(
        model_type="qwen2", vocab_size=V, max_position_embeddings=2048, num_hidden_layers=3, num_attention_heads=H
    )
    hf |= dict(num_key_value_heads=K, hidden_size=C, intermediate_size=M, hidden_act="silu", rms_norm_eps=1e-6)
    (path / "config.json").write_text(json.dumps(hf | dict(rope_theta=1e4, tie_word_embeddings=True)))
    torch.manual_seed(0)
    w = {"model.embed_tokens.weight": torch.randn(V, C), "model.norm.weight": torch.ones(C)}
    for l in range(3):
        p = f"model.layers.{l}."
        w |= {p + f"{n}_layernorm.weight": torch.ones(C) for n in ("input", "post_attention")}
        for n, rows in (("q", H * D), ("k", K * D), ("v", K * D)):
            w |= {
                p + f"self_attn.{n}_proj.weight": torch.randn(rows, C) / 4,
                p + f"self_attn.{n}_proj.bias": torch.zeros(rows),
            }
        w |= {
            p + "self_attn.o_proj.weight": torch.randn(C, H * D) / 4,
            p + "mlp.down_proj.weight": torch.randn(C, M) / 4,
        }
        w |= {p + f"mlp.{n}_proj.weight": torch.randn(M, C) / 4 for n in ("gate", "up")}
    save_file(w, path / "model.safetensors")
    return path


REAL = ["--preset", "smoke", "--num-max", "30", "--cap", "60", "--samples", "6"]


def test_real_model_analysis_alone(folder, tmp_path):
    flags = [
        "--stages",
        "analysis",
        "--heads",
        "L1H2",
        "L2H0",
        "--neurons",
        "1:7",
        "--glu-k",
        "4",
        "--out",
        str(tmp_path),
    ]
    found = cd.main([*REAL, "--model", str(folder), *flags])
    m = found["metrics"]["seeds"][0]
    assert 0 <= m["yes_right_off"] <= 1 and m["yes_right_on"] != m["yes_right_off"] and m["neuron 1:7"]
    assert {c["id"] for c in found["claims"]} >= {"C3", "C4", "C5", "C6", "C7"} and "C1" not in {
        c["id"] for c in found["claims"]
    }


def test_real_model_grpo(folder, tmp_path):
    problems = tmp_path / "p.jsonl"
    problems.write_text("".join(json.dumps({"nums": [3, 4, n], "target": 7 + n}) + "\n" for n in range(1, 30)))
    flags = [
        "--stages",
        "grpo",
        "--dataset",
        f"file:{problems}",
        "--max-new",
        "12",
        "--beta",
        "0.01",
        "--minibatches",
        "2",
    ]
    flags += [
        "--grad-checkpoint",
        "--micro-batch",
        "2",
        "--ref-reset",
        "1",
        "--format-reward",
        "0.1",
        "--overlong",
        "soft",
    ]
    cd.main([*REAL, "--model", str(folder), *flags, "--out", str(tmp_path / "o")])
    rows = common.read_jsonl(tmp_path / "o" / "metrics.jsonl")
    assert any("kl" in r for r in rows) and any("greedy" in r for r in rows)
    weights = common.load_checkpoint(tmp_path / "o" / "grpo-s0.pt")["model"]
    assert "blocks.2.mlp.down.weight" in weights


def test_spans_of_digits(folder):
    from pretrained import load

    world = cd.Real(args_of(model="x", num_max=30, cap=60), load(str(folder))[1], 0)
    ids = world.tok.encode("162 + 62 - 620")
    assert [v for *_, v in world.spans(ids)] == [162, 62, 620]
    for problem in world.train[:30]:
        rng = random.Random(0)
        prompt, response = world.written(*problem, rng)
        steps = cd.find_steps(world, [(problem, prompt, response)])
        assert torch.equal(steps.valid, steps.truth) and steps.seen.any(1).all()
        for line in world.decode(response).splitlines()[2:]:
            *left, right = line[2:].rpartition(" (")[0].split(" = ")
            assert all(cd.evaluate(part)[0] == int(right) for part in left)


# ---------------------------------------------------------------------------------------------------------- the script


def test_without_verdicts_of_its_own_the_traces_are_written(toy):
    args, world, model, _ = toy  # an untrained model
    traces, own = cd.traces_of(model, world, args, ENV, 1)
    assert own == 0
    steps = cd.find_steps(world, traces)
    assert min(int(steps.valid.sum()), int((~steps.valid).sum())) >= 10


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    out = tmp_path_factory.mktemp("smoke")
    return out, cd.main(["--preset", "smoke", "--out", str(out)])


def test_smoke(smoke):
    out, result = smoke
    assert result == json.loads((out / "result.json").read_text())
    assert [c["id"] for c in result["claims"]][:3] == ["C1", "C2", "C2b"] and len(result["claims"]) >= 8
    rows = common.read_jsonl(out / "metrics.jsonl")
    assert {r["run"] for r in rows} == {"sft-s0", "grpo-s0", "control-s0"}
    assert (out / "countdown_rl.png").stat().st_size > 10_000 and (out / "lens.md").exists()


def test_analysis_alone_repeats(smoke):
    out, result = smoke
    again = cd.main(["--preset", "smoke", "--out", str(out), "--stages", "analysis"])
    a, b = (r["metrics"]["seeds"][0] for r in (result, again))
    assert (
        a["probe_bracket"] == b["probe_bracket"] and a["curves"] == b["curves"] and a["sft_greedy"] == b["sft_greedy"]
    )


def test_resume_is_exact(tmp_path):
    flags = ["--preset", "smoke", "--stages", "sft", "grpo", "--overlong", "soft"]  # rewards that differ
    whole, halves = ([*flags, "--out", str(tmp_path / name)] for name in ("whole", "halves"))
    cd.main(whole)
    cd.main([*halves, "--rl-steps", "1"])
    cd.main([*halves, "--resume"])
    a, b = (common.load_checkpoint(tmp_path / name / "grpo-s0.pt")["model"] for name in ("whole", "halves"))
    assert all(torch.equal(a[k], b[k]) for k in a)
    sft = common.load_checkpoint(tmp_path / "whole" / "sft-s0.pt")["model"]
    assert not all(torch.equal(a[k], sft[k]) for k in a)


@pytest.mark.parametrize("dies", ["at a signal", "at once"])
def test_resume_between_the_updates_on_one_batch_is_exact(dies, smoke, tmp_path, monkeypatch):
    found, aggregation = [], cd.aggregation
    flags = ["--stages", "grpo", "--minibatches", "2", "--inner-epochs", "2", "--rl-steps", "12", "--save-every", "3"]
    flags += ["--overlong", "soft", "--rl-lr", "0.01"]  # rewards that differ

    def interrupted(*args):  # in the sixth step, the second of four on its batch
        calls.append(0)
        if len(calls) == 6 and dies == "at once":
            raise MemoryError
        if len(calls) == 6:
            signal.raise_signal(signal.SIGTERM)
        return aggregation(*args)

    for name in "whole", "halves":
        (tmp_path / name).mkdir()
        shutil.copy(smoke[0] / "sft-s0.pt", tmp_path / name)
        run, calls = ["--preset", "smoke", *flags, "--out", str(tmp_path / name)], []
        if name == "halves":
            monkeypatch.setattr(cd, "aggregation", interrupted)
            with pytest.raises((SystemExit, MemoryError)):
                cd.main(run)
            monkeypatch.undo()
            at = 8 if dies == "at a signal" else 4  # the batch is gone through; or as the last checkpoint has it
            assert common.load_checkpoint(tmp_path / name / "grpo-s0.pt")["step"] == at
        cd.main([*run, "--resume"] if name == "halves" else run)
        found.append(common.load_checkpoint(tmp_path / name / "grpo-s0.pt")["model"])
    assert all(torch.equal(a, b) for a, b in zip(*(m.values() for m in found)))
    before = common.load_checkpoint(smoke[0] / "sft-s0.pt")["model"]
    assert not torch.equal(before["head.weight"], found[0]["head.weight"])


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--stages", "rl"], "allowed: sft grpo control analysis"),
        (["--group", "1"], "group size must be at least 2"),
        (["--minibatches", "0"], "1 and more"),
        (["--shard"], "--no-shard"),
        (["--nums", "1"], "allowed: 2"),
        (["--cap", "0"], "--cap 0"),
        (["--glu-k", "999"], "--glu-k 999"),
        (["--stages", "analysis"], "needs the checkpoint"),
        (["--kl", "k9"], "k9"),
        (["--model", "/nowhere"], "no model"),
    ],
)
def test_bad_flags(flags, message, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        cd.main(["--preset", "smoke", "--out", str(tmp_path), *flags])
    err = capsys.readouterr().err.strip().splitlines()
    assert stop.value.code == 2 and len(err) == 1 and message in err[0]


def test_bad_problems_and_models(folder, tmp_path, capsys):
    bad = tmp_path / "p.jsonl"
    for row, message in (
        ({"nums": [1, 2], "target": 99}, "can't be made"),
        ({"nums": [4], "target": 4}, "can't be made"),
    ):
        bad.write_text(json.dumps(row) + "\n")
        with pytest.raises(SystemExit):
            cd.main(
                [
                    *REAL,
                    "--model",
                    str(folder),
                    "--stages",
                    "analysis",
                    "--dataset",
                    f"file:{bad}",
                    "--out",
                    str(tmp_path),
                ]
            )
        assert message in capsys.readouterr().err
    with pytest.raises(SystemExit):
        cd.main([*REAL, "--model", str(folder), "--stages", "analysis", "--heads", "L9H0", "--out", str(tmp_path)])
    assert "--heads L9H0" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        cd.main(
            [*REAL, "--model", str(folder), "--stages", "analysis", "--prev-thresh", "0.99", "--out", str(tmp_path)]
        )
    assert "the largest:" in capsys.readouterr().err
