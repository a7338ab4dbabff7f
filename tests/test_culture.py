"""The gap, its vectors and its controls: hand-computed values, the one pass against the plain loop, the script."""

import csv
import json
import math
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from stand_in import tiny_llama

import legacy as common
import culture
import pretrained
from culture import Ask
from model import GPT, GPTConfig, generate

# -------------------------------------------------------------------------------------------------------- by hand


def test_parse_answer():
    options = ("Liam", "Alparslan")
    for text, index in [
        ("2. Alparslan", 1),
        ("Answer: 1", 0),
        ("I cannot tell", None),
        ("Not Alparslan, but Liam", 1),
        ("12", None),
        ("Liams", None),
        ("21 1", 0),
    ]:
        assert culture.parse_answer(text, options) == index


def test_denominators():
    types = [("local", "local"), ("local", "west"), ("west", "west"), (None, "local")]
    got = culture.denominators(types)
    assert got["consistent"] == (0.5, 0.5) and got["all"] == (0.5, 1.0)
    assert got["valid"] == pytest.approx((4 / 7, 7 / 8))
    assert culture.denominators([(None, None)])["consistent"] == (0, 0)


def test_differences():
    plus, minus = torch.tensor([[1.0, 2], [3, 4]]), torch.tensor([[0.0, 1], [1, 1]])
    assert culture.difference([plus - minus]).tolist() == [1.5, 2]
    a, b, empty = torch.tensor([[2.0, 0], [4, 0]]), torch.tensor([[0.0, 3]]), torch.zeros(0, 2)
    assert culture.difference([a, b, empty]).tolist() == [2, 1]
    assert culture.difference([a, b, empty], "macro").tolist() == [1.5, 1.5]
    assert culture.pair(["q1", "q2", "q3", "q1"], ["q3", "q1"]) == ([0, 2, 3], [1, 0, 1])


def test_shuffled_labels_are_balanced():
    same = torch.ones(6, 3)
    assert culture.shuffled(same, np.random.default_rng(0)).abs().max() == 0
    mean = torch.stack([culture.shuffled(torch.eye(4), np.random.default_rng(i)) for i in range(400)]).mean(0)
    assert mean.abs().max() < 0.05
    assert culture.shuffled(torch.ones(1, 3), np.random.default_rng(0)).tolist() == [0, 0, 0]


def test_measure_by_hand():
    p, owner = torch.tensor([0.1, 0.2, 0.3, 0.05, 0.15]), torch.tensor([0, 0, 1, 1, 2])
    m = dict(zip(culture.MEASURES, culture.measure(p, owner, 1, theirs=2).tolist()))
    q = (6 / 7, 1 / 7)
    expected = dict(loc=0.35, other=0.15, junk=0.2, stereo=q[0], pairacc=0.5, theirs=0.15)
    expected |= {"def": 0.3, "H": -sum(x * math.log2(x) for x in q)}
    assert m == pytest.approx(expected, abs=1e-6)
    default = dict(zip(culture.MEASURES, culture.measure(p, owner, 0).tolist()))
    assert default["loc"] == pytest.approx(0.3) and default["def"] == pytest.approx(0.5)
    half = culture.measure(torch.tensor([0.2, 0.3, 0.3]), torch.tensor([0, 1, 1]), 1)
    assert half[4] == pytest.approx(1.0, abs=1e-6)  # (.5, .5) is one bit


def test_bootstrap_and_matching():
    assert common.interval([0.35] * 8) == pytest.approx([0.35] * 3)
    mean, low, high = common.interval([0.0, 1.0, math.nan, 1.0, 1.0])
    assert mean == 0.75 and 0 <= low < mean < high <= 1
    assert all(map(math.isnan, common.interval([math.nan])))
    loc, H = torch.tensor([0.2, 0.6, 0.8]), torch.tensor([2.0, 1.0, 3.0])
    assert culture.at_localisation(loc, H, 0.4) == pytest.approx(1.5)
    assert culture.at_localisation(loc, H, 0.1) == 2 and math.isnan(culture.at_localisation(loc, H, 0.9))


# ------------------------------------------------------------------------------------------------------ the toy's text


@pytest.fixture(scope="module")
def toy():
    return culture.Toy(3, 0.7)


