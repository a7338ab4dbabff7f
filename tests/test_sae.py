"""sae.py: codes and gradients against hand-computed values and autograd, the theorems, the toy, runs end to end."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from stand_in import tiny_llama

import common
import sae as S
from model import GPT, GPTConfig

torch.set_num_threads(1)
CPU = common.Env(torch.device("cpu"), torch.float32)

# --------------------------------------------------------------------------------- the sparse code


def pairs(pre, k, batch=False):
    rows, latents, values = S.select(pre, k, batch)
    return {(i, j): v for i, j, v in zip(rows.tolist(), latents.tolist(), values.tolist())}


def test_select_by_hand():
    pre = torch.tensor([[0.9, -0.2, 0.5, 0.7], [0.1, 0.3, 0.2, -1]])
    assert set(pairs(pre, 2)) == {(0, 0), (0, 3), (1, 1), (1, 2)}
    found = pairs(pre, 2, batch=True)
    assert set(found) == {(0, 0), (0, 2), (0, 3), (1, 1)}
    assert sorted(found.values()) == pytest.approx([0.3, 0.5, 0.7, 0.9])
    assert S.select(torch.tensor([[3, 2, 0.5], [1, 0.2, 0.1]]), 1, True)[1].tolist() == [0, 1]
    assert S.select(-pre.abs(), 2)[2].tolist() == [0] * 4  # nothing positive: an empty code


@pytest.mark.parametrize("streams", [1, 2])
@pytest.mark.parametrize("batch", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_sparse_step_equals_dense_autograd(seed, batch, streams):
    torch.manual_seed(seed)
    B, d, m, k = 37, 11, 50, 5
    s = S.SAE(d, m, k, streams, batch).double()
    for p in s.parameters():
        p.data += 0.1 * torch.randn_like(p)
    x = torch.randn(B, streams * d).double()
    target = torch.randn(B, streams * d).double()
    x_hat = S.SparseCode.apply(x, s.W_enc, s.b_enc, s.W_dec, s.b_dec, k, batch)[0]
    names, params = zip(*s.named_parameters())
    fast = torch.autograd.grad((x_hat - target).square().sum(), params)
    pre = F.linear(x - s.b_dec, s.W_enc, s.b_enc)
    least = pre.flatten().topk(B * k).values[-1] if batch else pre.topk(k).values[:, -1:]
    dense = (pre.relu() * (pre >= least)) @ s.W_dec + s.b_dec
    torch.testing.assert_close(x_hat, dense)
    slow = torch.autograd.grad((dense - target).square().sum(), params)
    for name, a, b in zip(names, fast, slow):
        torch.testing.assert_close(a, b, msg=name)


def test_a_latent_that_is_off_gets_no_gradient():
    s = S.SAE(3, 4, 2)
    with torch.no_grad():
        s.b_enc.fill_(-100)
    s("idx", torch.randn(5, 3), 5.0).backward()
    assert all(torch.isfinite(p.grad).all() for p in s.parameters())
    assert s.W_enc.grad.abs().sum() == 0 and s.b_dec.grad.abs().sum() > 0


def test_encode_and_decode_by_hand():
    s = S.SAE(2, 3, 2).requires_grad_(False)
    s.W_enc.copy_(torch.tensor([[1.0, 0], [0, 1], [1, 1]]))
    s.W_dec.copy_(torch.tensor([[1.0, 0], [0, 1], [0.6, 0.8]]))
    s.b_dec.copy_(torch.tensor([0.5, 0]))
    x = torch.tensor([1.5, 2.0])
    assert s.encode(x).tolist() == [0, 2, 3]  # pre-activations 1, 2, 3
    assert s.decode(s.encode(x)).tolist() == pytest.approx([0.5 + 1.8, 2 + 2.4])
    s.scale.fill_(2.0)  # of x twice as large: the same code, a reconstruction twice as large
    assert s.encode(2 * x).tolist() == [0, 2, 3]
    assert s.decode(s.encode(2 * x)).tolist() == pytest.approx([4.6, 8.8])
    assert s.decoder().tolist()[0] == [2, 0]


@pytest.mark.parametrize("streams", [1, 2])
def test_the_norms_of_a_latent_sum_to_one(streams):
    torch.manual_seed(0)
    s = S.SAE(4, 12, 3, streams, batch=True)
    x = torch.randn(64, 4 * streams)
    opt = S.adam(s, replace(common.TrainFlags(), lr=1e-2))
    for _ in range(5):
        s("idx", x, 64.0).backward()
        opt.step()
        opt.zero_grad()
    torch.testing.assert_close(s.norms().sum(1), torch.ones(12))
    assert s.norms().shape == (12, streams)
    parts = [s.decoder(i) for i in range(streams)]
    torch.testing.assert_close(torch.cat(parts, 1), s.W_dec.detach())


def test_the_threshold_of_a_batch_keeps_k_in_a_row_on_average():
    torch.manual_seed(0)
    s, x = S.SAE(6, 20, 4, batch=True), torch.randn(50, 6)
    s("idx", x, 50.0)
    kept = (s.encode(x) > 0).sum()
    assert int(kept) == 4 * 50 - 1  # the one at the threshold itself is not above it
    s.threshold.fill_(-1.0)
    assert (s.encode(x) >= 0).all()


def test_dead_latents_learn_what_the_others_leave():
    torch.manual_seed(0)
    s, x = S.SAE(4, 6, 2), torch.randn(50, 4)
    x_hat = torch.zeros_like(x)
    assert s.dead_loss(x, x_hat, torch.zeros(6, dtype=torch.bool)) == 0.0
    loss = s.dead_loss(x, x_hat, torch.tensor([False] * 4 + [True] * 2))
    grads = torch.autograd.grad(loss, s.W_enc)[0].abs().sum(1)
    assert (grads[:4] == 0).all() and (grads[4:] > 0).all()
    s.silent.fill_(7)
    s("idx", x, 50.0)
    used = s.encode(x).gt(0).any(0)
    assert (s.silent[used] == 0).all() and (s.silent[~used] == 8).all()


# ------------------------------------------------------------------- activations, and their SAE


def toy_model():
    torch.manual_seed(0)
    return GPT(GPTConfig(len(S.WORDS), 64, 3, 2, 16, qkv_bias=False)).eval().requires_grad_(False)


def test_residual_is_what_the_whole_model_has_there():
    model = toy_model()
    idx = torch.randint(len(S.WORDS), (3, 9))
    mask = torch.ones(3, 9, dtype=torch.bool)
    mask[1, :4] = False
    for layer in range(3):
        site = f"blocks.{layer}.resid_post"
        whole = model.capture(idx, [site], mask)[site]
        torch.testing.assert_close(S.residual(model, idx, layer, mask)[mask], whole[mask])
    assert len(model.blocks) == 3


def test_harvest_leaves_out_the_start_padding_and_huge_rows():
    model = toy_model()
    idx = torch.tensor([[1, 5, 6, 0], [1, 7, 8, 9]])
    rows = S.harvest([model, model], 1, [(idx, idx != 0)], 100, bos=1)
    x = S.residual(model, idx, 1, idx != 0)
    wanted = torch.cat([x[0, 1:3], x[1, 1:]])
    torch.testing.assert_close(rows, torch.cat([wanted, wanted], 1))
    assert len(S.harvest([model], 1, [(idx, idx != 0)] * 3, 7, bos=1)) == 7
    model.wte.weight[8] *= 1000
    assert len(S.harvest([model], 0, [(idx, idx != 0)], 100, bos=1)) == 4
    assert len(S.harvest([model], 0, [(idx, idx != 0)], 100, bos=-1)) == 6  # no start token: all


class Identity:
    scale = torch.ones(1)

    def encode(self, x):
        return x


def test_pooling():
    model = toy_model()
    sentences = [[1, 5, 6], [1, 7, 8, 9, 10], [1, 4]]
    for bos in 1, -1:
        X, codes = S.pool(model, 1, Identity(), sentences, bos)
        torch.testing.assert_close(X, codes)
        for row, ids in zip(X, sentences):
            alone = S.residual(model, torch.tensor([ids]), 1)[0, bos == 1 :].mean(0)
            torch.testing.assert_close(row.float(), alone, atol=1e-5, rtol=1e-4)


def sae_flags(out, *more):
    flags = ["--out", str(out), "--sae-steps", "6", "--sae-batch", "4", "--log-every", "1"]
    return common.parse(S.Args, [*flags, *more])


class Seen(S.SAE):
    """An SAE that notes which rows it is trained on."""

    def forward(self, idx, x, denom):
        self.rows = getattr(self, "rows", [])
        self.rows.append(x[:, 0].tolist())
        return super().forward(idx, x, denom)


def test_every_row_is_served_once_a_round(tmp_path):
    args = sae_flags(tmp_path)
    rows = torch.arange(1.0, 13)[:, None].repeat(1, 3)
    served = []
    for seed in 0, 0, 1:
        s = Seen(3, 8, 2)
        S.train_sae(s, rows, args, CPU, common.Log(args, CPU, "a"), seed)
        served.append(s.rows)
        first, second = sum(s.rows[:3], []), sum(s.rows[3:], [])
        assert sorted(first) == rows[:, 0].tolist() and first != sorted(first)
        assert second == first
    assert served[0] == served[1] != served[2]


def test_streams_are_scaled_alike(tmp_path):
    torch.manual_seed(0)
    rows = torch.randn(64, 6)
    rows[:, 3:] *= 50
    args = sae_flags(tmp_path, "--sae-lr", "0.01")
    s = S.SAE(3, 8, 2, streams=2, batch=True)
    S.train_sae(s, rows, args, CPU, common.Log(args, CPU, "a"), 0)
    size = (rows / s.scale).unflatten(1, (2, 3)).square().sum(2).mean(0)
    torch.testing.assert_close(size, torch.ones(2))
    assert s.scale[:3].unique().numel() == 1


def test_a_stopped_sae_goes_on_exactly(tmp_path):
    rows = torch.randn(64, 5)

    def run(name, steps, *more):
        flags = ["--sae-steps", str(steps), "--decay-steps", "6", "--save-every", "2"]
        args = sae_flags(tmp_path, *flags, *more)
        torch.manual_seed(0)
        s = S.SAE(5, 16, 3, batch=True)
        S.train_sae(s, rows, args, CPU, common.Log(args, CPU, name), 0)
        return s

    whole = run("whole", 6)
    path = tmp_path / "parts-sae.pt"
    kept = []

    class Stop(Exception):
        pass

    def stopping(step):
        kept.append(step)

    parts = S.SAE.forward

    def forward(self, idx, x, denom):
        stopping(len(kept))
        if len(kept) == 6:
            raise Stop
        return parts(self, idx, x, denom)

    S.SAE.forward = forward
    try:
        with pytest.raises(Stop):
            run("parts", 6)
    finally:
        S.SAE.forward = parts
    assert path.exists()
    again = run("parts", 6, "--resume")
    for (name, a), b in zip(whole.state_dict().items(), again.state_dict().values()):
        assert torch.equal(a, b), name


# ---------------------------------------------------------------------------- what probes can read


def test_attribution_is_integrated_gradients_is_ablation():
    D, w = torch.eye(2).double(), torch.tensor([2.0, -1]).double()
    f, y = torch.tensor([[1.0, 0], [3, 2]]).double(), torch.tensor([1, 0])
    assert S.attribution(f, y, D, w).tolist() == [8, -2]
    total = f.sum(0, keepdim=True)
    assert float(total @ w) == 6 and float(S.ablate(total, total, [0], D) @ w) == -2
    assert S.attribution(f, y, D, w, contrast=True).tolist() == [2 * (1 - 3), -1 * (0 - 2)]
    torch.manual_seed(0)
    s = S.SAE(6, 15, 4).double().requires_grad_(False)
    x, w = torch.randn(8, 6).double(), torch.randn(6).double()
    codes = s.encode(x)
    closed = S.attribution(codes, torch.ones(8), s.decoder(), w)
    total = torch.zeros(15).double()
    for step in range(10):
        f = (codes * step / 10).requires_grad_()
        total += (torch.autograd.grad((s.decode(f).sum(0) * w).sum(), f)[0] / 10 * codes).sum(0)
    torch.testing.assert_close(closed, total, atol=1e-5, rtol=1e-5)
    for j in range(15):
        change = x - S.ablate(x, codes, [j], s.decoder())
        torch.testing.assert_close(change.sum(0) @ w, closed[j])
    assert torch.equal(S.ablate(x, codes, [], s.decoder()), x)
    rest = x - s.decode(codes)
    torch.testing.assert_close(S.ablate(x, codes, list(range(15)), s.decoder()), s.b_dec + rest)


def test_the_best_support_the_value():
    ie = torch.tensor([0.5, -3.0, 2.0, 0.0, 1.0])
    assert S.best(ie, 2) == [2, 4] and S.best(ie, 5) == [2, 4, 0]


def test_sharing_by_hand():
    lists = [[1, 2, 3], [2, 3, 9], [3, 7, 2]]  # English, French, Turkish
    several, share = S.shared(lists)
    assert several == [2, 3] and share == 0.4
    several, share = S.shared(lists, [[2, 8], [2], [2, 3]])
    assert several == [3] and share == 0.2  # 2 is as often in lists by chance
    assert S.shared([[], []]) == ([], 0)
    assert S.shared([[1]]) == ([], 0)
    assert S.shared([[5, 4, 1], [1, 5], [5, 4]])[0] == [5, 1, 4]  # most lists first, then by id


def test_lists_that_are_drawn_blindly_do_not_pass_for_shared():
    rng = np.random.default_rng(0)

    def drawn():
        return [rng.choice(20, 4, replace=False).tolist() for _ in range(6)]

    plain = np.mean([S.shared(drawn())[1] for _ in range(200)])
    against = np.mean([S.shared(drawn(), drawn())[1] for _ in range(200)])
    assert plain > 0.3 and against < 0.8 * plain


def test_matched_latents():
    weight = torch.rand(200)
    weight[50:90] = 0
    found = S.alike([1, 2, 3], weight)
    assert len(set(found)) == 3 and not {1, 2, 3} & set(found) and (weight[found] > 0).all()
    assert (weight[found] - weight[[1, 2, 3]]).abs().max() < 0.1
    assert S.alike([0, 1], torch.tensor([1.0, 1, 0.5, 0])) == [2]  # one is free


def test_read_by_hand():
    read = S.scores(torch.tensor([-1.0, 1, 1, 2]), torch.tensor([0, 0, 1, 1]))
    assert read == pytest.approx({"accuracy": 0.75, "auc": 3.5 / 4})
    moved = S.scores(torch.tensor([-9.0, -7, -7, -6]), torch.tensor([0, 0, 1, 1]))
    assert moved == pytest.approx({"accuracy": 0.5, "auc": 3.5 / 4})  # a threshold away, no more


def planted(n=300, m=12, seed=0):
    """Three languages, codes in which latent 0 is the value, and a decoder of orthogonal directions."""
    g = torch.Generator().manual_seed(seed)
    D = torch.eye(m).double()
    parts = []
    for _ in range(3):
        y = torch.arange(n) % 2
        codes = torch.rand(n, m, generator=g).double()
        codes[:, 0] += 3 * y
        parts.append((codes @ D, codes, y))
    return parts, D


def test_a_feature_that_is_one_latent_is_found_removed_and_gone():
    parts, D = planted()
    weight = parts[0][1].mean(0)
    directions = S.steering_vectors(parts, weight, D, 1)
    for numbers, logits in S.removals(parts, weight, D, 1):
        assert numbers["nothing"]["accuracy"] > 0.99
        assert numbers["multilingual"]["auc"] < 0.7 and numbers["multilingual"]["refit"] < 0.65
        assert numbers["matched random"]["auc"] > 0.95
        assert numbers["difference of means"]["refit"] < 0.65
        singular, plural = logits["nothing"]
        assert len(singular) == len(plural) == 30 and max(singular) < min(plural)
    value = F.one_hot(torch.tensor(0), 12).double()
    assert F.cosine_similarity(directions["multilingual"], value, dim=0) > 0.9
    assert abs(F.cosine_similarity(directions["random"], value, dim=0)) < 0.01


def test_lists_of_a_planted_feature_are_shared_and_those_of_shuffled_labels_are_not():
    parts, D = planted()
    assert S.shared(S.top_lists(parts, D, 1))[1] == 1
    rng = np.random.default_rng(0)
    by_chance = [S.top_lists(parts, D, 1, rng=rng) for _ in range(20)]
    assert np.mean([S.shared(lists)[1] for lists in by_chance]) < 0.5


# ------------------------------------------------------------------------------------------- toy


def shows(words, concept, value):
    """Whether words carry the value, and nowhere the opposite one."""
    marks = set(".".join(word.split(":")[1] for word in words).split("."))
    return marks & {*S.VALUES[concept]} == {S.VALUES[concept][value]}


def test_sentences_by_hand():
    m = S.Meaning(3, 1, 4, 0, 7, 0)
    said = {lang: " ".join(word[2:] for word in m.render(lang)) for lang in S.LANGUAGES}
    assert said["A"] == "n3.pl v4.pres.pl n7.sg"
    assert said["B"] == "n3 pl n7 sg v4 pres agr.pl"
    assert said["C"] == "aux.pres.pl v4 pl n3 sg n7"
    assert said["E"] == "n3.pl.nom n7.sg.acc v4.pres.pl"
    assert said["F"] == "v4.pres n7 sg n3 pl"
    assert all(word.startswith(f"{lang}:") for lang in "AF" for word in m.render(lang))
    assert m.turned("past", 1) == S.Meaning(3, 1, 4, 1, 7, 0)
    assert m.turned("plural", 1) == S.Meaning(3, 1, 4, 0, 7, 1)


def test_a_sentence_says_one_thing():
    rng = np.random.default_rng(0)
    for lang in S.LANGUAGES:
        said = {}
        for _ in range(300):
            m = S.draw_meaning(rng, held=False)
            assert said.setdefault(tuple(m.render(lang)), m) == m
            words = m.turned("plural", 1).render(lang)
            assert shows(words, "plural", 1) and not shows(words, "plural", 0)
            assert shows(words, "past", m.tense) and not shows(words, "past", 1 - m.tense)


def test_vocabulary_and_held_out_pairs():
    assert len(set(S.WORDS)) == len(S.WORDS) == 9 + sum(":" in word for word in S.WORDS)
    assert S.WORDS[S.PAD] == "<pad>" and S.WORDS[S.BOS] == "<bos>" and S.WORDS[S.EOS] == "<eos>"
    assert [S.WORDS[i] for i in S.STOP] == ["<eos>", *(f"<{lang}>" for lang in S.LANGUAGES)]
    rng = np.random.default_rng(0)
    held = {S.draw_meaning(rng, True)[:3:2] for _ in range(500)}
    rest = {S.draw_meaning(rng, False)[:3:2] for _ in range(2000)}
    assert not held & rest and len(held) + len(rest) == S.NOUNS * S.VERBS


def sentences_of(row):
    words = [S.WORDS[i] for i in row if i not in (S.PAD, S.BOS, S.EOS)]
    tags = [i for i, word in enumerate(words) if word[0] == "<"]
    return [words[a:b] for a, b in zip(tags, [*tags[1:], len(words)])]


def test_texts_of_the_toy():
    one, two = (S.texts(np.random.default_rng(3), 20, True) for _ in range(2))
    assert torch.equal(one["idx"], two["idx"])
    shifted = one["targets"][:, :-1]
    assert torch.equal(shifted[shifted >= 0], one["idx"][:, 1:][shifted >= 0])
    assert (one["targets"] != S.PAD).all()
    for row in one["idx"].tolist():
        sentences = sentences_of(row)
        assert len({words[0] for words in sentences}) == 4
        lemmas = [{w[3:5].strip(".") for w in words[1:] if w[2:3] in "nv"} for words in sentences]
        assert all(some == lemmas[0] for some in lemmas)
    for row in S.texts(np.random.default_rng(3), 20, False)["idx"].tolist():
        sentences = sentences_of(row)
        assert len({words[0] for words in sentences}) == 1
        assert len({tuple(words) for words in sentences}) > 1


def test_corpus_is_balanced():
    corpus = [*S.toy_corpus(0)]
    assert len(corpus) == len(S.LANGUAGES)
    for sentences in corpus:
        assert len(sentences) == 500 and len(S.training(sentences)) == 400
        for concept, labels in S.LABELS.items():
            assert np.mean(labels) == 0.5
            for row, label in zip(sentences, labels * 125):
                assert shows([S.WORDS[i] for i in row[2:]], concept, label)


def test_pushing_by_hand():
    x = torch.tensor([[3.0, 4], [0, 1]])
    assert S.push(x, torch.tensor([0.0, 2]), 1.5).tolist() == [[3, 11.5], [0, 2.5]]
    assert torch.equal(S.push(x, torch.tensor([0.0, 2]), 0.0), x)


def test_steering_counts_what_is_flipped_and_what_is_right(monkeypatch):
    model = toy_model()

    def generate(model, prompts, n, temperature, stop):
        """Flips three of five translations, and of the first of them another word, too."""
        out = []
        for i, prompt in enumerate(prompts):
            lang, into = (S.WORDS[j][1] for j in (prompt[1], prompt[-1]))
            m = by_words[tuple(prompt[2:-1]), lang]
            if i % 5 < 3:
                m = m.turned("past", 1 - m.tense)
            if i % 5 == 0:
                m = m._replace(verb=(m.verb + 1) % S.VERBS)
            out.append([*m.ids(into)[1:], S.EOS])
        return out

    by_words = {}
    for numbers in np.ndindex(S.NOUNS, 2, S.VERBS, 2, S.NOUNS, 2):
        m = S.Meaning(*numbers)
        for lang in S.LANGUAGES:
            by_words[tuple(m.ids(lang)[1:]), lang] = m
    monkeypatch.setattr(S, "generate", generate)
    direction = torch.ones(16)
    for held in False, True:
        found = S.steer(model, 2, direction, 1.0, "past", 0, held)
        assert found == pytest.approx((0.6, 0.4))
    monkeypatch.setattr(S, "generate", lambda model, prompts, n, **_: [[] for _ in prompts])
    assert S.steer(model, 2, direction, 1.0, "past", 0, True) == (0, 0)


def test_a_push_acts_on_every_token_of_a_translation():
    """A push by nothing changes nothing; one that is long enough says the same to every prompt."""
    model = toy_model()
    prompts = [[S.BOS, 5, 30, 6], [S.BOS, 4, 31, 32, 8]]
    plain = S.generate(model, prompts, 6, temperature=0)
    direction = torch.randn(16, generator=torch.Generator().manual_seed(0)).double()
    for strength, same in (0.0, True), (1e4, False):
        patch = S.partial(S.push, direction=direction, strength=strength)
        with model.patch({"blocks.2.resid_post": patch}):
            pushed = S.generate(model, prompts, 6, temperature=0)
        assert (pushed == plain) == same
    assert pushed[0] == pushed[1] == pushed[0][:1] * 6


def test_the_gentlest_push_that_does_is_used(monkeypatch):
    asked, enough = [], 0.7

    def steer(model, layer, direction, strength, concept, seed, held):
        asked.append((round(float(strength), 2), held))
        return (0.7, 0.6) if strength > enough - 0.01 else (0.5, 0.4)

    monkeypatch.setattr(S, "steer", steer)
    directions = {"past": {"random": torch.ones(3)}}
    found = S.steer_concepts(None, 0, directions, "random", 0)
    assert found == pytest.approx({"past": 0.7, "kept": 0.6 / 0.7})
    assert asked == [(0.6, False), (0.65, False), (0.7, False), (0.7, True)]
    enough = 9  # none does: the strongest
    assert S.steer_concepts(None, 0, directions, "random", 0)["past"] == 0.5
    assert asked[-2:] == [(1.4, False), (1.4, True)]


# ------------------------------------------------------------------------------------------ script


def test_sentences_of_real_languages():
    corpus = [*S.template_sentences(str)]
    assert len(corpus) == 6
    for sentences in corpus:
        train, test = S.training(sentences), sentences[8 * 4 * 4 * 4 :]
        assert len(train) == 8 * 4 * 4 * 4 and len(test) == 4 * 2 * 4 * 4
        assert not {*train} & {*test}
    english, french, _, _, _, russian = corpus
    assert english[:4] == [f"The {words} in the garden." for words in FOUR]  # as S.LABELS has it
    assert "Les voisins dansaient dans la ville." in S.training(french)
    assert "Король пел в саду." in S.training(russian)


FOUR = "king sings", "king sang", "kings sing", "kings sang"


def test_smoke_writes_what_is_promised(tmp_path):
    flags = ["--preset", "smoke", "--out", str(tmp_path), "--seeds", "3"]
    result = S.main(flags)
    written = json.loads((tmp_path / "result.json").read_text())
    assert json.dumps(result) == json.dumps(written)  # as text: nan is not equal to itself
    assert [c["id"] for c in result["claims"]] == ["C1", "C2", "C3", "C4", "C5", "C6"]
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert {r["run"] for r in rows} == {"main-s3", "alone-s3", "main-s3-0-sae", "alone-s3-0-sae"}
    assert (tmp_path / "sae.png").stat().st_size > 10000


def test_a_real_checkpoint(tmp_path):
    lines = ["The kings sing in the garden.", "Les rois dansent dans la ville."] * 20
    shape = dict(block_size=128, n_layer=3, n_head=4, n_embd=32)
    folder = tiny_llama(tmp_path / "model", lines, 300, **shape)
    (tmp_path / "text.txt").write_text("Some more text.\n" * 2000)
    flags = ["--model", str(folder), "--layer", "1", "--dataset", f"file:{tmp_path}/text.txt"]
    flags += "--d-sae 32 --k 4 --rows 1024 --sae-batch 128 --sae-steps 10 --top 2".split()
    result = S.main([*flags, "--out", str(tmp_path / "out"), "--seeds", "0", "1"])
    assert [c["id"] for c in result["claims"]] == ["C1", "C2", "C3", "C4"]
    assert len(result["metrics"]["main"]) == 2
    again = S.main([*flags, "--resume", "--out", str(tmp_path / "out"), "--seeds", "1"])
    assert json.dumps(again["metrics"]["main"][0]) == json.dumps(result["metrics"]["main"][1])
    with pytest.raises(SystemExit):
        S.main([*flags, "--layer", "3", "--out", str(tmp_path / "three")])


@pytest.mark.parametrize(
    "flags, message",
    [
        ("--k 0", "--k 0, allowed: 1 and more"),
        ("--k 999", "--k 999, allowed: 1 to 96"),
        ("--layer 4", "--layer 4, allowed: 0 to 3"),
        ("--rows 10", "--rows 10, allowed: 1024 and more"),
        ("--top 0", "--top 0, allowed: 1 and more"),
        ("--top 99", "--top 99, allowed: 1 to 12"),
        ("--pool sum", "--pool"),
        ("--model nothing-here", "nothing-here"),
        ("--dataset file:x", "--dataset: no effect without --model"),
        ("--model x --steps 5 --lr .1", "--lr --steps: no effect with --model"),
        ("--eval-every 5", "--eval-every"),
        ("--n-embd 30", "--n-embd 30"),
        ("--seeds 0 0", "--seeds 0 0"),
    ],
)
def test_bad_input_is_one_line(flags, message, tmp_path, capsys):
    with pytest.raises(SystemExit) as end:
        S.main([*flags.split(), "--out", str(tmp_path)])
    error = capsys.readouterr().err.strip()
    assert end.value.code == 2 and error.startswith("error: ") and "\n" not in error
    assert message in error
