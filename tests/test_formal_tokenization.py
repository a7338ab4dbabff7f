"""formal_tokenization.py: masks against the definition and peers; theorems against enumeration; the script."""

import json
import re
from functools import partial
from itertools import product

import numpy as np
import pytest
import torch

import data
import formal_tokenization as ft

torch.set_num_threads(1)
AB = [b"a", b"b", b"ab", b"ba"]
RANKS = {b: i for i, b in enumerate(AB)}
DYCK1 = 'root ::= ("(" root ")")*'
PARENS = [b"(", b")", b"((", b"))", b"()", None]


def allowed(c):
    return {c.vocab[i] if i != c.eos else "eos" for i in np.flatnonzero(c.mask())}


def after(c, *pieces):
    for piece in pieces:
        c.advance(c.vocab.index(piece))
    return c


# ---------------------------------------------------------------------------------------------------------- by hand


def test_dyck_masks_by_hand():
    c = ft.Constraint(DYCK1, PARENS, 5)
    start = {b"(", b"((", b"()", "eos"}
    assert allowed(c) == start
    assert allowed(after(c, b"(")) == {b"(", b")", b"((", b"()"}
    c.rollback()
    assert allowed(after(c, b"((")) == set(PARENS[:5])
    assert allowed(after(c, b"))")) == start
    c.advance(5)
    assert not c.mask().any()


def test_tokens_across_terminals_duplicates_and_empty_strings():
    c = ft.Constraint('root ::= "foo" "bar"', [b"fo", b"ob", b"ar", b"o", b"b", b"a", b"r", b"f"])
    assert allowed(c) == {b"fo", b"f"}
    assert after(c, b"fo", b"ob", b"ar").accepts() and not c.mask().any()
    c = ft.Constraint('root ::= "ab"', [b"a", b"b", b"ab", b"ab", b"abb", b"", None], 6)
    assert c.mask().tolist() == [True, False, True, True, False, False, False]
    assert c.advance(3) is None and c.mask().tolist() == [False] * 6 + [True]


def test_utf8_ranges():
    show = lambda seqs: " | ".join(" ".join(f"{a:02X}-{b:02X}" if a < b else f"{a:02X}" for a, b in s) for s in seqs)
    assert show(ft.utf8_ranges(0, ft.LAST)) == (
        "00-7F | C2-DF 80-BF | E0 A0-BF 80-BF | E1-EC 80-BF 80-BF | ED 80-9F 80-BF | EE-EF 80-BF 80-BF | "
        "F0 90-BF 80-BF 80-BF | F1-F3 80-BF 80-BF 80-BF | F4 80-8F 80-BF 80-BF"
    )
    assert show(ft.utf8_ranges(0xE9, 0x4F60)) == (
        "C3 A9-BF | C4-DF 80-BF | E0 A0-BF 80-BF | E1-E3 80-BF 80-BF | E4 80-BC 80-BF | E4 BD 80-A0"
    )


def test_tokens_inside_a_character():
    c = ft.Constraint("root ::= [é-你]", [bytes([b]) for b in range(256)] + ["你".encode()[:2], "好".encode()])
    assert {0xE4, 0xC3, 256} <= set(np.flatnonzero(c.mask())) and not c.mask()[257] and not c.mask()[0xC2]
    c.advance(256)
    assert np.flatnonzero(c.mask()).tolist() == [*range(0x80, 0xA1)]


def test_lift_by_hand():
    table, accepting = ft.lift(ft.Engine(ft.parse_regex("(ab)*"), ft.Trie(AB)))
    accepted = lambda n: [t for t in product(range(4), repeat=n) if ft.runs(table, accepting, t)]
    assert [len(accepted(n)) for n in range(1, 6)] == [2 ** (n - 1) for n in range(1, 6)]
    assert accepted(2) == [(0, 1), (2, 2)]
    proper = [t for t in accepted(3) if tuple(ft.bpe(RANKS, b"".join(AB[i] for i in t))) == t]
    assert proper == [(2, 2, 2)]


def test_bpe_by_hand():
    spelled = {"aba": "ab a", "bab": "b ab", "baa": "ba a", "bba": "b ba", "abba": "ab ba", "baba": "b ab a"}
    for text, tokens in (spelled | {"aabb": "a ab b"}).items():
        assert [AB[i].decode() for i in ft.bpe(RANKS, text.encode())] == tokens.split()
    proper = lambda t: tuple(ft.bpe(RANKS, b"".join(AB[i] for i in t))) == t
    pairs = np.array([[proper((a, b)) for b in range(4)] for a in range(4)])
    follow = {"a": "a ab", "b": "b ab ba", "ab": "a b ab ba", "ba": "a ab"}
    assert {AB[a].decode(): " ".join(AB[b].decode() for b in np.flatnonzero(pairs[a])) for a in range(4)} == follow
    enumerated = [sum(proper(t) for t in product(range(4), repeat=n)) for n in range(1, 6)]
    matrix = [int(np.linalg.matrix_power(pairs.astype(int), n).sum()) for n in range(5)]
    assert enumerated == matrix == [4, 11, 32, 92, 265]


