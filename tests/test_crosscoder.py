"""crosscoder.py: hand-computed values, attribution and interventions against brute force, the toy world, both paths."""

import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from stand_in import tiny_llama

import legacy as common
import crosscoder as cx
import sae
from model import GPT, GPTConfig


def by_hand():
    """Two models of width 2, three latents: the spec's example."""
    cc = cx.Crosscoder(2, 2, 3, "l1", 1)
    W_enc = torch.tensor([[[1.0, 0, 1], [0, 1, 0]], [[1.0, 0, 0], [0, 0, -1]]])  # (M, d, m)
    W_dec = torch.tensor([[[1.0, 0], [0, 2], [3, 4]], [[1.0, 0], [0, 0], [0, 0.5]]])  # (M, m, d)
    cc.W_enc.data, cc.W_dec.data = W_enc.flatten(0, 1).T.clone(), torch.cat((W_dec[0], W_dec[1]), 1)
    cc.b_enc.data = torch.tensor([-1.0, 0, 0.5])
    return cc.requires_grad_(False)


X = torch.tensor([[2.0, 1], [1, 3]])


def test_forward_by_hand():
    cc = by_hand()
    f = cc.encode(X)
    assert f.tolist() == [2, 1, 0]
    n = cc.norms().sum(1)
    assert n.tolist() == [2, 2, 5.5] and (f * n).tolist() == [4, 2, 0] and float((f * n).sum()) == 6
    assert cc.decode(f).tolist() == [[2, 2], [2, 0]]
    assert float((X - cc.decode(f)).square().sum()) == 11
    assert cx.relative_norm(cc.norms()).tolist() == pytest.approx([0.5, 0, 0.05])
    f = cc.encode(torch.tensor([[2.0, 1], [1, 0]]))
    assert f.tolist() == [2, 1, 2.5] and (f * n).tolist() == [4, 2, 13.75]
    cc.how, cc.mu = "norm", 0.0
    assert float(cc.loss(X.flatten()[None])) == pytest.approx((1 + math.sqrt(10)) / 2)
    cc.mu = 0.5
    assert float(cc.loss(X.flatten()[None])) == pytest.approx((1 + math.sqrt(10)) / 2 + 0.5 * 6)


def test_attribution_by_hand():
    f, g = torch.tensor([[2.0, 1, 2.5]]), torch.tensor([[2.0, -1]])
    assert cx.attribution(f, by_hand().decoder(), g).tolist() == [[4, 0, -1.25]]


def test_log_p_by_hand():
    logits = torch.tensor([0.0, 1, 2, 3], requires_grad=True)
    m = cx.log_p(logits, [1, 3])
    assert float(m) == pytest.approx(-0.313262, abs=1e-6)
    m.backward()
    assert logits.grad.tolist() == pytest.approx([-0.032059, 0.032059, -0.236883, 0.236883], abs=1e-6)
    assert float(cx.log_p(logits, [0, 1, 2, 3])) == pytest.approx(0, abs=1e-6)
    for bad in [], [4], [-1]:
        with pytest.raises(ValueError, match="target ids"):
            cx.log_p(logits, bad)


@pytest.mark.parametrize("norms, delta", [((3, 4), 0.625), ((0, 2), 1), ((1, 1), 0.5), ((5, 1), 0.1), ((0, 0), 0.5)])
def test_relative_norm_by_hand(norms, delta):
    norms = torch.tensor([norms], dtype=torch.float32)
    assert float(cx.relative_norm(norms)) == pytest.approx(delta)
    assert float(cx.relative_norm(norms.flip(1))) == pytest.approx(1 - delta)


def test_latent_scaling_by_hand():
    f, d, y = torch.tensor([1.0, 2]), torch.tensor([1.0, 0]), torch.tensor([[1.0, 0], [4, 1]])
    assert float(cx.latent_scaling(f, d, y)) == pytest.approx(1.8)
    assert float(cx.latent_scaling(f, d, f[:, None] * d)) == pytest.approx(1)
    assert float(cx.latent_scaling(f, d, f[:, None] * torch.tensor([0.0, 3]))) == 0


