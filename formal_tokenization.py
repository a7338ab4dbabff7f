r"""Tokenization as an inverse homomorphism (arXiv 2412.03160): token languages, and exact grammar masks.

Detokenization h maps every id to bytes and a sequence of ids to the bytes in a row: h(uv) = h(u) h(v), a string
homomorphism. So the token sequences that spell a language L are its inverse image E(L) = h^-1(L) (*extended*), regular
or context-free if L is: tokens add no power and cost none. What a tokenizer returns, the *proper* sequence tau(s), is
one of many that spell s; tau itself is no homomorphism. The paper is theory, without experiments (its later sections
were not at hand here); what is measured below is our own:

- the theorems as code that checks them, each beside a code for which they fail
- an exact token mask for any grammar and any vocabulary: which ids keep the text a prefix of L? A pushdown automaton is
  determinised as it is used, and the walk of the vocabulary's trie is cut at stack frames, so that it is remembered
- the same small GPT on a bracket language spelled by characters, BPE, random extended tokens, and, as the control, by a
  code whose ids change meaning with position: as informative as characters, but no inverse homomorphism

Tags: [P] paper, [T] standard theory, [I] designed here. Read on: grammars -> `Engine`, `Constraint` (masks) -> the
theorems -> the learnability toy -> claims. The toy can't show what tokenization does to length generalisation at scale.
"""

import heapq
import json
import re
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from itertools import product
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from tqdm import tqdm

import legacy as common
import data
from model import GPT, GPTConfig, generate

JSON = r"""
root   ::= ws value ws
value  ::= object | array | string | number | "true" | "false" | "null"
object ::= "{" ws (pair ("," ws pair)*)? "}"
pair   ::= string ws ":" ws value ws
array  ::= "[" ws (value ws ("," ws value ws)*)? "]"
string ::= "\"" char* "\""
char   ::= [^"\\\x00-\x1F\x7F] | "\\" (["\\/bfnrt] | "u" [0-9a-fA-F]{4})
number ::= "-"? ("0" | [1-9] [0-9]*) ("." [0-9]+)? ([eE] [-+]? [0-9]+)?
ws     ::= [ \t\n\r]*
"""
GRAMMARS = {
    "json": JSON,
    "object": JSON.replace("ws value ws\n", "object\n", 1).replace("[ \\t\\n\\r]*", '(" " | "\\n" " "{0,12})?'),  # tidy
    "dyck": 'root ::= ("(" root ")" | "[" root "]")*',
    "arithmetic": 'root ::= root [-+] term | term\nterm ::= term [*/] atom | atom\natom ::= [0-9]+ | "(" root ")"',
    "python": r"""
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
""",
}


@dataclass
class Args(common.TrainFlags):
    """token languages"""

    presets: ClassVar[dict] = {
        "smoke": dict(steps=6, batch_size=8, n_embd=16, warmup=2, samples=6, jobs=1, threads=1, trials=12),
        "toy": dict(steps=250, batch_size=64, lr=3e-3, eval_every=50),
        "paper": dict(steps=3000, batch_size=64, lr=2e-3, samples=1000, trials=200),
    }
    arms: list[str] = field(default_factory=lambda: ["char", "bpe", "extended", "scramble"])
    """codes of the same strings to train with: char bpe extended scramble"""
    n_embd: int = 64
    """width; two layers of four heads"""
    merges: int = 48
    """BPE merges, learnt on training strings"""
    samples: int = 200
    """strings of each kind to measure on"""
    trials: int = 40
    """random grammars, vocabularies and merge tables of the checks"""
    limits: ClassVar[dict] = {"samples": (2,), "trials": (1,), "merges": (0, 200)}
    model: str = ""
    """decode with a real model under --grammar instead: smollm2-135m-instruct, any that pretrained.py loads"""
    grammar: str = "json"
    """json, object (JSON laid out as people do), dyck, arithmetic, python, re:PATTERN, or a file in the same EBNF"""
    prompt: str = "Describe a person as a JSON object."
    """what to ask --model"""
    max_new_tokens: int = 128
    """longest answer of --model; it is always closed in time"""
    tokenizer: str = ""
    """check a tokenizer instead: byte, a tiktoken name, a tokenizer.json; or of --explain"""
    text: str = ""
    """with --tokenizer: count its tokenizations; with --grammar: the prefix of a mask"""
    explain: int = -1
    """with --tokenizer, --grammar, --text: why is this id refused there"""


# ----------------------------------------------------------------------------------------------------------- grammars
# A grammar is {rule: tree}, a tree ("byte", set of bytes) | ("seq", [tree]) | ("alt", [tree]) | ("rule", name) |
# ("rep", tree, least, most or None).

CHAR = r"\\x[0-9a-fA-F]{2}|\\u[0-9a-fA-F]{4}|\\U[0-9a-fA-F]{8}|\\.|[^\\]"
TOKEN = re.compile(
    r"(?P<space>\s+|#[^\n]*)|(?P<rule>[A-Za-z_][\w-]*)\s*::=|(?P<name>[A-Za-z_][\w-]*)|"
    r'(?P<literal>"(?:\\.|[^"\\\n])*")|(?P<set>\[(?:\\.|[^\]\\\n])*\])|'
    r"(?P<repeat>\{\d+(?:,\d*)?\}|[*+?])|(?P<mark>[()|])|(?P<odd>.)"
)
REPEAT = {"*": (0, None), "+": (1, None), "?": (0, 1)}
ESCAPES = dict(zip("ntrfvb0", (10, 9, 13, 12, 11, 8, 0)))
LAST = 0x10FFFF  # code point


def code_point(c):
    """That of one CHAR."""
    return ord(c) if len(c) == 1 else int(c[2:], 16) if len(c) > 2 else ESCAPES.get(c[1], ord(c[1]))


def literal(text):
    """The tree of a byte string."""
    return ("seq", [("byte", frozenset([b])) for b in text])


def char_class(text):
    """The tree of a class such as [^a-z]; ValueError if it is reversed or empty."""
    body = text[1:-1].removeprefix("^")
    found = re.findall(f"({CHAR})(?:-({CHAR}))?", body, re.S)
    ranges, at = sorted((code_point(a), code_point(b or a)) for a, b in found), 0
    for low, high in ranges:
        if low > high:
            raise ValueError(f"the range {chr(low)}-{chr(high)} of {text} is reversed")
    if body != text[1:-1]:
        given, ranges = [*ranges, (LAST + 1, LAST)], []
        for low, high in given:
            ranges.append((at, low - 1))
            at = max(at, high + 1)
    heads = {}  # first bytes of the sequences that end alike
    for low, high in ranges:
        for first, *rest in utf8_ranges(low, high):
            heads.setdefault(tuple(rest), []).append(first)
    if not heads:
        raise ValueError(f"the class {text} is empty")
    any_of = lambda *ranges: ("byte", frozenset(b for low, high in ranges for b in range(low, high + 1)))
    return ("alt", [("seq", [any_of(*first), *map(any_of, rest)]) for rest, first in heads.items()])


def utf8_ranges(low, high):
    """The code points low..high as sequences of byte ranges, [[(lo, hi), ...], ...]; surrogates are left out [T]."""

    def split(low, high):  # one length: until the last n bytes are either one tail or all of them
        for n in range(1, len(chr(low).encode())):
            tail = 64**n - 1
            if low | tail != high | tail:
                if low & tail:
                    return split(low, low | tail) + split((low | tail) + 1, high)
                if high & tail != tail:
                    return split(low, (high | tail) - tail - 1) + split((high | tail) - tail, high)
        return [list(zip(chr(low).encode(), chr(high).encode()))]

    lengths = (0, 0x7F), (0x80, 0x7FF), (0x800, 0xD7FF), (0xE000, 0xFFFF), (0x10000, LAST)
    parts = [(max(low, a), min(high, b)) for a, b in lengths]
    return [seq for a, b in parts if a <= b for seq in split(a, b)]


