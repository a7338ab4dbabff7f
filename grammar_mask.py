r"""Exact token masks: a language model writes inside a grammar, whatever its vocabulary.

A mask says which ids may come next so that the text can still become a text of the language.
A token may close three brackets, or end inside a number or a character: so all is done in bytes.

    engine = Engine(json_schema(schema), vocabulary(tokenizer), tokenizer.eos_token_id)
    text = Constraint(engine)  # one for each text; they share what the engine has found out
    text.mask()                # (V,) bool: the ids that may come next
    text.advance(id)           # takes one

    python grammar_mask.py --schema person.json --model smollm2-135m-instruct --prompt "A person."

Read on: `parse_ebnf`, `Automaton` (the states of a grammar), `Engine` (its masks), `Masker`.
"""

import argparse
import heapq
import json
import re
from dataclasses import dataclass
from functools import cache
from itertools import chain

import numpy as np
import torch

STATES = 200_000  # that a grammar may take, some 2 kB each
STACKS = 20_000  # that one text may be on

# ------------------- grammars
# A grammar is {rule: (regular expression, names)}, its language that of the rule `root`. Rules of
# EBNF call others: group i of the expression is empty, and stands for a text of rule names[i].

JSON = r"""
root    ::= ws value ws
value   ::= object | array | string | number | boolean | null
object  ::= "{" ws (pair ("," ws pair)*)? "}"
pair    ::= string ws ":" ws value ws
array   ::= "[" ws (value ws ("," ws value ws)*)? "]"
string  ::= "\"" ([^"\\\x00-\x1F\x7F] | "\\" (["\\/bfnrt] | "u" [0-9a-fA-F]{4}))* "\""
number  ::= integer ("." [0-9]+)? ([eE] [-+]? [0-9]+)?
integer ::= "-"? ("0" | [1-9] [0-9]*)
boolean ::= "true" | "false"
null    ::= "null"
ws      ::= [ \t\n\r]*
"""
RULE = re.compile(r"^[ \t]*([A-Za-z_][\w-]*)[ \t]*::=", re.MULTILINE)
TOKEN = re.compile(
    r"(?P<space>\s+|#[^\n]*)|(?P<name>[A-Za-z_][\w-]*)|"
    r'(?P<literal>"(?:\\[^dDsSwW\n]|[^"\\\n])*")|(?P<class>\[(?:\\.|[^\]\\\n])*\])|'
    r"(?P<repeat>(?:[*+?]|\{\d+,?\d*\}|\{,\d+\})(?!\s*[*+?{]))|(?P<mark>[()|])|(?P<odd>.)"
)


def parse_regex(pattern):
    """The grammar of the texts that re.fullmatch(pattern, text) accepts."""
    return {"root": (pattern, None)}


def parse_ebnf(text):
    """The grammar of an EBNF text: `name ::= ` names, "literals", [classes], ( ), |, * + ? {m,n}.

    All are written as in Python's regular expressions; # is a note. Raises ValueError.
    """
    parts = RULE.split(text)  # what stands before the rules; then a name and a body, for each
    names, rules = dict.fromkeys(parts[1::2]), {}
    for rule, body in zip(["", *parts[1::2]], parts[::2]):
        pieces, called = [], [rule]  # group 0 of a rule is the rule itself
        for match in TOKEN.finditer(body):
            kind, word = match.lastgroup, match[0]
            if kind == "odd" or (rule == "" and kind != "space"):  # text before the first rule
                raise ValueError(f"the grammar can't be read at {body[match.start() :][:20]!r}")
            if kind == "name":
                if word not in names:
                    raise ValueError(f"rule {word} is not defined, allowed: {', '.join(names)}")
                pieces.append("()")
                called.append(word)
            elif kind == "literal":
                letters = re.findall(r"\\.|.", word[1:-1])  # an escape counts as one
                letters = [x if x[0] == "\\" else re.escape(x) for x in letters]
                pieces.append(f"(?:{''.join(letters)})")
            elif kind != "space":
                pieces.append("(?:" if word == "(" else word)
        if rule in rules:
            raise ValueError(f"rule {rule} is defined twice")
        rules[rule] = "".join(pieces), called
    del rules[""]
    if "root" not in rules:
        raise ValueError(f"the grammar has no rule root, only: {', '.join(rules) or 'nothing'}")
    return rules