def test_documents_are_what_they_should_be(toy):
    ids, (lang, kind, who) = toy.documents(np.random.default_rng(0), 100_000)
    plain = (kind == 0) & (lang > 0)
    assert abs((who[plain] == lang[plain]).mean() - 0.3) < 0.01 and (who[(kind != 1) & (lang == 0)] == 0).all()
    assert abs((kind == 0).mean() - 0.5) < 0.01 and abs((kind == 1).mean() - 0.35) < 0.01
    assert not {*zip(lang[kind == 1].tolist(), who[kind == 1].tolist())} & {*toy.held} and len(toy.held) == 8
    answers = (ids > 2) & (ids < 243)
    owner = (ids - 3) // 6 % 5
    assert ((owner == who[:, None]) | ~answers).all()  # one culture answers a whole document
    for stereo, entropy in (0, 2.512), (1, 1.537):
        rows = (kind == 1) == bool(stereo)
        p = np.bincount((ids[rows][answers[rows]] - 3) % 6) / answers[rows].sum()
        assert -(p * np.log2(p)).sum() == pytest.approx(entropy, abs=0.01)
    text = " ".join(toy.words[i] for i in ids[kind == 1][0])
    assert re.match(r"<bos> I\.(\w\w) \w+\.\1 \w\w\.\1 ;\.\1 \w+\.\1 \?\.\1 \S+ ;", text)


def test_truth_and_prompts(toy):
    p = toy.truth("tr", "none", 1).view(5, 6)
    assert p[0].sum() == pytest.approx(0.7) and p[1].sum() == pytest.approx(0.3) and p[2:].sum() == 0
    for k, context, entropy in (1, "own", 1.537), (0, "none", 2.512):
        q = toy.truth("en", context, k).clamp(min=1e-30)
        assert -(q * q.log2()).sum() == pytest.approx(entropy, abs=1e-3)
    ask = toy.ask("fr", "own", "cities", 2)
    assert len(ask.prompts) == 3 and ask.items == [0, 0, 0] and ask.tokens.shape == (3, 30)
    assert [toy.words[i] for i in ask.prompts[0]] == "<bos> I.fr live.fr fr.fr ;.fr cities.fr ?.fr".split()
    assert toy.words[ask.tokens[0, 12]] == "cities:Paris(fr)" and ask.owner[12] == 2


# ------------------------------------------------------------------------------------- one pass against the plain loop


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return GPT(GPTConfig(50, 64, 3, 2, 16, norm="rms", gated=True, n_kv_head=1)).eval()


def prompts(n=5, low=2, high=9):
    rng = np.random.default_rng(1)
    return [rng.integers(1, 50, rng.integers(low, high)).tolist() for _ in range(n)]


def plain(model, ids, layer, v):
    with torch.no_grad(), culture.steered(model, layer, v):
        return model(torch.tensor([ids]))[0, -1].softmax(-1)


def test_grid_of_one_pass_equals_the_loop(model):
    ask = Ask(prompts(), [], torch.arange(10).repeat(5, 1), None)
    v, layers, alphas = torch.randn(2, 4, 16), [0, 2], [-1.0, 0.5, 2.0]
    got = culture.patched(model, ask, lambda rows: culture.add(v, layers, alphas), 3).unflatten(1, (2, 2, 3))
    for n, ids in enumerate(ask.prompts):
        for i, layer in enumerate(layers):
            for j in range(2):
                for a, alpha in enumerate(alphas):
                    expected = plain(model, ids, layer, alpha * v[j, layer + 1])[:10]
                    torch.testing.assert_close(got[n, i, j, a], expected, atol=1e-5, rtol=1e-4)


def test_strengths_add_up(model):
    ask = Ask(prompts(), [], torch.arange(10).repeat(5, 1), None)
    v = torch.randn(1, 4, 16)
    clean = culture.run(model, ask, 8)[1]
    got = culture.patched(model, ask, lambda rows: culture.add(v, [1], [0.0, 1.0]), 8)
    torch.testing.assert_close(got[:, 0], clean, atol=1e-6, rtol=1e-5)
    with torch.no_grad(), culture.steered(model, 1, v[0, 2] / 2), culture.steered(model, 1, v[0, 2] / 2):
        twice = model(torch.tensor([ask.prompts[0]]))[0, -1].softmax(-1)[:10]
    torch.testing.assert_close(got[0, 1], twice, atol=1e-6, rtol=1e-5)
    z = culture.run(model, ask, 8)[0]  # after the last block: norm and unembedding of the sum
    last = culture.patched(model, ask, lambda rows: culture.add(v, [2], [1.0]), 8)[:, 0]
    with torch.no_grad():
        expected = model.unembed(model.final(z[3] + v[0, 3])).softmax(-1)[:, :10]
    torch.testing.assert_close(last, expected, atol=1e-6, rtol=1e-5)


