"""sae.py: the codes and their gradients against hand-computed values, the theorems, the world, a run end to end."""

import itertools
import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import legacy as common
import sae as S

torch.set_num_threads(1)


def gated():
    s = S.SAE(2, 3, "gated", 1)
    t = torch.tensor
    values = {"W_enc": t([[1.0, 0], [0, 1], [1, 1]]), "b_enc": t([0, -1, -1.5]), "b_mag": t([0, 0, -0.5])}
    values |= {"r_mag": t([0, math.log(2), 0]), "b_dec": t([0.5, 0])}
    s.load_state_dict(values | {"W_dec": t([[1.0, 0], [0, 1], [0.70711, 0.70711]])})
    return s, t([[1.5, 2.0]])


def test_gated_by_hand():
    s, x = gated()
    torch.testing.assert_close(s.encode(x), torch.tensor([[1.0, 4, 2.5]]))
    torch.testing.assert_close(s.decode(s.encode(x)), torch.tensor([[3.2678, 5.7678]]), atol=1e-4, rtol=0)
    s.l1 = 0.0
    assert s.loss(x).item() == pytest.approx(17.3211 + 1.1287, abs=1e-3)
    s.l1 = 2.0
    assert s.loss(x).item() == pytest.approx(17.3211 + 1.1287 + 2 * 3.5, abs=1e-3)
    x_gate = torch.tensor([2.5607, 2.0607])
    assert (x[0] - x_gate).square().sum().item() == pytest.approx(1.1287, abs=1e-3)


def test_gate_learns_from_the_auxiliary_path_alone_and_the_decoder_not():
    s, x = gated()
    s.l1 = 0.0
    s.loss(x).backward()
    aux = torch.autograd.functional.jacobian(
        lambda b: ((x - (F.linear(x - s.b_dec, s.W_enc) + b).relu() @ s.W_dec - s.b_dec) ** 2).sum(), s.b_enc.detach()
    )
    torch.testing.assert_close(s.b_enc.grad, aux)
    plain = (x - s.encode(x).detach() @ s.W_dec - s.b_dec.detach()).square().sum()
    torch.testing.assert_close(s.W_dec.grad, torch.autograd.grad(plain, s.W_dec)[0])


def test_topk_and_batchtopk_by_hand():
    pre = torch.tensor([[0.9, -0.2, 0.5, 0.7], [0.1, 0.3, 0.2, -1]])
    rows, latents, values = S.select(pre, 2)
    assert {(r, j) for r, j in zip(rows.tolist(), latents.tolist())} == {(0, 0), (0, 3), (1, 1), (1, 2)}
    rows, latents, values = S.select(pre, 2, batch=True)
    assert rows.tolist() == [0, 0, 0, 1] and sorted(values.tolist()) == pytest.approx([0.3, 0.5, 0.7, 0.9])
    assert S.select(-pre.abs(), 2)[2].tolist() == [0] * 4
    s = S.SAE(3, 4, "topk", 2)
    with torch.no_grad():
        s.b_enc.fill_(-100)
    loss = s.loss(torch.randn(5, 3))
    loss.backward()
    assert torch.isfinite(loss) and all(torch.isfinite(p.grad).all() for p in s.parameters())
    for k in 0, 5, -1:
        with pytest.raises(ValueError, match=f"k {k} latents of 4"):
            S.select(pre, k)