# --------------- JSON schemas

NOTES = {"title", "description", "default", "examples", "$schema", "$id", "$defs", "definitions"}
TYPES = {"string": [str], "integer": [int], "number": [int, float], "boolean": [bool]}
TYPES |= {"null": [type(None)], "object": [dict], "array": [list]}  # all are rules of JSON as well
OBJECT = {"properties", "required", "additionalProperties"}
dumps = json.JSONEncoder(ensure_ascii=False, allow_nan=False).encode


def json_schema(schema):
    """The grammar, as EBNF, of the JSON texts that a schema (a dict) allows; else ValueError.

    An object has all of its properties, in their order, and no others. White space is a blank, or
    a line break with an indentation, so that a model can't go on with it for ever.
    """
    rules = {}
    try:
        root = schema_rule(schema, schema, rules)
    except (AttributeError, TypeError, KeyError, RecursionError) as error:
        raise ValueError(f"no JSON schema that can be read: {error!r}") from None
    text = JSON.replace("ws value ws", root, 1).replace(r"[ \t\n\r]*", r'(" " | "\n" " "{0,16})?')
    return text + "".join([f"{name} ::= {body}\n" for name, body in rules.values()])


def schema_rule(part, schema, rules):
    """The name of the rule for a part of the schema; rules {id of a part: (name, right side)}."""
    keys = set() if part is True else part.keys() - NOTES
    if not keys:
        return "value"
    if id(part) in rules:
        return rules[id(part)][0]
    name = f"part{len(rules)}"
    rules[id(part)] = name, ""  # entered by now: it may contain itself
    kind = part.get("type")
    if kind not in (None, *TYPES):
        raise ValueError(f"the type {kind} in a JSON schema, allowed: {', '.join(TYPES)}")
    rest = keys - {"type"}
    if keys == {"$ref"}:
        root, *path = part["$ref"].split("/")
        target = {"#": schema}[root]  # KeyError for another file
        for key in path:
            target = target[key.replace("~1", "/").replace("~0", "~")]
        choices = [schema_rule(target, schema, rules)]
    elif keys == {"anyOf"}:
        choices = [schema_rule(one, schema, rules) for one in part["anyOf"]]
    elif not rest:
        choices = [kind]
    elif rest in ({"enum"}, {"const"}):
        values = part.get("enum", [part.get("const")])
        values = [value for value in values if not kind or type(value) in TYPES[kind]]
        choices = [dumps(dumps(value)) for value in values]  # JSON, as a literal of EBNF
    elif rest == {"items"} and kind in (None, "array"):
        item = schema_rule(part["items"], schema, rules)
        choices = [f'"[" ws ({item} ("," ws {item})* ws)? "]"']
    elif "properties" in rest and rest <= OBJECT and kind in (None, "object"):
        properties = part["properties"]
        if {*part.get("required", [])} - properties.keys():
            raise ValueError("a JSON schema requires a property that it does not describe")
        values = [schema_rule(value, schema, rules) for value in properties.values()]
        pairs = [f"{dumps(dumps(key) + ':')} ws {v} " for key, v in zip(properties, values)]
        choices = ['"{" ws ' + '"," ws '.join(pairs) + 'ws "}"']
    else:
        raise ValueError(f"a JSON schema with {', '.join(sorted(keys))}: not supported together")
    if not choices:
        raise ValueError(f"a JSON schema allows nothing: {part!r:.60}")
    rules[id(part)] = name, " | ".join(choices)
    return name


# -------------- the automaton

END = 0  # the state at the end of every rule
SIZE = 5 * 64**3  # room for all code points, in whole blocks that share their first UTF-8 byte
EVERYTHING = np.arange(0x110000, dtype="<u4").tobytes().decode("utf-32-le", "surrogatepass")


@cache
def class_bytes(op, value):
    """A parsed class such as [^a-z] in UTF-8: [(set of bytes, [the same of what follows])]."""
    run = re._parser.parse("a+")
    run[0][1][2][0] = op, value  # the class in place of the a: `run` finds runs of its characters
    marks = np.zeros(SIZE, bool)  # by code point
    for match in re._compiler.compile(run).finditer(EVERYTHING):
        marks[match.start() : match.end()] = True
    marks[0xD800:0xE000] = False  # surrogates are no characters
    found = []
    for n, (head, end) in enumerate([(0, 0x80), (0xC0, 0x800), (0xE0, 0x10000), (0xF0, SIZE)]):
        found += utf8(marks[:end], head, n)
        marks[:end] = False
    return found