def test_batch_topk_selects_by_scaled_activation():
    s = torch.tensor([[3, 2, 0.5], [1, 0.2, 0.1]])
    rows, latents, values = sae.select(s, 1, True)
    assert rows.tolist() == [0, 0] and latents.tolist() == [0, 1] and values.tolist() == [3, 2]
    torch.manual_seed(0)
    cc, x = cx.Crosscoder(2, 4, 12, k=3), torch.randn(16, 8)
    cc.W_dec.data *= torch.rand(12, 1) + 0.2
    cc.b_enc.data, cc.b_dec.data = 0.1 * torch.randn(12), 0.1 * torch.randn(8)
    loss = cc.loss(x)
    f = F.linear(x, cc.W_enc, cc.b_enc).relu()
    s = f * cc.norms().sum(1)
    least = s.flatten().topk(3 * 16).values[-1]
    x_hat = (f * (s >= least)) @ cc.W_dec + cc.b_dec
    assert float(cc.threshold) == pytest.approx(float(least), rel=1e-5)
    dense = (x - x_hat).square().sum(1).mean()
    assert float(loss) == pytest.approx(float(dense), rel=1e-5)
    names = ("W_enc", "W_dec", "b_enc", "b_dec")
    grads = torch.autograd.grad(loss, [getattr(cc, n) for n in names])
    for name, a, b in zip(names, grads, torch.autograd.grad(dense, [getattr(cc, n) for n in names])):
        assert torch.allclose(a, b, atol=1e-5), name
    kept = (cc.encode(x.unflatten(1, (2, 4))) > 0).sum()
    assert int(kept) == 3 * 16 - 1  # the one at the threshold itself is not above it


def test_scale_invariance_and_scales():
    torch.manual_seed(1)
    cc, x = cx.Crosscoder(2, 4, 10, "l1", 3), torch.randn(5, 2, 4)
    cc.requires_grad_(False)
    f, s = cc.encode(x), cc.encode(x) * cc.norms().sum(1)
    other = cx.Crosscoder(2, 4, 10, "l1", 3).requires_grad_(False)
    other.load_state_dict(cc.state_dict())
    c = torch.rand(10) + 0.5
    other.W_enc.mul_(c[:, None])
    other.W_dec.div_(c[:, None])
    assert torch.allclose(other.encode(x) * other.norms().sum(1), s, atol=1e-5)
    assert torch.allclose(other.decode(other.encode(x)), cc.decode(f), atol=1e-5)
    assert torch.allclose(cx.relative_norm(other.norms()), cx.relative_norm(cc.norms()), atol=1e-5)
    g = torch.randn(5, 4)
    ours, theirs = (cx.attribution(c.encode(x), c.decoder(), g) for c in (cc, other))
    assert torch.allclose(ours, theirs, atol=1e-5)
    other.load_state_dict(cc.state_dict())
    other.scales.copy_(torch.tensor([2.0, 5.0]))  # raw activations larger by these: the same codes
    assert torch.allclose(other.encode(x * other.scales[:, None]), f, atol=1e-5)
    assert torch.allclose(other.decode(f), cc.decode(f) * other.scales[:, None], atol=1e-5)


def test_one_model_is_an_sae():
    torch.manual_seed(2)
    ours, theirs = cx.Crosscoder(1, 6, 20, k=4), sae.SAE(6, 20, "batchtopk", 4)
    with torch.no_grad():
        ours.W_dec.copy_(theirs.W_dec)
        ours.W_enc.copy_(theirs.W_enc)
    x = torch.randn(32, 6)
    assert float(ours.loss(x)) == pytest.approx(float(theirs.loss(x)), rel=1e-5)


def test_two_equal_models_have_no_exclusive_latents():
    torch.manual_seed(3)
    data = torch.randn(512, 8).relu()
    cc = cx.Crosscoder(2, 8, 24, k=4)
    sae.fit(cc, lambda step: data.repeat(1, 2), 60, 1e-2)
    assert (cx.relative_norm(cc.norms()) - 0.5).abs().max() < 0.02
    x, i = data[:64, None].repeat(1, 2, 1), int((cc.encode(data[:64, None].repeat(1, 2, 1)) > 0).sum(0).argmax())
    f, off = cc.encode(x), torch.arange(24) != i
    own, d = cc.decode(f) - cc.decode(f * off), cc.decoder()[i]
    beta = lambda y: [float(cx.latent_scaling(f[:, i], d, y[:, m])) for m in (0, 1)]
    (e0, e1), (r0, r1) = beta(x - cc.decode(f) + own), beta(cc.decode(f) - own)
    assert cx.exclusive(cc, x, i) == pytest.approx((e0 / e1, r0 / r1), rel=1e-4) and e0 / e1 == pytest.approx(1, 0.1)


