"""Concepts and languages patched apart: hand-computed values, the sweep against the plain loop, the script."""

import json
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from stand_in import tiny_llama

import legacy as common
import patching
from model import GPT, GPTConfig


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny Llama of random weights that spells the built-in words."""
    table = patching.read_words(patching.CONCEPTS)
    lines = (f'{w}": "{w}" - ' for rows in table.values() for row in rows for w in row)
    return tiny_llama(tmp_path_factory.mktemp("llama"), lines, 700, block_size=1024, n_layer=3, n_head=2, n_embd=32)


def test_real_path(folder, tmp_path):
    flags = ["--pairs", "6", "--prompts", "4", "--k", "2", "--shots", "2", "--quads", "fr-en:es-fr", "de-it:fr-es"]
    result = patching.main(["--model", str(folder), "--out", str(tmp_path), *flags])
    assert result == json.loads((tmp_path / "result.json").read_text())


# ------------------------------------------------------------------------------------------------- the one-pass sweep

FAMILIES = {
    "gpt2": dict(learned_pos=True),
    "llama": dict(norm="rms", gated=True, n_kv_head=2),
    "gemma": dict(norm="rms", post_norm=True, qk_norm=True, windows=[5, 0, 5], rope_base_local=1e3, attn_softcap=5.0),
}


def site(j):
    return "embed" if j < 0 else f"blocks.{j}.resid_post"


def put(column, value):
    def patch(x):
        x = x.clone()
        x[:, column] = value
        return x

    return patch


def plain_loop(model, idx, mask, z, rho, hold):
    """A full forward pass for every layer: what the sweep has to equal. (B, L + 1, -rho, C)"""
    out, L = [], model.config.n_layer
    for j in range(-1, L):
        later = range(j, L) if hold else [j]
        with model.patch({site(i): put(rho, z[i + 1]) for i in later}), torch.no_grad():
            out.append(model.hidden(idx, mask)[:, rho:])
    return torch.stack(out, 1)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("batch", [1, 7])
def test_sweep_equals_the_plain_loop(family, batch):
    torch.manual_seed(0)
    model = GPT(GPTConfig(50, 64, 3, 4, 32, **FAMILIES[family]))
    prompts = [torch.randint(50, (n,)).tolist() for n in torch.randint(6, 20, (batch,)).tolist()]
    idx, mask = common.padded(prompts, "cpu")
    z = torch.randn(4, batch, 32)
    for rho in -1, -4:
        for hold, step in (False, patching.swap(z[:, :, None])), (True, patching.hold(z[:, :, None])):
            fast = common.sweep(model, idx, step, -rho, mask)
            torch.testing.assert_close(fast, plain_loop(model, idx, mask, z, rho, hold), atol=1e-5, rtol=1e-5)
            for b in 0, batch - 1:  # a batch of different lengths is each prompt alone
                one = {k: v for k, v in (("swap", patching.swap), ("hold", patching.hold))}["hold" if hold else "swap"]
                alone = common.sweep(model, torch.tensor([prompts[b]]), one(z[:, b : b + 1, None]), -rho)
                torch.testing.assert_close(fast[b : b + 1], alone, atol=1e-5, rtol=1e-5)


def test_sweep_of_several_sources_few_layers_and_steering():
    torch.manual_seed(1)
    model = GPT(GPTConfig(50, 64, 3, 4, 32))
    idx, z = torch.randint(50, (2, 9)), torch.randn(4, 2, 3, 32)
    several = common.sweep(model, idx, patching.swap(z)).unflatten(1, (4, 3))
    one = common.sweep(model, idx, patching.swap(z[:, :, 1:2]))
    torch.testing.assert_close(several[:, :, 1], one)
    held = common.sweep(model, idx, patching.hold(z[:, :, :1], most=1), 4)  # one layer only: a swap
    torch.testing.assert_close(held, common.sweep(model, idx, patching.swap(z[:, :, :1]), 4))
    held = common.sweep(model, idx, patching.hold(z, most=2), 4).unflatten(1, (4, 3))[:, 1, 2]
    with model.patch({site(j): put(-4, z[j + 1, :, 2]) for j in (0, 1)}), torch.no_grad():
        torch.testing.assert_close(held, model.hidden(idx)[:, -4:], atol=1e-5, rtol=1e-5)
    v, strengths = torch.randn(32), torch.tensor([-1.0, 0.0, 2.0])

    def steer(j, x, clean):
        return torch.cat((x, clean[:, None] + (strengths[:, None] * v)[None, :, None]), 1) if j >= 1 else x

    grid = common.sweep(model, idx, steer).unflatten(1, (2, 3))
    for i, j in enumerate((1, 2)):
        for k, a in enumerate(strengths):
            with model.patch({site(j): lambda x, a=a: torch.cat((x[:, :-1], x[:, -1:] + a * v), 1)}), torch.no_grad():
                torch.testing.assert_close(grid[:, i, k], model.hidden(idx)[:, -1:], atol=1e-5, rtol=1e-5)
    for tail in 0, 9:
        with pytest.raises(ValueError, match="allowed: 1 to 8"):
            common.sweep(model, idx, steer, tail)


def test_identities():
    torch.manual_seed(2)
    model = GPT(GPTConfig(50, 64, 3, 4, 32, norm="rms"))
    sources, targets = torch.randint(1, 50, (3, 8)), torch.randint(1, 50, (3, 11))
    sources[:, -1] = targets[:, -1] = 7  # both end in the opening quote
    source, target = (model(x).softmax(-1)[:, -1].detach() for x in (sources, targets))
    every = [[[(t,)] for t in range(50)]] * 3
    p = lambda z, rho, patch: patching.probabilities(model, targets.tolist(), every, rho, z[:, :, None], patch, 2)[
        :, :, 0
    ]
    z = patching.latents(model, sources.tolist(), 2)
    swapped, held = p(z, -1, patching.swap), p(z, -4, patching.hold)
    torch.testing.assert_close(swapped[:, 0], target)  # the embedding of the same last token
    torch.testing.assert_close(swapped[:, -1], source)  # after the last block: all the source's
    torch.testing.assert_close(held[:, -1], target)  # after the last block nothing reads the word any more
    own = p(patching.latents(model, targets.tolist(), 3), -1, patching.swap)
    torch.testing.assert_close(own, target[:, None].expand_as(own))
    assert not torch.allclose(swapped[:, 1], target) and not torch.allclose(held[:, 0], target)


def test_whole_words_by_brute_force():
    torch.manual_seed(3)
    model = GPT(GPTConfig(30, 64, 2, 2, 16))
    prompts = [[1, 2, 3, 4, 5], [6, 7, 8]]
    answers = [[[(9, 10, 11), (9, 12)], [(13,)]], [[(14, 15)], [(16,), (17, 18, 19)]]]
    z = torch.randn(3, 2, 1, 16)
    found = patching.probabilities(model, prompts, answers, -2, z, patching.hold, 3)
    assert found.shape == (2, 3, 1, 2)
    for b, prompt in enumerate(prompts):
        for j in range(-1, 2):
            for a, words in enumerate(answers[b]):
                expected = 0
                for word in words:
                    idx = torch.tensor([[*prompt, *word]])
                    at = len(prompt) - 2
                    with model.patch({site(i): put(at, z[i + 1, b, 0]) for i in range(j, 2)}):
                        logp = model(idx).log_softmax(-1)[0]
                    expected += sum(logp[len(prompt) - 1 + i, t] for i, t in enumerate(word)).exp().item()
                assert found[b, j + 1, 0, a].item() == pytest.approx(expected, rel=1e-4)


# ------------------------------------------------------------------------------------------------- hand-computed values


class Split:
    """A tokenizer given as a table: the longest known beginning, again and again."""

    def __init__(self, **ids):
        self.ids = {k.replace("_", " "): v for k, v in ids.items()} | {'"': [99]}
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
    world = patching.World(tok, {"fr": [["chat"], ["été"], ["chat", "été"]]}, False)
    assert world.answer("fr", 0) == {(1,), (2,)} and world.answer("fr", 1) == {(10,)}
    assert world.answer("fr", 2) == {(1,), (2,), (10,)} and world.answer("fr", 1, whole=True) == {(10, 11)}


def test_disjoint():
    one = lambda *ids: {(i,) for i in ids}
    assert not patching.disjoint([one(5, 7), one(7, 9), one(1), one(2)])
    assert patching.disjoint([one(5, 5), one(7), one(1), one(2)])  # twice in one set is once
    assert not patching.disjoint([{(1, 2)}, {(1, 2, 3)}]) and patching.disjoint([{(1, 2)}, {(1, 3)}])


def test_band_and_bootstrap():
    mean, half = patching.band([0, 1, 1, 1])
    assert mean == 0.75 and half == pytest.approx(0.49)
    assert patching.bootstrap(lambda rows: np.ones(4)[rows].mean(), 4, draws=50).tolist() == [1, 1]


def test_switch_layers_of_the_papers_figure():
    rows = {9: (0.75, 0, 0, 0.01), 11: (0.73, 0, 0, 0.01), 12: (0.36, 0.2, 0, 0.01), 13: (0.26, 0.28, 0, 0.01)}
    rows |= {14: (0.01, 0.62, 0.01, 0), 15: (0, 0.52, 0.015, 0), 16: (0, 0.175, 0.32, 0), 17: (0, 0.01, 0.65, 0)}
    rows |= {18: (0, 0, 0.67, 0), 19: (0, 0, 0.71, 0), 20: (0, 0, 0.75, 0)}
    p = np.stack([np.interp(range(-1, 32), list(rows), [r[i] for r in rows.values()]) for i in range(4)], 1)
    assert patching.switch_layers(p) == (13, 16)
    assert patching.switch_layers(np.tile([1.0, 0, 0, 0], (7, 1))) == (6, 6)  # never: the number of layers


def test_variance_split():
    split = lambda x: patching.variance_split(torch.tensor(x)[None, :, :, None]).tolist()
    assert split([[1.0, 3.0], [2.0, 4.0]]) == pytest.approx([0.2, 0.8, 0.0])  # .25 : 1
    assert split([[1.0, 0.0], [0.0, 1.0]]) == pytest.approx([0.0, 0.0, 1.0])
    torch.manual_seed(0)  # noise of contexts is no interaction
    signal, noise = torch.randn(30, 1, 8).expand(-1, 4, -1), torch.randn(4, 30, 4, 8)
    assert patching.variance_split(signal + noise)[0] > 0.97


def test_prompts():
    world = patching.World(None, {"fr": [["eau"], ["chat"]], "en": [["water"], ["cat"]]}, False)
    assert world.text(("fr", "en"), [0], 1) == 'Français: "eau" - English: "water"\nFrançais: "chat" - English: "'
    assert world.text(("fr", "en"), [0], 1, "word").endswith('\nFrançais: "chat')
    rng = np.random.default_rng(0)
    table = {code: [[f"{code}{i}"] for i in range(8)] for code in ("fr", "en")}
    world = patching.World(SimpleNamespace(encode=lambda text, bos: text), table, False)
    (text,) = world.prompts(rng, ("fr", "en"), [3], 5, scramble=True)
    pairs = re.findall(r'"fr(\d)" - English: "en(\d)"', text)
    assert len(pairs) == 5 and all(a != b for a, b in pairs) and {a for a, _ in pairs} == {b for _, b in pairs}
    assert text.endswith('"fr3" - English: "') and not any("3" in pair for pair in pairs)


def test_column_of_the_word(folder):
    args = patching.Args(concepts=40)
    toy = patching.Toy(args, 0, "chunk")
    text = toy.text(("fr", "en"), [0, 1], 2)
    assert toy.rho(text, toy.text(("fr", "en"), [0, 1], 2, "word")) == -5  # close, -, label, open
    merging = Split(**{'chat"': [3], "chat": [1], " - ": [4]})
    with pytest.raises(ValueError, match="merges"):
        patching.World(merging, {}, False).rho('chat" - ', "chat")


# ------------------------------------------------------------------------------------------------------------ the toy


def test_toy_documents_never_hold_what_is_held_out():
    toy = patching.Toy(patching.Args(languages=["en", "fr", "de", "es"], concepts=30), 3, "chunk")
    rng, seen = np.random.default_rng(0), set()
    for _ in range(2000):
        text = toy.tok.decode(toy.document(rng)[0])
        for a, w, b, v in re.findall(r'(\w+): "(\w+)" - (\w+): "(\w+)"', text):
            seen.add((a, w, b, v))
    codes = {patching.LABELS[c]: c for c in toy.table}
    held = {(a, toy.table[a][r][0], b, toy.table[b][r][0]) for (a, b), rows in toy.held.items() for r in rows}
    seen = {(codes[a], w, codes[b], v) for a, w, b, v in seen}
    assert len(held) == 30 * 4 and not seen & held
    every = {(a, toy.table[a][r][0], b, toy.table[b][r][0]) for (a, b), rows in toy.trained.items() for r in rows}
    assert seen <= every and len(seen) > 0.9 * len(every)
    for row in range(30):  # every word misses one language each way
        missing = [pair for pair, rows in toy.held.items() if row in rows]
        assert sorted(a for a, _ in missing) == sorted(b for _, b in missing) == sorted(toy.table)


@pytest.mark.parametrize("tok, pieces", [("chunk", ["wa", "te", "r"]), ("word", ["water"]), ("char", list("water"))])
def test_toy_tokenizer(tok, pieces):
    toy = patching.Toy(patching.Args(concepts=120), 0, tok)
    ids = toy.tok.encode('English: "water" = nature.en x1.en\n', bos=True)
    names = [toy.tok.names[i] for i in ids]
    assert names == ["<bos>", "English", ': "', *pieces, '"', " = ", "nature.en", "x1.en", "\n"]
    assert toy.quoted("water") == ids[3 : 3 + len(pieces)]


def test_words():
    table = patching.read_words(patching.CONCEPTS)
    assert len(table) == 10 and all(len(rows) == 120 for rows in table.values())
    assert all(len({w for (w,) in rows}) == 120 for code, rows in table.items() if code != "category")
    assert len({c for (c,) in table["category"]}) == 11


def test_batch_depends_on_the_step_alone():
    args = patching.Args(concepts=40)
    toy, env = patching.Toy(args, 0, "chunk"), common.Env(torch.device("cpu"), torch.float32)
    a, b = toy.batch(3, args, env), toy.batch(3, args, env)
    assert all(torch.equal(a[k], b[k]) for k in a) and not torch.equal(
        a["idx"][:, :30], toy.batch(4, args, env)["idx"][:, :30]
    )
    halves = [toy.batch(3, args, common.Env(env.device, env.dtype, rank, 2))["idx"] for rank in (0, 1)]
    assert torch.equal(torch.stack(halves, 1).flatten(0, 1), a["idx"])


# ----------------------------------------------------------------------------------------------------------- the script


def test_smoke_writes_what_is_promised(tmp_path):
    flags = ["--preset", "smoke", "--out", str(tmp_path)]
    result = patching.main([*flags, "--seeds", "3", "--tok", "chunk", "word", "char"])
    assert result == json.loads((tmp_path / "result.json").read_text())
    assert [c["id"] for c in result["claims"]] == ["T1", "T1b", "T2", "T3", "T4", "G"]
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert {r["run"] for r in rows} == {f"{tok}-s3" for tok in ("chunk", "word", "char")}
    assert all({"run", "step"} <= r.keys() for r in rows) and (tmp_path / "patching.png").stat().st_size > 10000
    before = (tmp_path / "metrics.jsonl").read_text()
    patching.main([*flags, "--seeds", "3", "--resume"])  # trained already: measures again
    again = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [r for r in rows if r["run"] == "chunk-s3"] == again and before


def csv(tmp_path, text):
    path = tmp_path / "words.csv"
    path.write_text(text)
    return str(path)


def test_own_words(folder, tmp_path):
    word = lambda i: chr(97 + i) * 3
    rows = "".join(f"{word(i)},{word(i + 8)}|{word(i + 8)}x,{word(i + 16)},z{word(i)}\n" for i in range(8))
    flags = ["--pairs", "4", "--k", "1", "--shots", "2", "--quads", "en-de:de-fr", "--out", str(tmp_path)]
    result = patching.main(["--model", str(folder), "--words", csv(tmp_path, "en,de,fr,es\n" + rows), *flags])
    assert list(result["metrics"]) == [f"{folder.name}-s0"]


@pytest.mark.parametrize(
    "flags, match",
    [
        ("--pairs 1", "2 to"),
        ("--pairs 5000", "pairs of concepts, --pairs 5000"),
        ("--shots 99", "1 to 50"),
        ("--k 0", "1 to 30"),
        ("--k 25", "pairs of languages are left"),
        ("--concepts 5", "20 to 120"),
        ("--languages en fr xx de", "four or more, each once, of en fr"),
        ("--languages en fr de", "four or more"),
        ("--quads de-it", "needed source:target"),
        ("--quads en-fr:de-ru", "of de, es, fr, fi, nl"),
        ("--quads de-es:fr-es", "two output languages"),
        ("--stages concept", "last always among them"),
        ("--tok syllable", "allowed: chunk word char"),
        ("--words WORDS", "needs --model"),
        ("--model /no/such/model", "no model"),
        ("--model MODEL --words /no/such.csv", "/no/such.csv"),
        ("--model MODEL --words EMPTY_CELL", "line 3: an empty cell"),
        ("--model MODEL --words UNKNOWN", "unknown language 'xx'"),
        ("--model MODEL --words FEW", "3 words"),
        ("--model MODEL --quads fr-en:es-fr --pairs 20000", "pairs of concepts, --pairs 20000"),
        ("--n-embd 30", "n_head 4"),
        ("--local 9", "0 to 3"),
        ("--device toaster", "which has"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(flags, match, folder, tmp_path, capsys):
    files = {"WORDS": "en,fr\na,b\n", "EMPTY_CELL": "en,fr\na,b\nc,\n", "UNKNOWN": "en,xx\na,b\n"}
    files["FEW"] = "en,fr,de,es\n" + "a,b,c,d\n" * 3
    for name, text in files.items():
        flags = flags.replace(f"--words {name}", f"--words {csv(tmp_path, text)}") if name in flags else flags
    flags = flags.replace("MODEL", str(folder)).split()
    with pytest.raises(SystemExit) as stop:
        patching.main(["--preset", "smoke", "--out", str(tmp_path / "out"), *flags])
    error = capsys.readouterr().err.split("\r")[-1].strip().splitlines()
    assert stop.value.code == 2 and error[-1].startswith("error: ") and re.search(match, error[-1])
    assert not (tmp_path / "out" / "result.json").exists()