def utf8(marks, head, n):
    """`class_bytes` of the marked code points that are a byte, from `head` on, and n more bytes."""
    heads = {}  # {what is marked behind a byte: the bytes behind which it is}
    for i, row in enumerate(marks.reshape(-1, 64**n)):
        if row.any():
            heads.setdefault(row.tobytes(), set()).add(head + i)
    tails = [utf8(np.frombuffer(row, bool), 0x80, n - 1) if n else [] for row in heads]
    return list(zip(heads.values(), tails))


ODD = {"AT": r"an anchor (^ $ \b)", "GROUPREF": "a reference to a group"}
ODD |= {"ASSERT": "a look-around", "ASSERT_NOT": "a look-around", "SUBPATTERN": "flags"}


class Automaton:
    """The rules of a grammar as states: numbers, one for all states that do the same.

    moves[s] are (what, state) for each way on from s. `what` is a set of bytes, one of which is
    read; a rule, which is called and comes back to the state; or None: nothing. least[s] are the
    fewest bytes from s to the end of its rule, starts {rule: its first state}. Only the bytes in
    `spelled` are read: texts with others are left out. Python's own parser reads the expressions,
    so that all means what it means in re.fullmatch (where a lazy quantifier is as good as any).
    """

    def __init__(self, grammar, spelled):
        self.spelled = spelled
        self.moves = [()]
        self.known = {}  # {moves: the state that has them}
        self.starts = {}
        for rule, (pattern, names) in grammar.items():
            try:
                parsed = re._parser.parse(pattern)
                self.starts[rule] = self.build(parsed, names, END)
            except (RecursionError, OverflowError):
                raise ValueError(f"rule {rule}: nested too deeply, or a number too large") from None
            except re.error as error:
                raise ValueError(f"rule {rule}: {error.msg}") from None
            if parsed.state.flags != re.UNICODE:
                raise ValueError(f"rule {rule}: flags such as (?i) are not supported")
        self.least = self.shortest()
        for rule, start in self.starts.items():
            if start not in self.least:
                raise ValueError(f"rule {rule} is unproductive: no string of it can be spelled")
        for s, moves in enumerate(self.moves):
            self.moves[s] = [(what, t) for what, t in moves if t in self.least]

    def state(self, *moves):
        """The state with these moves; a new one if there is none."""
        s = self.known.setdefault(moves, len(self.moves))
        if s == len(self.moves):
            self.moves.append(moves)
        if s == STATES:
            raise ValueError(f"the grammar takes more than {STATES:,} states")
        return s

    def build(self, parsed, names, then):
        """The state from which the texts of a parsed expression lead to the state `then`."""
        for op, value in reversed(parsed):
            name = str(op)
            if name == "LITERAL":
                for b in reversed(chr(value).encode()):
                    then = self.reading([({b}, [])], then)
            elif name in ("IN", "NOT_LITERAL", "ANY"):
                value = tuple(value) if name == "IN" else value
                then = self.reading(class_bytes(op, value), then)
            elif name == "BRANCH":
                then = self.state(*[(None, self.build(one, names, then)) for one in value[1]])
            elif name == "SUBPATTERN" and names:
                then = self.state((names[value[0]], then))
            elif name == "SUBPATTERN" and value[1] == value[2] == 0:  # no flags of its own
                then = self.build(value[3], names, then)
            elif name in ("MAX_REPEAT", "MIN_REPEAT"):
                least, most, body = value
                end = (None, then)
                if most is re._constants.MAXREPEAT:
                    then = self.state((None, len(self.moves)), end)  # a new one: it leads to itself
                    self.moves[then] = ((None, self.build(body, names, then)), end)  # now a loop
                    most = least
                for i in range(most):  # from the last one on
                    before, then = then, self.build(body, names, then)
                    if then == before:  # it reads nothing
                        break
                    if i < most - least:
                        then = self.state((None, then), end)
            else:
                what = ODD.get(name, name.lower().replace("_", " "))
                raise ValueError(f"an automaton can't do {what}")
        return then

    def reading(self, branches, then):
        """The state that reads one character (of `class_bytes`), then goes on to another."""
        moves = []
        for some, tails in branches:
            after = self.reading(tails, then) if tails else then
            moves.append((frozenset(some & self.spelled), after))
        return self.state(*moves)

    def shortest(self):
        """`least` of every state that has one, nearest first (Dijkstra; Knuth for grammars)."""
        users = [[] for _ in self.moves]  # of a state: (state, bytes, a second state that it needs)
        for s, moves in enumerate(self.moves):
            for what, t in moves:
                start = self.starts.get(what, END)
                cost = int(isinstance(what, frozenset))
                if what != frozenset():
                    users[t].append((s, cost, start))
                    users[start].append((s, cost, t))
        least, heap = {}, [(0, END)]
        while heap:
            n, t = heapq.heappop(heap)
            if t not in least:
                least[t] = n
                for s, cost, other in users[t]:
                    if other in least:
                        heapq.heappush(heap, (n + cost + least[other], s))
        return least


