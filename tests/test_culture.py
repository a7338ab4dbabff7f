"""culture.py: hand-computed values, steering against plain forward passes, the script end to end."""

import json
import math
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from stand_in import tiny_llama

import common
import culture
from model import GPT, GPTConfig

torch.set_num_threads(1)
CPU = common.Env(torch.device("cpu"), torch.float32)

# ------------------------------------------------------------------------------------------- by hand


def test_differences(monkeypatch):
    """Of two sentences in front of two questions, by hand; every pair counts alike."""
    told = {"a": [[[5.0], [7], [6], [9]]], "b": [[[1.0]]]}  # sentence 1: questions 1, 2; sentence 2
    plain = {"a": [[[1.0], [2]]], "b": [[[0.0]]]}
    latents = {"none": plain, "own": told, "neutral": told}
    world = SimpleNamespace(cultures="xyz", tasks=["a", "b"], answers={"a": [0], "b": [0]})
    world.prompts = lambda setting, context, k, task: torch.tensor(latents[context][task]) * k
    monkeypatch.setattr(culture, "ask", lambda model, z, tokens: (z, None))
    _, diffs = culture.collect(None, world)
    assert diffs["local", "own", 1, "a"].tolist() == [[[4], [5], [5], [7]]]
    v = culture.vectors(diffs, "local", 1, ["a"], np.random.default_rng(0))
    assert v["own"].tolist() == [[5.25]] and v["wrong"].tolist() == [[10.5]]
    v = culture.vectors(diffs, "local", 1, ["a", "b"], np.random.default_rng(0))
    assert v["own"].item() == pytest.approx(4.4)  # (4 + 5 + 5 + 7 + 1) / 5, no mean of means


def test_shuffled_labels_are_balanced():
    same = torch.ones(2, 6, 3)
    assert culture.shuffled(same, np.random.default_rng(0)).abs().max() == 0
    one = torch.eye(4)[None]
    draws = [culture.shuffled(one, np.random.default_rng(i)) for i in range(400)]
    assert torch.stack(draws).mean(0).abs().max() < 0.05
    assert culture.shuffled(torch.ones(1, 1, 3), np.random.default_rng(0)).tolist() == [[0] * 3]


def test_masses_and_entropy_by_hand():
    p, owner = torch.tensor([0.1, 0.2, 0.3, 0.05, 0.15]), torch.tensor([0, 0, 1, 1, 2])
    assert culture.masses(p, owner, 3) == pytest.approx([0.3, 0.35, 0.15])
    q = 6 / 7, 1 / 7
    expected = -sum(x * math.log2(x) for x in q)
    assert culture.entropy(p, owner, 1) == pytest.approx(expected, abs=1e-6)
    half = torch.tensor([0.2, 0.3, 0.3])
    assert culture.entropy(half, torch.tensor([0, 1, 1]), 1) == pytest.approx(1, abs=1e-6)


def test_pick_takes_the_smallest_strength_that_reaches():
    strengths = np.array([1, 2, 1, 2])  # two blocks, two strengths
    local = np.array([[0.5, 0.9, 0.6, 0.2], [0.5, 0.9, 0.6, 0.2], [0.0, 1.0, 0.0, 0.0]])
    # The last task is judged by the first two: strength 1 reaches .5 in both blocks, .6 is better.
    # The others are judged by one good task and the last: only (0, 2) reaches.
    assert culture.pick(local, np.full(3, 0.5), strengths) == [1, 1, 2]
    assert culture.pick(local, np.full(3, 2.0), strengths) == [1, 1, 1]  # never: the best of all


def test_measures_by_hand():
    none = np.array([[0.6, 0.1, 0.1], [0.6, 0.1, 0.1]])  # two cultures, one task, three owners
    own = np.array([[0.1, 0.5, 0.1], [0.1, 0.1, 0.5]])
    half = np.array([[0.3, 0.3, 0.1], [0.3, 0.3, 0.2]])
    said = {"local prompt none": none, "local prompt own": own, "local own": half}
    rows = culture.measures(said)
    assert rows["local prompt own"]["local_rise"] == pytest.approx(0.4)
    assert rows["local own"]["local"] == pytest.approx(0.25)
    assert rows["local own"]["closed"] == pytest.approx(0.15 / 0.4)
    assert rows["local own"]["theirs_rise"] == pytest.approx(0.1)
    assert rows["local own"]["others_rise"] == pytest.approx(0.1)


def fake():
    rng = torch.Generator().manual_seed(0)
    diffs = {}
    for setting in culture.SETTINGS:
        for context in "neutral", "own":
            for k in 1, 2, 3:
                for task in "abc":
                    diffs[setting, context, k, task] = torch.randn(2, 3, 5, generator=rng)
    return diffs