def test_patch_ends(model):
    ask, other = (Ask(p, [], torch.arange(10).repeat(5, 1), None) for p in (prompts(), prompts(low=4)))
    own, source = culture.run(model, ask, 8), culture.run(model, other, 8)
    for z, row, expected in (own[0], slice(None), own[1][:, None].expand(-1, 4, -1)), (source[0], 3, source[1]):
        got = culture.patched(model, ask, lambda rows, z=z: culture.swap(z[:, rows]), 2)[:, row]
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-4)


def test_steered_text_is_that_of_the_full_recomputation(model):
    v, start = 30 * torch.randn(16), prompts(3)
    with culture.steered(model, 1, v):
        got = generate(model, start, 20, temperature=0)
    assert all(a[0] != b[0] for a, b in zip(got, generate(model, start, 1, temperature=0)))  # from the first token on
    for ids, out in zip(start, got):
        for i, token in enumerate(out):
            whole = torch.tensor([ids + out[:i]])

            def put(x, ids=ids):
                x = x.clone()
                x[:, len(ids) - 1 :] += v
                return x

            with torch.no_grad(), model.patch({"blocks.1.resid_post": put}):
                assert model(whole)[0, -1].argmax() == token


# ------------------------------------------------------------------------------------------------ vectors and the grid


def fake(K=4, tasks="abcd", n=3):
    rng = torch.Generator().manual_seed(0)
    contexts = [(s, c) for s in ("local", "en") for c in ("neutral", "default", "own")]
    keys = [(s, c, k, t) for s, c in contexts for k in range(K) for t in tasks]
    diffs = {key: torch.randn(n, 2, 5, generator=rng) for key in keys}
    return diffs | {("local", "implicit", k, t): torch.randn(n, 2, 5, generator=rng) for k in range(K) for t in tasks}


def test_vectors():
    diffs, args = fake(), SimpleNamespace(draws=3)
    v = culture.vectors(diffs, 2, "local", ["a", "b"], args, np.random.default_rng(0), fake())
    pairs = lambda s, k: torch.cat([diffs[s, "own", k, t] for t in "ab"])
    torch.testing.assert_close(v["own"], pairs("local", 2).mean(0))
    torch.testing.assert_close(v["cross"], pairs("en", 2).mean(0))
    torch.testing.assert_close(v["universal"], (pairs("local", 1).sum(0) + pairs("local", 3).sum(0)) / 12)
    torch.testing.assert_close(v["centred"], v["own"] - v["universal"])  # as many pairs of each
    torch.testing.assert_close(v["wrong"], pairs("local", 3).mean(0))
    for i in range(3):
        torch.testing.assert_close(v[f"random{i}"].norm(dim=-1), v["own"].norm(dim=-1))
    for key in [key for key in diffs if key[1] == "own" and key[2] == 2]:
        diffs[key] = diffs[key][:0]
    with pytest.raises(ValueError, match="culture 2: nothing of a, b"):
        culture.vectors(diffs, 2, "local", ["a", "b"], args, np.random.default_rng(0))


def test_folds_and_picking():
    world = SimpleNamespace(tasks=list("abcdefgh"))
    parts = culture.folds(world.tasks)
    assert parts == [["a", "b"], ["c", "d"], ["e", "f"], ["g", "h"]]
    g = {role: torch.zeros(1, 8, 1, 4, 8) for role in ("test", "select")}
    g["select"][0, 2:4, 0, 3, 0] = 1  # where fold 0's cell is picked: tasks c and d
    g["test"][0, :, 0, 1, 0] = 0.5
    g["test"][0, :2, 0, 3, 0] = 0.25
    picked, cells = culture.pick(g, world, ["own"], 2)
    assert cells[0, 0].tolist() == [1, 1] and picked["clean"]["own"][0, :, 0].tolist() == [0.25] * 2 + [0] * 6
    assert picked["paper"]["own"][0, :, 0].tolist() == [0.5] * 8  # picked on the answers it is tested on