# ----------------- the engine


def trie_of(vocab, class_of, n_classes):
    """The trie of the strings of a vocabulary: (first, kind, node).

    Bytes of a class are one, strings with a byte of class 0 are left out. Nodes are numbered level
    by level from the root, 0; node i has the children first[i]..first[i + 1], class kind[i] leads
    to it; id j ends at node[j], or at 0.
    """
    length = np.array([len(piece or b"") for piece in vocab], int)
    start = np.cumsum(length) - length
    classes = np.array(class_of)[np.frombuffer(b"".join(filter(None, vocab)), np.uint8)]
    length[np.repeat(np.arange(len(vocab)), length)[classes == 0]] = 0
    at = np.flatnonzero(length)  # the strings that go on
    node = np.zeros(len(vocab), int)
    begin, end = 0, 1  # the nodes of a level
    keys = [[-1]]  # of each node: parent * n_classes + kind; the root is no child
    for depth in range(length.max(initial=0)):
        child = (node[at] - begin) * n_classes + classes[start[at] + depth]
        there = np.zeros((end - begin) * n_classes, bool)
        there[child] = True
        node[at] = end + np.cumsum(there)[child] - 1
        keys.append(begin * n_classes + np.flatnonzero(there))
        begin, end = end, end + len(keys[-1])
        at = at[length[at] > depth + 1]
    keys = np.concatenate(keys)
    first = np.searchsorted(keys, np.arange(end + 1) * n_classes)
    return first, keys % n_classes, node


@dataclass(slots=True, eq=False)
class Cell:
    """A stack: a state over the stack to come back to. One object for each: `is` is equality."""

    state: int
    parent: "Cell"
    least: int  # the fewest bytes to the end of the text


@dataclass(slots=True, eq=False)
class Config:
    """Where a text can be: a set of stacks."""

    cells: frozenset
    accepts: bool  # whether the text may end here
    least: int = 0  # the fewest bytes to its end; 0 if it accepts
    mask: np.ndarray = None  # once it has been asked for
    most: int = 0  # bytes that are enough to end the text, after any id of the mask


