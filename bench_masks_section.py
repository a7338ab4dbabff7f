"""The `masks` section of bench.py as plain functions, to be merged into it: `masks(device)` returns its rows.

python bench_masks_section.py        # what `python bench.py masks` will print
"""

import gc
import json
import random
import time

import numpy as np
import torch

import data
import grammar_mask as gm

JSON_LARK = r"""
start: WS? value WS?
value: object | array | STRING | NUMBER | "true" | "false" | "null"
object: "{" WS? (pair ("," WS? pair)*)? "}"
pair: STRING WS? ":" WS? value WS?
array: "[" WS? (value WS? ("," WS? value WS?)*)? "]"
STRING: /"([^"\\\x00-\x1f\x7f]|\\(["\\\/bfnrt]|u[0-9a-fA-F]{4}))*"/
NUMBER: /-?(0|[1-9][0-9]*)(\.[0-9]+)?([eE][-+]?[0-9]+)?/
WS: /[ \t\n\r]+/
"""
LISP = r"""
root   ::= item (space item)*
item   ::= atom | string | "(" (item (space item)*)? ")"
atom   ::= [A-Za-z\u00C0-\u00FF+*/<>=!?-] [A-Za-z\u00C0-\u00FF0-9+*/<>=!?-]*
string ::= "\"" ([^"\\] | "\\" ["\\nt])* "\""
space  ::= [ \n]+
"""
LISP_LARK = r"""
start: item (SPACE item)*
item: ATOM | STRING | "(" (item (SPACE item)*)? ")"
ATOM: /[A-Za-z\u00C0-\u00FF+*\/<>=!?\-][A-Za-z\u00C0-\u00FF0-9+*\/<>=!?\-]*/
STRING: /"([^"\\]|\\["\\nt])*"/
SPACE: /[ \n]+/
"""
QUERY = r"""
root  ::= "SELECT " names " FROM " name (" WHERE " test)? ";"
names ::= "*" | name (", " name)*
test  ::= part ((" AND " | " OR ") part)*
part  ::= name (" = " | " < " | " <> ") value | "(" test ")"
value ::= [0-9]+ ("." [0-9]+)? | "'" ([^'] | "''")* "'" | name
name  ::= [A-Za-z_] [A-Za-z0-9_]*
"""
QUERY_LARK = r"""
start: "SELECT " names " FROM " NAME (" WHERE " test)? ";"
names: "*" | NAME (", " NAME)*
test: part ((" AND " | " OR ") part)*
part: NAME (" = " | " < " | " <> ") value | "(" test ")"
value: NUMBER | STRING | NAME
NUMBER: /[0-9]+(\.[0-9]+)?/
STRING: /'([^']|'')*'/
NAME: /[A-Za-z_][A-Za-z0-9_]*/
"""


def documents(rng, n):
    """n random JSON documents: nested objects and lists, strings with escapes and other alphabets, indented or not."""
    letters = "abcdefgh_ é"

    def value(depth=0):
        kind = rng.random()
        if depth < 4 and kind < 0.45:
            keys = ["".join(rng.choices(letters, k=rng.randint(1, 8))) for _ in range(rng.randint(0, 4))]
            return {key: value(depth + 1) for key in keys}
        if depth < 4 and kind < 0.7:
            return [value(depth + 1) for _ in range(rng.randint(0, 4))]
        text = 'say "' + " ".join(rng.choices(["the", "quick", "brown", "fox", "你好", "\n"], k=5)) + '"'
        return rng.choice([None, True, False, rng.randint(-99, 9999), rng.random() * 1e3, text])

    return [json.dumps(value(), ensure_ascii=rng.random() < 0.5, indent=rng.choice([None, 2])) for _ in range(n)]


def lisp_text(rng, depth=0):
    """A random expression of LISP."""
    kind = rng.random()
    if depth < 3 and kind < 0.5:
        return "(" + " ".join([lisp_text(rng, depth + 1) for _ in range(rng.randint(1, 4))]) + ")"
    if kind < 0.8:
        return rng.choice(["define", "lambda", "café", "naïve", "x", "list->vector", "set!", "+", "über", "eq?"])
    return rng.choice(['"hello world"', r'"say \"hi\""', '"你好, Welt"', '"The quick brown fox"', '"Привет"'])