def test_answered_pairs(toy):
    ask = Ask([[1]] * 2, [0, 1], torch.zeros(2, 2), torch.tensor([0, 1]))
    z = torch.arange(8.0).view(2, 2, 2)
    p = {"none": torch.tensor([[0.6, 0.1], [0.1, 0.6]]), "own": torch.tensor([[0.1, 0.6], [0.1, 0.6]])}
    runs = {("en", c, 1, "t"): (ask, z * (1 + (c == "own")), p[c]) for c in p}
    assert culture.contrasts(runs, "all")["en", "own", 1, "t"].shape == (2, 2, 2)
    kept = culture.contrasts(runs, "answered")["en", "own", 1, "t"]
    assert torch.equal(kept, z[:, :1].transpose(0, 1))  # the second is local without the country, too


# ------------------------------------------------------------------------------------------------------- real models


def test_split():
    assert culture.split([[1, 2, 3], [1, 2, 4, 5]]) == ([1, 2], [3, 4]) and culture.split([[1, 2], [1, 2, 3]])[1] == []


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny Llama of random weights that spells the lists."""
    lists = json.loads(culture.LISTS.read_text("utf-8"))["answers"]
    words = [w for cells in lists.values() for cell in cells.values() for a in cell.split("|") for w in a.split("/")]
    lines = [f" {w} {w}\n{w}" for w in words]
    return tiny_llama(tmp_path_factory.mktemp("llama"), lines, 4000, block_size=2048, n_layer=3, n_head=2, n_embd=16)


LOCAL = {"en": "Where do I live?", "fr": "Où ?", "tr": "Nerede?"}


def rows():
    out = []
    for task in "abcd":
        for country, own in ("us", "en"), ("fr", "fr"), ("tr", "tr"):
            for lang in dict.fromkeys(("en", own)):
                for i in range(2):
                    base = dict(task=task, country=country, lang=lang, question=LOCAL[lang])
                    base["hint"] = f"I live in {country}."
                    out.append(base | dict(local=f"{country}{i}{task}", other=f"other{i}", id=str(i)))
    return out


def write(path, rows):
    with open(path, "w", newline="") as f:
        writer = csv.DictWriter(f, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)
    return path


def small_lists(path):
    """Three cultures and four tasks of the lists, for speed."""
    data, keep = json.loads(culture.LISTS.read_text("utf-8")), ("us", "fr", "de")
    tasks = ("names", "cities", "teams", "shops")
    data["answers"] = {t: {c: data["answers"][t][c] for c in keep} for t in tasks}
    path.write_text(json.dumps(data | {"cultures": keep, "languages": ["en", "fr", "de"]}))
    return path


FAST = ["--pairs", "all", "--draws", "1", "--layers", "1", "--alphas", "1"]


def test_sentences_to_complete(folder, tmp_path):
    flags = ["--model", str(folder), "--dataset", str(small_lists(tmp_path / "lists.json")), "--out", str(tmp_path)]
    result = culture.main([*flags, *FAST])
    assert result == json.loads((tmp_path / "result.json").read_text()) and (tmp_path / "culture.png").exists()
    (r,) = result["metrics"].values()
    assert set(r["pairs"].values()) == {4 * 9} and len(r["patch"]["own"]) == 4  # tasks x (questions x sentences)
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 1


def test_two_options(folder, tmp_path):
    table = write(tmp_path / "items.csv", rows())
    result = culture.main(["--model", str(folder), "--dataset", str(table), "--out", str(tmp_path), *FAST])
    (r,) = result["metrics"].values()
    assert set(r["spoken"]) == {f"{s} {c}" for s in ("local", "en") for c in ("none", "own", "steered")}
    assert set(r["pairs"].values()) == {4 * 2 * 2}  # tasks x questions x orders


def test_prompt_of_two_options(folder):
    tok = pretrained.load(str(folder))[1]
    world = culture.Choice(tok, json.loads(culture.LISTS.read_text("utf-8")), rows())
    row = next(r for r in rows() if r["country"] == "fr" and r["lang"] == "fr")
    text = tok.decode(world.write("fr", "J'habite en France. ", row, 1, "12", "2"))
    assert text.endswith("J'habite en France. Où ?\nOptions :\n1. other0\n2. fr0a\nRéponse : 2")
    ask = world.ask("fr", "own", "a", 1)
    assert tok.decode(ask.prompts[0]).endswith("I live in fr. Où ?\nOptions :\n- fr0a\n- other0\nRéponse :")
    assert len(ask.prompts) == 4 and ask.owner.tolist() == [1, 0] and tok.decode([ask.tokens[0, 0]]).startswith(" f")


def test_built_in_questions():
    made = culture.choice_rows(json.loads(culture.LISTS.read_text("utf-8")))
    by_key = {(r["task"], r["country"], r["lang"], r["id"]): r for r in made}
    assert by_key["cities", "ru", "ru", 1]["local"] == "Санкт-Петербург" and len(by_key) == len(made)
    assert by_key["cities", "ru", "en", 1] == by_key["cities", "ru", "en", 1] | dict(
        local="Saint Petersburg", other="Los Angeles", hint="I live in Russia. "
    )


# ------------------------------------------------------------------------------------------------------------- script


def test_smoke_writes_what_is_promised(tmp_path):
    result = culture.main(["--preset", "smoke", "--out", str(tmp_path), "--seeds", "5"])
    assert result == json.loads((tmp_path / "result.json").read_text())
    assert [c["id"] for c in result["claims"]] == ["C1", "C2", "C2b", "C3", "C4", "C5", "C6", "C7"]
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert {r["run"] for r in lines} == {"skew0.7-s5", "skew0-s5"} and lines[0]["loss"] > 0
    assert (tmp_path / "culture.png").stat().st_size > 10000


@pytest.mark.parametrize(
    "flags, match",
    [
        ("--layers 9", "allowed: 0 to 1"),
        ("--alphas nan", "finite"),
        ("--alphas 0", "not 0"),
        ("--draws -1", "0 to 1000"),
        ("--skew 2", "0.1 to 1"),
        ("--dataset FILE.csv", "needs --model"),
        ("--model MODEL --dataset list.txt", "FILE.json or FILE.csv"),
        ("--model MODEL --dataset EMPTY.csv", "no rows"),
        ("--model MODEL --dataset COLUMN.csv", "no column hint"),
        ("--model MODEL --dataset CELL.csv", "line 3: no local"),
        ("--model MODEL --dataset HINT.csv", "a, fr, fr: a question has no hint"),
        ("--model MODEL --dataset LANG.csv", "'xx', allowed: en"),
        ("--model MODEL --dataset ENGLISH.csv", "a, fr, en: no questions"),
        ("--model MODEL --dataset FEW.csv", "needed: country us and two more"),
        ("--model MODEL --dataset IDS.csv", "fr: no question has the same id in en and fr"),
        ("--model /no/such/folder", "/no/such/folder"),
        ("--preset huge", "smoke"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(flags, match, folder, tmp_path, capsys):
    good = rows()
    write(tmp_path / "COLUMN.csv", [{k: v for k, v in r.items() if k != "hint"} for r in good])
    write(tmp_path / "CELL.csv", [good[0], good[1] | {"local": " "}])
    write(tmp_path / "HINT.csv", [r | {"hint": r["hint"] * (r["lang"] != "fr")} for r in good])
    write(tmp_path / "LANG.csv", [r | {"lang": "xx"} for r in good])
    write(tmp_path / "ENGLISH.csv", [r for r in good if (r["country"], r["lang"]) != ("fr", "en")])
    write(tmp_path / "FEW.csv", [r for r in good if r["country"] != "fr"])
    write(tmp_path / "IDS.csv", [{k: v for k, v in r.items() if k != "id"} for r in good])
    (tmp_path / "EMPTY.csv").write_text("task,country\n")
    flags = re.sub(r"(\w+\.csv)", rf"{tmp_path}/\1", flags).replace("MODEL", str(folder))
    with pytest.raises(SystemExit) as stop:
        culture.main(["--preset", "smoke", "--out", str(tmp_path / "out"), *flags.split()])
    error = capsys.readouterr().err.split("\r")[-1].strip().splitlines()
    assert stop.value.code == 2 and error[-1].startswith("error: ") and re.search(match, error[-1])