class Engine:
    """The masks of one grammar over one vocabulary; all texts (`Constraint`) share its memory.

    grammar: EBNF, or what parse_ebnf or parse_regex returns; vocab: the bytes of every id (None:
    special); eos: the id or ids that end a text.

    A text is on a set of stacks of states. The trie is walked for the top state while its rule
    lasts: this tells which tokens end inside the rule, and at which nodes the rule ends. There the
    state below goes on. A walk is remembered, for any depth. A mask is the union of all walks.
    """

    def __init__(self, grammar, vocab, eos=()):
        self.vocab = vocab
        self.eos = np.atleast_1d([] if eos is None else eos).astype(int).tolist()
        if not all([piece is None or isinstance(piece, bytes) for piece in vocab]):
            raise ValueError("a vocabulary holds bytes, and None for special ids")
        if not {*self.eos} <= {*range(len(vocab))}:
            raise ValueError(f"eos {self.eos} is out of range, allowed: 0 to {len(vocab) - 1}")
        single = [p[0] for i, p in enumerate(vocab) if p and len(p) == 1 and i not in self.eos]
        grammar = parse_ebnf(grammar) if isinstance(grammar, str) else grammar
        self.automaton = Automaton(grammar, frozenset(single))
        sets = {what for what, _ in chain(*self.automaton.moves) if isinstance(what, frozenset)}
        holding = [frozenset([some for some in sets if b in some]) for b in range(256)]
        classes = list(dict.fromkeys([frozenset(), *holding]))  # class 0 is never read
        self.class_of = [classes.index(some) for some in holding]
        self.byte_of = {c: b for b, c in enumerate(self.class_of)}  # one for all of its class
        self.first, self.kind, self.node = trie_of(vocab, self.class_of, len(classes))
        self.node[self.eos] = 0  # the end is no text
        self.masks = {}  # {what a mask is made of: mask}
        self.cell = cache(Cell)  # the same arguments, the same object: for these five
        self.unique = cache(Config)
        self.step = cache(self.step)
        self.take = cache(self.take)
        self.walk = cache(self.walk)
        self.entered = set()  # states, by any text so far
        self.bottom = Cell(END, None, 0)  # below every stack
        self.done = Config(frozenset(), False)  # after the end
        for start in self.automaton.starts.values():  # is there left recursion?
            if start not in self.entered:
                self.config([(start, self.bottom)])
        self.start = self.config([(self.automaton.starts["root"], self.bottom)])

    def config(self, entries):
        """The configuration after entering each of [(state, stack below)]; one for equal ones."""
        starts, least = self.automaton.starts, self.automaton.least
        cells, todo = set(), list(entries)
        seen = set(entries)
        for state, parent in todo:  # grows: what can be done without reading a byte
            self.entered.add(state)
            ahead = []
            if state == END and parent is not self.bottom:
                ahead.append((parent.state, parent.parent))
            elif state == END:
                cells.add(self.cell(END, parent, 0))
            for what, t in self.automaton.moves[state]:
                if what is None:
                    ahead.append((t, parent))
                elif what in starts and t == END:  # no need to come back to t
                    ahead.append((starts[what], parent))
                elif what in starts:
                    ahead.append((starts[what], self.cell(t, parent, parent.least + least[t])))
                else:
                    cells.add(self.cell(state, parent, parent.least + least[state]))
            todo += [one for one in ahead if one not in seen]
            seen.update(ahead)
            if len(seen) > STACKS:
                raise ValueError(f"left recursion, or too ambiguous: more than {STACKS:,} stacks")
        fewest = min([cell.least for cell in cells])
        return self.unique(frozenset(cells), fewest == 0, fewest)

    def step(self, config, c):
        """The configuration after a byte of class c; None if no stack reads it."""
        entries, b = [], self.byte_of[c]
        for cell in config.cells:
            moves = self.automaton.moves[cell.state]
            entries += [(t, cell.parent) for some, t in moves if b in some]
        return self.config(entries) if entries else None

    def read(self, config, text):
        """The configuration after some bytes; None where they leave the language."""
        for b in text:
            config = config and self.step(config, self.class_of[b])
        return config

    def take(self, config, id):
        """The configuration after an id; None if it is refused."""
        if id in self.eos:
            return self.done if config.accepts else None
        return self.read(config, self.vocab[id]) if self.vocab[id] else None

    def walk(self, state, nodes):
        """From trie nodes on, while the rule of `state` lasts.

        nodes: an array as bytes, which can be remembered. Returns [(array of nodes that are
        reached, bytes from there to the rule's end)], and the nodes where the rule may end.
        """
        frontier = {self.config([(state, self.bottom)]): np.frombuffer(nodes, int)}
        reached, ended = [], []
        while frontier:
            below = {}
            for config, at in frontier.items():
                if config.accepts:
                    ended.append(at.tobytes())
                n = self.first[at + 1] - self.first[at]  # how many children; they follow first[at]
                kids = np.repeat(self.first[at] - np.cumsum(n) + n, n) + np.arange(n.sum())
                kinds = self.kind[kids]
                targets = {}  # {config: which of the classes, 257 at most, lead to it}
                for c in np.flatnonzero(np.bincount(kinds)).tolist():
                    targets.setdefault(self.step(config, c), np.zeros(257, bool))[c] = True
                for to, classes in targets.items():
                    below.setdefault(to, []).append(kids[classes[kinds]])
            below.pop(None, None)
            frontier = {config: np.concatenate(parts) for config, parts in below.items()}
            reached += [(at, config.least) for config, at in frontier.items()]
        return reached, np.unique(np.frombuffer(b"".join(ended), int)).tobytes()

    def mask(self, config, left=np.inf):
        """Bool (V,), read-only: the ids after which the text can end, in at most `left` bytes."""
        if config.mask is not None and config.most <= left:
            return config.mask
        parts, key = [], frozenset()
        root = np.zeros(1, int).tobytes()
        todo = [(cell.state, cell.parent, root) for cell in config.cells]
        for state, parent, nodes in todo:  # grows
            reached, ended = self.walk(state, nodes)
            key |= {(state, nodes)}
            parts += [(part, least + parent.least) for part, least in reached]
            if ended and parent is not self.bottom:
                todo.append((parent.state, parent.parent, ended))
        config.most = max([least for _, least in parts], default=0)
        if key not in self.masks or config.most > left:
            marks = np.zeros(len(self.kind), bool)
            for part, least in parts:
                if least <= left:
                    marks[part] = True
            mask = marks[self.node]
            mask[self.eos] = config.accepts
            mask.flags.writeable = False
            if config.most > left:
                return mask
            self.masks[key] = mask
        config.mask = self.masks[key]
        return config.mask

    def explain(self, config, text):
        """Where bytes leave the language after `config`, and what is expected there."""
        for i in range(len(text)):
            after = self.read(config, text[i : i + 1])
            if after is None:
                wanted = bytes([b for b in range(256) if self.read(config, [b])])
                return f"refused at byte {i}, {text[i : i + 1]}; expected: one of {wanted}"
            config = after
        return "complete" if config.accepts else f"incomplete: it takes {config.least} bytes more"