def test_vectors():
    diffs = fake()
    v = culture.vectors(diffs, "local", 2, ["a", "b"], np.random.default_rng(0))

    def mean(setting, context, *cultures):
        parts = [diffs[setting, context, k, task] for k in cultures for task in "ab"]
        return torch.cat(parts, 1).mean(1)

    torch.testing.assert_close(v["own"], mean("local", "own", 2))
    torch.testing.assert_close(v["cross"], mean("english", "own", 2))
    torch.testing.assert_close(v["universal"], mean("local", "own", 1, 3))
    torch.testing.assert_close(v["wrong"], mean("local", "own", 3))
    torch.testing.assert_close(v["minus"], -v["own"])
    torch.testing.assert_close(v["neutral"], mean("local", "neutral", 2))
    torch.testing.assert_close(v["cross neutral"], mean("english", "neutral", 2))
    last = culture.vectors(diffs, "local", 3, ["a", "b"], np.random.default_rng(0))
    torch.testing.assert_close(last["wrong"], mean("local", "own", 1))  # the first is next


# ------------------------------------------------------------------- one pass against the plain loop


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return GPT(GPTConfig(50, 64, 3, 2, 16, norm="rms", gated=True, n_kv_head=1)).eval()


def some_prompts(n=5):
    rng = np.random.default_rng(1)
    return [rng.integers(1, 50, rng.integers(2, 9)).tolist() for _ in range(n)]


def plain(model, ids, layer, v):
    def patch(x):
        return torch.cat((x[:, :-1], x[:, -1:] + v), 1)

    with torch.no_grad(), model.patch({f"blocks.{layer}.resid_post": patch}):
        return model(torch.tensor([ids]))[0, -1].softmax(-1)


def steered(model, prompts, tokens, tries):
    world = SimpleNamespace(prompts=lambda *key: prompts, answers={"names": (tokens, None)})
    with torch.no_grad():
        return culture.steered(model, world, "english", 1, "names", tries)


def test_grid_of_one_pass_equals_the_loop(model):
    prompts, tokens = some_prompts(), torch.arange(10)
    v = torch.randn(4, 16)
    cells = [(layer, strength) for layer in (0, 2) for strength in (-1.0, 0.5, 2.0)]
    tries = [culture.add(v, *cell) for cell in cells]
    got = steered(model, prompts, tokens, tries)
    for i, (layer, strength) in enumerate(cells):
        each = [plain(model, ids, layer, strength * v[layer + 1])[:10] for ids in prompts]
        torch.testing.assert_close(got[i], torch.stack(each).mean(0), atol=1e-5, rtol=1e-4)


def test_strength_nothing_and_the_last_block(model):
    prompts, tokens, v = some_prompts(), torch.arange(10), torch.randn(4, 16)
    with torch.no_grad():
        z, clean = culture.ask(model, prompts, tokens)
    assert z.shape == (4, 5, 16)
    tries = [culture.add(v, 1, 0), culture.add(v, 2, 1)]
    got = steered(model, prompts, tokens, tries)
    torch.testing.assert_close(got[0], clean.mean(0), atol=1e-6, rtol=1e-5)
    with torch.no_grad():  # after the last block: norm and unembedding of the sum
        expected = model.unembed(model.final(z[3] + v[3])).softmax(-1)[:, :10]
    torch.testing.assert_close(got[1], expected.mean(0), atol=1e-6, rtol=1e-5)


# ------------------------------------------------------------------------------------------- the toy


@pytest.fixture(scope="module")
def toy():
    return culture.Toy(3, 0.7)


def test_documents(toy):
    """One culture answers a whole document; its answers are as stereotyped as they should be."""
    rng, words = np.random.default_rng(0), {i: word for word, i in toy.number.items()}
    local, ranks = [], {"own": [], "none": []}
    for _ in range(4000):
        text = " ".join(words[i] for i in toy.document(rng))
        language = re.search(r"\?\.(\w\w)", text)[1]
        said = re.findall(r":([a-z]{2})(\d)", text)
        owners = {owner for owner, _ in said}
        assert len(owners) <= 1 and text.count(":") == culture.SHOTS
        country = re.search(r"(?:live|am_from|grew_up_in)\.\w\w (\w\w)\.", text)
        if country:
            pair = culture.LANGUAGES.index(language), culture.CULTURES.index(country[1])
            assert owners <= {country[1]} and pair in toy.told
        elif language != "en" and owners:
            local.append(owners != {"us"})
        ranks["own" if country else "none"] += [int(rank) for _, rank in said]
    assert np.mean(local) == pytest.approx(0.3, abs=0.04)
    for context, entropy in ("none", 2.512), ("own", 1.537):
        p = np.bincount(ranks[context]) / len(ranks[context])
        assert -(p * np.log2(p)).sum() == pytest.approx(entropy, abs=0.03)
    assert len({*toy.told}) == 4 + 5 + 8  # one's own, any in English, half of the others


