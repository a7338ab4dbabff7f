"""formal_tokenization.py: spellings and automata by hand and by enumeration; the script."""

import itertools
import json
import re
from functools import partial

import numpy as np
import pytest
import torch

import formal_tokenization as ft

torch.set_num_threads(1)
AB = [b"a", b"b", b"ab", b"ba"]


# ------------------------------------------------------------------------------------- tokenizers


def test_bpe_by_hand():
    spelled = {
        "aba": "ab a",
        "bab": "b ab",
        "baa": "ba a",
        "bba": "b ba",
        "abba": "ab ba",
        "baba": "b ab a",
    }
    for text, tokens in (spelled | {"aabb": "a ab b", "": ""}).items():
        assert [AB[i].decode() for i in ft.bpe(AB, text.encode())] == tokens.split()


def test_proper_pairs_by_hand():
    """T2 and T3 on two merges: h maps proper sequences one to one onto strings; pairs decide."""
    proper = [t for n in range(6) for t in itertools.product(range(4), repeat=n) if is_proper(t)]
    by_length = [sum(len(t) == n for t in proper) for n in range(1, 6)]
    assert by_length == [4, 11, 32, 92, 265]
    pairs = np.array([[is_proper((a, b)) for b in range(4)] for a in range(4)])
    follow = {"a": "a ab", "b": "b ab ba", "ab": "a b ab ba", "ba": "a ab"}
    assert {
        AB[a].decode(): " ".join(AB[b].decode() for b in np.flatnonzero(pairs[a])) for a in range(4)
    } == follow
    assert by_length == [int(np.linalg.matrix_power(pairs.astype(int), n).sum()) for n in range(5)]


def is_proper(ids):
    return tuple(ft.bpe(AB, ft.spell(AB, ids))) == tuple(ids)


def test_detokenization_is_a_homomorphism_and_proper_spellings_are_one_to_one():
    texts = [bytes(t) for n in range(11) for t in itertools.product(b"ab", repeat=n)]
    proper = {tuple(ft.bpe(AB, text)) for text in texts}
    assert len(proper) == len(texts) and {ft.spell(AB, ids) for ids in proper} == {*texts}
    rng = np.random.default_rng(0)
    for _ in range(100):
        u, v = rng.integers(0, 4, 5), rng.integers(0, 4, 3)
        assert ft.spell(AB, [*u, *v]) == ft.spell(AB, u) + ft.spell(AB, v)
    assert ft.bpe(AB, b"ab" + b"a") != ft.bpe(AB, b"a") + ft.bpe(AB, b"ba")  # tau is none


def test_random_merges_are_two_local():
    """Plain BPE, on all sequences of four ids; behind a pre-tokenizer it fails, both ways."""
    rng, wrong = np.random.default_rng(1), {ft.bpe: 0, ft.pretokenized: 0}
    for _ in range(25):
        vocab = ft.random_vocabulary(rng, b"a ", 3)
        for tokenize in wrong:
            tau = partial(tokenize, vocab)
            single = [tau(piece) == [i] for i, piece in enumerate(vocab)]
            pairs = [
                [tau(a + b) == [i, j] for j, b in enumerate(vocab)] for i, a in enumerate(vocab)
            ]
            for ids in itertools.product(range(len(vocab)), repeat=4):
                by_pairs = all(single[i] for i in ids) and all(
                    pairs[i][j] for i, j in zip(ids, ids[1:])
                )
                wrong[tokenize] += by_pairs != (tau(ft.spell(vocab, ids)) == [*ids])
    assert wrong[ft.bpe] == 0 < wrong[ft.pretokenized]


def test_counts_by_hand_and_by_enumeration():
    parens = {b"(", b")", b"((", b"))", b"()"}
    assert [ft.count_spellings(t, AB)[-1] for t in (b"abab", b"ababab", b"", b"ax")] == [
        5,
        13,
        1,
        0,
    ]
    assert [ft.count_spellings(t, parens)[-1] for t in (b"(())", b"()()", b"((()))")] == [5, 4, 13]
    spelled = [ft.spell(AB, t) for n in range(8) for t in itertools.product(range(4), repeat=n)]
    for text in (bytes(t) for n in range(8) for t in itertools.product(b"ab", repeat=n)):
        assert ft.count_spellings(text, AB)[-1] == spelled.count(text)