class Constraint:
    """A text that grows id by id; it may end if `state.accepts`. Earlier states can be put back."""

    def __init__(self, engine):
        self.engine, self.state = engine, engine.start

    def mask(self):
        """Bool (V,), read-only: the ids that may come next."""
        return self.engine.mask(self.state)

    def advance(self, id):
        """Takes one id; ValueError, saying why, if the mask refuses it."""
        if not 0 <= id < len(self.engine.vocab):
            raise ValueError(f"id {id}, allowed: 0 to {len(self.engine.vocab) - 1}")
        after = self.engine.take(self.state, id)
        if after is None:
            piece = self.engine.vocab[id]
            raise ValueError(f"id {id}, {piece}: {self.engine.explain(self.state, piece or b'')}")
        self.state = after


# -------------------- its use


def vocabulary(tokenizer):
    """The bytes of every id (None: it spells nothing) of a tokenizer, for Engine.

    tokenizer: of data.py, transformers (fast ones), tokenizers or tiktoken. ValueError if its
    pieces are no plain strings, as those of WordPiece (##) and of BPE with </w>.
    """
    backend = getattr(tokenizer, "backend_tokenizer", getattr(tokenizer, "backend", tokenizer))
    if hasattr(backend, "_mergeable_ranks"):  # a tiktoken.Encoding
        pieces = {id: piece for piece, id in backend._mergeable_ranks.items()}
        return [pieces.get(id) for id in range(backend.n_vocab)]
    spec = json.loads(backend.to_str())
    model, decoder = spec["model"], dumps(spec["decoder"])
    level = "ByteLevel" in decoder
    mark = model.get("continuing_subword_prefix") or model.get("end_of_word_suffix")
    if mark or not (level or "▁" in decoder):
        raise ValueError(f"pieces with {mark or 'the decoder ' + decoder[:60]} are not supported")
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]  # GPT-2's stand-ins for bytes
    hidden = [b for b in range(256) if b not in shown]
    byte_of = {chr(b): b for b in shown} | {chr(256 + i): b for i, b in enumerate(hidden)}
    ids = backend.get_vocab()
    special = {token["id"] for token in spec["added_tokens"] if token["special"]}
    special |= {ids.get(model.get("unk_token")), model.get("unk_id")}
    vocab = [None] * (max(ids.values()) + 1)
    for piece, id in ids.items():
        if id in special:
            continue
        if level and byte_of.keys() >= {*piece}:
            vocab[id] = bytes([byte_of[c] for c in piece])
        elif not level and re.fullmatch("<0x[0-9A-F]{2}>", piece):
            vocab[id] = bytes.fromhex(piece[3:5])
        else:
            vocab[id] = (piece if level else piece.replace("▁", " ")).encode()
    return vocab


