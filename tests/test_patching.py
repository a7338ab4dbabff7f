"""patching.py: hand-computed values, the patches against plain forward passes, the script end to end."""

import json
import re

import numpy as np
import pytest
import torch
from stand_in import tiny_llama

import common
import patching
from model import GPT, GPTConfig

torch.set_num_threads(1)
CPU = common.Env(torch.device("cpu"), torch.float32)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny Llama of random weights that spells the built-in words."""
    words = patching.read_words(patching.CONCEPTS)
    lines = [f'{word}": "{word}" - ' for rows in words.values() for row in rows for word in row]
    shape = dict(block_size=1024, n_layer=3, n_head=2, n_embd=32)
    return tiny_llama(tmp_path_factory.mktemp("llama"), lines, 700, **shape)


# ------------------------------------------------------------------------------------------ the patches


def site(j):
    return "embed" if j < 0 else f"blocks.{j}.resid_post"


def put(column, value):
    def patch(x):
        x = x.clone()
        x[:, column] = value
        return x

    return patch


def vocabulary(model, prompts, tail, patch, z):
    """P (B, L + 1, V) of every next token."""
    every = [[{(t,)} for t in range(50)]] * len(prompts)
    return patching.patched(model, prompts, every, tail, patch, {"z": z}, 2)["z"]


@pytest.mark.parametrize("tail, patch, held", [(1, patching.swap, False), (4, patching.hold, True)])
def test_patches_equal_plain_forward_passes(tail, patch, held):
    torch.manual_seed(0)
    model = GPT(GPTConfig(50, 64, 3, 4, 32, norm="rms"))
    prompts = [torch.randint(50, (n,)).tolist() for n in (6, 9, 13)]
    z = torch.randn(4, 3, 32)
    found = vocabulary(model, prompts, tail, patch, z)
    for b, prompt in enumerate(prompts):
        for j in range(-1, 3):
            layers = range(j, 3) if held else [j]
            with model.patch({site(i): put(-tail, z[i + 1, b]) for i in layers}), torch.no_grad():
                p = model(torch.tensor([prompt])).softmax(-1)[0, -1]
            np.testing.assert_allclose(found[b, j + 1], p, atol=1e-6, rtol=1e-4)


def test_identities():
    torch.manual_seed(2)
    model = GPT(GPTConfig(50, 64, 3, 4, 32, norm="rms"))
    sources, targets = torch.randint(1, 50, (3, 8)), torch.randint(1, 50, (3, 11))
    sources[:, -1] = targets[:, -1] = 7  # both end in the opening quote
    source, target = (model(x).softmax(-1)[:, -1].detach().numpy() for x in (sources, targets))
    sources, targets = sources.tolist(), targets.tolist()
    z = patching.latents(model, sources, 2)
    swapped = vocabulary(model, targets, 1, patching.swap, z)
    held = vocabulary(model, targets, 4, patching.hold, z)
    close = dict(atol=1e-6, rtol=1e-4)
    np.testing.assert_allclose(swapped[:, 0], target, **close)  # the embedding of the same token
    np.testing.assert_allclose(swapped[:, -1], source, **close)  # after the last block: all of it
    np.testing.assert_allclose(held[:, -1], target, **close)  # nothing reads the word any more
    own = vocabulary(model, targets, 1, patching.swap, patching.latents(model, targets, 3))
    np.testing.assert_allclose(own, np.repeat(target[:, None], 4, 1), **close)
    assert abs(swapped[:, 1] - target).max() > 1e-3 and abs(held[:, 0] - target).max() > 1e-3


def test_whole_words_by_brute_force():
    torch.manual_seed(3)
    model = GPT(GPTConfig(30, 64, 2, 2, 16))
    prompts = [[1, 2, 3, 4, 5], [6, 7, 8]]
    answers = [[{(9, 10, 11), (9, 10, 12)}, {(13, 14, 15)}], [{(14, 15, 2)}, {(17, 18, 19)}]]
    z = {name: torch.randn(3, 2, 16) for name in ("a", "b")}
    found = patching.patched(model, prompts, answers, 2, patching.hold, z, 3)
    for name, latents in z.items():
        assert found[name].shape == (2, 3, 2)
        for b, prompt in enumerate(prompts):
            at = len(prompt) - 2
            for j in range(-1, 2):
                for a, words in enumerate(answers[b]):
                    expected = 0
                    for word in words:
                        idx = torch.tensor([[*prompt, *word]])
                        patches = {site(i): put(at, latents[i + 1, b]) for i in range(j, 2)}
                        with model.patch(patches), torch.no_grad():
                            logp = model(idx).log_softmax(-1)[0]
                        steps = [logp[len(prompt) - 1 + i, t] for i, t in enumerate(word)]
                        expected += sum(steps).exp().item()
                    assert found[name][b, j + 1, a] == pytest.approx(expected, rel=1e-4)


# -------------------------------------------------------------------------------- hand-computed values


class Split:
    """A tokenizer given as a table: the longest known beginning, again and again."""

    name = "split"

    def __init__(self, **ids):
        self.ids = {k.replace("_", " "): v for k, v in ids.items()} | {"x": [98], '"': [99]}
        self.text = {v[0]: k for k, v in self.ids.items() if len(v) == 1}

    def encode(self, text, bos=False):
        out = []
        while text:
            key = max((k for k in self.ids if text.startswith(k)), key=len)
            out, text = out + self.ids[key], text[len(key) :]
        return out

    def decode(self, ids):
        return "".join(self.text.get(i, "?") for i in ids)


def test_first_token_sets():
    tok = Split(chat=[1], _chat=[2], été=[10, 11], _été=[0, 10, 11], _=[0])
    world = patching.World(tok, {}, {"fr": [["chat"], ["été"], ["chat", "été"]]})
    assert world.answer("fr", 0) == {(1,), (2,)}
    assert world.answer("fr", 1) == {(10,)}  # a bare space is no answer
    assert world.answer("fr", 2) == {(1,), (2,), (10,)}


class Letters:
    """Answers of concepts as given sets, for draw_pairs."""

    def __init__(self, **sets):
        self.sets = sets

    def answer(self, code, row, first):
        return {(i,) for i in self.sets[code][row]}


def test_pairs_have_disjoint_answers():
    world = Letters(a=[(5, 7), (7, 9), (1, 1)], b=[(20,), (21,), (22,)])
    rng = np.random.default_rng(0)
    cells = [(0, "a"), (1, "a"), (0, "b")]
    s, t, answers = patching.draw_pairs(world, rng, range(3), range(3), cells, 4)
    assert {*zip(s, t)} == {(0, 2), (2, 0), (1, 2), (2, 1)}  # 0 and 1 share 7; 1 twice is once
    for source, target, found in zip(s, t, answers):
        assert found == [world.answer(c, (source, target)[i], True) for i, c in cells]
    with pytest.raises(ValueError, match="are 4 pairs of concepts .*, asked for: 5"):
        patching.draw_pairs(world, rng, range(3), range(3), cells, 5)


def test_switch_layers_of_the_papers_figure():
    rows = {
        9: (0.75, 0, 0, 0.01),
        11: (0.73, 0, 0, 0.01),
        12: (0.36, 0.2, 0, 0.01),
        13: (0.26, 0.28, 0, 0.01),
        14: (0.01, 0.62, 0.01, 0),
        15: (0, 0.52, 0.015, 0),
        16: (0, 0.175, 0.32, 0),
        17: (0, 0.01, 0.65, 0),
        18: (0, 0, 0.67, 0),
        19: (0, 0, 0.71, 0),
        20: (0, 0, 0.75, 0),
    }
    columns = [[row[i] for row in rows.values()] for i in range(4)]
    p = np.stack([np.interp(range(-1, 32), list(rows), column) for column in columns], 1)
    assert patching.switch_layers(p) == (13, 16)
    never = np.tile([1.0, 0, 0, 0], (7, 1))
    assert patching.switch_layers(never) == (6, 6)  # the number of layers


def test_measures_by_hand():
    """Two pairs, two blocks: the gain at the block where single sources do best on the mean."""
    single = np.zeros((2, 3, 2))
    single[:, :, 0] = [[0.9, 0.2, 0.0], [0.9, 0.4, 0.0]]  # the embedding doesn't count
    single[:, :, 1] = 0.5
    mean = single.copy()
    mean[:, 1, 0] = [0.4, 0.6]
    translate = {"single 1": single, "single 2": single, "mean": mean}
    last = np.zeros((3, 4))
    last[:, 0], last[1, 1], last[2, 2] = (1, 0, 0), 1, 1
    curves = {"last": {"source": last}, "define": {}}
    curves["translate"] = {name: p.mean(0) for name, p in translate.items()}
    rows = patching.measures(curves, translate)
    assert rows["source"] == {"mixed": 1, "language": 0, "concept": 1}
    assert rows["base"]["p"] == 0.5 and rows["one source"]["p"] == pytest.approx(0.3)
    assert rows["mean"]["gain"] == pytest.approx(0.2) and rows["mean"]["p"] == pytest.approx(0.5)
    assert rows["single 1"]["gain"] == pytest.approx(0) and "no patch" not in rows


def test_prompts():
    words = {"fr": [["eau"], ["chat"]], "en": [["water"], ["cat"]]}
    world = patching.World(None, patching.LABELS, words)
    rng = np.random.default_rng(0)
    (head,) = world.texts(rng, ("fr", "en"), [1], 1)
    assert head == 'Français: "eau" - English: "water"\nFrançais: "chat'
    assert head + world.ask(("fr", "en")) == (
        'Français: "eau" - English: "water"\nFrançais: "chat" - English: "'
    )


def test_column_of_the_word(folder):
    world = patching.make_toy(0)
    head = world.query(("b", "d"), 3)
    ids, tail = world.ids([head, "B: " + head], world.ask(("b", "d")))
    assert tail == 4  # the word's last syllable, its closing quote, the label, the opening quote
    assert ids[0][-4] == world.tok.encode(world.words["b"][3][0])[-1]
    merging = patching.World(Split(**{'chat"': [3], "chat": [1], " - ": [4]}), {}, {})
    with pytest.raises(ValueError, match="merges the end of 'chat'"):
        merging.ids(["chat"], '" - ')


# ----------------------------------------------------------------------------------------------- the toy


def test_documents_never_hold_what_is_held_out():
    world = patching.make_toy(3)
    names = {i: name for name, i in world.tok.number.items()}
    rng, seen = np.random.default_rng(0), set()
    for _ in range(2000):
        ids, counts = patching.document(world, rng)
        assert len(ids) == len(counts) and ids[0] == 1
        text = "".join(names[i] for i in ids[1:])
        for a, word, mark, b, said in re.findall(r'(\w): "(\w+)" (.) (\w): "([^"]+)"', text):
            seen.add((a.lower(), word, mark, b.lower(), said))
    expected = {False: set(), True: set()}
    for a in patching.TOY:
        for b in patching.TOY:
            for row in range(patching.TOY_WORDS):
                held = row in world.held.get((a, b), ())
                for mark, define in ("-", False), ("=", True):
                    said = world.said(b, row, define).replace(" ", "")
                    expected[held].add((a, world.words[a][row][0], mark, b, said))
    assert not seen & expected[True] and seen <= expected[False]
    assert len([x for x in seen if x[2] == "-"]) > 0.7 * len(expected[False]) / 2
    shares = [len(rows) / patching.TOY_WORDS for rows in world.held.values()]
    assert 0.2 < min(shares) and max(shares) < 0.3
    for row in range(patching.TOY_WORDS):  # most of the ways into and out of every word are trained
        for code in patching.TOY:
            into = [pair for pair, rows in world.held.items() if row in rows and pair[1] == code]
            assert len(into) <= 3


def test_every_toy_has_enough_pairs():
    quads = patching.parse_quads(patching.TOY_QUADS, patching.TOY)
    for seed in range(20):
        world = patching.make_toy(seed)
        for source, target in quads.values():
            cells = [(1, target[1]), (1, source[1]), (0, source[1]), (0, target[1])]
            rows = world.tested(source), world.tested(target)
            with pytest.raises(ValueError) as found:
                patching.draw_pairs(world, np.random.default_rng(0), *rows, cells, 10**6)
            n = int(re.search(r"there are (\d+) pairs", str(found.value))[1])
            assert n >= 1.5 * patching.Args().pairs


def test_no_syllable_names_a_word():
    world = patching.make_toy(1)
    for words in world.words.values():
        pieces = [world.tok.encode(word) for (word,) in words]
        assert len({tuple(ids) for ids in pieces}) == patching.TOY_WORDS
        for place, many in (0, 5), (1, 6):
            used = [ids[place] for ids in pieces]
            assert {used.count(i) for i in used} == {many}
    assert len({*world.facts}) == patching.TOY_WORDS


def test_loss_is_on_answers_only():
    world = patching.make_toy(0)
    names = {i: name for name, i in world.tok.number.items()}
    rng = np.random.default_rng(1)
    for _ in range(50):
        ids, counts = patching.document(world, rng)
        counted = " ".join(names[i] for i, count in zip(ids, counts) if count)
        assert re.fullmatch(r'([a-z]{2} [a-z]{2} "\n ?|x\d.\w y\d.\w z\d.\w "\n ?)+', counted)


def test_batch_depends_on_the_step_alone():
    args, world = patching.Args(), patching.make_toy(0)
    a, b = (patching.batch(world, 3, 0, args, CPU) for _ in range(2))
    other = patching.batch(world, 4, 0, args, CPU)
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert not torch.equal(a["idx"][:, :30], other["idx"][:, :30])
    halves = []
    for rank in 0, 1:
        env = common.Env(CPU.device, CPU.dtype, rank, 2)
        halves.append(patching.batch(world, 3, 0, args, env)["idx"])
    assert torch.equal(torch.stack(halves, 1).flatten(0, 1), a["idx"])


def test_words():
    words = patching.read_words(patching.CONCEPTS)
    assert len(words) == 9 and all(len(rows) == 120 for rows in words.values())
    assert all(len({word for (word,) in rows}) == 120 for rows in words.values())


# -------------------------------------------------------------------------------------------- the script


def test_smoke_writes_what_is_promised(tmp_path):
    flags = ["--preset", "smoke", "--out", str(tmp_path), "--seeds", "3"]
    result = patching.main(flags)
    assert result == json.loads((tmp_path / "result.json").read_text())
    assert [c["id"] for c in result["claims"]] == ["T1", "T2", "T3", "T4"]
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert {row["run"] for row in rows} == {"toy-s3"} and rows[0]["loss"] > 0
    assert [row["layer"] for row in rows if "layer" in row] == [-1, 0, 1, 2]
    assert (tmp_path / "patching.png").stat().st_size > 10000
    again = patching.main([*flags, "--resume"])  # trained already: measures again
    assert again["claims"] == result["claims"]


def write(tmp_path, text):
    path = tmp_path / "words.csv"
    path.write_text(text, "utf-8-sig")  # as Excel saves it
    return str(path)


def test_real_model_with_own_words(folder, tmp_path):
    header = "en,de,fr,es\n"
    rows = []
    for i in range(8):
        a, b, c, d = (chr(start + i) * 3 for start in (97, 105, 113, 65))
        rows.append(f'{a},"{b}|{b}\nx",{c},{d}\n')  # a line break in a cell is a space
    words = write(tmp_path, header + "".join(rows))
    assert patching.read_words(words)["de"][0] == ["iii", "iii x"]
    flags = ["--model", str(folder), "--words", words, "--out", str(tmp_path)]
    flags += "--pairs 4 --k 2 --shots 2 --prompts 4 --quads en-de:fr-es".split()
    result = patching.main(flags)
    assert [c["id"] for c in result["claims"]] == ["T1", "T2", "T3"]
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 4


@pytest.mark.parametrize(
    "flags, match",
    [
        ("--pairs 1", "--pairs.* 2"),
        ("--shots 99", "50"),
        ("--k 0", "--k"),
        ("--k 8", "allowed: 1 to 7"),
        ("--quads de-it", "four different languages, as de-it:fr-es, of b, d"),
        ("--quads b-d:f-d", "four different languages"),
        ("--quads b-d:f-x", "of b, d, f, g"),
        ("--words WORDS", "--words: no effect without --model"),
        ("--model MODEL --steps 7", "--steps: no effect with --model"),
        ("--model /no/such/model", "/no/such/model"),
        ("--model MODEL --words /no/such.csv", "/no/such.csv"),
        ("--model MODEL --words EMPTY_CELL", "row 2: a word is missing in column 'fr'"),
        ("--model MODEL --words UNKNOWN", "languages .'xx'., allowed: en, "),
        ("--model MODEL --words FEW", "3 words, needed: more than --shots 5"),
        (
            "--model MODEL --quads fr-en:es-de --pairs 20000",
            "fr-en:es-de: there are .* asked for: 20000",
        ),
        ("--shots 22", "22 words, needed: more than --shots 22"),
        ("--pairs 31", "--pairs, allowed: 2 to 30 in the toy"),
        ("--k 8", "--k 8, allowed: 1 to 7"),
        ("--model MODEL --words SIX --quads fr-en:es-de", "--k 5, allowed: 1 to 4"),
        ("--n-embd 30", "multiples of 8"),
        ("--local 9", "0 to 3"),
        ("--device toaster", "toaster"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(flags, match, folder, tmp_path, capsys):
    files = {
        "WORDS": "en,fr\na,b\n",
        "EMPTY_CELL": 'en,fr\na,b\nc,""\n',
        "UNKNOWN": "en,xx\na,b\n",
        "FEW": "en,fr,de,es\n" + "a,b,c,d\n" * 3,
        "SIX": "en,fr,de,es,it,nl,pt\n" + "a,b,c,d,e,f,g\n" * 6,
    }
    for name, text in files.items():
        if f"--words {name}" in flags:
            flags = flags.replace(f"--words {name}", f"--words {write(tmp_path, text)}")
    preset = [] if "--model" in flags else ["--preset", "smoke"]
    flags = flags.replace("MODEL", str(folder)).split()
    with pytest.raises(SystemExit) as stop:
        patching.main([*preset, "--out", str(tmp_path / "out"), *flags])
    errors = re.findall("error: .*", capsys.readouterr().err)
    assert stop.value.code == 2 and len(errors) == 1
    assert re.search(match, errors[0]), errors[0]
    assert not (tmp_path / "out" / "result.json").exists()