def test_prompts(toy):
    words = {i: word for word, i in toy.number.items()}
    prompts = toy.prompts("local", "own", 2, "cities")
    assert len(prompts) == 3
    text = " ".join(words[i] for i in prompts[0])
    assert text == "<bos> I.fr live.fr fr.fr ;.fr cities.fr ?.fr"
    english = toy.prompts("english", "none", 2, "cities")
    assert [[words[i] for i in ids] for ids in english] == [["<bos>", "cities.en", "?.en"]]
    tokens, owner = toy.answers["cities"]
    assert words[tokens[12].item()] == "cities:fr0" and owner[12] == 2
    assert [words[i] for i in tokens.tolist()] == [
        f"cities:{culture}{rank}" for culture in ("us", "tr", "fr", "ru", "de") for rank in range(6)
    ]


def test_batch_depends_on_the_step_alone(toy):
    args = culture.Args()
    a, b = (toy.batch(3, args, CPU) for _ in range(2))
    assert all(torch.equal(a[key], b[key]) for key in a)
    assert not torch.equal(a["idx"], toy.batch(4, args, CPU)["idx"])
    counted = a["targets"][a["weights"] > 0]
    words = {i: word for word, i in toy.number.items()}
    assert all(":" in words[i] for i in counted.tolist()) and len(counted) == 6 * 32
    halves = []
    for rank in 0, 1:
        halves.append(toy.batch(3, args, common.Env(CPU.device, CPU.dtype, rank, 2))["idx"])
    assert torch.equal(torch.stack(halves, 1).flatten(0, 1), a["idx"])