def query_text(rng, depth=0):
    """A random QUERY; inside, a random test of it."""
    if depth:
        name = rng.choice(["id", "user_name", "created_at", "Total"])
        value = rng.choice([str(rng.randint(0, 99999)), f"{rng.random():.3f}", "'O''Brien'", "'été à Paris'", "x1"])
        test = f"{name} {rng.choice(['=', '<', '<>'])} {value}"
        if depth < 4 and rng.random() < 0.5:
            test += f" {rng.choice(['AND', 'OR'])} ({query_text(rng, depth + 1)})"
        return test
    names = ", ".join(rng.sample(["id", "user_name", "created_at", "Total"], rng.randint(1, 3)))
    return f"SELECT {names} FROM orders WHERE {query_text(rng, 1)};"


def mask_engines(grammar, lark, enc, trie, builtin=False):
    """{name: start}, where start() -> (fill, advance) of a fresh text; fill() -> the mask, packed or not."""
    engine, engines = gm.Engine(grammar, trie, enc.eot_token), {}

    def ours():
        c = gm.Constraint(engine)
        return (lambda show=False: c.mask()), c.advance

    engines["ours"] = ours
    try:
        from llguidance import LLMatcher
        from llguidance.numpy import allocate_token_bitmask, fill_next_token_bitmask
        from llguidance.tiktoken import lltokenizer_from_encoding

        tok = lltokenizer_from_encoding(enc)

        def llguidance():
            matcher, bits = LLMatcher(tok, LLMatcher.grammar_from_lark(lark)), allocate_token_bitmask(1, enc.n_vocab)
            assert not matcher.is_error(), matcher.get_error()

            def fill(show=False):
                fill_next_token_bitmask(matcher, bits)
                return unpacked(bits[0]) if show else None

            return fill, matcher.consume_token

        engines["llguidance"] = llguidance
    except ImportError:
        print("llguidance is not installed: left out")
    try:
        import xgrammar

        pieces = [b or b"<special>" for b in trie]
        info = xgrammar.TokenizerInfo(
            pieces, vocab_type=xgrammar.VocabType.RAW, vocab_size=enc.n_vocab, stop_token_ids=[enc.eot_token]
        )
        compiler = xgrammar.GrammarCompiler(info, max_threads=1, cache_enabled=False)
        compiled = {"xgrammar": compiler.compile_grammar(grammar)}
        if builtin:
            compiled["xgrammar, its own JSON"] = compiler.compile_builtin_json_grammar()

        def matcher_of(rules):
            def start():
                matcher, bits = xgrammar.GrammarMatcher(rules), xgrammar.allocate_token_bitmask(1, enc.n_vocab)

                def fill(show=False):
                    needed = matcher.fill_next_token_bitmask(bits)
                    found = unpacked(bits.numpy()[0]) if show else None
                    return found if needed or not show else np.ones_like(found)

                return fill, matcher.accept_token

            return start

        engines |= {name: matcher_of(rules) for name, rules in compiled.items()}
    except ImportError as error:
        print(f"xgrammar is not installed ({error}): left out")
    return engines


def unpacked(words):
    """Bits in 32-bit words as bools."""
    return np.unpackbits(words.view(np.uint8), bitorder="little").astype(bool)


def encoding(name, instead):
    """A tiktoken encoding; without a network one of `instead` ids, trained on the standard library."""
    try:
        import tiktoken

        return tiktoken.get_encoding(name)
    except Exception as error:  # no network: the libraries have exceptions of their own
        print(f"{name} can't be had ({type(error).__name__}): a vocabulary of {instead:,} in its place")
        return data.train_bpe("".join(data.load_text()), instead)


def pieces_of(enc):
    """The bytes of every id of a tiktoken encoding; None for its special ids."""
    pieces = {id: piece for piece, id in enc._mergeable_ranks.items()}
    return [pieces.get(id) for id in range(enc.n_vocab)]


def replay(start, streams):
    """Microseconds of mask + advance for every id of the streams: of this thread, as the machine may be busy."""
    times = []
    for ids in streams:
        fill, advance = start()
        for id in ids:
            began = time.thread_time()
            fill()
            advance(id)
            times.append(time.thread_time() - began)
    return np.array(times) * 1e6