def test_counts_by_hand_and_by_enumeration():
    parens = {b"(", b")", b"((", b"))", b"()"}
    n = lambda text, vocab: ft.counts(text, vocab)[-1]
    assert [n(t, RANKS) for t in (b"abab", b"ababab", b"", b"ax")] == [5, 13, 1, 0]
    assert [n(t, parens) for t in (b"(())", b"()()", b"((()))")] == [5, 4, 13]
    for size in range(9):
        for text in map(bytes, product(b"ab", repeat=size)):
            cuts = product([False, True], repeat=max(0, size - 1))
            words = ([w for w in re.split("\0", "".join(chr(c) + "\0" * cut for c, cut in zip(text, [*cut_, False])))]
                     for cut_ in cuts)  # fmt: skip
            spelled = sum(all(w.encode() in RANKS or not text for w in ws) for ws in words)
            assert n(text, RANKS) == spelled


def test_uniform_is_uniform():
    rng, n = np.random.default_rng(0), 4000
    seen = {}
    for _ in range(n):
        t = tuple(ft.uniform(b"ababab", RANKS, rng))
        assert b"".join(AB[i] for i in t) == b"ababab"
        seen[t] = seen.get(t, 0) + 1
    assert len(seen) == 13 and sum((k - n / 13) ** 2 / (n / 13) for k in seen.values()) < 32.9  # chi-square, p = .001


# ------------------------------------------------------------------------------------------------ against the oracles


def test_masks_equal_the_oracle():
    rng = np.random.default_rng(1)
    found = np.array([ft.differing_bits(rng, ft.random_grammar(rng)) for _ in range(40)]).sum(0)
    assert found[0] == 0 and found[1] > 30 and found[2] > 700


def test_oracle_equals_re():
    for pattern in "(ab)*", "a(b|ca)*c?", "(a|b){2,3}c", "[^a]*a":
        rules = ft.parse_regex(pattern)
        texts = [bytes(t) for n in range(5) for t in product(b"abc", repeat=n)]
        full = {t for t in texts if re.fullmatch(pattern.encode(), t)}
        engine = ft.Engine(rules, ft.Trie([bytes([b]) for b in range(256)]))
        for t in texts:
            c = engine.read(engine.start, t)
            viable, complete = ft.recognise(rules, t)
            assert complete == (t in full) == (c is not None and c.accepts)
            assert viable == (c is not None) and (not any(f.startswith(t) for f in full) or viable)


@pytest.mark.parametrize("name", ["json", "arithmetic", "python", "dyck"])
def test_masks_equal_one_byte_at_a_time(name):
    """The frame walk against stepping every token from the configuration itself, along random texts."""
    rng = np.random.default_rng(2)
    enc = data.train_bpe('{"a": [1, -2.5e3], "b": "\\u00e9 你"} not (x + 1) ** 2 == f(a, [b]) in (()[])' * 3, 280)
    vocab = [enc.decode_single_token_bytes(i) for i in range(279)] + [None]
    c = ft.Constraint(ft.GRAMMARS[name], vocab, 279)
    for _ in range(120):
        slow = [bool(b) and c.engine.read(c.state, b) is not None for b in vocab[:-1]] + [c.accepts()]
        assert c.mask().tolist() == slow
        options = np.flatnonzero(c.mask()[:-1])
        if len(options) and rng.random() > 0.02:
            c.advance(int(rng.choice(options)))
        else:
            c = ft.Constraint(c.engine)