@pytest.mark.parametrize("batch", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_sparse_step_equals_dense_autograd(batch, seed):
    torch.manual_seed(seed)
    B, d, m, k = 37, 11, 50, 5
    s = S.SAE(d, m, "batchtopk" if batch else "topk", k).double()
    for p in s.parameters():
        p.data += 0.1 * torch.randn_like(p)
    x, target = torch.randn(B, d).double(), torch.randn(B, d).double()
    x_hat = S.SparseCode.apply(x, s.W_enc, s.b_enc, s.W_dec, s.b_dec, k, batch)[0]
    names, params = zip(*s.named_parameters())
    fast = torch.autograd.grad((x_hat - target).square().sum(), params)
    pre = F.linear(x - s.b_dec, s.W_enc, s.b_enc)
    least = pre.flatten().topk(B * k).values[-1] if batch else pre.topk(k).values[:, -1:]
    f = pre.relu() * (pre >= least)
    torch.testing.assert_close(x_hat, f @ s.W_dec + s.b_dec)
    for name, a, b in zip(names, fast, torch.autograd.grad((f @ s.W_dec + s.b_dec - target).square().sum(), params)):
        torch.testing.assert_close(a, b, msg=name)


def test_jumprelu_by_hand():
    pre = torch.tensor([[0.04, 0.12, 0.30]], requires_grad=True)
    theta = torch.full((3,), 0.1, requires_grad=True)
    f, on = S.jump(pre, theta, 0.1)
    assert f.tolist()[0] == pytest.approx([0, 0.12, 0.30])
    d_pre, d_theta = torch.autograd.grad(f.sum(), (pre, theta), retain_graph=True)
    assert d_pre.tolist() == [[0, 1, 1]] and d_theta.tolist()[1:] == pytest.approx([-1, 0])
    assert torch.autograd.grad(on.sum(), theta)[0].tolist()[1:] == pytest.approx([-10, 0])


def test_projection_by_hand_and_norms_after_training():
    s = S.SAE(2, 1, "relu", 1)
    s.W_dec.data, s.W_dec.grad = torch.tensor([[0.6, 0.8]]), torch.tensor([[1.0, 2.0]])
    s.project()
    assert s.W_dec.grad[0].tolist() == pytest.approx([-0.32, 0.24])
    x = torch.randn(64, 8) + 2
    for arch in S.ARCHS:
        s = S.fit(S.SAE(8, 16, arch, 3), lambda step: x, 5, 1e-2)
        torch.testing.assert_close(s.W_dec.norm(dim=1), torch.ones(16), atol=1e-6, rtol=0)
    frozen = S.SAE(8, 16, "topk", 3, frozen=True)
    before = frozen.W_dec.clone()
    torch.testing.assert_close(S.fit(frozen, lambda step: x, 5, 1e-2).W_dec, before)


@pytest.mark.parametrize("arch", S.ARCHS)
def test_folding_and_files(arch, tmp_path):
    torch.manual_seed(0)
    s = S.SAE(6, 20, arch, 3)
    for p in [*s.parameters(), *s.buffers()]:
        if p.is_floating_point():
            p.data += 0.1 * torch.randn_like(p).abs()
    x = torch.randn(30, 6)
    before = s.decode(s.encode(x / 7)) * 7
    s.fold(7.0)
    torch.testing.assert_close(s.decode(s.encode(x)), before, atol=1e-4, rtol=1e-4)
    S.save_sae(s, tmp_path / "ae.pt")
    again = S.load_sae(tmp_path / "ae.pt", 6)
    assert (again.arch, again.k) == (arch, again.k if arch not in ("topk", "batchtopk") else 3)
    torch.testing.assert_close(again.encode(x), s.encode(x), atol=1e-5, rtol=1e-4)
    with pytest.raises(ValueError, match="width 6, the model has 5"):
        S.load_sae(tmp_path / "ae.pt", 5)
    (tmp_path / "config.json").write_text('{"trainer": {"dict_class": "AutoEncoderTopK"}}')  # which has a threshold
    assert S.load_sae(tmp_path / "ae.pt").arch == ("topk" if arch == "batchtopk" else arch)


def test_released_layout_of_the_paper(tmp_path):
    g = lambda *size: torch.randn(*size)
    state = {"encoder.weight": g(12, 4), "decoder.weight": g(4, 12), "decoder_bias": g(4)}
    state |= {"r_mag": g(12), "gate_bias": g(12), "mag_bias": g(12)}
    torch.save(state, tmp_path / "llama.pt")
    s, x = S.load_sae(tmp_path / "llama.pt", 4), g(9, 4)
    u = (x - state["decoder_bias"]) @ state["encoder.weight"].T
    f = ((u + state["gate_bias"]) > 0) * (state["r_mag"].exp() * u + state["mag_bias"]).relu()
    torch.testing.assert_close(s.encode(x), f)
    torch.testing.assert_close(s.decode(f), f @ state["decoder.weight"].T + state["decoder_bias"])
    torch.save({"weights": g(3)}, tmp_path / "odd.pt")
    with pytest.raises(ValueError, match="no SAE known has the tensors weights"):
        S.load_sae(tmp_path / "odd.pt")


def test_metrics_by_hand():
    X = torch.tensor([[0.0, 0], [2, 0], [0, 2], [2, 2]])
    s = S.SAE(2, 2, "relu", 1)
    s.encode, s.decode = lambda x: x, lambda f: torch.where((f == 2).all(1, keepdim=True), torch.tensor([2.0, 1]), f)
    assert S.metrics(s, X)[0]["fvu"] == pytest.approx(1 / 8)
    with pytest.raises(ValueError, match="variance is 0"):
        S.metrics(s, torch.ones(4, 2))
    with pytest.raises(ValueError, match="all activations are the same"):
        S.fit(s, lambda step: torch.ones(4, 2), 1, 1e-3)


def test_dead_latents_learn_from_auxk_and_resampling():
    torch.manual_seed(0)
    s, x = S.SAE(4, 6, "topk", 2), torch.randn(50, 4)
    x_hat = torch.zeros_like(x)
    dead = torch.tensor([False] * 4 + [True] * 2)
    assert s.aux(x, x_hat, torch.zeros(6, dtype=torch.bool)) == 0.0
    grads = torch.autograd.grad(s.aux(x, x_hat, dead), s.W_enc)[0].abs().sum(1)
    assert (grads[:4] == 0).all() and (grads[4:] > 0).all()
    opt = torch.optim.Adam(s.parameters())
    s.loss(x).backward()
    opt.step()
    S.resample(s, opt, x, dead)
    torch.testing.assert_close(s.W_dec[4:].norm(dim=1), torch.ones(2))
    torch.testing.assert_close(F.normalize(s.W_enc[4:], dim=1), s.W_dec[4:])
    assert (opt.state[s.W_enc]["exp_avg"][4:] == 0).all() and (opt.state[s.W_enc]["exp_avg"][:4] != 0).any()


def test_buffer_serves_every_row_once_and_depends_on_the_step_alone():
    fill = lambda r: torch.arange(12.0)[:, None] + 100 * r
    b = S.Buffer(fill, 4, seed=1)
    for r in range(3):
        rows = torch.cat([b(3 * r + i) for i in range(3)]).flatten()
        assert sorted(rows.tolist()) == [100 * r + i for i in range(12)] and rows.tolist() != sorted(rows.tolist())
    again, other = S.Buffer(fill, 4, seed=1), S.Buffer(fill, 4, seed=2)
    assert torch.equal(again(7), b(7)) and torch.equal(again(1), b(1)) and not torch.equal(other(1), b(1))
    with pytest.raises(ValueError, match="has 12 rows, one batch needs 13"):
        S.Buffer(fill, 13)


def test_matching_against_brute_force():
    g = torch.Generator().manual_seed(0)
    for n, m in (1, 3), (4, 4), (5, 7), (3, 7):
        A, B = torch.randn(n, 3, generator=g), torch.randn(m, 3, generator=g)
        cos = (F.normalize(A, dim=1) @ F.normalize(B, dim=1).T).abs().numpy()
        best = max(sum(cos[i, p[i]] for i in range(n)) for p in itertools.permutations(range(m), n))
        assert S.match(A, B).sum() == pytest.approx(best, abs=1e-5)
        flipped = B[torch.randperm(m, generator=g)] * torch.tensor([-1.0, 1])[torch.randint(2, (m, 1), generator=g)]
        assert S.match(A, flipped).sum() == pytest.approx(best, abs=1e-5)
    assert S.match(A, A) == pytest.approx(1)
    with pytest.raises(ValueError, match="7 directions can't be matched with 3"):
        S.match(B, A)


def test_attribution_is_integrated_gradients_is_ablation():
    D, w = torch.eye(2).double(), torch.tensor([2.0, -1]).double()
    f, y = torch.tensor([[1.0, 0], [3, 2]]).double(), torch.tensor([1, 0])
    ie = S.attribution(f.sum(0, keepdim=True), y[:1], D, w, "paper")
    assert ie.tolist() == [8, -2] and (f.sum(0) @ w).item() == 6 and (S.ablate(f, f, [0], D).sum(0) @ w).item() == -2
    assert S.attribution(f, y, D, w, "contrast").tolist() == [2 * (1 - 3), -1 * (0 - 2)]
    torch.manual_seed(0)
    s = S.SAE(6, 15, "topk", 4).double()
    x, w = torch.randn(8, 6).double(), torch.randn(6).double()
    codes = s.encode(x).detach()
    closed = S.attribution(codes, torch.ones(8), s.W_dec.detach(), w, "paper")
    total = torch.zeros(15).double()
    for step in range(10):  # integrated gradients in 10 steps, the error term scaled along
        f = (codes * step / 10).requires_grad_()
        total += (torch.autograd.grad((s.decode(f).sum(0) * w).sum(), f)[0] / 10 * codes).sum(0)
    torch.testing.assert_close(closed, total, atol=1e-5, rtol=1e-5)
    for j in range(15):
        torch.testing.assert_close((x - S.ablate(x, codes, [j], s.W_dec.detach())).sum(0) @ w, closed[j])
    assert torch.equal(S.ablate(x, codes, [], s.W_dec.detach()), x)
    rest = x - s.decode(codes)
    torch.testing.assert_close(S.ablate(x, codes, list(range(15)), s.W_dec), s.b_dec + rest)
    mean = codes.mean(0)
    torch.testing.assert_close(S.ablate(x, codes, [1, 2], s.W_dec, mean).mean(0), x.mean(0))


def test_sharing_by_hand():
    multi, counts = S.shared({"En": [1, 2, 3], "Fr": [2, 3, 9], "Tr": [3, 7, 2]})
    assert multi == [2, 3] and len(multi) / len(counts) == 0.4
    assert [sum(c == n for c in counts.values()) / len(counts) for n in (1, 2, 3)] == pytest.approx([0.6, 0, 0.4])
    with pytest.raises(ValueError, match=">= 2 languages, got 1"):
        S.shared({"En": [1]})
    for M, k, L, null in (32768, 32, 23, 0.0107), (1000, 32, 23, 0.317), (400, 32, 6, 0.196), (300, 16, 6, 0.132):
        assert S.share_null(M, k, L) == pytest.approx(null, abs=1e-3)
    rng = np.random.default_rng(0)
    drawn = [S.shared({i: rng.choice(300, 16, replace=False).tolist() for i in range(6)}) for _ in range(300)]
    assert np.mean([len(m) / len(c) for m, c in drawn]) == pytest.approx(0.132, abs=0.01)
    drawn = [S.shared({i: rng.choice(20, 4, replace=False).tolist() for i in range(6)})[1].values() for _ in range(900)]
    assert np.mean([sum(n for n in c if n >= 3) / 24 for c in drawn]) == pytest.approx(
        S.common_null(20, 4, 6), abs=0.02
    )
    assert S.common_null(10, 2, 2) == pytest.approx(0.2) and S.common_null(4, 4, 6) == 1


def test_probe_auc_balance_and_matched_latents():
    torch.manual_seed(0)
    X = torch.randn(400, 5) * torch.tensor([1, 10, 0.1, 1, 1]) + 3
    y = (X[:, 0] + 0.1 * torch.randn(400) > 3).long()
    w, b = S.fit_probe(X, y)
    logit = X.double() @ w + b
    Z = (X - X.mean(0)) / X.std(0)
    grad = Z.T.double() @ (y - torch.sigmoid(logit)) - w * X.std(0)
    assert grad.abs().max() < 1e-3 and S.accuracy(logit, y) > 0.9  # stationary: C = 1
    wide = torch.randn(40, 100) * torch.rand(100)  # more features than rows: solved in the span of the rows
    w, b = S.fit_probe(wide, y[:40])
    std = wide.double().std(0)
    residue = ((wide.double() - wide.double().mean(0)) / std).T @ (y[:40] - torch.sigmoid(wide.double() @ w + b))
    assert (residue - w * std).abs().max() < 1e-6
    with pytest.raises(ValueError, match="both classes"):
        S.fit_probe(X, torch.ones(400))
    score = torch.tensor([0.0, 1, 1, 2])
    assert S.auc(score, torch.tensor([0, 0, 1, 1])) == pytest.approx(3.5 / 4)
    rows = S.balance(np.array([1] * 5 + [0] * 9 + [-1] * 4), 100, np.random.default_rng(0))
    assert len(set(rows.tolist())) == 10 and set(range(5)) < set(rows.tolist()) and max(rows) < 14
    weight = torch.rand(200)
    weight[50:90] = 0
    got = S.alike([1, 2, 3], weight, np.random.default_rng(0))
    assert len(set(got)) == 3 and not {1, 2, 3} & set(got) and (weight[got] > 0).all()
    assert (weight[got] - weight[[1, 2, 3]]).abs().max() < 0.2


def test_steering_is_the_identity_where_nothing_changes():
    torch.manual_seed(0)
    s, x = S.SAE(6, 15, "relu", 4), torch.randn(2, 5, 6)
    f = s.encode(x)
    same = S.steering(s, [3], [], f[..., 3][..., None], "last")(x)
    torch.testing.assert_close(same, x)
    last = S.steering(s, [3], [4], torch.tensor([9.0]), "last")(x)
    assert torch.equal(last[:, :-1], x[:, :-1]) and not torch.allclose(last[:, -1], x[:, -1])
    swap = S.steering(s, [3], [4], torch.tensor([9.0]), "active")(x)
    fires = f[..., 4] > 0
    assert torch.equal(swap[~fires], x[~fires]) and fires.any()
    want = x[fires] + (9 - f[..., 3][fires])[:, None] * s.W_dec[3] - f[..., 4][fires][:, None] * s.W_dec[4]
    torch.testing.assert_close(swap[fires], want)


# -------------------------------------------------------------------------------------------------------------- world


def test_languages_parse_what_they_render():
    world, rng = S.World(0), np.random.default_rng(0)
    number, attractor = [], []
    for _ in range(1000):
        m = S.meaning(rng)
        for lang in S.LANGS:
            words = S.render(m, lang)
            assert S.parse(words, lang) == m and len(world.ids(m, lang)) == len(words) + 1
            assert S.parse(words[1:], lang) != m and S.turned(S.parse(words, lang), "past", m[5] == "past") == m
        if m[3]:
            number.append(m[2] == "pl")
            attractor.append(m[3][1] == "pl")
    assert abs(np.corrcoef(number, attractor)[0, 1]) < 3 / math.sqrt(len(number))
    assert S.parse(S.render(m, "A"), "B") is None and S.parse([], "A") is None and S.parse(["An1.sg"], "A") is None
    prefixes = [{w for w in world.words if w[0] == lang} for lang in S.LANGS]
    assert sum(map(len, prefixes)) == len(world.words) - 9 and len(set(world.words)) == len(world.words)


def test_text_of_the_toy():
    world, alone = S.World(0), S.World(0, translation=False)
    a, b = world.batch(3, 20), world.batch(3, 20)
    assert torch.equal(a["idx"], b["idx"]) and not torch.equal(a["idx"][:, :9], world.batch(4, 20)["idx"][:, :9])

    def sentences(row):
        words = [world.words[i] for i in row.tolist() if i and world.words[i] != "<eos>"]
        cut = [i for i, w in enumerate(words) if w[0] == "<" and len(w) == 3] + [len(words)]
        parts = [(words[a][1], words[a + 1 : b]) for a, b in zip(cut, cut[1:])]
        return [S.parse(part, lang) for lang, part in parts], [lang for lang, _ in parts]

    pairs = [sentences(r) for r in a["idx"]]
    assert all(None not in ms and len(set(ms)) == 1 and len(set(langs)) == 4 for ms, langs in pairs)
    pairs = [sentences(r) for r in alone.batch(3, 20)["idx"]]
    assert all(None not in ms and len(set(ms)) > 1 and len(set(langs)) == 1 for ms, langs in pairs)
    held = {(m[1], m[4]) for m in (S.meaning(np.random.default_rng(i), True) for i in range(300))}
    train = {(m[1], m[4]) for m in (S.meaning(np.random.default_rng(i), False) for i in range(300))}
    assert not held & train and len(held) == 12
    sentences, labels = world.corpus(50, 0)["B"]["train"]
    for ids, plural, past in zip(sentences, labels["plural"], labels["past"]):
        words = [world.words[i] for i in ids]
        assert words[:2] == ["<bos>", "<B>"] and ("Bpl" in words) == plural and ("Bpast" in words) == past


def test_turning_a_meaning():
    m = (1, 2, "sg", (3, "pl"), 4, "pres", None)
    assert S.turned(m, "past", 1) == (1, 2, "sg", (3, "pl"), 4, "past", None)
    assert S.turned(m, "plural", 1) == (1, 2, "pl", (3, "pl"), 4, "pres", None)
    assert S.turned(m, "plural", 0) == (1, 2, "sg", (3, "sg"), 4, "pres", None)


def test_sentences_of_real_languages():
    corpus = S.template_sentences()
    assert set(corpus) == {"en", "fr", "de", "es", "it", "ru"}
    for splits in corpus.values():
        (train, labels), (test, _) = splits["train"], splits["test"]
        assert len(train) == len(set(train)) or len(train) - len(set(train)) < 40  # German Onkel, Schauspieler
        assert len(train) == 8 * 4 * 16 and len(test) == 4 * 2 * 16 and not {*train} & {*test}
        assert all(y.mean() == 0.5 for y in labels.values())
    assert "Les reines dansaient dans la ville." in corpus["fr"]["train"][0]
    assert "Королева пела в саду." in corpus["ru"]["train"][0]


CONLLU = """# sent_id = 1
# text = Cats sleep.
1-2\tCatss\t_\t_\t_\tNumber=Dual\t_\t_\t_\t_
1\tCats\tcat\tNOUN\t_\tNumber=Plur\t0\t_\t_\t_
2\tsleep\tsleep\tVERB\t_\tTense=Pres|Mood=Ind,Sub\t1\t_\t_\t_
2.1\tx\tx\tX\t_\tNumber=Sing\t_\t_\t_\t_
3\t.\t.\tPUNCT\t_\t_\t1\t_\t_\t_

"""


def test_universal_dependencies(tmp_path):
    for lang in "en", "tr":
        (tmp_path / lang).mkdir()
        for split, n in ("train", 70), ("test", 20):
            text = CONLLU * n + CONLLU.replace("Plur", "Sing") * n
            (tmp_path / lang / f"{lang}-ud-{split}.conllu").write_text(text)
    seen = {("Number", "Plur"), ("Tense", "Pres"), ("Mood", "Ind"), ("Mood", "Sub")}
    assert S.read_conllu(tmp_path / "en" / "en-ud-test.conllu")[0] == ("Cats sleep.", seen)
    corpus = S.ud_sentences(tmp_path)
    assert set(corpus["en"]["train"][1]) == {"Number=Plur", "Number=Sing"}
    assert corpus["tr"]["test"][1]["Number=Plur"].sum() == 20 and len(corpus["tr"]["test"][0]) == 40
    with pytest.raises(ValueError, match=">= 2 languages"):
        S.ud_sentences(tmp_path / "en")


# ------------------------------------------------------------------------------------------------------------- script


def test_smoke_writes_what_is_promised(tmp_path):
    result = S.main(["--preset", "smoke", "--out", str(tmp_path), "--seeds", "3"])
    assert result == json.loads((tmp_path / "result.json").read_text())
    assert [c["id"] for c in result["claims"]] == ["C1", "C2", "C3", "C4", "C5", "C6", "C7"]
    for c in result["claims"]:
        assert c["measured"] and c["control"] and isinstance(c["holds"], bool) and isinstance(c["control_fails"], bool)
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    arms = {"main-s3", "no-translation-s3", "untrained-s3"}
    assert {r["run"] for r in rows} == arms | {f"{arm}-sae" for arm in arms}
    assert (tmp_path / "sae.png").stat().st_size > 10000


def test_a_real_checkpoint(tmp_path):
    """A random Llama in the real files, Universal Dependencies and text from folders: the whole path of --model."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    import pretrained
    from model import GPT, GPTConfig

    torch.manual_seed(0)
    vocab = {"<|end_of_text|>": 0} | {c: i + 1 for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tok = Tokenizer(models.BPE(vocab, []))
    tok.pre_tokenizer, tok.decoder = pre_tokenizers.ByteLevel(False), decoders.ByteLevel()
    tok.add_special_tokens(["<|end_of_text|>"])
    folder = tmp_path / "model"
    plain = dict(norm="rms", gated=True, act="silu", qkv_bias=False, attn_bias=False, mlp_bias=False)
    pretrained.save(GPT(GPTConfig(257, 64, 3, 2, 16, d_mlp=32, **plain)), None, folder)
    tok.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"eos_token": "<|end_of_text|>"}')
    (tmp_path / "text.txt").write_text("Some more text.\n" * 400)
    for lang in "en", "tr":
        (tmp_path / "ud" / lang).mkdir(parents=True)
        for split, n in ("train", 70), ("test", 20):
            text = CONLLU * n + CONLLU.replace("Plur", "Sing").replace("Cats", "Cat") * n
            (tmp_path / "ud" / lang / f"x-{split}.conllu").write_text(text)
    flags = (
        f"--model {folder} --layer 1 --ud {tmp_path}/ud --dataset file:{tmp_path}/text.txt --d-sae 32 --k 4 --rows 512"
    )
    flags = [*flags.split(), *"--sae-batch 128 --sae-steps 10 --block-size 32 --refresh --jobs 1 --threads 1".split()]
    result = S.main([*flags, "--out", str(tmp_path / "out")])
    assert [c["id"] for c in result["claims"]] == ["C1", "C2", "C3"]  # two languages: no third to rank for
    assert set(result["metrics"]["main"][0]["study"]) == {"Number=Plur", "Number=Sing"}
    assert result["metrics"]["main"][0]["ce"]["clean"] > 0
    again = S.main([*flags, "--sae", str(tmp_path / "out" / "ae-s0.pt"), "--out", str(tmp_path / "two")])
    one, two = (r["metrics"]["main"][0]["study"]["Number=Plur"]["ablations"]["multi"] for r in (result, again))
    assert one["en"]["auc"] == pytest.approx(two["en"]["auc"], abs=1e-6)
    with pytest.raises(SystemExit):
        S.main([*flags, "--layer", "3", "--out", str(tmp_path / "three")])


def test_a_stopped_sae_goes_on_exactly(tmp_path):
    rows = torch.randn(4096, 8)
    batch = S.Buffer(lambda r: rows, 64)

    def run(log, resume=False, batch=batch):
        torch.manual_seed(0)
        return S.fit(S.SAE(8, 32, "topk", 4), batch, 240, 1e-3, log=log, resume=resume, every=70)

    def broken(step):
        if step == 205:
            raise InterruptedError
        return batch(step)

    whole, log = common.Log(tmp_path, "whole"), common.Log(tmp_path, "halves")
    with pytest.raises(InterruptedError):
        run(log, batch=broken)
    again, once = run(log, resume=True), run(whole)
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), once.parameters()))
    first, second = ([(r["step"], r["loss"]) for r in common.read_jsonl(x.path)] for x in (log, whole))
    assert first == second and [step for step, _ in first] == [0, 100, 200]
    with pytest.raises(SystemExit, match="of another shape"):
        S.fit(S.SAE(8, 16, "topk", 4), batch, 240, 1e-3, log=log, resume=True)
    S.fit(S.SAE(8, 16, "topk", 4), batch, 2, 1e-3, log=log)
    assert not log.path.with_suffix(".pt").exists()  # an earlier run's is not left to be resumed by mistake


@pytest.mark.parametrize(
    "flags, message",
    [
        ("--arch spline", "--arch"),
        ("--k 0", "k 0 latents"),
        ("--k 999", "k 999 latents of 64"),
        ("--layer 4", "--layer 4, allowed: 0 to 3"),
        ("--rows 10", "--rows 10, allowed: 1024 and more"),
        ("--top 0", "--top 0, allowed"),
        ("--ud /nowhere", "--ud /nowhere is no folder"),
        ("--model nothing-here", "nothing-here"),
        ("--sae /nowhere.pt", "/nowhere.pt"),
    ],
)
def test_bad_input_is_one_line(flags, message, tmp_path, capsys):
    with pytest.raises(SystemExit) as end:
        S.main([*flags.split(), "--out", str(tmp_path)])
    error = capsys.readouterr().err.strip()
    assert end.value.code == 2 and error.startswith("error: ") and "\n" not in error and message in error