# --------------------------------------------------------------------------------------- real models


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny Llama of random weights that spells the lists."""
    lists = json.loads(culture.LISTS.read_text())["answers"]
    cells = [cell for answers in lists.values() for cell in answers.values()]
    words = [word for cell in cells for word in cell.replace("/", "|").split("|")]
    lines = [f" {word} {word}\n{word}" for word in words]
    shape = dict(block_size=2048, n_layer=3, n_head=2, n_embd=16)
    return tiny_llama(tmp_path_factory.mktemp("llama"), lines, 4000, **shape)


def small_lists(path, **changed):
    """Three cultures and four tasks of the lists, for speed."""
    lists = json.loads(culture.LISTS.read_text())
    kept, tasks = ("us", "fr", "de"), ("names", "cities", "teams", "shops")
    answers = {t: {c: lists["answers"][t][c] for c in kept} for t in tasks}
    lists |= dict(answers=answers, cultures=kept, languages=["en", "fr", "de"]) | changed
    path.write_text(json.dumps(lists), "utf-8-sig")
    return str(path)


def test_sentences_to_complete(folder, tmp_path):
    lists = small_lists(tmp_path / "lists.json")
    flags = ["--model", str(folder), "--lists", lists, "--out", str(tmp_path)]
    result = culture.main([*flags, "--layers", "1", "2", "--strengths", "1"])
    assert result == json.loads((tmp_path / "result.json").read_text())
    assert [c["id"] for c in result["claims"]] == ["C1", "C2", "C2b", "C3", "C6"]
    assert (tmp_path / "culture.png").exists()
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["layer"] for row in rows] == [1, 2]
    (found,) = result["metrics"][folder.name]
    assert set(found["picked"]) == {"fr", "de"} and found["kl"] >= 0


class Pieces:
    """A SentencePiece-like tokenizer: a bare space first, as Llama 2's and Mistral's has it."""

    name = "pieces"

    def __init__(self, words):
        self.ids = {word: 10 + i for i, word in enumerate(words)}

    def encode(self, text, bos=False):
        out = []
        for part in re.findall(r" |[^ ]+", text):
            if part != " " and part not in self.ids:
                self.ids[part] = 10 + len(self.ids)
            out.append(3 if part == " " else self.ids[part])
        return out

    def decode(self, ids):
        names = {i: word for word, i in self.ids.items()} | {3: " "}
        return "".join(names[i] for i in ids)


def lists_of(**answers):
    """Three cultures, three tasks; the answers to the first of them."""
    lists = json.loads(culture.LISTS.read_text())
    every = {"names": answers, "cities": dict(us="Boston", fr="Paris", de="Berlin")}
    every["shops"] = dict(us="Target", fr="Carrefour", de="Aldi")
    return lists | dict(answers=every, cultures=["us", "fr", "de"], languages=["en", "fr", "de"])


def test_first_tokens():
    lists = lists_of(us="Liam|Noah/Noa", fr="Louis|Liam", de="Hans|Jo")
    world = culture.Real(Pieces(["x"]), lists)
    tokens, owner = world.answers["names"]
    said = {world.tok.decode([t]): k for t, k in zip(tokens.tolist(), owner.tolist())}
    assert said == {"Noah": 0, "Noa": 0, "Louis": 1, "Hans": 2}  # no Liam, no bare space, no Jo
    lists["answers"]["names"]["fr"] = "Liam"
    with pytest.raises(ValueError, match="names, fr: no answer has a first token of its own"):
        culture.Real(Pieces(["x"]), lists)


def test_prompts_of_real_models():
    world = culture.Real(Pieces(["x"]), lists_of(us="Liam", fr="Louis", de="Hans"))

    def texts(*key):
        return [world.tok.decode(ids) for ids in world.prompts(*key)]

    none = texts("english", "none", 1, "cities")[0].strip()
    own = texts("english", "own", 1, "cities")
    assert own[0] == f"I live in France. {none}"
    assert any(
        text.startswith("J'habite en France. ") for text in texts("local", "own", 1, "shops")
    )


def test_built_in_lists_are_whole():
    lists = json.loads(culture.LISTS.read_text())
    assert len(lists["cultures"]) == 9 and len(lists["answers"]) == 9


# ------------------------------------------------------------------------------------------- script


def test_smoke_writes_what_is_promised(tmp_path):
    result = culture.main(["--preset", "smoke", "--out", str(tmp_path), "--seeds", "5"])
    assert result == json.loads((tmp_path / "result.json").read_text())
    assert [c["id"] for c in result["claims"]] == ["C1", "C2", "C2b", "C3", "C5", "C6"]
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert {line["run"] for line in lines} == {"toy-s5"} and lines[0]["loss"] > 0
    assert (tmp_path / "culture.png").stat().st_size > 10000


@pytest.mark.parametrize(
    "flags, match",
    [
        ("--layers 9", "allowed: 0 to 1"),
        ("--strengths nan", "--strengths"),
        ("--strengths 0", "--strengths"),
        ("--skew 2", "0.1 to 0.9"),
        ("--lists FILE.json", "--lists: no effect without --model"),
        ("--model MODEL --skew .5", "--skew: no effect with --model"),
        ("--model MODEL --lists LIST.json", "not of the form of cultures.json"),
        ("--model MODEL --lists BROKEN.json", "--lists: Expecting value"),
        ("--model MODEL --lists KEY.json", "not of the form of cultures.json"),
        ("--model MODEL --lists CELL.json", "KeyError.'de'"),
        ("--model MODEL --lists FEW.json", "needed: three cultures, three tasks, a fact"),
        ("--model MODEL --lists FACTLESS.json", "a fact, one text in `none`"),
        ("--model MODEL --lists SEVERAL.json", "a fact, one text in `none`"),
        ("--model MODEL --lists /no/such.json", "/no/such.json"),
        ("--model /no/such/folder", "/no/such/folder"),
        ("--preset huge", "smoke"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(flags, match, folder, tmp_path, capsys):
    (tmp_path / "LIST.json").write_text("[1]")
    (tmp_path / "BROKEN.json").write_text('{"a": ')
    small_lists(tmp_path / "KEY.json", hints=None)
    small_lists(tmp_path / "FEW.json", cultures=["us", "fr"], languages=["en", "fr"])
    small_lists(tmp_path / "FACTLESS.json", facts=[])
    hints = json.loads(culture.LISTS.read_text("utf-8"))["hints"]
    hints["fr"]["none"] = "|Bon. "
    small_lists(tmp_path / "SEVERAL.json", hints=hints)
    small_lists(tmp_path / "CELL.json")
    lists = json.loads((tmp_path / "CELL.json").read_text("utf-8-sig"))
    del lists["answers"]["names"]["de"]
    (tmp_path / "CELL.json").write_text(json.dumps(lists))
    preset = [] if "--model" in flags or "--preset" in flags else ["--preset", "smoke"]
    flags = re.sub(r"([A-Z]+\.json)", rf"{tmp_path}/\1", flags).replace("MODEL", str(folder))
    with pytest.raises(SystemExit) as stop:
        culture.main([*preset, "--out", str(tmp_path / "out"), *flags.split()])
    errors = re.findall("error: .*", capsys.readouterr().err)
    assert stop.value.code == 2 and len(errors) == 1
    assert re.search(match, errors[0]), errors[0]
    assert not (tmp_path / "out" / "result.json").exists()