PEERS = {  # ours and xgrammar's, llguidance's
    "arithmetic": (
        'root ::= term ([-+] term)*\nterm ::= atom ([*/] atom)*\natom ::= [0-9]+ | "(" root ")"',
        'start: term (/[-+]/ term)*\nterm: atom (/[*\\/]/ atom)*\natom: N | "(" start ")"\nN: /[0-9]+/',
    ),
    "strings": (
        r'root ::= "\"" ([^"\\\x00-\x1F] | "\\" [nt"\\] | "\\u" [0-9a-f]{4})* "\""',
        r'start: /"([^"\\\x00-\x1f]|\\[nt"\\]|\\u[0-9a-f]{4})*"/',
    ),
    "classes": (r"root ::= [\u00C0-\u024Fa-z]+ (\" \" [\u4E00-\u4F60]+)?".replace('\\"', '"'),
                r"start: /[\u00C0-\u024Fa-z]+( [\u4E00-\u4F60]+)?/"),
    "repeats": ('root ::= [a-z]{1,8} ("-" [0-9]{2,3}){0,3}', "start: /[a-z]{1,8}(-[0-9]{2,3}){0,3}/"),
    "ambiguous": ('root ::= ("a" | "ab" | "b" | "aab" | "ba")+', "start: /(a|ab|b|aab|ba)+/"),
}  # fmt: skip


@pytest.mark.parametrize("name", ["json", *PEERS])
@pytest.mark.parametrize("style", ["bytes", "sentencepiece"])
def test_masks_equal_the_peers(name, style):
    bench = pytest.importorskip("bench")
    rng = np.random.default_rng(3)
    text = '{"abc": [1, -2.5e3], "déjà": "\\u00e9 你好 ab-12-345"} (12+3)*4/5 aab ba ' * 4
    enc = data.train_bpe(text + "".join(data.load_text())[:20000], 600)
    vocab = [enc.decode_single_token_bytes(i) for i in range(599)] + [None]
    if style == "sentencepiece":  # whole pieces and single bytes, no token that ends inside a character
        keep = lambda b: len(b) == 1 or b.decode(errors="replace").encode() == b
        vocab = [b if b and keep(b) else None for b in vocab]
    grammar, lark = PEERS.get(name) or (ft.JSON, bench.JSON_LARK)
    engines = bench.mask_engines(grammar, lark, enc, ft.Trie(vocab))
    if len(engines) == 1:
        pytest.skip("neither llguidance nor xgrammar is installed")
    real = [i for i, b in enumerate(vocab) if b]
    for _ in range(6):
        running = {k: start() for k, start in engines.items()}
        for _ in range(20):
            mask = running["ours"][0]()
            ours = [i for i in real if mask[i]]
            for k, (fill, _) in running.items():
                found = fill(show=True) if k != "ours" else mask
                theirs = [i for i in real if found[i]]
                # llguidance leaves the canonical token alone where the text is forced: `ue`, not `u` after `tr`
                forced = k == "llguidance" and len(theirs) == 1 and {theirs[0]} <= {*ours}
                if not (forced and all(vocab[theirs[0]].startswith(vocab[i]) for i in ours)):
                    assert theirs == ours, k
            options = np.flatnonzero(mask[:-1])
            if not len(options):
                break
            id = int(rng.choice(options))
            for _, advance in running.values():
                advance(id)


# ---------------------------------------------------------------------------------------------------------- invariants


def test_every_allowed_id_advances_and_rollback_restores():
    c = ft.Constraint(DYCK1, PARENS, 5)
    rng = np.random.default_rng(4)
    for _ in range(50):
        mask = c.mask()
        assert mask.any() and mask[5] == c.accepts() and not mask.flags.writeable
        for id in range(6):
            if mask[id]:
                c.advance(id)
                c.rollback()
            else:
                with pytest.raises(ValueError, match=f"id {id}"):
                    c.advance(id)
            assert c.mask() is mask
        c.advance(int(rng.choice(np.flatnonzero(mask[:5]))))
    c.rollback(50)
    assert allowed(c) == {b"(", b"((", b"()", "eos"}


def test_caches_can_be_emptied_at_any_time_and_are_not_shared_by_grammars():
    vocab = [bytes([b]) for b in range(256)] + [b'{"a', b"}}", b"]}", b'":', None]
    text = b'{"a":{"b":[1,{"c":[]}]}}'
    plain, small = ft.Constraint(ft.JSON, vocab, 260), ft.Constraint(ft.JSON, vocab, 260, cache_mb=0)
    other = ft.Constraint(ft.GRAMMARS["dyck"], plain.engine.trie, 260)
    for b in text:
        assert (plain.mask() == small.mask()).all()
        plain.advance(b)
        small.advance(b)
    assert plain.accepts() and small.accepts()
    assert np.flatnonzero(other.mask()).tolist() == [40, 91, 260]


def test_deep_nesting():
    c = ft.Constraint(ft.JSON, [bytes([b]) for b in range(256)] + [b"]]", b"[" * 50])
    for _ in range(200):
        c.advance(257)
    assert c.state.least == 10000 and c.mask()[256]
    for _ in range(5000):
        c.advance(256)
    assert c.accepts()