def test_random_spellings_are_equally_likely():
    rng, n, seen = np.random.default_rng(0), 4000, {}
    for _ in range(n):
        ids = tuple(ft.random_spelling(AB, b"ababab", rng))
        assert ft.spell(AB, ids) == b"ababab"
        seen[ids] = seen.get(ids, 0) + 1
    assert (
        len(seen) == 13 and sum((k - n / 13) ** 2 / (n / 13) for k in seen.values()) < 32.9
    )  # chi-square, p = .001


def test_learnt_merges():
    assert ft.learn_bpe([b"abab", b"abc"], b"abc", 2) == [b"a", b"b", b"c", b"ab", b"abab"]
    vocab = ft.random_vocabulary(np.random.default_rng(0), b"xy", 6)
    assert vocab[:2] == [b"x", b"y"] and len(vocab) == len({*vocab}) <= 8


def test_a_tokenizer_trained_here_is_looked_at():
    sample = "def f(x): return (x + 1)\n" * 20
    found = ft.inspect("bpe:268", sample)
    assert found["ids"] == "268, of which 267 spell something"
    assert found["pairs whose text is not that of h"].startswith("0 of ")
    assert ft.inspect("byte", sample)["ids"] == "257, of which 256 spell something"


@pytest.mark.parametrize("name, text, ids", [
    ("p50k_base", "()", [3419]), ("p50k_base", "(())", [7, 28955]), ("p50k_base", "((()))", [19510, 3419, 4008]),
    ("p50k_base", "Hello World", [15496, 2159]),
])  # fmt: skip
def test_real_tokenizer_is_no_homomorphism(name, text, ids):
    tiktoken = pytest.importorskip("tiktoken")
    try:
        encoding = tiktoken.get_encoding(name)
    except Exception as error:  # no network: the libraries have exceptions of their own
        pytest.skip(f"{name} can't be had: {type(error).__name__}")
    assert encoding.encode(text) == ids
    assert (
        encoding.decode([19526]) + encoding.decode([254]) != encoding.decode([19526, 254]) == "你"
    )
    assert ft.inspect(name, "def f(x): return (x + 1)\n" * 20)["h(tau(text)) is the text"]
    pieces = {piece for piece in ft.gm.vocabulary(encoding) if piece}
    assert ft.count_spellings(b"Hello World", pieces)[-1] == 352


# -------------------------------------------------------------------------------------- languages


def accepts(table, accepting, ids):
    return bool(accepting[ft.states_along(table, ids)[-1]])


def test_lift_by_hand():
    table, accepting = ft.automaton("(ab)*", b"ab")
    lifted = ft.lift(table, b"ab", AB)
    assert lifted.tolist() == [[1, -1, 0, -1], [-1, 0, -1, 1], [-1] * 4]
    assert accepting.tolist() == [True, False, False]
    for n in range(1, 6):
        found = [t for t in itertools.product(range(4), repeat=n) if accepts(lifted, accepting, t)]
        assert len(found) == 2 ** (n - 1)
        assert [t for t in found if is_proper(t)] == [(2,) * n]


@pytest.mark.parametrize(
    "pattern, states", [("(ab)*", 2), ("a*ba*", 2), ("(a|b)*abb", 4), ("a{2}|b{3}", 5), ("a?", 2)]
)
def test_automata_and_their_sizes(pattern, states):
    table, accepting = ft.automaton(pattern, b"ab")
    for ids in ft.sequences(2, 7):
        assert accepts(table, accepting, ids) == bool(
            re.fullmatch(pattern, "".join("ab"[i] for i in ids))
        )
    assert (
        ft.states_needed(table, accepting)
        == states
        == ft.states_needed(ft.lift(table, b"ab", AB), accepting)
    )