def differing_bits(engines, streams, vocab):
    """{peer: bits in which its masks differ from ours}, along the streams."""
    wrong = {name: 0 for name in engines if name != "ours" and "own" not in name}
    real = [i for i, piece in enumerate(vocab) if piece]
    for ids in streams:
        running = {name: engines[name]() for name in ["ours", *wrong]}
        for id in ids:
            ours = running["ours"][0]()[real]
            for name in wrong:
                theirs = running[name][0](show=True)[real]
                if theirs.sum() == 1:  # llguidance spells what is forced in one way; its beginnings are right, too
                    forced = vocab[real[int(theirs.argmax())]]
                    for i in np.flatnonzero(ours & ~theirs):
                        theirs[i] = forced.startswith(vocab[real[i]])
                wrong[name] += int((theirs != ours).sum())
            for _, advance in running.values():
                advance(id)
    return wrong


def compare(what, engines, warm, rest, slow):
    """A row for each peer: mask + advance of `rest` after `warm`; the slow engines get `slow` streams."""
    mean, median = {}, {}
    for name in random.sample(list(engines), len(engines)):
        gc.collect()  # a full collection in between would be counted as somebody's mask
        gc.freeze()
        some = slow if name.startswith("xgrammar") else len(rest)
        replay(engines[name], warm[:some])
        t = replay(engines[name], rest[:some])
        mean[name], median[name] = t.mean(), np.median(t)
        line = "mean {:.1f}  p50 {:.2f}  p99 {:.0f}  max {:.0f} us"
        print(f"  {name:22s}", line.format(t.mean(), np.median(t), np.percentile(t, 99), t.max()))
    gc.unfreeze()
    return [
        {"what": f"{what}, 1,000 tokens", "peer": name[:18], "ours_ms": mean["ours"], "peer_ms": mean[name]}
        | {"ratio": mean[name] / mean["ours"], "quartiles": [median[name] / median["ours"]] * 2}
        for name in engines
        if name != "ours"
    ]


def masks(device):
    """Exact token masks, the same token streams for every engine; microseconds of mask + advance a token.

    JSON over cl100k (100,256 ids), unseen random documents after 1,000 tokens of warm-up. Then grammars for which
    nothing has been tuned over o200k (200,019 ids), from the first mask on (cold): twelve short documents, one engine.
    Every bit is compared. Rows hold ms for 1,000 tokens; in place of quartiles, the ratio of medians.
    """
    torch.set_num_threads(1)
    enc = encoding("cl100k_base", 4096)
    trie, streams = pieces_of(enc), [enc.encode(text) for text in documents(random.Random(0), 120)]
    n = np.cumsum([len(ids) for ids in streams])
    first, last = int((n < 1000).sum()) + 1, int((n < 4500).sum())
    engines = mask_engines(gm.JSON, JSON_LARK, enc, trie, builtin=True)
    print(f"JSON over {enc.n_vocab:,} ids, warm")
    rows = compare("JSON masks, warm", engines, streams[:first], streams[first:last], 12)
    wrong = {"json": differing_bits(engines, [ids[:60] for ids in streams[:20]], trie)}
    enc = encoding("o200k_base", 16384)
    trie = pieces_of(enc)
    for name, grammar, lark, text in ("Lisp", LISP, LISP_LARK, lisp_text), ("query", QUERY, QUERY_LARK, query_text):
        rng = random.Random(0)
        streams = [enc.encode(text(rng)) for _ in range(12)]
        print(f"{name} over {enc.n_vocab:,} ids, cold, {sum(map(len, streams))} tokens")
        engines = mask_engines(grammar, lark, enc, trie)
        rows += compare(f"{name} masks, cold", engines, [], streams, 12)
        wrong[name] = differing_bits(engines, streams, trie)
    print(f"bits that differ: {wrong}")
    assert not any(sum(found.values()) for found in wrong.values()), wrong
    return rows


if __name__ == "__main__":
    for row in masks(None):
        print("{what:34s} {ours_ms:9.2f} ms   {peer:18s} {peer_ms:9.2f} ms   {ratio:6.2f}x".format(**row))