def test_explain():
    c = ft.Constraint(ft.JSON, [bytes([b]) for b in range(256)] + [b"{]", None, b"tru"], 257)
    assert "refused at its byte 1, b']'; expected: " in c.explain(256) and "'}'" in c.explain(256)
    assert c.explain(258).endswith("allowed") and "needs 1 bytes" in c.explain(257)
    with pytest.raises(ValueError, match="out of range, allowed: 0 to 258"):
        c.advance(999)


def test_proper_masks_have_no_dead_ends():
    """Against the definition: ids with a proper completion of at most eight bytes."""
    grammar, vocab = 'root ::= "a" "b" "a"* | "b"', [*AB, None]
    c = ft.Constraint(grammar, vocab, 4, proper=True)
    full = [tuple(ft.bpe(RANKS, t)) for t in (b"b", *(b"ab" + b"a" * n for n in range(7)))]
    todo = [()]
    while todo:
        t = todo.pop()
        for id in t:
            c.advance(id)
        expected = {f[len(t)] for f in full if f[: len(t)] == t and len(f) > len(t)}
        assert set(np.flatnonzero(c.mask()[:4])) == expected and c.mask()[4] == (t in full)
        c.rollback(len(t))
        todo += [(*t, i) for i in expected if len(t) < 3]
    assert ft.Constraint(grammar, vocab, 4).mask()[0] and not c.mask()[0]  # `a` alone can only go on improperly


def test_locality_fails_for_a_pretokenizer():
    assert ft.is_local(partial(ft.bpe, RANKS), AB, 4)[0] == 0
    found = ft.theorems(8, 5)
    assert found["local_violations"] == 0 < found["pretokenized_violations"]
    assert found["lift_wrong"] == 0 < found["scrambled_lift_wrong"]


def test_check_homomorphism():
    rng = np.random.default_rng(0)
    found = {k: ft.check_homomorphism(*toy[:2], rng, *toy[2:]) for k, toy in ft.toy_tokenizers(rng).items()}
    assert [k for k, f in found.items() if not f["homomorphism"]] == ["stripped space", "replacement", "scramble"]
    assert [k for k, f in found.items() if not f["lossless"]] == ["lower-casing"]
    assert "spaces" in found["stripped space"]["cause"] and "replacement" in found["replacement"]["cause"]
    assert found["scramble"]["pair"] and found["lower-casing"]["cause"] == "lower-casing"


# ----------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    "grammar, match",
    [
        ('root ::= "a" item', "line 1: rule item is not defined"),
        ('root ::= "a"\nb ::= "x" b', "rule b is unproductive"),
        ('root ::= a "x"\na ::= b? root | "y"\nb ::= "z"', "left recursion: root -> a -> root"),
        ("root ::= [^\\x00-\\U0010FFFF]", "line 1: the class .* is empty"),
        ('root ::= "a"\n\nb ::= [z-a]', "line 3: the range z-a"),
        ('root ::= "\\uD800"', "line 1: 'utf-8' .* surrogates"),
        ('start ::= "a"', "no rule root, only: start"),
        ('root ::= "a" ?? )', "line 1"),
        ('root ::= ("a"', "line 1: a \\( is not closed"),
        ('root ::= "a"{3,2}', "line 1: .3,2. is reversed"),
        ('root ::= "a" $', "line 1: can't read"),
        ('root ::= "a"\nroot ::= "b"', "line 2: 'root' is defined twice"),
    ],
)
def test_bad_grammars(grammar, match):
    with pytest.raises(ValueError, match=match):
        ft.Constraint(grammar, [bytes([b]) for b in range(256)])


def test_a_byte_that_no_token_has_is_cut_from_the_language():
    c = ft.Constraint('root ::= "a" ("b" "x" | "a")', [b"a", b"b", b"ab", None], 3)
    assert allowed(c) == {b"a"} and allowed(after(c, b"a")) == {b"a"}  # never `ab`, which can't go on
    with pytest.raises(ValueError, match="byte b'x': it can spell no text"):
        ft.Constraint('root ::= "ax"', [b"a"])


def test_bad_vocabulary_and_regex():
    with pytest.raises(ValueError, match="no token for the byte b'b', which"):
        ft.Constraint('root ::= "ab"', [b"a", b"ab"])
    with pytest.raises(ValueError, match="eos 7 is out of range"):
        ft.Constraint('root ::= "a"', [b"a"], 7)
    for pattern in r"(a)\1", "(", "a(?=b)":
        with pytest.raises(ValueError, match="regular expression"):
            ft.parse_regex(pattern)