def test_states_needed_merges_what_does_the_same():
    table = [[1, 2], [3, -1], [3, -1], [-1, -1], [4, 4], [-1, -1]]  # 1, 2 do the same, 4 is dead
    assert ft.states_needed(np.array(table), np.array([0, 0, 0, 1, 0, 0], bool)) == 3


def test_proper_moves_by_hand():
    """L = {b, ab, aba, abaa, ...}: a proper text never begins with the id of a alone."""
    table, accepting = ft.automaton("aba*|b", b"ab")
    lifted = ft.lift(table, b"ab", AB)
    moves, live = ft.proper_moves(lifted, accepting, partial(ft.bpe, AB), AB)
    assert moves[0, 4].tolist() == [True, True, True, False] and live[0, 4].tolist() == [
        False,
        True,
        True,
        False,
    ]
    assert ft.dead_ends(lifted, accepting, live) == 0 < ft.dead_ends(lifted, accepting, moves)
    for ids in ft.sequences(4, 4):
        steps = zip(ft.states_along(lifted, ids), [4, *ids], ids)
        proper = accepts(lifted, accepting, ids) and all(live[step] for step in steps)
        assert proper == (is_proper(ids) and bool(re.fullmatch(b"aba*|b", ft.spell(AB, ids))))


def test_scrambled_ids_have_no_automaton_of_two_states():
    found = ft.check_scrambled()
    assert found["wrong"] > 1 and found["states_more"] == 0


# --------------------------------------------------------------------------------------- the toy


def test_strings_and_twins():
    rng = np.random.default_rng(0)
    for beyond in False, True:
        for s in ft.strings(rng, 30, beyond):
            t = ft.twin(rng, s)
            assert ft.is_balanced(s) and not ft.is_balanced(t) and len(s) == len(t)
            assert ft.depth_of(s) == ft.depth_of(t)
            assert (len(s) <= 40 and ft.depth_of(s) <= 6) != beyond
    assert ft.is_balanced("") and not ft.is_balanced("(") and not ft.is_balanced("([)]")
    assert ft.depth_of("([])()") == 2


@pytest.mark.parametrize("arm", ft.ARMS)
def test_codes_spell_every_string(arm):
    rng, code = np.random.default_rng(0), ft.Code(arm, 0)
    for s in ft.strings(rng, 20):
        ids = code.encode(s, rng)
        assert ids[0] == code.bos and ids[-1] == code.eos and max(ids[1:-1]) < code.bos
        if arm == "scramble":
            back = [code.swaps[i].tolist().index(x) for i, x in enumerate(ids[1:-1])]
            assert "".join(ft.BRACKETS[i] for i in back) == s
        else:
            assert ft.spell(code.vocab, ids[1:-1]).decode() == s
    if arm == "extended":
        assert len({tuple(code.encode("()()()()", rng)) for _ in range(20)}) > 3
        assert len({tuple(code.encode("()()()()", rng, "bpe")) for _ in range(20)}) == 1


def test_padding_and_probabilities():
    batch = ft.collate([[4, 0, 1, 5], [4, 5]], 5)
    assert batch["idx"].tolist() == [[4, 0, 1], [4, 5, 5]]
    assert batch["targets"].tolist() == [[0, 1, 5], [5, -100, -100]]
    code = ft.Code("char", 0)
    torch.manual_seed(0)
    model = ft.GPT(ft.GPTConfig(6, 82, 1, 2, 16, learned_pos=True))
    both = ft.log_p(model, code, ["()", "([])[]"], None, "")
    for s, p in zip(["()", "([])[]"], both):
        ids = torch.tensor([code.encode(s, None)])
        assert p == pytest.approx(
            -model.loss(ids[:, :-1], ids[:, 1:]).item() * (len(s) + 1), rel=1e-5
        )