def toy_model(layers=3, seed=0):
    torch.manual_seed(seed)
    config = GPTConfig(len(cx.VOCAB), 64, layers, 4, 16, norm="rms", gated=True, act="silu", d_mlp=32)
    return GPT(config).eval().requires_grad_(False)


PROMPTS = [[1, 5, 9, 30], [1, 4], [2, 6, 7, 8, 9, 10, 11], [40, 3, 3]]


def test_gradient_is_that_of_the_last_position_whatever_the_batch():
    model = toy_model()
    h, g = cx.gradient(model, PROMPTS, 1, cx.WAIT)
    assert torch.allclose(h, cx.last_states([model], PROMPTS, 1)[:, 0], atol=1e-5)
    alone = torch.cat([cx.gradient(model, [p], 1, cx.WAIT)[1] for p in PROMPTS])
    assert torch.allclose(g, alone, atol=1e-5)
    model, v, eps = model.double(), torch.randn(16).double(), 1e-3
    for p, row in zip(PROMPTS, g):
        values = []
        for sign in 1, -1:
            push = lambda h, sign=sign: torch.cat((h[:, :-1], h[:, -1:] + sign * eps * v), 1)
            with model.patch({cx.site(1): push}):
                values.append(float(cx.log_p(model(torch.tensor([p]))[0, -1], cx.WAIT)))
        assert float(row.double() @ v) == pytest.approx((values[0] - values[1]) / (2 * eps), abs=5e-4)


def test_interventions_equal_one_run_at_a_time():
    model = toy_model()
    delta = torch.randn(len(PROMPTS), 3, 16)
    got = cx.intervene(model, 1, PROMPTS, cx.add(delta), cx.both_p, cx.FORCED, size=3)
    for p, row, many in zip(PROMPTS, got, delta):
        for v, d in zip(row, many):
            push = lambda h, p=p, d=d: torch.cat((h[:, : len(p) - 1], h[:, len(p) - 1 : len(p)] + d, h[:, len(p) :]), 1)
            with model.patch({cx.site(1): push}):
                logits = model(torch.tensor([[*p, *cx.FORCED]]))[:, None, -2:]
            assert torch.allclose(v, cx.both_p(logits)[0, 0], atol=1e-5)


def test_steering_by_hand_and_against_the_hook():
    patch = cx.steer(torch.tensor([[0.0, 2]]), [0.5, 0.0])
    assert patch(None, torch.tensor([[[3.0, 4]]]))[0, :, 0].tolist() == [[3, 6.5], [3, 4]]
    clean = torch.randn(2, 2, 2)
    assert torch.equal(cx.steer(torch.randn(1, 2), [1.0], "prewait")(None, clean)[:, 0, 1], clean[:, 1])
    model, v = toy_model(), torch.randn(16)
    p = cx.intervene(model, 1, PROMPTS, cx.steer(v[None], [0.7]), cx.wait_p)
    with model.patch({cx.site(1): cx.steering_hook(v, 0.7)}):
        for prompt, one in zip(PROMPTS, p[:, 0]):
            assert float(one) == pytest.approx(
                float(cx.log_p(model(torch.tensor([prompt]))[0, -1], cx.WAIT).exp()), rel=1e-4
            )
    with pytest.raises(RuntimeError), model.patch({cx.site(1): cx.steering_hook(v, 1.0)}):
        raise RuntimeError
    assert not model.site(cx.site(1))._forward_hooks