def parse_ebnf(text):
    """The grammar of an EBNF text. ValueError names rule or line."""
    tokens, rules, used = [("end", "the end", text.count("\n") + 1)], {}, {}
    for m in TOKEN.finditer(text):
        line = text.count("\n", 0, m.start()) + 1
        if m.lastgroup == "odd":
            raise ValueError(f"grammar line {line}: can't read {text[m.start() :][:12]!r}")
        if m.lastgroup != "space":
            tokens.insert(1, (m.lastgroup, m[m.lastgroup], line))  # the next one is the last

    def alternatives():
        nonlocal line
        branches = [[]]
        while tokens[-1][0] not in ("end", "rule") and tokens[-1][1] != ")":
            kind, word, line = tokens.pop()
            seq = branches[-1]
            if word == "|":
                branches.append([])
            elif word == "(":
                seq.append(alternatives())
                if tokens.pop()[1] != ")":
                    raise ValueError("a ( is not closed")
            elif kind == "literal":
                seq.append(literal("".join(chr(code_point(c)) for c in re.findall(CHAR, word[1:-1])).encode()))
            elif kind == "set":
                seq.append(char_class(word))
            elif kind == "repeat" and seq:
                low, comma, high = word[1:-1].partition(",")
                least, most = REPEAT.get(word) or (int(low), int(high or low) if high or not comma else None)
                if most is not None and least > most:
                    raise ValueError(f"{word} is reversed")
                seq.append(("rep", seq.pop(), least, most))
            elif kind == "name":
                used.setdefault(word, line)
                seq.append(("rule", word))
            else:
                raise ValueError(f"{word!r} is out of place")
        return ("alt", [("seq", seq) for seq in branches])

    try:
        while tokens[-1][0] == "rule":
            _, name, line = tokens.pop()
            if name in rules:
                raise ValueError(f"{name!r} is defined twice")
            rules[name] = without_left_recursion(name, alternatives())
        kind, word, line = tokens[-1]
        if kind != "end":
            raise ValueError(f"{word!r} is out of place")
        for name in used:
            if name not in rules:
                line = used[name]
                raise ValueError(f"rule {name} is not defined, allowed: {', '.join(rules)}")
    except ValueError as error:
        raise ValueError(f"grammar line {line}: {error}") from None
    if "root" not in rules:
        raise ValueError(f"the grammar has no rule root, only: {', '.join(rules) or 'nothing'}")
    return rules


def without_left_recursion(name, tree):
    """A ::= A x | y as A ::= y x*, the same language [T]."""
    left = [branch for branch in tree[1] if branch[1][:1] == [("rule", name)]]
    if not left:
        return tree
    tails = ("alt", [("seq", parts[1:]) for _, parts in left])
    return ("seq", [("alt", [branch for branch in tree[1] if branch not in left]), ("rep", tails, 0, None)])


def parse_regex(pattern):
    """A regular expression as a grammar, by way of EBNF; \\d and the like are ASCII. ValueError if it isn't regular."""
    sets = {r"\d": "[0-9]", r"\w": "[0-9A-Z_a-z]", r"\s": r"[\t-\r ]", r"\D": "[^0-9]", r"\W": "[^0-9A-Z_a-z]"}
    sets |= {r"\S": r"[^\t-\r ]", ".": r"[^\n]", "(?:": "("}
    inside = lambda m: sets.get(m[0], f"[{m[0]}]")[1:-1]
    words = re.findall(rf"\[\^?(?:\\.|[^\]\\])+\]|\(\?:|\{{\d*,?\d*\}}|{CHAR}", pattern, re.S)
    try:
        re.compile(pattern)
        for before, word in zip(["", *words], words):
            strange = re.search(r"\\[^\Wntrfvxu0dwsDWS]|^[\^$]$|^\[.*\\[DWS]", word)
            if strange or word == "+" and before[0] in "*+?{":
                raise ValueError(f"{word} has no automaton here")
        plain = lambda w: f'"\\U{code_point(w):08x}"'
        other = lambda w: re.sub(r"\\.", inside, w) if w[0] == "[" else w if w[0] in "()|*+?{" else plain(w)
        words = [sets.get(w) or other(w) for w in words]
        return parse_ebnf("root ::= " + " ".join(words))
    except (ValueError, re.error) as error:
        raise ValueError(f"the regular expression {pattern!r}: {error}") from None


def read_grammar(name):
    """The grammar of --grammar: a name of GRAMMARS, re:PATTERN, or a file."""
    if name.startswith("re:"):
        return parse_regex(name[3:])
    if name not in GRAMMARS and not Path(name).is_file():
        raise ValueError(f"--grammar {name}: no such file; allowed: {', '.join(GRAMMARS)}, re:PATTERN, an EBNF file")
    return parse_ebnf(GRAMMARS.get(name) or Path(name).read_text("utf-8"))


# -------------------------------------------------------------------------------------------------- the mask engine [I]


class Trie:
    """All byte strings of a vocabulary in one trie, nodes in breadth-first order: the children of a node are a range.

    first (n + 1,): children of node i are first[i]..first[i + 1]; byte (n,): on the arrow to a node; ids sorted by
    node, of node i from ends[i] to ends[i + 1]. A special (None) and an empty string are nowhere.
    """

    def __init__(self, vocab):
        self.vocab, self.n_vocab = vocab, len(vocab)
        self.single = [i for i, b in enumerate(vocab) if b and len(b) == 1]
        ids = sorted((i for i, b in enumerate(vocab) if b), key=vocab.__getitem__)
        length = np.array([len(vocab[i]) for i in ids])
        text = np.frombuffer(b"".join(vocab[i] for i in ids), np.uint8)
        start, node, prefix = np.cumsum(length) - length, np.zeros(len(ids), int), np.arange(len(ids))
        byte, parent, of, total = [np.zeros(1, np.uint8)], [np.zeros(1, int)], np.zeros(len(ids), int), 1
        for depth in range(int(length.max(initial=0))):  # sorted strings: equal prefixes are neighbours
            prefix = prefix[length[prefix] > depth]
            b, above = text[start[prefix] + depth], node[prefix]
            new = np.r_[True, (b[1:] != b[:-1]) | (above[1:] != above[:-1])]
            node[prefix] = total + np.cumsum(new) - 1
            byte.append(b[new])
            parent.append(above[new])
            total += int(new.sum())
            ending = prefix[length[prefix] == depth + 1]
            of[ending] = node[ending]
        self.byte, parent = np.concatenate(byte), np.concatenate(parent)
        self.first = 1 + np.searchsorted(parent[1:], np.arange(total + 1))
        order = np.argsort(of, kind="stable")
        self.ids, self.ends = np.array(ids, int)[order], np.searchsorted(of[order], np.arange(total + 1))


def ranges(starts, ends):
    """The integers of all ranges starts[i]..ends[i], in a row."""
    n = ends - starts
    return np.arange(n.sum()) + np.repeat(starts - np.cumsum(n) + n, n)


def union(parts, n):
    """The sorted union of arrays of integers below n; marks are ten times as fast as np.unique here."""
    marks = np.zeros(n, bool)
    for part in parts:
        marks[part] = True
    return np.flatnonzero(marks)


class Cell:
    """A stack: a state of the automaton over the stack it returns to. One object a stack, so equality is identity."""

    __slots__ = "state", "parent", "kids", "least"

    def __init__(self, state, parent, least):
        self.state, self.parent, self.kids, self.least = state, parent, {}, least  # least: bytes to the end


class Config:
    """A set of stacks: where a prefix can be. `next`, `after`, `mask` remember what was asked of it."""

    __slots__ = "cells", "accepts", "least", "next", "after", "mask"

    def __init__(self, cells, accepts):
        self.cells, self.accepts = cells, accepts  # accepts: the text can end here
        self.least = 0 if accepts else min((cell.least for cell in cells), default=-1)  # bytes to the end; -1: after it
        self.next, self.after, self.mask = {}, {}, None  # by class of bytes; by token id