class Masker:
    """A `process` for model.generate: every text of the batch stays inside the engine's language.

    It holds nothing of the texts, so one object serves any number of calls. With `max_new_tokens`
    (that of `generate`) every text is complete in time: if need be, each byte is a token.
    """

    def __init__(self, engine, max_new_tokens=np.inf):
        self.engine, self.max_new_tokens = engine, max_new_tokens
        if not engine.eos:
            raise ValueError("a mask needs the id that ends a text: give the engine its eos")
        least = engine.start.least + 1
        if least > max_new_tokens:
            raise ValueError(f"max_new_tokens {max_new_tokens}: the shortest text may take {least}")

    def __call__(self, logits, alive, out):
        """logits (B, V) of rows alive[i] of `out`, lists of new ids. Returns the masked logits."""
        allowed = torch.zeros(logits.shape, dtype=torch.bool)
        for i, row in enumerate(alive):
            text = Constraint(self.engine)
            for id in out[row]:
                if text.state is not self.engine.done:
                    text.advance(id)
            left = self.max_new_tokens - len(out[row]) - 2  # without the id to come and the end
            mask = torch.tensor(self.engine.mask(text.state, left))[: logits.shape[1]]
            ended = text.state is self.engine.done  # then it is left alone
            allowed[i, : len(mask)] = mask | ended
        return logits.masked_fill(~allowed.to(logits.device), -torch.inf)


class LogitsProcessor:
    """A Masker for transformers; prompt_length is that of the input_ids, padding included."""

    def __init__(self, engine, prompt_length, max_new_tokens=np.inf):
        self.prompt_length, self.masker = prompt_length, Masker(engine, max_new_tokens)

    def __call__(self, input_ids, scores):
        new = input_ids[:, self.prompt_length :].tolist()
        return self.masker(scores, range(len(new)), new)


def main(argv=None):
    """Lets a model write inside a grammar, or explains where a text leaves it."""
    import common  # only the command line needs more than this file
    import data
    import pretrained
    from model import generate

    parser = argparse.ArgumentParser("grammar_mask.py", description=main.__doc__)
    parser.error = common.fail
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--schema", metavar="FILE", help="a JSON schema")
    source.add_argument("--grammar", metavar="FILE", help="EBNF with a rule root")
    source.add_argument("--regex", metavar="PATTERN", help="as in re.fullmatch")
    use = parser.add_mutually_exclusive_group(required=True)
    use.add_argument("--explain", metavar="TEXT", help="where does TEXT leave the grammar?")
    use.add_argument("--prompt", metavar="TEXT", help="what to ask --model")
    parser.add_argument("--model", default="smollm2-135m-instruct", help="[%(default)s]")
    parser.add_argument("--max-new-tokens", type=int, default=256, help="[%(default)s]")
    args = parser.parse_args(argv)
    path = args.schema or args.grammar
    with common.bad_input(path or "--regex"):
        grammar = data.read_text(path) if path else parse_regex(args.regex)
        if args.schema:
            grammar = json_schema(json.loads(grammar))
        engine = Engine(grammar, [bytes([b]) for b in range(256)])
    if args.explain is not None:
        return print(engine.explain(engine.start, args.explain.encode(errors="surrogateescape")))
    with common.bad_input():
        model, tok = pretrained.load(args.model)
        engine = Engine(grammar, vocabulary(tok), tok.stops)
        prompt = tok.encode(args.prompt, bos=True)
        if tok.template:
            prompt = tok.chat([{"role": "user", "content": args.prompt}])
        options = {"stop": tok.stops, "process": Masker(engine, args.max_new_tokens)}
        ids = generate(model, [prompt], args.max_new_tokens, 0.0, **options)[0]
    print(data.printable(tok.decode(ids[:-1])))


if __name__ == "__main__":
    from common import cli

    cli(main)