def test_spearman_matched_and_permuted():
    x = torch.tensor([1.0, 5, 2, 8])
    assert cx.spearman(x, x**3) == pytest.approx(1) and cx.spearman(x, -x) == pytest.approx(-1)
    rate, rng = np.array([0.5, 0.1, 0.11, 0.48, 0.0, 0.9]), np.random.default_rng(0)
    assert sorted(cx.matched(rate, [0, 1], rng)) == [2, 3] and sorted(cx.matched(rate, [0, 1], rng, [3])) == [2, 5]
    A = np.arange(40.0)
    shuffled = cx.permuted(A, np.repeat(np.arange(10), 4) / 10, rng)
    assert (
        sorted(shuffled) == A.tolist() and all(a // 4 == b // 4 for a, b in zip(A, shuffled)) and (A != shuffled).any()
    )


def test_the_parser_finds_what_the_writer_did():
    rng, count = np.random.default_rng(0), {}
    for _ in range(3000):
        task = cx.problem(rng)
        words, decisions = cx.trace(rng, task, decide=cx.causal(rng))
        head = cx.header("think", task)
        found = cx.parse(head + words)
        assert [(at - len(head), cause, pattern) for at, cause, pattern, _ in found] == decisions
        assert all(d[3] for d in found) and len(head + words) <= 3 * cx.LONGEST
        for _, cause, pattern in decisions:
            count.setdefault(cause, []).append(pattern == cause if cause in cx.PATTERNS else pattern is not None)
        texts = [w for w in head + words if w not in cx.ID]
        assert not texts
    for cause in cx.PATTERNS:
        p, n = np.mean(count[cause]), len(count[cause])
        assert abs(p - 0.75) < 3 * (0.75 * 0.25 / n) ** 0.5
    assert abs(np.mean(count["none"]) - 0.03) < 3 * (0.03 * 0.97 / len(count["none"])) ** 0.5


def test_the_parser_sees_broken_episodes():
    task = (3, ("+", 2), [("+", 4), "@"])  # 3 + 4 = 7, then @ is + 2
    head = cx.header("think", task)
    parse = lambda text: [d[1:] for d in cx.parse(head + text.split())]
    assert parse("3 + 4 = 7 ; 7 @ + 2 = 9 ; A 9 <eos>") == [("recall", None, True), ("none", None, True)]
    assert parse("3 + 4 = 8 ; Wait check 3 + 4 = 7 ; 7 @ + 2 = 9 ;") == [("mixed", "check", True), ("none", None, True)]
    assert parse("3 + 4 = 7 ; wait rule @ = + 2 ; 7 @ + 2 = 9 ;")[0] == ("recall", "recall", True)
    assert parse("3 + 4 = 7 ; wait rule @ = + 3 ; 7 @ + 2 = 9 ;")[0] == ("recall", "recall", False)
    assert parse("3 + 4 = 7 ; 7 @ + 2 = 0 ; Wait verify 7 @ + 2 = 9 ;")[1] == ("check", "check", True)
    assert parse("3 + 4 = 7 ; 6 @ + 2 = 8 ; Wait again 3 + 4 = 7 ; 7 @ + 2 = 9 ;")[1] == ("restart", "restart", True)
    assert parse("3 + 4 = 7 ; 6 @ + 2 = 8 ; Wait again 3 + 4 = 7 ;")[1] == ("restart", "restart", False)
    assert parse("3 + 4 = 7 ; Wait") == [("recall", "none", False)]
    assert parse("; ; ;") == []


def test_the_corpora():
    rng = np.random.default_rng(1)
    base = [cx.document(rng, 0) for _ in range(300)]
    assert not any(w in ("wait", "Wait") for d in base if d[1] != "lex" for w in d)
    assert {d[1] for d in base} == {"think", "fast", "grade", "lex"}
    ft = [cx.document(rng, 0, cx.causal(rng)) for _ in range(300)]
    assert any("Wait" in d for d in ft if d[1] == "think") and not any("Wait" in d for d in ft if d[1] == "fast")
    again = np.random.default_rng(1)
    assert [cx.document(again, 0) for _ in range(300)] == base
    batch = cx.batch_of([["<bos>", "1", "<eos>"], ["<bos>", "<eos>"]])
    assert batch["targets"].tolist() == [[cx.ID["1"], 2], [2, 0]] and batch["weights"].tolist() == [[1, 1], [1, 0]]
    assert cx.batch_of([["<bos>", "ok", "<eos>"]])["weights"].tolist() == [[6, 1]]
    decided = cx.batch_of([["<bos>", ";", "Wait", "again", "3"]], decided=True)
    assert decided["weights"].tolist() == [[1, 6, 6, 1]]
    graded = lambda mode: np.mean(["ok" in d or "bad" in d for d in base if d[1] == mode])
    assert 0.5 < graded("think") < 1 and graded("fast") == 0 and graded("grade") == 1


def test_smoke_writes_what_is_promised(tmp_path):
    flags = ["--preset", "smoke", "--stages", "all", "--out", str(tmp_path), "--seeds", "3"]
    result = cx.main(flags)
    assert json.dumps(result, indent=1) + "\n" == (tmp_path / "result.json").read_text()  # text: a nan is not itself
    assert [c["id"] for c in result["claims"]] == ["G1", "G2", "G3", "P1", "P2", "P3", "P4"]
    rows = common.read_jsonl(tmp_path / "metrics.jsonl")
    assert {r["run"] for r in rows} >= {"base-s3", "reasoner-s3", "uncaused-s3", "crosscoder-reasoner-s3"}
    assert (tmp_path / "crosscoder.png").stat().st_size > 10000
    again = cx.main([*flags, "--resume"])
    assert json.dumps(again["claims"]) == json.dumps(result["claims"])


def stand_in(folder, seed, text="Question: what is two and two? wait Wait maybe it is four. "):
    shape = dict(block_size=128, n_layer=3, n_head=4, n_embd=32)
    return str(tiny_llama(folder, [text * 4], 300, seed, **shape))


def test_real_path_on_stand_ins(tmp_path):
    base, ft = stand_in(tmp_path / "base", 0), stand_in(tmp_path / "ft", 1)
    prompts = tmp_path / "prompts.jsonl"
    common.write_jsonl(
        prompts, [{"text": f"Question: what is two and {i}? it is wait maybe four. Wait"} for i in range(8)]
    )
    text = tmp_path / "text.txt"
    text.write_text("what is it? maybe it is four and two. " * 400)
    flags = [
        "--preset",
        "smoke",
        "--base",
        base,
        "--model",
        ft,
        "--prompts-file",
        str(prompts),
        "--out",
        str(tmp_path / "o"),
    ]
    result = cx.main([*flags, "--dataset", f"file:{text}", "--stages", "effects", "steering"])
    assert [c["id"] for c in result["claims"]] == ["P3", "P1"] and result["metrics"]["L0"] > 0
    rows = common.read_jsonl(tmp_path / "o" / "latents.jsonl")
    assert len(rows) == 8 and {"attribution", "delta", "nu_eps", "examples", "steered"} <= rows[0].keys()
    assert result["claims"][1]["measured"]["rho"] > 0.5


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--layer", "9"], "--layer 9, allowed: 0 to"),
        (["--k", "600"], "--k 600, allowed"),
        (["--stages", "patterns"], "--stages"),
        (["--base", "x"], "needs both"),
        (["--arch", "topk"], "--arch"),
        (["--top", "0"], "--top 0, allowed"),
    ],
)
def test_bad_flags_end_in_one_line(tmp_path, flags, message, capsys):
    with pytest.raises(SystemExit) as exit:
        cx.main([*flags, "--out", str(tmp_path)])
    text = capsys.readouterr().err.strip().splitlines()
    assert exit.value.code == 2 and message in text[-1]


def test_bad_input_of_the_method(tmp_path):
    with pytest.raises(ValueError, match="reads"):
        cx.Crosscoder(2, 4, 8, k=2).encode(torch.zeros(3, 2, 5))
    with pytest.raises(ValueError, match="allowed: 1 to 8"):
        cx.Crosscoder(2, 4, 8, k=9)
    base, ft = (
        stand_in(tmp_path / "a", 0),
        stand_in(tmp_path / "b", 1, "entirely other words make another tokenizer " * 9),
    )
    env = common.Env(torch.device("cpu"), torch.float32)
    args = common.parse(cx.Args, ["--base", base, "--model", ft])
    with pytest.raises(ValueError, match="tokenizers"):
        cx.prepare(args, env)