@pytest.mark.parametrize("flags", [["--grammar", "nope"], ["--arms", "word"], ["--tokenizer", "nope"],
                                   ["--tokenizer", "byte", "--text", "{]"], ["--model", "nope"],
                                   ["--samples", "1"], ["--merges", "999"], ["--n-embd", "30"]])  # fmt: skip
def test_bad_flags_end_in_one_line(flags, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        ft.main([*flags, "--preset", "smoke", "--out", str(tmp_path)])
    err = capsys.readouterr().err
    assert stop.value.code == 2 and err.startswith("error: ") and err.count("\n") == 1


# -------------------------------------------------------------------------------------------------------------- script


def test_toy_world():
    rng = np.random.default_rng(0)
    engine = ft.Engine(ft.parse_ebnf(ft.GRAMMARS["dyck"]), ft.Trie([c.encode() for c in ft.ALPHABET]))
    valid = lambda s: (c := engine.read(engine.start, s.encode())) is not None and c.accepts
    for beyond in False, True:
        for s in ft.strings(rng, 30, beyond):
            t = ft.twin(rng, s)
            assert valid(s) and not valid(t) and ft.depth_of(s) == ft.depth_of(t)
            assert (len(s) <= 40 and ft.depth_of(s) <= 6) != beyond
    for arm in ft.COLOURS:
        code = ft.Code(arm, 0, 20)
        for s in ft.strings(rng, 10):
            ids = code.encode(s, rng)
            assert code.spell(ids) == s and ids[0] == code.bos and ids[-1] == code.eos
    idx, targets = ft.padded([[4, 0, 1, 5], [4, 5]], 5)
    assert idx.tolist() == [[4, 0, 1], [4, 5, 5]] and targets.tolist() == [[0, 1, 5], [5, -100, -100]]


def test_real_tokenizer_styles(tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    level = tokenizers.ByteLevelBPETokenizer()
    level.train_from_iterator(["déjà vu 你好"] * 3, 300, special_tokens=["<|endoftext|>"])
    vocab = ft.vocabulary(level._tokenizer)
    assert vocab[0] is None and b"".join(vocab[i] for i in level.encode("déjà 你").ids) == "déjà 你".encode()
    piece = {"<unk>": 0, "</s>": 1, "▁a": 2, "a": 3, "▁": 4} | {f"<0x{b:02X}>": 5 + b for b in range(256)}
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(piece, [("▁", "a")], byte_fallback=True, unk_token="<unk>"))
    backend.add_special_tokens(["<unk>", "</s>"])
    assert ft.vocabulary(backend)[:6] == [None, None, b" a", b"a", b" ", b"\0"]
    backend.save(str(tmp_path / "tokenizer.json"))
    args = ["--tokenizer", str(tmp_path), "--text", "", "--explain", "2", "--out", str(tmp_path / "out")]
    result = ft.main(args)
    assert result["metrics"]["allowed"] > 10


def test_smoke_writes_what_is_promised(tmp_path):
    flags = ["--preset", "smoke", "--out", str(tmp_path), "--seeds", "3"]
    result = ft.main(flags)
    assert result == json.loads((tmp_path / "result.json").read_text())
    assert [c["id"] for c in result["claims"]] == ["T1", "T2", "T3", "T4", "M1", "M2", "L1", "L2", "L3", "L4"]
    for c in result["claims"]:
        assert c["measured"] and c["control"] and isinstance(c["holds"], bool)
        assert c["id"][0] == "L" or c["holds"] and c["control_fails"]
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert {r["run"] for r in rows} == {f"{arm}-s3" for arm in ft.COLOURS} and rows[0]["loss"] > 0
    assert (tmp_path / "formal_tokenization.png").stat().st_size > 10000
    before = [{k: v for k, v in r.items() if k not in ("seconds", "tokens_per_s")} for r in rows]
    ft.main([*flags, "--resume"])  # nothing left to do, the same lines
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [{k: v for k, v in r.items() if k not in ("seconds", "tokens_per_s")} for r in rows] == before


def test_masked_generation_is_always_complete():
    torch.manual_seed(0)
    vocab = [bytes([b]) for b in range(256)] + [b'{"', b"[[[[", b'":', b"]]", None]
    model = ft.GPT(ft.GPTConfig(262, 80, 1, 2, 16))  # one id more than the vocabulary, as padded embeddings have
    base = ft.Constraint(ft.JSON, vocab, 260)
    rows = ft.generate(model, [[1], [2, 3], [4]] * 5, 60, stop=[260], seed=0,
                       process=ft.masker(lambda: ft.Constraint(base.engine), 60))  # fmt: skip
    for row in rows:
        assert row[-1] == 260
        json.loads(b"".join(vocab[i] for i in row[:-1]).decode())