class Engine:
    """Masks of one grammar over one vocabulary; its memory is shared by every `Constraint` on it.

    Rules become one automaton of byte sets, silent moves and calls. A token's effect on the stack (q, parent) depends
    on the parent only after q's frame has returned, so the walk of the trie is made for a frame alone: `frame(q, N)`
    from the set N of trie nodes gives the tokens that end inside it and the nodes where it returns. The mask of a stack
    is the union along its frames until nothing returns; frames are finitely many, so that after a warm-up no walk
    happens at any depth of nesting. ValueError: a rule that derives nothing, that can call itself before it has read a
    byte, or a byte that the vocabulary lacks.
    """

    def __init__(self, grammar, trie, eos=None, cache_mb=64):
        self.trie, self.eos, self.limit = trie, eos, cache_mb * 2**20
        self.silent, self.arcs, self.calls = [], [], []  # by state: states; (bytes, state); (rule, state to return to)
        self.ends = {rule: (self.state(), self.state()) for rule in grammar}
        self.final = {end for _, end in self.ends.values()}
        for rule, tree in grammar.items():
            self.build(tree, *self.ends[rule])
        self.least = self.shortest()
        self.check()
        self.trim()
        known = {}  # bytes that no arrow tells apart are one class
        kinds = list({kind for arcs in self.arcs for kind, _ in arcs})
        self.class_of = [known.setdefault(tuple(b in kind for kind in kinds), len(known)) for b in range(256)]
        self.node_class, self.n_classes = np.array(self.class_of)[trie.byte], len(known)
        self.moves = [{} for _ in self.arcs]  # state -> class -> states
        for moves, arcs in zip(self.moves, self.arcs):
            for kind, t in arcs:
                for c in {self.class_of[b] for b in kind}:
                    moves.setdefault(c, []).append(t)
        self.bottom, self.entered = Cell(-1, None, 0), {}  # below every stack; state -> its `closure`
        self.done = Config((), False)  # after the end: nothing more
        self.done.mask = np.zeros(trie.n_vocab, bool)
        self.forget()

    def state(self):
        """A new state of the automaton."""
        for column in self.silent, self.arcs, self.calls:
            column.append([])
        return len(self.arcs) - 1

    def build(self, tree, start, end):
        """Adds the paths of a tree from `start` to `end` (Thompson's construction)."""
        kind, body = tree[:2]
        if kind in ("byte", "rule"):
            (self.arcs if kind == "byte" else self.calls)[start].append((body, end))
        elif kind == "alt":
            for branch in body:
                self.build(branch, start, end)
        else:
            least, most = tree[2:] or (0, 0)
            for part in body if kind == "seq" else [body] * least:
                to = self.state()
                self.build(part, start, to)
                start = to
            for _ in range((least if most is None else most) - least):
                self.silent[start].append(end)
                to = self.state()
                self.build(body, start, to)
                start = to
            if most is None:
                loop, back = self.state(), self.state()
                self.silent[start].append(loop)
                self.build(body, loop, back)
                self.silent[back].append(loop)
                start = loop
            self.silent[start].append(end)

    def shortest(self):
        """The fewest bytes from each state to the end of its rule (inf: it can't be reached): a fixpoint."""
        least, old = [0 if s in self.final else np.inf for s in range(len(self.arcs))], None
        while least != old:
            old = list(least)
            for s in range(len(least)):
                ways = [least[t] for t in self.silent[s]] + [1 + least[t] for _, t in self.arcs[s]]
                ways += [least[self.ends[rule][0]] + least[t] for rule, t in self.calls[s]]
                least[s] = min(ways, default=least[s])
        return least

    def check(self):
        """Every rule derives a string, and none can call itself before it has read a byte; else ValueError."""
        first = {}
        for rule, (start, _) in self.ends.items():
            if self.least[start] == np.inf:
                raise ValueError(f"rule {rule} is unproductive: it derives no string")
            todo, first[rule] = [start], {}
            for s in todo:  # grows
                first[rule] |= dict(self.calls[s])
                found = self.silent[s] + [t for callee, t in self.calls[s] if not self.least[self.ends[callee][0]]]
                todo += [t for t in found if t not in todo]
        for rule in first:
            paths, seen = [[rule]], set()
            for path in paths:  # grows
                for callee in first[path[-1]]:
                    if callee == rule:
                        raise ValueError(f"left recursion: {' -> '.join([*path, rule])}")
                    if callee not in seen:
                        seen.add(callee)
                        paths.append([*path, callee])

    def trim(self):
        """Leaves what the vocabulary can spell: no arrow of a byte that no token has, none to where no end is reached.

        ValueError if nothing is left, or if a byte is spelled inside longer tokens only: a prefix could then be right
        and yet have no token to go on with.
        """
        single = {self.trie.vocab[i][0] for i in self.trie.single}
        need = {b for arcs in self.arcs for kind, _ in arcs for b in kind}
        lacking = ", ".join(repr(bytes([b])) for b in sorted(need - single)[:8])
        if need & {*self.trie.byte[1:].tolist()} - single:
            raise ValueError(f"the vocabulary has no token for the byte {lacking}, which the grammar needs")
        for s, arcs in enumerate(self.arcs):
            self.arcs[s] = [(kind & single, t) for kind, t in arcs if kind & single]
        self.least = self.shortest()
        alive = lambda t: self.least[t] < np.inf
        if not alive(self.ends["root"][0]):
            raise ValueError(f"the vocabulary has no token for the byte {lacking}: it can spell no text of the grammar")
        for s in range(len(self.arcs)):
            self.arcs[s] = [(kind, t) for kind, t in self.arcs[s] if alive(t)]
            self.silent[s] = [t for t in self.silent[s] if alive(t)]
            self.calls[s] = [(rule, t) for rule, t in self.calls[s] if alive(t) and alive(self.ends[rule][0])]

    def forget(self):
        """Empties every cache. Constraints keep the configurations they stand on: no mask changes."""
        self.bottom.kids = {}
        self.configs, self.frames, self.unions, self.sets, self.size = {}, {}, {}, {}, 0
        self.start = self.config([(self.ends["root"][0], self.bottom)])

    def closure(self, state):
        """What entering `state` leads to without a byte: stacks (top first) that read one next; can its rule end?"""
        if state not in self.entered:
            todo, seen = [(state,)], {(state,)}
            for stack in filter(None, todo):  # grows
                q, rest = stack[0], stack[1:]
                found = [(t, *rest) for t in self.silent[q]] + [rest] * (q in self.final)
                for rule, back in self.calls[q]:  # a call that is the last thing to do needs no frame to return to
                    found.append((self.ends[rule][0], *(() if self.only_ends(back) else (back,)), *rest))
                found = [s for s in dict.fromkeys(found) if s not in seen]
                todo += found
                seen.update(found)
                if len(seen) > 20000:
                    raise ValueError("the grammar is too ambiguous: one state opens more than 20,000 stacks")
            self.entered[state] = [stack for stack in todo if stack and self.arcs[stack[0]]], () in seen
        return self.entered[state]

    def only_ends(self, q):
        """Whether the only way on from q is the end of its rule."""
        on = self.silent[q]
        return q in self.final or not self.arcs[q] + self.calls[q] and len(on) == 1 and self.only_ends(on[0])

    def enter(self, state, parent, cells):
        """Adds to `cells` where a byte can be read after entering `state` over `parent`. Can the whole stack end?"""
        while True:
            stacks, ends = self.closure(state)
            for stack in stacks:
                cell = parent
                for q in reversed(stack):
                    if q not in cell.kids:
                        cell.kids[q] = Cell(q, cell, cell.least + self.least[q])
                    cell = cell.kids[q]
                cells.add(cell)
            if not ends or parent is self.bottom:
                return ends
            state, parent = parent.state, parent.parent

    def config(self, entries):
        """The configuration after entering each (state, parent), one object for equal ones; None without entries."""
        cells = set()
        accepts = any([self.enter(state, parent, cells) for state, parent in entries])
        key = frozenset(cells), accepts
        if entries and key not in self.configs:
            self.configs[key] = Config(tuple(cells), accepts)
            self.size += 1000  # bytes, about: with its cells and dictionaries
        return self.configs[key] if entries else None

    def step(self, config, c):
        """The configuration after a byte of class c; None if no stack can read it."""
        if c not in config.next:
            to = [(state, cell.parent) for cell in config.cells for state in self.moves[cell.state].get(c, ())]
            config.next[c] = self.config(to)
        return config.next[c]

    def read(self, config, text):
        """The configuration after bytes; None where they leave the language."""
        for b in text:
            config = self.step(config, self.class_of[b])
            if config is None:
                return None
        return config

    def frame(self, state, nodes):
        """Tokens that end while the frame of `state` lives, from trie nodes on; nodes where it returns (None: none).

        Returns (packed mask (V / 8,), nodes). Remembered by state and set of nodes; `nodes` must come from `interned`.
        """
        key = state, id(nodes)
        if key in self.frames:
            return self.frames[key]
        trie, frontier = self.trie, {self.config([(state, self.bottom)]): [nodes]}
        reached, returned = [], [nodes] * next(iter(frontier)).accepts
        while frontier:
            below = {}
            for config, parts in frontier.items():
                at = parts[0] if len(parts) == 1 else union(parts, len(trie.byte))
                kids = ranges(trie.first[at], trie.first[at + 1])
                classes = self.node_class[kids]
                targets, row = {}, np.zeros(self.n_classes, np.int16)
                for c in np.flatnonzero(np.bincount(classes)).tolist():
                    row[c] = targets.setdefault(self.step(config, c), len(targets))
                to = row[classes]
                for target, i in targets.items():
                    if target is not None:
                        part = kids if len(targets) == 1 else np.compress(to == i, kids)
                        reached.append(part)
                        below.setdefault(target, []).append(part)
                        returned += [part] * target.accepts
            frontier = below
        hit, mask = union(reached, len(trie.byte)), np.zeros(trie.n_vocab, bool)
        mask[trie.ids[ranges(trie.ends[hit], trie.ends[hit + 1])]] = True
        mask = self.interned(np.packbits(mask, bitorder="little"))
        self.frames[key] = mask, self.interned(union(returned, len(trie.byte))) if returned else None
        return self.frames[key]

    def interned(self, array):
        """One object for arrays of equal content."""
        key = array.dtype.char, array.tobytes()
        if key not in self.sets:
            self.sets[key] = array
            self.size += 2 * array.nbytes
        return self.sets[key]

    def mask(self, config):
        """Bool (V,), read-only, shared: ids that keep the text a prefix of the language; `eos` where it is complete."""
        if config.mask is None:
            if self.size > self.limit:
                self.forget()
            root = self.interned(np.zeros(1, int))
            todo, seen, masks = [(cell.state, cell.parent, root) for cell in config.cells], set(), {}
            for state, parent, nodes in todo:  # grows
                tokens, returned = self.frame(state, nodes)
                masks[id(tokens)] = tokens
                if returned is not None and parent is not self.bottom and (parent, id(returned)) not in seen:
                    seen.add((parent, id(returned)))
                    todo.append((parent.state, parent.parent, returned))
            key = frozenset(masks), config.accepts
            if key not in self.unions:
                bits = np.bitwise_or.reduce(list(masks.values()) or [np.zeros(-(-self.trie.n_vocab // 8), np.uint8)])
                mask = np.unpackbits(bits, count=self.trie.n_vocab, bitorder="little").astype(bool)
                if self.eos is not None and config.accepts:
                    mask[self.eos] = True
                mask.flags.writeable = False
                self.unions[key] = self.interned(mask)
            config.mask = self.unions[key]
        return config.mask


class Constraint:
    """A text that grows token by token inside a language.

    grammar  EBNF text with a start rule `root`, a parsed grammar, or another Constraint's `engine` to share caches
    vocab    list of bytes per id, None for specials (a `Trie` to share it)
    eos      id allowed exactly where the text is complete
    proper   keep to the sequences that the tokenizer itself would return: True for plain BPE whose ids are ranks, or
             another tau(bytes) -> ids of which pairs decide (`is_local`; with a pre-tokenizer they do not quite); an
             id is also refused if no proper sequence can finish after it
    """

    def __init__(self, grammar, vocab=None, eos=None, proper=False, cache_mb=64):
        if not isinstance(grammar, Engine):
            trie = vocab if isinstance(vocab, Trie) else Trie(vocab)
            if eos is not None and not 0 <= eos < trie.n_vocab:
                raise ValueError(f"eos {eos} is out of range, allowed: 0 to {trie.n_vocab - 1}")
            grammar = Engine(parse_ebnf(grammar) if isinstance(grammar, str) else grammar, trie, eos, cache_mb)
        self.engine, self.state, self.past = grammar, grammar.start, []
        self.vocab, self.eos, self.ids = grammar.trie.vocab, grammar.eos, []
        self.proper = Proper(grammar, proper) if proper and not isinstance(proper, Proper) else proper or None

    def mask(self):
        """Bool (V,), read-only: the ids that may come next."""
        if self.proper:
            return self.proper.mask(self.state, self.ids[-1] if self.ids else None)
        return self.state.mask if self.state.mask is not None else self.engine.mask(self.state)

    def advance(self, id):
        """Takes one id. ValueError, saying why, if the mask refuses it."""
        after = self.state.after.get(id)
        if after is None or self.proper:
            after = self.peek(id)
            if after is None or self.proper and not self.mask()[id]:
                raise ValueError(self.explain(id))
            self.state.after[id] = after
            self.engine.size += 100
        self.past.append(self.state)
        self.ids.append(id)
        self.state = after

    def peek(self, id):
        """The configuration after an id; None if it is refused. ValueError if it is out of range."""
        if not 0 <= id < len(self.vocab):
            raise ValueError(f"id {id} is out of range, allowed: 0 to {len(self.vocab) - 1}")
        if id == self.eos:
            return self.engine.done if self.state.accepts else None
        return self.engine.read(self.state, self.vocab[id]) if self.vocab[id] else None

    def rollback(self, n=1):
        """Takes the last n ids back."""
        if not 0 <= n <= len(self.past):
            raise ValueError(f"rollback of {n} ids, allowed: 0 to {len(self.past)}")
        if n:
            self.state = self.past[-n]
            del self.past[-n:], self.ids[-n:]

    def accepts(self):
        """Whether the text so far is complete."""
        return self.state.accepts

    def explain(self, id):
        """Why an id is refused: the byte where the last stack dies, and what was expected there."""
        state, piece = self.state, self.vocab[id]
        if id == self.eos:
            return f"id {id} (end): " + ("allowed" if state.accepts else f"the text needs {state.least} bytes more")
        if not piece:
            return f"id {id} spells nothing: never allowed"
        for i in range(len(piece)):
            if self.engine.read(state, piece[i : i + 1]) is None:
                wanted = {b for cell in state.cells for kind, _ in self.engine.arcs[cell.state] for b in kind}
                lows, highs = ([b for b in sorted(wanted) if b + side not in wanted] for side in (-1, 1))
                wanted = " ".join("-".join(repr(bytes([b]))[1:] for b in sorted({*ends})) for ends in zip(lows, highs))
                byte, wanted = piece[i : i + 1], wanted or "the end of the text"
                return f"id {id} {piece!r}: refused at its byte {i}, {byte!r}; expected: {wanted}"
            state = self.engine.read(state, piece[i : i + 1])
        ok = not self.proper or self.mask()[id]
        return f"id {id} {piece!r}: " + ("allowed" if ok else "in the language, but no proper tokenization goes on so")


class Proper:
    """Masks of P(L) = E(L) with tau(h(t)) = t, for plain BPE: properness is a matter of neighbours (see `is_local`).

    The plain intersection has dead ends: an id may be a proper successor and leave no proper way to finish. So an id
    is also asked for a witness, a search (nearest end first) for a way to finish; where the budget ends the search,
    the id is allowed and counted in `undecided`.
    """

    def __init__(self, engine, tau=True, budget=3000):
        self.engine, self.vocab, self.budget, self.undecided = engine, engine.trie.vocab, budget, 0
        self.tau = partial(bpe, {b: i for i, b in enumerate(self.vocab) if b}) if tau is True else tau
        self.pairs, self.alive, self.masks = {}, {}, {}

    def follows(self, last, id):
        """Whether `id` may stand after `last` (None: at the start) in a proper sequence."""
        if (last, id) not in self.pairs:
            ids = [id] if last is None else [last, id]
            self.pairs[last, id] = list(self.tau(b"".join(self.vocab[i] for i in ids))) == ids
        return self.pairs[last, id]

    def successors(self, config, last):
        """(id, configuration) of the proper, not necessarily live, next tokens."""
        for id in np.flatnonzero(self.engine.mask(config)).tolist():
            if id != self.engine.eos and self.follows(last, id):
                yield id, self.engine.read(config, self.vocab[id])

    def live(self, config, last):
        """Whether a proper sequence can go on from here to the end of a text of the language."""
        start = config, last
        if start in self.alive:
            return self.alive[start]
        came, queue = {start: None}, [(config.least, 0, start)]
        while queue and len(came) <= self.budget:
            here = heapq.heappop(queue)[2]
            if here[0].accepts or self.alive.get(here):
                while here:  # all on the way are live
                    self.alive[here], here = True, came[here]
                return True
            for id, after in self.successors(*here):
                key = after, id
                if key not in came and self.alive.get(key) is not False:
                    came[key] = here
                    heapq.heappush(queue, (after.least, len(came), key))
        self.undecided += bool(queue)
        self.alive |= {start: True} if queue else dict.fromkeys(came, False)
        return self.alive[start]

    def mask(self, config, last):
        """Bool (V,): ids after which a proper sequence of the language can still end; eos where it may end now."""
        if (config, last) not in self.masks:
            mask = np.zeros(self.engine.trie.n_vocab, bool)
            for id, after in self.successors(config, last):
                mask[id] = self.live(after, id)
            if self.engine.eos is not None and config.accepts:
                mask[self.engine.eos] = True
            self.masks[config, last] = mask
        return self.masks[config, last]


def masker(make, max_new_tokens=np.inf):
    """A `process` for `generate`: rows of a batch under a Constraint each (`make()`), sharing its engine's caches.

    With `max_new_tokens` the text is complete in time: near the end only ids stay that leave enough tokens to close it
    (a byte is a token, so as many ids as bytes suffice), among the likeliest 64 and the single bytes. The end begins
    some 160 tokens before it: a text of `max_new_tokens` below that is so restricted all along.
    """
    rows = {}

    def process(logits, alive, out):
        allowed = torch.zeros(logits.shape, dtype=torch.bool)
        for i, prompt in enumerate(alive):
            c = rows[prompt] = rows.get(prompt) or make()
            for id in out[prompt][len(c.ids) :]:
                c.advance(id)
            mask, left = torch.tensor(c.mask()), max_new_tokens - len(c.ids) - 1  # left after this one, eos included
            if left < 2 * c.state.least + 160:
                row = logits[i, : len(mask)].masked_fill(~mask.to(logits.device), -torch.inf)
                near = [*row.topk(min(64, len(mask))).indices.tolist(), *c.engine.trie.single, c.eos]
                near = [j for j in near if mask[j] and c.peek(j).least < left]  # each byte a token, then eos
                mask = torch.zeros_like(mask).index_fill(0, torch.tensor(near, dtype=torch.long), True)
            allowed[i, : len(mask)] = mask
        return logits.masked_fill(~allowed.to(logits.device), -torch.inf)

    return process


# ------------------------------------------------------------------------------------------------ tokenizers, theorems


def merged(ranks, parts):
    """The parts of a text after every merge of neighbours, that of lowest rank first; `ranks` {bytes: id}."""
    parts = list(parts)
    while len(parts) > 1:
        rank, i = min((ranks.get(a + b, np.inf), i) for i, (a, b) in enumerate(zip(parts, parts[1:])))
        if rank == np.inf:
            break
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    return parts


def bpe(ranks, text):
    """tau of plain BPE: the ids of `text`."""
    return [ranks[part] for part in merged(ranks, [text[i : i + 1] for i in range(len(text))])]


def learn_bpe(texts, alphabet, merges):
    """A vocabulary: the bytes of `alphabet`, then the most frequent pair of neighbours, again and again."""
    vocab, words = [bytes([b]) for b in alphabet], [[bytes([b]) for b in text] for text in texts]
    for _ in range(merges):
        pairs = Counter(pair for word in words for pair in zip(word, word[1:]))
        vocab.append(b"".join(max(sorted(pairs), key=pairs.get)))
        words = [merged({b: i for i, b in enumerate(vocab)}, word) for word in words]
    return vocab


def random_merges(rng, alphabet, n):
    """A vocabulary of n merges drawn at random."""
    vocab = [bytes([b]) for b in alphabet]
    for _ in range(n):
        vocab.append(b"".join(vocab[i] for i in rng.integers(0, len(vocab), 2)))
    return list(dict.fromkeys(vocab))


def counts(text, vocab):
    """c_0..c_n: the number of token sequences that spell each prefix of `text`; c_n is that of the whole [T]."""
    c, longest = [1], max(map(len, vocab))
    for j in range(1, len(text) + 1):
        c.append(sum(c[i] for i in range(max(0, j - longest), j) if text[i:j] in vocab))
    return c


def uniform(text, ids, rng):
    """One of the token sequences that spell `text`, uniformly; `ids` {bytes: id}. Backward through `counts`."""
    c, j, out, longest = counts(text, ids), len(text), [], max(map(len, ids))
    while j:
        pick = rng.random() * c[j]
        for i in range(max(0, j - longest), j):
            pick -= c[i] if text[i:j] in ids else 0
            if pick < 0:
                break
        out.append(ids[text[i:j]])
        j = i
    return out[::-1]


def lift(engine):
    """The lifted automaton over tokens of a regular grammar [P]: table (Q, V) of states, -1 dead; accepting (Q,).

    The states are those of the automaton over bytes; d'(q, t) = d*(q, h(t)). State 0 is the start.
    """
    number, table = {None: -1, engine.start: 0}, []
    order = [engine.start]
    for config in order:  # grows
        row = [engine.read(config, b) for b in engine.trie.vocab]
        new = [after for after in dict.fromkeys(row) if after not in number]
        number |= zip(new, range(len(order), len(order) + len(new)))
        order += new
        table.append([number[after] for after in row])
    return np.array(table), np.array([config.accepts for config in order])


def runs(table, accepting, ids):
    """Whether the automaton accepts the ids."""
    q = 0
    for i in ids:
        q = table[q][i] if q >= 0 else -1
    return bool(q >= 0 and accepting[q])


def check_homomorphism(decode, ids, rng, encode=None, texts=(), trials=2000):
    """Is decode(uv) = decode(u) decode(v) for pairs of `ids` (or ids below a number)? Is decode(encode(s)) = s?

    Returns {"homomorphism", "lossless", "pair": the first ids that refute it, "cause"}.
    """
    found = {"homomorphism": True, "lossless": True, "pair": None, "cause": ""}
    for a, b in rng.choice(ids, (trials, 2)).tolist():
        parts, whole = decode([a]) + decode([b]), decode([a, b])
        if parts != whole:
            cause = "a code that depends on position"
            if "\ufffd" in parts:
                cause = "replacement decoding: tokens end inside a character; decode to bytes"
            elif parts.replace(" ", "") == whole.replace(" ", ""):
                cause = "spaces stripped or put between tokens; use the raw pieces"
            return found | {"homomorphism": False, "pair": [a, b], "cause": cause}
    for text in texts:
        back = decode(encode(text))
        if back != text:
            cause = "lower-casing" if back == text.lower() else "normalisation or an unknown character"
            return found | {"lossless": False, "cause": cause}
    return found


def is_local(tau, vocab, length=3):
    """Sequences (all of `length` ids) for which "proper" and "every token and pair is proper" differ, and how many."""
    proper = lambda ids: tau(b"".join(vocab[i] for i in ids)) == list(ids)
    ids = [i for i in range(len(vocab)) if proper((i,))]
    pairs = {p: proper(p) for p in product(ids, repeat=2)}
    bad = [t for t in product(ids, repeat=length) if proper(t) != all(pairs[p] for p in zip(t, t[1:]))]
    return len(bad), len(ids) ** length


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
        if kind == "byte":
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


def random_grammar(rng):
    """A grammar of three rules over the bytes abc, productive and without left recursion."""

    def tree(depth):
        kind = rng.choice(["bytes", "set", "rule", "seq", "seq", "alt", "rep"] if depth else ["bytes", "set", "rule"])
        if kind == "bytes":
            return literal(rng.choice(list(b"abc"), rng.integers(0, 3)).tolist())
        if kind == "set":
            return ("byte", frozenset(b"abc"[: rng.integers(3) + 1]))
        if kind == "rule":
            return ("rule", str(rng.choice(["root", "A", "B"])))
        if kind == "rep":
            least = int(rng.integers(2))
            return ("rep", tree(depth - 1), least, [None, least + 1][rng.integers(2)])
        return (str(kind), [tree(depth - 1) for _ in range(rng.integers(1, 4))])

    while True:
        with suppress(ValueError):
            grammar = {name: tree(3) for name in ("root", "A", "B")}
            Engine(grammar, Trie([b"a", b"b", b"c"]))
            return grammar


def differing_bits(rng, grammar, steps=4):
    """On a random walk: wrong bits of the mask, of a mask by first byte, bits compared."""
    words = {bytes(rng.choice(list(b"abc"), rng.integers(2, 5)).tolist()) for _ in range(8)}
    vocab = [b"a", b"b", b"c", *sorted(words), None]
    c, text, found = Constraint(grammar, vocab, eos=len(vocab) - 1), b"", np.zeros(3, int)
    for _ in range(steps):
        mask = c.mask()
        truth = [recognise(grammar, text + b)[0] for b in vocab[:-1]] + [recognise(grammar, text)[1]]
        first = np.array([mask[vocab.index(b[:1])] for b in vocab[:-1]] + [mask[-1]])
        found += (mask != truth).sum(), (first != truth).sum(), len(vocab)
        options = np.flatnonzero(mask[:-1])
        if not len(options):
            break
        c.advance(int(rng.choice(options)))
        text += vocab[c.ids[-1]]
    return found


def dead_ends(rng, grammar, walks=8, steps=12):
    """Random walks that end at an empty proper mask: with liveness, with pairs alone (a search of budget 0); all."""
    vocab, stuck = [*random_merges(rng, b"abc", 5), None], []
    engine = Engine(grammar, Trie(vocab), len(vocab) - 1)
    for proper in Proper(engine), Proper(engine, budget=0):
        stuck.append(0)
        for _ in range(walks):
            c = Constraint(engine, proper=proper)
            while len(c.ids) < steps and c.state is not engine.done:
                options = np.flatnonzero(c.mask())
                if not len(options):
                    stuck[-1] += bool(c.ids)  # at the start: no text of the language at all
                    break
                c.advance(int(rng.choice(options)))
    return *stuck, walks


def theorems(trials, seed):
    """Every theorem checked by brute force, each beside a code for which it fails: a dict of counts."""
    rng, found, vocab = np.random.default_rng(seed), {}, [b"a", b"b", b"ab", b"ba"]
    lifted = lift(Engine(parse_regex("(ab)*"), Trie(vocab)))
    strings = [t for n in range(7) for t in product(range(4), repeat=n)]
    truth = [re.fullmatch(b"(ab)*", b"".join(vocab[i] for i in t)) is not None for t in strings]
    found["lift_wrong"] = sum(runs(*lifted, t) != x for t, x in zip(strings, truth))
    found["lift_strings"] = len(strings)
    # the control: the id of a character is swapped at random positions; is there any automaton of that size for it?
    swap = rng.permutation([0, 0, 1, 1, 0, 1])
    code = {tuple(int("ab".index(c)) ^ int(swap[i]) for i, c in enumerate("ab" * n)) for n in range(4)}
    binary = [t for n in range(7) for t in product(range(2), repeat=n)]
    automata = ([cells[:2], cells[2:]] for cells in product((-1, 0, 1), repeat=4))
    found["scrambled_lift_wrong"] = min(sum((t in code) != runs(a, [True, False], t) for t in binary) for a in automata)

    ranks = {b: i for i, b in enumerate(vocab)}
    texts = [bytes(t) for n in range(11) for t in product(b"ab", repeat=n)]
    proper = [tuple(bpe(ranks, t)) for t in texts]
    found["proper_collisions"] = len(texts) - len(set(proper))
    found["extended_collisions"] = sum(counts(t, ranks)[-1] - 1 for t in texts)
    found["round_trip_wrong"] = sum(b"".join(vocab[i] for i in ids) != t for ids, t in zip(proper, texts))

    words = re.compile(rb" +(?![^ ])| ?[^ ]+| +")  # a pre-tokenizer
    local = np.zeros(3, int)
    for _ in range(trials):
        vocab = random_merges(rng, b"ab ", 6)
        tau = partial(bpe, {b: i for i, b in enumerate(vocab)})
        split = lambda text, tau=tau: [i for word in words.findall(text) for i in tau(word)]
        local += *is_local(tau, vocab), is_local(split, vocab)[0]
    found |= zip(("local_violations", "local_checks", "pretokenized_violations"), local.tolist())
    bits = sum(differing_bits(rng, random_grammar(rng)) for _ in range(trials))
    found |= zip(("mask_bits_wrong", "first_byte_bits_wrong", "mask_bits"), bits.tolist())
    stuck = sum(np.array(dead_ends(rng, random_grammar(rng))) for _ in range(trials))
    return found | dict(zip(("dead_ends", "dead_ends_by_pairs", "proper_walks"), stuck.tolist()))


def toy_tokenizers(rng):
    """name -> (decode, V, encode, texts): six tokenizers, of which three decode by no homomorphism and one is lossy."""
    text, words, raw = ["()[]", "([])"], ["▁Hello", "▁World", "▁"], [b"\xe4\xbd", b"\xa0", b"a"]
    ranks = {b: i for i, b in enumerate([b"(", b")", b"[", b"]", b"()", b"[]"])}
    pieces, swaps = [b.decode() for b in ranks], np.stack([rng.permutation(4) for _ in range(8)])
    spell = lambda ids: "".join(pieces[i] for i in ids)
    return {
        "char": (spell, 4, lambda t: ["()[]".index(c) for c in t], text),
        "bpe": (spell, 6, lambda t: bpe(ranks, t.encode()), text),
        "stripped space": (lambda ids: "".join(words[i] for i in ids).replace("▁", " ").lstrip(" "), 3),
        "lower-casing": (lambda ids: "".join("ab"[i] for i in ids), 2, lambda t: [int(c in "bB") for c in t], ["aB"]),
        "replacement": (lambda ids: b"".join(raw[i] for i in ids).decode(errors="replace"), 3),
        "scramble": (lambda ids: "".join("()[]"[swaps[j][i]] for j, i in enumerate(ids)), 4),
    }


# ------------------------------------------------------------------------------------------------ the learnability toy

ALPHABET, DEPTH, LONGEST = "()[]", 6, 40


def dyck(rng, n, deepest):
    """A balanced string of n brackets of two kinds, nested at most `deepest` deep: uniform over open or close."""
    out, open_ = "", []
    for left in range(n, 0, -1):
        moves = [True] * (len(open_) < min(deepest, left - 1)) + [False] * bool(open_)
        if moves[rng.integers(len(moves))]:
            open_.append(int(rng.integers(2)))
            out += "(["[open_[-1]]
        else:
            out += ")]"[open_.pop()]
    return out


def strings(rng, n, beyond=False):
    """n strings of the training range (8 to 40 long, at most 6 deep), or of 42 to 80 that are 7 to 12 deep."""
    out, (low, high, deepest) = [], (42, 80, 12) if beyond else (8, LONGEST, DEPTH)
    while len(out) < n:
        s = dyck(rng, 2 * int(rng.integers(low // 2, high // 2 + 1)), deepest)
        if not beyond or depth_of(s) > DEPTH:
            out.append(s)
    return out


def depth_of(s):
    """The deepest nesting of a string."""
    return max(np.cumsum([1 if c in "([" else -1 for c in s]))


def twin(rng, s):
    """The same string with the kind of one closing bracket flipped: as long, as deep, not in the language."""
    i = rng.choice([i for i, c in enumerate(s) if c in ")]"])
    return s[:i] + {")": "]", "]": ")"}[s[i]] + s[i + 1 :]


class Code:
    """How an arm spells a string: `encode(s, rng)` -> ids. `vocab` is the bytes per id, None for bos and eos."""

    def __init__(self, arm, seed, merges):
        rng, pieces = np.random.default_rng((seed, 1)), [c.encode() for c in ALPHABET]
        if arm in ("bpe", "extended"):
            pieces = learn_bpe([s.encode() for s in strings(rng, 200)], ALPHABET.encode(), merges)
        self.arm, self.ranks, self.vocab = arm, {b: i for i, b in enumerate(pieces)}, [*pieces, None, None]
        self.swaps = np.stack([rng.permutation(4) for _ in range(2 * LONGEST)])
        self.bos, self.eos = len(pieces), len(pieces) + 1

    def encode(self, s, rng, arm=""):
        """The ids of a string between bos and eos, as this arm or another one spells it."""
        arm = arm or self.arm
        if arm == "scramble":
            ids = [int(self.swaps[i, ALPHABET.index(c)]) for i, c in enumerate(s)]
        else:
            ids = uniform(s.encode(), self.ranks, rng) if arm == "extended" else bpe(self.ranks, s.encode())
        return [self.bos, *ids, self.eos]

    def spell(self, ids):
        """The string of ids."""
        ids = [i for i in ids if i < self.bos]
        if self.arm == "scramble":
            return "".join(ALPHABET[self.swaps[i].tolist().index(x)] for i, x in enumerate(ids[: 2 * LONGEST]))
        return b"".join(self.vocab[i] for i in ids).decode()


def padded(rows, eos):
    """Inputs and targets (B, T) of id lists; targets beyond the end are -100."""
    longest = max(map(len, rows))
    idx = torch.tensor([row + [eos] * (longest - len(row)) for row in rows])
    ends = torch.tensor([[len(row)] for row in rows])
    return idx[:, :-1], idx[:, 1:].masked_fill(torch.arange(1, longest) >= ends, -100)


def config_of(args, code):
    """The toy's shape."""
    return GPTConfig(len(code.vocab), 2 * LONGEST + 2, 2, 4, args.n_embd, learned_pos=True)


def train_arm(args, arm, seed, position):
    """Trains one GPT on the strings as this arm spells them; returns its measures. Strings depend on seed and step."""
    env, code = common.setup(args), Code(arm, seed, args.merges)
    torch.manual_seed(seed)
    model = GPT(config_of(args, code))

    def batch(step):
        rng = np.random.default_rng((seed, 2, step))
        rows = [code.encode(s, rng) for s in strings(rng, args.batch_size)]
        return dict(zip(("idx", "targets"), padded(rows[env.rank :: env.world], code.eos)))

    texts = strings(np.random.default_rng((seed, 3)), args.samples)
    evaluate = lambda step: {"pairs": pair_accuracy(model, code, texts[:64], np.random.default_rng(4))}
    common.train(model, batch, args, env, common.Log(args.out, f"{arm}-s{seed}", env), evaluate, position)
    return measure(model.eval(), code, texts, args.samples, seed)


@torch.no_grad()
def log_p(model, code, texts, rng, arm=""):
    """Log probability of each string as this arm spells it."""
    device = model.wte.weight.device
    idx, targets = padded([code.encode(s, rng, arm) for s in texts], code.eos)
    return -model.token_loss(idx.to(device), targets.to(device)).sum(1).cpu()


def pair_accuracy(model, code, texts, rng, arm=""):
    """Share of strings that are likelier than their twin (chance .5); random spellings are averaged over four."""
    twins, draws = [twin(rng, s) for s in texts], 4 if (arm or code.arm) == "extended" else 1
    gap = sum(log_p(model, code, texts, rng, arm) - log_p(model, code, twins, rng, arm) for _ in range(draws))
    return float((gap > 0).float().mean())


def measure(model, code, texts, n, seed):
    """What a trained arm can do: recognition by depth; of n samples, valid ones with and without masks, improper ones;
    how far masked samples are from valid free ones (total variation of their lengths, beside halves of the free)."""
    rng = np.random.default_rng((seed, 5))
    far = strings(rng, n, beyond=True)
    result = {"in_range": pair_accuracy(model, code, texts, rng), "beyond": pair_accuracy(model, code, far, rng)}
    groups = {d: [s for s in texts + far if depth_of(s) == d] for d in range(1, 13)}
    result["by_depth"] = {str(d): pair_accuracy(model, code, g, rng) for d, g in groups.items() if len(g) > 4}
    engine = Engine(parse_ebnf(GRAMMARS["dyck"]), Trie([c.encode() for c in ALPHABET]))
    in_dyck = lambda s: bool((end := engine.read(engine.start, s.encode())) and end.accepts)
    valid = lambda rows: [row for row in rows if row[-1] == code.eos and in_dyck(code.spell(row))]
    draw = lambda process=None: generate(
        model, [[code.bos]] * n, LONGEST + 8, stop=[code.eos], seed=seed, process=process
    )
    free = draw()
    result["valid"] = len(valid(free)) / n
    if code.arm == "scramble":  # there is no mask without a map from ids to strings
        return result
    trie = Trie(code.vocab)
    masks = Constraint(GRAMMARS["dyck"], trie, code.eos).engine
    other = Constraint('root ::= ("(" root "]" | "[" root ")")*', trie, code.eos).engine
    proper = Proper(masks, partial(bpe, code.ranks))
    masked, crossed = (draw(masker(lambda e=e: Constraint(e), LONGEST + 8)) for e in (masks, other))
    result |= {"valid_masked": len(valid(masked)) / n, "valid_other_mask": len(valid(crossed)) / n}
    assert result["valid_masked"] == 1.0, "an exact mask let an invalid string through"
    drawn = {"free": free, "valid_masked": masked, "proper": draw(masker(lambda: Constraint(masks, proper=proper)))}
    for key, rows in drawn.items():
        again = [code.encode(code.spell(row), rng, "bpe")[1:-1] for row in rows]
        result[f"improper_{key}"] = float(np.mean([[i for i in r if i < code.bos] != a for r, a in zip(rows, again)]))
    result["leak"] = leak(model, code, masks, texts[:50], rng)
    if len(kept := valid(free)) > 8:
        shares = lambda rows: np.bincount([len(code.spell(r)) // 8 for r in rows], minlength=LONGEST) / len(rows)
        variation = lambda a, b: float(abs(shares(a) - shares(b)).sum() / 2)
        result |= {"distortion": variation(kept, masked), "distortion_noise": variation(kept[::2], kept[1::2])}
    if code.arm in ("bpe", "extended"):
        result["cross"] = pair_accuracy(model, code, texts, rng, "extended" if code.arm == "bpe" else "bpe")
        for key, arm in ("nll_proper", "bpe"), ("nll_extended", "extended"):
            result[key] = float(-log_p(model, code, texts, rng, arm).sum() / sum(map(len, texts)))
    return result


@torch.no_grad()
def leak(model, code, engine, texts, rng):
    """Mean probability that the model gives to ids outside the exact mask, over all prefixes of the strings."""
    out = []
    for s in texts:
        ids, c = code.encode(s, rng), Constraint(engine)
        p = model(torch.tensor([ids[:-1]], device=model.wte.weight.device))[0].float().softmax(-1).cpu().numpy()
        for row, id in zip(p, ids[1:]):
            out.append(1 - row[c.mask()].sum())
            c.advance(id)
    return float(np.mean(out))


# -------------------------------------------------------------------------------------------------------- the verdict
# fmt: off


def judge(run, results, found, kinds):
    """The claims, each beside the control that must fail it; learnt ones by means over seeds."""
    m = lambda arm, key: float(np.mean([r[key] for r in results[arm]]))
    run.claim("T1", "E(L) of a regular L is recognised by the same states, lifted to tokens", "theorem",
              {"wrong": found["lift_wrong"], "strings": found["lift_strings"]},
              {"best automaton for scrambled ids, wrong": found["scrambled_lift_wrong"]},
              "wrong = 0", not found["lift_wrong"], found["scrambled_lift_wrong"] > 0)
    run.claim("T2", "h maps proper sequences one to one onto strings", "theorem",
              {"collisions": found["proper_collisions"], "h(tau(s)) != s": found["round_trip_wrong"]},
              {"extended, collisions": found["extended_collisions"]}, "both 0",
              not found["proper_collisions"] + found["round_trip_wrong"], found["extended_collisions"] > 0)
    run.claim("T3", "plain BPE: a sequence is proper iff its tokens and pairs are", "not in the paper",
              {"violations": found["local_violations"], "checks": found["local_checks"]},
              {"with a pre-tokenizer, violations": found["pretokenized_violations"]}, "violations = 0",
              not found["local_violations"], found["pretokenized_violations"] > 0)
    good, bad = ("char", "bpe", "lower-casing"), ("stripped space", "replacement", "scramble")
    run.claim("T4", "check_homomorphism tells homomorphic decoders from others", "detokenization is one",
              {"of 3 homomorphisms": sum(kinds[k]["homomorphism"] for k in good)},
              {"of 3 others": sum(kinds[k]["homomorphism"] for k in bad)}, "all 3",
              all(kinds[k]["homomorphism"] for k in good), not all(kinds[k]["homomorphism"] for k in bad))
    run.claim("M1", "the mask is exact: bits that differ from the definition's, random grammars", "not in the paper",
              {"wrong": found["mask_bits_wrong"], "bits": found["mask_bits"]},
              {"mask by first byte, wrong": found["first_byte_bits_wrong"]}, "wrong = 0",
              not found["mask_bits_wrong"], found["first_byte_bits_wrong"] > 0)
    run.claim("M2", "proper masks lead to no dead end: random walks, random grammars and merges", "not in the paper",
              {"stuck": found["dead_ends"], "walks": found["proper_walks"]},
              {"proper pairs without liveness, stuck": found["dead_ends_by_pairs"]}, "stuck = 0",
              not found["dead_ends"], found["dead_ends_by_pairs"] > 0)
    if not {"char", "bpe", "extended", "scramble"} <= set(results):
        return
    acc = {arm: m(arm, "in_range") for arm in results}
    test = lambda arm: abs(acc["char"] - acc[arm]) <= 0.05 and min(acc["char"], acc[arm]) >= 0.95
    run.claim("L1", "BPE learns the language as characters do (valid above its twin)", "power is unaffected",
              {"char": acc["char"], "bpe": acc["bpe"], "extended": acc["extended"]}, {"scramble": acc["scramble"]},
              "char - arm within .05, both >= .95 (bpe)", test("bpe"),
              not test("scramble") and acc["scramble"] <= acc["char"] - 0.1)
    run.claim("L2", "under the mask every sample is valid", "not in the paper",
              {"masked": m("bpe", "valid_masked"), "free": m("bpe", "valid")},
              {"other grammar's mask": m("bpe", "valid_other_mask")}, "masked = 1",
              m("bpe", "valid_masked") == 1, m("bpe", "valid_other_mask") < 1)
    run.claim("L3", "proper masks: no improper sample", "not in the paper",
              {"improper": m("extended", "improper_proper")}, {"plain mask": m("extended", "improper_valid_masked")},
              "improper = 0", m("extended", "improper_proper") == 0, m("extended", "improper_valid_masked") > 0)
    drop = lambda arm: acc[arm] - m(arm, "cross")
    run.claim("L4", "representable is not learnt: accuracy lost on the other arm's spellings of the same strings",
              "not in the paper", {"trained on proper, lost on random": drop("bpe")},
              {"trained on random, lost on proper": drop("extended")}, "lost >= .1",
              drop("bpe") >= 0.1, drop("extended") < 0.1)


# fmt: on
COLOURS = {"char": "#4477aa", "bpe": "#228833", "extended": "#ccbb44", "scramble": "#ee6677"}


def draw(path, results, logs):
    """Recognition by depth and over training; what masks do; how many tokenizations a string has."""
    mean = lambda rows, key: np.mean([row[key] for row in rows if key in row])
    keys = {"valid": "valid,\nfree", "valid_masked": "valid,\nmasked", "valid_other_mask": "valid,\nother mask"}
    keys |= {"improper_valid_masked": "improper,\nmasked", "improper_proper": "improper,\nproper mask"}
    with common.figure(path, 2, 2) as (depth, steps, masks, growth):
        for i, (arm, seeds) in enumerate(results.items()):
            look, by_depth = {"color": COLOURS[arm], "label": arm}, [r["by_depth"] for r in seeds]
            ds = sorted({d for r in by_depth for d in r}, key=int)
            depth.plot([int(d) for d in ds], [mean(by_depth, d) for d in ds], "o-", ms=3, **look)
            for log in logs[arm]:
                rows = [(r["step"], r["pairs"]) for r in common.read_jsonl(log.path) if "pairs" in r]
                steps.plot(*zip(*rows), lw=1.2, **look)
                look.pop("label", None)
            if arm != "scramble":
                bars = [mean(seeds, key) for key in keys]
                masks.bar(np.arange(len(keys)) + 0.26 * i, bars, 0.26, color=COLOURS[arm], label=arm)
        depth.axvline(DEPTH + 0.5, color="k", ls=":", lw=1)
        depth.text(DEPTH + 0.6, 0.42, "deeper than trained", fontsize=8)
        depth.set(title="Valid string above its twin", xlabel="depth", ylabel="accuracy", ylim=(0.4, 1.02))
        steps.set(title="... in range, over training", xlabel="step", ylabel="accuracy", ylim=(0.4, 1.02))
        masks.set(title="Samples", ylabel="share", ylim=(0, 1.3))
        masks.set_xticks(np.arange(len(keys)) + 0.26, list(keys.values()), fontsize=7)
        code = Code("bpe", 0, 48)
        for s, style in ((dyck(np.random.default_rng(0), LONGEST, DEPTH), "-"), ("()" * 20, "--")):
            growth.semilogy(counts(s.encode(), code.ranks), style, color=COLOURS["bpe"], label=s[:14] + "...")
        growth.set(title="Tokenizations of one string (BPE, 48 merges)", xlabel="characters", ylabel="how many")
        for ax in depth, steps, masks, growth:
            ax.legend(fontsize=7, ncols=3 if ax is masks else 1)


# --------------------------------------------------------------------------------------------------------------- main


def vocabulary(backend):
    """The bytes per id (None: special) of a `tokenizers.Tokenizer`: raw pieces, byte-level or SentencePiece."""
    spec = json.loads(backend.to_str())
    special = {t["id"] for t in spec["added_tokens"]}
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]  # GPT-2's printable stand-ins for bytes
    table = {chr(b): b for b in shown}
    table |= {chr(256 + i): b for i, b in enumerate(b for b in range(256) if b not in shown)}
    level = '"ByteLevel"' in json.dumps([spec["decoder"], spec["pre_tokenizer"]])

    def spell(piece):
        if level:
            return bytes(table[c] for c in piece) if set(piece) <= table.keys() else None
        return bytes.fromhex(piece[3:5]) if re.fullmatch("<0x..>", piece) else piece.replace("▁", " ").encode()

    pieces = [None if i in special else backend.id_to_token(i) for i in range(backend.get_vocab_size())]
    return [None if piece is None else spell(piece) for piece in pieces]


def read_vocab(name):
    """(bytes per id, Tokenizer) of a --tokenizer."""
    tok = data.get_tokenizer(name)
    if name == "byte":
        return [bytes([b]) for b in range(256)] + [None], tok
    if "/" in name or Path(name).exists():
        import tokenizers

        path = Path(name) / "tokenizer.json" if Path(name).is_dir() else name
        return vocabulary(tokenizers.Tokenizer.from_file(str(path))), tok
    import tiktoken

    pieces = {i: b for b, i in tiktoken.get_encoding(name)._mergeable_ranks.items()}
    return [pieces.get(i) for i in range(tok.n_vocab)], tok


def inspect(args, grammar):
    """--tokenizer: is it a homomorphism? The count of --text; the mask of --grammar after it, and --explain."""
    vocab, tok = read_vocab(args.tokenizer)
    real = [i for i, b in enumerate(vocab) if b]
    found = check_homomorphism(tok.decode, real, np.random.default_rng(0), tok.encode, ["Hello World", "née 你好"])
    print(f"{args.tokenizer}: {len(vocab)} ids; decoding to text: {found}; the raw pieces are bytes, so homomorphic")
    c = Constraint(grammar, vocab, vocab.index(None) if None in vocab else None)
    c.state = c.engine.read(c.state, args.text.encode())
    if c.state is None:
        raise ValueError(f"--text {args.text!r} is no prefix of the language of --grammar {args.grammar}")
    ids, many = np.flatnonzero(c.mask()).tolist(), counts(args.text.encode(), {vocab[i] for i in real})[-1]
    some = [vocab[i] for i in ids[:: max(1, len(ids) // 20)] if vocab[i]][:20]
    print(f"{many} tokenizations; {len(ids)} ids allowed next, as {some}; complete: {c.accepts()}")
    if args.explain >= 0:
        c.peek(args.explain)  # in range?
        print(c.explain(args.explain))
    return {"tokenizer": found, "tokenizations": many, "allowed": len(ids), "complete": c.accepts()}


def decode(args, env, grammar, run):
    """--model: answers under the grammar's mask, all in the language; the same prompts without it are the control."""
    import pretrained

    model, tok = pretrained.load(args.model, env.device, args.dtype)
    vocab = vocabulary(tok.backend)
    engine = Engine(grammar, Trie(vocab + [None] * (model.config.vocab_size - len(vocab))), tok.eos)
    prompt = tok.chat([{"role": "user", "content": args.prompt}]) if tok.template else tok.encode(args.prompt)
    shares, texts = {}, {}
    for name in "masked", "free":
        rows = []
        for at in tqdm(range(0, args.samples, 10), name, disable=None):
            process = masker(lambda: Constraint(engine), args.max_new_tokens) if name == "masked" else None
            prompts, seed = [prompt] * min(10, args.samples - at), 1000 * args.seeds[0] + at
            rows += generate(model, prompts, args.max_new_tokens, stop=tok.stops, seed=seed, process=process)
        spelled = [b"".join(engine.trie.vocab[i] or b"" for i in row) for row in rows]
        ends = [row[-1] in tok.stops and engine.read(engine.start, text) for row, text in zip(rows, spelled)]
        shares[name] = float(np.mean([bool(end) and end.accepts for end in ends]))
        texts[name] = [text.decode(errors="replace") for text in spelled]
    print(*texts["masked"][:3], sep="\n")
    run.metrics = {"shares": shares, "texts": texts}
    run.claim("D1", f"{args.model} under the {args.grammar} mask writes nothing else", "not in the paper",
              {"in the language": shares["masked"]}, {"without the mask": shares["free"]}, "all",
              shares["masked"] == 1, shares["free"] < 1)  # fmt: skip


def main(argv=None):
    """The theorems, then the toy; or one of --tokenizer, --model. Returns what it writes to result.json."""
    args = common.parse(Args, argv)
    with common.bad_input():
        env, out = common.setup(args), Path(args.out)
        if odd := set(args.arms) - set(COLOURS):
            raise ValueError(f"--arms {' '.join(odd)}, allowed: {' '.join(COLOURS)}")
        grammar, run = read_grammar(args.grammar), common.Run(args, env, "formal_tokenization", "2412.03160")
        out.mkdir(parents=True, exist_ok=True)
        if args.tokenizer:
            run.metrics = inspect(args, grammar)
            return run.finish()
        if args.model:
            decode(args, env, grammar, run)
            return run.finish()
        for arm, seed in product(args.arms, args.seeds):
            config = config_of(args, Code(arm, seed, args.merges))
            if args.resume:
                common.check_resume(out / f"{arm}-s{seed}.pt", config)
    found, rng = theorems(args.trials, 0), np.random.default_rng(0)
    kinds = {k: check_homomorphism(*toy[:2], rng, *toy[2:], trials=200) for k, toy in toy_tokenizers(rng).items()}
    for name, verdict in kinds.items():
        print(f"{name:15s} {verdict}")
    jobs, tasks = common.job_count(args, env), [(args, arm, seed) for arm in args.arms for seed in args.seeds]
    measured = common.side_by_side(train_arm, [(*task, i % jobs) for i, task in enumerate(tasks)], jobs)
    if env.rank:
        return None
    results = {arm: [m for m, task in zip(measured, tasks) if task[1] == arm] for arm in args.arms}
    logs = {arm: [common.Log(out, f"{arm}-s{seed}") for seed in args.seeds] for arm in args.arms}
    run.metrics = {"theorems": found, "tokenizers": kinds, "arms": results}
    judge(run, results, found, kinds)
    draw(out / "formal_tokenization.png", results, logs)
    return run.finish([log for seeds in logs.values() for log in seeds])


if __name__ == "__main__":
    main()