def test_smoke_writes_what_is_promised(tmp_path):
    flags = ["--preset", "smoke", "--out", str(tmp_path), "--seeds", "3", "4"]
    result = ft.main(flags)
    assert result == json.loads((tmp_path / "result.json").read_text())
    assert [c["id"] for c in result["claims"]] == ["T1", "T3", "L1", "L2", "L4"]
    for claim in result["claims"][:2]:
        assert claim["holds"] and claim["control_fails"] and claim["held"] == [True, True]
    assert result["claims"][3]["holds"]  # an untrained model, too, writes what its masks allow
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert {row["run"] for row in rows} == {f"{arm}-s{seed}" for arm in ft.ARMS for seed in (3, 4)}
    assert (tmp_path / "formal_tokenization.png").stat().st_size > 10000
    assert result["metrics"]["arms"]["scramble"][0].keys() == {"in_range", "beyond", "by_depth"}


@pytest.mark.parametrize("flags, match", [
    (["--arms", "char"], "unrecognized arguments: --arms char"),
    (["--tokenizer", "nope"], "--tokenizer: unknown tokenizer 'nope'"),
    (["--tokenizer", "gpt2", "--samples", "9"], "--samples: no effect with --tokenizer"),
    (["--samples", "1"], "--samples 1, allowed: 2 and more"),
    (["--n-embd", "30"], "--n-embd 30 is no multiple of the 4 heads"),
    (["--seeds", "0", "0"], "each can be given once only"),
    (["--merges", "3"], "unrecognized arguments: --merges 3"),
])  # fmt: skip
def test_bad_flags_end_in_one_line(flags, match, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        ft.main([*flags, "--preset", "smoke", "--out", str(tmp_path)])
    err = capsys.readouterr().err
    assert (
        stop.value.code == 2 and err.startswith("error: ") and err.count("\n") == 1 and match in err
    )


def test_letters_that_a_tokenizer_does_not_know(tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    pieces = {"<unk>": 0, "</s>": 1, "▁a": 2, "a": 3, "▁": 4, "b": 5}
    model = tokenizers.models.BPE(pieces, [("▁", "a")], unk_token="<unk>")
    backend = tokenizers.Tokenizer(model)
    backend.decoder = tokenizers.decoders.Metaspace()
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    backend.add_special_tokens(["<unk>", "</s>"])
    backend.save(str(tmp_path / "tokenizer.json"))
    row = ft.inspect(str(tmp_path), "ab é ab " * 20)
    assert row["h(tau(text)) is the text"] is False and row["ids"].startswith("6, of which 4")


def test_a_tokenizer_is_measured(tmp_path, capsys):
    """A byte-level tokenizer of our own, and one that strips the first space: no homomorphism."""
    tokenizers = pytest.importorskip("tokenizers")
    level = tokenizers.ByteLevelBPETokenizer()
    level.train_from_iterator(["def f(x): return 你好"] * 3, 300, special_tokens=["<|endoftext|>"])
    level._tokenizer.save(str(tmp_path / "tokenizer.json"))
    piece = {"</s>": 0, "▁a": 1, "a": 2, "▁": 3} | {f"<0x{b:02X}>": 4 + b for b in range(256)}
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(piece, [("▁", "a")], byte_fallback=True))
    parts = [tokenizers.decoders.Replace("▁", " "), tokenizers.decoders.ByteFallback()]
    parts += [tokenizers.decoders.Fuse(), tokenizers.decoders.Strip(" ", 1, 0)]
    backend.decoder = tokenizers.decoders.Sequence(parts)
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace(prepend_scheme="never", split=False)
    backend.add_special_tokens(["</s>"])
    backend.save(str(tmp_path / "stripped.json"))
    paths = [str(tmp_path / "tokenizer.json"), str(tmp_path / "stripped.json")]
    rows = ft.main(["--tokenizer", *paths, "--out", str(tmp_path / "out")])["metrics"]
    assert [row["h(tau(text)) is the text"] for row in rows] == [True, True]
    strange = [int(row["pairs whose text is not that of h"].split()[0]) for row in rows]
    assert strange[0] == 0 < strange[1]
    assert "stripped.json" in capsys.readouterr().out
